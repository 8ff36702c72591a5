//! Where everything lies in the scratch buffer, and the constants that the kernels are compiled with.
//!
//! One scratch buffer serves every kernel of a token: each dispatch reads what the one before it wrote,
//! so they run one after the other anyway. Its places are constants of the kernels' source.

use crate::engine::Options;
use crate::shape::{DeltaNet, Shape};

/// Parts of the attention over a context, at most.
pub const SPLITS_MAX: usize = 64;
/// Elements of the input that a workgroup holds at once: 28 of the 32 KiB that devices have.
pub const BLOCK_MAX: usize = 7168;
/// Query heads that a workgroup attends for together.
const GROUPED_MAX: usize = 8;
/// Header of a part of the dense weights, in vectors of 16 bytes: a count, and three for each segment.
pub const HEADER_VECTORS: usize = 16;
/// Segments that the header holds.
pub const SEGMENTS_MAX: usize = (HEADER_VECTORS - 1) / 3;
/// Rows, one head of one token each, that a workgroup attends for in a chunk.
pub const ATTEND_ROWS: usize = 64;
/// Pairs of an expert that are taken in short tiles at most: two of these cost as much as a tall one
/// that is half full.
pub const SHORT_PAIRS: usize = 32;
/// Tokens that the delta rule takes together.
pub const DELTA_TOKENS: usize = 32;
/// Words of what such tokens are to each other, for one head: two squares, and the fades on both sides.
const PAIRS_WORDS: usize = 2 * DELTA_TOKENS * DELTA_TOKENS + 2 * DELTA_TOKENS;
/// Workgroups that fill a large device, and that attend for a chunk at most where its context is cut into
/// parts.
const ATTEND_GROUPS: usize = 256;
/// Positions of such a part at least: joining it costs little beside them.
const PART_POSITIONS: usize = 512;
/// Words that tell a token's kernels about it, or a chunk's about that.
const TOKEN_WORDS: usize = 5;

/// The scratch of one token or of a chunk, and the constants.
pub struct Layout {
    rows: usize,
    pairs: usize,
    names: Vec<(&'static str, usize)>,
    places: Vec<(&'static str, usize)>,
    words: usize,
}

/// Elements of the input that a workgroup stages at once, of a vector so long.
pub fn block(cols: usize) -> usize {
    cols.next_multiple_of(1024).min(BLOCK_MAX)
}

/// Query heads that share a workgroup: they share a key/value head.
pub fn grouped(shape: &Shape) -> usize {
    let each = shape.attention.heads / shape.attention.kv_heads;
    (1..=GROUPED_MAX.min(each)).rev().find(|n| each.is_multiple_of(*n)).unwrap_or(1)
}

/// The parts in which a chunk's rows attend to the context.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ContextParts {
    /// One: it is not cut.
    pub count: usize,
    /// Positions of each but the last.
    pub positions: usize,
}

/// Blocks of rows of a chunk of so many tokens, for each key/value head.
pub fn attend_blocks(shape: &Shape, tokens: usize) -> usize {
    (tokens * shape.attention.heads / shape.attention.kv_heads).div_ceil(ATTEND_ROWS)
}

/// The parts for a chunk of so many tokens from a position on: as many as make workgroups for a large
/// device, one where the chunk has half of them by itself or the context is short.
pub fn context_parts(shape: &Shape, position: usize, tokens: usize) -> ContextParts {
    let groups = attend_blocks(shape, tokens) * shape.attention.kv_heads;
    let end = position + tokens;
    let most = match 2 * groups < ATTEND_GROUPS {
        true => (ATTEND_GROUPS / groups).min(SPLITS_MAX).min(end / PART_POSITIONS).max(1),
        false => 1,
    };
    let positions = end.div_ceil(most).next_multiple_of(32);
    ContextParts { count: end.div_ceil(positions), positions }
}

impl Layout {
    /// That of so many tokens at once, with so many experts each.
    pub fn new(shape: &Shape, top_k: usize, rows: usize) -> Self {
        let mut layout =
            Self { rows, pairs: rows * top_k, names: Vec::new(), places: Vec::new(), words: 0 };
        layout.constants(shape, top_k);
        layout.rows(shape, top_k);
        match rows {
            1 => layout.token(shape),
            _ => layout.chunk(shape, top_k),
        }
        layout
    }

    /// Tokens at once.
    pub fn tokens(&self) -> usize {
        self.rows
    }

    /// Pairs of a token and an expert.
    pub fn pairs(&self) -> usize {
        self.pairs
    }

