//! What the operator reports of an `LLMDeployment`. It owns the condition types and the closed set of reasons;
//! which of them holds is the operator's to decide.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::KubeSchema;
use serde::{Deserialize, Serialize};

/// What the operator reports.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct LLMDeploymentStatus {
    /// metadata.generation that this status describes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// Accepted, Available, Progressing, Ready and ScalingActive always; CapacityUnavailable, ScalingLimited, Stalled and
    /// Reconciling while they hold.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["type".into()]))]
    pub conditions: Vec<Condition>,
    /// Pods that exist and have not ended.
    #[serde(default)]
    pub replicas: i32,
    /// Pods that serve.
    #[serde(default)]
    pub ready_replicas: i32,
    /// Pods of the current revision.
    #[serde(default)]
    pub updated_replicas: i32,
    /// The label selector of the pods, in its string form.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub selector: Option<String>,
    /// The base URL of the OpenAI-compatible API inside the cluster.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub endpoint: Option<String>,
    /// KV blocks held by sequences, in percent of the block pools that report.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub utilization_percent: Option<i32>,
    /// Requests that wait, over the replicas that report.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub queue_depth: Option<i32>,
    /// The last change of the number of replicas by the operator.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_scaling: Option<LastScaling>,
    /// What the autoscaler sees and decides; absent where spec.autoscaling is. Written at most every 15 seconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub autoscaling: Option<AutoscalingStatus>,
    /// Replicas that don't serve, and why; the first ten, the most telling first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[x_kube(merge_strategy = ListMerge::Atomic)]
    pub not_ready: Vec<NotReadyReplica>,
    /// Why pods ended that are still listed (evicted, refused by a node, shut down with it): each reason once, the first
    /// five. Such a pod is no replica any more, and another stands in for it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[x_kube(merge_strategy = ListMerge::Atomic)]
    pub ended_pods: Vec<EndedPods>,
    /// The revision (the pods' label `kvasir.dev/revision`) that was rolled out whole last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub current_revision: Option<String>,
    /// The revision of the spec.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub update_revision: Option<String>,
    /// The model as the replicas serve it, once one of them does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<ModelStatus>,
    /// How long the replicas that serve took to start.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub start: Option<StartTimes>,
}

/// A model on its device, in numbers; of one replica, where they differ.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ModelStatus {
    /// The commit of its repository, where it came from one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revision: Option<String>,
    /// Numbers that the model learned.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parameters: Option<i64>,
    /// Bytes of its weights on the device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weights_bytes: Option<i64>,
    /// Bytes of the KV cache.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kv_cache_bytes: Option<i64>,
    /// Bytes of the KV cache that a token takes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kv_bytes_per_token: Option<i64>,
    /// KV blocks of a replica.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub blocks: Option<i64>,
    /// The longest context in tokens, prompt and answer together.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_model_len: Option<i64>,
    /// Requests of that length that a replica holds at once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub requests_at_context: Option<i64>,
    /// Who fetches the model, where it is fetched.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub download: Option<ModelDownload>,
}

/// Who fetches a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub enum ModelDownload {
    /// Each replica, for itself: spec.model.cache is not set.
    EachReplica,
    /// One replica, into the cache of all.
    SharedCache,
}

/// How long starts took.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct StartTimes {
    /// Replicas that this was measured of.
    pub samples: i32,
    /// Schedule (until there was a node), Pull (until the container ran), Fetch, Load, WarmUp, and Total.
    #[x_kube(merge_strategy = ListMerge::Map(vec!["phase".into()]))]
    pub phases: Vec<PhaseTimes>,
}

impl StartTimes {
    /// The phases in their order, and the sum of them.
    pub const PHASES: [&str; 6] = ["Schedule", "Pull", "Fetch", "Load", "WarmUp", "Total"];
}

/// How long one phase of a start took.
#[derive(KubeSchema, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PhaseTimes {
    /// The phase.
    pub phase: String,
    /// Half of the replicas took no longer.
    pub p50_milliseconds: i64,
    /// Nine in ten took no longer.
    pub p90_milliseconds: i64,
}

/// What the autoscaler sees and decides.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct AutoscalingStatus {
    /// Replicas that it sets, or in mode Observe would set.
    #[serde(default)]
    pub desired_replicas: i32,
    /// Replicas that the load is work for, whatever minReplicas and maxReplicas allow; absent where no replica reports.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub demand_replicas: Option<i32>,
    /// What asks for the most replicas: Blocks, Slots, PrefillRate, QueueDepth or QueueAge; absent without load.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub binding_constraint: Option<String>,
    /// Replicas that the load needs and that neither serve nor start in time.
    #[serde(default)]
    pub unmet_replicas: i32,
    /// Replicas that have started and don't report their load.
    #[serde(default)]
    pub silent_replicas: i32,
    /// The next change that the load allows, if it stays as it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next_scaling: Option<NextScaling>,
    /// What was measured of the replicas, read back after a restart of the operator.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub learned: Option<LearnedCapacity>,
}

/// A change of the number of replicas that waits.
#[derive(KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct NextScaling {
    /// Replicas after it.
    pub replicas: i32,
    /// The earliest time.
    pub not_before: Time,
}

