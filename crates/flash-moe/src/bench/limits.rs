//! The limits of this machine: memory, arithmetic, disk.
//!
//! Each is measured with the threads, kernels and file reads that a model run uses, and each checks
//! its answer: the sum of the memory read, the products computed, the bytes that arrived. The best
//! pass counts, because a limit is what the machine can do when its neighbours are still; what is
//! measured beside a timed run is of the same minute, and there the median counts.

use std::hint::black_box;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use flash_moe_engine::Arithmetic;
use flash_moe_engine::pool::Pool;
use flash_moe_engine::store::measure::{ReadRate, RecordFiles};
use flash_moe_kernels::{
    Fixed, FixedLayout, FixedMut, Format, Isa, Rows, ScaleType, TILE_BYTES, TILE_ROWS, TileMut,
};
use serde::Serialize;

use super::prompt::Random;

/// Reads in flight at which the disk is measured.
pub const DEPTHS: [usize; 4] = [1, 4, 8, 16];
/// Memory that is read, if the limit allows it: far above any cache. Servers have 300 MiB of it.
const MEMORY_BYTES: u64 = 1 << 30;
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

/// Products of a tile of 4-bit weights and many vectors, as prefill forms them, on data in the cache.
#[derive(Clone, Debug, Serialize)]
pub struct GemmRate {
    /// Threads that computed.
    pub threads: usize,
    /// Instruction set.
    pub isa: &'static str,
    /// Numbers of the activations.
    pub activations: &'static str,
    /// Of the fastest pass; a multiplication and an addition are two.
    pub flops_per_second: f64,
    /// Of the median pass.
    pub flops_per_second_median: f64,
}

/// Memory to be read again and again, with the sum of it.
pub struct MemoryProbe {
    words: Vec<u64>,
    expected: u64,
}

impl MemoryProbe {
    /// Bytes that it takes under a limit of the process's memory.
    pub fn bytes(memory_limit: u64) -> u64 {
        MEMORY_BYTES.min(memory_limit / 8).max(MEMORY_BYTES_MIN)
    }

    /// So many bytes, filled.
    pub fn new(pool: &Pool, bytes: u64) -> Self {
        let mut words = vec![0u64; bytes as usize / size_of::<u64>()];
        pool.chunks(&mut words, CHUNK_WORDS, |chunk, words| {
            for (i, word) in (chunk * CHUNK_WORDS..).zip(words) {
                *word = (i as u64).wrapping_mul(FACTOR);
            }
        });
        let n = words.len() as u128;
        Self { words, expected: ((n * (n - 1) / 2) as u64).wrapping_mul(FACTOR) }
    }

