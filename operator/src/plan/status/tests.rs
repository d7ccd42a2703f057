//! A table of pods and the words about them, and the conditions that follow.

use serde_json::{Value, json};

use super::*;

fn pod(status: Value) -> Pod {
    serde_json::from_value(json!({ "metadata": { "name": "p", "uid": "u" }, "status": status }))
        .unwrap()
}

fn container(state: Value) -> Value {
    let mut status =
        json!({ "name": "server", "ready": false, "image": "i", "imageID": "", "restartCount": 0 });
    for (key, value) in state.as_object().unwrap() {
        status[key] = value.clone();
    }
    json!({ "phase": "Running", "containerStatuses": [status] })
}

#[test]
fn says_why_in_words() {
    let unhealthy: Event = serde_json::from_value(json!({
        "metadata": {}, "involvedObject": { "kind": "Pod", "name": "p", "uid": "u" }, "reason": "Unhealthy",
        "message": "Readiness probe failed: HTTP probe failed with statuscode: 503"
    }))
    .unwrap();
    for (why, status, reason, words) in [
        (
            "the scheduler's message",
            json!({ "phase": "Pending", "conditions": [{ "type": "PodScheduled", "status": "False",
                "reason": "Unschedulable", "message": "0/1 nodes are available: 1 Insufficient nvidia.com/gpu." }] }),
            "Unschedulable",
            "Insufficient nvidia.com/gpu",
        ),
        (
            "an image that can't be pulled",
            container(
                json!({ "state": { "waiting": { "reason": "ImagePullBackOff", "message": "Back-off pulling image" } } }),
            ),
            "ImagePullFailed",
            "Back-off pulling image",
        ),
        (
            "the last line of the log, not the kubelet's back-off",
            container(
                json!({ "state": { "waiting": { "reason": "CrashLoopBackOff", "message": "back-off 10s" } },
                "lastState": { "terminated": { "exitCode": 2, "reason": "Error", "message": "loading\nno CUDA device\n\n" } } }),
            ),
            "Crashed",
            "ended with exit code 2, restarted 0 times: no CUDA device",
        ),
        (
            "killed for memory, and started again",
            container(json!({ "started": false, "state": { "running": {} },
                "lastState": { "terminated": { "exitCode": 137, "reason": "OOMKilled" } } })),
            "Crashed",
            "killed for want of memory",
        ),
        (
            "a missing secret",
            container(
                json!({ "state": { "waiting": { "reason": "CreateContainerConfigError", "message": "secret \"x\" not found" } } }),
            ),
            "ContainerRefused",
            "secret \"x\" not found",
        ),
        (
            "a probe that fails of a server that once served",
            container(json!({ "started": true, "state": { "running": {} } })),
            "ProbeFailing",
            "statuscode: 503",
        ),
        (
            "a model that loads",
            container(json!({ "started": false, "state": { "running": {} } })),
            "Starting",
            "the server loads its model",
        ),
        (
            "an eviction",
            json!({ "phase": "Failed", "reason": "Evicted", "message": "low on memory" }),
            "PodLost",
            "low on memory",
        ),
    ] {
        let found = not_ready(&[pod(status)], std::slice::from_ref(&unhealthy));
        assert_eq!(found[0].reason, reason, "{why}");
        assert!(
            found[0].message.contains(words),
            "{why}: {}",
            found[0].message
        );
    }
}

#[test]
fn says_nothing_of_pods_that_serve_or_end() {
    let ready = pod(json!({ "conditions": [{ "type": "Ready", "status": "True" }] }));
    let mut ending = pod(json!({ "phase": "Running" }));
    ending.metadata.deletion_timestamp = Some(Time(Timestamp::UNIX_EPOCH));
    assert_eq!(not_ready(&[ready, ending], &[]), []);
}

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
    let serving =
        pod(json!({ "phase": "Running", "conditions": [{ "type": "Ready", "status": "True" }] }));
    let starting = pod(container(
        json!({ "started": false, "state": { "running": {} } }),
    ));
    let now = Timestamp::UNIX_EPOCH;
    let done = child(1);
    let input = StatusInput {
        deployment: &d,
        accepted: Ok(()),
        name_conflict: None,
        child: Some(&done),
        pods: std::slice::from_ref(&serving),
        warnings: &[],
        decision: None,
        scaling: None,
        now,
    };
    assert_eq!(
        reasons(&status(&input)),
        [
            "Accepted=True SpecAccepted",
            "Available=True ReplicaServing",
            "Progressing=False RolledOut",
            "Ready=True AllReplicasServing",
            "ScalingActive=False FixedReplicas"
        ]
    );
    let mut changed = d.clone();
    changed.spec.drain_seconds = 7;
    let stale = StatusInput {
        deployment: &changed,
        ..input
    };
    assert_eq!(
        reasons(&status(&stale))[3],
        "Ready=False RollingOut",
        "the Deployment is still of the generation before"
    );
    let begun = child(0);
    let loading = StatusInput {
        child: Some(&begun),
        pods: std::slice::from_ref(&starting),
        ..input
    };
    assert_eq!(reasons(&status(&loading))[3], "Ready=False Starting");
    let nothing = StatusInput {
        child: None,
        pods: &[],
        ..input
    };
    assert_eq!(reasons(&status(&nothing))[3], "Ready=False Creating");
    let conflict = StatusInput {
        name_conflict: Some("Service m exists"),
        ..nothing
    };
    assert_eq!(
        reasons(&status(&conflict))[0],
        "Accepted=False NameConflict"
    );
    let invalid = StatusInput {
        accepted: Err("spec.podTemplate.x"),
        ..nothing
    };
    assert_eq!(
        reasons(&status(&invalid))[3],
        "Ready=False InvalidPodTemplate"
    );
}
