//! The conditions that follow from the spec, the rollout and the pods.

use std::sync::Arc;

use k8s_openapi::api::core::v1::Pod;
use kvasir_crds::LLMDeployment;
use serde_json::{Value, json};

use super::not_ready::tests::{container, pod};
use super::*;

fn deployment(spec: Value) -> LLMDeployment {
    serde_json::from_value(json!({
        "apiVersion": "kvasir.dev/v1alpha1", "kind": "LLMDeployment",
        "metadata": { "name": "m", "namespace": "n", "generation": 3 },
        "spec": spec
    }))
    .unwrap()
}

fn reasons(status: &LLMDeploymentStatus) -> Vec<String> {
    status
        .conditions
        .iter()
        .map(|c| format!("{}={} {}", c.type_, c.status, c.reason))
        .collect()
}

/// A status of this child and what is observed, of a deployment that was accepted.
fn input<'a>(
    stored: &'a Stored,
    observed: &'a Observed,
    child: Option<&'a Deployment>,
) -> StatusInput<'a> {
    StatusInput {
        stored,
        observed,
        child,
        refused: None,
        failing: None,
        decision: None,
        learned: None,
        scaling: None,
        load: None,
        now: Timestamp::UNIX_EPOCH,
    }
}

#[test]
fn a_pod_that_could_not_be_made_is_told_beside_those_that_were() {
    let d = deployment(json!({ "model": { "source": { "demo": {} } }, "replicas": 2 }));
    let mut child = super::super::children::children(&d, 2, "i", None)
        .unwrap()
        .deployment;
    child.status = serde_json::from_value(json!({ "conditions": [
        { "type": "Progressing", "status": "True" },
        { "type": "ReplicaFailure", "status": "True", "reason": "FailedCreate",
          "message": "pods \"m-1\" is forbidden: exceeded quota: gpus" }] }))
    .unwrap();
    let observed = Observed {
        pods: vec![pod(
            json!({ "conditions": [{ "type": "Ready", "status": "True" }] }),
        )],
        ..Observed::default()
    };
    let stored = Stored(Ok(d));
    let status = status(&input(&stored, &observed, Some(&child)));
    assert_eq!(status.not_ready[0].reason, "PodRefused");
    let reasons = reasons(&status);
    assert_eq!(reasons[1], "Available=True ReplicaServing");
    assert_eq!(
        reasons[3..],
        [
            "Ready=True RolledOut",
            "ScalingActive=False FixedReplicas",
            "CapacityUnavailable=True PodRefused"
        ]
    );
    assert_eq!(status.conditions[3].message, "1 of 2 replicas is serving");
    assert!(status.conditions[5].message.contains("exceeded quota"));
}

#[test]
fn conditions_follow_the_rollout() {
    let d = deployment(json!({ "model": { "source": { "demo": {} } }, "replicas": 1 }));
    let child = |available: i32| -> Deployment {
        let mut child = super::super::children::children(&d, 1, "i", None)
            .unwrap()
            .deployment;
        child.metadata.generation = Some(1);
        child.status = serde_json::from_value(
            json!({ "observedGeneration": 1, "replicas": 1, "updatedReplicas": 1,
            "availableReplicas": available }),
        )
        .unwrap();
        child
    };
    let of_pods = |pods: &[Arc<Pod>]| Observed {
        pods: pods.to_vec(),
        ..Observed::default()
    };
    let serving = of_pods(&[pod(
        json!({ "phase": "Running", "conditions": [{ "type": "Ready", "status": "True" }] }),
    )]);
    let starting = of_pods(&[pod(container(
        json!({ "started": false, "state": { "running": {} } }),
    ))]);
    let none = of_pods(&[]);
    let (begun, done) = (child(0), child(1));
    let stored = Stored(Ok(d.clone()));
    let told = status(&input(&stored, &serving, Some(&done)));
    assert_eq!(
        reasons(&told),
        [
            "Accepted=True SpecAccepted",
            "Available=True ReplicaServing",
            "Progressing=False RolledOut",
            "Ready=True AllReplicasServing",
            "ScalingActive=False FixedReplicas"
        ]
    );
    assert_eq!(told.conditions[3].message, "1 replica is serving");
    let mut changed = d.clone();
    changed.spec.drain_seconds = 7;
    let stale = Stored(Ok(changed));
    let told = status(&input(&stale, &serving, Some(&done)));
    assert_eq!(
        reasons(&told)[2..4],
        ["Progressing=True RollingOut", "Ready=False RollingOut"],
        "the Deployment is still of the generation before"
    );
    assert_eq!(reasons(&told)[5], "Reconciling=True RollingOut");
    assert_eq!(told.conditions[3].message, "1 of 1 replica is serving");
    let loading = status(&input(&stored, &starting, Some(&begun)));
    assert_eq!(reasons(&loading)[3], "Ready=False Starting");
    let nothing = input(&stored, &none, None);
    assert_eq!(reasons(&status(&nothing))[3], "Ready=False Creating");
    for reason in [
        Reason::NameConflict,
        Reason::InvalidPodTemplate,
        Reason::InvalidSpec,
    ] {
        let refusal = Refusal {
            reason,
            sentence: "spec.podTemplate.x".into(),
        };
        let refused = StatusInput {
            refused: Some(&refusal),
            ..nothing
        };
        let want = |condition: &str| format!("{condition} {reason}");
        let kinds = [
            "Accepted=False",
            "Available=False",
            "Progressing=False",
            "Ready=False",
            "ScalingActive=False",
            "Stalled=True",
        ];
        assert_eq!(reasons(&status(&refused)), kinds.map(want));
    }
}

