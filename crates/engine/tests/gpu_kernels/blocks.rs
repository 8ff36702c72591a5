//! What lies between the matrices: attention, the delta rule, norms, the choice of experts.
//!
//! Each against its plain form in f64: a softmax in two passes, the recurrence token by token.

use flash_moe_kernels::f16_to_f32;
use wgpu::{BindGroup, Buffer};

use super::super::dense::{Packing, Segment};
use super::super::layout::{DELTA_TOKENS, SPLITS_MAX, attend_blocks, grouped};
use super::{Bench, Random, assert_close, rounding, shape, sigmoid, silu, stands, wide};
use crate::container::Precision;
use crate::shape::{Attention, DeltaNet, Shape};

/// Heads, key/value heads, width of a head, rotated dimensions, gate.
const ATTENTIONS: [(usize, usize, usize, usize, bool); 3] =
    [(6, 2, 48, 16, true), (4, 4, 16, 16, false), (20, 1, 256, 64, true)];
// 3, 1 and 20 query heads to a key/value head: rows of a block that end within a token.

fn attending(
    (heads, kv_heads, head_dim, rotary_dims, gate): (usize, usize, usize, usize, bool),
) -> Shape {
    let mut shape = shape();
    let rest = shape.attention.clone();
    shape.attention = Attention { heads, kv_heads, head_dim, rotary_dims, gate, ..rest };
    shape
}

/// Keys and values of a layer, on the device.
struct Cache<'a> {
    a: &'a Attention,
    halves: bool,
    buffer: Buffer,
    groups: [BindGroup; 2], // read, written
}

impl<'a> Cache<'a> {
    /// Of so many positions, with numbers everywhere, also where no position is yet.
    fn new(bench: &'a Bench, positions: usize, halves: bool, random: &mut Random) -> Self {
        let a = &bench.shape.attention;
        let count = positions.div_ceil(64) * 2 * a.kv_heads * 64 * a.head_dim;
        let numbers = random.vector(count);
        let bytes: Vec<u8> = match halves {
            true => numbers
                .iter()
                .flat_map(|x| flash_moe_kernels::f32_to_f16(*x).to_le_bytes())
                .collect(),
            false => bytemuck::cast_slice(&numbers).to_vec(),
        };
        let (device, views) = (&bench.stand.device, &bench.stand.views);
        let buffer = device.filled("cache", &bytes).expect("memory");
        let groups = [views.read_group(device, &buffer), device.group(&views.write, &[&buffer])]
            .map(|group| group.expect("a group"));
        Self { a, halves, buffer, groups }
    }

    /// Everything, as numbers.
    fn numbers(&self, bench: &Bench) -> Vec<f32> {
        let bytes = self.buffer.size() as usize;
        let words = bench.floats(&self.buffer, 0, bytes / 4);
        match self.halves {
            false => words,
            true => {
                bytemuck::cast_slice::<f32, u16>(&words).iter().map(|x| f16_to_f32(*x)).collect()
            }
        }
    }

    /// Where the key (`part` 0) or the value (1) of a position begins.
    fn at(&self, part: usize, kv_head: usize, position: usize) -> usize {
        let row = ((position / 64 * 2 + part) * self.a.kv_heads + kv_head) * 64 + position % 64;
        row * self.a.head_dim
    }
}

/// A head's row normed and rotated.
fn turned(row: &[f32], weights: &[f32], (cos, sin): (&[f32], &[f32]), eps: f32) -> Vec<f64> {
    let squares: f64 = row.iter().map(|x| f64::from(*x).powi(2)).sum();
    let root = (squares / row.len() as f64 + f64::from(eps)).sqrt();
    let normed: Vec<f64> =
        row.iter().zip(weights).map(|(x, w)| f64::from(*x) * f64::from(*w) / root).collect();
    let mut out = normed.clone();
    for j in 0..cos.len() {
        let (x, y) = (normed[j], normed[j + cos.len()]);
        let (c, s) = (f64::from(cos[j]), f64::from(sin[j]));
        (out[j], out[j + cos.len()]) = (x * c - y * s, x * s + y * c);
    }
    out
}

