//! One timeline of tokens through the model. This is the page to read first.
//!
//! A token is embedded; each layer mixes positions and then runs its feed-forward, both added to the
//! residual stream; the head turns the last row into logits. The same code runs one token and a
//! chunk of a prompt. A session that met an error refuses further work: its caches hold half a token.

mod checkpoint;
mod state_file;
mod synthetic;

use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Instant;

use flash_moe_kernels::TILE_ROWS;

pub use checkpoint::{Checkpoint, Identity};
pub use state_file::StateReader;

use crate::compute::{Temporary, multiply_floats, sized};
use crate::engine::{Engine, Options};
use crate::error::{Error, Result};
use crate::kv_cache::{KvCache, Line};
use crate::layer::attend::Gathering;
use crate::layer::attention::{AttentionInput, AttentionScratch, Rotation, attention};
use crate::layer::delta_net::{DeltaInput, DeltaScratch, DeltaState, delta_net};
use crate::layer::experts::{ExpertScratch, MoeInput, gated_block, mixture};
use crate::layer::lookahead::{LookaheadScratch, NextLayer, look_ahead};
use crate::layer::router::{Choice, Routes, route};
use crate::shape::{ExpertId, LayerId, Mix, Shape, TokenId};
use crate::timing::{Stage, Timing};
use crate::trace::{Recorder, Trace, Values};
use crate::weights::{FeedForwardWeights, MixWeights};

/// A conversation's state on one engine.
pub struct Session {
    engine: Arc<Engine>,
    tokens: Vec<TokenId>, // taken so far
    broken: bool,
    memories: Vec<Memory>,        // [layers]
    previous: Vec<Vec<ExpertId>>, // [layers], what the last token used
    scratch: Scratch,
    logits: Vec<f32>, // [vocab], of the last position
    timing: Timing,
    recorder: Option<Recorder>,
    trace: Trace,
}

/// What a layer remembers of the positions before.
#[derive(Clone)]
enum Memory {
    Attention(KvCache),
    DeltaNet(DeltaState),
}

impl Memory {
    /// Those of all layers, with room for so many positions, nothing remembered.
    fn all(engine: &Engine, positions: usize) -> Vec<Self> {
        let shape = engine.shape();
        let memory = |mix| match (mix, &shape.delta) {
            (Mix::DeltaNet, Some(d)) => Self::DeltaNet(DeltaState::new(d)),
            _ => Self::Attention(KvCache::zeroed(engine.kv_shape(), positions)),
        };
        shape.layers.iter().map(|layer| memory(layer.mix)).collect()
    }

    /// Calls `take` with all bytes, in parts.
    fn each_part<E>(&self, take: &mut dyn FnMut(&[u8]) -> Result<(), E>) -> Result<(), E> {
        match self {
            Self::Attention(cache) => {
                cache.pages().try_for_each(|page| take(bytemuck::cast_slice(page)))
            }
            Self::DeltaNet(state) => {
                take(bytemuck::cast_slice(&state.state))?;
                take(bytemuck::cast_slice(&state.history))
            }
        }
    }

