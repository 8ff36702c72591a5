//! The kernels' source, put together from the files in `shaders`.
//!
//! A kernel is compiled for one model: sizes are constants in front of it, layouts of weights become
//! functions of their own, and lines that begin with `//ROW` are written once for each row of a team.
//! Everything is text, so a test can hand every kernel to the translators of all the backends.

use super::device::Tensor;
use crate::container::{Precision, RecordLayout, ScaleKind};

/// The text of one of our files.
macro_rules! text {
    ($name:literal) => {
        include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/src/gpu/shaders/", $name, ".wgsl"))
    };
}

mod tensor;

/// The kernel that reads a buffer as fast as the device can.
pub const READ: &str = text!("read");

/// What a mat-vec's input is made of.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Input {
    /// The residual stream, normed.
    Norm,
    /// The same, and kept for the experts.
    KeptNorm,
    /// The attention's mix.
    Plain,
    /// The delta rule's mix, normed by head and gated.
    Heads,
    /// The two halves of a dense block.
    Gated,
}

/// What a mat-vec does with its output.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Give {
    /// Writes it to its place.
    Store,
    /// Adds it to the residual stream.
    Add,
}

/// Rows that a product with many vectors takes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Rows {
    /// Normed rows of the residual stream.
    Normed,
    /// What the mix gave.
    Mixed,
    /// The two halves of a dense block.
    Gated,
    /// Those of the shared expert, weighted.
    Shared,
}

/// Vectors of a tile of a product with many.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Tile {
    /// 16.
    Short,
    /// 64.
    Tall,
}

impl Rows {
    /// How they are read.
    fn input(self) -> &'static str {
        match self {
            Self::Normed => text!("rows_normed"),
            Self::Mixed => text!("rows_mixed"),
            Self::Gated => text!("rows_gated"),
            Self::Shared => text!("rows_shared"),
        }
    }
}

impl Tile {
    /// Where its list begins.
    fn list(self) -> &'static str {
        match self {
            Self::Tall => "const TILES_AT = 0u;\n",
            Self::Short => "const TILES_AT = SHORT_TILES_AT;\n",
        }
    }

    /// The vectors.
    pub fn vectors(self) -> usize {
        match self {
            Self::Short => 16,
            Self::Tall => 64,
        }
    }
}

/// A matrix of an expert's record: its place's name, and how it is stored.
type OfRecord = (&'static str, Precision);

/// A product of experts with their tokens.
struct OfExperts {
    matrices: Vec<OfRecord>,
    sizes: String,
    /// Which row a pair takes, where rows, their shifts and outputs begin.
    row: &'static str,
    rows_at: &'static str,
    shifts_at: &'static str,
    given_at: &'static str,
    /// What becomes of the matrices' sums.
    output: &'static str,
}

impl OfExperts {
    /// Its constants, and its matrices' places.
    fn declarations(&self) -> String {
        let place = |(i, (place, _)): (usize, &OfRecord)| format!("const PLACE_{i} = {place};\n");
        let places: String = self.matrices.iter().enumerate().map(place).collect();
        let Self { sizes, row, rows_at, given_at, .. } = self;
        format!(
            "{sizes}{places}const ROWS_AT = {rows_at};\nconst GIVEN_AT = {given_at};\n\
             fn input_row(pair: u32) -> u32 {{ return {row}; }}\n"
        )
    }

    fn precisions(&self) -> Vec<Precision> {
        self.matrices.iter().map(|(_, precision)| *precision).collect()
    }
}

/// Where kernels are put together.
pub struct Sources {
    /// The model's constants.
    pub declarations: String,
    /// Layouts of the dense weights; a matrix's code is its place here.
    pub precisions: Vec<Precision>,
    /// Whether a team is within a subgroup.
    pub subgroups: bool,
    /// What products with many vectors take, where it is not f32 alone.
    pub tensor: Option<Tensor>,
}

/// A name for a layout that can be part of an identifier.
fn name(precision: Precision) -> String {
    match precision {
        Precision::Affine { bits, group, scales } => format!("{bits}_{group}_{}", scale(scales)),
        Precision::Bf16 => "bf16".into(),
        Precision::F16 => "f16".into(),
        Precision::F32 => "f32".into(),
    }
}

fn scale(kind: ScaleKind) -> &'static str {
    match kind {
        ScaleKind::Bf16 => "bf16",
        ScaleKind::F16 => "f16",
        ScaleKind::F32 => "f32",
    }
}

