//! Whole plans: what is told, what is carried out, and what the history changes about it.

use std::sync::Arc;

use kvasir_crds::LoadReport;
use kvasir_crds::load_report::{BlockCounts, QueueCounts};
use serde_json::{Value, json};

use super::autoscale::ReplicaLoad;
use super::*;

const IMAGE: &str = "kvasir:1";

/// A deployment of this spec, as the API server holds it.
pub(super) fn deployment(spec: Value) -> LLMDeployment {
    serde_json::from_value(json!({
        "apiVersion": "kvasir.dev/v1alpha1", "kind": "LLMDeployment",
        "metadata": { "name": "llama", "namespace": "models", "uid": "0c3e", "generation": 1 },
        "spec": spec
    }))
    .unwrap()
}

fn autoscaled() -> Value {
    json!({ "model": { "source": { "demo": {} } }, "autoscaling": { "maxReplicas": 4 } })
}

/// A replica of 100 blocks.
fn load(active: u64, waiting: u64) -> ReplicaLoad {
    ReplicaLoad::Reported(LoadReport {
        blocks: Some(BlockCounts {
            total: 100,
            active,
            ..BlockCounts::default()
        }),
        queue: Some(QueueCounts {
            waiting,
            ..QueueCounts::default()
        }),
        ..LoadReport::default()
    })
}

/// What is observed once the plan for `spec` with `replicas` was carried out.
fn observed(spec: &Value, replicas: i32, loads: Vec<ReplicaLoad>) -> Observed {
    let made = children::children(&deployment(spec.clone()), replicas, IMAGE, None).unwrap();
    Observed {
        deployment: Some(Arc::new(made.deployment)),
        loads,
        ..Observed::default()
    }
}

fn at(second: u64) -> Now {
    Now {
        monotonic: Duration::from_secs(second),
        wall: Timestamp::UNIX_EPOCH,
    }
}

fn replicas(plan: &Plan) -> Option<i32> {
    plan.children.as_ref()?.deployment.spec.as_ref()?.replicas
}

#[test]
fn a_change_of_replicas_is_told_once_with_its_numbers() {
    let d = deployment(autoscaled());
    let mut history = History::default();
    let before = observed(&autoscaled(), 1, vec![load(100, 11)]);
    let scaled = plan(&d, &before, &mut history, at(0), IMAGE);
    assert_eq!(replicas(&scaled), Some(3));
    assert_eq!(scaled.events.len(), 1);
    let note = &scaled.events[0];
    assert_eq!(note.reason, "ScaledUp");
    for words in ["from 1 to 3", "100 blocks active", "11 requests waiting"] {
        assert!(note.message.contains(words), "{}", note.message);
    }
    let last = scaled.status.unwrap().last_scaling.unwrap();
    assert_eq!((last.from, last.to, &last.reason), (1, 3, &note.message));

    let after = observed(&autoscaled(), 3, vec![load(100, 11)]);
    let held = plan(&d, &after, &mut history, at(2), IMAGE);
    assert_eq!((replicas(&held), held.events), (Some(3), vec![]));
}

#[test]
fn what_is_not_carried_out_is_not_told() {
    let mut spec = autoscaled();
    let before = observed(&spec, 1, vec![load(100, 11)]);
    spec["podTemplate"] = json!({ "spec": { "nodeSelektor": {} , "restartPolicy": "Never" } });
    let plan = plan(
        &deployment(spec),
        &before,
        &mut History::default(),
        at(0),
        IMAGE,
    );
    assert_eq!(replicas(&plan), None);
    let told = plan.events.iter().map(|note| note.reason);
    assert!(!told.into_iter().any(|reason| reason.starts_with("Scaled")));
    assert_eq!(plan.status.unwrap().last_scaling, None);
}

#[test]
fn autoscaling_switched_on_again_waits_a_whole_window() {
    let idle = || observed(&autoscaled(), 3, vec![load(0, 0); 3]);
    let d = deployment(autoscaled());
    let mut history = History::default();
    for second in 0..=299 {
        plan(&d, &idle(), &mut history, at(second), IMAGE);
    }
    let mut interrupted = history.clone();
    let down = plan(&d, &idle(), &mut history, at(300), IMAGE);
    assert_eq!(replicas(&down), Some(1), "the window has passed");

    let fixed = json!({ "model": { "source": { "demo": {} } }, "replicas": 3 });
    plan(
        &deployment(fixed),
        &idle(),
        &mut interrupted,
        at(299),
        IMAGE,
    );
    let held = plan(&d, &idle(), &mut interrupted, at(300), IMAGE);
    assert_eq!(
        replicas(&held),
        Some(3),
        "what was known before counts no more"
    );
}

#[test]
fn load_is_written_where_replicas_are_fixed_and_seldom() {
    let spec = json!({ "model": { "source": { "demo": {} } }, "replicas": 1 });
    let d = deployment(spec.clone());
    let mut history = History::default();
    let mut written = |second: u64, active: u64, waiting: u64| {
        let seen = observed(&spec, 1, vec![load(active, waiting)]);
        let plan = plan(&d, &seen, &mut history, at(second), IMAGE);
        let status = plan.status?;
        history.wrote(status.clone(), 1);
        Some((status.utilization_percent?, status.queue_depth?))
    };
    for (why, second, active, waiting, want) in [
        ("the first status", 0, 10, 0, Some((10, 0))),
        ("load alone waits", 14, 50, 2, None),
        ("until its interval has passed", 15, 50, 2, Some((50, 2))),
        ("nothing changed", 40, 50, 2, None),
        ("a rare change is written at once", 41, 51, 2, Some((51, 2))),
        ("and the next one waits", 42, 52, 2, None),
    ] {
        assert_eq!(written(second, active, waiting), want, "{why}");
    }
    let seen = observed(&spec, 0, vec![]);
    let changed = plan(&d, &seen, &mut history, at(43), IMAGE).status.unwrap();
    assert_eq!(
        changed.utilization_percent, None,
        "another change takes the load along at once"
    );
}

