//! Random numbers at the speed of a copy.
//!
//! A few MiB are drawn once; everything else is a piece of them from a place that its key decides.
//! Two keys give two pieces that differ, one key and one seed always give the same bytes. Nothing
//! here is fit for statistics, only for weights whose sums must not drift.

use std::collections::BTreeMap;

use flash_moe_kernels::f32_to_bf16;
use xxhash_rust::xxh3::xxh3_64_with_seed;

const BLOCK_BYTES: usize = 8 << 20;

/// Random bytes, and bf16 values of the spreads that were prepared.
pub struct Noise {
    seed: u64,
    bytes: Vec<u8>,
    floats: BTreeMap<u32, Vec<u8>>,
}

/// A splitmix64 sequence.
pub struct Draw(u64);

impl Draw {
    /// The sequence of a key.
    pub fn new(seed: u64, key: &str) -> Self {
        Self(xxh3_64_with_seed(key.as_bytes(), seed))
    }

    /// The next 64 random bits.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A value between `low` and `high`.
    pub fn between(&mut self, low: f32, high: f32) -> f32 {
        let unit = (self.bits() >> 40) as f32 / (1u32 << 24) as f32;
        low + (high - low) * unit
    }
}

impl Noise {
    /// Draws the block of a seed.
    pub fn new(seed: u64) -> Self {
        let mut draw = Draw::new(seed, "block");
        let bytes = (0..BLOCK_BYTES / 8).flat_map(|_| draw.bits().to_le_bytes()).collect();
        Self { seed, bytes, floats: BTreeMap::new() }
    }

    /// Draws the bf16 block of a standard deviation, for `fill_bf16`.
    pub fn prepare(&mut self, deviation: f32) {
        let seed = self.seed;
        self.floats.entry(deviation.to_bits()).or_insert_with(|| {
            let mut draw = Draw::new(seed, &format!("bf16 {deviation}"));
            // Uniform values of this bound have the deviation asked for.
            let bound = deviation * 3f32.sqrt();
            let mut value = || f32_to_bf16(draw.between(-bound, bound)).to_le_bytes();
            (0..BLOCK_BYTES / 2).flat_map(|_| value()).collect()
        });
    }

    /// Fills with random bytes.
    pub fn fill(&self, key: &str, piece: u64, out: &mut [u8]) {
        self.copy(&self.bytes, key, piece, out);
    }

    /// Fills with bf16 values of a prepared deviation.
    pub fn fill_bf16(&self, deviation: f32, key: &str, piece: u64, out: &mut [u8]) {
        self.copy(&self.floats[&deviation.to_bits()], key, piece, out);
    }

    fn copy(&self, block: &[u8], key: &str, piece: u64, out: &mut [u8]) {
        let place = xxh3_64_with_seed(key.as_bytes(), self.seed ^ piece.wrapping_mul(0x9e37_79b9));
        // Whole words, so that a 16-bit float is never cut.
        let mut start = place as usize % (block.len() / 8) * 8;
        let mut rest = out;
        while !rest.is_empty() {
            let count = rest.len().min(block.len() - start);
            let (now, later) = rest.split_at_mut(count);
            now.copy_from_slice(&block[start..start + count]);
            rest = later;
            start = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_key_gives_one_piece_and_another_key_another() {
        let noise = Noise::new(7);
        let piece = |key: &str, n| {
            let mut out = vec![0; 100];
            noise.fill(key, n, &mut out);
            out
        };
        assert_eq!(piece("a", 0), piece("a", 0));
        assert_ne!(piece("a", 0), piece("a", 1));
        assert_ne!(piece("a", 0), piece("b", 0));
    }

    #[test]
    fn floats_have_the_deviation_that_was_asked_for() {
        let mut noise = Noise::new(1);
        noise.prepare(0.25);
        let mut bytes = vec![0; 1 << 16];
        noise.fill_bf16(0.25, "x", 0, &mut bytes);
        let mut values = vec![0.0; 1 << 15];
        flash_moe_kernels::widen_bf16(&bytes, &mut values);
        let n = values.len() as f32;
        let mean = values.iter().sum::<f32>() / n;
        let deviation = (values.iter().map(|v| v * v).sum::<f32>() / n).sqrt();
        assert!(mean.abs() < 0.01 && (deviation - 0.25).abs() < 0.01, "{mean} {deviation}");
    }
}
