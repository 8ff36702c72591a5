//! A model on a GPU: every block of the forward pass as kernels, through wgpu.
//!
//! One source in WGSL reaches Vulkan, Metal and Direct3D 12. Dense weights lie in video memory as the
//! container has them and are unpacked where they are multiplied, in f32; experts lie in slots of video
//! memory, filled from the store. When all experts have a slot the device routes by itself and a token
//! is one submission; otherwise the choice comes back once a layer. Refuses what does not fit before
//! anything is allocated. The CPU's blocks are the truth that this is tested against.

mod adapters;
mod alone;
mod asked;
mod chunk;
mod clock;
mod dense;
mod device;
mod kernels;
mod layout;
mod limits;
mod pipelines;
mod plan;
mod products;
mod rates;
mod ring;
mod sample;
mod slots;
mod source;
mod step;
mod tiers;
mod timeline;
mod window;

use std::sync::{Mutex, MutexGuard, PoisonError};

use wgpu::{BindGroup, Buffer};

pub use adapters::{Adapter, AdapterKind, adapters, auto, pick, shared_memory};
pub use asked::{
    ChunkInput, ChunkOf, ChunkRates, DeviceLimits, GpuCounters, GpuOptions, Host, KernelRate,
    Logits, MissPlan, MissRates, Misses, NO_ADAPTER, SHARES, Stored, Token, VideoBudget, Watch,
    uploads_bytes,
};
pub use limits::limits;
pub use plan::{prefill_chunk, stored as plan};
pub use products::chunk_rates;
pub use timeline::Timeline;

use crate::container::{Container, Matrix, Precision};
use crate::engine::Options;
use crate::error::{Error, Result};
use crate::kv_cache::{KvFormat, KvShape};
use crate::shape::{ExpertId, LayerId, Shape};
use crate::timing::Timing;
use crate::weights::{
    AttentionWeights, DeltaNetWeights, FeedForwardWeights, LayerWeights, MixWeights, MoeWeights,
    Weights,
};
use chunk::Chunk;
use clock::{Clock, Work};
use dense::{Packing, Part, Segment};
use device::Device;
use kernels::{Compiler, Kernels, Views};
use layout::Layout;
use pipelines::KeptPipelines;
use slots::LayerSlots;
use source::{Lying, Slabs, Sources};
use step::Busy;
use tiers::Tiers;

/// A model on a device.
pub struct Gpu {
    device: Device,
    views: Views,
    kernels: Kernels,
    layout: Layout,
    budget: VideoBudget,
    layers: Vec<Layer>,
    head: Vec<Part>,
    kv: KvShape,
    shape: Shape,
    top_k: usize,
    scratch: Buffer,
    scratch_group: BindGroup,
    landing: Buffer,
    tiers: Tiers,
    chunk: Chunk,
    clock: Option<Clock>,
    busy: Mutex<Busy>, // one token at a time uses the scratch
}

struct Layer {
    mix: Mixing,
    feed_forward: Feeding,
}

enum Mixing {
    Attention { project: Vec<Part>, norms: BindGroup, out: Vec<Part> },
    DeltaNet { project: Vec<Part>, vectors: BindGroup, out: Vec<Part> },
}

enum Feeding {
    Dense { up: Vec<Part>, down: Vec<Part> },
    Experts(Box<Experts>),
}

struct Experts {
    route: Vec<Part>,
    shared: Option<Part>,
    slots: LayerSlots,
    kernels: usize, // which of `Kernels::experts`
}

