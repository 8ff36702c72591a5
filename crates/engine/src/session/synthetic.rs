//! A context that nobody wrote, to measure what a long one costs without reading it.
//!
//! Fills the caches with random keys and values through the write path of a prompt. What follows is
//! timed like a real context and means nothing: the delta-net states and the logits stay as they
//! were. Only benches ask for it, and they say so.

use std::sync::Arc;

use super::{Memory, Session};
use crate::error::Result;
use crate::kv_cache::PAGE_POSITIONS;
use crate::shape::TokenId;

/// Random numbers in store; pages take them from places that differ.
const NUMBERS: usize = 1 << 16;

impl Session {
    /// Takes tokens without computing them: every attention layer gets random keys and values of
    /// unit variance in their place.
    ///
    /// # Errors
    /// As [`Session::prefill`].
    pub fn fill_synthetic(&mut self, tokens: &[TokenId]) -> Result<()> {
        self.check(tokens)?;
        self.bring_home()?;
        let a = &self.engine.shape().attention;
        let width = a.kv_heads * a.head_dim;
        let page = PAGE_POSITIONS * width;
        let numbers = random_numbers(NUMBERS + 2 * page);
        self.engine.compute.pool.chunks(&mut self.memories, 1, |layer, memory| {
            let [Memory::Attention(cache)] = memory else { return };
            for (i, tokens) in tokens.chunks(PAGE_POSITIONS).enumerate() {
                let at = (i * 2_654_435_761 + layer * 40_503) % NUMBERS;
                let (keys, values) = numbers[at..at + 2 * page].split_at(page);
                let some = tokens.len() * width;
                cache.append(&keys[..some], &values[..some]);
                cache.settle();
            }
        });
        self.tokens.extend_from_slice(tokens);
        // So that no token's time has their way to a device in it.
        let engine = Arc::clone(&self.engine);
        engine.gpu.as_ref().map_or(Ok(()), |gpu| self.go_to(gpu))
    }
}

/// Near to normally distributed, of unit variance: sums of four even numbers (SplitMix64).
fn random_numbers(count: usize) -> Vec<f32> {
    let mut state = 0u64;
    let mut next = || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let bits = (state ^ state >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let bits = (bits ^ bits >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        bits ^ bits >> 31
    };
    let sum = |bits: u64| (0..4).map(|i| (bits >> (16 * i) & 0xffff) as f32).sum::<f32>();
    let deviation = 65536.0 / 3f32.sqrt();
    (0..count).map(|_| (sum(next()) - 2.0 * 65535.0) / deviation).collect()
}
