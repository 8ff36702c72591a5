//! One token on the device.
//!
//! When all experts have a slot the whole token is one submission. Otherwise each layer is handed over up
//! to its router's choice, which comes back here, and right behind it the first half of those experts that
//! have a slot, whichever they are. While the device is at that, the rest of the layer and the next
//! one up to its choice are written; what is missing goes in front of them. One wait a layer.

use wgpu::{BindGroup, CommandBuffer, ComputePass, SubmissionIndex};

use super::asked::Host;
use super::clock::{Commands, Work};
use super::dense::bytes_of;
use super::kernels::{AttentionKernels, DeltaKernels, MatVec};
use super::layout::{SPLITS_MAX, grouped};
use super::tiers::{Asked, Workspace};
use super::timeline::LayerMemory;
use super::{Experts, Feeding, Gpu, Layer, Logits, Mixing, Part, Timeline, Token, Watch};
use crate::error::Result;
use crate::kv_cache::PAGE_POSITIONS;
use crate::shape::ExpertId;
use crate::timing::Stage;

/// What one token at a time has.
#[derive(Default)]
pub struct Busy {
    pub(super) ahead: Option<Ahead>,
    pub(super) choice: Choice,
    pub(super) workspace: Workspace,
}

/// The router's choice for a token.
#[derive(Default)]
pub struct Choice {
    /// Most probable first, `[top_k]`.
    pub experts: Vec<ExpertId>,
    /// Their weights, `[top_k]`, where the processor computes.
    pub weights: Vec<f32>,
    /// What they are given, `[hidden]`, where the processor computes.
    pub normed: Vec<f32>,
}

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
        let mut busy = self.lock();
        let begin = self.begin(token)?;
        match watch {
            Some(watch) => {
                Commands::submit(&self.device, [begin]);
                self.watched(host, (timeline, token.position), watch, &mut busy)?;
                self.finish(logits, Vec::new(), self.work())
            }
            None if self.budget.resident => {
                self.resident(begin, timeline, token.position, logits, &mut busy.ahead)
            }
            None => {
                let mut later = Vec::new();
                let position = token.position;
                let outcome =
                    self.streamed(host, begin, (timeline, position), &mut busy, &mut later);
                // What is to come in is on its way whatever became of the token.
                let ended = outcome.map(|(front, work)| self.hand_over(&logits, front, work));
                Commands::submit_some(&self.device, &mut later);
                self.land(logits, ended?)
            }
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
        let Logits::Into(into) = &logits else {
            return self.finish(Logits::No, vec![begin], self.whole(timeline, position));
        };
        let wanted = into.len();
        let is_this = |ahead: &Ahead| ahead.timeline == timeline.id && ahead.position == position;
        let commands = match ahead.take().filter(is_this) {
            Some(ahead) => Commands::kept(ahead.commands),
            None => self.with_head(self.whole(timeline, position), wanted),
        };
        let submission = Commands::submit(&self.device, [begin, commands]);
        self.device.ask(&self.landing, wanted as u64 * 4);
        if self.clock().is_none() && position + 1 < timeline.context {
            let work = self.whole(timeline, position + 1);
            let commands = self.with_head(work, wanted).alone();
            *ahead = Some(Ahead { timeline: timeline.id, position: position + 1, commands });
        }
        self.land(logits, submission)
    }

    /// The layers of a token whose experts may be missing; gives what is left to be handed over. `later`
    /// is to follow behind it.
    fn streamed<'g>(
        &'g self,
        host: &Host,
        begin: Commands<'g>,
        (timeline, position): (&Timeline, usize),
        busy: &mut Busy,
        later: &mut Vec<Commands<'g>>,
    ) -> Result<(Vec<Commands<'g>>, Work<'g>)> {
        let mut front = vec![begin];
        let mut work = self.work();
        let mut asked: Option<Asked> = None;
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
            let mut settled = None;
            if let Some(asked) = asked.take() {
                front = self.settle(host, asked, busy, later, &mut settled)?;
            }
            front.push(commands);
            asked = Some(self.ask(experts, front.drain(..)));
            self.admit(host, settled, later)?;
            self.down(&mut work, experts);
        }
        if let Some(asked) = asked {
            front = self.settle(host, asked, busy, later, &mut None)?;
        }
        Ok((front, work))
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
    pub(super) fn begin(&self, token: &Token) -> Result<Commands<'_>> {
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
        front: Vec<Commands<'g>>,
        work: Work<'g>,
    ) -> Result<()> {
        let submission = self.hand_over(&logits, front, work);
        self.land(logits, submission)
    }

    /// Hands the commands over with those of the head, where logits are wanted.
    fn hand_over<'g>(
        &'g self,
        logits: &Logits,
        mut front: Vec<Commands<'g>>,
        work: Work<'g>,
    ) -> SubmissionIndex {
        let Logits::Into(logits) = logits else {
            front.push(work.finish());
            return Commands::submit(&self.device, front);
        };
        front.push(self.with_head(work, logits.len()));
        let submission = Commands::submit(&self.device, front);
        self.device.ask(&self.landing, logits.len() as u64 * 4);
        submission
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

    /// Waits for logits that were asked for.
    fn land(&self, logits: Logits, submission: SubmissionIndex) -> Result<()> {
        let Logits::Into(logits) = logits else { return self.device.check() };
        let bytes = logits.len() as u64 * 4;
        self.device.answer(&self.landing, bytes, Some(submission), |landed| {
            logits.copy_from_slice(bytemuck::cast_slice(landed));
        })
    }

    pub(super) fn mat_vec(&self, pass: &mut ComputePass, kernel: &MatVec, parts: &[Part]) {
        pass.set_pipeline(&kernel.kernel);
        for part in parts {
            pass.set_bind_group(1, &part.group, &[]);
            pass.dispatch_workgroups(part.workgroups, 1, 1);
        }
    }

    /// `h += mix(norm(h))`.
    fn mix(&self, work: &mut Work, layer: &Layer, memory: &LayerMemory, position: usize) {
        let k = &self.kernels;
        match (&layer.mix, &k.attention, &k.delta) {
            (Mixing::Attention { project, norms, out }, Some(kernels), _) => {
                let kept = self.kept_bytes(position);
                let pass = work.stage(Stage::Attention, bytes_of(project) + bytes_of(out) + kept);
                self.mat_vec(pass, &k.project, project);
                self.turn(pass, kernels, norms, memory);
                self.attend(pass, kernels, memory, position);
                self.combine(pass, kernels);
                self.mat_vec(pass, &kernels.out, out);
            }
            (Mixing::DeltaNet { project, vectors, out }, _, Some(kernels)) => {
                let state = 2 * self.delta_bytes()[0];
                let pass = work.stage(Stage::DeltaNet, bytes_of(project) + bytes_of(out) + state);
                self.mat_vec(pass, &k.project, project);
                self.rule(pass, kernels, vectors, memory);
                self.mat_vec(pass, &kernels.out, out);
            }
            _ => unreachable!("kernels are compiled for every kind of layer that there is"),
        }
    }

    /// Bytes of a layer's keys and values up to a position.
    pub(super) fn kept_bytes(&self, position: usize) -> u64 {
        self.kv.page_bytes() * (position / PAGE_POSITIONS + 1) as u64
    }

    /// Norm and rotation of queries and keys, and the new key and value to the cache.
    pub(super) fn turn(
        &self,
        pass: &mut ComputePass,
        kernels: &AttentionKernels,
        norms: &BindGroup,
        memory: &LayerMemory,
    ) {
        let a = &self.shape.attention;
        pass.set_pipeline(&kernels.turn);
        pass.set_bind_group(1, norms, &[]);
        pass.set_bind_group(2, &memory.write, &[]);
        pass.dispatch_workgroups((a.heads + a.kv_heads) as u32, 1, 1);
    }

    /// Attention over parts of the context.
    pub(super) fn attend(
        &self,
        pass: &mut ComputePass,
        kernels: &AttentionKernels,
        memory: &LayerMemory,
        position: usize,
    ) {
        pass.set_pipeline(&kernels.attend);
        pass.set_bind_group(1, &memory.read, &[]);
        let pages = (position + 1).div_ceil(PAGE_POSITIONS);
        let splits = pages.div_ceil(self.pages_each(position));
        let groups = self.shape.attention.heads / grouped(&self.shape);
        pass.dispatch_workgroups(groups as u32, splits as u32, 1);
    }

    /// The parts joined.
    pub(super) fn combine(&self, pass: &mut ComputePass, kernels: &AttentionKernels) {
        pass.set_pipeline(&kernels.combine);
        pass.dispatch_workgroups(self.shape.attention.heads as u32, 1, 1);
    }

    /// The delta rule.
    pub(super) fn rule(
        &self,
        pass: &mut ComputePass,
        kernels: &DeltaKernels,
        vectors: &BindGroup,
        memory: &LayerMemory,
    ) {
        let d = self.shape.delta.as_ref().expect("a delta-net layer has its dimensions");
        pass.set_pipeline(&kernels.rule);
        pass.set_bind_group(1, vectors, &[]);
        pass.set_bind_group(2, &memory.write, &[]);
        pass.dispatch_workgroups(d.value_heads as u32, d.value_dim as u32 / 32, 1);
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
        let mut to = 0;
        for (name, words) in self.choice_parts() {
            let (from, bytes) = (self.layout.at(name) as u64 * 4, words as u64 * 4);
            work.encoder().copy_buffer_to_buffer(&self.scratch, from, &self.landing, to, bytes);
            to += bytes;
        }
    }

    /// What comes back of a choice, and in how many words.
    fn choice_parts(&self) -> impl Iterator<Item = (&'static str, usize)> {
        let all = [
            ("CHOSEN_AT", self.top_k),
            ("WEIGHTS_AT", self.top_k),
            ("NORMED_AT", self.shape.hidden),
        ];
        let wanted = if self.misses().computed_eighths == 0 { 1 } else { all.len() };
        all.into_iter().take(wanted)
    }

    fn choice_bytes(&self) -> u64 {
        self.choice_parts().map(|(_, words)| words as u64 * 4).sum()
    }

    /// Hands over what leaves a choice, and behind it the first half of the experts that are here.
    fn ask<'g>(
        &'g self,
        experts: &'g Experts,
        commands: impl IntoIterator<Item = Commands<'g>>,
    ) -> Asked<'g> {
        let submission = Commands::submit(&self.device, commands);
        self.device.ask(&self.landing, self.choice_bytes());
        let mut work = self.work();
        self.up(&mut work, experts, self.top_k);
        Commands::submit(&self.device, [work.finish()]);
        Asked { experts, submission }
    }

    /// Waits for a choice.
    pub(super) fn read_choice(
        &self,
        submission: SubmissionIndex,
        choice: &mut Choice,
    ) -> Result<()> {
        self.device.answer(&self.landing, self.choice_bytes(), Some(submission), |landed| {
            let (ids, rest) = bytemuck::cast_slice::<u8, u32>(landed).split_at(self.top_k);
            choice.experts.clear();
            choice.experts.extend(ids.iter().map(|id| ExpertId(*id as u16)));
            let (weights, normed) = rest.split_at(rest.len().min(self.top_k));
            let floats = |to: &mut Vec<f32>, from: &[u32]| {
                to.clear();
                to.extend_from_slice(bytemuck::cast_slice(from));
            };
            floats(&mut choice.weights, weights);
            floats(&mut choice.normed, normed);
            choice.normed.chunks_exact_mut(STAGED_UNIT).for_each(in_order);
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

    /// Bytes of weights that the experts of a token have, and the shared one's down.
    pub(super) fn bytes_of_experts(&self, experts: &Experts) -> [u64; 2] {
        let layout = &self.kernels.experts[experts.kernels].slabs.layout;
        let shared = experts.shared.as_ref().map_or(0, |part| part.bytes);
        [(self.top_k * layout.record_bytes()) as u64, shared]
    }

    /// Down of the chosen experts and of the shared one.
    pub(super) fn down(&self, work: &mut Work, experts: &Experts) {
        let kernels = &self.kernels.experts[experts.kernels];
        let pass = work.stage(Stage::Experts, self.bytes_of_experts(experts).iter().sum());
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
        (timeline, position): (&Timeline, usize),
        watch: Watch,
        busy: &mut Busy,
    ) -> Result<()> {
        let hidden = self.shape.hidden;
        let mut before = self.look("H_AT", hidden)?;
        for (i, (layer, memory)) in self.layers.iter().zip(&timeline.layers).enumerate() {
            let mut work = self.work();
            self.mix(&mut work, layer, memory, position);
            Commands::submit(&self.device, [work.finish()]);
            let mixed = self.look("H_AT", hidden)?;
            watch("mixer", Some(i), &difference(&mixed, &before));
            self.feed_forward(host, layer, busy)?;
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
    fn feed_forward(&self, host: &Host, layer: &Layer, busy: &mut Busy) -> Result<()> {
        let mut work = self.work();
        let (mut front, mut later) = (Vec::new(), Vec::new());
        match &layer.feed_forward {
            Feeding::Dense { up, down } => self.dense(&mut work, up, down),
            Feeding::Experts(experts) => {
                self.choose(&mut work, experts);
                let asked = self.ask(experts, [work.finish()]);
                front = self.settle(host, asked, busy, &mut later, &mut None)?;
                work = self.work();
                self.down(&mut work, experts);
            }
        }
        front.push(work.finish());
        Commands::submit(&self.device, front);
        Ok(())
    }

    /// A part of the scratch.
    pub(super) fn look(&self, name: &str, words: usize) -> Result<Vec<f32>> {
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

/// Elements of a unit of a kernel's staged input.
const STAGED_UNIT: usize = 32;

/// Brings a unit from the order of the staged input, whose vector j of four holds elements j, j + 8, j + 16
/// and j + 24, into its own.
fn in_order(unit: &mut [f32]) {
    let mut elements = [0.0; STAGED_UNIT];
    for (i, value) in unit.iter().enumerate() {
        elements[i / 4 + i % 4 * 8] = *value;
    }
    unit.copy_from_slice(&elements);
}

/// `a - b`.
pub fn difference(a: &[f32], b: &[f32]) -> Vec<f32> {
    a.iter().zip(b).map(|(a, b)| a - b).collect()
}
