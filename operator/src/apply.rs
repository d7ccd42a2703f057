//! Carries a plan out: server-side apply of the children; and tells what came of it: events, and the status last. It
//! deletes nothing: children that belong to no `LLMDeployment` any more are the garbage collector's.
//!
//! It decides nothing. An object that already is as planned is not written again. What the API server refuses is no error
//! but an outcome, and what it fails with keeps nothing else from being written.

use std::time::{Duration, Instant};

use futures::StreamExt as _;
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::Pod;
use kube::api::{Patch, PatchParams};
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use kube::{Api, Client, Resource, ResourceExt};
use kvasir_crds::llmdeployment::{LLMDeploymentStatus, Reason};
use serde::Serialize;
use serde_json::{Value, json};

use crate::error::{Error, in_time};
use crate::key::key_of;
use crate::observe::Sources;
use crate::observed::{Child, ObservedChildren};
use crate::plan::children::{Children, FIELD_MANAGER};
use crate::plan::status::Refusal;
use crate::plan::victims::{DELETION_COST, DeletionCost};
use crate::plan::{EventRecord, Outcome, Plan, Severity};
use crate::stored::Stored;

/// A scale-down waits no longer for the costs of the pods to be told.
const COSTS_TIMEOUT: Duration = Duration::from_secs(5);
const COSTS_AT_ONCE: usize = 16;

/// The API server takes no longer note of an event (`events.k8s.io/v1`, Event.note).
const MAX_NOTE_BYTES: usize = 1024;

/// Carries out `plan`, and lets the cache know how the API server answered. Beside the outcome stands the first failure of
/// a request that may go through when it is made again.
pub async fn apply(
    sources: &Sources,
    existing: &ObservedChildren,
    plan: &Plan,
) -> (Outcome, Option<Error>) {
    let mut tally = Tally::default();
    let stands = existing.deployment.as_deref();
    let wanted = match &plan.children {
        None => None,
        Some(Children {
            deployment,
            service,
            budget,
            account,
        }) => {
            // The Deployment last: its pods need the ServiceAccount.
            tally.count(child(sources, account, existing.account.as_deref()).await);
            tally.count(child(sources, service, existing.service.as_deref()).await);
            tally.count(child(sources, budget, existing.budget.as_deref()).await);
            Some(deployment)
        }
    };
    if let Some(deployment) = wanted.or(plan.fallback.as_ref()) {
        let namespace = deployment.namespace().unwrap_or_default();
        tell_costs(&sources.client, &namespace, &plan.costs).await;
    }
    for deployment in wanted.into_iter().chain(&plan.fallback) {
        if tally.count(apply_deployment(sources, deployment, stands).await) {
            tally.outcome.is_scaled = true;
            break;
        }
    }
    (tally.outcome, tally.failure)
}

/// Tells the pods what their deletion costs, before one of them is chosen. Where that fails Kubernetes chooses all the same.
async fn tell_costs(client: &Client, namespace: &str, costs: &[DeletionCost]) {
    let api: Api<Pod> = Api::namespaced(client.clone(), namespace);
    let all = futures::stream::iter(costs)
        .for_each_concurrent(COSTS_AT_ONCE, |cost| tell_cost(&api, cost));
    if tokio::time::timeout(COSTS_TIMEOUT, all).await.is_err() {
        tracing::warn!(namespace, "telling the costs of deletions took too long");
    }
}

async fn tell_cost(pods: &Api<Pod>, DeletionCost { pod, tokens }: &DeletionCost) {
    let patch = json!({ "metadata": { "annotations": { DELETION_COST: tokens.to_string() } } });
    let params = PatchParams {
        field_manager: Some(FIELD_MANAGER.to_owned()),
        ..PatchParams::default()
    };
    if let Err(error) = pods.patch(pod, &params, &Patch::Merge(&patch)).await {
        tracing::warn!(pod, %error, "the cost of its deletion could not be told");
    }
}

/// How the requests of one plan ended.
#[derive(Default)]
struct Tally {
    outcome: Outcome,
    failure: Option<Error>,
}

impl Tally {
    /// True where the child is as it was wanted.
    fn count<T>(&mut self, written: Result<T, Error>) -> bool {
        let Err(error) = written else { return true };
        match error.refusal() {
            Some(_) => {
                let sentence = cut(&error.sentence(), MAX_NOTE_BYTES);
                let refusal = Refusal {
                    reason: Reason::ChildRefused,
                    sentence,
                };
                self.outcome.refused.get_or_insert(refusal);
            }
            None => drop(self.failure.get_or_insert(error)),
        }
        false
    }
}

