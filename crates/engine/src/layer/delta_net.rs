//! The gated delta rule over a fixed-size state.
//!
//! One token runs the recurrence; a chunk of a prompt runs the equal chunked form: inside a chunk of
//! 64 the updates form a unit lower triangular system, solved row by row, and the state is read and
//! written once. The convolution's history is the raw projection, before convolution and silu.

use std::ops::Range;

use flash_moe_kernels::{DeltaHead, Isa};

use crate::compute::{Compute, Temporary, sized, with_scratch};
use crate::shape::{DeltaNet, Shape};
use crate::weights::DeltaNetWeights;

/// Tokens solved together in the chunked form.
const CHUNK: usize = 64;
/// Rows that are solved one by one, after everything above them was subtracted in one product.
const SOLVED: usize = 4;
/// Rows whose product with what is left of the diagonal is formed together.
const TRIANGLE: usize = 16;
/// Fewer tokens than this run the recurrence: the triangular system would cost more.
const CHUNKED_FROM: usize = 8;
/// Epsilon of the norm of queries and keys; on the sum of squares, inside the root.
const NORM_EPS: f32 = 1e-6;
/// Columns of raw projections kept for the convolution; the oldest is only shown in traces.
const HISTORY: usize = 4;

/// What a delta-net layer remembers.
#[derive(Clone)]
pub struct DeltaState {
    /// S of each value head, `[value_heads][key_dim][value_dim]`.
    pub state: Vec<f32>,
    /// The last raw projections, oldest first, `[4][conv_channels]`.
    pub history: Vec<f32>,
}

impl DeltaState {
    /// The state before the first token.
    pub fn new(d: &DeltaNet) -> Self {
        Self {
            state: vec![0.0; d.value_heads * d.key_dim * d.value_dim],
            history: vec![0.0; HISTORY * d.conv_channels()],
        }
    }
}

/// Buffers of one delta-net layer.
#[derive(Default)]
pub struct DeltaScratch {
    raw: Vec<f32>,      // [tokens][conv_channels]
    mixed: Vec<f32>,    // [tokens][conv_channels], after convolution, silu and norm
    z: Vec<f32>,        // [tokens][value_heads][value_dim]
    b: Vec<f32>,        // [tokens][value_heads], then beta
    a: Vec<f32>,        // [tokens][value_heads], then g
    by_head: Vec<f32>,  // [value_heads][tokens][value_dim]
    by_token: Vec<f32>, // [tokens][value_heads][value_dim]
}

impl DeltaScratch {
    /// Floats needed for a chunk of tokens.
    pub fn floats(d: &DeltaNet, tokens: usize) -> usize {
        tokens * (2 * d.conv_channels() + 3 * d.value_width() + 2 * d.value_heads)
    }

    /// Floats each thread needs for the chunked form.
    pub fn thread_floats(d: &DeltaNet) -> usize {
        Chunk::floats(d)
    }
}

/// What a delta-net layer reads.
pub struct DeltaInput<'a> {
    /// The model's shape.
    pub shape: &'a Shape,
    /// The layer's weights.
    pub weights: &'a DeltaNetWeights,
    /// Normed rows, `[tokens][hidden]`.
    pub x: &'a [f32],
}

