//! Dense weights on the device: all matrices of one dispatch in one buffer, or in several.
//!
//! A part is a buffer with a header, the vector that its input needs and matrices as the container has
//! them. The header says where each matrix lies, how it is stored and where its output goes. What does
//! not fit one buffer is cut by rows into several parts, each a dispatch of its own.

use std::ops::Range;

use wgpu::{BindGroup, Buffer};

use super::device::Device;
use super::kernels::Views;
use super::layout::{HEADER_VECTORS, SEGMENTS_MAX};
use super::source::scale_bytes;
use crate::container::{Matrix, Precision};
use crate::error::{Error, Result};

/// Teams of a workgroup.
pub const TEAMS: usize = 8;
/// Workgroups of a product with one vector at most: each brings the input in anew, so that more of them
/// than a large device runs at once only cost.
const WORKGROUPS_MAX: usize = 528;

/// Rows of a tile of a product with many vectors.
const TILE_ROWS: usize = 64;

/// A matrix and where its output begins, in words.
pub struct Segment<'a> {
    /// The weights.
    pub matrix: &'a Matrix,
    /// The place of row 0 in the scratch of a token.
    pub to: usize,
    /// The same in the scratch of a chunk.
    pub chunk_to: usize,
}

/// What one dispatch reads.
pub struct Part {
    /// Its buffer.
    pub group: BindGroup,
    /// Workgroups that cover its rows for one vector.
    pub workgroups: u32,
    /// Tiles of 64 rows that cover them for many.
    pub tiles: u32,
    /// Bytes of it.
    pub bytes: u64,
}

/// Bytes of several.
pub fn bytes_of(parts: &[Part]) -> u64 {
    parts.iter().map(|part| part.bytes).sum()
}

/// How matrices become parts.
pub struct Packing<'a> {
    /// Layouts; a matrix's code is its place here.
    pub precisions: &'a [Precision],
    /// Bytes of a buffer at most.
    pub buffer_bytes: u64,
    /// The kernels' views, of which a part is one that is read.
    pub views: &'a Views,
}

struct Piece<'a> {
    matrix: &'a Matrix,
    rows: Range<usize>,
    to: [usize; 2], // in the scratch of a token, of a chunk
}

impl Piece<'_> {
    fn bytes(&self) -> usize {
        let format = self.matrix.precision().format();
        let cols = self.matrix.cols();
        let count = self.rows.len();
        (count * format.row_bytes(cols)).next_multiple_of(16)
            + 2 * (count * format.scale_row_bytes(cols)).next_multiple_of(16)
    }
}

impl Packing<'_> {
    /// Packs the matrices of a dispatch, `rows` rows a team, behind the vector of its input.
    ///
    /// # Errors
    /// A matrix whose columns are no whole units; the device has no memory left.
    pub fn pack(
        &self,
        device: &Device,
        name: &str,
        segments: &[Segment],
        vector: &[f32],
        rows: usize,
    ) -> Result<Vec<Part>> {
        let room = self.buffer_bytes as usize - HEADER_VECTORS * 16 - vector.len() * 4 - 16;
        let mut pieces = Vec::new();
        for segment in segments {
            pieces.extend(cut(segment, room)?);
        }
        let mut parts = Vec::new();
        let mut rest = &pieces[..];
        while !rest.is_empty() {
            let mut bytes = 0;
            let fitting = rest.iter().take(SEGMENTS_MAX).take_while(|piece| {
                bytes += piece.bytes();
                bytes <= room
            });
            let (now, after) = rest.split_at(fitting.count().max(1));
            parts.push(self.part(device, name, now, (vector, rows))?);
            rest = after;
        }
        Ok(parts)
    }

    fn part(
        &self,
        device: &Device,
        name: &str,
        pieces: &[Piece],
        (vector, rows): (&[f32], usize),
    ) -> Result<Part> {
        let mut header = [0u32; HEADER_VECTORS * 4];
        header[0] = pieces.len() as u32;
        let vector = in_staged_order(vector);
        let mut contents = Contents { bytes: HEADER_VECTORS * 16, writes: Vec::new() };
        contents.append(bytemuck::cast_slice(&vector));
        let (mut workgroups, mut tiles) = (0, 0);
        for (piece, head) in pieces.iter().zip(header[4..].chunks_exact_mut(12)) {
            let (precision, cols) = (piece.matrix.precision(), piece.matrix.cols());
            let format = precision.format();
            let strides = [format.row_bytes(cols), format.scale_row_bytes(cols)];
            let [weight, scales, biases] = piece.matrix.parts();
            let of = |bytes, stride| part_of(bytes, &piece.rows, stride);
            let places = [
                contents.append(of(weight, strides[0])) / 4,
                contents.append(of(scales, strides[1])) / scale_bytes(precision),
                contents.append(of(biases, strides[1])) / scale_bytes(precision),
            ];
            let code = self.precisions.iter().position(|p| *p == precision);
            let code = code.expect("every layout of the model is listed");
            let [at, scales, biases] = places;
            let (count, stride) = (piece.rows.len(), piece.matrix.row_count());
            let [to, chunk_to] = piece.to;
            let first = piece.rows.start;
            let (seen, lies) =
                ([workgroups, count, code, stride], [at, scales, biases, to + first]);
            let numbers = [seen, lies, [first, chunk_to, 0, 0]].concat();
            head.iter_mut().zip(numbers).for_each(|(word, number)| *word = number as u32);
            workgroups += count.div_ceil(TEAMS * rows);
            tiles += count.div_ceil(TILE_ROWS);
        }
        header[1] = workgroups as u32;
        let bytes = contents.bytes as u64;
        let buffer = device.buffer(name, bytes)?;
        device.write_all(&buffer, 0, bytemuck::cast_slice(&header))?;
        contents.upload(device, &buffer)?;
        let group = self.views.read_group(device, &buffer)?;
        let workgroups = workgroups.min(WORKGROUPS_MAX);
        Ok(Part { group, workgroups: workgroups as u32, tiles: tiles as u32, bytes })
    }
}

