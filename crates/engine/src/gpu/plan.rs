//! Every byte of video memory, summed before the first allocation.
//!
//! Dense weights, what sessions remember and the scratch are fixed by the model and the options; what
//! the limit leaves becomes slots for experts, the same number in every layer. At least one token's
//! experts must fit; when all do, no token ever waits for one.

use super::adapters::{Adapter, AdapterKind, pick};
use super::dense::packed_bytes;
use super::layout::{Layout, top_k};
use super::{GpuOptions, Misses, Stored, VideoBudget, slots, tiers};
use crate::budget::{Line, context, gib};
use crate::container::RecordLayout;
use crate::engine::Options;
use crate::error::{Error, Result};
use crate::kv_cache::KvShape;
use crate::machine;
use crate::shape::{Mix, Shape};
use crate::weights::{LayerWeights, Weights};

/// Tokens of a chunk on a discrete GPU, of which the first that fits is taken.
const CHUNKS: [usize; 2] = [2048, 1024];

/// What the driver and the kernels themselves take, what the driver copies through, and a page for each buffer
/// of slots.
const DRIVER_BYTES: u64 = 320 << 20;

/// What a model asks for.
pub struct Demand<'a> {
    pub shape: &'a Shape,
    /// Of each layer that has experts.
    pub records: &'a [RecordLayout],
    /// As they lie on the device.
    pub dense_bytes: u64,
    pub options: &'a Options,
    /// Of a token and of a chunk.
    pub layouts: [&'a Layout; 2],
}

/// Plans.
///
/// # Errors
/// The limit holds less than one token's experts beside everything else, as a table; the limit is not
/// known.
pub fn plan(demand: &Demand, adapter: &Adapter, wanted: &GpuOptions) -> Result<VideoBudget> {
    let (shape, layouts) = (demand.shape, demand.records);
    let buffer_bytes = adapter.binding_bytes;
    let most = layouts.iter().map(|l| slots::slots_most(l, shape.moe.experts, buffer_bytes)).min();
    let bytes = layouts.iter().map(|l| slots::slot_bytes(l) as u64);
    let mut budget = VideoBudget {
        adapter: adapter.name.clone(),
        limit: limit(adapter, wanted)?,
        fixed: fixed_lines(demand)?,
        slot_bytes: bytes.sum(),
        slots_each: 0,
        experts: shape.moe.experts,
        resident: true,
        direct: false,
        is_shared: adapter.is_shared(),
        buffer_bytes,
    };
    let left = budget.limit.saturating_sub(budget.fixed_bytes());
    let Some(most) = most else {
        return if budget.limit >= budget.fixed_bytes() { Ok(budget) } else { refuse(&budget, 0) };
    };
    let fitting = left.checked_div(budget.slot_bytes).unwrap_or(0) as usize;
    let floor = top_k(shape, demand.options);
    if fitting < floor {
        return refuse(&budget, floor);
    }
    budget.slots_each = fitting.min(most);
    if budget.slots_each < floor {
        return Err(Error::Gpu(format!(
            "{}: buffers of {} hold {} of a layer's experts, a token needs {floor}; --device cpu",
            budget.adapter,
            gib(buffer_bytes),
            budget.slots_each
        )));
    }
    budget.resident = budget.slots_each == budget.experts;
    let is_written = budget.is_shared || !budget.resident;
    budget.direct = adapter.has_windows && is_written && writes_slots(wanted, budget.is_shared);
    Ok(budget)
}

/// Whether records are written to slots that this program sees. On a card's own memory only where all that is
/// missing is uploaded: otherwise the processor computes better while records go there by themselves
/// (docs/measurements.md, 41).
fn writes_slots(wanted: &GpuOptions, is_shared: bool) -> bool {
    !wanted.staged && (is_shared || wanted.misses == Misses::Upload)
}

fn refuse(budget: &VideoBudget, floor: usize) -> Result<VideoBudget> {
    let smallest = budget.fixed_bytes() + floor as u64 * budget.slot_bytes;
    let lines = budget.fixed.iter().map(|l| format!("  {:<34}{:>12}\n", l.name, gib(l.bytes)));
    let experts = format!("one token's experts, {floor} a layer");
    let mib = |bytes: u64| bytes.div_ceil(1 << 20);
    let most = mib(smallest);
    let way = match budget.is_shared {
        true => format!(
            "it has the processor's memory: give --memory {}MiB more, or --gpu-memory {most}MiB, which comes \
             on top of --memory",
            mib(smallest.saturating_sub(budget.limit))
        ),
        false => format!("smallest that runs is --gpu-memory {most}MiB"),
    };
    Err(Error::Gpu(format!(
        "{}: needs {}, limit is {}; {way}; less with a smaller --context, or --device cpu\n{}  \
         {experts:<34}{:>12}",
        budget.adapter,
        gib(smallest),
        gib(budget.limit),
        lines.collect::<String>(),
        gib(floor as u64 * budget.slot_bytes)
    )))
}

