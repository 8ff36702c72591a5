//! Commands on their way to the device, and the device's own clock for each stage of them.
//!
//! Without a clock everything between two points where the host must look is one pass. With one, as
//! `--timing` asks for, every stage is a pass of its own that begins and ends with a time stamp, and the
//! stages are added up under the names that the CPU's have.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use wgpu::{
    BindGroup, Buffer, CommandBuffer, CommandEncoder, ComputePass, ComputePassDescriptor,
    SubmissionIndex,
};

use super::device::Device;
use super::ring::Piece;
use crate::error::Result;
use crate::timing::{Stage, Timing};

/// Passes that are timed between two readings.
const MARKS_MAX: usize = 2000;

/// Time stamps, and what was done between them.
pub struct Clock {
    queries: wgpu::QuerySet,
    stamps: Buffer,
    landing: Buffer,
    marks: Mutex<Vec<(Stage, u64)>>, // of each pass, with its bytes
    stands: AtomicBool,
}

impl Clock {
    /// On a device that has time stamps.
    ///
    /// # Errors
    /// The device has no memory left.
    pub fn new(device: &Device) -> Result<Option<Self>> {
        let Some(queries) = device.stamps(2 * MARKS_MAX as u32)? else { return Ok(None) };
        let bytes = 16 * MARKS_MAX as u64;
        Ok(Some(Self {
            queries,
            stamps: device.resolved(bytes)?,
            landing: device.landing(bytes)?,
            marks: Mutex::default(),
            stands: AtomicBool::new(false),
        }))
    }

    /// Whether it times what is written now.
    pub fn runs(&self) -> bool {
        !self.stands.load(Ordering::Relaxed)
    }

    /// It times what is written from here on, or not.
    pub fn let_run(&self, runs: bool) {
        self.stands.store(!runs, Ordering::Relaxed);
    }

    /// Adds what was timed since the last reading.
    ///
    /// # Errors
    /// The device failed.
    pub fn read(&self, device: &Device, timing: &mut Timing) -> Result<()> {
        let mut marks = self.marks.lock().unwrap_or_else(PoisonError::into_inner);
        let count = marks.len();
        if count == 0 {
            return Ok(());
        }
        let mut encoder = device.encoder();
        encoder.resolve_query_set(&self.queries, 0..2 * count as u32, &self.stamps, 0);
        let bytes = 16 * count as u64;
        encoder.copy_buffer_to_buffer(&self.stamps, 0, &self.landing, 0, bytes);
        device.submit(encoder);
        let tick = f64::from(device.tick_ns());
        device.landed(&self.landing, bytes, |landed| {
            let stamps: Vec<u64> = bytemuck::pod_collect_to_vec(landed);
            for ((stage, bytes), stamps) in marks.drain(..).zip(stamps.chunks_exact(2)) {
                let ticks = stamps[1].saturating_sub(stamps[0]);
                timing.add_ns(stage, (ticks as f64 * tick) as u64, bytes);
            }
        })
    }

    /// The last pass of a stage that touches anything touches so many bytes less.
    pub fn take_off(&self, stage: Stage, bytes: u64) {
        let mut marks = self.marks.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(mark) = marks.iter_mut().rfind(|mark| mark.0 == stage && mark.1 > 0) {
            mark.1 = mark.1.saturating_sub(bytes);
        }
    }

    /// A place for one more pass, while there is one.
    fn mark(&self, stage: Stage, bytes: u64) -> Option<u32> {
        let mut marks = self.marks.lock().unwrap_or_else(PoisonError::into_inner);
        let place = marks.len();
        (place < MARKS_MAX).then(|| {
            marks.push((stage, bytes));
            2 * place as u32
        })
    }
}

/// Commands that are being written.
pub struct Work<'g> {
    clock: Option<&'g Clock>,
    group: &'g BindGroup,
    encoder: CommandEncoder,
    pass: Option<ComputePass<'static>>,
    pieces: Vec<Piece<'g>>,
}

/// Commands that can be handed over, with the memory that they copy from.
pub struct Commands<'g> {
    buffer: CommandBuffer,
    pieces: Vec<Piece<'g>>,
}

/// Where bytes of a piece go.
pub struct Way<'a> {
    /// Bytes to go.
    pub bytes: u64,
    /// The buffer they go to.
    pub buffer: &'a Buffer,
    /// Where in it.
    pub to: u64,
}

impl<'g> Work<'g> {
    /// None yet, on this scratch.
    pub fn new(device: &Device, clock: Option<&'g Clock>, group: &'g BindGroup) -> Self {
        Self { clock, group, encoder: device.encoder(), pass: None, pieces: Vec::new() }
    }

    /// Where the commands of a stage go, which touches so many bytes.
    pub fn stage(&mut self, stage: Stage, bytes: u64) -> &mut ComputePass<'static> {
        if self.clock.is_some() {
            self.pass = None;
        }
        self.pass.get_or_insert_with(|| {
            let first = self.clock.and_then(|clock| Some((clock, clock.mark(stage, bytes)?)));
            let writes = first.map(|(clock, first)| wgpu::ComputePassTimestampWrites {
                query_set: &clock.queries,
                beginning_of_pass_write_index: Some(first),
                end_of_pass_write_index: Some(first + 1),
            });
            let descriptor = ComputePassDescriptor { label: None, timestamp_writes: writes };
            let mut pass = self.encoder.begin_compute_pass(&descriptor).forget_lifetime();
            pass.set_bind_group(0, self.group, &[]);
            pass
        })
    }

    /// For copies behind what there is.
    pub fn encoder(&mut self) -> &mut CommandEncoder {
        self.pass = None;
        &mut self.encoder
    }

    /// Brings what lies in a piece, one part behind the other, to the device.
    pub fn bring<'a>(&mut self, mut piece: Piece<'g>, ways: impl Iterator<Item = Way<'a>>) {
        self.pass = None;
        let from = piece.hand_over();
        let mut at = 0;
        for way in ways {
            self.encoder.copy_buffer_to_buffer(from, at, way.buffer, way.to, way.bytes);
            at += way.bytes;
        }
        self.pieces.push(piece);
    }

    /// The commands.
    pub fn finish(mut self) -> Commands<'g> {
        self.pass = None;
        Commands { buffer: self.encoder.finish(), pieces: self.pieces }
    }
}

impl<'g> Commands<'g> {
    /// Hands commands over, one behind the other.
    pub fn submit(device: &Device, all: impl IntoIterator<Item = Self>) -> SubmissionIndex {
        let mut pieces = Vec::new();
        let buffers = all.into_iter().map(|commands| {
            pieces.extend(commands.pieces);
            commands.buffer
        });
        let buffers: Vec<CommandBuffer> = buffers.collect();
        let index = device.submit_all(buffers);
        pieces.iter_mut().for_each(|piece| piece.last = Some(index.clone()));
        index
    }

    /// As [`Commands::submit`], where there are any; none are left.
    pub fn submit_some(device: &Device, some: &mut Vec<Self>) {
        if !some.is_empty() {
            Self::submit(device, some.drain(..));
        }
    }

    /// The commands of work that brings nothing.
    pub fn alone(self) -> CommandBuffer {
        assert!(self.pieces.is_empty(), "kept commands hold no memory for uploads");
        self.buffer
    }

    /// Commands that were kept.
    pub fn kept(buffer: CommandBuffer) -> Self {
        Self { buffer, pieces: Vec::new() }
    }
}
