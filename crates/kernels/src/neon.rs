//! The operations on 4 lanes, for AArch64 with NEON.
//!
//! Owns the primitives of these registers; `lanes.rs` makes the operations of them. `unpack` splits
//! bytes into nibbles and widens them; the other widths take one byte shuffle, which brings to each
//! lane the two bytes that its element may straddle.

#![allow(unsafe_code, reason = "loads and stores through the pointers of array references")]

use std::arch::aarch64::*;
use std::arch::asm;

use crate::attention::lanes::attention_operations;
use crate::attention::{BLOCK, Gathered, KvRows, LINE, MIX_POSITIONS, PANEL_ROWS, Queries};
use crate::block::{Format, Row, Rows, ScaleType, f32_at, scale_at, u16_at};
use crate::float::{bf16_to_f32, f16_to_f32};
use crate::lanes::operations;
use crate::{Block, DeltaHead};

pub(crate) type Lanes = float32x4_t;
pub(crate) const LANES: usize = 4;
/// Registers of one block of columns in `delta_step`: two sets of sums fit in 32 registers.
const STATE_LANES: usize = 8;
/// Rows and vectors of one block of a product: two sums for each pair stay in registers.
const BLOCK_ROWS: usize = 4;
const BLOCK_TOKENS: usize = 3;
/// Rows of one block of scores: its sums and the keys stay in registers.
const SCORE_ROWS: usize = 4;
/// Registers of one strip of values: four rows of sums stay in registers beside it.
const MIX_LANES: usize = 4;

operations!("neon");
attention_operations!("neon");

#[inline]
#[target_feature(enable = "neon")]
pub(crate) fn load(x: &[f32; LANES]) -> Lanes {
    // SAFETY: the reference is to 4 readable f32.
    unsafe { vld1q_f32(x.as_ptr()) }
}

#[inline]
#[target_feature(enable = "neon")]
pub(crate) fn store(x: Lanes, to: &mut [f32; LANES]) {
    // SAFETY: the reference is to 4 writable f32.
    unsafe { vst1q_f32(to.as_mut_ptr(), x) }
}

#[inline]
#[target_feature(enable = "neon")]
pub(crate) fn splat(x: f32) -> Lanes {
    vdupq_n_f32(x)
}

#[inline]
#[target_feature(enable = "neon")]
pub(crate) fn add_lanes(a: Lanes, b: Lanes) -> Lanes {
    vaddq_f32(a, b)
}

#[inline]
#[target_feature(enable = "neon")]
fn sub_lanes(a: Lanes, b: Lanes) -> Lanes {
    vsubq_f32(a, b)
}

#[inline]
#[target_feature(enable = "neon")]
pub(crate) fn mul_lanes(a: Lanes, b: Lanes) -> Lanes {
    vmulq_f32(a, b)
}

#[inline]
#[target_feature(enable = "neon")]
fn divide_lanes(a: Lanes, b: Lanes) -> Lanes {
    vdivq_f32(a, b)
}

/// `a * b + c`, rounded once.
#[inline]
#[target_feature(enable = "neon")]
pub(crate) fn fma(a: Lanes, b: Lanes, c: Lanes) -> Lanes {
    vfmaq_f32(c, a, b)
}

/// The larger; a NaN where `b` is one.
#[inline]
#[target_feature(enable = "neon")]
pub(crate) fn max_lanes(a: Lanes, b: Lanes) -> Lanes {
    vmaxq_f32(a, b)
}

/// The smaller; a NaN where `b` is one.
#[inline]
#[target_feature(enable = "neon")]
fn min_lanes(a: Lanes, b: Lanes) -> Lanes {
    vminq_f32(a, b)
}

#[inline]
#[target_feature(enable = "neon")]
fn round_lanes(x: Lanes) -> Lanes {
    vrndnq_f32(x)
}

/// `x * 2^n` for an integral n from -151 to 129.
#[inline]
#[target_feature(enable = "neon")]
fn multiply_by_power_of_two(x: Lanes, n: Lanes) -> Lanes {
    // Two factors, since 2^129 and 2^-151 are no f32 although the product may be one.
    let n = vcvtq_s32_f32(n);
    let first = vshrq_n_s32::<1>(n);
    let second = vsubq_s32(n, first);
    mul_lanes(mul_lanes(x, power_of_two(first)), power_of_two(second))
}

/// 2^n for an n whose power is a normal f32.
#[inline]
#[target_feature(enable = "neon")]
fn power_of_two(n: int32x4_t) -> Lanes {
    vreinterpretq_f32_s32(vshlq_n_s32::<23>(vaddq_s32(n, vdupq_n_s32(127))))
}

#[inline]
#[target_feature(enable = "neon")]
pub(crate) fn sum_lanes(x: Lanes) -> f32 {
    vaddvq_f32(x)
}

/// Lane i is the sum of register i.
#[inline]
#[target_feature(enable = "neon")]
fn sum_each(x: &[Lanes; LANES]) -> Lanes {
    vpaddq_f32(vpaddq_f32(x[0], x[1]), vpaddq_f32(x[2], x[3]))
}

#[inline]
#[target_feature(enable = "neon")]
pub(crate) fn largest_lane(x: Lanes) -> f32 {
    vmaxvq_f32(x)
}

#[inline]
#[target_feature(enable = "neon")]
pub(crate) fn widen_bf16(bytes: &[u8; 2 * LANES]) -> Lanes {
    // SAFETY: the reference is to 8 readable bytes.
    let words = vreinterpret_u16_u8(unsafe { vld1_u8(bytes.as_ptr()) });
    vreinterpretq_f32_u32(vshll_n_u16::<16>(words))
}

