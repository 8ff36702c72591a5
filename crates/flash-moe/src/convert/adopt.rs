//! `flash-moe convert --adopt`: a directory of the original engine becomes a container in place.
//!
//! Its expert files already hold our records, without padding between them, so they stay where they
//! are and only gain checksums. The dense weights lie in one headerless file beside a JSON; they
//! pass through the usual plan into a dense file of ours. The original's own tokenizer files drop
//! what is needed to split text exactly, so `tokenizer.json` must be there.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::Path;
use std::sync::Mutex;

use anyhow::{Context, Result, bail, ensure};
use flash_moe_engine::container::{DENSE_FILE, Precision, RecordLayout, ScaleKind};
use flash_moe_engine::memory::Block;
use flash_moe_engine::shape::Shape;
use flash_moe_engine::store::read::read_exact_at;
use safetensors::Dtype;
use serde_json::{Value, json};

use super::dense::{self, DenseLayout};
use super::experts::{Records, record_sums, write_sums};
use super::files::check_space;
use super::matrix::check_finite;
use super::plan::{self, Experts, Plan, Request};
use super::progress::Progress;
use super::scheme::{self, Scheme};
use super::source::Source;
use super::work::{About, DENSE_SUMS_FILE, Destination, Place, Progressed, Record};
use super::workers::Workers;
use crate::options::convert::{Bits, ConvertArgs};

/// Runs the command on a directory of the original engine.
///
/// # Errors
/// Something is missing or has another size than the model's dimensions give it.
pub fn run(args: &ConvertArgs, dir: &Path) -> Result<()> {
    check_tokenizer(dir)?;
    let weights = read_weights_json(dir)?;
    let (shape, mut notes) = read_shape(dir, &weights)?;
    let (folder, bits) = expert_folder(args, dir)?;
    let layers = expert_layers(dir, folder, bits, &shape)?;
    let source = Source::open_original(dir, &weights["tensors"])?;
    let found = scheme::scheme_of(&json!({}), &source)?;
    let scheme = Scheme { mlx: true, description: format!("original engine {bits}-bit"), ..found };
    let plan = plan::plan(&source, &scheme, shape, Request::default(), Experts::Packed)?;
    notes.extend(plan.notes.iter().cloned());

    let settings = BTreeMap::from([("--adopt".to_string(), folder.to_string())]);
    let record = Record { settings, source: source.identity()? };
    match Destination::open(dir, &record, Place::InPlace)? {
        Progressed::Complete => super::complete(args, dir),
        Progressed::Open(destination) => {
            Adoption { source, scheme, plan, notes, folder, layers, destination, args }.run()
        }
    }
}

struct Adoption<'a> {
    source: Source,
    scheme: Scheme,
    plan: Plan,
    notes: Vec<String>,
    folder: &'static str,
    layers: Vec<Records>,
    destination: Destination,
    args: &'a ConvertArgs,
}

impl Adoption<'_> {
    fn run(self) -> Result<()> {
        let layout = dense::layout(&self.plan.dense);
        let dense_done = self.destination.dense_done(layout.bytes)?;
        let mut pending = Vec::new();
        for records in &self.layers {
            if !self.destination.is_done(&records.sums_file(), records.sums_bytes())? {
                pending.push(records);
            }
        }
        let mut needed: u64 = pending.iter().map(|r| r.sums_bytes()).sum::<u64>() + (4 << 20);
        let mut to_read: u64 = pending.iter().map(|r| unpadded_bytes(r)).sum();
        if !dense_done {
            needed += layout.bytes;
            to_read += self.plan.dense.iter().map(|d| d.source_bytes(&self.source)).sum::<u64>();
        }
        let dir = self.destination.dir();
        check_space(dir, needed)?;
        let record_bytes = self.layers.first().map_or(0, |r| r.layout.record_bytes());
        let workers = Workers::new(self.args.threads, record_bytes.max(4 * dense::CHUNK_BYTES))?;
        let progress = Progress::new(to_read, self.args.quiet);
        for note in &self.notes {
            progress.say(&format!("note: {note}"));
        }
        if !dense_done {
            progress.now("dense tensors");
            let paths = (&*dir.join(DENSE_FILE), &*dir.join(DENSE_SUMS_FILE));
            dense::write(&self.source, &self.plan.dense, paths, &workers, &progress)?;
            progress.done("dense tensors");
        }
        for records in pending {
            let file = packed_file(self.folder, records);
            progress.now(&file);
            sum_layer(records, dir, &file, &workers, &progress)?;
            progress.done(&file);
        }
        self.conclude(&layout)?;
        progress.finish();
        Ok(())
    }

    fn conclude(self, dense: &DenseLayout) -> Result<()> {
        let dir = self.destination.dir();
        let entry = |records: &Records| {
            records.entry(dir, packed_file(self.folder, records), records.layout.record_bytes())
        };
        let entries = self.layers.iter().map(entry).collect::<Result<_>>()?;
        let about = About {
            name: self.args.name.clone().unwrap_or_else(|| super::directory_name(dir)),
            source: self.scheme.description,
            shape: self.plan.shape,
            notes: self.notes,
        };
        self.destination.conclude(about, dense, [entries, Vec::new()])
    }
}

fn unpadded_bytes(records: &Records) -> u64 {
    (records.count * records.layout.record_bytes()) as u64
}

fn packed_file(folder: &str, records: &Records) -> String {
    format!("{folder}/{}.bin", records.stem)
}

