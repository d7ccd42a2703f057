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

use clap::builder::ValueParser;
use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{Arg, ArgMatches, Command, CommandFactory, FromArgMatches, Parser};
pub use kvasir_kernels::choice::DeviceChoice;

use crate::access::keys::{ApiKey, KEY_FORM};
use crate::access::origins::AllowedOrigins;

/// What to serve, and how; only valid values.
#[derive(Clone, Debug, PartialEq, Parser)]
#[command(
    name = "kvasir-server",
    version,
    about = "Serves a language model behind an OpenAI-compatible API."
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

/// The model and its device.
#[derive(Clone, Debug, PartialEq, clap::Args)]
pub struct ModelArgs {
    /// The model: `demo` (a small one inside this program) or a Hugging Face model directory.
    #[arg(long = "model", default_value = "demo", value_parser = model_source)]
    pub source: ModelSource,
    /// The name that clients ask for [default: kvasir-demo, or the directory's name].
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
        let matches = matches(&line)?;
        let args = Self::from_arg_matches(&matches).map_err(ArgsError::Usage)?;
        match args.contradictions() {
            contradictions if contradictions.is_empty() => Ok(args),
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
fn command() -> Command {
    Args::command().mut_args(|arg| match arg.get_long().map(variable) {
        Some(variable) => arg.env(variable),
        None => arg,
    })
}

/// `KVASIR_MAX_MODEL_LEN` for `max-model-len`. Kept for the life of the process, as clap wants it.
fn variable(long: &str) -> &'static str {
    format!("KVASIR_{}", long.replace('-', "_").to_uppercase()).leak()
}

/// Reads the line; where a value doesn't fit, again and again without checking it, to find the others.
fn matches(line: &[OsString]) -> Result<ArgMatches, ArgsError> {
    let (mut unchecked, mut mistakes) = (Vec::new(), Vec::new());
    loop {
        let command = unchecked.iter().fold(command(), |command, id| {
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
    let is_flag = |arg: &&Arg| arg.get_long() == flag.strip_prefix("--");
    let arg = command.get_arguments().find(is_flag)?;
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
        path if path.is_dir() => Ok(ModelSource::Directory(path.to_owned())),
        _ => Err("\"demo\" or an existing directory".to_owned()),
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
mod tests {
    use super::*;

    fn parse(flags: &[&str]) -> Result<Args, Vec<String>> {
        match Args::parse_from(std::iter::once("kvasir-server").chain(flags.iter().copied())) {
            Ok(args) => Ok(args),
            Err(ArgsError::Mistakes(mistakes)) => Err(mistakes),
            Err(ArgsError::Usage(e)) => panic!("{e}"),
        }
    }

    #[test]
    fn the_defaults_serve_the_demo_model() {
        let args = parse(&[]).unwrap();
        assert_eq!(args.model.source, ModelSource::Demo);
        assert_eq!(args.model.served_name(), "kvasir-demo");
        let PortArgs {
            host,
            port,
            management_port,
        } = args.ports;
        assert_eq!((host.to_string().as_str(), port), ("127.0.0.1", 8000));
        assert_eq!(management_port, None);
    }

    #[test]
    fn prefixes_are_cached_unless_the_last_word_is_no() {
        let (yes, no) = ("--enable-prefix-caching", "--no-enable-prefix-caching");
        for (flags, want) in [
            (&[] as &[&str], true),
            (&[yes], true),
            (&[no], false),
            (&[yes, no], false),
            (&[no, yes], true),
        ] {
            assert_eq!(
                parse(flags).unwrap().engine.prefix_caching(),
                want,
                "{flags:?}"
            );
        }
    }

    #[test]
    fn streams_may_be_stretched_by_what_is_told() {
        let stretch = |flags: &[&str]| {
            let args = parse(flags)?;
            Ok::<_, Vec<String>>(args.engine.max_decode_stretch.bound())
        };
        let flag = "--max-decode-stretch";
        assert_eq!(stretch(&[]), Ok(Some(crate::engine::pacer::DECODE_STRETCH)));
        assert_eq!(stretch(&[flag, "5.5"]), Ok(Some(5.5)));
        assert_eq!(stretch(&[flag, "0"]), Ok(None));
        for wrong in ["1", "-1", "NaN", "1e9"] {
            let flag = format!("{flag}={wrong}");
            let mistake =
                format!("--max-decode-stretch: {wrong:?} is not 0 or a number from 1.1 to 1000");
            assert_eq!(stretch(&[&flag]), Err(vec![mistake]));
        }
    }

    #[test]
    fn all_mistakes_are_reported_at_once() {
        let mut mistakes = parse(&[
            "--port",
            "x",
            "--dtype",
            "int4",
            "--model",
            "/no/such",
            "--gpu-memory-utilization",
            "0",
            "--device",
            "tpu",
            "--read-timeout-seconds=-1",
            "--block-size",
            "4096",
            "--threads",
            "0",
        ])
        .unwrap_err();
        mistakes.sort();
        assert_eq!(
            mistakes,
            [
                "--block-size: \"4096\" is not a number from 1 to 1024",
                "--device: \"tpu\" is not one of auto, cpu, cuda",
                "--dtype: \"int4\" is not one of auto, bfloat16, float32",
                "--gpu-memory-utilization: \"0\" is not a number above 0, at most 1",
                "--model: \"/no/such\" is not \"demo\" or an existing directory",
                "--port: \"x\" is not a number from 0 to 65535",
                "--read-timeout-seconds: \"-1\" is not a number of seconds from 0 to 86400",
                "--threads: \"0\" is not a number above 0",
            ]
        );
    }

    #[test]
    fn contradictions_are_sentences() {
        for (flags, want) in [
            (
                ["--max-num-batched-tokens", "8", "--max-num-seqs", "64"],
                "--max-num-batched-tokens: 8 is less than --max-num-seqs, 64; a step needs one token for each request",
            ),
            (
                ["--management-port", "8000", "--port", "8000"],
                "--management-port: 8000 is --port too; choose another",
            ),
        ] {
            assert_eq!(parse(&flags).unwrap_err(), [want]);
        }
        let args = parse(&["--management-port", "0", "--port", "0"]).unwrap();
        assert_eq!(args.ports.management_port, Some(0));
    }

    #[test]
    fn keys_are_never_shown() {
        let flags = ["--api-key", "red:hush-1", "hush-2", "--api-key", "hush-3"];
        let args = parse(&flags).unwrap();
        assert_eq!(args.access.api_keys.len(), 3);
        let shown = format!("{args:?}");
        assert!(shown.contains("red") && !shown.contains("hush"), "{shown}");
        let mistakes = parse(&["--api-key", "hush hush"]).unwrap_err();
        let want = format!("--api-key: what was given is not {KEY_FORM}");
        assert_eq!(mistakes, [want]);
    }

    #[test]
    fn limits_need_keys_and_tls_both_files() {
        let mistakes = |flags: &[&str]| parse(flags).unwrap_err();
        assert_eq!(
            mistakes(&["--tokens-per-minute", "9", "--ssl-keyfile", "key.pem"]),
            [
                "--tokens-per-minute: it is a limit for each API key; give keys with --api-key-file",
                "--ssl-certfile and --ssl-keyfile: TLS needs both; give the other too",
            ]
        );
        let args = parse(&["--tokens-per-minute", "9", "--api-key", "k"]).unwrap();
        assert_eq!(args.access.tokens_per_minute, 9);
        let origins = mistakes(&["--allowed-origins", "https://a.example"]);
        assert!(
            origins[0].contains("is not a JSON list of origins"),
            "{origins:?}"
        );
    }

    #[test]
    fn a_directory_gives_the_name() {
        let directory = tempfile::tempdir().unwrap();
        let model = directory.path().join("my-model");
        std::fs::create_dir(&model).unwrap();
        let model = model.to_str().unwrap();
        let args = parse(&["--model", model]).unwrap();
        assert_eq!(args.model.served_name(), "my-model");
        let args = parse(&["--model", model, "--served-model-name", "n"]).unwrap();
        assert_eq!(args.model.served_name(), "n");
    }

    #[test]
    fn every_flag_has_its_environment_variable() {
        let command = command();
        let variables: Vec<&str> = command
            .get_arguments()
            .map(|arg| arg.get_env().unwrap().to_str().unwrap())
            .collect();
        assert_eq!(variables.len(), 37);
        for variable in [
            "KVASIR_MODEL",
            "KVASIR_PORT",
            "KVASIR_MANAGEMENT_PORT",
            "KVASIR_GPU_MEMORY_UTILIZATION",
            "KVASIR_NUM_GPU_BLOCKS_OVERRIDE",
            "KVASIR_DRAIN_SECONDS",
            "KVASIR_API_KEY",
            "KVASIR_SSL_CERTFILE",
        ] {
            assert!(variables.contains(&variable), "{variable}");
        }
    }
}
