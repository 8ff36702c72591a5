//! `flash-moe bench`: tokens a second beside the limits of the machine, measured in one run.
//!
//! The order matters: what cannot run is refused first, then the machine is measured while memory is
//! free, then the model is opened and its answer checked. Only then does a clock run. A bench that
//! fails its check prints no number.

pub mod limits;
pub mod work;

mod check;
mod course;
mod prompt;
mod walk;

pub mod report;
pub mod table;

use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result};
use flash_moe_engine::budget::Budget;
use flash_moe_engine::engine::{Engine, Options};
use flash_moe_engine::gpu::{self, GpuCounters};
use flash_moe_engine::machine;
use flash_moe_engine::pool::Pool;
use flash_moe_engine::store::measure::RecordFiles;

use crate::options::bench::BenchArgs;
use crate::options::engine::cores;
use crate::say;
use crate::video::Video;
use course::Course;
use limits::{DEPTHS, Disk, Effort, GemmProbe, MemoryProbe};
use report::{GpuLimits, KernelReport, Limits, Machine, Model, Report, RunReport};
use walk::{Beside, Walk};
use work::Work;

/// Runs the command.
///
/// # Errors
/// What the flags, the model or the engine have to say; an answer that fails its check.
pub fn run(args: &BenchArgs) -> Result<()> {
    let report = measure(args)?;
    if let Some(path) = &args.csv {
        std::fs::write(path, report::csv(&report.runs))
            .with_context(|| path.display().to_string())?;
    }
    match args.json {
        true => say::line(&serde_json::to_string_pretty(&report)?),
        false => say::text(&table::render(&report)),
    }
}

/// What the clock of a GPU costs.
const TIMED: &str = "stages are timed by the device, each in a pass of its own, which takes time \
                     itself: of decoded tokens the last quarter gives the stages, the others the speed";

fn measure(args: &BenchArgs) -> Result<Report> {
    let model = args.engine.open()?;
    let mut notes = args.engine.lossy(&model.container);
    let mut course = Course::new(args, model.container.shape().max_positions)?;
    notes.extend(course.notes.clone());
    let mut options = args.engine.engine_options(&model, Some(course.context))?;
    if let Some(gpu) = &mut options.gpu {
        gpu.timed = true;
        notes.push(TIMED.into());
    }
    let effort = Effort::new(args.quick);
    let mut disk = Disk::new(RecordFiles::open(&model.container, options.io)?);
    // The disk is measured beside the loaded model, with as many buffers as reads in flight.
    let depths = *DEPTHS.iter().max().expect("some depths");
    let memory_bytes = match options.memory_bytes {
        Some(limit) => MemoryProbe::bytes(limit),
        None => MemoryProbe::bytes(machine::available_memory().unwrap_or(0)),
    };
    options.other_bytes += (depths * disk.record_bytes()) as u64 + memory_bytes;
    Budget::plan(&model.container, &options)?;

    let pool = Pool::new(options.threads);
    let words = MemoryProbe::new(&pool, memory_bytes);
    let memory = words.measure(&pool, effort.each)?;
    let products = GemmProbe::new(options.isa, options.arithmetic)?;
    let gemm = products.measure(&pool, effort.each);
    let rates = disk.sweep(effort)?;
    let depth = Limits::best_disk(&rates).map_or(1, |(_, depth)| depth);
    let limits = Limits::new(memory, gemm, &rates, disk.is_direct());
    let device = options.gpu.as_ref().map(|wanted| gpu::limits(wanted, &pool, effort.each));
    let limits = Limits { gpu: device.transpose()?.map(GpuLimits::from), ..limits };

    let started = Instant::now();
    let engine = Arc::new(Engine::open(model.container, &options)?);
    let open_seconds = started.elapsed().as_secs_f64();
    if engine.gpu().is_some_and(|gpu| gpu.budget().resident) {
        notes.extend(course.warm_alone());
    }
    let prompt = prompt::random_ids(args.seed, course.prompt_tokens(), engine.vocabulary());
    let check = check::check(&engine, &prompt[..check::TOKENS])?;
    let work = Work::of(engine.container(), engine.top_k())?.with_kv_cache(options.kv_cache);
    let quiet = args.quiet || args.json;
    let beside = Beside {
        disk: &mut disk,
        depth,
        memory: &words,
        products: &products,
        pool: &pool,
        time: effort.beside,
    };
    let runs = Walk::new(&engine, &prompt, beside, quiet).run(&course)?;
    let kernels = kernels_alone(&engine, &limits, &course, effort)?;
    Ok(Report {
        machine: machine_of(&options),
        model: model_of(&engine, &work, args.seed, open_seconds),
        runs: runs.iter().map(|run| RunReport::new(run, &work, &limits)).collect(),
        limits,
        check,
        kernels,
        notes,
    })
}

/// Every kernel of a decoded token by itself, where the course ends; none where a GPU does not hold all experts.
fn kernels_alone(
    engine: &Engine,
    limits: &Limits,
    course: &Course,
    effort: Effort,
) -> Result<Vec<KernelReport>> {
    let (Some(gpu), Some(device)) = (engine.gpu(), limits.gpu) else { return Ok(Vec::new()) };
    let position = course.frontiers.last().copied().unwrap_or(course.context - 1);
    let rates = gpu.kernels_alone(position, effort.beside)?;
    let report = |rate| KernelReport::new(rate, position, device.read_bytes_per_second);
    Ok(rates.iter().map(report).collect())
}

/// The machine as the system describes it.
pub fn machine_of(options: &Options) -> Machine {
    let unknown = |what: &str| format!("unknown {what}");
    Machine {
        cpu: machine::cpu_name()
            .unwrap_or_else(|| unknown(&format!("{} processor", std::env::consts::ARCH))),
        cores: cores(),
        memory_bytes: machine::total_memory().unwrap_or(0),
        isa: options.isa.name(),
        threads: options.threads,
        kernel: machine::kernel().unwrap_or_else(|| unknown("kernel")),
    }
}

fn model_of(engine: &Engine, work: &Work, seed: u64, open_seconds: f64) -> Model {
    let (shape, options, budget) = (engine.shape(), engine.options(), engine.budget());
    let manifest = engine.container().manifest();
    Model {
        name: manifest.name.clone(),
        source: manifest.source.clone(),
        layers: shape.layers.len(),
        experts: shape.moe.experts,
        experts_per_token: engine.top_k(),
        record_bytes: work.record_bytes,
        records: budget.records,
        slots: budget.slots,
        memory_limit_bytes: budget.limit,
        context: budget.context,
        prefill_chunk: options.prefill_chunk,
        readers: options.readers,
        lookahead: options.lookahead.name(),
        reader: engine.store().reader().name(),
        io: engine.store().choice().name(),
        io_why: engine.store().choice().why.clone(),
        prompt: format!("prompts are random ids, seed {seed}; decode takes the likeliest token"),
        open_seconds,
        device: engine.gpu().map_or("cpu".into(), |gpu| gpu.budget().adapter.clone()),
        video_memory: engine.gpu().map(|gpu| Video::new(gpu, GpuCounters::default())),
    }
}
