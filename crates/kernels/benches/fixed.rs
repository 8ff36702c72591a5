//! Speed of the products in fixed point beside the limits of the machine in the same run.
//!
//! Prints one row a case: seconds are those of the thread, not of the wall, so that neighbours on
//! the same cores disturb little. Every case is first checked against the specification; `--test`
//! stops there. Limits: a loop that only reads, and a loop that only multiplies bytes.

#![allow(unsafe_code, reason = "loops of single instructions, for the limits")]

use std::hint::black_box;
use std::time::Duration;

use flash_moe_kernels::{
    Fixed, FixedLayout, FixedMut, Format, Isa, Rows, ScaleType, TILE_BYTES, TILE_ROWS, TileMut,
};

fn main() {
    let test = std::env::args().any(|argument| argument == "--test");
    check();
    if test {
        println!("answers agree; nothing timed");
        return;
    }
    // Arguments name instruction sets; without any, all but the specification are timed.
    let named: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with('-')).collect();
    let wanted = |isa: &Isa| match named.is_empty() {
        true => *isa != Isa::scalar(),
        false => named.iter().any(|name| name == isa.name()),
    };
    let isas: Vec<Isa> = Isa::available().filter(wanted).collect();
    vectors(&isas);
    matrices(&isas);
}

/// Weights, and a view of them as a list of matrices of one shape.
struct Weights {
    format: Format,
    rows: usize,
    cols: usize,
    bytes: Vec<u8>,
}

impl Weights {
    fn new(bits: u8, rows: usize, cols: usize, count: usize) -> Self {
        let format = Format::Affine { bits, group: 64, scales: ScaleType::Bf16 };
        let mut seed = 1u64;
        let mut next = || {
            seed = seed
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            seed >> 33
        };
        let (weight, scales) = (rows * format.row_bytes(cols), rows * format.scale_row_bytes(cols));
        let mut bytes = Vec::with_capacity(count * format.matrix_bytes(rows, cols));
        for _ in 0..count {
            bytes.extend((0..weight).map(|_| next() as u8));
            // Scales from 1 to 2 and biases from -2 to -1, in bf16.
            bytes.extend((0..scales / 2).flat_map(|_| [next() as u8 & 0x7f | 0x80, 0x3f]));
            bytes.extend((0..scales / 2).flat_map(|_| [next() as u8 & 0x7f | 0x80, 0xbf]));
        }
        Self { format, rows, cols, bytes }
    }

    fn count(&self) -> usize {
        self.bytes.len() / self.format.matrix_bytes(self.rows, self.cols)
    }

    fn matrix(&self, i: usize) -> Rows<'_> {
        let Self { format, rows, cols, bytes } = self;
        let len = format.matrix_bytes(*rows, *cols);
        let (weight, rest) = bytes[i * len..][..len].split_at(rows * format.row_bytes(*cols));
        let (scales, biases) = rest.split_at(rest.len() / 2);
        Rows::new(*format, *rows, *cols, weight, scales, biases).unwrap()
    }
}

/// Owned vectors in fixed point.
struct Vectors {
    layout: FixedLayout,
    hi: Vec<i8>,
    lo: Vec<i8>,
    scales: Vec<f32>,
    sums: Vec<f32>,
}

impl Vectors {
    fn new(isa: Isa, format: Format, x: &[f32], fast: bool) -> Self {
        let layout = FixedLayout::of(format).unwrap();
        let mut out = Self {
            layout,
            hi: vec![0; x.len()],
            lo: vec![0; if fast { 0 } else { x.len() }],
            scales: vec![0.0; x.len() / layout.scale_group()],
            sums: vec![0.0; x.len() / layout.sum_group()],
        };
        out.fix(isa, x);
        out
    }

    fn fix(&mut self, isa: Isa, x: &[f32]) {
        let Self { layout, hi, lo, scales, sums } = self;
        isa.fix(*layout, x, &mut FixedMut { hi, lo, scales, sums });
    }

