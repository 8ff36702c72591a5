//! What the model may ask for: a shell command in the working directory, and tools of MCP servers.
//!
//! Owns how they are described to the model, what a call means and what its result says. Nothing
//! runs here without a decision of the user, made once for this very command or for a tool of a server,
//! for as long as this process lives, or in the file that names the servers. What was started is
//! killed, with all that it started, on every way out.

mod group;
mod mcp;
mod outcome;
mod shell;

use std::collections::HashSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::{Map, Value as Json, json};

use super::backend::Tool;
use super::conversation::Call;
use crate::options::chat::ToolArgs;
pub use group::Groups;
use mcp::Servers;
pub use mcp::Wanted;
pub use outcome::{Limits, Ran, Why};

/// How long a call that is given up may take to end.
const ENDING: Duration = Duration::from_secs(2);
/// The name of the tool that is a shell.
const SHELL: &str = "shell";

/// The tools of a chat; none unless the user asked for them.
pub struct Tools {
    has_shell: bool,
    limits: Limits,
    pub directory: PathBuf,
    allowed: HashSet<String>, // commands, and names of tools
    servers: Servers,
    groups: Groups,
}

/// What a call asks for.
#[derive(Clone, PartialEq, Debug)]
pub enum Asked {
    /// A command of the shell.
    Command(String),
    /// A tool of an MCP server.
    Tool(Wanted),
}

/// A call that runs.
pub struct Running {
    outcome: Receiver<Ran>,
    stop: Arc<AtomicBool>,
}

impl Tools {
    /// Those of the flags, in the directory of this process. Servers are started, and not waited for.
    ///
    /// # Errors
    /// The process has no directory; the file of the servers cannot be read.
    pub fn new(args: &ToolArgs) -> Result<Self> {
        let limits = Limits {
            timeout: args.timeout(),
            output_bytes: usize::try_from(args.tool_output).unwrap_or(usize::MAX),
        };
        let directory = std::env::current_dir().context("the working directory")?;
        let groups = Groups::default();
        let servers = match args.mcp_file() {
            Some(file) => Servers::start(&file, limits.timeout, &groups)?,
            None => Servers::none(),
        };
        Ok(Self {
            has_shell: args.tools,
            limits,
            directory,
            allowed: HashSet::new(),
            servers,
            groups,
        })
    }

    /// Whether there are any.
    pub fn are_on(&self) -> bool {
        self.has_shell || self.servers.are_on()
    }

    /// What the model is told.
    pub fn described(&self) -> Vec<Tool> {
        let shell = self.has_shell.then(|| self.described_shell());
        shell.into_iter().chain(self.servers.described()).collect()
    }

    fn described_shell(&self) -> Tool {
        let description = format!(
            "Run a command with /bin/sh in {}. Standard output and standard error come back \
             together. The user is asked before it runs. It has no input, and is killed after {} \
             seconds.",
            self.directory.display(),
            self.limits.timeout.as_secs()
        );
        let command = json!({ "type": "string", "description": "The command line." });
        Tool {
            name: SHELL.into(),
            description,
            parameters: json!({
                "type": "object", "properties": { "command": command }, "required": ["command"],
            }),
        }
    }

    /// What a call asks for.
    ///
    /// # Errors
    /// It is no call of a tool there is; the words are for the model.
    pub fn asked(&self, call: &Call) -> Result<Asked, String> {
        if !self.are_on() {
            return Err("there are no tools in this conversation".into());
        }
        let arguments = object(&call.arguments)?;
        if call.name == SHELL && self.has_shell {
            return match arguments.get("command").and_then(Json::as_str) {
                Some(command) if !command.trim().is_empty() => Ok(Asked::Command(command.into())),
                _ => Err("the arguments need a \"command\", a string that is not empty".into()),
            };
        }
        match self.servers.wanted(&call.name, arguments) {
            Some(wanted) => Ok(Asked::Tool(wanted)),
            None => Err(self.servers.why_not(&call.name).unwrap_or_else(|| {
                let all: Vec<String> = self.described().into_iter().map(|tool| tool.name).collect();
                format!("there is no tool {:?}; there are {}", call.name, all.join(", "))
            })),
        }
    }

