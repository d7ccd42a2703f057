//! The children of an `LLMDeployment` as they should be: Deployment, Service, PodDisruptionBudget, ServiceAccount.
//! Pure. It owns their content and the revision that decides whether pods roll; the number of replicas is handed in,
//! and it doesn't know what the API server holds beyond the running Deployment.

use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{PodTemplateSpec, Service, ServiceAccount};
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::{Resource, ResourceExt};
use kvasir_crds::LLMDeployment;
use kvasir_crds::llmdeployment::{LLMDeploymentSpec, ModelSource, SELECTOR_LABEL, SecretKey};
use serde_json::{Value, json};

use super::pod_template::{CACHE, MODELS, merge, unset};
use crate::pod::{HTTP, MANAGEMENT, SERVER};

/// The label of the hash over the user's fields that shape pods.
pub const REVISION_LABEL: &str = "kvasir.dev/revision";

/// The value of `app.kubernetes.io/managed-by`.
pub const MANAGED_BY: &str = "kvasir-operator";

/// The field manager of everything that the operator writes.
pub const FIELD_MANAGER: &str = "kvasir-operator";

/// The annotation of the child Deployment that holds its pod template as it was applied last: what the API server holds
/// may have been edited since, and another operator may render another one.
pub const APPLIED_TEMPLATE: &str = "kvasir.dev/applied-template";

/// The annotation of the child Deployment with the revision that was rolled out whole last.
pub const GOOD_REVISION: &str = "kvasir.dev/good-revision";

/// The annotation with its template, while another is rolled out: what is gone back to where that one can't become ready.
pub const GOOD_TEMPLATE: &str = "kvasir.dev/good-template";

/// The annotation with the revision that can't become ready.
pub const FAILED_REVISION: &str = "kvasir.dev/failed-revision";

/// The annotation that says why it can't.
pub const FAILED_BECAUSE: &str = "kvasir.dev/failed-because";

/// All annotations of an object together may hold 262,144 bytes, and two of them are templates.
const MAX_TEMPLATE_BYTES: usize = 120_000;

/// Where the replicas keep what they fetch.
const CACHE_FOLDER: &str = "/model-cache";

/// How long a model may take to load before the kubelet starts it again.
const STARTUP_SECONDS: u32 = 3600;

/// Set beyond [`STARTUP_SECONDS`], so that a model that loads is not called stuck.
pub const PROGRESS_DEADLINE_SECONDS: u32 = 3900;

/// All of them carry the deployment's name, and its owner reference.
#[derive(Clone, Debug, PartialEq)]
pub struct Children {
    /// The replicas.
    pub deployment: Deployment,
    /// The endpoint.
    pub service: Service,
    /// Evictions take one replica at a time.
    pub budget: PodDisruptionBudget,
    /// The pods' identity, with no rights and no token.
    pub account: ServiceAccount,
}

/// The children of `d`. Where `running`, the Deployment as observed, was applied for the same revision, its pods stay as
/// they are: neither a new `default_image` nor a new operator rolls them, and a hand edit is taken back.
///
/// # Errors
/// One sentence for the condition Accepted: what of `spec.podTemplate` can't be merged.
pub fn children(
    d: &LLMDeployment,
    replicas: i32,
    default_image: &str,
    running: Option<&Deployment>,
) -> Result<Children, String> {
    let name = d.name_any();
    let metadata = metadata(d);
    let selector = json!({ SELECTOR_LABEL: name });
    let template = template(d, default_image, running)?;
    Ok(Children {
        deployment: deployment(d, replicas, &template)?,
        service: typed(json!({
            "metadata": metadata,
            "spec": {
                "selector": selector,
                // The management port is for who knows a pod's address, and not for the Service's clients.
                "ports": [{
                    "name": HTTP.name, "port": HTTP.number, "protocol": "TCP", "targetPort": HTTP.name
                }],
            }
        }))?,
        budget: typed(json!({
            "metadata": metadata,
            // A replica that doesn't serve may always be evicted: it would hold up the drain of a node for nothing.
            "spec": {
                "maxUnavailable": 1,
                "selector": { "matchLabels": selector },
                "unhealthyPodEvictionPolicy": "AlwaysAllow",
            }
        }))?,
        account: typed(json!({ "metadata": metadata, "automountServiceAccountToken": false }))?,
    })
}

/// `running` with its pod template as it was applied last, whatever the spec says since, and this many replicas. `None`
/// where that template isn't known.
#[must_use]
pub fn scaled(d: &LLMDeployment, replicas: i32, running: &Deployment) -> Option<Deployment> {
    deployment(d, replicas, &applied_template(running)?).ok()
}