    fn view(&self) -> Fixed<'_> {
        let Self { layout, hi, lo, scales, sums } = self;
        Fixed { layout: *layout, hi, lo, scales, sums }
    }
}

fn activations(n: usize) -> Vec<f32> {
    (0..n).map(|k| ((k * 7919 % 2003) as f32 - 1001.0) / 500.0).collect()
}

/// Scratch and result of a product with many vectors.
struct Product {
    codes: Vec<u8>,
    factors: Vec<f32>,
    y: Vec<f32>, // [tiles][tokens][TILE_ROWS]
    tokens: usize,
}

impl Product {
    fn new(w: &Weights, tokens: usize) -> Self {
        Self {
            codes: vec![0; TILE_BYTES],
            factors: vec![0.0; 2 * TILE_ROWS * w.cols / 64],
            y: vec![0.0; w.rows.next_multiple_of(TILE_ROWS) * tokens],
            tokens,
        }
    }

    fn multiply(&mut self, isa: Isa, w: &Rows, xs: &Vectors) {
        let mut tile = TileMut { codes: &mut self.codes, factors: &mut self.factors };
        for (i, y) in self.y.chunks_mut(self.tokens * TILE_ROWS).enumerate() {
            isa.mat_mul_fixed(w, i * TILE_ROWS, &xs.view(), y, &mut tile);
        }
    }
}

fn check() {
    for bits in [2, 3, 4, 5, 6, 8] {
        let weights = Weights::new(bits, 45, 320, 1);
        let (w, x) = (weights.matrix(0), activations(7 * 320));
        for fast in [false, true] {
            let xs = Vectors::new(Isa::scalar(), weights.format, &x, fast);
            let one = Vectors::new(Isa::scalar(), weights.format, &x[..320], fast);
            let (mut want, mut want_one) = (Product::new(&weights, 7), vec![0.0; 45]);
            want.multiply(Isa::scalar(), &w, &xs);
            Isa::scalar().mat_vec_fixed(&w, 0, &one.view(), &mut want_one);
            for isa in Isa::available() {
                let (mut got, mut got_one) = (Product::new(&weights, 7), vec![0.0; 45]);
                got.multiply(isa, &w, &xs);
                isa.mat_vec_fixed(&w, 0, &one.view(), &mut got_one);
                let tiles = got.y.iter().zip(&want.y).enumerate();
                let rows = tiles.filter(|(i, _)| i % TILE_ROWS < 45).map(|(_, pair)| pair);
                for (got, want) in rows.chain(got_one.iter().zip(&want_one)) {
                    let bound = f32::from(u8::MAX >> (8 - bits)) * 320.0 * 1e-5;
                    assert!((got - want).abs() <= bound, "{isa:?} {bits} bits: {got} for {want}");
                }
            }
        }
    }
}

