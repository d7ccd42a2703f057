//! Matrix products through cuBLASLt (cuBLAS 13 documentation, "Using the cublasLt API"). A shape's descriptors and
//! algorithm are looked up once, and kept as long as there are not too many others.
//!
//! Row-major `out = x * weight^T` is, column by column, `out^T = weight * x^T`: the weight is the first factor, read
//! transposed, so that every matrix stays as it lies.
//!
//! Products large enough to fill the GPU without splitting their sums take the fastest of the algorithms that cuBLASLt
//! proposes; the first proposal is up to 1.6 times slower. Which one that is depends on a measurement, so only algorithms
//! that give the same bits are compared: all replicas compute the same. Smaller products take the first proposal.

use std::collections::HashMap;
use std::ffi::c_void;
use std::mem::size_of_val;

use cudarc::cublaslt::result::{self, CublasError};
use cudarc::cublaslt::sys;
use cudarc::driver::result as driver;
use cudarc::driver::sys as driver_sys;
use cudarc::driver::sys::CUstream;

use crate::device::DeviceError;

use super::super::driver::{Gemm, GemmOutput, GemmShape};
use super::context;

/// NVIDIA recommends 32 MiB on Hopper.
pub(super) const WORKSPACE_BYTES: usize = 64 << 20;

/// Algorithms that are compared for a product.
const MAX_CANDIDATES: usize = 8;

/// Products are counted in tiles of so many rows and columns.
const TILE: usize = 128;

/// Plans that are kept, a few kilobytes each; beyond that the one that was not used for the longest time goes.
const MAX_PLANS: usize = 1024;

/// `CUBLAS_OP_T`, which cudarc has among cuBLAS's own bindings only.
const TRANSPOSED: i32 = 1;

/// The library and what was looked up.
pub(super) struct Gemms {
    /// Before the handle, which they must not outlive.
    plans: HashMap<GemmShape, (u64, GemmPlan)>,
    /// The fastest algorithm, by shape; its rows are the most that it stands for.
    fastest: HashMap<GemmShape, Algorithm>,
    handle: Handle,
    workspace: u64,
    n_multiprocessors: usize,
    clock: u64,
}

type Algorithm = sys::cublasLtMatmulAlgo_t;

/// Room for what cuBLASLt finds.
const NOTHING_FOUND: sys::cublasLtMatmulHeuristicResult_t = sys::cublasLtMatmulHeuristicResult_t {
    algo: sys::cublasLtMatmulAlgo_t { data: [0; 8] },
    workspaceSize: 0,
    state: sys::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED,
    wavesCount: 0.0,
    reserved: [0; 4],
};

struct Handle(sys::cublasLtHandle_t);

impl Drop for Handle {
    fn drop(&mut self) {
        // SAFETY: the handle is destroyed once; errors at the end help nobody.
        let _ = unsafe { result::destroy_handle(self.0) };
    }
}

/// The descriptors of a product, and how it is computed.
struct GemmPlan {
    matrices: Matrices,
    algorithm: Algorithm,
}

/// The descriptors of a product.
struct Matrices {
    operation: sys::cublasLtMatmulDesc_t,
    weight: sys::cublasLtMatrixLayout_t,
    x: sys::cublasLtMatrixLayout_t,
    out: sys::cublasLtMatrixLayout_t,
}

impl Matrices {
    fn of(shape: &GemmShape) -> Result<Self, CublasError> {
        use sys::cudaDataType_t::{CUDA_R_16BF, CUDA_R_32F};
        let (rows, inner, cols) = (shape.rows as u64, shape.inner as u64, shape.cols as u64);
        let out_type = match shape.out {
            GemmOutput::F32 => CUDA_R_32F,
            GemmOutput::Bf16 | GemmOutput::BiasedBf16 => CUDA_R_16BF,
        };
        let layout = |kind, cols: u64, stride: usize| {
            result::create_matrix_layout(kind, inner, cols, stride as i64)
        };
        Ok(Self {
            operation: operation(shape.out == GemmOutput::BiasedBf16)?,
            weight: layout(CUDA_R_16BF, cols, shape.weight_stride)?,
            x: layout(CUDA_R_16BF, rows, shape.x_stride)?,
            out: result::create_matrix_layout(out_type, cols, rows, shape.out_stride as i64)?,
        })
    }
}

