//! Experts in video memory: a bounded number of slots for each layer, filled from the store.
//!
//! The slots of a layer lie in as few buffers as the device's largest allows, and a table says which
//! slot holds which expert. Which expert leaves is decided as in the store. A record is written before
//! the kernels that need it are handed over, so the queue's own order keeps a slot whole.

use std::sync::{Mutex, MutexGuard, PoisonError};

use wgpu::{BindGroup, BindGroupLayout, Buffer, QueueWriteBufferView};

use super::device::Device;
use super::source::Slabs;
use crate::container::RecordLayout;
use crate::error::{Error, Result};
use crate::shape::{ExpertId, LayerId};
use crate::store::slots::{Key, Purpose, SlotId, SlotState, Slots};

/// Buffers of a layer's slots at most.
pub const SLABS_MAX: usize = 4;

/// The slots of one layer.
pub struct LayerSlots {
    /// Table and slabs, as the kernels see them.
    pub group: BindGroup,
    layer: LayerId,
    slabs: Slabs,
    buffers: Vec<Buffer>,
    places: Buffer, // [experts], the slot of each
    slots: Mutex<Slots>,
}

/// Experts that stay in their slots while this lives.
pub struct Claim<'a> {
    slots: &'a LayerSlots,
    pinned: Vec<SlotId>,
    /// Those whose record is still to be written, and where to.
    pub missing: Vec<(ExpertId, SlotId)>,
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        let mut slots = self.slots.lock();
        for slot in &self.pinned {
            // A record that never came leaves its slot empty.
            if matches!(slots.state(*slot), SlotState::Reading(_)) {
                slots.failed(*slot);
            }
            slots.unpin(*slot);
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
    let bytes = layout.record_bytes().next_multiple_of(16);
    let slots_each = (buffer_bytes as usize / bytes).clamp(1, slots.max(1));
    Ok(Slabs {
        layout: layout.clone(),
        slabs: slots.div_ceil(slots_each).clamp(1, SLABS_MAX),
        slots_each,
        slot_words: bytes / 4,
    })
}

/// Slots that a layer can have at most, however much memory there is.
pub fn slots_most(layout: &RecordLayout, experts: usize, buffer_bytes: u64) -> usize {
    let bytes = layout.record_bytes().next_multiple_of(16) as u64;
    experts.min((buffer_bytes / bytes) as usize * SLABS_MAX)
}

impl LayerSlots {
    /// Empty slots.
    ///
    /// # Errors
    /// The device has no memory left.
    pub fn new(
        device: &Device,
        view: &BindGroupLayout,
        layer: LayerId,
        slabs: Slabs,
        (slots, experts): (usize, usize),
    ) -> Result<Self> {
        let places = device.buffer("places of experts", experts as u64 * 4)?;
        let slot_bytes = slabs.slot_words as u64 * 4;
        let counts = (0..slabs.slabs)
            .map(|i| slabs.slots_each.min(slots - i * slabs.slots_each) as u64 * slot_bytes);
        let buffers: Vec<Buffer> =
            counts.map(|bytes| device.buffer("experts", bytes)).collect::<Result<_>>()?;
        let all: Vec<&Buffer> = std::iter::once(&places).chain(&buffers).collect();
        let group = device.group(view, &all)?;
        let slots = Mutex::new(Slots::new(slots, experts));
        Ok(Self { group, layer, slabs, buffers, places, slots })
    }

    /// The layer.
    pub fn layer(&self) -> LayerId {
        self.layer
    }

    fn lock(&self) -> MutexGuard<'_, Slots> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Pins those of the experts that are here, and slots for the others.
    ///
    /// # Panics
    /// More experts than slots.
    pub fn claim(&self, experts: impl Iterator<Item = ExpertId> + Clone) -> Claim<'_> {
        let mut slots = self.lock();
        let mut claim = Claim { slots: self, pinned: Vec::new(), missing: Vec::new() };
        // What is here is pinned before anything is evicted for what is not.
        let here = experts.map(|e| (e, slots.pin(Key(u32::from(e.0)), Purpose::Use)));
        let here: Vec<_> = here.collect();
        for (expert, slot) in here {
            let slot = slot.unwrap_or_else(|| {
                let slot = slots.claim(Key(u32::from(expert.0)), Purpose::Use);
                let slot = slot.expect("a layer has slots for all that is claimed at once");
                claim.missing.push((expert, slot));
                slot
            });
            claim.pinned.push(slot);
        }
        claim
    }

    /// Room for an expert's record on its way to the slot that was claimed for it; it goes there when the
    /// room is dropped.
    ///
    /// # Errors
    /// The device has no memory left.
    pub fn room(
        &self,
        device: &Device,
        (_, slot): (ExpertId, SlotId),
    ) -> Result<QueueWriteBufferView> {
        let index = slot.0 as usize;
        let (slab, within) = (index / self.slabs.slots_each, index % self.slabs.slots_each);
        let at = (within * self.slabs.slot_words * 4) as u64;
        device.room(&self.buffers[slab], at, self.slabs.layout.record_bytes() as u64)
    }

    /// The record is in its slot.
    pub fn landed(&self, device: &Device, (expert, slot): (ExpertId, SlotId)) {
        device.write(&self.places, u64::from(expert.0) * 4, bytemuck::bytes_of(&slot.0));
        self.lock().landed(slot);
    }
}
