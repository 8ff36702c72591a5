//! The forward pass over rows of tokens: each step of it, for one timeline or for several.
//!
//! A pass knows weights, buffers and times; what is remembered of the positions before is handed in,
//! one memory a timeline, and the rows are shared out over them evenly.

use std::time::Instant;

use flash_moe_kernels::TILE_ROWS;
use smallvec::SmallVec;

use super::Memory;
use super::together::TOGETHER_MAX;
use crate::compute::{Compute, Temporary, multiply_floats, sized, tiled};
use crate::engine::{Engine, Options};
use crate::error::Result;
use crate::kv_cache::KvCache;
use crate::layer::attend::Gathering;
use crate::layer::attention::{AttentionInput, AttentionScratch, Rotation, attention};
use crate::layer::delta_net::{DeltaInput, DeltaScratch, DeltaState, delta_net};
use crate::layer::experts::{ExpertScratch, MoeInput, gated_block, mixture};
use crate::layer::lookahead::{LookaheadScratch, NextLayer, look_ahead};
use crate::layer::router::{Choice, Routes, route};
use crate::shape::{DeltaNet, ExpertId, LayerId, Shape, TokenId};
use crate::timing::{Stage, Timing};
use crate::weights::{FeedForwardWeights, MixWeights};

/// What rows are computed with.
pub(super) struct Pass<'a> {
    pub(super) engine: &'a Engine,
    pub(super) compute: &'a Compute,
    pub(super) scratch: &'a mut Scratch,
    pub(super) timing: &'a mut Timing,
}

