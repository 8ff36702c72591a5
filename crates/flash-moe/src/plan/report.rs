//! A plan as one object and as a page, 100 columns wide.
//!
//! The fields are the names in the JSON. The page says `estimate` in its first line and names the
//! two ends of every range in its last.

use std::fmt::Write as _;

use flash_moe_engine::budget::{Budget, gib};
use serde::Serialize;

use super::estimate::{Estimate, Range};
use super::video::VideoPlan;
use crate::bench::report::{Limits, Machine};
use crate::bench::table::{limit_lines, line, machine_line};

/// Everything a plan says.
#[derive(Debug, Serialize)]
pub struct Report {
    /// Always true: nothing here was measured on the model.
    pub estimate: bool,
    /// The model in words.
    pub model: String,
    /// Dense weights and records.
    pub disk_bytes: u64,
    /// The machine in words.
    pub machine: Machine,
    /// What the machine can do.
    pub limits: Limits,
    /// The memory plan under the limit asked for.
    pub memory: Memory,
    /// What would fit, if that does not.
    pub ways_to_fit: Vec<Way>,
    /// The limit that the figures below are for.
    pub planned_limit_bytes: u64,
    /// Share of the records in memory under it.
    pub residency: f64,
    /// Tokens of context.
    pub context: usize,
    /// Prompt tokens, and the position of the decode figure.
    pub prompt: usize,
    /// What to expect of the processor alone.
    pub expected: Estimate,
    /// The GPU, where one was asked for.
    pub video_memory: Option<VideoPlan>,
    /// The same with twice of one thing; empty with a GPU.
    pub changes: Vec<Change>,
    /// Prefill of a prompt that fills the context, by chunk; the smallest first; empty with a GPU.
    pub chunks: Vec<Chunk>,
}

/// The memory plan.
#[derive(Debug, Serialize)]
pub struct Memory {
    /// Whether it runs.
    pub fits: bool,
    /// Memory that may be used.
    pub limit_bytes: u64,
    /// The smallest limit with this context.
    pub smallest_bytes: u64,
    /// Everything but the pool.
    pub lines: Vec<MemoryLine>,
    /// The pool.
    pub pool_bytes: u64,
    /// Records it holds.
    pub slots: usize,
    /// Records of one token, which it must hold.
    pub slots_floor: usize,
    /// Records in the model.
    pub records: usize,
}

/// One allocation.
#[derive(Debug, Serialize)]
pub struct MemoryLine {
    /// What it is.
    pub name: &'static str,
    /// Its size.
    pub bytes: u64,
}

/// A limit and a context that run together.
#[derive(Debug, Serialize)]
pub struct Way {
    /// Memory limit.
    pub memory_bytes: u64,
    /// Tokens of context.
    pub context: usize,
}

/// The estimate with twice of one thing.
#[derive(Debug, Serialize)]
pub struct Change {
    /// `memory`, `disk` or `threads`.
    pub what: &'static str,
    /// How much faster decode becomes.
    pub decode_factor: f64,
    /// How much faster prefill becomes.
    pub prefill_factor: f64,
    /// What to expect then.
    pub expected: Estimate,
}

/// Prefill with a chunk of so many tokens.
#[derive(Debug, Serialize)]
pub struct Chunk {
    /// Prompt tokens computed together.
    pub chunk: usize,
    /// Everything but the pool.
    pub fixed_bytes: u64,
    /// Prompt tokens a second.
    pub prefill: Range,
}

impl Memory {
    /// From the engine's own plan.
    pub fn new(budget: &Budget) -> Self {
        let lines = budget.fixed.iter().map(|l| MemoryLine { name: l.name, bytes: l.bytes });
        Self {
            fits: budget.fits(),
            limit_bytes: budget.limit,
            smallest_bytes: budget.smallest(),
            lines: lines.collect(),
            pool_bytes: budget.slots as u64 * budget.slot_bytes,
            slots: budget.slots,
            slots_floor: budget.slots_floor,
            records: budget.records,
        }
    }
}

impl Way {
    /// The smallest limit of a plan, or its own if that holds it.
    pub fn of(budget: &Budget) -> Self {
        let memory_bytes = if budget.fits() { budget.limit } else { budget.smallest() };
        Self { memory_bytes, context: budget.context }
    }
}

impl Report {
    /// The page.
    pub fn render(&self) -> String {
        let about = format!(
            "{}, {} on disk. Every figure is computed from these limits.",
            self.model,
            gib(self.disk_bytes)
        );
        let mut out = line("estimate", &about) + &machine_line(&self.machine) + "\n";
        out += &limit_lines(&self.limits);
        out += &self.memory_table();
        out += &self.expectations();
        if let Some(video) = &self.video_memory {
            return out + &video.render(self.prompt);
        }
        out += &self.change_table();
        out + &self.chunk_line()
    }

    fn chunk_line(&self) -> String {
        let Some(best) = best_chunk(&self.chunks) else { return String::new() };
        let Range { low, high } = best.prefill;
        let text = format!(
            "--prefill-chunk {} for a prompt of {} tokens: {low:.2}-{high:.2} tok/s, buffers and cache \
             {}. The default is 512 on every machine, because sums over another chunk round otherwise.",
            best.chunk,
            self.context,
            gib(best.fixed_bytes)
        );
        line("chunk", &text)
    }

