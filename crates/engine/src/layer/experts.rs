//! The mixture of experts: routed experts from the store, the shared expert from memory.
//!
//! One token: all reads are issued at once, the shared expert is computed while they are under way,
//! and what is ready is computed together, hits first. The outputs are kept apart and summed in the
//! router's order, so that the order in which records land never changes a result. A chunk: tokens
//! are sorted by expert and every expert is read once and multiplied by all of its tokens; those that
//! have landed by then form a wave and are computed together. Experts ascend, which fixes the order
//! of the sums. Tokens of several timelines go in waves too, of whatever has landed, but every token's
//! outputs are kept apart and summed as those of one token are.

use std::ops::Range;
use std::time::Instant;

use flash_moe_kernels::{Isa, Rows, TILE_ROWS};

use crate::compute::{
    Activations, Compute, Kin, Temporary, gate_up_rows, gate_up_tile, item_rows, join,
    multiply_floats, sized, tiled, with_scratch,
};
use crate::container::RecordLayout;
use crate::error::Result;
use crate::layer::router::Routes;
use crate::shape::{ExpertId, LayerId, Moe};
use crate::store::{ExpertStore, Fetch, Landed, Purpose, Record};
use crate::timing::{Stage, Timing};
use crate::weights::{GatedBlock, MoeWeights};

/// Pairs of a token and an expert that a wave may hold however short the chunk is.
const WAVE_PAIRS: usize = 64;
/// Tokens whose outputs are added up as one work item.
const ADDED_TOKENS: usize = 16;

/// Buffers of the feed-forward.
#[derive(Default)]
pub struct ExpertScratch {
    gathered: Vec<f32>,       // [pairs of a wave][hidden], where activations stay f32
    whole: [Activations; 2],  // the chunk in the forms for gate and, where it differs, for up
    picked: [Activations; 2], // those of a wave's tokens
    tokens: Vec<u32>,         // of a wave's pairs
    tiles: Vec<f32>,          // of a wave, [expert][tile][tokens of the expert][TILE_ROWS]
    ends: Vec<usize>,         // of the parts of a buffer
    active: Vec<f32>,         // [pairs or experts][width]
    outputs: Vec<f32>,        // [experts][hidden], or of a wave as `tiles`
    kept: Vec<f32>,           // [tokens][top_k][hidden], of tokens of several timelines
    middle: Activations,      // of the ready experts, `[experts][width]`
    gates: Vec<f32>,          // [tokens], of the shared expert
    landed_at: Vec<usize>,    // [top_k], place in `outputs` of each rank's expert
    by_expert: Vec<Pair>,
    counts: Vec<usize>, // tokens of each expert of the chunk, most first
}

/// A token that goes to an expert.
#[derive(Clone, Copy)]
struct Pair {
    expert: ExpertId,
    token: u32,
    rank: u32, // of the expert among the token's
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
        let pairs = tokens.max(top_k).max(WAVE_PAIRS.min(tokens * top_k));
        Self::pair_floats(moe, (hidden, width), tokens, pairs) + 5 * tokens * top_k
    }

    /// Floats needed for a token of each of several timelines.
    pub fn strangers_floats(
        moe: &Moe,
        hidden: usize,
        width: usize,
        (tokens, top_k): (usize, usize),
    ) -> usize {
        let pairs = tokens * top_k;
        Self::pair_floats(moe, (hidden, width), tokens, pairs) + pairs * (hidden + 10)
    }

    fn pair_floats(
        moe: &Moe,
        (hidden, width): (usize, usize),
        tokens: usize,
        pairs: usize,
    ) -> usize {
        let middle = Activations::floats(pairs * moe.width);
        let forms =
            2 * Activations::floats(tokens * hidden) + 2 * Activations::floats(pairs * hidden);
        let rows = pairs * (hidden + tiled(hidden) + width + tiled(width));
        rows + middle + forms
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
    let is_one = out.len() == input.layout.gate.cols;
    match compute.kin {
        _ if is_one => one_token(compute, input, scratch, tmp, timing, out),
        Kin::OneTimeline => chunk(compute, input, scratch, tmp, timing, out),
        Kin::Strangers => strangers(compute, input, scratch, tmp, timing, out),
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
    let mut fetch = input.store.fetch(input.layer, &input.routes.experts);
    (input.reading)(tmp);
    shared(compute, input, scratch, tmp, timing, out);

    let one = OneToken { layout: input.layout, x: input.x, weights: &input.routes.weights };
    add_experts(compute, &one, &mut fetch, (scratch, tmp, timing), &mut |_, _| {}, out)
}

/// Experts of a layer that one token goes to.
pub struct OneToken<'a> {
    /// Layout of the layer's records.
    pub layout: &'a RecordLayout,
    /// The token's normed row, `[hidden]`.
    pub x: &'a [f32],
    /// Weights of the experts that are fetched, in the order asked for.
    pub weights: &'a [f32],
}

