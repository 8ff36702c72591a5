//! Video memory that this program writes where kernels read it.
//!
//! Where the processor sees all memory of an adapter, because both have the same or because a card shows all
//! of its own on the bus, a record goes to its slot without memory for uploads in between. wgpu lends a
//! buffer to one side at a time; a window is mapped below wgpu for as long as it lives, and kernels may read
//! other parts of it while this program, or a disk, writes one. Which parts no kernel reads is for the owner
//! of the window to know; that no part is written twice at once is seen to here.

#![allow(unsafe_code, reason = "memory that wgpu does not lend while kernels have the buffer")]

use std::ops::{Deref, DerefMut, Range};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

#[cfg(target_vendor = "apple")]
use wgpu::hal::api::Metal as Native;
#[cfg(not(target_vendor = "apple"))]
use wgpu::hal::api::Vulkan as Native;
use wgpu::{Adapter, Buffer, hal};

use super::device::own_memory;
use super::ring::ITEM_BYTES;
use crate::error::{Error, Result};
use crate::memory::{Block, PAGE_BYTES};
use crate::pool::Pool;

/// Whether the processor sees all of an adapter's memory.
pub fn is_seen(adapter: &Adapter) -> bool {
    let shares = match own_memory(adapter) {
        Some(own) => own.seen >= own.bytes - own.bytes / 10,
        // Apple's own GPUs have the processor's memory.
        None => {
            cfg!(target_vendor = "apple")
                && adapter.get_info().device_type == wgpu::DeviceType::IntegratedGpu
        }
    };
    shares && adapter.features().contains(wgpu::Features::MAPPABLE_PRIMARY_BUFFERS)
}

/// A buffer in memory that both sides see.
pub struct Window {
    buffer: Buffer,
    first: *mut u8,
    lent: Arc<Mutex<Vec<Range<usize>>>>,
}

// SAFETY: the pointer is only followed through spans, no two of which overlap.
unsafe impl Send for Window {}
// SAFETY: as above; what is lent is behind a lock.
unsafe impl Sync for Window {}

impl Window {
    /// Maps a buffer that was made for writing, and that wgpu has mapped for nobody.
    ///
    /// # Errors
    /// The device is lost; the driver refuses.
    pub fn new(device: &wgpu::Device, buffer: Buffer) -> Result<Self> {
        let lost = || Error::Gpu("the device is lost; start again".into());
        // SAFETY: nothing is destroyed. While the buffer's guard lives wgpu does not destroy it either.
        let (device, raw) = unsafe { (device.as_hal::<Native>(), buffer.as_hal::<Native>()) };
        let (device, raw) = (device.ok_or_else(lost)?, raw.ok_or_else(lost)?);
        // SAFETY: a buffer of this device in memory that both sides see, whole. Where it is mapped to does not
        // change as long as it lives.
        let mapping = unsafe { hal::Device::map_buffer(&*device, &raw, 0..buffer.size()) };
        let first = mapping.map_err(|e| Error::Gpu(format!("video memory: {e}")))?.ptr.as_ptr();
        drop(raw);
        Ok(Self { buffer, first, lent: Arc::default() })
    }

    /// The buffer, as kernels get it.
    pub fn buffer(&self) -> &Buffer {
        &self.buffer
    }

    /// Bytes in front of the first page that begins in it.
    pub fn bytes_to_page(&self) -> usize {
        self.first.addr().next_multiple_of(PAGE_BYTES) - self.first.addr()
    }

    /// Lends a part for writing until it is dropped. Kernels that read there meanwhile find anything.
    ///
    /// # Panics
    /// It does not lie in the buffer, or overlaps one that is lent.
    pub fn lend(&self, part: Range<usize>) -> Block {
        assert!(
            part.start <= part.end && part.end as u64 <= self.buffer.size(),
            "a record lies in its slot"
        );
        let mut lent = locked(&self.lent);
        let is_apart = |other: &Range<usize>| part.end <= other.start || other.end <= part.start;
        assert!(lent.iter().all(is_apart), "a slot is written by one at a time");
        lent.push(part.clone());
        drop(lent);
        // SAFETY: within the buffer, as asserted.
        let first = unsafe { self.first.add(part.start) };
        let lent = Arc::clone(&self.lent);
        Block::lent(Box::new(Span { first, part, lent, _buffer: self.buffer.clone() }))
    }
}

/// Writes records to places in windows, by all threads.
///
/// # Panics
/// A record that is longer than its place.
pub fn write(pool: &Pool, parts: &mut [(Block, &[u8])]) {
    let pieces = parts.iter_mut().flat_map(|(place, record)| {
        let places = place.bytes_mut()[..record.len()].chunks_mut(ITEM_BYTES);
        places.zip(record.chunks(ITEM_BYTES))
    });
    let mut pieces: Vec<(&mut [u8], &[u8])> = pieces.collect();
    pool.chunks(&mut pieces, 1, |_, piece| {
        let (place, record) = &mut piece[0];
        place.copy_from_slice(record);
    });
}

