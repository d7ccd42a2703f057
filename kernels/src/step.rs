//! What a step means, in host memory: tokens resolved, positions derived, block tables kept, all indices checked.
//!
//! Every device shares it. It knows no arithmetic and no memory of a device. A step that breaks
//! an invariant panics here, before any kernel sees an index.

use crate::device::{
    BlockId, DeviceConfig, LogitsRow, LogitsWant, Span, StepInput, StepOutput, TableRow, Ticket,
    TokenInput,
};

/// The block-table matrix and the step under way. Vectors keep their capacity from step to step.
#[derive(Debug)]
pub(crate) struct Step {
    block_size: usize,
    max_tokens: usize,
    max_logits_rows: usize,
    max_positions: usize,
    table_width: usize,
    tables: Vec<u32>,
    n_blocks: u32,
    /// Token ids, by input token.
    pub(crate) tokens: Vec<u32>,
    /// Positions, by input token.
    pub(crate) positions: Vec<u32>,
    /// Rows of the block-table matrix, by input token.
    pub(crate) rows: Vec<TableRow>,
    /// The spans that have tokens.
    pub(crate) spans: Vec<Span>,
    /// The rows of logits.
    pub(crate) logits: Vec<LogitsRow>,
    previous: Previous,
}

/// The book of a device that runs each step when it is submitted: one result, until it is collected.
#[derive(Debug, Default)]
pub(crate) struct Finished {
    next_ticket: u64,
    output: Option<(u64, StepOutput)>,
}

impl Finished {
    /// A step may be submitted only once the one before it was collected.
    pub(crate) fn assert_collected(&self) {
        assert!(self.output.is_none(), "a step is under way already");
    }

    /// Keeps what a step gave.
    pub(crate) fn put(&mut self, output: StepOutput) -> Ticket {
        let ticket = self.next_ticket;
        self.output = Some((ticket, output));
        self.next_ticket += 1;
        Ticket(ticket)
    }

    /// Gives it away.
    pub(crate) fn take(&mut self, ticket: Ticket) -> StepOutput {
        let (number, output) = self
            .output
            .take()
            .expect("a step was submitted before it is collected");
        assert_eq!(number, ticket.0, "the ticket of another step");
        output
    }
}

/// Marks a token that is not known on the host: the rest is the index of a row of logits of the step before.
pub(crate) const ON_DEVICE: u32 = 1 << 31;

/// Where the tokens are that the step before drew.
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

impl Step {
    /// Tables of zeros, and no step yet. Drawn tokens are kept here ([`Step::end`]).
    pub(crate) fn new(config: &DeviceConfig) -> Self {
        let room = Vec::with_capacity(config.limits.max_logits_rows);
        Self::with(config, Previous::Known(room))
    }

    /// The same for a device that keeps its draws: in `tokens` they are [`ON_DEVICE`] and a row of logits.
    #[cfg(any(feature = "cuda", feature = "cuda-shim"))]
    pub(crate) fn deferred(config: &DeviceConfig) -> Self {
        Self::with(config, Previous::OnDevice)
    }

    fn with(config: &DeviceConfig, previous: Previous) -> Self {
        let limits = &config.limits;
        Self {
            block_size: config.attention.block_size,
            max_tokens: limits.max_tokens,
            max_logits_rows: limits.max_logits_rows,
            max_positions: config.rope.max_positions,
            table_width: limits.max_blocks_per_sequence,
            tables: vec![0; limits.max_sequences * limits.max_blocks_per_sequence],
            n_blocks: 0,
            tokens: Vec::with_capacity(limits.max_tokens),
            positions: Vec::with_capacity(limits.max_tokens),
            rows: Vec::with_capacity(limits.max_tokens),
            spans: Vec::with_capacity(limits.max_sequences),
            logits: Vec::with_capacity(limits.max_logits_rows),
            previous,
        }
    }

    /// The KV cache has this many blocks from now on.
    pub(crate) fn set_n_blocks(&mut self, n_blocks: u32) {
        self.n_blocks = n_blocks;
    }