/// One row of attention in two passes, and the size of what its scores add up.
fn attended(
    cache: &Cache,
    numbers: &[f32],
    kv_head: usize,
    query: &[f32],
    seen: usize,
) -> (Vec<f64>, f64) {
    let width = cache.a.head_dim;
    let root = (width as f64).sqrt();
    let mut size = 0.0f64;
    let scores: Vec<f64> = (0..seen)
        .map(|p| {
            let key = &numbers[cache.at(0, kv_head, p)..][..width];
            let products = key.iter().zip(query).map(|(k, q)| f64::from(*k) * f64::from(*q) / root);
            size = size.max(products.clone().map(f64::abs).sum());
            products.sum()
        })
        .collect();
    let most = scores.iter().copied().fold(f64::MIN, f64::max);
    let total: f64 = scores.iter().map(|s| (s - most).exp()).sum();
    let mut out = vec![0.0; width];
    for (p, score) in scores.iter().enumerate() {
        let value = &numbers[cache.at(1, kv_head, p)..][..width];
        let weight = (score - most).exp() / total;
        out.iter_mut().zip(value).for_each(|(out, v)| *out += weight * f64::from(*v));
    }
    (out, size)
}

/// Rounding of a row: its scores, which weigh exponentially, then sums of weighted values of size 1.
fn attention_bound(head_dim: usize, size: f64, seen: usize) -> f64 {
    rounding(2 * (head_dim / 4 + 10), size) + rounding(seen + seen / 16 + 30, 1.0)
}

/// What the kernels give for tokens from a position on.
struct Turn<'a> {
    bench: &'a Bench<'a>,
    cache: &'a Cache<'a>,
    first: usize,
    tokens: usize,
}

impl Turn<'_> {
    fn stride(&self) -> usize {
        let a = self.cache.a;
        if a.gate { 2 * a.head_dim } else { a.head_dim }
    }

    /// Norms, rotates and keeps random heads; sees that queries, keys and values are what they should.
    fn turn(&self, random: &mut Random) {
        let (bench, a, tokens) = (self.bench, self.cache.a, self.tokens);
        let stride = self.stride();
        let queries = random.vector(tokens * a.heads * stride);
        let [keys, values] = [0, 1].map(|_| random.vector(tokens * a.kv_heads * a.head_dim));
        let [cos, sin] = [0, 1].map(|_| random.vector(tokens * a.rotary_dims / 2));
        let norms = random.vector(2 * a.head_dim);
        for (name, values) in [
            ("QUERY_AT", &queries),
            ("KEY_AT", &keys),
            ("VALUE_AT", &values),
            ("COS_AT", &cos),
            ("SIN_AT", &sin),
        ] {
            bench.put(name, values);
        }
        let views = &bench.stand.views;
        let vectors = bench.group(&norms);
        let counts = [a.heads + a.kv_heads, tokens, 1];
        let source = bench.sources.turn(self.cache.halves);
        let groups = [&vectors, &self.cache.groups[1]];
        bench.run(&source, &[&views.read, &views.write], &[(&groups, counts)]);
        let (got, numbers) = (bench.get("QUERY_AT", queries.len()), self.cache.numbers(bench));
        let half = a.rotary_dims / 2;
        // A half has 11 bits.
        let of_half = if self.cache.halves { 6.0 / 2048.0 } else { 0.0 };
        let bound = rounding(a.head_dim / 64 + 30, 6.0);
        for t in 0..tokens {
            let angles = (&cos[t * half..][..half], &sin[t * half..][..half]);
            for head in 0..a.heads {
                let at = (t * a.heads + head) * stride;
                let row = &queries[at..][..a.head_dim];
                let want = turned(row, &norms[..a.head_dim], angles, bench.shape.rms_eps);
                assert_close("query", &got[at..][..a.head_dim], &want, bound);
            }
            for head in 0..a.kv_heads {
                let row = (t * a.kv_heads + head) * a.head_dim;
                let key = turned(
                    &keys[row..][..a.head_dim],
                    &norms[a.head_dim..],
                    angles,
                    bench.shape.rms_eps,
                );
                let value = wide(&values[row..][..a.head_dim]);
                for (part, want) in [key, value].iter().enumerate() {
                    let at = self.cache.at(part, head, self.first + t);
                    let got = &numbers[at..][..a.head_dim];
                    assert_close("kept", got, want, bound + of_half);
                }
            }
        }
    }

    /// Sees that the mix of every token is what a plain softmax over the cache gives.
    fn check(&self, what: &str) {
        let (bench, a) = (self.bench, self.cache.a);
        let queries = bench.get("QUERY_AT", self.tokens * a.heads * self.stride());
        let numbers = self.cache.numbers(bench);
        let got = bench.get("MIXED_AT", self.tokens * a.heads * a.head_dim);
        for (row, got) in got.chunks(a.head_dim).enumerate() {
            let (t, head) = (row / a.heads, row % a.heads);
            let (query, gates) =
                queries[row * self.stride()..][..self.stride()].split_at(a.head_dim);
            let seen = self.first + t + 1;
            let kv_head = head / (a.heads / a.kv_heads);
            let (mut want, size) = attended(self.cache, &numbers, kv_head, query, seen);
            want.iter_mut().zip(gates).for_each(|(want, gate)| *want *= sigmoid(f64::from(*gate)));
            let what = format!("{what}, {a:?}, token {t} after {}, head {head}", self.first);
            assert_close(&what, got, &want, attention_bound(a.head_dim, size, seen));
        }
    }
}

