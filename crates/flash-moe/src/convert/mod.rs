//! `flash-moe convert`: from a checkpoint to a container.
//!
//! Reads headers, plans everything, checks the space, then streams: dense tensors, one layer of
//! experts after the other, the small files, and last the manifest that makes the directory a
//! container. Refuses before writing whatever can be refused from headers alone.

pub mod source;

pub mod inventory;
mod scheme;

pub mod plan;

pub mod matrix;

mod adopt;
pub mod dense;
pub mod experts;

pub mod files;
pub mod progress;
pub mod work;
pub mod workers;

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use flash_moe_engine::container::DENSE_FILE;
use flash_moe_engine::shape::Shape;
use serde_json::Value;

use crate::options::convert::{Bits, ConvertArgs};
use crate::say::tell;
use dense::DenseLayout;
use plan::{ExpertLayer, Experts, Plan, Request};
use progress::Progress;
use scheme::Scheme;
use source::Source;
use work::{About, DENSE_SUMS_FILE, Destination, Place, Progressed, Record};
use workers::Workers;

/// What every model needs to turn text into tokens.
const TOKENIZER_FILE: &str = "tokenizer.json";
/// Files taken over as they are, where the source has them.
const COPIED_FILES: [&str; 10] = [
    "config.json",
    "generation_config.json",
    TOKENIZER_FILE,
    "tokenizer_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "LICENSE",
    "LICENSE.txt",
];

/// Runs the command.
///
/// # Errors
/// Anything that keeps the container from being complete and correct.
pub fn run(args: &ConvertArgs) -> Result<()> {
    match (&args.adopt, &args.src, &args.dst) {
        (Some(dir), _, _) => adopt::run(args, dir),
        (None, Some(src), Some(dst)) => convert(args, src, dst),
        _ => bail!("give SRC and DST, or --adopt DIR"),
    }
}

fn convert(args: &ConvertArgs, src: &Path, dst: &Path) -> Result<()> {
    let config = read_config(src)?;
    let shape = Shape::from_config(&config)?;
    check_tokenizer(src)?;
    check_apart(src, dst)?;
    let source = Source::open(src)?;
    let scheme = scheme::scheme_of(&config, &source)?;
    let request = Request { bits: args.bits, dense_bits: args.dense_bits, group: args.group };
    let plan = plan::plan(&source, &scheme, shape, request, Experts::InCheckpoint)?;
    let record = Record { settings: settings(&plan, &scheme, request), source: source.identity()? };
    let destination = match Destination::open(dst, &record, Place::New)? {
        Progressed::Open(destination) => destination,
        Progressed::Complete => return complete(args, dst),
    };
    let name = args.name.clone().unwrap_or_else(|| directory_name(src));
    Conversion { source: &source, scheme: &scheme, plan: &plan, destination, name, args }.run(src)
}

struct Conversion<'a> {
    source: &'a Source,
    scheme: &'a Scheme,
    plan: &'a Plan,
    destination: Destination,
    name: String,
    args: &'a ConvertArgs,
}

impl Conversion<'_> {
    fn run(self, src: &Path) -> Result<()> {
        let layout = dense::layout(&self.plan.dense);
        let dense_done = self.destination.dense_done(layout.bytes)?;
        let mut pending = Vec::new();
        for layer in self.layers() {
            if !self.destination.records_done(&layer.records)? {
                pending.push(layer);
            }
        }
        let dense_bytes = if dense_done { 0 } else { layout.bytes };
        let experts_bytes: u64 =
            pending.iter().map(|l| l.records.bytes() + l.records.sums_bytes()).sum();
        files::check_space(self.destination.dir(), dense_bytes + experts_bytes + small_bytes(src))?;

        let mut to_read: u64 = pending.iter().map(|l| l.source_bytes()).sum();
        if !dense_done {
            to_read += self.plan.dense.iter().map(|d| d.source_bytes(self.source)).sum::<u64>();
        }
        let workers = Workers::new(self.args.threads, self.job_bytes())?;
        let progress = Progress::new(to_read, self.args.quiet);
        self.introduce(&progress);
        let dir = self.destination.dir();
        if !dense_done {
            progress.now("dense tensors");
            let paths = (&*dir.join(DENSE_FILE), &*dir.join(DENSE_SUMS_FILE));
            dense::write(self.source, &self.plan.dense, paths, &workers, &progress)?;
            progress.done("dense tensors");
        }
        for layer in pending {
            progress.now(&layer.records.file());
            experts::write(self.source, layer, dir, &workers, &progress)?;
            progress.done(&layer.records.file());
        }
        copy_small_files(src, dir)?;
        self.conclude(&layout)?;
        progress.finish();
        Ok(())
    }

    fn layers(&self) -> impl Iterator<Item = &ExpertLayer> {
        self.plan.layers.iter().chain(&self.plan.mtp_layers)
    }

    /// Buffers that a thread needs: a record and what is read for it, or chunks of a dense matrix.
    fn job_bytes(&self) -> usize {
        let record = self.layers().map(|l| l.records.layout.padded_bytes()).max().unwrap_or(0);
        record.max(2 * dense::CHUNK_BYTES) + 2 * dense::CHUNK_BYTES
    }

    fn introduce(&self, progress: &Progress) {
        let plan = self.plan;
        let experts = match plan.layers.first() {
            Some(layer) => format!(", {} experts a layer", layer.records.describe()),
            None => String::new(),
        };
        progress.say(&format!(
            "{}: {}, {} layers{experts}",
            self.name,
            self.scheme.description,
            plan.shape.layers.len()
        ));
        for note in &plan.notes {
            progress.say(&format!("note: {note}"));
        }
    }

    fn conclude(self, dense: &DenseLayout) -> Result<()> {
        let dir = self.destination.dir();
        let entries = |layers: &[ExpertLayer]| {
            let entry = |layer: &ExpertLayer| {
                let records = &layer.records;
                records.entry(dir, records.file(), records.layout.padded_bytes())
            };
            layers.iter().map(entry).collect::<Result<Vec<_>>>()
        };
        let experts = [entries(&self.plan.layers)?, entries(&self.plan.mtp_layers)?];
        let about = About {
            name: self.name,
            source: self.scheme.description.clone(),
            shape: self.plan.shape.clone(),
            notes: self.plan.notes.clone(),
        };
        self.destination.conclude(about, dense, experts)
    }
}

