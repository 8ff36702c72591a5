//! The repository's own source, taken apart far enough to count things in it.
//!
//! Owns the walk over `crates` and a scanner that tells code from comments and literals. Not a
//! parser: it knows brackets, function headers and struct headers, which is all that counting needs.

use std::fs;
use std::path::{Path, PathBuf};

/// One Rust file.
pub struct Source {
    /// Path from the repository's root, with `/` between its parts.
    pub path: String,
    /// The file as it is.
    pub text: String,
    /// The same lines and columns with comments and the insides of literals blanked.
    pub code: String,
    /// The same lines and columns with everything but comments blanked.
    pub comments: String,
}

/// A function: where it is, its length and its parameters.
pub struct Function {
    /// Its name.
    pub name: String,
    /// Line of the header, from 1.
    pub line: usize,
    /// Lines from the header to the closing brace.
    pub lines: usize,
    /// Parameters, `self` included.
    pub parameters: usize,
}

/// The repository's root.
pub fn root() -> PathBuf {
    let crate_dir = Path::new(env!("CARGO_MANIFEST_DIR"));
    crate_dir.ancestors().nth(2).expect("crates/flash-moe in a repository").to_path_buf()
}

/// Every Rust file below `crates`, by path.
pub fn sources() -> Vec<Source> {
    let mut paths = Vec::new();
    walk(&root().join("crates"), &mut paths);
    paths.sort();
    assert!(paths.len() > 20, "{} Rust files below crates: the walk is wrong", paths.len());
    paths.iter().map(|path| Source::read(path)).collect()
}

fn walk(dir: &Path, paths: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).expect("a readable directory") {
        let path = entry.expect("a directory entry").path();
        if path.is_dir() {
            if path.file_name().is_some_and(|name| name != "target") {
                walk(&path, paths);
            }
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            paths.push(path);
        }
    }
}

impl Source {
    fn read(path: &Path) -> Self {
        let text = fs::read_to_string(path).expect("a UTF-8 source file");
        let path = path.strip_prefix(root()).expect("a path below the root");
        let path = path.components().map(|c| c.as_os_str().to_string_lossy()).collect::<Vec<_>>();
        Self::new(path.join("/"), text)
    }

    /// Takes `text` apart.
    pub fn new(path: String, text: String) -> Self {
        let (code, comments) = split(&text);
        Self { path, text, code, comments }
    }

    /// Whether it is part of a crate, not one of its tests.
    pub fn is_src(&self) -> bool {
        self.path.contains("/src/")
    }

    /// `path:line: text` for every line of `part` that is `wanted`.
    pub fn hits<'a>(&self, part: &'a str, wanted: impl Fn(&'a str) -> bool) -> Vec<String> {
        let numbered = (1..).zip(part.lines().zip(self.text.lines()));
        numbered
            .filter(|(_, (line, _))| wanted(line))
            .map(|(number, (_, text))| format!("{}:{number}: {}", self.path, text.trim()))
            .collect()
    }

    /// Every function with a body.
    pub fn functions(&self) -> Vec<Function> {
        let mut functions = Vec::new();
        for (at, _) in self.code.match_indices("fn ") {
            let before = self.code[..at].chars().next_back();
            let name = word(&self.code[at + 3..]);
            if before.is_some_and(|c| !c.is_whitespace() && c != '(') || name.is_empty() {
                continue;
            }
            let Some(open) = self.code[at..].find('(').map(|i| at + i) else { continue };
            let Some(close) = closing(&self.code, open) else { continue };
            let Some(end) = self.code[close..].find(['{', ';']).map(|i| close + i) else {
                continue;
            };
            if !self.code[end..].starts_with('{') {
                continue;
            }
            let Some(last) = closing(&self.code, end) else { continue };
            functions.push(Function {
                name,
                line: self.line(at),
                lines: self.line(last) - self.line(at) + 1,
                parameters: items(&self.code[open + 1..close]),
            });
        }
        functions
    }

    /// Name, line and number of fields of every struct with named fields.
    pub fn structs(&self) -> Vec<(String, usize, usize)> {
        let mut structs = Vec::new();
        for (at, _) in self.code.match_indices("struct ") {
            let name = word(&self.code[at + 7..]);
            let Some(open) = self.code[at..].find(['{', ';', '(']).map(|i| at + i) else {
                continue;
            };
            if name.is_empty() || !self.code[open..].starts_with('{') {
                continue;
            }
            let Some(close) = closing(&self.code, open) else { continue };
            structs.push((name, self.line(at), items(&self.code[open + 1..close])));
        }
        structs
    }

