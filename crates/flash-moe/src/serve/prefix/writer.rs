//! The thread that writes states and answers to disk, so that no token waits for one.
//!
//! What is to be written waits in a queue bounded in bytes, and serves prompts from there. A state that
//! finds no room is not written: it is computed again when it is needed. What is to be read is read by
//! a thread of its own. Refuses to be waited for by anybody but the end of the server, and by that
//! no longer than it says.

use std::collections::VecDeque;
use std::io;
use std::sync::mpsc::{Receiver, TryRecvError, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Instant;

use flash_moe_engine::session::Checkpoint;
use flash_moe_engine::shape::TokenId;

use super::Place;
use super::state_dir::{Claim, StateDir, StateFile};
use super::turn_log::TurnLog;
use crate::serve::metrics::Metrics;
use crate::serve::model::{Model, PrefixBytes};
use crate::serve::turns::Turn;

/// Answers that wait at once.
const TURNS_MAX: usize = 1024;

/// The queue of the thread.
pub struct Writer {
    shared: Arc<Shared>,
    bounds: PrefixBytes,
    thread: Option<JoinHandle<()>>,
}

/// A state and where in its conversation it was made.
pub type Placed = (Arc<Checkpoint>, Place);

/// What waits to be written, and what is written, of use for a prompt.
pub enum Stored {
    /// Nothing.
    Nothing,
    /// This, in memory.
    Here(Placed),
    /// It comes from the disk.
    Coming(Loading),
    /// It comes from the disk for somebody else.
    Awaited,
}

/// A state that is being read.
pub struct Loading(Receiver<Option<Placed>>);

impl Loading {
    /// The state once it is there, nothing if it was of no use; `None` until then.
    pub fn ended(&self) -> Option<Option<Placed>> {
        match self.0.try_recv() {
            Ok(loaded) => Some(loaded),
            Err(TryRecvError::Empty) => None,
            Err(TryRecvError::Disconnected) => Some(None),
        }
    }
}

struct Shared {
    dir: StateDir,
    metrics: Arc<Metrics>,
    queue: Mutex<Queue>,
    changed: Condvar,
}

#[derive(Default)]
struct Queue {
    states: VecDeque<Placed>, // the first may be half written
    turns: Vec<Turn>,
    writing: usize, // answers
    is_over: bool,  // nobody waits for what is left
}

impl Writer {
    /// Starts the thread.
    ///
    /// # Errors
    /// The system has no thread to give.
    pub fn start(
        dir: StateDir,
        log: TurnLog,
        model: &Arc<Model>,
        metrics: &Arc<Metrics>,
    ) -> io::Result<Self> {
        let bounds = model.prefix_bytes;
        let (queue, changed) = (Mutex::default(), Condvar::new());
        let shared = Arc::new(Shared { dir, metrics: Arc::clone(metrics), queue, changed });
        let (own, model) = (Arc::clone(&shared), Arc::clone(model));
        let thread = thread::Builder::new().name("states".into());
        let thread = Some(thread.spawn(move || own.work_off(log, &model))?);
        Ok(Self { shared, bounds, thread })
    }

    /// The longest state of at least `least` tokens that `prompt` begins with, written or not.
    pub fn longest(&self, prompt: &[TokenId], least: usize, model: &Arc<Model>) -> Stored {
        let waiting = {
            let queue = self.shared.lock();
            let fits = queue.states.iter().filter(|(state, _)| {
                state.position() >= least.max(1) && prompt.starts_with(state.tokens())
            });
            fits.max_by_key(|(state, _)| state.position()).cloned()
        };
        let least = waiting.as_ref().map_or(least, |(state, _)| state.position() + 1);
        match self.shared.dir.claim(prompt, least) {
            Claim::Nothing => waiting.map_or(Stored::Nothing, Stored::Here),
            Claim::Taken => Stored::Awaited,
            Claim::Yours(file) => Stored::Coming(self.load(file, model)),
        }
    }

    fn load(&self, file: StateFile, model: &Arc<Model>) -> Loading {
        let (sender, receiver) = channel();
        let work = |file: StateFile| {
            let (shared, model, sender) =
                (Arc::clone(&self.shared), Arc::clone(model), sender.clone());
            move || {
                let loaded = shared.dir.load(file, &model.engine);
                let loaded = loaded.map(|(state, place)| (Arc::new(state), place));
                // Whoever asked may have left.
                sender.send(loaded).unwrap_or(());
            }
        };
        let thread = thread::Builder::new().name("state".into()).spawn(work(file.clone()));
        if thread.is_err() {
            work(file)();
        }
        Loading(receiver)
    }

    /// Has a state written if there is room for it to wait.
    pub fn keep(&self, checkpoint: Arc<Checkpoint>, place: Place) {
        let mut queue = self.shared.lock();
        let waiting = queue.states.iter().map(|(state, _)| &**state);
        let bytes = Checkpoint::bytes_of_all(waiting.chain([&*checkpoint]));
        match self.bounds.may_wait(bytes, queue.states.is_empty()) {
            true => queue.states.push_back((checkpoint, place)),
            false => self.shared.metrics.prefix_losses.add(1),
        }
        self.shared.tell(&queue);
    }

    /// Bytes that wait beyond their bound, and so take room from those that are kept.
    pub fn excess(&self) -> u64 {
        let queue = self.shared.lock();
        let waiting = Checkpoint::bytes_of_all(queue.states.iter().map(|(state, _)| &**state));
        waiting.saturating_sub(self.bounds.waiting)
    }

    /// Has a state written however many wait: at the end nobody needs the memory any more.
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

impl Drop for Writer {
    /// Ends the thread, and with it its hold on the model and the directory. One that the disk holds up
    /// ends when that answers: what it writes has its name when it is whole, and not before.
    fn drop(&mut self) {
        let mut queue = self.shared.lock();
        queue.is_over = true;
        let is_idle = queue.left() == 0;
        self.shared.changed.notify_all();
        drop(queue);
        if let Some(thread) = self.thread.take().filter(|_| is_idle) {
            // A panic of the thread has been printed where it happened.
            thread.join().unwrap_or(());
        }
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
            while queue.left() == 0 && !queue.is_over {
                queue = self.changed.wait(queue).unwrap_or_else(PoisonError::into_inner);
            }
            if queue.is_over {
                return;
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