/// Advances each timeline's state over its tokens and writes the mix of each token to
/// `out [tokens][hidden]`. The tokens are shared out evenly over the states, in their order.
pub fn delta_net(
    compute: &Compute,
    input: &DeltaInput,
    states: &mut [&mut DeltaState],
    scratch: &mut DeltaScratch,
    tmp: &mut Temporary,
    out: &mut [f32],
) {
    let w = input.weights;
    let d = input.shape.delta.as_ref().expect("a delta-net layer has its dimensions");
    let tokens = input.x.len() / input.shape.hidden;
    let raw = sized(&mut scratch.raw, tokens * d.conv_channels());
    compute.project(&w.qkv.rows(), input.x, raw, tmp);
    compute.project(&w.z.rows(), input.x, sized(&mut scratch.z, tokens * d.value_width()), tmp);
    compute.project(&w.b.rows(), input.x, sized(&mut scratch.b, tokens * d.value_heads), tmp);
    compute.project(&w.a.rows(), input.x, sized(&mut scratch.a, tokens * d.value_heads), tmp);
    sized(&mut scratch.mixed, tokens * d.conv_channels());
    let own = tokens / states.len(); // tokens of a timeline
    for (i, state) in states.iter_mut().enumerate() {
        convolve(compute, (d, w), (i * own..(i + 1) * own, scratch), &mut state.history);
    }
    gates(w, &mut scratch.a, &mut scratch.b);
    sized(&mut scratch.by_head, tokens * d.value_width());
    for (i, state) in states.iter_mut().enumerate() {
        advance(compute, input, (i * own..(i + 1) * own, scratch), &mut state.state);
    }
    let by_head = &scratch.by_head;
    let by_token = sized(&mut scratch.by_token, tokens * d.value_width());
    compute.pool.chunks(by_token, d.value_width(), |t, row| {
        let (timeline, t) = (t / own, t % own);
        let by_head = &by_head[timeline * own * d.value_width()..];
        for (head, row) in row.chunks_exact_mut(d.value_dim).enumerate() {
            row.copy_from_slice(&by_head[(head * own + t) * d.value_dim..][..d.value_dim]);
        }
    });
    compute.project(&w.out.rows(), by_token, out, tmp);
}

/// The rule over a timeline's tokens, then the gated norm: `by_head` of those tokens.
fn advance(
    compute: &Compute,
    input: &DeltaInput,
    (tokens, scratch): (Range<usize>, &mut DeltaScratch),
    state: &mut [f32],
) {
    let d = input.shape.delta.as_ref().expect("a delta-net layer has its dimensions");
    let rule = Rule {
        d,
        isa: compute.isa,
        qkv: &scratch.mixed[tokens.start * d.conv_channels()..],
        g: &scratch.a[tokens.start * d.value_heads..],
        beta: &scratch.b[tokens.start * d.value_heads..],
    };
    let z = &scratch.z[tokens.start * d.value_width()..];
    let width = d.value_width();
    let by_head = &mut scratch.by_head[tokens.start * width..tokens.end * width];
    let (count, head_state) = (tokens.len(), d.key_dim * d.value_dim);
    compute.pool.chunks2((state, head_state), (by_head, count * d.value_dim), |head, s, o| {
        if count < CHUNKED_FROM {
            rule.recurrent(head, s, o);
        } else {
            rule.chunked(head, s, o);
        }
        for (t, o) in o.chunks_exact_mut(d.value_dim).enumerate() {
            let z = &z[(t * d.value_heads + head) * d.value_dim..][..d.value_dim];
            compute.isa.gated_norm(o, &input.weights.norm, z, input.shape.rms_eps);
        }
    });
}

/// Causal depthwise convolution of a timeline's tokens with silu, then the norm of queries and keys.
fn convolve(
    compute: &Compute,
    (d, w): (&DeltaNet, &DeltaNetWeights),
    (tokens, scratch): (Range<usize>, &mut DeltaScratch),
    history: &mut [f32],
) {
    let channels = d.conv_channels();
    let raw = &scratch.raw[tokens.start * channels..tokens.end * channels];
    let taps: [&[f32]; 4] = std::array::from_fn(|j| &w.conv[j * channels..][..channels]);
    let mixed = &mut scratch.mixed[tokens.start * channels..tokens.end * channels];
    let (past, isa) = (&*history, compute.isa);
    compute.pool.chunks(mixed, channels, |t, mixed| {
        // Column j of the window is the raw projection of token t - 3 + j.
        let column = |j: usize| match (t + j).checked_sub(3) {
            Some(token) => &raw[token * channels..][..channels],
            None => &past[(t + j + 1) * channels..][..channels],
        };
        isa.conv4(taps, std::array::from_fn(column), mixed);
        let (q, rest) = mixed.split_at_mut(d.key_heads * d.key_dim);
        let k = &mut rest[..d.key_heads * d.key_dim];
        let query_scale = 1.0 / (d.key_dim as f32).sqrt();
        q.chunks_exact_mut(d.key_dim).for_each(|q| isa.l2_norm(q, NORM_EPS, query_scale));
        k.chunks_exact_mut(d.key_dim).for_each(|k| isa.l2_norm(k, NORM_EPS, 1.0));
    });
    let kept = HISTORY.saturating_sub(tokens.len());
    history.copy_within((HISTORY - kept) * channels.., 0);
    let newest = raw.len() - (HISTORY - kept) * channels;
    history[kept * channels..].copy_from_slice(&raw[newest..]);
}

