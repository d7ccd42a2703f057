//! Connections: a loop of our own over hyper, for the limits that a public port needs, and the drain.
//!
//! A few connections beyond the limit are still answered, marked with [`OverLimit`], so that the routes can refuse
//! them in words; even more are closed at once. It knows sockets and phases, no routes and no model.

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use axum::Extension;
use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::Response;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use rustix::net::sockopt::set_socket_send_buffer_size;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;

use super::hold::hold;
use super::write_timeout::WriteTimeout;

/// Connections beyond the limit that get an answer. Even more are closed at once.
const RESERVE: usize = 64;

/// A connection that is to close still waits so long for a request. A client whose answer began before SIGTERM was not
/// told to leave, and may send its next request the moment that the answer ends: closed then, it would lose that one.
const LINGER: Duration = Duration::from_secs(1);

/// A client that keeps the server waiting for so long in all is gone: its connection is closed, and what it runs ends.
/// Long enough for any hiccup of a network; a client that takes its time takes something meanwhile.
const WRITE_TIMEOUT: Duration = Duration::from_secs(60);

/// Bytes that one connection may buffer on each side, beyond a single frame; and again in the kernel, which would hold
/// megabytes for a client that doesn't read.
const MAX_BUFFER_BYTES: usize = 64 << 10;

/// Where a server stands. It only ever moves forward.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// It has nothing to serve yet: probes are answered, requests are not.
    Loading,
    /// Everything is answered.
    Ready,
    /// Told to stop: `/ready` says so, and requests are still accepted, because who sends them learns it late.
    Draining,
    /// No more connections; answers under way are finished, and so is one more request of a client that was not told
    /// to leave, because its answer had begun before.
    Closing,
}

/// The certificate that new connections get.
pub type Tls = watch::Receiver<Arc<ServerConfig>>;

/// What connections come from, and how they speak.
#[derive(Debug)]
pub struct Listener {
    /// Accepts them.
    pub tcp: TcpListener,
    /// `None`: in plain text.
    pub tls: Option<Tls>,
}

impl From<TcpListener> for Listener {
    fn from(tcp: TcpListener) -> Self {
        Self { tcp, tls: None }
    }
}

/// Marks requests of connections beyond the limit.
#[derive(Clone, Copy, Debug)]
pub struct OverLimit;

/// What one port may cost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PortLimits {
    /// Connections served at once.
    pub max_connections: usize,
    /// Time for the head of a request.
    pub read_timeout: Duration,
}

/// Accepts connections until the phase is [`Phase::Closing`], then lets answers under way finish for at most `drain`.
/// Returns how many connections were cut.
pub async fn serve(
    listener: impl Into<Listener>,
    routes: axum::Router,
    limits: PortLimits,
    mut phase: watch::Receiver<Phase>,
    drain: Duration,
) -> usize {
    let Listener { tcp: listener, tls } = listener.into();
    let most = limits.max_connections + RESERVE;
    let open = Arc::new(Semaphore::new(most));
    let over_limit = routes.clone().layer(Extension(OverLimit));
    let timeouts = Timeouts {
        read: limits.read_timeout,
        write: WRITE_TIMEOUT,
    };
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
        let routes = match open.available_permits() < RESERVE {
            true => &over_limit,
            false => &routes,
        };
        let tls = tls
            .as_ref()
            .map(|tls| TlsAcceptor::from(Arc::clone(&tls.borrow())));
        let connection = connection(stream, tls, routes.clone(), timeouts, phase.clone());
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

/// How long a client may keep its connection waiting.
#[derive(Clone, Copy, Debug)]
struct Timeouts {
    /// For the head of a request.
    read: Duration,
    /// For the next byte of an answer.
    write: Duration,
}

async fn connection(
    stream: TcpStream,
    tls: Option<TlsAcceptor>,
    routes: axum::Router,
    timeouts: Timeouts,
    mut phase: watch::Receiver<Phase>,
) {
    // Small pieces of a stream go out at once.
    let _ = stream.set_nodelay(true);
    let _ = set_socket_send_buffer_size(&stream, MAX_BUFFER_BYTES);
    let stream = WriteTimeout::new(stream, timeouts.write);
    let Some(tls) = tls else {
        return requests(stream, routes, timeouts.read, phase).await;
    };
    let leaving = async {
        closing(&mut phase).await;
        tokio::time::sleep(LINGER).await;
    };
    let accepted = tokio::select! {
        accepted = tokio::time::timeout(timeouts.read, tls.accept(stream)) => accepted,
        () = leaving => return,
    };
    match accepted {
        Ok(Ok(stream)) => requests(stream, routes, timeouts.read, phase).await,
        Ok(Err(error)) => tracing::debug!(%error, "no TLS connection"),
        Err(_) => tracing::debug!("no TLS connection in time"),
    }
}

/// Serves the requests of one connection.
async fn requests(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    routes: axum::Router,
    read_timeout: Duration,
    mut phase: watch::Receiver<Phase>,
) {
    let under_way = Arc::new(watch::Sender::new(0));
    let mut answers = under_way.subscribe();
    let routes = routes.layer(axum::middleware::from_fn_with_state(under_way, count));
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(read_timeout)
        .max_buf_size(MAX_BUFFER_BYTES)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(routes));
    let mut connection = pin!(connection);
    let leaving = async {
        closing(&mut phase).await;
        idle(&mut answers).await;
    };
    tokio::select! {
        result = connection.as_mut() => return log(result),
        () = leaving => connection.as_mut().graceful_shutdown(),
    }
    log(connection.await);
}

