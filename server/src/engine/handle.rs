//! The handle to a running engine: the commands that wait for it, and the report that it publishes.
//!
//! One short lock serves both sides: neither ever waits for the other's work under it. A request is counted from the
//! moment that it is submitted, wherever it is. The handle knows the clock, for ages; it knows nothing of how steps
//! are made.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use kvasir_crds::LoadReport;
use kvasir_crds::load_report::{BlockCounts, QueueCounts, SCHEMA, SlotCounts, TotalCounts};

use super::blocks::{PoolCounts, SlotUse};
use super::groups::CacheGroups;
use super::prefix::PrefixChain;
use super::scheduler::Load;
use super::{ModelInfo, Request, RequestId, SubmitError};

/// How often an idle engine says that it lives.
const HEARTBEAT: Duration = Duration::from_secs(1);

/// Counts since the start, for metrics.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Steps that were committed.
    pub steps: u64,
    /// Input tokens of all steps, recomputed ones included.
    pub computed_tokens: u64,
    /// Prompt tokens among them.
    pub prompt_tokens: u64,
    /// Output tokens.
    pub generated_tokens: u64,
    /// Sequences that ended.
    pub ended_sequences: u64,
    /// Sequences preempted.
    pub preemptions: u64,
    /// Slots of the cache, summed over steps.
    pub slots: SlotUse,
}

/// What the engine publishes, at the beginning and the end of each step.
#[derive(Clone, Debug)]
pub(super) struct Snapshot {
    pub(super) blocks: PoolCounts,
    pub(super) load: Load,
    pub(super) oldest_waiting: Option<Instant>,
    pub(super) counters: Counters,
}

impl Snapshot {
    /// Counts a request that waits and that the scheduler hasn't reported.
    fn add_waiting(&mut self, request: &Request, arrived: Instant, groups: &CacheGroups) {
        let n_tokens = request.prompt.len() as u32;
        self.load.n_waiting += 1;
        self.load.waiting_blocks += blocks_needed(groups, request, n_tokens);
        self.load.prefill_backlog_tokens += u64::from(n_tokens);
        self.oldest_waiting = self.oldest_waiting.into_iter().chain([arrived]).min();
    }
}

/// Blocks that a request's sequences hold at most at once when each has `n_tokens` tokens.
fn blocks_needed(groups: &CacheGroups, request: &Request, n_tokens: u32) -> u64 {
    let own = groups.own_blocks_for(request.prompt.len() as u32, n_tokens);
    let n_others = request.n_sequences().get() - 1;
    u64::from(groups.blocks_for(n_tokens)) + u64::from(n_others) * u64::from(own)
}

/// What a handle asks of the engine.
#[derive(Debug)]
pub(super) enum Command {
    Submit {
        request: Box<Request>,
        /// The keys of its prompt, where prefixes are cached.
        chain: Option<PrefixChain>,
        arrived: Instant,
    },
    Abort(RequestId),
    AbortSequence(RequestId, u32),
    Stop,
}

#[derive(Debug)]
struct State {
    /// Sent since the engine last looked.
    commands: VecDeque<Command>,
    /// What the engine published last, and the requests that it has taken since.
    snapshot: Snapshot,
    sequence: u64,
    heartbeat: Instant,
    /// A stop is among the commands, or was.
    stopping: bool,
    stopped: bool,
}

#[derive(Debug)]
struct Shared {
    info: ModelInfo,
    max_waiting: u32,
    state: Mutex<State>,
    command_arrived: Condvar,
}

/// Sends requests to the engine and reads its load; cheap to clone, and never blocks on a step.
#[derive(Clone, Debug)]
pub struct EngineHandle(Arc<Shared>);

impl EngineHandle {
    pub(super) fn new(info: ModelInfo, max_waiting: u32) -> Self {
        let total = info.n_blocks;
        let snapshot = Snapshot {
            blocks: PoolCounts {
                total,
                active: 0,
                cached: 0,
                free: total,
                unshared: 0,
            },
            load: Load::default(),
            oldest_waiting: None,
            counters: Counters::default(),
        };
        let state = State {
            commands: VecDeque::new(),
            snapshot,
            sequence: 0,
            heartbeat: Instant::now(),
            stopping: false,
            stopped: false,
        };
        Self(Arc::new(Shared {
            info,
            max_waiting,
            state: Mutex::new(state),
            command_arrived: Condvar::new(),
        }))
    }

