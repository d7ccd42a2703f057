//! Two small transformer layers and a head: what the tests of each device drive through the contract.
//!
//! The layers differ where a shape asks for it: the second may see a window only, so that the model has two cache groups.

// Each test uses a part of it.
#![allow(dead_code, clippy::unwrap_used)]

#[path = "forward.rs"]
mod forward;

use std::num::NonZeroU32;

use forward::{Buffers, Decoder, LayerWeights, Mlp, Widths};
use kvasir_kernels::device::*;
use kvasir_kernels::shape::*;
use kvasir_kernels::step::*;
use kvasir_kernels::stored::*;

pub(crate) const VOCABULARY: usize = 37;
/// Positions that a test may use.
pub(crate) const MAX_POSITIONS: usize = 700;
/// Sequences that a test may use.
pub(crate) const MAX_SEQUENCES: usize = 8;

/// Experts in place of a dense MLP.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Routing {
    pub(crate) n_experts: usize,
    pub(crate) top_k: usize,
    pub(crate) renormalize: bool,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    pub(crate) n_heads: usize,
    pub(crate) n_kv_heads: usize,
    pub(crate) head_dim: usize,
    pub(crate) hidden: usize,
    pub(crate) intermediate: usize,
    pub(crate) block_size: usize,
    /// Of the second layer.
    pub(crate) window: Option<u32>,
    pub(crate) soft_cap: Option<f32>,
    /// Norms of query and key heads.
    pub(crate) head_norms: bool,
    /// Rotary frequencies, at most half of `head_dim`.
    pub(crate) n_frequencies: usize,
    pub(crate) routing: Option<Routing>,
    pub(crate) activation: Activation,
}

impl Shape {
    /// What a Llama needs and no more: heads, KV heads, elements of a head, hidden and intermediate size, block size.
    pub(crate) const fn llama(sizes: [usize; 6]) -> Self {
        let [
            n_heads,
            n_kv_heads,
            head_dim,
            hidden,
            intermediate,
            block_size,
        ] = sizes;
        Self {
            n_heads,
            n_kv_heads,
            head_dim,
            hidden,
            intermediate,
            block_size,
            window: None,
            soft_cap: None,
            head_norms: false,
            n_frequencies: head_dim / 2,
            routing: None,
            activation: Activation::Silu,
        }
    }

    pub(crate) fn model_shape(&self) -> ModelShape {
        let full = CacheShape {
            n_kv_heads: self.n_kv_heads,
            head_dim: self.head_dim,
            window: None,
        };
        let window = self.window.and_then(NonZeroU32::new);
        let caches = vec![full, CacheShape { window, ..full }];
        let layer = |cache| AttentionShape {
            cache: CacheId(cache),
            n_heads: self.n_heads,
            // The second layer has its own base.
            rope: Some(RopeId(cache)),
            scale: 1.0 / (self.head_dim as f32).sqrt(),
            soft_cap: self.soft_cap,
        };
        let rope = |base: f32, scale| Rope {
            inverse_frequencies: (0..self.n_frequencies)
                .map(|i| base.powi(i as i32))
                .collect(),
            scale,
        };
        ModelShape {
            vocab_size: VOCABULARY,
            max_positions: MAX_POSITIONS,
            block_size: self.block_size,
            limits: Limits {
                max_tokens: 640,
                max_sequences: MAX_SEQUENCES,
                max_logits_rows: 8,
                max_blocks_per_sequence: MAX_POSITIONS.div_ceil(self.block_size),
            },
            ropes: vec![rope(0.7, 1.0), rope(0.6, 1.1)],
            groups: cache_groups(&caches),
            caches,
            layers: vec![layer(0), layer(1)],
        }
    }
}