    /// As [`Memory::each_part`], of a memory that shares nothing.
    fn each_part_mut<E>(
        &mut self,
        fill: &mut dyn FnMut(&mut [u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        match self {
            Self::Attention(cache) => cache.pages_mut().try_for_each(fill),
            Self::DeltaNet(state) => {
                fill(bytemuck::cast_slice_mut(&mut state.state))?;
                fill(bytemuck::cast_slice_mut(&mut state.history))
            }
        }
    }

    /// What a clone shares.
    fn pages(&self) -> impl Iterator<Item = &Arc<[Line]>> {
        let cache = match self {
            Self::Attention(cache) => Some(cache),
            Self::DeltaNet(_) => None,
        };
        cache.into_iter().flat_map(KvCache::pages)
    }

    /// Bytes that a clone has to itself.
    fn copied_bytes(&self) -> usize {
        match self {
            Self::Attention(_) => 0,
            Self::DeltaNet(state) => size_of_val(&*state.state) + size_of_val(&*state.history),
        }
    }
}

/// Whether a prompt was taken whole.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Prefilled {
    /// All tokens; the logits are those of the last.
    Done,
    /// The caller stopped it between two chunks; the session holds what it had taken.
    Stopped,
}

/// Which rows of a chunk need logits.
enum Wanted<'a> {
    /// None: more of the prompt follows.
    No,
    /// The last row's, into the session.
    Last,
    /// Every row's, handed to the caller with its position.
    Every(&'a mut dyn FnMut(usize, &[f32])),
}

impl Session {
    /// A session at position 0.
    pub fn new(engine: &Arc<Engine>) -> Self {
        let shape = engine.shape();
        Self {
            previous: vec![Vec::new(); shape.layers.len()],
            memories: Memory::all(engine, 0),
            logits: vec![0.0; shape.vocab],
            // As many as the context holds, since a step is not to allocate.
            tokens: Vec::with_capacity(engine.context()),
            engine: Arc::clone(engine),
            broken: false,
            scratch: Scratch::default(),
            timing: Timing::default(),
            recorder: None,
            trace: Trace::default(),
        }
    }

    /// Takes a prompt, chunk by chunk. `progress` hears how many tokens are done after each chunk.
    ///
    /// # Errors
    /// A token outside the vocabulary, more tokens than the context holds, a failed read, a value
    /// that is not finite.
    pub fn prefill(
        &mut self,
        tokens: &[TokenId],
        progress: &mut dyn FnMut(usize) -> ControlFlow<()>,
    ) -> Result<Prefilled> {
        self.check(tokens)?;
        let chunk = self.engine.options().prefill_chunk.max(1);
        let mut done = 0;
        for piece in tokens.chunks(chunk) {
            done += piece.len();
            let wanted = if done == tokens.len() { Wanted::Last } else { Wanted::No };
            self.advance(piece, wanted)?;
            if progress(done).is_break() && done < tokens.len() {
                return Ok(Prefilled::Stopped);
            }
        }
        Ok(Prefilled::Done)
    }

    /// Takes a prompt and hands the logits of every position to `sink`.
    ///
    /// # Errors
    /// As [`Session::prefill`].
    pub fn score(&mut self, tokens: &[TokenId], sink: &mut dyn FnMut(usize, &[f32])) -> Result<()> {
        self.check(tokens)?;
        let chunk = self.engine.options().prefill_chunk.max(1);
        for piece in tokens.chunks(chunk) {
            self.advance(piece, Wanted::Every(sink))?;
        }
        Ok(())
    }

    /// Takes one token; its logits follow in [`Session::logits`].
    ///
    /// # Errors
    /// As [`Session::prefill`].
    pub fn step(&mut self, token: TokenId) -> Result<()> {
        self.check(&[token])?;
        self.advance(&[token], Wanted::Last)
    }

    /// Logits after the last token taken, `[vocab]`. Rows that stand for no token are -inf.
    pub fn logits(&self) -> &[f32] {
        &self.logits
    }

    /// Tokens taken so far.
    pub fn position(&self) -> usize {
        self.tokens.len()
    }

    /// The tokens taken so far, from the first on.
    pub fn tokens(&self) -> &[TokenId] {
        &self.tokens
    }

    /// The engine.
    pub fn engine(&self) -> &Arc<Engine> {
        &self.engine
    }

    /// Time and bytes by stage so far.
    pub fn timing(&self) -> &Timing {
        &self.timing
    }

    /// Starts recording what is computed from here on.
    pub fn record(&mut self) {
        self.recorder = Some(Recorder::default());
    }

    /// Files what was recorded since the last mark under `prefix.` and the states under
    /// `after_prefix.`, in the arrays and shapes of the reference's goldens.
    pub fn mark(&mut self, prefix: &str) {
        let layers = self.memories.len();
        if let Some(recorder) = &mut self.recorder {
            recorder.finish(prefix, layers, &mut self.trace);
            self.trace_states(prefix);
        }
    }

