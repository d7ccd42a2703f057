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
use k8s_openapi::api::core::v1::{ContainerStatus, Event, Pod};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::{ListParams, LogParams};
use kube::{Api, Client, ResourceExt};
use kvasir_crds::LoadReport;

use crate::cache::{Cache, Key};
use crate::error::Error;
use crate::observed::{Child, LastLine, Observed, ObservedChildren, ReplicaLoad};
use crate::plan::status::MAX_NOT_READY;
use crate::pod::{
    LINE_LIMIT_CHARS, has_started, is_ready, last_line, last_termination, load_port,
    not_terminating,
};

/// How long a replica may take to answer `/load`; a later answer is silence.
const LOAD_TIMEOUT: Duration = Duration::from_secs(1);
/// A load report is a few hundred bytes.
const LOAD_LIMIT_BYTES: usize = 64 * 1024;
/// Lines of a log that are read for the last that isn't empty.
const LOG_TAIL_LINES: i64 = 5;
const LOG_LIMIT_BYTES: i64 = 16 * 1024;

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
    /// The load that the replica at this address reports; anything but a report in time is silence.
    async fn read(&self, ip: &str, port: u16) -> ReplicaLoad {
        match tokio::time::timeout(LOAD_TIMEOUT, self.get(ip, port)).await {
            Ok(Some(report)) => ReplicaLoad::Reported(report),
            Ok(None) | Err(_) => ReplicaLoad::Silent,
        }
    }

    async fn get(&self, ip: &str, port: u16) -> Option<LoadReport> {
        let host = if ip.contains(':') {
            format!("[{ip}]")
        } else {
            ip.to_owned()
        };
        let response = self
            .0
            .get(format!("http://{host}:{port}/load").parse().ok()?)
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
pub async fn observe(sources: &Sources, metadata: &ObjectMeta) -> Result<Observed, Error> {
    let Sources {
        client,
        cache,
        loads: reader,
    } = sources;
    let [name, namespace] =
        [&metadata.name, &metadata.namespace].map(|part| part.clone().unwrap_or_default());
    let key = (namespace.clone(), name);
    cache.ready().await;
    let children = children(client, cache, &key).await?;
    let pods = cache.pods(&key);

    let failing: Vec<&Pod> = not_terminating(&pods)
        .filter(|pod| !is_ready(pod))
        .collect();
    let (warnings, last_lines) = if failing.is_empty() {
        (Vec::new(), Vec::new())
    } else {
        let warnings = warnings(client, &namespace, &failing).await;
        let warnings = warnings.map_err(Error::ListWarnings)?;
        (warnings, last_lines(client, &namespace, &failing).await)
    };
    let started = not_terminating(&pods).filter(|pod| has_started(pod));
    let addresses = started.filter_map(|pod| {
        let ip = pod.status.as_ref()?.pod_ip.as_deref()?;
        Some((ip, load_port(pod)))
    });
    let loads = join_all(addresses.map(|(ip, port)| reader.read(ip, port))).await;
    Ok(Observed {
        children,
        pods,
        warnings,
        last_lines,
        loads,
    })
}

async fn children(client: &Client, cache: &Cache, key: &Key) -> Result<ObservedChildren, Error> {
    let (deployment, service, budget, account) = tokio::try_join!(
        child(client, key, cache.deployment(key)),
        child(client, key, cache.service(key)),
        child(client, key, cache.budget(key)),
        child(client, key, cache.account(key)),
    )?;
    Ok(ObservedChildren {
        deployment,
        service,
        budget,
        account,
    })
}

/// A child from the cache. What the cache lacks may exist all the same, without our label or not brought yet: an apply
/// would then take over what isn't ours, so the API server is asked.
async fn child<K: Child>(
    client: &Client,
    (namespace, name): &Key,
    cached: Option<Arc<K>>,
) -> Result<Option<Arc<K>>, Error> {
    if cached.is_some() {
        return Ok(cached);
    }
    let api: Api<K> = Api::namespaced(client.clone(), namespace);
    let found = api.get_opt(name).await.map_err(|source| Error::ReadChild {
        kind: K::kind(&()),
        source,
    })?;
    Ok(found.map(Arc::new))
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
        let containers = ended_without_a_message(pod);
        containers.map(move |container| (pod.name_any(), container))
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

fn ended_without_a_message(pod: &Pod) -> impl Iterator<Item = &ContainerStatus> {
    let status = pod.status.as_ref();
    let servers = status.and_then(|s| s.container_statuses.as_deref());
    let init = status.and_then(|s| s.init_container_statuses.as_deref());
    let all = [servers, init].into_iter().flatten().flatten();
    all.filter(|c| {
        let end = last_termination(c).filter(|_| !c.ready);
        end.is_some_and(|end| end.message.as_deref().and_then(last_line).is_none())
    })
}