    /// Reads it for so long, three times at least.
    ///
    /// # Errors
    /// A pass whose sum is wrong.
    pub fn measure(&self, pool: &Pool, time: Duration) -> Result<MemoryRate> {
        let bytes = size_of_val(&self.words[..]) as u64;
        let mut rates = Vec::new();
        let begun = Instant::now();
        while rates.len() < 3 || begun.elapsed() < time {
            let total = AtomicU64::new(0);
            let started = Instant::now();
            pool.run(self.words.len().div_ceil(CHUNK_WORDS), &|chunk| {
                let end = self.words.len().min((chunk + 1) * CHUNK_WORDS);
                total.fetch_add(sum(&self.words[chunk * CHUNK_WORDS..end]), Ordering::Relaxed);
            });
            rates.push(bytes as f64 / started.elapsed().as_secs_f64());
            let right = total.into_inner() == self.expected;
            ensure!(right, "memory: a pass over {bytes} bytes summed wrongly");
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
}

fn sum(words: &[u64]) -> u64 {
    words.iter().fold(0, |sum, &word| sum.wrapping_add(word))
}

/// A tile that is multiplied by vectors again and again: the most that this engine gets out of the cores.
pub struct GemmProbe {
    tile: Tile,
    isa: Isa,
    arithmetic: Arithmetic,
}

impl GemmProbe {
    /// Checks the products before any is timed.
    ///
    /// # Errors
    /// A product that differs from the scalar kernel's.
    pub fn new(isa: Isa, arithmetic: Arithmetic) -> Result<Self> {
        let tile = Tile::new();
        let ours = tile.product(isa, arithmetic, CHECKED_VECTORS, 1);
        let theirs = tile.product(Isa::scalar(), arithmetic, CHECKED_VECTORS, 1);
        agree(isa, &ours, &theirs)?;
        Ok(Self { tile, isa, arithmetic })
    }

    /// Multiplies for so long, three times at least.
    pub fn measure(&self, pool: &Pool, time: Duration) -> GemmRate {
        let flops = (2 * TILE_ROWS * TILE_COLS * VECTORS * ROUNDS * pool.threads()) as f64;
        let mut rates = Vec::new();
        let begun = Instant::now();
        while rates.len() < 3 || begun.elapsed() < time {
            let started = Instant::now();
            pool.run(pool.threads(), &|_| {
                black_box(self.tile.product(self.isa, self.arithmetic, VECTORS, ROUNDS));
            });
            rates.push(flops / started.elapsed().as_secs_f64());
        }
        rates.sort_by(f64::total_cmp);
        GemmRate {
            threads: pool.threads(),
            isa: self.isa.name(),
            activations: self.arithmetic.name(),
            flops_per_second: rates[rates.len() - 1],
            flops_per_second_median: rates[rates.len() / 2],
        }
    }
}

/// Bytes a second of 4-bit weights that all threads multiply by one vector each, as decode does, on data in
/// the cache and in f32: at most so many of an expert's.
///
/// # Errors
/// A product that differs from the scalar kernel's.
pub fn expert_rate(pool: &Pool, isa: Isa, effort: Effort) -> Result<f64> {
    let tile = Tile::new();
    let x = inputs(1);
    let mut sums = [0.0; TILE_COLS / 64];
    isa.group_sums(&x, 64, &mut sums);
    let product = |isa: Isa, rounds| {
        let (w, mut y) = (tile.rows(), [0.0; TILE_ROWS]);
        for _ in 0..rounds {
            isa.mat_vec(&w, 0, black_box(&x), &sums, black_box(&mut y));
        }
        y
    };
    agree(isa, &product(isa, 1), &product(Isa::scalar(), 1))?;
    let bytes = (tile.bytes.len() * VECTORS * ROUNDS * pool.threads()) as f64;
    let mut best = 0.0f64;
    let begun = Instant::now();
    while best == 0.0 || begun.elapsed() < effort.each {
        let started = Instant::now();
        pool.run(pool.threads(), &|_| {
            black_box(product(isa, VECTORS * ROUNDS));
        });
        best = best.max(bytes / started.elapsed().as_secs_f64());
    }
    Ok(best)
}

/// Whether products are the scalar kernel's.
fn agree(isa: Isa, ours: &[f32], theirs: &[f32]) -> Result<()> {
    for (i, (ours, theirs)) in ours.iter().zip(theirs).enumerate() {
        ensure!(
            (ours - theirs).abs() < 1e-2,
            "product {i} on {}: {ours}, the scalar kernel says {theirs}",
            isa.name()
        );
    }
    Ok(())
}

/// So many vectors of a tile's columns.
fn inputs(vectors: usize) -> Vec<f32> {
    (0..vectors * TILE_COLS).map(|i| ((i * 29 % 83) as f32 - 41.0) / 32.0).collect()
}

/// Columns of the tile that is multiplied.
const TILE_COLS: usize = 512;
/// Vectors it is multiplied by: with them everything stays in the second-level cache.
const VECTORS: usize = 192;
/// Vectors for which the answer is checked.
const CHECKED_VECTORS: usize = 5;
/// Products in one timed pass of a thread.
const ROUNDS: usize = 64;

/// A tile of 4-bit weights.
struct Tile {
    format: Format,
    bytes: Vec<u8>,
}

impl Tile {
    fn new() -> Self {
        let format = Format::Affine { bits: 4, group: 64, scales: ScaleType::F32 };
        let mut bytes = Vec::new();
        let codes = (0..TILE_ROWS * TILE_COLS / 2).map(|i| (i * 37 % 251) as u8);
        bytes.extend(codes);
        let groups = TILE_ROWS * TILE_COLS / 64;
        bytes.extend((0..groups).flat_map(|i| (0.01 + (i % 7) as f32 / 1000.0).to_le_bytes()));
        bytes.extend((0..groups).flat_map(|i| ((i % 5) as f32 / -50.0).to_le_bytes()));
        Self { format, bytes }
    }

    fn rows(&self) -> Rows<'_> {
        let (codes, factors) = self.bytes.split_at(TILE_ROWS * TILE_COLS / 2);
        let (scales, biases) = factors.split_at(factors.len() / 2);
        Rows::new(self.format, TILE_ROWS, TILE_COLS, codes, scales, biases)
            .expect("a tile of whole groups")
    }

    /// The products with so many vectors, `[vectors][TILE_ROWS]`, formed `rounds` times.
    fn product(&self, isa: Isa, arithmetic: Arithmetic, vectors: usize, rounds: usize) -> Vec<f32> {
        let w = self.rows();
        let x = inputs(vectors);
        let mut y = vec![0.0; TILE_ROWS * vectors];
        let Some(layout) = FixedLayout::of(self.format).filter(|_| arithmetic != Arithmetic::Exact)
        else {
            let mut scratch = vec![0.0; 16 * TILE_COLS];
            for _ in 0..rounds {
                isa.mat_mul(&w, 0, black_box(&x), black_box(&mut y), &mut scratch);
            }
            return y;
        };
        let mut hi = vec![0; x.len()];
        let mut lo = vec![0; if arithmetic == Arithmetic::Fixed16 { x.len() } else { 0 }];
        let mut scales = vec![0.0; x.len() / layout.scale_group()];
        let mut sums = vec![0.0; x.len() / layout.sum_group()];
        let (hi, lo, scales, sums) = (&mut hi[..], &mut lo[..], &mut scales[..], &mut sums[..]);
        isa.fix(layout, &x, &mut FixedMut { hi, lo, scales, sums });
        let xs = Fixed { layout, hi, lo, scales, sums };
        let (mut codes, mut factors) =
            (vec![0; TILE_BYTES], vec![0.0; 2 * TILE_ROWS * TILE_COLS / 64]);
        let mut tile = TileMut { codes: &mut codes, factors: &mut factors };
        for _ in 0..rounds {
            isa.mat_mul_fixed(&w, 0, black_box(&xs), black_box(&mut y), &mut tile);
        }
        y
    }
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
        let words = MemoryProbe::new(&pool, MemoryProbe::bytes(32 << 20));
        let memory = words.measure(&pool, Effort::new(true).each).unwrap();
        assert_eq!((memory.threads, memory.bytes), (2, 4 << 20));
        assert!(memory.bytes_per_second >= memory.bytes_per_second_median);
        for isa in Isa::available() {
            assert!(expert_rate(&pool, isa, Effort::new(true)).unwrap() > 0.0);
            for arithmetic in [Arithmetic::Exact, Arithmetic::Fixed16, Arithmetic::Fast8] {
                let probe = GemmProbe::new(isa, arithmetic).unwrap();
                let rate = probe.measure(&pool, Effort::new(true).beside);
                assert!(rate.flops_per_second_median > 0.0);
                assert!(rate.flops_per_second >= rate.flops_per_second_median);
                assert_eq!((rate.threads, rate.activations), (2, arithmetic.name()));
            }
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
