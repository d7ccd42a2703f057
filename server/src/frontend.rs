//! The front end, between HTTP, which knows text, and the engine, which knows token ids: requests go in here, and what
//! becomes of them comes out.
//!
//! A request's tokens become text on one thread for all of them, which takes one message a step from the engine. That
//! thread never waits for a client: a request's channel has room for all that the request can give, and what lies
//! there unread counts in the [`budget`]. It knows nothing of HTTP.
//!
//! - [`call`]: who asks, and what it took. [`request`]: what goes in. [`stream`]: what comes out, and the end of a request whose client leaves.
//! - [`outputs`]: the thread: tokens to text, stop strings.
//! - [`timeline`]: pure: which latencies of a request are complete.

pub mod budget;
mod call;
mod outputs;
mod request;
mod stream;
mod timeline;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::Receiver;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

use tokio::sync::mpsc;

use crate::engine::{EngineHandle, EngineOutputs, RequestId, SubmitError};
use crate::metrics::Metrics;
use budget::ByteBudget;
pub use call::{Arrival, Call};
use outputs::{OutputThread, RequestState};
pub use request::GenerationRequest;
pub use stream::{RequestEvent, RequestStream};

/// Sends requests to the engine and gives out their events. Cheap to clone.
#[derive(Clone, Debug)]
pub struct AsyncEngine(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    engine: EngineHandle,
    metrics: Arc<Metrics>,
    budget: ByteBudget,
    next_id: AtomicU64,
    /// What the output thread has not seen yet. It looks before each step's outputs.
    commands: Mutex<Vec<Command>>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

#[derive(Debug)]
enum Command {
    /// By sequence; `None`: one that has ended before.
    Add(RequestId, Vec<Option<RequestState>>),
    /// One of its sequences.
    Remove(RequestId, u32),
}

impl AsyncEngine {
    /// Starts the output thread, which ends with the engine. Events that no client has taken count in `budget`.
    pub fn start(
        engine: EngineHandle,
        outputs: Receiver<EngineOutputs>,
        metrics: Arc<Metrics>,
        budget: ByteBudget,
    ) -> std::io::Result<Self> {
        let shared = Arc::new(Shared {
            engine,
            metrics,
            budget,
            next_id: AtomicU64::new(0),
            commands: Mutex::default(),
            thread: Mutex::default(),
        });
        let thread = OutputThread::new(Arc::clone(&shared));
        let thread = std::thread::Builder::new()
            .name("output".to_owned())
            .spawn(move || thread.run(&outputs))?;
        *lock(&shared.thread) = Some(thread);
        Ok(Self(shared))
    }

    /// The engine that the requests go to.
    pub fn handle(&self) -> &EngineHandle {
        &self.0.engine
    }

    /// The memory for requests and answers under way.
    pub fn budget(&self) -> &ByteBudget {
        &self.0.budget
    }

    /// Submits a request; the streams are its sequences'. `Err`: nothing changed.
    pub fn generate(&self, request: GenerationRequest) -> Result<Vec<RequestStream>, SubmitError> {
        let id = RequestId(self.0.next_id.fetch_add(1, Ordering::Relaxed));
        let longest = self.0.engine.model_info().max_model_len;
        let queued = Instant::now();
        let (mut states, mut streams) = (Vec::new(), Vec::new());
        for index in 0..request.n.get() {
            let (sender, events) = mpsc::channel(request.max_events(longest));
            let mut state = request.state(index, sender, self.0.budget.share(), queued);
            let shared = Arc::clone(&self.0);
            let known = request.resumed.get(index as usize);
            if let Some(reason) = known.and_then(|tokens| state.replay(tokens, &request)) {
                streams.push(RequestStream::over((id, index), reason, shared));
                states.push(None);
                continue;
            }
            streams.push(RequestStream::new(
                (id, index),
                events,
                state.settled(),
                shared,
            ));
            states.push(Some(state));
        }
        let has_ended: Vec<bool> = states.iter().map(Option::is_none).collect();
        if has_ended.iter().all(|has_ended| *has_ended) {
            return Ok(streams);
        }
        self.0.send(Command::Add(id, states));
        let (call, n_prompt) = (Arc::clone(&request.arrived.call), request.prompt.len());
        let engine_request = request.into_engine(id, &has_ended);
        if let Err(error) = self.0.engine.submit(engine_request) {
            streams.into_iter().for_each(RequestStream::forget);
            return Err(error);
        }
        call.prompted(n_prompt as u64);
        Ok(streams)
    }

    /// Waits until every output of the engine, which has ended, is with its client's stream.
    pub fn join(&self) {
        let thread = lock(&self.0.thread).take();
        if thread.is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the output thread panicked");
        }
    }
}

impl Shared {
    fn send(&self, command: Command) {
        lock(&self.commands).push(command);
    }

    fn take_commands(&self) -> Vec<Command> {
        std::mem::take(&mut *lock(&self.commands))
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    // Each change under these locks is whole, so that a panic elsewhere leaves nothing half done.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
