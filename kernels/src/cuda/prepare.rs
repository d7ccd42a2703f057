//! Weights on their way to the device, and the workspace of the model that is being built.

use crate::device::{Buffer, DeviceError, Experts, ExpertsShape, Logits, Rows, Vector, Weight};
use crate::shape::Model;
use crate::stored::{Dtype, StoredMatrix, TensorView};

use super::buffers::{
    ActivationBuffer, DeviceVector, ExpertsBuffers, ExpertsSizes, ExpertsWorkspace, LogitsBuffer,
    Matrix,
};
use super::driver::{Driver, FillRow};
use super::kernel::{self, ExpertTile};
use super::plan::bucket_rows;
use super::{CudaDevice, unsupported};

impl<D: Driver> CudaDevice<D> {
    /// The model that is being built.
    pub(super) fn last_model(&self) -> Model {
        let last = self.models.len().checked_sub(1);
        Model(last.expect("a model was added") as u32)
    }

    /// Rows that a buffer of it has at most, padding included.
    fn max_rows(&self, rows: Rows) -> usize {
        let limits = &self.models.last().expect("a model was added").shape.limits;
        bucket_rows(match rows {
            Rows::Tokens => limits.max_tokens,
            Rows::Logits => limits.max_logits_rows,
        })
    }

    fn allocate(&mut self, what: &'static str, bytes: usize) -> Result<u64, DeviceError> {
        let address = self.driver.allocate(what, bytes)?;
        self.workspace_bytes += bytes as u64;
        Ok(address)
    }

