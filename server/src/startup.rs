//! From flags to a running engine: loads the model's files, starts the engine and the output thread.
//!
//! It knows how the parts fit together; what it says to the user is the caller's to print.

use std::num::{NonZeroU32, NonZeroUsize};
use std::sync::Arc;

use kvasir_kernels::choice::{ChosenDevice, Preferences};
use kvasir_kernels::device::DeviceError;
use kvasir_kernels::shape::Precision;
use kvasir_kernels::stored::Dtype;

use crate::args::{Args, DtypeChoice, ModelSource};
use crate::engine::{Engine, EngineError};
use crate::frontend::AsyncEngine;
use crate::frontend::budget::ByteBudget;
use crate::http::{Ids, SamplingDefaults, Serving, unix_time};
use crate::metrics::Metrics;
use crate::model::{self, LoadError, LoadOptions, ModelFiles, Progress};
use crate::text::tokenizer::TextFiles;
use crate::text::{TextError, TextPool, Tokenizer};

/// Requests that may wait for each sequence that may run, and however few these are.
const WAITING_PER_SLOT: u32 = 8;
const LEAST_WAITING: u32 = 256;

/// A loaded model with its engine running.
#[derive(Debug)]
pub struct Started {
    /// For the routes.
    pub serving: Serving,
    /// To be joined: it tells how the engine ended.
    pub engine: Engine,
    /// What the user may want to know.
    pub summary: Summary,
}

/// What is served, in numbers.
#[derive(Clone, Debug)]
pub struct Summary {
    /// The device in one line.
    pub device: String,
    /// The precision.
    pub dtype: &'static str,
    /// KV blocks.
    pub n_blocks: u32,
    /// Token slots in one.
    pub block_size: u32,
    /// Bytes of all of them.
    pub kv_cache_bytes: u64,
    /// The longest context.
    pub max_model_len: u32,
    /// Whether the model has a chat template.
    pub can_chat: bool,
    /// Settings of `generation_config.json` that are not built.
    pub ignored: Vec<String>,
}

