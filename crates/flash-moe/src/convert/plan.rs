//! What becomes what: for every tensor of the container, the stored tensors that it is made of.
//!
//! The whole plan is made from headers, before a byte is written: a missing tensor, a wrong shape
//! or a request that would requantise is an error here. The one idea: the inventory says what the
//! container holds, the checkpoint says how it stores it, and the plan is their join.

use std::collections::HashSet;

use anyhow::{Context, Result, bail, ensure};
use flash_moe_engine::container::{Precision, RecordLayout, ScaleKind, affine_precision};
use flash_moe_engine::shape::{DeltaNet, Family, LayerId, Shape};
use safetensors::Dtype;
use safetensors::tensor::TensorInfo;

use super::experts::Records;
use super::inventory::{self, Dense, Kind};
use super::matrix::{Coding, Label, Matrix, float_precision, fp8_scale_shape, scale_dtype};
use super::scheme::Scheme;
use super::source::{Source, TensorId};
use crate::options::convert::Bits;

/// What the user asked for; `None` where the default applies.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Request {
    /// Bits of the routed experts.
    pub bits: Option<Bits>,
    /// Bits of everything else.
    pub dense_bits: Option<Bits>,
    /// Columns that share a scale.
    pub group: Option<u16>,
}

impl Request {
    fn group(self) -> u16 {
        self.group.unwrap_or(64)
    }
}

/// The whole conversion.
#[derive(Debug)]
pub struct Plan {
    /// The shape that the container will state.
    pub shape: Shape,
    /// Dense tensors in file order.
    pub dense: Vec<DenseItem>,
    /// Experts of the trunk.
    pub layers: Vec<ExpertLayer>,
    /// Experts of the multi-token-prediction layers.
    pub mtp_layers: Vec<ExpertLayer>,
    /// What the container should say about its making.
    pub notes: Vec<String>,
}

/// A dense tensor, or three where a matrix is affine.
#[derive(Debug)]
pub enum DenseItem {
    /// Stored as F32.
    Vector(Vector),
    /// Stored as its target precision.
    Matrix(Matrix),
}

/// A vector and how it is made.
#[derive(Debug)]
pub struct Vector {
    /// Name in the container.
    pub name: String,
    /// The stored tensor.
    pub tensor: TensorId,
    /// What it becomes.
    pub rule: VectorRule,
    /// Its shape in the container.
    pub shape: Vec<usize>,
}

/// How the values of a vector change.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum VectorRule {
    /// Not at all.
    AsStored,
    /// Stored as the difference from one.
    OnePlus,
    /// `[channels][taps]` becomes `[taps][channels]`.
    TapMajor,
}

/// A tensor of the dense file.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct TensorLayout {
    /// Name.
    pub name: String,
    /// Element type.
    pub dtype: Dtype,
    /// Dimensions.
    pub shape: Vec<usize>,
}

impl TensorLayout {
    /// Size in bytes.
    pub fn bytes(&self) -> u64 {
        (self.shape.iter().product::<usize>() * self.dtype.bitsize() / 8) as u64
    }
}

impl DenseItem {
    /// The tensors that it becomes, in file order.
    pub fn tensors(&self) -> Vec<TensorLayout> {
        match self {
            Self::Vector(v) => {
                vec![TensorLayout {
                    name: v.name.clone(),
                    dtype: Dtype::F32,
                    shape: v.shape.clone(),
                }]
            }
            Self::Matrix(m) => matrix_tensors(&m.label.to_string(), m.rows, m.cols, m.target),
        }
    }
}

