//! The `flash-moe` program: parses the command line, runs one command, prints its error.
//!
//! All the work is in the commands' own modules and in the engine.

#![forbid(unsafe_code)]

mod options;

mod convert;
mod inspect;
mod synth;
mod verify;

use std::process::ExitCode;

use clap::Parser;

use options::Command;

fn main() -> ExitCode {
    let outcome = match options::Options::parse().command {
        Command::Convert(args) => convert::run(&args),
        Command::Verify(args) => verify::run(&args),
        Command::Synth(args) => synth::run(&args),
        Command::Inspect(args) => inspect::run(&args),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("flash-moe: {error:#}");
            ExitCode::FAILURE
        }
    }
}
