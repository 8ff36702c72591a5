//! The limits of this machine: memory, arithmetic, disk.
//!
//! Each is measured with the threads, kernels and file reads that a model run uses, and each checks
//! its answer: the sum of the memory read, the products computed, the bytes that arrived. The best
//! pass counts, because a limit is what the machine can do when its neighbours are still.

use std::hint::black_box;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use flash_moe_engine::pool::Pool;
use flash_moe_engine::store::measure::{ReadRate, RecordFiles};
use flash_moe_kernels::Isa;
use serde::Serialize;

use super::prompt::Random;

/// Reads in flight at which the disk is measured.
pub const DEPTHS: [usize; 4] = [1, 4, 8, 16];
/// Memory that is read, if the limit allows it: far above any cache.
const MEMORY_BYTES: u64 = 512 << 20;
/// The least memory that is worth reading; below this the result is a cache's.
const MEMORY_BYTES_MIN: u64 = 1 << 20;
/// Words that a thread reads between two looks at the counter.
const CHUNK_WORDS: usize = 1 << 19;
/// Of the filling pattern: odd, so that every word differs.
const FACTOR: u64 = 0x9e37_79b9_7f4a_7c15;

/// How long to measure.
#[derive(Clone, Copy, Debug)]
pub struct Effort {
    /// Time of each limit, and of each depth.
    pub each: Duration,
    /// Time of the disk's limit beside a timed run.
    pub beside: Duration,
}

impl Effort {
    /// Seconds in all, or tenths of them.
    pub fn new(quick: bool) -> Self {
        let (each, beside) = if quick { (100, 50) } else { (1000, 300) };
        Self { each: Duration::from_millis(each), beside: Duration::from_millis(beside) }
    }
}

/// Memory read by all threads together.
#[derive(Clone, Debug, Serialize)]
pub struct MemoryRate {
    /// Threads that read.
    pub threads: usize,
    /// Bytes of a pass.
    pub bytes: u64,
    /// Passes, every one with the right sum.
    pub passes: usize,
    /// Of the fastest pass.
    pub bytes_per_second: f64,
    /// Of the median pass.
    pub bytes_per_second_median: f64,
}

/// Products of the `dots` kernel on data in the cache.
#[derive(Clone, Debug, Serialize)]
pub struct DotsRate {
    /// Threads that computed.
    pub threads: usize,
    /// Instruction set.
    pub isa: &'static str,
    /// Of the fastest pass; a multiplication and an addition are two.
    pub flops_per_second: f64,
}

/// Reads `bytes` (or less, down to what `memory_limit` allows) again and again.
///
/// # Errors
/// A pass whose sum is wrong.
pub fn memory(pool: &Pool, memory_limit: u64, effort: Effort) -> Result<MemoryRate> {
    let bytes = MEMORY_BYTES.min(memory_limit / 2).max(MEMORY_BYTES_MIN);
    let mut words = vec![0u64; bytes as usize / size_of::<u64>()];
    pool.chunks(&mut words, CHUNK_WORDS, |chunk, words| {
        for (i, word) in (chunk * CHUNK_WORDS..).zip(words) {
            *word = (i as u64).wrapping_mul(FACTOR);
        }
    });
    let n = words.len() as u128;
    let expected = ((n * (n - 1) / 2) as u64).wrapping_mul(FACTOR);
    let mut rates = Vec::new();
    let begun = Instant::now();
    while rates.len() < 3 || begun.elapsed() < effort.each {
        let total = AtomicU64::new(0);
        let started = Instant::now();
        pool.run(words.len().div_ceil(CHUNK_WORDS), &|chunk| {
            let end = words.len().min((chunk + 1) * CHUNK_WORDS);
            total.fetch_add(sum(&words[chunk * CHUNK_WORDS..end]), Ordering::Relaxed);
        });
        rates.push(bytes as f64 / started.elapsed().as_secs_f64());
        ensure!(total.into_inner() == expected, "memory: a pass over {bytes} bytes summed wrongly");
    }
    rates.sort_by(f64::total_cmp);
    Ok(MemoryRate {
        threads: pool.threads(),
        bytes,
        passes: rates.len(),
        bytes_per_second: rates[rates.len() - 1],
        bytes_per_second_median: rates[rates.len() / 2],
    })
}

fn sum(words: &[u64]) -> u64 {
    words.iter().fold(0, |sum, &word| sum.wrapping_add(word))
}

