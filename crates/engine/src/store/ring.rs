//! One thread with a ring of reads: io_uring on Linux.
//!
//! The thread sleeps in the system until a read is complete or the bell is rung, then hands out what
//! landed and begins what was asked for. A block in flight belongs to the ring until its completion
//! has been seen, also when the store or the thread ends. A read that the ring did not make whole is
//! made again by a plain one on this thread, which decides: retries, short reads and the words of an
//! error are those of the reader threads.

#![allow(unsafe_code, reason = "the system writes to blocks while their reads are in flight")]

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

use io_uring::{IoUring, Probe, opcode, squeue, types};
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use smallvec::SmallVec;

use super::Inner;
use super::queue::{Begun, Place, Queue};
use super::slots::SlotId;
use crate::memory::Block;

/// Wakes the ring's thread from any other.
pub struct Bell(OwnedFd);

/// Of the bell among the completions; reads have their place in `flights`.
const BELL: u64 = u64::MAX;
/// Buffers that the system lets a ring register.
const REGISTERED_MAX: usize = 1 << 14;

/// Reads in flight and the ring that makes them.
pub struct Ring {
    uring: IoUring,
    flights: Vec<Option<Flight>>, // [depth]
    /// Whether the layer files are registered, in the store's order.
    files: bool,
    /// Address of the block that is registered for a slot; 0: none. Empty: the system refuses.
    registered: Vec<usize>, // [slots]
}

/// A read in flight: nobody touches the block until its completion has been seen.
struct Flight {
    begun: Begun,
    read_bytes: usize,
}

/// A ring of `depth` reads over the store's files.
///
/// # Errors
/// The system has no ring, allows none here, or one that cannot read.
pub fn open(inner: &Inner, depth: usize) -> io::Result<(Ring, Bell)> {
    let uring = IoUring::builder().dontfork().build(depth as u32 + 1)?;
    let mut probe = Probe::new();
    uring.submitter().register_probe(&mut probe)?;
    let needed = [opcode::Read::CODE, opcode::ReadFixed::CODE, opcode::PollAdd::CODE];
    if !needed.into_iter().all(|code| probe.is_supported(code)) {
        return Err(io::ErrorKind::Unsupported.into());
    }
    let files: Vec<_> = inner.files.iter().map(|file| file.file.as_raw_fd()).collect();
    let files = uring.submitter().register_files(&files).is_ok();
    let slots = inner.lock().slots.count().min(REGISTERED_MAX);
    let sparse = uring.submitter().register_buffers_sparse(slots as u32);
    let registered = if sparse.is_ok() { vec![0; slots] } else { Vec::new() };
    let bell = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
    let flights = (0..depth).map(|_| None).collect();
    Ok((Ring { uring, flights, files, registered }, Bell(bell)))
}

/// Reads what is queued until the queue says stop and nothing is in flight.
pub fn serve(mut ring: Ring, queue: &Queue, inner: &Inner) {
    let bell = queue.bell.as_ref().expect("a queue with a ring has a bell");
    ring.listen(bell);
    loop {
        let free = ring.flights.len() - ring.in_flight();
        let go_on = queue.take(free, |begun| ring.begin(begun, inner));
        if !go_on && ring.in_flight() == 0 {
            return;
        }
        if let Err(error) = ring.wait() {
            ring.give_up(&error, queue, inner);
            return serve_plainly(bell, queue, inner);
        }
        for (tag, result) in ring.completions() {
            match tag {
                BELL => {
                    bell.hush();
                    ring.listen(bell);
                }
                place => ring.land(place as usize, result, queue, inner),
            }
        }
    }
}

/// One plain read after another, for a ring that the system has taken away.
fn serve_plainly(bell: &Bell, queue: &Queue, inner: &Inner) {
    let read = |begun: Begun| {
        let Begun { mut job, guess } = begun;
        let outcome = inner.read(&mut job);
        let next = inner.finish(job, outcome);
        queue.done(guess, next);
    };
    while queue.take(usize::MAX, read) {
        bell.wait();
        bell.hush();
    }
}

impl Bell {
    /// Wakes the ring's thread, now or when it next waits.
    pub fn ring(&self) {
        // It fails only when the count is full, and then it is ringing.
        let _ = rustix::io::write(&self.0, &1u64.to_ne_bytes());
    }

    fn hush(&self) {
        // It fails only when nothing was rung.
        let _ = rustix::io::read(&self.0, &mut [0; size_of::<u64>()]);
    }

