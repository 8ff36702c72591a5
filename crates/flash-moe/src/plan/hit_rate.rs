//! How many experts a pool will hold when they are asked for.
//!
//! Two ends of a range. Uniform routing: every expert is as likely as any other, so the share of hits
//! is the share of records in the pool, whatever is evicted. Skewed routing: published runs of
//! trained Qwen models, in docs/bench.md with their sources; other models lie on both sides.

/// Share of records in the pool, and share of hits, of the published runs.
const PUBLISHED: [(f64, f64); 7] = [
    (0.0, 0.0),
    (0.059, 0.557),
    (0.12, 0.707),
    (0.17, 0.791),
    (0.22, 0.843),
    (0.50, 0.91),
    (1.0, 1.0),
];

/// Hits when every expert is equally likely.
pub fn uniform(residency: f64) -> f64 {
    residency.clamp(0.0, 1.0)
}

/// Hits on the published curve, straight between its points.
pub fn skewed(residency: f64) -> f64 {
    let at = residency.clamp(0.0, 1.0);
    let (left, right) = PUBLISHED
        .windows(2)
        .map(|pair| (pair[0], pair[1]))
        .find(|(_, right)| at <= right.0)
        .expect("the curve ends at 1");
    left.1 + (right.1 - left.1) * (at - left.0) / (right.0 - left.0)
}

/// Records that `tokens` tokens ask for in one layer, when all `experts` are equally likely.
pub fn distinct(experts: usize, top_k: usize, tokens: usize) -> f64 {
    let (experts, top_k) = (experts as f64, top_k as f64);
    experts * (1.0 - (1.0 - top_k / experts).powf(tokens as f64))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_curve_goes_through_its_points_and_never_below_uniform() {
        for (residency, hit) in PUBLISHED {
            assert!((skewed(residency) - hit).abs() < 1e-12);
        }
        assert!((skewed(0.36) - (0.843 + 0.91) / 2.0).abs() < 1e-9);
        let mut before = 0.0;
        for percent in 0..=100 {
            let residency = f64::from(percent) / 100.0;
            assert!(skewed(residency) >= uniform(residency) && skewed(residency) >= before);
            before = skewed(residency);
        }
        assert_eq!((skewed(7.0), uniform(7.0), uniform(-1.0)), (1.0, 1.0, 0.0));
    }

    #[test]
    fn a_long_prompt_asks_for_nearly_every_expert() {
        assert!((distinct(256, 8, 1) - 8.0).abs() < 1e-9);
        assert!(distinct(256, 8, 2) < 16.0);
        assert!(distinct(256, 8, 512) > 255.9);
    }
}
