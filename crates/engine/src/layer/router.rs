//! Which experts a token goes to, and with what weights.
//!
//! Softmax over all experts, the K most probable of them, renormalised unless the model says
//! otherwise. Always in f32 on the stored router weights. Of equal probabilities the lower index
//! wins, so that the choice never depends on the order of evaluation.

use crate::compute::{Compute, Temporary, sized};
use crate::container::Matrix;
use crate::shape::ExpertId;

/// Tokens whose experts are chosen as one work item.
const ITEM_TOKENS: usize = 8;

/// The choices for a chunk of tokens.
#[derive(Default)]
pub struct Routes {
    /// Raw router outputs, `[tokens][experts]`.
    pub logits: Vec<f32>,
    /// Chosen experts, most probable first, `[tokens][top_k]`.
    pub experts: Vec<ExpertId>,
    /// Their weights, `[tokens][top_k]`.
    pub weights: Vec<f32>,
    probabilities: Vec<f32>, // [tokens][experts]
}

impl Routes {
    /// Floats (and ids of half the size) needed for a chunk of tokens.
    pub fn floats(experts: usize, top_k: usize, tokens: usize) -> usize {
        tokens * (2 * experts + 2 * top_k)
    }
}

/// How many experts are chosen and whether their weights are scaled to sum to one.
#[derive(Clone, Copy)]
pub struct Choice {
    /// Experts for a token.
    pub top_k: usize,
    /// Whether to renormalise.
    pub renormalise: bool,
}

/// Routes each row of `x [tokens][hidden]`.
pub fn route(
    compute: &Compute,
    router: &Matrix,
    choice: Choice,
    x: &[f32],
    routes: &mut Routes,
    tmp: &mut Temporary,
) {
    let tokens = x.len() / router.cols();
    let experts = router.row_count();
    let logits = sized(&mut routes.logits, tokens * experts);
    // Whatever the arithmetic elsewhere: a near tie must not fall the other way.
    compute.project_exact(&router.rows(), x, logits, tmp);
    let top_k = choice.top_k;
    compute.pool.chunks3(
        (sized(&mut routes.probabilities, tokens * experts), ITEM_TOKENS * experts),
        (sized(&mut routes.experts, tokens * top_k), ITEM_TOKENS * top_k),
        (sized(&mut routes.weights, tokens * top_k), ITEM_TOKENS * top_k),
        |i, probabilities, chosen, weights| {
            probabilities
                .copy_from_slice(&logits[i * ITEM_TOKENS * experts..][..probabilities.len()]);
            let rows = probabilities.chunks_exact_mut(experts);
            let kept = chosen.chunks_exact_mut(top_k).zip(weights.chunks_exact_mut(top_k));
            for (probabilities, (chosen, weights)) in rows.zip(kept) {
                compute.isa.softmax(probabilities);
                choose(probabilities, choice, chosen, weights);
            }
        },
    );
}

/// The K most probable experts and their weights.
fn choose(probabilities: &mut [f32], choice: Choice, chosen: &mut [ExpertId], weights: &mut [f32]) {
    for (chosen, weight) in chosen.iter_mut().zip(&mut *weights) {
        let best = largest(probabilities);
        (*chosen, *weight) = (ExpertId(best as u16), probabilities[best]);
        // Probabilities are not negative, so this one is never chosen again.
        probabilities[best] = f32::NEG_INFINITY;
    }
    if choice.renormalise {
        let sum: f32 = weights.iter().sum();
        weights.iter_mut().for_each(|w| *w /= sum);
    }
}

/// Index of the largest value, the first of equals.
fn largest(values: &[f32]) -> usize {
    let mut best = 0;
    for (i, value) in values.iter().enumerate() {
        if *value > values[best] {
            best = i;
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_equals_the_first_is_largest() {
        assert_eq!(largest(&[1.0, 3.0, 3.0, 2.0]), 1);
        assert_eq!(largest(&[f32::NEG_INFINITY, 0.0, 0.0]), 1);
    }
}