#[test]
fn attention_of_one_token_is_a_plain_softmax() {
    for stand in stands() {
        for (sizes, halves) in ATTENTIONS.into_iter().zip([false, true, true]) {
            let shape = attending(sizes);
            let bench = Bench::new(&stand, &shape, &[], 1);
            let mut random = Random(11);
            let a = &shape.attention;
            // The last one leaves parts of three pages each.
            for first in [0, 63, 64, 200, 64 * 2 * SPLITS_MAX + 5] {
                if first > 200 && a.head_dim > 16 {
                    continue;
                }
                let cache = Cache::new(&bench, first + 1, halves, &mut random);
                let turn = Turn { bench: &bench, cache: &cache, first, tokens: 1 };
                let pages = (first + 1).div_ceil(64);
                let pages_each = pages.div_ceil(SPLITS_MAX);
                bench.put_numbers("TOKEN_AT", &[first, pages_each]);
                turn.turn(&mut random);
                let read = &[&stand.views.read][..];
                let attend = bench.sources.attend(halves);
                let counts = [a.heads / grouped(&shape), pages.div_ceil(pages_each), 1];
                bench.run(&attend, read, &[(&[&cache.groups[0]], counts)]);
                bench.run(&bench.sources.combine(), &[], &[(&[], [a.heads, 1, 1])]);
                turn.check("attend");
            }
        }
    }
}

#[test]
fn attention_of_a_chunk_is_a_plain_softmax_over_what_each_token_sees() {
    for stand in stands() {
        for (sizes, halves) in ATTENTIONS.into_iter().zip([true, false, false]) {
            let shape = attending(sizes);
            let bench = Bench::new(&stand, &shape, &[], 70);
            let mut random = Random(12);
            let a = &shape.attention;
            for (first, tokens) in [(0, 2), (0, 70), (62, 33), (64, 3), (130, 17)] {
                let cache = Cache::new(&bench, first + tokens, halves, &mut random);
                let turn = Turn { bench: &bench, cache: &cache, first, tokens };
                bench.put_numbers("TOKEN_AT", &[first, tokens]);
                turn.turn(&mut random);
                let attend = bench.sources.attend_rows(halves, a.head_dim);
                let counts = [a.kv_heads, attend_blocks(&shape, tokens), 1];
                bench.run(&attend, &[&stand.views.read], &[(&[&cache.groups[0]], counts)]);
                turn.check("attend rows");
            }
        }
    }
}

