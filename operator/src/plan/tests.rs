//! Whole plans: what is told, what is carried out, and what the history changes about it.

use std::sync::Arc;

use kvasir_crds::LoadReport;
use kvasir_crds::load_report::{BlockCounts, QueueCounts};
use serde_json::{Value, json};

use super::*;
use crate::observed::ReplicaLoad;

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
        children: ObservedChildren {
            deployment: Some(Arc::new(made.deployment)),
            ..ObservedChildren::default()
        },
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

/// Plans, and carries it out: the history and the status are those of the plan from here on.
fn carry_out(d: &mut LLMDeployment, seen: &Observed, history: &mut History, now: Now) -> Plan {
    let plan = plan(&Stored(Ok(d.clone())), seen, history, now, IMAGE);
    *history = plan.history.clone();
    if let Some(status) = &plan.status {
        d.status = Some(status.clone());
    }
    plan
}

/// Plans with nothing remembered.
fn plan_anew(d: &LLMDeployment, seen: &Observed) -> Plan {
    carry_out(&mut d.clone(), seen, &mut History::default(), at(0))
}

fn replicas(plan: &Plan) -> Option<i32> {
    plan.children.as_ref()?.deployment.spec.as_ref()?.replicas
}

#[test]
fn a_change_of_replicas_is_told_once_with_its_numbers() {
    let mut d = deployment(autoscaled());
    let mut history = History::default();
    let before = observed(&autoscaled(), 1, vec![load(100, 11)]);
    let scaled = carry_out(&mut d, &before, &mut history, at(0));
    assert_eq!(replicas(&scaled), Some(3));
    assert_eq!(scaled.events.len(), 1);
    let event = &scaled.events[0];
    assert_eq!(event.reason, "ScaledUp");
    for words in [
        "from 1 to 3",
        "100 blocks active",
        "in 1 reporting replica (",
        "11 requests waiting",
    ] {
        assert!(event.message.contains(words), "{}", event.message);
    }
    let last = scaled.status.unwrap().last_scaling.unwrap();
    assert_eq!((last.from, last.to, &last.reason), (1, 3, &event.message));

    let after = observed(&autoscaled(), 3, vec![load(100, 11)]);
    let held = carry_out(&mut d, &after, &mut history, at(2));
    assert_eq!((replicas(&held), held.events), (Some(3), vec![]));
}

#[test]
fn what_is_not_carried_out_is_not_told() {
    let mut spec = autoscaled();
    let before = observed(&spec, 1, vec![load(100, 11)]);
    spec["podTemplate"] = json!({ "spec": { "nodeSelektor": {} , "restartPolicy": "Never" } });
    let plan = plan_anew(&deployment(spec), &before);
    assert_eq!(replicas(&plan), None);
    let mut told = plan.events.iter().map(|event| event.reason);
    assert!(!told.any(|reason| reason.starts_with("Scaled")));
    assert_eq!(plan.status.unwrap().last_scaling, None);
}

#[test]
fn autoscaling_switched_on_again_waits_a_whole_window() {
    let idle = || observed(&autoscaled(), 3, vec![load(0, 0); 3]);
    let mut d = deployment(autoscaled());
    let mut history = History::default();
    for second in 0..=299 {
        carry_out(&mut d, &idle(), &mut history, at(second));
    }
    let mut interrupted = history.clone();
    let down = carry_out(&mut d, &idle(), &mut history, at(300));
    assert_eq!(replicas(&down), Some(1), "the window has passed");

    let fixed = json!({ "model": { "source": { "demo": {} } }, "replicas": 3 });
    carry_out(&mut deployment(fixed), &idle(), &mut interrupted, at(299));
    let held = carry_out(&mut d, &idle(), &mut interrupted, at(300));
    assert_eq!(
        replicas(&held),
        Some(3),
        "what was known before counts no more"
    );
}

#[test]
fn load_is_written_where_replicas_are_fixed_and_seldom() {
    let spec = json!({ "model": { "source": { "demo": {} } }, "replicas": 1 });
    let mut d = deployment(spec.clone());
    let mut history = History::default();
    for (why, second, active, waiting, want) in [
        ("the first status", 0, 10, 0, Some((10, 0))),
        ("load alone waits", 14, 50, 2, None),
        ("until its interval has passed", 15, 50, 2, Some((50, 2))),
        ("nothing changed", 40, 50, 2, None),
        ("a rare change is written at once", 41, 51, 2, Some((51, 2))),
        ("and the next one waits", 42, 52, 2, None),
    ] {
        let seen = observed(&spec, 1, vec![load(active, waiting)]);
        let written = carry_out(&mut d, &seen, &mut history, at(second)).status;
        let figures = written.map(|s| (s.utilization_percent.unwrap(), s.queue_depth.unwrap()));
        assert_eq!(figures, want, "{why}");
    }
    let seen = observed(&spec, 0, vec![]);
    let changed = carry_out(&mut d, &seen, &mut history, at(43)).status;
    assert_eq!(
        changed.unwrap().utilization_percent,
        None,
        "another change takes the load along at once"
    );
}

