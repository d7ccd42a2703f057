//! Reads what exists for one `LLMDeployment`: its children, its pods, their warnings, and what its replicas report.
//! Children, pods and warnings come from the cache, and children from the API server where the cache lacks them; loads
//! and logs are asked for in the background, each with its own deadline ([`Asked`]).
//!
//! Reads only; what any of it means is `plan`'s to decide. Only a child that can't be read is an error: reasons and loads
//! are told as far as they are known.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Empty, Limited};
use hyper_util::client::legacy::Client as HttpClient;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use k8s_openapi::api::core::v1::{ContainerStatus, Pod};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::LogParams;
use kube::{Api, Client, ResourceExt};
use kvasir_crds::LoadReport;

use crate::asked::{Asked, Worth};
use crate::cache::Cache;
use crate::error::{Error, in_time};
use crate::key::Key;
use crate::observed::{Child, LastLine, Observed, ObservedChildren, ReplicaLoad, StartingReplica};
use crate::plan::status::MAX_NOT_READY;
use crate::pod::{
    LINE_LIMIT_CHARS, address, asked_for_load, asked_for_start, is_ready, last_termination,
    last_words, load_port, replicas,
};

/// How long a replica may take to answer `/load`; a later answer is silence.
const LOAD_TIMEOUT: Duration = Duration::from_secs(1);
/// A load report is a few hundred bytes.
const LOAD_LIMIT_BYTES: usize = 64 * 1024;
/// Lines of a log that are read for its last words: a usage message of clap has about ten.
const LOG_TAIL_LINES: i64 = 30;
const LOG_LIMIT_BYTES: i64 = 16 * 1024;

/// Asks replicas for their load.
#[derive(Clone, Debug)]
pub struct LoadReader {
    client: HttpClient<HttpConnector, Empty<Bytes>>,
    asked: Asked<Replica, ReplicaLoad>,
}

/// Where a replica answers `/load`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Replica {
    /// The pod's: addresses are used again.
    pub uid: String,
    /// Its address.
    pub ip: String,
    /// Its port.
    pub port: u16,
}

impl Default for LoadReader {
    fn default() -> Self {
        let mut connector = HttpConnector::new();
        connector.set_connect_timeout(Some(LOAD_TIMEOUT));
        let client = HttpClient::builder(TokioExecutor::new())
            .pool_idle_timeout(Duration::from_secs(30))
            .build(connector);
        Self {
            client,
            asked: Asked::default(),
        }
    }
}

impl LoadReader {
    /// What each of a deployment's replicas reported last, in their order. Each is asked anew, and waited for a moment
    /// unless it was silent; one that never answered is silent.
    pub async fn read(&self, deployment: &Key, replicas: &[Replica]) -> Vec<ReplicaLoad> {
        let worth = |load: &ReplicaLoad| match load {
            ReplicaLoad::Reported(_) => Worth::Renewed,
            ReplicaLoad::Silent => Worth::Hopeless,
        };
        let ask = |replica| load(self.client.clone(), replica);
        let loads = self.asked.answers(deployment, replicas, worth, ask).await;
        let known = |load: Option<_>| load.unwrap_or(ReplicaLoad::Silent);
        loads.into_iter().map(known).collect()
    }
}

/// The load that a replica reports; anything but a report in time is silence.
async fn load(client: HttpClient<HttpConnector, Empty<Bytes>>, replica: Replica) -> ReplicaLoad {
    match tokio::time::timeout(LOAD_TIMEOUT, get(&client, &replica)).await {
        Ok(Some(report)) => ReplicaLoad::Reported(report),
        Ok(None) | Err(_) => ReplicaLoad::Silent,
    }
}

async fn get(
    client: &HttpClient<HttpConnector, Empty<Bytes>>,
    Replica { ip, port, .. }: &Replica,
) -> Option<LoadReport> {
    let host = match ip.contains(':') {
        true => format!("[{ip}]"),
        false => ip.to_owned(),
    };
    let address = format!("http://{host}:{port}/load").parse().ok()?;
    let response = client.get(address).await.ok()?;
    if !response.status().is_success() {
        return None;
    }
    let body = Limited::new(response.into_body(), LOAD_LIMIT_BYTES);
    let body = body.collect().await.ok()?.to_bytes();
    serde_json::from_slice(&body).ok()
}

/// Reads what ended containers said last.
#[derive(Clone, Debug, Default)]
pub struct LogReader(Asked<EndedRun, Option<LogEnd>>);

/// One run of a container that ended.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct EndedRun {
    pod: String,
    uid: String,
    container: String,
    /// The container was started again since: the log of the run before is read.
    previous: bool,
    restart_count: i32,
}

/// The last words of a log; `None` where it has none.
type LogEnd = Option<String>;

/// Where everything is read from.
pub struct Sources {
    /// The API server.
    pub client: Client,
    /// What the watches have brought.
    pub cache: Cache,
    /// The replicas.
    pub loads: LoadReader,
    /// Those that have not served yet.
    pub starts: LoadReader,
    /// The logs of replicas that ended.
    pub logs: LogReader,
}

impl Sources {
    /// Forgets a deployment that is gone.
    pub fn forget(&self, key: &Key) {
        self.cache.forget(key);
        self.loads.asked.forget(key);
        self.starts.asked.forget(key);
        self.logs.0.forget(key);
    }
}

