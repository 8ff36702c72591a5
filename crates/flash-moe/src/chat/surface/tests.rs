//! The surface on a terminal that is emulated: what is on the screen and in its scrollback.
//!
//! The emulator is a crate of its own, so that nothing here believes our own idea of a terminal.

use std::cell::RefCell;
use std::num::NonZeroU16;
use std::rc::Rc;

use super::*;
use crate::chat::line::Style;

/// A terminal that remembers what it was sent.
#[derive(Clone)]
pub struct Emulated {
    terminal: Rc<RefCell<vt100::Parser>>,
    sent: Rc<RefCell<Vec<u8>>>,
}

impl Emulated {
    pub fn new(columns: usize, rows: usize) -> Self {
        let size = |n: usize| NonZeroU16::new(n as u16).unwrap();
        let terminal = vt100::Parser::new(size(rows), size(columns), 10_000);
        Self { terminal: Rc::new(RefCell::new(terminal)), sent: Rc::default() }
    }

    /// The rows of the screen, without blanks at their ends.
    pub fn screen(&self) -> String {
        let terminal = self.terminal.borrow();
        let columns = terminal.screen().size().1.get();
        let rows: Vec<String> =
            terminal.screen().rows(0, columns).map(|row| row.trim_end().to_string()).collect();
        rows.join("\n").trim_end().to_string()
    }

    /// The rows that have left the screen at its top.
    pub fn scrolled_off(&self) -> usize {
        self.terminal.borrow().screen().scrollback_len()
    }

    /// Everything, scrollback and screen.
    pub fn transcript(&self) -> String {
        let length = self.scrolled_off();
        let mut rows = Vec::new();
        for back in (1..=length).rev() {
            self.terminal.borrow_mut().screen_mut().set_scrollback(back);
            rows.push(self.screen_row(0));
        }
        self.terminal.borrow_mut().screen_mut().set_scrollback(0);
        rows.push(self.screen());
        rows.join("\n")
    }

    fn screen_row(&self, row: usize) -> String {
        let terminal = self.terminal.borrow();
        let columns = terminal.screen().size().1.get();
        let text = terminal.screen().rows(0, columns).nth(row);
        text.expect("a row of the screen").trim_end().to_string()
    }

    pub fn cursor(&self) -> (u16, u16) {
        self.terminal.borrow().screen().cursor_position()
    }

    /// What was sent since the last call.
    pub fn take_text(&self) -> String {
        String::from_utf8(std::mem::take(&mut self.sent.borrow_mut())).unwrap()
    }

    /// Bytes sent since the last call.
    pub fn take_sent(&self) -> usize {
        self.take_text().len()
    }

    pub fn resize(&self, columns: usize, rows: usize) {
        let size = |n: usize| NonZeroU16::new(n as u16).unwrap();
        self.terminal.borrow_mut().set_size(size(rows), size(columns));
    }

    /// As a terminal that breaks rows that have become too long; the emulator cuts them.
    pub fn resize_and_break(&self, columns: usize, rows: usize) {
        let screen = self.screen();
        let (row, column) = self.cursor();
        let broken = |row: &str| row.len().div_ceil(columns).max(1);
        let above: usize = screen.lines().take(usize::from(row)).map(broken).sum();
        let (row, column) = (above + usize::from(column) / columns, usize::from(column) % columns);
        self.terminal.swap(&Self::new(columns, rows).terminal);
        let text = format!("{}\x1b[{};{}H", screen.replace('\n', "\r\n"), row + 1, column + 1);
        self.terminal.borrow_mut().process(text.as_bytes());
    }
}

