//! Watches, and calls observe -> plan -> apply for each `LLMDeployment` that something happened to. One that can't be
//! read is reconciled like any other, into a status that says so.
//!
//! A change of the status alone triggers nothing. It holds no state that a restart would lose.

use std::collections::HashMap;
use std::future::Future;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use futures::StreamExt;
use jiff::Timestamp;
use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{Pod, Service, ServiceAccount};
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use kube::runtime::controller::{self, Action, Config, Controller};
use kube::runtime::reflector::{self, ObjectRef};
use kube::runtime::{WatchStreamExt, predicates, watcher};
use kube::{Api, Client, Resource, ResourceExt};
use kvasir_crds::llmdeployment::SELECTOR_LABEL;
use serde::de::DeserializeOwned;

use crate::apply::apply;
use crate::metrics::Metrics;
use crate::observe::{LoadReader, observe, serves};
use crate::plan::{History, Now, plan, plan_unreadable};
use crate::stored::Stored;

/// Reconciles at once, at most: each waits for the API server most of its time.
const CONCURRENCY: u16 = 32;
/// After the first error of a reconcile; doubled with each further one.
const FIRST_RETRY: Duration = Duration::from_secs(1);
const LONGEST_RETRY: Duration = Duration::from_secs(60);

/// What the operator was started with.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The image of the servers where an `LLMDeployment` names none.
    pub default_image: String,
    /// The only namespace to watch; all of them where `None`.
    pub namespace: Option<String>,
}

struct Context {
    client: Client,
    loads: LoadReader,
    settings: Settings,
    metrics: Arc<Metrics>,
    started: Instant,
    memory: Mutex<HashMap<String, Memory>>,
}

/// What is remembered of one deployment, by UID.
#[derive(Clone, Default)]
struct Memory {
    history: History,
    failures: u32,
}

impl Context {
    fn memory<T>(&self, uid: &str, f: impl FnOnce(&mut Memory) -> T) -> T {
        let mut memory = self.memory.lock().unwrap_or_else(PoisonError::into_inner);
        f(memory.entry(uid.to_owned()).or_default())
    }
}

/// Runs until `stop` resolves; reconciles under way are finished.
pub async fn run(
    client: Client,
    settings: Settings,
    metrics: Arc<Metrics>,
    stop: impl Future<Output = ()> + Send + Sync + 'static,
) {
    let (store, writer) = reflector::store();
    let deployments = watcher(
        api::<Stored>(&client, &settings),
        watcher::Config::default(),
    )
    .default_backoff()
    .reflect(writer)
    .applied_objects()
    .predicate_filter(predicates::generation, Default::default());
    let owned = watcher::Config::default().labels(SELECTOR_LABEL);
    let series = Arc::clone(&metrics);
    let context = Arc::new(Context {
        client: client.clone(),
        loads: LoadReader::default(),
        settings: settings.clone(),
        metrics,
        started: Instant::now(),
        memory: Mutex::default(),
    });
    Controller::for_stream(deployments, store)
        .with_config(Config::default().concurrency(CONCURRENCY))
        .owns(api::<Deployment>(&client, &settings), owned.clone())
        .owns(api::<Service>(&client, &settings), owned.clone())
        .owns(
            api::<PodDisruptionBudget>(&client, &settings),
            owned.clone(),
        )
        .owns(api::<ServiceAccount>(&client, &settings), owned.clone())
        .watches(api::<Pod>(&client, &settings), owned, |pod| {
            let namespace = pod.namespace().unwrap_or_default();
            serves(&pod).map(|name| ObjectRef::<Stored>::new(name).within(&namespace))
        })
        .graceful_shutdown_on(stop)
        .run(reconcile, on_error, context)
        .for_each(|outcome| {
            // The children of a deployment that is gone go after it, and trigger this for each.
            if let Err(controller::Error::ObjectNotFound(gone)) = outcome {
                series.forget(gone.namespace.as_deref().unwrap_or_default(), &gone.name);
            }
            std::future::ready(())
        })
        .await;
}

fn api<K>(client: &Client, settings: &Settings) -> Api<K>
where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope> + Clone + DeserializeOwned,
{
    match &settings.namespace {
        Some(namespace) => Api::namespaced(client.clone(), namespace),
        None => Api::all(client.clone()),
    }
}

#[tracing::instrument(skip_all, fields(namespace = stored.namespace(), name = stored.name_any()))]
async fn reconcile(stored: Arc<Stored>, context: Arc<Context>) -> Result<Action, kube::Error> {
    let uid = stored.uid().unwrap_or_default();
    if stored.meta().deletion_timestamp.is_some() {
        // The garbage collector takes the children; there is no finalizer to hold it up.
        context
            .memory
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&uid);
        context
            .metrics
            .forget(&stored.namespace().unwrap_or_default(), &stored.name_any());
        return Ok(Action::await_change());
    }
    let observed = observe(&context.client, &context.loads, stored.meta()).await?;
    let now = Now {
        monotonic: context.started.elapsed(),
        wall: Timestamp::now(),
    };
    let plan = context.memory(&uid, |memory| {
        let (history, image) = (&mut memory.history, &context.settings.default_image);
        match &stored.0 {
            Ok(deployment) => plan(deployment, &observed, history, now, image),
            Err(unreadable) => plan_unreadable(unreadable, &observed, history, now),
        }
    });
    apply(&context.client, &stored, &observed, &plan).await?;
    context.memory(&uid, |memory| memory.failures = 0);
    context.metrics.reconciled(&stored, &plan, &observed);
    Ok(Action::requeue(plan.recheck_after))
}

fn on_error(stored: Arc<Stored>, error: &kube::Error, context: Arc<Context>) -> Action {
    let failures = context.memory(&stored.uid().unwrap_or_default(), |memory| {
        memory.failures = memory.failures.saturating_add(1);
        memory.history.forget_status();
        memory.failures
    });
    let delay = FIRST_RETRY
        .saturating_mul(1 << failures.saturating_sub(1).min(6))
        .min(LONGEST_RETRY);
    tracing::warn!(name = %stored.name_any(), %error, failures, retry_s = delay.as_secs(), "reconcile failed");
    context.metrics.failed();
    Action::requeue(delay)
}
