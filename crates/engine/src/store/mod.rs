//! Experts on disk, in a bounded pool of slots.
//!
//! Deals in (layer, expert) and bytes and never learns what an expert means. [`ExpertStore::fetch`]
//! issues one whole-record read for each expert that is not in the pool, several in flight, and
//! hands records out as they are ready, hits first. An expert that two fetches want is read once. A
//! read that fails is an error of the fetches that wait for it, naming layer, expert, file, offset.

mod choice;
mod counters;
mod fetch;
mod files;
mod queue;
mod readers;
#[cfg_attr(not(target_os = "linux"), path = "no_ring.rs")]
mod ring;
pub(crate) mod slots;

pub mod measure;
pub mod read;

pub use choice::Choice;
pub use counters::{Ahead, StoreCounters};
pub use fetch::{Fetch, Landed, Record};
pub use files::IoMode;
pub use readers::Reader;

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};

use crate::container::Container;
use crate::error::{Error, Result};
use crate::memory::Block;
use crate::shape::{ExpertId, LayerId};
use counters::AtomicCounters;
use fetch::Want;
use files::LayerFile;
use queue::{GUESSES_RUNNING_MAX, Job, Place};
use readers::Readers;
use slots::{Key, SlotId, SlotState, Slots};

pub use slots::Purpose;

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
    preloads: VecDeque<Key>,        // of a saved hot set, not yet queued
    preloading: usize,              // of a saved hot set, queued or being read
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
                preloads: VecDeque::new(),
                preloading: 0,
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
        let mut pool = self.inner.lock();
        pool.preloads.clear();
        pool.slots.clear();
    }

    /// The counters so far.
    pub fn counters(&self) -> StoreCounters {
        // Reads are counted under the lock, so that records and bytes agree.
        let _pool = self.inner.lock();
        self.inner.counters.load()
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

    /// Asks for experts of one layer, each read whole into a block that is lent for it: the pool neither takes
    /// nor keeps them. Those that the pool has or is reading come from there, and their block is given up. An
    /// expert that is asked for both ways at once is read twice.
    ///
    /// A block that is shorter than a record makes its read an error.
    pub fn fetch_into(
        &self,
        layer: LayerId,
        experts: impl Iterator<Item = (ExpertId, Block)>,
        purpose: Purpose,
    ) -> Fetch<'_> {
        let pool = &mut *self.inner.lock();
        let want = |(expert, block): (ExpertId, Block)| {
            let key = self.inner.key(layer, expert);
            if pool.slots.holds(key) {
                return Want::Unasked(key, purpose);
            }
            if block.bytes().len() < self.inner.locate(key).0.read_bytes {
                let refusal = String::from("the block is shorter than the record");
                return Want::Lent(key, Arc::new(OnceLock::from(Err(refusal))));
            }
            pool.count(key, purpose);
            self.inner.counters.miss();
            let lent = Arc::new(OnceLock::new());
            let place = Place::Lent(Arc::clone(&lent));
            self.readers.queue.submit(Job { key, place, block: Arc::new(block), purpose });
            Want::Lent(key, lent)
        };
        let wants = experts.map(want).collect();
        Fetch::of(self, wants, pool)
    }

    /// Whether records can be read into such blocks, tried with one of the first layer's. Direct reads want
    /// blocks at the start of a page, and memory that the system lets a disk write to. With a ring they can
    /// not: where one fails, the system may still write to what it was given.
    pub fn reads_into(&self, block: Block) -> bool {
        let Some(file) = self.inner.files.first().filter(|_| self.reader() == Reader::Threads)
        else {
            return false;
        };
        let mut fetch =
            self.fetch_into(file.layer, [(ExpertId(0), block)].into_iter(), Purpose::Scan);
        fetch.next_in_order().is_ok_and(|record| record.is_some_and(|record| record.is_lent()))
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
            let job = Job { key, place: Place::Slot(slot), block, purpose: Purpose::Guess };
            self.readers.queue.submit_guess(job);
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

    /// How often each expert was used, by layer with experts.
    pub fn uses(&self) -> Vec<(LayerId, Vec<u32>)> {
        let pool = self.inner.lock();
        let layers = self.inner.files.iter().zip(pool.uses.chunks(self.inner.experts.max(1)));
        layers.map(|(file, uses)| (file.layer, uses.to_vec())).collect()
    }

    /// Brings a saved hot set in, in its order, while nobody waits for a read and as far as slots
    /// are empty: it never takes a slot from what is in the pool.
    ///
    /// Half of the saved uses count on, so that old habits fade. Experts that this model does not
    /// have are ignored: the list is a hint from a file.
    pub fn preload(&self, experts: impl IntoIterator<Item = (LayerId, ExpertId, u32)>) {
        let mut pool = self.inner.lock();
        let mut room = pool.slots.count() - pool.slots.used();
        for (layer, expert, uses) in experts {
            let known = matches!(self.inner.ordinals.get(usize::from(layer.0)), Some(Some(_)))
                && usize::from(expert.0) < self.inner.experts;
            if room == 0 {
                break;
            }
            let key = if known { self.inner.key(layer, expert) } else { continue };
            let count = &mut pool.uses[key.0 as usize];
            *count = count.saturating_add(uses / 2);
            pool.preloads.push_back(key);
            room -= 1;
        }
        while let Some(job) = pool.next_preload() {
            self.readers.queue.submit_guess(job);
        }
    }

    /// Records that the pool holds at most.
    pub fn slots(&self) -> usize {
        self.inner.lock().slots.count()
    }

    /// Slots that each layer would have if they were shared evenly.
    pub fn slots_per_layer(&self) -> usize {
        let layers = self.inner.files.len().max(1);
        self.inner.lock().slots.count() / layers
    }

    fn withdraw(&self, pool: &mut PoolState) {
        for job in self.readers.queue.withdraw_guesses() {
            match job.place {
                Place::Slot(slot) if pool.slots.withdraw(slot) => {
                    pool.blocks[slot.0 as usize] = Some(job.block);
                }
                _ => self.readers.queue.submit(job),
            }
        }
    }

    /// Pins the expert if it is here; otherwise claims a slot and queues the read.
    ///
    /// `None` when no slot can be had now.
    fn request(&self, pool: &mut PoolState, key: Key, purpose: Purpose) -> Option<SlotId> {
        let counters = &self.inner.counters;
        pool.count(key, purpose);
        let brought = pool.slots.brought(key);
        if let Some(slot) = pool.slots.pin(key, purpose) {
            let reading = matches!(pool.slots.state(slot), SlotState::Reading(_));
            // A guess whose read had not begun saves nothing: its bytes are the token's.
            if reading && self.readers.queue.promote(slot, purpose) {
                pool.preloading -= usize::from(brought == Purpose::Preload);
                counters.miss();
            } else {
                counters.hit(brought, self.inner.locate(key).0.read_bytes);
            }
            return Some(slot);
        }
        let slot = pool.slots.claim(key, purpose)?;
        counters.miss();
        let block = pool.take_block(slot);
        self.readers.queue.submit(Job { key, place: Place::Slot(slot), block, purpose });
        Some(slot)
    }
}