impl Pass<'_> {
    /// Begins with these tokens at these positions.
    pub(super) fn embed(
        &mut self,
        tokens: impl ExactSizeIterator<Item = TokenId>,
        positions: impl ExactSizeIterator<Item = usize> + Clone,
    ) {
        let started = Instant::now();
        let rows = self.engine.weights.embed.rows();
        let hidden = self.engine.shape().hidden;
        let h = sized(&mut self.scratch.h, tokens.len() * hidden);
        for (token, h) in tokens.zip(h.chunks_exact_mut(hidden)) {
            self.compute.isa.unpack_row(&rows, token.0 as usize, h);
        }
        self.scratch.rotation.fill(&self.engine.shape().attention, positions);
        self.timing.add(Stage::Embed, started, 0);
    }

    /// `h += mix(norm(h))`, with the layer's memories of the timelines.
    pub(super) fn mix<'m>(&mut self, layer: usize, memories: impl Iterator<Item = &'m mut Memory>) {
        let started = Instant::now();
        let (shape, compute) = (self.engine.shape(), self.compute);
        let weights = &self.engine.weights.layers[layer];
        let s = &mut *self.scratch;
        let x = sized(&mut s.x, s.h.len());
        compute.norm(&s.h, &weights.input_norm, shape.rms_eps, x);
        let y = sized(&mut s.y, s.h.len());
        let (stage, bytes) = match &weights.mix {
            MixWeights::Attention(w) => {
                let mut caches: SmallVec<[&mut KvCache; TOGETHER_MAX]> =
                    memories.map(Memory::cache).collect();
                let input = AttentionInput { shape, weights: w, rotation: &s.rotation, x };
                attention(compute, &input, &mut caches, &mut s.attention, &mut s.tmp, y);
                let moved: u64 = caches.iter().map(|cache| cache.bytes()).sum();
                let weights = w.q.bytes() + w.k.bytes() + w.v.bytes() + w.o.bytes();
                (Stage::Attention, weights + moved as usize)
            }
            MixWeights::DeltaNet(w) => {
                let mut states: SmallVec<[&mut DeltaState; TOGETHER_MAX]> =
                    memories.map(Memory::delta).collect();
                let input = DeltaInput { shape, weights: w, x };
                delta_net(compute, &input, &mut states, &mut s.delta, &mut s.tmp, y);
                let moved: usize = states.iter().map(|state| 2 * size_of_val(&*state.state)).sum();
                (Stage::DeltaNet, w.qkv.bytes() + w.z.bytes() + w.out.bytes() + moved)
            }
        };
        compute.add(y, shape.hidden, &mut s.h);
        self.timing.add(stage, started, bytes);
    }

    /// `h += experts(norm(h))`, or the dense block. Gives the experts used, `[rows][top_k]`; none of a
    /// dense block. `previous`: what the last token used, by layer, to look ahead by.
    ///
    /// # Errors
    /// An expert that could not be read.
    pub(super) fn feed_forward(
        &mut self,
        layer: usize,
        previous: &[Vec<ExpertId>],
    ) -> Result<&[ExpertId]> {
        let started = Instant::now();
        let (shape, compute, engine) = (self.engine.shape(), self.compute, self.engine);
        let weights = &engine.weights.layers[layer];
        let s = &mut *self.scratch;
        let x = sized(&mut s.x, s.h.len());
        compute.norm(&s.h, &weights.post_norm, shape.rms_eps, x);
        let y = sized(&mut s.y, s.h.len());
        match &weights.feed_forward {
            FeedForwardWeights::Dense(block) => {
                gated_block(compute, block, x, &mut s.experts, &mut s.tmp, y);
                self.timing.add(Stage::Dense, started, block.bytes());
                s.routes.experts.clear();
            }
            FeedForwardWeights::Experts(w) => {
                let choice = Choice { top_k: engine.top_k(), renormalise: shape.moe.renormalise };
                route(compute, &w.router, choice, x, &mut s.routes, &mut s.tmp);
                self.timing.add(Stage::Route, started, w.router.bytes());
                let next = next_layer(engine, layer, previous, &s.h);
                let how = (engine.options().lookahead, choice, shape.rms_eps);
                let mut reading = |tmp: &mut Temporary| {
                    if let Some(next) = &next {
                        look_ahead(compute, &engine.store, how, next, &mut s.lookahead, tmp);
                    }
                };
                let id = LayerId(layer as u16);
                let mut input = MoeInput {
                    store: &engine.store,
                    layer: id,
                    layout: engine.layout(id),
                    weights: w,
                    routes: &s.routes,
                    x,
                    reading: &mut reading,
                };
                mixture(compute, &mut input, &mut s.experts, &mut s.tmp, self.timing, y)?;
            }
        }
        compute.add(y, shape.hidden, &mut s.h);
        Ok(&s.routes.experts)
    }

    /// The rows as the head takes them, `[rows][hidden]`.
    pub(super) fn final_norm(&mut self) -> &[f32] {
        let s = &mut *self.scratch;
        let x = sized(&mut s.x, s.h.len());
        self.compute.norm(&s.h, &self.engine.weights.norm, self.engine.shape().rms_eps, x);
        x
    }
}

/// The layer after `layer`, if it has experts to look ahead for.
fn next_layer<'a>(
    engine: &'a Engine,
    layer: usize,
    previous: &'a [Vec<ExpertId>],
    h: &'a [f32],
) -> Option<NextLayer<'a>> {
    let next = engine.weights.layers.get(layer + 1)?;
    let FeedForwardWeights::Experts(weights) = &next.feed_forward else { return None };
    Some(NextLayer {
        layer: LayerId((layer + 1) as u16),
        norm: &next.post_norm,
        weights,
        previous: previous.get(layer + 1).map_or(&[], Vec::as_slice),
        h,
    })
}

/// Copies of a chunk's rows that a GPU's session has: the embeddings, what is handed over, what comes back,
/// and what was there before.
const ROWS_BESIDE_GPU: usize = 4;

