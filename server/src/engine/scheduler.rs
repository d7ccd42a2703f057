//! Continuous batching: which tokens of which sequences run in the next step, and what a finished step means.
//!
//! Longer than a file should be, because a step is decided in one piece; what can be told alone is in `sequence`, `group`,
//! `fork` and `beams`. Pure: it knows no clock, no device and no threads. Each step is one mixed batch under one token
//! budget: decodes first (one token each), then prefill chunks, then new groups in the order of service. A request's
//! sequences are one group, admitted, preempted and resumed whole. A group is admitted only when all its known tokens fit,
//! so that only decodes ask the pool for more; when it is empty, the group that is served last is preempted and computed
//! again later (arXiv 2309.06180, section 4.5), its outputs kept.
//!
//! The prompt of a group is computed once, by the first of its sequences, its leader. The others wait in rows of their
//! own, with the blocks that only they will write, and fork from it when the prompt is complete: in the step after, whose
//! copies see what the step before has left. Beams that were preempted do so where they first differ.
//!
//! At most one step is under way when the next is scheduled. Because a device runs its steps in order, the blocks of
//! a sequence that has ended are free at once, even while a step that was scheduled too far still writes to them:
//! whoever gets them writes later. What a step wrote is offered to the prefix cache when that step is collected.

mod beams;
mod fork;
mod group;
mod sequence;

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::ops::Bound;

use kvasir_kernels::shape::Limits;
use kvasir_kernels::step::{
    DeviceOutput, LogitsRequest, LogitsRow, Span, StepInput, TableRow, TableUpdate,
};

use super::blocks::{Allocation, Appended, BlockPool, BlockTable, SlotUse, Written};
use super::logits::Edits;
use super::pacer::{NextStep, StepSize};
use super::prefix::{PrefixChain, PrefixHit};
use super::{FinishReason, Request, RequestId, RequestOutput, TokenLogprobs};
use beams::Beams;
use fork::Fork;
use group::{Need, SequenceGroup};
use sequence::{PendingSample, Sequence, max_outputs};

/// A prompt with at most so many tokens left is short, or a quarter of a step where that is less: it need not wait for
/// long ones.
const SHORT_TOKENS: usize = 256;
/// Groups at the head of the queue among which short prompts are looked for.
const MOST_OVERTAKEN: usize = 256;

/// The order of service: groups with a smaller key run first and are preempted last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct ServiceKey {
    /// How many requests came before.
    arrival: u64,
}

/// A group that runs, and the rows of its sequences.
#[derive(Debug)]
struct RunningGroup {
    id: RequestId,
    /// Of beams, by slot.
    rows: Vec<TableRow>,
    beams: Option<Beams>,
}

/// A sequence that has a row of the block tables.
#[derive(Debug)]
struct RunningSequence {
    group: RequestId,
    sequence: Sequence,
    table: BlockTable,
    /// Tokens that its group shared when it was admitted: where the others fork from the leader.
    n_shared: u32,
    /// Tokens that are in the cache or under way there.
    n_scheduled: u32,
    /// Those among them that are in the cache for certain: the steps that wrote them were collected.
    n_written: u32,
    /// The newest step that it is in.
    last_step: Option<u64>,
    /// The step that it was admitted to.
    first_step: u64,
    fork: Fork,
}

/// What a span of a step will report, in the order of the rows of logits.
#[derive(Debug)]
struct Expected {
    id: RequestId,
    sequence: u32,
    row: TableRow,
    /// Where it ends: all tokens of the sequence before are written.
    end: u32,
    n_scores: u32,
    samples: bool,
    /// Nothing is generated, and the prompt is complete with this span.
    ends: bool,
}

/// Everything that one call of [`Scheduler::schedule`] decided.
#[derive(Debug, Default, PartialEq)]
pub struct Schedule {
    /// The batch; without tokens where nothing can run before a step under way has been committed.
    pub input: StepInput,
    /// What is wanted of each of its rows of logits.
    pub requests: Vec<LogitsRow>,
    /// When [`Scheduler::edit_logits`] is to be called for them.
    pub edits: Edits,
    /// Its tokens that are decodes; the others are prompts'.
    pub n_decodes: u32,
    /// Some rows are beams': the step is to be collected before another is scheduled.
    pub has_beams: bool,
    /// Slots of the cache when it ends.
    pub slots: SlotUse,
    /// Requests that start to run.
    pub admitted: Vec<Admitted>,
    /// Requests that wait again.
    pub preempted: Vec<RequestId>,
}

