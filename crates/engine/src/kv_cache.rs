//! Keys and values of the positions seen so far, one cache for each attention layer.
//!
//! Grows by pages of positions, so that memory follows the conversation and not the context limit.
//! Keys are stored after norm and rotation. Within a page each KV head's rows are contiguous.

use flash_moe_kernels::KvRows;

/// Positions a page holds.
pub const PAGE_POSITIONS: usize = 64;

/// Keys and values of one attention layer, f32.
pub struct KvCache {
    kv_heads: usize,
    head_dim: usize,
    positions: usize,
    pages: Vec<KvPage>,
}

struct KvPage {
    keys: Vec<f32>,   // [kv_heads][PAGE_POSITIONS][head_dim]
    values: Vec<f32>, // [kv_heads][PAGE_POSITIONS][head_dim]
}

impl KvCache {
    /// An empty cache.
    pub fn new(kv_heads: usize, head_dim: usize) -> Self {
        Self { kv_heads, head_dim, positions: 0, pages: Vec::new() }
    }

    /// Bytes a cache of `positions` takes, whole pages.
    pub fn bytes(kv_heads: usize, head_dim: usize, positions: usize) -> u64 {
        let floats = kv_heads * head_dim * positions.next_multiple_of(PAGE_POSITIONS) * 2;
        (floats * size_of::<f32>()) as u64
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
            let floats = self.kv_heads * PAGE_POSITIONS * self.head_dim;
            self.pages.push(KvPage { keys: vec![0.0; floats], values: vec![0.0; floats] });
        }
        let page = self.pages.last_mut().expect("a page was just made or is not full");
        for head in 0..self.kv_heads {
            let to = (head * PAGE_POSITIONS + row) * self.head_dim;
            let from = head * self.head_dim;
            page.keys[to..][..self.head_dim].copy_from_slice(&key[from..][..self.head_dim]);
            page.values[to..][..self.head_dim].copy_from_slice(&value[from..][..self.head_dim]);
        }
        self.positions += 1;
    }

    /// Keys and values of one head in one page, its first `positions`.
    pub fn page(&self, head: usize, page: usize, positions: usize) -> KvRows<'_> {
        let page = &self.pages[page];
        let floats = positions * self.head_dim;
        KvRows {
            keys: &self.head_rows(&page.keys, head)[..floats],
            values: &self.head_rows(&page.values, head)[..floats],
        }
    }

    /// Copies of all keys and all values, `[kv_heads][positions][head_dim]`.
    pub fn rows(&self) -> (Vec<f32>, Vec<f32>) {
        let (mut keys, mut values) = (Vec::new(), Vec::new());
        for head in 0..self.kv_heads {
            for position in 0..self.positions {
                let page = &self.pages[position / PAGE_POSITIONS];
                let row = position % PAGE_POSITIONS * self.head_dim;
                keys.extend_from_slice(&self.head_rows(&page.keys, head)[row..][..self.head_dim]);
                values
                    .extend_from_slice(&self.head_rows(&page.values, head)[row..][..self.head_dim]);
            }
        }
        (keys, values)
    }

    fn head_rows<'a>(&self, page: &'a [f32], head: usize) -> &'a [f32] {
        let floats = PAGE_POSITIONS * self.head_dim;
        &page[head * floats..][..floats]
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
        assert_eq!(KvCache::bytes(2, 3, 129), 2 * 3 * 192 * 2 * 4);
    }
}
