//! The real driver: libcuda and cuBLASLt through cudarc, both loaded at run time, and the cubins in this binary.
//!
//! One binary starts on any machine; [`Gpu::open`] says in one sentence why a GPU can't be used.

mod products;
mod upload;

use std::cell::Cell;
use std::collections::HashMap;
use std::ffi::{CString, c_void};

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys;

use crate::device::DeviceError;

use super::driver::{Arguments, DeviceMemory, Driver, FillRow, Launch, Pinned, Product};
use products::Products;
use upload::Staging;

// `CUBINS: &[&[u8]]`, one fatbin a source, and `KERNELS: &[(&str, usize)]`, every
// entry point and its fatbin: written by build.rs.
include!(concat!(env!("OUT_DIR"), "/cubins.rs"));

/// The CUDA version whose driver understands the embedded cubins: 13.0, driver 580.
const OLDEST_DRIVER: i32 = 13_000;
/// Compute capability of the oldest cubin.
const OLDEST_GPU: (i32, i32) = (8, 0);

/// The first GPU of this process (`CUDA_VISIBLE_DEVICES` chooses), with one stream.
pub struct Gpu {
    device: sys::CUdevice,
    context: sys::CUcontext,
    stream: sys::CUstream,
    modules: Vec<sys::CUmodule>,
    functions: HashMap<&'static str, sys::CUfunction>,
    products: Products,
    staging: Option<Staging>,
    allocations: Vec<sys::CUdeviceptr>,
    pinned: Vec<*mut c_void>,
    spare_events: Vec<sys::CUevent>,
    n_multiprocessors: u32,
    /// Kernels may be launched before the one before them has ended: from compute capability 9.0 on.
    starts_early: bool,
    name: String,
}

// SAFETY: the handles belong to this value alone, libcuda may be called from any thread once the context is current
// there, and `enter` sees to that.
unsafe impl Send for Gpu {}

/// A captured graph; ended with its driver's context.
pub struct Graph(sys::CUgraphExec);
// SAFETY: as for Gpu: a handle, used by the thread that owns the driver.
unsafe impl Send for Graph {}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: the handle came from instantiate and is dropped once. A graph that still runs is freed when it ends.
        let _ = unsafe { result::graph::exec_destroy(self.0) };
    }
}

/// A point in the stream.
pub struct Event(sys::CUevent);
// SAFETY: as for Gpu.
unsafe impl Send for Event {}

fn failed(what: &str, error: DriverError) -> DeviceError {
    let words = error.error_string().map_or_else(
        |_| format!("{error:?}"),
        |words| words.to_string_lossy().into_owned(),
    );
    DeviceError::Failed {
        device: "cuda",
        message: format!("{what}: {words}"),
    }
}

fn unavailable(why: impl Into<String>) -> DeviceError {
    DeviceError::Unavailable {
        device: "cuda",
        why: why.into(),
    }
}

