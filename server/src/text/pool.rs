//! A few threads for the work on whole texts: tokenizing and rendering take time and memory in proportion to the text,
//! and an async thread must not.
//!
//! Short texts have threads of their own, which no long text can take. Long ones share a single thread, the shortest
//! first, so that they take the memory of one at a time; few of them may wait. A job that panics fails alone. It knows
//! nothing of the work itself. A [`Lane`], threads with one queue, serves others too.

use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use tokio::sync::oneshot;

use super::TextError;

/// Texts above this many bytes are long. One of this size takes some 20 ms.
pub const SHORT_BYTES: usize = 64 << 10;

/// Long texts that may wait: each is seconds of work in the worst case.
const MAX_WAITING_LONG: usize = 8;

/// As threads have by default.
const STACK_BYTES: usize = 2 << 20;

/// The threads end when the last clone is dropped.
#[derive(Clone, Debug)]
pub struct TextPool {
    short: Lane,
    long: Lane,
}

impl TextPool {
    /// Starts `n_threads` for short texts and one for long ones. Callers bound how many short texts wait: each
    /// connection has one at most.
    pub fn start(n_threads: NonZeroUsize) -> std::io::Result<Self> {
        Ok(Self {
            short: Lane::new("text", n_threads, usize::MAX, STACK_BYTES)?,
            long: Lane::new(
                "long-text",
                NonZeroUsize::MIN,
                MAX_WAITING_LONG,
                STACK_BYTES,
            )?,
        })
    }

    /// Runs `work` on a text of `n_bytes` on one of the threads. Where the caller has left by the time its turn comes,
    /// it isn't run. [`TextError::Busy`] comes at once, before any work.
    pub async fn run<T: Send + 'static>(
        &self,
        n_bytes: usize,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, TextError> {
        match n_bytes <= SHORT_BYTES {
            // All alike: in the order of their arrival.
            true => self.short.run(0, work).await,
            false => self.long.run(n_bytes, work).await,
        }
    }
}

type Job = Box<dyn FnOnce() + Send>;

/// Threads with a queue of their own. They end when the last clone is dropped.
#[derive(Clone, Debug)]
pub(crate) struct Lane(Arc<Owner>);

/// Its drop ends the threads.
#[derive(Debug)]
struct Owner(Arc<Queue>);

#[derive(Debug)]
struct Queue {
    state: Mutex<State>,
    changed: Condvar,
    capacity: usize,
}

#[derive(Default)]
struct State {
    /// By rank, then by arrival: the first is next.
    waiting: BTreeMap<(usize, u64), Job>,
    n_arrived: u64,
    closed: bool,
}

impl std::fmt::Debug for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} texts wait", self.waiting.len())
    }
}

impl Lane {
    /// Threads with stacks of `stack_bytes`, for which `capacity` jobs may wait.
    pub(crate) fn new(
        name: &str,
        n_threads: NonZeroUsize,
        capacity: usize,
        stack_bytes: usize,
    ) -> std::io::Result<Self> {
        let queue = Arc::new(Queue {
            state: Mutex::default(),
            changed: Condvar::new(),
            capacity,
        });
        let lane = Self(Arc::new(Owner(Arc::clone(&queue))));
        for i in 0..n_threads.get() {
            let queue = Arc::clone(&queue);
            std::thread::Builder::new()
                .name(format!("{name}-{i}"))
                .stack_size(stack_bytes)
                .spawn(move || {
                    while let Some(job) = queue.next() {
                        job();
                    }
                })?;
        }
        Ok(lane)
    }

    /// Runs `work` on one of the threads, before work with a higher `rank`. Where the caller has left by the time its turn
    /// comes, it isn't run. [`TextError::Busy`] comes at once, before any work.
    pub(crate) async fn run<T: Send + 'static>(
        &self,
        rank: usize,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, TextError> {
        let (done, result) = oneshot::channel();
        let job = Box::new(move || {
            if !done.is_closed() {
                // What the work has of shared state is not changed by it, so that a panic leaves nothing half done.
                let result = catch_unwind(AssertUnwindSafe(work));
                let _ = done.send(result.map_err(|_| TextError::Panicked));
            }
        });
        self.push(rank, job)?;
        result.await.map_err(|_| TextError::Stopped)?
    }

