//! The OpenAI-compatible API, and what probes and the cluster ask: routes, and the state behind them.
//!
//! It knows text and events, never blocks: requests go through [`crate::frontend`] to the engine.
//!
//! - [`incoming`], [`fields`], [`params`], [`choices`], [`prompts`], [`conversation`]: requests are read in time and parsed
//!   once, in bounded memory; every mistake names its field.
//! - [`structured`], [`tools`]: what holds an answer to a grammar; the tools that it may call.
//! - [`completions`], [`chat`], [`tokenize`], [`detokenize`]: the interfaces; [`generate`] is what the first two share;
//!   [`answer`] takes a chat's answer apart.
//! - [`management`]: probes, load, metrics. [`middleware`]: around every request; [`hold`](mod@hold): until its answer is sent.
//!   [`access`]: who may call the API.
//! - [`serve`]: connections, their limits, and the drain; [`write_timeout`] ends those whose client reads too slowly.

pub mod access;
mod answer;
mod chat;
mod choices;
mod completions;
mod conversation;
mod defaults;
mod detokenize;
pub mod error;
mod fields;
mod generate;
mod hold;
mod incoming;
mod logits_fields;
mod logprobs;
mod management;
mod middleware;
mod params;
mod prompts;
mod resume;
pub mod serve;
mod structured;
mod tokenize;
mod tools;
mod wire;
mod write_timeout;

use std::hash::BuildHasher;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::extract::{Path, Request, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use kvasir_crds::LoadReport;
use kvasir_crds::load_report::{ModelReport, SCHEMA, StartReport};
use serde_json::json;
use tokio::sync::watch;

use crate::frontend::AsyncEngine;
use crate::grammar::GrammarCompiler;
use crate::metrics::Metrics;
use crate::text::tool_calls::ToolCallFormat;
use crate::text::{TextPool, Tokenizer};
use access::Access;
pub use defaults::SamplingDefaults;
use error::ApiError;
use serve::Phase;

/// Bounds on what a request may cost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of a request's body.
    pub max_body_bytes: usize,
    /// Time for a request's body.
    pub read_timeout: Duration,
    /// `/health` fails when the engine has not beaten for so long.
    pub heartbeat_timeout: Duration,
}

/// What is served, once it is loaded.
#[derive(Debug)]
pub struct Serving {
    /// The name that clients ask for.
    pub model_name: String,
    /// Text to tokens and back.
    pub tokenizer: Arc<Tokenizer>,
    /// Threads for the tokenizer.
    pub pool: TextPool,
    /// Makes of grammars what answers are held to.
    pub grammars: GrammarCompiler,
    /// How the model writes tool calls, where it does.
    pub tool_calls: Option<ToolCallFormat>,
    /// The model's reasoning is told apart from its answer.
    pub splits_reasoning: bool,
    /// The way to the engine and back.
    pub engine: AsyncEngine,
    /// What a request that says nothing gets.
    pub defaults: SamplingDefaults,
    /// Prompts that one call may have.
    pub max_prompts: usize,
    /// Names and seeds.
    pub ids: Ids,
    /// When it was loaded, in seconds since 1970.
    pub created: u64,
    /// What it is, in numbers.
    pub model: ModelReport,
}

impl Serving {
    fn check_model(&self, asked: Option<&str>) -> Result<(), ApiError> {
        match asked {
            Some(asked) if asked != self.model_name => {
                Err(ApiError::model_not_found(asked, &self.model_name))
            }
            _ => Ok(()),
        }
    }
}

/// Names that no two calls share, and seeds that nobody can foretell.
#[derive(Debug, Default)]
pub struct Ids {
    next: AtomicU64,
    random: std::hash::RandomState,
}

impl Ids {
    fn seed(&self) -> u64 {
        let n = self.next.fetch_add(1, Ordering::Relaxed);
        self.random.hash_one((n, SystemTime::now()))
    }

    fn call(&self) -> String {
        format!("{:016x}{:016x}", self.seed(), self.seed())
    }
}

/// The state behind all routes.
#[derive(Debug)]
pub struct App {
    serving: OnceLock<Arc<Serving>>,
    phase: watch::Sender<Phase>,
    metrics: Arc<Metrics>,
    limits: Limits,
    access: Access,
    ids: Ids,
    boot_id: String,
    start: Mutex<StartReport>,
}

impl App {
    /// Nothing is loaded yet.
    pub fn new(metrics: Arc<Metrics>, limits: Limits, access: Access) -> Arc<Self> {
        let ids = Ids::default();
        let boot_id = ids.call();
        Arc::new(Self {
            serving: OnceLock::new(),
            phase: watch::Sender::new(Phase::Loading),
            metrics,
            limits,
            access,
            ids,
            boot_id,
            start: Mutex::default(),
        })
    }

