//! Continuous batching: which tokens of which sequences run in the next step, and what a finished step means.
//!
//! Pure: it knows no clock, no device and no threads. Each step is one mixed batch under one token budget: decodes
//! first (one token each), then prefill chunks, then new sequences in the order of their arrival. A sequence is
//! admitted only when all its known tokens fit, so that only decodes grow a table; when the pool is empty, the
//! newest sequence is preempted and computed again later (arXiv 2309.06180, section 4.5), its outputs kept.
//!
//! At most one step is under way when the next is scheduled. Because a device runs its steps in order, the blocks of
//! a sequence that has ended are free at once, even while a step that was scheduled too far still writes to them:
//! whoever gets them writes later.

mod sequence;

use std::collections::VecDeque;

use kvasir_kernels::device::{
    Limits, LogitsRow, LogitsWant, Span, StepInput, StepOutput, TableRow, TableUpdate,
};

use super::blocks::{BlockPool, BlockTable};
use super::{FinishReason, Request, RequestId, RequestOutput, TokenLogprobs};
use sequence::{Draw, Sequence};

/// A sequence that has a row of the block-table matrix.
#[derive(Debug)]
struct Running {
    sequence: Sequence,
    table: BlockTable,
    /// Tokens that are in the cache or under way there.
    n_scheduled: u32,
}

/// What a span of a step will report, in the order of the rows of logits.
#[derive(Debug)]
struct Expected {
    id: RequestId,
    row: TableRow,
    n_scores: u32,
    draws: bool,
    /// Nothing is generated, and the prompt is complete with this span.
    ends: bool,
}

/// What changed since the last look, for those who keep times and counts.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// Requests that started to run.
    pub admitted: Vec<RequestId>,
    /// Requests that wait again.
    pub preempted: Vec<RequestId>,
}

/// Requests and tokens by state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Load {
    /// Requests in the running batch.
    pub n_running: u32,
    /// Requests that wait, preempted ones included.
    pub n_waiting: u32,
    /// Blocks that the waiting requests need to start.
    pub waiting_blocks: u64,
    /// Prompt tokens that are not computed.
    pub prefill_backlog_tokens: u64,
}

/// The queue, the running sequences and the steps under way.
#[derive(Debug)]
pub struct Scheduler {
    limits: Limits,
    max_model_len: u32,
    /// In order of arrival; preempted ones are older than all that never ran, and stand in front.
    waiting: VecDeque<Sequence>,
    /// By row of the block-table matrix.
    rows: Vec<Option<Running>>,
    free_rows: Vec<TableRow>,
    /// The rows in use, oldest sequence first.
    order: Vec<TableRow>,
    in_flight: VecDeque<Vec<Expected>>,
    n_steps: u64,
    changes: Changes,
}

impl Scheduler {
    /// An empty scheduler. A step must hold a token and a row of logits for each sequence, or some would starve.
    pub fn new(limits: Limits, max_model_len: u32) -> Self {
        assert!(
            limits.max_tokens >= limits.max_sequences,
            "each sequence may decode in each step"
        );
        assert!(
            limits.max_logits_rows >= limits.max_sequences,
            "each sequence may draw in each step"
        );
        Self {
            limits,
            max_model_len,
            waiting: VecDeque::new(),
            rows: (0..limits.max_sequences).map(|_| None).collect(),
            free_rows: (0..limits.max_sequences as u32)
                .rev()
                .map(TableRow)
                .collect(),
            order: Vec::new(),
            in_flight: VecDeque::new(),
            n_steps: 0,
            changes: Changes::default(),
        }
    }

    /// Queues a request that fits the pool when it is alone there.
    pub fn add(&mut self, request: Request) {
        self.waiting
            .push_back(Sequence::new(request, self.max_model_len));
    }

    /// Forgets a request; its blocks are free. Unknown ones, ended before, are no mistake.
    pub fn abort(&mut self, blocks: &mut BlockPool, id: RequestId) {
        match self
            .order
            .iter()
            .copied()
            .find(|&row| self.running(row).sequence.id == id)
        {
            Some(row) => drop(self.stop_running(blocks, row)),
            None => self.waiting.retain(|sequence| sequence.id != id),
        }
    }

    /// Forgets all requests, and names them, oldest first.
    pub fn abort_all(&mut self, blocks: &mut BlockPool) -> Vec<RequestId> {
        let running = std::mem::take(&mut self.order);
        let mut ids: Vec<RequestId> = running
            .iter()
            .map(|&row| self.stop_running(blocks, row).id)
            .collect();
        ids.extend(self.waiting.drain(..).map(|sequence| sequence.id));
        ids
    }

