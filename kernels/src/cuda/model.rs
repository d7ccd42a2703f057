//! What the device keeps of one model: its shape and step, and where what a step brings and gives lies.

use crate::device::{DeviceError, DeviceOptions, Rows};
use crate::shape::{Capabilities, Model, ModelShape, Precision, Rope};
use crate::step::Step;

use super::driver::{Driver, Pinned};
use super::edits::EditRoom;
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
    /// Of the edits of rows of logits that go up at once.
    pub(super) edit_room: EditRoom,
}

/// Host memory of a step under way.
pub(super) struct Slot {
    pub(super) input: Pinned,
    pub(super) requests: Pinned,
    pub(super) edits: Pinned,
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
    /// What the kernels of attention over cut keys hand to each other.
    pub(super) partial_out: u64,
    pub(super) partial_softmax: u64,
    /// `[L]`: what is wanted of each row of logits.
    pub(super) requests: u64,
    /// The rows that are edited, then their words.
    pub(super) edits: u64,
    /// `[L, stride of the logits]`: the edited rows.
    pub(super) edited: u64,
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

/// How much a model's steps bring, give and need at most.
struct Sizes {
    input_bytes: usize,
    request_bytes: usize,
    edit_room: EditRoom,
    edited_bytes: usize,
    output_bytes: usize,
    /// Rows of logits, padding included.
    max_rows: usize,
    table_entries: usize,
    /// Query heads of a token, and their elements, in the layer that has most.
    most_heads: usize,
    most_elements: usize,
}

impl Sizes {
    fn new(shape: &ModelShape, plan: &Plan) -> Result<Self, DeviceError> {
        let limits = &shape.limits;
        let table_entries =
            shape.groups.len() * limits.max_sequences * limits.max_blocks_per_sequence;
        if u32::try_from(table_entries).is_err() {
            return Err(unsupported(format!(
                "block tables of {table_entries} entries; lower --max-num-seqs"
            )));
        }
        let max_rows = bucket_rows(limits.max_logits_rows);
        let heads = shape.layers.iter().map(|layer| layer.n_heads);
        let elements = shape.layers.iter().map(|layer| {
            let cache = shape.caches[layer.cache.0 as usize];
            layer.n_heads * cache.head_dim
        });
        Ok(Self {
            input_bytes: plan.largest(limits).layout().end + 2 * EDITS * 8,
            request_bytes: max_rows * size_of::<SampleRow>(),
            edit_room: EditRoom::new(max_rows, shape.vocab_size),
            edited_bytes: max_rows * logits_stride(shape.vocab_size) * 4,
            output_bytes: SampledBuffers::bytes(max_rows),
            max_rows,
            table_entries,
            most_heads: heads.max().unwrap_or(0),
            most_elements: elements.max().unwrap_or(0),
        })
    }
}

impl StepBuffers {
    /// Allocates them; `workspace_bytes` grows by it.
    fn allocate<D: Driver>(
        driver: &mut D,
        plan: &Plan,
        sizes: &Sizes,
        workspace_bytes: &mut u64,
    ) -> Result<Self, DeviceError> {
        let mut allocate = |what, bytes: usize| {
            *workspace_bytes += bytes as u64;
            driver.allocate(what, bytes)
        };
        let tiles = plan.workspace_tiles();
        let partial_out = tiles * sizes.most_elements * 4;
        Ok(Self {
            input: allocate("a step's input", sizes.input_bytes)?,
            tables: allocate("the block tables", sizes.table_entries * 4)?,
            ropes: Vec::new(),
            partial_out: allocate("attention's partial results", partial_out)?,
            partial_softmax: allocate("attention's partial sums", tiles * sizes.most_heads * 8)?,
            requests: allocate("a step's sampling parameters", sizes.request_bytes)?,
            edits: allocate("edits of logits", sizes.edit_room.bytes())?,
            edited: allocate("edited logits", sizes.edited_bytes)?,
            sampled: SampledBuffers {
                tokens: allocate("a step's output", sizes.output_bytes)?,
                rows: sizes.max_rows,
            },
        })
    }
}

impl DeviceRope {
    fn upload<D: Driver>(driver: &mut D, rope: &Rope) -> Result<Self, DeviceError> {
        let bytes: &[u8] = bytemuck::cast_slice(&rope.inverse_frequencies);
        let inverse_frequencies = driver.allocate("rotary frequencies", bytes.len())?;
        let fill = |_, to: &mut [u8]| to.copy_from_slice(bytes);
        driver.upload(inverse_frequencies, 1, bytes.len(), &fill)?;
        Ok(Self {
            inverse_frequencies,
            n: rope.inverse_frequencies.len(),
            scale: rope.scale,
        })
    }
}

impl ModelState {
    /// Allocates what a model's steps need; `workspace_bytes` grows by it.
    pub(super) fn new<D: Driver>(
        driver: &mut D,
        shape: &ModelShape,
        workspace_bytes: &mut u64,
    ) -> Result<Self, DeviceError> {
        check(shape)?;
        let plan = Plan::new(shape, driver.n_multiprocessors());
        let sizes = Sizes::new(shape, &plan)?;
        let mut buffers = StepBuffers::allocate(driver, &plan, &sizes, workspace_bytes)?;
        for rope in &shape.ropes {
            buffers.ropes.push(DeviceRope::upload(driver, rope)?);
        }
        let mut slot = || {
            Ok(Slot {
                input: driver.pinned(sizes.input_bytes)?,
                requests: driver.pinned(sizes.request_bytes)?,
                edits: driver.pinned(sizes.edit_room.bytes())?,
                output: driver.pinned(sizes.output_bytes)?,
            })
        };
        Ok(Self {
            step: Step::deferred(shape),
            shape: shape.clone(),
            plan,
            buffers,
            slots: [slot()?, slot()?],
            edit_room: sizes.edit_room,
        })
    }

    /// Rows that a buffer has in the model's last step.
    pub(super) fn n_rows(&self, rows: Rows) -> usize {
        match rows {
            Rows::Tokens => self.step.tokens.len(),
            Rows::Logits => self.step.logits.len(),
        }
    }
}

/// From row to row of the logits of a vocabulary.
pub(super) fn logits_stride(vocab_size: usize) -> usize {
    vocab_size.next_multiple_of(8)
}

/// A model's place.
pub(super) fn index(model: Model) -> usize {
    model.0 as usize
}