/// A child Deployment of `d` with this status.
fn child_of(d: &LLMDeployment, replicas: i32, status: &Value) -> Deployment {
    let made = super::super::children::children(d, replicas, "i", None).unwrap();
    Deployment {
        status: serde_json::from_value(status.clone()).unwrap(),
        ..made.deployment
    }
}

fn ready_pod() -> Arc<Pod> {
    pod(json!({ "phase": "Running", "conditions": [{ "type": "Ready", "status": "True" }] }))
}

fn homeless_pod() -> Arc<Pod> {
    pod(
        json!({ "phase": "Pending", "conditions": [{ "type": "PodScheduled", "status": "False",
        "message": "0/2 nodes are available: 2 Insufficient nvidia.com/gpu." }] }),
    )
}

#[test]
fn ready_is_available_and_rolled_out_and_not_how_many() {
    let fixed =
        |n: i32| deployment(json!({ "model": { "source": { "demo": {} } }, "replicas": n }));
    let late =
        json!({ "type": "Progressing", "status": "False", "reason": "ProgressDeadlineExceeded" });
    for (why, n, child, pods, want) in [
        (
            "a scale-up that has no GPU",
            3,
            json!({ "replicas": 3, "updatedReplicas": 3 }),
            vec![ready_pod(), homeless_pod()],
            vec![
                "Available=True ReplicaServing",
                "Progressing=True Unschedulable",
                "Ready=True RolledOut",
                "ScalingActive=False FixedReplicas",
                "CapacityUnavailable=True Unschedulable",
            ],
        ),
        (
            "and never will have one",
            3,
            json!({ "replicas": 3, "updatedReplicas": 3, "conditions": [late] }),
            vec![ready_pod(), homeless_pod()],
            vec![
                "Available=True ReplicaServing",
                "Progressing=True Unschedulable",
                "Ready=True RolledOut",
                "ScalingActive=False FixedReplicas",
                "CapacityUnavailable=True Unschedulable",
            ],
        ),
        (
            "a rollout under way",
            1,
            json!({ "replicas": 2, "updatedReplicas": 1 }),
            vec![ready_pod(), homeless_pod()],
            vec![
                "Available=True ReplicaServing",
                "Progressing=True Unschedulable",
                "Ready=False Unschedulable",
                "ScalingActive=False FixedReplicas",
                "CapacityUnavailable=True Unschedulable",
                "Reconciling=True Unschedulable",
            ],
        ),
        (
            "a rollout past its deadline",
            1,
            json!({ "replicas": 2, "updatedReplicas": 1, "conditions": [late] }),
            vec![ready_pod(), homeless_pod()],
            vec![
                "Available=True ReplicaServing",
                "Progressing=False ProgressDeadlineExceeded",
                "Ready=False Unschedulable",
                "ScalingActive=False FixedReplicas",
                "CapacityUnavailable=True Unschedulable",
                "Stalled=True ProgressDeadlineExceeded",
            ],
        ),
        (
            "no replicas, as it was asked for",
            0,
            json!({}),
            vec![],
            vec![
                "Available=False ScaledToZero",
                "Progressing=False RolledOut",
                "Ready=True ScaledToZero",
                "ScalingActive=False FixedReplicas",
            ],
        ),
        (
            "all serve",
            1,
            json!({ "replicas": 1, "updatedReplicas": 1 }),
            vec![ready_pod()],
            vec![
                "Available=True ReplicaServing",
                "Progressing=False RolledOut",
                "Ready=True AllReplicasServing",
                "ScalingActive=False FixedReplicas",
            ],
        ),
        (
            "all of them crashed since",
            1,
            json!({ "replicas": 1, "updatedReplicas": 1 }),
            vec![pod(container(
                json!({ "state": { "terminated": { "exitCode": 1 } } }),
            ))],
            vec![
                "Available=False Crashed",
                "Progressing=True Crashed",
                "Ready=False Crashed",
                "ScalingActive=False FixedReplicas",
                "Reconciling=True Crashed",
            ],
        ),
        (
            "every pod was refused by its node",
            1,
            json!({ "replicas": 1, "updatedReplicas": 1 }),
            vec![pod(
                json!({ "phase": "Failed", "reason": "UnexpectedAdmissionError", "message": "no GPU" }),
            )],
            vec![
                "Available=False PodLost",
                "Progressing=True PodLost",
                "Ready=False PodLost",
                "ScalingActive=False FixedReplicas",
                "Reconciling=True PodLost",
            ],
        ),
    ] {
        let d = fixed(n);
        let child = child_of(&d, n, &child);
        let observed = Observed {
            pods,
            ..Observed::default()
        };
        let stored = Stored(Ok(d));
        let told = status(&input(&stored, &observed, Some(&child)));
        assert_eq!(reasons(&told)[1..], want, "{why}");
    }
}

