//! What every call to the model begins with: who serves it, its body, and when it came. One extractor for all of them.
//!
//! It bounds the body's size, the memory of all bodies together and the time that the body may take; what stands in the
//! body is not its concern.

use std::sync::Arc;
use std::time::Instant;

use axum::body::Body;
use axum::extract::{FromRequest, Request};
use axum::http::{HeaderMap, StatusCode, header};
use http_body_util::BodyExt;

use super::error::ApiError;
use super::{App, Limits, Serving};
use crate::frontend::Arrival;
use crate::frontend::budget::{ByteBudget, Lease, Purpose};

/// A call to the model, read and not parsed.
#[derive(Debug)]
pub(super) struct Incoming {
    /// The model that answers it.
    pub(super) serving: Arc<Serving>,
    /// The whole body.
    pub(super) body: Vec<u8>,
    /// The body's bytes in the budget: to be kept until nothing is left of what was made of it.
    pub(super) lease: Lease,
    /// When its head had arrived, and whose tokens are counted.
    pub(super) arrived: Arrival,
}

impl FromRequest<Arc<App>> for Incoming {
    type Rejection = ApiError;

    async fn from_request(request: Request, app: &Arc<App>) -> Result<Self, ApiError> {
        let at = Instant::now();
        // Before the body: a client needn't send one to a server that can't answer.
        let serving = app.serving()?;
        let (head, body) = request.into_parts();
        let call = head.extensions.get().cloned().unwrap_or_default();
        let arrived = Arrival { at, call };
        let (body, lease) = read(&app.limits, serving.engine.budget(), &head.headers, body).await?;
        Ok(Self {
            serving,
            body,
            lease,
            arrived,
        })
    }
}

async fn read(
    limits: &Limits,
    budget: &ByteBudget,
    headers: &HeaderMap,
    body: Body,
) -> Result<(Vec<u8>, Lease), ApiError> {
    let announced = headers
        .get(header::CONTENT_LENGTH)
        .and_then(|n| n.to_str().ok()?.parse::<usize>().ok());
    if announced.is_some_and(|n| n > limits.max_body_bytes) {
        return Err(too_large(limits));
    }
    let mut lease = budget.lease(Purpose::Body);
    let mut bytes = Vec::with_capacity(announced.unwrap_or(0));
    let all = read_all(limits, body, &mut lease, &mut bytes);
    tokio::time::timeout(limits.read_timeout, all)
        .await
        .unwrap_or_else(|_| {
            let message = format!(
                "the body did not arrive within {} s",
                limits.read_timeout.as_secs()
            );
            Err(ApiError::new(StatusCode::REQUEST_TIMEOUT, message))
        })?;
    Ok((bytes, lease))
}

async fn read_all(
    limits: &Limits,
    mut body: Body,
    lease: &mut Lease,
    bytes: &mut Vec<u8>,
) -> Result<(), ApiError> {
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|e| {
            let message = format!("the body could not be read: {e}");
            ApiError::new(StatusCode::BAD_REQUEST, message)
        })?;
        let Ok(data) = frame.into_data() else {
            continue;
        };
        if bytes.len() + data.len() > limits.max_body_bytes {
            return Err(too_large(limits));
        }
        lease.grow(data.len())?;
        bytes.extend_from_slice(&data);
    }
    Ok(())
}

fn too_large(limits: &Limits) -> ApiError {
    let message = format!("the body is larger than {} bytes", limits.max_body_bytes);
    ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, message)
}
