//! One call of a client, whatever prompts it has: who made it, and the tokens that it took so far. Counted as they come, so
//! that a client that leaves has still spent what it had.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Instant;

/// A call, shared by all that happens for it.
#[derive(Debug, Default)]
pub struct Call {
    tenant: OnceLock<Arc<str>>,
    spent: OnceLock<Arc<AtomicU64>>,
    prompt_tokens: AtomicU64,
    generated_tokens: AtomicU64,
}

impl Call {
    /// The name of its API key, once.
    pub fn authenticated(&self, name: Arc<str>) {
        let _ = self.tenant.set(name);
    }

    /// Who alone finds its prefixes in the cache: the name of its API key, where keys are asked for.
    pub fn tenant(&self) -> Option<&Arc<str>> {
        self.tenant.get()
    }

    /// From now on its tokens are added to `spent`, where those of all calls of a key add up until they are charged.
    pub fn charge_to(&self, spent: Arc<AtomicU64>) {
        let _ = self.spent.set(spent);
    }

    /// The engine took a prompt of so many tokens.
    pub(super) fn prompted(&self, n_tokens: u64) {
        self.prompt_tokens.fetch_add(n_tokens, Ordering::Relaxed);
        self.spend(n_tokens);
    }

    /// The engine generated so many tokens.
    pub(super) fn generated(&self, n_tokens: u64) {
        self.generated_tokens.fetch_add(n_tokens, Ordering::Relaxed);
        self.spend(n_tokens);
    }

    fn spend(&self, n_tokens: u64) {
        if let Some(spent) = self.spent.get() {
            spent.fetch_add(n_tokens, Ordering::Relaxed);
        }
    }

    /// Tokens so far: of all its prompts, and generated.
    pub fn tokens(&self) -> (u64, u64) {
        (
            self.prompt_tokens.load(Ordering::Relaxed),
            self.generated_tokens.load(Ordering::Relaxed),
        )
    }
}

/// The beginning of a call.
#[derive(Clone, Debug)]
pub struct Arrival {
    /// When its head had arrived.
    pub at: Instant,
    /// What came.
    pub call: Arc<Call>,
}
