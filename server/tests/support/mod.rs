//! What the golden tests share: the cases, their files, and the devices.
#![allow(dead_code)]

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use kvasir_kernels::cpu::CpuDevice;
use kvasir_kernels::device::{Device, DeviceError, DeviceOptions};
use kvasir_kernels::reference::ReferenceDevice;
use kvasir_server::model::config::ModelConfig;
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
    pub(crate) fn make(self, options: DeviceOptions) -> Result<Box<dyn Device>, DeviceError> {
        match self {
            Self::Reference => Ok(Box::new(ReferenceDevice::default())),
            Self::Cpu => Ok(Box::new(CpuDevice::new(
                options,
                NonZeroUsize::MIN.saturating_add(1),
            )?)),
            #[cfg(feature = "cuda-shim")]
            Self::Cuda => cuda(options),
        }
    }
}

#[cfg(feature = "cuda-shim")]
fn cuda(options: DeviceOptions) -> Result<Box<dyn Device>, DeviceError> {
    use kvasir_kernels::cuda::CudaDevice;
    #[cfg(feature = "cuda")]
    if std::env::var_os("KVASIR_TEST_GPU").is_some() {
        let gpu = kvasir_kernels::cuda::gpu::Gpu::open()?;
        return Ok(Box::new(CudaDevice::new(gpu, options)?));
    }
    Ok(Box::new(CudaDevice::new(
        kvasir_kernels::cuda::shim::Shim::default(),
        options,
    )?))
}

/// The cases whose head size the CUDA device has.
#[cfg(feature = "cuda-shim")]
pub(crate) fn cuda_cases() -> Vec<PathBuf> {
    let has = |path: &PathBuf| {
        let mut layers = config(path).decoder.layers.into_iter();
        layers.all(|layer| [64, 80, 96, 128, 192, 256].contains(&layer.attention.head_dim))
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
    cases_in(&root)
}

/// The first of `cases` of each architecture: for what takes long and differs little between cases of one.
pub(crate) fn one_of_each_family(cases: Vec<PathBuf>) -> Vec<PathBuf> {
    let mut seen = std::collections::BTreeSet::new();
    let architecture = |case: &PathBuf| {
        let config = std::fs::read(case.join("config.json")).unwrap();
        let config: Value = serde_json::from_slice(&config).unwrap();
        config["architectures"].to_string()
    };
    let is_new = |case: &PathBuf| seen.insert(architecture(case));
    cases.into_iter().filter(is_new).collect()
}

/// Small checkpoints in each quantized form that is read.
pub(crate) fn quantized_cases() -> Vec<PathBuf> {
    cases_in(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/quantized"))
}

fn cases_in(root: &Path) -> Vec<PathBuf> {
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

/// What config.json of a case says.
pub(crate) fn config(case: &Path) -> ModelConfig {
    let bytes = std::fs::read(case.join("config.json")).unwrap();
    let config = ModelConfig::parse(&bytes, None);
    config
        .map_err(|error| format!("{}: {error}", case.display()))
        .unwrap()
}

/// Outputs that a golden file holds for each prompt.
const N_OUTPUTS: usize = 24;

/// The longest context that the prompts of at most `longest_prompt` tokens of a golden file need: some models are another
/// one beyond.
pub(crate) fn longest_context(golden: &Value, longest_prompt: usize) -> u32 {
    let prompts = golden["prompts"].as_array().unwrap().iter();
    let lengths = prompts.map(|prompt| tokens(&prompt["ids"]).len());
    let longest = lengths.filter(|&length| length <= longest_prompt).max();
    (longest.unwrap() + N_OUTPUTS) as u32
}
