//! The flags of `kvasir-server`. They carry vLLM's names where the meaning is the same; each has an environment
//! variable, `KVASIR_` and its name. All mistakes are found before any is reported. It knows what values mean
//! something, not what they do.

use std::ffi::OsString;
use std::fmt::Display;
use std::net::IpAddr;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use clap::builder::{Resettable, ValueParser};
use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{Arg, ArgMatches, Command, CommandFactory, FromArgMatches, Parser};
pub use kvasir_kernels::choice::DeviceChoice;

use crate::access::keys::{ApiKey, KEY_FORM};
use crate::access::origins::AllowedOrigins;
use crate::hub::{self, Repository};
use crate::text::tool_calls::ToolCallFormat;

/// What to serve, and how; only valid values.
#[derive(Clone, Debug, PartialEq, Parser)]
#[command(
    name = "kvasir-server",
    version,
    about = "Serves a language model behind an OpenAI-compatible API.",
    after_help = "`kvasir-server plan MODEL` tells what a model needs without loading it; see `kvasir-server plan --help`."
)]
pub struct Args {
    /// What is served.
    #[command(flatten)]
    pub model: ModelArgs,
    /// Where it is served.
    #[command(flatten)]
    pub ports: PortArgs,
    /// The engine's sizes.
    #[command(flatten)]
    pub engine: EngineArgs,
    /// What clients may cost.
    #[command(flatten)]
    pub limits: LimitArgs,
    /// Who may ask.
    #[command(flatten)]
    pub access: AccessArgs,
    /// How connections are encrypted.
    #[command(flatten)]
    pub tls: TlsArgs,
    /// How the server ends.
    #[command(flatten)]
    pub drain: DrainArgs,
    /// How log lines look: text or json.
    #[arg(long, default_value = "text", value_parser = choice(&[("text", LogFormat::Text), ("json", LogFormat::Json)]))]
    pub log_format: LogFormat,
}

/// What `kvasir-server plan` is asked: what a model needs. The server's own flags count as they would there.
#[derive(Clone, Debug, PartialEq, Parser)]
pub struct PlanArgs {
    /// The model, as --model takes it, which it goes before.
    #[arg(value_name = "MODEL", value_parser = model_source)]
    model: Option<ModelSource>,
    /// The memory of the device in GiB, whether this machine has such a one or not; --device auto is the CPU then
    /// [default: this machine's].
    #[arg(long, value_parser = gibibytes)]
    pub memory_gib: Option<u64>,
    /// Print JSON: bytes, tokens and blocks.
    #[arg(long)]
    pub json: bool,
    /// How it would be served.
    #[command(flatten)]
    pub server: Args,
}

/// What is to be done.
#[derive(Clone, Debug, PartialEq)]
pub enum CommandLine {
    /// Serve.
    Serve(Args),
    /// Tell what serving takes.
    Plan(PlanArgs),
}

impl CommandLine {
    /// Reads a command line (its first item is the program) and the environment.
    pub fn parse_from(
        line: impl IntoIterator<Item = impl Into<OsString>>,
    ) -> Result<Self, ArgsError> {
        let mut line: Vec<OsString> = line.into_iter().map(Into::into).collect();
        if line.get(1).is_none_or(|word| word != "plan") {
            return Args::parse_from(line).map(CommandLine::Serve);
        }
        line.remove(1);
        // The flags of the server bring its own words along.
        let command = command::<PlanArgs>()
            .name("kvasir-server plan")
            .about("Tells what serving a model takes and what fits, from config.json and the headers of its weights' files.")
            .after_help(Resettable::Reset);
        let matches = matches(&command, &line)?;
        let mut args = PlanArgs::from_arg_matches(&matches).map_err(ArgsError::Usage)?;
        if let Some(model) = args.model.take() {
            args.server.model.source = model;
        }
        args.server
            .checked()
            .map(|server| CommandLine::Plan(PlanArgs { server, ..args }))
    }
}

