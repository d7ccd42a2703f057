//! An `LLMDeployment` as the API server holds it, which may be one that this operator can't read: stored by a newer
//! version, or under rules that were narrower since. One such object must not end the watch of all.
//!
//! It owns the reading and names the field that could not be read; what follows from that is `plan`'s to decide.

use std::borrow::Cow;

use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::Resource;
use kvasir_crds::LLMDeployment;
use kvasir_crds::llmdeployment::{LLMDeploymentSpec, LLMDeploymentStatus};
use serde::de::Error as _;
use serde::{Deserialize, Deserializer};
use serde_json::Value;

/// What the watch brings: an `LLMDeployment`, or what could be read of one.
#[derive(Clone, Debug)]
pub struct Stored(pub Result<LLMDeployment, Unreadable>);

/// What could be read of an object whose spec could not be.
#[derive(Clone, Debug, PartialEq)]
pub struct Unreadable {
    /// Its metadata.
    pub metadata: ObjectMeta,
    /// Its status, where that could be read.
    pub status: Option<LLMDeploymentStatus>,
    /// One sentence that names the field, for the condition Accepted.
    pub sentence: String,
}

impl Stored {
    /// Its spec, where that could be read.
    #[must_use]
    pub fn spec(&self) -> Option<&LLMDeploymentSpec> {
        self.0.as_ref().ok().map(|deployment| &deployment.spec)
    }

    /// Its status, where that could be read.
    #[must_use]
    pub fn status(&self) -> Option<&LLMDeploymentStatus> {
        match &self.0 {
            Ok(deployment) => deployment.status.as_ref(),
            Err(unreadable) => unreadable.status.as_ref(),
        }
    }
}

impl<'de> Deserialize<'de> for Stored {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let object = Value::deserialize(deserializer)?;
        let metadata = ObjectMeta::deserialize(&object["metadata"]).map_err(D::Error::custom)?;
        // The status is the operator's own: one that can't be read is written anew.
        let status = Option::deserialize(&object["status"]).unwrap_or_default();
        let spec: Result<LLMDeploymentSpec, _> = serde_path_to_error::deserialize(&object["spec"]);
        Ok(Self(match spec {
            Ok(spec) => Ok(LLMDeployment {
                metadata,
                spec,
                status,
            }),
            Err(error) => Err(Unreadable {
                metadata,
                status,
                sentence: sentence(&error),
            }),
        }))
    }
}

/// `spec.a.b[0]: what is wrong with it`.
fn sentence(error: &serde_path_to_error::Error<serde_json::Error>) -> String {
    let path = match error.path().to_string().as_str() {
        "." => "spec".to_owned(),
        path => format!("spec.{path}"),
    };
    format!(
        "{path} can't be read by this version of the operator, and nothing is changed: {}",
        error.inner()
    )
}

impl Resource for Stored {
    type DynamicType = ();
    type Scope = NamespaceResourceScope;

    fn kind((): &()) -> Cow<'_, str> {
        LLMDeployment::kind(&())
    }

    fn group((): &()) -> Cow<'_, str> {
        LLMDeployment::group(&())
    }

    fn version((): &()) -> Cow<'_, str> {
        LLMDeployment::version(&())
    }

    fn plural((): &()) -> Cow<'_, str> {
        LLMDeployment::plural(&())
    }

    fn meta(&self) -> &ObjectMeta {
        match &self.0 {
            Ok(deployment) => &deployment.metadata,
            Err(unreadable) => &unreadable.metadata,
        }
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        match &mut self.0 {
            Ok(deployment) => &mut deployment.metadata,
            Err(unreadable) => &mut unreadable.metadata,
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(spec: &Value, status: &Value) -> Stored {
        serde_json::from_value(json!({
            "apiVersion": "kvasir.dev/v1alpha1", "kind": "LLMDeployment",
            "metadata": { "name": "m", "namespace": "n", "uid": "u", "generation": 2 },
            "spec": spec, "status": status
        }))
        .unwrap()
    }

    #[test]
    fn names_the_field_that_cannot_be_read() {
        let demo = json!({ "source": { "demo": {} } });
        for (why, spec, want) in [
            (
                "a source of a newer version",
                json!({ "model": { "source": { "objectStore": { "url": "s3://a/b" } } }, "replicas": 1 }),
                "spec.model.source",
            ),
            (
                "a type of a newer version",
                json!({ "model": demo, "replicas": 1, "engine": { "dtype": "float8" } }),
                "spec.engine.dtype",
            ),
            (
                "scaling to zero, of a newer version",
                json!({ "model": demo, "autoscaling": { "minReplicas": 0, "maxReplicas": 1 } }),
                "spec.autoscaling.minReplicas",
            ),
            (
                "an item of a list",
                json!({ "model": demo, "replicas": 1, "engine": { "extraArgs": ["--a", 7] } }),
                "spec.engine.extraArgs[1]",
            ),
            (
                "a field that is missing",
                json!({ "replicas": 1 }),
                "spec can't be read",
            ),
            ("no spec", Value::Null, "spec can't be read"),
        ] {
            let stored = read(&spec, &json!({ "replicas": 2 }));
            let unreadable = stored.0.unwrap_err();
            assert!(
                unreadable.sentence.starts_with(want),
                "{why}: {}",
                unreadable.sentence
            );
            assert_eq!(unreadable.metadata.name.as_deref(), Some("m"), "{why}");
            assert_eq!(unreadable.status.unwrap().replicas, 2, "{why}");
        }
    }

    #[test]
    fn a_status_that_cannot_be_read_is_none() {
        let spec = json!({ "model": { "source": { "demo": {} } }, "replicas": 1 });
        for status in [json!({ "replicas": "many" }), json!("x"), Value::Null] {
            let read = read(&spec, &status).0.unwrap();
            assert_eq!(read.status, None);
            assert_eq!(read.spec.replicas, Some(1));
        }
    }
}
