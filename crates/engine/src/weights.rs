//! The dense weights, resident.
//!
//! Everything a token touches except the routed experts, read once into our own memory: left to the
//! page cache it would be evicted by the expert reads. Every tensor's shape is checked against the
//! model's shape here, so the layers need no checks of their own.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::container::{Container, Matrix};
use crate::error::Result;
use crate::shape::{FeedForward, Mix, Shape};

/// Threads that read dense weights when a model is opened.
const LOAD_THREADS: usize = 4;

/// All dense weights of a model.
pub struct Weights {
    /// `[vocab, hidden]`.
    pub embed: Matrix,
    /// Final norm, `[hidden]`.
    pub norm: Vec<f32>,
    /// `[vocab, hidden]`; `None` when the embedding is the head.
    pub head: Option<Matrix>,
    /// In order.
    pub layers: Vec<LayerWeights>,
}

/// Dense weights of one layer.
pub struct LayerWeights {
    /// Norm before the mix, `[hidden]`.
    pub input_norm: Vec<f32>,
    /// Norm before the feed-forward, `[hidden]`.
    pub post_norm: Vec<f32>,
    /// The mix.
    pub mix: MixWeights,
    /// The feed-forward.
    pub feed_forward: FeedForwardWeights,
}

impl LayerWeights {
    /// All matrices.
    pub fn matrices(&self) -> impl Iterator<Item = &Matrix> {
        let mix = match &self.mix {
            MixWeights::Attention(w) => vec![&w.q, &w.k, &w.v, &w.o],
            MixWeights::DeltaNet(w) => vec![&w.qkv, &w.z, &w.b, &w.a, &w.out],
        };
        let feed_forward = match &self.feed_forward {
            FeedForwardWeights::Dense(block) => vec![&block.gate, &block.up, &block.down],
            FeedForwardWeights::Experts(w) => {
                let shared = w.shared.iter();
                let shared = shared.flat_map(|(b, gate)| [&b.gate, &b.up, &b.down, gate]);
                std::iter::once(&w.router).chain(shared).collect()
            }
        };
        mix.into_iter().chain(feed_forward)
    }
}

/// Weights of a layer's mix.
pub enum MixWeights {
    /// Full attention.
    Attention(AttentionWeights),
    /// Gated delta rule.
    DeltaNet(DeltaNetWeights),
}

/// Full attention.
pub struct AttentionWeights {
    /// `[heads * head_dim (* 2 with gate), hidden]`.
    pub q: Matrix,
    /// `[kv_heads * head_dim, hidden]`.
    pub k: Matrix,
    /// `[kv_heads * head_dim, hidden]`.
    pub v: Matrix,
    /// `[hidden, heads * head_dim]`.
    pub o: Matrix,
    /// `[head_dim]`.
    pub q_norm: Vec<f32>,
    /// `[head_dim]`.
    pub k_norm: Vec<f32>,
}

/// Gated delta rule.
pub struct DeltaNetWeights {
    /// `[conv_channels, hidden]`.
    pub qkv: Matrix,
    /// `[value_width, hidden]`.
    pub z: Matrix,
    /// `[value_heads, hidden]`.
    pub b: Matrix,
    /// `[value_heads, hidden]`.
    pub a: Matrix,
    /// `[hidden, value_width]`.
    pub out: Matrix,
    /// Taps, oldest first, `[4][conv_channels]`.
    pub conv: Vec<f32>,
    /// exp(A_log), `[value_heads]`.
    pub rate: Vec<f32>,
    /// `[value_heads]`.
    pub dt_bias: Vec<f32>,
    /// `[value_dim]`.
    pub norm: Vec<f32>,
}

/// Weights of a layer's feed-forward, routed experts apart.
pub enum FeedForwardWeights {
    /// A mixture of experts.
    Experts(Box<MoeWeights>),
    /// One gated block.
    Dense(Box<GatedBlock>),
}

/// Router and shared expert.
pub struct MoeWeights {
    /// `[experts, hidden]`.
    pub router: Matrix,
    /// The shared expert and its gate row `[1, hidden]`, where the family has one.
    pub shared: Option<(GatedBlock, Matrix)>,
}

/// down(silu(gate x) * (up x)).
pub struct GatedBlock {
    /// `[width, hidden]`.
    pub gate: Matrix,
    /// `[width, hidden]`.
    pub up: Matrix,
    /// `[hidden, width]`.
    pub down: Matrix,
}

impl GatedBlock {
    /// Weight bytes.
    pub fn bytes(&self) -> usize {
        self.gate.bytes() + self.up.bytes() + self.down.bytes()
    }
}

impl Weights {
    /// Reads all dense weights of the trunk.
    ///
    /// # Errors
    /// A missing tensor, a wrong shape, a failed read, a norm that is not finite.
    pub fn load(container: &Container) -> Result<Self> {
        let shape = container.shape();
        let (vocab, hidden) = (shape.vocab, shape.hidden);
        let layers = load_layers(container)?;
        let head = match shape.tied_head {
            true => None,
            false => Some(container.matrix("lm_head", vocab, hidden)?),
        };
        Ok(Self {
            embed: container.matrix("model.embed_tokens", vocab, hidden)?,
            norm: container.vector("model.norm.weight", hidden)?,
            head,
            layers,
        })
    }

    /// Gives up everything but the embedding and the norm before the head: the rest is elsewhere now.
    pub fn keep_embedding(&mut self) {
        self.layers = Vec::new();
        self.head = None;
    }

    /// The matrix that gives logits.
    pub fn head(&self) -> &Matrix {
        self.head.as_ref().unwrap_or(&self.embed)
    }

