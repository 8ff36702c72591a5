//! Every kernel of a decoded token by itself, over all layers that have it, again and again.
//!
//! What the stages of `--timing` cannot say: where in a stage the time goes, without the device's clock in
//! the way. Only where all experts have a slot, on a memory of its own; no answer of a model is touched. A
//! time is refused where what was computed is no number, or a token's experts were not as many as it has.

use std::time::{Duration, Instant};

use wgpu::{BindGroup, ComputePass};

use super::asked::KernelRate;
use super::clock::{Commands, Work};
use super::dense::{Part, bytes_of};
use super::kernels::MatVec;
use super::limits::LONG;
use super::timeline::LayerMemory;
use super::{Experts, Feeding, Gpu, Layer, Mixing, Token};
use crate::compute::all_finite;
use crate::error::{Error, Result};
use crate::timing::Stage;

/// Writes a kernel's dispatches for a layer, none if it has none of them; gives their number and bytes.
type Write<'a> = &'a dyn Fn(&mut Work, &Layer, &LayerMemory) -> Option<(usize, u64)>;

impl Gpu {
    /// Times every kernel of a token at a position, each for about so long; nothing where experts may be
    /// missing.
    ///
    /// # Errors
    /// The device failed, or has no memory left for a context; what was computed is no token's.
    pub fn kernels_alone(&self, position: usize, time: Duration) -> Result<Vec<KernelRate>> {
        if !self.budget.resident {
            return Ok(Vec::new());
        }
        let _scratch = self.lock();
        let timeline = self.timeline(position + 1)?;
        let h: Vec<f32> = (0..self.shape.hidden).map(|i| (i % 7) as f32 - 3.0).collect();
        let turned = vec![0.5; self.shape.attention.rotary_dims / 2];
        let token = Token { h: &h, cos: &turned, sin: &turned, position };
        let mut rates = Vec::new();
        let mut add = |name, write: Write| -> Result<()> {
            // What the kernel before has added up is forgotten.
            Commands::submit(&self.device, [self.begin(&token)?]);
            let rate = self.alone(name, time, &|work| {
                let layers = self.layers.iter().zip(&timeline.layers);
                let written = layers.filter_map(|(layer, memory)| write(work, layer, memory));
                written.fold((0, 0), |all, one| (all.0 + one.0, all.1 + one.1))
            })?;
            rates.extend(rate);
            match all_finite(&self.look("H_AT", self.shape.hidden)?) {
                true => Ok(()),
                false => Err(Error::Gpu(format!("kernel {name} by itself gave what is no number"))),
            }
        };
        self.attention_alone(position, &mut add)?;
        self.delta_alone(&mut add)?;
        if !self.kernels.experts.is_empty() {
            self.experts_alone(&mut add)?;
        }
        self.dense_alone(&mut add)?;
        let head = |work: &mut Work| self.product(work, &self.kernels.project, &self.head);
        rates.extend(self.alone("logits", time, &head)?);
        Ok(rates)
    }

