//! Flags of the commands that make and examine containers: convert, verify, synth, inspect.
//!
//! Only declares them; what a combination of flags means for a given checkpoint is decided where
//! the checkpoint is known.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use clap::Args;

/// How many bits a weight gets.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Bits {
    /// MLX affine with this many bits.
    Affine(u8),
    /// As stored: bf16 (f16 and f32 keep their own type).
    Bf16,
}

impl FromStr for Bits {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "bf16" => Ok(Self::Bf16),
            "2" | "3" | "4" | "5" | "6" | "8" => {
                text.parse().map(Self::Affine).map_err(|_| format!("bad number {text}"))
            }
            _ => Err("expected 2, 3, 4, 5, 6, 8 or bf16".into()),
        }
    }
}

impl fmt::Display for Bits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Affine(bits) => bits.fmt(f),
            Self::Bf16 => f.write_str("bf16"),
        }
    }
}

/// Convert a checkpoint into a container that flash-moe can stream.
///
/// SRC is a directory of safetensors with its config.json and tokenizer.json: a Hugging Face
/// checkpoint of Qwen3.5-MoE, Qwen3-Next or Qwen3-MoE (BF16, F16, F32 or FP8), or its MLX
/// conversion (plain or quantised). What is already quantised in the MLX way is carried over byte
/// for byte, never requantised. The command can be stopped at any moment; the same command finishes
/// the rest.
#[derive(Args, Debug)]
pub struct ConvertArgs {
    /// Directory of the checkpoint.
    #[arg(required_unless_present = "adopt")]
    pub src: Option<PathBuf>,

    /// Directory to write; made if absent, otherwise empty or an unfinished conversion.
    #[arg(required_unless_present = "adopt")]
    pub dst: Option<PathBuf>,

    /// Take over a directory of the original engine in place: packed_experts/ (or
    /// packed_experts_2bit/), model_weights.bin, model_weights.json and the tokenizer files. The
    /// expert files stay where they are; only the dense weights are written anew beside them.
    #[arg(long, value_name = "DIR", conflicts_with_all = ["src", "dst", "dense_bits", "group"])]
    pub adopt: Option<PathBuf>,

    /// Bits of the routed experts: 2, 3, 4, 5, 6, 8 or bf16 [default: 4, or what a quantised
    /// checkpoint has]. With --adopt: 2 takes packed_experts_2bit/ where both are present.
    #[arg(long)]
    pub bits: Option<Bits>,

    /// Bits of everything else [default: 4, or what a quantised checkpoint has]. The routers and
    /// the shared experts' gates get 8 bits, or bf16 when this is bf16.
    #[arg(long, value_name = "BITS")]
    pub dense_bits: Option<Bits>,

    /// Columns that share a scale: 32, 64 or 128 [default: 64].
    #[arg(long, value_parser = group)]
    pub group: Option<u16>,

    /// Name to record in the container [default: the source directory's name].
    #[arg(long)]
    pub name: Option<String>,

    /// Threads [default: one a core]. The result does not depend on it.
    #[arg(long)]
    pub threads: Option<usize>,

    /// Print only errors.
    #[arg(long, short)]
    pub quiet: bool,
}

/// Check every byte of a container against its checksums.
///
/// Names the layer, expert and part (or the tensor) of everything that differs, up to 20 of them,
/// and exits with status 1 if anything does.
#[derive(Args, Debug)]
pub struct VerifyArgs {
    /// Directory of the container.
    pub dir: PathBuf,

    /// Threads [default: one a core].
    #[arg(long)]
    pub threads: Option<usize>,

    /// Print only errors.
    #[arg(long, short)]
    pub quiet: bool,
}

/// Make a container of a real model's dimensions with random weights, for benchmarks.
///
/// Every tensor has its true shape and precision and every number is finite, so the reads and the
/// arithmetic cost what the real model's cost. Two things differ: the text is noise, and the
/// routing is near uniform (a trained router prefers some experts), which is the worst case for a
/// cache of experts.
#[derive(Args, Debug)]
pub struct SynthArgs {
    /// The model whose dimensions to take.
    #[arg(long, value_name = "MODEL", value_parser = ["qwen3.5-35b-a3b", "qwen3.5-122b-a10b", "qwen3.5-397b-a17b"])]
    pub like: String,

    /// Directory to write; made if absent, otherwise empty or an unfinished run of this command.
    pub dst: PathBuf,

    /// Make only the first N layers [default: all].
    #[arg(long, value_name = "N")]
    pub layers: Option<usize>,

    /// Bits of the routed experts: 2, 3, 4, 5, 6, 8 or bf16.
    #[arg(long, default_value = "4")]
    pub bits: Bits,

    /// Bits of everything else; routers and shared gates get 8, or bf16 when this is bf16.
    #[arg(long, value_name = "BITS", default_value = "4")]
    pub dense_bits: Bits,

    /// Seed of the random weights; the same seed gives the same bytes.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,

    /// Threads [default: one a core]. The result does not depend on it.
    #[arg(long)]
    pub threads: Option<usize>,

    /// Print only errors.
    #[arg(long, short)]
    pub quiet: bool,
}

/// Describe a container: shape, precision and size of each group of tensors, memory it needs.
#[derive(Args, Debug)]
pub struct InspectArgs {
    /// Directory of the container.
    pub dir: PathBuf,

    /// Print one JSON object.
    #[arg(long)]
    pub json: bool,
}

fn group(text: &str) -> Result<u16, String> {
    match text {
        "32" => Ok(32),
        "64" => Ok(64),
        "128" => Ok(128),
        _ => Err("expected 32, 64 or 128".into()),
    }
}
