//! Bytes per second of the kernels on one thread: first the answer is checked, then it is timed.
//!
//!     cargo bench -p flash-moe-kernels                    every instruction set of this CPU
//!     cargo bench -p flash-moe-kernels -- avx2            one of them
//!     cargo bench -p flash-moe-kernels -- --test          only the checks
//!
//! "hot" matrices stay in the second-level cache and show the limit of the arithmetic; "cold" ones
//! are 256 MiB in turn and show memory. Each figure is the best of several samples, since other
//! work on the machine only ever adds time. The first row is a plain read of the cold bytes.

#[path = "../tests/random/mod.rs"]
mod random;

use std::hint::black_box;
use std::time::{Duration, Instant};

use flash_moe_kernels::{DeltaHead, Format, Isa, Rows, ScaleType};
use random::Random;

const COLD_BYTES: usize = 256 << 20;
const COLS: usize = 4096;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    let only_check = arguments.iter().any(|a| a == "--test");
    let named: Vec<Isa> = arguments.iter().filter_map(|a| Isa::parse(a)).collect();
    let isas = if named.is_empty() { Isa::available().collect() } else { named };

    let mut cold = if only_check { vec![] } else { bytes(COLD_BYTES) };
    if !only_check {
        report("read", "-", "cold", COLD_BYTES, || sum_of_words(&cold));
    }
    for isa in isas {
        for format in formats() {
            product(isa, format, &mut cold);
        }
        vectors(isa, only_check);
    }
}

fn formats() -> Vec<Format> {
    let affine = |bits, group, scales| Format::Affine { bits, group, scales };
    let mut out: Vec<Format> =
        [2, 3, 4, 5, 6, 8].map(|bits| affine(bits, 64, ScaleType::Bf16)).to_vec();
    out.extend([32, 128].map(|group| affine(4, group, ScaleType::Bf16)));
    out.extend([affine(4, 64, ScaleType::F16), Format::Bf16, Format::F16, Format::F32]);
    out
}

/// Checks a matrix-vector product, then times it hot and, if there are cold bytes, cold.
fn product(isa: Isa, format: Format, cold: &mut [u8]) {
    let rows = 262_144 / format.matrix_bytes(1, COLS);
    let x = floats(1, COLS);
    let group = if let Format::Affine { group, .. } = format { usize::from(group) } else { COLS };
    let mut sums = vec![0.0; COLS / group];
    isa.group_sums(&x, group, &mut sums);

    let hot = tame(format, bytes(format.matrix_bytes(rows, COLS)));
    let matrix = view(format, rows, &hot);
    let (mut y, mut want) = (vec![0.0; rows], vec![0.0; rows]);
    isa.mat_vec(&matrix, 0, &x, &sums, &mut y);
    Isa::scalar().mat_vec(&matrix, 0, &x, &sums, &mut want);
    let largest = want.iter().fold(0f32, |a, b| a.max(b.abs()));
    for (y, want) in y.iter().zip(&want) {
        assert!((y - want).abs() <= 1e-5 * largest, "{isa:?} {format:?}: {y} for {want}");
    }
    if cold.is_empty() {
        println!("ok {} {}", isa.name(), name(format));
        return;
    }
    report(&name(format), isa.name(), "hot", hot.len(), || {
        isa.mat_vec(&matrix, 0, black_box(&x), &sums, &mut y);
    });
    if isa == Isa::scalar() {
        return;
    }
    let whole = COLD_BYTES / hot.len();
    for copy in cold.chunks_exact_mut(hot.len()) {
        copy.copy_from_slice(&hot);
    }
    report(&name(format), isa.name(), "cold", whole * hot.len(), || {
        for bytes in cold.chunks_exact(hot.len()) {
            isa.mat_vec(&view(format, rows, bytes), 0, black_box(&x), &sums, &mut y);
        }
    });
}

