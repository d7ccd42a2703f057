//! The engine: a thread of its own that makes steps, schedule -> submit -> collect -> commit.
//!
//! Requests go in through a bounded inbox ([`EngineHandle`]); each step sends one message, who was admitted and the
//! outputs of all its sequences, to the output thread. It knows token ids, never text, and no clock but for ages and the heartbeat.
//!
//! - [`blocks`]: pure: the block pool and block tables.
//! - [`scheduler`]: pure: continuous batching, preemption.
//! - [`executor`]: what it needs of a model on a device.

pub mod blocks;
pub mod executor;
mod handle;
mod request;
pub mod scheduler;

use std::collections::{HashMap, VecDeque};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::Instant;

use kvasir_kernels::device::{DeviceError, Ticket};
use kvasir_kernels::shape::Limits;
use kvasir_kernels::stored::Dtype;

use blocks::{BlockPool, CacheGroups};
use executor::Executor;
pub use handle::{Counters, EngineHandle};
use handle::{Mail, Snapshot};
pub use request::{
    Admission, FinishReason, Output, Request, RequestId, SamplingParams, StepOutputs, SubmitError,
};
use scheduler::{Schedule, Scheduler};

/// Messages to the output thread that may lie unread. When it can't follow, the engine waits: outputs are never lost,
/// and the output thread waits for no client.
const UNREAD_STEPS: usize = 64;

/// What is served, and its limits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelFacts {
    /// Token ids are below this.
    pub vocab_size: u32,
    /// Prompt and output together have at most this many tokens; a pool holds at least one such sequence.
    pub max_model_len: u32,
    /// Tokens that end an answer.
    pub eos_token_ids: Vec<u32>,
    /// The precision that it is served in.
    pub dtype: Dtype,
    /// The largest step.
    pub limits: Limits,
    /// KV blocks in the pool.
    pub n_blocks: u32,
    /// How sequences take them.
    pub groups: CacheGroups,
}