/// The model and its device.
#[derive(Clone, Debug, PartialEq, clap::Args)]
pub struct ModelArgs {
    /// The model: `demo` (a small one inside this program), a Hugging Face model directory, or hf://OWNER/NAME, with
    /// @REVISION behind it for another one than `main`: fetched from a hub (HF_ENDPOINT, HF_TOKEN).
    #[arg(long = "model", default_value = "demo", value_parser = model_source)]
    pub source: ModelSource,
    /// Where models from a hub are kept, as Hugging Face's tools keep them [default: HF_HUB_CACHE, or
    /// ~/.cache/huggingface/hub].
    #[arg(long)]
    pub download_dir: Option<PathBuf>,
    /// The name that clients ask for [default: kvasir-demo, the directory's name, or OWNER/NAME].
    #[arg(long, value_parser = name)]
    served_model_name: Option<String>,
    /// The precision to serve in: auto, bfloat16 or float32.
    #[arg(long, default_value = "auto", value_parser = choice(&[
        ("auto", DtypeChoice::Auto), ("bfloat16", DtypeChoice::BFloat16), ("float32", DtypeChoice::Float32),
    ]))]
    pub dtype: DtypeChoice,
    /// The device to serve on: auto, cpu or cuda.
    #[arg(long, default_value = "auto", value_parser = choice(&[
        ("auto", DeviceChoice::Auto), ("cpu", DeviceChoice::Cpu), ("cuda", DeviceChoice::Cuda),
    ]))]
    pub device: DeviceChoice,
    /// How the model writes tool calls: auto (by its chat template), none, hermes, llama3_json, pythonic, mistral,
    /// phi4_mini_json or qwen3_coder.
    #[arg(long, default_value = "auto", value_parser = choice(&[
        ("auto", ToolCallChoice::Auto), ("none", ToolCallChoice::None),
        ("hermes", ToolCallChoice::Format(ToolCallFormat::Hermes)),
        ("llama3_json", ToolCallChoice::Format(ToolCallFormat::Llama3Json)),
        ("pythonic", ToolCallChoice::Format(ToolCallFormat::Pythonic)),
        ("mistral", ToolCallChoice::Format(ToolCallFormat::Mistral)),
        ("phi4_mini_json", ToolCallChoice::Format(ToolCallFormat::Phi4Mini)),
        ("qwen3_coder", ToolCallChoice::Format(ToolCallFormat::Qwen3Coder)),
    ]))]
    pub tool_call_parser: ToolCallChoice,
    /// How the model's reasoning is told apart from its answer: auto (by its chat template), none, or think (`<think>` tags).
    #[arg(long, default_value = "auto", value_parser = choice(&[
        ("auto", ReasoningChoice::Auto), ("none", ReasoningChoice::None), ("think", ReasoningChoice::Think),
    ]))]
    pub reasoning_parser: ReasoningChoice,
    /// The longest context in tokens, prompt and answer together [default: the model's own].
    #[arg(long, value_parser = positive::<u32>)]
    pub max_model_len: Option<u32>,
}

impl ModelArgs {
    /// The name that clients ask for.
    pub fn served_name(&self) -> String {
        match (&self.served_model_name, &self.source) {
            (Some(name), _) => name.clone(),
            (None, ModelSource::Demo) => "kvasir-demo".into(),
            (None, ModelSource::HuggingFace(repository)) => repository.name.clone(),
            (None, ModelSource::Directory(path)) => {
                let path = path.canonicalize().unwrap_or_else(|_| path.clone());
                path.file_name().map_or_else(
                    || "model".into(),
                    |name| name.to_string_lossy().into_owned(),
                )
            }
        }
    }
}

/// Address and ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::Args)]
pub struct PortArgs {
    /// The address to listen on.
    #[arg(long, default_value = "127.0.0.1", value_parser = address)]
    pub host: IpAddr,
    /// The port to listen on; 0 lets the system choose.
    #[arg(long, default_value = "8000", value_parser = within(0_u16, u16::MAX))]
    pub port: u16,
    /// A port of its own for /health, /ready, /load and /metrics, which no crowd on --port can take away; 0 lets the
    /// system choose [default: they are served on --port].
    #[arg(long, value_parser = within(0_u16, u16::MAX))]
    pub management_port: Option<u16>,
}

