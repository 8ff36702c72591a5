//! The mixture of experts: routed experts from the store, the shared expert from memory.
//!
//! One token: all reads are issued at once, the shared expert is computed while they are under way,
//! and what is ready is computed together, hits first. The outputs are kept apart and summed in the
//! router's order, so that the order in which records land never changes a result. A chunk: tokens
//! are sorted by expert and every expert is read once and multiplied by all of its tokens, experts
//! ascending, which fixes the order of the sums.

use std::time::Instant;

use flash_moe_kernels::{Rows, TILE_ROWS};

use crate::compute::{Activations, Compute, Temporary, gate_up_rows, item_rows, sized};
use crate::container::RecordLayout;
use crate::error::Result;
use crate::layer::router::Routes;
use crate::shape::{ExpertId, LayerId, Moe};
use crate::store::{ExpertStore, Landed, Purpose, Record};
use crate::timing::{Stage, Timing};
use crate::weights::{GatedBlock, MoeWeights};

/// Buffers of the feed-forward.
#[derive(Default)]
pub struct ExpertScratch {
    gathered: Vec<f32>, // [tokens of an expert][hidden], where activations stay f32
    whole: [Activations; 2], // the chunk in the forms for gate and, where it differs, for up
    picked: [Activations; 2], // those of an expert's tokens
    tiles: Vec<f32>,    // [tiles][tokens of an expert][TILE_ROWS]
    active: Vec<f32>,   // [tokens or experts][width]
    outputs: Vec<f32>,  // [experts or tokens][hidden]
    middle: Activations, // of the ready experts, `[experts][width]`
    gates: Vec<f32>,    // [tokens], of the shared expert
    landed_at: Vec<usize>, // [top_k], place in `outputs` of each rank's expert
    by_expert: Vec<Pair>,
    counts: Vec<usize>, // tokens of each expert of the chunk, most first
}

/// A token that goes to an expert.
#[derive(Clone, Copy)]
struct Pair {
    expert: ExpertId,
    token: u32,
    weight: f32,
}

impl ExpertScratch {
    /// Tokens from which an expert of the sorted chunk belongs to the layer's hot set of `most`
    /// experts: those keep their place in the pool, the others only pass through.
    fn hot_from(&mut self, most: usize) -> usize {
        self.counts.clear();
        let experts = self.by_expert.chunk_by(|a, b| a.expert == b.expert);
        self.counts.extend(experts.map(<[Pair]>::len));
        self.counts.sort_unstable_by(|a, b| b.cmp(a));
        // All experts that the next one in line does not equal, so that ties stay out.
        self.counts.get(most).map_or(1, |next| next + 1)
    }

    /// Floats needed for a chunk of tokens.
    pub fn floats(
        moe: &Moe,
        hidden: usize,
        width: usize,
        (tokens, top_k): (usize, usize),
    ) -> usize {
        let rows = tokens.max(top_k);
        let middle = Activations::floats(top_k * moe.width);
        let forms = 4 * Activations::floats(tokens * hidden);
        let tiles = tokens * width.next_multiple_of(TILE_ROWS);
        rows * (2 * hidden + width) + middle + forms + tiles + 4 * tokens * top_k
    }
}

/// What the mixture of one layer reads.
pub struct MoeInput<'a> {
    /// Where it comes from.
    pub store: &'a ExpertStore,
    /// The layer.
    pub layer: LayerId,
    /// Layout of the layer's records.
    pub layout: &'a RecordLayout,
    /// Router and shared expert.
    pub weights: &'a MoeWeights,
    /// The router's choices.
    pub routes: &'a Routes,
    /// Normed rows, `[tokens][hidden]`.
    pub x: &'a [f32],
    /// Called for a single token once its reads are under way: the time to look ahead.
    pub reading: &'a mut dyn FnMut(&mut Temporary),
}

/// Writes the routed and shared experts' sum of each token to `out [tokens][hidden]`.
///
/// # Errors
/// A record that could not be read; `out` is then meaningless.
pub fn mixture(
    compute: &Compute,
    input: &mut MoeInput,
    scratch: &mut ExpertScratch,
    tmp: &mut Temporary,
    timing: &mut Timing,
    out: &mut [f32],
) -> Result<()> {
    if out.len() == input.layout.gate.cols {
        one_token(compute, input, scratch, tmp, timing, out)
    } else {
        chunk(compute, input, scratch, tmp, timing, out)
    }
}

/// `down(silu(gate x) * (up x))` of a resident block for each row of `x`.
pub fn gated_block(
    compute: &Compute,
    block: &GatedBlock,
    x: &[f32],
    scratch: &mut ExpertScratch,
    tmp: &mut Temporary,
    out: &mut [f32],
) {
    let tokens = x.len() / block.gate.cols();
    let active = sized(&mut scratch.active, tokens * block.gate.row_count());
    compute.gate_up((&block.gate.rows(), &block.up.rows()), x, active, tmp);
    compute.project(&block.down.rows(), active, out, tmp);
}