    /// Whether this needs no decision any more.
    pub fn is_allowed(&self, asked: &Asked) -> bool {
        let by_file = matches!(asked, Asked::Tool(wanted) if wanted.is_allowed);
        by_file || self.allowed.contains(&asked.permit())
    }

    /// Allows this very command, or this tool, for good.
    pub fn allow(&mut self, asked: &Asked) {
        self.allowed.insert(asked.permit());
    }

    /// Starts what was asked for.
    pub fn start(&self, asked: Asked) -> Running {
        let (sender, outcome) = channel();
        let stop = Arc::new(AtomicBool::new(false));
        match asked {
            Asked::Tool(wanted) => self.servers.call(wanted, self.limits, &stop, sender),
            Asked::Command(command) => {
                let (switch, groups) = (Arc::clone(&stop), self.groups.clone());
                let (directory, limits) = (self.directory.clone(), self.limits);
                thread::spawn(move || {
                    let ran = shell::run(&command, &directory, limits, &switch, &groups);
                    // Nobody may be waiting any more.
                    sender.send(ran).unwrap_or(());
                });
            }
        }
        Running { outcome, stop }
    }

    /// What the user should know, once.
    pub fn take_notes(&self) -> Vec<String> {
        self.servers.take_notes()
    }

    /// Every tool there is, or all that is known of one server.
    ///
    /// # Errors
    /// There is no such server.
    pub fn listed(&self, server: Option<&str>) -> Result<Vec<(String, String)>> {
        if let Some(name) = server {
            let names = self.servers.names().join(", ");
            let names = if names.is_empty() { "none".into() } else { names };
            let known = self.servers.told(name);
            return known.with_context(|| format!("no MCP server {name:?}; there are {names}"));
        }
        let shell = format!("runs commands in {}", self.directory.display());
        let shell = self.has_shell.then(|| (SHELL.to_string(), shell));
        let all: Vec<_> = shell.into_iter().chain(self.servers.listed()).collect();
        match all.is_empty() {
            true => Ok(vec![("no tools".into(), "--tools and --mcp FILE offer some".into())]),
            false => Ok(all),
        }
    }

    /// Names of the servers.
    pub fn server_names(&self) -> Vec<String> {
        self.servers.names()
    }

    /// The groups of all that runs, for whoever ends this process.
    pub fn groups(&self) -> Groups {
        self.groups.clone()
    }
}

impl Drop for Tools {
    fn drop(&mut self) {
        self.servers.close();
        self.groups.kill_all();
    }
}

impl Asked {
    /// What is asked, without the text that is shown below it.
    pub fn question(&self, directory: &std::path::Path) -> String {
        match self {
            Self::Command(_) => format!("The model wants to run, in {}:", directory.display()),
            Self::Tool(wanted) => {
                format!(
                    "The model wants to call {}, of MCP server {}:",
                    wanted.tool, wanted.server_name
                )
            }
        }
    }

    /// What runs, letter by letter: a command, or the arguments of a call.
    pub fn text(&self) -> String {
        match self {
            Self::Command(command) => command.clone(),
            Self::Tool(wanted) => {
                let arguments = Json::Object(wanted.arguments.clone());
                format!("{arguments:#}")
            }
        }
    }

    /// The same with another text.
    ///
    /// # Errors
    /// The text is no JSON object where one is needed.
    pub fn changed(&self, text: &str) -> Result<Self, String> {
        Ok(match self {
            Self::Command(_) => Self::Command(text.into()),
            Self::Tool(wanted) => {
                let mut wanted = wanted.clone();
                wanted.arguments = object(text)?;
                wanted.is_allowed = false;
                Self::Tool(wanted)
            }
        })
    }

    /// What a decision for good is about, for people.
    pub fn always(&self) -> String {
        match self {
            Self::Command(_) => "allowed, letter by letter, until this chat ends".into(),
            Self::Tool(wanted) => {
                format!("{}, with any arguments, is allowed until this chat ends", wanted.name)
            }
        }
    }

    /// A command is allowed letter by letter, a tool by its name, which no command line looks like.
    fn permit(&self) -> String {
        match self {
            Self::Command(command) => format!("$ {command}"),
            Self::Tool(wanted) => wanted.name.clone(),
        }
    }
}