/// `a` becomes g = -exp(A_log) * softplus(a + dt_bias), `b` becomes beta = sigmoid(b).
fn gates(w: &DeltaNetWeights, a: &mut [f32], b: &mut [f32]) {
    let heads = w.rate.len();
    for (a, b) in a.chunks_exact_mut(heads).zip(b.chunks_exact_mut(heads)) {
        for head in 0..heads {
            a[head] = -w.rate[head] * softplus(a[head] + w.dt_bias[head]);
            b[head] = 1.0 / (1.0 + (-b[head]).exp());
        }
    }
}

/// ln(1 + exp(x)) without overflow.
fn softplus(x: f32) -> f32 {
    x.max(0.0) + (-x.abs()).exp().ln_1p()
}

/// The rule's inputs for a chunk of tokens.
struct Rule<'a> {
    d: &'a DeltaNet,
    isa: Isa,
    qkv: &'a [f32],  // [tokens][conv_channels], q and k normalised
    g: &'a [f32],    // [tokens][value_heads]
    beta: &'a [f32], // [tokens][value_heads]
}

impl Rule<'_> {
    /// Query, key and value of a value head at a token. Value head h reads key head h / ratio.
    fn qkv(&self, head: usize, token: usize) -> (&[f32], &[f32], &[f32]) {
        let d = self.d;
        let row = &self.qkv[token * d.conv_channels()..][..d.conv_channels()];
        let key_head = head / (d.value_heads / d.key_heads);
        let keys = d.key_heads * d.key_dim;
        (
            &row[key_head * d.key_dim..][..d.key_dim],
            &row[keys + key_head * d.key_dim..][..d.key_dim],
            &row[2 * keys + head * d.value_dim..][..d.value_dim],
        )
    }

    fn gate(&self, head: usize, token: usize) -> (f32, f32) {
        let index = token * self.d.value_heads + head;
        (self.g[index], self.beta[index])
    }

    /// Token by token: fade, then move towards the value, then read.
    fn recurrent(&self, head: usize, state: &mut [f32], out: &mut [f32]) {
        let width = self.d.value_dim;
        with_scratch(width, |delta| {
            for (t, out) in out.chunks_exact_mut(width).enumerate() {
                let (q, k, v) = self.qkv(head, t);
                let (g, beta) = self.gate(head, t);
                let decay = g.exp();
                self.isa.delta_step(&mut DeltaHead { state, q, k, v, decay, beta, delta, out });
            }
        });
    }

    /// Chunks of 64 tokens by the triangular form (docs: spec of the chunked delta rule).
    fn chunked(&self, head: usize, state: &mut [f32], out: &mut [f32]) {
        let width = self.d.value_dim;
        with_scratch(DeltaScratch::thread_floats(self.d), |scratch| {
            let mut chunk = Chunk::new(self.d, scratch);
            for (c, out) in out.chunks_mut(CHUNK * width).enumerate() {
                self.chunk((head, c * CHUNK), state, &mut chunk, out);
            }
        });
    }

    /// With F the running product of the fades, D[i][j] = F[i] / F[j] and S the state before:
    /// `new[i] = beta[i] * (v[i] - F[i] S^T k[i] - sum over j < i of D[i][j] (k[i] . k[j]) new[j])`,
    /// `out[i] = F[i] S^T q[i] + sum over j <= i of D[i][j] (q[i] . k[j]) new[j]`, and the state after
    /// is `F[last] S + sum over j of D[last][j] k[j] (x) new[j]`.
    fn chunk(
        &self,
        (head, first): (usize, usize),
        state: &mut [f32],
        chunk: &mut Chunk,
        out: &mut [f32],
    ) {
        let (isa, width, keys) = (self.isa, self.d.value_dim, self.d.key_dim);
        let tokens = out.len() / width;
        self.gather((head, first), tokens, chunk);
        let Chunk { queries, keys: key_rows, turned, decay, onto_queries, onto_keys, news } = chunk;
        let (queries, key_rows) = (&queries[..tokens * keys], &key_rows[..tokens * keys]);
        let news = &mut news[..tokens * width];
        for (rows, onto, read) in
            [(queries, &mut **onto_queries, &mut *out), (key_rows, &mut **onto_keys, &mut *news)]
        {
            let onto = &mut onto[..tokens * CHUNK];
            onto.fill(0.0);
            isa.add_product((rows, keys), (turned, CHUNK), onto);
            read.fill(0.0);
            isa.add_product((rows, keys), (state, width), read);
        }
        let mut fade = 1.0; // F of the token
        for t in 0..tokens {
            let (g, beta) = self.gate(head, first + t);
            fade *= g.exp();
            self.decay_row((t, g.exp()), decay);
            let decay = &decay[t * CHUNK..][..CHUNK];
            let row = t * CHUNK..(t + 1) * CHUNK;
            // What is after the token has no decay: zero, so it takes no part.
            multiply(decay, 1.0, &mut onto_queries[row.clone()]);
            multiply(decay, -beta, &mut onto_keys[row]);
            isa.scale(fade, &mut out[t * width..][..width]);
            let (_, _, v) = self.qkv(head, first + t);
            for (new, v) in news[t * width..][..width].iter_mut().zip(v) {
                *new = beta * (v - fade * *new);
            }
        }
        solve(isa, onto_keys, width, news);
        add_triangle(isa, onto_queries, (news, width), out);
        let last = &decay[(tokens - 1) * CHUNK..][..tokens];
        for (decay, new) in last.iter().zip(news.chunks_exact_mut(width)) {
            isa.scale(*decay, new);
        }
        isa.scale(fade, state);
        isa.add_product((turned, CHUNK), (news, width), state);
    }

    /// Copies the chunk's queries and keys together, and its keys a second time turned.
    fn gather(&self, (head, first): (usize, usize), tokens: usize, chunk: &mut Chunk) {
        let keys = self.d.key_dim;
        chunk.turned.fill(0.0);
        for t in 0..tokens {
            let (q, k, _) = self.qkv(head, first + t);
            chunk.queries[t * keys..][..keys].copy_from_slice(q);
            chunk.keys[t * keys..][..keys].copy_from_slice(k);
            for (column, k) in chunk.turned.chunks_exact_mut(CHUNK).zip(k) {
                column[t] = *k;
            }
        }
    }

    /// Row t of D: the row before it faded once more, then 1, then zeros.
    fn decay_row(&self, (t, fade): (usize, f32), decay: &mut [f32]) {
        let (before, row) = decay.split_at_mut(t * CHUNK);
        let row = &mut row[..CHUNK];
        row.fill(0.0);
        row[t] = 1.0;
        if let Some(before) = before.chunks_exact(CHUNK).last() {
            row[..t].copy_from_slice(&before[..t]);
            self.isa.scale(fade, &mut row[..t]);
        }
    }
}

