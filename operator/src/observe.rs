//! Reads what exists for one `LLMDeployment`: its children, its pods, their warnings, and what its replicas report.
//! Children and pods come from the cache, and from the API server only where the cache lacks them.
//!
//! Reads only; what any of it means is `plan`'s to decide.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::future::join_all;
use http_body_util::{BodyExt, Empty, Limited};
use hyper_util::client::legacy::Client as HttpClient;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{Event, Pod, Service, ServiceAccount};
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::{ListParams, LogParams};
use kube::{Api, Client, ResourceExt};
use kvasir_crds::LoadReport;

use crate::cache::{Cache, Key};
use crate::plan::autoscale::ReplicaLoad;
use crate::plan::children::{Child, PORT};
use crate::plan::status::MAX_NOT_READY;
use crate::pod::{LINE_LIMIT_CHARS, LastLine, ended, has_started, is_ready, last_line, living};

/// How long a replica may take to answer `/load`; a later answer is silence.
const LOAD_TIMEOUT: Duration = Duration::from_secs(1);
/// A load report is a few hundred bytes.
const LOAD_LIMIT_BYTES: usize = 64 * 1024;
/// Lines of a log that are read for the last that isn't empty.
const LOG_TAIL_LINES: i64 = 5;
const LOG_LIMIT_BYTES: i64 = 16 * 1024;

/// What exists. An object of a child's name that isn't controlled by the deployment is here too: `plan` tells them apart.
#[derive(Clone, Debug, Default)]
pub struct Observed {
    /// The child Deployment.
    pub deployment: Option<Arc<Deployment>>,
    /// The Service.
    pub service: Option<Arc<Service>>,
    /// The PodDisruptionBudget.
    pub budget: Option<Arc<PodDisruptionBudget>>,
    /// The ServiceAccount of the pods.
    pub account: Option<Arc<ServiceAccount>>,
    /// Pods with the deployment's selector, by name.
    pub pods: Vec<Arc<Pod>>,
    /// Warnings about those pods; empty where every one is ready.
    pub warnings: Vec<Event>,
    /// The last lines of containers that ended and left no message.
    pub last_lines: Vec<LastLine>,
    /// One entry for each pod whose server has started and that is not being deleted. A server that hangs is no longer
    /// ready, yet must count as silent rather than as gone.
    pub loads: Vec<ReplicaLoad>,
}

/// Asks replicas for their load.
#[derive(Clone, Debug)]
pub struct LoadReader(HttpClient<HttpConnector, Empty<Bytes>>);

impl Default for LoadReader {
    fn default() -> Self {
        let mut connector = HttpConnector::new();
        connector.set_connect_timeout(Some(LOAD_TIMEOUT));
        Self(
            HttpClient::builder(TokioExecutor::new())
                .pool_idle_timeout(Duration::from_secs(30))
                .build(connector),
        )
    }
}

impl LoadReader {
    /// The load of the replica at `ip`; anything but a report in time is silence.
    async fn read(&self, ip: &str) -> ReplicaLoad {
        match tokio::time::timeout(LOAD_TIMEOUT, self.get(ip)).await {
            Ok(Some(report)) => ReplicaLoad::Reported(report),
            Ok(None) | Err(_) => ReplicaLoad::Silent,
        }
    }

    async fn get(&self, ip: &str) -> Option<LoadReport> {
        let host = if ip.contains(':') {
            format!("[{ip}]")
        } else {
            ip.to_owned()
        };
        let response = self
            .0
            .get(format!("http://{host}:{PORT}/load").parse().ok()?)
            .await
            .ok()?;
        if !response.status().is_success() {
            return None;
        }
        let body = Limited::new(response.into_body(), LOAD_LIMIT_BYTES)
            .collect()
            .await
            .ok()?
            .to_bytes();
        serde_json::from_slice(&body).ok()
    }
}

/// Where everything is read from.
pub struct Sources {
    /// The API server.
    pub client: Client,
    /// What the watches have brought.
    pub cache: Cache,
    /// The replicas.
    pub loads: LoadReader,
}

