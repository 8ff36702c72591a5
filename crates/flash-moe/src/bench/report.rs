//! What a bench found, as one object: the fields are the names in its JSON.
//!
//! Each stage is held against the limit that binds it: weights of one token against the memory,
//! stages of a prompt against the slower of memory and arithmetic, waiting for experts against the
//! disk. A fraction is the time at the limit over the time taken.

use flash_moe_engine::gpu::{ChunkRates, DeviceLimits, KernelRate};
use flash_moe_engine::store::measure::ReadRate;
use flash_moe_engine::timing::Stage;
use serde::Serialize;

use super::check::Check;
use super::limits::{GemmRate, MemoryRate, fastest};
use super::walk::{Phase, PoolState, Run};
use super::work::Work;
use crate::read_ahead::ReadAhead;
use crate::video::{Fed, Video};

/// Everything a bench found.
#[derive(Debug, Serialize)]
pub struct Report {
    /// The machine in words.
    pub machine: Machine,
    /// The model and how it was run.
    pub model: Model,
    /// What the machine can do.
    pub limits: Limits,
    /// The check of the answer.
    pub check: Check,
    /// Every run, in order.
    pub runs: Vec<RunReport>,
    /// Every kernel of a decoded token by itself, where a GPU holds all experts.
    pub kernels: Vec<KernelReport>,
    /// What was left out, and what to know.
    pub notes: Vec<String>,
}

/// A kernel of a decoded token, over all layers that have it.
#[derive(Debug, Serialize)]
pub struct KernelReport {
    /// What it computes.
    pub kernel: &'static str,
    /// The token's position.
    pub position: usize,
    /// Dispatches of a token.
    pub dispatches: usize,
    /// Bytes that they touch together.
    pub bytes: u64,
    /// Seconds that they take together, one behind the other.
    pub seconds: f64,
    /// Bytes over what the device reads in these seconds.
    pub limit_fraction: f64,
}

impl KernelReport {
    /// Of what was measured on a device that reads so fast.
    pub fn new(rate: &KernelRate, position: usize, bytes_per_second: f64) -> Self {
        Self {
            kernel: rate.name,
            position,
            dispatches: rate.dispatches,
            bytes: rate.bytes,
            seconds: rate.seconds,
            limit_fraction: rate.bytes as f64 / bytes_per_second / rate.seconds,
        }
    }
}

/// The machine in words.
#[derive(Debug, Serialize)]
pub struct Machine {
    /// Name of the processor.
    pub cpu: String,
    /// Cores that this process may use.
    pub cores: usize,
    /// Memory of the system; 0 if it does not say.
    pub memory_bytes: u64,
    /// Instruction set of the kernels.
    pub isa: &'static str,
    /// Compute threads.
    pub threads: usize,
    /// Kernel of the operating system.
    pub kernel: String,
}

/// The model and how it was run.
#[derive(Debug, Serialize)]
pub struct Model {
    /// From its manifest.
    pub name: String,
    /// From its manifest.
    pub source: String,
    /// Decoder layers.
    pub layers: usize,
    /// Experts of a layer.
    pub experts: usize,
    /// Experts for a token.
    pub experts_per_token: usize,
    /// Bytes of an expert's record.
    pub record_bytes: u64,
    /// Records in the model.
    pub records: usize,
    /// Records that the pool holds.
    pub slots: usize,
    /// Memory limit of the process.
    pub memory_limit_bytes: u64,
    /// Tokens of context.
    pub context: usize,
    /// Prompt tokens computed together.
    pub prefill_chunk: usize,
    /// Expert reads in flight.
    pub readers: usize,
    /// How the next layer's experts were guessed.
    pub lookahead: &'static str,
    /// Who makes them: `uring` or `threads`.
    pub reader: &'static str,
    /// `direct` or `buffered`.
    pub io: &'static str,
    /// What decided that.
    pub io_why: String,
    /// What the prompt is.
    pub prompt: String,
    /// From opening to a model that is ready.
    pub open_seconds: f64,
    /// What computed: `cpu`, or the name of a GPU.
    pub device: String,
    /// Experts and video memory, as the opening left them.
    pub video_memory: Option<Video>,
}

/// What the machine can do.
#[derive(Debug, Serialize)]
pub struct Limits {
    /// Reading memory.
    pub memory: MemoryRate,
    /// Products of a tile on data in the cache.
    pub gemm: GemmRate,
    /// Reading records.
    pub disk: Vec<DiskRate>,
    /// Whether those reads went past the page cache.
    pub disk_direct: bool,
    /// The GPU, where one computes.
    pub gpu: Option<GpuLimits>,
}

