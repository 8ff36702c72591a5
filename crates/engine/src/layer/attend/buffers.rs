//! A thread's buffers for one block of query rows, and the calls that use them.
//!
//! Owns the cut of a thread's scratch into the parts that pages of each form need, and the queries in
//! both of their forms: floats for wide pages, integers for coded ones, made when the first coded
//! page comes. Rows that a call leaves out keep what they have gathered.

use flash_moe_kernels::{
    CodedPage, CodedQueries, CodedScratch, Gathered, Isa, NARROW_POSITIONS, Queries, can_code,
};

use crate::kv_cache::{PAGE_POSITIONS, WidePage};

/// Rows that a block has at most.
const ROWS_MAX: usize = super::BLOCK_ROWS;

/// Buffers of one block.
pub struct Buffers<'a> {
    /// `[rows][head_dim]`.
    pub queries: &'a mut [f32],
    head_dim: usize,
    scores: &'a mut [f32], // [rows][PAGE_POSITIONS]
    wide: &'a mut [f32],   // [keys, values][NARROW_POSITIONS][head_dim]
    scales: &'a mut [f32], // [rows]
    sums: &'a mut [f32],   // [rows]
    steps: &'a mut [f32],  // [2][rows]
    codes: &'a mut [i8],   // [rows][head_dim]
    weights: &'a mut [i8], // [2][rows][PAGE_POSITIONS]
    tile: &'a mut [u8],    // CodedScratch::tile_bytes
    is_coded: bool,        // whether `codes`, `scales` and `sums` are those of `queries`
}

impl<'a> Buffers<'a> {
    /// Floats of all buffers.
    pub fn floats(rows: usize, head_dim: usize) -> usize {
        let bytes =
            rows * head_dim + 2 * rows * PAGE_POSITIONS + CodedScratch::tile_bytes(head_dim);
        rows * (head_dim + PAGE_POSITIONS + 4) + 2 * NARROW_POSITIONS * head_dim + bytes.div_ceil(4)
    }

    /// Cuts a scratch of at least [`Buffers::floats`].
    pub fn of(scratch: &'a mut [f32], rows: usize, head_dim: usize) -> Self {
        let (queries, rest) = scratch.split_at_mut(rows * head_dim);
        let (wide, rest) = rest.split_at_mut(2 * NARROW_POSITIONS * head_dim);
        let (scores, rest) = rest.split_at_mut(rows * PAGE_POSITIONS);
        let (tile, rest) = rest.split_at_mut(CodedScratch::tile_bytes(head_dim) / 4);
        let (scales, rest) = rest.split_at_mut(rows);
        let (sums, rest) = rest.split_at_mut(rows);
        let (steps, rest) = rest.split_at_mut(2 * rows);
        let (weights, rest) =
            bytemuck::cast_slice_mut(rest).split_at_mut(2 * rows * PAGE_POSITIONS);
        Self {
            queries,
            head_dim,
            scores,
            wide,
            scales,
            sums,
            steps,
            codes: &mut rest[..rows * head_dim],
            weights,
            tile: bytemuck::cast_slice_mut(tile),
            is_coded: false,
        }
    }

    /// The first rows over a wide page; `visible` has one count for each.
    pub fn attend_wide(
        &mut self,
        isa: Isa,
        page: &WidePage,
        visible: &[usize],
        gathered: &mut Gathered,
    ) {
        let rows = visible.len();
        let mut gathered = part(gathered, 0..rows, self.head_dim);
        let queries = Queries { rows: &self.queries[..rows * self.head_dim], visible };
        match page {
            WidePage::Plain(page) => {
                let positions = page.keys.len() / self.head_dim;
                let scores = &mut self.scores[..rows * positions];
                isa.attend(page, &queries, &mut gathered, scores);
            }
            WidePage::Narrow(page) => {
                let mut here = [0; ROWS_MAX];
                let scratch = (&mut *self.wide, &mut *self.scores);
                isa.attend_narrow(page, &queries, &mut gathered, scratch, &mut here[..rows]);
            }
        }
    }

    /// The rows from `first` on over all positions of a coded page.
    pub fn attend_coded(
        &mut self,
        isa: Isa,
        page: &CodedPage,
        first: usize,
        gathered: &mut Gathered,
    ) {
        debug_assert!(can_code(self.head_dim));
        let mut queries = CodedQueries { codes: self.codes, scales: self.scales, sums: self.sums };
        if !self.is_coded {
            isa.code_queries(self.queries, &mut queries);
            self.is_coded = true;
        }
        let rows = queries.scales.len() - first;
        let queries = CodedQueries {
            codes: &mut queries.codes[first * self.head_dim..],
            scales: &mut queries.scales[first..],
            sums: &mut queries.sums[first..],
        };
        let mut scratch = CodedScratch {
            scores: &mut self.scores[..rows * PAGE_POSITIONS],
            weights: &mut self.weights[..2 * rows * PAGE_POSITIONS],
            steps: &mut self.steps[..2 * rows],
            tile: self.tile,
        };
        let mut gathered = part(gathered, first..first + rows, self.head_dim);
        isa.attend_coded(page, &queries, &mut gathered, &mut scratch);
    }
}

/// Some rows of what has been gathered.
fn part<'a>(
    gathered: &'a mut Gathered,
    rows: std::ops::Range<usize>,
    head_dim: usize,
) -> Gathered<'a> {
    Gathered {
        max: &mut gathered.max[rows.clone()],
        sum: &mut gathered.sum[rows.clone()],
        mix: &mut gathered.mix[rows.start * head_dim..rows.end * head_dim],
    }
}
