//! Keys and values of the positions seen so far, one cache for each attention layer.
//!
//! Grows by pages of positions, so that memory follows the conversation and not the context limit.
//! Keys are stored after norm and rotation. Within a page each KV head's rows are contiguous. A
//! clone shares its pages: a page is copied only when a cache appends to one that another holds, so
//! a prefix of several timelines is stored once.

use std::sync::Arc;

use bytemuck::{Pod, Zeroable};
use flash_moe_kernels::KvRows;

/// Positions a page holds.
pub const PAGE_POSITIONS: usize = 64;

/// Bytes that start at a cache line, since attention loads whole registers of them.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C, align(64))]
pub struct Line([u8; 64]);

/// Keys and values of one attention layer, f32.
#[derive(Clone)]
pub struct KvCache {
    kv_heads: usize,
    head_dim: usize,
    positions: usize,
    pages: Vec<Arc<[Line]>>, // [keys, values][kv_heads][PAGE_POSITIONS][head_dim]
}

impl KvCache {
    /// An empty cache.
    pub fn new(kv_heads: usize, head_dim: usize) -> Self {
        Self::zeroed(kv_heads, head_dim, 0)
    }

    /// A cache of so many positions whose keys and values are zero.
    pub fn zeroed(kv_heads: usize, head_dim: usize, positions: usize) -> Self {
        let pages = positions.div_ceil(PAGE_POSITIONS);
        let pages = (0..pages).map(|_| zero_page(kv_heads, head_dim)).collect();
        Self { kv_heads, head_dim, positions, pages }
    }

    /// Bytes a cache of `positions` takes, whole pages.
    pub fn bytes(kv_heads: usize, head_dim: usize, positions: usize) -> u64 {
        let page = (lines_in_page(kv_heads, head_dim) + 1) * size_of::<Line>();
        (positions.div_ceil(PAGE_POSITIONS) * page) as u64
    }

    /// Positions stored.
    pub fn len(&self) -> usize {
        self.positions
    }

    /// Whether nothing is stored.
    pub fn is_empty(&self) -> bool {
        self.positions == 0
    }

    /// Appends one position: `key` and `value` are `[kv_heads][head_dim]`.
    pub fn push(&mut self, key: &[f32], value: &[f32]) {
        let row = self.positions % PAGE_POSITIONS;
        if row == 0 {
            self.pages.push(zero_page(self.kv_heads, self.head_dim));
        }
        let page = self.pages.last_mut().expect("a page was just made or is not full");
        let floats: &mut [f32] = bytemuck::cast_slice_mut(Arc::make_mut(page));
        let rows = key.chunks_exact(self.head_dim).chain(value.chunks_exact(self.head_dim));
        for (head, from) in rows.enumerate() {
            let to = (head * PAGE_POSITIONS + row) * self.head_dim;
            floats[to..][..self.head_dim].copy_from_slice(from);
        }
        self.positions += 1;
    }

    /// Keys and values of one head in one page, its first `positions`.
    pub fn page(&self, head: usize, page: usize, positions: usize) -> KvRows<'_> {
        let floats: &[f32] = bytemuck::cast_slice(&self.pages[page]);
        let rows = |head: usize| {
            let from = head * PAGE_POSITIONS * self.head_dim;
            &floats[from..][..positions * self.head_dim]
        };
        KvRows { keys: rows(head), values: rows(self.kv_heads + head) }
    }

    /// The pages, in order.
    pub fn pages(&self) -> &[Arc<[Line]>] {
        &self.pages
    }

    /// The bytes of the pages, in order; one that is shared is copied first.
    pub fn pages_mut(&mut self) -> impl Iterator<Item = &mut [u8]> {
        self.pages.iter_mut().map(|page| bytemuck::cast_slice_mut(Arc::make_mut(page)))
    }

    /// Copies of all keys and all values, `[kv_heads][positions][head_dim]`.
    pub fn rows(&self) -> (Vec<f32>, Vec<f32>) {
        let (mut keys, mut values) = (Vec::new(), Vec::new());
        for head in 0..self.kv_heads {
            for page in 0..self.pages.len() {
                let positions = PAGE_POSITIONS.min(self.positions - page * PAGE_POSITIONS);
                let rows = self.page(head, page, positions);
                keys.extend_from_slice(rows.keys);
                values.extend_from_slice(rows.values);
            }
        }
        (keys, values)
    }
}

fn zero_page(kv_heads: usize, head_dim: usize) -> Arc<[Line]> {
    std::iter::repeat_n(Line::zeroed(), lines_in_page(kv_heads, head_dim)).collect()
}

fn lines_in_page(kv_heads: usize, head_dim: usize) -> usize {
    (kv_heads * head_dim * PAGE_POSITIONS * 2 * size_of::<f32>()).div_ceil(size_of::<Line>())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_come_back_across_page_borders() {
        let mut cache = KvCache::new(2, 3);
        for position in 0..2 * PAGE_POSITIONS + 1 {
            let key: Vec<f32> = (0..6).map(|i| (position * 10 + i) as f32).collect();
            let value: Vec<f32> = key.iter().map(|k| -k).collect();
            cache.push(&key, &value);
        }
        for position in [0, 1, PAGE_POSITIONS - 1, PAGE_POSITIONS, 2 * PAGE_POSITIONS] {
            let base = (position * 10) as f32;
            let (page, row) = (position / PAGE_POSITIONS, position % PAGE_POSITIONS);
            let key = &cache.page(1, page, row + 1).keys[row * 3..];
            let value = &cache.page(0, page, row + 1).values[row * 3..];
            assert_eq!(key, [base + 3.0, base + 4.0, base + 5.0]);
            assert_eq!(value, [-base, -(base + 1.0), -(base + 2.0)]);
        }
        assert_eq!(cache.len(), 2 * PAGE_POSITIONS + 1);
        assert_eq!(KvCache::bytes(2, 3, 129), 2 * 3 * 192 * 2 * 4 + 3 * 64);
        let first = cache.page(0, 1, 1);
        for rows in [first.keys, first.values] {
            assert!(rows.as_ptr().addr().is_multiple_of(64));
        }
    }
}