/// What a GPU can do.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct GpuLimits {
    /// Bytes of its memory that were read again and again.
    pub read_bytes: u64,
    /// Bytes of it that it reads.
    pub read_bytes_per_second: f64,
    /// Bytes that are copied to where it takes them from.
    pub stage_bytes_per_second: f64,
    /// Bytes that it takes from there.
    pub copy_bytes_per_second: f64,
    /// Bytes that come in while both go on.
    pub upload_bytes_per_second: f64,
    /// From a question until the answer is here.
    pub round_trip_us: f64,
}

impl From<DeviceLimits> for GpuLimits {
    fn from(limits: DeviceLimits) -> Self {
        Self {
            read_bytes: limits.read_bytes,
            read_bytes_per_second: limits.read,
            stage_bytes_per_second: limits.stage,
            copy_bytes_per_second: limits.copy,
            upload_bytes_per_second: limits.upload,
            round_trip_us: limits.round_trip * 1e6,
        }
    }
}

/// What a GPU computes of a prompt's chunk; a multiplication and an addition are two.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct ChunkLimits {
    /// Tokens that are taken together.
    pub tokens: usize,
    /// Whether products go to tensor cores.
    pub tensor_cores: bool,
    /// Products of dense weights.
    pub dense_flops_per_second: f64,
    /// Products of experts.
    pub experts_flops_per_second: f64,
    /// Scores and mixes of attention.
    pub attention_flops_per_second: f64,
}

impl From<ChunkRates> for ChunkLimits {
    fn from(rates: ChunkRates) -> Self {
        Self {
            tokens: rates.tokens,
            tensor_cores: rates.tensor_cores,
            dense_flops_per_second: rates.dense,
            experts_flops_per_second: rates.experts,
            attention_flops_per_second: rates.attention,
        }
    }
}

/// Reading records at one depth.
#[derive(Clone, Debug, Serialize)]
pub struct DiskRate {
    /// Reads in flight.
    pub depth: usize,
    /// Records read.
    pub records: usize,
    /// Bytes read, all of them checked to have arrived.
    pub bytes: u64,
    /// Bytes over time.
    pub bytes_per_second: f64,
}

/// One run.
#[derive(Clone, Debug, Serialize)]
pub struct RunReport {
    /// `prefill` or `decode`.
    pub phase: Phase,
    /// `cold` or `warm`.
    pub pool: PoolState,
    /// Which repetition, from 0.
    pub repeat: usize,
    /// Position of the first token.
    pub position: usize,
    /// Tokens taken.
    pub tokens: usize,
    /// Wall time.
    pub seconds: f64,
    /// The figure that users know.
    pub tokens_per_second: f64,
    /// Median time of a decoded token.
    pub step_ms_median: Option<f64>,
    /// Longest time of a decoded token.
    pub step_ms_max: Option<f64>,
    /// Experts.
    pub experts: Experts,
    /// Time at the memory's limit (its best pass) of everything touched, over the wall time.
    pub memory_fraction: f64,
    /// The memory's median pass beside this run.
    pub memory_bytes_per_second_beside: f64,
    /// As `memory_fraction`, against that.
    pub memory_fraction_beside: f64,
    /// The products' median pass beside a prompt.
    pub gemm_flops_per_second_beside: Option<f64>,
    /// Time at their limits of all stages but `fetch`, over the wall time.
    pub limit_fraction: f64,
    /// As `limit_fraction`, against the median passes beside this run.
    pub limit_fraction_beside: f64,
    /// What was done to feed a GPU, where one computes.
    pub fed: Option<Fed>,
    /// The stages, then `other`, which is what the wall time leaves.
    pub stages: Vec<StageReport>,
}

/// Where a run's experts came from.
#[derive(Clone, Debug, Serialize)]
pub struct Experts {
    /// Found in the pool.
    pub hits: u64,
    /// Read from disk.
    pub misses: u64,
    /// Hits over both.
    pub hit_rate: f64,
    /// Bytes read, for whatever reason.
    pub read_bytes: u64,
    /// Bytes read because a token asked for them: those of the misses.
    pub demanded_bytes: u64,
    /// Read by `--lookahead`.
    pub lookahead: ReadAhead,
    /// Bytes read for each token.
    pub read_bytes_per_token: f64,
    /// Time that compute waited for reads.
    pub wait_seconds: f64,
    /// Bytes read over the run's wall time.
    pub read_bytes_per_second: f64,
    /// The disk's limit, measured just before.
    pub disk_bytes_per_second: Option<f64>,
    /// The one over the other.
    pub disk_fraction: Option<f64>,
}

