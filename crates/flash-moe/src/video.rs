//! What a GPU had of experts, and what was done to feed it: a part of the `--json` object and of `--timing`.
//!
//! Counts are of records as the device has them; what was read from disk stands with the expert reads.

use flash_moe_engine::budget::gib;
use flash_moe_engine::gpu::{Gpu, GpuCounters, MissPlan, VideoBudget};
use serde::Serialize;

/// Experts and video memory of a run.
#[derive(Debug, Serialize)]
pub struct Video {
    /// Limit of the video memory.
    pub limit_bytes: u64,
    /// All of it that is not experts.
    pub fixed_bytes: u64,
    /// A slot in every layer with experts.
    pub slot_bytes: u64,
    /// Experts of each layer that have a slot.
    pub slots: usize,
    /// Whether records are written there without memory for uploads in between.
    pub direct: bool,
    /// What is done about the others.
    pub misses: Misses,
    /// The whole run.
    #[serde(flatten)]
    pub total: Fed,
    /// The prompt alone.
    pub prefill: Fed,
    /// The output alone.
    pub decode: Fed,
}

/// What is done about experts that video memory misses.
#[derive(Debug, Serialize)]
pub struct Misses {
    /// What was asked for: `auto`, `upload` or `cpu`.
    pub asked: &'static str,
    /// Eighths of a layer's missing experts that the processor computes.
    pub computed_eighths: usize,
    /// Bytes of records that are copied into memory the device copies from, a second.
    pub stage_bytes_per_second: Option<f64>,
    /// From there to video memory.
    pub upload_bytes_per_second: Option<f64>,
    /// Bytes of records that the processor computes, a second.
    pub compute_bytes_per_second: Option<f64>,
}

/// What was done to feed a GPU.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Fed {
    /// Records brought to video memory.
    pub uploads: u64,
    /// Of these, records that were read from the disk into their slots and never copied.
    pub read_in_place: u64,
    /// Bytes of all.
    pub upload_bytes: u64,
    /// Records of these that the processor had computed before.
    pub admitted: u64,
    /// Records that the processor computed.
    pub computed: u64,
    /// Time that it took.
    pub compute_ms: f64,
    /// How often memory for uploads was waited for.
    pub upload_waits: u64,
}

impl From<MissPlan> for Misses {
    fn from(plan: MissPlan) -> Self {
        Self {
            asked: plan.misses.name(),
            computed_eighths: plan.computed_eighths,
            stage_bytes_per_second: plan.rates.map(|rates| rates.stage),
            upload_bytes_per_second: plan.rates.and_then(|rates| rates.upload),
            compute_bytes_per_second: plan.rates.map(|rates| rates.compute),
        }
    }
}

impl From<GpuCounters> for Fed {
    fn from(counters: GpuCounters) -> Self {
        Self {
            uploads: counters.uploads,
            read_in_place: counters.read_in_place,
            upload_bytes: counters.upload_bytes,
            admitted: counters.admitted,
            computed: counters.computed,
            compute_ms: counters.compute_ns as f64 / 1e6,
            upload_waits: counters.waits,
        }
    }
}

impl Video {
    /// Of a run whose prompt left the counters so.
    pub fn new(gpu: &Gpu, prefill: GpuCounters) -> Self {
        let (plan, end): (&VideoBudget, _) = (gpu.budget(), gpu.counters());
        Self {
            limit_bytes: plan.limit,
            fixed_bytes: plan.fixed_bytes(),
            slot_bytes: plan.slot_bytes,
            slots: plan.slots_each,
            direct: plan.direct,
            misses: gpu.misses().into(),
            total: end.into(),
            prefill: prefill.into(),
            decode: end.since(&prefill).into(),
        }
    }

    /// What it has of a layer's experts and what is done about the others, in words.
    pub fn about(&self, experts: usize) -> String {
        let slots =
            format!("{} of {experts} experts a layer in {}", self.slots, gib(self.limit_bytes));
        match self.slots == experts {
            true => slots,
            false => format!(
                "{slots}; of those that are missing the processor computes {} of 8 (--gpu-misses {})",
                self.misses.computed_eighths, self.misses.asked
            ),
        }
    }

    /// What was done for each of so many decoded tokens, in a line.
    pub fn line(&self, decoded: usize) -> String {
        let each = |count: u64| count as f64 / decoded.max(1) as f64;
        let d = &self.decode;
        let in_place = match d.read_in_place {
            0 => String::new(),
            _ => format!("{:.1} of them read in place, ", each(d.read_in_place)),
        };
        format!(
            "{:<11}{:.1} experts a token uploaded ({}), {in_place}{:.1} computed by the processor in \
             {:.3} ms, {} waits for memory for uploads",
            "to the GPU",
            each(d.uploads),
            gib(each(d.upload_bytes) as u64),
            each(d.computed),
            d.compute_ms / decoded.max(1) as f64,
            d.upload_waits
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_s_share_of_the_uploads_is_told() {
        let prefill =
            GpuCounters { uploads: 100, upload_bytes: 100 << 20, ..GpuCounters::default() };
        let end = GpuCounters {
            uploads: 120,
            upload_bytes: 120 << 20,
            computed: 30,
            compute_ns: 5_000_000,
            waits: 1,
            ..prefill
        };
        let misses = MissPlan {
            misses: flash_moe_engine::gpu::Misses::Cpu,
            computed_eighths: 8,
            rates: None,
        };
        let video = Video {
            limit_bytes: 2,
            fixed_bytes: 1,
            slot_bytes: 1,
            slots: 1,
            direct: false,
            misses: misses.into(),
            total: end.into(),
            prefill: prefill.into(),
            decode: end.since(&prefill).into(),
        };
        assert_eq!(
            video.line(10),
            "to the GPU 2.0 experts a token uploaded (2.0 MiB), 3.0 computed by the processor in 0.500 ms, \
             1 waits for memory for uploads"
        );
        let object = serde_json::to_value(&video).unwrap();
        let decode = Fed { read_in_place: 15, ..video.decode };
        let line = Video { decode, ..video }.line(10);
        assert!(
            line.contains("uploaded (2.0 MiB), 1.5 of them read in place, 3.0 computed"),
            "{line}"
        );
        assert_eq!((&object["uploads"], &object["decode"]["computed"]), (&120.into(), &30.into()));
        assert_eq!(object["misses"]["asked"], "cpu");
    }
}
