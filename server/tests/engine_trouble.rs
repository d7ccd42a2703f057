//! What the cluster sees of a device that hangs or fails: the whole server in this process, over a device that does as
//! it is told.
#![allow(clippy::unwrap_used)] // A test's helpers, outside of #[test] functions.

mod client;

use std::num::{NonZeroU32, NonZeroUsize};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use client::{Answer, Client, send};
use kvasir_kernels::device::{DeviceError, Ticket};
use kvasir_kernels::shape::Limits;
use kvasir_kernels::step::{DeviceOutput, LogitsRow, Sampled, StepInput};
use kvasir_kernels::stored::Dtype;
use kvasir_server::engine::executor::Executor;
use kvasir_server::engine::groups::{CacheGroups, GroupKind};
use kvasir_server::engine::{Engine, ModelInfo};
use kvasir_server::frontend::AsyncEngine;
use kvasir_server::frontend::budget::ByteBudget;
use kvasir_server::grammar::GrammarCompiler;
use kvasir_server::http::serve::{self, Phase, PortLimits};
use kvasir_server::http::{self, App, Ids, Routes, SamplingDefaults, Serving};
use kvasir_server::lifecycle::{self, ServeError};
use kvasir_server::metrics::Metrics;
use kvasir_server::model::ModelFiles;
use kvasir_server::text::tokenizer::TextFiles;
use kvasir_server::text::{TextPool, Tokenizer};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::runtime::Runtime;
use tokio::task::JoinHandle;

/// An idle engine beats each second.
const HEARTBEAT_TIMEOUT: Duration = Duration::from_secs(3);

/// Longer than anything that is waited for.
const LONG: Duration = Duration::from_secs(60);

/// Each step says that it begins, and waits for what it is to give: the same token in every row, or a failure.
struct Scripted {
    begins: Sender<()>,
    script: Receiver<Result<u32, DeviceError>>,
    n_rows: usize,
    n_top: u32,
    drop_takes: Duration,
    dropped: Arc<AtomicBool>,
}

impl Executor for Scripted {
    fn depth(&self) -> usize {
        1
    }

    fn row_tile(&self) -> usize {
        1
    }

    fn submit(&mut self, input: StepInput) -> Result<Ticket, DeviceError> {
        self.n_rows = input.logits.len();
        let _ = self.begins.send(());
        Ok(Ticket(0))
    }

    fn sample(&mut self, _: &Ticket, _: &[LogitsRow]) -> Result<(), DeviceError> {
        Ok(())
    }

    fn collect(&mut self, _: Ticket) -> Result<DeviceOutput, DeviceError> {
        // The test that is over needs no more steps.
        let token = self.script.recv().unwrap_or(Ok(5))?;
        let sampled = Sampled {
            token,
            logprob: Some(-1.0),
            top: (0..self.n_top).map(|id| (id, -1.0)).collect(),
        };
        Ok(DeviceOutput {
            sampled: vec![sampled; self.n_rows],
        })
    }
}

impl Drop for Scripted {
    fn drop(&mut self) {
        std::thread::sleep(self.drop_takes);
        self.dropped.store(true, Ordering::Release);
    }
}

/// What the device is told to do, and what it says.
struct Device {
    script: Sender<Result<u32, DeviceError>>,
    begins: Receiver<()>,
    dropped: Arc<AtomicBool>,
}

impl Device {
    fn give(&self, token: u32) {
        self.script.send(Ok(token)).unwrap();
    }

    fn fail(&self) {
        let failed = DeviceError::Failed {
            device: "scripted",
            message: "on fire".to_owned(),
        };
        self.script.send(Err(failed)).unwrap();
    }

    /// A step began that no one waited for before.
    fn wait_for_step(&self) {
        self.begins.recv().unwrap();
    }
}

/// What matters to a test.
#[derive(Clone, Copy)]
struct Setting {
    /// Alternatives that the device gives with each token.
    n_top: u32,
    /// A device takes a while to give back what it has.
    drop_takes: Duration,
    max_sequences: usize,
    n_blocks: u32,
    max_waiting: u32,
}

const ROOMY: Setting = Setting {
    n_top: 0,
    drop_takes: Duration::ZERO,
    max_sequences: 4,
    n_blocks: 16,
    max_waiting: 10,
};

/// A server in this process. It serves as long as it is kept.
struct Trouble {
    client: Client,
    device: Device,
    app: Arc<App>,
    engine: Engine,
    async_engine: AsyncEngine,
    server: JoinHandle<usize>,
    runtime: Runtime,
}

