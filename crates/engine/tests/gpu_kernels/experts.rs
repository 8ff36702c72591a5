//! Experts in their slots, for one token and for many.
//!
//! Records lie in an order that is not the experts', and gate, up and down are stored differently.

use wgpu::BindGroup;

use super::super::chunk::{sort, tokens_at};
use super::super::dense::{Packing, Segment};
use super::super::layout::short_tiles_at;
use super::super::source::{Rows, Slabs, Tile};
use super::{Bench, MANTISSA, Random, Rounded, Stand, by_team, precisions, shape, sigmoid, stands};
use crate::container::{Matrix, Precision, RecordLayout};
use crate::shape::{ExpertId, Shape};

const EXPERTS: usize = 7;
const TOP_K: usize = 3;
/// Width of the shared expert.
const SHARED: usize = 128;

/// Experts of one layer in slots, in an order that is not theirs.
struct Records {
    experts: Vec<[Matrix; 3]>, // gate, up, down
    slabs: Slabs,
}

impl Records {
    fn new(random: &mut Random, shape: &Shape, precisions: [Precision; 3], slabs: usize) -> Self {
        let (hidden, width) = (shape.hidden, shape.moe.width);
        let layout = RecordLayout::new(hidden, width, precisions).expect("whole groups");
        let expert = |_| {
            let [gate, up, down] = precisions;
            [
                random.matrix(gate, width, hidden),
                random.matrix(up, width, hidden),
                random.matrix(down, hidden, width),
            ]
        };
        let experts = (0..EXPERTS).map(expert).collect();
        let slot_words = layout.record_bytes().div_ceil(16) * 4;
        let slots_each = EXPERTS.div_ceil(slabs);
        Self { experts, slabs: Slabs { layout, slabs, slots_each, slot_words } }
    }

    fn slot(expert: usize) -> usize {
        (expert * 3 + 2) % EXPERTS
    }

    fn group(&self, stand: &Stand) -> BindGroup {
        let slot_bytes = self.slabs.slot_words * 4;
        let mut slots = vec![0u8; slot_bytes * self.slabs.slots_each * self.slabs.slabs];
        for (id, expert) in self.experts.iter().enumerate() {
            let record: Vec<u8> =
                expert.iter().flat_map(Matrix::parts).flatten().copied().collect();
            slots[Self::slot(id) * slot_bytes..][..record.len()].copy_from_slice(&record);
        }
        let places: Vec<u32> = (0..EXPERTS).map(|e| Self::slot(e) as u32).collect();
        let device = &stand.device;
        let filled = |bytes: &[u8]| device.filled("test", bytes).expect("memory");
        let places = filled(bytemuck::cast_slice(&places));
        let slabs: Vec<_> = slots.chunks(slot_bytes * self.slabs.slots_each).map(filled).collect();
        let slabs: Vec<_> = slabs.iter().map(wgpu::Buffer::as_entire_buffer_binding).collect();
        stand.views.slots_group(device, &places, &slabs).expect("a group")
    }

    /// silu(gate x) * (up x) of an expert.
    fn active(&self, expert: usize, x: &[f32], form: (usize, f64)) -> Rounded {
        let [gate, up, _] = &self.experts[expert];
        let x = Rounded::exact(x);
        x.times(gate, form).gating(&x.times(up, form))
    }
}

/// Layouts of gate, up and down.
fn mixtures() -> Vec<[Precision; 3]> {
    precisions().chunks_exact(3).map(|some| [some[0], some[2], some[1]]).collect()
}

/// Buffers for the slots of a mixture: a driver takes long to compile odd bits out of several.
fn slabs(mixture: usize) -> usize {
    match mixture {
        0 => 3,
        3 => 2,
        _ => 1,
    }
}

fn small() -> Shape {
    let mut shape = shape();
    (shape.hidden, shape.moe.width, shape.moe.shared_width) = (256, 128, SHARED);
    (shape.moe.experts, shape.moe.top_k) = (EXPERTS, TOP_K);
    shape
}

