//! The model's own log-probabilities of a token and of its rivals.
//!
//! They are those of the logits as the model gave them: before penalties, bias, mask and temperature,
//! so that they say what the model thought and not what the sampler made of it.

use crate::sampler::most_probable;
use crate::shape::TokenId;

/// Log-probabilities at one position, natural logarithms.
#[derive(Clone, PartialEq, Debug)]
pub struct Logprobs {
    /// That of the token that was chosen.
    pub chosen: f32,
    /// The most probable tokens, in descending order.
    pub top: Vec<(TokenId, f32)>,
}

/// Log-probabilities of `chosen` and of the `top` most probable tokens, of `logits` `[vocab]`.
///
/// The softmax is `logit - ln(sum(exp(logit)))`, summed in f64 from the largest logit down.
pub fn logprobs(logits: &[f32], chosen: TokenId, top: usize) -> Logprobs {
    let mut ranked = Vec::new();
    most_probable(logits, top.max(1), &mut ranked);
    let largest = ranked.first().map_or(0.0, |candidate| f64::from(candidate.logit));
    let sum: f64 = logits.iter().map(|&logit| (f64::from(logit) - largest).exp()).sum();
    let of = |logit: f32| (f64::from(logit) - largest - sum.ln()) as f32;
    ranked.truncate(top);
    Logprobs {
        chosen: logits.get(chosen.0 as usize).map_or(f32::NEG_INFINITY, |&logit| of(logit)),
        top: ranked.iter().map(|candidate| (TokenId(candidate.id), of(candidate.logit))).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn they_are_the_logarithms_of_the_softmax() {
        let p = [0.1f32, 0.6, 0.0, 0.3];
        let logits: Vec<f32> = p.iter().map(|p| p.ln() + 5.0).collect();
        let got = logprobs(&logits, TokenId(3), 2);
        assert!((got.chosen - 0.3f32.ln()).abs() < 1e-6, "{got:?}");
        let ids: Vec<u32> = got.top.iter().map(|(token, _)| token.0).collect();
        assert_eq!(ids, [1, 3]);
        assert!((got.top[0].1 - 0.6f32.ln()).abs() < 1e-6, "{got:?}");
        assert_eq!(logprobs(&logits, TokenId(2), 0).chosen, f32::NEG_INFINITY);
        assert!(logprobs(&logits, TokenId(2), 0).top.is_empty());
    }
}