/// Buffers of the forward pass, grown to the largest chunk seen and then reused.
#[derive(Default)]
pub struct Scratch {
    pub(super) h: Vec<f32>, // residual stream, [tokens][hidden]
    pub(super) x: Vec<f32>, // normed rows, [tokens][hidden]
    pub(super) y: Vec<f32>, // a block's output, [tokens][hidden]
    pub(super) rotation: Rotation,
    attention: AttentionScratch,
    delta: DeltaScratch,
    pub(super) routes: Routes,
    experts: ExpertScratch,
    lookahead: LookaheadScratch,
    pub(super) tmp: Temporary,
}

impl Scratch {
    /// Bytes that a session's buffers and the threads' scratch take at most.
    pub fn bytes(shape: &Shape, options: &Options, context: usize) -> u64 {
        let tokens = options.prefill_chunk.min(context).max(1);
        let (a, width) = (&shape.attention, feed_forward_width(shape));
        if options.gpu.is_some() {
            return Self::beside_gpu_bytes(shape, options, (tokens, context));
        }
        let pairs = (tokens, top_k(shape, options));
        let session = Self::rows_floats(shape, options, tokens)
            + ExpertScratch::floats(&shape.moe, shape.hidden, width, pairs)
            + shape.vocab
            + context;
        let multiply = multiply_floats(widest(shape), tokens) + 2 * TILE_ROWS * tokens;
        let delta = shape.delta.as_ref().map_or(0, DeltaScratch::thread_floats);
        let thread = Gathering::thread_floats(a).max(delta).max(multiply);
        ((session + options.threads * thread) * size_of::<f32>()) as u64
    }

    /// The same where a GPU computes: a chunk's rows on their way there and back and where they land, with
    /// their rotations, and what computes a token's missing experts.
    fn beside_gpu_bytes(
        shape: &Shape,
        options: &Options,
        (tokens, context): (usize, usize),
    ) -> u64 {
        let (width, pairs) = (feed_forward_width(shape), (1, top_k(shape, options)));
        let landing = shape.hidden.max(shape.moe.experts);
        let rows = ROWS_BESIDE_GPU * shape.hidden + landing + 3 * shape.attention.rotary_dims;
        let session = tokens * rows
            + ExpertScratch::floats(&shape.moe, shape.hidden, width, pairs)
            + shape.vocab
            + context;
        let thread = multiply_floats(widest(shape), 1) + 2 * TILE_ROWS;
        ((session + options.threads * thread) * size_of::<f32>()) as u64
    }

    /// Bytes of the buffers for a token of each of several timelines at most.
    pub(super) fn together_bytes(shape: &Shape, options: &Options, timelines: usize) -> u64 {
        let pairs = (timelines, top_k(shape, options));
        let width = feed_forward_width(shape);
        let floats = Self::rows_floats(shape, options, timelines)
            + ExpertScratch::strangers_floats(&shape.moe, shape.hidden, width, pairs)
            + tiled(shape.vocab) * timelines;
        (floats * size_of::<f32>()) as u64
    }

    fn rows_floats(shape: &Shape, options: &Options, tokens: usize) -> usize {
        let a = &shape.attention;
        3 * tokens * shape.hidden
            + tokens * a.rotary_dims
            + AttentionScratch::floats(a, tokens)
            + shape.delta.as_ref().map_or(0, |d| DeltaScratch::floats(d, tokens))
            + Routes::floats(shape.moe.experts, top_k(shape, options), tokens)
            + Temporary::floats(tokens, widest(shape))
    }
}

fn top_k(shape: &Shape, options: &Options) -> usize {
    options.experts_per_token.unwrap_or(shape.moe.top_k)
}

/// Rows of the largest gate matrix.
fn feed_forward_width(shape: &Shape) -> usize {
    shape.moe.width.max(shape.moe.shared_width).max(shape.dense_width)
}

/// Elements of the longest row that a matrix takes or gives, the head's apart.
fn widest(shape: &Shape) -> usize {
    let delta = shape.delta.as_ref().map_or(0, DeltaNet::conv_channels);
    let queries = 2 * shape.attention.heads * shape.attention.head_dim;
    delta.max(queries).max(shape.hidden).max(feed_forward_width(shape))
}