impl Schedule {
    /// What the step is made of. Decodes come first.
    pub fn size(&self) -> StepSize {
        let prompts = self.input.spans.iter();
        let prompts = prompts.filter(|span| span.first_token >= self.n_decodes);
        let pairs = |span: &Span| {
            let (n, first) = (u64::from(span.n_tokens), u64::from(span.first_position));
            n * first + n * n / 2
        };
        StepSize {
            n_decodes: self.n_decodes,
            n_prompt: self.input.tokens.len() as u32 - self.n_decodes,
            n_pairs: prompts.map(pairs).sum(),
        }
    }
}

/// A request that starts to run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Admitted {
    /// Which.
    pub id: RequestId,
    /// Prompt tokens that the cache held, the first time that it starts; `None` where the cache was not asked.
    pub cached_tokens: Option<u32>,
}

/// A step that was scheduled and not committed.
#[derive(Debug)]
struct InFlight {
    step: u64,
    expected: Vec<Expected>,
}

/// Requests and tokens by state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Load {
    /// Requests in the running batch.
    pub n_running: u32,
    /// Their sequences.
    pub n_sequences: u32,
    /// Output tokens that these have.
    pub generated_tokens: u64,
    /// Requests that wait, preempted ones included.
    pub n_waiting: u32,
    /// Blocks that the waiting requests need to start, beyond those of others that they share.
    pub waiting_blocks: u64,
    /// Prompt tokens that are neither computed nor found in the cache.
    pub prefill_backlog_tokens: u64,
}