/// The tensors of a matrix of the given precision: the weight, then scales and biases if affine.
pub fn matrix_tensors(
    name: &str,
    rows: usize,
    cols: usize,
    precision: Precision,
) -> Vec<TensorLayout> {
    let layout = |suffix: &str, dtype, cols| TensorLayout {
        name: format!("{name}.{suffix}"),
        dtype,
        shape: vec![rows, cols],
    };
    match precision {
        Precision::Affine { bits, group, scales } => {
            let groups = cols / usize::from(group);
            vec![
                layout("weight", Dtype::U32, cols * usize::from(bits) / 32),
                layout("scales", scale_dtype(scales), groups),
                layout("biases", scale_dtype(scales), groups),
            ]
        }
        Precision::Bf16 => vec![layout("weight", Dtype::BF16, cols)],
        Precision::F16 => vec![layout("weight", Dtype::F16, cols)],
        Precision::F32 => vec![layout("weight", Dtype::F32, cols)],
    }
}

/// The experts of one layer.
#[derive(Debug)]
pub struct ExpertLayer {
    /// The file that they become.
    pub records: Records,
    /// Gate, up, down of every expert.
    pub experts: Vec<[Matrix; 3]>,
}

/// Which default a matrix gets.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Class {
    Expert,
    Router,
    Dense,
}

/// Which experts a plan covers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Experts {
    /// They are in the checkpoint.
    InCheckpoint,
    /// They are in files that already have the container's form.
    Packed,
}

/// Plans a conversion.
///
/// # Errors
/// A tensor that is missing, of the wrong shape or type; a request that would requantise.
pub fn plan(
    source: &Source,
    scheme: &Scheme,
    shape: Shape,
    request: Request,
    experts: Experts,
) -> Result<Plan> {
    let mut planner = Planner {
        source,
        scheme,
        shape: &shape,
        request,
        used: HashSet::new(),
        kept: Vec::new(),
        narrowed: HashSet::new(),
    };
    let mut dense = planner.dense(&inventory::trunk(&shape))?;
    let mut layers = Vec::new();
    if experts == Experts::InCheckpoint {
        for layer in shape.expert_layers() {
            layers.push(planner.expert_layer(&format!("model.layers.{layer}"), "layer", layer)?);
        }
    }
    let predictions = planner.prediction_layers();
    let mut mtp_layers = Vec::new();
    let mut notes = Vec::new();
    if predictions > 0 {
        match planner.prediction(predictions) {
            Ok((tensors, experts)) => {
                dense.extend(tensors);
                mtp_layers = experts;
            }
            Err(error) => notes.push(format!("multi-token prediction left out: {error:#}")),
        }
    }
    notes.extend(planner.notes());
    let shape = Shape { mtp_layers: mtp_layers.len(), ..shape };
    Ok(Plan { shape, dense, layers, mtp_layers, notes })
}

struct Planner<'a> {
    source: &'a Source,
    scheme: &'a Scheme,
    shape: &'a Shape,
    request: Request,
    used: HashSet<TensorId>,
    /// Matrices that could not be quantised because of their width.
    kept: Vec<String>,
    /// Types that are rounded to bf16 on the way.
    narrowed: HashSet<&'static str>,
}

/// Stored weights of a matrix, checked against the shape that they must have.
struct Stored {
    weight: TensorId,
    coding: Coding,
}

