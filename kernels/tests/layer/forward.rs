//! One forward pass over transformer layers, as a model drives a device: what the tests and the CPU benchmark share.

use kvasir_kernels::device::*;
use kvasir_kernels::shape::LayerId;

/// What follows attention in a layer.
#[derive(Clone, Copy)]
pub(crate) enum Mlp {
    Dense { gate_up: Weight, down: Weight },
    Experts { router: Weight, experts: Experts },
}

/// The weights of one layer.
#[derive(Clone, Copy)]
pub(crate) struct LayerWeights {
    pub(crate) qkv: Weight,
    pub(crate) bias: Option<Vector>,
    pub(crate) o: Weight,
    pub(crate) mlp: Mlp,
}

/// Columns of the activations.
#[derive(Clone, Copy)]
pub(crate) struct Widths {
    pub(crate) hidden: usize,
    pub(crate) n_heads: usize,
    pub(crate) n_kv_heads: usize,
    pub(crate) head_dim: usize,
    pub(crate) intermediate: usize,
    pub(crate) n_experts: usize,
}

impl Widths {
    pub(crate) fn qkv(&self) -> usize {
        (self.n_heads + 2 * self.n_kv_heads) * self.head_dim
    }

    pub(crate) fn heads(&self) -> usize {
        self.n_heads * self.head_dim
    }
}

/// The activations of a pass.
#[derive(Clone, Copy)]
pub(crate) struct Buffers {
    x: Buffer,
    pub(crate) normed: Buffer,
    qkv: Buffer,
    mixed: Buffer,
    pub(crate) delta: Buffer,
    gate_up: Buffer,
    activated: Buffer,
    router: Buffer,
    last: Buffer,
}

impl Buffers {
    pub(crate) fn plan(device: &mut dyn Device, widths: Widths) -> Result<Self, DeviceError> {
        let last = device.plan_buffer(Rows::Logits, widths.hidden)?;
        let mut tokens = |cols| device.plan_buffer(Rows::Tokens, cols);
        Ok(Self {
            x: tokens(widths.hidden)?,
            normed: tokens(widths.hidden)?,
            qkv: tokens(widths.qkv())?,
            mixed: tokens(widths.heads())?,
            delta: tokens(widths.hidden)?,
            gate_up: tokens(2 * widths.intermediate)?,
            activated: tokens(widths.intermediate)?,
            router: tokens(widths.n_experts)?,
            last,
        })
    }
}

/// A model: its weights, and where a pass leaves its activations. All norms are one.
#[derive(Clone, Copy)]
pub(crate) struct Decoder<'a> {
    pub(crate) table: Weight,
    pub(crate) embedding_scale: f32,
    pub(crate) norm: Vector,
    pub(crate) head_norms: Option<HeadNorms>,
    pub(crate) activation: Activation,
    pub(crate) layers: &'a [LayerWeights],
    pub(crate) buffers: Buffers,
    pub(crate) logits: Logits,
}

impl Decoder<'_> {
    pub(crate) fn forward(&self, ops: &mut dyn Ops) {
        let b = self.buffers;
        ops.embed(b.x, self.table, self.embedding_scale);
        ops.rms_norm(b.normed, b.x, self.norm, 1e-5);
        for (layer, weights) in (0..).map(LayerId).zip(self.layers) {
            ops.matmul(b.qkv, b.normed, weights.qkv, weights.bias);
            ops.rope_append(b.qkv, layer, self.head_norms);
            ops.attention(b.mixed, b.qkv, layer);
            ops.matmul(b.delta, b.mixed, weights.o, None);
            ops.add_rms_norm(b.normed, b.x, b.delta, self.norm, 1e-5);
            match weights.mlp {
                Mlp::Dense { gate_up, down } => {
                    ops.matmul(b.gate_up, b.normed, gate_up, None);
                    ops.gated_activation(b.activated, b.gate_up, self.activation);
                    ops.matmul(b.delta, b.activated, down, None);
                }
                Mlp::Experts { router, experts } => {
                    ops.matmul(b.router, b.normed, router, None);
                    ops.experts(b.delta, b.normed, b.router, experts);
                }
            }
            ops.add_rms_norm(b.normed, b.x, b.delta, self.norm, 1e-5);
        }
        ops.gather_logits_rows(b.last, b.normed);
        ops.logits(self.logits, b.last, self.table);
    }
}
