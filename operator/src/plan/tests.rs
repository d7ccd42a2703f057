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

/// A plan that was carried out, and what is told of it.
struct Whole {
    children: Option<Children>,
    events: Vec<EventRecord>,
    status: Option<LLMDeploymentStatus>,
    recheck_after: Duration,
    history: History,
}

/// How an API server that refuses nothing takes a plan.
fn taken() -> Outcome {
    Outcome {
        is_scaled: true,
        ..Outcome::default()
    }
}

/// Plans, and tells what comes of it.
fn told(
    stored: &Stored,
    seen: &Observed,
    history: &History,
    now: Now,
    outcome: &Outcome,
) -> (Option<Children>, Report) {
    let plan = plan(stored, seen, history, now, IMAGE);
    let children = plan.children.clone();
    (children, report(stored, seen, plan, outcome, now))
}

fn whole(stored: &Stored, seen: &Observed, history: &History, now: Now) -> Whole {
    let (children, report) = told(stored, seen, history, now, &taken());
    Whole {
        children,
        events: report.events.clone(),
        status: report.status.clone(),
        recheck_after: report.recheck_after,
        history: report.remember(true, vec![]),
    }
}

/// Plans, and carries it out: the history and the status are those of the plan from here on.
fn carry_out(d: &mut LLMDeployment, seen: &Observed, history: &mut History, now: Now) -> Whole {
    let whole = whole(&Stored(Ok(d.clone())), seen, history, now);
    *history = whole.history.clone();
    if let Some(status) = &whole.status {
        d.status = Some(status.clone());
    }
    whole
}

/// Plans with nothing remembered.
fn plan_anew(d: &LLMDeployment, seen: &Observed) -> Whole {
    carry_out(&mut d.clone(), seen, &mut History::default(), at(0))
}

fn replicas(plan: &Whole) -> Option<i32> {
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
    let stored = Stored(Ok(deployment(autoscaled())));
    let before = observed(&autoscaled(), 1, vec![load(100, 11)]);
    let (_, report) = told(
        &stored,
        &before,
        &History::default(),
        at(0),
        &Outcome::default(),
    );
    assert_eq!(report.events, []);
    assert_eq!(report.status.unwrap().last_scaling, None);
}

#[test]
fn a_mistake_in_the_spec_leaves_what_runs_and_scales_it() {
    let mut spec = autoscaled();
    let before = observed(&spec, 1, vec![load(100, 11)]);
    spec["podTemplate"] = json!({ "spec": { "nodeSelektor": {} , "restartPolicy": "Never" } });
    let stored = Stored(Ok(deployment(spec)));
    let plan = plan(&stored, &before, &History::default(), at(0), IMAGE);
    assert_eq!(plan.children, None);
    let fallback = plan.fallback.clone().unwrap().spec.unwrap();
    let running = before.children.deployment.as_ref().unwrap();
    assert_eq!(fallback.template, running.spec.as_ref().unwrap().template);
    assert_eq!(fallback.replicas, Some(3));
    let report = report(&stored, &before, plan, &taken(), at(0));
    let reasons: Vec<_> = report.events.iter().map(|event| event.reason).collect();
    assert_eq!(reasons, ["ScaledUp", "InvalidPodTemplate"]);
    assert_eq!(report.recheck_after, AUTOSCALE_INTERVAL, "and goes on to");
    assert_eq!(report.status.unwrap().last_scaling.unwrap().to, 3);
}

