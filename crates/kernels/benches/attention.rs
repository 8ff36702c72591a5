//! Attention of one layer on one thread, page by page, beside a pass for each query head.
//!
//!     cargo bench -p flash-moe-kernels --bench attention                every instruction set
//!     cargo bench -p flash-moe-kernels --bench attention -- avx2        one of them
//!     cargo bench -p flash-moe-kernels --bench attention -- --test      only the checks
//!     cargo bench -p flash-moe-kernels --bench attention -- formats     the formats of the KV cache alone
//!
//! 16 query heads share 2 KV heads of 256. The two ways must agree before they are timed, in turns;
//! each time is the best of several, since other work on the machine only ever adds time. Limits of
//! the same run: a plain read of the very keys and values, and a loop of multiply-adds.

#![allow(unsafe_code, reason = "a loop of single instructions, for the limit")]

#[path = "attention/formats.rs"]
mod formats;
#[path = "../tests/random/mod.rs"]
mod random;

use std::hint::black_box;
use std::time::Instant;

use flash_moe_kernels::{Gathered, Isa, KvRows, Queries};
use random::Random;

const HEADS: usize = 16;
const KV_HEADS: usize = 2;
const GROUP: usize = HEADS / KV_HEADS;
const HEAD_DIM: usize = 256;
const PAGE: usize = 64;
/// Rows of one block of queries.
const BLOCK_ROWS: usize = 64;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    let only_check = arguments.iter().any(|a| a == "--test");
    let named: Vec<Isa> = arguments.iter().filter_map(|a| Isa::parse(a)).collect();
    let all = Isa::available().filter(|isa| *isa != Isa::scalar() || only_check);
    let isas: Vec<Isa> = if named.is_empty() { all.collect() } else { named };
    let most = if only_check { 300 } else { 32_768 };
    let cache = Cache::new(most);
    for isa in isas {
        if only_check {
            Case { cache: &cache, isa, positions: 300, tokens: 1 }.check();
            Case { cache: &cache, isa, positions: 70, tokens: 20 }.check();
            formats::run(isa, 256, true);
            println!("ok {}", isa.name());
            continue;
        }
        if arguments.iter().any(|a| a == "formats") {
            println!("{}", isa.name());
            [1024, 4096, 32_768].into_iter().for_each(|n| formats::run(isa, n, false));
            continue;
        }
        let peak = multiply_adds(isa);
        println!("{}: {:.1} GFLOP/s of multiply-adds", isa.name(), peak / 1e9);
        for (positions, tokens) in [(512, 1), (4096, 1), (32_768, 1), (512, 512), (4096, 64)] {
            let case = Case { cache: &cache, isa, positions, tokens };
            case.check();
            case.time(peak);
        }
    }
}

/// Keys and values, and queries for as many tokens as there are positions up to 512.
struct Cache {
    pages: Vec<[Aligned; 2]>, // [pages][keys, values][kv_heads][PAGE][head_dim]
    queries: Vec<f32>,        // [tokens][heads][head_dim], scaled
}

impl Cache {
    fn new(positions: usize) -> Self {
        let floats_in_page = KV_HEADS * PAGE * HEAD_DIM;
        let page = |i: usize| {
            [2 * i, 2 * i + 1].map(|seed| Aligned::of(&floats(seed as u64, floats_in_page)))
        };
        let mut queries = floats(1 << 40, positions.min(512) * HEADS * HEAD_DIM);
        Isa::detect().scale(1.0 / (HEAD_DIM as f32).sqrt(), &mut queries);
        Self { pages: (0..positions.div_ceil(PAGE)).map(page).collect(), queries }
    }

    /// One head of a page, its first positions.
    fn rows(&self, head: usize, page: usize, positions: usize) -> KvRows<'_> {
        let [keys, values] = self.pages[page].each_ref().map(Aligned::floats);
        let rows = head * PAGE * HEAD_DIM..(head * PAGE + positions) * HEAD_DIM;
        KvRows { keys: &keys[rows.clone()], values: &values[rows] }
    }
}

/// The last `tokens` of so many positions.
#[derive(Clone, Copy)]
struct Case<'a> {
    cache: &'a Cache,
    isa: Isa,
    positions: usize,
    tokens: usize,
}

