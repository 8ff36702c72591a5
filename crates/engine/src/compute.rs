//! Matrices times token rows, spread over the worker pool.
//!
//! One token is a matrix-vector product on the packed weights; several tokens unpack each row once
//! and multiply it by all of them. How rows are split over threads never changes a result.

use std::cell::RefCell;

use flash_moe_kernels::{Format, Isa, Rows};

use crate::pool::Pool;

/// Weights in one work item: large against the cost of claiming it, small against a layer.
const ITEM_WEIGHTS: usize = 64 * 1024;

thread_local! {
    static ROW: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// Calls `work` with this thread's scratch of at least `len` floats; contents are arbitrary.
pub fn with_scratch<T>(len: usize, work: impl FnOnce(&mut [f32]) -> T) -> T {
    ROW.with_borrow_mut(|scratch| {
        if scratch.len() < len {
            scratch.resize(len, 0.0);
        }
        work(&mut scratch[..len])
    })
}

/// The instruction set and the threads.
pub struct Compute {
    /// Kernels to use.
    pub isa: Isa,
    /// Threads to use.
    pub pool: Pool,
}

/// Buffers that a projection needs beside its input and output.
#[derive(Default)]
pub struct Temporary {
    /// Group sums of one token, `[cols / group]`.
    pub sums: Vec<f32>,
    /// A second matrix's group sums, where its group differs.
    pub other_sums: Vec<f32>,
    /// Output before it is transposed, `[rows][tokens]`.
    pub transposed: Vec<f32>,
}

impl Compute {
    /// `y = W x` for each token: `x [tokens][cols]`, `y [tokens][rows]`.
    pub fn project(&self, w: &Rows, x: &[f32], y: &mut [f32], tmp: &mut Temporary) {
        let tokens = x.len() / w.cols();
        debug_assert_eq!(y.len(), tokens * w.rows());
        if tokens == 1 {
            self.group_sums(w.format(), x, &mut tmp.sums);
            let rows = item_rows(w);
            let sums = &tmp.sums;
            self.pool.chunks(y, rows, |i, y| self.isa.mat_vec(w, i * rows, x, sums, y));
            return;
        }
        let transposed = sized(&mut tmp.transposed, y.len());
        self.project_transposed(w, x, transposed);
        self.transpose(transposed, w.rows(), y);
    }

    /// As [`Compute::project`] with `y [rows][tokens]`, unpacking each row once.
    pub fn project_transposed(&self, w: &Rows, x: &[f32], y: &mut [f32]) {
        let tokens = x.len() / w.cols();
        let rows = item_rows(w);
        self.pool.chunks(y, rows * tokens, |i, y| {
            with_scratch(w.cols(), |row| {
                for (r, y) in y.chunks_mut(tokens).enumerate() {
                    self.isa.unpack_row(w, i * rows + r, row);
                    self.isa.dots(row, x, y);
                }
            });
        });
    }

    /// `silu(G x) * (U x)` for each token: `x [tokens][cols]`, `out [tokens][rows]`.
    pub fn gate_up(&self, w: (&Rows, &Rows), x: &[f32], out: &mut [f32], tmp: &mut Temporary) {
        let (gate, up) = w;
        let tokens = x.len() / gate.cols();
        if tokens == 1 {
            self.group_sums(gate.format(), x, &mut tmp.sums);
            self.group_sums(up.format(), x, &mut tmp.other_sums);
            let rows = item_rows(gate);
            let sums = (&tmp.sums[..], &tmp.other_sums[..]);
            self.pool.chunks(out, rows, |i, out| {
                self.isa.gate_up(gate, up, i * rows, x, sums, out);
            });
            return;
        }
        let transposed = sized(&mut tmp.transposed, out.len());
        let rows = item_rows(gate);
        self.pool.chunks(transposed, rows * tokens, |i, y| {
            with_scratch(gate.cols() + 2 * tokens, |scratch| {
                let (row, products) = scratch.split_at_mut(gate.cols());
                let (g, u) = products.split_at_mut(tokens);
                for (r, y) in y.chunks_mut(tokens).enumerate() {
                    self.isa.unpack_row(gate, i * rows + r, row);
                    self.isa.dots(row, x, g);
                    self.isa.unpack_row(up, i * rows + r, row);
                    self.isa.dots(row, x, u);
                    self.isa.silu_mul(g, u, y);
                }
            });
        });
        self.transpose(transposed, gate.rows(), out);
    }

    /// Root-mean-square norm of each token row: `x`, `out` `[tokens][w.len()]`.
    pub fn norm(&self, x: &[f32], w: &[f32], eps: f32, out: &mut [f32]) {
        for (x, out) in x.chunks_exact(w.len()).zip(out.chunks_exact_mut(w.len())) {
            self.isa.rms_norm(x, w, eps, out);
        }
    }

    /// Sums of `x` over the format's groups; empty for plain formats.
    pub fn group_sums(&self, format: Format, x: &[f32], sums: &mut Vec<f32>) {
        match format {
            Format::Affine { group, .. } => {
                let group = usize::from(group);
                self.isa.group_sums(x, group, sized(sums, x.len() / group));
            }
            _ => sums.clear(),
        }
    }

    /// `[rows][columns]` to `[columns][rows]`.
    pub fn transpose(&self, from: &[f32], rows: usize, to: &mut [f32]) {
        let columns = from.len() / rows;
        // Blocks of columns keep a cache line of the source in use across their rows.
        const BLOCK: usize = 16;
        self.pool.chunks(to, BLOCK * rows, |block, to| {
            for row in 0..rows {
                for (c, to) in to.chunks_exact_mut(rows).enumerate() {
                    to[row] = from[row * columns + block * BLOCK + c];
                }
            }
        });
    }
}

/// The first `len` elements of a buffer that grows when it must; contents are arbitrary.
pub fn sized<T: Clone + Default>(buffer: &mut Vec<T>, len: usize) -> &mut [T] {
    buffer.resize(len, T::default());
    buffer
}

/// Rows of a matrix that make one work item.
pub fn item_rows(w: &Rows) -> usize {
    (ITEM_WEIGHTS / w.cols()).clamp(1, w.rows())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_token_and_many_agree_and_threads_change_nothing() {
        let (rows, cols, tokens) = (700, 192, 5);
        let weight: Vec<u8> = (0..rows * cols)
            .flat_map(|i| (((i * 37 % 101) as f32 - 50.0) / 64.0).to_le_bytes())
            .collect();
        let w = Rows::new(Format::F32, rows, cols, &weight, &[], &[]).unwrap();
        let x: Vec<f32> =
            (0..tokens * cols).map(|i| ((i * 29 % 83) as f32 - 41.0) / 32.0).collect();
        let mut results = Vec::new();
        for threads in [1, 3] {
            let compute = Compute { isa: Isa::detect(), pool: Pool::new(threads) };
            let mut tmp = Temporary::default();
            let mut many = vec![0.0; tokens * rows];
            compute.project(&w, &x, &mut many, &mut tmp);
            for (x, many) in x.chunks(cols).zip(many.chunks(rows)) {
                let mut one = vec![0.0; rows];
                compute.project(&w, x, &mut one, &mut tmp);
                for (a, b) in one.iter().zip(many) {
                    assert!((a - b).abs() < 1e-4, "{a} {b}");
                }
            }
            results.push(many);
        }
        assert_eq!(results[0], results[1]);
    }
}
