//! Every byte the engine will allocate, summed before the first allocation.
//!
//! The dense weights, states, KV cache and scratch are fixed by the model and the options; what the
//! limit leaves goes to the expert pool. The pool is never smaller than one token's working set
//! (top-k experts in every layer): below it an LRU-like pool has no hits at all. A limit that cannot
//! hold that is refused with the smallest one that would.

use std::fmt;

use crate::container::Container;
use crate::engine::Options;
use crate::error::{Error, Result};
use crate::gpu::{self, GpuOptions, uploads_bytes};
use crate::kv_cache::KvShape;
use crate::machine;
use crate::memory::Block;
use crate::session::{Scratch, Together};
use crate::shape::{Mix, Shape};
use crate::weights::Weights;

/// The program itself, its threads' stacks and small allocations.
const PROGRAM_BYTES: u64 = 48 << 20;
/// What a GPU has when the model is open.
const MOVES: [&str; 3] = ["dense weights", "KV cache", "delta-net states"];
/// Context when none is asked for, in tokens.
const CONTEXT_DEFAULT: usize = 8192;

/// What a model asks of memory, known without its weights.
#[derive(Clone, Copy, Debug)]
pub struct Demand<'a> {
    /// The model's shape.
    pub shape: &'a Shape,
    /// Dense weights as stored.
    pub dense_bytes: u64,
    /// The embedding among them, which stays where the processor reads it.
    pub embedding_bytes: u64,
    /// The largest record in whole pages; 0 without experts.
    pub slot_bytes: u64,
}

impl<'a> Demand<'a> {
    /// What a container asks for.
    pub fn of(container: &'a Container) -> Self {
        let widest = container.layouts().iter().map(|l| l.padded_bytes()).max();
        Self {
            shape: container.shape(),
            dense_bytes: Weights::stored_bytes(container),
            embedding_bytes: Weights::embedding_bytes(container),
            slot_bytes: widest.unwrap_or(0) as u64,
        }
    }
}

/// One allocation, or a group that is freed together.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Line {
    /// What it is.
    pub name: &'static str,
    /// Its size.
    pub bytes: u64,
}

/// The memory plan of a model on this machine.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Budget {
    /// Bytes that may be used in all.
    pub limit: u64,
    /// Tokens of context the plan holds.
    pub context: usize,
    /// Sessions that it holds at once.
    pub sessions: usize,
    /// Everything but the pool.
    pub fixed: Vec<Line>,
    /// Memory of a pool slot: the largest record in whole pages.
    pub slot_bytes: u64,
    /// Slots the pool gets.
    pub slots: usize,
    /// Slots of one token's working set: top-k times the layers with experts.
    pub slots_floor: usize,
    /// Records in the model.
    pub records: usize,
}

impl Budget {
    /// Plans the memory for a container under the options.
    ///
    /// # Errors
    /// The limit is below the floor; the context is above the model's; free memory is unknown and
    /// no limit was given.
    pub fn plan(container: &Container, options: &Options) -> Result<Self> {
        let demand = Demand::of(container);
        let budget = Self::sized(&demand, options)?;
        if budget.fits() {
            Ok(budget)
        } else {
            Err(Error::Budget(budget.refusal(demand.shape, options)))
        }
    }

    /// As [`Budget::plan`] without refusing a limit below the floor: ask [`Budget::fits`].
    ///
    /// # Errors
    /// The context is above the model's; its heads cannot be kept in the format of the KV cache;
    /// free memory is unknown and no limit was given.
    pub fn sized(demand: &Demand, options: &Options) -> Result<Self> {
        let shape = demand.shape;
        options.kv_cache.check(shape.attention.head_dim).map_err(Error::Shape)?;
        let context = context(shape, options)?;
        let layers = shape.expert_layers().count();
        let records = layers * shape.moe.experts;
        let top_k = options.experts_per_token.unwrap_or(shape.moe.top_k);
        let mut budget = Self {
            limit: limit(options)?,
            context,
            sessions: options.sessions.max(1),
            fixed: fixed_lines(demand, options, context),
            slot_bytes: slot_memory(demand),
            slots: 0,
            slots_floor: top_k * layers,
            records,
        };
        let left = budget.limit.saturating_sub(budget.fixed_bytes());
        let fitting = left.checked_div(budget.slot_bytes).unwrap_or(0) as usize;
        budget.slots = fitting.min(records);
        Ok(budget)
    }

