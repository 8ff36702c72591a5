//! Progress of a long command: a bar on a terminal, lines elsewhere, a summary at the end.
//!
//! Counts bytes done, so that rate and time left mean something. Writes to standard error only.

use std::io::IsTerminal;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use crate::say::tell;
use indicatif::{DecimalBytes, ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Progress towards a known number of bytes.
pub struct Progress {
    bar: ProgressBar,
    voice: Voice,
    started: Instant,
    read_bytes: AtomicU64,
    written_bytes: AtomicU64,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Voice {
    Bar,
    Lines,
    Silent,
}

impl Progress {
    /// A bar over `total_bytes`; silent if `quiet`.
    pub fn new(total_bytes: u64, quiet: bool) -> Self {
        let voice = match (quiet, std::io::stderr().is_terminal()) {
            (true, _) => Voice::Silent,
            (false, true) => Voice::Bar,
            (false, false) => Voice::Lines,
        };
        let target = match voice {
            Voice::Bar => ProgressDrawTarget::stderr_with_hz(10),
            Voice::Lines | Voice::Silent => ProgressDrawTarget::hidden(),
        };
        let bar = ProgressBar::with_draw_target(Some(total_bytes), target);
        let template = "{wide_msg} {bar:24} {decimal_bytes}/{decimal_total_bytes} {decimal_bytes_per_sec} {eta} left";
        let style = ProgressStyle::with_template(template).expect("the template is well formed");
        bar.set_style(style.progress_chars("=> "));
        Self {
            bar,
            voice,
            started: Instant::now(),
            read_bytes: AtomicU64::new(0),
            written_bytes: AtomicU64::new(0),
        }
    }

    /// Counts bytes read, which is what the bar shows.
    pub fn read(&self, bytes: u64) {
        self.read_bytes.fetch_add(bytes, Ordering::Relaxed);
        self.bar.inc(bytes);
    }

    /// Counts bytes written.
    pub fn wrote(&self, bytes: u64) {
        self.written_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Names the file that is being worked on.
    pub fn now(&self, what: &str) {
        self.bar.set_message(what.to_string());
    }

    /// Says that a file is done; a line where there is no bar.
    pub fn done(&self, what: &str) {
        if self.voice == Voice::Lines {
            let (done, total) = (self.bar.position(), self.bar.length().unwrap_or(0));
            let (of, rate) = (DecimalBytes(total), self.rate(done));
            tell!("{what}: {} of {of}, {rate}/s", DecimalBytes(done));
        }
    }

    /// Prints a line above the bar.
    pub fn say(&self, line: &str) {
        match self.voice {
            Voice::Bar => self.bar.println(line),
            Voice::Lines => tell!("{line}"),
            Voice::Silent => {}
        }
    }

    /// Ends the bar and prints what was done.
    pub fn finish(&self) {
        self.bar.finish_and_clear();
        if self.voice == Voice::Silent {
            return;
        }
        let read = self.read_bytes.load(Ordering::Relaxed);
        let written = self.written_bytes.load(Ordering::Relaxed);
        let wrote = match written {
            0 => String::new(),
            bytes => format!(", wrote {}", DecimalBytes(bytes)),
        };
        let peak = match peak_memory_bytes() {
            Some(bytes) => format!(", peak memory {}", DecimalBytes(bytes)),
            None => String::new(),
        };
        tell!(
            "read {}{wrote} in {:.1} s: {}/s{peak}",
            DecimalBytes(read),
            self.started.elapsed().as_secs_f64(),
            self.rate(read.max(written))
        );
    }

    /// Bytes a second since the start.
    fn rate(&self, bytes: u64) -> DecimalBytes {
        DecimalBytes((bytes as f64 / self.started.elapsed().as_secs_f64().max(1e-9)) as u64)
    }
}

/// The most memory the process has held, where the system says it.
fn peak_memory_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    let kib: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kib * 1024)
}
