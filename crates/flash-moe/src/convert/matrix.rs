//! One matrix on its way from the checkpoint into the container, a few rows at a time.
//!
//! Owns the arithmetic of conversion: carry bytes over, widen, scale FP8 blocks, quantise. A matrix
//! knows which rows of which stored tensor are its own, so stacks of experts, fused projections and
//! projections interleaved by head all look the same from outside. Refuses any value that is not
//! finite. Holds a few MiB, whatever the size of the matrix.

use std::fmt;
use std::ops::Range;

use anyhow::{Context, Result, bail, ensure};
use flash_moe_engine::container::{Precision, ScaleKind};
use flash_moe_kernels::{
    bf16_to_f32, f16_to_f32, narrow_bf16, quantise_row, widen_bf16, widen_e4m3, widen_f16,
};
use safetensors::Dtype;

use super::source::{Source, TensorId};

/// Side of the square blocks that share a scale in FP8 checkpoints.
const FP8_BLOCK: usize = 128;
/// Source bytes read at once.
const READ_BYTES: usize = 4 << 20;

/// How the stored tensor codes its weights.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Coding {
    /// BF16, F16 or F32.
    Float(Dtype),
    /// F8_E4M3 with a scale for each block of 128 by 128.
    Fp8 {
        /// The scales.
        scales: TensorId,
        /// Rows of one matrix of a stack; blocks start anew with each.
        stack_rows: usize,
    },
    /// MLX affine.
    Affine {
        /// Bits, group and type of the scales.
        precision: Precision,
        /// The scales.
        scales: TensorId,
        /// The biases.
        biases: TensorId,
    },
}

/// What errors call the matrix.
#[derive(Clone, PartialEq, Debug)]
pub enum Label {
    /// A dense tensor.
    Tensor(String),
    /// A projection of a routed expert.
    Expert {
        /// `layer 3`, `mtp layer 0`.
        layer: String,
        /// Index of the expert.
        expert: usize,
        /// `gate`, `up` or `down`.
        part: &'static str,
    },
}

impl fmt::Display for Label {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tensor(name) => f.write_str(name),
            Self::Expert { layer, expert, part } => write!(f, "{layer} expert {expert} {part}"),
        }
    }
}

/// A matrix of the container and where its rows come from.
#[derive(Clone, PartialEq, Debug)]
pub struct Matrix {
    /// What errors call it.
    pub label: Label,
    /// The stored weights, taken as `[all rows][cols]`.
    pub weight: TensorId,
    /// How they are coded.
    pub coding: Coding,
    /// Stored rows that make up the matrix, in order.
    pub segments: Vec<Range<usize>>,
    /// Rows of the matrix.
    pub rows: usize,
    /// Columns of the matrix.
    pub cols: usize,
    /// What it becomes.
    pub target: Precision,
}

/// Where rows of a matrix go; scales and biases are empty unless the target is affine.
pub struct Parts<'a> {
    /// `[rows][row_bytes]`
    pub weight: &'a mut [u8],
    /// `[rows][scale_row_bytes]`
    pub scales: &'a mut [u8],
    /// `[rows][scale_row_bytes]`
    pub biases: &'a mut [u8],
}

/// Buffers that one thread reuses for every matrix.
#[derive(Default)]
pub struct Scratch {
    bytes: Vec<u8>,         // [rows of a piece][cols] as stored
    row: Vec<f32>,          // [cols]
    scale_bytes: Vec<u8>,   // [blocks of a row] as stored
    block_scales: Vec<f32>, // [blocks of a row]
    scales: Vec<u16>,       // [groups]
    biases: Vec<u16>,       // [groups]
}

impl Matrix {
    /// Bytes of weights and of scales (or biases) of one row of the result.
    pub fn row_bytes(&self) -> (usize, usize) {
        let format = self.target.format();
        (format.row_bytes(self.cols), format.scale_row_bytes(self.cols))
    }

    /// Bytes of one stored row, without its scales.
    pub fn source_row_bytes(&self) -> usize {
        match self.coding {
            Coding::Float(dtype) => self.cols * dtype.bitsize() / 8,
            Coding::Fp8 { .. } => self.cols,
            Coding::Affine { precision, .. } => precision.format().row_bytes(self.cols),
        }
    }

    /// Bytes that converting the whole matrix reads.
    pub fn source_bytes(&self) -> u64 {
        let scale_bytes = match self.coding {
            Coding::Affine { precision, .. } => 2 * precision.format().scale_row_bytes(self.cols),
            Coding::Float(_) | Coding::Fp8 { .. } => 0,
        };
        (self.rows * (self.source_row_bytes() + scale_bytes)) as u64
    }

