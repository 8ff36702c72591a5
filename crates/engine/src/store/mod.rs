//! Experts on disk, in a bounded pool of slots.
//!
//! Deals in (layer, expert) and bytes and never learns what an expert means. [`ExpertStore::fetch`]
//! issues one whole-record read for each expert that is not in the pool, several in flight, and
//! hands records out as they are ready, hits first. An expert that two fetches want is read once. A
//! read that fails is an error of the fetches that wait for it, naming layer, expert, file, offset.

mod choice;
mod fetch;
mod files;
mod queue;
mod readers;
#[cfg_attr(not(target_os = "linux"), path = "no_ring.rs")]
mod ring;
mod slots;

pub mod measure;
pub mod read;

pub use choice::Choice;
pub use fetch::{Fetch, Landed, Record};
pub use files::IoMode;
pub use readers::Reader;

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use crate::container::Container;
use crate::error::{Error, Result};
use crate::memory::Block;
use crate::shape::{ExpertId, LayerId};
use files::LayerFile;
use queue::Job;
use readers::Readers;
use slots::{Key, SlotId, Slots};

pub use slots::{Guesses, Purpose};

/// The bounded pool and its readers.
pub struct ExpertStore {
    inner: Arc<Inner>,
    readers: Readers,
    choice: Choice,
}

struct Inner {
    files: Vec<LayerFile>,
    ordinals: Vec<Option<u16>>, // [layers], position among the layers with experts
    experts: usize,
    pool: Mutex<PoolState>,
    changed: Condvar,
    counters: AtomicCounters,
}

struct PoolState {
    slots: Slots,
    blocks: Vec<Option<Arc<Block>>>, // [slots]; None before first use and while a read owns it
    slot_bytes: usize,
    uses: Vec<u32>,                 // [keys], how often a token used the expert
    failures: HashMap<u32, String>, // by slot, until the last waiter has been told
}

#[derive(Default)]
struct AtomicCounters {
    hits: AtomicU64,
    misses: AtomicU64,
    read_bytes: AtomicU64,
    wait_ns: AtomicU64,
}

/// What the store has done so far.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct StoreCounters {
    /// Records found in the pool (or already being read for somebody else).
    pub hits: u64,
    /// Records that had to be read.
    pub misses: u64,
    /// Bytes read from the layer files.
    pub read_bytes: u64,
    /// Time that compute waited for reads, in nanoseconds.
    pub wait_ns: u64,
}

impl StoreCounters {
    /// What happened since `before`.
    pub fn since(&self, before: &Self) -> Self {
        Self {
            hits: self.hits - before.hits,
            misses: self.misses - before.misses,
            read_bytes: self.read_bytes - before.read_bytes,
            wait_ns: self.wait_ns - before.wait_ns,
        }
    }

    /// Hits over hits and misses; 0 before the first fetch.
    pub fn hit_rate(&self) -> f64 {
        let total = self.hits + self.misses;
        if total == 0 { 0.0 } else { self.hits as f64 / total as f64 }
    }
}

/// How the store is set up.
#[derive(Clone, Copy, Debug)]
pub struct StoreOptions {
    /// Records the pool holds.
    pub slots: usize,
    /// Reads in flight.
    pub readers: usize,
    /// Who makes them.
    pub reader: Reader,
    /// Direct or buffered reads.
    pub io: IoMode,
    /// Memory that stays free beside the process, in bytes: what a page cache may take.
    pub spare_bytes: u64,
}

impl ExpertStore {
    /// Opens the layer files of a container and starts the readers.
    ///
    /// # Errors
    /// A file that cannot be opened; direct reads demanded where the file system has none.
    pub fn open(container: &Container, options: StoreOptions) -> Result<Self> {
        let shape = container.shape();
        let experts = shape.moe.experts;
        let choice = Choice::make(container, options)?;
        let files = files::open_layers(container, choice.direct)?;
        let mut ordinals = vec![None; shape.layers.len()];
        for (ordinal, file) in (0u16..).zip(&files) {
            ordinals[usize::from(file.layer.0)] = Some(ordinal);
        }
        let slots = options.slots.min(files.len() * experts);
        let slot_bytes = files.iter().map(|f| f.read_bytes).max().unwrap_or(0);
        let inner = Arc::new(Inner {
            pool: Mutex::new(PoolState {
                slots: Slots::new(slots, files.len() * experts),
                blocks: (0..slots).map(|_| None).collect(),
                slot_bytes,
                uses: vec![0; files.len() * experts],
                failures: HashMap::new(),
            }),
            files,
            ordinals,
            experts,
            changed: Condvar::new(),
            counters: AtomicCounters::default(),
        });
        let readers = Readers::start(&inner, options.reader, options.readers.clamp(1, 64));
        Ok(Self { inner, readers, choice })
    }

