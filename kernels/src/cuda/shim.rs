//! A driver without a GPU: the kernels' own source, compiled for the CPU through `cuda/shim`, and products as loops.
//!
//! For tests. Work waits in a queue until somebody waits for it, as on a GPU: what is looked at too early is not there
//! yet, and what is overwritten too early is wrong. Memory is exactly as large as it was asked for, so that the address
//! sanitizer sees an overrun (`KVASIR_SHIM_SANITIZE`, set by the tests that run themselves again under it).

use std::alloc::Layout;
use std::collections::VecDeque;
use std::ffi::{CStr, CString, c_void};
use std::sync::{Arc, OnceLock};

use crate::device::DeviceError;

use super::bounds::Allocations;
use super::driver::{DeviceMemory, Driver, FillRow, Gemm, GemmOutput, Pinned};
use super::kernel::{Arguments, Launch};

/// What the driver says the GPU has.
const TOTAL_BYTES: u64 = 1 << 30;

/// The driver.
#[derive(Debug, Default)]
pub struct Shim {
    memory: Vec<Block>,
    allocations: Allocations,
    /// One more for each graph.
    graphs: Arc<()>,
    queue: VecDeque<Work>,
    recording: Option<Vec<Work>>,
    n_done: u64,
    n_queued: u64,
    n_launches: u64,
}

#[derive(Debug)]
struct Block {
    address: *mut u8,
    layout: Layout,
}

// SAFETY: plain memory with one owner.
unsafe impl Send for Block {}

impl Drop for Block {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout, and freed once.
        unsafe { std::alloc::dealloc(self.address, self.layout) }
    }
}

#[derive(Clone, Debug)]
enum Work {
    Launch {
        launch: Launch<()>,
        /// The bytes of the arguments, aligned to 8.
        args: Vec<u64>,
        bytes: usize,
    },
    Gemm(Gemm),
    Copy {
        to: u64,
        from: u64,
        bytes: usize,
    },
}

impl Shim {
    fn take(&mut self, bytes: usize) -> *mut u8 {
        let layout = Layout::from_size_align(bytes.max(16), 256).expect("a size below 2^63");
        // SAFETY: the layout has a size.
        let address = unsafe { std::alloc::alloc_zeroed(layout) };
        assert!(!address.is_null(), "no memory for the tests");
        self.memory.push(Block { address, layout });
        address
    }

    fn push(&mut self, work: Work) {
        match &mut self.recording {
            Some(recording) => recording.push(work),
            None => {
                self.queue.push_back(work);
                self.n_queued += 1;
            }
        }
    }

    /// Works until `n` pieces of work are done.
    fn run_until(&mut self, n: u64) {
        while self.n_done < n {
            let work = self.queue.pop_front().expect("a point of this stream");
            // SAFETY: the promises of those who queued it hold as long as the memory lives, which is as long as self.
            unsafe { self.run(&work) };
            self.n_done += 1;
        }
    }

    unsafe fn run(&mut self, work: &Work) {
        match work {
            Work::Launch {
                launch,
                args,
                bytes,
            } => {
                self.n_launches += 1;
                // SAFETY: the promise of `Driver::launch`.
                unsafe { run(launch, args.as_ptr().cast(), *bytes, self.n_launches) };
            }
            // SAFETY: all of it lies in memory that lives as long as self, which was checked when it was queued.
            Work::Gemm(gemm) => unsafe { multiply(gemm) },
            // SAFETY: likewise.
            Work::Copy { to, from, bytes } => unsafe {
                std::ptr::copy_nonoverlapping(*from as *const u8, *to as *mut u8, *bytes);
            },
        }
    }
}

impl Drop for Shim {
    fn drop(&mut self) {
        // On a GPU, a graph that ends after its context is a crash.
        let n_graphs = Arc::strong_count(&self.graphs) - 1;
        assert!(
            n_graphs == 0 || std::thread::panicking(),
            "{n_graphs} graphs outlive their driver"
        );
    }
}