fn read_config(dir: &Path) -> Result<Value> {
    let path = dir.join("config.json");
    ensure!(dir.is_dir(), "{}: no such directory", dir.display());
    let text = std::fs::read(&path)
        .with_context(|| format!("{}: every checkpoint needs one", path.display()))?;
    serde_json::from_slice(&text).with_context(|| format!("{}: not JSON", path.display()))
}

fn check_tokenizer(dir: &Path) -> Result<()> {
    let path = dir.join(TOKENIZER_FILE);
    let text = std::fs::read(&path).with_context(|| {
        format!(
            "{}: the model's tokenizer is needed; copy it from the original repository",
            path.display()
        )
    })?;
    let parsed: Result<serde::de::IgnoredAny, _> = serde_json::from_slice(&text);
    parsed.map(|_| ()).with_context(|| format!("{}: not JSON", path.display()))
}

/// Writing into the source would overwrite the very files that are being copied.
fn check_apart(src: &Path, dst: &Path) -> Result<()> {
    let same = match (src.canonicalize(), dst.canonicalize()) {
        (Ok(src), Ok(dst)) => src == dst,
        _ => false,
    };
    ensure!(!same, "{}: source and destination are one directory; give a new one", dst.display());
    Ok(())
}

fn directory_name(dir: &Path) -> String {
    let full = dir.canonicalize().unwrap_or_else(|_| dir.to_path_buf());
    full.file_name().map_or_else(|| "model".into(), |name| name.to_string_lossy().into_owned())
}

/// The settings that decide what the container will hold, by flag.
fn settings(plan: &Plan, scheme: &Scheme, request: Request) -> BTreeMap<String, String> {
    let text = |asked: Option<Bits>| match asked {
        _ if scheme.quantised => "as stored".into(),
        Some(bits) => bits.to_string(),
        None => Bits::Affine(4).to_string(),
    };
    let group = request.group.unwrap_or(64).to_string();
    BTreeMap::from([
        ("--bits".into(), text(request.bits)),
        ("--dense-bits".into(), text(request.dense_bits)),
        ("--group".into(), if scheme.quantised { "as stored".into() } else { group }),
        ("layers".into(), plan.shape.layers.len().to_string()),
    ])
}

fn complete(args: &ConvertArgs, dir: &Path) -> Result<()> {
    if !args.quiet {
        tell!("{}: already complete, nothing to do", dir.display());
    }
    Ok(())
}

/// A bound on the files that are copied or written beside the weights.
fn small_bytes(src: &Path) -> u64 {
    let copied = COPIED_FILES.iter().filter_map(|name| std::fs::metadata(src.join(name)).ok());
    copied.map(|m| m.len()).sum::<u64>() + (4 << 20)
}

fn copy_small_files(src: &Path, dst: &Path) -> Result<()> {
    for name in COPIED_FILES {
        let from = src.join(name);
        if from.exists() {
            let bytes = std::fs::read(&from).with_context(|| from.display().to_string())?;
            files::write_whole(&dst.join(name), &bytes)?;
        }
    }
    Ok(())
}