    fn line(&self, at: usize) -> usize {
        self.code[..at].matches('\n').count() + 1
    }
}

/// The identifier at the start of `text`.
pub fn word(text: &str) -> String {
    text.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect()
}

/// Where the bracket at `open` closes.
fn closing(code: &str, open: usize) -> Option<usize> {
    let mut depth = 0usize;
    for (at, c) in code[open..].char_indices() {
        match c {
            '(' | '[' | '{' => depth += 1,
            ')' | ']' | '}' => depth = depth.checked_sub(1)?,
            _ => {}
        }
        if depth == 0 {
            return Some(open + at);
        }
    }
    None
}

/// Items between commas outside brackets of any kind; a comma at the end adds none.
fn items(list: &str) -> usize {
    let (mut depth, mut count, mut item) = (0i32, 0, String::new());
    let mut previous = ' ';
    for c in list.chars() {
        match c {
            '(' | '[' | '{' | '<' => depth += 1,
            // `->` and `=>` close nothing.
            '>' if matches!(previous, '-' | '=') => {}
            ')' | ']' | '}' | '>' => depth -= 1,
            _ => {}
        }
        previous = c;
        if c == ',' && depth == 0 {
            count += usize::from(!item.trim().is_empty());
            item.clear();
        } else {
            item.push(c);
        }
    }
    count + usize::from(!item.trim().is_empty())
}

/// What a character belongs to.
#[derive(Clone, Copy, PartialEq)]
enum Part {
    Code,
    Comment,
    Literal,
}

/// The text twice, with all but code and all but comments blanked.
fn split(text: &str) -> (String, String) {
    let chars: Vec<char> = text.chars().collect();
    let mut parts = vec![Part::Code; chars.len()];
    let mut at = 0;
    while at < chars.len() {
        let (end, part) = piece(&chars, at);
        // The quotes stay code, so that a literal is still seen to be there.
        let inside = if part == Part::Literal { at + 1..end - 1 } else { at..end };
        parts[inside].fill(part);
        at = end;
    }
    let keep = |wanted: Part| {
        let pairs = chars.iter().zip(&parts);
        pairs.map(|(&c, &part)| if part == wanted || c == '\n' { c } else { ' ' }).collect()
    };
    (keep(Part::Code), keep(Part::Comment))
}

/// Where the piece that begins at `at` ends, and what it is.
fn piece(chars: &[char], at: usize) -> (usize, Part) {
    let next = |i: usize| chars.get(at + i).copied().unwrap_or(' ');
    let follows_word = at > 0 && (chars[at - 1].is_alphanumeric() || chars[at - 1] == '_');
    let find = |from: usize, end: &[char]| {
        let rest = &chars[from.min(chars.len())..];
        let found = rest.windows(end.len()).position(|w| w == end);
        found.map_or(chars.len(), |i| from + i + end.len())
    };
    match (chars[at], next(1)) {
        ('/', '/') => (find(at, &['\n']), Part::Comment),
        ('/', '*') => (find(at + 2, &['*', '/']), Part::Comment),
        ('r', '"' | '#') if !follows_word => {
            let hashes = chars[at + 1..].iter().take_while(|&&c| c == '#').count();
            if next(hashes + 1) != '"' {
                return (at + 1, Part::Code);
            }
            let end: Vec<char> = std::iter::once('"').chain(vec!['#'; hashes]).collect();
            (find(at + hashes + 2, &end), Part::Literal)
        }
        ('"', _) => (quoted(chars, at, '"'), Part::Literal),
        ('\'', '\\') => (quoted(chars, at, '\''), Part::Literal),
        ('\'', _) if next(2) == '\'' => (at + 3, Part::Literal),
        _ => (at + 1, Part::Code),
    }
}

fn quoted(chars: &[char], at: usize, quote: char) -> usize {
    let mut end = at + 1;
    while end < chars.len() && chars[end] != quote {
        end += if chars[end] == '\\' { 2 } else { 1 };
    }
    (end + 1).min(chars.len())
}