fn one_token(
    compute: &Compute,
    input: &mut MoeInput,
    scratch: &mut ExpertScratch,
    tmp: &mut Temporary,
    timing: &mut Timing,
    out: &mut [f32],
) -> Result<()> {
    let hidden = out.len();
    let top_k = input.routes.experts.len();
    let mut fetch = input.store.fetch(input.layer, &input.routes.experts);
    (input.reading)(tmp);
    shared(compute, input, scratch, tmp, timing, out);

    let (gate, up) = (input.layout.gate.precision.format(), input.layout.up.precision.format());
    compute.prepare_pair((gate, up), input.x, tmp);
    sized(&mut scratch.outputs, top_k * hidden);
    sized(&mut scratch.landed_at, top_k);
    let mut ready = Landed::new();
    let mut done = 0;
    loop {
        let started = Instant::now();
        fetch.ready(&mut ready)?;
        timing.add(Stage::Fetch, started, 0);
        if ready.is_empty() {
            break;
        }
        let started = Instant::now();
        for (place, (rank, _)) in (done..).zip(&ready) {
            scratch.landed_at[*rank] = place;
        }
        landed(compute, input, (&ready, done), scratch, tmp);
        done += ready.len();
        timing.add(Stage::Experts, started, ready.len() * input.layout.record_bytes());
    }
    for (weight, place) in input.routes.weights.iter().zip(&scratch.landed_at) {
        compute.isa.axpy(*weight, &scratch.outputs[place * hidden..][..hidden], out);
    }
    Ok(())
}

/// Computes the experts that are ready as two parallel regions over all of their rows; their
/// outputs go to `scratch.outputs` from place `done` on.
fn landed(
    compute: &Compute,
    input: &MoeInput,
    (ready, done): (&[(usize, Record)], usize),
    scratch: &mut ExpertScratch,
    tmp: &Temporary,
) {
    let (layout, isa) = (input.layout, compute.isa);
    let (width, hidden) = (layout.gate.rows, layout.down.rows);
    let active = sized(&mut scratch.active, ready.len() * width);
    let rows = even_rows(&layout.gate.rows(&ready[0].1));
    let x = tmp.pair(input.x);
    compute.pool.chunks(active, rows, |i, out| {
        let (slot, first) = (i * rows / width, i * rows % width);
        let record = &ready[slot].1;
        let (gate, up) = (layout.gate.rows(record), layout.up.rows(record));
        gate_up_rows(isa, (&gate, &up), first, x, out);
    });

    let active = &scratch.active;
    // Groups never straddle two experts' activations: a width is a whole number of groups.
    let format = layout.down.precision.format();
    compute.prepare(compute.arithmetic, format, active, &mut scratch.middle);
    let middle = &scratch.middle;
    let rows = even_rows(&layout.down.rows(&ready[0].1));
    let outputs = &mut scratch.outputs[done * hidden..][..ready.len() * hidden];
    compute.pool.chunks(outputs, rows, |i, out| {
        let (slot, first) = (i * rows / hidden, i * rows % hidden);
        let down = layout.down.rows(&ready[slot].1);
        let x = middle.part(&active[slot * width..][..width], slot, ready.len());
        x.mat_vec(isa, &down, first, out);
    });
}

/// Rows of a work item that divide the matrix evenly, so that items of stacked outputs never
/// straddle two experts.
fn even_rows(w: &Rows) -> usize {
    let most = item_rows(w);
    (1..=most).rev().find(|rows| w.rows().is_multiple_of(*rows)).unwrap_or(1)
}

/// The shared expert behind its sigmoid gate, or zero where the family has none.
fn shared(
    compute: &Compute,
    input: &MoeInput,
    scratch: &mut ExpertScratch,
    tmp: &mut Temporary,
    timing: &mut Timing,
    out: &mut [f32],
) {
    let Some((block, gate)) = &input.weights.shared else {
        out.fill(0.0);
        return;
    };
    let started = Instant::now();
    gated_block(compute, block, input.x, scratch, tmp, out);
    let hidden = gate.cols();
    let gates = sized(&mut scratch.gates, out.len() / hidden);
    compute.project(&gate.rows(), input.x, gates, tmp);
    for (gate, out) in gates.iter().zip(out.chunks_exact_mut(hidden)) {
        compute.isa.scale(1.0 / (1.0 + (-gate).exp()), out);
    }
    timing.add(Stage::Shared, started, block.bytes() + gate.bytes());
}

