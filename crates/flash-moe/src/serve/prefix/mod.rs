//! Points of earlier timelines that a prompt may go on from.
//!
//! Owns the checkpoints that are kept in memory within a bound, and through `writer` those on disk.
//! A delta-net state cannot be cut back, so only a whole checkpoint serves: the longest one whose
//! tokens the prompt begins with. When the bound is passed, points that a later one of the same
//! kind continues go first, then those not used for longest; the latter are handed to the thread that
//! writes to disk, where there is a directory. Refuses to hold more than the bound, were it for one checkpoint alone.

mod lock;
mod state_dir;
mod turn_log;
mod writer;

use std::cmp::Reverse;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use flash_moe_engine::session::{Checkpoint, Identity};
use flash_moe_engine::shape::TokenId;

use super::log;
use super::metrics::Metrics;
use super::model::Model;
use super::turns::Turn;
use crate::convert::files::make_directory;
use crate::options::serve::PrefixArgs;
use state_dir::StateDir;
use turn_log::TurnLog;
pub use writer::{Loading, Placed};
use writer::{Stored, Writer};

/// Fewer tokens are computed again rather than kept.
pub const TOKENS_MIN: usize = 16;

/// Where in a conversation a checkpoint was made.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Place {
    /// Behind the system prompt and the tools.
    System,
    /// In the middle of a long prompt.
    Part,
    /// Behind the last message or at the end of a prompt.
    Prompt,
    /// Behind an answer.
    Turn,
}

/// A position of a prompt at which a checkpoint is to be made.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Mark {
    /// Tokens before it.
    pub position: usize,
    /// Why there.
    pub place: Place,
}

/// The checkpoints.
pub struct PrefixStore {
    model: Arc<Model>,
    metrics: Arc<Metrics>,
    kept: Vec<Kept>,
    uses: u64,
    bytes_max: u64,
    disk: Option<Writer>,
}

/// What a store does about a directory that another process has.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum WhenTaken {
    /// It is not opened.
    Refuse,
    /// It goes without, and says so.
    GoWithout,
}

/// What is kept of a prompt.
pub enum Known {
    /// The longest checkpoint that it begins with, if there is one.
    Checkpoint(Option<Checkpoint>),
    /// It comes from the disk; [`PrefixStore::take`] takes it.
    Coming(Loading),
    /// Another text waits for it; ask again.
    Awaited,
}

struct Kept {
    checkpoint: Arc<Checkpoint>,
    place: Place,
    used: u64, // the number of the use
    is_on_disk: bool,
}

impl Place {
    /// Its name in files.
    pub fn name(self) -> &'static str {
        match self {
            Self::System => "system",
            Self::Part => "part",
            Self::Prompt => "prompt",
            Self::Turn => "turn",
        }
    }

    /// The place of that name.
    pub fn named(name: &str) -> Option<Self> {
        [Self::System, Self::Part, Self::Prompt, Self::Turn]
            .into_iter()
            .find(|place| place.name() == name)
    }
}

/// The positions of a prompt of so many tokens at which to keep a checkpoint: `marks`, and one every
/// `every` tokens (0: none). In order, each position once, none that is not worth it.
pub fn positions(marks: Vec<Mark>, every: usize, prompt: usize) -> Vec<Mark> {
    let parts = (1..prompt.checked_div(every).unwrap_or(0) + 1)
        .map(|part| Mark { position: part * every, place: Place::Part });
    let mut all: Vec<Mark> = marks.into_iter().chain(parts).collect();
    all.retain(|mark| (TOKENS_MIN..=prompt).contains(&mark.position));
    all.sort_by_key(|mark| mark.position);
    all.dedup_by_key(|mark| mark.position);
    all
}

