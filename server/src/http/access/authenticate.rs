//! A key on every route but `/health` and `/ready`, which tell nothing of anybody. `/load` and `/metrics` tell of all
//! tenants; whoever watches the replica has them without a key on the management port.

use std::sync::Arc;

use axum::extract::{MatchedPath, Request, State};
use axum::http::{HeaderMap, HeaderValue, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use tokio::sync::watch;

use crate::access::keys::Keyring;
use crate::frontend::Call;
use crate::http::error::ApiError;

/// For `axum::middleware::from_fn_with_state`.
pub(super) async fn layer(
    State(keys): State<watch::Receiver<Arc<Keyring>>>,
    request: Request,
    next: Next,
) -> Response {
    let route = request.extensions().get::<MatchedPath>();
    if route.is_some_and(|route| matches!(route.as_str(), "/health" | "/ready")) {
        return next.run(request).await;
    }
    let name = {
        let keys = Arc::clone(&keys.borrow());
        presented(request.headers()).map(|key| keys.find(key).cloned())
    };
    let (message, challenge) = match name {
        Some(Some(name)) => {
            if let Some(call) = request.extensions().get::<Arc<Call>>() {
                call.authenticated(name);
            }
            return next.run(request).await;
        }
        Some(None) => (
            "the API key is not valid; ask whoever runs this server for one",
            r#"Bearer error="invalid_token""#,
        ),
        None => (
            "no API key was sent; send one as \"Authorization: Bearer KEY\" or \"x-api-key: KEY\"",
            "Bearer",
        ),
    };
    let mut response = ApiError::unauthorized(message).into_response();
    let challenge = HeaderValue::from_static(challenge);
    (response.headers_mut()).insert(header::WWW_AUTHENTICATE, challenge);
    response
}

/// The token of `Authorization: Bearer` (RFC 6750), or else `x-api-key`, as Anthropic's clients send it.
fn presented(headers: &HeaderMap) -> Option<&[u8]> {
    let bearer = headers.get(header::AUTHORIZATION).and_then(|value| {
        let (scheme, token) = value.as_bytes().split_at_checked("Bearer ".len())?;
        scheme.eq_ignore_ascii_case(b"Bearer ").then_some(token)
    });
    let other = || headers.get("x-api-key").map(HeaderValue::as_bytes);
    bearer.or_else(other).map(<[u8]>::trim_ascii)
}