    /// The next batch, or `None` where nothing can run before a step under way has been committed.
    pub fn schedule(&mut self, blocks: &mut BlockPool) -> Option<StepInput> {
        let mut batch = Batch::default();
        let preempted = self.schedule_decodes(blocks, &mut batch);
        for i in 0..self.order.len() {
            let row = self.order[i];
            if self.running(row).n_ready() > 1 {
                self.schedule_chunk(row, &mut batch);
            }
        }
        if !preempted {
            self.admit(blocks, &mut batch);
        }
        if batch.input.tokens.is_empty() {
            return None;
        }
        self.n_steps += 1;
        self.in_flight.push_back(batch.expected);
        Some(batch.input)
    }

    /// Takes what the oldest step under way gave: appends outputs, ends requests, frees their blocks.
    pub fn commit(&mut self, blocks: &mut BlockPool, output: StepOutput) -> Vec<RequestOutput> {
        let expected = self
            .in_flight
            .pop_front()
            .expect("a step that is committed was scheduled");
        let mut sampled = output.sampled.into_iter().map(TokenLogprobs::from);
        let mut outputs = Vec::with_capacity(expected.len());
        for Expected {
            id,
            row,
            n_scores,
            draws,
            ends,
        } in expected
        {
            let mut output = RequestOutput {
                id,
                sequence: 0,
                prompt_logprobs: sampled.by_ref().take(n_scores as usize).collect(),
                tokens: sampled.by_ref().take(usize::from(draws)).collect(),
                finished: ends.then_some(FinishReason::Length),
            };
            assert_eq!(
                output.prompt_logprobs.len() + output.tokens.len(),
                n_scores as usize + usize::from(draws)
            );
            // Ended while this step was under way: it ran too far, and what it gave is dropped.
            let Some(sequence) = self.find(id, row) else {
                continue;
            };
            if let Some(token) = output.tokens.first() {
                output.finished = sequence.commit(token.token);
            }
            if output.finished.is_some() {
                self.end(blocks, id, row);
            }
            outputs.push(output);
        }
        outputs
    }

    /// Steps that were scheduled and not committed.
    pub fn n_in_flight(&self) -> usize {
        self.in_flight.len()
    }

    /// No request is queued or runs, and no step is under way.
    pub fn is_idle(&self) -> bool {
        self.order.is_empty() && self.waiting.is_empty() && self.in_flight.is_empty()
    }

    /// The request that waits at the head of the queue.
    pub fn oldest_waiting(&self) -> Option<RequestId> {
        self.waiting.front().map(|sequence| sequence.id)
    }

    /// Who was admitted and who was preempted since the last call.
    pub fn take_changes(&mut self) -> Changes {
        std::mem::take(&mut self.changes)
    }

    /// Requests and tokens by state.
    pub fn load(&self, blocks: &BlockPool) -> Load {
        let waiting = self.waiting.iter();
        let backlog = waiting
            .clone()
            .map(|s| s.n_prompt_after(0))
            .chain(self.order.iter().map(|&row| {
                let running = self.running(row);
                running.sequence.n_prompt_after(running.n_scheduled)
            }));
        Load {
            n_running: self.order.len() as u32,
            n_waiting: self.waiting.len() as u32,
            waiting_blocks: waiting
                .map(|s| u64::from(blocks.blocks_for(s.n_known())))
                .sum(),
            prefill_backlog_tokens: backlog.map(u64::from).sum(),
        }
    }

    /// One token of each sequence that has one ready, oldest first. When the pool is empty the newest sequence makes
    /// room, at last the one itself that asks: a newer one than it is never in the batch yet.
    fn schedule_decodes(&mut self, blocks: &mut BlockPool, batch: &mut Batch) -> bool {
        let mut preempted = false;
        let mut i = 0;
        while i < self.order.len() {
            let row = self.order[i];
            i += 1;
            if self.running(row).n_ready() != 1 {
                continue;
            }
            let running = self.rows[row.0 as usize]
                .as_mut()
                .expect("a row in the order runs");
            let first = running.table.blocks().len() as u32;
            match blocks.extend(&mut running.table, running.n_scheduled + 1) {
                Some([]) => {}
                Some(new) => batch.update_table(row, first, new),
                None => {
                    preempted = true;
                    let newest = *self
                        .order
                        .last()
                        .expect("the one that asks is in the order");
                    self.preempt(blocks, newest);
                    i -= usize::from(newest != row);
                    continue;
                }
            }
            self.schedule_chunk(row, batch);
        }
        preempted
    }

    /// Admits from the head of the queue while there is room for all known tokens of the next, and beyond that a
    /// block for each that runs: without it a sequence would be admitted only to be preempted a few steps later.
    fn admit(&mut self, blocks: &mut BlockPool, batch: &mut Batch) {
        while let Some(next) = self.waiting.front()
            && !next.is_pending()
            && batch.input.tokens.len() < self.limits.max_tokens
            && let Some(&row) = self.free_rows.last()
        {
            let headroom = if self.order.is_empty() {
                0
            } else {
                self.order.len() as u32 + 1
            };
            if blocks.blocks_for(next.n_known()) + headroom > blocks.n_free() {
                return;
            }
            let Some(table) = blocks.allocate(next.n_known()) else {
                return;
            };
            let Some(sequence) = self.waiting.pop_front() else {
                return;
            };
            self.free_rows.pop();
            self.changes.admitted.push(sequence.id);
            batch.update_table(row, 0, table.blocks());
            self.rows[row.0 as usize] = Some(Running {
                sequence,
                table,
                n_scheduled: 0,
            });
            self.order.push(row);
            self.schedule_chunk(row, batch);
        }
    }

