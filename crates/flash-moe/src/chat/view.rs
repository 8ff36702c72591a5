//! What the screen shows, from plain values: no terminal, no clock, no model.
//!
//! The live rows are, from above: the end of the answer that is not finished, what is going on, the
//! text that is being typed, and a status line. Everything fits into the columns there are; what is
//! least needed goes first.

use std::path::Path;
use std::time::Duration;

use flash_moe_engine::budget::gib;
use serde_json::Value as Json;

use super::editor::Layout;
use super::line::{Color, Indent, Line, Span, Style, width, wrap};
use super::surface::Place;
use super::tools::Asked;

/// Widest text: longer lines are hard to read.
const TEXT_COLUMNS_MAX: usize = 110;
/// Columns of a name that is explained.
const NAME_COLUMNS: usize = 24;
/// Rows of a command's output that are shown: the first and the last of them.
const RESULT_ROWS: usize = 8;
const SPINNER: [&str; 8] = [
    "\u{28f7}", "\u{28ef}", "\u{28df}", "\u{287f}", "\u{28bf}", "\u{28fb}", "\u{28fd}", "\u{28fe}",
];

/// What is going on while the user waits.
#[derive(Clone, PartialEq, Debug)]
pub enum Busy {
    /// Nothing is known yet.
    Waiting(Duration),
    /// The prompt is read: tokens known, known at the start, all, and for how long.
    Reading {
        done: usize,
        from: usize,
        all: usize,
        time: Duration,
    },
    Thinking {
        time: Duration,
        tokens: usize,
    },
    Writing {
        time: Duration,
    },
    /// A command runs.
    Running {
        time: Duration,
    },
    /// Another model is being loaded.
    Loading {
        name: String,
        time: Duration,
    },
}

/// The figures of the status line.
#[derive(Clone, Default, PartialEq, Debug)]
pub struct Status {
    pub model: String,
    pub speed: Option<f64>,
    pub first_token: Option<Duration>,
    /// Tokens in the context, and tokens that it holds.
    pub context: Option<(usize, Option<usize>)>,
    pub hit_rate: Option<f64>,
    pub read_rate: Option<f64>,
    pub memory_bytes: Option<u64>,
}

/// Everything that the live rows show.
pub struct Live<'a> {
    pub tail: &'a [Line],
    /// Whether the last row above is blank already.
    pub follows_blank: bool,
    pub busy: Option<Busy>,
    /// What stands before the text that is typed: a prompt, a search, a question.
    pub label: Span,
    pub text: Layout,
    pub hint: Option<String>,
    pub status: &'a Status,
}

/// Columns that text may take in a terminal of so many.
pub fn text_columns(columns: usize) -> usize {
    columns.saturating_sub(1).clamp(8, TEXT_COLUMNS_MAX)
}

/// Columns that typed text may take behind its label.
pub fn typing_columns(columns: usize, label: &Span) -> usize {
    columns.saturating_sub(width(&label.text) + 1).max(8)
}

/// The live rows, and where in them the cursor stands.
pub fn live(live: &Live, columns: usize, rows: usize) -> (Vec<Line>, Place) {
    let room = rows.saturating_sub(1).max(4);
    let mut below = Vec::new();
    below.extend(live.busy.as_ref().map(|busy| busy_line(busy, columns)));
    let typed = typed_rows(live, (room / 2).max(2));
    let first_typed = below.len();
    below.extend(typed.0);
    let cursor = Place { row: first_typed + typed.1.row, column: typed.1.column };
    if let Some(hint) = &live.hint {
        below.push(Line::new(hint, Style::DIM).cut(columns.saturating_sub(1)));
    }
    below.push(status_line(live.status, columns.saturating_sub(1)));
    let tail = &live.tail[live.tail.len().saturating_sub(room.saturating_sub(below.len() + 1))..];
    let mut all: Vec<Line> = tail.to_vec();
    // A blank row parts what is said from what is typed.
    if !(all.is_empty() && live.follows_blank) {
        all.push(Line::empty());
    }
    let row = cursor.row + all.len();
    all.extend(below);
    (all, Place { row, ..cursor })
}

