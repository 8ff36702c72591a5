//! Who reads: a pool of threads with one record each, or one thread with a ring of reads.
//!
//! A record is one request, never split: splitting only adds requests (docs/measurements.md). Threads
//! read everywhere; a ring reads where the system has one, and where it refuses one the threads take
//! its place without a word but in [`Readers::name`].

use std::sync::Arc;
use std::thread::{self, JoinHandle};

use super::Inner;
use super::queue::{Begun, Job, Queue};
use super::read::read_exact_at;
use super::ring::{self, Ring};

/// Who reads records.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Reader {
    /// What was measured to be the better one: the ring for direct reads, threads for buffered ones,
    /// whose copies they share among them (docs/measurements.md).
    Auto,
    /// One thread with io_uring, where the system has it.
    Uring,
    /// As many threads as reads in flight.
    Threads,
}

impl Reader {
    /// The name of the flag's value.
    pub fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Uring => "uring",
            Self::Threads => "threads",
        }
    }

    /// What `auto` means for direct reads and for buffered ones.
    pub(super) fn resolve(self, direct: bool) -> Self {
        match (self, direct) {
            (Self::Auto, true) => Self::Uring,
            (Self::Auto, false) => Self::Threads,
            (named, _) => named,
        }
    }
}

/// The running readers of a store; dropped, they end when the reads in flight are complete.
pub(super) struct Readers {
    pub queue: Arc<Queue>,
    /// [`Reader::Uring`] or [`Reader::Threads`].
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
            _ => Self::start_threads(inner, depth),
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
        inner.finish(job, outcome);
        if guess {
            queue.guess_done();
        }
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
