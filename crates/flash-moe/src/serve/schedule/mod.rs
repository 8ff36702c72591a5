//! The engine's one thread: takes jobs from a bounded queue and moves the live ones on in turn.
//!
//! Each live job gets one step a round, a chunk of its prompt or one token, so that a long prompt
//! delays the others by a chunk and not by all of itself. The tokens of a round go through the layers
//! together, so that one read of an expert serves all of them. A job's tokens do not depend on what
//! runs beside it: sessions share nothing but weights and experts. A full queue refuses at once.

mod job;
mod live;

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

pub use job::{Event, Failure, Finish, Format, Job, Limits, Origin, Outcome, TokenLogprobs, Usage};

use super::log;
use super::metrics::Metrics;
use super::model::Model;
use super::prefix::PrefixStore;
use flash_moe_engine::session::Together;
pub use live::Step;
use live::{Live, Vocabulary};

/// How long nothing happens while all texts wait for the disk.
const REST: Duration = Duration::from_millis(2);
/// What a client is told of a panic.
const INTERNAL_ERROR: &str = "internal error: see the server's log";

/// The queue and the thread that works it off.
pub struct Schedule {
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

struct Shared {
    queue: Mutex<Queue>,
    changed: Condvar,
    metrics: Arc<Metrics>,
    waiting_max: usize,
    live_max: usize,
}

#[derive(Default)]
struct Queue {
    jobs: VecDeque<Job>,
    live: usize,
    state: State,
    until: Option<Instant>, // when the end must be over
}

#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum State {
    #[default]
    Open,
    /// No new jobs; the thread ends when there are none left.
    Draining,
    /// Whatever is left fails.
    Stopping,
}

/// Why jobs were not taken.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Refused {
    /// The queue has no room for them.
    Full,
    /// The server is going down.
    Closed,
}

impl Schedule {
    /// Starts the thread.
    ///
    /// # Errors
    /// The system has no thread to give.
    pub fn start(
        model: &Arc<Model>,
        metrics: &Arc<Metrics>,
        mut prefixes: PrefixStore,
        live_max: usize,
        waiting_max: usize,
    ) -> std::io::Result<Self> {
        let shared = Arc::new(Shared {
            queue: Mutex::default(),
            changed: Condvar::new(),
            metrics: Arc::clone(metrics),
            waiting_max,
            live_max,
        });
        let (own, model) = (Arc::clone(&shared), Arc::clone(model));
        let thread = thread::Builder::new().name("engine".into()).spawn(move || {
            let worked = AssertUnwindSafe(|| work_off(&own, &model, &mut prefixes));
            // A panic has been printed. Without this thread nobody may wait for a turn.
            catch_unwind(worked).unwrap_or(());
            own.close();
        })?;
        Ok(Self { shared, thread: Mutex::new(Some(thread)) })
    }

    /// Takes all of `jobs`, or none.
    ///
    /// # Errors
    /// There is no room for all of them, or the server is going down.
    pub fn submit(&self, jobs: Vec<Job>) -> Result<(), Refused> {
        self.shared.drop_ended();
        let mut queue = self.shared.lock();
        if queue.state != State::Open {
            return Err(Refused::Closed);
        }
        if queue.live + queue.jobs.len() + jobs.len() > self.capacity() {
            return Err(Refused::Full);
        }
        queue.jobs.extend(jobs);
        drop(queue);
        self.shared.changed.notify_all();
        Ok(())
    }

    /// Most jobs that may be taken at once.
    pub fn capacity(&self) -> usize {
        self.shared.live_max + self.shared.waiting_max
    }

    /// Jobs that have their turn, and jobs that wait.
    pub fn load(&self) -> (usize, usize) {
        let queue = self.shared.lock();
        (queue.live, queue.jobs.len())
    }

    /// Takes no more jobs; the ones there are go on. What is kept on disk may be written until then.
    pub fn drain(&self, until: Instant) {
        self.shared.lock().until = Some(until);
        self.set(State::Draining);
    }

