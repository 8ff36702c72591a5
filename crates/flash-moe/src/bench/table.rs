//! A bench for people, 100 columns wide.
//!
//! One line for each run, and the stages of every warm one. With repetitions, a line is the run in
//! the middle by speed, and the slowest and the fastest stand beside it.

use std::fmt::Write as _;

use flash_moe_engine::budget::gib;

use super::report::{
    ChunkLimits, GpuLimits, KernelReport, Limits, Machine, Model, Report, RunReport,
};
use super::walk::{Phase, PoolState};

/// The whole report.
pub fn render(report: &Report) -> String {
    let mut out = machine_line(&report.machine) + "\n";
    out += &model_lines(&report.model);
    out += &limit_lines(&report.limits);
    let check = &report.check;
    out += &line(
        "check",
        &format!(
            "prompt of {} tokens as a whole and one by one: logits differ by {:.1e} of their \
             deviation (bound {})",
            check.tokens, check.difference, check.bound
        ),
    );
    for note in &report.notes {
        out += &line("note", note);
    }
    let middle = medians(&report.runs);
    out += &summary(&middle);
    if report.model.lookahead != "off" {
        out += &lookahead(report.model.lookahead, &middle);
    }
    for (run, _) in middle.iter().filter(|(run, _)| run.pool == PoolState::Warm) {
        out += &stages(run);
    }
    if !report.kernels.is_empty() {
        out += &kernels(&report.kernels);
    }
    out
}

fn kernels(kernels: &[KernelReport]) -> String {
    let seconds: f64 = kernels.iter().map(|k| k.seconds).sum();
    let mut out = format!(
        "\nkernels of a token at {} by themselves, {:.2} ms in all, without the device's clock\n\
         {:<16}{:>11}{:>10}{:>8}{:>10}{:>12}{:>9}{:>10}\n",
        kernels[0].position,
        seconds * 1e3,
        "kernel",
        "dispatches",
        "ms/token",
        "share",
        "us each",
        "MB/token",
        "GB/s",
        "of limit"
    );
    for k in kernels {
        writeln!(
            out,
            "{:<16}{:>11}{:>10.3}{:>8}{:>10.1}{:>12.2}{:>9.0}{:>10}",
            k.kernel,
            k.dispatches,
            k.seconds * 1e3,
            percent(k.seconds / seconds),
            k.seconds * 1e6 / k.dispatches as f64,
            k.bytes as f64 / 1e6,
            k.bytes as f64 / k.seconds / 1e9,
            percent(k.limit_fraction)
        )
        .expect("writing to a string does not fail");
    }
    out
}

/// `name  text`, wrapped at 100 columns.
pub fn line(name: &str, text: &str) -> String {
    const INDENT: usize = 9;
    let mut out = format!("{name:<INDENT$}");
    let mut width = INDENT;
    for (i, word) in text.split(' ').enumerate() {
        if i > 0 && width + 1 + word.len() > 100 {
            out += &format!("\n{:INDENT$}", "");
            width = INDENT;
        } else if i > 0 {
            out.push(' ');
            width += 1;
        }
        out += word;
        width += word.len();
    }
    out + "\n"
}

/// The machine in one line.
pub fn machine_line(m: &Machine) -> String {
    let memory = if m.memory_bytes == 0 { "unknown memory".into() } else { gib(m.memory_bytes) };
    let text = format!(
        "{}, {} cores, {memory}, {}, {} threads, {}",
        m.cpu, m.cores, m.isa, m.threads, m.kernel
    );
    line("machine", &text).trim_end().to_string()
}

fn model_lines(m: &Model) -> String {
    let share = 100.0 * m.slots as f64 / m.records.max(1) as f64;
    let model = format!(
        "{} ({}): {} layers, top {} of {} experts of {}; opened in {:.1} s",
        m.name,
        m.source,
        m.layers,
        m.experts_per_token,
        m.experts,
        gib(m.record_bytes),
        m.open_seconds
    );
    let run = format!(
        "limit {}, pool {} of {} records ({share:.0} %), context {}, chunk {}, {} {} reads by {}; {}",
        gib(m.memory_limit_bytes),
        m.slots,
        m.records,
        m.context,
        m.prefill_chunk,
        m.readers,
        m.io,
        m.reader,
        m.prompt
    );
    let mut out = line("model", &model) + &line("run", &run);
    if let Some(video) = &m.video_memory {
        out += &line("device", &format!("{}: {}", m.device, video.about(m.experts)));
    }
    out
}

