//! `flash-moe synth`: a container of a real model's dimensions with random weights.
//!
//! For benchmarks on machines without the weights. Every number is finite and of the scale that
//! training leaves (a product keeps the size of its vector), so sixty layers neither fade nor
//! overflow. Quantised weights are random codes under one scale a matrix, written as fast as the
//! disk takes them.

pub mod models;
mod noise;

use std::collections::BTreeMap;
use std::sync::Mutex;

use anyhow::{Result, ensure};
use flash_moe_engine::container::{DENSE_FILE, Precision, RecordLayout, RecordMatrix, ScaleKind};
use flash_moe_engine::memory::Block;
use flash_moe_engine::shape::Shape;
use flash_moe_kernels::f32_to_bf16;
use serde_json::Value;
use xxhash_rust::xxh3::Xxh3;

use crate::convert::dense::{Checksums, DenseLayout};
use crate::convert::experts::{Records, record_sums, write_sums};
use crate::convert::files::{PartialFile, check_space, write_whole};
use crate::convert::inventory::{self, Dense, Kind};
use crate::convert::plan::{TensorLayout, matrix_tensors};
use crate::convert::progress::Progress;
use crate::convert::work::{About, DENSE_SUMS_FILE, Destination, Place, Progressed, Record};
use crate::convert::workers::Workers;
use crate::options::convert::{Bits, SynthArgs};
use crate::say::tell;
use noise::{Draw, Noise};

/// Bytes of a dense matrix written at once.
const CHUNK_BYTES: usize = 4 << 20;
/// Columns that share a scale.
const GROUP: u16 = 64;

/// Runs the command.
///
/// # Errors
/// The directory cannot be written or holds something else; the disk is full.
pub fn run(args: &SynthArgs) -> Result<()> {
    ensure!(args.layers != Some(0), "--layers 0: at least one layer is needed");
    make(args, &models::config(&args.like, args.layers))
}

/// Makes a container of whatever dimensions a configuration has.
fn make(args: &SynthArgs, config: &Value) -> Result<()> {
    let shape = Shape::from_config(config)?;
    let record = Record { settings: settings(args, &shape), source: Vec::new() };
    let destination = match Destination::open(&args.dst, &record, Place::New)? {
        Progressed::Open(destination) => destination,
        Progressed::Complete => {
            tell!("{}: already complete, nothing to do", args.dst.display());
            return Ok(());
        }
    };
    let synthesis = Synthesis::new(args, shape)?;
    for (name, bytes) in models::small_files(config) {
        write_whole(&destination.dir().join(name), &bytes)?;
    }
    synthesis.write(destination, args)
}

fn settings(args: &SynthArgs, shape: &Shape) -> BTreeMap<String, String> {
    BTreeMap::from([
        ("--like".into(), args.like.clone()),
        ("--layers".into(), shape.layers.len().to_string()),
        ("--bits".into(), args.bits.to_string()),
        ("--dense-bits".into(), args.dense_bits.to_string()),
        ("--seed".into(), args.seed.to_string()),
    ])
}

/// A dense tensor, or a matrix with its scales and biases, and the spread of its values.
struct Item {
    dense: Dense,
    precision: Precision,
    deviation: f32,
}

struct Synthesis {
    shape: Shape,
    items: Vec<Item>,
    layers: Vec<Records>,
    noise: Noise,
    seed: u64,
}

impl Synthesis {
    fn new(args: &SynthArgs, shape: Shape) -> Result<Self> {
        let mut noise = Noise::new(args.seed);
        let mut items = Vec::new();
        for dense in inventory::trunk(&shape) {
            let (precision, deviation) = match dense.kind {
                Kind::Router(_, cols) => (router_precision(args.dense_bits), 2.0 * unit(cols)),
                Kind::Matrix(_, cols) => (precision(args.dense_bits), deviation(&dense.name, cols)),
                _ => (Precision::F32, 0.0),
            };
            if precision == Precision::Bf16 {
                noise.prepare(deviation);
            }
            items.push(Item { dense, precision, deviation });
        }
        let precisions = [precision(args.bits); 3];
        let layout = RecordLayout::new(shape.hidden, shape.moe.width, precisions)?;
        for matrix in [&layout.gate, &layout.down] {
            if matrix.precision == Precision::Bf16 {
                noise.prepare(unit(matrix.cols));
            }
        }
        let layers = shape.expert_layers().map(|layer| Records {
            layer,
            stem: format!("layer_{:02}", layer.0),
            count: shape.moe.experts,
            precisions,
            layout: layout.clone(),
        });
        Ok(Self { layers: layers.collect(), shape, items, noise, seed: args.seed })
    }

