//! Conversions between f32 and the narrow floats of checkpoints: bf16, f16 and e4m3.
//!
//! Owns the rounding: to the nearest, ties to even, a NaN stays a NaN. Slices of narrow floats are
//! little-endian bytes, since they come straight from a file at any offset. Refuses slices whose
//! lengths do not match.

/// Widens a bf16, which is the upper half of an f32.
#[inline]
pub const fn bf16_to_f32(bits: u16) -> f32 {
    f32::from_bits((bits as u32) << 16)
}

/// Rounds to bf16, ties to even; a NaN stays a NaN with its upper payload.
pub const fn f32_to_bf16(value: f32) -> u16 {
    let bits = value.to_bits();
    if value.is_nan() {
        // The quiet bit, lest a payload in the lower half alone become infinity.
        return (bits >> 16) as u16 | 0x40;
    }
    let odd = bits >> 16 & 1;
    ((bits + 0x7fff + odd) >> 16) as u16
}

/// Widens an IEEE binary16.
#[inline]
pub fn f16_to_f32(bits: u16) -> f32 {
    half::f16::from_bits(bits).to_f32()
}

/// Rounds to IEEE binary16, ties to even; beyond 65504 it becomes infinity.
pub fn f32_to_f16(value: f32) -> u16 {
    half::f16::from_f32(value).to_bits()
}

/// Widens an e4m3 of the "fn" kind: bias 7, no infinity, NaN only at 0x7f and 0xff, largest 448.
pub const fn e4m3_to_f32(byte: u8) -> f32 {
    let sign = if byte & 0x80 == 0 { 1.0 } else { -1.0 };
    let exponent = byte >> 3 & 15;
    let mantissa = byte & 7;
    if exponent == 15 && mantissa == 7 {
        return f32::NAN;
    }
    if exponent == 0 {
        // Subnormal: the mantissa counts steps of 2^-9.
        return sign * mantissa as f32 / 512.0;
    }
    let power = f32::from_bits((exponent as u32 + 127 - 7) << 23);
    sign * power * (1.0 + mantissa as f32 / 8.0)
}

/// Widens bf16: `bytes [2 * n]`, `out [n]`.
///
/// # Panics
/// If the lengths differ from these shapes.
pub fn widen_bf16(bytes: &[u8], out: &mut [f32]) {
    let words = words(bytes, out.len());
    for (out, word) in out.iter_mut().zip(words) {
        *out = bf16_to_f32(u16::from_le_bytes(*word));
    }
}

/// Widens f16: `bytes [2 * n]`, `out [n]`.
///
/// # Panics
/// If the lengths differ from these shapes.
pub fn widen_f16(bytes: &[u8], out: &mut [f32]) {
    let words = words(bytes, out.len());
    for (out, word) in out.iter_mut().zip(words) {
        *out = f16_to_f32(u16::from_le_bytes(*word));
    }
}

/// Widens e4m3: `bytes [n]`, `out [n]`.
///
/// # Panics
/// If the lengths differ from these shapes.
pub fn widen_e4m3(bytes: &[u8], out: &mut [f32]) {
    const TABLE: [f32; 256] = e4m3_table();
    assert_eq!(bytes.len(), out.len(), "e4m3 bytes");
    for (out, &byte) in out.iter_mut().zip(bytes) {
        *out = TABLE[usize::from(byte)];
    }
}

/// Rounds to bf16: `x [n]`, `bytes [2 * n]`.
///
/// # Panics
/// If the lengths differ from these shapes.
pub fn narrow_bf16(x: &[f32], bytes: &mut [u8]) {
    let (words, rest) = bytes.as_chunks_mut::<2>();
    assert!(rest.is_empty() && words.len() == x.len(), "16-bit floats: bytes");
    for (word, &x) in words.iter_mut().zip(x) {
        *word = f32_to_bf16(x).to_le_bytes();
    }
}

/// Rounds to f16: `x [n]`, `bytes [2 * n]`.
///
/// # Panics
/// If the lengths differ from these shapes.
pub fn narrow_f16(x: &[f32], bytes: &mut [u8]) {
    let (words, rest) = bytes.as_chunks_mut::<2>();
    assert!(rest.is_empty() && words.len() == x.len(), "16-bit floats: bytes");
    for (word, &x) in words.iter_mut().zip(x) {
        *word = f32_to_f16(x).to_le_bytes();
    }
}

fn words(bytes: &[u8], len: usize) -> &[[u8; 2]] {
    let (words, rest) = bytes.as_chunks::<2>();
    assert!(rest.is_empty() && words.len() == len, "16-bit floats: bytes");
    words
}

const fn e4m3_table() -> [f32; 256] {
    let mut table = [0.0; 256];
    let mut byte = 0;
    while byte < 256 {
        table[byte] = e4m3_to_f32(byte as u8);
        byte += 1;
    }
    table
}
