//! The output thread: takes one message a step from the engine, turns tokens into text, matches stop strings, and hands
//! each client its events. A client that has left is known by the drop of its stream, which also tells the engine.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Receiver;
use std::time::Instant;

use tokio::sync::mpsc;

use super::budget::{ByteBudget, Purpose};
use super::stream::RequestEvent;
use super::timeline::Timeline;
use super::{Command, Shared};
use crate::engine::{Admission, EngineOutputs, FinishReason, RequestId, RequestOutput};
use crate::metrics::Metrics;
use crate::text::stop::StopStrings;
use crate::text::{Detokenizer, StopMatcher};

pub(super) struct OutputThread {
    shared: Arc<Shared>,
    requests: HashMap<RequestId, Box<RequestState>>,
}

impl OutputThread {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self {
            shared,
            requests: HashMap::new(),
        }
    }

    pub(super) fn run(mut self, steps: &Receiver<EngineOutputs>) {
        while let Ok(EngineOutputs { admitted, outputs }) = steps.recv() {
            let now = Instant::now();
            self.obey_commands();
            for Admission {
                id,
                at,
                cached_tokens,
            } in admitted
            {
                if let Some(request) = self.requests.get_mut(&id) {
                    let metrics = &self.shared.metrics;
                    if let Some(n_hit) = cached_tokens {
                        metrics.prefix_cache(request.n_prompt, n_hit.into());
                        request.cached_tokens = Some(n_hit);
                    }
                    (request.timeline).admitted(at, |kind, length| metrics.observe(kind, length));
                }
            }
            for output in outputs {
                self.give(output, now);
            }
        }
        // The engine is gone. Streams that are left end without a last event.
        self.obey_commands();
    }

    fn obey_commands(&mut self) {
        for command in self.shared.take_commands() {
            match command {
                Command::Add(id, request) => drop(self.requests.insert(id, request)),
                Command::Remove(id) => drop(self.requests.remove(&id)),
            }
        }
    }

    fn give(&mut self, output: RequestOutput, now: Instant) {
        let id = output.id;
        // Outputs that were on their way when the client left.
        let Some(request) = self.requests.get_mut(&id) else {
            return;
        };
        let engine_finished = output.finished.is_some();
        let mut event = request.take(output, now, &self.shared.metrics);
        let mut lease = request.budget.lease(Purpose::Answer);
        match lease.grow(event.n_bytes()) {
            Ok(()) => event.lease = Some(lease),
            Err(exhausted) => {
                event = RequestEvent {
                    finished: Some(FinishReason::Error(exhausted.to_string())),
                    ..RequestEvent::default()
                }
            }
        }
        if let Some(reason) = &event.finished
            && !request.settled.swap(true, Ordering::AcqRel)
        {
            let metrics = &self.shared.metrics;
            metrics.request_finished(reason);
            metrics.request_lengths(request.n_prompt, request.n_generated);
            (request.timeline).ended(now, |kind, length| metrics.observe(kind, length));
            if !engine_finished {
                self.shared.engine.abort(id);
            }
        }
        let finished = event.finished.is_some();
        // It has room by construction; it fails where the client has left, which its stream's drop tells the engine.
        let _ = request.events.try_send(event);
        if finished {
            self.requests.remove(&id);
        }
    }
}

/// The text of one request.
#[derive(Debug)]
pub(super) struct RequestState {
    events: mpsc::Sender<RequestEvent>,
    /// Its share of the budget for events that its client hasn't taken.
    budget: ByteBudget,
    detokenizer: Detokenizer,
    stop: StopMatcher,
    timeline: Timeline,
    n_prompt: u64,
    n_generated: u64,
    /// Prompt tokens that the prefix cache held, until they are told.
    cached_tokens: Option<u32>,
    /// Its end is counted, and its blocks are free or being freed. Whoever sets it first does that.
    settled: Arc<AtomicBool>,
}

impl RequestState {
    /// `times`: when the client's call came, and when the request was given to the engine.
    pub(super) fn new(
        events: mpsc::Sender<RequestEvent>,
        budget: ByteBudget,
        detokenizer: Detokenizer,
        stop: StopStrings,
        n_prompt: u64,
        times: (Instant, Instant),
    ) -> Self {
        Self {
            events,
            budget,
            detokenizer,
            stop: StopMatcher::new(stop),
            timeline: Timeline::new(times.0, times.1),
            n_prompt,
            n_generated: 0,
            cached_tokens: None,
            settled: Arc::default(),
        }
    }

    pub(super) fn settled(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.settled)
    }

    fn take(&mut self, output: RequestOutput, now: Instant, metrics: &Metrics) -> RequestEvent {
        let mut event = RequestEvent {
            prompt_logprobs: output.prompt_logprobs,
            cached_tokens: self.cached_tokens.take(),
            ..RequestEvent::default()
        };
        if !output.tokens.is_empty() {
            if self.n_generated == 0 {
                metrics.prompt(self.n_prompt);
            }
            self.n_generated += output.tokens.len() as u64;
            metrics.generated(output.tokens.len() as u64);
            (self.timeline).token(now, |kind, length| metrics.observe(kind, length));
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
            event.finished = Some(reason);
        }
        event
    }

    /// Adds a token's text. True where it completed a stop string.
    fn push(&mut self, id: u32, event: &mut RequestEvent) -> bool {
        let mut piece = String::new();
        self.detokenizer.push(id, &mut piece);
        self.match_stop(&piece, event)
    }

    fn match_stop(&mut self, piece: &str, event: &mut RequestEvent) -> bool {
        let Some(stop) = self.stop.push(piece, &mut event.text) else {
            return false;
        };
        event.finished = Some(FinishReason::StopString(stop.to_owned()));
        true
    }
}
