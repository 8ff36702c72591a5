//! The `flash-moe` program: parses the command line, runs one command, prints its error.
//!
//! All the work is in the commands' own modules and in the engine. Nothing but this file prints an
//! error, and it prints it once, with its causes, as `flash-moe: ...`; the exit status is then 1.

#![forbid(unsafe_code)]

mod options;

mod hot_set;
mod say;
mod state_file;
mod tiny;

mod chat;
mod eval;
mod run;
mod serve;

mod read_ahead;

mod bench;
mod plan;

mod convert;
mod devices;
mod inspect;
mod synth;
mod verify;
mod video;

use std::io::{self, Write};
use std::process::ExitCode;

use clap::Parser;

use chat::line::harmless_lines;
use options::Command;

fn main() -> ExitCode {
    let success = |()| ExitCode::SUCCESS;
    let outcome = match options::Options::parse().command {
        Command::Run(args) => run::run(&args),
        Command::Chat(args) => chat::run(*args),
        Command::Serve(args) => serve::run(&args),
        Command::Eval(args) => eval::run(&args).map(success),
        Command::Bench(args) => bench::run(&args).map(success),
        Command::Plan(args) => plan::run(&args).map(success),
        Command::Convert(args) => convert::run(&args).map(success),
        Command::Verify(args) => verify::run(&args).map(success),
        Command::Inspect(args) => inspect::run(&args).map(success),
        Command::Devices => devices::run().map(success),
        Command::Synth(args) => synth::run(&args).map(success),
    };
    match outcome {
        Ok(code) => code,
        Err(error) if is_closed_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            // Where nobody can be told, the status says it.
            writeln!(io::stderr(), "flash-moe: {}", with_causes(&error)).unwrap_or(());
            ExitCode::FAILURE
        }
    }
}

/// The error and its causes in one line, without a cause that the message before it already ends in.
/// A server, a file or a model may have chosen the words: the terminal does not obey them.
fn with_causes(error: &anyhow::Error) -> String {
    let mut line = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if line.is_empty() {
            line = cause;
        } else if !line.ends_with(&cause) {
            line = format!("{line}: {cause}");
        }
    }
    harmless_lines(&line)
}

/// Whether the reader of our output went away, as `head` does: that is its right, not our error.
fn is_closed_pipe(error: &anyhow::Error) -> bool {
    let io = error.chain().find_map(|cause| cause.downcast_ref::<std::io::Error>());
    io.is_some_and(|io| io.kind() == std::io::ErrorKind::BrokenPipe)
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::anyhow;

    #[test]
    fn a_cause_is_told_once() {
        let error = anyhow!("no space left").context("a.bin: no space left").context("convert");
        assert_eq!(with_causes(&error), "convert: a.bin: no space left");
    }

    #[test]
    fn the_words_of_an_error_are_not_obeyed() {
        let error = anyhow!("\x1b]52;c;AAAA\x07").context("one\ntwo");
        assert_eq!(with_causes(&error), "one\ntwo: \u{241b}]52;c;AAAA\u{2407}");
    }

    #[test]
    fn a_closed_pipe_is_found_below_its_context() {
        let closed = std::io::Error::from(std::io::ErrorKind::BrokenPipe);
        assert!(is_closed_pipe(&anyhow::Error::from(closed).context("answer")));
        assert!(!is_closed_pipe(&anyhow!("other")));
    }
}
