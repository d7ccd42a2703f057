//! When things happened to one request, and which latencies that completes. Each is reported once: a request that is
//! preempted is admitted again, but it has left the queue only once. Pure: it is told what time it is.

use std::time::{Duration, Instant};

use crate::metrics::LatencyKind;

/// One request's life so far.
#[derive(Clone, Debug)]
pub(super) struct Timeline {
    arrived: Instant,
    queued: Instant,
    admitted: Option<Instant>,
    /// The first token and the newest.
    tokens: Option<(Instant, Instant)>,
}

impl Timeline {
    /// `arrived`: when the client's call came. `queued`: when the request was given to the engine.
    pub(super) fn new(arrived: Instant, queued: Instant) -> Self {
        Self {
            arrived,
            queued,
            admitted: None,
            tokens: None,
        }
    }

    /// The engine runs it, for the first time or again.
    pub(super) fn admitted(&mut self, at: Instant, mut observe: impl FnMut(LatencyKind, Duration)) {
        if self.admitted.is_none() {
            self.admitted = Some(at);
            observe(LatencyKind::Queue, since(self.queued, at));
        }
    }

    /// It got one token, or several at once.
    pub(super) fn token(&mut self, at: Instant, mut observe: impl FnMut(LatencyKind, Duration)) {
        match &mut self.tokens {
            None => {
                self.tokens = Some((at, at));
                observe(LatencyKind::FirstToken, since(self.arrived, at));
                // The engine reports an admission before what it brought.
                if let Some(admitted) = self.admitted {
                    observe(LatencyKind::Prefill, since(admitted, at));
                }
            }
            Some((_, newest)) => {
                observe(LatencyKind::InterToken, since(*newest, at));
                *newest = at;
            }
        }
    }

    /// It ended. Called once.
    pub(super) fn ended(&self, at: Instant, mut observe: impl FnMut(LatencyKind, Duration)) {
        observe(LatencyKind::EndToEnd, since(self.arrived, at));
        if let Some((first, newest)) = self.tokens {
            observe(LatencyKind::Decode, since(first, newest));
        }
    }
}

fn since(from: Instant, to: Instant) -> Duration {
    to.saturating_duration_since(from)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[derive(Clone, Copy, Debug)]
    enum Moment {
        Admitted,
        Token,
        Ended,
    }
    use Moment::{Admitted, Ended, Token};

    /// Arrives at 0 ms, is queued at 10 ms.
    fn latencies(events: &[(u64, Moment)]) -> Vec<(LatencyKind, u64)> {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut timeline = Timeline::new(start, at(10));
        let mut latencies = Vec::new();
        let mut observe =
            |kind, length: Duration| latencies.push((kind, length.as_millis() as u64));
        for &(ms, event) in events {
            match event {
                Admitted => timeline.admitted(at(ms), &mut observe),
                Token => timeline.token(at(ms), &mut observe),
                Ended => timeline.ended(at(ms), &mut observe),
            }
        }
        latencies
    }

    #[test]
    fn each_latency_is_measured_from_its_own_beginning() {
        use LatencyKind::{Decode, EndToEnd, FirstToken, InterToken, Prefill, Queue};
        for (why, events, want) in [
            (
                "one token",
                vec![(30, Admitted), (70, Token), (70, Ended)],
                vec![
                    (Queue, 20),
                    (FirstToken, 70),
                    (Prefill, 40),
                    (EndToEnd, 70),
                    (Decode, 0),
                ],
            ),
            (
                "preempted before and after its first token",
                vec![
                    (30, Admitted),
                    (50, Admitted),
                    (70, Token),
                    (90, Admitted),
                    (100, Token),
                    (105, Token),
                    (110, Ended),
                ],
                vec![
                    (Queue, 20),
                    (FirstToken, 70),
                    (Prefill, 40),
                    (InterToken, 30),
                    (InterToken, 5),
                    (EndToEnd, 110),
                    (Decode, 35),
                ],
            ),
            (
                "a prompt that is only scored",
                vec![(30, Admitted), (60, Ended)],
                vec![(Queue, 20), (EndToEnd, 60)],
            ),
            (
                "the engine fails before it runs",
                vec![(60, Ended)],
                vec![(EndToEnd, 60)],
            ),
        ] {
            assert_eq!(latencies(&events), want, "{why}");
        }
    }

    proptest! {
        /// However often it is preempted, and whenever.
        #[test]
        fn a_request_leaves_the_queue_once_and_has_one_first_token(
            steps in prop::collection::vec((0..50u64, any::<bool>()), 0..40),
        ) {
            let mut now = 10;
            let mut events = vec![(now, Admitted)];
            for (ms, token) in steps {
                now += ms;
                events.push((now, if token { Token } else { Admitted }));
            }
            let n_tokens = events.iter().filter(|(_, e)| matches!(e, Token)).count();
            events.push((now, Ended));
            let latencies = latencies(&events);
            let count = |wanted| latencies.iter().filter(|(kind, _)| *kind == wanted).count();
            let once = usize::from(n_tokens > 0);
            prop_assert_eq!(count(LatencyKind::Queue), 1);
            prop_assert_eq!(count(LatencyKind::FirstToken), once);
            prop_assert_eq!(count(LatencyKind::Prefill), once);
            prop_assert_eq!(count(LatencyKind::Decode), once);
            prop_assert_eq!(count(LatencyKind::InterToken), n_tokens.saturating_sub(1));
            prop_assert_eq!(count(LatencyKind::EndToEnd), 1);
            // Queue, prefill and decode follow each other; nothing is counted twice or left out.
            let sum = |wanted: &[LatencyKind]| latencies.iter().filter(|(kind, _)| wanted.contains(kind)).map(|(_, ms)| ms).sum::<u64>();
            prop_assert_eq!(sum(&[LatencyKind::Decode]), sum(&[LatencyKind::InterToken]));
            if n_tokens > 0 {
                prop_assert_eq!(sum(&[LatencyKind::FirstToken]), 10 + sum(&[LatencyKind::Queue, LatencyKind::Prefill]));
            }
        }
    }
}
