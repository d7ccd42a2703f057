//! The output thread: takes one message a step from the engine, turns tokens into text, matches stop strings, and
//! hands each client its events.
//!
//! It never waits for a client: a request's channel has room for all that the request can give. A client that has
//! left is noticed by the drop of its [`Running`], which frees the request's blocks before the next step. It knows
//! tokens and text, and nothing of HTTP.
//!
//! - [`timeline`]: pure: which spans of a request's life are over.

mod timeline;

use std::collections::HashMap;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Receiver;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Instant;

use futures::Stream;
use kvasir_kernels::step::Sampled;
use tokio::sync::mpsc;

use crate::engine::{
    Admission, EngineHandle, FinishReason, Output, Request, RequestId, StepOutputs, SubmitError,
};
use crate::metrics::{FinishLabel, Metrics};
use crate::text::stop::StopStrings;
use crate::text::{Detokenizer, StopMatcher};
use timeline::Timeline;

/// A request with what its tokens become on the way out.
#[derive(Debug)]
pub struct Generation {
    /// For the engine.
    pub request: Request,
    /// Ready to take the first generated token.
    pub detokenizer: Detokenizer,
    /// They end the text, and aren't part of it.
    pub stop: StopStrings,
    /// When the client's request had arrived.
    pub arrived: Instant,
}

/// What one step brought a client.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Event {
    /// Text that is decided: whole characters, and no part of a stop string.
    pub text: String,
    /// New tokens, those included whose text is still held back.
    pub tokens: Vec<Sampled>,
    /// Log-probabilities of further prompt tokens, where asked for.
    pub prompt_logprobs: Vec<Sampled>,
    /// Set on the last event.
    pub finished: Option<Finish>,
}

/// Why a text ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Finish {
    /// The end-of-sequence token, or another stop token.
    StopToken(u32),
    /// A stop string.
    StopString(String),
    /// `max_tokens` or the longest context.
    Length,
    /// The engine failed; in words.
    Error(String),
}

/// Sends requests to the engine and gives out their events. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Outputs(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    engine: EngineHandle,
    metrics: Arc<Metrics>,
    /// What the output thread has not seen yet. It looks before each step's outputs.
    inbox: Mutex<Vec<Mail>>,
}

#[derive(Debug)]
enum Mail {
    Add(RequestId, Box<TextStream>),
    Remove(RequestId),
}

impl Outputs {
    /// Starts the output thread. It ends with the engine.
    pub fn start(
        engine: EngineHandle,
        steps: Receiver<StepOutputs>,
        metrics: Arc<Metrics>,
    ) -> std::io::Result<Self> {
        let shared = Arc::new(Shared {
            engine,
            metrics,
            inbox: Mutex::default(),
        });
        let thread = OutputThread {
            shared: Arc::clone(&shared),
            streams: HashMap::new(),
        };
        std::thread::Builder::new()
            .name("output".to_owned())
            .spawn(move || thread.run(&steps))?;
        Ok(Self(shared))
    }

    /// The engine that the requests go to.
    pub fn engine(&self) -> &EngineHandle {
        &self.0.engine
    }

    /// Submits a request. `Err`: nothing changed.
    pub fn submit(&self, generation: Generation) -> Result<Running, SubmitError> {
        let Generation {
            request,
            detokenizer,
            stop,
            arrived,
        } = generation;
        let id = request.id;
        let longest = self.0.engine.facts().max_model_len as usize;
        // One event for each generated token and prefill step at most, and one at the end.
        let capacity = (request.max_tokens as usize).min(longest) + request.prompt.len() + 1;
        let (sender, events) = mpsc::channel(capacity);
        let settled = Arc::new(AtomicBool::new(false));
        let stream = TextStream {
            events: sender,
            detokenizer,
            stop: StopMatcher::new(stop),
            timeline: Timeline::new(arrived, Instant::now()),
            n_prompt: request.prompt.len() as u64,
            n_generated: 0,
            settled: Arc::clone(&settled),
        };
        self.0.send(Mail::Add(id, Box::new(stream)));
        if let Err(error) = self.0.engine.submit(request) {
            self.0.send(Mail::Remove(id));
            return Err(error);
        }
        Ok(Running {
            id,
            events,
            settled,
            shared: Arc::clone(&self.0),
        })
    }
}

impl Shared {
    fn send(&self, mail: Mail) {
        self.inbox
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(mail);
    }

