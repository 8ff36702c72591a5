//! Memory that everything on its way to the device passes through.
//!
//! A ring is a fixed number of pieces, made once, that this program writes and the device copies from. They
//! go round in the order in which they were handed over, and a piece is free again when the submission
//! that copies from it is over: only a ring whose oldest piece is still in use makes anybody wait.
//! Records are copied into their pieces by all compute threads, since one alone is slower than the way
//! to the device.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use wgpu::{Buffer, BufferViewMut, MapMode, SubmissionIndex, WriteOnly};

use super::device::Device;
use crate::error::{Error, Result};
use crate::pool::Pool;

/// Bytes that a thread copies at once.
pub const ITEM_BYTES: usize = 64 << 10;

/// Pieces of one size.
pub struct Ring {
    free: Mutex<VecDeque<Place>>, // the one that comes free next stands in front
    count: usize,
    waits: AtomicU64,
}

/// A piece that nobody holds.
struct Place {
    buffer: Buffer,
    mapped: Arc<AtomicBool>,
    last: Option<SubmissionIndex>, // that copies from it
}

/// A piece to be written and copied from; it goes back when it is dropped.
pub struct Piece<'g> {
    ring: &'g Ring,
    buffer: Buffer,
    mapped: Arc<AtomicBool>,
    /// The submission that copies from it.
    pub last: Option<SubmissionIndex>,
}

impl Ring {
    /// `count` pieces of `bytes`.
    ///
    /// # Errors
    /// There is not so much memory that both sides see.
    pub fn new(device: &Device, name: &str, count: usize, bytes: u64) -> Result<Self> {
        let piece = |_| {
            let buffer = device.staging(name, bytes)?;
            Ok(Place { buffer, mapped: Arc::new(AtomicBool::new(true)), last: None })
        };
        let free = (0..count).map(piece).collect::<Result<_>>()?;
        Ok(Self { free: Mutex::new(free), count, waits: AtomicU64::new(0) })
    }

    /// Pieces in all.
    pub fn count(&self) -> usize {
        self.count
    }

    /// How often nothing was free.
    pub fn waits(&self) -> u64 {
        self.waits.load(Ordering::Relaxed)
    }

    /// The piece that comes free next, waited for if need be.
    ///
    /// # Errors
    /// The device failed, or does not give it back.
    pub fn take(&self, device: &Device) -> Result<Piece<'_>> {
        let Some(place) = self.lock().pop_front() else {
            return Err(Error::Gpu(format!(
                "all {} pieces of the memory for uploads are held; give a larger --gpu-memory",
                self.count
            )));
        };
        let piece =
            Piece { ring: self, buffer: place.buffer, mapped: place.mapped, last: place.last };
        if !piece.is_mapped() {
            device.poll()?;
        }
        if !piece.is_mapped() {
            self.waits.fetch_add(1, Ordering::Relaxed);
            device.wait_for(piece.last.clone())?;
        }
        if !piece.is_mapped() {
            return Err(Error::Gpu(
                "the driver does not give memory for uploads back; give a smaller --gpu-memory"
                    .into(),
            ));
        }
        Ok(piece)
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<Place>> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Piece<'_> {
    fn is_mapped(&self) -> bool {
        self.mapped.load(Ordering::Acquire)
    }

    /// Its memory, as long as this program may write it.
    fn view(&self, bytes: usize) -> Result<BufferViewMut> {
        let view = self.buffer.slice(..bytes.next_multiple_of(4) as u64).get_mapped_range_mut();
        view.map_err(|e| Error::Gpu(format!("memory for uploads: {e}")))
    }

    /// Writes parts one behind the other.
    ///
    /// # Errors
    /// The driver refuses.
    pub fn write<'a>(&self, parts: impl Iterator<Item = &'a [u8]> + Clone) -> Result<()> {
        let mut view = self.view(parts.clone().map(<[u8]>::len).sum())?;
        let mut at = 0;
        for part in parts {
            view.slice(at..at + part.len()).copy_from_slice(part);
            at += part.len();
        }
        Ok(())
    }

    /// Gives its memory to the device, whose commands copy from what this returns.
    pub fn hand_over(&mut self) -> &Buffer {
        self.buffer.unmap();
        self.mapped.store(false, Ordering::Release);
        &self.buffer
    }
}

impl Drop for Piece<'_> {
    fn drop(&mut self) {
        let mapped = Arc::clone(&self.mapped);
        let place = Place { buffer: self.buffer.clone(), mapped, last: self.last.take() };
        if self.is_mapped() {
            self.ring.lock().push_front(place);
            return;
        }
        let mapped = Arc::clone(&self.mapped);
        self.buffer.map_async(MapMode::Write, .., move |outcome| {
            mapped.store(outcome.is_ok(), Ordering::Release);
        });
        self.ring.lock().push_back(place);
    }
}

/// A part of a record, and where it goes.
type Item<'a> = (WriteOnly<'a, [u8; ITEM_BYTES]>, &'a [u8]);

/// Copies each record into its piece.
///
/// # Errors
/// The driver refuses.
pub fn fill(pool: &Pool, records: &[(Piece, &[u8])]) -> Result<()> {
    let view = |(piece, record): &(Piece, &[u8])| piece.view(record.len());
    let mut views = records.iter().map(view).collect::<Result<Vec<_>>>()?;
    let mut items: Vec<Option<Item>> = Vec::new();
    for (view, (_, record)) in views.iter_mut().zip(records) {
        let (whole, mut rest) = view.slice(..record.len()).into_chunks();
        let from = record.chunks_exact(ITEM_BYTES);
        rest.copy_from_slice(from.remainder());
        items.extend(whole.into_iter().zip(from).map(Some));
    }
    pool.chunks(&mut items, 1, |_, item| {
        if let Some((to, from)) = item[0].take() {
            WriteOnly::<[u8]>::from(to).copy_from_slice(from);
        }
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::adapters::pick;

    #[test]
    fn pieces_go_round_and_one_that_cannot_be_had_is_an_error() {
        // Where there is no adapter `tests/gpu.rs` says that nothing was tested.
        let Ok((_, adapter)) = pick(Some(0)) else { return };
        let device = Device::open(&adapter.adapter).expect("a device");
        let ring = Ring::new(&device, "uploads", 2, 200_000).expect("memory");
        let to = device.buffer("what arrived", 200_000).expect("memory");
        let pool = Pool::new(2);
        for round in 0..7u8 {
            let sent: Vec<u8> = (0..200_000u32).map(|i| (i % 251) as u8 ^ round).collect();
            let filled = [(ring.take(&device).expect("a piece"), &sent[..])];
            fill(&pool, &filled).expect("mapped memory");
            let [(mut piece, _)] = filled;
            let mut encoder = device.encoder();
            encoder.copy_buffer_to_buffer(piece.hand_over(), 0, &to, 0, 200_000);
            piece.last = Some(device.submit_all([encoder.finish()]));
            drop(piece);
            let mut arrived = vec![0; sent.len()];
            device.read(&to, 0, &mut arrived).expect("the bytes");
            assert!(arrived == sent, "round {round}");
        }
        let held = [ring.take(&device), ring.take(&device)].map(|piece| piece.expect("a piece"));
        let error = ring.take(&device).err().expect("nothing left").to_string();
        assert!(error.contains("--gpu-memory"), "{error}");
        drop(held);
        ring.take(&device)
            .expect("one that nobody wrote")
            .write([&[1u8][..]].into_iter())
            .expect("it");
    }
}
