//! The contract between a model and a device: handles, the operations of a forward pass, and the life of a step.
//!
//! Handles ([`Weight`], [`Vector`], [`Buffer`] and so on) are small copyable names of what the device owns, so that a
//! model is plain data and a forward pass can be recorded once and replayed (CUDA graphs). Several models may live on
//! one device; a handle belongs to the model that was being built when it was made. The device plans its workspace while
//! models are built; no operation allocates.
//!
//! Two properties are asked of a device. *Batch invariance*: the order of every reduction depends on the inner size, the
//! block size and the absolute position in the KV cache only, never on the batch, the chunking or the number of threads,
//! so that a request gives exactly the same tokens alone and in a crowd; a device whose products come from a library
//! that decides otherwise says so. *Inert rows*: padding changes nothing.

pub use crate::error::DeviceError;
use crate::shape::{LayerId, Model, ModelShape, Numerics};
use crate::step::{DeviceOutput, LogitsRow, StepInput};
use crate::stored::{StoredMatrix, TensorView};

/// What every device is made from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceOptions {
    /// What weights, activations and the KV cache are kept in.
    pub numerics: Numerics,
    /// Memory in bytes that the device may use in all, where it is less than what the device finds.
    pub memory_limit: Option<u64>,
}

/// A prepared matrix `[out, in]`, in whatever layout and precision the device prefers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Weight(pub u32);

/// A prepared vector `[n]`: a norm's weight or a bias.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Vector(pub u32);

/// An activation matrix in the workspace: `[rows of the step, cols]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Buffer(pub u32);

/// The logits of a step, `[L, vocabulary]`, in f32 on every device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Logits(pub u32);

/// A set of experts with the workspace that they need.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Experts(pub u32);

/// Which rows of a step a [`Buffer`] has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rows {
    /// One for each input token: at most [`Limits::max_tokens`](crate::shape::Limits::max_tokens).
    Tokens,
    /// One for each row of logits: at most [`Limits::max_logits_rows`](crate::shape::Limits::max_logits_rows).
    Logits,
}

/// The activation of a gated MLP.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Activation {
    /// `x / (1 + e^-x)`, also called swish.
    Silu,
    /// `x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3)))` (`gelu_pytorch_tanh`).
    GeluTanh,
}

/// Norms of single query and key heads (Qwen3, Gemma 3): RMSNorm over the `head_dim` elements of a head, before the
/// rotary embedding.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct HeadNorms {
    /// `[head_dim]`, for queries.
    pub query: Vector,
    /// `[head_dim]`, for keys.
    pub key: Vector,
    /// As in [`Ops::rms_norm`].
    pub epsilon: f32,
}

/// A mixture of experts: gated MLPs of one shape, of which each token takes a few (Mixtral, arXiv 2401.04088).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ExpertsShape {
    /// `[n_experts * 2 * intermediate, hidden]`: of each expert first the gate, then the up projection.
    pub gate_up: Weight,
    /// `[n_experts * hidden, intermediate]`
    pub down: Weight,
    /// How many there are.
    pub n_experts: usize,
    /// How many a token takes.
    pub top_k: usize,
    /// The weights of the chosen ones are divided by their sum.
    pub renormalize: bool,
    /// Of each expert's gate.
    pub activation: Activation,
}

/// A step under way.
#[derive(Debug, PartialEq, Eq)]
pub struct Ticket(pub u64);

/// A device's memory in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    /// What this process may use: the GPU's memory, or the container's (cgroup) limit, or the machine's memory.
    pub limit: u64,
    /// Weights as prepared.
    pub weights: u64,
    /// Workspace as planned so far.
    pub workspace: u64,
    /// Taken by others and not available to the KV cache (the process itself, other processes on a GPU).
    pub other: u64,
}