    /// Converts the given rows of the matrix into `out`.
    ///
    /// # Errors
    /// A failed read; a value that is not finite, named with its row and column.
    pub fn fill(
        &self,
        source: &Source,
        rows: Range<usize>,
        out: Parts<'_>,
        scratch: &mut Scratch,
    ) -> Result<()> {
        let (weight_bytes, scale_bytes) = self.row_bytes();
        let first = rows.start;
        for piece in self.pieces(rows) {
            let place = piece.row - first..piece.row - first + piece.stored.len();
            let sub = |bytes: usize| place.start * bytes..place.end * bytes;
            let parts = Parts {
                weight: &mut out.weight[sub(weight_bytes)],
                scales: &mut out.scales[sub(scale_bytes)],
                biases: &mut out.biases[sub(scale_bytes)],
            };
            self.fill_piece(source, &piece, parts, scratch)
                .with_context(|| self.label.to_string())?;
        }
        Ok(())
    }

    /// Splits rows of the matrix into runs that lie together in the stored tensor.
    fn pieces(&self, rows: Range<usize>) -> Vec<Piece> {
        let rows_max = (READ_BYTES / self.source_row_bytes()).max(1);
        let mut pieces = Vec::new();
        let mut segment_row = 0;
        for segment in &self.segments {
            let from = rows.start.max(segment_row);
            let to = rows.end.min(segment_row + segment.len());
            for row in (from..to).step_by(rows_max) {
                let stored = segment.start + row - segment_row;
                pieces.push(Piece { row, stored: stored..stored + rows_max.min(to - row) });
            }
            segment_row += segment.len();
        }
        pieces
    }

    fn fill_piece(
        &self,
        source: &Source,
        piece: &Piece,
        out: Parts<'_>,
        scratch: &mut Scratch,
    ) -> Result<()> {
        let start = (piece.stored.start * self.source_row_bytes()) as u64;
        match (self.coding, self.target) {
            (Coding::Affine { precision, scales, biases }, _) => {
                source.read(self.weight, start, out.weight)?;
                let scale_row_bytes = precision.format().scale_row_bytes(self.cols);
                let scale_start = (piece.stored.start * scale_row_bytes) as u64;
                for (id, bytes) in [(scales, out.scales), (biases, out.biases)] {
                    source.read(id, scale_start, bytes)?;
                    let groups = scale_row_bytes * 8 / source.tensor(id).dtype.bitsize();
                    check_finite(source.tensor(id).dtype, bytes, piece.row, groups)
                        .with_context(|| source.tensor(id).name.clone())?;
                }
                Ok(())
            }
            (Coding::Float(dtype), Precision::Bf16 | Precision::F16 | Precision::F32) => {
                source.read(self.weight, start, out.weight)?;
                check_finite(dtype, out.weight, piece.row, self.cols)
            }
            (_, _) => {
                let bytes = piece.stored.len() * self.source_row_bytes();
                scratch.bytes.resize(bytes, 0);
                source.read(self.weight, start, &mut scratch.bytes)?;
                self.recode(source, piece, out, scratch)
            }
        }
    }

    /// Turns the rows in `scratch.bytes` into the target precision, one at a time.
    fn recode(
        &self,
        source: &Source,
        piece: &Piece,
        out: Parts<'_>,
        scratch: &mut Scratch,
    ) -> Result<()> {
        let (weight_bytes, scale_bytes) = self.row_bytes();
        let stored_bytes = self.source_row_bytes();
        scratch.row.resize(self.cols, 0.0);
        for (i, stored) in piece.stored.clone().enumerate() {
            let bytes = i * stored_bytes..(i + 1) * stored_bytes;
            match self.coding {
                Coding::Float(dtype) => widen(dtype, &scratch.bytes[bytes], &mut scratch.row),
                Coding::Fp8 { scales, stack_rows } => {
                    widen_e4m3(&scratch.bytes[bytes], &mut scratch.row);
                    let block = block_row(stored, stack_rows);
                    if i == 0 || block != block_row(stored - 1, stack_rows) {
                        self.read_block_scales(source, scales, block, scratch)?;
                    }
                    for (x, scale) in scratch.row.chunks_mut(FP8_BLOCK).zip(&scratch.block_scales) {
                        x.iter_mut().for_each(|x| *x *= scale);
                    }
                }
                Coding::Affine { .. } => unreachable!("affine weights are carried over"),
            }
            let span = i * scale_bytes..(i + 1) * scale_bytes;
            let parts = Parts {
                weight: &mut out.weight[i * weight_bytes..][..weight_bytes],
                scales: &mut out.scales[span.clone()],
                biases: &mut out.biases[span],
            };
            finite_row(&scratch.row)
                .and_then(|()| put_row(self.target, parts, scratch))
                .with_context(|| format!("row {}", piece.row + i))?;
        }
        Ok(())
    }

