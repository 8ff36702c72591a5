//! The shape of a model: what `config.json` says, reduced to what the forward pass needs.
//!
//! Reads the nested (`text_config`) and the flat form of `qwen3_5_moe`, and the flat `qwen3_next` and
//! `qwen3_moe`. Every number that later sizes an allocation is checked here, once, so the rest of
//! the engine can index without asking. Refuses what it does not know: an unknown `model_type`,
//! a rope type that is not implemented, a bias that the checkpoint would carry.

use std::fmt;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::error::{Error, Result};

/// Index of a decoder layer.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Serialize, Deserialize)]
pub struct LayerId(pub u16);

/// Index of a routed expert within its layer.
#[derive(
    Clone, Copy, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Serialize, Deserialize,
)]
pub struct ExpertId(pub u16);

/// A vocabulary entry.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Serialize, Deserialize)]
pub struct TokenId(pub u32);

impl fmt::Display for LayerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for ExpertId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Member of the model family; decides tensor names and norm conventions of a checkpoint.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Family {
    /// Qwen3.5-MoE: DeltaNet + gated attention, shared expert.
    #[serde(rename = "qwen3_5_moe")]
    Qwen35Moe,
    /// Qwen3-Next: as Qwen3.5 with the DeltaNet projections interleaved by key head.
    Qwen3Next,
    /// Qwen3-MoE: plain attention in every layer, no shared expert.
    Qwen3Moe,
}

/// What mixes positions in a layer.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mix {
    /// Softmax attention over the KV cache.
    Attention,
    /// The gated delta rule over a fixed-size state.
    DeltaNet,
}

/// What follows the mix in a layer.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FeedForward {
    /// Router, routed experts and, where the family has one, the shared expert.
    Experts,
    /// One dense gated feed-forward block.
    Dense,
}

/// One decoder layer.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Layer {
    /// Attention or DeltaNet.
    pub mix: Mix,
    /// Experts or dense.
    pub feed_forward: FeedForward,
}

/// Full-attention dimensions.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Attention {
    /// Query heads.
    pub heads: usize,
    /// Key/value heads; `heads` is a multiple.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Leading dimensions of a head that are rotated; even.
    pub rotary_dims: usize,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// How the frequencies are stretched over positions beyond the trained ones, if they are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub yarn: Option<Yarn>,
    /// Whether `q_proj` carries an output gate behind each head's query rows.
    pub gate: bool,
}

/// YaRN (arXiv 2309.00071): slow rotations are slowed by `factor`, fast ones are kept, and those between
/// lie on a ramp. It changes the numbers at every position, also at those that were trained.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Yarn {
    /// Positions afterwards over positions trained.
    pub factor: f64,
    /// Positions trained.
    pub original_positions: usize,
    /// Rotations over the trained positions from which a frequency is kept.
    pub beta_fast: f64,
    /// Rotations over the trained positions up to which it is slowed by the whole factor.
    pub beta_slow: f64,
    /// Whether the ends of the ramp are whole dimensions.
    pub truncate: bool,
    /// Multiplies sines and cosines, and so a score by its square.
    pub attention_factor: f64,
}

impl Yarn {
    /// The usual settings for a factor: 32 and 1 rotations, attention factor `0.1 ln(factor) + 1`.
    pub fn new(factor: f64, original_positions: usize) -> Self {
        Self {
            factor,
            original_positions,
            beta_fast: 32.0,
            beta_slow: 1.0,
            truncate: true,
            attention_factor: mscale(factor, 1.0),
        }
    }

