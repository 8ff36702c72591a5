//! A chunk of a prompt on the device, its tokens together.
//!
//! Every matrix is multiplied by all tokens at once; the choice of experts comes back once a layer, the
//! tokens are sorted by expert here, and every expert is multiplied by all of its tokens: those that have a
//! slot at once, the others in waves as their records come in, one wave uploaded while the one before it is
//! computed. Outputs are kept apart and added up in the router's order, so neither the number of slots nor
//! what was in them changes a bit.

use wgpu::{BindGroup, Buffer, ComputePass, ComputePipeline};

use super::asked::Host;
use super::clock::{Commands, Work};
use super::dense::bytes_of;
use super::kernels::{AttentionChunk, ChunkKernels, Compiler, ExpertChunk, Gemm, Tiles};
use super::layout::{
    DELTA_TOKENS, Layout, SHORT_PAIRS, attend_blocks, context_parts, short_tiles_at, top_k,
};
use super::source::{Slabs, Sources, Tile};
use super::step::difference;
use super::timeline::LayerMemory;
use super::{ChunkInput, Experts, Feeding, Gpu, Layer, Mixing, Part, Timeline, Watch};
use crate::error::Result;
use crate::shape::{ExpertId, Shape};
use crate::timing::Stage;

/// Bytes of the scratch of a chunk at most: a chunk that needs more is taken in parts.
const SCRATCH_BYTES_MAX: u64 = 1 << 30;

/// What a chunk needs beside what a token does.
pub struct Chunk {
    pub(super) layout: Layout,
    kernels: ChunkKernels,
    scratch: Buffer,
    scratch_group: BindGroup,
    lists: Buffer, // tall tiles [..][4], short tiles, token of each pair, place of each token's ranks
    lists_group: BindGroup,
    landing: Buffer,
}

/// The layout for as many tokens at once as fit, `most` at most.
pub fn layout(
    shape: &Shape,
    options: &crate::engine::Options,
    most: usize,
    buffer_bytes: u64,
) -> Layout {
    let bytes = SCRATCH_BYTES_MAX.min(buffer_bytes);
    let mut tokens = most.max(2);
    loop {
        let layout = Layout::new(shape, top_k(shape, options), tokens);
        if layout.bytes() <= bytes || tokens == 2 {
            return layout;
        }
        tokens = (tokens / 2).max(2);
    }
}

/// Tokens and the experts that they go to, in pairs by expert, then token.
pub(super) struct Sorted {
    pub(super) tall: Vec<[u32; 4]>,  // expert, first pair, pairs
    pub(super) short: Vec<[u32; 4]>, // likewise
    pub(super) tokens: Vec<u32>,     // of each pair
    pub(super) places: Vec<u32>,     // of each token's ranks among the pairs
    experts: Vec<ExpertId>,          // those that are used
}

impl Sorted {
    /// The tiles of so many pairs of an expert: tall ones while they are more than half full.
    fn push(&mut self, expert: ExpertId, mut first: usize, mut pairs: usize) {
        while pairs > 0 {
            let (tile, tiles) = match pairs > SHORT_PAIRS {
                true => (Tile::Tall, &mut self.tall),
                false => (Tile::Short, &mut self.short),
            };
            let count = tile.vectors().min(pairs);
            tiles.push([u32::from(expert.0), first as u32, count as u32, 0]);
            (first, pairs) = (first + count, pairs - count);
        }
        self.experts.push(expert);
    }

    /// Tall and short tiles of some of the experts, which ascend.
    pub(super) fn tiles_of(&self, experts: &[ExpertId]) -> [Vec<[u32; 4]>; 2] {
        let is_one = |tile: &&[u32; 4]| experts.binary_search(&ExpertId(tile[0] as u16)).is_ok();
        [&self.tall, &self.short].map(|tiles| tiles.iter().filter(is_one).copied().collect())
    }
}

