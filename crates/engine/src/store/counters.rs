//! What the store has done, in counts and bytes.
//!
//! A byte is read because a token asked for it, because lookahead guessed it, or because an earlier
//! run used it, and is counted as what it was when its read began. So `misses` records make up
//! [`StoreCounters::demanded_bytes`] exactly, whatever is read ahead.

use std::sync::atomic::{AtomicU64, Ordering};

use super::slots::Purpose;

/// What the store has done so far.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct StoreCounters {
    /// Records found in the pool (or already being read for somebody else).
    pub hits: u64,
    /// Records that had to be read.
    pub misses: u64,
    /// Bytes read from the layer files, for whatever reason.
    pub read_bytes: u64,
    /// Time that compute waited for reads, in nanoseconds.
    pub wait_ns: u64,
    /// What lookahead read.
    pub guessed: Ahead,
    /// What was read of a saved hot set.
    pub preloaded: Ahead,
}

/// What was read before anybody asked for it.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct Ahead {
    /// Records read.
    pub reads: u64,
    /// Bytes read.
    pub read_bytes: u64,
    /// Records that were asked for afterwards.
    pub useful: u64,
    /// Bytes of those.
    pub useful_bytes: u64,
}

impl Ahead {
    /// Records that nobody has asked for.
    pub fn wasted(&self) -> u64 {
        // A record may be asked for while its read is under way.
        self.reads.saturating_sub(self.useful)
    }

    /// Bytes of those.
    pub fn wasted_bytes(&self) -> u64 {
        self.read_bytes.saturating_sub(self.useful_bytes)
    }

    /// What happened since `before`.
    pub fn since(&self, before: &Self) -> Self {
        Self {
            reads: self.reads - before.reads,
            read_bytes: self.read_bytes - before.read_bytes,
            useful: self.useful - before.useful,
            useful_bytes: self.useful_bytes - before.useful_bytes,
        }
    }
}

impl StoreCounters {
    /// What happened since `before`.
    pub fn since(&self, before: &Self) -> Self {
        Self {
            hits: self.hits - before.hits,
            misses: self.misses - before.misses,
            read_bytes: self.read_bytes - before.read_bytes,
            wait_ns: self.wait_ns - before.wait_ns,
            guessed: self.guessed.since(&before.guessed),
            preloaded: self.preloaded.since(&before.preloaded),
        }
    }

    /// Bytes read because a token asked for them.
    pub fn demanded_bytes(&self) -> u64 {
        self.read_bytes - self.guessed.read_bytes - self.preloaded.read_bytes
    }

    /// Hits over hits and misses; 0 before the first fetch.
    pub fn hit_rate(&self) -> f64 {
        let total = self.hits + self.misses;
        if total == 0 { 0.0 } else { self.hits as f64 / total as f64 }
    }
}

/// The counters as several threads count them.
#[derive(Default)]
pub(super) struct AtomicCounters {
    hits: AtomicU64,
    misses: AtomicU64,
    demanded_bytes: AtomicU64,
    wait_ns: AtomicU64,
    guessed: AtomicAhead,
    preloaded: AtomicAhead,
}

#[derive(Default)]
struct AtomicAhead {
    reads: AtomicU64,
    read_bytes: AtomicU64,
    useful: AtomicU64,
    useful_bytes: AtomicU64,
}

impl AtomicAhead {
    fn load(&self) -> Ahead {
        Ahead {
            reads: self.reads.load(Ordering::Relaxed),
            read_bytes: self.read_bytes.load(Ordering::Relaxed),
            useful: self.useful.load(Ordering::Relaxed),
            useful_bytes: self.useful_bytes.load(Ordering::Relaxed),
        }
    }
}

impl AtomicCounters {
    pub fn load(&self) -> StoreCounters {
        let (guessed, preloaded) = (self.guessed.load(), self.preloaded.load());
        let demanded_bytes = self.demanded_bytes.load(Ordering::Relaxed);
        StoreCounters {
            hits: self.hits.load(Ordering::Relaxed),
            misses: self.misses.load(Ordering::Relaxed),
            read_bytes: demanded_bytes + guessed.read_bytes + preloaded.read_bytes,
            wait_ns: self.wait_ns.load(Ordering::Relaxed),
            guessed,
            preloaded,
        }
    }

    /// A record of `bytes` was asked for that is here, or on its way, because of `brought`.
    pub fn hit(&self, brought: Purpose, bytes: usize) {
        self.hits.fetch_add(1, Ordering::Relaxed);
        if let Some(ahead) = self.ahead(brought) {
            ahead.useful.fetch_add(1, Ordering::Relaxed);
            ahead.useful_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
        }
    }

    /// A record was asked for whose read had not begun.
    pub fn miss(&self) {
        self.misses.fetch_add(1, Ordering::Relaxed);
    }

    /// A record of `bytes` was read.
    pub fn read(&self, purpose: Purpose, bytes: usize) {
        let counter = match self.ahead(purpose) {
            Some(ahead) => {
                ahead.reads.fetch_add(1, Ordering::Relaxed);
                &ahead.read_bytes
            }
            None => &self.demanded_bytes,
        };
        counter.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// Compute waited for reads.
    pub fn waited(&self, ns: u64) {
        self.wait_ns.fetch_add(ns, Ordering::Relaxed);
    }

    fn ahead(&self, purpose: Purpose) -> Option<&AtomicAhead> {
        match purpose {
            Purpose::Use | Purpose::Scan => None,
            Purpose::Guess => Some(&self.guessed),
            Purpose::Preload => Some(&self.preloaded),
        }
    }
}