    /// Whether reads bypass the page cache, and why.
    pub fn choice(&self) -> &Choice {
        &self.choice
    }

    /// Who reads: threads where a ring was asked for and the system has none.
    pub fn reader(&self) -> Reader {
        self.readers.reader
    }

    /// Number of slots, and how many are in use.
    pub fn occupancy(&self) -> (usize, usize) {
        let pool = self.inner.lock();
        (pool.slots.count(), pool.slots.used())
    }

    /// Forgets every record that nobody holds, as if the store had just been opened.
    pub fn forget(&self) {
        self.inner.lock().slots.clear();
    }

    /// The counters so far.
    pub fn counters(&self) -> StoreCounters {
        let c = &self.inner.counters;
        StoreCounters {
            hits: c.hits.load(Ordering::Relaxed),
            misses: c.misses.load(Ordering::Relaxed),
            read_bytes: c.read_bytes.load(Ordering::Relaxed),
            wait_ns: c.wait_ns.load(Ordering::Relaxed),
        }
    }

    /// Asks for experts of one layer that a token needs. Reads of those that are not in the pool
    /// start at once, as far as slots are free.
    pub fn fetch(&self, layer: LayerId, experts: &[ExpertId]) -> Fetch<'_> {
        Fetch::start(self, layer, experts.iter().map(|&e| (e, Purpose::Use)))
    }

    /// Asks for experts of one layer for a chunk of a prompt, each with its purpose: [`Purpose::Use`]
    /// for the chunk's hot set, [`Purpose::Scan`] for the others.
    pub fn sweep(
        &self,
        layer: LayerId,
        experts: impl Iterator<Item = (ExpertId, Purpose)>,
    ) -> Fetch<'_> {
        Fetch::start(self, layer, experts)
    }

    /// Brings experts in that may be needed soon, while nobody waits for a read.
    ///
    /// Guesses made earlier that have not been read by now are withdrawn.
    pub fn guess(&self, layer: LayerId, experts: &[ExpertId]) {
        let mut pool = self.inner.lock();
        self.withdraw(&mut pool);
        for &expert in experts {
            let key = self.inner.key(layer, expert);
            if pool.slots.holds(key) {
                continue;
            }
            let Some(slot) = pool.slots.claim(key, Purpose::Guess) else { return };
            let block = pool.take_block(slot);
            self.readers.queue.submit_guess(Job { key, slot, block, fleeting: true });
        }
    }

    /// The experts in the pool with how often each was used, most used first.
    pub fn hot_set(&self) -> Vec<(LayerId, ExpertId, u32)> {
        let pool = self.inner.lock();
        let place = |key: Key| {
            let (file, expert, _) = self.inner.locate(key);
            (file.layer, expert, pool.uses[key.0 as usize])
        };
        let mut hot: Vec<_> = pool.slots.residents().map(place).collect();
        hot.sort_by_key(|&(layer, expert, uses)| (std::cmp::Reverse(uses), layer, expert));
        hot
    }

    /// Brings a saved hot set in while nobody waits for a read, as far as the pool has room.
    ///
    /// Experts that this model does not have are ignored: the list is a hint from a file.
    pub fn preload(&self, experts: impl Iterator<Item = (LayerId, ExpertId)>) {
        let mut pool = self.inner.lock();
        let mut room = pool.slots.count() - pool.slots.used();
        for (layer, expert) in experts {
            let known = matches!(self.inner.ordinals.get(usize::from(layer.0)), Some(Some(_)))
                && usize::from(expert.0) < self.inner.experts;
            if room == 0 {
                return;
            }
            let key = if known { self.inner.key(layer, expert) } else { continue };
            if pool.slots.holds(key) {
                continue;
            }
            let Some(slot) = pool.slots.claim(key, Purpose::Guess) else { return };
            let block = pool.take_block(slot);
            self.readers.queue.submit_guess(Job { key, slot, block, fleeting: false });
            room -= 1;
        }
    }

    /// What became of guesses so far.
    pub fn guesses(&self) -> Guesses {
        self.inner.lock().slots.guesses()
    }

    /// Slots that each layer would have if they were shared evenly.
    pub fn slots_per_layer(&self) -> usize {
        let layers = self.inner.files.len().max(1);
        self.inner.lock().slots.count() / layers
    }

    fn withdraw(&self, pool: &mut PoolState) {
        for job in self.readers.queue.withdraw_guesses() {
            if pool.slots.withdraw(job.slot) {
                pool.blocks[job.slot.0 as usize] = Some(job.block);
            } else {
                self.readers.queue.submit(job);
            }
        }
    }

    /// Pins the expert if it is here; otherwise claims a slot and queues the read.
    ///
    /// `None` when no slot can be had now.
    fn request(&self, pool: &mut PoolState, key: Key, purpose: Purpose) -> Option<SlotId> {
        let counters = &self.inner.counters;
        pool.uses[key.0 as usize] += u32::from(purpose == Purpose::Use);
        if let Some(slot) = pool.slots.pin(key, purpose) {
            counters.hits.fetch_add(1, Ordering::Relaxed);
            if matches!(pool.slots.state(slot), slots::SlotState::Reading(_)) {
                self.readers.queue.promote(slot);
            }
            return Some(slot);
        }
        let slot = pool.slots.claim(key, purpose)?;
        counters.misses.fetch_add(1, Ordering::Relaxed);
        let block = pool.take_block(slot);
        self.readers.queue.submit(Job { key, slot, block, fleeting: false });
        Some(slot)
    }
}

