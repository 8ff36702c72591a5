//! Commands that the model asks for: shown, decided on, run, and answered for.
//!
//! A command waits until the user decides, letter and Enter; what has a result goes back to the model
//! when all calls of its answer have one. Nothing that was being typed is lost to a question.

use std::io::Write;
use std::time::Instant;

use super::super::conversation::{Call, Message};
use super::super::editor::Edit;
use super::super::keys::Action;
use super::super::tools::declined;
use super::super::view;
use super::{App, Mode};

impl<W: Write> App<W> {
    /// A decision is a letter and Enter: what was being typed when the question came decides nothing.
    pub(super) fn confirm_key(&mut self, action: &Action) {
        let Mode::Confirm { call, command, typed } = &mut self.mode else { return };
        match action {
            Action::Edit(Edit::Insert(text)) => return typed.push_str(text),
            Action::Edit(Edit::Backspace) => {
                typed.pop();
                return;
            }
            Action::Edit(Edit::KillToStart) => return typed.clear(),
            Action::Cancel => return self.decline(),
            Action::Enter => {}
            _ => return,
        }
        let answer = std::mem::take(typed).trim().to_lowercase();
        let (call, command) = (call.clone(), command.clone());
        match answer.as_str() {
            "y" | "yes" => self.run(call, command),
            "a" | "always" => {
                self.talk.tools.allow(&command);
                self.note("allowed, letter by letter, until this chat ends");
                self.run(call, command);
            }
            "n" | "no" => self.decline(),
            "e" | "edit" => {
                let draft = self.editor.take();
                self.editor.set(&command);
                self.mode = Mode::Change { call, draft };
            }
            _ => self.hint = Some("y, n, a or e, and Enter".into()),
        }
    }

    fn run(&mut self, call: Call, command: String) {
        let running = self.talk.tools.start(&command);
        self.mode = Mode::Running { call, running, since: Instant::now() };
    }

    pub(super) fn run_changed(&mut self) {
        let Mode::Change { call, draft } = std::mem::replace(&mut self.mode, Mode::Typing) else {
            return;
        };
        let command = self.editor.take();
        self.editor.set(&draft);
        if command.trim().is_empty() {
            return self.decline_call(&call);
        }
        let lines = view::command_lines(&command, self.columns());
        self.above.extend(lines);
        self.run(call, command);
    }

    pub(super) fn cancel_change(&mut self) {
        match std::mem::replace(&mut self.mode, Mode::Typing) {
            Mode::Change { draft, .. } => {
                self.editor.set(&draft);
                self.next_call();
            }
            other => self.mode = other,
        }
    }

    fn decline_call(&mut self, call: &Call) {
        self.note("not run");
        self.talk.add_result(&call.id, &declined());
        self.next_call();
    }

    fn decline(&mut self) {
        if let Mode::Confirm { call, .. } = std::mem::replace(&mut self.mode, Mode::Typing) {
            self.decline_call(&call);
        }
    }

    /// Declines this call and all others, and does not go on.
    pub(super) fn decline_all(&mut self) {
        self.mode = Mode::Typing;
        self.note("not run");
        self.talk.decline_calls();
    }

    /// Goes on with the calls of the last answer: the next one, or the model when all have results.
    pub(super) fn next_call(&mut self) {
        for call in self.talk.conversation.open_calls() {
            match self.talk.tools.command(&call) {
                Ok(command) => return self.offer(call, command),
                Err(why) => {
                    self.error(&format!("the model's call is refused: {why}"));
                    self.talk.add_result(&call.id, &format!("[{why}]"));
                }
            }
        }
        let results = matches!(self.talk.conversation.messages.last(), Some(Message::Tool { .. }));
        if results && let Err(error) = self.talk.go_on() {
            self.error(&format!("{error:#}"));
        }
    }

    /// Asks the user about a call, unless it was allowed before.
    fn offer(&mut self, call: Call, command: String) {
        self.end_search(false);
        let directory = self.talk.tools.directory.display().to_string();
        let lines = view::asked_command(&command, &directory, self.columns());
        self.above.extend(lines);
        if self.talk.tools.is_allowed(&command) {
            self.note("allowed before");
            self.run(call, command);
        } else {
            self.mode = Mode::Confirm { call, command, typed: String::new() };
        }
    }

    /// Takes the outcome of a command, once it is there.
    pub(super) fn take_outcome(&mut self) {
        let ran = match &self.mode {
            Mode::Running { running, call, .. } => {
                running.try_outcome().map(|ran| (call.id.clone(), ran))
            }
            _ => None,
        };
        if let Some((id, ran)) = ran {
            self.mode = Mode::Typing;
            let result = ran.result();
            let lines = view::result(&result, self.columns());
            self.above.extend(lines);
            self.talk.add_result(&id, &result);
            self.next_call();
        }
    }
}
