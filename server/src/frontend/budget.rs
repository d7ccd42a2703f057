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
    /// What is taken here is taken there too.
    whole: Option<ByteBudget>,
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
pub enum BudgetExhausted {
    /// Not in the budget as a whole.
    #[error("the memory for requests and answers under way, {limit} bytes, is taken")]
    Whole {
        /// The budget.
        limit: usize,
    },
    /// Not in the share of one answer.
    #[error("the answer was not taken in time: {limit} bytes of it wait for its client")]
    Share {
        /// The share.
        limit: usize,
    },
}

impl ByteBudget {
    /// Nothing is used.
    pub fn new(limit: usize) -> Self {
        Self(Arc::new(Account {
            limit,
            used: AtomicUsize::new(0),
            whole: None,
        }))
    }

    /// A part of this budget, an eighth at most, so that no single client takes all of it.
    pub fn share(&self) -> Self {
        Self(Arc::new(Account {
            limit: self.0.limit / 8,
            used: AtomicUsize::new(0),
            whole: Some(self.clone()),
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

    fn take(&self, n_bytes: usize, purpose: Purpose) -> Result<(), BudgetExhausted> {
        let Account { limit, used, whole } = &*self.0;
        let most = match purpose {
            Purpose::Body => limit / 2,
            Purpose::Answer => *limit,
        };
        used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |used| {
            used.checked_add(n_bytes).filter(|sum| *sum <= most)
        })
        .map_err(|_| match whole {
            Some(_) => BudgetExhausted::Share { limit: *limit },
            None => BudgetExhausted::Whole { limit: *limit },
        })?;
        let taken = whole
            .as_ref()
            .map_or(Ok(()), |whole| whole.take(n_bytes, purpose));
        if taken.is_err() {
            used.fetch_sub(n_bytes, Ordering::Relaxed);
        }
        taken
    }

    fn give_back(&self, n_bytes: usize) {
        self.0.used.fetch_sub(n_bytes, Ordering::Relaxed);
        if let Some(whole) = &self.0.whole {
            whole.give_back(n_bytes);
        }
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
        self.budget.take(n_bytes, self.purpose)?;
        self.n_bytes += n_bytes;
        Ok(())
    }

    /// Takes more or gives back, to hold `n_bytes` from now on.
    pub fn resize(&mut self, n_bytes: usize) -> Result<(), BudgetExhausted> {
        match n_bytes.checked_sub(self.n_bytes) {
            Some(more) => self.grow(more),
            None => {
                self.budget.give_back(self.n_bytes - n_bytes);
                self.n_bytes = n_bytes;
                Ok(())
            }
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.budget.give_back(self.n_bytes);
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
        answer.resize(40).unwrap();
        assert_eq!(budget.used(), 40);
        answer.resize(100).unwrap();
        assert!(answer.resize(101).is_err());
        assert_eq!(budget.used(), 100);
        drop(answer);
        assert_eq!(budget.used(), 0);
    }

    #[test]
    fn a_share_is_bounded_by_itself_and_by_the_whole() {
        let budget = ByteBudget::new(80);
        let share = budget.share();
        let mut one = share.lease(Purpose::Answer);
        one.grow(10).unwrap();
        let refused = share.lease(Purpose::Answer).grow(1).unwrap_err();
        assert_eq!(refused, BudgetExhausted::Share { limit: 10 });
        let mut rest = budget.lease(Purpose::Answer);
        rest.grow(65).unwrap();
        let another = budget.share();
        let refused = another.lease(Purpose::Answer).grow(6).unwrap_err();
        assert_eq!(refused, BudgetExhausted::Whole { limit: 80 });
        assert_eq!((another.used(), budget.used()), (0, 75), "nothing changed");
        drop(one);
        assert_eq!((share.used(), budget.used()), (0, 65));
    }
}
