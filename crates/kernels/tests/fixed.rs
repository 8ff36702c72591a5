//! Fixed point against f64, every variant against the specification, and what must be equal bit for
//! bit: the integers on every instruction set, a row however rows are split, a token however many.
//!
//! Integer sums are exact, so they must be equal everywhere; only the final scaling may round.

mod random;

use flash_moe_kernels::{
    Fixed, FixedLayout, FixedMut, Format, Isa, Rows, ScaleType, TILE_BYTES, TILE_ROWS, TileMut,
    f32_to_bf16, f32_to_f16,
};
use random::Random;

const BITS: [u8; 6] = [2, 3, 4, 5, 6, 8];
const GROUPS: [u16; 3] = [32, 64, 128];
const SCALES: [ScaleType; 3] = [ScaleType::Bf16, ScaleType::F16, ScaleType::F32];

/// Integers of 16 bits or the lossy ones of 8.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Form {
    Fine,
    Fast,
}
const FORMS: [Form; 2] = [Form::Fine, Form::Fast];

#[test]
fn variants_agree_with_the_specification() {
    for format in formats() {
        for (groups, rows, tokens) in
            [(0, 3, 1), (1, 33, 2), (2, 1, 5), (3, 37, 7), (5, 7, 1), (65, 2, 13), (31, 4, 3)]
        {
            let matrix = Matrix::random(format, rows, groups * group_of(format), 1);
            let w = matrix.rows();
            let x = floats(2, tokens * w.cols());
            for form in FORMS {
                let want = Vectors::fix(Isa::scalar(), format, &x, form);
                let want_y = multiply(Isa::scalar(), &w, &want, tokens);
                for isa in Isa::available() {
                    let label = format!("{isa:?} {format:?} {groups} {rows} {tokens} {form:?}");
                    let got = Vectors::fix(isa, format, &x, form);
                    assert_eq!((&got.hi, &got.lo), (&want.hi, &want.lo), "{label}");
                    assert_eq!(bits(&got.scales), bits(&want.scales), "{label}");
                    assert_eq!(bits(&got.sums), bits(&want.sums), "{label}");
                    let bound = matrix.bound(&x, tokens);
                    close(&multiply(isa, &w, &want, tokens), &want_y, bound, &label);
                    for t in 0..tokens {
                        let one = want.token(t, tokens);
                        let mut y = vec![9.0; rows];
                        isa.mat_vec_fixed(&w, 0, &one, &mut y);
                        let want: Vec<f32> =
                            (0..rows).filter_map(|r| want_y.get(r * tokens + t).copied()).collect();
                        close(&y[..want.len()], &want, bound, &label);
                    }
                }
            }
        }
    }
}

#[test]
fn integer_sums_are_equal_everywhere() {
    // Scales of one and few enough columns: every sum is an integer that an f32 holds.
    for bits in BITS {
        for (group, cols) in [(32, 96), (64, 192), (128, 128)] {
            let cols = if bits > 4 { cols.min(2 * usize::from(group)).min(128) } else { cols };
            let format = Format::Affine { bits, group, scales: ScaleType::F32 };
            let mut matrix = Matrix::random(format, 5, cols, 3);
            matrix.scales = 1f32.to_le_bytes().repeat(matrix.scales.len() / 4);
            matrix.biases.fill(0);
            for form in FORMS {
                let largest = if form == Form::Fine { 32639 } else { 127 };
                let mut random = Random::new(4);
                let spread =
                    if form == Form::Fine && bits > 4 { 1 << (16 - bits) } else { largest };
                let mut v: Vec<i32> =
                    (0..cols).map(|_| random.next() as i32 % (spread + 1)).collect();
                for (i, group) in v.chunks_mut(usize::from(group.min(64))).enumerate() {
                    let sign = if i % 2 == 0 { -1 } else { 1 };
                    group[random.next() as usize % 32] = sign * largest;
                }
                let x: Vec<f32> = v.iter().map(|v| *v as f32).collect();
                let want: Vec<f32> = (0..5)
                    .map(|r| (0..cols).map(|k| matrix.code(r, k) as i32 * v[k]).sum::<i32>() as f32)
                    .collect();
                for isa in Isa::available() {
                    let fixed = Vectors::fix(isa, format, &x, form);
                    let label = format!("{isa:?} {format:?} {form:?}");
                    assert!(fixed.scales.iter().all(|a| *a == 1.0), "{label}");
                    let mut y = [9.0; 5];
                    isa.mat_vec_fixed(&matrix.rows(), 0, &fixed.view(), &mut y);
                    assert_eq!(y.to_vec(), want, "{label}");
                    assert_eq!(multiply(isa, &matrix.rows(), &fixed, 1), want, "{label}");
                }
            }
        }
    }
}

