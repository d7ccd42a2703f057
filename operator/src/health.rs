//! Whether the operator moves: what `/healthz` answers. It fails where the watches don't begin or are not renewed, and where
//! a deployment isn't looked at when it should be; the kubelet then starts the operator anew.
//!
//! It owns no clock: the time is handed in by the parts that report, through [`Health::now`].

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use axum::http::{Request, Response};
use tokio::time::Instant;

use crate::key::Key;

/// The API server ends a watch after this long, and it is begun again: so each tells once a minute that it moves.
pub const WATCH_SECONDS: u32 = 60;

/// How much later than it should something may come: the deadlines of a look's requests together, on a busy machine.
const GRACE: Duration = Duration::from_secs(120);

/// What was seen to move.
#[derive(Debug)]
pub struct Health {
    started: Instant,
    moves: Mutex<Moves>,
}

#[derive(Debug, Default)]
struct Moves {
    /// When the controller began; `None` while another operator acts.
    began: Option<Duration>,
    /// When each watch was begun last, by its path.
    watches: HashMap<String, Duration>,
    /// When each deployment is to be looked at next.
    due: HashMap<Key, Duration>,
}

impl Default for Health {
    fn default() -> Self {
        Self {
            started: Instant::now(),
            moves: Mutex::default(),
        }
    }
}

impl Health {
    /// The time, for [`Health::check`].
    #[must_use]
    pub fn now(&self) -> Duration {
        self.started.elapsed()
    }

    /// The controller begins.
    pub fn begins(&self) {
        *self.lock() = Moves {
            began: Some(self.now()),
            ..Moves::default()
        };
    }

    /// The controller ended: another operator acts.
    pub fn ends(&self) {
        *self.lock() = Moves::default();
    }

    /// A deployment was looked at, and will be again after this long; never where it is gone.
    pub fn looked_at(&self, deployment: &Key, again: Option<Duration>) {
        let now = self.now();
        let mut moves = self.lock();
        match again {
            Some(again) => moves.due.insert(deployment.clone(), now + again),
            None => moves.due.remove(deployment),
        };
    }

    /// A deployment is gone.
    pub fn forget(&self, deployment: &Key) {
        self.lock().due.remove(deployment);
    }

    /// The API server has answered a request: where that began a watch, the watch moves.
    pub fn answered<B>(&self, path: &str, query: Option<&str>, response: &Response<B>) {
        let is_watch = query.is_some_and(|query| query.split('&').any(|pair| pair == "watch=true"));
        if is_watch && response.status().is_success() {
            let now = self.now();
            self.lock().watches.insert(path.to_owned(), now);
        }
    }

    /// What a request asks for, for [`Health::answered`].
    pub fn asked<B>(request: &Request<B>) -> (String, Option<String>) {
        let uri = request.uri();
        (uri.path().to_owned(), uri.query().map(ToOwned::to_owned))
    }

    /// Whether everything moves.
    ///
    /// # Errors
    /// One sentence that says what doesn't.
    pub fn check(&self, now: Duration) -> Result<(), String> {
        let moves = self.lock();
        let Some(began) = moves.began else {
            return Ok(());
        };
        if moves.watches.is_empty() && now.saturating_sub(began) > GRACE {
            let seconds = now.saturating_sub(began).as_secs();
            return Err(format!("no watch has begun in {seconds} s"));
        }
        let renewal = Duration::from_secs(WATCH_SECONDS.into()) + GRACE;
        for (path, at) in &moves.watches {
            let age = now.saturating_sub(*at);
            if age > renewal {
                return Err(format!(
                    "the watch {path} was begun {} s ago, and not since",
                    age.as_secs()
                ));
            }
        }
        for ((namespace, name), due) in &moves.due {
            let late = now.saturating_sub(*due);
            if late > GRACE {
                let seconds = late.as_secs();
                return Err(format!(
                    "{namespace}/{name} was to be looked at {seconds} s ago"
                ));
            }
        }
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Moves> {
        self.moves.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(health: &Health, path: &str, query: &str, status: u16) {
        let response = Response::builder().status(status).body(()).unwrap();
        health.answered(path, Some(query), &response);
    }

    #[tokio::test(start_paused = true)]
    async fn fails_where_watches_or_looks_do_not_move() {
        let pass = async |seconds| tokio::time::advance(Duration::from_secs(seconds)).await;
        let health = Health::default();
        let said = || health.check(health.now()).err().unwrap_or_default();
        let key = ("n".into(), "m".into());
        pass(1000).await;
        assert_eq!(said(), "", "another one acts");
        health.begins();
        assert_eq!(said(), "", "it has just begun");
        answer(&health, "/apis/x", "watch=true", 403);
        answer(&health, "/apis/x", "limit=500", 200);
        pass(121).await;
        assert_eq!(said(), "no watch has begun in 121 s");

        for _ in 0..10 {
            answer(&health, "/apis/x", "timeoutSeconds=60&watch=true", 200);
            health.looked_at(&key, Some(Duration::from_secs(2)));
            pass(60).await;
            assert_eq!(said(), "");
        }
        pass(63).await;
        assert_eq!(said(), "n/m was to be looked at 121 s ago");
        health.looked_at(&key, Some(Duration::from_secs(300)));
        assert_eq!(said(), "", "seldom, as it should be");
        pass(58).await;
        assert_eq!(
            said(),
            "the watch /apis/x was begun 181 s ago, and not since"
        );
        answer(&health, "/apis/x", "watch=true", 200);
        assert_eq!(said(), "");
        pass(180).await;
        answer(&health, "/apis/x", "watch=true", 200);
        pass(183).await;
        answer(&health, "/apis/x", "watch=true", 200);
        assert_ne!(said(), "");
        health.forget(&key);
        assert_eq!(said(), "", "it is gone");
        pass(1000).await;
        assert_ne!(said(), "");
        health.ends();
        assert_eq!(said(), "");
    }
}
