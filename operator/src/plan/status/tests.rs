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
        decision: None,
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
    assert_eq!(reasons[3], "Ready=False PodRefused");
    assert!(status.conditions[3].message.contains("exceeded quota"));
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
        let want = |condition: &str| format!("{condition}=False {reason}");
        let kinds = [
            "Accepted",
            "Available",
            "Progressing",
            "Ready",
            "ScalingActive",
        ];
        assert_eq!(reasons(&status(&refused)), kinds.map(want));
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
