//! A connection whose writes fail when the other side takes too little for too long.
//!
//! hyper waits for its socket as long as it takes, and a client that keeps its connection and hardly reads would hold
//! its answer, and the KV blocks behind it, for ever. It knows bytes and time, no HTTP.

use std::future::Future;
use std::io::{Error, ErrorKind, IoSlice, Result};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Sleep, sleep};

/// A client that keeps the server waiting must take so much on average; people read some 20 bytes a second, but their
/// clients take what has come.
const MIN_BYTES_PER_SECOND: u32 = 512;

/// Reads and writes as `S` does. A client may keep it waiting for `limit` in all, and for as long again as what it
/// takes lasts at [`MIN_BYTES_PER_SECOND`]; then a write is an error.
#[derive(Debug)]
pub(super) struct WriteTimeout<S> {
    stream: S,
    limit: Duration,
    /// What is left of the time; never more than `limit`.
    patience: Duration,
    /// Since when the socket takes nothing, and the end of the patience.
    stalled: Option<(Instant, Pin<Box<Sleep>>)>,
}

impl<S: AsyncWrite + Unpin> WriteTimeout<S> {
    pub(super) fn new(stream: S, limit: Duration) -> Self {
        Self {
            stream,
            limit,
            patience: limit,
            stalled: None,
        }
    }

    fn poll(
        &mut self,
        cx: &mut Context<'_>,
        write: impl FnOnce(Pin<&mut S>, &mut Context<'_>) -> Poll<Result<usize>>,
    ) -> Poll<Result<usize>> {
        if let Poll::Ready(result) = write(Pin::new(&mut self.stream), cx) {
            if let Ok(n_bytes) = &result {
                self.taken(*n_bytes);
            }
            return Poll::Ready(result);
        }
        let patience = self.patience;
        let (_, end) = self
            .stalled
            .get_or_insert_with(|| (Instant::now(), Box::pin(sleep(patience))));
        ready!(end.as_mut().poll(cx));
        let message = format!(
            "the client took less than {MIN_BYTES_PER_SECOND} bytes a second and kept the server waiting for {} s",
            self.limit.as_secs_f32()
        );
        Poll::Ready(Err(Error::new(ErrorKind::TimedOut, message)))
    }

    fn taken(&mut self, n_bytes: usize) {
        if let Some((since, _)) = self.stalled.take() {
            self.patience = self.patience.saturating_sub(since.elapsed());
        }
        let n_bytes = u32::try_from(n_bytes).unwrap_or(u32::MAX);
        let earned = Duration::from_secs(1) * n_bytes / MIN_BYTES_PER_SECOND;
        self.patience = self.limit.min(self.patience + earned);
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for WriteTimeout<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for WriteTimeout<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<Result<usize>> {
        self.poll(cx, |stream, cx| stream.poll_write(cx, bytes))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<Result<usize>> {
        self.poll(cx, |stream, cx| stream.poll_write_vectored(cx, slices))
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    /// A socket has nothing of its own to flush, so that this says nothing of what the client took.
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;
    use std::time::Instant;

    use super::*;

    /// Takes so many bytes more, and then none. It wakes nobody: the tests poll.
    struct Room(usize);

    impl AsyncWrite for Room {
        fn poll_write(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
            bytes: &[u8],
        ) -> Poll<Result<usize>> {
            let n = self.0.min(bytes.len());
            self.0 -= n;
            if n == 0 {
                Poll::Pending
            } else {
                Poll::Ready(Ok(n))
            }
        }

        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Result<()>> {
            Poll::Ready(Ok(()))
        }

        fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Result<()>> {
            Poll::Ready(Ok(()))
        }
    }

    #[tokio::test]
    async fn a_write_that_gets_nowhere_fails_at_the_limit() {
        let limit = Duration::from_millis(20);
        let mut writer = WriteTimeout::new(Room(3), limit);
        let start = Instant::now();
        let mut write =
            async |n: usize| poll_fn(|cx| Pin::new(&mut writer).poll_write(cx, &vec![7; n])).await;
        assert_eq!(write(5).await.unwrap(), 3);
        assert_eq!(write(2).await.unwrap_err().kind(), ErrorKind::TimedOut);
        assert!(start.elapsed() >= limit);
    }

    #[tokio::test]
    async fn a_byte_now_and_then_does_not_keep_a_connection() {
        let limit = Duration::from_millis(50);
        let mut writer = WriteTimeout::new(Room(0), limit);
        let start = Instant::now();
        let mut n_taken = 0;
        // It takes one byte each time that the server has waited for a while.
        let ended = loop {
            let write = poll_fn(|cx| Pin::new(&mut writer).poll_write(cx, &[7; 5]));
            match tokio::time::timeout(limit / 5, write).await {
                Ok(result) => break result,
                Err(_) => {
                    writer.stream.0 = 1;
                    let byte = poll_fn(|cx| Pin::new(&mut writer).poll_write(cx, &[7; 5])).await;
                    assert_eq!(byte.unwrap(), 1);
                    n_taken += 1;
                }
            }
            assert!(start.elapsed() < Duration::from_secs(60), "it is given up");
        };
        assert_eq!(ended.unwrap_err().kind(), ErrorKind::TimedOut);
        assert!(n_taken > 0, "it took some");
    }

    #[tokio::test]
    async fn what_is_taken_earns_time_and_a_flush_does_not() {
        let limit = Duration::from_secs(3600);
        let mut writer = WriteTimeout::new(Room(0), limit);
        poll_fn(|cx| {
            let write = |writer: &mut WriteTimeout<Room>, cx: &mut Context<'_>| {
                Pin::new(writer).poll_write(cx, &[7; 512])
            };
            assert!(write(&mut writer, cx).is_pending());
            assert!(writer.stalled.is_some(), "the time runs");
            assert!(Pin::new(&mut writer).poll_flush(cx).is_ready());
            assert!(writer.stalled.is_some(), "a flush is no progress");
            writer.patience = Duration::from_secs(10);
            writer.stream.0 = 512;
            assert!(matches!(write(&mut writer, cx), Poll::Ready(Ok(512))));
            assert!(writer.stalled.is_none(), "it took something");
            let seconds = writer.patience.as_secs_f64();
            assert!(seconds > 10.0 && seconds <= 11.0, "{seconds}");
            writer.stream.0 = usize::MAX;
            for _ in 0..4000 {
                assert!(write(&mut writer, cx).is_ready());
            }
            assert_eq!(writer.patience, limit, "no more than at first");
            Poll::Ready(())
        })
        .await;
    }
}
