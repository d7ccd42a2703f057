//! The contract between a model and a device: handles, a step's inputs and outputs, and the operations.
//!
//! Handles ([`Weight`], [`Vector`], [`Buffer`]) are small copyable names of what the device owns, so that a model is
//! plain data and a forward pass can be recorded once and replayed (CUDA graphs). The device plans its workspace
//! while the model is built; no operation allocates.
//!
//! Two properties are asked of a device. *Batch invariance*: the order of every reduction depends on the inner size, the
//! block size and the absolute position in the KV cache only, never on the batch, the chunking or the number of threads,
//! so that a request gives exactly the same tokens alone and in a crowd; a device whose products come from a library
//! that decides otherwise says so. *Inert rows*: padding changes nothing.

use std::num::NonZeroU32;

/// Element type of a stored tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dtype {
    /// IEEE 754 binary32.
    F32,
    /// IEEE 754 binary16.
    F16,
    /// bfloat16: the upper half of a binary32.
    BF16,
}

impl Dtype {
    /// Bytes of one element.
    pub const fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
        }
    }

    /// The value of one element, from its [`Dtype::bytes`] little-endian bytes; exact.
    pub(crate) fn widen(self, bytes: &[u8]) -> f32 {
        match (self, bytes) {
            (Self::F32, &[a, b, c, d]) => f32::from_le_bytes([a, b, c, d]),
            (Self::F16, &[a, b]) => half::f16::from_le_bytes([a, b]).to_f32(),
            (Self::BF16, &[a, b]) => half::bf16::from_le_bytes([a, b]).to_f32(),
            _ => unreachable!("an element has as many bytes as its dtype"),
        }
    }
}

/// A row-major tensor in somebody else's memory, usually a mapped file. The bytes need not be aligned.
#[derive(Clone, Copy, Debug)]
pub struct TensorView<'a> {
    /// Element type of `bytes`.
    pub dtype: Dtype,
    /// `[rows, cols]`; a vector is `[1, n]`.
    pub shape: [usize; 2],
    /// `rows * cols * dtype.bytes()` bytes, little endian.
    pub bytes: &'a [u8],
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

/// Which rows of a step a [`Buffer`] has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rows {
    /// One for each input token: at most [`Limits::max_tokens`].
    Tokens,
    /// One for each [`LogitsRow`]: at most [`Limits::max_logits_rows`].
    Logits,
}

/// The shape of attention and of the KV cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AttentionShape {
    /// Transformer layers that have a KV cache.
    pub n_layers: usize,
    /// Query heads, a multiple of `n_kv_heads`.
    pub n_heads: usize,
    /// Key and value heads.
    pub n_kv_heads: usize,
    /// Elements of a head; even, not necessarily `hidden / n_heads`.
    pub head_dim: usize,
    /// Token slots in a block.
    pub block_size: usize,
}

/// The largest step that a device must be ready for; the workspace is planned from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Input tokens of a step, prefill and decode together.
    pub max_tokens: usize,
    /// Sequences in a step; also the rows of the block-table matrix.
    pub max_sequences: usize,
    /// Rows of logits of a step.
    pub max_logits_rows: usize,
    /// Blocks of the longest sequence.
    pub max_blocks_per_sequence: usize,
}

/// Rotary position embedding: the angle of pair `i` (elements `i` and `i + head_dim / 2`) at position `p` is
/// `p * inverse_frequencies[i]`, computed in f32 as Transformers does; sine and cosine are scaled by `scale`.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// `[head_dim / 2]`, scaling (llama3 and the like) already applied.
    pub inverse_frequencies: Vec<f32>,
    /// The attention factor of some scalings; 1 otherwise.
    pub scale: f32,
    /// Positions that a step may name are below this.
    pub max_positions: usize,
}

/// What products, weights and the KV cache are kept in. Sums are always in binary32, and so are activations between
/// operations where the device is a CPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    /// Factors in bfloat16. Weights stored otherwise (F16, F32) are rounded to the nearest.
    BF16,
    /// Factors in binary32; weights stored in 16 bits are widened exactly.
    F32,
}

/// What every device is made from.
#[derive(Clone, Debug, PartialEq)]
pub struct DeviceConfig {
    /// The shape of attention and of the KV cache.
    pub attention: AttentionShape,
    /// The largest step.
    pub limits: Limits,
    /// Rotary position embedding.
    pub rope: Rope,
    /// What is multiplied.
    pub precision: Precision,
    /// Memory that the device may use in all, where it is less than what the device finds.
    pub memory_limit: Option<u64>,
}