impl PoolState {
    /// An expert was asked for.
    fn count(&mut self, key: Key, purpose: Purpose) {
        let uses = &mut self.uses[key.0 as usize];
        *uses = uses.saturating_add(u32::from(purpose == Purpose::Use));
    }

    /// The block of a slot, made when the slot is used for the first time.
    fn take_block(&mut self, slot: SlotId) -> Arc<Block> {
        let block = self.blocks[slot.0 as usize].take();
        block.unwrap_or_else(|| Arc::new(Block::zeroed(self.slot_bytes)))
    }

    /// The next read of a saved hot set; none while as many are under way as may be, and no more
    /// once no slot is empty.
    fn next_preload(&mut self) -> Option<Job> {
        if self.preloading == GUESSES_RUNNING_MAX {
            return None;
        }
        let key = loop {
            let key = self.preloads.pop_front()?;
            if !self.slots.holds(key) {
                break key;
            }
        };
        let Some(slot) = self.slots.claim_empty(key, Purpose::Preload) else {
            self.preloads.clear();
            return None;
        };
        let block = self.take_block(slot);
        self.preloading += 1;
        Some(Job { key, place: Place::Slot(slot), block, purpose: Purpose::Preload })
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

    /// Puts a finished read's block back, wakes whoever waits for it, and gives what to read next
    /// when nobody waits for a read.
    #[must_use]
    fn finish(&self, job: Job, outcome: std::io::Result<()>) -> Option<Job> {
        let mut pool = self.lock();
        pool.preloading -= usize::from(job.purpose == Purpose::Preload);
        if outcome.is_ok() {
            self.counters.read(job.purpose, self.locate(job.key).0.read_bytes);
        }
        let outcome = outcome.map_err(|e| describe(&e));
        match job.place {
            Place::Slot(slot) => {
                pool.blocks[slot.0 as usize] = Some(job.block);
                match outcome {
                    Ok(()) => pool.slots.landed(slot),
                    Err(reason) => {
                        pool.slots.failed(slot);
                        pool.failures.insert(slot.0, reason);
                        pool.preloads.clear();
                    }
                }
            }
            Place::Lent(lent) => {
                let set = lent.set(outcome.map(|()| job.block));
                debug_assert!(set.is_ok(), "a read ends once");
            }
        }
        let next = pool.next_preload();
        drop(pool);
        self.changed.notify_all();
        next
    }
}

fn describe(error: &std::io::Error) -> String {
    match error.kind() {
        std::io::ErrorKind::UnexpectedEof => "the file ends inside the record (truncated)".into(),
        _ => format!("read failed: {error}"),
    }
}
