//! Carries a plan out: server-side apply of the children, then events, and the status last. It deletes nothing: children
//! that belong to no `LLMDeployment` any more are the garbage collector's.
//!
//! It decides nothing. An object that already is as planned is not written again.

use kube::api::{Patch, PatchParams};
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use kube::{Api, Client, Resource, ResourceExt};
use kvasir_crds::llmdeployment::LLMDeploymentStatus;
use serde::Serialize;
use serde_json::{Value, json};

use crate::error::Error;
use crate::observe::Sources;
use crate::observed::{Child, ObservedChildren};
use crate::plan::children::{Children, FIELD_MANAGER};
use crate::plan::{EventRecord, Plan, Severity};
use crate::stored::Stored;

/// Carries out `plan` for `stored`, and lets the cache know how the API server answered.
///
/// # Errors
/// What the API server says; what was written before stays, and the next reconcile goes on from there.
pub async fn apply(
    sources: &Sources,
    stored: &Stored,
    existing: &ObservedChildren,
    plan: &Plan,
) -> Result<(), Error> {
    if let Some(wanted) = &plan.children {
        children(sources, wanted, existing).await?;
    }
    for event in &plan.events {
        publish(&sources.client, stored, event).await?;
    }
    if let Some(status) = &plan.status {
        write_status(sources, stored, status).await?;
    }
    Ok(())
}

/// Applies the children; the Deployment last, since its pods need the ServiceAccount.
async fn children(
    Sources { client, cache, .. }: &Sources,
    wanted: &Children,
    existing: &ObservedChildren,
) -> Result<(), Error> {
    let Children {
        deployment,
        service,
        budget,
        account,
    } = wanted;
    child(client, account, existing.account.as_deref()).await?;
    child(client, service, existing.service.as_deref()).await?;
    child(client, budget, existing.budget.as_deref()).await?;
    let existing = existing.deployment.as_deref();
    let stands = existing.is_some_and(|existing| {
        cache.is_answer(existing, deployment) && holds(&existing.metadata, &deployment.metadata)
    });
    if !stands && let Some(answer) = child(client, deployment, existing).await? {
        cache.wrote_deployment(deployment, answer);
    }
    Ok(())
}

/// Applies one child, unless what exists already holds every field of it.
async fn child<K: Child>(
    client: &Client,
    wanted: &K,
    existing: Option<&K>,
) -> Result<Option<K>, Error> {
    if existing.is_some_and(|existing| holds(existing, wanted)) {
        return Ok(None);
    }
    let api: Api<K> = Api::namespaced(client.clone(), &wanted.namespace().unwrap_or_default());
    let params = PatchParams::apply(FIELD_MANAGER).force();
    let written = api
        .patch(&wanted.name_any(), &params, &Patch::Apply(wanted))
        .await
        .map_err(|source| Error::ApplyChild {
            kind: K::kind(&()),
            source,
        })?;
    tracing::info!(kind = %K::kind(&()), name = %wanted.name_any(), "applied");
    Ok(Some(written))
}

async fn publish(client: &Client, stored: &Stored, record: &EventRecord) -> Result<(), Error> {
    let reporter = Reporter {
        controller: FIELD_MANAGER.into(),
        instance: None,
    };
    let event = Event {
        type_: match record.severity {
            Severity::Normal => EventType::Normal,
            Severity::Warning => EventType::Warning,
        },
        reason: record.reason.to_owned(),
        note: Some(record.message.clone()),
        action: record.action.to_owned(),
        secondary: None,
    };
    // A recorder of its own for each: a shared one would merge two scalings into one event with the first's words.
    Recorder::new(client.clone(), reporter)
        .publish(&event, &stored.object_ref(&()))
        .await
        .map_err(|source| Error::PublishEvent {
            reason: record.reason,
            source,
        })
}

async fn write_status(
    Sources { client, cache, .. }: &Sources,
    stored: &Stored,
    status: &LLMDeploymentStatus,
) -> Result<(), Error> {
    let api: Api<Stored> = Api::namespaced(client.clone(), &stored.namespace().unwrap_or_default());
    let patch = json!({
        "apiVersion": Stored::api_version(&()), "kind": Stored::kind(&()), "status": status,
    });
    let params = PatchParams::apply(FIELD_MANAGER).force();
    match api
        .patch_status(&stored.name_any(), &params, &Patch::Apply(&patch))
        .await
    {
        Ok(answer) => cache.wrote_status(answer),
        // Deleted in between: nothing to report on.
        Err(kube::Error::Api(status)) if status.is_not_found() => {}
        Err(source) => return Err(Error::WriteStatus(source)),
    }
    Ok(())
}

/// `existing` has every field that `wanted` has: what others added to it is theirs. A field that the user took out of the
/// spec changes the label `kvasir.dev/revision` of the template, and so is a difference too.
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
        // Lists of objects are merged by the objects' keys, and others may have added some; other lists are values.
        (Value::Array(existing), Value::Array(wanted)) if wanted.iter().all(Value::is_object) => {
            let held = |wanted: &Value| existing.iter().any(|existing| includes(existing, wanted));
            wanted.iter().all(held)
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
            !includes(
                &existing,
                &json!({"spec": {"ports": [{"port": 80}, {"port": 81}]}})
            ),
            "an element that is missing"
        );
    }

    #[test]
    fn what_others_added_is_no_difference_and_another_list_of_words_is() {
        let existing =
            json!({"containers": [{"name": "proxy"}, {"name": "server", "args": ["--a", "--b"]}]});
        let with_args = |args: &[&str]| json!({"containers": [{"name": "server", "args": args}]});
        assert!(includes(&existing, &with_args(&["--a", "--b"])));
        for args in [&["--a"][..], &["--b", "--a"], &["--a", "--b", "--c"]] {
            assert!(!includes(&existing, &with_args(args)), "{args:?}");
        }
    }
}