    fn write(self, destination: Destination, args: &SynthArgs) -> Result<()> {
        let tensors: Vec<TensorLayout> = self.items.iter().flat_map(Item::tensors).collect();
        let layout = DenseLayout::new(&tensors);
        let mut needed = 1 << 20;
        let dense_done = destination.dense_done(layout.bytes)?;
        if !dense_done {
            needed += layout.bytes;
        }
        let mut pending = Vec::new();
        for records in &self.layers {
            if !destination.records_done(records)? {
                needed += records.bytes() + records.sums_bytes();
                pending.push(records);
            }
        }
        let dir = destination.dir();
        check_space(dir, needed)?;
        let record_bytes = self.layers.first().map_or(0, |r| r.layout.padded_bytes());
        let workers = Workers::new(args.threads, record_bytes.max(CHUNK_BYTES))?;
        let progress = Progress::new(needed, args.quiet);
        if !dense_done {
            let sums = self.write_dense(&layout, &destination, &workers, &progress)?;
            write_whole(&dir.join(DENSE_SUMS_FILE), &serde_json::to_vec_pretty(&sums.1)?)?;
            sums.0.finish()?;
            progress.done(DENSE_FILE);
        }
        for records in pending {
            progress.now(&records.file());
            self.write_layer(records, &destination, &workers, &progress)?;
            progress.done(&records.file());
        }
        let entry = |r: &Records| r.entry(dir, r.file(), r.layout.padded_bytes());
        let entries = self.layers.iter().map(entry).collect::<Result<_>>()?;
        let about = About {
            name: format!("{}-synthetic", args.like),
            source: "synthetic".into(),
            shape: self.shape,
            notes: vec!["random weights: the text is noise and the routing near uniform".into()],
        };
        destination.conclude(about, &layout, [entries, Vec::new()])?;
        progress.finish();
        Ok(())
    }

    /// Writes the dense tensors; the file does not have its name yet when this returns.
    fn write_dense(
        &self,
        layout: &DenseLayout,
        destination: &Destination,
        workers: &Workers,
        progress: &Progress,
    ) -> Result<(PartialFile, Checksums)> {
        progress.now(DENSE_FILE);
        let file = PartialFile::create(&destination.dir().join(DENSE_FILE))?;
        file.write_at(layout.header(), 0)?;
        let sums = Mutex::new(Checksums::new());
        workers.run(self.items.len(), Vec::new, |i, chunk| {
            let item = &self.items[i];
            for (part, tensor) in item.tensors().into_iter().enumerate() {
                let mut hash = Xxh3::new();
                let (start, bytes) = (layout.start(&tensor.name), tensor.bytes());
                for offset in (0..bytes).step_by(CHUNK_BYTES) {
                    chunk.resize(CHUNK_BYTES.min((bytes - offset) as usize), 0);
                    self.fill(item, part, offset, chunk);
                    hash.update(chunk);
                    file.write_at(chunk, start + offset)?;
                }
                progress.read(bytes);
                progress.wrote(bytes);
                let sum = format!("{:016x}", hash.digest());
                sums.lock().expect("no job panics while holding it").insert(tensor.name, sum);
            }
            Ok(())
        })?;
        Ok((file, sums.into_inner().expect("no job panics while holding it")))
    }

    /// Fills a chunk of a dense tensor: part 0 is the weight, 1 the scales, 2 the biases.
    fn fill(&self, item: &Item, part: usize, offset: u64, out: &mut [u8]) {
        let name = &item.dense.name;
        match (item.precision, part) {
            (Precision::Affine { .. }, 0) => self.noise.fill(name, offset, out),
            (Precision::Affine { bits, .. }, _) => {
                let words = affine_words(bits, item.deviation);
                repeat(words[part - 1], out);
            }
            (Precision::Bf16, _) => self.noise.fill_bf16(item.deviation, name, offset, out),
            _ => {
                let mut draw = Draw::new(self.seed, &format!("{name} {offset}"));
                for raw in out.as_chunks_mut::<4>().0 {
                    *raw = vector_value(item.dense.kind, &mut draw).to_le_bytes();
                }
            }
        }
    }

