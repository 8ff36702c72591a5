//! `flash-moe plan`: what this machine will do with a model, before it is loaded or downloaded.
//!
//! Measures the machine, takes the model's dimensions, and computes. What does not fit into memory
//! is told together with what would fit. Everything is an estimate and says so.

mod estimate;
mod hit_rate;
mod prefill;
mod report;
mod subject;
mod video;

use anyhow::Result;
use flash_moe_engine::budget::Budget;
use flash_moe_engine::engine::Options;
use flash_moe_engine::pool::Pool;

use crate::bench::limits::{Effort, GemmProbe, MemoryProbe};
use crate::bench::machine_of;
use crate::bench::report::Limits;
use crate::options::bench::PlanArgs;
use crate::say;
use estimate::{Case, Estimate, Rates};
use report::{Change, Chunk, Memory, Report, Way};
use subject::Subject;
use video::VideoPlan;

/// Chunks that are compared.
const CHUNKS: [usize; 5] = [256, 512, 1024, 2048, 4096];

/// Runs the command.
///
/// # Errors
/// What the flags or the container have to say; a disk that cannot be measured.
pub fn run(args: &PlanArgs) -> Result<()> {
    let subject = Subject::new(args)?;
    let mut budget = Budget::sized(&subject.demand(), &subject.options)?;
    let prompt = args.prompt.min(budget.context);
    let ways = if budget.fits() { Vec::new() } else { ways_to_fit(&subject, &budget)? };
    let memory = Memory::new(&budget);
    let (limits, rates) = measure(args, &subject, budget.limit)?;
    if !budget.fits() {
        // The rest is told for the smallest limit that would run.
        let smallest = Options { memory_bytes: Some(budget.smallest()), ..subject.options.clone() };
        budget = Budget::sized(&subject.demand(), &smallest)?;
    }
    let case = Case {
        work: subject.work.clone(),
        slot_bytes: subject.slot_bytes,
        fixed_bytes: budget.fixed_bytes(),
        limit_bytes: budget.limit,
        chunk: subject.options.prefill_chunk,
        prompt,
    };
    let wanted = subject.options.gpu.as_ref();
    let effort = Effort::new(args.quick);
    let video = wanted.map(|wanted| VideoPlan::new((&subject, wanted), &case, rates, effort));
    let video_memory = video.transpose()?;
    // What else is told of changes and chunks is the processor's.
    let (changes, chunks) = match video_memory {
        Some(_) => (Vec::new(), Vec::new()),
        None => (changes(&case, rates), chunks(&subject, &case, budget.context, rates)?),
    };
    let report = Report {
        estimate: true,
        model: subject.name.clone(),
        disk_bytes: subject.disk_bytes(),
        machine: machine_of(&subject.options),
        limits,
        memory,
        ways_to_fit: ways,
        planned_limit_bytes: budget.limit,
        residency: case.residency(),
        context: budget.context,
        prompt,
        expected: case.estimate(rates),
        video_memory,
        changes,
        chunks,
    };
    match args.json {
        true => say::line(&serde_json::to_string_pretty(&report)?),
        false => say::text(&report.render()),
    }
}

fn measure(args: &PlanArgs, subject: &Subject, memory_limit: u64) -> Result<(Limits, Rates)> {
    let effort = Effort::new(args.quick);
    let pool = Pool::new(subject.options.threads);
    let words = MemoryProbe::new(&pool, MemoryProbe::bytes(memory_limit));
    let memory = words.measure(&pool, effort.each)?;
    drop(words);
    let products = GemmProbe::new(subject.options.isa, subject.options.arithmetic)?;
    let gemm = products.measure(&pool, effort.each);
    let (mut disk, _scratch) = subject.disk(args)?;
    let sweep = disk.sweep(effort)?;
    let best = Limits::best_disk(&sweep).map_or(f64::INFINITY, |(rate, _)| rate);
    let rates = Rates { memory: memory.bytes_per_second, gemm: gemm.flops_per_second, disk: best };
    Ok((Limits::new(memory, gemm, &sweep, disk.is_direct()), rates))
}