impl Gpu {
    /// Opens the first GPU. The error says what is missing, with the numbers.
    pub fn open() -> Result<Self, DeviceError> {
        // SAFETY: only looks for libraries by name, and loads them.
        unsafe {
            if !sys::is_culib_present() {
                return Err(unavailable(
                    "this machine has no NVIDIA driver (libcuda.so.1)",
                ));
            }
            if !cudarc::cublaslt::sys::is_culib_present() {
                return Err(unavailable(
                    "cuBLAS 13 (libcublasLt.so.13) was not found; install it, or name its folder in LD_LIBRARY_PATH",
                ));
            }
        }
        result::init().map_err(|error| match failed("", error) {
            DeviceError::Failed { message, .. } => {
                unavailable(format!("the NVIDIA driver does not start{message}"))
            }
            other => other,
        })?;
        let mut version = 0;
        // SAFETY: writes one integer.
        unsafe { sys::cuDriverGetVersion(&mut version).result() }
            .map_err(|error| failed("asking for the driver's version", error))?;
        if version < OLDEST_DRIVER {
            return Err(unavailable(format!(
                "the NVIDIA driver supports CUDA {}.{}, 13.0 is needed (driver 580 or newer)",
                version / 1000,
                version % 1000 / 10
            )));
        }
        let count = result::device::get_count().map_err(|error| failed("counting GPUs", error))?;
        if count == 0 {
            return Err(unavailable("the NVIDIA driver shows no GPU"));
        }
        let device = result::device::get(0).map_err(|error| failed("opening the GPU", error))?;
        let name = result::device::get_name(device)
            .map_err(|error| failed("asking for the GPU's name", error))?;
        let attribute = |which| {
            // SAFETY: the device is valid.
            unsafe { result::device::get_attribute(device, which) }
                .map_err(|error| failed("asking for the GPU's attributes", error))
        };
        use sys::CUdevice_attribute_enum as Attribute;
        let capability = (
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        );
        if capability < OLDEST_GPU {
            return Err(unavailable(format!(
                "{name} has compute capability {}.{}, 8.0 or newer is needed",
                capability.0, capability.1
            )));
        }
        let n_multiprocessors =
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as u32;
        // SAFETY: the device is valid; the context is released when the value is dropped.
        let context = unsafe { result::primary_ctx::retain(device) }
            .map_err(|error| failed("opening the GPU", error))?;
        // SAFETY: the context was just retained.
        unsafe { result::ctx::set_current(context) }
            .map_err(|error| failed("opening the GPU", error))?;
        let stream = result::stream::create(result::stream::StreamKind::NonBlocking)
            .map_err(|error| failed("making a stream", error))?;
        let mut gpu = Self {
            device,
            context,
            stream,
            modules: Vec::new(),
            functions: HashMap::new(),
            products: Products::new()?,
            staging: None,
            allocations: Vec::new(),
            pinned: Vec::new(),
            spare_events: Vec::new(),
            n_multiprocessors,
            starts_early: capability >= (9, 0),
            name,
        };
        gpu.load_kernels()?;
        let workspace = gpu.allocate("the products' workspace", products::WORKSPACE_BYTES)?;
        gpu.products.set_workspace(workspace);
        Ok(gpu)
    }

    fn load_kernels(&mut self) -> Result<(), DeviceError> {
        use sys::CUfunction_attribute_enum as Attribute;
        for cubin in CUBINS {
            // SAFETY: a whole fatbin, in memory for ever.
            let module = unsafe { result::module::load_data(cubin.as_ptr().cast()) }
                .map_err(|error| failed("loading the kernels", error))?;
            self.modules.push(module);
        }
        let limit = {
            let which =
                sys::CUdevice_attribute_enum::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN;
            // SAFETY: the device is valid.
            unsafe { result::device::get_attribute(self.device, which) }
                .map_err(|error| failed("asking for the shared memory", error))?
        };
        for (name, module) in KERNELS {
            let symbol = CString::new(*name).expect("a kernel's name has no zero byte");
            // SAFETY: the module is loaded.
            let function = unsafe { result::module::get_function(self.modules[*module], symbol) }
                .map_err(|error| failed(name, error))?;
            // SAFETY: the function is valid. Every launch states what it needs; the limit only has to allow it.
            unsafe {
                let fixed = result::function::get_function_attribute(
                    function,
                    Attribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES,
                )
                .unwrap_or(0);
                result::function::set_function_attribute(
                    function,
                    Attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                    limit - fixed,
                )
            }
            .map_err(|error| failed(name, error))?;
            self.functions.insert(name, function);
        }
        Ok(())
    }

    /// Makes the context current on this thread.
    fn enter(&self) -> Result<(), DeviceError> {
        thread_local!(static CURRENT: Cell<usize> = const { Cell::new(0) });
        CURRENT.with(|current| {
            if current.get() != self.context as usize {
                // SAFETY: the context is retained as long as self lives.
                unsafe { result::ctx::set_current(self.context) }
                    .map_err(|error| failed("entering the GPU's context", error))?;
                current.set(self.context as usize);
            }
            Ok(())
        })
    }

    /// Waits for everything in the stream.
    pub fn synchronize(&self) -> Result<(), DeviceError> {
        self.enter()?;
        // SAFETY: the stream is valid.
        unsafe { result::stream::synchronize(self.stream) }
            .map_err(|error| failed("waiting for the GPU", error))
    }