    /// Where a part begins, in words.
    ///
    /// # Panics
    /// There is no such part.
    pub fn at(&self, name: &str) -> usize {
        let found = self.places.iter().find(|(n, _)| *n == name);
        found.unwrap_or_else(|| panic!("no part of the scratch is called {name}")).1
    }

    /// Bytes of the scratch.
    pub fn bytes(&self) -> u64 {
        self.words as u64 * 4
    }

    /// The declarations in front of every kernel.
    pub fn declarations(&self, shape: &Shape) -> String {
        let all = self.names.iter().chain(&self.places);
        let numbers = all.map(|(name, value)| format!("const {name}: u32 = {value}u;\n"));
        let mut text: String = numbers.collect();
        text += &format!("const EPS: f32 = {:e};\n", shape.rms_eps);
        text += &format!("const GATED: bool = {};\n", shape.attention.gate);
        text += &format!("const RENORMALISE: bool = {};\n", shape.moe.renormalise);
        text
    }

    fn place(&mut self, name: &'static str, words: usize) {
        self.places.push((name, self.words));
        self.words += words.next_multiple_of(64);
    }

    fn constants(&mut self, shape: &Shape, top_k: usize) {
        let (a, moe) = (&shape.attention, &shape.moe);
        self.names.extend([
            ("HIDDEN", shape.hidden),
            ("HEADS", a.heads),
            ("KV_HEADS", a.kv_heads),
            ("HEAD_DIM", a.head_dim),
            ("ROTARY", a.rotary_dims),
            ("QUERY_STRIDE", query_stride(shape)),
            ("GROUPED", grouped(shape)),
            ("SPLITS_MAX", SPLITS_MAX),
            ("EXPERTS", moe.experts),
            ("TOP_K", top_k),
            ("WIDTH", moe.width),
            ("SHARED_WIDTH", moe.shared_width),
            ("VECTOR_AT", HEADER_VECTORS),
        ]);
        if let Some(d) = &shape.delta {
            self.names.extend([
                ("KEY_HEADS", d.key_heads),
                ("VALUE_HEADS", d.value_heads),
                ("KEY_DIM", d.key_dim),
                ("VALUE_DIM", d.value_dim),
                ("VALUE_BLOCKS", d.value_dim / 32),
                ("CHANNELS", d.conv_channels()),
                ("DELTA_TOKENS", DELTA_TOKENS),
                ("PAIRS_WORDS", PAIRS_WORDS),
                ("HISTORY_AT", d.value_heads * d.key_dim * d.value_dim),
            ]);
            let [step, pooled] = delta_steps(d.key_dim);
            self.names.extend([("STEP", step), ("POOLED", pooled)]);
        }
    }

    /// What every token has a row of.
    fn rows(&mut self, shape: &Shape, top_k: usize) {
        let (a, moe, rows) = (&shape.attention, &shape.moe, self.rows);
        // What is written for each token comes first and in one piece.
        self.place("H_AT", rows * shape.hidden);
        self.place("COS_AT", rows * a.rotary_dims / 2);
        self.place("SIN_AT", rows * a.rotary_dims / 2);
        self.place("TOKEN_AT", TOKEN_WORDS);
        self.place("RANKS_AT", top_k);
        self.place("NORMED_AT", rows * shape.hidden);
        self.place("QUERY_AT", rows * a.heads * query_stride(shape));
        self.place("KEY_AT", rows * a.kv_heads * a.head_dim);
        self.place("VALUE_AT", rows * a.kv_heads * a.head_dim);
        let width = shape.delta.as_ref().map_or(0, DeltaNet::value_width);
        self.place("MIXED_AT", rows * width.max(a.heads * a.head_dim));
        if let Some(d) = &shape.delta {
            self.place("RAW_AT", rows * d.conv_channels());
            self.place("Z_AT", rows * d.value_width());
            self.place("B_AT", rows * d.value_heads);
            self.place("A_AT", rows * d.value_heads);
        }
        self.place("ROUTER_AT", rows * moe.experts);
        self.place("SHARED_GATE_AT", rows * moe.shared_width);
        self.place("SHARED_UP_AT", rows * moe.shared_width);
        self.place("SHARED_SIGMOID_AT", rows);
        self.place("CHOSEN_AT", rows * top_k);
        self.place("WEIGHTS_AT", rows * top_k);
        self.place("ACTIVE_AT", rows * top_k * moe.width);
        self.place("GATE_AT", rows * shape.dense_width);
        self.place("UP_AT", rows * shape.dense_width);
    }