    /// Runs `work` in its turn, and tells nobody.
    pub(crate) fn spawn(&self, work: impl FnOnce() + Send + 'static) {
        let job = Box::new(move || {
            let _ = catch_unwind(AssertUnwindSafe(work));
        });
        // Where the queue is full it is dropped, which is all that there is to tell.
        let _ = self.push(0, job);
    }

    fn push(&self, rank: usize, job: Job) -> Result<(), TextError> {
        let queue = &self.0.0;
        let mut state = queue.state();
        if state.waiting.len() >= queue.capacity {
            return Err(TextError::Busy {
                limit: queue.capacity,
            });
        }
        state.n_arrived += 1;
        let key = (rank, state.n_arrived);
        state.waiting.insert(key, job);
        drop(state);
        queue.changed.notify_one();
        Ok(())
    }
}

impl Queue {
    /// Waits for a job; `None` when there will be no more.
    fn next(&self) -> Option<Job> {
        let mut state = self.state();
        loop {
            if let Some((_, job)) = state.waiting.pop_first() {
                return Some(job);
            }
            if state.closed {
                return None;
            }
            let waited = self.changed.wait(state);
            state = waited.unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // No job runs under the lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        self.0.state().closed = true;
        self.0.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    const LONG_BYTES: usize = SHORT_BYTES + 1;

    fn pool() -> TextPool {
        TextPool::start(NonZeroUsize::MIN).unwrap()
    }

    #[tokio::test]
    async fn all_work_is_done_through_few_threads() {
        let pool = TextPool::start(NonZeroUsize::new(2).unwrap()).unwrap();
        let results = (0..100).map(|i| pool.run(1, move || i * i));
        let results = futures::future::join_all(results).await;
        let results: Vec<i32> = results.into_iter().map(Result::unwrap).collect();
        assert_eq!(results, (0..100).map(|i| i * i).collect::<Vec<i32>>());
    }

    #[tokio::test]
    async fn work_of_a_caller_that_left_is_not_run() {
        let pool = pool();
        let (go, wait) = mpsc::channel::<()>();
        let (ran, was_run) = mpsc::channel::<()>();
        let blocker = pool.run(1, move || wait.recv().is_ok());
        futures::pin_mut!(blocker);
        assert!(futures::poll!(blocker.as_mut()).is_pending());
        {
            // Queued behind the blocker, then given up.
            let left = pool.run(1, move || ran.send(()));
            futures::pin_mut!(left);
            assert!(futures::poll!(left.as_mut()).is_pending());
        }
        go.send(()).unwrap();
        assert!(blocker.await.unwrap());
        pool.run(1, || ()).await.unwrap();
        assert!(was_run.recv().is_err(), "its channel was dropped unused");
    }

    #[tokio::test]
    async fn a_panic_fails_its_own_work_only() {
        let pool = pool();
        let panicked = pool.run(1, || panic!("a tokenizer's mistake")).await;
        assert!(matches!(panicked, Err(TextError::Panicked)));
        assert_eq!(pool.run(1, || 7).await.unwrap(), 7, "the thread goes on");
    }

    #[tokio::test]
    async fn long_texts_hold_up_no_short_one_and_are_refused_when_many_wait() {
        let pool = pool();
        let (go, wait) = mpsc::channel::<()>();
        let (began, begun) = oneshot::channel();
        let long = tokio::spawn({
            let pool = pool.clone();
            async move {
                pool.run(LONG_BYTES, move || {
                    let _ = began.send(());
                    wait.recv().is_ok()
                })
                .await
            }
        });
        begun.await.unwrap();
        let (order, done) = mpsc::channel();
        let mut waiting: Vec<_> = (0..MAX_WAITING_LONG)
            .map(|i| {
                let order = order.clone();
                Box::pin(pool.run(LONG_BYTES + 100 - i, move || order.send(i).unwrap()))
            })
            .collect();
        for one in &mut waiting {
            assert!(futures::poll!(one).is_pending());
        }
        let refused = pool.run(LONG_BYTES, || ()).await;
        assert!(matches!(
            refused,
            Err(TextError::Busy {
                limit: MAX_WAITING_LONG
            })
        ));
        assert_eq!(pool.run(SHORT_BYTES, || 7).await.unwrap(), 7);
        go.send(()).unwrap();
        assert!(long.await.unwrap().unwrap());
        for one in waiting {
            one.await.unwrap();
        }
        let done: Vec<usize> = done.try_iter().collect();
        let shortest_first: Vec<usize> = (0..MAX_WAITING_LONG).rev().collect();
        assert_eq!(done, shortest_first);
    }
}