/// The engine's sizes.
#[derive(Clone, Copy, Debug, PartialEq, clap::Args)]
pub struct EngineArgs {
    /// Requests in one step at most [default: 64 on the CPU; on a GPU four for each GiB of its memory, 512 on an H200].
    #[arg(long, value_parser = within(1_u32, 4096))]
    pub max_num_seqs: Option<u32>,
    /// Tokens in one step at most, prompts and answers together [default: 512 on the CPU, 8192 on a GPU].
    #[arg(long, value_parser = within(1_u32, 65536))]
    pub max_num_batched_tokens: Option<u32>,
    /// Tokens in one block of the KV cache.
    #[arg(long, default_value = "16", value_parser = within(1_u32, 1024))]
    pub block_size: u32,
    /// The part of the memory limit that the server may use, on every device.
    #[arg(long = "gpu-memory-utilization", default_value = "0.9", value_parser = part)]
    pub memory_utilization: f64,
    /// Blocks of the KV cache, in place of what the memory has room for.
    #[arg(long = "num-gpu-blocks-override", value_parser = positive::<u32>)]
    pub n_blocks: Option<u32>,
    /// Keep blocks that no sequence holds for what they hold, and use them again where a prompt begins alike; the default.
    #[arg(long, overrides_with = "no_enable_prefix_caching")]
    pub enable_prefix_caching: bool,
    /// Compute every prompt from its first token.
    #[arg(long, overrides_with = "enable_prefix_caching")]
    pub no_enable_prefix_caching: bool,
    /// While prompts are computed beside streams, a step takes at most so many times as long as one without prompts; 0:
    /// prompts fill every step, which gives the most tokens a second and stalls the streams.
    #[arg(long, default_value = "2.9", value_parser = stretch)]
    pub max_decode_stretch: DecodeStretch,
    /// Threads that compute [default: the cores of this machine or container].
    #[arg(long, value_parser = n_threads)]
    pub threads: Option<NonZeroUsize>,
    /// Requests that may wait; more are answered with 429 [default: eight times --max-num-seqs, at least 256].
    #[arg(long, value_parser = positive::<u32>)]
    pub max_waiting: Option<u32>,
    /// Prompts in one call at most.
    #[arg(long, default_value = "128", value_parser = positive::<usize>)]
    pub max_prompts: usize,
}

impl EngineArgs {
    /// Prefixes are cached.
    pub fn prefix_caching(&self) -> bool {
        !self.no_enable_prefix_caching
    }
}

/// What clients may cost.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::Args)]
pub struct LimitArgs {
    /// Connections at most; more get probes answered, and 503 for the rest.
    #[arg(long, default_value = "1024", value_parser = within(1_usize, 1_000_000))]
    pub max_connections: usize,
    /// Bytes of a request's body at most.
    #[arg(long, default_value = "8388608", value_parser = positive::<usize>)]
    pub max_body_bytes: usize,
    /// Bytes of all bodies and answers under way at most; requests beyond it are answered with 429.
    #[arg(long, default_value = "268435456", value_parser = positive::<usize>)]
    pub request_memory_bytes: usize,
    /// Time for a request's head to arrive, and again for its body.
    #[arg(long = "read-timeout-seconds", default_value = "30", value_parser = seconds)]
    pub read_timeout: Duration,
    /// /health fails when the engine has made no step for so long.
    #[arg(long = "heartbeat-timeout-seconds", default_value = "120", value_parser = seconds)]
    pub heartbeat_timeout: Duration,
}