impl Turn<'_> {
    /// Attention of a chunk in parts of so many positions, over scratch that is no number before.
    fn in_parts(&self, positions: usize) {
        let (bench, a, tokens) = (self.bench, self.cache.a, self.tokens);
        let parts = (self.first + tokens).div_ceil(positions);
        assert!(parts <= SPLITS_MAX);
        let rows = tokens * a.heads;
        bench.put("PARTS_AT", &vec![f32::NAN; rows * parts * (a.head_dim + 2)]);
        bench.put("MIXED_AT", &vec![f32::NAN; rows * a.head_dim]);
        bench.put_numbers("TOKEN_AT", &[self.first, tokens, 0, 0, positions]);
        let attend = bench.sources.attend_rows_part(self.cache.halves, a.head_dim);
        let counts = [a.kv_heads, attend_blocks(bench.shape, tokens), parts];
        bench.run(&attend, &[&bench.stand.views.read], &[(&[&self.cache.groups[0]], counts)]);
        bench.run(&bench.sources.combine_rows(), &[], &[(&[], [rows, 1, 1])]);
        self.check(&format!("attend in parts of {positions}"));
    }
}

#[test]
fn attention_of_a_chunk_in_parts_is_a_plain_softmax_over_what_each_token_sees() {
    for stand in stands() {
        for (sizes, halves) in ATTENTIONS.into_iter().zip([true, false, true]) {
            let shape = attending(sizes);
            let bench = Bench::new(&stand, &shape, &[], 70);
            let mut random = Random(13);
            // Parts that end before, within and behind pages, and parts behind the end of whole tokens.
            for (first, tokens, parts) in [
                (0, 70, &[32, 64][..]),
                (62, 33, &[32, 64, 96]),
                (130, 17, &[32, 96, 160]),
                (1000, 5, &[32, 512]),
                (64 * 30, 3, &[32, 64 * 30]),
            ] {
                let cache = Cache::new(&bench, first + tokens, halves, &mut random);
                let turn = Turn { bench: &bench, cache: &cache, first, tokens };
                bench.put_numbers("TOKEN_AT", &[first, tokens]);
                turn.turn(&mut random);
                parts.iter().for_each(|positions| turn.in_parts(*positions));
            }
        }
    }
}

/// A delta-net layer's memory and vectors, and the rule in f64.
struct Rule {
    d: DeltaNet,
    position: usize,
    state: Vec<f64>,    // [value_heads][key_dim][value_dim]
    raw: Vec<Vec<f64>>, // the projections of all positions so far, from the third before the first
    conv: Vec<f32>,     // [4][channels]
    rate: Vec<f32>,     // [value_heads]
    dt_bias: Vec<f32>,  // [value_heads]
    largest: f64,       // of all numbers on the way
}

impl Rule {
    fn new(d: &DeltaNet, random: &mut Random, position: usize) -> (Self, Vec<f32>) {
        let states = random.vector(d.value_heads * d.key_dim * d.value_dim);
        let ring = random.vector(4 * d.conv_channels());
        let channels = d.conv_channels();
        let column = |p: usize| wide(&ring[p % 4 * channels..][..channels]);
        let rule = Self {
            state: wide(&states),
            raw: (position..position + 3).map(|p| column(p + 1)).collect(),
            conv: random.vector(4 * channels),
            rate: random.vector(d.value_heads).iter().map(|x| (x + 1.05) * 1.5).collect(),
            dt_bias: random.vector(d.value_heads),
            d: d.clone(),
            position,
            largest: 0.0,
        };
        (rule, [states, ring].concat())
    }

    fn vectors(&self) -> Vec<f32> {
        [&self.conv[..], &self.rate, &self.dt_bias].concat()
    }