    /// What is served, and its limits.
    pub fn model_info(&self) -> &ModelInfo {
        &self.0.info
    }

    /// Queues a request. Its outputs go to the receiver that [`Engine::start`](super::Engine::start) returned.
    pub fn submit(&self, request: Request) -> Result<(), SubmitError> {
        self.check_fits(&request)?;
        // A prompt is hashed here, not on the engine's thread, which others wait for.
        let info = self.model_info();
        let chain = info.prefix_caching.map(|caching| {
            let (scope, size) = (request.prefix_scope(), info.groups.block_size());
            let mut chain = PrefixChain::new(caching.root, scope, size);
            chain.extend(&request.prompt);
            chain
        });
        let mut state = self.state();
        if state.stopped || state.stopping {
            return Err(SubmitError::Stopped);
        }
        let waiting = u64::from(state.snapshot_now(&self.0.info).load.n_waiting);
        let limit = u64::from(self.0.max_waiting);
        if waiting >= limit {
            return Err(SubmitError::QueueFull { waiting, limit });
        }
        state.commands.push_back(Command::Submit {
            request: Box::new(request),
            chain,
            arrived: Instant::now(),
        });
        drop(state);
        self.0.command_arrived.notify_one();
        Ok(())
    }

    /// Ends a request whose client has left, or that has reached a stop string: its blocks are free before the next
    /// step. No output follows but those already sent. Unknown ids are no mistake: the request may just have ended.
    pub fn abort(&self, id: RequestId) {
        let mut state = self.state();
        let n_before = state.commands.len();
        state.commands.retain(
            |command| !matches!(command, Command::Submit { request, .. } if request.id == id),
        );
        if state.commands.len() == n_before && !state.stopped {
            state.commands.push_back(Command::Abort(id));
            drop(state);
            self.0.command_arrived.notify_one();
        }
    }

    /// Ends one sequence of a request, as [`EngineHandle::abort`] ends all of them.
    pub fn abort_sequence(&self, id: RequestId, index: u32) {
        let mut state = self.state();
        if !state.stopped {
            state.commands.push_back(Command::AbortSequence(id, index));
            drop(state);
            self.0.command_arrived.notify_one();
        }
    }

    /// Tells the engine to end after the step under way. Requests that are left get a last output with
    /// [`FinishReason::Error`](super::FinishReason::Error); a drain therefore waits until none is left.
    pub fn stop(&self) {
        let mut state = self.state();
        state.stopping = true;
        state.commands.push_back(Command::Stop);
        drop(state);
        self.0.command_arrived.notify_one();
    }

    /// The load at this moment, never waiting for a step. `boot_id` and `draining` are the caller's to fill in.
    pub fn load(&self) -> LoadReport {
        let now = Instant::now();
        let state = self.state();
        let Snapshot {
            blocks,
            load,
            oldest_waiting,
            counters,
        } = state.snapshot_now(&self.0.info);
        let age = |at| millis(now.saturating_duration_since(at));
        LoadReport {
            schema: Some(SCHEMA),
            boot_id: None,
            sequence: Some(state.sequence),
            heartbeat_age_ms: Some(age(state.heartbeat)),
            draining: None,
            blocks: Some(BlockCounts {
                block_size: self.0.info.groups.block_size().get(),
                total: blocks.total.into(),
                active: blocks.active.into(),
                cached: blocks.cached.into(),
                free: blocks.free.into(),
                waiting_need: load.waiting_blocks,
            }),
            page_demand: Some(self.0.info.groups.page_demand()),
            slots: Some(SlotCounts {
                running: Some(load.n_sequences.into()),
                limit: Some(self.0.info.limits.max_sequences as u64),
                generated_tokens: Some(load.generated_tokens),
            }),
            queue: Some(QueueCounts {
                running: load.n_running.into(),
                waiting: load.n_waiting.into(),
                waiting_limit: self.0.max_waiting.into(),
                oldest_waiting_ms: oldest_waiting.map_or(0, age),
            }),
            prefill_backlog_tokens: Some(load.prefill_backlog_tokens),
            preemptions: Some(counters.preemptions),
            totals: Some(TotalCounts {
                prompt_tokens: Some(counters.prompt_tokens),
                generated_tokens: Some(counters.generated_tokens),
                ended_sequences: Some(counters.ended_sequences),
            }),
            held: None,
            // Others know them.
            model: None,
            start: None,
        }
    }