    /// From the rope fields of a config, where `positions` is its `max_position_embeddings`.
    fn of(rope: &Value, positions: usize) -> Result<Self> {
        let number = |key: &str| match rope.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => match value.as_f64() {
                Some(number) if number.is_finite() && number > 0.0 => Ok(Some(number)),
                _ => {
                    Err(Error::Shape(format!("yarn: {key} is {value}, expected a number above 0")))
                }
            },
        };
        let original = number("original_max_position_embeddings")?.unwrap_or(positions as f64);
        let factor = number("factor")?.unwrap_or(positions as f64 / original);
        let stated = match (number("mscale")?, number("mscale_all_dim")?) {
            (Some(some), Some(all)) => mscale(factor, some) / mscale(factor, all),
            _ => mscale(factor, 1.0),
        };
        let plain = Self::new(factor, original as usize);
        Ok(Self {
            beta_fast: number("beta_fast")?.unwrap_or(plain.beta_fast),
            beta_slow: number("beta_slow")?.unwrap_or(plain.beta_slow),
            truncate: rope.get("truncate").and_then(Value::as_bool).unwrap_or(true),
            attention_factor: number("attention_factor")?.unwrap_or(stated),
            ..plain
        })
    }

    /// Positions afterwards.
    pub fn positions(&self) -> usize {
        (self.factor * self.original_positions as f64) as usize
    }

    /// The share of the trained frequency that dimension pair `j` keeps: 1 below the ramp, 0 above.
    fn kept(&self, j: usize, a: &Attention) -> f64 {
        let dims = a.rotary_dims as f64;
        // The pair that rotates so often over the trained positions.
        let pair = |rotations: f64| {
            let turns = self.original_positions as f64 / (rotations * std::f64::consts::TAU);
            dims * turns.ln() / (2.0 * a.rope_theta.ln())
        };
        let (low, high) = (pair(self.beta_fast), pair(self.beta_slow));
        let (low, high) = if self.truncate { (low.floor(), high.ceil()) } else { (low, high) };
        let (low, mut high) = (low.max(0.0), high.min(dims - 1.0));
        if low == high {
            high += 0.001;
        }
        1.0 - ((j as f64 - low) / (high - low)).clamp(0.0, 1.0)
    }
}

fn mscale(factor: f64, weight: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * weight * factor.ln() + 1.0 }
}

impl Attention {
    /// Radians by which dimension pair `j` is rotated for each position.
    pub fn frequency(&self, j: usize) -> f64 {
        let trained = self.rope_theta.powf(-2.0 * j as f64 / self.rotary_dims as f64);
        match &self.yarn {
            None => trained,
            Some(yarn) => {
                let kept = yarn.kept(j, self);
                trained * (kept + (1.0 - kept) / yarn.factor)
            }
        }
    }

    /// What sines and cosines are multiplied by.
    pub fn rotation_scale(&self) -> f64 {
        self.yarn.as_ref().map_or(1.0, |yarn| yarn.attention_factor)
    }
}

/// GatedDeltaNet dimensions.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct DeltaNet {
    /// Query/key heads.
    pub key_heads: usize,
    /// Value heads; a multiple of `key_heads`.
    pub value_heads: usize,
    /// Width of a query/key head.
    pub key_dim: usize,
    /// Width of a value head.
    pub value_dim: usize,
    /// Taps of the causal depthwise convolution; 4.
    pub conv_taps: usize,
}

impl DeltaNet {
    /// Channels through the convolution: all q heads, all k heads, all v heads.
    pub fn conv_channels(&self) -> usize {
        2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim
    }

    /// Width of all value heads.
    pub fn value_width(&self) -> usize {
        self.value_heads * self.value_dim
    }
}

/// Mixture-of-experts dimensions.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Moe {
    /// Routed experts a layer.
    pub experts: usize,
    /// Experts chosen for a token.
    pub top_k: usize,
    /// Intermediate width of a routed expert.
    pub width: usize,
    /// Intermediate width of the shared expert; 0 where the family has none.
    pub shared_width: usize,
    /// Whether the chosen experts' probabilities are scaled to sum to one.
    pub renormalise: bool,
}