    fn read_block_scales(
        &self,
        source: &Source,
        scales: TensorId,
        row: usize,
        scratch: &mut Scratch,
    ) -> Result<()> {
        let tensor = source.tensor(scales);
        let blocks = self.cols.div_ceil(FP8_BLOCK);
        let row_bytes = blocks * tensor.dtype.bitsize() / 8;
        scratch.scale_bytes.resize(row_bytes, 0);
        source.read(scales, (row * row_bytes) as u64, &mut scratch.scale_bytes)?;
        check_finite(tensor.dtype, &scratch.scale_bytes, row, blocks)
            .with_context(|| tensor.name.clone())?;
        scratch.block_scales.resize(blocks, 0.0);
        widen(tensor.dtype, &scratch.scale_bytes, &mut scratch.block_scales);
        Ok(())
    }
}

/// Writes the finite row in `scratch.row` as one row of the target precision.
fn put_row(target: Precision, out: Parts<'_>, scratch: &mut Scratch) -> Result<()> {
    let cols = scratch.row.len();
    match target {
        Precision::Bf16 => {
            narrow_bf16(&scratch.row, out.weight);
            check_finite(Dtype::BF16, out.weight, 0, cols).context("too large for bf16")
        }
        Precision::Affine { bits, group, .. } => {
            let groups = cols / usize::from(group);
            scratch.scales.resize(groups, 0);
            scratch.biases.resize(groups, 0);
            let (scales, biases) = (&mut scratch.scales[..], &mut scratch.biases[..]);
            quantise_row(&scratch.row, bits, group, out.weight, scales, biases);
            put_words(scales, out.scales);
            put_words(biases, out.biases);
            check_finite(Dtype::BF16, out.scales, 0, groups)
                .and_then(|()| check_finite(Dtype::BF16, out.biases, 0, groups))
                .context("too large for bf16 scales")
        }
        Precision::F16 | Precision::F32 => unreachable!("nothing is converted to these"),
    }
}

/// Rows that lie together in the stored tensor.
struct Piece {
    /// First row within the matrix.
    row: usize,
    /// Rows within the stored tensor.
    stored: Range<usize>,
}

/// Row of the scale tensor that belongs to a stored row.
fn block_row(stored: usize, stack_rows: usize) -> usize {
    stored / stack_rows * stack_rows.div_ceil(FP8_BLOCK) + stored % stack_rows / FP8_BLOCK
}

/// Shape of the scales of an FP8 matrix.
pub fn fp8_scale_shape(rows: usize, cols: usize) -> [usize; 2] {
    [rows.div_ceil(FP8_BLOCK), cols.div_ceil(FP8_BLOCK)]
}

/// Widens BF16, F16 or F32; other types are refused when the plan is made.
pub fn widen(dtype: Dtype, bytes: &[u8], out: &mut [f32]) {
    match dtype {
        Dtype::BF16 => widen_bf16(bytes, out),
        Dtype::F16 => widen_f16(bytes, out),
        Dtype::F32 => {
            for (x, raw) in out.iter_mut().zip(bytes.as_chunks::<4>().0) {
                *x = f32::from_le_bytes(*raw);
            }
        }
        other => unreachable!("{other} is not a float of ours"),
    }
}

/// The float precision of a stored type.
pub fn float_precision(dtype: Dtype) -> Option<Precision> {
    match dtype {
        Dtype::BF16 => Some(Precision::Bf16),
        Dtype::F16 => Some(Precision::F16),
        Dtype::F32 => Some(Precision::F32),
        _ => None,
    }
}

/// The stored type of scales.
pub fn scale_dtype(kind: ScaleKind) -> Dtype {
    match kind {
        ScaleKind::Bf16 => Dtype::BF16,
        ScaleKind::F16 => Dtype::F16,
        ScaleKind::F32 => Dtype::F32,
    }
}

