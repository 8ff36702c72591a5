//! What a GPU will do with a model: its memory, who computes what it misses, decode and prefill.
//!
//! Ranges as in the rest of a plan: the upper end has everything overlapped and the routing of the published
//! curve, the lower end nothing overlapped and uniform routing. One round trip a layer is in both where
//! experts are missing.

use std::fmt::Write as _;

use flash_moe_engine::budget::gib;
use flash_moe_engine::gpu::{
    self, ChunkOf, DeviceLimits, GpuOptions, MissPlan, MissRates, Misses, SHARES, Stored,
    VideoBudget,
};
use flash_moe_engine::pool::Pool;
use flash_moe_engine::timing::Stage;
use serde::Serialize;

use super::estimate::{Case, Range, Rates};
use super::hit_rate::{skewed, uniform};
use super::prefill::{GpuRates, prefill};
use super::report::MemoryLine;
use super::subject::Subject;
use crate::bench::limits::{self, Effort};
use crate::bench::report::{ChunkLimits, GpuLimits};
use crate::bench::table::line;

/// A model on a GPU.
#[derive(Debug, Serialize)]
pub struct VideoPlan {
    /// Name of the GPU.
    pub device: String,
    /// What it can do.
    pub limits: GpuLimits,
    /// What it computes of a chunk.
    pub chunk: ChunkLimits,
    /// Video memory that may be used.
    pub limit_bytes: u64,
    /// All of it that is not experts.
    pub lines: Vec<MemoryLine>,
    /// Experts.
    pub slots_bytes: u64,
    /// Whether records are written there without memory for uploads in between.
    pub direct: bool,
    /// Whether they are expected to be read there from the disk, and never copied.
    pub in_place: bool,
    /// Experts of each layer that have a slot.
    pub slots: usize,
    /// Experts of each layer.
    pub experts: usize,
    /// Bytes of records that the processor computes, a second.
    pub compute_bytes_per_second: f64,
    /// Eighths of a layer's missing experts that it computes.
    pub computed_eighths: usize,
    /// Share of experts found in video memory.
    pub hit_rate: Range,
    /// Bytes of records that a token misses there, at the low and the high end of the hits.
    pub miss_bytes: Range,
    /// Bytes of these that are read from disk.
    pub disk_bytes: Range,
    /// Decoded tokens a second.
    pub decode: Range,
    /// Prompt tokens a second.
    pub prefill: Range,
}

impl VideoPlan {
    /// Of a model under a memory limit, for the GPU that was asked for.
    ///
    /// # Errors
    /// No such GPU; a plan above its memory, as a table; a measurement that failed.
    pub fn new(
        (subject, wanted): (&Subject, &GpuOptions),
        case: &Case,
        rates: Rates,
        effort: Effort,
    ) -> anyhow::Result<Self> {
        let options = &subject.options;
        // The embedding stays here unless it is the head as well.
        let embedding = subject.work.dense(Stage::Embed).bytes;
        let stays = if subject.shape.tied_head { 0 } else { embedding };
        let dense_bytes = subject.dense_bytes.saturating_sub(stays);
        let stored = Stored { dense_bytes, ..subject.stored() };
        let budget = gpu::plan(&stored, options, wanted)?;
        let pool = Pool::new(options.threads);
        let device = gpu::limits(wanted, &pool, effort.each)?;
        let compute = limits::expert_rate(&pool, options.isa, effort)?.min(rates.memory);
        let dense = subject.dense_precision;
        let of = ChunkOf { shape: &subject.shape, records: &subject.records, dense, options };
        let chunk = gpu::chunk_rates(&of, wanted, effort.each)?;
        let rates = GpuRates { device, chunk, compute, disk: rates.disk };
        Ok(Self::estimate(&budget, wanted.misses, case, rates))
    }

