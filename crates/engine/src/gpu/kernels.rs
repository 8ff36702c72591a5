//! All kernels of a model, compiled once when it opens.
//!
//! Owns the layouts of their buffers too. How many rows a team takes is decided here: enough work for a
//! team to have several reads under way, and enough workgroups for every processor of the device.

use std::iter;

use wgpu::{BindGroup, BindGroupLayout, Buffer, BufferBinding, ComputePipeline};

use super::device::{Access, Device};
use super::source::{Give, Input, Lying, Rows, Slabs, Sources, Tile};
use crate::container::Precision;
use crate::error::Result;
use crate::shape::{FeedForward, Mix, Shape};

/// Workgroups that keep a large device busy.
const WORKGROUPS_WANTED: usize = 256;
/// Rows of a team at most.
const ROWS_MAX: usize = 4;

/// How kernels see their buffers.
pub struct Views {
    /// The scratch.
    pub scratch: BindGroupLayout,
    /// One buffer that is read, as vectors and as words.
    pub read: BindGroupLayout,
    /// One that is written too.
    pub write: BindGroupLayout,
    /// The table of a layer's slots and its slabs, each as vectors and as words, by their number less one.
    pub slots: Vec<BindGroupLayout>,
}

impl Views {
    /// On a device.
    pub fn new(device: &Device) -> Self {
        let slots =
            (1..=super::slots::SLABS_MAX).map(|n| device.layout(&vec![Access::Read; 2 * n + 1]));
        Self {
            scratch: device.layout(&[Access::Write]),
            read: device.layout(&[Access::Read; 2]),
            write: device.layout(&[Access::Write]),
            slots: slots.collect(),
        }
    }

    /// A buffer that is read.
    ///
    /// # Errors
    /// As [`Device::group`].
    pub fn read_group(&self, device: &Device, buffer: &Buffer) -> Result<BindGroup> {
        device.group(&self.read, &[buffer, buffer])
    }

    /// A layer's slots: their table and as many slabs as there are.
    ///
    /// # Errors
    /// As [`Device::group`].
    pub fn slots_group(
        &self,
        device: &Device,
        places: &Buffer,
        slabs: &[BufferBinding],
    ) -> Result<BindGroup> {
        let slabs_twice = slabs.iter().flat_map(|slab| [slab.clone(), slab.clone()]);
        let parts = iter::once(places.as_entire_buffer_binding()).chain(slabs_twice);
        device.group_of_parts(&self.slots[slabs.len() - 1], parts)
    }
}

/// A kernel for matrices, and the rows of a team.
pub struct MatVec {
    /// The kernel.
    pub kernel: ComputePipeline,
    /// Rows of a team.
    pub rows: usize,
}

/// Kernels of the layers that have attention.
pub struct AttentionKernels {
    pub turn: ComputePipeline,
    pub attend: ComputePipeline,
    pub combine: ComputePipeline,
    pub out: MatVec,
}

/// Kernels of the layers that have the delta rule.
pub struct DeltaKernels {
    pub rule: ComputePipeline,
    pub out: MatVec,
}

/// Kernels of the layers whose experts lie so.
pub struct ExpertKernels {
    pub slabs: Slabs,
    pub shared: Option<Precision>,
    pub up: ComputePipeline,
    pub up_workgroups: u32,
    pub down: ComputePipeline,
    pub down_workgroups: u32,
}

/// All of them.
pub struct Kernels {
    pub project: MatVec,
    pub attention: Option<AttentionKernels>,
    pub delta: Option<DeltaKernels>,
    pub router: MatVec,
    pub choose: ComputePipeline,
    pub experts: Vec<ExpertKernels>,
    pub dense_down: Option<MatVec>,
}

/// A kernel for tiles of both heights.
pub struct Tiles {
    pub short: ComputePipeline,
    pub tall: ComputePipeline,
}

/// A product with many vectors, and what splits them in front of it for tensor cores.
pub struct Gemm {
    pub split: Option<ComputePipeline>,
    pub tiles: Tiles,
}

/// Kernels of a chunk's layers that have attention.
pub struct AttentionChunk {
    pub turn: ComputePipeline,
    pub attend: ComputePipeline,
    pub attend_part: ComputePipeline,
    pub combine: ComputePipeline,
    pub out: Gemm,
}

/// Kernels of a chunk's layers that have the delta rule.
pub struct DeltaChunk {
    pub rows: ComputePipeline,
    pub pairs: ComputePipeline,
    pub scan: ComputePipeline,
    pub heads: ComputePipeline,
    pub out: Gemm,
}

/// Kernels of a chunk's experts that lie so.
pub struct ExpertChunk {
    pub up: Tiles,
    pub split: Option<Tiles>, // of what up gave
    pub down: Tiles,
}

/// All kernels of a chunk.
pub struct ChunkKernels {
    pub norm: ComputePipeline,
    pub project: Gemm,
    pub attention: Option<AttentionChunk>,
    pub delta: Option<DeltaChunk>,
    pub choose: ComputePipeline,
    pub experts: Vec<ExpertChunk>,
    pub join: ComputePipeline,
    pub shared_down: Option<Gemm>,
    pub dense_down: Option<Gemm>,
}