impl Gpu {
    /// Plans the video memory, compiles the kernels and brings the dense weights there: each layer leaves
    /// `weights` when it is on the device. Experts follow with [`Gpu::prepare`] or when a token asks for them.
    ///
    /// # Errors
    /// No such adapter; a format that the kernels do not take; a plan above the limit, as a table; the
    /// driver refuses.
    pub fn open(
        container: &Container,
        weights: &mut Weights,
        options: &Options,
        wanted: &GpuOptions,
    ) -> Result<Self> {
        let shape = container.shape();
        check(shape, options)?;
        let (_, adapter) = pick(wanted.adapter)?;
        let [layout, of_chunk] = plan::layouts(shape, options, &adapter)?;
        let records = container.layouts();
        let dense_bytes = plan::dense_bytes(weights, shape);
        let layouts = [&layout, &of_chunk];
        let demand = plan::Demand { shape, records, dense_bytes, options, layouts };
        let budget = plan::plan(&demand, &adapter, wanted)?;
        let (device, kept) = opened(&adapter, wanted)?;
        let sources = Sources {
            declarations: layout.declarations(shape),
            precisions: precisions(weights),
            subgroups: device.subgroups,
            tensor: device.tensor.filter(|_| !wanted.plain),
        };
        let views = Views::new(&device);
        let each = slots_of_layers(container, weights, &budget)?;
        let distinct = distinct(&each);
        let halves = options.kv_cache == KvFormat::F16;
        let compiler =
            Compiler { device: &device, views: &views, sources: &sources, shape, halves };
        let kernels = compiler.all(&distinct)?;
        let loader = Loader {
            device: &device,
            views: &views,
            kernels: &kernels,
            layouts,
            shape,
            packing: Packing {
                precisions: &sources.precisions,
                buffer_bytes: adapter.binding_bytes,
                views: &views,
            },
            budget: &budget,
        };
        let layers = loader.layers(std::mem::take(&mut weights.layers), &each)?;
        let head = loader.head(weights)?;
        let slabs: Vec<Slabs> = distinct.iter().map(|(slabs, _)| slabs.clone()).collect();
        let chunk = Chunk::new(&compiler, of_chunk, &slabs)?;
        kept.iter().for_each(|kept| kept.save(&device));
        let clock = if wanted.timed { Clock::new(&device)? } else { None };
        let scratch = device.buffer("scratch", layout.bytes())?;
        let records = (plan::record_bytes(records), wanted.misses);
        Ok(Self {
            scratch_group: device.group(&views.scratch, &[&scratch])?,
            landing: device.landing(layout.bytes())?,
            tiers: Tiers::new(&device, &layout, shape, records)?,
            kv: KvShape::of(&shape.attention, options.kv_cache),
            shape: shape.clone(),
            top_k: layout::top_k(shape, options),
            busy: Mutex::default(),
            chunk,
            clock,
            device,
            views,
            kernels,
            layout,
            budget,
            layers,
            head,
            scratch,
        })
    }

    /// The plan of its video memory.
    pub fn budget(&self) -> &VideoBudget {
        &self.budget
    }

    /// Finds out how records get here. Brings all experts in when all have a slot, and then no token waits for
    /// one. Otherwise decides who computes what is missing, by measuring if that was asked for.
    ///
    /// # Errors
    /// A failed read; the device failed.
    pub fn prepare(&mut self, host: &Host) -> Result<()> {
        self.tiers.in_place = self.reads_in_place(host)?;
        if !self.budget.resident {
            return self.plan_misses(host);
        }
        let all: Vec<ExpertId> = (0..self.shape.moe.experts).map(|e| ExpertId(e as u16)).collect();
        for layer in &self.layers {
            if let Feeding::Experts(experts) = &layer.feed_forward {
                self.pass(host, &experts.slots, &all, &|| self.work(), &mut |_, _| {})?;
            }
        }
        self.device.wait_for(None)
    }

    /// Forgets every expert that can be had again, as if the model had just been opened.
    pub fn forget(&self) {
        let _scratch = self.lock();
        for layer in &self.layers {
            match &layer.feed_forward {
                Feeding::Experts(experts) if !self.budget.resident => {
                    experts.slots.forget(&self.device);
                }
                _ => {}
            }
        }
    }

    /// Adds what the device's clock has seen since the last call.
    ///
    /// # Errors
    /// The device failed.
    pub fn time(&self, timing: &mut Timing) -> Result<()> {
        match self.clock() {
            Some(clock) => clock.read(&self.device, timing),
            None => Ok(()),
        }
    }

    fn work(&self) -> Work<'_> {
        Work::new(&self.device, self.clock(), &self.scratch_group)
    }

    /// The device's clock, while it times stages.
    fn clock(&self) -> Option<&Clock> {
        self.clock.as_ref().filter(|clock| clock.runs())
    }

    /// Whether there is a clock that can time stages.
    pub fn has_clock(&self) -> bool {
        self.clock.is_some()
    }

    /// Stages are timed from here on, or no more, where there is a clock.
    pub fn let_clock_run(&self, runs: bool) {
        // What was written ahead was written for the other way.
        self.lock().ahead = None;
        self.clock.iter().for_each(|clock| clock.let_run(runs));
    }

    fn lock(&self) -> MutexGuard<'_, Busy> {
        self.busy.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The device, and the kernels that earlier runs have compiled for it.
fn opened(adapter: &Adapter, wanted: &GpuOptions) -> Result<(Device, Option<KeptPipelines>)> {
    let mut device = Device::open(&adapter.adapter)?;
    let dir = wanted.kernels_dir.as_deref();
    let kept = dir.and_then(|dir| KeptPipelines::open(dir, &adapter.adapter, &mut device));
    Ok((device, kept))
}

/// The ways in which layers' slots lie, each once.
fn distinct(layers: &[Option<Lying>]) -> Vec<Lying> {
    let mut distinct: Vec<Lying> = Vec::new();
    for lying in layers.iter().flatten() {
        if !distinct.contains(lying) {
            distinct.push(lying.clone());
        }
    }
    distinct
}