/// The product of a unit in one layout.
fn product(source: &str, precision: Precision) -> String {
    let text = match precision {
        Precision::Affine { bits: 4, .. } => text!("dot_4").to_string(),
        Precision::Affine { bits: 8, .. } => text!("dot_8").to_string(),
        Precision::Affine { bits: 2, .. } => text!("dot_2").to_string(),
        Precision::Affine { .. } => field("field") + text!("dot_bits"),
        Precision::Bf16 => [text!("halves_bf16"), text!("dot_halves")].concat(),
        Precision::F16 => [text!("halves_f16"), text!("dot_halves")].concat(),
        Precision::F32 => text!("dot_f32").to_string(),
    };
    named(&text, source, precision)
}

/// How a weight of any number of bits is taken out of words, as a function of this kind: one shader may
/// hold both kinds.
fn field(kind: &str) -> String {
    text!("field_bits").replace("KIND", kind)
}

/// Products of several layouts of one source.
fn products(source: &str, precisions: &[Precision]) -> String {
    each(source, precisions, product)
}

/// Eight weights of a unit in one layout.
fn eight(source: &str, precision: Precision) -> String {
    let text = match precision {
        Precision::Affine { bits: 4, .. } => text!("eight_4").to_string(),
        Precision::Affine { .. } => field("field8") + text!("eight_bits"),
        Precision::Bf16 => [text!("halves_bf16"), text!("eight_halves")].concat(),
        Precision::F16 => [text!("halves_f16"), text!("eight_halves")].concat(),
        Precision::F32 => text!("eight_f32").to_string(),
    };
    named(&text, source, precision)
}

/// A layout's text with its names and numbers in their places.
fn named(text: &str, source: &str, precision: Precision) -> String {
    let text = match precision {
        Precision::Affine { bits, group, scales } => text
            .replace("GROUP", &group.to_string())
            .replace("BITS", &bits.to_string())
            .replace("SCALES", scale(scales)),
        _ => text.to_string(),
    };
    text.replace("SOURCE", source).replace("NAME", &name(precision))
}

/// What `one` makes of several layouts of one source, each once, behind what all of them need.
fn each(source: &str, precisions: &[Precision], one: fn(&str, Precision) -> String) -> String {
    let mut text = text!("dot").replace("SOURCE", source);
    for (i, precision) in precisions.iter().enumerate() {
        if !precisions[..i].contains(precision) {
            text += &one(source, *precision);
        }
    }
    text
}

/// Writes `//ROW` lines once for each row.
fn with_rows(text: &str, rows: usize) -> String {
    repeated(text, ("//ROW ", "$r"), rows).replace("ROWSu", &format!("{rows}u"))
}

/// Writes runs of lines that begin with a mark so many times, with the number in the place of a name.
fn repeated(text: &str, (mark, name): (&str, &str), count: usize) -> String {
    let mut out = String::new();
    let lines: Vec<&str> = text.lines().collect();
    for run in
        lines.chunk_by(|a, b| a.trim_start().starts_with(mark) == b.trim_start().starts_with(mark))
    {
        let marked = run[0].trim_start().starts_with(mark);
        for number in 0..if marked { count } else { 1 } {
            for line in run {
                let line = line.trim_start().strip_prefix(mark).unwrap_or(line);
                out += &(line.replace(name, &number.to_string()) + "\n");
            }
        }
    }
    out
}

fn given(give: Give) -> &'static str {
    match give {
        Give::Store => text!("give_store"),
        Give::Add => text!("give_add"),
    }
}

/// How keys and values are read.
fn kept(halves: bool) -> &'static str {
    match halves {
        true => text!("kv_f16"),
        false => text!("kv_f32"),
    }
}

/// The sizes of an expert's matrices: columns, rows.
fn sizes(cols: usize, rows: usize) -> String {
    constant("COLS", cols) + &constant("OUT_ROWS", rows)
}

