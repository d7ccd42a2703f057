//! Finds the GPU: which library, driver, GPU or capability is missing is said in one sentence.

use cudarc::driver::result;
use cudarc::driver::sys::{self, CUdevice_attribute_enum as Attribute};

use crate::device::DeviceError;

use super::context::failed;

/// The CUDA version whose driver understands the embedded cubins: 13.0, driver 580.
const OLDEST_DRIVER: i32 = 13_000;
/// Compute capability of the oldest cubin.
const OLDEST_GPU: (i32, i32) = (8, 0);
/// Compute capability from which a kernel may be launched before the one before it has ended.
const STARTS_EARLY: (i32, i32) = (9, 0);

/// A GPU that can be used.
pub(super) struct Found {
    pub(super) device: sys::CUdevice,
    pub(super) name: String,
    pub(super) n_multiprocessors: u32,
    pub(super) starts_early: bool,
}

fn unavailable(why: impl Into<String>) -> DeviceError {
    DeviceError::Unavailable {
        device: "cuda",
        why: why.into(),
    }
}

/// The first GPU of this process (`CUDA_VISIBLE_DEVICES` chooses).
pub(super) fn find() -> Result<Found, DeviceError> {
    find_libraries()?;
    result::init().map_err(|error| match failed("", error) {
        DeviceError::Failed { message, .. } => {
            unavailable(format!("the NVIDIA driver does not start{message}"))
        }
        other => other,
    })?;
    check_driver()?;
    let count = result::device::get_count().map_err(|error| failed("counting GPUs", error))?;
    if count == 0 {
        return Err(unavailable("the NVIDIA driver shows no GPU"));
    }
    let device = result::device::get(0).map_err(|error| failed("opening the GPU", error))?;
    let name = result::device::get_name(device)
        .map_err(|error| failed("asking for the GPU's name", error))?;
    let capability = (
        attribute(
            device,
            Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
        )?,
        attribute(
            device,
            Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
        )?,
    );
    if capability < OLDEST_GPU {
        return Err(unavailable(format!(
            "{name} has compute capability {}.{}, 8.0 or newer is needed",
            capability.0, capability.1
        )));
    }
    let n_multiprocessors = attribute(device, Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
    Ok(Found {
        device,
        name,
        n_multiprocessors: n_multiprocessors as u32,
        starts_early: capability >= STARTS_EARLY,
    })
}

/// One of the GPU's properties.
pub(super) fn attribute(device: sys::CUdevice, which: Attribute) -> Result<i32, DeviceError> {
    // SAFETY: the device is valid.
    unsafe { result::device::get_attribute(device, which) }
        .map_err(|error| failed("asking for the GPU's attributes", error))
}

fn find_libraries() -> Result<(), DeviceError> {
    // SAFETY: only looks for libraries by name, and loads them.
    let (driver, cublas) = unsafe {
        (
            sys::is_culib_present(),
            cudarc::cublaslt::sys::is_culib_present(),
        )
    };
    if !driver {
        return Err(unavailable(
            "this machine has no NVIDIA driver (libcuda.so.1)",
        ));
    }
    if !cublas {
        return Err(unavailable(
            "cuBLAS 13 (libcublasLt.so.13) was not found; install it, or name its folder in LD_LIBRARY_PATH",
        ));
    }
    Ok(())
}

fn check_driver() -> Result<(), DeviceError> {
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
    Ok(())
}
