//! An answer put together from its events, for clients that want it whole.
//!
//! Also what all interfaces tell alike: how it ended, and the tokens it took.

use std::hash::{BuildHasher, RandomState};

use serde_json::{Value as Json, json};
use tokio::sync::mpsc::UnboundedReceiver;

use super::super::schedule::{Event, Failure, Finish, Outcome, TokenLogprobs, Usage};
use super::super::turns::Said;
use super::refusal::Refusal;

/// A whole answer.
#[derive(Clone, Debug)]
pub struct Message {
    /// What it says.
    pub said: Said,
    /// Probabilities, where asked for.
    pub logprobs: Vec<TokenLogprobs>,
    /// How it ended.
    pub outcome: Outcome,
}

/// The answer so far.
#[derive(Default)]
struct Draft {
    said: Said,
    logprobs: Vec<TokenLogprobs>,
    outcome: Option<Outcome>,
}

/// Waits for all of `choices` answers.
///
/// # Errors
/// One of them failed.
pub async fn whole(
    mut events: UnboundedReceiver<(usize, Event)>,
    choices: usize,
) -> Result<Vec<Message>, Failure> {
    let mut drafts: Vec<Draft> = (0..choices).map(|_| Draft::default()).collect();
    while let Some((index, event)) = events.recv().await {
        let draft = &mut drafts[index];
        match event {
            Event::Started(_) | Event::Prefilled(_) => {}
            Event::Token { parts, logprobs } => {
                parts.into_iter().for_each(|part| draft.said.take(part));
                draft.logprobs.extend(logprobs);
            }
            Event::Done(outcome) => draft.outcome = Some(outcome),
            Event::Failed(failure) => return Err(failure),
        }
    }
    let message = |draft: Draft| {
        let outcome = draft.outcome.ok_or(Failure::Shutdown)?;
        Ok(Message { said: draft.said, logprobs: draft.logprobs, outcome })
    };
    drafts.into_iter().map(message).collect()
}

impl From<Failure> for Refusal {
    fn from(failure: Failure) -> Self {
        let status = match failure {
            Failure::Engine(_) => 500,
            Failure::Timeout => 504,
            Failure::Shutdown => 503,
        };
        Self::new(status, failure.message())
    }
}

/// Tokens of several texts of one prompt, which was computed once for all of them: what the first one
/// to have its turn did not find was not there.
pub fn total(usages: impl IntoIterator<Item = Usage>) -> Usage {
    let sum = |sum: Usage, usage: Usage| Usage {
        prompt: usage.prompt,
        cached: sum.cached.min(usage.cached),
        generated: sum.generated + usage.generated,
        thinking: sum.thinking + usage.thinking,
    };
    usages.into_iter().reduce(sum).unwrap_or(Usage::default())
}

/// Tokens as the older of OpenAI's interfaces count them.
pub fn usage_json(usage: Usage) -> Json {
    json!({
        "prompt_tokens": usage.prompt,
        "completion_tokens": usage.generated,
        "total_tokens": usage.prompt + usage.generated,
        "prompt_tokens_details": { "cached_tokens": usage.cached },
        "completion_tokens_details": { "reasoning_tokens": usage.thinking },
    })
}

/// The finish reason of OpenAI's interfaces.
pub fn finish_reason(outcome: &Outcome) -> &'static str {
    match (&outcome.finish, outcome.calls) {
        (Finish::Length, _) => "length",
        (_, 0) => "stop",
        _ => "tool_calls",
    }
}

/// An id that no other answer of any server has.
pub fn new_id(prefix: &str) -> String {
    let half = || RandomState::new().hash_one(std::time::Instant::now());
    format!("{prefix}{:016x}{:08x}", half(), half() as u32)
}