    fn token(&mut self, shape: &Shape) {
        let a = &shape.attention;
        self.place("PARTS_AT", a.heads * SPLITS_MAX * (a.head_dim + 2));
        if let Some(d) = &shape.delta {
            self.place("SQUARES_AT", d.value_heads * d.value_dim / 32);
        }
        // The sum of the chosen experts that were not computed here.
        self.place("ELSEWHERE_AT", shape.hidden);
        self.place("LOGITS_AT", shape.vocab);
    }

    fn chunk(&mut self, shape: &Shape, top_k: usize) {
        if let Some(d) = &shape.delta {
            let parts = self.rows.div_ceil(DELTA_TOKENS) * d.value_heads;
            self.place("CONVOLVED_AT", self.rows * d.conv_channels());
            self.place("PAIRS_AT", parts * PAIRS_WORDS);
        }
        let a = &shape.attention;
        self.place("PARTS_AT", parts_most(a.heads, self.rows) * (a.head_dim + 2));
        self.place("OUTPUT_AT", self.rows * top_k * shape.hidden);
        // By which powers of two rows are shifted for tensor cores.
        self.place("ROW_SHIFTS_AT", self.rows);
        self.place("PAIR_SHIFTS_AT", self.pairs);
        self.names.push(("SHORT_TILES_AT", short_tiles_at(self.pairs)));
    }
}

/// Parts of query heads of so many tokens at most, whatever the context.
fn parts_most(heads: usize, tokens: usize) -> usize {
    (tokens * heads * SPLITS_MAX).min(ATTEND_GROUPS * ATTEND_ROWS)
}

/// Tokens whose keys and queries are multiplied with the state at a time, and keys that are added to it
/// at a time: what 16 KiB of workgroup memory hold.
fn delta_steps(key_dim: usize) -> [usize; 2] {
    let fours = 8 * key_dim.div_ceil(32);
    let step = if key_dim > 128 { 2 } else { 4 };
    let pooled = step / 2 * 256 / fours;
    [step, (1 << pooled.ilog2()).min(DELTA_TOKENS)]
}

/// Where the short tiles of experts' products begin in their list, in words, for so many pairs of a token
/// and an expert: behind the tall ones, each of which has more than [`SHORT_PAIRS`].
pub fn short_tiles_at(pairs: usize) -> usize {
    4 * (pairs / (SHORT_PAIRS + 1))
}

/// Words of a query head: its query, and its output gate where it has one.
pub fn query_stride(shape: &Shape) -> usize {
    shape.attention.head_dim * if shape.attention.gate { 2 } else { 1 }
}

/// Experts chosen for a token.
pub fn top_k(shape: &Shape, options: &Options) -> usize {
    options.experts_per_token.unwrap_or(shape.moe.top_k)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::container::Container;

    fn shape(heads: usize, kv_heads: usize) -> Shape {
        let tiny = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/tiny");
        let container = Container::open(&tiny).expect("the built-in model");
        let mut shape = container.shape().clone();
        (shape.attention.heads, shape.attention.kv_heads) = (heads, kv_heads);
        shape
    }

    #[test]
    fn parts_of_a_context_cover_it_and_fit_the_scratch() {
        for (heads, kv_heads) in [(16, 2), (4, 4), (64, 4), (20, 1), (3, 1)] {
            let shape = shape(heads, kv_heads);
            for position in [0, 1, 511, 512, 1023, 1500, 4095, 30_000, 262_000, 1_000_000] {
                for tokens in [1, 2, 3, 5, 7, 20, 63, 64, 100, 511, 512, 1000, 4096] {
                    let parts = context_parts(&shape, position, tokens);
                    let (count, end) = (parts.count, position + tokens);
                    assert!((count - 1) * parts.positions < end && end <= count * parts.positions);
                    assert!(parts.positions.is_multiple_of(32) && count <= SPLITS_MAX);
                    assert!(count == 1 || parts.positions >= PART_POSITIONS);
                    let groups = attend_blocks(&shape, tokens) * kv_heads;
                    assert!(count == 1 || groups * count <= ATTEND_GROUPS);
                    let used = if count > 1 { tokens * heads * count } else { 0 };
                    assert!(used <= parts_most(heads, tokens), "{tokens} after {position}");
                }
            }
        }
    }

    #[test]
    fn a_short_message_behind_a_long_context_has_a_large_device_s_workgroups() {
        let shape = shape(16, 2);
        let count = |position, tokens| context_parts(&shape, position, tokens).count;
        assert_eq!((attend_blocks(&shape, 20), count(30_000, 20)), (3, 41));
        assert_eq!((count(1000, 20), count(1004, 20), count(4_000_000, 2)), (1, 2, 64));
        // Blocks enough by itself.
        assert_eq!((count(30_000, 504), count(30_000, 505)), (2, 1));
    }
}
