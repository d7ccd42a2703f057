//! From flags to a running engine: fetches and loads the model's files, starts the engine and the output thread.
//!
//! It knows how the parts fit together; what it says to the user is the caller's to print.

use std::num::{NonZeroU32, NonZeroUsize};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvasir_crds::load_report::{ModelReport, StartPhase, StartReport};
use kvasir_kernels::choice::{ChosenDevice, CountedDevice, Preferences};
use kvasir_kernels::device::DeviceError;
use kvasir_kernels::shape::Precision;
use kvasir_kernels::stored::Dtype;

use crate::args::{
    Args, DtypeChoice, ModelArgs, ModelSource, PlanArgs, ReasoningChoice, ToolCallChoice,
};
use crate::engine::{Engine, EngineError, ModelInfo};
use crate::frontend::AsyncEngine;
use crate::frontend::budget::ByteBudget;
use crate::grammar::GrammarCompiler;
use crate::http::{Ids, SamplingDefaults, Serving, unix_time};
use crate::hub::{self, Fetched, Found, HeaderFolder, Hub, HubError, Repository};
use crate::metrics::Metrics;
use crate::model::{self, LoadError, LoadOptions, LoadedModel, MemoryPlan, ModelFiles, Progress};
use crate::text::tokenizer::TextFiles;
use crate::text::tool_calls::ToolCallFormat;
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
    /// How long it took.
    pub start: StartReport,
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
    /// The model can't be had.
    #[error(transparent)]
    Hub(#[from] HubError),
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

/// How far a start has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Starting {
    /// What goes on.
    pub phase: StartPhase,
    /// Bytes that it has come to.
    pub done_bytes: u64,
    /// Of so many; 0 where that isn't known.
    pub total_bytes: u64,
}

/// Fetches, loads and starts everything behind the routes. It takes as long as the weights take to come.
pub fn start(
    args: &Args,
    metrics: &Arc<Metrics>,
    mut progress: impl FnMut(Starting),
) -> Result<Started, StartError> {
    let device = ChosenDevice::find(args.model.device).map_err(StartError::Device)?;
    if let Some(why) = device.why_not_cuda() {
        tracing::info!(why, "serving on the CPU");
    }
    let options = options(args, device.preferences());
    let n_threads = compute_threads(args.engine.threads);
    let examine = |files: &ModelFiles| {
        let counted = device.counted().map_err(StartError::Device)?;
        Examined::new(files, &options, counted, n_threads)
    };
    let begun = Instant::now();
    let Source { files, commit } = open(args, &mut progress, |files| examine(files).map(drop))?;
    let fetched = begun.elapsed();
    // The small files first: what is wrong with them is found before the weights are read.
    let examined = examine(&files)?;
    let loaded = model::load(
        &files,
        &options,
        |options| device.make(options, n_threads),
        |Progress {
             done_bytes,
             total_bytes,
         }| {
            progress(Starting {
                phase: StartPhase::Load,
                done_bytes,
                total_bytes,
            });
        },
    )?;
    let loading = begun.elapsed() - fetched;
    progress(Starting {
        phase: StartPhase::WarmUp,
        done_bytes: 0,
        total_bytes: 0,
    });
    let model = model_report(&loaded, commit.clone());
    let summary = Summary::of(&loaded, &examined);
    let (engine, serving) = serve(args, metrics, loaded, examined, model)?;
    let millis = |duration: Duration| u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
    Ok(Started {
        serving,
        engine,
        summary,
        start: StartReport {
            fetch_ms: commit.map(|_| millis(fetched)),
            load_ms: Some(millis(loading)),
            warm_up_ms: Some(millis(begun.elapsed() - fetched - loading)),
            ..StartReport::default()
        },
    })
}

