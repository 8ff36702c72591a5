//! Styled text for a terminal: spans, lines, and the one place that knows escape sequences.
//!
//! Owns how wide a text is on screen, how a line is broken, and how text that comes from a model, a
//! file or a command is made harmless. Colours are the terminal's own sixteen, so that light and
//! dark themes stay readable. Refuses to let a control character through: it is shown, never sent.

use unicode_segmentation::UnicodeSegmentation;
use unicode_width::UnicodeWidthStr;

/// Columns that a tab is worth; it does not matter where it stands.
const TAB: &str = "    ";

/// A colour of the terminal's own palette.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Color {
    Red,
    Green,
    Yellow,
    Blue,
    Magenta,
    Cyan,
}

/// How a text looks.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct Style {
    pub color: Option<Color>,
    pub bold: bool,
    pub dim: bool,
    pub italic: bool,
    pub underline: bool,
    pub strike: bool,
    pub reverse: bool,
}

/// A run of text of one look.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Span {
    pub text: String,
    pub style: Style,
}

/// One row of a terminal, or a longer text without line breaks that is yet to be broken.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct Line {
    pub spans: Vec<Span>,
}

/// What stands before the first row of a broken line, and before the others.
#[derive(Clone, Default, Debug)]
pub struct Indent {
    pub first: Vec<Span>,
    pub rest: Vec<Span>,
}

impl Style {
    /// The terminal's own look.
    pub const PLAIN: Self = Self {
        color: None,
        bold: false,
        dim: false,
        italic: false,
        underline: false,
        strike: false,
        reverse: false,
    };
    /// For what is not the matter itself.
    pub const DIM: Self = Self { dim: true, ..Self::PLAIN };
    /// For what must not be overlooked.
    pub const BOLD: Self = Self { bold: true, ..Self::PLAIN };

    /// A colour alone.
    pub const fn of(color: Color) -> Self {
        Self { color: Some(color), ..Self::PLAIN }
    }

    /// Both together.
    pub fn and(self, other: Self) -> Self {
        Self {
            color: other.color.or(self.color),
            bold: self.bold || other.bold,
            dim: self.dim || other.dim,
            italic: self.italic || other.italic,
            underline: self.underline || other.underline,
            strike: self.strike || other.strike,
            reverse: self.reverse || other.reverse,
        }
    }

    /// The sequence that switches it on; empty for the terminal's own look.
    fn on(self, colored: bool) -> String {
        let color = self.color.filter(|_| colored).map(|color| match color {
            Color::Red => 31,
            Color::Green => 32,
            Color::Yellow => 33,
            Color::Blue => 34,
            Color::Magenta => 35,
            Color::Cyan => 36,
        });
        let codes = [
            (self.bold, 1),
            (self.dim, 2),
            (self.italic, 3),
            (self.underline, 4),
            (self.reverse, 7),
            (self.strike, 9),
        ];
        let codes = codes.into_iter().filter(|(is_on, _)| *is_on).map(|(_, code)| code);
        let codes: Vec<String> = codes.chain(color).map(|code| code.to_string()).collect();
        if codes.is_empty() { String::new() } else { format!("\x1b[{}m", codes.join(";")) }
    }
}

impl Span {
    /// A text and its look. The text is made harmless.
    pub fn new(text: &str, style: Style) -> Self {
        Self { text: harmless(text), style }
    }
}

impl Line {
    /// A line of one look.
    pub fn new(text: &str, style: Style) -> Self {
        Self { spans: vec![Span::new(text, style)] }
    }

    /// An empty one.
    pub fn empty() -> Self {
        Self::default()
    }

    /// The text without its looks.
    pub fn text(&self) -> String {
        self.spans.iter().map(|span| span.text.as_str()).collect()
    }

    /// Columns.
    pub fn width(&self) -> usize {
        self.spans.iter().map(|span| width(&span.text)).sum()
    }

    /// The bytes for the terminal.
    pub fn ansi(&self, colored: bool) -> String {
        let mut out = String::new();
        for span in &self.spans {
            let on = span.style.on(colored);
            out += &on;
            out += &span.text;
            if !on.is_empty() {
                out += "\x1b[0m";
            }
        }
        out
    }

