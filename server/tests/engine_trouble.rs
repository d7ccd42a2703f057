//! What the cluster sees of a device that hangs or fails: the whole server in this process, over a device that does as
//! it is told.
#![allow(clippy::unwrap_used)] // A test's helpers, outside of #[test] functions.

mod client;

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use client::{Answer, Client, send};
use kvasir_kernels::device::{DeviceError, Dtype, Limits, Sampled, StepInput, StepOutput, Ticket};
use kvasir_server::engine::executor::Executor;
use kvasir_server::engine::{Engine, ModelFacts};
use kvasir_server::http::serve::{self, PortLimits};
use kvasir_server::http::{self, App, Ids, Routes, SamplingDefaults, Serving};
use kvasir_server::metrics::Metrics;
use kvasir_server::model::ModelFiles;
use kvasir_server::output::Outputs;
use kvasir_server::text::tokenizer::TextFiles;
use kvasir_server::text::{TextPool, Tokenizer};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::runtime::Runtime;

/// An idle engine beats each second.
const HEARTBEAT_TIMEOUT: Duration = Duration::from_secs(3);

/// Each step waits for what it is to give: the same token in every row, or a failure.
struct Scripted {
    script: Receiver<Result<u32, DeviceError>>,
    n_rows: usize,
}

impl Executor for Scripted {
    fn depth(&self) -> usize {
        1
    }

    fn submit(&mut self, input: &StepInput) -> Result<Ticket, DeviceError> {
        self.n_rows = input.logits.len();
        Ok(Ticket(0))
    }

    fn collect(&mut self, _: Ticket) -> Result<StepOutput, DeviceError> {
        // The test that is over needs no more steps.
        let token = self.script.recv().unwrap_or(Ok(5))?;
        let sampled = Sampled {
            token,
            ..Sampled::default()
        };
        Ok(StepOutput {
            sampled: vec![sampled; self.n_rows],
        })
    }
}

/// Serves with that device. The runtime serves as long as it is kept.
fn start() -> (Runtime, Client, Sender<Result<u32, DeviceError>>) {
    let (sender, script) = channel();
    let facts = ModelFacts {
        vocab_size: 100,
        max_model_len: 64,
        eos_token_ids: Vec::new(),
        dtype: Dtype::F32,
        limits: Limits {
            max_tokens: 64,
            max_sequences: 4,
            max_logits_rows: 64,
            max_blocks_per_sequence: 4,
        },
        n_blocks: 16,
        block_size: 16,
    };
    let executor = Scripted { script, n_rows: 0 };
    let (engine, steps) = Engine::start(Box::new(executor), facts, 10).unwrap();
    let metrics = Arc::new(Metrics::new("m").unwrap());
    let tokenizer_json = ModelFiles::demo().require("tokenizer.json").unwrap();
    let files = TextFiles {
        tokenizer: &tokenizer_json,
        tokenizer_config: None,
        chat_template: None,
    };
    let serving = Serving {
        model_name: "m".to_owned(),
        tokenizer: Arc::new(Tokenizer::load(files).unwrap()),
        pool: TextPool::start(NonZeroUsize::MIN, NonZeroUsize::MIN).unwrap(),
        outputs: Outputs::start(engine.handle(), steps, Arc::clone(&metrics)).unwrap(),
        defaults: SamplingDefaults::default(),
        max_prompts: 1,
        ids: Ids::default(),
        created: 0,
    };
    let limits = http::Limits {
        max_connections: 16,
        max_body_bytes: 10_000,
        read_timeout: Duration::from_secs(60),
        heartbeat_timeout: HEARTBEAT_TIMEOUT,
    };
    let app = App::new(metrics, limits);
    app.ready(serving);
    let runtime = Runtime::new().unwrap();
    let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0")).unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let port_limits = PortLimits {
        max_connections: limits.max_connections,
        read_timeout: limits.read_timeout,
    };
    let router = http::router(Arc::clone(&app), Routes::All);
    runtime.spawn(serve::serve(
        listener,
        router,
        port_limits,
        app.phase(),
        Duration::ZERO,
    ));
    (runtime, Client { address }, sender)
}

/// Asks for some tokens, and waits until the device has the step.
fn ask(client: &Client, n_tokens: u32) -> Answer {
    let mut stream = client.connect();
    let body = json!({"prompt": [1, 2, 3], "max_tokens": n_tokens, "stream": true}).to_string();
    send(&mut stream, "POST", "/v1/completions", &body);
    let answer = Answer::read(stream);
    assert_eq!(answer.status, 200);
    answer
}

fn is_stale(status: u16, body: &str) -> bool {
    status == 503 && body.contains("the engine last beat") && body.contains("the limit is 3 s")
}

#[test]
fn a_device_that_hangs_fails_the_health_until_it_goes_on() {
    let (_runtime, client, device) = start();
    let healthy = |status, _: &str| status == 200;
    client.wait_for("an idle engine beats", "/health", healthy);

    let answer = ask(&client, 2);
    client.wait_for("a step hangs", "/health", is_stale);
    // The rest is answered off the engine's thread.
    let load: Value = serde_json::from_str(&client.get("/load").1).unwrap();
    let age = load["heartbeatAgeMs"].as_u64().unwrap();
    assert!(age > HEARTBEAT_TIMEOUT.as_millis() as u64, "{load}");
    assert_eq!(client.get("/metrics").0, 200);
    assert_eq!(client.get("/ready").0, 200);

    device.send(Ok(5)).unwrap();
    client.wait_for("it beats again", "/health", healthy);
    client.wait_for("the next step hangs", "/health", is_stale);
    device.send(Ok(6)).unwrap();
    let last = answer.events().pop().unwrap();
    assert_eq!(
        last["choices"][0]["finish_reason"], "length",
        "nothing is lost"
    );
    client.wait_for("it is idle and beats", "/health", healthy);
}

#[test]
fn a_device_that_fails_ends_its_streams_with_its_words_and_fails_the_health() {
    let (_runtime, client, device) = start();
    let answer = ask(&client, 2);
    device.send(Ok(5)).unwrap();
    let failed = DeviceError::Failed {
        device: "scripted",
        message: "on fire".to_owned(),
    };
    device.send(Err(failed)).unwrap();
    let last = answer.events().pop().unwrap();
    let error = &last["error"];
    assert_eq!(error["type"], "server_error", "{last}");
    client.wait_for("the engine has ended", "/health", |status, body| {
        status == 503 && body.contains("the engine has stopped")
    });
    let (status, refused) = client.post("/v1/completions", &json!({"prompt": [1]}));
    assert_eq!(status, 503, "{refused}");
}
