//! Matrix products through cuBLASLt (cuBLAS 13 documentation, "Using the cublasLt API"). A shape's descriptors and
//! algorithm are looked up once.
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

use super::super::driver::{Product, ProductShape};

/// NVIDIA recommends 32 MiB on Hopper.
pub(super) const WORKSPACE_BYTES: usize = 64 << 20;

/// `CUBLAS_OP_T`, which cudarc has among cuBLAS's own bindings only.
const TRANSPOSED: i32 = 1;

/// The library and what was looked up.
pub(super) struct Products {
    handle: sys::cublasLtHandle_t,
    workspace: u64,
    plans: HashMap<ProductShape, ProductPlan>,
}

struct ProductPlan {
    operation: sys::cublasLtMatmulDesc_t,
    weight: sys::cublasLtMatrixLayout_t,
    x: sys::cublasLtMatrixLayout_t,
    out: sys::cublasLtMatrixLayout_t,
    algorithm: sys::cublasLtMatmulAlgo_t,
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

impl Products {
    pub(super) fn new() -> Result<Self, DeviceError> {
        Ok(Self {
            handle: result::create_handle().map_err(|error| failed("starting", error))?,
            workspace: 0,
            plans: HashMap::new(),
        })
    }

    /// `WORKSPACE_BYTES` on the device.
    pub(super) fn set_workspace(&mut self, address: u64) {
        self.workspace = address;
    }

    /// Starts a product.
    ///
    /// # Safety
    /// As for `Driver::product`.
    pub(super) unsafe fn start(
        &mut self,
        product: &Product,
        stream: CUstream,
    ) -> Result<(), DeviceError> {
        if !self.plans.contains_key(&product.shape) {
            let plan = self
                .plan(&product.shape)
                .map_err(|error| failed(&format!("planning {:?}", product.shape), error))?;
            self.plans.insert(product.shape, plan);
        }
        let plan = &self.plans[&product.shape];
        let (one, zero) = (1.0_f32, 0.0_f32);
        // SAFETY: descriptors are valid as long as self lives; addresses are the caller's promise.
        unsafe {
            if let Some(bias) = product.bias {
                result::set_matmul_desc_attribute(
                    plan.operation,
                    sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_BIAS_POINTER,
                    std::ptr::from_ref(&bias).cast(),
                    size_of_val(&bias),
                )
                .map_err(|error| failed("setting a bias", error))?;
            }
            result::matmul(
                self.handle,
                plan.operation,
                std::ptr::from_ref(&one).cast(),
                std::ptr::from_ref(&zero).cast(),
                product.weight as *const c_void,
                plan.weight,
                product.x as *const c_void,
                plan.x,
                product.out as *const c_void,
                plan.out,
                product.out as *mut c_void,
                plan.out,
                &plan.algorithm,
                self.workspace as *mut c_void,
                WORKSPACE_BYTES,
                stream.cast(),
            )
        }
        .map_err(|error| failed("a product", error))
    }

    fn plan(&self, shape: &ProductShape) -> Result<ProductPlan, CublasError> {
        use sys::cudaDataType_t::{CUDA_R_16BF, CUDA_R_32F};
        let operation =
            result::create_matmul_desc(sys::cublasComputeType_t::CUBLAS_COMPUTE_32F, CUDA_R_32F)?;
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
        use sys::cublasLtMatmulDescAttributes_t as Attribute;
        set(Attribute::CUBLASLT_MATMUL_DESC_TRANSA, TRANSPOSED)?;
        if shape.biased {
            set(
                Attribute::CUBLASLT_MATMUL_DESC_EPILOGUE,
                sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS as i32,
            )?;
        }
        let (rows, inner, cols) = (shape.rows as u64, shape.inner as u64, shape.cols as u64);
        let weight =
            result::create_matrix_layout(CUDA_R_16BF, inner, cols, shape.weight_stride as i64)?;
        let x = result::create_matrix_layout(CUDA_R_16BF, inner, rows, shape.x_stride as i64)?;
        let wide = if shape.wide { CUDA_R_32F } else { CUDA_R_16BF };
        let out = result::create_matrix_layout(wide, cols, rows, shape.out_stride as i64)?;
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
                self.handle,
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
        Ok(ProductPlan {
            operation,
            weight,
            x,
            out,
            algorithm: found.algo,
        })
    }

    /// Gives everything back; nothing may be started after it.
    pub(super) fn end(&mut self) {
        for (_, plan) in self.plans.drain() {
            // SAFETY: each is destroyed once.
            unsafe {
                let _ = result::destroy_matmul_desc(plan.operation);
                for layout in [plan.weight, plan.x, plan.out] {
                    let _ = result::destroy_matrix_layout(layout);
                }
            }
        }
        // SAFETY: the handle is destroyed once, and no plan is left that uses it.
        let _ = unsafe { result::destroy_handle(self.handle) };
    }
}