async fn apply_deployment(
    sources: &Sources,
    wanted: &Deployment,
    existing: Option<&Deployment>,
) -> Result<(), Error> {
    let cache = &sources.cache;
    let stands = existing.is_some_and(|existing| {
        cache.is_answer(existing, wanted) && holds(&existing.metadata, &wanted.metadata)
    });
    if !stands && let Some(answer) = child(sources, wanted, existing).await? {
        cache.wrote_deployment(wanted, answer);
    }
    Ok(())
}

/// Publishes the events, and gives back those that may be published later.
pub async fn publish(
    sources: &Sources,
    stored: &Stored,
    events: &[EventRecord],
) -> Vec<(EventRecord, Error)> {
    let mut unsent = Vec::new();
    for event in events {
        match publish_one(&sources.client, stored, event).await {
            Ok(()) => {}
            Err(error) if error.namespace_is_terminating() => {}
            Err(error) => unsent.push((event.clone(), error)),
        }
    }
    unsent
}

/// Applies one child, unless what exists already holds every field of it, or the same was refused just now.
async fn child<K: Child>(
    Sources { client, cache, .. }: &Sources,
    wanted: &K,
    existing: Option<&K>,
) -> Result<Option<K>, Error> {
    if existing.is_some_and(|existing| holds(existing, wanted)) {
        return Ok(None);
    }
    let kind = K::kind(&());
    let failed = |source| Error::ApplyChild {
        kind: K::kind(&()),
        source,
    };
    let (key, now) = (key_of(wanted), Instant::now());
    let request = serde_json::to_value(wanted).unwrap_or_default();
    if let Some(said) = cache.refusals.latest(&kind, &key, &request, now) {
        return Err(failed(kube::Error::Api(said)));
    }
    let api: Api<K> = Api::namespaced(client.clone(), &key.0);
    let params = PatchParams::apply(FIELD_MANAGER).force();
    let written = in_time(api.patch(&key.1, &params, &Patch::Apply(wanted))).await;
    let written = written.map_err(failed).inspect_err(|error| {
        if let (Some(_), kube::Error::Api(said)) = (error.refusal(), error.api_error()) {
            cache
                .refusals
                .insert(kind.clone(), key.clone(), request, now, said.clone());
        }
    })?;
    tracing::info!(%kind, name = key.1, "applied");
    Ok(Some(written))
}

async fn publish_one(client: &Client, stored: &Stored, record: &EventRecord) -> Result<(), Error> {
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
        note: Some(cut(&record.message, MAX_NOTE_BYTES)),
        action: record.action.to_owned(),
        secondary: None,
    };
    // A recorder of its own for each: a shared one would merge two scalings into one event with the first's words.
    let recorder = Recorder::new(client.clone(), reporter);
    in_time(recorder.publish(&event, &stored.object_ref(&())))
        .await
        .map_err(|source| Error::PublishEvent {
            reason: record.reason,
            source,
        })
}

/// Writes the status.
///
/// # Errors
/// What the API server says.
pub async fn write_status(
    Sources { client, cache, .. }: &Sources,
    stored: &Stored,
    status: &LLMDeploymentStatus,
) -> Result<(), Error> {
    let api: Api<Stored> = Api::namespaced(client.clone(), &stored.namespace().unwrap_or_default());
    let patch = json!({
        "apiVersion": Stored::api_version(&()), "kind": Stored::kind(&()), "status": status,
    });
    let params = PatchParams::apply(FIELD_MANAGER).force();
    let name = stored.name_any();
    match in_time(api.patch_status(&name, &params, &Patch::Apply(&patch))).await {
        Ok(answer) => cache.wrote_status(answer),
        // Deleted in between: nothing to report on.
        Err(kube::Error::Api(status)) if status.is_not_found() => {}
        Err(source) => return Err(Error::WriteStatus(source)),
    }
    Ok(())
}

/// The first bytes of `text`, at a character's end, with dots where there were more.
fn cut(text: &str, max_bytes: usize) -> String {
    const DOTS: &str = "...";
    if text.len() <= max_bytes {
        return text.to_owned();
    }
    let end = text.floor_char_boundary(max_bytes - DOTS.len());
    format!("{}{DOTS}", &text[..end])
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
    fn a_note_is_as_long_as_the_api_server_takes() {
        let letters = "\u{1F600}".repeat(256);
        for (why, text, want) in [
            ("short", "abc", "abc".to_owned()),
            ("just fits", letters.as_str(), letters.clone()),
            (
                "too long, and no letter is broken",
                &format!("{letters}x"),
                format!("{}...", "\u{1F600}".repeat(255)),
            ),
        ] {
            let note = cut(text, MAX_NOTE_BYTES);
            assert_eq!(note, want, "{why}");
            assert!(note.len() <= MAX_NOTE_BYTES, "{why}");
        }
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