/// Who may ask, and how much. What is limited is limited for each API key, on this replica.
#[derive(Clone, Debug, PartialEq, Eq, clap::Args)]
pub struct AccessArgs {
    /// A key that every route of --port asks for but /health and /ready, as KEY or NAME:KEY; may be given again. Prefer
    /// --api-key-file: command lines are seen by others.
    #[arg(long = "api-key", value_name = "KEY", num_args(1..), hide_env_values = true, value_parser = api_key)]
    pub api_keys: Vec<ApiKey>,
    /// A file of such keys, one a line; it is read again when it changes.
    #[arg(long, value_name = "FILE")]
    pub api_key_file: Option<PathBuf>,
    /// Calls to the model that each key may make in a minute on this replica; 0: any number.
    #[arg(long, default_value = "0", value_parser = within(0_u32, u32::MAX))]
    pub requests_per_minute: u32,
    /// Tokens, of prompts and generated, that each key may use in a minute on this replica; 0: any number.
    #[arg(long, default_value = "0", value_parser = within(0_u32, u32::MAX))]
    pub tokens_per_minute: u32,
    /// Calls to the model that each key may have under way at once on this replica; 0: any number.
    #[arg(long, default_value = "0", value_parser = within(0_u32, u32::MAX))]
    pub max_concurrent_requests: u32,
    /// Log a line for each request to --port: route, status, tokens, times and the key's name, no prompts.
    #[arg(long)]
    pub access_log: bool,
    /// Serve /tokenizer_info: tokenizer_config.json with the chat template.
    #[arg(long)]
    pub enable_tokenizer_info_endpoint: bool,
    /// Web pages that may call --port from a browser: a JSON list of their origins, or ["*"] [default: none].
    #[arg(long, value_name = "ORIGINS", default_value = "[]", hide_default_value = true, value_parser = AllowedOrigins::parse)]
    pub allowed_origins: AllowedOrigins,
}

impl AccessArgs {
    /// Keys are asked for.
    pub fn has_keys(&self) -> bool {
        !self.api_keys.is_empty() || self.api_key_file.is_some()
    }

    fn limits(&self) -> [(&'static str, u32); 3] {
        [
            ("requests-per-minute", self.requests_per_minute),
            ("tokens-per-minute", self.tokens_per_minute),
            ("max-concurrent-requests", self.max_concurrent_requests),
        ]
    }
}

/// How connections to the API's port are encrypted.
#[derive(Clone, Debug, PartialEq, Eq, clap::Args)]
pub struct TlsArgs {
    /// The certificate in PEM, and those that it is signed by: --port then speaks TLS. It is read again when it changes.
    #[arg(long, value_name = "FILE")]
    pub ssl_certfile: Option<PathBuf>,
    /// Its private key in PEM, not encrypted.
    #[arg(long, value_name = "FILE")]
    pub ssl_keyfile: Option<PathBuf>,
}

/// How the server ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::Args)]
pub struct DrainArgs {
    /// After SIGTERM, requests are still accepted for so long.
    #[arg(long = "drain-accept-seconds", default_value = "5", value_parser = seconds)]
    pub accept: Duration,
    /// Then answers under way have so long to finish.
    #[arg(long = "drain-seconds", default_value = "60", value_parser = seconds)]
    pub finish: Duration,
}

/// What [`EngineArgs::max_decode_stretch`] says: 0, or a number from 1.1 to 1000.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DecodeStretch(f64);

impl DecodeStretch {
    /// `None` where there is no bound.
    pub fn bound(self) -> Option<f64> {
        (self.0 > 0.0).then_some(self.0)
    }
}

/// Where the model is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ModelSource {
    /// Inside this program.
    Demo,
    /// A directory as Hugging Face writes it.
    Directory(PathBuf),
    /// A repository on a hub.
    HuggingFace(Repository),
}

/// The precision to serve in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DtypeChoice {
    /// The best that model and device have.
    Auto,
    /// bfloat16.
    BFloat16,
    /// float32.
    Float32,
}

/// How tool calls are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ToolCallChoice {
    /// By the chat template.
    Auto,
    /// Not at all.
    None,
    /// In this format.
    Format(ToolCallFormat),
}

/// How reasoning is told apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReasoningChoice {
    /// By the chat template.
    Auto,
    /// Not at all.
    None,
    /// By `<think>` tags.
    Think,
}

/// How log lines look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    Text,
    /// For programs.
    Json,
}

/// Why there is nothing to serve.
#[derive(Debug)]
pub enum ArgsError {
    /// Flags that don't exist, and `--help`: clap's own words.
    Usage(clap::Error),
    /// Values that don't fit, one sentence each.
    Mistakes(Vec<String>),
}

