//! One budget of bytes for all request bodies and all answers under way, so that no number of clients costs more memory
//! than was set aside for them. It only counts: whoever keeps bytes keeps a [`Lease`] of as many.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Bytes that may be kept at once. Cheap to clone.
#[derive(Clone, Debug)]
pub struct ByteBudget(Arc<Account>);

#[derive(Debug)]
struct Account {
    limit: usize,
    used: AtomicUsize,
}

/// What may be taken up to which point: answers under way always find room that new requests leave them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// A request's body: while at most half of the budget is used.
    Body,
    /// An answer: while there is any.
    Answer,
}

/// The bytes don't fit. Nothing changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the memory for requests and answers under way, {limit} bytes, is taken")]
pub struct BudgetExhausted {
    /// The budget.
    limit: usize,
}

impl ByteBudget {
    /// Nothing is used.
    pub fn new(limit: usize) -> Self {
        Self(Arc::new(Account {
            limit,
            used: AtomicUsize::new(0),
        }))
    }

    /// A lease of no bytes, to grow.
    pub fn lease(&self, purpose: Purpose) -> Lease {
        Lease {
            budget: self.clone(),
            purpose,
            n_bytes: 0,
        }
    }

    /// Bytes of all leases.
    pub fn used(&self) -> usize {
        self.0.used.load(Ordering::Relaxed)
    }
}

/// Bytes that somebody keeps; given back when it is dropped.
#[derive(Debug)]
pub struct Lease {
    budget: ByteBudget,
    purpose: Purpose,
    n_bytes: usize,
}

impl Lease {
    /// Takes more.
    pub fn grow(&mut self, n_bytes: usize) -> Result<(), BudgetExhausted> {
        let Account { limit, used } = &*self.budget.0;
        let most = match self.purpose {
            Purpose::Body => limit / 2,
            Purpose::Answer => *limit,
        };
        used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |used| {
            used.checked_add(n_bytes).filter(|sum| *sum <= most)
        })
        .map_err(|_| BudgetExhausted { limit: *limit })?;
        self.n_bytes += n_bytes;
        Ok(())
    }

    /// Takes more or gives back, to hold `n_bytes` from now on.
    pub fn resize(&mut self, n_bytes: usize) -> Result<(), BudgetExhausted> {
        match n_bytes.checked_sub(self.n_bytes) {
            Some(more) => self.grow(more),
            None => {
                let less = self.n_bytes - n_bytes;
                self.budget.0.used.fetch_sub(less, Ordering::Relaxed);
                self.n_bytes = n_bytes;
                Ok(())
            }
        }
    }

    /// Takes over the bytes of another lease of the same budget.
    pub fn absorb(&mut self, mut other: Self) {
        debug_assert!(Arc::ptr_eq(&self.budget.0, &other.budget.0));
        self.n_bytes += std::mem::take(&mut other.n_bytes);
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let used = &self.budget.0.used;
        used.fetch_sub(self.n_bytes, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bodies_leave_room_for_answers_and_everything_comes_back() {
        let budget = ByteBudget::new(100);
        let mut body = budget.lease(Purpose::Body);
        body.grow(30).unwrap();
        body.grow(20).unwrap();
        let refused = body.grow(1).unwrap_err();
        assert_eq!(
            refused.to_string(),
            "the memory for requests and answers under way, 100 bytes, is taken"
        );
        let mut answer = budget.lease(Purpose::Answer);
        answer.grow(50).unwrap();
        assert!(answer.grow(1).is_err());
        assert!(answer.grow(usize::MAX).is_err(), "no overflow");
        drop(body);
        let mut other = budget.lease(Purpose::Answer);
        other.grow(10).unwrap();
        answer.absorb(other);
        assert_eq!(budget.used(), 60);
        answer.resize(40).unwrap();
        assert_eq!(budget.used(), 40);
        answer.resize(100).unwrap();
        assert!(answer.resize(101).is_err());
        assert_eq!(budget.used(), 100);
        drop(answer);
        assert_eq!(budget.used(), 0);
    }
}
