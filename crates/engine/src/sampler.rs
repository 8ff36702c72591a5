//! From logits to a token.
//!
//! The order is that of the hub's reference library: penalties, bias, mask, temperature, top-k,
//! top-p, min-p, then one draw. Work is proportional to the vocabulary only for one pass; nothing sorts it.
//! Equal logits rank by token id, so a seed gives the same tokens everywhere the logits are the
//! same. A NaN is an error, never a token.

use std::cmp::{Ordering, Reverse};
use std::collections::{BinaryHeap, HashMap};

use crate::error::{Error, Result};
use crate::shape::TokenId;

/// How tokens are chosen.
#[derive(Clone, PartialEq, Debug)]
pub struct Sampling {
    /// Divides the logits; 0 takes the largest logit and ignores what follows but the penalties.
    pub temperature: f32,
    /// Keeps this many of the most probable tokens; 0 keeps all.
    pub top_k: usize,
    /// Keeps the fewest most probable tokens whose probabilities reach this sum; above 0, 1 keeps all.
    pub top_p: f32,
    /// Keeps tokens at least this share as probable as the most probable one; 0 keeps all.
    pub min_p: f32,
    /// Divides positive and multiplies negative logits of tokens in the prompt or the output; 1 is none.
    pub repetition_penalty: f32,
    /// Subtracted from the logit of every token in the output; 0 is none.
    pub presence_penalty: f32,
    /// Subtracted from a token's logit once for each time it is in the output; 0 is none.
    pub frequency_penalty: f32,
    /// Added to the logits of these tokens.
    pub logit_bias: Vec<(TokenId, f32)>,
    /// Start of the random sequence.
    pub seed: u64,
}

impl Sampling {
    /// The largest logit, no penalties.
    pub fn greedy() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            seed: 0,
        }
    }

    /// Whether the random sequence is not used at all.
    pub fn is_greedy(&self) -> bool {
        self.temperature == 0.0
    }

    /// Whether every setting is in its range.
    ///
    /// # Errors
    /// Names the first setting that is not, its value and its range.
    pub fn check(&self) -> Result<()> {
        // NaN is in no range.
        let within = |name: &str, value: f32, range: std::ops::RangeInclusive<f32>| {
            if range.contains(&value) {
                return Ok(());
            }
            let (low, high) = (range.start(), range.end());
            Err(Error::Sampling(format!("{name} is {value}, expected {low} to {high}")))
        };
        within("temperature", self.temperature, 0.0..=100.0)?;
        within("min_p", self.min_p, 0.0..=1.0)?;
        within("presence_penalty", self.presence_penalty, -100.0..=100.0)?;
        within("frequency_penalty", self.frequency_penalty, -100.0..=100.0)?;
        within("repetition_penalty", self.repetition_penalty, 0.01..=100.0)?;
        for &(token, bias) in &self.logit_bias {
            within(&format!("logit_bias of token {}", token.0), bias, -100.0..=100.0)?;
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            let top_p = self.top_p;
            return Err(Error::Sampling(format!("top_p is {top_p}, expected above 0, at most 1")));
        }
        Ok(())
    }

    fn changes_logits(&self) -> bool {
        !self.logit_bias.is_empty()
            || self.repetition_penalty != 1.0
            || self.presence_penalty != 0.0
            || self.frequency_penalty != 0.0
    }
}

/// Chooses the tokens of one text.
pub struct Sampler {
    sampling: Sampling,
    random: SplitMix64,
    seen: HashMap<TokenId, u32>, // times in the output; 0 for tokens of the prompt alone
    adjusted: Vec<f32>,          // [vocab] logits after penalties, bias and mask; empty without
    kept: Vec<Candidate>,
}

impl Sampler {
    /// A sampler at the start of a text.
    ///
    /// # Errors
    /// See [`Sampling::check`].
    pub fn new(sampling: Sampling, prompt: &[TokenId]) -> Result<Self> {
        sampling.check()?;
        Ok(Self {
            random: SplitMix64(sampling.seed),
            sampling,
            seen: prompt.iter().map(|&token| (token, 0)).collect(),
            adjusted: Vec::new(),
            kept: Vec::new(),
        })
    }

