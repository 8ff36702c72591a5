//! The chat on a terminal: keys in, events in, rows out.
//!
//! Owns what the user sees and does around a [`Talk`]: the editor, the search, the questions about
//! commands, the answer that streams. Every input changes the state first and is drawn once
//! afterwards; a token costs the block it belongs to, a key the rows of the editor. Knows no
//! terminal but through its surface, so that tests read the same screens as a user.

mod calls;
mod shown;

#[cfg(test)]
mod tests;

use std::io::Write;
use std::time::{Duration, Instant};

use anyhow::Result;
use crossterm::event::{Event as Input, KeyEvent, KeyEventKind};

use super::commands::{Typed, completions, typed};
use super::conversation::{Call, End, Message};
use super::editor::{Edit, Editor, TEXT_BYTES_MAX};
use super::history::{History, Search};
use super::keys::{Action, action};
use super::line::{Color, Line, Style};
use super::markdown::Stream;
use super::perform::{Effect, perform};
use super::surface::{Place, Surface};
use super::talk::{Heard, Talk};
use super::tools::{Asked, Running};
use super::view;

/// Ctrl-C again within this time leaves.
const TWICE: Duration = Duration::from_secs(2);
/// Messages of a resumed conversation that are shown.
const REPLAY_MAX: usize = 40;
/// Largest text for the clipboard: terminals drop longer ones.
const COPY_BYTES_MAX: usize = 74_000;
const ERROR: Style = Style::of(Color::Red);

/// The state of the screen.
pub struct App<W: Write> {
    pub talk: Talk,
    surface: Surface<W>,
    editor: Editor,
    history: History,
    mode: Mode,
    above: Vec<Line>, // finished, not yet printed
    stream: Stream,
    thinking: String, // of the thinking that is shown, what is not yet printed
    shows_thinking: bool,
    candidates: Option<Candidates>,
    hint: Option<String>,
    stopped: Option<Instant>, // the last Ctrl-C
    asked: Option<Outside>,
    is_over: bool,
    follows_blank: bool, // the last row that was printed is blank
}

/// What keys are for.
enum Mode {
    Typing,
    Search {
        search: Search,
        before: String,
    },
    /// A call waits for a decision.
    Confirm {
        call: Call,
        asked: Asked,
        typed: String,
    },
    /// What it asks for is being changed; `draft` is what was typed before.
    Change {
        call: Call,
        asked: Asked,
        draft: String,
    },
    Running {
        call: Call,
        running: Running,
        since: Instant,
    },
}

/// Completions that Tab goes through.
struct Candidates {
    all: Vec<String>,
    at: Option<usize>,
}

/// What only whoever has the terminal can do.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Outside {
    /// Open the user's editor on this text.
    Edit(String),
    /// Stop the process until it is continued.
    Suspend,
}

impl<W: Write> App<W> {
    /// A screen around a talk.
    pub fn new(talk: Talk, surface: Surface<W>, history: History) -> Self {
        let shows_thinking = talk.args.answer.show_think;
        let mut app = Self {
            talk,
            surface,
            editor: Editor::default(),
            history,
            mode: Mode::Typing,
            above: Vec::new(),
            stream: Stream::default(),
            thinking: String::new(),
            shows_thinking,
            candidates: None,
            hint: None,
            stopped: None,
            asked: None,
            is_over: false,
            follows_blank: false,
        };
        app.greet();
        app
    }

    /// Whether the user has left.
    pub fn is_over(&self) -> bool {
        self.is_over
    }

    /// Whether something moves by itself.
    pub fn is_busy(&self) -> bool {
        let is_running = matches!(self.mode, Mode::Running { .. });
        is_running || self.talk.is_answering() || self.talk.backend.switching().is_some()
    }

    /// What is to be done outside of the screen, once.
    pub fn take_outside(&mut self) -> Option<Outside> {
        self.asked.take()
    }

    /// The talk, when the screen is gone.
    pub fn into_talk(self) -> Talk {
        self.talk
    }

    /// A note in the transcript.
    pub fn note(&mut self, text: &str) {
        let lines = view::note(text, Style::DIM, self.columns());
        self.above.extend(lines);
    }

    /// An error in the transcript.
    pub fn error(&mut self, text: &str) {
        let lines = view::note(text, ERROR, self.columns());
        self.above.extend(lines);
    }

    /// Puts a text into the editor.
    pub fn refill(&mut self, text: &str) {
        self.editor.set(text.trim_end_matches('\n'));
    }

    fn columns(&self) -> usize {
        view::text_columns(self.surface.size().0)
    }