    /// Makes host memory of this process visible to kernels under the same addresses, for tests.
    ///
    /// # Safety
    /// The memory stays mapped as long as self lives, and is registered once.
    pub unsafe fn share_host_memory(
        &self,
        address: *mut u8,
        bytes: usize,
    ) -> Result<(), DeviceError> {
        const DEVICE_MAP: u32 = 2;
        self.enter()?;
        // SAFETY: the caller's promise.
        unsafe { sys::cuMemHostRegister_v2(address.cast(), bytes, DEVICE_MAP).result() }
            .map_err(|error| failed("sharing host memory", error))
    }

    fn event(&mut self) -> Result<sys::CUevent, DeviceError> {
        match self.spare_events.pop() {
            Some(event) => Ok(event),
            None => result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING)
                .map_err(|error| failed("making an event", error)),
        }
    }
}

impl Driver for Gpu {
    type Graph = Graph;
    type Event = Event;

    fn describe(&self) -> String {
        format!("{}, bf16, cuBLASLt {}", self.name, products::version())
    }

    fn memory(&self) -> Result<DeviceMemory, DeviceError> {
        self.enter()?;
        let (free, total) =
            result::mem_get_info().map_err(|error| failed("asking for the memory", error))?;
        Ok(DeviceMemory {
            free: free as u64,
            total: total as u64,
        })
    }

    fn n_multiprocessors(&self) -> u32 {
        self.n_multiprocessors
    }

    fn allocate(&mut self, what: &'static str, bytes: usize) -> Result<u64, DeviceError> {
        self.enter()?;
        let bytes = bytes.max(256);
        // SAFETY: the memory is written before it is handed out, and freed once, when self is dropped.
        let address = unsafe { result::malloc_sync(bytes) }.map_err(|error| match error.0 {
            sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => DeviceError::OutOfMemory {
                what,
                needed_bytes: bytes as u64,
                available_bytes: self.memory().map_or(0, |memory| memory.free),
            },
            _ => failed(what, error),
        })?;
        self.allocations.push(address);
        // SAFETY: `bytes` bytes were just allocated there.
        unsafe { result::memset_d8_async(address, 0, bytes, self.stream) }
            .map_err(|error| failed(what, error))?;
        Ok(address)
    }

    fn pinned(&mut self, bytes: usize) -> Result<Pinned, DeviceError> {
        self.enter()?;
        // SAFETY: freed once, when self is dropped.
        let address = unsafe { result::malloc_host(bytes, 0) }
            .map_err(|error| failed("locking host memory", error))?;
        self.pinned.push(address);
        // SAFETY: `bytes` bytes are there, page-aligned, for as long as self lives; zeros are valid bytes.
        unsafe {
            address.cast::<u8>().write_bytes(0, bytes);
            Ok(Pinned::new(address.cast(), bytes))
        }
    }

    fn upload(
        &mut self,
        to: u64,
        n_rows: usize,
        row_bytes: usize,
        fill: FillRow<'_>,
    ) -> Result<(), DeviceError> {
        self.enter()?;
        let mut staging = match self.staging.take() {
            Some(staging) => staging,
            None => Staging::new(self)?,
        };
        let result = staging.upload(self.stream, to, n_rows, row_bytes, fill);
        self.staging = Some(staging);
        result
    }

    fn copy_in(&mut self, to: u64, from: &Pinned, bytes: usize) -> Result<(), DeviceError> {
        if bytes == 0 {
            return Ok(());
        }
        self.enter()?;
        // SAFETY: `to` has room by the caller's account; the source is pinned and outlives the copy.
        unsafe { result::memcpy_htod_async(to, &from.bytes()[..bytes], self.stream) }
            .map_err(|error| failed("copying to the GPU", error))
    }

    fn copy_out(
        &mut self,
        to: &mut Pinned,
        at: usize,
        from: u64,
        bytes: usize,
    ) -> Result<(), DeviceError> {
        if bytes == 0 {
            return Ok(());
        }
        self.enter()?;
        // SAFETY: the destination is pinned and outlives the copy.
        unsafe { result::memcpy_dtoh_async(&mut to.bytes_mut()[at..at + bytes], from, self.stream) }
            .map_err(|error| failed("copying from the GPU", error))
    }

