//! The parts of the schema that no derive can give: unions, and the small forms of Kubernetes' own types, whose
//! full schemas would be most of the file. It owns no Rust type that a reader of the resource sees.

use kube::KubeSchema;
use schemars::{Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};

use super::{DemoSource, PvcSource};

/// The schema of [`super::ModelSource`]: a structural schema can't depend on values, so the union is an object
/// of optional members with a rule.
#[derive(KubeSchema, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("[has(self.demo), has(self.pvc)].filter(set, set).size() == 1")
    .message("exactly one of model.source.demo and model.source.pvc must be set"))]
pub(super) struct SourceUnion {
    /// The small model inside the server's binary, for first impressions and tests.
    #[serde(skip_serializing_if = "Option::is_none")]
    demo: Option<DemoSource>,
    /// A Hugging Face model directory on a PersistentVolumeClaim.
    #[serde(skip_serializing_if = "Option::is_none")]
    pvc: Option<PvcSource>,
}

/// core/v1 ResourceRequirements without claims.
pub(super) fn resources(_: &mut SchemaGenerator) -> Schema {
    let quantities = json_schema!({
        "type": "object",
        "additionalProperties": {
            "pattern": r"^(\+|-)?(([0-9]+(\.[0-9]*)?)|(\.[0-9]+))(([KMGTPE]i)|[numkMGTPE]|([eE](\+|-)?(([0-9]+(\.[0-9]*)?)|(\.[0-9]+))))?$",
            "x-kubernetes-int-or-string": true
        },
        "x-kubernetes-validations": [{
            "rule": "!('nvidia.com/gpu' in self) || string(self['nvidia.com/gpu']) in ['0', '1']",
            "message": "nvidia.com/gpu must be 1: a replica serves on one GPU; for more of them raise spec.replicas or spec.autoscaling.maxReplicas"
        }]
    });
    json_schema!({ "type": "object", "properties": { "limits": quantities, "requests": quantities } })
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
