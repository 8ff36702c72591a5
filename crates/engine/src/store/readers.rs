//! Who reads: a pool of threads with one record each, or one thread with a ring of reads.
//!
//! A record is one request, never split: splitting only adds requests (docs/measurements.md). Threads
//! read on every system. A ring must be asked for, because it made decoding no faster (entry 9 there),
//! and where the system refuses one the threads take its place: [`Readers::reader`] says who reads.

use std::sync::Arc;
use std::thread::{self, JoinHandle};

use super::Inner;
use super::queue::{Begun, Job, Queue};
use super::read::read_exact_at;
use super::ring::{self, Ring};

/// Who reads records.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Reader {
    /// As many threads as reads in flight.
    Threads,
    /// One thread with io_uring; threads where the system has or allows none.
    Uring,
}

impl Reader {
    /// The name of the flag's value.
    pub fn name(self) -> &'static str {
        match self {
            Self::Threads => "threads",
            Self::Uring => "uring",
        }
    }
}

/// The running readers of a store; dropped, they end when the reads in flight are complete.
pub(super) struct Readers {
    pub queue: Arc<Queue>,
    /// Who reads, which may not be who was asked for.
    pub reader: Reader,
    threads: Vec<JoinHandle<()>>,
}

impl Readers {
    /// Starts readers with `depth` reads in flight at most.
    pub fn start(inner: &Arc<Inner>, reader: Reader, depth: usize) -> Self {
        match reader {
            Reader::Uring => match ring::open(inner, depth) {
                Ok((ring, bell)) => Self::start_ring(inner, ring, bell),
                Err(_) => Self::start_threads(inner, depth),
            },
            Reader::Threads => Self::start_threads(inner, depth),
        }
    }

    fn start_threads(inner: &Arc<Inner>, depth: usize) -> Self {
        let queue = Arc::new(Queue::default());
        let start = |index: usize| {
            let (queue, inner) = (Arc::clone(&queue), Arc::clone(inner));
            spawn(format!("reader-{index}"), move || serve(&queue, &inner))
        };
        let threads = (0..depth).map(start).collect();
        Self { queue, reader: Reader::Threads, threads }
    }

    /// Starts the thread of a ring.
    pub fn start_ring(inner: &Arc<Inner>, ring: Ring, bell: ring::Bell) -> Self {
        let queue = Arc::new(Queue::with_bell(bell));
        let (shared, inner) = (Arc::clone(&queue), Arc::clone(inner));
        let thread = spawn("reader-ring".into(), move || ring::serve(ring, &shared, &inner));
        Self { queue, reader: Reader::Uring, threads: vec![thread] }
    }
}

fn spawn(name: String, body: impl FnOnce() + Send + 'static) -> JoinHandle<()> {
    thread::Builder::new().name(name).spawn(body).expect("the system can start a thread")
}

impl Drop for Readers {
    fn drop(&mut self) {
        self.queue.stop();
        for thread in self.threads.drain(..) {
            // A reader that panicked has already printed why; the store is going away.
            let _ = thread.join();
        }
    }
}

fn serve(queue: &Queue, inner: &Inner) {
    while let Some(Begun { mut job, guess }) = queue.next() {
        let outcome = inner.read(&mut job);
        let next = inner.finish(job, outcome);
        queue.done(guess, next);
    }
}

impl Inner {
    /// Reads a job's record whole on this thread.
    pub(super) fn read(&self, job: &mut Job) -> std::io::Result<()> {
        let (file, _, offset) = self.locate(job.key);
        let block = Arc::get_mut(&mut job.block).expect("a slot being read is not shared");
        read_exact_at(&file.file, &mut block.bytes_mut()[..file.read_bytes], offset)
    }
}