    /// Adds the next tokens of a running sequence, as many as are ready and as the budgets allow.
    fn schedule_chunk(&mut self, row: TableRow, batch: &mut Batch) {
        let Self {
            rows,
            limits,
            n_steps,
            ..
        } = self;
        let running = rows[row.0 as usize]
            .as_mut()
            .expect("a row in the order runs");
        let sequence = &mut running.sequence;
        let n_tokens = (limits.max_tokens - batch.input.tokens.len()) as u32;
        let n_rows = (limits.max_logits_rows - batch.input.logits.len()) as u32;
        let chunk = sequence.chunk(running.n_scheduled, n_tokens, n_rows);
        if chunk.is_empty() {
            return;
        }
        running.n_scheduled = chunk.end;

        let previous_step = n_steps.checked_sub(1);
        let first_token = batch.input.tokens.len() as u32;
        batch.input.tokens.extend(
            chunk
                .clone()
                .map(|position| sequence.input(position, previous_step)),
        );
        batch.input.spans.push(Span {
            row,
            first_token,
            n_tokens: chunk.end - chunk.start,
            first_position: chunk.start,
        });

        let token_at = |position: u32| first_token + position - chunk.start;
        let n_logprobs = sequence.prompt_logprobs;
        let n_before = batch.input.logits.len();
        batch
            .input
            .logits
            .extend(
                sequence
                    .ask_scores(chunk.clone())
                    .map(|(position, want)| LogitsRow {
                        token: token_at(position),
                        want,
                        n_logprobs,
                    }),
            );
        let n_scores = (batch.input.logits.len() - n_before) as u32;
        let draw = Draw {
            step: *n_steps,
            logits_row: batch.input.logits.len() as u32,
        };
        let output: Option<LogitsWant> = sequence.ask_output(chunk.end, draw);
        let draws = output.is_some();
        batch.input.logits.extend(output.map(|want| LogitsRow {
            token: token_at(chunk.end - 1),
            want,
            n_logprobs: sequence.logprobs,
        }));
        let ends = sequence.ends_with_prompt(chunk.end);
        if n_scores > 0 || draws || ends {
            batch.expected.push(Expected {
                id: sequence.id,
                row,
                n_scores,
                draws,
                ends,
            });
        }
    }

    fn preempt(&mut self, blocks: &mut BlockPool, row: TableRow) {
        let sequence = self.stop_running(blocks, row);
        self.changes.preempted.push(sequence.id);
        self.waiting.push_front(sequence);
    }

    fn end(&mut self, blocks: &mut BlockPool, id: RequestId, row: TableRow) {
        if self.runs_in(row, id) {
            self.stop_running(blocks, row);
        } else {
            self.waiting.retain(|sequence| sequence.id != id);
        }
    }

    /// Takes a sequence out of the running batch; its blocks and its row are free.
    fn stop_running(&mut self, blocks: &mut BlockPool, row: TableRow) -> Sequence {
        let running = self.rows[row.0 as usize]
            .take()
            .expect("a row in the order runs");
        self.order.retain(|&other| other != row);
        self.free_rows.push(row);
        blocks.release(running.table);
        running.sequence
    }

    fn running(&self, row: TableRow) -> &Running {
        self.rows[row.0 as usize]
            .as_ref()
            .expect("a row in the order runs")
    }

    fn runs_in(&self, row: TableRow, id: RequestId) -> bool {
        self.rows[row.0 as usize]
            .as_ref()
            .is_some_and(|running| running.sequence.id == id)
    }

    /// A live request that ran in `row` when a step was scheduled; it may have been preempted since.
    fn find(&mut self, id: RequestId, row: TableRow) -> Option<&mut Sequence> {
        if self.runs_in(row, id) {
            return self.rows[row.0 as usize]
                .as_mut()
                .map(|running| &mut running.sequence);
        }
        self.waiting.iter_mut().find(|sequence| sequence.id == id)
    }
}

impl Running {
    /// Tokens that can run now.
    fn n_ready(&self) -> u32 {
        self.sequence.n_target().saturating_sub(self.n_scheduled)
    }
}

/// A step being put together.
#[derive(Default)]
struct Batch {
    input: StepInput,
    expected: Vec<Expected>,
}

impl Batch {
    fn update_table(
        &mut self,
        row: TableRow,
        first: u32,
        blocks: &[kvasir_kernels::device::BlockId],
    ) {
        self.input.table_updates.push(TableUpdate {
            row,
            first,
            blocks: blocks.to_vec(),
        });
    }
}

#[cfg(test)]
mod tests;
