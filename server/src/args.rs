//! The flags of `kvasir-server`. They carry vLLM's names where the meaning is the same; each has an environment
//! variable. All mistakes are found before any is reported. It knows what values mean something, not what they do.

use std::ffi::OsString;
use std::fmt::Display;
use std::net::IpAddr;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use clap::Parser;
pub use kvasir_kernels::choice::DeviceChoice;

/// What to serve, and how; only valid values.
#[derive(Clone, Debug, PartialEq)]
pub struct Args {
    /// `--model`.
    pub model: ModelSource,
    /// `--served-model-name`, or the model's own.
    pub served_model_name: String,
    /// `--host`.
    pub host: IpAddr,
    /// `--port`; 0 lets the system choose.
    pub port: u16,
    /// `--management-port`; `None` serves everything on `port`, 0 lets the system choose.
    pub management_port: Option<u16>,
    /// `--dtype`.
    pub dtype: DtypeChoice,
    /// `--device`.
    pub device: DeviceChoice,
    /// `--max-model-len`; `None` takes the model's own.
    pub max_model_len: Option<u32>,
    /// `--max-num-seqs`; `None` takes what suits the device.
    pub max_num_seqs: Option<u32>,
    /// `--max-num-batched-tokens`; `None` takes what suits the device, at least `max_num_seqs`.
    pub max_num_batched_tokens: Option<u32>,
    /// `--block-size`.
    pub block_size: u32,
    /// `--gpu-memory-utilization`: in (0, 1].
    pub memory_utilization: f64,
    /// `--num-gpu-blocks-override`.
    pub n_blocks: Option<u32>,
    /// `--threads`; `None` takes the cores of this machine or container.
    pub threads: Option<NonZeroUsize>,
    /// `--max-waiting`.
    pub max_waiting: u32,
    /// `--max-prompts`.
    pub max_prompts: usize,
    /// `--max-connections`, `--max-body-bytes`, `--read-timeout-seconds`, `--heartbeat-timeout-seconds`.
    pub limits: crate::http::Limits,
    /// `--drain-accept-seconds`: requests are still accepted for so long after SIGTERM.
    pub drain_accept: Duration,
    /// `--drain-seconds`: then answers under way have so long.
    pub drain: Duration,
    /// `--log-format`.
    pub log_format: LogFormat,
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

/// The flags as written. Values are texts here, so that all mistakes in them are found, not only the first.
#[derive(Debug, Parser)]
#[command(
    name = "kvasir-server",
    version,
    about = "Serves a language model behind an OpenAI-compatible API."
)]
struct Written {
    /// The model: `demo` (a small one inside this program) or a Hugging Face model directory.
    #[arg(long, env = "KVASIR_MODEL", default_value = "demo")]
    model: String,
    /// The name that clients ask for [default: kvasir-demo, or the directory's name].
    #[arg(long, env = "KVASIR_SERVED_MODEL_NAME")]
    served_model_name: Option<String>,
    /// The address to listen on.
    #[arg(long, env = "KVASIR_HOST", default_value = "127.0.0.1")]
    host: String,
    /// The port to listen on; 0 lets the system choose.
    #[arg(long, env = "KVASIR_PORT", default_value = "8000")]
    port: String,
    /// A port of its own for /health, /ready, /load and /metrics, which no crowd on --port can take away; 0 lets the
    /// system choose [default: they are served on --port].
    #[arg(long, env = "KVASIR_MANAGEMENT_PORT")]
    management_port: Option<String>,
    /// The precision to serve in: auto, bfloat16 or float32.
    #[arg(long, env = "KVASIR_DTYPE", default_value = "auto")]
    dtype: String,
    /// The device to serve on: auto, cpu or cuda.
    #[arg(long, env = "KVASIR_DEVICE", default_value = "auto")]
    device: String,
    /// The longest context in tokens, prompt and answer together [default: the model's own].
    #[arg(long, env = "KVASIR_MAX_MODEL_LEN")]
    max_model_len: Option<String>,
    /// Requests in one step at most [default: 64 on the CPU, 256 on a GPU].
    #[arg(long, env = "KVASIR_MAX_NUM_SEQS")]
    max_num_seqs: Option<String>,
    /// Tokens in one step at most, prompts and answers together [default: 512 on the CPU, 8192 on a GPU].
    #[arg(long, env = "KVASIR_MAX_NUM_BATCHED_TOKENS")]
    max_num_batched_tokens: Option<String>,
    /// Tokens in one block of the KV cache.
    #[arg(long, env = "KVASIR_BLOCK_SIZE", default_value = "16")]
    block_size: String,
    /// The part of the memory limit that the server may use, on every device.
    #[arg(long, env = "KVASIR_GPU_MEMORY_UTILIZATION", default_value = "0.9")]
    gpu_memory_utilization: String,
    /// Blocks of the KV cache, in place of what the memory has room for.
    #[arg(long, env = "KVASIR_NUM_GPU_BLOCKS_OVERRIDE")]
    num_gpu_blocks_override: Option<String>,
    /// Threads that compute [default: the cores of this machine or container].
    #[arg(long, env = "KVASIR_THREADS")]
    threads: Option<String>,
    /// Requests that may wait; more are answered with 429.
    #[arg(long, env = "KVASIR_MAX_WAITING", default_value = "256")]
    max_waiting: String,
    /// Prompts in one call at most.
    #[arg(long, env = "KVASIR_MAX_PROMPTS", default_value = "128")]
    max_prompts: String,
    /// Connections at most; more get probes answered, and 503 for the rest.
    #[arg(long, env = "KVASIR_MAX_CONNECTIONS", default_value = "1024")]
    max_connections: String,
    /// Bytes of a request's body at most.
    #[arg(long, env = "KVASIR_MAX_BODY_BYTES", default_value = "8388608")]
    max_body_bytes: String,
    /// Time for a request's head to arrive, and again for its body.
    #[arg(long, env = "KVASIR_READ_TIMEOUT_SECONDS", default_value = "30")]
    read_timeout_seconds: String,
    /// /health fails when the engine has made no step for so long.
    #[arg(long, env = "KVASIR_HEARTBEAT_TIMEOUT_SECONDS", default_value = "120")]
    heartbeat_timeout_seconds: String,
    /// After SIGTERM, requests are still accepted for so long.
    #[arg(long, env = "KVASIR_DRAIN_ACCEPT_SECONDS", default_value = "5")]
    drain_accept_seconds: String,
    /// Then answers under way have so long to finish.
    #[arg(long, env = "KVASIR_DRAIN_SECONDS", default_value = "60")]
    drain_seconds: String,
    /// How log lines look: text or json.
    #[arg(long, env = "KVASIR_LOG_FORMAT", default_value = "text")]
    log_format: String,
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
        line: impl IntoIterator<Item = impl Into<OsString> + Clone>,
    ) -> Result<Self, ArgsError> {
        let written = Written::try_parse_from(line).map_err(ArgsError::Usage)?;
        let mut checks = Checks::default();
        let args = checks.all(written);
        match (args, checks.0) {
            (Some(args), mistakes) if mistakes.is_empty() => Ok(args),
            (_, mistakes) => Err(ArgsError::Mistakes(mistakes)),
        }
    }
}

