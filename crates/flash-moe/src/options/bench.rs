//! Flags of the commands that measure: bench and plan.
//!
//! Only declares them; which frontiers fit into a model's context is decided where the model is
//! known.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use super::convert::Bits;
use super::engine::{EngineArgs, at_least_one};

const BENCH_EXAMPLES: &str = "Examples:
  flash-moe bench -m DIR --memory 6GiB
  flash-moe bench -m DIR --context-at 512,2048 --decode 64 --repeat 3 --csv bench.csv
  flash-moe bench -m DIR --kv-cache tq2 --context-state synthetic --context-at 1024,65536,131000
  flash-moe bench -m DIR --json --quick | jq '.runs[] | select(.phase == \"decode\")'

The tables are explained in docs/bench.md. Nothing is timed before the model's answer was checked:
a model whose prompt and token-by-token passes disagree gets no number and exit status 1.";

const PLAN_EXAMPLES: &str = "Examples:
  flash-moe plan -m DIR --memory 16GiB
  flash-moe plan --like qwen3.5-397b-a17b --memory 24GiB --scratch /data

Every figure is an estimate from the model's dimensions and this machine's measured limits.";

/// Measure tokens a second beside the limits of this machine.
///
/// Prompts are random token ids from a fixed seed and decode takes the likeliest token, so two runs
/// do the same work. `cold` runs start with an empty cache of experts, `warm` ones with what the run
/// before left in it. The memory, the arithmetic and the disk of this machine are measured in the
/// same run, and each stage is shown as a fraction of the limit that binds it.
#[derive(Args, Debug)]
#[command(after_help = BENCH_EXAMPLES)]
pub struct BenchArgs {
    /// Model and machine.
    #[command(flatten)]
    pub engine: EngineArgs,

    /// Tokens of context [default: what the frontiers need, within the model's own limit].
    #[arg(long, value_name = "N", value_parser = at_least_one)]
    pub context: Option<usize>,

    /// Positions at which decode is measured; those above the context are skipped with a note
    /// [default: 512,2048,8192].
    #[arg(long, value_name = "LIST", value_delimiter = ',', value_parser = at_least_one)]
    pub context_at: Vec<usize>,

    /// How the context before those positions comes about. With synthetic contexts no prompt is
    /// timed but those of --prefill.
    #[arg(long, value_enum, default_value_t = ContextState::Read)]
    pub context_state: ContextState,

    /// Tokens decoded at each position, once cold and once warm.
    #[arg(long, value_name = "N", default_value = "32", value_parser = at_least_one)]
    pub decode: usize,

    /// Lengths of prompts measured from position 0, each once cold and once warm [default: 512].
    #[arg(long, value_name = "LIST", value_delimiter = ',', value_parser = at_least_one)]
    pub prefill: Vec<usize>,

    /// What the pool of experts holds when a run begins.
    #[arg(long, value_enum, default_value_t = Pools::Both)]
    pub pool: Pools,

    /// Times that everything is repeated; the table shows the median by speed.
    #[arg(long, value_name = "N", default_value = "1", value_parser = at_least_one)]
    pub repeat: usize,

    /// Seed of the prompt's token ids.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,

    /// Write every stage of every run as a line of this file.
    #[arg(long, value_name = "FILE")]
    pub csv: Option<PathBuf>,

    /// Print one JSON object instead of tables.
    #[arg(long)]
    pub json: bool,

    /// Measure the machine for tenths of seconds instead of seconds.
    #[arg(long)]
    pub quick: bool,

    /// Print no progress.
    #[arg(long, short)]
    pub quiet: bool,
}

/// Values of `--context-state`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum ContextState {
    /// A prompt is read up to each position.
    Read,
    /// The KV cache is filled with random keys and values in place of most of it: as costly to
    /// attend to as a real context, reached in seconds, and without any meaning.
    Synthetic,
}

/// Values of `--pool`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum Pools {
    /// Every run once from an empty pool and once with what the run before left.
    Both,
    /// Nothing: it is emptied before every run.
    Cold,
    /// What the runs before left; it is never emptied, so a model that fits stays in memory. Prompts
    /// are read once before they are timed.
    Warm,
}

/// Say what this machine will do with a model, before it is loaded or even downloaded.
#[derive(Args, Debug)]
#[command(after_help = PLAN_EXAMPLES)]
pub struct PlanArgs {
    /// Model and machine.
    #[command(flatten)]
    pub engine: EngineArgs,

    /// Take the dimensions of a published model instead of a container.
    #[arg(long, value_name = "MODEL", conflicts_with = "model", value_parser = ["qwen3.5-35b-a3b", "qwen3.5-122b-a10b", "qwen3.5-397b-a17b"])]
    pub like: Option<String>,

    /// With --like: bits of the routed experts: 2, 3, 4, 5, 6, 8 or bf16.
    #[arg(long, default_value = "4", requires = "like")]
    pub bits: Bits,

    /// With --like: bits of everything else.
    #[arg(long, value_name = "BITS", default_value = "4", requires = "like")]
    pub dense_bits: Bits,

    /// Tokens of context [default: 8192, or the model's limit].
    #[arg(long, value_name = "N", value_parser = at_least_one)]
    pub context: Option<usize>,

    /// Length of the prompt whose prefill is estimated.
    #[arg(long, value_name = "N", default_value = "512", value_parser = at_least_one)]
    pub prompt: usize,

    /// With --like: a directory of the disk that will hold the model. A file is written there, read
    /// and removed.
    #[arg(long, value_name = "DIR", default_value = ".", requires = "like")]
    pub scratch: PathBuf,

    /// Measure the machine for tenths of seconds instead of seconds.
    #[arg(long)]
    pub quick: bool,

    /// Print one JSON object.
    #[arg(long)]
    pub json: bool,
}