/// Why nothing is served.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The model or the flags.
    #[error(transparent)]
    Model(#[from] LoadError),
    /// `--device`.
    #[error("--device: {0}")]
    Device(#[source] DeviceError),
    /// The model's text files.
    #[error(transparent)]
    Text(#[from] TextError),
    /// `generation_config.json`.
    #[error("{0}")]
    GenerationConfig(String),
    /// The engine could not be started.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// A thread could not be started.
    #[error("a thread could not be started: {0}")]
    Thread(std::io::Error),
}

/// Loads and starts everything behind the routes. It takes as long as the weights take to read.
pub fn start(
    args: &Args,
    metrics: &Arc<Metrics>,
    progress: impl FnMut(Progress),
) -> Result<Started, StartError> {
    let files = match &args.model.source {
        ModelSource::Demo => ModelFiles::demo(),
        ModelSource::Directory(path) => ModelFiles::directory(path)?,
    };
    // The small files first: what is wrong with them is found before the weights are read.
    let tokenizer = Arc::new(load_tokenizer(&files)?);
    let (defaults, ignored) = load_defaults(&files)?;

    let device = ChosenDevice::find(args.model.device).map_err(StartError::Device)?;
    if let Some(why) = device.why_not_cuda() {
        tracing::info!(why, "serving on the CPU");
    }
    let options = options(args, device.preferences());
    let n_threads = compute_threads(args.engine.threads);
    let loaded = model::load(
        &files,
        &options,
        |options| device.make(options, n_threads),
        progress,
    )?;
    let mut info = loaded.info;
    if !args.engine.prefix_caching() {
        info.prefix_caching = None;
    }
    info.max_decode_stretch = args.engine.max_decode_stretch.bound();
    let summary = Summary {
        device: loaded.device,
        dtype: dtype_name(info.dtype),
        n_blocks: info.n_blocks,
        block_size: info.groups.block_size().get(),
        kv_cache_bytes: loaded.kv_cache_bytes,
        max_model_len: info.max_model_len,
        can_chat: tokenizer.chat_template().is_ok(),
        ignored,
    };
    let max_waiting =
        (args.engine.max_waiting).unwrap_or_else(|| default_max_waiting(options.max_num_seqs));
    let (engine, outputs) = Engine::start(Box::new(loaded.executor), info, max_waiting)?;
    let budget = ByteBudget::new(args.limits.request_memory_bytes);
    let async_engine = AsyncEngine::start(engine.handle(), outputs, Arc::clone(metrics), budget)
        .map_err(StartError::Thread)?;
    let serving = Serving {
        model_name: args.model.served_name(),
        tokenizer,
        pool: TextPool::start(text_threads()).map_err(StartError::Thread)?,
        engine: async_engine,
        defaults,
        max_prompts: args.engine.max_prompts,
        ids: Ids::default(),
        created: unix_time(),
    };
    Ok(Started {
        serving,
        engine,
        summary,
    })
}

fn load_tokenizer(files: &ModelFiles) -> Result<Tokenizer, StartError> {
    let tokenizer_config = files.open("tokenizer_config.json")?;
    let chat_template = files.open("chat_template.jinja")?;
    Ok(Tokenizer::load(TextFiles {
        tokenizer: &files.require("tokenizer.json")?,
        tokenizer_config: tokenizer_config.as_deref(),
        chat_template: chat_template.as_deref(),
    })?)
}

fn load_defaults(files: &ModelFiles) -> Result<(SamplingDefaults, Vec<String>), StartError> {
    match files.open("generation_config.json")? {
        Some(bytes) => {
            SamplingDefaults::from_generation_config(&bytes).map_err(StartError::GenerationConfig)
        }
        None => Ok((SamplingDefaults::default(), Vec::new())),
    }
}

fn dtype_name(dtype: Dtype) -> &'static str {
    match dtype {
        Dtype::F32 => "float32",
        Dtype::F16 => "float16",
        Dtype::BF16 => "bfloat16",
    }
}

fn options(args: &Args, preferred: Preferences) -> LoadOptions {
    let at_least_one = |n: u32| NonZeroU32::new(n).unwrap_or(NonZeroU32::MIN);
    let engine = &args.engine;
    let max_tokens = engine.max_num_batched_tokens;
    let max_sequences = engine.max_num_seqs.unwrap_or_else(|| {
        preferred
            .max_sequences
            .min(max_tokens.unwrap_or(preferred.max_tokens))
    });
    let max_tokens = max_tokens.unwrap_or(preferred.max_tokens.max(max_sequences));
    LoadOptions {
        block_size: at_least_one(engine.block_size),
        max_model_len: args.model.max_model_len.map(at_least_one),
        max_num_seqs: at_least_one(max_sequences),
        max_num_batched_tokens: at_least_one(max_tokens),
        n_blocks: engine.n_blocks.map(at_least_one),
        memory_utilization: engine.memory_utilization,
        precision: match args.model.dtype {
            DtypeChoice::Auto => preferred.precision,
            DtypeChoice::BFloat16 => Some(Precision::BF16),
            DtypeChoice::Float32 => Some(Precision::F32),
        },
        memory_limit: None,
    }
}

fn default_max_waiting(max_num_seqs: NonZeroU32) -> u32 {
    WAITING_PER_SLOT
        .saturating_mul(max_num_seqs.get())
        .max(LEAST_WAITING)
}

/// The container's share of the machine counts: more threads than that wait for each other.
fn compute_threads(asked: Option<NonZeroUsize>) -> NonZeroUsize {
    asked
        .or_else(|| std::thread::available_parallelism().ok())
        .unwrap_or(NonZeroUsize::MIN)
}

/// A quarter of the cores, at most four: the engine wants the rest.
fn text_threads() -> NonZeroUsize {
    let cores = std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
    NonZeroUsize::new((cores / 4).clamp(1, 4)).unwrap_or(NonZeroUsize::MIN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_queue_follows_from_the_slots_and_is_never_short() {
        for (slots, waiting) in [(2, 256), (32, 256), (64, 512), (512, 4096)] {
            let slots = NonZeroU32::new(slots).unwrap();
            assert_eq!(default_max_waiting(slots), waiting, "{slots} slots");
        }
    }
}
