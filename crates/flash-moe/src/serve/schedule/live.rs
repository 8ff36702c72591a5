//! A job that has its turn: a session, a sampler and the reply so far, moved on by one step at a time.
//!
//! A step is one chunk of the prompt or one token. A token that a job has chosen is taken with those of
//! the others, before its next step ([`Live::chosen`]). Between steps nothing is half done, so a job
//! may be dropped after any of them. One that is stopped in a chunk of its prompt keeps nothing of it.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::{Duration, Instant};

use flash_moe_engine::engine::Engine;
use flash_moe_engine::logprobs::logprobs;
use flash_moe_engine::reply::{Ended, Part, Reply};
use flash_moe_engine::sampler::Sampler;
use flash_moe_engine::session::{Checkpoint, Session};
use flash_moe_engine::shape::TokenId;
use flash_moe_engine::tokenizer::{TokenStream, Tokenizer};
use flash_moe_engine::{Error, Result};

use super::super::prefix::{Known, Loading, Place, PrefixStore};
use super::super::turns::{Said, Turn};
use super::job::{Event, Failure, Finish, Job, Outcome, Times, TokenLogprobs, Usage};

/// What every job needs of the model.
pub struct Vocabulary<'a> {
    /// Tokens to text.
    pub tokenizer: &'a Tokenizer,
    /// Tokens that end a text.
    pub eos: &'a [TokenId],
    /// The token that closes the thinking.
    pub think_end: Option<TokenId>,
}

/// A job under way.
pub struct Live<'a> {
    vocabulary: &'a Vocabulary<'a>,
    job: Job,
    session: Session,
    sampler: Sampler,
    reply: Reply,
    text: TokenStream<'a>,
    said: Said,
    emitted: Vec<TokenId>,
    chosen: Option<TokenId>, // not taken yet
    has_begun: bool,
    is_torn: bool, // given up in the middle of a chunk: the session is worth nothing
    loading: Option<Loading>, // what it begins with
    usage: Usage,
    times: Times,
    started: Instant,
    first_token: Option<Instant>,
    last_token: Instant,
    between: Duration, // the last two tokens
}

/// What a step came to.
pub enum Step {
    /// Another text computes what it needs, or the disk has it.
    Waits,
    /// There is more to do.
    Prefilled(usize),
    /// A token was generated.
    Generated,
    /// The text is over.
    Over(Box<Outcome>),
    /// Nobody listens any more.
    Abandoned,
    /// It could not go on.
    Failed(Failure),
}

impl<'a> Live<'a> {
    /// A job that begins now.
    ///
    /// # Errors
    /// A sampling setting outside its range.
    pub fn new(engine: &Arc<Engine>, vocabulary: &'a Vocabulary<'a>, job: Job) -> Result<Self> {
        let sampler = Sampler::new(job.sampling.clone(), &job.prompt)?;
        let format = job.format.clone();
        let mut session = Session::new(engine);
        job.limits.stop.iter().for_each(|stop| session.give_up_on(Arc::clone(stop)));
        let usage = Usage { prompt: job.prompt.len(), ..Usage::default() };
        Ok(Self {
            vocabulary,
            session,
            sampler,
            reply: Reply::new(format.start, format.stops, format.tools),
            text: vocabulary.tokenizer.stream(),
            said: Said::default(),
            emitted: Vec::new(),
            chosen: None,
            has_begun: false,
            is_torn: false,
            loading: None,
            usage,
            times: Times::default(),
            started: Instant::now(),
            first_token: None,
            last_token: Instant::now(),
            between: Duration::ZERO,
            job,
        })
    }

    /// The job.
    pub fn job(&self) -> &Job {
        &self.job
    }

    /// Tokens in its context.
    pub fn position(&self) -> usize {
        self.session.position()
    }

    /// Whether it has had a step.
    pub fn has_begun(&self) -> bool {
        self.has_begun
    }

    /// Time between the last two tokens.
    pub fn between(&self) -> Duration {
        self.between
    }

    /// Tokens so far.
    pub fn usage(&self) -> Usage {
        self.usage
    }

