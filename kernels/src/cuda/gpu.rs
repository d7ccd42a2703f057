//! The real driver: libcuda and cuBLASLt through cudarc, both loaded at run time, and the cubins in this binary.
//!
//! One binary starts on any machine; [`Gpu::open`] says in one sentence why a GPU can't be used.
//!
//! - `open`: finds the GPU; `context`: what ends in order; `gemms`: products; `upload`: weights on their way up.

mod context;
mod gemms;
mod open;
mod upload;

use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::sync::Arc;

use cudarc::driver::result;
use cudarc::driver::sys::{self, CUfunction_attribute_enum as FunctionAttribute};

use crate::device::DeviceError;

use super::bounds::Allocations;
use super::driver::{DeviceMemory, Driver, FillRow, Gemm, Pinned};
use super::kernel::{Arguments, Launch};
use context::{Context, failed};
pub use context::{Event, Graph};
use gemms::Gemms;
use upload::Staging;

// `CUBINS: &[&[u8]]`, one fatbin a source, and `KERNELS: &[(&str, usize)]`, every
// entry point and its fatbin: written by build.rs.
include!(concat!(env!("OUT_DIR"), "/cubins.rs"));

/// The first GPU of this process (`CUDA_VISIBLE_DEVICES` chooses), with one stream.
pub struct Gpu {
    context: Arc<Context>,
    stream: sys::CUstream,
    kernels: Kernels,
    /// `None` only while it is dropped.
    gemms: Option<Gemms>,
    staging: Option<Staging>,
    memory: Allocations,
    allocated: Vec<sys::CUdeviceptr>,
    pinned: Vec<*mut c_void>,
    spare_events: Vec<Event>,
    n_multiprocessors: u32,
    /// Kernels may be launched before the one before them has ended.
    starts_early: bool,
    name: String,
}

// SAFETY: the handles belong to this value alone, libcuda may be called from any thread once the context is current
// there, and `Context::enter` sees to that.
unsafe impl Send for Gpu {}

/// The cubins, loaded.
#[derive(Default)]
struct Kernels {
    modules: Vec<sys::CUmodule>,
    functions: HashMap<&'static str, sys::CUfunction>,
}

impl Kernels {
    /// Loads all of them; each may take all of the shared memory that a block can have.
    fn load(device: sys::CUdevice) -> Result<Self, DeviceError> {
        let mut kernels = Self::default();
        for cubin in CUBINS {
            // SAFETY: a whole fatbin, in memory for ever.
            let module = unsafe { result::module::load_data(cubin.as_ptr().cast()) }
                .map_err(|error| failed("loading the kernels", error))?;
            kernels.modules.push(module);
        }
        let which =
            sys::CUdevice_attribute_enum::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN;
        let limit = open::attribute(device, which)?;
        for (name, module) in KERNELS {
            let symbol = CString::new(*name).expect("a kernel's name has no zero byte");
            // SAFETY: the module is loaded.
            let function =
                unsafe { result::module::get_function(kernels.modules[*module], symbol) }
                    .map_err(|error| failed(name, error))?;
            // SAFETY: the function is valid. Every launch states what it needs; the limit only has to allow it.
            unsafe {
                let fixed = result::function::get_function_attribute(
                    function,
                    FunctionAttribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES,
                )
                .unwrap_or(0);
                result::function::set_function_attribute(
                    function,
                    FunctionAttribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                    limit - fixed,
                )
            }
            .map_err(|error| failed(name, error))?;
            kernels.functions.insert(name, function);
        }
        Ok(kernels)
    }
}

impl Gpu {
    /// Opens the first GPU. The error says what is missing, with the numbers.
    pub fn open() -> Result<Self, DeviceError> {
        let found = open::find()?;
        let context = Context::new(found.device)?;
        let stream = result::stream::create(result::stream::StreamKind::NonBlocking)
            .map_err(|error| failed("making a stream", error))?;
        let mut gpu = Self {
            context,
            stream,
            kernels: Kernels::load(found.device)?,
            gemms: None,
            staging: None,
            memory: Allocations::default(),
            allocated: Vec::new(),
            pinned: Vec::new(),
            spare_events: Vec::new(),
            n_multiprocessors: found.n_multiprocessors,
            starts_early: found.starts_early,
            name: found.name,
        };
        let mut gemms = Gemms::new()?;
        let workspace = gpu.allocate("the products' workspace", gemms::WORKSPACE_BYTES)?;
        gemms.set_workspace(workspace);
        gpu.gemms = Some(gemms);
        Ok(gpu)
    }

    /// Makes host memory of this process visible to kernels under the same addresses, for tests.
    ///
    /// # Safety
    /// The memory stays mapped as long as self lives, and is registered once.
    pub unsafe fn share_host_memory(
        &mut self,
        address: *mut u8,
        bytes: usize,
    ) -> Result<(), DeviceError> {
        const DEVICE_MAP: u32 = 2;
        self.context.enter()?;
        // SAFETY: the caller's promise.
        unsafe { sys::cuMemHostRegister_v2(address.cast(), bytes, DEVICE_MAP).result() }
            .map_err(|error| failed("sharing host memory", error))?;
        self.memory.add(address as u64, bytes as u64);
        Ok(())
    }
}

impl Driver for Gpu {
    type Graph = Graph;
    type Event = Event;

    fn describe(&self) -> String {
        format!("{}, bf16, cuBLASLt {}", self.name, gemms::version())
    }

    fn memory(&self) -> Result<DeviceMemory, DeviceError> {
        self.context.enter()?;
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
        self.context.enter()?;
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
        self.allocated.push(address);
        self.memory.add(address, bytes as u64);
        // SAFETY: `bytes` bytes were just allocated there.
        unsafe { result::memset_d8_async(address, 0, bytes, self.stream) }
            .map_err(|error| failed(what, error))?;
        Ok(address)
    }