    /// Takes a step's input over: table updates, tokens, positions. Copies are the device's to do, before.
    pub(crate) fn begin(&mut self, input: &StepInput) {
        for update in &input.table_updates {
            self.update_table(update.row, update.first as usize, &update.blocks);
        }
        assert!(
            input.tokens.len() <= self.max_tokens,
            "a step of {} tokens, planned {}",
            input.tokens.len(),
            self.max_tokens
        );
        assert!(
            input
                .tokens
                .iter()
                .all(|t| !matches!(t, TokenInput::Id(id) if *id >= ON_DEVICE)),
            "a token id out of range"
        );
        self.resolve_tokens(&input.tokens);
        self.place_spans(&input.spans);
        assert_eq!(
            self.positions.len(),
            self.tokens.len(),
            "the spans do not cover the tokens"
        );
        self.take_logits(&input.logits);
    }

    /// Keeps the drawn tokens: the next step's [`TokenInput::Sampled`].
    pub(crate) fn end(&mut self, output: &StepOutput) {
        if let Previous::Known(tokens) = &mut self.previous {
            tokens.clear();
            tokens.extend(output.sampled.iter().map(|sampled| sampled.token));
        }
    }

    /// The blocks of a table row, all of them below the number of blocks.
    pub(crate) fn table(&self, row: TableRow) -> &[u32] {
        &self.tables[row.0 as usize * self.table_width..][..self.table_width]
    }

    /// Where a position of a sequence lies: block and slot.
    pub(crate) fn slot(&self, row: TableRow, position: u32) -> (usize, usize) {
        let position = position as usize;
        (
            self.table(row)[position / self.block_size] as usize,
            position % self.block_size,
        )
    }

    /// Asserts that a copy stays inside the cache.
    pub(crate) fn check_copy(&self, (from, to): (BlockId, BlockId)) {
        assert!(
            from.0 < self.n_blocks && to.0 < self.n_blocks,
            "copy of a block outside the cache"
        );
    }

    fn update_table(&mut self, row: TableRow, first: usize, blocks: &[BlockId]) {
        assert!(
            first + blocks.len() <= self.table_width,
            "table update past the longest sequence"
        );
        let start = row.0 as usize * self.table_width + first;
        for (entry, block) in self.tables[start..start + blocks.len()]
            .iter_mut()
            .zip(blocks)
        {
            assert!(
                block.0 < self.n_blocks,
                "block {} of {}",
                block.0,
                self.n_blocks
            );
            *entry = block.0;
        }
    }

    fn resolve_tokens(&mut self, tokens: &[TokenInput]) {
        self.tokens.clear();
        for token in tokens {
            self.tokens.push(match *token {
                TokenInput::Id(id) => id,
                TokenInput::Sampled { logits_row } => match &self.previous {
                    Previous::Known(tokens) => tokens[logits_row as usize],
                    Previous::OnDevice => {
                        // `logits` still holds the rows of the step before.
                        assert!(
                            (logits_row as usize) < self.logits.len(),
                            "a token of a row that the step before did not have"
                        );
                        ON_DEVICE | logits_row
                    }
                },
            });
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
                (span.row.0 as usize) < self.tables.len() / self.table_width.max(1),
                "table row out of range"
            );
            self.positions
                .extend((span.first_position..).take(span.n_tokens as usize));
            self.rows
                .extend(std::iter::repeat_n(span.row, span.n_tokens as usize));
            self.spans.push(*span);
        }
    }

    fn take_logits(&mut self, logits: &[LogitsRow]) {
        assert!(
            logits.len() <= self.max_logits_rows,
            "{} rows of logits, planned {}",
            logits.len(),
            self.max_logits_rows
        );
        for row in logits {
            assert!(
                (row.token as usize) < self.tokens.len(),
                "logits of a token that is not in the step"
            );
            if let LogitsWant::Sample(sampling) = row.want {
                assert!(
                    sampling.temperature >= 0.0 && sampling.temperature.is_finite(),
                    "temperature out of range"
                );
                assert!(
                    sampling.top_p > 0.0 && sampling.top_p <= 1.0,
                    "top_p out of range"
                );
            }
        }
        self.logits.clear();
        self.logits.extend_from_slice(logits);
    }
}
