//! `LLMDeployment`, what a user declares: a model and how many replicas serve it. It owns the fields, their
//! defaults and the CEL rules by which the API server refuses contradictions; it knows nothing of pods.
//!
//! The schema is kept small on purpose: an embedded `PodSpec` alone would break client-side apply, whose
//! annotation may hold 262,144 bytes. `podTemplate` is therefore open in the schema, and parsed strictly by
//! the operator. Fields that shape the pods are optional, or have their default since v1alpha1: a default
//! that came later would change the revision of every deployment, and so roll its pods.

#![expect(
    unreachable_pub,
    reason = "the derive KubeSchema repeats each type in a private scope, where `pub` reaches nobody"
)]

mod schema;
mod status;

use std::num::NonZeroU32;

use k8s_openapi::api::core::v1::{EnvVar, ResourceRequirements};
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use status::{
    AutoscalingStatus, ConditionType, EndedPods, LLMDeploymentStatus, LastScaling, LearnedCapacity,
    ModelDownload, ModelStatus, NextScaling, NotReadyReplica, PhaseTimes, Reason, StartTimes,
};

/// The label that selects the pods of one deployment, and the selector of its children: it never changes.
pub const SELECTOR_LABEL: &str = "kvasir.dev/llmdeployment";

/// What a user declares.
#[derive(CustomResource, KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[kube(
    group = "kvasir.dev",
    version = "v1alpha1",
    kind = "LLMDeployment",
    plural = "llmdeployments",
    shortname = "llmd",
    category = "all",
    category = "kvasir",
    namespaced,
    status = "LLMDeploymentStatus",
    derive = "PartialEq",
    doc = "A language model served by replicas behind one OpenAI-compatible endpoint.",
    annotation("helm.sh/resource-policy", "keep"),
    scale(
        spec_replicas_path = ".spec.replicas",
        status_replicas_path = ".status.replicas",
        label_selector_path = ".status.selector"
    ),
    printcolumn(name = "Ready", type_ = "string", json_path = r#".status.conditions[?(@.type=="Ready")].status"#),
    printcolumn(name = "Reason", type_ = "string", json_path = r#".status.conditions[?(@.type=="Ready")].reason"#),
    printcolumn(name = "Replicas", type_ = "integer", json_path = ".status.replicas"),
    printcolumn(name = "Serving", type_ = "integer", json_path = ".status.readyReplicas"),
    printcolumn(name = "KV%", type_ = "integer", json_path = ".status.utilizationPercent"),
    printcolumn(name = "Queue", type_ = "integer", json_path = ".status.queueDepth"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    printcolumn(name = "Endpoint", type_ = "string", json_path = ".status.endpoint", priority = 1),
    printcolumn(
        name = "Message",
        type_ = "string",
        json_path = r#".status.conditions[?(@.type=="Ready")].message"#,
        priority = 1
    ),
    validation = Rule::new("size(self.metadata.name) <= 50 && self.metadata.name.matches('^[a-z]([-a-z0-9]*[a-z0-9])?$')")
        .message("metadata.name must have at most 50 characters: lower-case letters, digits and '-', beginning with a letter and not ending with '-' (its Service takes the same name)")
)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("has(self.replicas) != (has(self.autoscaling) && (!has(self.autoscaling.mode) || self.autoscaling.mode == 'Auto'))")
    .message("spec.replicas must be set exactly where spec.autoscaling is absent or its mode is Observe: in mode Auto the operator owns the number of replicas (set its minReplicas and maxReplicas instead)"))]
pub struct LLMDeploymentSpec {
    /// The model and the name it is served under.
    pub model: Model,
    /// Settings of the engine in each replica. What is absent is the server's default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub engine: Option<Engine>,
    /// The server's image. The operator's default where absent; a new default rolls no pod that runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 1024))]
    pub image: Option<String>,
    /// When the kubelet pulls the image; Kubernetes' default where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image_pull_policy: Option<ImagePullPolicy>,
    /// CPU, memory and the GPU of each replica: one `nvidia.com/gpu`, or a part of one (`nvidia.com/gpu.shared`,
    /// `nvidia.com/mig-...`). With a GPU the server runs on it and never falls back to the CPU; without one it runs
    /// on the CPU.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "schema::resources")]
    pub resources: Option<ResourceRequirements>,
    /// A fixed number of replicas, which `kubectl scale`, an HPA or KEDA may change.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 10_000))]
    pub replicas: Option<i32>,
    /// Lets the operator choose the number of replicas by what they report: KV blocks, sequence slots, prefill, queues. In
    /// mode Observe it only says what it would choose.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub autoscaling: Option<Autoscaling>,
    /// How a change of the pods is rolled out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rollout: Option<RolloutPolicy>,
    /// How long a replica that is told to stop may take to finish its streams.
    #[serde(default = "default_drain_seconds")]
    #[schemars(range(min = 5, max = 86_400))]
    pub drain_seconds: i32,
    /// Merged into the pods' template: metadata.labels, metadata.annotations and spec. Lists are merged by
    /// name, and a null takes a member of a securityContext away; the container `server` is the operator's, of which env, envFrom, volumeMounts, volumeDevices,
    /// securityContext, lifecycle and startupProbe (GET /ready on the port `management`) may be set. Mistakes
    /// show in the condition Accepted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "schema::open_object")]
    pub pod_template: Option<serde_json::Value>,
}