/// Collects mistakes; a value with one is `None`.
#[derive(Default)]
struct Checks(Vec<String>);

impl Checks {
    fn all(&mut self, written: Written) -> Option<Args> {
        let model = self.model(&written.model);
        let name = self.name(written.served_model_name, model.as_ref());
        let host = self.value(
            "host",
            &written.host,
            "an IP address such as 127.0.0.1 or 0.0.0.0",
            |_| true,
        );
        let port = self.value("port", &written.port, "a number from 0 to 65535", |_| true);
        let management_port = self.optional(
            "management-port",
            written.management_port.as_deref(),
            "a number from 0 to 65535",
            |_| true,
        );
        if let (Some(port), Some(Some(management_port))) = (port, management_port)
            && port == management_port
            && port != 0
        {
            self.0.push(format!(
                "--management-port: {port} is --port too; choose another"
            ));
        }
        let dtype = self.choice(
            "dtype",
            &written.dtype,
            &[
                ("auto", DtypeChoice::Auto),
                ("bfloat16", DtypeChoice::BFloat16),
                ("float32", DtypeChoice::Float32),
            ],
        );
        let device = self.choice(
            "device",
            &written.device,
            &[
                ("auto", DeviceChoice::Auto),
                ("cpu", DeviceChoice::Cpu),
                ("cuda", DeviceChoice::Cuda),
            ],
        );
        let max_model_len = self.optional(
            "max-model-len",
            written.max_model_len.as_deref(),
            "a number above 0",
            positive,
        );
        let max_num_seqs = self.optional(
            "max-num-seqs",
            written.max_num_seqs.as_deref(),
            "a number from 1 to 4096",
            within(1, 4096),
        );
        let max_num_batched_tokens = self.optional(
            "max-num-batched-tokens",
            written.max_num_batched_tokens.as_deref(),
            "a number from 1 to 65536",
            within(1, 65536),
        );
        if let (Some(Some(seqs)), Some(Some(tokens))) = (max_num_seqs, max_num_batched_tokens)
            && tokens < seqs
        {
            self.0.push(format!(
                "--max-num-batched-tokens: {tokens} is less than --max-num-seqs, {seqs}; a step needs one token for each request"
            ));
        }
        let block_size = self.value(
            "block-size",
            &written.block_size,
            "a number from 1 to 1024",
            within(1, 1024),
        );
        let memory_utilization = self.value(
            "gpu-memory-utilization",
            &written.gpu_memory_utilization,
            "a number above 0, at most 1",
            |part: &f64| *part > 0.0 && *part <= 1.0,
        );
        let blocks = written.num_gpu_blocks_override.as_deref();
        let n_blocks = self.optional(
            "num-gpu-blocks-override",
            blocks,
            "a number above 0",
            positive,
        );
        let threads = self.optional(
            "threads",
            written.threads.as_deref(),
            "a number above 0",
            |_| true,
        );
        let max_waiting = self.value(
            "max-waiting",
            &written.max_waiting,
            "a number above 0",
            positive,
        );
        let max_prompts = self.value(
            "max-prompts",
            &written.max_prompts,
            "a number above 0",
            |n: &usize| *n > 0,
        );
        let max_connections = self.value(
            "max-connections",
            &written.max_connections,
            "a number from 1 to 1000000",
            |n: &usize| (1..=1_000_000).contains(n),
        );
        let max_body_bytes = self.value(
            "max-body-bytes",
            &written.max_body_bytes,
            "a number above 0",
            |n: &usize| *n > 0,
        );
        let read_timeout = self.seconds("read-timeout-seconds", &written.read_timeout_seconds);
        let heartbeat_timeout = self.seconds(
            "heartbeat-timeout-seconds",
            &written.heartbeat_timeout_seconds,
        );
        let drain_accept = self.seconds("drain-accept-seconds", &written.drain_accept_seconds);
        let drain = self.seconds("drain-seconds", &written.drain_seconds);
        let log_format = self.choice(
            "log-format",
            &written.log_format,
            &[("text", LogFormat::Text), ("json", LogFormat::Json)],
        );
        Some(Args {
            model: model?,
            served_model_name: name?,
            host: host?,
            port: port?,
            management_port: management_port?,
            dtype: dtype?,
            device: device?,
            max_model_len: max_model_len?,
            max_num_seqs: max_num_seqs?,
            max_num_batched_tokens: max_num_batched_tokens?,
            block_size: block_size?,
            memory_utilization: memory_utilization?,
            n_blocks: n_blocks?,
            threads: threads?,
            max_waiting: max_waiting?,
            max_prompts: max_prompts?,
            limits: crate::http::Limits {
                max_connections: max_connections?,
                max_body_bytes: max_body_bytes?,
                read_timeout: read_timeout?,
                heartbeat_timeout: heartbeat_timeout?,
            },
            drain_accept: drain_accept?,
            drain: drain?,
            log_format: log_format?,
        })
    }