    fn wait(&self) {
        // An interrupted wait is only a look at the queue too many.
        let _ = poll(&mut [PollFd::new(&self.0, PollFlags::IN)], None);
    }
}

impl Ring {
    fn in_flight(&self) -> usize {
        self.flights.iter().flatten().count()
    }

    /// Asks for a completion when the bell is rung.
    fn listen(&mut self, bell: &Bell) {
        let interest = libc::POLLIN as u32;
        let entry = opcode::PollAdd::new(types::Fd(bell.0.as_raw_fd()), interest).build();
        // SAFETY: a poll names no memory, and the queue owns the bell for longer than the ring.
        unsafe { self.push(&entry.user_data(BELL)) };
    }

    fn begin(&mut self, mut begun: Begun, inner: &Inner) {
        let ordinal = begun.job.key.0 as usize / inner.experts;
        let (file, _, offset) = inner.locate(begun.job.key);
        let read_bytes = file.read_bytes;
        let block = Arc::get_mut(&mut begun.job.block).expect("a slot being read is not shared");
        let registered = match begun.job.place {
            Place::Slot(slot) => self.register(slot, block),
            Place::Lent(_) => None,
        };
        let (fd, flags) = match self.files {
            true => (types::Fd(ordinal as i32), squeue::Flags::FIXED_FILE),
            false => (types::Fd(file.file.as_raw_fd()), squeue::Flags::empty()),
        };
        let address = block.bytes_mut()[..read_bytes].as_mut_ptr();
        let bytes = read_bytes as u32; // A longer record comes up short and is read plainly.
        let entry = match registered {
            Some(index) => opcode::ReadFixed::new(fd, address, bytes, index).offset(offset).build(),
            None => opcode::Read::new(fd, address, bytes).offset(offset).build(),
        };
        let place = self.flights.iter().position(Option::is_none).expect("taken only when free");
        self.flights[place] = Some(Flight { begun, read_bytes });
        // SAFETY: the bounds of the memory were checked by the slice above. The flight owns the block
        // alone and keeps it where it is; `land` and `drop` give it up only after its completion, and
        // `give_up` and a `drop` that cannot wait never do.
        unsafe { self.push(&entry.flags(flags).user_data(place as u64)) };
        // Begun before the next block is made ready: pages of a new block take longer than a call.
        // What cannot be begun now is begun by `wait`, which also tells errors apart.
        let _ = self.uring.submit();
    }

    /// The index under which a slot's block is registered, if it is.
    fn register(&mut self, slot: SlotId, block: &mut Block) -> Option<u16> {
        let known = self.registered.get_mut(slot.0 as usize)?;
        let bytes = block.bytes_mut();
        let address = bytes.as_mut_ptr();
        if *known != address.addr() {
            let buffer = libc::iovec { iov_base: address.cast(), iov_len: bytes.len() };
            // SAFETY: registering pins pages and writes nothing. The slot keeps this block for as long
            // as the store lives, and a block at another address is registered again.
            let update =
                unsafe { self.uring.submitter().register_buffers_update(slot.0, &[buffer], None) };
            if update.is_err() {
                // The limit of locked memory: what is registered so far is all there will be.
                self.registered.truncate(0);
                return None;
            }
            *known = address.addr();
        }
        Some(slot.0 as u16)
    }

    /// Queues an entry for the next call of the system.
    ///
    /// # Safety
    /// The memory that the entry names stays valid and untouched until its completion.
    unsafe fn push(&mut self, entry: &squeue::Entry) {
        // SAFETY: passed on to the caller.
        let pushed = unsafe { self.uring.submission().push(entry) };
        pushed.expect("the ring has room for every flight and the bell");
    }

    /// Begins what was queued and waits for a completion.
    fn wait(&self) -> io::Result<()> {
        loop {
            match self.uring.submit_and_wait(1) {
                Ok(_) => return Ok(()),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                // Short of memory at this moment, or completions to be taken first.
                Err(e) if matches!(e.raw_os_error(), Some(libc::EAGAIN | libc::EBUSY)) => {
                    std::thread::yield_now();
                    return Ok(());
                }
                Err(e) => return Err(e),
            }
        }
    }

    fn completions(&mut self) -> SmallVec<[(u64, i32); 16]> {
        self.uring.completion().map(|entry| (entry.user_data(), entry.result())).collect()
    }

