//! What the live rows show of the state: the plain values that `view` makes rows of.
//!
//! Reads clocks and counters; changes nothing but what was to be printed above, which is printed once.

use std::io::Write;

use anyhow::Result;

use super::super::editor::{Editor, Layout};
use super::super::line::{Color, Span, Style};
use super::super::tools::Asked;
use super::super::view::{self, Busy, Live, Status};
use super::{App, Mode};

impl<W: Write> App<W> {
    /// Draws what has changed.
    ///
    /// # Errors
    /// The terminal is gone.
    pub fn draw(&mut self) -> Result<()> {
        let (columns, rows) = self.surface.size();
        let text_columns = self.columns();
        let mut tail = self.stream.tail(text_columns);
        if !self.thinking.is_empty() {
            tail = view::thinking(&self.thinking, text_columns);
        }
        if let Some(last) = self.above.last() {
            self.follows_blank = last.width() == 0;
        }
        let label = self.label();
        let status = self.status();
        let live = Live {
            tail: &tail,
            follows_blank: self.follows_blank,
            busy: self.busy(),
            text: self.typed_layout(view::typing_columns(columns, &label)),
            label,
            hint: self.shown_hint(),
            status: &status,
        };
        let (live, cursor) = view::live(&live, columns, rows);
        let above = std::mem::take(&mut self.above);
        self.surface.draw(&above, &live, cursor)?;
        Ok(())
    }

    /// The text that is typed: an answer to a question has a row of its own, and a draft stays.
    fn typed_layout(&self, columns: usize) -> Layout {
        match &self.mode {
            Mode::Confirm { typed, .. } => {
                let mut answer = Editor::default();
                answer.set(typed);
                answer.layout(columns)
            }
            _ => self.editor.layout(columns),
        }
    }

    pub(super) fn label(&self) -> Span {
        let (text, color) = match &self.mode {
            Mode::Search { search, .. } => (format!("search {:?}: ", search.wanted), Color::Yellow),
            Mode::Confirm { .. } => ("run it? [y/n/a/e] ".into(), Color::Yellow),
            Mode::Change { .. } => ("run instead: ".into(), Color::Yellow),
            _ => ("> ".into(), Color::Green),
        };
        Span::new(&text, Style::BOLD.and(Style::of(color)))
    }

    fn shown_hint(&self) -> Option<String> {
        if let Some(hint) = &self.hint {
            return Some(hint.clone());
        }
        if let Some(candidates) = &self.candidates {
            let names = candidates.all.iter().map(|text| text.trim_end());
            return Some(names.collect::<Vec<_>>().join("  "));
        }
        match &self.mode {
            Mode::Confirm { asked: Asked::Command(_), .. } => {
                Some("y yes, n no, a always this exact command, e edit it".into())
            }
            Mode::Confirm { asked: Asked::Tool(_), .. } => {
                Some("y yes, n no, a always this tool, e edit the arguments".into())
            }
            Mode::Change { .. } => Some("Enter runs it, Esc goes back".into()),
            Mode::Search { .. } => Some("Ctrl-R earlier, Enter takes, Esc back".into()),
            _ => {
                let files: Vec<&str> = self.talk.files().collect();
                (!files.is_empty()).then(|| format!("with the next message: {}", files.join(", ")))
            }
        }
    }

    fn busy(&self) -> Option<Busy> {
        if let Mode::Running { since, .. } = &self.mode {
            return Some(Busy::Running { time: since.elapsed() });
        }
        if let Some(switching) = self.talk.backend.switching() {
            let (name, time) = (switching.name.clone(), switching.since.elapsed());
            return Some(Busy::Loading { name, time });
        }
        let pending = self.talk.pending()?;
        let time = pending.started.elapsed();
        Some(match (pending.thinking, pending.first, pending.prompt) {
            (Some(since), _, _) => {
                let time = pending.thought + since.elapsed();
                Busy::Thinking { time, tokens: pending.tokens }
            }
            (None, Some(_), _) => Busy::Writing { time },
            (None, None, Some(p)) => {
                let time = p.since.elapsed();
                Busy::Reading { done: p.done, from: p.cached, all: p.all, time }
            }
            (None, None, None) => Busy::Waiting(time),
        })
    }

    fn status(&self) -> Status {
        let last = self.talk.last.as_ref();
        let gauges = last.and_then(|last| last.gauges);
        let before = self.talk.pending().and_then(|pending| pending.before);
        let all = gauges.or(before).map(|gauges| gauges.context);
        let mut status = Status {
            model: self.talk.backend.model().into(),
            speed: last.and_then(|last| last.speed()),
            first_token: last.map(|last| last.done.first_token),
            context: last.and_then(|last| Some((last.done.context()?, all))),
            hit_rate: last.and_then(|last| last.hit_rate),
            read_rate: last.and_then(|last| last.read_rate()),
            memory_bytes: gauges.and_then(|gauges| gauges.memory_bytes),
        };
        if let Some((pending, first)) = self.talk.pending().and_then(|p| Some((p, p.first?))) {
            let seconds = first.elapsed().as_secs_f64();
            status.speed = (pending.tokens > 2).then(|| (pending.tokens - 1) as f64 / seconds);
            status.first_token = Some(first - pending.started);
            let prompt = pending.prompt.map(|prompt| prompt.all);
            let used = prompt.map(|prompt| prompt.saturating_add(pending.tokens));
            status.context = used.map(|used| (used, all)).or(status.context);
        }
        status
    }
}
