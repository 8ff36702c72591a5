//! Every variant against the specification, and the specification against f64.
//!
//! Lengths are 0, 1, B - 1, B, B + 1 and 31 * B for the register widths and block sizes B in use.
//! Tolerances are relative to the sum of magnitudes that enters a result, so that cancellation
//! neither hides nor invents an error. Seeds are fixed.

mod random;

use flash_moe_kernels::{DeltaHead, Format, Isa, Rows, ScaleType, f32_to_bf16, f32_to_f16};
use proptest::prelude::*;
use proptest::test_runner::RngSeed;
use random::Random;

/// Sums of up to a few thousand products, in f32 in another order.
const SUM: f32 = 2e-6;
/// A handful of roundings an element, exp among them.
const ELEMENT: f32 = 1e-6;

const LENGTHS: [usize; 20] =
    [0, 1, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 124, 248, 1984];
const BITS: [u8; 6] = [2, 3, 4, 5, 6, 8];
const GROUPS: [u16; 3] = [32, 64, 128];
const SCALES: [ScaleType; 3] = [ScaleType::Bf16, ScaleType::F16, ScaleType::F32];

#[test]
fn products_of_vectors_agree() {
    each(|isa, n| {
        let (a, b) = (floats(1, n), floats(2, n));
        let magnitude = magnitude(&a, &b);
        let want = Isa::scalar().dot(&a, &b);
        close(&[isa.dot(&a, &b)], &[want], SUM * magnitude, &format!("{isa:?} dot {n}"));
        for count in [0, 1, 3, 4, 5, 9] {
            let xs = floats(3, n * count);
            let (mut got, mut want) = (vec![9.0; count], vec![9.0; count]);
            isa.dots(&a, &xs, &mut got);
            Isa::scalar().dots(&a, &xs, &mut want);
            close(&got, &want, SUM * (n as f32 + 1.0), &format!("{isa:?} dots {n} x {count}"));
        }
        for group in [1, 5, 8, 32, 64, 128] {
            let x = floats(4, n * group);
            let (mut got, mut want) = (vec![9.0; n], vec![9.0; n]);
            isa.group_sums(&x, group, &mut got);
            Isa::scalar().group_sums(&x, group, &mut want);
            close(&got, &want, SUM * group as f32, &format!("{isa:?} group_sums {n} of {group}"));
        }
    });
}

#[test]
fn operations_on_vectors_agree() {
    each(|isa, n| {
        let [a, b, c, d] = [5, 6, 7, 8].map(|seed| floats(seed, n));
        let same = |name: &str, operation: &dyn Fn(Isa, &mut [f32])| {
            let (mut got, mut want) = (d.clone(), d.clone());
            operation(isa, &mut got);
            operation(Isa::scalar(), &mut want);
            close(&got, &want, ELEMENT, &format!("{isa:?} {name} {n}"));
        };
        same("axpy", &|isa, y| isa.axpy(0.7, &a, y));
        same("scale", &|isa, y| isa.scale(0.7, y));
        same("add", &|isa, y| isa.add(&a, y));
        same("rms_norm", &|isa, y| isa.rms_norm(&a, &b, 1e-6, y));
        same("l2_norm", &|isa, y| isa.l2_norm(y, 1e-6, 0.3));
        same("gated_norm", &|isa, y| isa.gated_norm(y, &a, &b, 1e-6));
        same("softmax", &|isa, y| isa.softmax(y));
        same("silu", &|isa, y| isa.silu(y));
        same("silu_mul", &|isa, y| isa.silu_mul(&a, &b, y));
        same("sigmoid_mul", &|isa, y| isa.sigmoid_mul(&a, y));
        same("conv4", &|isa, y| isa.conv4([&a, &b, &c, &a], [&b, &c, &a, &b], y));
        for pairs in [0, 1, 4, 5, 16, 32, n / 2] {
            if pairs <= n / 2 {
                let (cos, sin) = (floats(9, pairs), floats(10, pairs));
                same("rope", &|isa, y| isa.rope(y, &cos, &sin));
            }
        }
    });
}

