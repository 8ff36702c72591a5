//! The container: a directory that holds one model, laid out for streaming.
//!
//! `flash-moe.json` (this module's [`Manifest`]), one safetensors file with the dense tensors, one
//! file of fixed-stride records for each layer with experts, and the tokenizer files of the source.
//! `docs/container.md` draws it byte by byte. Opening checks every file's size against the manifest,
//! so a truncated file is found before the first token; reading a tensor checks its shape.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use flash_moe_kernels::{Format, Rows, ScaleType};
use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};
use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::xxh3_64;

use crate::compute::all_finite;
use crate::error::{Error, Result};
use crate::memory::{Block, page_multiple};
use crate::shape::{LayerId, Shape};
use crate::store::read::{read_exact_at, read_long_at};

/// Name of the manifest in a container directory.
pub const MANIFEST_FILE: &str = "flash-moe.json";
/// Name of the dense tensors' file that `convert` writes.
pub const DENSE_FILE: &str = "dense.safetensors";
/// Version of the layout that this build reads and writes.
pub const VERSION: u32 = 1;
/// Safetensors headers above this are refused, in bytes.
const HEADER_BYTES_MAX: u64 = 256 << 20;

/// How the weights of one matrix are stored.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum Precision {
    /// MLX affine: `bits` a weight, a scale and a bias for each `group` of columns.
    Affine {
        /// 2, 3, 4, 5, 6 or 8.
        bits: u8,
        /// 32, 64 or 128 columns.
        group: u16,
        /// Type of scales and biases.
        scales: ScaleKind,
    },
    /// bfloat16.
    Bf16,
    /// IEEE half.
    F16,
    /// IEEE single.
    F32,
}

/// Type of the scales and biases of an affine matrix.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ScaleKind {
    /// bfloat16, as all published checkpoints have it.
    Bf16,
    /// IEEE half.
    F16,
    /// IEEE single.
    F32,
}

impl Precision {
    /// The kernels' name for it.
    pub fn format(self) -> Format {
        match self {
            Self::Affine { bits, group, scales } => {
                Format::Affine { bits, group, scales: scales.kernel() }
            }
            Self::Bf16 => Format::Bf16,
            Self::F16 => Format::F16,
            Self::F32 => Format::F32,
        }
    }

    /// A short name for people: `4-bit g64`, `bf16`.
    pub fn name(self) -> String {
        match self {
            Self::Affine { bits, group, .. } => format!("{bits}-bit g{group}"),
            Self::Bf16 => "bf16".into(),
            Self::F16 => "f16".into(),
            Self::F32 => "f32".into(),
        }
    }
}

impl ScaleKind {
    fn kernel(self) -> ScaleType {
        match self {
            Self::Bf16 => ScaleType::Bf16,
            Self::F16 => ScaleType::F16,
            Self::F32 => ScaleType::F32,
        }
    }
}

/// One matrix inside an expert record: byte ranges relative to the record's start.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RecordMatrix {
    /// Precision of the weights.
    pub precision: Precision,
    /// Output rows.
    pub rows: usize,
    /// Input columns.
    pub cols: usize,
    /// Start of weights, of scales, of biases, and the end; the last three coincide unless affine.
    pub offsets: [usize; 4],
}

impl RecordMatrix {
    fn at(start: usize, precision: Precision, rows: usize, cols: usize) -> Self {
        let format = precision.format();
        let scales = start + rows * format.row_bytes(cols);
        let biases = scales + rows * format.scale_row_bytes(cols);
        let end = biases + rows * format.scale_row_bytes(cols);
        Self { precision, rows, cols, offsets: [start, scales, biases, end] }
    }

    /// The matrix within a record's bytes.
    pub fn rows<'a>(&self, record: &'a [u8]) -> Rows<'a> {
        let [weight, scales, biases, end] = self.offsets;
        Rows::new(
            self.precision.format(),
            self.rows,
            self.cols,
            &record[weight..scales],
            &record[scales..biases],
            &record[biases..end],
        )
        .expect("a record layout is checked when the container opens")
    }
}

/// Layout of one expert's record: gate, up, down, each weights then scales then biases.
///
/// With 4-bit group-64 matrices it is byte for byte the original engine's `packed_experts` record.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RecordLayout {
    /// `[width, hidden]`.
    pub gate: RecordMatrix,
    /// `[width, hidden]`.
    pub up: RecordMatrix,
    /// `[hidden, width]`.
    pub down: RecordMatrix,
}