impl Drop for Matrices {
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

/// The product is computed in the stream where the events are, which nobody captures.
struct Stopwatch {
    stream: CUstream,
    begin: driver_sys::CUevent,
    end: driver_sys::CUevent,
}

impl Stopwatch {
    fn new(stream: CUstream) -> Result<Self, DeviceError> {
        let event = || {
            driver::event::create(driver_sys::CUevent_flags::CU_EVENT_DEFAULT)
                .map_err(|error| context::failed("making an event", error))
        };
        Ok(Self {
            stream,
            begin: event()?,
            end: event()?,
        })
    }

    /// Milliseconds from the beginning to the end of what `start` starts.
    fn time(&self, start: impl FnOnce() -> Result<(), DeviceError>) -> Result<f32, DeviceError> {
        let failed = |error| context::failed("timing a product", error);
        // SAFETY: events and stream are valid; both events have been recorded when they are compared.
        unsafe {
            driver::event::record(self.begin, self.stream).map_err(failed)?;
            start()?;
            driver::event::record(self.end, self.stream).map_err(failed)?;
            driver::event::synchronize(self.end).map_err(failed)?;
            driver::event::elapsed(self.begin, self.end).map_err(failed)
        }
    }
}

impl Drop for Stopwatch {
    fn drop(&mut self) {
        for event in [self.begin, self.end] {
            // SAFETY: made once, destroyed once.
            let _ = unsafe { driver::event::destroy(event) };
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
    pub(super) fn new(n_multiprocessors: u32) -> Result<Self, DeviceError> {
        let handle = result::create_handle().map_err(|error| failed("starting", error))?;
        Ok(Self {
            plans: HashMap::new(),
            fastest: HashMap::new(),
            handle: Handle(handle),
            workspace: 0,
            n_multiprocessors: n_multiprocessors as usize,
            clock: 0,
        })
    }

    /// `WORKSPACE_BYTES` on the device.
    pub(super) fn set_workspace(&mut self, address: u64) {
        self.workspace = address;
    }

    /// Starts a product. Where `may_wait`, one of a shape that is new may be computed several times, to find out how it
    /// is computed fastest.
    ///
    /// # Safety
    /// Every address is valid for what [`Gemm`] says of it. Where `may_wait`, the stream isn't being captured.
    pub(super) unsafe fn start(
        &mut self,
        gemm: &Gemm,
        stream: CUstream,
        may_wait: bool,
    ) -> Result<(), DeviceError> {
        self.clock += 1;
        let shape = &gemm.shape;
        if !self.plans.contains_key(shape) {
            self.make_room();
            // SAFETY: the caller's promises.
            let plan = unsafe { self.plan(gemm, stream, may_wait) }?;
            self.plans.insert(*shape, (self.clock, plan));
        }
        let clock = self.clock;
        let found = self.plans.get_mut(shape);
        let (last_used, plan) = found.expect("it was just planned");
        *last_used = clock;
        let (matrices, algorithm) = (&plan.matrices, &plan.algorithm);
        // SAFETY: the caller's promise.
        unsafe {
            compute(
                &self.handle,
                self.workspace,
                matrices,
                algorithm,
                gemm,
                stream,
            )
        }
    }

    /// Forgets the plan that was not used for the longest time, if there are as many as may be.
    fn make_room(&mut self) {
        if self.plans.len() >= MAX_PLANS {
            let by_use = |(_, (last_used, _)): &(&GemmShape, &(u64, GemmPlan))| *last_used;
            let oldest = self.plans.iter().min_by_key(by_use);
            if let Some(shape) = oldest.map(|(shape, _)| *shape) {
                self.plans.remove(&shape);
            }
        }
    }

    /// # Safety
    /// That of [`Gemms::start`].
    unsafe fn plan(
        &mut self,
        gemm: &Gemm,
        stream: CUstream,
        may_wait: bool,
    ) -> Result<GemmPlan, DeviceError> {
        let shape = &gemm.shape;
        let planning = |error| failed(&format!("planning {shape:?}"), error);
        let matrices = Matrices::of(shape).map_err(planning)?;
        let n_tiles = shape.rows.div_ceil(TILE) * shape.cols.div_ceil(TILE);
        // Half of the GPU at least: a product of fewer tiles is faster with its sums split, at the price of other bits.
        let is_large = shape.rows > TILE && 2 * n_tiles >= self.n_multiprocessors;
        let mut candidates = self.propose(&matrices, is_large).map_err(planning)?;
        let stands_for = GemmShape {
            rows: bucket(shape.rows),
            ..*shape
        };
        let known = self.fastest.get(&stands_for);
        let algorithm = match known.filter(|known| self.can(&matrices, known)) {
            _ if !is_large => candidates.swap_remove(0),
            Some(known) => *known,
            None if !may_wait => candidates.swap_remove(0),
            None => {
                // SAFETY: the caller's promises.
                let fastest = unsafe { self.fastest_of(&candidates, &matrices, gemm, stream) }?;
                self.fastest.insert(stands_for, fastest);
                fastest
            }
        };
        Ok(GemmPlan {
            matrices,
            algorithm,
        })
    }

    /// Of algorithms that give the same bits as the first, the one that took the least time.
    ///
    /// # Safety
    /// That of [`Gemms::start`]; the stream isn't being captured.
    unsafe fn fastest_of(
        &self,
        candidates: &[Algorithm],
        matrices: &Matrices,
        gemm: &Gemm,
        stream: CUstream,
    ) -> Result<Algorithm, DeviceError> {
        let stopwatch = Stopwatch::new(stream)?;
        let row_bytes = gemm.shape.cols * gemm.shape.out.bytes();
        let (mut first, mut row) = (vec![0_u8; row_bytes], vec![0_u8; row_bytes]);
        let mut fastest = (f32::INFINITY, candidates[0]);
        for (i, candidate) in candidates.iter().enumerate() {
            // SAFETY: the caller's promises. A result that isn't a sum with itself may be computed again and again.
            let run = || unsafe {
                compute(
                    &self.handle,
                    self.workspace,
                    matrices,
                    candidate,
                    gemm,
                    stream,
                )
            };
            // The first run loads the kernel.
            if stopwatch.time(run).is_err() && i > 0 {
                continue;
            }
            let to = if i == 0 { &mut first } else { &mut row };
            // SAFETY: a row of the result lies there, computed: the stopwatch has waited.
            unsafe { driver::memcpy_dtoh_sync(to, gemm.out) }
                .map_err(|error| context::failed("reading a product", error))?;
            if i > 0 && row != first {
                continue;
            }
            let took = stopwatch.time(run)?.min(stopwatch.time(run)?);
            if took < fastest.0 {
                fastest = (took, *candidate);
            }
        }
        Ok(fastest.1)
    }

    /// The algorithm can compute the product in the workspace that there is.
    fn can(&self, matrices: &Matrices, algorithm: &Algorithm) -> bool {
        let mut result = NOTHING_FOUND;
        // SAFETY: all descriptors are valid.
        let status = unsafe {
            sys::cublasLtMatmulAlgoCheck(
                self.handle.0,
                matrices.operation,
                matrices.weight,
                matrices.x,
                matrices.out,
                matrices.out,
                algorithm,
                &mut result,
            )
        };
        let ok = sys::cublasStatus_t::CUBLAS_STATUS_SUCCESS;
        status == ok && result.state == ok && result.workspaceSize <= WORKSPACE_BYTES
    }

    /// What cuBLASLt proposes, the best first, at least one: for a large product several that don't split their sums.
    fn propose(&self, matrices: &Matrices, is_large: bool) -> Result<Vec<Algorithm>, CublasError> {
        use sys::cublasLtMatmulPreferenceAttributes_t as Attribute;
        use sys::cublasLtReductionScheme_t::CUBLASLT_REDUCTION_SCHEME_NONE;
        let preference = Preference(result::create_matmul_pref()?);
        let workspace = WORKSPACE_BYTES as u64;
        preference.set(
            Attribute::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
            &workspace,
        )?;
        if is_large {
            let none = CUBLASLT_REDUCTION_SCHEME_NONE as u32;
            preference.set(Attribute::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &none)?;
        }
        let mut found = [NOTHING_FOUND; MAX_CANDIDATES];
        let wanted = if is_large { MAX_CANDIDATES } else { 1 };
        let mut n_found = 0;
        // SAFETY: all descriptors are valid, and there is room for `wanted` results.
        unsafe {
            sys::cublasLtMatmulAlgoGetHeuristic(
                self.handle.0,
                matrices.operation,
                matrices.weight,
                matrices.x,
                matrices.out,
                matrices.out,
                preference.0,
                wanted as i32,
                found.as_mut_ptr(),
                &mut n_found,
            )
        }
        .result()?;
        let found = &found[..n_found as usize];
        let usable = found
            .iter()
            .filter(|found| found.state == sys::cublasStatus_t::CUBLAS_STATUS_SUCCESS);
        let algorithms: Vec<Algorithm> = usable.map(|found| found.algo).collect();
        match algorithms.is_empty() {
            false => Ok(algorithms),
            true if is_large => self.propose(matrices, false),
            true => Err(CublasError(
                sys::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED,
            )),
        }
    }
}

/// What cuBLASLt is to choose by.
struct Preference(sys::cublasLtMatmulPreference_t);

impl Preference {
    fn set<T>(
        &self,
        attribute: sys::cublasLtMatmulPreferenceAttributes_t,
        value: &T,
    ) -> Result<(), CublasError> {
        let value_bytes = size_of_val(value);
        // SAFETY: the preference is valid, and the value is as large as it is said to be.
        unsafe {
            result::set_matmul_pref_attribute(
                self.0,
                attribute,
                std::ptr::from_ref(value).cast(),
                value_bytes,
            )
        }
    }
}

impl Drop for Preference {
    fn drop(&mut self) {
        // SAFETY: destroyed once.
        let _ = unsafe { result::destroy_matmul_pref(self.0) };
    }
}

/// The most rows that share an algorithm with `rows`: multiples of 64 below 1,024, then powers of two.
fn bucket(rows: usize) -> usize {
    match rows {
        ..1024 => rows.next_multiple_of(64),
        _ => rows.next_power_of_two(),
    }
}

/// Starts a product by `algorithm`.
///
/// # Safety
/// Every address is valid for what [`Gemm`] says of it.
unsafe fn compute(
    handle: &Handle,
    workspace: u64,
    matrices: &Matrices,
    algorithm: &Algorithm,
    gemm: &Gemm,
    stream: CUstream,
) -> Result<(), DeviceError> {
    let (one, zero) = (1.0_f32, 0.0_f32);
    // SAFETY: descriptors are valid; addresses are the caller's promise.
    unsafe {
        if let Some(bias) = gemm.bias {
            result::set_matmul_desc_attribute(
                matrices.operation,
                sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_BIAS_POINTER,
                std::ptr::from_ref(&bias).cast(),
                size_of_val(&bias),
            )
            .map_err(|error| failed("setting a bias", error))?;
        }
        result::matmul(
            handle.0,
            matrices.operation,
            std::ptr::from_ref(&one).cast(),
            std::ptr::from_ref(&zero).cast(),
            gemm.weight as *const c_void,
            matrices.weight,
            gemm.x as *const c_void,
            matrices.x,
            gemm.out as *const c_void,
            matrices.out,
            gemm.out as *mut c_void,
            matrices.out,
            algorithm,
            workspace as *mut c_void,
            WORKSPACE_BYTES,
            stream.cast(),
        )
    }
    .map_err(|error| failed("a product", error))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_algorithm_stands_for_rows_about_as_many() {
        for (rows, most) in [
            (129, 192),
            (192, 192),
            (193, 256),
            (1000, 1024),
            (1024, 1024),
            (1025, 2048),
            (8192, 8192),
        ] {
            assert_eq!(bucket(rows), most, "{rows} rows");
        }
    }
}