/// Times operations on vectors of 4096 elements and one head of the delta rule.
fn vectors(isa: Isa, only_check: bool) {
    let (a, b) = (floats(2, COLS), floats(3, COLS));
    let xs = floats(4, 64 * COLS);
    let mut out = vec![0.0; COLS];
    let mut state = floats(5, 128 * 128);
    let (mut delta, mut head_out) = ([0.0; 128], [0.0; 128]);
    let mut step = || {
        isa.delta_step(&mut DeltaHead {
            state: &mut state,
            q: &a[..128],
            k: &b[..128],
            v: &a[128..256],
            decay: 0.9,
            beta: 1e-3,
            delta: &mut delta,
            out: &mut head_out,
        });
    };
    step();
    assert!(isa.dot(&a, &b).is_finite());
    if only_check {
        return;
    }
    let name = isa.name();
    report("delta_step 128x128, state", name, "hot", 4 * 128 * 128, step);
    let bytes = 4 * COLS;
    report("dot, both vectors", name, "hot", 2 * bytes, || isa.dot(black_box(&a), &b));
    report("dots of 64, the vectors", name, "hot", 64 * bytes, || {
        isa.dots(black_box(&a), &xs, &mut out[..64]);
    });
    report("axpy, the result", name, "hot", bytes, || isa.axpy(1e-9, &a, &mut out));
    report("rms_norm, the result", name, "hot", bytes, || isa.rms_norm(&a, &b, 1e-6, &mut out));
    report("silu_mul, the result", name, "hot", bytes, || isa.silu_mul(&a, &b, &mut out));
    report("softmax", name, "hot", bytes, || isa.softmax(&mut out));
}

/// Best of samples of at least 0.3 ms each within half a second.
fn report<T>(what: &str, isa: &str, place: &str, bytes: usize, mut run: impl FnMut() -> T) {
    let started = Instant::now();
    let mut best = f64::INFINITY;
    let mut repeats = 1;
    while started.elapsed() < Duration::from_millis(500) {
        let sample = Instant::now();
        for _ in 0..repeats {
            black_box(run());
        }
        let elapsed = sample.elapsed();
        best = best.min(elapsed.as_secs_f64() / f64::from(repeats));
        if elapsed < Duration::from_micros(300) {
            repeats *= 2;
        }
    }
    let gigabytes = bytes as f64 / best / 1e9;
    println!(
        "{what:28} {isa:7} {place:5} {bytes:10} B {:10.2} us {gigabytes:8.2} GB/s",
        best * 1e6
    );
}

fn name(format: Format) -> String {
    match format {
        Format::Affine { bits, group, scales } => format!("affine {bits} bits g{group} {scales:?}"),
        Format::Bf16 | Format::F16 | Format::F32 => format!("{format:?}"),
    }
}

fn view(format: Format, rows: usize, bytes: &[u8]) -> Rows<'_> {
    let (weight, affine) = bytes.split_at(rows * format.row_bytes(COLS));
    let (scales, biases) = affine.split_at(rows * format.scale_row_bytes(COLS));
    Rows::new(format, rows, COLS, weight, scales, biases).expect("bytes of this very shape")
}

/// Random bytes made moderate wherever they stand for floats: a subnormal would cost an assist.
fn tame(format: Format, mut bytes: Vec<u8>) -> Vec<u8> {
    let (width, floats_from) = match format {
        Format::Affine { scales, .. } => {
            let affine = 2 * format.scale_row_bytes(COLS);
            let rows = bytes.len() / format.matrix_bytes(1, COLS);
            (scales.bytes(), bytes.len() - rows * affine)
        }
        Format::Bf16 | Format::F16 => (2, 0),
        Format::F32 => (4, 0),
    };
    for float in bytes[floats_from..].chunks_exact_mut(width) {
        // An exponent that all three types understand as at most 2 and far from subnormal.
        float[width - 1] = float[width - 1] & 0x83 | 0x3c;
    }
    bytes
}

fn bytes(len: usize) -> Vec<u8> {
    let mut random = Random::new(6);
    (0..len / 8).flat_map(|_| random.next().to_le_bytes()).collect()
}

fn floats(seed: u64, n: usize) -> Vec<f32> {
    let mut random = Random::new(seed);
    (0..n).map(|_| (random.next() >> 40) as f32 / (1 << 23) as f32 - 1.0).collect()
}

fn sum_of_words(bytes: &[u8]) -> u64 {
    let words = bytes.as_chunks::<8>().0.iter();
    words.fold(0, |sum, word| sum.wrapping_add(u64::from_le_bytes(*word)))
}