/// What replicas were measured to carry.
#[derive(KubeSchema, Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct LearnedCapacity {
    /// Prompt tokens a second that a replica computes while more wait.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prefill_tokens_per_second: Option<i64>,
    /// The part of its blocks that a replica can fill before sequences are preempted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub block_percent: Option<i32>,
    /// Seconds from a pod's creation until it is ready: the ninth of ten.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub start_seconds: Option<i32>,
    /// How much the load grows while a replica starts, in percent, four times of five.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub growth_percent: Option<i32>,
}

/// One change of the number of replicas.
#[derive(KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct LastScaling {
    /// When it was decided.
    pub time: Time,
    /// Replicas before.
    pub from: i32,
    /// Replicas after.
    pub to: i32,
    /// Why, in words and numbers.
    pub reason: String,
}

/// A replica that doesn't serve.
#[derive(KubeSchema, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct NotReadyReplica {
    /// The pod's name; absent where no pod could be made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod: Option<String>,
    /// One of the reasons of the conditions.
    pub reason: String,
    /// Why, in the words of whoever refused: scheduler, kubelet, or the server itself.
    pub message: String,
}

/// Pods that ended for one reason.
#[derive(KubeSchema, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct EndedPods {
    /// The reason of the pods' status: Evicted, UnexpectedAdmissionError, Terminated, or else their phase.
    pub reason: String,
    /// The first of them that was seen, and what its status says.
    pub message: String,
}

/// The types of the conditions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ConditionType {
    /// The spec is understood and its children may be made.
    Accepted,
    /// At least one replica serves.
    Available,
    /// A rollout or a scaling is under way.
    Progressing,
    /// Available, and the current generation is rolled out. Fewer replicas than are asked for are no reason against it.
    Ready,
    /// The operator owns the number of replicas and can decide it.
    ScalingActive,
    /// A replica has no place: the scheduler finds no node, or a quota is used up. Absent otherwise.
    CapacityUnavailable,
    /// The load is work for more replicas than `maxReplicas`. Absent otherwise.
    ScalingLimited,
    /// Nothing goes on without the user: a refusal, or a rollout past its deadline (kstatus). Absent otherwise.
    Stalled,
    /// Not Ready yet, and being worked on (kstatus). Never beside Stalled; absent otherwise.
    Reconciling,
}

impl ConditionType {
    /// The condition's `type`.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            ConditionType::Accepted => "Accepted",
            ConditionType::Available => "Available",
            ConditionType::Progressing => "Progressing",
            ConditionType::Ready => "Ready",
            ConditionType::ScalingActive => "ScalingActive",
            ConditionType::CapacityUnavailable => "CapacityUnavailable",
            ConditionType::ScalingLimited => "ScalingLimited",
            ConditionType::Stalled => "Stalled",
            ConditionType::Reconciling => "Reconciling",
        }
    }
}

macro_rules! reasons {
    ($($(#[$doc:meta])* $name:ident),* $(,)?) => {
        /// The reasons that conditions and [`NotReadyReplica`]s give: a closed set.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum Reason { $($(#[$doc])* $name),* }

        impl Reason {
            /// All of them.
            pub const ALL: &[Reason] = &[$(Reason::$name),*];

            /// The reason as conditions give it.
            #[must_use]
            pub fn as_str(self) -> &'static str {
                match self { $(Reason::$name => stringify!($name)),* }
            }
        }
    };
}

reasons! {
    /// The spec is understood.
    SpecAccepted,
    /// The spec can't be read by this operator.
    InvalidSpec,
    /// `spec.podTemplate` can't be merged into the pods' template.
    InvalidPodTemplate,
    /// An object of a child's name exists that isn't ours.
    NameConflict,
    /// The API server refuses a child.
    ChildRefused,
    /// The API server fails to write a child, for a minute by now, and is asked again.
    ApplyRetried,
    /// The rollout made no progress in the time that it has.
    ProgressDeadlineExceeded,
    /// At least one replica serves.
    ReplicaServing,
    /// All replicas of the current generation serve.
    AllReplicasServing,
    /// `spec.replicas` is 0.
    ScaledToZero,
    /// No pod exists yet.
    Creating,
    /// The replicas of the current generation are being rolled out or scaled.
    RollingOut,
    /// Nothing is left to roll out.
    RolledOut,
    /// `spec.rollout.paused` holds the spec's revision back.
    RolloutPaused,
    /// The spec's revision can't become ready, and the one before it runs on.
    RolledBack,
    /// Pods can't be created: quota, admission.
    PodRefused,
    /// The scheduler finds no node.
    Unschedulable,
    /// The image can't be pulled.
    ImagePullFailed,
    /// The container can't be created: a missing Secret, ConfigMap or volume.
    ContainerRefused,
    /// The server ended, and is started again.
    Crashed,
    /// The pod was evicted or its node is lost.
    PodLost,
    /// A probe fails of a server that once served.
    ProbeFailing,
    /// The server loads its model.
    Starting,
    /// The operator decides the number of replicas.
    Autoscaled,
    /// The operator reports what it would decide.
    Observing,
    /// A replica takes longer to start than its like were measured to need.
    StartOverdue,
    /// `spec.replicas` decides it.
    FixedReplicas,
    /// No replica reports its load: the number is held.
    LoadUnknown,
    /// The load is work for more replicas than `maxReplicas`.
    AtMaxReplicas,
}

impl Reason {
    /// Those of the condition Accepted where it is False.
    pub const REFUSALS: [Reason; 4] = [
        Reason::InvalidSpec,
        Reason::InvalidPodTemplate,
        Reason::NameConflict,
        Reason::ChildRefused,
    ];
}

impl std::fmt::Display for Reason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}
