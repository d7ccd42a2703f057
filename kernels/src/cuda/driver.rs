//! What the CUDA device needs of a GPU: memory, copies, launches, matrix products, graphs, events, all in one stream.
//!
//! [`super::gpu::Gpu`] is the real one; `super::shim::Shim` runs the kernels' own source on the CPU, so that everything
//! above this trait is proved without a GPU. It knows no model and no step.

use crate::device::DeviceError;

use super::bounds::Allocations;
use super::kernel::{Arguments, Launch};

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

/// `out[r] = weight * x[r] + bias`, sums in f32. `x` is `[rows, inner]`, `weight` `[cols, inner]`, both bfloat16;
/// all strides are in elements and multiples of 8, `inner` too (padding is zeros in both factors).
#[derive(Clone, Copy, Debug)]
pub struct Gemm {
    /// Address of the result.
    pub out: u64,
    /// Address of `x`.
    pub x: u64,
    /// Address of the weight.
    pub weight: u64,
    /// Address of `cols` bfloat16; only where the result is bfloat16.
    pub bias: Option<u64>,
    /// What decides how it is computed.
    pub shape: GemmShape,
}

/// The shape of a [`Gemm`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct GemmShape {
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
    /// What the result is kept in.
    pub out: GemmOutput,
}

/// What the result of a [`Gemm`] is kept in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum GemmOutput {
    /// bfloat16.
    Bf16,
    /// bfloat16, with a bias added before it is rounded.
    BiasedBf16,
    /// f32.
    F32,
}

impl GemmOutput {
    /// Bytes of an element.
    pub const fn bytes(self) -> usize {
        match self {
            Self::Bf16 | Self::BiasedBf16 => 2,
            Self::F32 => 4,
        }
    }
}

impl Gemm {
    /// Asserts that all of it lies in `memory`.
    pub(super) fn check(&self, memory: &Allocations) {
        let shape = &self.shape;
        let matrix = |rows: usize, stride: usize, cols: usize| {
            rows.checked_sub(1).map_or(0, |last| last * stride + cols) as u64
        };
        let x = matrix(shape.rows, shape.x_stride, shape.inner) * 2;
        let weight = matrix(shape.cols, shape.weight_stride, shape.inner) * 2;
        let out = matrix(shape.rows, shape.out_stride, shape.cols) * shape.out.bytes() as u64;
        memory.assert_within("a product's rows", self.x, x);
        memory.assert_within("a product's weight", self.weight, weight);
        memory.assert_within("a product's result", self.out, out);
        assert_eq!(
            self.bias.is_some(),
            shape.out == GemmOutput::BiasedBf16,
            "a bias where the shape says so"
        );
        if let Some(bias) = self.bias {
            memory.assert_within("a product's bias", bias, shape.cols as u64 * 2);
        }
    }
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
/// that it waits. Whatever an operation names must lie in the driver's own allocations, which is asserted.
pub trait Driver: Send {
    /// A recorded sequence of launches and products. It ends before its driver.
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
    /// Host memory for [`Driver::h2d`] and [`Driver::d2h`].
    fn pinned(&mut self, bytes: usize) -> Result<Pinned, DeviceError>;

    /// Sends `n_rows` rows of `row_bytes` up to `to`, one after another, pipelined through pinned memory. `fill` has
    /// been called for every row when this returns.
    fn upload(
        &mut self,
        to: u64,
        n_rows: usize,
        row_bytes: usize,
        fill: FillRow<'_>,
    ) -> Result<(), DeviceError>;
    /// Starts a copy of the first `bytes` to the device. `from` stays as it is until an event after it was waited for.
    fn h2d(&mut self, to: u64, from: &Pinned, bytes: usize) -> Result<(), DeviceError>;
    /// Starts a copy to `to[at..at + bytes]`. Nobody looks at it until an event after it was waited for.
    fn d2h(
        &mut self,
        to: &mut Pinned,
        at: usize,
        from: u64,
        bytes: usize,
    ) -> Result<(), DeviceError>;

    /// Launches a kernel; nothing where its grid is empty.
    ///
    /// # Safety
    /// What the kernel reads from the device's memory as an index (tokens, rows, positions, blocks, tiles, pairs) is in
    /// range of what the arguments name. The addresses themselves are checked ([`Arguments::check`]).
    unsafe fn launch<A: Arguments>(
        &mut self,
        launch: Launch<A>,
        args: &A,
    ) -> Result<(), DeviceError>;
    /// Starts a product.
    fn gemm(&mut self, gemm: &Gemm) -> Result<(), DeviceError>;

    /// From here to [`Driver::end_capture`], launches and products are recorded and not run.
    fn begin_capture(&mut self) -> Result<(), DeviceError>;
    /// Ends the recording; to be called even where something in it failed.
    fn end_capture(&mut self) -> Result<Self::Graph, DeviceError>;
    /// Runs what was recorded. What it reads and writes is still valid: memory is never freed.
    fn replay(&mut self, graph: &Self::Graph) -> Result<(), DeviceError>;

    /// Records this point of the stream.
    fn record(&mut self) -> Result<Self::Event, DeviceError>;
    /// Waits until the stream has come to a point.
    fn synchronize(&mut self, event: Self::Event) -> Result<(), DeviceError>;
    /// Waits for everything that was asked for.
    fn synchronize_all(&mut self) -> Result<(), DeviceError>;
}