#[test]
fn a_status_that_could_not_be_written_is_planned_again() {
    let spec = json!({ "model": { "source": { "demo": {} } }, "replicas": 1 });
    let mut d = deployment(spec.clone());
    let mut history = History::default();
    carry_out(
        &mut d,
        &observed(&spec, 1, vec![load(10, 0)]),
        &mut history,
        at(0),
    );
    let seen = observed(&spec, 1, vec![load(50, 0)]);
    for second in [20, 22] {
        // Planned, and not carried out.
        let plan = plan(&Stored(Ok(d.clone())), &seen, &history, at(second), IMAGE);
        let status = plan
            .status
            .expect("the interval has passed, and nothing was written");
        assert_eq!(status.utilization_percent, Some(50));
        assert_ne!(plan.history, history);
    }
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
        let plan = plan_anew(&deployment(spec), &seen);
        assert_eq!(plan.recheck_after, Duration::from_secs(seconds), "{why}");
    }
}

#[test]
fn a_spec_that_cannot_be_read_is_told_once_and_nothing_is_touched() {
    let mut object = json!({
        "metadata": { "name": "llama", "namespace": "models", "uid": "0c3e", "generation": 2 },
        "spec": { "model": { "source": { "huggingFace": {} } }, "replicas": 1 },
    });
    let stored = |object: &Value| -> Stored { serde_json::from_value(object.clone()).unwrap() };
    let spec = json!({ "model": { "source": { "demo": {} } }, "replicas": 1 });
    let seen = observed(&spec, 1, vec![load(30, 1)]);
    let first = plan(&stored(&object), &seen, &History::default(), at(0), IMAGE);
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

    object["status"] = serde_json::to_value(&status).unwrap();
    for (why, history, second) in [
        ("known", first.history, 15),
        // The status that the API server holds tells it already.
        ("the operator starts anew", History::default(), 0),
    ] {
        let again = plan(&stored(&object), &seen, &history, at(second), IMAGE);
        assert_eq!((again.events, again.status), (vec![], None), "{why}");
    }
}

#[test]
fn a_refusal_is_told_once_and_again_when_it_changes() {
    let mut d = deployment(autoscaled());
    let seen = observed(&autoscaled(), 1, vec![load(0, 0)]);
    let mut history = History::default();
    for (why, field, want) in [
        ("told", "nodeSelektor", 1),
        ("known", "nodeSelektor", 0),
        ("another mistake", "restartPolicy", 1),
    ] {
        d.spec.pod_template = Some(json!({ "spec": { field: "x" } }));
        let plan = carry_out(&mut d, &seen, &mut history, at(0));
        assert_eq!(plan.events.len(), want, "{why}");
    }
}

#[test]
fn a_status_is_written_again_where_another_wrote_over_it() {
    let spec = json!({ "model": { "source": { "demo": {} } }, "replicas": 1 });
    let seen = observed(&spec, 1, vec![]);
    let d = deployment(spec);
    let ours = plan_anew(&d, &seen).status.unwrap();
    let other = LLMDeploymentStatus {
        replicas: 7,
        ..ours.clone()
    };
    for (why, held, again) in [
        ("ours", Some(&ours), None),
        ("another's", Some(&other), Some(&ours)),
        ("taken away", None, Some(&ours)),
    ] {
        let mut d = d.clone();
        d.status = held.cloned();
        let plan = plan_anew(&d, &seen);
        assert_eq!(plan.status.as_ref(), again, "{why}");
    }
}

#[test]
fn an_object_of_a_childs_name_that_is_not_ours_is_refused_whichever_kind_it_is() {
    fn foreign<K: serde::de::DeserializeOwned>(spec: Value) -> Option<Arc<K>> {
        let object =
            json!({ "metadata": { "name": "llama", "namespace": "models" }, "spec": spec });
        Some(Arc::new(serde_json::from_value(object).unwrap()))
    }
    let none = ObservedChildren::default;
    let template = json!({ "selector": {}, "template": {} });
    for (kind, children) in [
        (
            "Deployment",
            ObservedChildren {
                deployment: foreign(template),
                ..none()
            },
        ),
        (
            "Service",
            ObservedChildren {
                service: foreign(json!({})),
                ..none()
            },
        ),
        (
            "PodDisruptionBudget",
            ObservedChildren {
                budget: foreign(json!({})),
                ..none()
            },
        ),
        (
            "ServiceAccount",
            ObservedChildren {
                account: foreign(Value::Null),
                ..none()
            },
        ),
    ] {
        let seen = Observed {
            children,
            ..Observed::default()
        };
        let plan = plan_anew(&deployment(autoscaled()), &seen);
        assert!(plan.children.is_none(), "{kind}");
        assert_eq!(plan.events[0].reason, "NameConflict", "{kind}");
        assert!(
            plan.events[0]
                .message
                .contains(&format!("the {kind} llama")),
            "{kind}"
        );
    }
}
