//! Matrices times token rows, spread over the worker pool.
//!
//! One token is a matrix-vector product on the packed weights; several tokens unpack a tile of rows
//! once and multiply it by all of them. Activations meet affine weights in f32 or in fixed point, as
//! `Arithmetic` says. How rows are split over threads never changes a result.

use std::cell::RefCell;
use std::ops::Range;
use std::sync::Arc;

use flash_moe_kernels::{
    Fixed, FixedLayout, FixedMut, Format, Isa, Rows, TILE_BYTES, TILE_ROWS, TileMut,
};

use crate::pool::Pool;

/// Weights in one work item: large against the cost of claiming it, small against a layer.
const ITEM_WEIGHTS: usize = 64 * 1024;

/// Elements brought to fixed point as one work item.
const FIX_ELEMENTS: usize = 8192;
/// Vectors up to which a tile's rows are multiplied by one after the other: unpacking them for so few
/// takes longer.
const FEW_TOKENS: usize = 2;
/// Tokens whose rows are normed, added, picked or joined as one work item.
const ITEM_TOKENS: usize = 4;
/// Rows of a product that are joined as one work item: whole tiles.
const JOINED_ROWS: usize = 128 * TILE_ROWS;
/// Floats of a cache line.
pub const LINE_FLOATS: usize = 16;

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

/// In what numbers activations meet affine weights. Plain weights always meet f32.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Arithmetic {
    /// f32.
    Exact,
    /// Integers of 16 bits with a scale for each group: relative error 2e-5 of a product.
    #[default]
    Fixed16,
    /// Integers of 8 bits with a scale for each group: lossy, relative error 5e-3.
    Fast8,
}

impl Arithmetic {
    /// Its name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Exact => "f32",
            Self::Fixed16 => "fixed16",
            Self::Fast8 => "int8",
        }
    }
}

/// What several rows of activations are to each other.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kin {
    /// Tokens of one timeline: multiplied together, so that a row's sums are formed in an order that
    /// may differ from the order of one row alone.
    OneTimeline,
    /// A token of each of several timelines: every row gets the bits that it would get alone, and
    /// only the weights' way from memory is shared.
    Strangers,
}

/// The instruction set, the threads and the numbers.
pub struct Compute {
    /// Kernels to use.
    pub isa: Isa,
    /// Threads to use.
    pub pool: Arc<Pool>,
    /// Numbers to use.
    pub arithmetic: Arithmetic,
    /// What rows are to each other.
    pub kin: Kin,
}

/// What the products with one vector, or with several, need beside it.
#[derive(Default)]
pub struct Activations {
    strangers: bool,             // vectors of several timelines
    layout: Option<FixedLayout>, // of the fixed form; none if the vector is used as it is
    hi: Vec<i8>,                 // [tokens][cols]
    lo: Vec<i8>,                 // [tokens][cols], empty for 8 bits
    scales: Vec<f32>,            // [tokens][cols / scale_group]
    sums: Vec<f32>,              // [tokens][cols / group], empty for plain weights
}

impl Activations {
    /// Floats needed for so many elements.
    pub const fn floats(elements: usize) -> usize {
        // Two bytes, and a scale and a sum in every 32 at most.
        elements.div_ceil(2) + elements.div_ceil(16)
    }

    /// Whether products need the original vectors.
    pub fn is_exact(&self) -> bool {
        self.layout.is_none()
    }

    /// Part number `part` of `parts` equal ones of the vectors; `x` is that part of the original.
    pub fn part<'a>(&'a self, x: &'a [f32], part: usize, parts: usize) -> Input<'a> {
        self.range(x, part..part + 1, parts)
    }

    /// A range of the `all` vectors; `x` is that range of the original.
    pub fn range<'a>(&'a self, x: &'a [f32], range: Range<usize>, all: usize) -> Input<'a> {
        let sums = cut(&self.sums, &range, all);
        let fixed = self.layout.map(|layout| Fixed {
            layout,
            hi: cut(&self.hi, &range, all),
            lo: cut(&self.lo, &range, all),
            scales: cut(&self.scales, &range, all),
            sums,
        });
        Input { x, sums, fixed, strangers: self.strangers }
    }
}

/// A range of the `all` equal parts of a slice.
fn cut<'a, T>(whole: &'a [T], range: &Range<usize>, all: usize) -> &'a [T] {
    let len = whole.len() / all;
    &whole[range.start * len..range.end * len]
}

/// Vectors in the form in which they meet a matrix.
#[derive(Clone, Copy)]
pub struct Input<'a> {
    x: &'a [f32],
    sums: &'a [f32],
    fixed: Option<Fixed<'a>>,
    strangers: bool,
}