#[test]
fn what_limits_the_scaling_is_told_where_it_does() {
    let spec = json!({ "model": { "source": { "demo": {} } }, "autoscaling": { "minReplicas": 2, "maxReplicas": 2 } });
    let stored = Stored(Ok(deployment(spec)));
    let observed = Observed::default();
    let load = Some(LoadSummary {
        blocks: 100,
        active_blocks: 0,
        waiting_requests: 0,
    });
    for (why, demand, want) in [
        ("idle at the most that is allowed", 1, None),
        ("as much as they carry", 2, None),
        (
            "more than they carry",
            5,
            Some("the load is work for 5 replicas, of at most 2: raise maxReplicas"),
        ),
    ] {
        let decision = Decision {
            replicas: 2,
            demand,
            ..Decision::default()
        };
        let limited = StatusInput {
            decision: Some(&decision),
            load,
            ..input(&stored, &observed, None)
        };
        let told = status(&limited);
        let of = |type_: &str| told.conditions.iter().find(|c| c.type_ == type_);
        assert_eq!(
            of("ScalingLimited").map(|c| c.message.as_str()),
            want,
            "{why}"
        );
        assert_eq!(of("ScalingActive").unwrap().reason, "Autoscaled", "{why}");
    }
}

/// What `kstatus` makes of an object with these conditions (sigs.k8s.io/cli-utils, pkg/kstatus/status: generic.go and
/// core.go of v0.37), which is how Flux and others read it. The generation is observed.
fn kstatus(conditions: &[Condition]) -> &'static str {
    for condition in conditions {
        match (condition.type_.as_str(), condition.status.as_str()) {
            ("Reconciling", "True") => return "InProgress",
            ("Stalled", "True") => return "Failed",
            _ => {}
        }
    }
    match conditions
        .iter()
        .find(|c| c.type_ == "Ready")
        .map(|c| c.status.as_str())
    {
        Some("True") | None => "Current",
        Some(_) => "InProgress",
    }
}

