//! The specification of products in fixed point: one integer after the other.
//!
//! Owns the meaning of each operation; the other variants are tested against it. It is never
//! optimised. Lengths are checked in `mod.rs` before a call arrives here.

use super::{Fixed, FixedLayout, FixedMut, TILE_ROWS, TileMut};
use crate::attention::Gathered;
use crate::attention::coded::{
    CODED_POSITIONS, CodedPage, CodedQueries, CodedScratch, Order, QUERY_LARGEST, TINY,
    WEIGHT_LARGEST, code_bytes, code_words, level_at,
};
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

pub(crate) fn code_queries(x: &[f32], out: &mut CodedQueries) {
    let width = x.len() / out.scales.len();
    for (r, x) in x.chunks_exact(width).enumerate() {
        let largest = x.iter().fold(TINY, |largest, x| largest.max(x.abs()));
        let codes = &mut out.codes[r * width..][..width];
        out.sums[r] = code_bytes(x, QUERY_LARGEST / largest, codes) as f32;
        let finite = x.iter().map(|x| x.abs()).sum::<f32>().is_finite();
        out.scales[r] = if finite { largest / QUERY_LARGEST } else { f32::NAN };
    }
}

pub(crate) fn attend_coded(
    page: &CodedPage,
    queries: &CodedQueries,
    gathered: &mut Gathered,
    scratch: &mut CodedScratch,
) {
    let rows = queries.scales.len();
    let width = queries.codes.len() / rows;
    for r in 0..rows {
        let scores = &mut scratch.scores[r * CODED_POSITIONS..][..CODED_POSITIONS];
        for (position, score) in scores.iter_mut().enumerate() {
            let product = |element: usize| {
                let level = level_at(&page.keys, Order::Keys.place(position, element, width));
                i32::from(level) * i32::from(queries.codes[r * width + element])
            };
            let sum: i32 = (0..width).map(product).sum();
            *score = sum as f32 * queries.scales[r] * page.keys.scales[position];
        }
        let max = scores.iter().copied().fold(gathered.max[r], f32::max);
        let factor = (gathered.max[r] - max).exp();
        gathered.max[r] = max;
        scores.iter_mut().for_each(|score| *score = (*score - max).exp());
        gathered.sum[r] = gathered.sum[r] * factor + scores.iter().sum::<f32>();
        let products = scores.iter_mut().zip(page.values.scales);
        products.for_each(|(weight, scale)| *weight *= scale);
        let finite = scores.iter().sum::<f32>().is_finite();
        let largest = scores.iter().copied().fold(TINY, f32::max);
        let step = if finite { largest / WEIGHT_LARGEST } else { f32::NAN };
        let (hi, lo) = scratch.weights.split_at_mut(CODED_POSITIONS);
        code_words(scores, WEIGHT_LARGEST / largest, hi, lo);
        for (element, mix) in gathered.mix[r * width..][..width].iter_mut().enumerate() {
            let product = |position: usize| {
                let level = level_at(&page.values, Order::Values.place(position, element, width));
                i32::from(level) * (256 * i32::from(hi[position]) + i32::from(lo[position]))
            };
            let sum: i32 = (0..CODED_POSITIONS).map(product).sum();
            *mix = *mix * factor + step * sum as f32;
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
