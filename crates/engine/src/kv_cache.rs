//! Keys and values of the positions seen so far, one cache for each attention layer.
//!
//! Grows by pages of positions, so that memory follows the conversation and not the context limit.
//! Keys are stored after norm and rotation. Within a page each KV head's rows are contiguous.

use flash_moe_kernels::KvRows;

use crate::compute::{LINE_FLOATS, from_line};

/// Positions a page holds.
pub const PAGE_POSITIONS: usize = 64;

/// Keys and values of one attention layer, f32.
pub struct KvCache {
    kv_heads: usize,
    head_dim: usize,
    positions: usize,
    pages: Vec<KvPage>,
}

/// Keys and values start at a cache line, since attention loads whole registers of them.
struct KvPage {
    memory: Vec<f32>, // [keys, values][kv_heads][PAGE_POSITIONS][head_dim] from `start` on
    start: usize,     // `memory` never grows, so it stays where it is
}

impl KvPage {
    fn new(floats: usize) -> Self {
        let mut memory = vec![0.0; floats + LINE_FLOATS];
        let start = memory.len() - from_line(&mut memory).len();
        Self { memory, start }
    }
}

impl KvCache {
    /// An empty cache.
    pub fn new(kv_heads: usize, head_dim: usize) -> Self {
        Self { kv_heads, head_dim, positions: 0, pages: Vec::new() }
    }

    /// Bytes a cache of `positions` takes, whole pages.
    pub fn bytes(kv_heads: usize, head_dim: usize, positions: usize) -> u64 {
        let floats = kv_heads * head_dim * PAGE_POSITIONS * 2 + LINE_FLOATS;
        (positions.div_ceil(PAGE_POSITIONS) * floats * size_of::<f32>()) as u64
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
            self.pages.push(KvPage::new(2 * self.kv_heads * PAGE_POSITIONS * self.head_dim));
        }
        let page = self.pages.last_mut().expect("a page was just made or is not full");
        let rows = key.chunks_exact(self.head_dim).chain(value.chunks_exact(self.head_dim));
        for (head, from) in rows.enumerate() {
            let to = page.start + (head * PAGE_POSITIONS + row) * self.head_dim;
            page.memory[to..][..self.head_dim].copy_from_slice(from);
        }
        self.positions += 1;
    }

    /// Keys and values of one head in one page, its first `positions`.
    pub fn page(&self, head: usize, page: usize, positions: usize) -> KvRows<'_> {
        let KvPage { memory, start } = &self.pages[page];
        let rows = |head: usize| {
            let from = start + head * PAGE_POSITIONS * self.head_dim;
            &memory[from..][..positions * self.head_dim]
        };
        KvRows { keys: rows(head), values: rows(self.kv_heads + head) }
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
        assert_eq!(KvCache::bytes(2, 3, 129), (2 * 3 * 192 * 2 + 3 * LINE_FLOATS as u64) * 4);
        let first = cache.page(0, 1, 1);
        for rows in [first.keys, first.values] {
            assert!(rows.as_ptr().addr().is_multiple_of(64));
        }
    }
}
