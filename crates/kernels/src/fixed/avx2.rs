//! The products in fixed point on 8 lanes, for x86-64 with AVX2, FMA and F16C.
//!
//! Owns the primitives of these registers; `lanes.rs` makes the operations of them. Two registers
//! hold 64 columns. Bytes are multiplied in pairs to saturating i16, so codes that use their top
//! bit are multiplied in two parts that cannot saturate; narrower ones may be added twice before
//! they are widened.

#![allow(unsafe_code, reason = "loads and stores through the pointers of array references")]

use std::arch::x86_64::*;
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
use crate::avx2::{
    self as floats, LANES, Lanes, add_lanes, fma, load, load_part as first_floats, mul_lanes,
    splat, store, sum_lanes,
};
use crate::block::{Format, Row, Rows, ScaleType, scale_at};

type Bytes = __m256i;
type Ints = __m256i;
/// Panels and vectors of one block: 4 sums and 4 totals of 16 registers.
const BLOCK_PANELS: usize = 2;

fixed_operations!("avx2,f16c,fma");
coded_operations!("avx2,f16c,fma");

/// Adds to each i32 the products of four unsigned and four signed bytes.
#[inline]
#[target_feature(enable = "avx2")]
fn dot<const BITS: usize>(sum: Ints, codes: Bytes, x: Bytes) -> Ints {
    let ones = _mm256_set1_epi16(1);
    if BITS < 8 {
        return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(codes, x), ones));
    }
    // Two products of 127 * 128 or of 128 * 128 reach -32768 at most, which an i16 holds.
    let top = _mm256_set1_epi8(i8::MIN);
    let low = _mm256_maddubs_epi16(_mm256_andnot_si256(top, codes), x);
    let high = _mm256_maddubs_epi16(_mm256_and_si256(top, codes), x);
    let sum = _mm256_add_epi32(sum, _mm256_madd_epi16(low, ones));
    _mm256_add_epi32(sum, _mm256_madd_epi16(high, ones))
}

/// One row's next 64 columns: adds the integer sums times the factors of their groups to `total`.
#[inline]
#[target_feature(enable = "avx2,f16c,fma")]
fn step<const BITS: usize, const GROUP: usize, const FAST: bool>(
    packed: &[u8],
    (hi, lo): (&[i8; 64], &[i8; 64]),
    factors: &[f32],
    total: Lanes,
) -> Lanes {
    let codes = codes::<BITS, GROUP>(packed);
    let (hi, lo) = (signed(hi), signed(lo));
    if GROUP == 64 && BITS < 8 {
        // Four products of at most 63 * 128 stay within an i16.
        let pairs = |x: [Bytes; 2]| {
            let first = _mm256_maddubs_epi16(codes[0], x[0]);
            _mm256_add_epi16(first, _mm256_maddubs_epi16(codes[1], x[1]))
        };
        let sum = if FAST {
            _mm256_madd_epi16(pairs(hi), _mm256_set1_epi16(1))
        } else {
            let upper = _mm256_madd_epi16(pairs(hi), _mm256_set1_epi16(256));
            _mm256_add_epi32(upper, _mm256_madd_epi16(pairs(lo), _mm256_set1_epi16(1)))
        };
        return fma(to_floats(sum), splat(factors[0]), total);
    }
    let mut sums = [zero_ints(); 2];
    for (i, sum) in sums.iter_mut().enumerate() {
        *sum = dot::<BITS>(*sum, codes[i], hi[i]);
        if !FAST {
            *sum = dot::<BITS>(times_256(*sum), codes[i], lo[i]);
        }
    }
    if GROUP == 64 {
        return fma(to_floats(_mm256_add_epi32(sums[0], sums[1])), splat(factors[0]), total);
    }
    let total = fma(to_floats(sums[0]), splat(factors[0]), total);
    fma(to_floats(sums[1]), splat(factors[1]), total)
}