    unsafe fn launch<A: Arguments>(
        &mut self,
        name: &'static str,
        launch: Launch,
        args: &A,
    ) -> Result<(), DeviceError> {
        self.enter()?;
        let function = *self.functions.get(name).expect("a kernel of kernels/cuda");
        let [x, y, z] = launch.grid;
        let mut parameters = [std::ptr::from_ref(args).cast_mut().cast::<c_void>()];
        let mut early = sys::CUlaunchAttribute {
            id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value: sys::CUlaunchAttributeValue {
                programmaticStreamSerializationAllowed: 1,
            },
        };
        let config = sys::CUlaunchConfig {
            gridDimX: x,
            gridDimY: y,
            gridDimZ: z,
            blockDimX: launch.threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: launch.shared_bytes,
            hStream: self.stream,
            attrs: &mut early,
            // Every kernel begins by waiting for those before it (platform.cuh), where its architecture knows how.
            numAttrs: u32::from(self.starts_early),
        };
        // SAFETY: the kernel takes one struct, which is read before the call returns; the rest is the caller's promise.
        unsafe {
            sys::cuLaunchKernelEx(
                &config,
                function,
                parameters.as_mut_ptr(),
                std::ptr::null_mut(),
            )
            .result()
        }
        .map_err(|error| failed(name, error))
    }

    unsafe fn product(&mut self, product: &Product) -> Result<(), DeviceError> {
        self.enter()?;
        // SAFETY: the caller's promise.
        unsafe { self.products.start(product, self.stream) }
    }

    fn begin_capture(&mut self) -> Result<(), DeviceError> {
        self.enter()?;
        // SAFETY: the stream is valid; only this thread uses it.
        unsafe {
            result::stream::begin_capture(
                self.stream,
                sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL,
            )
        }
        .map_err(|error| failed("capturing a graph", error))
    }

    fn end_capture(&mut self) -> Result<Graph, DeviceError> {
        self.enter()?;
        // SAFETY: a capture was begun; the graph is destroyed once its executable form exists.
        unsafe {
            let graph = result::stream::end_capture(self.stream)
                .map_err(|error| failed("capturing a graph", error))?;
            let executable =
                result::graph::instantiate(graph, sys::CUgraphInstantiate_flags_enum(0));
            let _ = result::graph::destroy(graph);
            executable
                .map(Graph)
                .map_err(|error| failed("preparing a graph", error))
        }
    }

    fn replay(&mut self, graph: &Graph) -> Result<(), DeviceError> {
        self.enter()?;
        // SAFETY: both are valid.
        unsafe { result::graph::launch(graph.0, self.stream) }
            .map_err(|error| failed("replaying a graph", error))
    }

    fn mark(&mut self) -> Result<Event, DeviceError> {
        self.enter()?;
        let event = self.event()?;
        // SAFETY: both are valid.
        unsafe { result::event::record(event, self.stream) }
            .map_err(|error| failed("marking the stream", error))?;
        Ok(Event(event))
    }

    fn wait(&mut self, event: Event) -> Result<(), DeviceError> {
        self.enter()?;
        // SAFETY: the event was recorded.
        let waited = unsafe { result::event::synchronize(event.0) };
        self.spare_events.push(event.0);
        waited.map_err(|error| failed("a step", error))
    }
}

impl Drop for Gpu {
    fn drop(&mut self) {
        // SAFETY: all handles are this value's own and are given back once; errors at the end help nobody.
        unsafe {
            let _ = self.synchronize();
            self.products.end();
            for event in self.spare_events.drain(..) {
                let _ = result::event::destroy(event);
            }
            for address in self.allocations.drain(..) {
                let _ = result::free_sync(address);
            }
            for address in self.pinned.drain(..) {
                let _ = result::free_host(address);
            }
            for module in self.modules.drain(..) {
                let _ = result::module::unload(module);
            }
            let _ = result::stream::destroy(self.stream);
            let _ = result::primary_ctx::release(self.device);
        }
    }
}
