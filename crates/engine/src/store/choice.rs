//! Past the page cache or through it: decided once, when a store opens.
//!
//! Experts that fit neither the pool nor the memory beside it pass through the page cache without
//! staying there, so they are read past it. Where they could stay, or are read once only, both ways
//! are tried on a few records and the quicker one is taken. Nothing is remembered on disk.

use std::time::Duration;

use super::measure::RecordFiles;
use super::{IoMode, StoreOptions, files};
use crate::budget::gib;
use crate::container::Container;
use crate::error::Result;

/// How records are read, and why.
#[derive(Clone, Debug)]
pub struct Choice {
    /// Whether reads bypass the page cache.
    pub direct: bool,
    /// The reason in words, for people.
    pub why: String,
}

/// Records read each way. A few of each suffice: a warm page cache is several times as fast as a disk.
const SAMPLE: usize = 8;
/// Reads in flight while trying.
const DEPTH: usize = 4;
/// No read of a trial is begun after this; two trials and their buffers stay near 100 ms.
const TRIAL: Duration = Duration::from_millis(40);
/// The page cache must be so much quicker: its copies take time that computing needs.
const MARGIN: f64 = 1.25;

impl Choice {
    /// Decides for a store of `options.slots` records beside `options.spare_bytes` of memory.
    ///
    /// # Errors
    /// Direct reads demanded where there are none; a record that cannot be read.
    pub(super) fn make(container: &Container, options: StoreOptions) -> Result<Self> {
        match (options.io, files::direct_works(container)) {
            (IoMode::Direct, false) => Err(files::no_direct(container)),
            (IoMode::Direct, true) => Ok(Self::new(true, "asked for")),
            (IoMode::Buffered, _) => Ok(Self::new(false, "asked for")),
            (IoMode::Auto, false) => {
                Ok(Self::new(false, "no direct reads here (file system or record alignment)"))
            }
            (IoMode::Auto, true) => Self::weigh(container, options),
        }
    }

    /// `direct` or `buffered`.
    pub fn name(&self) -> &'static str {
        if self.direct { "direct" } else { "buffered" }
    }

    fn new(direct: bool, why: impl Into<String>) -> Self {
        Self { direct, why: why.into() }
    }

    fn weigh(container: &Container, options: StoreOptions) -> Result<Self> {
        let files = &container.manifest().experts;
        let records: usize = files.iter().map(|file| file.experts).sum();
        let bytes: u64 = files.iter().map(|f| (f.stride_bytes * f.experts) as u64).sum();
        if options.slots < records && bytes > options.spare_bytes {
            return Ok(Self::new(
                true,
                format!(
                    "{} of experts fit neither the pool nor the {} beside it",
                    gib(bytes),
                    gib(options.spare_bytes)
                ),
            ));
        }
        Self::measure(container)
    }

    /// Reads different records each way, spread over the model: neither way warms the other's.
    fn measure(container: &Container) -> Result<Self> {
        let direct = RecordFiles::open(container, IoMode::Direct)?;
        let cached = RecordFiles::open(container, IoMode::Buffered)?;
        let step = (direct.count() / (2 * SAMPLE)).max(1);
        let sample: Vec<usize> = (0..direct.count()).step_by(step).take(2 * SAMPLE).collect();
        let (odd, even): (Vec<_>, Vec<_>) = sample.into_iter().partition(|r| r / step % 2 == 1);
        let rate = |files: &RecordFiles, order: &[usize]| -> Result<f64> {
            Ok(files.read(order, DEPTH, TRIAL)?.rate() / 1e9)
        };
        let (past, through) = (rate(&direct, &odd)?, rate(&cached, &even)?);
        let why = format!("tried: {past:.1} GB/s past the page cache, {through:.1} through it");
        Ok(Self::new(through < MARGIN * past, why))
    }
}