/// Everything the forward pass needs to know about a model.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Shape {
    /// Family member.
    pub family: Family,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Rows of the embedding and the head; may exceed the tokenizer's entries.
    pub vocab: usize,
    /// Decoder layers, in order.
    pub layers: Vec<Layer>,
    /// Epsilon of every RMS norm.
    pub rms_eps: f32,
    /// Full-attention dimensions.
    pub attention: Attention,
    /// DeltaNet dimensions, where any layer uses them.
    pub delta: Option<DeltaNet>,
    /// Mixture-of-experts dimensions.
    pub moe: Moe,
    /// Intermediate width of dense layers; 0 where there are none.
    pub dense_width: usize,
    /// Whether the head shares the embedding's weights.
    pub tied_head: bool,
    /// Positions the model was made for.
    pub max_positions: usize,
    /// End-of-sequence ids of `config.json`; `generation_config.json` has the last word.
    pub eos: Vec<u32>,
    /// Multi-token-prediction layers the checkpoint carries beside the trunk.
    pub mtp_layers: usize,
}

impl Shape {
    /// Reads a hub or MLX `config.json`.
    ///
    /// # Errors
    /// Names the field that is missing, of the wrong type, out of range or not supported.
    pub fn from_config(config: &Value) -> Result<Self> {
        let family = family_of(config)?;
        let fields = Fields(config.get("text_config").unwrap_or(config));
        let hidden = fields.size("hidden_size")?;
        let attention = attention_of(family, &fields, config, hidden)?;
        let stated = fields.size("max_position_embeddings")?;
        let max_positions = attention.yarn.as_ref().map_or(stated, |y| y.positions().max(stated));
        let layers = layers_of(family, &fields)?;
        let uses_delta = layers.iter().any(|l| l.mix == Mix::DeltaNet);
        let delta = if uses_delta { Some(delta_of(&fields)?) } else { None };
        let any_dense = layers.iter().any(|l| l.feed_forward == FeedForward::Dense);
        let shape = Self {
            family,
            hidden,
            vocab: fields.size("vocab_size")?,
            layers,
            rms_eps: fields.number("rms_norm_eps").unwrap_or(1e-6) as f32,
            attention,
            delta,
            moe: moe_of(family, &fields)?,
            dense_width: if any_dense { fields.size("intermediate_size")? } else { 0 },
            tied_head: tied(config, &fields),
            max_positions,
            eos: eos_ids(fields.0.get("eos_token_id").or_else(|| config.get("eos_token_id"))),
            mtp_layers: fields.0.get("mtp_num_hidden_layers").and_then(Value::as_u64).unwrap_or(0)
                as usize,
        };
        shape.check()?;
        Ok(shape)
    }

    /// Stretches the positions by YaRN's usual settings for a factor.
    ///
    /// # Errors
    /// The model has YaRN already, or the factor is not a number from 1 on.
    pub fn stretch(&mut self, factor: f64) -> Result<()> {
        if let Some(yarn) = &self.attention.yarn {
            let by = yarn.factor;
            return Err(Error::Shape(format!("its positions are stretched {by} times already")));
        }
        let yarn = Yarn::new(factor, self.max_positions);
        self.max_positions = yarn.positions();
        self.attention.yarn = Some(yarn);
        self.check()
    }

    /// Whether the dimensions are consistent with each other and with the formats.
    ///
    /// # Errors
    /// Names the first rule that is broken.
    pub fn check(&self) -> Result<()> {
        let a = &self.attention;
        ensure(self.hidden.is_multiple_of(32), || {
            format!("hidden_size {} is not a multiple of 32", self.hidden)
        })?;
        ensure(a.heads.is_multiple_of(a.kv_heads), || {
            format!("{} attention heads do not divide into {} KV heads", a.heads, a.kv_heads)
        })?;
        ensure(
            a.rotary_dims.is_multiple_of(2) && (2..=a.head_dim).contains(&a.rotary_dims),
            || format!("{} rotary dimensions for a head of {}", a.rotary_dims, a.head_dim),
        )?;
        ensure(a.rope_theta.is_finite() && a.rope_theta > 1.0, || {
            format!("rope_theta {} is not above 1", a.rope_theta)
        })?;
        if let Some(yarn) = &a.yarn {
            ensure(yarn.factor.is_finite() && yarn.factor >= 1.0, || {
                format!("yarn: factor {} is not 1 or more", yarn.factor)
            })?;
            ensure(yarn.original_positions > 0, || "yarn: no trained positions".into())?;
        }
        let m = &self.moe;
        ensure((1..=m.experts).contains(&m.top_k) && m.experts <= 65_536, || {
            format!("top-{} of {} experts", m.top_k, m.experts)
        })?;
        ensure(self.rms_eps.is_finite() && self.rms_eps > 0.0, || {
            format!("rms_norm_eps {} is not positive", self.rms_eps)
        })?;
        if let Some(d) = &self.delta {
            ensure(d.value_heads.is_multiple_of(d.key_heads), || {
                format!(
                    "{} value heads do not divide into {} key heads",
                    d.value_heads, d.key_heads
                )
            })?;
            ensure(d.conv_taps == 4, || {
                format!("linear_conv_kernel_dim {}: only 4 is supported", d.conv_taps)
            })?;
        }
        Ok(())
    }

