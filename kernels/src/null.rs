//! A device without memory: it counts what a model asks for and computes nothing.
//!
//! Building a model on it checks the headers of its files, whatever their size; a forward pass on it checks the width of
//! every buffer; steps on it cost nothing but the host's own work, which is what benchmarks of the engine measure. Every
//! token that it samples is 0.

use crate::device::{
    Activation, Buffer, Device, DeviceError, Experts, ExpertsShape, Finished, Forward, HeadNorms,
    Logits, Memory, Ops, Rows, Ticket, Vector, Weight,
};
use crate::shape::{Capabilities, LayerId, Model, ModelShape};
use crate::step::{DeviceOutput, LogitsRequest, LogitsRow, Sampled, Step, StepInput};
use crate::stored::{StoredMatrix, TensorView};

/// Bytes of an element wherever this device counts: those of bfloat16.
const ELEMENT_BYTES: usize = 2;

const CAPABILITIES: Capabilities = Capabilities {
    device: "null",
    head_dims: None,
    block_sizes: (1, usize::MAX),
};

/// The device.
#[derive(Debug, Default)]
pub struct NullDevice {
    pass: Pass,
    finished: Finished,
}

#[derive(Debug, Default)]
struct Pass {
    models: Vec<(ModelShape, Step)>,
    current: usize,
    /// `[rows, cols]`
    weights: Vec<[usize; 2]>,
    vectors: Vec<usize>,
    /// The rows and columns of each buffer.
    buffers: Vec<(Rows, usize)>,
    logits: Vec<usize>,
    experts: Vec<ExpertsShape>,
}

impl NullDevice {
    /// Elements of all weights and vectors that were prepared: the model's parameters.
    pub fn n_elements(&self) -> u64 {
        let matrices = self.pass.weights.iter().map(|[rows, cols]| rows * cols);
        (matrices.sum::<usize>() + self.pass.vectors.iter().sum::<usize>()) as u64
    }
}

impl Pass {
    fn last_shape(&self) -> &ModelShape {
        &self.models.last().expect("a model was added").0
    }

    fn cols(&self, buffer: Buffer) -> usize {
        self.buffers[buffer.0 as usize].1
    }

    fn weight(&self, weight: Weight) -> [usize; 2] {
        self.weights[weight.0 as usize]
    }

    fn vector(&self, vector: Vector) -> usize {
        self.vectors[vector.0 as usize]
    }

    fn assert_qkv(&self, qkv: Buffer, layer: LayerId) -> usize {
        let shape = &self.models[self.current].0;
        let (n_heads, cache) = (
            shape.layers[layer.0 as usize].n_heads,
            shape.cache_of(layer),
        );
        assert_eq!(
            self.cols(qkv),
            (n_heads + 2 * cache.n_kv_heads) * cache.head_dim,
            "queries, keys and values of other widths"
        );
        n_heads * cache.head_dim
    }
}

impl Ops for Pass {
    fn embed(&mut self, out: Buffer, table: Weight, _scale: f32) {
        let vocab_size = self.models[self.current].0.vocab_size;
        assert_eq!(
            [vocab_size, self.cols(out)],
            self.weight(table),
            "an embedding"
        );
    }

    fn rms_norm(&mut self, out: Buffer, x: Buffer, weight: Vector, _epsilon: f32) {
        assert_eq!(self.cols(out), self.cols(x), "a norm of other widths");
        assert_eq!(self.vector(weight), self.cols(x), "a norm of other widths");
    }

    fn add_rms_norm(
        &mut self,
        out: Buffer,
        residual: Buffer,
        x: Buffer,
        weight: Vector,
        epsilon: f32,
    ) {
        assert_eq!(self.cols(residual), self.cols(x), "a sum of other widths");
        self.rms_norm(out, x, weight, epsilon);
    }

    fn matmul(&mut self, out: Buffer, x: Buffer, weight: Weight, bias: Option<Vector>) {
        assert_eq!(
            [self.cols(out), self.cols(x)],
            self.weight(weight),
            "a product"
        );
        let bias = bias.map_or(self.cols(out), |bias| self.vector(bias));
        assert_eq!(bias, self.cols(out), "a bias of another length");
    }

    fn rope_append(&mut self, qkv: Buffer, layer: LayerId, norms: Option<HeadNorms>) {
        self.assert_qkv(qkv, layer);
        let head_dim = self.models[self.current].0.cache_of(layer).head_dim;
        for norm in norms.into_iter().flat_map(|norms| [norms.query, norms.key]) {
            assert_eq!(
                self.vector(norm),
                head_dim,
                "a norm of heads of another size"
            );
        }
    }

    fn attention(&mut self, out: Buffer, qkv: Buffer, layer: LayerId) {
        let queries = self.assert_qkv(qkv, layer);
        assert_eq!(self.cols(out), queries, "attention of another width");
    }

    fn gated_activation(&mut self, out: Buffer, gate_up: Buffer, _activation: Activation) {
        assert_eq!(
            2 * self.cols(out),
            self.cols(gate_up),
            "gate and up of other widths"
        );
    }