#[test]
fn a_refusal_by_the_api_server_is_told_once_and_stalls() {
    let mut d = deployment(json!({ "model": { "source": { "demo": {} } }, "replicas": 1 }));
    let sentence = "cannot apply the Deployment: resources.limits: Required value";
    let outcome = Outcome {
        is_scaled: false,
        refused: Some(Refusal {
            reason: Reason::ChildRefused,
            sentence: sentence.into(),
        }),
        failing: None,
    };
    let seen = Observed::default();
    let (mut history, mut n_events) = (History::default(), 0);
    for second in [0, 15, 30] {
        let stored = Stored(Ok(d.clone()));
        let (_, report) = told(&stored, &seen, &history, at(second), &outcome);
        n_events += report.events.len();
        assert_eq!(report.refused, Some(Reason::ChildRefused));
        if let Some(event) = report.events.first() {
            assert_eq!(
                (event.reason, event.message.as_str()),
                ("ChildRefused", sentence)
            );
        }
        d.status = report.status.clone().or(d.status);
        history = report.remember(true, vec![]);
    }
    assert_eq!(n_events, 1);
    let status = d.status.unwrap();
    for (type_, want) in [
        ("Accepted", "False"),
        ("Stalled", "True"),
        ("Ready", "False"),
    ] {
        let condition = status.conditions.iter().find(|c| c.type_ == type_).unwrap();
        assert_eq!(
            (condition.status.as_str(), condition.message.as_str()),
            (want, sentence)
        );
    }
}

#[test]
fn what_could_not_be_told_is_told_later() {
    let mut d = deployment(autoscaled());
    let before = observed(&autoscaled(), 1, vec![load(100, 11)]);
    let stored = Stored(Ok(d.clone()));
    let (_, first) = told(&stored, &before, &History::default(), at(0), &taken());
    let [scaled] = &first.events[..] else {
        unreachable!("one event: {:?}", first.events)
    };
    let scaled = scaled.clone();
    // The children were written, and neither the event nor the status.
    let mut history = first.remember(false, vec![scaled.clone()]);
    let after = observed(&autoscaled(), 3, vec![load(100, 11)]);
    let second = carry_out(&mut d, &after, &mut history, at(2));
    assert_eq!(second.events, [scaled]);
    assert_eq!(second.status.unwrap().last_scaling.unwrap().to, 3);
    let third = carry_out(&mut d, &after, &mut history, at(4));
    assert_eq!((third.events, third.status), (vec![], None));
}

#[test]
fn a_child_that_could_not_be_written_for_long_is_a_condition() {
    let spec = json!({ "model": { "source": { "demo": {} } }, "replicas": 1 });
    let seen = observed(&spec, 1, vec![]);
    let stored = Stored(Ok(deployment(spec)));
    let failing = Outcome {
        failing: Some("cannot apply the Service: too many requests".into()),
        ..Outcome::default()
    };
    for (outcome, want) in [(failing, "ApplyRetried"), (taken(), "Creating")] {
        let (_, report) = told(&stored, &seen, &History::default(), at(0), &outcome);
        let conditions = report.status.unwrap().conditions;
        let of = |type_: &str| conditions.iter().find(|c| c.type_ == type_).cloned();
        assert_eq!(of("Reconciling").unwrap().reason, want);
        assert_eq!(of("Progressing").unwrap().reason, want);
        assert!(of("Stalled").is_none(), "it may pass");
        assert_eq!(of("Accepted").unwrap().status, "True");
    }
}

#[test]
fn pods_that_ended_are_told_once() {
    let spec = json!({ "model": { "source": { "demo": {} } }, "replicas": 1 });
    let mut d = deployment(spec.clone());
    let mut history = History::default();
    let ended = |n: usize| -> Vec<_> {
        let pod = |n| {
            json!({ "metadata": { "name": format!("m-{n}") },
            "status": { "phase": "Failed", "reason": "UnexpectedAdmissionError", "message": "no healthy GPU" } })
        };
        (0..n)
            .map(|n| Arc::new(serde_json::from_value(pod(n)).unwrap()))
            .collect()
    };
    let mut messages = Vec::new();
    let mut n_written = 0;
    for (second, n) in [(0, 1), (5, 40), (10, 3000), (15, 0), (20, 1)] {
        let mut seen = observed(&spec, 1, vec![]);
        seen.pods = ended(n);
        let whole = carry_out(&mut d, &seen, &mut history, at(second));
        messages.extend(whole.events.into_iter().map(|event| event.message));
        n_written += usize::from(whole.status.is_some());
        assert_eq!(
            d.status.as_ref().unwrap().replicas,
            0,
            "none of them is a replica"
        );
    }
    let told = "UnexpectedAdmissionError: m-0: no healthy GPU";
    assert_eq!(messages, [told, told], "and again after none was left");
    assert_eq!(n_written, 3, "as they come and go, and not for each");
}

