//! Watches, and calls observe -> plan -> apply -> report -> tell for each `LLMDeployment` that something happened to. One that can't be
//! read is reconciled like any other, into a status that says so.
//!
//! A change of the status alone triggers nothing. It holds no state that a restart would lose.

use std::collections::HashMap;
use std::error::Error as _;
use std::future::Future;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use futures::{Stream, StreamExt, TryStreamExt};
use jiff::Timestamp;
use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::api::core::v1::{Event as CoreEvent, Pod};
use kube::runtime::controller::{self, Action, Config, Controller};
use kube::runtime::reflector::store::Writer;
use kube::runtime::reflector::{self, ObjectRef};
use kube::runtime::{WatchStreamExt, predicates, watcher};
use kube::{Api, Client, Resource, ResourceExt};
use kvasir_crds::llmdeployment::SELECTOR_LABEL;
use serde::de::DeserializeOwned;

use crate::apply::{apply, publish, write_status};
use crate::cache::{Cache, Pods, Warnings, Writers, strip_warning};
use crate::error::Error;
use crate::health::{Health, WATCH_SECONDS};
use crate::key::{Key, key_of};
use crate::metrics::{Figures, Metrics};
use crate::observe::{LoadReader, LogReader, Sources, observe};
use crate::observed::{Child, Observed};
use crate::plan::{FAILING_AFTER, History, Now, Outcome, Plan, plan, report};
use crate::pod::{self, deployment_of};
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
    sources: Sources,
    settings: Settings,
    metrics: Arc<Metrics>,
    health: Arc<Health>,
    started: Instant,
    memory: Mutex<HashMap<Key, Memory>>,
}

/// What is remembered of one deployment.
#[derive(Clone, Default)]
struct Memory {
    /// Another of the same name is another deployment.
    uid: Option<String>,
    history: History,
    /// Reconciles that failed one after the other.
    failures: u32,
    /// Since when children can't be written, by the operator's monotonic clock.
    failing: Option<Duration>,
}

impl Context {
    fn memory<T>(&self, stored: &Stored, f: impl FnOnce(&mut Memory) -> T) -> T {
        let mut memory = self.memory.lock().unwrap_or_else(PoisonError::into_inner);
        let memory = memory.entry(key_of(stored)).or_default();
        if memory.uid != stored.uid() {
            *memory = Memory {
                uid: stored.uid(),
                ..Memory::default()
            };
        }
        f(memory)
    }

    /// Forgets a deployment that is gone.
    fn forget(&self, key: &Key) {
        let mut memory = self.memory.lock().unwrap_or_else(PoisonError::into_inner);
        memory.remove(key);
        self.sources.forget(key);
        self.metrics.forget(&key.0, &key.1);
        self.health.forget(key);
    }

    /// Says that a step failed, in the log and in the metrics.
    fn failed(&self, stored: &Stored, error: &Error) {
        tracing::warn!(
            namespace = stored.namespace(),
            name = %stored.name_any(),
            step = error.step(),
            %error,
            cause = error.source().map(ToString::to_string),
            "a step of the reconcile failed"
        );
        self.metrics.failed(error);
    }
}