    /// Takes a token: what all heads give, `[value_heads][value_dim]`.
    fn take(&mut self, raw: &[f32], a: &[f32], b: &[f32]) -> Vec<f64> {
        self.raw.push(wide(raw));
        self.position += 1;
        let d = self.d.clone();
        let channels = d.conv_channels();
        let window = &self.raw[self.raw.len() - 4..];
        let tap =
            |c: usize| (0..4).map(|j| f64::from(self.conv[j * channels + c]) * window[j][c]).sum();
        let mixed: Vec<f64> = (0..channels).map(|c| silu(tap(c))).collect();
        let unit = |head: usize| -> Vec<f64> {
            let x = &mixed[head * d.key_dim..][..d.key_dim];
            let root = (x.iter().map(|x| x * x).sum::<f64>() + 1e-6).sqrt();
            x.iter().map(|x| x / root).collect()
        };
        let mut out = Vec::new();
        for head in 0..d.value_heads {
            let key_head = head / (d.value_heads / d.key_heads);
            let (q, k) = (unit(key_head), unit(d.key_heads + key_head));
            let v = &mixed[2 * d.key_heads * d.key_dim + head * d.value_dim..][..d.value_dim];
            let x = f64::from(a[head]) + f64::from(self.dt_bias[head]);
            let decay = (-f64::from(self.rate[head]) * (1.0 + x.exp()).ln()).exp();
            let state =
                &mut self.state[head * d.key_dim * d.value_dim..][..d.key_dim * d.value_dim];
            for (j, v) in v.iter().enumerate() {
                let row = |i: usize| i * d.value_dim + j;
                (0..d.key_dim).for_each(|i| state[row(i)] *= decay);
                let on: f64 = (0..d.key_dim).map(|i| state[row(i)] * k[i]).sum();
                let change = sigmoid(f64::from(b[head])) * (v - on);
                (0..d.key_dim).for_each(|i| state[row(i)] += k[i] * change);
                let read: f64 = (0..d.key_dim).map(|i| state[row(i)] * q[i]).sum();
                self.largest = self.largest.max(on.abs()).max(v.abs()).max(read.abs());
                out.push(read / (d.key_dim as f64).sqrt());
            }
        }
        out
    }

    /// What may differ after so many tokens: convolution, norms and gates, then a product over the keys
    /// for each of them. What a token leaves is never more than it found.
    fn bound(&self, tokens: usize) -> f64 {
        rounding(60 + self.d.key_dim + 4 * tokens, 4.0 * self.largest)
    }

    /// Sees that the memory is what the rule left.
    fn check(&self, what: &str, memory: &[f32], bound: f64) {
        let (states, ring) = memory.split_at(self.state.len());
        assert_close(&format!("{what}, state"), states, &self.state, bound);
        let channels = self.d.conv_channels();
        // The newest 3; a token alone leaves the fourth as it is.
        for back in 1..4 {
            let column = &ring[(self.position - back) % 4 * channels..][..channels];
            let want = &self.raw[self.raw.len() - back];
            assert_close(&format!("{what}, history"), column, want, 0.0);
        }
    }
}

fn delta_shapes() -> [Shape; 3] {
    let of = |key_heads, value_heads, key_dim, value_dim| {
        let mut shape = shape();
        shape.delta = Some(DeltaNet { key_heads, value_heads, key_dim, value_dim, conv_taps: 4 });
        shape
    };
    [of(2, 4, 24, 64), of(1, 2, 128, 32), of(1, 1, 256, 32)]
}