/// Whether the kernels take this model and these options.
pub fn check(shape: &Shape, options: &Options) -> Result<()> {
    let refuse = |what: String| Err(Error::Gpu(format!("{what}; --device cpu takes it")));
    if !matches!(options.kv_cache, KvFormat::F32 | KvFormat::F16) {
        return refuse(format!(
            "--kv-cache {} on a GPU, which keeps keys and values in f32 or f16",
            options.kv_cache
        ));
    }
    let a = &shape.attention;
    if a.head_dim > 256 || !a.head_dim.is_multiple_of(16) {
        return refuse(format!(
            "heads {} wide, the GPU's kernels take multiples of 16 up to 256",
            a.head_dim
        ));
    }
    if shape.hidden > layout::BLOCK_MAX || !shape.hidden.is_multiple_of(32) {
        return refuse(format!(
            "a hidden size of {}, the GPU's kernels take multiples of 32 up to {}",
            shape.hidden,
            layout::BLOCK_MAX
        ));
    }
    if let Some(d) = &shape.delta {
        let fits =
            d.key_dim <= 256 && d.key_dim.is_multiple_of(8) && d.value_dim.is_multiple_of(32);
        if !fits || d.conv_taps != 4 {
            return refuse(format!(
                "delta-net heads of {} by {} with {} taps, the GPU's kernels take keys up to 256 in \
                 eights, values in multiples of 32, and 4 taps",
                d.key_dim, d.value_dim, d.conv_taps
            ));
        }
    }
    if layout::top_k(shape, options) > 64 {
        return refuse("more than 64 experts for a token".into());
    }
    Ok(())
}

/// Layouts of the dense weights, each once.
fn precisions(weights: &Weights) -> Vec<Precision> {
    let mut all = vec![weights.head().precision()];
    let mut add = |precision| {
        if !all.contains(&precision) {
            all.push(precision);
        }
    };
    for matrix in weights.layers.iter().flat_map(LayerWeights::matrices) {
        add(matrix.precision());
    }
    all
}

/// How each layer's slots lie, and how its shared expert's down is stored; `None` for a dense layer.
fn slots_of_layers(
    container: &Container,
    weights: &Weights,
    budget: &VideoBudget,
) -> Result<Vec<Option<Lying>>> {
    let mut layouts = container.layouts().iter();
    let of = |layer: &LayerWeights| {
        let FeedForwardWeights::Experts(w) = &layer.feed_forward else { return Ok(None) };
        let layout = layouts.next().expect("a layout for each layer with experts");
        let slabs = slots::slabs(layout, budget.slots_each, budget.buffer_bytes)?;
        Ok(Some((slabs, w.shared.as_ref().map(|(block, _)| block.down.precision()))))
    };
    weights.layers.iter().map(of).collect()
}

/// Brings dense weights to the device, layer by layer.
struct Loader<'a> {
    device: &'a Device,
    views: &'a Views,
    kernels: &'a Kernels,
    layouts: [&'a Layout; 2],
    shape: &'a Shape,
    packing: Packing<'a>,
    budget: &'a VideoBudget,
}

