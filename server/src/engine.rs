//! The engine: a thread of its own that makes steps, schedule -> submit -> sample -> collect -> commit. Where what changes
//! a row's logits depends on a token of the step before, a step is sampled only after that one's commit, while its own pass
//! runs.
//!
//! Requests go in through a bounded inbox ([`EngineHandle`]); each step sends one message, who was admitted and the
//! outputs of all its sequences, to the output thread. It knows token ids, never text, and no clock but for ages and the heartbeat.
//!
//! - [`groups`]: pure: which blocks a sequence holds when, by kind of layer.
//! - [`blocks`]: pure: the block pool and block tables.
//! - [`prefix`]: pure: which blocks hold which tokens. `eviction`: which of them go first.
//! - [`scheduler`]: pure: continuous batching, preemption. `beam`: pure: which beams go on.
//! - [`logits`]: pure: what a request changes in its logits. [`constraint`]: what else may restrict its tokens.
//! - [`pacer`]: pure: how many prompt tokens may run beside decodes.
//! - [`executor`]: what it needs of a model on a device.

mod beam;
pub mod blocks;
pub mod constraint;
mod eviction;
pub mod executor;
pub mod groups;
mod handle;
pub mod logits;
pub mod pacer;
pub mod prefix;
mod request;
pub mod scheduler;

use std::collections::{HashMap, VecDeque};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::Instant;

use kvasir_kernels::device::{DeviceError, Ticket};
use kvasir_kernels::shape::Limits;
use kvasir_kernels::step::LogitsRow;
use kvasir_kernels::stored::Dtype;

use blocks::BlockPool;
use executor::Executor;
use groups::CacheGroups;
use handle::{Command, Snapshot};
pub use handle::{Counters, EngineHandle};
use logits::Edits;
use pacer::{PrefillPacer, StepSize};
use prefix::PrefixCaching;
pub use request::{
    Admission, BeamParams, EarlyStopping, EngineOutputs, FinishReason, Request, RequestId,
    RequestOutput, SamplingParams, SubmitError, TokenLogprobs,
};
use scheduler::{Schedule, Scheduler};

/// Messages to the output thread that may lie unread. When it can't follow, the engine waits: outputs are never lost,
/// and the output thread waits for no client.
const UNREAD_OUTPUTS: usize = 64;

/// What is served, and its limits.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelInfo {
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
    /// Blocks are kept for what they hold, and found again by it.
    pub prefix_caching: Option<PrefixCaching>,
    /// A step with prompt tokens takes at most so many times as long as one that only decodes; `None`: prompts get all
    /// the tokens of a step.
    pub max_decode_stretch: Option<f64>,
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
        info: ModelInfo,
        max_waiting: u32,
    ) -> Result<(Self, Receiver<EngineOutputs>), EngineError> {
        let (outputs, receiver) = sync_channel(UNREAD_OUTPUTS);
        let handle = EngineHandle::new(info, max_waiting);
        let mut engine_loop = EngineLoop::new(executor, handle.clone(), outputs);
        let thread = std::thread::Builder::new()
            .name("engine".to_owned())
            .spawn(move || engine_loop.run())
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

/// What commands leave to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    Step,
    Stop,
}

/// A step under way.
struct InFlight {
    ticket: Ticket,
    size: StepSize,
    submitted: Instant,
}

/// The engine's thread: owns the device, the pool and the scheduler.
struct EngineLoop {
    executor: Box<dyn Executor>,
    handle: EngineHandle,
    outputs: SyncSender<EngineOutputs>,
    blocks: BlockPool,
    scheduler: Scheduler,
    in_flight: VecDeque<InFlight>,
    pacer: PrefillPacer,
    /// When the newest step ended that was collected.
    collected: Option<Instant>,
    /// When each request came that has not ended: its age in the queue counts from there, a preemption or not.
    arrived: HashMap<RequestId, Instant>,
    /// Not sent yet.
    admitted: Vec<Admission>,
    counters: Counters,
}

impl Drop for EngineLoop {
    /// However the thread ends, a panic included, nobody sends to it any more.
    fn drop(&mut self) {
        self.handle.close();
    }
}

impl EngineLoop {
    fn new(
        executor: Box<dyn Executor>,
        handle: EngineHandle,
        outputs: SyncSender<EngineOutputs>,
    ) -> Self {
        let info = handle.model_info();
        Self {
            blocks: BlockPool::new(info.n_blocks, info.groups.clone(), info.prefix_caching),
            scheduler: Scheduler::new(info.limits, info.max_model_len),
            pacer: PrefillPacer::new(
                info.limits.max_tokens as u32,
                executor.row_tile() as u32,
                info.max_decode_stretch,
            ),
            executor,
            outputs,
            in_flight: VecDeque::new(),
            collected: None,
            arrived: HashMap::new(),
            admitted: Vec::new(),
            counters: Counters::default(),
            handle,
        }
    }