#[test]
fn the_delta_rule_takes_tokens_one_by_one() {
    for (stand, shape) in stands().iter().flat_map(|s| delta_shapes().map(|shape| (s, shape))) {
        let d = shape.delta.as_ref().expect("a delta-net");
        let bench = Bench::new(stand, &shape, &[], 1);
        let mut random = Random(21);
        let (mut rule, memory) = Rule::new(d, &mut random, 5);
        let (views, device) = (&stand.views, &stand.device);
        let buffer = device.filled("memory", bytemuck::cast_slice(&memory)).expect("memory");
        let groups = [
            &bench.group(&rule.vectors()),
            &device.group(&views.write, &[&buffer]).expect("a group"),
        ];
        for step in 1..6 {
            let raw = random.vector(d.conv_channels());
            let [a, b] = [0, 1].map(|_| random.vector(d.value_heads));
            bench.put_numbers("TOKEN_AT", &[rule.position]);
            for (name, values) in [("RAW_AT", &raw), ("A_AT", &a), ("B_AT", &b)] {
                bench.put(name, values);
            }
            let counts = [d.value_heads, d.value_dim / 32, 1];
            bench.run(&bench.sources.delta(), &[&views.read, &views.write], &[(&groups, counts)]);
            let want = rule.take(&raw, &a, &b);
            let bound = rule.bound(step);
            let got = bench.get("MIXED_AT", want.len());
            assert_close("delta", &got, &want, bound);
            rule.check("delta", &bench.floats(&buffer, 0, memory.len()), bound);
            let squares: Vec<f64> =
                want.chunks(32).map(|x| x.iter().map(|x| x * x).sum()).collect();
            let got = bench.get("SQUARES_AT", squares.len());
            assert_close("squares", &got, &squares, 64.0 * bound * rule.largest);
        }
    }
}

#[test]
fn the_delta_rule_takes_chunks_of_any_length() {
    for (stand, shape) in stands().iter().flat_map(|s| delta_shapes().map(|shape| (s, shape))) {
        let d = shape.delta.as_ref().expect("a delta-net");
        let bench = Bench::new(stand, &shape, &[], 100);
        let mut random = Random(22);
        let (mut rule, memory) = Rule::new(d, &mut random, 7);
        let (views, device) = (&stand.views, &stand.device);
        let buffer = device.filled("memory", bytemuck::cast_slice(&memory)).expect("memory");
        let vectors = bench.group(&rule.vectors());
        let [read, write] =
            [views.read_group(device, &buffer), device.group(&views.write, &[&buffer])]
                .map(|group| group.expect("a group"));
        let mut taken = 0;
        for tokens in [2, 33, 1, 31, 100, 32] {
            let raw = random.vector(tokens * d.conv_channels());
            let [a, b] = [0, 1].map(|_| random.vector(tokens * d.value_heads));
            bench.put_numbers("TOKEN_AT", &[rule.position, tokens]);
            for (name, values) in [("RAW_AT", &raw), ("A_AT", &a), ("B_AT", &b)] {
                bench.put(name, values);
            }
            let heads = 2 * d.key_heads + d.value_heads;
            let rows = bench.sources.delta_rows();
            let groups = [&vectors, &read];
            bench.run(&rows, &[&views.read, &views.read], &[(&groups, [heads, tokens, 1])]);
            let pairs = bench.sources.delta_pairs();
            let counts = [d.value_heads, tokens.div_ceil(DELTA_TOKENS), 1];
            bench.run(&pairs, &[&views.read], &[(&[&vectors], counts)]);
            let scan = bench.sources.delta_scan();
            let counts = [d.value_heads, d.value_dim / 32, 1];
            let groups = [&vectors, &write];
            bench.run(&scan, &[&views.read, &views.write], &[(&groups, counts)]);
            let mut want = Vec::new();
            for t in 0..tokens {
                let of_heads = t * d.value_heads..(t + 1) * d.value_heads;
                let raw = &raw[t * d.conv_channels()..][..d.conv_channels()];
                want.extend(rule.take(raw, &a[of_heads.clone()], &b[of_heads]));
            }
            taken += tokens;
            let bound = rule.bound(taken);
            let what = format!("{tokens} tokens, {d:?}");
            assert_close(&what, &bench.get("MIXED_AT", want.len()), &want, bound);
            rule.check(&what, &bench.floats(&buffer, 0, memory.len()), bound);
        }
    }
}

