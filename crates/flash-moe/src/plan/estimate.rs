//! Tokens a second from bytes, operations and the machine's limits: arithmetic, no measuring.
//!
//! Every figure is a range. Its upper end has everything overlapped and the routing of the published
//! curve, its lower end nothing overlapped and uniform routing. Both take the machine at its measured
//! limits, which no run keeps up throughout; the distance to the upper end is what there is to gain.

use flash_moe_engine::timing::Stage;
use serde::Serialize;

use super::hit_rate;
use crate::bench::work::Work;

/// What prefill keeps of the products' limit at the cautious end: two resident runs of 512 tokens kept
/// 0.57 and 0.70 (docs/measurements.md, 19).
const GEMM_SHARE: f64 = 0.5;

/// What the machine can do, a second.
#[derive(Clone, Copy, PartialEq, Debug, Serialize)]
pub struct Rates {
    /// Bytes of memory read.
    pub memory: f64,
    /// Floating-point operations of products in the cache.
    pub gemm: f64,
    /// Bytes of disk read.
    pub disk: f64,
}

/// A model under a memory limit.
#[derive(Clone, Debug)]
pub struct Case {
    /// What it has to touch and compute.
    pub work: Work,
    /// Bytes that are read for a record.
    pub slot_bytes: u64,
    /// Bytes of everything but the pool.
    pub fixed_bytes: u64,
    /// Memory limit.
    pub limit_bytes: u64,
    /// Prompt tokens computed together.
    pub chunk: usize,
    /// Prompt tokens; also the position at which decode is estimated.
    pub prompt: usize,
}

/// Two ends.
#[derive(Clone, Copy, PartialEq, Debug, Serialize)]
pub struct Range {
    /// The cautious end.
    pub low: f64,
    /// The hopeful end.
    pub high: f64,
}

/// What is to be expected.
#[derive(Clone, Copy, PartialEq, Debug, Serialize)]
pub struct Estimate {
    /// Share of experts found in memory: uniform routing, published curve.
    pub hit_rate: Range,
    /// Bytes touched in memory for a token.
    pub token_bytes: f64,
    /// Bytes read from disk for a token at the low and at the high end of the hit rate.
    pub miss_bytes: Range,
    /// Decoded tokens a second.
    pub decode: Range,
    /// Prompt tokens a second.
    pub prefill: Range,
}

impl Range {
    /// By how much a range lies above another: the geometric mean of both ends' ratios.
    pub fn over(self, other: Self) -> f64 {
        self.middle() / other.middle()
    }

    /// The geometric mean of both ends.
    pub fn middle(self) -> f64 {
        (self.low * self.high).sqrt()
    }
}

impl Case {
    /// Records in the model.
    pub fn records(&self) -> usize {
        self.work.expert_layers() * self.work.shape.moe.experts
    }

    /// Records that the limit holds.
    pub fn slots(&self) -> usize {
        let left = self.limit_bytes.saturating_sub(self.fixed_bytes);
        let fitting = left.checked_div(self.slot_bytes).unwrap_or(0) as usize;
        fitting.min(self.records())
    }

    /// Share of the records that the limit holds.
    pub fn residency(&self) -> f64 {
        self.slots() as f64 / self.records().max(1) as f64
    }

    /// What a machine will do with it.
    pub fn estimate(&self, rates: Rates) -> Estimate {
        let residency = self.residency();
        let hit_rate =
            Range { low: hit_rate::uniform(residency), high: hit_rate::skewed(residency) };
        let asked = (self.work.records_per_token() as u64 * self.slot_bytes) as f64;
        let miss_bytes =
            Range { low: asked * (1.0 - hit_rate.low), high: asked * (1.0 - hit_rate.high) };
        let token_bytes = self.work.all_token_bytes(self.prompt);
        let compute = token_bytes / rates.memory;
        let decode = Range {
            low: 1.0 / (compute + miss_bytes.low / rates.disk),
            high: 1.0 / compute.max(miss_bytes.high / rates.disk),
        };
        let prefill = self.prefill(rates);
        Estimate { hit_rate, token_bytes, miss_bytes, decode, prefill }
    }

