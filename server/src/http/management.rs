//! What the cluster asks of a replica: is it worth keeping, should it get requests, how loaded is it.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::State;
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use kvasir_crds::LoadReport;

use super::App;
use super::error::ApiError;
use super::serve::Phase;

/// Whether the process is worth keeping: it is while it loads, and then as long as the engine beats.
pub(super) async fn health(State(app): State<Arc<App>>) -> Result<&'static str, ApiError> {
    let Some(serving) = app.serving.get() else {
        return Ok("loading\n");
    };
    let engine = serving.engine.handle();
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
pub(super) async fn ready(State(app): State<Arc<App>>) -> Result<&'static str, ApiError> {
    let phase = *app.phase.borrow();
    match phase {
        Phase::Loading => Err(ApiError::unavailable("loading the model")),
        Phase::Ready => Ok("ready\n"),
        Phase::Draining | Phase::Closing => Err(ApiError::unavailable("draining")),
    }
}

/// Everything for Prometheus.
pub(super) async fn metrics(State(app): State<Arc<App>>) -> Result<Response, ApiError> {
    let serving = app.serving.get();
    if let Some(serving) = serving {
        let budget = serving.engine.budget();
        app.metrics.request_memory(budget.used());
    }
    let load = serving.map(|_| app.load());
    let counters = serving.map(|serving| serving.engine.handle().counters());
    let text = app
        .metrics
        .render(load.as_ref(), counters.as_ref())
        .map_err(|e| ApiError::internal(e.to_string()))?;
    let content_type = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
    Ok(([(header::CONTENT_TYPE, content_type)], text).into_response())
}

/// The engine's report, and before there is one how the start goes.
pub(super) async fn load(State(app): State<Arc<App>>) -> Json<LoadReport> {
    Json(app.load())
}
