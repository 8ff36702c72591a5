//! The products in fixed point on 16 lanes, for x86-64 with AVX-512 and its VNNI.
//!
//! Owns what differs from `avx512`: one instruction adds four products of bytes to an i32, without
//! an i16 between, so that no code saturates.

#![allow(unsafe_code, reason = "loads and stores through the pointers of array references")]

use std::arch::x86_64::*;
use std::ops::Range;

use super::avx512::{
    BLOCK_PANELS, Bytes, Ints, as_bytes, as_lanes, broadcast, codes, first_floats, load_bytes,
    look_up, of_groups, plane, signed, store_bytes, times_256, to_floats, transpose, widen,
    with_third_bit, zero_bytes, zero_ints,
};
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

fixed_operations!("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,f16c,fma");
coded_operations!("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,f16c,fma");

/// Adds to each i32 the products of four unsigned and four signed bytes.
#[inline]
#[target_feature(enable = "avx512f,avx512vnni")]
fn dot<const BITS: usize>(sum: Ints, codes: Bytes, x: Bytes) -> Ints {
    _mm512_dpbusd_epi32(sum, codes, x)
}

/// One row's next 64 columns: adds the integer sum times the factor of its group to `total`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
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