/// What all children have in common.
fn metadata(d: &LLMDeployment) -> Value {
    let name = d.name_any();
    json!({
        "name": name,
        "namespace": d.namespace(),
        "labels": labels(&name),
        "ownerReferences": d.controller_owner_ref(&()).into_iter().collect::<Vec<_>>(),
    })
}

fn deployment(
    d: &LLMDeployment,
    replicas: i32,
    template: &PodTemplateSpec,
) -> Result<Deployment, String> {
    let applied = serde_json::to_string(template)
        .map_err(|e| format!("the pod template can't be written: {e}"))?;
    if applied.len() > MAX_TEMPLATE_BYTES {
        return Err(format!(
            "spec.podTemplate and spec.engine make a pod template of {} bytes, of at most {MAX_TEMPLATE_BYTES}: move long values into a ConfigMap",
            applied.len()
        ));
    }
    let mut metadata = metadata(d);
    metadata["annotations"] = json!({ APPLIED_TEMPLATE: applied });
    typed(json!({
        "metadata": metadata,
        "spec": {
            "replicas": replicas,
            "selector": { "matchLabels": { SELECTOR_LABEL: d.name_any() } },
            // A new replica serves before an old one goes, unless a rollout decides otherwise.
            "strategy": { "type": "RollingUpdate", "rollingUpdate": { "maxSurge": 1, "maxUnavailable": 0 } },
            "progressDeadlineSeconds": PROGRESS_DEADLINE_SECONDS,
            "revisionHistoryLimit": 3,
            "template": template,
        }
    }))
}

/// The base URL of the API inside the cluster.
#[must_use]
pub fn endpoint(metadata: &ObjectMeta) -> String {
    let [name, namespace] =
        [&metadata.name, &metadata.namespace].map(|part| part.as_deref().unwrap_or_default());
    let port = HTTP.number;
    format!("http://{name}.{namespace}.svc:{port}/v1")
}

/// The hash over the user's fields that shape pods. The number of replicas is not among them.
#[must_use]
pub fn revision(spec: &LLMDeploymentSpec) -> String {
    // Nulls are not hashed, and these mean something; a spec without them keeps the hash that it had before they did.
    let unset = spec.pod_template.as_ref().map(unset);
    let fields = json!({
        "unset": unset.filter(|unset| !unset.is_empty()),
        "model": spec.model,
        "engine": spec.engine,
        "image": spec.image,
        "imagePullPolicy": spec.image_pull_policy,
        "resources": spec.resources,
        "drainSeconds": spec.drain_seconds,
        "podTemplate": spec.pod_template,
    });
    // FNV-1a: it must be the same in every release, and only has to tell one object's revisions apart.
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    fnv(&fields, &mut hash);
    format!("{hash:016x}")
}