#[test]
fn delta_step_agrees_and_follows_its_definition() {
    for (dk, dv) in
        [(1, 1), (3, 5), (4, 16), (7, 31), (16, 33), (128, 128), (64, 137), (0, 8), (5, 0)]
    {
        let [q, k] = [11, 12].map(|seed| floats(seed, dk));
        let (v, start) = (floats(13, dv), floats(14, dk * dv));
        let (decay, beta) = (0.83, 0.41);
        let (want_state, want_out) = delta_in_f64(&start, &q, &k, &v, decay, beta);
        for isa in Isa::available() {
            let mut state = start.clone();
            let (mut delta, mut out) = (vec![9.0; dv], vec![9.0; dv]);
            isa.delta_step(&mut DeltaHead {
                state: &mut state,
                q: &q,
                k: &k,
                v: &v,
                decay,
                beta,
                delta: &mut delta,
                out: &mut out,
            });
            // Each value of the result is a sum over dk terms of magnitude about one, twice over.
            let tolerance = 1e-6 * (dk as f32 + 1.0);
            close(&state, &want_state, tolerance, &format!("{isa:?} state {dk} x {dv}"));
            close(&out, &want_out, tolerance * 4.0, &format!("{isa:?} out {dk} x {dv}"));
        }
    }
}

#[test]
fn added_products_agree() {
    for (rows, depth, stride, width) in [
        (1, 1, 1, 1),
        (3, 5, 5, 7),
        (4, 16, 20, 16),
        (5, 17, 64, 65),
        (17, 33, 33, 24),
        (64, 60, 64, 128),
        (128, 64, 64, 137),
    ] {
        let (a, b) = (floats(31, (rows - 1) * stride + depth), floats(32, depth * width));
        let start = floats(33, rows * width);
        let mut want = start.clone();
        for (i, want) in want.iter_mut().enumerate() {
            let (row, column) = (i / width, i % width);
            let sum = |p: usize| f64::from(a[row * stride + p]) * f64::from(b[p * width + column]);
            *want = (f64::from(*want) + (0..depth).map(sum).sum::<f64>()) as f32;
        }
        for isa in Isa::available() {
            let mut got = start.clone();
            isa.add_product((&a, stride), (&b, width), &mut got);
            let label = format!("{isa:?} {rows} x {depth} of {stride} x {width}");
            close(&got, &want, SUM * (depth as f32 + 1.0), &label);
        }
    }
}

#[test]
fn products_of_matrices_agree_in_every_format() {
    for format in formats() {
        for cols in columns(format) {
            let up = Matrix::random(format, 6, cols, 15);
            let gate = Matrix::random(Format::Bf16, 6, cols, 16);
            let x = floats(17, cols);
            let sums = group_sums(format, &x);
            let want = up.times(&x);
            let magnitudes = up.magnitudes(&x);
            for isa in Isa::available() {
                let label = format!("{isa:?} {format:?} {cols} columns");
                let mut y = [9.0; 6];
                isa.mat_vec(&up.rows(), 0, &x, &sums, &mut y);
                for ((y, want), magnitude) in y.iter().zip(&want).zip(&magnitudes) {
                    close(&[*y], &[*want as f32], SUM * *magnitude as f32, &label);
                }
                let (mut got, mut spec) = ([9.0; 5], [9.0; 5]);
                isa.gate_up(&gate.rows(), &up.rows(), 1, &x, (&[], &sums), &mut got);
                Isa::scalar().gate_up(&gate.rows(), &up.rows(), 1, &x, (&[], &sums), &mut spec);
                let bound =
                    gate.magnitudes(&x).iter().chain(&magnitudes).fold(1.0, |a: f64, b| a.max(*b));
                close(&got, &spec, SUM * (bound * bound) as f32, &format!("gate_up {label}"));
            }
        }
    }
}

#[test]
fn unpacked_rows_are_bit_identical() {
    for format in formats() {
        for cols in columns(format) {
            let matrix = Matrix::random(format, 3, cols, 18);
            for isa in Isa::available() {
                for row in 0..3 {
                    let mut out = vec![9.0; cols];
                    isa.unpack_row(&matrix.rows(), row, &mut out);
                    let want: Vec<f32> = (0..cols).map(|k| matrix.weight_f32(row, k)).collect();
                    assert_eq!(out, want, "{isa:?} {format:?} {cols} columns, row {row}");
                }
            }
        }
    }
}

