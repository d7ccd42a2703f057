//! What the golden tests share: the cases, their files, and the devices.
#![allow(dead_code)]

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use kvasir_kernels::cpu::CpuDevice;
use kvasir_kernels::device::{
    AttentionShape, Device, DeviceConfig, DeviceError, Limits, Precision,
};
use kvasir_kernels::reference::ReferenceDevice;
use kvasir_server::model::config::LlamaConfig;
use serde_json::Value;

/// Tokens of the largest step of the tests that drive a device by hand.
pub(crate) const MAX_TOKENS: usize = 512;

/// The devices that the tests run on.
#[derive(Clone, Copy, Debug)]
pub(crate) enum DeviceKind {
    Reference,
    /// One thread and many give the same; two are the fewest that share work.
    Cpu,
    /// The CUDA device: its kernels' source on the CPU, or, with `KVASIR_TEST_GPU`, the GPU itself.
    #[cfg(feature = "cuda-shim")]
    Cuda,
}

impl DeviceKind {
    pub(crate) fn make(self, config: DeviceConfig) -> Result<Box<dyn Device>, DeviceError> {
        match self {
            Self::Reference => Ok(Box::new(ReferenceDevice::new(config))),
            Self::Cpu => Ok(Box::new(CpuDevice::new(
                config,
                NonZeroUsize::MIN.saturating_add(1),
            )?)),
            #[cfg(feature = "cuda-shim")]
            Self::Cuda => cuda(config),
        }
    }
}

#[cfg(feature = "cuda-shim")]
fn cuda(config: DeviceConfig) -> Result<Box<dyn Device>, DeviceError> {
    use kvasir_kernels::cuda::CudaDevice;
    #[cfg(feature = "cuda")]
    if std::env::var_os("KVASIR_TEST_GPU").is_some() {
        let gpu = kvasir_kernels::cuda::gpu::Gpu::open()?;
        return Ok(Box::new(CudaDevice::new(gpu, config)?));
    }
    Ok(Box::new(CudaDevice::new(
        kvasir_kernels::cuda::shim::Shim::default(),
        config,
    )?))
}

/// The cases whose head size the CUDA device has.
#[cfg(feature = "cuda-shim")]
pub(crate) fn cuda_cases() -> Vec<PathBuf> {
    let has = |path: &PathBuf| {
        let config = std::fs::read(path.join("config.json")).unwrap();
        let config = LlamaConfig::parse(&config, None).unwrap();
        kvasir_kernels::cuda::kernel::HeadDim::new(config.head_dim).is_some()
    };
    let cases: Vec<PathBuf> = cases().into_iter().filter(has).collect();
    assert!(cases.len() >= 3, "the golden files are there");
    cases
}

/// Every folder of tests/golden that holds a golden.json, in order; `KVASIR_GOLDEN` names another root.
pub(crate) fn cases() -> Vec<PathBuf> {
    let root = std::env::var_os("KVASIR_GOLDEN").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden"),
        PathBuf::from,
    );
    let folders = std::fs::read_dir(root)
        .unwrap()
        .map(|entry| entry.unwrap().path());
    let mut cases: Vec<PathBuf> = folders
        .filter(|path| path.join("golden.json").is_file())
        .collect();
    cases.sort();
    assert!(cases.len() >= 7, "the golden files are there");
    cases
}

pub(crate) fn golden(case: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(case.join("golden.json")).unwrap()).unwrap()
}

pub(crate) fn tokens(value: &Value) -> Vec<u32> {
    value
        .as_array()
        .unwrap()
        .iter()
        .map(|id| id.as_u64().unwrap() as u32)
        .collect()
}

pub(crate) fn floats(value: &Value) -> Vec<f32> {
    value
        .as_array()
        .unwrap()
        .iter()
        .map(|x| x.as_f64().unwrap() as f32)
        .collect()
}

pub(crate) fn device_config(
    config: &LlamaConfig,
    block_size: usize,
    precision: Precision,
) -> DeviceConfig {
    let n_positions = config.max_position_embeddings;
    DeviceConfig {
        attention: AttentionShape {
            n_layers: config.n_layers,
            n_heads: config.n_heads,
            n_kv_heads: config.n_kv_heads,
            head_dim: config.head_dim,
            block_size,
        },
        limits: Limits {
            max_tokens: MAX_TOKENS,
            max_sequences: 1,
            max_logits_rows: MAX_TOKENS,
            max_blocks_per_sequence: n_positions as usize / block_size,
        },
        rope: config.rope(n_positions),
        precision,
        memory_limit: None,
    }
}
