//! What the CUDA device needs of a GPU: memory, copies, launches, matrix products, graphs, events, all in one stream.
//!
//! [`super::gpu::Gpu`] is the real one; `super::shim::Shim` runs the kernels' own source on the CPU, so that everything
//! above this trait is proved without a GPU. It knows no model and no step.

use crate::device::DeviceError;

/// The shape of a launch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Launch {
    /// Blocks along x, y, z.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub threads: u32,
    /// Dynamic shared memory of a block, in bytes.
    pub shared_bytes: u32,
}

/// A kernel's struct of arguments, as its source declares it; addresses are of the device.
///
/// # Safety
/// `repr(C)`, without padding, and the same fields in the same order as the struct of the source.
pub unsafe trait Arguments: Copy {}

/// Host memory that the device copies from and to without a detour. It lives as long as its driver.
#[derive(Debug)]
pub struct Pinned {
    address: *mut u8,
    bytes: usize,
}

// SAFETY: plain memory with one owner.
unsafe impl Send for Pinned {}

impl Pinned {
    /// Wraps memory that the driver has locked.
    ///
    /// # Safety
    /// `address` is valid for `bytes` bytes, initialized, aligned to 16, and nobody else's until the driver is gone.
    pub unsafe fn new(address: *mut u8, bytes: usize) -> Self {
        Self { address, bytes }
    }

    /// Its bytes.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: the promise of `new`.
        unsafe { std::slice::from_raw_parts(self.address, self.bytes) }
    }

    /// Its bytes, to write.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: the promise of `new`; the borrow is unique.
        unsafe { std::slice::from_raw_parts_mut(self.address, self.bytes) }
    }
}

/// `out[r] = weight * x[r] + bias`, sums in binary32. `x` is `[rows, inner]`, `weight` `[cols, inner]`, both bfloat16;
/// all strides are in elements and multiples of 8, `inner` too (padding is zeros in both factors).
#[derive(Clone, Copy, Debug)]
pub struct Product {
    /// Address of the result: bfloat16, or binary32 where `wide`.
    pub out: u64,
    /// Address of `x`.
    pub x: u64,
    /// Address of the weight.
    pub weight: u64,
    /// Address of `cols` bfloat16; only where the result is bfloat16.
    pub bias: Option<u64>,
    /// What decides how it is computed.
    pub shape: ProductShape,
}

/// The shape of a product.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ProductShape {
    /// Rows of `x` and of the result.
    pub rows: usize,
    /// Length of the sums.
    pub inner: usize,
    /// Columns of the result.
    pub cols: usize,
    /// From row to row of `x`.
    pub x_stride: usize,
    /// From row to row of the weight.
    pub weight_stride: usize,
    /// From row to row of the result.
    pub out_stride: usize,
    /// Whether the result is binary32.
    pub wide: bool,
    /// Whether there is a bias.
    pub biased: bool,
}

/// A GPU's memory, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceMemory {
    /// What nobody has.
    pub free: u64,
    /// All of it.
    pub total: u64,
}

/// Writes row `r` of a matrix that goes up: called from many threads, each row once.
pub type FillRow<'a> = &'a (dyn Fn(usize, &mut [u8]) + Sync);

/// One GPU and one stream on it: everything below runs in the order in which it was asked for, except where it says
/// that it waits.
pub trait Driver: Send {
    /// A recorded sequence of launches and products.
    type Graph: Send;
    /// A point in the stream.
    type Event: Send;

    /// One line: the GPU and the libraries.
    fn describe(&self) -> String;
    /// The memory now.
    fn memory(&self) -> Result<DeviceMemory, DeviceError>;
    /// Multiprocessors.
    fn n_multiprocessors(&self) -> u32;
    /// Zeros on the device, aligned to 256 bytes, for as long as the driver lives.
    fn allocate(&mut self, what: &'static str, bytes: usize) -> Result<u64, DeviceError>;
    /// Host memory for [`Driver::copy_in`] and [`Driver::copy_out`].
    fn pinned(&mut self, bytes: usize) -> Result<Pinned, DeviceError>;

    /// Sends `n_rows` rows of `row_bytes` up to `to`, `stride_bytes` apart, pipelined through pinned memory. `fill` has
    /// been called for every row when this returns.
    fn upload(
        &mut self,
        to: u64,
        n_rows: usize,
        row_bytes: usize,
        fill: FillRow<'_>,
    ) -> Result<(), DeviceError>;
    /// Starts a copy of the first `bytes` to the device. `from` stays as it is until an event after it was waited for.
    fn copy_in(&mut self, to: u64, from: &Pinned, bytes: usize) -> Result<(), DeviceError>;
    /// Starts a copy to `to[at..at + bytes]`. Nobody looks at it until an event after it was waited for.
    fn copy_out(
        &mut self,
        to: &mut Pinned,
        at: usize,
        from: u64,
        bytes: usize,
    ) -> Result<(), DeviceError>;

    /// Launches the kernel `name`.
    ///
    /// # Safety
    /// `args` is that kernel's struct, and every address in it is valid for what the kernel does with it.
    unsafe fn launch<A: Arguments>(
        &mut self,
        name: &'static str,
        launch: Launch,
        args: &A,
    ) -> Result<(), DeviceError>;
    /// Starts a product.
    ///
    /// # Safety
    /// Every address is valid for what [`Product`] says of it.
    unsafe fn product(&mut self, product: &Product) -> Result<(), DeviceError>;

    /// From here to [`Driver::end_capture`], launches and products are recorded and not run.
    fn begin_capture(&mut self) -> Result<(), DeviceError>;
    /// Ends the recording; to be called even where something in it failed.
    fn end_capture(&mut self) -> Result<Self::Graph, DeviceError>;
    /// Runs what was recorded. What it reads and writes is still valid: memory is never freed.
    fn replay(&mut self, graph: &Self::Graph) -> Result<(), DeviceError>;

    /// Marks this point of the stream.
    fn mark(&mut self) -> Result<Self::Event, DeviceError>;
    /// Waits until the stream has come to a point.
    fn wait(&mut self, event: Self::Event) -> Result<(), DeviceError>;
}
