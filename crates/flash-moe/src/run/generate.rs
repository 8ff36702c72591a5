//! The loop that makes a text: pick a token, show it, take it, until something ends it.
//!
//! Knows nothing of files, flags or terminals; it is the same loop for every front end of `run`.

use std::io::Write;
use std::ops::ControlFlow;

use anyhow::{Context, Result};
use flash_moe_engine::sampler::Sampler;
use flash_moe_engine::session::{Prefilled, Session};
use flash_moe_engine::shape::TokenId;
use serde::Serialize;

use super::answer::Answer;
use super::interrupt::Interrupt;
use super::thinking::Thinking;

/// Why a text ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Finish {
    /// An end-of-text token or a stop text.
    Stop,
    /// The most tokens that were allowed, or the context is full.
    Length,
    /// Ctrl-C.
    Interrupted,
}

/// Where a text ends.
pub struct Limits<'a> {
    /// Tokens that end it; empty when they are to be ignored.
    pub eos: &'a [TokenId],
    /// Most tokens to generate, at least 1.
    pub max_tokens: usize,
    /// Asked before every token.
    pub interrupt: &'a Interrupt,
}

/// Takes the prompt; says whether it was taken whole.
///
/// # Errors
/// See [`Session::prefill`].
pub fn prefill(
    session: &mut Session,
    prompt: &[TokenId],
    interrupt: &Interrupt,
    mut progress: impl FnMut(usize),
) -> Result<bool> {
    if prompt.is_empty() {
        return Ok(true);
    }
    let taken = session.prefill(prompt, &mut |done| {
        progress(done);
        if interrupt.is_pressed() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    })?;
    Ok(taken == Prefilled::Done)
}

/// Generates after a prompt, into `answer`; `first` is called when the first token is known.
///
/// An end-of-text token ends the text and is not part of the tokens that are returned. The last
/// token is shown but not taken by the session: nothing follows it.
///
/// # Errors
/// See [`Session::step`] and [`Sampler::pick`]; writing failed.
pub fn generate<W: Write>(
    session: &mut Session,
    sampler: &mut Sampler,
    thinking: &mut Thinking,
    answer: &mut Answer<W>,
    limits: &Limits,
    mut first: impl FnMut(),
) -> Result<(Vec<TokenId>, Finish)> {
    let mut tokens = Vec::new();
    loop {
        if limits.interrupt.is_pressed() {
            return Ok((tokens, Finish::Interrupted));
        }
        let token = match thinking.forced() {
            Some(token) => token,
            None => sampler.pick(session.logits())?,
        };
        if tokens.is_empty() {
            first();
        }
        if limits.eos.contains(&token) {
            return Ok((tokens, Finish::Stop));
        }
        sampler.accept(token);
        tokens.push(token);
        answer.push(token, thinking.follow(token)).context("standard output")?;
        if answer.is_stopped() {
            return Ok((tokens, Finish::Stop));
        }
        let is_full = session.position() == session.engine().context();
        if tokens.len() == limits.max_tokens || is_full {
            return Ok((tokens, Finish::Length));
        }
        session.step(token)?;
    }
}
