//! The CPU device: AVX-512 bf16 (with AMX where there is), AVX2 or portable code, chosen at run time, on its own
//! threads.
//!
//! Activations are f32 in their buffers and are rounded to the weights' precision where they are multiplied; sums are
//! f32. A step runs when it is submitted: the depth is 1. This file owns the device's state and plans its memory;
//! operations, products, attention, experts, the cache's layout and the kernels have files of their own.

mod attention;
mod experts;
mod gemm;
mod handles;
mod kv_cache;
mod limit;
mod mapping;
mod model;
mod ops;
mod pool;
mod rows;
mod simd;
mod tile;
mod weights;

use crate::device::{
    Buffer, Device, DeviceError, DeviceOptions, Experts, ExpertsShape, Finished, Forward, Logits,
    Memory, Rows, Ticket, Vector, Weight,
};
use crate::sampling;
use crate::shape::{Capabilities, Model, ModelShape, Numerics};
use crate::step::{DeviceOutput, LogitsRow, StepInput};
use crate::stored::{StoredMatrix, TensorView};
use attention::Scratch;
use experts::{ExpertsPlan, ExpertsWorkspace};
use gemm::PackedActivations;
use handles::HandleTable;
use kv_cache::KvCache;
use model::ModelState;
use pool::Pool;
use rows::{ActivationBuffer, RowsView};
use simd::SimdOps;
use std::num::NonZeroUsize;
use std::sync::Mutex;
pub use tile::Isa;
use weights::PackedWeight;

/// What the process itself is left beside weights, workspace and cache: its heap grows while it serves.
const RESERVE_BYTES: u64 = 64 << 20;

const CAPABILITIES: Capabilities = Capabilities {
    device: "cpu",
    head_dims: None,
    block_sizes: (1, 1024),
};

/// The device.
pub struct CpuDevice {
    state: CpuState,
    memory_limit: u64,
    /// It holds no memory and computes nothing: what a model needs is counted.
    counts_only: bool,
    finished: Finished,
}

/// What the operations work on.
struct CpuState {
    numerics: Numerics,
    isa: Isa,
    simd: &'static SimdOps,
    pool: Pool,
    models: Vec<ModelState>,
    /// Whose step it is.
    current: Model,
    weights: HandleTable<PackedWeight>,
    vectors: HandleTable<Vec<f32>>,
    buffers: HandleTable<ActivationBuffer>,
    logits: HandleTable<ActivationBuffer>,
    experts: HandleTable<ExpertsShape>,
    experts_plan: ExpertsPlan,
    /// Once the models are built.
    allocated: Option<Allocated>,
}

/// The KV cache, and workspace that all models share.
struct Allocated {
    cache: KvCache,
    packed: PackedActivations,
    scratch: Scratch,
    experts: ExpertsWorkspace,
    /// For each thread.
    sampling: Vec<Mutex<sampling::Scratch>>,
}

impl CpuDevice {
    /// A device on `n_threads` threads (the caller's among them) with the best instruction set of this machine.
    pub fn new(options: DeviceOptions, n_threads: NonZeroUsize) -> Result<Self, DeviceError> {
        let isa = Isa::available(options.numerics)[0];
        Self::with_isa(options, n_threads, isa)
    }

    /// A device that prepares nothing and counts, by the same arithmetic, what preparing would take: with the memory that
    /// the options give where they do, whatever this machine has.
    pub fn counting(options: DeviceOptions, n_threads: NonZeroUsize) -> Result<Self, DeviceError> {
        let device = Self::new(options, n_threads)?;
        Ok(Self {
            memory_limit: options.memory_limit.unwrap_or(device.memory_limit),
            counts_only: true,
            ..device
        })
    }