/// What a thread needs for the chunked form.
struct Chunk<'a> {
    queries: &'a mut [f32],      // [tokens][key_dim]
    keys: &'a mut [f32],         // [tokens][key_dim]
    turned: &'a mut [f32],       // the keys, [key_dim][CHUNK], zeros beyond the tokens
    decay: &'a mut [f32],        // D, [tokens][CHUNK], zeros above the diagonal
    onto_queries: &'a mut [f32], // products of queries and keys, then faded, [tokens][CHUNK]
    onto_keys: &'a mut [f32],    // products of keys, then faded and times -beta, [tokens][CHUNK]
    news: &'a mut [f32],         // [tokens][value_dim], solved top to bottom
}

impl<'a> Chunk<'a> {
    fn floats(d: &DeltaNet) -> usize {
        CHUNK * (3 * d.key_dim + 3 * CHUNK + d.value_dim)
    }

    fn new(d: &DeltaNet, scratch: &'a mut [f32]) -> Self {
        let (queries, rest) = scratch.split_at_mut(CHUNK * d.key_dim);
        let (keys, rest) = rest.split_at_mut(CHUNK * d.key_dim);
        let (turned, rest) = rest.split_at_mut(CHUNK * d.key_dim);
        let (decay, rest) = rest.split_at_mut(CHUNK * CHUNK);
        let (onto_queries, rest) = rest.split_at_mut(CHUNK * CHUNK);
        let (onto_keys, news) = rest.split_at_mut(CHUNK * CHUNK);
        Self { queries, keys, turned, decay, onto_queries, onto_keys, news }
    }
}

