//! What a step brings to a device and what it gives; and the one place where every index of it is checked, for all
//! devices, before any of them touches memory.
//!
//! It knows block tables and positions, never requests; a device adds where things lie.

mod edit;

use std::num::NonZeroU32;

use crate::shape::{CacheShape, Model, ModelShape};
pub use edit::{LogitsEdit, Penalties, SeenToken, TokenBias};

/// A block of the KV cache: one page, which holds [`ModelShape::block_size`] tokens of every layer of one cache group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockId(pub u32);

/// A row of each group's block-table matrix, owned by one running sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TableRow(pub u32);

/// A change of one row of a group's block-table matrix: `row[first..first + blocks.len()] = blocks`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TableUpdate {
    /// Index into [`ModelShape::groups`].
    pub group: u32,
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
    /// What row `logits_row` of the same model's step before sampled; it may not have reached the host yet.
    Sampled {
        /// Index into the previous step's [`StepInput::logits`].
        logits_row: u32,
    },
}

/// Consecutive input tokens of one sequence: a prefill chunk, one decode token, or a few tokens to verify.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// Where the sequence's block tables stand.
    pub row: TableRow,
    /// Index of its first token in [`StepInput::tokens`].
    pub first_token: u32,
    /// Its tokens; 0 makes the span inert.
    pub n_tokens: u32,
    /// Position of the first token, which is also the number of tokens of the sequence that are in the cache.
    pub first_position: u32,
}

/// Spans of up to this many tokens are planned, and on a GPU captured, as that many decodes.
pub const MAX_DECODE_TOKENS: u32 = 8;

/// Everything that a step brings to the device before its pass, uploaded once. Copies run first, then table updates, then
/// the pass.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StepInput {
    /// Whose step it is.
    pub model: Model,
    /// Blocks to copy, source and destination (copy-on-write). No destination occurs twice, or as a source.
    pub copies: Vec<(BlockId, BlockId)>,
    /// Changes of the block tables.
    pub table_updates: Vec<TableUpdate>,
    /// The input tokens, span after span.
    pub tokens: Vec<TokenInput>,
    /// Cut `tokens` into sequences, in order and without gaps.
    pub spans: Vec<Span>,
    /// The token of each row of logits, an index into `tokens`; never falling. Several rows may name one token.
    pub logits: Vec<u32>,
}

/// How a token is sampled. The same parameters, output index and logits give the same token on every device.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SamplingParams {
    /// 0 is greedy (ties go to the lowest id); otherwise logits are divided by it. Finite, >= 0.
    pub temperature: f32,
    /// Keep the smallest set of tokens whose probability reaches this; 1 keeps all. In (0, 1].
    pub top_p: f32,
    /// Keep the most likely ones only; `None` keeps all.
    pub top_k: Option<NonZeroU32>,
    /// Keep the tokens that are at least so likely, as a share of the likeliest one's probability; 0 keeps all. In
    /// [0, 1].
    pub min_p: f32,
    /// Key of the generator.
    pub seed: u64,
}

impl SamplingParams {
    /// The most likely token.
    pub const GREEDY: Self = Self {
        temperature: 0.0,
        top_p: 1.0,
        top_k: None,
        min_p: 0.0,
        seed: 0,
    };
}

/// What is wanted of one row of logits.
#[derive(Clone, Debug, PartialEq)]
pub enum LogitsRequest {
    /// Sample a token.
    Sample {
        /// How.
        params: SamplingParams,
        /// Index of the token among the outputs of its sequence: the generator's counter.
        output_index: u32,
        /// What changes the row before.
        edit: LogitsEdit,
    },
    /// Sample none, and report on this one (a prompt's log-probabilities).
    Score {
        /// The token to report.
        token: u32,
    },
}

/// What is wanted of one row of logits, and what is to be reported with it.
#[derive(Clone, Debug, PartialEq)]
pub struct LogitsRow {
    /// What to do with the row.
    pub request: LogitsRequest,
    /// Report log-probabilities: of the token itself and of this many of the most likely ones.
    pub n_logprobs: Option<u8>,
}

/// What one row of logits gave.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Sampled {
    /// The token sampled or scored.
    pub token: u32,
    /// Its natural log-probability under the model's own distribution (before temperature, top-p and top-k);
    /// `None` where none was asked for.
    pub logprob: Option<f32>,
    /// The most likely tokens and their log-probabilities, most likely first, ties by lowest id.
    pub top: Vec<(u32, f32)>,
}

/// What a step gave: one entry for each [`StepInput::logits`], in order.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct DeviceOutput {
    /// By row of logits.
    pub sampled: Vec<Sampled>,
}

/// Marks a token that is not known on the host: the rest is the index of a row of logits of the step before.
pub(crate) const ON_DEVICE: u32 = 1 << 31;

