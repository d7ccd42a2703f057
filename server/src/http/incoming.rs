//! What every call to the model begins with: who serves it, its body, and when it came. One extractor for all of them.
//!
//! It bounds the body's size and the time that the body may take; what stands in the body is not its concern.

use std::sync::Arc;
use std::time::Instant;

use axum::body::{Body, Bytes};
use axum::extract::{FromRequest, Request};
use axum::http::{HeaderMap, StatusCode, header};

use super::error::ApiError;
use super::{App, Limits, Serving};

/// A call to the model, read and not parsed.
#[derive(Debug)]
pub(super) struct Incoming {
    /// The model that answers it.
    pub(super) serving: Arc<Serving>,
    /// The whole body.
    pub(super) body: Bytes,
    /// When its head had arrived.
    pub(super) arrived: Instant,
}

impl FromRequest<Arc<App>> for Incoming {
    type Rejection = ApiError;

    async fn from_request(request: Request, app: &Arc<App>) -> Result<Self, ApiError> {
        let arrived = Instant::now();
        // Before the body: a client needn't send one to a server that can't answer.
        let serving = app.serving()?;
        let (head, body) = request.into_parts();
        Ok(Self {
            serving,
            body: read(&app.limits, &head.headers, body).await?,
            arrived,
        })
    }
}

async fn read(limits: &Limits, headers: &HeaderMap, body: Body) -> Result<Bytes, ApiError> {
    let too_large = || {
        let message = format!("the body is larger than {} bytes", limits.max_body_bytes);
        ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, message)
    };
    let announced = headers
        .get(header::CONTENT_LENGTH)
        .and_then(|n| n.to_str().ok()?.parse::<u64>().ok());
    if announced.is_some_and(|n| n > limits.max_body_bytes as u64) {
        return Err(too_large());
    }
    let limited = http_body_util::Limited::new(body, limits.max_body_bytes);
    let collected = http_body_util::BodyExt::collect(limited);
    match tokio::time::timeout(limits.read_timeout, collected).await {
        Ok(Ok(body)) => Ok(body.to_bytes()),
        Ok(Err(e)) if e.is::<http_body_util::LengthLimitError>() => Err(too_large()),
        Ok(Err(e)) => Err(ApiError::new(
            StatusCode::BAD_REQUEST,
            format!("the body could not be read: {e}"),
        )),
        Err(_) => {
            let message = format!(
                "the body did not arrive within {} s",
                limits.read_timeout.as_secs()
            );
            Err(ApiError::new(StatusCode::REQUEST_TIMEOUT, message))
        }
    }
}
