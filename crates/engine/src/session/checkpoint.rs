//! A point of a timeline to come back to.
//!
//! Owns what a session remembers at one position: shared pages of keys and values, copies of the
//! delta-net states, the logits, the tokens. A recurrent state cannot be cut back to an earlier
//! position, so a prefix is reused by restoring a checkpoint that was made there. Refuses to restore
//! under a model or settings that would have computed something else.

use std::collections::HashSet;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::{Memory, Session};
use crate::container::Container;
use crate::engine::Options;
use crate::error::{Error, Result};
use crate::shape::{ExpertId, TokenId};

/// What decides the numbers of a state: two engines that agree in it may exchange states.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Identity {
    /// xxh3-64 of the container's manifest, in hexadecimal.
    pub model: String,
    /// The attention's dimensions and rotation, as JSON.
    pub attention: String,
    /// Numbers in which activations meet quantised weights.
    pub activations: String,
    /// How keys and values are kept.
    pub kv_cache: String,
    /// Experts chosen for a token.
    pub experts_per_token: usize,
}

impl Identity {
    /// That of the states which an engine of this container and these options makes.
    pub fn of(container: &Container, options: &Options) -> Self {
        let shape = container.shape();
        let attention = serde_json::to_string(&shape.attention);
        Self {
            model: format!("{:016x}", container.identity()),
            attention: attention.expect("numbers and flags have a JSON form"),
            activations: options.arithmetic.name().into(),
            kv_cache: options.kv_cache.identity(),
            experts_per_token: options.experts_per_token.unwrap_or(shape.moe.top_k),
        }
    }

    /// Whether an engine of this container and these options may continue a state of this identity.
    ///
    /// # Errors
    /// Names the first setting that differs and the flag that changes it.
    pub fn check(&self, container: &Container, options: &Options) -> Result<()> {
        let here = Self::of(container, options);
        let differs = |what: &str, then: &str, now: &str, advice: &str| {
            Err(Error::State(format!("made with {what}{then}, this run has {now}; {advice}")))
        };
        if self.model != here.model {
            let advice = "give the model that it was made with, or start without a state";
            return differs("model ", &self.model, &here.model, advice);
        }
        if self.attention != here.attention {
            let advice = "give the rope settings that it was made with";
            return differs("attention ", &self.attention, &here.attention, advice);
        }
        if self.activations != here.activations {
            let advice = "--exact is f32, --fast is int8, without either they are fixed16";
            return differs("activations ", &self.activations, &here.activations, advice);
        }
        if self.kv_cache != here.kv_cache {
            let advice = format!("give {}", self.kv_cache);
            return differs("", &self.kv_cache, &here.kv_cache, &advice);
        }
        if self.experts_per_token != here.experts_per_token {
            let (then, now) = (self.experts_per_token, here.experts_per_token);
            let advice = format!("give --experts-per-token {then}");
            return differs("experts per token ", &then.to_string(), &now.to_string(), &advice);
        }
        Ok(())
    }
}

/// Everything a session remembers at one position.
#[derive(Clone)]
pub struct Checkpoint {
    pub(super) identity: Identity,
    pub(super) tokens: Vec<TokenId>, // [position]
    pub(super) memories: Vec<Memory>,
    pub(super) previous: Vec<Vec<ExpertId>>,
    pub(super) logits: Vec<f32>, // [vocab]
}

impl Checkpoint {
    /// Tokens taken up to here.
    pub fn position(&self) -> usize {
        self.tokens.len()
    }

    /// The tokens taken up to here, from the first on.
    pub fn tokens(&self) -> &[TokenId] {
        &self.tokens
    }

    /// What decides whether an engine may continue it.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// Bytes that are freed when this checkpoint is dropped now: its own copies, and the pages that
    /// neither a session nor another checkpoint holds.
    pub fn own_bytes(&self) -> u64 {
        let pages = self.memories.iter().flat_map(Memory::pages);
        let alone = pages.filter(|page| Arc::strong_count(page) == 1);
        self.copied_bytes() + alone.map(|page| size_of_val(&**page) as u64).sum::<u64>()
    }

    /// Bytes that a set of checkpoints holds in all, a page that several share counted once.
    pub fn bytes_of_all<'a>(checkpoints: impl IntoIterator<Item = &'a Self>) -> u64 {
        let mut seen = HashSet::new();
        let mut bytes = 0;
        for checkpoint in checkpoints {
            bytes += checkpoint.copied_bytes();
            for page in checkpoint.memories.iter().flat_map(Memory::pages) {
                if seen.insert(page.as_ptr()) {
                    bytes += size_of_val(&**page) as u64;
                }
            }
        }
        bytes
    }

    /// Whether so many tokens fit.
    pub(super) fn check_length(position: usize, context: usize) -> Result<()> {
        if position <= context {
            return Ok(());
        }
        Err(Error::State(format!(
            "it holds {position} tokens, the context {context}; give --context {position} or more"
        )))
    }

    fn copied_bytes(&self) -> u64 {
        let states: usize = self.memories.iter().map(Memory::copied_bytes).sum();
        (states + size_of_val(&*self.tokens) + size_of_val(&*self.logits)) as u64
    }
}

impl Session {
    /// Keeps this point of the timeline. Pages of keys and values are shared, not copied; the
    /// delta-net states are copied, whose size does not depend on the position.
    ///
    /// # Errors
    /// This session met an error before: what it holds is half a token. The device that holds it failed.
    pub fn checkpoint(&self) -> Result<Checkpoint> {
        self.check_whole()?;
        Ok(Checkpoint {
            identity: Identity::of(self.engine.container(), self.engine.options()),
            tokens: self.tokens.clone(),
            memories: self.remembered()?.into_owned(),
            previous: self.previous.clone(),
            logits: self.logits.clone(),
        })
    }

    /// Goes to a point that this session, or another one of an equal engine, has kept. What follows
    /// is bit for bit what would have followed there. A session that met an error works again.
    ///
    /// # Errors
    /// The checkpoint belongs to another model or other settings, or is longer than the context;
    /// the session stays as it was.
    pub fn restore(&mut self, checkpoint: &Checkpoint) -> Result<()> {
        self.adopt(checkpoint.clone())
    }

    /// As [`Session::restore`] with a checkpoint that is not needed again: nothing is copied.
    ///
    /// # Errors
    /// As [`Session::restore`].
    pub fn adopt(&mut self, checkpoint: Checkpoint) -> Result<()> {
        checkpoint.identity.check(self.engine.container(), self.engine.options())?;
        Checkpoint::check_length(checkpoint.position(), self.engine.context())?;
        self.replace(checkpoint.memories, checkpoint.tokens.len())?;
        self.tokens.clear();
        self.tokens.extend_from_slice(&checkpoint.tokens);
        self.previous = checkpoint.previous;
        self.logits = checkpoint.logits;
        self.broken = false;
        Ok(())
    }
}