/// Middleware: counts a request from its head to the end of its answer's body.
async fn count(
    State(under_way): State<Arc<watch::Sender<usize>>>,
    request: Request,
    next: Next,
) -> Response {
    let counted = Counted::new(under_way);
    hold(next.run(request).await, counted)
}

struct Counted(Arc<watch::Sender<usize>>);

impl Counted {
    fn new(under_way: Arc<watch::Sender<usize>>) -> Self {
        under_way.send_modify(|n| *n += 1);
        Self(under_way)
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.send_modify(|n| *n -= 1);
    }
}

/// Waits until no answer has been under way for [`LINGER`].
async fn idle(answers: &mut watch::Receiver<usize>) {
    loop {
        // An error means that the connection is gone: there is nothing to wait for.
        let _ = answers.wait_for(|n| *n == 0).await;
        let next = answers.wait_for(|n| *n > 0);
        if !matches!(tokio::time::timeout(LINGER, next).await, Ok(Ok(_))) {
            return;
        }
    }
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

#[cfg(test)]
mod tests {
    use std::convert::Infallible;
    use std::io::{Read, Write};
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicU64, Ordering};

    use axum::body::{Body, Bytes};
    use axum::routing::get;
    use tokio::sync::oneshot;

    use super::*;

    /// Nothing that is waited for takes this long on any machine.
    const LONG: Duration = Duration::from_secs(60);

    #[tokio::test(flavor = "multi_thread")]
    async fn a_client_that_was_not_told_to_leave_is_answered_once_more() {
        let (finish, finished) = oneshot::channel::<()>();
        let finished = Arc::new(Mutex::new(Some(finished)));
        let slow = move || {
            let finished = finished.lock().unwrap().take();
            let end = async move {
                if let Some(finished) = finished {
                    let _ = finished.await;
                }
                Ok::<_, Infallible>(Bytes::from_static(b"end"))
            };
            std::future::ready(Body::from_stream(futures::stream::once(end)))
        };
        let routes = axum::Router::new().route("/", get(slow));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut client = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        client.set_read_timeout(Some(LONG)).unwrap();
        let (stream, _) = listener.accept().await.unwrap();
        let timeouts = Timeouts {
            read: LONG,
            write: LONG,
        };
        let (phase, phases) = watch::channel(Phase::Ready);
        let served = tokio::spawn(connection(stream, None, routes, timeouts, phases));
        let ask = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n";
        let read = |mut client: &std::net::TcpStream| {
            let (mut answer, mut byte) = (Vec::new(), [0]);
            while !answer.ends_with(b"0\r\n\r\n") {
                client.read_exact(&mut byte).unwrap();
                answer.push(byte[0]);
            }
        };

        // The head of the first answer is out before the phase changes, and its end comes after.
        client.write_all(ask).unwrap();
        let mut head = [0; 12];
        client.read_exact(&mut head).unwrap();
        assert_eq!(&head, b"HTTP/1.1 200");
        phase.send_replace(Phase::Closing);
        finish.send(()).unwrap();
        read(&client);
        client.write_all(ask).unwrap();
        read(&client);
        // Then nobody asks, and the connection ends.
        tokio::time::timeout(LONG, served).await.unwrap().unwrap();
        assert_eq!(client.read(&mut [0]).unwrap(), 0);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_client_that_never_reads_is_gone_after_a_while() {
        // An answer that never ends, and whose drop, which frees the blocks of a real one, can be waited for.
        let (held, dropped) = oneshot::channel::<()>();
        let n_bytes = Arc::new(AtomicU64::new(0));
        let state = Arc::new(Mutex::new(Some((held, Arc::clone(&n_bytes)))));
        let answer = move || {
            let state = state.lock().unwrap().take().expect("it is asked once");
            let pieces = futures::stream::unfold(state, |(held, n_bytes)| async move {
                n_bytes.fetch_add(1 << 14, Ordering::Relaxed);
                let piece = Bytes::from_static(&[b'x'; 1 << 14]);
                Some((Ok::<_, Infallible>(piece), (held, n_bytes)))
            });
            std::future::ready(Body::from_stream(pieces))
        };
        let routes = axum::Router::new().route("/", get(answer));

        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut client = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        client.set_read_timeout(Some(LONG)).unwrap();
        client
            .write_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
            .unwrap();
        let (stream, _) = listener.accept().await.unwrap();
        let timeouts = Timeouts {
            read: LONG,
            write: Duration::from_millis(200),
        };
        let (_phase, phases) = watch::channel(Phase::Ready);
        let served = tokio::spawn(connection(stream, None, routes, timeouts, phases));

        let ended = tokio::time::timeout(LONG, dropped).await;
        assert!(
            ended.is_ok_and(|nothing_sent| nothing_sent.is_err()),
            "the answer is dropped while its client is connected"
        );
        tokio::time::timeout(LONG, served).await.unwrap().unwrap();
        // The client may still read what was sent; it sees that this is not the whole.
        let mut rest = Vec::new();
        let _ = client.read_to_end(&mut rest);
        assert!(!rest.ends_with(b"0\r\n\r\n"));
        assert!(n_bytes.load(Ordering::Relaxed) > rest.len() as u64);
    }
}