/// Random numbers of variance `1 / fan_in`, so that no product grows, rounded to bf16, so that every device sees the
/// same weights.
pub(crate) fn tensor(seed: u32, n: usize, fan_in: usize) -> Vec<u8> {
    let scale = (3.0 / fan_in as f32).sqrt();
    let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(99);
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / 8_388_608.0 - 1.0
    };
    (0..n)
        .flat_map(|_| half::bf16::from_f32(next() * scale).to_le_bytes())
        .collect()
}

/// Two transformer layers of the same weights, and a head: handles only, so that several may live on one device.
#[derive(Clone, Copy)]
pub(crate) struct Layers {
    pub(crate) model: Model,
    table: Weight,
    norm: Vector,
    head_norms: Option<HeadNorms>,
    weights: LayerWeights,
    activation: Activation,
    buffers: Buffers,
    pub(crate) logits: Logits,
    pub(crate) block_size: usize,
    pub(crate) n_groups: usize,
}

impl Layers {
    /// Adds them to a device; models of different `seed` have different weights.
    pub(crate) fn add(device: &mut dyn Device, shape: &Shape, seed: u32) -> Self {
        let Shape {
            n_heads,
            n_kv_heads,
            head_dim,
            hidden,
            intermediate,
            ..
        } = *shape;
        let model_shape = shape.model_shape();
        let n_groups = model_shape.groups.len();
        let model = device.add_model(&model_shape).unwrap();
        let widths = Widths {
            hidden,
            n_heads,
            n_kv_heads,
            head_dim,
            intermediate,
            n_experts: shape.routing.map_or(1, |routing| routing.n_experts),
        };
        let mut weight = |which: u32, rows: usize, cols: usize| {
            // Two parts, stacked, as a model's fused weights are.
            let bytes = tensor(seed * 100 + which, rows * cols, cols);
            let (first, second) = bytes.split_at(rows / 2 * cols * 2);
            let part = |bytes, rows| {
                StoredMatrix::from(TensorView {
                    dtype: Dtype::BF16,
                    shape: [rows, cols],
                    bytes,
                })
            };
            device
                .prepare_weight(&[part(first, rows / 2), part(second, rows - rows / 2)])
                .unwrap()
        };
        let table = weight(1, VOCABULARY, hidden);
        let qkv = weight(2, widths.qkv(), hidden);
        let o = weight(3, hidden, widths.heads());
        let gate_up = weight(4, widths.n_experts * 2 * intermediate, hidden);
        let down = weight(5, widths.n_experts * hidden, intermediate);
        let mlp = match shape.routing {
            None => Mlp::Dense { gate_up, down },
            Some(routing) => Mlp::Experts {
                router: weight(10, routing.n_experts, hidden),
                experts: device
                    .plan_experts(&ExpertsShape {
                        gate_up,
                        down,
                        n_experts: routing.n_experts,
                        top_k: routing.top_k,
                        renormalize: routing.renormalize,
                        activation: shape.activation,
                    })
                    .unwrap(),
            },
        };
        let mut vector = |which: u32, n, offset| {
            let bytes = tensor(seed * 100 + which, n, 1);
            let view = TensorView {
                dtype: Dtype::BF16,
                shape: [1, n],
                bytes: &bytes,
            };
            device.prepare_vector(&[view], offset).unwrap()
        };
        let (norm, bias) = (vector(6, hidden, 0.0), vector(7, widths.qkv(), 0.0));
        let head_norms = shape.head_norms.then(|| HeadNorms {
            query: vector(8, head_dim, 1.0),
            key: vector(9, head_dim, 1.0),
            epsilon: 1e-6,
        });
        let buffers = Buffers::plan(device, widths).unwrap();
        Self {
            model,
            table,
            norm,
            head_norms,
            weights: LayerWeights {
                qkv,
                bias: Some(bias),
                o,
                mlp,
            },
            activation: shape.activation,
            buffers,
            logits: device.plan_logits().unwrap(),
            block_size: shape.block_size,
            n_groups,
        }
    }

