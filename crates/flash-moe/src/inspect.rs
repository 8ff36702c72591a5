//! `flash-moe inspect`: what a container holds and what it takes to run it.
//!
//! Reads the manifest and the header of the dense file, no weights. Groups tensors by the part of
//! the model they belong to; the memory comes from the engine's own budget. Prints a page for
//! people or one JSON object.

use std::collections::BTreeMap;

use anyhow::Result;
use flash_moe_engine::budget::Budget;
use flash_moe_engine::container::{Container, ExpertFile, Precision};
use flash_moe_engine::engine::Options;
use flash_moe_engine::shape::{Family, Mix, Shape};
use indicatif::DecimalBytes;
use serde_json::{Value, json};

use crate::convert::inventory::{self, Dense, Kind};
use crate::options::convert::InspectArgs;
use crate::say;

/// Runs the command.
///
/// # Errors
/// The directory is no container or is damaged.
pub fn run(args: &InspectArgs) -> Result<()> {
    let container = Container::open(&args.dir)?;
    let report = Report::new(&container)?;
    if args.json {
        say::line(&serde_json::to_string_pretty(&report.json(&container))?)
    } else {
        say::text(&report.page(&container))
    }
}

/// Tensors of one part of the model.
#[derive(Default)]
struct Group {
    tensors: usize,
    bytes: u64,
    precisions: BTreeMap<String, usize>,
}

struct Report {
    groups: Vec<(&'static str, Group)>,
    dense_bytes: u64,
    expert_bytes: u64,
    mtp_bytes: u64,
    record_bytes: usize,
    token_bytes: u64,
    budget: Budget,
}

const GROUPS: [&str; 11] = [
    "embedding",
    "head",
    "attention",
    "delta-net",
    "router",
    "shared expert",
    "dense feed-forward",
    "norms",
    "experts",
    "mtp",
    "mtp experts",
];

impl Report {
    fn new(container: &Container) -> Result<Self> {
        let shape = container.shape();
        let mut groups: BTreeMap<&'static str, Group> = BTreeMap::new();
        let prediction = match shape.mtp_layers {
            0 => Vec::new(),
            layers => inventory::prediction(shape, layers),
        };
        for dense in inventory::trunk(shape).iter().chain(&prediction) {
            let group = groups.entry(group_of(dense)).or_default();
            let (precision, bytes) = stored(container, dense)?;
            group.tensors += 1;
            group.bytes += bytes;
            *group.precisions.entry(precision.name()).or_default() += 1;
        }
        let manifest = container.manifest();
        for (name, files) in
            [("experts", &manifest.experts), ("mtp experts", &manifest.mtp_experts)]
        {
            for file in files {
                let group = groups.entry(name).or_default();
                group.tensors += 3 * file.experts;
                group.bytes += file_bytes(file);
                for precision in file.precisions {
                    *group.precisions.entry(precision.name()).or_default() += file.experts;
                }
            }
        }
        let top_k = container.shape().moe.top_k as u64;
        let records = container.layouts().iter().map(|l| l.record_bytes());
        let groups =
            GROUPS.into_iter().filter_map(|name| groups.remove(name).map(|g| (name, g))).collect();
        Ok(Self {
            groups,
            dense_bytes: manifest.dense.bytes,
            expert_bytes: manifest.experts.iter().map(file_bytes).sum(),
            mtp_bytes: manifest.mtp_experts.iter().map(file_bytes).sum(),
            record_bytes: records.clone().max().unwrap_or(0),
            token_bytes: records.map(|bytes| bytes as u64 * top_k).sum(),
            budget: Budget::plan(container, &unlimited())?,
        })
    }

    fn page(&self, container: &Container) -> String {
        let (manifest, shape) = (container.manifest(), container.shape());
        let mut out = format!("{} ({})\n  {}\n\n", manifest.name, manifest.source, describe(shape));
        out += &format!("  {:<20}{:<24}{:>9}{:>14}\n", "part", "precision", "tensors", "size");
        for (name, group) in &self.groups {
            let precisions: Vec<&str> = group.precisions.keys().map(String::as_str).collect();
            let (precision, size) = (precisions.join(", "), DecimalBytes(group.bytes).to_string());
            out += &format!("  {name:<20}{precision:<24}{:>9}{size:>14}\n", group.tensors);
        }
        out.push('\n');
        let mut line = |what: &str, bytes: u64| {
            out += &format!("  {what:<44}{:>12}\n", DecimalBytes(bytes).to_string());
        };
        line("on disk", self.dense_bytes + self.expert_bytes + self.mtp_bytes);
        line("dense file", self.dense_bytes);
        line("one expert", self.record_bytes as u64);
        line("experts touched by a token", self.token_bytes);
        let context = self.budget.context;
        for part in &self.budget.fixed {
            line(&format!("memory: {}", part.name), part.bytes);
        }
        let pool = self.budget.slots_floor as u64 * self.budget.slot_bytes;
        line("memory: smallest expert pool", pool);
        line(&format!("smallest memory to run, {context} tokens"), self.budget.smallest());
        for note in &manifest.notes {
            out += &format!("  note: {note}\n");
        }
        out
    }