/// Refuses stored floats that are not finite; `first_row` and `cols` turn an index into a place.
///
/// # Errors
/// The first value that is not finite, with its place.
pub fn check_finite(dtype: Dtype, bytes: &[u8], first_row: usize, cols: usize) -> Result<()> {
    let words = || bytes.as_chunks::<2>().0.iter().map(|w| u16::from_le_bytes(*w));
    let bad = match dtype {
        Dtype::BF16 => find(words(), |w| w & 0x7f80 == 0x7f80).map(|(i, w)| (i, bf16_to_f32(w))),
        Dtype::F16 => find(words(), |w| w & 0x7c00 == 0x7c00).map(|(i, w)| (i, f16_to_f32(w))),
        Dtype::F32 => {
            let singles = bytes.as_chunks::<4>().0.iter().map(|w| f32::from_le_bytes(*w));
            find(singles, |x| !x.is_finite())
        }
        other => bail!("{other} is not a float that can be read"),
    };
    match bad {
        None => Ok(()),
        Some((i, value)) => {
            bail!(
                "{value} at row {} column {}: the checkpoint is damaged",
                first_row + i / cols,
                i % cols
            )
        }
    }
}

fn find<T: Copy>(
    values: impl Iterator<Item = T> + Clone,
    bad: impl Fn(T) -> bool,
) -> Option<(usize, T)> {
    // A whole pass without an early exit is vectorised; the search happens only after it failed.
    let any = values.clone().fold(false, |any, value| any | bad(value));
    if any { values.enumerate().find(|&(_, value)| bad(value)) } else { None }
}

fn finite_row(row: &[f32]) -> Result<()> {
    match find(row.iter().copied(), |x: f32| !x.is_finite()) {
        None => Ok(()),
        Some((i, x)) => bail!("{x} at column {i}: the checkpoint is damaged"),
    }
}

fn put_words(words: &[u16], bytes: &mut [u8]) {
    for (word, out) in words.iter().zip(bytes.as_chunks_mut::<2>().0) {
        *out = word.to_le_bytes();
    }
}

/// Reads a whole stored vector as f32.
///
/// # Errors
/// Not a float, a failed read, a value that is not finite.
pub fn read_vector(source: &Source, id: TensorId) -> Result<Vec<f32>> {
    let tensor = source.tensor(id);
    ensure!(float_precision(tensor.dtype).is_some(), "{}: {} values", tensor.name, tensor.dtype);
    let mut bytes = vec![0u8; tensor.bytes as usize];
    source.read(id, 0, &mut bytes)?;
    let count = tensor.shape.iter().product();
    check_finite(tensor.dtype, &bytes, 0, count).with_context(|| tensor.name.clone())?;
    let mut values = vec![0.0; count];
    widen(tensor.dtype, &bytes, &mut values);
    Ok(values)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fp8_blocks_start_anew_with_each_matrix_of_a_stack() {
        let rows: Vec<usize> = [0, 127, 128, 199, 200, 327, 328].map(|r| block_row(r, 200)).into();
        assert_eq!(rows, [0, 0, 1, 1, 2, 2, 3]);
    }

    #[test]
    fn a_value_that_is_not_finite_is_found_in_every_type() {
        let bf16: Vec<u8> =
            [0x3f80u16, 0x7f7f, 0xff80].iter().flat_map(|w| w.to_le_bytes()).collect();
        let message = check_finite(Dtype::BF16, &bf16, 4, 2).unwrap_err().to_string();
        assert!(message.starts_with("-inf at row 5 column 0"), "{message}");
        assert!(check_finite(Dtype::BF16, &bf16[..4], 4, 2).is_ok());
        assert!(check_finite(Dtype::F16, &0x7c01u16.to_le_bytes(), 0, 1).is_err());
        assert!(check_finite(Dtype::F16, &0x7bffu16.to_le_bytes(), 0, 1).is_ok());
        assert!(check_finite(Dtype::F32, &f32::NAN.to_le_bytes(), 0, 1).is_err());
        assert!(check_finite(Dtype::F32, &f32::MAX.to_le_bytes(), 0, 1).is_ok());
    }

    #[test]
    fn pieces_follow_the_segments_and_the_read_limit() {
        let matrix = Matrix {
            label: Label::Tensor("m".into()),
            weight: TensorId(0),
            coding: Coding::Float(Dtype::F32),
            segments: vec![10..14, 20..26],
            rows: 10,
            cols: READ_BYTES / 8,
            target: Precision::F32,
        };
        let found: Vec<_> = matrix.pieces(1..8).into_iter().map(|p| (p.row, p.stored)).collect();
        assert_eq!(found, [(1, 11..13), (3, 13..14), (4, 20..22), (6, 22..24)]);
    }
}
