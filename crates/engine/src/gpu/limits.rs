//! What a device can do at most, measured through wgpu as everything else here goes through it.
//!
//! Reading its own memory, taking records from this program's, and answering at all. Each measurement checks
//! what it has read or brought: a rate of wrong bytes is refused. A device of its own is opened for it
//! and closed behind it, so that the model's memory is not in the way.

use std::time::{Duration, Instant};

use wgpu::{BindGroup, Buffer, ComputePass, ComputePipeline};

use super::adapters::pick;
use super::asked::{DeviceLimits, GpuOptions};
use super::device::{Access, Device};
use super::ring::{self, Ring};
use super::source;
use crate::error::{Error, Result};
use crate::pool::Pool;

/// Bytes that are read, where a buffer may be so large: far above any cache. A power of two.
const READ_BYTES: u64 = 512 << 20;
/// Workgroups that read.
const WORKGROUPS: u32 = 1024;
/// Bytes that every thread of them reads at once.
const STEP_BYTES: u64 = WORKGROUPS as u64 * 256 * 4 * 16;
/// Bytes of an upload, about those of a record.
const PIECE_BYTES: usize = 2 << 20;
/// Uploads that are handed over together, of which two lots are under way; no more than is read.
const TOGETHER: usize = 8;
/// A submission that takes so long is long against the way to the device and back.
pub const LONG: Duration = Duration::from_millis(10);
/// Round trips of which the quickest counts.
const TRIPS: usize = 50;

/// Measures for about so long, each thing.
///
/// # Errors
/// No such adapter; less memory than is read; a wrong sum; the device failed.
pub fn limits(wanted: &GpuOptions, pool: &Pool, time: Duration) -> Result<DeviceLimits> {
    let (_, adapter) = pick(wanted.adapter)?;
    let memory = wanted.memory_bytes.or(adapter.memory_bytes).unwrap_or(u64::MAX);
    let most = READ_BYTES.min(adapter.binding_bytes).min(memory / 4);
    if most < STEP_BYTES {
        return Err(Error::Gpu(format!(
            "{}: its speed is measured on 16 MiB at least, a quarter of what it may take; give a larger \
             --gpu-memory",
            adapter.name
        )));
    }
    let probe = Probe::new(Device::open(&adapter.adapter)?, 1 << most.ilog2())?;
    let read = probe.read(time)?;
    let [stage, copy, upload] = probe.uploads(pool, time)?;
    let round_trip = probe.round_trip()?;
    Ok(DeviceLimits { read_bytes: probe.bytes, read, stage, copy, upload, round_trip })
}

/// Seconds of what `write` writes, once through: of the quickest submission, each of as many times as make it
/// long, for about so long.
///
/// # Errors
/// The device failed.
pub fn quickest(device: &Device, time: Duration, write: &dyn Fn(&mut ComputePass)) -> Result<f64> {
    let (mut times, mut best) = (1u32, f64::INFINITY);
    let begun = Instant::now();
    loop {
        let mut encoder = device.encoder();
        let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor::default());
        (0..times).for_each(|_| write(&mut pass));
        drop(pass);
        let started = Instant::now();
        let submission = device.submit_all([encoder.finish()]);
        device.wait_for(Some(submission))?;
        let taken = started.elapsed();
        best = best.min(taken.as_secs_f64() / f64::from(times));
        if begun.elapsed() >= time {
            return Ok(best);
        }
        times *= if taken < LONG { 2 } else { 1 };
    }
}

/// Words on a device, and the kernel that reads them.
struct Probe {
    device: Device,
    bytes: u64,
    words: Buffer,
    sums: Buffer,
    kernel: ComputePipeline,
    groups: [BindGroup; 2],
    expected: u32,
}

impl Probe {
    fn new(device: Device, bytes: u64) -> Result<Self> {
        let views = [Access::Read, Access::Write].map(|access| device.layout(&[access]));
        let words = device.buffer("words to be read", bytes)?;
        let sums = device.buffer("sums", u64::from(WORKGROUPS) * 4)?;
        let some: Vec<u32> = (0..STEP_BYTES as u32 / 4).map(|i| i.wrapping_mul(FACTOR)).collect();
        for at in (0..bytes).step_by(STEP_BYTES as usize) {
            device.write_all(&words, at, bytemuck::cast_slice(&some))?;
        }
        let sum = some.iter().fold(0u32, |sum, word| sum.wrapping_add(*word));
        Ok(Self {
            kernel: device.kernel("read", source::READ, &[&views[0], &views[1]])?,
            groups: [device.group(&views[0], &[&words])?, device.group(&views[1], &[&sums])?],
            expected: sum.wrapping_mul((bytes / STEP_BYTES) as u32),
            device,
            bytes,
            words,
            sums,
        })
    }

