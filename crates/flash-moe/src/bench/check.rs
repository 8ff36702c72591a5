//! The answer before the time: the two ways through the model must agree.
//!
//! A short prompt goes through once as a chunk and once token by token. Their logits are summed in
//! another order, so they differ by rounding; a near tie of two experts may then fall to the other
//! one, and a lossy KV cache may round to the other side. The bound leaves room for that; a difference
//! above it is taken for a wrong answer.

use std::ops::ControlFlow;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use flash_moe_engine::engine::Engine;
use flash_moe_engine::sampler::likeliest;
use flash_moe_engine::session::Session;
use flash_moe_engine::shape::TokenId;
use serde::Serialize;

/// Tokens of the prompt: enough for the chunked form of every layer.
pub const TOKENS: usize = 12;
/// Largest root mean square of the difference, as a share of the logits' deviation.
pub const BOUND: f64 = 0.02;
/// The same with a lossy KV cache.
pub const LOSSY_BOUND: f64 = 0.25;

/// The outcome of a check that passed.
#[derive(Clone, Debug, Serialize)]
pub struct Check {
    /// Tokens of the prompt.
    pub tokens: usize,
    /// Root mean square of the difference over the logits' deviation.
    pub difference: f64,
    /// What it had to be below.
    pub bound: f64,
}

/// Runs `prompt` both ways.
///
/// # Errors
/// A logit that is not finite; a difference above the bound; an error of the engine.
pub fn check(engine: &Arc<Engine>, prompt: &[TokenId]) -> Result<Check> {
    let mut session = Session::new(engine);
    session.prefill(prompt, &mut |_| ControlFlow::Continue(()))?;
    likeliest(session.logits())?;
    let together = session.logits()[..engine.vocabulary()].to_vec();
    let mut session = Session::new(engine);
    for &token in prompt {
        session.step(token)?;
    }
    likeliest(session.logits())?;
    let lossy = engine.options().kv_cache.loss().is_some();
    let bound = if lossy { LOSSY_BOUND } else { BOUND };
    let difference = difference(&together, &session.logits()[..engine.vocabulary()], bound)
        .with_context(|| format!("the check over {} tokens, before any timing", prompt.len()))?;
    Ok(Check { tokens: prompt.len(), difference, bound })
}

/// The root mean square of `a - b` over the deviation of `a`.
fn difference(a: &[f32], b: &[f32], bound: f64) -> Result<f64> {
    let mean = a.iter().map(|&v| f64::from(v)).sum::<f64>() / a.len() as f64;
    let spread: f64 = a.iter().map(|&v| (f64::from(v) - mean).powi(2)).sum();
    let apart: f64 = a.iter().zip(b).map(|(&a, &b)| (f64::from(a) - f64::from(b)).powi(2)).sum();
    let difference = (apart / spread).sqrt();
    ensure!(spread > 0.0, "all logits are equal");
    ensure!(
        difference <= bound,
        "the prompt as a whole and token by token give logits that differ by {difference:.2e} of \
         their deviation, more than {bound}"
    );
    Ok(difference)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounding_passes_and_another_answer_is_refused() {
        let a: Vec<f32> = (0..100).map(|i| (i as f32 * 0.7).sin()).collect();
        let rounded: Vec<f32> = a.iter().map(|v| v * 1.00001).collect();
        let found = difference(&a, &rounded, BOUND).unwrap();
        assert!((found - 1e-5).abs() < 1e-6, "{found}");
        let other: Vec<f32> = a.iter().map(|v| v + 0.1 * v.cos()).collect();
        assert!(difference(&a, &other, BOUND).is_err());
        assert!(difference(&[1.0; 5], &[1.0; 5], BOUND).is_err());
        let broken = [f32::NAN; 100];
        assert!(difference(&a, &broken, BOUND).is_err());
    }
}