/// The model and its name.
#[derive(KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("!has(self.cache) || has(self.source.huggingFace)")
    .message("model.cache is for models that are fetched: it needs model.source.huggingFace"))]
pub struct Model {
    /// The name that requests give in `model`. Where absent: `kvasir-demo` for the demo model, and otherwise
    /// the name of the LLMDeployment.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub served_name: Option<String>,
    /// Where the model comes from.
    #[schemars(with = "schema::SourceUnion")]
    pub source: ModelSource,
    /// Where the replicas keep what they fetch. Where absent each replica fetches the model for itself, again at each
    /// start of its pod.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cache: Option<ModelCache>,
}

/// A cache that replicas share, in the layout of Hugging Face's own tools: one of them fetches for all.
#[derive(KubeSchema, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ModelCache {
    /// A PersistentVolumeClaim in the LLMDeployment's namespace, which all replicas can write (ReadWriteMany, unless they
    /// run on one node).
    #[schemars(length(min = 1, max = 253))]
    pub claim_name: String,
}

/// Where the model comes from: exactly one source.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum ModelSource {
    /// The small model inside the server's binary, for first impressions and tests.
    Demo(DemoSource),
    /// A Hugging Face model directory on a PersistentVolumeClaim.
    Pvc(PvcSource),
    /// A repository on a Hugging Face hub or a mirror of one.
    HuggingFace(HuggingFaceSource),
}

/// The model inside the server's binary.
#[derive(KubeSchema, Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DemoSource {}

/// A Hugging Face model directory (config.json, *.safetensors, tokenizer.json) on a PersistentVolumeClaim.
#[derive(KubeSchema, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PvcSource {
    /// The claim's name, in the LLMDeployment's namespace. It is mounted read-only at /models.
    #[schemars(length(min = 1, max = 253))]
    pub claim_name: String,
    /// The model's directory inside the volume; the volume's root where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 1024))]
    #[x_kube(validation = Rule::new("!self.startsWith('/') && !self.split('/').exists(part, part == '..')")
        .message("model.source.pvc.path is relative to the volume's root and must not begin with '/' or hold '..'"))]
    pub path: Option<String>,
}

/// A repository on a Hugging Face hub. The replicas fetch it themselves; the operator reads no Secret.
#[derive(KubeSchema, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct HuggingFaceSource {
    /// OWNER/NAME.
    #[schemars(
        length(max = 200),
        regex(pattern = r"^[A-Za-z0-9_-][A-Za-z0-9._-]*/[A-Za-z0-9_-][A-Za-z0-9._-]*$")
    )]
    pub repository: String,
    /// A branch, a tag or a commit; `main` where absent. A branch may be another commit at the next start of a replica:
    /// status.model.revision tells which one is served.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(
        length(max = 200),
        regex(pattern = r"^[A-Za-z0-9_-][A-Za-z0-9._-]*(/[A-Za-z0-9_-][A-Za-z0-9._-]*)*$")
    )]
    pub revision: Option<String>,
    /// The access token, for a private or gated repository.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token_secret: Option<SecretKey>,
    /// Another hub than https://huggingface.co, such as a mirror.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 500), regex(pattern = r"^https?://[^/\s]+(/[^\s]*)?$"))]
    pub endpoint: Option<String>,
}

/// A value in a Secret of the LLMDeployment's namespace.
#[derive(KubeSchema, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SecretKey {
    /// The Secret's name.
    #[schemars(length(min = 1, max = 253))]
    pub name: String,
    /// The key in it.
    #[schemars(length(min = 1, max = 253))]
    pub key: String,
}

/// Settings of the engine, under vLLM's names where the meaning is the same.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Engine {
    /// The longest sequence, prompt and answer, in tokens.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub max_model_len: Option<i32>,
    /// The most sequences that run at once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub max_num_seqs: Option<i32>,
    /// The most tokens in one step, prompts' chunks and decodes together.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub max_num_batched_tokens: Option<i32>,
    /// Token slots in a KV block.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1024))]
    pub block_size: Option<i32>,
    /// KV blocks of the pool. Where absent the server takes what its memory limit leaves.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub kv_blocks: Option<i32>,
    /// The type that weights and activations are computed in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dtype: Option<Dtype>,
    /// More arguments of the server, after the operator's own.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64), inner(length(max = 4096)))]
    #[x_kube(validation = Rule::new("self.all(arg, !arg.matches('^--(model|download-dir|host|port|management-port|device|served-model-name)(=|$)'))")
        .message("engine.extraArgs must not hold --model, --download-dir, --host, --port, --management-port, --device or --served-model-name: the operator sets them"))]
    pub extra_args: Vec<String>,
    /// Environment variables of the server.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(schema_with = "schema::env")]
    pub env: Vec<EnvVar>,
}

