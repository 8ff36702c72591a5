//! The timed runs: prompts from position 0, then one session that walks to each position.
//!
//! The clock covers what a user waits for: the engine's calls and the choice of the next token. The
//! limits of the disk, of the memory and, for a prompt, of the products are measured again beside every
//! run, because they change from one minute to the next.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Result;
use flash_moe_engine::engine::Engine;
use flash_moe_engine::gpu::{Gpu, GpuCounters};
use flash_moe_engine::pool::Pool;
use flash_moe_engine::sampler::likeliest;
use flash_moe_engine::session::Session;
use flash_moe_engine::shape::TokenId;
use flash_moe_engine::store::StoreCounters;
use flash_moe_engine::timing::Timing;
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

use super::course::{Course, SYNTHETIC_PROMPT};
use super::limits::{Disk, GemmProbe, MemoryProbe};

/// Prompt or output.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Many tokens at once.
    Prefill,
    /// One token after the other.
    Decode,
}

/// What the pool of experts held at the start.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum PoolState {
    /// Nothing.
    Cold,
    /// What the run before left.
    Warm,
}

/// One of so many decoded tokens on a GPU is timed by stages.
const CLOCKED: usize = 4;

/// One timed run.
#[derive(Clone, Debug)]
pub struct Run {
    /// Prompt or output.
    pub phase: Phase,
    /// The pool at the start.
    pub pool: PoolState,
    /// Which repetition, from 0.
    pub repeat: usize,
    /// Position of its first token.
    pub position: usize,
    /// Tokens taken.
    pub tokens: usize,
    /// Wall time.
    pub seconds: f64,
    /// Wall time of each decoded token, in order; empty for a prompt.
    pub step_seconds: Vec<f64>,
    /// Expert reads.
    pub reads: StoreCounters,
    /// What was done to feed a GPU, where one computes.
    pub fed: Option<GpuCounters>,
    /// Stages; of a GPU's decode those of the tokens behind, which its clock timed, as many as these.
    pub timing: Timing,
    /// The disk's limit just before, in bytes a second.
    pub disk_rate: Option<f64>,
    /// Median passes over memory just before and just after, their mean, in bytes a second.
    pub memory_rate: f64,
    /// The same of the products beside a prompt, in operations a second.
    pub gemm_rate: Option<f64>,
}

/// What is measured beside each run.
pub struct Beside<'a> {
    /// Records to read.
    pub disk: &'a mut Disk,
    /// Reads in flight.
    pub depth: usize,
    /// Memory to read.
    pub memory: &'a MemoryProbe,
    /// Products to form.
    pub products: &'a GemmProbe,
    /// Who does both.
    pub pool: &'a Pool,
    /// For how long, each.
    pub time: Duration,
}

impl Beside<'_> {
    /// Median passes over memory and, for a prompt, of products.
    fn passes(&self, phase: Phase) -> Result<(f64, Option<f64>)> {
        let memory = self.memory.measure(self.pool, self.time)?.bytes_per_second_median;
        let products = || self.products.measure(self.pool, self.time).flops_per_second_median;
        Ok((memory, (phase == Phase::Prefill).then(products)))
    }
}

/// The runner.
pub struct Walk<'a> {
    engine: &'a Arc<Engine>,
    prompt: &'a [TokenId],
    beside: Beside<'a>,
    quiet: bool,
    repeat: usize,
    runs: Vec<Run>,
}

impl<'a> Walk<'a> {
    /// A runner that measures `beside` each run.
    pub fn new(
        engine: &'a Arc<Engine>,
        prompt: &'a [TokenId],
        beside: Beside<'a>,
        quiet: bool,
    ) -> Self {
        Self { engine, prompt, beside, quiet, repeat: 0, runs: Vec::new() }
    }

    /// Runs the course.
    ///
    /// # Errors
    /// An error of the engine; a logit that is not finite.
    pub fn run(mut self, course: &Course) -> Result<Vec<Run>> {
        for repeat in 0..course.repeat {
            self.repeat = repeat;
            for &tokens in &course.prefill {
                self.prompts(tokens, course)?;
            }
            let mut session = Session::new(self.engine);
            for &at in &course.frontiers {
                match course.is_synthetic {
                    true => self.fill(&mut session, at)?,
                    false => self.prefill(&mut session, at, PoolState::Warm)?,
                }
                for &pool in &course.pools {
                    self.decode(&mut session, course.decode, pool)?;
                }
            }
        }
        Ok(self.runs)
    }

    /// A prompt from position 0, cold and then warm; one of them is not timed if it is not asked for.
    fn prompts(&mut self, tokens: usize, course: &Course) -> Result<()> {
        let mut session = Session::new(self.engine);
        if course.pools.contains(&PoolState::Cold) {
            self.prefill(&mut session, tokens, PoolState::Cold)?;
        } else {
            session.prefill(&self.prompt[..tokens], &mut |_| ControlFlow::Continue(()))?;
        }
        if course.pools.contains(&PoolState::Warm) {
            self.prefill(&mut Session::new(self.engine), tokens, PoolState::Warm)?;
        }
        Ok(())
    }

