//! Tokens a second of a prompt on a GPU, chunk by chunk: arithmetic, no measuring.
//!
//! The lower end does one thing after the other, the upper end lets the device work while records are read
//! and copied; the device itself takes in records and computes by turns, since there is one queue. Neither
//! end counts norms, the choice of experts or what the driver takes for a kernel.

use flash_moe_engine::gpu::{ChunkRates, DeviceLimits};
use flash_moe_engine::timing::Stage;

use super::estimate::{Case, Range};
use super::hit_rate::{distinct, uniform};

/// What a GPU, and what feeds it, can do.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct GpuRates {
    /// The device and the way to it.
    pub device: DeviceLimits,
    /// What it computes of a chunk.
    pub chunk: ChunkRates,
    /// Bytes of records that the processor computes, a second.
    pub compute: f64,
    /// Bytes of disk read, a second.
    pub disk: f64,
}

/// Tokens a second, where this share of the experts has a slot in video memory.
pub fn prefill(case: &Case, here: f64, rates: &GpuRates) -> Range {
    let (mut low, mut high) = (0.0, 0.0);
    let mut from = 0;
    while from < case.prompt {
        let tokens = rates.chunk.tokens.min(case.prompt - from);
        let (one, all) = chunk_seconds(case, here, rates, from..from + tokens);
        (low, high) = (low + one, high + all);
        from += tokens;
    }
    // The logits of the last token.
    let logits = case.work.dense(Stage::Logits).bytes as f64 / rates.device.read;
    let tokens = case.prompt as f64;
    Range { low: tokens / (low + logits), high: tokens / (high + logits) }
}

/// Seconds of the tokens at some positions: one thing after the other, and as much as can be at once.
fn chunk_seconds(
    case: &Case,
    here: f64,
    rates: &GpuRates,
    positions: std::ops::Range<usize>,
) -> (f64, f64) {
    let (work, device) = (&case.work, &rates.device);
    let (mut apart, mut together) = (0.0, 0.0);
    for stage in Stage::ALL {
        let [computing, reading] = stage_seconds(case, rates, stage, &positions);
        apart += computing + reading;
        together += f64::max(computing, reading);
    }
    let layers = work.expert_layers() as f64;
    let asked = layers * distinct(work.shape.moe.experts, work.top_k, positions.len());
    let bytes = |held: f64| asked * work.record_bytes as f64 * (1.0 - uniform(held));
    let uploaded = bytes(here);
    let (staging, copying) = (uploaded / device.stage, uploaded / device.copy);
    let disk = bytes(here.max(case.residency())) / rates.disk;
    // The choice comes back once a layer, the rows at the end.
    let trips = (layers + 1.0) * device.round_trip;
    (
        trips + apart + staging + copying + disk,
        trips + f64::max(together + copying, f64::max(staging, disk)),
    )
}