    fn write_layer(
        &self,
        records: &Records,
        destination: &Destination,
        workers: &Workers,
        progress: &Progress,
    ) -> Result<()> {
        let layout = &records.layout;
        let file = PartialFile::create(&destination.dir().join(records.file()))?;
        let stride = layout.padded_bytes();
        let sums = Mutex::new(vec![Vec::new(); records.count]);
        workers.run(
            records.count,
            || scaled_record(layout),
            |expert, block| {
                let record = block.bytes_mut();
                for (name, matrix) in
                    [("gate", &layout.gate), ("up", &layout.up), ("down", &layout.down)]
                {
                    let key = format!("{} {name}", records.stem);
                    let weight = &mut record[matrix.offsets[0]..matrix.offsets[1]];
                    match matrix.precision {
                        Precision::Affine { .. } => self.noise.fill(&key, expert as u64, weight),
                        _ => self.noise.fill_bf16(unit(matrix.cols), &key, expert as u64, weight),
                    }
                }
                file.write_at(record, (expert * stride) as u64)?;
                progress.read(stride as u64);
                progress.wrote(stride as u64);
                let done = record_sums(layout, record);
                sums.lock().expect("no job panics while holding it")[expert] = done;
                Ok(())
            },
        )?;
        let sums = sums.into_inner().expect("no job panics while holding it");
        write_sums(&destination.dir().join(records.sums_file()), &sums)?;
        file.finish()
    }
}

impl Item {
    fn tensors(&self) -> Vec<TensorLayout> {
        let vector = |shape: Vec<usize>| {
            vec![TensorLayout {
                name: self.dense.name.clone(),
                dtype: safetensors::Dtype::F32,
                shape,
            }]
        };
        match self.dense.kind {
            Kind::Matrix(rows, cols) | Kind::Router(rows, cols) => {
                matrix_tensors(&self.dense.name, rows, cols, self.precision)
            }
            Kind::Conv(channels) => vector(vec![4, channels]),
            Kind::Norm(n) | Kind::PlainNorm(n) | Kind::DecayLog(n) | Kind::TimeBias(n) => {
                vector(vec![n])
            }
        }
    }
}

pub fn precision(bits: Bits) -> Precision {
    match bits {
        Bits::Bf16 => Precision::Bf16,
        Bits::Affine(bits) => Precision::Affine { bits, group: GROUP, scales: ScaleKind::Bf16 },
    }
}

/// Routers and shared gates keep 8 bits when the rest has fewer.
pub fn router_precision(bits: Bits) -> Precision {
    match bits {
        Bits::Bf16 => Precision::Bf16,
        Bits::Affine(_) => precision(Bits::Affine(8)),
    }
}

/// The deviation of weights under which a product keeps the size of its vector.
fn unit(cols: usize) -> f32 {
    1.0 / (cols as f32).sqrt()
}

/// Spread of a dense matrix: embeddings fill the residual stream, logits differ by a few.
fn deviation(name: &str, cols: usize) -> f32 {
    match name {
        "model.embed_tokens" => 1.0,
        "lm_head" => 3.0 * unit(cols),
        _ => unit(cols),
    }
}

/// Scale and bias, as bf16 bits, that give uniform codes a mean of zero and the deviation asked for.
fn affine_words(bits: u8, deviation: f32) -> [u16; 2] {
    let levels = f32::from(1u16 << bits);
    let step = deviation / ((levels * levels - 1.0) / 12.0).sqrt();
    // Four significant bits: then the bias, step times half of 2^bits - 1, is exact in bf16 too.
    let step = f32::from_bits(step.to_bits() & 0xfff0_0000);
    [f32_to_bf16(step), f32_to_bf16(-step * (levels - 1.0) / 2.0)]
}

fn repeat(word: u16, out: &mut [u8]) {
    for raw in out.as_chunks_mut::<2>().0 {
        *raw = word.to_le_bytes();
    }
}

/// A record whose scales and biases stand, so that only the codes change from expert to expert.
fn scaled_record(layout: &RecordLayout) -> Block {
    let mut block = Block::zeroed(layout.padded_bytes());
    for matrix in [&layout.gate, &layout.up, &layout.down] {
        let RecordMatrix { precision, cols, offsets, .. } = matrix;
        if let Precision::Affine { bits, .. } = precision {
            let [scale, bias] = affine_words(*bits, unit(*cols));
            repeat(scale, &mut block.bytes_mut()[offsets[1]..offsets[2]]);
            repeat(bias, &mut block.bytes_mut()[offsets[2]..offsets[3]]);
        }
    }
    block
}