impl Case<'_> {
    fn check(self) {
        let (mut got, mut want) = (self.output(), self.output());
        self.by_blocks(&mut Buffers::default(), &mut got);
        self.by_heads(&mut Vec::new(), &mut want);
        for (got, want) in got.iter().zip(&want) {
            assert!((got - want).abs() < 1e-5, "{:?}: {got} for {want}", self.isa);
        }
    }

    fn output(self) -> Vec<f32> {
        vec![0.0; self.tokens * HEADS * HEAD_DIM]
    }

    fn time(self, peak: f64) {
        let mut out = self.output();
        let (mut buffers, mut scores) = (Buffers::default(), Vec::new());
        let mut best = [f64::INFINITY; 3];
        let started = Instant::now();
        let mut rounds = 0;
        while rounds < 3 || started.elapsed().as_secs_f64() < 2.0 {
            best[0] = best[0].min(seconds(|| self.by_heads(&mut scores, &mut out)));
            best[1] = best[1].min(seconds(|| self.by_blocks(&mut buffers, &mut out)));
            best[2] = best[2].min(seconds(|| _ = black_box(self.read())));
            rounds += 1;
        }
        let before = self.positions - self.tokens;
        let pairs: usize = (before + 1..=self.positions).sum();
        let flops = (pairs * HEADS * 4 * HEAD_DIM) as f64;
        let megabytes = (self.positions * KV_HEADS * HEAD_DIM * 8) as f64 / 1e6;
        let [heads, blocks, read] = best.map(|seconds| seconds * 1e6);
        println!(
            "{:5} tokens of {:6} positions, {megabytes:6.1} MB: by head {heads:10.1} us, by block \
             {blocks:10.1} us ({:.1}x, {:5.1} GB/s, {:5.1} GFLOP/s); one read {read:8.1} us, \
             multiply-adds {:10.1} us",
            self.tokens,
            self.positions,
            heads / blocks,
            megabytes / blocks * 1e3,
            flops / blocks / 1e3,
            flops / peak * 1e6,
        );
    }

    /// Each query head for itself, with a row of scores for the whole context.
    fn by_heads(self, scores: &mut Vec<f32>, out: &mut [f32]) {
        scores.resize(self.positions, 0.0);
        for (i, out) in out.chunks_exact_mut(HEAD_DIM).enumerate() {
            let (token, head) = (i / HEADS, i % HEADS);
            let query = &self.cache.queries[i * HEAD_DIM..][..HEAD_DIM];
            let scores = &mut scores[..self.positions - self.tokens + token + 1];
            for (page, scores) in scores.chunks_mut(PAGE).enumerate() {
                let rows = self.cache.rows(head / GROUP, page, scores.len());
                self.isa.dots(query, rows.keys, scores);
            }
            self.isa.softmax(scores);
            out.fill(0.0);
            for (page, weights) in scores.chunks(PAGE).enumerate() {
                let rows = self.cache.rows(head / GROUP, page, weights.len());
                for (weight, value) in weights.iter().zip(rows.values.chunks_exact(HEAD_DIM)) {
                    self.isa.axpy(*weight, value, out);
                }
            }
        }
    }

    /// Blocks of query rows of one KV head, page by page.
    fn by_blocks(self, buffers: &mut Buffers, out: &mut [f32]) {
        let before = self.positions - self.tokens;
        for kv_head in 0..KV_HEADS {
            for first in (0..self.tokens * GROUP).step_by(BLOCK_ROWS) {
                let rows = BLOCK_ROWS.min(self.tokens * GROUP - first);
                let place = |row: usize| {
                    let (token, head) = ((first + row) / GROUP, (first + row) % GROUP);
                    (token * HEADS + kv_head * GROUP + head) * HEAD_DIM
                };
                buffers.sized(rows);
                for row in 0..rows {
                    buffers.queries.sized(rows * HEAD_DIM)[row * HEAD_DIM..][..HEAD_DIM]
                        .copy_from_slice(&self.cache.queries[place(row)..][..HEAD_DIM]);
                }
                let seen = |row: usize| before + (first + row) / GROUP + 1;
                buffers.attend(self, kv_head, &seen);
                for row in 0..rows {
                    let out = &mut out[place(row)..][..HEAD_DIM];
                    out.copy_from_slice(&buffers.mix.floats()[row * HEAD_DIM..][..HEAD_DIM]);
                    self.isa.scale(1.0 / buffers.sum[row], out);
                }
            }
        }
    }

    /// A plain read of everything that one pass needs.
    fn read(self) -> f32 {
        let mut sums = [0.0; 64];
        for [keys, values] in &self.cache.pages[..self.positions / PAGE] {
            for x in keys.floats().as_chunks().0.iter().chain(values.floats().as_chunks().0) {
                add(x, &mut sums);
            }
        }
        sums.iter().sum()
    }
}

