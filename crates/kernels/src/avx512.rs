//! The operations on 16 lanes, for x86-64 with AVX-512 F, BW, DQ and VL.
//!
//! Owns the primitives of these registers; `lanes.rs` makes the operations of them. The one idea of
//! `unpack`: a permutation of a 16-entry table reads the low four bits of each lane and ignores the
//! rest, so an element of up to four bits becomes an f32 without a mask and without a conversion.

#![allow(unsafe_code, reason = "loads and stores through the pointers of array references")]

use std::arch::x86_64::*;

use crate::block::{Format, Row, Rows, ScaleType, f32_at, scale_at, u16_at};
use crate::float::{bf16_to_f32, f16_to_f32};
use crate::lanes::operations;
use crate::{Block, DeltaHead};

pub(crate) type Lanes = __m512;
pub(crate) const LANES: usize = 16;
/// Registers of one block of columns in `delta_step`: a whole row of a 128-wide state.
const STATE_LANES: usize = 8;
/// Rows and vectors of one block of a product: two sums for each pair stay in registers.
const BLOCK_ROWS: usize = 4;
const BLOCK_TOKENS: usize = 3;

operations!("avx512f,avx512bw,avx512dq,avx512vl,f16c,fma");

#[inline]
#[target_feature(enable = "avx512f")]
pub(crate) fn load(x: &[f32; LANES]) -> Lanes {
    // SAFETY: the reference is to 16 readable f32; the instruction needs no alignment.
    unsafe { _mm512_loadu_ps(x.as_ptr()) }
}

#[inline]
#[target_feature(enable = "avx512f")]
pub(crate) fn store(x: Lanes, to: &mut [f32; LANES]) {
    // SAFETY: the reference is to 16 writable f32; the instruction needs no alignment.
    unsafe { _mm512_storeu_ps(to.as_mut_ptr(), x) }
}

#[inline]
#[target_feature(enable = "avx512f")]
pub(crate) fn splat(x: f32) -> Lanes {
    _mm512_set1_ps(x)
}

#[inline]
#[target_feature(enable = "avx512f")]
pub(crate) fn add_lanes(a: Lanes, b: Lanes) -> Lanes {
    _mm512_add_ps(a, b)
}

#[inline]
#[target_feature(enable = "avx512f")]
fn sub_lanes(a: Lanes, b: Lanes) -> Lanes {
    _mm512_sub_ps(a, b)
}

#[inline]
#[target_feature(enable = "avx512f")]
pub(crate) fn mul_lanes(a: Lanes, b: Lanes) -> Lanes {
    _mm512_mul_ps(a, b)
}

#[inline]
#[target_feature(enable = "avx512f")]
fn divide_lanes(a: Lanes, b: Lanes) -> Lanes {
    _mm512_div_ps(a, b)
}

/// `a * b + c`, rounded once.
#[inline]
#[target_feature(enable = "avx512f")]
pub(crate) fn fma(a: Lanes, b: Lanes, c: Lanes) -> Lanes {
    _mm512_fmadd_ps(a, b, c)
}

/// The larger; a NaN where `b` is one.
#[inline]
#[target_feature(enable = "avx512f")]
fn max_lanes(a: Lanes, b: Lanes) -> Lanes {
    _mm512_max_ps(a, b)
}

/// The smaller; a NaN where `b` is one.
#[inline]
#[target_feature(enable = "avx512f")]
fn min_lanes(a: Lanes, b: Lanes) -> Lanes {
    _mm512_min_ps(a, b)
}

#[inline]
#[target_feature(enable = "avx512f")]
fn round_lanes(x: Lanes) -> Lanes {
    _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(x)
}

/// `x * 2^n` for an integral n, with one rounding.
#[inline]
#[target_feature(enable = "avx512f")]
fn multiply_by_power_of_two(x: Lanes, n: Lanes) -> Lanes {
    _mm512_scalef_ps(x, n)
}

#[inline]
#[target_feature(enable = "avx512f")]
pub(crate) fn sum_lanes(x: Lanes) -> f32 {
    _mm512_reduce_add_ps(x)
}

#[inline]
#[target_feature(enable = "avx512f")]
fn largest_lane(x: Lanes) -> f32 {
    _mm512_reduce_max_ps(x)
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(crate) fn widen_bf16(bytes: &[u8; 2 * LANES]) -> Lanes {
    // SAFETY: the reference is to 32 readable bytes; the instruction needs no alignment.
    let words = unsafe { _mm256_loadu_si256(bytes.as_ptr().cast()) };
    _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(words)))
}