/// The machine's limits.
pub fn limit_lines(limits: &Limits) -> String {
    let m = &limits.memory;
    let mut out = line(
        "memory",
        &format!(
            "{:.1} GB/s (median {:.1}) read by {} threads over {}, sum checked",
            m.bytes_per_second / 1e9,
            m.bytes_per_second_median / 1e9,
            m.threads,
            gib(m.bytes)
        ),
    );
    out += &line(
        "gemm",
        &format!(
            "{:.1} GFLOP/s (median {:.1}): {} products of 4-bit weights and {} activations in the cache, {} threads",
            limits.gemm.flops_per_second / 1e9,
            limits.gemm.flops_per_second_median / 1e9,
            limits.gemm.isa,
            limits.gemm.activations,
            limits.gemm.threads
        ),
    );
    let depths: Vec<String> = limits
        .disk
        .iter()
        .map(|d| format!("{:.2} at {}", d.bytes_per_second / 1e9, d.depth))
        .collect();
    out += &limits.gpu.map_or_else(String::new, |gpu| gpu.line());
    let how = if limits.disk_direct { "direct" } else { "through the page cache" };
    if !depths.is_empty() {
        let text = format!("GB/s by reads in flight: {} (whole records, {how})", depths.join(", "));
        out += &line("disk", &text);
    }
    out
}

impl GpuLimits {
    /// In a line.
    pub fn line(&self) -> String {
        let text = format!(
            "{:.1} GB/s of its memory read over {}, sum checked; uploads {:.1} GB/s (staged at {:.1}, copied \
             at {:.1}); an answer after {:.0} us",
            self.read_bytes_per_second / 1e9,
            gib(self.read_bytes),
            self.upload_bytes_per_second / 1e9,
            self.stage_bytes_per_second / 1e9,
            self.copy_bytes_per_second / 1e9,
            self.round_trip_us
        );
        line("gpu", &text)
    }
}

impl ChunkLimits {
    /// In a line.
    pub fn line(&self) -> String {
        let where_to = if self.tensor_cores { "on tensor cores" } else { "in f32" };
        let text = format!(
            "{:.1} GFLOP/s dense and {:.1} of experts {where_to}, attention {:.1}, in chunks of {} tokens, \
             answers checked",
            self.dense_flops_per_second / 1e9,
            self.experts_flops_per_second / 1e9,
            self.attention_flops_per_second / 1e9,
            self.tokens
        );
        line("products", &text)
    }
}

/// The run in the middle of each group of repetitions, with the slowest and the fastest tok/s.
fn medians<'a>(runs: &'a [RunReport]) -> Vec<(&'a RunReport, (f64, f64))> {
    let key = |r: &RunReport| (r.phase, r.pool, r.position, r.tokens);
    let mut groups: Vec<Vec<&'a RunReport>> = Vec::new();
    // A prompt from position 0 may be run twice warm in one repetition: by itself and on the way to
    // the first position. It is the same run, so it counts as one more repetition.
    for run in runs {
        match groups.iter_mut().find(|group| key(group[0]) == key(run)) {
            Some(group) => group.push(run),
            None => groups.push(vec![run]),
        }
    }
    let middle = |mut group: Vec<&'a RunReport>| {
        group.sort_by(|a, b| a.tokens_per_second.total_cmp(&b.tokens_per_second));
        let ends = (group[0].tokens_per_second, group[group.len() - 1].tokens_per_second);
        (group[group.len() / 2], ends)
    };
    groups.into_iter().map(middle).collect()
}

/// Tokens a second in six characters, up to a million of them.
fn rate(tokens_per_second: f64) -> String {
    match tokens_per_second {
        few if few < 999.995 => format!("{few:.2}"),
        many => format!("{many:.0}"),
    }
}

fn summary(middle: &[(&RunReport, (f64, f64))]) -> String {
    let mut out = format!(
        "\n{:<8}{:<5}{:>7}{:>7}{:>8}{:>15}{:>8}{:>9}{:>7}{:>8}{:>10}{:>8}\n",
        "phase",
        "pool",
        "from",
        "tokens",
        "tok/s",
        "slow-fast",
        "hits",
        "MB/token",
        "wait",
        "of disk",
        "of limit",
        "median"
    );
    for (run, (slowest, fastest)) in middle {
        let e = &run.experts;
        let range = match slowest == fastest {
            true => String::new(),
            false => format!("{}-{}", rate(*slowest), rate(*fastest)),
        };
        let disk = match (e.read_bytes, e.disk_fraction) {
            (0, _) | (_, None) => "-".into(),
            (_, Some(fraction)) => percent(fraction),
        };
        writeln!(
            out,
            "{:<8}{:<5}{:>7}{:>7}{:>8}{range:>15}{:>8}{:>9.1}{:>7}{disk:>8}{:>10}{:>8}",
            phase(run),
            pool(run),
            run.position,
            run.tokens,
            rate(run.tokens_per_second),
            percent(e.hit_rate),
            e.read_bytes_per_token / 1e6,
            percent(e.wait_seconds / run.seconds),
            percent(run.limit_fraction),
            percent(run.limit_fraction_beside)
        )
        .expect("writing to a string does not fail");
    }
    out
}

