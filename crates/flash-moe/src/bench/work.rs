//! What a model's stages have to touch and to compute, from its shape and precisions alone.
//!
//! Counts matrices, the KV cache and the delta-net states; norms and convolutions are left out, being
//! thousandths of the rest. A multiplication and an addition are two operations. The chunked delta
//! rule is counted as the recurrence that it replaces.

use anyhow::Result;
use flash_moe_engine::container::Container;
use flash_moe_engine::kv_cache::{KvFormat, KvShape};
use flash_moe_engine::shape::{Mix, Shape};
use flash_moe_engine::timing::Stage;

use crate::convert::inventory::{self, Dense, Kind};

/// Operations on an element of a delta-net state for each token: fade, product, update, product.
const DELTA_OPERATIONS: f64 = 7.0;

/// A stage's dense matrices.
#[derive(Clone, Copy, Default, PartialEq, Debug)]
pub struct Matrices {
    /// Weights.
    pub weights: u64,
    /// Bytes with scales and biases.
    pub bytes: u64,
}

/// A model's work.
#[derive(Clone, Debug)]
pub struct Work {
    /// Its shape.
    pub shape: Shape,
    /// Experts chosen for a token.
    pub top_k: usize,
    /// Bytes of an expert's record.
    pub record_bytes: u64,
    /// How keys and values are kept; f32 unless it is set.
    pub kv_cache: KvFormat,
    dense: [Matrices; Stage::ALL.len()],
}

impl Work {
    /// The work of a model whose dense matrices take `bytes(matrix)`.
    ///
    /// # Errors
    /// What `bytes` says.
    pub fn new(
        shape: &Shape,
        top_k: usize,
        record_bytes: u64,
        mut bytes: impl FnMut(&Dense, usize, usize) -> Result<u64>,
    ) -> Result<Self> {
        let mut dense = [Matrices::default(); Stage::ALL.len()];
        for matrix in inventory::trunk(shape) {
            let (Kind::Matrix(rows, cols) | Kind::Router(rows, cols)) = matrix.kind else {
                continue;
            };
            let bytes = bytes(&matrix, rows, cols)?;
            let stage = stage_of(&matrix.name);
            let tied = shape.tied_head && stage == Stage::Embed;
            for stage in if tied { vec![stage, Stage::Logits] } else { vec![stage] } {
                dense[stage as usize].weights += (rows * cols) as u64;
                dense[stage as usize].bytes += bytes;
            }
        }
        Ok(Self { shape: shape.clone(), top_k, record_bytes, kv_cache: KvFormat::F32, dense })
    }

    /// The work of a container's model with `top_k` experts for a token.
    ///
    /// # Errors
    /// A matrix that is not there.
    pub fn of(container: &Container, top_k: usize) -> Result<Self> {
        let records = container.layouts().iter().map(|layout| layout.record_bytes() as u64);
        Self::new(container.shape(), top_k, records.max().unwrap_or(0), |matrix, rows, cols| {
            let precision = container.precision(&matrix.name, rows, cols)?;
            Ok(precision.format().matrix_bytes(rows, cols) as u64)
        })
    }

    /// The same with keys and values kept otherwise.
    pub fn with_kv_cache(self, kv_cache: KvFormat) -> Self {
        Self { kv_cache, ..self }
    }

    /// Dense matrices of a stage.
    pub fn dense(&self, stage: Stage) -> Matrices {
        self.dense[stage as usize]
    }

    /// Layers with experts.
    pub fn expert_layers(&self) -> usize {
        self.shape.expert_layers().count()
    }

    /// Records of one token's experts.
    pub fn records_per_token(&self) -> usize {
        self.top_k * self.expert_layers()
    }

    /// Bytes that a stage touches for one token at `position`.
    pub fn token_bytes(&self, stage: Stage, position: usize) -> f64 {
        let dense = self.dense(stage).bytes as f64;
        match stage {
            // One row of the embedding, which is nothing.
            Stage::Embed => 0.0,
            Stage::Attention => dense + self.kv_bytes(position),
            Stage::DeltaNet => dense + 2.0 * self.state_elements() * size_of::<f32>() as f64,
            Stage::Experts => self.records_per_token() as f64 * self.record_bytes as f64,
            _ => dense,
        }
    }

    /// Bytes that one token at `position` touches in all.
    pub fn all_token_bytes(&self, position: usize) -> f64 {
        Stage::ALL.into_iter().map(|stage| self.token_bytes(stage, position)).sum()
    }