/// Runs a kernel to its end, its threads in an order that `seed` chooses.
///
/// # Safety
/// The addresses in `args` are valid for what the kernel does with them.
pub unsafe fn launch<A: Arguments>(launch: Launch<A>, args: &A, seed: u64) {
    let bytes = size_of::<A>();
    // SAFETY: the caller's promise.
    unsafe {
        run(
            &launch.erased(),
            std::ptr::from_ref(args).cast(),
            bytes,
            seed,
        )
    }
}

/// The same with the arguments' bytes.
///
/// # Safety
/// `args` is the kernel's struct of `bytes` bytes; its addresses are valid for what the kernel does with them.
unsafe fn run(launch: &Launch<()>, args: *const c_void, bytes: usize, seed: u64) {
    if launch.is_empty() {
        return;
    }
    let name = launch.name;
    type Run = unsafe extern "C" fn(*mut c_void, *const u32, u32, u32, *const c_void, u64);
    // SAFETY: `kvasir_shim_launch` has this signature (shim.cpp), and `<name>_args_bytes` is a u32 (shim.h).
    unsafe {
        let run: Run = std::mem::transmute::<*mut c_void, Run>(symbol("kvasir_shim_launch"));
        let declared = *symbol(&format!("{name}_args_bytes")).cast::<u32>();
        assert_eq!(declared as usize, bytes, "the arguments of {name}");
        run(
            symbol(name),
            launch.grid.as_ptr(),
            launch.threads,
            launch.shared_bytes,
            args,
            seed,
        );
    }
}

/// Whether this process runs under the address sanitizer.
pub fn sanitized() -> bool {
    std::env::var_os("KVASIR_SHIM_SANITIZE").is_some()
}

fn symbol(name: &str) -> *mut c_void {
    static LIBRARY: OnceLock<usize> = OnceLock::new();
    let library = *LIBRARY.get_or_init(|| {
        let kind = if sanitized() { "sanitized" } else { "plain" };
        let path = format!(concat!(env!("OUT_DIR"), "/cuda-shim-{}.so"), kind);
        let path = CString::new(path).expect("a path has no zero byte");
        // SAFETY: a path to a library that has no constructors with side effects.
        let handle = unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
        assert!(!handle.is_null(), "{}", last_error());
        handle as usize
    });
    let name = CString::new(name).expect("a name has no zero byte");
    // SAFETY: the handle came from dlopen and is never closed.
    let found = unsafe { libc::dlsym(library as *mut c_void, name.as_ptr()) };
    assert!(!found.is_null(), "{}", last_error());
    found
}

fn last_error() -> String {
    // SAFETY: called right after a failure, so dlerror returns a string that lives until the next call.
    unsafe { CStr::from_ptr(libc::dlerror()) }
        .to_string_lossy()
        .into_owned()
}

/// A product in plain loops.
///
/// # Safety
/// All of it lies in memory ([`Gemm::check`]).
unsafe fn multiply(gemm: &Gemm) {
    let shape = &gemm.shape;
    // SAFETY: the caller's promise.
    let value = |address: u64, at: usize| unsafe {
        half::bf16::from_bits(*(address as *const u16).add(at)).to_f32()
    };
    for r in 0..shape.rows {
        for c in 0..shape.cols {
            let sum: f32 = (0..shape.inner)
                .map(|i| {
                    value(gemm.x, r * shape.x_stride + i)
                        * value(gemm.weight, c * shape.weight_stride + i)
                })
                .sum();
            let sum = sum + gemm.bias.map_or(0.0, |bias| value(bias, c));
            let at = r * shape.out_stride + c;
            // SAFETY: the caller's promise.
            unsafe {
                match shape.out {
                    GemmOutput::F32 => *(gemm.out as *mut f32).add(at) = sum,
                    GemmOutput::Bf16 | GemmOutput::BiasedBf16 => {
                        *(gemm.out as *mut u16).add(at) = half::bf16::from_f32(sum).to_bits();
                    }
                }
            }
        }
    }
}

impl Driver for Shim {
    type Graph = ShimGraph;
    type Event = u64;

    fn describe(&self) -> String {
        "the kernels' source on the CPU".to_owned()
    }

    fn memory(&self) -> Result<DeviceMemory, DeviceError> {
        let used: usize = self.memory.iter().map(|block| block.layout.size()).sum();
        Ok(DeviceMemory {
            free: TOTAL_BYTES.saturating_sub(used as u64),
            total: TOTAL_BYTES,
        })
    }

