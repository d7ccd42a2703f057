//! A decoder in data: its layers, what their parameters are called in the files, and the shapes of both. What a family's
//! file makes of config.json; the decoder prepares it and runs it.
//!
//! Pure: it knows no files, no device and no tensors.

use std::num::NonZeroU32;

use kvasir_kernels::device::Activation;
use kvasir_kernels::shape::{
    AttentionShape, CacheId, CacheShape, Limits, ModelShape, RopeId, cache_groups,
};

use super::rope::ContextRope;

/// A decoder-only transformer. Names of parameters are relative to `prefix`, but for the head's.
#[derive(Clone, Debug, PartialEq)]
pub struct DecoderSpec {
    /// `model.`, or where a larger model keeps its decoder.
    pub prefix: &'static str,
    /// Tensors that begin so belong to parts that are not served (an image encoder).
    pub unused: &'static [&'static str],
    /// Rows of the embedding.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Embeddings are multiplied by it, rounded to the dtype that the weights are served in.
    pub embedding_scale: f32,
    /// The embedding is also the output matrix; otherwise that is `head`.
    pub tie_word_embeddings: bool,
    /// Name of the output matrix, without `.weight`.
    pub head: &'static str,
    /// Of every RMSNorm.
    pub norm_epsilon: f32,
    /// Added to the weights of every RMSNorm: 1 where they are stored less 1.
    pub norm_offset: f32,
    /// The rotary embeddings that layers name.
    pub ropes: Vec<ContextRope>,
    /// First to last.
    pub layers: Vec<Layer>,
    /// Longest context that the model was made for.
    pub max_position_embeddings: u32,
}

/// One transformer layer: attention and MLP, each with its norms.
#[derive(Clone, Debug, PartialEq)]
pub struct Layer {
    /// Self-attention.
    pub attention: Attention,
    /// Dense or a mixture of experts.
    pub mlp: Mlp,
    /// Where the norms stand.
    pub norms: Norms,
}

/// Names of a layer's norms, without `.weight`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Norms {
    /// Of attention's input.
    pub before_attention: &'static str,
    /// Of attention's output, before it is added to the residual stream.
    pub after_attention: Option<&'static str>,
    /// Of the MLP's input.
    pub before_mlp: &'static str,
    /// Of the MLP's output, likewise.
    pub after_mlp: Option<&'static str>,
}

impl Norms {
    /// Llama's and most others'.
    pub const BEFORE: Self = Self {
        before_attention: "input_layernorm",
        after_attention: None,
        before_mlp: "post_attention_layernorm",
        after_mlp: None,
    };
    /// Gemma's, before and after each half.
    pub const AROUND: Self = Self {
        before_attention: "input_layernorm",
        after_attention: Some("post_attention_layernorm"),
        before_mlp: "pre_feedforward_layernorm",
        after_mlp: Some("post_feedforward_layernorm"),
    };
}

/// A linear layer made of parts that read the same input, stacked.
#[derive(Clone, Debug, PartialEq)]
pub struct Linear {
    /// Names, without `.weight`, and rows (outputs) of each.
    pub parts: Vec<(String, usize)>,
    /// Inputs.
    pub cols: usize,
    /// Each part has a bias.
    pub bias: bool,
}

impl Linear {
    /// Parts in the order in which they are stacked.
    pub fn new(cols: usize, bias: bool, parts: &[(&str, usize)]) -> Self {
        let named = parts.iter().map(|&(name, rows)| (name.to_owned(), rows));
        Self {
            parts: named.collect(),
            cols,
            bias,
        }
    }

    /// Outputs of all parts.
    pub fn rows(&self) -> usize {
        self.parts.iter().map(|(_, rows)| rows).sum()
    }
}

/// Self-attention of one layer.
#[derive(Clone, Debug, PartialEq)]
pub struct Attention {
    /// Query heads.
    pub n_heads: usize,
    /// Key and value heads.
    pub n_kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// `None`: no position embedding.
    pub rope: Option<RopeId>,
    /// Scores are multiplied by it.
    pub scale: f32,
    /// See [`AttentionShape::soft_cap`].
    pub soft_cap: Option<f32>,
    /// Keys that a query sees, its own among them.
    pub window: Option<NonZeroU32>,
    /// Norms of query and key heads: `self_attn.q_norm`, `self_attn.k_norm`.
    pub head_norms: bool,
    /// Queries, keys and values.
    pub qkv: Linear,
    /// From the heads back to the residual stream.
    pub output: Linear,
}

/// The second half of a layer.
#[derive(Clone, Debug, PartialEq)]
pub enum Mlp {
    /// `down(activation(gate(x)) * up(x))`
    Gated {
        /// Gate, then up.
        gate_up: Linear,
        /// Back to the residual stream.
        down: Linear,
        /// Of the gate.
        activation: Activation,
    },
    /// A router and gated MLPs, of which each token takes a few.
    Experts {
        /// One logit an expert.
        router: Linear,
        /// Of each expert gate, then up.
        gate_up: Linear,
        /// Of each expert.
        down: Linear,
        /// How many a token takes.
        top_k: usize,
        /// The shares of those taken are divided by their sum.
        renormalize: bool,
        /// Of the gates.
        activation: Activation,
    },
}

impl DecoderSpec {
    /// What a device plans from. A window that no sequence outgrows is none.
    pub fn model_shape(&self, max_model_len: u32, block_size: u32, limits: Limits) -> ModelShape {
        let narrower = |window: &NonZeroU32| window.get() < max_model_len;
        let attention = || self.layers.iter().map(|layer| &layer.attention);
        let caches: Vec<CacheShape> = attention()
            .map(|attention| CacheShape {
                n_kv_heads: attention.n_kv_heads,
                head_dim: attention.head_dim,
                window: attention.window.filter(narrower),
            })
            .collect();
        let layers = attention()
            .zip(0..)
            .map(|(attention, cache)| AttentionShape {
                cache: CacheId(cache),
                n_heads: attention.n_heads,
                rope: attention.rope,
                scale: attention.scale,
                soft_cap: attention.soft_cap,
            });
        ModelShape {
            vocab_size: self.vocab_size,
            max_positions: max_model_len as usize,
            block_size: block_size as usize,
            limits,
            ropes: self
                .ropes
                .iter()
                .map(|rope| rope.serving(max_model_len).clone())
                .collect(),
            layers: layers.collect(),
            groups: cache_groups(&caches),
            caches,
        }
    }
}