/// Sorts the choices `[tokens][top_k]` by expert, then token.
pub(super) fn sort(chosen: &[ExpertId], top_k: usize) -> Sorted {
    let mut order: Vec<usize> = (0..chosen.len()).collect();
    order.sort_by_key(|i| (chosen[*i], *i));
    let mut sorted = Sorted {
        tall: Vec::new(),
        short: Vec::new(),
        tokens: order.iter().map(|i| (i / top_k) as u32).collect(),
        places: vec![0; chosen.len()],
        experts: Vec::new(),
    };
    for (place, i) in order.iter().enumerate() {
        sorted.places[*i] = place as u32;
    }
    let mut first = 0;
    for pairs in order.chunk_by(|a, b| chosen[*a] == chosen[*b]) {
        sorted.push(chosen[pairs[0]], first, pairs.len());
        first += pairs.len();
    }
    sorted
}

impl Chunk {
    /// Compiles the kernels and takes the memory.
    ///
    /// # Errors
    /// The driver refuses a kernel; the device has no memory left.
    pub fn new(compiler: &Compiler, layout: Layout, slabs: &[Slabs]) -> Result<Self> {
        let (device, views) = (compiler.device, compiler.views);
        let sources = Sources {
            declarations: layout.declarations(compiler.shape),
            precisions: compiler.sources.precisions.clone(),
            subgroups: compiler.sources.subgroups,
            tensor: compiler.sources.tensor,
        };
        let kernels = compiler.chunk(&sources, slabs)?;
        let (hidden, experts) = (compiler.shape.hidden, compiler.shape.moe.experts);
        let most = (layout.tokens() * hidden.max(experts)).max(layout.pairs()); // words that come back
        let scratch = device.buffer("scratch of a chunk", layout.bytes())?;
        let lists = device.buffer("lists of a chunk", lists_bytes(&layout, experts))?;
        Ok(Self {
            kernels,
            scratch_group: device.group(&views.scratch, &[&scratch])?,
            lists_group: views.read_group(device, &lists)?,
            landing: device.landing(most as u64 * 4)?,
            scratch,
            lists,
            layout,
        })
    }
}

/// Where tokens of pairs begin in the lists, in words: an expert has two short tiles at most.
pub(super) fn tokens_at(pairs: usize, experts: usize) -> usize {
    short_tiles_at(pairs) + 4 * 2 * experts.min(pairs)
}

/// Bytes of the lists at most.
pub fn lists_bytes(layout: &Layout, experts: usize) -> u64 {
    let pairs = layout.pairs();
    (tokens_at(pairs, experts) + 2 * pairs) as u64 * 4
}

/// Matrices times all tokens, behind what splits their rows.
pub(super) fn gemm(pass: &mut ComputePass, kernels: &Gemm, parts: &[Part], tokens: usize) {
    if let Some(split) = &kernels.split {
        pass.set_pipeline(split);
        pass.dispatch_workgroups(tokens as u32, 1, 1);
    }
    let (kernel, tile) = match tokens > SHORT_PAIRS {
        true => (&kernels.tiles.tall, Tile::Tall),
        false => (&kernels.tiles.short, Tile::Short),
    };
    pass.set_pipeline(kernel);
    for part in parts {
        pass.set_bind_group(1, &part.group, &[]);
        pass.dispatch_workgroups(part.tiles, tokens.div_ceil(tile.vectors()) as u32, 1);
    }
}

