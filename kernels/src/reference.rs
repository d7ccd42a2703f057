//! The oracle: every operation as plain loops in f64, one after another on one thread.
//!
//! It rounds nothing but the logits (to f32, where sampling begins) and is read to learn what the operations mean;
//! the other devices are tested against it. It knows no SIMD, no threads, no packing, and it is slow.

use crate::device::{
    Activation, Buffer, Device, DeviceError, Experts, ExpertsShape, Finished, Forward, HeadNorms,
    Logits, Memory, Ops, Rows, Ticket, Vector, Weight,
};
use crate::sampling::{self, Scratch};
use crate::shape::{CacheId, Capabilities, LayerId, Model, ModelShape, Rope};
use crate::step::{BlockId, DeviceOutput, LogitsRow, Step, StepInput};
use crate::stored::{StoredMatrix, TensorView};

const CAPABILITIES: Capabilities = Capabilities {
    device: "reference",
    head_dims: None,
    block_sizes: (1, usize::MAX),
};

/// The device of the oracle.
#[derive(Debug, Default)]
pub struct ReferenceDevice {
    pass: Pass,
    finished: Finished,
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
struct Activations {
    model: Model,
    rows: Rows,
    matrix: Matrix,
}

#[derive(Debug)]
struct ModelState {
    shape: ModelShape,
    step: Step,
}

/// What the operations work on.
#[derive(Debug, Default)]
struct Pass {
    models: Vec<ModelState>,
    /// Whose step it is.
    current: usize,
    weights: Vec<Matrix>,
    vectors: Vec<Vec<f64>>,
    buffers: Vec<Activations>,
    logits: Vec<Activations>,
    experts: Vec<ExpertsShape>,
    /// `[block][page_elements]`: in a page, cache after cache of its group, `[key or value][slot][kv head][dim]`.
    pages: Vec<f64>,
    page_elements: usize,
    scratch: Scratch,
}

impl Pass {
    fn model(&self) -> &ModelState {
        &self.models[self.current]
    }

    fn step(&self) -> &Step {
        &self.model().step
    }

    fn n_rows(&self, model: Model, rows: Rows) -> usize {
        let step = &self.models[model.0 as usize].step;
        match rows {
            Rows::Tokens => step.tokens.len(),
            Rows::Logits => step.logits.len(),
        }
    }

    fn matrix(&self, buffer: Buffer) -> &Matrix {
        let activations = &self.buffers[buffer.0 as usize];
        assert_eq!(
            activations.model.0 as usize, self.current,
            "a buffer of another model"
        );
        &activations.matrix
    }

