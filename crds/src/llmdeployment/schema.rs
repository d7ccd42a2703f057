//! The parts of the schema that no derive can give: unions, and the small forms of Kubernetes' own types, whose
//! full schemas would be most of the file. It owns no Rust type that a reader of the resource sees.

use kube::KubeSchema;
use schemars::{Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};

use super::{DemoSource, HuggingFaceSource, PvcSource};

/// The schema of [`super::ModelSource`]: a structural schema can't depend on values, so the union is an object
/// of optional members with a rule.
#[derive(KubeSchema, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("[has(self.demo), has(self.pvc), has(self.huggingFace)].filter(set, set).size() == 1")
    .message("exactly one of model.source.demo, model.source.pvc and model.source.huggingFace must be set"))]
pub(super) struct SourceUnion {
    /// The small model inside the server's binary, for first impressions and tests.
    #[serde(skip_serializing_if = "Option::is_none")]
    demo: Option<DemoSource>,
    /// A Hugging Face model directory on a PersistentVolumeClaim.
    #[serde(skip_serializing_if = "Option::is_none")]
    pvc: Option<PvcSource>,
    /// A repository on a Hugging Face hub or a mirror of one, which the replicas fetch.
    #[serde(skip_serializing_if = "Option::is_none")]
    hugging_face: Option<HuggingFaceSource>,
}

/// core/v1 ResourceRequirements without claims.
pub(super) fn resources(_: &mut SchemaGenerator) -> Schema {
    let quantities = |description: &str| {
        json_schema!({
            "type": "object",
            "description": description,
            // The API server bounds what a rule may cost by it: 32 are too many.
            "maxProperties": 16,
            "additionalProperties": {
                "pattern": r"^(\+|-)?(([0-9]+(\.[0-9]*)?)|(\.[0-9]+))(([KMGTPE]i)|[numkMGTPE]|([eE](\+|-)?(([0-9]+(\.[0-9]*)?)|(\.[0-9]+))))?$",
                "x-kubernetes-int-or-string": true
            },
            "x-kubernetes-validations": [
                {
                    "rule": "!('nvidia.com/gpu' in self) || string(self['nvidia.com/gpu']) in ['0', '1']",
                    "message": "nvidia.com/gpu must be 1: a replica serves on one GPU; for more of them raise spec.replicas or spec.autoscaling.maxReplicas"
                },
                {
                    "rule": "self.all(name, !(name == 'nvidia.com/gpu.shared' || name.startsWith('nvidia.com/mig-')) || string(self[name]) in ['0', '1'])",
                    "message": "nvidia.com/gpu.shared and nvidia.com/mig-... must be 1: a replica serves on one part of a GPU, and more of them give it no more"
                },
                {
                    "rule": "self.filter(name, name == 'nvidia.com/gpu' || name == 'nvidia.com/gpu.shared' || name.startsWith('nvidia.com/mig-')).filter(name, string(self[name]) != '0').size() <= 1",
                    "message": "a replica serves on one GPU or one part of one: of nvidia.com/gpu, nvidia.com/gpu.shared and nvidia.com/mig-... only one may be set"
                }
            ]
        })
    };
    json_schema!({
        "type": "object",
        "properties": {
            "limits": quantities("The most that each replica may use, by resource: cpu, memory, nvidia.com/gpu. Above its memory limit a server is killed."),
            "requests": quantities("What a node must have free for each replica, by resource; where absent, the limit. A GPU is set in limits.")
        },
        "x-kubernetes-validations": [{
            "rule": "!has(self.requests) || self.requests.all(name, !name.startsWith('nvidia.com/') || (has(self.limits) && name in self.limits))",
            "message": "a GPU in resources.requests must be in resources.limits too: Kubernetes doesn't overcommit it"
        }]
    })
}

/// A list of core/v1 EnvVar, with `valueFrom` left to the API server's check of the pods.
pub(super) fn env(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "array",
        "items": {
            "type": "object",
            "properties": {
                "name": { "type": "string", "minLength": 1 },
                "value": { "type": "string" },
                "valueFrom": { "type": "object", "x-kubernetes-preserve-unknown-fields": true }
            },
            "required": ["name"]
        },
        "x-kubernetes-list-type": "map",
        "x-kubernetes-list-map-keys": ["name"]
    })
}

/// An object of any members.
pub(super) fn open_object(_: &mut SchemaGenerator) -> Schema {
    json_schema!({ "type": "object", "x-kubernetes-preserve-unknown-fields": true })
}