/// The experts in `slots` times their tokens, for so many tall and short tiles that are in `lists`.
pub(super) fn products_of_experts(
    pass: &mut ComputePass,
    kernels: &ExpertChunk,
    [slots, lists]: [&BindGroup; 2],
    shape: &Shape,
    tiles: [usize; 2],
) {
    let by_tile = |pass: &mut ComputePass, kernels: &Tiles, groups: [usize; 2]| {
        let kernels = [&kernels.tall, &kernels.short].into_iter().zip(groups);
        for ((kernel, groups), tiles) in kernels.zip(tiles).filter(|(_, tiles)| *tiles > 0) {
            pass.set_pipeline(kernel);
            pass.dispatch_workgroups(groups as u32, tiles as u32, 1);
        }
    };
    let bind = |pass: &mut ComputePass| {
        pass.set_bind_group(1, slots, &[]);
        pass.set_bind_group(2, lists, &[]);
    };
    bind(pass);
    by_tile(pass, &kernels.up, [shape.moe.width.div_ceil(64); 2]);
    if let Some(split) = &kernels.split {
        pass.set_bind_group(1, lists, &[]);
        by_tile(pass, split, [Tile::Tall, Tile::Short].map(Tile::vectors));
        bind(pass);
    }
    by_tile(pass, &kernels.down, [shape.hidden.div_ceil(64); 2]);
}

impl Gpu {
    /// Tokens that [`Gpu::chunk`] takes at most.
    pub fn chunk_tokens(&self) -> usize {
        self.chunk.layout.tokens()
    }

    /// Takes several tokens. Their rows of the residual stream go to `rows`, `[tokens][hidden]`.
    ///
    /// # Errors
    /// A failed read of an expert; the device failed.
    pub fn chunk(
        &self,
        host: &Host,
        timeline: &Timeline,
        input: &ChunkInput,
        rows: &mut [f32],
        mut watch: Option<Watch>,
    ) -> Result<()> {
        let _scratch = self.lock();
        let hidden = self.shape.hidden;
        let tokens = rows.len() / hidden;
        let put = |name: &str, values: &[f32]| {
            let at = self.chunk.layout.at(name) as u64 * 4;
            self.device.write(&self.chunk.scratch, at, bytemuck::cast_slice(values));
        };
        put("H_AT", input.h);
        put("COS_AT", input.cos);
        put("SIN_AT", input.sin);
        let part = context_parts(&self.shape, input.position, tokens).positions;
        put("TOKEN_AT", &[input.position, tokens, 0, 0, part].map(|n| f32::from_bits(n as u32)));
        let mut before = input.h.to_vec();
        for (i, (layer, memory)) in self.layers.iter().zip(&timeline.layers).enumerate() {
            let mut work = self.chunk_work();
            self.mix_rows(&mut work, layer, memory, (input.position, tokens));
            let Some(watch) = &mut watch else {
                self.feed_rows(host, layer, tokens, work)?;
                continue;
            };
            Commands::submit(&self.device, [work.finish()]);
            let mixed = self.look_rows("H_AT", tokens * hidden)?;
            watch("mixer", Some(i), &difference(&mixed, &before));
            self.feed_rows(host, layer, tokens, self.chunk_work())?;
            if matches!(layer.feed_forward, Feeding::Experts(_)) {
                let (experts, pairs) = (self.shape.moe.experts, tokens * self.top_k);
                watch("router_logits", Some(i), &self.look_rows("ROUTER_AT", tokens * experts)?);
                watch("router_weights", Some(i), &self.look_rows("WEIGHTS_AT", pairs)?);
                watch("router_indices", Some(i), &self.look_rows("CHOSEN_AT", pairs)?);
            }
            before = self.look_rows("H_AT", tokens * hidden)?;
            watch("moe", Some(i), &difference(&before, &mixed));
            watch("layer", Some(i), &before);
        }
        rows.copy_from_slice(&self.look_rows("H_AT", tokens * hidden)?);
        Ok(())
    }