/// A part of a window while it is lent.
struct Span {
    first: *mut u8,
    part: Range<usize>,
    lent: Arc<Mutex<Vec<Range<usize>>>>,
    _buffer: Buffer, // so that the memory lives
}

// SAFETY: it is the only one that points there on this side.
unsafe impl Send for Span {}
// SAFETY: as above; shared it only gives shared bytes.
unsafe impl Sync for Span {}

impl Deref for Span {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: within the buffer, which lives; zeroed by its first command. This side has no other way to
        // these bytes as long as they are lent, and kernels write no slots.
        unsafe { std::slice::from_raw_parts(self.first, self.part.len()) }
    }
}

impl DerefMut for Span {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts_mut(self.first, self.part.len()) }
    }
}

impl Drop for Span {
    fn drop(&mut self) {
        let mut lent = locked(&self.lent);
        if let Some(place) = lent.iter().position(|part| *part == self.part) {
            lent.swap_remove(place);
        }
    }
}

fn locked(lent: &Mutex<Vec<Range<usize>>>) -> MutexGuard<'_, Vec<Range<usize>>> {
    lent.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::adapters::{AdapterKind, pick};
    use crate::gpu::device::Device;

    /// A window, where there is an adapter that has some: otherwise `tests/gpu.rs` says that nothing was tested.
    fn window(bytes: u64) -> Option<(Device, Window)> {
        let (_, adapter) = pick(Some(0)).ok()?;
        assert!(adapter.has_windows || adapter.kind != AdapterKind::Software);
        if !adapter.has_windows {
            return None;
        }
        let device = Device::open(&adapter.adapter).expect("a device");
        let window = device.window("slots", bytes).expect("memory");
        device.wait_for(None).expect("zeros");
        Some((device, window))
    }

    #[test]
    fn what_is_written_is_there_and_the_rest_as_it_was() {
        let Some((device, window)) = window(400_000) else { return };
        let sent: Vec<u8> = (0..150_000u32).map(|i| (i % 251) as u8 + 1).collect();
        let parts = [(200_000, &sent[..]), (16, &sent[..70_001])];
        let lent = parts.map(|(at, part)| (window.lend(at..at + part.len()), part));
        write(&Pool::new(2), &mut Vec::from(lent));
        let copy = device.buffer("what is there", 400_000).expect("memory");
        let mut encoder = device.encoder();
        encoder.copy_buffer_to_buffer(window.buffer(), 0, &copy, 0, 400_000);
        device.submit(encoder);
        let mut found = vec![1; 400_000];
        device.read(&copy, 0, &mut found).expect("the bytes");
        let mut expected = vec![0; 400_000];
        parts.iter().for_each(|(at, part)| expected[*at..][..part.len()].copy_from_slice(part));
        assert!(found == expected);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_direct_read_brings_the_file_or_an_error() {
        use std::io::Write;
        use std::os::unix::fs::{FileExt, OpenOptionsExt};
        let Some((_device, window)) = window(400_000) else { return };
        let file = tempfile::NamedTempFile::new().expect("a file");
        let sent: Vec<u8> = (0..64 * PAGE_BYTES).map(|i| (i / 3 % 251) as u8).collect();
        std::fs::write(file.path(), &sent).expect("the file");
        for flags in [0, libc::O_DIRECT] {
            let read = std::fs::OpenOptions::new().read(true).custom_flags(flags).open(file.path());
            let Ok(read) = read else { continue }; // a file system without direct reads
            let first = window.bytes_to_page();
            let mut block = window.lend(first..first + sent.len());
            block.bytes_mut().fill(0);
            match read.read_exact_at(block.bytes_mut(), 0) {
                Ok(()) => assert!(block.bytes() == sent),
                Err(e) => {
                    let said = format!("SKIP: no reads into this memory with flags {flags}: {e}");
                    writeln!(std::io::stderr(), "{said}").expect("standard error");
                }
            }
        }
    }

    #[test]
    fn a_part_is_lent_to_one_at_a_time_and_lies_in_its_window() {
        let Some((_device, window)) = window(100) else { return };
        let refuses = |part: Range<usize>| {
            let lend = std::panic::AssertUnwindSafe(|| drop(window.lend(part)));
            std::panic::catch_unwind(lend).is_err()
        };
        let held = [window.lend(20..40), window.lend(60..80), window.lend(40..60)];
        assert!([10..21, 39..41, 79..90, 0..100, 100..113].into_iter().all(refuses));
        assert!(!refuses(0..20) && !refuses(80..112));
        drop(held);
        assert!(!refuses(0..100));
    }
}