/// The rows around the cursor, at most so many.
fn typed_rows(live: &Live, most: usize) -> (Vec<Line>, Place) {
    let Layout { rows, cursor } = &live.text;
    let first = (cursor.row + 1).saturating_sub(most).min(rows.len().saturating_sub(most));
    let label = width(&live.label.text);
    let blank = Span::new(&" ".repeat(label), Style::PLAIN);
    let shown = rows.iter().enumerate().skip(first).take(most);
    let line = |(at, row): (usize, &String)| {
        let before = if at == 0 { live.label.clone() } else { blank.clone() };
        Line { spans: vec![before, Span::new(row, Style::PLAIN)] }
    };
    let place = Place { row: cursor.row - first, column: label + cursor.column };
    (shown.map(line).collect(), place)
}

fn busy_line(busy: &Busy, columns: usize) -> Line {
    let (time, text) = match busy {
        Busy::Waiting(time) => (*time, "waiting".into()),
        Busy::Thinking { time, tokens } => {
            (*time, format!("thinking {}, {} tokens", seconds(*time), grouped(*tokens)))
        }
        Busy::Writing { time } => (*time, "answering, Ctrl-C stops".into()),
        Busy::Loading { name, time } => (*time, format!("loading {name}, {}", seconds(*time))),
        Busy::Running { time } => (*time, format!("running {}, Ctrl-C kills it", seconds(*time))),
        Busy::Reading { done, from, all, time } => {
            let text = reading(*done, *from, *all, *time, columns.saturating_sub(3));
            (*time, text)
        }
    };
    let frame = SPINNER[(time.as_millis() / 120) as usize % SPINNER.len()];
    let spans =
        vec![Span::new(&format!("{frame} "), Style::of(Color::Cyan)), Span::new(&text, Style::DIM)];
    Line { spans }.cut(columns.saturating_sub(1))
}

/// A bar once there is something to tell, with the time that is left at the speed so far.
fn reading(done: usize, from: usize, all: usize, time: Duration, columns: usize) -> String {
    let counts = format!("reading {}/{} tokens", grouped(done), grouped(all));
    if done <= from || done >= all {
        return match from {
            0 => format!("reading {} tokens", grouped(all)),
            _ => {
                format!("reading {} tokens, {} known", grouped(all - from.min(all)), grouped(from))
            }
        };
    }
    let speed = (done - from) as f64 / time.as_secs_f64().max(1e-3);
    let left = Duration::from_secs_f64(((all - done) as f64 / speed).min(1e9));
    let end = format!("{} left", clock(left));
    let long = format!("{counts}, {speed:.1} tok/s, {end}");
    let text = if width(&long) + 14 <= columns {
        long
    } else {
        format!("{}/{}, {end}", grouped(done), grouped(all))
    };
    let room = columns.saturating_sub(width(&text) + 1).min(24);
    if room < 4 {
        return text;
    }
    // A server may say any numbers.
    let full = (room as f64 * (done as f64 / all as f64)) as usize;
    format!("{}{} {text}", "\u{2501}".repeat(full), "\u{2508}".repeat(room - full))
}

fn status_line(status: &Status, columns: usize) -> Line {
    let context = status.context.map(|(used, all)| match all {
        Some(all) => format!("{}/{} tokens", grouped(used), grouped(all)),
        None => format!("{} tokens", grouped(used)),
    });
    // In the order in which they are given up, the last first.
    let parts = [
        Some(status.model.clone()),
        status.speed.map(|speed| format!("{speed:.1} tok/s")),
        context,
        status.first_token.map(|time| format!("first {}", seconds(time))),
        status.hit_rate.map(|rate| format!("hits {:.0} %", rate * 100.0)),
        status.read_rate.map(|rate| format!("{:.2} GB/s", rate / 1e9)),
        status.memory_bytes.map(gib),
    ];
    let mut text = String::new();
    for part in parts.into_iter().flatten() {
        let longer = if text.is_empty() { part } else { format!("{text} \u{b7} {part}") };
        if width(&longer) > columns && !text.is_empty() {
            break;
        }
        text = longer;
    }
    Line::new(&text, Style::DIM).cut(columns)
}

/// What the user said.
pub fn question(text: &str, columns: usize) -> Vec<Line> {
    let mark = Style::BOLD.and(Style::of(Color::Green));
    let mut lines = vec![Line::empty()];
    for (at, row) in text.trim_end().split('\n').enumerate() {
        let first = if at == 0 { "> " } else { "  " };
        let indent = Indent {
            first: vec![Span::new(first, mark)],
            rest: vec![Span::new("  ", Style::PLAIN)],
        };
        lines.extend(wrap(&Line::new(row, Style::BOLD), columns, indent));
    }
    lines.push(Line::empty());
    lines
}