    /// Tells the sampler that `token` is now part of the output, whoever chose it.
    pub fn accept(&mut self, token: TokenId) {
        *self.seen.entry(token).or_insert(0) += 1;
    }

    /// The next token, given `logits` `[vocab]`. Negative infinity marks tokens that cannot be chosen.
    ///
    /// # Errors
    /// A logit that is NaN or positive infinity; no logit that is finite.
    pub fn pick(&mut self, logits: &[f32]) -> Result<TokenId> {
        self.pick_among(logits, None)
    }

    /// As [`Sampler::pick`], but only a token whose bit is set in `allowed`: bit `id % 32` of word
    /// `id / 32`. A token beyond the words is not allowed.
    ///
    /// # Errors
    /// As [`Sampler::pick`]; nothing that is allowed has a finite logit.
    pub fn pick_among(&mut self, logits: &[f32], allowed: Option<&[u32]>) -> Result<TokenId> {
        let best = largest(logits)?;
        if !self.sampling.changes_logits() && allowed.is_none() {
            return Ok(self.draw(logits, best));
        }
        let mut adjusted = std::mem::take(&mut self.adjusted);
        adjusted.clear();
        adjusted.extend_from_slice(logits);
        self.penalise(&mut adjusted);
        for &(token, bias) in &self.sampling.logit_bias {
            adjusted.get_mut(token.0 as usize).into_iter().for_each(|logit| *logit += bias);
        }
        if let Some(allowed) = allowed {
            forbid(&mut adjusted, allowed);
        }
        let token = largest(&adjusted).map(|best| self.draw(&adjusted, best));
        self.adjusted = adjusted;
        token
    }

    fn penalise(&self, logits: &mut [f32]) {
        let s = &self.sampling;
        for (token, &times) in &self.seen {
            let Some(logit) = logits.get_mut(token.0 as usize) else { continue };
            *logit = match *logit > 0.0 {
                true => *logit / s.repetition_penalty,
                false => *logit * s.repetition_penalty,
            };
            if times > 0 {
                *logit -= s.presence_penalty + s.frequency_penalty * times as f32;
            }
        }
    }

    /// One draw from `logits`, the largest of which is `best`.
    fn draw(&mut self, logits: &[f32], best: Candidate) -> TokenId {
        if self.sampling.is_greedy() {
            return TokenId(best.id);
        }
        let weigh = Weigh { top: best.logit, temperature: self.sampling.temperature };
        let kept = &mut self.kept;
        match self.sampling.top_k {
            0 if self.sampling.top_p < 1.0 => nucleus(logits, &weigh, self.sampling.top_p, kept),
            0 => all(logits, kept),
            k => {
                most_probable(logits, k, kept);
                let total = kept.iter().map(|c| weigh.of(c.logit)).sum();
                cut_nucleus(kept, &weigh, self.sampling.top_p, total);
            }
        }
        let min_p = f64::from(self.sampling.min_p);
        kept.retain(|c| weigh.of(c.logit) >= min_p);
        let total: f64 = kept.iter().map(|c| weigh.of(c.logit)).sum();
        let mut left = self.random.unit() * total;
        for candidate in kept.iter() {
            left -= weigh.of(candidate.logit);
            if left < 0.0 {
                return TokenId(candidate.id);
            }
        }
        // Rounding can leave a sliver after the last candidate.
        TokenId(kept.last().map_or(best.id, |c| c.id))
    }
}

/// Logits of which the largest is found before it is asked where it lies.
const RUN: usize = 4096;
/// Logits that are passed over together if none of them is among the most probable.
const SHORT_RUN: usize = 256;

/// A token that may be drawn. The greater one is the more probable, or has the lower id.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Candidate {
    pub(crate) logit: f32,
    pub(crate) id: u32,
}

