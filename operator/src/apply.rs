//! Carries a plan out: server-side apply of the children, deletion of orphans, events, and the status last.
//!
//! It decides nothing. An object that already is as planned is not written again.

use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ManagedFieldsEntry;
use kube::api::{Patch, PatchParams};
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use kube::{Api, Client, Resource, ResourceExt};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::observe::Observed;
use crate::plan::children::FIELD_MANAGER;
use crate::plan::{Plan, Severity};
use crate::stored::Stored;

/// Carries out `plan`; the child Deployment as the API server answered, where it was written.
///
/// # Errors
/// What the API server says; what was written before stays, and the next reconcile goes on from there.
pub async fn apply(
    client: &Client,
    deployment: &Stored,
    observed: &Observed,
    plan: &Plan,
) -> kube::Result<Option<Deployment>> {
    let mut written = None;
    if let Some(children) = &plan.children {
        child(client, &children.account, observed.account.as_deref()).await?;
        child(client, &children.service, observed.service.as_deref()).await?;
        child(client, &children.budget, observed.budget.as_deref()).await?;
        let mut existing = observed.deployment.as_deref();
        if let (Some(running), Some(fields)) = (existing, &plan.reclaimed) {
            reclaim(client, running, fields).await?;
            existing = None;
        }
        written = child(client, &children.deployment, existing).await?;
    }
    for note in &plan.events {
        // A recorder of its own for each: a shared one would merge two scalings into one event with the first's words.
        let reporter = Reporter {
            controller: FIELD_MANAGER.into(),
            instance: None,
        };
        let event = Event {
            type_: match note.severity {
                Severity::Normal => EventType::Normal,
                Severity::Warning => EventType::Warning,
            },
            reason: note.reason.to_owned(),
            note: Some(note.message.clone()),
            action: note.action.to_owned(),
            secondary: None,
        };
        Recorder::new(client.clone(), reporter)
            .publish(&event, &deployment.object_ref(&()))
            .await?;
    }
    if let Some(status) = &plan.status {
        let api: Api<Stored> =
            Api::namespaced(client.clone(), &deployment.namespace().unwrap_or_default());
        let patch = json!({
            "apiVersion": Stored::api_version(&()), "kind": Stored::kind(&()), "status": status,
        });
        let params = PatchParams::apply(FIELD_MANAGER).force();
        match api
            .patch_status(&deployment.name_any(), &params, &Patch::Apply(&patch))
            .await
        {
            // Deleted in between: nothing to report on.
            Err(kube::Error::Api(status)) if status.is_not_found() => {}
            other => drop(other?),
        }
    }
    Ok(written)
}

/// Makes fields of the Deployment ours that somebody else set, so that the apply that follows takes them out. An error
/// 409 says that it was changed since it was observed: the change leads to the next reconcile.
async fn reclaim(
    client: &Client,
    running: &Deployment,
    fields: &[ManagedFieldsEntry],
) -> kube::Result<()> {
    let name = running.name_any();
    let api: Api<Deployment> =
        Api::namespaced(client.clone(), &running.namespace().unwrap_or_default());
    let patch = json!({ "metadata": {
        "resourceVersion": running.metadata.resource_version, "managedFields": fields,
    } });
    let params = PatchParams {
        field_manager: Some(FIELD_MANAGER.into()),
        ..PatchParams::default()
    };
    api.patch_metadata(&name, &params, &Patch::Merge(&patch))
        .await?;
    tracing::info!(name, "restoring a pod template that was edited by hand");
    Ok(())
}

/// Applies one child, unless what exists already holds every field of it.
async fn child<K>(client: &Client, wanted: &K, existing: Option<&K>) -> kube::Result<Option<K>>
where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope>
        + Clone
        + std::fmt::Debug
        + Serialize
        + DeserializeOwned,
{
    if existing.is_some_and(|existing| holds(existing, wanted)) {
        return Ok(None);
    }
    let api: Api<K> = Api::namespaced(client.clone(), &wanted.namespace().unwrap_or_default());
    let params = PatchParams::apply(FIELD_MANAGER).force();
    let written = api
        .patch(&wanted.name_any(), &params, &Patch::Apply(wanted))
        .await?;
    tracing::info!(kind = %K::kind(&()), name = %wanted.name_any(), "applied");
    Ok(Some(written))
}

/// `existing` has every field that `wanted` has. A field that the user took out of the spec changes the annotation
/// `kvasir.dev/revision`, and so is a difference too.
fn holds<K: Serialize>(existing: &K, wanted: &K) -> bool {
    match (serde_json::to_value(existing), serde_json::to_value(wanted)) {
        (Ok(existing), Ok(wanted)) => includes(&existing, &wanted),
        _ => false,
    }
}

fn includes(existing: &Value, wanted: &Value) -> bool {
    match (existing, wanted) {
        (Value::Object(existing), Value::Object(wanted)) => wanted
            .iter()
            .all(|(key, value)| existing.get(key).is_some_and(|e| includes(e, value))),
        (Value::Array(existing), Value::Array(wanted)) => {
            existing.len() == wanted.len()
                && existing.iter().zip(wanted).all(|(e, w)| includes(e, w))
        }
        _ => existing == wanted,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaulted_fields_are_no_difference_and_changed_ones_are() {
        let wanted = json!({"spec": {"ports": [{"port": 80}], "selector": {"a": "b"}}});
        let existing = json!({"spec": {"ports": [{"port": 80, "protocol": "TCP"}], "selector": {"a": "b"}, "type": "x"}});
        assert!(includes(&existing, &wanted));
        assert!(!includes(&wanted, &existing), "a field that is missing");
        assert!(
            !includes(&existing, &json!({"spec": {"ports": [{"port": 81}]}})),
            "another value"
        );
        assert!(
            !includes(&existing, &json!({"spec": {"ports": []}})),
            "an element too many"
        );
    }
}
