//! The part of the terminal that is drawn again and again, below a transcript that is not.
//!
//! Owns the last few rows that were written: the live rows. Finished lines are printed once above
//! them and belong to the terminal's own scrollback from then on. Only rows that changed are
//! written, all moves are relative to where the cursor was left, so nothing is asked of the terminal
//! and nothing is drawn outside. What a key press costs does not depend on the transcript.

use std::io::{self, Write};

use super::line::Line;

/// Writes are shown at once by terminals that know this; others ignore it.
const BEGIN: &str = "\x1b[?2026h\x1b[?25l";
const END: &str = "\x1b[?25h\x1b[?2026l";

/// A row and a column, from 0.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct Place {
    pub row: usize,
    pub column: usize,
}

/// The live rows of a terminal.
pub struct Surface<W: Write> {
    out: W,
    columns: usize,
    rows: usize,
    colored: bool,
    live: Vec<String>, // as they were written
    widths: Vec<usize>,
    cursor: Place,
}

impl<W: Write> Surface<W> {
    /// Nothing drawn; the cursor stands at the beginning of a row.
    pub fn new(out: W, (columns, rows): (usize, usize), colored: bool) -> Self {
        let cursor = Place::default();
        Self { out, columns, rows, colored, live: Vec::new(), widths: Vec::new(), cursor }
    }

    /// Columns and rows of the terminal.
    pub fn size(&self) -> (usize, usize) {
        (self.columns, self.rows)
    }

    /// Prints `above` for good and leaves `live` below it, with the cursor at `cursor`. Of rows that
    /// do not fit the first ones are left out.
    ///
    /// # Errors
    /// The terminal is gone.
    pub fn draw(&mut self, above: &[Line], live: &[Line], cursor: Place) -> io::Result<()> {
        let left_out = live.len().saturating_sub(self.rows.saturating_sub(1).max(1));
        let fitting = live[left_out..].iter().map(|line| line.clone().cut(self.columns));
        let lines: Vec<Line> = fitting.collect();
        let rows: Vec<String> = lines.iter().map(|line| line.ansi(self.colored)).collect();
        let cursor = Place {
            row: cursor.row.saturating_sub(left_out).min(rows.len().saturating_sub(1)),
            column: cursor.column.min(self.columns.saturating_sub(1)),
        };
        if above.is_empty() && rows == self.live && cursor == self.cursor {
            return Ok(());
        }
        let mut text = String::from(BEGIN);
        let mut at = self.cursor.row;
        if !above.is_empty() {
            text += &upward(at);
            text += "\r\x1b[J";
            for line in above {
                text += &line.clone().cut(self.columns).ansi(self.colored);
                text += "\r\n";
            }
            self.live.clear();
            at = 0;
        }
        self.change(&rows, at, cursor, &mut text);
        text += END;
        self.live = rows;
        self.widths = lines.iter().map(Line::width).collect();
        self.cursor = cursor;
        self.out.write_all(text.as_bytes())?;
        self.out.flush()
    }

    /// From the rows that are there, with the cursor in row `at`, to `rows`.
    fn change(&self, rows: &[String], mut at: usize, cursor: Place, text: &mut String) {
        for (row, new) in rows.iter().enumerate() {
            if self.live.get(row) == Some(new) {
                continue;
            }
            *text += &upward(at.saturating_sub(row));
            // A line feed in the last row of the screen makes room for a row that is new.
            *text += &"\n".repeat(row.saturating_sub(at));
            *text += "\r";
            *text += new;
            *text += "\x1b[K";
            at = row;
        }
        if rows.len() < self.live.len() {
            let last = rows.len();
            *text += &upward(at.saturating_sub(last));
            *text += &"\n".repeat(last.saturating_sub(at));
            *text += "\r\x1b[J";
            at = last;
        }
        *text += &upward(at.saturating_sub(cursor.row));
        *text += &"\n".repeat(cursor.row.saturating_sub(at));
        *text += &format!("\r\x1b[{}G", cursor.column + 1);
    }

    /// Takes the terminal's new size. Terminals break rows that have become too long, so more rows
    /// than were written may be above the cursor; all of them are cleared.
    ///
    /// # Errors
    /// The terminal is gone.
    pub fn resize(&mut self, (columns, rows): (usize, usize)) -> io::Result<()> {
        let broken = |width: usize| width.div_ceil(columns.max(1)).max(1);
        let before: usize = self.widths.iter().take(self.cursor.row).map(|&w| broken(w)).sum();
        let up = before + self.cursor.column / columns.max(1);
        (self.columns, self.rows) = (columns, rows);
        let up = up.min(rows.saturating_sub(1));
        self.forget();
        write!(self.out, "{}\r\x1b[J", upward(up))?;
        self.out.flush()
    }

    /// Removes the live rows: the cursor stands below the transcript.
    ///
    /// # Errors
    /// The terminal is gone.
    pub fn clear(&mut self) -> io::Result<()> {
        write!(self.out, "{}\r\x1b[J", upward(self.cursor.row))?;
        self.forget();
        self.out.flush()
    }

    /// Clears the whole screen; the scrollback stays.
    ///
    /// # Errors
    /// The terminal is gone.
    pub fn clear_screen(&mut self) -> io::Result<()> {
        self.forget();
        write!(self.out, "\x1b[H\x1b[2J")?;
        self.out.flush()
    }

    /// Sends bytes that draw nothing, such as those for the clipboard.
    ///
    /// # Errors
    /// The terminal is gone.
    pub fn send(&mut self, bytes: &str) -> io::Result<()> {
        self.out.write_all(bytes.as_bytes())?;
        self.out.flush()
    }

    fn forget(&mut self) {
        self.live.clear();
        self.widths.clear();
        self.cursor = Place::default();
    }
}

fn upward(rows: usize) -> String {
    if rows == 0 { String::new() } else { format!("\x1b[{rows}A") }
}

#[cfg(test)]
pub mod tests;