proptest::proptest! {
    /// Whatever is observed: never both stalled and being worked on, never ready beside stalled, and read by kstatus as the
    /// conditions mean it.
    #[test]
    fn tools_read_the_conditions_rightly(
        replicas in 0i32..4, updated in 0i32..4, existing in 0i32..4,
        serving in 0usize..4, homeless in 0usize..3, ended in 0usize..3,
        late: bool, refused: bool, failing: bool, changed: bool,
    ) {
        let mut d = deployment(json!({ "model": { "source": { "demo": {} } }, "replicas": replicas }));
        let reason = if late { "ProgressDeadlineExceeded" } else { "ReplicaSetUpdated" };
        let child = child_of(&d, replicas, &json!({ "replicas": existing, "updatedReplicas": updated.min(existing),
            "conditions": [{ "type": "Progressing", "status": "True", "reason": reason }] }));
        if changed {
            d.spec.drain_seconds = 7;
        }
        let failed = pod(json!({ "phase": "Failed", "reason": "Evicted" }));
        let observed = Observed {
            pods: [vec![ready_pod(); serving], vec![homeless_pod(); homeless], vec![failed; ended]].concat(),
            ..Observed::default()
        };
        let refusal = Refusal { reason: Reason::ChildRefused, sentence: "no".into() };
        let stored = Stored(Ok(d));
        let told = status(&StatusInput {
            refused: refused.then_some(&refusal),
            failing: failing.then_some("too many requests"),
            ..input(&stored, &observed, Some(&child))
        });
        let holds = |type_: &str| told.conditions.iter().any(|c| c.type_ == type_ && c.status == "True");
        let (ready, stalled, reconciling) = (holds("Ready"), holds("Stalled"), holds("Reconciling"));
        proptest::prop_assert!(!(stalled && reconciling));
        proptest::prop_assert!(!(stalled && ready));
        proptest::prop_assert!(ready || stalled || reconciling, "what isn't ready is worked on, or stalled");
        proptest::prop_assert!(!ready || replicas == 0 || holds("Available"));
        let want = match (stalled, reconciling) {
            (true, _) => "Failed",
            (_, true) => "InProgress",
            _ => "Current",
        };
        proptest::prop_assert_eq!(kstatus(&told.conditions), want);
    }
}

#[test]
fn what_serves_goes_on_where_the_spec_cannot_be_read() {
    let stored: Stored = serde_json::from_value(json!({
        "metadata": { "name": "m", "namespace": "n", "generation": 3 }, "spec": {} }))
    .unwrap();
    let refusal = Refusal {
        reason: Reason::InvalidSpec,
        sentence: "spec.model is missing".into(),
    };
    let observed = Observed {
        pods: vec![pod(
            json!({ "conditions": [{ "type": "Ready", "status": "True" }] }),
        )],
        ..Observed::default()
    };
    let unreadable = StatusInput {
        refused: Some(&refusal),
        ..input(&stored, &observed, None)
    };
    assert_eq!(
        reasons(&status(&unreadable))[..2],
        [
            "Accepted=False InvalidSpec",
            "Available=True ReplicaServing"
        ]
    );
}

#[test]
fn a_revision_that_is_held_or_taken_back_is_told() {
    let spec = |paused: bool, seqs: u32| {
        json!({ "model": { "source": { "demo": {} } }, "replicas": 1, "engine": { "maxNumSeqs": seqs },
            "rollout": { "paused": paused } })
    };
    let first = deployment(spec(false, 1));
    let children = super::super::children::children(&first, 1, "i", None);
    let mut child = children.unwrap().deployment;
    child.metadata.generation = Some(1);
    child.status = serde_json::from_value(
        json!({ "observedGeneration": 1, "replicas": 1, "updatedReplicas": 1, "readyReplicas": 1,
            "availableReplicas": 1 }),
    )
    .unwrap();
    let observed = Observed {
        pods: vec![pod(
            json!({ "phase": "Running", "conditions": [{ "type": "Ready", "status": "True" }] }),
        )],
        ..Observed::default()
    };
    let told = |d: &LLMDeployment, child: &Deployment| {
        status(&input(&Stored(Ok(d.clone())), &observed, Some(child)))
    };
    let held = told(&deployment(spec(true, 2)), &child);
    assert_eq!(
        reasons(&held)[1..4],
        [
            "Available=True ReplicaServing",
            "Progressing=False RolloutPaused",
            "Ready=False RolloutPaused"
        ]
    );
    assert_ne!(held.current_revision, held.update_revision);
    let same = told(&deployment(spec(true, 1)), &child);
    assert_eq!(
        reasons(&same)[3],
        "Ready=True AllReplicasServing",
        "nothing is held"
    );
    assert_eq!(same.current_revision, same.update_revision);

    let bad = deployment(spec(false, 3));
    let annotations = child.metadata.annotations.as_mut().unwrap();
    let revision = super::super::children::revision(&bad.spec);
    annotations.insert("kvasir.dev/failed-revision".into(), revision);
    annotations.insert(
        "kvasir.dev/failed-because".into(),
        "m-1: no such flag".into(),
    );
    let back = told(&bad, &child);
    assert_eq!(
        reasons(&back)[1..],
        [
            "Available=True ReplicaServing",
            "Progressing=False RolledBack",
            "Ready=False RolledBack",
            "ScalingActive=False FixedReplicas",
            "Stalled=True RolledBack"
        ]
    );
    assert!(back.conditions[3].message.ends_with("m-1: no such flag"));
    assert_eq!(back.current_revision, same.current_revision);
}
