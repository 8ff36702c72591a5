//! Flags of `run`: the prompt, the choice of tokens, the output.
//!
//! Flags that contradict each other are refused here; sampling settings that are not given come
//! from the model's generation_config.json.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use flash_moe_engine::generation::GenerationConfig;
use flash_moe_engine::sampler::Sampling;

use super::engine::{EngineArgs, HotSetArgs, at_least_one};

/// Shown below the flags.
const EXAMPLES: &str = "\
Examples:
  flash-moe run \"Tell me a story about a robot and a lost kitten.\"
  flash-moe run -m DIR --system \"Answer in French.\" \"Why is the sky blue?\"
  flash-moe run -m DIR --memory 12GiB --context 32768 -f question.txt
  git diff | flash-moe run -m DIR --system \"Write a commit message.\" -
  flash-moe run --raw --greedy --max-tokens 40 \"Once upon a time\"
  flash-moe run -m DIR -f book.txt --save-state book.state
  flash-moe run -m DIR --load-state book.state \"And who is the narrator?\"
  flash-moe run --json --seed 7 \"Hello\" | jq .text

The answer goes to standard output, everything else to standard error. Exit status: 0, or 1 on an
error, 2 on a wrong flag, 130 when stopped by Ctrl-C (once: stop and sum up; twice: at once).";

/// Answer a prompt.
///
/// The prompt is wrapped by the model's chat template; --raw continues the text as it stands.
/// Without --model a small trained model inside this program answers.
#[derive(Args, Debug)]
#[command(after_help = EXAMPLES)]
pub struct RunArgs {
    /// The prompt.
    #[command(flatten)]
    pub prompt: PromptArgs,
    /// Model and machine.
    #[command(flatten)]
    pub engine: EngineArgs,
    /// What is kept for the next run.
    #[command(flatten)]
    pub hot_set: HotSetArgs,
    /// A conversation kept in a file.
    #[command(flatten)]
    pub state: StateArgs,
    /// Thinking and length.
    #[command(flatten)]
    pub length: LengthArgs,
    /// Choice of tokens.
    #[command(flatten)]
    pub sampling: SamplingArgs,
    /// What is printed and written.
    #[command(flatten)]
    pub output: OutputArgs,
}

/// Where the prompt comes from and how it is wrapped.
#[derive(Args, Debug)]
pub struct PromptArgs {
    /// The prompt; `-` reads standard input, which is also read when there is no prompt at all and
    /// it is not a terminal.
    pub prompt: Option<String>,

    /// Read the prompt from a file (`-`: standard input). One newline at its end is dropped, except
    /// with --raw.
    #[arg(long, short, value_name = "FILE", conflicts_with = "prompt")]
    pub file: Option<PathBuf>,

    /// Read the prompt as token ids, separated by commas or white space (`-`: standard input). No
    /// template is applied.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["prompt", "file", "system", "think", "no_think"])]
    pub prompt_tokens: Option<PathBuf>,

    /// Continue the text as it stands, without the chat template.
    #[arg(long, conflicts_with_all = ["system", "think", "no_think"])]
    pub raw: bool,

    /// System prompt.
    #[arg(long, value_name = "TEXT")]
    pub system: Option<String>,
}

/// A conversation kept in a file.
#[derive(Args, Debug)]
pub struct StateArgs {
    /// After the answer, write everything the model remembers of prompt and answer to a file, to go
    /// on from there without reading them again.
    #[arg(long, value_name = "FILE", help_heading = "State")]
    pub save_state: Option<PathBuf>,

    /// Go on from a file of --save-state, made with the same model and settings: the prompt is the
    /// next turn of that conversation; with --raw, text that follows as it stands, and an empty one
    /// goes on with the answer.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["system", "trace"], help_heading = "State")]
    pub load_state: Option<PathBuf>,
}

/// How long the answer may be, and where it stops.
#[derive(Args, Debug)]
pub struct LengthArgs {
    /// Ask the model to think first, where its template has the choice.
    #[arg(long, conflicts_with = "no_think", help_heading = "Length")]
    pub think: bool,

    /// Ask the model not to think, where its template has the choice.
    #[arg(long, help_heading = "Length")]
    pub no_think: bool,

    /// End the thinking after this many tokens; 0 never does.
    #[arg(long, value_name = "N", default_value_t = 2048, help_heading = "Length")]
    pub think_budget: usize,

    /// Tokens to generate at most, thinking included; fewer if the context is full.
    #[arg(long, short = 'n', value_name = "N", default_value = "4096", value_parser = at_least_one)]
    #[arg(help_heading = "Length")]
    pub max_tokens: usize,

    /// Stop before this text; may be given several times. Not looked for in the thinking.
    #[arg(long, value_name = "TEXT", value_parser = not_empty, help_heading = "Length")]
    pub stop: Vec<String>,

