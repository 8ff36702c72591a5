//! One layer's experts on their way from the pool or the disk to the kernels.
//!
//! A fetch pins what it has asked for and gives up each pin when the record is dropped. It blocks
//! for a slot only while it holds none itself, so several fetches can never wait for each other. What is read
//! into lent blocks takes no slot; dropped, a fetch waits for such reads to end.

use std::ops::Deref;
use std::sync::{Arc, MutexGuard, OnceLock, PoisonError};
use std::time::Instant;

use super::slots::{Key, Purpose, SlotId, SlotState};
use super::{ExpertStore, PoolState};
use smallvec::SmallVec;

use crate::error::Result;
use crate::memory::Block;
use crate::shape::{ExpertId, LayerId};

/// An expert's record, pinned in the pool until dropped, or in a block that was lent for it.
pub struct Record<'s> {
    store: &'s ExpertStore,
    slot: Option<SlotId>, // none of a lent block
    block: Option<Arc<Block>>,
}

impl Record<'_> {
    /// Whether it is in the block that was lent for it.
    pub fn is_lent(&self) -> bool {
        self.slot.is_none()
    }
}

impl Deref for Record<'_> {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.block.as_ref().expect("a record holds its block until it is dropped").bytes()
    }
}

impl Drop for Record<'_> {
    fn drop(&mut self) {
        // The share of the block goes first: a slot without pins may be handed to a reader.
        self.block = None;
        let Some(slot) = self.slot else { return };
        self.store.inner.lock().slots.unpin(slot);
        self.store.inner.changed.notify_all();
    }
}

pub(super) enum Want {
    /// No slot yet.
    Unasked(Key, Purpose),
    /// Pinned; ready or being read.
    Pinned(Key, SlotId),
    /// Read, or being read, into a lent block.
    Lent(Key, Arc<OnceLock<Result<Arc<Block>, String>>>),
    /// Handed out.
    Done,
}

/// Records that are ready, each with its position in the list asked for.
pub type Landed<'s> = SmallVec<[(usize, Record<'s>); INLINE]>;

/// Experts asked for with [`ExpertStore::fetch`].
pub struct Fetch<'s> {
    store: &'s ExpertStore,
    wants: SmallVec<[Want; INLINE]>,
    /// First want that has not been handed out.
    first: usize,
}

impl<'s> Fetch<'s> {
    pub(super) fn start(
        store: &'s ExpertStore,
        layer: LayerId,
        experts: impl Iterator<Item = (ExpertId, Purpose)>,
    ) -> Self {
        let inner = &store.inner;
        let wants = experts.map(|(e, purpose)| Want::Unasked(inner.key(layer, e), purpose));
        let wants = wants.collect();
        Self::of(store, wants, &mut inner.lock())
    }

    pub(super) fn of(
        store: &'s ExpertStore,
        wants: SmallVec<[Want; INLINE]>,
        pool: &mut PoolState,
    ) -> Self {
        let mut fetch = Self { store, wants, first: 0 };
        fetch.ask(pool);
        fetch
    }

    /// Every record that is ready now, with its position in the list asked for; waits for at least
    /// one. Nothing is left when `ready` comes back empty.
    ///
    /// # Errors
    /// The first read among them that failed.
    pub fn ready(&mut self, ready: &mut Landed<'s>) -> Result<()> {
        ready.clear();
        let store = self.store;
        let mut pool = store.inner.lock();
        while self.first < self.wants.len() {
            self.ask(&mut pool);
            for index in self.first..self.wants.len() {
                if let Some(record) = self.take(&mut pool, index)? {
                    ready.push((index, record));
                }
            }
            if !ready.is_empty() {
                break;
            }
            pool = self.wait(pool);
        }
        Ok(())
    }

    /// The next record in the order asked for, waiting for it; `None` after the last.
    ///
    /// # Errors
    /// Its read failed.
    pub fn next_in_order(&mut self) -> Result<Option<Record<'s>>> {
        let store = self.store;
        let mut pool = store.inner.lock();
        if self.first == self.wants.len() {
            return Ok(None);
        }
        loop {
            self.ask(&mut pool);
            if let Some(record) = self.take(&mut pool, self.first)? {
                return Ok(Some(record));
            }
            pool = self.wait(pool);
        }
    }

    /// The next record in the order asked for if it is ready now.
    ///
    /// # Errors
    /// Its read failed.
    pub fn next_if_ready(&mut self) -> Result<Option<Record<'s>>> {
        let mut pool = self.store.inner.lock();
        if self.first == self.wants.len() {
            return Ok(None);
        }
        self.ask(&mut pool);
        self.take(&mut pool, self.first)
    }

    /// Asks for as many wants, in order, as slots can be had.
    fn ask(&mut self, pool: &mut PoolState) {
        // A list longer than the pool is read a window at a time: half of the slots at most, so
        // that a long prompt does not hold what another fetch needs.
        let window = (pool.slots.count() / 2).max(1);
        let end = self.wants.len().min(self.first + window.max(MIN_WINDOW));
        for want in &mut self.wants[self.first..end] {
            if let Want::Unasked(key, purpose) = *want {
                match self.store.request(pool, key, purpose) {
                    Some(slot) => *want = Want::Pinned(key, slot),
                    None => return,
                }
            }
        }
    }

    fn take(&mut self, pool: &mut PoolState, index: usize) -> Result<Option<Record<'s>>> {
        let failed = |key: Key, reason: Option<&String>| {
            let reason = reason.cloned();
            self.store.inner.error(key, reason.unwrap_or_else(|| "read failed".into()))
        };
        let (slot, block) = match &self.wants[index] {
            Want::Pinned(key, slot) => match pool.slots.state(*slot) {
                SlotState::Ready(_) => (Some(*slot), pool.blocks[slot.0 as usize].clone()),
                SlotState::Failed(_) => return Err(failed(*key, pool.failures.get(&slot.0))),
                _ => return Ok(None),
            },
            Want::Lent(key, outcome) => match outcome.get() {
                Some(Ok(block)) => (None, Some(Arc::clone(block))),
                Some(Err(reason)) => return Err(failed(*key, Some(reason))),
                None => return Ok(None),
            },
            Want::Unasked(..) | Want::Done => return Ok(None),
        };
        self.wants[index] = Want::Done;
        while matches!(self.wants.get(self.first), Some(Want::Done)) {
            self.first += 1;
        }
        Ok(Some(Record { store: self.store, slot, block }))
    }

    fn wait<'p>(&self, pool: MutexGuard<'p, PoolState>) -> MutexGuard<'p, PoolState> {
        let started = Instant::now();
        let pool = self.store.inner.changed.wait(pool).unwrap_or_else(PoisonError::into_inner);
        let waited = started.elapsed().as_nanos() as u64;
        self.store.inner.counters.waited(waited);
        pool
    }
}

/// Wants that need no allocation: more than any published model chooses for a token.
pub(super) const INLINE: usize = 16;
/// Wants asked for at once even in a tiny pool, as far as slots are free.
const MIN_WINDOW: usize = 16;

impl Drop for Fetch<'_> {
    fn drop(&mut self) {
        let mut pool = self.store.inner.lock();
        for want in &self.wants {
            match want {
                Want::Pinned(_, slot) => pool.slots.unpin(*slot),
                // Its memory is the lender's again only now.
                Want::Lent(_, outcome) => {
                    while outcome.get().is_none() {
                        pool = self.wait(pool);
                    }
                }
                Want::Unasked(..) | Want::Done => {}
            }
        }
        drop(pool);
        self.store.inner.changed.notify_all();
    }
}