#[test]
fn rows_are_normed() {
    let shape = shape();
    let d = shape.delta.as_ref().expect("a delta-net");
    let (tokens, mut random) = (33, Random(31));
    let matrix = random.matrix(Precision::F32, 1, shape.hidden);
    let weights = random.vector(shape.hidden);
    let (h, mixed) =
        (random.vector(tokens * shape.hidden), random.vector(tokens * d.value_width()));
    let z = random.vector(tokens * d.value_width());
    let norm = |x: &[f32]| turned(x, &weights[..x.len()], (&[], &[]), shape.rms_eps);
    let normed: Vec<f64> = h.chunks(shape.hidden).flat_map(norm).collect();
    let gated: Vec<f64> = mixed
        .chunks(d.value_dim)
        .flat_map(norm)
        .zip(&z)
        .map(|(x, z)| x * silu(f64::from(*z)))
        .collect();
    for stand in stands() {
        let bench = Bench::new(&stand, &shape, &[Precision::F32], tokens);
        let packing = Packing {
            precisions: &bench.sources.precisions,
            buffer_bytes: 1 << 20,
            views: &stand.views,
        };
        let segments = [Segment { matrix: &matrix, to: 0, chunk_to: 0 }];
        let parts = packing.pack(&stand.device, "test", &segments, &weights, 1).expect("memory");
        for (name, values) in [("H_AT", &h), ("MIXED_AT", &mixed), ("Z_AT", &z)] {
            bench.put(name, values);
        }
        let (read, group) = (&[&stand.views.read][..], [&parts[0].group]);
        bench.run(&bench.sources.norm_rows(), read, &[(&group, [tokens, 1, 1])]);
        let bound = rounding(20, 4.0);
        assert_close("norm", &bench.get("NORMED_AT", normed.len()), &normed, bound);
        bench.run(&bench.sources.heads_rows(), read, &[(&group, [d.value_heads, tokens, 1])]);
        assert_close("heads", &bench.get("MIXED_AT", gated.len()), &gated, bound);
    }
}

#[test]
fn the_largest_logits_are_chosen_and_of_equals_the_first() {
    for (stand, (experts, top_k, renormalise)) in stands().iter().flat_map(|stand| {
        [(37, 5, true), (300, 8, false), (64, 1, true), (70, 40, true)].map(|sizes| (stand, sizes))
    }) {
        let mut shape = shape();
        (shape.moe.experts, shape.moe.top_k) = (experts, top_k);
        shape.moe.renormalise = renormalise;
        let (tokens, mut random) = (33, Random(41));
        // Few distinct values, so that there are equals; the sum makes one zero of both.
        let coarse = |x: &f32| (x * 20.0).round() / 4.0 + 0.0;
        let logits: Vec<f32> = random.vector(tokens * experts).iter().map(coarse).collect();
        let bench = Bench::new(stand, &shape, &[], tokens);
        bench.put("ROUTER_AT", &logits);
        bench.run(&bench.sources.route(), &[], &[(&[], [tokens, 1, 1])]);
        let chosen = bench.get("CHOSEN_AT", tokens * top_k);
        let weights = bench.get("WEIGHTS_AT", tokens * top_k);
        for (t, logits) in logits.chunks(experts).enumerate() {
            let mut order: Vec<usize> = (0..experts).collect();
            order.sort_by(|a, b| logits[*b].total_cmp(&logits[*a]).then(a.cmp(b)));
            let ids: Vec<usize> =
                chosen[t * top_k..][..top_k].iter().map(|x| x.to_bits() as usize).collect();
            assert_eq!(ids, order[..top_k], "token {t}");
            let power = |e: &usize| f64::from(logits[*e]).exp();
            let all = if renormalise { &order[..top_k] } else { &order[..] };
            let total: f64 = all.iter().map(power).sum();
            let want: Vec<f64> = order[..top_k].iter().map(|e| power(e) / total).collect();
            assert_close(
                "weights",
                &weights[t * top_k..][..top_k],
                &want,
                rounding(experts + 40, 1.0),
            );
        }
    }
}
