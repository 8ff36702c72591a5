//! What the server counts, and its text for Prometheus.
//!
//! Counts are atomics that the engine's thread and the connections add to; nothing is sampled. The
//! text is the exposition format, version 0.0.4.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// Upper bounds of the time to the first token, in seconds.
const FIRST_TOKEN: [f64; 10] = [0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 15.0, 60.0, 300.0];
/// Upper bounds of the time between two tokens, in seconds.
const BETWEEN_TOKENS: [f64; 10] = [0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0];

/// Everything that is counted.
pub struct Metrics {
    /// Prompt tokens computed.
    pub prompt_tokens: Counter,
    /// Prompt tokens that did not have to be computed.
    pub cached_tokens: Counter,
    /// Tokens generated.
    pub generated_tokens: Counter,
    /// Time spent on prompts.
    pub prefill_seconds: Clock,
    /// Time spent on generated tokens.
    pub decode_seconds: Clock,
    /// From a request to its first token.
    pub first_token: Histogram,
    /// Between two tokens of a text.
    pub between_tokens: Histogram,
    /// Tokens in live contexts.
    pub positions: Level,
    /// Checkpoints kept in memory.
    pub prefixes: Level,
    /// Their bytes.
    pub prefix_bytes: Level,
    /// Checkpoints that had to make room.
    pub prefix_evictions: Counter,
    /// Checkpoints read from disk.
    pub prefix_loads: Counter,
    /// Checkpoints and answers that wait to be written to disk.
    pub prefix_writing: Level,
    /// Checkpoints that were to be written and found no room to wait.
    pub prefix_losses: Counter,
    requests: Mutex<BTreeMap<(&'static str, u16), u64>>, // by route and status
    ended: Mutex<BTreeMap<&'static str, u64>>,           // texts, by how they ended
}

/// A count that only grows.
#[derive(Default)]
pub struct Counter(AtomicU64);

/// A number that goes up and down.
#[derive(Default)]
pub struct Level(AtomicU64);

impl Level {
    /// Sets it.
    pub fn set(&self, value: u64) {
        self.0.store(value, Ordering::Relaxed);
    }

    /// The number.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Time that only grows.
#[derive(Default)]
pub struct Clock(AtomicU64); // nanoseconds

/// Times by size.
pub struct Histogram {
    bounds: &'static [f64],
    counts: Vec<AtomicU64>, // [bounds + 1]
    sum: Clock,
}

/// What is measured elsewhere when the text is made.
pub struct Gauges {
    /// Name, meaning, whether it only grows, and value.
    pub values: Vec<(&'static str, &'static str, Kind, f64)>,
}

/// What a number may do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// It only grows.
    Counter,
    /// It goes up and down.
    Gauge,
}

impl Counter {
    /// Adds.
    pub fn add(&self, count: u64) {
        self.0.fetch_add(count, Ordering::Relaxed);
    }

    /// The count.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

impl Clock {
    /// Adds.
    pub fn add(&self, time: Duration) {
        self.0.fetch_add(time.as_nanos() as u64, Ordering::Relaxed);
    }

    /// The time in seconds.
    pub fn seconds(&self) -> f64 {
        self.0.load(Ordering::Relaxed) as f64 / 1e9
    }
}

impl Histogram {
    fn new(bounds: &'static [f64]) -> Self {
        let counts = (0..=bounds.len()).map(|_| AtomicU64::new(0)).collect();
        Self { bounds, counts, sum: Clock::default() }
    }

    /// Adds one time.
    pub fn observe(&self, time: Duration) {
        let seconds = time.as_secs_f64();
        let place = self.bounds.iter().position(|&bound| seconds <= bound);
        self.counts[place.unwrap_or(self.bounds.len())].fetch_add(1, Ordering::Relaxed);
        self.sum.add(time);
    }

    fn write(&self, out: &mut String, name: &str, help: &str) {
        head(out, name, help, "histogram");
        let mut total = 0;
        let bounds = self.bounds.iter().map(ToString::to_string).chain(["+Inf".into()]);
        for (bound, count) in bounds.zip(&self.counts) {
            total += count.load(Ordering::Relaxed);
            line(out, &format!("{name}_bucket{{le=\"{bound}\"}}"), total as f64);
        }
        line(out, &format!("{name}_sum"), self.sum.seconds());
        line(out, &format!("{name}_count"), total as f64);
    }
}

impl Metrics {
    /// All at zero.
    pub fn new() -> Self {
        Self {
            prompt_tokens: Counter::default(),
            cached_tokens: Counter::default(),
            generated_tokens: Counter::default(),
            prefill_seconds: Clock::default(),
            decode_seconds: Clock::default(),
            first_token: Histogram::new(&FIRST_TOKEN),
            between_tokens: Histogram::new(&BETWEEN_TOKENS),
            positions: Level::default(),
            prefixes: Level::default(),
            prefix_bytes: Level::default(),
            prefix_evictions: Counter::default(),
            prefix_loads: Counter::default(),
            prefix_writing: Level::default(),
            prefix_losses: Counter::default(),
            requests: Mutex::default(),
            ended: Mutex::default(),
        }
    }