    /// Bytes of the embedding as it is stored.
    pub fn embedding_bytes(container: &Container) -> u64 {
        let tensors = container.dense_tensors().into_iter();
        let embedding = tensors.filter(|(name, _)| name.starts_with("model.embed_tokens."));
        embedding.map(|(_, info)| (info.data_offsets.1 - info.data_offsets.0) as u64).sum()
    }

    /// Bytes that [`Weights::load`] will take: the stored sizes of the trunk's tensors.
    pub fn stored_bytes(container: &Container) -> u64 {
        let trunk = container.dense_tensors().into_iter().filter(|(n, _)| !n.starts_with("mtp."));
        trunk.map(|(_, info)| (info.data_offsets.1 - info.data_offsets.0) as u64).sum()
    }
}

/// Layers are independent, so a few threads keep several reads in flight.
fn load_layers(container: &Container) -> Result<Vec<LayerWeights>> {
    let count = container.shape().layers.len();
    let loaded: Mutex<Vec<Option<Result<LayerWeights>>>> =
        Mutex::new(std::iter::repeat_with(|| None).take(count).collect());
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..LOAD_THREADS.min(count) {
            scope.spawn(|| {
                loop {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    if index >= count {
                        return;
                    }
                    let layer = load_layer(container, index);
                    loaded.lock().expect("no loader panics with the lock")[index] = Some(layer);
                }
            });
        }
    });
    let loaded = loaded.into_inner().expect("no loader panicked");
    loaded.into_iter().map(|layer| layer.expect("every layer was claimed")).collect()
}

fn load_layer(container: &Container, index: usize) -> Result<LayerWeights> {
    let shape = container.shape();
    let prefix = format!("model.layers.{index}");
    let layer = shape.layers[index];
    Ok(LayerWeights {
        input_norm: container.vector(&format!("{prefix}.input_layernorm.weight"), shape.hidden)?,
        post_norm: container
            .vector(&format!("{prefix}.post_attention_layernorm.weight"), shape.hidden)?,
        mix: match layer.mix {
            Mix::Attention => MixWeights::Attention(load_attention(container, shape, &prefix)?),
            Mix::DeltaNet => MixWeights::DeltaNet(load_delta_net(container, shape, &prefix)?),
        },
        feed_forward: match layer.feed_forward {
            FeedForward::Experts => {
                FeedForwardWeights::Experts(Box::new(load_moe(container, shape, &prefix)?))
            }
            FeedForward::Dense => FeedForwardWeights::Dense(Box::new(load_block(
                container,
                &format!("{prefix}.mlp"),
                (shape.hidden, shape.dense_width),
            )?)),
        },
    })
}

fn load_attention(c: &Container, shape: &Shape, prefix: &str) -> Result<AttentionWeights> {
    let a = &shape.attention;
    let (hidden, heads, kv) = (shape.hidden, a.heads * a.head_dim, a.kv_heads * a.head_dim);
    let q_rows = if a.gate { 2 * heads } else { heads };
    let name = |part: &str| format!("{prefix}.self_attn.{part}");
    Ok(AttentionWeights {
        q: c.matrix(&name("q_proj"), q_rows, hidden)?,
        k: c.matrix(&name("k_proj"), kv, hidden)?,
        v: c.matrix(&name("v_proj"), kv, hidden)?,
        o: c.matrix(&name("o_proj"), hidden, heads)?,
        q_norm: c.vector(&name("q_norm.weight"), a.head_dim)?,
        k_norm: c.vector(&name("k_norm.weight"), a.head_dim)?,
    })
}

fn load_delta_net(c: &Container, shape: &Shape, prefix: &str) -> Result<DeltaNetWeights> {
    let d = shape.delta.as_ref().expect("a shape with delta-net layers has their dimensions");
    let (hidden, channels, width) = (shape.hidden, d.conv_channels(), d.value_width());
    let name = |part: &str| format!("{prefix}.linear_attn.{part}");
    let a_log = c.vector(&name("A_log"), d.value_heads)?;
    Ok(DeltaNetWeights {
        qkv: c.matrix(&name("in_proj_qkv"), channels, hidden)?,
        z: c.matrix(&name("in_proj_z"), width, hidden)?,
        b: c.matrix(&name("in_proj_b"), d.value_heads, hidden)?,
        a: c.matrix(&name("in_proj_a"), d.value_heads, hidden)?,
        out: c.matrix(&name("out_proj"), hidden, width)?,
        conv: c.vector(&name("conv1d.weight"), d.conv_taps * channels)?,
        rate: a_log.into_iter().map(f32::exp).collect(),
        dt_bias: c.vector(&name("dt_bias"), d.value_heads)?,
        norm: c.vector(&name("norm.weight"), d.value_dim)?,
    })
}

fn load_moe(c: &Container, shape: &Shape, prefix: &str) -> Result<MoeWeights> {
    let shared = match shape.moe.shared_width {
        0 => None,
        width => Some((
            load_block(c, &format!("{prefix}.mlp.shared_expert"), (shape.hidden, width))?,
            c.matrix(&format!("{prefix}.mlp.shared_expert_gate"), 1, shape.hidden)?,
        )),
    };
    let router = c.matrix(&format!("{prefix}.mlp.gate"), shape.moe.experts, shape.hidden)?;
    Ok(MoeWeights { router, shared })
}

fn load_block(c: &Container, prefix: &str, (hidden, width): (usize, usize)) -> Result<GatedBlock> {
    Ok(GatedBlock {
        gate: c.matrix(&format!("{prefix}.gate_proj"), width, hidden)?,
        up: c.matrix(&format!("{prefix}.up_proj"), width, hidden)?,
        down: c.matrix(&format!("{prefix}.down_proj"), hidden, width)?,
    })
}
