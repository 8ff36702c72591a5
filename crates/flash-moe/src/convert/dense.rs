//! Writing `dense.safetensors`: header from the plan, then every tensor at its place.
//!
//! The header is known before any data, so tensors are written by position, in any order, by any
//! thread, a few rows at a time: even an embedding of 2 GB passes through a few MiB. Checksums are
//! stored beside the file before it takes its name.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Mutex;

use anyhow::{Context, Result};
use serde_json::{Map, Value, json};
use xxhash_rust::xxh3::{Xxh3, xxh3_64};

use super::files::{PartialFile, write_whole};
use super::matrix::{Matrix, Parts, Scratch, read_vector};
use super::plan::{DenseItem, TensorLayout, Vector, VectorRule};
use super::progress::Progress;
use super::source::Source;
use super::workers::Workers;

/// Result rows converted at once, in bytes of the wider of source and result.
pub const CHUNK_BYTES: usize = 4 << 20;
/// Alignment of the first tensor.
const DATA_ALIGN: usize = 64;

/// Checksums of tensors by name, in hexadecimal.
pub type Checksums = BTreeMap<String, String>;

/// Places of tensors in a safetensors file.
pub struct DenseLayout {
    header: Vec<u8>,
    starts: BTreeMap<String, u64>,
    /// Size of the whole file.
    pub bytes: u64,
}

impl DenseLayout {
    /// Lays tensors out in the given order.
    pub fn new(tensors: &[TensorLayout]) -> Self {
        let mut entries = Map::new();
        entries.insert("__metadata__".into(), json!({ "format": "flash-moe" }));
        let mut offset = 0;
        for t in tensors {
            let range = [offset, offset + t.bytes()];
            let entry = json!({ "dtype": t.dtype, "shape": t.shape, "data_offsets": range });
            entries.insert(t.name.clone(), entry);
            offset = range[1];
        }
        let mut text = Value::Object(entries).to_string().into_bytes();
        text.resize((8 + text.len()).next_multiple_of(DATA_ALIGN) - 8, b' ');
        let mut header = (text.len() as u64).to_le_bytes().to_vec();
        header.append(&mut text);
        let mut start = header.len() as u64;
        let mut starts = BTreeMap::new();
        for t in tensors {
            starts.insert(t.name.clone(), start);
            start += t.bytes();
        }
        Self { header, starts, bytes: start }
    }

    /// The file's first bytes.
    pub fn header(&self) -> &[u8] {
        &self.header
    }

    /// Where a tensor starts in the file.
    pub fn start(&self, name: &str) -> u64 {
        self.starts[name]
    }
}

/// Tensors of all items, in file order.
pub fn layout(items: &[DenseItem]) -> DenseLayout {
    let tensors: Vec<TensorLayout> = items.iter().flat_map(DenseItem::tensors).collect();
    DenseLayout::new(&tensors)
}

/// Converts all items into `path`, their checksums into `sums_path`.
///
/// # Errors
/// A failed read or write, a value that is not finite.
pub fn write(
    source: &Source,
    items: &[DenseItem],
    (path, sums_path): (&Path, &Path),
    workers: &Workers,
    progress: &Progress,
) -> Result<()> {
    let layout = layout(items);
    let file = PartialFile::create(path)?;
    file.write_at(layout.header(), 0)?;
    let writer = Writer { source, layout: &layout, file: &file, progress };
    let sums = Mutex::new(Checksums::new());
    // The embedding takes longest by far: it starts first, or the other threads wait for it.
    let mut order: Vec<&DenseItem> = items.iter().collect();
    order.sort_by_key(|item| std::cmp::Reverse(item.source_bytes(source)));
    workers.run(order.len(), Scratch::default, |i, scratch| {
        let done = match order[i] {
            DenseItem::Vector(vector) => writer.vector(vector)?,
            DenseItem::Matrix(matrix) => writer.matrix(matrix, scratch)?,
        };
        sums.lock().expect("no job panics while holding it").extend(done);
        Ok(())
    })?;
    let sums = sums.into_inner().expect("no job panics while holding it");
    write_whole(sums_path, &serde_json::to_vec_pretty(&sums)?)?;
    file.finish()
}

/// Reads checksums that [`write`] stored.
///
/// # Errors
/// The file is missing or malformed.
pub fn read_checksums(path: &Path) -> Result<Checksums> {
    let text = std::fs::read(path).with_context(|| path.display().to_string())?;
    serde_json::from_slice(&text).with_context(|| path.display().to_string())
}