/// A vector in the order in which kernels stage it.
fn staged(x: &[f32]) -> Vec<f32> {
    let of = |at: usize| (at & !31) + ((at >> 2) & 7) + 8 * (at & 3);
    (0..x.len()).map(|at| x[of(at)]).collect()
}

#[test]
fn the_chosen_experts_of_a_token_are_added_up_with_the_shared_one() {
    let shape = small();
    let mut random = Random(51);
    for (i, precisions) in mixtures().into_iter().enumerate() {
        let records = Records::new(&mut random, &shape, precisions, slabs(i));
        let x = random.vector(shape.hidden);
        let logits = random.vector(EXPERTS);
        let h = random.vector(shape.hidden);
        // In half of them, and in a layout of its own.
        let shared = (i % 2 == 0).then(|| random.matrix(precisions[i % 3], shape.hidden, SHARED));
        let [gate, up] = [0, 1].map(|_| random.vector(SHARED));
        for stand in stands() {
            let mut shape = shape.clone();
            shape.moe.shared_width = if shared.is_some() { SHARED } else { 0 };
            let bench = Bench::new(&stand, &shape, &precisions, 1);
            let slots = records.group(&stand);
            bench.put("NORMED_AT", &staged(&x));
            bench.put("ROUTER_AT", &logits);
            bench.put("H_AT", &h);
            bench.put_numbers("RANKS_AT", &[0, 1, 2]);
            let view = &stand.views.slots[records.slabs.slabs - 1];
            let rows = slabs(i).min(2);
            let source = bench.sources.experts_up(&records.slabs, shape.hidden, rows);
            let counts = [shape.moe.width.div_ceil(8 * rows), TOP_K, 1];
            bench.run(&source, &[view], &[(&[&slots], counts)]);
            let chosen: Vec<usize> =
                (bench.get("CHOSEN_AT", TOP_K).iter()).map(|id| id.to_bits() as usize).collect();
            let weights = bench.get("WEIGHTS_AT", TOP_K);
            let mut want = Rounded::exact(&h);
            let form = (by_team(shape.hidden), MANTISSA);
            for (expert, weight) in chosen.iter().zip(&weights) {
                let active = records.active(*expert, &x, form).scaled(f64::from(*weight));
                want.add(&active.times(&records.experts[*expert][2], form));
            }
            let longest = TOP_K * shape.moe.width + shape.moe.shared_width;
            let kind = shared.as_ref().map(Matrix::precision);
            let source = bench.sources.experts_down(&records.slabs, kind, longest, 1);
            let counts = [shape.hidden.div_ceil(8), 1, 1];
            match &shared {
                None => bench.run(&source, &[view], &[(&[&slots], counts)]),
                Some(matrix) => {
                    bench.put("SHARED_GATE_AT", &gate);
                    bench.put("SHARED_UP_AT", &up);
                    bench.put("SHARED_SIGMOID_AT", &[0.25]);
                    let gated = Rounded::exact(&gate).gating(&Rounded::exact(&up));
                    want.add(&gated.scaled(sigmoid(0.25)).times(matrix, form));
                    let part = packed(&bench, matrix);
                    bench.run(&source, &[view, &stand.views.read], &[(&[&slots, &part], counts)]);
                }
            }
            want.check(&format!("{precisions:?}"), &bench.get("H_AT", h.len()));
        }
    }
}

fn packed(bench: &Bench, matrix: &Matrix) -> BindGroup {
    let packing = Packing {
        precisions: &bench.sources.precisions,
        buffer_bytes: 1 << 20,
        views: &bench.stand.views,
    };
    let segments = [Segment { matrix, to: bench.layout.at("H_AT"), chunk_to: 0 }];
    let mut parts = packing.pack(&bench.stand.device, "shared", &segments, &[], 1).expect("memory");
    parts.pop().expect("a part").group
}

