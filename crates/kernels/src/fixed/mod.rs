//! Fixed-point activations for affine weights: integers times integers, scaled once a group.
//!
//! Owns the form of such vectors, their making and their products with a matrix. A vector is cut
//! into groups of up to 64 elements; a group has one f32 scale and its elements are integers of 16
//! bits, `v = 256 * hi + lo`, in two planes of signed bytes, or of 8 bits in one plane, which is
//! lossy. Refuses plain formats, which have no integers to multiply by.
//!
//! The one idea: the sum over a group is an exact integer, the same on every instruction set.
//! Within a group the elements stand in the order in which shifts and masks unpack the weights, and
//! that one order serves one vector (a row at a time) and many (a tile of rows at a time).

pub(crate) mod scalar;

mod lanes;

#[cfg(target_arch = "x86_64")]
pub(crate) mod avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx512;
#[cfg(target_arch = "aarch64")]
pub(crate) mod neon;
#[cfg(target_arch = "aarch64")]
pub(crate) mod neon_dot;
#[cfg(target_arch = "x86_64")]
pub(crate) mod vnni;

use crate::block::{Format, Rows};
use crate::isa::{Isa, Kind, dispatch_fixed};

/// Rows that `mat_mul_fixed` computes at a time.
pub const TILE_ROWS: usize = 64;
/// Columns of a tile that are unpacked at a time: a cache line of each row of 4-bit weights.
const STEP_COLS: usize = 128;
/// Vectors that a block of registers holds.
#[cfg(any(target_arch = "aarch64", target_arch = "x86_64"))]
const BLOCK_TOKENS: usize = 4;
/// Bytes that [`TileMut::codes`] has at least.
pub const TILE_BYTES: usize = TILE_ROWS * STEP_COLS + 64;
/// How far ahead of their use weights are asked for, in bytes: the time in which a core reads this
/// much from memory covers the time of one access.
const AHEAD_BYTES: usize = 4096;
/// Rows that share the loads of one vector.
const ROW_BLOCK: usize = 4;
/// Elements of a fixed vector that share a scale, at most.
const LONGEST_GROUP: usize = 64;
/// Factors of a row made at a time: a whole number of registers, and of steps.
const FACTORS: usize = 64;
/// The largest integer of two signed bytes: 256 * 127 + 127.
const LARGEST: f32 = 32639.0;
/// The largest integer of the lossy form.
const LARGEST_FAST: f32 = 127.0;
/// A group with no element above this is zero: below it the reciprocal of a scale may overflow.
const TINY: f32 = 1e-30;

/// How vectors are cut and ordered for a matrix. Matrices of one layout share their vectors.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FixedLayout {
    /// Weights in a byte, or 1 where weights straddle bytes: element `planes * i + p` of a group
    /// stands at `p * (group / planes) + i`.
    planes: u8,
    /// Elements that share a weight scale.
    group: u16,
}

impl FixedLayout {
    /// The layout for a format's matrices; none for plain formats.
    pub const fn of(format: Format) -> Option<Self> {
        let Format::Affine { bits, group, .. } = format else { return None };
        let planes = match bits {
            2 => 4,
            4 => 2,
            _ => 1,
        };
        Some(Self { planes, group })
    }

    /// Elements that share an activation scale: those of a weight group, at most 64.
    pub const fn scale_group(self) -> usize {
        if self.sum_group() < LONGEST_GROUP { self.sum_group() } else { LONGEST_GROUP }
    }

    /// Elements that share a weight scale.
    pub const fn sum_group(self) -> usize {
        self.group as usize
    }
}

