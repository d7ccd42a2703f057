//! One sequence's place in its grammar: which tokens may come next.

use llguidance::TokenParser;

/// The matcher came to one of its limits, or was given a token that it had not allowed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the grammar can't be followed any further: {0}")]
pub struct MatchError(String);

/// Follows one sequence. Its state is of the sequence's tokens alone.
pub struct Matcher {
    inner: llguidance::Matcher,
    stop_token_ids: Box<[u32]>,
}

impl std::fmt::Debug for Matcher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Matcher({})", self.inner.stop_reason())
    }
}

impl Matcher {
    pub(super) fn new(parser: TokenParser, stop_token_ids: &[u32]) -> Self {
        Self {
            inner: llguidance::Matcher::new(Ok(parser)),
            stop_token_ids: stop_token_ids.into(),
        }
    }

    /// For another sequence that has come as far.
    pub fn fork(&self) -> Self {
        Self {
            inner: self.inner.deep_clone(),
            stop_token_ids: self.stop_token_ids.clone(),
        }
    }

    /// The sequence goes on with this token. What comes behind the grammar's end, or ends the sequence, changes nothing.
    pub fn advance(&mut self, token: u32) -> Result<(), MatchError> {
        if self.is_complete() {
            return Ok(());
        }
        if self.stop_token_ids.contains(&token) && self.may_end()? {
            return Ok(());
        }
        self.inner.consume_token(token).map_err(match_error)
    }

    /// Sets a bit for each token that may come next, and no other: bit `id % 32` of word `id / 32`. Where the text is
    /// complete, these are tokens that end it; there is always one, unless the model has none.
    pub fn fill(&mut self, allowed: &mut [u32]) -> Result<(), MatchError> {
        let mask = self.inner.compute_mask_or_eos().map_err(match_error)?;
        let words = mask.as_slice();
        let n = words.len().min(allowed.len());
        allowed[..n].copy_from_slice(&words[..n]);
        allowed[n..].fill(0);
        if self.may_end()? {
            for id in &self.stop_token_ids {
                if let Some(word) = allowed.get_mut(*id as usize / 32) {
                    *word |= 1 << (id % 32);
                }
            }
        }
        Ok(())
    }

    /// Nothing can follow but the end.
    pub fn is_complete(&self) -> bool {
        !self.inner.is_error() && self.inner.is_stopped()
    }

    /// The text may end here.
    pub fn may_end(&mut self) -> Result<bool, MatchError> {
        if self.is_complete() {
            return Ok(true);
        }
        self.inner.is_accepting().map_err(match_error)
    }
}

fn match_error(error: anyhow::Error) -> MatchError {
    let text = error.to_string();
    let line = text.lines().next().unwrap_or_default();
    MatchError(line.chars().take(200).collect())
}
