//! Experts in video memory: a bounded number of slots for each layer, filled from the store.
//!
//! The slots of a layer lie in as few buffers as the device's largest allows, and a table says which
//! slot holds which expert, and of an expert without one that it has none. Which expert leaves is decided as
//! in the store. A record and the table are written by commands in front of the kernels that need them, so
//! the queue's own order keeps a slot whole and the device's table is the one here, as of its last command.
//! Slots that this program sees are written by itself instead, or by the disk, once no kernel reads them any
//! more.

use std::sync::{Mutex, MutexGuard, PoisonError};

use wgpu::{BindGroup, Buffer, BufferBinding, SubmissionIndex};

use super::clock::Way;
use super::device::Device;
use super::kernels::Views;
use super::source::Slabs;
use super::window::{self, Window};
use crate::container::RecordLayout;
use crate::error::{Error, Result};
use crate::memory::{Block, PAGE_BYTES};
use crate::pool::Pool;
use crate::shape::{ExpertId, LayerId};
use crate::store::Record;
use crate::store::slots::{Key, Purpose, SlotId, SlotState, Slots};

/// Buffers of a layer's slots at most.
pub const SLABS_MAX: usize = 4;
/// Buffers that a kernel is given at most: the scratch, a table, slabs and one more buffer, the latter two
/// as vectors and as words.
pub const BUFFERS_MAX: u32 = 4 + 2 * SLABS_MAX as u32;
/// No slot, and no expert.
const NOWHERE: u32 = u32::MAX;

/// The slots of one layer.
pub struct LayerSlots {
    /// Table and slabs, as the kernels see them.
    pub group: BindGroup,
    layer: LayerId,
    slabs: Slabs,
    memory: Vec<Slab>,
    places: Buffer, // [experts], the slot of each
    table: Mutex<Table>,
}

/// Slots side by side.
struct Slab {
    buffer: Buffer,
    /// Where this program sees it.
    window: Option<Window>,
    /// Where the first slot begins.
    first: usize,
}

struct Table {
    slots: Slots,
    places: Vec<u32>, // [experts], the slot of each
    held: Vec<u32>,   // [slots], the expert of each
    used: Vec<u64>,   // [experts], the last token that chose it, counted from 1
    tokens: u64,
    read: Vec<(SubmissionIndex, Vec<SlotId>)>, // what was submitted since the last choice reads slots
}

/// An expert of a token's choice that has no slot.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Missing {
    /// Its rank in the choice.
    pub rank: usize,
    /// The expert.
    pub expert: ExpertId,
    /// Whether it was chosen so short a while ago that as many slots, had it got one, would hold it still.
    pub is_back: bool,
}

impl Table {
    /// Pins a slot for an expert that is not here; what it held is here no more.
    fn make_room(&mut self, expert: ExpertId) -> Option<SlotId> {
        let slot = self.slots.claim(Key(u32::from(expert.0)), Purpose::Use)?;
        let held = std::mem::replace(&mut self.held[slot.0 as usize], NOWHERE);
        if held != NOWHERE {
            self.places[held as usize] = NOWHERE;
        }
        Some(slot)
    }

    fn landed(&mut self, (expert, slot): (ExpertId, SlotId)) {
        self.slots.landed(slot);
        self.held[slot.0 as usize] = u32::from(expert.0);
        self.places[usize::from(expert.0)] = slot.0;
    }
}

/// Experts that stay in their slots while this lives.
pub struct Claim<'a> {
    device: &'a Device,
    slots: &'a LayerSlots,
    pinned: Vec<SlotId>,
    /// Those whose record is still to be brought, and where to.
    pub missing: Vec<(ExpertId, SlotId)>,
}

impl Claim<'_> {
    /// Its slots.
    pub fn pinned(&self) -> impl Iterator<Item = SlotId> {
        self.pinned.iter().copied()
    }
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        let mut table = self.slots.lock();
        let mut failed = false;
        for slot in &self.pinned {
            // A record that never came leaves its slot empty.
            if matches!(table.slots.state(*slot), SlotState::Reading(_)) {
                table.slots.failed(*slot);
                failed = true;
            }
            table.slots.unpin(*slot);
        }
        if failed {
            // What had the slot before is not to be found there.
            self.device.write(&self.slots.places, 0, bytemuck::cast_slice(&table.places));
        }
    }
}

/// How the slots of a layer are cut into buffers.
///
/// # Errors
/// Records that do not lie as the kernels read them.
pub fn slabs(layout: &RecordLayout, slots: usize, buffer_bytes: u64) -> Result<Slabs> {
    let matrices = [&layout.gate, &layout.up, &layout.down];
    let aligned = matrices.iter().all(|m| m.offsets[0].is_multiple_of(16));
    if !aligned || matrices.iter().any(|m| !m.cols.is_multiple_of(32)) {
        return Err(Error::Gpu(format!(
            "experts of {} by {}: the GPU's kernels take multiples of 32; --device cpu takes any",
            layout.gate.rows, layout.gate.cols
        )));
    }
    let bytes = slot_bytes(layout);
    let slots_each = (slab_bytes(buffer_bytes) / bytes).clamp(1, slots.max(1));
    Ok(Slabs {
        layout: layout.clone(),
        slabs: slots.div_ceil(slots_each).clamp(1, SLABS_MAX),
        slots_each,
        slot_words: bytes / 4,
    })
}