fn add(x: &[f32; 64], sums: &mut [f32; 64]) {
    for (sum, x) in sums.iter_mut().zip(x) {
        *sum += x;
    }
}

/// Floats that start at a cache line.
#[derive(Default)]
struct Aligned {
    floats: Vec<f32>,
    len: usize,
}

impl Aligned {
    fn of(x: &[f32]) -> Self {
        let mut out = Self::default();
        out.sized(x.len()).copy_from_slice(x);
        out
    }

    fn sized(&mut self, len: usize) -> &mut [f32] {
        self.floats.resize(len + 15, 0.0);
        self.len = len;
        let start = self.floats.as_ptr().align_offset(64);
        &mut self.floats[start..][..len]
    }

    fn floats(&self) -> &[f32] {
        &self.floats[self.floats.as_ptr().align_offset(64)..][..self.len]
    }
}

/// Buffers of one block.
#[derive(Default)]
struct Buffers {
    queries: Aligned,    // [rows][head_dim]
    visible: Vec<usize>, // [rows]
    max: Vec<f32>,       // [rows]
    sum: Vec<f32>,       // [rows]
    mix: Aligned,        // [rows][head_dim]
    scores: Vec<f32>,    // [rows][PAGE]
}

impl Buffers {
    fn sized(&mut self, rows: usize) {
        self.visible.resize(rows, 0);
        for floats in [&mut self.max, &mut self.sum] {
            floats.resize(rows, 0.0);
        }
        self.scores.resize(rows * PAGE, 0.0);
    }

    fn attend(&mut self, case: Case, kv_head: usize, seen: &dyn Fn(usize) -> usize) {
        let Self { queries, visible, max, sum, mix, scores } = self;
        let rows = visible.len();
        let mut gathered = Gathered { max, sum, mix: mix.sized(rows * HEAD_DIM) };
        gathered.clear();
        let last = seen(rows - 1);
        for page in 0..last.div_ceil(PAGE) {
            let positions = PAGE.min(last - page * PAGE);
            for (row, visible) in visible.iter_mut().enumerate() {
                *visible = seen(row).saturating_sub(page * PAGE).min(positions);
            }
            let page = case.cache.rows(kv_head, page, positions);
            let queries = Queries { rows: queries.floats(), visible };
            case.isa.attend(&page, &queries, &mut gathered, &mut scores[..rows * positions]);
        }
    }
}

fn seconds(run: impl FnOnce()) -> f64 {
    let started = Instant::now();
    run();
    started.elapsed().as_secs_f64()
}

/// Operations a second of multiply-adds on registers, two for each.
fn multiply_adds(isa: Isa) -> f64 {
    let run: (fn(usize), usize) = match isa.name() {
        // SAFETY: an `Isa` of this name exists only if the CPU has the instructions.
        #[cfg(target_arch = "x86_64")]
        "avx2" => (|turns| unsafe { chains_of_8(turns) }, 8),
        // SAFETY: an `Isa` of this name exists only if the CPU has the instructions.
        #[cfg(target_arch = "x86_64")]
        "avx512" | "avx512vnni" => (|turns| unsafe { chains_of_16(turns) }, 16),
        _ => return f64::NAN,
    };
    let turns = 1_000_000;
    let best = (0..20).map(|_| seconds(|| run.0(turns))).fold(f64::INFINITY, f64::min);
    (2 * turns * CHAINS * run.1) as f64 / best
}

const CHAINS: usize = 12;

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn chains_of_8(turns: usize) {
    use std::arch::x86_64::*;
    let mut sums = [_mm256_set1_ps(0.0); CHAINS];
    let factor = _mm256_set1_ps(black_box(0.5));
    for _ in 0..turns {
        for sum in &mut sums {
            *sum = _mm256_fmadd_ps(*sum, factor, factor);
        }
    }
    black_box(sums);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn chains_of_16(turns: usize) {
    use std::arch::x86_64::*;
    let mut sums = [_mm512_set1_ps(0.0); CHAINS];
    let factor = _mm512_set1_ps(black_box(0.5));
    for _ in 0..turns {
        for sum in &mut sums {
            *sum = _mm512_fmadd_ps(*sum, factor, factor);
        }
    }
    black_box(sums);
}

/// Numbers from -1 to 1.
fn floats(seed: u64, n: usize) -> Vec<f32> {
    let mut random = Random::new(seed);
    (0..n).map(|_| (random.next() >> 40) as f32 / (1 << 23) as f32 - 1.0).collect()
}
