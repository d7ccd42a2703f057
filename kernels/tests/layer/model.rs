//! A small transformer layer, run twice, with a head: what the tests of each device drive through the contract.

// Each test uses a part of it.
#![allow(dead_code, clippy::unwrap_used)]

use kvasir_kernels::device::*;

pub(crate) const VOCABULARY: usize = 37;
pub(crate) const MAX_BLOCKS: usize = 48;

#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    pub(crate) n_heads: usize,
    pub(crate) n_kv_heads: usize,
    pub(crate) head_dim: usize,
    pub(crate) hidden: usize,
    pub(crate) intermediate: usize,
    pub(crate) block_size: usize,
}

pub(crate) fn config(shape: Shape, precision: Precision) -> DeviceConfig {
    let Shape {
        n_heads,
        n_kv_heads,
        head_dim,
        block_size,
        ..
    } = shape;
    let max_blocks_per_sequence = 700usize.div_ceil(block_size);
    DeviceConfig {
        attention: AttentionShape {
            n_layers: 2,
            n_heads,
            n_kv_heads,
            head_dim,
            block_size,
        },
        limits: Limits {
            max_tokens: 640,
            max_sequences: 8,
            max_logits_rows: 8,
            max_blocks_per_sequence,
        },
        rope: Rope {
            inverse_frequencies: (0..head_dim / 2).map(|i| 0.7f32.powi(i as i32)).collect(),
            scale: 1.0,
            max_positions: 700,
        },
        precision,
        memory_limit: None,
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

/// One transformer layer run twice (two layers of cache, the same weights), and a head.
pub(crate) struct Model {
    pub(crate) device: Box<dyn Device>,
    table: Weight,
    norm: Vector,
    qkv: (Weight, Vector),
    o: Weight,
    gate_up: Weight,
    down: Weight,
    buffers: [Buffer; 9],
    pub(crate) block_size: usize,
    scale: f32,
}

impl Model {
    pub(crate) fn new(mut device: Box<dyn Device>, shape: Shape) -> Self {
        let Shape {
            n_heads,
            n_kv_heads,
            head_dim,
            hidden,
            intermediate,
            block_size,
        } = shape;
        let qkv_width = (n_heads + 2 * n_kv_heads) * head_dim;
        let mut weight = |seed, rows: usize, cols: usize| {
            // Two parts, stacked, as a model's fused weights are.
            let bytes = tensor(seed, rows * cols, cols);
            let (first, second) = bytes.split_at(rows / 2 * cols * 2);
            let part = |bytes, rows| TensorView {
                dtype: Dtype::BF16,
                shape: [rows, cols],
                bytes,
            };
            device
                .prepare_weight(&[part(first, rows / 2), part(second, rows - rows / 2)])
                .unwrap()
        };
        let table = weight(1, VOCABULARY, hidden);
        let qkv = weight(2, qkv_width, hidden);
        let o = weight(3, hidden, n_heads * head_dim);
        let gate_up = weight(4, 2 * intermediate, hidden);
        let down = weight(5, hidden, intermediate);
        let mut vector = |seed, n| {
            let bytes = tensor(seed, n, 1);
            device
                .prepare_vector(&[TensorView {
                    dtype: Dtype::BF16,
                    shape: [1, n],
                    bytes: &bytes,
                }])
                .unwrap()
        };
        let (norm, bias) = (vector(6, hidden), vector(7, qkv_width));
        let tokens = [
            hidden,
            hidden,
            qkv_width,
            n_heads * head_dim,
            hidden,
            2 * intermediate,
            intermediate,
        ];
        let mut buffers: Vec<Buffer> = tokens
            .into_iter()
            .map(|cols| device.plan_buffer(Rows::Tokens, cols).unwrap())
            .collect();
        buffers.push(device.plan_buffer(Rows::Logits, hidden).unwrap());
        buffers.push(device.plan_logits(VOCABULARY).unwrap());
        device
            .allocate_kv((MAX_BLOCKS * 16usize.div_ceil(block_size).max(1) * 4) as u32)
            .unwrap();
        let buffers = buffers.try_into().unwrap();
        let scale = 1.0 / (head_dim as f32).sqrt();
        Self {
            device,
            table,
            norm,
            qkv: (qkv, bias),
            o,
            gate_up,
            down,
            buffers,
            block_size,
            scale,
        }
    }

    /// Runs a step and gives the logits of its rows.
    pub(crate) fn step(&mut self, input: &StepInput) -> Vec<Vec<f32>> {
        let ticket = self.submit(input);
        let output = self.device.collect(ticket).unwrap();
        assert_eq!(output.sampled.len(), input.logits.len());
        let all = self.device.read(self.buffers[8]).unwrap();
        all.chunks(VOCABULARY).map(<[f32]>::to_vec).collect()
    }

    /// Starts a step.
    pub(crate) fn submit(&mut self, input: &StepInput) -> Ticket {
        let [
            x,
            normed,
            qkv,
            mixed,
            delta,
            gate_up,
            activated,
            last,
            logits,
        ] = self.buffers;
        let (table, norm, o, gate_up_weight, down) =
            (self.table, self.norm, self.o, self.gate_up, self.down);
        let ((qkv_weight, bias), scale) = (self.qkv, self.scale);
        self.device
            .submit(input, &mut |ops| {
                ops.embed(x, table);
                ops.rms_norm(normed, x, norm, 1e-5);
                for layer in 0..2 {
                    ops.matmul(qkv, normed, qkv_weight, Some(bias));
                    ops.rope_append(qkv, layer);
                    ops.attention(mixed, qkv, layer, scale);
                    ops.matmul(delta, mixed, o, None);
                    ops.add_rms_norm(normed, x, delta, norm, 1e-5);
                    ops.matmul(gate_up, normed, gate_up_weight, None);
                    ops.swiglu(activated, gate_up);
                    ops.matmul(delta, activated, down, None);
                    ops.add_rms_norm(normed, x, delta, norm, 1e-5);
                }
                ops.gather_logits_rows(last, normed);
                ops.matmul(logits, last, table, None);
                ops.sample(logits);
            })
            .unwrap()
    }
}

/// A part of a sequence in a step: which sequence, which of its positions.
pub(crate) type Part = (u32, std::ops::Range<u32>);

/// A step over parts of sequences; the logits of each part's last token are wanted. Blocks interleave the sequences.
pub(crate) fn step_of(parts: &[Part], block_size: usize, n_blocks: u32) -> StepInput {
    let mut input = StepInput::default();
    for (sequence, positions) in parts {
        let n = (positions.end as usize).div_ceil(block_size) as u32;
        let blocks = (0..n)
            .map(|i| BlockId((i * 5 + sequence) % n_blocks))
            .collect();
        input.table_updates.push(TableUpdate {
            row: TableRow(*sequence),
            first: 0,
            blocks,
        });
        input.spans.push(Span {
            row: TableRow(*sequence),
            first_token: input.tokens.len() as u32,
            n_tokens: positions.len() as u32,
            first_position: positions.start,
        });
        let token = |p: u32| TokenInput::Id((p * 31 + sequence * 17 + p * p) % VOCABULARY as u32);
        input.tokens.extend(positions.clone().map(token));
        if !positions.is_empty() {
            let token = input.tokens.len() as u32 - 1;
            input.logits.push(LogitsRow {
                token,
                want: LogitsWant::Score { token: 0 },
                n_logprobs: Some(2),
            });
        }
    }
    input
}

pub(crate) fn n_blocks(model: &Model) -> u32 {
    (MAX_BLOCKS * 16usize.div_ceil(model.block_size).max(1) * 4) as u32
}