#[test]
fn a_row_does_not_depend_on_how_rows_are_split() {
    for format in formats() {
        let cols = 256;
        let (gate, up) =
            (Matrix::random(format, 97, cols, 19), Matrix::random(format, 97, cols, 20));
        let x = floats(21, cols);
        let sums = group_sums(format, &x);
        let both = (&sums[..], &sums[..]);
        for isa in Isa::available() {
            let (mut whole, mut whole_gated) = ([0.0; 97], [0.0; 97]);
            isa.mat_vec(&up.rows(), 0, &x, &sums, &mut whole);
            isa.gate_up(&gate.rows(), &up.rows(), 0, &x, both, &mut whole_gated);
            for part in [1, 2, 3, 7, 64, 65] {
                let (mut split, mut split_gated) = ([0.0; 97], [0.0; 97]);
                for (i, y) in split.chunks_mut(part).enumerate() {
                    isa.mat_vec(&up.rows(), i * part, &x, &sums, y);
                }
                for (i, y) in split_gated.chunks_mut(part).enumerate() {
                    isa.gate_up(&gate.rows(), &up.rows(), i * part, &x, both, y);
                }
                assert_eq!(bits(&split), bits(&whole), "{isa:?} {format:?} by {part}");
                assert_eq!(bits(&split_gated), bits(&whole_gated), "{isa:?} {format:?} by {part}");
            }
        }
    }
}

#[test]
fn dots_do_not_depend_on_the_number_of_vectors() {
    for isa in Isa::available() {
        for cols in [1, 31, 64, 100, 256] {
            let (row, xs) = (floats(22, cols), floats(23, cols * 11));
            let mut all = [0.0; 11];
            isa.dots(&row, &xs, &mut all);
            for i in 0..11 {
                let mut one = [0.0];
                isa.dots(&row, &xs[i * cols..][..cols], &mut one);
                assert_eq!(one[0].to_bits(), all[i].to_bits(), "{isa:?} {cols} columns, {i}");
            }
        }
    }
}

#[test]
fn many_rows_times_many_vectors_are_unpack_and_dots() {
    for format in formats() {
        let cols = if let Format::Affine { group, .. } = format { usize::from(group) } else { 75 };
        let matrix = Matrix::random(format, 11, cols, 26);
        for isa in Isa::available() {
            for (tokens, held) in [(1, 1), (2, 3), (3, 16), (7, 4), (9, 5)] {
                let xs = floats(27, tokens * cols);
                let (mut got, mut want) = (vec![9.0; 9 * tokens], vec![9.0; 9 * tokens]);
                let mut row = vec![0.0; cols];
                for (r, y) in want.chunks_mut(tokens).enumerate() {
                    isa.unpack_row(&matrix.rows(), 2 + r, &mut row);
                    isa.dots(&row, &xs, y);
                }
                isa.mat_mul(&matrix.rows(), 2, &xs, &mut got, &mut vec![9.0; held * cols]);
                assert_eq!(bits(&got), bits(&want), "{isa:?} {format:?} {tokens} tokens");
            }
        }
    }
}

#[test]
fn an_element_does_not_depend_on_its_position() {
    for isa in Isa::available() {
        let (a, b) = (floats(24, 100), floats(25, 100));
        let operation = |a: &[f32], b: &[f32]| {
            let mut out = vec![0.0; a.len()];
            isa.silu_mul(a, b, &mut out);
            isa.sigmoid_mul(b, &mut out);
            isa.axpy(0.3, a, &mut out);
            isa.conv4([a, b, a, b], [b, &out.clone(), b, a], &mut out);
            out
        };
        let whole = operation(&a, &b);
        for i in 0..100 {
            let one = operation(&a[i..=i], &b[i..=i]);
            assert_eq!(one[0].to_bits(), whole[i].to_bits(), "{isa:?} element {i}");
        }
    }
}