    /// What fits into `columns`, with an ellipsis where something does not.
    pub fn cut(self, columns: usize) -> Self {
        if self.width() <= columns {
            return self;
        }
        let mut left = columns.saturating_sub(1);
        let mut line = Self::empty();
        for span in self.spans {
            let text = fitting(&span.text, left);
            left -= width(text);
            let is_whole = text.len() == span.text.len();
            line.spans.push(Span { text: text.into(), style: span.style });
            if !is_whole {
                break;
            }
        }
        if columns > 0 {
            line.spans.push(Span { text: "\u{2026}".into(), style: Style::DIM });
        }
        line
    }
}

/// The longest beginning of `text` that takes at most `columns`.
fn fitting(text: &str, columns: usize) -> &str {
    let mut taken = 0;
    for (at, grapheme) in text.grapheme_indices(true) {
        taken += width(grapheme);
        if taken > columns {
            return &text[..at];
        }
    }
    text
}

/// Columns that a text takes.
pub fn width(text: &str) -> usize {
    text.graphemes(true).map(|grapheme| grapheme.width().min(2)).sum()
}

/// A text whose control characters are shown instead of obeyed. Line breaks and tabs become spaces.
///
/// What reverses the order of letters on screen is shown too: a command must be what it looks like.
pub fn harmless(text: &str) -> String {
    let is_plain = |c: char| !c.is_control() && !turns(c);
    if text.chars().all(is_plain) {
        return text.into();
    }
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '\t' => out += TAB,
            '\n' | '\r' => out.push(' '),
            '\0'..='\u{1f}' => out.extend(char::from_u32(0x2400 + c as u32)),
            '\u{7f}' => out.push('\u{2421}'),
            c if c.is_control() || turns(c) => out.push(char::REPLACEMENT_CHARACTER),
            c => out.push(c),
        }
    }
    out
}

/// The same of a text whose line breaks stay.
pub fn harmless_lines(text: &str) -> String {
    text.split('\n').map(harmless).collect::<Vec<_>>().join("\n")
}

/// Whether a character changes the direction of the text around it.
fn turns(c: char) -> bool {
    matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{200e}' | '\u{200f}' | '\u{061c}')
}

/// A piece of a line between two places where it may be broken.
struct Word<'a> {
    pieces: Vec<(&'a str, Style)>,
    width: usize,
    is_space: bool,
}

/// Breaks a line into rows of at most `columns`, between words, or inside one that is longer.
pub fn wrap(line: &Line, columns: usize, indent: Indent) -> Vec<Line> {
    let mut rows = Rows::new(columns.max(2), indent);
    for word in words(line) {
        rows.push(word);
    }
    rows.done.into_iter().chain([rows.row]).map(|spans| Line { spans: merged(spans) }).collect()
}

struct Rows<'a> {
    columns: usize,
    rest: Vec<Span>,
    done: Vec<Vec<Span>>,
    row: Vec<Span>,
    used: usize,
    start: usize, // columns of the indent of this row
    space: Option<Word<'a>>,
}

impl<'a> Rows<'a> {
    fn new(columns: usize, indent: Indent) -> Self {
        let taken = |spans: &[Span]| spans.iter().map(|span| width(&span.text)).sum::<usize>();
        // Where the indents leave no room for text there are none.
        let fits = taken(&indent.first).max(taken(&indent.rest)) + 2 <= columns;
        let (first, rest) =
            if fits { (indent.first, indent.rest) } else { (Vec::new(), Vec::new()) };
        let used = taken(&first);
        Self { columns, rest, done: Vec::new(), row: first, used, start: used, space: None }
    }

    fn push(&mut self, word: Word<'a>) {
        if word.is_space {
            self.space = Some(word);
            return;
        }
        let space = self.space.take();
        let gap = space.as_ref().map_or(0, |space| space.width);
        if self.used + gap + word.width > self.columns && self.used > self.start {
            self.next_row();
        } else if let Some(space) = space.filter(|space| self.used + space.width < self.columns) {
            self.take(&space);
        }
        self.take(&word);
    }

    fn take(&mut self, word: &Word) {
        for (grapheme, style) in &word.pieces {
            let wide = width(grapheme);
            if self.used + wide > self.columns {
                self.next_row();
            }
            self.row.push(Span { text: (*grapheme).into(), style: *style });
            self.used += wide;
        }
    }

    fn next_row(&mut self) {
        self.done.push(std::mem::replace(&mut self.row, self.rest.clone()));
        self.start = self.rest.iter().map(|span| width(&span.text)).sum();
        self.used = self.start;
    }
}

