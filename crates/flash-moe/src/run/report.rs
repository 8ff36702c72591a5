//! What a run took: the summary line, the `--timing` table and the `--json` object.
//!
//! The fields of [`Report`] are the names in the JSON object; units come last in each name. A part
//! of a run is its prefill or its decode, told apart everywhere.

use std::fmt::Write as _;
use std::time::Duration;

use flash_moe_engine::budget::gib;
use flash_moe_engine::sampler::Sampling;
use flash_moe_engine::store::StoreCounters;
use flash_moe_engine::timing::{Stage, Timing};
use serde::Serialize;
use serde_json::{Map, Value, json};

use super::generate::Finish;
use crate::read_ahead::ReadAhead;
use crate::video::Video;

/// One finished run.
#[derive(Debug, Serialize)]
pub struct Report {
    /// Name of the model, from its manifest.
    pub model: String,
    /// Tokens of the state that was loaded before the prompt; 0 without.
    pub state_tokens: usize,
    /// Ids of the prompt.
    pub prompt_tokens: Vec<u32>,
    /// Ids of the output, without the end-of-text token.
    pub generated_tokens: Vec<u32>,
    /// Why the output ended: `stop`, `length` or `interrupted`.
    pub finish_reason: Finish,
    /// The answer, without thinking and stop text.
    pub text: String,
    /// The thinking; empty if there was none.
    pub thinking: String,
    /// Wall times.
    pub timings: Timings,
    /// Prompt tokens a second.
    pub prefill_tokens_per_second: Option<f64>,
    /// Generated tokens a second, the first one and its prefill left out.
    pub decode_tokens_per_second: Option<f64>,
    /// Expert reads in all, and apart for prefill and decode.
    pub counters: Counters,
    /// Experts and video memory, where a GPU computed.
    pub video_memory: Option<Video>,
    /// The most memory the process had, where the system says.
    pub peak_memory_bytes: Option<u64>,
    /// Time and bytes by stage, for prefill and decode.
    pub stages: Value,
    /// What the run was set to.
    pub settings: Settings,
    /// What made the output differ from the model's own, in words.
    pub lossy: Vec<String>,
}

/// Wall times in milliseconds.
#[derive(Debug, Serialize)]
pub struct Timings {
    /// From the start of the command to a model that is ready.
    pub load_ms: f64,
    /// The prompt.
    pub prefill_ms: f64,
    /// From a model that is ready to the first token.
    pub ttft_ms: f64,
    /// From the first token to the last.
    pub decode_ms: f64,
}

/// Expert reads.
#[derive(Debug, Serialize)]
pub struct Counters {
    /// The whole run.
    #[serde(flatten)]
    pub total: Reads,
    /// The prompt alone.
    pub prefill: Reads,
    /// The output alone.
    pub decode: Reads,
    /// Bytes read for each decoded token, for whatever reason.
    pub decode_read_bytes_per_token: Option<f64>,
    /// Bytes of those that the token had asked for.
    pub decode_demanded_bytes_per_token: Option<f64>,
}

/// Expert reads of one part of a run.
#[derive(Debug, Serialize)]
pub struct Reads {
    /// Experts found in the cache.
    pub hits: u64,
    /// Experts read from disk.
    pub misses: u64,
    /// Hits over both; 0 without any.
    pub hit_rate: f64,
    /// Bytes read from disk, for whatever reason.
    pub read_bytes: u64,
    /// Bytes read because a token asked for them: those of the misses.
    pub demanded_bytes: u64,
    /// Read by `--lookahead`.
    pub lookahead: ReadAhead,
    /// Read of a `--hot-set`.
    pub hot_set: ReadAhead,
    /// Time that compute waited for reads.
    pub wait_ms: f64,
}

