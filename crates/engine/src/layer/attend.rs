//! Softmax attention of a chunk of tokens over the cache, cut into work items.
//!
//! Owns the cut and the merge. The query rows of a chunk that share a KV head, `[tokens][group]`,
//! are cut into blocks of rows; the pages are cut into ranges where blocks alone are too few to keep
//! many threads busy, above all for one token. An item gathers one range for one block of one KV
//! head, page by page, and the ranges of a row are then merged in their order.
//!
//! The one idea: the cut depends on the numbers of tokens and of positions only, so the threads
//! change no bit, and what is kept for a row does not grow with the context.

mod buffers;

use std::ops::Range;

use flash_moe_kernels::{Gathered, Isa};

use crate::compute::{Compute, LINE_FLOATS, from_line, sized, with_scratch};
use crate::kv_cache::{KvCache, PAGE_POSITIONS};
use crate::shape::Attention;
use buffers::Buffers;

/// Query rows of an item at most: a page is read once for so many.
const BLOCK_ROWS: usize = 64;
/// Pages of a range at least: half a megabyte of keys and values of 256, tens of microseconds.
const RANGE_PAGES: usize = 4;
/// Rows of all ranges of a KV head together, at most, unless there are more without any cut. With 8
/// query heads for a KV head one token's pages are cut into up to 32 ranges.
const CUT_ROWS: usize = 256;

/// Query rows of a chunk that follows so many positions.
pub struct Projected<'a> {
    /// `[tokens][heads][stride]`, of which the first `head_dim` of each head count; normed, rotated.
    pub rows: &'a [f32],
    /// From one head to the next.
    pub stride: usize,
    /// Position of the first token.
    pub first: usize,
}

/// What all items have gathered.
#[derive(Default)]
pub struct Gathering {
    items: Vec<f32>, // [kv_heads][blocks][ranges][block_rows * (head_dim + 2)]
}

impl Gathering {
    /// Floats needed for a chunk of tokens.
    pub fn floats(a: &Attention, tokens: usize) -> usize {
        let rows = tokens * (a.heads / a.kv_heads);
        let block_rows = rows.min(BLOCK_ROWS);
        let cut_rows = rows.next_multiple_of(block_rows).max(CUT_ROWS);
        a.kv_heads * cut_rows * (a.head_dim + 2) + LINE_FLOATS
    }

    /// Floats of a thread's scratch.
    pub fn thread_floats(a: &Attention) -> usize {
        Buffers::floats(BLOCK_ROWS, a.head_dim) + LINE_FLOATS
    }
}

/// How a chunk is cut.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Cut {
    group: usize,       // query heads of a KV head
    rows: usize,        // of a KV head: tokens * group
    block_rows: usize,  // of a block, the last one apart
    blocks: usize,      // of rows
    pages: usize,       // of all positions, the chunk's own included
    range_pages: usize, // of a range, the last one apart
    ranges: usize,      // of pages
}

impl Cut {
    fn new(group: usize, tokens: usize, first: usize) -> Self {
        let rows = tokens * group;
        let block_rows = rows.min(BLOCK_ROWS);
        let blocks = rows.div_ceil(block_rows);
        let pages = (first + tokens).div_ceil(PAGE_POSITIONS);
        let ranges_most = (CUT_ROWS / (blocks * block_rows)).max(1);
        let range_pages = pages.div_ceil(ranges_most).max(RANGE_PAGES);
        let ranges = pages.div_ceil(range_pages);
        Self { group, rows, block_rows, blocks, pages, range_pages, ranges }
    }

    /// Pages of a range.
    fn pages(&self, range: usize) -> Range<usize> {
        range * self.range_pages..self.pages.min((range + 1) * self.range_pages)
    }

    /// Number of the item that gathers the first range for a block; the others follow it.
    fn first_item(&self, kv_head: usize, block: usize) -> usize {
        (kv_head * self.blocks + block) * self.ranges
    }
}