/// Vectors in fixed point, one after the other.
#[derive(Clone, Copy)]
pub struct Fixed<'a> {
    /// For which matrices.
    pub layout: FixedLayout,
    /// Upper parts, or the whole of 8-bit integers: `[tokens][cols]`.
    pub hi: &'a [i8],
    /// Lower parts: `[tokens][cols]`; empty for 8-bit integers.
    pub lo: &'a [i8],
    /// `[tokens][cols / scale_group]`.
    pub scales: &'a [f32],
    /// Sums of the elements as the integers give them, `[tokens][cols / sum_group]`: with sums of
    /// the original elements a rounding would meet `scale * q`, which is larger than the weight.
    pub sums: &'a [f32],
}

/// Where vectors in fixed point go: the shapes of [`Fixed`].
pub struct FixedMut<'a> {
    /// Upper parts, or the whole of 8-bit integers.
    pub hi: &'a mut [i8],
    /// Lower parts; empty for 8-bit integers.
    pub lo: &'a mut [i8],
    /// Scales of the integers.
    pub scales: &'a mut [f32],
    /// Sums of the elements.
    pub sums: &'a mut [f32],
}

/// Scratch of `mat_mul_fixed`.
pub struct TileMut<'a> {
    /// At least [`TILE_BYTES`]: columns of the rows, unpacked and interleaved.
    pub codes: &'a mut [u8],
    /// At least `2 * TILE_ROWS * cols / sum_group`: scales and biases of the rows.
    pub factors: &'a mut [f32],
}

/// Products of affine matrices and vectors in fixed point.
impl Isa {
    /// Brings `x [tokens][cols]` to fixed point; `lo` is empty for the lossy 8-bit form.
    ///
    /// A group's scale is its largest magnitude over 32639 (127 in the lossy form) and its integers
    /// are the nearest, ties to even. A NaN or an infinity makes the scale one, hence the products.
    ///
    /// # Panics
    /// If the lengths differ from the shapes of [`Fixed`].
    pub fn fix(self, layout: FixedLayout, x: &[f32], out: &mut FixedMut) {
        assert_eq!(out.hi.len(), x.len(), "fix: upper parts");
        assert!(out.lo.is_empty() || out.lo.len() == x.len(), "fix: lower parts");
        assert_eq!(out.scales.len() * layout.scale_group(), x.len(), "fix: scales");
        assert_eq!(out.sums.len() * layout.sum_group(), x.len(), "fix: sums");
        dispatch_fixed!(self, fix(layout, x, out));
    }

    /// `y[i] = w[first_row + i] . x` for one vector and any number of rows in `y`.
    ///
    /// A row is summed as `(scale * a) * sum(q * v) + bias * a * sum(v)`, `a` the vector's scale;
    /// the result depends on that row and the vector only, bit for bit.
    ///
    /// # Panics
    /// If the lengths or the layout differ from the matrix, or a row is outside it.
    pub fn mat_vec_fixed(self, w: &Rows, first_row: usize, x: &Fixed, y: &mut [f32]) {
        check_product(w, first_row, x, (1, y.len()));
        dispatch_fixed!(self, mat_vec(w, first_row, x, y));
    }

    /// `out[i] = silu(gate[first_row + i] . x) * (up[first_row + i] . x)`, where `x` is the vector
    /// in the layouts of `gate` and of `up`.
    ///
    /// # Panics
    /// As `mat_vec_fixed`, for either matrix.
    pub fn gate_up_fixed(
        self,
        (gate, up): (&Rows, &Rows),
        first_row: usize,
        x: (&Fixed, &Fixed),
        out: &mut [f32],
    ) {
        check_product(gate, first_row, x.0, (1, out.len()));
        check_product(up, first_row, x.1, (1, out.len()));
        dispatch_fixed!(self, gate_up((gate, up), first_row, x, out));
    }

