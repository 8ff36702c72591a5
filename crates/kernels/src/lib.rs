//! CPU kernels: slices in, slices out.
//!
//! Owns the arithmetic of a decoder on quantised and plain weights, once as a specification
//! (`scalar`) and once for each instruction set under the same names. Knows no model, opens
//! nothing, spawns nothing, never allocates. The one idea: an `Isa` value is the proof that this
//! CPU has the instructions; its methods check every length once and then call the variant, so
//! that everything public here is safe.
//!
//! Sums are f32. The result of one row depends only on that row and its vector, bit for bit, so
//! callers may split rows over threads anywhere.

#![allow(unsafe_code, reason = "calls of a variant whose CPU features the `Isa` has proved")]

mod isa;

mod block;
mod float;

mod scalar;

mod lanes;

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "aarch64")]
mod neon;

mod fixed;

mod attention;

pub use attention::{
    CODED_POSITIONS, CodeBits, CodedPage, CodedQueries, CodedRows, CodedScratch, Gathered, KvRows,
    NARROW_POSITIONS, NarrowPage, NarrowRows, Order, Queries, can_code, decode, encode,
    encode_int8, rotate, rotate_back,
};
pub use block::{Format, LayoutError, Rows, ScaleType, quantise_row};
pub use fixed::{Fixed, FixedLayout, FixedMut, TILE_BYTES, TILE_ROWS, TileMut};
pub use float::{
    bf16_to_f32, e4m3_to_f32, f16_to_f32, f32_to_bf16, f32_to_f16, narrow_bf16, narrow_f16,
    widen_bf16, widen_e4m3, widen_f16,
};
pub use isa::Isa;

use isa::{Kind, dispatch};

#[cfg(target_endian = "big")]
compile_error!("weights are little-endian and the kernels load them as they are");

/// One head of the gated delta rule at one token.
pub struct DeltaHead<'a> {
    /// The recurrent state S, `[dk][dv]`, updated in place.
    pub state: &'a mut [f32],
    /// Query, `[dk]`, normalised and scaled.
    pub q: &'a [f32],
    /// Key, `[dk]`, normalised.
    pub k: &'a [f32],
    /// Value, `[dv]`.
    pub v: &'a [f32],
    /// exp(g), the factor by which the state fades.
    pub decay: f32,
    /// The rate at which the state moves towards the value.
    pub beta: f32,
    /// Scratch, `[dv]`; holds `beta * (v - S^T k)` afterwards.
    pub delta: &'a mut [f32],
    /// The result `S^T q`, `[dv]`.
    pub out: &'a mut [f32],
}

/// Products of a matrix and vectors.
impl Isa {
    /// Sum of `x` over each group: `x [groups * group]`, `sums [groups]`.
    ///
    /// # Panics
    /// If the lengths differ from these shapes.
    pub fn group_sums(self, x: &[f32], group: usize, sums: &mut [f32]) {
        assert!(group > 0 && x.len() == group * sums.len(), "group_sums: lengths");
        dispatch!(self, group_sums(x, group, sums));
    }

    /// `y[i] = w[first_row + i] . x`, with `x [cols]` and any number of rows in `y`.
    ///
    /// `sums [cols / group]` are the `group_sums` of `x` at the matrix's group; they are not read
    /// unless the format is affine. A row is summed as `scale * sum(q * x) + bias * sum(x)`.
    ///
    /// # Panics
    /// If the lengths differ from these shapes or a row is outside the matrix.
    pub fn mat_vec(self, w: &Rows, first_row: usize, x: &[f32], sums: &[f32], y: &mut [f32]) {
        check_product(w, first_row, x, sums, y.len());
        dispatch!(self, mat_vec(w, first_row, x, sums, y));
    }

    /// `out[i] = silu(gate[first_row + i] . x) * (up[first_row + i] . x)`.
    ///
    /// `sums` are those of `mat_vec`, for `gate` and for `up`.
    ///
    /// # Panics
    /// If the lengths differ from the shapes of `mat_vec` or a row is outside either matrix.
    #[expect(clippy::too_many_arguments, reason = "two matrices, one vector and its two sums")]
    pub fn gate_up(
        self,
        gate: &Rows,
        up: &Rows,
        first_row: usize,
        x: &[f32],
        sums: (&[f32], &[f32]),
        out: &mut [f32],
    ) {
        check_product(gate, first_row, x, sums.0, out.len());
        check_product(up, first_row, x, sums.1, out.len());
        dispatch!(self, gate_up(gate, up, first_row, x, sums, out));
    }