/// softmax(q . K / sqrt(head_dim)) V for each token and head over the positions up to the token's:
/// `out [tokens][heads][head_dim]`. The cache holds the chunk's positions already. `finish` is
/// called with the number of each row `[head_dim]` of the result and the row.
pub fn attend(
    compute: &Compute,
    (a, cache): (&Attention, &KvCache),
    queries: &Projected,
    gathering: &mut Gathering,
    out: &mut [f32],
    finish: impl Fn(usize, &mut [f32]) + Sync,
) {
    let tokens = out.len() / (a.heads * a.head_dim);
    let cut = Cut::new(a.heads / a.kv_heads, tokens, queries.first);
    let item_floats = cut.block_rows * (a.head_dim + 2);
    // Always the most that so many tokens need: what one token needs grows with its position.
    let items = sized(&mut gathering.items, Gathering::floats(a, tokens));
    let items = &mut from_line(items)[..cut.first_item(a.kv_heads, 0) * item_floats];
    let chunk = Chunk { isa: compute.isa, a, cache, queries, cut };
    compute.pool.chunks(items, item_floats, |number, item| {
        let (block, range) = (number / cut.ranges, number % cut.ranges);
        gather(&chunk, (block / cut.blocks, block % cut.blocks, range), item);
    });
    let items = &*items;
    compute.pool.chunks(out, a.head_dim, |i, out| {
        let (token, head) = (i / a.heads, i % a.heads);
        let row = token * cut.group + head % cut.group;
        let first = cut.first_item(head / cut.group, row / cut.block_rows);
        let ranges = &items[first * item_floats..][..cut.ranges * item_floats];
        merge(&chunk, ranges, row % cut.block_rows, out);
        finish(i, out);
    });
}

/// What all items of a chunk read.
struct Chunk<'a> {
    isa: Isa,
    a: &'a Attention,
    cache: &'a KvCache,
    queries: &'a Projected<'a>,
    cut: Cut,
}

/// One range for one block of one KV head, into `item [block_rows * (head_dim + 2)]`: the mixes,
/// then the largest scores, then the sums.
fn gather(chunk: &Chunk, (kv_head, block, range): (usize, usize, usize), item: &mut [f32]) {
    let Chunk { isa, a, cache, queries, cut } = chunk;
    let first = block * cut.block_rows;
    let rows = cut.block_rows.min(cut.rows - first);
    let (mix, rest) = item.split_at_mut(cut.block_rows * a.head_dim);
    let (max, sum) = rest.split_at_mut(cut.block_rows);
    let (mix, max, sum) = (&mut mix[..rows * a.head_dim], &mut max[..rows], &mut sum[..rows]);
    let mut gathered = Gathered { max, sum, mix };
    gathered.clear();
    // Tokens that a row sees, its own included.
    let seen = |row: usize| queries.first + (first + row) / cut.group + 1;
    let mut visible = [0; BLOCK_ROWS];
    with_scratch(Gathering::thread_floats(a), |scratch| {
        let mut buffers = Buffers::of(from_line(scratch), rows, a.head_dim);
        for (row, query) in buffers.queries.chunks_exact_mut(a.head_dim).enumerate() {
            let (token, head) = ((first + row) / cut.group, (first + row) % cut.group);
            let at = (token * a.heads + kv_head * cut.group + head) * queries.stride;
            query.copy_from_slice(&queries.rows[at..][..a.head_dim]);
        }
        isa.scale(1.0 / (a.head_dim as f32).sqrt(), buffers.queries);
        for page in cut.pages(range) {
            // Rows of tokens so late that they see this page in codes: they are the last ones.
            let coded_from = cache.coded_from(page).unwrap_or(usize::MAX);
            let wide_rows = (0..rows).position(|row| seen(row) > coded_from).unwrap_or(rows);
            if wide_rows < rows {
                let page = cache.coded(kv_head, page);
                buffers.attend_coded(*isa, &page, wide_rows, &mut gathered);
            }
            if wide_rows == 0 {
                continue;
            }
            // The last row sees most; it may see nothing of the last pages.
            let positions = seen(wide_rows - 1).saturating_sub(page * PAGE_POSITIONS);
            let positions = positions.min(PAGE_POSITIONS);
            for (row, visible) in visible[..wide_rows].iter_mut().enumerate() {
                *visible = seen(row).saturating_sub(page * PAGE_POSITIONS).min(positions);
            }
            let page = cache.wide(kv_head, page, positions);
            buffers.attend_wide(*isa, &page, &visible[..wide_rows], &mut gathered);
        }
    });
}