#[test]
fn autoscaling_switched_on_again_waits_a_whole_window() {
    let idle = || observed(&autoscaled(), 3, vec![load(0, 0); 3]);
    let mut d = deployment(autoscaled());
    let mut history = History::default();
    for second in 0..=59 {
        carry_out(&mut d, &idle(), &mut history, at(second));
    }
    let mut interrupted = history.clone();
    let down = carry_out(&mut d, &idle(), &mut history, at(60));
    assert_eq!(replicas(&down), Some(1), "the window has passed");

    let fixed = json!({ "model": { "source": { "demo": {} } }, "replicas": 3 });
    carry_out(&mut deployment(fixed), &idle(), &mut interrupted, at(59));
    let held = carry_out(&mut d, &idle(), &mut interrupted, at(60));
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
        let (_, report) = told(
            &Stored(Ok(d.clone())),
            &seen,
            &history,
            at(second),
            &taken(),
        );
        let status = report.status.clone();
        let status = status.expect("the interval has passed, and nothing was written");
        assert_eq!(status.utilization_percent, Some(50));
        assert_eq!(report.clone().remember(false, vec![]), history);
        assert_ne!(report.remember(true, vec![]), history);
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
    let first = whole(&stored(&object), &seen, &History::default(), at(0));
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
        let again = whole(&stored(&object), &seen, &history, at(second));
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

#[test]
fn an_observer_tells_what_it_would_do_and_does_nothing() {
    let mut spec = autoscaled();
    spec["replicas"] = json!(2);
    spec["autoscaling"]["mode"] = json!("Observe");
    let mut d = deployment(spec.clone());
    let mut history = History::default();
    let mut events = Vec::new();
    for (second, waiting) in [(0, 11), (2, 11), (4, 15), (6, 15)] {
        let seen = observed(&spec, 2, vec![load(0, waiting)]);
        let whole = carry_out(&mut d, &seen, &mut history, at(second));
        assert_eq!(replicas(&whole), Some(2), "spec.replicas decides");
        assert_eq!(whole.recheck_after, AUTOSCALE_INTERVAL);
        events.extend(whole.events);
    }
    let reasons: Vec<_> = events.iter().map(|event| event.reason).collect();
    assert_eq!(
        reasons,
        ["WouldScale", "WouldScale"],
        "each change of mind once"
    );
    assert!(
        events[0].message.contains("from 2 to 3"),
        "{}",
        events[0].message
    );
    assert!(
        events[1].message.contains("from 2 to 4"),
        "{}",
        events[1].message
    );
    let status = d.status.unwrap();
    assert_eq!(status.last_scaling, None);
    let of = |type_: &str| status.conditions.iter().find(|c| c.type_ == type_).unwrap();
    assert_eq!(of("ScalingActive").reason, "Observing");
    let told = status.autoscaling.as_ref().unwrap();
    assert_eq!(told.desired_replicas, 3, "figures wait for their interval");
    assert_eq!(told.binding_constraint.as_deref(), Some("QueueDepth"));
}

#[test]
fn the_status_tells_what_binds_what_comes_next_and_what_was_learned() {
    let mut d = deployment(autoscaled());
    let mut history = History::default();
    let busy = observed(
        &autoscaled(),
        3,
        vec![load(90, 0), load(90, 0), ReplicaLoad::Silent],
    );
    carry_out(&mut d, &busy, &mut history, at(0));
    let told = d.status.as_ref().unwrap().autoscaling.clone().unwrap();
    assert_eq!(
        (
            told.desired_replicas,
            told.demand_replicas,
            told.silent_replicas
        ),
        (3, Some(3), 1)
    );
    assert_eq!(told.binding_constraint.as_deref(), Some("Blocks"));
    assert_eq!((told.unmet_replicas, told.next_scaling), (1, None));

    let idle = observed(&autoscaled(), 3, vec![load(0, 0); 3]);
    let later = Now {
        monotonic: Duration::from_secs(6),
        wall: Timestamp::from_second(1_000).unwrap(),
    };
    carry_out(&mut d, &idle, &mut history, later);
    let told = d.status.as_ref().unwrap().autoscaling.clone().unwrap();
    assert_eq!(
        told.next_scaling, None,
        "figures alone wait for their interval"
    );
    let later = Now {
        monotonic: Duration::from_secs(16),
        wall: Timestamp::from_second(1_010).unwrap(),
    };
    carry_out(&mut d, &idle, &mut history, later);
    let told = d.status.as_ref().unwrap().autoscaling.clone().unwrap();
    let next = told.next_scaling.unwrap();
    assert_eq!(next.replicas, 1);
    // The window since the last look at which three were needed, 10 seconds before the first of these.
    let policy = d.spec.autoscaling.as_ref().unwrap();
    let window = i64::from(policy.scale_down_stabilization_seconds);
    assert_eq!(next.not_before.0.as_second(), window + 1_000 - 6);
}

/// A pod of the deployment, created at the epoch.
fn pod(uid: &str, ready_s: Option<i64>) -> Arc<k8s_openapi::api::core::v1::Pod> {
    let at = ready_s.map(|s| Timestamp::from_second(s).unwrap().to_string());
    let status = if ready_s.is_some() { "True" } else { "False" };
    Arc::new(
        serde_json::from_value(json!({
            "metadata": { "name": uid, "uid": uid, "creationTimestamp": "1970-01-01T00:00:00Z" },
            "status": {
                "conditions": [{ "type": "Ready", "status": status, "lastTransitionTime": at }],
                "containerStatuses": [{ "name": "server", "started": ready_s.is_some(), "image": "i",
                    "imageID": "", "ready": ready_s.is_some(), "restartCount": 0 }] }
        }))
        .unwrap(),
    )
}

#[test]
fn starts_are_measured_told_and_known_after_a_restart() {
    let mut d = deployment(autoscaled());
    let mut history = History::default();
    let with_pods = |pods| Observed {
        pods,
        ..observed(&autoscaled(), 2, vec![load(0, 0)])
    };
    let at_wall = |second: i64| Now {
        monotonic: Duration::from_secs(second as u64),
        wall: Timestamp::from_second(second).unwrap(),
    };
    let starts = with_pods(vec![pod("a", None), pod("b", None)]);
    carry_out(&mut d, &starts, &mut history, at_wall(2));
    let serves = with_pods(vec![pod("a", Some(40)), pod("b", None)]);
    carry_out(&mut d, &serves, &mut history, at_wall(60));
    let learned = |d: &LLMDeployment| d.status.as_ref()?.autoscaling.as_ref()?.learned;
    assert_eq!(learned(&d).unwrap().start_seconds, Some(40));

    // The other one is late: three times 40 seconds have passed. The operator has started anew.
    let mut anew = History::default();
    let late = carry_out(&mut d, &serves, &mut anew, at_wall(121));
    let [event] = &late.events[..] else {
        unreachable!("one event: {:?}", late.events)
    };
    assert_eq!(
        (event.reason, event.severity),
        ("StartOverdue", Severity::Warning)
    );
    let status = d.status.as_ref().unwrap();
    let condition = status
        .conditions
        .iter()
        .find(|c| c.type_ == "CapacityUnavailable");
    assert_eq!(condition.unwrap().reason, "StartOverdue");
    assert!(
        condition.unwrap().message.contains("120 s"),
        "{condition:?}"
    );
    let again = carry_out(&mut d, &serves, &mut anew, at_wall(123));
    assert_eq!(again.events, [], "told once");
}

#[test]
fn what_was_learned_outlives_a_spec_that_cannot_be_read() {
    let mut spec = autoscaled();
    let mut d = deployment(spec.clone());
    let seen = observed(&spec, 1, vec![load(0, 0)]);
    let first = plan_anew(&d, &seen).status.unwrap();
    d.status = Some(first.clone());
    assert!(first.autoscaling.is_some());
    spec["model"]["source"] = json!({ "novel": {} });
    let object = json!({
        "metadata": { "name": "llama", "namespace": "models", "uid": "0c3e", "generation": 2 },
        "spec": spec, "status": first,
    });
    let stored: Stored = serde_json::from_value(object).unwrap();
    let kept = whole(&stored, &seen, &History::default(), at(0))
        .status
        .unwrap();
    assert_eq!(kept.autoscaling, first.autoscaling);
    let fixed = json!({ "model": { "source": { "demo": {} } }, "replicas": 1 });
    d.spec = deployment(fixed).spec;
    let gone = plan_anew(&d, &seen).status.unwrap();
    assert_eq!(gone.autoscaling, None, "nobody autoscales");
}

#[test]
fn costs_are_told_where_there_are_to_be_fewer_replicas_and_only_there() {
    let pod = |name: &str| {
        let pod = json!({ "metadata": { "name": name }, "status": { "podIP": "10.0.0.1", "containerStatuses": [
            { "name": "server", "ready": true, "started": true, "image": "i", "imageID": "", "restartCount": 0 }] } });
        Arc::new(serde_json::from_value(pod).unwrap())
    };
    for (why, wanted, want) in [
        ("fewer", 1, vec![("a", 5), ("b", 0)]),
        ("as many", 2, vec![]),
        ("more", 3, vec![]),
    ] {
        let spec =
            |replicas: i32| json!({ "model": { "source": { "demo": {} } }, "replicas": replicas });
        let mut seen = observed(&spec(2), 2, vec![load(5, 0), load(0, 0)]);
        seen.pods = vec![pod("a"), pod("b")];
        let stored = Stored(Ok(deployment(spec(wanted))));
        let plan = plan(&stored, &seen, &History::default(), at(0), IMAGE);
        let costs: Vec<_> = plan
            .costs
            .iter()
            .map(|it| (it.pod.as_str(), it.tokens))
            .collect();
        assert_eq!(costs, want, "{why}");
    }
}

#[test]
fn each_reason_why_a_replica_does_not_serve_is_one_event() {
    let crashed = |name: &str| {
        let pod = json!({ "metadata": { "name": name }, "status": { "phase": "Running", "containerStatuses": [
            { "name": "server", "ready": false, "image": "i", "imageID": "", "restartCount": 1,
              "state": { "waiting": { "reason": "CrashLoopBackOff" } },
              "lastState": { "terminated": { "exitCode": 2, "message": "the model needs 9.0 GiB" } } }] } });
        Arc::new(serde_json::from_value(pod).unwrap())
    };
    let spec = json!({ "model": { "source": { "demo": {} } }, "replicas": 2 });
    let mut d = deployment(spec.clone());
    let mut seen = observed(&spec, 2, vec![]);
    seen.pods = vec![crashed("a"), crashed("b")];
    let mut history = History::default();
    let told = |whole: Whole| -> Vec<(&'static str, String)> {
        whole
            .events
            .into_iter()
            .map(|event| (event.reason, event.message))
            .collect()
    };
    let first = told(carry_out(&mut d, &seen, &mut history, at(0)));
    assert_eq!(first.len(), 1, "{first:?}");
    assert_eq!(first[0].0, "Crashed");
    assert!(
        first[0].1.starts_with("a: ") && first[0].1.ends_with("the model needs 9.0 GiB"),
        "{first:?}"
    );
    assert_eq!(told(carry_out(&mut d, &seen, &mut history, at(60))), []);
}
