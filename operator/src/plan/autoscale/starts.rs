//! How long replicas take to start, and which of those that start now are late.
//!
//! Pure.

use std::collections::VecDeque;
use std::time::Duration;

/// Starts that are kept: enough for a ninth of ten, few enough to follow a new image or model.
const KEPT: usize = 20;
/// A start is late after so many times the measured one, and never before [`LEAST_DEADLINE`].
const LATE_AFTER: u32 = 3;
const LEAST_DEADLINE: Duration = Duration::from_secs(60);
/// Where no start was measured: images are pulled and models loaded.
const UNKNOWN_DEADLINE: Duration = Duration::from_secs(600);

/// The newest starts, from a pod's creation until it was ready.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Starts {
    measured: VecDeque<Duration>,
}

impl Starts {
    /// Goes on from what a status tells.
    pub(super) fn read_back(p90_seconds: Option<i32>) -> Self {
        let seconds = p90_seconds.and_then(|s| u64::try_from(s).ok());
        Self {
            measured: seconds.map(Duration::from_secs).into_iter().collect(),
        }
    }

    /// A replica became ready so long after its pod was created.
    pub(super) fn note(&mut self, took: Duration) {
        if self.measured.len() == KEPT {
            self.measured.pop_front();
        }
        self.measured.push_back(took);
    }

    /// The ninth of ten; `None` where none was measured.
    pub(super) fn p90(&self) -> Option<Duration> {
        let mut sorted: Vec<_> = self.measured.iter().copied().collect();
        sorted.sort_unstable();
        let at = (sorted.len() * 9).div_ceil(10).checked_sub(1)?;
        sorted.get(at).copied()
    }

    /// A replica that starts is no supply any more once it is older.
    pub(super) fn deadline(&self) -> Duration {
        self.p90().map_or(UNKNOWN_DEADLINE, |p90| {
            (p90 * LATE_AFTER).max(LEAST_DEADLINE)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ninth_of_ten_and_the_deadline_follow_the_newest_starts() {
        let seconds = Duration::from_secs;
        let mut starts = Starts::default();
        assert_eq!((starts.p90(), starts.deadline()), (None, UNKNOWN_DEADLINE));
        starts.note(seconds(4));
        assert_eq!(
            (starts.p90(), starts.deadline()),
            (Some(seconds(4)), LEAST_DEADLINE)
        );
        for n in 1..=10 {
            starts.note(seconds(n * 10));
        }
        assert_eq!(starts.p90(), Some(seconds(90)), "ten of eleven");
        assert_eq!(starts.deadline(), seconds(270));
        for _ in 0..KEPT {
            starts.note(seconds(2));
        }
        assert_eq!(starts.p90(), Some(seconds(2)), "the old ones are forgotten");
        assert_eq!(Starts::read_back(Some(30)).p90(), Some(seconds(30)));
        assert_eq!(Starts::read_back(Some(-1)).p90(), None);
    }
}
