//! The products in fixed point on 16 lanes, for x86-64 with AVX-512 F, BW, DQ and VL.
//!
//! Owns the primitives of these registers; `lanes.rs` makes the operations of them. One register
//! holds 64 columns. Bytes are multiplied in pairs to saturating i16, so codes that use their top
//! bit are multiplied in two parts that cannot saturate.

#![allow(unsafe_code, reason = "loads and stores through the pointers of array references")]

use std::arch::x86_64::*;
use std::ops::Range;

use super::lanes::{by_width, fixed_operations};
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
use crate::avx512::{
    self as floats, LANES, Lanes, add_lanes, fma, load, mul_lanes, splat, store, sum_lanes,
};
use crate::block::{Format, Row, Rows, ScaleType, scale_at};

pub(super) type Bytes = __m512i;
pub(super) type Ints = __m512i;
/// Panels and vectors of one block: 12 sums and 12 totals of 32 registers.
pub(super) const BLOCK_PANELS: usize = 4;

fixed_operations!("avx512f,avx512bw,avx512dq,avx512vl,f16c,fma");
coded_operations!("avx512f,avx512bw,avx512dq,avx512vl,f16c,fma");

/// Adds to each i32 the products of four unsigned and four signed bytes.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn dot<const BITS: usize>(sum: Ints, codes: Bytes, x: Bytes) -> Ints {
    let ones = _mm512_set1_epi16(1);
    if BITS < 8 {
        return _mm512_add_epi32(sum, _mm512_madd_epi16(_mm512_maddubs_epi16(codes, x), ones));
    }
    // Two products of 127 * 128 or of 128 * 128 reach -32768 at most, which an i16 holds.
    let top = _mm512_set1_epi8(i8::MIN);
    let low = _mm512_maddubs_epi16(_mm512_andnot_si512(top, codes), x);
    let high = _mm512_maddubs_epi16(_mm512_and_si512(top, codes), x);
    let sum = _mm512_add_epi32(sum, _mm512_madd_epi16(low, ones));
    _mm512_add_epi32(sum, _mm512_madd_epi16(high, ones))
}

/// One row's next 64 columns: adds the integer sum times the factor of its group to `total`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn step<const BITS: usize, const GROUP: usize, const FAST: bool>(
    packed: &[u8],
    (hi, lo): (&[i8; 64], &[i8; 64]),
    factors: &[f32],
    total: Lanes,
) -> Lanes {
    let [codes] = codes::<BITS, GROUP>(packed);
    let mut sum = dot::<BITS>(zero_ints(), codes, signed(hi));
    if !FAST {
        sum = dot::<BITS>(times_256(sum), codes, signed(lo));
    }
    fma(to_floats(sum), of_groups::<GROUP>(factors), total)
}

/// The next 64 columns, in `8 * BITS` bytes, in the order of the vectors.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(super) fn codes<const BITS: usize, const GROUP: usize>(packed: &[u8]) -> [Bytes; 1] {
    assert!(packed.len() == 8 * BITS);
    let start = packed.as_ptr();
    let codes = match (BITS, GROUP) {
        (2, _) => {
            // SAFETY: the assertion found 16 bytes; the instruction needs no alignment.
            let bytes = unsafe { _mm_loadu_si128(start.cast()) };
            let copies = _mm512_broadcast_i32x4(bytes);
            let shifted = if GROUP == 32 {
                let groups = _mm512_permutexvar_epi64(words([0, 0, 0, 0, 1, 1, 1, 1]), copies);
                _mm512_srlv_epi64(groups, words([0, 2, 4, 6, 0, 2, 4, 6]))
            } else {
                _mm512_srlv_epi64(copies, words([0, 0, 2, 2, 4, 4, 6, 6]))
            };
            _mm512_and_si512(shifted, _mm512_set1_epi8(3))
        }
        (4, _) => {
            // SAFETY: the assertion found 32 bytes; the instruction needs no alignment.
            let bytes = unsafe { _mm256_loadu_si256(start.cast()) };
            let copies = _mm512_broadcast_i64x4(bytes);
            let shifted = if GROUP == 32 {
                let groups = _mm512_permutexvar_epi64(words([0, 1, 0, 1, 2, 3, 2, 3]), copies);
                _mm512_srlv_epi64(groups, words([0, 0, 4, 4, 0, 0, 4, 4]))
            } else {
                _mm512_srlv_epi64(copies, words([0, 0, 0, 0, 4, 4, 4, 4]))
            };
            _mm512_and_si512(shifted, _mm512_set1_epi8(15))
        }
        // SAFETY: the assertion found 64 bytes; the instruction needs no alignment.
        (8, _) => unsafe { _mm512_loadu_si512(start.cast()) },
        _ => {
            let [low, high] = super::avx2::spread::<BITS>(packed);
            _mm512_inserti64x4::<1>(_mm512_castsi256_si512(low), high)
        }
    };
    [codes]
}