/// A block of the KV cache; it holds [`AttentionShape::block_size`] tokens of every layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockId(pub u32);

/// A row of the device's block-table matrix, owned by one running sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TableRow(pub u32);

/// A change of one row of the block-table matrix: `row[first..first + blocks.len()] = blocks`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TableUpdate {
    /// The row to change.
    pub row: TableRow,
    /// Index of the first entry that changes.
    pub first: u32,
    /// The new entries.
    pub blocks: Vec<BlockId>,
}

/// One input token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TokenInput {
    /// A known token.
    Id(u32),
    /// What row `logits_row` of the step before sampled; its value may not have reached the host yet.
    Sampled {
        /// Index into the previous step's [`StepInput::logits`].
        logits_row: u32,
    },
}

/// Consecutive input tokens of one sequence: a prefill chunk, or one decode token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// Where the sequence's block table stands.
    pub row: TableRow,
    /// Index of its first token in [`StepInput::tokens`].
    pub first_token: u32,
    /// Its tokens; 0 makes the span inert.
    pub n_tokens: u32,
    /// Position of the first token, which is also the number of tokens of the sequence that are in the cache.
    pub first_position: u32,
}

/// How one token is drawn. The same parameters and logits give the same token on every device.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// 0 is greedy (ties go to the lowest id); otherwise logits are divided by it. Finite, >= 0.
    pub temperature: f32,
    /// Keep the smallest set of tokens whose probability reaches this; 1 keeps all. In (0, 1].
    pub top_p: f32,
    /// Keep the most likely ones only; `None` keeps all.
    pub top_k: Option<NonZeroU32>,
    /// Key of the generator.
    pub seed: u64,
    /// Index of the token among the outputs of its request: the generator's counter.
    pub output_index: u32,
}

/// What is wanted of one row of logits.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum LogitsWant {
    /// Draw a token.
    Sample(Sampling),
    /// Draw none, and report on this one (a prompt's log-probabilities).
    Score {
        /// The token to report.
        token: u32,
    },
}

/// One row of logits: the output of one input token.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LogitsRow {
    /// Index into [`StepInput::tokens`].
    pub token: u32,
    /// What to do with it.
    pub want: LogitsWant,
    /// Report log-probabilities: of the token itself and of this many of the most likely ones.
    pub n_logprobs: Option<u8>,
}

/// Everything that a step brings to the device, uploaded once. Copies run first, then table updates, then the pass.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StepInput {
    /// Blocks to copy, source and destination, every layer (copy-on-write). No destination occurs twice, or as a source.
    pub copies: Vec<(BlockId, BlockId)>,
    /// Changes of the block tables.
    pub table_updates: Vec<TableUpdate>,
    /// The input tokens, span after span.
    pub tokens: Vec<TokenInput>,
    /// Cut `tokens` into sequences, in order and without gaps.
    pub spans: Vec<Span>,
    /// The rows whose logits are wanted, by rising `token`.
    pub logits: Vec<LogitsRow>,
}

/// What one row of logits gave.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Sampled {
    /// The token drawn or scored.
    pub token: u32,
    /// Its natural log-probability under the model's own distribution (before temperature, top-p and top-k);
    /// `None` where none was asked for.
    pub logprob: Option<f32>,
    /// The most likely tokens and their log-probabilities, most likely first, ties by lowest id.
    pub top: Vec<(u32, f32)>,
}

/// What a step gave: one entry for each [`StepInput::logits`], in order.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StepOutput {
    /// By row of logits.
    pub sampled: Vec<Sampled>,
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

/// Why a device can't do what is asked.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// Not enough memory.
    #[error("{what} needs {needed_bytes} bytes, {available_bytes} are available")]
    OutOfMemory {
        /// What was to be allocated.
        what: &'static str,
        /// Its size.
        needed_bytes: u64,
        /// What is left.
        available_bytes: u64,
    },
    /// The device has no operation for this shape or dtype.
    #[error("the {device} device does not support {what}")]
    Unsupported {
        /// The device's name.
        device: &'static str,
        /// What was asked.
        what: String,
    },
    /// There is no such device here, or it can't be used.
    #[error("no {device} device can be used: {why}")]
    Unavailable {
        /// The device's name.
        device: &'static str,
        /// What is missing, with the numbers.
        why: String,
    },
    /// The device itself failed; nothing that it holds can be trusted any more.
    #[error("the {device} device failed: {message}")]
    Failed {
        /// The device's name.
        device: &'static str,
        /// Its own words.
        message: String,
    },
}