    fn pinned(&mut self, bytes: usize) -> Result<Pinned, DeviceError> {
        self.context.enter()?;
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
        self.context.enter()?;
        self.memory
            .assert_within("an upload", to, (n_rows * row_bytes) as u64);
        let mut staging = match self.staging.take() {
            Some(staging) => staging,
            None => Staging::new(self)?,
        };
        let result = staging.upload(self.stream, to, n_rows, row_bytes, fill);
        self.staging = Some(staging);
        result
    }

    fn h2d(&mut self, to: u64, from: &Pinned, bytes: usize) -> Result<(), DeviceError> {
        if bytes == 0 {
            return Ok(());
        }
        self.context.enter()?;
        self.memory
            .assert_within("a copy to the device", to, bytes as u64);
        // SAFETY: `to` has room, as was just checked; the source is pinned and outlives the copy.
        unsafe { result::memcpy_htod_async(to, &from.bytes()[..bytes], self.stream) }
            .map_err(|error| failed("copying to the GPU", error))
    }

    fn d2h(
        &mut self,
        to: &mut Pinned,
        at: usize,
        from: u64,
        bytes: usize,
    ) -> Result<(), DeviceError> {
        if bytes == 0 {
            return Ok(());
        }
        self.context.enter()?;
        self.memory
            .assert_within("a copy from the device", from, bytes as u64);
        // SAFETY: the source is there, as was just checked; the destination is pinned and outlives the copy.
        unsafe { result::memcpy_dtoh_async(&mut to.bytes_mut()[at..at + bytes], from, self.stream) }
            .map_err(|error| failed("copying from the GPU", error))
    }

    unsafe fn launch<A: Arguments>(
        &mut self,
        launch: Launch<A>,
        args: &A,
    ) -> Result<(), DeviceError> {
        if launch.is_empty() {
            return Ok(());
        }
        self.context.enter()?;
        args.check(&launch, &launch.bounds(&self.memory));
        let found = self.kernels.functions.get(launch.name);
        let function = *found.expect("build.rs compares the kernels of both sides");
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
        // SAFETY: a `Launch` ties the kernel to the one struct that it takes, which is read before the call returns; the
        // addresses were just checked; what is read as an index is the caller's promise.
        unsafe {
            sys::cuLaunchKernelEx(
                &config,
                function,
                parameters.as_mut_ptr(),
                std::ptr::null_mut(),
            )
            .result()
        }
        .map_err(|error| failed(launch.name, error))
    }

    fn gemm(&mut self, gemm: &Gemm) -> Result<(), DeviceError> {
        self.context.enter()?;
        gemm.check(&self.memory);
        let gemms = self.gemms.as_mut().expect("there until self is dropped");
        // SAFETY: all of it lies in memory that lives as long as self, as was just checked.
        unsafe { gemms.start(gemm, self.stream) }
    }

    fn begin_capture(&mut self) -> Result<(), DeviceError> {
        self.context.enter()?;
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
        self.context.enter()?;
        // SAFETY: a capture was begun; the graph is destroyed once its executable form exists.
        unsafe {
            let graph = result::stream::end_capture(self.stream)
                .map_err(|error| failed("capturing a graph", error))?;
            let executable =
                result::graph::instantiate(graph, sys::CUgraphInstantiate_flags_enum(0));
            let _ = result::graph::destroy(graph);
            executable
                .map(|raw| Graph::new(raw, &self.context))
                .map_err(|error| failed("preparing a graph", error))
        }
    }

    fn replay(&mut self, graph: &Graph) -> Result<(), DeviceError> {
        self.context.enter()?;
        // SAFETY: both are valid.
        unsafe { result::graph::launch(graph.raw(), self.stream) }
            .map_err(|error| failed("replaying a graph", error))
    }

    fn record(&mut self) -> Result<Event, DeviceError> {
        self.context.enter()?;
        let event = match self.spare_events.pop() {
            Some(event) => event,
            None => Event::new(&self.context)?,
        };
        // SAFETY: both are valid.
        unsafe { result::event::record(event.raw(), self.stream) }
            .map_err(|error| failed("recording an event", error))?;
        Ok(event)
    }

    fn synchronize(&mut self, event: Event) -> Result<(), DeviceError> {
        self.context.enter()?;
        // SAFETY: the event was recorded.
        let waited = unsafe { result::event::synchronize(event.raw()) };
        self.spare_events.push(event);
        waited.map_err(|error| failed("a step", error))
    }

    fn synchronize_all(&mut self) -> Result<(), DeviceError> {
        self.context.enter()?;
        // SAFETY: the stream is valid.
        unsafe { result::stream::synchronize(self.stream) }
            .map_err(|error| failed("waiting for the GPU", error))
    }
}

impl Drop for Gpu {
    /// In order: what runs, what names the context, memory, code, the stream. The context ends with its last owner: this
    /// value's field, unless somebody still has a graph.
    fn drop(&mut self) {
        let _ = self.synchronize_all();
        self.spare_events.clear();
        self.staging = None;
        self.gemms = None;
        // SAFETY: all handles are this value's own and are given back once; errors at the end help nobody.
        unsafe {
            for address in self.allocated.drain(..) {
                let _ = result::free_sync(address);
            }
            for address in self.pinned.drain(..) {
                let _ = result::free_host(address);
            }
            for module in self.kernels.modules.drain(..) {
                let _ = result::module::unload(module);
            }
            let _ = result::stream::destroy(self.stream);
        }
    }
}