#[test]
fn nothing_saturates() {
    for bits in BITS {
        for group in GROUPS {
            let format = Format::Affine { bits, group, scales: ScaleType::F32 };
            let cols = usize::from(group);
            let mut matrix = Matrix::random(format, 1, cols, 5);
            matrix.weight.fill(0xff);
            matrix.scales = 1f32.to_le_bytes().to_vec();
            matrix.biases.fill(0);
            for (form, largest) in [(Form::Fine, 32639.0), (Form::Fast, 127.0)] {
                for x in [largest, -largest] {
                    let want = x * f32::from(u8::MAX >> (8 - bits)) * cols as f32;
                    for isa in Isa::available() {
                        let fixed = Vectors::fix(isa, format, &vec![x; cols], form);
                        let mut y = [9.0];
                        isa.mat_vec_fixed(&matrix.rows(), 0, &fixed.view(), &mut y);
                        assert_eq!(y, [want], "{isa:?} {format:?} {form:?}");
                        assert_eq!(multiply(isa, &matrix.rows(), &fixed, 1), [want], "{isa:?}");
                    }
                }
            }
        }
    }
}

#[test]
fn errors_stay_within_what_is_documented() {
    let (rows, cols) = (64, 2048);
    for bits in [2, 4, 8] {
        for group in GROUPS {
            let format = Format::Affine { bits, group, scales: ScaleType::Bf16 };
            let matrix = Matrix::quantised(format, rows, cols, 6);
            let plain = normal(7, cols);
            let mut outliers = plain.clone();
            for k in (0..cols).step_by(97) {
                outliers[k] *= 50.0;
            }
            // An outlier takes the scale of its group: its own error bounds the whole.
            let cases = [("normal", plain, [5e-5, 8e-3]), ("outliers", outliers, [1e-4, 2e-2])];
            for (name, x, limits) in cases {
                let want = matrix.times(&x);
                for (form, limit) in FORMS.into_iter().zip(limits) {
                    for isa in Isa::available() {
                        let fixed = Vectors::fix(isa, format, &x, form);
                        let mut y = vec![9.0; rows];
                        isa.mat_vec_fixed(&matrix.rows(), 0, &fixed.view(), &mut y);
                        let error = relative_rms(&y, &want);
                        assert!(error <= limit, "{isa:?} {format:?} {name} {form:?}: {error:e}");
                        if isa == Isa::detect() {
                            println!("{bits} bits, group {group}, {name}, {form:?}: {error:.1e}");
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn a_row_and_a_token_depend_on_nothing_else() {
    for format in formats() {
        let (rows, tokens) = (71, 14);
        let cols = 3 * group_of(format);
        let (gate, up) =
            (Matrix::random(format, rows, cols, 8), Matrix::random(format, rows, cols, 9));
        let (gate, up) = (gate.rows(), up.rows());
        let x = floats(10, tokens * cols);
        for (isa, form) in Isa::available().flat_map(|isa| FORMS.map(|form| (isa, form))) {
            let label = format!("{isa:?} {format:?} {form:?}");
            let fixed = Vectors::fix(isa, format, &x, form);
            let all = multiply(isa, &up, &fixed, tokens);
            let one = fixed.token(0, tokens);
            let mut whole = vec![0.0; rows];
            isa.mat_vec_fixed(&up, 0, &one, &mut whole);
            let mut gated = vec![0.0; rows];
            isa.gate_up_fixed((&gate, &up), 0, (&one, &one), &mut gated);
            for part in [1, 3, 32, 64] {
                let (mut y, mut z) = (vec![0.0; rows], vec![0.0; rows]);
                for (i, y) in y.chunks_mut(part).enumerate() {
                    isa.mat_vec_fixed(&up, i * part, &one, y);
                }
                for (i, z) in z.chunks_mut(part).enumerate() {
                    isa.gate_up_fixed((&gate, &up), i * part, (&one, &one), z);
                }
                let many = multiply_by(isa, &up, &fixed.view(), tokens, part);
                assert_eq!(bits(&y), bits(&whole), "{label} by {part}");
                assert_eq!(bits(&z), bits(&gated), "{label} by {part}");
                assert_eq!(bits(&many), bits(&all), "{label} by {part}");
            }
            for t in 0..tokens {
                let y = multiply_by(isa, &up, &fixed.token(t, tokens), 1, TILE_ROWS);
                let of_all: Vec<f32> = (0..rows).map(|r| all[r * tokens + t]).collect();
                assert_eq!(bits(&y), bits(&of_all), "{label} token {t}");
            }
        }
    }
}

#[test]
fn a_token_that_is_no_number_spoils_its_products_only() {
    let format = Format::Affine { bits: 4, group: 64, scales: ScaleType::Bf16 };
    let matrix = Matrix::random(format, 3, 128, 11);
    for bad in [f32::NAN, f32::INFINITY] {
        let mut x = floats(12, 3 * 128);
        x[128 + 70] = bad;
        for (isa, form) in Isa::available().flat_map(|isa| FORMS.map(|form| (isa, form))) {
            let y = multiply(isa, &matrix.rows(), &Vectors::fix(isa, format, &x, form), 3);
            for (i, y) in y.iter().enumerate() {
                assert_eq!(y.is_finite(), i % 3 != 1, "{isa:?} {form:?} {i}: {y}");
            }
        }
    }
    for x in [vec![0.0; 128], vec![1e-38; 128], vec![-0.0; 128]] {
        for isa in Isa::available() {
            let fixed = Vectors::fix(isa, format, &x, Form::Fine);
            assert!(fixed.scales.iter().all(|a| *a == 0.0) && fixed.hi.iter().all(|v| *v == 0));
        }
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
    fn fix(isa: Isa, format: Format, x: &[f32], form: Form) -> Self {
        let layout = FixedLayout::of(format).unwrap();
        let mut out = Self {
            layout,
            hi: vec![99; x.len()],
            lo: if form == Form::Fine { vec![99; x.len()] } else { vec![] },
            scales: vec![9.0; x.len() / layout.scale_group()],
            sums: vec![9.0; x.len() / layout.sum_group()],
        };
        let Self { hi, lo, scales, sums, .. } = &mut out;
        isa.fix(layout, x, &mut FixedMut { hi, lo, scales, sums });
        out
    }

    fn view(&self) -> Fixed<'_> {
        let Self { layout, hi, lo, scales, sums } = self;
        Fixed { layout: *layout, hi, lo, scales, sums }
    }

    fn token(&self, t: usize, tokens: usize) -> Fixed<'_> {
        fn part<T>(all: &[T], t: usize, tokens: usize) -> &[T] {
            let len = all.len() / tokens;
            &all[t * len..][..len]
        }
        Fixed {
            layout: self.layout,
            hi: part(&self.hi, t, tokens),
            lo: part(&self.lo, t, tokens),
            scales: part(&self.scales, t, tokens),
            sums: part(&self.sums, t, tokens),
        }
    }
}

struct Scratch {
    codes: Vec<u8>,
    factors: Vec<f32>,
}

impl Scratch {
    /// Full of what an earlier tile may have left.
    fn new(w: &Rows, left: u8) -> Self {
        let codes = vec![left; TILE_BYTES];
        Self { codes, factors: vec![f32::NAN; 2 * TILE_ROWS * w.cols() / group_of(w.format())] }
    }

    fn tile(&mut self) -> TileMut<'_> {
        TileMut { codes: &mut self.codes, factors: &mut self.factors }
    }
}

/// All rows times all vectors, `[rows][tokens]`; nothing for a matrix without columns.
fn multiply(isa: Isa, w: &Rows, xs: &Vectors, tokens: usize) -> Vec<f32> {
    multiply_by(isa, w, &xs.view(), tokens, TILE_ROWS)
}

/// The same by tiles of which only the first `part` rows are used.
fn multiply_by(isa: Isa, w: &Rows, xs: &Fixed, tokens: usize, part: usize) -> Vec<f32> {
    let mut y = vec![9.0; if w.cols() == 0 { 0 } else { w.rows() * tokens }];
    let mut scratch = Scratch::new(w, 255);
    for (i, y) in y.chunks_mut(part * tokens).enumerate() {
        let mut tile = vec![9.0; tokens * TILE_ROWS];
        isa.mat_mul_fixed(w, i * part, xs, &mut tile, &mut scratch.tile());
        for (row, y) in y.chunks_mut(tokens).enumerate() {
            for (y, tile) in y.iter_mut().zip(tile.chunks(TILE_ROWS)) {
                *y = tile[row];
            }
        }
    }
    y
}

/// A matrix of affine rows.
struct Matrix {
    format: Format,
    rows: usize,
    cols: usize,
    weight: Vec<u8>,
    scales: Vec<u8>,
    biases: Vec<u8>,
}

impl Matrix {
    /// Random bytes with scales and biases from -1 to 1.
    fn random(format: Format, rows: usize, cols: usize, seed: u64) -> Self {
        let Format::Affine { scales, .. } = format else { unreachable!() };
        let mut random = Random::new(seed);
        let weight = (0..rows * format.row_bytes(cols)).map(|_| random.next() as u8).collect();
        let count = rows * format.scale_row_bytes(cols) / scales.bytes();
        let narrowed = |seed| narrow(scales, &floats(seed, count));
        let (scales, biases) = (narrowed(seed ^ 2), narrowed(seed ^ 3));
        Self { format, rows, cols, weight, scales, biases }
    }

    /// Normal weights, quantised as a checkpoint is.
    fn quantised(format: Format, rows: usize, cols: usize, seed: u64) -> Self {
        let Format::Affine { bits, group, scales } = format else { unreachable!() };
        let mut weight = vec![0; rows * format.row_bytes(cols)];
        let groups = rows * cols / usize::from(group);
        let (mut steps, mut biases) = (vec![0; groups], vec![0; groups]);
        let w = normal(seed, rows * cols);
        flash_moe_kernels::quantise_row(&w, bits, group, &mut weight, &mut steps, &mut biases);
        assert_eq!(scales, ScaleType::Bf16);
        let bytes = |x: Vec<u16>| x.into_iter().flat_map(u16::to_le_bytes).collect();
        Self { format, rows, cols, weight, scales: bytes(steps), biases: bytes(biases) }
    }

    fn rows(&self) -> Rows<'_> {
        let Self { format, rows, cols, weight, scales, biases } = self;
        Rows::new(*format, *rows, *cols, weight, scales, biases).unwrap()
    }

    /// Quantised integer of one weight, read one bit at a time.
    fn code(&self, row: usize, k: usize) -> u32 {
        let Format::Affine { bits, .. } = self.format else { unreachable!() };
        let start = row * self.format.row_bytes(self.cols) * 8 + k * usize::from(bits);
        let bit = |b: usize| u32::from(self.weight[b / 8]) >> (b % 8) & 1;
        (0..usize::from(bits)).map(|b| bit(start + b) << b).sum()
    }

    /// The product in f64.
    fn times(&self, x: &[f32]) -> Vec<f64> {
        let of_row = |row| {
            let mut w = vec![0.0; self.cols];
            Isa::scalar().unpack_row(&self.rows(), row, &mut w);
            w.iter().zip(x).map(|(w, x)| f64::from(*w) * f64::from(*x)).sum()
        };
        (0..self.rows).map(of_row).collect()
    }

    /// A tolerance for sums in another order: relative to all magnitudes that enter them.
    fn bound(&self, x: &[f32], tokens: usize) -> f32 {
        let Format::Affine { bits, .. } = self.format else { unreachable!() };
        let largest = x.chunks((x.len() / tokens).max(1)).map(|x| x.iter().map(|x| x.abs()).sum());
        1e-6 * f32::from(u8::MAX >> (8 - bits)) * largest.fold(0.0, f32::max)
    }
}

fn formats() -> impl Iterator<Item = Format> {
    let of = |bits| GROUPS.into_iter().map(move |group| (bits, group));
    BITS.into_iter()
        .flat_map(of)
        .flat_map(|(bits, group)| SCALES.map(|scales| Format::Affine { bits, group, scales }))
}

fn group_of(format: Format) -> usize {
    FixedLayout::of(format).unwrap().sum_group()
}

/// Numbers from -1 to 1.
fn floats(seed: u64, n: usize) -> Vec<f32> {
    let mut random = Random::new(seed);
    (0..n).map(|_| (random.next() >> 40) as f32 / (1 << 23) as f32 - 1.0).collect()
}

/// Nearly normal numbers: sums of twelve uniform ones.
fn normal(seed: u64, n: usize) -> Vec<f32> {
    floats(seed, 12 * n).chunks(12).map(|x| x.iter().sum::<f32>() / 2.0).collect()
}

fn narrow(to: ScaleType, x: &[f32]) -> Vec<u8> {
    let bytes = |x: &f32| match to {
        ScaleType::Bf16 => f32_to_bf16(*x).to_le_bytes().to_vec(),
        ScaleType::F16 => f32_to_f16(*x).to_le_bytes().to_vec(),
        ScaleType::F32 => x.to_le_bytes().to_vec(),
    };
    x.iter().flat_map(bytes).collect()
}

fn relative_rms(got: &[f32], want: &[f64]) -> f64 {
    let error: f64 = got.iter().zip(want).map(|(g, w)| (f64::from(*g) - w).powi(2)).sum();
    (error / want.iter().map(|w| w * w).sum::<f64>()).sqrt()
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

/// Within an absolute tolerance; a NaN is never close.
fn close(got: &[f32], want: &[f32], tolerance: f32, label: &str) {
    assert_eq!(got.len(), want.len(), "{label}");
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        assert!((got - want).abs() <= tolerance, "{label}, element {i}: {got} for {want}");
    }
}
