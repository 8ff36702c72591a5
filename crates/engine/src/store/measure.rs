//! Speed of whole-record reads with the store's own files, flags and read call.
//!
//! For benchmarks and plans: the limit that the store's reads are held against. Every read fills its
//! buffer or is an error, so the bytes counted are bytes that arrived. The caller chooses the order;
//! a record read twice may come from a cache outside this machine.

use std::path::Path;
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use super::IoMode;
use super::files::{self, LayerFile, direct_reads_work, open};
use super::read::read_exact_at;
use crate::container::Container;
use crate::error::{Error, Result};
use crate::memory::{Block, page_multiple};
use crate::shape::LayerId;

/// Records on disk, ready to be read past the pool.
pub struct RecordFiles {
    files: Vec<LayerFile>,
    records_each: usize,
    direct: bool,
}

/// What one measurement read.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct ReadRate {
    /// Reads in flight.
    pub depth: usize,
    /// Records read.
    pub records: usize,
    /// Bytes read.
    pub bytes: u64,
    /// From the first request to the last byte.
    pub seconds: f64,
}

impl ReadRate {
    /// Bytes a second.
    pub fn rate(&self) -> f64 {
        self.bytes as f64 / self.seconds.max(1e-9)
    }
}

impl RecordFiles {
    /// The layer files of a container; [`IoMode::Auto`] is direct where that works.
    ///
    /// # Errors
    /// A file that cannot be opened; direct reads demanded where there are none.
    pub fn open(container: &Container, io: IoMode) -> Result<Self> {
        let direct = io != IoMode::Buffered && files::direct_works(container);
        if io == IoMode::Direct && !direct {
            return Err(files::no_direct(container));
        }
        let files = files::open_layers(container, direct)?;
        Ok(Self { files, records_each: container.shape().moe.experts, direct })
    }

    /// Any file, taken as records of `record_bytes` rounded up to whole pages; direct where that
    /// works.
    ///
    /// # Errors
    /// The file cannot be opened or holds no whole record.
    pub fn of_file(path: &Path, record_bytes: usize) -> Result<Self> {
        let direct = direct_reads_work(path);
        let file = open(path, direct).map_err(|e| Error::io(path, e))?;
        let bytes = file.metadata().map_err(|e| Error::io(path, e))?.len();
        let stride_bytes = page_multiple(record_bytes.max(1));
        let records_each = bytes as usize / stride_bytes;
        if records_each == 0 {
            return Err(Error::Container(format!(
                "{}: {bytes} bytes, too short for a record of {stride_bytes}",
                path.display()
            )));
        }
        let path = path.to_path_buf();
        let layer = LayerId(0);
        let whole = LayerFile { layer, path, file, stride_bytes, read_bytes: stride_bytes };
        Ok(Self { files: vec![whole], records_each, direct })
    }

    /// Number of records.
    pub fn count(&self) -> usize {
        self.files.len() * self.records_each
    }

    /// Whether reads bypass the page cache.
    pub fn is_direct(&self) -> bool {
        self.direct
    }

    /// Bytes of the largest read.
    pub fn read_bytes(&self) -> usize {
        self.files.iter().map(|f| f.read_bytes).max().unwrap_or(0)
    }

    /// Reads the records of `order` (below [`RecordFiles::count`]), `depth` at a time, until all are
    /// read or no more are asked for because `limit` has passed.
    ///
    /// # Errors
    /// The first read that failed or came up short.
    pub fn read(&self, order: &[usize], depth: usize, limit: Duration) -> Result<ReadRate> {
        let depth = depth.clamp(1, 64);
        let next = AtomicUsize::new(0);
        let stop = AtomicBool::new(false);
        let start = Barrier::new(depth + 1);
        let reader = || {
            let mut block = Block::zeroed(self.read_bytes());
            // Touched before the clock starts: the first write to a page costs more than its read.
            block.bytes_mut().fill(1);
            start.wait();
            let started = Instant::now();
            let (mut records, mut bytes) = (0, 0);
            while !stop.load(Ordering::Relaxed) && started.elapsed() < limit {
                let Some(&record) = order.get(next.fetch_add(1, Ordering::Relaxed)) else { break };
                match self.read_one(record, &mut block) {
                    Ok(read) => bytes += read as u64,
                    Err(error) => {
                        stop.store(true, Ordering::Relaxed);
                        return Err(error);
                    }
                }
                records += 1;
            }
            Ok((records, bytes, started, Instant::now()))
        };
        std::thread::scope(|scope| {
            let readers: Vec<_> = (0..depth).map(|_| scope.spawn(reader)).collect();
            start.wait();
            let mut rate = ReadRate { depth, records: 0, bytes: 0, seconds: 0.0 };
            let mut span: Option<(Instant, Instant)> = None;
            for reader in readers {
                let (records, bytes, from, to) = reader.join().expect("a reader never panics")?;
                rate.records += records;
                rate.bytes += bytes;
                span = Some(span.map_or((from, to), |s| (s.0.min(from), s.1.max(to))));
            }
            rate.seconds = span.map_or(0.0, |(from, to)| (to - from).as_secs_f64());
            Ok(rate)
        })
    }

    fn read_one(&self, record: usize, block: &mut Block) -> Result<usize> {
        let file = &self.files[record / self.records_each];
        let offset = (record % self.records_each * file.stride_bytes) as u64;
        let buffer = &mut block.bytes_mut()[..file.read_bytes];
        read_exact_at(&file.file, buffer, offset).map_err(|e| Error::io(&file.path, e))?;
        Ok(file.read_bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_record_asked_for_is_read_whole_at_every_depth() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), vec![7u8; 10 * 8192 + 100]).unwrap();
        let records = RecordFiles::of_file(file.path(), 5000).unwrap();
        assert_eq!((records.count(), records.read_bytes()), (10, 8192));
        let order = [3, 9, 0, 0, 5];
        for depth in [1, 2, 16] {
            let rate = records.read(&order, depth, Duration::from_secs(60)).unwrap();
            assert_eq!((rate.records, rate.bytes), (5, 5 * 8192), "depth {depth}");
        }
    }

    #[test]
    fn a_file_that_shrank_is_an_error_and_not_a_rate() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), vec![7u8; 4 * 4096]).unwrap();
        let records = RecordFiles::of_file(file.path(), 4096).unwrap();
        file.as_file().set_len(4096).unwrap();
        let error = records.read(&[0, 3], 1, Duration::from_secs(60)).unwrap_err();
        assert!(error.to_string().contains(file.path().to_str().unwrap()), "{error}");
    }
}
