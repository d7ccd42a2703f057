//! A reconcile against an API server that fails or refuses one request: what may pass is an error that names the step, a
//! refusal is told, and neither keeps the rest from being written.

use std::sync::atomic::{AtomicUsize, Ordering};

use axum::http::Method;
use kube::runtime::watcher::Event;
use serde_json::{Value, json};

use super::*;

/// The requests to refuse: those with this method, to a path that ends so, with this code.
type Refused = (Method, &'static str, u16);

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

/// An API server whose refusals may change between requests, and what was written to it.
#[derive(Clone, Default)]
struct Server {
    refused: Arc<Mutex<Option<Refused>>>,
    n_refusals: Arc<AtomicUsize>,
    /// Method, path and body of each write that was taken.
    written: Arc<Mutex<Vec<(String, Value)>>>,
}

impl Server {
    fn client(&self) -> Client {
        let server = self.clone();
        crate::fake_api::client(move |head, body| {
            std::future::ready(server.take(&head.method, head.uri.path(), &body))
        })
    }

    fn take(&self, method: &Method, path: &str, body: &[u8]) -> (u16, Value) {
        let refused = self.refused.lock().unwrap();
        if let Some((_, _, code)) = refused
            .as_ref()
            .filter(|(refused, end, _)| refused == method && path.ends_with(end))
        {
            self.n_refusals.fetch_add(1, Ordering::SeqCst);
            return (*code, failure(*code, "AsTheTestWantsIt"));
        }
        if *method != Method::GET {
            let sent = serde_json::from_slice(body).unwrap_or_default();
            let end = path.rsplit('/').take(2).collect::<Vec<_>>();
            let what = format!("{}/{}", end.get(1).unwrap_or(&""), end[0]);
            self.written.lock().unwrap().push((what, sent));
        }
        answer(method, path, body)
    }

    fn refuse(&self, refused: Option<Refused>) {
        *self.refused.lock().unwrap() = refused;
        self.written.lock().unwrap().clear();
    }

    /// The bodies that were written to a path that ends so.
    fn written(&self, end: &str) -> Vec<Value> {
        let written = self.written.lock().unwrap();
        let to = written.iter().filter(|(path, _)| path.ends_with(end));
        to.map(|(_, body)| body.clone()).collect()
    }
}

/// A context whose watches have brought nothing.
fn context(client: Client) -> Arc<Context> {
    let (cache, mut writers) = Cache::new();
    writers.deployments.apply_watcher_event(&Event::InitDone);
    writers.services.apply_watcher_event(&Event::InitDone);
    writers.budgets.apply_watcher_event(&Event::InitDone);
    writers.accounts.apply_watcher_event(&Event::InitDone);
    writers.pods.see(&Event::Init);
    writers.pods.see(&Event::InitDone);
    Arc::new(Context {
        sources: Sources {
            client,
            cache,
            loads: LoadReader::default(),
            starts: LoadReader::default(),
            logs: LogReader::default(),
        },
        settings: Settings {
            default_image: "kvasir:1".into(),
            namespace: None,
        },
        metrics: Arc::new(Metrics::new().expect("fresh")),
        health: Arc::default(),
        started: Instant::now(),
        memory: Mutex::default(),
    })
}

/// The condition of a status that was written.
fn condition(status: &Value, type_: &str) -> Value {
    let conditions = status["status"]["conditions"].as_array().cloned();
    let mut conditions = conditions.unwrap_or_default().into_iter();
    conditions.find(|c| c["type"] == type_).unwrap_or_default()
}

#[tokio::test]
async fn a_failure_names_its_step_and_keeps_nothing_else_from_being_written() {
    let server = Server::default();
    for (n, (method, path, step, words)) in [
        (
            Method::GET,
            "/services/m",
            "read_child",
            "cannot read the Service",
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
            Method::PATCH,
            "/status",
            "write_status",
            "cannot write the status",
        ),
    ]
    .into_iter()
    .enumerate()
    {
        let context = context(server.client());
        let stored: Arc<Stored> = Arc::new(serde_json::from_value(resource()).unwrap());
        let reconcile = || reconcile(Arc::clone(&stored), Arc::clone(&context));
        server.refuse(Some((method.clone(), path, 503)));
        let error = reconcile().await.expect_err(words);
        assert_eq!((error.step(), error.to_string().as_str()), (step, words));
        assert!(
            std::error::Error::source(&error).is_some(),
            "{words}: and its cause"
        );
        assert_eq!(
            server.n_refusals.load(Ordering::SeqCst),
            n + 1,
            "{words}: once"
        );
        on_error(Arc::clone(&stored), &error, Arc::clone(&context));
        let counted = format!("kvasir_operator_reconcile_errors_total{{step=\"{step}\"}}");
        let text = context.metrics.text().unwrap();
        let line = text.lines().find(|line| line.starts_with(&counted));
        assert!(line.is_some_and(|line| !line.ends_with(" 0")), "{text}");

        if step == "read_child" {
            continue;
        }
        let carried_out = path != "/deployments/m";
        let n_deployments = server.written("deployments/m").len();
        assert_eq!(n_deployments == 1, carried_out, "{words}");
        let n_scalings = server.written("/events").len();
        assert_eq!(
            n_scalings == 1,
            carried_out,
            "{words}: what was carried out is told, and nothing else"
        );
        let statuses = server.written("m/status");
        assert_eq!(
            statuses.len(),
            usize::from(step != "write_status"),
            "{words}"
        );
        if let [status] = &statuses[..] {
            let scaled = status["status"]["lastScaling"]["to"] == 2;
            assert_eq!(scaled, carried_out, "{words}");
            assert_eq!(
                condition(status, "Accepted")["status"],
                "True",
                "{words}: it may pass"
            );
        }

        server.refuse(None);
        reconcile().await.expect("carried out");
        let last = context.sources.cache.resource(Arc::clone(&stored));
        let status = last.status().expect("read back before the watch brings it");
        assert_eq!(
            status.last_scaling.as_ref().map(|scaling| scaling.to),
            Some(2),
            "{words}: told by now"
        );
    }
}

#[tokio::test]
async fn an_event_that_could_not_be_published_is_published_later() {
    let server = Server::default();
    let context = context(server.client());
    let stored: Arc<Stored> = Arc::new(serde_json::from_value(resource()).unwrap());
    let reconcile = || reconcile(Arc::clone(&stored), Arc::clone(&context));
    server.refuse(Some((Method::POST, "/events", 500)));
    reconcile().await.expect("events are not what it is about");
    assert_eq!(
        server.written("m/status").len(),
        1,
        "the status is written all the same"
    );
    assert!(
        context
            .metrics
            .text()
            .unwrap()
            .contains("{step=\"publish_event\"} 1")
    );
    server.refuse(None);
    reconcile().await.expect("carried out");
    let events = server.written("/events");
    assert!(
        events.iter().any(|event| event["reason"] == "ScaledUp"),
        "{events:?}"
    );
}

#[tokio::test]
async fn a_refusal_is_told_and_what_runs_is_scaled_from_the_last_template() {
    for code in [400, 403, 404, 413, 422] {
        let server = Server::default();
        let context = context(server.client());
        let mut object = resource();
        object["spec"]["autoscaling"]["minReplicas"] = 1.into();
        let first: Arc<Stored> = Arc::new(serde_json::from_value(object.clone()).unwrap());
        server.refuse(Some((Method::PATCH, "/services/m", code)));
        reconcile(first, Arc::clone(&context))
            .await
            .expect("no error");
        let status = server.written("m/status").remove(0);
        let accepted = condition(&status, "Accepted");
        assert_eq!(accepted["reason"], "ChildRefused", "{code}");
        assert_eq!(
            accepted["message"], "cannot apply the Service: as the test wants it",
            "{code}"
        );
        assert_eq!(condition(&status, "Stalled")["status"], "True", "{code}");
        assert!(condition(&status, "Reconciling").is_null(), "{code}");
        let events = server.written("/events");
        assert!(
            events.iter().any(|event| event["reason"] == "ChildRefused"),
            "{code}"
        );
        let refused =
            "kvasir_operator_refused{name=\"m\",namespace=\"n\",reason=\"ChildRefused\"} 1";
        assert!(context.metrics.text().unwrap().contains(refused), "{code}");
        assert_eq!(
            server.written("deployments/m").len(),
            1,
            "{code}: the other children are applied"
        );
    }
}