    /// A device that uses a given instruction set, which must be one of [`Isa::available`].
    pub fn with_isa(
        options: DeviceOptions,
        n_threads: NonZeroUsize,
        isa: Isa,
    ) -> Result<Self, DeviceError> {
        let numerics = options.numerics;
        if numerics.activations != numerics.weights {
            return Err(unsupported(format!(
                "activations in {} with weights in {}; both in one type are",
                numerics.activations.name(),
                numerics.weights.name()
            )));
        }
        if !Isa::available(numerics).contains(&isa) {
            return Err(unsupported(format!("{isa:?} on this machine")));
        }
        let pool = Pool::new(n_threads).map_err(|error| DeviceError::Failed {
            device: CAPABILITIES.device,
            message: format!("no thread: {error}"),
        })?;
        let found = limit::memory_limit();
        Ok(Self {
            memory_limit: options.memory_limit.map_or(found, |limit| limit.min(found)),
            counts_only: false,
            state: CpuState {
                numerics,
                isa,
                simd: SimdOps::of(isa),
                pool,
                models: Vec::new(),
                current: Model::default(),
                weights: HandleTable::default(),
                vectors: HandleTable::default(),
                buffers: HandleTable::default(),
                logits: HandleTable::default(),
                experts: HandleTable::default(),
                experts_plan: ExpertsPlan::default(),
                allocated: None,
            },
            finished: Finished::default(),
        })
    }

    /// Fails where `bytes` more do not fit.
    fn reserve(&self, what: &'static str, bytes: usize) -> Result<(), DeviceError> {
        let memory = self.memory();
        let available = memory
            .limit
            .saturating_sub(memory.weights + memory.workspace + memory.other);
        if bytes as u64 > available {
            return Err(DeviceError::OutOfMemory {
                what,
                needed_bytes: bytes as u64,
                available_bytes: available,
            });
        }
        Ok(())
    }

    /// Plans rows of activations for the model being built.
    fn plan_rows(&self, rows: Rows, cols: usize) -> Result<(Model, ActivationBuffer), DeviceError> {
        let model = self.state.last_model();
        let max_rows = self.state.model_of(model).max_rows(rows);
        if self.counts_only {
            return Ok((model, ActivationBuffer::imagined(rows, max_rows, cols)));
        }
        let bytes = ActivationBuffer::bytes_for(max_rows, cols);
        self.reserve("an activation buffer", bytes)?;
        Ok((model, ActivationBuffer::new(rows, max_rows, cols)?))
    }
}

impl CpuState {
    fn model_of(&self, model: Model) -> &ModelState {
        &self.models[model.0 as usize]
    }

    /// The model whose step it is.
    fn model(&self) -> &ModelState {
        self.model_of(self.current)
    }

    /// The model being built.
    fn last_model(&self) -> Model {
        let last = self.models.len().checked_sub(1);
        Model(last.expect("a model is added before its weights and buffers") as u32)
    }

    fn allocated(&self) -> &Allocated {
        self.allocated
            .as_ref()
            .expect("the KV cache is allocated before the first step")
    }

    /// Bytes of the largest product's packed activations.
    fn packed_bytes(&self) -> usize {
        let products = self.weights.iter_with_owner().map(|(model, weight)| {
            let model = self.model_of(model);
            let n_rows = model
                .max_rows(Rows::Tokens)
                .max(model.max_rows(Rows::Logits));
            gemm::packed_bytes(n_rows, weight.n_steps)
        });
        let of_experts = self.experts.iter_with_owner().flat_map(|(model, shape)| {
            let n_rows = self.model_of(model).max_rows(Rows::Tokens) * shape.top_k;
            [shape.gate_up, shape.down]
                .map(|weight| gemm::packed_bytes(n_rows, self.weights.get(model, weight.0).n_steps))
        });
        products.chain(of_experts).max().unwrap_or(0)
    }

    /// Bytes of the largest attention's scratch memory.
    fn scratch_bytes(&self) -> usize {
        let layers = self.models.iter().flat_map(|model| &model.layers);
        let bytes = layers.map(|layer| layer.attention.scratch_bytes());
        bytes.max().unwrap_or(0)
    }