    /// One row in f32: `out [cols]`; affine rows as `scale * q + bias`.
    ///
    /// # Panics
    /// If the length differs from this shape or there is no such row.
    pub fn unpack_row(self, w: &Rows, row: usize, out: &mut [f32]) {
        assert_eq!(out.len(), w.cols(), "unpack_row: columns");
        assert!(row < w.rows(), "unpack_row: row {row} of {}", w.rows());
        dispatch!(self, unpack_row(w, row, out));
    }

    /// The inner product of two vectors of one length.
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn dot(self, a: &[f32], b: &[f32]) -> f32 {
        assert_eq!(a.len(), b.len(), "dot: lengths");
        dispatch!(self, dot(a, b))
    }

    /// One row against many vectors: `row [cols]`, `xs [n][cols]`, `out [n]`.
    ///
    /// An element of `out` does not depend on how many vectors there are, bit for bit.
    ///
    /// # Panics
    /// If the lengths differ from these shapes.
    pub fn dots(self, row: &[f32], xs: &[f32], out: &mut [f32]) {
        assert_eq!(xs.len(), row.len() * out.len(), "dots: lengths");
        dispatch!(self, dots(row, xs, out));
    }

    /// `c[i] += sum over p of a[i][p] * b[p]`: `a [rows][stride]`, of which the first `depth` elements
    /// of a row are read and the last row may end with them, `b [depth][width]`, `c [rows][width]`.
    ///
    /// # Panics
    /// If the lengths differ from these shapes or `depth` is above `stride`.
    pub fn add_product(
        self,
        (a, stride): (&[f32], usize),
        (b, width): (&[f32], usize),
        c: &mut [f32],
    ) {
        if b.is_empty() || c.is_empty() {
            return;
        }
        let (depth, rows) = (b.len() / width, c.len() / width);
        assert!(b.len() == depth * width && c.len() == rows * width, "add_product: width");
        assert!(depth <= stride && a.len() >= (rows - 1) * stride + depth, "add_product: a");
        dispatch!(self, add_product((a, stride), (b, width), c));
    }

    /// `y[i][t] = w[first_row + i] . xs[t]`: `xs [tokens][cols]`, `y [rows][tokens]`.
    ///
    /// `scratch [any number of rows][cols]`, at least one, holds unpacked rows; 16 keep the traffic
    /// of the vectors low. An element is that of `unpack_row` and `dots`, bit for bit.
    ///
    /// # Panics
    /// If the lengths differ from these shapes or a row is outside the matrix.
    pub fn mat_mul(
        self,
        w: &Rows,
        first_row: usize,
        xs: &[f32],
        y: &mut [f32],
        scratch: &mut [f32],
    ) {
        if y.is_empty() {
            return;
        }
        assert!(w.cols() > 0 && scratch.len() >= w.cols(), "mat_mul: scratch");
        let tokens = xs.len() / w.cols();
        assert!(tokens > 0 && xs.len() == tokens * w.cols(), "mat_mul: columns");
        let inside = first_row.checked_add(y.len() / tokens).is_some_and(|end| end <= w.rows());
        assert!(inside && y.len().is_multiple_of(tokens), "mat_mul: rows from {first_row}");
        dispatch!(self, mat_mul(w, first_row, xs, y, scratch));
    }
}

/// Rows in f32, from `row` of a result on, and the vectors that they are multiplied by.
#[derive(Clone, Copy)]
struct Block<'a> {
    rows: &'a [f32], // [..][cols]
    xs: &'a [f32],   // [tokens][cols]
    cols: usize,
    row: usize,
    tokens: usize,
}

/// Operations on vectors.
impl Isa {
    /// `y += a * x`.
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn axpy(self, a: f32, x: &[f32], y: &mut [f32]) {
        assert_eq!(x.len(), y.len(), "axpy: lengths");
        dispatch!(self, axpy(a, x, y));
    }

    /// `x *= a`.
    pub fn scale(self, a: f32, x: &mut [f32]) {
        dispatch!(self, scale(a, x));
    }