#[test]
fn exp_is_right_to_its_ends() {
    for isa in Isa::available() {
        // softmax of [0, x] shows exp(x) for negative x, down to where it is subnormal.
        let mut worst = 0f64;
        for step in 0..20_000 {
            let x = step as f32 * -0.005;
            let mut pair = [0.0, x];
            isa.softmax(&mut pair);
            let want = f64::from(x).exp() / (1.0 + f64::from(x).exp());
            let error = (f64::from(pair[1]) - want).abs();
            // Below the normal range an f32 has steps of 2^-149.
            worst = worst.max((error - 2f64.powi(-149)).max(0.0) / want);
        }
        assert!(worst < 4e-7, "{isa:?}: relative error {worst:e}");

        let mut x = [-1e30, -1000.0, -89.0, 0.0, 1000.0, 1e30, f32::INFINITY, f32::NAN];
        isa.silu(&mut x);
        assert_eq!(x[..2], [0.0, 0.0], "{isa:?}");
        assert!((-1e-36..=0.0).contains(&x[2]), "{isa:?}: {}", x[2]);
        assert_eq!(x[3..7], [0.0, 1000.0, 1e30, f32::INFINITY], "{isa:?}");
        assert!(x[7].is_nan(), "{isa:?}");

        let mut x = [1.0; 8];
        let gate = [f32::NEG_INFINITY, -3e38, -200.0, 0.0, 200.0, 3e38, f32::INFINITY, f32::NAN];
        isa.sigmoid_mul(&gate, &mut x);
        assert_eq!(x[..7], [0.0, 0.0, 0.0, 0.5, 1.0, 1.0, 1.0], "{isa:?}");
        assert!(x[7].is_nan(), "{isa:?}");

        let mut x = [f32::NEG_INFINITY, 3.0, -3e38, 3e38];
        isa.softmax(&mut x);
        assert_eq!(x, [0.0, 0.0, 0.0, 1.0], "{isa:?}");
        isa.softmax(&mut []);
    }
}

#[test]
fn softmax_finds_its_maximum_at_every_place() {
    for isa in Isa::available() {
        for n in [1, 5, 16, 40] {
            for place in 0..n {
                let mut x = vec![0.0; n];
                x[place] = 1000.0;
                isa.softmax(&mut x);
                let want: Vec<f32> = (0..n).map(|i| f32::from(i == place)).collect();
                assert_eq!(x, want, "{isa:?} {n} elements");
            }
        }
    }
}

