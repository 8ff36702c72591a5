//! Where the system has no rings of reads: none can be opened.
//!
//! Stands in for `ring` on every system but Linux, so that nothing else asks which system it is on.
//! The types have no values, and what takes one is never called.

use std::io;

use super::Inner;
use super::queue::Queue;

/// A ring that cannot be.
pub enum Ring {}

/// Its bell.
pub enum Bell {}

impl Bell {
    /// Never called.
    pub fn ring(&self) {
        match *self {}
    }
}

/// Refuses.
pub fn open(_inner: &Inner, _depth: usize) -> io::Result<(Ring, Bell)> {
    Err(io::ErrorKind::Unsupported.into())
}

/// Never called.
pub fn serve(ring: Ring, _queue: &Queue, _inner: &Inner) {
    match ring {}
}
