//! What exists for one `LLMDeployment`, as `observe` has read it and `plan` judges it. Types only, and a leaf: it knows
//! neither of the two.

use std::fmt::Debug;
use std::sync::Arc;

use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{Event, Pod, Service, ServiceAccount};
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use kube::Resource;
use kvasir_crds::LoadReport;
use kvasir_crds::load_report::StartReport;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::pod::asked_for_load;

/// A kind of object that belongs to an `LLMDeployment`.
pub trait Child:
    Resource<DynamicType = (), Scope = NamespaceResourceScope>
    + Clone
    + Debug
    + Serialize
    + DeserializeOwned
    + Send
    + Sync
    + 'static
{
}

impl Child for Deployment {}
impl Child for Service {}
impl Child for PodDisruptionBudget {}
impl Child for ServiceAccount {}
impl Child for Pod {}

/// What exists.
#[derive(Clone, Debug, Default)]
pub struct Observed {
    /// Objects of the children's names.
    pub children: ObservedChildren,
    /// Pods with the deployment's selector, by name.
    pub pods: Vec<Arc<Pod>>,
    /// Warnings about those pods; empty where every one is ready.
    pub warnings: Vec<Arc<Event>>,
    /// The last lines of containers that ended and left no message.
    pub last_lines: Vec<LastLine>,
    /// One entry for each pod whose server has started and that is not being deleted. A server that hangs is no longer
    /// ready, yet must count as silent rather than as gone.
    pub loads: Vec<ReplicaLoad>,
    /// How the start goes of replicas that have not served yet and say so.
    pub starting: Vec<StartingReplica>,
}

impl Observed {
    /// The pods that were asked for their load, each with its answer.
    pub fn loads_by_pod(&self) -> impl Iterator<Item = (&Pod, &ReplicaLoad)> {
        asked_for_load(&self.pods).zip(&self.loads)
    }
}

/// How the start of one replica goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StartingReplica {
    /// The pod's name.
    pub pod: String,
    /// What it says.
    pub report: StartReport,
}

/// Objects of the children's names. One that isn't controlled by the deployment is here too: `plan` tells them apart.
///
/// Whoever goes through all children takes this and `plan`'s `Children` apart without `..`, so that a new kind of child
/// is a compile error wherever it has to be handled.
#[derive(Clone, Debug, Default)]
pub struct ObservedChildren {
    /// The child Deployment.
    pub deployment: Option<Arc<Deployment>>,
    /// The Service.
    pub service: Option<Arc<Service>>,
    /// The PodDisruptionBudget.
    pub budget: Option<Arc<PodDisruptionBudget>>,
    /// The ServiceAccount of the pods.
    pub account: Option<Arc<ServiceAccount>>,
}

/// What one replica says of its load.
#[derive(Clone, Debug, PartialEq)]
#[expect(
    clippy::large_enum_variant,
    reason = "nearly all are reports, and a few live for one reconcile"
)]
pub enum ReplicaLoad {
    /// It answered.
    Reported(LoadReport),
    /// It did not answer in time.
    Silent,
}

/// What a container said last in its log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LastLine {
    /// The pod's name.
    pub pod: String,
    /// The container's.
    pub container: String,
    /// The line, of at most [`crate::pod::LINE_LIMIT_CHARS`].
    pub line: String,
}
