//! The thread that writes states and answers to disk, so that no token waits for one.
//!
//! What is to be written waits in a queue bounded in bytes, and serves prompts from there. A state that
//! finds no room is not written: it is computed again when it is needed. Refuses to be waited for by
//! anybody but the end of the server, and by that no longer than it says.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Instant;

use flash_moe_engine::session::Checkpoint;
use flash_moe_engine::shape::TokenId;

use super::Place;
use super::state_dir::StateDir;
use super::turn_log::TurnLog;
use crate::serve::metrics::Metrics;
use crate::serve::model::Model;
use crate::serve::turns::Turn;

/// Answers that wait at once.
const TURNS_MAX: usize = 1024;

/// The queue of the thread.
pub struct Writer {
    shared: Arc<Shared>,
    bytes_max: u64,
}

struct Shared {
    dir: StateDir,
    metrics: Arc<Metrics>,
    queue: Mutex<Queue>,
    changed: Condvar,
}

#[derive(Default)]
struct Queue {
    states: VecDeque<(Arc<Checkpoint>, Place)>, // the first may be half written
    turns: Vec<Turn>,
    writing: usize, // answers
}

impl Writer {
    /// Starts the thread. States that wait take at most so many bytes, or are one.
    ///
    /// # Errors
    /// The system has no thread to give.
    pub fn start(
        dir: StateDir,
        log: TurnLog,
        model: &Arc<Model>,
        metrics: &Arc<Metrics>,
        bytes_max: u64,
    ) -> io::Result<Self> {
        let (queue, changed) = (Mutex::default(), Condvar::new());
        let shared = Arc::new(Shared { dir, metrics: Arc::clone(metrics), queue, changed });
        let (own, model) = (Arc::clone(&shared), Arc::clone(model));
        // It ends with the process: what it writes has its name when it is whole, and not before.
        thread::Builder::new().name("states".into()).spawn(move || own.work_off(log, &model))?;
        Ok(Self { shared, bytes_max })
    }

    /// The longest state of at least `least` tokens that `prompt` begins with, written or not.
    pub fn longest(
        &self,
        prompt: &[TokenId],
        least: usize,
        model: &Model,
    ) -> Option<(Arc<Checkpoint>, Place)> {
        let waiting = {
            let queue = self.shared.lock();
            let fits = queue.states.iter().filter(|(state, _)| {
                state.position() >= least.max(1) && prompt.starts_with(state.tokens())
            });
            fits.max_by_key(|(state, _)| state.position()).cloned()
        };
        let least = waiting.as_ref().map_or(least, |(state, _)| state.position() + 1);
        let written = self.shared.dir.longest(prompt, least, &model.engine);
        written.map(|(state, place)| (Arc::new(state), place)).or(waiting)
    }

    /// Has a state written if there is room for it to wait.
    pub fn keep(&self, checkpoint: Arc<Checkpoint>, place: Place) {
        let mut queue = self.shared.lock();
        let waiting = queue.states.iter().map(|(state, _)| &**state);
        let bytes = Checkpoint::bytes_of_all(waiting.chain([&*checkpoint]));
        match queue.states.is_empty() || bytes <= self.bytes_max {
            true => queue.states.push_back((checkpoint, place)),
            false => self.shared.metrics.prefix_losses.add(1),
        }
        self.shared.tell(&queue);
    }

    /// Has a state written however many wait: nobody needs the memory any more.
    pub fn keep_last(&self, checkpoint: Arc<Checkpoint>, place: Place) {
        let mut queue = self.shared.lock();
        queue.states.push_back((checkpoint, place));
        self.shared.tell(&queue);
    }

    /// Has an answer written.
    pub fn record(&self, turn: Turn) {
        let mut queue = self.shared.lock();
        if queue.turns.len() < TURNS_MAX {
            queue.turns.push(turn);
        }
        self.shared.tell(&queue);
    }

    /// Waits until all is written, or until then; gives how much is left.
    pub fn finish(&self, until: Instant) -> usize {
        let mut queue = self.shared.lock();
        while queue.left() > 0 {
            let Some(left) = until.checked_duration_since(Instant::now()) else { break };
            let waited = self.shared.changed.wait_timeout(queue, left);
            queue = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        queue.left()
    }
}

impl Queue {
    fn left(&self) -> usize {
        self.states.len() + self.turns.len() + self.writing
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tell(&self, queue: &Queue) {
        self.metrics.prefix_writing.set(queue.left() as u64);
        self.changed.notify_all();
    }

    /// The thread. Answers go first: they are small, and a state is of use without them.
    fn work_off(&self, mut log: TurnLog, model: &Model) {
        loop {
            let mut queue = self.lock();
            while queue.left() == 0 {
                queue = self.changed.wait(queue).unwrap_or_else(PoisonError::into_inner);
            }
            let turns = std::mem::take(&mut queue.turns);
            queue.writing = turns.len();
            let state = queue.states.front().cloned().filter(|_| turns.is_empty());
            drop(queue);
            match &state {
                Some((checkpoint, place)) => self.dir.save(checkpoint, *place),
                None => log.append(&turns, &model.turns),
            }
            let mut queue = self.lock();
            queue.writing = 0;
            if state.is_some() {
                queue.states.pop_front();
            }
            self.tell(&queue);
        }
    }
}
