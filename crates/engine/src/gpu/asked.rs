//! What the rest of the engine says to a GPU and hears of it, in builds with one and without.
//!
//! Plain data: options, the plan of the video memory, a token on its way in and its logits on theirs
//! out. Nothing here touches a device.

use std::fmt;
use std::path::PathBuf;

use crate::budget::{Line, gib};
use crate::compute::Compute;
use crate::container::{Container, Precision, RecordLayout};
use crate::engine::Options;
use crate::shape::Shape;
use crate::store::ExpertStore;
use crate::weights::Weights;

/// What to do where there is nothing to list.
pub const NO_ADAPTER: &str = "no GPU: neither a Vulkan loader with a driver (on Debian libvulkan1 and \
    the card's own driver or mesa-vulkan-drivers), nor Metal, nor Direct3D 12; --device cpu needs none";

/// Bytes of records on their way to a device, as far as their number allows.
const UPLOADS_BYTES: u64 = 64 << 20;
/// Records on their way, at least and at most.
const UPLOADS: [u64; 2] = [4, 32];

/// Records of so many bytes that have memory on their way to a device.
pub fn upload_records(record_bytes: u64) -> u64 {
    UPLOADS_BYTES.checked_div(record_bytes).map_or(0, |count| count.clamp(UPLOADS[0], UPLOADS[1]))
}

/// Bytes of that memory.
pub fn uploads_bytes(record_bytes: u64) -> u64 {
    upload_records(record_bytes) * record_bytes
}

/// What a user decides about the GPU.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct GpuOptions {
    /// Adapter by its place in [`adapters`]; without one the first that is no software.
    pub adapter: Option<usize>,
    /// Bytes of video memory to use in all; without it nine tenths of what the adapter has.
    pub memory_bytes: Option<u64>,
    /// Where compiled kernels are kept from one run to the next; without it they are compiled anew.
    pub kernels_dir: Option<PathBuf>,
    /// Whether the device's clock times every stage, which takes most of a fast decode's speed.
    pub timed: bool,
    /// Whether a prompt's products take f32 factors as they are, where tensor cores would take each as two
    /// halves: 2^-20 of a product apart at most.
    pub plain: bool,
    /// Whether records pass through memory for uploads although this program could write their slots.
    pub staged: bool,
    /// Who computes an expert that is in memory and not in video memory.
    pub misses: Misses,
}

/// What is done about an expert that a token needs and video memory does not have.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Misses {
    /// As the rates say that are measured once, when the model opens.
    #[default]
    Auto,
    /// It is uploaded.
    Upload,
    /// The processor computes it.
    Cpu,
}

impl Misses {
    /// Its name, as the flag has it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Upload => "upload",
            Self::Cpu => "cpu",
        }
    }
}

/// Speed of what a missing expert can take, in bytes of records a second.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct MissRates {
    /// Copied into memory that the device copies from.
    pub stage: f64,
    /// From there to video memory; `None` where the first way ends there.
    pub upload: Option<f64>,
    /// Computed by the processor.
    pub compute: f64,
}

/// Parts into which a layer's missing experts are shared out.
pub const SHARES: usize = 8;

impl MissRates {
    /// Of each rate the higher.
    pub fn or_faster(self, other: Self) -> Self {
        Self {
            stage: self.stage.max(other.stage),
            upload: self.upload.zip(other.upload).map(|(one, other)| one.max(other)),
            compute: self.compute.max(other.compute),
        }
    }

    /// The part of a layer's missing experts, in eighths, that the processor computes so that all are
    /// done soonest.
    ///
    /// Staging comes first and keeps the processor busy, then upload and computing go on side by side.
    /// With a part c of one byte computed that takes (1 - c) / stage + max((1 - c) / upload, c / compute):
    /// least where the two meet, unless computing is quicker than staging already. Where staging is all, the
    /// processor has either to do with every byte, and the quicker one gets all.
    pub fn computed_eighths(&self) -> usize {
        if self.compute >= self.stage {
            return SHARES;
        }
        let Some(upload) = self.upload else { return 0 };
        let part = self.compute / (self.compute + upload);
        (part * SHARES as f64).round() as usize
    }
}

/// What a model takes as it is stored.
#[derive(Clone, Copy)]
pub struct Stored<'a> {
    /// Its shape.
    pub shape: &'a Shape,
    /// Of each layer with experts.
    pub records: &'a [RecordLayout],
    /// Dense weights.
    pub dense_bytes: u64,
}

impl<'a> Stored<'a> {
    /// That of a container.
    pub fn of(container: &'a Container) -> Self {
        Self {
            shape: container.shape(),
            records: container.layouts(),
            dense_bytes: Weights::stored_bytes(container),
        }
    }
}

/// What is done about missing experts, and why.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct MissPlan {
    /// What was asked for.
    pub misses: Misses,
    /// Eighths of a layer's missing experts that the processor computes.
    pub computed_eighths: usize,
    /// What was measured, where it was.
    pub rates: Option<MissRates>,
}

impl MissPlan {
    /// Of so many missing experts those that the processor computes.
    pub fn computed(&self, missing: usize) -> usize {
        (missing * self.computed_eighths + SHARES / 2) / SHARES
    }
}