/// The type that weights and activations are computed in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Dtype {
    /// The model's own, as far as the device computes in it.
    Auto,
    /// 8 bits of exponent, 7 of mantissa.
    Bfloat16,
    /// IEEE single precision.
    Float32,
}

impl Dtype {
    /// The flag's value.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Dtype::Auto => "auto",
            Dtype::Bfloat16 => "bfloat16",
            Dtype::Float32 => "float32",
        }
    }
}

/// When the kubelet pulls an image (core/v1 Container.imagePullPolicy).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum ImagePullPolicy {
    /// At each start.
    Always,
    /// Where the node lacks it.
    IfNotPresent,
    /// Never: the node has it.
    Never,
}

impl ImagePullPolicy {
    /// The value in a container.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            ImagePullPolicy::Always => "Always",
            ImagePullPolicy::IfNotPresent => "IfNotPresent",
            ImagePullPolicy::Never => "Never",
        }
    }
}

/// How a change of the pods is rolled out. A revision that can't become ready is taken back in any case: the one before it
/// runs on until the spec changes again.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RolloutPolicy {
    /// How replicas are replaced; Auto where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub strategy: Option<RolloutStrategy>,
    /// While true a change of the spec replaces no replica; the number of replicas still follows.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub paused: bool,
}

/// How replicas are replaced.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum RolloutStrategy {
    /// As Surge, and as Replace once the scheduler finds no place for a replica more.
    Auto,
    /// A new replica serves before an old one goes: it takes the room of one replica more.
    Surge,
    /// An old replica is drained, and a new one takes its place: one replica fewer serves meanwhile.
    Replace,
}

/// When and how far the operator scales.
#[derive(KubeSchema, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("self.minReplicas <= self.maxReplicas")
    .message("autoscaling.minReplicas must not exceed autoscaling.maxReplicas"))]
pub struct Autoscaling {
    /// Auto: the operator sets the number of replicas. Observe: it reports what it would set, and spec.replicas, an HPA or
    /// KEDA decides.
    #[serde(default)]
    pub mode: AutoscalingMode,
    /// The fewest replicas.
    #[serde(default = "default_min_replicas")]
    #[schemars(with = "i32", range(min = 1, max = 10_000))]
    pub min_replicas: NonZeroU32,
    /// The most replicas.
    #[schemars(with = "i32", range(min = 1, max = 10_000))]
    pub max_replicas: NonZeroU32,
    /// Replicas are added when the KV blocks held by running and needed by waiting requests exceed this part
    /// of the block pools, or the sequences that run and wait this part of the sequence slots. Blocks that only cache count
    /// as free.
    #[serde(default = "default_target_block_utilization_percent")]
    #[schemars(with = "i32", range(min = 1, max = 100))]
    pub target_block_utilization_percent: NonZeroU32,
    /// Replicas are added when more requests than this wait, per replica.
    #[serde(default = "default_target_queue_depth")]
    #[schemars(with = "i32", range(min = 1, max = 100_000))]
    pub target_queue_depth: NonZeroU32,
    /// How long the demand must have stayed low before replicas are taken away; at least twice the time that a replica
    /// was measured to need until it serves.
    #[serde(default = "default_scale_down_stabilization_seconds")]
    #[schemars(with = "i32", range(min = 0, max = 86_400))]
    pub scale_down_stabilization_seconds: u32,
}

/// Who carries the autoscaler's decisions out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum AutoscalingMode {
    /// The operator.
    #[default]
    Auto,
    /// Nobody: they are reported.
    Observe,
}

/// The CustomResourceDefinition as the committed file holds it.
///
/// # Errors
/// What the YAML writer says; the definition itself is fixed.
#[cfg(feature = "crdgen")]
pub fn yaml() -> Result<String, serde_norway::Error> {
    use kube::CustomResourceExt;
    let head = "# Generated from crds/src/llmdeployment.rs by crdgen. Do not edit; a test fails when it is stale.\n";
    Ok(format!(
        "{head}{}",
        serde_norway::to_string(&LLMDeployment::crd())?
    ))
}

fn default_drain_seconds() -> i32 {
    300
}

impl LLMDeploymentSpec {
    /// The policy by which the operator sets the number of replicas; `None` where it doesn't.
    #[must_use]
    pub fn autoscaled(&self) -> Option<&Autoscaling> {
        let policy = self.autoscaling.as_ref();
        policy.filter(|policy| policy.mode == AutoscalingMode::Auto)
    }
}

fn default_min_replicas() -> NonZeroU32 {
    NonZeroU32::MIN
}

fn default_target_block_utilization_percent() -> NonZeroU32 {
    const { NonZeroU32::new(80).expect("80 is not 0") }
}

fn default_target_queue_depth() -> NonZeroU32 {
    const { NonZeroU32::new(4).expect("4 is not 0") }
}

fn default_scale_down_stabilization_seconds() -> u32 {
    60
}

#[cfg(test)]
mod tests;
