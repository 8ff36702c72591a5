//! What one session remembers, on the device.
//!
//! The bytes of a layer's keys and values are those of the CPU's cache, page after page, so that a state
//! goes from one to the other by copying. A delta-net layer's convolution history is a ring here.

use std::sync::atomic::{AtomicU64, Ordering};

use wgpu::{BindGroup, Buffer};

use super::{Gpu, Mixing};
use crate::error::Result;
use crate::kv_cache::PAGE_POSITIONS;

/// Timelines made so far.
static TIMELINES: AtomicU64 = AtomicU64::new(0);

/// Memories of all layers of one session.
pub struct Timeline {
    pub(super) id: u64,
    pub(super) context: usize,
    pub(super) layers: Vec<LayerMemory>,
}

/// One layer's.
pub struct LayerMemory {
    pub(super) buffer: Buffer,
    pub(super) write: BindGroup,
    pub(super) read: BindGroup,
}

impl Gpu {
    /// Memories for a context of so many positions, nothing remembered.
    ///
    /// # Errors
    /// The device has no memory left, or a layer's is larger than its largest buffer.
    pub fn timeline(&self, context: usize) -> Result<Timeline> {
        let memory = |layer: &super::Layer| {
            let bytes = match layer.mix {
                Mixing::Attention { .. } => {
                    self.kv.page_bytes() * context.div_ceil(PAGE_POSITIONS) as u64
                }
                Mixing::DeltaNet { .. } => self.delta_bytes().iter().sum(),
            };
            let buffer = self.device.buffer("KV cache or state of a layer", bytes)?;
            Ok(LayerMemory {
                write: self.device.group(&self.views.write, &[&buffer])?,
                read: self.views.read_group(&self.device, &buffer)?,
                buffer,
            })
        };
        let id = TIMELINES.fetch_add(1, Ordering::Relaxed);
        Ok(Timeline { id, context, layers: self.layers.iter().map(memory).collect::<Result<_>>()? })
    }

    /// Bytes of a delta-net layer's states and of its history.
    pub(super) fn delta_bytes(&self) -> [u64; 2] {
        let d = self.shape.delta.as_ref().expect("a delta-net layer has its dimensions");
        let floats = [d.value_heads * d.key_dim * d.value_dim, 4 * d.conv_channels()];
        floats.map(|n| n as u64 * 4)
    }

    /// Brings the parts of a layer's memory, as the CPU has them, to the device, one behind the other.
    /// `position`: tokens taken.
    ///
    /// # Errors
    /// The device failed.
    pub fn upload(
        &self,
        timeline: &Timeline,
        layer: usize,
        position: usize,
        parts: &[&[u8]],
    ) -> Result<()> {
        let mut at = 0;
        for (i, part) in parts.iter().enumerate() {
            let buffer = &timeline.layers[layer].buffer;
            match self.turned_by(layer, i, position) {
                0 => self.device.write_all(buffer, at, part)?,
                turn => {
                    let mut ring = part.to_vec();
                    ring.rotate_right(turn);
                    self.device.write_all(buffer, at, &ring)?;
                }
            }
            at += part.len() as u64;
        }
        Ok(())
    }

    /// The other way.
    ///
    /// # Errors
    /// The device failed.
    pub fn download(
        &self,
        timeline: &Timeline,
        layer: usize,
        position: usize,
        parts: &mut [&mut [u8]],
    ) -> Result<()> {
        let mut at = 0;
        for (i, part) in parts.iter_mut().enumerate() {
            self.device.read(&timeline.layers[layer].buffer, at, part)?;
            part.rotate_left(self.turned_by(layer, i, position));
            at += part.len() as u64;
        }
        Ok(())
    }

    /// Bytes by which a part of a layer's memory is turned on the device: the history of a convolution,
    /// oldest first on the CPU, has the column of position p at p modulo 4.
    fn turned_by(&self, layer: usize, part: usize, position: usize) -> usize {
        match (&self.layers[layer].mix, part) {
            (Mixing::DeltaNet { .. }, 1) => position % 4 * (self.delta_bytes()[1] as usize / 4),
            _ => 0,
        }
    }
}