impl DenseItem {
    /// Bytes that converting it reads.
    pub fn source_bytes(&self, source: &Source) -> u64 {
        match self {
            Self::Vector(v) => source.tensor(v.tensor).bytes,
            Self::Matrix(m) => m.source_bytes(),
        }
    }
}

struct Writer<'a> {
    source: &'a Source,
    layout: &'a DenseLayout,
    file: &'a PartialFile,
    progress: &'a Progress,
}

impl Writer<'_> {
    fn vector(&self, vector: &Vector) -> Result<Vec<(String, String)>> {
        let mut values = read_vector(self.source, vector.tensor)?;
        match vector.rule {
            VectorRule::AsStored => {}
            VectorRule::OnePlus => values.iter_mut().for_each(|w| *w += 1.0),
            VectorRule::TapMajor => values = transposed(&values, vector.shape[0]),
        }
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        self.file.write_at(&bytes, self.layout.start(&vector.name))?;
        self.progress.read(self.source.tensor(vector.tensor).bytes);
        self.progress.wrote(bytes.len() as u64);
        Ok(vec![(vector.name.clone(), format!("{:016x}", xxh3_64(&bytes)))])
    }

    fn matrix(&self, matrix: &Matrix, scratch: &mut Scratch) -> Result<Vec<(String, String)>> {
        let item = matrix_names(matrix);
        let mut hashes = [Xxh3::new(), Xxh3::new(), Xxh3::new()];
        let (weight_bytes, scale_bytes) = matrix.row_bytes();
        let widths = [weight_bytes, scale_bytes, scale_bytes];
        let rows_max = (CHUNK_BYTES / weight_bytes.max(matrix.source_row_bytes())).max(1);
        for row in (0..matrix.rows).step_by(rows_max) {
            let rows = row..matrix.rows.min(row + rows_max);
            let mut out = widths.map(|width| vec![0u8; width * rows.len()]);
            let [weight, scales, biases] = &mut out;
            let parts = Parts { weight, scales, biases };
            matrix.fill(self.source, rows.clone(), parts, scratch)?;
            for (i, name) in item.iter().enumerate() {
                hashes[i].update(&out[i]);
                self.file.write_at(&out[i], self.layout.start(name) + (row * widths[i]) as u64)?;
                self.progress.wrote(out[i].len() as u64);
            }
            self.progress.read(matrix.source_bytes() * rows.len() as u64 / matrix.rows as u64);
        }
        Ok(item.into_iter().zip(hashes).map(|(n, h)| (n, format!("{:016x}", h.digest()))).collect())
    }
}

fn matrix_names(matrix: &Matrix) -> Vec<String> {
    let tensors = super::plan::matrix_tensors(
        &matrix.label.to_string(),
        matrix.rows,
        matrix.cols,
        matrix.target,
    );
    tensors.into_iter().map(|t| t.name).collect()
}

/// `[channels][taps]` to `[taps][channels]`.
fn transposed(values: &[f32], taps: usize) -> Vec<f32> {
    let channels = values.len() / taps;
    (0..taps).flat_map(|tap| (0..channels).map(move |c| values[c * taps + tap])).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use safetensors::{Dtype, SafeTensors};

    #[test]
    fn the_header_is_one_that_the_safetensors_library_reads() {
        let tensors = [
            TensorLayout { name: "a.weight".into(), dtype: Dtype::U32, shape: vec![2, 3] },
            TensorLayout { name: "a.scales".into(), dtype: Dtype::BF16, shape: vec![2, 1] },
        ];
        let layout = DenseLayout::new(&tensors);
        let mut file = layout.header().to_vec();
        assert!(file.len().is_multiple_of(DATA_ALIGN));
        file.extend((0..28).map(|i| i as u8));
        assert_eq!(file.len() as u64, layout.bytes);
        let read = SafeTensors::deserialize(&file).unwrap();
        assert_eq!(read.tensor("a.scales").unwrap().data(), [24, 25, 26, 27]);
        assert_eq!(file[layout.start("a.scales") as usize], 24);
    }

    #[test]
    fn taps_become_the_outer_dimension() {
        assert_eq!(transposed(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], 2), [1.0, 3.0, 5.0, 2.0, 4.0, 6.0]);
    }
}