/// One row of a block from all of its ranges, in their order: `out [head_dim]`.
fn merge(chunk: &Chunk, ranges: &[f32], row: usize, out: &mut [f32]) {
    let (block_rows, head_dim) = (chunk.cut.block_rows, out.len());
    let items = || ranges.chunks_exact(block_rows * (head_dim + 2));
    let max_of = |item: &[f32]| item[block_rows * head_dim + row];
    let max = items().map(max_of).fold(f32::NEG_INFINITY, f32::max);
    let mut sum = 0.0;
    out.fill(0.0);
    for item in items() {
        let factor = (max_of(item) - max).exp();
        sum += factor * item[block_rows * (head_dim + 1) + row];
        chunk.isa.axpy(factor, &item[row * head_dim..][..head_dim], out);
    }
    chunk.isa.scale(1.0 / sum, out);
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::compute::{Arithmetic, Kin};
    use crate::kv_cache::{KvFormat, KvShape};
    use crate::pool::Pool;

    fn compute(threads: usize) -> Compute {
        Compute {
            isa: Isa::detect(),
            pool: Arc::new(Pool::new(threads)),
            arithmetic: Arithmetic::Exact,
            kin: Kin::OneTimeline,
        }
    }

    fn shape(heads: usize, kv_heads: usize, head_dim: usize) -> Attention {
        Attention {
            heads,
            kv_heads,
            head_dim,
            rotary_dims: 0,
            rope_theta: 1.0,
            yarn: None,
            gate: false,
        }
    }

    /// Numbers from -1 to 1.
    fn number(i: usize) -> f32 {
        (i.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40) as f32 / (1 << 23) as f32 - 1.0
    }

    fn cache(a: &Attention, positions: usize) -> KvCache {
        let mut cache = KvCache::new(KvShape::of(a, KvFormat::F32));
        append(a, &mut cache, positions);
        cache
    }

    fn append(a: &Attention, cache: &mut KvCache, positions: usize) {
        let width = a.kv_heads * a.head_dim;
        let from = cache.len() * width;
        let row = |seed: usize| -> Vec<f32> {
            (from..from + positions * width).map(|i| number(seed + i)).collect()
        };
        cache.append(&row(1 << 32), &row(1 << 33));
    }

    #[test]
    fn a_token_sees_pages_in_codes_by_their_age_whatever_chunk_it_came_in() {
        let a = shape(16, 2, 64);
        let rows: Vec<f32> = (0..400 * 16 * 64).map(|i| 3.0 * number(i)).collect();
        let compute = compute(2);
        for name in ["f32", "f16", "bf16", "int8", "tq2", "tq3", "k4v2"] {
            let format = name.parse::<KvFormat>().expect("a format").with_window(1, 1);
            let attended = |chunk: usize| {
                let mut cache = KvCache::new(KvShape::of(&a, format));
                let mut out = Vec::new();
                for rows in rows.chunks(chunk * 16 * 64) {
                    let first = cache.len();
                    append(&a, &mut cache, rows.len() / (16 * 64));
                    let queries = Projected { rows, stride: 64, first };
                    let mut some = vec![0.0; rows.len()];
                    let mut gathering = Gathering::default();
                    attend(&compute, (&a, &cache), &queries, &mut gathering, &mut some, |_, _| {});
                    cache.settle();
                    out.extend(some);
                }
                assert_eq!(
                    cache.bytes(),
                    KvShape::of(&a, format).bytes(400) - 64 * cache.pages().count() as u64,
                    "{name}"
                );
                out
            };
            let whole = attended(400);
            for chunk in [1, 64, 150] {
                for (i, (a, b)) in attended(chunk).iter().zip(&whole).enumerate() {
                    assert!((a - b).abs() < 1e-5, "{name}, chunks of {chunk}, {i}: {a} {b}");
                }
            }
        }
    }

    /// One row in f64, in two passes.
    fn plain(a: &Attention, cache: &KvCache, head: usize, query: &[f32], seen: usize) -> Vec<f64> {
        let (keys, values) = cache.rows();
        let from = head * cache.len() * a.head_dim;
        let rows = |x: &[f32]| -> Vec<Vec<f64>> {
            let rows = x[from..].chunks(a.head_dim).take(seen);
            rows.map(|row| row.iter().map(|x| f64::from(*x)).collect()).collect()
        };
        let root = (a.head_dim as f64).sqrt();
        let score = |key: &Vec<f64>| {
            key.iter().zip(query).map(|(k, q)| k * f64::from(*q)).sum::<f64>() / root
        };
        let weights: Vec<f64> = rows(&keys).iter().map(|key| score(key).exp()).collect();
        let total: f64 = weights.iter().sum();
        let mut out = vec![0.0; a.head_dim];
        for (weight, value) in weights.iter().zip(rows(&values)) {
            for (out, value) in out.iter_mut().zip(value) {
                *out += weight / total * value;
            }
        }
        out
    }

    #[test]
    fn every_cut_is_a_plain_softmax_and_threads_change_no_bit() {
        for (a, first, tokens) in [
            (shape(4, 2, 16), 0, 1),
            (shape(4, 2, 16), 63, 1),
            (shape(4, 2, 16), 64, 1),
            (shape(16, 2, 8), 2500, 1),
            (shape(16, 2, 8), 700, 3),
            (shape(6, 2, 20), 0, 90),
            (shape(6, 2, 20), 300, 30),
            (shape(3, 3, 5), 510, 70),
            (shape(70, 1, 8), 600, 2),
        ] {
            let cache = cache(&a, first + tokens);
            let width = a.heads * a.head_dim;
            let rows: Vec<f32> = (0..tokens * width).map(|i| 3.0 * number(i)).collect();
            let queries = Projected { rows: &rows, stride: a.head_dim, first };
            let attended = |threads| {
                let compute = compute(threads);
                let mut out = vec![9.0; tokens * width];
                let mut gathering = Gathering::default();
                attend(&compute, (&a, &cache), &queries, &mut gathering, &mut out, |_, _| {});
                out
            };
            let got = attended(1);
            assert_eq!(got, attended(3), "{a:?}, {tokens} after {first}");
            for (i, got) in got.chunks(a.head_dim).enumerate() {
                let (token, head) = (i / a.heads, i % a.heads * a.kv_heads / a.heads);
                let query = &rows[i * a.head_dim..][..a.head_dim];
                let want = plain(&a, &cache, head, query, first + token + 1);
                for (got, want) in got.iter().zip(want) {
                    let error = (f64::from(*got) - want).abs();
                    assert!(error < 5e-6, "{a:?}, {tokens} after {first}, row {i}: {got} {want}");
                }
            }
        }
    }

    #[test]
    fn ranges_cover_the_pages_and_their_number_is_bounded() {
        for group in [1, 2, 8, 70] {
            for tokens in [1, 3, 8, 9, 100, 512] {
                for first in [0, 1, 63, 64, 255, 256, 4096, 100_000, 1_000_000] {
                    let cut = Cut::new(group, tokens, first);
                    let pages: Vec<usize> = (0..cut.ranges).flat_map(|r| cut.pages(r)).collect();
                    let all: Vec<usize> = (0..(first + tokens).div_ceil(PAGE_POSITIONS)).collect();
                    assert_eq!(pages, all, "{cut:?}");
                    let a = shape(3 * group, 3, 16);
                    let floats = cut.first_item(3, 0) * cut.block_rows * (16 + 2);
                    assert!(floats <= Gathering::floats(&a, tokens), "{cut:?}");
                }
            }
        }
    }

    #[test]
    fn one_token_of_a_long_context_makes_many_items() {
        assert_eq!(Cut::new(8, 1, 32_767).ranges, 32);
        assert_eq!(Cut::new(8, 1, 4095).ranges, 16);
        assert_eq!(Cut::new(8, 512, 4096).ranges, 1);
    }
}
