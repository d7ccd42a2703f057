//! The oracle: every operation as plain loops in f64, one after another on one thread.
//!
//! It rounds nothing but the logits (to f32, where sampling begins) and is read to learn what the operations mean;
//! the other devices are tested against it. It knows no SIMD, no threads, no packing, and it is slow.

use crate::device::{
    AttentionShape, BlockId, Buffer, Device, DeviceConfig, DeviceError, Memory, Ops, Rows,
    StepInput, StepOutput, TensorView, Ticket, Vector, Weight,
};
use crate::sampling::{self, Scratch};
use crate::step::{Finished, Step};

/// The device of the oracle.
#[derive(Debug)]
pub struct ReferenceDevice {
    pass: Pass,
    finished: Finished,
}

impl ReferenceDevice {
    /// A device without weights or cache.
    pub fn new(config: DeviceConfig) -> Self {
        Self {
            pass: Pass {
                step: Step::new(&config),
                config,
                weights: Vec::new(),
                vectors: Vec::new(),
                buffers: Vec::new(),
                keys: Vec::new(),
                values: Vec::new(),
                scratch: Scratch::default(),
                output: StepOutput::default(),
            },
            finished: Finished::default(),
        }
    }
}

#[derive(Debug)]
struct Matrix {
    cols: usize,
    data: Vec<f64>,
}

impl Matrix {
    fn row(&self, r: usize) -> &[f64] {
        &self.data[r * self.cols..][..self.cols]
    }

    fn row_mut(&mut self, r: usize) -> &mut [f64] {
        &mut self.data[r * self.cols..][..self.cols]
    }

    fn n_rows(&self) -> usize {
        self.data.len() / self.cols
    }
}

#[derive(Debug)]
struct Activation {
    rows: Rows,
    matrix: Matrix,
}

/// What the operations work on.
#[derive(Debug)]
struct Pass {
    config: DeviceConfig,
    step: Step,
    weights: Vec<Matrix>,
    vectors: Vec<Vec<f64>>,
    buffers: Vec<Activation>,
    /// `[layer][block][slot][kv head][dim]`, and values likewise.
    keys: Vec<f64>,
    values: Vec<f64>,
    scratch: Scratch,
    output: StepOutput,
}

impl Pass {
    fn n_rows(&self, rows: Rows) -> usize {
        match rows {
            Rows::Tokens => self.step.tokens.len(),
            Rows::Logits => self.step.logits.len(),
        }
    }

    fn matrix(&self, buffer: Buffer) -> &Matrix {
        &self.buffers[buffer.0 as usize].matrix
    }

    /// Replaces the first rows of `out`, computed one by one from everything else.
    fn fill(&mut self, out: Buffer, row: impl Fn(&Self, usize) -> Vec<f64>) {
        for r in 0..self.n_rows(self.buffers[out.0 as usize].rows) {
            let values = row(self, r);
            let matrix = &mut self.buffers[out.0 as usize].matrix;
            assert_eq!(
                values.len(),
                matrix.cols,
                "buffer {} has another width",
                out.0
            );
            matrix.row_mut(r).copy_from_slice(&values);
        }
    }

    /// Index of the first element of a position's key (or value) of one head.
    fn cache_index(&self, layer: usize, token: usize, position: u32, head: usize) -> usize {
        let AttentionShape {
            n_layers,
            n_kv_heads,
            head_dim,
            block_size,
            ..
        } = self.config.attention;
        let (block, slot) = self.step.slot(self.step.rows[token], position);
        let n_blocks = self.keys.len() / (n_layers * block_size * n_kv_heads * head_dim);
        (((layer * n_blocks + block) * block_size + slot) * n_kv_heads + head) * head_dim
    }

    fn copy_block(&mut self, (from, to): (BlockId, BlockId)) {
        self.step.check_copy((from, to));
        let AttentionShape {
            n_layers,
            n_kv_heads,
            head_dim,
            block_size,
            ..
        } = self.config.attention;
        let block = block_size * n_kv_heads * head_dim;
        for cache in [&mut self.keys, &mut self.values] {
            let layer = cache.len() / n_layers;
            for start in (0..n_layers).map(|l| l * layer) {
                let source = start + from.0 as usize * block;
                cache.copy_within(source..source + block, start + to.0 as usize * block);
            }
        }
    }