/// The next 64 columns, in `8 * BITS` bytes, in the order of the vectors.
#[inline]
#[target_feature(enable = "avx2,f16c,fma")]
fn codes<const BITS: usize, const GROUP: usize>(packed: &[u8]) -> [Bytes; 2] {
    assert!(packed.len() == 8 * BITS);
    let start = packed.as_ptr();
    match BITS {
        2 => {
            let mask = _mm256_set1_epi8(3);
            let shifts =
                |table| move |x| _mm256_and_si256(_mm256_srlv_epi64(x, words(table)), mask);
            // SAFETY: the assertion found 16 bytes; the instruction needs no alignment.
            let copies = _mm256_broadcastsi128_si256(unsafe { _mm_loadu_si128(start.cast()) });
            if GROUP == 32 {
                let shifted = shifts([0, 2, 4, 6]);
                let (first, second) = (
                    _mm256_permute4x64_epi64::<0b00_00_00_00>(copies),
                    _mm256_permute4x64_epi64::<0b01_01_01_01>(copies),
                );
                return [shifted(first), shifted(second)];
            }
            [shifts([0, 0, 2, 2])(copies), shifts([4, 4, 6, 6])(copies)]
        }
        4 => {
            // SAFETY: the assertion found 32 bytes; the instruction needs no alignment.
            let bytes = unsafe { _mm256_loadu_si256(start.cast()) };
            let mask = _mm256_set1_epi8(15);
            let even = _mm256_and_si256(bytes, mask);
            let odd = _mm256_and_si256(_mm256_srli_epi16::<4>(bytes), mask);
            if GROUP == 32 {
                return [
                    _mm256_permute2x128_si256::<0x20>(even, odd),
                    _mm256_permute2x128_si256::<0x31>(even, odd),
                ];
            }
            [even, odd]
        }
        8 => {
            let (halves, _) = packed.as_chunks();
            [load_bytes(&halves[0]), load_bytes(&halves[1])]
        }
        _ => spread::<BITS>(packed),
    }
}

/// 64 elements of a bit stream, which may straddle bytes, in `8 * BITS` bytes.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn spread<const BITS: usize>(packed: &[u8]) -> [Bytes; 2] {
    let [a, b] = [spread_quarter::<BITS>(packed, 0), spread_quarter::<BITS>(packed, 1)];
    let [c, d] = [spread_quarter::<BITS>(packed, 2), spread_quarter::<BITS>(packed, 3)];
    // Packing goes by halves of registers.
    [
        _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packus_epi16(a, b)),
        _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packus_epi16(c, d)),
    ]
}

/// 16 elements of the 64, as i16.
#[inline]
#[target_feature(enable = "avx2")]
fn spread_quarter<const BITS: usize>(packed: &[u8], quarter: usize) -> Bytes {
    assert!(packed.len() == 8 * BITS && BITS > 2);
    let start = quarter_start(BITS, quarter);
    // SAFETY: `start + 16` is at most the length that the assertion found.
    let bytes = unsafe { _mm_loadu_si128(packed.as_ptr().add(start).cast()) };
    let windows = load_bytes(&const { &windows(BITS) }[quarter]);
    let pairs = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(bytes), windows);
    // A product moves each element to the top of its lane and drops what was above it.
    let factors = load_bytes(const { &top_factors(BITS) });
    _mm256_srl_epi16(_mm256_mullo_epi16(pairs, factors), _mm_cvtsi32_si128(16 - BITS as i32))
}

/// For each of 16 elements, the i16 that moves it to the top: a power of two.
const fn top_factors(bits: usize) -> [u8; 32] {
    let mut out = [0; 32];
    let mut k = 0;
    while k < 16 {
        let factor = (1u16 << (16 - bits - k * bits % 8)).to_le_bytes();
        out[2 * k] = factor[0];
        out[2 * k + 1] = factor[1];
        k += 1;
    }
    out
}

/// The first of the bytes as scales, as many as there are lanes; zero where there are none.
#[inline]
#[target_feature(enable = "avx2,f16c,fma")]
pub(super) fn widen(scales: ScaleType, bytes: &[u8]) -> Lanes {
    match scales {
        ScaleType::Bf16 => floats::widen_bf16(&first_bytes(bytes)),
        ScaleType::F16 => floats::widen_f16(&first_bytes(bytes)),
        ScaleType::F32 => floats::widen_f32(&first_bytes(bytes)),
    }
}

/// An 8 by 8 matrix of i32, rows to columns.
#[inline]
#[target_feature(enable = "avx2")]
fn transpose(rows: [Bytes; LANES]) -> [Bytes; LANES] {
    let mut halves = rows;
    for [a, b, c, d] in halves.as_chunks_mut::<4>().0 {
        let (ab_low, ab_high) = (_mm256_unpacklo_epi32(*a, *b), _mm256_unpackhi_epi32(*a, *b));
        let (cd_low, cd_high) = (_mm256_unpacklo_epi32(*c, *d), _mm256_unpackhi_epi32(*c, *d));
        *a = _mm256_unpacklo_epi64(ab_low, cd_low);
        *b = _mm256_unpackhi_epi64(ab_low, cd_low);
        *c = _mm256_unpacklo_epi64(ab_high, cd_high);
        *d = _mm256_unpackhi_epi64(ab_high, cd_high);
    }
    let mut out = halves;
    for place in 0..4 {
        let (a, b) = (halves[place], halves[place + 4]);
        out[place] = _mm256_permute2x128_si256::<0x20>(a, b);
        out[place + 4] = _mm256_permute2x128_si256::<0x31>(a, b);
    }
    out
}