/// `x *= factors * a`.
fn multiply(factors: &[f32], a: f32, x: &mut [f32]) {
    for (x, factor) in x.iter_mut().zip(factors) {
        *x *= factor * a;
    }
}

/// `news[i] += sum over j < i of lower[i][j] * news[j]`, from the top: `lower [..][CHUNK]`.
fn solve(isa: Isa, lower: &[f32], width: usize, news: &mut [f32]) {
    let tokens = news.len() / width;
    for first in (0..tokens).step_by(SOLVED) {
        let last = tokens.min(first + SOLVED);
        let (solved, block) = news[..last * width].split_at_mut(first * width);
        isa.add_product((&lower[first * CHUNK..], CHUNK), (solved, width), block);
        for i in 1..last - first {
            let (solved, row) = block.split_at_mut(i * width);
            let factors = &lower[(first + i) * CHUNK + first..];
            for (factor, solved) in factors.iter().zip(solved.chunks_exact(width)) {
                isa.axpy(*factor, solved, &mut row[..width]);
            }
        }
    }
}

/// `out[i] += sum over j <= i of lower[i][j] * news[j]`: `lower [..][CHUNK]`, zeros above its diagonal.
fn add_triangle(isa: Isa, lower: &[f32], (news, width): (&[f32], usize), out: &mut [f32]) {
    let rows = lower.chunks(TRIANGLE * CHUNK).zip(out.chunks_mut(TRIANGLE * width));
    for (i, (lower, out)) in rows.enumerate() {
        let end = news.len().min((i + 1) * TRIANGLE * width);
        isa.add_product((lower, CHUNK), (&news[..end], width), out);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_chunked_form_equals_the_recurrence() {
        let d = DeltaNet { key_heads: 2, value_heads: 4, key_dim: 16, value_dim: 24, conv_taps: 4 };
        let tokens = 150;
        let mut seed = 7u64;
        let mut next = || {
            seed = seed
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (seed >> 40) as f32 / (1 << 23) as f32 - 1.0
        };
        let mut qkv: Vec<f32> = (0..tokens * d.conv_channels()).map(|_| next()).collect();
        let isa = Isa::detect();
        for row in qkv.chunks_exact_mut(d.conv_channels()) {
            let keys = 2 * d.key_heads * d.key_dim;
            row[..keys].chunks_exact_mut(d.key_dim).for_each(|k| isa.l2_norm(k, NORM_EPS, 1.0));
        }
        let g: Vec<f32> = (0..tokens * 4).map(|_| -(next() + 1.0) * 2.0).collect();
        let beta: Vec<f32> = (0..tokens * 4).map(|_| (next() + 1.0) / 2.0).collect();
        let rule = Rule { d: &d, isa, qkv: &qkv, g: &g, beta: &beta };
        for head in 0..4 {
            let start: Vec<f32> =
                (0..d.key_dim * d.value_dim).map(|i| (i % 7) as f32 / 7.0).collect();
            let (mut s1, mut s2) = (start.clone(), start);
            let (mut o1, mut o2) = (vec![0.0; tokens * 24], vec![0.0; tokens * 24]);
            rule.recurrent(head, &mut s1, &mut o1);
            rule.chunked(head, &mut s2, &mut o2);
            let worst = |a: &[f32], b: &[f32]| {
                a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
            };
            assert!(worst(&o1, &o2) < 2e-5, "outputs differ by {}", worst(&o1, &o2));
            assert!(worst(&s1, &s2) < 2e-5, "states differ by {}", worst(&s1, &s2));
        }
    }

    #[test]
    fn softplus_neither_overflows_nor_loses_small_values() {
        assert_eq!(softplus(200.0), 200.0);
        assert!((softplus(0.0) - std::f32::consts::LN_2).abs() < 1e-7);
        assert!((softplus(-20.0) - 2.061_153_7e-9).abs() < 1e-14);
    }
}
