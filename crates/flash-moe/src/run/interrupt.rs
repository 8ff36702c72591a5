//! Ctrl-C: the first asks for a clean end, the second ends at once.
//!
//! A clean end is after the token or the prompt chunk that is being computed. Nothing is half done
//! then, so the summary still holds.

use std::process;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result};

/// Exit status of a program that was stopped by Ctrl-C.
pub const EXIT_STATUS: u8 = 130;

/// Whether Ctrl-C was pressed.
#[derive(Clone, Debug, Default)]
pub struct Interrupt {
    pressed: Arc<AtomicBool>,
}

impl Interrupt {
    /// Takes over Ctrl-C from here on. Once in a process.
    ///
    /// # Errors
    /// The system refuses the handler.
    pub fn install() -> Result<Self> {
        let interrupt = Self::default();
        let pressed = Arc::clone(&interrupt.pressed);
        ctrlc::set_handler(move || {
            if pressed.swap(true, Ordering::SeqCst) {
                process::exit(EXIT_STATUS.into());
            }
        })
        .context("cannot listen for Ctrl-C")?;
        Ok(interrupt)
    }

    /// Whether it was pressed at least once.
    pub fn is_pressed(&self) -> bool {
        self.pressed.load(Ordering::SeqCst)
    }
}