impl Args {
    /// Reads a command line (its first item is the program) and the environment.
    pub fn parse_from(
        line: impl IntoIterator<Item = impl Into<OsString>>,
    ) -> Result<Self, ArgsError> {
        let line: Vec<OsString> = line.into_iter().map(Into::into).collect();
        let matches = matches(&command::<Self>(), &line)?;
        let args = Self::from_arg_matches(&matches).map_err(ArgsError::Usage)?;
        args.checked()
    }

    fn checked(self) -> Result<Self, ArgsError> {
        match self.contradictions() {
            contradictions if contradictions.is_empty() => Ok(self),
            contradictions => Err(ArgsError::Mistakes(contradictions)),
        }
    }

    /// What two values that are right alone can't mean together.
    fn contradictions(&self) -> Vec<String> {
        let mut found = Vec::new();
        let PortArgs {
            port,
            management_port,
            ..
        } = self.ports;
        if port != 0 && management_port == Some(port) {
            found.push(format!(
                "--management-port: {port} is --port too; choose another"
            ));
        }
        let EngineArgs {
            max_num_seqs,
            max_num_batched_tokens,
            ..
        } = self.engine;
        if let (Some(seqs), Some(tokens)) = (max_num_seqs, max_num_batched_tokens)
            && tokens < seqs
        {
            found.push(format!(
                "--max-num-batched-tokens: {tokens} is less than --max-num-seqs, {seqs}; a step needs one token for each request"
            ));
        }
        for (flag, n) in self.access.limits() {
            if n > 0 && !self.access.has_keys() {
                found.push(format!(
                    "--{flag}: it is a limit for each API key; give keys with --api-key-file"
                ));
            }
        }
        let TlsArgs {
            ssl_certfile,
            ssl_keyfile,
        } = &self.tls;
        if ssl_certfile.is_some() != ssl_keyfile.is_some() {
            found.push(
                "--ssl-certfile and --ssl-keyfile: TLS needs both; give the other too".to_owned(),
            );
        }
        found
    }
}

/// The flags, each with its environment variable.
fn command<A: CommandFactory>() -> Command {
    A::command().mut_args(|arg| match arg.get_long().map(variable) {
        Some(variable) => arg.env(variable),
        None => arg,
    })
}

/// `KVASIR_MAX_MODEL_LEN` for `max-model-len`. Kept for the life of the process, as clap wants it.
fn variable(long: &str) -> &'static str {
    format!("KVASIR_{}", long.replace('-', "_").to_uppercase()).leak()
}

/// Reads the line; where a value doesn't fit, again and again without checking it, to find the others.
fn matches(command: &Command, line: &[OsString]) -> Result<ArgMatches, ArgsError> {
    let (mut unchecked, mut mistakes) = (Vec::new(), Vec::new());
    loop {
        let command = unchecked.iter().fold(command.clone(), |command, id| {
            command.mut_arg(id, |arg: Arg| arg.value_parser(ValueParser::os_string()))
        });
        match command.clone().try_get_matches_from(line) {
            Ok(matches) if mistakes.is_empty() => return Ok(matches),
            Ok(_) => return Err(ArgsError::Mistakes(mistakes)),
            Err(error) => match mistake(&command, &error) {
                Some((id, mistake)) => {
                    unchecked.push(id);
                    mistakes.push(mistake);
                }
                None => return Err(ArgsError::Usage(error)),
            },
        }
    }
}

/// The flag whose value doesn't fit, and what is wrong with it in a sentence.
fn mistake(command: &Command, error: &clap::Error) -> Option<(clap::Id, String)> {
    if error.kind() != ErrorKind::ValueValidation {
        return None;
    }
    let text = |kind| match error.get(kind) {
        Some(ContextValue::String(text)) => Some(text.as_str()),
        _ => None,
    };
    // `--port <PORT>`
    let flag = text(ContextKind::InvalidArg)?.split(' ').next()?;
    let found = text(ContextKind::InvalidValue)?;
    let expected = std::error::Error::source(error)?;
    let name = flag.trim_matches(['<', '>', '[', ']']);
    let is_flag = |arg: &&Arg| match flag.strip_prefix("--") {
        Some(long) => arg.get_long() == Some(long),
        None => arg
            .get_value_names()
            .is_some_and(|names| names.iter().any(|it| it == name)),
    };
    let arg = command.get_arguments().find(is_flag)?;
    let flag = if flag.starts_with("--") { flag } else { name };
    let mistake = match arg.is_hide_env_values_set() {
        // A secret.
        true => format!("{flag}: what was given is not {expected}"),
        false => format!("{flag}: {found:?} is not {expected}"),
    };
    Some((arg.get_id().clone(), mistake))
}