    fn greet(&mut self) {
        let model = self.talk.backend.model().to_string();
        self.note(&format!("{model}. Enter sends, Alt-Enter starts a new line, /help says more."));
        self.above.push(Line::empty());
        if !self.talk.conversation.messages.is_empty() {
            self.replay();
        }
    }

    /// Shows what was said before.
    fn replay(&mut self) {
        let columns = self.columns();
        let messages = &self.talk.conversation.messages;
        let hidden = messages.len().saturating_sub(REPLAY_MAX);
        let mut lines = Vec::new();
        if hidden > 0 {
            lines.push(Line::new(&format!("{hidden} earlier messages"), Style::DIM));
        }
        for message in &messages[hidden..] {
            match message {
                Message::User { content } => lines.extend(view::question(content, columns)),
                Message::Tool { content, .. } => lines.extend(view::result(content, columns)),
                Message::Assistant(answer) => {
                    lines.extend(super::markdown::lines(&answer.content, columns));
                    for call in &answer.calls {
                        lines.extend(view::called(&call.name, &call.arguments, columns));
                    }
                    let end = ended(answer.end).map(|text| view::note(text, Style::DIM, columns));
                    lines.extend(end.into_iter().flatten());
                }
            }
        }
        self.above.extend(lines);
        self.next_call();
    }

    /// Takes one input of the terminal.
    ///
    /// # Errors
    /// The terminal is gone.
    pub fn input(&mut self, input: Input) -> Result<()> {
        match input {
            Input::Key(key) if key.kind != KeyEventKind::Release => self.key(key)?,
            Input::Paste(text) => self.edit(Edit::Insert(text)),
            Input::Resize(columns, rows) => {
                self.surface.resize((usize::from(columns).max(1), usize::from(rows).max(1)))?;
            }
            _ => {}
        }
        Ok(())
    }

    fn key(&mut self, key: KeyEvent) -> Result<()> {
        let Some(action) = action(key) else { return Ok(()) };
        self.hint = None;
        if action != Action::Stop {
            self.stopped = None;
        }
        match (&self.mode, action) {
            (_, Action::Redraw) => self.surface.clear_screen()?,
            (_, Action::Suspend) => self.asked = Some(Outside::Suspend),
            (_, Action::Stop) => self.stop(),
            (Mode::Search { .. }, action) => self.search_key(action),
            (Mode::Confirm { .. }, action) => self.confirm_key(&action),
            (_, action) => self.typing_key(action),
        }
        Ok(())
    }

    fn typing_key(&mut self, action: Action) {
        if action != Action::Complete {
            self.candidates = None;
        }
        let columns = view::typing_columns(self.surface.size().0, &self.label());
        match action {
            Action::Edit(edit) => self.edit(edit),
            Action::NewLine => self.edit(Edit::Insert("\n".into())),
            Action::Enter => self.enter(),
            Action::Up if self.editor.go_rows(false, columns) => {}
            Action::Down if self.editor.go_rows(true, columns) => {}
            Action::Up | Action::Earlier => {
                if let Some(text) = self.history.back(self.editor.text()) {
                    self.editor.set(text);
                }
            }
            Action::Down | Action::Later => {
                if let Some(text) = self.history.forth() {
                    self.editor.set(text);
                }
            }
            Action::Search if matches!(self.mode, Mode::Typing) => {
                let before = self.editor.text().to_string();
                self.mode = Mode::Search { search: Search::default(), before };
            }
            Action::Search => self.hint = Some("a command waits or runs: no search".into()),
            Action::Complete => self.complete(),
            Action::Leave if self.editor.is_empty() => self.leave(),
            Action::Leave => self.edit(Edit::Delete),
            Action::Cancel => self.cancel_change(),
            Action::External => self.asked = Some(Outside::Edit(self.editor.text().into())),
            Action::Stop | Action::Redraw | Action::Suspend => {}
        }
    }

    fn edit(&mut self, edit: Edit) {
        self.candidates = None;
        match &mut self.mode {
            Mode::Search { search, .. } => {
                if let Edit::Insert(text) = &edit {
                    search.wanted += text;
                }
                self.find(false);
            }
            Mode::Confirm { .. } => {}
            _ => match &edit {
                Edit::Insert(text) if !self.editor.has_room(text) => {
                    let (bytes, most) = (text.len(), TEXT_BYTES_MAX);
                    self.hint =
                        Some(format!("{bytes} bytes are too many: a text has {most} at most"));
                }
                _ => self.editor.apply(edit),
            },
        }
    }