/// Where the tokens are that the step before sampled.
#[derive(Debug)]
enum Previous {
    /// Here, by row of logits.
    Known(Vec<u32>),
    /// On the device, which looks them up itself.
    #[cfg_attr(
        not(any(feature = "cuda", feature = "cuda-shim")),
        expect(dead_code, reason = "only CUDA runs ahead of the host")
    )]
    OnDevice,
}

/// One model's block tables and its step under way, every index of it in range. Vectors keep their capacity.
#[derive(Debug)]
pub(crate) struct Step {
    block_size: usize,
    vocab_size: usize,
    max_tokens: usize,
    max_sequences: usize,
    max_logits_rows: usize,
    max_positions: usize,
    table_width: usize,
    n_groups: usize,
    /// `[group][row][block]`
    tables: Vec<u32>,
    n_blocks: u32,
    /// Token ids, by input token.
    pub(crate) tokens: Vec<u32>,
    /// Positions, by input token.
    pub(crate) positions: Vec<u32>,
    /// Rows of the block tables, by input token.
    pub(crate) rows: Vec<TableRow>,
    /// The spans that have tokens.
    pub(crate) spans: Vec<Span>,
    /// The token of each row of logits.
    pub(crate) logits: Vec<u32>,
    previous: Previous,
    n_previous: usize,
}

impl Step {
    /// Tables of zeros, and no step yet. Sampled tokens are kept here ([`Step::end`]).
    pub(crate) fn new(shape: &ModelShape) -> Self {
        let room = Vec::with_capacity(shape.limits.max_logits_rows);
        Self::with(shape, Previous::Known(room))
    }

    /// The same for a device that keeps its samples: in `tokens` they are [`ON_DEVICE`] and a row of logits.
    #[cfg(any(feature = "cuda", feature = "cuda-shim"))]
    pub(crate) fn deferred(shape: &ModelShape) -> Self {
        Self::with(shape, Previous::OnDevice)
    }

    fn with(shape: &ModelShape, previous: Previous) -> Self {
        let limits = &shape.limits;
        let n_groups = shape.groups.len();
        assert!(
            shape.vocab_size <= ON_DEVICE as usize,
            "token ids have 31 bits"
        );
        Self {
            block_size: shape.block_size,
            vocab_size: shape.vocab_size,
            max_tokens: limits.max_tokens,
            max_sequences: limits.max_sequences,
            max_logits_rows: limits.max_logits_rows,
            max_positions: shape.max_positions,
            table_width: limits.max_blocks_per_sequence,
            n_groups,
            tables: vec![0; n_groups * limits.max_sequences * limits.max_blocks_per_sequence],
            n_blocks: 0,
            tokens: Vec::with_capacity(limits.max_tokens),
            positions: Vec::with_capacity(limits.max_tokens),
            rows: Vec::with_capacity(limits.max_tokens),
            spans: Vec::with_capacity(limits.max_sequences),
            logits: Vec::with_capacity(limits.max_logits_rows),
            previous,
            n_previous: 0,
        }
    }

    /// The KV cache has this many blocks from now on.
    pub(crate) fn set_n_blocks(&mut self, n_blocks: u32) {
        self.n_blocks = n_blocks;
    }

    /// Takes a step's input over, every index checked: copies, table updates, tokens, positions, rows of logits. What
    /// it asserts is the scheduler's to keep; a device may rely on it in its proofs of memory safety.
    pub(crate) fn begin(&mut self, input: &StepInput) {
        for &(from, to) in &input.copies {
            assert!(
                from.0 < self.n_blocks && to.0 < self.n_blocks,
                "copy of a block outside the cache"
            );
        }
        for update in &input.table_updates {
            self.update_table(update);
        }
        assert!(
            input.tokens.len() <= self.max_tokens,
            "a step of {} tokens, planned {}",
            input.tokens.len(),
            self.max_tokens
        );
        self.n_previous = self.logits.len();
        self.resolve_tokens(&input.tokens);
        self.place_spans(&input.spans);
        assert_eq!(
            self.positions.len(),
            self.tokens.len(),
            "the spans do not cover the tokens"
        );
        self.take_logits(&input.logits);
    }

    /// Checks what is wanted of the step's rows of logits, one for each.
    pub(crate) fn check_requests(&self, requests: &[LogitsRow]) {
        assert_eq!(
            requests.len(),
            self.logits.len(),
            "each row of logits is asked for something"
        );
        for row in requests {
            match &row.request {
                LogitsRequest::Sample { params, edit, .. } => {
                    assert!(
                        params.temperature >= 0.0 && params.temperature.is_finite(),
                        "temperature out of range"
                    );
                    assert!(
                        params.top_p > 0.0 && params.top_p <= 1.0,
                        "top_p out of range"
                    );
                    assert!((0.0..=1.0).contains(&params.min_p), "min_p out of range");
                    edit.check(self.vocab_size);
                }
                LogitsRequest::Score { token } => self.check_token(*token),
            }
        }
    }

