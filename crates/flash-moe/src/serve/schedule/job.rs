//! One text to generate, and what is told of it while it comes.
//!
//! A job owns everything its text depends on, so the order in which jobs take turns cannot change
//! it. It is cancelled by dropping the receiver of its events: that is looked at before every step.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use flash_moe_engine::logprobs::Logprobs;
use flash_moe_engine::reply::{Part, Start, Tools};
use flash_moe_engine::sampler::Sampling;
use flash_moe_engine::shape::TokenId;
use tokio::sync::mpsc::UnboundedSender;

use super::super::constrain::Constraint;
use super::super::prefix::Mark;
use super::super::turns::Before;
use super::live::Step;

/// A text to generate.
pub struct Job {
    /// Tokens before it; at least one.
    pub prompt: Vec<TokenId>,
    /// Where in it checkpoints are kept, in order.
    pub marks: Vec<Mark>,
    /// Where in a conversation it stands; `None`: it continues a text.
    pub before: Option<Before>,
    /// Choice of tokens.
    pub sampling: Sampling,
    /// Where it ends.
    pub limits: Limits,
    /// How it is taken apart.
    pub format: Format,
    /// What it must look like.
    pub constraint: Option<Constraint>,
    /// Most probable tokens to tell beside each one; `None` tells no probabilities at all.
    pub logprobs: Option<usize>,
    /// Which of the texts of its request it is.
    pub index: usize,
    /// Whom to tell.
    pub events: UnboundedSender<(usize, Event)>,
    /// Its request, for the log.
    pub origin: Origin,
}

impl Job {
    /// Tells whoever listens; one who does not listen any more is noticed at the next step.
    pub fn tell(&self, event: Event) {
        self.events.send((self.index, event)).unwrap_or(());
    }

    /// Why it is not to go on, if it is not.
    pub fn is_over(&self) -> Option<Step> {
        if self.events.is_closed() {
            return Some(Step::Abandoned);
        }
        let late = self.limits.deadline.is_some_and(|deadline| Instant::now() >= deadline);
        late.then_some(Step::Failed(Failure::Timeout))
    }
}

/// Where a text ends.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Most tokens, at least 1; `None`: what the context holds.
    pub max_tokens: Option<usize>,
    /// Tokens after which thinking is ended; 0: never.
    pub think_budget: usize,
    /// When the request is given up.
    pub deadline: Option<Instant>,
    /// Ends it at the next token, as if the model had, or before the next layer of a chunk of its prompt.
    pub stop: Option<Arc<AtomicBool>>,
}

/// How a text is taken apart.
#[derive(Clone, Debug)]
pub struct Format {
    /// Where it begins.
    pub start: Start,
    /// Texts that end it.
    pub stops: Vec<String>,
    /// Tools that it may call.
    pub tools: Option<Tools>,
}

/// The request that a job belongs to.
#[derive(Clone, Debug)]
pub struct Origin {
    /// Its id; empty where no client sent it, and then nothing is logged of it.
    pub request: String,
    /// The name of the interface it came through.
    pub api: &'static str,
    /// The client's own name for the conversation.
    pub session: Option<String>,
    /// When it was received.
    pub received: Instant,
}

/// What is told of a text, in this order.
#[derive(Clone, Debug)]
pub enum Event {
    /// It has its turn.
    Started(Usage),
    /// So many tokens of the prompt are done.
    Prefilled(usize),
    /// A token, and what it settled.
    Token {
        /// Pieces of the text, possibly none.
        parts: Vec<Part>,
        /// Its probability, where asked for; of tokens outside the thinking.
        logprobs: Option<TokenLogprobs>,
    },
    /// It is over.
    Done(Outcome),
    /// It could not be finished.
    Failed(Failure),
}

/// A token's probability and its rivals'.
#[derive(Clone, Debug)]
pub struct TokenLogprobs {
    /// The token.
    pub token: TokenId,
    /// Its log-probability and the most probable ones.
    pub logprobs: Logprobs,
}

/// Tokens of a request.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct Usage {
    /// Of the prompt.
    pub prompt: usize,
    /// Of those, not computed again.
    pub cached: usize,
    /// Generated.
    pub generated: usize,
    /// Of those, thinking.
    pub thinking: usize,
}

/// How a text ended.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Outcome {
    /// Why.
    pub finish: Finish,
    /// Whole tool calls in it.
    pub calls: usize,
    /// Tokens.
    pub usage: Usage,
    /// Wall times.
    pub times: Times,
}

/// Wall times of a text.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct Times {
    /// From the request to its turn.
    pub queued: Duration,
    /// From its turn to the end of the prompt.
    pub prefill: Duration,
    /// From the request to the first token.
    pub first_token: Duration,
    /// From the first token to the last.
    pub decode: Duration,
}

/// Why a text ended.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Finish {
    /// The model ended it, or what it must look like is whole.
    Stop,
    /// This stop text.
    StopText(String),
    /// As many calls as were allowed.
    Calls,
    /// The most tokens, or the context is full.
    Length,
    /// Whoever asked for it stopped it.
    Stopped,
}

/// Why a text could not be finished.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Failure {
    /// The engine's words.
    Engine(String),
    /// Its deadline has passed.
    Timeout,
    /// The server is going down.
    Shutdown,
}

impl Limits {
    /// Whether it is to end.
    pub fn is_stopped(&self) -> bool {
        self.stop.as_ref().is_some_and(|stop| stop.load(Ordering::Relaxed))
    }
}

impl Finish {
    /// Its name in the log.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::StopText(_) => "stop_text",
            Self::Calls => "calls",
            Self::Length => "length",
            Self::Stopped => "stopped",
        }
    }
}

impl Failure {
    /// What to tell the client.
    pub fn message(&self) -> String {
        match self {
            Self::Engine(what) => what.clone(),
            Self::Timeout => "the request took longer than --request-timeout allows".into(),
            Self::Shutdown => "the server is shutting down".into(),
        }
    }
}
