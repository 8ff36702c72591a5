//! A build without the feature `gpu`: there are no adapters, and nothing computes on one.
//!
//! The names of the other build are here, so that nothing else asks which one it is. No value of these
//! types can be made: whoever asks for a GPU hears that this build has none.

#[path = "gpu/asked.rs"]
mod asked;

use std::fmt;
use std::time::Duration;

pub use asked::{
    ChunkInput, ChunkOf, ChunkRates, DeviceLimits, GpuCounters, GpuOptions, Host, KernelRate,
    Logits, MissPlan, MissRates, Misses, NO_ADAPTER, SHARES, Stored, Token, VideoBudget, Watch,
    uploads_bytes,
};

use crate::container::Container;
use crate::engine::Options;
use crate::error::{Error, Result};
use crate::pool::Pool;
use crate::timing::Timing;
use crate::weights::Weights;

/// What a user hears who asks for one.
const NOT_BUILT: &str = "this build has no GPU support; build it with the feature gpu";

/// An adapter, of which there is none.
pub enum Adapter {}

/// A model on a device, of which there is none.
pub enum Gpu {}

/// What a session remembers on a device.
pub enum Timeline {}

impl fmt::Display for Adapter {
    fn fmt(&self, _: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {}
    }
}

/// Refuses.
///
/// # Errors
/// Always.
pub fn plan(_: &Stored, _: &Options, _: &GpuOptions) -> Result<VideoBudget> {
    Err(Error::Gpu(NOT_BUILT.into()))
}

/// Refuses.
///
/// # Errors
/// Always.
pub fn prefill_chunk(_: &Stored, _: &Options, _: &GpuOptions) -> Result<usize> {
    Err(Error::Gpu(NOT_BUILT.into()))
}

/// Refuses.
///
/// # Errors
/// Always.
pub fn shared_memory(_: &GpuOptions) -> Result<Option<u64>> {
    Err(Error::Gpu(NOT_BUILT.into()))
}

/// Refuses.
///
/// # Errors
/// Always.
pub fn limits(_: &GpuOptions, _: &Pool, _: Duration) -> Result<DeviceLimits> {
    Err(Error::Gpu(NOT_BUILT.into()))
}

/// Refuses.
///
/// # Errors
/// Always.
pub fn chunk_rates(_: &ChunkOf, _: &GpuOptions, _: Duration) -> Result<ChunkRates> {
    Err(Error::Gpu(NOT_BUILT.into()))
}

/// None.
pub fn adapters() -> Vec<Adapter> {
    Vec::new()
}

/// Why no GPU is taken.
///
/// # Errors
/// Always.
pub fn auto(_: &Container, _: &Options, _: GpuOptions) -> Result<GpuOptions, String> {
    Err(NOT_BUILT.into())
}

impl Gpu {
    /// Refuses.
    ///
    /// # Errors
    /// Always.
    pub fn open(_: &Container, _: &mut Weights, _: &Options, _: &GpuOptions) -> Result<Self> {
        Err(Error::Gpu(NOT_BUILT.into()))
    }

    /// The plan of its video memory.
    pub fn budget(&self) -> &VideoBudget {
        match *self {}
    }

    /// What was done to feed it.
    pub fn counters(&self) -> GpuCounters {
        match *self {}
    }

    /// What it does about missing experts.
    pub fn misses(&self) -> MissPlan {
        match *self {}
    }

    /// Whether there is a clock that can time stages.
    pub fn has_clock(&self) -> bool {
        match *self {}
    }

    /// Whether records are read from the disk into their slots.
    pub fn is_in_place(&self) -> bool {
        match *self {}
    }

    /// Stages are timed from here on, or no more.
    pub fn let_clock_run(&self, _: bool) {
        match *self {}
    }

    /// Forgets every expert that can be had again.
    pub fn forget(&self) {
        match *self {}
    }

    /// Makes it ready.
    pub fn prepare(&mut self, _: &Host) -> Result<()> {
        match *self {}
    }

    /// Times its kernels.
    pub fn kernels_alone(&self, _: usize, _: Duration) -> Result<Vec<KernelRate>> {
        match *self {}
    }

    /// Adds what the device's clock has seen.
    pub fn time(&self, _: &mut Timing) -> Result<()> {
        match *self {}
    }

    /// Memories of a session.
    pub fn timeline(&self, _: usize) -> Result<Timeline> {
        match *self {}
    }

    /// Brings a layer's memory to the device.
    pub fn upload(&self, _: &Timeline, _: usize, _: usize, _: &[&[u8]]) -> Result<()> {
        match *self {}
    }

    /// The other way.
    pub fn download(&self, _: &Timeline, _: usize, _: usize, _: &mut [&mut [u8]]) -> Result<()> {
        match *self {}
    }

    /// Takes a token.
    pub fn step(
        &self,
        _: &Host,
        _: &Timeline,
        _: &Token,
        _: Logits,
        _: Option<Watch>,
    ) -> Result<()> {
        match *self {}
    }

    /// Tokens that a chunk has at most.
    pub fn chunk_tokens(&self) -> usize {
        match *self {}
    }

    /// Takes several tokens.
    pub fn chunk(
        &self,
        _: &Host,
        _: &Timeline,
        _: &ChunkInput,
        _: &mut [f32],
        _: Option<Watch>,
    ) -> Result<()> {
        match *self {}
    }

    /// Logits of a row of the residual stream.
    pub fn logits(&self, _: &[f32], _: &mut [f32]) -> Result<()> {
        match *self {}
    }

    /// The residual stream after the last token.
    pub fn hidden(&self) -> Result<Vec<f32>> {
        match *self {}
    }
}