/// What a run was set to.
#[derive(Debug, Serialize)]
pub struct Settings {
    /// Choice of tokens.
    pub sampling: Value,
    /// What computed: `cpu`, or the name of a GPU.
    pub device: String,
    /// Experts of each layer that video memory holds, where a GPU computed.
    pub experts_in_video_memory: Option<usize>,
    /// Compute threads.
    pub threads: usize,
    /// Instruction set of the kernels.
    pub isa: &'static str,
    /// Precision of the activations.
    pub activations: &'static str,
    /// How keys and values were kept.
    pub kv_cache: String,
    /// How experts were read: `direct` or `buffered`.
    pub io: &'static str,
    /// What decided that.
    pub io_why: String,
    /// Expert reads in flight.
    pub readers: usize,
    /// How the next layer's experts were guessed.
    pub lookahead: &'static str,
    /// Where the hot set is kept, if it is.
    pub hot_set: Option<String>,
    /// Who made them: `uring` or `threads`.
    pub reader: &'static str,
    /// Memory limit of the process.
    pub memory_bytes: u64,
    /// Experts that the cache holds.
    pub cached_experts: usize,
    /// Tokens of context.
    pub context: usize,
    /// Prompt tokens computed together.
    pub prefill_chunk: usize,
    /// Experts for each token.
    pub experts_per_token: usize,
    /// Most tokens to generate.
    pub max_tokens: usize,
    /// Tokens after which thinking is ended; 0: never.
    pub think_budget: usize,
}

impl From<StoreCounters> for Reads {
    fn from(c: StoreCounters) -> Self {
        Self {
            hits: c.hits,
            misses: c.misses,
            hit_rate: c.hit_rate(),
            read_bytes: c.read_bytes,
            demanded_bytes: c.demanded_bytes(),
            lookahead: c.guessed.into(),
            hot_set: c.preloaded.into(),
            wait_ms: c.wait_ns as f64 / 1e6,
        }
    }
}

impl Counters {
    /// From the store's counters after the prompt and at the end, with the tokens decoded between.
    pub fn new(prefill: StoreCounters, end: StoreCounters, decoded: usize) -> Self {
        let decode = end.since(&prefill);
        let per_token = |bytes: u64| (decoded > 0).then(|| bytes as f64 / decoded as f64);
        Self {
            total: end.into(),
            prefill: prefill.into(),
            decode: decode.into(),
            decode_read_bytes_per_token: per_token(decode.read_bytes),
            decode_demanded_bytes_per_token: per_token(decode.demanded_bytes()),
        }
    }
}

impl Report {
    /// The summary in one line.
    pub fn summary(&self) -> String {
        let speed =
            |rate: Option<f64>| rate.map_or_else(String::new, |r| format!(" at {r:.1} tok/s"));
        let mut line = format!(
            "{}prompt {} tokens{}, first token after {:.2} s; generated {} tokens{}",
            match self.state_tokens {
                0 => String::new(),
                tokens => format!("state of {tokens} tokens, "),
            },
            self.prompt_tokens.len(),
            speed(self.prefill_tokens_per_second),
            self.timings.ttft_ms / 1e3,
            self.generated_tokens.len(),
            speed(self.decode_tokens_per_second),
        );
        if self.finish_reason == Finish::Interrupted {
            line += ", interrupted";
        }
        if let Some(bytes) = self.counters.decode_demanded_bytes_per_token {
            let percent = self.counters.decode.hit_rate * 100.0;
            line += &format!("; expert hits {percent:.1} %, {} read a token", gib(bytes as u64));
        }
        line += &self.read_ahead();
        if self.settings.sampling["greedy"] == false {
            line += &format!("; seed {}", self.settings.sampling["seed"]);
        }
        if let Some(bytes) = self.peak_memory_bytes {
            line += &format!("; peak memory {}", gib(bytes));
        }
        line
    }