/// Adds the outputs of the experts that are fetched to `out [hidden]`, each with its weight, in the order
/// asked for. They are computed as they land; `used` gets every record behind that, with its place in
/// the order.
///
/// # Errors
/// A record that could not be read; `out` is then meaningless.
pub fn add_experts<'s>(
    compute: &Compute,
    one: &OneToken,
    fetch: &mut Fetch<'s>,
    (scratch, tmp, timing): (&mut ExpertScratch, &mut Temporary, &mut Timing),
    used: &mut dyn FnMut(usize, Record<'s>),
    out: &mut [f32],
) -> Result<()> {
    let (layout, hidden) = (one.layout, out.len());
    let (gate, up) = (layout.gate.precision.format(), layout.up.precision.format());
    compute.prepare_pair((gate, up), one.x, tmp);
    sized(&mut scratch.outputs, one.weights.len() * hidden);
    sized(&mut scratch.landed_at, one.weights.len());
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
        landed(compute, one, (&ready, done), scratch, tmp);
        done += ready.len();
        timing.add(Stage::Experts, started, ready.len() * layout.record_bytes());
        ready.drain(..).for_each(|(rank, record)| used(rank, record));
    }
    for (weight, place) in one.weights.iter().zip(&scratch.landed_at) {
        compute.isa.axpy(*weight, &scratch.outputs[place * hidden..][..hidden], out);
    }
    Ok(())
}

/// Computes the experts that are ready as two parallel regions over all of their rows; their
/// outputs go to `scratch.outputs` from place `done` on.
fn landed(
    compute: &Compute,
    one: &OneToken,
    (ready, done): (&[(usize, Record)], usize),
    scratch: &mut ExpertScratch,
    tmp: &Temporary,
) {
    let (layout, isa) = (one.layout, compute.isa);
    let (width, hidden) = (layout.gate.rows, layout.down.rows);
    let active = sized(&mut scratch.active, ready.len() * width);
    let rows = even_rows(&layout.gate.rows(&ready[0].1));
    let x = tmp.pair(one.x);
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
    let hidden = input.layout.gate.cols;
    sort_by_expert(input.routes, out.len() / hidden, scratch);
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

    let differ = prepare_rows(compute, input, scratch, timing);
    let by_expert = std::mem::take(&mut scratch.by_expert);
    let most = Most {
        pairs: (input.x.len() / hidden).max(WAVE_PAIRS),
        // The others of the pool are for the reads that follow.
        records: (input.store.slots() / 8).max(1),
    };
    let mut rest = &by_expert[..];
    while !rest.is_empty() {
        let started = Instant::now();
        let wave = Wave::collect(&mut fetch, rest, most)?;
        rest = &rest[wave.pairs.len()..];
        timing.add(Stage::Fetch, started, 0);
        let started = Instant::now();
        compute_wave(compute, input, (&wave, differ), scratch);
        let outputs = &scratch.outputs;
        compute.pool.chunks(out, ADDED_TOKENS * hidden, |i, out| {
            add_outputs(compute.isa, &wave, (outputs, hidden), i * ADDED_TOKENS, out);
        });
        let bytes = wave.records.len() * input.layout.record_bytes();
        timing.add(Stage::Experts, started, bytes);
    }
    scratch.by_expert = by_expert;
    Ok(())
}

/// One token of each of several timelines. An expert that any of them needs is asked for once, and
/// what has landed is computed together. Every row gets the bits of [`one_token`].
fn strangers(
    compute: &Compute,
    input: &MoeInput,
    scratch: &mut ExpertScratch,
    tmp: &mut Temporary,
    timing: &mut Timing,
    out: &mut [f32],
) -> Result<()> {
    let hidden = input.layout.gate.cols;
    let tokens = out.len() / hidden;
    let top_k = input.routes.experts.len() / tokens;
    sort_by_expert(input.routes, tokens, scratch);
    let by_expert = std::mem::take(&mut scratch.by_expert);
    let groups: Vec<&[Pair]> = by_expert.chunk_by(|a, b| a.expert == b.expert).collect();
    let experts: Vec<ExpertId> = groups.iter().map(|pairs| pairs[0].expert).collect();
    let mut fetch = input.store.fetch(input.layer, &experts);
    shared(compute, input, scratch, tmp, timing, out);

    let differ = prepare_rows(compute, input, scratch, timing);
    sized(&mut scratch.kept, tokens * top_k * hidden);
    loop {
        let started = Instant::now();
        let mut landed = Landed::new();
        fetch.ready(&mut landed)?;
        timing.add(Stage::Fetch, started, 0);
        if landed.is_empty() {
            break;
        }
        let started = Instant::now();
        let pairs: Vec<Pair> = landed.iter().flat_map(|(i, _)| groups[*i]).copied().collect();
        let wave = Wave::landed(landed, &groups, &pairs);
        compute_wave(compute, input, (&wave, differ), scratch);
        keep_outputs(&wave, (&scratch.outputs, hidden), top_k, &mut scratch.kept);
        let bytes = wave.records.len() * input.layout.record_bytes();
        timing.add(Stage::Experts, started, bytes);
    }
    let (kept, weights) = (&scratch.kept, &input.routes.weights);
    compute.pool.chunks(out, hidden, |t, out| {
        let own = t * top_k..(t + 1) * top_k;
        let outputs = kept[t * top_k * hidden..].chunks_exact(hidden);
        for (weight, output) in weights[own].iter().zip(outputs) {
            compute.isa.axpy(*weight, output, out);
        }
    });
    scratch.by_expert = by_expert;
    Ok(())
}