    /// The model is loaded: requests are answered from now on, unless the server was told to stop meanwhile.
    pub fn ready(&self, serving: Serving) {
        let _ = self.serving.set(Arc::new(serving));
        self.advance(Phase::Ready);
    }

    /// Tells how the start goes.
    pub fn starts(&self, report: StartReport) {
        *self.start.lock().unwrap_or_else(PoisonError::into_inner) = report;
    }

    /// Moves on to `phase`, never back.
    pub fn advance(&self, phase: Phase) {
        self.phase.send_if_modified(|now| {
            let later = phase > *now;
            *now = phase.max(*now);
            later
        });
    }

    /// Follows the phase.
    pub fn phase(&self) -> watch::Receiver<Phase> {
        self.phase.subscribe()
    }

    fn serving(&self) -> Result<Arc<Serving>, ApiError> {
        self.serving.get().cloned().ok_or_else(|| {
            ApiError::unavailable("the model is still loading; /ready tells when it is loaded")
        })
    }

    /// Before the model is loaded, only how the start goes is known.
    fn load(&self) -> LoadReport {
        let serving = self.serving.get();
        let engine = serving.map(|serving| serving.engine.handle().load());
        LoadReport {
            schema: Some(SCHEMA),
            boot_id: Some(self.boot_id.clone()),
            draining: Some(*self.phase.borrow() >= Phase::Draining),
            model: serving.map(|serving| serving.model.clone()),
            start: Some(*self.start.lock().unwrap_or_else(PoisonError::into_inner)),
            ..engine.unwrap_or_default()
        }
    }
}

/// Which routes a port has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Routes {
    /// Everything, where there is one port only.
    All,
    /// The API, and `/health`, which clients ask before they begin.
    Api,
    /// `/health`, `/ready`, `/load` and `/metrics`.
    Management,
}

/// The routes of one port.
pub fn router(app: Arc<App>, routes: Routes) -> Router {
    let mut router = Router::new().route("/health", get(management::health));
    if routes != Routes::Management {
        router = router
            .route("/v1/models", get(models))
            .route("/v1/models/{*name}", get(model))
            .route("/v1/completions", post(completions::completions))
            .route("/v1/chat/completions", post(chat::chat))
            .route("/tokenize", post(tokenize::tokenize))
            .route("/detokenize", post(detokenize::detokenize))
            .route("/version", get(version));
        if app.access.tokenizer_info() {
            router = router.route("/tokenizer_info", get(detokenize::tokenizer_info));
        }
    }
    if routes != Routes::Api {
        router = router
            .route("/ready", get(management::ready))
            .route("/metrics", get(management::metrics))
            .route("/load", get(management::load));
    }
    router = router
        .fallback(async |request: Request| {
            ApiError::new(
                StatusCode::NOT_FOUND,
                format!("there is no {} here", request.uri().path()),
            )
        })
        .method_not_allowed_fallback(async |request: Request| {
            let message = format!(
                "{} does not answer {}",
                request.uri().path(),
                request.method()
            );
            ApiError::new(StatusCode::METHOD_NOT_ALLOWED, message)
        });
    let middleware = axum::middleware::from_fn_with_state(Arc::clone(&app), middleware::middleware);
    let router = match routes {
        Routes::Management => router.layer(middleware),
        Routes::All | Routes::Api => {
            access::outer(access::inner(router, &app).layer(middleware), &app)
        }
    };
    router.with_state(app)
}

fn model_object(serving: &Serving) -> serde_json::Value {
    json!({
        "id": serving.model_name,
        "object": "model",
        "created": serving.created,
        "owned_by": "kvasir",
        "max_model_len": serving.engine.handle().model_info().max_model_len,
    })
}

async fn version() -> Json<serde_json::Value> {
    Json(json!({ "version": env!("CARGO_PKG_VERSION") }))
}

async fn models(State(app): State<Arc<App>>) -> Result<Response, ApiError> {
    let serving = app.serving()?;
    Ok(Json(json!({ "object": "list", "data": [model_object(&serving)] })).into_response())
}

async fn model(
    State(app): State<Arc<App>>,
    Path(name): Path<String>,
) -> Result<Response, ApiError> {
    let serving = app.serving()?;
    serving.check_model(Some(&name))?;
    Ok(Json(model_object(&serving)).into_response())
}

/// Seconds since 1970.
pub fn unix_time() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |t| t.as_secs())
}