#[inline]
#[target_feature(enable = "avx512f,avx512vl")]
pub(crate) fn widen_f16(bytes: &[u8; 2 * LANES]) -> Lanes {
    // SAFETY: the reference is to 32 readable bytes; the instruction needs no alignment.
    _mm512_cvtph_ps(unsafe { _mm256_loadu_si256(bytes.as_ptr().cast()) })
}

#[inline]
#[target_feature(enable = "avx512f")]
pub(crate) fn widen_f32(bytes: &[u8; 4 * LANES]) -> Lanes {
    // SAFETY: the reference is to 64 readable bytes; the instruction needs no alignment.
    unsafe { _mm512_loadu_ps(bytes.as_ptr().cast()) }
}

/// The next 32 elements, in `4 * BITS` bytes, as f32.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn unpack<const BITS: usize>(packed: &[u8]) -> [Lanes; 2] {
    let (low, high) = packed.split_at(2 * BITS);
    [unpack_half::<BITS>(low), unpack_half::<BITS>(high)]
}

/// 16 elements, in `2 * BITS` bytes.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn unpack_half<const BITS: usize>(packed: &[u8]) -> Lanes {
    assert!(packed.len() == 2 * BITS);
    let start = packed.as_ptr();
    match BITS {
        2 => {
            // SAFETY: the assertion found 4 bytes.
            let word = unsafe { start.cast::<i32>().read_unaligned() };
            let shifted = _mm512_srlv_epi32(_mm512_set1_epi32(word), integers(&TWO_BIT_SHIFTS));
            look_up(shifted, &LOW_TWO_BITS)
        }
        4 => {
            // SAFETY: the assertion found 8 bytes.
            let words = unsafe { start.cast::<i64>().read_unaligned() };
            let words = _mm512_permutexvar_epi32(integers(&WORD_OF_8), _mm512_set1_epi64(words));
            look_up(_mm512_srlv_epi32(words, integers(&FOUR_BIT_SHIFTS)), &LOW_FOUR_BITS)
        }
        8 => {
            // SAFETY: the assertion found 16 bytes; the instruction needs no alignment.
            let bytes = unsafe { _mm_loadu_si128(start.cast()) };
            _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes))
        }
        _ => {
            // SAFETY: the assertion found `2 * BITS` bytes and the mask reads no others.
            let bytes = unsafe { _mm_maskz_loadu_epi8((1 << (2 * BITS)) - 1, start.cast()) };
            // Each lane takes the two bytes that its element may straddle.
            let windows = const { &windows(BITS) };
            let pairs = _mm512_shuffle_epi8(_mm512_broadcast_i32x4(bytes), integers(windows));
            let shifts = const { &table(BITS, 8) };
            let mask = _mm512_set1_epi32((1 << BITS) - 1);
            let q = _mm512_and_si512(_mm512_srlv_epi32(pairs, integers(shifts)), mask);
            _mm512_cvtepi32_ps(q)
        }
    }
}

/// The table entry that the low four bits of each lane choose.
#[inline]
#[target_feature(enable = "avx512f")]
fn look_up(lanes: __m512i, entries: &[f32; LANES]) -> Lanes {
    _mm512_permutexvar_ps(lanes, load(entries))
}

#[inline]
#[target_feature(enable = "avx512f")]
pub(crate) fn integers(table: &[i32; LANES]) -> __m512i {
    // SAFETY: the reference is to 16 readable i32; the instruction needs no alignment.
    unsafe { _mm512_loadu_si512(table.as_ptr().cast()) }
}

const TWO_BIT_SHIFTS: [i32; LANES] = table(2, 32);
const FOUR_BIT_SHIFTS: [i32; LANES] = table(4, 32);
const WORD_OF_8: [i32; LANES] = [0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1];
const LOW_TWO_BITS: [f32; LANES] = remainders(4);
const LOW_FOUR_BITS: [f32; LANES] = remainders(16);

/// `k * step` modulo `modulus` for each lane k.
const fn table(step: usize, modulus: usize) -> [i32; LANES] {
    let mut out = [0; LANES];
    let mut k = 0;
    while k < LANES {
        out[k] = (k * step % modulus) as i32;
        k += 1;
    }
    out
}

/// `k` modulo `modulus` for each table entry k.
const fn remainders(modulus: usize) -> [f32; LANES] {
    let mut out = [0.0; LANES];
    let mut k = 0;
    while k < LANES {
        out[k] = (k % modulus) as f32;
        k += 1;
    }
    out
}

/// For each lane, the byte shuffle that brings in the two bytes at bit `k * bits` and two zeros.
const fn windows(bits: usize) -> [i32; LANES] {
    let mut out = [0; LANES];
    let mut k = 0;
    while k < LANES {
        let byte = k * bits / 8;
        out[k] = i32::from_le_bytes([byte as u8, byte as u8 + 1, 0x80, 0x80]);
        k += 1;
    }
    out
}
