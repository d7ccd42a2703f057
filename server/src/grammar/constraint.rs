//! One sequence held to its grammar: the mask of its next token is computed on other threads, from the moment that the token
//! before is known until the engine asks for it. Rows of one step are computed side by side while the device runs, and the
//! engine waits for no row but those that are constrained.

use std::cell::RefCell;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use super::{MatchError, Matcher};
use crate::engine::constraint::Constraint;
use crate::text::pool::Lane;

/// Follows one sequence.
#[derive(Debug)]
pub struct GrammarConstraint {
    at: RefCell<At>,
    threads: Lane,
}

#[derive(Debug)]
enum At {
    Known(Box<Place>),
    Computing(Receiver<Box<Place>>),
    /// The threads are gone, or one failed.
    Lost,
}

/// A place in the grammar.
#[derive(Debug)]
struct Place {
    matcher: Matcher,
    /// A bit for each token that may come next.
    mask: Vec<u32>,
    /// The grammar can't be followed any further: nothing may come next.
    has_failed: bool,
}

impl Place {
    fn fill(&mut self) {
        if !self.has_failed
            && let Err(error) = self.matcher.fill(&mut self.mask)
        {
            self.fail(&error);
        }
    }

    fn advance(&mut self, token: u32) {
        if !self.has_failed
            && let Err(error) = self.matcher.advance(token)
        {
            self.fail(&error);
        }
    }

    fn fail(&mut self, error: &MatchError) {
        tracing::warn!(%error, "an answer ends where its grammar can't be followed");
        self.mask.fill(0);
        self.has_failed = true;
    }
}

impl GrammarConstraint {
    /// At the place that `begin` gives, on one of the threads. Masks have `n_words` words.
    pub(super) fn new(
        threads: Lane,
        n_words: usize,
        begin: impl FnOnce() -> Matcher + Send + 'static,
    ) -> Self {
        let at = compute(&threads, move || {
            Box::new(Place {
                matcher: begin(),
                mask: vec![0; n_words],
                has_failed: false,
            })
        });
        Self {
            at: RefCell::new(at),
            threads,
        }
    }

    /// Waits until the place is known. `None`: it never will be.
    fn place(at: &mut At) -> Option<&mut Place> {
        if let At::Computing(result) = at {
            *at = result.recv().map_or(At::Lost, At::Known);
        }
        match at {
            At::Known(place) => Some(place),
            At::Computing(_) | At::Lost => None,
        }
    }
}

impl Constraint for GrammarConstraint {
    fn advance(&mut self, token: u32) {
        let at = self.at.get_mut();
        if Self::place(at).is_none() {
            return;
        }
        if let At::Known(mut place) = std::mem::replace(at, At::Lost) {
            *at = compute(&self.threads, move || {
                place.advance(token);
                place
            });
        }
    }

    fn fill_mask(&mut self, mask: &mut [u32]) {
        if let Some(place) = Self::place(self.at.get_mut()) {
            let n = mask.len().min(place.mask.len());
            mask[..n].copy_from_slice(&place.mask[..n]);
        }
    }

    fn fork(&self) -> Box<dyn Constraint> {
        let mut at = self.at.borrow_mut();
        let at = match Self::place(&mut at) {
            Some(place) => At::Known(Box::new(Place {
                matcher: place.matcher.fork(),
                mask: place.mask.clone(),
                has_failed: place.has_failed,
            })),
            None => At::Lost,
        };
        Box::new(Self {
            at: RefCell::new(at),
            threads: self.threads.clone(),
        })
    }
}

/// Comes to a place and computes its mask on one of the threads.
fn compute(threads: &Lane, come: impl FnOnce() -> Box<Place> + Send + 'static) -> At {
    let (done, result): (SyncSender<Box<Place>>, _) = sync_channel(1);
    threads.spawn(move || {
        let mut place = come();
        place.fill();
        // Nobody waits for it where the sequence has ended.
        let _ = done.send(place);
    });
    At::Computing(result)
}
