//! The operations on 16 lanes, for x86-64 with AVX-512 F, BW, DQ and VL.
//!
//! Owns the primitives of these registers; `lanes.rs` makes the operations of them. The one idea of
//! `unpack`: one load broadcasts eight or sixteen bytes, and one byte shuffle brings to each lane
//! the two bytes of them that its element may straddle. The element stays where it lies in them;
//! each lane's shift is the same in every step, and is undone once a row.

#![allow(unsafe_code, reason = "loads and stores through the pointers of array references")]

use std::arch::x86_64::*;

use crate::attention::lanes::attention_operations;
use crate::attention::{BLOCK, Gathered, KvRows, LINE, MIX_POSITIONS, PANEL_ROWS, Queries};
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
/// Rows of one block of scores: its sums fill one register once they are added up.
const SCORE_ROWS: usize = 4;
/// Registers of one strip of values: four rows of sums stay in registers beside it.
const MIX_LANES: usize = 4;

operations!("avx512f,avx512bw,avx512dq,avx512vl,f16c,fma");
attention_operations!("avx512f,avx512bw,avx512dq,avx512vl,f16c,fma");

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
pub(crate) fn max_lanes(a: Lanes, b: Lanes) -> Lanes {
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

/// Lane i is the sum of register i.
#[inline]
#[target_feature(enable = "avx512f")]
fn sum_each(x: &[Lanes; LANES]) -> Lanes {
    let a = sum_four(x[0], x[1], x[2], x[3]);
    let b = sum_four(x[4], x[5], x[6], x[7]);
    let c = sum_four(x[8], x[9], x[10], x[11]);
    let d = sum_four(x[12], x[13], x[14], x[15]);
    // Quarters 0 and 1 of each with its quarters 2 and 3, then the two that are left.
    let ab = add_lanes(_mm512_shuffle_f32x4::<0x44>(a, b), _mm512_shuffle_f32x4::<0xee>(a, b));
    let cd = add_lanes(_mm512_shuffle_f32x4::<0x44>(c, d), _mm512_shuffle_f32x4::<0xee>(c, d));
    let even = _mm512_shuffle_f32x4::<0x88>(ab, cd);
    add_lanes(even, _mm512_shuffle_f32x4::<0xdd>(ab, cd))
}

/// In each quarter, the sums of that quarter of the four registers.
#[inline]
#[target_feature(enable = "avx512f")]
fn sum_four(a: Lanes, b: Lanes, c: Lanes, d: Lanes) -> Lanes {
    let ab = _mm512_castps_pd(add_lanes(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)));
    let cd = _mm512_castps_pd(add_lanes(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d)));
    let low = _mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd));
    add_lanes(low, _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd)))
}

#[inline]
#[target_feature(enable = "avx512f")]
pub(crate) fn largest_lane(x: Lanes) -> f32 {
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

/// The next 32 elements, in `4 * BITS` bytes, as f32; `unscale` times them are the integers.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn unpack<const BITS: usize>(packed: &[u8]) -> [Lanes; 2] {
    [unpack_half::<BITS, 0>(packed), unpack_half::<BITS, 1>(packed)]
}

/// Sixteen of the 32 elements: those in the `2 * BITS` bytes from `HALF * 2 * BITS` on.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn unpack_half<const BITS: usize, const HALF: usize>(packed: &[u8]) -> Lanes {
    assert!(packed.len() == 4 * BITS);
    let start = packed[const { word_start(BITS, HALF) }..].as_ptr();
    let words = if const { word_bytes(BITS) == 8 } {
        // SAFETY: `word_start` is at least 8 before the length asserted above.
        _mm512_set1_epi64(unsafe { start.cast::<i64>().read_unaligned() })
    } else {
        // SAFETY: `word_start` is at least 16 before the length asserted above.
        let word = unsafe { _mm_loadu_si128(start.cast()) };
        if BITS == 8 {
            return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(word));
        }
        _mm512_broadcast_i32x4(word)
    };
    let pairs = _mm512_shuffle_epi8(words, integers(const { &windows(BITS, HALF) }));
    let shifted = _mm512_and_si512(pairs, integers(const { &masks(BITS) }));
    _mm512_cvtepi32_ps(shifted)
}

/// Undoes the shift at which `unpack` leaves each element: an exact power of two for each lane.
#[inline]
#[target_feature(enable = "avx512f")]
fn unscale<const BITS: usize>() -> Lanes {
    load(const { &inverse_shifts(BITS) })
}

#[inline]
#[target_feature(enable = "avx512f")]
pub(crate) fn integers(table: &[i32; LANES]) -> __m512i {
    // SAFETY: the reference is to 16 readable i32; the instruction needs no alignment.
    unsafe { _mm512_loadu_si512(table.as_ptr().cast()) }
}

/// Bytes of the words that are read: no more than the `4 * bits` of a step.
const fn word_bytes(bits: usize) -> usize {
    if bits < 4 { 8 } else { 16 }
}

/// Where in a step to read the word that holds a half: at its start or, failing that, at its end.
/// Two places at most, so that the parts of a step share their loads.
const fn word_start(bits: usize, half: usize) -> usize {
    if (half + 1) * 2 * bits <= word_bytes(bits) { 0 } else { 4 * bits - word_bytes(bits) }
}

/// For each lane, the byte shuffle that brings in the two bytes that its element may straddle.
const fn windows(bits: usize, half: usize) -> [i32; LANES] {
    let mut out = [0; LANES];
    let mut k = 0;
    while k < LANES {
        let byte = half * 2 * bits + k * bits / 8 - word_start(bits, half);
        // An index with the top bit set brings in zero. An element that ends with the word has
        // nothing in the next byte.
        let next = if byte + 1 < word_bytes(bits) { byte as u8 + 1 } else { 0x80 };
        out[k] = i32::from_le_bytes([byte as u8, next, 0x80, 0x80]);
        k += 1;
    }
    out
}

/// For each lane, the bits of its element in its two bytes.
const fn masks(bits: usize) -> [i32; LANES] {
    let mut out = [0; LANES];
    let mut k = 0;
    while k < LANES {
        out[k] = ((1 << bits) - 1) << (k * bits % 8);
        k += 1;
    }
    out
}

const fn inverse_shifts(bits: usize) -> [f32; LANES] {
    let mut out = [1.0; LANES];
    let mut k = 0;
    while k < LANES {
        out[k] = 1.0 / (1 << (k * bits % 8)) as f32;
        k += 1;
    }
    out
}

/// Asks for the cache line at an address, which need not be readable.
#[inline]
#[target_feature(enable = "avx512f")]
pub(crate) fn prefetch(at: *const u8) {
    _mm_prefetch::<_MM_HINT_T0>(at.cast());
}