    /// Keeps the sampled tokens: the next step's [`TokenInput::Sampled`].
    pub(crate) fn end(&mut self, output: &DeviceOutput) {
        if let Previous::Known(tokens) = &mut self.previous {
            tokens.clear();
            tokens.extend(output.sampled.iter().map(|sampled| sampled.token));
        }
    }

    /// The blocks of a row of a group's table, all of them below the number of blocks.
    pub(crate) fn table(&self, group: usize, row: TableRow) -> &[u32] {
        &self.tables[self.table_start(group, row)..][..self.table_width]
    }

    /// Where a position of a sequence lies in a group: block and slot.
    pub(crate) fn slot(&self, group: usize, row: TableRow, position: u32) -> (usize, usize) {
        let position = position as usize;
        (
            self.table(group, row)[position / self.block_size] as usize,
            position % self.block_size,
        )
    }

    /// The positions that a token sees in a cache, its own the last.
    pub(crate) fn visible(
        &self,
        cache: &CacheShape,
        token: usize,
    ) -> std::ops::RangeInclusive<u32> {
        let position = self.positions[token];
        cache.first_visible(position)..=position
    }

    fn table_start(&self, group: usize, row: TableRow) -> usize {
        assert!(
            group < self.n_groups,
            "cache group {group} of {}",
            self.n_groups
        );
        assert!(
            (row.0 as usize) < self.max_sequences,
            "table row {} of {}",
            row.0,
            self.max_sequences
        );
        (group * self.max_sequences + row.0 as usize) * self.table_width
    }

    fn update_table(&mut self, update: &TableUpdate) {
        let first = update.first as usize;
        assert!(
            first + update.blocks.len() <= self.table_width,
            "table update past the longest sequence"
        );
        let start = self.table_start(update.group as usize, update.row) + first;
        let entries = &mut self.tables[start..start + update.blocks.len()];
        for (entry, block) in entries.iter_mut().zip(&update.blocks) {
            assert!(
                block.0 < self.n_blocks,
                "block {} of {}",
                block.0,
                self.n_blocks
            );
            *entry = block.0;
        }
    }

    fn check_token(&self, id: u32) {
        assert!(
            (id as usize) < self.vocab_size,
            "token {id} of a vocabulary of {}",
            self.vocab_size
        );
    }

    fn resolve_tokens(&mut self, tokens: &[TokenInput]) {
        self.tokens.clear();
        for token in tokens {
            let id = match *token {
                TokenInput::Id(id) => {
                    self.check_token(id);
                    id
                }
                TokenInput::Sampled { logits_row } => match &self.previous {
                    Previous::Known(tokens) => tokens[logits_row as usize],
                    Previous::OnDevice => {
                        assert!(
                            (logits_row as usize) < self.n_previous,
                            "a token of a row that the step before did not have"
                        );
                        ON_DEVICE | logits_row
                    }
                },
            };
            self.tokens.push(id);
        }
    }

    fn place_spans(&mut self, spans: &[Span]) {
        self.positions.clear();
        self.rows.clear();
        self.spans.clear();
        for span in spans.iter().filter(|span| span.n_tokens > 0) {
            assert_eq!(
                span.first_token as usize,
                self.positions.len(),
                "spans must follow each other without gaps"
            );
            let end = span.first_position as usize + span.n_tokens as usize;
            assert!(
                end <= self.max_positions,
                "position {end} of {}",
                self.max_positions
            );
            assert!(
                end <= self.table_width * self.block_size,
                "position {end} past the block table"
            );
            assert!(
                (span.row.0 as usize) < self.max_sequences,
                "table row {} of {}",
                span.row.0,
                self.max_sequences
            );
            self.positions
                .extend((span.first_position..).take(span.n_tokens as usize));
            self.rows
                .extend(std::iter::repeat_n(span.row, span.n_tokens as usize));
            self.spans.push(*span);
        }
        assert!(
            self.spans.len() <= self.max_sequences,
            "{} sequences in a step, planned {}",
            self.spans.len(),
            self.max_sequences
        );
    }

    fn take_logits(&mut self, logits: &[u32]) {
        assert!(
            logits.len() <= self.max_logits_rows,
            "{} rows of logits, planned {}",
            logits.len(),
            self.max_logits_rows
        );
        assert!(
            logits.is_sorted()
                && logits
                    .last()
                    .is_none_or(|&t| (t as usize) < self.tokens.len()),
            "logits of a token that is not in the step, or out of order"
        );
        self.logits.clear();
        self.logits.extend_from_slice(logits);
    }
}

#[cfg(test)]
mod tests;