/// Runs until `stop` resolves; reconciles under way are finished.
pub async fn run(
    client: Client,
    settings: Settings,
    metrics: Arc<Metrics>,
    health: Arc<Health>,
    stop: impl Future<Output = ()> + Send + Sync + 'static,
) {
    let (store, writer) = reflector::store();
    let watch = watcher::Config::default().timeout(WATCH_SECONDS);
    let deployments = watcher(api::<Stored>(&client, &settings), watch)
        .default_backoff()
        .reflect(writer)
        .applied_objects()
        .predicate_filter(predicates::generation, Default::default());
    let (cache, writers) = Cache::new();
    let Writers {
        deployments: child_deployments,
        services,
        budgets,
        accounts,
        pods,
        warnings,
    } = writers;
    let watches = Watches {
        client: &client,
        settings: &settings,
    };
    let controller = Controller::for_stream(deployments, store)
        .with_config(Config::default().concurrency(CONCURRENCY))
        .owns_stream(watches.reflect(child_deployments))
        .owns_stream(watches.reflect(services))
        .owns_stream(watches.reflect(budgets))
        .owns_stream(watches.reflect(accounts))
        .watches_stream(watches.pods(pods), |pod| {
            let namespace = pod.namespace().unwrap_or_default();
            deployment_of(&pod).map(|name| ObjectRef::<Stored>::new(name).within(&namespace))
        })
        // A warning alone is no reason to look: they are read when their pod's deployment is looked at.
        .watches_stream(watches.warnings(warnings), |_| None);
    health.begins();
    let context = Arc::new(Context {
        sources: Sources {
            client: client.clone(),
            cache,
            loads: LoadReader::default(),
            starts: LoadReader::default(),
            logs: LogReader::default(),
        },
        settings: settings.clone(),
        metrics,
        health,
        started: Instant::now(),
        memory: Mutex::default(),
    });
    controller
        .graceful_shutdown_on(stop)
        .run(reconcile, on_error, Arc::clone(&context))
        .for_each(|outcome| {
            on_outcome(outcome, &context);
            std::future::ready(())
        })
        .await;
}

/// How a reconcile ended, or why none could begin. What failed in one is [`on_error`]'s.
fn on_outcome(
    outcome: Result<(ObjectRef<Stored>, Action), controller::Error<Error, watcher::Error>>,
    context: &Context,
) {
    match outcome {
        // The children of a deployment that is gone go after it, and trigger this for each.
        Err(controller::Error::ObjectNotFound(gone)) => {
            context.forget(&(gone.namespace.unwrap_or_default(), gone.name));
        }
        // Nothing is reconciled before each watch has begun: one that is refused must be heard of.
        Err(controller::Error::QueueError(error)) => tracing::warn!(%error, "watch failed"),
        Err(_) | Ok(_) => {}
    }
}

/// The watches of what carries our label.
struct Watches<'a> {
    client: &'a Client,
    settings: &'a Settings,
}

impl Watches<'_> {
    fn watch<K: Child>(
        &self,
    ) -> impl Stream<Item = watcher::Result<watcher::Event<K>>> + Send + use<K> {
        let labelled = watcher::Config::default()
            .labels(SELECTOR_LABEL)
            .timeout(WATCH_SECONDS);
        watcher(api::<K>(self.client, self.settings), labelled).default_backoff()
    }

    /// Children into the cache, without what nobody reads.
    fn reflect<K: Child>(
        &self,
        writer: Writer<K>,
    ) -> impl Stream<Item = watcher::Result<K>> + Send + use<K> {
        let events = self.watch::<K>().modify(drop_managed_fields);
        events.reflect(writer).touched_objects()
    }

    /// Pods into the cache, without what nobody reads.
    fn pods(&self, pods: Arc<Pods>) -> impl Stream<Item = watcher::Result<Pod>> + Send + use<> {
        let events = self.watch::<Pod>().modify(pod::strip);
        let seen = events.inspect_ok(move |event| pods.see(event));
        seen.touched_objects()
    }

    /// Warnings about pods into the cache, without what nobody reads.
    fn warnings(
        &self,
        warnings: Arc<Warnings>,
    ) -> impl Stream<Item = watcher::Result<CoreEvent>> + Send + use<> {
        let of_pods = watcher::Config::default()
            .fields("type=Warning,involvedObject.kind=Pod")
            .timeout(WATCH_SECONDS);
        let events = watcher(api::<CoreEvent>(self.client, self.settings), of_pods)
            .default_backoff()
            .modify(strip_warning);
        let seen = events.inspect_ok(move |event| warnings.see(event));
        seen.touched_objects()
    }
}