impl RecordLayout {
    /// The layout for an expert of the given width, precisions in the order gate, up, down.
    ///
    /// # Errors
    /// A width that the precision cannot hold (not a multiple of its group).
    pub fn new(hidden: usize, width: usize, precisions: [Precision; 3]) -> Result<Self> {
        for (precision, cols) in precisions.iter().zip([hidden, hidden, width]) {
            precision.format().check(cols).map_err(|e| {
                Error::Container(format!(
                    "expert matrix of {cols} columns as {}: {e}",
                    precision.name()
                ))
            })?;
        }
        let gate = RecordMatrix::at(0, precisions[0], width, hidden);
        let up = RecordMatrix::at(gate.offsets[3], precisions[1], width, hidden);
        let down = RecordMatrix::at(up.offsets[3], precisions[2], hidden, width);
        Ok(Self { gate, up, down })
    }

    /// Bytes of a record without padding.
    pub fn record_bytes(&self) -> usize {
        self.down.offsets[3]
    }

    /// Bytes of a record rounded up to whole pages: what a slot holds and `convert` writes.
    pub fn padded_bytes(&self) -> usize {
        page_multiple(self.record_bytes())
    }

    /// The parts in file order with their names and byte ranges; what checksums cover.
    pub fn parts(&self) -> Vec<(String, std::ops::Range<usize>)> {
        let mut parts = Vec::new();
        for (name, m) in [("gate", &self.gate), ("up", &self.up), ("down", &self.down)] {
            for (piece, range) in ["weight", "scales", "biases"].iter().zip(m.offsets.windows(2)) {
                if range[0] < range[1] {
                    parts.push((format!("{name}.{piece}"), range[0]..range[1]));
                }
            }
        }
        parts
    }
}

/// Expert records of one layer.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct ExpertFile {
    /// The layer; for multi-token-prediction experts the index of the prediction layer.
    pub layer: LayerId,
    /// Path relative to the container.
    pub file: String,
    /// Records in the file.
    pub experts: usize,
    /// Precision of gate, up, down.
    pub precisions: [Precision; 3],
    /// Size of a record without padding; redundant, for readers of the file.
    pub record_bytes: usize,
    /// Distance between records: whole pages, or the record itself in a directory of the original
    /// engine, whose records are not padded.
    pub stride_bytes: usize,
    /// Path of the checksums: one little-endian xxh3-64 a part, `[experts][parts]`.
    pub sums_file: String,
    /// xxh3-64 of the checksum file itself, in hexadecimal.
    pub sums_checksum: String,
}

impl ExpertFile {
    /// The record layout of this file.
    ///
    /// # Errors
    /// See [`RecordLayout::new`].
    pub fn layout(&self, shape: &Shape) -> Result<RecordLayout> {
        RecordLayout::new(shape.hidden, shape.moe.width, self.precisions)
    }
}

/// The file of dense tensors.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct DenseFile {
    /// Path relative to the container.
    pub file: String,
    /// Its exact size.
    pub bytes: u64,
    /// xxh3-64 of everything before the first tensor's bytes, in hexadecimal.
    pub header_checksum: String,
    /// xxh3-64 of each tensor's bytes, in hexadecimal.
    pub checksums: BTreeMap<String, String>,
}

/// `flash-moe.json`.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Manifest {
    /// Always `flash-moe`.
    pub format: String,
    /// Layout version; see [`VERSION`].
    pub version: u32,
    /// A name for people.
    pub name: String,
    /// What the weights came from, for people: `hub BF16`, `MLX 4-bit`, `synthetic`.
    pub source: String,
    /// The model's shape.
    pub shape: Shape,
    /// Dense tensors.
    pub dense: DenseFile,
    /// Experts, one entry for each layer that has them, in layer order.
    pub experts: Vec<ExpertFile>,
    /// Experts of the multi-token-prediction layers; kept, not used by the forward pass.
    pub mtp_experts: Vec<ExpertFile>,
    /// What was skipped or rounded on the way here, for people.
    pub notes: Vec<String>,
}

/// An opened container.
pub struct Container {
    dir: PathBuf,
    manifest: Manifest,
    identity: u64,
    layouts: Vec<RecordLayout>,
    dense_path: PathBuf,
    dense: File,
    header: Metadata,
    data_start: u64,
}

