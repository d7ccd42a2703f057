//! What each API key may use of this replica: requests and tokens a minute, and requests at once. Pure: it is told the time.
//!
//! A minute's worth may come at once, and comes back evenly. How many tokens a request takes is known only at its end, so
//! that a request is admitted while any are left, and what it takes more than that delays the next.

use std::num::NonZeroU32;
use std::time::{Duration, Instant};

const MINUTE: Duration = Duration::from_secs(60);

/// What each key may use; `None`: as much as there is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KeyLimits {
    /// Requests in a minute.
    pub requests_per_minute: Option<NonZeroU32>,
    /// Tokens in a minute, of prompts and generated.
    pub tokens_per_minute: Option<NonZeroU32>,
    /// Requests at once.
    pub max_concurrent_requests: Option<NonZeroU32>,
}

impl KeyLimits {
    /// Nothing is limited.
    pub fn is_none(&self) -> bool {
        *self == Self::default()
    }
}

/// Which limit a request was over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Limit {
    /// Requests a minute.
    Requests,
    /// Tokens a minute.
    Tokens,
    /// Requests at once.
    Concurrency,
}

/// A request that was not admitted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// What it is over.
    pub limit: Limit,
    /// The limit.
    pub most: u32,
    /// When another try may succeed; unknown where others must end first.
    pub retry_after: Option<Duration>,
}

/// Where one limit by the minute stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Level {
    /// The most.
    pub limit: u32,
    /// What is left.
    pub remaining: u32,
    /// When all of it is back.
    pub reset: Duration,
}

/// Where both limits by the minute stand.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Levels {
    /// Requests.
    pub requests: Option<Level>,
    /// Tokens.
    pub tokens: Option<Level>,
}

/// What one key has used.
#[derive(Clone, Debug)]
pub struct KeyUse {
    requests: Option<Bucket>,
    tokens: Option<Bucket>,
    max_running: Option<NonZeroU32>,
    n_running: u32,
}

impl KeyUse {
    /// Nothing yet.
    pub fn new(limits: &KeyLimits, now: Instant) -> Self {
        let bucket = |limit: Option<NonZeroU32>| limit.map(|limit| Bucket::full(limit, now));
        Self {
            requests: bucket(limits.requests_per_minute),
            tokens: bucket(limits.tokens_per_minute),
            max_running: limits.max_concurrent_requests,
            n_running: 0,
        }
    }

    /// Begins a request, which [`Self::ended`] ends. `Err`: nothing changed.
    pub fn admit(&mut self, now: Instant) -> Result<(), Refusal> {
        if let Some(most) = self.max_running.filter(|most| self.n_running >= most.get()) {
            return Err(Refusal {
                limit: Limit::Concurrency,
                most: most.get(),
                retry_after: None,
            });
        }
        for (limit, bucket) in [
            (Limit::Requests, &mut self.requests),
            (Limit::Tokens, &mut self.tokens),
        ] {
            let Some(bucket) = bucket else { continue };
            bucket.refill(now);
            if bucket.level < 1.0 {
                return Err(Refusal {
                    limit,
                    most: bucket.limit.get(),
                    retry_after: Some(bucket.time_for(1.0)),
                });
            }
        }
        if let Some(requests) = &mut self.requests {
            requests.level -= 1.0;
        }
        self.n_running += 1;
        Ok(())
    }

    /// Charges tokens that were used, more than are left too.
    pub fn charge(&mut self, n_tokens: u64, now: Instant) {
        if let Some(tokens) = &mut self.tokens {
            tokens.refill(now);
            tokens.level -= n_tokens as f64;
        }
    }

    /// A request that was admitted has ended.
    pub fn ended(&mut self) {
        self.n_running = self.n_running.saturating_sub(1);
    }

    /// Where the limits stand.
    pub fn levels(&mut self, now: Instant) -> Levels {
        let level = |bucket: &mut Bucket| {
            bucket.refill(now);
            bucket.standing()
        };
        Levels {
            requests: self.requests.as_mut().map(level),
            tokens: self.tokens.as_mut().map(level),
        }
    }

    /// It may be forgotten: a new one would be the same.
    pub fn is_unused(&mut self, now: Instant) -> bool {
        let Levels { requests, tokens } = self.levels(now);
        let is_full = |level: Option<Level>| level.is_none_or(|level| level.reset.is_zero());
        self.n_running == 0 && is_full(requests) && is_full(tokens)
    }
}

/// A token bucket.
#[derive(Clone, Debug)]
struct Bucket {
    /// The most that it holds, and what comes back in a minute.
    limit: NonZeroU32,
    /// Below 0 after more was taken than was there.
    level: f64,
    /// When `level` was so.
    at: Instant,
}

impl Bucket {
    fn full(limit: NonZeroU32, now: Instant) -> Self {
        Self {
            limit,
            level: f64::from(limit.get()),
            at: now,
        }
    }

