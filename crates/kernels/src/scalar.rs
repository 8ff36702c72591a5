//! The specification: every operation in its plainest form, one element after the other.
//!
//! Owns the meaning of each operation and the order in which its arithmetic is written down; the
//! other variants are tested against it within stated tolerances. It is never optimised. Lengths
//! are checked in `lib.rs` before a call arrives here.

use crate::DeltaHead;
use crate::attention::{Gathered, KvRows, Queries};
use crate::block::{Format, Row, Rows, f32_at, quantised_at, scale_at, u16_at};
use crate::float::{bf16_to_f32, f16_to_f32};

pub(crate) fn group_sums(x: &[f32], group: usize, sums: &mut [f32]) {
    for (sum, x) in sums.iter_mut().zip(x.chunks_exact(group)) {
        *sum = x.iter().sum();
    }
}

pub(crate) fn mat_vec(w: &Rows, first_row: usize, x: &[f32], sums: &[f32], y: &mut [f32]) {
    for (i, y) in y.iter_mut().enumerate() {
        *y = row_dot(w.format(), w.row(first_row + i), x, sums);
    }
}

pub(crate) fn gate_up(
    gate: &Rows,
    up: &Rows,
    first_row: usize,
    x: &[f32],
    sums: (&[f32], &[f32]),
    out: &mut [f32],
) {
    for (i, out) in out.iter_mut().enumerate() {
        let row = first_row + i;
        let g = row_dot(gate.format(), gate.row(row), x, sums.0);
        let u = row_dot(up.format(), up.row(row), x, sums.1);
        *out = silu_of(g) * u;
    }
}

pub(crate) fn unpack_row(w: &Rows, row: usize, out: &mut [f32]) {
    let bytes = w.row(row);
    for (k, out) in out.iter_mut().enumerate() {
        *out = weight_at(w.format(), bytes, k);
    }
}

pub(crate) fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

pub(crate) fn dots(row: &[f32], xs: &[f32], out: &mut [f32]) {
    for (i, out) in out.iter_mut().enumerate() {
        *out = dot(row, &xs[i * row.len()..][..row.len()]);
    }
}

pub(crate) fn mat_mul(w: &Rows, first_row: usize, xs: &[f32], y: &mut [f32], scratch: &mut [f32]) {
    let row = &mut scratch[..w.cols()];
    for (i, y) in y.chunks_exact_mut(xs.len() / w.cols()).enumerate() {
        unpack_row(w, first_row + i, row);
        dots(row, xs, y);
    }
}

pub(crate) fn axpy(a: f32, x: &[f32], y: &mut [f32]) {
    for (y, x) in y.iter_mut().zip(x) {
        *y += a * x;
    }
}

pub(crate) fn scale(a: f32, x: &mut [f32]) {
    for x in x {
        *x *= a;
    }
}

pub(crate) fn add(x: &[f32], y: &mut [f32]) {
    for (y, x) in y.iter_mut().zip(x) {
        *y += x;
    }
}

pub(crate) fn rms_norm(x: &[f32], w: &[f32], eps: f32, out: &mut [f32]) {
    let factor = rms_factor(x, eps);
    for ((out, x), w) in out.iter_mut().zip(x).zip(w) {
        *out = x * factor * w;
    }
}

pub(crate) fn l2_norm(x: &mut [f32], eps: f32, factor: f32) {
    let factor = factor / (dot(x, x) + eps).sqrt();
    scale(factor, x);
}

pub(crate) fn gated_norm(x: &mut [f32], w: &[f32], z: &[f32], eps: f32) {
    let factor = rms_factor(x, eps);
    for ((x, w), z) in x.iter_mut().zip(w).zip(z) {
        *x = *x * factor * w * silu_of(*z);
    }
}

pub(crate) fn softmax(x: &mut [f32]) {
    let max = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut sum = 0.0;
    for x in x.iter_mut() {
        *x = (*x - max).exp();
        sum += *x;
    }
    scale(1.0 / sum, x);
}

pub(crate) fn silu(x: &mut [f32]) {
    for x in x {
        *x = silu_of(*x);
    }
}

pub(crate) fn silu_mul(gate: &[f32], up: &[f32], out: &mut [f32]) {
    for ((out, gate), up) in out.iter_mut().zip(gate).zip(up) {
        *out = silu_of(*gate) * up;
    }
}

pub(crate) fn sigmoid_mul(gate: &[f32], x: &mut [f32]) {
    for (x, gate) in x.iter_mut().zip(gate) {
        *x /= 1.0 + (-gate).exp();
    }
}

pub(crate) fn rope(x: &mut [f32], cos: &[f32], sin: &[f32]) {
    let half = cos.len();
    for j in 0..half {
        let (a, b) = (x[j], x[j + half]);
        x[j] = a * cos[j] - b * sin[j];
        x[j + half] = b * cos[j] + a * sin[j];
    }
}