    /// Replaces the first rows of `out`, computed one by one from everything else.
    fn fill(&mut self, out: Buffer, row: impl Fn(&Self, usize) -> Vec<f64>) {
        let Activations { model, rows, .. } = self.buffers[out.0 as usize];
        for r in 0..self.n_rows(model, rows) {
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

    /// Index of the first elements of a position's key and value of one head.
    fn cache_index(&self, cache: CacheId, token: usize, position: u32, head: usize) -> [usize; 2] {
        let ModelState { shape, step } = self.model();
        let (group, place) = shape.place_of(cache);
        let cache = shape.caches[cache.0 as usize];
        let (block, slot) = step.slot(group, step.rows[token], position);
        let n = cache.elements_per_token() / 2;
        let of_cache = 2 * n * shape.block_size;
        let key = block * self.page_elements + place * of_cache + slot * n + head * cache.head_dim;
        [key, key + of_cache / 2]
    }

    fn copy_block(&mut self, (from, to): (BlockId, BlockId)) {
        let start = from.0 as usize * self.page_elements;
        self.pages.copy_within(
            start..start + self.page_elements,
            to.0 as usize * self.page_elements,
        );
    }

    /// One head's attention for one token: softmax over the keys that it sees, then a mean of values.
    fn attend(&self, query: &[f64], layer: LayerId, token: usize, kv_head: usize) -> Vec<f64> {
        let shape = &self.model().shape;
        let attention = shape.layers[layer.0 as usize];
        let cache = shape.cache_of(layer);
        let positions = self.step().visible(&cache, token);
        let at = |position| self.cache_index(attention.cache, token, position, kv_head);
        let scores: Vec<f64> = positions
            .clone()
            .map(|p| {
                let score =
                    dot(query, &self.pages[at(p)[0]..][..query.len()]) * f64::from(attention.scale);
                attention.soft_cap.map_or(score, |cap| {
                    f64::from(cap) * (score / f64::from(cap)).tanh()
                })
            })
            .collect();
        let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = scores.iter().map(|s| (s - max).exp()).sum();
        let mut mean = vec![0.0; query.len()];
        for (p, score) in positions.zip(&scores) {
            let share = (score - max).exp() / sum;
            for (m, v) in mean.iter_mut().zip(&self.pages[at(p)[1]..]) {
                *m += share * v;
            }
        }
        mean
    }

    /// One expert's gated MLP for one row.
    fn expert(&self, x: &[f64], shape: &ExpertsShape, expert: usize) -> Vec<f64> {
        let gate_up = &self.weights[shape.gate_up.0 as usize];
        let down = &self.weights[shape.down.0 as usize];
        let inner = down.cols;
        let product = |row: usize| dot(x, gate_up.row(expert * 2 * inner + row));
        let gated: Vec<f64> = (0..inner)
            .map(|i| activated(product(i), shape.activation) * product(inner + i))
            .collect();
        (0..x.len())
            .map(|row| dot(&gated, down.row(expert * x.len() + row)))
            .collect()
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

fn activated(x: f64, activation: Activation) -> f64 {
    match activation {
        Activation::Silu => x / (1.0 + (-x).exp()),
        Activation::GeluTanh => {
            let inner = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3));
            x / 2.0 * (1.0 + inner.tanh())
        }
    }
}

fn rotate(head: &mut [f64], position: u32, rope: &Rope) {
    let half = rope.inverse_frequencies.len();
    let scale = f64::from(rope.scale);
    for (i, frequency) in rope.inverse_frequencies.iter().enumerate() {
        let angle = f64::from(position as f32 * frequency);
        let (sin, cos) = (angle.sin() * scale, angle.cos() * scale);
        let (a, b) = (head[i], head[i + half]);
        head[i] = a * cos - b * sin;
        head[i + half] = b * cos + a * sin;
    }
}

/// The experts that a token takes, with their shares, most likely first; ties go to the lowest index.
fn chosen_experts(router: &[f64], shape: &ExpertsShape) -> Vec<(usize, f64)> {
    let max = router.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = router.iter().map(|x| (x - max).exp()).sum();
    let mut experts: Vec<(usize, f64)> = router
        .iter()
        .map(|x| (x - max).exp() / sum)
        .enumerate()
        .collect();
    experts.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    experts.truncate(shape.top_k);
    if shape.renormalize {
        let sum: f64 = experts.iter().map(|(_, share)| share).sum();
        experts.iter_mut().for_each(|(_, share)| *share /= sum);
    }
    experts
}

impl Ops for Pass {
    fn embed(&mut self, out: Buffer, table: Weight, scale: f32) {
        self.fill(out, |pass, t| {
            let row = pass.weights[table.0 as usize].row(pass.step().tokens[t] as usize);
            row.iter().map(|x| x * f64::from(scale)).collect()
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
            let mut row = pass.product(pass.matrix(x).row(r), weight);
            if let Some(bias) = bias {
                for (sum, bias) in row.iter_mut().zip(&pass.vectors[bias.0 as usize]) {
                    *sum += bias;
                }
            }
            row
        });
    }

    fn rope_append(&mut self, qkv: Buffer, layer: LayerId, norms: Option<HeadNorms>) {
        let shape = &self.model().shape;
        let attention = shape.layers[layer.0 as usize];
        let cache = shape.cache_of(layer);
        let (n_heads, head_dim) = (attention.n_heads, cache.head_dim);
        let rope = attention
            .rope
            .map(|rope| shape.ropes[rope.0 as usize].clone());
        for t in 0..self.step().tokens.len() {
            let position = self.step().positions[t];
            let mut row = self.matrix(qkv).row(t).to_vec();
            let rotated = row.chunks_mut(head_dim).take(n_heads + cache.n_kv_heads);
            for (h, head) in rotated.enumerate() {
                if let Some(norms) = norms {
                    let weight = if h < n_heads { norms.query } else { norms.key };
                    let normed = normed(head, &self.vectors[weight.0 as usize], norms.epsilon);
                    head.copy_from_slice(&normed);
                }
                if let Some(rope) = &rope {
                    rotate(head, position, rope);
                }
            }
            let (keys, values) = row[n_heads * head_dim..].split_at(cache.n_kv_heads * head_dim);
            for head in 0..cache.n_kv_heads {
                let [key, value] = self.cache_index(attention.cache, t, position, head);
                let of_head = head * head_dim..(head + 1) * head_dim;
                self.pages[key..][..head_dim].copy_from_slice(&keys[of_head.clone()]);
                self.pages[value..][..head_dim].copy_from_slice(&values[of_head]);
            }
            self.buffers[qkv.0 as usize]
                .matrix
                .row_mut(t)
                .copy_from_slice(&row);
        }
    }

    fn attention(&mut self, out: Buffer, qkv: Buffer, layer: LayerId) {
        let shape = &self.model().shape;
        let n_heads = shape.layers[layer.0 as usize].n_heads;
        let cache = shape.cache_of(layer);
        self.fill(out, |pass, t| {
            let queries =
                pass.matrix(qkv).row(t)[..n_heads * cache.head_dim].chunks(cache.head_dim);
            let kv_head = |head| head / (n_heads / cache.n_kv_heads);
            let heads = queries
                .enumerate()
                .map(|(h, q)| pass.attend(q, layer, t, kv_head(h)));
            heads.flatten().collect()
        });
    }

    fn gated_activation(&mut self, out: Buffer, gate_up: Buffer, activation: Activation) {
        self.fill(out, |pass, r| {
            let row = pass.matrix(gate_up).row(r);
            let (gate, up) = row.split_at(row.len() / 2);
            gate.iter()
                .zip(up)
                .map(|(g, u)| activated(*g, activation) * u)
                .collect()
        });
    }

    fn experts(&mut self, out: Buffer, x: Buffer, router: Buffer, experts: Experts) {
        let shape = self.experts[experts.0 as usize];
        self.fill(out, |pass, t| {
            let (x, router) = (pass.matrix(x).row(t), pass.matrix(router).row(t));
            assert_eq!(router.len(), shape.n_experts, "a router of another width");
            let mut sum = vec![0.0; x.len()];
            for (expert, share) in chosen_experts(router, &shape) {
                for (sum, y) in sum.iter_mut().zip(pass.expert(x, &shape, expert)) {
                    *sum += share * y;
                }
            }
            sum
        });
    }

    fn gather_logits_rows(&mut self, out: Buffer, x: Buffer) {
        self.fill(out, |pass, l| {
            pass.matrix(x).row(pass.step().logits[l] as usize).to_vec()
        });
    }

    fn logits(&mut self, out: Logits, x: Buffer, weight: Weight) {
        for l in 0..self.step().logits.len() {
            let row = self.product(self.matrix(x).row(l), weight);
            let logits = &mut self.logits[out.0 as usize];
            assert_eq!(
                logits.model.0 as usize, self.current,
                "logits of another model"
            );
            logits.matrix.row_mut(l).copy_from_slice(&row);
        }
    }

    fn all_reduce(&mut self, _x: Buffer) {}
}

impl Pass {
    fn product(&self, x: &[f64], weight: Weight) -> Vec<f64> {
        let matrix = &self.weights[weight.0 as usize];
        assert_eq!(x.len(), matrix.cols, "matmul of another width");
        (0..matrix.n_rows())
            .map(|n| dot(x, matrix.row(n)))
            .collect()
    }

    fn last_model(&self) -> Model {
        Model(self.models.len().checked_sub(1).expect("a model was added") as u32)
    }

    fn activations(&self, rows: Rows, cols: usize) -> Activations {
        let model = self.last_model();
        let limits = &self.models[model.0 as usize].shape.limits;
        let n_rows = match rows {
            Rows::Tokens => limits.max_tokens,
            Rows::Logits => limits.max_logits_rows,
        };
        Activations {
            model,
            rows,
            matrix: Matrix {
                cols,
                data: vec![0.0; n_rows * cols],
            },
        }
    }

    fn read(&self, activations: &Activations) -> Vec<f32> {
        let n_rows = self.n_rows(activations.model, activations.rows);
        let matrix = &activations.matrix;
        matrix.data[..n_rows * matrix.cols]
            .iter()
            .map(|&x| x as f32)
            .collect()
    }
}

impl Device for ReferenceDevice {
    fn describe(&self) -> String {
        "reference: f64, one thread".to_owned()
    }

    fn depth(&self) -> usize {
        1
    }

    fn row_tile(&self) -> usize {
        1
    }

    fn is_batch_invariant(&self) -> bool {
        true
    }

    fn add_model(&mut self, shape: &ModelShape) -> Result<Model, DeviceError> {
        shape.check(&CAPABILITIES)?;
        let pass = &mut self.pass;
        pass.models.push(ModelState {
            shape: shape.clone(),
            step: Step::new(shape),
        });
        pass.page_elements = pass.page_elements.max(shape.page_elements());
        Ok(pass.last_model())
    }

    fn prepare_weight(&mut self, parts: &[StoredMatrix<'_>]) -> Result<Weight, DeviceError> {
        let cols = parts.first().map_or(0, |part| part.shape()[1]);
        let mut data = Vec::new();
        let mut row = vec![0.0; cols];
        for part in parts {
            part.assert_whole();
            assert_eq!(
                part.shape()[1],
                cols,
                "the parts of a weight differ in width"
            );
            for r in 0..part.shape()[0] {
                part.read_row(r, &mut row);
                data.extend(row.iter().map(|&x| f64::from(x)));
            }
        }
        self.pass.weights.push(Matrix { cols, data });
        Ok(Weight(self.pass.weights.len() as u32 - 1))
    }

    fn prepare_vector(
        &mut self,
        parts: &[TensorView<'_>],
        offset: f32,
    ) -> Result<Vector, DeviceError> {
        let elements = parts
            .iter()
            .flat_map(|part| (0..part.shape[1]).map(|i| f64::from(part.at(0, i) + offset)));
        self.pass.vectors.push(elements.collect());
        Ok(Vector(self.pass.vectors.len() as u32 - 1))
    }

    fn plan_buffer(&mut self, rows: Rows, cols: usize) -> Result<Buffer, DeviceError> {
        let activations = self.pass.activations(rows, cols);
        self.pass.buffers.push(activations);
        Ok(Buffer(self.pass.buffers.len() as u32 - 1))
    }

    fn plan_logits(&mut self) -> Result<Logits, DeviceError> {
        let vocab_size = self.pass.models[self.pass.last_model().0 as usize]
            .shape
            .vocab_size;
        let activations = self.pass.activations(Rows::Logits, vocab_size);
        self.pass.logits.push(activations);
        Ok(Logits(self.pass.logits.len() as u32 - 1))
    }

    fn plan_experts(&mut self, shape: &ExpertsShape) -> Result<Experts, DeviceError> {
        self.pass.experts.push(*shape);
        Ok(Experts(self.pass.experts.len() as u32 - 1))
    }

    fn memory(&self) -> Memory {
        let bytes = |n: usize| (n * size_of::<f64>()) as u64;
        let pass = &self.pass;
        let weights = pass.weights.iter().map(|w| w.data.len()).sum::<usize>()
            + pass.vectors.iter().map(Vec::len).sum::<usize>();
        let activations = pass.buffers.iter().chain(&pass.logits);
        Memory {
            limit: 1 << 30,
            weights: bytes(weights),
            workspace: bytes(activations.map(|b| b.matrix.data.len()).sum()),
            other: 0,
        }
    }

    fn block_bytes(&self) -> u64 {
        (self.pass.page_elements * size_of::<f64>()) as u64
    }

    fn allocate_kv(&mut self, n_blocks: u32) -> Result<(), DeviceError> {
        // What no step has written must never be read: NaN would show in every result.
        self.pass.pages = vec![f64::NAN; self.pass.page_elements * n_blocks as usize];
        for model in &mut self.pass.models {
            model.step.set_n_blocks(n_blocks);
        }
        Ok(())
    }

    fn submit(&mut self, input: &StepInput, forward: Forward<'_>) -> Result<Ticket, DeviceError> {
        let ticket = self.finished.begin();
        let pass = &mut self.pass;
        pass.current = input.model.0 as usize;
        pass.models[pass.current].step.begin(input);
        for &copy in &input.copies {
            pass.copy_block(copy);
        }
        forward(pass);
        Ok(ticket)
    }

    fn sample(
        &mut self,
        ticket: &Ticket,
        logits: Logits,
        requests: &[LogitsRow],
    ) -> Result<(), DeviceError> {
        let pass = &mut self.pass;
        pass.models[pass.current].step.check_requests(requests);
        let mut output = DeviceOutput::default();
        for (l, request) in requests.iter().enumerate() {
            let row = pass.logits[logits.0 as usize].matrix.row(l);
            let row: Vec<f32> = row.iter().map(|&x| x as f32).collect();
            let sampled = sampling::sample_row(&row, request, &mut pass.scratch);
            output.sampled.push(sampled);
        }
        pass.models[pass.current].step.end(&output);
        self.finished.put(ticket, output);
        Ok(())
    }

    fn collect(&mut self, ticket: Ticket) -> Result<DeviceOutput, DeviceError> {
        Ok(self.finished.take(ticket))
    }

    fn read(&mut self, buffer: Buffer) -> Result<Vec<f32>, DeviceError> {
        Ok(self.pass.read(&self.pass.buffers[buffer.0 as usize]))
    }

    fn read_logits(&mut self, logits: Logits) -> Result<Vec<f32>, DeviceError> {
        Ok(self.pass.read(&self.pass.logits[logits.0 as usize]))
    }
}

#[cfg(test)]
mod tests;
