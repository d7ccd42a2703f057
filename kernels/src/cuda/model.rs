//! What the device keeps of one model: its shape and step, and where what a step brings and gives lies.

use crate::device::{DeviceError, DeviceOptions, Model};
use crate::shape::{Capabilities, ModelShape, Precision};
use crate::step::Step;

use super::driver::{Driver, Pinned};
use super::kernel::{HEAD_DIMS, MAX_TOP, SampleRow};
use super::plan::{Plan, bucket_rows};
use super::unsupported;

/// Copies, and changes of the block tables, that go up along with a step; more take a trip of their own.
pub(super) const EDITS: usize = 16_384;
/// Positions are below this: a kernel's division by the block size is exact.
const MAX_POSITIONS: usize = 1 << 25;

const CAPABILITIES: Capabilities = Capabilities {
    device: "cuda",
    head_dims: Some(&HEAD_DIMS),
    block_sizes: (8, 128),
};

/// One model.
pub(super) struct ModelState {
    pub(super) shape: ModelShape,
    pub(super) step: Step,
    pub(super) plan: Plan,
    pub(super) buffers: StepBuffers,
    /// Of the two steps that may be under way.
    pub(super) slots: [Slot; 2],
}

/// Host memory of a step under way.
pub(super) struct Slot {
    pub(super) input: Pinned,
    pub(super) requests: Pinned,
    pub(super) output: Pinned,
}

/// Addresses of what a step brings, gives, and needs meanwhile.
#[derive(Clone, Debug)]
pub(super) struct StepBuffers {
    /// As the plan's layout says, then copies, then changes of the block tables.
    pub(super) input: u64,
    /// `[group][row][block]`
    pub(super) tables: u64,
    /// By [`crate::shape::RopeId`].
    pub(super) ropes: Vec<DeviceRope>,
    /// What the kernels of a decode hand to each other.
    pub(super) partial_out: u64,
    pub(super) partial_softmax: u64,
    /// `[L]`: what is wanted of each row of logits.
    pub(super) requests: u64,
    pub(super) sampled: SampledBuffers,
}

/// A rotary embedding's frequencies.
#[derive(Clone, Copy, Debug)]
pub(super) struct DeviceRope {
    pub(super) inverse_frequencies: u64,
    pub(super) n: usize,
    pub(super) scale: f32,
}

/// What `sample` writes, one array after another: `[L]`, `[L]`, `[L][MAX_TOP]`, `[L][MAX_TOP]`.
#[derive(Clone, Copy, Debug)]
pub(super) struct SampledBuffers {
    pub(super) tokens: u64,
    /// L.
    pub(super) rows: usize,
}

impl SampledBuffers {
    fn bytes(rows: usize) -> usize {
        rows * (8 + 8 * MAX_TOP as usize)
    }

    pub(super) fn logprobs(&self) -> u64 {
        self.tokens + (self.rows * 4) as u64
    }

    pub(super) fn top_ids(&self) -> u64 {
        self.tokens + (self.rows * 8) as u64
    }

    pub(super) fn top_logprobs(&self) -> u64 {
        self.top_ids() + (self.rows * 4 * MAX_TOP as usize) as u64
    }
}

/// Refuses what no kernel computes.
pub(super) fn check_options(options: &DeviceOptions) -> Result<(), DeviceError> {
    let numerics = options.numerics;
    for (what, precision) in [
        ("weights", numerics.weights),
        ("activations", numerics.activations),
        ("a KV cache", numerics.kv_cache),
    ] {
        if precision != Precision::BF16 {
            return Err(unsupported(format!(
                "{what} in {}; use --dtype bfloat16, or --device cpu",
                precision.name()
            )));
        }
    }
    Ok(())
}

fn check(shape: &ModelShape) -> Result<(), DeviceError> {
    shape.check(&CAPABILITIES)?;
    if shape.max_positions > MAX_POSITIONS {
        return Err(unsupported(format!(
            "{} positions; {MAX_POSITIONS} are",
            shape.max_positions
        )));
    }
    Ok(())
}

impl ModelState {
    /// Allocates what a model's steps need; `workspace_bytes` grows by it.
    pub(super) fn new<D: Driver>(
        driver: &mut D,
        shape: &ModelShape,
        workspace_bytes: &mut u64,
    ) -> Result<Self, DeviceError> {
        check(shape)?;
        let limits = &shape.limits;
        let plan = Plan::new(shape);
        let max_rows = bucket_rows(limits.max_logits_rows);
        let input_bytes = plan.largest(limits).layout().end + 2 * EDITS * 8;
        let request_bytes = max_rows * size_of::<SampleRow>();
        let output_bytes = SampledBuffers::bytes(max_rows);
        let table_entries =
            shape.groups.len() * limits.max_sequences * limits.max_blocks_per_sequence;
        if u32::try_from(table_entries).is_err() {
            return Err(unsupported(format!(
                "block tables of {table_entries} entries; lower --max-num-seqs"
            )));
        }
        // Of the layers' heads, the most elements and the most heads of a token.
        let heads = |layer: &crate::shape::AttentionShape| {
            let head_dim = shape.caches[layer.cache.0 as usize].head_dim;
            (layer.n_heads, layer.n_heads * head_dim)
        };
        let most_heads = shape.layers.iter().map(|l| heads(l).0).max().unwrap_or(0);
        let most_elements = shape.layers.iter().map(|l| heads(l).1).max().unwrap_or(0);

        let mut allocate = |what, bytes: usize| {
            *workspace_bytes += bytes as u64;
            driver.allocate(what, bytes)
        };
        let tiles = plan.workspace_tiles();
        let mut buffers = StepBuffers {
            input: allocate("a step's input", input_bytes)?,
            tables: allocate("the block tables", table_entries * 4)?,
            ropes: Vec::new(),
            partial_out: allocate("attention's partial results", tiles * most_elements * 4)?,
            partial_softmax: allocate("attention's partial sums", tiles * most_heads * 8)?,
            requests: allocate("a step's sampling parameters", request_bytes)?,
            sampled: SampledBuffers {
                tokens: allocate("a step's output", output_bytes)?,
                rows: max_rows,
            },
        };
        for rope in &shape.ropes {
            let bytes: &[u8] = bytemuck::cast_slice(&rope.inverse_frequencies);
            *workspace_bytes += bytes.len() as u64;
            let inverse_frequencies = driver.allocate("rotary frequencies", bytes.len())?;
            let fill = |_, to: &mut [u8]| to.copy_from_slice(bytes);
            driver.upload(inverse_frequencies, 1, bytes.len(), &fill)?;
            buffers.ropes.push(DeviceRope {
                inverse_frequencies,
                n: rope.inverse_frequencies.len(),
                scale: rope.scale,
            });
        }
        let mut slot = || {
            Ok(Slot {
                input: driver.pinned(input_bytes)?,
                requests: driver.pinned(request_bytes)?,
                output: driver.pinned(output_bytes)?,
            })
        };
        Ok(Self {
            step: Step::deferred(shape),
            shape: shape.clone(),
            plan,
            buffers,
            slots: [slot()?, slot()?],
        })
    }

    /// Rows that a buffer has in the model's last step.
    pub(super) fn n_rows(&self, rows: crate::device::Rows) -> usize {
        match rows {
            crate::device::Rows::Tokens => self.step.tokens.len(),
            crate::device::Rows::Logits => self.step.logits.len(),
        }
    }
}

/// A model's place.
pub(super) fn index(model: Model) -> usize {
    model.0 as usize
}