#[test]
fn a_wrong_length_panics_before_any_variant_runs() {
    let bytes = [0; 4 * 32];
    let matrix = Rows::new(Format::F32, 4, 8, &bytes, &[], &[]).unwrap();
    let (weight, scales) = ([0; 2 * 16], [0; 2 * 2]);
    let format = Format::Affine { bits: 4, group: 32, scales: ScaleType::Bf16 };
    let affine = Rows::new(format, 2, 32, &weight, &scales, &scales).unwrap();
    let (x, mut y) = (floats(27, 32), [0.0; 32]);
    let isa = Isa::detect();
    let mut refused = |name: &str, call: &mut dyn FnMut(&mut [f32])| {
        let call = std::panic::AssertUnwindSafe(|| call(&mut y));
        assert!(std::panic::catch_unwind(call).is_err(), "{name}");
    };
    refused("group_sums", &mut |y| isa.group_sums(&x[..31], 8, &mut y[..4]));
    refused("group of none", &mut |y| isa.group_sums(&[], 0, &mut y[..4]));
    refused("columns", &mut |y| isa.mat_vec(&matrix, 0, &x[..7], &[], &mut y[..4]));
    refused("rows", &mut |y| isa.mat_vec(&matrix, 0, &x[..8], &[], &mut y[..5]));
    refused("first row", &mut |y| isa.mat_vec(&matrix, usize::MAX, &x[..8], &[], &mut y[..1]));
    refused("sums", &mut |y| isa.mat_vec(&affine, 0, &x, &[], &mut y[..2]));
    refused("up rows", &mut |y| isa.gate_up(&matrix, &affine, 0, &x[..8], (&[], &[]), &mut y[..2]));
    refused("gate rows", &mut |y| isa.gate_up(&affine, &matrix, 0, &x, (&[0.0], &[]), &mut y[..2]));
    refused("no such row", &mut |y| isa.unpack_row(&matrix, 4, &mut y[..8]));
    refused("row length", &mut |y| isa.unpack_row(&matrix, 3, &mut y[..9]));
    refused("dot", &mut |_| _ = isa.dot(&x, &x[1..]));
    refused("dots", &mut |y| isa.dots(&x[..5], &x[..9], &mut y[..2]));
    refused("axpy", &mut |y| isa.axpy(1.0, &x[..4], &mut y[..5]));
    refused("add", &mut |y| isa.add(&x[..4], &mut y[..5]));
    refused("rms_norm x", &mut |y| isa.rms_norm(&x[..4], &x[..5], 0.1, &mut y[..5]));
    refused("rms_norm w", &mut |y| isa.rms_norm(&x[..5], &x[..4], 0.1, &mut y[..5]));
    refused("gated_norm w", &mut |y| isa.gated_norm(&mut y[..5], &x[..4], &x[..5], 0.1));
    refused("gated_norm z", &mut |y| isa.gated_norm(&mut y[..5], &x[..5], &x[..4], 0.1));
    refused("silu_mul gate", &mut |y| isa.silu_mul(&x[..4], &x[..5], &mut y[..5]));
    refused("silu_mul up", &mut |y| isa.silu_mul(&x[..5], &x[..4], &mut y[..5]));
    refused("sigmoid_mul", &mut |y| isa.sigmoid_mul(&x[..4], &mut y[..5]));
    refused("rope sin", &mut |y| isa.rope(&mut y[..8], &x[..4], &x[..3]));
    refused("rope x", &mut |y| isa.rope(&mut y[..7], &x[..4], &x[..4]));
    let four = [&x[..5]; 4];
    refused("conv4 u", &mut |y| isa.conv4(four, [&x[..5], &x[..5], &x[..5], &x[..4]], &mut y[..5]));
    refused("conv4 w", &mut |y| isa.conv4([&x[..6], &x[..5], &x[..5], &x[..5]], four, &mut y[..5]));
}

#[test]
fn every_finite_f16_widens_exactly() {
    // One row a value, sixteen and more copies of it, times a vector that picks one place.
    let values: Vec<u16> = (0..=u16::MAX).filter(|b| b & 0x7c00 != 0x7c00).collect();
    let cols = 21;
    let weight: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes().repeat(cols)).collect();
    let rows = Rows::new(Format::F16, values.len(), cols, &weight, &[], &[]).unwrap();
    for isa in Isa::available() {
        for place in [0, 7, 20] {
            let mut x = vec![0.0; cols];
            x[place] = 1.0;
            let mut y = vec![0.0; values.len()];
            isa.mat_vec(&rows, 0, &x, &[], &mut y);
            for (y, &v) in y.iter().zip(&values) {
                assert_eq!(*y, half::f16::from_bits(v).to_f32(), "{isa:?} {v:#06x} at {place}");
            }
        }
    }
}

