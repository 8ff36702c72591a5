//! Attention over a page of narrow numbers, widened a few positions at a time.
//!
//! Owns the formats that are elements one after the other: halves, and bytes with a scale for each
//! vector. The wide copies are so few that they stay in the nearest cache, where all rows meet them;
//! the arithmetic is that of [`Isa::attend`]. Refuses codes: `coded` computes on those themselves.

use crate::block::Format;
use crate::isa::{Isa, Kind, dispatch};

use super::{Gathered, KvRows, Queries};

/// Positions widened at a time.
pub const NARROW_POSITIONS: usize = 16;

/// Keys or values of one KV head, `[positions][head_dim]`, little-endian.
#[derive(Clone, Copy)]
pub enum NarrowRows<'a> {
    /// IEEE half.
    F16(&'a [u8]),
    /// The upper half of an f32.
    Bf16(&'a [u8]),
    /// An element is `scale * code`.
    Int8 {
        /// `[positions][head_dim]`.
        codes: &'a [i8],
        /// `[positions]`.
        scales: &'a [f32],
    },
}

impl NarrowRows<'_> {
    /// Elements in all.
    fn len(&self) -> usize {
        match self {
            Self::F16(bytes) | Self::Bf16(bytes) => bytes.len() / 2,
            Self::Int8 { codes, .. } => codes.len(),
        }
    }

    /// Some positions.
    fn part(&self, positions: std::ops::Range<usize>, head_dim: usize) -> Self {
        let elements = positions.start * head_dim..positions.end * head_dim;
        let halves = 2 * elements.start..2 * elements.end;
        match self {
            Self::F16(bytes) => Self::F16(&bytes[halves]),
            Self::Bf16(bytes) => Self::Bf16(&bytes[halves]),
            Self::Int8 { codes, scales } => {
                Self::Int8 { codes: &codes[elements], scales: &scales[positions] }
            }
        }
    }
}

/// One KV head of a narrow page.
#[derive(Clone, Copy)]
pub struct NarrowPage<'a> {
    /// Keys.
    pub keys: NarrowRows<'a>,
    /// Values.
    pub values: NarrowRows<'a>,
}

/// Rounds a vector to bytes: a scale and `codes [x.len()]`, so that an element is `scale * code`
/// with an error of at most half a scale. A vector that is not finite gets a scale that is not.
///
/// # Panics
/// If the lengths differ.
pub fn encode_int8(x: &[f32], codes: &mut [i8]) -> f32 {
    assert_eq!(x.len(), codes.len(), "encode_int8: lengths");
    let largest = x.iter().fold(0f32, |largest, x| largest.max(x.abs()));
    let scale = largest.max(1e-30) / 127.0;
    for (x, code) in x.iter().zip(codes) {
        *code = (x / scale).round_ties_even() as i8;
    }
    let finite = x.iter().map(|x| x.abs()).sum::<f32>().is_finite();
    if finite { scale } else { f32::NAN }
}

/// Narrow attention.
impl Isa {
    /// The numbers that rows stand for: `out [positions][head_dim]`.
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn widen_rows(self, rows: &NarrowRows, head_dim: usize, out: &mut [f32]) {
        assert_eq!(rows.len(), out.len(), "widen_rows: lengths");
        match rows {
            NarrowRows::F16(bytes) => dispatch!(self, unpack_plain(Format::F16, bytes, out)),
            NarrowRows::Bf16(bytes) => dispatch!(self, unpack_plain(Format::Bf16, bytes, out)),
            NarrowRows::Int8 { codes, scales } => {
                assert_eq!(codes.len(), scales.len() * head_dim, "widen_rows: scales");
                dispatch!(self, unpack_scaled(codes, scales, out));
            }
        }
    }

    /// As [`Isa::attend`] on the widened page. `wide` is scratch of `2 * NARROW_POSITIONS * head_dim`,
    /// `scores` of `rows * NARROW_POSITIONS`.
    ///
    /// # Panics
    /// If the lengths differ from the shapes.
    pub fn attend_narrow(
        self,
        page: &NarrowPage,
        queries: &Queries,
        gathered: &mut Gathered,
        (wide, scores): (&mut [f32], &mut [f32]),
        visible: &mut [usize],
    ) {
        let rows = queries.visible.len();
        let head_dim = queries.rows.len() / rows;
        let positions = page.keys.len() / head_dim;
        assert_eq!(page.values.len(), page.keys.len(), "attend_narrow: values");
        let (keys, values) = wide.split_at_mut(NARROW_POSITIONS * head_dim);
        for first in (0..positions).step_by(NARROW_POSITIONS) {
            let some = first..positions.min(first + NARROW_POSITIONS);
            let (keys, values) =
                (&mut keys[..some.len() * head_dim], &mut values[..some.len() * head_dim]);
            self.widen_rows(&page.keys.part(some.clone(), head_dim), head_dim, keys);
            self.widen_rows(&page.values.part(some.clone(), head_dim), head_dim, values);
            for (here, all) in visible.iter_mut().zip(queries.visible) {
                *here = all.saturating_sub(first).min(some.len());
            }
            let queries = Queries { rows: queries.rows, visible: &visible[..rows] };
            let scores = &mut scores[..rows * some.len()];
            self.attend(&KvRows { keys, values }, &queries, gathered, scores);
        }
    }
}
