//! The command line: every flag is declared and resolved here, nothing downstream reads the
//! environment.
//!
//! One submodule for each group of commands.

pub mod convert;

use clap::{Parser, Subcommand};

/// Runs Mixture-of-Experts language models larger than the machine's memory.
#[derive(Parser, Debug)]
#[command(name = "flash-moe", version, about)]
pub struct Options {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Subcommand, Debug)]
pub enum Command {
    /// Convert a checkpoint into a container.
    Convert(convert::ConvertArgs),
    /// Check every byte of a container.
    Verify(convert::VerifyArgs),
    /// Make a container of random weights.
    Synth(convert::SynthArgs),
    /// Describe a container.
    Inspect(convert::InspectArgs),
}
