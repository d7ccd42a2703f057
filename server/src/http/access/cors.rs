//! CORS (<https://fetch.spec.whatwg.org/#http-cors-protocol>): which web pages may call the API from a browser.

use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use crate::access::origins::AllowedOrigins;

/// What a page may read beside what every page may.
const EXPOSED: &str = "x-request-id, retry-after, www-authenticate, x-ratelimit-limit-requests, x-ratelimit-limit-tokens, \
     x-ratelimit-remaining-requests, x-ratelimit-remaining-tokens, x-ratelimit-reset-requests, x-ratelimit-reset-tokens";

/// How many seconds a browser may keep the answer.
const MAX_AGE_S: &str = "600";

/// For `axum::middleware::from_fn_with_state`; outside the layer that asks for keys, which a browser's question hasn't. A
/// page that may not ask gets no header, and its browser keeps the answer from it.
pub(super) async fn layer(
    State(origins): State<AllowedOrigins>,
    request: Request,
    next: Next,
) -> Response {
    let origin = request.headers().get(header::ORIGIN).cloned();
    let origin = origin.filter(|origin| origins.allows(origin.as_bytes()));
    let is_question = request.method() == Method::OPTIONS
        && (request.headers()).contains_key(header::ACCESS_CONTROL_REQUEST_METHOD);
    let mut response = match (&origin, is_question) {
        (Some(_), true) => may_ask(request.headers()),
        _ => next.run(request).await,
    };
    let headers = response.headers_mut();
    if let Some(origin) = origin {
        let allowed = match origins.is_any() {
            true => HeaderValue::from_static("*"),
            false => origin,
        };
        headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, allowed);
        let exposed = HeaderValue::from_static(EXPOSED);
        headers.insert(header::ACCESS_CONTROL_EXPOSE_HEADERS, exposed);
    }
    if !origins.is_any() {
        headers.append(header::VARY, HeaderValue::from_static("origin"));
    }
    response
}

/// Any header may be sent: clients have many of their own, and `*` would not mean `Authorization`.
fn may_ask(headers: &HeaderMap) -> Response {
    let mut response = StatusCode::NO_CONTENT.into_response();
    let answer = response.headers_mut();
    let mut put = |name: HeaderName, value| answer.insert(name, value);
    let methods = HeaderValue::from_static("GET, POST");
    put(header::ACCESS_CONTROL_ALLOW_METHODS, methods);
    let max_age = HeaderValue::from_static(MAX_AGE_S);
    put(header::ACCESS_CONTROL_MAX_AGE, max_age);
    if let Some(asked) = headers.get(header::ACCESS_CONTROL_REQUEST_HEADERS) {
        put(header::ACCESS_CONTROL_ALLOW_HEADERS, asked.clone());
    }
    response
}
