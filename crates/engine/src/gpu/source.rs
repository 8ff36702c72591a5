//! The kernels' source, put together from the files in `shaders`.
//!
//! A kernel is compiled for one model: sizes are constants in front of it, layouts of weights become
//! functions of their own, and lines that begin with `//ROW` are written once for each row of a team.
//! Everything is text, so a test can hand every kernel to the translators of all the backends.

use crate::container::{Precision, RecordLayout, ScaleKind};

/// The text of one of our files.
macro_rules! text {
    ($name:literal) => {
        include_str!(concat!("shaders/", $name, ".wgsl"))
    };
}

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

/// Where kernels are put together.
pub struct Sources {
    /// The model's constants.
    pub declarations: String,
    /// Layouts of the dense weights; a matrix's code is its place here.
    pub precisions: Vec<Precision>,
    /// Whether a team is within a subgroup.
    pub subgroups: bool,
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
    let mut out = String::new();
    for line in text.lines() {
        match line.trim_start().strip_prefix("//ROW ") {
            Some(line) => {
                (0..rows).for_each(|r| out += &(line.replace("$r", &r.to_string()) + "\n"));
            }
            None => out += &(line.to_string() + "\n"),
        }
    }
    out.replace("ROWSu", &format!("{rows}u"))
}

fn given(give: Give) -> &'static str {
    match give {
        Give::Store => text!("give_store"),
        Give::Add => text!("give_add"),
    }
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

    /// Attention over parts of the context, or of a chunk's tokens over the whole of it.
    pub fn attend(&self, halves: bool, chunk: bool) -> String {
        let kept = match halves {
            true => text!("kv_f16"),
            false => text!("kv_f32"),
        };
        let main = if chunk { text!("attend_rows") } else { text!("attend_parts") };
        self.head() + self.team() + kept + text!("attend") + main
    }

    /// The parts joined.
    pub fn combine(&self) -> String {
        self.head() + text!("combine")
    }

    /// Matrices of `cols` columns times many vectors.
    pub fn by_rows(&self, rows: Rows, give: Give, cols: usize) -> String {
        let input = match rows {
            Rows::Normed => text!("rows_normed"),
            Rows::Mixed => text!("rows_mixed"),
            Rows::Gated => text!("rows_gated"),
            Rows::Shared => text!("rows_shared"),
        };
        let main = text!("gemm").replace("//FORMATS", &self.cases(text!("gemm_format")));
        let parts: [&str; 7] = [
            &self.head(),
            &constant("COLS", cols),
            text!("dense"),
            input,
            given(give),
            &each("dense", &self.precisions, eight),
            &main,
        ];
        parts.concat()
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

    /// The delta rule's recurrence over a chunk.
    pub fn delta_scan(&self) -> String {
        self.head() + text!("delta_scan")
    }

    /// The weighted sum of each token's experts.
    pub fn join_rows(&self) -> String {
        self.head() + text!("join_rows")
    }

    /// Gate and up of experts for their tokens.
    pub fn gemm_up(&self, slabs: &Slabs, (hidden, width): (usize, usize)) -> String {
        let (gate, up) = (slabs.layout.gate.precision, slabs.layout.up.precision);
        let matrices = [("gate", "GATE_MATRIX", gate), ("up", "UP_MATRIX", up)];
        let outputs = "let out0 = by_gate0 / (1.0 + exp(-by_gate0)) * by_up0;\n\
                       let out1 = by_gate1 / (1.0 + exp(-by_gate1)) * by_up1;\n";
        let row = "NORMED_AT + lists[bitcast<u32>(scratch[TOKEN_AT + 3u]) + pair] * COLS";
        self.gemm_experts(slabs, &matrices, [outputs, row, "ACTIVE_AT"], (hidden, width))
    }

    /// Down of experts for their tokens.
    pub fn gemm_down(&self, slabs: &Slabs, (hidden, width): (usize, usize)) -> String {
        let matrices = [("down", "DOWN_MATRIX", slabs.layout.down.precision)];
        let outputs = "let out0 = by_down0;\nlet out1 = by_down1;\n";
        self.gemm_experts(
            slabs,
            &matrices,
            [outputs, "ACTIVE_AT + pair * COLS", "OUTPUT_AT"],
            (width, hidden),
        )
    }

    fn gemm_experts(
        &self,
        slabs: &Slabs,
        matrices: &[(&str, &str, Precision)],
        [outputs, row, given]: [&str; 3],
        (cols, rows): (usize, usize),
    ) -> String {
        let piece = |title: &str| {
            let text = text!("gemm_matrix");
            let start = text.find(title).expect("a piece of the file") + title.len();
            let piece = text[start..].split("//").next().unwrap_or("");
            let of = |(which, constant, precision): &(&str, &str, Precision)| {
                piece
                    .replace("WHICH", &format!("by_{which}"))
                    .replace("CONSTANT", constant)
                    .replace("NAME", &name(*precision))
            };
            matrices.iter().map(of).collect::<String>()
        };
        let main = text!("gemm_experts")
            .replace("//TILES", &piece("//TILE\n"))
            .replace("//MATRICES", &piece("//MATRIX\n"))
            .replace("//UNPACK", &piece("//UNPACK\n"))
            .replace("//PRODUCTS", &piece("//PRODUCTS\n"))
            .replace("//OUTPUTS", outputs);
        let constants = constant("COLS", cols) + &constant("OUT_ROWS", rows);
        let input = format!("fn input_row(pair: u32) -> u32 {{ return {row}; }}\n");
        let precisions: Vec<Precision> = matrices.iter().map(|(_, _, p)| *p).collect();
        let parts: [&str; 7] = [
            &self.head(),
            &constants,
            &format!("const GIVEN_AT = {given};\n"),
            &slabs.source(),
            &input,
            &each("expert", &precisions, eight),
            &main,
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
    fn source(&self) -> String {
        let bindings = (0..self.slabs).map(|i| {
            let at = i + 1;
            format!("@group(1) @binding({at}) var<storage, read> slab{i}: array<vec4<u32>>;\n")
        });
        let cases = (1..self.slabs).map(|i| format!("case {i}u: {{ return slab{i}[at]; }}\n"));
        let read = match self.slabs {
            1 => "return slab0[at];".to_string(),
            _ => format!(
                "switch slab {{\n{}default: {{ return slab0[at]; }}\n}}",
                cases.collect::<String>()
            ),
        };
        let matrices = [
            ("GATE_MATRIX", &self.layout.gate),
            ("UP_MATRIX", &self.layout.up),
            ("DOWN_MATRIX", &self.layout.down),
        ];
        let matrices = matrices.map(|(name, m)| {
            let step = scale_bytes(m.precision);
            format!(
                "const {name} = Matrix({}u, {}u, {}u);\n",
                m.offsets[0] / 4,
                m.offsets[1] / step,
                m.offsets[2] / step
            )
        });
        // Scales of two bytes are counted in halves of a word, those of four in words.
        let shift = usize::from(scale_bytes(self.layout.down.precision) == 2);
        let text = text!("experts")
            .replace("//SLABS", &bindings.collect::<String>())
            .replace("//SLAB_READ", &read);
        text + &matrices.concat()
            + &constant("SLAB_SLOTS", self.slots_each)
            + &constant("SLOT_WORDS", self.slot_words)
            + &constant("SCALE_SHIFT", shift)
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
