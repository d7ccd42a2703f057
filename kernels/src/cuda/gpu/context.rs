//! The GPU's context and what lives in it. Graphs and events share it, so that it ends after the last of them, whatever
//! order their owners are dropped in: to destroy one of them after its context is a crash.

use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys;

use crate::device::DeviceError;

pub(super) fn failed(what: &str, error: DriverError) -> DeviceError {
    let words = error.error_string().map_or_else(
        |_| format!("{error:?}"),
        |words| words.to_string_lossy().into_owned(),
    );
    DeviceError::Failed {
        device: "cuda",
        message: format!("{what}: {words}"),
    }
}

/// The primary context of a device, retained.
pub(super) struct Context {
    device: sys::CUdevice,
    raw: sys::CUcontext,
    /// No two contexts of this process have the same.
    number: u64,
}

// SAFETY: libcuda may be called from any thread once the context is current there, and `enter` sees to that.
unsafe impl Send for Context {}
// SAFETY: likewise; the fields never change.
unsafe impl Sync for Context {}

impl Context {
    pub(super) fn new(device: sys::CUdevice) -> Result<Arc<Self>, DeviceError> {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        // SAFETY: the device is valid; the context is released when the value is dropped.
        let raw = unsafe { result::primary_ctx::retain(device) }
            .map_err(|error| failed("opening the GPU", error))?;
        let context = Self {
            device,
            raw,
            number: NEXT.fetch_add(1, Ordering::Relaxed),
        };
        context.enter()?;
        Ok(Arc::new(context))
    }

    /// Makes the context current on this thread.
    pub(super) fn enter(&self) -> Result<(), DeviceError> {
        thread_local!(static CURRENT: Cell<u64> = const { Cell::new(0) });
        if CURRENT.get() != self.number {
            // SAFETY: the context is retained as long as self lives.
            unsafe { result::ctx::set_current(self.raw) }
                .map_err(|error| failed("entering the GPU's context", error))?;
            CURRENT.set(self.number);
        }
        Ok(())
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: retained once, released once; errors at the end help nobody.
        let _ = unsafe { result::primary_ctx::release(self.device) };
    }
}

/// A captured graph.
pub struct Graph {
    raw: sys::CUgraphExec,
    context: Arc<Context>,
}

// SAFETY: a handle, used by the thread that owns it, which enters its context first.
unsafe impl Send for Graph {}

impl Graph {
    /// Takes a graph that was instantiated in this context.
    pub(super) fn new(raw: sys::CUgraphExec, context: &Arc<Context>) -> Self {
        Self {
            raw,
            context: Arc::clone(context),
        }
    }

    pub(super) fn raw(&self) -> sys::CUgraphExec {
        self.raw
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        if self.context.enter().is_ok() {
            // SAFETY: the handle came from instantiate, is dropped once, and its context lives and is current. A graph
            // that still runs is freed when it ends (CUDA driver API, cuGraphExecDestroy).
            let _ = unsafe { result::graph::exec_destroy(self.raw) };
        }
    }
}

/// A point in a stream.
pub struct Event {
    raw: sys::CUevent,
    context: Arc<Context>,
}

// SAFETY: as for Graph.
unsafe impl Send for Event {}

impl Event {
    pub(super) fn new(context: &Arc<Context>) -> Result<Self, DeviceError> {
        context.enter()?;
        let raw = result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING)
            .map_err(|error| failed("making an event", error))?;
        Ok(Self {
            raw,
            context: Arc::clone(context),
        })
    }

    pub(super) fn raw(&self) -> sys::CUevent {
        self.raw
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        if self.context.enter().is_ok() {
            // SAFETY: made once, destroyed once, in its context.
            let _ = unsafe { result::event::destroy(self.raw) };
        }
    }
}
