//! Markdown as lines of a terminal, while it is still arriving.
//!
//! [`Stream`] takes pieces of an answer and gives the lines of blocks that nothing later can change;
//! the block that is not finished is rendered as it stands, again and again, so what a token costs
//! depends on that block alone. In a fenced block every whole line is final, in a list every item
//! but the last. How a block looks is the business of `blocks`, `table` and `highlight`.

mod blocks;
mod highlight;
mod table;

use pulldown_cmark::{Event, Options, Parser, Tag};

use super::line::Line;
use blocks::Blocks;
use highlight::Highlighter;

/// An answer on its way.
#[derive(Default)]
pub struct Stream {
    text: String, // not final yet
    fence: Option<Fence>,
    any: bool,             // whether lines were given before
    list: Option<ListEnd>, // what was given last is an item of a list
}

/// A fenced block that is open.
struct Fence {
    mark: char,
    length: usize,
    indent: usize,
    highlighter: Highlighter,
}

/// Where a list goes on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct ListEnd {
    next: Option<u64>, // number of the next item, in a list with numbers
}

/// The extensions that chat models use.
pub(super) fn options() -> Options {
    Options::ENABLE_TABLES | Options::ENABLE_STRIKETHROUGH | Options::ENABLE_TASKLISTS
}

/// All lines of a whole text.
pub fn lines(text: &str, columns: usize) -> Vec<Line> {
    let mut stream = Stream::default();
    stream.push(text);
    let mut lines = stream.settled(columns);
    lines.extend(stream.finish(columns));
    lines
}

impl Stream {
    /// Takes the next piece of the text.
    pub fn push(&mut self, piece: &str) {
        self.text += piece;
    }

    /// The lines that have become final.
    pub fn settled(&mut self, columns: usize) -> Vec<Line> {
        let mut lines = Vec::new();
        while self.settle(columns, &mut lines) {}
        lines
    }

    /// The lines of what is not final, as it stands.
    pub fn tail(&mut self, columns: usize) -> Vec<Line> {
        if let Some(fence) = &self.fence {
            let mut highlighter = fence.highlighter.clone();
            let begins_end = fence.may_end(&self.text);
            let is_empty = self.text.is_empty() || begins_end;
            return if is_empty { Vec::new() } else { highlighter.line(&self.text, columns) };
        }
        self.rendered(&mended(&self.text), columns)
    }

    /// The lines that are left when nothing more comes.
    pub fn finish(&mut self, columns: usize) -> Vec<Line> {
        let mut lines = self.settled(columns);
        if let Some(fence) = &mut self.fence {
            if !self.text.is_empty() && !fence.ends(&self.text) {
                lines.extend(fence.highlighter.line(&self.text, columns));
            }
        } else {
            lines.extend(self.rendered(&self.text, columns));
        }
        *self = Self::default();
        lines
    }

    /// Settles one thing; says whether there may be more.
    fn settle(&mut self, columns: usize, lines: &mut Vec<Line>) -> bool {
        if self.fence.is_some() {
            return self.settle_code(columns, lines);
        }
        let blank = self.text.len() - without_blank_lines(&self.text).len();
        self.text.drain(..blank);
        if let Some((fence, bytes)) = Fence::open(&self.text) {
            self.gap(lines);
            self.fence = Some(fence);
            self.text.drain(..bytes);
            return true;
        }
        let Some(end) = self.final_bytes() else { return false };
        let source: String = self.text.drain(..end).collect();
        lines.extend(self.rendered(&source, columns));
        self.any = true;
        self.list = list_end(&source, self.list);
        true
    }

    fn settle_code(&mut self, columns: usize, lines: &mut Vec<Line>) -> bool {
        let (Some(fence), Some(end)) = (&mut self.fence, self.text.find('\n')) else {
            return false;
        };
        let line: String = self.text.drain(..=end).collect();
        if fence.ends(&line) {
            self.fence = None;
            self.list = None;
        } else {
            lines.extend(fence.highlighter.line(fence.undented(&line), columns));
        }
        self.any = true;
        true
    }

    /// Bytes at the beginning of the text that are blocks, or items of a list, which are over. A line
    /// that is not whole may still become anything, so it is not looked at.
    fn final_bytes(&self) -> Option<usize> {
        let whole = &self.text[..self.text.rfind('\n')? + 1];
        let blocks = top_blocks(whole);
        let (last, before) = blocks.split_last()?;
        let is_blank =
            whole.ends_with("\n\n") || whole.lines().last().is_some_and(|l| l.trim().is_empty());
        if last.ends_at_line || (last.ends_at_blank && is_blank) {
            return Some(whole.len());
        }
        if !before.is_empty() {
            return Some(last.start);
        }
        (last.items.len() > 1).then(|| last.items[last.items.len() - 1])
    }

    /// A blank line between what was given and what follows.
    fn gap(&self, lines: &mut Vec<Line>) {
        if self.any {
            lines.push(Line::empty());
        }
    }

    fn rendered(&self, source: &str, columns: usize) -> Vec<Line> {
        let continued = self.list.filter(|list| continues(source, *list));
        let number = continued.and_then(|list| list.next);
        let own = Blocks::render(source, columns, number);
        let mut lines = Vec::new();
        if !own.is_empty() && continued.is_none() {
            self.gap(&mut lines);
        }
        lines.extend(own);
        lines
    }
}

