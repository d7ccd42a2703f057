//! A few threads for the work on whole texts: tokenizing and rendering take time in proportion to the prompt, and
//! an async thread must not. The queue is bounded: callers wait for room. It knows nothing of the work itself.

use std::num::NonZeroUsize;
use std::sync::{Arc, Mutex};

use tokio::sync::{mpsc, oneshot};

use super::TextError;

type Job = Box<dyn FnOnce() + Send>;

/// The threads end when the last clone is dropped.
#[derive(Clone, Debug)]
pub struct TextPool(mpsc::Sender<Job>);

impl TextPool {
    /// Starts `n_threads`, with room for `capacity` jobs that wait.
    pub fn start(n_threads: NonZeroUsize, capacity: NonZeroUsize) -> std::io::Result<Self> {
        let (sender, receiver) = mpsc::channel::<Job>(capacity.get());
        let receiver = Arc::new(Mutex::new(receiver));
        for i in 0..n_threads.get() {
            let receiver = Arc::clone(&receiver);
            std::thread::Builder::new()
                .name(format!("text-{i}"))
                .spawn(move || {
                    // One thread waits inside the lock, the others for it; a job runs outside.
                    while let Some(job) = next(&receiver) {
                        job();
                    }
                })?;
        }
        Ok(Self(sender))
    }

    /// Runs `work` on one of the threads. Where the caller has left by the time its turn comes, it isn't run.
    pub async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, TextError> {
        let (done, result) = oneshot::channel();
        let job = Box::new(move || {
            if !done.is_closed() {
                let _ = done.send(work());
            }
        });
        self.0.send(job).await.map_err(|_| TextError::Stopped)?;
        result.await.map_err(|_| TextError::Stopped)
    }
}

fn next(receiver: &Mutex<mpsc::Receiver<Job>>) -> Option<Job> {
    // A lock is poisoned only by a panic inside `blocking_recv`, which has none.
    receiver.lock().ok()?.blocking_recv()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn all_work_is_done_through_few_threads() {
        let one = NonZeroUsize::MIN;
        let pool = TextPool::start(NonZeroUsize::new(2).unwrap(), one).unwrap();
        let results = futures::future::join_all((0..100).map(|i| pool.run(move || i * i))).await;
        let results: Vec<i32> = results.into_iter().map(Result::unwrap).collect();
        assert_eq!(results, (0..100).map(|i| i * i).collect::<Vec<i32>>());
    }

    #[tokio::test]
    async fn work_of_a_caller_that_left_is_not_run() {
        let pool = TextPool::start(NonZeroUsize::MIN, NonZeroUsize::MIN).unwrap();
        let (go, wait) = std::sync::mpsc::channel::<()>();
        let (ran, mut was_run) = mpsc::channel::<()>(1);
        let blocker = pool.run(move || wait.recv().is_ok());
        futures::pin_mut!(blocker);
        assert!(futures::poll!(blocker.as_mut()).is_pending());
        {
            // Queued behind the blocker (or waiting for room), then given up.
            let left = pool.run(move || ran.try_send(()));
            futures::pin_mut!(left);
            assert!(futures::poll!(left.as_mut()).is_pending());
        }
        go.send(()).unwrap();
        assert!(blocker.await.unwrap());
        pool.run(|| ()).await.unwrap();
        assert!(
            was_run.recv().await.is_none(),
            "its channel was dropped unused"
        );
    }
}
