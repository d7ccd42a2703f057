//! From a model directory to an executor that the engine can drive: files, configuration, weights, memory.
//!
//! It knows no requests and no text, and not which device it runs on: the caller makes one from a `DeviceConfig`.
//!
//! - [`config`]: config.json, parsed once; `fields`, `rope` and `quantization` read parts of it.
//! - [`families`]: the registry: one file an architecture family, its layer in data ([`spec`]).
//! - [`files`]: where the bytes come from.
//! - [`weights`]: the tensors of safetensors files.
//! - [`mod@plan`]: what serving takes, against the memory that there is.
//! - [`decoder`]: parameters declared once, and the forward pass.

pub mod config;
pub mod decoder;
pub mod families;
pub mod fields;
pub mod files;
pub mod plan;
pub mod quantization;
pub mod rope;
pub mod spec;
pub mod weights;

use std::num::NonZeroU32;
use std::path::PathBuf;

use kvasir_kernels::device::{Device, DeviceError, DeviceOptions, Memory, Ticket};
use kvasir_kernels::null::NullDevice;
use kvasir_kernels::shape::{Limits, Model, ModelShape, Numerics, Precision};
use kvasir_kernels::step::{DeviceOutput, LogitsRow, StepInput};
use kvasir_kernels::stored::Dtype;

use crate::engine::executor::Executor;
use crate::engine::groups::{CacheGroups, GroupKind};
use crate::engine::prefix::{PrefixCaching, PrefixKey};
use crate::engine::{ModelInfo, pacer};
use config::ModelConfig;
use decoder::Decoder;
pub use files::{FileBytes, ModelFiles};
pub use plan::MemoryPlan;
use plan::{Fit, ModelFigures};
use spec::DecoderSpec;
use weights::WeightFiles;

/// The version of what keys of prefixes are made of.
const PREFIX_FORMAT: &[u8] = b"kvasir prefix 1";

/// How a model is to be served; the flags of the same names say more.
#[derive(Clone, Debug, PartialEq)]
pub struct LoadOptions {
    /// Token slots in a KV block.
    pub block_size: NonZeroU32,
    /// Prompt and output together; `None`: what the model was made for, or what the pool holds if that is less.
    pub max_model_len: Option<NonZeroU32>,
    /// Sequences in a step.
    pub max_num_seqs: NonZeroU32,
    /// Tokens in a step; at least `max_num_seqs`.
    pub max_num_batched_tokens: NonZeroU32,
    /// KV blocks, instead of what the memory allows.
    pub n_blocks: Option<NonZeroU32>,
    /// The share of the memory limit that may be used in all. In (0, 1].
    pub memory_utilization: f64,
    /// `None`: float32 for a model stored so, bfloat16 otherwise.
    pub precision: Option<Precision>,
    /// Memory in bytes, where it is less than what the device finds.
    pub memory_limit: Option<u64>,
}

/// How far loading has come, in bytes of the weights' files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Bytes prepared.
    pub done_bytes: u64,
    /// All bytes; headers make them a little more than `done_bytes` will be.
    pub total_bytes: u64,
}

/// A model that is ready to serve.
pub struct LoadedModel {
    /// The model on its device, with its KV cache.
    pub executor: ModelExecutor,
    /// What is served, and its limits.
    pub info: ModelInfo,
    /// Where the memory went, once the KV cache was allocated.
    pub memory: Memory,
    /// What was counted on before.
    pub plan: MemoryPlan,
    /// The device in one line.
    pub device: String,
}

impl LoadedModel {
    /// Bytes of the KV cache.
    pub fn kv_cache_bytes(&self) -> u64 {
        u64::from(self.info.n_blocks) * self.plan.block_bytes
    }
}

/// Why a model can't be served: one sentence that names the file or the field, what was found and what was expected.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// A file that must be there is not.
    #[error(
        "{file} is missing: expected a model directory as Hugging Face writes it, with config.json, *.safetensors and tokenizer.json"
    )]
    MissingFile {
        /// Its path.
        file: String,
    },
    /// `--model` names something else.
    #[error("{} is not a directory: expected a model directory as Hugging Face writes it, or \"demo\"", path.display())]
    NotADirectory {
        /// What was named.
        path: PathBuf,
    },
    /// The system refuses.
    #[error("{file} can't be read: {source}")]
    Read {
        /// Its path.
        file: String,
        /// The system's reason.
        #[source]
        source: std::io::Error,
    },
    /// The configuration is wrong or asks for what is not built.
    #[error("{file}: {message}")]
    Config {
        /// The file's name.
        file: String,
        /// Field, found, expected.
        message: String,
    },
    /// The weights are not what the configuration asks for.
    #[error("{file}: {message}")]
    Weights {
        /// The file's name.
        file: String,
        /// Tensor, found, expected.
        message: String,
    },
    /// Options that can't hold together, or not for this model.
    #[error("{0}")]
    Options(String),
    /// The device refuses.
    #[error("{0}")]
    Device(#[source] DeviceError),
    /// Too little memory: how much is needed, how much there is, and what would help.
    #[error("{0}")]
    DoesNotFit(String),
}

