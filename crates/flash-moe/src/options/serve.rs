//! Flags of `serve`: where it listens, whom it lets in, how much it takes on at once.
//!
//! Every limit has a flag and a default that suits one machine with a few clients. A key may stand in
//! a file, so that it is in no process list.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::Args;

use super::engine::{EngineArgs, HotSetArgs, at_least_one};
use super::size;

/// Shown below the flags.
const EXAMPLES: &str = "\
Examples:
  flash-moe serve
  flash-moe serve -m DIR --context 65536 --memory 24GiB
  flash-moe serve -m DIR --state-dir ~/.cache/flash-moe-states
  flash-moe serve -m DIR --host 0.0.0.0 --api-key-file key.txt
  curl localhost:8080/v1/chat/completions -H 'content-type: application/json' \\
    -d '{\"messages\": [{\"role\": \"user\", \"content\": \"Hello\"}]}'

A browser finds a chat at http://127.0.0.1:8080/. docs/server.md lists the protocols and every
parameter. Ctrl-C stops taking requests and lets the running ones end; a second one ends at once.";

/// Answer OpenAI and Anthropic clients over HTTP.
///
/// Chat completions, completions, responses and messages, streamed or whole, with tools and JSON
/// schemas. Without --model a small trained model inside this program answers.
#[derive(Args, Debug)]
#[command(after_help = EXAMPLES)]
pub struct ServeArgs {
    /// Model and machine.
    #[command(flatten)]
    pub engine: EngineArgs,
    /// What is kept for the next start.
    #[command(flatten)]
    pub hot_set: HotSetArgs,
    /// Where it listens.
    #[command(flatten)]
    pub listen: ListenArgs,
    /// What it takes on.
    #[command(flatten)]
    pub load: LoadArgs,
    /// What it remembers of earlier requests.
    #[command(flatten)]
    pub prefix: PrefixArgs,
    /// How it answers.
    #[command(flatten)]
    pub answer: AnswerArgs,
}

/// Where it listens and whom it lets in.
#[derive(Args, Debug)]
#[command(next_help_heading = "Network")]
pub struct ListenArgs {
    /// Address to listen on; anything but this machine's own wants a key.
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1")]
    pub host: IpAddr,

    /// Port to listen on; 0 takes a free one and prints it.
    #[arg(long, short, value_name = "PORT", default_value_t = 8080)]
    pub port: u16,

    /// Ask every request for this key. A file keeps it out of the process list.
    #[arg(long, value_name = "KEY", conflicts_with = "api_key_file")]
    pub api_key: Option<String>,

    /// Ask every request for the key that is the first line of this file.
    #[arg(long, value_name = "FILE")]
    pub api_key_file: Option<PathBuf>,

    /// Let web pages of this origin use the server, or of any with `*`; may be given several times.
    /// Pages on this machine's own addresses always may.
    #[arg(long, value_name = "ORIGIN")]
    pub cors: Vec<String>,
}

/// How much it takes on.
#[derive(Args, Debug)]
#[command(next_help_heading = "Load")]
pub struct LoadArgs {
    /// Texts generated at once; their tokens go through the layers together. Memory for their contexts is planned at the
    /// start.
    #[arg(long, value_name = "N", default_value = "2", value_parser = at_least_one)]
    pub parallel: usize,

    /// Texts that wait for their turn; one more is refused with status 429.
    #[arg(long, value_name = "N", default_value_t = 32)]
    pub queue: usize,

    /// Largest request body.
    #[arg(long, value_name = "SIZE", default_value = "32MiB", value_parser = size::parse)]
    pub max_body: u64,

    /// Give a request up after this many seconds; 0 never does.
    #[arg(long, value_name = "SECONDS", default_value_t = 0)]
    pub request_timeout: u64,

    /// Give a client up that takes or sends nothing for this many seconds while it should.
    #[arg(long, value_name = "SECONDS", default_value = "30", value_parser = at_least_one)]
    pub client_timeout: usize,

    /// After Ctrl-C, seconds that running requests have to end, and what is kept to be written.
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    pub shutdown_timeout: u64,
}

/// What it remembers of earlier requests.
#[derive(Args, Debug)]
#[command(next_help_heading = "Prefix reuse")]
pub struct PrefixArgs {
    /// Memory for points of earlier conversations, from which a prompt that begins alike goes on; 0
    /// keeps none there [default: an eighth of --memory, less where little is left, 2 GiB at most].
    #[arg(long, value_name = "SIZE", value_parser = size::parse_or_none)]
    pub prefix_memory: Option<u64>,

    /// Keep such a point every so many tokens of a long prompt; 0 keeps none of these.
    #[arg(long, value_name = "TOKENS", default_value_t = 4096)]
    pub prefix_every: usize,

    /// Keep points that make room in memory, and at the end those in memory, in this directory; the
    /// next start goes on from them.
    #[arg(long, value_name = "DIR")]
    pub state_dir: Option<PathBuf>,

    /// Most bytes in the directory; what has not been used for longest is removed.
    #[arg(long, value_name = "SIZE", default_value = "8GiB", value_parser = size::parse, requires = "state_dir")]
    pub state_dir_size: u64,
}

/// How it answers.
#[derive(Args, Debug)]
#[command(next_help_heading = "Answers")]
pub struct AnswerArgs {
    /// Tokens of prompt and answer together [default: 8192, or the model's limit if that is less].
    #[arg(long, value_name = "N", value_parser = at_least_one)]
    pub context: Option<usize>,

    /// Name of the model in answers and in /v1/models [default: the model's own].
    #[arg(long, value_name = "NAME")]
    pub alias: Option<String>,

    /// Use this chat template instead of the model's.
    #[arg(long, value_name = "FILE")]
    pub chat_template: Option<PathBuf>,

    /// End the thinking after this many tokens where a request says nothing about it; 0 never does.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub think_budget: usize,
}

impl ListenArgs {
    /// The key that requests must have, if any.
    ///
    /// # Errors
    /// The file cannot be read; the key is empty.
    pub fn key(&self) -> Result<Option<String>> {
        let key = match (&self.api_key, &self.api_key_file) {
            (Some(key), _) => key.clone(),
            (None, Some(path)) => key_in(path)?,
            (None, None) => return Ok(None),
        };
        if key.is_empty() {
            bail!("the API key is empty; leave the flag out to ask for none");
        }
        Ok(Some(key))
    }
}

/// The key that is the first line of a file.
///
/// # Errors
/// The file cannot be read; the line is empty.
pub fn key_in(path: &Path) -> Result<String> {
    let named = || path.display().to_string();
    let text = std::fs::read_to_string(path).with_context(named)?;
    match text.lines().next().map(str::trim) {
        Some(key) if !key.is_empty() => Ok(key.into()),
        _ => bail!("{}: the API key in its first line is empty", named()),
    }
}

impl LoadArgs {
    /// How long a request may take; `None`: as long as it likes.
    pub fn request_limit(&self) -> Option<Duration> {
        (self.request_timeout > 0).then(|| Duration::from_secs(self.request_timeout))
    }
}