    fn mistake<T>(&mut self, flag: &str, found: impl Display, expected: &str) -> Option<T> {
        self.0.push(format!(
            "--{flag}: {found:?} is not {expected}",
            found = found.to_string()
        ));
        None
    }

    fn value<T: FromStr>(
        &mut self,
        flag: &str,
        found: &str,
        expected: &str,
        fits: impl Fn(&T) -> bool,
    ) -> Option<T> {
        match found.parse() {
            Ok(value) if fits(&value) => Some(value),
            _ => self.mistake(flag, found, expected),
        }
    }

    fn optional<T: FromStr>(
        &mut self,
        flag: &str,
        found: Option<&str>,
        expected: &str,
        fits: impl Fn(&T) -> bool,
    ) -> Option<Option<T>> {
        match found {
            None => Some(None),
            Some(found) => self.value(flag, found, expected, fits).map(Some),
        }
    }

    fn seconds(&mut self, flag: &str, found: &str) -> Option<Duration> {
        let seconds = self.value(
            flag,
            found,
            "a number of seconds from 0 to 86400",
            |s: &f64| (0.0..=86400.0).contains(s),
        );
        seconds.map(Duration::from_secs_f64)
    }

    fn choice<T: Copy>(&mut self, flag: &str, found: &str, choices: &[(&str, T)]) -> Option<T> {
        match choices.iter().find(|(name, _)| *name == found) {
            Some((_, value)) => Some(*value),
            None => {
                let names: Vec<&str> = choices.iter().map(|(name, _)| *name).collect();
                self.mistake(flag, found, &format!("one of {}", names.join(", ")))
            }
        }
    }

