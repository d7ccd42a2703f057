//! What goes into the engine and what comes out of it: requests, outputs, and why a request is refused.
//!
//! Token ids only: it knows no text, no blocks and no device.

use std::collections::BTreeSet;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Instant;

use kvasir_kernels::step::Sampled;
pub use kvasir_kernels::step::SamplingParams;

use super::logits::LogitsProcessors;
use super::prefix::PrefixScope;

/// Names a request for its whole life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RequestId(pub u64);

/// A request, in tokens. Built by the HTTP side, which has checked every field.
#[derive(Clone, Debug)]
pub struct Request {
    /// Unique for the life of the process.
    pub id: RequestId,
    /// Not empty; ids below the vocabulary's size.
    pub prompt: Vec<u32>,
    /// Tokens to generate at most; 0 only with `prompt_logprobs` or for an echo.
    pub max_tokens: u32,
    /// Generation stops with any of these (end of sequence, unless `ignore_eos`); the token itself is reported.
    pub stop_token_ids: Vec<u32>,
    /// How tokens are sampled.
    pub sampling: SamplingParams,
    /// What changes the logits before.
    pub logits: Option<Box<LogitsProcessors>>,
    /// Answers: sequences that continue the prompt; sequence `i` is what a request for one with the seed `seed + i` gets. Of
    /// beams, the best hypotheses, best first, all at the end; no more than beams.
    pub n: NonZeroU32,
    /// Beams are searched; nothing is sampled.
    pub beams: Option<BeamParams>,
    /// Report log-probabilities of the generated tokens, and of this many alternatives.
    pub logprobs: Option<u8>,
    /// Report log-probabilities of the prompt's tokens (all but the first), and of this many alternatives.
    pub prompt_logprobs: Option<u8>,
    /// Who asks, where API keys tell. Only requests of the same tenant find each other's cached prefixes.
    pub tenant: Option<Arc<str>>,
    /// Only requests with the same one find each other's cached prefixes.
    pub cache_salt: Option<String>,
    /// Outputs that its sequences have already, by index, none of them ended by these: they go on as they would after a
    /// preemption. `None`: that sequence has ended; one at least has not. Empty: all begin. Not with beams.
    pub resumed: Vec<Option<Vec<u32>>>,
}

impl Request {
    /// One answer of the most likely tokens, at most `max_tokens`, and nothing else.
    pub fn greedy(id: RequestId, prompt: Vec<u32>, max_tokens: u32) -> Self {
        Self {
            id,
            prompt,
            max_tokens,
            stop_token_ids: Vec::new(),
            sampling: SamplingParams::GREEDY,
            logits: None,
            n: NonZeroU32::MIN,
            beams: None,
            logprobs: None,
            prompt_logprobs: None,
            tenant: None,
            cache_salt: None,
            resumed: Vec::new(),
        }
    }
}

/// How a request's beams are searched.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BeamParams {
    /// Beams that live at once, and hypotheses that are kept.
    pub width: NonZeroU32,
    /// A hypothesis' score is the sum of its log-probabilities, divided by its generated length to this power: above 0 long
    /// ones gain. Finite.
    pub length_penalty: f64,
    /// When to stop though beams live.
    pub early_stopping: EarlyStopping,
}

impl BeamParams {
    /// How many of the most likely next tokens of each beam a step needs, where `n_stop_tokens` different tokens end a
    /// hypothesis: if all of these are among them, as many are left as there are beams.
    pub fn n_candidates(&self, n_stop_tokens: usize) -> usize {
        self.width.get() as usize + n_stop_tokens
    }
}

/// When a search stops though beams live, once there are as many hypotheses as beams.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum EarlyStopping {
    /// `true`: at once.
    WhenFull,
    /// `false`: when the best beam, if it ended at its present length, would not be better than the worst hypothesis.
    #[default]
    WhenUnlikely,
    /// `"never"`: when no beam can become better than the worst hypothesis, however long it grows.
    WhenImpossible,
}

impl Request {
    /// Who finds its prefixes.
    pub fn prefix_scope(&self) -> PrefixScope<'_> {
        PrefixScope {
            tenant: self.tenant.as_deref(),
            cache_salt: self.cache_salt.as_deref(),
        }
    }

    /// Sequences that run at once.
    pub fn n_sequences(&self) -> NonZeroU32 {
        self.beams.map_or(self.n, |beams| beams.width)
    }

    /// Different tokens that end an answer.
    pub(super) fn n_stop_tokens(&self) -> usize {
        let tokens: BTreeSet<u32> = self.stop_token_ids.iter().copied().collect();
        tokens.len()
    }
}