/// One stage of a run.
#[derive(Clone, Debug, Serialize)]
pub struct StageReport {
    /// Its name in `--timing`.
    pub stage: &'static str,
    /// Wall time.
    pub seconds: f64,
    /// Times it ran.
    pub calls: u64,
    /// Bytes touched; for `fetch`, bytes read from disk.
    pub bytes: u64,
    /// Floating-point operations.
    pub operations: f64,
    /// `memory`, `gemm` or `disk`, with a GPU `video` (its memory), `upload` or `memory`; none for what has
    /// no limit.
    pub limit: Option<&'static str>,
    /// Time at that limit.
    pub limit_seconds: Option<f64>,
    /// Time at the limit over the time taken.
    pub limit_fraction: Option<f64>,
}

impl From<&ReadRate> for DiskRate {
    fn from(r: &ReadRate) -> Self {
        let (depth, records, bytes) = (r.depth, r.records, r.bytes);
        Self { depth, records, bytes, bytes_per_second: r.rate() }
    }
}

impl Limits {
    /// From the measurements.
    pub fn new(memory: MemoryRate, gemm: GemmRate, disk: &[ReadRate], disk_direct: bool) -> Self {
        let disk = disk.iter().map(DiskRate::from).collect();
        Self { memory, gemm, disk, disk_direct, gpu: None }
    }

    /// The best rates, and those beside a run. A GPU is not measured again, and what it can multiply
    /// not at all.
    fn rates(&self, run: &Run) -> [Rates; 2] {
        let [best, beside] = match self.gpu {
            Some(gpu) => [(gpu.read_bytes_per_second, None); 2],
            None => {
                let gemm = self.gemm.flops_per_second;
                let beside = run.gemm_rate.unwrap_or(gemm);
                [(self.memory.bytes_per_second, Some(gemm)), (run.memory_rate, Some(beside))]
            }
        };
        let name = if self.gpu.is_some() { "video" } else { "memory" };
        [best, beside].map(|(memory, gemm)| Rates { name, memory, gemm })
    }

    /// The disk's best figure over the depths, in bytes a second, and its depth.
    pub fn best_disk(rates: &[ReadRate]) -> Option<(f64, usize)> {
        fastest(rates).filter(|r| r.bytes > 0).map(|r| (r.rate(), r.depth))
    }
}

impl RunReport {
    /// Holds a run against the limits.
    pub fn new(run: &Run, work: &Work, limits: &Limits) -> Self {
        let [best, beside] = limits.rates(run);
        let mut stages = stage_reports(run, work, best);
        let fraction = |stages: &[StageReport]| {
            let computed = stages.iter().filter(|s| s.stage != Stage::Fetch.name());
            computed.filter_map(|s| s.limit_seconds).sum::<f64>() / run.seconds
        };
        let fractions = [fraction(&stages), fraction(&stage_reports(run, work, beside))];
        if let Some(gpu) = &limits.gpu {
            stages.extend(fed_reports(run, work, limits, gpu));
        }
        let known: f64 = stages.iter().map(|s| s.seconds).sum();
        stages.push(StageReport {
            stage: "other",
            seconds: run.seconds - known,
            calls: 0,
            bytes: 0,
            operations: 0.0,
            limit: None,
            limit_seconds: None,
            limit_fraction: None,
        });
        let is_touched = |s: &&StageReport| ![Stage::Fetch.name(), UPLOADS, CPU].contains(&s.stage);
        let touched = stages.iter().filter(is_touched).map(|s| s.bytes);
        let touched: u64 = touched.sum();
        let mut steps = run.step_seconds.clone();
        steps.sort_by(f64::total_cmp);
        Self {
            phase: run.phase,
            pool: run.pool,
            repeat: run.repeat,
            position: run.position,
            tokens: run.tokens,
            seconds: run.seconds,
            tokens_per_second: run.tokens as f64 / run.seconds,
            step_ms_median: steps.get(steps.len() / 2).map(|s| s * 1e3),
            step_ms_max: steps.last().map(|s| s * 1e3),
            experts: Experts::new(run),
            memory_fraction: touched as f64 / best.memory / run.seconds,
            memory_bytes_per_second_beside: beside.memory,
            memory_fraction_beside: touched as f64 / beside.memory / run.seconds,
            gemm_flops_per_second_beside: run.gemm_rate,
            limit_fraction: fractions[0],
            limit_fraction_beside: fractions[1],
            fed: run.fed.map(Fed::from),
            stages,
        }
    }
}

impl Experts {
    fn new(run: &Run) -> Self {
        let reads = &run.reads;
        let rate = reads.read_bytes as f64 / run.seconds;
        Self {
            hits: reads.hits,
            misses: reads.misses,
            hit_rate: reads.hit_rate(),
            read_bytes: reads.read_bytes,
            demanded_bytes: reads.demanded_bytes(),
            lookahead: reads.guessed.into(),
            read_bytes_per_token: reads.read_bytes as f64 / run.tokens as f64,
            wait_seconds: reads.wait_ns as f64 / 1e9,
            read_bytes_per_second: rate,
            disk_bytes_per_second: run.disk_rate,
            disk_fraction: run.disk_rate.map(|limit| rate / limit),
        }
    }
}