impl Container {
    /// Opens a container directory and checks the manifest and every file's size.
    ///
    /// # Errors
    /// Missing directory or file, another format version, malformed JSON, a file of another size.
    pub fn open(dir: &Path) -> Result<Self> {
        let (manifest, identity) = read_manifest(dir)?;
        manifest.shape.check()?;
        let layouts = check_expert_files(dir, &manifest)?;
        let dense_path = dir.join(&manifest.dense.file);
        check_size(&dense_path, manifest.dense.bytes)?;
        let dense = File::open(&dense_path).map_err(|e| Error::io(&dense_path, e))?;
        let (header, data_start) = read_safetensors_header(&dense_path, &dense)?;
        let dir = dir.into();
        Ok(Self { dir, manifest, identity, layouts, dense_path, dense, header, data_start })
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The manifest.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// xxh3-64 of the manifest's bytes: it names every checksum, so two models never share it.
    pub fn identity(&self) -> u64 {
        self.identity
    }

    /// The model's shape.
    pub fn shape(&self) -> &Shape {
        &self.manifest.shape
    }

    /// Stretches the model's positions by YaRN: see [`Shape::stretch`].
    ///
    /// # Errors
    /// As there.
    pub fn stretch(&mut self, factor: f64) -> Result<()> {
        self.manifest.shape.stretch(factor)
    }

    /// Record layouts, in the order of the manifest's expert files.
    pub fn layouts(&self) -> &[RecordLayout] {
        &self.layouts
    }

    /// Whether a dense tensor exists.
    pub fn has(&self, name: &str) -> bool {
        self.header.info(name).is_some()
    }

    /// Names, types and sizes of the dense tensors, in file order.
    pub fn dense_tensors(&self) -> Vec<(String, TensorInfo)> {
        let names = self.header.offset_keys();
        names.into_iter().filter_map(|n| self.header.info(&n).cloned().map(|i| (n, i))).collect()
    }

    /// Reads the bytes of one dense tensor into a new block.
    ///
    /// # Errors
    /// No such tensor; the read failed or came up short.
    pub fn tensor_bytes(&self, name: &str) -> Result<Block> {
        let info = self.info(name)?;
        let (start, end) = info.data_offsets;
        let mut block = Block::zeroed(end - start);
        read_long_at(&self.dense, block.bytes_mut(), self.data_start + start as u64)
            .map_err(|e| Error::io(&self.dense_path, e))?;
        Ok(block)
    }

    /// Reads a vector or small tensor of `elements` values as f32.
    ///
    /// # Errors
    /// No such tensor, another element count, a type that is not a float, a value that is not finite.
    pub fn vector(&self, name: &str, elements: usize) -> Result<Vec<f32>> {
        let info = self.info(name)?;
        let count: usize = info.shape.iter().product();
        if count != elements {
            return Err(self.wrong(name, &format!("{count} values, expected {elements}")));
        }
        let block = self.tensor_bytes(name)?;
        let mut out = vec![0.0f32; elements];
        float_values(info.dtype, block.bytes(), &mut out)
            .ok_or_else(|| self.wrong(name, &format!("{:?}, expected floats", info.dtype)))?;
        if !all_finite(&out) {
            return Err(self.wrong(name, "a value that is not finite; run `flash-moe verify`"));
        }
        Ok(out)
    }

    /// Precision of the matrix `name` (without `.weight`), from its tensors' types and shapes.
    ///
    /// # Errors
    /// No such tensor, or shapes that fit no precision for `rows` by `cols`.
    pub fn precision(&self, name: &str, rows: usize, cols: usize) -> Result<Precision> {
        let weight = self.info(&format!("{name}.weight"))?;
        let wrong = |what: &str| {
            self.wrong(
                name,
                &format!(
                    "{what}: weight {:?} {:?} for [{rows}, {cols}]",
                    weight.dtype, weight.shape
                ),
            )
        };
        let (found_rows, found_cols) = match weight.shape[..] {
            [r, c] => (r, c),
            _ => return Err(wrong("not a matrix")),
        };
        if found_rows != rows {
            return Err(wrong("wrong number of rows"));
        }
        let plain = match weight.dtype {
            Dtype::BF16 => Some(Precision::Bf16),
            Dtype::F16 => Some(Precision::F16),
            Dtype::F32 => Some(Precision::F32),
            _ => None,
        };
        if let Some(precision) = plain {
            return if found_cols == cols { Ok(precision) } else { Err(wrong("wrong width")) };
        }
        let scales = self.info(&format!("{name}.scales"))?;
        affine_precision(found_cols, cols, scales).ok_or_else(|| wrong("no affine layout fits"))
    }

    /// Reads the matrix `name` (without `.weight`), `[rows, cols]`, into memory of its own.
    ///
    /// # Errors
    /// As [`Container::precision`] and [`Container::tensor_bytes`].
    pub fn matrix(&self, name: &str, rows: usize, cols: usize) -> Result<Matrix> {
        let precision = self.precision(name, rows, cols)?;
        let weight = self.tensor_bytes(&format!("{name}.weight"))?;
        let affine = matches!(precision, Precision::Affine { .. });
        let part = |suffix: &str| match affine {
            true => self.tensor_bytes(&format!("{name}.{suffix}")),
            false => Ok(Block::zeroed(0)),
        };
        let parts = [weight, part("scales")?, part("biases")?];
        Matrix::new(precision, rows, cols, parts).map_err(|e| self.wrong(name, &e.to_string()))
    }

    fn info(&self, name: &str) -> Result<&TensorInfo> {
        self.header.info(name).ok_or_else(|| self.wrong(name, "no such tensor"))
    }

    fn wrong(&self, name: &str, what: &str) -> Error {
        Error::Container(format!("{}: tensor {name}: {what}", self.dense_path.display()))
    }
}

/// A dense matrix in memory of its own.
pub struct Matrix {
    precision: Precision,
    rows: usize,
    cols: usize,
    weight: Block,
    scales: Block,
    biases: Block,
}

impl Matrix {
    /// `[rows, cols]` from its weights, scales and biases; the last two empty unless affine.
    ///
    /// # Errors
    /// `LayoutError` if the precision has no such rows or a part is not as long as the shape.
    pub fn new(
        precision: Precision,
        rows: usize,
        cols: usize,
        [weight, scales, biases]: [Block; 3],
    ) -> Result<Self, flash_moe_kernels::LayoutError> {
        let matrix = Self { precision, rows, cols, weight, scales, biases };
        matrix.try_rows().map(|_| ())?;
        Ok(matrix)
    }