/// Why the engine ended before it was told to.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// The device failed: what it holds can't be trusted any more.
    #[error("the engine ended: a step failed")]
    Device(#[source] DeviceError),
    /// Nobody takes the outputs any more.
    #[error("the engine ended: the output thread is gone")]
    OutputsClosed,
    /// A broken invariant; the panic's message is on standard error.
    #[error("the engine ended: its thread panicked")]
    Panicked,
    /// The thread could not be started.
    #[error("the engine's thread could not be started")]
    Thread(#[source] std::io::Error),
}

/// A running engine; the one who owns it learns how it ended.
#[derive(Debug)]
pub struct Engine {
    handle: EngineHandle,
    thread: JoinHandle<Result<(), EngineError>>,
}

impl Engine {
    /// Starts the engine's thread. At most `max_waiting` requests may wait. The receiver gets one message for each
    /// step that admitted or had outputs, and is disconnected when the engine has ended.
    pub fn start(
        executor: Box<dyn Executor>,
        facts: ModelFacts,
        max_waiting: u32,
    ) -> Result<(Self, Receiver<StepOutputs>), EngineError> {
        let (outputs, receiver) = sync_channel(UNREAD_STEPS);
        let handle = EngineHandle::new(facts, max_waiting);
        let mut steps = Steps::new(executor, handle.clone(), outputs);
        let thread = std::thread::Builder::new()
            .name("engine".to_owned())
            .spawn(move || steps.run())
            .map_err(EngineError::Thread)?;
        Ok((Self { handle, thread }, receiver))
    }

    /// A handle to send requests by.
    pub fn handle(&self) -> EngineHandle {
        self.handle.clone()
    }

    /// Waits until the engine has ended; tell it to by [`EngineHandle::stop`].
    pub fn join(self) -> Result<(), EngineError> {
        self.thread.join().unwrap_or(Err(EngineError::Panicked))
    }
}

/// The engine's thread: owns the device, the pool and the scheduler.
struct Steps {
    executor: Box<dyn Executor>,
    handle: EngineHandle,
    outputs: SyncSender<StepOutputs>,
    blocks: BlockPool,
    scheduler: Scheduler,
    in_flight: VecDeque<Ticket>,
    waiting_since: HashMap<RequestId, Instant>,
    /// Not sent yet.
    admitted: Vec<Admission>,
    counters: Counters,
}

impl Drop for Steps {
    /// However the thread ends, a panic included, nobody sends to it any more.
    fn drop(&mut self) {
        self.handle.close();
    }
}

impl Steps {
    fn new(
        executor: Box<dyn Executor>,
        handle: EngineHandle,
        outputs: SyncSender<StepOutputs>,
    ) -> Self {
        let facts = handle.facts();
        Self {
            blocks: BlockPool::new(facts.n_blocks, facts.groups.clone()),
            scheduler: Scheduler::new(facts.limits, facts.max_model_len),
            executor,
            outputs,
            in_flight: VecDeque::new(),
            waiting_since: HashMap::new(),
            admitted: Vec::new(),
            counters: Counters::default(),
            handle,
        }
    }

    fn run(&mut self) -> Result<(), EngineError> {
        loop {
            let mail = self.handle.take_mail(self.scheduler.is_idle());
            if mail.stop {
                self.accept(mail);
                return self.end("the server is stopping");
            }
            self.accept(mail);
            if let Err(error) = self.step() {
                tracing::error!(
                    error = &error as &dyn std::error::Error,
                    "engine step failed"
                );
                // The receiver may be what is gone; the error at hand is the one to report.
                let _ = self.end(&error.to_string());
                return Err(error);
            }
            self.publish();
        }
    }

    /// One step: schedules a batch, starts it, and takes the results of the oldest under way when the device has as
    /// many as it can run at once.
    fn step(&mut self) -> Result<(), EngineError> {
        let schedule = self.scheduler.schedule(&mut self.blocks);
        self.note_changes(&schedule);
        let runs = !schedule.input.tokens.is_empty();
        if runs {
            self.counters.computed_tokens += schedule.input.tokens.len() as u64;
            let ticket = self.executor.submit(schedule.input, &schedule.requests);
            self.in_flight
                .push_back(ticket.map_err(EngineError::Device)?);
        }
        if runs && self.in_flight.len() < self.executor.depth() {
            return Ok(());
        }
        let Some(ticket) = self.in_flight.pop_front() else {
            return Ok(());
        };
        let sampled = self.executor.collect(ticket).map_err(EngineError::Device)?;
        let outputs = self.scheduler.commit(&mut self.blocks, sampled);
        self.counters.steps += 1;
        self.counters.generated_tokens += outputs
            .iter()
            .map(|output| output.tokens.len() as u64)
            .sum::<u64>();
        for ended in outputs.iter().filter(|output| output.finished.is_some()) {
            self.waiting_since.remove(&ended.id);
        }
        self.send(outputs)
    }

    /// Keeps since when each waiting request waits, from its arrival or its last preemption, and who waits no more.
    fn note_changes(&mut self, schedule: &Schedule) {
        let Schedule {
            admitted,
            preempted,
            ..
        } = schedule;
        if admitted.is_empty() && preempted.is_empty() {
            return;
        }
        let at = Instant::now();
        self.counters.preemptions += preempted.len() as u64;
        for &id in admitted {
            self.waiting_since.remove(&id);
            self.admitted.push(Admission { id, at });
        }
        self.waiting_since
            .extend(preempted.iter().map(|&id| (id, at)));
    }

    fn accept(&mut self, mail: Mail) {
        for (request, at) in mail.submitted {
            self.waiting_since.insert(request.id, at);
            self.scheduler.add(request);
        }
        for id in mail.aborted {
            self.waiting_since.remove(&id);
            self.scheduler.abort(&mut self.blocks, id);
        }
    }

    fn publish(&mut self) {
        let oldest = self.scheduler.oldest_waiting();
        self.handle.publish(Snapshot {
            blocks: self.blocks.counts(),
            load: self.scheduler.load(&self.blocks),
            oldest_waiting: oldest.and_then(|id| self.waiting_since.get(&id).copied()),
            counters: self.counters,
        });
    }

    /// Ends every request that is left with `why`.
    fn end(&mut self, why: &str) -> Result<(), EngineError> {
        let mut left = self.scheduler.abort_all(&mut self.blocks);
        left.extend(self.handle.close());
        self.publish();
        let finished = Some(FinishReason::Error(why.to_owned()));
        self.send(
            left.into_iter()
                .map(|id| Output {
                    id,
                    sequence: 0,
                    prompt_logprobs: Vec::new(),
                    tokens: Vec::new(),
                    finished: finished.clone(),
                })
                .collect(),
        )
    }

    fn send(&mut self, outputs: Vec<Output>) -> Result<(), EngineError> {
        let admitted = std::mem::take(&mut self.admitted);
        if admitted.is_empty() && outputs.is_empty() {
            return Ok(());
        }
        self.outputs
            .send(StepOutputs { admitted, outputs })
            .map_err(|_| EngineError::OutputsClosed)
    }
}
