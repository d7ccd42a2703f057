//! The same tests on a real GPU, with `KVASIR_TEST_GPU=1` and the feature `cuda`: the binary is all that the machine needs.
//!
//! Every allocation of the process then comes from one mapped, pinned arena, so that the tests' vectors have the same
//! address on both sides; a vector on the stack would not.

use kvasir_kernels::cuda::kernel::{Arguments, Launch};
use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

const ARENA_BYTES: usize = 4 << 30;

struct Arena;

#[global_allocator]
static ARENA: Arena = Arena;

static BASE: AtomicUsize = AtomicUsize::new(0);
static USED: AtomicUsize = AtomicUsize::new(0);

fn base() -> usize {
    let base = BASE.load(Ordering::Acquire);
    if base != 0 {
        return base;
    }
    // SAFETY: getenv of a literal; mmap of fresh memory. The first allocation happens before any other thread.
    let found = unsafe {
        if libc::getenv(c"KVASIR_TEST_GPU".as_ptr()).is_null() {
            1
        } else {
            libc::mmap(
                std::ptr::null_mut(),
                ARENA_BYTES,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            ) as usize
        }
    };
    BASE.store(found, Ordering::Release);
    found
}

// SAFETY: bytes of the arena are handed out once and never given back; without a GPU all calls go to the system's.
unsafe impl GlobalAlloc for Arena {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let base = base();
        if base == 1 {
            // SAFETY: the caller's promise.
            return unsafe { System.alloc(layout) };
        }
        let bytes = layout.size().next_multiple_of(256);
        let at = USED.fetch_add(bytes, Ordering::Relaxed);
        if at + bytes > ARENA_BYTES || layout.align() > 256 {
            return std::ptr::null_mut();
        }
        (base + at) as *mut u8
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        if BASE.load(Ordering::Acquire) == 1 {
            // SAFETY: the caller's promise.
            unsafe { System.dealloc(pointer, layout) }
        }
    }
}

/// Whether the tests run on a GPU.
pub(crate) fn wanted() -> bool {
    std::env::var_os("KVASIR_TEST_GPU").is_some()
}

/// Runs the kernel to its end on the GPU.
///
/// # Safety
/// As for the shim's launch.
#[cfg(feature = "cuda")]
pub(crate) unsafe fn launch<A: Arguments>(launch: Launch<A>, args: &A) {
    use kvasir_kernels::cuda::driver::Driver;
    use kvasir_kernels::cuda::gpu::Gpu;
    use std::sync::{Mutex, OnceLock, PoisonError};
    static GPU: OnceLock<Mutex<Gpu>> = OnceLock::new();
    let gpu = GPU.get_or_init(|| {
        let mut gpu = Gpu::open().unwrap();
        // SAFETY: the arena is mapped for ever, and nothing else has registered it.
        unsafe { gpu.share_host_memory(base() as *mut u8, ARENA_BYTES) }.unwrap();
        Mutex::new(gpu)
    });
    let mut gpu = gpu.lock().unwrap_or_else(PoisonError::into_inner);
    // SAFETY: the caller's promise.
    unsafe { gpu.launch(launch, args) }.unwrap();
    gpu.synchronize_all().unwrap();
}

/// There is none in this build.
///
/// # Safety
/// None is needed.
#[cfg(not(feature = "cuda"))]
pub(crate) unsafe fn launch<A: Arguments>(_: Launch<A>, _: &A) {
    unreachable!("built without the feature `cuda`");
}
