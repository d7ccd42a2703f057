//! The Llama family: which tensors it has, and its forward pass over any device.
//!
//! As `LlamaForCausalLM` of Transformers computes it. It knows operations and handles, never requests or blocks.

use kvasir_kernels::device::{Buffer, Device, Ops, Rows, TensorView, Vector, Weight};

use super::LoadError;
use super::config::LlamaConfig;
use super::weights::Tensors;

/// A linear layer; projections that read the same input are stacked into one.
#[derive(Debug)]
struct Linear<W, V> {
    weight: W,
    bias: Option<V>,
}

#[derive(Debug)]
struct Layer<W, V> {
    input_norm: V,
    qkv: Linear<W, V>,
    output: Linear<W, V>,
    mlp_norm: V,
    gate_up: Linear<W, V>,
    down: Linear<W, V>,
}

/// The parameters, as views into files (`W = V = Vec<TensorView>`) or as handles of a device.
#[derive(Debug)]
struct Parameters<W, V> {
    embedding: W,
    layers: Vec<Layer<W, V>>,
    norm: V,
    /// `None` where the embedding is the output matrix too.
    head: Option<W>,
}

type Parts<'f> = Vec<TensorView<'f>>;

/// The parameters in their files, all present and of the right shape.
#[derive(Debug)]
pub struct LlamaWeights<'f>(Parameters<Parts<'f>, Parts<'f>>);

impl<'f> LlamaWeights<'f> {
    /// Takes every tensor that `config` asks for, and refuses others.
    pub fn take(config: &LlamaConfig, mut tensors: Tensors<'f>) -> Result<Self, LoadError> {
        let (hidden, inner) = (config.hidden_size, config.intermediate_size);
        let (q, kv) = (
            config.n_heads * config.head_dim,
            config.n_kv_heads * config.head_dim,
        );
        // Buffers of rotary frequencies in old files, and a copy of the embedding.
        tensors.ignore(|name| {
            name.ends_with(".rotary_emb.inv_freq")
                || (config.tie_word_embeddings && name == "lm_head.weight")
        });
        let embedding =
            vec![tensors.matrix("model.embed_tokens.weight", [config.vocab_size, hidden])?];
        let layers = (0..config.n_layers)
            .map(|i| {
                let mut linear =
                    |module: &str, parts: &[(&str, usize)], cols: usize, biased: bool| {
                        let named = |part: &str, what: &str| {
                            format!("model.layers.{i}.{module}.{part}_proj.{what}")
                        };
                        let weight = parts.iter().map(|&(part, rows)| {
                            tensors.matrix(&named(part, "weight"), [rows, cols])
                        });
                        let weight = weight.collect::<Result<Vec<_>, _>>()?;
                        let bias = || {
                            parts
                                .iter()
                                .map(|&(part, rows)| tensors.vector(&named(part, "bias"), rows))
                                .collect()
                        };
                        Ok(Linear {
                            weight,
                            bias: biased.then(bias).transpose()?,
                        })
                    };
                let (attention, mlp) = ("self_attn", "mlp");
                let qkv = linear(
                    attention,
                    &[("q", q), ("k", kv), ("v", kv)],
                    hidden,
                    config.attention_bias,
                )?;
                let output = linear(attention, &[("o", hidden)], q, config.attention_bias)?;
                let gate_up = linear(
                    mlp,
                    &[("gate", inner), ("up", inner)],
                    hidden,
                    config.mlp_bias,
                )?;
                let down = linear(mlp, &[("down", hidden)], inner, config.mlp_bias)?;
                let mut norm =
                    |name: &str| tensors.vector(&format!("model.layers.{i}.{name}.weight"), hidden);
                Ok(Layer {
                    input_norm: vec![norm("input_layernorm")?],
                    qkv,
                    output,
                    mlp_norm: vec![norm("post_attention_layernorm")?],
                    gate_up,
                    down,
                })
            })
            .collect::<Result<_, LoadError>>()?;
        let norm = vec![tensors.vector("model.norm.weight", hidden)?];
        let head = match config.tie_word_embeddings {
            true => None,
            false => Some(vec![
                tensors.matrix("lm_head.weight", [config.vocab_size, hidden])?,
            ]),
        };
        tensors.finish()?;
        Ok(Self(Parameters {
            embedding,
            layers,
            norm,
            head,
        }))
    }
}

/// Activations: `[T, ..]`, and `[L, ..]` for the last two.
#[derive(Debug)]
struct Buffers {
    residual: Buffer,
    normed: Buffer,
    qkv: Buffer,
    attended: Buffer,
    gate_up: Buffer,
    gated: Buffer,
    delta: Buffer,
    last: Buffer,
    logits: Buffer,
}

/// A model on a device: handles only.
#[derive(Debug)]
pub struct Llama {
    parameters: Parameters<Weight, Vector>,
    buffers: Buffers,
    epsilon: f32,
    attention_scale: f32,
}

