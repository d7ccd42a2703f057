//! A decoder on a device: parameters declared once, and the forward pass over them.
//!
//! The same walk checks the headers of the files (on a device without memory) and prepares the weights (on a real one):
//! each block's parameters are taken where its operations stand. It knows operations and handles, never requests, blocks
//! of the cache or a device's kind.

use std::collections::HashMap;

use kvasir_kernels::device::{
    Activation, Buffer, Device, Experts, ExpertsShape, HeadNorms, Logits, Ops, Rows, Vector, Weight,
};
use kvasir_kernels::shape::{LayerId, Precision};
use kvasir_kernels::stored::{StoredMatrix, TensorView};

use super::LoadError;
use super::quantization::Quantization;
use super::spec::{self, DecoderSpec, Mlp, Norms};
use super::weights::Tensors;

/// A model on a device: handles only.
#[derive(Debug)]
pub struct Decoder {
    embedding: Weight,
    embedding_scale: f32,
    layers: Vec<Layer>,
    norm: Norm,
    head: Weight,
    /// The residual stream, `[T, hidden]`.
    residual: Buffer,
    /// The input of a block, `[T, hidden]`.
    normed: Buffer,
    /// The rows of `normed` that logits are wanted of, `[L, hidden]`.
    last: Buffer,
    logits: Logits,
}

impl Decoder {
    /// Takes every parameter that `spec` names from `tensors`, refuses others, prepares them on the device, whose model
    /// was just added, and plans the workspace. `progress` hears of the bytes done so far.
    pub fn prepare(
        spec: &DecoderSpec,
        quantization: Quantization,
        weights: Precision,
        mut tensors: Tensors<'_>,
        device: &mut dyn Device,
        progress: &mut dyn FnMut(u64),
    ) -> Result<Self, LoadError> {
        let head = format!("{}.weight", spec.head);
        // Buffers of rotary frequencies in old files, a copy of a tied embedding, parts that are not served.
        tensors.ignore(|name| {
            name.ends_with(".rotary_emb.inv_freq")
                || (spec.tie_word_embeddings && name == head)
                || spec.unused.iter().any(|prefix| name.starts_with(prefix))
        });
        let mut builder = Builder {
            spec,
            quantization,
            tensors,
            device,
            progress,
            done_bytes: 0,
            buffers: HashMap::new(),
        };
        let (vocabulary, hidden) = (spec.vocab_size, spec.hidden_size);
        let embedding = builder.weight(
            &[(format!("{}embed_tokens", spec.prefix), vocabulary)],
            hidden,
        )?;
        let layers = spec.layers.iter().enumerate();
        let layers = layers.map(|(i, layer)| Layer::prepare(&mut builder, i, layer));
        let layers = layers.collect::<Result<_, _>>()?;
        let norm = builder.norm(&format!("{}norm", spec.prefix), hidden)?;
        let head = match spec.tie_word_embeddings {
            true => embedding,
            false => builder.weight(&[(spec.head.to_owned(), vocabulary)], hidden)?,
        };
        let decoder = Self {
            embedding,
            embedding_scale: match weights {
                Precision::F32 => spec.embedding_scale,
                Precision::BF16 => half::bf16::from_f32(spec.embedding_scale).to_f32(),
            },
            layers,
            norm,
            head,
            residual: builder.buffer("residual", hidden)?,
            normed: builder.buffer("normed", hidden)?,
            last: builder
                .device
                .plan_buffer(Rows::Logits, hidden)
                .map_err(LoadError::Device)?,
            logits: builder.device.plan_logits().map_err(LoadError::Device)?,
        };
        builder.tensors.finish()?;
        Ok(decoder)
    }

    /// The logits of a step, `[L, vocab_size]`.
    pub fn logits(&self) -> Logits {
        self.logits
    }

    /// One pass: from the tokens of the batch to the logits.
    pub fn forward(&self, ops: &mut dyn Ops) {
        let (residual, normed) = (self.residual, self.normed);
        ops.embed(residual, self.embedding, self.embedding_scale);
        // What a block gave is added to the residual stream by the norm that comes next.
        let mut delta = None;
        for layer in &self.layers {
            layer.before_attention.add(ops, normed, residual, delta);
            let attended = layer.attention.forward(ops, normed);
            let attended = after(ops, layer.after_attention, attended);
            layer.before_mlp.add(ops, normed, residual, Some(attended));
            let computed = layer.mlp.forward(ops, normed);
            delta = Some(after(ops, layer.after_mlp, computed));
        }
        self.norm.add(ops, normed, residual, delta);
        ops.gather_logits_rows(self.last, normed);
        ops.logits(self.logits, self.last, self.head);
    }
}

#[derive(Debug)]
struct Layer {
    before_attention: Norm,
    attention: Attention,
    /// With the buffer that it writes to.
    after_attention: Option<(Norm, Buffer)>,
    before_mlp: Norm,
    mlp: PreparedMlp,
    after_mlp: Option<(Norm, Buffer)>,
}