    /// Bytes of a page.
    fn page_bytes(&self) -> usize {
        let models = self.models.iter();
        let pages = models.map(|model| kv_cache::page_bytes(&model.shape, self.numerics.kv_cache));
        pages.max().unwrap_or(0)
    }

    /// The rows of a buffer that its model's last step has.
    fn view_of(&self, (model, rows): (Model, &ActivationBuffer)) -> RowsView {
        rows.view(self.model_of(model).n_rows(rows.rows))
    }
}

fn unsupported(what: String) -> DeviceError {
    DeviceError::Unsupported {
        device: CAPABILITIES.device,
        what,
    }
}

impl Device for CpuDevice {
    fn describe(&self) -> String {
        let n_threads = self.state.pool.n_threads();
        let plural = if n_threads == 1 { "" } else { "s" };
        format!(
            "cpu: {}, {n_threads} thread{plural}",
            self.state.isa.name(self.state.numerics.weights)
        )
    }

    fn depth(&self) -> usize {
        1
    }

    fn row_tile(&self) -> usize {
        16
    }

    fn is_batch_invariant(&self) -> bool {
        true
    }

    fn add_model(&mut self, shape: &ModelShape) -> Result<Model, DeviceError> {
        shape.check(&CAPABILITIES)?;
        let state = &mut self.state;
        let (kv_cache, n_threads) = (state.numerics.kv_cache, state.pool.n_threads());
        state
            .models
            .push(ModelState::new(shape, kv_cache, n_threads));
        Ok(state.last_model())
    }

