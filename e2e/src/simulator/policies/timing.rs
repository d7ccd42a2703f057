//! What policies share of time: when they look again, and means over the past.

use std::collections::VecDeque;

/// Something that is done every so often.
#[derive(Clone, Copy, Debug)]
pub(super) struct Interval {
    seconds: f64,
    last_s: Option<f64>,
}

impl Interval {
    pub(super) fn every(seconds: f64) -> Self {
        Self {
            seconds,
            last_s: None,
        }
    }

    /// It is time again; then the next time counts from now.
    pub(super) fn is_due(&mut self, now_s: f64) -> bool {
        // Ticks are sums of fractions.
        let is_due = (self.last_s).is_none_or(|last| now_s - last >= self.seconds - 1e-6);
        if is_due {
            self.last_s = Some(now_s);
        }
        is_due
    }
}

/// Values of late, and when each was seen.
#[derive(Clone, Debug, Default)]
pub(super) struct Samples(VecDeque<(f64, f64)>);

impl Samples {
    /// Adds a value, and forgets those older than `keep_s`.
    pub(super) fn push(&mut self, now_s: f64, value: f64, keep_s: f64) {
        self.0.push_back((now_s, value));
        self.0.retain(|(at, _)| now_s - at <= keep_s);
    }

    /// The mean of the last `window_s`; 0 where there is nothing.
    pub(super) fn mean(&self, now_s: f64, window_s: f64) -> f64 {
        let recent = self.0.iter().filter(|(at, _)| now_s - at < window_s);
        let (sum, n) = recent.fold((0.0, 0.0), |(sum, n), (_, value)| (sum + value, n + 1.0));
        if n > 0.0 { sum / n } else { 0.0 }
    }
}