    fn n_multiprocessors(&self) -> u32 {
        1
    }

    fn allocate(&mut self, _what: &'static str, bytes: usize) -> Result<u64, DeviceError> {
        let address = self.take(bytes) as u64;
        self.allocations.add(address, bytes as u64);
        Ok(address)
    }

    fn pinned(&mut self, bytes: usize) -> Result<Pinned, DeviceError> {
        let address = self.take(bytes);
        // SAFETY: `bytes` zeros, aligned to 256, freed with self, and known to nobody else.
        Ok(unsafe { Pinned::new(address, bytes) })
    }

    fn upload(
        &mut self,
        to: u64,
        n_rows: usize,
        row_bytes: usize,
        fill: FillRow<'_>,
    ) -> Result<(), DeviceError> {
        self.allocations
            .assert_within("an upload", to, (n_rows * row_bytes) as u64);
        self.run_until(self.n_queued);
        for r in 0..n_rows {
            let at = (to as usize + r * row_bytes) as *mut u8;
            // SAFETY: the rows are there, as was just checked; nothing else runs.
            fill(r, unsafe { std::slice::from_raw_parts_mut(at, row_bytes) });
        }
        Ok(())
    }

    fn h2d(&mut self, to: u64, from: &Pinned, bytes: usize) -> Result<(), DeviceError> {
        self.allocations
            .assert_within("a copy to the device", to, bytes as u64);
        self.push(Work::Copy {
            to,
            from: from.bytes()[..bytes].as_ptr() as u64,
            bytes,
        });
        Ok(())
    }

    fn d2h(
        &mut self,
        to: &mut Pinned,
        at: usize,
        from: u64,
        bytes: usize,
    ) -> Result<(), DeviceError> {
        self.allocations
            .assert_within("a copy from the device", from, bytes as u64);
        self.push(Work::Copy {
            to: to.bytes_mut()[at..at + bytes].as_mut_ptr() as u64,
            from,
            bytes,
        });
        Ok(())
    }

    unsafe fn launch<A: Arguments>(
        &mut self,
        launch: Launch<A>,
        args: &A,
    ) -> Result<(), DeviceError> {
        if launch.is_empty() {
            return Ok(());
        }
        args.check(&launch, &launch.bounds(&self.allocations));
        let mut words = vec![0_u64; size_of::<A>().div_ceil(8)];
        // SAFETY: the words have room for the arguments, which have no padding.
        unsafe { words.as_mut_ptr().cast::<A>().write_unaligned(*args) };
        self.push(Work::Launch {
            launch: launch.erased(),
            args: words,
            bytes: size_of::<A>(),
        });
        Ok(())
    }

    fn gemm(&mut self, gemm: &Gemm) -> Result<(), DeviceError> {
        gemm.check(&self.allocations);
        self.push(Work::Gemm(*gemm));
        Ok(())
    }

    fn begin_capture(&mut self) -> Result<(), DeviceError> {
        assert!(self.recording.is_none(), "a capture inside a capture");
        self.recording = Some(Vec::new());
        Ok(())
    }

    fn end_capture(&mut self) -> Result<Self::Graph, DeviceError> {
        let work = self.recording.take().expect("a capture was begun");
        Ok(ShimGraph {
            work,
            _alive: Arc::clone(&self.graphs),
        })
    }

    fn replay(&mut self, graph: &Self::Graph) -> Result<(), DeviceError> {
        for work in &graph.work {
            self.push(work.clone());
        }
        Ok(())
    }

    fn record(&mut self) -> Result<u64, DeviceError> {
        Ok(self.n_queued)
    }

    fn synchronize(&mut self, event: u64) -> Result<(), DeviceError> {
        self.run_until(event);
        Ok(())
    }

    fn synchronize_all(&mut self) -> Result<(), DeviceError> {
        self.run_until(self.n_queued);
        Ok(())
    }
}

/// Recorded launches and products.
#[derive(Debug)]
pub struct ShimGraph {
    work: Vec<Work>,
    _alive: Arc<()>,
}