/// What multiplies tiles of so many matrices.
fn tiled(tile: Tile, matrices: usize) -> String {
    tile_constants(tile, matrices) + text!("eight") + text!("gemm_tile")
}

fn tile_constants(tile: Tile, matrices: usize) -> String {
    constant("TILE", tile.vectors()) + &constant("MATRICES", matrices)
}

fn constant(name: &str, value: usize) -> String {
    format!("const {name}: u32 = {value}u;\n")
}

impl Sources {
    fn team(&self) -> &'static str {
        match self.subgroups {
            true => text!("team_subgroup"),
            false => text!("team_workgroup"),
        }
    }

    fn head(&self) -> String {
        self.declarations.clone() + text!("scratch")
    }

    /// Matrices of `cols` columns times one vector, `rows` rows a team.
    pub fn by_vector(&self, input: Input, give: Give, cols: usize, rows: usize) -> String {
        let prepared = match input {
            Input::Norm | Input::KeptNorm => text!("input_norm"),
            Input::Plain => text!("input_plain"),
            Input::Heads => text!("input_heads"),
            Input::Gated => text!("input_gated"),
        };
        let cases = self.cases(text!("mat_vec_format"));
        let keep = match input {
            Input::KeptNorm => text!("keep_normed"),
            _ => "",
        };
        let main = text!("mat_vec").replace("//FORMATS", &cases).replace("//KEEP", keep);
        let constants = constant("COLS", cols) + &constant("BLOCK", super::layout::block(cols));
        let dots = products("dense", &self.precisions);
        let parts: [&str; 9] = [
            &self.head(),
            &constants,
            self.team(),
            text!("dense"),
            prepared,
            text!("stage"),
            &dots,
            given(give),
            &with_rows(&main, rows),
        ];
        parts.concat()
    }

    /// The delta rule for one token.
    pub fn delta(&self) -> String {
        self.head() + self.team() + text!("delta")
    }

    /// Norm and rotation of queries and keys.
    pub fn turn(&self, halves: bool) -> String {
        let keep = match halves {
            true => text!("keep_f16"),
            false => text!("keep_f32"),
        };
        self.head() + keep + text!("turn")
    }

    /// Attention of a token over parts of the context.
    pub fn attend(&self, halves: bool) -> String {
        self.head() + self.team() + kept(halves) + text!("attend") + text!("attend_parts")
    }

    /// Attention of a chunk's tokens over all that they see.
    pub fn attend_rows(&self, halves: bool, head_dim: usize) -> String {
        self.attend_rows_as(text!("rows_whole"), halves, head_dim)
    }

    /// The same over a part of it, for a workgroup each.
    pub fn attend_rows_part(&self, halves: bool, head_dim: usize) -> String {
        let part = [text!("row_parts"), text!("rows_part")].concat();
        self.attend_rows_as(&part, halves, head_dim)
    }

    fn attend_rows_as(&self, part: &str, halves: bool, head_dim: usize) -> String {
        let slices = head_dim.div_ceil(32);
        let main = repeated(text!("attend_rows"), ("//SLICE ", "$s"), slices);
        self.head() + kept(halves) + part + &main
    }

    /// The parts of a token joined.
    pub fn combine(&self) -> String {
        self.head() + text!("combine_token") + text!("combine")
    }

    /// The parts of a chunk's tokens joined.
    pub fn combine_rows(&self) -> String {
        self.head() + text!("row_parts") + text!("combine_rows") + text!("combine")
    }

    /// Matrices of `cols` columns times many vectors, in tiles.
    pub fn by_rows(&self, rows: Rows, give: Give, cols: usize, tile: Tile) -> String {
        if let Some(tensor) = self.tensor {
            return self.tensor_by_rows(tensor, rows, give, cols, tile);
        }
        let parts: [&str; 9] = [
            &self.head(),
            &constant("COLS", cols),
            text!("dense"),
            rows.input(),
            given(give),
            &tiled(tile, 1),
            &each("dense", &self.precisions, eight),
            &self.pieces(),
            text!("gemm"),
        ];
        parts.concat()
    }

    /// Which matrix of several a tile is of, and what unpacks it.
    fn pieces(&self) -> String {
        text!("gemm_piece").replace("//FORMATS", &self.cases(text!("gemm_format")))
    }

    /// Norm of every row of a chunk.
    pub fn norm_rows(&self) -> String {
        self.head() + text!("dense") + text!("norm_rows")
    }

    /// Norm by head and gate of every row of a chunk.
    pub fn heads_rows(&self) -> String {
        self.head() + text!("dense") + text!("heads_rows")
    }

    /// Convolution of a chunk.
    pub fn delta_rows(&self) -> String {
        self.head() + text!("delta_rows")
    }

    /// What a chunk's tokens are to each other under the delta rule.
    pub fn delta_pairs(&self) -> String {
        self.head() + text!("delta_pairs")
    }

    /// The delta rule over a chunk.
    pub fn delta_scan(&self) -> String {
        self.head() + text!("delta_scan")
    }

    /// The weighted sum of each token's experts.
    pub fn join_rows(&self) -> String {
        self.head() + text!("join_rows")
    }

    /// Gate and up of experts for their tokens, in tiles of one height.
    pub fn gemm_up(&self, slabs: &Slabs, (hidden, width): (usize, usize), tile: Tile) -> String {
        let layout = &slabs.layout;
        let product = OfExperts {
            matrices: vec![
                ("GATE_MATRIX", layout.gate.precision),
                ("UP_MATRIX", layout.up.precision),
            ],
            sizes: sizes(hidden, width),
            row: "lists[bitcast<u32>(scratch[TOKEN_AT + 3u]) + pair]",
            rows_at: "NORMED_AT",
            shifts_at: "ROW_SHIFTS_AT",
            given_at: "ACTIVE_AT",
            output: "sums0[j] / (1.0 + exp(-sums0[j])) * sums1[j]",
        };
        self.gemm_experts(slabs, &product, tile)
    }

    /// Down of experts for their tokens, in tiles of one height.
    pub fn gemm_down(&self, slabs: &Slabs, (hidden, width): (usize, usize), tile: Tile) -> String {
        let product = OfExperts {
            matrices: vec![("DOWN_MATRIX", slabs.layout.down.precision)],
            sizes: sizes(width, hidden),
            row: "pair",
            rows_at: "ACTIVE_AT",
            shifts_at: "PAIR_SHIFTS_AT",
            given_at: "OUTPUT_AT",
            output: "sums0[j]",
        };
        self.gemm_experts(slabs, &product, tile)
    }

    fn gemm_experts(&self, slabs: &Slabs, product: &OfExperts, tile: Tile) -> String {
        if let Some(tensor) = self.tensor {
            return self.tensor_experts(tensor, slabs, product, tile);
        }
        let main = text!("gemm_experts").replace("OUTPUT", product.output);
        let function = |(i, (_, precision)): (usize, &OfRecord)| {
            let name = name(*precision);
            format!(
                "fn eight_{i}(m: Matrix, n: u32, part: u32) -> Eight {{\n\
                 return expert_eight_{name}(m, n, part);\n}}\n"
            )
        };
        let functions: String = product.matrices.iter().enumerate().map(function).collect();
        let parts: [&str; 8] = [
            &self.head(),
            tile.list(),
            &slabs.source(),
            &product.declarations(),
            &tiled(tile, product.matrices.len()),
            &each("expert", &product.precisions(), eight),
            &functions,
            &repeated(&main, ("//MATRIX ", "$m"), product.matrices.len()),
        ];
        parts.concat()
    }

    /// `text` once for each layout of the dense weights.
    fn cases(&self, text: &str) -> String {
        let cases = self.precisions.iter().enumerate().map(|(code, precision)| {
            text.replace("CODE", &code.to_string()).replace("NAME", &name(*precision))
        });
        cases.collect()
    }

    /// The choice of experts alone.
    pub fn route(&self) -> String {
        self.head() + self.team() + text!("choose") + text!("route")
    }

    /// Gate and up of the chosen experts, `rows` rows a team.
    pub fn experts_up(&self, slabs: &Slabs, hidden: usize, rows: usize) -> String {
        let (gate, up) = (slabs.layout.gate.precision, slabs.layout.up.precision);
        let main = text!("experts_up")
            .replace("dot_GATE", &format!("dot_{}", name(gate)))
            .replace("dot_UP", &format!("dot_{}", name(up)));
        let parts: [&str; 8] = [
            &self.head(),
            &constant("BLOCK", super::layout::block(hidden)),
            self.team(),
            text!("choose"),
            &slabs.source(),
            text!("stage"),
            &products("expert", &[gate, up]),
            &with_rows(&main, rows),
        ];
        parts.concat()
    }

    /// Down of the chosen experts and of the shared one, added up, `rows` rows a team.
    pub fn experts_down(
        &self,
        slabs: &Slabs,
        shared: Option<Precision>,
        longest: usize,
        rows: usize,
    ) -> String {
        let down = slabs.layout.down.precision;
        let block = if shared.is_some() { text!("shared_down") } else { "" };
        let main = text!("experts_down")
            .replace("//SHARED", block)
            .replace("dot_DOWN", &format!("dot_{}", name(down)));
        let (main, dense) = match shared {
            None => (main, text!("shared_none").to_string()),
            Some(precision) => (
                main.replace("dot_SHARED", &format!("dot_{}", name(precision))),
                text!("shared_input").to_string(),
            ),
        };
        let dense_dots = shared.map_or(String::new(), products_of_shared);
        let parts: [&str; 9] = [
            &self.head(),
            &constant("BLOCK", super::layout::block(longest)),
            self.team(),
            &slabs.source(),
            &dense,
            text!("stage"),
            &products("expert", &[down]),
            &dense_dots,
            &with_rows(&main, rows),
        ];
        parts.concat()
    }
}