/// Thinking, dim and set off.
pub fn thinking(text: &str, columns: usize) -> Vec<Line> {
    let bar = vec![Span::new("\u{2502} ", Style::DIM)];
    let look = Style::DIM.and(Style { italic: true, ..Style::PLAIN });
    let row = |row: &str| {
        wrap(&Line::new(row, look), columns, Indent { first: bar.clone(), rest: bar.clone() })
    };
    text.split('\n').flat_map(row).collect()
}

/// The line that stands for thinking that is folded.
pub fn thought(time: Duration) -> Line {
    Line::new(&format!("thought for {}, /think shows it", seconds(time)), Style::DIM)
}

/// A note, an error or the output of a command.
pub fn note(text: &str, style: Style, columns: usize) -> Vec<Line> {
    let rest = vec![Span::new("  ", Style::PLAIN)];
    let row = |row: &str| {
        // A table that is too wide stays readable without its columns.
        let row = if width(row) > columns { closed_up(row) } else { row.into() };
        wrap(&Line::new(&row, style), columns, Indent { first: Vec::new(), rest: rest.clone() })
    };
    text.split('\n').flat_map(row).collect()
}

/// A row whose wide gaps, but for the one it begins with, are two spaces.
fn closed_up(row: &str) -> String {
    let text = row.trim_start();
    let begins = &row[..row.len() - text.len()];
    let parts = text.split("  ").map(str::trim).filter(|part| !part.is_empty());
    format!("{begins}{}", parts.collect::<Vec<_>>().join("  "))
}

/// Names with what they mean, beside each other where there is room.
pub fn explained(names: &[(String, String)], columns: usize) -> Vec<Line> {
    let is_wide = columns >= NAME_COLUMNS + 36;
    let rest = " ".repeat(if is_wide { NAME_COLUMNS } else { 4 });
    let rest = vec![Span::new(&rest, Style::PLAIN)];
    let mut lines = Vec::new();
    for (name, what) in names {
        let what = Line::new(what, Style::DIM);
        let padded = format!("{name:<NAME_COLUMNS$}");
        if is_wide && width(&padded) == NAME_COLUMNS {
            let first = vec![Span::new(&padded, Style::PLAIN)];
            lines.extend(wrap(&what, columns, Indent { first, rest: rest.clone() }));
        } else {
            lines.extend(wrap(&Line::new(name, Style::PLAIN), columns, Indent::default()));
            lines.extend(wrap(&what, columns, Indent { first: rest.clone(), rest: rest.clone() }));
        }
    }
    lines
}

/// What the model asks for, all of it.
pub fn asked(asked: &Asked, directory: &Path, columns: usize) -> Vec<Line> {
    let mut lines = vec![Line::empty()];
    lines.extend(note(&asked.question(directory), Style::BOLD, columns));
    lines.extend(asked_lines(asked, columns));
    lines
}

/// A command line or the arguments of a call, set off.
pub fn asked_lines(asked: &Asked, columns: usize) -> Vec<Line> {
    match asked {
        Asked::Command(command) => set_off(command, "  $ ", columns),
        Asked::Tool(_) => set_off(&asked.text(), "    ", columns),
    }
}

/// A call of an earlier time, whose tool may be gone.
pub fn called(name: &str, arguments: &str, columns: usize) -> Vec<Line> {
    // What a model wrote may be no JSON; it is shown as it stands.
    let parsed: Option<Json> = serde_json::from_str(arguments).ok();
    match parsed.as_ref().and_then(|parsed| parsed["command"].as_str()) {
        Some(command) => set_off(command, "  $ ", columns),
        None => set_off(&format!("{name} {arguments}"), "    ", columns),
    }
}

fn set_off(text: &str, begins: &str, columns: usize) -> Vec<Line> {
    let mark = |text: &str| vec![Span::new(text, Style::of(Color::Yellow))];
    let rows = text.split('\n').enumerate();
    let row = |(at, row): (usize, &str)| {
        let first = mark(if at == 0 { begins } else { "    " });
        let line = Line::new(row, Style::of(Color::Yellow));
        wrap(&line, columns, Indent { first, rest: mark("    ") })
    };
    rows.flat_map(row).collect()
}

/// The result of a command, its middle folded.
pub fn result(text: &str, columns: usize) -> Vec<Line> {
    let rows: Vec<&str> = text.trim_end().split('\n').collect();
    let half = RESULT_ROWS / 2;
    let shown = |row: &&str| Line::new(&format!("    {row}"), Style::DIM).cut(columns);
    if rows.len() <= RESULT_ROWS {
        return rows.iter().map(shown).collect();
    }
    let folded = format!("    \u{2026} {} more lines", rows.len() - RESULT_ROWS);
    let head = rows[..half].iter().map(shown);
    head.chain([Line::new(&folded, Style::DIM)])
        .chain(rows[rows.len() - half..].iter().map(shown))
        .collect()
}

