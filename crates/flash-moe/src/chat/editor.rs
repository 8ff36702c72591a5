//! The text that is being typed: lines, a cursor, what was killed, what can be undone.
//!
//! Knows no keys and no terminal: it is told what to do and says how it looks in so many columns.
//! The cursor always stands between whole characters as people see them (grapheme clusters). A
//! paste is one change, whatever is in it. Refuses control characters but line breaks.

use unicode_segmentation::UnicodeSegmentation;

use super::line::{harmless, width};
use super::surface::Place;

/// Changes that can be undone.
const UNDO_MAX: usize = 200;
/// Largest text, in bytes.
pub const TEXT_BYTES_MAX: usize = 4 << 20;

/// A change of the text or a move of the cursor.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Edit {
    /// Puts in a text as one change.
    Insert(String),
    /// Removes before the cursor.
    Backspace,
    /// Removes behind it.
    Delete,
    /// Removes the word before it, back to white space.
    KillWordBack,
    /// Removes the word behind it.
    KillWord,
    /// Removes to the end of the line, or the line's end.
    KillToEnd,
    /// Removes to the beginning of the line.
    KillToStart,
    /// Puts in what was killed last.
    Yank,
    /// Takes the last change back.
    Undo,
    Left,
    Right,
    WordLeft,
    WordRight,
    LineStart,
    LineEnd,
    Start,
    End,
}

/// The text and its cursor.
#[derive(Default)]
pub struct Editor {
    text: String,
    cursor: usize, // byte offset
    killed: String,
    undo: Vec<(String, usize)>,
    typing: bool, // the last change was one typed character, which the next one joins
    goal: Option<usize>, // the column that moves up and down aim for
}

/// The text as rows of a terminal.
pub struct Layout {
    pub rows: Vec<String>,
    pub cursor: Place,
}

impl Editor {
    /// The text.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// The text before the cursor.
    pub fn before_cursor(&self) -> &str {
        &self.text[..self.cursor]
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.text.is_empty()
    }

    /// Whether so much more text is taken.
    pub fn has_room(&self, text: &str) -> bool {
        self.text.len() + text.len() <= TEXT_BYTES_MAX
    }

    /// Puts a text in the place of this one, with the cursor at its end. Can be undone.
    pub fn set(&mut self, text: &str) {
        self.remember(false);
        self.text = clean(text);
        self.cursor = self.text.len();
    }

    /// Gives the text away and starts anew.
    pub fn take(&mut self) -> String {
        let text = std::mem::take(&mut self.text);
        let killed = std::mem::take(&mut self.killed);
        *self = Self { killed, ..Self::default() };
        text
    }

    /// Does one thing.
    pub fn apply(&mut self, edit: Edit) {
        self.goal = None;
        match edit {
            Edit::Insert(text) => self.insert(&text),
            Edit::Backspace => self.remove(self.left_of(self.cursor), self.cursor),
            Edit::Delete => self.remove(self.cursor, self.right_of(self.cursor)),
            Edit::KillWordBack => self.kill(self.space_left(), self.cursor),
            Edit::KillWord => self.kill(self.cursor, self.word_right()),
            Edit::KillToEnd => match self.line_end() {
                end if end == self.cursor => self.kill(self.cursor, self.right_of(self.cursor)),
                end => self.kill(self.cursor, end),
            },
            Edit::KillToStart => self.kill(self.line_start(), self.cursor),
            Edit::Yank => self.insert(&self.killed.clone()),
            Edit::Undo => self.undo(),
            Edit::Left => self.go(self.left_of(self.cursor)),
            Edit::Right => self.go(self.right_of(self.cursor)),
            Edit::WordLeft => self.go(self.word_left()),
            Edit::WordRight => self.go(self.word_right()),
            Edit::LineStart => self.go(self.line_start()),
            Edit::LineEnd => self.go(self.line_end()),
            Edit::Start => self.go(0),
            Edit::End => self.go(self.text.len()),
        }
    }

    /// Moves the cursor by rows as they look in so many columns; `false` if there is no such row.
    pub fn go_rows(&mut self, down: bool, columns: usize) -> bool {
        let starts = row_starts(&self.text, columns);
        let row = row_of(&starts, self.cursor);
        let target = if down { row + 1 } else { row.wrapping_sub(1) };
        let Some(&start) = starts.get(target) else { return false };
        let column = width(&self.text[starts[row]..self.cursor]);
        let goal = *self.goal.get_or_insert(column);
        let end = starts.get(target + 1).map_or(self.text.len(), |&next| self.last_of_row(next));
        let mut at = start;
        for (offset, grapheme) in self.text[start..end].grapheme_indices(true) {
            if width(&self.text[start..start + offset]) + width(grapheme) > goal {
                break;
            }
            at = start + offset + grapheme.len();
        }
        self.cursor = at.min(end);
        self.typing = false;
        true
    }

