//! Worker threads for the forward pass.
//!
//! A layer needs a dozen parallel regions of tens of microseconds, so a region must start in less
//! than one: workers spin briefly after a region and park only when nothing follows. Work is handed
//! out in small items claimed from one counter, and the caller works too and closes the region when
//! the items are gone: a worker that the system has descheduled is never waited for unless it holds
//! an item. Results never depend on who computed an item.

#![allow(unsafe_code, reason = "a borrowed closure and disjoint chunks cross threads here only")]

use std::cell::UnsafeCell;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

/// Turns of the spin loop before a worker parks: about 50 microseconds.
const SPINS_BEFORE_PARK: u32 = 4000;
/// Turns of the spin loop before the caller yields its core to a worker that holds an item.
const SPINS_BEFORE_YIELD: u32 = 2000;

/// State word: epoch in the upper bits, whether the region is open, workers inside it.
const RUNNING_MASK: u64 = 0xffff;
const OPEN: u64 = 1 << 16;
const EPOCH: u64 = 1 << 17;

type Work<'a> = dyn Fn(usize) + Sync + 'a;

/// A fixed set of worker threads.
pub struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    /// One region at a time; sessions of several threads take turns.
    turn: Mutex<()>,
}

struct Shared {
    state: Line<AtomicU64>,
    next: Line<AtomicUsize>,
    job: UnsafeCell<Job>,
    parked: Vec<AtomicBool>,
    panicked: AtomicBool,
    stop: AtomicBool,
}

/// Alone on the cache lines that are fetched together: workers that wait for the one must not slow
/// those that claim items from the other.
#[derive(Default)]
#[repr(align(128))]
struct Line<T>(T);

impl<T> std::ops::Deref for Line<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.0
    }
}

#[derive(Clone, Copy)]
struct Job {
    work: *const Work<'static>,
    items: usize,
}

// SAFETY: `job` is written only while the region is closed and no worker is inside (`run`), and read
// only by workers that entered an open region; the state word's release/acquire orders the two.
unsafe impl Sync for Shared {}
// SAFETY: the raw pointer in `job` is only dereferenced inside a region, while `run` keeps the
// closure alive.
unsafe impl Send for Shared {}

impl Pool {
    /// A pool that computes with `threads` threads, the caller's included.
    pub fn new(threads: usize) -> Self {
        let helpers = threads.clamp(1, 1024) - 1;
        let idle: &Work<'static> = &|_| {};
        let shared = Arc::new(Shared {
            state: Line::default(),
            next: Line::default(),
            job: UnsafeCell::new(Job { work: idle, items: 0 }),
            parked: (0..helpers).map(|_| AtomicBool::new(false)).collect(),
            panicked: AtomicBool::new(false),
            stop: AtomicBool::new(false),
        });
        let spawn = |index: usize| {
            let shared = Arc::clone(&shared);
            let builder = thread::Builder::new().name(format!("compute-{index}"));
            builder.spawn(move || serve(&shared, index)).expect("the system can start a thread")
        };
        let workers = (0..helpers).map(spawn).collect();
        Self { shared, workers, turn: Mutex::new(()) }
    }

    /// Threads that compute, the caller's included.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `work` once for every item in `0..items`, on any thread, and returns when all are done.
    pub fn run(&self, items: usize, work: &(dyn Fn(usize) + Sync)) {
        if items <= 1 || self.workers.is_empty() {
            (0..items).for_each(work);
            return;
        }
        let turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let region = Region::open(self, turn, work, items);
        self.shared.claim_items(work, items);
        drop(region);
        if self.shared.panicked.swap(false, Ordering::Relaxed) {
            panic!("a compute thread panicked");
        }
    }

    /// Splits `out` into chunks of `chunk` elements and calls `work(chunk index, chunk)` on each.
    pub fn chunks<T: Send>(
        &self,
        out: &mut [T],
        chunk: usize,
        work: impl Fn(usize, &mut [T]) + Sync,
    ) {
        let chunks = Chunks::new(out, chunk);
        // SAFETY: every item index is handed out once, so no chunk is borrowed twice.
        self.run(chunks.count(), &|i| work(i, unsafe { chunks.get(i) }));
    }

