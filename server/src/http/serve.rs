//! Connections: a loop of our own over hyper, for the limits that a public port needs, and the drain.
//!
//! Connections beyond the limit are still answered, but only probes get more than a 503, so that a crowd can't make
//! the kubelet kill the server. It knows phases and sockets, no routes.

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use axum::Extension;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};

use super::{App, OverLimit, Phase, router};

/// Connections beyond the limit, for probes. Even more are closed at once.
const RESERVE: usize = 64;

/// Accepts connections until the app is closing, then lets answers under way finish for at most `drain`. Returns how
/// many connections were cut.
pub async fn serve(listener: TcpListener, app: Arc<App>, drain: Duration) -> usize {
    let most = app.limits.max_connections + RESERVE;
    let open = Arc::new(Semaphore::new(most));
    let routes = router(Arc::clone(&app));
    let for_probes = routes.clone().layer(Extension(OverLimit));
    let mut phase = app.phase();
    loop {
        let stream = tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => stream,
                Err(error) => {
                    // Out of file descriptors, or a connection that was reset in the queue: others go on.
                    tracing::warn!(%error, "a connection could not be accepted");
                    tokio::time::sleep(Duration::from_millis(20)).await;
                    continue;
                }
            },
            _ = closing(&mut phase) => break,
        };
        let Ok(permit) = Arc::clone(&open).try_acquire_owned() else {
            continue;
        };
        let routes = if open.available_permits() < RESERVE {
            &for_probes
        } else {
            &routes
        };
        let connection = connection(stream, routes.clone(), app.limits.read_timeout, app.phase());
        tokio::spawn(async move {
            connection.await;
            drop(permit);
        });
    }
    drop(listener);
    let all_closed = open.acquire_many(u32::try_from(most).unwrap_or(u32::MAX));
    let _ = tokio::time::timeout(drain, all_closed).await;
    most - open.available_permits()
}

async fn connection(
    stream: TcpStream,
    routes: axum::Router,
    timeout: Duration,
    mut phase: watch::Receiver<Phase>,
) {
    // Small pieces of a stream go out at once.
    let _ = stream.set_nodelay(true);
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(timeout)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(routes));
    let mut connection = pin!(connection);
    tokio::select! {
        result = connection.as_mut() => return log(result),
        () = closing(&mut phase) => connection.as_mut().graceful_shutdown(),
    }
    log(connection.await);
}

fn log(result: Result<(), hyper::Error>) {
    if let Err(error) = result {
        tracing::debug!(error = &error as &dyn std::error::Error, "connection ended");
    }
}

async fn closing(phase: &mut watch::Receiver<Phase>) {
    // An error means that the app is gone, which is an end too.
    let _ = phase.wait_for(|phase| *phase == Phase::Closing).await;
}
