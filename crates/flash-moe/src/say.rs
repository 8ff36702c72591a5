//! What a command has to say, on standard output and on standard error.
//!
//! Standard output that takes no more is an error like any other, since what was asked for is then not
//! there; a reader that has gone away ends the program quietly. Where standard error takes no more there
//! is nobody left to tell, and the work goes on. The standard library's macros panic in both cases.

use std::io::{self, Write};

use anyhow::{Context, Result};

/// A line on standard output.
///
/// # Errors
/// It takes no more.
pub fn line(text: &str) -> Result<()> {
    writeln!(io::stdout(), "{text}").context("standard output")
}

/// Lines on standard output, each with its end.
///
/// # Errors
/// It takes no more.
pub fn text(text: &str) -> Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).context("standard output")
}

/// A line on standard error.
macro_rules! tell {
    ($($text:tt)*) => {{
        use std::io::Write as _;
        writeln!(std::io::stderr(), $($text)*).unwrap_or(())
    }};
}
pub(crate) use tell;