    /// What lookahead and the hot set brought, where they are on.
    fn read_ahead(&self) -> String {
        let total = &self.counters.total;
        let said = |name: &str, ahead: &ReadAhead| {
            let (useful, wasted, bytes) = (ahead.useful, ahead.wasted, gib(ahead.wasted_bytes));
            format!("; {name} {useful} useful, {wasted} wasted ({bytes})")
        };
        let guessed =
            (self.settings.lookahead != "off").then(|| said("lookahead", &total.lookahead));
        let kept = (total.hot_set.reads > 0).then(|| said("hot set", &total.hot_set));
        guessed.into_iter().chain(kept).collect()
    }
}

/// The settings of a sampler by their flags' names.
pub fn sampling(s: &Sampling) -> Value {
    json!({
        "greedy": s.is_greedy(),
        "temperature": decimal(s.temperature),
        "top_k": s.top_k,
        "top_p": decimal(s.top_p),
        "min_p": decimal(s.min_p),
        "repetition_penalty": decimal(s.repetition_penalty),
        "presence_penalty": decimal(s.presence_penalty),
        "frequency_penalty": decimal(s.frequency_penalty),
        "seed": s.seed,
    })
}

/// The number as it was typed: 0.7, not the 0.699999988 that a wider type makes of it.
fn decimal(number: f32) -> f64 {
    number.to_string().parse().unwrap_or(number.into())
}

/// Time, bytes and calls of every stage that ran.
pub fn stages(timing: &Timing) -> Value {
    let ran = Stage::ALL.into_iter().filter(|&stage| timing.stage(stage).calls > 0);
    let entries: Map<String, Value> = ran
        .map(|stage| {
            let total = timing.stage(stage);
            let entry =
                json!({ "ms": total.ns as f64 / 1e6, "bytes": total.bytes, "calls": total.calls });
            (stage.name().to_string(), entry)
        })
        .collect();
    Value::Object(entries)
}

/// The `--timing` table of one part of a run over `tokens`.
pub fn timing_table(part: &str, timing: &Timing, tokens: usize) -> String {
    let total_ns: u64 = Stage::ALL.iter().map(|&stage| timing.stage(stage).ns).sum();
    let mut table = format!(
        "{part:<10}{:>8}{:>12}{:>8}{:>14}{:>10}\n",
        "calls", "ms/token", "share", "bytes/token", "GB/s"
    );
    let tokens = tokens.max(1) as f64;
    for stage in Stage::ALL {
        let t = timing.stage(stage);
        if t.calls == 0 {
            continue;
        }
        let ms = t.ns as f64 / 1e6 / tokens;
        let share = 100.0 * t.ns as f64 / total_ns.max(1) as f64;
        let bytes = gib((t.bytes as f64 / tokens) as u64);
        let speed = t.bytes as f64 / t.ns.max(1) as f64;
        writeln!(
            table,
            "{:<10}{:>8}{ms:>12.3}{share:>7.1}%{bytes:>14}{speed:>10.2}",
            stage.name(),
            t.calls
        )
        .expect("writing to a string does not fail");
    }
    let total = total_ns as f64 / 1e6 / tokens;
    table + &format!("{:<10}{:>8}{total:>12.3}", "total", "")
}

/// Milliseconds of a duration.
pub fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

/// `count` a second, or `None` without a count or a time.
pub fn rate(count: usize, duration: Duration) -> Option<f64> {
    let seconds = duration.as_secs_f64();
    (count > 0 && seconds > 0.0).then(|| count as f64 / seconds)
}

/// The most memory this process had, in bytes: Linux's `VmHWM`; unknown elsewhere.
pub fn peak_memory() -> Option<u64> {
    memory_field("VmHWM:")
}

/// The memory this process has, in bytes: Linux's `VmRSS`; unknown elsewhere.
pub fn current_memory() -> Option<u64> {
    memory_field("VmRSS:")
}

fn memory_field(name: &str) -> Option<u64> {
    if !cfg!(target_os = "linux") {
        return None;
    }
    field(&std::fs::read_to_string("/proc/self/status").ok()?, name)
}

