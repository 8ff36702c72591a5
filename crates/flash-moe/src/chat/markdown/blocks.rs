//! Blocks of Markdown as lines: what each kind looks like in a terminal.
//!
//! One pass over the parser's events with a stack of what the text stands in. Every text is made
//! harmless here, after the parser has decoded entities. What a terminal cannot show, pictures and
//! HTML, is shown as the text it is.

use pulldown_cmark::{CodeBlockKind, Event, HeadingLevel, Parser, Tag, TagEnd};

use super::super::line::{Color, Indent, Line, Span, Style, wrap};
use super::highlight::Highlighter;
use super::table::Table;

/// Longest rule, in columns.
const RULE_MAX: usize = 40;

/// What a block stands in.
struct Container {
    first: Option<Vec<Span>>, // before its first row, until that is there
    rest: Vec<Span>,
}

/// The rows so far, and what is open.
pub struct Blocks {
    columns: usize,
    lines: Vec<Line>,
    containers: Vec<Container>,
    lists: Vec<Option<u64>>, // the number of the next item
    looks: Vec<Style>,
    text: Vec<Span>,
    code: Option<Code>,
    table: Option<Table>,
    links: Vec<(String, usize)>, // where each goes, and the spans before its text
    number: Option<u64>,
}

struct Code {
    highlighter: Highlighter,
    text: String,
}

impl Blocks {
    /// The lines of whole blocks. `number` is that of the first item, if the first block is a list
    /// which goes on with an earlier one.
    pub fn render(source: &str, columns: usize, number: Option<u64>) -> Vec<Line> {
        let mut blocks = Self {
            columns,
            lines: Vec::new(),
            containers: Vec::new(),
            lists: Vec::new(),
            looks: Vec::new(),
            text: Vec::new(),
            code: None,
            table: None,
            links: Vec::new(),
            number,
        };
        for event in Parser::new_ext(source, super::options()) {
            blocks.take(event);
        }
        blocks.flush();
        blocks.lines
    }

    fn take(&mut self, event: Event) {
        match event {
            Event::Start(tag) => self.start(tag),
            Event::End(tag) => self.end(tag),
            Event::Text(text) => self.text(&text),
            Event::Code(text) => self.push(&text, Style::of(Color::Cyan)),
            Event::Html(text) | Event::InlineHtml(text) => self.html(&text),
            Event::SoftBreak => self.push(" ", Style::PLAIN),
            Event::HardBreak => self.flush(),
            Event::Rule => {
                self.between();
                let bar = "\u{2500}".repeat(self.room().min(RULE_MAX));
                self.text = vec![Span::new(&bar, Style::DIM)];
                self.flush();
            }
            Event::TaskListMarker(done) => {
                let mark = if done { "[x] " } else { "[ ] " };
                self.push(mark, Style::DIM);
            }
            Event::InlineMath(text) | Event::DisplayMath(text) | Event::FootnoteReference(text) => {
                self.push(&text, Style::PLAIN);
            }
        }
    }

    fn start(&mut self, tag: Tag) {
        match tag {
            Tag::Paragraph | Tag::HtmlBlock => self.between(),
            Tag::Heading { level, .. } => {
                self.between();
                self.looks.push(heading(level));
            }
            Tag::BlockQuote(_) => {
                self.between();
                let bar = vec![Span::new("\u{2502} ", Style::DIM)];
                self.containers.push(Container { first: None, rest: bar });
            }
            Tag::CodeBlock(kind) => {
                self.between();
                let language = match &kind {
                    CodeBlockKind::Fenced(info) => info.split([' ', ',', '{']).next().unwrap_or(""),
                    CodeBlockKind::Indented => "",
                };
                let highlighter = Highlighter::new(language);
                self.code = Some(Code { highlighter, text: String::new() });
            }
            Tag::List(first) => {
                self.flush();
                if self.lists.is_empty() {
                    self.between();
                }
                let first = first.map(|first| self.number.take().unwrap_or(first));
                self.lists.push(first);
            }
            Tag::Item => self.item(),
            Tag::Table(alignments) => {
                self.between();
                self.table = Some(Table { alignments, rows: Vec::new() });
            }
            Tag::TableHead | Tag::TableRow => {
                self.table.iter_mut().for_each(|table| table.rows.push(Vec::new()));
            }
            Tag::Emphasis => self.looks.push(Style { italic: true, ..Style::PLAIN }),
            Tag::Strong => self.looks.push(Style::BOLD),
            Tag::Strikethrough => self.looks.push(Style { strike: true, ..Style::PLAIN }),
            Tag::Link { dest_url, .. } => {
                self.links.push((dest_url.to_string(), self.text.len()));
                self.looks.push(Style { underline: true, ..Style::PLAIN });
            }
            Tag::Image { dest_url, .. } => {
                self.links.push((dest_url.to_string(), self.text.len()));
                self.looks.push(Style::PLAIN);
                self.push("image: ", Style::DIM);
            }
            _ => {}
        }
    }

