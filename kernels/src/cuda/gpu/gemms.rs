//! Matrix products through cuBLASLt (cuBLAS 13 documentation, "Using the cublasLt API"). A shape's descriptors and
//! algorithm are looked up once, and kept as long as there are not too many others.
//!
//! Row-major `out = x * weight^T` is, column by column, `out^T = weight * x^T`: the weight is the first factor, read
//! transposed, so that every matrix stays as it lies.

use std::collections::HashMap;
use std::ffi::c_void;
use std::mem::size_of_val;

use cudarc::cublaslt::result::{self, CublasError};
use cudarc::cublaslt::sys;
use cudarc::driver::sys::CUstream;

use crate::device::DeviceError;

use super::super::driver::{Gemm, GemmOutput, GemmShape};

/// NVIDIA recommends 32 MiB on Hopper.
pub(super) const WORKSPACE_BYTES: usize = 64 << 20;

/// Plans that are kept, a few kilobytes each; beyond that the one that was not used for the longest time goes.
const MAX_PLANS: usize = 1024;

/// `CUBLAS_OP_T`, which cudarc has among cuBLAS's own bindings only.
const TRANSPOSED: i32 = 1;

/// The library and what was looked up.
pub(super) struct Gemms {
    /// Before the handle, which they must not outlive.
    plans: HashMap<GemmShape, (u64, GemmPlan)>,
    handle: Handle,
    workspace: u64,
    clock: u64,
}

struct Handle(sys::cublasLtHandle_t);

impl Drop for Handle {
    fn drop(&mut self) {
        // SAFETY: the handle is destroyed once; errors at the end help nobody.
        let _ = unsafe { result::destroy_handle(self.0) };
    }
}

/// The descriptors of a product.
struct GemmPlan {
    operation: sys::cublasLtMatmulDesc_t,
    weight: sys::cublasLtMatrixLayout_t,
    x: sys::cublasLtMatrixLayout_t,
    out: sys::cublasLtMatrixLayout_t,
    algorithm: sys::cublasLtMatmulAlgo_t,
}

impl Drop for GemmPlan {
    fn drop(&mut self) {
        // SAFETY: each is destroyed once. cuBLASLt has read them when a call returns, and recorded graphs do not name them.
        unsafe {
            let _ = result::destroy_matmul_desc(self.operation);
            for layout in [self.weight, self.x, self.out] {
                let _ = result::destroy_matrix_layout(layout);
            }
        }
    }
}

fn failed(what: &str, error: CublasError) -> DeviceError {
    DeviceError::Failed {
        device: "cuda",
        message: format!("cuBLASLt, {what}: {error}"),
    }
}

/// The library's version, e.g. `13.1.0`.
pub(super) fn version() -> String {
    // SAFETY: takes nothing.
    let version = unsafe { sys::cublasLtGetVersion() };
    format!(
        "{}.{}.{}",
        version / 10_000,
        version / 100 % 100,
        version % 100
    )
}

impl Gemms {
    pub(super) fn new() -> Result<Self, DeviceError> {
        let handle = result::create_handle().map_err(|error| failed("starting", error))?;
        Ok(Self {
            plans: HashMap::new(),
            handle: Handle(handle),
            workspace: 0,
            clock: 0,
        })
    }

    /// `WORKSPACE_BYTES` on the device.
    pub(super) fn set_workspace(&mut self, address: u64) {
        self.workspace = address;
    }

    /// Starts a product.
    ///
    /// # Safety
    /// Every address is valid for what [`Gemm`] says of it.
    pub(super) unsafe fn start(
        &mut self,
        gemm: &Gemm,
        stream: CUstream,
    ) -> Result<(), DeviceError> {
        self.find_or_plan(&gemm.shape)?;
        let (_, plan) = &self.plans[&gemm.shape];
        let (one, zero) = (1.0_f32, 0.0_f32);
        // SAFETY: descriptors are valid as long as self lives; addresses are the caller's promise.
        unsafe {
            if let Some(bias) = gemm.bias {
                result::set_matmul_desc_attribute(
                    plan.operation,
                    sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_BIAS_POINTER,
                    std::ptr::from_ref(&bias).cast(),
                    size_of_val(&bias),
                )
                .map_err(|error| failed("setting a bias", error))?;
            }
            result::matmul(
                self.handle.0,
                plan.operation,
                std::ptr::from_ref(&one).cast(),
                std::ptr::from_ref(&zero).cast(),
                gemm.weight as *const c_void,
                plan.weight,
                gemm.x as *const c_void,
                plan.x,
                gemm.out as *const c_void,
                plan.out,
                gemm.out as *mut c_void,
                plan.out,
                &plan.algorithm,
                self.workspace as *mut c_void,
                WORKSPACE_BYTES,
                stream.cast(),
            )
        }
        .map_err(|error| failed("a product", error))
    }

