//! What the rest of the engine says to a GPU and hears of it, in builds with one and without.
//!
//! Plain data: options, the plan of the video memory, a token on its way in and its logits on theirs
//! out. Nothing here touches a device.

use std::fmt;

use crate::budget::{Line, gib};
use crate::compute::Compute;
use crate::store::ExpertStore;

/// What to do where there is nothing to list.
pub const NO_ADAPTER: &str = "no GPU: neither a Vulkan loader with a driver (on Debian libvulkan1 and \
    the card's own driver or mesa-vulkan-drivers), nor Metal, nor Direct3D 12; --device cpu needs none";

/// What a user decides about the GPU.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct GpuOptions {
    /// Adapter by its place in [`adapters`]; without one the first that is no software.
    pub adapter: Option<usize>,
    /// Bytes of video memory to use in all; without it nine tenths of what the adapter has.
    pub memory_bytes: Option<u64>,
    /// Whether the device's clock times every stage, which costs a few hundredths of the speed.
    pub timed: bool,
}

/// The plan of a model's video memory.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct VideoBudget {
    /// The adapter, for people.
    pub adapter: String,
    /// Bytes that may be used in all.
    pub limit: u64,
    /// Everything but the slots.
    pub fixed: Vec<Line>,
    /// Bytes of a slot in every layer that has experts.
    pub slot_bytes: u64,
    /// Slots of each layer.
    pub slots_each: usize,
    /// Experts of each layer.
    pub experts: usize,
    /// Whether all experts have a slot.
    pub resident: bool,
    /// Largest buffer that a kernel can be given, in bytes.
    pub buffer_bytes: u64,
}

impl VideoBudget {
    /// Everything but the slots.
    pub fn fixed_bytes(&self) -> u64 {
        self.fixed.iter().map(|l| l.bytes).sum()
    }

    /// All bytes of the plan.
    pub fn total(&self) -> u64 {
        self.fixed_bytes() + self.slots_each as u64 * self.slot_bytes
    }
}

impl fmt::Display for VideoBudget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for line in &self.fixed {
            writeln!(f, "  {:<34}{:>12}", line.name, gib(line.bytes))?;
        }
        let slots = format!("experts, {} of {} a layer", self.slots_each, self.experts);
        writeln!(f, "  {slots:<34}{:>12}", gib(self.slots_each as u64 * self.slot_bytes))?;
        write!(f, "  {:<34}{:>12}  (limit {})", "total", gib(self.total()), gib(self.limit))
    }
}

/// What was done to feed the device, since it was opened.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct GpuCounters {
    /// Records brought to video memory.
    pub uploads: u64,
    /// Their bytes.
    pub upload_bytes: u64,
    /// How often a ring had nothing free and the oldest upload was waited for.
    pub waits: u64,
    /// Submissions.
    pub submissions: u64,
    /// Buffers that the driver was asked for.
    pub buffers: u64,
}

impl GpuCounters {
    /// What happened since `before`.
    pub fn since(&self, before: &Self) -> Self {
        Self {
            uploads: self.uploads - before.uploads,
            upload_bytes: self.upload_bytes - before.upload_bytes,
            waits: self.waits - before.waits,
            submissions: self.submissions - before.submissions,
            buffers: self.buffers - before.buffers,
        }
    }
}

/// What a device is fed from.
#[derive(Clone, Copy)]
pub struct Host<'a> {
    /// Records in memory and on disk.
    pub store: &'a ExpertStore,
    /// The processor's threads and kernels.
    pub compute: &'a Compute,
}

/// What the kernels of a token are told.
pub struct Token<'a> {
    /// Its embedding, `[hidden]`.
    pub h: &'a [f32],
    /// Cosines of its rotation, `[rotary_dims / 2]`.
    pub cos: &'a [f32],
    /// Sines.
    pub sin: &'a [f32],
    /// Its position.
    pub position: usize,
}

/// Whether logits are wanted.
pub enum Logits<'a> {
    /// No: more of the prompt follows.
    No,
    /// Into this, `[vocab]`.
    Into(&'a mut [f32]),
}

/// Hears what was computed: its name, the layer if it is of one, the values (ids as bits).
pub type Watch<'a> = &'a mut dyn FnMut(&'static str, Option<usize>, &[f32]);

/// A chunk's input.
pub struct ChunkInput<'a> {
    /// Embeddings, `[tokens][hidden]`.
    pub h: &'a [f32],
    /// Cosines of their rotations, `[tokens][rotary_dims / 2]`.
    pub cos: &'a [f32],
    /// Sines.
    pub sin: &'a [f32],
    /// Position of the first.
    pub position: usize,
}
