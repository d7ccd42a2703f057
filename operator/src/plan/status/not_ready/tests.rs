//! A table of pods and the words about them.

use std::sync::Arc;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use serde_json::{Value, json};

use super::*;

pub(in crate::plan::status) fn pod(status: Value) -> Arc<Pod> {
    let pod = json!({ "metadata": { "name": "p", "uid": "u" }, "status": status, "spec": { "containers": [
        { "name": "server", "resources": { "limits": { "memory": "1Gi" } } }] } });
    Arc::new(serde_json::from_value(pod).unwrap())
}

pub(in crate::plan::status) fn container(state: Value) -> Value {
    let mut status =
        json!({ "name": "server", "ready": false, "image": "i", "imageID": "", "restartCount": 0 });
    for (key, value) in state.as_object().unwrap() {
        status[key] = value.clone();
    }
    json!({ "phase": "Running", "containerStatuses": [status] })
}

fn found(
    pods: Vec<Arc<Pod>>,
    warnings: Vec<Event>,
    last_lines: Vec<LastLine>,
) -> Vec<NotReadyReplica> {
    let observed = Observed {
        pods,
        warnings: warnings.into_iter().map(Arc::new).collect(),
        last_lines,
        ..Observed::default()
    };
    not_ready(&DeploymentStatus::default(), &observed)
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
    let found = found(vec![unmounted], vec![mount], vec![]);
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
            "was killed because it ran out of memory (its limit is 1Gi: raise it)",
        ),
        (
            "a mistyped flag, and not the way to the help",
            container(
                json!({ "state": { "waiting": { "reason": "CrashLoopBackOff" } }, "lastState": { "terminated": {
                    "exitCode": 2, "reason": "Error", "message": "error: unexpected argument '--max-seqs' found\n\n\
                    Usage: kvasir-server [OPTIONS]\n\nFor more information, try '--help'.\n" } } }),
            ),
            "Crashed",
            ": error: unexpected argument '--max-seqs' found",
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
            container(
                json!({ "started": false, "state": { "running": { "startedAt": "2026-01-01T00:00:00Z" } } }),
            ),
            "Starting",
            "the server is loading its model",
        ),
        (
            "a node that is lost",
            json!({ "phase": "Unknown", "reason": "NodeLost", "message": "node n does not answer" }),
            "PodLost",
            "node n does not answer",
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
            "the container fetch ended with exit code 6, restarted 1 time: no such host",
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
        let warnings = vec![unhealthy.clone(), hung.clone()];
        let found = self::found(vec![pod(status)], warnings, vec![logged.clone()]);
        assert_eq!(found[0].reason, reason, "{why}");
        assert!(
            found[0].message.contains(words),
            "{why}: {}",
            found[0].message
        );
    }
}

#[test]
fn says_how_far_a_start_is() {
    let running = pod(container(
        json!({ "state": { "running": { "startedAt": "2026-01-01T00:00:00Z" } } }),
    ));
    let pulling = pod(container(
        json!({ "state": { "waiting": { "reason": "ContainerCreating" } } }),
    ));
    let report = |phase, done_gib: u64, total_gib: u64| StartReport {
        phase: Some(phase),
        done_bytes: Some(done_gib << 30),
        total_bytes: Some(total_gib << 30),
        ..StartReport::default()
    };
    for (why, pod, report, want) in [
        (
            "no container yet",
            &pulling,
            None,
            "its image is pulled and its container made",
        ),
        (
            "whole tens",
            &running,
            Some(report(StartPhase::Fetch, 7, 15)),
            "the server is fetching its model, 40 % of 15.0 GiB",
        ),
        (
            "weights",
            &running,
            Some(report(StartPhase::Load, 15, 15)),
            "the server is loading its model, 100 % of 15.0 GiB",
        ),
        (
            "nothing to count",
            &running,
            Some(report(StartPhase::WarmUp, 0, 0)),
            "the server has loaded its model and starts",
        ),
        (
            "an elder server",
            &running,
            Some(StartReport::default()),
            "the server is loading its model",
        ),
    ] {
        let observed = Observed {
            pods: vec![Arc::clone(pod)],
            starting: Vec::from_iter(report.map(|report| StartingReplica {
                pod: "p".into(),
                report,
            })),
            ..Observed::default()
        };
        let found = not_ready(&DeploymentStatus::default(), &observed);
        assert_eq!(
            (found[0].reason.as_str(), found[0].message.as_str()),
            ("Starting", want),
            "{why}"
        );
    }
}

#[test]
fn says_nothing_of_pods_that_serve_or_end() {
    let ready = pod(json!({ "conditions": [{ "type": "Ready", "status": "True" }] }));
    let mut ending = pod(json!({ "phase": "Running" }));
    Arc::make_mut(&mut ending).metadata.deletion_timestamp =
        Some(Time(jiff::Timestamp::UNIX_EPOCH));
    assert_eq!(found(vec![ready, ending], vec![], vec![]), []);
}

#[test]
fn pods_that_ended_are_no_replicas_and_each_reason_is_told_once() {
    let ended = |name: &str, reason: &str, message: &str| {
        let mut pod = pod(json!({ "phase": "Failed", "reason": reason, "message": message }));
        Arc::make_mut(&mut pod).metadata.name = Some(name.into());
        pod
    };
    let told = |reason: &str, message: &str| EndedPods {
        reason: reason.into(),
        message: message.into(),
    };
    let broken: Vec<_> = (0..3000)
        .map(|n| {
            ended(
                &format!("m-{n:04}"),
                "UnexpectedAdmissionError",
                "no healthy GPU",
            )
        })
        .collect();
    assert_eq!(found(broken.clone(), vec![], vec![]), []);
    let observed = |pods: &[Arc<Pod>]| Observed {
        pods: pods.to_vec(),
        ..Observed::default()
    };
    let first = super::ended(&observed(&broken), &[]);
    assert_eq!(
        first,
        [told("UnexpectedAdmissionError", "m-0000: no healthy GPU")]
    );
    let evicted = ended("m-9", "Evicted", "low on memory");
    let later = [&broken[7..], std::slice::from_ref(&evicted)].concat();
    assert_eq!(
        super::ended(&observed(&later), &first),
        [told("Evicted", "m-9: low on memory"), first[0].clone()],
        "the first of a reason stays the one that is quoted"
    );
    assert_eq!(
        super::ended(&observed(&[evicted]), &first),
        [told("Evicted", "m-9: low on memory")],
        "a reason goes with the last of its pods"
    );
    let done = pod(json!({ "phase": "Succeeded" }));
    assert_eq!(
        super::ended(&observed(&[done]), &[]),
        [told("Succeeded", "p: the pod ended")]
    );
}