/// Puts all rows into the forms that gate and up take; gives whether those differ.
fn prepare_rows(
    compute: &Compute,
    input: &MoeInput,
    scratch: &mut ExpertScratch,
    timing: &mut Timing,
) -> bool {
    let started = Instant::now();
    let formats = (input.layout.gate.precision.format(), input.layout.up.precision.format());
    let differ = compute.prepare_forms(formats, input.x, scratch.whole.each_mut());
    timing.add(Stage::Experts, started, 0);
    differ
}

/// Records that are computed together, and the tokens of each.
struct Wave<'s, 'p> {
    records: Vec<Record<'s>>,
    ends: Vec<usize>, // of each record's pairs
    pairs: &'p [Pair],
}

/// What a wave holds at most, its first record apart.
#[derive(Clone, Copy)]
struct Most {
    pairs: usize,
    records: usize,
}

impl<'s, 'p> Wave<'s, 'p> {
    /// The next record, waited for, and those after it that are ready by now.
    fn collect(fetch: &mut Fetch<'s>, pairs: &'p [Pair], most: Most) -> Result<Self> {
        let first = fetch.next_in_order()?.expect("one record for each distinct expert");
        let mut wave = Self { records: vec![first], ends: Vec::new(), pairs: &[] };
        for group in pairs.chunk_by(|a, b| a.expert == b.expert) {
            let end = wave.pairs.len() + group.len();
            if !wave.ends.is_empty() {
                if end > most.pairs || wave.records.len() == most.records {
                    break;
                }
                let Some(record) = fetch.next_if_ready()? else { break };
                wave.records.push(record);
            }
            wave.ends.push(end);
            wave.pairs = &pairs[..end];
        }
        Ok(wave)
    }

    /// Records that have landed, each with its place among the groups; `pairs` are theirs.
    fn landed(landed: Landed<'s>, groups: &[&[Pair]], pairs: &'p [Pair]) -> Self {
        let mut ends = Vec::with_capacity(landed.len());
        let mut records = Vec::with_capacity(landed.len());
        for (group, record) in landed {
            ends.push(ends.last().copied().unwrap_or(0) + groups[group].len());
            records.push(record);
        }
        Self { records, ends, pairs }
    }

    /// Pairs of a record.
    fn range(&self, record: usize) -> Range<usize> {
        let start = if record == 0 { 0 } else { self.ends[record - 1] };
        start..self.ends[record]
    }

    /// Ends of every record's tiles, `[record][tile][tokens][TILE_ROWS]`.
    fn tile_ends(&self, tiles: usize, ends: &mut Vec<usize>) {
        ends.clear();
        for record in 0..self.records.len() {
            let range = self.range(record);
            let start = range.start * tiles * TILE_ROWS;
            ends.extend((1..=tiles).map(|tile| start + tile * range.len() * TILE_ROWS));
        }
    }
}