    /// One head's attention for one token: softmax over the keys at or before its position, then a mean of values.
    fn attend(
        &self,
        query: &[f64],
        layer: usize,
        token: usize,
        kv_head: usize,
        scale: f64,
    ) -> Vec<f64> {
        let positions = 0..=self.step.positions[token];
        let at = |position| self.cache_index(layer, token, position, kv_head);
        let scores: Vec<f64> = positions
            .clone()
            .map(|p| dot(query, &self.keys[at(p)..][..query.len()]) * scale)
            .collect();
        let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = scores.iter().map(|s| (s - max).exp()).sum();
        let mut mean = vec![0.0; query.len()];
        for (p, score) in positions.zip(&scores) {
            let share = (score - max).exp() / sum;
            for (m, v) in mean.iter_mut().zip(&self.values[at(p)..]) {
                *m += share * v;
            }
        }
        mean
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn normed(x: &[f64], weight: &[f64], epsilon: f32) -> Vec<f64> {
    let mean_square = dot(x, x) / x.len() as f64;
    let inverse = 1.0 / (mean_square + f64::from(epsilon)).sqrt();
    x.iter().zip(weight).map(|(x, w)| x * inverse * w).collect()
}

fn rotate(head: &mut [f64], position: u32, inverse_frequencies: &[f32], scale: f32) {
    let half = head.len() / 2;
    for i in 0..half {
        let angle = f64::from(position as f32 * inverse_frequencies[i]);
        let (sin, cos) = (
            angle.sin() * f64::from(scale),
            angle.cos() * f64::from(scale),
        );
        let (a, b) = (head[i], head[i + half]);
        head[i] = a * cos - b * sin;
        head[i + half] = b * cos + a * sin;
    }
}

impl Ops for Pass {
    fn embed(&mut self, out: Buffer, table: Weight) {
        self.fill(out, |pass, t| {
            pass.weights[table.0 as usize]
                .row(pass.step.tokens[t] as usize)
                .to_vec()
        });
    }

    fn rms_norm(&mut self, out: Buffer, x: Buffer, weight: Vector, epsilon: f32) {
        self.fill(out, |pass, r| {
            normed(
                pass.matrix(x).row(r),
                &pass.vectors[weight.0 as usize],
                epsilon,
            )
        });
    }

    fn add_rms_norm(
        &mut self,
        out: Buffer,
        residual: Buffer,
        x: Buffer,
        weight: Vector,
        epsilon: f32,
    ) {
        self.fill(residual, |pass, r| {
            pass.matrix(residual)
                .row(r)
                .iter()
                .zip(pass.matrix(x).row(r))
                .map(|(a, b)| a + b)
                .collect()
        });
        self.rms_norm(out, residual, weight, epsilon);
    }

    fn matmul(&mut self, out: Buffer, x: Buffer, weight: Weight, bias: Option<Vector>) {
        self.fill(out, |pass, r| {
            let matrix = &pass.weights[weight.0 as usize];
            let x = pass.matrix(x).row(r);
            assert_eq!(x.len(), matrix.cols, "matmul of another width");
            let bias = |n| bias.map_or(0.0, |bias| pass.vectors[bias.0 as usize][n]);
            (0..matrix.n_rows())
                .map(|n| dot(x, matrix.row(n)) + bias(n))
                .collect()
        });
    }

    fn rope_append(&mut self, qkv: Buffer, layer: usize) {
        let AttentionShape {
            n_heads,
            n_kv_heads,
            head_dim,
            ..
        } = self.config.attention;
        for t in 0..self.step.tokens.len() {
            let position = self.step.positions[t];
            let (rope, buffer) = (&self.config.rope, &mut self.buffers[qkv.0 as usize]);
            for head in buffer
                .matrix
                .row_mut(t)
                .chunks_mut(head_dim)
                .take(n_heads + n_kv_heads)
            {
                rotate(head, position, &rope.inverse_frequencies, rope.scale);
            }
            let row = self.matrix(qkv).row(t).to_vec();
            let (keys, values) = row[n_heads * head_dim..].split_at(n_kv_heads * head_dim);
            for head in 0..n_kv_heads {
                let at = self.cache_index(layer, t, position, head);
                self.keys[at..][..head_dim].copy_from_slice(&keys[head * head_dim..][..head_dim]);
                self.values[at..][..head_dim]
                    .copy_from_slice(&values[head * head_dim..][..head_dim]);
            }
        }
    }

    fn attention(&mut self, out: Buffer, qkv: Buffer, layer: usize, scale: f32) {
        let AttentionShape {
            n_heads,
            n_kv_heads,
            head_dim,
            ..
        } = self.config.attention;
        self.fill(out, |pass, t| {
            let queries = pass.matrix(qkv).row(t)[..n_heads * head_dim].chunks(head_dim);
            let kv_head = |head| head / (n_heads / n_kv_heads);
            let heads = queries
                .enumerate()
                .map(|(h, q)| pass.attend(q, layer, t, kv_head(h), f64::from(scale)));
            heads.flatten().collect()
        });
    }

    fn swiglu(&mut self, out: Buffer, gate_up: Buffer) {
        self.fill(out, |pass, r| {
            let row = pass.matrix(gate_up).row(r);
            let (gate, up) = row.split_at(row.len() / 2);
            gate.iter()
                .zip(up)
                .map(|(g, u)| g / (1.0 + (-g).exp()) * u)
                .collect()
        });
    }

    fn gather_logits_rows(&mut self, out: Buffer, x: Buffer) {
        self.fill(out, |pass, l| {
            pass.matrix(x)
                .row(pass.step.logits[l].token as usize)
                .to_vec()
        });
    }

    fn all_reduce(&mut self, _x: Buffer) {}

    fn sample(&mut self, logits: Buffer) {
        for l in 0..self.step.logits.len() {
            let row: Vec<f32> = self
                .matrix(logits)
                .row(l)
                .iter()
                .map(|&x| x as f32)
                .collect();
            let sampled = sampling::sample_row(&row, &self.step.logits[l], &mut self.scratch);
            self.output.sampled.push(sampled);
        }
    }
}

impl Device for ReferenceDevice {
    fn describe(&self) -> String {
        "reference: f64, one thread".to_owned()
    }

    fn depth(&self) -> usize {
        1
    }

    fn prepare_weight(&mut self, parts: &[TensorView<'_>]) -> Result<Weight, DeviceError> {
        let cols = parts.first().map_or(0, |part| part.shape[1]);
        assert!(
            parts.iter().all(|part| part.shape[1] == cols),
            "the parts of a weight differ in width"
        );
        self.pass.weights.push(Matrix {
            cols,
            data: widen(parts),
        });
        Ok(Weight(self.pass.weights.len() as u32 - 1))
    }

    fn prepare_vector(&mut self, parts: &[TensorView<'_>]) -> Result<Vector, DeviceError> {
        self.pass.vectors.push(widen(parts));
        Ok(Vector(self.pass.vectors.len() as u32 - 1))
    }

    fn plan_buffer(&mut self, rows: Rows, cols: usize) -> Result<Buffer, DeviceError> {
        let limits = &self.pass.config.limits;
        let n_rows = match rows {
            Rows::Tokens => limits.max_tokens,
            Rows::Logits => limits.max_logits_rows,
        };
        let matrix = Matrix {
            cols,
            data: vec![0.0; n_rows * cols],
        };
        self.pass.buffers.push(Activation { rows, matrix });
        Ok(Buffer(self.pass.buffers.len() as u32 - 1))
    }

    fn memory(&self) -> Memory {
        let bytes = |n: usize| (n * size_of::<f64>()) as u64;
        let weights = self
            .pass
            .weights
            .iter()
            .map(|w| w.data.len())
            .sum::<usize>()
            + self.pass.vectors.iter().map(Vec::len).sum::<usize>();
        let workspace = self.pass.buffers.iter().map(|b| b.matrix.data.len()).sum();
        Memory {
            limit: self.pass.config.memory_limit.unwrap_or(1 << 30),
            weights: bytes(weights),
            workspace: bytes(workspace),
            other: 0,
        }
    }

    fn block_bytes(&self) -> u64 {
        let AttentionShape {
            n_layers,
            n_kv_heads,
            head_dim,
            block_size,
            ..
        } = self.pass.config.attention;
        (2 * n_layers * n_kv_heads * head_dim * block_size * size_of::<f64>()) as u64
    }

    fn allocate_kv(&mut self, n_blocks: u32) -> Result<(), DeviceError> {
        let n = self.block_bytes() as usize / (2 * size_of::<f64>()) * n_blocks as usize;
        // What no step has written must never be read: NaN would show in every result.
        self.pass.keys = vec![f64::NAN; n];
        self.pass.values = vec![f64::NAN; n];
        self.pass.step.set_n_blocks(n_blocks);
        Ok(())
    }

    fn submit(
        &mut self,
        input: &StepInput,
        forward: &mut dyn FnMut(&mut dyn Ops),
    ) -> Result<Ticket, DeviceError> {
        self.finished.assert_collected();
        let pass = &mut self.pass;
        for &copy in &input.copies {
            pass.copy_block(copy);
        }
        pass.step.begin(input);
        pass.output = StepOutput::default();
        forward(pass);
        let output = std::mem::take(&mut pass.output);
        pass.step.end(&output);
        Ok(self.finished.put(output))
    }

    fn collect(&mut self, ticket: Ticket) -> Result<StepOutput, DeviceError> {
        Ok(self.finished.take(ticket))
    }

    fn read(&mut self, buffer: Buffer) -> Result<Vec<f32>, DeviceError> {
        let Activation { rows, matrix } = &self.pass.buffers[buffer.0 as usize];
        Ok(matrix.data[..self.pass.n_rows(*rows) * matrix.cols]
            .iter()
            .map(|&x| x as f32)
            .collect())
    }
}

/// The elements of all parts, one part after another.
fn widen(parts: &[TensorView<'_>]) -> Vec<f64> {
    let elements = parts.iter().map(|part| part.shape[0] * part.shape[1]).sum();
    let mut out = Vec::with_capacity(elements);
    for part in parts {
        assert_eq!(
            part.bytes.len(),
            part.shape[0] * part.shape[1] * part.dtype.bytes(),
            "a tensor of another size"
        );
        out.extend(
            part.bytes
                .chunks_exact(part.dtype.bytes())
                .map(|bytes| f64::from(part.dtype.widen(bytes))),
        );
    }
    out
}

#[cfg(test)]
mod tests;