/// Starts the engine and what stands before it.
fn serve(
    args: &Args,
    metrics: &Arc<Metrics>,
    loaded: LoadedModel,
    examined: Examined,
    model: ModelReport,
) -> Result<(Engine, Serving), StartError> {
    let mut info = loaded.info;
    if !args.engine.prefix_caching() {
        info.prefix_caching = None;
    }
    info.max_decode_stretch = args.engine.max_decode_stretch.bound();
    let slots = u32::try_from(info.limits.max_sequences).unwrap_or(u32::MAX);
    let max_waiting = (args.engine.max_waiting).unwrap_or_else(|| default_max_waiting(slots));
    let (engine, outputs) = Engine::start(Box::new(loaded.executor), info, max_waiting)?;
    let grammars = start_grammars(&examined.tokenizer, engine.handle().model_info())?;
    let budget = ByteBudget::new(args.limits.request_memory_bytes);
    let async_engine = AsyncEngine::start(engine.handle(), outputs, Arc::clone(metrics), budget)
        .map_err(StartError::Thread)?;
    let serving = Serving {
        model_name: args.model.served_name(),
        grammars,
        tool_calls: tool_call_format(&args.model, &examined.tokenizer),
        splits_reasoning: splits_reasoning(&args.model, &examined.tokenizer),
        tokenizer: examined.tokenizer,
        pool: TextPool::start(text_threads()).map_err(StartError::Thread)?,
        engine: async_engine,
        defaults: examined.defaults,
        max_prompts: args.engine.max_prompts,
        ids: Ids::default(),
        created: unix_time(),
        model,
    };
    Ok((engine, serving))
}

impl Summary {
    fn of(loaded: &LoadedModel, examined: &Examined) -> Self {
        let info = &loaded.info;
        Self {
            device: loaded.device.clone(),
            dtype: dtype_name(info.dtype),
            n_blocks: info.n_blocks,
            block_size: info.groups.block_size().get(),
            kv_cache_bytes: loaded.kv_cache_bytes(),
            max_model_len: info.max_model_len,
            can_chat: examined.tokenizer.chat_template().is_ok(),
            ignored: examined.ignored.clone(),
        }
    }
}

fn model_report(loaded: &LoadedModel, commit: Option<String>) -> ModelReport {
    let LoadedModel {
        info, memory, plan, ..
    } = loaded;
    let fit = plan.fit.as_ref().ok();
    ModelReport {
        parameters: Some(plan.n_parameters),
        weights_bytes: Some(memory.weights),
        workspace_bytes: Some(memory.workspace),
        kv_cache_bytes: Some(loaded.kv_cache_bytes()),
        kv_bytes_per_token: Some(plan.kv_bytes_per_token),
        blocks: Some(info.n_blocks.into()),
        max_model_len: Some(info.max_model_len.into()),
        requests_at_context: fit.map(|fit| fit.requests_at_context.into()),
        revision: commit,
    }
}

/// What serving the model takes, against the memory of this machine's device or the one that is asked about.
pub fn plan(args: &PlanArgs) -> Result<MemoryPlan, StartError> {
    let server = &args.server;
    let choice = server.model.device;
    let counted = match args.memory_gib {
        Some(bytes) => CountedDevice::imagined(choice, bytes),
        None => ChosenDevice::find(choice).and_then(|device| device.counted()),
    };
    let counted = counted.map_err(StartError::Device)?;
    let options = LoadOptions {
        memory_limit: args.memory_gib,
        ..options(server, counted.preferences())
    };
    let n_threads = compute_threads(server.engine.threads);
    let plan = |files: &ModelFiles| {
        model::plan(files, &options, |options| counted.make(options, n_threads))
    };
    let ModelSource::HuggingFace(repository) = &server.model.source else {
        return Ok(plan(&open(server, &mut |_| {}, |_| Ok(()))?.files)?);
    };
    let source = HubSource::find(server, repository, &mut |_| {})?;
    match source.headers(&mut |_| {})? {
        Some(headers) => Ok(plan(&ModelFiles::directory(headers.path())?)?),
        None => Ok(plan(&ModelFiles::directory(source.fetch(&mut |_| {})?)?)?),
    }
}

/// Where a model's files are.
struct Source {
    files: ModelFiles,
    /// Of the repository that they come from.
    commit: Option<String>,
}

