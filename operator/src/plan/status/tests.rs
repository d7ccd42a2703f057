//! A table of pods and the words about them, and the conditions that follow.

use kvasir_crds::LLMDeployment;
use serde_json::{Value, json};

use super::*;

fn pod(status: Value) -> Arc<Pod> {
    let pod = json!({ "metadata": { "name": "p", "uid": "u" }, "status": status });
    Arc::new(serde_json::from_value(pod).unwrap())
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
    let warning = |reason: &str, at: &str, message: &str| -> Event {
        serde_json::from_value(json!({
            "metadata": {}, "involvedObject": { "kind": "Pod", "name": "p", "uid": "u" }, "reason": reason,
            "lastTimestamp": at, "message": message
        }))
        .unwrap()
    };
    let unhealthy = warning(
        "Unhealthy",
        "2026-01-01T00:00:50Z",
        "Readiness probe failed: HTTP probe failed with statuscode: 503",
    );
    let hung = warning(
        "Unhealthy",
        "2026-01-01T00:00:30Z",
        "Liveness probe failed: context deadline exceeded",
    );
    let mount = warning(
        "FailedMount",
        "2026-01-01T00:00:50Z",
        "MountVolume.SetUp failed for volume \"models\"",
    );
    let ran = |exit: i32, from: u32, to: u32| {
        json!({ "exitCode": exit, "startedAt": format!("2026-01-01T00:00:{from:02}Z"),
            "finishedAt": format!("2026-01-01T00:00:{to:02}Z") })
    };
    let unmounted = pod(container(
        json!({ "state": { "waiting": { "reason": "ContainerCreating" } } }),
    ));
    let found = not_ready(None, &[unmounted], std::slice::from_ref(&mount), &[]);
    assert_eq!(found[0].reason, "ContainerRefused", "a volume");
    assert!(found[0].message.contains("MountVolume.SetUp failed"));
    let logged = LastLine {
        pod: "p".into(),
        container: "server".into(),
        line: "weights end too early".into(),
    };
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
        (
            "no message: the log's last line",
            container(
                json!({ "state": { "waiting": { "reason": "CrashLoopBackOff" } },
                "lastState": { "terminated": { "exitCode": 0, "reason": "Completed" } }, "restartCount": 3 }),
            ),
            "Crashed",
            "ended with exit code 0, restarted 3 times: weights end too early",
        ),
        (
            "the message comes before the log",
            container(
                json!({ "state": { "terminated": { "exitCode": 1, "message": "no space" } } }),
            ),
            "Crashed",
            ": no space",
        ),
        (
            "a hung server that the liveness probe ended",
            container(
                json!({ "state": { "waiting": { "reason": "CrashLoopBackOff" } },
                "lastState": { "terminated": ran(137, 10, 40) } }),
            ),
            "ProbeFailing",
            "Liveness probe failed: context deadline exceeded; the container server ended with exit code 137",
        ),
        (
            "a crash that came after the probe's run",
            container(
                json!({ "state": { "waiting": { "reason": "CrashLoopBackOff" } },
                "lastState": { "terminated": ran(1, 45, 48) } }),
            ),
            "Crashed",
            "exit code 1",
        ),
        (
            "an old crash doesn't explain a failing probe",
            container(json!({ "started": true, "state": { "running": {} },
                "lastState": { "terminated": { "exitCode": 1, "message": "long ago" } } })),
            "ProbeFailing",
            "statuscode: 503",
        ),
        (
            "an init container of the user's",
            json!({ "phase": "Pending",
                "containerStatuses": [{ "name": "server", "ready": false, "image": "i", "imageID": "",
                    "restartCount": 0, "state": { "waiting": { "reason": "PodInitializing" } } }],
                "initContainerStatuses": [{ "name": "fetch", "ready": false, "image": "i", "imageID": "",
                    "restartCount": 1, "state": { "terminated": { "exitCode": 6, "message": "no such host" } } }] }),
            "Crashed",
            "the container fetch ended with exit code 6, restarted 1 times: no such host",
        ),
        (
            "a node that does not answer",
            json!({ "phase": "Running", "conditions": [{ "type": "Ready", "status": "False" }],
                "containerStatuses": [{ "name": "server", "ready": true, "image": "i", "imageID": "",
                    "restartCount": 0, "started": true, "state": { "running": {} } }] }),
            "PodLost",
            "its node does not answer",
        ),
    ] {
        let warnings = [unhealthy.clone(), hung.clone()];
        let found = not_ready(
            None,
            &[pod(status)],
            &warnings,
            std::slice::from_ref(&logged),
        );
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
    Arc::make_mut(&mut ending).metadata.deletion_timestamp = Some(Time(Timestamp::UNIX_EPOCH));
    assert_eq!(not_ready(None, &[ready, ending], &[], &[]), []);
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
    let serving = pod(json!({ "conditions": [{ "type": "Ready", "status": "True" }] }));
    let status = status(&StatusInput {
        metadata: &d.metadata,
        spec: Some(&d.spec),
        before: None,
        refused: None,
        child: Some(&child),
        pods: std::slice::from_ref(&serving),
        warnings: &[],
        last_lines: &[],
        load: None,
        decision: None,
        scaling: None,
        now: Timestamp::UNIX_EPOCH,
    });
    assert_eq!(status.not_ready[0].reason, "PodRefused");
    let reasons = reasons(&status);
    assert_eq!(reasons[1], "Available=True ReplicaServing");
    assert_eq!(reasons[3], "Ready=False PodRefused");
    assert!(status.conditions[3].message.contains("exceeded quota"));
}

#[test]
fn the_last_line_is_the_last_with_words() {
    for (text, want) in [("a\nb\n\n  \n", Some("b")), ("\n \n", None), ("", None)] {
        assert_eq!(last_line(text), want, "{text:?}");
    }
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
        metadata: &d.metadata,
        spec: Some(&d.spec),
        before: None,
        refused: None,
        child: Some(&done),
        pods: std::slice::from_ref(&serving),
        warnings: &[],
        last_lines: &[],
        load: None,
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
        spec: Some(&changed.spec),
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
    let refused = |reason: Reason| Refusal {
        reason,
        sentence: "spec.podTemplate.x".into(),
    };
    for reason in [
        Reason::NameConflict,
        Reason::InvalidPodTemplate,
        Reason::InvalidSpec,
    ] {
        let refusal = refused(reason);
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
    let refusal = refused(Reason::InvalidSpec);
    let unreadable = StatusInput {
        spec: None,
        refused: Some(&refusal),
        ..input
    };
    assert_eq!(
        reasons(&status(&unreadable))[1],
        "Available=True ReplicaServing",
        "what serves goes on, and the status says so"
    );
}