    fn chunk_work(&self) -> Work<'_> {
        Work::new(&self.device, self.clock(), &self.chunk.scratch_group)
    }

    /// A kernel for every token, with the vector of the part that is multiplied next.
    fn rows(
        &self,
        pass: &mut ComputePass,
        kernel: &ComputePipeline,
        part: &Part,
        counts: [usize; 2],
    ) {
        pass.set_pipeline(kernel);
        pass.set_bind_group(1, &part.group, &[]);
        pass.dispatch_workgroups(counts[0] as u32, counts[1] as u32, 1);
    }

    /// `h += mix(norm(h))` of every token.
    fn mix_rows(
        &self,
        work: &mut Work,
        layer: &Layer,
        memory: &LayerMemory,
        (position, tokens): (usize, usize),
    ) {
        let k = &self.chunk.kernels;
        match (&layer.mix, &k.attention, &k.delta) {
            (Mixing::Attention { project, norms, out }, Some(kernels), _) => {
                let a = &self.shape.attention;
                let pass = work.stage(Stage::Attention, bytes_of(project) + bytes_of(out));
                self.rows(pass, &k.norm, &project[0], [tokens, 1]);
                gemm(pass, &k.project, project, tokens);
                pass.set_pipeline(&kernels.turn);
                pass.set_bind_group(1, norms, &[]);
                pass.set_bind_group(2, &memory.write, &[]);
                pass.dispatch_workgroups((a.heads + a.kv_heads) as u32, tokens as u32, 1);
                self.attend_rows(pass, kernels, memory, (position, tokens));
                gemm(pass, &kernels.out, out, tokens);
            }
            (Mixing::DeltaNet { project, vectors, out }, _, Some(kernels)) => {
                let d = self.shape.delta.as_ref().expect("a delta-net layer has its dimensions");
                let pass = work.stage(Stage::DeltaNet, bytes_of(project) + bytes_of(out));
                self.rows(pass, &k.norm, &project[0], [tokens, 1]);
                gemm(pass, &k.project, project, tokens);
                pass.set_pipeline(&kernels.rows);
                pass.set_bind_group(1, vectors, &[]);
                pass.set_bind_group(2, &memory.read, &[]);
                let heads = 2 * d.key_heads + d.value_heads;
                pass.dispatch_workgroups(heads as u32, tokens as u32, 1);
                pass.set_pipeline(&kernels.pairs);
                let parts = tokens.div_ceil(DELTA_TOKENS);
                pass.dispatch_workgroups(d.value_heads as u32, parts as u32, 1);
                pass.set_pipeline(&kernels.scan);
                pass.set_bind_group(2, &memory.write, &[]);
                pass.dispatch_workgroups(d.value_heads as u32, d.value_dim as u32 / 32, 1);
                self.rows(pass, &kernels.heads, &out[0], [d.value_heads, tokens]);
                gemm(pass, &kernels.out, out, tokens);
            }
            _ => unreachable!("kernels are compiled for every kind of layer that there is"),
        }
    }

    /// Attention of every token over all that it sees, in parts that are joined where a chunk has few rows.
    fn attend_rows(
        &self,
        pass: &mut ComputePass,
        kernels: &AttentionChunk,
        memory: &LayerMemory,
        (position, tokens): (usize, usize),
    ) {
        let a = &self.shape.attention;
        let parts = context_parts(&self.shape, position, tokens).count;
        let blocks = attend_blocks(&self.shape, tokens) as u32;
        pass.set_pipeline(if parts == 1 { &kernels.attend } else { &kernels.attend_part });
        pass.set_bind_group(1, &memory.read, &[]);
        pass.dispatch_workgroups(a.kv_heads as u32, blocks, parts as u32);
        if parts > 1 {
            pass.set_pipeline(&kernels.combine);
            pass.dispatch_workgroups((tokens * a.heads) as u32, 1, 1);
        }
    }

    /// `h += experts(norm(h))` of every token, behind what is in the encoder already.
    fn feed_rows(&self, host: &Host, layer: &Layer, tokens: usize, mut work: Work) -> Result<()> {
        let k = &self.chunk.kernels;
        let experts = match &layer.feed_forward {
            Feeding::Dense { up, down } => {
                let pass = work.stage(Stage::Dense, bytes_of(up) + bytes_of(down));
                self.rows(pass, &k.norm, &up[0], [tokens, 1]);
                gemm(pass, &k.project, up, tokens);
                let kernel = k.dense_down.as_ref().expect("compiled where a layer is dense");
                gemm(pass, kernel, down, tokens);
                Commands::submit(&self.device, [work.finish()]);
                return self.device.check();
            }
            Feeding::Experts(experts) => experts,
        };
        let pass = work.stage(Stage::Route, bytes_of(&experts.route));
        self.rows(pass, &k.norm, &experts.route[0], [tokens, 1]);
        gemm(pass, &k.project, &experts.route, tokens);
        pass.set_pipeline(&k.choose);
        pass.dispatch_workgroups(tokens as u32, 1, 1);
        let chosen = self.read_rows_chosen(work, tokens)?;
        self.experts_rows(host, experts, &chosen, tokens)
    }

    fn read_rows_chosen(&self, mut work: Work, tokens: usize) -> Result<Vec<ExpertId>> {
        let bytes = (tokens * self.top_k) as u64 * 4;
        let from = self.chunk.layout.at("CHOSEN_AT") as u64 * 4;
        let landing = &self.chunk.landing;
        work.encoder().copy_buffer_to_buffer(&self.chunk.scratch, from, landing, 0, bytes);
        Commands::submit(&self.device, [work.finish()]);
        self.device.landed(landing, bytes, |landed| {
            let ids = bytemuck::cast_slice::<u8, u32>(landed).iter();
            ids.map(|id| ExpertId(*id as u16)).collect()
        })
    }

    fn experts_rows(
        &self,
        host: &Host,
        experts: &Experts,
        chosen: &[ExpertId],
        tokens: usize,
    ) -> Result<()> {
        let sorted = sort(chosen, self.top_k);
        let tokens_at = tokens_at(self.chunk.layout.pairs(), self.shape.moe.experts);
        let places_at = tokens_at + sorted.tokens.len();
        let at = self.chunk.layout.at("TOKEN_AT") as u64 * 4 + 8;
        let numbers = [places_at as u32, tokens_at as u32];
        self.device.write(&self.chunk.scratch, at, bytemuck::cast_slice(&numbers));
        self.list(tokens_at, &sorted.tokens);
        self.list(places_at, &sorted.places);
        let slots = &experts.slots;
        slots.nothing_reads();
        let (here, missing): (Vec<ExpertId>, Vec<ExpertId>) =
            sorted.experts.iter().partition(|expert| slots.holds(**expert));
        let claim = slots.claim(&self.device, here.iter().copied());
        let mut work = self.chunk_work();
        self.wave(&mut work, experts, here.len(), &sorted.tiles_of(&here));
        if !missing.is_empty() {
            let submission = Commands::submit(&self.device, [work.finish()]);
            slots.read_by(&submission, claim.pinned());
            drop(claim);
            self.pass(host, slots, &missing, &|| self.chunk_work(), &mut |work, part| {
                let part = &missing[part];
                self.wave(work, experts, part.len(), &sorted.tiles_of(part));
            })?;
            work = self.chunk_work();
        }
        let k = &self.chunk.kernels;
        let pass = work.stage(Stage::Experts, 0);
        pass.set_pipeline(&k.join);
        pass.set_bind_group(1, &self.chunk.lists_group, &[]);
        pass.dispatch_workgroups(tokens as u32, 1, 1);
        if let (Some(shared), Some(kernel)) = (&experts.shared, &k.shared_down) {
            gemm(pass, kernel, std::slice::from_ref(shared), tokens);
        }
        Commands::submit(&self.device, [work.finish()]);
        self.device.check()
    }

    /// A part of the lists.
    fn list(&self, at: usize, words: &[u32]) {
        self.device.write(&self.chunk.lists, at as u64 * 4, bytemuck::cast_slice(words));
    }

    /// The products of experts that are in their slots by then: tall tiles, then short ones. The tiles are
    /// on the device before anything that is handed over next.
    fn wave(&self, work: &mut Work, experts: &Experts, used: usize, tiles: &[Vec<[u32; 4]>; 2]) {
        if used == 0 {
            return;
        }
        let kernels = &self.chunk.kernels.experts[experts.kernels];
        self.list(0, tiles[0].as_flattened());
        self.list(short_tiles_at(self.chunk.layout.pairs()), tiles[1].as_flattened());
        let pass = work.stage(Stage::Experts, (used * experts.slots.record_bytes()) as u64);
        let groups = [&experts.slots.group, &self.chunk.lists_group];
        products_of_experts(pass, kernels, groups, &self.shape, [0, 1].map(|i| tiles[i].len()));
    }

    fn look_rows(&self, name: &str, words: usize) -> Result<Vec<f32>> {
        let mut work = self.chunk_work();
        let (from, bytes) = (self.chunk.layout.at(name) as u64 * 4, words as u64 * 4);
        let landing = &self.chunk.landing;
        work.encoder().copy_buffer_to_buffer(&self.chunk.scratch, from, landing, 0, bytes);
        Commands::submit(&self.device, [work.finish()]);
        self.device.landed(landing, bytes, |landed| bytemuck::cast_slice(landed).to_vec())
    }

    /// Logits of a row of the residual stream.
    ///
    /// # Errors
    /// The device failed.
    pub fn logits(&self, h: &[f32], logits: &mut [f32]) -> Result<()> {
        let _scratch = self.lock();
        self.device.write(&self.scratch, 0, bytemuck::cast_slice(h));
        self.finish(super::Logits::Into(logits), Vec::new(), self.work())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_are_sorted_by_expert_and_found_again() {
        let chosen = [5, 2, 2, 0, 5, 7].map(ExpertId);
        let sorted = sort(&chosen, 2);
        assert_eq!(sorted.short, [[0, 0, 1, 0], [2, 1, 2, 0], [5, 3, 2, 0], [7, 5, 1, 0]]);
        assert!(sorted.tall.is_empty());
        assert_eq!(sorted.tokens, [1, 0, 1, 0, 2, 2]);
        assert_eq!(sorted.places, [3, 1, 2, 0, 4, 5]);
        assert_eq!(sorted.experts, [0, 2, 5, 7].map(ExpertId));
        let some = sorted.tiles_of(&[2, 7].map(ExpertId));
        assert_eq!(some, [vec![], vec![[2, 1, 2, 0], [7, 5, 1, 0]]]);
    }

    #[test]
    fn tiles_cover_the_pairs_of_an_expert_and_fit_the_lists() {
        let cut = |pairs: usize| {
            let sorted = sort(&vec![ExpertId(1); pairs], 1);
            let counts = |tiles: &[[u32; 4]]| tiles.iter().map(|t| t[2]).collect::<Vec<u32>>();
            let mut all = [&sorted.tall[..], &sorted.short].concat();
            all.sort_unstable_by_key(|tile| tile[1]);
            for (tile, next) in all.iter().zip(&all[1..]) {
                assert_eq!(tile[1] + tile[2], next[1]);
            }
            assert_eq!(all[all.len() - 1][1..3].iter().sum::<u32>(), pairs as u32);
            assert!(4 * sorted.tall.len() <= short_tiles_at(pairs));
            assert!(short_tiles_at(pairs) + 4 * sorted.short.len() <= tokens_at(pairs, 1));
            (counts(&sorted.tall), counts(&sorted.short))
        };
        assert_eq!(cut(70), (vec![64], vec![6]));
        assert_eq!(cut(32), (vec![], vec![16, 16]));
        assert_eq!(cut(33), (vec![33], vec![]));
        (1..300).for_each(|pairs| drop(cut(pairs)));
    }
}