/// The model's files, fetched where they are on a hub; `examine` sees them before the weights are.
fn open(
    args: &Args,
    progress: &mut impl FnMut(Starting),
    examine: impl FnOnce(&ModelFiles) -> Result<(), StartError>,
) -> Result<Source, StartError> {
    let repository = match &args.model.source {
        ModelSource::Demo => {
            return Ok(Source {
                files: ModelFiles::demo(),
                commit: None,
            });
        }
        ModelSource::Directory(path) => {
            return Ok(Source {
                files: ModelFiles::directory(path)?,
                commit: None,
            });
        }
        ModelSource::HuggingFace(repository) => repository,
    };
    let mut progress = |Fetched {
                            done_bytes,
                            total_bytes,
                        }| {
        progress(Starting {
            phase: StartPhase::Fetch,
            done_bytes,
            total_bytes,
        });
    };
    let source = HubSource::find(args, repository, &mut progress)?;
    if let Some(headers) = source.headers(&mut progress)? {
        examine(&ModelFiles::directory(headers.path())?)?;
    }
    let path = source.fetch(&mut progress)?;
    let commit = source.found.commit().to_owned();
    tracing::info!(%repository, commit, path = %path.display(), "the model's files are there");
    Ok(Source {
        files: ModelFiles::directory(path)?,
        commit: Some(commit),
    })
}

/// A model on a hub.
struct HubSource {
    hub: Arc<Hub>,
    found: Arc<Found>,
}

impl HubSource {
    fn find(
        args: &Args,
        repository: &Repository,
        progress: &mut dyn FnMut(Fetched),
    ) -> Result<Self, HubError> {
        let directory = args.model.download_dir.as_deref();
        let settings = hub::Settings::new(directory, |name| std::env::var(name).ok());
        let hub = Arc::new(Hub::new(&settings)?);
        let (asked, repository) = (Arc::clone(&hub), repository.clone());
        let found = hub::attend(progress, move |job| asked.find(&repository, job))?;
        Ok(Self {
            hub,
            found: Arc::new(found),
        })
    }

    fn headers(&self, progress: &mut dyn FnMut(Fetched)) -> Result<Option<HeaderFolder>, HubError> {
        let (hub, found) = (Arc::clone(&self.hub), Arc::clone(&self.found));
        hub::attend(progress, move |job| hub.headers(&found, job))
    }

    fn fetch(&self, progress: &mut dyn FnMut(Fetched)) -> Result<PathBuf, HubError> {
        let (hub, found) = (Arc::clone(&self.hub), Arc::clone(&self.found));
        hub::attend(progress, move |job| hub.fetch(&found, job))
    }
}

/// What is known of a model without its weights: its text files are whole, and it fits.
struct Examined {
    tokenizer: Arc<Tokenizer>,
    defaults: SamplingDefaults,
    ignored: Vec<String>,
}

impl Examined {
    fn new(
        files: &ModelFiles,
        options: &LoadOptions,
        counted: CountedDevice,
        n_threads: NonZeroUsize,
    ) -> Result<Self, StartError> {
        let tokenizer = Arc::new(load_tokenizer(files)?);
        let (defaults, ignored) = load_defaults(files)?;
        let plan = model::plan(files, options, |options| counted.make(options, n_threads))?;
        plan.fit.map_err(LoadError::from)?;
        Ok(Self {
            tokenizer,
            defaults,
            ignored,
        })
    }
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

fn start_grammars(tokenizer: &Tokenizer, info: &ModelInfo) -> Result<GrammarCompiler, StartError> {
    let vocabulary = Arc::clone(tokenizer.vocabulary());
    GrammarCompiler::start(
        vocabulary,
        info.vocab_size,
        &info.eos_token_ids,
        text_threads(),
    )
    .map_err(StartError::Thread)
}

fn tool_call_format(args: &ModelArgs, tokenizer: &Tokenizer) -> Option<ToolCallFormat> {
    match args.tool_call_parser {
        ToolCallChoice::Auto => tokenizer.chat_template().ok()?.style().tool_calls,
        ToolCallChoice::None => None,
        ToolCallChoice::Format(format) => Some(format),
    }
}

fn splits_reasoning(args: &ModelArgs, tokenizer: &Tokenizer) -> bool {
    match args.reasoning_parser {
        ReasoningChoice::Auto => tokenizer
            .chat_template()
            .is_ok_and(|template| template.style().thinks),
        ReasoningChoice::None => false,
        ReasoningChoice::Think => true,
    }
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

fn default_max_waiting(slots: u32) -> u32 {
    WAITING_PER_SLOT.saturating_mul(slots).max(LEAST_WAITING)
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
            assert_eq!(default_max_waiting(slots), waiting, "{slots} slots");
        }
    }
}
