//! What becomes what: for every tensor of the container, the stored tensors that it is made of.
//!
//! The whole plan is made from headers, before a byte is written: a missing tensor, a wrong shape
//! or a request that would requantise is an error here. The one idea: the inventory says what the
//! container holds, the checkpoint says how it stores it, and the plan is their join.

mod stored;

mod expert;
mod interleaved;

use std::collections::HashSet;

use anyhow::{Context, Result, ensure};
use flash_moe_engine::container::Precision;
use flash_moe_engine::shape::{Family, LayerId, Shape};
use safetensors::Dtype;

use super::experts::Records;
use super::inventory::{self, Dense, Kind};
use super::matrix::{Label, Matrix, float_precision, scale_dtype};
use super::scheme::Scheme;
use super::source::{Source, TensorId};
use crate::options::convert::Bits;
use stored::Stored;

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
        let (prefix, part) = name.rsplit_once('.').unwrap_or(("", name));
        let joint = self.shape.delta.as_ref().and_then(|d| interleaved::joint(part, d));
        let joint =
            joint.filter(|j| self.source.find(&format!("{prefix}.{}.weight", j.name)).is_some());
        let (stored, segments) = match joint {
            Some(j) => {
                let name = format!("{prefix}.{}.weight", j.name);
                (self.stored(&name, &[], j.rows, cols)?, j.segments)
            }
            None => (
                self.stored(&format!("{name}.weight"), &[], rows, cols)?,
                std::iter::once(0..rows).collect(),
            ),
        };
        let label = Label::Tensor(name.into());
        let Stored { weight, coding } = stored;
        let target = self.target(&label, coding, class, cols)?;
        Ok(DenseItem::Matrix(Matrix { label, weight, coding, segments, rows, cols, target }))
    }

    fn take(&mut self, name: &str) -> Result<TensorId> {
        let id = self
            .source
            .find(name)
            .with_context(|| format!("tensor {name} is missing from the checkpoint"))?;
        self.used.insert(id);
        Ok(id)
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