/// A time in seconds, or in minutes where it is long.
pub fn seconds(time: Duration) -> String {
    match time.as_secs_f64() {
        short if short < 100.0 => format!("{short:.1} s"),
        _ => clock(time),
    }
}

/// Minutes and seconds, with hours where there are any.
fn clock(time: Duration) -> String {
    let all = time.as_secs();
    match (all / 3600, all / 60 % 60, all % 60) {
        (0, minutes, seconds) => format!("{minutes}:{seconds:02}"),
        (hours, minutes, seconds) => format!("{hours}:{minutes:02}:{seconds:02}"),
    }
}

/// A number with a comma after every three digits.
pub fn grouped(number: usize) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prompt_that_is_read_shows_how_far_and_how_long() {
        let busy =
            |done, from| Busy::Reading { done, from, all: 14_000, time: Duration::from_secs(10) };
        let text = |busy: &Busy, columns| busy_line(busy, columns).text();
        let half = text(&busy(7_000, 0), 90);
        let bar = format!("{}{}", "\u{2501}".repeat(12), "\u{2508}".repeat(12));
        assert_eq!(
            half,
            format!("\u{287f} {bar} reading 7,000/14,000 tokens, 700.0 tok/s, 0:10 left")
        );
        // What was known from before does not count as speed.
        assert!(text(&busy(7_000, 6_000), 90).contains("100.0 tok/s, 1:10 left"));
        assert_eq!(text(&busy(6_000, 6_000), 90), "\u{287f} reading 8,000 tokens, 6,000 known");
        let large = Busy::Reading {
            done: usize::MAX / 2,
            from: 0,
            all: usize::MAX,
            time: Duration::from_secs(1),
        };
        assert_eq!(text(&large, 200).matches('\u{2501}').count(), 12, "half of 24");
        let narrow = text(&busy(7_000, 0), 40);
        assert!(width(&narrow) < 40 && narrow.contains("7,000/14,000, 0:10 left"), "{narrow}");
    }

    #[test]
    fn the_status_gives_up_what_does_not_fit() {
        let status = Status {
            model: "tiny".into(),
            speed: Some(12.34),
            first_token: Some(Duration::from_millis(800)),
            context: Some((1234, Some(8192))),
            hit_rate: Some(0.934),
            read_rate: Some(1.25e9),
            memory_bytes: Some(5 << 30),
        };
        assert_eq!(
            status_line(&status, 100).text(),
            "tiny \u{b7} 12.3 tok/s \u{b7} 1,234/8,192 tokens \u{b7} first 0.8 s \u{b7} hits 93 % \u{b7} 1.25 GB/s \u{b7} 5.0 GiB"
        );
        assert_eq!(
            status_line(&status, 39).text(),
            "tiny \u{b7} 12.3 tok/s \u{b7} 1,234/8,192 tokens"
        );
    }

    #[test]
    fn a_long_result_is_folded_in_its_middle() {
        let text: String = (1..=20).map(|n| format!("row {n}\n")).collect();
        let rows: Vec<String> = result(&text, 80).iter().map(Line::text).collect();
        assert_eq!((rows.len(), rows[4].as_str()), (9, "    \u{2026} 12 more lines"));
        assert_eq!(rows[8], "    row 20");
    }

    #[test]
    fn a_table_that_is_too_wide_loses_its_gaps_and_no_word() {
        let row = "  dense weights            6.8 MiB";
        let text = |columns| note(row, Style::DIM, columns).iter().map(Line::text).collect();
        let (wide, narrow): (Vec<String>, Vec<String>) = (text(40), text(30));
        assert_eq!((wide, narrow), (vec![row.into()], vec!["  dense weights  6.8 MiB".into()]));
    }

    #[test]
    fn numbers_and_times_are_for_people() {
        assert_eq!([0, 999, 1000, 1234567].map(grouped), ["0", "999", "1,000", "1,234,567"]);
        let times = [0.04, 61.0, 125.0, 3725.0].map(|s| seconds(Duration::from_secs_f64(s)));
        assert_eq!(times, ["0.0 s", "61.0 s", "2:05", "1:02:05"]);
    }
}
