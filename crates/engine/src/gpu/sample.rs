//! Numbers and matrices out of a seed: what is measured and tested on.
//!
//! Every format of weights, with scales of all types; nothing in them is infinite or no number.

use flash_moe_kernels::{f32_to_bf16, f32_to_f16};

use super::source::scale_bytes;
use crate::container::{Matrix, Precision, ScaleKind};
use crate::memory::Block;

/// Numbers from -1 to 1 out of a seed.
pub struct Random(pub u64);

impl Random {
    /// The next 31 bits.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(0x5851_f42d_4c95_7f2d);
        self.0 >> 33
    }

    /// The next number.
    pub fn number(&mut self) -> f32 {
        self.bits() as f32 / (1u64 << 30) as f32 - 1.0
    }

    /// So many numbers.
    pub fn vector(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| self.number()).collect()
    }

    fn block(&mut self, bytes: &[u8]) -> Block {
        let mut block = Block::zeroed(bytes.len());
        block.bytes_mut().copy_from_slice(bytes);
        block
    }

    /// Numbers of this type as bytes: `lowest + n` for n from 0 to 2, times `factor`.
    fn stored(&mut self, kind: ScaleKind, count: usize, (lowest, factor): (f32, f32)) -> Vec<u8> {
        let numbers = (0..count).map(|_| (self.number() + 1.0 + lowest) * factor);
        match kind {
            ScaleKind::Bf16 => numbers.flat_map(|x| f32_to_bf16(x).to_le_bytes()).collect(),
            ScaleKind::F16 => numbers.flat_map(|x| f32_to_f16(x).to_le_bytes()).collect(),
            ScaleKind::F32 => numbers.flat_map(f32::to_le_bytes).collect(),
        }
    }

    /// A matrix whose weights lie between -2.5 and 3.5.
    ///
    /// # Panics
    /// Columns that are no whole groups.
    pub fn matrix(&mut self, precision: Precision, rows: usize, cols: usize) -> Matrix {
        let format = precision.format();
        let even = (-1.0, 1.0);
        let parts = match precision {
            Precision::Affine { bits, scales, .. } => {
                let bytes = (0..rows * format.row_bytes(cols)).map(|_| self.bits() as u8).collect();
                let count = rows * format.scale_row_bytes(cols) / scale_bytes(precision);
                let step = (0.5, 1.0 / f32::from(1u16 << bits));
                [bytes, self.stored(scales, count, step), self.stored(scales, count, even)]
            }
            Precision::Bf16 => [self.stored(ScaleKind::Bf16, rows * cols, even), vec![], vec![]],
            Precision::F16 => [self.stored(ScaleKind::F16, rows * cols, even), vec![], vec![]],
            Precision::F32 => [self.stored(ScaleKind::F32, rows * cols, even), vec![], vec![]],
        };
        let parts = parts.map(|bytes| self.block(&bytes));
        Matrix::new(precision, rows, cols, parts).expect("lengths of the format")
    }
}