    fn attention_alone(
        &self,
        position: usize,
        add: &mut dyn FnMut(&'static str, Write) -> Result<()>,
    ) -> Result<()> {
        let Some(kernels) = &self.kernels.attention else { return Ok(()) };
        add("attention in", &|work, layer, _| {
            Some(self.product(work, &self.kernels.project, attention_of(layer)?.0))
        })?;
        add("turn", &|work, layer, memory| {
            self.turn(pass_of(work), kernels, attention_of(layer)?.1, memory);
            Some((1, 0))
        })?;
        add("attend", &|work, layer, memory| {
            attention_of(layer)?;
            self.attend(pass_of(work), kernels, memory, position);
            Some((1, self.kept_bytes(position)))
        })?;
        add("combine", &|work, layer, _| {
            attention_of(layer)?;
            self.combine(pass_of(work), kernels);
            Some((1, 0))
        })?;
        add("attention out", &|work, layer, _| {
            Some(self.product(work, &kernels.out, attention_of(layer)?.2))
        })
    }

    fn delta_alone(&self, add: &mut dyn FnMut(&'static str, Write) -> Result<()>) -> Result<()> {
        let Some(kernels) = &self.kernels.delta else { return Ok(()) };
        add("delta in", &|work, layer, _| {
            Some(self.product(work, &self.kernels.project, delta_of(layer)?.0))
        })?;
        add("delta rule", &|work, layer, memory| {
            self.rule(pass_of(work), kernels, delta_of(layer)?.1, memory);
            Some((1, 2 * self.delta_bytes()[0]))
        })?;
        add("delta out", &|work, layer, _| {
            Some(self.product(work, &kernels.out, delta_of(layer)?.2))
        })
    }

    fn experts_alone(&self, add: &mut dyn FnMut(&'static str, Write) -> Result<()>) -> Result<()> {
        add("route", &|work, layer, _| {
            Some(self.product(work, &self.kernels.router, &experts_of(layer)?.route))
        })?;
        add("experts up", &|work, layer, _| {
            let experts = experts_of(layer)?;
            self.up(work, experts, self.top_k);
            Some((1, self.bytes_of_experts(experts)[0] * 2 / 3))
        })?;
        self.check_choice()?;
        add("experts down", &|work, layer, _| {
            let experts = experts_of(layer)?;
            self.down(work, experts);
            let [routed, shared] = self.bytes_of_experts(experts);
            Some((1, routed / 3 + shared))
        })
    }

    fn dense_alone(&self, add: &mut dyn FnMut(&'static str, Write) -> Result<()>) -> Result<()> {
        let Some(kernel) = &self.kernels.dense_down else { return Ok(()) };
        add("dense up", &|work, layer, _| {
            Some(self.product(work, &self.kernels.project, dense_of(layer)?.0))
        })?;
        add("dense down", &|work, layer, _| Some(self.product(work, kernel, dense_of(layer)?.1)))
    }

    /// As many experts as a token has, all of them different: fewer would be read from a cache.
    fn check_choice(&self) -> Result<()> {
        let words = self.look("CHOSEN_AT", self.top_k)?;
        let mut chosen: Vec<u32> = words.iter().map(|id| id.to_bits()).collect();
        chosen.sort_unstable();
        chosen.dedup();
        let experts = self.shape.moe.experts as u32;
        match chosen.len() == self.top_k && chosen.iter().all(|id| *id < experts) {
            true => Ok(()),
            false => Err(Error::Gpu(format!("the router by itself chose {chosen:?}"))),
        }
    }

    fn product(&self, work: &mut Work, kernel: &MatVec, parts: &[Part]) -> (usize, u64) {
        self.mat_vec(pass_of(work), kernel, parts);
        (parts.len(), bytes_of(parts))
    }

    /// Seconds of what `write` writes, once through: the median of submissions, each of as many times as make
    /// it long.
    fn alone(
        &self,
        name: &'static str,
        time: Duration,
        write: &dyn Fn(&mut Work) -> (usize, u64),
    ) -> Result<Option<KernelRate>> {
        let (mut times, mut seconds) = (1u32, Vec::new());
        let begun = Instant::now();
        loop {
            let mut work = Work::new(&self.device, None, &self.scratch_group);
            let written = (0..times).map(|_| write(&mut work)).last();
            let Some((dispatches @ 1.., bytes)) = written else { return Ok(None) };
            let commands = work.finish();
            let started = Instant::now();
            let submission = Commands::submit(&self.device, [commands]);
            self.device.wait_for(Some(submission))?;
            let taken = started.elapsed();
            if taken < LONG {
                times *= 2;
                seconds.clear();
                continue;
            }
            seconds.push(taken.as_secs_f64() / f64::from(times));
            if seconds.len() >= 3 && begun.elapsed() >= time {
                seconds.sort_by(f64::total_cmp);
                let seconds = seconds[seconds.len() / 2];
                return Ok(Some(KernelRate { name, dispatches, bytes, seconds }));
            }
        }
    }
}

/// What goes in, the vectors in between, what comes out.
type Mixed<'a> = (&'a [Part], &'a BindGroup, &'a [Part]);

fn attention_of(layer: &Layer) -> Option<Mixed<'_>> {
    match &layer.mix {
        Mixing::Attention { project, norms, out } => Some((project, norms, out)),
        Mixing::DeltaNet { .. } => None,
    }
}

fn delta_of(layer: &Layer) -> Option<Mixed<'_>> {
    match &layer.mix {
        Mixing::DeltaNet { project, vectors, out } => Some((project, vectors, out)),
        Mixing::Attention { .. } => None,
    }
}

fn experts_of(layer: &Layer) -> Option<&Experts> {
    match &layer.feed_forward {
        Feeding::Experts(experts) => Some(experts),
        Feeding::Dense { .. } => None,
    }
}

fn dense_of(layer: &Layer) -> Option<(&[Part], &[Part])> {
    match &layer.feed_forward {
        Feeding::Dense { up, down } => Some((up, down)),
        Feeding::Experts(_) => None,
    }
}

/// Where the dispatches go.
fn pass_of<'w>(work: &'w mut Work) -> &'w mut ComputePass<'static> {
    work.stage(Stage::Experts, 0)
}