    /// Bytes a second of the quickest submission, each of as many passes as make it long.
    fn read(&self, time: Duration) -> Result<f64> {
        let seconds = quickest(&self.device, time, &|pass| {
            pass.set_pipeline(&self.kernel);
            pass.set_bind_group(0, &self.groups[0], &[]);
            pass.set_bind_group(1, &self.groups[1], &[]);
            pass.dispatch_workgroups(WORKGROUPS, 1, 1);
        })?;
        let mut sums = vec![0u32; WORKGROUPS as usize];
        self.device.read(&self.sums, 0, bytemuck::cast_slice_mut(&mut sums))?;
        let sum = sums.iter().fold(0u32, |sum, part| sum.wrapping_add(*part));
        match sum == self.expected {
            true => Ok(self.bytes as f64 / seconds),
            false => Err(Error::Gpu(format!("a pass over {} bytes summed wrongly", self.bytes))),
        }
    }

    /// Bytes a second: copied into mapped memory, from there to the device, and both at once.
    fn uploads(&self, pool: &Pool, time: Duration) -> Result<[f64; 3]> {
        let ring = Ring::new(&self.device, "uploads", 2 * TOGETHER, PIECE_BYTES as u64)?;
        let sent: Vec<u8> = (0..PIECE_BYTES).map(|i| (i % 251) as u8).collect();
        let lot = || -> Result<_> {
            let mut filled = Vec::with_capacity(TOGETHER);
            for _ in 0..TOGETHER {
                filled.push((ring.take(&self.device)?, &sent[..]));
            }
            let started = Instant::now();
            ring::fill(pool, &filled)?;
            let staging = started.elapsed();
            let mut encoder = self.device.encoder();
            for (i, (piece, _)) in filled.iter_mut().enumerate() {
                let (to, bytes) = ((i * PIECE_BYTES) as u64, PIECE_BYTES as u64);
                encoder.copy_buffer_to_buffer(piece.hand_over(), 0, &self.words, to, bytes);
            }
            let handed_over = Instant::now();
            let submission = self.device.submit_all([encoder.finish()]);
            filled.iter_mut().for_each(|(piece, _)| piece.last = Some(submission.clone()));
            Ok((staging, handed_over, submission))
        };
        let (mut staging, mut copying) = (Duration::MAX, Duration::MAX);
        for _ in 0..4 {
            let (took, handed_over, submission) = lot()?;
            self.device.wait_for(Some(submission))?;
            staging = staging.min(took);
            copying = copying.min(handed_over.elapsed());
        }
        let (mut lots, begun) = (0, Instant::now());
        while begun.elapsed() < time || lots < 4 {
            lot()?;
            lots += 1;
        }
        self.device.wait_for(None)?;
        let whole = begun.elapsed();
        let mut arrived = vec![0; PIECE_BYTES];
        self.device.read(&self.words, 0, &mut arrived)?;
        if arrived != sent {
            return Err(Error::Gpu("an upload did not arrive as it was sent".into()));
        }
        let rate = |lots: u32, time: Duration| {
            f64::from(lots) * (TOGETHER * PIECE_BYTES) as f64 / time.as_secs_f64().max(1e-9)
        };
        Ok([rate(1, staging), rate(1, copying), rate(lots, whole)])
    }

    /// Seconds from handing a few bytes' way back over until they are here.
    fn round_trip(&self) -> Result<f64> {
        let landing = self.device.landing(16)?;
        let mut best = Duration::MAX;
        for _ in 0..TRIPS {
            let started = Instant::now();
            let mut encoder = self.device.encoder();
            encoder.copy_buffer_to_buffer(&self.sums, 0, &landing, 0, 16);
            self.device.submit(encoder);
            self.device.landed(&landing, 16, |_| ())?;
            best = best.min(started.elapsed());
        }
        Ok(best.as_secs_f64())
    }
}

/// Of the filling pattern: odd, so that every word differs.
const FACTOR: u32 = 0x9e37_79b1;