    fn model(&mut self, found: &str) -> Option<ModelSource> {
        if found == "demo" {
            return Some(ModelSource::Demo);
        }
        let path = PathBuf::from(found);
        match path.is_dir() {
            true => Some(ModelSource::Directory(path)),
            false => self.mistake("model", found, "\"demo\" or an existing directory"),
        }
    }

    fn name(&mut self, found: Option<String>, model: Option<&ModelSource>) -> Option<String> {
        match (found, model) {
            (Some(name), _) if name.trim().is_empty() => {
                self.mistake("served-model-name", name, "a name")
            }
            (Some(name), _) => Some(name),
            (None, Some(ModelSource::Directory(path))) => {
                let path = path.canonicalize().unwrap_or_else(|_| path.clone());
                Some(path.file_name().map_or_else(
                    || "model".into(),
                    |name| name.to_string_lossy().into_owned(),
                ))
            }
            (None, Some(ModelSource::Demo)) => Some("kvasir-demo".into()),
            (None, None) => None,
        }
    }
}

fn positive(n: &u32) -> bool {
    *n > 0
}

fn within(low: u32, high: u32) -> impl Fn(&u32) -> bool {
    move |n| (low..=high).contains(n)
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
        assert_eq!(args.model, ModelSource::Demo);
        assert_eq!(args.served_model_name, "kvasir-demo");
        assert_eq!(
            (args.host.to_string().as_str(), args.port),
            ("127.0.0.1", 8000)
        );
    }

    #[test]
    fn all_mistakes_are_reported_at_once() {
        let flags = [
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
        ];
        assert_eq!(
            parse(&flags).unwrap_err(),
            [
                "--model: \"/no/such\" is not \"demo\" or an existing directory",
                "--port: \"x\" is not a number from 0 to 65535",
                "--dtype: \"int4\" is not one of auto, bfloat16, float32",
                "--device: \"tpu\" is not one of auto, cpu, cuda",
                "--gpu-memory-utilization: \"0\" is not a number above 0, at most 1",
            ]
        );
    }

    #[test]
    fn contradictions_are_sentences() {
        let flags = ["--max-num-batched-tokens", "8", "--max-num-seqs", "64"];
        let mistakes = parse(&flags).unwrap_err();
        assert_eq!(mistakes.len(), 1);
        assert!(
            mistakes[0].contains("8 is less than --max-num-seqs, 64"),
            "{mistakes:?}"
        );
    }

    #[test]
    fn the_management_port_is_one_of_its_own() {
        assert_eq!(parse(&[]).unwrap().management_port, None);
        let args = parse(&["--management-port", "8001"]).unwrap();
        assert_eq!(args.management_port, Some(8001));
        let mistakes = parse(&["--management-port", "8000"]).unwrap_err();
        assert_eq!(
            mistakes,
            ["--management-port: 8000 is --port too; choose another"]
        );
        assert!(parse(&["--management-port", "0", "--port", "0"]).is_ok());
    }

    #[test]
    fn a_directory_gives_the_name() {
        let directory = tempfile::tempdir().unwrap();
        let model = directory.path().join("my-model");
        std::fs::create_dir(&model).unwrap();
        let args = parse(&["--model", model.to_str().unwrap()]).unwrap();
        assert_eq!(args.served_model_name, "my-model");
    }

    #[test]
    fn every_flag_has_its_environment_variable() {
        use clap::CommandFactory;
        for arg in Written::command()
            .get_arguments()
            .filter(|a| !["help", "version"].contains(&a.get_id().as_str()))
        {
            let long = arg.get_long().unwrap();
            let want = format!("KVASIR_{}", long.replace('-', "_").to_uppercase());
            assert_eq!(
                arg.get_env().unwrap().to_str(),
                Some(want.as_str()),
                "--{long}"
            );
        }
    }
}