/// Loads the model in `files` onto the device that `make_device` makes. Everything that can be checked from the files'
/// headers is checked before the device is made, by the same walk on a device without memory.
pub fn load(
    files: &ModelFiles,
    options: &LoadOptions,
    make_device: impl FnOnce(DeviceOptions) -> Result<Box<dyn Device>, DeviceError>,
    mut progress: impl FnMut(Progress),
) -> Result<LoadedModel, LoadError> {
    let opened = Opened::new(files, options)?;
    let n_parameters = opened.count_parameters()?;
    let mut device = make_device(opened.device_options(options)).map_err(LoadError::Device)?;
    let total_bytes = opened.weight_files.n_bytes();
    let (model, decoder) = opened.prepare(&mut *device, &mut |done_bytes| {
        progress(Progress {
            done_bytes,
            total_bytes,
        });
    })?;

    let plan = opened.memory_plan(options, n_parameters, &*device);
    let Fit {
        n_blocks,
        max_model_len,
        ..
    } = plan.fit.clone()?;
    let Opened {
        config,
        numerics,
        limits,
        shape,
        weight_files,
        ..
    } = &opened;
    let prefix_caching = PrefixCaching {
        root: prefix_root(&config.decoder, weight_files, *numerics, shape, &*device),
        equal_bits: device.is_batch_invariant(),
    };
    device.allocate_kv(n_blocks).map_err(LoadError::Device)?;
    Ok(LoadedModel {
        info: ModelInfo {
            vocab_size: config.decoder.vocab_size as u32,
            max_model_len,
            eos_token_ids: config.eos_token_ids.clone(),
            dtype: match numerics.weights {
                Precision::BF16 => Dtype::BF16,
                Precision::F32 => Dtype::F32,
            },
            limits: *limits,
            n_blocks,
            groups: cache_groups(shape),
            prefix_caching: Some(prefix_caching),
            max_decode_stretch: Some(pacer::DECODE_STRETCH),
        },
        memory: device.memory(),
        plan,
        device: device.describe(),
        executor: ModelExecutor {
            device,
            model,
            decoder,
        },
    })
}

/// What serving the model in `files` takes on a device such as `make_device` makes, one that only counts: from
/// config.json and the headers of the weights' files, without a byte of a weight. The same walk and the same arithmetic
/// as [`load`].
pub fn plan(
    files: &ModelFiles,
    options: &LoadOptions,
    make_device: impl FnOnce(DeviceOptions) -> Result<Box<dyn Device>, DeviceError>,
) -> Result<MemoryPlan, LoadError> {
    let opened = Opened::new(files, options)?;
    let n_parameters = opened.count_parameters()?;
    let mut device = make_device(opened.device_options(options)).map_err(LoadError::Device)?;
    opened.prepare(&mut *device, &mut |_| {})?;
    Ok(opened.memory_plan(options, n_parameters, &*device))
}

/// A model's files, understood as far as config.json and their headers go.
struct Opened {
    config: ModelConfig,
    numerics: Numerics,
    max_model_len: u32,
    limits: Limits,
    shape: ModelShape,
    weight_files: WeightFiles,
}

impl Opened {
    fn new(files: &ModelFiles, options: &LoadOptions) -> Result<Self, LoadError> {
        let generation_config = files.open("generation_config.json")?;
        let config =
            ModelConfig::parse(&files.require("config.json")?, generation_config.as_deref())?;
        let numerics = Numerics::uniform(options.precision.unwrap_or(match config.dtype {
            Some(Dtype::F32) => Precision::F32,
            Some(Dtype::F16 | Dtype::BF16) | None => Precision::BF16,
        }));
        let max_model_len = max_model_len(&config, options)?;
        let limits = limits(options, max_model_len)?;
        let block_size = options.block_size.get();
        let shape = config
            .decoder
            .model_shape(max_model_len, block_size, limits);
        Ok(Self {
            weight_files: WeightFiles::open(files)?,
            config,
            numerics,
            max_model_len,
            limits,
            shape,
        })
    }

    fn device_options(&self, options: &LoadOptions) -> DeviceOptions {
        DeviceOptions {
            numerics: self.numerics,
            memory_limit: options.memory_limit,
        }
    }

    /// Walks over the model on a device without memory: what is wrong with the headers is found here.
    fn count_parameters(&self) -> Result<u64, LoadError> {
        let mut device = NullDevice::default();
        self.prepare(&mut device, &mut |_| {})?;
        Ok(device.n_elements())
    }

    fn prepare(
        &self,
        device: &mut dyn Device,
        progress: &mut dyn FnMut(u64),
    ) -> Result<(Model, Decoder), LoadError> {
        let model = device.add_model(&self.shape).map_err(LoadError::Device)?;
        let decoder = Decoder::prepare(
            &self.config.decoder,
            self.config.quantization,
            self.numerics.weights,
            self.weight_files.tensors()?,
            device,
            progress,
        )?;
        Ok((model, decoder))
    }

