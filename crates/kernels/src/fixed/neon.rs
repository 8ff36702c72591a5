//! The products in fixed point on 4 lanes, for AArch64 with NEON.
//!
//! Owns the primitives of these registers; `lanes.rs` makes the operations of them. Four registers
//! hold 64 columns. Bytes are multiplied signed by signed, so codes that use their top bit are
//! multiplied in two parts, the upper of which stands for its negative.

#![allow(unsafe_code, reason = "loads and stores through the pointers of array references")]

use std::arch::aarch64::*;
use std::ops::Range;

use super::lanes::{by_width, fixed_operations};
use super::{
    AHEAD_BYTES, BLOCK_TOKENS, FACTORS, Fixed, FixedLayout, FixedMut, ROW_BLOCK, STEP_COLS, Step,
    TILE_ROWS, TileMut, first_bytes, padded, quarter_start, windows,
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

pub(super) type Bytes = uint8x16_t;
pub(super) type Ints = int32x4_t;
/// Panels and vectors of one block: 12 sums and 12 totals of 32 registers.
pub(super) const BLOCK_PANELS: usize = 4;

fixed_operations!("neon");
coded_operations!("neon");

/// Adds to each i32 four products of codes below 128 and signed bytes.
#[inline]
#[target_feature(enable = "neon")]
fn dot_signed(sum: Ints, codes: int8x16_t, x: int8x16_t) -> Ints {
    // Products of 128 * 128 fit an i16, but two of them do not: pairs are added as i32.
    let low = vpaddlq_s16(vmull_s8(vget_low_s8(codes), vget_low_s8(x)));
    let high = vpaddlq_s16(vmull_high_s8(codes, x));
    vaddq_s32(sum, vpaddq_s32(low, high))
}

/// Adds to each i32 the products of four unsigned and four signed bytes.
#[inline]
#[target_feature(enable = "neon")]
fn dot<const BITS: usize>(sum: Ints, codes: Bytes, x: Bytes) -> Ints {
    let x = vreinterpretq_s8_u8(x);
    if BITS < 8 {
        return dot_signed(sum, vreinterpretq_s8_u8(codes), x);
    }
    let top = vdupq_n_u8(128);
    let sum = dot_signed(sum, vreinterpretq_s8_u8(vbicq_u8(codes, top)), x);
    let upper = vreinterpretq_s8_u8(vandq_u8(codes, top));
    vsubq_s32(sum, dot_signed(zero_ints(), upper, x))
}

/// One row's next 64 columns: adds the integer sums times the factors of their groups to `total`.
#[inline]
#[target_feature(enable = "neon")]
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

/// The next 64 columns, in `8 * BITS` bytes, in the order of the vectors.
#[inline]
#[target_feature(enable = "neon")]
pub(super) fn codes<const BITS: usize, const GROUP: usize>(packed: &[u8]) -> [Bytes; 4] {
    assert!(packed.len() == 8 * BITS);
    match BITS {
        2 => {
            let bytes = load_bytes(&packed.as_chunks().0[0]);
            let low = vdupq_n_u8(3);
            let planes = [
                vandq_u8(bytes, low),
                vandq_u8(vshrq_n_u8::<2>(bytes), low),
                vandq_u8(vshrq_n_u8::<4>(bytes), low),
                vshrq_n_u8::<6>(bytes),
            ];
            if GROUP == 64 {
                return planes;
            }
            let [a, b, c, d] = planes;
            let [first, second] = [low_halves(a, b), low_halves(c, d)];
            [first, second, high_halves(a, b), high_halves(c, d)]
        }
        4 => {
            let halves = packed.as_chunks().0;
            let (first, second) = (load_bytes(&halves[0]), load_bytes(&halves[1]));
            let low = vdupq_n_u8(15);
            let even = [vandq_u8(first, low), vandq_u8(second, low)];
            let odd = [vshrq_n_u8::<4>(first), vshrq_n_u8::<4>(second)];
            if GROUP == 64 {
                return [even[0], even[1], odd[0], odd[1]];
            }
            [even[0], odd[0], even[1], odd[1]]
        }
        8 => load_four(packed.as_chunks().0),
        _ => [
            spread_quarter::<BITS>(packed, 0),
            spread_quarter::<BITS>(packed, 1),
            spread_quarter::<BITS>(packed, 2),
            spread_quarter::<BITS>(packed, 3),
        ],
    }
}

/// 16 of the 64 elements of a bit stream, which may straddle bytes.
#[inline]
#[target_feature(enable = "neon")]
fn spread_quarter<const BITS: usize>(packed: &[u8], quarter: usize) -> Bytes {
    let start = quarter_start(BITS, quarter);
    let (loads, _) = packed[start..].as_chunks();
    let bytes = load_bytes(&loads[0]);
    let windows = const { &windows(BITS) }[quarter].as_chunks().0;
    let shifts = const { &shifts(BITS) }.as_chunks().0;
    let low = shifted(vqtbl1q_u8(bytes, load_bytes(&windows[0])), &shifts[0]);
    let high = shifted(vqtbl1q_u8(bytes, load_bytes(&windows[1])), &shifts[1]);
    vandq_u8(vcombine_u8(low, high), vdupq_n_u8(u8::MAX >> (8 - BITS)))
}

/// The low bytes of eight u16, each shifted.
#[inline]
#[target_feature(enable = "neon")]
fn shifted(pairs: Bytes, shifts: &[u8; 16]) -> uint8x8_t {
    let shifts = vreinterpretq_s16_u8(load_bytes(shifts));
    vmovn_u16(vshlq_u16(vreinterpretq_u16_u8(pairs), shifts))
}

/// For each of 16 elements, as an i16, minus the bit at which it starts in its first byte: a left
/// shift by a negative count goes right.
const fn shifts(bits: usize) -> [u8; 32] {
    let mut out = [0; 32];
    let mut k = 0;
    while k < 16 {
        let shift = (-((k * bits % 8) as i16)).to_le_bytes();
        out[2 * k] = shift[0];
        out[2 * k + 1] = shift[1];
        k += 1;
    }
    out
}

/// The first of the bytes as scales, as many as there are lanes; zero where there are none.
#[inline]
#[target_feature(enable = "neon")]
pub(super) fn widen(scales: ScaleType, bytes: &[u8]) -> Lanes {
    match scales {
        ScaleType::Bf16 => floats::widen_bf16(&first_bytes(bytes)),
        ScaleType::F16 => floats::widen_f16(&first_bytes(bytes)),
        ScaleType::F32 => floats::widen_f32(&first_bytes(bytes)),
    }
}

#[inline]
#[target_feature(enable = "neon")]
fn load_four(quarters: &[[u8; 16]]) -> [Bytes; 4] {
    let [a, b, c, d] = [&quarters[0], &quarters[1], &quarters[2], &quarters[3]];
    [load_bytes(a), load_bytes(b), load_bytes(c), load_bytes(d)]
}

#[inline]
#[target_feature(enable = "neon")]
fn low_halves(a: Bytes, b: Bytes) -> Bytes {
    vreinterpretq_u8_u64(vzip1q_u64(vreinterpretq_u64_u8(a), vreinterpretq_u64_u8(b)))
}

#[inline]
#[target_feature(enable = "neon")]
fn high_halves(a: Bytes, b: Bytes) -> Bytes {
    vreinterpretq_u8_u64(vzip2q_u64(vreinterpretq_u64_u8(a), vreinterpretq_u64_u8(b)))
}

/// A 4 by 4 matrix of i32, rows to columns.
#[inline]
#[target_feature(enable = "neon")]
pub(super) fn transpose(rows: [Bytes; LANES]) -> [Bytes; LANES] {
    let [a, b, c, d] = rows;
    let (ab_even, ab_odd) = pairs(a, b);
    let (cd_even, cd_odd) = pairs(c, d);
    [
        low_halves(ab_even, cd_even),
        low_halves(ab_odd, cd_odd),
        high_halves(ab_even, cd_even),
        high_halves(ab_odd, cd_odd),
    ]
}

/// The even i32 of two registers side by side, and the odd ones.
#[inline]
#[target_feature(enable = "neon")]
fn pairs(a: Bytes, b: Bytes) -> (Bytes, Bytes) {
    let (a, b) = (vreinterpretq_u32_u8(a), vreinterpretq_u32_u8(b));
    (vreinterpretq_u8_u32(vtrn1q_u32(a, b)), vreinterpretq_u8_u32(vtrn2q_u32(a, b)))
}

#[inline]
#[target_feature(enable = "neon")]
pub(super) fn zero_bytes() -> Bytes {
    vdupq_n_u8(0)
}

#[inline]
#[target_feature(enable = "neon")]
pub(super) fn zero_ints() -> Ints {
    vdupq_n_s32(0)
}

#[inline]
#[target_feature(enable = "neon")]
pub(super) fn load_bytes(x: &[u8; 4 * LANES]) -> Bytes {
    // SAFETY: the reference is to 16 readable bytes.
    unsafe { vld1q_u8(x.as_ptr()) }
}

#[inline]
#[target_feature(enable = "neon")]
pub(super) fn signed(x: &[i8; 64]) -> [Bytes; 4] {
    let start = x.as_ptr().cast::<u8>();
    // SAFETY: the reference is to 64 readable bytes and the largest offset is 48.
    unsafe {
        [vld1q_u8(start), vld1q_u8(start.add(16)), vld1q_u8(start.add(32)), vld1q_u8(start.add(48))]
    }
}

#[inline]
#[target_feature(enable = "neon")]
pub(super) fn store_bytes(x: Bytes, to: &mut [u8; 4 * LANES]) {
    // SAFETY: the reference is to 16 writable bytes.
    unsafe { vst1q_u8(to.as_mut_ptr(), x) }
}

/// Four bytes in every lane.
#[inline]
#[target_feature(enable = "neon")]
pub(super) fn broadcast(x: [i8; 4]) -> Bytes {
    let [a, b, c, d] = x;
    vreinterpretq_u8_s32(vdupq_n_s32(i32::from_ne_bytes([a as u8, b as u8, c as u8, d as u8])))
}

#[inline]
#[target_feature(enable = "neon")]
pub(super) fn times_256(x: Ints) -> Ints {
    vshlq_n_s32::<8>(x)
}

#[inline]
#[target_feature(enable = "neon")]
pub(super) fn to_floats(x: Ints) -> Lanes {
    vcvtq_f32_s32(x)
}

#[inline]
#[target_feature(enable = "neon")]
pub(super) fn as_bytes(x: Lanes) -> Bytes {
    vreinterpretq_u8_f32(x)
}

#[inline]
#[target_feature(enable = "neon")]
pub(super) fn as_lanes(x: Bytes) -> Lanes {
    vreinterpretq_f32_u8(x)
}

/// One code of each byte, `8 / BITS` in a byte: the lowest is plane 0.
#[inline]
#[target_feature(enable = "neon")]
pub(super) fn plane<const BITS: usize>(x: Bytes, plane: usize) -> Bytes {
    let shifted = match BITS * plane {
        0 => x,
        2 => vshrq_n_u8::<2>(x),
        4 => vshrq_n_u8::<4>(x),
        _ => vshrq_n_u8::<6>(x),
    };
    vandq_u8(shifted, vdupq_n_u8(u8::MAX >> (8 - BITS)))
}

/// The bytes of a table that codes below 16 name.
#[inline]
#[target_feature(enable = "neon")]
pub(super) fn look_up(table: &[u8; 16], codes: Bytes) -> Bytes {
    vqtbl1q_u8(load_bytes(table), codes)
}

/// Codes of two bits with a bit of plane `p` of eight above them.
#[inline]
#[target_feature(enable = "neon")]
pub(super) fn with_third_bit(low: Bytes, top: Bytes, p: usize) -> Bytes {
    let bit = vshlq_u8(top, vdupq_n_s8(2 - p as i8));
    vorrq_u8(low, vandq_u8(bit, vdupq_n_u8(4)))
}
