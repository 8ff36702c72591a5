//! Full attention with grouped query heads, partial rotation and an output gate.
//!
//! Queries and keys are normed per head, then rotated; the cache holds keys after both. The gate is
//! the raw second half of each head's query rows: no norm, no rotation.

use flash_moe_kernels::{Isa, rotate, rotate_back};

use crate::compute::{Compute, Temporary, sized, with_scratch};
use crate::kv_cache::KvCache;
use crate::layer::attend::{Gathering, Projected, attend};
use crate::shape::{Attention, Shape};
use crate::weights::AttentionWeights;

/// Buffers of one attention layer.
#[derive(Default)]
pub struct AttentionScratch {
    projected: Vec<f32>, // [tokens][heads][head_dim (* 2 with gate)]
    keys: Vec<f32>,      // [tokens][kv_heads][head_dim]
    values: Vec<f32>,    // [tokens][kv_heads][head_dim]
    mixed: Vec<f32>,     // [tokens][heads][head_dim]
    gathering: Gathering,
}

impl AttentionScratch {
    /// Floats needed for a chunk of tokens.
    pub fn floats(a: &Attention, tokens: usize) -> usize {
        let q = a.heads * a.head_dim * if a.gate { 2 } else { 1 };
        tokens * (q + 2 * a.kv_heads * a.head_dim + a.heads * a.head_dim)
            + Gathering::floats(a, tokens)
    }
}

/// Rotation of each position of a chunk, the same for all heads and layers.
#[derive(Default)]
pub struct Rotation {
    cos: Vec<f32>, // [tokens][rotary_dims / 2]
    sin: Vec<f32>, // [tokens][rotary_dims / 2]
}

impl Rotation {
    /// Fills the tables for these positions, one for each token.
    ///
    /// Angles are the position times [`Attention::frequency`], formed in f64: at position 200,000 an
    /// f32 angle is off by hundredths of a radian.
    pub fn fill(&mut self, a: &Attention, positions: impl ExactSizeIterator<Item = usize> + Clone) {
        let half = a.rotary_dims / 2;
        let cos = sized(&mut self.cos, positions.len() * half);
        let sin = sized(&mut self.sin, positions.len() * half);
        let scale = a.rotation_scale();
        for j in 0..half {
            let frequency = a.frequency(j);
            for (t, position) in positions.clone().enumerate() {
                let (s, c) = (position as f64 * frequency).sin_cos();
                cos[t * half + j] = (c * scale) as f32;
                sin[t * half + j] = (s * scale) as f32;
            }
        }
    }

    /// Cosines and sines of all tokens.
    pub fn tables(&self) -> (&[f32], &[f32]) {
        (&self.cos, &self.sin)
    }

    fn at(&self, token: usize, half: usize) -> (&[f32], &[f32]) {
        (&self.cos[token * half..][..half], &self.sin[token * half..][..half])
    }
}

/// What an attention layer reads.
pub struct AttentionInput<'a> {
    /// The model's shape.
    pub shape: &'a Shape,
    /// The layer's weights.
    pub weights: &'a AttentionWeights,
    /// Rotation of the chunk's positions.
    pub rotation: &'a Rotation,
    /// Normed rows, `[tokens][hidden]`.
    pub x: &'a [f32],
}

/// Appends each timeline's tokens to its cache and writes the mix of each token to
/// `out [tokens][hidden]`. The tokens are shared out evenly over the caches, in their order.
pub fn attention(
    compute: &Compute,
    input: &AttentionInput,
    caches: &mut [&mut KvCache],
    scratch: &mut AttentionScratch,
    tmp: &mut Temporary,
    out: &mut [f32],
) {
    let (a, w) = (&input.shape.attention, input.weights);
    let tokens = input.x.len() / input.shape.hidden;
    let (width, kv_width) = (a.heads * a.head_dim, a.kv_heads * a.head_dim);
    let stride = if a.gate { 2 * a.head_dim } else { a.head_dim };
    let projected = sized(&mut scratch.projected, tokens * a.heads * stride);
    let keys = sized(&mut scratch.keys, tokens * kv_width);
    let values = sized(&mut scratch.values, tokens * kv_width);
    compute.project(&w.q.rows(), input.x, projected, tmp);
    compute.project(&w.k.rows(), input.x, keys, tmp);
    compute.project(&w.v.rows(), input.x, values, tmp);

    let eps = input.shape.rms_eps;
    let turn = |t: usize, rows: &mut [f32], stride: usize, norm: &[f32]| {
        for head in rows.chunks_exact_mut(stride) {
            turn_head(
                compute.isa,
                &mut head[..a.head_dim],
                (norm, eps),
                input.rotation.at(t, a.rotary_dims / 2),
            );
        }
    };
    let is_rotated = caches[0].is_rotated();
    compute.pool.chunks2((projected, a.heads * stride), (keys, kv_width), |t, q, k| {
        turn(t, q, stride, &w.q_norm);
        if is_rotated {
            q.chunks_exact_mut(stride).for_each(|head| rotate(&mut head[..a.head_dim]));
        }
        turn(t, k, a.head_dim, &w.k_norm);
    });

    let mixed = sized(&mut scratch.mixed, tokens * width);
    let own = tokens / caches.len(); // tokens of a timeline
    for (i, (cache, mixed)) in
        caches.iter_mut().zip(mixed.chunks_exact_mut(own * width)).enumerate()
    {
        let first = cache.len();
        let new = i * own * kv_width..(i + 1) * own * kv_width;
        cache.append(&keys[new.clone()], &values[new]);
        let rows = &projected[i * own * a.heads * stride..][..own * a.heads * stride];
        let rows = Projected { rows, stride, first };
        attend(compute, (a, cache), &rows, &mut scratch.gathering, mixed, |i, out| {
            if is_rotated {
                rotate_back(out);
            }
            if a.gate {
                let gate = &rows.rows[i * stride + a.head_dim..][..a.head_dim];
                compute.isa.sigmoid_mul(gate, out);
            }
        });
        cache.settle();
    }
    compute.project(&w.o.rows(), mixed, out, tmp);
}

fn turn_head(isa: Isa, head: &mut [f32], (norm, eps): (&[f32], f32), (cos, sin): (&[f32], &[f32])) {
    with_scratch(head.len(), |normed| {
        isa.rms_norm(head, norm, eps, normed);
        head.copy_from_slice(normed);
    });
    isa.rope(head, cos, sin);
}