impl Ord for Candidate {
    fn cmp(&self, other: &Self) -> Ordering {
        // The sum turns -0 into 0, which total order would tell apart.
        (self.logit + 0.0).total_cmp(&(other.logit + 0.0)).then(other.id.cmp(&self.id))
    }
}

impl PartialOrd for Candidate {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Candidate {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Candidate {}

/// Unnormalised probability: the most probable token weighs 1.
struct Weigh {
    top: f32,
    temperature: f32,
}

impl Weigh {
    fn of(&self, logit: f32) -> f64 {
        (f64::from(logit - self.top) / f64::from(self.temperature)).exp()
    }
}

/// Makes every token impossible whose bit is not set.
fn forbid(logits: &mut [f32], allowed: &[u32]) {
    for (id, logit) in logits.iter_mut().enumerate() {
        let word = allowed.get(id / 32).copied().unwrap_or(0);
        if word >> (id % 32) & 1 == 0 {
            *logit = f32::NEG_INFINITY;
        }
    }
}

/// The token of the largest logit, `[vocabulary]`; the lowest id among equals.
///
/// # Errors
/// A logit is NaN or positive infinity, or none is finite.
pub fn likeliest(logits: &[f32]) -> Result<TokenId> {
    largest(logits).map(|best| TokenId(best.id))
}

/// The largest logit, the lowest id among equals.
///
/// Where it lies is looked up in one run of logits alone: a vocabulary has a quarter of a million, and a fast
/// GPU would wait for them.
fn largest(logits: &[f32]) -> Result<Candidate> {
    let mut best = Candidate { logit: f32::NEG_INFINITY, id: 0 };
    for (run, first) in logits.chunks(RUN).zip((0u32..).step_by(RUN)) {
        let (most, is_odd) = most(run);
        let named = |found: &dyn Fn(f32) -> bool| {
            let place = run.iter().position(|logit| found(*logit));
            first + place.expect("it was seen in this run") as u32
        };
        if is_odd {
            let id = named(&|logit| logit.is_nan() || logit == f32::INFINITY);
            let logit = logits[id as usize];
            return Err(Error::NotFinite(format!(
                "the logit of token {id} is {logit}; run `flash-moe verify` on the model"
            )));
        }
        if most > best.logit {
            best = Candidate { logit: most, id: named(&|logit| logit == most) };
        }
    }
    match best.logit.is_finite() {
        true => Ok(best),
        false => Err(Error::NotFinite(format!("none of {} logits is finite", logits.len()))),
    }
}

/// The largest of a run, and whether one is NaN or positive infinity. Side by side, as vectors are: what is
/// kept of a lane is as wide as a logit.
fn most(run: &[f32]) -> (f32, bool) {
    const LANES: usize = 16;
    let mut most = [f32::NEG_INFINITY; LANES];
    let mut odd = [0u32; LANES];
    let mut see = |some: &[f32]| {
        for ((most, odd), logit) in most.iter_mut().zip(&mut odd).zip(some) {
            *most = if *logit > *most { *logit } else { *most };
            *odd |= u32::from(logit.is_nan()) | u32::from(*logit == f32::INFINITY);
        }
    };
    let (whole, rest) = run.as_chunks::<LANES>();
    whole.iter().for_each(|some| see(some));
    see(rest);
    (most.into_iter().fold(f32::NEG_INFINITY, f32::max), odd.iter().any(|odd| *odd != 0))
}

fn possible(logits: &[f32]) -> impl Iterator<Item = Candidate> + '_ {
    let all = (0u32..).zip(logits).map(|(id, &logit)| Candidate { logit, id });
    all.filter(|c| c.logit != f32::NEG_INFINITY)
}

/// Every possible token, in the order of ids: without a cut the draw needs no ranking.
fn all(logits: &[f32], kept: &mut Vec<Candidate>) {
    kept.clear();
    kept.extend(possible(logits));
}

/// The `k` most probable tokens in descending order, by a heap whose root is the least of them.
pub(crate) fn most_probable(logits: &[f32], k: usize, kept: &mut Vec<Candidate>) {
    let mut heap: BinaryHeap<Reverse<Candidate>> = BinaryHeap::new();
    for (run, first) in logits.chunks(SHORT_RUN).zip((0u32..).step_by(SHORT_RUN)) {
        let least = heap.peek().filter(|_| heap.len() >= k).map(|least| least.0.logit);
        // In most runs nothing is probable enough.
        if least.is_some_and(|least| most(run).0 < least) {
            continue;
        }
        for mut candidate in possible(run) {
            candidate.id += first;
            if heap.len() < k {
                heap.push(Reverse(candidate));
            } else if let Some(mut least) = heap.peek_mut().filter(|least| candidate > least.0) {
                *least = Reverse(candidate);
            }
        }
    }
    kept.clear();
    kept.extend(heap.into_sorted_vec().into_iter().map(|Reverse(c)| c));
}

/// The nucleus of the whole vocabulary, in descending order.
///
/// Ranks a few tokens first and more only while they do not reach `top_p`: text is rarely so
/// uncertain that a thousand tokens matter.
fn nucleus(logits: &[f32], weigh: &Weigh, top_p: f32, kept: &mut Vec<Candidate>) {
    let total: f64 = possible(logits).map(|c| weigh.of(c.logit)).sum();
    let mut ranked = 64;
    loop {
        all(logits, kept);
        if ranked < kept.len() {
            kept.select_nth_unstable_by(ranked - 1, |a, b| b.cmp(a));
            kept.truncate(ranked);
        } else {
            ranked = usize::MAX;
        }
        kept.sort_unstable_by(|a, b| b.cmp(a));
        if cut_nucleus(kept, weigh, top_p, total) || ranked == usize::MAX {
            return;
        }
        ranked = ranked.saturating_mul(16);
    }
}

/// Cuts descending candidates after the one with which the sum reaches `top_p` of `total`.
/// Says whether the sum was reached.
fn cut_nucleus(kept: &mut Vec<Candidate>, weigh: &Weigh, top_p: f32, total: f64) -> bool {
    if top_p >= 1.0 {
        return true;
    }
    let mut sum = 0.0;
    for (i, candidate) in kept.iter().enumerate() {
        sum += weigh.of(candidate.logit);
        if sum >= f64::from(top_p) * total {
            kept.truncate(i + 1);
            return true;
        }
    }
    false
}

/// Steele, Lea and Flood's SplitMix64: a counter in steps of the golden ratio, mixed.
///
/// 64 bits of state suffice for one draw a token, and any seed, 0 too, starts well mixed.
struct SplitMix64(u64);

impl SplitMix64 {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// Uniform in [0, 1), in steps of 2^-53.
    fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const NEVER: f32 = f32::NEG_INFINITY;