    fn refill(&mut self, now: Instant) {
        let most = f64::from(self.limit.get());
        let passed = now.saturating_duration_since(self.at);
        self.level = most.min(self.level + most * passed.div_duration_f64(MINUTE));
        self.at = self.at.max(now);
    }

    /// Until `level` is there.
    fn time_for(&self, level: f64) -> Duration {
        let missing = (level - self.level).max(0.0) / f64::from(self.limit.get());
        // Years, where an overflow would be a panic.
        Duration::try_from_secs_f64(missing * MINUTE.as_secs_f64()).unwrap_or(Duration::MAX)
    }

    fn standing(&self) -> Level {
        let most = f64::from(self.limit.get());
        Level {
            limit: self.limit.get(),
            remaining: self.level.clamp(0.0, most) as u32,
            reset: self.time_for(most),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn limits(requests: u32, tokens: u32, at_once: u32) -> KeyLimits {
        KeyLimits {
            requests_per_minute: NonZeroU32::new(requests),
            tokens_per_minute: NonZeroU32::new(tokens),
            max_concurrent_requests: NonZeroU32::new(at_once),
        }
    }

    fn seconds(s: f64) -> Duration {
        Duration::from_secs_f64(s)
    }

    #[test]
    fn a_minutes_requests_come_at_once_and_then_evenly() {
        let start = Instant::now();
        let mut used = KeyUse::new(&limits(6, 0, 0), start);
        for left in (0..6).rev() {
            assert_eq!(used.admit(start), Ok(()));
            assert_eq!(used.levels(start).requests.unwrap().remaining, left);
        }
        let refused = used.admit(start).unwrap_err();
        assert_eq!((refused.limit, refused.most), (Limit::Requests, 6));
        assert_eq!(refused.retry_after, Some(seconds(10.0)));
        assert!(used.admit(start + seconds(9.9)).is_err());
        assert_eq!(used.admit(start + seconds(10.1)), Ok(()));
        assert!(used.admit(start + seconds(10.1)).is_err(), "one came back");
        assert_eq!(used.levels(start).tokens, None, "these have no limit");
    }

    #[test]
    fn tokens_beyond_the_limit_delay_the_next_request() {
        let start = Instant::now();
        let mut used = KeyUse::new(&limits(0, 60, 0), start);
        assert_eq!(used.admit(start), Ok(()));
        used.charge(120, start);
        let level = used.levels(start).tokens.unwrap();
        assert_eq!((level.limit, level.remaining), (60, 0));
        assert_eq!(level.reset, seconds(120.0));
        let refused = used.admit(start).unwrap_err();
        assert_eq!(refused.limit, Limit::Tokens);
        assert_eq!(refused.retry_after, Some(seconds(61.0)));
        assert!(used.admit(start + seconds(60.9)).is_err());
        assert_eq!(used.admit(start + seconds(61.1)), Ok(()));
        used.ended();
        used.ended();
        assert!(!used.is_unused(start + seconds(119.0)));
        assert!(used.is_unused(start + seconds(121.0)));
    }

    #[test]
    fn so_many_run_at_once_and_a_refusal_takes_nothing() {
        let start = Instant::now();
        let mut used = KeyUse::new(&limits(10, 0, 2), start);
        used.admit(start).unwrap();
        used.admit(start).unwrap();
        let refused = used.admit(start).unwrap_err();
        assert_eq!(
            refused,
            Refusal {
                limit: Limit::Concurrency,
                most: 2,
                retry_after: None
            }
        );
        assert_eq!(used.levels(start).requests.unwrap().remaining, 8);
        assert!(!used.is_unused(start + MINUTE));
        used.ended();
        assert_eq!(used.admit(start), Ok(()));
    }

    proptest! {
        #[test]
        fn no_time_has_more_requests_than_its_share_and_a_burst(
            limit in 1_u32..200,
            steps in proptest::collection::vec(0_u64..5_000, 1..200),
        ) {
            let start = Instant::now();
            let mut used = KeyUse::new(&limits(limit, 0, 0), start);
            let (mut now, mut n) = (start, 0);
            for ms in steps {
                now += Duration::from_millis(ms);
                match used.admit(now) {
                    Ok(()) => n += 1,
                    Err(refusal) => {
                        // The time that is told is enough, and not much too long.
                        let wait = refusal.retry_after.unwrap();
                        let early = wait.saturating_sub(Duration::from_millis(2));
                        prop_assert!(used.clone().admit(now + wait + Duration::from_millis(1)).is_ok());
                        prop_assert!(early.is_zero() || used.clone().admit(now + early).is_err());
                    }
                }
                let share = f64::from(limit) * (1.0 + (now - start).div_duration_f64(MINUTE));
                prop_assert!(f64::from(n) <= share + 1e-6);
            }
        }
    }
}