/// The operations of a forward pass. Shapes below: `T` tokens of the step, `L` rows of logits.
///
/// Calling one with handles of the wrong width or of another model, or with an output that is also an input, is a broken
/// invariant of the model, and panics.
pub trait Ops {
    /// `out[t] = table[token[t]] * scale`: `out` is `[T, cols]`, `table` `[vocabulary, cols]`.
    fn embed(&mut self, out: Buffer, table: Weight, scale: f32);
    /// `out[t] = x[t] / sqrt(mean(x[t]^2) + epsilon) * weight` (RMSNorm, arXiv 1910.07467).
    fn rms_norm(&mut self, out: Buffer, x: Buffer, weight: Vector, epsilon: f32);
    /// `residual += x; out = rms_norm(residual)`, fused.
    fn add_rms_norm(
        &mut self,
        out: Buffer,
        residual: Buffer,
        x: Buffer,
        weight: Vector,
        epsilon: f32,
    );
    /// `out[r] = weight * x[r] + bias`: `x` is `[rows, in]`, `weight` `[out, in]`, `out` `[rows, out]`.
    fn matmul(&mut self, out: Buffer, x: Buffer, weight: Weight, bias: Option<Vector>);
    /// Norms the query and key heads of `qkv` where there are norms, rotates them by their positions as the layer says,
    /// in place, and appends keys and values to the layer's cache. `qkv` is `[T, (n_heads + 2 n_kv_heads) * head_dim]`:
    /// queries, keys, values.
    fn rope_append(&mut self, qkv: Buffer, layer: LayerId, norms: Option<HeadNorms>);
    /// Causal attention of the queries in `qkv` over the layer's cached keys and values, those in its window, read
    /// through the block tables: `out` is `[T, n_heads * head_dim]` (PagedAttention, arXiv 2309.06180, section 4.1).
    fn attention(&mut self, out: Buffer, qkv: Buffer, layer: LayerId);
    /// `out[t] = activation(gate[t]) * up[t]`: `gate_up` is `[T, 2 n]`, gate first, `out` `[T, n]`.
    fn gated_activation(&mut self, out: Buffer, gate_up: Buffer, activation: Activation);
    /// `out[t] = sum of p * expert(x[t])` over the `top_k` experts with the largest router logits (ties to the lowest
    /// index), `p` the softmax over all of them; summed from the largest `p` to the smallest. `out` and `x` are
    /// `[T, hidden]`, `router` is `[T, n_experts]`.
    fn experts(&mut self, out: Buffer, x: Buffer, router: Buffer, experts: Experts);
    /// `out[l] = x[token of logits row l]`: from `[T, n]` to `[L, n]`.
    fn gather_logits_rows(&mut self, out: Buffer, x: Buffer);
    /// `out[l] = weight * x[l]`, the last operation of a pass: `x` is `[L, in]`, `weight` `[vocabulary, in]`.
    fn logits(&mut self, out: Logits, x: Buffer, weight: Weight);
    /// Sum over the ranks of a tensor-parallel group; the identity on one rank.
    fn all_reduce(&mut self, x: Buffer);
}

/// One pass over a model's layers. Shared, so that several ranks may run it at once.
pub type Forward<'a> = &'a (dyn Fn(&mut dyn Ops) + Sync);

/// A device: owns weights, workspace, KV cache and block tables of one or several models.
///
/// In order: for each model [`Device::add_model`], then its weights and buffers; [`Device::allocate_kv`] once; then
/// steps: [`Device::submit`], [`Device::sample`], [`Device::collect`].
pub trait Device: Send {
    /// One line for the log: what it is and what it uses, e.g. `cpu: AVX-512 bf16, 2 threads`.
    fn describe(&self) -> String;
    /// Steps that may be under way at once: 1, or 2 where the device runs ahead of the host.
    fn depth(&self) -> usize;
    /// Rows that large products are computed in at once: a part of so many costs as much as all of them.
    fn row_tile(&self) -> usize;
    /// The same tokens at the same positions leave the same bits in the KV cache, whatever else ran with them and in
    /// whatever chunks: of two blocks that hold the same tokens after the same ones, either may stand for both.
    fn is_batch_invariant(&self) -> bool;

