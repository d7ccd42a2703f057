//! The output thread: takes one message a step from the engine, turns tokens into text, matches stop strings, and hands
//! each client its events. A client that has left is known by the drop of its stream, which also tells the engine.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Receiver;
use std::time::Instant;

use tokio::sync::mpsc;

use super::budget::{ByteBudget, Purpose};
use super::call::Call;
use super::stream::RequestEvent;
use super::timeline::Timeline;
use super::{Command, GenerationRequest, Shared};
use crate::engine::{
    Admission, EngineOutputs, FinishReason, RequestId, RequestOutput, TokenLogprobs,
};
use crate::metrics::Metrics;
use crate::text::stop::StopStrings;
use crate::text::{Detokenizer, StopMatcher};

pub(super) struct OutputThread {
    shared: Arc<Shared>,
    /// By sequence; `None` where one has ended.
    requests: HashMap<RequestId, Vec<Option<RequestState>>>,
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
                let metrics = &self.shared.metrics;
                let sequences = self.requests.get_mut(&id).into_iter().flatten().flatten();
                let mut cached_tokens = cached_tokens;
                for sequence in sequences {
                    // The prompt is one for all of them.
                    if let Some(n_hit) = cached_tokens.take() {
                        metrics.prefix_cache(sequence.prompt.n_tokens, n_hit.into());
                        sequence.cached_tokens = Some(n_hit);
                    }
                    (sequence.timeline).admitted(at, |kind, length| metrics.observe(kind, length));
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
                Command::Add(id, sequences) => {
                    self.requests.insert(id, sequences);
                }
                Command::Remove(id, index) => self.remove(id, index),
            }
        }
    }

    /// Forgets a sequence, and its request with the last.
    fn remove(&mut self, id: RequestId, index: u32) {
        if let Some(sequences) = self.requests.get_mut(&id) {
            sequences[index as usize] = None;
            if sequences.iter().all(Option::is_none) {
                self.requests.remove(&id);
            }
        }
    }

    fn give(&mut self, output: RequestOutput, now: Instant) {
        let (id, index) = (output.id, output.sequence);
        // The first sequence reports the prompt; it is that of all.
        if !output.prompt_logprobs.is_empty() {
            let others = self.requests.get_mut(&id).into_iter().flatten().enumerate();
            for other in
                others.filter_map(|(i, other)| other.as_mut().filter(|_| i != index as usize))
            {
                other
                    .prompt_logprobs
                    .extend_from_slice(&output.prompt_logprobs);
            }
        }
        let sequences = self.requests.get_mut(&id);
        // Outputs that were on their way when the client left.
        let Some(request) = sequences.and_then(|all| all[index as usize].as_mut()) else {
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
            metrics.request_lengths(request.prompt.n_tokens, request.n_generated);
            (request.timeline).ended(now, |kind, length| metrics.observe(kind, length));
            if !engine_finished {
                self.shared.engine.abort_sequence(id, index);
            }
        }
        let finished = event.finished.is_some();
        // It has room by construction; it fails where the client has left, which its stream's drop tells the engine.
        let _ = request.events.try_send(event);
        if finished {
            self.remove(id, index);
        }
    }
}

/// What the output thread knows of a prompt.
#[derive(Clone, Debug)]
pub(super) struct Prompt {
    pub(super) n_tokens: u64,
    /// Another sequence of the request counts it.
    pub(super) is_counted: bool,
    /// Whose tokens are counted.
    pub(super) call: Arc<Call>,
}

/// The text of one sequence of a request.
#[derive(Debug)]
pub(super) struct RequestState {
    events: mpsc::Sender<RequestEvent>,
    /// Its share of the budget for events that its client hasn't taken.
    budget: ByteBudget,
    detokenizer: Detokenizer,
    stop: StopMatcher,
    /// The token that ends the text is a part of it.
    keeps_stop_token: bool,
    timeline: Timeline,
    prompt: Prompt,
    n_generated: u64,
    /// Prompt tokens that the prefix cache held, until they are told.
    cached_tokens: Option<u32>,
    /// What another sequence reported of the prompt, until it is told.
    prompt_logprobs: Vec<TokenLogprobs>,
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
        prompt: Prompt,
        times: (Instant, Instant),
    ) -> Self {
        Self {
            events,
            budget,
            detokenizer,
            keeps_stop_token: stop.are_included(),
            stop: StopMatcher::new(stop),
            timeline: Timeline::new(times.0, times.1),
            prompt,
            n_generated: 0,
            cached_tokens: None,
            prompt_logprobs: Vec::new(),
            settled: Arc::default(),
        }
    }

    pub(super) fn settled(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.settled)
    }

    /// Takes tokens that its client has already, and says how they end the text, where they do.
    pub(super) fn replay(
        &mut self,
        tokens: &[u32],
        request: &GenerationRequest,
    ) -> Option<FinishReason> {
        let mut known = RequestEvent::default();
        for &id in tokens {
            self.n_generated += 1;
            if request.stop_token_ids.contains(&id) {
                return Some(FinishReason::Stop(id));
            }
            if self.push(id, &mut known) {
                return known.finished;
            }
        }
        (self.n_generated >= u64::from(request.max_tokens)).then_some(FinishReason::Length)
    }

    fn take(&mut self, output: RequestOutput, now: Instant, metrics: &Metrics) -> RequestEvent {
        let mut prompt_logprobs = std::mem::take(&mut self.prompt_logprobs);
        prompt_logprobs.extend(output.prompt_logprobs);
        let mut event = RequestEvent {
            prompt_logprobs,
            cached_tokens: self.cached_tokens.take(),
            beam_score: output.beam_score,
            ..RequestEvent::default()
        };
        if !output.tokens.is_empty() {
            if self.n_generated == 0 && !self.prompt.is_counted {
                metrics.prompt(self.prompt.n_tokens);
            }
            let n_tokens = output.tokens.len() as u64;
            self.n_generated += n_tokens;
            self.prompt.call.generated(n_tokens);
            metrics.generated(n_tokens);
            (self.timeline).token(now, |kind, length| metrics.observe(kind, length));
        }
        let n_tokens = output.tokens.len();
        for (i, token) in output.tokens.into_iter().enumerate() {
            let id = token.token;
            event.tokens.push(token);
            // The token that stopped the generation is no part of the text, whatever it is, unless that is wanted.
            let stopped_by = i + 1 == n_tokens && output.finished == Some(FinishReason::Stop(id));
            if (!stopped_by || self.keeps_stop_token) && self.push(id, &mut event) {
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