    fn sampled() -> Sampling {
        Sampling { temperature: 1.0, seed: 7, ..Sampling::greedy() }
    }

    fn sampler(sampling: &Sampling) -> Sampler {
        Sampler::new(sampling.clone(), &[]).unwrap()
    }

    /// How often each of the tokens is drawn in `draws` draws.
    fn frequencies(sampling: &Sampling, logits: &[f32], draws: usize) -> Vec<usize> {
        let mut sampler = sampler(sampling);
        let mut counts = vec![0; logits.len()];
        for _ in 0..draws {
            counts[sampler.pick(logits).unwrap().0 as usize] += 1;
        }
        counts
    }

    /// Asserts that counts follow `expected` probabilities: Pearson's statistic below its 99.9 %
    /// point (16.27 for 3 degrees of freedom, 18.47 for 4, 20.52 for 5), impossible tokens never.
    fn assert_follows(counts: &[usize], expected: &[f64]) {
        let draws = counts.iter().sum::<usize>() as f64;
        let mut statistic = 0.0;
        for (&count, &p) in counts.iter().zip(expected) {
            if p == 0.0 {
                assert_eq!(count, 0, "{counts:?}");
            } else {
                statistic += (count as f64 - p * draws).powi(2) / (p * draws);
            }
        }
        assert!(statistic < 16.27, "{statistic}: {counts:?} for {expected:?}");
    }