    fn prepare_weight(&mut self, parts: &[StoredMatrix<'_>]) -> Result<Weight, DeviceError> {
        let model = self.state.last_model();
        let (n_rows, cols) = weights::stacked_shape(parts);
        let precision = self.state.numerics.weights;
        let weight = if self.counts_only {
            PackedWeight::imagined(precision, n_rows, cols)
        } else {
            self.reserve("a weight", PackedWeight::bytes_for(precision, n_rows, cols))?;
            PackedWeight::pack(&self.state.pool, precision, parts)?
        };
        Ok(Weight(self.state.weights.push(model, weight)))
    }

    fn prepare_vector(
        &mut self,
        parts: &[TensorView<'_>],
        offset: f32,
    ) -> Result<Vector, DeviceError> {
        let model = self.state.last_model();
        let vector = match self.counts_only {
            true => vec![0.0; parts.iter().map(|part| part.shape[1]).sum()],
            false => weights::vector(parts, offset),
        };
        Ok(Vector(self.state.vectors.push(model, vector)))
    }

    fn plan_buffer(&mut self, rows: Rows, cols: usize) -> Result<Buffer, DeviceError> {
        let (model, buffer) = self.plan_rows(rows, cols)?;
        Ok(Buffer(self.state.buffers.push(model, buffer)))
    }

    fn plan_logits(&mut self) -> Result<Logits, DeviceError> {
        let vocab_size = self
            .state
            .model_of(self.state.last_model())
            .shape
            .vocab_size;
        let (model, logits) = self.plan_rows(Rows::Logits, vocab_size)?;
        Ok(Logits(self.state.logits.push(model, logits)))
    }

    fn plan_experts(&mut self, shape: &ExpertsShape) -> Result<Experts, DeviceError> {
        let state = &self.state;
        let model = state.last_model();
        let gate_up = state.weights.get(model, shape.gate_up.0);
        let down = state.weights.get(model, shape.down.0);
        let (hidden, inner, n) = (gate_up.cols, down.cols, shape.n_experts);
        assert_eq!(
            [gate_up.n_rows, down.n_rows],
            [n * 2 * inner, n * hidden],
            "experts' weights of other sizes"
        );
        if !(1..=n).contains(&shape.top_k) {
            return Err(unsupported(format!(
                "{} of {n} experts for a token; 1 to {n} are",
                shape.top_k
            )));
        }
        let max_tokens = state.model_of(model).max_rows(Rows::Tokens);
        let plan = state.experts_plan.with(shape, max_tokens, [hidden, inner]);
        let more = plan.bytes() - state.experts_plan.bytes();
        if !self.counts_only {
            self.reserve("the experts' workspace", more)?;
        }
        self.state.experts_plan = plan;
        Ok(Experts(self.state.experts.push(model, *shape)))
    }

    fn memory(&self) -> Memory {
        let state = &self.state;
        let vectors: usize = state
            .vectors
            .iter()
            .map(|vector| vector.len() * size_of::<f32>())
            .sum();
        let weights = state.weights.iter().map(PackedWeight::bytes).sum::<usize>() + vectors;
        let buffers = state.buffers.iter().chain(state.logits.iter());
        let workspace = buffers.map(ActivationBuffer::bytes).sum::<usize>()
            + state.packed_bytes()
            + state.scratch_bytes()
            + state.experts_plan.bytes();
        let cache = state.allocated.as_ref().map_or(0, |a| a.cache.bytes());
        // Weights are resident, workspace and cache as far as they were touched: what is resident beyond the weights
        // may be counted twice before the cache is allocated, never too little.
        let resident = if self.counts_only { 0 } else { weights + cache };
        let other = limit::anonymous_bytes().saturating_sub(resident as u64) + RESERVE_BYTES;
        Memory {
            limit: self.memory_limit,
            weights: weights as u64,
            workspace: workspace as u64,
            other,
        }
    }

    fn block_bytes(&self) -> u64 {
        self.state.page_bytes() as u64
    }

    fn allocate_kv(&mut self, n_blocks: u32) -> Result<(), DeviceError> {
        let page_bytes = self.state.page_bytes();
        self.reserve("the KV cache", n_blocks as usize * page_bytes)?;
        let state = &mut self.state;
        let vocab_sizes = state.models.iter().map(|model| model.shape.vocab_size);
        let vocab_size = vocab_sizes.max().unwrap_or(0);
        let sampling = || Mutex::new(sampling::Scratch::new(vocab_size));
        state.allocated = Some(Allocated {
            cache: KvCache::new(page_bytes, n_blocks as usize)?,
            packed: PackedActivations::new(state.packed_bytes())?,
            scratch: Scratch::new(state.scratch_bytes())?,
            experts: ExpertsWorkspace::new(&state.experts_plan)?,
            sampling: (0..state.pool.n_threads()).map(|_| sampling()).collect(),
        });
        for model in &mut state.models {
            model.step.set_n_blocks(n_blocks);
        }
        Ok(())
    }

    fn submit(&mut self, input: &StepInput, forward: Forward<'_>) -> Result<Ticket, DeviceError> {
        let ticket = self.finished.begin();
        self.state.begin(input);
        forward(&mut self.state);
        Ok(ticket)
    }

    fn sample(
        &mut self,
        ticket: &Ticket,
        logits: Logits,
        requests: &[LogitsRow],
    ) -> Result<(), DeviceError> {
        let output = self.state.sample(logits, requests);
        self.finished.put(ticket, output);
        Ok(())
    }

    fn collect(&mut self, ticket: Ticket) -> Result<DeviceOutput, DeviceError> {
        Ok(self.finished.take(ticket))
    }

    fn read(&mut self, buffer: Buffer) -> Result<Vec<f32>, DeviceError> {
        let view = self.state.view_of(self.state.buffers.with_owner(buffer.0));
        // SAFETY: no step is running, so nobody writes.
        Ok(unsafe { view.to_vec() })
    }

    fn read_logits(&mut self, logits: Logits) -> Result<Vec<f32>, DeviceError> {
        let view = self.state.view_of(self.state.logits.with_owner(logits.0));
        // SAFETY: no step is running, so nobody writes.
        Ok(unsafe { view.to_vec() })
    }
}