/// Products with one vector: from memory and in cache, beside a loop that reads the same bytes.
fn vectors(isas: &[Isa]) {
    println!("one vector, one thread; GB/s of packed weights, scales and biases");
    println!(
        "{:>12} {:>5} {:>11} {:>6} {:>9} {:>8} {:>6} {:>8}",
        "isa", "bits", "shape", "form", "memory", "read", "part", "cached"
    );
    for (bits, rows, cols) in [
        (4, 512, 2048),
        (4, 2048, 512),
        (8, 512, 2048),
        (2, 512, 2048),
        (3, 512, 2048),
        (6, 512, 2048),
    ] {
        let one = Weights::new(bits, rows, cols, 1);
        let many = Weights::new(bits, rows, cols, (384 << 20) / one.bytes.len());
        // Rows that stay in the second-level cache.
        let few = (256 << 10) / (one.bytes.len() / rows);
        for &isa in isas {
            for form in ["f32", "16", "8"] {
                let x = activations(cols);
                let xs = Vectors::new(isa, one.format, &x, form == "8");
                let mut sums = vec![0.0; cols / 64];
                isa.group_sums(&x, 64, &mut sums);
                let mut y = vec![0.0; rows];
                let product = |w: &Rows, y: &mut [f32]| match form {
                    "f32" => isa.mat_vec(w, 0, &x, &sums, y),
                    _ => isa.mat_vec_fixed(w, 0, &xs.view(), y),
                };
                let w = one.matrix(0);
                let few = few.min(rows);
                let cached = best(40, || {
                    for _ in 0..20 {
                        product(&w, black_box(&mut y[..few]));
                    }
                });
                let cached_bytes = 20 * few * one.bytes.len() / rows;
                let (mut read_best, mut product_best) = (f64::MAX, f64::MAX);
                for _ in 0..5 {
                    product_best = product_best.min(thread_seconds(|| {
                        for i in 0..many.count() {
                            product(&many.matrix(i), black_box(&mut y));
                        }
                    }));
                    read_best = read_best.min(thread_seconds(|| {
                        black_box(read(&many.bytes));
                    }));
                }
                let (memory, read) = (
                    many.bytes.len() as f64 / product_best / 1e9,
                    many.bytes.len() as f64 / read_best / 1e9,
                );
                println!(
                    "{:>12} {bits:>5} {:>11} {form:>6} {memory:>9.1} {read:>8.1} {:>6.2} {:>8.1}",
                    isa.name(),
                    format!("{rows}x{cols}"),
                    memory / read,
                    cached_bytes as f64 / cached / 1e9,
                );
            }
        }
    }
}

/// Products with many vectors: byte products a second, beside a loop of nothing else.
fn matrices(isas: &[Isa]) {
    println!(
        "many vectors, one thread, 4 bits; ns a row and token; byte products (two a weight in 16 bits) as a part of the peak"
    );
    println!(
        "{:>12} {:>11} {:>6} {:>9} {:>9} {:>9} {:>9} {:>9}",
        "isa", "shape", "tokens", "16: ns", "part", "8: ns", "part", "f32: ns"
    );
    for (rows, cols) in [(512, 2048), (2048, 512), (4096, 2048)] {
        let weights = Weights::new(4, rows, cols, 1);
        let w = weights.matrix(0);
        for &isa in isas {
            for tokens in [1, 4, 16, 64, 512] {
                let repeat = (1024 / tokens).clamp(1, 32);
                let x = activations(tokens * cols);
                let mut cells = Vec::new();
                for fast in [false, true] {
                    let xs = Vectors::new(isa, weights.format, &x, fast);
                    let mut product = Product::new(&weights, tokens);
                    let seconds =
                        best(5, || (0..repeat).for_each(|_| product.multiply(isa, &w, &xs)));
                    let peak = 1.0 / best(5, || peak_block(isa)) * PEAK_PRODUCTS as f64;
                    let products =
                        (rows * cols * tokens * repeat * if fast { 1 } else { 2 }) as f64;
                    cells.push((
                        seconds / (rows * tokens * repeat) as f64 * 1e9,
                        products / seconds / peak,
                    ));
                }
                let mut row = vec![0.0; cols];
                let mut y = vec![0.0; rows * tokens];
                let plain = best(2, || {
                    for (r, y) in y.chunks_mut(tokens).enumerate() {
                        isa.unpack_row(&w, r, &mut row);
                        isa.dots(&row, &x, y);
                    }
                }) / (rows * tokens) as f64
                    * 1e9;
                println!(
                    "{:>12} {:>11} {tokens:>6} {:>9.1} {:>9.2} {:>9.1} {:>9.2} {plain:>9.1}",
                    isa.name(),
                    format!("{rows}x{cols}"),
                    cells[0].0,
                    cells[0].1,
                    cells[1].0,
                    cells[1].1,
                );
            }
        }
    }
    let mut xs =
        Vectors::new(isas[0], Weights::new(4, 1, 2048, 0).format, &activations(2048 * 64), false);
    for &isa in isas {
        let x = activations(2048 * 64);
        let seconds = best(10, || xs.fix(isa, &x));
        println!("{:>12} fix: {:.2} ns an element", isa.name(), seconds / x.len() as f64 * 1e9);
    }
}

