//! One token on the device.
//!
//! When all experts have a slot the whole token is one submission. Otherwise each layer is handed over up
//! to its router, the choice comes back, what is missing is written into slots, and the layer goes on.

use wgpu::{CommandBuffer, CommandEncoder, ComputePass};

use super::clock::Work;
use super::dense::bytes_of;
use super::layout::{SPLITS_MAX, grouped};
use super::{Experts, Feeding, Gpu, Layer, Logits, Mixing, Part, Timeline, Token, Watch};
use crate::error::Result;
use crate::kv_cache::PAGE_POSITIONS;
use crate::shape::ExpertId;
use crate::store::{ExpertStore, Purpose};
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
        store: &ExpertStore,
        timeline: &Timeline,
        token: &Token,
        logits: Logits,
        watch: Option<Watch>,
    ) -> Result<()> {
        let mut ahead = self.lock();
        self.begin(token);
        match watch {
            Some(watch) => self.watched(store, timeline, token.position, watch)?,
            None if self.budget.resident => {
                return self.resident(timeline, token.position, logits, &mut ahead);
            }
            None => {
                for (layer, memory) in self.layers.iter().zip(&timeline.layers) {
                    let mut work = self.work();
                    self.mix(&mut work, layer, memory, token.position);
                    self.feed_forward(store, layer, work)?;
                }
            }
        }
        self.finish(logits, self.work())
    }

    /// A token whose experts all have a slot: one submission. While the device is at it, the commands of
    /// the token after it are written, which depend on its position alone.
    fn resident(
        &self,
        timeline: &Timeline,
        position: usize,
        logits: Logits,
        ahead: &mut Option<Ahead>,
    ) -> Result<()> {
        let Logits::Into(logits) = logits else {
            return self.finish(Logits::No, self.whole(timeline, position));
        };
        let is_this = |ahead: &Ahead| ahead.timeline == timeline.id && ahead.position == position;
        let commands = match ahead.take().filter(is_this) {
            Some(ahead) => ahead.commands,
            None => self.with_head(self.whole(timeline, position), logits.len()).finish(),
        };
        self.device.submit_all([commands]);
        if self.clock.is_none() && position + 1 < timeline.context {
            let work = self.whole(timeline, position + 1);
            let commands = self.with_head(work, logits.len()).finish();
            *ahead = Some(Ahead { timeline: timeline.id, position: position + 1, commands });
        }
        self.land(logits)
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
                    self.experts(&mut work, experts);
                }
            }
        }
        work
    }

    fn begin(&self, token: &Token) {
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
        self.device.write(&self.scratch, 0, bytemuck::cast_slice(&words));
    }

    /// Pages of the context that a workgroup attends to.
    fn pages_each(&self, position: usize) -> usize {
        (position + 1).div_ceil(PAGE_POSITIONS).div_ceil(SPLITS_MAX)
    }

    /// Hands the commands over with those of the head, and reads the logits back.
    pub(super) fn finish(&self, logits: Logits, work: Work) -> Result<()> {
        let Logits::Into(logits) = logits else {
            self.device.submit(work.done());
            return self.device.check();
        };
        self.device.submit(self.with_head(work, logits.len()));
        self.land(logits)
    }

    /// The commands with those of the head, and the way back of so many logits.
    fn with_head(&self, mut work: Work, logits: usize) -> CommandEncoder {
        let pass = work.stage(Stage::Logits, bytes_of(&self.head));
        self.mat_vec(pass, &self.kernels.project, &self.head);
        let mut encoder = work.done();
        let start = self.layout.at("LOGITS_AT") as u64 * 4;
        let bytes = logits as u64 * 4;
        encoder.copy_buffer_to_buffer(&self.scratch, start, &self.landing, 0, bytes);
        encoder
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

    /// The chosen experts and the shared one.
    fn experts(&self, work: &mut Work, experts: &Experts) {
        let kernels = &self.kernels.experts[experts.kernels];
        let shared = experts.shared.as_ref().map_or(0, |part| part.bytes);
        let routed = (self.top_k * kernels.slabs.layout.record_bytes()) as u64;
        let pass = work.stage(Stage::Experts, routed + shared);
        pass.set_pipeline(&kernels.up);
        pass.set_bind_group(1, &experts.slots.group, &[]);
        pass.dispatch_workgroups(kernels.up_workgroups, self.top_k as u32, 1);
        pass.set_pipeline(&kernels.down);
        pass.set_bind_group(1, &experts.slots.group, &[]);
        if let Some(shared) = &experts.shared {
            pass.set_bind_group(2, &shared.group, &[]);
        }
        pass.dispatch_workgroups(kernels.down_workgroups, 1, 1);
    }

    /// Hands the commands over and waits for the ids that they leave.
    fn read_chosen(&self, work: Work) -> Result<Vec<ExpertId>> {
        let mut encoder = work.done();
        let bytes = self.top_k as u64 * 4;
        let from = self.layout.at("CHOSEN_AT") as u64 * 4;
        encoder.copy_buffer_to_buffer(&self.scratch, from, &self.landing, 0, bytes);
        self.device.submit(encoder);
        self.device.landed(&self.landing, bytes, |landed| {
            let ids = bytemuck::cast_slice::<u8, u32>(landed).iter();
            ids.map(|id| ExpertId(*id as u16)).collect()
        })
    }

    /// As a token whose experts may be missing, telling of everything on the way.
    fn watched(
        &self,
        store: &ExpertStore,
        timeline: &Timeline,
        position: usize,
        watch: Watch,
    ) -> Result<()> {
        let hidden = self.shape.hidden;
        let mut before = self.look("H_AT", hidden)?;
        for (i, (layer, memory)) in self.layers.iter().zip(&timeline.layers).enumerate() {
            let mut work = self.work();
            self.mix(&mut work, layer, memory, position);
            self.device.submit(work.done());
            let mixed = self.look("H_AT", hidden)?;
            watch("mixer", Some(i), &difference(&mixed, &before));
            self.feed_forward(store, layer, self.work())?;
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

    /// A layer's feed-forward behind the commands that there are. The choice of experts comes back
    /// before they are computed, since they may be missing.
    fn feed_forward<'g>(
        &'g self,
        store: &ExpertStore,
        layer: &Layer,
        mut work: Work<'g>,
    ) -> Result<()> {
        match &layer.feed_forward {
            Feeding::Dense { up, down } => self.dense(&mut work, up, down),
            Feeding::Experts(experts) => {
                self.route(&mut work, experts);
                let pass = work.stage(Stage::Route, 0);
                pass.set_pipeline(&self.kernels.choose);
                pass.dispatch_workgroups(1, 1, 1);
                let chosen = self.read_chosen(work)?;
                self.bring(store, experts, &chosen, Purpose::Use)?;
                work = self.work();
                self.experts(&mut work, experts);
            }
        }
        self.device.submit(work.done());
        Ok(())
    }

    /// A part of the scratch.
    fn look(&self, name: &str, words: usize) -> Result<Vec<f32>> {
        let mut values = vec![0f32; words];
        let bytes = bytemuck::cast_slice_mut(&mut values);
        self.device.read(&self.scratch, self.layout.at(name) as u64 * 4, bytes)?;
        Ok(values)
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