impl PrefixStore {
    /// A store with nothing in memory, and with what lies in the directory of the flags. Its bound is
    /// that of the model's memory plan.
    ///
    /// # Errors
    /// The directory cannot be read, or another process has it and that is refused.
    pub fn open(
        model: &Arc<Model>,
        metrics: &Arc<Metrics>,
        args: &PrefixArgs,
        when_taken: WhenTaken,
    ) -> Result<Self> {
        let dir = args.state_dir.as_deref();
        let disk = dir.map(|dir| open_dir(dir, args.state_dir_size, model, metrics, when_taken));
        let disk = disk.transpose()?.flatten();
        let (model, metrics) = (Arc::clone(model), Arc::clone(metrics));
        let bytes_max = model.prefix_bytes.kept;
        Ok(Self { model, metrics, kept: Vec::new(), uses: 0, bytes_max, disk })
    }

    /// Whether anything is kept at all.
    pub fn is_on(&self) -> bool {
        self.bytes_max > 0 || self.disk.is_some()
    }

    /// Tokens of the longest checkpoint in memory that `prompt` begins with.
    pub fn longest_position(&self, prompt: &[TokenId]) -> usize {
        let found = self.kept.iter().filter(|kept| prompt.starts_with(kept.checkpoint.tokens()));
        found.map(|kept| kept.checkpoint.position()).max().unwrap_or(0)
    }

    /// The longest checkpoint that `prompt` begins with. Never waits for the disk.
    pub fn longest(&mut self, prompt: &[TokenId]) -> Known {
        let position = self.longest_position(prompt);
        let disk = self.disk.as_ref();
        let stored = disk.map(|disk| disk.longest(prompt, position + TOKENS_MIN, &self.model));
        match stored {
            Some(Stored::Here(state)) => return Known::Checkpoint(Some(self.take(state))),
            Some(Stored::Coming(loading)) => return Known::Coming(loading),
            Some(Stored::Awaited) => return Known::Awaited,
            Some(Stored::Nothing) | None => {}
        }
        self.uses += 1;
        let found = self.kept.iter_mut().find(|kept| {
            kept.checkpoint.position() == position && prompt.starts_with(kept.checkpoint.tokens())
        });
        Known::Checkpoint(found.map(|found| {
            found.used = self.uses;
            Checkpoint::clone(&found.checkpoint)
        }))
    }

    /// Keeps a state that came from the disk or was on its way there, and gives it.
    pub fn take(&mut self, (checkpoint, place): Placed) -> Checkpoint {
        self.metrics.prefix_loads.add(1);
        self.insert(Arc::clone(&checkpoint), place, true);
        Checkpoint::clone(&checkpoint)
    }

    /// Keeps the point at which `tokens` have been taken; `make` makes it if it is not there yet.
    ///
    /// # Errors
    /// What `make` has to say.
    pub fn keep(
        &mut self,
        place: Place,
        tokens: &[TokenId],
        make: impl FnOnce() -> flash_moe_engine::Result<Checkpoint>,
    ) -> flash_moe_engine::Result<()> {
        if !self.is_on() || tokens.len() < TOKENS_MIN {
            return Ok(());
        }
        self.uses += 1;
        if let Some(kept) = self.kept.iter_mut().find(|kept| kept.checkpoint.tokens() == tokens) {
            kept.used = self.uses;
            return Ok(());
        }
        self.insert(Arc::new(make()?), place, false);
        Ok(())
    }

    /// Remembers an answer, for conversations that repeat it.
    pub fn record(&self, turn: Turn) {
        // Before the file, because one that is written anew gets what is remembered.
        self.model.turns.record(turn.clone());
        if let Some(disk) = &self.disk {
            disk.record(turn);
        }
    }

    /// Has written what is worth it and is not on disk yet, all but the points that a later one of
    /// their kind continues; what was used last goes first. Nothing is given up.
    pub fn write_all(&mut self) {
        let Some(disk) = &self.disk else { return };
        let mut order: Vec<usize> = (0..self.kept.len()).collect();
        order.sort_by_key(|&index| Reverse(self.kept[index].used));
        for index in order {
            if !self.kept[index].is_on_disk && !self.is_continued(index) {
                let kept = &mut self.kept[index];
                kept.is_on_disk = true;
                disk.keep_last(Arc::clone(&kept.checkpoint), kept.place);
            }
        }
    }