/// Arguments; none at all are an empty object.
fn object(text: &str) -> Result<Map<String, Json>, String> {
    if text.trim().is_empty() {
        return Ok(Map::new());
    }
    let value: Json = serde_json::from_str(text)
        .map_err(|error| format!("the arguments are not JSON: {error}"))?;
    match value {
        Json::Object(fields) => Ok(fields),
        other => Err(format!("the arguments are no JSON object: {other}")),
    }
}

impl Running {
    /// The outcome, if there is one already.
    pub fn try_outcome(&self) -> Option<Ran> {
        match self.outcome.try_recv() {
            Ok(ran) => Some(ran),
            Err(std::sync::mpsc::TryRecvError::Empty) => None,
            Err(std::sync::mpsc::TryRecvError::Disconnected) => Some(lost()),
        }
    }

    /// The outcome, waited for.
    pub fn outcome(&self) -> Ran {
        self.outcome.recv().unwrap_or_else(|_| lost())
    }

    /// Stops it.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }

    /// The switch that stops it.
    pub fn stopper(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.stop)
    }
}

impl Drop for Running {
    /// What nobody waits for any more is stopped, and nobody goes on before it is over.
    fn drop(&mut self) {
        self.stop();
        // An outcome that was taken already has nothing behind it, and that is told at once.
        self.outcome.recv_timeout(ENDING).map(drop).unwrap_or(());
    }
}

fn lost() -> Ran {
    Ran::without_output(Why::Failed("the call was lost".into()))
}

/// What the model is told of what the user did not want.
pub fn declined() -> String {
    "[the user declined to run this]".into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tools() -> Tools {
        let limits = Limits { timeout: Duration::from_secs(20), output_bytes: 1000 };
        Tools {
            has_shell: true,
            limits,
            directory: "/".into(),
            allowed: HashSet::new(),
            servers: Servers::none(),
            groups: Groups::default(),
        }
    }

    fn call(name: &str, arguments: &str) -> Call {
        Call { id: "1".into(), name: name.into(), arguments: arguments.into() }
    }

    fn command(text: &str) -> Asked {
        Asked::Command(text.into())
    }

    #[test]
    fn only_a_call_of_the_tool_is_a_command() {
        let mut tools = tools();
        let asked = tools.asked(&call("shell", "{\"command\": \"ls -l\"}"));
        assert_eq!(asked, Ok(command("ls -l")));
        for (name, arguments, why) in [
            ("python", "{}", "no tool \"python\"; there are shell"),
            ("shell", "{", "not JSON"),
            ("shell", "[1]", "no JSON object"),
            ("shell", "", "need a \"command\""),
            ("shell", "{\"command\": 5}", "need a \"command\""),
            ("shell", "{\"command\": \" \"}", "need a \"command\""),
        ] {
            let error = tools.asked(&call(name, arguments)).unwrap_err();
            assert!(error.contains(why), "{error}");
        }
        tools.has_shell = false;
        assert!(tools.asked(&call("shell", "{\"command\": \"ls\"}")).is_err());
        assert!(tools.described().is_empty());
    }

    #[test]
    fn a_command_is_allowed_letter_by_letter_and_a_tool_by_its_name() {
        let mut tools = tools();
        tools.allow(&command("git status"));
        assert!(tools.is_allowed(&command("git status")));
        let others = ["git status ", "git status; rm x"];
        assert!(others.iter().all(|other| !tools.is_allowed(&command(other))));
        let wanted = |name: &str, text| Wanted {
            server: 0,
            server_name: "git".into(),
            tool: "log".into(),
            name: name.into(),
            arguments: object(text).unwrap(),
            is_allowed: false,
        };
        tools.allow(&Asked::Tool(wanted("git__log", "{\"n\": 1}")));
        assert!(tools.is_allowed(&Asked::Tool(wanted("git__log", "{\"n\": 2}"))));
        assert!(!tools.is_allowed(&Asked::Tool(wanted("git__commit", "{\"n\": 1}"))));
        assert!(!tools.is_allowed(&command("git__log")));
        // What the file allows is not what the user has changed.
        let by_file = Asked::Tool(Wanted { is_allowed: true, ..wanted("git__push", "{}") });
        assert!(tools.is_allowed(&by_file));
        assert!(!tools.is_allowed(&by_file.changed("{\"force\": true}").unwrap()));
        assert!(by_file.changed("[]").is_err());
    }
}
