//! A request on its way in: what the engine needs, and what its tokens become on the way out.

use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Instant;

use tokio::sync::mpsc;

use super::budget::ByteBudget;
use super::call::Arrival;
use super::outputs::{Prompt, RequestState};
use super::stream::RequestEvent;
use crate::engine::logits::LogitsProcessors;
use crate::engine::{BeamParams, Request, RequestId, SamplingParams};
use crate::text::Detokenizer;
use crate::text::stop::StopStrings;

/// One prompt, ready to run.
#[derive(Debug)]
pub struct GenerationRequest {
    /// Not empty; ids below the vocabulary's size.
    pub prompt: Vec<u32>,
    /// Tokens to generate at most.
    pub max_tokens: u32,
    /// How tokens are sampled.
    pub sampling: SamplingParams,
    /// What changes the logits before.
    pub logits: Option<Box<LogitsProcessors>>,
    /// Sequences that continue the prompt, with the seeds that follow that of `sampling`.
    pub n: NonZeroU32,
    /// They are the best hypotheses of a beam search, and nothing is sampled. Its text ends at tokens, at no string.
    pub beams: Option<BeamParams>,
    /// Tokens that end the text, the model's own included unless they are ignored.
    pub stop_token_ids: Vec<u32>,
    /// Strings that end the text, and whether what ends it is a part of it.
    pub stop: StopStrings,
    /// Report log-probabilities of the generated tokens, and of this many alternatives.
    pub logprobs: Option<u8>,
    /// Report log-probabilities of the prompt's tokens (all but the first), and of this many alternatives.
    pub prompt_logprobs: Option<u8>,
    /// Only requests with the same one find each other's cached prefixes.
    pub cache_salt: Option<String>,
    /// Tokens that each choice has already, and its client too: only what comes after is told. Empty: all begin.
    pub resumed: Vec<Vec<u32>>,
    /// Ready to take the first generated token.
    pub detokenizer: Detokenizer,
    /// The client's call.
    pub arrived: Arrival,
}

impl GenerationRequest {
    /// One for each generated token and prefill step at most, and one at the end.
    pub(super) fn max_events(&self, max_model_len: u32) -> usize {
        self.max_tokens.min(max_model_len) as usize + self.prompt.len() + 1
    }

    /// The output thread's part, for one of its sequences.
    pub(super) fn state(
        &self,
        index: u32,
        events: mpsc::Sender<RequestEvent>,
        budget: ByteBudget,
        queued: Instant,
    ) -> RequestState {
        RequestState::new(
            events,
            budget,
            self.detokenizer.clone(),
            self.stop.clone(),
            Prompt {
                n_tokens: self.prompt.len() as u64,
                is_counted: index > 0,
                call: Arc::clone(&self.arrived.call),
            },
            (self.arrived.at, queued),
        )
    }

    /// The engine's part. `has_ended`: which of its sequences have.
    pub(super) fn into_engine(self, id: RequestId, has_ended: &[bool]) -> Request {
        let resumed = self.resumed.into_iter().zip(has_ended);
        Request {
            id,
            resumed: resumed
                .map(|(outputs, has_ended)| (!has_ended).then_some(outputs))
                .collect(),
            prompt: self.prompt,
            max_tokens: self.max_tokens,
            stop_token_ids: self.stop_token_ids,
            sampling: self.sampling,
            logits: self.logits,
            n: self.n,
            beams: self.beams,
            logprobs: self.logprobs,
            prompt_logprobs: self.prompt_logprobs,
            tenant: self.arrived.call.tenant().cloned(),
            cache_salt: self.cache_salt,
        }
    }
}
