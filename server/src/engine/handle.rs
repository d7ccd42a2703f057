//! The handle to a running engine: the bounded inbox, and the report that the engine publishes each step.
//!
//! One short lock serves both sides: neither ever waits for the other's work under it. The handle knows the clock,
//! for ages; it knows nothing of how steps are made.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use kvasir_crds::LoadReport;
use kvasir_crds::load_report::{BlockCounts, QueueCounts, SCHEMA};

use super::blocks::PoolCounts;
use super::scheduler::Load;
use super::{ModelFacts, Request, RequestId, SubmitError};

/// How often an idle engine says that it lives.
const HEARTBEAT: Duration = Duration::from_secs(1);

/// Counts since the start, for metrics.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Steps that were committed.
    pub steps: u64,
    /// Input tokens of all steps, recomputed ones included.
    pub computed_tokens: u64,
    /// Output tokens.
    pub generated_tokens: u64,
    /// Sequences preempted.
    pub preemptions: u64,
}

/// What the engine publishes after each step.
#[derive(Clone, Debug)]
pub(super) struct Snapshot {
    pub(super) blocks: PoolCounts,
    pub(super) load: Load,
    pub(super) oldest_waiting: Option<Instant>,
    pub(super) counters: Counters,
}

/// What the handles have sent since the engine last looked.
#[derive(Debug, Default)]
pub(super) struct Mail {
    pub(super) submitted: VecDeque<(Request, Instant)>,
    pub(super) aborted: Vec<RequestId>,
    pub(super) stop: bool,
}

impl Mail {
    fn is_empty(&self) -> bool {
        self.submitted.is_empty() && self.aborted.is_empty() && !self.stop
    }
}

#[derive(Debug)]
struct State {
    mail: Mail,
    snapshot: Snapshot,
    sequence: u64,
    heartbeat: Instant,
    stopped: bool,
}

#[derive(Debug)]
struct Shared {
    facts: ModelFacts,
    max_waiting: u32,
    state: Mutex<State>,
    mail_arrived: Condvar,
}

/// Sends requests to the engine and reads its load; cheap to clone, and never blocks on a step.
#[derive(Clone, Debug)]
pub struct EngineHandle(Arc<Shared>);

impl EngineHandle {
    pub(super) fn new(facts: ModelFacts, max_waiting: u32) -> Self {
        let total = facts.n_blocks;
        let snapshot = Snapshot {
            blocks: PoolCounts {
                total,
                active: 0,
                cached: 0,
                free: total,
            },
            load: Load::default(),
            oldest_waiting: None,
            counters: Counters::default(),
        };
        let state = State {
            mail: Mail::default(),
            snapshot,
            sequence: 0,
            heartbeat: Instant::now(),
            stopped: false,
        };
        Self(Arc::new(Shared {
            facts,
            max_waiting,
            state: Mutex::new(state),
            mail_arrived: Condvar::new(),
        }))
    }

    /// What is served, and its limits.
    pub fn facts(&self) -> &ModelFacts {
        &self.0.facts
    }

    /// Queues a request. Its outputs go to the receiver that [`Engine::start`](super::Engine::start) returned.
    pub fn submit(&self, request: Request) -> Result<(), SubmitError> {
        self.check_fits(&request)?;
        let mut state = self.state();
        if state.stopped || state.mail.stop {
            return Err(SubmitError::Stopped);
        }
        let waiting = state.mail.submitted.len() as u64 + u64::from(state.snapshot.load.n_waiting);
        let limit = u64::from(self.0.max_waiting);
        if waiting >= limit {
            return Err(SubmitError::QueueFull { waiting, limit });
        }
        state.mail.submitted.push_back((request, Instant::now()));
        drop(state);
        self.0.mail_arrived.notify_one();
        Ok(())
    }