impl Input<'_> {
    /// `y[i] = w[first_row + i] . x` of one vector.
    pub fn mat_vec(&self, isa: Isa, w: &Rows, first_row: usize, y: &mut [f32]) {
        match &self.fixed {
            Some(x) => isa.mat_vec_fixed(w, first_row, x, y),
            None => isa.mat_vec(w, first_row, self.x, self.sums, y),
        }
    }

    /// A range of the `all` vectors.
    fn range(&self, range: &Range<usize>, all: usize) -> Self {
        let fixed = self.fixed.as_ref().map(|fixed| Fixed {
            layout: fixed.layout,
            hi: cut(fixed.hi, range, all),
            lo: cut(fixed.lo, range, all),
            scales: cut(fixed.scales, range, all),
            sums: cut(fixed.sums, range, all),
        });
        let (x, sums) = (cut(self.x, range, all), cut(self.sums, range, all));
        Self { x, sums, fixed, strangers: self.strangers }
    }

    /// Whether so many vectors are multiplied one after the other.
    fn is_one_by_one(&self, tokens: usize) -> bool {
        self.strangers || tokens <= FEW_TOKENS
    }

    /// `y[t][i] = w[first_row + i] . x[t]` of several: a tile `[tokens][TILE_ROWS]`, of which rows
    /// that the matrix does not have are arbitrary. `scratch` has `multiply_floats`.
    pub fn multiply(
        &self,
        isa: Isa,
        w: &Rows,
        first_row: usize,
        y: &mut [f32],
        scratch: &mut [f32],
    ) {
        let tokens = y.len() / TILE_ROWS;
        if self.is_one_by_one(tokens) {
            let rows = TILE_ROWS.min(w.rows() - first_row);
            for (t, y) in y.chunks_exact_mut(TILE_ROWS).enumerate() {
                self.range(&(t..t + 1), tokens).mat_vec(isa, w, first_row, &mut y[..rows]);
            }
            return;
        }
        if let Some(xs) = &self.fixed {
            let (codes, factors) = scratch.split_at_mut(TILE_BYTES.div_ceil(size_of::<f32>()));
            let mut tile = TileMut { codes: bytemuck::cast_slice_mut(codes), factors };
            return isa.mat_mul_fixed(w, first_row, xs, y, &mut tile);
        }
        let rows = TILE_ROWS.min(w.rows() - first_row);
        let (products, scratch) = scratch.split_at_mut(rows * tokens);
        isa.mat_mul(w, first_row, self.x, products, scratch);
        for (i, row) in products.chunks_exact(tokens).enumerate() {
            for (y, value) in y[i..].iter_mut().step_by(TILE_ROWS).zip(row) {
                *y = *value;
            }
        }
    }
}

/// Scratch of a product with so many vectors: 16 rows in f32, or columns of a tile and its factors,
/// and a tile of products.
pub const fn multiply_floats(cols: usize, tokens: usize) -> usize {
    16 * cols + TILE_BYTES / size_of::<f32>() + TILE_ROWS * tokens
}

/// `out[i] = silu(gate[first_row + i] . x) * (up[first_row + i] . x)` of one vector, in the forms
/// for `gate` and for `up`, both fixed or neither.
pub fn gate_up_rows(
    isa: Isa,
    (gate, up): (&Rows, &Rows),
    first_row: usize,
    (x, other_x): (Input, Input),
    out: &mut [f32],
) {
    match (&x.fixed, &other_x.fixed) {
        (Some(x), Some(other_x)) => {
            isa.gate_up_fixed((gate, up), first_row, (x, other_x), out);
        }
        _ => isa.gate_up(gate, up, first_row, x.x, (x.sums, other_x.sums), out),
    }
}

/// Buffers that a projection needs beside its input and output.
#[derive(Default)]
pub struct Temporary {
    /// The input in the form for a matrix.
    input: Activations,
    /// The input in the form for a second matrix, where that differs.
    other_input: Activations,
    other_differs: bool,
    /// Output as the products give it, `[tiles][tokens][TILE_ROWS]`.
    tiles: Vec<f32>,
    ends: Vec<usize>, // of the parts of `tiles`
}

/// Rows of a matrix in whole tiles.
pub const fn tiled(rows: usize) -> usize {
    rows.next_multiple_of(TILE_ROWS)
}

impl Temporary {
    /// Floats needed for so many tokens of inputs and outputs of so many elements.
    pub const fn floats(tokens: usize, widest: usize) -> usize {
        2 * Activations::floats(tokens * widest) + tokens * tiled(widest)
    }