    fn estimate(budget: &VideoBudget, misses: Misses, case: &Case, measured: GpuRates) -> Self {
        let GpuRates { device, chunk, compute, disk } = measured;
        let upload = (!budget.direct).then_some(device.copy);
        let rates = MissRates { stage: device.stage, upload, compute };
        let slots = budget.slots_each * case.work.expert_layers();
        // One memory: nothing is copied on the device, and what is missing is read into its slot, as far as the
        // system lets a disk write there.
        let one_memory = budget.direct && budget.is_shared;
        let in_place = one_memory && case.slots() <= slots;
        let taken = |rate: f64, is_taken: bool| if is_taken { rate } else { f64::INFINITY };
        let (stage, copy) = (taken(device.stage, !in_place), taken(device.copy, !one_memory));
        let prompts = GpuRates { device: DeviceLimits { stage, copy, ..device }, ..measured };
        let computed_eighths = match misses {
            _ if budget.resident => 0,
            Misses::Auto if in_place => 0,
            Misses::Auto => rates.computed_eighths(),
            Misses::Upload => 0,
            Misses::Cpu => SHARES,
        };
        let here = budget.slots_each as f64 / budget.experts.max(1) as f64;
        let anywhere = here.max(case.residency());
        let hit_rate = Range { low: uniform(here), high: skewed(here) };
        let work = &case.work;
        let asked = (work.records_per_token() as u64 * work.record_bytes) as f64;
        let missed = |hits: f64| asked * (1.0 - hits);
        let miss_bytes = Range { low: missed(hit_rate.low), high: missed(hit_rate.high) };
        let disk_bytes = Range { low: missed(uniform(anywhere)), high: missed(skewed(anywhere)) };
        let trips = if budget.resident { 1 } else { work.expert_layers() + 1 };
        let trips = trips as f64 * device.round_trip;
        let part = computed_eighths as f64 / SHARES as f64;
        let seconds = |missed: f64, read: f64| {
            let touched = work.all_token_bytes(case.prompt) - part * missed;
            let (uploaded, computed) = ((1.0 - part) * missed, part * missed);
            let staging = uploaded / stage;
            let rest = [rates.upload.map_or(0.0, |rate| uploaded / rate), computed / rates.compute];
            ([touched / device.read, staging], rest, read / disk)
        };
        let ([device_low, staging], rest, read) = seconds(miss_bytes.low, disk_bytes.low);
        let low = trips + device_low + staging + rest[0] + rest[1] + read;
        let ([device_high, staging], rest, read) = seconds(miss_bytes.high, disk_bytes.high);
        let high = trips + device_high.max(staging + rest[0].max(rest[1])).max(read);
        let lines = budget.fixed.iter().map(|l| MemoryLine { name: l.name, bytes: l.bytes });
        Self {
            device: budget.adapter.clone(),
            limits: device.into(),
            chunk: chunk.into(),
            limit_bytes: budget.limit,
            lines: lines.collect(),
            slots_bytes: budget.slots_each as u64 * budget.slot_bytes,
            direct: budget.direct,
            in_place,
            slots: budget.slots_each,
            experts: budget.experts,
            compute_bytes_per_second: compute,
            computed_eighths,
            hit_rate,
            miss_bytes,
            disk_bytes,
            decode: Range { low: 1.0 / low, high: 1.0 / high },
            prefill: prefill(case, here, &prompts),
        }
    }

