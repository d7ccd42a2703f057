//! The CPU device: AVX-512 bf16 (with AMX where there is), AVX2 or portable code, chosen at run time, on its own
//! threads.
//!
//! Activations are f32 in their buffers and are rounded to the device's precision where they are multiplied; sums are
//! f32. A step runs when it is submitted: the depth is 1. This file owns the device's state and cuts element-wise
//! work over the threads; products, attention, the cache's layout and the kernels have files of their own.

mod attention;
mod kv_cache;
mod lanes;
mod limit;
mod matmul;
mod ops;
mod pages;
mod pool;
mod rows;
mod tile;
mod weights;

use crate::device::{
    Buffer, Device, DeviceConfig, DeviceError, Memory, Ops, Rows, StepInput, StepOutput,
    TensorView, Ticket, Vector, Weight,
};
use crate::sampling;
use crate::step::{Finished, Step};
use attention::{AttentionPlan, QueryTile, Scratch};
use kv_cache::{KvCache, KvLayout};
use lanes::Lanes;
use matmul::Factors;
use pool::Pool;
use rows::Activations;
use std::num::NonZeroUsize;
use std::sync::Mutex;
pub use tile::Isa;
use weights::PackedWeight;

/// What the process itself is left beside weights, workspace and cache: its heap grows while it serves.
const RESERVE_BYTES: u64 = 64 << 20;

/// The device.
pub struct CpuDevice {
    pass: Pass,
    memory_limit: u64,
    finished: Finished,
}

/// What the operations work on.
struct Pass {
    config: DeviceConfig,
    isa: Isa,
    lanes: &'static Lanes,
    pool: Pool,
    layout: KvLayout,
    plan: AttentionPlan,
    weights: Vec<PackedWeight>,
    vectors: Vec<Vec<f32>>,
    buffers: Vec<Activations>,
    step: Step,
    /// Cosines and sines of the step's tokens, `[tokens][head_dim / 2]`.
    cos: Vec<f32>,
    sin: Vec<f32>,
    tiles: Vec<QueryTile>,
    running: Option<Running>,
    output: Vec<Mutex<crate::device::Sampled>>,
}

/// What exists once the model is built.
struct Running {
    cache: KvCache,
    factors: Factors,
    scratch: Scratch,
    sampling: Vec<Mutex<sampling::Scratch>>,
}

impl CpuDevice {
    /// A device on `n_threads` threads (the caller's among them) with the best instruction set of this machine.
    pub fn new(config: DeviceConfig, n_threads: NonZeroUsize) -> Result<Self, DeviceError> {
        let isa = Isa::available(config.precision)[0];
        Self::with_isa(config, n_threads, isa)
    }

    /// A device that uses a given instruction set, which must be one of [`Isa::available`].
    pub fn with_isa(
        config: DeviceConfig,
        n_threads: NonZeroUsize,
        isa: Isa,
    ) -> Result<Self, DeviceError> {
        if !Isa::available(config.precision).contains(&isa) {
            return Err(unsupported(format!("{isa:?} on this machine")));
        }
        check(&config)?;
        let pool = Pool::new(n_threads).map_err(|error| DeviceError::Failed {
            device: "cpu",
            message: format!("no thread: {error}"),
        })?;
        let layout = KvLayout::new(&config.attention, config.precision);
        let angles = config.limits.max_tokens * config.attention.head_dim / 2;
        let found = limit::memory_limit();
        Ok(Self {
            memory_limit: config.memory_limit.map_or(found, |limit| limit.min(found)),
            pass: Pass {
                isa,
                lanes: Lanes::of(isa),
                pool,
                layout,
                plan: AttentionPlan::new(&config, &layout, n_threads.get()),
                weights: Vec::new(),
                vectors: Vec::new(),
                buffers: Vec::new(),
                step: Step::new(&config),
                cos: Vec::with_capacity(angles),
                sin: Vec::with_capacity(angles),
                tiles: Vec::with_capacity(config.limits.max_tokens),
                running: None,
                output: Vec::with_capacity(config.limits.max_logits_rows),
                config,
            },
            finished: Finished::default(),
        })
    }

    fn factors_bytes(&self) -> usize {
        let limits = &self.pass.config.limits;
        let n_steps = self
            .pass
            .weights
            .iter()
            .map(|weight| weight.n_steps)
            .max()
            .unwrap_or(0);
        matmul::factors_bytes(limits.max_tokens.max(limits.max_logits_rows), n_steps)
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
}

fn unsupported(what: String) -> DeviceError {
    DeviceError::Unsupported {
        device: "cpu",
        what,
    }
}

fn check(config: &DeviceConfig) -> Result<(), DeviceError> {
    let shape = &config.attention;
    if shape.n_kv_heads == 0
        || shape.n_heads == 0
        || !shape.n_heads.is_multiple_of(shape.n_kv_heads)
    {
        return Err(unsupported(format!(
            "{} query heads over {} KV heads",
            shape.n_heads, shape.n_kv_heads
        )));
    }
    if shape.head_dim == 0 || !shape.head_dim.is_multiple_of(2) {
        return Err(unsupported(format!(
            "a head of {} elements, which are not pairs",
            shape.head_dim
        )));
    }
    if shape.block_size == 0 {
        return Err(unsupported("blocks of 0 tokens".to_owned()));
    }
    if config.rope.inverse_frequencies.len() != shape.head_dim / 2 {
        return Err(unsupported(format!(
            "{} rotary frequencies for a head of {}",
            config.rope.inverse_frequencies.len(),
            shape.head_dim
        )));
    }
    Ok(())
}

impl Device for CpuDevice {
    fn describe(&self) -> String {
        let n_threads = self.pass.pool.n_threads();
        let plural = if n_threads == 1 { "" } else { "s" };
        format!(
            "cpu: {}, {n_threads} thread{plural}",
            self.pass.isa.name(self.pass.config.precision)
        )
    }

