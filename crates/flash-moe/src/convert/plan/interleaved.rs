//! Rows of Qwen3-Next's joint DeltaNet projections, which are interleaved by key head.
//!
//! The container stores them as Qwen3.5 does, one projection after the other. Rows only change
//! places, so quantised ones can be carried over too.

use std::ops::Range;

use flash_moe_engine::shape::DeltaNet;

/// Stored rows that make up a matrix, in order.
pub type Segments = Vec<Range<usize>>;

/// The joint projection that holds a part, and the rows of every part in it.
///
/// `part` is the last word of the part's name; `None` if it is not stored jointly.
pub fn joint(part: &str, d: &DeltaNet) -> Option<Joint> {
    let (name, [first, second]) = match part {
        "in_proj_qkv" | "in_proj_z" => ("in_proj_qkvz", qkvz_rows(d)),
        "in_proj_b" | "in_proj_a" => ("in_proj_ba", ba_rows(d)),
        _ => return None,
    };
    let rows = first.iter().chain(&second).map(Range::len).sum();
    let wants_second = matches!(part, "in_proj_z" | "in_proj_a");
    Some(Joint { name, rows, segments: if wants_second { second } else { first } })
}

/// A part of a joint projection.
pub struct Joint {
    /// Last word of the joint projection's name.
    pub name: &'static str,
    /// Its rows, all parts together.
    pub rows: usize,
    /// The part's rows in it.
    pub segments: Segments,
}

/// Rows of q, k, v and of z in `in_proj_qkvz`: for each key head q, k, then its v heads, then its z.
fn qkvz_rows(d: &DeltaNet) -> [Segments; 2] {
    let values = d.value_heads / d.key_heads * d.value_dim;
    let block = 2 * d.key_dim + 2 * values;
    let rows = |offset: usize, count: usize| {
        (0..d.key_heads).map(move |h| h * block + offset..h * block + offset + count)
    };
    let qkv = rows(0, d.key_dim)
        .chain(rows(d.key_dim, d.key_dim))
        .chain(rows(2 * d.key_dim, values))
        .collect();
    [qkv, rows(2 * d.key_dim + values, values).collect()]
}

/// Rows of b and of a in `in_proj_ba`: for each key head the b of its value heads, then their a.
fn ba_rows(d: &DeltaNet) -> [Segments; 2] {
    let heads = d.value_heads / d.key_heads;
    let rows = |offset: usize| {
        (0..d.key_heads).map(|h| 2 * h * heads + offset..2 * h * heads + offset + heads).collect()
    };
    [rows(0), rows(heads)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interleaved_rows_come_out_by_kind_and_cover_everything_once() {
        let d = DeltaNet { key_heads: 2, value_heads: 4, key_dim: 3, value_dim: 5, conv_taps: 4 };
        let [qkv, z] = qkvz_rows(&d);
        // A block is 3 q, 3 k, 10 v, 10 z.
        assert_eq!(qkv, [0..3, 26..29, 3..6, 29..32, 6..16, 32..42]);
        assert_eq!(z, [16..26, 42..52]);
        let [b, a] = ba_rows(&d);
        assert_eq!((b, a), (vec![0..2, 4..6], vec![2..4, 6..8]));
    }
}
