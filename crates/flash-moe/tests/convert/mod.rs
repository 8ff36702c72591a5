//! The commands that make and examine containers, on the oracle's tiny checkpoints.
//!
//! Everything runs the built program. What it writes is compared with the checkpoint's own bytes or
//! with arithmetic done here, never with what the code under test says of itself.

mod tensors;

mod carry;
mod quantise;

mod refuse;
mod resume;

mod adopt;
mod verify;

use std::path::PathBuf;

use crate::fixture::write_checkpoint;
use crate::program::{Home, text};

/// A scratch home with one checkpoint in `source`.
struct Case {
    home: Home,
}

impl Case {
    fn new(variant: &str) -> Self {
        let home = Home::new();
        write_checkpoint(variant, &home.path("source"));
        Self { home }
    }

    fn source(&self) -> PathBuf {
        self.home.path("source")
    }

    /// Converts `source` into a directory of the home.
    fn convert(&self, to: &str, flags: &[&str]) -> PathBuf {
        let dst = self.home.path(to);
        let (source, destination) = (text(&self.source()), text(&dst));
        self.home.succeed(&[&["convert", &source, &destination], flags].concat());
        dst
    }

    /// Converts `source`, which must be refused without a container being made.
    fn refuse(&self, flags: &[&str]) -> String {
        let dst = self.home.path("refused");
        let (source, destination) = (text(&self.source()), text(&dst));
        let said = self.home.refuse(&[&["convert", &source, &destination], flags].concat());
        assert!(!dst.join("flash-moe.json").exists(), "a container in spite of: {said}");
        said
    }
}