/// Seconds of computing a stage, and of reading what it touches of video memory. Experts were timed
/// together with the reading of their weights.
fn stage_seconds(
    case: &Case,
    rates: &GpuRates,
    stage: Stage,
    positions: &std::ops::Range<usize>,
) -> [f64; 2] {
    let (work, tokens) = (&case.work, positions.len());
    let all = work.operations(stage, positions.start, tokens, 0);
    match stage {
        Stage::Embed | Stage::Fetch | Stage::Logits => [0.0; 2],
        Stage::Experts => [all / rates.chunk.experts, 0.0],
        _ => {
            let dense = 2.0 * work.dense(stage).weights as f64 * tokens as f64;
            // Scores and mixes, and the delta rule, are f32 without tensor cores.
            let rest = (all - dense) / rates.chunk.attention;
            let bytes = work.token_bytes(stage, positions.end);
            [dense / rates.chunk.dense + rest, bytes / rates.device.read]
        }
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use crate::bench::work::Work;
    use crate::synth::models;
    use flash_moe_engine::shape::Shape;

    /// Bytes of a record.
    pub const RECORD: u64 = 3 * 2048 * 512 * 9 / 16;

    /// A GPU, and what feeds it.
    pub const RATES: GpuRates = GpuRates {
        device: DeviceLimits {
            read_bytes: 1,
            read: 1e12,
            stage: 40e9,
            copy: 10e9,
            upload: 9e9,
            round_trip: 50e-6,
        },
        chunk: ChunkRates {
            tokens: 512,
            tensor_cores: true,
            dense: 40e12,
            experts: 10e12,
            attention: 5e12,
        },
        compute: 10e9,
        disk: 1e9,
    };

    /// A model of 35B in memory.
    pub fn case(prompt: usize) -> Case {
        let shape = Shape::from_config(&models::config("qwen3.5-35b-a3b", None)).unwrap();
        let work = Work::new(&shape, 8, RECORD, |_, rows, cols| Ok((rows * cols * 9 / 16) as u64));
        Case {
            work: work.unwrap(),
            slot_bytes: RECORD,
            fixed_bytes: 1 << 30,
            limit_bytes: 64 << 30,
            chunk: 512,
            prompt,
        }
    }

    /// The least seconds of a prompt's products, with the other rates beyond all measure.
    fn seconds(case: &Case, change: impl Fn(&mut GpuRates)) -> [f64; 2] {
        let mut rates = RATES;
        let d = &mut rates.device;
        (d.read, d.stage, d.copy, d.round_trip) = (1e30, 1e30, 1e30, 0.0);
        (rates.chunk.dense, rates.chunk.experts, rates.chunk.attention) = (1e30, 1e30, 1e30);
        rates.disk = 1e30;
        change(&mut rates);
        let range = prefill(case, 0.25, &rates);
        [range.low, range.high].map(|rate| case.prompt as f64 / rate)
    }

    fn assert_near(got: [f64; 2], want: f64) {
        for got in got {
            assert!((got / want - 1.0).abs() < 1e-9, "{got}, expected {want}");
        }
    }

    #[test]
    fn each_rate_takes_what_is_its_own() {
        let case = case(1000);
        let work = &case.work;
        let stages = [Stage::Attention, Stage::DeltaNet, Stage::Route, Stage::Shared];
        let dense: u64 = stages.into_iter().map(|stage| work.dense(stage).weights).sum();
        let dense = 2.0 * dense as f64 * 1000.0;
        assert_near(seconds(&case, |rates| rates.chunk.dense = 1e12), dense / 1e12);
        let experts = 2.0 * (40 * 8 * 3 * 2048 * 512) as f64 * 1000.0;
        assert_near(seconds(&case, |rates| rates.chunk.experts = 1e12), experts / 1e12);
        // Ten layers' scores and mixes of 16 heads over 1 to 1,000 positions, thirty layers' states.
        let mixes = 10.0 * (4 * 16 * 256) as f64 * 500.5 * 1000.0;
        let states = 7.0 * (30 * 32 * 128 * 128) as f64 * 1000.0;
        let rest = (mixes + states) / 1e12;
        assert_near(seconds(&case, |rates| rates.chunk.attention = 1e12), rest);
        // Two chunks ask for nearly all experts twice, of which three quarters have no slot.
        let records = 40.0 * (distinct(256, 8, 512) + distinct(256, 8, 488)) * 0.75;
        let uploads = records * RECORD as f64 / 1e10;
        assert_near(seconds(&case, |rates| rates.device.copy = 1e10), uploads);
        assert_near(seconds(&case, |rates| rates.device.stage = 1e10), uploads);
        // All of them are in memory.
        assert!(seconds(&case, |rates| rates.disk = 1.0).iter().all(|s| *s < 1e-9));
        assert_near(seconds(&case, |rates| rates.device.round_trip = 1e-3), 2.0 * 41.0 * 1e-3);
    }

    #[test]
    fn what_memory_does_not_hold_comes_from_disk_once_a_chunk() {
        let mut case = case(512);
        // Half of the records.
        case.limit_bytes = case.fixed_bytes + 5120 * RECORD;
        let read = 40.0 * distinct(256, 8, 512) * 0.5 * RECORD as f64;
        assert_near(seconds(&case, |rates| rates.disk = 1e9), read / 1e9);
    }

    #[test]
    fn the_upper_end_has_the_longest_of_what_can_be_at_once() {
        let case = case(512);
        let own = |rates: &mut GpuRates| rates.chunk.experts = 1e13;
        let [compute, _] = seconds(&case, own);
        let staged = |rates: &mut GpuRates| rates.device.stage = 1e10;
        let [staging, _] = seconds(&case, staged);
        let both = seconds(&case, |rates| {
            own(rates);
            staged(rates);
        });
        assert!((both[0] / (compute + staging) - 1.0).abs() < 1e-9, "{both:?}");
        assert!((both[1] / compute.max(staging) - 1.0).abs() < 1e-9, "{both:?}");
        // One queue: what is copied there is not computed meanwhile.
        let copied = seconds(&case, |rates| {
            own(rates);
            rates.device.copy = 1e10;
        });
        assert_near(copied, compute + staging);
    }

    #[test]
    fn slots_for_all_leave_nothing_to_upload() {
        let case = case(512);
        let slow = DeviceLimits { stage: 1.0, copy: 1.0, ..RATES.device };
        let rates = GpuRates { device: slow, disk: 1.0, ..RATES };
        let range = prefill(&case, 1.0, &rates);
        assert_eq!(range, prefill(&case, 1.0, &RATES));
        // 2 * 3e9 operations a token at 10e12 to 40e12 a second.
        assert!((1000.0..6000.0).contains(&range.low) && range.low < range.high, "{range:?}");
    }
}
