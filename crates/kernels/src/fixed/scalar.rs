//! The specification of products in fixed point: one integer after the other.
//!
//! Owns the meaning of each operation; the other variants are tested against it. It is never
//! optimised. Lengths are checked in `mod.rs` before a call arrives here.

use super::{Fixed, FixedLayout, FixedMut, TILE_ROWS, TileMut};
use crate::block::{Format, Row, Rows, quantised_at, scale_at};
use crate::scalar::silu_of;

pub(crate) fn fix(layout: FixedLayout, x: &[f32], out: &mut FixedMut) {
    super::fix_groups(layout, x, out);
}

pub(crate) fn mat_vec(w: &Rows, first_row: usize, x: &Fixed, y: &mut [f32]) {
    for (i, y) in y.iter_mut().enumerate() {
        *y = row_dot(w.format(), w.row(first_row + i), x, 0);
    }
}

pub(crate) fn gate_up(
    (gate, up): (&Rows, &Rows),
    first_row: usize,
    x: (&Fixed, &Fixed),
    out: &mut [f32],
) {
    for (i, out) in out.iter_mut().enumerate() {
        let g = row_dot(gate.format(), gate.row(first_row + i), x.0, 0);
        let u = row_dot(up.format(), up.row(first_row + i), x.1, 0);
        *out = silu_of(g) * u;
    }
}

pub(crate) fn mat_mul(w: &Rows, first_row: usize, xs: &Fixed, y: &mut [f32], _: &mut TileMut) {
    let rows = TILE_ROWS.min(w.rows() - first_row);
    for (t, y) in y.chunks_mut(TILE_ROWS).enumerate() {
        for (i, y) in y[..rows].iter_mut().enumerate() {
            *y = row_dot(w.format(), w.row(first_row + i), xs, t * w.cols());
        }
    }
}

/// One row times the vector whose elements begin at `start`.
fn row_dot(format: Format, row: Row, xs: &Fixed, start: usize) -> f32 {
    let Format::Affine { bits, group, scales } = format else { return f32::NAN };
    let (bits, group) = (usize::from(bits), usize::from(group));
    let cols = row.weight.len() * 8 / bits;
    let part = xs.layout.scale_group();
    let mut y = 0.0;
    for g in 0..cols / group {
        for first in (g * group..(g + 1) * group).step_by(part) {
            let product = |k| {
                let q = quantised_at(row.weight, bits, first + k) as i32;
                q * integer_at(xs, start + first, k)
            };
            let sum: i32 = (0..part).map(product).sum();
            let a = xs.scales[(start + first) / part];
            y += scale_at(scales, row.scales, g) * a * sum as f32;
        }
        y += scale_at(scales, row.biases, g) * xs.sums[start / group + g];
    }
    y
}

/// Element `k` of the group that begins at `first`.
fn integer_at(xs: &Fixed, first: usize, k: usize) -> i32 {
    let planes = usize::from(xs.layout.planes);
    let at = first + k % planes * (xs.layout.scale_group() / planes) + k / planes;
    let hi = i32::from(xs.hi[at]);
    xs.lo.get(at).map_or(hi, |lo| 256 * hi + i32::from(*lo))
}
