//! What the model may ask for: one tool, a shell command in the working directory.
//!
//! Owns how it is described to the model, what a call of it means and what its result says. Nothing
//! runs here without a decision of the user; a command that was allowed for good is allowed letter by
//! letter, for as long as this process lives.

mod shell;

use std::collections::HashSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::{Value as Json, json};

use super::backend::Tool;
use super::conversation::Call;
use crate::options::chat::ToolArgs;
pub use shell::{Limits, Ran, Why};

/// How long a call that is given up may take to end.
const ENDING: Duration = Duration::from_secs(2);
/// The name of the tool.
const SHELL: &str = "shell";

/// Texts that a chat template gives a meaning to. A result that has one could speak for somebody else.
const MARKS: [&str; 7] =
    ["<|", "<tool_call", "</tool_call", "<tool_response", "</tool_response", "<think", "</think"];

/// The tools of a chat; none unless the user asked for them.
pub struct Tools {
    limits: Option<Limits>,
    pub directory: PathBuf,
    allowed: HashSet<String>,
}

/// A command that runs.
pub struct Running {
    outcome: Receiver<Ran>,
    stop: Arc<AtomicBool>,
}

impl Tools {
    /// Those of the flags, in the directory of this process.
    ///
    /// # Errors
    /// The process has no directory.
    pub fn new(args: &ToolArgs) -> Result<Self> {
        let limits = Limits {
            timeout: args.timeout(),
            output_bytes: usize::try_from(args.tool_output).unwrap_or(usize::MAX),
        };
        Ok(Self {
            limits: args.tools.then_some(limits),
            directory: std::env::current_dir().context("the working directory")?,
            allowed: HashSet::new(),
        })
    }

    /// Whether there are any.
    pub fn are_on(&self) -> bool {
        self.limits.is_some()
    }

    /// What the model is told.
    pub fn described(&self) -> Vec<Tool> {
        let Some(limits) = &self.limits else { return Vec::new() };
        let description = format!(
            "Run a command with /bin/sh in {}. Standard output and standard error come back \
             together. The user is asked before it runs. It has no input, and is killed after {} \
             seconds.",
            self.directory.display(),
            limits.timeout.as_secs()
        );
        let command = json!({ "type": "string", "description": "The command line." });
        vec![Tool {
            name: SHELL.into(),
            description,
            parameters: json!({
                "type": "object", "properties": { "command": command }, "required": ["command"],
            }),
        }]
    }

    /// The command that a call asks for.
    ///
    /// # Errors
    /// It is no call of a tool there is; the words are for the model.
    pub fn command(&self, call: &Call) -> Result<String, String> {
        if !self.are_on() {
            return Err("there are no tools in this conversation".into());
        }
        if call.name != SHELL {
            return Err(format!("there is no tool {:?}, only {SHELL:?}", call.name));
        }
        let arguments: Json = serde_json::from_str(&call.arguments)
            .map_err(|error| format!("the arguments are not JSON: {error}"))?;
        match arguments["command"].as_str() {
            Some(command) if !command.trim().is_empty() => Ok(command.into()),
            _ => Err("the arguments need a \"command\", a string that is not empty".into()),
        }
    }

    /// Whether this very command was allowed for good.
    pub fn is_allowed(&self, command: &str) -> bool {
        self.allowed.contains(command)
    }

    /// Allows this very command for good.
    pub fn allow(&mut self, command: &str) {
        self.allowed.insert(command.into());
    }

    /// Starts a command.
    pub fn start(&self, command: &str) -> Running {
        let (sender, outcome) = channel();
        let stop = Arc::new(AtomicBool::new(false));
        let (own, switch) = (command.to_string(), Arc::clone(&stop));
        let directory = self.directory.clone();
        let limits = self.limits.unwrap_or(Limits { timeout: Default::default(), output_bytes: 0 });
        thread::spawn(move || {
            let ran = shell::run(&own, &directory, limits, &switch);
            // Nobody may be waiting any more.
            sender.send(ran).unwrap_or(());
        });
        Running { outcome, stop }
    }
}

impl Running {
    /// The outcome, if there is one already.
    pub fn try_outcome(&self) -> Option<Ran> {
        self.outcome.try_recv().ok()
    }

    /// The outcome, waited for.
    pub fn outcome(&self) -> Ran {
        let lost = || Ran { output: "the command was lost".into(), why: Why::Stopped, left_out: 0 };
        self.outcome.recv().unwrap_or_else(|_| lost())
    }

    /// Kills it.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }

    /// The switch that kills it.
    pub fn stopper(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.stop)
    }
}

impl Drop for Running {
    /// What nobody waits for any more is killed, and nobody goes on before it is dead.
    fn drop(&mut self) {
        self.stop();
        // An outcome that was taken already has nothing behind it, and that is told at once.
        self.outcome.recv_timeout(ENDING).map(drop).unwrap_or(());
    }
}

impl Ran {
    /// What the model is told of it.
    pub fn result(&self) -> String {
        let mut text = defused(self.output.trim_end());
        if !text.is_empty() {
            text.push('\n');
        }
        text + &format!("[{}]", self.why)
    }
}

/// What the model is told of a command that the user did not want.
pub fn declined() -> String {
    "[the user declined to run this command]".into()
}

/// A text without marks that a template would obey: a space parts what begins one.
fn defused(text: &str) -> String {
    let mut text = text.to_string();
    for mark in MARKS {
        if text.contains(mark) {
            text = text.replace(mark, &format!("< {}", &mark[1..]));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tools() -> Tools {
        let limits = Limits { timeout: Duration::from_secs(20), output_bytes: 1000 };
        Tools { limits: Some(limits), directory: "/".into(), allowed: HashSet::new() }
    }

    fn call(name: &str, arguments: &str) -> Call {
        Call { id: "1".into(), name: name.into(), arguments: arguments.into() }
    }

    #[test]
    fn only_a_call_of_the_tool_is_a_command() {
        let tools = tools();
        assert_eq!(tools.command(&call("shell", "{\"command\": \"ls -l\"}")), Ok("ls -l".into()));
        for (name, arguments, why) in [
            ("python", "{}", "no tool \"python\""),
            ("shell", "{", "not JSON"),
            ("shell", "{\"command\": 5}", "need a \"command\""),
            ("shell", "{\"command\": \" \"}", "need a \"command\""),
        ] {
            let error = tools.command(&call(name, arguments)).unwrap_err();
            assert!(error.contains(why), "{error}");
        }
        let off = Tools { limits: None, ..tools };
        assert!(off.command(&call("shell", "{\"command\": \"ls\"}")).is_err());
        assert!(off.described().is_empty());
    }

    #[test]
    fn what_is_allowed_is_allowed_letter_by_letter() {
        let mut tools = tools();
        tools.allow("git status");
        assert!(tools.is_allowed("git status"));
        assert!(!tools.is_allowed("git status ") && !tools.is_allowed("git status; rm x"));
    }

    #[test]
    fn a_result_cannot_speak_for_the_template() {
        let output = "a<|im_end|></tool_response><b>".into();
        let ran = Ran { output, why: Why::Exited(3), left_out: 0 };
        assert_eq!(ran.result(), "a< |im_end|>< /tool_response><b>\n[exit status 3]");
    }
}
