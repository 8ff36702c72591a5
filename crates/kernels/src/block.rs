//! The layouts of a weight matrix in memory: what a row is, how long it is, how it is quantised.
//!
//! Owns `Format` (the layout of a matrix), `Rows` (a matrix as three byte slices whose lengths have
//! been checked once) and the quantiser. Refuses lengths, bit widths and groups it cannot name.
//! The one idea: an affine row is a little-endian bit stream, element `k` at bits
//! `[k * bits, (k + 1) * bits)`, and stands for `scale * q + bias` with one scale and one bias for
//! each group of elements. The bytes need no alignment: published files start at odd offsets.

use std::fmt;

use crate::float::{bf16_to_f32, f16_to_f32, f32_to_bf16};

/// The type in which scales and biases are stored, little-endian.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ScaleType {
    /// The upper half of an f32.
    Bf16,
    /// IEEE binary16.
    F16,
    /// IEEE binary32.
    F32,
}

impl ScaleType {
    /// Bytes of one scale or one bias.
    pub const fn bytes(self) -> usize {
        match self {
            Self::Bf16 | Self::F16 => 2,
            Self::F32 => 4,
        }
    }

    /// The format of a plain row of such numbers.
    pub(crate) const fn as_format(self) -> Format {
        match self {
            Self::Bf16 => Format::Bf16,
            Self::F16 => Format::F16,
            Self::F32 => Format::F32,
        }
    }
}

/// How the weights of a matrix are stored, row after row.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Format {
    /// MLX affine: `w = scale * q + bias`, `q` unsigned, one scale and one bias a group.
    Affine {
        /// Bits of one element: 2, 3, 4, 5, 6 or 8.
        bits: u8,
        /// Elements that share a scale: 32, 64 or 128.
        group: u16,
        /// Type of the scales and of the biases.
        scales: ScaleType,
    },
    /// Two bytes an element.
    Bf16,
    /// Two bytes an element.
    F16,
    /// Four bytes an element.
    F32,
}

impl Format {
    /// Bytes of the packed weights of one row of `cols` elements.
    pub const fn row_bytes(self, cols: usize) -> usize {
        match self {
            Self::Affine { bits, .. } => (cols * bits as usize).div_ceil(8),
            Self::Bf16 | Self::F16 => cols * 2,
            Self::F32 => cols * 4,
        }
    }

    /// Bytes of the scales of one row, which is also the bytes of its biases; 0 unless affine.
    pub const fn scale_row_bytes(self, cols: usize) -> usize {
        match self {
            Self::Affine { group, scales, .. } => cols / group as usize * scales.bytes(),
            Self::Bf16 | Self::F16 | Self::F32 => 0,
        }
    }

    /// Whether rows of `cols` elements exist in this format: known bits and group, whole groups.
    pub const fn check(self, cols: usize) -> Result<(), LayoutError> {
        let Self::Affine { bits, group, .. } = self else { return Ok(()) };
        if !matches!(bits, 2 | 3 | 4 | 5 | 6 | 8) {
            return Err(LayoutError::Bits(bits));
        }
        if !matches!(group, 32 | 64 | 128) {
            return Err(LayoutError::Group(group));
        }
        if !cols.is_multiple_of(group as usize) {
            return Err(LayoutError::Cols { cols, group });
        }
        Ok(())
    }

    /// Bytes of a whole matrix: weights, scales and biases.
    pub const fn matrix_bytes(self, rows: usize, cols: usize) -> usize {
        rows * (self.row_bytes(cols) + 2 * self.scale_row_bytes(cols))
    }
}

/// Why a matrix cannot be laid over the given bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum LayoutError {
    /// Bits that no affine layout has.
    Bits(u8),
    /// A group that no affine layout has.
    Group(u16),
    /// Columns that are not whole groups.
    Cols {
        /// Elements of a row.
        cols: usize,
        /// Elements of a group.
        group: u16,
    },
    /// A slice of the wrong length; `None` is a length that no address space holds.
    Length {
        /// Which of the three slices: weight, scales or biases.
        part: &'static str,
        /// Bytes that the shape asks for.
        expected: Option<usize>,
        /// Bytes that were given.
        actual: usize,
    },
}

impl fmt::Display for LayoutError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Bits(bits) => write!(f, "{bits} bits, expected 2, 3, 4, 5, 6 or 8"),
            Self::Group(group) => write!(f, "group of {group}, expected 32, 64 or 128"),
            Self::Cols { cols, group } => {
                write!(f, "{cols} columns are not a multiple of the group of {group}")
            }
            Self::Length { part, expected: Some(expected), actual } => {
                write!(f, "{part}: {actual} bytes, expected {expected}")
            }
            Self::Length { part, expected: None, actual } => {
                write!(f, "{part}: {actual} bytes, expected more than fit in memory")
            }
        }
    }
}

