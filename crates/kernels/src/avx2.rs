//! The operations on 8 lanes, for x86-64 with AVX2, FMA and F16C.
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

pub(crate) type Lanes = __m256;
pub(crate) const LANES: usize = 8;
/// Registers of one block of columns in `delta_step`: two sets of sums fit in 16 registers.
const STATE_LANES: usize = 4;
/// Rows and vectors of one block of a product: two sums for each pair stay in registers.
const BLOCK_ROWS: usize = 2;
const BLOCK_TOKENS: usize = 3;
/// Rows of one block of scores: its sums fill one register once they are added up.
const SCORE_ROWS: usize = 2;
/// Registers of one strip of values: four rows of sums stay in registers beside it.
const MIX_LANES: usize = 2;

operations!("avx2,f16c,fma");
attention_operations!("avx2,f16c,fma");

#[inline]
#[target_feature(enable = "avx2,f16c,fma")]
pub(crate) fn load(x: &[f32; LANES]) -> Lanes {
    // SAFETY: the reference is to 8 readable f32; the instruction needs no alignment.
    unsafe { _mm256_loadu_ps(x.as_ptr()) }
}

#[inline]
#[target_feature(enable = "avx2,f16c,fma")]
pub(crate) fn store(x: Lanes, to: &mut [f32; LANES]) {
    // SAFETY: the reference is to 8 writable f32; the instruction needs no alignment.
    unsafe { _mm256_storeu_ps(to.as_mut_ptr(), x) }
}

#[inline]
#[target_feature(enable = "avx2,f16c,fma")]
pub(crate) fn splat(x: f32) -> Lanes {
    _mm256_set1_ps(x)
}

#[inline]
#[target_feature(enable = "avx2,f16c,fma")]
pub(crate) fn add_lanes(a: Lanes, b: Lanes) -> Lanes {
    _mm256_add_ps(a, b)
}

#[inline]
#[target_feature(enable = "avx2,f16c,fma")]
fn sub_lanes(a: Lanes, b: Lanes) -> Lanes {
    _mm256_sub_ps(a, b)
}

#[inline]
#[target_feature(enable = "avx2,f16c,fma")]
pub(crate) fn mul_lanes(a: Lanes, b: Lanes) -> Lanes {
    _mm256_mul_ps(a, b)
}

#[inline]
#[target_feature(enable = "avx2,f16c,fma")]
fn divide_lanes(a: Lanes, b: Lanes) -> Lanes {
    _mm256_div_ps(a, b)
}

/// `a * b + c`, rounded once.
#[inline]
#[target_feature(enable = "avx2,f16c,fma")]
pub(crate) fn fma(a: Lanes, b: Lanes, c: Lanes) -> Lanes {
    _mm256_fmadd_ps(a, b, c)
}

/// The larger; a NaN where `b` is one.
#[inline]
#[target_feature(enable = "avx2,f16c,fma")]
pub(crate) fn max_lanes(a: Lanes, b: Lanes) -> Lanes {
    _mm256_max_ps(a, b)
}

/// The smaller; a NaN where `b` is one.
#[inline]
#[target_feature(enable = "avx2,f16c,fma")]
fn min_lanes(a: Lanes, b: Lanes) -> Lanes {
    _mm256_min_ps(a, b)
}

#[inline]
#[target_feature(enable = "avx2,f16c,fma")]
fn round_lanes(x: Lanes) -> Lanes {
    _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(x)
}

/// `x * 2^n` for an integral n from -151 to 129.
#[inline]
#[target_feature(enable = "avx2,f16c,fma")]
fn multiply_by_power_of_two(x: Lanes, n: Lanes) -> Lanes {
    // Two factors, since 2^129 and 2^-151 are no f32 although the product may be one.
    let n = _mm256_cvtps_epi32(n);
    let first = _mm256_srai_epi32::<1>(n);
    let second = _mm256_sub_epi32(n, first);
    mul_lanes(mul_lanes(x, power_of_two(first)), power_of_two(second))
}

/// 2^n for an n whose power is a normal f32.
#[inline]
#[target_feature(enable = "avx2,f16c,fma")]
fn power_of_two(n: __m256i) -> Lanes {
    let biased = _mm256_add_epi32(n, _mm256_set1_epi32(127));
    _mm256_castsi256_ps(_mm256_slli_epi32::<23>(biased))
}

#[inline]
#[target_feature(enable = "avx2,f16c,fma")]
pub(crate) fn sum_lanes(x: Lanes) -> f32 {
    let x = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
    let x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)))
}

/// Lane i is the sum of register i.
#[inline]
#[target_feature(enable = "avx2,f16c,fma")]
fn sum_each(x: &[Lanes; LANES]) -> Lanes {
    let low = sum_four(x[0], x[1], x[2], x[3]);
    let high = sum_four(x[4], x[5], x[6], x[7]);
    let first = _mm256_permute2f128_ps::<0x20>(low, high);
    add_lanes(first, _mm256_permute2f128_ps::<0x31>(low, high))
}