impl Loader<'_> {
    /// All layers; the memory of each is given up before the next one is brought.
    fn layers(&self, layers: Vec<LayerWeights>, slots: &[Option<Lying>]) -> Result<Vec<Layer>> {
        let layers = layers.into_iter().zip(slots).zip(0u16..);
        let load = |((layer, slots), id): ((LayerWeights, &Option<_>), u16)| {
            Ok(Layer {
                mix: match &layer.mix {
                    MixWeights::Attention(w) => self.attention(&layer, w)?,
                    MixWeights::DeltaNet(w) => self.delta_net(&layer, w)?,
                },
                feed_forward: match (&layer.feed_forward, slots) {
                    (FeedForwardWeights::Experts(w), Some(slots)) => {
                        self.experts(LayerId(id), &layer.post_norm, w, slots)?
                    }
                    (FeedForwardWeights::Dense(block), _) => {
                        let up = [(&block.gate, "GATE_AT"), (&block.up, "UP_AT")];
                        let down = self.kernels.dense_down.as_ref();
                        let down = down.expect("compiled where a layer is dense");
                        Feeding::Dense {
                            up: self.segments(
                                "dense block",
                                &up,
                                &layer.post_norm,
                                self.kernels.project.rows,
                            )?,
                            down: self.segments(
                                "dense block",
                                &[(&block.down, "H_AT")],
                                &[],
                                down.rows,
                            )?,
                        }
                    }
                    (FeedForwardWeights::Experts(_), None) => {
                        unreachable!("a layer with experts has slots")
                    }
                },
            })
        };
        let layers = layers.map(load).collect::<Result<_>>()?;
        if self.budget.direct {
            self.device.wait_for(None)?; // for the zeros of slots that are written from here
        }
        Ok(layers)
    }

    fn head(&self, weights: &Weights) -> Result<Vec<Part>> {
        let to = self.layouts[0].at("LOGITS_AT");
        let head = [Segment { matrix: weights.head(), to, chunk_to: 0 }];
        self.pack("head", &head, &weights.norm, self.kernels.project.rows)
    }

    fn pack(
        &self,
        name: &str,
        segments: &[Segment],
        vector: &[f32],
        rows: usize,
    ) -> Result<Vec<Part>> {
        self.packing.pack(self.device, name, segments, vector, rows)
    }

    fn segments<'w>(
        &self,
        name: &str,
        matrices: &[(&'w Matrix, &str)],
        vector: &[f32],
        rows: usize,
    ) -> Result<Vec<Part>> {
        let segment = |(matrix, place): &(&'w Matrix, &str)| {
            let [to, chunk_to] = self.layouts.map(|layout| layout.at(place));
            Segment { matrix, to, chunk_to }
        };
        let segments: Vec<Segment> = matrices.iter().map(segment).collect();
        self.pack(name, &segments, vector, rows)
    }

    fn vectors(&self, vectors: &[&[f32]]) -> Result<BindGroup> {
        let all = vectors.concat();
        let buffer = self.device.filled("vectors", bytemuck::cast_slice(&all))?;
        self.views.read_group(self.device, &buffer)
    }

    fn attention(&self, layer: &LayerWeights, w: &AttentionWeights) -> Result<Mixing> {
        let project = [(&w.q, "QUERY_AT"), (&w.k, "KEY_AT"), (&w.v, "VALUE_AT")];
        let out = self.kernels.attention.as_ref().expect("compiled where a layer has attention");
        Ok(Mixing::Attention {
            project: self.segments(
                "attention",
                &project,
                &layer.input_norm,
                self.kernels.project.rows,
            )?,
            norms: self.vectors(&[&w.q_norm, &w.k_norm])?,
            out: self.segments("attention", &[(&w.o, "H_AT")], &[], out.out.rows)?,
        })
    }

    fn delta_net(&self, layer: &LayerWeights, w: &DeltaNetWeights) -> Result<Mixing> {
        let project = [(&w.qkv, "RAW_AT"), (&w.z, "Z_AT"), (&w.b, "B_AT"), (&w.a, "A_AT")];
        let out = self.kernels.delta.as_ref().expect("compiled where a layer has the delta rule");
        Ok(Mixing::DeltaNet {
            project: self.segments(
                "delta-net",
                &project,
                &layer.input_norm,
                self.kernels.project.rows,
            )?,
            vectors: self.vectors(&[&w.conv, &w.rate, &w.dt_bias])?,
            out: self.segments("delta-net", &[(&w.out, "H_AT")], &w.norm, out.out.rows)?,
        })
    }

    fn experts(
        &self,
        layer: LayerId,
        norm: &[f32],
        w: &MoeWeights,
        slots: &Lying,
    ) -> Result<Feeding> {
        let kernels = self.kernels.experts.iter();
        let place = kernels.map(|k| (&k.slabs, &k.shared)).position(|k| k == (&slots.0, &slots.1));
        let mut route = vec![(&w.router, "ROUTER_AT")];
        let mut shared = None;
        if let Some((block, gate)) = &w.shared {
            route.extend([
                (&block.gate, "SHARED_GATE_AT"),
                (&block.up, "SHARED_UP_AT"),
                (gate, "SHARED_SIGMOID_AT"),
            ]);
            let parts = self.segments("shared expert", &[(&block.down, "H_AT")], &[], 1)?;
            shared = one(parts)?;
        }
        let counts = (self.budget.slots_each, self.shape.moe.experts);
        Ok(Feeding::Experts(Box::new(Experts {
            route: self.segments("router", &route, norm, self.kernels.router.rows)?,
            shared,
            slots: LayerSlots::new(
                (self.device, self.views),
                layer,
                slots.0.clone(),
                counts,
                self.budget.direct,
            )?,
            kernels: place.expect("kernels are compiled for every distinct layout"),
        })))
    }
}

/// The only part of a matrix that is not to be cut.
fn one(mut parts: Vec<Part>) -> Result<Option<Part>> {
    match parts.len() {
        1 => Ok(parts.pop()),
        _ => Err(Error::Gpu(
            "the shared expert is larger than the device's largest buffer; --device cpu takes it"
                .into(),
        )),
    }
}

#[cfg(test)]
#[path = "../../tests/gpu_kernels/mod.rs"]
mod kernel_tests;