fn drop_managed_fields<K: Resource>(object: &mut K) {
    object.meta_mut().managed_fields = None;
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
async fn reconcile(stored: Arc<Stored>, context: Arc<Context>) -> Result<Action, Error> {
    let outcome = look(stored.clone(), &context).await;
    let again = match &outcome {
        Ok(again) => *again,
        // `on_error` doubles it.
        Err(_) => Some(LONGEST_RETRY),
    };
    context.health.looked_at(&key_of(stored.as_ref()), again);
    outcome.map(|again| again.map_or_else(Action::await_change, Action::requeue))
}

/// One look at a deployment; when the next is due, unless it is gone.
async fn look(stored: Arc<Stored>, context: &Context) -> Result<Option<Duration>, Error> {
    let stored = context.sources.cache.resource(stored);
    if stored.meta().deletion_timestamp.is_some() {
        // The garbage collector takes the children; there is no finalizer to hold it up.
        context.forget(&key_of(stored.as_ref()));
        return Ok(None);
    }
    let observed = observe(&context.sources, stored.meta()).await?;
    let now = Now {
        monotonic: context.started.elapsed(),
        wall: Timestamp::now(),
    };
    let Memory {
        history, failing, ..
    } = context.memory(&stored, |memory| memory.clone());
    let image = &context.settings.default_image;
    let plan = plan(&stored, &observed, &history, now, image);
    let load = plan.load;
    let (mut outcome, failure) = apply(&context.sources, &observed.children, &plan).await;
    if failure
        .as_ref()
        .is_some_and(Error::namespace_is_terminating)
    {
        // The deployment goes with it.
        return Ok(None);
    }
    let failing = failure.as_ref().map(|_| failing.unwrap_or(now.monotonic));
    let is_old = failing.is_some_and(|since| now.monotonic - since >= FAILING_AFTER);
    outcome.failing = failure.as_ref().filter(|_| is_old).map(Error::sentence);

    let desired = desired_replicas(&plan, &outcome, &observed);
    let report = report(&stored, &observed, plan, &outcome, now);
    let unsent = publish(&context.sources, &stored, &report.events).await;
    let written = match &report.status {
        Some(status) => write_status(&context.sources, &stored, status).await,
        None => Ok(()),
    };
    for (_, error) in &unsent {
        context.failed(&stored, error);
    }
    context.metrics.looked(
        &stored,
        &Figures {
            desired,
            load,
            refused: report.refused,
            decision: report.decision.as_ref(),
            pods: &observed.pods,
            status: report.status.as_ref().or(stored.status()),
        },
    );
    // An event that is refused would be refused again.
    let may_be_sent = unsent
        .into_iter()
        .filter(|(_, error)| error.refusal().is_none());
    let again = report.recheck_after;
    let history = report.remember(
        written.is_ok(),
        may_be_sent.map(|(event, _)| event).collect(),
    );
    context.memory(&stored, |memory| {
        memory.failing = failing;
        memory.history = history;
    });
    match failure.or(written.err()) {
        Some(error) => Err(error),
        None => {
            context.memory(&stored, |memory| memory.failures = 0);
            context.metrics.reconciled();
            Ok(Some(again))
        }
    }
}

/// The number of replicas that the child Deployment asks for by now.
fn desired_replicas(plan: &Plan, outcome: &Outcome, observed: &Observed) -> i32 {
    let planned = plan.children.as_ref().map(|children| &children.deployment);
    let planned = planned
        .or(plan.fallback.as_ref())
        .filter(|_| outcome.is_scaled);
    // Where nothing could be changed, what was asked for before goes on.
    let child = planned.or(observed.children.deployment.as_deref());
    child
        .and_then(|child| child.spec.as_ref()?.replicas)
        .unwrap_or(0)
}

fn on_error(stored: Arc<Stored>, error: &Error, context: Arc<Context>) -> Action {
    let failures = context.memory(&stored, |memory| {
        memory.failures = memory.failures.saturating_add(1);
        memory.failures
    });
    let delay = FIRST_RETRY
        .saturating_mul(1 << failures.saturating_sub(1).min(6))
        .min(LONGEST_RETRY);
    context.failed(&stored, error);
    Action::requeue(delay)
}

#[cfg(test)]
mod tests;
