//! The dense tensors of a container, by name: what the engine will ask for, and nothing else.
//!
//! One list for everybody: convert looks each entry up in a checkpoint, synth fills it with random
//! numbers. Experts are not in it; they are records in files of their own.

use flash_moe_engine::shape::{FeedForward, Mix, Shape};

/// What a dense tensor is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// Weight of an RMS norm, which checkpoints may store as the difference from one.
    Norm(usize),
    /// Weight of the norm inside DeltaNet, which all checkpoints store as it is.
    PlainNorm(usize),
    /// Taps of the convolution, `[4][channels]` in the container.
    Conv(usize),
    /// Logarithms of the decay rates.
    DecayLog(usize),
    /// Bias of the decay's time step.
    TimeBias(usize),
    /// A matrix that decides: router or gate of the shared expert.
    Router(usize, usize),
    /// Any other matrix.
    Matrix(usize, usize),
}

/// One dense tensor: matrices are named without `.weight`, everything else in full.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Dense {
    /// Name in the container.
    pub name: String,
    /// What it is and its size; matrices as rows and columns.
    pub kind: Kind,
}

/// The dense tensors of the trunk, in the order in which a token meets them.
pub fn trunk(shape: &Shape) -> Vec<Dense> {
    let mut list = List(Vec::new());
    list.add("model.embed_tokens", Kind::Matrix(shape.vocab, shape.hidden));
    for (i, layer) in shape.layers.iter().enumerate() {
        let prefix = format!("model.layers.{i}");
        list.add(format!("{prefix}.input_layernorm.weight"), Kind::Norm(shape.hidden));
        match layer.mix {
            Mix::Attention => list.attention(&prefix, shape),
            Mix::DeltaNet => list.delta_net(&prefix, shape),
        }
        list.add(format!("{prefix}.post_attention_layernorm.weight"), Kind::Norm(shape.hidden));
        match layer.feed_forward {
            FeedForward::Experts => list.experts(&prefix, shape),
            FeedForward::Dense => list.gated(&format!("{prefix}.mlp"), shape.dense_width, shape),
        }
    }
    list.add("model.norm.weight", Kind::Norm(shape.hidden));
    if !shape.tied_head {
        list.add("lm_head", Kind::Matrix(shape.vocab, shape.hidden));
    }
    list.0
}

/// The dense tensors of the multi-token-prediction layers, which attend and have experts.
pub fn prediction(shape: &Shape, layers: usize) -> Vec<Dense> {
    let mut list = List(Vec::new());
    let hidden = shape.hidden;
    list.add("mtp.fc", Kind::Matrix(hidden, 2 * hidden));
    for norm in ["pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm"] {
        list.add(format!("mtp.{norm}.weight"), Kind::Norm(hidden));
    }
    for i in 0..layers {
        let prefix = format!("mtp.layers.{i}");
        list.add(format!("{prefix}.input_layernorm.weight"), Kind::Norm(hidden));
        list.attention(&prefix, shape);
        list.add(format!("{prefix}.post_attention_layernorm.weight"), Kind::Norm(hidden));
        list.experts(&prefix, shape);
    }
    list.0
}

struct List(Vec<Dense>);

impl List {
    fn add(&mut self, name: impl Into<String>, kind: Kind) {
        self.0.push(Dense { name: name.into(), kind });
    }

    fn attention(&mut self, prefix: &str, shape: &Shape) {
        let a = &shape.attention;
        let query_rows = a.heads * a.head_dim * if a.gate { 2 } else { 1 };
        let kv_rows = a.kv_heads * a.head_dim;
        for (name, rows) in [("q_proj", query_rows), ("k_proj", kv_rows), ("v_proj", kv_rows)] {
            self.add(format!("{prefix}.self_attn.{name}"), Kind::Matrix(rows, shape.hidden));
        }
        for name in ["q_norm", "k_norm"] {
            self.add(format!("{prefix}.self_attn.{name}.weight"), Kind::Norm(a.head_dim));
        }
        let output = Kind::Matrix(shape.hidden, a.heads * a.head_dim);
        self.add(format!("{prefix}.self_attn.o_proj"), output);
    }

    fn delta_net(&mut self, prefix: &str, shape: &Shape) {
        let d = shape.delta.as_ref().expect("a shape with DeltaNet layers has their dimensions");
        let prefix = format!("{prefix}.linear_attn");
        for (name, rows) in [
            ("in_proj_qkv", d.conv_channels()),
            ("in_proj_z", d.value_width()),
            ("in_proj_b", d.value_heads),
            ("in_proj_a", d.value_heads),
        ] {
            self.add(format!("{prefix}.{name}"), Kind::Matrix(rows, shape.hidden));
        }
        self.add(format!("{prefix}.conv1d.weight"), Kind::Conv(d.conv_channels()));
        self.add(format!("{prefix}.A_log"), Kind::DecayLog(d.value_heads));
        self.add(format!("{prefix}.dt_bias"), Kind::TimeBias(d.value_heads));
        self.add(format!("{prefix}.norm.weight"), Kind::PlainNorm(d.value_dim));
        self.add(format!("{prefix}.out_proj"), Kind::Matrix(shape.hidden, d.value_width()));
    }

    fn experts(&mut self, prefix: &str, shape: &Shape) {
        self.add(format!("{prefix}.mlp.gate"), Kind::Router(shape.moe.experts, shape.hidden));
        if shape.moe.shared_width > 0 {
            self.gated(&format!("{prefix}.mlp.shared_expert"), shape.moe.shared_width, shape);
            let gate = Kind::Router(1, shape.hidden);
            self.add(format!("{prefix}.mlp.shared_expert_gate"), gate);
        }
    }

    fn gated(&mut self, prefix: &str, width: usize, shape: &Shape) {
        for name in ["gate_proj", "up_proj"] {
            self.add(format!("{prefix}.{name}"), Kind::Matrix(width, shape.hidden));
        }
        self.add(format!("{prefix}.down_proj"), Kind::Matrix(shape.hidden, width));
    }
}
