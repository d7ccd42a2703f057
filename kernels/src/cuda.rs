//! The CUDA device: weights, workspace, paged KV cache and block tables on a GPU, steps one ahead of the host.
//!
//! Generic over its [`Driver`]: [`gpu::Gpu`] runs the embedded cubins through libcuda and cuBLASLt, both found at run
//! time; [`shim::Shim`] runs the same kernels' source on the CPU. Activations, weights and the cache are bfloat16, sums
//! and logits f32. The pass of a step that only decodes is captured into a graph the second time its shape is seen.
//!
//! Attention, norms, experts and sampling give the same bits in every batch; other products are cuBLASLt's, whose order
//! of sums depends on the number of rows: a crowd is equal to each request alone within their rounding, not to the bit.
//!
//! - [`driver`]: what is needed of a GPU; [`bounds`]: what it may touch; [`counting`]: a driver that only counts.
//! - [`interface`]: what Rust and the kernels' sources have in common; [`kernel`]: the kernels' launches.
//! - `plan`: pure: what of a step goes up, and where it lies. `edits`: the same of edits of logits.
//! - `pass`: the operations of a forward pass as launches.
//! - `buffers`: where everything lies; `model`: what there is once a model; `graphs`: the shapes that came again.
//! - `prepare`: weights and buffers; `submit`: the life of a step.

pub mod bounds;
mod buffers;
pub mod counting;
pub mod driver;
mod edits;
#[cfg(feature = "cuda")]
pub mod gpu;
mod graphs;
pub mod interface;
pub mod kernel;
mod model;
mod pass;
mod plan;
mod prepare;
#[cfg(feature = "cuda-shim")]
pub mod shim;
mod submit;

use std::collections::VecDeque;

use crate::device::{
    Buffer, Device, DeviceError, DeviceOptions, Experts, ExpertsShape, Forward, Logits, Memory,
    Rows, Ticket, Vector, Weight,
};
use crate::shape::{Model, ModelShape};
use crate::step::{DeviceOutput, LogitsRow, StepInput};
use crate::stored::{Dtype, StoredMatrix, TensorView};
use buffers::{DeviceBuffers, PageLayout};
use driver::{DeviceMemory, Driver};
pub use edits::write_edits;
use graphs::Graphs;
use model::ModelState;
pub use plan::sample_row;
use submit::InFlight;

/// Left free for what the driver allocates while it serves: modules, graphs, its own heap.
const RESERVE_BYTES: u64 = 512 << 20;

/// The device. Its driver comes last: what it made ends before it.
pub struct CudaDevice<D: Driver> {
    in_flight: VecDeque<InFlight<D::Event>>,
    graphs: Graphs<D::Graph>,
    models: Vec<ModelState>,
    buffers: DeviceBuffers,
    next_ticket: u64,
    memory_limit: Option<u64>,
    weight_bytes: u64,
    workspace_bytes: u64,
    cache_bytes: u64,
    driver: D,
}

impl<D: Driver> CudaDevice<D> {
    /// A device without models.
    pub fn new(driver: D, options: DeviceOptions) -> Result<Self, DeviceError> {
        model::check_options(&options)?;
        Ok(Self {
            in_flight: VecDeque::with_capacity(2),
            graphs: Graphs::new(),
            models: Vec::new(),
            buffers: DeviceBuffers::default(),
            next_ticket: 0,
            memory_limit: options.memory_limit,
            weight_bytes: 0,
            workspace_bytes: 0,
            cache_bytes: 0,
            driver,
        })
    }

    /// Rows of a matrix on the device, without their padding.
    fn read_rows(
        &mut self,
        address: u64,
        n_rows: usize,
        (cols, stride): (usize, usize),
        dtype: Dtype,
    ) -> Result<Vec<f32>, DeviceError> {
        let row_bytes = stride * dtype.bytes();
        let bytes = n_rows * row_bytes;
        let mut host = self.driver.pinned(bytes.max(16))?;
        self.driver.d2h(&mut host, 0, address, bytes)?;
        let event = self.driver.record()?;
        self.driver.synchronize(event)?;
        let rows = host.bytes()[..bytes].chunks_exact(row_bytes);
        Ok(rows
            .flat_map(|row| row.chunks_exact(dtype.bytes()).take(cols))
            .map(|bytes| dtype.to_f32(bytes))
            .collect())
    }
}

impl<D: Driver> Drop for CudaDevice<D> {
    fn drop(&mut self) {
        // Nothing runs any more when events, graphs and memory end. A device that has failed has nothing to wait for.
        let _ = self.driver.synchronize_all();
        self.in_flight.clear();
        self.graphs.clear();
    }
}

