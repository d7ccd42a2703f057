//! The life of a step: what it brings goes up, the pass runs or is replayed, rows of logits are sampled, and what was
//! sampled comes down.

use crate::device::{DeviceError, Forward, Logits, Ticket};
use crate::shape::Model;
use crate::step::{DeviceOutput, LogitsRow, Sampled, StepInput};

use super::CudaDevice;
use super::buffers::{LogitsBuffer, PageLayout};
use super::driver::Driver;
use super::edits::{edited_rows, edits_of, write_edits};
use super::kernel::{self, EditRow, MAX_TOP, SampleRow};
use super::model::{EDITS, index};
use super::pass::Pass;
use super::plan::sample_row;

/// A step under way.
pub(super) struct InFlight<E> {
    ticket: u64,
    model: Model,
    slot: usize,
    /// `None` until its rows of logits were asked for something.
    sampling: Option<Sampling<E>>,
}

struct Sampling<E> {
    done: E,
    /// By row of logits: log-probabilities asked for.
    n_logprobs: Vec<Option<u8>>,
}

impl<D: Driver> CudaDevice<D> {
    pub(super) fn start(
        &mut self,
        input: &StepInput,
        forward: Forward<'_>,
    ) -> Result<Ticket, DeviceError> {
        assert!(
            self.in_flight.len() < 2,
            "more steps under way than the device is deep"
        );
        assert!(
            self.in_flight.iter().all(|step| step.sampling.is_some()),
            "a step is submitted before the one before it was sampled"
        );
        let model = &mut self.models[index(input.model)];
        model.step.begin(input);
        model.plan.make(&model.step);
        let (ticket, slot) = (self.next_ticket, self.next_ticket as usize % 2);
        self.next_ticket += 1;
        self.send(slot, input)?;
        self.run(input.model, forward)?;
        self.in_flight.push_back(InFlight {
            ticket,
            model: input.model,
            slot,
            sampling: None,
        });
        Ok(Ticket(ticket))
    }

    pub(super) fn start_sampling(
        &mut self,
        ticket: &Ticket,
        logits: Logits,
        requests: &[LogitsRow],
    ) -> Result<(), DeviceError> {
        let step = self.in_flight.back().expect("a step was submitted");
        assert_eq!(step.ticket, ticket.0, "the ticket of another step");
        assert!(step.sampling.is_none(), "a step is sampled once");
        let (model, slot) = (step.model, step.slot);
        let logits = self.buffers.logits[logits.0 as usize];
        assert_eq!(logits.model, model, "logits of another model");
        self.models[index(model)].step.check_requests(requests);
        if !requests.is_empty() {
            self.send_edits((model, slot), logits, requests)?;
            self.launch_sample((model, slot), logits, requests)?;
        }
        self.fetch(requests)
    }

    /// Uploads the edits of the rows that have some, and applies them to copies of those rows.
    fn send_edits(
        &mut self,
        (model, slot): (Model, usize),
        logits: LogitsBuffer,
        requests: &[LogitsRow],
    ) -> Result<(), DeviceError> {
        let edits = edits_of(requests);
        let (mut rest, mut first) = (&edits[..], 0);
        while !rest.is_empty() {
            let model = &mut self.models[index(model)];
            let (now, later) = rest.split_at(model.edit_room.fits(rest));
            let pinned = &mut model.slots[slot].edits;
            let n_words = write_edits(now, pinned.bytes_mut());
            let words_at = now.len() * size_of::<EditRow>();
            let address = model.buffers.edits;
            self.driver.h2d(address, pinned, words_at + n_words * 4)?;
            let args = kernel::EditLogitsArgs {
                edited: model.buffers.edited.into(),
                logits: logits.address.into(),
                rows: address.into(),
                words: (address + words_at as u64).into(),
                first,
                vocabulary: logits.cols as u32,
                stride: logits.stride as u32,
                n_words: n_words as u32,
            };
            // SAFETY: the rows are those of this step's logits, write_edits has put all that they name among the words, and
            // Step has checked that every token there is one of the vocabulary.
            unsafe { (self.driver).launch(kernel::edit_logits(now.len()), &args) }?;
            first += now.len() as u32;
            rest = later;
            if !rest.is_empty() {
                let event = self.driver.record()?;
                self.driver.synchronize(event)?;
            }
        }
        Ok(())
    }

