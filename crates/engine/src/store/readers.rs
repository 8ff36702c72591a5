//! Reader threads: each takes one record at a time and reads it whole.
//!
//! A record is one request, never split: splitting only adds requests (docs/measurements.md). Direct
//! reads bypass the page cache where the file system allows it; where it does not, `auto` reads
//! through the cache and `direct` is refused.

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

use super::read::read_exact_at;
use super::slots::{Key, Purpose, SlotId};
use super::{Inner, LayerFile};
use crate::container::Container;
use crate::error::{Error, Result};
use crate::memory::{Block, PAGE_BYTES};

/// Through the page cache or past it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum IoMode {
    /// Past the page cache; refused where the file system cannot.
    Direct,
    /// Through the page cache.
    Buffered,
    /// Direct where it works, buffered elsewhere.
    Auto,
}

impl IoMode {
    /// The name of the flag's value.
    pub fn name(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Buffered => "buffered",
            Self::Auto => "auto",
        }
    }
}

pub(super) struct Job {
    pub key: Key,
    pub slot: SlotId,
    pub block: Arc<Block>,
    /// A guess may be withdrawn before it begins.
    pub purpose: Purpose,
}

pub(super) struct Readers {
    queue: Arc<Queue>,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Default)]
struct Queue {
    jobs: Mutex<Jobs>,
    ready: Condvar,
}

#[derive(Default)]
struct Jobs {
    wanted: VecDeque<Job>,
    guessed: VecDeque<Job>,
    guesses_running: usize,
    stop: bool,
}

/// Readers that may be busy with guesses: the others stay free for what a token waits for.
pub(super) const GUESSES_RUNNING_MAX: usize = 2;

impl Readers {
    pub fn start(inner: &Arc<Inner>, threads: usize) -> Self {
        let queue = Arc::new(Queue::default());
        let spawn = |index: usize| {
            let (queue, inner) = (Arc::clone(&queue), Arc::clone(inner));
            let builder = thread::Builder::new().name(format!("reader-{index}"));
            builder.spawn(move || serve(&queue, &inner)).expect("the system can start a thread")
        };
        let threads = (0..threads).map(spawn).collect();
        Self { queue, threads }
    }

    /// Queues a read that somebody waits for.
    pub fn submit(&self, job: Job) {
        self.queue.lock().wanted.push_back(job);
        self.queue.ready.notify_one();
    }

    /// Queues a read that is made only when nobody waits for another.
    pub fn submit_guess(&self, job: Job) {
        self.queue.push_guess(job);
    }

    /// Moves a queued guess to the reads that somebody waits for; `false` if it is not queued.
    pub fn promote(&self, slot: SlotId, purpose: Purpose) -> bool {
        let mut jobs = self.queue.lock();
        let place = jobs.guessed.iter().position(|job| job.slot == slot);
        let job = place.and_then(|place| jobs.guessed.remove(place));
        let found = job.is_some();
        jobs.wanted.extend(job.map(|job| Job { purpose, ..job }));
        found
    }

    /// Takes back every guess of lookahead that has not begun.
    pub fn withdraw_guesses(&self) -> VecDeque<Job> {
        let mut jobs = self.queue.lock();
        let guessed = std::mem::take(&mut jobs.guessed);
        let (guesses, kept) = guessed.into_iter().partition(|job| job.purpose == Purpose::Guess);
        jobs.guessed = kept;
        guesses
    }
}

impl Drop for Readers {
    fn drop(&mut self) {
        {
            let mut jobs = self.queue.lock();
            jobs.wanted.clear();
            jobs.guessed.clear();
            jobs.stop = true;
        }
        self.queue.ready.notify_all();
        for thread in self.threads.drain(..) {
            // A reader that panicked has already printed why; the store is going away.
            let _ = thread.join();
        }
    }
}

impl Queue {
    fn lock(&self) -> std::sync::MutexGuard<'_, Jobs> {
        self.jobs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn push_guess(&self, job: Job) {
        let mut jobs = self.lock();
        // What a token may need in a moment goes before what warms the pool up.
        let kept = jobs.guessed.iter().position(|j| j.purpose != Purpose::Guess);
        let place = kept.filter(|_| job.purpose == Purpose::Guess).unwrap_or(jobs.guessed.len());
        jobs.guessed.insert(place, job);
        drop(jobs);
        self.ready.notify_one();
    }

