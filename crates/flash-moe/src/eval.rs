//! `flash-moe eval`: how well a model predicts a text, alone or against a reference.
//!
//! The text is cut into windows of N tokens that do not overlap. Every window starts from nothing;
//! its first token has nothing before it and is not scored. Perplexity is e to the mean negative
//! log-likelihood of the scored tokens, bits a byte the sum of it in bits over the bytes of those
//! tokens. With a reference, both models take the same tokens a few at a time side by side, so that
//! no more than a few rows of logits are held: KL(reference || model) in nats is averaged over all
//! positions that predict a scored token.

use std::io::{self, Write};
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use flash_moe_engine::engine::Engine;
use flash_moe_engine::machine;
use flash_moe_engine::session::Session;
use flash_moe_engine::shape::TokenId;
use flash_moe_engine::tokenizer::Tokenizer;
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

use crate::options::engine::{EngineArgs, Model};
use crate::options::environment;
use crate::options::eval::EvalArgs;
use crate::say::tell;

/// Tokens in a window when none are asked for.
const WINDOW_DEFAULT: usize = 512;
/// Positions whose logits are held at once when two models are compared.
const PIECE: usize = 32;

/// What was measured.
#[derive(Debug, Serialize)]
struct Measured {
    /// Name of the model.
    model: String,
    /// Tokens of the text that were taken.
    tokens: usize,
    /// Tokens in a window.
    window: usize,
    /// Tokens that were scored.
    scored: usize,
    /// e to the mean negative log-likelihood.
    perplexity: f64,
    /// Negative log-likelihood in bits over the bytes of the scored tokens.
    bits_per_byte: f64,
    /// The comparison, with `--against`.
    #[serde(flatten)]
    against: Option<Compared>,
    /// Wall time of the scoring.
    seconds: f64,
    /// What made the result differ from the model's own, in words.
    lossy: Vec<String>,
}

/// How the model differs from the reference.
#[derive(Debug, Serialize)]
struct Compared {
    /// Name of the reference.
    reference: String,
    /// Perplexity of the reference.
    reference_perplexity: f64,
    /// Mean of KL(reference || model), in nats.
    kl_mean_nats: f64,
    /// The largest of any position.
    kl_max_nats: f64,
    /// Share of positions at which both find the same token most probable.
    top1_agreement: f64,
}

/// Sums over positions.
#[derive(Default)]
struct Sums {
    scored: usize,
    bytes: usize,
    nll: f64,
    reference_nll: f64,
    kl: f64,
    kl_max: f64,
    agreed: usize,
}

/// Runs the command.
///
/// # Errors
/// Whatever the flags, the text, the models or the engine have to say.
pub fn run(args: &EvalArgs) -> Result<()> {
    let model = args.engine.open()?;
    let reference = args.against.as_deref().map(|dir| open_reference(args, dir)).transpose()?;
    let mut tokens = tokens_of(&args.text, &model)?;
    if let Some(reference) = &reference {
        ensure!(
            tokens_of(&args.text, reference)? == tokens,
            "the two models cut the text into different tokens: they cannot be compared"
        );
    }
    tokens.truncate(args.limit.unwrap_or(usize::MAX));
    ensure!(tokens.len() >= 2, "the text has {} tokens; at least 2 are needed", tokens.len());

    let window = args.context.unwrap_or(WINDOW_DEFAULT.min(model.container.shape().max_positions));
    ensure!(window >= 2, "a window of {window} token has nothing to score; --context 2 or more");
    let lossy = args.engine.lossy(&model.container);
    for what in &lossy {
        tell!("flash-moe: note: lossy: {what}");
    }
    let bytes: Vec<usize> = token_bytes(&model, &tokens);
    let memory = memory_of_each(args, reference.is_some());
    let engine = open_engine(&args.engine, model, window, memory)?;
    let plain = args.engine.with_plain_kv_cache();
    let reference = reference.map(|r| open_engine(&plain, r, window, memory)).transpose()?;
    let hot_set = args.hot_set.file(engine.container());
    hot_set.iter().for_each(|file| file.load(&engine));

    let started = Instant::now();
    let bar = progress(args, tokens.len());
    let mut sums = Sums::default();
    for (window, bytes) in tokens.chunks(window).zip(bytes.chunks(window)) {
        sums.bytes += bytes[1..].iter().sum::<usize>();
        match &reference {
            Some(reference) => compare(reference, &engine, window, &mut sums)?,
            None => score(&engine, window, &mut sums)?,
        }
        bar.inc(window.len() as u64);
    }
    bar.finish_and_clear();
    hot_set.iter().for_each(|file| file.save(&engine));
    let against = reference.map(|r| sums.compared(r.container().manifest().name.clone()));
    tell(
        args,
        &Measured {
            model: engine.container().manifest().name.clone(),
            tokens: tokens.len(),
            window,
            scored: sums.scored,
            perplexity: (sums.nll / sums.scored as f64).exp(),
            bits_per_byte: sums.nll / std::f64::consts::LN_2 / sums.bytes.max(1) as f64,
            against,
            seconds: started.elapsed().as_secs_f64(),
            lossy,
        },
    )
}