/// The queue, the running groups and the steps under way.
#[derive(Debug)]
pub struct Scheduler {
    limits: Limits,
    max_model_len: u32,
    n_arrived: u64,
    /// Where each request stands in the order of service.
    keys: HashMap<RequestId, ServiceKey>,
    waiting: BTreeMap<ServiceKey, SequenceGroup>,
    running: BTreeMap<ServiceKey, RunningGroup>,
    /// By row of the block tables.
    rows: Vec<Option<RunningSequence>>,
    free_rows: Vec<TableRow>,
    in_flight: VecDeque<InFlight>,
    n_steps: u64,
    /// Changes of tables that the next step brings, because a block was replaced by another of the same content.
    replaced: Vec<TableUpdate>,
    /// Groups whose prompt is complete with the newest step, and whose other sequences fork.
    forking: Vec<RequestId>,
    /// The waiting group whose need was looked up last.
    looked_up: Option<ServiceKey>,
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
            "each sequence may sample in each step"
        );
        let rows = (0..limits.max_sequences as u32).rev().map(TableRow);
        Self {
            limits,
            max_model_len,
            n_arrived: 0,
            keys: HashMap::new(),
            waiting: BTreeMap::new(),
            running: BTreeMap::new(),
            rows: (0..limits.max_sequences).map(|_| None).collect(),
            free_rows: rows.collect(),
            in_flight: VecDeque::new(),
            n_steps: 0,
            replaced: Vec::new(),
            forking: Vec::new(),
            looked_up: None,
        }
    }

    /// Queues a request that fits the pool when it is alone there. `chain` has the keys of its prompt; `None` where its
    /// prefix is not cached.
    pub fn add(&mut self, blocks: &BlockPool, mut request: Request, chain: Option<PrefixChain>) {
        let key = ServiceKey {
            arrival: self.n_arrived,
        };
        self.n_arrived += 1;
        let id = request.id;
        self.keys.insert(id, key);
        let max_outputs = max_outputs(&request, self.max_model_len);
        if max_outputs == 0 {
            // Where nothing is generated, nothing is searched.
            request.beams = None;
        }
        let (n, n_prompt) = (request.n_sequences().get(), request.prompt.len() as u32);
        let beams = Beams::new(&request, max_outputs);
        let resumed = std::mem::take(&mut request.resumed);
        let first = Sequence::new(request, chain, self.max_model_len);
        let siblings: Vec<Sequence> = (1..n).map(|index| first.sibling(index)).collect();
        let mut sequences: Vec<Sequence> = std::iter::once(first).chain(siblings).collect();
        if !resumed.is_empty() {
            let resumed = sequences.into_iter().zip(resumed);
            sequences = resumed
                .filter_map(|(sequence, outputs)| Some(sequence.resumed(&outputs?)))
                .collect();
        }
        let mut group = SequenceGroup {
            id,
            sequences,
            beams,
            n_shared: n_prompt,
            is_counted: false,
            need: Need::default(),
        };
        group.look_up(blocks);
        self.waiting.insert(key, group);
    }

    /// Forgets a request; its blocks are free. Unknown ones, ended before, are no mistake.
    pub fn abort(&mut self, blocks: &mut BlockPool, id: RequestId) {
        let Some(key) = self.keys.remove(&id) else {
            return;
        };
        if self.waiting.remove(&key).is_none() {
            self.stop_running(blocks, key);
        }
    }

    /// Ends one sequence of a request whose client wants no more of it, and the request with its last.
    pub fn abort_sequence(&mut self, blocks: &mut BlockPool, id: RequestId, index: u32) {
        if let Some(beams) = self.beams_of(id) {
            // The search goes on for the other answers.
            beams.give_up(index);
            if beams.wanted().next().is_none() {
                self.abort(blocks, id);
            }
            return;
        }
        let Some(key) = self.keys.get(&id) else {
            return;
        };
        let is_left = match (self.running.get(key), self.waiting.get(key)) {
            (Some(group), _) => group.rows.iter().any(|&row| {
                let running = self.at(row);
                running.sequence.index() == index && running.fork != Fork::LedAndEnded
            }),
            (None, Some(group)) => group.sequences.iter().any(|s| s.index() == index),
            (None, None) => false,
        };
        if is_left {
            self.end(blocks, id, index);
        }
    }

    /// Forgets all requests, and names their sequences that had not ended, in the order of service.
    pub fn abort_all(&mut self, blocks: &mut BlockPool) -> Vec<(RequestId, u32)> {
        let mut keys: Vec<(ServiceKey, RequestId)> =
            self.keys.iter().map(|(&id, &key)| (key, id)).collect();
        keys.sort_unstable();
        let mut left = Vec::with_capacity(keys.len());
        for (key, id) in keys {
            let waiting = self.waiting.remove(&key);
            let group = waiting.unwrap_or_else(|| self.stop_running(blocks, key));
            left.extend(group.answers().into_iter().map(|answer| (id, answer)));
        }
        self.keys.clear();
        left
    }

    /// Some sequence of the request has not ended.
    pub fn is_live(&self, id: RequestId) -> bool {
        self.keys.contains_key(&id)
    }

    /// What the next step is about to be made of, before it is decided how many prompt tokens it has.
    pub fn next_step(&self) -> NextStep {
        let running = || self.rows_in_order().map(|row| self.at(row));
        let short_tokens = self.short_tokens();
        let is_long = |running: &&RunningSequence| running.n_ready() as usize > short_tokens;
        let forking = self
            .forking
            .iter()
            .filter_map(|id| self.running.get(&self.keys.get(id).copied()?));
        let chosen = forking
            .filter_map(|group| group.beams.as_ref())
            .map(Beams::n_chosen);
        let n_decodes = running().filter(|running| running.n_ready() == 1).count() as u32;
        NextStep {
            n_decodes: n_decodes + chosen.sum::<u32>(),
            position: running()
                .find(is_long)
                .map_or(0, |running| running.n_scheduled),
        }
    }

    /// Decides the next batch, who is admitted to it and who is preempted for it. Where sequences decode, at most
    /// `prompt_tokens` tokens of prompts run beside them.
    pub fn schedule(&mut self, blocks: &mut BlockPool, prompt_tokens: u32) -> Schedule {
        let mut batch = Batch {
            schedule: Schedule::default(),
            expected: Vec::new(),
            most_tokens: self.limits.max_tokens,
        };
        batch.schedule.input.table_updates = std::mem::take(&mut self.replaced);
        self.fork(blocks, &mut batch);
        self.schedule_decodes(blocks, &mut batch);
        let n_decodes = batch.n_tokens();
        batch.most_tokens = match n_decodes {
            0 => self.limits.max_tokens,
            n => self.limits.max_tokens.min(n + prompt_tokens as usize),
        };
        self.schedule_short_prompts(blocks, &mut batch);
        let rows: Vec<TableRow> = self.rows_in_order().collect();
        for row in rows {
            if self.at(row).n_ready() > 1 {
                self.schedule_span(blocks, row, &mut batch);
            }
        }
        if batch.schedule.preempted.is_empty() {
            self.admit(blocks, &mut batch);
        }
        blocks.release_sources();
        batch.schedule.n_decodes = n_decodes as u32;
        if batch.n_tokens() > 0 {
            batch.schedule.slots = self.slot_use(blocks);
            self.in_flight.push_back(InFlight {
                step: self.n_steps,
                expected: batch.expected,
            });
            self.n_steps += 1;
        } else {
            // Nothing was admitted, and no step is made: the next one brings them, for the rows that still run.
            self.replaced = std::mem::take(&mut batch.schedule.input.table_updates);
            let rows = &self.rows;
            (self.replaced).retain(|update| rows[update.row.0 as usize].is_some());
        }
        batch.schedule
    }

    /// Fills in what changes the rows of logits of the step that was scheduled last.
    pub fn edit_logits(&mut self, requests: &mut [LogitsRow]) {
        let newest = self.in_flight.pop_back().expect("a step was scheduled");
        let mut rows = requests.iter_mut();
        for expected in &newest.expected {
            let &Expected {
                id, sequence, row, ..
            } = expected;
            let n_rows = expected.n_scores as usize + usize::from(expected.samples);
            let last = rows.by_ref().take(n_rows).last();
            // One that has ended meanwhile is sampled for nothing.
            if let Some(sampled) = last.filter(|_| expected.samples)
                && let Some(sequence) = self.find(id, sequence, row)
                && let LogitsRequest::Sample {
                    output_index, edit, ..
                } = &mut sampled.request
            {
                *edit = sequence.edit(*output_index);
            }
        }
        self.in_flight.push_back(newest);
    }

    /// Takes what the oldest step under way gave: appends outputs, ends sequences and requests, frees their blocks.
    pub fn commit(&mut self, blocks: &mut BlockPool, output: DeviceOutput) -> Vec<RequestOutput> {
        let InFlight { step, expected } = self
            .in_flight
            .pop_front()
            .expect("a step that is committed was scheduled");
        let mut sampled = output.sampled.into_iter().map(TokenLogprobs::from);
        let mut outputs = Vec::with_capacity(expected.len());
        for Expected {
            id,
            sequence: index,
            row,
            end,
            n_scores,
            samples,
            ends,
        } in expected
        {
            self.register(blocks, id, row, step, end);
            let mut output = RequestOutput {
                id,
                sequence: index,
                prompt_logprobs: sampled.by_ref().take(n_scores as usize).collect(),
                tokens: sampled.by_ref().take(usize::from(samples)).collect(),
                finished: ends.then_some(FinishReason::Length),
                beam_score: None,
            };
            assert_eq!(
                output.prompt_logprobs.len() + output.tokens.len(),
                n_scores as usize + usize::from(samples)
            );
            // Ended while this step was under way: it ran too far, and what it gave is dropped.
            let Some(sequence) = self.find(id, index, row) else {
                continue;
            };
            if sequence.is_beam() {
                outputs.extend(self.commit_beam(blocks, output));
                continue;
            }
            if let Some(token) = output.tokens.first() {
                output.finished = sequence.commit(token.token);
            }
            if output.finished.is_some() {
                self.end(blocks, id, index);
            }
            if n_scores > 0 || samples || ends {
                outputs.push(output);
            }
        }
        outputs
    }

    /// Offers the full blocks to the prefix cache that a collected step has filled, of a sequence that has run since.
    fn register(
        &mut self,
        blocks: &mut BlockPool,
        id: RequestId,
        row: TableRow,
        step: u64,
        end: u32,
    ) {
        let Some(running) = self.rows[row.0 as usize].as_mut() else {
            return;
        };
        if running.group != id || running.first_step > step || running.fork == Fork::Waits {
            return;
        }
        running.n_written = end;
        if end / blocks.block_size() == running.table.n_registered() {
            return;
        }
        running.sequence.extend_chain();
        let Some(chain) = running.sequence.chain() else {
            return;
        };
        let written = Written {
            chain,
            tokens: &running.sequence.tokens()[..end as usize],
        };
        let changed = blocks.register(&mut running.table, written);
        self.replaced.extend(table_updates(row, changed));
    }

    /// No request is queued or runs, and no step is under way.
    pub fn is_idle(&self) -> bool {
        self.keys.is_empty() && self.in_flight.is_empty()
    }

    /// The request that waits at the head of the queue.
    pub fn oldest_waiting(&self) -> Option<RequestId> {
        self.waiting.values().next().map(|group| group.id)
    }

    /// Requests and tokens by state.
    pub fn load(&self) -> Load {
        let waiting = self.waiting.values().map(|group| group.need);
        let running = self.rows_in_order().map(|row| {
            let running = self.at(row);
            u64::from(running.sequence.n_prompt_after(running.n_scheduled))
        });
        Load {
            n_running: self.running.len() as u32,
            n_sequences: (self.rows.len() - self.free_rows.len()) as u32,
            generated_tokens: (self.rows_in_order())
                .map(|row| u64::from(self.at(row).sequence.n_outputs()))
                .sum(),
            n_waiting: self.waiting.len() as u32,
            waiting_blocks: waiting.clone().map(|need| need.n_blocks).sum(),
            prefill_backlog_tokens: waiting.map(|need| need.n_prompt).sum::<u64>()
                + running.sum::<u64>(),
        }
    }

    /// One token of each sequence that has one ready, in the order of service. When the pool is empty the group that is
    /// served last makes room, in the end the one itself that asks: a later one is never in the batch yet.
    fn schedule_decodes(&mut self, blocks: &mut BlockPool, batch: &mut Batch) {
        let rows = self.running.iter();
        let rows: Vec<(ServiceKey, TableRow)> = rows
            .flat_map(|(&key, group)| group.rows.iter().map(move |&row| (key, row)))
            .collect();
        let mut appended = Vec::new();
        for group in rows.chunk_by(|a, b| a.0 == b.0) {
            // All of a group's sequences have room before any of them is in the batch: it is preempted whole.
            for &(_, row) in group {
                self.make_room(blocks, row, &mut appended, batch);
            }
            for (row, new) in appended.drain(..) {
                // The group itself may have made room.
                if self.rows[row.0 as usize].is_some() {
                    batch.update_tables(row, new);
                    self.add_span(row, batch);
                }
            }
        }
    }

    /// Room for one token of a sequence that has one ready, unless its group is preempted for it.
    fn make_room(
        &mut self,
        blocks: &mut BlockPool,
        row: TableRow,
        appended: &mut Vec<(TableRow, Vec<Appended>)>,
        batch: &mut Batch,
    ) {
        // Its group may have been preempted for an earlier one.
        while let Some(running) = &mut self.rows[row.0 as usize]
            && running.n_ready() == 1
        {
            let n_known = running.n_scheduled + 1;
            // What leaves a window is kept until the step that filled it was collected, so that the cache can have it;
            // but no longer than a chunk, for which there is room.
            let chunk = self.limits.max_tokens as u32;
            let n_computed = running.n_written.max(n_known.saturating_sub(chunk));
            if let Some(new) = blocks.extend(&mut running.table, n_computed, n_known) {
                appended.push((row, new));
                return;
            }
            let (&last, _) = self
                .running
                .last_key_value()
                .expect("the one that asks is among them");
            let group = self.stop_running(blocks, last);
            batch.schedule.preempted.push(group.id);
            self.waiting.insert(last, group);
        }
    }

    /// Short prompts have a quarter of the step's room first, running ones and waiting ones, the one with the fewest tokens
    /// left before the others, so that none is held up behind long ones; the rest is everybody's in the order of service,
    /// so that nobody starves.
    fn schedule_short_prompts(&mut self, blocks: &mut BlockPool, batch: &mut Batch) {
        let most_tokens = batch.most_tokens;
        let room = most_tokens.saturating_sub(batch.n_tokens());
        batch.most_tokens = batch.n_tokens() + room / 4;
        let left = |row: &TableRow| self.at(*row).n_ready() as usize;
        let short_tokens = self.short_tokens();
        let is_short = |row: &TableRow| (2..=short_tokens).contains(&left(row));
        let mut rows: Vec<TableRow> = self.rows_in_order().filter(is_short).collect();
        rows.sort_by_key(left);
        for row in rows {
            self.schedule_span(blocks, row, batch);
        }
        self.look_up_some(blocks);
        // While the head of the queue waits for blocks, whoever overtakes it would take them.
        let head_fits = (self.waiting.values().next()).is_some_and(|head| self.fits(blocks, head));
        if head_fits && batch.schedule.preempted.is_empty() {
            let waiting = self.waiting.iter().take(MOST_OVERTAKEN);
            let short = waiting.filter(|(_, group)| group.need.n_tokens <= short_tokens as u64);
            let keys: Vec<ServiceKey> = short.map(|(&key, _)| key).collect();
            for key in keys {
                if batch.n_tokens() < batch.most_tokens {
                    self.start_running(blocks, key, batch);
                }
            }
        }
        batch.most_tokens = most_tokens;
    }

    /// A prompt of which at most so many tokens are left is short.
    fn short_tokens(&self) -> usize {
        SHORT_TOKENS.min(self.limits.max_tokens / 4)
    }

    /// Looks up what the group at the head of the queue needs, and one more, each in its turn: what the cache holds for
    /// those that wait changes with every step, and few of them matter now.
    fn look_up_some(&mut self, blocks: &BlockPool) {
        if let Some(mut head) = self.waiting.first_entry() {
            head.get_mut().look_up(blocks);
        }
        let after = self.looked_up.map_or(Bound::Unbounded, Bound::Excluded);
        let mut rest = self.waiting.range_mut((after, Bound::Unbounded));
        self.looked_up = rest.next().map(|(&key, group)| {
            group.look_up(blocks);
            key
        });
    }

    /// Admits from the head of the queue while there is room for all known tokens of the next.
    fn admit(&mut self, blocks: &mut BlockPool, batch: &mut Batch) {
        while let Some((&key, _)) = self.waiting.first_key_value()
            && batch.n_tokens() < batch.most_tokens
            && self.start_running(blocks, key, batch)
        {}
    }

    /// There are rows and blocks for a group as it was last looked up, and beyond that a block of each cache group for each
    /// sequence that runs: without it a group would be admitted only to be preempted a few steps later.
    fn fits(&self, blocks: &BlockPool, group: &SequenceGroup) -> bool {
        self.free_rows.len() >= group.sequences.len() && group.need.n_blocks <= self.room(blocks)
    }

    /// Blocks that a group may take.
    fn room(&self, blocks: &BlockPool) -> u64 {
        let n_running = (self.rows.len() - self.free_rows.len()) as u64;
        let headroom = match n_running {
            0 => 0,
            n => (n + 1) * u64::from(blocks.n_groups()),
        };
        u64::from(blocks.n_available()).saturating_sub(headroom)
    }

    /// Starts a group that fits; false: nothing changed. What it was looked up to need may be out of date: what counts is
    /// what the cache holds now.
    fn start_running(
        &mut self,
        blocks: &mut BlockPool,
        key: ServiceKey,
        batch: &mut Batch,
    ) -> bool {
        let group = &self.waiting[&key];
        if group.is_pending() || self.free_rows.len() < group.sequences.len() {
            return false;
        }
        let Some(hit) = self.hit_that_fits(blocks, group) else {
            return false;
        };
        let group = self.waiting.remove(&key).expect("a group that waits");
        let n_prompt = group.split().0.n_prompt();
        let asks_cache = blocks.caches_prefixes() && group.split().0.asks_cache();
        let leads = match group.sequences.len() {
            1 => Fork::Done,
            _ => Fork::Leads,
        };
        let n_found = hit.n_tokens(blocks.block_size());
        let mut rows = Vec::with_capacity(group.sequences.len());
        for sequence in group.sequences {
            let row = self.free_rows.pop().expect("rows were counted before");
            let n_known = sequence.n_known();
            let (table, n_scheduled, fork) = match rows.is_empty() {
                true => {
                    let allocation = blocks.allocate(n_known, &hit);
                    let Allocation {
                        table,
                        appended,
                        copies,
                    } = allocation.expect("blocks were counted before");
                    batch.schedule.input.copies.extend(copies);
                    batch.update_tables(row, appended);
                    (table, n_found, leads)
                }
                false => {
                    let table = blocks.allocate_fork(group.n_shared, n_known);
                    let table = table.expect("blocks were counted before");
                    (table, group.n_shared, Fork::Waits)
                }
            };
            self.rows[row.0 as usize] = Some(RunningSequence {
                group: group.id,
                sequence,
                table,
                n_shared: group.n_shared,
                n_scheduled,
                n_written: if fork == Fork::Waits { 0 } else { n_found },
                last_step: None,
                first_step: self.n_steps,
                fork,
            });
            rows.push(row);
        }
        batch.schedule.admitted.push(Admitted {
            id: group.id,
            // One that is resumed may find outputs too.
            cached_tokens: (!group.is_counted && asks_cache).then_some(n_found.min(n_prompt)),
        });
        let leader = rows[0];
        let (id, beams) = (group.id, group.beams);
        self.running.insert(key, RunningGroup { id, rows, beams });
        self.add_span(leader, batch);
        true
    }

    /// What the cache holds for a group, where there is room for the rest. A tail is copied only where there is room for
    /// both: a sequence that needs the whole pool needs the tail's blocks too.
    fn hit_that_fits(&self, blocks: &BlockPool, group: &SequenceGroup) -> Option<PrefixHit> {
        let room = self.room(blocks);
        let mut hit = group.find_prefix(blocks);
        let n_sibling_blocks = group.n_sibling_blocks(blocks);
        let needed = |hit: &PrefixHit| {
            let cost = blocks.cost(group.split().0.n_known(), hit);
            u64::from(cost.n_blocks) + u64::from(cost.n_sources) + n_sibling_blocks
        };
        if needed(&hit) > room {
            hit.tail = None;
        }
        (needed(&hit) <= room).then_some(hit)
    }

    /// Adds the next tokens of a sequence whose prompt is being computed.
    fn schedule_span(&mut self, blocks: &mut BlockPool, row: TableRow, batch: &mut Batch) {
        let running = self.rows[row.0 as usize].as_mut().expect("a running row");
        // In this step already, or no room is left in it.
        if running.last_step == Some(self.n_steps) || batch.n_tokens() >= batch.most_tokens {
            return;
        }
        let n_known = running.sequence.n_known();
        let new = blocks
            .extend(&mut running.table, running.n_scheduled, n_known)
            .expect("a prompt's chunks need no more blocks than it was admitted with");
        batch.update_tables(row, new);
        self.add_span(row, batch);
    }

    /// Adds the next tokens of a running sequence, as many as are ready and as the budgets allow. With the last token of a
    /// group's prompt, the first output of each of its sequences is sampled.
    fn add_span(&mut self, row: TableRow, batch: &mut Batch) {
        let siblings = self.siblings_of(row);
        let running = self.rows[row.0 as usize].as_mut().expect("a running row");
        let sequence = &mut running.sequence;
        let input = &mut batch.schedule.input;
        let n_tokens = batch.most_tokens.saturating_sub(input.tokens.len()) as u32;
        let n_rows = (self.limits.max_logits_rows - input.logits.len()) as u32;
        // The first of several sequences stops where the others fork from it. Beams have one row of logits until they do.
        let (most, n_samples) = match running.fork {
            Fork::Done | Fork::Waits => (u32::MAX, u32::from(sequence.wants_output())),
            Fork::Leads if sequence.is_beam() => (running.n_shared, 1),
            Fork::Leads | Fork::LedAndEnded => (running.n_shared, 1 + siblings.len() as u32),
        };
        let completes_at = (most < u32::MAX).then_some(most);
        let chunk = sequence.chunk(running.n_scheduled, most, n_samples, n_tokens, n_rows);
        if chunk.is_empty() {
            return;
        }
        running.n_scheduled = chunk.end;
        running.last_step = Some(self.n_steps);

        let previous_step = self.n_steps.checked_sub(1);
        let first_token = input.tokens.len() as u32;
        input.tokens.extend(
            chunk
                .clone()
                .map(|position| sequence.input(position, previous_step)),
        );
        input.spans.push(Span {
            row,
            first_token,
            n_tokens: chunk.end - chunk.start,
            first_position: chunk.start,
        });

        let token_at = |position: u32| first_token + position - chunk.start;
        let n_before = input.logits.len();
        for (position, request) in sequence.ask_scores(chunk.clone()) {
            input.logits.push(token_at(position));
            batch.schedule.requests.push(request);
        }
        let n_scores = (input.logits.len() - n_before) as u32;
        let id = running.group;
        let completes_prompt = completes_at == Some(chunk.end);
        let mut expect = |row: TableRow, n_scores: u32, rows: &mut [Option<RunningSequence>]| {
            let running = rows[row.0 as usize].as_mut().expect("a running row");
            let sequence = &mut running.sequence;
            let sample = PendingSample {
                step: self.n_steps,
                logits_row: batch.schedule.input.logits.len() as u32,
            };
            let output = match sequence.is_beam() && running.fork == Fork::Waits {
                true => None,
                false => sequence.ask_output(chunk.end, sample),
            };
            let samples = output.is_some();
            batch.schedule.has_beams |= samples && sequence.is_beam();
            if let Some(request) = output {
                batch.schedule.edits = batch.schedule.edits.max(sequence.edits());
                batch.schedule.input.logits.push(token_at(chunk.end - 1));
                batch.schedule.requests.push(request);
            }
            batch.expected.push(Expected {
                id,
                sequence: sequence.index(),
                row,
                end: chunk.end,
                n_scores,
                samples,
                ends: sequence.ends_with_prompt(chunk.end),
            });
        };
        expect(row, n_scores, &mut self.rows);
        if completes_prompt {
            for sibling in siblings {
                expect(sibling, 0, &mut self.rows);
            }
            self.forking.push(id);
        }
    }

    /// Ends one sequence of a request, and the request with its last. Where others are to fork from it, it is kept for them.
    fn end(&mut self, blocks: &mut BlockPool, id: RequestId, index: u32) {
        let key = self.keys[&id];
        let is_last = if let Some(group) = self.running.get_mut(&key) {
            let rows = &mut self.rows;
            let ended = group.rows.iter().position(|row| {
                let running = rows[row.0 as usize].as_ref();
                running.is_some_and(|running| running.sequence.index() == index)
            });
            let place = ended.expect("a sequence ends once");
            let row = group.rows[place];
            let running = rows[row.0 as usize].as_mut().expect("a running row");
            if running.fork == Fork::Leads {
                running.fork = Fork::LedAndEnded;
            } else {
                group.rows.remove(place);
                self.free_row(blocks, row);
            }
            let has_ended = |row: &TableRow| self.at(*row).fork == Fork::LedAndEnded;
            let rows = self.running[&key].rows.clone();
            let is_last = rows.iter().all(has_ended);
            if is_last {
                for row in rows {
                    self.free_row(blocks, row);
                }
            }
            is_last
        } else {
            let group = self.waiting.get_mut(&key).expect("a request runs or waits");
            group.sequences.retain(|sequence| sequence.index() != index);
            group.sequences.is_empty()
        };
        if is_last {
            self.keys.remove(&id);
            self.running.remove(&key);
            self.waiting.remove(&key);
        }
    }

    /// Takes a group out of the running batch; its blocks and its rows are free.
    fn stop_running(&mut self, blocks: &mut BlockPool, key: ServiceKey) -> SequenceGroup {
        let group = self.running.remove(&key).expect("the group runs");
        let RunningGroup { id, rows, beams } = group;
        let mut sequences = Vec::with_capacity(rows.len());
        for row in rows {
            let has_ended = self.at(row).fork == Fork::LedAndEnded;
            let sequence = self.free_row(blocks, row);
            if !has_ended {
                sequences.push(sequence);
            }
        }
        let mut group = SequenceGroup {
            id,
            sequences,
            beams,
            n_shared: 0,
            is_counted: true,
            need: Need::default(),
        };
        if let Some(beams) = &mut group.beams {
            beams.forget_reports();
        }
        group.count_shared();
        group.look_up(blocks);
        group
    }

    fn free_row(&mut self, blocks: &mut BlockPool, row: TableRow) -> Sequence {
        let running = self.rows[row.0 as usize].take().expect("a running row");
        self.free_rows.push(row);
        self.replaced.retain(|update| update.row != row);
        let sequence = running.sequence;
        let written = sequence.chain().map(|chain| Written {
            chain,
            tokens: &sequence.tokens()[..running.n_written as usize],
        });
        blocks.release(running.table, written);
        sequence
    }

    fn slot_use(&self, blocks: &BlockPool) -> SlotUse {
        let tables = self.rows.iter().flatten().map(|running| {
            // Before it forks, its blocks hold nothing.
            let is_empty = running.fork == Fork::Waits;
            let n_written = if is_empty { 0 } else { running.n_scheduled };
            (&running.table, n_written)
        });
        blocks.slot_use(tables)
    }

    /// The rows in use, in the order of service.
    fn rows_in_order(&self) -> impl Iterator<Item = TableRow> {
        self.running
            .values()
            .flat_map(|group| group.rows.iter().copied())
    }

    fn at(&self, row: TableRow) -> &RunningSequence {
        self.rows[row.0 as usize].as_ref().expect("a running row")
    }

    /// A live sequence that ran in `row` when a step was scheduled; it may have been preempted since.
    fn find(&mut self, id: RequestId, index: u32, row: TableRow) -> Option<&mut Sequence> {
        let key = self.keys.get(&id)?;
        if let Some(group) = self.waiting.get_mut(key) {
            return group
                .sequences
                .iter_mut()
                .find(|sequence| sequence.index() == index);
        }
        let running = self.rows[row.0 as usize].as_mut()?;
        let is_it = running.group == id
            && running.sequence.index() == index
            && running.fork != Fork::LedAndEnded;
        is_it.then_some(&mut running.sequence)
    }
}

impl RunningSequence {
    /// Tokens that can run now.
    fn n_ready(&self) -> u32 {
        match self.fork {
            Fork::Done => self.sequence.n_target().saturating_sub(self.n_scheduled),
            Fork::Leads | Fork::LedAndEnded => self.n_shared.saturating_sub(self.n_scheduled),
            Fork::Waits => 0,
        }
    }
}

/// A step being put together.
struct Batch {
    schedule: Schedule,
    expected: Vec<Expected>,
    /// Decodes and prompts together.
    most_tokens: usize,
}

impl Batch {
    fn n_tokens(&self) -> usize {
        self.schedule.input.tokens.len()
    }

    fn update_tables(&mut self, row: TableRow, appended: Vec<Appended>) {
        let updates = table_updates(row, appended);
        self.schedule.input.table_updates.extend(updates);
    }
}

fn table_updates(row: TableRow, changed: Vec<Appended>) -> impl Iterator<Item = TableUpdate> {
    changed.into_iter().map(move |new| TableUpdate {
        group: new.group,
        row,
        first: new.first,
        blocks: new.blocks,
    })
}

#[cfg(test)]
mod tests;