    /// The text in rows of at most `columns`.
    pub fn layout(&self, columns: usize) -> Layout {
        let starts = row_starts(&self.text, columns);
        let row = row_of(&starts, self.cursor);
        let ends = starts.iter().skip(1).copied().chain([self.text.len()]);
        let rows = starts.iter().zip(ends);
        let rows = rows.map(|(&start, end)| self.text[start..end].trim_end_matches('\n').into());
        let column = width(&self.text[starts[row]..self.cursor]);
        Layout { rows: rows.collect(), cursor: Place { row, column } }
    }

    /// Ends a run of typed characters: the next one is a change of its own.
    fn remember(&mut self, typing: bool) {
        if !(typing && self.typing) {
            self.undo.push((self.text.clone(), self.cursor));
            let surplus = self.undo.len().saturating_sub(UNDO_MAX);
            self.undo.drain(..surplus);
        }
        self.typing = typing;
    }

    fn undo(&mut self) {
        if let Some((text, cursor)) = self.undo.pop() {
            (self.text, self.cursor) = (text, cursor);
        }
        self.typing = false;
    }

    fn insert(&mut self, text: &str) {
        let text = clean(text);
        if text.is_empty() || !self.has_room(&text) {
            return;
        }
        let is_typed = text.chars().count() == 1 && !text.starts_with(char::is_whitespace);
        self.remember(is_typed);
        self.text.insert_str(self.cursor, &text);
        self.cursor += text.len();
    }

    fn remove(&mut self, start: usize, end: usize) {
        if start < end {
            self.remember(false);
            self.text.drain(start..end);
            self.cursor = start;
        }
    }

    fn kill(&mut self, start: usize, end: usize) {
        if start < end {
            self.killed = self.text[start..end].into();
            self.remove(start, end);
        }
    }

    fn go(&mut self, to: usize) {
        self.cursor = to;
        self.typing = false;
    }

    fn left_of(&self, at: usize) -> usize {
        self.text[..at].grapheme_indices(true).next_back().map_or(0, |(at, _)| at)
    }

    fn right_of(&self, at: usize) -> usize {
        at + self.text[at..].graphemes(true).next().map_or(0, str::len)
    }

    fn line_start(&self) -> usize {
        self.before_cursor().rfind('\n').map_or(0, |at| at + 1)
    }

    fn line_end(&self) -> usize {
        self.text[self.cursor..].find('\n').map_or(self.text.len(), |at| self.cursor + at)
    }

    fn word_left(&self) -> usize {
        let mut words = self.before_cursor().unicode_word_indices();
        words.next_back().map_or(0, |(at, _)| at)
    }

    fn word_right(&self) -> usize {
        let mut words = self.text[self.cursor..].unicode_word_indices();
        words.next().map_or(self.text.len(), |(at, word)| self.cursor + at + word.len())
    }

    fn space_left(&self) -> usize {
        let text = self.before_cursor().trim_end();
        text.rfind(char::is_whitespace)
            .map_or(0, |at| at + text[at..].chars().next().map_or(0, char::len_utf8))
    }

    /// The last place in the row before one that starts at `next`: not behind its line break.
    fn last_of_row(&self, next: usize) -> usize {
        self.left_of(next)
    }
}

/// Line breaks as one character, other control characters as what shows them.
fn clean(text: &str) -> String {
    let text = text.replace("\r\n", "\n").replace('\r', "\n");
    let lines: Vec<String> = text.split('\n').map(harmless).collect();
    lines.join("\n")
}

/// The byte at which each row begins.
fn row_starts(text: &str, columns: usize) -> Vec<usize> {
    let columns = columns.max(2);
    let (mut starts, mut used) = (vec![0], 0);
    for (at, grapheme) in text.grapheme_indices(true) {
        if grapheme == "\n" {
            starts.push(at + 1);
            used = 0;
            continue;
        }
        let wide = width(grapheme);
        if used + wide > columns {
            starts.push(at);
            used = 0;
        }
        used += wide;
    }
    // A full last row leaves no column for the cursor.
    if used == columns {
        starts.push(text.len());
    }
    starts
}