/// So many tokens' choices: the first expert has all of them, the others a few.
fn choices(tokens: usize) -> Vec<ExpertId> {
    let of = |t: usize| [0, 1 + t % 2 * (1 + t % 5), 1 + (t + 1) % 2 * (t % 3 + 1)];
    let distinct = |t: usize| {
        let [a, b, mut c] = of(t);
        while c == a || c == b {
            c = (c + 1) % EXPERTS;
        }
        [a, b, c]
    };
    (0..tokens).flat_map(distinct).map(|e| ExpertId(e as u16)).collect()
}

#[test]
fn experts_take_all_of_their_tokens_together() {
    let shape = small();
    let mut random = Random(52);
    let sizes = (shape.hidden, shape.moe.width);
    for (i, precisions) in mixtures().into_iter().enumerate() {
        let records = Records::new(&mut random, &shape, precisions, slabs(i));
        for stand in stands() {
            let bench = Bench::new(&stand, &shape, &[], 75);
            let slots = records.group(&stand);
            let tokens = [1, 33, 75][i % 3];
            let [xs, h] = [0, 1].map(|_| random.vector(tokens * shape.hidden));
            let weights = random.vector(tokens * TOP_K);
            let chosen = choices(tokens);
            let sorted = sort(&chosen, TOP_K);
            let most = 75 * TOP_K;
            let tokens_at = tokens_at(most, EXPERTS);
            let places_at = tokens_at + sorted.tokens.len();
            let mut lists = vec![0; places_at + sorted.places.len()];
            for (at, words) in [
                (0, sorted.tall.as_flattened()),
                (short_tiles_at(most), sorted.short.as_flattened()),
                (tokens_at, &sorted.tokens),
                (places_at, &sorted.places),
            ] {
                lists[at..at + words.len()].copy_from_slice(words);
            }
            bench.put_numbers("TOKEN_AT", &[0, tokens, places_at, tokens_at]);
            for (name, values) in [("NORMED_AT", &xs), ("H_AT", &h), ("WEIGHTS_AT", &weights)] {
                bench.put(name, values);
            }
            let views = &stand.views;
            let lists = bench.group(bytemuck::cast_slice(&lists));
            let groups = [&slots, &lists];
            let kernels = [&views.slots[records.slabs.slabs - 1], &views.read];
            bench.split(Rows::Normed, shape.hidden, tokens);
            let tiles = [(Tile::Tall, sorted.tall.len()), (Tile::Short, sorted.short.len())];
            for (tile, count) in tiles.into_iter().filter(|(_, count)| *count > 0) {
                let up = bench.sources.gemm_up(&records.slabs, sizes, tile);
                bench.run(&up, &kernels, &[(&groups, [sizes.1.div_ceil(64), count, 1])]);
            }
            for (tile, count) in tiles.into_iter().filter(|_| stand.tensor.is_some()) {
                let split = bench.sources.split_experts(sizes, tile);
                bench.run(&split, &[&views.read], &[(&[&lists], [tile.vectors(), count, 1])]);
            }
            for (tile, count) in tiles.into_iter().filter(|(_, count)| *count > 0) {
                let down = bench.sources.gemm_down(&records.slabs, sizes, tile);
                bench.run(&down, &kernels, &[(&groups, [sizes.0.div_ceil(64), count, 1])]);
            }
            bench.run(&bench.sources.join_rows(), &[&views.read], &[(&[&lists], [tokens, 1, 1])]);
            let got = bench.get("H_AT", h.len());
            for (t, got) in got.chunks(shape.hidden).enumerate() {
                let row = t * shape.hidden..(t + 1) * shape.hidden;
                let mut want = Rounded::exact(&h[row.clone()]);
                for rank in 0..TOP_K {
                    let expert = usize::from(chosen[t * TOP_K + rank].0);
                    let active = records.active(expert, &xs[row.clone()], (sizes.0 / 4 + 8, 0.0));
                    let given = active.times(&records.experts[expert][2], (sizes.1 / 4 + 8, 0.0));
                    want.add(&given.scaled(f64::from(weights[t * TOP_K + rank])));
                }
                want.check(&format!("{precisions:?}, token {t}"), got);
            }
        }
    }
}