/// Multiplies vectors that stay in the first-level cache.
///
/// # Errors
/// A product that differs from the specification's.
pub fn cached_products(pool: &Pool, isa: Isa, effort: Effort) -> Result<DotsRate> {
    const COLS: usize = 512;
    const VECTORS: usize = 8;
    const ROUNDS: usize = 4000;
    let value = |i: usize| ((i * 37 % 101) as f32 - 50.0) / 64.0;
    let row: Vec<f32> = (0..COLS).map(value).collect();
    let vectors: Vec<f32> = (COLS..COLS * (VECTORS + 1)).map(value).collect();
    let products = |isa: Isa| {
        let mut out = [0.0; VECTORS];
        isa.dots(&row, &vectors, &mut out);
        out
    };
    for (ours, theirs) in products(isa).into_iter().zip(products(Isa::scalar())) {
        ensure!(
            (ours - theirs).abs() < 1e-3,
            "dots on {}: {ours}, the scalar kernel says {theirs}",
            isa.name()
        );
    }
    let items = 4 * pool.threads();
    let flops = (2 * COLS * VECTORS * ROUNDS * items) as f64;
    let mut best = 0.0f64;
    let begun = Instant::now();
    while best == 0.0 || begun.elapsed() < effort.each {
        let started = Instant::now();
        pool.run(items, &|_| {
            let mut out = [0.0; VECTORS];
            for _ in 0..ROUNDS {
                isa.dots(black_box(&row), black_box(&vectors), black_box(&mut out));
            }
        });
        best = best.max(flops / started.elapsed().as_secs_f64());
    }
    Ok(DotsRate { threads: pool.threads(), isa: isa.name(), flops_per_second: best })
}

/// The disk that holds the records, read in random order.
pub struct Disk {
    files: RecordFiles,
    order: Vec<usize>,
}

impl Disk {
    /// Every record once, shuffled.
    pub fn new(files: RecordFiles) -> Self {
        let mut random = Random::new(1);
        let mut order: Vec<usize> = (0..files.count()).collect();
        for i in (1..order.len()).rev() {
            order.swap(i, random.below(i + 1));
        }
        Self { files, order }
    }

    /// Bytes of a read.
    pub fn record_bytes(&self) -> usize {
        self.files.read_bytes()
    }

    /// Whether reads bypass the page cache.
    pub fn is_direct(&self) -> bool {
        self.files.is_direct()
    }

    /// Reads records that were not read lately, `depth` at a time.
    ///
    /// # Errors
    /// A read that failed or came up short.
    pub fn measure(&mut self, depth: usize, time: Duration) -> Result<ReadRate> {
        let rate = self.files.read(&self.order, depth, time)?;
        ensure!(
            rate.bytes == (rate.records * self.record_bytes()) as u64 || self.order.is_empty(),
            "disk: {} records came as {} bytes",
            rate.records,
            rate.bytes
        );
        let read = rate.records.min(self.order.len());
        self.order.rotate_left(read);
        Ok(rate)
    }

    /// One measurement at every depth.
    ///
    /// # Errors
    /// As [`Disk::measure`].
    pub fn sweep(&mut self, effort: Effort) -> Result<Vec<ReadRate>> {
        DEPTHS.into_iter().map(|depth| self.measure(depth, effort.each)).collect()
    }
}

/// The fastest of some measurements.
pub fn fastest(rates: &[ReadRate]) -> Option<&ReadRate> {
    rates.iter().max_by(|a, b| a.rate().total_cmp(&b.rate()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_limit_checks_its_answer_and_gives_a_rate() {
        let pool = Pool::new(2);
        let memory = memory(&pool, 8 << 20, Effort::new(true)).unwrap();
        assert_eq!((memory.threads, memory.bytes), (2, 4 << 20));
        assert!(memory.bytes_per_second >= memory.bytes_per_second_median);
        for isa in Isa::available() {
            assert!(cached_products(&pool, isa, Effort::new(true)).unwrap().flops_per_second > 0.0);
        }
    }

    #[test]
    fn the_disk_is_read_in_an_order_that_names_every_record_once() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), vec![1u8; 50 * 4096]).unwrap();
        let mut disk = Disk::new(RecordFiles::of_file(file.path(), 4096).unwrap());
        let mut order = disk.order.clone();
        assert_ne!(order, (0..50).collect::<Vec<_>>());
        order.sort_unstable();
        assert_eq!(order, (0..50).collect::<Vec<_>>());
        let rates = disk.sweep(Effort::new(true)).unwrap();
        assert_eq!(rates.iter().map(|r| r.depth).collect::<Vec<_>>(), DEPTHS);
        assert!(rates.iter().all(|r| r.bytes == r.records as u64 * 4096 && r.records > 0));
    }
}