    /// Ends a request whose client has left, or that has reached a stop string: its blocks are free before the next
    /// step. No output follows but those already sent. Unknown ids are no mistake: the request may just have ended.
    pub fn abort(&self, id: RequestId) {
        let mut state = self.state();
        let n_before = state.mail.submitted.len();
        state.mail.submitted.retain(|(request, _)| request.id != id);
        if state.mail.submitted.len() == n_before && !state.stopped {
            state.mail.aborted.push(id);
            drop(state);
            self.0.mail_arrived.notify_one();
        }
    }

    /// Tells the engine to end after the step under way. Requests that are left get a last output with
    /// [`FinishReason::Error`](super::FinishReason::Error); a drain therefore waits until none is left.
    pub fn stop(&self) {
        self.state().mail.stop = true;
        self.0.mail_arrived.notify_one();
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
        } = state.snapshot;
        let submitted = || state.mail.submitted.iter();
        let prompts = || submitted().map(|(request, _)| request.prompt.len() as u64);
        let block_size = self.0.facts.block_size;
        let oldest = oldest_waiting
            .into_iter()
            .chain(submitted().map(|(_, at)| *at))
            .min();
        LoadReport {
            schema: Some(SCHEMA),
            boot_id: None,
            sequence: Some(state.sequence),
            heartbeat_age_ms: Some(millis(now.saturating_duration_since(state.heartbeat))),
            draining: None,
            blocks: Some(BlockCounts {
                block_size,
                total: blocks.total.into(),
                active: blocks.active.into(),
                cached: blocks.cached.into(),
                free: blocks.free.into(),
                waiting_need: load.waiting_blocks
                    + prompts()
                        .map(|n| n.div_ceil(u64::from(block_size)))
                        .sum::<u64>(),
            }),
            queue: Some(QueueCounts {
                running: load.n_running.into(),
                waiting: u64::from(load.n_waiting) + submitted().len() as u64,
                waiting_limit: self.0.max_waiting.into(),
                oldest_waiting_ms: oldest.map_or(0, |at| millis(now.saturating_duration_since(at))),
            }),
            prefill_backlog_tokens: Some(load.prefill_backlog_tokens + prompts().sum::<u64>()),
            preemptions: Some(counters.preemptions),
            ..LoadReport::default()
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
        let facts = self.facts();
        let prompt_tokens = request.prompt.len() as u64;
        if prompt_tokens > u64::from(facts.max_model_len) {
            return Err(SubmitError::PromptTooLong {
                prompt_tokens,
                max_model_len: facts.max_model_len,
            });
        }
        let n_tokens =
            (prompt_tokens + u64::from(request.max_tokens)).min(facts.max_model_len.into());
        let needed_blocks = n_tokens.div_ceil(u64::from(facts.block_size));
        let total_blocks = u64::from(facts.n_blocks);
        if needed_blocks > total_blocks {
            return Err(SubmitError::NeverFits {
                needed_blocks,
                total_blocks,
                block_size: facts.block_size,
            });
        }
        Ok(())
    }

    /// The engine's side: takes the mail at once, or when `idle` waits for it, beating meanwhile.
    pub(super) fn take_mail(&self, idle: bool) -> Mail {
        let mut state = self.state();
        state.heartbeat = Instant::now();
        while idle && state.mail.is_empty() {
            let waited = self.0.mail_arrived.wait_timeout(state, HEARTBEAT);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
            state.heartbeat = Instant::now();
        }
        std::mem::take(&mut state.mail)
    }

    /// The engine's side: publishes the state after a step.
    pub(super) fn publish(&self, snapshot: Snapshot) {
        let mut state = self.state();
        state.snapshot = snapshot;
        state.sequence += 1;
        state.heartbeat = Instant::now();
    }

    /// The engine's side: no step follows. Returns the requests that came too late.
    pub(super) fn close(&self) -> Vec<RequestId> {
        let mut state = self.state();
        state.stopped = true;
        state
            .mail
            .submitted
            .drain(..)
            .map(|(request, _)| request.id)
            .collect()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Each change under the lock is whole, so that a panic elsewhere leaves nothing half done.
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