/// Reads everything that `plan` needs for the deployment of this metadata.
///
/// # Errors
/// What the API server says. A replica that doesn't answer is no error.
pub async fn observe(sources: &Sources, metadata: &ObjectMeta) -> Result<Observed, Error> {
    let Sources {
        client,
        cache,
        loads,
        starts,
        logs,
    } = sources;
    let [name, namespace] =
        [&metadata.name, &metadata.namespace].map(|part| part.clone().unwrap_or_default());
    let key = (namespace, name);
    cache.ready().await;
    let pods = cache.pods(&key);
    let failing: Vec<&Pod> = replicas(&pods).filter(|pod| !is_ready(pod)).collect();
    let (children, loads, starting, last_lines) = tokio::join!(
        children(client, cache, &key),
        loads_of(loads, &key, asked_for_load(&pods)),
        starting(starts, &key, &pods),
        last_lines(logs, client, &key, &failing),
    );
    Ok(Observed {
        children: children?,
        warnings: failing.iter().flat_map(|pod| cache.warnings(pod)).collect(),
        last_lines,
        loads,
        starting,
        pods,
    })
}

async fn loads_of(
    reader: &LoadReader,
    key: &Key,
    pods: impl Iterator<Item = &Pod>,
) -> Vec<ReplicaLoad> {
    let addresses = pods.filter_map(|pod| {
        Some(Replica {
            uid: pod.uid().unwrap_or_default(),
            ip: address(pod)?.to_owned(),
            port: load_port(pod),
        })
    });
    let addresses: Vec<Replica> = addresses.collect();
    reader.read(key, &addresses).await
}

async fn starting(reader: &LoadReader, key: &Key, pods: &[Arc<Pod>]) -> Vec<StartingReplica> {
    let reports = loads_of(reader, key, asked_for_start(pods)).await;
    let said = asked_for_start(pods).zip(reports);
    let starting = said.filter_map(|(pod, load)| match load {
        ReplicaLoad::Reported(LoadReport {
            start: Some(report),
            ..
        }) => Some(StartingReplica {
            pod: pod.name_any(),
            report,
        }),
        ReplicaLoad::Reported(_) | ReplicaLoad::Silent => None,
    });
    starting.collect()
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
    let found = in_time(api.get_opt(name))
        .await
        .map_err(|source| Error::ReadChild {
            kind: K::kind(&()),
            source,
        })?;
    Ok(found.map(Arc::new))
}

/// What the containers said last that ended without a message: the kubelet copies the log's end into one only where the
/// container asks for it and fails. A log that can't be read, of a node that is gone, leaves the rest to be told.
async fn last_lines(
    logs: &LogReader,
    client: &Client,
    deployment: &Key,
    pods: &[&Pod],
) -> Vec<LastLine> {
    let silent = pods.iter().take(MAX_NOT_READY).flat_map(|pod| {
        let containers = ended_without_a_message(pod);
        containers.map(move |container| EndedRun {
            pod: pod.name_any(),
            uid: pod.uid().unwrap_or_default(),
            container: container.name.clone(),
            // Where it was started again, the run that ended is the one before.
            previous: container
                .state
                .as_ref()
                .is_none_or(|s| s.terminated.is_none()),
            restart_count: container.restart_count,
        })
    });
    let runs: Vec<EndedRun> = silent.collect();
    let api: Api<Pod> = Api::namespaced(client.clone(), &deployment.0);
    let worth = |end: &Option<LogEnd>| match end {
        Some(_) => Worth::Final,
        // It could not be read: its node may not answer.
        None => Worth::Hopeless,
    };
    let ask = |run: EndedRun| log_end(api.clone(), run);
    let ends = logs.0.answers(deployment, &runs, worth, ask).await;
    let lines = runs.into_iter().zip(ends).filter_map(|(run, end)| {
        Some(LastLine {
            pod: run.pod,
            container: run.container,
            line: end??.as_deref()?.chars().take(LINE_LIMIT_CHARS).collect(),
        })
    });
    lines.collect()
}

async fn log_end(api: Api<Pod>, run: EndedRun) -> Option<LogEnd> {
    let params = LogParams {
        container: Some(run.container.clone()),
        previous: run.previous,
        tail_lines: Some(LOG_TAIL_LINES),
        limit_bytes: Some(LOG_LIMIT_BYTES),
        ..LogParams::default()
    };
    match in_time(api.logs(&run.pod, &params)).await {
        Ok(log) => Some(last_words(&log)),
        Err(error) => {
            tracing::debug!(pod = run.pod, container = run.container, %error, "log not read");
            None
        }
    }
}

/// The containers of a pod that ended, don't serve again, and left no message.
fn ended_without_a_message(pod: &Pod) -> impl Iterator<Item = &ContainerStatus> {
    let status = pod.status.as_ref();
    let servers = status.and_then(|s| s.container_statuses.as_deref());
    let init = status.and_then(|s| s.init_container_statuses.as_deref());
    let all = [servers, init].into_iter().flatten().flatten();
    all.filter(|c| {
        let end = last_termination(c).filter(|_| !c.ready);
        end.is_some_and(|end| end.message.as_deref().and_then(last_words).is_none())
    })
}