pub(crate) fn conv4(w: [&[f32]; 4], u: [&[f32]; 4], out: &mut [f32]) {
    for (c, out) in out.iter_mut().enumerate() {
        let sum = (0..4).map(|j| w[j][c] * u[j][c]).sum();
        *out = silu_of(sum);
    }
}

pub(crate) fn add_product(
    (a, stride): (&[f32], usize),
    (b, width): (&[f32], usize),
    c: &mut [f32],
) {
    for (a, c) in a.chunks(stride).zip(c.chunks_exact_mut(width)) {
        for (a, b) in a.iter().zip(b.chunks_exact(width)) {
            axpy(*a, b, c);
        }
    }
}

pub(crate) fn delta_step(head: &mut DeltaHead) {
    let DeltaHead { state, q, k, v, decay, beta, delta, out } = head;
    let dv = v.len();
    scale(*decay, state);
    delta.fill(0.0);
    for (s, k) in state.chunks_exact(dv).zip(*k) {
        axpy(*k, s, delta);
    }
    for (delta, v) in delta.iter_mut().zip(*v) {
        *delta = *beta * (v - *delta);
    }
    out.fill(0.0);
    for ((s, k), q) in state.chunks_exact_mut(dv).zip(*k).zip(*q) {
        axpy(*k, delta, s);
        axpy(*q, s, out);
    }
}

pub(crate) fn attend(
    page: &KvRows,
    queries: &Queries,
    gathered: &mut Gathered,
    scores: &mut [f32],
) {
    let rows = queries.visible.len();
    let head_dim = queries.rows.len() / rows;
    let positions = scores.len() / rows;
    for (row, &visible) in queries.visible.iter().enumerate() {
        if visible == 0 {
            continue;
        }
        let query = &queries.rows[row * head_dim..][..head_dim];
        let weights = &mut scores[row * positions..][..visible];
        dots(query, &page.keys[..visible * head_dim], weights);
        let max = weights.iter().copied().fold(gathered.max[row], f32::max);
        let factor = (gathered.max[row] - max).exp();
        gathered.max[row] = max;
        gathered.sum[row] *= factor;
        let mix = &mut gathered.mix[row * head_dim..][..head_dim];
        scale(factor, mix);
        for (score, value) in weights.iter_mut().zip(page.values.chunks_exact(head_dim)) {
            let weight = (*score - max).exp();
            gathered.sum[row] += weight;
            axpy(weight, value, mix);
        }
    }
}

pub(crate) fn unpack_plain(format: Format, bytes: &[u8], out: &mut [f32]) {
    let row = Row { weight: bytes, ..Row::default() };
    for (k, out) in out.iter_mut().enumerate() {
        *out = weight_at(format, row, k);
    }
}

pub(crate) fn unpack_scaled(codes: &[i8], scales: &[f32], out: &mut [f32]) {
    let width = codes.len() / scales.len();
    for (i, (code, out)) in codes.iter().zip(out).enumerate() {
        *out = f32::from(*code) * scales[i / width];
    }
}

/// `x / (1 + exp(-x))`.
pub(crate) fn silu_of(x: f32) -> f32 {
    x / (1.0 + (-x).exp())
}

/// `1 / sqrt(mean(x^2) + eps)`.
fn rms_factor(x: &[f32], eps: f32) -> f32 {
    1.0 / (dot(x, x) / x.len() as f32 + eps).sqrt()
}

/// An affine row is summed group by group: `scale * sum(q * x) + bias * sum(x)`.
fn row_dot(format: Format, row: Row, x: &[f32], sums: &[f32]) -> f32 {
    let Format::Affine { bits, group, scales } = format else {
        return x.iter().enumerate().map(|(k, x)| weight_at(format, row, k) * x).sum();
    };
    let (bits, group) = (usize::from(bits), usize::from(group));
    let mut y = 0.0;
    for (g, x) in x.chunks_exact(group).enumerate() {
        let mut qx = 0.0;
        for (k, x) in x.iter().enumerate() {
            qx += quantised_at(row.weight, bits, g * group + k) as f32 * x;
        }
        y += scale_at(scales, row.scales, g) * qx + scale_at(scales, row.biases, g) * sums[g];
    }
    y
}

/// Weight `k` of a row in f32.
fn weight_at(format: Format, row: Row, k: usize) -> f32 {
    match format {
        Format::Affine { bits, group, scales } => {
            let q = quantised_at(row.weight, usize::from(bits), k) as f32;
            let g = k / usize::from(group);
            scale_at(scales, row.scales, g) * q + scale_at(scales, row.biases, g)
        }
        Format::Bf16 => bf16_to_f32(u16_at(row.weight, k)),
        Format::F16 => f16_to_f32(u16_at(row.weight, k)),
        Format::F32 => f32_at(row.weight, k),
    }
}