fn open_reference(args: &EvalArgs, dir: &Path) -> Result<Model> {
    let engine = EngineArgs { model: Some(dir.into()), ..args.engine.clone() };
    engine.open()
}

fn tokens_of(path: &Path, model: &Model) -> Result<Vec<TokenId>> {
    let Some(tokenizer) = &model.tokenizer else {
        bail!("{} has no tokenizer.json", model.container.dir().display());
    };
    let named = || path.display().to_string();
    let bytes = std::fs::read(path).with_context(named)?;
    let text = std::str::from_utf8(&bytes)
        .with_context(|| format!("{}: not UTF-8 text", path.display()))?;
    Ok(tokenizer.encode(text)?)
}

/// Bytes of text that each token stands for.
fn token_bytes(model: &Model, tokens: &[TokenId]) -> Vec<usize> {
    let bytes =
        |&token: &TokenId| model.tokenizer.as_ref().map_or(0, |t: &Tokenizer| t.byte_count(token));
    tokens.iter().map(bytes).collect()
}

/// Each of two models gets half of the memory; one model the engine's own default.
fn memory_of_each(args: &EvalArgs, two: bool) -> Option<u64> {
    match two {
        true => {
            let free = || machine::available_memory().map(|bytes| bytes / 10 * 9);
            args.engine.memory.or_else(free).map(|bytes| bytes / 2)
        }
        false => args.engine.memory,
    }
}

fn open_engine(
    args: &EngineArgs,
    model: Model,
    window: usize,
    memory: Option<u64>,
) -> Result<Arc<Engine>> {
    let mut options = args.engine_options(&model, Some(window))?;
    options.memory_bytes = memory;
    Ok(Arc::new(Engine::open(model.container, &options)?))
}

/// Adds the negative log-likelihood of a window's tokens.
fn score(engine: &Arc<Engine>, window: &[TokenId], sums: &mut Sums) -> Result<()> {
    let mut session = Session::new(engine);
    // The last token predicts one that is not in the window.
    let scored = &window[..window.len() - 1];
    if scored.is_empty() {
        return Ok(());
    }
    session.score(scored, &mut |position, logits| {
        sums.nll -= LogSoftmax::of(logits).at(window[position + 1]);
        sums.scored += 1;
    })?;
    Ok(())
}

/// Adds what a window says of both models and of their difference.
fn compare(
    reference: &Arc<Engine>,
    engine: &Arc<Engine>,
    window: &[TokenId],
    sums: &mut Sums,
) -> Result<()> {
    let (mut theirs, mut ours) = (Session::new(reference), Session::new(engine));
    let scored = &window[..window.len() - 1];
    let mut held: Vec<Vec<f32>> = Vec::new();
    for (piece, start) in scored.chunks(PIECE).zip((0..).step_by(PIECE)) {
        held.clear();
        theirs.score(piece, &mut |_, logits| held.push(logits.to_vec()))?;
        ours.score(piece, &mut |position, logits| {
            sums.add(&held[position - start], logits, window[position + 1]);
        })?;
    }
    Ok(())
}

impl Sums {
    /// One position: logits of the reference and of the model, and the token that follows.
    fn add(&mut self, reference: &[f32], model: &[f32], next: TokenId) {
        let (p, q) = (LogSoftmax::of(reference), LogSoftmax::of(model));
        self.scored += 1;
        self.nll -= q.at(next);
        self.reference_nll -= p.at(next);
        let kl = p.divergence(&q);
        self.kl += kl;
        self.kl_max = self.kl_max.max(kl);
        self.agreed += usize::from(p.best() == q.best());
    }

    fn compared(&self, reference: String) -> Compared {
        let scored = self.scored as f64;
        Compared {
            reference,
            reference_perplexity: (self.reference_nll / scored).exp(),
            kl_mean_nats: self.kl / scored,
            kl_max_nats: self.kl_max,
            top1_agreement: self.agreed as f64 / scored,
        }
    }
}

/// Log-probabilities of one row of logits.
struct LogSoftmax<'a> {
    logits: &'a [f32],
    log_sum: f64,
}