/// What stages are held against.
#[derive(Clone, Copy)]
struct Rates {
    name: &'static str, // of the memory
    memory: f64,        // bytes a second
    gemm: Option<f64>,  // operations a second
}

/// The stages that a run had.
fn stage_reports(run: &Run, work: &Work, rates: Rates) -> Vec<StageReport> {
    let had = Stage::ALL.into_iter().filter(|&stage| run.timing.stage(stage).calls > 0);
    had.map(|stage| stage_report(run, stage, work, rates)).collect()
}

fn stage_report(run: &Run, stage: Stage, work: &Work, rates: Rates) -> StageReport {
    let total = run.timing.stage(stage);
    let seconds = total.ns as f64 / 1e9;
    let heads = if run.phase == Phase::Decode { run.tokens } else { 1 };
    let operations = work.operations(stage, run.position, run.tokens, heads);
    let bytes = if stage == Stage::Fetch { run.reads.read_bytes } else { total.bytes };
    let memory = bytes as f64 / rates.memory;
    let gemm = rates.gemm.map_or(0.0, |rate| operations / rate);
    let bound = match (stage, run.phase) {
        (Stage::Fetch, _) => run.disk_rate.map(|rate| ("disk", bytes as f64 / rate)),
        _ if bytes == 0 => None,
        (_, Phase::Prefill) if gemm > memory => Some(("gemm", gemm)),
        _ => Some((rates.name, memory)),
    };
    // Reads go on while other stages compute, so the disk's share is of the whole run.
    let taken = if stage == Stage::Fetch { run.seconds } else { seconds };
    StageReport {
        stage: stage.name(),
        seconds,
        calls: total.calls,
        bytes,
        operations,
        limit: bound.map(|(name, _)| name),
        limit_seconds: bound.map(|(_, at_limit)| at_limit),
        limit_fraction: bound.map(|(_, at_limit)| at_limit / taken),
    }
}

/// Name of what goes to a GPU, among the stages.
const UPLOADS: &str = "uploads";
/// Name of what the processor computes for a GPU, among the stages.
const CPU: &str = "cpu_experts";

/// What feeds a GPU, where it does: uploads go on while stages compute, so their share is of the whole run.
fn fed_reports(run: &Run, work: &Work, limits: &Limits, gpu: &GpuLimits) -> Vec<StageReport> {
    let Some(fed) = &run.fed else { return Vec::new() };
    let report = |stage, calls: u64, bytes: u64, (seconds, taken): (f64, f64), (limit, rate)| {
        let at_limit = bytes as f64 / rate;
        (calls > 0).then(|| StageReport {
            stage,
            seconds,
            calls,
            bytes,
            operations: 0.0,
            limit: Some(limit),
            limit_seconds: Some(at_limit),
            limit_fraction: Some(at_limit / taken),
        })
    };
    let computing = fed.compute_ns as f64 / 1e9;
    let upload = ("upload", gpu.upload_bytes_per_second);
    let memory = ("memory", limits.memory.bytes_per_second);
    let computed = fed.computed * work.record_bytes;
    let uploads = report(UPLOADS, fed.uploads, fed.upload_bytes, (0.0, run.seconds), upload);
    let others = report(CPU, fed.computed, computed, (computing, computing), memory);
    uploads.into_iter().chain(others).collect()
}

/// Every stage of every run as a line, under a line of names.
pub fn csv(runs: &[RunReport]) -> String {
    let mut text = String::from(
        "repeat,phase,pool,position,tokens,run_seconds,tokens_per_second,hits,misses,read_bytes,\
         demanded_bytes,guesses_useful,guesses_wasted,wait_seconds,stage,seconds,calls,bytes,operations,limit,limit_fraction\n",
    );
    for run in runs {
        let e = &run.experts;
        let phase = if run.phase == Phase::Decode { "decode" } else { "prefill" };
        let pool = if run.pool == PoolState::Cold { "cold" } else { "warm" };
        let head = format!(
            "{},{phase},{pool},{},{},{:.9},{:.4},{},{},{},{},{},{},{:.9}",
            run.repeat,
            run.position,
            run.tokens,
            run.seconds,
            run.tokens_per_second,
            e.hits,
            e.misses,
            e.read_bytes,
            e.demanded_bytes,
            e.lookahead.useful,
            e.lookahead.wasted,
            e.wait_seconds
        );
        for s in &run.stages {
            let fraction = s.limit_fraction.map_or_else(String::new, |f| format!("{f:.4}"));
            text += &format!(
                "{head},{},{:.9},{},{},{:.0},{},{fraction}\n",
                s.stage,
                s.seconds,
                s.calls,
                s.bytes,
                s.operations,
                s.limit.unwrap_or("")
            );
        }
    }
    text
}