/// Bytes of a slot: what is read of a file is whole pages, and goes to the start of one.
pub fn slot_bytes(layout: &RecordLayout) -> usize {
    layout.padded_bytes()
}

/// Bytes of a slab's slots, where the first may begin at a page.
fn slab_bytes(buffer_bytes: u64) -> usize {
    (buffer_bytes as usize).saturating_sub(PAGE_BYTES)
}

/// Slots that a layer can have at most, however much memory there is.
pub fn slots_most(layout: &RecordLayout, experts: usize, buffer_bytes: u64) -> usize {
    experts.min(slab_bytes(buffer_bytes) / slot_bytes(layout) * SLABS_MAX)
}

impl Slab {
    /// Slots of so many bytes together, which this program sees if they are `direct`.
    fn new(device: &Device, bytes: usize, direct: bool) -> Result<Self> {
        if !direct {
            let buffer = device.buffer("experts", bytes as u64)?;
            return Ok(Self { buffer, window: None, first: 0 });
        }
        let window = device.window("experts", (bytes + PAGE_BYTES) as u64)?;
        // Records that have to be copied may lie anywhere.
        let first = Some(window.bytes_to_page());
        let first = first.filter(|first| first.is_multiple_of(device.part_alignment()));
        let first = first.unwrap_or(0);
        Ok(Self { buffer: window.buffer().clone(), window: Some(window), first })
    }

    /// Its slots, as kernels see them.
    fn slots(&self) -> BufferBinding<'_> {
        BufferBinding { offset: self.first as u64, ..self.buffer.as_entire_buffer_binding() }
    }
}

impl LayerSlots {
    /// Empty slots, which this program writes itself if they are `direct`.
    ///
    /// # Errors
    /// The device has no memory left.
    pub fn new(
        (device, views): (&Device, &Views),
        layer: LayerId,
        slabs: Slabs,
        (slots, experts): (usize, usize),
        direct: bool,
    ) -> Result<Self> {
        let places = device.buffer("places of experts", experts as u64 * 4)?;
        let counts = (0..slabs.slabs).map(|i| slabs.slots_each.min(slots - i * slabs.slots_each));
        let make = |count: usize| Slab::new(device, count * slabs.slot_words * 4, direct);
        let memory: Vec<Slab> = counts.map(make).collect::<Result<_>>()?;
        let parts: Vec<BufferBinding> = memory.iter().map(Slab::slots).collect();
        let group = views.slots_group(device, &places, &parts)?;
        let (places_now, held) = (vec![NOWHERE; experts], vec![NOWHERE; slots]);
        device.write(&places, 0, bytemuck::cast_slice(&places_now));
        let table = Table {
            slots: Slots::new(slots, experts),
            places: places_now,
            held,
            used: vec![0; experts],
            tokens: 0,
            read: Vec::new(),
        };
        Ok(Self { group, layer, slabs, memory, places, table: Mutex::new(table) })
    }

    /// The layer.
    pub fn layer(&self) -> LayerId {
        self.layer
    }

    /// Layout of its records.
    pub fn layout(&self) -> &RecordLayout {
        &self.slabs.layout
    }