/// Elements j, j + 8, j + 16 and j + 24 of each 32 together, for j from 0 to 7.
fn in_staged_order(vector: &[f32]) -> Vec<f32> {
    let of = |at: usize| (at & !31) + (at >> 2 & 7) + 8 * (at & 3);
    (0..vector.len()).map(|at| vector[of(at)]).collect()
}

/// Bytes that the parts of these matrices take together.
pub fn packed_bytes<'a>(matrices: impl Iterator<Item = &'a Matrix>, vector: usize) -> u64 {
    let pieces = matrices.map(|m| Piece { matrix: m, rows: 0..m.row_count(), to: [0; 2] }.bytes());
    (pieces.sum::<usize>() + HEADER_VECTORS * 16 + vector * 4 + 16) as u64
}

/// The matrix in pieces of so many bytes at most.
fn cut<'a>(segment: &Segment<'a>, room: usize) -> Result<Vec<Piece<'a>>> {
    let Segment { matrix, to, chunk_to } = *segment;
    let (rows, cols) = (matrix.row_count(), matrix.cols());
    if !cols.is_multiple_of(32) {
        return Err(Error::Gpu(format!(
            "a matrix of {cols} columns: the GPU's kernels take multiples of 32; --device cpu takes any"
        )));
    }
    let row = matrix.precision().format().matrix_bytes(1, cols);
    let most = (room.saturating_sub(3 * 16) / row).max(1);
    let starts = (0..rows).step_by(most);
    Ok(starts
        .map(|first| Piece { matrix, rows: first..rows.min(first + most), to: [to, chunk_to] })
        .collect())
}

fn part_of<'a>(bytes: &'a [u8], rows: &Range<usize>, stride: usize) -> &'a [u8] {
    &bytes[rows.start * stride..rows.end * stride]
}

/// What a buffer is to hold behind its header, where the weights lie already.
struct Contents<'a> {
    bytes: usize,
    writes: Vec<(usize, &'a [u8])>,
}

impl<'a> Contents<'a> {
    /// Adds bytes at the next multiple of 16 and gives where that is.
    fn append(&mut self, bytes: &'a [u8]) -> usize {
        let at = self.bytes;
        self.writes.push((at, bytes));
        self.bytes = (at + bytes.len()).next_multiple_of(16);
        at
    }

    /// Writes all of it, never more at once than the device stages.
    fn upload(&self, device: &Device, buffer: &Buffer) -> Result<()> {
        for (at, bytes) in &self.writes {
            // A copy has whole words: the last scale of an odd number has one of its own.
            let (words, rest) = bytes.split_at(bytes.len() & !3);
            let mut last = [0; 4];
            last[..rest.len()].copy_from_slice(rest);
            if !words.is_empty() {
                device.write_all(buffer, *at as u64, words)?;
            }
            if !rest.is_empty() {
                device.write_all(buffer, (at + words.len()) as u64, &last)?;
            }
        }
        Ok(())
    }
}