impl<'a> LogSoftmax<'a> {
    fn of(logits: &'a [f32]) -> Self {
        let top = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
        let sum: f64 = logits.iter().map(|&logit| (f64::from(logit) - top).exp()).sum();
        Self { logits, log_sum: top + sum.ln() }
    }

    fn at(&self, token: TokenId) -> f64 {
        f64::from(self.logits[token.0 as usize]) - self.log_sum
    }

    /// KL(self || other), in nats; rounding below zero is zero.
    fn divergence(&self, other: &Self) -> f64 {
        let rows = self.logits.iter().zip(other.logits);
        let terms = rows.filter(|(p, _)| **p != f32::NEG_INFINITY).map(|(&p, &q)| {
            let (p, q) = (f64::from(p) - self.log_sum, f64::from(q) - other.log_sum);
            p.exp() * (p - q)
        });
        terms.sum::<f64>().max(0.0)
    }

    /// The most probable token, the lowest id among equals.
    fn best(&self) -> usize {
        let (mut best, mut top) = (0, f32::NEG_INFINITY);
        for (id, &logit) in self.logits.iter().enumerate() {
            if logit > top {
                (best, top) = (id, logit);
            }
        }
        best
    }
}

fn tell(args: &EvalArgs, measured: &Measured) -> Result<()> {
    let mut out = io::stdout().lock();
    if args.json {
        serde_json::to_writer_pretty(&mut out, measured).map_err(io::Error::from)?;
        writeln!(out)?;
        return Ok(());
    }
    let m = measured;
    writeln!(
        out,
        "{}: {} tokens in windows of {}, {} scored",
        m.model, m.tokens, m.window, m.scored
    )?;
    writeln!(out, "perplexity     {:.4}", m.perplexity)?;
    writeln!(out, "bits per byte  {:.4}", m.bits_per_byte)?;
    if let Some(c) = &m.against {
        writeln!(out, "against {}, perplexity {:.4}", c.reference, c.reference_perplexity)?;
        writeln!(out, "KL mean        {:.6} nats", c.kl_mean_nats)?;
        writeln!(out, "KL max         {:.6} nats", c.kl_max_nats)?;
        writeln!(out, "same top token {:.2} %", c.top1_agreement * 100.0)?;
    }
    Ok(())
}

fn progress(args: &EvalArgs, tokens: usize) -> ProgressBar {
    if args.quiet || !environment::errors_are_seen() {
        return ProgressBar::hidden();
    }
    let style = "scoring {bar:30} {pos}/{len} tokens, {per_sec}, {eta} left";
    let style = ProgressStyle::with_template(style).expect("a constant template");
    ProgressBar::new(tokens as u64).with_style(style)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn log_probabilities_and_divergence_are_the_textbook_s() {
        let p: Vec<f32> = [0.5f32, 0.25, 0.25].iter().map(|p| p.ln() + 3.0).collect();
        let q: Vec<f32> = [0.25f32, 0.25, 0.5].iter().map(|p| p.ln() - 7.0).collect();
        let (p, q) = (LogSoftmax::of(&p), LogSoftmax::of(&q));
        assert!((p.at(TokenId(1)) - 0.25f64.ln()).abs() < 1e-6);
        let expected = 0.5 * 2f64.ln() + 0.25 * 0.5f64.ln();
        assert!((p.divergence(&q) - expected).abs() < 1e-6);
        assert_eq!(p.divergence(&p), 0.0);
        assert_eq!((p.best(), q.best()), (0, 2));
    }

    #[test]
    fn masked_rows_weigh_nothing() {
        let p = [0.0, 0.0, f32::NEG_INFINITY];
        let p = LogSoftmax::of(&p);
        assert!((p.at(TokenId(0)) - 0.5f64.ln()).abs() < 1e-12);
        assert_eq!(p.divergence(&p), 0.0);
    }

    #[test]
    fn sums_average_over_positions() {
        let mut sums = Sums::default();
        let even = [0.0f32, 0.0];
        let sure = [0.0f32, f32::NEG_INFINITY];
        sums.add(&even, &even, TokenId(1));
        sums.add(&sure, &even, TokenId(0));
        let compared = sums.compared("r".into());
        assert_eq!(compared.top1_agreement, 1.0);
        assert!((compared.kl_mean_nats - 2f64.ln() / 2.0).abs() < 1e-12);
        assert!((compared.kl_max_nats - 2f64.ln()).abs() < 1e-12);
        assert!((compared.reference_perplexity - 2f64.sqrt()).abs() < 1e-12);
        assert!((sums.nll / 2.0 - 2f64.ln()).abs() < 1e-12);
    }
}
