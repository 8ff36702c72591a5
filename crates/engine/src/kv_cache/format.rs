//! The numbers in which keys and values are kept, and how a page of them is laid out.
//!
//! Owns the formats' names, what they round, and every offset within a page. The one idea: a page is
//! homogeneous. With codes, the first pages and the latest ones stay in halves, and a page is coded
//! as a whole once it is older than that; so where a code begins depends on positions alone.

use std::fmt;
use std::str::FromStr;

use flash_moe_kernels::{CodeBits, can_code};

use super::PAGE_POSITIONS;

/// Pages at the start that stay in halves unless it is said otherwise.
const SINK_PAGES: usize = 1;
/// Pages before the one that is being filled that do (docs/measurements.md, 17).
const RECENT_PAGES: usize = 4;

/// How keys and values are kept.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum KvFormat {
    /// As they are computed.
    #[default]
    F32,
    /// IEEE halves: 11 significant bits.
    F16,
    /// The upper halves of f32: 8 significant bits.
    Bf16,
    /// Bytes, with a scale for each position and head.
    Int8,
    /// Rotated, then codes of a few bits with a scale for each position and head.
    Codes(KvCodes),
}

/// Codes and what is left out of them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct KvCodes {
    /// Bits of the keys' codes.
    pub keys: CodeBits,
    /// Bits of the values' codes.
    pub values: CodeBits,
    /// Pages from the start on that stay in halves.
    pub sink_pages: usize,
    /// Whole pages before the one being filled that do.
    pub recent_pages: usize,
}

impl KvFormat {
    /// The names that [`KvFormat::from_str`] takes, for people.
    pub const NAMES: &'static str = "f32, f16, bf16, int8, tq2, tq3, tq4, or k and v apart: k4v2";

    /// What the original engine has behind TQ_KV=1: codes of two bits.
    pub const fn original() -> Self {
        Self::with_codes(CodeBits::Two, CodeBits::Two)
    }

    /// The same with so many pages left out of the codes, where there are any.
    pub fn with_window(self, sink_pages: usize, recent_pages: usize) -> Self {
        match self {
            Self::Codes(codes) => Self::Codes(KvCodes { sink_pages, recent_pages, ..codes }),
            plain => plain,
        }
    }

    const fn with_codes(keys: CodeBits, values: CodeBits) -> Self {
        let (sink_pages, recent_pages) = (SINK_PAGES, RECENT_PAGES);
        Self::Codes(KvCodes { keys, values, sink_pages, recent_pages })
    }

    /// What it costs, in words; nothing for the reference.
    pub fn loss(&self) -> Option<String> {
        match self {
            Self::F32 => None,
            Self::F16 => Some("keys and values rounded to 11 bits".into()),
            Self::Bf16 => Some("keys and values rounded to 8 bits".into()),
            Self::Int8 => Some("keys and values as 8-bit integers".into()),
            Self::Codes(c) => Some(format!(
                "keys as {}-bit and values as {}-bit codes, but for the first {} and the latest {} \
                 or more positions",
                c.keys.bits(),
                c.values.bits(),
                c.sink_pages * PAGE_POSITIONS,
                c.recent_pages * PAGE_POSITIONS
            )),
        }
    }

    /// Whether heads of this width can be kept so.
    ///
    /// # Errors
    /// In words, with what can.
    pub fn check(&self, head_dim: usize) -> Result<(), String> {
        match self {
            Self::Codes(_) if !can_code(head_dim) => Err(format!(
                "--kv-cache {self} needs heads whose width is a power of two from 64 to 1024, this \
                 model's are {head_dim} wide; --kv-cache int8 takes any"
            )),
            _ => Ok(()),
        }
    }

    /// Everything that decides the bytes, as flags.
    pub fn identity(&self) -> String {
        match self {
            Self::Codes(c) => format!(
                "--kv-cache {self} --kv-sink {} --kv-recent {}",
                c.sink_pages * PAGE_POSITIONS,
                c.recent_pages * PAGE_POSITIONS
            ),
            _ => format!("--kv-cache {self}"),
        }
    }

    /// The codes, where there are any.
    pub fn codes(&self) -> Option<&KvCodes> {
        match self {
            Self::Codes(codes) => Some(codes),
            _ => None,
        }
    }

    /// Of so many pages, those that are coded.
    pub fn coded_pages(&self, pages: usize) -> usize {
        let kept = self.codes().map_or(pages, |c| c.sink_pages + c.recent_pages + 1);
        pages.saturating_sub(kept)
    }
}