impl Planner<'_> {
    fn dense(&mut self, list: &[Dense]) -> Result<Vec<DenseItem>> {
        list.iter()
            .map(|dense| match dense.kind {
                Kind::Matrix(rows, cols) => self.matrix(&dense.name, rows, cols, Class::Dense),
                Kind::Router(rows, cols) => self.matrix(&dense.name, rows, cols, Class::Router),
                Kind::Norm(n) => {
                    // Hub checkpoints of these families store the difference from one.
                    let plain = self.scheme.mlx || self.shape.family == Family::Qwen3Moe;
                    let rule = if plain { VectorRule::AsStored } else { VectorRule::OnePlus };
                    self.vector(&dense.name, rule, vec![n])
                }
                Kind::PlainNorm(n) | Kind::DecayLog(n) | Kind::TimeBias(n) => {
                    self.vector(&dense.name, VectorRule::AsStored, vec![n])
                }
                Kind::Conv(channels) => {
                    self.vector(&dense.name, VectorRule::TapMajor, vec![4, channels])
                }
            })
            .collect()
    }

    fn vector(&mut self, name: &str, rule: VectorRule, shape: Vec<usize>) -> Result<DenseItem> {
        let id = self.take(name)?;
        let tensor = self.source.tensor(id);
        let expected: Vec<Vec<usize>> = match rule {
            VectorRule::TapMajor => vec![vec![shape[1], 1, shape[0]], vec![shape[1], shape[0], 1]],
            VectorRule::AsStored | VectorRule::OnePlus => vec![shape.clone()],
        };
        ensure!(
            expected.contains(&tensor.shape),
            "tensor {}: shape {:?}, expected {:?}",
            tensor.name,
            tensor.shape,
            expected[0]
        );
        ensure!(
            float_precision(tensor.dtype).is_some(),
            "tensor {}: {} values, expected floats",
            tensor.name,
            tensor.dtype
        );
        Ok(DenseItem::Vector(Vector { name: name.into(), tensor: id, rule, shape }))
    }

    fn matrix(&mut self, name: &str, rows: usize, cols: usize, class: Class) -> Result<DenseItem> {
        let (stored_name, stored_rows, segments) = match self.interleaved(name) {
            Some(found) => found,
            None => (name.to_string(), rows, vec![0..rows]),
        };
        let stored = self.stored(&format!("{stored_name}.weight"), &[], stored_rows, cols)?;
        let label = Label::Tensor(name.into());
        let target = self.target(&label, stored.coding, class, cols)?;
        let Stored { weight, coding } = stored;
        Ok(DenseItem::Matrix(Matrix { label, weight, coding, segments, rows, cols, target }))
    }

    /// Qwen3-Next stores two projections of DeltaNet interleaved by key head; finds the rows of the
    /// part that is asked for.
    fn interleaved(&self, name: &str) -> Option<(String, usize, Vec<std::ops::Range<usize>>)> {
        let d = self.shape.delta.as_ref()?;
        let (prefix, part) = name.rsplit_once('.')?;
        let (joint, parts) = match part {
            "in_proj_qkv" | "in_proj_z" => ("in_proj_qkvz", qkvz_rows(d)),
            "in_proj_b" | "in_proj_a" => ("in_proj_ba", ba_rows(d)),
            _ => return None,
        };
        let stored = format!("{prefix}.{joint}");
        self.source.find(&format!("{stored}.weight"))?;
        let second = matches!(part, "in_proj_z" | "in_proj_a");
        let [one, two] = parts;
        let rows = one.iter().chain(&two).map(std::ops::Range::len).sum();
        Some((stored, rows, if second { two } else { one }))
    }

    fn take(&mut self, name: &str) -> Result<TensorId> {
        let id = self
            .source
            .find(name)
            .with_context(|| format!("tensor {name} is missing from the checkpoint"))?;
        self.used.insert(id);
        Ok(id)
    }

    /// Finds stored weights of shape `lead + [rows, cols]` in whatever coding they have.
    fn stored(&mut self, name: &str, lead: &[usize], rows: usize, cols: usize) -> Result<Stored> {
        let weight = self.take(name)?;
        let tensor = self.source.tensor(weight);
        let full = |tail: &[usize]| [lead, tail].concat();
        let wrong = |expected: &[usize]| {
            format!(
                "tensor {}: {} of shape {:?}, expected {expected:?}",
                tensor.name, tensor.dtype, tensor.shape
            )
        };
        let coding = match tensor.dtype {
            Dtype::BF16 | Dtype::F16 | Dtype::F32 => {
                let expected = full(&[rows, cols]);
                ensure!(tensor.shape == expected, wrong(&expected));
                Coding::Float(tensor.dtype)
            }
            Dtype::F8_E4M3 => {
                let expected = full(&[rows, cols]);
                ensure!(tensor.shape == expected, wrong(&expected));
                let scales = self.take(&format!("{name}_scale_inv"))?;
                let found = self.source.tensor(scales);
                let expected = full(&fp8_scale_shape(rows, cols));
                ensure!(
                    found.shape == expected && float_precision(found.dtype).is_some(),
                    "tensor {}: {} of shape {:?}, expected floats {expected:?}",
                    found.name,
                    found.dtype,
                    found.shape
                );
                Coding::Fp8 { scales, stack_rows: rows }
            }
            Dtype::U32 => self.affine(name, &full(&[rows]), cols)?,
            other => bail!("tensor {}: {other} weights are not supported", tensor.name),
        };
        Ok(Stored { weight, coding })
    }

    fn affine(&mut self, name: &str, lead: &[usize], cols: usize) -> Result<Coding> {
        let base = name.strip_suffix(".weight").unwrap_or(name);
        let weight = self.source.tensor(self.take(name)?);
        let scales_id = self.take(&format!("{base}.scales"))?;
        let biases_id = self.take(&format!("{base}.biases"))?;
        let (scales, biases) = (self.source.tensor(scales_id), self.source.tensor(biases_id));
        let described = || {
            format!(
                "tensor {}: U32 {:?} with scales {} {:?} and biases {} {:?} fit no affine layout of {cols} columns",
                weight.name, weight.shape, scales.dtype, scales.shape, biases.dtype, biases.shape
            )
        };
        let (Some(&packed), Some(&groups)) = (weight.shape.last(), scales.shape.last()) else {
            bail!(described());
        };
        ensure!(
            weight.shape == [lead, &[packed]].concat()
                && scales.shape == [lead, &[groups]].concat()
                && (biases.dtype, &biases.shape) == (scales.dtype, &scales.shape),
            described()
        );
        let info =
            TensorInfo { dtype: scales.dtype, shape: scales.shape.clone(), data_offsets: (0, 0) };
        let precision = affine_precision(packed, cols, &info).with_context(described)?;
        Ok(Coding::Affine { precision, scales: scales_id, biases: biases_id })
    }

    /// The precision that a matrix gets: what the user asked for, the class's default, or what it has.
    fn target(
        &mut self,
        label: &Label,
        coding: Coding,
        class: Class,
        cols: usize,
    ) -> Result<Precision> {
        let asked = match class {
            Class::Expert => self.request.bits,
            Class::Dense => self.request.dense_bits,
            Class::Router => match self.request.dense_bits {
                Some(Bits::Affine(_)) => Some(Bits::Affine(8)),
                other => other,
            },
        };
        if let Coding::Affine { precision, .. } = coding {
            return self.carried(label, precision, asked.filter(|_| class != Class::Router));
        }
        let default = match class {
            Class::Router => Bits::Affine(8),
            Class::Expert | Class::Dense => Bits::Affine(4),
        };
        let as_stored = match coding {
            Coding::Float(dtype) => float_precision(dtype).unwrap_or(Precision::Bf16), // checked: a float
            _ => Precision::Bf16,
        };
        let wanted = match asked {
            Some(bits) => bits,
            None if self.scheme.quantised => Bits::Bf16,
            None => default,
        };
        let Bits::Affine(bits) = wanted else {
            if matches!(coding, Coding::Fp8 { .. }) {
                self.narrowed.insert("FP8 times its block scale");
            }
            return Ok(as_stored);
        };
        let group = self.request.group();
        if !cols.is_multiple_of(usize::from(group)) {
            self.kept.push(label.to_string());
            return Ok(as_stored);
        }
        match as_stored {
            Precision::F16 => self.narrowed.insert("F16"),
            Precision::F32 => self.narrowed.insert("F32"),
            _ => false,
        };
        Ok(Precision::Affine { bits, group, scales: ScaleKind::Bf16 })
    }

    /// Quantised weights are carried over; asking for anything else is refused.
    fn carried(&self, label: &Label, has: Precision, asked: Option<Bits>) -> Result<Precision> {
        let Precision::Affine { bits, group, .. } = has else { return Ok(has) };
        let flag = match label {
            Label::Expert { .. } => "--bits",
            Label::Tensor(_) => "--dense-bits",
        };
        if let Some(wanted) = asked {
            ensure!(
                wanted == Bits::Affine(bits),
                "{label} has {bits} bits in the checkpoint and {flag} asks for {wanted}: quantised weights are \
                 never requantised; leave {flag} out, or convert the BF16 checkpoint"
            );
        }
        if let Some(wanted) = self.request.group {
            ensure!(
                wanted == group,
                "{label} has groups of {group} in the checkpoint and --group asks for {wanted}: quantised \
                 weights are never requantised; leave --group out, or convert the BF16 checkpoint"
            );
        }
        Ok(has)
    }

    fn expert_layer(&mut self, prefix: &str, kind: &str, layer: LayerId) -> Result<ExpertLayer> {
        let (hidden, moe) = (self.shape.hidden, &self.shape.moe);
        let name =
            if kind == "mtp" { format!("mtp layer {layer}") } else { format!("layer {layer}") };
        let mut experts = Vec::with_capacity(moe.experts);
        let sizes = [(moe.width, hidden), (moe.width, hidden), (hidden, moe.width)];
        for expert in 0..moe.experts {
            let mut three = Vec::with_capacity(3);
            for (i, (rows, cols)) in sizes.into_iter().enumerate() {
                let part = ["gate", "up", "down"][i];
                let label = Label::Expert { layer: name.clone(), expert, part };
                let (stored, first) = self.stored_expert(prefix, expert, part)?;
                let target = self.target(&label, stored.coding, Class::Expert, cols)?;
                let Stored { weight, coding } = stored;
                let segments = vec![first..first + rows];
                three.push(Matrix { label, weight, coding, segments, rows, cols, target });
            }
            experts.push(<[Matrix; 3]>::try_from(three).expect("three were pushed"));
        }
        let precisions = [0, 1, 2].map(|i| experts[0][i].target);
        for matrix in experts.iter().flat_map(|three| three.iter().zip(precisions)) {
            let (found, expected) = (matrix.0.target, matrix.1);
            ensure!(
                found == expected,
                "{}: {} where expert 0 has {}; one layer's experts must be alike",
                matrix.0.label,
                found.name(),
                expected.name()
            );
        }
        let layout = RecordLayout::new(hidden, moe.width, precisions)?;
        let stem = format!("{kind}_{:02}", layer.0);
        let records = Records { layer, stem, count: moe.experts, precisions, layout };
        Ok(ExpertLayer { records, experts })
    }

    /// Finds an expert's projection and its first stored row: fused by the hub, stacked by MLX, or alone.
    fn stored_expert(
        &mut self,
        prefix: &str,
        expert: usize,
        part: &str,
    ) -> Result<(Stored, usize)> {
        let (hidden, moe) = (self.shape.hidden, &self.shape.moe);
        let (rows, cols) = if part == "down" { (hidden, moe.width) } else { (moe.width, hidden) };
        let fused = format!("{prefix}.mlp.experts.gate_up_proj");
        let stacked = format!("{prefix}.mlp.switch_mlp.{part}_proj.weight");
        let count = moe.experts;
        if self.source.find(&fused).is_some() {
            return match part {
                "down" => {
                    let name = format!("{prefix}.mlp.experts.down_proj");
                    Ok((self.stored(&name, &[count], rows, cols)?, expert * rows))
                }
                // Gate rows first, then up rows, within each expert.
                _ => {
                    let first = expert * 2 * rows + if part == "up" { rows } else { 0 };
                    Ok((self.stored(&fused, &[count], 2 * rows, cols)?, first))
                }
            };
        }
        if self.source.find(&stacked).is_some() {
            return Ok((self.stored(&stacked, &[count], rows, cols)?, expert * rows));
        }
        let alone = format!("{prefix}.mlp.experts.{expert}.{part}_proj.weight");
        Ok((self.stored(&alone, &[], rows, cols)?, 0))
    }

    fn prediction_layers(&self) -> usize {
        (0..).take_while(|i| self.has_prefix(&format!("mtp.layers.{i}."))).count()
    }

    fn has_prefix(&self, prefix: &str) -> bool {
        self.source.names().any(|(name, _)| name.starts_with(prefix))
    }

    fn prediction(&mut self, count: usize) -> Result<(Vec<DenseItem>, Vec<ExpertLayer>)> {
        let tensors = self.dense(&inventory::prediction(self.shape, count))?;
        let layers = (0..count as u16)
            .map(|i| self.expert_layer(&format!("mtp.layers.{i}"), "mtp", LayerId(i)));
        Ok((tensors, layers.collect::<Result<_>>()?))
    }

    fn notes(&self) -> Vec<String> {
        let mut notes = Vec::new();
        let (vision, bytes) = self.source.vision;
        if vision > 0 {
            notes.push(format!("vision tower skipped: {vision} tensors, {bytes} bytes"));
        }
        if !self.narrowed.is_empty() {
            let mut types: Vec<_> = self.narrowed.iter().copied().collect();
            types.sort_unstable();
            notes.push(format!(
                "rounded to bf16 (before quantising, where quantised): {}",
                types.join(", ")
            ));
        }
        if !self.kept.is_empty() {
            let group = self.request.group();
            notes.push(format!(
                "not quantised, width is no multiple of {group}: {}",
                listed(&self.kept)
            ));
        }
        let ignored: Vec<String> = self
            .source
            .names()
            .filter(|(_, id)| !self.used.contains(id))
            .map(|(name, _)| name.to_string())
            .collect();
        if !ignored.is_empty() {
            notes.push(format!("not needed and left out: {}", listed(&ignored)));
        }
        notes
    }
}