    /// What the prepared `device` leaves for the KV cache.
    fn memory_plan(
        &self,
        options: &LoadOptions,
        n_parameters: u64,
        device: &dyn Device,
    ) -> MemoryPlan {
        let model = ModelFigures {
            n_parameters,
            precision: self.numerics.weights,
            max_model_len: self.max_model_len,
            groups: cache_groups(&self.shape),
        };
        MemoryPlan::new(options, &model, device.memory(), device.block_bytes())
    }
}

/// Names what the keys and values of a token depend on besides the tokens. The weights are named by their files' headers:
/// within one process there are no others; their bytes must join before a root leaves it.
fn prefix_root(
    model: &DecoderSpec,
    weights: &WeightFiles,
    numerics: Numerics,
    shape: &ModelShape,
    device: &dyn Device,
) -> PrefixKey {
    PrefixKey::of_fields(&[
        PREFIX_FORMAT,
        format!("{model:?}").as_bytes(),
        &weights.headers(),
        numerics.kv_cache.name().as_bytes(),
        &(shape.block_size as u64).to_le_bytes(),
        format!("{numerics:?} {}", device.describe()).as_bytes(),
    ])
}

fn max_model_len(config: &ModelConfig, options: &LoadOptions) -> Result<u32, LoadError> {
    let longest = config.decoder.max_position_embeddings;
    match options.max_model_len {
        None => Ok(longest),
        Some(wanted) if wanted.get() <= longest => Ok(wanted.get()),
        Some(wanted) => Err(LoadError::Options(format!(
            "--max-model-len is {wanted}, expected at most max_position_embeddings of config.json, {longest}"
        ))),
    }
}

fn limits(options: &LoadOptions, max_model_len: u32) -> Result<Limits, LoadError> {
    let (n_tokens, n_sequences) = (options.max_num_batched_tokens, options.max_num_seqs);
    if n_tokens < n_sequences {
        return Err(LoadError::Options(format!(
            "--max-num-batched-tokens is {n_tokens}, expected at least --max-num-seqs, {n_sequences}"
        )));
    }
    Ok(Limits {
        max_tokens: n_tokens.get() as usize,
        max_sequences: n_sequences.get() as usize,
        // Each sequence may sample in each step; a few more rows, so that a prompt's scores don't take long.
        max_logits_rows: (n_sequences.get() as usize)
            .max(64)
            .min(n_tokens.get() as usize),
        max_blocks_per_sequence: max_model_len.div_ceil(options.block_size.get()) as usize,
    })
}

/// How the model's cache groups use blocks.
pub fn cache_groups(shape: &ModelShape) -> CacheGroups {
    let kinds = shape.groups.iter().map(|group| match group.window {
        None => GroupKind::Full,
        Some(window) => GroupKind::Window(window),
    });
    let block_size = NonZeroU32::new(shape.block_size as u32).unwrap_or(NonZeroU32::MIN);
    CacheGroups::new(block_size, shape.limits.max_tokens as u32, kinds.collect())
}

/// A model on a device, as the engine sees it.
pub struct ModelExecutor {
    device: Box<dyn Device>,
    model: Model,
    decoder: Decoder,
}

impl Executor for ModelExecutor {
    fn depth(&self) -> usize {
        self.device.depth()
    }

    fn row_tile(&self) -> usize {
        self.device.row_tile()
    }

    fn submit(&mut self, mut input: StepInput) -> Result<Ticket, DeviceError> {
        input.model = self.model;
        let decoder = &self.decoder;
        self.device.submit(&input, &|ops| decoder.forward(ops))
    }

    fn sample(&mut self, ticket: &Ticket, requests: &[LogitsRow]) -> Result<(), DeviceError> {
        self.device.sample(ticket, self.decoder.logits(), requests)
    }

    fn collect(&mut self, ticket: Ticket) -> Result<DeviceOutput, DeviceError> {
        self.device.collect(ticket)
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in crate::model) fn options(
        n_blocks: Option<u32>,
        max_model_len: Option<u32>,
    ) -> LoadOptions {
        let positive = |n| NonZeroU32::new(n).unwrap();
        LoadOptions {
            block_size: positive(16),
            max_model_len: max_model_len.map(positive),
            max_num_seqs: positive(4),
            max_num_batched_tokens: positive(64),
            n_blocks: n_blocks.map(positive),
            memory_utilization: 0.5,
            precision: None,
            memory_limit: None,
        }
    }

    #[test]
    fn the_demo_model_loads_and_knows_its_end() {
        let make = |_| {
            let device = kvasir_kernels::reference::ReferenceDevice::default();
            Ok(Box::new(device) as Box<dyn Device>)
        };
        let mut last = None;
        let loaded = load(
            &ModelFiles::demo(),
            &options(Some(8), None),
            make,
            |progress| last = Some(progress),
        );
        let info = loaded.unwrap_or_else(|error| panic!("{error}")).info;
        assert_eq!(
            (info.n_blocks, info.max_model_len, info.dtype),
            (8, 128, Dtype::BF16)
        );
        assert_eq!(info.eos_token_ids.len(), 1);
        let progress = last.unwrap();
        assert!(
            progress.done_bytes <= progress.total_bytes
                && progress.done_bytes * 10 > progress.total_bytes * 9
        );
    }
}