    fn depth(&self) -> usize {
        1
    }

    fn prepare_weight(&mut self, parts: &[TensorView<'_>]) -> Result<Weight, DeviceError> {
        let (n_rows, cols) = (
            parts.iter().map(|p| p.shape[0]).sum(),
            parts.first().map_or(0, |p| p.shape[1]),
        );
        let precision = self.pass.config.precision;
        self.reserve("a weight", PackedWeight::bytes_for(precision, n_rows, cols))?;
        let weight = PackedWeight::pack(&self.pass.pool, precision, parts)?;
        self.pass.weights.push(weight);
        Ok(Weight(self.pass.weights.len() as u32 - 1))
    }

    fn prepare_vector(&mut self, parts: &[TensorView<'_>]) -> Result<Vector, DeviceError> {
        self.pass.vectors.push(weights::widen(parts));
        Ok(Vector(self.pass.vectors.len() as u32 - 1))
    }

    fn plan_buffer(&mut self, rows: Rows, cols: usize) -> Result<Buffer, DeviceError> {
        let limits = &self.pass.config.limits;
        let max_rows = match rows {
            Rows::Tokens => limits.max_tokens,
            Rows::Logits => limits.max_logits_rows,
        };
        self.reserve("an activation buffer", max_rows * cols * size_of::<f32>())?;
        self.pass
            .buffers
            .push(Activations::new(rows, max_rows, cols)?);
        Ok(Buffer(self.pass.buffers.len() as u32 - 1))
    }

    fn memory(&self) -> Memory {
        let pass = &self.pass;
        let vectors: usize = pass
            .vectors
            .iter()
            .map(|vector| vector.len() * size_of::<f32>())
            .sum();
        let weights = pass.weights.iter().map(PackedWeight::bytes).sum::<usize>() + vectors;
        let buffers: usize = pass.buffers.iter().map(Activations::bytes).sum();
        let cache = pass
            .running
            .as_ref()
            .map_or(0, |running| running.cache.bytes());
        let workspace = buffers + self.factors_bytes() + pass.plan.scratch_bytes();
        // Weights are resident, workspace and cache as far as they were touched: what is resident beyond the weights
        // may be counted twice before the cache is allocated, never too little.
        let other =
            limit::anonymous_bytes().saturating_sub((weights + cache) as u64) + RESERVE_BYTES;
        Memory {
            limit: self.memory_limit,
            weights: weights as u64,
            workspace: workspace as u64,
            other,
        }
    }

    fn block_bytes(&self) -> u64 {
        self.pass.layout.block_bytes() as u64
    }

    fn allocate_kv(&mut self, n_blocks: u32) -> Result<(), DeviceError> {
        let pass = &self.pass;
        self.reserve(
            "the KV cache",
            n_blocks as usize * pass.layout.block_bytes(),
        )?;
        let vocabulary = pass
            .buffers
            .iter()
            .filter(|b| b.rows == Rows::Logits)
            .map(|b| b.view(0).cols)
            .max();
        let sampling = || Mutex::new(sampling::Scratch::new(vocabulary.unwrap_or(0)));
        let running = Running {
            cache: KvCache::new(pass.layout, n_blocks as usize)?,
            factors: Factors::new(self.factors_bytes())?,
            scratch: Scratch::new(&pass.plan)?,
            sampling: (0..pass.pool.n_threads()).map(|_| sampling()).collect(),
        };
        self.pass.running = Some(running);
        self.pass.step.set_n_blocks(n_blocks);
        Ok(())
    }

    fn submit(
        &mut self,
        input: &StepInput,
        forward: &mut dyn FnMut(&mut dyn Ops),
    ) -> Result<Ticket, DeviceError> {
        self.finished.assert_collected();
        self.pass.begin(input);
        forward(&mut self.pass);
        let output = self.pass.end();
        Ok(self.finished.put(output))
    }

    fn collect(&mut self, ticket: Ticket) -> Result<StepOutput, DeviceError> {
        Ok(self.finished.take(ticket))
    }

    fn read(&mut self, buffer: Buffer) -> Result<Vec<f32>, DeviceError> {
        let view = self.pass.view(buffer);
        // SAFETY: no step is running, so nobody writes.
        Ok((0..view.n_rows)
            .flat_map(|r| unsafe { view.row(r) }.to_vec())
            .collect())
    }
}
