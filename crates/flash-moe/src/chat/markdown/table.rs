//! Tables: columns as wide as their cells, narrowed until they fit, or one field a line.
//!
//! A table that cannot be narrowed into the terminal with a few letters a column is shown as records,
//! each cell behind its heading. Widths are columns on screen, so wide characters stay aligned.

use pulldown_cmark::Alignment;

use super::super::line::{Indent, Line, Span, Style, wrap};

/// No column is narrowed below this.
const LETTERS_MIN: usize = 5;
/// What stands between two columns.
const GAP: &str = " \u{2502} ";

/// A table that has been read.
#[derive(Default)]
pub struct Table {
    pub alignments: Vec<Alignment>,
    pub rows: Vec<Vec<Line>>, // the first is the heading
}

impl Table {
    /// Its lines in so many columns.
    pub fn lines(&self, columns: usize) -> Vec<Line> {
        match self.widths(columns) {
            Some(widths) => self.grid(&widths),
            None => self.records(columns),
        }
    }

    /// The width of each column, if all of them fit.
    fn widths(&self, columns: usize) -> Option<Vec<usize>> {
        let count = self.rows.iter().map(Vec::len).max()?;
        let gaps = GAP.chars().count() * count.saturating_sub(1);
        let room = columns.checked_sub(gaps)?;
        let wanted = |column: usize| {
            let cells = self.rows.iter().filter_map(|row| row.get(column));
            cells.map(Line::width).max().unwrap_or(0).max(1)
        };
        let mut widths: Vec<usize> = (0..count).map(wanted).collect();
        while widths.iter().sum::<usize>() > room {
            let widest = widths.iter_mut().max()?;
            if *widest <= LETTERS_MIN {
                return None;
            }
            *widest -= 1;
        }
        Some(widths)
    }

    fn grid(&self, widths: &[usize]) -> Vec<Line> {
        let mut lines = Vec::new();
        for (at, row) in self.rows.iter().enumerate() {
            lines.extend(self.row(row, widths, at == 0));
            if at == 0 {
                let bars: Vec<String> =
                    widths.iter().map(|width| "\u{2500}".repeat(*width)).collect();
                lines.push(Line::new(&bars.join("\u{2500}\u{253c}\u{2500}"), Style::DIM));
            }
        }
        lines
    }

    fn row(&self, row: &[Line], widths: &[usize], is_heading: bool) -> Vec<Line> {
        let look = if is_heading { Style::BOLD } else { Style::PLAIN };
        let cell = |column: usize| {
            let mut line = row.get(column).cloned().unwrap_or_else(Line::empty);
            line.spans.iter_mut().for_each(|span| span.style = span.style.and(look));
            wrap(&line, widths[column], Indent::default())
        };
        let cells: Vec<Vec<Line>> = (0..widths.len()).map(cell).collect();
        let height = cells.iter().map(Vec::len).max().unwrap_or(0);
        let mut lines = Vec::new();
        for at in 0..height {
            let mut spans = Vec::new();
            for (column, cell) in cells.iter().enumerate() {
                if column > 0 {
                    spans.push(Span::new(GAP, Style::DIM));
                }
                let is_last = column + 1 == cells.len();
                let text = cell.get(at).cloned().unwrap_or_else(Line::empty);
                spans.extend(self.aligned(text, column, widths[column], is_last));
            }
            lines.push(Line { spans });
        }
        lines
    }

    fn aligned(&self, text: Line, column: usize, width: usize, is_last: bool) -> Vec<Span> {
        let space = width.saturating_sub(text.width());
        let (left, right) = match self.alignments.get(column) {
            Some(Alignment::Right) => (space, 0),
            Some(Alignment::Center) => (space / 2, space - space / 2),
            _ => (0, space),
        };
        let blank = |columns: usize| Span::new(&" ".repeat(columns), Style::PLAIN);
        let right = if is_last { 0 } else { right };
        let mut spans = vec![blank(left)];
        spans.extend(text.spans);
        spans.push(blank(right));
        spans.retain(|span| !span.text.is_empty());
        spans
    }

    fn records(&self, columns: usize) -> Vec<Line> {
        let Some((heading, rows)) = self.rows.split_first() else { return Vec::new() };
        let mut lines = Vec::new();
        for (at, row) in rows.iter().enumerate() {
            if at > 0 {
                lines.push(Line::empty());
            }
            for (column, cell) in row.iter().enumerate() {
                let name = heading.get(column).map(Line::text).unwrap_or_else(String::new);
                let mut spans = vec![Span::new(&format!("{name}: "), Style::BOLD)];
                spans.extend(cell.spans.clone());
                let rest = vec![Span::new("  ", Style::PLAIN)];
                lines.extend(wrap(&Line { spans }, columns, Indent { first: Vec::new(), rest }));
            }
        }
        lines
    }
}