/// Limits and contexts that would run, where the one asked for does not.
fn ways_to_fit(subject: &Subject, budget: &Budget) -> Result<Vec<Way>> {
    let mut ways = vec![Way::of(budget)];
    let with = |context: usize| {
        let options = Options { context: Some(context), ..subject.options.clone() };
        Budget::sized(&subject.demand(), &options)
    };
    let mut context = budget.context / 2;
    while context >= 512 {
        let smaller = with(context)?;
        let fits = smaller.fits();
        if fits || context < 1024 {
            ways.push(Way::of(&smaller));
        }
        if fits {
            break;
        }
        context /= 2;
    }
    Ok(ways)
}

/// Prefill of a prompt that fills the context, with every chunk that the limit allows. A larger chunk
/// reads each expert less often and multiplies it by more tokens, and takes memory from the pool.
fn chunks(subject: &Subject, case: &Case, context: usize, rates: Rates) -> Result<Vec<Chunk>> {
    let mut out = Vec::new();
    for chunk in CHUNKS.into_iter().filter(|chunk| *chunk <= context) {
        let options = Options {
            prefill_chunk: chunk,
            memory_bytes: Some(case.limit_bytes),
            context: Some(context),
            ..subject.options.clone()
        };
        let budget = Budget::sized(&subject.demand(), &options)?;
        if budget.fits() {
            let fixed_bytes = budget.fixed_bytes();
            let case = Case { fixed_bytes, chunk, prompt: context, ..case.clone() };
            out.push(Chunk { chunk, fixed_bytes, prefill: case.estimate(rates).prefill });
        }
    }
    Ok(out)
}

/// The estimate again with twice of each thing that money buys.
fn changes(case: &Case, rates: Rates) -> Vec<Change> {
    let now = case.estimate(rates);
    let change = |what, expected: Estimate| Change {
        what,
        decode_factor: expected.decode.over(now.decode),
        prefill_factor: expected.prefill.over(now.prefill),
        expected,
    };
    let roomier = Case { limit_bytes: case.limit_bytes.saturating_mul(2), ..case.clone() };
    let threads = Rates { memory: 2.0 * rates.memory, gemm: 2.0 * rates.gemm, ..rates };
    vec![
        change("memory", roomier.estimate(rates)),
        change("disk", case.estimate(Rates { disk: 2.0 * rates.disk, ..rates })),
        change("threads", case.estimate(threads)),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::work::Work;
    use crate::synth::models;
    use flash_moe_engine::shape::Shape;

    fn case(limit_bytes: u64) -> Case {
        let shape = Shape::from_config(&models::config("qwen3.5-35b-a3b", None)).unwrap();
        let work = Work::new(&shape, 8, 1 << 20, |_, rows, cols| Ok((rows * cols / 2) as u64));
        let work = work.unwrap();
        let (slot_bytes, fixed_bytes) = (1 << 20, 1 << 30);
        Case { work, slot_bytes, fixed_bytes, limit_bytes, chunk: 512, prompt: 512 }
    }

    #[test]
    fn a_model_in_memory_gains_from_threads_alone() {
        let rates = Rates { memory: 20e9, gemm: 100e9, disk: 1e9 };
        let list = changes(&case(64 << 30), rates);
        let factors: Vec<(&str, f64)> = list.iter().map(|c| (c.what, c.decode_factor)).collect();
        assert_eq!(factors, [("memory", 1.0), ("disk", 1.0), ("threads", 2.0)]);
        assert!((list[2].prefill_factor - 2.0).abs() < 1e-9);
    }

    #[test]
    fn a_model_on_a_slow_disk_gains_from_the_disk_and_not_from_threads() {
        let rates = Rates { memory: 20e9, gemm: 100e9, disk: 1e7 };
        let list = changes(&case(3 << 30), rates);
        assert!(list[1].decode_factor > 1.95, "{list:?}");
        assert!(list[2].decode_factor < 1.05, "{list:?}");
        assert!(list[0].decode_factor > 1.1, "{list:?}");
    }
}