    fn launch_sample(
        &mut self,
        (model, slot): (Model, usize),
        logits: LogitsBuffer,
        requests: &[LogitsRow],
    ) -> Result<(), DeviceError> {
        let model = &mut self.models[index(model)];
        let buffers = &model.buffers;
        let pinned = &mut model.slots[slot].requests;
        let size = size_of::<SampleRow>();
        let to = pinned.bytes_mut().chunks_exact_mut(size);
        for ((to, row), edited) in to.zip(requests).zip(edited_rows(requests)) {
            to.copy_from_slice(bytemuck::bytes_of(&sample_row(row, edited)));
        }
        let bytes = requests.len() * size;
        self.driver.h2d(buffers.requests, pinned, bytes)?;
        let sampled = buffers.sampled;
        let args = kernel::SampleArgs {
            logits: logits.address.into(),
            edited: buffers.edited.into(),
            rows: buffers.requests.into(),
            tokens: sampled.tokens.into(),
            logprobs: sampled.logprobs().into(),
            top_ids: sampled.top_ids().into(),
            top_logprobs: sampled.top_logprobs().into(),
            vocabulary: logits.cols as u32,
            stride: logits.stride as u32,
        };
        // SAFETY: the only indices that the kernel reads are tokens, which Step has checked, and edited rows, of which there
        // are no more than rows of logits.
        unsafe { (self.driver).launch(kernel::sample(requests.len()), &args) }
    }

    /// Starts the copies of what was sampled, and marks their end.
    fn fetch(&mut self, requests: &[LogitsRow]) -> Result<(), DeviceError> {
        let step = self.in_flight.back_mut().expect("a step was submitted");
        let model = &mut self.models[index(step.model)];
        let sampled = model.buffers.sampled;
        let output = &mut model.slots[step.slot].output;
        let n_rows = requests.len();
        let n_top = requests.iter().filter_map(|row| row.n_logprobs).max();
        let mut copy = |from: u64, words: usize| {
            let at = (from - sampled.tokens) as usize;
            self.driver.d2h(output, at, from, words * 4)
        };
        copy(sampled.tokens, n_rows)?;
        if n_top.is_some() {
            copy(sampled.logprobs(), n_rows)?;
        }
        if n_top.is_some_and(|n| n > 0) {
            copy(sampled.top_ids(), n_rows * MAX_TOP as usize)?;
            copy(sampled.top_logprobs(), n_rows * MAX_TOP as usize)?;
        }
        step.sampling = Some(Sampling {
            done: self.driver.record()?,
            n_logprobs: requests.iter().map(|row| row.n_logprobs).collect(),
        });
        Ok(())
    }

    pub(super) fn finish(&mut self, ticket: &Ticket) -> Result<DeviceOutput, DeviceError> {
        let step = self
            .in_flight
            .pop_front()
            .expect("a step was submitted before it is collected");
        assert_eq!(step.ticket, ticket.0, "the ticket of another step");
        let sampling = step
            .sampling
            .expect("a step is sampled before it is collected");
        self.driver.synchronize(sampling.done)?;
        let model = &self.models[index(step.model)];
        let words: &[u32] = bytemuck::cast_slice(model.slots[step.slot].output.bytes());
        let (n, max_top) = (model.buffers.sampled.rows, MAX_TOP as usize);
        let top = |l: usize, n_top: usize| {
            let ids = &words[2 * n + l * max_top..][..n_top];
            let logprobs = &words[(2 + max_top) * n + l * max_top..][..n_top];
            let pairs = ids.iter().zip(logprobs);
            pairs
                .map(|(&id, &bits)| (id, f32::from_bits(bits)))
                .collect()
        };
        let vocabulary = model.shape.vocab_size;
        let rows = sampling.n_logprobs.iter().enumerate();
        let sampled = rows.map(|(l, n_logprobs)| Sampled {
            token: words[l],
            logprob: n_logprobs.map(|_| f32::from_bits(words[n + l])),
            top: n_logprobs.map_or(Vec::new(), |n_top| {
                top(l, usize::from(n_top).min(vocabulary))
            }),
        });
        Ok(DeviceOutput {
            sampled: sampled.collect(),
        })
    }

