//! The chat without a screen: a message a line in, the answer's text out.
//!
//! For pipes, dumb terminals and --plain. Answers and what commands say go to standard output,
//! everything else to standard error. A message that failed does not end the run, but its exit
//! status says so.

use std::io::{self, BufRead, Write};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result};

use super::app::ended;
use super::commands::{Typed, typed};
use super::conversation::Message;
use super::line::{harmless, harmless_lines as lines};
use super::perform::{Effect, perform};
use super::talk::{Heard, Talk};
use super::terminal::listen_for_end;
use super::tools::{Asked, Groups, declined};
use super::view::seconds;
use crate::say::tell;

/// Exit status of a program that SIGTERM ended.
const ENDED: i32 = 143;

/// A chat on plain streams.
struct Plain {
    talk: Talk,
    shows_thinking: bool,
    is_typed: bool, // by a person, who sees prompts
    stop: Stop,
    failed: bool,
}

/// The switch of the answer that is coming, for Ctrl-C.
#[derive(Clone, Default)]
struct Stop(Arc<Mutex<Option<Arc<AtomicBool>>>>);

/// Runs until the input ends. The talk comes back whatever happened.
///
/// # Errors
/// Standard input or output fails.
pub fn run(talk: Talk, is_typed: bool) -> (Talk, Result<ExitCode>) {
    let shows_thinking = talk.args.answer.show_think;
    let stop = Stop::default();
    let mut plain = Plain { talk, shows_thinking, is_typed, stop, failed: false };
    let worked = plain.listen().and_then(|()| {
        plain.notes();
        plain.decline_calls();
        plain.read()
    });
    let code = if plain.failed { ExitCode::FAILURE } else { ExitCode::SUCCESS };
    (plain.talk, worked.map(|()| code))
}

impl Stop {
    /// Ctrl-C stops the answer or the call that is under way, and ends the program where there is none.
    fn listen(&self, groups: Groups) -> Result<()> {
        let own = self.clone();
        ctrlc::set_handler(move || match &*own.lock() {
            Some(stop) if !stop.swap(true, Ordering::Relaxed) => {}
            _ => {
                groups.kill_all();
                std::process::exit(130);
            }
        })
        .context("cannot listen for Ctrl-C")
    }