    /// Counts since the start.
    pub fn counters(&self) -> Counters {
        self.state().snapshot.counters
    }

    /// The engine has ended, by [`EngineHandle::stop`] or because it failed.
    pub fn is_stopped(&self) -> bool {
        self.state().stopped
    }

    fn check_fits(&self, request: &Request) -> Result<(), SubmitError> {
        let info = self.model_info();
        let prompt_tokens = request.prompt.len() as u64;
        if prompt_tokens > u64::from(info.max_model_len) {
            return Err(SubmitError::PromptTooLong {
                prompt_tokens,
                max_model_len: info.max_model_len,
            });
        }
        let (n, limit) = (
            request.n_sequences().get(),
            info.limits.max_sequences as u32,
        );
        if n > limit {
            return Err(SubmitError::TooManySequences { n, limit });
        }
        check_beams(request, info.vocab_size)?;
        let n_tokens =
            (prompt_tokens + u64::from(request.max_tokens)).min(info.max_model_len.into());
        let needed_blocks = blocks_needed(&info.groups, request, n_tokens as u32);
        let total_blocks = u64::from(info.n_blocks);
        if needed_blocks > total_blocks {
            return Err(SubmitError::NeverFits {
                needed_blocks,
                total_blocks,
                block_size: info.groups.block_size().get(),
            });
        }
        Ok(())
    }

    /// The engine's side: takes the commands at once, or when `idle` waits for one, beating meanwhile. Requests among
    /// them stay counted until the engine publishes again.
    pub(super) fn take_commands(&self, idle: bool) -> VecDeque<Command> {
        let mut state = self.state();
        state.heartbeat = Instant::now();
        while idle && state.commands.is_empty() {
            let waited = self.0.command_arrived.wait_timeout(state, HEARTBEAT);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
            state.heartbeat = Instant::now();
        }
        state.snapshot = state.snapshot_now(&self.0.info);
        std::mem::take(&mut state.commands)
    }

    /// The engine's side: publishes the state after a step.
    pub(super) fn publish(&self, snapshot: Snapshot) {
        let mut state = self.state();
        state.snapshot = snapshot;
        state.sequence += 1;
        state.heartbeat = Instant::now();
    }

    /// The engine's side: no step follows. Returns the sequences of the requests that came too late.
    pub(super) fn close(&self) -> Vec<(RequestId, u32)> {
        let mut state = self.state();
        state.stopped = true;
        let left = state
            .commands
            .drain(..)
            .filter_map(|command| match command {
                Command::Submit { request, .. } => Some(request),
                Command::Abort(_) | Command::AbortSequence(..) | Command::Stop => None,
            });
        left.flat_map(|request| (0..request.n.get()).map(move |index| (request.id, index)))
            .collect()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Each change under the lock is whole, so that a panic elsewhere leaves nothing half done.
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// What was published last, and every request that waits since.
    fn snapshot_now(&self, info: &ModelInfo) -> Snapshot {
        let mut snapshot = self.snapshot.clone();
        for command in &self.commands {
            if let Command::Submit {
                request, arrived, ..
            } = command
            {
                snapshot.add_waiting(request, *arrived, &info.groups);
            }
        }
        snapshot
    }
}

/// A device reports enough of the most likely tokens for a request's beams.
fn check_beams(request: &Request, vocab_size: u32) -> Result<(), SubmitError> {
    let limit = usize::from(u8::MAX).min(vocab_size as usize);
    let n_stop_tokens = request.n_stop_tokens();
    match request.beams {
        Some(beams) if beams.n_candidates(n_stop_tokens) > limit => Err(SubmitError::TooWide {
            width: beams.width.get(),
            n_stop_tokens,
            limit,
        }),
        _ => Ok(()),
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
