//! Reads that have been asked for and not begun.
//!
//! What a token waits for goes before guesses, guesses that may be needed in a moment before what
//! warms the pool up, and only a few guesses run at a time. A guess may be withdrawn or promoted until
//! its read has begun. The queue does not know who reads: threads wait for it, a ring is rung.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};

use super::ring::Bell;
use super::slots::{Key, Purpose, SlotId};
use crate::memory::Block;

/// One record to be read.
pub(super) struct Job {
    pub key: Key,
    pub place: Place,
    /// Owned by the job alone until the read is complete.
    pub block: Arc<Block>,
    /// A guess may be withdrawn before it begins.
    pub purpose: Purpose,
}

/// Whose block a record is read into.
pub(super) enum Place {
    /// A slot's of the pool.
    Slot(SlotId),
    /// One that a fetch was lent; how the read ended.
    Lent(Arc<OnceLock<Result<Arc<Block>, String>>>),
}

impl Place {
    /// Whether it is this slot.
    fn is(&self, slot: SlotId) -> bool {
        matches!(self, Self::Slot(own) if *own == slot)
    }
}

/// A read that has been taken from the queue to be made.
pub(super) struct Begun {
    pub job: Job,
    pub guess: bool,
}

/// Shared by the store, which asks, and the readers.
#[derive(Default)]
pub(super) struct Queue {
    jobs: Mutex<Jobs>,
    ready: Condvar,
    /// Wakes the ring, where one reads.
    pub bell: Option<Bell>,
}

#[derive(Default)]
struct Jobs {
    wanted: VecDeque<Job>,
    guessed: VecDeque<Job>,
    guesses_running: usize,
    /// Whether the bell has been rung since the ring last looked.
    rung: bool,
    stop: bool,
}

/// Reads that may be guesses at a time: the others stay free for what a token waits for.
pub(super) const GUESSES_RUNNING_MAX: usize = 2;

impl Queue {
    /// A queue whose reader is rung instead of waiting in [`Queue::next`].
    pub fn with_bell(bell: Bell) -> Self {
        Self { bell: Some(bell), ..Self::default() }
    }

    /// Queues a read that somebody waits for.
    pub fn submit(&self, job: Job) {
        let mut jobs = self.lock();
        jobs.wanted.push_back(job);
        self.wake(jobs);
    }

    /// Queues a read that is made only when nobody waits for another.
    pub fn submit_guess(&self, job: Job) {
        let mut jobs = self.lock();
        // What a token may need in a moment goes before what warms the pool up.
        let kept = jobs.guessed.iter().position(|j| j.purpose != Purpose::Guess);
        let place = kept.filter(|_| job.purpose == Purpose::Guess).unwrap_or(jobs.guessed.len());
        jobs.guessed.insert(place, job);
        self.wake(jobs);
    }

    /// Moves a queued guess to the reads that somebody waits for; `false` if it is not queued.
    pub fn promote(&self, slot: SlotId, purpose: Purpose) -> bool {
        let mut jobs = self.lock();
        let Some(place) = jobs.guessed.iter().position(|job| job.place.is(slot)) else {
            return false;
        };
        let job = jobs.guessed.remove(place).expect("the place was just found");
        jobs.wanted.push_back(Job { purpose, ..job });
        // It may have been held back by the number of guesses that run.
        self.wake(jobs);
        true
    }

    /// Takes back every guess of lookahead that has not begun.
    pub fn withdraw_guesses(&self) -> VecDeque<Job> {
        let mut jobs = self.lock();
        let guessed = std::mem::take(&mut jobs.guessed);
        let (guesses, kept) = guessed.into_iter().partition(|job| job.purpose == Purpose::Guess);
        jobs.guessed = kept;
        guesses
    }

    /// Drops what has not begun and tells the readers to end.
    pub fn stop(&self) {
        let mut jobs = self.lock();
        jobs.wanted.clear();
        jobs.guessed.clear();
        jobs.stop = true;
        drop(jobs);
        self.ready.notify_all();
        if let Some(bell) = &self.bell {
            bell.ring();
        }
    }

    /// Waits for the next read; `None` when the readers are to end.
    pub fn next(&self) -> Option<Begun> {
        let mut jobs = self.lock();
        loop {
            if jobs.stop {
                return None;
            }
            if let Some(begun) = jobs.begin() {
                return Some(begun);
            }
            jobs = self.ready.wait(jobs).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Hands the next reads to `begin`, `count` at most, without waiting; `false` when the readers are
    /// to end. The bell is rung again for what is queued after this.
    #[cfg(target_os = "linux")]
    pub fn take(&self, count: usize, mut begin: impl FnMut(Begun)) -> bool {
        self.lock().rung = false;
        for _ in 0..count {
            let Some(begun) = self.lock().begin() else { break };
            begin(begun);
        }
        !self.lock().stop
    }

    /// A read is complete, which may have been a guess: another may begin, and `next` is queued.
    pub fn done(&self, guess: bool, next: Option<Job>) {
        if guess {
            self.lock().guesses_running -= 1;
            self.ready.notify_one();
        }
        if let Some(next) = next {
            self.submit_guess(next);
        }
    }

    fn wake(&self, mut jobs: MutexGuard<'_, Jobs>) {
        match &self.bell {
            // One ring for all that a layer asks for before the other side has looked.
            Some(bell) if !std::mem::replace(&mut jobs.rung, true) => bell.ring(),
            Some(_) => {}
            None => {
                drop(jobs);
                self.ready.notify_one();
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Jobs> {
        self.jobs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Jobs {
    fn begin(&mut self) -> Option<Begun> {
        if let Some(job) = self.wanted.pop_front() {
            return Some(Begun { job, guess: false });
        }
        if self.guesses_running == GUESSES_RUNNING_MAX {
            return None;
        }
        let job = self.guessed.pop_front()?;
        self.guesses_running += 1;
        Some(Begun { job, guess: true })
    }
}