#[test]
fn an_absent_instruction_set_has_no_name() {
    for isa in Isa::available() {
        assert_eq!(Isa::parse(isa.name()), Some(isa));
    }
    assert!(Isa::available().any(|isa| isa == Isa::detect()));
    assert_eq!(Isa::parse("scalar"), Some(Isa::scalar()));
    assert_eq!(Isa::parse("avx1024"), None);
    let foreign = if cfg!(target_arch = "aarch64") { "avx2" } else { "neon" };
    assert_eq!(Isa::parse(foreign), None);
    // Otherwise the tests of this file would compare the specification with itself.
    if cfg!(target_arch = "aarch64") {
        assert!(Isa::detect().name().starts_with("neon"));
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 300,
        failure_persistence: None,
        rng_seed: RngSeed::Fixed(26),
        ..ProptestConfig::default()
    })]

    #[test]
    fn any_matrix_at_any_alignment_gives_its_product(
        format in proptest::sample::select(formats()),
        rows in 1usize..9,
        cols in 1usize..9,
        offset in 0usize..8,
        seed in any::<u64>(),
    ) {
        let group = if let Format::Affine { group, .. } = format { usize::from(group) } else { 29 };
        let cols = cols * group;
        let matrix = Matrix::random(format, rows, cols, seed);
        let shifted = |bytes: &[u8]| [&vec![0xff; offset][..], bytes].concat();
        let (w, s, b) = (shifted(&matrix.weight), shifted(&matrix.scales), shifted(&matrix.biases));
        let view = Rows::new(format, rows, cols, &w[offset..], &s[offset..], &b[offset..]).unwrap();
        let x = floats(seed ^ 1, cols);
        let sums = group_sums(format, &x);
        let (want, magnitudes) = (matrix.times(&x), matrix.magnitudes(&x));
        for isa in Isa::available() {
            let mut y = vec![0.0; rows];
            isa.mat_vec(&view, 0, &x, &sums, &mut y);
            for i in 0..rows {
                let error = (f64::from(y[i]) - want[i]).abs();
                prop_assert!(
                    error <= f64::from(SUM) * magnitudes[i],
                    "{:?} row {}: {} for {}", isa, i, y[i], want[i]
                );
            }
        }
    }
}

/// A matrix of random bytes with moderate scales, and its weights read one bit at a time.
struct Matrix {
    format: Format,
    rows: usize,
    cols: usize,
    weight: Vec<u8>,
    scales: Vec<u8>,
    biases: Vec<u8>,
}

impl Matrix {
    fn random(format: Format, rows: usize, cols: usize, seed: u64) -> Self {
        let mut random = Random::new(seed);
        let (weight, scales, biases) = match format {
            Format::Affine { scales, .. } => {
                let weight =
                    (0..rows * format.row_bytes(cols)).map(|_| random.next() as u8).collect();
                let count = rows * format.scale_row_bytes(cols) / scales.bytes();
                (weight, narrow(scales, seed ^ 2, count), narrow(scales, seed ^ 3, count))
            }
            Format::Bf16 => (narrow(ScaleType::Bf16, seed, rows * cols), vec![], vec![]),
            Format::F16 => (narrow(ScaleType::F16, seed, rows * cols), vec![], vec![]),
            Format::F32 => (narrow(ScaleType::F32, seed, rows * cols), vec![], vec![]),
        };
        Self { format, rows, cols, weight, scales, biases }
    }

    fn rows(&self) -> Rows<'_> {
        let Self { format, rows, cols, weight, scales, biases } = self;
        Rows::new(*format, *rows, *cols, weight, scales, biases).unwrap()
    }

    /// Quantised integer (1 for plain formats), scale and bias of one weight.
    fn parts(&self, row: usize, k: usize) -> (f32, f32, f32) {
        let at = row * self.cols + k;
        match self.format {
            Format::Affine { bits, group, scales } => {
                let start = row * self.format.row_bytes(self.cols) * 8 + k * usize::from(bits);
                let bit = |b: usize| u32::from(self.weight[b / 8]) >> (b % 8) & 1;
                let q: u32 = (0..usize::from(bits)).map(|b| bit(start + b) << b).sum();
                let g = at / usize::from(group);
                (q as f32, widened(scales, &self.scales, g), widened(scales, &self.biases, g))
            }
            Format::Bf16 => (1.0, widened(ScaleType::Bf16, &self.weight, at), 0.0),
            Format::F16 => (1.0, widened(ScaleType::F16, &self.weight, at), 0.0),
            Format::F32 => (1.0, widened(ScaleType::F32, &self.weight, at), 0.0),
        }
    }

    fn weight_f32(&self, row: usize, k: usize) -> f32 {
        let (q, scale, bias) = self.parts(row, k);
        scale * q + bias
    }

    /// The product in f64.
    fn times(&self, x: &[f32]) -> Vec<f64> {
        self.each_row(x, |q, scale, bias, x| (scale * q + bias) * x)
    }

    /// The sum of the magnitudes of everything that is added up.
    fn magnitudes(&self, x: &[f32]) -> Vec<f64> {
        self.each_row(x, |q, scale, bias, x| ((scale * q).abs() + bias.abs()) * x.abs())
    }

    fn each_row(&self, x: &[f32], term: impl Fn(f64, f64, f64, f64) -> f64) -> Vec<f64> {
        let of_row = |row| {
            let term = |(k, x): (usize, &f32)| {
                let (q, scale, bias) = self.parts(row, k);
                term(q.into(), scale.into(), bias.into(), (*x).into())
            };
            x.iter().enumerate().map(term).sum()
        };
        (0..self.rows).map(of_row).collect()
    }
}

