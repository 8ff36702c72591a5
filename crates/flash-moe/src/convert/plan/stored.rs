//! Which stored tensors hold a matrix, how they code it, and what precision it gets.
//!
//! Shapes are checked against what the model's dimensions demand; bits and group of quantised weights
//! are inferred from shapes, never believed from the configuration. Quantised weights are carried
//! over or refused, never requantised.

use anyhow::{Context, Result, bail, ensure};
use flash_moe_engine::container::{Precision, ScaleKind, affine_precision};
use safetensors::Dtype;
use safetensors::tensor::TensorInfo;

use super::super::matrix::{Coding, Label, float_precision, fp8_scale_shape};
use super::super::source::TensorId;
use super::{Class, Planner};
use crate::options::convert::Bits;

/// Stored weights of a matrix, checked against the shape that they must have.
pub(super) struct Stored {
    pub(super) weight: TensorId,
    pub(super) coding: Coding,
}

impl Planner<'_> {
    /// Finds stored weights of shape `lead + [rows, cols]` in whatever coding they have.
    pub(super) fn stored(
        &mut self,
        name: &str,
        lead: &[usize],
        rows: usize,
        cols: usize,
    ) -> Result<Stored> {
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
    pub(super) fn target(
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
}
