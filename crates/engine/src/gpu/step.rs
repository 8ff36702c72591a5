//! One token on the device.
//!
//! When all experts have a slot the whole token is one submission. Otherwise each layer is handed over up
//! to its router's choice, which comes back here, and right behind it the first half of those experts that
//! have a slot, whichever they are. While the device is at that, the rest of the layer and the next
//! one up to its choice are written; what is missing goes in front of them. One wait a layer.

use wgpu::{CommandBuffer, ComputePass, SubmissionIndex};

use super::asked::Host;
use super::clock::{Commands, Work};
use super::dense::bytes_of;
use super::layout::{SPLITS_MAX, grouped};
use super::tiers::Asked;
use super::{Experts, Feeding, Gpu, Layer, Logits, Mixing, Part, Timeline, Token, Watch};
use crate::error::Result;
use crate::kv_cache::PAGE_POSITIONS;
use crate::shape::ExpertId;
use crate::timing::Stage;

/// Commands that were written ahead.
pub struct Ahead {
    timeline: u64,
    position: usize,
    commands: CommandBuffer,
}

impl Gpu {
    /// Takes a token.
    ///
    /// # Errors
    /// A failed read of an expert; the device failed.
    pub fn step(
        &self,
        host: &Host,
        timeline: &Timeline,
        token: &Token,
        logits: Logits,
        watch: Option<Watch>,
    ) -> Result<()> {
        let mut ahead = self.lock();
        let begin = self.begin(token)?;
        match watch {
            Some(watch) => {
                Commands::submit(&self.device, [begin]);
                self.watched(host, timeline, token.position, watch)?;
                self.finish(logits, Vec::new(), self.work())
            }
            None if self.budget.resident => {
                self.resident(begin, timeline, token.position, logits, &mut ahead)
            }
            None => self.streamed(host, begin, (timeline, token.position), logits),
        }
    }