    /// Adds a model; what is prepared and planned from now on is its own. `Err` where the device can't run it.
    fn add_model(&mut self, shape: &ModelShape) -> Result<Model, DeviceError>;
    /// Prepares a matrix from its parts, stacked along the rows: `[sum of rows, cols]`. All parts have equal `cols`.
    fn prepare_weight(&mut self, parts: &[StoredMatrix<'_>]) -> Result<Weight, DeviceError>;
    /// Prepares a vector from its parts, one after another; `offset` is added to each element (Gemma's norms are stored
    /// less 1).
    fn prepare_vector(
        &mut self,
        parts: &[TensorView<'_>],
        offset: f32,
    ) -> Result<Vector, DeviceError>;
    /// Plans an activation buffer of `cols` columns.
    fn plan_buffer(&mut self, rows: Rows, cols: usize) -> Result<Buffer, DeviceError>;
    /// Plans the logits of the model, as wide as its vocabulary.
    fn plan_logits(&mut self) -> Result<Logits, DeviceError>;
    /// Plans the workspace of experts.
    fn plan_experts(&mut self, shape: &ExpertsShape) -> Result<Experts, DeviceError>;

    /// What is used, once the models are built.
    fn memory(&self) -> Memory;
    /// Bytes of a block: a page of the KV cache, large enough for the block of any cache group of any model.
    fn block_bytes(&self) -> u64;
    /// Allocates the KV cache: blocks `0..n_blocks`, which all groups of all models take from.
    fn allocate_kv(&mut self, n_blocks: u32) -> Result<(), DeviceError>;

    /// Starts a step: uploads `input`, runs (or replays) `forward`. At most [`Device::depth`] are under way.
    fn submit(&mut self, input: &StepInput, forward: Forward<'_>) -> Result<Ticket, DeviceError>;
    /// Samples from the `logits` of the step that was submitted last, one request for each of its rows of logits.
    /// Called once for each step, before the next is submitted.
    fn sample(
        &mut self,
        ticket: &Ticket,
        logits: Logits,
        requests: &[LogitsRow],
    ) -> Result<(), DeviceError>;
    /// Waits for the oldest step under way.
    fn collect(&mut self, ticket: Ticket) -> Result<DeviceOutput, DeviceError>;

    /// The values of a buffer as the last step left them, row after row: for tests and tools, never in serving.
    fn read(&mut self, buffer: Buffer) -> Result<Vec<f32>, DeviceError>;
    /// The logits of the last step, likewise.
    fn read_logits(&mut self, logits: Logits) -> Result<Vec<f32>, DeviceError>;
}

/// The book of a device that runs each step when it is submitted: one result, until it is collected.
#[derive(Debug, Default)]
pub(crate) struct Finished {
    next_ticket: u64,
    output: Option<(u64, DeviceOutput)>,
}

impl Finished {
    /// A step may be submitted only once the one before it was collected.
    pub(crate) fn begin(&mut self) -> Ticket {
        assert!(self.output.is_none(), "a step is under way already");
        let ticket = self.next_ticket;
        self.next_ticket += 1;
        self.output = Some((ticket, DeviceOutput::default()));
        Ticket(ticket)
    }

    /// Keeps what a step gave.
    pub(crate) fn put(&mut self, ticket: &Ticket, output: DeviceOutput) {
        assert_eq!(
            self.output.as_ref().map(|(number, _)| *number),
            Some(ticket.0),
            "the ticket of another step"
        );
        self.output = Some((ticket.0, output));
    }

    /// Gives it away.
    pub(crate) fn take(&mut self, ticket: Ticket) -> DeviceOutput {
        let (number, output) = self
            .output
            .take()
            .expect("a step was submitted before it is collected");
        assert_eq!(number, ticket.0, "the ticket of another step");
        output
    }
}