    /// The next read, and whether it is a guess.
    fn next(&self) -> Option<(Job, bool)> {
        let mut jobs = self.lock();
        loop {
            if jobs.stop {
                return None;
            }
            if let Some(job) = jobs.wanted.pop_front() {
                return Some((job, false));
            }
            if jobs.guesses_running < GUESSES_RUNNING_MAX
                && let Some(job) = jobs.guessed.pop_front()
            {
                jobs.guesses_running += 1;
                return Some((job, true));
            }
            jobs = self.ready.wait(jobs).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn guess_done(&self) {
        self.lock().guesses_running -= 1;
        self.ready.notify_one();
    }
}

fn serve(queue: &Queue, inner: &Inner) {
    while let Some((mut job, guess)) = queue.next() {
        let (file, _, offset) = inner.locate(job.key);
        let block = Arc::get_mut(&mut job.block).expect("a slot being read is not shared");
        let buffer = &mut block.bytes_mut()[..file.read_bytes];
        let outcome = read_exact_at(&file.file, buffer, offset);
        let next = inner.finish(job, outcome);
        if guess {
            queue.guess_done();
        }
        if let Some(next) = next {
            queue.push_guess(next);
        }
    }
}

/// Opens every layer file; says whether reads are direct.
pub(super) fn open_files(container: &Container, io: IoMode) -> Result<(Vec<LayerFile>, bool)> {
    let entries = container.manifest().experts.iter().zip(container.layouts());
    let aligned = container
        .manifest()
        .experts
        .iter()
        .all(|entry| entry.stride_bytes.is_multiple_of(PAGE_BYTES));
    let first = container.manifest().experts.first().map(|e| container.dir().join(&e.file));
    let direct = match (io, &first) {
        (IoMode::Buffered, _) | (_, None) => false,
        (_, Some(path)) => aligned && direct_reads_work(path),
    };
    if io == IoMode::Direct && !direct {
        return Err(Error::Container(format!(
            "{}: direct reads do not work here (file system or record alignment); use --io auto",
            container.dir().display()
        )));
    }
    let mut files = Vec::new();
    for (entry, layout) in entries {
        let path = container.dir().join(&entry.file);
        let file = open(&path, direct).map_err(|e| Error::io(&path, e))?;
        let padded = entry.stride_bytes.is_multiple_of(PAGE_BYTES);
        files.push(LayerFile {
            layer: entry.layer,
            path,
            file,
            stride_bytes: entry.stride_bytes,
            read_bytes: if padded { layout.padded_bytes() } else { layout.record_bytes() },
        });
    }
    Ok((files, direct))
}

/// Some file systems take the flag when opening and refuse the first read, so one page is read.
pub(super) fn direct_reads_work(path: &Path) -> bool {
    let Ok(file) = open(path, true) else { return false };
    let mut page = Block::zeroed(PAGE_BYTES);
    read_exact_at(&file, page.bytes_mut(), 0).is_ok()
}

#[cfg(any(target_os = "linux", target_os = "android", target_os = "freebsd"))]
pub(super) fn open(path: &Path, direct: bool) -> std::io::Result<File> {
    use std::os::unix::fs::OpenOptionsExt;
    let mut options = OpenOptions::new();
    options.read(true);
    if direct {
        options.custom_flags(rustix::fs::OFlags::DIRECT.bits().cast_signed());
    }
    options.open(path)
}

#[cfg(target_vendor = "apple")]
pub(super) fn open(path: &Path, direct: bool) -> std::io::Result<File> {
    let file = OpenOptions::new().read(true).open(path)?;
    if direct {
        rustix::fs::fcntl_nocache(&file, true)?;
    }
    Ok(file)
}

#[cfg(windows)]
pub(super) fn open(path: &Path, direct: bool) -> std::io::Result<File> {
    use std::os::windows::fs::OpenOptionsExt;
    /// FILE_FLAG_NO_BUFFERING of CreateFileW.
    const NO_BUFFERING: u32 = 0x2000_0000;
    let mut options = OpenOptions::new();
    options.read(true);
    if direct {
        options.custom_flags(NO_BUFFERING);
    }
    options.open(path)
}

#[cfg(not(any(
    target_os = "linux",
    target_os = "android",
    target_os = "freebsd",
    target_vendor = "apple",
    windows
)))]
pub(super) fn open(path: &Path, direct: bool) -> std::io::Result<File> {
    if direct {
        return Err(std::io::ErrorKind::Unsupported.into());
    }
    OpenOptions::new().read(true).open(path)
}