    /// Operations of a stage for `tokens` tokens from position `from` on, `heads` of them with logits.
    pub fn operations(&self, stage: Stage, from: usize, tokens: usize, heads: usize) -> f64 {
        let (count, a) = (tokens as f64, &self.shape.attention);
        let dense = 2.0 * self.dense(stage).weights as f64;
        match stage {
            Stage::Embed | Stage::Fetch => 0.0,
            Stage::Attention => {
                let seen = count * (from as f64 + (count + 1.0) / 2.0);
                let each = (4 * a.heads * a.head_dim * self.shape.count(Mix::Attention)) as f64;
                dense * count + each * seen
            }
            Stage::DeltaNet => (dense + DELTA_OPERATIONS * self.state_elements()) * count,
            Stage::Experts => {
                let each = 3 * self.shape.hidden * self.shape.moe.width;
                2.0 * (self.records_per_token() * each) as f64 * count
            }
            Stage::Logits => dense * heads as f64,
            Stage::Route | Stage::Shared | Stage::Dense => dense * count,
        }
    }

    fn kv_bytes(&self, position: usize) -> f64 {
        let each = KvShape::of(&self.shape.attention, self.kv_cache).bytes(position);
        self.shape.count(Mix::Attention) as f64 * each as f64
    }

    fn state_elements(&self) -> f64 {
        let each = self.shape.delta.as_ref().map_or(0, |d| d.value_heads * d.key_dim * d.value_dim);
        (each * self.shape.count(Mix::DeltaNet)) as f64
    }
}

/// The stage that a dense tensor of this name is of.
pub fn stage_of(name: &str) -> Stage {
    let has = |part: &str| name.contains(part);
    match name {
        _ if has(".self_attn.") => Stage::Attention,
        _ if has(".linear_attn.") => Stage::DeltaNet,
        _ if has(".mlp.shared_expert") => Stage::Shared,
        _ if name.ends_with(".mlp.gate") => Stage::Route,
        _ if has(".mlp.") => Stage::Dense,
        "lm_head" => Stage::Logits,
        _ => Stage::Embed,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::synth::models;

    fn work(model: &str) -> Work {
        let shape = Shape::from_config(&models::config(model, None)).unwrap();
        let (top_k, hidden, width) = (shape.moe.top_k, shape.hidden, shape.moe.width);
        let record = (3 * hidden * width * 9 / 16) as u64;
        Work::new(&shape, top_k, record, |_, rows, cols| Ok((rows * cols * 9 / 16) as u64)).unwrap()
    }

    #[test]
    fn a_token_of_the_35b_model_touches_what_its_name_says() {
        let work = work("qwen3.5-35b-a3b");
        let weights: u64 = Stage::ALL.iter().map(|&s| work.dense(s).weights).sum();
        let embedding = work.dense(Stage::Embed).weights;
        let experts = (work.records_per_token() * 3 * 2048 * 512) as u64;
        let active = (weights - embedding + experts) as f64 / 1e9;
        assert!((2.7..3.3).contains(&active), "{active} billion weights of the named 3");
        // Without context a token reads each of them once, and the states.
        let states = 2.0 * 4.0 * 30.0 * f64::from(32 * 128 * 128);
        let expected = active * 1e9 * 9.0 / 16.0 + states;
        let touched = work.all_token_bytes(0);
        assert!((touched / expected - 1.0).abs() < 1e-3, "{touched} against {expected}");
        // 64 positions of 2 heads of 256, keys and values, f32, and a cache line, in 10 layers.
        let page = 64.0 * 2.0 * 256.0 * 2.0 * 4.0 + 64.0;
        assert_eq!(work.all_token_bytes(64) - touched, page * 10.0);
    }

    #[test]
    fn operations_are_two_a_weight_and_attention_grows_with_the_square() {
        let work = work("qwen3.5-35b-a3b");
        let shared = work.operations(Stage::Shared, 0, 10, 1);
        assert_eq!(shared, 20.0 * work.dense(Stage::Shared).weights as f64);
        let experts = work.operations(Stage::Experts, 5, 1, 1);
        assert_eq!(experts, 2.0 * (8 * 40 * 3 * 2048 * 512) as f64);
        let one_row = work.operations(Stage::Logits, 0, 500, 1);
        assert_eq!(one_row, 2.0 * work.dense(Stage::Logits).weights as f64);
        let whole = work.operations(Stage::Attention, 0, 100, 1);
        let halves = work.operations(Stage::Attention, 0, 50, 1)
            + work.operations(Stage::Attention, 50, 50, 1);
        assert!((whole / halves - 1.0).abs() < 1e-12);
    }
}