    /// Uploads what the step brings, and applies its copies and changes of the block tables.
    fn send(&mut self, slot: usize, input: &StepInput) -> Result<(), DeviceError> {
        let limits = &self.models[index(input.model)].shape.limits;
        let (rows, width) = (limits.max_sequences, limits.max_blocks_per_sequence);
        let copies = input.copies.iter().map(|(from, to)| [from.0, to.0]);
        let copies: Vec<[u32; 2]> = copies.collect();
        let changes = input.table_updates.iter().flat_map(|update| {
            let row = update.group as usize * rows + update.row.0 as usize;
            let first = (row * width) as u32 + update.first;
            (first..).zip(&update.blocks).map(|(at, to)| [at, to.0])
        });
        let changes: Vec<[u32; 2]> = changes.collect();
        let at = (input.model, slot);
        let copies = self.send_excess(at, &copies, Self::copy_blocks)?;
        let changes = self.send_excess(at, &changes, Self::update_tables)?;

        let model = &mut self.models[index(input.model)];
        let end = model.plan.layout().end;
        let at_changes = end + copies.len() * 8;
        let bytes = at_changes + changes.len() * 8;
        let (address, pinned) = (model.buffers.input, &mut model.slots[slot].input);
        let to = pinned.bytes_mut();
        model.plan.write(&model.step, to);
        to[end..at_changes].copy_from_slice(bytemuck::cast_slice(copies));
        to[at_changes..bytes].copy_from_slice(bytemuck::cast_slice(changes));
        self.driver.h2d(address, pinned, bytes)?;
        self.copy_blocks(input.model, address + end as u64, copies.len())?;
        self.update_tables(input.model, address + at_changes as u64, changes.len())
    }

    /// Applies all pairs but the last that fit along with a step, and waits for each trip.
    fn send_excess<'p>(
        &mut self,
        (model, slot): (Model, usize),
        mut pairs: &'p [[u32; 2]],
        apply: fn(&mut Self, Model, u64, usize) -> Result<(), DeviceError>,
    ) -> Result<&'p [[u32; 2]], DeviceError> {
        while pairs.len() > EDITS {
            let (now, rest) = pairs.split_at(EDITS);
            let bytes: &[u8] = bytemuck::cast_slice(now);
            let state = &mut self.models[index(model)];
            let (address, pinned) = (state.buffers.input, &mut state.slots[slot].input);
            pinned.bytes_mut()[..bytes.len()].copy_from_slice(bytes);
            self.driver.h2d(address, pinned, bytes.len())?;
            apply(self, model, address, now.len())?;
            let event = self.driver.record()?;
            self.driver.synchronize(event)?;
            pairs = rest;
        }
        Ok(pairs)
    }

    fn copy_blocks(&mut self, _model: Model, pairs: u64, n: usize) -> Result<(), DeviceError> {
        let cache = &self.buffers.cache;
        let (n_places, block_bytes) = match cache.layout {
            PageLayout::ByPlace {
                n_places,
                share_bytes,
            } => (n_places as usize, share_bytes),
            PageLayout::ByPage { page_bytes } => (1, page_bytes),
        };
        let args = kernel::CopyBlocksArgs {
            cache: cache.address.into(),
            pairs: pairs.into(),
            chunks_per_place: u64::from(cache.n_blocks) * block_bytes / 16,
            chunks_per_block: (block_bytes / 16) as u32,
            unused: 0,
        };
        // SAFETY: `n` pairs lie there, and Step has checked that all of them are blocks of the cache.
        unsafe { self.driver.launch(kernel::copy_blocks(n, n_places), &args) }
    }

    fn update_tables(&mut self, model: Model, changes: u64, n: usize) -> Result<(), DeviceError> {
        let args = kernel::UpdateTablesArgs {
            tables: self.models[index(model)].buffers.tables.into(),
            changes: changes.into(),
            n: n as u32,
            unused: 0,
        };
        // SAFETY: `n` changes lie there, and Step has checked that all of them are inside the model's tables.
        unsafe { self.driver.launch(kernel::update_tables(n), &args) }
    }

    /// Runs the pass: launch by launch, or as a graph where its shape was seen before.
    fn run(&mut self, model: Model, forward: Forward<'_>) -> Result<(), DeviceError> {
        let state = &self.models[index(model)];
        let (driver, buffers) = (&mut self.driver, &self.buffers);
        let pass = |driver: &mut D| Pass::run(driver, buffers, (model, state), forward);
        if !state.plan.can_be_captured() {
            return pass(driver);
        }
        let key = (model, state.plan.shape().clone());
        if let Some(graph) = self.graphs.find(&key) {
            return driver.replay(graph);
        }
        if !self.graphs.seen_before(&key) {
            return pass(driver);
        }
        driver.begin_capture()?;
        let recorded = pass(driver);
        let graph = driver.end_capture();
        recorded?;
        let graph = self.graphs.keep(&key, graph?);
        driver.replay(graph)
    }
}