/// Hashes a value with its members in the order of their names, so that no map's own order matters.
fn fnv(value: &Value, hash: &mut u64) {
    let mut feed = |bytes: &[u8]| {
        for byte in bytes {
            *hash = (*hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
        }
    };
    match value {
        Value::Object(members) => {
            let mut members: Vec<_> = members
                .iter()
                .filter(|(_, value)| !value.is_null())
                .collect();
            members.sort_by_key(|(name, _)| *name);
            feed(b"{");
            for (name, value) in members {
                fnv(&Value::String(name.clone()), hash);
                fnv(value, hash);
            }
        }
        Value::Array(items) => {
            feed(b"[");
            feed(&items.len().to_le_bytes());
            for item in items {
                fnv(item, hash);
            }
        }
        scalar => feed(scalar.to_string().as_bytes()),
    }
}

fn labels(name: &str) -> Value {
    json!({
        SELECTOR_LABEL: name,
        "app.kubernetes.io/name": "kvasir-server",
        "app.kubernetes.io/instance": name,
        "app.kubernetes.io/managed-by": MANAGED_BY,
    })
}

/// The template of the pods: as it was applied last, where that was for the same revision, and rendered otherwise. So
/// neither a new default image, nor a new operator, nor a hand edit changes it while the user's fields stay the same.
fn template(
    d: &LLMDeployment,
    default_image: &str,
    running: Option<&Deployment>,
) -> Result<PodTemplateSpec, String> {
    let revision = revision(&d.spec);
    let of_revision = |template: &PodTemplateSpec| revision_of(template) == Some(&revision);
    if let Some(running) = running {
        let failed = running.annotations().get(FAILED_REVISION) == Some(&revision);
        let good = template_in(running, GOOD_TEMPLATE).filter(|_| failed);
        // Once it was gone back to, the good one is the one that was applied.
        let is_held = failed
            || d.spec
                .rollout
                .as_ref()
                .is_some_and(|rollout| rollout.paused);
        if let Some(held) = good.or_else(|| applied_template(running).filter(|_| is_held)) {
            return Ok(held);
        }
    }
    let applied = running.and_then(applied_template).filter(of_revision);
    // Somebody took the annotation away: what runs is then the best record there is.
    let live = || {
        let spec = running.and_then(|running| running.spec.as_ref());
        spec.map(|spec| spec.template.clone()).filter(of_revision)
    };
    match applied.or_else(live) {
        Some(applied) => Ok(applied),
        None => render(d, default_image, &revision),
    }
}

/// The template that was applied last, as its annotation has it.
fn applied_template(running: &Deployment) -> Option<PodTemplateSpec> {
    template_in(running, APPLIED_TEMPLATE)
}

/// The template in an annotation.
fn template_in(running: &Deployment, name: &str) -> Option<PodTemplateSpec> {
    serde_json::from_str(running.annotations().get(name)?).ok()
}

/// The revision that a pod template carries.
pub(super) fn revision_of(template: &PodTemplateSpec) -> Option<&String> {
    template
        .metadata
        .as_ref()?
        .labels
        .as_ref()?
        .get(REVISION_LABEL)
}

fn render(
    d: &LLMDeployment,
    default_image: &str,
    revision: &str,
) -> Result<PodTemplateSpec, String> {
    let spec = &d.spec;
    let name = d.name_any();
    let mut labels = labels(&name);
    labels[REVISION_LABEL] = revision.into();
    let mut pod = json!({
        "containers": [server(d, default_image)],
        "serviceAccountName": name,
        "automountServiceAccountToken": false,
        "enableServiceLinks": false,
        "terminationGracePeriodSeconds": i64::from(spec.drain_seconds) + 10,
        "securityContext": {
            "runAsNonRoot": true, "runAsUser": 65532, "runAsGroup": 65532, "fsGroup": 65532,
            "seccompProfile": { "type": "RuntimeDefault" },
        },
    });
    if let Some(Volume { source, .. }) = volume(d) {
        pod["volumes"] = json!([source]);
    }
    let base: PodTemplateSpec = typed(json!({ "metadata": { "labels": labels }, "spec": pod }))?;
    match &spec.pod_template {
        Some(overlay) => merge(&base, overlay),
        None => Ok(base),
    }
}

/// The container of the server.
fn server(d: &LLMDeployment, default_image: &str) -> Value {
    let spec = &d.spec;
    let probe = |path: &str, period: u32, failures: u32| {
        json!({
            "httpGet": { "path": path, "port": MANAGEMENT.name },
            "periodSeconds": period, "timeoutSeconds": 5, "failureThreshold": failures
        })
    };
    let ports = [HTTP, MANAGEMENT]
        .map(|port| json!({ "name": port.name, "containerPort": port.number, "protocol": "TCP" }));
    let mut server = json!({
        "name": SERVER,
        "image": spec.image.as_deref().unwrap_or(default_image),
        "command": ["/kvasir-server"],
        "args": args(d),
        "ports": ports,
        "resources": spec.resources.clone().unwrap_or_default(),
        "startupProbe": probe("/ready", 2, STARTUP_SECONDS / 2),
        "readinessProbe": probe("/ready", 2, 2),
        "livenessProbe": probe("/health", 10, 6),
        // The last line of a server that ended stands in the pod's status, and from there in ours.
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "securityContext": {
            "allowPrivilegeEscalation": false,
            "readOnlyRootFilesystem": true,
            "capabilities": { "drop": ["ALL"] },
        },
    });
    let env = env(spec);
    // An empty list would not be held by the API server, and so differ from what is read back.
    if !env.is_empty() {
        server["env"] = json!(env);
    }
    if let Some(policy) = spec.image_pull_policy {
        server["imagePullPolicy"] = policy.as_str().into();
    }
    if let Some(Volume { mount, .. }) = volume(d) {
        server["volumeMounts"] = json!([mount]);
    }
    server
}

/// Where the model's files are in a pod.
struct Volume {
    source: Value,
    mount: Value,
}

fn volume(d: &LLMDeployment) -> Option<Volume> {
    let model = &d.spec.model;
    match &model.source {
        ModelSource::Demo(_) => None,
        ModelSource::Pvc(source) => Some(Volume {
            source: json!({
                "name": MODELS,
                "persistentVolumeClaim": { "claimName": source.claim_name, "readOnly": true }
            }),
            mount: json!({ "name": MODELS, "mountPath": "/models", "readOnly": true }),
        }),
        ModelSource::HuggingFace(_) => Some(Volume {
            source: match &model.cache {
                Some(cache) => json!({
                    "name": CACHE, "persistentVolumeClaim": { "claimName": cache.claim_name }
                }),
                None => json!({ "name": CACHE, "emptyDir": {} }),
            },
            mount: json!({ "name": CACHE, "mountPath": CACHE_FOLDER }),
        }),
    }
}

/// The server's environment: how it reaches a hub, and the user's own, which counts where both name a variable.
fn env(spec: &LLMDeploymentSpec) -> Vec<Value> {
    let users = spec.engine.iter().flat_map(|engine| &engine.env);
    let users: Vec<Value> = users.map(|variable| json!(variable)).collect();
    let mut env = Vec::new();
    if let ModelSource::HuggingFace(source) = &spec.model.source {
        if let Some(endpoint) = &source.endpoint {
            env.push(json!({ "name": "HF_ENDPOINT", "value": endpoint }));
        }
        if let Some(SecretKey { name, key }) = &source.token_secret {
            let secret = json!({ "secretKeyRef": { "name": name, "key": key } });
            env.push(json!({ "name": "HF_TOKEN", "valueFrom": secret }));
        }
    }
    env.retain(|ours| users.iter().all(|theirs| theirs["name"] != ours["name"]));
    env.extend(users);
    env
}

/// The server's arguments: those that follow from the spec, then the user's own.
fn args(d: &LLMDeployment) -> Vec<String> {
    let spec = &d.spec;
    let model = match &spec.model.source {
        ModelSource::Demo(_) => "demo".to_owned(),
        ModelSource::Pvc(source) => match &source.path {
            Some(path) => format!("/models/{path}"),
            None => "/models".to_owned(),
        },
        ModelSource::HuggingFace(source) => {
            let revision = source.revision.as_deref().unwrap_or("main");
            format!("hf://{}@{revision}", source.repository)
        }
    };
    let cache = match &spec.model.source {
        ModelSource::HuggingFace(_) => Some(CACHE_FOLDER.to_owned()),
        ModelSource::Demo(_) | ModelSource::Pvc(_) => None,
    };
    let served_name = spec
        .model
        .served_name
        .clone()
        .or_else(|| match spec.model.source {
            ModelSource::Demo(_) => None,
            ModelSource::Pvc(_) | ModelSource::HuggingFace(_) => Some(d.name_any()),
        });
    let device = if wants_gpu(d) { "cuda" } else { "cpu" };
    let engine = spec.engine.clone().unwrap_or_default();
    let number = |n: Option<i32>| n.map(|n| n.to_string());
    [
        // Every address of both families: a cluster may have either alone.
        ("--host", Some("::".to_owned())),
        ("--port", Some(HTTP.number.to_string())),
        ("--management-port", Some(MANAGEMENT.number.to_string())),
        ("--device", Some(device.to_owned())),
        ("--model", Some(model)),
        ("--download-dir", cache),
        ("--served-model-name", served_name),
        ("--drain-seconds", Some(spec.drain_seconds.to_string())),
        ("--max-model-len", number(engine.max_model_len)),
        ("--max-num-seqs", number(engine.max_num_seqs)),
        (
            "--max-num-batched-tokens",
            number(engine.max_num_batched_tokens),
        ),
        ("--block-size", number(engine.block_size)),
        ("--num-gpu-blocks-override", number(engine.kv_blocks)),
        (
            "--dtype",
            engine.dtype.map(|dtype| dtype.as_str().to_owned()),
        ),
    ]
    .into_iter()
    .filter_map(|(flag, value)| value.map(|value| [flag.to_owned(), value]))
    .flatten()
    .chain(engine.extra_args)
    .collect()
}

/// A GPU or a part of one is asked for, under the names of NVIDIA's device plugin: a quantity that isn't 0.
fn wants_gpu(d: &LLMDeployment) -> bool {
    let is_gpu = |name: &str| {
        matches!(name, "nvidia.com/gpu" | "nvidia.com/gpu.shared")
            || name.starts_with("nvidia.com/mig-")
    };
    let resources = d.spec.resources.iter();
    resources
        .flat_map(|r| [&r.limits, &r.requests])
        .flatten()
        .flatten()
        .any(|(name, quantity)| is_gpu(name) && quantity.0.trim() != "0")
}

/// `value` as a type of Kubernetes.
fn typed<K: serde::de::DeserializeOwned>(value: Value) -> Result<K, String> {
    serde_json::from_value(value)
        .map_err(|e| format!("a child can't be written from the spec: {e}"))
}

#[cfg(test)]
mod tests;