    /// `y += x`.
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn add(self, x: &[f32], y: &mut [f32]) {
        assert_eq!(x.len(), y.len(), "add: lengths");
        dispatch!(self, add(x, y));
    }

    /// `out = x / sqrt(mean(x^2) + eps) * w`, all of one length.
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn rms_norm(self, x: &[f32], w: &[f32], eps: f32, out: &mut [f32]) {
        assert!(x.len() == out.len() && w.len() == out.len(), "rms_norm: lengths");
        dispatch!(self, rms_norm(x, w, eps, out));
    }

    /// `x = x / sqrt(sum(x^2) + eps) * factor`.
    pub fn l2_norm(self, x: &mut [f32], eps: f32, factor: f32) {
        dispatch!(self, l2_norm(x, eps, factor));
    }

    /// `x = x / sqrt(mean(x^2) + eps) * w * silu(z)`, all of one length.
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn gated_norm(self, x: &mut [f32], w: &[f32], z: &[f32], eps: f32) {
        assert!(w.len() == x.len() && z.len() == x.len(), "gated_norm: lengths");
        dispatch!(self, gated_norm(x, w, z, eps));
    }

    /// `x = exp(x - max(x)) / sum(exp(x - max(x)))`; at least one element must be finite.
    pub fn softmax(self, x: &mut [f32]) {
        dispatch!(self, softmax(x));
    }

    /// `x = x / (1 + exp(-x))`.
    pub fn silu(self, x: &mut [f32]) {
        dispatch!(self, silu(x));
    }

    /// `out = silu(gate) * up`, all of one length.
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn silu_mul(self, gate: &[f32], up: &[f32], out: &mut [f32]) {
        assert!(gate.len() == out.len() && up.len() == out.len(), "silu_mul: lengths");
        dispatch!(self, silu_mul(gate, up, out));
    }

    /// `x = x / (1 + exp(-gate))`, both of one length.
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn sigmoid_mul(self, gate: &[f32], x: &mut [f32]) {
        assert_eq!(gate.len(), x.len(), "sigmoid_mul: lengths");
        dispatch!(self, sigmoid_mul(gate, x));
    }

    /// Rotates one head: element `j` pairs with `j + half`, where `half` is the length of `cos`
    /// and of `sin`. Elements from `2 * half` on pass through.
    ///
    /// # Panics
    /// If `cos` and `sin` differ in length or `x` is shorter than both together.
    pub fn rope(self, x: &mut [f32], cos: &[f32], sin: &[f32]) {
        assert_eq!(cos.len(), sin.len(), "rope: lengths");
        assert!(cos.len() <= x.len() / 2, "rope: {} pairs in {}", cos.len(), x.len());
        dispatch!(self, rope(x, cos, sin));
    }

    /// Depthwise convolution over four tokens: `out[c] = silu(sum_j w[j][c] * u[j][c])`.
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn conv4(self, w: [&[f32]; 4], u: [&[f32]; 4], out: &mut [f32]) {
        assert!(w.iter().chain(&u).all(|s| s.len() == out.len()), "conv4: lengths");
        dispatch!(self, conv4(w, u, out));
    }

    /// One head of the gated delta rule, in this order:
    /// `S *= decay; delta = beta * (v - S^T k); S += k (x) delta; out = S^T q`.
    ///
    /// # Panics
    /// If the lengths differ from the shapes of `DeltaHead`.
    pub fn delta_step(self, head: &mut DeltaHead) {
        let (dk, dv) = (head.k.len(), head.v.len());
        assert_eq!(head.q.len(), dk, "delta_step: q");
        assert_eq!(head.state.len(), dk * dv, "delta_step: state");
        assert!(head.delta.len() == dv && head.out.len() == dv, "delta_step: delta and out");
        if dv > 0 {
            dispatch!(self, delta_step(head));
        }
    }
}

/// The lengths of a product of `count` rows and one vector.
fn check_product(w: &Rows, first_row: usize, x: &[f32], sums: &[f32], count: usize) {
    assert_eq!(x.len(), w.cols(), "product: columns");
    let inside = first_row.checked_add(count).is_some_and(|end| end <= w.rows());
    assert!(inside, "product: rows {first_row} + {count} of {}", w.rows());
    if let Format::Affine { group, .. } = w.format() {
        assert_eq!(sums.len(), w.cols() / usize::from(group), "product: group sums");
    }
}