// What follows reads one value; the error is what was expected.

fn within<T>(low: T, high: T) -> impl Fn(&str) -> Result<T, String> + Clone
where
    T: FromStr + PartialOrd + Display + Clone,
{
    move |found| match found.parse() {
        Ok(n) if (low.clone()..=high.clone()).contains(&n) => Ok(n),
        _ => Err(format!("a number from {low} to {high}")),
    }
}

fn positive<T: FromStr + PartialOrd + From<u8>>(found: &str) -> Result<T, String> {
    match found.parse() {
        Ok(n) if n > T::from(0) => Ok(n),
        _ => Err("a number above 0".to_owned()),
    }
}

fn n_threads(found: &str) -> Result<NonZeroUsize, String> {
    found.parse().map_err(|_| "a number above 0".to_owned())
}

fn part(found: &str) -> Result<f64, String> {
    match found.parse() {
        Ok(part) if part > 0.0 && part <= 1.0 => Ok(part),
        _ => Err("a number above 0, at most 1".to_owned()),
    }
}

fn gibibytes(found: &str) -> Result<u64, String> {
    const GIB: f64 = 1024.0 * 1024.0 * 1024.0;
    match found.parse::<f64>() {
        Ok(gib) if gib > 0.0 && gib <= 1e6 => Ok((gib * GIB) as u64),
        _ => Err("a number of GiB above 0".to_owned()),
    }
}

fn stretch(found: &str) -> Result<DecodeStretch, String> {
    match found.parse() {
        Ok(stretch) if stretch == 0.0 || (1.1..=1000.0).contains(&stretch) => {
            Ok(DecodeStretch(stretch))
        }
        _ => Err("0 or a number from 1.1 to 1000".to_owned()),
    }
}

fn seconds(found: &str) -> Result<Duration, String> {
    match found.parse() {
        Ok(seconds) if (0.0..=86400.0).contains(&seconds) => Ok(Duration::from_secs_f64(seconds)),
        _ => Err("a number of seconds from 0 to 86400".to_owned()),
    }
}

fn address(found: &str) -> Result<IpAddr, String> {
    let expected = "an IP address such as 127.0.0.1 or 0.0.0.0";
    found.parse().map_err(|_| expected.to_owned())
}

fn choice<T: Copy>(
    choices: &'static [(&'static str, T)],
) -> impl Fn(&str) -> Result<T, String> + Clone {
    move |found| match choices.iter().find(|(name, _)| *name == found) {
        Some((_, value)) => Ok(*value),
        None => {
            let names: Vec<&str> = choices.iter().map(|(name, _)| *name).collect();
            Err(format!("one of {}", names.join(", ")))
        }
    }
}

fn model_source(found: &str) -> Result<ModelSource, String> {
    match Path::new(found) {
        _ if found == "demo" => Ok(ModelSource::Demo),
        _ if found.starts_with(hub::SCHEME) => found.parse().map(ModelSource::HuggingFace),
        path if path.is_dir() => Ok(ModelSource::Directory(path.to_owned())),
        _ => Err("\"demo\", an existing directory, or hf://OWNER/NAME".to_owned()),
    }
}

fn api_key(found: &str) -> Result<ApiKey, String> {
    ApiKey::parse(found).ok_or_else(|| KEY_FORM.to_owned())
}

fn name(found: &str) -> Result<String, String> {
    match found.trim().is_empty() {
        true => Err("a name".to_owned()),
        false => Ok(found.to_owned()),
    }
}

#[cfg(test)]
mod tests;