impl std::error::Error for LayoutError {}

/// A matrix of `rows` by `cols` weights over borrowed bytes of any alignment.
#[derive(Clone, Copy)]
pub struct Rows<'a> {
    format: Format,
    rows: usize,
    cols: usize,
    row_bytes: usize,
    scale_row_bytes: usize,
    weight: &'a [u8], // [rows][row_bytes]
    scales: &'a [u8], // [rows][scale_row_bytes]
    biases: &'a [u8], // [rows][scale_row_bytes]
}

impl<'a> Rows<'a> {
    /// Lays a matrix over its bytes. `scales` and `biases` are empty unless the format is affine.
    ///
    /// # Errors
    /// `LayoutError` if the format has no such rows or a slice is not exactly as long as the shape.
    pub fn new(
        format: Format,
        rows: usize,
        cols: usize,
        weight: &'a [u8],
        scales: &'a [u8],
        biases: &'a [u8],
    ) -> Result<Self, LayoutError> {
        format.check(cols)?;
        // The widest element has 32 bits, so this product bounds every length below.
        let bounded = cols.checked_mul(32).is_some();
        let exact = |part, row_bytes: usize, actual| {
            let expected = if bounded { rows.checked_mul(row_bytes) } else { None };
            if expected == Some(actual) {
                return Ok(());
            }
            Err(LayoutError::Length { part, expected, actual })
        };
        let row_bytes = if bounded { format.row_bytes(cols) } else { 0 };
        let scale_row_bytes = if bounded { format.scale_row_bytes(cols) } else { 0 };
        exact("weight", row_bytes, weight.len())?;
        exact("scales", scale_row_bytes, scales.len())?;
        exact("biases", scale_row_bytes, biases.len())?;
        Ok(Self { format, rows, cols, row_bytes, scale_row_bytes, weight, scales, biases })
    }

    /// Number of rows: the length of the result of a matrix-vector product.
    pub const fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns: the length of the vector that it is multiplied by.
    pub const fn cols(&self) -> usize {
        self.cols
    }

    /// The layout of the rows.
    pub const fn format(&self) -> Format {
        self.format
    }

    /// The bytes of one row. Panics if there is no such row.
    #[inline(always)]
    pub(crate) fn row(&self, row: usize) -> Row<'a> {
        assert!(row < self.rows, "row {row} of {}", self.rows);
        let slice = |bytes: &'a [u8], len: usize| &bytes[row * len..][..len];
        Row {
            weight: slice(self.weight, self.row_bytes),
            scales: slice(self.scales, self.scale_row_bytes),
            biases: slice(self.biases, self.scale_row_bytes),
        }
    }
}

/// The bytes of one row.
#[derive(Clone, Copy, Default)]
pub(crate) struct Row<'a> {
    pub(crate) weight: &'a [u8], // [row_bytes]
    pub(crate) scales: &'a [u8], // [scale_row_bytes]
    pub(crate) biases: &'a [u8], // [scale_row_bytes]
}

/// Element `k` of a bit stream of `bits`-wide unsigned integers.
pub(crate) fn quantised_at(weight: &[u8], bits: usize, k: usize) -> u32 {
    let bit = k * bits;
    let low = u32::from(weight[bit / 8]);
    // An element has at most 8 bits, so it lies in this byte and at most the next one.
    let high = weight.get(bit / 8 + 1).map_or(0, |&byte| u32::from(byte));
    (low | high << 8) >> (bit % 8) & ((1 << bits) - 1)
}

/// Scale or bias number `group` of a row.
#[inline(always)]
pub(crate) fn scale_at(scales: ScaleType, bytes: &[u8], group: usize) -> f32 {
    match scales {
        ScaleType::Bf16 => bf16_to_f32(u16_at(bytes, group)),
        ScaleType::F16 => f16_to_f32(u16_at(bytes, group)),
        ScaleType::F32 => f32_at(bytes, group),
    }
}

/// Little-endian 16-bit word number `k`.
#[inline(always)]
pub(crate) fn u16_at(bytes: &[u8], k: usize) -> u16 {
    u16::from_le_bytes([bytes[2 * k], bytes[2 * k + 1]])
}

/// Little-endian f32 number `k`.
#[inline(always)]
pub(crate) fn f32_at(bytes: &[u8], k: usize) -> f32 {
    f32::from_le_bytes([bytes[4 * k], bytes[4 * k + 1], bytes[4 * k + 2], bytes[4 * k + 3]])
}

