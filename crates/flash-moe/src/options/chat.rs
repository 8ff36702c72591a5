//! Flags of `chat`: which model or server, which conversation, thinking, tools.
//!
//! Model flags and sampling are those of `run` and `serve`. With `--connect` nothing is loaded, so the
//! flags that are about loading have no effect then and are refused.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::{Arg, Args};

use super::engine::{EngineArgs, HotSetArgs, at_least_one};
use super::run::SamplingArgs;
use super::serve::{AnswerArgs, PrefixArgs};
use super::{environment, size};

/// Shown below the flags.
const EXAMPLES: &str = "\
Examples:
  flash-moe chat
  flash-moe chat -m DIR --memory 12GiB --context 32768
  flash-moe chat -m DIR --mcp servers.json
  flash-moe chat -m DIR --tools --system \"You are at home in this repository.\"
  flash-moe chat --connect http://127.0.0.1:8080
  flash-moe chat --connect https://example.org/v1 --api-key-file key.txt -m NAME
  flash-moe chat --resume
  printf 'Hello\\nWhat did I say?\\n' | flash-moe chat

Enter sends, Alt-Enter or a backslash at the end starts a new line, Ctrl-C stops the answer and
leaves when pressed twice, Ctrl-D leaves, /help lists the commands. docs/chat.md has all of it.
Exit status: 0, or 1 on an error, 2 on a wrong flag.";

/// Flags about a model in this process, by their names in the parser.
const LOCAL: [&str; 25] = [
    "memory",
    "threads",
    "isa",
    "exact",
    "fast",
    "io",
    "readers",
    "reader",
    "kv_cache",
    "kv_sink",
    "kv_recent",
    "device",
    "gpu_memory",
    "gpu_misses",
    "gpu_uploads",
    "prefill_chunk",
    "yarn",
    "lookahead",
    "experts_per_token",
    "hot_set",
    "context",
    "chat_template",
    "think_budget",
    "no_state",
    "state_size",
];

/// A flag about a model in this process goes with no server. Defaults do not count.
fn apart_from_servers(arg: Arg) -> Arg {
    let is_local = LOCAL.contains(&arg.get_id().as_str());
    if is_local { arg.conflicts_with("connect") } else { arg }
}

/// Talk with a model in the terminal.
///
/// The model runs in this process, or answers from any OpenAI-compatible server with --connect.
/// Without --model a small trained model inside this program answers. Where standard input or output
/// is no terminal, each line of the input is a message and the answers are printed as they come.
#[derive(Args, Clone, Debug)]
#[command(after_help = EXAMPLES, mut_args = apart_from_servers)]
pub struct ChatArgs {
    /// Model and machine.
    #[command(flatten)]
    pub engine: EngineArgs,
    /// What is kept for the next run.
    #[command(flatten)]
    pub hot_set: HotSetArgs,
    /// A server instead.
    #[command(flatten)]
    pub server: ServerArgs,
    /// Which conversation.
    #[command(flatten)]
    pub session: SessionArgs,
    /// Thinking and length.
    #[command(flatten)]
    pub answer: ChatAnswerArgs,
    /// Choice of tokens.
    #[command(flatten)]
    pub sampling: SamplingArgs,
    /// What the model may do.
    #[command(flatten)]
    pub tools: ToolArgs,
}

/// A server that answers instead of a model in this process.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Server")]
pub struct ServerArgs {
    /// Be a client of this OpenAI-compatible server; --model is then a name, by default the first
    /// that the server lists.
    #[arg(long, value_name = "URL")]
    pub connect: Option<String>,

    /// Send the key that is the first line of this file.
    #[arg(long, value_name = "FILE", requires = "connect")]
    pub api_key_file: Option<PathBuf>,
}

/// Which conversation, and what is kept of it.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Conversation")]
pub struct SessionArgs {
    /// System prompt.
    #[arg(long, value_name = "TEXT")]
    pub system: Option<String>,

    /// Go on with an earlier conversation: its ID, the beginning of it, its name, or without any the
    /// latest.
    #[arg(long, value_name = "ID", num_args = 0..=1, default_missing_value = "")]
    pub resume: Option<String>,

    /// List the conversations that can be resumed, and end.
    #[arg(long, conflicts_with = "resume")]
    pub sessions: bool,

    /// Keep no model states on disk; a resumed conversation is then read again.
    #[arg(long)]
    pub no_state: bool,

    /// Most bytes of model states on disk; those not used for longest are removed.
    #[arg(long, value_name = "SIZE", default_value = "4GiB", value_parser = size::parse)]
    pub state_size: u64,

    /// Draw nothing: a message a line on standard input, answers on standard output.
    #[arg(long)]
    pub plain: bool,
}

/// How it answers.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Answers")]
pub struct ChatAnswerArgs {
    /// Ask the model to think first, where its template has the choice.
    #[arg(long, conflicts_with = "no_think")]
    pub think: bool,

    /// Ask the model not to think, where its template has the choice.
    #[arg(long)]
    pub no_think: bool,

    /// Show thinking as it comes, instead of one line with a timer.
    #[arg(long)]
    pub show_think: bool,

    /// End the thinking after this many tokens; 0 never does [default: 0].
    #[arg(long, value_name = "N")]
    pub think_budget: Option<usize>,

    /// Tokens of an answer at most, thinking included [default: what the context holds].
    #[arg(long, short = 'n', value_name = "N", value_parser = at_least_one)]
    pub max_tokens: Option<usize>,