    /// The matrix as the kernels take it.
    pub fn rows(&self) -> Rows<'_> {
        self.try_rows().expect("a matrix is checked when it is read")
    }

    /// Number of output rows.
    pub fn row_count(&self) -> usize {
        self.rows
    }

    /// Number of input columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// How it is stored.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// Bytes of the weights, the scales and the biases, row after row; the last two empty unless affine.
    pub fn parts(&self) -> [&[u8]; 3] {
        [self.weight.bytes(), self.scales.bytes(), self.biases.bytes()]
    }

    /// Bytes of weights, scales and biases.
    pub fn bytes(&self) -> usize {
        self.weight.bytes().len() + self.scales.bytes().len() + self.biases.bytes().len()
    }

    fn try_rows(&self) -> Result<Rows<'_>, flash_moe_kernels::LayoutError> {
        Rows::new(
            self.precision.format(),
            self.rows,
            self.cols,
            self.weight.bytes(),
            self.scales.bytes(),
            self.biases.bytes(),
        )
    }
}

/// Affine bits and group, from the stored widths alone: `bits = packed * 32 / cols`.
///
/// Shapes are believed, never the configuration: published files disagree with their own.
pub fn affine_precision(packed_cols: usize, cols: usize, scales: &TensorInfo) -> Option<Precision> {
    let groups = *scales.shape.last()?;
    if groups == 0 || !cols.is_multiple_of(groups) || !(packed_cols * 32).is_multiple_of(cols) {
        return None;
    }
    let scale_kind = match scales.dtype {
        Dtype::BF16 => ScaleKind::Bf16,
        Dtype::F16 => ScaleKind::F16,
        Dtype::F32 => ScaleKind::F32,
        _ => return None,
    };
    let bits = u8::try_from(packed_cols * 32 / cols).ok()?;
    let group = u16::try_from(cols / groups).ok()?;
    let precision = Precision::Affine { bits, group, scales: scale_kind };
    precision.format().check(cols).ok().map(|()| precision)
}

/// Widens stored floats to f32; `None` for a type that is not a float or another length.
pub fn float_values(dtype: Dtype, bytes: &[u8], out: &mut [f32]) -> Option<()> {
    let width = match dtype {
        Dtype::F32 => 4,
        Dtype::BF16 | Dtype::F16 => 2,
        _ => return None,
    };
    if bytes.len() != out.len() * width {
        return None;
    }
    for (value, raw) in out.iter_mut().zip(bytes.chunks_exact(width)) {
        *value = match dtype {
            Dtype::F32 => f32::from_le_bytes([raw[0], raw[1], raw[2], raw[3]]),
            Dtype::BF16 => half::bf16::from_le_bytes([raw[0], raw[1]]).to_f32(),
            _ => half::f16::from_le_bytes([raw[0], raw[1]]).to_f32(),
        };
    }
    Some(())
}