    fn stop(&mut self) {
        let is_second = self.stopped.is_some_and(|at| at.elapsed() < TWICE);
        self.stopped = Some(Instant::now());
        match &self.mode {
            Mode::Running { running, .. } => running.stop(),
            Mode::Confirm { .. } => self.decline_all(),
            Mode::Search { .. } => self.end_search(false),
            Mode::Change { .. } => self.cancel_change(),
            Mode::Typing if is_second => self.leave(),
            Mode::Typing if self.talk.is_answering() => {
                self.talk.stop();
                self.hint = Some("stopping; Ctrl-C again leaves".into());
            }
            Mode::Typing if !self.editor.is_empty() => {
                self.editor.take();
                self.stopped = None;
            }
            Mode::Typing => self.hint = Some("Ctrl-C again leaves".into()),
        }
    }

    fn leave(&mut self) {
        self.talk.stop();
        self.is_over = true;
    }

    fn enter(&mut self) {
        if self.editor.before_cursor().ends_with('\\') {
            self.editor.apply(Edit::Backspace);
            return self.edit(Edit::Insert("\n".into()));
        }
        if matches!(self.mode, Mode::Change { .. }) {
            return self.run_changed();
        }
        if self.editor.text().trim().is_empty() {
            return;
        }
        let text = self.editor.text().trim_end().to_string();
        let sent = match typed(&text) {
            Typed::Wrong(why) => Err(why),
            Typed::Command(command) => {
                self.editor.take();
                self.remember(&text);
                let effect = perform(&mut self.talk, command);
                match effect {
                    Ok(effect) => {
                        self.take_effect(effect, &text);
                        Ok(())
                    }
                    Err(error) => {
                        self.editor.set(&text);
                        Err(format!("{error:#}"))
                    }
                }
            }
            Typed::Message(message) => self.send(&message),
        };
        // What was typed stays in the editor.
        if let Err(why) = sent {
            self.error(&why);
        }
    }

    fn send(&mut self, message: &str) -> Result<(), String> {
        self.talk.say(message).map_err(|error| format!("{error:#}"))?;
        let text = self.editor.take();
        self.remember(text.trim_end());
        let lines = view::question(text.trim_end(), self.columns());
        self.above.extend(lines);
        Ok(())
    }

    fn remember(&mut self, text: &str) {
        if let Err(error) = self.history.add(text) {
            self.note(&format!("the history is not kept: {error}"));
        }
    }

    fn take_effect(&mut self, effect: Effect, text: &str) {
        if !matches!(effect, Effect::Edit | Effect::Quit) {
            self.above.push(Line::new(text, Style::BOLD));
        }
        match effect {
            Effect::Say(lines) => lines.iter().for_each(|line| self.note(line)),
            Effect::Explain(names) => {
                let lines = view::explained(&names, self.columns());
                self.above.extend(lines);
            }
            Effect::Asked => {}
            Effect::Loading(name) => self.note(&format!("loading {name}; typing goes on")),
            Effect::Refill(text, note) => {
                self.note(&note);
                self.editor.set(&text);
            }
            Effect::Edit => self.asked = Some(Outside::Edit(String::new())),
            Effect::Copy(text) => self.copy(&text),
            Effect::Thinking(text) => {
                let lines = view::thinking(&text, self.columns());
                self.above.extend(lines);
            }
            Effect::ShowThinking(shown) => {
                self.shows_thinking = shown;
                self.note(if shown {
                    "thinking is shown as it comes"
                } else {
                    "thinking is folded"
                });
            }
            Effect::Replay => {
                for note in self.talk.take_notes() {
                    self.note(&note);
                }
                self.replay();
            }
            Effect::Quit => self.leave(),
        }
    }

    /// Gives a text to the terminal's clipboard, where the terminal allows that.
    fn copy(&mut self, text: &str) {
        let bytes = text.len();
        if bytes > COPY_BYTES_MAX {
            return self.error(&format!(
                "the answer has {bytes} bytes, terminals take {COPY_BYTES_MAX}; /export writes a file"
            ));
        }
        let sent = self.surface.send(&format!("\x1b]52;c;{}\x07", super::base64::encoded(text)));
        match sent {
            Ok(()) => self.note(&format!(
                "{bytes} bytes sent to the terminal's clipboard (OSC 52); tmux needs set-clipboard on"
            )),
            Err(error) => self.error(&error.to_string()),
        }
    }

    fn complete(&mut self) {
        let next = match &mut self.candidates {
            Some(candidates) => {
                let at = candidates.at.map_or(0, |at| (at + 1) % candidates.all.len());
                candidates.at = Some(at);
                Some(candidates.all[at].clone())
            }
            None => {
                let text = self.editor.text();
                let all = completions(text, &self.names_for(text));
                let common = common_beginning(&all);
                let longer = common.filter(|common| common.len() > text.len());
                self.candidates = (all.len() > 1).then_some(Candidates { all, at: None });
                longer
            }
        };
        if let Some(text) = next {
            self.editor.set(&text);
        }
    }

