//! Which experts a token goes to, and with what weights.
//!
//! Softmax over all experts, the K most probable of them, renormalised unless the model says
//! otherwise. Always in f32 on the stored router weights. Of equal probabilities the lower index
//! wins, so that the choice never depends on the order of evaluation.

use crate::compute::{Compute, Temporary, sized};
use crate::container::Matrix;
use crate::shape::ExpertId;

/// The choices for a chunk of tokens.
#[derive(Default)]
pub struct Routes {
    /// Raw router outputs, `[tokens][experts]`.
    pub logits: Vec<f32>,
    /// Chosen experts, most probable first, `[tokens][top_k]`.
    pub experts: Vec<ExpertId>,
    /// Their weights, `[tokens][top_k]`.
    pub weights: Vec<f32>,
    probabilities: Vec<f32>, // [experts]
}

impl Routes {
    /// Floats (and ids of half the size) needed for a chunk of tokens.
    pub fn floats(experts: usize, top_k: usize, tokens: usize) -> usize {
        tokens * (experts + 2 * top_k) + experts
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
    routes.experts.clear();
    routes.weights.clear();
    let probabilities = sized(&mut routes.probabilities, experts);
    for logits in routes.logits.chunks_exact(experts) {
        probabilities.copy_from_slice(logits);
        compute.isa.softmax(probabilities);
        let first = routes.weights.len();
        for _ in 0..choice.top_k {
            let best = largest(probabilities);
            routes.experts.push(ExpertId(best as u16));
            routes.weights.push(probabilities[best]);
            // Probabilities are not negative, so this one is never chosen again.
            probabilities[best] = f32::NEG_INFINITY;
        }
        if choice.renormalise {
            let sum: f32 = routes.weights[first..].iter().sum();
            routes.weights[first..].iter_mut().for_each(|w| *w /= sum);
        }
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
