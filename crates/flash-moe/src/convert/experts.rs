//! Writing `experts/layer_NN.bin`: one record an expert, at a fixed stride, with checksums.
//!
//! A thread converts a whole record and writes it at its place. The checksums of a layer take their
//! name before the layer does, so a layer file that exists is whole and has checksums.

use std::path::Path;
use std::sync::Mutex;

use anyhow::{Context, Result, ensure};
use flash_moe_engine::container::{ExpertFile, Precision, RecordLayout};
use flash_moe_engine::memory::Block;
use flash_moe_engine::shape::LayerId;
use xxhash_rust::xxh3::xxh3_64;

use super::files::{PartialFile, write_whole};
use super::matrix::{Parts, Scratch};
use super::plan::ExpertLayer;
use super::progress::Progress;
use super::source::Source;
use super::workers::Workers;

/// Directory of the layer files within a container.
pub const EXPERTS_DIR: &str = "experts";
/// Directory of the checksums within a container.
pub const SUMS_DIR: &str = "checksums";

/// A file of records.
#[derive(Clone, Debug)]
pub struct Records {
    /// The layer, or the prediction layer.
    pub layer: LayerId,
    /// Path within the container, without directory and ending: `layer_03`, `mtp_00`.
    pub stem: String,
    /// Experts.
    pub count: usize,
    /// Precision of gate, up, down.
    pub precisions: [Precision; 3],
    /// Layout of a record.
    pub layout: RecordLayout,
}

impl Records {
    /// Path of the records within a container of our own making.
    pub fn file(&self) -> String {
        format!("{EXPERTS_DIR}/{}.bin", self.stem)
    }

    /// Size of that file.
    pub fn bytes(&self) -> u64 {
        (self.count * self.layout.padded_bytes()) as u64
    }

    /// For people: `256 4-bit g64`.
    pub fn describe(&self) -> String {
        let mut names: Vec<String> = self.precisions.iter().map(|p| p.name()).collect();
        names.dedup();
        format!("{} {}", self.count, names.join("/"))
    }

    /// Path of the checksums within the container.
    pub fn sums_file(&self) -> String {
        format!("{SUMS_DIR}/{}.xxh3", self.stem)
    }

    /// Size of the checksums.
    pub fn sums_bytes(&self) -> u64 {
        (self.count * self.layout.parts().len() * 8) as u64
    }

    /// The manifest's entry, once the checksums are on disk.
    ///
    /// # Errors
    /// The checksums cannot be read or have another size.
    pub fn entry(&self, dir: &Path, file: String, stride_bytes: usize) -> Result<ExpertFile> {
        let sums_file = self.sums_file();
        let path = dir.join(&sums_file);
        let sums = std::fs::read(&path).with_context(|| path.display().to_string())?;
        let (found, expected) = (sums.len() as u64, self.sums_bytes());
        ensure!(found == expected, "{}: {found} bytes, expected {expected}", path.display());
        Ok(ExpertFile {
            layer: self.layer,
            file,
            experts: self.count,
            precisions: self.precisions,
            record_bytes: self.layout.record_bytes(),
            stride_bytes,
            sums_file,
            sums_checksum: format!("{:016x}", xxh3_64(&sums)),
        })
    }
}

impl ExpertLayer {
    /// Bytes that converting the layer reads.
    pub fn source_bytes(&self) -> u64 {
        self.experts.iter().flatten().map(|matrix| matrix.source_bytes()).sum()
    }
}

/// Checksums of one record: xxh3-64 of every part.
pub fn record_sums(layout: &RecordLayout, record: &[u8]) -> Vec<u64> {
    layout.parts().into_iter().map(|(_, range)| xxh3_64(&record[range])).collect()
}

/// Converts the experts of one layer.
///
/// # Errors
/// A failed read or write, a value that is not finite.
pub fn write(
    source: &Source,
    layer: &ExpertLayer,
    dir: &Path,
    workers: &Workers,
    progress: &Progress,
) -> Result<()> {
    let layout = &layer.records.layout;
    let file = PartialFile::create(&dir.join(layer.records.file()))?;
    let stride = layout.padded_bytes();
    let sums = Mutex::new(vec![Vec::new(); layer.experts.len()]);
    let scratch = || (Block::zeroed(stride), Scratch::default());
    workers.run(layer.experts.len(), scratch, |expert, (block, scratch)| {
        let record = block.bytes_mut();
        for (matrix, place) in
            layer.experts[expert].iter().zip([&layout.gate, &layout.up, &layout.down])
        {
            let [start, _, _, end] = place.offsets;
            let (scales, biases) = (place.offsets[1] - start, place.offsets[2] - start);
            let (weight, rest) = record[start..end].split_at_mut(scales);
            let (scales, biases) = rest.split_at_mut(biases - scales);
            let parts = Parts { weight, scales, biases };
            matrix.fill(source, 0..matrix.rows, parts, scratch)?;
            progress.read(matrix.source_bytes());
        }
        file.write_at(record, (expert * stride) as u64)?;
        progress.wrote(stride as u64);
        let done = record_sums(layout, record);
        sums.lock().expect("no job panics while holding it")[expert] = done;
        Ok(())
    })?;
    let sums = sums.into_inner().expect("no job panics while holding it");
    write_sums(&dir.join(layer.records.sums_file()), &sums)?;
    file.finish()
}

/// Writes the checksums of a layer, `[experts][parts]`.
///
/// # Errors
/// The disk is full or fails.
pub fn write_sums(path: &Path, sums: &[Vec<u64>]) -> Result<()> {
    let bytes: Vec<u8> = sums.iter().flatten().flat_map(|sum| sum.to_le_bytes()).collect();
    write_whole(path, &bytes)
}