    /// A token whose experts all have a slot: one submission. While the device is at it, the commands of
    /// the token after it are written, which depend on its position alone.
    fn resident<'g>(
        &'g self,
        begin: Commands<'g>,
        timeline: &Timeline,
        position: usize,
        logits: Logits,
        ahead: &mut Option<Ahead>,
    ) -> Result<()> {
        let Logits::Into(logits) = logits else {
            return self.finish(Logits::No, vec![begin], self.whole(timeline, position));
        };
        let is_this = |ahead: &Ahead| ahead.timeline == timeline.id && ahead.position == position;
        let commands = match ahead.take().filter(is_this) {
            Some(ahead) => Commands::kept(ahead.commands),
            None => self.with_head(self.whole(timeline, position), logits.len()),
        };
        Commands::submit(&self.device, [begin, commands]);
        if self.clock.is_none() && position + 1 < timeline.context {
            let work = self.whole(timeline, position + 1);
            let commands = self.with_head(work, logits.len()).alone();
            *ahead = Some(Ahead { timeline: timeline.id, position: position + 1, commands });
        }
        self.land(logits)
    }

    /// A token whose experts may be missing.
    fn streamed<'g>(
        &'g self,
        host: &Host,
        begin: Commands<'g>,
        (timeline, position): (&Timeline, usize),
        logits: Logits,
    ) -> Result<()> {
        let mut front = vec![begin];
        let mut work = self.work();
        let mut asked: Option<Asked> = None;
        let mut chosen = Vec::with_capacity(self.top_k);
        for (layer, memory) in self.layers.iter().zip(&timeline.layers) {
            self.mix(&mut work, layer, memory, position);
            let experts = match &layer.feed_forward {
                Feeding::Dense { up, down } => {
                    self.dense(&mut work, up, down);
                    continue;
                }
                Feeding::Experts(experts) => experts,
            };
            self.choose(&mut work, experts);
            let commands = std::mem::replace(&mut work, self.work()).finish();
            if let Some(asked) = asked.take() {
                front.extend(self.settle(host, asked, &mut chosen)?);
            }
            front.push(commands);
            asked = Some(self.ask(experts, front.drain(..)));
            self.down(&mut work, experts);
        }
        if let Some(asked) = asked {
            front.extend(self.settle(host, asked, &mut chosen)?);
        }
        self.finish(logits, front, work)
    }

    /// All layers of a token.
    fn whole(&self, timeline: &Timeline, position: usize) -> Work<'_> {
        let mut work = self.work();
        for (layer, memory) in self.layers.iter().zip(&timeline.layers) {
            self.mix(&mut work, layer, memory, position);
            match &layer.feed_forward {
                Feeding::Dense { up, down } => self.dense(&mut work, up, down),
                Feeding::Experts(experts) => {
                    self.route(&mut work, experts);
                    self.up(&mut work, experts, self.top_k);
                    self.down(&mut work, experts);
                }
            }
        }
        work
    }

    /// Brings what the kernels of a token are told.
    fn begin(&self, token: &Token) -> Result<Commands<'_>> {
        let mut words = vec![0f32; self.layout.at("NORMED_AT")];
        let mut put = |name: &str, values: &[f32]| {
            words[self.layout.at(name)..][..values.len()].copy_from_slice(values);
        };
        put("H_AT", token.h);
        put("COS_AT", token.cos);
        put("SIN_AT", token.sin);
        let numbers = [token.position, self.pages_each(token.position)];
        put("TOKEN_AT", &numbers.map(|n| f32::from_bits(n as u32)));
        let ranks: Vec<f32> = (0..self.top_k).map(|rank| f32::from_bits(rank as u32)).collect();
        put("RANKS_AT", &ranks);
        let mut work = self.work();
        self.note(&mut work, &[(bytemuck::cast_slice(&words), &self.scratch, 0)])?;
        Ok(work.finish())
    }

    /// Pages of the context that a workgroup attends to.
    fn pages_each(&self, position: usize) -> usize {
        (position + 1).div_ceil(PAGE_POSITIONS).div_ceil(SPLITS_MAX)
    }

    /// Hands the commands over with those of the head, behind those in front of them, and reads the logits
    /// back.
    pub(super) fn finish<'g>(
        &'g self,
        logits: Logits,
        mut front: Vec<Commands<'g>>,
        work: Work<'g>,
    ) -> Result<()> {
        let Logits::Into(logits) = logits else {
            front.push(work.finish());
            Commands::submit(&self.device, front);
            return self.device.check();
        };
        front.push(self.with_head(work, logits.len()));
        Commands::submit(&self.device, front);
        self.land(logits)
    }

    /// The commands with those of the head, and the way back of so many logits.
    fn with_head<'g>(&'g self, mut work: Work<'g>, logits: usize) -> Commands<'g> {
        let pass = work.stage(Stage::Logits, bytes_of(&self.head));
        self.mat_vec(pass, &self.kernels.project, &self.head);
        let start = self.layout.at("LOGITS_AT") as u64 * 4;
        let bytes = logits as u64 * 4;
        work.encoder().copy_buffer_to_buffer(&self.scratch, start, &self.landing, 0, bytes);
        work.finish()
    }

    fn land(&self, logits: &mut [f32]) -> Result<()> {
        self.device.landed(&self.landing, logits.len() as u64 * 4, |landed| {
            logits.copy_from_slice(bytemuck::cast_slice(landed));
        })
    }

    fn mat_vec(&self, pass: &mut ComputePass, kernel: &super::kernels::MatVec, parts: &[Part]) {
        pass.set_pipeline(&kernel.kernel);
        for part in parts {
            pass.set_bind_group(1, &part.group, &[]);
            pass.dispatch_workgroups(part.workgroups, 1, 1);
        }
    }

    /// `h += mix(norm(h))`.
    fn mix(
        &self,
        work: &mut Work,
        layer: &Layer,
        memory: &super::timeline::LayerMemory,
        position: usize,
    ) {
        let k = &self.kernels;
        match (&layer.mix, &k.attention, &k.delta) {
            (Mixing::Attention { project, norms, out }, Some(kernels), _) => {
                let a = &self.shape.attention;
                let kept = self.kv.page_bytes() * (position / PAGE_POSITIONS + 1) as u64;
                let pass = work.stage(Stage::Attention, bytes_of(project) + bytes_of(out) + kept);
                self.mat_vec(pass, &k.project, project);
                pass.set_pipeline(&kernels.turn);
                pass.set_bind_group(1, norms, &[]);
                pass.set_bind_group(2, &memory.write, &[]);
                pass.dispatch_workgroups((a.heads + a.kv_heads) as u32, 1, 1);
                pass.set_pipeline(&kernels.attend);
                pass.set_bind_group(1, &memory.read, &[]);
                let pages = (position + 1).div_ceil(PAGE_POSITIONS);
                let splits = pages.div_ceil(self.pages_each(position));
                let groups = a.heads / grouped(&self.shape);
                pass.dispatch_workgroups(groups as u32, splits as u32, 1);
                pass.set_pipeline(&kernels.combine);
                pass.dispatch_workgroups(a.heads as u32, 1, 1);
                self.mat_vec(pass, &kernels.out, out);
            }
            (Mixing::DeltaNet { project, vectors, out }, _, Some(kernels)) => {
                let d = self.shape.delta.as_ref().expect("a delta-net layer has its dimensions");
                let state = 2 * self.delta_bytes()[0];
                let pass = work.stage(Stage::DeltaNet, bytes_of(project) + bytes_of(out) + state);
                self.mat_vec(pass, &k.project, project);
                pass.set_pipeline(&kernels.rule);
                pass.set_bind_group(1, vectors, &[]);
                pass.set_bind_group(2, &memory.write, &[]);
                pass.dispatch_workgroups(d.value_heads as u32, d.value_dim as u32 / 32, 1);
                self.mat_vec(pass, &kernels.out, out);
            }
            _ => unreachable!("kernels are compiled for every kind of layer that there is"),
        }
    }

    fn dense(&self, work: &mut Work, up: &[Part], down: &[Part]) {
        let pass = work.stage(Stage::Dense, bytes_of(up) + bytes_of(down));
        self.mat_vec(pass, &self.kernels.project, up);
        let kernel = self.kernels.dense_down.as_ref().expect("compiled where a layer is dense");
        self.mat_vec(pass, kernel, down);
    }

    /// The router's logits, and the shared expert up to its activations.
    fn route(&self, work: &mut Work, experts: &Experts) {
        let pass = work.stage(Stage::Route, bytes_of(&experts.route));
        self.mat_vec(pass, &self.kernels.router, &experts.route);
    }

    /// The router's choice, and its way back.
    fn choose(&self, work: &mut Work, experts: &Experts) {
        self.route(work, experts);
        let pass = work.stage(Stage::Route, 0);
        pass.set_pipeline(&self.kernels.choose);
        pass.dispatch_workgroups(1, 1, 1);
        let from = self.layout.at("CHOSEN_AT") as u64 * 4;
        let bytes = self.chosen_bytes();
        work.encoder().copy_buffer_to_buffer(&self.scratch, from, &self.landing, 0, bytes);
    }

    fn chosen_bytes(&self) -> u64 {
        self.top_k as u64 * 4
    }

    /// Hands over what leaves a choice, and behind it the first half of the experts that are here.
    fn ask<'g>(
        &'g self,
        experts: &'g Experts,
        commands: impl IntoIterator<Item = Commands<'g>>,
    ) -> Asked<'g> {
        let submission = Commands::submit(&self.device, commands);
        self.device.ask(&self.landing, self.chosen_bytes());
        let mut work = self.work();
        self.up(&mut work, experts, self.top_k);
        Commands::submit(&self.device, [work.finish()]);
        Asked { experts, submission }
    }

    /// Waits for the ids of a choice.
    pub(super) fn read_chosen(
        &self,
        submission: SubmissionIndex,
        chosen: &mut Vec<ExpertId>,
    ) -> Result<()> {
        self.device.answer(&self.landing, self.chosen_bytes(), Some(submission), |landed| {
            let ids = bytemuck::cast_slice::<u8, u32>(landed).iter();
            chosen.clear();
            chosen.extend(ids.map(|id| ExpertId(*id as u16)));
        })
    }

    /// Gate and up of the first so many experts in the list of ranks, those without a slot left out.
    pub(super) fn up(&self, work: &mut Work, experts: &Experts, ranks: usize) {
        let kernels = &self.kernels.experts[experts.kernels];
        let pass = work.stage(Stage::Experts, 0);
        pass.set_pipeline(&kernels.up);
        pass.set_bind_group(1, &experts.slots.group, &[]);
        pass.dispatch_workgroups(kernels.up_workgroups, ranks as u32, 1);
    }

    /// Down of the chosen experts and of the shared one.
    fn down(&self, work: &mut Work, experts: &Experts) {
        let kernels = &self.kernels.experts[experts.kernels];
        let shared = experts.shared.as_ref().map_or(0, |part| part.bytes);
        let routed = (self.top_k * kernels.slabs.layout.record_bytes()) as u64;
        let pass = work.stage(Stage::Experts, routed + shared);
        pass.set_pipeline(&kernels.down);
        pass.set_bind_group(1, &experts.slots.group, &[]);
        if let Some(shared) = &experts.shared {
            pass.set_bind_group(2, &shared.group, &[]);
        }
        pass.dispatch_workgroups(kernels.down_workgroups, 1, 1);
    }

    /// As a token whose experts may be missing, telling of everything on the way.
    fn watched(
        &self,
        host: &Host,
        timeline: &Timeline,
        position: usize,
        watch: Watch,
    ) -> Result<()> {
        let hidden = self.shape.hidden;
        let mut before = self.look("H_AT", hidden)?;
        for (i, (layer, memory)) in self.layers.iter().zip(&timeline.layers).enumerate() {
            let mut work = self.work();
            self.mix(&mut work, layer, memory, position);
            Commands::submit(&self.device, [work.finish()]);
            let mixed = self.look("H_AT", hidden)?;
            watch("mixer", Some(i), &difference(&mixed, &before));
            self.feed_forward(host, layer)?;
            if matches!(layer.feed_forward, Feeding::Experts(_)) {
                watch("router_logits", Some(i), &self.look("ROUTER_AT", self.shape.moe.experts)?);
                watch("router_weights", Some(i), &self.look("WEIGHTS_AT", self.top_k)?);
                watch("router_indices", Some(i), &self.look("CHOSEN_AT", self.top_k)?);
            }
            before = self.look("H_AT", hidden)?;
            watch("moe", Some(i), &difference(&before, &mixed));
            watch("layer", Some(i), &before);
        }
        Ok(())
    }

    /// A layer's feed-forward by itself.
    fn feed_forward(&self, host: &Host, layer: &Layer) -> Result<()> {
        let mut work = self.work();
        let mut front = Vec::new();
        match &layer.feed_forward {
            Feeding::Dense { up, down } => self.dense(&mut work, up, down),
            Feeding::Experts(experts) => {
                self.choose(&mut work, experts);
                let asked = self.ask(experts, [work.finish()]);
                front = self.settle(host, asked, &mut Vec::new())?;
                work = self.work();
                self.down(&mut work, experts);
            }
        }
        front.push(work.finish());
        Commands::submit(&self.device, front);
        Ok(())
    }

    /// A part of the scratch.
    fn look(&self, name: &str, words: usize) -> Result<Vec<f32>> {
        let (from, bytes) = (self.layout.at(name) as u64 * 4, words as u64 * 4);
        let mut work = self.work();
        work.encoder().copy_buffer_to_buffer(&self.scratch, from, &self.landing, 0, bytes);
        Commands::submit(&self.device, [work.finish()]);
        self.device.landed(&self.landing, bytes, |landed| bytemuck::cast_slice(landed).to_vec())
    }

    /// The residual stream after the last token.
    ///
    /// # Errors
    /// The device failed.
    pub fn hidden(&self) -> Result<Vec<f32>> {
        let _scratch = self.lock();
        self.look("H_AT", self.shape.hidden)
    }
}

/// `a - b`.
pub fn difference(a: &[f32], b: &[f32]) -> Vec<f32> {
    a.iter().zip(b).map(|(a, b)| a - b).collect()
}