    /// Whether the limit holds at least one token's working set.
    pub fn fits(&self) -> bool {
        self.limit >= self.smallest()
    }

    /// Everything but the pool.
    pub fn fixed_bytes(&self) -> u64 {
        self.fixed.iter().map(|l| l.bytes).sum()
    }

    /// All bytes of the plan.
    pub fn total(&self) -> u64 {
        self.fixed_bytes() + self.slots as u64 * self.slot_bytes
    }

    /// The smallest limit under which this context runs.
    pub fn smallest(&self) -> u64 {
        self.fixed_bytes() + self.slots_floor as u64 * self.slot_bytes
    }

    fn refusal(&self, shape: &Shape, options: &Options) -> String {
        let least_context = 512.min(shape.max_positions);
        let kv = |context| kv_bytes(shape, options, context);
        let saved = kv(self.context).saturating_sub(kv(least_context)) * self.sessions as u64;
        let floor = gib(self.slots_floor as u64 * self.slot_bytes);
        let mut text = format!(
            "needs {} (of which {floor} is one token's experts, the floor of the pool), limit is {}",
            gib(self.smallest()),
            gib(self.limit)
        );
        if saved > 0 {
            let least = gib(self.smallest() - saved);
            text += &format!(
                "; smallest that runs is {least} (--memory {} --context {least_context})",
                cli(self.smallest() - saved)
            );
        } else {
            text += &format!("; smallest that runs is --memory {}", cli(self.smallest()));
        }
        text
    }
}

impl fmt::Display for Budget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for line in &self.fixed {
            writeln!(f, "  {:<34}{:>12}", line.name, gib(line.bytes))?;
        }
        let pool = format!("expert pool, {} of {} records", self.slots, self.records);
        writeln!(f, "  {pool:<34}{:>12}", gib(self.slots as u64 * self.slot_bytes))?;
        write!(f, "  {:<34}{:>12}", "total", gib(self.total()))?;
        write!(f, "  (limit {}, smallest {})", gib(self.limit), gib(self.smallest()))
    }
}

/// The options with a limit for each memory, where a GPU that has no memory of its own is to compute and no
/// size was given for what it takes: the processor keeps what it needs at least, one token's experts in the
/// pool, and the rest holds experts where the GPU reads them. `--memory` is then the limit of both.
///
/// # Errors
/// As [`Budget::sized`]; no such GPU.
pub fn shared(demand: &Demand, options: &Options) -> Result<Options> {
    let Some(wanted) = options.gpu.as_ref().filter(|gpu| gpu.memory_bytes.is_none()) else {
        return Ok(options.clone());
    };
    let Some(most) = gpu::shared_memory(wanted)? else { return Ok(options.clone()) };
    let [memory, video] = shares(&Budget::sized(demand, options)?, demand.embedding_bytes, most);
    let gpu = GpuOptions { memory_bytes: Some(video), ..wanted.clone() };
    Ok(Options { memory_bytes: Some(memory), gpu: Some(gpu), ..options.clone() })
}

/// Of one memory the processor's limit and the GPU's, which has `most` at most.
fn shares(budget: &Budget, embedding_bytes: u64, most: u64) -> [u64; 2] {
    // Planned for the processor as well, since it has these until the GPU has them.
    let moves = budget.fixed.iter().filter(|line| MOVES.contains(&line.name));
    let moved = moves.map(|line| line.bytes).sum::<u64>().saturating_sub(embedding_bytes);
    let rest = budget.limit.saturating_sub(budget.smallest() - moved);
    match rest.min(most) {
        0 => [budget.limit, 0], // one of both refuses
        video => [budget.limit - video + moved, video],
    }
}