    /// As [`Pool::chunks`] over parts of any length: part i ends at `ends[i]` and begins where the one
    /// before it ended.
    pub fn parts<T: Send>(
        &self,
        out: &mut [T],
        ends: &[usize],
        work: impl Fn(usize, &mut [T]) + Sync,
    ) {
        assert!(
            ends.is_sorted() && ends.last().is_none_or(|end| *end <= out.len()),
            "ends of parts"
        );
        let all = Chunks::new(out, 1);
        self.run(ends.len(), &|i| {
            let start = if i == 0 { 0 } else { ends[i - 1] };
            // SAFETY: every item index is handed out once and parts do not overlap.
            work(i, unsafe { all.range(start..ends[i]) });
        });
    }

    /// As [`Pool::chunks`] over two slices split into the same number of chunks.
    pub fn chunks2<A: Send, B: Send>(
        &self,
        a: (&mut [A], usize),
        b: (&mut [B], usize),
        work: impl Fn(usize, &mut [A], &mut [B]) + Sync,
    ) {
        let (a, b) = (Chunks::new(a.0, a.1), Chunks::new(b.0, b.1));
        assert_eq!(a.count(), b.count(), "both slices split into the same number of chunks");
        // SAFETY: every item index is handed out once, so no chunk is borrowed twice.
        self.run(a.count(), &|i| work(i, unsafe { a.get(i) }, unsafe { b.get(i) }));
    }

    /// As [`Pool::chunks2`] over three slices.
    pub fn chunks3<A: Send, B: Send, C: Send>(
        &self,
        a: (&mut [A], usize),
        b: (&mut [B], usize),
        c: (&mut [C], usize),
        work: impl Fn(usize, &mut [A], &mut [B], &mut [C]) + Sync,
    ) {
        self.chunks4(a, b, c, (&mut [] as &mut [u8], 1), |i, a, b, c, _| work(i, a, b, c));
    }

    /// As [`Pool::chunks`] over four slices; one that is empty gives empty chunks.
    pub fn chunks4<A: Send, B: Send, C: Send, D: Send>(
        &self,
        a: (&mut [A], usize),
        b: (&mut [B], usize),
        c: (&mut [C], usize),
        d: (&mut [D], usize),
        work: impl Fn(usize, &mut [A], &mut [B], &mut [C], &mut [D]) + Sync,
    ) {
        let (a, b) = (Chunks::new(a.0, a.1), Chunks::new(b.0, b.1));
        let (c, d) = (Chunks::new(c.0, c.1), Chunks::new(d.0, d.1));
        for count in [b.count(), c.count(), d.count()] {
            assert!(
                count == 0 || count == a.count(),
                "slices split into the same number of chunks"
            );
        }
        self.run(a.count(), &|i| {
            // SAFETY: every item index is handed out once, so no chunk is borrowed twice.
            let (a, b) = unsafe { (a.get(i), b.get_or_empty(i)) };
            // SAFETY: as above.
            let (c, d) = unsafe { (c.get_or_empty(i), d.get_or_empty(i)) };
            work(i, a, b, c, d);
        });
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        for worker in self.workers.drain(..) {
            worker.thread().unpark();
            // A worker's panic was already reported by the region it happened in.
            let _ = worker.join();
        }
    }
}

/// An open region; closing it waits for the workers that are inside.
struct Region<'a> {
    shared: &'a Shared,
    _turn: MutexGuard<'a, ()>,
}