#[inline]
#[target_feature(enable = "neon")]
pub(crate) fn widen_f16(bytes: &[u8; 2 * LANES]) -> Lanes {
    // SAFETY: the reference is to 8 readable bytes.
    let words = vreinterpret_u16_u8(unsafe { vld1_u8(bytes.as_ptr()) });
    let wide;
    // SAFETY: plain NEON, registers only; the intrinsic of this instruction is not stable.
    unsafe {
        asm!(
            "fcvtl {wide:v}.4s, {words:v}.4h",
            wide = lateout(vreg) wide,
            words = in(vreg) words,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    wide
}

#[inline]
#[target_feature(enable = "neon")]
pub(crate) fn widen_f32(bytes: &[u8; 4 * LANES]) -> Lanes {
    // SAFETY: the reference is to 16 readable bytes.
    vreinterpretq_f32_u8(unsafe { vld1q_u8(bytes.as_ptr()) })
}

/// The next 32 elements, in `4 * BITS` bytes, as f32; `unscale` times them are the integers.
#[inline]
#[target_feature(enable = "neon")]
fn unpack<const BITS: usize>(packed: &[u8]) -> [Lanes; 8] {
    assert!(packed.len() == 4 * BITS);
    let (low, high) = match BITS {
        4 => {
            // SAFETY: the assertion found 16 bytes.
            let pairs = unsafe { vld1q_u8(packed.as_ptr()) };
            let (even, odd) = (vandq_u8(pairs, vdupq_n_u8(15)), vshrq_n_u8::<4>(pairs));
            (widen_bytes(vzip1q_u8(even, odd)), widen_bytes(vzip2q_u8(even, odd)))
        }
        8 => {
            // SAFETY: the assertion found 32 bytes.
            let (low, high) =
                unsafe { (vld1q_u8(packed.as_ptr()), vld1q_u8(packed.as_ptr().add(16))) };
            (widen_bytes(low), widen_bytes(high))
        }
        _ => {
            let ([a, b], [c, d]) = (straddling::<BITS>(packed, 0), straddling::<BITS>(packed, 1));
            let ([e, f], [g, h]) = (straddling::<BITS>(packed, 2), straddling::<BITS>(packed, 3));
            ([a, b, c, d], [e, f, g, h])
        }
    };
    let ([a, b, c, d], [e, f, g, h]) = (low, high);
    [a, b, c, d, e, f, g, h]
}

/// What `unpack` has left to multiply by: nothing, since its lanes are shifted already.
#[inline]
#[target_feature(enable = "neon")]
fn unscale<const BITS: usize>() -> Lanes {
    splat(1.0)
}

/// Sixteen integers as f32.
#[inline]
#[target_feature(enable = "neon")]
fn widen_bytes(bytes: uint8x16_t) -> [Lanes; 4] {
    let (low, high) = (vmovl_u8(vget_low_u8(bytes)), vmovl_high_u8(bytes));
    [
        vcvtq_f32_u32(vmovl_u16(vget_low_u16(low))),
        vcvtq_f32_u32(vmovl_high_u16(low)),
        vcvtq_f32_u32(vmovl_u16(vget_low_u16(high))),
        vcvtq_f32_u32(vmovl_high_u16(high)),
    ]
}

/// Eight of the 32 elements: those in the `BITS` bytes from `quarter * BITS` on.
#[inline]
#[target_feature(enable = "neon")]
fn straddling<const BITS: usize>(packed: &[u8], quarter: usize) -> [Lanes; 2] {
    let first_byte = quarter * BITS;
    // The last words of a step end with it: eight bytes are read, no more than there are.
    let word_start = first_byte.min(4 * BITS - 8);
    // SAFETY: `word_start + 8` is at most `4 * BITS`, the length that `unpack` has asserted.
    let word = unsafe { packed.as_ptr().add(word_start).cast::<u64>().read_unaligned() };
    let word = vcreate_u8(word >> (8 * (first_byte - word_start)));
    let bytes = vcombine_u8(word, word);
    let mask = vdupq_n_u32((1 << BITS) - 1);
    let half = |windows: &[u8; 16], shifts: &[i32; LANES]| {
        // SAFETY: the references are to 16 readable bytes each.
        let (windows, shifts) = unsafe { (vld1q_u8(windows.as_ptr()), vld1q_s32(shifts.as_ptr())) };
        let pairs = vreinterpretq_u32_u8(vqtbl1q_u8(bytes, windows));
        vcvtq_f32_u32(vandq_u32(vshlq_u32(pairs, shifts), mask))
    };
    [
        half(const { &windows(BITS, 0) }, const { &shifts(BITS, 0) }),
        half(const { &windows(BITS, LANES) }, const { &shifts(BITS, LANES) }),
    ]
}

/// For the lanes of the elements from `first` on, the shuffle that brings in the two bytes at bit
/// `k * bits` and two zeros.
const fn windows(bits: usize, first: usize) -> [u8; 16] {
    let mut out = [0xff; 16];
    let mut lane = 0;
    while lane < LANES {
        let byte = ((first + lane) * bits / 8) as u8;
        out[4 * lane] = byte;
        out[4 * lane + 1] = byte + 1;
        lane += 1;
    }
    out
}

/// For each lane, minus the bit at which its element starts in its first byte: a left shift by a
/// negative count goes right.
const fn shifts(bits: usize, first: usize) -> [i32; LANES] {
    let mut out = [0; LANES];
    let mut lane = 0;
    while lane < LANES {
        out[lane] = -(((first + lane) * bits % 8) as i32);
        lane += 1;
    }
    out
}

/// Asks for a cache line: left to the CPU, for there is no stable intrinsic for it.
#[inline]
#[target_feature(enable = "neon")]
pub(crate) fn prefetch(_at: *const u8) {}
