//! What a plan is about: a container, or the dimensions of a published model.
//!
//! Both give the same things: a shape, the bytes of the dense weights, the bytes of a record, and a
//! disk to measure. Without a container the disk is measured on a file of our own, which is removed
//! whatever happens.

use std::fs::File;
use std::io::Write;
use std::path::PathBuf;

use anyhow::{Context, Result};
use flash_moe_engine::budget::{self, Demand};
use flash_moe_engine::container::{Container, Precision, RecordLayout};
use flash_moe_engine::engine::Options;
use flash_moe_engine::gpu::Stored;
use flash_moe_engine::shape::Shape;
use flash_moe_engine::store::measure::RecordFiles;
use flash_moe_engine::timing::Stage;

use crate::bench::limits::Disk;
use crate::bench::work::{Work, stage_of};
use crate::convert::inventory::{self, Kind};
use crate::options::bench::PlanArgs;
use crate::synth::{models, precision, router_precision};

/// Bytes of the file that stands for the model: larger than what a disk keeps at hand.
const SCRATCH_BYTES: usize = 512 << 20;
/// The same, when it has to be quick.
const SCRATCH_BYTES_QUICK: usize = 64 << 20;
/// Bytes written at once.
const BLOCK_BYTES: usize = 1 << 20;

/// What the plan is about.
pub struct Subject {
    /// A name for people.
    pub name: String,
    /// The shape.
    pub shape: Shape,
    /// Dense weights as stored.
    pub dense_bytes: u64,
    /// A record in whole pages.
    pub slot_bytes: u64,
    /// Of each layer with experts.
    pub records: Vec<RecordLayout>,
    /// How most of the dense weights are stored.
    pub dense_precision: Precision,
    /// What it has to touch and compute.
    pub work: Work,
    /// The engine's options.
    pub options: Options,
    container: Option<Container>,
}

impl Subject {
    /// What the flags name.
    ///
    /// # Errors
    /// The container or the flags.
    pub fn new(args: &PlanArgs) -> Result<Self> {
        let mut subject = match &args.like {
            Some(model) => Self::like(args, model),
            None => Self::container(args),
        }?;
        if args.like.is_some() {
            let options = subject.options.clone();
            subject.options = args.engine.in_chunks(&subject.stored(), options)?;
        }
        subject.options = budget::shared(&subject.demand(), &subject.options)?;
        Ok(subject)
    }

    fn container(args: &PlanArgs) -> Result<Self> {
        let model = args.engine.open()?;
        let options = args.engine.engine_options(&model, args.context)?;
        let container = model.container;
        let shape = container.shape().clone();
        let top_k = options.experts_per_token.unwrap_or(shape.moe.top_k);
        let demand = Demand::of(&container);
        Ok(Self {
            name: container.manifest().name.clone(),
            dense_bytes: demand.dense_bytes,
            slot_bytes: demand.slot_bytes,
            records: container.layouts().to_vec(),
            dense_precision: dense_precision(&container)?,
            work: Work::of(&container, top_k)?.with_kv_cache(options.kv_cache),
            shape,
            options,
            container: Some(container),
        })
    }

    fn like(args: &PlanArgs, model: &str) -> Result<Self> {
        let shape = Shape::from_config(&models::config(model, None))?;
        let options = args.engine.options_without_model(args.context)?;
        let top_k = options.experts_per_token.unwrap_or(shape.moe.top_k);
        let experts = [precision(args.bits); 3];
        let layout = RecordLayout::new(shape.hidden, shape.moe.width, experts)?;
        let bytes = |kind: Kind| match kind {
            Kind::Matrix(rows, cols) => {
                precision(args.dense_bits).format().matrix_bytes(rows, cols) as u64
            }
            Kind::Router(rows, cols) => {
                router_precision(args.dense_bits).format().matrix_bytes(rows, cols) as u64
            }
            Kind::Conv(channels) => 4 * 4 * channels as u64,
            Kind::Norm(n) | Kind::PlainNorm(n) | Kind::DecayLog(n) | Kind::TimeBias(n) => {
                4 * n as u64
            }
        };
        let record_bytes = layout.record_bytes() as u64;
        Ok(Self {
            name: format!("{model}, experts {}, the rest {} bits", args.bits, args.dense_bits),
            dense_bytes: inventory::trunk(&shape).iter().map(|dense| bytes(dense.kind)).sum(),
            slot_bytes: layout.padded_bytes() as u64,
            records: vec![layout; shape.expert_layers().count()],
            dense_precision: precision(args.dense_bits),
            work: Work::new(&shape, top_k, record_bytes, |dense, _, _| Ok(bytes(dense.kind)))?
                .with_kv_cache(options.kv_cache),
            shape,
            options,
            container: None,
        })
    }

