//! What reports say of records that were read before anybody asked for them.
//!
//! The same six numbers for lookahead and for a saved hot set, in `run` and in `bench`. Useful is
//! what was asked for later, wasted what was not asked for so far; both are counted when they
//! happen, so a part of a run may use what an earlier part read.

use flash_moe_engine::store::Ahead;
use serde::Serialize;

/// Records read ahead.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct ReadAhead {
    /// Records read.
    pub reads: u64,
    /// Bytes read.
    pub read_bytes: u64,
    /// Records asked for after their read had begun.
    pub useful: u64,
    /// Bytes of those.
    pub useful_bytes: u64,
    /// Records that nobody asked for.
    pub wasted: u64,
    /// Bytes of those.
    pub wasted_bytes: u64,
}

impl From<Ahead> for ReadAhead {
    fn from(a: Ahead) -> Self {
        Self {
            reads: a.reads,
            read_bytes: a.read_bytes,
            useful: a.useful,
            useful_bytes: a.useful_bytes,
            wasted: a.wasted(),
            wasted_bytes: a.wasted_bytes(),
        }
    }
}