    /// Tokens a second of the prompt, chunk by chunk.
    fn prefill(&self, rates: Rates) -> Range {
        let (mut low, mut high) = (0.0, 0.0);
        let mut from = 0;
        while from < self.prompt {
            let tokens = self.chunk.min(self.prompt - from);
            let (compute, disk) = self.chunk_seconds(rates, from, tokens);
            let cautious = Rates { gemm: GEMM_SHARE * rates.gemm, ..rates };
            low += self.chunk_seconds(cautious, from, tokens).0 + disk;
            high += compute.max(disk);
            from += tokens;
        }
        let tokens = self.prompt as f64;
        Range { low: tokens / low, high: tokens / high }
    }

    /// Computing and reading time of one chunk. Each record that the chunk needs is read once, from
    /// memory in any case and from disk if it is not in the pool.
    fn chunk_seconds(&self, rates: Rates, from: usize, tokens: usize) -> (f64, f64) {
        let moe = &self.work.shape.moe;
        let distinct = hit_rate::distinct(moe.experts, self.work.top_k, tokens);
        let records = distinct * self.work.expert_layers() as f64;
        let mut compute = 0.0;
        for stage in Stage::ALL {
            let bytes = match stage {
                Stage::Experts => records * self.work.record_bytes as f64,
                _ => self.work.token_bytes(stage, from + tokens),
            };
            let operations = self.work.operations(stage, from, tokens, 1);
            compute += (bytes / rates.memory).max(operations / rates.gemm);
        }
        let missed = records * (1.0 - self.residency());
        (compute, missed * self.slot_bytes as f64 / rates.disk)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::synth::models;
    use flash_moe_engine::shape::Shape;

    const RATES: Rates = Rates { memory: 20e9, gemm: 100e9, disk: 1e9 };

    fn case(limit_bytes: u64) -> Case {
        let shape = Shape::from_config(&models::config("qwen3.5-35b-a3b", None)).unwrap();
        let record = 3 * 2048 * 512 * 9 / 16;
        let work = Work::new(&shape, 8, record, |_, rows, cols| Ok((rows * cols * 9 / 16) as u64));
        Case {
            work: work.unwrap(),
            slot_bytes: record,
            fixed_bytes: 2 << 30,
            limit_bytes,
            chunk: 512,
            prompt: 512,
        }
    }

    #[test]
    fn everything_in_memory_is_limited_by_memory_alone() {
        let case = case(64 << 30);
        let e = case.estimate(RATES);
        assert_eq!((case.residency(), e.hit_rate), (1.0, Range { low: 1.0, high: 1.0 }));
        assert_eq!(e.miss_bytes, Range { low: 0.0, high: 0.0 });
        assert_eq!(e.decode.low, e.decode.high);
        assert!((e.decode.high * e.token_bytes / 20e9 - 1.0).abs() < 1e-12);
        assert!((e.prefill.low / e.prefill.high / GEMM_SHARE - 1.0).abs() < 0.05);
        // 2 * 3e9 operations a token at 100e9 a second.
        assert!((14.0..20.0).contains(&e.prefill.high), "{:?}", e.prefill);
    }

    #[test]
    fn misses_are_what_the_disk_must_bring() {
        let mut case = case((2 << 30) + 5120 * (3 * 2048 * 512 * 9 / 16));
        case.chunk = 64;
        assert_eq!((case.slots(), case.records(), case.residency()), (5120, 10_240, 0.5));
        let e = case.estimate(RATES);
        let asked = 320.0 * case.slot_bytes as f64;
        assert_eq!(e.hit_rate, Range { low: 0.5, high: 0.91 });
        assert!((e.miss_bytes.low / (0.5 * asked) - 1.0).abs() < 1e-12);
        let (compute, disk) = (e.token_bytes / 20e9, e.miss_bytes.low / 1e9);
        assert!((e.decode.low * (compute + disk) - 1.0).abs() < 1e-12);
        assert!((e.decode.high * compute.max(e.miss_bytes.high / 1e9) - 1.0).abs() < 1e-12);
        assert!(e.prefill.low < e.prefill.high);
        // Eight chunks read nearly everything eight times; one chunk reads it once.
        let whole = Case { chunk: 512, ..case.clone() }.estimate(RATES).prefill;
        assert!(whole.low > e.prefill.low && whole.high > e.prefill.high);
    }

    #[test]
    fn a_limit_below_the_fixed_part_holds_nothing() {
        assert_eq!(case(1 << 30).slots(), 0);
    }

    #[test]
    fn twice_the_range_is_twice_over() {
        let (one, two) = (Range { low: 1.0, high: 3.0 }, Range { low: 2.0, high: 6.0 });
        assert!((two.over(one) - 2.0).abs() < 1e-12);
    }
}
