//! Carries a plan out: server-side apply of the children, deletion of orphans, events, and the status last.
//!
//! It decides nothing. An object that already is as planned is not written again.

use kube::api::{Patch, PatchParams};
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use kube::{Api, Client, Resource, ResourceExt};
use serde::Serialize;
use serde_json::{Value, json};

use crate::observe::{Observed, Sources};
use crate::plan::children::{Child, FIELD_MANAGER};
use crate::plan::{Plan, Severity};
use crate::stored::{Stored, version};

/// Carries out `plan`, and lets the cache know how the API server answered. The version of the `LLMDeployment` with the new
/// status, where that was written.
///
/// # Errors
/// What the API server says; what was written before stays, and the next reconcile goes on from there.
pub async fn apply(
    Sources { client, cache, .. }: &Sources,
    deployment: &Stored,
    observed: &Observed,
    plan: &Plan,
) -> kube::Result<Option<u64>> {
    if let Some(children) = &plan.children {
        child(client, &children.account, observed.account.as_deref()).await?;
        child(client, &children.service, observed.service.as_deref()).await?;
        child(client, &children.budget, observed.budget.as_deref()).await?;
        let wanted = &children.deployment;
        let existing = observed.deployment.as_deref();
        let stands = existing.is_some_and(|existing| {
            cache.answers(existing, wanted) && holds(&existing.metadata, &wanted.metadata)
        });
        if !stands && let Some(answer) = child(client, wanted, existing).await? {
            cache.wrote(wanted, answer);
        }
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
    let Some(status) = &plan.status else {
        return Ok(None);
    };
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
        Err(kube::Error::Api(status)) if status.is_not_found() => Ok(None),
        written => Ok(version(written?.meta())),
    }
}

/// Applies one child, unless what exists already holds every field of it.
async fn child<K: Child>(
    client: &Client,
    wanted: &K,
    existing: Option<&K>,
) -> kube::Result<Option<K>> {
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
