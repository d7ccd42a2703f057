//! The tensor operations of the model server: what a model may ask of a device, and the devices.
//!
//! This crate knows tensors, blocks and block tables. It knows no requests, no sequences' lives, no text.
//!
//! - [`device`]: the contract, [`Device`](device::Device) and [`Ops`](device::Ops).
//! - [`shape`]: what a model says of its layers and caches before it has weights on a device.
//! - [`step`]: what a step brings and gives; every index of it is checked there, for all devices.
//! - [`stored`]: weights as checkpoints store them: dense, fp8, int4.
//! - [`choice`]: which device serves.
//! - [`sampling`]: the arithmetic of sampling, the same on every device.
//! - [`null`]: a device without memory, for checks of shapes and for measuring what is not a device's.
//! - [`reference`](mod@reference): the oracle, in f64, plain loops.
//! - [`cpu`]: AMX, AVX-512 bf16, AVX2 and portable code behind one contract, on its own threads.
//! - `cuda`, behind the feature of that name: CUDA C++ from `kernels/cuda`, cuBLASLt, graphs.

pub mod choice;
pub mod cpu;
#[cfg(any(feature = "cuda", feature = "cuda-shim"))]
pub mod cuda;
pub mod device;
mod error;
pub mod mapped;
pub mod null;
pub mod reference;
pub mod sampling;
pub mod shape;
pub mod step;
pub mod stored;