/// Sums all bytes as words, with as little arithmetic as still reads them.
fn read(bytes: &[u8]) -> u64 {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") {
        // SAFETY: the line above found AVX2.
        return unsafe { read_avx2(bytes) };
    }
    bytes.as_chunks::<8>().0.iter().fold(0, |sum, word| sum ^ u64::from_le_bytes(*word))
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn read_avx2(bytes: &[u8]) -> u64 {
    let mut sums = [0u64; 32];
    for words in bytes.as_chunks::<256>().0 {
        for (sum, word) in sums.iter_mut().zip(words.as_chunks::<8>().0) {
            *sum ^= u64::from_le_bytes(*word);
        }
    }
    sums.iter().fold(0, |a, b| a ^ b)
}

/// Byte products of one call of `peak_block`.
const PEAK_PRODUCTS: usize = PEAK_TURNS * 12 * 64;
const PEAK_TURNS: usize = 200_000;

/// As many byte products in registers as the instruction set can issue.
fn peak_block(isa: Isa) {
    match isa.name() {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the instruction set of this name was detected.
        "avx512vnni" => unsafe { peak::vnni() },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the instruction set of this name was detected.
        "avx512" => unsafe { peak::avx512() },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the instruction set of this name was detected.
        "avx2" => unsafe { peak::avx2() },
        _ => {}
    }
}

#[cfg(target_arch = "x86_64")]
mod peak {
    use std::arch::x86_64::*;
    use std::hint::black_box;

    #[target_feature(enable = "avx512f,avx512vnni")]
    pub fn vnni() {
        let (q, x) = black_box((_mm512_set1_epi8(3), _mm512_set1_epi8(-5)));
        let mut sums = [_mm512_setzero_si512(); 12];
        for _ in 0..super::PEAK_TURNS {
            for sum in &mut sums {
                *sum = _mm512_dpbusd_epi32(*sum, q, x);
            }
        }
        black_box(sums);
    }

    #[target_feature(enable = "avx512f,avx512bw")]
    pub fn avx512() {
        let (x, ones) = black_box((_mm512_set1_epi8(-5), _mm512_set1_epi16(1)));
        let mut sums = [_mm512_setzero_si512(); 12];
        for _ in 0..super::PEAK_TURNS {
            for sum in &mut sums {
                *sum =
                    _mm512_add_epi32(*sum, _mm512_madd_epi16(_mm512_maddubs_epi16(*sum, x), ones));
            }
        }
        black_box(sums);
    }

    #[target_feature(enable = "avx2")]
    pub fn avx2() {
        let (x, ones) = black_box((_mm256_set1_epi8(-5), _mm256_set1_epi16(1)));
        let mut sums = [_mm256_setzero_si256(); 12];
        for _ in 0..2 * super::PEAK_TURNS {
            for sum in &mut sums {
                *sum =
                    _mm256_add_epi32(*sum, _mm256_madd_epi16(_mm256_maddubs_epi16(*sum, x), ones));
            }
        }
        black_box(sums);
    }
}

/// The least seconds of several turns.
fn best(turns: usize, mut work: impl FnMut()) -> f64 {
    (0..turns).map(|_| thread_seconds(&mut work)).fold(f64::MAX, f64::min)
}

/// Processor time of this thread.
fn thread_seconds(mut work: impl FnMut()) -> f64 {
    let start = thread_time();
    work();
    (thread_time() - start).as_secs_f64()
}

#[cfg(target_os = "linux")]
fn thread_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

#[cfg(not(target_os = "linux"))]
fn thread_time() -> Duration {
    static START: std::sync::OnceLock<std::time::Instant> = std::sync::OnceLock::new();
    START.get_or_init(std::time::Instant::now).elapsed()
}