impl Fence {
    /// The fence that the first line of `text` opens, and that line's bytes.
    fn open(text: &str) -> Option<(Self, usize)> {
        let end = text.find('\n')?;
        let line = &text[..end];
        let indent = line.len() - line.trim_start_matches(' ').len();
        let mark = line[indent..].chars().next().filter(|mark| matches!(mark, '`' | '~'))?;
        let info = line[indent..].trim_start_matches(mark);
        let length = line.len() - indent - info.len();
        if indent > 3 || length < 3 || (mark == '`' && info.contains('`')) {
            return None;
        }
        let language = info.trim().split([' ', ',', '{']).next().unwrap_or("");
        let highlighter = Highlighter::new(language);
        Some((Self { mark, length, indent, highlighter }, end + 1))
    }

    /// Whether a line closes it.
    fn ends(&self, line: &str) -> bool {
        let bare = line.trim_start_matches(' ');
        let rest = bare.trim_start_matches(self.mark);
        let length = bare.len() - rest.len();
        line.len() - bare.len() <= 3 && length >= self.length && rest.trim().is_empty()
    }

    /// Whether a line that is not whole may be going to.
    fn may_end(&self, line: &str) -> bool {
        let bare = line.trim_start_matches(' ');
        !bare.is_empty() && bare.trim_start_matches(self.mark).trim().is_empty()
    }

    /// The line without as much of the fence's own indent as it has.
    fn undented<'t>(&self, line: &'t str) -> &'t str {
        let spaces = line.len() - line.trim_start_matches(' ').len();
        &line[spaces.min(self.indent)..]
    }
}

/// A block that stands in no other.
#[derive(Default)]
struct TopBlock {
    start: usize,
    items: Vec<usize>, // where the items of a list start
    ends_at_line: bool,
    ends_at_blank: bool,
}

fn top_blocks(text: &str) -> Vec<TopBlock> {
    let mut blocks: Vec<TopBlock> = Vec::new();
    let mut depth = 0;
    let mut in_list = false;
    for (event, range) in Parser::new_ext(text, options()).into_offset_iter() {
        match event {
            Event::Start(tag) => {
                if depth == 0 {
                    in_list = matches!(tag, Tag::List(_));
                    blocks.push(TopBlock {
                        start: range.start,
                        ends_at_line: matches!(tag, Tag::Heading { .. }),
                        ends_at_blank: matches!(
                            tag,
                            Tag::Paragraph | Tag::BlockQuote(_) | Tag::Table(_)
                        ),
                        ..TopBlock::default()
                    });
                } else if depth == 1 && in_list && matches!(tag, Tag::Item) {
                    blocks
                        .iter_mut()
                        .next_back()
                        .into_iter()
                        .for_each(|b| b.items.push(range.start));
                }
                depth += 1;
            }
            Event::End(_) => depth -= 1,
            _ if depth == 0 => {
                let start = range.start;
                blocks.push(TopBlock { start, ends_at_line: true, ..TopBlock::default() });
            }
            _ => {}
        }
    }
    blocks
}

/// The state of a list after `source`, which may have gone on with one.
fn list_end(source: &str, before: Option<ListEnd>) -> Option<ListEnd> {
    let mut parser = Parser::new_ext(source, options());
    let first = match parser.next()? {
        Event::Start(Tag::List(first)) => first,
        _ => return None,
    };
    let blocks = top_blocks(source);
    let [only] = blocks.as_slice() else { return None };
    let continued = before.filter(|list| list.next.is_some() == first.is_some());
    let first = continued.map_or(first, |list| list.next);
    Some(ListEnd { next: first.map(|first| first + only.items.len() as u64) })
}

/// Whether `source` goes on with a list.
fn continues(source: &str, list: ListEnd) -> bool {
    match Parser::new_ext(source, options()).next() {
        Some(Event::Start(Tag::List(first))) => first.is_some() == list.next.is_some(),
        _ => false,
    }
}

fn without_blank_lines(text: &str) -> &str {
    let mut rest = text;
    while let Some(end) = rest.find('\n').filter(|&end| rest[..end].trim().is_empty()) {
        rest = &rest[end + 1..];
    }
    rest
}

/// A text in which what is opened and not yet closed is closed, so that its marks are not shown
/// until the rest arrives.
fn mended(text: &str) -> String {
    let start = text.rfind("\n\n").map_or(0, |at| at + 2);
    let (before, last) = text.split_at(start);
    let last = last.trim_end_matches(['*', '_', '~', '`']);
    let mut mended = format!("{before}{last}");
    let odd = |mark: &str| last.matches(mark).count() % 2 == 1;
    let ends_bare = last.is_empty() || last.ends_with(char::is_whitespace);
    if last.trim_start().starts_with("```") || last.contains("\n```") || ends_bare {
        return mended;
    }
    if odd("`") {
        mended.push('`');
    } else {
        ["**", "~~"].into_iter().filter(|mark| odd(mark)).for_each(|mark| mended += mark);
    }
    mended
}

#[cfg(test)]
mod tests;
