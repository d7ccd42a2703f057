//! For tests: an API server in a function.

use std::convert::Infallible;
use std::future::Future;

use axum::http::request::Parts;
use axum::http::{Request, Response};
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use kube::Client;
use kube::client::Body;
use serde_json::Value;

/// A client of the server that gives `answer`, a status code and a body, to each request's head and body.
pub(crate) fn client<F>(answer: impl Fn(Parts, Bytes) -> F + Clone + Send + 'static) -> Client
where
    F: Future<Output = (u16, Value)> + Send + 'static,
{
    let service = tower::service_fn(move |request: Request<Body>| {
        let answer = answer.clone();
        async move {
            let (head, body) = request.into_parts();
            let body = body.collect().await.expect("a body").to_bytes();
            let (code, said) = answer(head, body).await;
            let response = Response::builder()
                .status(code)
                .body(Full::new(Bytes::from(said.to_string())))
                .expect("a response");
            Ok::<_, Infallible>(response)
        }
    });
    Client::new(service, "n")
}
