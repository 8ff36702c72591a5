//! Products with many vectors on tensor cores, and what splits their vectors.
//!
//! Each f32 factor is two of f16, as `shaders/tensor_tile.wgsl` says, with every format of weights alike.
//! The rows of vectors are split once, in place, in front of the product; no kernel reads them as f32
//! after that.

use super::{
    Give, OfExperts, OfRecord, Precision, Rows, Slabs, Sources, Tile, constant, each, eight, given,
    name, named, repeated, sizes, tile_constants,
};
use crate::gpu::device::Tensor;

/// Lines that are written once for each matrix, band of rows, strip of vectors and four of a thread.
const MARKS: [(&str, &str); 4] =
    [("//MATRIX ", "$m"), ("//BAND ", "$b"), ("//STRIP ", "$s"), ("//FOUR ", "$f")];

impl Rows {
    /// Where they lie when they are split.
    fn place(self) -> &'static str {
        match self {
            Self::Normed => "NORMED_AT",
            Self::Mixed => "MIXED_AT",
            Self::Gated => "GATE_AT",
            Self::Shared => "SHARED_GATE_AT",
        }
    }
}

/// Eight weights of a unit in one layout, and the largest size in a row.
fn eight_and_size(source: &str, precision: Precision) -> String {
    let text = match precision {
        Precision::Affine { .. } => text!("size_affine"),
        Precision::Bf16 | Precision::F16 | Precision::F32 => text!("size_values"),
    };
    eight(source, precision) + &named(text, source, precision)
}

/// Where rows and their shifts lie.
fn rows_at(rows: &str, shifts: &str) -> String {
    format!("const ROWS_AT = {rows};\nconst SHIFTS_AT = {shifts};\n")
}

/// The part that all products have, for so many matrices.
fn tile_text(tensor: Tensor, tile: Tile, matrices: usize) -> String {
    let each = match tile {
        Tile::Short => 1,
        Tile::Tall => 2,
    };
    let counts = [matrices, each, each, tile.vectors() / 16];
    let expand = |text: String, (mark, count)| repeated(&text, mark, count);
    let text = MARKS.into_iter().zip(counts).fold(text!("tensor_tile").to_string(), expand);
    let side = tensor.side;
    constant("SIDE", side as usize)
        + &constant("BANDS", each)
        + &constant("STRIPS", each)
        + &text.replace("SQUARE", &format!("{side}x{side}"))
}

impl Sources {
    /// The extensions come first, then what every product has.
    fn tensor_head(&self) -> String {
        let extensions = "enable f16;\nenable wgpu_cooperative_matrix;\n";
        extensions.to_string() + &self.head() + text!("powers") + text!("eight")
    }

    /// Matrices of `cols` columns times split vectors.
    pub(super) fn tensor_by_rows(
        &self,
        tensor: Tensor,
        rows: Rows,
        give: Give,
        cols: usize,
        tile: Tile,
    ) -> String {
        let parts: [&str; 10] = [
            &self.tensor_head(),
            &constant("COLS", cols),
            &rows_at(rows.place(), "ROW_SHIFTS_AT"),
            &tile_constants(tile, 1),
            text!("dense"),
            given(give),
            &each("dense", &self.precisions, eight_and_size),
            &self.pieces(),
            &text!("tensor_dense").replace("//FORMATS", &self.cases(text!("tensor_size"))),
            &tile_text(tensor, tile, 1),
        ];
        parts.concat()
    }

    /// Experts times their tokens' split vectors.
    pub(super) fn tensor_experts(
        &self,
        tensor: Tensor,
        slabs: &Slabs,
        product: &OfExperts,
        tile: Tile,
    ) -> String {
        let function = |(i, (_, precision)): (usize, &OfRecord)| {
            let name = name(*precision);
            format!(
                "fn weights_{i}(aim: Aim, n: u32, part: u32) -> Eight {{\n\
                 return expert_eight_{name}(within(aim.record, PLACE_{i}), n, part);\n}}\n\
                 fn size_{i}(aim: Aim, n: u32, half: u32) -> u32 {{\n\
                 return expert_size_{name}(within(aim.record, PLACE_{i}), n, half);\n}}\n"
            )
        };
        let functions: String = product.matrices.iter().enumerate().map(function).collect();
        let parts: [&str; 10] = [
            &self.tensor_head(),
            tile.list(),
            &slabs.source(),
            &product.declarations(),
            &format!("const SHIFTS_AT = {};\n", product.shifts_at),
            &tile_constants(tile, product.matrices.len()),
            &each("expert", &product.precisions(), eight_and_size),
            text!("tensor_experts"),
            &functions,
            &tile_text(tensor, tile, product.matrices.len()),
        ];
        parts.concat()
    }

    /// Splits the rows of so many columns that a product takes.
    pub fn split(&self, rows: Rows, cols: usize) -> String {
        let places = constant("COLS", cols) + &rows_at(rows.place(), "ROW_SHIFTS_AT");
        let texts = [text!("powers"), rows.input(), text!("split_rows"), text!("split")];
        self.head() + &places + &texts.concat()
    }

    /// Splits what gate and up of experts gave, for the pairs of tiles of one height.
    pub fn split_experts(&self, (hidden, width): (usize, usize), tile: Tile) -> String {
        let places = sizes(width, hidden) + &rows_at("ACTIVE_AT", "PAIR_SHIFTS_AT") + tile.list();
        let texts = [text!("powers"), text!("split_rows"), text!("split_experts")];
        self.head() + &places + &texts.concat()
    }
}
