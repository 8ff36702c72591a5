//! An answer put together from its events, for clients that want it whole.
//!
//! A call that broke off is no call: its text joins the content.

use std::hash::{BuildHasher, RandomState};

use flash_moe_engine::reply::Part;
use serde_json::{Value as Json, json};
use tokio::sync::mpsc::UnboundedReceiver;

use super::super::schedule::{Event, Failure, Finish, Outcome, TokenLogprobs, Usage};
use super::refusal::Refusal;

/// A whole answer.
#[derive(Clone, Debug)]
pub struct Message {
    /// Thinking.
    pub thinking: String,
    /// Answer.
    pub content: String,
    /// Whole calls.
    pub calls: Vec<Call>,
    /// Probabilities, where asked for.
    pub logprobs: Vec<TokenLogprobs>,
    /// How it ended.
    pub outcome: Outcome,
}

/// A call of a tool.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Call {
    /// Name of the tool.
    pub name: String,
    /// A JSON object.
    pub arguments: String,
}

/// The answer so far.
#[derive(Default)]
struct Draft {
    thinking: String,
    content: String,
    calls: Vec<Call>,
    logprobs: Vec<TokenLogprobs>,
    outcome: Option<Outcome>,
}

impl Draft {
    fn take(&mut self, part: Part) {
        match part {
            Part::Thinking(text) => self.thinking.push_str(&text),
            Part::Content(text) => self.content.push_str(&text),
            Part::CallBegins(name) => self.calls.push(Call { name, arguments: String::new() }),
            Part::Arguments(text) => {
                self.calls.last_mut().into_iter().for_each(|call| call.arguments.push_str(&text));
            }
            Part::CallEnds => {}
            Part::Broken(text) => {
                self.calls.pop();
                self.content.push_str(&text);
            }
        }
    }
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
                parts.into_iter().for_each(|part| draft.take(part));
                draft.logprobs.extend(logprobs);
            }
            Event::Done(outcome) => draft.outcome = Some(outcome),
            Event::Failed(failure) => return Err(failure),
        }
    }
    let message = |draft: Draft| {
        let outcome = draft.outcome.ok_or(Failure::Shutdown)?;
        let Draft { thinking, content, calls, logprobs, .. } = draft;
        Ok(Message { thinking, content, calls, logprobs, outcome })
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

/// Tokens of several texts of one prompt.
pub fn total(usages: impl IntoIterator<Item = Usage>) -> Usage {
    usages.into_iter().fold(Usage::default(), |sum, usage| Usage {
        prompt: usage.prompt,
        cached: sum.cached.max(usage.cached),
        generated: sum.generated + usage.generated,
        thinking: sum.thinking + usage.thinking,
    })
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