fn limit(adapter: &Adapter, wanted: &GpuOptions) -> Result<u64> {
    if let Some(bytes) = wanted.memory_bytes {
        return Ok(bytes);
    }
    let nine_tenths = |bytes: u64| bytes - bytes / 10;
    match (adapter.kind, adapter.memory_bytes) {
        (AdapterKind::Discrete | AdapterKind::Other, Some(bytes)) => Ok(nine_tenths(bytes)),
        // The processor's memory, which the rest of the program needs as well: `budget::shared` knows better.
        _ if adapter.is_shared() => {
            { machine::available_memory().map(|bytes| bytes / 2) }.ok_or(())
        }
        _ => Err(()),
    }
    .map_err(|()| {
        Error::Gpu(format!(
            "{}: the system does not say how much memory it has; give --gpu-memory",
            adapter.name
        ))
    })
}

/// Plans for a model that is not loaded, whose dense weights take so many bytes as they are stored.
///
/// # Errors
/// As when it opens: no such adapter, what the kernels do not take, a plan above the limit.
pub fn stored(stored: &Stored, options: &Options, wanted: &GpuOptions) -> Result<VideoBudget> {
    let Stored { shape, records, dense_bytes } = *stored;
    super::check(shape, options)?;
    let (_, adapter) = pick(wanted.adapter)?;
    let layouts = layouts(shape, options, &adapter)?;
    let layouts = [&layouts[0], &layouts[1]];
    plan(&Demand { shape, records, dense_bytes, options, layouts }, &adapter, wanted)
}

/// The scratch of a token and of a chunk.
pub fn layouts(shape: &Shape, options: &Options, adapter: &Adapter) -> Result<[Layout; 2]> {
    let most = options.prefill_chunk.min(context(shape, options)?);
    let of_chunk = super::chunk::layout(shape, options, most, adapter.binding_bytes);
    Ok([Layout::new(shape, top_k(shape, options), 1), of_chunk])
}

/// Bytes that the dense weights take on the device.
pub fn dense_bytes(weights: &Weights, shape: &Shape) -> u64 {
    let matrices = weights.layers.iter().map(|layer| {
        // Four parts a layer have a header each.
        packed_bytes(LayerWeights::matrices(layer), 4 * shape.hidden)
    });
    matrices.sum::<u64>() + packed_bytes(std::iter::once(weights.head()), shape.hidden)
}

/// Bytes of the largest record.
pub fn record_bytes(records: &[RecordLayout]) -> u64 {
    records.iter().map(RecordLayout::record_bytes).max().unwrap_or(0) as u64
}

fn fixed_lines(demand: &Demand) -> Result<Vec<Line>> {
    let (shape, options) = (demand.shape, demand.options);
    let context = context(shape, options)?;
    let sessions = options.sessions.max(1) as u64;
    Ok(vec![
        Line { name: "dense weights", bytes: demand.dense_bytes },
        Line {
            name: "KV cache and states",
            bytes: sessions * memory_bytes(shape, options, context),
        },
        Line { name: "scratch", bytes: scratch_bytes(demand.layouts, shape) },
        Line {
            name: "uploads",
            bytes: tiers::bytes(demand.layouts[0], shape, record_bytes(demand.records)),
        },
        Line { name: "driver and kernels", bytes: DRIVER_BYTES },
    ])
}

/// About what a model takes of video memory with all of its experts, before its weights are read, and what
/// these take of it.
pub fn whole_bytes(stored: &Stored, options: &Options) -> [u64; 2] {
    let Stored { shape, records, dense_bytes } = *stored;
    // A context that is no good is refused where the memory is planned.
    let context = context(shape, options).unwrap_or(0);
    let each: usize = records.iter().map(RecordLayout::record_bytes).sum();
    let experts = (shape.moe.experts * each) as u64;
    let of_token = Layout::new(shape, top_k(shape, options), 1);
    let whole = dense_bytes
        + options.sessions.max(1) as u64 * memory_bytes(shape, options, context)
        + chunk_bytes(shape, options)
        + tiers::bytes(&of_token, shape, record_bytes(records))
        + DRIVER_BYTES
        + experts;
    [whole, experts]
}

