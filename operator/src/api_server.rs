//! The client of the API server: the cluster's own configuration, and word to [`Health`] of each watch that begins.

use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::http::{Request, Response};
use futures::future::BoxFuture;
use kube::client::{Body, ClientBuilder};
use kube::config::InferConfigError;
use kube::{Client, Config};
use tower::{Layer, Service};

use crate::health::Health;

/// How long a connection may take to come about. What a request may take is the requests' own deadline.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Why there is no client.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Neither a pod's service account nor a kubeconfig.
    #[error("no cluster is configured")]
    NoCluster(#[from] InferConfigError),
    /// What is configured can't be used.
    #[error("the cluster's configuration can't be used")]
    Unusable(#[from] kube::Error),
}

/// A client of the cluster that this process runs in, or that KUBECONFIG names.
///
/// # Errors
/// Where there is no cluster, or its configuration can't be used.
pub async fn client(health: &Arc<Health>) -> Result<Client, ClientError> {
    let mut config = Config::infer().await?;
    config.connect_timeout = Some(CONNECT_TIMEOUT);
    let noting = Noting(Arc::clone(health));
    let builder = ClientBuilder::try_from(config)?;
    Ok(builder.with_layer(&noting).build())
}

#[derive(Clone)]
struct Noting(Arc<Health>);

impl<S> Layer<S> for Noting {
    type Service = Noted<S>;

    fn layer(&self, inner: S) -> Noted<S> {
        Noted {
            inner,
            health: Arc::clone(&self.0),
        }
    }
}

/// A service whose answers are noted.
#[derive(Clone)]
struct Noted<S> {
    inner: S,
    health: Arc<Health>,
}

impl<S, B> Service<Request<Body>> for Noted<S>
where
    S: Service<Request<Body>, Response = Response<B>>,
    S::Future: Send + 'static,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = BoxFuture<'static, Result<S::Response, S::Error>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let (path, query) = Health::asked(&request);
        let health = Arc::clone(&self.health);
        let answer = self.inner.call(request);
        Box::pin(async move {
            let response = answer.await?;
            health.answered(&path, query.as_deref(), &response);
            Ok(response)
        })
    }
}