    fn land(&mut self, place: usize, result: i32, queue: &Queue, inner: &Inner) {
        let flight = self.flights[place].take().expect("a completion of a read in flight");
        let Begun { mut job, guess } = flight.begun;
        let whole = usize::try_from(result).is_ok_and(|bytes| bytes == flight.read_bytes);
        let outcome = if whole { Ok(()) } else { inner.read(&mut job) };
        let next = inner.finish(job, outcome);
        queue.done(guess, next);
    }

    /// Fails what is in flight. The system may still write to its blocks, so they are never freed.
    fn give_up(&mut self, error: &io::Error, queue: &Queue, inner: &Inner) {
        for flight in self.flights.iter_mut().filter_map(Option::take) {
            let Begun { mut job, guess } = flight.begun;
            let fresh = Arc::new(Block::zeroed(job.block.bytes().len()));
            std::mem::forget(std::mem::replace(&mut job.block, fresh));
            let next = inner.finish(job, Err(io::Error::new(error.kind(), error.to_string())));
            queue.done(guess, next);
        }
    }
}

impl Drop for Ring {
    /// Only a thread that panicked has reads in flight here.
    fn drop(&mut self) {
        while self.in_flight() > 0 {
            if self.wait().is_err() {
                self.flights.drain(..).flatten().for_each(std::mem::forget);
                return;
            }
            for (tag, _) in self.completions() {
                if let Some(flight) = self.flights.get_mut(tag as usize) {
                    *flight = None;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;
    use crate::container::Container;
    use crate::error::Error;
    use crate::shape::{ExpertId, LayerId};
    use crate::store::readers::Readers;
    use crate::store::{ExpertStore, IoMode, Reader, StoreOptions};

    const ALL: [ExpertId; 4] = [ExpertId(3), ExpertId(40), ExpertId(7), ExpertId(0)];

    /// A store on the built-in model that reads with a ring changed by `change`; `None` without rings.
    fn store(change: impl FnOnce(&mut Ring)) -> Option<ExpertStore> {
        let tiny = concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/tiny");
        let container = Container::open(tiny.as_ref()).expect("the built-in model");
        let (io, reader) = (IoMode::Auto, Reader::Threads);
        let options = StoreOptions { slots: 8, readers: 2, reader, io, spare_bytes: 0 };
        let mut store = ExpertStore::open(&container, options).expect("a store");
        let Ok((mut ring, bell)) = open(&store.inner, 2) else {
            writeln!(io::stderr(), "SKIP: this system has no rings").expect("standard error");
            return None;
        };
        change(&mut ring);
        store.readers = Readers::start_ring(&store.inner, ring, bell);
        Some(store)
    }

    fn records(store: &ExpertStore, layer: u16) -> crate::error::Result<Vec<u8>> {
        let mut fetch = store.fetch(LayerId(layer), &ALL);
        let mut bytes = Vec::new();
        while let Some(record) = fetch.next_in_order()? {
            bytes.extend_from_slice(&record);
        }
        Ok(bytes)
    }

    #[test]
    fn registered_or_not_the_bytes_are_the_same() {
        let Some(plain) = store(|ring| (ring.files, ring.registered) = (false, Vec::new())) else {
            return;
        };
        let registered = store(|_| {}).expect("there was one");
        for layer in [0, 5, 11, 0] {
            assert!(records(&plain, layer).unwrap() == records(&registered, layer).unwrap());
        }
    }

    #[test]
    fn a_ring_taken_away_fails_what_was_in_flight_and_plain_reads_follow() {
        let take_away = |ring: &mut Ring| {
            let null = std::fs::File::open("/dev/null").expect("a file that is no ring");
            // SAFETY: the number stays open, so whoever owns it closes what it owns.
            let number = unsafe { libc::dup2(null.as_raw_fd(), ring.uring.as_raw_fd()) };
            assert_eq!(number, ring.uring.as_raw_fd());
        };
        let Some(lost) = store(take_away) else { return };
        // The thread may have noticed before it was asked for anything; then nothing fails.
        match records(&lost, 5) {
            Ok(_) => {}
            Err(Error::Record { layer, .. }) => assert_eq!(layer, LayerId(5)),
            Err(other) => panic!("{other}"),
        }
        let whole = store(|_| {}).expect("there was one");
        for layer in [5, 0, 5] {
            assert!(records(&lost, layer).unwrap() == records(&whole, layer).unwrap());
        }
    }
}