fn row_of(starts: &[usize], cursor: usize) -> usize {
    starts.iter().rposition(|&start| start <= cursor).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn editor(text: &str) -> Editor {
        let mut editor = Editor::default();
        editor.apply(Edit::Insert(text.into()));
        editor
    }

    /// The text with `|` for the cursor.
    fn shown(editor: &Editor) -> String {
        let (before, after) = editor.text.split_at(editor.cursor);
        format!("{before}|{after}")
    }

    #[test]
    fn moves_and_kills_go_by_words_lines_and_whole_characters() {
        use Edit::*;
        let family = "\u{1f468}\u{200d}\u{1f469}\u{200d}\u{1f467}";
        for (text, edits, expected) in [
            ("one two.three", vec![WordLeft], "one |two.three"),
            ("one two-three", vec![WordLeft, WordLeft], "one |two-three"),
            ("one two", vec![Start, WordRight], "one| two"),
            ("one two  ", vec![KillWordBack], "one |"),
            ("one two", vec![Start, KillWord], "| two"),
            ("ab\ncd", vec![Left, KillToStart], "ab\n|d"),
            ("ab\ncd", vec![Start, KillToEnd], "|\ncd"),
            ("ab\ncd", vec![Start, KillToEnd, KillToEnd], "|cd"),
            ("ab\ncd", vec![LineStart, KillToEnd, Start, Yank], "cd|ab\n"),
            (&format!("a{family}b"), vec![Left, Backspace], "a|b"),
            (&format!("a{family}"), vec![Left], &format!("a|{family}")),
            ("e\u{301}x", vec![Left, Backspace], "|x"),
            ("abc", vec![Start, Delete, Right], "b|c"),
            ("a\nb", vec![LineStart, Left, LineStart], "|a\nb"),
        ] {
            let mut editor = editor(text);
            edits.into_iter().for_each(|edit| editor.apply(edit));
            assert_eq!(shown(&editor), expected, "{text:?}");
        }
    }

    #[test]
    fn a_paste_is_one_change_and_a_typed_word_is_one_too() {
        let mut editor = Editor::default();
        for c in "word".chars() {
            editor.apply(Edit::Insert(c.to_string()));
        }
        editor.apply(Edit::Insert("\r\na\r\nb\x1b[2J\n".into()));
        assert_eq!(shown(&editor), "word\na\nb\u{241b}[2J\n|");
        editor.apply(Edit::Undo);
        assert_eq!(shown(&editor), "word|");
        editor.apply(Edit::Undo);
        assert_eq!(shown(&editor), "|");
        editor.apply(Edit::Undo);
        assert_eq!(shown(&editor), "|");
    }

    #[test]
    fn rows_break_by_columns_and_the_cursor_is_where_it_looks() {
        let layout = editor("ab\u{4f60}\u{597d}c").layout(4);
        assert_eq!(layout.rows, ["ab\u{4f60}", "\u{597d}c"]);
        assert_eq!(layout.cursor, Place { row: 1, column: 3 });
        let full = editor("abcd").layout(4);
        assert_eq!(
            (full.rows, full.cursor),
            (vec!["abcd".into(), String::new()], Place { row: 1, column: 0 })
        );
        let lines = editor("a\n\nb\n").layout(10);
        assert_eq!(lines.rows, ["a", "", "b", ""]);
        assert_eq!(lines.cursor, Place { row: 3, column: 0 });
    }

    #[test]
    fn up_and_down_keep_the_column_and_stop_at_the_ends() {
        let mut editor = editor("abcdef\nx\nuvwxyz");
        editor.apply(Edit::Left);
        assert!(editor.go_rows(false, 80));
        assert_eq!(shown(&editor), "abcdef\nx|\nuvwxyz");
        assert!(editor.go_rows(false, 80));
        assert_eq!(shown(&editor), "abcde|f\nx\nuvwxyz");
        assert!(!editor.go_rows(false, 80));
        assert!(editor.go_rows(true, 80) && editor.go_rows(true, 80) && !editor.go_rows(true, 80));
        assert_eq!(shown(&editor), "abcdef\nx\nuvwxy|z");
        editor.set("abcdef");
        editor.apply(Edit::Start);
        assert!(editor.go_rows(true, 3));
        assert_eq!(shown(&editor), "abc|def");
    }
}