    fn memory_table(&self) -> String {
        let m = &self.memory;
        let mut out = format!("\nmemory, context {}\n", self.context);
        let mut row = |name: &str, bytes: u64| {
            writeln!(out, "  {name:<38}{:>12}", gib(bytes)).expect("writing to a string");
        };
        for l in &m.lines {
            row(l.name, l.bytes);
        }
        row(&format!("expert pool, {} of {} records", m.slots, m.records), m.pool_bytes);
        let total = m.lines.iter().map(|l| l.bytes).sum::<u64>() + m.pool_bytes;
        row("total", total);
        row("limit", m.limit_bytes);
        row("smallest limit with this context", m.smallest_bytes);
        if !m.fits {
            out += &line(
                "refused",
                &format!(
                    "does not fit: a token's {} experts and the rest need {}, the limit is {}",
                    m.slots_floor,
                    gib(m.smallest_bytes),
                    gib(m.limit_bytes)
                ),
            );
            for way in &self.ways_to_fit {
                let mib = way.memory_bytes.div_ceil(1 << 20);
                let flags = format!("--memory {mib}MiB --context {} would run", way.context);
                out += &line("", &flags);
            }
            let planned = gib(self.planned_limit_bytes);
            out += &line("", &format!("the figures below are for a limit of {planned}"));
        }
        out
    }

    fn expectations(&self) -> String {
        let e = &self.expected;
        let chosen = |low: String, high: String| format!("{low:>14}{high:>14}\n");
        let rate = |r: Range| chosen(format!("{:.2}", r.low), format!("{:.2}", r.high));
        let what =
            self.video_memory.as_ref().map_or("expected", |_| "expected of the processor alone");
        let mut out = format!("\n{what:<40}{:>14}{:>14}\n", "low", "high");
        let percent = |share: f64| format!("{:.1} %", 100.0 * share);
        let name = format!("hits with {} of the experts in memory", percent(self.residency));
        out += &format!("{name:<40}");
        out += &chosen(percent(e.hit_rate.low), percent(e.hit_rate.high));
        let mb = |bytes: f64| format!("{:.1}", bytes / 1e6);
        out += &format!("{:<40}", "MB read from disk for a token");
        out += &chosen(mb(e.miss_bytes.low), mb(e.miss_bytes.high));
        out += &format!("{:<40}", "MB touched in memory for a token");
        out += &chosen(mb(e.token_bytes), mb(e.token_bytes));
        out += &format!("{:<40}", format!("decode tok/s at position {}", self.prompt));
        out += &rate(e.decode);
        out += &format!("{:<40}", format!("prefill tok/s of {} tokens", self.prompt));
        out += &rate(e.prefill);
        out += &line(
            "low",
            "uniform routing, reading and computing one after the other; high: hit rates published \
             for trained Qwen models, all overlapped. Both at the limits above, which no run keeps \
             up throughout.",
        );
        out
    }

    fn change_table(&self) -> String {
        let mut out = format!(
            "\n{:<18}{:>22}{:>8}{:>26}{:>8}\n",
            "twice the", "decode tok/s", "gain", "prefill tok/s", "gain"
        );
        let range = |r: Range| format!("{:.2}-{:.2}", r.low, r.high);
        for c in &self.changes {
            let (decode, prefill) = (range(c.expected.decode), range(c.expected.prefill));
            writeln!(
                out,
                "{:<18}{decode:>22}{:>8.2}{prefill:>26}{:>8.2}",
                c.what, c.decode_factor, c.prefill_factor
            )
            .expect("writing to a string does not fail");
        }
        let text = format!(
            "decode: {}; prefill: {} (threads: as if memory and arithmetic grew with them)",
            best(&self.changes, |c| c.decode_factor),
            best(&self.changes, |c| c.prefill_factor)
        );
        out + &line("helps", &text)
    }
}

/// The smallest chunk that no other beats by more than a twentieth.
fn best_chunk(chunks: &[Chunk]) -> Option<&Chunk> {
    let most = chunks.iter().map(|c| c.prefill.middle()).fold(0.0, f64::max);
    chunks.iter().find(|c| c.prefill.middle() * 1.05 >= most)
}

/// What gains most, or that nothing does.
fn best(changes: &[Change], factor: impl Fn(&Change) -> f64) -> &'static str {
    let most = changes.iter().max_by(|a, b| factor(a).total_cmp(&factor(b)));
    most.filter(|c| factor(c) > 1.05).map_or("nothing", |c| c.what)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_chunk_named_is_the_smallest_that_none_beats() {
        let chunk =
            |chunk, low, high| Chunk { chunk, fixed_bytes: 0, prefill: Range { low, high } };
        let mut list =
            vec![chunk(512, 10.0, 20.0), chunk(1024, 18.0, 30.0), chunk(2048, 18.5, 31.0)];
        assert_eq!(best_chunk(&list).unwrap().chunk, 1024);
        list.push(chunk(4096, 30.0, 60.0));
        assert_eq!(best_chunk(&list).unwrap().chunk, 4096);
        assert!(best_chunk(&[]).is_none());
    }
}