    /// `y[t][i] = w[first_row + i] . xs[t]` for a tile of rows: `y [tokens][TILE_ROWS]`.
    ///
    /// A tile has [`TILE_ROWS`] rows, or as many as there are from `first_row` on; what is beyond them
    /// in `y` is then arbitrary. An element depends on its row and its vector only, bit for bit.
    ///
    /// # Panics
    /// If the lengths or the layout differ from the matrix, there is no such row or the scratch is
    /// too small.
    pub fn mat_mul_fixed(
        self,
        w: &Rows,
        first_row: usize,
        xs: &Fixed,
        y: &mut [f32],
        tile: &mut TileMut,
    ) {
        if y.is_empty() {
            return;
        }
        assert!(w.cols() > 0, "mat_mul_fixed: no columns");
        let tokens = xs.hi.len() / w.cols();
        assert!(tokens > 0 && y.len() == tokens * TILE_ROWS, "mat_mul_fixed: result");
        check_product(w, first_row, xs, (tokens, 1));
        assert!(tile.codes.len() >= TILE_BYTES, "mat_mul_fixed: tile");
        let factors = 2 * TILE_ROWS * (w.cols() / xs.layout.sum_group());
        assert!(tile.factors.len() >= factors, "mat_mul_fixed: factors");
        dispatch_fixed!(self, mat_mul(w, first_row, xs, y, tile));
    }
}

/// Columns of a tile's rows and the vectors that they are multiplied by.
#[cfg(any(target_arch = "aarch64", target_arch = "x86_64"))]
struct Step<'a> {
    rows: usize,
    cols: usize,                    // of all steps
    group: usize,                   // columns that share an activation scale
    row_groups: usize,              // of them in a row
    sum_shift: u32,                 // two to this of them share a weight scale
    groups: std::ops::Range<usize>, // of this step
    codes: &'a mut [u8],            // [TILE_ROWS / LANES][STEP_COLS / 4][LANES][4]
    scales: &'a [f32],              // [cols / sum_group][TILE_ROWS]
    biases: &'a [f32],              // [cols / sum_group][TILE_ROWS]
    xs: &'a Fixed<'a>,
}

/// The lengths and the layout of a product of `rows` rows and `tokens` vectors.
fn check_product(w: &Rows, first_row: usize, x: &Fixed, (tokens, rows): (usize, usize)) {
    assert_eq!(FixedLayout::of(w.format()), Some(x.layout), "fixed product: layout");
    let elements = tokens * w.cols();
    assert_eq!(x.hi.len(), elements, "fixed product: columns");
    assert!(x.lo.is_empty() || x.lo.len() == elements, "fixed product: lower parts");
    assert_eq!(x.scales.len() * x.layout.scale_group(), elements, "fixed product: scales");
    assert_eq!(x.sums.len() * x.layout.sum_group(), elements, "fixed product: sums");
    let inside = first_row.checked_add(rows).is_some_and(|end| end <= w.rows());
    assert!(inside, "fixed product: rows {first_row} + {rows} of {}", w.rows());
}

/// The body of every variant's `fix`: plain code that each compiles with its own instructions. The
/// integers are therefore the same everywhere.
#[inline(always)]
fn fix_groups(layout: FixedLayout, x: &[f32], out: &mut FixedMut) {
    match (layout.planes, layout.scale_group()) {
        (1, 32) => fix_all::<1, 32>(x, out),
        (2, 32) => fix_all::<2, 32>(x, out),
        (4, 32) => fix_all::<4, 32>(x, out),
        (1, _) => fix_all::<1, 64>(x, out),
        (2, _) => fix_all::<2, 64>(x, out),
        _ => fix_all::<4, 64>(x, out),
    }
}