#[test]
fn looks_again_as_soon_as_something_may_have_changed() {
    let fixed = |n: i32| json!({ "model": { "source": { "demo": {} } }, "replicas": n });
    let ready: k8s_openapi::api::core::v1::Pod = serde_json::from_value(json!({
        "metadata": { "name": "p" }, "status": { "conditions": [{ "type": "Ready", "status": "True" }] } }))
    .unwrap();
    for (why, spec, n, pods, seconds) in [
        ("autoscaled", autoscaled(), 1, vec![ready.clone()], 2),
        (
            "not ready: events come without a watch",
            fixed(1),
            1,
            vec![],
            5,
        ),
        ("the load of fixed replicas", fixed(1), 1, vec![ready], 15),
        ("nothing runs", fixed(0), 0, vec![], 300),
    ] {
        let mut seen = observed(&spec, n, vec![]);
        seen.pods = pods.into_iter().map(Arc::new).collect();
        let plan = plan(
            &deployment(spec),
            &seen,
            &mut History::default(),
            at(0),
            IMAGE,
        );
        assert_eq!(plan.recheck_after, Duration::from_secs(seconds), "{why}");
    }
}

#[test]
fn a_spec_that_cannot_be_read_is_told_once_and_nothing_is_touched() {
    let stored: crate::stored::Stored = serde_json::from_value(json!({
        "metadata": { "name": "llama", "namespace": "models", "uid": "0c3e", "generation": 2 },
        "spec": { "model": { "source": { "huggingFace": {} } }, "replicas": 1 },
    }))
    .unwrap();
    let unreadable = stored.0.unwrap_err();
    let spec = json!({ "model": { "source": { "demo": {} } }, "replicas": 1 });
    let seen = observed(&spec, 1, vec![load(30, 1)]);
    let mut history = History::default();
    let first = plan_unreadable(&unreadable, &seen, &mut history, at(0));
    assert!(first.children.is_none());
    assert_eq!(first.events.len(), 1);
    assert_eq!(first.events[0].severity, Severity::Warning);
    assert_eq!(first.events[0].reason, "InvalidSpec");
    assert!(first.events[0].message.contains("spec.model.source"));
    let status = first.status.unwrap();
    let accepted = &status.conditions[0];
    assert_eq!(
        (accepted.type_.as_str(), accepted.status.as_str()),
        ("Accepted", "False")
    );
    assert_eq!(accepted.reason, "InvalidSpec");
    assert_eq!(accepted.message, first.events[0].message);
    assert_eq!(status.observed_generation, Some(2));
    assert_eq!(
        status.utilization_percent,
        Some(30),
        "what runs is still looked at"
    );

    history.wrote(status.clone(), 1);
    let again = plan_unreadable(&unreadable, &seen, &mut history, at(15));
    assert_eq!((again.events, again.status), (vec![], None));
    // The operator starts anew: the status that the API server holds tells it already.
    let told = Unreadable {
        status: Some(status),
        ..unreadable
    };
    let restarted = plan_unreadable(&told, &seen, &mut History::default(), at(0));
    assert_eq!((restarted.events, restarted.status), (vec![], None));
}

#[test]
fn a_refusal_is_told_once_and_again_when_it_changes() {
    let spec = |field: &str| {
        let mut spec = autoscaled();
        spec["podTemplate"] = json!({ "spec": { field: "x" } });
        deployment(spec)
    };
    let seen = observed(&autoscaled(), 1, vec![load(0, 0)]);
    let mut history = History::default();
    for (why, field, want) in [
        ("told", "nodeSelektor", 1),
        ("known", "nodeSelektor", 0),
        ("another mistake", "restartPolicy", 1),
    ] {
        let plan = plan(&spec(field), &seen, &mut history, at(0), IMAGE);
        assert_eq!(plan.events.len(), want, "{why}");
        if let Some(status) = plan.status {
            history.wrote(status, 1);
        }
    }
}

#[test]
fn a_status_is_written_again_where_another_wrote_over_it() {
    let spec = json!({ "model": { "source": { "demo": {} } }, "replicas": 1 });
    let seen = observed(&spec, 1, vec![]);
    let mut history = History::default();
    let d = deployment(spec);
    let ours = plan(&d, &seen, &mut history, at(0), IMAGE).status.unwrap();
    history.wrote(ours.clone(), 9);
    let other = LLMDeploymentStatus {
        replicas: 7,
        ..ours.clone()
    };
    for (why, version, held, again) in [
        ("the watch is behind", "8", None, None),
        ("it has brought ours", "9", Some(&ours), None),
        ("another's", "10", Some(&other), Some(&ours)),
        ("taken away", "10", None, Some(&ours)),
    ] {
        let mut d = d.clone();
        d.metadata.resource_version = Some(version.into());
        d.status = held.cloned();
        let plan = plan(&d, &seen, &mut history.clone(), at(30), IMAGE);
        assert_eq!(plan.status.as_ref(), again, "{why}");
    }
}