    /// Tokens of the whole conversation [default: 8192, or the model's limit if that is less].
    #[arg(long, value_name = "N", value_parser = at_least_one)]
    pub context: Option<usize>,

    /// Use this chat template instead of the model's.
    #[arg(long, value_name = "FILE")]
    pub chat_template: Option<PathBuf>,
}

/// What the model may do.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Tools")]
pub struct ToolArgs {
    /// Let the model ask to run shell commands here; each is shown and runs only if you say yes.
    #[arg(long)]
    pub tools: bool,

    /// Start the MCP servers of this JSON file and let the model ask for their tools; each call is
    /// shown and made only if you say yes. With --tools and without this, mcp.json in the directory
    /// of configurations, if it is there.
    #[arg(long, value_name = "FILE")]
    pub mcp: Option<PathBuf>,

    /// Seconds after which a command is killed with all that it started, and a call of an MCP server,
    /// or its start, is given up.
    #[arg(long, value_name = "SECONDS", default_value = "60", value_parser = at_least_one)]
    pub tool_timeout: usize,

    /// Bytes of an output that the model gets: the first half and the last half of them.
    #[arg(long, value_name = "SIZE", default_value = "16KiB", value_parser = size::parse)]
    pub tool_output: u64,
}

impl ChatArgs {
    /// Whether to think; `None` leaves it to the template.
    pub fn thinking(&self) -> Option<bool> {
        match (self.answer.think, self.answer.no_think) {
            (true, _) => Some(true),
            (_, true) => Some(false),
            _ => None,
        }
    }

    /// How the model in this process answers, in the server's terms.
    pub fn answers(&self) -> AnswerArgs {
        AnswerArgs {
            context: self.answer.context,
            alias: None,
            chat_template: self.answer.chat_template.clone(),
            think_budget: 0,
        }
    }

    /// What it remembers, in the server's terms.
    pub fn prefixes(&self) -> PrefixArgs {
        let dir = environment::cache_dir().filter(|_| !self.session.no_state);
        PrefixArgs {
            prefix_memory: None,
            prefix_every: 4096,
            state_dir: dir.map(|dir| dir.join("chat-states")),
            state_dir_size: self.session.state_size,
        }
    }

    /// The directory of sessions and history.
    ///
    /// # Errors
    /// The system names none.
    pub fn data_dir() -> Result<PathBuf> {
        environment::data_dir().context(
            "no place for conversations: set XDG_DATA_HOME to a directory that can be written",
        )
    }
}

impl ServerArgs {
    /// The key of the file.
    ///
    /// # Errors
    /// The file cannot be read, or is empty.
    pub fn key(&self) -> Result<Option<String>> {
        let Some(path) = &self.api_key_file else { return Ok(None) };
        super::serve::key_in(path).map(Some)
    }
}

impl ToolArgs {
    /// The file of MCP servers, if there is one.
    pub fn mcp_file(&self) -> Option<PathBuf> {
        let default = environment::config_dir().map(|dir| dir.join("mcp.json"));
        let default = default.filter(|file| self.tools && file.exists());
        self.mcp.clone().or(default)
    }

    /// Whether the model may ask for anything.
    pub fn are_on(&self) -> bool {
        self.tools || self.mcp.is_some()
    }

    /// How long a command may take.
    pub fn timeout(&self) -> Duration {
        Duration::from_secs(self.tool_timeout as u64)
    }
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory, Parser};

    use super::super::Options;
    use super::*;

    /// Flags that mean the same with a server as without one.
    const FOR_BOTH: [&str; 26] = [
        "model",
        "connect",
        "api_key_file",
        "system",
        "resume",
        "sessions",
        "plain",
        "think",
        "no_think",
        "show_think",
        "max_tokens",
        "greedy",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "repetition_penalty",
        "presence_penalty",
        "frequency_penalty",
        "seed",
        "tools",
        "mcp",
        "tool_timeout",
        "tool_output",
        "help",
        "version",
    ];

    #[test]
    fn every_flag_is_said_to_go_with_a_server_or_not() {
        let mut program = Options::command();
        program.build();
        let chat = program.find_subcommand("chat").expect("a command");
        let mut seen = Vec::new();
        for arg in chat.get_arguments() {
            let name = arg.get_id().as_str();
            let is_local = LOCAL.contains(&name);
            assert!(is_local != FOR_BOTH.contains(&name), "{name}");
            seen.push(name);
            let Some(flag) = arg.get_long().filter(|_| is_local) else { continue };
            let mut line =
                vec!["flash-moe".to_string(), "chat".into(), "--connect=http://x".into()];
            let mut known = arg.get_value_parser().possible_values().into_iter().flatten();
            line.push(match known.next() {
                _ if !arg.get_action().takes_values() => format!("--{flag}"),
                Some(value) => format!("--{flag}={}", value.get_name()),
                None if name == "kv_cache" => "--kv-cache=f16".into(),
                None if name == "device" => "--device=cpu".into(),
                None => format!("--{flag}=1"),
            });
            let error = Options::try_parse_from(&line).expect_err(flag);
            assert_eq!(error.kind(), clap::error::ErrorKind::ArgumentConflict, "{error}");
        }
        assert!(LOCAL.iter().all(|name| seen.contains(name)), "{seen:?}");
        Options::try_parse_from(["flash-moe", "chat", "--connect=http://x"]).expect("no flags");
    }
}