/// What was read because it was guessed, apart from what tokens asked for.
fn lookahead(how: &str, middle: &[(&RunReport, (f64, f64))]) -> String {
    let mut out = format!(
        "\n{:<21}{:>8}{:>10}{:>10}{:>18}{:>17}{:>16}\n",
        format!("lookahead {how}"),
        "guesses",
        "useful",
        "wasted",
        "demanded MB/token",
        "guessed MB/token",
        "wasted MB/token"
    );
    for (run, _) in middle {
        let (e, guesses) = (&run.experts, &run.experts.lookahead);
        let per_token = |bytes: u64| bytes as f64 / run.tokens as f64 / 1e6;
        writeln!(
            out,
            "{:<8}{:<5}{:>8}{:>8}{:>10}{:>10}{:>18.1}{:>17.1}{:>16.1}",
            phase(run),
            pool(run),
            run.position,
            guesses.reads,
            guesses.useful,
            guesses.wasted,
            per_token(e.demanded_bytes),
            per_token(guesses.read_bytes),
            per_token(guesses.wasted_bytes)
        )
        .expect("writing to a string does not fail");
    }
    out
}

fn stages(run: &RunReport) -> String {
    let mut out = format!(
        "\n{} {} of {} tokens from {}: {:.2} ms a token\n{:<12}{:>10}{:>8}{:>12}{:>9}{:>10}{:>10}{:>10}\n",
        pool(run),
        phase(run),
        run.tokens,
        run.position,
        run.seconds * 1e3 / run.tokens as f64,
        "stage",
        "ms/token",
        "share",
        "MB/token",
        "GB/s",
        "GFLOP/s",
        "limit",
        "of limit"
    );
    let tokens = run.tokens as f64;
    for s in &run.stages {
        // Reads and uploads go on beside the other stages, so their speed is over the whole run.
        let is_beside = matches!(s.limit, Some("disk" | "upload"));
        let over = if is_beside { run.seconds } else { s.seconds };
        let speed = |amount: f64| match amount > 0.0 && over > 0.0 {
            true => format!("{:.1}", amount / over / 1e9),
            false => String::new(),
        };
        writeln!(
            out,
            "{:<12}{:>10.3}{:>8}{:>12.2}{:>9}{:>10}{:>10}{:>10}",
            s.stage,
            s.seconds * 1e3 / tokens,
            percent(s.seconds / run.seconds),
            s.bytes as f64 / tokens / 1e6,
            speed(s.bytes as f64),
            speed(s.operations),
            s.limit.unwrap_or("-"),
            s.limit_fraction.map_or_else(|| "-".into(), percent)
        )
        .expect("writing to a string does not fail");
    }
    out
}

fn percent(share: f64) -> String {
    format!("{:.1} %", 100.0 * share)
}

fn phase(run: &RunReport) -> &'static str {
    if run.phase == Phase::Decode { "decode" } else { "prefill" }
}

fn pool(run: &RunReport) -> &'static str {
    if run.pool == PoolState::Cold { "cold" } else { "warm" }
}

#[cfg(test)]
mod tests {
    use super::{line, rate};

    #[test]
    fn long_lines_are_wrapped_under_their_name() {
        let text = line("note", &"word ".repeat(40));
        assert!(text.lines().all(|l| l.len() <= 100), "{text}");
        assert!(text.lines().skip(1).all(|l| l.starts_with("         word")), "{text}");
        assert_eq!(text.split_whitespace().count(), 41);
    }

    #[test]
    fn rates_take_six_characters_at_most() {
        let rates = [0.6789, 0.0, 33.333, 999.99, 999.996, 1234.5, 12962.13, 999_999.4];
        let told = ["0.68", "0.00", "33.33", "999.99", "1000", "1234", "12962", "999999"];
        assert_eq!(rates.map(rate), told);
    }
}