fn unsupported(what: String) -> DeviceError {
    DeviceError::Unsupported {
        device: "cuda",
        what,
    }
}

impl<D: Driver> Device for CudaDevice<D> {
    fn describe(&self) -> String {
        format!("cuda: {}", self.driver.describe())
    }

    fn depth(&self) -> usize {
        2
    }

    fn row_tile(&self) -> usize {
        128
    }

    fn is_batch_invariant(&self) -> bool {
        false
    }

    fn add_model(&mut self, shape: &ModelShape) -> Result<Model, DeviceError> {
        assert_eq!(
            self.cache_bytes, 0,
            "models are added before the KV cache is allocated"
        );
        let model = ModelState::new(&mut self.driver, shape, &mut self.workspace_bytes)?;
        self.models.push(model);
        let shapes = self.models.iter().map(|model| &model.shape);
        self.buffers.cache.layout = PageLayout::of(shapes);
        Ok(self.last_model())
    }

    fn prepare_weight(&mut self, parts: &[StoredMatrix<'_>]) -> Result<Weight, DeviceError> {
        self.upload_weight(parts)
    }

    fn prepare_vector(
        &mut self,
        parts: &[TensorView<'_>],
        offset: f32,
    ) -> Result<Vector, DeviceError> {
        self.upload_vector(parts, offset)
    }

    fn plan_buffer(&mut self, rows: Rows, cols: usize) -> Result<Buffer, DeviceError> {
        self.allocate_activations(rows, cols)
    }

    fn plan_logits(&mut self) -> Result<Logits, DeviceError> {
        self.allocate_logits()
    }

    fn plan_experts(&mut self, shape: &ExpertsShape) -> Result<Experts, DeviceError> {
        self.allocate_experts(shape)
    }

    fn memory(&self) -> Memory {
        // A driver that doesn't answer has failed; the first step says so.
        let found = self
            .driver
            .memory()
            .unwrap_or(DeviceMemory { free: 0, total: 0 });
        let own = self.weight_bytes + self.workspace_bytes + self.cache_bytes;
        let limit = self.memory_limit.unwrap_or(found.total);
        Memory {
            limit: limit.min(found.total),
            weights: self.weight_bytes,
            workspace: self.workspace_bytes,
            other: (found.total - found.free).saturating_sub(own)
                + RESERVE_BYTES.min(found.total / 16),
        }
    }

    fn block_bytes(&self) -> u64 {
        self.buffers.cache.layout.block_bytes()
    }

    fn allocate_kv(&mut self, n_blocks: u32) -> Result<(), DeviceError> {
        let stride = self.buffers.cache.layout.page_stride();
        let head_dims = self.models.iter().flat_map(|m| &m.shape.caches);
        let smallest = head_dims.map(|cache| 2 * cache.head_dim as u64).min();
        let most_rows = smallest.map_or(0, |bytes| u64::from(n_blocks) * stride / bytes);
        if most_rows > u64::from(u32::MAX) {
            return Err(unsupported(format!(
                "a KV cache of {n_blocks} blocks of {stride} bytes; lower --num-gpu-blocks-override"
            )));
        }
        let bytes = u64::from(n_blocks) * self.block_bytes();
        self.buffers.cache.address = self.driver.allocate("the KV cache", bytes as usize)?;
        self.buffers.cache.n_blocks = n_blocks;
        self.cache_bytes = bytes;
        for model in &mut self.models {
            model.step.set_n_blocks(n_blocks);
        }
        Ok(())
    }

    fn submit(&mut self, input: &StepInput, forward: Forward<'_>) -> Result<Ticket, DeviceError> {
        self.start(input, forward)
    }

    fn sample(
        &mut self,
        ticket: &Ticket,
        logits: Logits,
        requests: &[LogitsRow],
    ) -> Result<(), DeviceError> {
        self.start_sampling(ticket, logits, requests)
    }

    fn collect(&mut self, ticket: Ticket) -> Result<DeviceOutput, DeviceError> {
        self.finish(&ticket)
    }

    fn read(&mut self, buffer: Buffer) -> Result<Vec<f32>, DeviceError> {
        let buffer = self.buffers.activations[buffer.0 as usize];
        let n_rows = self.models[model::index(buffer.model)].n_rows(buffer.rows);
        let size = (buffer.cols, buffer.stride);
        self.read_rows(buffer.address, n_rows, size, Dtype::BF16)
    }

    fn read_logits(&mut self, logits: Logits) -> Result<Vec<f32>, DeviceError> {
        let logits = self.buffers.logits[logits.0 as usize];
        let n_rows = self.models[model::index(logits.model)].n_rows(Rows::Logits);
        let size = (logits.cols, logits.stride);
        self.read_rows(logits.address, n_rows, size, Dtype::F32)
    }
}
