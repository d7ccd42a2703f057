//! A sequence's tokens and what remains to be done with them. It knows no blocks, no other sequence and no device.
//!
//! The group of a request's sequences is what is queued and preempted; a sequence is what is computed.

use std::ops::Range;

use kvasir_kernels::step::{LogitsEdit, LogitsRequest, LogitsRow, SamplingParams, TokenInput};

use crate::engine::logits::{Edits, LogitsProcessors};
use crate::engine::prefix::PrefixChain;
use crate::engine::{FinishReason, Request};

/// Where a token that is still under way will appear: a row of logits of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct PendingSample {
    pub(super) step: u64,
    pub(super) logits_row: u32,
}

/// Outputs that a request's sequences generate at most.
pub(super) fn max_outputs(request: &Request, max_model_len: u32) -> u32 {
    let n_prompt = request.prompt.len() as u32;
    request
        .max_tokens
        .min(max_model_len.saturating_sub(n_prompt))
}

/// The tokens of one sequence of a request and its wishes. Waiting or running: the KV cache is not its concern.
#[derive(Clone, Debug)]
pub(super) struct Sequence {
    /// Which of its request's.
    index: u32,
    /// The prompt, then what was generated, as far as the host knows it.
    tokens: Vec<u32>,
    n_prompt: u32,
    /// Outputs to generate: `max_tokens`, cut where the longest context ends.
    max_outputs: u32,
    stop_token_ids: Vec<u32>,
    sampling: SamplingParams,
    /// What changes its logits.
    logits: Option<Box<LogitsProcessors>>,
    logprobs: Option<u8>,
    /// Of a beam: so many of the most likely next tokens are asked for, and the search chooses among those of all beams.
    n_candidates: Option<u8>,
    prompt_logprobs: Option<u8>,
    /// Outputs that were asked for and haven't been committed; 1 at most whenever a step is scheduled.
    n_pending: u32,
    /// The newest of them.
    last_sample: Option<PendingSample>,
    /// Prompt positions whose successor's log-probability was asked for; a recomputation asks no second time.
    n_scored: u32,
    /// The keys of its full blocks, where prefixes are cached.
    chain: Option<PrefixChain>,
}

impl Sequence {
    /// `chain` has the keys of the prompt.
    pub(super) fn new(request: Request, chain: Option<PrefixChain>, max_model_len: u32) -> Self {
        let n_prompt = request.prompt.len() as u32;
        let n_stop_tokens = request.n_stop_tokens();
        let n_candidates = request.beams.map(|beams| {
            let n = beams.n_candidates(n_stop_tokens);
            u8::try_from(n).expect("a request has as many beams as a row can report candidates for")
        });
        Self {
            index: 0,
            max_outputs: max_outputs(&request, max_model_len),
            tokens: request.prompt,
            n_prompt,
            stop_token_ids: request.stop_token_ids,
            sampling: request.sampling,
            // Beams are searched in the model's own.
            logits: request.logits.filter(|_| n_candidates.is_none()),
            logprobs: request.logprobs,
            n_candidates,
            prompt_logprobs: request.prompt_logprobs,
            n_pending: 0,
            last_sample: None,
            n_scored: 0,
            chain,
        }
    }

    /// Another sequence of the same prompt, which draws with a seed of its own and reports no prompt.
    pub(super) fn sibling(&self, index: u32) -> Self {
        let mut sibling = self.clone();
        sibling.index = index;
        sibling.sampling.seed = self.sampling.seed.wrapping_add(index.into());
        sibling.prompt_logprobs = None;
        sibling
    }

    /// A search chooses how it goes on.
    pub(super) fn is_beam(&self) -> bool {
        self.n_candidates.is_some()
    }

    /// Becomes another beam of the same prompt.
    pub(super) fn branch_from(&mut self, parent: &Self) {
        self.tokens.truncate(self.n_prompt as usize);
        self.tokens
            .extend_from_slice(&parent.tokens[self.n_prompt as usize..]);
        self.chain.clone_from(&parent.chain);
    }