/// The products of the shared expert's down, which lies with the dense weights.
fn products_of_shared(precision: Precision) -> String {
    // The constant of `dot.wgsl` is there already.
    products("dense", &[precision]).replace("const ONE = vec4(0x3f800000u);", "")
}

/// How a layer's slots lie, and how its shared expert's down is stored, where it has one.
pub type Lying = (Slabs, Option<Precision>);

/// The slots of a layer in as many buffers as it takes.
#[derive(Clone, PartialEq, Debug)]
pub struct Slabs {
    /// Of the records.
    pub layout: RecordLayout,
    /// Buffers.
    pub slabs: usize,
    /// Slots in each but the last.
    pub slots_each: usize,
    /// Words of a slot.
    pub slot_words: usize,
}

impl Slabs {
    /// Takes an element out of the buffers of this name.
    fn read(&self, name: &str) -> String {
        let case = |i| format!("case {i}u: {{ return {name}{i}[at]; }}\n");
        let cases: String = (1..self.slabs).map(case).collect();
        match self.slabs {
            1 => format!("return {name}0[at];"),
            _ => format!("switch slab {{\n{cases}default: {{ return {name}0[at]; }}\n}}"),
        }
    }

    fn source(&self) -> String {
        let binding = |i: usize| {
            let at = 2 * i + 1;
            format!(
                "@group(1) @binding({at}) var<storage, read> slab{i}: array<vec4<u32>>;\n\
                 @group(1) @binding({}) var<storage, read> words{i}: array<u32>;\n",
                at + 1
            )
        };
        let bindings: String = (0..self.slabs).map(binding).collect();
        let matrices = [
            ("GATE_MATRIX", &self.layout.gate),
            ("UP_MATRIX", &self.layout.up),
            ("DOWN_MATRIX", &self.layout.down),
        ];
        let matrices = matrices.map(|(name, m)| {
            let step = scale_bytes(m.precision);
            format!(
                "const {name} = Place({}u, {}u, {}u, {}u);\n",
                m.offsets[0] / 4,
                m.offsets[1] / step,
                m.offsets[2] / step,
                usize::from(step == 2)
            )
        });
        let text = text!("experts")
            .replace("//SLABS", &bindings)
            .replace("//SLAB_VECTOR", &self.read("slab"))
            .replace("//SLAB_WORD", &self.read("words"));
        text + &matrices.concat()
            + &constant("SLAB_SLOTS", self.slots_each)
            + &constant("SLOT_WORDS", self.slot_words)
    }
}

/// Bytes in which a layout's scales are counted.
pub fn scale_bytes(precision: Precision) -> usize {
    match precision {
        Precision::Affine { scales: ScaleKind::F32, .. } => 4,
        _ => 2,
    }
}

#[cfg(test)]
mod tests;