    /// Bytes of a record.
    pub fn record_bytes(&self) -> usize {
        self.slabs.layout.record_bytes()
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Empties the slots.
    pub fn forget(&self, device: &Device) {
        let table = &mut *self.lock();
        table.slots.clear();
        table.places.fill(NOWHERE);
        table.held.fill(NOWHERE);
        table.used.fill(0);
        device.write(&self.places, 0, bytemuck::cast_slice(&table.places));
    }

    /// Whether an expert is here.
    pub fn holds(&self, expert: ExpertId) -> bool {
        self.lock().places[usize::from(expert.0)] != NOWHERE
    }

    /// What is missing of a token's choice, in its order.
    pub fn missing(&self, chosen: &[ExpertId]) -> Vec<Missing> {
        let table = &mut *self.lock();
        table.tokens += 1;
        // Slots that hold what was used last hold at least so many tokens' choices.
        let held_tokens = (table.held.len() / chosen.len().max(1)) as u64;
        let mut missing = Vec::new();
        for (rank, expert) in chosen.iter().enumerate() {
            let index = usize::from(expert.0);
            let used = std::mem::replace(&mut table.used[index], table.tokens);
            if table.places[index] == NOWHERE {
                let is_back = used > 0 && table.tokens - used <= held_tokens;
                missing.push(Missing { rank, expert: *expert, is_back });
            }
        }
        missing
    }

    /// Pins those of the experts that are here, and slots for the others.
    ///
    /// # Panics
    /// More experts than slots.
    pub fn claim<'a>(
        &'a self,
        device: &'a Device,
        experts: impl Iterator<Item = ExpertId>,
    ) -> Claim<'a> {
        let mut table = self.lock();
        let mut claim = Claim { device, slots: self, pinned: Vec::new(), missing: Vec::new() };
        // What is here is pinned before anything is evicted for what is not.
        let here = experts.map(|e| (e, table.slots.pin(Key(u32::from(e.0)), Purpose::Use)));
        let here: Vec<_> = here.collect();
        for (expert, slot) in here {
            let slot = slot.unwrap_or_else(|| {
                let slot = table.make_room(expert);
                let slot = slot.expect("a layer has slots for all that is claimed at once");
                claim.missing.push((expert, slot));
                slot
            });
            claim.pinned.push(slot);
        }
        claim
    }

    /// The way of a record to the slot that was claimed for it.
    pub fn way(&self, (_, slot): (ExpertId, SlotId)) -> Way<'_> {
        let (slab, to) = self.place(slot);
        Way { bytes: self.record_bytes() as u64, buffer: &slab.buffer, to: to as u64 }
    }

    /// Slab of a slot, and where in it.
    fn place(&self, slot: SlotId) -> (&Slab, usize) {
        let index = slot.0 as usize;
        let (slab, within) = (index / self.slabs.slots_each, index % self.slabs.slots_each);
        let slab = &self.memory[slab];
        (slab, slab.first + within * self.slabs.slot_words * 4)
    }

    /// Whether [`LayerSlots::write`] brings records here, and [`LayerSlots::lend`] lends slots.
    pub fn is_direct(&self) -> bool {
        self.memory.iter().all(|slab| slab.window.is_some())
    }

    /// Whether every slot begins at a page, as this program sees it.
    pub fn begin_at_pages(&self) -> bool {
        let begins = |slab: &Slab| {
            slab.window.as_ref().is_some_and(|window| window.bytes_to_page() == slab.first)
        };
        self.memory.iter().all(begins)
    }

    /// A choice of this layer has come back: all that was submitted before it is over.
    pub fn nothing_reads(&self) {
        self.lock().read.clear();
    }

    /// Kernels of a submission read these slots.
    pub fn read_by(&self, submission: &SubmissionIndex, slots: impl Iterator<Item = SlotId>) {
        if self.is_direct() {
            self.lock().read.push((submission.clone(), slots.collect()));
        }
    }

    /// Waits until nothing reads the slots that were claimed for these experts.
    ///
    /// A claimed slot is nobody else's until its record has landed. What was submitted before the layer's last
    /// choice is over; since then `read_by` was told of all that may read a slot, but for the chosen experts of
    /// a token, which its claim pins.
    fn free(&self, device: &Device, places: &[(ExpertId, SlotId)]) -> Result<()> {
        let is_read = |read: &(SubmissionIndex, Vec<SlotId>)| {
            places.iter().any(|(_, slot)| read.1.contains(slot))
        };
        let mut table = self.lock();
        let waited = table.read.iter().rposition(is_read).map_or(0, |last| last + 1);
        let last = table.read.drain(..waited).next_back();
        drop(table);
        match last {
            Some((submission, _)) => device.wait_for(Some(submission)),
            None => Ok(()),
        }
    }

    /// Writes records to the slots that were claimed for them, when nothing reads those any more. What is
    /// submitted from here on finds them.
    ///
    /// # Errors
    /// The device failed.
    pub fn write(
        &self,
        device: &Device,
        pool: &Pool,
        records: &[(&Record, (ExpertId, SlotId))],
    ) -> Result<()> {
        let places: Vec<_> = records.iter().map(|(_, place)| *place).collect();
        let lent = self.lend(device, &places)?;
        let bytes = records.iter().map(|(record, _)| &record[..self.record_bytes()]);
        window::write(pool, &mut lent.into_iter().zip(bytes).collect::<Vec<_>>());
        Ok(())
    }

    /// The slots that were claimed for these experts, to be filled, when nothing reads them any more.
    ///
    /// # Errors
    /// The device failed.
    ///
    /// # Panics
    /// This program does not see them.
    pub fn lend(&self, device: &Device, places: &[(ExpertId, SlotId)]) -> Result<Vec<Block>> {
        self.free(device, places)?;
        let block = |(_, slot): &(ExpertId, SlotId)| {
            let (slab, at) = self.place(*slot);
            let window = slab.window.as_ref().expect("slots that this program sees");
            window.lend(at..at + self.slabs.slot_words * 4)
        };
        Ok(places.iter().map(block).collect())
    }

    /// The commands that bring these records are written; gives the table as it is behind them, and where
    /// the device has it.
    pub fn landed(&self, places: &[(ExpertId, SlotId)]) -> (Vec<u32>, &Buffer) {
        let mut table = self.lock();
        places.iter().for_each(|place| table.landed(*place));
        (table.places.clone(), &self.places)
    }
}