fn words(line: &Line) -> Vec<Word<'_>> {
    let mut words: Vec<Word> = Vec::new();
    let mut before_wide = false;
    for span in &line.spans {
        for grapheme in span.text.graphemes(true) {
            let (wide, is_space) = (width(grapheme), grapheme == " ");
            // Between wide characters a line may be broken anywhere: their scripts have no spaces.
            let joins = words.last().is_some_and(|word| word.is_space == is_space)
                && (is_space || (wide < 2 && !before_wide));
            before_wide = wide >= 2;
            match words.last_mut().filter(|_| joins) {
                Some(word) => {
                    word.pieces.push((grapheme, span.style));
                    word.width += wide;
                }
                None => {
                    let pieces = vec![(grapheme, span.style)];
                    words.push(Word { pieces, width: wide, is_space });
                }
            }
        }
    }
    words
}

/// Neighbours of one look as one span.
fn merged(spans: Vec<Span>) -> Vec<Span> {
    let mut all: Vec<Span> = Vec::new();
    for span in spans {
        match all.last_mut().filter(|last| last.style == span.style) {
            Some(last) => last.text += &span.text,
            None => all.push(span),
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(text: &str, columns: usize) -> Vec<String> {
        let line = Line::new(text, Style::PLAIN);
        wrap(&line, columns, Indent::default()).iter().map(Line::text).collect()
    }

    #[test]
    fn lines_break_between_words_and_inside_long_ones() {
        assert_eq!(rows("one two three", 7), ["one two", "three"]);
        assert_eq!(rows("abcdefghij kl", 4), ["abcd", "efgh", "ij", "kl"]);
        assert_eq!(rows("", 4), [""]);
        assert_eq!(rows("a  b", 10), ["a  b"]);
    }

    #[test]
    fn wide_characters_count_two_columns_and_break_anywhere() {
        assert_eq!(
            rows("\u{4f60}\u{597d}\u{4e16}\u{754c}", 5),
            ["\u{4f60}\u{597d}", "\u{4e16}\u{754c}"]
        );
        // One family of four people, one flag: two columns each.
        let family = "\u{1f468}\u{200d}\u{1f469}\u{200d}\u{1f467}";
        assert_eq!(width(family), 2);
        assert_eq!(width("\u{1f1eb}\u{1f1f7}"), 2);
        assert_eq!(width("e\u{301}"), 1);
        assert_eq!(rows(&format!("ab {family}c"), 4), ["ab", &format!("{family}c")]);
    }

    #[test]
    fn indents_stand_before_every_row() {
        let span = |text: &str| vec![Span::new(text, Style::PLAIN)];
        let indent = Indent { first: span("- "), rest: span("  ") };
        let line = Line::new("one two three", Style::PLAIN);
        let rows: Vec<String> = wrap(&line, 7, indent).iter().map(Line::text).collect();
        assert_eq!(rows, ["- one", "  two", "  three"]);
    }

    #[test]
    fn control_characters_are_shown_and_never_sent() {
        let hostile = "a\x1b]52;c;AAAA\x07b\u{9b}31m\u{202e}c\x7f\td\ne";
        let shown = harmless(hostile);
        assert_eq!(shown, "a\u{241b}]52;c;AAAA\u{2407}b\u{fffd}31m\u{fffd}c\u{2421}    d e");
        assert!(!shown.chars().any(char::is_control));
        assert_eq!(Line::new("\x1b[31mred", Style::PLAIN).ansi(true), "\u{241b}[31mred");
    }

    #[test]
    fn a_line_that_is_too_long_ends_in_an_ellipsis() {
        let line = |text| Line::new(text, Style::PLAIN).cut(5).text();
        assert_eq!((line("abcde"), line("abcdef")), ("abcde".into(), "abcd\u{2026}".into()));
        assert_eq!(line("\u{4f60}\u{597d}\u{4e16}"), "\u{4f60}\u{597d}\u{2026}");
    }

    #[test]
    fn without_colour_the_other_looks_stay() {
        let line = Line::new("x", Style::of(Color::Red).and(Style::BOLD));
        assert_eq!(line.ansi(true), "\x1b[1;31mx\x1b[0m");
        assert_eq!(line.ansi(false), "\x1b[1mx\x1b[0m");
    }
}
