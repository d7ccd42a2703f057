//! A name for each request, in its answer and its log lines: the client's own `x-request-id`, or one that is made.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue};
use axum::middleware::Next;
use axum::response::Response;
use tracing::Instrument;

use crate::frontend::Call;
use crate::http::App;

/// The header, in and out.
const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// The longest that is taken from a client.
const MAX_BYTES: usize = 128;

/// In a request's extensions.
#[derive(Clone, Debug)]
pub(super) struct RequestId(pub(super) Arc<str>);

/// For `axum::middleware::from_fn_with_state`. It also begins the [`Call`].
pub(super) async fn layer(
    State(app): State<Arc<App>>,
    mut request: Request,
    next: Next,
) -> Response {
    let id: Arc<str> = match sent(request.headers()) {
        Some(id) => id.into(),
        None => app.ids.call().into(),
    };
    request.extensions_mut().insert(RequestId(Arc::clone(&id)));
    request.extensions_mut().insert(Arc::<Call>::default());
    let span = tracing::info_span!("request", request_id = &*id);
    let mut response = next.run(request).instrument(span).await;
    if let Ok(value) = HeaderValue::from_str(&id) {
        response.headers_mut().insert(REQUEST_ID, value);
    }
    response
}

/// What a client sent, where it is short, and visible ASCII, so that it can stand in a line of a log.
fn sent(headers: &HeaderMap) -> Option<&str> {
    let id = headers.get(REQUEST_ID)?.to_str().ok()?;
    let is_right = (1..=MAX_BYTES).contains(&id.len()) && id.bytes().all(|b| b.is_ascii_graphic());
    is_right.then_some(id)
}