fn delta_in_f64(
    state: &[f32],
    q: &[f32],
    k: &[f32],
    v: &[f32],
    decay: f32,
    beta: f32,
) -> (Vec<f32>, Vec<f32>) {
    let (dk, dv) = (k.len(), v.len());
    let mut s: Vec<f64> = state.iter().map(|s| f64::from(*s) * f64::from(decay)).collect();
    let mut out = vec![0.0; dv];
    for c in 0..dv {
        let seen: f64 = (0..dk).map(|i| s[i * dv + c] * f64::from(k[i])).sum();
        let delta = f64::from(beta) * (f64::from(v[c]) - seen);
        for i in 0..dk {
            s[i * dv + c] += f64::from(k[i]) * delta;
            out[c] += s[i * dv + c] * f64::from(q[i]);
        }
    }
    let narrow = |x: Vec<f64>| x.into_iter().map(|x| x as f32).collect();
    (narrow(s), narrow(out))
}

fn formats() -> Vec<Format> {
    let mut out = vec![Format::Bf16, Format::F16, Format::F32];
    for bits in BITS {
        for group in GROUPS {
            out.extend(SCALES.map(|scales| Format::Affine { bits, group, scales }));
        }
    }
    out
}

fn columns(format: Format) -> Vec<usize> {
    match format {
        Format::Affine { group, .. } => {
            [0, 1, 2, 3, 31, 65].map(|n| n * usize::from(group)).to_vec()
        }
        Format::Bf16 | Format::F16 | Format::F32 => LENGTHS.to_vec(),
    }
}

fn group_sums(format: Format, x: &[f32]) -> Vec<f32> {
    let Format::Affine { group, .. } = format else { return vec![] };
    x.chunks_exact(usize::from(group)).map(|x| x.iter().sum()).collect()
}

fn each(test: impl Fn(Isa, usize)) {
    for isa in Isa::available().filter(|isa| *isa != Isa::scalar()) {
        for n in LENGTHS {
            test(isa, n);
        }
    }
}

/// Numbers from -1 to 1.
fn floats(seed: u64, n: usize) -> Vec<f32> {
    let mut random = Random::new(seed);
    (0..n).map(|_| (random.next() >> 40) as f32 / (1 << 23) as f32 - 1.0).collect()
}

fn narrow(to: ScaleType, seed: u64, n: usize) -> Vec<u8> {
    let bytes = |x: f32| match to {
        ScaleType::Bf16 => f32_to_bf16(x).to_le_bytes().to_vec(),
        ScaleType::F16 => f32_to_f16(x).to_le_bytes().to_vec(),
        ScaleType::F32 => x.to_le_bytes().to_vec(),
    };
    floats(seed, n).into_iter().flat_map(bytes).collect()
}

fn widened(from: ScaleType, bytes: &[u8], k: usize) -> f32 {
    let two = |k: usize| u16::from_le_bytes([bytes[2 * k], bytes[2 * k + 1]]);
    match from {
        ScaleType::Bf16 => half::bf16::from_bits(two(k)).to_f32(),
        ScaleType::F16 => half::f16::from_bits(two(k)).to_f32(),
        ScaleType::F32 => f32::from_le_bytes(bytes[4 * k..][..4].try_into().unwrap()),
    }
}

fn magnitude(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| (a * b).abs()).sum()
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

/// Within an absolute tolerance plus two roundings; a NaN is never close.
fn close(got: &[f32], want: &[f32], tolerance: f32, label: &str) {
    assert_eq!(got.len(), want.len(), "{label}");
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        let bound = tolerance + 2.0 * f32::EPSILON * want.abs();
        assert!((got - want).abs() <= bound, "{label}, element {i}: {got} for {want}");
    }
}
