//! How a server ends: answers are finished, the engine stops, and its device is gone before the process is. A device's
//! libraries take themselves down when a process ends, and crash where a thread still uses them.
//!
//! It knows the order of these steps; signals and exit codes are the caller's.

use std::panic::resume_unwind;
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use crate::engine::{Engine, EngineError};
use crate::frontend::AsyncEngine;
use crate::http::App;
use crate::http::serve::Phase;

/// The step under way when the engine is told to stop has so long. Kubernetes kills a pod so long after its drain.
const STOP_TIMEOUT: Duration = Duration::from_secs(10);

/// When the engine has failed, clients have so long to take its last words.
const LAST_WORDS_TIMEOUT: Duration = Duration::from_secs(5);

/// Why a server ended other than by a drain.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The engine failed.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// It ended without having been told to.
    #[error("the engine ended")]
    EngineEnded,
    /// Its device hangs.
    #[error("the engine did not stop within {} s", STOP_TIMEOUT.as_secs())]
    EngineHangs,
}

/// Waits until `server`, the task of [`serve`](crate::http::serve::serve), has drained, or the engine has failed; then
/// takes everything down. When it returns, the engine's thread has ended and dropped its device.
pub async fn until_stopped(
    app: &App,
    mut server: JoinHandle<usize>,
    engine: Engine,
    async_engine: AsyncEngine,
) -> Result<(), ServeError> {
    let handle = engine.handle();
    let mut ended = join(engine);
    let failure = tokio::select! {
        cut = &mut server => {
            let cut = cut.unwrap_or(0);
            if cut > 0 {
                tracing::warn!(connections = cut, "the drain's time is over, connections were cut");
            }
            handle.stop();
            return stopped(ended).await;
        }
        result = &mut ended => match result {
            Ok(Err(error)) => ServeError::Engine(error),
            Ok(Ok(())) | Err(_) => ServeError::EngineEnded,
        },
    };
    // Each request's last event is with its stream once the output thread has ended; then connections are closed as
    // in a drain, after their answers.
    let _ = tokio::task::spawn_blocking(move || async_engine.join()).await;
    app.advance(Phase::Closing);
    if tokio::time::timeout(LAST_WORDS_TIMEOUT, server)
        .await
        .is_err()
    {
        tracing::warn!("clients did not take the last of their answers in time");
    }
    Err(failure)
}

/// Stops an engine that serves nobody yet.
pub async fn stop(engine: Engine) -> Result<(), ServeError> {
    engine.handle().stop();
    stopped(join(engine)).await
}

/// Runs `load` on a thread of its own. It gets a function to call now and then, which leaves by unwinding when the
/// server is told to stop, so that what was loaded is dropped in order. `None`: it was. `Err`: there is no thread, or it
/// panicked.
pub async fn load_unless_stopped<T: Send + 'static>(
    app: &App,
    load: impl FnOnce(&dyn Fn()) -> T + Send + 'static,
) -> std::io::Result<Option<T>> {
    let (done, loaded) = oneshot::channel();
    let phase = app.phase();
    let thread = std::thread::Builder::new()
        .name("load".to_owned())
        .spawn(move || {
            let check = || {
                if *phase.borrow() >= Phase::Draining {
                    resume_unwind(Box::new(Stopped));
                }
            };
            let _ = done.send(load(&check));
        })?;
    let loaded = loaded.await.ok();
    match tokio::task::spawn_blocking(move || thread.join()).await {
        Ok(Err(panic)) if !panic.is::<Stopped>() => Err(std::io::Error::other(
            "it panicked; the panic's message is on standard error",
        )),
        _ => Ok(loaded),
    }
}

/// What a load that was told to stop unwinds with.
struct Stopped;

fn join(engine: Engine) -> oneshot::Receiver<Result<(), EngineError>> {
    let (done, ended) = oneshot::channel();
    std::thread::spawn(move || done.send(engine.join()));
    ended
}

async fn stopped(ended: oneshot::Receiver<Result<(), EngineError>>) -> Result<(), ServeError> {
    match tokio::time::timeout(STOP_TIMEOUT, ended).await {
        Ok(Ok(result)) => Ok(result?),
        Ok(Err(_)) => Err(ServeError::EngineEnded),
        Err(_) => Err(ServeError::EngineHangs),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::http::Limits;
    use crate::http::access::Access;
    use crate::metrics::Metrics;

    fn app() -> Arc<App> {
        let limits = Limits {
            max_body_bytes: 1,
            read_timeout: Duration::ZERO,
            heartbeat_timeout: Duration::ZERO,
        };
        let metrics = Arc::new(Metrics::new("m").unwrap());
        App::new(metrics, limits, Access::default())
    }

    #[tokio::test]
    async fn a_load_that_is_told_to_stop_drops_what_it_has() {
        let app = app();
        let (held, mut dropped) = oneshot::channel::<()>();
        let load = load_unless_stopped(&app, move |check: &dyn Fn()| -> u32 {
            let _held = held;
            loop {
                check();
                std::thread::yield_now();
            }
        });
        futures::pin_mut!(load);
        assert!(futures::poll!(load.as_mut()).is_pending());
        app.advance(Phase::Draining);
        assert_eq!(load.await.unwrap(), None);
        assert!(matches!(
            dropped.try_recv(),
            Err(oneshot::error::TryRecvError::Closed)
        ));
    }

    #[tokio::test]
    async fn a_load_that_panics_is_an_error() {
        let app = app();
        let loaded = load_unless_stopped(&app, |_| -> u32 { panic!("a broken invariant") });
        let error = loaded.await.unwrap_err().to_string();
        assert!(error.starts_with("it panicked"), "{error}");
    }

    #[tokio::test]
    async fn a_load_that_ends_is_given_out() {
        let app = app();
        let loaded = load_unless_stopped(&app, |check| {
            check();
            7
        });
        assert_eq!(loaded.await.unwrap(), Some(7));
    }
}