fn start(setting: Setting) -> Trouble {
    let (script, receiver) = channel();
    let (begins, begun) = channel();
    let device = Device {
        script,
        begins: begun,
        dropped: Arc::default(),
    };
    let executor = Scripted {
        begins,
        script: receiver,
        n_rows: 0,
        n_top: setting.n_top,
        drop_takes: setting.drop_takes,
        dropped: Arc::clone(&device.dropped),
    };
    let info = ModelInfo {
        vocab_size: 100,
        max_model_len: 64,
        eos_token_ids: Vec::new(),
        dtype: Dtype::F32,
        limits: Limits {
            max_tokens: 64,
            max_sequences: setting.max_sequences,
            max_logits_rows: 64,
            max_blocks_per_sequence: 4,
        },
        n_blocks: setting.n_blocks,
        groups: CacheGroups::new(
            NonZeroU32::MIN.saturating_add(15),
            64,
            vec![GroupKind::Full],
        ),
        prefix_caching: None,
        max_decode_stretch: None,
    };
    let (engine, outputs) = Engine::start(Box::new(executor), info, setting.max_waiting).unwrap();
    let metrics = Arc::new(Metrics::new("m").unwrap());
    let tokenizer_json = ModelFiles::demo().require("tokenizer.json").unwrap();
    let files = TextFiles {
        tokenizer: &tokenizer_json,
        tokenizer_config: None,
        chat_template: None,
    };
    let budget = ByteBudget::new(64 << 20);
    let async_engine =
        AsyncEngine::start(engine.handle(), outputs, Arc::clone(&metrics), budget).unwrap();
    let tokenizer = Arc::new(Tokenizer::load(files).unwrap());
    let vocabulary = Arc::clone(tokenizer.vocabulary());
    let serving = Serving {
        model_name: "m".to_owned(),
        grammars: GrammarCompiler::start(vocabulary, 2048, &[1], NonZeroUsize::MIN).unwrap(),
        tool_calls: None,
        splits_reasoning: false,
        tokenizer,
        pool: TextPool::start(NonZeroUsize::MIN).unwrap(),
        engine: async_engine.clone(),
        defaults: SamplingDefaults::default(),
        max_prompts: 1,
        ids: Ids::default(),
        created: 0,
        model: kvasir_crds::load_report::ModelReport::default(),
    };
    let limits = http::Limits {
        max_body_bytes: 10_000,
        read_timeout: LONG,
        heartbeat_timeout: HEARTBEAT_TIMEOUT,
    };
    let app = App::new(metrics, limits, http::access::Access::default());
    app.ready(serving);
    let runtime = Runtime::new().unwrap();
    let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0")).unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let port_limits = PortLimits {
        max_connections: 16,
        read_timeout: limits.read_timeout,
    };
    let router = http::router(Arc::clone(&app), Routes::All);
    let serve = serve::serve(listener, router, port_limits, app.phase(), LONG);
    Trouble {
        client: Client { address },
        device,
        app,
        engine,
        async_engine,
        server: runtime.spawn(serve),
        runtime,
    }
}

/// Asks for some tokens, and waits until the engine has the request.
fn ask(client: &Client, n_prompt: usize, n_tokens: u32) -> Answer {
    let mut stream = client.connect();
    let body =
        json!({"prompt": vec![1; n_prompt], "max_tokens": n_tokens, "stream": true}).to_string();
    send(&mut stream, "POST", "/v1/completions", &body);
    let answer = Answer::read(stream);
    assert_eq!(answer.status, 200);
    answer
}

fn load(client: &Client) -> Value {
    serde_json::from_str(&client.get("/load").1).unwrap()
}

fn is_stale(status: u16, body: &str) -> bool {
    status == 503 && body.contains("the engine last beat") && body.contains("the limit is 3 s")
}

#[test]
fn a_device_that_hangs_fails_the_health_until_it_goes_on() {
    let Trouble {
        client,
        device,
        runtime: _runtime,
        ..
    } = start(ROOMY);
    let healthy = |status, _: &str| status == 200;
    client.wait_for("an idle engine beats", "/health", healthy);

    let answer = ask(&client, 3, 2);
    client.wait_for("a step hangs", "/health", is_stale);
    // The rest is answered off the engine's thread.
    let load = load(&client);
    let age = load["heartbeatAgeMs"].as_u64().unwrap();
    assert!(age > HEARTBEAT_TIMEOUT.as_millis() as u64, "{load}");
    assert_eq!(client.get("/metrics").0, 200);
    assert_eq!(client.get("/ready").0, 200);

    device.give(5);
    client.wait_for("it beats again", "/health", healthy);
    client.wait_for("the next step hangs", "/health", is_stale);
    device.give(6);
    let last = answer.events().pop().unwrap();
    assert_eq!(
        last["choices"][0]["finish_reason"], "length",
        "nothing is lost"
    );
    client.wait_for("it is idle and beats", "/health", healthy);
    client.wait_for_load("the totals are told", |load| {
        let totals = json!({"promptTokens": 3, "generatedTokens": 2, "endedSequences": 1});
        load["totals"] == totals && load["slots"]["generatedTokens"] == 0
    });
}