    /// `x` as [`Compute::prepare_pair`] has prepared it.
    pub fn pair<'a>(&'a self, x: &'a [f32]) -> (Input<'a>, Input<'a>) {
        let other = if self.other_differs { &self.other_input } else { &self.input };
        (self.input.part(x, 0, 1), other.part(x, 0, 1))
    }
}

impl Compute {
    /// `y = W x` for each token: `x [tokens][cols]`, `y [tokens][rows]`.
    pub fn project(&self, w: &Rows, x: &[f32], y: &mut [f32], tmp: &mut Temporary) {
        self.project_in(self.arithmetic, w, x, y, tmp);
    }

    /// As [`Compute::project`], in f32 whatever the arithmetic.
    pub fn project_exact(&self, w: &Rows, x: &[f32], y: &mut [f32], tmp: &mut Temporary) {
        self.project_in(Arithmetic::Exact, w, x, y, tmp);
    }

    fn project_in(
        &self,
        arithmetic: Arithmetic,
        w: &Rows,
        x: &[f32],
        y: &mut [f32],
        tmp: &mut Temporary,
    ) {
        let tokens = x.len() / w.cols();
        debug_assert_eq!(y.len(), tokens * w.rows());
        self.prepare(arithmetic, w.format(), x, &mut tmp.input);
        if tokens == 1 {
            let (input, rows) = (tmp.input.part(x, 0, 1), item_rows(w));
            self.pool.chunks(y, rows, |i, y| input.mat_vec(self.isa, w, i * rows, y));
            return;
        }
        self.multiply_tiles(w, x, tmp);
        self.join_tiles(&tmp.tiles, y, tokens);
    }