    /// Gives away everything that was filed.
    pub fn take_trace(&mut self) -> Trace {
        std::mem::take(&mut self.trace)
    }

    fn check(&self, tokens: &[TokenId]) -> Result<()> {
        self.check_whole()?;
        if tokens.is_empty() {
            return Err(Error::Prompt("no tokens".into()));
        }
        let (room, context) = (self.engine.context() - self.position(), self.engine.context());
        if tokens.len() > room {
            return Err(Error::Prompt(format!(
                "{} tokens after {} do not fit into the context of {context}; raise --context",
                tokens.len(),
                self.position()
            )));
        }
        let vocab = self.engine.shape().vocab;
        match tokens.iter().find(|t| t.0 as usize >= vocab) {
            Some(token) => Err(Error::Prompt(format!(
                "token id {} is outside the vocabulary of {vocab}",
                token.0
            ))),
            None => Ok(()),
        }
    }

    fn check_whole(&self) -> Result<()> {
        if self.broken {
            return Err(Error::Prompt(
                "this session met an error before; restore a checkpoint or start a new one".into(),
            ));
        }
        Ok(())
    }

    fn advance(&mut self, tokens: &[TokenId], wanted: Wanted) -> Result<()> {
        let outcome = self.forward(tokens, wanted);
        self.broken |= outcome.is_err();
        outcome
    }

    /// The forward pass over a chunk of tokens.
    fn forward(&mut self, tokens: &[TokenId], wanted: Wanted) -> Result<()> {
        let engine = Arc::clone(&self.engine);
        self.embed(&engine, tokens);
        self.scratch.rotation.fill(&engine.shape().attention, self.position(), tokens.len());
        for layer in 0..engine.shape().layers.len() {
            self.mix(&engine, layer);
            self.feed_forward(&engine, layer)?;
            self.tap("layer", Some(layer), |s| &s.h);
        }
        self.tokens.extend_from_slice(tokens);
        self.head(&engine, wanted)
    }

    fn embed(&mut self, engine: &Engine, tokens: &[TokenId]) {
        let started = Instant::now();
        let rows = engine.weights.embed.rows();
        let hidden = engine.shape().hidden;
        let h = sized(&mut self.scratch.h, tokens.len() * hidden);
        for (token, h) in tokens.iter().zip(h.chunks_exact_mut(hidden)) {
            engine.compute.isa.unpack_row(&rows, token.0 as usize, h);
        }
        self.timing.add(Stage::Embed, started, 0);
        self.tap("embed", None, |s| &s.h);
    }

    /// `h += mix(norm(h))`.
    fn mix(&mut self, engine: &Engine, layer: usize) {
        let started = Instant::now();
        let (shape, compute) = (engine.shape(), &engine.compute);
        let weights = &engine.weights.layers[layer];
        let s = &mut self.scratch;
        let x = sized(&mut s.x, s.h.len());
        compute.norm(&s.h, &weights.input_norm, shape.rms_eps, x);
        let y = sized(&mut s.y, s.h.len());
        let (stage, bytes) = match (&weights.mix, &mut self.memories[layer]) {
            (MixWeights::Attention(w), Memory::Attention(cache)) => {
                let input = AttentionInput { shape, weights: w, rotation: &s.rotation, x };
                attention(compute, &input, cache, &mut s.attention, &mut s.tmp, y);
                let weights = w.q.bytes() + w.k.bytes() + w.v.bytes() + w.o.bytes();
                (Stage::Attention, weights + cache.bytes() as usize)
            }
            (MixWeights::DeltaNet(w), Memory::DeltaNet(state)) => {
                let input = DeltaInput { shape, weights: w, x };
                delta_net(compute, &input, state, &mut s.delta, &mut s.tmp, y);
                let moved = 2 * size_of_val(&state.state[..]);
                (Stage::DeltaNet, w.qkv.bytes() + w.z.bytes() + w.out.bytes() + moved)
            }
            _ => unreachable!("memories are made from the same layer list as the weights"),
        };
        compute.add(y, shape.hidden, &mut s.h);
        self.timing.add(stage, started, bytes);
        self.tap("mixer", Some(layer), |s| &s.y);
    }