    pub(crate) fn forward(&self, ops: &mut dyn Ops) {
        let decoder = Decoder {
            table: self.table,
            embedding_scale: 1.25,
            norm: self.norm,
            head_norms: self.head_norms,
            activation: self.activation,
            layers: &[self.weights; 2],
            buffers: self.buffers,
            logits: self.logits,
        };
        decoder.forward(ops);
    }

    /// Runs a step on its device and gives the logits of its rows.
    pub(crate) fn step(&self, device: &mut dyn Device, input: &StepInput) -> Vec<Vec<f32>> {
        let ticket = self.submit(device, input);
        let output = device.collect(ticket).unwrap();
        assert_eq!(output.sampled.len(), input.logits.len());
        let all = device.read_logits(self.logits).unwrap();
        all.chunks(VOCABULARY).map(<[f32]>::to_vec).collect()
    }

    /// Starts a step and scores token 0 in each row of logits.
    pub(crate) fn submit(&self, device: &mut dyn Device, input: &StepInput) -> Ticket {
        let input = StepInput {
            model: self.model,
            ..input.clone()
        };
        let ticket = device.submit(&input, &|ops| self.forward(ops)).unwrap();
        let score = LogitsRow {
            request: LogitsRequest::Score { token: 0 },
            n_logprobs: Some(2),
        };
        let requests = vec![score; input.logits.len()];
        device.sample(&ticket, self.logits, &requests).unwrap();
        ticket
    }

    /// Blocks of a cache that holds all sequences of this model.
    pub(crate) fn n_blocks(&self) -> u32 {
        let per_sequence = MAX_POSITIONS.div_ceil(self.block_size);
        (per_sequence * MAX_SEQUENCES * self.n_groups) as u32
    }
}

/// The layers alone on a device, with room for all sequences.
pub(crate) struct TestModel {
    pub(crate) device: Box<dyn Device>,
    pub(crate) layers: Layers,
}

impl TestModel {
    pub(crate) fn new(mut device: Box<dyn Device>, shape: &Shape) -> Self {
        let layers = Layers::add(&mut *device, shape, 0);
        device.allocate_kv(layers.n_blocks()).unwrap();
        Self { device, layers }
    }

    /// Runs a step over parts of sequences and gives the logits of each part's last token.
    pub(crate) fn step(&mut self, parts: &[Part]) -> Vec<Vec<f32>> {
        let input = self.layers.input(parts);
        self.layers.step(&mut *self.device, &input)
    }
}

/// A part of a sequence in a step: which sequence, which of its positions.
pub(crate) type Part = (u32, std::ops::Range<u32>);

impl Layers {
    /// A step over parts of sequences; the logits of each part's last token are wanted. Blocks interleave the sequences
    /// and the groups; what is behind a window keeps its entry, which nothing may read.
    pub(crate) fn input(&self, parts: &[Part]) -> StepInput {
        let mut input = StepInput::default();
        let n_groups = self.n_groups as u32;
        for (sequence, positions) in parts {
            let n = (positions.end as usize).div_ceil(self.block_size) as u32;
            let block =
                |i, group| BlockId((i * MAX_SEQUENCES as u32 + sequence) * n_groups + group);
            for group in 0..n_groups {
                input.table_updates.push(TableUpdate {
                    group,
                    row: TableRow(*sequence),
                    first: 0,
                    blocks: (0..n).map(|i| block(i, group)).collect(),
                });
            }
            input.spans.push(Span {
                row: TableRow(*sequence),
                first_token: input.tokens.len() as u32,
                n_tokens: positions.len() as u32,
                first_position: positions.start,
            });
            let token =
                |p: u32| TokenInput::Id((p * 31 + sequence * 17 + p * p) % VOCABULARY as u32);
            input.tokens.extend(positions.clone().map(token));
            if !positions.is_empty() {
                input.logits.push(input.tokens.len() as u32 - 1);
            }
        }
        input
    }
}