    /// A request was answered.
    pub fn answered(&self, route: &'static str, status: u16) {
        let mut requests = self.requests.lock().unwrap_or_else(PoisonError::into_inner);
        *requests.entry((route, status)).or_insert(0) += 1;
    }

    /// A text is over.
    pub fn ended(&self, how: &'static str) {
        *self.ended.lock().unwrap_or_else(PoisonError::into_inner).entry(how).or_insert(0) += 1;
    }

    /// The text for Prometheus.
    pub fn text(&self, gauges: &Gauges) -> String {
        let mut out = String::new();
        let requests = self.requests.lock().unwrap_or_else(PoisonError::into_inner).clone();
        head(&mut out, "flash_moe_requests_total", "Requests answered.", "counter");
        for ((route, status), count) in requests {
            let labels =
                format!("flash_moe_requests_total{{route=\"{route}\",status=\"{status}\"}}");
            line(&mut out, &labels, count as f64);
        }
        let ended = self.ended.lock().unwrap_or_else(PoisonError::into_inner).clone();
        head(&mut out, "flash_moe_texts_total", "Texts generated, by how they ended.", "counter");
        for (how, count) in ended {
            line(&mut out, &format!("flash_moe_texts_total{{ended=\"{how}\"}}"), count as f64);
        }
        let own = [
            (
                "flash_moe_prompt_tokens_total",
                "Prompt tokens computed.",
                self.prompt_tokens.get() as f64,
            ),
            (
                "flash_moe_generated_tokens_total",
                "Tokens generated.",
                self.generated_tokens.get() as f64,
            ),
            (
                "flash_moe_prefill_seconds_total",
                "Time spent on prompts.",
                self.prefill_seconds.seconds(),
            ),
            (
                "flash_moe_decode_seconds_total",
                "Time spent on generated tokens.",
                self.decode_seconds.seconds(),
            ),
        ];
        for (name, help, value) in own {
            head(&mut out, name, help, "counter");
            line(&mut out, name, value);
        }
        let first = "From a request to its first token.";
        self.first_token.write(&mut out, "flash_moe_first_token_seconds", first);
        let between = "Between two tokens of a text.";
        self.between_tokens.write(&mut out, "flash_moe_between_tokens_seconds", between);
        for &(name, help, kind, value) in &gauges.values {
            head(&mut out, name, help, if kind == Kind::Counter { "counter" } else { "gauge" });
            line(&mut out, name, value);
        }
        out
    }
}

fn head(out: &mut String, name: &str, help: &str, kind: &str) {
    writeln!(out, "# HELP {name} {help}\n# TYPE {name} {kind}").expect("writing to a string");
}

fn line(out: &mut String, name: &str, value: f64) {
    writeln!(out, "{name} {value}").expect("writing to a string");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_are_cumulative_and_end_with_all() {
        let metrics = Metrics::new();
        for ms in [40, 60, 400_000] {
            metrics.first_token.observe(Duration::from_millis(ms));
        }
        metrics.answered("/v1/models", 200);
        metrics.answered("/v1/models", 200);
        metrics.ended("stop");
        let gauges = Gauges { values: vec![("flash_moe_live", "Live texts.", Kind::Gauge, 1.5)] };
        let text = metrics.text(&gauges);
        for expected in [
            "flash_moe_requests_total{route=\"/v1/models\",status=\"200\"} 2\n",
            "flash_moe_texts_total{ended=\"stop\"} 1\n",
            "flash_moe_first_token_seconds_bucket{le=\"0.05\"} 1\n",
            "flash_moe_first_token_seconds_bucket{le=\"300\"} 2\n",
            "flash_moe_first_token_seconds_bucket{le=\"+Inf\"} 3\n",
            "flash_moe_first_token_seconds_count 3\n",
            "flash_moe_first_token_seconds_sum 400.1\n",
            "# TYPE flash_moe_live gauge\nflash_moe_live 1.5\n",
        ] {
            assert!(text.contains(expected), "{expected:?} is not in {text}");
        }
    }
}
