//! Code in colours, line by line.
//!
//! The grammars are syntect's; the colours are the terminal's own, chosen by the scope that a
//! grammar gives to a piece, so that every theme of the terminal fits. A line that is too long to be
//! worth the time, and a language without a grammar, stay plain.

use std::sync::OnceLock;

use syntect::parsing::{ParseState, ScopeStack, SyntaxSet};

use super::super::line::{Color, Indent, Line, Span, Style, wrap};

/// Longest line that is coloured, in bytes.
const LINE_BYTES_MAX: usize = 2000;
/// Columns before code, where there is room.
const INDENT: usize = 4;

/// First match wins; a scope is its own name and everything below it.
const COLORS: [(&str, Style); 16] = [
    ("comment", Style::DIM),
    ("string", Style::of(Color::Green)),
    ("constant.character.escape", Style::of(Color::Cyan)),
    ("constant", Style::of(Color::Cyan)),
    ("keyword.operator", Style::PLAIN),
    ("keyword", Style::of(Color::Magenta)),
    ("storage", Style::of(Color::Magenta)),
    ("entity.name.function", Style::of(Color::Blue)),
    ("support.function", Style::of(Color::Blue)),
    ("entity.name.tag", Style::of(Color::Blue)),
    ("entity.other.attribute-name", Style::of(Color::Yellow)),
    ("entity.name", Style::of(Color::Yellow)),
    ("support.type", Style::of(Color::Yellow)),
    ("markup.inserted", Style::of(Color::Green)),
    ("markup.deleted", Style::of(Color::Red)),
    ("variable.language", Style::of(Color::Magenta)),
];

/// Colours the lines of one block of code in order.
#[derive(Clone)]
pub struct Highlighter {
    state: Option<(ParseState, ScopeStack)>,
}

fn grammars() -> &'static SyntaxSet {
    static GRAMMARS: OnceLock<SyntaxSet> = OnceLock::new();
    GRAMMARS.get_or_init(SyntaxSet::load_defaults_newlines)
}

impl Highlighter {
    /// At the beginning of a block in the language that its fence names.
    pub fn new(language: &str) -> Self {
        let named = match language.to_ascii_lowercase().as_str() {
            "" | "text" | "plain" | "plaintext" | "txt" | "console" => return Self { state: None },
            "typescript" | "ts" | "tsx" | "jsx" => "js".into(),
            "shell" | "zsh" | "fish" => "sh".into(),
            other => other.to_string(),
        };
        let found = grammars().find_syntax_by_token(&named);
        Self { state: found.map(|found| (ParseState::new(found), ScopeStack::new())) }
    }

    /// The rows of the next line.
    pub fn line(&mut self, line: &str, columns: usize) -> Vec<Line> {
        let line = line.trim_end_matches(['\n', '\r']);
        let indent = " ".repeat(if columns >= 60 { INDENT } else { INDENT / 2 });
        let first = vec![Span::new(&indent, Style::PLAIN)];
        // What does not fit goes on below the code it belongs to.
        let own = line.len() - line.trim_start_matches(' ').len();
        let own = " ".repeat((own + 2).min(columns / 2));
        let rest = vec![Span::new(&format!("{indent}{own}"), Style::PLAIN)];
        let spans = self.spans(line);
        wrap(&Line { spans }, columns, Indent { first, rest })
    }

    fn spans(&mut self, line: &str) -> Vec<Span> {
        let plain = || vec![Span::new(line, Style::PLAIN)];
        if line.len() > LINE_BYTES_MAX {
            return plain();
        }
        let Some((state, stack)) = &mut self.state else { return plain() };
        // A grammar that fails on a line leaves it plain; what it thinks of the next is its own.
        let Ok(changes) = state.parse_line(&format!("{line}\n"), grammars()) else {
            return plain();
        };
        let (mut spans, mut done) = (Vec::new(), 0);
        for (at, change) in changes {
            let at = at.min(line.len());
            if at > done {
                spans.push(Span::new(&line[done..at], style(stack)));
                done = at;
            }
            if stack.apply(&change).is_err() {
                break;
            }
        }
        if done < line.len() {
            spans.push(Span::new(&line[done..], style(stack)));
        }
        spans
    }
}

/// The look of the innermost scope that has one.
fn style(stack: &ScopeStack) -> Style {
    let colored = |name: &str| {
        let is = |known: &str| {
            name.strip_prefix(known).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
        };
        COLORS.iter().find(|(known, _)| is(known)).map(|(_, style)| *style)
    };
    let scopes = stack.as_slice().iter().rev();
    scopes.map(|scope| scope.build_string()).find_map(|name| colored(&name)).unwrap_or(Style::PLAIN)
}