    /// Takes the prompt up to position `end`, if it is not there already.
    fn prefill(&mut self, session: &mut Session, end: usize, pool: PoolState) -> Result<()> {
        let from = session.position();
        if from == end {
            return Ok(());
        }
        let tokens = &self.prompt[from..end];
        let bar = self.bar("prefill", from, tokens.len());
        self.let_clock_run(true);
        self.timed(session, (Phase::Prefill, pool), tokens.len(), |session, _| {
            session.prefill(tokens, &mut |done| {
                bar.set_position(done as u64);
                ControlFlow::Continue(())
            })?;
            Ok(likeliest(session.logits()).map(|_| ())?)
        })?;
        bar.finish_and_clear();
        Ok(())
    }

    /// Goes to position `end` with random keys and values, after a few tokens of real prompt.
    fn fill(&self, session: &mut Session, end: usize) -> Result<()> {
        if session.position() == 0 {
            let start = &self.prompt[..SYNTHETIC_PROMPT.min(end)];
            session.prefill(start, &mut |_| ControlFlow::Continue(()))?;
        }
        let rest = &self.prompt[session.position()..end];
        if !rest.is_empty() {
            session.fill_synthetic(rest)?;
        }
        Ok(())
    }

    /// Takes `tokens` tokens, each the likeliest after the one before.
    fn decode(&mut self, session: &mut Session, tokens: usize, pool: PoolState) -> Result<()> {
        let bar = self.bar("decode", session.position(), tokens);
        let has_clock = self.engine.gpu().is_some_and(Gpu::has_clock);
        // Its stages are timed in the tokens behind those whose speed counts: the clock slows them down. Behind
        // cold tokens come warm ones.
        let apart = has_clock && pool == PoolState::Warm;
        let clocked = if apart { tokens / CLOCKED } else { 0 };
        let walked = tokens - clocked;
        self.let_clock_run(clocked == 0);
        self.timed(session, (Phase::Decode, pool), walked, |session, steps| {
            for _ in 0..walked {
                let started = Instant::now();
                session.step(likeliest(session.logits())?)?;
                steps.push(started.elapsed().as_secs_f64());
                bar.inc(1);
            }
            Ok(likeliest(session.logits()).map(|_| ())?)
        })?;
        if clocked > 0 {
            self.let_clock_run(true);
            let before = session.timing().clone();
            for _ in 0..clocked {
                session.step(likeliest(session.logits())?)?;
                bar.inc(1);
            }
            let run = self.runs.last_mut().expect("the run that was just timed");
            run.timing = session.timing().since(&before).scaled(clocked, walked);
        }
        bar.finish_and_clear();
        Ok(())
    }

    fn let_clock_run(&self, runs: bool) {
        self.engine.gpu().iter().for_each(|gpu| gpu.let_clock_run(runs));
    }

    fn timed(
        &mut self,
        session: &mut Session,
        (phase, pool): (Phase, PoolState),
        tokens: usize,
        work: impl FnOnce(&mut Session, &mut Vec<f64>) -> Result<()>,
    ) -> Result<()> {
        if pool == PoolState::Cold {
            self.engine.store().forget();
            self.engine.gpu().iter().for_each(|gpu| gpu.forget());
        }
        let disk = self.beside.disk.measure(self.beside.depth, self.beside.time)?;
        let before = self.beside.passes(phase)?;
        let (reads, timing) = (self.engine.store().counters(), session.timing().clone());
        let fed = self.engine.gpu().map(Gpu::counters);
        let position = session.position();
        let mut step_seconds = Vec::with_capacity(tokens);
        let started = Instant::now();
        work(session, &mut step_seconds)?;
        let seconds = started.elapsed().as_secs_f64();
        let after = self.beside.passes(phase)?;
        self.runs.push(Run {
            phase,
            pool,
            repeat: self.repeat,
            position,
            tokens,
            seconds,
            step_seconds,
            reads: self.engine.store().counters().since(&reads),
            fed: self.engine.gpu().zip(fed).map(|(gpu, before)| gpu.counters().since(&before)),
            timing: session.timing().since(&timing),
            disk_rate: (disk.bytes > 0).then(|| disk.rate()),
            memory_rate: (before.0 + after.0) / 2.0,
            gemm_rate: before.1.zip(after.1).map(|(before, after)| (before + after) / 2.0),
        });
        Ok(())
    }

    fn bar(&self, phase: &'static str, from: usize, tokens: usize) -> ProgressBar {
        if self.quiet {
            return ProgressBar::hidden();
        }
        let style = "{msg} {bar:30} {pos}/{len} tokens, {per_sec}, {eta} left";
        let style = ProgressStyle::with_template(style).expect("a constant template");
        let bar = ProgressBar::new(tokens as u64).with_style(style);
        bar.set_message(format!("{phase} from {from}"));
        bar
    }
}
