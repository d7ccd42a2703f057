//! The client's side of a request: a stream of its events, whose drop ends the request.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};

use futures::Stream;
use tokio::sync::mpsc;

use super::budget::Lease;
use super::{Command, Shared};
use crate::engine::{FinishReason, RequestId, TokenLogprobs};

/// What one step brought a client.
#[derive(Debug, Default)]
pub struct RequestEvent {
    /// Text that is decided: whole characters, and no part of a stop string.
    pub text: String,
    /// New tokens, those included whose text is still held back.
    pub tokens: Vec<TokenLogprobs>,
    /// Log-probabilities of further prompt tokens, where asked for.
    pub prompt_logprobs: Vec<TokenLogprobs>,
    /// Prompt tokens that the prefix cache held, on the first event.
    pub cached_tokens: Option<u32>,
    /// Set on the last event.
    pub finished: Option<FinishReason>,
    /// Of a hypothesis of a beam search, on its last event.
    pub beam_score: Option<f32>,
    /// Its bytes in the budget: to be kept as long as what it says is.
    pub lease: Option<Lease>,
}

impl RequestEvent {
    /// About what it takes in memory.
    pub(super) fn n_bytes(&self) -> usize {
        let tokens = self.tokens.iter().chain(&self.prompt_logprobs);
        let tokens = tokens.map(|token| size_of_val(token) + size_of_val(&*token.top));
        size_of::<Self>() + self.text.len() + tokens.sum::<usize>()
    }
}

/// A stream of the events of one sequence of a request. Dropping it before the end aborts the sequence.
#[derive(Debug)]
pub struct RequestStream {
    id: (RequestId, u32),
    events: mpsc::Receiver<RequestEvent>,
    settled: Arc<AtomicBool>,
    shared: Arc<Shared>,
    was_over: bool,
}

impl RequestStream {
    /// Of a sequence that its client has seen to the end: one event says that it is finished, and nothing runs.
    pub(super) fn over(id: (RequestId, u32), reason: FinishReason, shared: Arc<Shared>) -> Self {
        let (sender, events) = mpsc::channel(1);
        let last = RequestEvent {
            finished: Some(reason),
            ..RequestEvent::default()
        };
        // The channel has room for it, and its receiver is here.
        let _ = sender.try_send(last);
        let mut stream = Self::new(id, events, Arc::new(AtomicBool::new(true)), shared);
        stream.was_over = true;
        stream
    }

    /// Its client has seen the end of it before.
    pub fn was_over(&self) -> bool {
        self.was_over
    }

    pub(super) fn new(
        id: (RequestId, u32),
        events: mpsc::Receiver<RequestEvent>,
        settled: Arc<AtomicBool>,
        shared: Arc<Shared>,
    ) -> Self {
        Self {
            id,
            events,
            settled,
            shared,
            was_over: false,
        }
    }

    /// The engine has not taken the request: there is nothing to end or to count.
    pub(super) fn forget(self) {
        self.settled.store(true, Ordering::Release);
        self.shared.send(Command::Remove(self.id.0, self.id.1));
    }
}

impl Stream for RequestStream {
    type Item = RequestEvent;

    /// Ends after the event that is finished; without one where the engine is gone.
    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<RequestEvent>> {
        self.events.poll_recv(cx)
    }
}

impl Drop for RequestStream {
    fn drop(&mut self) {
        if !self.settled.swap(true, Ordering::AcqRel) {
            self.shared.engine.abort_sequence(self.id.0, self.id.1);
            self.shared.send(Command::Remove(self.id.0, self.id.1));
            self.shared.metrics.request_finished(&FinishReason::Abort);
        }
    }
}