/// Reads all records of a layer, checks their scales and stores their checksums.
fn sum_layer(
    records: &Records,
    dir: &Path,
    file: &str,
    workers: &Workers,
    progress: &Progress,
) -> Result<()> {
    let path = dir.join(file);
    let opened = File::open(&path).with_context(|| path.display().to_string())?;
    let layout = &records.layout;
    let bytes = layout.record_bytes();
    let sums = Mutex::new(vec![Vec::new(); records.count]);
    workers.run(
        records.count,
        || Block::zeroed(bytes),
        |expert, block| {
            let record = block.bytes_mut();
            let offset = (expert * bytes) as u64;
            let place = || format!("layer {} expert {expert}: {file} at {offset}", records.layer);
            read_exact_at(&opened, record, offset).with_context(place)?;
            check_scales(layout, record).with_context(place)?;
            progress.read(bytes as u64);
            let done = record_sums(layout, record);
            sums.lock().expect("no job panics while holding it")[expert] = done;
            Ok(())
        },
    )?;
    let sums = sums.into_inner().expect("no job panics while holding it");
    write_sums(&dir.join(records.sums_file()), &sums)
}

fn check_scales(layout: &RecordLayout, record: &[u8]) -> Result<()> {
    for (name, matrix) in [("gate", &layout.gate), ("up", &layout.up), ("down", &layout.down)] {
        let groups = matrix.precision.format().scale_row_bytes(matrix.cols) / 2;
        let [_, scales, biases, end] = matrix.offsets;
        for (part, range) in [("scales", scales..biases), ("biases", biases..end)] {
            check_finite(Dtype::BF16, &record[range], 0, groups)
                .with_context(|| format!("{name}.{part}"))?;
        }
    }
    Ok(())
}

fn check_tokenizer(dir: &Path) -> Result<()> {
    let own = ["tokenizer.bin", "vocab.bin"].iter().any(|name| dir.join(name).exists());
    if own && !dir.join(super::TOKENIZER_FILE).exists() {
        bail!(
            "{}: tokenizer.json is missing; tokenizer.bin and vocab.bin do not replace it, copy it from the \
             model's repository (with tokenizer_config.json, generation_config.json and the chat template)",
            dir.display()
        );
    }
    super::check_tokenizer(dir)
}

fn read_weights_json(dir: &Path) -> Result<Value> {
    let path = dir.join("model_weights.json");
    let text = std::fs::read(&path).with_context(|| {
        format!("{}: a directory of the original engine has one", path.display())
    })?;
    serde_json::from_slice(&text).with_context(|| format!("{}: not JSON", path.display()))
}

/// The shape, from config.json where it is, else from what the original engine's extractor noted.
fn read_shape(dir: &Path, weights: &Value) -> Result<(Shape, Vec<String>)> {
    if dir.join("config.json").exists() {
        return Ok((Shape::from_config(&super::read_config(dir)?)?, Vec::new()));
    }
    let mut config = weights["config"].clone();
    let fields = config.as_object_mut().with_context(|| {
        format!("{}: no config.json, and no `config` in model_weights.json", dir.display())
    })?;
    // The extractor knows one family and leaves these two out.
    fields.entry("model_type").or_insert_with(|| json!("qwen3_5_moe"));
    fields.entry("max_position_embeddings").or_insert_with(|| json!(262_144));
    let shape = Shape::from_config(&config).with_context(|| {
        format!("{}: model_weights.json; copy the model's config.json there", dir.display())
    })?;
    let note = format!(
        "no config.json: dimensions from model_weights.json, top {} of {} experts",
        shape.moe.top_k, shape.moe.experts
    );
    Ok((shape, vec![note]))
}

/// The folder of expert files to take, and their bits.
fn expert_folder(args: &ConvertArgs, dir: &Path) -> Result<(&'static str, u8)> {
    const FOLDERS: [(&str, u8); 2] = [("packed_experts", 4), ("packed_experts_2bit", 2)];
    let asked = match args.bits {
        None => None,
        Some(Bits::Affine(bits @ (2 | 4))) => Some(bits),
        Some(other) => {
            bail!("--bits {other}: the original engine has expert files of 4 and of 2 bits")
        }
    };
    let there = |(folder, bits): &(&'static str, u8)| {
        asked.is_none_or(|asked| asked == *bits) && dir.join(folder).is_dir()
    };
    FOLDERS.into_iter().find(there).with_context(|| {
        let wanted: Vec<&str> =
            FOLDERS.iter().filter(|f| asked.is_none_or(|a| a == f.1)).map(|f| f.0).collect();
        format!("{}: no {}", dir.display(), wanted.join(" and no "))
    })
}

/// Every layer's records, their files checked for presence and size.
fn expert_layers(dir: &Path, folder: &str, bits: u8, shape: &Shape) -> Result<Vec<Records>> {
    let precisions = [Precision::Affine { bits, group: 64, scales: ScaleKind::Bf16 }; 3];
    let layout = RecordLayout::new(shape.hidden, shape.moe.width, precisions)?;
    let mut layers = Vec::new();
    for layer in shape.expert_layers() {
        let stem = format!("layer_{:02}", layer.0);
        let records =
            Records { layer, stem, count: shape.moe.experts, precisions, layout: layout.clone() };
        let file = packed_file(folder, &records);
        let path = dir.join(&file);
        let found = std::fs::metadata(&path).with_context(|| path.display().to_string())?.len();
        let expected = unpadded_bytes(&records);
        ensure!(
            found == expected,
            "{file}: {found} bytes, expected {expected} ({} records of {})",
            records.count,
            layout.record_bytes()
        );
        layers.push(records);
    }
    Ok(layers)
}