    fn take_mail(&self) -> Vec<Mail> {
        std::mem::take(&mut *self.inbox.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// The client's side of a request: a stream of its events. Dropping it before the end aborts the request.
#[derive(Debug)]
pub struct Running {
    id: RequestId,
    events: mpsc::Receiver<Event>,
    settled: Arc<AtomicBool>,
    shared: Arc<Shared>,
}

impl Stream for Running {
    type Item = Event;

    /// Ends after the event that is finished; without one where the engine is gone.
    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Event>> {
        self.events.poll_recv(cx)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if !self.settled.swap(true, Ordering::AcqRel) {
            self.shared.engine.abort(self.id);
            self.shared.send(Mail::Remove(self.id));
            self.shared.metrics.request_finished(FinishLabel::Abort);
        }
    }
}

struct OutputThread {
    shared: Arc<Shared>,
    streams: HashMap<RequestId, Box<TextStream>>,
}

impl OutputThread {
    fn run(mut self, steps: &Receiver<StepOutputs>) {
        while let Ok(StepOutputs { admitted, outputs }) = steps.recv() {
            let now = Instant::now();
            self.read_mail();
            for Admission { id, at } in admitted {
                if let Some(stream) = self.streams.get_mut(&id) {
                    let metrics = &self.shared.metrics;
                    (stream.timeline).admitted(at, |span, length| metrics.observe(span, length));
                }
            }
            for output in outputs {
                self.give(output, now);
            }
        }
        // The engine is gone. Streams that are left end without a last event.
        self.read_mail();
    }

    fn read_mail(&mut self) {
        for mail in self.shared.take_mail() {
            match mail {
                Mail::Add(id, stream) => drop(self.streams.insert(id, stream)),
                Mail::Remove(id) => drop(self.streams.remove(&id)),
            }
        }
    }

    fn give(&mut self, output: Output, now: Instant) {
        let id = output.id;
        // Outputs that were on their way when the client left.
        let Some(stream) = self.streams.get_mut(&id) else {
            return;
        };
        let engine_finished = output.finished.is_some();
        let event = stream.take(output, now, &self.shared.metrics);
        if let Some(finish) = &event.finished
            && !stream.settled.swap(true, Ordering::AcqRel)
        {
            let metrics = &self.shared.metrics;
            metrics.request_finished(finish.label());
            metrics.request_lengths(stream.n_prompt, stream.n_generated);
            (stream.timeline).ended(now, |span, length| metrics.observe(span, length));
            if !engine_finished {
                self.shared.engine.abort(id);
            }
        }
        let finished = event.finished.is_some();
        // It has room by construction; it fails where the client has left, which its guard has told the engine.
        let _ = stream.events.try_send(event);
        if finished {
            self.streams.remove(&id);
        }
    }
}

/// The text of one request.
#[derive(Debug)]
struct TextStream {
    events: mpsc::Sender<Event>,
    detokenizer: Detokenizer,
    stop: StopMatcher,
    timeline: Timeline,
    n_prompt: u64,
    n_generated: u64,
    /// Its end is counted, and its blocks are free or being freed. Whoever sets it first does that.
    settled: Arc<AtomicBool>,
}

impl TextStream {
    fn take(&mut self, output: Output, now: Instant, metrics: &Metrics) -> Event {
        let mut event = Event {
            prompt_logprobs: output.prompt_logprobs,
            ..Event::default()
        };
        if !output.tokens.is_empty() {
            if self.n_generated == 0 {
                metrics.prompt(self.n_prompt);
            }
            self.n_generated += output.tokens.len() as u64;
            metrics.generated(output.tokens.len() as u64);
            (self.timeline).token(now, |span, length| metrics.observe(span, length));
        }
        let n_tokens = output.tokens.len();
        for (i, token) in output.tokens.into_iter().enumerate() {
            let id = token.token;
            event.tokens.push(token);
            // The token that stopped the generation is no part of the text, whatever it is.
            let stopped_by = i + 1 == n_tokens && output.finished == Some(FinishReason::Stop(id));
            if !stopped_by && self.push(id, &mut event) {
                return event;
            }
        }
        let Some(reason) = output.finished else {
            return event;
        };
        let mut rest = String::new();
        self.detokenizer.finish(&mut rest);
        if !self.match_stop(&rest, &mut event) {
            self.stop.finish(&mut event.text);
            event.finished = Some(match reason {
                FinishReason::Stop(id) => Finish::StopToken(id),
                FinishReason::Length => Finish::Length,
                FinishReason::Error(why) => Finish::Error(why),
            });
        }
        event
    }

    /// Adds a token's text. True where it completed a stop string.
    fn push(&mut self, id: u32, event: &mut Event) -> bool {
        let mut piece = String::new();
        self.detokenizer.push(id, &mut piece);
        self.match_stop(&piece, event)
    }

    fn match_stop(&mut self, piece: &str, event: &mut Event) -> bool {
        let Some(stop) = self.stop.push(piece, &mut event.text) else {
            return false;
        };
        event.finished = Some(Finish::StopString(stop.to_owned()));
        true
    }
}

impl Finish {
    fn label(&self) -> FinishLabel {
        match self {
            Self::StopToken(_) | Self::StopString(_) => FinishLabel::Stop,
            Self::Length => FinishLabel::Length,
            Self::Error(_) => FinishLabel::Error,
        }
    }
}
