//! What a device computes of a prompt's chunk, measured with the chunk's own kernels.
//!
//! On the sizes and formats of a model that need not be there, with as many tokens as its chunk has: dense
//! weights, experts as uniform routing fills their tiles, and attention. Numbers are random, and some of each
//! answer are computed again here: a rate of wrong ones is refused. A device of its own is opened for it
//! and closed behind it, so that the model's memory is not in the way.

use std::collections::BTreeSet;
use std::time::Duration;

use flash_moe_kernels::{Isa, f32_to_f16};
use wgpu::{BindGroup, Buffer, ComputePass};

use super::adapters::pick;
use super::asked::{ChunkOf, ChunkRates, GpuOptions};
use super::chunk::{Sorted, gemm, lists_bytes, products_of_experts, sort, tokens_at};
use super::dense::{Packing, Segment};
use super::device::Device;
use super::kernels::{Compiler, Views};
use super::layout::{Layout, attend_blocks, query_stride, short_tiles_at, top_k};
use super::limits::quickest;
use super::sample::Random;
use super::slots::{LayerSlots, slabs, slots_most};
use super::source::{Give, Rows, Slabs, Sources};
use crate::container::{Matrix, RecordLayout};
use crate::error::{Error, Result};
use crate::kv_cache::{KvFormat, PAGE_POSITIONS};
use crate::shape::{ExpertId, LayerId};

/// Bytes of experts at most: above what caches hold, as a layer's are.
const EXPERTS_BYTES: u64 = 256 << 20;
/// Rows of a dense matrix, in hidden sizes: what published models project to and more.
const DENSE_ROWS: usize = 4;
/// What an answer may differ by, in the size of what is added up for it.
const TOLERANCE: f64 = 1e-3;

/// Measures for about so long, each of three things.
///
/// # Errors
/// No such adapter; what the kernels do not take; too little memory; a wrong answer; the device failed.
pub fn chunk_rates(of: &ChunkOf, wanted: &GpuOptions, time: Duration) -> Result<ChunkRates> {
    super::check(of.shape, of.options)?;
    let (_, adapter) = pick(wanted.adapter)?;
    let [_, layout] = super::plan::layouts(of.shape, of.options, &adapter)?;
    let memory = wanted.memory_bytes.or(adapter.memory_bytes).unwrap_or(u64::MAX);
    let device = Device::open(&adapter.adapter)?;
    let scratch = device.buffer("scratch of a chunk", layout.bytes())?;
    let views = Views::new(&device);
    let probe = Probe {
        group: device.group(&views.scratch, &[&scratch])?,
        sources: Sources {
            declarations: layout.declarations(of.shape),
            precisions: vec![of.dense],
            subgroups: device.subgroups,
            tensor: device.tensor.filter(|_| !wanted.plain),
        },
        buffer_bytes: adapter.binding_bytes,
        of,
        views,
        device,
        layout,
        scratch,
        time,
    };
    let dense = probe.dense()?;
    let experts = match of.records.first() {
        Some(record) => probe.experts(record, EXPERTS_BYTES.min(memory / 4))?,
        None => dense,
    };
    Ok(ChunkRates {
        tokens: probe.layout.tokens(),
        tensor_cores: probe.sources.tensor.is_some(),
        dense,
        experts,
        attention: probe.attention()?,
    })
}

/// A chunk without a model.
struct Probe<'a> {
    of: &'a ChunkOf<'a>,
    device: Device,
    views: Views,
    layout: Layout,
    sources: Sources,
    scratch: Buffer,
    group: BindGroup,
    buffer_bytes: u64,
    time: Duration,
}