    fn experts(&mut self, out: Buffer, x: Buffer, router: Buffer, experts: Experts) {
        let shape = self.experts[experts.0 as usize];
        let ([rows, hidden], [outs, inner]) = (self.weight(shape.gate_up), self.weight(shape.down));
        let n = shape.n_experts;
        assert_eq!(
            [rows, outs],
            [n * 2 * inner, n * hidden],
            "experts' weights"
        );
        assert_eq!(
            [self.cols(x), self.cols(out)],
            [hidden; 2],
            "experts of other widths"
        );
        assert_eq!(self.cols(router), n, "a router of another width");
    }

    fn gather_logits_rows(&mut self, out: Buffer, x: Buffer) {
        assert_eq!(self.cols(out), self.cols(x), "rows of another width");
    }

    fn logits(&mut self, out: Logits, x: Buffer, weight: Weight) {
        let vocab_size = self.logits[out.0 as usize];
        assert_eq!([vocab_size, self.cols(x)], self.weight(weight), "logits");
    }

    fn all_reduce(&mut self, _x: Buffer) {}
}

impl Device for NullDevice {
    fn describe(&self) -> String {
        "null: computes nothing".to_owned()
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
        self.pass.models.push((shape.clone(), Step::new(shape)));
        Ok(Model(self.pass.models.len() as u32 - 1))
    }

    fn prepare_weight(&mut self, parts: &[StoredMatrix<'_>]) -> Result<Weight, DeviceError> {
        let cols = parts.first().map_or(0, |part| part.shape()[1]);
        assert!(
            parts.iter().all(|part| part.shape()[1] == cols),
            "the parts of a weight differ in width"
        );
        let rows = parts.iter().map(|part| part.shape()[0]).sum();
        self.pass.weights.push([rows, cols]);
        Ok(Weight(self.pass.weights.len() as u32 - 1))
    }

    fn prepare_vector(
        &mut self,
        parts: &[TensorView<'_>],
        _offset: f32,
    ) -> Result<Vector, DeviceError> {
        let n = parts.iter().map(|part| part.shape[1]).sum();
        self.pass.vectors.push(n);
        Ok(Vector(self.pass.vectors.len() as u32 - 1))
    }

    fn plan_buffer(&mut self, rows: Rows, cols: usize) -> Result<Buffer, DeviceError> {
        self.pass.buffers.push((rows, cols));
        Ok(Buffer(self.pass.buffers.len() as u32 - 1))
    }

    fn plan_logits(&mut self) -> Result<Logits, DeviceError> {
        let vocab_size = self.pass.last_shape().vocab_size;
        self.pass.logits.push(vocab_size);
        Ok(Logits(self.pass.logits.len() as u32 - 1))
    }

    fn plan_experts(&mut self, shape: &ExpertsShape) -> Result<Experts, DeviceError> {
        self.pass.experts.push(*shape);
        Ok(Experts(self.pass.experts.len() as u32 - 1))
    }

    fn memory(&self) -> Memory {
        Memory {
            limit: u64::MAX / 2,
            weights: self.n_elements() * ELEMENT_BYTES as u64,
            workspace: 0,
            other: 0,
        }
    }

    fn block_bytes(&self) -> u64 {
        let pages = self
            .pass
            .models
            .iter()
            .map(|(shape, _)| shape.page_elements());
        (pages.max().unwrap_or(0) * ELEMENT_BYTES) as u64
    }

    fn allocate_kv(&mut self, n_blocks: u32) -> Result<(), DeviceError> {
        for (_, step) in &mut self.pass.models {
            step.set_n_blocks(n_blocks);
        }
        Ok(())
    }

    fn submit(&mut self, input: &StepInput, forward: Forward<'_>) -> Result<Ticket, DeviceError> {
        let ticket = self.finished.begin();
        self.pass.current = input.model.0 as usize;
        self.pass.models[self.pass.current].1.begin(input);
        forward(&mut self.pass);
        Ok(ticket)
    }

    fn sample(
        &mut self,
        ticket: &Ticket,
        _logits: Logits,
        requests: &[LogitsRow],
    ) -> Result<(), DeviceError> {
        let step = &mut self.pass.models[self.pass.current].1;
        step.check_requests(requests);
        let sampled = requests.iter().map(|row| Sampled {
            token: match row.request {
                LogitsRequest::Sample { .. } => 0,
                LogitsRequest::Score { token } => token,
            },
            logprob: row.n_logprobs.map(|_| 0.0),
            top: (0..u32::from(row.n_logprobs.unwrap_or(0)))
                .map(|id| (id, 0.0))
                .collect(),
        });
        let output = DeviceOutput {
            sampled: sampled.collect(),
        };
        step.end(&output);
        self.finished.put(ticket, output);
        Ok(())
    }

    fn collect(&mut self, ticket: Ticket) -> Result<DeviceOutput, DeviceError> {
        Ok(self.finished.take(ticket))
    }

    fn read(&mut self, buffer: Buffer) -> Result<Vec<f32>, DeviceError> {
        let (rows, cols) = self.pass.buffers[buffer.0 as usize];
        let step = &self.pass.models[self.pass.current].1;
        let n_rows = match rows {
            Rows::Tokens => step.tokens.len(),
            Rows::Logits => step.logits.len(),
        };
        Ok(vec![0.0; n_rows * cols])
    }

    fn read_logits(&mut self, logits: Logits) -> Result<Vec<f32>, DeviceError> {
        let n_rows = self.pass.models[self.pass.current].1.logits.len();
        Ok(vec![0.0; n_rows * self.pass.logits[logits.0 as usize]])
    }
}