/// A group's factor in the lanes of its columns.
#[inline]
#[target_feature(enable = "avx512f,avx512dq")]
pub(super) fn of_groups<const GROUP: usize>(factors: &[f32]) -> Lanes {
    if GROUP == 64 {
        return splat(factors[0]);
    }
    _mm512_insertf32x8::<1>(splat(factors[0]), _mm256_set1_ps(factors[1]))
}

/// A 16 by 16 matrix of i32, rows to columns.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn transpose(rows: [Bytes; LANES]) -> [Bytes; LANES] {
    // Within each quarter of four registers: 4 by 4 matrices of i32.
    let mut quarters = rows;
    for [a, b, c, d] in quarters.as_chunks_mut::<4>().0 {
        let (ab_low, ab_high) = (_mm512_unpacklo_epi32(*a, *b), _mm512_unpackhi_epi32(*a, *b));
        let (cd_low, cd_high) = (_mm512_unpacklo_epi32(*c, *d), _mm512_unpackhi_epi32(*c, *d));
        *a = _mm512_unpacklo_epi64(ab_low, cd_low);
        *b = _mm512_unpackhi_epi64(ab_low, cd_low);
        *c = _mm512_unpacklo_epi64(ab_high, cd_high);
        *d = _mm512_unpackhi_epi64(ab_high, cd_high);
    }
    // Then a 4 by 4 matrix of quarters for each place in them.
    let mut out = quarters;
    for place in 0..4 {
        let (a, b) = (quarters[place], quarters[place + 4]);
        let (c, d) = (quarters[place + 8], quarters[place + 12]);
        let ab_even = _mm512_shuffle_i32x4::<0b10_00_10_00>(a, b);
        let ab_odd = _mm512_shuffle_i32x4::<0b11_01_11_01>(a, b);
        let cd_even = _mm512_shuffle_i32x4::<0b10_00_10_00>(c, d);
        let cd_odd = _mm512_shuffle_i32x4::<0b11_01_11_01>(c, d);
        out[place] = _mm512_shuffle_i32x4::<0b10_00_10_00>(ab_even, cd_even);
        out[place + 4] = _mm512_shuffle_i32x4::<0b10_00_10_00>(ab_odd, cd_odd);
        out[place + 8] = _mm512_shuffle_i32x4::<0b11_01_11_01>(ab_even, cd_even);
        out[place + 12] = _mm512_shuffle_i32x4::<0b11_01_11_01>(ab_odd, cd_odd);
    }
    out
}

#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn zero_bytes() -> Bytes {
    _mm512_setzero_si512()
}

#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn zero_ints() -> Ints {
    _mm512_setzero_si512()
}