    pub(super) fn upload_weight(
        &mut self,
        parts: &[StoredMatrix<'_>],
    ) -> Result<Weight, DeviceError> {
        let cols = parts.first().map_or(0, |part| part.shape()[1]);
        let rows = parts.iter().map(|part| part.shape()[0]).sum();
        let stride = cols.next_multiple_of(8);
        let row_bytes = stride * 2;
        let address = self.driver.allocate("a weight", rows * row_bytes)?;
        let mut to = address;
        for part in parts {
            part.assert_whole();
            assert_eq!(
                part.shape()[1],
                cols,
                "the parts of a weight differ in width"
            );
            let n_rows = part.shape()[0];
            self.driver.upload(to, n_rows, row_bytes, &|r, to| {
                let (values, padding) = to.split_at_mut(cols * 2);
                round_row(part, r, values);
                padding.fill(0);
            })?;
            to += (n_rows * row_bytes) as u64;
        }
        self.weight_bytes += (rows * row_bytes) as u64;
        self.buffers.weights.push(Matrix {
            address,
            rows,
            cols,
            stride,
        });
        Ok(Weight(self.buffers.weights.len() as u32 - 1))
    }

    pub(super) fn upload_vector(
        &mut self,
        parts: &[TensorView<'_>],
        offset: f32,
    ) -> Result<Vector, DeviceError> {
        let len: usize = parts.iter().map(|part| part.shape[1]).sum();
        // Read only where they are written: a driver that counts asks for none.
        let values = || {
            let parts = parts.iter();
            let values = parts.flat_map(|part| (0..part.shape[1]).map(|i| part.at(0, i) + offset));
            values.chain(std::iter::repeat(0.0))
        };
        let mut send = |element_bytes: usize, fill: FillRow<'_>| {
            let bytes = len.next_multiple_of(8) * element_bytes;
            let address = self.driver.allocate("a vector", bytes)?;
            self.driver.upload(address, 1, bytes, fill)?;
            self.weight_bytes += bytes as u64;
            Ok(address)
        };
        let vector = DeviceVector {
            f32: send(4, &|_, to| {
                for (to, value) in to.chunks_exact_mut(4).zip(values()) {
                    to.copy_from_slice(&value.to_le_bytes());
                }
            })?,
            bf16: send(2, &|_, to| {
                for (to, value) in to.chunks_exact_mut(2).zip(values()) {
                    to.copy_from_slice(&half::bf16::from_f32(value).to_le_bytes());
                }
            })?,
            len,
        };
        self.buffers.vectors.push(vector);
        Ok(Vector(self.buffers.vectors.len() as u32 - 1))
    }

    pub(super) fn allocate_activations(
        &mut self,
        rows: Rows,
        cols: usize,
    ) -> Result<Buffer, DeviceError> {
        let stride = cols.next_multiple_of(8);
        let bytes = self.max_rows(rows) * stride * 2;
        let buffer = ActivationBuffer {
            model: self.last_model(),
            address: self.allocate("an activation buffer", bytes)?,
            rows,
            cols,
            stride,
        };
        self.buffers.activations.push(buffer);
        Ok(Buffer(self.buffers.activations.len() as u32 - 1))
    }

    pub(super) fn allocate_logits(&mut self) -> Result<Logits, DeviceError> {
        let model = self.last_model();
        let cols = self.models[super::model::index(model)].shape.vocab_size;
        if cols > kernel::MAX_VOCABULARY as usize {
            return Err(unsupported(format!(
                "a vocabulary of {cols} tokens; {} are",
                kernel::MAX_VOCABULARY
            )));
        }
        let stride = super::model::logits_stride(cols);
        let bytes = self.max_rows(Rows::Logits) * stride * 4;
        let logits = LogitsBuffer {
            model,
            address: self.allocate("the logits", bytes)?,
            cols,
            stride,
        };
        self.buffers.logits.push(logits);
        Ok(Logits(self.buffers.logits.len() as u32 - 1))
    }

    pub(super) fn allocate_experts(
        &mut self,
        shape: &ExpertsShape,
    ) -> Result<Experts, DeviceError> {
        let weights = &self.buffers.weights;
        let gate_up = weights[shape.gate_up.0 as usize];
        let down = weights[shape.down.0 as usize];
        let sizes = ExpertsSizes {
            n_experts: shape.n_experts,
            top_k: shape.top_k,
            hidden: gate_up.cols,
            intermediate: down.cols,
        };
        assert!(
            gate_up.rows == sizes.n_experts * 2 * sizes.intermediate
                && down.rows == sizes.n_experts * sizes.hidden,
            "experts of other shapes"
        );
        if shape.top_k == 0 || shape.top_k > shape.n_experts {
            return Err(unsupported(format!(
                "{} of {} experts for a token",
                shape.top_k, shape.n_experts
            )));
        }
        let model = self.last_model();
        let same = |e: &&ExpertsBuffers| e.model == model && e.shape == sizes;
        let workspace = match self.buffers.experts.iter().find(same) {
            Some(other) => other.workspace,
            None => self.experts_workspace(sizes)?,
        };
        self.buffers.experts.push(ExpertsBuffers {
            model,
            gate_up,
            down,
            shape: sizes,
            renormalize: shape.renormalize,
            activation: shape.activation,
            workspace,
        });
        Ok(Experts(self.buffers.experts.len() as u32 - 1))
    }

    fn experts_workspace(&mut self, sizes: ExpertsSizes) -> Result<ExpertsWorkspace, DeviceError> {
        let n_pairs = self.max_rows(Rows::Tokens) * sizes.top_k;
        let n_tiles = kernel::max_expert_tiles(n_pairs, sizes.n_experts);
        let mut words = |n: usize| self.allocate("the experts' routing", n * 4);
        let (chosen, shares, pairs) = (words(n_pairs)?, words(n_pairs)?, words(n_pairs)?);
        let tiles = words(n_tiles * size_of::<ExpertTile>() / 4)?;
        let n_tiles = words(1)?;
        let mut matrix = |cols: usize| {
            let bytes = n_pairs * cols.next_multiple_of(8) * 2;
            self.allocate("the experts' activations", bytes)
        };
        Ok(ExpertsWorkspace {
            chosen,
            shares,
            pairs,
            tiles,
            n_tiles,
            gate_up: matrix(2 * sizes.intermediate)?,
            activated: matrix(sizes.intermediate)?,
            results: matrix(sizes.hidden)?,
        })
    }
}

/// A row of a stored matrix as bfloat16; `to` has two bytes for each column.
fn round_row(part: &StoredMatrix<'_>, row: usize, to: &mut [u8]) {
    if let Some(view) = part.dense()
        && view.dtype == Dtype::BF16
    {
        return to.copy_from_slice(view.row(row));
    }
    let mut values = vec![0.0; to.len() / 2];
    part.read_row(row, &mut values);
    for (to, value) in to.chunks_exact_mut(2).zip(values) {
        to.copy_from_slice(&half::bf16::from_f32(value).to_le_bytes());
    }
}