    /// What there is that a command may name.
    fn names_for(&self, text: &str) -> Vec<String> {
        match text.split(' ').next() {
            Some("/resume") => {
                // Sessions that cannot be listed complete nothing.
                let sessions = self.talk.store.list().unwrap_or_else(|_| Vec::new());
                sessions.into_iter().map(|session| session.id).collect()
            }
            Some("/tools") => self.talk.tools.server_names(),
            _ => Vec::new(),
        }
    }

    fn search_key(&mut self, action: Action) {
        match action {
            Action::Edit(Edit::Backspace) => {
                if let Mode::Search { search, .. } = &mut self.mode {
                    search.wanted.pop();
                    *search = Search::of(std::mem::take(&mut search.wanted));
                }
                self.find(false);
            }
            Action::Edit(Edit::Insert(text)) => self.edit(Edit::Insert(text)),
            Action::Search | Action::Up | Action::Earlier => self.find(true),
            Action::Cancel => self.end_search(false),
            Action::Enter | Action::Complete => self.end_search(true),
            other => {
                self.end_search(true);
                self.typing_key(other);
            }
        }
    }

    fn find(&mut self, again: bool) {
        let Mode::Search { search, before } = &mut self.mode else { return };
        if search.wanted.is_empty() {
            return self.editor.set(&before.clone());
        }
        match self.history.search(search, again) {
            Some(found) => self.editor.set(found),
            None => self.hint = Some("not found".into()),
        }
    }

    fn end_search(&mut self, keep: bool) {
        match std::mem::replace(&mut self.mode, Mode::Typing) {
            Mode::Search { before, .. } if !keep => self.editor.set(&before),
            Mode::Search { .. } => {}
            other => self.mode = other,
        }
    }

    /// Takes what has happened since the last time.
    pub fn tick(&mut self) {
        for heard in self.talk.hear() {
            self.hear(heard);
        }
        for note in self.talk.take_notes() {
            self.note(&note);
        }
        self.take_outcome();
    }

    /// Shows what was heard of an answer.
    pub fn hear(&mut self, heard: Heard) {
        let columns = self.columns();
        match heard {
            Heard::Progress | Heard::Call(_) => {}
            Heard::Thinking(text) => {
                if self.shows_thinking {
                    self.thinking += &text;
                    let whole = self.thinking.rfind('\n').map_or(0, |at| at + 1);
                    let lines: String = self.thinking.drain(..whole).collect();
                    if let Some(lines) = lines.strip_suffix('\n') {
                        self.above.extend(view::thinking(lines, columns));
                    }
                }
            }
            Heard::Thought(time) => {
                if self.shows_thinking {
                    let rest = std::mem::take(&mut self.thinking);
                    self.above.extend(view::thinking(rest.trim_end(), columns));
                } else {
                    self.above.push(view::thought(time));
                }
                self.above.push(Line::empty());
            }
            Heard::Content(text) => {
                self.stream.push(&text);
                self.above.extend(self.stream.settled(columns));
            }
            Heard::Ended(end) => {
                self.hint = None;
                self.above.extend(self.stream.finish(columns));
                ended(end).into_iter().for_each(|text| self.note(text));
                self.next_call();
            }
            Heard::Model(Ok(what)) => self.note(&what),
            Heard::Model(Err(why)) => self.error(&why),
            Heard::Failed(why) => {
                self.above.extend(self.stream.finish(columns));
                self.thinking.clear();
                self.hint = None;
                self.error(&why);
            }
        }
    }

    /// Prints what is left and takes the live rows away.
    ///
    /// # Errors
    /// The terminal is gone.
    pub fn finish(&mut self) -> Result<()> {
        let above = std::mem::take(&mut self.above);
        self.surface.draw(&above, &[], Place::default())?;
        self.surface.clear()?;
        Ok(())
    }
}

/// What is said of an end that is not the model's own.
pub fn ended(end: End) -> Option<&'static str> {
    match end {
        End::Stop | End::Failed => None,
        End::Length => Some("cut off: the most tokens, or the context is full"),
        End::Stopped => Some("stopped"),
    }
}

fn common_beginning(all: &[String]) -> Option<String> {
    let first = all.first()?;
    let common = |text: &String| {
        let same = first.char_indices().zip(text.chars()).find(|((_, a), b)| a != b);
        same.map_or(first.len().min(text.len()), |((at, _), _)| at)
    };
    let bytes = all.iter().map(common).min()?;
    Some(first[..bytes].to_string())
}