    /// As [`Compute::project`], each token's row `[rows]` to a place of its own.
    pub fn project_each<'y>(
        &self,
        w: &Rows,
        x: &[f32],
        ys: impl Iterator<Item = &'y mut [f32]>,
        tmp: &mut Temporary,
    ) {
        let tokens = x.len() / w.cols();
        self.prepare(self.arithmetic, w.format(), x, &mut tmp.input);
        self.multiply_tiles(w, x, tmp);
        for (t, y) in ys.enumerate() {
            self.pool.chunks(y, JOINED_ROWS, |i, y| {
                let tiles = &tmp.tiles[i * JOINED_ROWS * tokens..];
                join(tiles, tokens, t, y.len(), y);
            });
        }
    }

    /// Products of the prepared `x [tokens][cols]`: `tmp.tiles [tiles][tokens][TILE_ROWS]`.
    fn multiply_tiles(&self, w: &Rows, x: &[f32], tmp: &mut Temporary) {
        let tokens = x.len() / w.cols();
        let input = tmp.input.part(x, 0, 1);
        let tiles = sized(&mut tmp.tiles, tiled(w.rows()) * tokens);
        // A matrix of few tiles is spread over its tokens too.
        let parts = (2 * self.pool.threads()).div_ceil(w.rows().div_ceil(TILE_ROWS));
        let block = tokens.div_ceil(parts);
        tmp.ends.clear();
        for tile in 0..w.rows().div_ceil(TILE_ROWS) {
            let ends = (0..tokens).step_by(block).map(|first| tokens.min(first + block));
            tmp.ends.extend(ends.map(|end| (tile * tokens + end) * TILE_ROWS));
        }
        let blocks = tokens.div_ceil(block);
        self.pool.parts(tiles, &tmp.ends, |i, y| {
            let first = i % blocks * block;
            let input = input.range(&(first..first + y.len() / TILE_ROWS), tokens);
            with_scratch(multiply_floats(w.cols(), block), |scratch| {
                input.multiply(self.isa, w, i / blocks * TILE_ROWS, y, scratch);
            });
        });
    }

    /// `silu(G x) * (U x)` for each token: `x [tokens][cols]`, `out [tokens][rows]`.
    pub fn gate_up(&self, w: (&Rows, &Rows), x: &[f32], out: &mut [f32], tmp: &mut Temporary) {
        let (gate, up) = w;
        let tokens = x.len() / gate.cols();
        self.prepare_pair((gate.format(), up.format()), x, tmp);
        let mut tiles = std::mem::take(&mut tmp.tiles);
        let input = tmp.pair(x);
        if tokens == 1 {
            let rows = item_rows(gate);
            self.pool.chunks(out, rows, |i, out| gate_up_rows(self.isa, w, i * rows, input, out));
        } else {
            let tiles = sized(&mut tiles, tiled(gate.rows()) * tokens);
            self.pool
                .chunks(tiles, TILE_ROWS * tokens, |i, y| gate_up_tile(self.isa, w, i, input, y));
            self.join_tiles(tiles, out, tokens);
        }
        tmp.tiles = tiles;
    }

    /// `[tiles][tokens][TILE_ROWS]` to `[tokens][rows]`.
    fn join_tiles(&self, tiles: &[f32], out: &mut [f32], tokens: usize) {
        let rows = out.len() / tokens;
        self.pool.chunks(out, ITEM_TOKENS * rows, |i, out| {
            join(tiles, tokens, i * ITEM_TOKENS, rows, out);
        });
    }

    /// The vectors of `tokens`, in their order, of the `all` that `from` holds.
    pub fn gather(&self, from: &Activations, all: usize, tokens: &[u32], to: &mut Activations) {
        fn pick<T: Copy>(from: &[T], to: &mut [T], all: usize, tokens: &[u32]) {
            let len = from.len() / all;
            if len > 0 {
                for (to, t) in to.chunks_exact_mut(len).zip(tokens) {
                    to.copy_from_slice(&from[*t as usize * len..][..len]);
                }
            }
        }
        let count = tokens.len();
        (to.layout, to.strangers) = (from.layout, from.strangers);
        if from.layout.is_none() {
            let groups = from.sums.len() / all;
            return pick(&from.sums, sized(&mut to.sums, count * groups), all, tokens);
        }
        let lens =
            [from.hi.len(), from.lo.len(), from.scales.len(), from.sums.len()].map(|l| l / all);
        let item = lens.map(|len| (ITEM_TOKENS * len).max(1));
        self.pool.chunks4(
            (sized(&mut to.hi, count * lens[0]), item[0]),
            (sized(&mut to.lo, count * lens[1]), item[1]),
            (sized(&mut to.scales, count * lens[2]), item[2]),
            (sized(&mut to.sums, count * lens[3]), item[3]),
            |i, hi, lo, scales, sums| {
                let tokens = &tokens[i * ITEM_TOKENS..];
                pick(&from.hi, hi, all, tokens);
                pick(&from.lo, lo, all, tokens);
                pick(&from.scales, scales, all, tokens);
                pick(&from.sums, sums, all, tokens);
            },
        );
    }

    /// Brings vectors into the form in which they meet matrices of a format.
    pub fn prepare(&self, arithmetic: Arithmetic, format: Format, x: &[f32], to: &mut Activations) {
        to.strangers = self.kin == Kin::Strangers;
        to.layout = FixedLayout::of(format).filter(|_| arithmetic != Arithmetic::Exact);
        let Some(layout) = to.layout else {
            match format {
                Format::Affine { group, .. } => {
                    let group = usize::from(group);
                    self.isa.group_sums(x, group, sized(&mut to.sums, x.len() / group));
                }
                Format::Bf16 | Format::F16 | Format::F32 => to.sums.clear(),
            }
            return;
        };
        let lo_len = if arithmetic == Arithmetic::Fixed16 { x.len() } else { 0 };
        // Whole groups, and as many as make it worth a thread's while.
        let part = (FIX_ELEMENTS / layout.sum_group()).max(1) * layout.sum_group();
        let lo = sized(&mut to.lo, lo_len);
        let (hi, scales) =
            (sized(&mut to.hi, x.len()), sized(&mut to.scales, x.len() / layout.scale_group()));
        let sums = sized(&mut to.sums, x.len() / layout.sum_group());
        self.pool.chunks4(
            (hi, part),
            (lo, part),
            (scales, part / layout.scale_group()),
            (sums, part / layout.sum_group()),
            |i, hi, lo, scales, sums| {
                let x = &x[i * part..][..hi.len()];
                self.isa.fix(layout, x, &mut FixedMut { hi, lo, scales, sums });
            },
        );
    }

    /// Brings vectors into the forms for two matrices: fixed only if both formats can be.
    pub fn prepare_pair(&self, formats: (Format, Format), x: &[f32], tmp: &mut Temporary) {
        let forms = [&mut tmp.input, &mut tmp.other_input];
        tmp.other_differs = self.prepare_forms(formats, x, forms);
    }

    /// As [`Compute::prepare_pair`], into the first form alone if it serves both matrices; says
    /// whether the second was needed.
    pub fn prepare_forms(
        &self,
        formats: (Format, Format),
        x: &[f32],
        [form, other]: [&mut Activations; 2],
    ) -> bool {
        let layouts = (FixedLayout::of(formats.0), FixedLayout::of(formats.1));
        let arithmetic = match layouts {
            (Some(_), Some(_)) => self.arithmetic,
            _ => Arithmetic::Exact,
        };
        let differs = layouts.0 != layouts.1;
        self.prepare(arithmetic, formats.0, x, form);
        if differs {
            self.prepare(arithmetic, formats.1, x, other);
        }
        differs
    }

    /// Root-mean-square norm of each token row: `x`, `out` `[tokens][w.len()]`.
    pub fn norm(&self, x: &[f32], w: &[f32], eps: f32, out: &mut [f32]) {
        let item = ITEM_TOKENS * w.len();
        self.pool.chunks(out, item, |i, out| {
            let x = &x[i * item..][..out.len()];
            for (x, out) in x.chunks_exact(w.len()).zip(out.chunks_exact_mut(w.len())) {
                self.isa.rms_norm(x, w, eps, out);
            }
        });
    }

    /// `y += x` of token rows of `width`.
    pub fn add(&self, x: &[f32], width: usize, y: &mut [f32]) {
        let item = ITEM_TOKENS * width;
        self.pool.chunks(y, item, |i, y| self.isa.add(&x[i * item..][..y.len()], y));
    }
}

