//! A driver without a GPU that counts what is allocated and does nothing else: what a model needs on a GPU is known from
//! the same arithmetic that serves it, before a byte is loaded.

use crate::device::DeviceError;

use super::driver::{DeviceMemory, Driver, FillRow, Gemm, Pinned};
use super::kernel::{Arguments, Launch};
use super::unsupported;

/// Multiprocessors of an H100 and an H200; a GPU with fewer needs a little less workspace.
const MULTIPROCESSORS: u32 = 132;
/// Assumed for the context, the kernels and cuBLASLt's workspace of a GPU that isn't there to be asked.
const CONTEXT_BYTES: u64 = 700 << 20;

/// A GPU that is counted for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counting {
    memory: DeviceMemory,
    n_multiprocessors: u32,
    allocated: u64,
}

impl Counting {
    /// For what is left of this GPU.
    pub fn like(driver: &impl Driver) -> Result<Self, DeviceError> {
        Ok(Self {
            memory: driver.memory()?,
            n_multiprocessors: driver.n_multiprocessors(),
            allocated: 0,
        })
    }

    /// For a GPU with so much memory that nobody else uses.
    pub fn imagined(total_bytes: u64) -> Self {
        Self {
            memory: DeviceMemory {
                free: total_bytes.saturating_sub(CONTEXT_BYTES),
                total: total_bytes,
            },
            n_multiprocessors: MULTIPROCESSORS,
            allocated: 0,
        }
    }

    /// The GPU's memory.
    pub fn total_bytes(&self) -> u64 {
        self.memory.total
    }
}

fn computes_nothing<T>() -> Result<T, DeviceError> {
    Err(unsupported(
        "steps on a GPU that is only counted for".to_owned(),
    ))
}

impl Driver for Counting {
    type Graph = ();
    type Event = ();

    fn describe(&self) -> String {
        format!("a GPU with {} MiB", self.memory.total >> 20)
    }

    fn memory(&self) -> Result<DeviceMemory, DeviceError> {
        Ok(DeviceMemory {
            free: self.memory.free.saturating_sub(self.allocated),
            total: self.memory.total,
        })
    }

    fn n_multiprocessors(&self) -> u32 {
        self.n_multiprocessors
    }

    fn allocate(&mut self, _what: &'static str, bytes: usize) -> Result<u64, DeviceError> {
        self.allocated = self.allocated.saturating_add(bytes as u64);
        // Nobody follows it.
        Ok(0)
    }

    fn pinned(&mut self, _bytes: usize) -> Result<Pinned, DeviceError> {
        // SAFETY: no bytes at all, aligned.
        Ok(unsafe { Pinned::new(std::ptr::without_provenance_mut(16), 0) })
    }

    fn upload(
        &mut self,
        _to: u64,
        _n_rows: usize,
        _row_bytes: usize,
        _fill: FillRow<'_>,
    ) -> Result<(), DeviceError> {
        Ok(())
    }

    fn h2d(&mut self, _to: u64, _from: &Pinned, _bytes: usize) -> Result<(), DeviceError> {
        computes_nothing()
    }

    fn d2h(
        &mut self,
        _to: &mut Pinned,
        _at: usize,
        _from: u64,
        _bytes: usize,
    ) -> Result<(), DeviceError> {
        computes_nothing()
    }

    unsafe fn launch<A: Arguments>(
        &mut self,
        _launch: Launch<A>,
        _args: &A,
    ) -> Result<(), DeviceError> {
        computes_nothing()
    }

    fn gemm(&mut self, _gemm: &Gemm) -> Result<(), DeviceError> {
        computes_nothing()
    }

    fn begin_capture(&mut self) -> Result<(), DeviceError> {
        computes_nothing()
    }

    fn end_capture(&mut self) -> Result<(), DeviceError> {
        computes_nothing()
    }

    fn replay(&mut self, (): &()) -> Result<(), DeviceError> {
        computes_nothing()
    }

    fn record(&mut self) -> Result<(), DeviceError> {
        computes_nothing()
    }

    fn synchronize(&mut self, (): ()) -> Result<(), DeviceError> {
        computes_nothing()
    }

    fn synchronize_all(&mut self) -> Result<(), DeviceError> {
        Ok(())
    }
}
