//! What a replica is made of: its pool, its limits, and what a step costs.

use super::load::{CHUNK_TOKENS, Load, Request};

/// The objective for the first token: this, and [`OBJECTIVE_S_PER_TOKEN`] for each of the prompt.
pub const OBJECTIVE_S: f64 = 1.0;
/// A fifth of a second for each thousand tokens.
pub const OBJECTIVE_S_PER_TOKEN: f64 = 0.2e-3;
/// The share of time that the pacer leaves prompts beside decodes: a step with prompts takes 2.9 times one without.
const PROMPT_SHARE: f64 = 1.9 / 2.9;

/// The time that a request may wait for its first token, in seconds.
#[must_use]
pub fn objective_s(request: &Request) -> f64 {
    OBJECTIVE_S + OBJECTIVE_S_PER_TOKEN * f64::from(request.prompt)
}

/// What a step costs, in seconds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepCost {
    /// Any step: the weights are read.
    pub base_s: f64,
    /// A sequence that decodes.
    pub decode_s: f64,
    /// A token in the cache that a decode attends to.
    pub cached_token_s: f64,
    /// A prompt's token.
    pub prompt_token_s: f64,
    /// A pair of a prompt's token and one that it attends to.
    pub pair_s: f64,
}

/// What a step is made of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StepSize {
    /// Sequences that decode.
    pub n_decodes: u64,
    /// Tokens in the cache that these attend to.
    pub n_cached: u64,
    /// Tokens of prompts.
    pub n_prompt: u64,
    /// Pairs of a prompt's token and one that it attends to.
    pub n_pairs: u64,
}

impl StepCost {
    /// Llama-3.1-8B's shape in bfloat16 on an H200, as e2e/gpu measured it (2026-11): a step of decodes of 5 ms, a prompt of
    /// 8,192 tokens in 244 ms.
    pub const H200: Self = Self {
        base_s: 5e-3,
        decode_s: 15e-6,
        cached_token_s: 30e-9,
        prompt_token_s: 24e-6,
        pair_s: 1.3e-9,
    };

    /// A step of this size.
    #[must_use]
    pub fn of(&self, size: StepSize) -> f64 {
        self.base_s
            + self.decode_s * size.n_decodes as f64
            + self.cached_token_s * size.n_cached as f64
            + self.prompt_token_s * size.n_prompt as f64
            + self.pair_s * size.n_pairs as f64
    }

    fn slowed(self, times: f64) -> Self {
        Self {
            base_s: self.base_s * times,
            decode_s: self.decode_s * times,
            cached_token_s: self.cached_token_s * times,
            prompt_token_s: self.prompt_token_s * times,
            pair_s: self.pair_s * times,
        }
    }
}

/// A replica's pool, limits and speed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Hardware {
    /// Blocks of the pool.
    pub blocks: u32,
    /// Token slots in a block; [`CHUNK_TOKENS`] is a multiple of it.
    pub block_size: u32,
    /// The most sequences that run at once.
    pub slots: u32,
    /// The most tokens of a step.
    pub max_tokens: u32,
    /// The most requests that wait.
    pub max_waiting: u32,
    /// What a step costs.
    pub cost: StepCost,
}

impl Hardware {
    /// An H200 that serves Llama-3.1-8B's shape, slowed down.
    #[must_use]
    pub fn slowed(times: f64) -> Self {
        Self {
            blocks: 50_000,
            block_size: 16,
            slots: 256,
            max_tokens: 8_192,
            max_waiting: 2_048,
            cost: StepCost::H200.slowed(times),
        }
    }

    /// Blocks of one chunk.
    #[must_use]
    pub fn blocks_of_a_chunk(&self) -> u32 {
        CHUNK_TOKENS / self.block_size
    }

    /// Seconds of one replica that a request takes, of prompts beside decodes and decodes in a full batch. An estimate: who
    /// uses it scales it by what a search finds.
    #[must_use]
    pub fn work_s(&self, request: &Request) -> f64 {
        let (prompt, outputs) = (f64::from(request.prompt), f64::from(request.outputs));
        let cost = &self.cost;
        let prefill = prompt * cost.prompt_token_s + prompt * prompt / 2.0 * cost.pair_s;
        let batch = f64::from(self.slots) / 4.0;
        let decode = outputs * (cost.base_s / batch + cost.decode_s + cost.cached_token_s * prompt);
        prefill / PROMPT_SHARE + decode
    }

    /// How many times an H200 can be slowed so that one prompt of twenty takes two fifths of its objective alone.
    #[must_use]
    pub fn most_slowed(load: &Load) -> f64 {
        let mut prompts: Vec<u32> = load.requests.iter().map(|r| r.prompt).collect();
        prompts.sort_unstable();
        let at = prompts.len().saturating_sub(1) * 19 / 20;
        let prompt = f64::from(prompts.get(at).copied().unwrap_or(1));
        let cost = StepCost::H200;
        let alone =
            cost.base_s + prompt * cost.prompt_token_s + prompt * prompt / 2.0 * cost.pair_s;
        0.4 * (OBJECTIVE_S + OBJECTIVE_S_PER_TOKEN * prompt) / (alone / PROMPT_SHARE)
    }
}