impl Llama {
    /// Prepares the weights on `device` and plans the workspace. `progress` hears of the bytes done so far.
    pub fn prepare(
        config: &LlamaConfig,
        weights: &LlamaWeights<'_>,
        device: &mut dyn Device,
        progress: &mut dyn FnMut(u64),
    ) -> Result<Self, LoadError> {
        let mut loader = Loader {
            device,
            progress,
            done: 0,
        };
        let LlamaWeights(files) = weights;
        let embedding = loader.weight(&files.embedding)?;
        let layers = files
            .layers
            .iter()
            .map(|layer| {
                Ok(Layer {
                    input_norm: loader.vector(&layer.input_norm)?,
                    qkv: loader.linear(&layer.qkv)?,
                    output: loader.linear(&layer.output)?,
                    mlp_norm: loader.vector(&layer.mlp_norm)?,
                    gate_up: loader.linear(&layer.gate_up)?,
                    down: loader.linear(&layer.down)?,
                })
            })
            .collect::<Result<_, LoadError>>()?;
        let norm = loader.vector(&files.norm)?;
        let head = files
            .head
            .as_ref()
            .map(|head| loader.weight(head))
            .transpose()?;

        let mut plan = |rows, cols| device.plan_buffer(rows, cols).map_err(LoadError::Device);
        let q = config.n_heads * config.head_dim;
        let buffers = Buffers {
            residual: plan(Rows::Tokens, config.hidden_size)?,
            normed: plan(Rows::Tokens, config.hidden_size)?,
            qkv: plan(Rows::Tokens, q + 2 * config.n_kv_heads * config.head_dim)?,
            attended: plan(Rows::Tokens, q)?,
            gate_up: plan(Rows::Tokens, 2 * config.intermediate_size)?,
            gated: plan(Rows::Tokens, config.intermediate_size)?,
            delta: plan(Rows::Tokens, config.hidden_size)?,
            last: plan(Rows::Logits, config.hidden_size)?,
            logits: device
                .plan_logits(config.vocab_size)
                .map_err(LoadError::Device)?,
        };
        Ok(Self {
            parameters: Parameters {
                embedding,
                layers,
                norm,
                head,
            },
            buffers,
            epsilon: config.rms_norm_epsilon,
            attention_scale: (config.head_dim as f32).powf(-0.5),
        })
    }

    /// The logits of a step, `[L, vocab_size]`, for tests that read them.
    pub fn logits(&self) -> Buffer {
        self.buffers.logits
    }

    /// One step: from the tokens of the batch to what each row of logits drew.
    pub fn forward(&self, ops: &mut dyn Ops) {
        let Buffers {
            residual,
            normed,
            qkv,
            attended,
            gate_up,
            gated,
            delta,
            last,
            logits,
        } = self.buffers;
        let Parameters {
            embedding,
            layers,
            norm,
            head,
        } = &self.parameters;
        let linear = |ops: &mut dyn Ops, out, x, layer: &Linear<Weight, Vector>| {
            ops.matmul(out, x, layer.weight, layer.bias);
        };
        ops.embed(residual, *embedding);
        for (i, layer) in layers.iter().enumerate() {
            match i {
                0 => ops.rms_norm(normed, residual, layer.input_norm, self.epsilon),
                _ => ops.add_rms_norm(normed, residual, delta, layer.input_norm, self.epsilon),
            }
            linear(ops, qkv, normed, &layer.qkv);
            ops.rope_append(qkv, i);
            ops.attention(attended, qkv, i, self.attention_scale);
            linear(ops, delta, attended, &layer.output);
            ops.all_reduce(delta);
            ops.add_rms_norm(normed, residual, delta, layer.mlp_norm, self.epsilon);
            linear(ops, gate_up, normed, &layer.gate_up);
            ops.swiglu(gated, gate_up);
            linear(ops, delta, gated, &layer.down);
            ops.all_reduce(delta);
        }
        ops.add_rms_norm(normed, residual, delta, *norm, self.epsilon);
        ops.gather_logits_rows(last, normed);
        ops.matmul(logits, last, head.unwrap_or(*embedding), None);
        ops.sample(logits);
    }
}

/// Hands parameters to a device, counting their bytes.
struct Loader<'a> {
    device: &'a mut dyn Device,
    progress: &'a mut dyn FnMut(u64),
    done: u64,
}

impl Loader<'_> {
    fn weight(&mut self, parts: &Parts<'_>) -> Result<Weight, LoadError> {
        let weight = self
            .device
            .prepare_weight(parts)
            .map_err(LoadError::Device)?;
        self.count(parts);
        Ok(weight)
    }

    fn vector(&mut self, parts: &Parts<'_>) -> Result<Vector, LoadError> {
        let vector = self
            .device
            .prepare_vector(parts)
            .map_err(LoadError::Device)?;
        self.count(parts);
        Ok(vector)
    }

    fn linear(
        &mut self,
        layer: &Linear<Parts<'_>, Parts<'_>>,
    ) -> Result<Linear<Weight, Vector>, LoadError> {
        let bias = layer
            .bias
            .as_ref()
            .map(|bias| self.vector(bias))
            .transpose()?;
        Ok(Linear {
            weight: self.weight(&layer.weight)?,
            bias,
        })
    }

    fn count(&mut self, parts: &Parts<'_>) {
        self.done += parts
            .iter()
            .map(|part| part.bytes.len() as u64)
            .sum::<u64>();
        (self.progress)(self.done);
    }
}