impl fmt::Display for MissPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let computed = self.computed_eighths;
        match computed {
            0 => write!(f, "experts that video memory misses are uploaded")?,
            SHARES => write!(f, "experts that video memory misses are computed by the processor")?,
            _ => write!(
                f,
                "of a layer's experts that video memory misses the processor computes {computed} of {SHARES}"
            )?,
        }
        let Some(rates) = self.rates else {
            return write!(f, " (--gpu-misses {})", self.misses.name());
        };
        let shown = |rate: f64| format!("{:.1} GB/s", rate / 1e9);
        let upload = match rates.upload {
            Some(upload) => format!("staging {}, upload {}", shown(rates.stage), shown(upload)),
            None => format!("uploads {}", shown(rates.stage)),
        };
        write!(f, " (measured: {upload}, processor {})", shown(rates.compute))
    }
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
    /// Whether records are written to their slots as they are, without memory for uploads in between.
    pub direct: bool,
    /// Whether it is the processor's memory.
    pub is_shared: bool,
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

/// What a device can do at most.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct DeviceLimits {
    /// Bytes of its memory that were read again and again.
    pub read_bytes: u64,
    /// Bytes of it that it reads, a second.
    pub read: f64,
    /// Bytes that are copied to where it takes them from, a second.
    pub stage: f64,
    /// Bytes that it takes from there, a second.
    pub copy: f64,
    /// Bytes that come in while both go on, a second.
    pub upload: f64,
    /// Seconds until it has answered anything.
    pub round_trip: f64,
}

/// A model's chunk, as its speed is measured.
#[derive(Clone, Copy, Debug)]
pub struct ChunkOf<'a> {
    /// The model.
    pub shape: &'a Shape,
    /// Of each layer that has experts.
    pub records: &'a [RecordLayout],
    /// How most of the dense weights are stored.
    pub dense: Precision,
    /// Its chunk, its context, its experts for a token.
    pub options: &'a Options,
}

/// What a device computes of a chunk, in operations a second: a multiplication and an addition are two.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct ChunkRates {
    /// Tokens that are taken together.
    pub tokens: usize,
    /// Whether products go to tensor cores.
    pub tensor_cores: bool,
    /// Products of dense weights with all tokens.
    pub dense: f64,
    /// Products of experts with those that chose them.
    pub experts: f64,
    /// Scores and mixes of attention.
    pub attention: f64,
}

/// A kernel over all layers that have it.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct KernelRate {
    /// What it computes.
    pub name: &'static str,
    /// Dispatches of a token.
    pub dispatches: usize,
    /// Bytes of weights, states and caches that they touch together.
    pub bytes: u64,
    /// Seconds that they take together.
    pub seconds: f64,
}

/// What was done to feed the device, since it was opened.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct GpuCounters {
    /// Records brought to video memory.
    pub uploads: u64,
    /// Of these, records that were read from the disk where the device reads them, and never copied.
    pub read_in_place: u64,
    /// Bytes of all.
    pub upload_bytes: u64,
    /// Records that were brought after the processor had computed them.
    pub admitted: u64,
    /// Records that the processor computed.
    pub computed: u64,
    /// Time that it took, in nanoseconds.
    pub compute_ns: u64,
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
            read_in_place: self.read_in_place - before.read_in_place,
            upload_bytes: self.upload_bytes - before.upload_bytes,
            admitted: self.admitted - before.admitted,
            computed: self.computed - before.computed,
            compute_ns: self.compute_ns - before.compute_ns,
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_processor_takes_what_makes_both_end_together() {
        let rates = |stage, upload, compute| MissRates { stage, upload: Some(upload), compute };
        assert_eq!(rates(40.0, 10.0, 10.0).computed_eighths(), 4);
        assert_eq!(rates(40.0, 30.0, 10.0).computed_eighths(), 2);
        assert_eq!(rates(40.0, 30.0, 0.1).computed_eighths(), 0);
        // What is computed quicker than it is copied is not copied.
        assert_eq!(rates(8.0, 30.0, 10.0).computed_eighths(), SHARES);
        let direct = |stage, compute| MissRates { upload: None, ..rates(stage, 1.0, compute) };
        assert_eq!([direct(30.0, 20.0), direct(20.0, 30.0)].map(|r| r.computed_eighths()), [0, 8]);
        assert_eq!(rates(1.0, 5.0, 3.0).or_faster(rates(2.0, 4.0, 6.0)), rates(2.0, 5.0, 6.0));
    }

    #[test]
    fn a_share_of_the_missing_experts_is_a_number_of_them() {
        let computed = |computed_eighths, missing| {
            MissPlan { misses: Misses::Auto, computed_eighths, rates: None }.computed(missing)
        };
        assert_eq!([0, 1, 2, 5, 8].map(|n| computed(3, n)), [0, 0, 1, 2, 3]);
        assert_eq!([0, 1, 8].map(|n| computed(0, n)), [0, 0, 0]);
        assert_eq!([0, 1, 8].map(|n| computed(SHARES, n)), [0, 1, 8]);
    }
}