impl Probe<'_> {
    fn compiler(&self) -> Compiler<'_> {
        let halves = self.of.options.kv_cache == KvFormat::F16;
        let (device, views, sources) = (&self.device, &self.views, &self.sources);
        Compiler { device, views, sources, shape: self.of.shape, halves }
    }

    fn put(&self, name: &str, words: &[f32]) -> Result<()> {
        let at = self.layout.at(name) as u64 * 4;
        self.device.write_all(&self.scratch, at, bytemuck::cast_slice(words))
    }

    fn put_numbers(&self, numbers: [usize; 4]) -> Result<()> {
        self.put("TOKEN_AT", &numbers.map(|n| f32::from_bits(n as u32)))
    }

    /// A number of a part of the scratch.
    fn number(&self, name: &str, place: usize) -> Result<f64> {
        let mut word = [0f32];
        let at = (self.layout.at(name) + place) as u64 * 4;
        self.device.read(&self.scratch, at, bytemuck::cast_slice_mut(&mut word))?;
        Ok(f64::from(word[0]))
    }

    /// Does it once, has the answer checked, and times it. Then rows are split that are split already: other
    /// numbers, as much work.
    fn seconds(
        &self,
        write: &dyn Fn(&mut ComputePass),
        check: &dyn Fn() -> Result<()>,
    ) -> Result<f64> {
        let write = |pass: &mut ComputePass| {
            pass.set_bind_group(0, &self.group, &[]);
            write(pass);
        };
        quickest(&self.device, Duration::ZERO, &write)?;
        check()?;
        quickest(&self.device, self.time, &write)
    }

    /// Operations a second of a dense matrix times all tokens.
    fn dense(&self) -> Result<f64> {
        let (cols, tokens) = (self.of.shape.hidden, self.layout.tokens());
        let rows = cols * DENSE_ROWS.min(top_k(self.of.shape, self.of.options));
        let mut random = Random(1);
        let matrix = random.matrix(self.of.dense, rows, cols);
        let vectors = random.vector(tokens * cols);
        let packing = Packing {
            precisions: &self.sources.precisions,
            buffer_bytes: self.buffer_bytes,
            views: &self.views,
        };
        let segments = [Segment { matrix: &matrix, to: 0, chunk_to: self.layout.at("OUTPUT_AT") }];
        let parts = packing.pack(&self.device, "a dense matrix", &segments, &[], 1)?;
        let kernels = self.compiler().gemm(&self.sources, Rows::Normed, Give::Store, cols)?;
        self.put("NORMED_AT", &vectors)?;
        self.put_numbers([0, tokens, 0, 0])?;
        let check = || {
            for (row, token) in [(0, 0), (rows - 1, tokens - 1), (rows / 2, tokens / 3)] {
                let want = Sum::of(&matrix, row, &wide(&vectors[token * cols..][..cols]));
                want.check("a dense product", self.number("OUTPUT_AT", token * rows + row)?)?;
            }
            Ok(())
        };
        let seconds = self.seconds(&|pass| gemm(pass, &kernels, &parts, tokens), &check)?;
        Ok((2 * rows * cols * tokens) as f64 / seconds)
    }

    /// Operations a second of as many experts as so many bytes hold, each with the tokens that chose it.
    fn experts(&self, record: &RecordLayout, bytes: u64) -> Result<f64> {
        let (shape, tokens) = (self.of.shape, self.layout.tokens());
        let most = slots_most(record, shape.moe.experts, self.buffer_bytes).max(1);
        let count = (bytes as usize / record.record_bytes()).clamp(1, most);
        let mut random = Random(2);
        let expert = [&record.gate, &record.up, &record.down]
            .map(|m| random.matrix(m.precision, m.rows, m.cols));
        let used = top_k(shape, self.of.options);
        let sorted = sort(&choices(&mut random, (tokens, shape.moe.experts, used)), used);
        let here: Vec<ExpertId> = (0..count).map(|id| ExpertId(id as u16)).collect();
        let tiles = sorted.tiles_of(&here);
        let vectors = random.vector(tokens * shape.hidden);
        self.put("NORMED_AT", &vectors)?;
        let lists = self.lists(&sorted, &tiles)?;
        self.split()?;
        let cut = slabs(record, count, self.buffer_bytes)?;
        let kernels = self.compiler().experts_chunk(&self.sources, &cut)?;
        let slots = self.slots(cut, &expert, &here)?;
        let taken = tiles.concat();
        let check = || {
            // The last pair of the first tile and of the last one.
            for tile in taken.first().into_iter().chain(taken.last()) {
                let pair = (tile[1] + tile[2] - 1) as usize;
                let x = &vectors[sorted.tokens[pair] as usize * shape.hidden..][..shape.hidden];
                let active = active(&expert, &wide(x));
                for row in [0, shape.hidden - 1] {
                    let got = self.number("OUTPUT_AT", pair * shape.hidden + row)?;
                    Sum::of(&expert[2], row, &active).check("an expert's product", got)?;
                }
            }
            Ok(())
        };
        let counts = [tiles[0].len(), tiles[1].len()];
        let write = |pass: &mut ComputePass| {
            products_of_experts(pass, &kernels, [&slots.group, &lists], shape, counts);
        };
        let pairs: u32 = taken.iter().map(|tile| tile[2]).sum();
        let operations = (6 * shape.hidden * shape.moe.width) as f64 * f64::from(pairs);
        Ok(operations / self.seconds(&write, &check)?)
    }

    /// The lists of a chunk, and where the kernels find them.
    fn lists(&self, sorted: &Sorted, tiles: &[Vec<[u32; 4]>; 2]) -> Result<BindGroup> {
        let (pairs, experts) = (self.layout.pairs(), self.of.shape.moe.experts);
        let tokens_at = tokens_at(pairs, experts);
        let lists = self.device.buffer("lists", lists_bytes(&self.layout, experts))?;
        for (at, words) in [
            (0, tiles[0].as_flattened()),
            (short_tiles_at(pairs), tiles[1].as_flattened()),
            (tokens_at, &sorted.tokens),
        ] {
            self.device.write(&lists, at as u64 * 4, bytemuck::cast_slice(words));
        }
        self.put_numbers([0, self.layout.tokens(), tokens_at + pairs, tokens_at])?;
        self.views.read_group(&self.device, &lists)
    }

    /// Splits the rows that experts take, as the product of their router does.
    fn split(&self) -> Result<()> {
        if self.sources.tensor.is_none() {
            return Ok(());
        }
        let source = self.sources.split(Rows::Normed, self.of.shape.hidden);
        let kernel = self.device.kernel("split", &source, &[&self.views.scratch])?;
        let write = |pass: &mut ComputePass| {
            pass.set_pipeline(&kernel);
            pass.set_bind_group(0, &self.group, &[]);
            pass.dispatch_workgroups(self.layout.tokens() as u32, 1, 1);
        };
        quickest(&self.device, Duration::ZERO, &write).map(drop)
    }

    /// Slots with the same record for all of these experts.
    fn slots(&self, slabs: Slabs, expert: &[Matrix; 3], ids: &[ExpertId]) -> Result<LayerSlots> {
        let mut record: Vec<u8> =
            expert.iter().flat_map(Matrix::parts).flatten().copied().collect();
        // A copy has whole words.
        record.resize(slabs.slot_words * 4, 0);
        let counts = (ids.len(), self.of.shape.moe.experts);
        let slots = LayerSlots::new((&self.device, &self.views), LayerId(0), slabs, counts, false)?;
        let claim = slots.claim(&self.device, ids.iter().copied());
        for place in &claim.missing {
            let way = slots.way(*place);
            self.device.write_all(way.buffer, way.to, &record)?;
        }
        let (table, to) = slots.landed(&claim.missing);
        self.device.write(to, 0, bytemuck::cast_slice(&table));
        drop(claim);
        Ok(slots)
    }

    /// Operations a second of attention to as many positions as the chunk has tokens, and to its own. All
    /// positions keep the same, which the mix is then as well.
    fn attention(&self) -> Result<f64> {
        let (shape, tokens) = (self.of.shape, self.layout.tokens());
        let (a, halves) = (&shape.attention, self.of.options.kv_cache == KvFormat::F16);
        let kept: Vec<f32> = (0..a.head_dim).map(|i| (i % 7) as f32 / 4.0 - 0.75).collect();
        let bytes: Vec<u8> = match halves {
            true => kept.iter().flat_map(|x| f32_to_f16(*x).to_le_bytes()).collect(),
            false => bytemuck::cast_slice(&kept).to_vec(),
        };
        let rows = (2 * tokens).next_multiple_of(PAGE_POSITIONS) * 2 * a.kv_heads;
        let cache = self.device.filled("keys and values", &bytes.repeat(rows))?;
        let cache = self.views.read_group(&self.device, &cache)?;
        let stride = query_stride(shape);
        let queries = Random(3).vector(tokens * a.heads * stride);
        self.put("QUERY_AT", &queries)?;
        self.put_numbers([tokens, tokens, 0, 0])?;
        let source = self.sources.attend_rows(halves, a.head_dim);
        let groups = [&self.views.scratch, &self.views.read];
        let kernel = self.device.kernel("attend", &source, &groups)?;
        let write = |pass: &mut ComputePass| {
            pass.set_pipeline(&kernel);
            pass.set_bind_group(1, &cache, &[]);
            let blocks = attend_blocks(shape, tokens) as u32;
            pass.dispatch_workgroups(a.kv_heads as u32, blocks, 1);
        };
        let check = || {
            for (row, column) in [(0, 0), (tokens * a.heads - 1, a.head_dim - 1)] {
                let gate = a.gate.then(|| f64::from(queries[row * stride + a.head_dim + column]));
                let share = gate.map_or(1.0, |gate| 1.0 / (1.0 + (-gate).exp()));
                let want = Sum { value: f64::from(kept[column]) * share, size: 1.0 };
                want.check("attention", self.number("MIXED_AT", row * a.head_dim + column)?)?;
            }
            Ok(())
        };
        let seen = tokens as f64 * (tokens as f64 + (tokens + 1) as f64 / 2.0);
        Ok((4 * a.heads * a.head_dim) as f64 * seen / self.seconds(&write, &check)?)
    }
}