/// Count and first few of a list of names.
fn listed(names: &[String]) -> String {
    const SHOWN: usize = 8;
    let shown = names[..names.len().min(SHOWN)].join(", ");
    let more = if names.len() > SHOWN { ", ..." } else { "" };
    format!("{} tensors ({shown}{more})", names.len())
}

type Segments = Vec<std::ops::Range<usize>>;

/// Rows of q, k, v and of z in `in_proj_qkvz`: for each key head q, k, then its v heads, then its z.
fn qkvz_rows(d: &DeltaNet) -> [Segments; 2] {
    let values = d.value_heads / d.key_heads * d.value_dim;
    let block = 2 * d.key_dim + 2 * values;
    let rows = |offset: usize, count: usize| {
        (0..d.key_heads).map(move |h| h * block + offset..h * block + offset + count)
    };
    let qkv = rows(0, d.key_dim)
        .chain(rows(d.key_dim, d.key_dim))
        .chain(rows(2 * d.key_dim, values))
        .collect();
    [qkv, rows(2 * d.key_dim + values, values).collect()]
}

/// Rows of b and of a in `in_proj_ba`: for each key head the b of its value heads, then their a.
fn ba_rows(d: &DeltaNet) -> [Segments; 2] {
    let heads = d.value_heads / d.key_heads;
    let rows = |offset: usize| {
        (0..d.key_heads).map(|h| 2 * h * heads + offset..2 * h * heads + offset + heads).collect()
    };
    [rows(0), rows(heads)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interleaved_rows_come_out_by_kind_and_cover_everything_once() {
        let d = DeltaNet { key_heads: 2, value_heads: 4, key_dim: 3, value_dim: 5, conv_taps: 4 };
        let [qkv, z] = qkvz_rows(&d);
        // A block is 3 q, 3 k, 10 v, 10 z.
        assert_eq!(qkv, [0..3, 26..29, 3..6, 29..32, 6..16, 32..42]);
        assert_eq!(z, [16..26, 42..52]);
        let [b, a] = ba_rows(&d);
        assert_eq!((b, a), (vec![0..2, 4..6], vec![2..4, 6..8]));
    }
}