impl Write for Emulated {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.sent.borrow_mut().extend_from_slice(bytes);
        self.terminal.borrow_mut().process(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn lines(texts: &[&str]) -> Vec<Line> {
    texts.iter().map(|text| Line::new(text, Style::PLAIN)).collect()
}

fn at(row: usize, column: usize) -> Place {
    Place { row, column }
}

#[test]
fn live_rows_change_in_place_and_finished_ones_stay_above() {
    let terminal = Emulated::new(20, 8);
    let mut surface = Surface::new(terminal.clone(), (20, 8), true);
    surface.draw(&[], &lines(&["one", "two"]), at(1, 3)).unwrap();
    assert_eq!((terminal.screen().as_str(), terminal.cursor()), ("one\ntwo", (1, 3)));
    surface.draw(&lines(&["done"]), &lines(&["one", "2"]), at(0, 1)).unwrap();
    assert_eq!((terminal.screen().as_str(), terminal.cursor()), ("done\none\n2", (1, 1)));
    surface.draw(&[], &lines(&["a", "b", "c", "d"]), at(3, 0)).unwrap();
    assert_eq!(terminal.screen(), "done\na\nb\nc\nd");
    surface.draw(&[], &lines(&["a"]), at(0, 0)).unwrap();
    assert_eq!((terminal.screen().as_str(), terminal.cursor()), ("done\na", (1, 0)));
    surface.clear().unwrap();
    assert_eq!((terminal.screen().as_str(), terminal.cursor()), ("done", (1, 0)));
}

#[test]
fn the_transcript_goes_into_the_scrollback_line_by_line() {
    let terminal = Emulated::new(20, 5);
    let mut surface = Surface::new(terminal.clone(), (20, 5), true);
    let mut expected = Vec::new();
    for n in 0..30 {
        let done = format!("line {n}");
        surface.draw(&lines(&[&done]), &lines(&["tail", "> typed", "status"]), at(1, 2)).unwrap();
        expected.push(done);
    }
    expected.extend(["tail", "> typed", "status"].map(String::from));
    assert_eq!(terminal.transcript(), expected.join("\n"));
}

#[test]
fn more_live_rows_than_the_screen_has_never_scroll() {
    let terminal = Emulated::new(20, 4);
    let mut surface = Surface::new(terminal.clone(), (20, 4), true);
    for n in 0..20 {
        let texts: Vec<String> = (0..n).map(|row| format!("row {row}")).collect();
        let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
        surface.draw(&[], &lines(&texts), at(n.max(1) - 1, 0)).unwrap();
    }
    assert_eq!(
        (terminal.screen().as_str(), terminal.scrolled_off()),
        ("row 16\nrow 17\nrow 18", 0)
    );
}

#[test]
fn only_rows_that_changed_are_sent() {
    let terminal = Emulated::new(80, 24);
    let mut surface = Surface::new(terminal.clone(), (80, 24), true);
    let long = "x".repeat(79);
    surface.draw(&[], &lines(&[&long, &long, "> a", "status"]), at(2, 3)).unwrap();
    terminal.take_sent();
    surface.draw(&[], &lines(&[&long, &long, "> ab", "status"]), at(2, 4)).unwrap();
    let sent = terminal.take_sent();
    assert!(sent < 60, "{sent} bytes for one key");
    surface.draw(&[], &lines(&[&long, &long, "> ab", "status"]), at(2, 4)).unwrap();
    assert_eq!(terminal.take_sent(), 0);
}

#[test]
fn after_a_resize_the_rows_are_drawn_anew() {
    let terminal = Emulated::new(30, 8);
    let mut surface = Surface::new(terminal.clone(), (30, 8), true);
    surface.draw(&lines(&["kept"]), &lines(&["a row of text", "> typed"]), at(1, 7)).unwrap();
    terminal.resize(40, 8);
    surface.resize((40, 8)).unwrap();
    surface.draw(&[], &lines(&["a row of text", "> typed"]), at(1, 7)).unwrap();
    assert_eq!(terminal.screen(), "kept\na row of text\n> typed");
    assert_eq!(surface.size(), (40, 8));
}

#[test]
fn in_a_narrower_terminal_no_piece_of_an_old_row_is_left() {
    let terminal = Emulated::new(30, 10);
    let mut surface = Surface::new(terminal.clone(), (30, 10), true);
    let tail = "a row of text that is broken";
    surface.draw(&lines(&["kept"]), &lines(&[tail, "> typed text", "status"]), at(1, 12)).unwrap();
    terminal.resize_and_break(10, 10);
    assert_eq!(terminal.screen().lines().count(), 7);
    surface.resize((10, 10)).unwrap();
    surface.draw(&[], &lines(&["a row", "> typed", "status"]), at(1, 7)).unwrap();
    assert_eq!(terminal.screen(), "kept\na row\n> typed\nstatus");
}