impl Layer {
    fn prepare(
        builder: &mut Builder<'_, '_>,
        index: usize,
        layer: &spec::Layer,
    ) -> Result<Self, LoadError> {
        let prefix = format!("{}layers.{index}.", builder.spec.prefix);
        let hidden = builder.spec.hidden_size;
        let id = LayerId(index as u32);
        let attention = Attention::prepare(builder, &prefix, id, &layer.attention)?;
        let mlp = PreparedMlp::prepare(builder, &prefix, &layer.mlp)?;
        let mut norm = |name: &str| builder.norm(&format!("{prefix}{name}"), hidden);
        let Norms {
            before_attention,
            after_attention,
            before_mlp,
            after_mlp,
        } = layer.norms;
        let (before_attention, before_mlp) = (norm(before_attention)?, norm(before_mlp)?);
        let after = [after_attention, after_mlp].map(|name| name.map(&mut norm).transpose());
        let out = builder.buffer("normed delta", hidden)?;
        let [after_attention, after_mlp] = after;
        Ok(Self {
            before_attention,
            attention,
            after_attention: after_attention?.map(|norm| (norm, out)),
            before_mlp,
            mlp,
            after_mlp: after_mlp?.map(|norm| (norm, out)),
        })
    }
}

/// Norms a block's output where the layer has a norm for it.
fn after(ops: &mut dyn Ops, norm: Option<(Norm, Buffer)>, delta: Buffer) -> Buffer {
    match norm {
        None => delta,
        Some((norm, out)) => {
            ops.rms_norm(out, delta, norm.weight, norm.epsilon);
            out
        }
    }
}

#[derive(Clone, Copy, Debug)]
struct Norm {
    weight: Vector,
    epsilon: f32,
}

impl Norm {
    /// `out = norm(residual += delta)`
    fn add(self, ops: &mut dyn Ops, out: Buffer, residual: Buffer, delta: Option<Buffer>) {
        match delta {
            None => ops.rms_norm(out, residual, self.weight, self.epsilon),
            Some(delta) => ops.add_rms_norm(out, residual, delta, self.weight, self.epsilon),
        }
    }
}

/// A linear layer and the buffer that it writes to.
#[derive(Clone, Copy, Debug)]
struct Linear {
    weight: Weight,
    bias: Option<Vector>,
    out: Buffer,
}

impl Linear {
    fn forward(self, ops: &mut dyn Ops, x: Buffer) -> Buffer {
        ops.matmul(self.out, x, self.weight, self.bias);
        self.out
    }
}

#[derive(Debug)]
struct Attention {
    layer: LayerId,
    qkv: Linear,
    head_norms: Option<HeadNorms>,
    attended: Buffer,
    output: Linear,
}

impl Attention {
    fn prepare(
        builder: &mut Builder<'_, '_>,
        prefix: &str,
        layer: LayerId,
        spec: &spec::Attention,
    ) -> Result<Self, LoadError> {
        let head_dim = spec.head_dim;
        let mut head_norm =
            |name: &str| builder.norm(&format!("{prefix}self_attn.{name}"), head_dim);
        let head_norms = match spec.head_norms {
            false => None,
            true => {
                let (query, key) = (head_norm("q_norm")?, head_norm("k_norm")?);
                Some(HeadNorms {
                    query: query.weight,
                    key: key.weight,
                    epsilon: query.epsilon,
                })
            }
        };
        Ok(Self {
            layer,
            qkv: builder.linear(prefix, &spec.qkv, "qkv")?,
            head_norms,
            attended: builder.buffer("attended", spec.n_heads * head_dim)?,
            output: builder.linear(prefix, &spec.output, "delta")?,
        })
    }

    fn forward(&self, ops: &mut dyn Ops, x: Buffer) -> Buffer {
        let qkv = self.qkv.forward(ops, x);
        ops.rope_append(qkv, self.layer, self.head_norms);
        ops.attention(self.attended, qkv, self.layer);
        let delta = self.output.forward(ops, self.attended);
        ops.all_reduce(delta);
        delta
    }
}

#[derive(Debug)]
enum PreparedMlp {
    Gated {
        gate_up: Linear,
        gated: Buffer,
        down: Linear,
        activation: Activation,
    },
    Experts {
        router: Linear,
        experts: Experts,
        out: Buffer,
    },
}