/// A value of a vector: norms about one, decays spread over the useful range.
fn vector_value(kind: Kind, draw: &mut Draw) -> f32 {
    match kind {
        Kind::Conv(_) => draw.between(-0.6, 0.6),
        Kind::DecayLog(_) => draw.between(-4.0, 1.5),
        Kind::TimeBias(_) => draw.between(-3.0, 1.0),
        _ => draw.between(0.8, 1.2),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use flash_moe_engine::container::Container;
    use flash_moe_engine::store::read::read_exact_at;
    use flash_moe_kernels::{Isa, bf16_to_f32};
    use serde_json::json;
    use std::path::Path;

    fn tiny(dst: &Path, bits: Bits, seed: u64) -> Container {
        let mut config = models::config("qwen3.5-35b-a3b", Some(4));
        for (field, value) in [
            ("hidden_size", 128),
            ("vocab_size", 512),
            ("num_attention_heads", 4),
            ("head_dim", 64),
            ("linear_num_key_heads", 2),
            ("linear_num_value_heads", 4),
            ("linear_key_head_dim", 64),
            ("linear_value_head_dim", 64),
            ("num_experts", 6),
            ("num_experts_per_tok", 2),
            ("moe_intermediate_size", 64),
            ("shared_expert_intermediate_size", 64),
        ] {
            config[field] = json!(value);
        }
        let args = SynthArgs {
            like: "qwen3.5-35b-a3b".into(),
            dst: dst.into(),
            layers: Some(4),
            bits,
            dense_bits: bits,
            seed,
            threads: Some(2),
            quiet: true,
        };
        make(&args, &config).unwrap();
        Container::open(dst).unwrap()
    }

    /// All records of a layer, in f32 rows of the gate matrix.
    fn gates(container: &Container, dir: &Path, layer: usize) -> Vec<Vec<f32>> {
        let (entry, layout) = (&container.manifest().experts[layer], &container.layouts()[layer]);
        let file = std::fs::File::open(dir.join(&entry.file)).unwrap();
        let mut gates = Vec::new();
        for expert in 0..entry.experts {
            let mut record = vec![0; entry.record_bytes];
            read_exact_at(&file, &mut record, (expert * entry.stride_bytes) as u64).unwrap();
            let mut row = vec![0.0; layout.gate.cols];
            Isa::detect().unpack_row(&layout.gate.rows(&record), 3, &mut row);
            gates.push(row);
        }
        gates
    }

    #[test]
    fn a_synthetic_container_is_whole_and_its_experts_differ() {
        for bits in [Bits::Affine(4), Bits::Affine(2), Bits::Bf16] {
            let temp = tempfile::tempdir().unwrap();
            let dir = temp.path().join("container");
            let container = tiny(&dir, bits, 1);
            for dense in inventory::trunk(container.shape()) {
                match dense.kind {
                    Kind::Matrix(rows, cols) | Kind::Router(rows, cols) => {
                        container.matrix(&dense.name, rows, cols).unwrap();
                    }
                    Kind::Conv(n) => assert!(container.vector(&dense.name, 4 * n).is_ok()),
                    Kind::Norm(n) | Kind::PlainNorm(n) | Kind::DecayLog(n) | Kind::TimeBias(n) => {
                        assert!(container.vector(&dense.name, n).is_ok());
                    }
                }
            }
            let mut rows: Vec<Vec<f32>> = (0..4).flat_map(|l| gates(&container, &dir, l)).collect();
            for row in &rows {
                let square = row.iter().map(|v| v * v).sum::<f32>();
                assert!((0.4..1.6).contains(&square), "{bits} bits: row of length {square}");
            }
            rows.sort_by(|a, b| a.partial_cmp(b).unwrap());
            assert!(rows.windows(2).all(|pair| pair[0] != pair[1]), "{bits} bits: equal experts");
            let verify = crate::options::convert::VerifyArgs { dir, threads: None, quiet: true };
            crate::verify::run(&verify).unwrap();
        }
    }

    #[test]
    fn one_seed_gives_one_container_and_another_seed_another() {
        let temp = tempfile::tempdir().unwrap();
        let bytes = |name: &str, seed| {
            let dir = temp.path().join(name);
            tiny(&dir, Bits::Affine(4), seed);
            let dense = std::fs::read(dir.join(DENSE_FILE)).unwrap();
            (dense, std::fs::read(dir.join("experts/layer_02.bin")).unwrap())
        };
        let first = bytes("a", 1);
        assert!(first == bytes("b", 1));
        let other = bytes("c", 2);
        assert!(first.0 != other.0 && first.1 != other.1);
    }

    #[test]
    fn random_codes_have_mean_zero_and_the_deviation_asked_for() {
        for bits in [2, 3, 4, 5, 6, 8] {
            let [scale, bias] = affine_words(bits, 0.02).map(bf16_to_f32);
            let levels = 1u32 << bits;
            let values: Vec<f32> = (0..levels).map(|q| scale * q as f32 + bias).collect();
            let mean = values.iter().sum::<f32>() / levels as f32;
            let square = values.iter().map(|v| v * v).sum::<f32>() / levels as f32;
            assert!(mean.abs() < 1e-4, "{bits} bits: mean {mean}");
            assert!((0.016..0.021).contains(&square.sqrt()), "{bits} bits: {}", square.sqrt());
        }
    }
}