#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn load_bytes(x: &[u8; 4 * LANES]) -> Bytes {
    // SAFETY: the reference is to 64 readable bytes; the instruction needs no alignment.
    unsafe { _mm512_loadu_si512(x.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn signed(x: &[i8; 4 * LANES]) -> Bytes {
    // SAFETY: the reference is to 64 readable bytes; the instruction needs no alignment.
    unsafe { _mm512_loadu_si512(x.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn store_bytes(x: Bytes, to: &mut [u8; 4 * LANES]) {
    // SAFETY: the reference is to 64 writable bytes; the instruction needs no alignment.
    unsafe { _mm512_storeu_si512(to.as_mut_ptr().cast(), x) }
}

/// The first of the bytes as scales, as many as there are lanes; zero where there are none.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) fn widen(scales: ScaleType, bytes: &[u8]) -> Lanes {
    if bytes.len() >= LANES * scales.bytes() {
        return match scales {
            ScaleType::Bf16 => bytes.first_chunk().map_or(splat(0.0), |b| floats::widen_bf16(b)),
            ScaleType::F16 => bytes.first_chunk().map_or(splat(0.0), |b| floats::widen_f16(b)),
            ScaleType::F32 => bytes.first_chunk().map_or(splat(0.0), |b| floats::widen_f32(b)),
        };
    }
    let mask = (1u16 << (bytes.len() / scales.bytes())) - 1;
    let start = bytes.as_ptr();
    match scales {
        ScaleType::Bf16 => {
            // SAFETY: the mask reads whole scales of the slice and no others.
            let words = unsafe { _mm256_maskz_loadu_epi16(mask, start.cast()) };
            as_lanes(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(words)))
        }
        ScaleType::F16 => {
            // SAFETY: as above.
            _mm512_cvtph_ps(unsafe { _mm256_maskz_loadu_epi16(mask, start.cast()) })
        }
        // SAFETY: as above.
        ScaleType::F32 => unsafe { _mm512_maskz_loadu_ps(mask, start.cast()) },
    }
}

/// The first floats, as many as there are lanes; zero where there are none.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn first_floats(x: &[f32]) -> Lanes {
    if let Some(whole) = x.first_chunk() {
        return load(whole);
    }
    // SAFETY: the mask reads the floats of the slice, fewer than 16, and no others.
    unsafe { _mm512_maskz_loadu_ps((1 << x.len()) - 1, x.as_ptr()) }
}

/// Four bytes in every lane.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn broadcast(x: [i8; 4]) -> Bytes {
    let [a, b, c, d] = x;
    _mm512_set1_epi32(i32::from_ne_bytes([a as u8, b as u8, c as u8, d as u8]))
}

#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn times_256(x: Ints) -> Ints {
    _mm512_slli_epi32::<8>(x)
}

#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn to_floats(x: Ints) -> Lanes {
    _mm512_cvtepi32_ps(x)
}

#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn as_bytes(x: Lanes) -> Bytes {
    _mm512_castps_si512(x)
}

#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn as_lanes(x: Bytes) -> Lanes {
    _mm512_castsi512_ps(x)
}

#[inline]
#[target_feature(enable = "avx512f")]
fn words(table: [i64; 8]) -> __m512i {
    let [a, b, c, d, e, f, g, h] = table;
    _mm512_setr_epi64(a, b, c, d, e, f, g, h)
}

/// One code of each byte, `8 / BITS` in a byte: the lowest is plane 0.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
pub(super) fn plane<const BITS: usize>(x: Bytes, plane: usize) -> Bytes {
    let mask = _mm512_set1_epi8((u8::MAX >> (8 - BITS)) as i8);
    let shifted = match BITS * plane {
        0 => x,
        2 => _mm512_srli_epi16::<2>(x),
        4 => _mm512_srli_epi16::<4>(x),
        _ => _mm512_srli_epi16::<6>(x),
    };
    _mm512_and_si512(shifted, mask)
}

/// The bytes of a table that codes below 16 name.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
pub(super) fn look_up(table: &[u8; 16], codes: Bytes) -> Bytes {
    // SAFETY: the reference is to 16 readable bytes; the instruction needs no alignment.
    let table = unsafe { _mm_loadu_si128(table.as_ptr().cast()) };
    _mm512_shuffle_epi8(_mm512_broadcast_i32x4(table), codes)
}

/// Codes of two bits with a bit of plane `p` of eight above them.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
pub(super) fn with_third_bit(low: Bytes, top: Bytes, p: usize) -> Bytes {
    let bit = match p {
        0..2 => _mm512_sll_epi16(top, _mm_cvtsi32_si128(2 - p as i32)),
        _ => _mm512_srl_epi16(top, _mm_cvtsi32_si128(p as i32 - 2)),
    };
    _mm512_or_si512(low, _mm512_and_si512(bit, _mm512_set1_epi8(4)))
}
