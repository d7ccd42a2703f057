//! A reconcile against an API server that refuses one request: the error names the step, and nothing is remembered of
//! what was not carried out.

use std::convert::Infallible;
use std::sync::atomic::{AtomicUsize, Ordering};

use axum::http::{Method, Request, Response};
use http_body_util::{BodyExt as _, Full};
use kube::client::Body;
use kube::runtime::watcher::Event;
use serde_json::{Value, json};

use super::*;

/// The requests to refuse: those with this method, to a path that ends so.
type Refused = (Method, &'static str);

fn resource() -> Value {
    json!({
        "apiVersion": "kvasir.dev/v1alpha1", "kind": "LLMDeployment",
        "metadata": { "name": "m", "namespace": "n", "uid": "u", "generation": 1, "resourceVersion": "5" },
        "spec": { "model": { "source": { "demo": {} } }, "autoscaling": { "minReplicas": 2, "maxReplicas": 3 } }
    })
}

/// The child Deployment, with fewer replicas than are allowed: there is a scaling to tell.
fn child() -> Value {
    json!({
        "metadata": { "name": "m", "namespace": "n", "uid": "c", "ownerReferences": [
            { "apiVersion": "kvasir.dev/v1alpha1", "kind": "LLMDeployment", "name": "m", "uid": "u", "controller": true }] },
        "spec": { "replicas": 1, "selector": {}, "template": {} }
    })
}

/// What an API server answers that holds the child Deployment and nothing else.
fn answer(method: &Method, path: &str, body: &[u8]) -> (u16, Value) {
    let sent: Value = serde_json::from_slice(body).unwrap_or_default();
    match *method {
        Method::GET if path.ends_with("/deployments/m") => (200, child()),
        Method::GET if path.ends_with("/events") => (200, json!({ "metadata": {}, "items": [] })),
        Method::GET => (404, failure(404, "NotFound")),
        Method::PATCH if path.ends_with("/status") => {
            let mut held = resource();
            held["status"] = sent["status"].clone();
            held["metadata"]["resourceVersion"] = "6".into();
            (200, held)
        }
        _ => (200, sent),
    }
}

fn failure(code: u16, reason: &str) -> Value {
    json!({ "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "reason": reason,
        "message": "as the test wants it", "code": code })
}

/// A client of such a server; `refused` may change between requests, and `n_refusals` counts.
fn client(refused: Arc<Mutex<Option<Refused>>>, n_refusals: Arc<AtomicUsize>) -> Client {
    let service = tower::service_fn(move |request: Request<Body>| {
        let (refused, n_refusals) = (Arc::clone(&refused), Arc::clone(&n_refusals));
        async move {
            let (head, body) = request.into_parts();
            let body = body.collect().await.expect("a body").to_bytes();
            let path = head.uri.path();
            let is_refused = refused
                .lock()
                .unwrap()
                .as_ref()
                .is_some_and(|(method, end)| *method == head.method && path.ends_with(end));
            let (code, said) = if is_refused {
                n_refusals.fetch_add(1, Ordering::SeqCst);
                (500, failure(500, "InternalError"))
            } else {
                answer(&head.method, path, &body)
            };
            let response = Response::builder()
                .status(code)
                .body(Full::new(bytes::Bytes::from(said.to_string())))
                .expect("a response");
            Ok::<_, Infallible>(response)
        }
    });
    Client::new(service, "n")
}

/// A context whose watches have brought one pod that isn't ready, so that warnings are asked for.
fn context(client: Client) -> Arc<Context> {
    let (cache, mut writers) = Cache::new();
    writers.deployments.apply_watcher_event(&Event::InitDone);
    writers.services.apply_watcher_event(&Event::InitDone);
    writers.budgets.apply_watcher_event(&Event::InitDone);
    writers.accounts.apply_watcher_event(&Event::InitDone);
    let pod = serde_json::from_value(json!({ "metadata": { "name": "p", "namespace": "n",
        "labels": { "kvasir.dev/llmdeployment": "m" } } }));
    writers.pods.see(&Event::Init);
    writers.pods.see(&Event::InitApply(pod.expect("a pod")));
    writers.pods.see(&Event::InitDone);
    Arc::new(Context {
        sources: Sources {
            client,
            cache,
            loads: LoadReader::default(),
        },
        settings: Settings {
            default_image: "kvasir:1".into(),
            namespace: None,
        },
        metrics: Arc::new(Metrics::new().expect("fresh")),
        started: Instant::now(),
        memory: Mutex::default(),
    })
}

#[tokio::test]
async fn a_failure_names_its_step_and_leaves_the_history_as_it_was() {
    let refused = Arc::new(Mutex::new(None));
    let n_refusals = Arc::new(AtomicUsize::new(0));
    let context = context(client(Arc::clone(&refused), Arc::clone(&n_refusals)));
    let stored: Arc<Stored> = Arc::new(serde_json::from_value(resource()).unwrap());
    let history = || context.memory(&stored, |memory| memory.history.clone());
    let reconcile = || reconcile(Arc::clone(&stored), Arc::clone(&context));
    for (n, (method, path, step, words)) in [
        (
            Method::GET,
            "/services/m",
            "read_child",
            "cannot read the Service",
        ),
        (
            Method::GET,
            "/events",
            "list_warnings",
            "cannot list the warnings about the pods",
        ),
        (
            Method::PATCH,
            "/serviceaccounts/m",
            "apply_child",
            "cannot apply the ServiceAccount",
        ),
        (
            Method::PATCH,
            "/services/m",
            "apply_child",
            "cannot apply the Service",
        ),
        (
            Method::PATCH,
            "/poddisruptionbudgets/m",
            "apply_child",
            "cannot apply the PodDisruptionBudget",
        ),
        (
            Method::PATCH,
            "/deployments/m",
            "apply_child",
            "cannot apply the Deployment",
        ),
        (
            Method::POST,
            "/events",
            "publish_event",
            "cannot publish the event ScaledUp",
        ),
        (
            Method::PATCH,
            "/status",
            "write_status",
            "cannot write the status",
        ),
    ]
    .into_iter()
    .enumerate()
    {
        *refused.lock().unwrap() = Some((method, path));
        let error = reconcile().await.expect_err(words);
        assert_eq!((error.step(), error.to_string().as_str()), (step, words));
        assert!(
            std::error::Error::source(&error).is_some(),
            "{words}: and its cause"
        );
        assert_eq!(n_refusals.load(Ordering::SeqCst), n + 1, "{words}: once");
        assert_eq!(
            history(),
            History::default(),
            "{words}: nothing is remembered"
        );
        on_error(Arc::clone(&stored), &error, Arc::clone(&context));
        let counted = format!("kvasir_operator_reconcile_errors_total{{step=\"{step}\"}}");
        let text = context.metrics.text().unwrap();
        let line = text.lines().find(|line| line.starts_with(&counted));
        assert!(line.is_some_and(|line| !line.ends_with(" 0")), "{text}");
    }
    *refused.lock().unwrap() = None;
    reconcile().await.expect("carried out");
    assert_ne!(
        history(),
        History::default(),
        "what was carried out is remembered"
    );
    let status = context.sources.cache.resource(Arc::clone(&stored));
    assert!(
        status.status().is_some(),
        "the written status is read back before the watch brings it"
    );
}