/// Reads and parses the header of an open safetensors file.
///
/// Returns the metadata and the file offset at which tensor data starts.
///
/// # Errors
/// A header that is cut off, too long, or that the safetensors library refuses.
pub fn read_safetensors_header(path: &Path, file: &File) -> Result<(Metadata, u64)> {
    let malformed = |what: String| Error::Container(format!("{}: {what}", path.display()));
    let mut length = [0u8; 8];
    let mut reader = file;
    reader
        .read_exact(&mut length)
        .map_err(|_| malformed("too short for a safetensors file".into()))?;
    let header_bytes = u64::from_le_bytes(length);
    if header_bytes > HEADER_BYTES_MAX {
        return Err(malformed(format!("header of {header_bytes} bytes is not plausible")));
    }
    let mut buffer = vec![0u8; 8 + header_bytes as usize];
    read_exact_at(file, &mut buffer, 0)
        .map_err(|_| malformed("header is cut off: the file is truncated".into()))?;
    // `SafeTensors::read_metadata` wants the whole file in memory; the metadata's own reader makes the
    // same checks of offsets and sizes on the header alone.
    let metadata: Metadata =
        serde_json::from_slice(&buffer[8..]).map_err(|e| malformed(format!("bad header: {e}")))?;
    Ok((metadata, 8 + header_bytes))
}

/// The manifest and the xxh3-64 of its bytes.
fn read_manifest(dir: &Path) -> Result<(Manifest, u64)> {
    let path = dir.join(MANIFEST_FILE);
    if !path.exists() {
        let hint = match (dir.exists(), dir.join("config.json").exists()) {
            (false, _) => "no such directory",
            (true, true) => "not a container yet: run `flash-moe convert` on it first",
            (true, false) => "no flash-moe.json in it: not a model directory",
        };
        return Err(Error::Container(format!("{}: {hint}", dir.display())));
    }
    let text = std::fs::read_to_string(&path).map_err(|e| Error::io(&path, e))?;
    let malformed = |what: String| Error::Container(format!("{}: {what}", path.display()));
    let value: serde_json::Value =
        serde_json::from_str(&text).map_err(|e| malformed(format!("not JSON: {e}")))?;
    let version = value.get("version").and_then(serde_json::Value::as_u64);
    if version != Some(u64::from(VERSION)) {
        return Err(malformed(format!(
            "layout version {version:?}, this build reads {VERSION}; convert the model again"
        )));
    }
    let manifest = serde_json::from_value(value).map_err(|e| malformed(e.to_string()))?;
    Ok((manifest, xxh3_64(text.as_bytes())))
}

fn check_expert_files(dir: &Path, manifest: &Manifest) -> Result<Vec<RecordLayout>> {
    let expected: Vec<LayerId> = manifest.shape.expert_layers().collect();
    let listed: Vec<LayerId> = manifest.experts.iter().map(|e| e.layer).collect();
    if expected != listed {
        return Err(Error::Container(format!(
            "{}: the manifest lists {} expert layers, the shape has {}",
            dir.display(),
            listed.len(),
            expected.len()
        )));
    }
    let mut layouts = Vec::new();
    for entry in &manifest.experts {
        let layout = entry.layout(&manifest.shape)?;
        if entry.experts != manifest.shape.moe.experts {
            return Err(Error::Container(format!(
                "{}: {} records for {} experts",
                entry.file, entry.experts, manifest.shape.moe.experts
            )));
        }
        let strides = [layout.record_bytes(), layout.padded_bytes()];
        if entry.record_bytes != layout.record_bytes() || !strides.contains(&entry.stride_bytes) {
            return Err(Error::Container(format!(
                "{}: records of {} bytes every {}, expected {} every {}",
                entry.file, entry.record_bytes, entry.stride_bytes, strides[0], strides[1]
            )));
        }
        check_size(&dir.join(&entry.file), (entry.stride_bytes * entry.experts) as u64)?;
        layouts.push(layout);
    }
    Ok(layouts)
}

fn check_size(path: &Path, expected: u64) -> Result<()> {
    let found = std::fs::metadata(path).map_err(|e| Error::io(path, e))?.len();
    if found == expected {
        return Ok(());
    }
    Err(Error::Container(format!(
        "{}: {found} bytes, expected {expected}: the file is damaged or the conversion did not finish",
        path.display()
    )))
}
