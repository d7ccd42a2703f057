//! When things happened to one request, and which spans of its life that ends. Each is reported once: a request that is
//! preempted is admitted again, but it has left the queue only once. Pure: it is told what time it is.

use std::time::{Duration, Instant};

use crate::metrics::Span;

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
    pub(super) fn admitted(&mut self, at: Instant, mut over: impl FnMut(Span, Duration)) {
        if self.admitted.is_none() {
            self.admitted = Some(at);
            over(Span::Queue, since(self.queued, at));
        }
    }

    /// It got one token, or several at once.
    pub(super) fn token(&mut self, at: Instant, mut over: impl FnMut(Span, Duration)) {
        match &mut self.tokens {
            None => {
                self.tokens = Some((at, at));
                over(Span::FirstToken, since(self.arrived, at));
                // The engine reports an admission before what it brought.
                if let Some(admitted) = self.admitted {
                    over(Span::Prefill, since(admitted, at));
                }
            }
            Some((_, newest)) => {
                over(Span::InterToken, since(*newest, at));
                *newest = at;
            }
        }
    }

    /// It ended. Called once.
    pub(super) fn ended(&self, at: Instant, mut over: impl FnMut(Span, Duration)) {
        over(Span::Whole, since(self.arrived, at));
        if let Some((first, newest)) = self.tokens {
            over(Span::Decode, since(first, newest));
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
    enum Happens {
        Admitted,
        Token,
        Ended,
    }
    use Happens::{Admitted, Ended, Token};

    /// Arrives at 0 ms, is queued at 10 ms.
    fn spans(events: &[(u64, Happens)]) -> Vec<(Span, u64)> {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut timeline = Timeline::new(start, at(10));
        let mut spans = Vec::new();
        let mut over = |span, length: Duration| spans.push((span, length.as_millis() as u64));
        for &(ms, event) in events {
            match event {
                Admitted => timeline.admitted(at(ms), &mut over),
                Token => timeline.token(at(ms), &mut over),
                Ended => timeline.ended(at(ms), &mut over),
            }
        }
        spans
    }

    #[test]
    fn each_span_is_measured_from_its_own_beginning() {
        use Span::{Decode, FirstToken, InterToken, Prefill, Queue, Whole};
        for (why, events, want) in [
            (
                "one token",
                vec![(30, Admitted), (70, Token), (70, Ended)],
                vec![
                    (Queue, 20),
                    (FirstToken, 70),
                    (Prefill, 40),
                    (Whole, 70),
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
                    (Whole, 110),
                    (Decode, 35),
                ],
            ),
            (
                "a prompt that is only scored",
                vec![(30, Admitted), (60, Ended)],
                vec![(Queue, 20), (Whole, 60)],
            ),
            (
                "the engine fails before it runs",
                vec![(60, Ended)],
                vec![(Whole, 60)],
            ),
        ] {
            assert_eq!(spans(&events), want, "{why}");
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
            let spans = spans(&events);
            let count = |wanted| spans.iter().filter(|(span, _)| *span == wanted).count();
            let once = usize::from(n_tokens > 0);
            prop_assert_eq!(count(Span::Queue), 1);
            prop_assert_eq!(count(Span::FirstToken), once);
            prop_assert_eq!(count(Span::Prefill), once);
            prop_assert_eq!(count(Span::Decode), once);
            prop_assert_eq!(count(Span::InterToken), n_tokens.saturating_sub(1));
            prop_assert_eq!(count(Span::Whole), 1);
            // Queue, prefill and decode follow each other; nothing is counted twice or left out.
            let sum = |wanted: &[Span]| spans.iter().filter(|(s, _)| wanted.contains(s)).map(|(_, ms)| ms).sum::<u64>();
            prop_assert_eq!(sum(&[Span::Decode]), sum(&[Span::InterToken]));
            if n_tokens > 0 {
                prop_assert_eq!(sum(&[Span::FirstToken]), 10 + sum(&[Span::Queue, Span::Prefill]));
            }
        }
    }
}