/// Scratch of a chunk and of a token.
fn chunk_bytes(shape: &Shape, options: &Options) -> u64 {
    let most = options.prefill_chunk.min(context(shape, options).unwrap_or(1));
    let of_chunk = super::chunk::layout(shape, options, most, u64::MAX);
    scratch_bytes([&Layout::new(shape, top_k(shape, options), 1), &of_chunk], shape)
}

/// Tokens of a chunk where none were asked for: on a discrete GPU more than elsewhere, since the experts that
/// it misses are brought once a chunk, while its scratch takes at most a sixteenth of the memory and keeps
/// no expert out that had room without.
///
/// # Errors
/// No such adapter, or it does not say how much memory it has.
pub fn prefill_chunk(stored: &Stored, options: &Options, wanted: &GpuOptions) -> Result<usize> {
    let (_, adapter) = pick(wanted.adapter)?;
    match adapter.kind {
        AdapterKind::Discrete => {
            let memory = [limit(&adapter, wanted)?, adapter.binding_bytes];
            Ok(chunk_within(memory, stored, options))
        }
        _ => Ok(options.prefill_chunk),
    }
}

fn chunk_within([memory, buffer_bytes]: [u64; 2], stored: &Stored, options: &Options) -> usize {
    let with = |chunk| Options { prefill_chunk: chunk, ..options.clone() };
    let holds_all = |options: &Options| whole_bytes(stored, options)[0] <= memory;
    let fits = |chunk: &usize| {
        let larger = with(*chunk);
        let most = (*chunk).min(context(stored.shape, options).unwrap_or(1));
        let whole = super::chunk::layout(stored.shape, &larger, most, buffer_bytes);
        whole.tokens() == most
            && chunk_bytes(stored.shape, &larger) <= memory / 16
            && holds_all(&larger) == holds_all(options)
    };
    CHUNKS.into_iter().find(fits).unwrap_or(options.prefill_chunk)
}

fn scratch_bytes(layouts: [&Layout; 2], shape: &Shape) -> u64 {
    let lists = super::chunk::lists_bytes(layouts[1], shape.moe.experts);
    layouts.iter().map(|layout| layout.bytes()).sum::<u64>() + lists
}

fn memory_bytes(shape: &Shape, options: &Options, context: usize) -> u64 {
    let kv = KvShape::of(&shape.attention, options.kv_cache);
    let delta = shape.delta.as_ref().map_or(0, |d| {
        (d.value_heads * d.key_dim * d.value_dim + 4 * d.conv_channels()) as u64 * 4
    });
    shape.count(Mix::Attention) as u64 * kv.bytes(context)
        + shape.count(Mix::DeltaNet) as u64 * delta
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::container::Container;
    use std::path::Path;

    #[test]
    fn a_card_s_slots_are_written_where_all_that_is_missing_is_uploaded() {
        let written = |misses, is_shared, staged| {
            writes_slots(&GpuOptions { misses, staged, ..GpuOptions::default() }, is_shared)
        };
        let all = [Misses::Auto, Misses::Upload, Misses::Cpu];
        assert_eq!(all.map(|misses| written(misses, false, false)), [false, true, false]);
        assert_eq!(all.map(|misses| written(misses, true, false)), [true; 3]);
        assert_eq!(all.map(|misses| written(misses, true, true)), [false; 3]);
    }

    #[test]
    fn a_chunk_takes_little_memory_and_keeps_no_expert_out() {
        let tiny = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/tiny");
        let container = Container::open(&tiny).expect("the built-in model");
        let stored = Stored::of(&container);
        let options = Options { context: Some(2048), prefill_chunk: 100, ..Options::default() };
        let of = |chunk| Options { prefill_chunk: chunk, ..options.clone() };
        let within = |memory| chunk_within([memory, u64::MAX], &stored, &options);
        let least = |chunk| {
            let larger = of(chunk);
            let whole = whole_bytes(&stored, &larger)[0];
            whole.max(16 * chunk_bytes(stored.shape, &larger))
        };
        assert!(least(2048) > least(1024));
        // A chunk that the device's buffers do not hold is not asked for.
        assert_eq!(chunk_within([u64::MAX, 1 << 20], &stored, &options), 100);
        assert_eq!([least(2048), least(2048) - 1].map(within), [2048, 1024]);
        assert_eq!([least(1024) - 1, whole_bytes(&stored, &options)[0]].map(within), [100, 100]);
    }
}