/// Bytes in the largest binary unit that leaves at least one before the point.
pub fn gib(bytes: u64) -> String {
    let units = [(1u64 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")];
    match units.iter().find(|(unit, _)| bytes >= *unit) {
        Some((unit, name)) => format!("{:.1} {name}", bytes as f64 / *unit as f64),
        None => format!("{bytes} B"),
    }
}

/// A size for the `--memory` flag, rounded up to whole mebibytes.
fn cli(bytes: u64) -> String {
    format!("{}MiB", bytes.div_ceil(1 << 20))
}

/// Tokens of context that these options mean.
///
/// # Errors
/// None, or more than the model takes.
pub fn context(shape: &Shape, options: &Options) -> Result<usize> {
    let context = options.context.unwrap_or(CONTEXT_DEFAULT.min(shape.max_positions));
    if context == 0 || context > shape.max_positions {
        return Err(Error::Budget(format!(
            "a context of {context} tokens; this model takes 1 to {} (--yarn stretches that)",
            shape.max_positions
        )));
    }
    Ok(context)
}

fn limit(options: &Options) -> Result<u64> {
    if let Some(bytes) = options.memory_bytes {
        return Ok(bytes);
    }
    let available = machine::available_memory().ok_or_else(|| {
        Error::Budget("this system does not say how much memory is free; give --memory".into())
    })?;
    // A tenth stays free for the system and for files that other programs are reading.
    Ok(available - available / 10)
}

fn slot_memory(demand: &Demand) -> u64 {
    match demand.slot_bytes {
        0 => 0,
        record => Block::memory_bytes(record as usize) as u64,
    }
}

fn fixed_lines(demand: &Demand, options: &Options, context: usize) -> Vec<Line> {
    let shape = demand.shape;
    let scratch = Scratch::bytes(shape, options, context);
    let sessions = options.sessions.max(1) as u64;
    let together = if sessions > 1 { Together::bytes(shape, options) } else { 0 };
    let mut lines = vec![
        Line { name: MOVES[0], bytes: demand.dense_bytes },
        Line { name: MOVES[1], bytes: sessions * kv_bytes(shape, options, context) },
        Line { name: MOVES[2], bytes: sessions * delta_bytes(shape) },
        Line { name: "scratch and logits", bytes: sessions * scratch + together },
        Line { name: "tokenizer and program", bytes: PROGRAM_BYTES + options.other_bytes },
    ];
    if options.gpu.is_some() {
        // Where the driver puts it is its own business: it is planned here and in video memory.
        lines.push(Line { name: "uploads to the GPU", bytes: uploads_bytes(demand.slot_bytes) });
    }
    if options.kept_bytes > 0 {
        lines.push(Line { name: "kept prefixes", bytes: options.kept_bytes });
    }
    lines
}

/// All layers' keys and values, and what one layer at a time takes beside them for a chunk.
fn kv_bytes(shape: &Shape, options: &Options, context: usize) -> u64 {
    let layer = KvShape::of(&shape.attention, options.kv_cache);
    let chunk = layer.chunk_bytes(options.prefill_chunk.min(context));
    shape.count(Mix::Attention) as u64 * layer.bytes(context) + chunk
}

fn delta_bytes(shape: &Shape) -> u64 {
    shape.delta.as_ref().map_or(0, |d| {
        let floats = d.value_heads * d.key_dim * d.value_dim + d.conv_taps * d.conv_channels();
        (shape.count(Mix::DeltaNet) * floats * size_of::<f32>()) as u64
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_memory_is_shared_out_once() {
        let line = |name, bytes| Line { name, bytes };
        let fixed =
            vec![line(MOVES[0], 100), line(MOVES[1], 20), line(MOVES[2], 5), line("rest", 9)];
        let budget = Budget {
            limit: 1000,
            context: 1,
            sessions: 1,
            fixed,
            slot_bytes: 10,
            slots: 80,
            slots_floor: 4,
            records: 200,
        };
        assert_eq!(budget.smallest(), 174);
        // 30 of 100 stay, so 95 of 174 move, and 79 are the processor's.
        assert_eq!(shares(&budget, 30, u64::MAX), [174, 921]);
        // What the device cannot have is pool.
        assert_eq!(shares(&budget, 30, 500), [595, 500]);
        assert_eq!(shares(&Budget { limit: 60, ..budget }, 30, 500), [60, 0]);
    }
}