/// Quantises one row to MLX affine, bit-exact with `mx.quantize` of the row rounded to bf16.
///
/// Shapes: `x [cols]`, `weight [cols * bits / 8]` bytes, `scales` and `biases [cols / group]` bf16
/// bits. In each group the end of larger magnitude is represented exactly. The arithmetic is f32;
/// the integers are chosen with the scale before it is rounded to bf16. Values must be finite.
/// The rule is that of MLX's `affine_quantize`; the goldens in `tests/` hold us to its bits.
///
/// # Panics
/// If the format has no row of `x.len()` elements or a length differs from the shapes above.
pub fn quantise_row(
    x: &[f32],
    bits: u8,
    group: u16,
    weight: &mut [u8],
    scales: &mut [u16],
    biases: &mut [u16],
) {
    let format = Format::Affine { bits, group, scales: ScaleType::Bf16 };
    if let Err(error) = format.check(x.len()) {
        panic!("quantise_row: {error}");
    }
    let group = usize::from(group);
    assert_eq!(weight.len(), format.row_bytes(x.len()), "quantise_row: weight bytes");
    assert_eq!(scales.len(), x.len() / group, "quantise_row: scales");
    assert_eq!(biases.len(), x.len() / group, "quantise_row: biases");

    let groups = x.chunks_exact(group).zip(weight.chunks_exact_mut(group * usize::from(bits) / 8));
    let affine = scales.iter_mut().zip(biases);
    for ((x, packed), (scale_out, bias_out)) in groups.zip(affine) {
        let mut rounded = [0.0; 128];
        let rounded = &mut rounded[..group];
        for (to, &from) in rounded.iter_mut().zip(x) {
            *to = bf16_to_f32(f32_to_bf16(from));
        }
        let (scale, bias) = choose_affine(rounded, bits);
        *scale_out = f32_to_bf16(scale);
        *bias_out = f32_to_bf16(bias);

        let mut q = [0; 128];
        let q = &mut q[..group];
        let max = largest(bits);
        for (q, &value) in q.iter_mut().zip(&*rounded) {
            *q = round_small(((value - bias) / scale).clamp(0.0, max));
        }
        pack(q, bits, packed);
    }
}

/// The largest integer of `bits` bits.
fn largest(bits: u8) -> f32 {
    f32::from(u8::MAX >> (8 - bits))
}

/// Scale and bias of one group, in f32 before they are rounded.
fn choose_affine(group: &[f32], bits: u8) -> (f32, f32) {
    let (low, high) = bounds(group);
    let step = ((high - low) / largest(bits)).max(1e-7);
    let (step, edge) = if low.abs() > high.abs() { (step, low) } else { (-step, high) };
    let steps = (edge / step).round_ties_even();
    if steps == 0.0 { (step, 0.0) } else { (edge / steps, edge) }
}

/// Smallest and largest of finite values, whole groups of 32.
///
/// Sixteen running bounds, because one would make each comparison wait for the one before it; the
/// plain comparison, because `f32::min` also sorts out NaN.
fn bounds(group: &[f32]) -> (f32, f32) {
    const LANES: usize = 16;
    let (mut low, mut high) = ([f32::INFINITY; LANES], [f32::NEG_INFINITY; LANES]);
    for values in group.as_chunks::<LANES>().0 {
        for i in 0..LANES {
            low[i] = if values[i] < low[i] { values[i] } else { low[i] };
            high[i] = if values[i] > high[i] { values[i] } else { high[i] };
        }
    }
    let smaller = |a: f32, b: f32| if b < a { b } else { a };
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    (low.into_iter().fold(low[0], smaller), high.into_iter().fold(high[0], larger))
}

/// Rounds a value from 0 to 255 to the nearest integer, ties to even.
fn round_small(value: f32) -> u8 {
    // At this magnitude an f32 has no fraction bits, so the addition itself rounds, and its lowest
    // bits are the integer. The library's rounding is a call on x86-64 without SSE4.1, and its
    // conversion to u8 is done element by element.
    const NO_FRACTION: f32 = 12_582_912.0;
    (value + NO_FRACTION).to_bits() as u8
}

/// Writes `q` as a little-endian bit stream; whole eights, which fill `bits` bytes each.
fn pack(q: &[u8], bits: u8, out: &mut [u8]) {
    for (eight, out) in q.as_chunks::<8>().0.iter().zip(out.chunks_exact_mut(usize::from(bits))) {
        let word = eight.iter().rev().fold(0u64, |word, &q| word << bits | u64::from(q));
        for (out, byte) in out.iter_mut().zip(word.to_le_bytes()) {
            *out = byte;
        }
    }
}