fn chunk(
    compute: &Compute,
    input: &MoeInput,
    scratch: &mut ExpertScratch,
    tmp: &mut Temporary,
    timing: &mut Timing,
    out: &mut [f32],
) -> Result<()> {
    sort_by_expert(input.routes, out.len() / input.layout.gate.cols, scratch);
    let hot = scratch.hot_from(input.store.slots_per_layer());
    let counts = scratch.by_expert.chunk_by(|a, b| a.expert == b.expert);
    let mut fetch = input.store.sweep(
        input.layer,
        counts.map(|pairs| {
            let purpose = if pairs.len() >= hot { Purpose::Use } else { Purpose::Scan };
            (pairs[0].expert, purpose)
        }),
    );
    shared(compute, input, scratch, tmp, timing, out);

    let started = Instant::now();
    let formats = (input.layout.gate.precision.format(), input.layout.up.precision.format());
    let differ = compute.prepare_forms(formats, input.x, scratch.whole.each_mut());
    timing.add(Stage::Experts, started, 0);
    let by_expert = std::mem::take(&mut scratch.by_expert);
    for pairs in by_expert.chunk_by(|a, b| a.expert == b.expert) {
        let started = Instant::now();
        let record = fetch.next_in_order()?.expect("one record for each distinct expert");
        timing.add(Stage::Fetch, started, 0);
        let started = Instant::now();
        one_expert(compute, input, (&record, pairs, differ), scratch, tmp, out);
        timing.add(Stage::Experts, started, input.layout.record_bytes());
    }
    scratch.by_expert = by_expert;
    Ok(())
}

/// Fills `by_expert`, experts ascending, then tokens.
fn sort_by_expert(routes: &Routes, tokens: usize, scratch: &mut ExpertScratch) {
    let top_k = routes.experts.len() / tokens;
    scratch.by_expert.clear();
    for (i, (&expert, &weight)) in routes.experts.iter().zip(&routes.weights).enumerate() {
        scratch.by_expert.push(Pair { expert, token: (i / top_k) as u32, weight });
    }
    scratch.by_expert.sort_unstable_by_key(|pair| (pair.expert, pair.token));
}

/// Adds one expert's weighted output to each of its tokens. The chunk has been prepared; `differ`
/// says whether gate and up want different forms.
fn one_expert(
    compute: &Compute,
    input: &MoeInput,
    (record, pairs, differ): (&[u8], &[Pair], bool),
    scratch: &mut ExpertScratch,
    tmp: &mut Temporary,
    out: &mut [f32],
) {
    let layout = input.layout;
    let (hidden, width, tokens) = (layout.gate.cols, layout.gate.rows, pairs.len());
    let chosen = pairs.iter().map(|pair| pair.token as usize);
    scratch.gathered.clear();
    if scratch.whole[0].is_exact() {
        for token in chosen.clone() {
            scratch.gathered.extend_from_slice(&input.x[token * hidden..][..hidden]);
        }
    }
    for (picked, whole) in
        scratch.picked.iter_mut().zip(&scratch.whole).take(1 + usize::from(differ))
    {
        picked.gather(whole, input.x.len() / hidden, chosen.clone());
    }
    let other = &scratch.picked[usize::from(differ)];
    let x = &scratch.gathered[..];
    let forms = (scratch.picked[0].part(x, 0, 1), other.part(x, 0, 1));
    let active = sized(&mut scratch.active, tokens * width);
    let w = (&layout.gate.rows(record), &layout.up.rows(record));
    compute.gate_up_prepared(w, forms, tokens, (&mut scratch.tiles, active));
    let outputs = sized(&mut scratch.outputs, tokens * hidden);
    compute.project(&layout.down.rows(record), active, outputs, tmp);
    for (pair, output) in pairs.iter().zip(outputs.chunks_exact(hidden)) {
        let out = &mut out[pair.token as usize * hidden..][..hidden];
        compute.isa.axpy(pair.weight, output, out);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_are_sorted_by_expert_then_token_and_asked_once() {
        let ids = |list: &[u16]| list.iter().map(|&e| ExpertId(e)).collect::<Vec<_>>();
        let mut routes = Routes::default();
        routes.experts = ids(&[5, 2, 2, 0, 5, 7]);
        routes.weights = vec![0.6, 0.4, 0.9, 0.1, 0.5, 0.5];
        let mut scratch = ExpertScratch::default();
        sort_by_expert(&routes, 3, &mut scratch);
        assert_eq!([scratch.hot_from(4), scratch.hot_from(2), scratch.hot_from(1)], [1, 2, 3]);
        let pairs: Vec<(u16, u32, f32)> =
            scratch.by_expert.iter().map(|p| (p.expert.0, p.token, p.weight)).collect();
        let expected =
            [(0, 1, 0.1), (2, 0, 0.4), (2, 1, 0.9), (5, 0, 0.6), (5, 2, 0.5), (7, 2, 0.5)];
        assert_eq!(pairs, expected);
    }
}