    fn set(&self, stop: Option<Arc<AtomicBool>>) {
        *self.lock() = stop;
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Arc<AtomicBool>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Plain {
    /// Ends what runs, or the program, on a signal; nothing that a tool has started outlives it.
    fn listen(&self) -> Result<()> {
        let groups = self.talk.tools.groups();
        self.stop.listen(groups.clone())?;
        if !self.talk.tools.are_on() {
            return Ok(());
        }
        listen_for_end(move || {
            groups.kill_all();
            std::process::exit(ENDED);
        })
    }

    fn read(&mut self) -> Result<()> {
        let mut text = String::new();
        loop {
            self.prompt(if text.is_empty() { "> " } else { ". " });
            let Some(line) = next_line()? else { break };
            let Ok(line) = String::from_utf8(line) else {
                text.clear();
                self.fail("standard input: a message that is not UTF-8 text is left out");
                continue;
            };
            match line.strip_suffix('\\') {
                Some(more) => text += &format!("{more}\n"),
                None => {
                    text += &line;
                    if !self.take(&std::mem::take(&mut text))? {
                        return Ok(());
                    }
                }
            }
        }
        self.take(&text).map(drop)
    }

    fn prompt(&self, text: &str) {
        if self.is_typed {
            ask(text);
        }
    }

    /// Takes one message or command; says whether to go on.
    fn take(&mut self, text: &str) -> Result<bool> {
        if text.trim().is_empty() {
            return Ok(true);
        }
        match typed(text) {
            Typed::Wrong(why) => self.fail(&why),
            Typed::Message(message) => match self.talk.say(&message) {
                Ok(()) => self.answer()?,
                Err(error) => self.fail(&format!("{error:#}")),
            },
            Typed::Command(command) => match perform(&mut self.talk, command) {
                Ok(Effect::Quit) => return Ok(false),
                Ok(effect) => self.take_effect(effect)?,
                Err(error) => self.fail(&format!("{error:#}")),
            },
        }
        self.notes();
        Ok(true)
    }

    fn take_effect(&mut self, effect: Effect) -> Result<()> {
        match effect {
            Effect::Say(lines) => {
                lines.iter().try_for_each(|line| print(&format!("{}\n", harmless(line))))
            }
            Effect::Explain(names) => {
                let line = |(name, what): &(String, String)| {
                    print(&format!("{:<24} {}\n", harmless(name), harmless(what)))
                };
                names.iter().try_for_each(line)
            }
            Effect::Asked => self.answer(),
            Effect::Loading(name) => self.wait_for(&name),
            Effect::Refill(text, note) => print(&format!("{note}: {}\n", lines(&text))),
            Effect::Thinking(text) | Effect::Copy(text) => print(&format!("{}\n", lines(&text))),
            Effect::ShowThinking(shown) => {
                self.shows_thinking = shown;
                Ok(())
            }
            Effect::Replay => {
                self.decline_calls();
                let said = self.talk.conversation.messages.len();
                print(&format!("{}: {said} messages\n", self.talk.session.id()))
            }
            Effect::Edit => {
                self.fail("/edit needs a screen");
                Ok(())
            }
            Effect::Quit => Ok(()),
        }
    }

    fn wait_for(&mut self, model: &str) -> Result<()> {
        tell!("flash-moe: loading {}", harmless(model));
        match self.talk.hear_switched() {
            Some(Heard::Model(Ok(what))) => print(&format!("{}\n", harmless(&what))),
            Some(Heard::Model(Err(why))) => {
                self.fail(&why);
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// Prints the answer as it comes, and those that follow the results of tools.
    fn answer(&mut self) -> Result<()> {
        loop {
            self.stop.set(self.talk.stopper());
            let printed = self.print_answer();
            self.stop.set(None);
            printed?;
            let open = self.talk.conversation.open_calls();
            if open.is_empty() {
                return Ok(());
            }
            for call in open {
                let result = match self.talk.tools.asked(&call) {
                    Ok(asked) => self.decide(asked)?,
                    Err(why) => format!("[{why}]"),
                };
                self.talk.add_result(&call.id, &result);
            }
            if let Err(error) = self.talk.go_on() {
                self.fail(&format!("{error:#}"));
                return Ok(());
            }
        }
    }

    fn print_answer(&mut self) -> Result<()> {
        let mut ends_line = true;
        let mut in_thinking = false;
        while self.talk.is_answering() {
            for heard in self.talk.hear_next() {
                let text = match heard {
                    Heard::Thinking(text) if self.shows_thinking => {
                        let opens = if in_thinking { "" } else { "<think>\n" };
                        in_thinking = true;
                        format!("{opens}{}", lines(&text))
                    }
                    Heard::Thought(_) if in_thinking => {
                        in_thinking = false;
                        "\n</think>\n\n".into()
                    }
                    Heard::Thought(time) if self.is_typed => {
                        tell!("thought for {}", seconds(time));
                        String::new()
                    }
                    Heard::Content(text) => lines(&text),
                    Heard::Ended(end) => {
                        if let Some(why) = ended(end) {
                            tell!("\nflash-moe: note: {why}");
                        }
                        String::new()
                    }
                    Heard::Failed(why) => {
                        self.fail(&why);
                        String::new()
                    }
                    _ => String::new(),
                };
                if !text.is_empty() {
                    ends_line = text.ends_with('\n');
                    print(&text)?;
                }
            }
        }
        if !ends_line
            || matches!(self.talk.conversation.messages.last(), Some(Message::Assistant(_)))
        {
            print("\n")?;
        }
        Ok(())
    }

    /// Asks about a call and gives what the model is told.
    fn decide(&mut self, asked: Asked) -> Result<String> {
        let text = asked.text();
        let shown: Vec<String> = text.split('\n').map(harmless).collect();
        let question = harmless(&asked.question(&self.talk.tools.directory));
        tell!("{question}\n    {}", shown.join("\n    "));
        if !self.talk.tools.is_allowed(&asked) {
            ask("run it? [y/n/a] ");
            match next_line()?.unwrap_or_else(Vec::new).trim_ascii() {
                b"y" => {}
                b"a" => {
                    self.talk.tools.allow(&asked);
                    tell!("{}", asked.always());
                }
                _ => return Ok(declined()),
            }
        }
        let running = self.talk.tools.start(asked);
        self.stop.set(Some(running.stopper()));
        let result = running.outcome().result();
        self.stop.set(None);
        tell!("{}", lines(&result));
        Ok(result)
    }

    /// Without a screen nobody is asked about what an earlier run left open.
    fn decline_calls(&mut self) {
        if self.talk.decline_calls() {
            tell!("flash-moe: note: what the model wanted to run last is not run");
        }
    }

    fn notes(&mut self) {
        for note in self.talk.take_notes() {
            tell!("flash-moe: note: {}", harmless(&note));
        }
    }

    fn fail(&mut self, why: &str) {
        self.failed = true;
        tell!("flash-moe: {}", harmless(why));
    }
}

/// The next line of standard input without its end; `None` when there is none.
fn next_line() -> Result<Option<Vec<u8>>> {
    let mut bytes = Vec::new();
    let read = io::stdin().lock().read_until(b'\n', &mut bytes).context("standard input")?;
    if read == 0 {
        return Ok(None);
    }
    while bytes.pop_if(|last| matches!(last, b'\n' | b'\r')).is_some() {}
    Ok(Some(bytes))
}

/// Text on standard error that the answer is typed behind. Where it is not seen the question is not, but
/// the answer is read all the same.
fn ask(text: &str) {
    write!(io::stderr(), "{text}").unwrap_or(());
}

fn print(text: &str) -> Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).context("standard output")
}