/// In each half, the sums of that half of the four registers.
#[inline]
#[target_feature(enable = "avx2,f16c,fma")]
fn sum_four(a: Lanes, b: Lanes, c: Lanes, d: Lanes) -> Lanes {
    let ab = _mm256_castps_pd(add_lanes(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b)));
    let cd = _mm256_castps_pd(add_lanes(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d)));
    let low = _mm256_castpd_ps(_mm256_unpacklo_pd(ab, cd));
    add_lanes(low, _mm256_castpd_ps(_mm256_unpackhi_pd(ab, cd)))
}

#[inline]
#[target_feature(enable = "avx2,f16c,fma")]
pub(crate) fn largest_lane(x: Lanes) -> f32 {
    let x = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
    let x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)))
}

#[inline]
#[target_feature(enable = "avx2,f16c,fma")]
pub(crate) fn widen_bf16(bytes: &[u8; 2 * LANES]) -> Lanes {
    // SAFETY: the reference is to 16 readable bytes; the instruction needs no alignment.
    let words = unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) };
    _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(words)))
}

#[inline]
#[target_feature(enable = "avx2,f16c,fma")]
pub(crate) fn widen_f16(bytes: &[u8; 2 * LANES]) -> Lanes {
    // SAFETY: the reference is to 16 readable bytes; the instruction needs no alignment.
    _mm256_cvtph_ps(unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) })
}

#[inline]
#[target_feature(enable = "avx2,f16c,fma")]
pub(crate) fn widen_f32(bytes: &[u8; 4 * LANES]) -> Lanes {
    // SAFETY: the reference is to 32 readable bytes; the instruction needs no alignment.
    unsafe { _mm256_loadu_ps(bytes.as_ptr().cast()) }
}

/// The next 32 elements, in `4 * BITS` bytes, as f32; `unscale` times them are the integers.
#[inline]
#[target_feature(enable = "avx2,f16c,fma")]
fn unpack<const BITS: usize>(packed: &[u8]) -> [Lanes; 4] {
    [
        unpack_quarter::<BITS, 0>(packed),
        unpack_quarter::<BITS, 1>(packed),
        unpack_quarter::<BITS, 2>(packed),
        unpack_quarter::<BITS, 3>(packed),
    ]
}

/// Eight of the 32 elements: those in the `BITS` bytes from `QUARTER * BITS` on.
#[inline]
#[target_feature(enable = "avx2,f16c,fma")]
fn unpack_quarter<const BITS: usize, const QUARTER: usize>(packed: &[u8]) -> Lanes {
    assert!(packed.len() == 4 * BITS);
    if BITS == 8 {
        let bytes = packed[8 * QUARTER..].as_ptr();
        // SAFETY: of the 32 bytes asserted above, at least 8 follow the start of a quarter.
        let bytes = unsafe { _mm_loadl_epi64(bytes.cast()) };
        return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes));
    }
    let start = packed[const { word_start(BITS, QUARTER) }..].as_ptr();
    let words = if const { word_bytes(BITS) == 8 } {
        // SAFETY: `word_start` is at least 8 before the length asserted above.
        _mm256_set1_epi64x(unsafe { start.cast::<i64>().read_unaligned() })
    } else {
        // SAFETY: `word_start` is at least 16 before the length asserted above.
        _mm256_broadcastsi128_si256(unsafe { _mm_loadu_si128(start.cast()) })
    };
    let pairs = _mm256_shuffle_epi8(words, integers(const { &windows(BITS, QUARTER) }));
    let shifted = _mm256_and_si256(pairs, integers(const { &masks(BITS) }));
    _mm256_cvtepi32_ps(shifted)
}

/// Undoes the shift at which `unpack` leaves each element: an exact power of two for each lane.
#[inline]
#[target_feature(enable = "avx2,f16c,fma")]
fn unscale<const BITS: usize>() -> Lanes {
    load(const { &inverse_shifts(BITS) })
}

#[inline]
#[target_feature(enable = "avx2,f16c,fma")]
pub(crate) fn integers(table: &[i32; LANES]) -> __m256i {
    // SAFETY: the reference is to 8 readable i32; the instruction needs no alignment.
    unsafe { _mm256_loadu_si256(table.as_ptr().cast()) }
}

/// Bytes of the words that are read: no more than the `4 * bits` of a step.
const fn word_bytes(bits: usize) -> usize {
    if bits < 4 { 8 } else { 16 }
}

/// Where in a step to read the word that holds a quarter: at the start or, failing that, the end.
/// Two places at most, so that the parts of a step share their loads.
const fn word_start(bits: usize, quarter: usize) -> usize {
    if (quarter + 1) * bits <= word_bytes(bits) { 0 } else { 4 * bits - word_bytes(bits) }
}

/// For each lane, the byte shuffle that brings in the two bytes that its element may straddle.
const fn windows(bits: usize, quarter: usize) -> [i32; LANES] {
    let mut out = [0; LANES];
    let mut k = 0;
    while k < LANES {
        let byte = quarter * bits + k * bits / 8 - word_start(bits, quarter);
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
#[target_feature(enable = "avx2")]
pub(crate) fn prefetch(at: *const u8) {
    _mm_prefetch::<_MM_HINT_T0>(at.cast());
}
