//! Work that takes long, on a thread of its own: the caller watches how far it is and may leave, and then it stops.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use super::HubError;

/// How often the caller hears of it.
const LOOK: Duration = Duration::from_millis(20);

/// How far a download has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Fetched {
    /// Bytes that are there.
    pub done_bytes: u64,
    /// All bytes; 0 until they are known.
    pub total_bytes: u64,
}

/// The work's own view.
#[derive(Debug, Default)]
pub struct Job {
    stop: AtomicBool,
    done_bytes: AtomicU64,
    total_bytes: AtomicU64,
}

impl Job {
    /// So many bytes are to come.
    pub(super) fn expect(&self, bytes: u64) {
        self.total_bytes.store(bytes, Ordering::Relaxed);
        self.done_bytes.store(0, Ordering::Relaxed);
    }

    pub(super) fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }

    /// `Err` once it is to end.
    pub(super) fn check(&self) -> Result<(), HubError> {
        match self.stop.load(Ordering::Relaxed) {
            true => Err(HubError::Stopped),
            false => Ok(()),
        }
    }

    /// Waits, unless it is to end.
    pub(super) fn pause(&self, pause: Duration) -> Result<(), HubError> {
        let end = Instant::now() + pause;
        loop {
            self.check()?;
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            std::thread::sleep(left.min(LOOK));
        }
    }

    fn fetched(&self) -> Fetched {
        let total_bytes = self.total_bytes.load(Ordering::Relaxed);
        Fetched {
            done_bytes: self.done_bytes.load(Ordering::Relaxed).min(total_bytes),
            total_bytes,
        }
    }
}

/// What one file has added to a job's bytes.
#[derive(Debug)]
pub(super) struct Counted<'j> {
    job: &'j Job,
    bytes: u64,
}

impl<'j> Counted<'j> {
    pub(super) fn new(job: &'j Job) -> Self {
        Self { job, bytes: 0 }
    }

    /// The file has so many bytes now; fewer than before where it begins anew.
    pub(super) fn set(&mut self, bytes: u64) {
        let done = &self.job.done_bytes;
        match bytes >= self.bytes {
            true => done.fetch_add(bytes - self.bytes, Ordering::Relaxed),
            false => done.fetch_sub(self.bytes - bytes, Ordering::Relaxed),
        };
        self.bytes = bytes;
    }
}

/// Does the work on another thread and tells `progress` how far it is. Where `progress` leaves by unwinding, the work is told
/// to stop and not waited for: a connection that brings nothing would hold its caller up.
pub fn attend<T: Send + 'static>(
    progress: &mut dyn FnMut(Fetched),
    work: impl FnOnce(&Job) -> T + Send + 'static,
) -> T {
    struct StopOnDrop(Arc<Job>);
    impl Drop for StopOnDrop {
        fn drop(&mut self) {
            self.0.stop();
        }
    }
    let job = StopOnDrop(Arc::default());
    let (done, result) = mpsc::sync_channel(1);
    let theirs = Arc::clone(&job.0);
    let worker = std::thread::spawn(move || {
        // Nobody waits for it where the caller has left.
        let _ = done.send(work(&theirs));
    });
    loop {
        match result.recv_timeout(LOOK) {
            Ok(result) => {
                progress(job.0.fetched());
                return result;
            }
            Err(RecvTimeoutError::Timeout) => progress(job.0.fetched()),
            Err(RecvTimeoutError::Disconnected) => break,
        }
    }
    match worker.join() {
        Err(panic) => std::panic::resume_unwind(panic),
        Ok(()) => unreachable!("it sends its result before it ends"),
    }
}

#[cfg(test)]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

    use super::*;

    #[test]
    fn work_is_watched_and_gives_its_result() {
        let mut seen = Vec::new();
        let result = attend(&mut |fetched| seen.push(fetched), |job| {
            job.expect(10);
            let mut file = Counted::new(job);
            file.set(7);
            file.set(2);
            file.set(4);
            3
        });
        assert_eq!(result, 3);
        let want = Fetched {
            done_bytes: 4,
            total_bytes: 10,
        };
        assert_eq!(seen.last(), Some(&want));
    }

    #[test]
    fn who_leaves_stops_the_work() {
        let (ended, end) = mpsc::channel();
        let left = catch_unwind(AssertUnwindSafe(|| {
            attend(&mut |_| resume_unwind(Box::new(7_u8)), move |job| {
                // It would take an hour.
                ended.send(job.pause(Duration::from_secs(3600)))
            })
        }));
        assert!(matches!(end.recv().unwrap(), Err(HubError::Stopped)));
        assert_eq!(left.unwrap_err().downcast_ref::<u8>(), Some(&7));
    }
}
