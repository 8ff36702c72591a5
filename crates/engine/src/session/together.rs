//! A token of each of several timelines, layer by layer together.
//!
//! The weights and the experts come from memory and from the disk once for all of them. Every
//! timeline gets the bits that it would get alone: only the bytes' way is shared, no sum is.

use std::sync::Arc;
use std::time::Instant;

use super::Session;
use super::pass::{Pass, Scratch};
use crate::compute::all_finite;
use crate::engine::{Engine, Options};
use crate::error::{Error, Result};
use crate::shape::{Shape, TokenId};
use crate::timing::{Stage, Timing};

/// Timelines of one pass; more take turns.
pub(super) const TOGETHER_MAX: usize = 16;

/// Steps timelines of one engine together. Owns the buffers for it.
pub struct Together {
    engine: Arc<Engine>,
    scratch: Scratch,
    timing: Timing,
}

/// A timeline, the token it takes and how that went.
struct Row<'a> {
    session: &'a mut Session,
    token: TokenId,
    outcome: &'a mut Result<()>,
}

impl Together {
    /// For sessions of this engine.
    pub fn new(engine: &Arc<Engine>) -> Self {
        let engine = Arc::clone(engine);
        Self { engine, scratch: Scratch::default(), timing: Timing::default() }
    }

    /// Bytes of the buffers at most.
    pub fn bytes(shape: &Shape, options: &Options) -> u64 {
        Scratch::together_bytes(shape, options, options.sessions.min(TOGETHER_MAX))
    }

    /// Time and bytes by stage of all steps that more than one timeline took; what a timeline
    /// stepped alone is in its session's.
    pub fn timing(&self) -> &Timing {
        &self.timing
    }

    /// Takes one token in each session; the logits follow in [`Session::logits`], the same bits as
    /// from [`Session::step`]. Gives each one's outcome: what is wrong with one timeline does not
    /// touch the others, but a failed read fails all that were computed with it.
    ///
    /// # Panics
    /// A session of another engine.
    pub fn step(&mut self, steps: &mut [(&mut Session, TokenId)]) -> Vec<Result<()>> {
        let checked = steps.iter().map(|(session, token)| session.check(&[*token]));
        let mut outcomes: Vec<Result<()>> = checked.collect();
        let mut rows: Vec<Row> = Vec::with_capacity(steps.len());
        for ((session, token), outcome) in steps.iter_mut().zip(&mut outcomes) {
            assert!(Arc::ptr_eq(&session.engine, &self.engine), "a session of this engine");
            let mut row = Row { session, token: *token, outcome };
            // A device takes timelines one after the other.
            let alone = row.session.recorder.is_some() || self.engine.gpu.is_some();
            if alone && row.outcome.is_ok() {
                row.alone();
            } else if row.outcome.is_ok() {
                rows.push(row);
            }
        }
        for rows in rows.chunks_mut(TOGETHER_MAX) {
            match rows {
                [row] => row.alone(),
                rows => self.pass(rows),
            }
        }
        outcomes
    }

    fn pass(&mut self, rows: &mut [Row]) {
        if let Err(error) = self.forward(rows) {
            let error = Arc::new(error);
            for row in rows {
                row.fail(Error::Together(Arc::clone(&error)));
            }
        }
    }

    fn forward(&mut self, rows: &mut [Row]) -> Result<()> {
        let engine = &*self.engine;
        let (scratch, timing) = (&mut self.scratch, &mut self.timing);
        let mut pass = Pass { engine, compute: &engine.strangers, scratch, timing };
        let positions = rows.iter().map(|row| row.session.position());
        pass.embed(rows.iter().map(|row| row.token), positions);
        for layer in 0..engine.shape().layers.len() {
            pass.mix(layer, rows.iter_mut().map(|row| &mut row.session.memories[layer]));
            let used = pass.feed_forward(layer, &[])?;
            for (row, used) in rows.iter_mut().zip(used.chunks_exact(engine.top_k())) {
                row.session.previous[layer].clear();
                row.session.previous[layer].extend_from_slice(used);
            }
        }
        for row in rows.iter_mut() {
            row.session.tokens.push(row.token);
        }
        self.head(rows);
        Ok(())
    }

    fn head(&mut self, rows: &mut [Row]) {
        let started = Instant::now();
        let engine = &*self.engine;
        let (scratch, timing) = (&mut self.scratch, &mut self.timing);
        let mut pass = Pass { engine, compute: &engine.strangers, scratch, timing };
        let x = pass.final_norm();
        for (row, x) in rows.iter_mut().zip(x.chunks_exact(engine.shape().hidden)) {
            if !all_finite(x) {
                row.fail(row.session.not_finite());
            }
        }
        let head = engine.weights.head();
        let logits = rows.iter_mut().map(|row| &mut row.session.logits[..]);
        let Scratch { x, tmp, .. } = &mut self.scratch;
        engine.strangers.project_each(&head.rows(), x, logits, tmp);
        for row in rows {
            row.session.logits[engine.vocabulary()..].fill(f32::NEG_INFINITY);
        }
        self.timing.add(Stage::Logits, started, head.bytes());
    }
}

impl Row<'_> {
    fn alone(&mut self) {
        *self.outcome = self.session.step(self.token);
    }

    fn fail(&mut self, error: Error) {
        self.session.broken = true;
        *self.outcome = Err(error);
    }
}