/// Why a sequence came to its end: the one way to say it, from the scheduler to the API. The scheduler never gives a
/// stop string, because it knows no text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// A stop token was generated: this one.
    Stop(u32),
    /// The text came to this stop string.
    StopString(String),
    /// `max_tokens`, or the longest context ([`ModelInfo::max_model_len`](super::ModelInfo)), was reached.
    Length,
    /// The client left, or its request was given up.
    Abort,
    /// The engine failed; in words.
    Error(String),
}

/// A token with its log-probabilities, where those were asked for.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TokenLogprobs {
    /// The token that was sampled, or that stands in the prompt.
    pub token: u32,
    /// Its natural log-probability under the model's own distribution (before temperature, top-p and top-k).
    pub logprob: Option<f32>,
    /// The most likely tokens and their log-probabilities, most likely first, ties by lowest id.
    pub top: Vec<(u32, f32)>,
}

impl From<Sampled> for TokenLogprobs {
    fn from(sampled: Sampled) -> Self {
        let Sampled {
            token,
            logprob,
            top,
        } = sampled;
        Self {
            token,
            logprob,
            top,
        }
    }
}

/// What a step gave one sequence of a request.
#[derive(Clone, Debug, PartialEq)]
pub struct RequestOutput {
    /// Whose.
    pub id: RequestId,
    /// Which of the request's answers; 0 where it has one only.
    pub sequence: u32,
    /// Log-probabilities of further prompt tokens, in order (only where asked for).
    pub prompt_logprobs: Vec<TokenLogprobs>,
    /// New tokens.
    pub tokens: Vec<TokenLogprobs>,
    /// Set on the last output of a sequence, whose blocks are free by then.
    pub finished: Option<FinishReason>,
    /// Of a hypothesis of a beam search: [`BeamParams::length_penalty`] says how it is reckoned.
    pub beam_score: Option<f32>,
}

/// A request has left the queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Admission {
    /// Whose.
    pub id: RequestId,
    /// When the step was scheduled that it begins with.
    pub at: Instant,
    /// Prompt tokens that the prefix cache held, the first time that the request begins; `None` where it was not asked.
    pub cached_tokens: Option<u32>,
}

/// What one step brought, sent in one message.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct EngineOutputs {
    /// Requests that began to run since the message before; one that was preempted begins again. They stand in no
    /// later message than the request's first output.
    pub admitted: Vec<Admission>,
    /// What requests got.
    pub outputs: Vec<RequestOutput>,
}

/// Why a request is not accepted. Nothing changed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SubmitError {
    /// Too many requests wait: HTTP 429.
    #[error("{waiting} requests are waiting already, the limit is {limit}")]
    QueueFull {
        /// Requests that wait.
        waiting: u64,
        /// `--max-waiting`.
        limit: u64,
    },
    /// The prompt alone is longer than the longest context: HTTP 400.
    #[error("the prompt has {prompt_tokens} tokens, the longest context is {max_model_len}")]
    PromptTooLong {
        /// Tokens of the prompt.
        prompt_tokens: u64,
        /// Prompt and output together may have this many.
        max_model_len: u32,
    },
    /// The prompt and its output can never be in the pool at once, even alone: HTTP 400.
    #[error(
        "{needed_blocks} KV blocks of {block_size} tokens are needed, the pool has {total_blocks}"
    )]
    NeverFits {
        /// Blocks that the request needs when it ends.
        needed_blocks: u64,
        /// All blocks there are.
        total_blocks: u64,
        /// Token slots in a block.
        block_size: u32,
    },
    /// More sequences are asked for than ever run at once: HTTP 400.
    #[error("{n} choices are asked for, the server runs {limit} sequences at once")]
    TooManySequences {
        /// Sequences of the request.
        n: u32,
        /// `--max-num-seqs`.
        limit: u32,
    },
    /// Beams need more of each step's most likely tokens than a device reports, or than there are: HTTP 400.
    #[error(
        "{width} beams with {n_stop_tokens} stop tokens need as many of the most likely tokens of each step together, at most {limit} can be had"
    )]
    TooWide {
        /// Beams of the request.
        width: u32,
        /// Different tokens that end a hypothesis.
        n_stop_tokens: usize,
        /// What a row of logits reports at most, or the size of the vocabulary.
        limit: usize,
    },
    /// The engine has stopped: HTTP 503.
    #[error("the engine has stopped")]
    Stopped,
}
