//! Waiting for a condition of the outside world: ask, ask again, give up with what was last seen.

use crate::Error;
use std::time::{Duration, Instant};

/// One look at the world.
pub enum Seen<T> {
    /// It is so.
    Yes(T),
    /// Not yet; what stands in the way, in words.
    NotYet(String),
}

/// Looks every `interval` until the answer is yes. A look that fails counts as "not yet".
///
/// # Errors
/// [`Error::TimedOut`] with the last obstacle.
pub fn until<T>(
    what: &str,
    limit: Duration,
    interval: Duration,
    mut look: impl FnMut() -> Result<Seen<T>, Error>,
) -> Result<T, Error> {
    let start = Instant::now();
    loop {
        let last = match look() {
            Ok(Seen::Yes(value)) => return Ok(value),
            Ok(Seen::NotYet(obstacle)) => obstacle,
            Err(error) => error.to_string(),
        };
        if start.elapsed() > limit {
            return Err(Error::TimedOut {
                what: what.to_owned(),
                seconds: limit.as_secs(),
                last,
            });
        }
        std::thread::sleep(interval);
    }
}
