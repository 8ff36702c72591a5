//! The routed experts of a layer, however the checkpoint stores them.
//!
//! Fused by the hub (gate and up in one stack), stacked by MLX, or one by one: each becomes three
//! matrices an expert that know their rows. One layer's experts must be alike, since a record has
//! one layout.

use anyhow::{Result, ensure};
use flash_moe_engine::container::RecordLayout;
use flash_moe_engine::shape::LayerId;

use super::super::experts::Records;
use super::super::matrix::{Label, Matrix};
use super::stored::Stored;
use super::{Class, ExpertLayer, Planner};

impl Planner<'_> {
    /// Finds the experts below `prefix`; `kind` is `layer` or `mtp`.
    pub(super) fn expert_layer(
        &mut self,
        prefix: &str,
        kind: &str,
        layer: LayerId,
    ) -> Result<ExpertLayer> {
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
                let segments = std::iter::once(first..first + rows).collect();
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
}
