//! What is kept until an answer has been sent.

use axum::body::Body;
use axum::response::Response;
use http_body_util::BodyExt;

/// Keeps `held` until the answer's body has been sent, or nobody is there to take it.
pub(super) fn hold<T: Send + 'static>(response: Response, held: T) -> Response {
    response.map(|body| {
        Body::new(body.map_err(move |error| {
            let _held = &held;
            error
        }))
    })
}