#[inline]
#[target_feature(enable = "avx2")]
fn zero_bytes() -> Bytes {
    _mm256_setzero_si256()
}

#[inline]
#[target_feature(enable = "avx2")]
fn zero_ints() -> Ints {
    _mm256_setzero_si256()
}

#[inline]
#[target_feature(enable = "avx2")]
fn load_bytes(x: &[u8; 4 * LANES]) -> Bytes {
    // SAFETY: the reference is to 32 readable bytes; the instruction needs no alignment.
    unsafe { _mm256_loadu_si256(x.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx2")]
fn signed(x: &[i8; 64]) -> [Bytes; 2] {
    let start = x.as_ptr().cast::<__m256i>();
    // SAFETY: the reference is to 64 readable bytes; the instruction needs no alignment.
    unsafe { [_mm256_loadu_si256(start), _mm256_loadu_si256(start.add(1))] }
}

#[inline]
#[target_feature(enable = "avx2")]
fn store_bytes(x: Bytes, to: &mut [u8; 4 * LANES]) {
    // SAFETY: the reference is to 32 writable bytes; the instruction needs no alignment.
    unsafe { _mm256_storeu_si256(to.as_mut_ptr().cast(), x) }
}

/// Four bytes in every lane.
#[inline]
#[target_feature(enable = "avx2")]
fn broadcast(x: [i8; 4]) -> Bytes {
    let [a, b, c, d] = x;
    _mm256_set1_epi32(i32::from_ne_bytes([a as u8, b as u8, c as u8, d as u8]))
}

#[inline]
#[target_feature(enable = "avx2")]
fn times_256(x: Ints) -> Ints {
    _mm256_slli_epi32::<8>(x)
}

#[inline]
#[target_feature(enable = "avx2")]
fn to_floats(x: Ints) -> Lanes {
    _mm256_cvtepi32_ps(x)
}

#[inline]
#[target_feature(enable = "avx2")]
fn as_bytes(x: Lanes) -> Bytes {
    _mm256_castps_si256(x)
}

#[inline]
#[target_feature(enable = "avx2")]
fn as_lanes(x: Bytes) -> Lanes {
    _mm256_castsi256_ps(x)
}

#[inline]
#[target_feature(enable = "avx2")]
fn words(table: [i64; 4]) -> __m256i {
    let [a, b, c, d] = table;
    _mm256_setr_epi64x(a, b, c, d)
}

/// One code of each byte, `8 / BITS` in a byte: the lowest is plane 0.
#[inline]
#[target_feature(enable = "avx2")]
fn plane<const BITS: usize>(x: Bytes, plane: usize) -> Bytes {
    let mask = _mm256_set1_epi8((u8::MAX >> (8 - BITS)) as i8);
    let shifted = match BITS * plane {
        0 => x,
        2 => _mm256_srli_epi16::<2>(x),
        4 => _mm256_srli_epi16::<4>(x),
        _ => _mm256_srli_epi16::<6>(x),
    };
    _mm256_and_si256(shifted, mask)
}

/// The bytes of a table that codes below 16 name.
#[inline]
#[target_feature(enable = "avx2")]
fn look_up(table: &[u8; 16], codes: Bytes) -> Bytes {
    // SAFETY: the reference is to 16 readable bytes; the instruction needs no alignment.
    let table = unsafe { _mm_loadu_si128(table.as_ptr().cast()) };
    _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(table), codes)
}

/// Codes of two bits with a bit of plane `p` of eight above them.
#[inline]
#[target_feature(enable = "avx2")]
fn with_third_bit(low: Bytes, top: Bytes, p: usize) -> Bytes {
    let bit = match p {
        0..2 => _mm256_sll_epi16(top, _mm_cvtsi32_si128(2 - p as i32)),
        _ => _mm256_srl_epi16(top, _mm_cvtsi32_si128(p as i32 - 2)),
    };
    _mm256_or_si256(low, _mm256_and_si256(bit, _mm256_set1_epi8(4)))
}
