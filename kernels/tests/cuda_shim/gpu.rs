//! The same tests on a real GPU: with `KVASIR_CUBINS=<folder>` the kernels come from the cubins that `cuda/cubins.sh`
//! wrote there, through libcuda, found at run time; test binary and folder are all that the machine needs.
//!
//! Every allocation of the process then comes from one mapped, pinned arena, so that the tests' vectors have the same
//! address on both sides; a vector on the stack would not.

use crate::shim::Launch;
use std::alloc::{GlobalAlloc, Layout, System};
use std::ffi::{CString, c_void};
use std::sync::OnceLock;
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
        if libc::getenv(c"KVASIR_CUBINS".as_ptr()).is_null() {
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
    std::env::var_os("KVASIR_CUBINS").is_some()
}

struct Driver {
    library: usize,
    context: usize,
    modules: Vec<usize>,
}

impl Driver {
    /// Calls a function of the driver whose arguments are all integers or pointers, eleven at most.
    unsafe fn call(&self, name: &str, a: &[usize]) -> i32 {
        type Function = unsafe extern "C" fn(
            usize,
            usize,
            usize,
            usize,
            usize,
            usize,
            usize,
            usize,
            usize,
            usize,
            usize,
        ) -> i32;
        let symbol = CString::new(name).unwrap();
        // SAFETY: the handle is libcuda's; surplus arguments are ignored by the C calling convention.
        unsafe {
            let found = libc::dlsym(self.library as *mut c_void, symbol.as_ptr());
            assert!(!found.is_null(), "libcuda has no {name}");
            let function = std::mem::transmute::<*mut c_void, Function>(found);
            let at = |i: usize| a.get(i).copied().unwrap_or(0);
            function(
                at(0),
                at(1),
                at(2),
                at(3),
                at(4),
                at(5),
                at(6),
                at(7),
                at(8),
                at(9),
                at(10),
            )
        }
    }

    unsafe fn check(&self, name: &str, a: &[usize]) {
        // SAFETY: the caller's promise.
        let code = unsafe { self.call(name, a) };
        assert_eq!(code, 0, "{name}");
    }
}

/// The address of what the driver is to write.
fn slot<T>(x: &mut T) -> usize {
    std::ptr::from_mut(x).expose_provenance()
}

fn driver() -> &'static Driver {
    static DRIVER: OnceLock<Driver> = OnceLock::new();
    DRIVER.get_or_init(|| {
        // SAFETY: libcuda's own functions, called as its documentation says.
        unsafe {
            let library = libc::dlopen(c"libcuda.so.1".as_ptr(), libc::RTLD_NOW) as usize;
            assert_ne!(library, 0, "no libcuda.so.1");
            let mut driver = Driver {
                library,
                context: 0,
                modules: Vec::new(),
            };
            let mut device = 0_i32;
            driver.check("cuInit", &[0]);
            driver.check("cuDeviceGet", &[slot(&mut device), 0]);
            let mut context = 0_usize;
            driver.check(
                "cuDevicePrimaryCtxRetain",
                &[slot(&mut context), device as usize],
            );
            driver.context = context;
            driver.check("cuCtxSetCurrent", &[driver.context]);
            // DEVICEMAP
            driver.check("cuMemHostRegister_v2", &[base(), ARENA_BYTES, 2]);
            let folder = std::env::var("KVASIR_CUBINS").unwrap();
            for entry in std::fs::read_dir(folder).unwrap() {
                let path =
                    CString::new(entry.unwrap().path().into_os_string().into_encoded_bytes())
                        .unwrap();
                let mut module = 0_usize;
                driver.check("cuModuleLoad", &[slot(&mut module), path.as_ptr() as usize]);
                driver.modules.push(module);
            }
            driver
        }
    })
}

/// Runs the kernel to its end on the GPU.
///
/// # Safety
/// As for the shim's launch.
pub(crate) unsafe fn launch(name: &str, launch: Launch, args: *const c_void) {
    let driver = driver();
    let symbol = CString::new(name).unwrap();
    // SAFETY: libcuda's own functions, called as its documentation says; the arguments are the caller's promise.
    unsafe {
        driver.check("cuCtxSetCurrent", &[driver.context]);
        let mut function = 0_usize;
        let found = driver.modules.iter().any(|&module| {
            driver.call(
                "cuModuleGetFunction",
                &[slot(&mut function), module, symbol.as_ptr() as usize],
            ) == 0
        });
        assert!(found, "no cubin holds {name}");
        // MAX_DYNAMIC_SHARED_SIZE_BYTES
        driver.check(
            "cuFuncSetAttribute",
            &[function, 8, launch.shared_bytes as usize],
        );
        let mut parameters = [args];
        let [x, y, z] = launch.grid.map(|n| n as usize);
        driver.check(
            "cuLaunchKernel",
            &[
                function,
                x,
                y,
                z,
                launch.threads as usize,
                1,
                1,
                launch.shared_bytes as usize,
                0,
                slot(&mut parameters),
                0,
            ],
        );
        driver.check("cuCtxSynchronize", &[]);
    }
}