    /// Layers whose feed-forward is a mixture of experts.
    pub fn expert_layers(&self) -> impl Iterator<Item = LayerId> + '_ {
        (0u16..)
            .zip(&self.layers)
            .filter(|(_, l)| l.feed_forward == FeedForward::Experts)
            .map(|(i, _)| LayerId(i))
    }

    /// Number of layers with the given mix.
    pub fn count(&self, mix: Mix) -> usize {
        self.layers.iter().filter(|l| l.mix == mix).count()
    }
}

fn family_of(config: &Value) -> Result<Family> {
    let name = config.get("model_type").and_then(Value::as_str).unwrap_or("");
    match name {
        "qwen3_5_moe" | "qwen3_5_moe_text" => Ok(Family::Qwen35Moe),
        "qwen3_next" => Ok(Family::Qwen3Next),
        "qwen3_moe" => Ok(Family::Qwen3Moe),
        "" => Err(Error::Shape("config.json has no model_type".into())),
        other => Err(Error::Shape(format!(
            "model_type {other:?} is not supported; known: qwen3_5_moe, qwen3_next, qwen3_moe"
        ))),
    }
}

fn attention_of(family: Family, f: &Fields, config: &Value, hidden: usize) -> Result<Attention> {
    if f.0.get("attention_bias").and_then(Value::as_bool).unwrap_or(false) {
        return Err(Error::Shape(
            "attention_bias is true: biased projections are not supported".into(),
        ));
    }
    let heads = f.size("num_attention_heads")?;
    let head_dim = f.size_or("head_dim", hidden / heads)?;
    let gate = family != Family::Qwen3Moe;
    let rope = f.0.get("rope_parameters").or_else(|| config.get("rope_parameters"));
    let rope_field = |key: &str| rope.and_then(|r| r.get(key)).or_else(|| f.0.get(key));
    let kind = rope
        .or_else(|| f.0.get("rope_scaling"))
        .and_then(|r| r.get("rope_type").or_else(|| r.get("type")))
        .and_then(Value::as_str)
        .unwrap_or("default");
    let yarn = match kind {
        "default" | "mrope" => None,
        "yarn" => {
            let fields = rope.or_else(|| f.0.get("rope_scaling")).unwrap_or(&Value::Null);
            Some(Yarn::of(fields, f.size("max_position_embeddings")?)?)
        }
        _ => return Err(Error::Shape(format!("rope_type {kind:?} is not supported"))),
    };
    let share = rope_field("partial_rotary_factor").and_then(Value::as_f64);
    let share = share.unwrap_or(if gate { 0.25 } else { 1.0 });
    Ok(Attention {
        heads,
        kv_heads: f.size("num_key_value_heads")?,
        head_dim,
        rotary_dims: (head_dim as f64 * share) as usize,
        rope_theta: rope_field("rope_theta")
            .and_then(Value::as_f64)
            .ok_or_else(|| Error::Shape("config.json has no rope_theta".into()))?,
        yarn,
        gate,
    })
}

fn delta_of(f: &Fields) -> Result<DeltaNet> {
    Ok(DeltaNet {
        key_heads: f.size("linear_num_key_heads")?,
        value_heads: f.size("linear_num_value_heads")?,
        key_dim: f.size("linear_key_head_dim")?,
        value_dim: f.size("linear_value_head_dim")?,
        conv_taps: f.size_or("linear_conv_kernel_dim", 4)?,
    })
}

