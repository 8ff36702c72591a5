//! The products in fixed point on 4 lanes, for AArch64 with NEON and its dot products.
//!
//! Owns what differs from `neon`: one instruction adds four products of signed bytes to an i32.

#![allow(unsafe_code, reason = "an instruction whose intrinsic is not stable")]

use std::arch::aarch64::*;
use std::arch::asm;
use std::ops::Range;

use super::lanes::{by_width, fixed_operations};
use super::neon::{
    BLOCK_PANELS, Bytes, Ints, as_bytes, as_lanes, broadcast, codes, load_bytes, look_up, plane,
    signed, store_bytes, times_256, to_floats, transpose, widen, with_third_bit, zero_bytes,
    zero_ints,
};
use super::{
    AHEAD_BYTES, BLOCK_TOKENS, FACTORS, Fixed, FixedLayout, FixedMut, ROW_BLOCK, STEP_COLS, Step,
    TILE_ROWS, TileMut, padded,
};
use crate::attention::Gathered;
use crate::attention::coded::{
    CODED_POSITIONS, CodeBits, CodedPage, CodedQueries, CodedRows, CodedScratch, LEVEL_ZERO,
    QUERY_LARGEST, SIDE, TINY, UNIT, WEIGHT_LARGEST, code_bytes, code_words,
};
use crate::attention::coded_lanes::coded_operations;
use crate::block::{Format, Row, Rows, ScaleType, scale_at};
use crate::neon::{
    self as floats, LANES, Lanes, add_lanes, fma, load, load_part as first_floats, mul_lanes,
    splat, store, sum_lanes,
};

fixed_operations!("neon,dotprod");
coded_operations!("neon,dotprod");

/// Adds to each i32 four products of signed bytes.
#[inline]
#[target_feature(enable = "neon,dotprod")]
fn dot_signed(sum: Ints, codes: Bytes, x: Bytes) -> Ints {
    let mut sum = sum;
    // SAFETY: registers only; the caller has the instruction.
    unsafe {
        asm!(
            "sdot {sum:v}.4s, {codes:v}.16b, {x:v}.16b",
            sum = inout(vreg) sum,
            codes = in(vreg) codes,
            x = in(vreg) x,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    sum
}

/// Adds to each i32 the products of four unsigned and four signed bytes.
#[inline]
#[target_feature(enable = "neon,dotprod")]
fn dot<const BITS: usize>(sum: Ints, codes: Bytes, x: Bytes) -> Ints {
    if BITS < 8 {
        return dot_signed(sum, codes, x);
    }
    let top = vdupq_n_u8(128);
    let sum = dot_signed(sum, vbicq_u8(codes, top), x);
    vsubq_s32(sum, dot_signed(zero_ints(), vandq_u8(codes, top), x))
}

/// One row's next 64 columns: adds the integer sums times the factors of their groups to `total`.
#[inline]
#[target_feature(enable = "neon,dotprod")]
fn step<const BITS: usize, const GROUP: usize, const FAST: bool>(
    packed: &[u8],
    (hi, lo): (&[i8; 64], &[i8; 64]),
    factors: &[f32],
    total: Lanes,
) -> Lanes {
    let codes = codes::<BITS, GROUP>(packed);
    let (hi, lo) = (signed(hi), signed(lo));
    let mut total = total;
    for (g, factor) in factors[..64 / GROUP].iter().enumerate() {
        let group = g * GROUP / 16..(g + 1) * GROUP / 16;
        let mut sum = zero_ints();
        for i in group.clone() {
            sum = dot::<BITS>(sum, codes[i], hi[i]);
        }
        if !FAST {
            sum = times_256(sum);
            for i in group {
                sum = dot::<BITS>(sum, codes[i], lo[i]);
            }
        }
        total = fma(to_floats(sum), splat(*factor), total);
    }
    total
}