/// Rows of a team where the kernel has so many in all.
pub fn rows_of_team(rows: usize) -> usize {
    let most = (rows / (super::dense::TEAMS * WORKGROUPS_WANTED)).clamp(1, ROWS_MAX);
    1 << most.ilog2()
}

/// Compiles kernels for one model.
pub struct Compiler<'a> {
    pub device: &'a Device,
    pub views: &'a Views,
    pub sources: &'a Sources,
    pub shape: &'a Shape,
    /// Whether keys and values are kept in halves.
    pub halves: bool,
}

impl Compiler<'_> {
    /// All kernels; `experts` are the layers' distinct slots with their shared experts' layouts.
    ///
    /// # Errors
    /// The driver refuses one.
    pub fn all(&self, experts: &[Lying]) -> Result<Kernels> {
        let shape = self.shape;
        let kind = |mix| shape.count(mix) > 0;
        let is_dense = |l: &crate::shape::Layer| l.feed_forward == FeedForward::Dense;
        let route = self.sources.route();
        let v = self.views;
        Ok(Kernels {
            // Published models have 4 times as many rows to project and more.
            project: self.mat_vec(Input::Norm, Give::Store, shape.hidden, 4 * shape.hidden)?,
            attention: kind(Mix::Attention).then(|| self.attention()).transpose()?,
            delta: kind(Mix::DeltaNet).then(|| self.delta()).transpose()?,
            router: self.mat_vec(Input::KeptNorm, Give::Store, shape.hidden, shape.moe.experts)?,
            choose: self.device.kernel("route", &route, &[&v.scratch])?,
            experts: experts.iter().map(|of| self.experts(of)).collect::<Result<_>>()?,
            dense_down: (shape.layers.iter().any(is_dense))
                .then(|| self.mat_vec(Input::Gated, Give::Add, shape.dense_width, shape.hidden))
                .transpose()?,
        })
    }

    fn mat_vec(&self, input: Input, give: Give, cols: usize, rows: usize) -> Result<MatVec> {
        let rows = rows_of_team(rows);
        let source = self.sources.by_vector(input, give, cols, rows);
        let groups = [&self.views.scratch, &self.views.read];
        let kernel = self.device.kernel(&format!("mat_vec {input:?}"), &source, &groups)?;
        Ok(MatVec { kernel, rows })
    }

    fn attention(&self) -> Result<AttentionKernels> {
        let (v, a) = (self.views, &self.shape.attention);
        let turn = self.sources.turn(self.halves);
        let attend = self.sources.attend(self.halves);
        let cols = a.heads * a.head_dim;
        Ok(AttentionKernels {
            turn: self.device.kernel("turn", &turn, &[&v.scratch, &v.read, &v.write])?,
            attend: self.device.kernel("attend", &attend, &[&v.scratch, &v.read])?,
            combine: self.device.kernel("combine", &self.sources.combine(), &[&v.scratch])?,
            out: self.mat_vec(Input::Plain, Give::Add, cols, self.shape.hidden)?,
        })
    }

    fn delta(&self) -> Result<DeltaKernels> {
        let v = self.views;
        let d =
            self.shape.delta.as_ref().expect("a shape with delta-net layers has their dimensions");
        let groups = [&v.scratch, &v.read, &v.write];
        Ok(DeltaKernels {
            rule: self.device.kernel("delta", &self.sources.delta(), &groups)?,
            out: self.mat_vec(Input::Heads, Give::Add, d.value_width(), self.shape.hidden)?,
        })
    }

    fn experts(&self, (slabs, shared): &Lying) -> Result<ExpertKernels> {
        let (v, shape) = (self.views, self.shape);
        let slots = &v.slots[slabs.slabs - 1];
        // A row of the pair is two rows of weights.
        let up_rows = rows_of_team(shape.moe.width * shape.moe.top_k).min(2);
        let down_rows = rows_of_team(shape.hidden);
        let up = self.sources.experts_up(slabs, shape.hidden, up_rows);
        let longest = shape.moe.width * shape.moe.top_k + shape.moe.shared_width;
        let down = self.sources.experts_down(slabs, *shared, longest, down_rows);
        let with_shared = [&v.scratch, slots, &v.read];
        let groups = &with_shared[..if shared.is_some() { 3 } else { 2 }];
        let count = |rows: usize, each: usize| rows.div_ceil(super::dense::TEAMS * each) as u32;
        Ok(ExpertKernels {
            slabs: slabs.clone(),
            shared: *shared,
            up: self.device.kernel("experts up", &up, &[&v.scratch, slots])?,
            up_workgroups: count(shape.moe.width, up_rows),
            down: self.device.kernel("experts down", &down, groups)?,
            down_workgroups: count(shape.hidden, down_rows),
        })
    }

    /// All kernels of a chunk, whose constants are in `sources`.
    ///
    /// # Errors
    /// The driver refuses one.
    pub fn chunk(&self, sources: &Sources, slabs: &[Slabs]) -> Result<ChunkKernels> {
        let (shape, v) = (self.shape, self.views);
        let has_dense = shape.layers.iter().any(|l| l.feed_forward == FeedForward::Dense);
        let gemm = |rows, give, cols| self.gemm(sources, rows, give, cols);
        let shared = shape.moe.shared_width;
        Ok(ChunkKernels {
            norm: self.device.kernel("norm", &sources.norm_rows(), &[&v.scratch, &v.read])?,
            project: gemm(Rows::Normed, Give::Store, shape.hidden)?,
            attention: (shape.count(Mix::Attention) > 0)
                .then(|| self.attention_chunk(sources))
                .transpose()?,
            delta: (shape.count(Mix::DeltaNet) > 0)
                .then(|| self.delta_chunk(sources))
                .transpose()?,
            choose: self.device.kernel("route", &sources.route(), &[&v.scratch])?,
            experts: slabs.iter().map(|s| self.experts_chunk(sources, s)).collect::<Result<_>>()?,
            join: self.device.kernel("join", &sources.join_rows(), &[&v.scratch, &v.read])?,
            shared_down: (shared > 0).then(|| gemm(Rows::Shared, Give::Add, shared)).transpose()?,
            dense_down: has_dense
                .then(|| gemm(Rows::Gated, Give::Add, shape.dense_width))
                .transpose()?,
        })
    }

    /// Products of matrices of so many columns with a chunk's rows.
    ///
    /// # Errors
    /// The driver refuses one.
    pub fn gemm(&self, sources: &Sources, rows: Rows, give: Give, cols: usize) -> Result<Gemm> {
        let v = self.views;
        let source = |tile| sources.by_rows(rows, give, cols, tile);
        let split = || self.device.kernel("split", &sources.split(rows, cols), &[&v.scratch]);
        Ok(Gemm {
            split: sources.tensor.map(|_| split()).transpose()?,
            tiles: self.tiles(&format!("gemm {rows:?}"), &source, &[&v.scratch, &v.read])?,
        })
    }

    fn tiles(
        &self,
        name: &str,
        source: &dyn Fn(Tile) -> String,
        groups: &[&BindGroupLayout],
    ) -> Result<Tiles> {
        let kernel = |tile| self.device.kernel(name, &source(tile), groups);
        Ok(Tiles { short: kernel(Tile::Short)?, tall: kernel(Tile::Tall)? })
    }

    fn attention_chunk(&self, sources: &Sources) -> Result<AttentionChunk> {
        let (v, a) = (self.views, &self.shape.attention);
        let turn = sources.turn(self.halves);
        let attend = sources.attend_rows(self.halves, a.head_dim);
        let attend_part = sources.attend_rows_part(self.halves, a.head_dim);
        Ok(AttentionChunk {
            turn: self.device.kernel("turn", &turn, &[&v.scratch, &v.read, &v.write])?,
            attend: self.device.kernel("attend", &attend, &[&v.scratch, &v.read])?,
            attend_part: self.device.kernel("attend part", &attend_part, &[&v.scratch, &v.read])?,
            combine: self.device.kernel("combine", &sources.combine_rows(), &[&v.scratch])?,
            out: self.gemm(sources, Rows::Mixed, Give::Add, a.heads * a.head_dim)?,
        })
    }

    fn delta_chunk(&self, sources: &Sources) -> Result<DeltaChunk> {
        let v = self.views;
        let d =
            self.shape.delta.as_ref().expect("a shape with delta-net layers has their dimensions");
        let kernel = |name, source: &str, groups: &[&BindGroupLayout]| {
            self.device.kernel(name, source, groups)
        };
        Ok(DeltaChunk {
            rows: kernel("delta rows", &sources.delta_rows(), &[&v.scratch, &v.read, &v.read])?,
            pairs: kernel("delta pairs", &sources.delta_pairs(), &[&v.scratch, &v.read])?,
            scan: kernel("delta scan", &sources.delta_scan(), &[&v.scratch, &v.read, &v.write])?,
            heads: kernel("heads", &sources.heads_rows(), &[&v.scratch, &v.read])?,
            out: self.gemm(sources, Rows::Mixed, Give::Add, d.value_width())?,
        })
    }

    /// Products of experts with a chunk's rows.
    ///
    /// # Errors
    /// The driver refuses one.
    pub fn experts_chunk(&self, sources: &Sources, slabs: &Slabs) -> Result<ExpertChunk> {
        let (v, sizes) = (self.views, (self.shape.hidden, self.shape.moe.width));
        let groups = [&v.scratch, &v.slots[slabs.slabs - 1], &v.read];
        let up = |tile| sources.gemm_up(slabs, sizes, tile);
        let split = |tile| sources.split_experts(sizes, tile);
        let down = |tile| sources.gemm_down(slabs, sizes, tile);
        Ok(ExpertChunk {
            up: self.tiles("gemm experts up", &up, &groups)?,
            split: (sources.tensor)
                .map(|_| self.tiles("split experts", &split, &[&v.scratch, &v.read]))
                .transpose()?,
            down: self.tiles("gemm experts down", &down, &groups)?,
        })
    }
}
