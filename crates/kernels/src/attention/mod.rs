//! Causal attention over one page of a KV cache, with a softmax that is carried from page to page.
//!
//! Owns the update of a block of query rows by the keys and values of one KV head: scores, weights
//! and the weighted sum of values, none of which outlives the page. Each row carries the largest
//! score so far, the sum of its weights and the weighted sum of values, both relative to that
//! score; nothing grows with the context. Refuses to know where pages lie or who shares a head.
//!
//! The one idea: a page is read once for all rows that share its KV head. Of the three steps only
//! the scores touch keys and only the mix touches values, so a page in another format needs those
//! two and nothing else.

pub(crate) mod coded_lanes;
pub(crate) mod lanes;

pub(crate) mod coded;
mod narrow;

pub use coded::{
    CODED_POSITIONS, CodeBits, CodedPage, CodedQueries, CodedRows, CodedScratch, Order, can_code,
    decode, encode, rotate, rotate_back,
};
pub use narrow::{NARROW_POSITIONS, NarrowPage, NarrowRows, encode_int8};

use crate::isa::{Isa, Kind, dispatch};

/// Rows that pass together: so many queries, and after them so many sums, stay in the nearest cache.
pub(crate) const PANEL_ROWS: usize = 16;
/// Positions whose values stay in the nearest cache while a panel passes. Strips of all positions
/// of a page would fit as well, but their lines share a few sets of that cache.
pub(crate) const MIX_POSITIONS: usize = 16;
/// Positions of one block of scores, and rows of one block of the mix.
pub(crate) const BLOCK: usize = 4;
/// Floats of a cache line.
pub(crate) const LINE: usize = 16;

/// Keys and values of one KV head at the positions of one page.
#[derive(Clone, Copy)]
pub struct KvRows<'a> {
    /// `[positions][head_dim]`, after norm and rotation.
    pub keys: &'a [f32],
    /// `[positions][head_dim]`.
    pub values: &'a [f32],
}

/// Query rows that share a KV head.
#[derive(Clone, Copy)]
pub struct Queries<'a> {
    /// `[rows][head_dim]`, multiplied by the scale of the scores.
    pub rows: &'a [f32],
    /// Positions of the page that each row sees, from the first on: `[rows]`.
    pub visible: &'a [usize],
}

/// What rows have gathered from the positions that they have seen.
pub struct Gathered<'a> {
    /// The largest score, `[rows]`; -inf before the first position.
    pub max: &'a mut [f32],
    /// The sum of `exp(score - max)`, `[rows]`.
    pub sum: &'a mut [f32],
    /// The sum of `exp(score - max) * value`, `[rows][head_dim]`.
    pub mix: &'a mut [f32],
}

impl Gathered<'_> {
    /// The state before the first position.
    pub fn clear(&mut self) {
        self.max.fill(f32::NEG_INFINITY);
        self.sum.fill(0.0);
        self.mix.fill(0.0);
    }
}

/// Attention.
impl Isa {
    /// Adds the positions of a page to what the rows have gathered.
    ///
    /// A row with scores `s = q . k` over its visible positions goes from `(max, sum, mix)` to
    /// `m = max(max, s)`, `sum * exp(max - m) + sum(exp(s - m))` and
    /// `mix * exp(max - m) + sum(exp(s - m) * v)`. A row that sees nothing stays as it is. As long
    /// as keys and values are finite, a row does not depend on the rows beside it, bit for bit.
    /// `scores` is scratch of `rows * positions`.
    ///
    /// # Panics
    /// If the lengths differ from these shapes or a row sees more positions than there are.
    pub fn attend(
        self,
        page: &KvRows,
        queries: &Queries,
        gathered: &mut Gathered,
        scores: &mut [f32],
    ) {
        let rows = queries.visible.len();
        assert!(gathered.max.len() == rows && gathered.sum.len() == rows, "attend: rows");
        assert_eq!(gathered.mix.len(), queries.rows.len(), "attend: mix");
        let head_dim = queries.rows.len() / rows.max(1);
        if head_dim == 0 {
            return;
        }
        assert_eq!(queries.rows.len(), rows * head_dim, "attend: queries");
        let positions = page.keys.len() / head_dim;
        assert_eq!(page.keys.len(), positions * head_dim, "attend: keys");
        assert_eq!(page.values.len(), page.keys.len(), "attend: values");
        assert_eq!(scores.len(), rows * positions, "attend: scores");
        assert!(queries.visible.iter().all(|n| *n <= positions), "attend: visible positions");
        if positions > 0 {
            dispatch!(self, attend(page, queries, gathered, scores));
        }
    }
}
