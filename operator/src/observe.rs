//! Reads what exists for one `LLMDeployment`: its children, its pods, their warnings, and what its replicas report.
//!
//! Reads only; what any of it means is `plan`'s to decide.

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
use kube::api::ListParams;
use kube::{Api, Client, ResourceExt};
use kvasir_crds::llmdeployment::{LLMDeployment, SELECTOR_LABEL};
use kvasir_crds::{LoadReport, llmdeployment};

use crate::plan::autoscale::ReplicaLoad;
use crate::plan::children::PORT;
use crate::plan::pod_template::SERVER;

/// How long a replica may take to answer `/load`; a later answer is silence.
const LOAD_TIMEOUT: Duration = Duration::from_secs(1);
/// A load report is a few hundred bytes.
const LOAD_LIMIT_BYTES: usize = 64 * 1024;

/// What exists. An object of a child's name that isn't controlled by the deployment is here too: `plan` tells them apart.
#[derive(Clone, Debug, Default)]
pub struct Observed {
    /// The child Deployment.
    pub deployment: Option<Deployment>,
    /// The Service.
    pub service: Option<Service>,
    /// The PodDisruptionBudget.
    pub budget: Option<PodDisruptionBudget>,
    /// The ServiceAccount of the pods.
    pub account: Option<ServiceAccount>,
    /// Pods with the deployment's selector, by name.
    pub pods: Vec<Pod>,
    /// Warnings about those pods and about the ReplicaSets that make them; empty where every pod is ready.
    pub warnings: Vec<Event>,
    /// One entry for each pod whose server has started and that is not being deleted; empty where the spec has no
    /// autoscaling. A server that hangs is no longer ready, yet must count as silent rather than as gone.
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

/// Reads everything that `plan` needs for `deployment`.
///
/// # Errors
/// What the API server says. A replica that doesn't answer is no error.
pub async fn observe(
    client: &Client,
    reader: &LoadReader,
    deployment: &LLMDeployment,
) -> kube::Result<Observed> {
    let (name, namespace) = (
        deployment.name_any(),
        deployment.namespace().unwrap_or_default(),
    );
    let (deployments, services) = (
        Api::namespaced(client.clone(), &namespace),
        Api::namespaced(client.clone(), &namespace),
    );
    let (budgets, accounts) = (
        Api::namespaced(client.clone(), &namespace),
        Api::namespaced(client.clone(), &namespace),
    );
    let pods: Api<Pod> = Api::namespaced(client.clone(), &namespace);
    let selector =
        ListParams::default().labels(&format!("{}={name}", llmdeployment::SELECTOR_LABEL));
    let (child, service, budget, account, pods) = tokio::try_join!(
        deployments.get_opt(&name),
        services.get_opt(&name),
        budgets.get_opt(&name),
        accounts.get_opt(&name),
        pods.list(&selector),
    )?;
    let mut pods = pods.items;
    pods.sort_by_key(ResourceExt::name_any);

    let all_ready = child.as_ref().is_some_and(|child: &Deployment| {
        let wanted = child.spec.as_ref().and_then(|s| s.replicas).unwrap_or(1);
        usize::try_from(wanted) == Ok(pods.len()) && pods.iter().all(is_ready)
    });
    let warnings = if all_ready {
        Vec::new()
    } else {
        warnings(client, &namespace, &name, &pods).await?
    };
    let loads = if deployment.spec.autoscaling.is_some() {
        let serving = pods
            .iter()
            .filter(|pod| has_started(pod) && pod.metadata.deletion_timestamp.is_none());
        let addresses = serving.filter_map(|pod| pod.status.as_ref()?.pod_ip.as_deref());
        join_all(addresses.map(|ip| reader.read(ip))).await
    } else {
        Vec::new()
    };
    Ok(Observed {
        deployment: child,
        service,
        budget,
        account,
        pods,
        warnings,
        loads,
    })
}

/// Warnings about the pods, and about the ReplicaSets that could not make them.
async fn warnings(
    client: &Client,
    namespace: &str,
    name: &str,
    pods: &[Pod],
) -> kube::Result<Vec<Event>> {
    let events: Api<Event> = Api::namespaced(client.clone(), namespace);
    let of_kind = |kind: &str| {
        ListParams::default().fields(&format!("type=Warning,involvedObject.kind={kind}"))
    };
    let (of_pods, of_sets) = (of_kind("Pod"), of_kind("ReplicaSet"));
    let (of_pods, of_sets) = tokio::try_join!(events.list(&of_pods), events.list(&of_sets))?;
    let about = |event: &Event| event.involved_object.name.clone().unwrap_or_default();
    let prefix = format!("{name}-");
    let mut found: Vec<Event> = of_pods
        .items
        .into_iter()
        .filter(|e| pods.iter().any(|p| p.name_any() == about(e)))
        .collect();
    found.extend(of_sets.items.into_iter().filter(|e| {
        // A ReplicaSet's name is its Deployment's and one hash.
        about(e)
            .strip_prefix(&prefix)
            .is_some_and(|hash| !hash.contains('-'))
    }));
    Ok(found)
}

/// The pod's condition Ready.
#[must_use]
pub fn is_ready(pod: &Pod) -> bool {
    let conditions = pod
        .status
        .as_ref()
        .and_then(|s| s.conditions.as_deref())
        .unwrap_or_default();
    conditions
        .iter()
        .any(|c| c.type_ == "Ready" && c.status == "True")
}

/// The server's startup probe has passed: it has served since its container started.
fn has_started(pod: &Pod) -> bool {
    let containers = pod
        .status
        .as_ref()
        .and_then(|s| s.container_statuses.as_deref())
        .unwrap_or_default();
    containers
        .iter()
        .any(|c| c.name == SERVER && c.started == Some(true))
}

/// The name of the `LLMDeployment` that a pod serves.
#[must_use]
pub fn serves(pod: &Pod) -> Option<&str> {
    pod.metadata
        .labels
        .as_ref()?
        .get(SELECTOR_LABEL)
        .map(String::as_str)
}