impl<'a> Region<'a> {
    fn open(pool: &'a Pool, turn: MutexGuard<'a, ()>, work: &Work<'_>, items: usize) -> Self {
        let shared = &*pool.shared;
        // SAFETY: the lifetime is erased, but the region's drop waits for every worker inside
        // before `run` returns, so the closure outlives its uses.
        let work: *const Work<'static> =
            unsafe { std::mem::transmute::<&Work<'_>, &'static Work<'static>>(work) };
        shared.next.store(0, Ordering::Relaxed);
        // SAFETY: the last region is closed and empty, and `turn` keeps other callers out.
        unsafe { *shared.job.get() = Job { work, items } };
        // Added, not stored: a worker that came late to the last region may still be counted.
        shared.state.fetch_add(EPOCH + OPEN, Ordering::SeqCst);
        for (flag, worker) in shared.parked.iter().zip(&pool.workers).take(items - 1) {
            if flag.load(Ordering::SeqCst) {
                worker.thread().unpark();
            }
        }
        Self { shared, _turn: turn }
    }
}

impl Drop for Region<'_> {
    fn drop(&mut self) {
        self.shared.state.fetch_and(!OPEN, Ordering::AcqRel);
        let mut spins = 0;
        while self.shared.state.load(Ordering::Acquire) & RUNNING_MASK != 0 {
            spins += 1;
            if spins < SPINS_BEFORE_YIELD { std::hint::spin_loop() } else { thread::yield_now() }
        }
    }
}

impl Shared {
    fn claim_items(&self, work: &Work<'_>, items: usize) {
        loop {
            let item = self.next.fetch_add(1, Ordering::Relaxed);
            if item >= items {
                return;
            }
            work(item);
        }
    }

    /// Enters the region that is open, if it is not the one of epoch `seen`; gives its epoch. Adds
    /// without looking first, since many workers come at once and a failed exchange costs as much.
    fn enter(&self, seen: u64) -> Option<u64> {
        let state = self.state.fetch_add(1, Ordering::AcqRel);
        let epoch = state & !(OPEN | RUNNING_MASK);
        if state & OPEN != 0 && epoch != seen {
            return Some(epoch);
        }
        self.state.fetch_sub(1, Ordering::AcqRel);
        None
    }
}

fn serve(shared: &Shared, index: usize) {
    let mut seen = 0;
    let mut spins = 0;
    while !shared.stop.load(Ordering::Acquire) {
        let state = shared.state.load(Ordering::SeqCst);
        let epoch = state & !(OPEN | RUNNING_MASK);
        if state & OPEN != 0 && epoch != seen {
            if let Some(entered) = shared.enter(seen) {
                seen = entered;
                help(shared);
                spins = 0;
            }
            continue;
        }
        spins += 1;
        if spins < SPINS_BEFORE_PARK {
            std::hint::spin_loop();
            continue;
        }
        shared.parked[index].store(true, Ordering::SeqCst);
        // A region that opened between the last look and the flag would not unpark this thread.
        if shared.state.load(Ordering::SeqCst) & !RUNNING_MASK == seen & !RUNNING_MASK
            || shared.state.load(Ordering::SeqCst) & OPEN == 0
        {
            thread::park();
        }
        shared.parked[index].store(false, Ordering::SeqCst);
        spins = 0;
    }
}

fn help(shared: &Shared) {
    // SAFETY: this thread is counted inside an open region, so `job` is not being written and the
    // closure it points to is alive.
    let (work, items) = unsafe {
        let job = *shared.job.get();
        (&*job.work, job.items)
    };
    let outcome = catch_unwind(AssertUnwindSafe(|| shared.claim_items(work, items)));
    if outcome.is_err() {
        shared.panicked.store(true, Ordering::Relaxed);
    }
    shared.state.fetch_sub(1, Ordering::AcqRel);
    if let Err(panic) = outcome {
        resume_unwind(panic);
    }
}

/// A slice that threads borrow in disjoint chunks.
struct Chunks<T> {
    start: *mut T,
    len: usize,
    chunk: usize,
}

// SAFETY: `get` hands each chunk to one thread only (its contract), and `T: Send`.
unsafe impl<T: Send> Sync for Chunks<T> {}