    fn run(&mut self) -> Result<(), EngineError> {
        loop {
            let commands = self.handle.take_commands(self.scheduler.is_idle());
            if self.obey(commands) == Next::Stop {
                return self.end("the server is stopping");
            }
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
        let prompt_tokens = self.pacer.budget(self.scheduler.next_step());
        let schedule = self.scheduler.schedule(&mut self.blocks, prompt_tokens);
        self.count(&schedule);
        // A step may take long: who reads the load meanwhile sees what runs in it.
        self.publish();
        if schedule.input.tokens.is_empty() {
            let outputs = self.collect()?;
            return self.send(outputs);
        }
        let size = schedule.size();
        self.counters.computed_tokens += schedule.input.tokens.len() as u64;
        self.counters.slots += schedule.slots;
        let submitted = Instant::now();
        let ticket = self.executor.submit(schedule.input);
        self.in_flight.push_back(InFlight {
            ticket: ticket.map_err(EngineError::Device)?,
            size,
            submitted,
        });
        if schedule.edits == Edits::AfterCommit {
            assert!(self.in_flight.len() > 1, "the step before is under way");
            let outputs = self.collect()?;
            self.sample(schedule.requests, schedule.edits)?;
            self.send(outputs)?;
        } else {
            self.sample(schedule.requests, schedule.edits)?;
        }
        // With beams in the batch, collect comes before schedule: the host chooses how they go on.
        let n_left = match schedule.has_beams {
            true => 0,
            false => self.executor.depth() - 1,
        };
        while self.in_flight.len() > n_left {
            let outputs = self.collect()?;
            self.send(outputs)?;
        }
        Ok(())
    }

    /// Samples from the newest step, its rows edited. What they share with the scheduler is let go of here: it changes with
    /// the next commit.
    fn sample(&mut self, mut requests: Vec<LogitsRow>, edits: Edits) -> Result<(), EngineError> {
        if edits != Edits::None {
            self.scheduler.edit_logits(&mut requests);
        }
        let newest = self.in_flight.back().expect("a step was submitted");
        let sampled = self.executor.sample(&newest.ticket, &requests);
        sampled.map_err(EngineError::Device)
    }

    /// Waits for the oldest step under way, and commits it; nothing where there is none.
    fn collect(&mut self) -> Result<Vec<RequestOutput>, EngineError> {
        let Some(step) = self.in_flight.pop_front() else {
            return Ok(Vec::new());
        };
        let sampled = self
            .executor
            .collect(step.ticket)
            .map_err(EngineError::Device)?;
        // Its device was busy with the step before it until that ended.
        let now = Instant::now();
        let began = self
            .collected
            .map_or(step.submitted, |at| at.max(step.submitted));
        let took = now.saturating_duration_since(began);
        tracing::trace!(size = ?step.size, ?took, "step");
        self.pacer.observe(step.size, took);
        self.collected = Some(now);
        let outputs = self.scheduler.commit(&mut self.blocks, sampled);
        self.counters.steps += 1;
        self.counters.prompt_tokens += u64::from(step.size.n_prompt);
        self.counters.generated_tokens += outputs
            .iter()
            .map(|output| output.tokens.len() as u64)
            .sum::<u64>();
        for ended in outputs.iter().filter(|output| output.finished.is_some()) {
            self.counters.ended_sequences += 1;
            self.forget_arrival(ended.id);
        }
        Ok(outputs)
    }

    /// Counts preemptions, and keeps when requests were admitted until it is sent.
    fn count(&mut self, schedule: &Schedule) {
        self.counters.preemptions += schedule.preempted.len() as u64;
        if !schedule.admitted.is_empty() {
            let at = Instant::now();
            let admitted = schedule.admitted.iter();
            self.admitted.extend(admitted.map(|admitted| Admission {
                id: admitted.id,
                at,
                cached_tokens: admitted.cached_tokens,
            }));
        }
    }

    fn obey(&mut self, commands: impl IntoIterator<Item = Command>) -> Next {
        let mut next = Next::Step;
        for command in commands {
            match command {
                Command::Submit {
                    request,
                    chain,
                    arrived,
                } => {
                    self.arrived.insert(request.id, arrived);
                    self.scheduler.add(&self.blocks, *request, chain);
                }
                Command::Abort(id) => {
                    self.arrived.remove(&id);
                    self.scheduler.abort(&mut self.blocks, id);
                }
                Command::AbortSequence(id, index) => {
                    self.scheduler.abort_sequence(&mut self.blocks, id, index);
                    self.forget_arrival(id);
                }
                Command::Stop => next = Next::Stop,
            }
        }
        next
    }

    /// Forgets when a request came, if it has ended.
    fn forget_arrival(&mut self, id: RequestId) {
        if !self.scheduler.is_live(id) {
            self.arrived.remove(&id);
        }
    }

    fn publish(&mut self) {
        let oldest = self.scheduler.oldest_waiting();
        self.handle.publish(Snapshot {
            blocks: self.blocks.counts(),
            load: self.scheduler.load(),
            oldest_waiting: oldest.and_then(|id| self.arrived.get(&id).copied()),
            counters: self.counters,
        });
    }

    /// Ends every sequence that is left with `why`.
    fn end(&mut self, why: &str) -> Result<(), EngineError> {
        let mut left = self.scheduler.abort_all(&mut self.blocks);
        left.extend(self.handle.close());
        self.publish();
        let finished = Some(FinishReason::Error(why.to_owned()));
        self.send(
            left.into_iter()
                .map(|(id, sequence)| RequestOutput {
                    id,
                    sequence,
                    prompt_logprobs: Vec::new(),
                    tokens: Vec::new(),
                    finished: finished.clone(),
                    beam_score: None,
                })
                .collect(),
        )
    }

    fn send(&mut self, outputs: Vec<RequestOutput>) -> Result<(), EngineError> {
        let admitted = std::mem::take(&mut self.admitted);
        if admitted.is_empty() && outputs.is_empty() {
            return Ok(());
        }
        self.outputs
            .send(EngineOutputs { admitted, outputs })
            .map_err(|_| EngineError::OutputsClosed)
    }
}