    /// As [`PrefixStore::write_all`], and waits until it is written, or until then.
    pub fn save_all(&mut self, until: Instant) {
        self.write_all();
        let left = self.disk.as_ref().map_or(0, |disk| disk.finish(until));
        if left > 0 {
            let why = "states and answers are not written, the time of --shutdown-timeout is over";
            log::note(&format!("warning: {left} {why}"));
        }
    }

    fn insert(&mut self, checkpoint: Arc<Checkpoint>, place: Place, is_on_disk: bool) {
        self.uses += 1;
        self.kept.push(Kept { checkpoint, place, used: self.uses, is_on_disk });
        while !self.kept.is_empty() && self.bytes() + self.excess() > self.bytes_max {
            self.evict(self.first_to_go());
            self.metrics.prefix_evictions.add(1);
        }
        self.metrics.prefixes.set(self.kept.len() as u64);
        self.metrics.prefix_bytes.set(self.bytes());
    }

    fn excess(&self) -> u64 {
        self.disk.as_ref().map_or(0, Writer::excess)
    }

    fn bytes(&self) -> u64 {
        Checkpoint::bytes_of_all(self.kept.iter().map(|kept| &*kept.checkpoint))
    }

    /// The index of the one that is missed least. There must be one.
    fn first_to_go(&self) -> usize {
        let order = |&index: &usize| (!self.is_continued(index), self.kept[index].used);
        (0..self.kept.len()).min_by_key(order).expect("nothing kept takes no memory")
    }

    /// Whether another one of the same kind goes on from this one.
    fn is_continued(&self, index: usize) -> bool {
        let this = &self.kept[index];
        let tokens = this.checkpoint.tokens();
        self.kept.iter().any(|other| {
            other.place == this.place
                && other.checkpoint.position() > tokens.len()
                && other.checkpoint.tokens().starts_with(tokens)
        })
    }

    /// Lets one go, to the disk if it is worth it.
    fn evict(&mut self, index: usize) {
        let is_continued = self.is_continued(index);
        let Kept { checkpoint, place, is_on_disk, .. } = self.kept.swap_remove(index);
        if let Some(disk) = self.disk.as_ref().filter(|_| !is_on_disk && !is_continued) {
            disk.keep(checkpoint, place);
        }
    }
}

/// The directory and its thread; none if another process has it and one may go without.
fn open_dir(
    dir: &Path,
    bytes_max: u64,
    model: &Arc<Model>,
    metrics: &Arc<Metrics>,
    when_taken: WhenTaken,
) -> Result<Option<Writer>> {
    make_directory(dir)?;
    let Some(lock) = lock::take(dir)? else {
        let taken = format!("{} belongs to another process that runs", dir.display());
        if when_taken == WhenTaken::Refuse {
            bail!("{taken}; give each server a --state-dir of its own");
        }
        log::note(&format!("note: {taken}; no states are kept here"));
        return Ok(None);
    };
    let engine = &model.engine;
    let files = StateDir::open(dir, lock, bytes_max, engine)?;
    let owner = Identity::of(engine.container(), engine.options());
    let answers = TurnLog::open(dir, &model.turns, &owner);
    let writer = Writer::start(files, answers, model, metrics);
    writer.context("the thread that writes states").map(Some)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_are_in_order_each_once_and_worth_it() {
        let mark = |position, place| Mark { position, place };
        let wished =
            vec![mark(150, Place::Prompt), mark(100, Place::System), mark(3, Place::System)];
        let got = positions(wished.clone(), 50, 160);
        let expected = [mark(50, Place::Part), mark(100, Place::System), mark(150, Place::Prompt)];
        assert_eq!(got, expected);
        assert_eq!(positions(wished, 0, 120), [mark(100, Place::System)]);
    }
}