    /// Appends the token that the search has chosen.
    pub(super) fn choose(&mut self, token: u32) {
        self.tokens.push(token);
    }

    /// The same where it has come so far already.
    pub(super) fn resumed(mut self, outputs: &[u32]) -> Self {
        self.tokens.extend_from_slice(outputs);
        if let Some(logits) = &mut self.logits {
            outputs.iter().for_each(|&token| logits.advance(token));
        }
        self.extend_chain();
        self
    }

    /// Tokens of the prompt.
    pub(super) fn n_prompt(&self) -> u32 {
        self.n_prompt
    }

    /// Which of its request's sequences it is.
    pub(super) fn index(&self) -> u32 {
        self.index
    }

    /// Tokens that the host knows: the prompt and the committed outputs.
    pub(super) fn n_known(&self) -> u32 {
        self.tokens.len() as u32
    }

    /// The prompt and the committed outputs.
    pub(super) fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// The keys of the full blocks of its first tokens, where prefixes are cached.
    pub(super) fn chain(&self) -> Option<&PrefixChain> {
        self.chain.as_ref()
    }

    /// Hashes the full blocks that are known by now and were not hashed.
    pub(super) fn extend_chain(&mut self) {
        if let Some(chain) = &mut self.chain {
            chain.extend(&self.tokens);
        }
    }

    /// It may take tokens from the cache the first time that it runs.
    pub(super) fn asks_cache(&self) -> bool {
        self.chain.is_some() && self.prompt_logprobs.is_none()
    }

    /// How many of its first tokens may come from the cache: one at least is computed, for its logits, and all are whose
    /// successor is to be scored.
    pub(super) fn n_cacheable(&self) -> u32 {
        let most = self.n_known().saturating_sub(1);
        match self.prompt_logprobs {
            Some(_) => most.min(self.n_scored),
            None => most,
        }
    }

    /// Prompt tokens, and generated ones after a preemption, from position `n_computed` on.
    pub(super) fn n_prompt_after(&self, n_computed: u32) -> u32 {
        self.n_prompt.saturating_sub(n_computed)
    }

    /// A token is under way whose value the host doesn't know.
    pub(super) fn is_pending(&self) -> bool {
        self.n_pending > 0
    }

    /// Outputs sampled or under way; the output index of the next one.
    pub(super) fn n_outputs(&self) -> u32 {
        self.n_known() - self.n_prompt + self.n_pending
    }

    /// Not all outputs are sampled or under way.
    pub(super) fn wants_output(&self) -> bool {
        self.n_outputs() < self.max_outputs
    }

    /// Tokens that must be in the cache before the next output can be sampled; the last output needs no KV.
    pub(super) fn n_target(&self) -> u32 {
        if self.wants_output() || self.max_outputs == 0 {
            self.n_known() + self.n_pending
        } else {
            0
        }
    }

    /// The token at `position`, by value or by the row that samples it in `previous_step`.
    pub(super) fn input(&self, position: u32, previous_step: Option<u64>) -> TokenInput {
        match self.tokens.get(position as usize) {
            Some(&token) => TokenInput::Id(token),
            None => {
                let sample = self
                    .last_sample
                    .expect("a token past the known ones is under way");
                assert_eq!(
                    Some(sample.step),
                    previous_step,
                    "a token under way was sampled in the step before"
                );
                TokenInput::Sampled {
                    logits_row: sample.logits_row,
                }
            }
        }
    }

    /// The positions of `chunk` whose successor in the prompt is to be scored.
    fn to_score(&self, chunk: Range<u32>) -> Range<u32> {
        if self.prompt_logprobs.is_none() {
            return 0..0;
        }
        let start = chunk.start.max(self.n_scored);
        start..chunk.end.min(self.n_prompt - 1).max(start)
    }