    /// Fails whatever is left, and waits for the thread to end.
    pub fn stop(&self) {
        self.set(State::Stopping);
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = thread {
            // A panic of the thread has been printed where it happened.
            thread.join().unwrap_or(());
        }
    }

    fn set(&self, state: State) {
        self.shared.lock().state = state;
        self.shared.changed.notify_all();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The jobs whose turn begins now. Waits for one if `idle`; `None` when there will be no more.
    fn admit(&self, idle: bool) -> Option<Vec<Job>> {
        let mut queue = self.lock();
        while idle && queue.jobs.is_empty() && queue.state == State::Open {
            queue = self.changed.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
        if idle && queue.jobs.is_empty() {
            return None;
        }
        let room = self.live_max - queue.live;
        let taken = room.min(queue.jobs.len());
        queue.live += taken;
        Some(queue.jobs.drain(..taken).collect())
    }

    /// Drops the waiting jobs that are not to go on: nobody listens, or their time is over.
    fn drop_ended(&self) {
        let mut ended = Vec::new();
        let mut queue = self.lock();
        let mut at = 0;
        while at < queue.jobs.len() {
            match queue.jobs[at].is_over() {
                Some(step) => ended.extend(queue.jobs.remove(at).map(|job| (job, step))),
                None => at += 1,
            }
        }
        drop(queue);
        for (job, step) in ended {
            let usage = Usage { prompt: job.prompt.len(), ..Usage::default() };
            conclude(&job, usage, step, &self.metrics);
        }
    }

    /// Lets a little time pass, unless there is something new.
    fn rest(&self) {
        // Either way the jobs are looked at again.
        drop(self.changed.wait_timeout(self.lock(), REST));
    }

    /// Takes no more jobs and drops those that wait, so that whoever listens is told.
    fn close(&self) {
        let mut queue = self.lock();
        queue.state = State::Stopping;
        queue.jobs.clear();
    }

    fn until(&self) -> Instant {
        self.lock().until.unwrap_or_else(Instant::now)
    }

    fn leave(&self) {
        self.lock().live -= 1;
    }
}

/// The thread: rounds of one step a job, until the queue is closed and empty.
fn work_off(shared: &Shared, model: &Model, prefixes: &mut PrefixStore) {
    let metrics = &*shared.metrics;
    let vocabulary = Vocabulary {
        tokenizer: &model.tokenizer,
        eos: &model.eos,
        think_end: model.tokenizer.id("</think>"),
    };
    let mut together = Together::new(&model.engine);
    let mut live: Vec<Live> = Vec::new();
    while let Some(jobs) = shared.admit(live.is_empty()) {
        for job in jobs {
            let (index, events) = (job.index, job.events.clone());
            match Live::new(&model.engine, &vocabulary, job) {
                Ok(job) => live.push(job),
                Err(error) => {
                    let failed = Event::Failed(Failure::Engine(error.to_string()));
                    // Nobody may be listening any more.
                    events.send((index, failed)).unwrap_or(());
                    shared.leave();
                }
            }
        }
        shared.drop_ended();
        let state = shared.lock().state;
        if state != State::Open {
            // What the running texts leave to do until the end is over is little then.
            prefixes.write_all();
        }
        let waiting = waiting(&live, prefixes);
        let (mut over, mut moved) = (Vec::new(), false);
        for (mut job, waits) in std::mem::take(&mut live).into_iter().zip(waiting) {
            let step = match state {
                State::Stopping => Step::Failed(Failure::Shutdown),
                _ => timed(&mut job, metrics, |job| job.step(waits, prefixes)),
            };
            moved |= !matches!(step, Step::Waits);
            match step {
                Step::Waits | Step::Prefilled(_) | Step::Generated => live.push(job),
                step => over.push((job, step)),
            }
        }
        over.extend(take_tokens(&mut live, &mut together, metrics));
        // What is told of a job's end must not be older than the end.
        metrics.positions.set(live.iter().map(|job| job.position() as u64).sum());
        for (job, step) in over {
            shared.leave();
            conclude(job.job(), job.usage(), step, metrics);
        }
        if !moved {
            shared.rest();
        }
    }
    prefixes.save_all(shared.until());
}

/// The jobs' sessions take the tokens that were chosen, all together; gives the jobs that failed.
fn take_tokens<'a>(
    live: &mut Vec<Live<'a>>,
    together: &mut Together,
    metrics: &Metrics,
) -> Vec<(Live<'a>, Step)> {
    let started = Instant::now();
    let takers: Vec<usize> = (0..live.len()).filter(|&i| live[i].has_chosen()).collect();
    if takers.is_empty() {
        return Vec::new();
    }
    let mut steps: Vec<_> = live.iter_mut().filter_map(Live::chosen).collect();
    let taken = catch_unwind(AssertUnwindSafe(|| together.step(&mut steps)));
    metrics.decode_seconds.add(started.elapsed());
    let outcomes = match taken {
        Ok(outcomes) => outcomes.into_iter().map(|o| o.map_err(|e| e.to_string())).collect(),
        // The panic has been printed. What it left half done is dropped with these jobs.
        Err(_) => vec![Err(INTERNAL_ERROR.to_owned()); takers.len()],
    };
    let failed = takers.into_iter().zip(outcomes).rev();
    let failed = failed.filter_map(|(at, outcome)| Some((at, outcome.err()?)));
    failed.map(|(at, why)| (live.remove(at), Step::Failed(Failure::Engine(why)))).collect()
}

/// Which jobs have to wait for a prefix that one ahead of them computes. The first never does.
fn waiting(live: &[Live], prefixes: &PrefixStore) -> Vec<bool> {
    let waits = |at: usize| {
        let (ahead, behind) = live.split_at(at);
        let mut others = ahead.iter().chain(behind.iter().filter(|other| other.has_begun()));
        others.any(|other| live[at].waits_for(other, prefixes))
    };
    (0..live.len()).map(waits).collect()
}

/// One step of a job, counted.
fn timed(job: &mut Live, metrics: &Metrics, step: impl FnOnce(&mut Live) -> Step) -> Step {
    let (started, before) = (Instant::now(), job.usage());
    let step = catch_unwind(AssertUnwindSafe(|| step(job))).unwrap_or_else(|_| {
        // The panic has been printed; the other jobs share nothing with this one and go on.
        Step::Failed(Failure::Engine(INTERNAL_ERROR.into()))
    });
    if let Step::Prefilled(tokens) = step {
        metrics.prompt_tokens.add(tokens as u64);
        metrics.prefill_seconds.add(started.elapsed());
    } else if job.usage().generated > before.generated {
        metrics.generated_tokens.add(1);
        metrics.decode_seconds.add(started.elapsed());
        if before.generated == 0 {
            metrics.first_token.observe(job.job().origin.received.elapsed());
        } else {
            metrics.between_tokens.observe(job.between());
        }
    }
    step
}

/// Tells and logs how a job ended.
fn conclude(job: &Job, usage: Usage, step: Step, metrics: &Metrics) {
    let ended = match &step {
        Step::Over(outcome) => outcome.finish.name(),
        Step::Abandoned => "disconnected",
        Step::Failed(Failure::Engine(_)) => "error",
        Step::Failed(Failure::Timeout) => "timeout",
        _ => "shutdown",
    };
    metrics.ended(ended);
    metrics.cached_tokens.add(usage.cached as u64);
    log::job(job, usage, &step, ended);
    match step {
        Step::Over(outcome) => job.tell(Event::Done(*outcome)),
        Step::Failed(failure) => job.tell(Event::Failed(failure)),
        _ => {}
    }
}