    /// `h += experts(norm(h))`, or the dense block.
    fn feed_forward(&mut self, engine: &Engine, layer: usize) -> Result<()> {
        let started = Instant::now();
        let (shape, compute) = (engine.shape(), &engine.compute);
        let weights = &engine.weights.layers[layer];
        let s = &mut self.scratch;
        let x = sized(&mut s.x, s.h.len());
        compute.norm(&s.h, &weights.post_norm, shape.rms_eps, x);
        let y = sized(&mut s.y, s.h.len());
        match &weights.feed_forward {
            FeedForwardWeights::Dense(block) => {
                gated_block(compute, block, x, &mut s.experts, &mut s.tmp, y);
                self.timing.add(Stage::Dense, started, block.bytes());
            }
            FeedForwardWeights::Experts(w) => {
                let choice = Choice { top_k: engine.top_k(), renormalise: shape.moe.renormalise };
                route(compute, &w.router, choice, x, &mut s.routes, &mut s.tmp);
                self.timing.add(Stage::Route, started, w.router.bytes());
                let next = next_layer(engine, layer, &self.previous, &s.h);
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
                mixture(compute, &mut input, &mut s.experts, &mut s.tmp, &mut self.timing, y)?;
                self.previous[layer].clear();
                let last = s.routes.experts.len() - choice.top_k;
                self.previous[layer].extend_from_slice(&s.routes.experts[last..]);
            }
        }
        compute.add(y, shape.hidden, &mut s.h);
        self.tap_routes(engine, layer);
        self.tap("moe", Some(layer), |s| &s.y);
        Ok(())
    }

    /// Final norm and head.
    fn head(&mut self, engine: &Engine, wanted: Wanted) -> Result<()> {
        let started = Instant::now();
        let hidden = engine.shape().hidden;
        let s = &mut self.scratch;
        let x = sized(&mut s.x, s.h.len());
        engine.compute.norm(&s.h, &engine.weights.norm, engine.shape().rms_eps, x);
        if !x.iter().all(|v| v.is_finite()) {
            return Err(Error::NotFinite(format!(
                "the hidden state at position {} is not finite; run `flash-moe verify` on the model",
                self.position() - 1
            )));
        }
        self.tap("final_norm", None, |s| &s.x);
        let head = engine.weights.head();
        let rows = self.scratch.x.len() / hidden;
        let recording = self.recorder.is_some();
        let first = match wanted {
            Wanted::Every(_) => 0,
            _ if recording => 0,
            Wanted::Last => rows - 1,
            Wanted::No => rows,
        };
        let mut sink = wanted;
        for row in first..rows {
            let x = &self.scratch.x[row * hidden..][..hidden];
            engine.compute.project(&head.rows(), x, &mut self.logits, &mut self.scratch.tmp);
            if let Some(recorder) = &mut self.recorder {
                recorder.floats("logits", None, self.logits.len(), &self.logits);
            }
            self.logits[engine.vocabulary()..].fill(f32::NEG_INFINITY);
            if let Wanted::Every(sink) = &mut sink {
                sink(self.position() - rows + row, &self.logits);
            }
        }
        self.timing.add(Stage::Logits, started, (rows - first) * head.bytes());
        Ok(())
    }

    fn tap(&mut self, name: &'static str, layer: Option<usize>, rows: fn(&Scratch) -> &Vec<f32>) {
        if let Some(recorder) = &mut self.recorder {
            recorder.floats(name, layer, self.engine.shape().hidden, rows(&self.scratch));
        }
    }