#[test]
fn a_device_that_fails_ends_its_streams_with_its_words_and_fails_the_health() {
    let Trouble {
        client,
        device,
        runtime: _runtime,
        ..
    } = start(ROOMY);
    let answer = ask(&client, 3, 2);
    device.give(5);
    device.fail();
    let last = answer.events().pop().unwrap();
    let error = &last["error"];
    assert_eq!(error["type"], "server_error", "{last}");
    client.wait_for("the engine has ended", "/health", |status, body| {
        status == 503 && body.contains("the engine has stopped")
    });
    let (status, refused) = client.post("/v1/completions", &json!({"prompt": [1]}));
    assert_eq!(status, 503, "{refused}");
}

#[test]
fn a_request_that_waits_is_counted_while_a_step_runs() {
    let setting = Setting {
        max_sequences: 1,
        max_waiting: 1,
        ..ROOMY
    };
    let Trouble {
        client,
        device,
        runtime: _runtime,
        ..
    } = start(setting);
    let _first = ask(&client, 3, 9);
    device.wait_for_step();
    let _second = ask(&client, 20, 9);
    // The engine takes the second request before it begins the step that hangs now.
    device.give(5);
    device.wait_for_step();
    let load = load(&client);
    assert_eq!(load["queue"]["running"], 1, "{load}");
    assert_eq!(load["queue"]["waiting"], 1, "{load}");
    assert_eq!(load["blocks"]["waitingNeed"], 2, "{load}");
    assert_eq!(load["prefillBacklogTokens"], 20, "{load}");
    let (status, refused) = client.post("/v1/completions", &json!({"prompt": [1]}));
    assert_eq!(status, 429, "the queue is full: {refused}");
}

#[test]
fn a_preempted_request_is_as_old_as_its_arrival() {
    let setting = Setting {
        max_sequences: 2,
        n_blocks: 6,
        ..ROOMY
    };
    let Trouble {
        client,
        device,
        runtime: _runtime,
        ..
    } = start(setting);
    // Two blocks each at first; both need their fourth when none is left.
    let _first = ask(&client, 31, 33);
    device.wait_for_step();
    let _second = ask(&client, 31, 33);
    let age = Duration::from_millis(500);
    std::thread::sleep(age);
    let preempted = loop {
        device.give(5);
        device.wait_for_step();
        let load = load(&client);
        if load["preemptions"] == 1 {
            break load;
        }
    };
    assert_eq!(preempted["queue"]["waiting"], 1, "{preempted}");
    let oldest = preempted["queue"]["oldestWaitingMs"].as_u64().unwrap();
    assert!(oldest >= age.as_millis() as u64, "{preempted}");
}

#[test]
fn a_drained_server_has_no_device_any_more() {
    let setting = Setting {
        drop_takes: Duration::from_millis(300),
        ..ROOMY
    };
    let Trouble {
        device,
        app,
        engine,
        async_engine,
        server,
        runtime,
        ..
    } = start(setting);
    app.advance(Phase::Closing);
    let stopped = lifecycle::until_stopped(&app, server, engine, async_engine);
    runtime.block_on(stopped).unwrap();
    assert!(device.dropped.load(Ordering::Acquire));
}

#[test]
fn the_last_words_of_a_failed_engine_are_sent_before_the_end() {
    let setting = Setting {
        n_top: 2000,
        ..ROOMY
    };
    let Trouble {
        client,
        device,
        app,
        engine,
        async_engine,
        server,
        runtime,
    } = start(setting);
    // Some 50 kB a token: more than the sockets hold.
    let mut stream = client.connect();
    let body = json!({"prompt": [1], "max_tokens": 50, "stream": true, "logprobs": 1,
        "return_tokens_as_token_ids": true});
    send(&mut stream, "POST", "/v1/completions", &body.to_string());
    let answer = Answer::read(stream);
    device.wait_for_step();
    for _ in 0..40 {
        device.give(5);
        device.wait_for_step();
    }
    device.fail();
    let slow = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(500));
        answer.events()
    });
    let stopped = lifecycle::until_stopped(&app, server, engine, async_engine);
    let error = runtime.block_on(stopped).unwrap_err();
    assert!(matches!(error, ServeError::Engine(_)), "{error}");
    assert!(device.dropped.load(Ordering::Acquire));
    // As when the process ends.
    runtime.shutdown_background();
    let events = slow.join().unwrap();
    assert_eq!(events.len(), 41);
    assert_eq!(events[40]["error"]["type"], "server_error");
}