    /// The longest chunk from `start` on, at most to `most`, with at most `n_tokens` tokens and `n_rows` rows of logits,
    /// where `n_samples` tokens are sampled at its end if that is `most` or all that is known.
    pub(super) fn chunk(
        &self,
        start: u32,
        most: u32,
        n_samples: u32,
        n_tokens: u32,
        n_rows: u32,
    ) -> Range<u32> {
        let last = self.n_target().min(most);
        let mut end = last.min(start.saturating_add(n_tokens)).max(start);
        let scores = self.to_score(start..end);
        let n_scores = scores.end - scores.start;
        if n_scores > n_rows {
            end = scores.start + n_rows;
        } else if end == last && n_scores + n_samples > n_rows && end > start {
            end -= 1;
        }
        start..end
    }

    /// Whether the token before `end` is one after which an output is sampled.
    fn samples(&self, end: u32) -> bool {
        end == self.n_target() && self.wants_output()
    }

    /// Asks for the scores of `chunk`: the position and what is wanted of its logits.
    pub(super) fn ask_scores(
        &mut self,
        chunk: Range<u32>,
    ) -> impl Iterator<Item = (u32, LogitsRow)> {
        let scores = self.to_score(chunk);
        self.n_scored = self.n_scored.max(scores.end);
        scores.map(|position| {
            let row = LogitsRow {
                request: LogitsRequest::Score {
                    token: self.tokens[position as usize + 1],
                },
                n_logprobs: self.prompt_logprobs,
            };
            (position, row)
        })
    }

    /// Asks for an output if `end` is where one is sampled, or for what a search chooses it from: that one is not under way,
    /// and nothing follows before it was chosen.
    pub(super) fn ask_output(&mut self, end: u32, sample: PendingSample) -> Option<LogitsRow> {
        if !self.samples(end) {
            return None;
        }
        if let Some(n_candidates) = self.n_candidates {
            return Some(LogitsRow {
                request: LogitsRequest::Sample {
                    // Only the most likely tokens of the row are used.
                    params: SamplingParams::GREEDY,
                    output_index: self.n_outputs(),
                    edit: LogitsEdit::default(),
                },
                n_logprobs: Some(n_candidates.max(self.logprobs.unwrap_or(0))),
            });
        }
        let output_index = self.n_outputs();
        self.n_pending += 1;
        self.last_sample = Some(sample);
        Some(LogitsRow {
            request: LogitsRequest::Sample {
                params: self.sampling,
                output_index,
                edit: LogitsEdit::default(),
            },
            n_logprobs: self.logprobs,
        })
    }

    /// When the edit of the output that was asked for last can be made.
    pub(super) fn edits(&self) -> Edits {
        let processors = self.logits.as_deref();
        processors.map_or(Edits::None, |logits| logits.edits(self.n_pending > 1))
    }

    /// What changes the logits of output `index`, the one that was asked for last.
    pub(super) fn edit(&mut self, index: u32) -> LogitsEdit {
        let outputs = &self.tokens[self.n_prompt as usize..];
        let processors = self.logits.as_deref_mut();
        processors.map_or_else(LogitsEdit::default, |logits| logits.edit(outputs, index))
    }

    /// Nothing is to be generated: the request ends when its prompt is computed.
    pub(super) fn ends_with_prompt(&self, end: u32) -> bool {
        self.max_outputs == 0 && end == self.n_prompt
    }

    /// Appends an output that was under way, and says whether it is the last.
    pub(super) fn commit(&mut self, token: u32) -> Option<FinishReason> {
        self.n_pending = self
            .n_pending
            .checked_sub(1)
            .expect("an output is committed once");
        self.tokens.push(token);
        if self.stop_token_ids.contains(&token) {
            return Some(FinishReason::Stop(token));
        }
        if self.n_known() - self.n_prompt == self.max_outputs {
            return Some(FinishReason::Length);
        }
        if let Some(logits) = &mut self.logits {
            logits.advance(token);
        }
        None
    }
}