    /// Whether it should wait for a checkpoint that `other`, which is ahead of it, is about to keep.
    pub fn waits_for(&self, other: &Self, prefixes: &PrefixStore) -> bool {
        if self.has_begun || !prefixes.is_on() {
            return false;
        }
        let (own, theirs) = (&self.job.prompt, &other.job.prompt);
        let common = own.iter().zip(theirs).take_while(|(a, b)| a == b).count();
        let coming = other.job.marks.iter().map(|mark| mark.position);
        let best = coming.filter(|at| (other.position() + 1..=common).contains(at)).max();
        best.is_some_and(|best| best > prefixes.longest_position(own))
    }

    /// Whether it has chosen a token that its session has not taken.
    pub fn has_chosen(&self) -> bool {
        self.chosen.is_some()
    }

    /// The session, and the token that it is to take now.
    pub fn chosen(&mut self) -> Option<(&mut Session, TokenId)> {
        let token = self.chosen.take()?;
        Some((&mut self.session, token))
    }

    /// Moves on by one step; one that waits only finds out whether anybody still listens.
    pub fn step(&mut self, waits: bool, prefixes: &mut PrefixStore) -> Step {
        if let Some(step) = self.job.is_over() {
            return step;
        }
        if waits {
            return Step::Waits;
        }
        let step = match self.begin(prefixes) {
            Ok(false) => Ok(Step::Waits),
            Ok(true) if self.job.limits.is_stopped() => Ok(self.end(Finish::Stopped)),
            Ok(true) if self.session.position() < self.job.prompt.len() => self.prefill(prefixes),
            Ok(true) => self.generate(),
            Err(error) => Err(error),
        };
        let step = step.and_then(|step| self.keep_turn(step, prefixes));
        step.unwrap_or_else(|error| Step::Failed(Failure::Engine(error.to_string())))
    }

    /// At the first step: goes to the longest prefix that is kept. Whether it has begun.
    fn begin(&mut self, prefixes: &mut PrefixStore) -> Result<bool> {
        if self.has_begun {
            return Ok(true);
        }
        let Some(known) = self.known(prefixes) else { return Ok(false) };
        self.has_begun = true;
        self.times.queued = self.job.origin.received.elapsed();
        self.started = Instant::now();
        if let Some(checkpoint) = known {
            self.session.adopt(checkpoint)?;
            self.usage.cached = self.session.position();
        }
        if self.usage.cached == self.job.prompt.len() {
            self.times.prefill = self.started.elapsed();
        }
        self.job.tell(Event::Started(self.usage));
        Ok(true)
    }

    /// The longest prefix that is kept, if any; `None` while it comes from the disk.
    fn known(&mut self, prefixes: &mut PrefixStore) -> Option<Option<Checkpoint>> {
        if let Some(loading) = self.loading.take() {
            let Some(ended) = loading.ended() else {
                self.loading = Some(loading);
                return None;
            };
            if let Some(state) = ended {
                return Some(Some(prefixes.take(state)));
            }
        }
        match prefixes.longest(&self.job.prompt) {
            Known::Checkpoint(checkpoint) => Some(checkpoint),
            Known::Coming(loading) => {
                self.loading = Some(loading);
                None
            }
            Known::Awaited => None,
        }
    }

    fn prefill(&mut self, prefixes: &mut PrefixStore) -> Result<Step> {
        let before = self.session.position();
        let mark = self.job.marks.iter().find(|mark| mark.position > before);
        let mark = mark.filter(|_| prefixes.is_on()).copied();
        let end = mark.map_or(self.job.prompt.len(), |mark| mark.position);
        let part = &self.job.prompt[before..end];
        match self.session.prefill(part, &mut |_| ControlFlow::Break(())) {
            Err(Error::Stopped) => {
                self.is_torn = true;
                return Ok(self.end(Finish::Stopped));
            }
            taken => drop(taken?),
        }
        let done = self.session.position();
        if let Some(mark) = mark.filter(|mark| mark.position == done) {
            prefixes.keep(mark.place, self.session.tokens(), || self.session.checkpoint())?;
        }
        self.job.tell(Event::Prefilled(done));
        if done == self.job.prompt.len() {
            self.times.prefill = self.started.elapsed();
        }
        Ok(Step::Prefilled(done - before))
    }