/// The operations of a forward pass. Shapes below: `T` tokens of the step, `L` rows of logits.
///
/// Calling one with handles of the wrong width, or with an output that is also an input, is a broken invariant of the
/// model, and panics.
pub trait Ops {
    /// `out[t] = table[token[t]]`: `out` is `[T, cols]`, `table` `[vocabulary, cols]`.
    fn embed(&mut self, out: Buffer, table: Weight);
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
    /// Rotates the query and key heads of `qkv` by their positions, in place, and appends keys and values to the
    /// cache of `layer`. `qkv` is `[T, (n_heads + 2 n_kv_heads) * head_dim]`: queries, keys, values.
    fn rope_append(&mut self, qkv: Buffer, layer: usize);
    /// Causal attention of the queries in `qkv` over the cached keys and values of `layer`, read through the block
    /// tables: `out` is `[T, n_heads * head_dim]` (PagedAttention, arXiv 2309.06180, section 4.1).
    fn attention(&mut self, out: Buffer, qkv: Buffer, layer: usize, scale: f32);
    /// `out[t] = silu(gate[t]) * up[t]`: `gate_up` is `[T, 2 n]`, gate first, `out` `[T, n]`.
    fn swiglu(&mut self, out: Buffer, gate_up: Buffer);
    /// `out[l] = x[token of logits row l]`: from `[T, n]` to `[L, n]`.
    fn gather_logits_rows(&mut self, out: Buffer, x: Buffer);
    /// Sum over the ranks of a tensor-parallel group; the identity on one rank.
    fn all_reduce(&mut self, x: Buffer);
    /// Draws or scores the rows of `logits`, `[L, vocabulary]`, as [`StepInput::logits`] asks.
    fn sample(&mut self, logits: Buffer);
}

/// A device: owns weights, workspace, KV cache and block tables.
///
/// In order: prepare weights and plan buffers (the model does), [`Device::allocate_kv`] once, then steps.
pub trait Device: Send {
    /// One line for the log: what it is and what it uses, e.g. `cpu: AVX-512 bf16, 2 threads`.
    fn describe(&self) -> String;
    /// Steps that may be under way at once: 1, or 2 where the device runs ahead of the host.
    fn depth(&self) -> usize;

    /// Prepares a matrix from its parts, stacked along the rows: `[sum of rows, cols]`. All parts have equal `cols`.
    fn prepare_weight(&mut self, parts: &[TensorView<'_>]) -> Result<Weight, DeviceError>;
    /// Prepares a vector from its parts, one after another.
    fn prepare_vector(&mut self, parts: &[TensorView<'_>]) -> Result<Vector, DeviceError>;
    /// Plans an activation buffer of `cols` columns.
    fn plan_buffer(&mut self, rows: Rows, cols: usize) -> Result<Buffer, DeviceError>;
    /// Plans the buffer of the logits, `[L, vocabulary]`: in binary32 on every device, for [`Ops::sample`].
    fn plan_logits(&mut self, vocabulary: usize) -> Result<Buffer, DeviceError> {
        self.plan_buffer(Rows::Logits, vocabulary)
    }

    /// What is used, once the model is built.
    fn memory(&self) -> Memory;
    /// Bytes of one KV block, all layers.
    fn block_bytes(&self) -> u64;
    /// Allocates the KV cache: blocks `0..n_blocks`.
    fn allocate_kv(&mut self, n_blocks: u32) -> Result<(), DeviceError>;

    /// Starts a step: uploads `input`, runs (or replays) `forward`. At most [`Device::depth`] are under way.
    fn submit(
        &mut self,
        input: &StepInput,
        forward: &mut dyn FnMut(&mut dyn Ops),
    ) -> Result<Ticket, DeviceError>;
    /// Waits for the oldest step under way.
    fn collect(&mut self, ticket: Ticket) -> Result<StepOutput, DeviceError>;

    /// The values of a buffer as the last step left them, row after row: for tests and tools, never in serving.
    fn read(&mut self, buffer: Buffer) -> Result<Vec<f32>, DeviceError>;
}
