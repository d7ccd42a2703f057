//! The limits of each key on this replica, for calls to the model: whatever is posted. Where they stand is told in OpenAI's
//! headers (<https://platform.openai.com/docs/guides/rate-limits>).

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use crate::access::limits::{KeyLimits, KeyUse, Level, Levels, Limit, Refusal};
use crate::frontend::Call;
use crate::http::error::ApiError;
use crate::http::hold::hold;

/// What all keys have used.
#[derive(Debug)]
pub(super) struct Limiter {
    limits: KeyLimits,
    keys: Mutex<HashMap<Arc<str>, Used>>,
}

#[derive(Debug)]
struct Used {
    state: KeyUse,
    /// Tokens that are not charged yet.
    spent: Arc<AtomicU64>,
}

impl Limiter {
    pub(super) fn new(limits: KeyLimits) -> Self {
        Self {
            limits,
            keys: Mutex::default(),
        }
    }

    /// Begins a request of a key, which ends with the permit.
    fn admit(
        self: &Arc<Self>,
        name: &Arc<str>,
        call: &Call,
        now: Instant,
    ) -> (Result<Permit, Refusal>, Levels) {
        let mut keys = self.keys();
        if !keys.contains_key(name) {
            // Those of keys that are gone would stay for ever.
            keys.retain(|_, used| {
                Arc::strong_count(&used.spent) > 1
                    || used.spent.load(Ordering::Relaxed) > 0
                    || !used.state.is_unused(now)
            });
        }
        let used = keys.entry(Arc::clone(name)).or_insert_with(|| Used {
            state: KeyUse::new(&self.limits, now),
            spent: Arc::default(),
        });
        used.state
            .charge(used.spent.swap(0, Ordering::Relaxed), now);
        let admitted = used.state.admit(now).map(|()| {
            call.charge_to(Arc::clone(&used.spent));
            Permit {
                limiter: Arc::clone(self),
                name: Arc::clone(name),
            }
        });
        (admitted, used.state.levels(now))
    }

    fn keys(&self) -> MutexGuard<'_, HashMap<Arc<str>, Used>> {
        // Each change under this lock is whole, so that a panic elsewhere leaves nothing half done.
        self.keys.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A request under way.
struct Permit {
    limiter: Arc<Limiter>,
    name: Arc<str>,
}

impl Drop for Permit {
    fn drop(&mut self) {
        if let Some(used) = self.limiter.keys().get_mut(&self.name) {
            used.state.ended();
        }
    }
}

/// For `axum::middleware::from_fn_with_state`; inside the layer that asks for keys.
pub(super) async fn layer(
    State(limiter): State<Arc<Limiter>>,
    request: Request,
    next: Next,
) -> Response {
    let call = request.extensions().get::<Arc<Call>>().cloned();
    let Some((call, name)) = call.and_then(|call| call.tenant().cloned().map(|name| (call, name)))
    else {
        return next.run(request).await;
    };
    if request.method() != Method::POST {
        return next.run(request).await;
    }
    let (admitted, levels) = limiter.admit(&name, &call, Instant::now());
    let mut response = match admitted {
        Ok(permit) => hold(next.run(request).await, permit),
        Err(refusal) => refused(refusal).into_response(),
    };
    tell(levels, response.headers_mut());
    response
}

fn refused(refusal: Refusal) -> ApiError {
    let Refusal {
        limit,
        most,
        retry_after,
    } = refusal;
    let what = match limit {
        Limit::Requests => "requests a minute",
        Limit::Tokens => "tokens a minute",
        Limit::Concurrency => "requests at once",
    };
    let seconds = retry_after.map_or(1, |wait| wait.as_secs_f64().ceil() as u32);
    ApiError {
        retry_after_s: Some(seconds.max(1)),
        ..ApiError::busy(
            "rate_limit_exceeded",
            format!("this API key may use {most} {what} on this replica"),
        )
    }
}

fn tell(levels: Levels, headers: &mut HeaderMap) {
    let Levels { requests, tokens } = levels;
    let mut put = |name: &'static str, value: String| {
        if let Ok(value) = HeaderValue::try_from(value) {
            headers.insert(HeaderName::from_static(name), value);
        }
    };
    if let Some(Level {
        limit,
        remaining,
        reset,
    }) = requests
    {
        put("x-ratelimit-limit-requests", limit.to_string());
        put("x-ratelimit-remaining-requests", remaining.to_string());
        put("x-ratelimit-reset-requests", duration(reset));
    }
    if let Some(Level {
        limit,
        remaining,
        reset,
    }) = tokens
    {
        put("x-ratelimit-limit-tokens", limit.to_string());
        put("x-ratelimit-remaining-tokens", remaining.to_string());
        put("x-ratelimit-reset-tokens", duration(reset));
    }
}

/// As OpenAI writes it: `12ms`, `1s`, `6m0s`.
fn duration(duration: Duration) -> String {
    let seconds = duration.as_secs_f64().ceil() as u64;
    match duration.as_secs() {
        0 => format!("{}ms", duration.as_micros().div_ceil(1000)),
        _ if seconds < 60 => format!("{seconds}s"),
        _ if seconds < 3600 => format!("{}m{}s", seconds / 60, seconds % 60),
        _ => format!("{}h{}m{}s", seconds / 3600, seconds / 60 % 60, seconds % 60),
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU32;

    use super::*;

    #[test]
    fn durations_are_written_as_openai_does() {
        for (ms, want) in [
            (0, "0ms"),
            (12, "12ms"),
            (1_000, "1s"),
            (1_200, "2s"),
            (59_500, "1m0s"),
            (360_000, "6m0s"),
            (3_661_000, "1h1m1s"),
        ] {
            assert_eq!(duration(Duration::from_millis(ms)), want);
        }
    }

    #[test]
    fn keys_are_limited_apart_and_forgotten_when_unused() {
        let limiter = Arc::new(Limiter::new(KeyLimits {
            requests_per_minute: NonZeroU32::new(60),
            max_concurrent_requests: NonZeroU32::new(1),
            ..KeyLimits::default()
        }));
        let now = Instant::now();
        let (a, b) = (Arc::from("a"), Arc::from("b"));
        let ask = |name, after| {
            let now = now + Duration::from_secs(after);
            limiter.admit(name, &Call::default(), now).0
        };
        let running = ask(&a, 0).ok();
        assert!(running.is_some() && ask(&a, 0).is_err());
        assert!(ask(&b, 0).is_ok(), "another key");
        drop(running);
        assert!(ask(&a, 0).is_ok(), "the permit's drop ended it");
        assert_eq!(limiter.keys().len(), 2);
        assert!(ask(&Arc::from("c"), 100).is_ok());
        assert_eq!(limiter.keys().len(), 1, "what is full again is forgotten");
    }
}