/// Reads everything that `plan` needs for the deployment of this metadata.
///
/// # Errors
/// What the API server says. A replica that doesn't answer is no error.
pub async fn observe(sources: &Sources, metadata: &ObjectMeta) -> kube::Result<Observed> {
    let Sources {
        client,
        cache,
        loads: reader,
    } = sources;
    let [name, namespace] =
        [&metadata.name, &metadata.namespace].map(|part| part.clone().unwrap_or_default());
    let key = (namespace.clone(), name);
    cache.ready().await;
    let (deployment, service, budget, account) = tokio::try_join!(
        child(client, &key, cache.deployment(&key)),
        child(client, &key, cache.service(&key)),
        child(client, &key, cache.budget(&key)),
        child(client, &key, cache.account(&key)),
    )?;
    let pods = cache.pods(&key);

    let failing: Vec<&Pod> = living(&pods).filter(|pod| !is_ready(pod)).collect();
    let (warnings, last_lines) = if failing.is_empty() {
        (Vec::new(), Vec::new())
    } else {
        let warnings = warnings(client, &namespace, &failing).await?;
        (warnings, last_lines(client, &namespace, &failing).await)
    };
    let serving = living(&pods).filter(|pod| has_started(pod));
    let addresses = serving.filter_map(|pod| pod.status.as_ref()?.pod_ip.as_deref());
    let loads = join_all(addresses.map(|ip| reader.read(ip))).await;
    Ok(Observed {
        deployment,
        service,
        budget,
        account,
        pods,
        warnings,
        last_lines,
        loads,
    })
}

/// A child from the cache. What the cache lacks may exist all the same, without our label or not brought yet: an apply
/// would then take over what isn't ours, so the API server is asked.
async fn child<K: Child>(
    client: &Client,
    (namespace, name): &Key,
    cached: Option<Arc<K>>,
) -> kube::Result<Option<Arc<K>>> {
    if cached.is_some() {
        return Ok(cached);
    }
    let api: Api<K> = Api::namespaced(client.clone(), namespace);
    Ok(api.get_opt(name).await?.map(Arc::new))
}

/// Warnings about these pods.
async fn warnings(client: &Client, namespace: &str, pods: &[&Pod]) -> kube::Result<Vec<Event>> {
    let events: Api<Event> = Api::namespaced(client.clone(), namespace);
    let of_pods = ListParams::default().fields("type=Warning,involvedObject.kind=Pod");
    let names: Vec<_> = pods.iter().map(|pod| pod.metadata.name.as_ref()).collect();
    let mut found = events.list(&of_pods).await?.items;
    found.retain(|event| names.contains(&event.involved_object.name.as_ref()));
    Ok(found)
}

/// What the containers said last that ended without a message: the kubelet copies the log's end into one only where the
/// container asks for it and fails. A log that can't be read, of a node that is gone, leaves the rest to be told.
async fn last_lines(client: &Client, namespace: &str, pods: &[&Pod]) -> Vec<LastLine> {
    let api: Api<Pod> = Api::namespaced(client.clone(), namespace);
    let silent = pods.iter().take(MAX_NOT_READY).flat_map(|pod| {
        let status = pod.status.as_ref();
        let servers = status.and_then(|s| s.container_statuses.as_deref());
        let init = status.and_then(|s| s.init_container_statuses.as_deref());
        let all = [servers, init].into_iter().flatten().flatten();
        let silent = all.filter(|c| {
            let ended = ended(c).filter(|_| !c.ready);
            ended.is_some_and(|end| end.message.as_deref().and_then(last_line).is_none())
        });
        silent.map(move |container| (pod.name_any(), container))
    });
    let reads = silent.map(|(pod, container)| {
        let params = LogParams {
            container: Some(container.name.clone()),
            // Where it was started again, the run that ended is the one before.
            previous: container
                .state
                .as_ref()
                .is_none_or(|s| s.terminated.is_none()),
            tail_lines: Some(LOG_TAIL_LINES),
            limit_bytes: Some(LOG_LIMIT_BYTES),
            ..LogParams::default()
        };
        let (api, container) = (&api, container.name.clone());
        async move {
            match api.logs(&pod, &params).await {
                Ok(log) => last_line(&log).map(|line| LastLine {
                    line: line.chars().take(LINE_LIMIT_CHARS).collect(),
                    pod,
                    container,
                }),
                Err(error) => {
                    tracing::debug!(pod, container, %error, "log not read");
                    None
                }
            }
        }
    });
    join_all(reads).await.into_iter().flatten().collect()
}