    fn json(&self, container: &Container) -> Value {
        let (manifest, shape) = (container.manifest(), container.shape());
        let groups: Vec<Value> = self
            .groups
            .iter()
            .map(|(name, g)| {
                json!({ "part": name, "tensors": g.tensors, "bytes": g.bytes, "precisions": g.precisions })
            })
            .collect();
        let memory: BTreeMap<&str, u64> =
            self.budget.fixed.iter().map(|line| (line.name, line.bytes)).collect();
        json!({
            "name": manifest.name,
            "source": manifest.source,
            "shape": shape,
            "groups": groups,
            "disk_bytes": self.dense_bytes + self.expert_bytes + self.mtp_bytes,
            "dense_bytes": self.dense_bytes,
            "expert_bytes": self.record_bytes,
            "expert_bytes_per_token": self.token_bytes,
            "memory_bytes": memory,
            "context": self.budget.context,
            "pool_bytes_min": self.budget.slots_floor as u64 * self.budget.slot_bytes,
            "memory_bytes_min": self.budget.smallest(),
            "notes": manifest.notes,
        })
    }
}

/// Options that never refuse: inspect asks what a run would need.
fn unlimited() -> Options {
    Options {
        threads: std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
        memory_bytes: Some(u64::MAX),
        prefill_chunk: 64,
        readers: 4,
        ..Options::default()
    }
}

fn file_bytes(file: &ExpertFile) -> u64 {
    (file.stride_bytes * file.experts) as u64
}

fn describe(shape: &Shape) -> String {
    let family = match shape.family {
        Family::Qwen35Moe => "qwen3_5_moe",
        Family::Qwen3Next => "qwen3_next",
        Family::Qwen3Moe => "qwen3_moe",
    };
    let (a, m) = (&shape.attention, &shape.moe);
    let mut text = format!(
        "{family}: {} layers ({} attention, {} delta-net), hidden {}, vocabulary {}\n",
        shape.layers.len(),
        shape.count(Mix::Attention),
        shape.count(Mix::DeltaNet),
        shape.hidden,
        shape.vocab
    );
    text +=
        &format!("  attention: {} heads, {} KV heads, width {}", a.heads, a.kv_heads, a.head_dim);
    if let Some(d) = &shape.delta {
        text += &format!("; delta-net: {} key heads, {} value heads", d.key_heads, d.value_heads);
    }
    text += &format!(
        "\n  experts: top {} of {} in {} layers, width {}",
        m.top_k,
        m.experts,
        shape.expert_layers().count(),
        m.width
    );
    if m.shared_width > 0 {
        text += &format!(", shared expert {}", m.shared_width);
    }
    text
}

/// Precision and bytes of a dense tensor, a matrix with its scales and biases.
fn stored(container: &Container, dense: &Dense) -> Result<(Precision, u64)> {
    Ok(match dense.kind {
        Kind::Matrix(rows, cols) | Kind::Router(rows, cols) => {
            let precision = container.precision(&dense.name, rows, cols)?;
            (precision, precision.format().matrix_bytes(rows, cols) as u64)
        }
        Kind::Conv(channels) => (Precision::F32, 4 * 4 * channels as u64),
        Kind::Norm(n) | Kind::PlainNorm(n) | Kind::DecayLog(n) | Kind::TimeBias(n) => {
            (Precision::F32, 4 * n as u64)
        }
    })
}

/// The part of the model that a dense tensor belongs to.
fn group_of(dense: &Dense) -> &'static str {
    let name = dense.name.as_str();
    let has = |part: &str| name.contains(part);
    match dense.kind {
        _ if name.starts_with("mtp.") => "mtp",
        Kind::Router(..) => "router",
        Kind::Norm(_) | Kind::PlainNorm(_) => "norms",
        _ if has(".self_attn.") => "attention",
        _ if has(".linear_attn.") => "delta-net",
        _ if has(".shared_expert.") => "shared expert",
        _ if has(".mlp.") => "dense feed-forward",
        _ if name == "lm_head" => "head",
        _ => "embedding",
    }
}
