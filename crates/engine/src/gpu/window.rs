//! Video memory that this program writes where kernels read it.
//!
//! Where the processor sees all memory of an adapter, because both have the same or because a card shows all
//! of its own on the bus, a record goes to its slot without memory for uploads in between. wgpu lends a
//! buffer to one side at a time; here the same buffer is mapped below wgpu while a write takes, and kernels
//! may read other parts of it meanwhile. Which parts none reads is for the owner of the buffer to know.

#![allow(unsafe_code, reason = "memory that wgpu does not lend while kernels have the buffer")]

#[cfg(target_vendor = "apple")]
use wgpu::hal::api::Metal as Native;
#[cfg(not(target_vendor = "apple"))]
use wgpu::hal::api::Vulkan as Native;
use wgpu::{Adapter, Buffer, hal};

use super::device::own_memory;
use super::ring::ITEM_BYTES;
use crate::error::{Error, Result};
use crate::pool::Pool;

/// A part of a record, and where it goes.
struct Item<'a> {
    to: *mut u8,
    from: &'a [u8],
}

// SAFETY: a pointer to memory that no thread calls its own.
unsafe impl Send for Item<'_> {}

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

/// Whether parts lie in a buffer of so many bytes, side by side.
fn are_apart(parts: &[(u64, &[u8])], bytes: u64) -> bool {
    let span = |(at, part): &(u64, &[u8])| [*at, at + part.len() as u64];
    let mut spans: Vec<[u64; 2]> = parts.iter().map(span).collect();
    spans.sort_unstable();
    let ends = spans.iter().skip(1).map(|span| span[0]).chain([bytes]);
    spans.iter().zip(ends).all(|(span, end)| span[1] <= end)
}

/// Copies bytes to places in a buffer, each with its offset, by all threads. One call at a time: see
/// [`super::device::Device::write_window`].
///
/// # Errors
/// The device is lost.
///
/// # Panics
/// A part that does not lie in the buffer, or two that overlap.
pub fn write(
    device: &wgpu::Device,
    buffer: &Buffer,
    pool: &Pool,
    parts: &[(u64, &[u8])],
) -> Result<()> {
    assert!(are_apart(parts, buffer.size()), "records lie in slots of their own");
    let lost = || Error::Gpu("the device is lost; start again".into());
    // SAFETY: nothing is destroyed. While the buffer's guard lives wgpu does not destroy it either.
    let (device, raw) = unsafe { (device.as_hal::<Native>(), buffer.as_hal::<Native>()) };
    let (device, raw) = (device.ok_or_else(lost)?, raw.ok_or_else(lost)?);
    // SAFETY: a buffer of this device in memory that both sides see, whole. wgpu has it mapped for nobody,
    // and mapping it again moves nothing: it is mapped for as long as it lives.
    let mapping = unsafe { hal::Device::map_buffer(&*device, &raw, 0..buffer.size()) };
    let first = mapping.map_err(|e| Error::Gpu(format!("video memory: {e}")))?.ptr.as_ptr();
    let mut items = Vec::new();
    for (at, part) in parts {
        for (i, from) in part.chunks(ITEM_BYTES).enumerate() {
            // SAFETY: within the buffer, as asserted.
            let to = unsafe { first.add(*at as usize + i * ITEM_BYTES) };
            items.push(Item { to, from });
        }
    }
    pool.chunks(&mut items, 1, |_, item| {
        let Item { to, from } = &item[0];
        // SAFETY: parts do not overlap, one call at a time writes and nothing here reads the memory; what the
        // device reads is no object of this program's.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), *to, from.len()) };
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::adapters::{AdapterKind, pick};
    use crate::gpu::device::Device;

    #[test]
    fn what_is_written_is_there_and_the_rest_as_it_was() {
        // Where there is none `tests/gpu.rs` says that nothing was tested.
        let Ok((_, adapter)) = pick(Some(0)) else { return };
        assert!(adapter.has_windows || adapter.kind != AdapterKind::Software);
        if !adapter.has_windows {
            return;
        }
        let (device, pool) = (Device::open(&adapter.adapter).expect("a device"), Pool::new(2));
        let window = device.window("slots", 400_000).expect("memory");
        device.wait_for(None).expect("zeros");
        let sent: Vec<u8> = (0..150_000u32).map(|i| (i % 251) as u8 + 1).collect();
        let parts = [(200_000, &sent[..]), (16, &sent[..70_001])];
        device.write_window(&window, &pool, &parts).expect("a write");
        let copy = device.buffer("what is there", 400_000).expect("memory");
        let mut encoder = device.encoder();
        encoder.copy_buffer_to_buffer(&window, 0, &copy, 0, 400_000);
        device.submit(encoder);
        let mut found = vec![1; 400_000];
        device.read(&copy, 0, &mut found).expect("the bytes");
        let mut expected = vec![0; 400_000];
        parts.iter().for_each(|(at, p)| expected[*at as usize..][..p.len()].copy_from_slice(p));
        assert!(found == expected);
    }

    #[test]
    fn places_that_overlap_or_lie_outside_are_seen() {
        let part = [0; 20];
        let apart = |places: &[u64]| {
            are_apart(&places.iter().map(|at| (*at, &part[..])).collect::<Vec<_>>(), 100)
        };
        assert!(apart(&[]) && apart(&[80]) && apart(&[20, 0, 60, 40]));
        assert!(!apart(&[81]) && !apart(&[0, 19]) && !apart(&[30, 11]) && !apart(&[81, 0]));
    }
}