    fn logs(probabilities: &[f32]) -> Vec<f32> {
        probabilities.iter().map(|p| p.ln()).collect()
    }

    #[test]
    fn the_generator_gives_the_published_sequence() {
        let mut random = SplitMix64(1_234_567);
        let got: Vec<u64> = (0..3).map(|_| random.next()).collect();
        assert_eq!(
            got,
            [6_457_827_717_110_365_317, 3_203_168_211_198_807_973, 9_817_491_932_198_370_423]
        );
    }

    #[test]
    fn greedy_takes_the_largest_logit_and_the_lower_of_equals() {
        let mut greedy = sampler(&Sampling::greedy());
        assert_eq!(greedy.pick(&[1.0, 3.0, 3.0, NEVER]).unwrap(), TokenId(1));
        assert_eq!(greedy.pick(&[-5.0, NEVER]).unwrap(), TokenId(0));
        let mut one_of_k = sampler(&Sampling { top_k: 1, ..sampled() });
        assert_eq!(one_of_k.pick(&[-1.0, -0.0, 0.0]).unwrap(), TokenId(1));
    }

    /// Logits over several runs, many of them equal, and those in the order of a sort.
    fn long() -> (Vec<f32>, Vec<u32>) {
        let count = 2 * RUN + 77;
        let logits: Vec<f32> = (0..count).map(|i| ((i * 7919) % 509) as f32 - 300.0).collect();
        let mut ids: Vec<u32> = (0..count as u32).collect();
        ids.sort_by(|a, b| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b)));
        (logits, ids)
    }

    #[test]
    fn a_long_vocabulary_is_ranked_as_by_a_sort() {
        let (mut logits, ids) = long();
        let mut kept = Vec::new();
        for k in [1, 20, 300] {
            most_probable(&logits, k, &mut kept);
            assert_eq!(kept.iter().map(|c| c.id).collect::<Vec<_>>(), ids[..k]);
        }
        assert_eq!(largest(&logits).unwrap().id, ids[0]);
        for at in [0, 5, RUN - 1, RUN, logits.len() - 1] {
            let was = std::mem::replace(&mut logits[at], 1e9);
            assert_eq!(largest(&logits).unwrap().id, at as u32);
            logits[at] = f32::NAN;
            let error = largest(&logits).unwrap_err().to_string();
            assert!(error.contains(&format!("token {at} is NaN")), "{error}");
            logits[at] = was;
        }
    }

    #[test]
    fn a_logit_that_is_not_a_number_is_an_error_and_names_the_token() {
        for (logits, expected) in [
            (vec![0.0, f32::NAN], "token 1 is NaN"),
            (vec![f32::INFINITY, 0.0], "token 0 is inf"),
            (vec![NEVER, NEVER], "none of 2 logits"),
            (vec![], "none of 0 logits"),
        ] {
            for sampling in [Sampling::greedy(), sampled()] {
                let error = sampler(&sampling).pick(&logits).unwrap_err().to_string();
                assert!(error.contains(expected), "{error}");
            }
        }
    }

    #[test]
    fn draws_follow_the_probabilities() {
        let p = [0.5, 0.3, 0.15, 0.05];
        let counts = frequencies(&sampled(), &logs(&p), 20_000);
        assert_follows(&counts, &[0.5, 0.3, 0.15, 0.05]);
    }

    #[test]
    fn temperature_flattens_and_sharpens() {
        let p = [0.64, 0.36];
        let hot = Sampling { temperature: 2.0, ..sampled() };
        assert_follows(&frequencies(&hot, &logs(&p), 20_000), &[0.8 / 1.4, 0.6 / 1.4]);
        let cold = Sampling { temperature: 0.5, ..sampled() };
        let (a, b) = (0.64f64 * 0.64, 0.36 * 0.36);
        assert_follows(&frequencies(&cold, &logs(&p), 20_000), &[a / (a + b), b / (a + b)]);
    }

    #[test]
    fn top_k_keeps_the_k_most_probable_and_the_lower_of_equals() {
        let logits = logs(&[0.1, 0.4, 0.1, 0.4]);
        let two = Sampling { top_k: 2, ..sampled() };
        assert_follows(&frequencies(&two, &logits, 10_000), &[0.0, 0.5, 0.0, 0.5]);
        let three = Sampling { top_k: 3, ..sampled() };
        assert_follows(
            &frequencies(&three, &logits, 10_000),
            &[1.0 / 9.0, 4.0 / 9.0, 0.0, 4.0 / 9.0],
        );
        let more_than_there_are = Sampling { top_k: 50, ..sampled() };
        assert_follows(&frequencies(&more_than_there_are, &logits, 10_000), &[0.1, 0.4, 0.1, 0.4]);
    }

    #[test]
    fn top_p_keeps_the_token_that_crosses_the_sum() {
        let logits = logs(&[0.15, 0.5, 0.05, 0.3]);
        let nucleus = Sampling { top_p: 0.6, ..sampled() };
        assert_follows(&frequencies(&nucleus, &logits, 10_000), &[0.0, 0.625, 0.0, 0.375]);
        let tiny = Sampling { top_p: 1e-6, ..sampled() };
        assert_eq!(frequencies(&tiny, &logits, 100), [0, 100, 0, 0]);
    }

    #[test]
    fn top_p_counts_what_top_k_kept() {
        // Of the two kept, the first alone has 5/8 of the probability.
        let both = Sampling { top_k: 2, top_p: 0.62, ..sampled() };
        assert_eq!(frequencies(&both, &logs(&[0.15, 0.5, 0.05, 0.3]), 100), [0, 100, 0, 0]);
    }

    #[test]
    fn min_p_is_relative_to_the_most_probable() {
        let logits = logs(&[0.5, 0.3, 0.15, 0.05]);
        let sampling = Sampling { min_p: 0.25, ..sampled() };
        let counts = frequencies(&sampling, &logits, 10_000);
        assert_follows(&counts, &[0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0.0]);
    }

    #[test]
    fn the_repetition_penalty_covers_prompt_and_output_the_others_the_output() {
        let logits = [2.0, -2.0, 0.5, 1.5];
        let pick = |sampling: Sampling, prompt: &[u32], output: &[u32]| {
            let prompt: Vec<TokenId> = prompt.iter().copied().map(TokenId).collect();
            let mut sampler = Sampler::new(sampling, &prompt).unwrap();
            output.iter().for_each(|&t| sampler.accept(TokenId(t)));
            sampler.pick(&logits).unwrap().0
        };
        let repetition = Sampling { repetition_penalty: 2.0, ..Sampling::greedy() };
        assert_eq!(pick(repetition.clone(), &[0], &[]), 3);
        assert_eq!(pick(repetition, &[], &[0]), 3);
        let presence = Sampling { presence_penalty: 0.6, ..Sampling::greedy() };
        assert_eq!(pick(presence.clone(), &[0], &[]), 0);
        assert_eq!(pick(presence.clone(), &[], &[0]), 3);
        assert_eq!(pick(presence, &[], &[0, 0, 0, 3]), 0);
        let frequency = Sampling { frequency_penalty: 0.4, ..Sampling::greedy() };
        assert_eq!(pick(frequency.clone(), &[], &[0]), 0);
        assert_eq!(pick(frequency, &[], &[0, 0, 0, 3]), 3);
    }

    #[test]
    fn a_penalty_beyond_the_vocabulary_changes_nothing() {
        let sampling = Sampling { repetition_penalty: 2.0, ..Sampling::greedy() };
        let mut sampler = Sampler::new(sampling, &[TokenId(99)]).unwrap();
        assert_eq!(sampler.pick(&[0.0, 1.0]).unwrap(), TokenId(1));
    }

    #[test]
    fn a_bias_is_added_after_the_penalties() {
        let pick = |bias: &[(u32, f32)]| {
            let logit_bias = bias.iter().map(|&(id, bias)| (TokenId(id), bias)).collect();
            let sampling = Sampling { logit_bias, presence_penalty: 1.0, ..Sampling::greedy() };
            let mut sampler = Sampler::new(sampling, &[]).unwrap();
            sampler.accept(TokenId(1));
            sampler.pick(&[0.0, 1.5, 0.25]).unwrap().0
        };
        assert_eq!(pick(&[]), 1);
        assert_eq!(pick(&[(0, 0.75)]), 0);
        assert_eq!(pick(&[(1, -100.0), (99, 100.0)]), 2);
    }

    #[test]
    fn only_what_the_mask_allows_is_picked() {
        let mut greedy = sampler(&Sampling::greedy());
        let logits: Vec<f32> = (0..40u8).map(f32::from).collect();
        assert_eq!(greedy.pick_among(&logits, Some(&[1 << 3 | 1 << 31])).unwrap(), TokenId(31));
        assert_eq!(greedy.pick_among(&logits, Some(&[0, 1 << 5])).unwrap(), TokenId(37));
        assert_eq!(greedy.pick_among(&logits, None).unwrap(), TokenId(39));
        let error = greedy.pick_among(&logits, Some(&[0, 0])).unwrap_err().to_string();
        assert!(error.contains("none of 40 logits"), "{error}");
    }

    #[test]
    fn one_seed_one_text_another_seed_another() {
        let logits = logs(&[0.25; 4]);
        let text = |seed| {
            let mut sampler = sampler(&Sampling { seed, ..sampled() });
            (0..32).map(|_| sampler.pick(&logits).unwrap().0).collect::<Vec<_>>()
        };
        assert_eq!(text(1), text(1));
        assert_ne!(text(1), text(2));
    }

    #[test]
    fn settings_outside_their_range_are_named() {
        let greedy = Sampling::greedy;
        for (sampling, expected) in [
            (Sampling { temperature: -0.1, ..greedy() }, "temperature is -0.1"),
            (Sampling { temperature: f32::NAN, ..greedy() }, "temperature is NaN"),
            (Sampling { top_p: 0.0, ..greedy() }, "top_p is 0"),
            (Sampling { top_p: 1.1, ..greedy() }, "top_p is 1.1"),
            (Sampling { min_p: 2.0, ..greedy() }, "min_p is 2, expected 0 to 1"),
            (Sampling { repetition_penalty: 0.0, ..greedy() }, "repetition_penalty is 0"),
            (Sampling { presence_penalty: f32::INFINITY, ..greedy() }, "presence_penalty is inf"),
            (Sampling { frequency_penalty: -101.0, ..greedy() }, "frequency_penalty is -101"),
            (
                Sampling { logit_bias: vec![(TokenId(3), 101.0)], ..greedy() },
                "logit_bias of token 3 is 101",
            ),
        ] {
            let Err(error) = Sampler::new(sampling, &[]) else { panic!("accepted: {expected}") };
            assert!(error.to_string().contains(expected), "{error}");
        }
    }

    proptest! {
        #[test]
        fn the_cuts_keep_what_a_full_sort_keeps(
            logits in prop::collection::vec(-4i8..4, 1..300),
            k in 1usize..40,
            top_p in 0.01f32..0.99,
        ) {
            let logits: Vec<f32> = logits.into_iter().map(f32::from).collect();
            let mut sorted: Vec<Candidate> = possible(&logits).collect();
            sorted.sort_by(|a, b| b.cmp(a));
            let mut kept = Vec::new();
            most_probable(&logits, k, &mut kept);
            prop_assert_eq!(&kept[..], &sorted[..k.min(sorted.len())]);

            let weigh = Weigh { top: sorted[0].logit, temperature: 1.0 };
            nucleus(&logits, &weigh, top_p, &mut kept);
            let total: f64 = possible(&logits).map(|c| weigh.of(c.logit)).sum();
            cut_nucleus(&mut sorted, &weigh, top_p, total);
            prop_assert_eq!(kept, sorted);
        }
    }
}