#[inline(always)]
fn fix_all<const PLANES: usize, const GROUP: usize>(x: &[f32], out: &mut FixedMut) {
    let FixedMut { hi, lo, scales, sums } = out;
    let hi = hi.as_chunks_mut::<GROUP>().0;
    let lo = lo.as_chunks_mut::<GROUP>().0;
    let ratio = scales.len() / sums.len().max(1);
    sums.fill(0.0);
    for (g, (x, scale)) in x.as_chunks::<GROUP>().0.iter().zip(scales.iter_mut()).enumerate() {
        let largest = if lo.is_empty() { LARGEST_FAST } else { LARGEST };
        let (step, v) = integers_of(x, largest);
        *scale = step;
        sums[g / ratio] += step * v.iter().map(|v| i32::from(*v)).sum::<i32>() as f32;
        let v = in_planes::<PLANES, GROUP>(&v);
        if lo.is_empty() {
            hi[g] = v.map(|v| v as i8);
        } else {
            // The lower part is signed, so the upper is that of the nearest multiple of 256.
            hi[g] = v.map(|v| ((v + 128) >> 8) as i8);
            lo[g] = v.map(|v| v as i8);
        }
    }
}

/// Scale and integers of one group.
#[inline(always)]
fn integers_of<const GROUP: usize>(x: &[f32; GROUP], largest: f32) -> (f32, [i16; GROUP]) {
    // Magnitudes of floats order as their bits do, a NaN above all; integers reduce faster.
    let max = x.iter().fold(0, |max: u32, x| max.max(x.abs().to_bits()));
    let max = f32::from_bits(max);
    if max < TINY {
        return (0.0, [0; GROUP]);
    }
    // Adding this rounds to an integer, ties to even, and leaves it in the low bits.
    const NO_FRACTION: f32 = 12_582_912.0;
    let reciprocal = largest / max;
    let mut v = [0; GROUP];
    for (v, x) in v.iter_mut().zip(x) {
        let rounded = x * reciprocal + NO_FRACTION;
        *v = rounded.to_bits().wrapping_sub(NO_FRACTION.to_bits()) as i16;
    }
    (max / largest, v)
}

#[inline(always)]
fn in_planes<const PLANES: usize, const GROUP: usize>(v: &[i16; GROUP]) -> [i16; GROUP] {
    let mut out = [0; GROUP];
    for i in 0..GROUP / PLANES {
        for p in 0..PLANES {
            out[p * (GROUP / PLANES) + i] = v[PLANES * i + p];
        }
    }
    out
}

/// The first `N` bytes, or all that there are with zeros after them.
#[cfg(any(target_arch = "aarch64", target_arch = "x86_64"))]
#[inline(always)]
fn first_bytes<const N: usize>(bytes: &[u8]) -> [u8; N] {
    bytes.first_chunk().copied().unwrap_or_else(|| {
        let mut out = [0; N];
        out[..bytes.len()].copy_from_slice(bytes);
        out
    })
}

/// The last bytes of a row, or the last elements of a vector, with zeros after them.
#[inline(always)]
fn padded<T: Copy + Default>(from: &[T]) -> [T; 64] {
    let mut out = [T::default(); 64];
    out[..from.len()].copy_from_slice(from);
    out
}

/// For the 16 elements of quarter `quarter` of a step of 64: where a load of 16 bytes begins that
/// holds them and does not pass the end of the step.
#[cfg(any(target_arch = "aarch64", target_arch = "x86_64"))]
const fn quarter_start(bits: usize, quarter: usize) -> usize {
    let (start, last) = (quarter * 2 * bits, 8 * bits - 16);
    if start < last { start } else { last }
}

/// For each quarter and each of its 16 elements, the two bytes of that load that the element may
/// straddle; 128 stands for a zero.
#[cfg(any(target_arch = "aarch64", target_arch = "x86_64"))]
const fn windows(bits: usize) -> [[u8; 32]; 4] {
    let mut out = [[128; 32]; 4];
    let mut quarter = 0;
    while quarter < 4 {
        let mut k = 0;
        while k < 16 {
            let byte = quarter * 2 * bits + k * bits / 8 - quarter_start(bits, quarter);
            out[quarter][2 * k] = byte as u8;
            if byte < 15 {
                out[quarter][2 * k + 1] = byte as u8 + 1;
            }
            k += 1;
        }
        quarter += 1;
    }
    out
}
