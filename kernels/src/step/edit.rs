//! How a row of logits is changed before a token is sampled from it: what a step brings of that, and its checks.
//!
//! The arithmetic is in [`crate::sampling`].

use std::sync::Arc;

/// Changes of a row of logits before a token is sampled from it, in the order of the fields, which is that of vLLM's
/// sampler (`v1/sample/sampler.py`); temperature, min-p, top-k and top-p come after them. Log-probabilities are those of
/// the row as it was. What is long is shared, so that a row is cheap to clone.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LogitsEdit {
    /// A bit for each token of the vocabulary: token `t` is bit `t % 32`, counted from the lowest, of word `t / 32`. A
    /// token without one is never sampled. `None` allows all.
    pub allowed: Option<Arc<[u32]>>,
    /// What is added to logits, by rising token. Negative infinity bans a token.
    pub biases: Arc<[TokenBias]>,
    /// What makes tokens that the sequence has already less likely, or more.
    pub penalties: Option<Penalties>,
}

/// What is added to one token's logit.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TokenBias {
    /// Which token.
    pub token: u32,
    /// How much; not NaN.
    pub bias: f32,
}

/// Penalties of tokens that stand in the prompt or the output, each as vLLM has it.
#[derive(Clone, Debug, PartialEq)]
pub struct Penalties {
    /// Of every token seen: a logit above 0 is divided by it, another is multiplied by it. Above 0, finite; 1 changes
    /// nothing.
    pub repetition: f32,
    /// Subtracted for each time that the token stands in the output. Finite.
    pub frequency: f32,
    /// Subtracted where the token stands in the output. Finite.
    pub presence: f32,
    /// The tokens of the prompt and the output, each once.
    pub seen: Arc<Vec<SeenToken>>,
}

/// A token that stands in the prompt or the output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SeenToken {
    /// Which token.
    pub token: u32,
    /// How often it stands in the output; 0: in the prompt only.
    pub n_outputs: u32,
}

impl LogitsEdit {
    /// It changes nothing.
    pub fn is_empty(&self) -> bool {
        self.allowed.is_none() && self.biases.is_empty() && self.penalties.is_none()
    }

    /// The lowest token that is allowed: what is sampled where every allowed one is banned or no number. `None`: none is
    /// allowed.
    pub fn first_allowed(&self) -> Option<u32> {
        let Some(words) = &self.allowed else {
            return Some(0);
        };
        let found = words.iter().zip(0u32..).find(|(word, _)| **word != 0);
        found.map(|(word, place)| place * 32 + word.trailing_zeros())
    }

    /// Asserts that every token is one of the vocabulary and every number in range.
    pub(super) fn check(&self, vocab_size: usize) {
        if let Some(words) = &self.allowed {
            assert_eq!(
                words.len(),
                vocab_size.div_ceil(32),
                "allowed tokens of another vocabulary"
            );
            assert!(
                self.first_allowed()
                    .is_some_and(|token| (token as usize) < vocab_size),
                "an edit that allows no token"
            );
        }
        let within = |token: u32| assert!((token as usize) < vocab_size, "token {token} is edited");
        if let Some(last) = self.biases.last() {
            within(last.token);
            assert!(
                self.biases.is_sorted_by(|a, b| a.token < b.token),
                "biases that do not rise by token"
            );
            assert!(
                self.biases.iter().all(|bias| !bias.bias.is_nan()),
                "a bias that is no number"
            );
        }
        if let Some(penalties) = &self.penalties {
            let Penalties {
                repetition,
                frequency,
                presence,
                seen,
            } = penalties;
            assert!(
                *repetition > 0.0
                    && [repetition, frequency, presence]
                        .iter()
                        .all(|x| x.is_finite()),
                "a penalty out of range"
            );
            assert!(seen.len() <= vocab_size, "more seen tokens than there are");
            // One largest token in place of a comparison for each: a history may be long.
            within(seen.iter().fold(0, |most, seen| most.max(seen.token)));
        }
    }
}
