//! The CPU device's threads: one parallel loop at a time, taken apart into tasks.
//!
//! Tasks are handed out by a counter, so a thread that the kernel deschedules delays one task, not the loop; which
//! thread runs a task never changes its result. A worker that wakes too late simply misses the loop. Idle workers
//! spin for at most 50 us and then park. It knows nothing of tensors.

use std::any::Any;
use std::cell::UnsafeCell;
use std::num::NonZeroUsize;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle, Thread};
use std::time::{Duration, Instant};

/// How long a thread burns its core before it parks.
const SPIN: Duration = Duration::from_micros(50);

/// Set in [`PoolState::state`] while workers may join the loop. Below it: how many have; above it: the loop's number.
const OPEN: u64 = 1 << 32;
const JOINED: u64 = OPEN - 1;

/// A task: its index, and the index of the thread that runs it (for scratch memory).
type Task<'a> = dyn Fn(usize, usize) + Sync + 'a;

/// Threads that wait for loops. The caller's own thread is one of them, number 0.
pub(crate) struct Pool {
    shared: Arc<PoolState>,
    workers: Vec<JoinHandle<()>>,
    /// One loop at a time.
    caller: Mutex<()>,
}

struct PoolState {
    state: AtomicU64,
    next_task: AtomicUsize,
    job: UnsafeCell<Option<Job>>,
    parked: Vec<AtomicBool>,
    caller: Mutex<Option<Thread>>,
    caller_parked: AtomicBool,
    shutdown: AtomicBool,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

#[derive(Clone, Copy)]
struct Job {
    task: *const Task<'static>,
    n_tasks: usize,
}

// SAFETY: `job` is written only by the caller while the loop is closed and nobody is joined, and read only by threads
// that joined while it was open; `state` (SeqCst) orders the two. Everything else in `PoolState` is Sync by itself.
unsafe impl Sync for PoolState {}
// SAFETY: the pointer in `job` refers to a `Sync` closure and is followed only while `run` keeps that alive.
unsafe impl Send for PoolState {}

impl Pool {
    /// `n_threads` in all: the caller's and `n_threads - 1` workers.
    pub(crate) fn new(n_threads: NonZeroUsize) -> std::io::Result<Self> {
        let n_workers = n_threads.get() - 1;
        let shared = Arc::new(PoolState {
            state: AtomicU64::new(0),
            next_task: AtomicUsize::new(0),
            job: UnsafeCell::new(None),
            parked: (0..n_workers).map(|_| AtomicBool::new(false)).collect(),
            caller: Mutex::new(None),
            caller_parked: AtomicBool::new(false),
            shutdown: AtomicBool::new(false),
            panic: Mutex::new(None),
        });
        let mut pool = Self {
            shared,
            workers: Vec::with_capacity(n_workers),
            caller: Mutex::new(()),
        };
        for index in 0..n_workers {
            let shared = Arc::clone(&pool.shared);
            let name = format!("kernels-{}", index + 1);
            pool.workers.push(
                thread::Builder::new()
                    .name(name)
                    .spawn(move || shared.work(index))?,
            );
        }
        Ok(pool)
    }

    /// The threads, the caller's among them.
    pub(crate) fn n_threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Runs `task(0..n_tasks)`, each once, and returns when all are done.
    pub(crate) fn run(&self, n_tasks: usize, task: &Task<'_>) {
        if self.workers.is_empty() || n_tasks <= 1 {
            (0..n_tasks).for_each(|index| task(index, 0));
            return;
        }
        let _one_at_a_time = self.caller.lock().unwrap_or_else(PoisonError::into_inner);
        let task: *const Task<'_> = task;
        // SAFETY: only the lifetime changes. `Closing` waits, also when a task panics, until nobody follows the pointer.
        let task: *const Task<'static> = unsafe { std::mem::transmute(task) };
        let job = Job { task, n_tasks };
        // SAFETY: the lock makes this the only caller, and the last loop was closed with nobody left in it.
        unsafe { *self.shared.job.get() = Some(job) };
        self.shared.next_task.store(0, SeqCst);
        let number = (self.shared.state.load(SeqCst) >> 33).wrapping_add(1);
        self.shared.state.store((number << 33) | OPEN, SeqCst);
        for (parked, worker) in self.shared.parked.iter().zip(&self.workers) {
            if parked.swap(false, SeqCst) {
                worker.thread().unpark();
            }
        }
        {
            let _closing = Closing(&self.shared);
            // SAFETY: the pointer was made from a live reference above.
            unsafe { self.shared.take_tasks(job, 0) };
        }
        let panic = self
            .shared
            .panic
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if let Some(panic) = panic {
            std::panic::resume_unwind(panic);
        }
    }
}

/// Closes the loop and waits for those who joined it, however the caller leaves.
struct Closing<'a>(&'a PoolState);