/// Tile number `tile` of `silu(gate x) * (up x)` of several vectors: `y [tokens][TILE_ROWS]`.
pub fn gate_up_tile(
    isa: Isa,
    (gate, up): (&Rows, &Rows),
    tile: usize,
    (x, other_x): (Input, Input),
    y: &mut [f32],
) {
    let tokens = y.len() / TILE_ROWS;
    if x.is_one_by_one(tokens) {
        let (first, rows) = (tile * TILE_ROWS, TILE_ROWS.min(gate.rows() - tile * TILE_ROWS));
        for (t, y) in y.chunks_exact_mut(TILE_ROWS).enumerate() {
            let own = (x.range(&(t..t + 1), tokens), other_x.range(&(t..t + 1), tokens));
            gate_up_rows(isa, (gate, up), first, own, &mut y[..rows]);
        }
        return;
    }
    let unpacked = multiply_floats(gate.cols(), tokens);
    with_scratch(unpacked + 2 * y.len(), |scratch| {
        let (scratch, products) = scratch.split_at_mut(unpacked);
        let (g, u) = products.split_at_mut(y.len());
        x.multiply(isa, gate, tile * TILE_ROWS, g, scratch);
        other_x.multiply(isa, up, tile * TILE_ROWS, u, scratch);
        isa.silu_mul(g, u, y);
    });
}

/// Rows of tokens from `first` on, of `tokens` in `tiles [tiles][tokens][TILE_ROWS]`, to
/// `out [..][rows]`.
pub fn join(tiles: &[f32], tokens: usize, first: usize, rows: usize, out: &mut [f32]) {
    for (t, out) in out.chunks_exact_mut(rows).enumerate() {
        for (tile, out) in out.chunks_mut(TILE_ROWS).enumerate() {
            let from = (tile * tokens + first + t) * TILE_ROWS;
            out.copy_from_slice(&tiles[from..][..out.len()]);
        }
    }
}

/// The floats from the first cache line on: up to `LINE_FLOATS - 1` at the start are left out. Loads
/// of whole registers then never cross two lines (docs/measurements.md, 14).
pub fn from_line(x: &mut [f32]) -> &mut [f32] {
    let start = x.as_ptr().align_offset(LINE_FLOATS * size_of::<f32>());
    &mut x[start..]
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

/// Whether none is infinite or NaN. Without a branch for each, so that many are looked at side by side.
pub fn all_finite(values: &[f32]) -> bool {
    // An exponent of ones carries into the sign.
    let carried = |seen: u32, value: &f32| seen | ((value.to_bits() & 0x7fff_ffff) + 0x0080_0000);
    values.chunks(4096).all(|some| some.iter().fold(0, carried) >> 31 == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_finite_is_seen_wherever_it_stands() {
        let mut values = vec![-1e38f32; 9001];
        (values[7], values[8]) = (f32::MAX, f32::MIN_POSITIVE);
        assert!(all_finite(&values) && all_finite(&[]));
        for at in [0, 17, 4095, 4096, 9000] {
            for odd in [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let was = std::mem::replace(&mut values[at], odd);
                assert!(!all_finite(&values), "{odd} at {at}");
                values[at] = was;
            }
        }
    }

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
            let compute = Compute {
                isa: Isa::detect(),
                pool: Arc::new(Pool::new(threads)),
                arithmetic: Arithmetic::Exact,
                kin: Kin::OneTimeline,
            };
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
