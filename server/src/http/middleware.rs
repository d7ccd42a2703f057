//! What is done around every request: it is counted, refused where its connection is over the limit, and answered with
//! a goodbye while the server drains.

use std::sync::Arc;

use axum::extract::{MatchedPath, Request, State};
use axum::http::{HeaderValue, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use super::App;
use super::error::ApiError;
use super::serve::{OverLimit, Phase};

/// For `axum::middleware::from_fn_with_state`.
pub(super) async fn middleware(
    State(app): State<Arc<App>>,
    request: Request,
    next: Next,
) -> Response {
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
