//! Tokens to run on: random ids from a seed.
//!
//! Random ids are no language. They cost what text costs, and route nearly uniformly, which is the
//! worst case for a cache of experts.

use flash_moe_engine::shape::TokenId;

/// The splitmix64 generator.
pub struct Random(u64);

impl Random {
    /// The sequence of a seed.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// A number below `bound`, which is not 0 and far below 2^64.
    pub fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % bound as u64) as usize
    }
}

/// `count` ids below `vocabulary`.
pub fn random_ids(seed: u64, count: usize, vocabulary: usize) -> Vec<TokenId> {
    let mut random = Random::new(seed);
    (0..count).map(|_| TokenId(random.below(vocabulary) as u32)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_gives_the_same_ids_and_all_are_in_the_vocabulary() {
        let ids = random_ids(3, 1000, 77);
        assert_eq!(ids, random_ids(3, 1000, 77));
        assert_ne!(ids, random_ids(4, 1000, 77));
        assert!(ids.iter().all(|id| id.0 < 77));
        assert_eq!(ids[..10], random_ids(3, 10, 77));
    }
}