/// The outputs of a wave's experts for their tokens, `scratch.outputs [record][tile][tokens]
/// [TILE_ROWS]`. Each step is one parallel region over all experts. The chunk has been prepared;
/// `differ` says whether gate and up want different forms.
fn compute_wave(
    compute: &Compute,
    input: &MoeInput,
    (wave, differ): (&Wave, bool),
    scratch: &mut ExpertScratch,
) {
    let (layout, isa) = (input.layout, compute.isa);
    let (hidden, width, count) = (layout.gate.cols, layout.gate.rows, wave.pairs.len());
    pick(compute, input, (wave, differ), scratch);

    let ExpertScratch { gathered, picked, tiles, ends, active, outputs, middle, .. } = scratch;
    let other = &picked[usize::from(differ)];
    let tiles_each = tiled(width) / TILE_ROWS;
    let made = sized(tiles, tiled(width) * count);
    wave.tile_ends(tiles_each, ends);
    compute.pool.parts(made, ends, |i, y| {
        let (record, range) = (&wave.records[i / tiles_each], wave.range(i / tiles_each));
        let x = if gathered.is_empty() {
            &[]
        } else {
            &gathered[range.start * hidden..range.end * hidden]
        };
        let forms = (picked[0].range(x, range.clone(), count), other.range(x, range, count));
        let w = (&layout.gate.rows(record), &layout.up.rows(record));
        gate_up_tile(isa, w, i % tiles_each, forms, y);
    });
    let active = sized(active, count * width);
    ends.clear();
    ends.extend(wave.ends.iter().map(|end| end * width));
    compute.pool.parts(active, ends, |i, out| {
        let range = wave.range(i);
        let made = &made[range.start * tiled(width)..range.end * tiled(width)];
        join(made, range.len(), 0, width, out);
    });

    compute.prepare(compute.arithmetic, layout.down.precision.format(), active, middle);
    let tiles_each = tiled(hidden) / TILE_ROWS;
    let outputs = sized(outputs, tiled(hidden) * count);
    wave.tile_ends(tiles_each, ends);
    compute.pool.parts(outputs, ends, |i, y| {
        let (record, range) = (&wave.records[i / tiles_each], wave.range(i / tiles_each));
        let floats = multiply_floats(width, range.len());
        let x = middle.range(&active[range.start * width..range.end * width], range, count);
        let down = layout.down.rows(record);
        with_scratch(floats, |scratch| {
            x.multiply(isa, &down, i % tiles_each * TILE_ROWS, y, scratch);
        });
    });
}

/// Copies the wave's outputs to their places in `kept [tokens][top_k][hidden]`.
fn keep_outputs(wave: &Wave, (outputs, hidden): (&[f32], usize), top_k: usize, kept: &mut [f32]) {
    for record in 0..wave.records.len() {
        let range = wave.range(record);
        let outputs = &outputs[range.start * tiled(hidden)..];
        for (place, pair) in wave.pairs[range.clone()].iter().enumerate() {
            let to = (pair.token as usize * top_k + pair.rank as usize) * hidden;
            join(outputs, range.len(), place, hidden, &mut kept[to..to + hidden]);
        }
    }
}

/// The wave's tokens in the forms for gate and up, one after the other.
fn pick(
    compute: &Compute,
    input: &MoeInput,
    (wave, differ): (&Wave, bool),
    scratch: &mut ExpertScratch,
) {
    let hidden = input.layout.gate.cols;
    scratch.tokens.clear();
    scratch.tokens.extend(wave.pairs.iter().map(|pair| pair.token));
    scratch.gathered.clear();
    if scratch.whole[0].is_exact() {
        for token in &scratch.tokens {
            scratch.gathered.extend_from_slice(&input.x[*token as usize * hidden..][..hidden]);
        }
    }
    let forms = scratch.whole.iter().zip(&mut scratch.picked).take(1 + usize::from(differ));
    for (whole, picked) in forms {
        compute.gather(whole, input.x.len() / hidden, &scratch.tokens, picked);
    }
}

/// Adds the wave's outputs, `[record][tile][tokens][TILE_ROWS]`, to the tokens from `first` on:
/// `out [..][hidden]`.
fn add_outputs(
    isa: Isa,
    wave: &Wave,
    (outputs, hidden): (&[f32], usize),
    first: usize,
    out: &mut [f32],
) {
    let tokens = first..first + out.len() / hidden;
    for record in 0..wave.records.len() {
        let range = wave.range(record);
        let outputs = &outputs[range.start * tiled(hidden)..];
        for (place, pair) in wave.pairs[range.clone()].iter().enumerate() {
            if !tokens.contains(&(pair.token as usize)) {
                continue;
            }
            let out = &mut out[(pair.token as usize - first) * hidden..][..hidden];
            for (tile, out) in out.chunks_mut(TILE_ROWS).enumerate() {
                let from = (tile * range.len() + place) * TILE_ROWS;
                isa.axpy(pair.weight, &outputs[from..][..out.len()], out);
            }
        }
    }
}

/// Fills `by_expert`, experts ascending, then tokens.
fn sort_by_expert(routes: &Routes, tokens: usize, scratch: &mut ExpertScratch) {
    let top_k = routes.experts.len() / tokens;
    scratch.by_expert.clear();
    for (i, (&expert, &weight)) in routes.experts.iter().zip(&routes.weights).enumerate() {
        let (token, rank) = ((i / top_k) as u32, (i % top_k) as u32);
        scratch.by_expert.push(Pair { expert, token, rank, weight });
    }
    scratch.by_expert.sort_unstable_by_key(|pair| (pair.expert, pair.token));
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