impl fmt::Display for KvFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::F32 => f.write_str("f32"),
            Self::F16 => f.write_str("f16"),
            Self::Bf16 => f.write_str("bf16"),
            Self::Int8 => f.write_str("int8"),
            Self::Codes(c) if c.keys == c.values => write!(f, "tq{}", c.keys.bits()),
            Self::Codes(c) => write!(f, "k{}v{}", c.keys.bits(), c.values.bits()),
        }
    }
}

impl FromStr for KvFormat {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bits = |digit: &u8| match digit {
            b'2' => Some(CodeBits::Two),
            b'3' => Some(CodeBits::Three),
            b'4' => Some(CodeBits::Four),
            _ => None,
        };
        let unknown = || format!("expected one of {}", Self::NAMES);
        match text.as_bytes() {
            b"f32" => Ok(Self::F32),
            b"f16" => Ok(Self::F16),
            b"bf16" => Ok(Self::Bf16),
            b"int8" => Ok(Self::Int8),
            [b't', b'q', both] => bits(both).map(|b| Self::with_codes(b, b)).ok_or_else(unknown),
            [b'k', keys, b'v', values] => bits(keys)
                .zip(bits(values))
                .map(|(k, v)| Self::with_codes(k, v))
                .ok_or_else(unknown),
            _ => Err(unknown()),
        }
    }
}

/// Keys or values of all heads in a page: first elements or codes, `[kv_heads]`, then scales,
/// `[kv_heads][PAGE_POSITIONS]`, where the format has them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Half {
    /// Bytes of one head's elements or codes.
    pub(super) head_bytes: usize,
    /// Bytes of one head's scales.
    pub(super) scale_bytes: usize,
}

impl Half {
    /// Bytes of all heads.
    pub(super) fn bytes(self, kv_heads: usize) -> usize {
        kv_heads * (self.head_bytes + self.scale_bytes)
    }
}

const SCALE_BYTES: usize = PAGE_POSITIONS * size_of::<f32>();

/// The keys or the values of a page that is not coded. They are laid out alike.
pub(super) fn wide_half(format: KvFormat, head_dim: usize) -> Half {
    let (element, scale_bytes) = match format {
        KvFormat::F32 => (4, 0),
        KvFormat::Int8 => (1, SCALE_BYTES),
        KvFormat::F16 | KvFormat::Bf16 | KvFormat::Codes(_) => (2, 0),
    };
    Half { head_bytes: PAGE_POSITIONS * head_dim * element, scale_bytes }
}

/// The keys or the values of a coded page.
pub(super) fn coded_half(bits: CodeBits, head_dim: usize) -> Half {
    Half { head_bytes: bits.page_bytes(head_dim), scale_bytes: SCALE_BYTES }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_come_back_and_others_are_refused() {
        for name in ["f32", "f16", "bf16", "int8", "tq2", "tq3", "tq4", "k4v2", "k2v3"] {
            assert_eq!(name.parse::<KvFormat>().unwrap().to_string(), name);
        }
        assert_eq!("k3v3".parse::<KvFormat>().unwrap().to_string(), "tq3");
        for name in ["", "tq", "tq1", "tq5", "k4", "k4v8", "int4", "F16", "tq2 "] {
            assert!(name.parse::<KvFormat>().unwrap_err().contains("tq2"), "{name}");
        }
    }

    #[test]
    fn widths_that_cannot_be_coded_are_refused() {
        let tq2: KvFormat = "tq2".parse().unwrap();
        assert!([64, 128, 256].into_iter().all(|width| tq2.check(width).is_ok()));
        for width in [32, 72, 96, 192] {
            assert!(tq2.check(width).unwrap_err().contains(&format!("{width} wide")));
            assert!(KvFormat::Int8.check(width).is_ok());
        }
    }

    #[test]
    fn bytes_of_a_vector_are_those_of_the_arithmetic() {
        let vector = |half: Half| (half.head_bytes + half.scale_bytes) / PAGE_POSITIONS;
        assert_eq!(vector(wide_half(KvFormat::F32, 256)), 1024);
        assert_eq!(vector(wide_half(KvFormat::F16, 256)), 512);
        assert_eq!(vector(wide_half(KvFormat::Int8, 256)), 260);
        assert_eq!(vector(coded_half(CodeBits::Four, 256)), 132);
        assert_eq!(vector(coded_half(CodeBits::Three, 256)), 100);
        assert_eq!(vector(coded_half(CodeBits::Two, 256)), 68);
    }
}
