//! Zeroed memory straight from the kernel: aligned to huge pages, asked to be made of them, touched lazily.
//!
//! Weights, workspace and KV cache live here. It knows bytes, not what they mean.

use crate::device::DeviceError;
use std::ptr::NonNull;

const HUGE: usize = 2 << 20;

/// A mapping of its own. It reads as zeros until written.
#[derive(Debug)]
pub(crate) struct Mapping {
    start: NonNull<u8>,
    bytes: usize,
    mapping: NonNull<libc::c_void>,
    mapped_bytes: usize,
}

// SAFETY: `Mapping` owns its mapping as `Vec` owns its heap memory; all access goes through raw pointers whose users
// prove that they don't race.
unsafe impl Send for Mapping {}
// SAFETY: as above: a shared `Mapping` gives out a pointer and nothing else.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `bytes`; `what` names them in the error.
    pub(crate) fn new(what: &'static str, bytes: usize) -> Result<Self, DeviceError> {
        let align = if bytes >= HUGE { HUGE } else { 64 };
        let mapped_bytes = bytes.max(1) + if align == HUGE { HUGE } else { 0 };
        let failed = || DeviceError::OutOfMemory {
            what,
            needed_bytes: bytes as u64,
            available_bytes: 0,
        };
        // SAFETY: a fresh private anonymous mapping touches no existing memory.
        let mapping = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                mapped_bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if mapping == libc::MAP_FAILED {
            return Err(failed());
        }
        let mapping = NonNull::new(mapping).ok_or_else(failed)?;
        let skip = mapping.cast::<u8>().align_offset(align);
        // SAFETY: `mapped_bytes` has room for `skip < align` and `bytes` after it (a mapping is page-aligned, so that
        // `skip` is 0 for the alignment of 64).
        let start = unsafe { mapping.cast::<u8>().add(skip) };
        if align == HUGE {
            // SAFETY: the range lies in the mapping. Without huge pages the advice fails and nothing is lost but speed.
            unsafe { libc::madvise(start.as_ptr().cast(), bytes, libc::MADV_HUGEPAGE) };
        }
        Ok(Self {
            start,
            bytes,
            mapping,
            mapped_bytes,
        })
    }

    /// Of this size, without any memory: for a device that only counts.
    pub(crate) fn imagined(bytes: usize) -> Self {
        Self {
            start: NonNull::dangling(),
            bytes,
            mapping: NonNull::dangling(),
            mapped_bytes: 0,
        }
    }

    /// The first byte, aligned to 64 bytes at least.
    pub(crate) fn as_ptr<T>(&self) -> *mut T {
        assert!(
            self.mapped_bytes > 0,
            "a device that only counts computes nothing"
        );
        self.start.as_ptr().cast()
    }

    /// The size asked for.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        if self.mapped_bytes > 0 {
            // SAFETY: exactly the range that `new` mapped, unmapped once.
            unsafe { libc::munmap(self.mapping.as_ptr(), self.mapped_bytes) };
        }
    }
}