    /// The part of the page.
    pub fn render(&self, prompt: usize) -> String {
        let mut out = format!("\nvideo memory of {}\n", self.device);
        let mut row = |name: &str, bytes: u64| {
            writeln!(out, "  {name:<38}{:>12}", gib(bytes)).expect("writing to a string");
        };
        self.lines.iter().for_each(|l| row(l.name, l.bytes));
        row(&format!("experts, {} of {} a layer", self.slots, self.experts), self.slots_bytes);
        row("total", self.lines.iter().map(|l| l.bytes).sum::<u64>() + self.slots_bytes);
        row("limit", self.limit_bytes);
        out += &self.limits.line();
        out += &self.chunk.line();
        let misses = MissPlan {
            misses: Misses::Auto,
            computed_eighths: self.computed_eighths,
            rates: (!self.in_place).then_some(MissRates {
                stage: self.limits.stage_bytes_per_second,
                upload: (!self.direct).then_some(self.limits.copy_bytes_per_second),
                compute: self.compute_bytes_per_second,
            }),
        };
        if self.slots < self.experts {
            out += &line("misses", &misses.to_string());
        }
        let mut row = |name: &str, range: Range, shown: fn(f64) -> String| {
            let (low, high) = (shown(range.low), shown(range.high));
            writeln!(out, "{name:<40}{low:>14}{high:>14}").expect("writing to a string");
        };
        let mb = |bytes: f64| format!("{:.1}", bytes / 1e6);
        row("hits in video memory", self.hit_rate, |share| format!("{:.1} %", 100.0 * share));
        row("MB missed there for a token", self.miss_bytes, mb);
        row("MB of these read from disk", self.disk_bytes, mb);
        let name = format!("decode tok/s at position {prompt} on the GPU");
        row(&name, self.decode, |rate| format!("{rate:.2}"));
        let name = format!("prefill tok/s of {prompt} tokens on the GPU");
        row(&name, self.prefill, |rate| format!("{rate:.2}"));
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::prefill::tests::{RATES, RECORD, case};

    fn plan(slots_each: usize, misses: Misses) -> VideoPlan {
        VideoPlan::estimate(&budget(slots_each), misses, &case(512), RATES)
    }

    fn budget(slots_each: usize) -> VideoBudget {
        VideoBudget {
            adapter: "a GPU".into(),
            limit: 8 << 30,
            fixed: Vec::new(),
            slot_bytes: 40 * RECORD,
            slots_each,
            experts: 256,
            resident: slots_each == 256,
            direct: false,
            is_shared: false,
            buffer_bytes: 1 << 30,
        }
    }

    #[test]
    fn what_is_read_in_place_is_the_gpus_and_costs_no_copy() {
        let apart = VideoBudget { direct: true, ..budget(64) };
        let shared = VideoBudget { is_shared: true, ..apart.clone() };
        let all = case(512);
        // A pool of one token's experts.
        let limit_bytes = all.fixed_bytes + 320 * all.slot_bytes;
        let least = Case { limit_bytes, ..all.clone() };
        let plan = |budget, case| VideoPlan::estimate(budget, Misses::Auto, case, RATES);
        let [apart, copied, in_place] =
            [plan(&apart, &least), plan(&shared, &all), plan(&shared, &least)];
        assert_eq!((in_place.in_place, in_place.computed_eighths), (true, 0));
        assert!(!apart.in_place && !copied.in_place);
        assert!(in_place.decode.low > apart.decode.low);
        assert!(in_place.prefill.low > apart.prefill.low);
        assert!(in_place.render(512).contains("uploaded (--gpu-misses auto)"));
    }

    #[test]
    fn a_model_in_video_memory_is_limited_by_that_and_one_answer() {
        let plan = plan(256, Misses::Cpu);
        assert_eq!((plan.computed_eighths, plan.hit_rate.low), (0, 1.0));
        assert!((plan.decode.low / plan.decode.high - 1.0).abs() < 1e-9, "{:?}", plan.decode);
        assert!((300.0..700.0).contains(&plan.decode.high), "{:?}", plan.decode);
        assert_eq!(plan.prefill, prefill(&case(512), 1.0, &RATES));
    }

    #[test]
    fn what_is_missing_is_shared_out_and_costs_time() {
        let all = [Misses::Upload, Misses::Cpu, Misses::Auto].map(|misses| plan(64, misses));
        assert_eq!(all.each_ref().map(|p| p.computed_eighths), [0, 8, 4]);
        assert!(all[2].decode.high > all[0].decode.high && all[2].decode.high > all[1].decode.high);
        let asked = 320.0 * RECORD as f64;
        assert!((all[0].miss_bytes.low / (0.75 * asked) - 1.0).abs() < 1e-9);
        // All of them are in memory.
        assert_eq!(all[0].disk_bytes, Range { low: 0.0, high: 0.0 });
        assert!(all.iter().all(|p| p.decode.low < p.decode.high));
        let page = all[2].render(512);
        // A prompt is the device's own, whoever computes what a token misses.
        assert!(all.iter().all(|p| p.prefill == prefill(&case(512), 0.25, &RATES)));
        assert!(
            page.contains("on tensor cores") && page.contains("prefill tok/s of 512"),
            "{page}"
        );
        assert!(page.contains("64 of 256 a layer") && page.contains("computes 4 of 8"), "{page}");
        assert!(page.lines().all(|l| l.len() <= 100), "{page}");
    }
}