fn moe_of(family: Family, f: &Fields) -> Result<Moe> {
    let shared = family != Family::Qwen3Moe;
    let stated = f.0.get("norm_topk_prob").and_then(Value::as_bool);
    Ok(Moe {
        experts: f.size("num_experts")?,
        top_k: f.size("num_experts_per_tok")?,
        width: f.size("moe_intermediate_size")?,
        shared_width: if shared { f.size("shared_expert_intermediate_size")? } else { 0 },
        renormalise: match family {
            Family::Qwen35Moe => true,
            Family::Qwen3Next => stated.unwrap_or(true),
            // The published checkpoints all say true; the reference's default, used when a
            // config is silent, is false.
            Family::Qwen3Moe => stated.unwrap_or(false),
        },
    })
}

fn layers_of(family: Family, f: &Fields) -> Result<Vec<Layer>> {
    let count = f.size("num_hidden_layers")?;
    ensure(count <= 1024, || format!("num_hidden_layers {count} is above 1024"))?;
    let interval = f.size_or("full_attention_interval", 4)?;
    let named = f.0.get("layer_types").and_then(Value::as_array);
    if let Some(named) = named {
        ensure(named.len() == count, || {
            format!("layer_types has {} entries for {count} layers", named.len())
        })?;
    }
    let sparse_step = f.size_or("decoder_sparse_step", 1)?;
    let dense_layers: Vec<u64> = match f.0.get("mlp_only_layers").and_then(Value::as_array) {
        Some(list) => list.iter().filter_map(Value::as_u64).collect(),
        None => Vec::new(),
    };
    let mix_of = |i: usize| match (family, named) {
        (Family::Qwen3Moe, _) => Ok(Mix::Attention),
        (_, Some(named)) => match named[i].as_str() {
            Some("full_attention") => Ok(Mix::Attention),
            Some("linear_attention") => Ok(Mix::DeltaNet),
            other => Err(Error::Shape(format!("layer_types[{i}] is {other:?}"))),
        },
        (_, None) if (i + 1).is_multiple_of(interval) => Ok(Mix::Attention),
        (_, None) => Ok(Mix::DeltaNet),
    };
    let feed_forward_of = |i: usize| {
        let dense = dense_layers.contains(&(i as u64)) || !(i + 1).is_multiple_of(sparse_step);
        if family != Family::Qwen35Moe && dense { FeedForward::Dense } else { FeedForward::Experts }
    };
    (0..count).map(|i| Ok(Layer { mix: mix_of(i)?, feed_forward: feed_forward_of(i) })).collect()
}

fn tied(config: &Value, f: &Fields) -> bool {
    let field = config.get("tie_word_embeddings").or_else(|| f.0.get("tie_word_embeddings"));
    field.and_then(Value::as_bool).unwrap_or(false)
}

/// The ids of an `eos_token_id` field: one number or a list of them.
pub fn eos_ids(value: Option<&Value>) -> Vec<u32> {
    match value {
        Some(Value::Array(list)) => {
            list.iter().filter_map(Value::as_u64).map(|id| id as u32).collect()
        }
        Some(one) => one.as_u64().map(|id| id as u32).into_iter().collect(),
        None => Vec::new(),
    }
}

struct Fields<'a>(&'a Value);

impl Fields<'_> {
    /// A positive size below 2^31, so that products of two fit in a `usize`.
    fn size(&self, key: &str) -> Result<usize> {
        let value =
            self.0.get(key).ok_or_else(|| Error::Shape(format!("config.json has no {key}")))?;
        match value.as_u64() {
            Some(n) if (1..1 << 31).contains(&n) => Ok(n as usize),
            _ => Err(Error::Shape(format!("{key} is {value}, expected a positive whole number"))),
        }
    }

    fn size_or(&self, key: &str, default: usize) -> Result<usize> {
        match self.0.get(key) {
            None | Some(Value::Null) => Ok(default),
            Some(_) => self.size(key),
        }
    }

    fn number(&self, key: &str) -> Option<f64> {
        self.0.get(key).and_then(Value::as_f64)
    }
}