/// Different experts for each of so many tokens, all of them equally likely.
fn choices(random: &mut Random, (tokens, experts, used): (usize, usize, usize)) -> Vec<ExpertId> {
    let mut all = Vec::with_capacity(tokens * used);
    for _ in 0..tokens {
        let mut chosen = BTreeSet::new();
        while chosen.len() < used {
            chosen.insert(ExpertId((random.bits() % experts as u64) as u16));
        }
        all.extend(chosen);
    }
    all
}

/// silu(gate x) * (up x) of an expert.
fn active([gate, up, _]: &[Matrix; 3], x: &[f64]) -> Vec<f64> {
    let one = |row| {
        let gate = Sum::of(gate, row, x).value;
        gate / (1.0 + (-gate).exp()) * Sum::of(up, row, x).value
    };
    (0..gate.row_count()).map(one).collect()
}

fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|x| f64::from(*x)).collect()
}

/// A sum, and the size of what is added up for it.
struct Sum {
    value: f64,
    size: f64,
}

impl Sum {
    /// A row of a matrix times a vector.
    fn of(matrix: &Matrix, row: usize, x: &[f64]) -> Self {
        let mut weights = vec![0f32; matrix.cols()];
        Isa::detect().unpack_row(&matrix.rows(), row, &mut weights);
        let products = weights.iter().zip(x).map(|(w, x)| f64::from(*w) * x);
        Self { value: products.clone().sum(), size: products.map(f64::abs).sum() }
    }

    fn check(&self, what: &str, got: f64) -> Result<()> {
        match (got - self.value).abs() <= TOLERANCE * self.size {
            true => Ok(()),
            false => Err(Error::Gpu(format!(
                "{what} that is timed gave {got}, not {}; --device cpu computes without it",
                self.value
            ))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_s_experts_differ_and_all_are_chosen() {
        let all = choices(&mut Random(4), (300, 16, 3));
        assert_eq!(all.len(), 900);
        for chosen in all.chunks(3) {
            assert!(chosen[0] < chosen[1] && chosen[1] < chosen[2] && chosen[2] < ExpertId(16));
        }
        assert_eq!(all.iter().collect::<BTreeSet<_>>().len(), 16);
    }

    #[test]
    fn a_wrong_answer_and_one_that_is_no_number_are_refused() {
        let sum = Sum { value: 2.0, size: 10.0 };
        assert!(sum.check("it", 2.009).is_ok());
        for wrong in [2.011, 1.98, 0.0, f64::NAN, f64::INFINITY] {
            let said = sum.check("it", wrong).expect_err("another answer").to_string();
            assert!(said.contains("it that is timed gave"), "{said}");
        }
    }
}