impl PoolState {
    /// The block of a slot, made when the slot is used for the first time.
    fn take_block(&mut self, slot: SlotId) -> Arc<Block> {
        let block = self.blocks[slot.0 as usize].take();
        block.unwrap_or_else(|| Arc::new(Block::zeroed(self.slot_bytes)))
    }
}

impl Inner {
    fn lock(&self) -> MutexGuard<'_, PoolState> {
        self.pool.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn key(&self, layer: LayerId, expert: ExpertId) -> Key {
        let ordinal = self.ordinals[usize::from(layer.0)].expect("a layer with experts");
        let expert = usize::from(expert.0);
        assert!(expert < self.experts, "expert {expert} of {}", self.experts);
        Key((usize::from(ordinal) * self.experts + expert) as u32)
    }

    /// File, expert and byte offset of a key.
    fn locate(&self, key: Key) -> (&LayerFile, ExpertId, u64) {
        let (ordinal, expert) = (key.0 as usize / self.experts, key.0 as usize % self.experts);
        let file = &self.files[ordinal];
        (file, ExpertId(expert as u16), (expert * file.stride_bytes) as u64)
    }

    fn error(&self, key: Key, reason: String) -> Error {
        let (file, expert, offset) = self.locate(key);
        Error::Record { layer: file.layer, expert, path: file.path.clone(), offset, reason }
    }

    /// Puts a finished read's block back and wakes whoever waits for it.
    fn finish(&self, job: Job, outcome: std::io::Result<()>) {
        if outcome.is_ok() {
            let bytes = self.locate(job.key).0.read_bytes as u64;
            self.counters.read_bytes.fetch_add(bytes, Ordering::Relaxed);
        }
        let mut pool = self.lock();
        pool.blocks[job.slot.0 as usize] = Some(job.block);
        match outcome {
            Ok(()) => pool.slots.landed(job.slot),
            Err(e) => {
                pool.slots.failed(job.slot);
                pool.failures.insert(job.slot.0, describe(&e));
            }
        }
        drop(pool);
        self.changed.notify_all();
    }
}

fn describe(error: &std::io::Error) -> String {
    match error.kind() {
        std::io::ErrorKind::UnexpectedEof => "the file ends inside the record (truncated)".into(),
        _ => format!("read failed: {error}"),
    }
}