    /// When the text is over: keeps the point behind it, and what it said.
    fn keep_turn(&mut self, step: Step, prefixes: &mut PrefixStore) -> Result<Step> {
        let Step::Over(outcome) = &step else { return Ok(step) };
        if self.is_torn {
            return Ok(step);
        }
        prefixes.keep(Place::Turn, self.session.tokens(), || self.session.checkpoint())?;
        // A text that was stopped in its answer is one to go on from; a thought or a call is not.
        let stopped = outcome.finish == Finish::Stopped
            && !self.said.content.is_empty()
            && self.said.calls.is_empty();
        let is_whole = matches!(outcome.finish, Finish::Stop | Finish::Calls) || stopped;
        if let (Some(before), true) = (self.job.before, is_whole && prefixes.is_on()) {
            let tokens = self.emitted.iter().map(|token| token.0).collect();
            prefixes.record(Turn { before, said: std::mem::take(&mut self.said), tokens });
        }
        Ok(step)
    }

    fn generate(&mut self) -> Result<Step> {
        let token = match self.choose()? {
            Some(token) => token,
            None => return Ok(self.end(Finish::Stop)),
        };
        let now = Instant::now();
        self.between = now - self.last_token;
        self.last_token = now;
        if self.first_token.is_none() {
            self.first_token = Some(now);
            self.times.first_token = self.job.origin.received.elapsed();
        }
        if self.vocabulary.eos.contains(&token) {
            return Ok(self.end(Finish::Stop));
        }
        self.take(token);
        let full = self.session.position() == self.session.engine().context();
        let most = self.job.limits.max_tokens;
        match self.reply.ended().cloned() {
            Some(Ended::StopText(stop)) => return Ok(self.end(Finish::StopText(stop))),
            Some(Ended::Calls) => return Ok(self.end(Finish::Calls)),
            None if full || most.is_some_and(|most| self.usage.generated >= most) => {
                return Ok(self.end(Finish::Length));
            }
            None => {}
        }
        self.chosen = Some(token);
        Ok(Step::Generated)
    }

    /// The next token; `None` when the text is what it must be and nothing may follow.
    fn choose(&mut self) -> Result<Option<TokenId>> {
        let budget = self.job.limits.think_budget;
        let spent = self.reply.is_thinking() && budget > 0 && self.usage.thinking >= budget;
        if let (true, Some(token)) = (spent, self.vocabulary.think_end) {
            return Ok(Some(token));
        }
        let Some(constraint) = &mut self.job.constraint else {
            return self.sampler.pick(self.session.logits()).map(Some);
        };
        constraint.follow(&self.reply);
        if constraint.is_fulfilled() {
            return Ok(None);
        }
        let mask = constraint.mask()?;
        let token = self.sampler.pick_among(self.session.logits(), mask.as_deref())?;
        constraint.take(token)?;
        // A text that must look like something does not end in its thinking.
        let early = self.reply.is_thinking() && self.vocabulary.eos.contains(&token);
        let closed = self.vocabulary.think_end.filter(|_| early && constraint.is_demanded());
        Ok(Some(closed.unwrap_or(token)))
    }

    /// Makes a token part of the text.
    fn take(&mut self, token: TokenId) {
        let thinking = self.reply.is_thinking();
        let ranked = self.job.logprobs.filter(|_| !thinking).map(|top| {
            let logprobs = logprobs(self.session.logits(), token, top);
            TokenLogprobs { token, logprobs }
        });
        self.sampler.accept(token);
        self.usage.generated += 1;
        self.usage.thinking += usize::from(thinking);
        let mut parts = Vec::new();
        let piece = self.text.push(token);
        self.reply.push(&piece, &mut parts);
        self.emitted.push(token);
        self.say(parts, ranked);
    }

    fn say(&mut self, parts: Vec<Part>, logprobs: Option<TokenLogprobs>) {
        parts.iter().for_each(|part| self.said.take(part.clone()));
        self.job.tell(Event::Token { parts, logprobs });
    }

    fn end(&mut self, finish: Finish) -> Step {
        let mut parts = Vec::new();
        let rest = self.text.finish();
        self.reply.push(&rest, &mut parts);
        self.reply.finish(&mut parts);
        if !parts.is_empty() {
            self.say(parts, None);
        }
        self.times.decode = self.first_token.map_or_else(Default::default, |at| at.elapsed());
        let outcome =
            Outcome { finish, calls: self.reply.calls(), usage: self.usage, times: self.times };
        Step::Over(Box::new(outcome))
    }
}
