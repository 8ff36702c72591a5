//! The command line and the environment: read and resolved here, nothing downstream looks again.
//!
//! One submodule for each group of commands, and one for the environment.

use clap::{Parser, Subcommand};

pub mod bench;
pub mod chat;
pub mod convert;
pub mod engine;
pub mod eval;
pub mod run;
pub mod serve;

pub mod environment;
mod size;

/// Runs Mixture-of-Experts language models larger than the machine's memory.
///
/// The dense weights stay in memory, the experts are read from disk as the router asks for them,
/// through a cache whose size you choose.
#[derive(Parser, Debug)]
#[command(name = "flash-moe", version, about, long_about, max_term_width = 100)]
pub struct Options {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Subcommand, Debug)]
pub enum Command {
    /// Answer a prompt.
    Run(Box<run::RunArgs>),
    /// Talk with a model in the terminal.
    Chat(Box<chat::ChatArgs>),
    /// Answer OpenAI and Anthropic clients over HTTP.
    Serve(Box<serve::ServeArgs>),
    /// Measure perplexity, or the divergence between two containers.
    Eval(Box<eval::EvalArgs>),
    /// Measure speed beside the machine's limits.
    Bench(Box<bench::BenchArgs>),
    /// Estimate what this machine will do with a model.
    Plan(Box<bench::PlanArgs>),
    /// Convert a checkpoint into a container.
    Convert(convert::ConvertArgs),
    /// Check every byte of a container.
    Verify(convert::VerifyArgs),
    /// Describe a container.
    Inspect(convert::InspectArgs),
    /// List the GPUs that --device can name.
    Devices,
    /// Make a container of random weights.
    Synth(convert::SynthArgs),
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Options::command().debug_assert();
    }

    #[test]
    fn contradictions_are_refused() {
        for flags in [
            &["--raw", "--system", "x", "p"][..],
            &["--raw", "--no-think", "p"],
            &["--think", "--no-think", "p"],
            &["--greedy", "--temperature", "1", "p"],
            &["--greedy", "--top-p", "0.5", "p"],
            &["-f", "file", "p"],
            &["--prompt-tokens", "file", "p"],
            &["--prompt-tokens", "file", "--system", "x"],
            &["--memory", "6 potatoes", "p"],
            &["--threads", "0", "p"],
            &["--stop", "", "p"],
            &["--load-state", "file", "--system", "x", "p"],
            &["--load-state", "file", "--trace", "t", "--raw", "p"],
            &["two", "prompts"],
        ] {
            let line = ["flash-moe", "run"].iter().chain(flags);
            assert!(Options::try_parse_from(line).is_err(), "{flags:?}");
        }
    }
}