    /// What it asks of memory.
    pub fn demand(&self) -> Demand<'_> {
        Demand {
            shape: &self.shape,
            dense_bytes: self.dense_bytes,
            embedding_bytes: self.work.dense(Stage::Embed).bytes,
            slot_bytes: self.slot_bytes,
        }
    }

    /// What it takes as it is stored.
    pub fn stored(&self) -> Stored<'_> {
        Stored { shape: &self.shape, records: &self.records, dense_bytes: self.dense_bytes }
    }

    /// Bytes of the dense weights and all records.
    pub fn disk_bytes(&self) -> u64 {
        let records = self.work.expert_layers() * self.shape.moe.experts;
        self.dense_bytes + records as u64 * self.slot_bytes
    }

    /// The disk, and the file that has to live as long as it is measured.
    ///
    /// # Errors
    /// The layer files cannot be opened; the scratch file cannot be written.
    pub fn disk(&self, args: &PlanArgs) -> Result<(Disk, Option<Scratch>)> {
        if let Some(container) = &self.container {
            return Ok((Disk::new(RecordFiles::open(container, self.options.io)?), None));
        }
        let scratch = Scratch::write(args)?;
        let files = RecordFiles::of_file(&scratch.path, self.slot_bytes as usize)?;
        Ok((Disk::new(files), Some(scratch)))
    }
}

/// How most of the dense weights are stored that every token is multiplied with.
fn dense_precision(container: &Container) -> Result<Precision> {
    let mut weights: Vec<(Precision, usize)> = Vec::new();
    for dense in inventory::trunk(container.shape()) {
        let Kind::Matrix(rows, cols) = dense.kind else { continue };
        if matches!(stage_of(&dense.name), Stage::Embed | Stage::Logits) {
            continue;
        }
        let precision = container.precision(&dense.name, rows, cols)?;
        match weights.iter_mut().find(|(other, _)| *other == precision) {
            Some((_, count)) => *count += rows * cols,
            None => weights.push((precision, rows * cols)),
        }
    }
    let most = weights.into_iter().max_by_key(|(_, count)| *count);
    Ok(most.context("a model without dense weights")?.0)
}

/// A file that is removed when dropped.
pub struct Scratch {
    path: PathBuf,
}

impl Scratch {
    /// Writes a file that no disk can compress away.
    fn write(args: &PlanArgs) -> Result<Self> {
        let name = format!(".flash-moe-plan-{}", std::process::id());
        let scratch = Self { path: args.scratch.join(name) };
        let whole = || -> std::io::Result<()> {
            let mut file = File::create_new(&scratch.path)?;
            let mut state = 1u64;
            let mut block = Vec::with_capacity(BLOCK_BYTES);
            let bytes = if args.quick { SCRATCH_BYTES_QUICK } else { SCRATCH_BYTES };
            for _ in 0..bytes / BLOCK_BYTES {
                block.clear();
                while block.len() < BLOCK_BYTES {
                    state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    block.extend_from_slice(&(state ^ (state >> 31)).to_le_bytes());
                }
                file.write_all(&block)?;
            }
            file.sync_all()
        };
        whole().with_context(|| {
            format!(
                "{}: no scratch file for the disk's speed; use --scratch",
                scratch.path.display()
            )
        })?;
        Ok(scratch)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // Best effort: the measurement is over, and its result is right with or without the file.
        let _ = std::fs::remove_file(&self.path);
    }
}