    fn tap_routes(&mut self, engine: &Engine, layer: usize) {
        let experts =
            matches!(engine.weights.layers[layer].feed_forward, FeedForwardWeights::Experts(_));
        let (Some(recorder), true) = (&mut self.recorder, experts) else { return };
        let routes = &self.scratch.routes;
        let top_k = engine.top_k();
        recorder.floats("router_logits", Some(layer), engine.shape().moe.experts, &routes.logits);
        recorder.floats("router_weights", Some(layer), top_k, &routes.weights);
        let ids = routes.experts.iter().map(|e| i32::from(e.0));
        recorder.ids("router_indices", Some(layer), top_k, ids);
    }

    fn trace_states(&mut self, prefix: &str) {
        let shape = self.engine.shape();
        for (layer, memory) in self.memories.iter().enumerate() {
            let name = |array: &str| format!("after_{prefix}.{array}.{layer}");
            match memory {
                Memory::Attention(cache) => {
                    let a = &shape.attention;
                    let dims = [a.kv_heads, cache.len(), a.head_dim];
                    let (keys, values) = cache.rows();
                    self.trace.put(name("k_cache"), &dims, Values::F32(keys));
                    self.trace.put(name("v_cache"), &dims, Values::F32(values));
                }
                Memory::DeltaNet(state) => {
                    let d = shape.delta.as_ref().expect("a delta-net layer has its dimensions");
                    let dims = [d.value_heads, d.key_dim, d.value_dim];
                    self.trace.put(name("delta_state"), &dims, Values::F32(state.state.clone()));
                    let channels = d.conv_channels();
                    let taps = state.history.len() / channels;
                    let columns = (0..channels * taps)
                        .map(|i| state.history[i % taps * channels + i / taps])
                        .collect();
                    self.trace.put(name("conv_state"), &[channels, taps], Values::F32(columns));
                }
            }
        }
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
        previous: &previous[layer + 1],
        h,
    })
}

/// Buffers of the forward pass, grown to the largest chunk seen and then reused.
#[derive(Default)]
pub struct Scratch {
    h: Vec<f32>, // residual stream, [tokens][hidden]
    x: Vec<f32>, // normed rows, [tokens][hidden]
    y: Vec<f32>, // a block's output, [tokens][hidden]
    rotation: Rotation,
    attention: AttentionScratch,
    delta: DeltaScratch,
    routes: Routes,
    experts: ExpertScratch,
    lookahead: LookaheadScratch,
    tmp: Temporary,
}

impl Scratch {
    /// Bytes that a session's buffers and the threads' scratch take at most.
    pub fn bytes(shape: &Shape, options: &Options, context: usize) -> u64 {
        let tokens = options.prefill_chunk.min(context).max(1);
        let (a, moe, hidden) = (&shape.attention, &shape.moe, shape.hidden);
        let top_k = options.experts_per_token.unwrap_or(moe.top_k);
        let width = moe.width.max(moe.shared_width).max(shape.dense_width);
        let (delta, delta_thread, delta_widest) = match &shape.delta {
            Some(d) => {
                (DeltaScratch::floats(d, tokens), DeltaScratch::thread_floats(d), d.conv_channels())
            }
            None => (0, 0, 0),
        };
        let widest = delta_widest.max(2 * a.heads * a.head_dim).max(hidden).max(width);
        let session = 3 * tokens * hidden
            + tokens * a.rotary_dims
            + AttentionScratch::floats(a, tokens)
            + delta
            + Routes::floats(moe.experts, top_k, tokens)
            + ExpertScratch::floats(moe, hidden, width, (tokens, top_k))
            + Temporary::floats(tokens, widest)
            + shape.vocab
            + context;
        let multiply = multiply_floats(widest, tokens) + 2 * TILE_ROWS * tokens;
        let thread = Gathering::thread_floats(a).max(delta_thread).max(multiply);
        ((session + options.threads * thread) * size_of::<f32>()) as u64
    }
}