fn field(status: &str, name: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix(name))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;
    use flash_moe_engine::store::Ahead;

    fn report() -> Report {
        let prefill = StoreCounters {
            hits: 1,
            misses: 3,
            read_bytes: 3 << 20,
            wait_ns: 1_500_000,
            ..StoreCounters::default()
        };
        let guessed = Ahead { reads: 5, read_bytes: 5 << 20, useful: 2, useful_bytes: 2 << 20 };
        let end = StoreCounters {
            hits: 10,
            misses: 6,
            read_bytes: 11 << 20,
            wait_ns: 2_000_000,
            guessed,
            ..StoreCounters::default()
        };
        Report {
            model: "m".into(),
            state_tokens: 0,
            prompt_tokens: vec![1, 2],
            generated_tokens: vec![3, 4, 5],
            finish_reason: Finish::Stop,
            text: "t".into(),
            thinking: String::new(),
            timings: Timings { load_ms: 1.0, prefill_ms: 2.0, ttft_ms: 30.0, decode_ms: 4.0 },
            prefill_tokens_per_second: rate(2, Duration::from_millis(20)),
            decode_tokens_per_second: rate(2, Duration::from_millis(40)),
            counters: Counters::new(prefill, end, 2),
            video_memory: None,
            peak_memory_bytes: Some(70 << 20),
            stages: Value::Null,
            settings: Settings {
                device: "cpu".into(),
                experts_in_video_memory: None,
                sampling: sampling(&Sampling::greedy()),
                threads: 2,
                isa: "scalar",
                activations: "f32",
                kv_cache: "f32".into(),
                io: "direct",
                io_why: "asked for".into(),
                readers: 8,
                lookahead: "router",
                hot_set: None,
                reader: "threads",
                memory_bytes: 1,
                cached_experts: 1,
                context: 512,
                prefill_chunk: 512,
                experts_per_token: 4,
                max_tokens: 3,
                think_budget: 0,
            },
            lossy: Vec::new(),
        }
    }

    #[test]
    fn the_summary_is_one_line_of_decode_and_prefill() {
        assert_eq!(
            report().summary(),
            "prompt 2 tokens at 100.0 tok/s, first token after 0.03 s; generated 3 tokens at \
             50.0 tok/s; expert hits 75.0 %, 1.5 MiB read a token; lookahead 2 useful, 3 wasted \
             (3.0 MiB); peak memory 70.0 MiB"
        );
        let mut off = report();
        off.settings.lookahead = "off";
        off.counters.total.hot_set.reads = 7;
        off.counters.total.hot_set.useful = 6;
        let said = off.summary();
        assert!(said.contains("token; hot set 6 useful, 0 wasted (0 B); peak"), "{said}");
    }

    #[test]
    fn the_object_has_totals_and_parts() {
        let object = serde_json::to_value(report()).unwrap();
        assert_eq!(object["finish_reason"], "stop");
        assert_eq!(object["counters"]["misses"], 6);
        assert_eq!(object["counters"]["prefill"]["wait_ms"], 1.5);
        assert_eq!(object["counters"]["decode"]["hit_rate"], 0.75);
        assert_eq!(object["counters"]["demanded_bytes"], 6 << 20);
        assert_eq!(object["counters"]["decode"]["lookahead"]["wasted_bytes"], 3 << 20);
        assert_eq!(object["counters"]["decode_read_bytes_per_token"], f64::from(4 << 20));
        assert_eq!(object["settings"]["sampling"]["greedy"], true);
        let warm = Sampling { temperature: 0.7, ..Sampling::greedy() };
        assert_eq!(sampling(&warm)["temperature"].to_string(), "0.7");
    }

    #[test]
    fn the_high_water_mark_is_read_as_the_system_writes_it() {
        assert_eq!(field("VmPeak:\t 9 kB\nVmHWM:\t    8192 kB\n", "VmHWM:"), Some(8192 * 1024));
        assert_eq!(field("VmPeak:\t 9 kB\n", "VmHWM:"), None);
    }
}