    fn find_or_plan(&mut self, shape: &GemmShape) -> Result<(), DeviceError> {
        self.clock += 1;
        if let Some((last_used, _)) = self.plans.get_mut(shape) {
            *last_used = self.clock;
            return Ok(());
        }
        if self.plans.len() >= MAX_PLANS {
            let oldest = self
                .plans
                .iter()
                .min_by_key(|(_, (last_used, _))| *last_used);
            if let Some(shape) = oldest.map(|(shape, _)| *shape) {
                self.plans.remove(&shape);
            }
        }
        let plan = self
            .plan(shape)
            .map_err(|error| failed(&format!("planning {shape:?}"), error))?;
        self.plans.insert(*shape, (self.clock, plan));
        Ok(())
    }

    fn plan(&self, shape: &GemmShape) -> Result<GemmPlan, CublasError> {
        use sys::cudaDataType_t::{CUDA_R_16BF, CUDA_R_32F};
        let (rows, inner, cols) = (shape.rows as u64, shape.inner as u64, shape.cols as u64);
        let out_type = match shape.out {
            GemmOutput::F32 => CUDA_R_32F,
            GemmOutput::Bf16 | GemmOutput::BiasedBf16 => CUDA_R_16BF,
        };
        let layout = |kind, cols: u64, stride: usize| {
            result::create_matrix_layout(kind, inner, cols, stride as i64)
        };
        let operation = operation(shape.out == GemmOutput::BiasedBf16)?;
        let weight = layout(CUDA_R_16BF, cols, shape.weight_stride)?;
        let x = layout(CUDA_R_16BF, rows, shape.x_stride)?;
        let out = result::create_matrix_layout(out_type, cols, rows, shape.out_stride as i64)?;
        let preference = result::create_matmul_pref()?;
        let workspace = WORKSPACE_BYTES as u64;
        // SAFETY: all descriptors are valid, and the preference is destroyed once.
        let found = unsafe {
            result::set_matmul_pref_attribute(
                preference,
                sys::cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                std::ptr::from_ref(&workspace).cast(),
                size_of_val(&workspace),
            )?;
            let found = result::get_matmul_algo_heuristic(
                self.handle.0,
                operation,
                weight,
                x,
                out,
                out,
                preference,
            );
            result::destroy_matmul_pref(preference)?;
            found?
        };
        Ok(GemmPlan {
            operation,
            weight,
            x,
            out,
            algorithm: found.algo,
        })
    }
}

/// The description of `weight^T * x`, sums in f32.
fn operation(biased: bool) -> Result<sys::cublasLtMatmulDesc_t, CublasError> {
    use sys::cublasLtMatmulDescAttributes_t as Attribute;
    let operation = result::create_matmul_desc(
        sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
        sys::cudaDataType_t::CUDA_R_32F,
    )?;
    let set = |attribute, value: i32| {
        // SAFETY: the descriptor is valid, and these attributes are 32-bit integers.
        unsafe {
            result::set_matmul_desc_attribute(
                operation,
                attribute,
                std::ptr::from_ref(&value).cast(),
                size_of_val(&value),
            )
        }
    };
    set(Attribute::CUBLASLT_MATMUL_DESC_TRANSA, TRANSPOSED)?;
    if biased {
        let epilogue = sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS as i32;
        set(Attribute::CUBLASLT_MATMUL_DESC_EPILOGUE, epilogue)?;
    }
    Ok(operation)
}
