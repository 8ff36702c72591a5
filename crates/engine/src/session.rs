//! One timeline of tokens through the model. This is the page to read first.
//!
//! A token is embedded; each layer mixes positions and then runs its feed-forward, both added to the
//! residual stream; the head turns the last row into logits. The same code runs one token and a
//! chunk of a prompt. A session that met an error refuses further work: its caches hold half a token.

mod checkpoint;
mod on_device;
mod pass;
mod state_file;
mod synthetic;
mod together;

use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

pub use checkpoint::{Checkpoint, Identity};
pub use pass::Scratch;
pub use state_file::StateReader;
pub use together::Together;

use crate::compute::all_finite;
use crate::engine::Engine;
use crate::error::{Error, Result};
use crate::gpu::Timeline;
use crate::kv_cache::{KvCache, Line};
use crate::layer::delta_net::DeltaState;
use crate::shape::{ExpertId, Mix, TokenId};
use crate::timing::{Stage, Timing};
use crate::trace::{Recorder, Trace, Values};
use crate::weights::FeedForwardWeights;
use pass::Pass;

/// A conversation's state on one engine.
pub struct Session {
    engine: Arc<Engine>,
    tokens: Vec<TokenId>, // taken so far
    broken: bool,
    stop: Option<Arc<AtomicBool>>, // gives a chunk up
    memories: Vec<Memory>,         // [layers]; of no tokens while they are on the device
    timeline: Option<Timeline>,    // the memories where a GPU computes
    previous: Vec<Vec<ExpertId>>,  // [layers], what the last token used
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

    fn cache(&mut self) -> &mut KvCache {
        match self {
            Self::Attention(cache) => cache,
            Self::DeltaNet(_) => unreachable!("memories are made from the weights' list of layers"),
        }
    }

    fn delta(&mut self) -> &mut DeltaState {
        match self {
            Self::DeltaNet(state) => state,
            Self::Attention(_) => {
                unreachable!("memories are made from the weights' list of layers")
            }
        }
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
            timeline: None,
            logits: vec![0.0; shape.vocab],
            // As many as the context holds, since a step is not to allocate.
            tokens: Vec::with_capacity(engine.context()),
            engine: Arc::clone(engine),
            broken: false,
            stop: None,
            scratch: Scratch::default(),
            timing: Timing::default(),
            recorder: None,
            trace: Trace::default(),
        }
    }

    /// From here on a chunk of a prompt is given up before its next layer once `switch` is set: the call
    /// ends with [`Error::Stopped`], and the session, whose layers stand at different positions then,
    /// refuses to go on until it is restored. A single token is never given up.
    pub fn give_up_on(&mut self, switch: Arc<AtomicBool>) {
        self.stop = Some(switch);
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
    ///
    /// # Errors
    /// The device that holds the states failed.
    pub fn mark(&mut self, prefix: &str) -> Result<()> {
        let layers = self.memories.len();
        if let Some(recorder) = &mut self.recorder {
            recorder.finish(prefix, layers, &mut self.trace);
            self.bring_home()?;
            self.trace_states(prefix);
        }
        Ok(())
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
        let outcome = match self.engine.gpu.is_some() {
            true => self.forward_on_device(tokens, wanted),
            false => self.forward(tokens, wanted),
        };
        self.broken |= outcome.is_err();
        outcome
    }

    /// The forward pass over a chunk of tokens.
    fn forward(&mut self, tokens: &[TokenId], wanted: Wanted) -> Result<()> {
        let engine = Arc::clone(&self.engine);
        let first = self.position();
        let (scratch, timing) = (&mut self.scratch, &mut self.timing);
        let mut pass = Pass { engine: &engine, compute: &engine.compute, scratch, timing };
        pass.embed(tokens.iter().copied(), first..first + tokens.len());
        self.tap("embed", None, |s| &s.h);
        for layer in 0..engine.shape().layers.len() {
            if tokens.len() > 1 && self.is_given_up() {
                return Err(Error::Stopped);
            }
            self.layer(&engine, layer)?;
        }
        self.tokens.extend_from_slice(tokens);
        self.head(&engine, wanted)
    }

    fn is_given_up(&self) -> bool {
        self.stop.as_ref().is_some_and(|stop| stop.load(Ordering::Relaxed))
    }

    fn layer(&mut self, engine: &Engine, layer: usize) -> Result<()> {
        let (scratch, timing) = (&mut self.scratch, &mut self.timing);
        let mut pass = Pass { engine, compute: &engine.compute, scratch, timing };
        pass.mix(layer, std::iter::once(&mut self.memories[layer]));
        self.tap("mixer", Some(layer), |s| &s.y);
        let (scratch, timing) = (&mut self.scratch, &mut self.timing);
        let mut pass = Pass { engine, compute: &engine.compute, scratch, timing };
        let used = pass.feed_forward(layer, &self.previous)?;
        if let Some(last) = used.rchunks_exact(engine.top_k()).next() {
            self.previous[layer].clear();
            self.previous[layer].extend_from_slice(last);
        }
        self.tap_routes(engine, layer);
        self.tap("moe", Some(layer), |s| &s.y);
        self.tap("layer", Some(layer), |s| &s.h);
        Ok(())
    }

    /// Final norm and head.
    fn head(&mut self, engine: &Engine, wanted: Wanted) -> Result<()> {
        let started = Instant::now();
        let hidden = engine.shape().hidden;
        let (scratch, timing) = (&mut self.scratch, &mut self.timing);
        let mut pass = Pass { engine, compute: &engine.compute, scratch, timing };
        let x = pass.final_norm();
        if !all_finite(x) {
            return Err(self.not_finite());
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

    fn not_finite(&self) -> Error {
        Error::NotFinite(format!(
            "the hidden state at position {} is not finite; run `flash-moe verify` on the model",
            self.position() - 1
        ))
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
