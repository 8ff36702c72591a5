//! Flags of `eval`.
//!
//! Only declares them; `eval.rs` says what they mean for the numbers.

use std::path::PathBuf;

use clap::Args;

use super::engine::{EngineArgs, HotSetArgs, at_least_one};

/// Shown below the flags.
const EXAMPLES: &str = "\
Examples:
  flash-moe eval --text novel.txt
  flash-moe eval -m DIR-4bit --against DIR-bf16 --text novel.txt --limit 20000";

/// Measure how well a model predicts a text, alone or against another container.
///
/// Perplexity and bits a byte over windows of --context tokens that do not overlap; a window starts
/// from nothing and its first token is not scored. With --against, the KL divergence from that
/// model to this one, and how often both find the same token most probable.
#[derive(Args, Debug)]
#[command(after_help = EXAMPLES)]
pub struct EvalArgs {
    /// The text to predict.
    #[arg(long, value_name = "FILE")]
    pub text: PathBuf,

    /// The reference: a container with the same vocabulary, the same one to measure what a
    /// --kv-cache costs. Its own keys and values are always kept in f32.
    #[arg(long, value_name = "DIR")]
    pub against: Option<PathBuf>,

    /// Tokens in a window, at least 2 [default: 512, or the model's limit if that is less].
    #[arg(long, value_name = "N", value_parser = at_least_one)]
    pub context: Option<usize>,

    /// Stop after this many tokens of the text.
    #[arg(long, value_name = "N", value_parser = at_least_one)]
    pub limit: Option<usize>,

    /// Print one JSON object.
    #[arg(long)]
    pub json: bool,

    /// Print the result alone, without progress.
    #[arg(long, short)]
    pub quiet: bool,

    /// Model and machine.
    #[command(flatten)]
    pub engine: EngineArgs,

    /// What is kept for the next run.
    #[command(flatten)]
    pub hot_set: HotSetArgs,
}