impl PreparedMlp {
    fn prepare(builder: &mut Builder<'_, '_>, prefix: &str, mlp: &Mlp) -> Result<Self, LoadError> {
        match mlp {
            Mlp::Gated {
                gate_up,
                down,
                activation,
            } => Ok(Self::Gated {
                gate_up: builder.linear(prefix, gate_up, "gate up")?,
                gated: builder.buffer("gated", down.cols)?,
                down: builder.linear(prefix, down, "delta")?,
                activation: *activation,
            }),
            Mlp::Experts {
                router,
                gate_up,
                down,
                top_k,
                renormalize,
                activation,
            } => {
                let shape = ExpertsShape {
                    gate_up: builder.weight(&prefixed(prefix, &gate_up.parts), gate_up.cols)?,
                    down: builder.weight(&prefixed(prefix, &down.parts), down.cols)?,
                    n_experts: router.rows(),
                    top_k: *top_k,
                    renormalize: *renormalize,
                    activation: *activation,
                };
                let experts = builder.device.plan_experts(&shape);
                Ok(Self::Experts {
                    router: builder.linear(prefix, router, "router")?,
                    experts: experts.map_err(LoadError::Device)?,
                    out: builder.buffer("delta", builder.spec.hidden_size)?,
                })
            }
        }
    }

    fn forward(&self, ops: &mut dyn Ops, x: Buffer) -> Buffer {
        let delta = match *self {
            Self::Gated {
                gate_up,
                gated,
                down,
                activation,
            } => {
                let gate_up = gate_up.forward(ops, x);
                ops.gated_activation(gated, gate_up, activation);
                down.forward(ops, gated)
            }
            Self::Experts {
                router,
                experts,
                out,
            } => {
                let router = router.forward(ops, x);
                ops.experts(out, x, router, experts);
                out
            }
        };
        ops.all_reduce(delta);
        delta
    }
}

/// Declares parameters and buffers: takes the one from the files, and plans the other once for each role and width.
struct Builder<'a, 'f> {
    spec: &'a DecoderSpec,
    quantization: Quantization,
    tensors: Tensors<'f>,
    device: &'a mut dyn Device,
    progress: &'a mut dyn FnMut(u64),
    done_bytes: u64,
    buffers: HashMap<(&'static str, usize), Buffer>,
}

impl Builder<'_, '_> {
    /// A matrix of stacked parts, by the full names of their modules, and its rows of each.
    fn weight(&mut self, parts: &[(String, usize)], cols: usize) -> Result<Weight, LoadError> {
        let quantization = self.quantization;
        let parts: Vec<StoredMatrix<'_>> = parts
            .iter()
            .map(|(module, rows)| self.tensors.matrix(module, [*rows, cols], quantization))
            .collect::<Result<_, _>>()?;
        let weight = self.device.prepare_weight(&parts);
        self.count(parts.iter().map(StoredMatrix::bytes).sum());
        weight.map_err(LoadError::Device)
    }

    fn vector(&mut self, parts: &[(String, usize)], offset: f32) -> Result<Vector, LoadError> {
        let parts: Vec<TensorView<'_>> = parts
            .iter()
            .map(|(name, n)| self.tensors.vector(name, *n))
            .collect::<Result<_, _>>()?;
        let vector = self.device.prepare_vector(&parts, offset);
        self.count(parts.iter().map(|part| part.bytes.len()).sum());
        vector.map_err(LoadError::Device)
    }

    fn norm(&mut self, name: &str, n: usize) -> Result<Norm, LoadError> {
        let offset = self.spec.norm_offset;
        Ok(Norm {
            weight: self.vector(&[(format!("{name}.weight"), n)], offset)?,
            epsilon: self.spec.norm_epsilon,
        })
    }

    fn linear(
        &mut self,
        prefix: &str,
        linear: &spec::Linear,
        role: &'static str,
    ) -> Result<Linear, LoadError> {
        let parts = prefixed(prefix, &linear.parts);
        let weight = self.weight(&parts, linear.cols)?;
        let biases = || {
            parts
                .iter()
                .map(|(module, rows)| (format!("{module}.bias"), *rows))
        };
        let bias = match linear.bias {
            true => Some(self.vector(&biases().collect::<Vec<_>>(), 0.0)?),
            false => {
                self.drop_bias_of_zeros(biases());
                None
            }
        };
        Ok(Linear {
            weight,
            bias,
            out: self.buffer(role, linear.rows())?,
        })
    }

    /// Some quantizing tools write a bias of zeros for layers that have none.
    fn drop_bias_of_zeros(&mut self, biases: impl Iterator<Item = (String, usize)>) {
        for (name, _) in biases {
            self.tensors.ignore_zeros(&name);
        }
    }

    /// A buffer `[T, cols]`, the same one for each role and width.
    fn buffer(&mut self, role: &'static str, cols: usize) -> Result<Buffer, LoadError> {
        if let Some(&buffer) = self.buffers.get(&(role, cols)) {
            return Ok(buffer);
        }
        let buffer = self.device.plan_buffer(Rows::Tokens, cols);
        let buffer = buffer.map_err(LoadError::Device)?;
        self.buffers.insert((role, cols), buffer);
        Ok(buffer)
    }

    fn count(&mut self, bytes: usize) {
        self.done_bytes += bytes as u64;
        (self.progress)(self.done_bytes);
    }
}

fn prefixed(prefix: &str, parts: &[(String, usize)]) -> Vec<(String, usize)> {
    let named = parts
        .iter()
        .map(|(name, rows)| (format!("{prefix}{name}"), *rows));
    named.collect()
}