fn ensure(holds: bool, message: impl FnOnce() -> String) -> Result<()> {
    if holds { Ok(()) } else { Err(Error::Shape(message())) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn flat() -> Value {
        json!({
            "model_type": "qwen3_next", "hidden_size": 128, "num_hidden_layers": 8, "vocab_size": 512,
            "rms_norm_eps": 1e-6, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
            "rope_theta": 1e7, "partial_rotary_factor": 0.25, "linear_num_key_heads": 2,
            "linear_num_value_heads": 4, "linear_key_head_dim": 64, "linear_value_head_dim": 64,
            "num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 64,
            "shared_expert_intermediate_size": 64, "max_position_embeddings": 4096,
            "intermediate_size": 256, "eos_token_id": 7
        })
    }

    #[test]
    fn every_fourth_layer_attends_when_layer_types_are_absent() {
        let shape = Shape::from_config(&flat()).unwrap();
        let attends: Vec<usize> =
            (0..8).filter(|&i| shape.layers[i].mix == Mix::Attention).collect();
        assert_eq!(attends, [3, 7]);
        assert_eq!(shape.attention.rotary_dims, 16);
        assert_eq!(shape.eos, [7]);
    }

    #[test]
    fn nested_and_flat_configs_give_one_shape() {
        let mut inner = flat();
        inner.as_object_mut().unwrap().remove("model_type");
        let nested = json!({ "model_type": "qwen3_next", "text_config": inner });
        assert_eq!(Shape::from_config(&nested).unwrap(), Shape::from_config(&flat()).unwrap());
    }

    #[test]
    fn dense_layers_follow_the_list_and_the_step() {
        let mut config = flat();
        config["mlp_only_layers"] = json!([1]);
        config["decoder_sparse_step"] = json!(2);
        let shape = Shape::from_config(&config).unwrap();
        let expert_layers: Vec<u16> = shape.expert_layers().map(|l| l.0).collect();
        assert_eq!(expert_layers, [3, 5, 7]);
        assert_eq!(shape.dense_width, 256);
    }

    #[test]
    fn yarn_keeps_fast_frequencies_slows_slow_ones_and_adds_positions() {
        let mut shape = Shape::from_config(&flat()).unwrap();
        let (plain, positions) = (shape.attention.clone(), shape.max_positions);
        shape.stretch(4.0).unwrap();
        let a = &shape.attention;
        assert_eq!(shape.max_positions, 4 * positions);
        assert_eq!(a.frequency(0), plain.frequency(0));
        let last = a.rotary_dims / 2 - 1;
        assert!((a.frequency(last) * 4.0 / plain.frequency(last) - 1.0).abs() < 1e-12);
        assert!((a.rotation_scale() - (0.1 * 4f64.ln() + 1.0)).abs() < 1e-12);
        assert!(shape.stretch(2.0).unwrap_err().to_string().contains("4 times already"));
        for factor in [0.5, f64::NAN, f64::INFINITY] {
            assert!(Shape::from_config(&flat()).unwrap().stretch(factor).is_err(), "{factor}");
        }
    }

    #[test]
    fn bad_fields_are_named() {
        for (key, value, expected) in [
            ("model_type", json!("llama"), "llama"),
            ("hidden_size", json!("wide"), "hidden_size"),
            ("num_experts_per_tok", json!(17), "top-17 of 16"),
            ("num_key_value_heads", json!(3), "KV heads"),
            ("linear_conv_kernel_dim", json!(5), "linear_conv_kernel_dim"),
            ("rope_scaling", json!({"type": "llama3"}), "llama3"),
            ("rope_scaling", json!({"type": "yarn", "factor": "four"}), "factor is \"four\""),
            ("rope_scaling", json!({"type": "yarn", "factor": 0.5}), "factor 0.5"),
            ("layer_types", json!(["full_attention"]), "layer_types"),
            ("attention_bias", json!(true), "attention_bias"),
        ] {
            let mut config = flat();
            config[key] = value;
            let message = Shape::from_config(&config).unwrap_err().to_string();
            assert!(message.contains(expected), "{key}: {message}");
        }
    }
}
