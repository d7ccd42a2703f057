//! The OpenAI-compatible API, and what probes and the cluster ask: routes, and the state behind them.
//!
//! It knows text and events, never blocks: requests go to [`crate::output`], which hands them to the engine.
//!
//! - [`incoming`], [`fields`], [`params`]: requests are read in time and parsed once; every mistake names its field.
//! - [`completions`], [`chat`]: the two interfaces; [`generate`] is what they share.
//! - [`serve`]: connections, their limits, and the drain; [`write_timeout`] ends those whose client never reads.

mod chat;
mod completions;
pub mod error;
mod fields;
mod generate;
mod incoming;
mod logprobs;
mod params;
pub mod serve;
mod wire;
mod write_timeout;

use std::hash::BuildHasher;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::extract::{MatchedPath, Path, Request, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use kvasir_crds::LoadReport;
use serde_json::json;
use tokio::sync::watch;

use crate::metrics::Metrics;
use crate::output::Outputs;
use crate::text::{TextPool, Tokenizer};
use error::ApiError;
pub use params::SamplingDefaults;
use serve::OverLimit;

/// Where the server stands. It only ever moves forward.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// The model is being loaded: probes are answered, requests are not.
    Loading,
    /// Everything is answered.
    Ready,
    /// Told to stop: `/ready` says so, and requests are still accepted, because who sends them learns it late.
    Draining,
    /// No more connections; answers under way are finished, and so is one more request of a client that was not told
    /// to leave, because its answer had begun before.
    Closing,
}

/// A client that takes nothing of what it asked for, for so long, is gone: its connection is closed, and what it runs
/// ends. Long enough for any hiccup of a network; a client that takes its time takes something meanwhile.
pub const WRITE_TIMEOUT: Duration = Duration::from_secs(60);

/// Bounds on what a client may cost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Connections served at once.
    pub max_connections: usize,
    /// Bytes of a request's body.
    pub max_body_bytes: usize,
    /// Time for a request's head, and again for its body.
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
    /// The way to the engine.
    pub outputs: Outputs,
    /// What a request that says nothing gets.
    pub defaults: SamplingDefaults,
    /// Prompts that one call may have.
    pub max_prompts: usize,
    /// Names and seeds.
    pub ids: Ids,
    /// When it was loaded, in seconds since 1970.
    pub created: u64,
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

/// Numbers that no two requests share, and seeds that nobody can foretell.
#[derive(Debug, Default)]
pub struct Ids {
    next: AtomicU64,
    random: std::hash::RandomState,
}

impl Ids {
    fn next(&self) -> u64 {
        self.next.fetch_add(1, Ordering::Relaxed)
    }

    fn seed(&self) -> u64 {
        self.random.hash_one((self.next(), SystemTime::now()))
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
    boot_id: String,
}

impl App {
    /// Nothing is loaded yet.
    pub fn new(metrics: Arc<Metrics>, limits: Limits) -> Arc<Self> {
        let boot_id = Ids::default().call();
        Arc::new(Self {
            serving: OnceLock::new(),
            phase: watch::Sender::new(Phase::Loading),
            metrics,
            limits,
            boot_id,
        })
    }

    /// The model is loaded: requests are answered from now on, unless the server was told to stop meanwhile.
    pub fn ready(&self, serving: Serving) {
        let _ = self.serving.set(Arc::new(serving));
        self.advance(Phase::Ready);
    }

    /// Moves on to `phase`, never back.
    pub fn advance(&self, phase: Phase) {
        self.phase.send_if_modified(|now| {
            let later = phase > *now;
            *now = phase.max(*now);
            later
        });
    }

    /// What one connection may cost.
    pub fn limits(&self) -> Limits {
        self.limits
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

    fn load(&self) -> Option<LoadReport> {
        let serving = self.serving.get()?;
        Some(LoadReport {
            boot_id: Some(self.boot_id.clone()),
            draining: Some(*self.phase.borrow() >= Phase::Draining),
            ..serving.outputs.engine().load()
        })
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
    let mut router = Router::new().route("/health", get(health));
    if routes != Routes::Management {
        router = router
            .route("/v1/models", get(models))
            .route("/v1/models/{*name}", get(model))
            .route("/v1/completions", post(completions::completions))
            .route("/v1/chat/completions", post(chat::chat))
            .route("/tokenize", post(chat::tokenize));
    }
    if routes != Routes::Api {
        router = router
            .route("/ready", get(ready))
            .route("/metrics", get(metrics))
            .route("/load", get(load));
    }
    router
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
        })
        .layer(middleware::from_fn_with_state(Arc::clone(&app), around))
        .with_state(app)
}

/// Around every request: counts it, refuses what is over the limit, and says goodbye while draining.
async fn around(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let route = request.extensions().get::<MatchedPath>().cloned();
    let route = route.as_ref().map_or("other", MatchedPath::as_str);
    let over_limit = request.extensions().get::<OverLimit>().is_some();
    let is_probe = matches!(route, "/health" | "/ready" | "/metrics" | "/load");
    let mut response = match over_limit && !is_probe {
        true => ApiError::unavailable("too many connections; try again later").into_response(),
        false => next.run(request).await,
    };
    app.metrics.answered(route, response.status().as_u16());
    if over_limit || *app.phase.borrow() >= Phase::Draining {
        response
            .headers_mut()
            .insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    response
}

fn model_object(serving: &Serving) -> serde_json::Value {
    json!({
        "id": serving.model_name,
        "object": "model",
        "created": serving.created,
        "owned_by": "kvasir",
        "max_model_len": serving.outputs.engine().facts().max_model_len,
    })
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

/// Whether the process is worth keeping: it is while it loads, and then as long as the engine beats.
async fn health(State(app): State<Arc<App>>) -> Result<&'static str, ApiError> {
    let Some(serving) = app.serving.get() else {
        return Ok("loading\n");
    };
    let engine = serving.outputs.engine();
    if engine.is_stopped() && *app.phase.borrow() < Phase::Draining {
        return Err(ApiError::unavailable("the engine has stopped"));
    }
    let age = Duration::from_millis(engine.load().heartbeat_age_ms.unwrap_or(0));
    if age > app.limits.heartbeat_timeout {
        let (age, limit) = (age.as_secs(), app.limits.heartbeat_timeout.as_secs());
        return Err(ApiError::unavailable(format!(
            "the engine last beat {age} s ago, the limit is {limit} s"
        )));
    }
    Ok("ok\n")
}

/// Whether requests should be sent here.
async fn ready(State(app): State<Arc<App>>) -> Result<&'static str, ApiError> {
    let phase = *app.phase.borrow();
    match phase {
        Phase::Loading => Err(ApiError::unavailable("loading the model")),
        Phase::Ready => Ok("ready\n"),
        Phase::Draining | Phase::Closing => Err(ApiError::unavailable("draining")),
    }
}

async fn metrics(State(app): State<Arc<App>>) -> Result<Response, ApiError> {
    let text = app
        .metrics
        .render(app.load().as_ref())
        .map_err(|e| ApiError::internal(e.to_string()))?;
    let content_type = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
    Ok(([(header::CONTENT_TYPE, content_type)], text).into_response())
}

async fn load(State(app): State<Arc<App>>) -> Result<Json<LoadReport>, ApiError> {
    app.load()
        .map(Json)
        .ok_or_else(|| ApiError::unavailable("the model is still loading"))
}

/// Seconds since 1970.
pub fn unix_time() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |t| t.as_secs())
}