    fn end(&mut self, tag: TagEnd) {
        match tag {
            TagEnd::Paragraph | TagEnd::HtmlBlock => self.flush(),
            TagEnd::Heading(_) => {
                self.flush();
                self.looks.pop();
            }
            TagEnd::BlockQuote(_) => {
                self.flush();
                self.containers.pop();
            }
            TagEnd::CodeBlock => self.end_code(),
            TagEnd::List(_) => {
                self.lists.pop();
            }
            TagEnd::Item => {
                self.flush();
                let empty = self.containers.last().is_some_and(|item| item.first.is_some());
                if empty {
                    self.put(vec![Line::empty()]);
                }
                self.containers.pop();
            }
            TagEnd::TableCell => {
                let cell = Line { spans: std::mem::take(&mut self.text) };
                let row = self.table.as_mut().and_then(|table| table.rows.last_mut());
                row.into_iter().for_each(|row| row.push(cell.clone()));
            }
            TagEnd::Table => {
                let room = self.room();
                let lines = self.table.take().map(|table| table.lines(room));
                lines.into_iter().for_each(|lines| self.put(lines));
            }
            TagEnd::Emphasis | TagEnd::Strong | TagEnd::Strikethrough => {
                self.looks.pop();
            }
            TagEnd::Link | TagEnd::Image => self.end_link(),
            _ => {}
        }
    }

    /// A link shows where it goes, unless its text says so already.
    fn end_link(&mut self) {
        self.looks.pop();
        let Some((target, before)) = self.links.pop() else { return };
        let spans = self.text.iter().skip(before);
        let shown: String = spans.map(|span| span.text.as_str()).collect();
        let bare = target.trim_start_matches("mailto:");
        if !target.is_empty() && bare != shown {
            self.push(&format!(" ({target})"), Style::DIM);
        }
    }

    fn end_code(&mut self) {
        let Some(mut code) = self.code.take() else { return };
        let room = self.room();
        let lines = code.text.lines().flat_map(|line| code.highlighter.line(line, room)).collect();
        self.put(lines);
    }

    fn item(&mut self) {
        self.flush();
        let depth = self.lists.len();
        let mark = match self.lists.last_mut() {
            Some(Some(number)) => {
                *number += 1;
                format!("{}. ", *number - 1)
            }
            _ if depth.is_multiple_of(2) => "\u{25e6} ".into(),
            _ => "\u{2022} ".into(),
        };
        let rest = vec![Span::new(&" ".repeat(mark.chars().count()), Style::PLAIN)];
        let first = Some(vec![Span::new(&mark, Style::of(Color::Cyan))]);
        self.containers.push(Container { first, rest });
    }

    fn text(&mut self, text: &str) {
        match &mut self.code {
            Some(code) => code.text += text,
            None => self.push(text, Style::PLAIN),
        }
    }

    fn html(&mut self, text: &str) {
        for (at, line) in text.trim_end_matches('\n').split('\n').enumerate() {
            if at > 0 {
                self.flush();
            }
            self.push(line, Style::DIM);
        }
    }

    fn push(&mut self, text: &str, style: Style) {
        let look = self.looks.iter().fold(Style::PLAIN, |all, look| all.and(*look));
        self.text.push(Span::new(text, look.and(style)));
    }

    /// Puts the text so far into rows.
    fn flush(&mut self) {
        if self.text.is_empty() {
            return;
        }
        let line = Line { spans: std::mem::take(&mut self.text) };
        let rows = wrap(&line, self.room(), Indent::default());
        self.put(rows);
    }

    /// Rows behind the marks of what they stand in.
    fn put(&mut self, rows: Vec<Line>) {
        for row in rows {
            let mut spans = Vec::new();
            for container in &mut self.containers {
                spans.extend(container.first.take().unwrap_or_else(|| container.rest.clone()));
            }
            spans.extend(row.spans);
            self.lines.push(Line { spans });
        }
    }

    /// A blank row before a block that is not the first of what it stands in. Lists are tight.
    fn between(&mut self) {
        self.flush();
        let begins = self.containers.last().is_some_and(|inner| inner.first.is_some());
        if self.lines.is_empty() || begins || self.is_first_of_quote() {
            return;
        }
        self.put(vec![Line::empty()]);
    }

    /// Whether the last row belongs to something before the innermost quote.
    fn is_first_of_quote(&self) -> bool {
        let quotes = |text: &str| text.matches('\u{2502}').count();
        let own = self.containers.iter().flat_map(|c| &c.rest).map(|span| quotes(&span.text));
        let depth: usize = own.sum();
        let last = self.lines.last().map_or(0, |line| quotes(&line.text()));
        depth > last && self.containers.last().is_some_and(|inner| inner.first.is_none())
    }

    /// Columns that are left for text.
    fn room(&self) -> usize {
        let marks = self.containers.iter().flat_map(|container| &container.rest);
        let taken: usize = marks.map(|span| super::super::line::width(&span.text)).sum();
        self.columns.saturating_sub(taken).max(8)
    }
}

fn heading(level: HeadingLevel) -> Style {
    let bold = Style::BOLD;
    match level {
        HeadingLevel::H1 => Style { underline: true, ..bold }.and(Style::of(Color::Cyan)),
        HeadingLevel::H2 => bold.and(Style::of(Color::Cyan)),
        _ => bold,
    }
}
