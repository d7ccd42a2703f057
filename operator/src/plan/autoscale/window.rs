//! The answers of a sliding window, as far as its largest is concerned.
//!
//! Pure. An answer that a later one reaches or exceeds can never be the window's largest again and is dropped, so that a
//! window is a few entries long and cheap to copy.

use std::collections::VecDeque;
use std::time::Duration;

/// Two looks at the replicas are no further apart than this: the interval between them, the time that silent replicas take,
/// and retries after an error.
pub(super) const LONGEST_PAUSE: Duration = Duration::from_secs(10);

/// The answers of the past window, by the operator's monotonic clock.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Window {
    /// Answers are known from here on without a gap.
    since: Duration,
    /// When the last answer was given.
    last: Option<Duration>,
    /// Ascending in time, strictly descending in number.
    answers: VecDeque<(Duration, u32)>,
}

impl Window {
    /// Adds an answer and forgets those older than `length`.
    pub(super) fn push(&mut self, now: Duration, answer: u32, length: Duration) {
        while self
            .answers
            .front()
            .is_some_and(|(at, _)| now.saturating_sub(*at) > length)
        {
            self.answers.pop_front();
        }
        // What is forgotten counts no more, should the window grow; after a gap knowledge begins anew.
        self.since = match self.follows(now) {
            false => now,
            true => self.since.max(now.saturating_sub(length)),
        };
        self.last = Some(now);
        while self.answers.back().is_some_and(|(_, n)| *n <= answer) {
            self.answers.pop_back();
        }
        self.answers.push_back((now, answer));
    }

    /// When the last answer was given.
    pub(super) fn last(&self) -> Option<Duration> {
        self.last
    }

    /// No more time has passed since the last answer than ever does between two looks: what the load was in a gap isn't
    /// known, however long the window is.
    pub(super) fn follows(&self, now: Duration) -> bool {
        self.last
            .is_some_and(|last| now.saturating_sub(last) <= LONGEST_PAUSE)
    }

    /// The largest answer, where the window reaches back over its whole length; after a restart it doesn't, and nothing is
    /// scaled down.
    pub(super) fn settled(&self, now: Duration, length: Duration) -> Option<u32> {
        let is_covered = self.last.is_some() && now.saturating_sub(self.since) >= length;
        is_covered.then(|| self.max())
    }

    /// When the largest answer will be `answer`, if no larger one is given.
    pub(super) fn settles_at(&self, answer: u32, length: Duration) -> Duration {
        let larger = self.answers.iter().rev().find(|(_, n)| *n > answer);
        let last = larger.map_or(self.since, |(at, _)| self.since.max(*at));
        last + length
    }

    /// The largest answer of the window; 0 where there is none.
    pub(super) fn max(&self) -> u32 {
        self.answers.front().map_or(0, |(_, answer)| *answer)
    }

    /// Answers that are kept.
    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.answers.len()
    }
}
