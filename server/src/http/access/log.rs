//! The access log: a line for each request when its answer has ended. No prompts, no answers, no keys, and no paths but
//! those of routes, because a client may write anything there.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::extract::{MatchedPath, Request};
use axum::http::{Method, StatusCode};
use axum::middleware::Next;
use axum::response::Response;

use super::request_id::RequestId;
use crate::frontend::Call;
use crate::http::hold::hold;

/// What is logged when it is dropped.
struct Line {
    id: Option<RequestId>,
    call: Arc<Call>,
    method: Method,
    route: Option<MatchedPath>,
    arrived: Instant,
    /// Once the answer's head is there: the client may leave before.
    head: Option<(StatusCode, Duration)>,
}

/// For `axum::middleware::from_fn`; inside the layer that names requests.
pub(super) async fn layer(request: Request, next: Next) -> Response {
    let extensions = request.extensions();
    let mut line = Line {
        id: extensions.get::<RequestId>().cloned(),
        call: extensions.get::<Arc<Call>>().cloned().unwrap_or_default(),
        method: request.method().clone(),
        route: extensions.get::<MatchedPath>().cloned(),
        arrived: Instant::now(),
        head: None,
    };
    let response = next.run(request).await;
    line.head = Some((response.status(), line.arrived.elapsed()));
    hold(response, line)
}

impl Drop for Line {
    fn drop(&mut self) {
        let (prompt_tokens, completion_tokens) = self.call.tokens();
        let seconds = |time: Duration| time.as_micros() as f64 / 1e6;
        tracing::info!(
            target: "kvasir_server::access_log",
            request_id = self.id.as_ref().map(|id| &*id.0),
            method = self.method.as_str(),
            route = self.route.as_ref().map_or("other", MatchedPath::as_str),
            status = self.head.map(|(status, _)| status.as_u16()),
            key = self.call.tenant().map(|name| &**name),
            prompt_tokens,
            completion_tokens,
            head_s = self.head.map(|(_, time)| seconds(time)),
            duration_s = seconds(self.arrived.elapsed()),
            "request"
        );
    }
}