impl<T> Chunks<T> {
    fn new(slice: &mut [T], chunk: usize) -> Self {
        assert!(chunk > 0, "chunks are not empty");
        Self { start: slice.as_mut_ptr(), len: slice.len(), chunk }
    }

    fn count(&self) -> usize {
        self.len.div_ceil(self.chunk)
    }

    /// # Safety
    /// As [`Chunks::get`], unless the slice is empty.
    #[expect(clippy::mut_from_ref, reason = "the contract makes the chunks disjoint")]
    unsafe fn get_or_empty(&self, index: usize) -> &mut [T] {
        // SAFETY: the caller's contract.
        if self.len == 0 { &mut [] } else { unsafe { self.get(index) } }
    }

    /// # Safety
    /// Each index is asked for at most once while the slice is borrowed.
    #[expect(clippy::mut_from_ref, reason = "the contract makes the chunks disjoint")]
    unsafe fn get(&self, index: usize) -> &mut [T] {
        let from = index * self.chunk;
        assert!(from < self.len, "chunk index within the slice");
        // SAFETY: the caller's contract makes the chunks disjoint.
        unsafe { self.range(from..self.len.min(from + self.chunk)) }
    }

    /// # Safety
    /// No two ranges that are alive together overlap.
    #[expect(clippy::mut_from_ref, reason = "the contract makes the ranges disjoint")]
    unsafe fn range(&self, range: Range<usize>) -> &mut [T] {
        assert!(range.start <= range.end && range.end <= self.len, "range within the slice");
        // SAFETY: the range is within the slice, and by the contract no other reference to it exists.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(range.start), range.len()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_disjoint_and_in_order() {
        for threads in [1, 3] {
            let pool = Pool::new(threads);
            let mut out = vec![9; 12];
            pool.parts(&mut out, &[3, 3, 4, 10], |i, part| part.fill(i));
            assert_eq!(out, [0, 0, 0, 2, 3, 3, 3, 3, 3, 3, 9, 9]);
            pool.parts(&mut out, &[], |_, _| unreachable!("no parts"));
        }
    }

    #[test]
    fn every_item_is_done_exactly_once_in_every_region() {
        for threads in [1, 2, 5] {
            let pool = Pool::new(threads);
            for round in 0..2000usize {
                let mut done = vec![0u32; round % 37];
                pool.chunks(&mut done, 1 + round % 5, |_, chunk| {
                    chunk.iter_mut().for_each(|d| *d += 1);
                });
                assert!(done.iter().all(|&d| d == 1), "threads {threads} round {round}");
            }
        }
    }

    #[test]
    fn regions_after_a_pause_find_parked_workers() {
        let pool = Pool::new(3);
        for _ in 0..5 {
            let mut out = vec![0usize; 64];
            pool.chunks(&mut out, 1, |i, chunk| chunk[0] = i);
            assert_eq!(out, (0..64).collect::<Vec<_>>());
            thread::park_timeout(std::time::Duration::from_millis(3));
        }
    }

    #[test]
    fn callers_of_several_threads_take_turns() {
        let pool = Pool::new(2);
        thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    for _ in 0..300 {
                        let mut out = vec![0usize; 20];
                        pool.chunks(&mut out, 3, |i, c| c.fill(i));
                        assert_eq!(out[19], 6);
                    }
                });
            }
        });
    }

    #[test]
    fn a_panic_in_an_item_reaches_the_caller() {
        let pool = Pool::new(2);
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            pool.run(64, &|i| assert!(i != 40, "item 40"));
        }));
        assert!(outcome.is_err());
    }

    #[test]
    fn two_slices_are_split_alike() {
        let pool = Pool::new(2);
        let (mut a, mut b) = (vec![0u8; 10], vec![0u16; 20]);
        pool.chunks2((&mut a, 1), (&mut b, 2), |i, a, b| {
            a[0] = i as u8;
            b.fill(i as u16);
        });
        assert_eq!(b, (0..10).flat_map(|i| [i, i]).collect::<Vec<u16>>());
        assert_eq!(a, (0..10).collect::<Vec<u8>>());
    }
}
