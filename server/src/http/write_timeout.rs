//! A connection whose writes fail when the other side takes nothing for too long.
//!
//! hyper waits for its socket as long as it takes, and a client that keeps its connection and never reads would hold
//! its answer, and the KV blocks behind it, for ever. It knows bytes and time, no HTTP.

use std::future::Future;
use std::io::{Error, ErrorKind, IoSlice, Result};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Sleep, sleep};

/// Reads and writes as `S` does; a write that could make no progress for `limit` is an error.
#[derive(Debug)]
pub(super) struct WriteTimeout<S> {
    stream: S,
    limit: Duration,
    /// Runs while the socket takes nothing.
    stalled: Option<Pin<Box<Sleep>>>,
}

impl<S: AsyncWrite + Unpin> WriteTimeout<S> {
    pub(super) fn new(stream: S, limit: Duration) -> Self {
        Self {
            stream,
            limit,
            stalled: None,
        }
    }

    fn poll<T>(
        &mut self,
        cx: &mut Context<'_>,
        write: impl FnOnce(Pin<&mut S>, &mut Context<'_>) -> Poll<Result<T>>,
    ) -> Poll<Result<T>> {
        if let Poll::Ready(result) = write(Pin::new(&mut self.stream), cx) {
            self.stalled = None;
            return Poll::Ready(result);
        }
        let limit = self.limit;
        let stalled = self.stalled.get_or_insert_with(|| Box::pin(sleep(limit)));
        ready!(stalled.as_mut().poll(cx));
        let message = format!("the client took nothing for {} s", limit.as_secs_f32());
        Poll::Ready(Err(Error::new(ErrorKind::TimedOut, message)))
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
    async fn only_bytes_that_are_taken_end_a_stall() {
        let mut writer = WriteTimeout::new(Room(0), Duration::from_secs(3600));
        poll_fn(|cx| {
            let write = |writer: &mut WriteTimeout<Room>, cx: &mut Context<'_>| {
                Pin::new(writer).poll_write(cx, &[7; 5])
            };
            assert!(write(&mut writer, cx).is_pending());
            assert!(writer.stalled.is_some(), "the limit runs");
            assert!(Pin::new(&mut writer).poll_flush(cx).is_ready());
            assert!(writer.stalled.is_some(), "a flush is no progress");
            writer.stream.0 = 1;
            assert!(matches!(write(&mut writer, cx), Poll::Ready(Ok(1))));
            assert!(writer.stalled.is_none(), "a byte is");
            assert!(write(&mut writer, cx).is_pending());
            assert!(writer.stalled.is_some(), "and it runs anew");
            Poll::Ready(())
        })
        .await;
    }
}