impl Drop for Closing<'_> {
    fn drop(&mut self) {
        let shared = self.0;
        if shared.state.fetch_and(!OPEN, SeqCst) & JOINED == 0 {
            return;
        }
        let done = || shared.state.load(SeqCst) & JOINED == 0;
        if spin_until(done) {
            return;
        }
        *shared.caller.lock().unwrap_or_else(PoisonError::into_inner) = Some(thread::current());
        shared.caller_parked.store(true, SeqCst);
        while !done() {
            thread::park();
        }
        shared.caller_parked.store(false, SeqCst);
    }
}

impl PoolState {
    fn work(&self, index: usize) {
        let mut last = 0;
        loop {
            let ready = || {
                let state = self.state.load(SeqCst);
                (state & OPEN != 0 && state >> 33 != last) || self.shutdown.load(SeqCst)
            };
            if !spin_until(ready) {
                self.parked[index].store(true, SeqCst);
                while self.parked[index].load(SeqCst) && !ready() {
                    thread::park();
                }
                self.parked[index].store(false, SeqCst);
            }
            if self.shutdown.load(SeqCst) {
                return;
            }
            let state = self.state.load(SeqCst);
            if state & OPEN == 0 || state >> 33 == last {
                continue;
            }
            if self
                .state
                .compare_exchange(state, state + 1, SeqCst, SeqCst)
                .is_err()
            {
                continue;
            }
            last = state >> 33;
            self.join(index + 1);
        }
    }

    /// Takes part in the loop that this thread has joined, then leaves it.
    fn join(&self, thread: usize) {
        let result = catch_unwind(AssertUnwindSafe(|| {
            // SAFETY: joined while open, so `job` was written before and is not written again until all have left;
            // the caller keeps the closure alive until then.
            unsafe {
                let job = (*self.job.get()).expect("an open loop has a job");
                self.take_tasks(job, thread);
            }
        }));
        if let Err(panic) = result {
            *self.panic.lock().unwrap_or_else(PoisonError::into_inner) = Some(panic);
        }
        let before = self.state.fetch_sub(1, SeqCst);
        if before & JOINED == 1 && self.caller_parked.load(SeqCst) {
            let caller = self
                .caller
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .clone();
            if let Some(caller) = caller {
                caller.unpark();
            }
        }
    }

    /// # Safety
    /// `job.task` must be alive until this returns.
    unsafe fn take_tasks(&self, job: Job, thread: usize) {
        // SAFETY: the caller's promise.
        let task = unsafe { &*job.task };
        loop {
            let index = self.next_task.fetch_add(1, SeqCst);
            if index >= job.n_tasks {
                return;
            }
            task(index, thread);
        }
    }
}

fn spin_until(done: impl Fn() -> bool) -> bool {
    let start = Instant::now();
    loop {
        for _ in 0..64 {
            if done() {
                return true;
            }
            std::hint::spin_loop();
        }
        if start.elapsed() > SPIN {
            return false;
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.shutdown.store(true, SeqCst);
        for worker in self.workers.drain(..) {
            worker.thread().unpark();
            // A worker catches the panics of its tasks; there is nothing else that it could report.
            let _ = worker.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicU32;

    fn pool(n: usize) -> Pool {
        Pool::new(NonZeroUsize::new(n).unwrap()).unwrap()
    }

    #[test]
    fn every_task_runs_once() {
        for n_threads in [1, 2, 3, 8] {
            let pool = pool(n_threads);
            for n_tasks in [0, 1, 2, 7, 1000, 3, 64, 500] {
                let counts: Vec<AtomicU32> = (0..n_tasks).map(|_| AtomicU32::new(0)).collect();
                pool.run(n_tasks, &|task, thread| {
                    assert!(thread < n_threads);
                    counts[task].fetch_add(1, SeqCst);
                });
                assert!(
                    counts.iter().all(|count| count.load(SeqCst) == 1),
                    "{n_threads} threads, {n_tasks} tasks"
                );
            }
        }
    }

    #[test]
    fn many_short_loops_see_each_others_results() {
        let pool = pool(4);
        let cells: Vec<AtomicUsize> = (0..16).map(|_| AtomicUsize::new(0)).collect();
        for round in 0..20_000 {
            // Writes of one loop are read in the next, by whichever thread takes the neighbour's task.
            pool.run(16, &|task, _| {
                let cell = if round % 2 == 0 {
                    task
                } else {
                    (task + 1) % 16
                };
                assert_eq!(cells[cell].swap(round + 1, SeqCst), round);
            });
        }
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_lives_on() {
        let pool = pool(3);
        for bad in [0, 50, 99] {
            let result = catch_unwind(AssertUnwindSafe(|| {
                pool.run(100, &|task, _| assert_ne!(task, bad, "planted"));
            }));
            assert!(result.is_err());
            let n = AtomicUsize::new(0);
            pool.run(10, &|_, _| {
                n.fetch_add(1, SeqCst);
            });
            assert_eq!(n.load(SeqCst), 10);
        }
    }
}