    /// Go on past the model's end-of-text tokens.
    #[arg(long, help_heading = "Length")]
    pub ignore_eos: bool,

    /// Tokens of prompt and answer together [default: 8192, or the model's limit if that is less].
    #[arg(long, value_name = "N", value_parser = at_least_one, help_heading = "Length")]
    pub context: Option<usize>,
}

/// How tokens are chosen. What is not given comes from the model's generation_config.json.
#[derive(Args, Clone, PartialEq, Debug)]
#[command(next_help_heading = "Sampling (defaults: the model's generation_config.json)")]
pub struct SamplingArgs {
    /// Always take the most probable token.
    #[arg(long, conflicts_with_all = ["temperature", "top_k", "top_p", "min_p"])]
    pub greedy: bool,

    /// Divides the logits: below 1 is more predictable, above 1 less; 0 is --greedy.
    #[arg(long, short, value_name = "T")]
    pub temperature: Option<f32>,

    /// Choose among the K most probable tokens; 0 is all.
    #[arg(long, value_name = "K")]
    pub top_k: Option<usize>,

    /// Choose among the most probable tokens that together have this probability.
    #[arg(long, value_name = "P")]
    pub top_p: Option<f32>,

    /// Choose among tokens that have this share of the most probable one's probability.
    #[arg(long, value_name = "P")]
    pub min_p: Option<f32>,

    /// Divides the logits of tokens seen in the prompt or the answer; 1 is none.
    #[arg(long, value_name = "R")]
    pub repetition_penalty: Option<f32>,

    /// Lowers the logit of every token that is in the answer.
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    pub presence_penalty: Option<f32>,

    /// Lowers a token's logit for each time it is in the answer.
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    pub frequency_penalty: Option<f32>,

    /// Start of the random sequence: the same seed gives the same answer [default: drawn anew].
    #[arg(long, value_name = "N")]
    pub seed: Option<u64>,
}

/// What is printed and written.
#[derive(Args, Debug)]
#[command(next_help_heading = "Output")]
pub struct OutputArgs {
    /// Print time, bytes and GB/s of each stage, and the memory plan.
    #[arg(long)]
    pub timing: bool,

    /// Print one JSON object instead of the answer: token ids (without the one that ends the text),
    /// text, thinking, finish_reason (stop, length, interrupted), timings, counters, settings.
    #[arg(long)]
    pub json: bool,

    /// Print the answer alone: no progress, no thinking, no summary.
    #[arg(long, short)]
    pub quiet: bool,

    /// Write what every layer computed, as safetensors. Needs --raw or --prompt-tokens.
    #[arg(long, value_name = "FILE")]
    pub trace: Option<PathBuf>,
}

impl SamplingArgs {
    /// No flag given.
    pub fn none() -> Self {
        Self {
            greedy: false,
            temperature: None,
            top_k: None,
            top_p: None,
            min_p: None,
            repetition_penalty: None,
            presence_penalty: None,
            frequency_penalty: None,
            seed: None,
        }
    }

    /// The sampling that these flags and the model's file ask for.
    ///
    /// # Errors
    /// A setting outside its range.
    pub fn resolve(&self, config: &GenerationConfig) -> Result<Sampling> {
        // A model that is greedy by default still has settings for those who ask for sampling.
        let samples = self.temperature.is_some()
            || self.top_k.is_some()
            || self.top_p.is_some()
            || self.min_p.is_some();
        let base = if samples { config.when_sampled()? } else { config.sampling()? };
        let temperature = self.temperature.unwrap_or(base.temperature);
        let sampling = Sampling {
            temperature: if self.greedy { 0.0 } else { temperature },
            top_k: self.top_k.unwrap_or(base.top_k),
            top_p: self.top_p.unwrap_or(base.top_p),
            min_p: self.min_p.unwrap_or(base.min_p),
            repetition_penalty: self.repetition_penalty.unwrap_or(base.repetition_penalty),
            presence_penalty: self.presence_penalty.unwrap_or(base.presence_penalty),
            frequency_penalty: self.frequency_penalty.unwrap_or(base.frequency_penalty),
            logit_bias: Vec::new(),
            seed: self.seed.unwrap_or_else(any_seed),
        };
        sampling.check()?;
        Ok(sampling)
    }
}

impl LengthArgs {
    /// What to tell the template about thinking.
    pub fn thinking(&self) -> Option<bool> {
        match (self.think, self.no_think) {
            (true, _) => Some(true),
            (_, true) => Some(false),
            _ => None,
        }
    }
}

/// A seed that differs from run to run, small enough to be typed again.
fn any_seed() -> u64 {
    use std::hash::{BuildHasher, RandomState};
    RandomState::new().hash_one(()) % 1_000_000
}

fn not_empty(text: &str) -> Result<String, String> {
    if text.is_empty() { Err("expected some text".into()) } else { Ok(text.into()) }
}
