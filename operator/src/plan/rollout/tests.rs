//! Rollouts that go on, wait, go in place, and go back.

use std::sync::Arc;

use kvasir_crds::LLMDeployment;
use serde_json::{Value, json};

use super::super::children::{self, children};
use super::*;
use crate::observed::ObservedChildren;
use crate::plan::tests::deployment;

fn spec(image: &str, rollout: Value) -> Value {
    json!({ "model": { "source": { "demo": {} } }, "replicas": 2, "image": image, "rollout": rollout })
}

/// The child as a plan of this deployment makes it from what ran.
fn roll(
    d: &LLMDeployment,
    observed: &Observed,
    running: Option<&Deployment>,
) -> (Deployment, Rollout) {
    let now = "2026-01-01T01:00:00Z".parse().unwrap();
    let rollout = Rollout::decide(&d.spec, observed, running, now);
    let marked = running.map(|running| rollout.mark(running));
    let mut made = children(d, 2, "default", marked.as_ref())
        .unwrap()
        .deployment;
    rollout.settle(&mut made, running);
    (made, rollout)
}

/// As the API server holds it once every replica of it serves.
fn whole(mut child: Deployment) -> Deployment {
    child.metadata.generation = Some(1);
    child.status = serde_json::from_value(
        json!({ "observedGeneration": 1, "replicas": 2, "updatedReplicas": 2,
        "readyReplicas": 2, "availableReplicas": 2 }),
    )
    .ok();
    child
}

/// The same while one replica of it is new and not ready.
fn under_way(mut child: Deployment) -> Deployment {
    child.metadata.generation = Some(2);
    child.status = serde_json::from_value(
        json!({ "observedGeneration": 2, "replicas": 3, "updatedReplicas": 1,
        "readyReplicas": 2, "availableReplicas": 2 }),
    )
    .ok();
    child
}

fn image(child: &Deployment) -> String {
    let pod = child.spec.as_ref().unwrap().template.spec.as_ref().unwrap();
    pod.containers[0].image.clone().unwrap()
}

fn surge(child: &Deployment) -> Value {
    serde_json::to_value(&child.spec.as_ref().unwrap().strategy).unwrap()["rollingUpdate"]["maxSurge"].clone()
}

fn pods(of: &[(&Deployment, Value)]) -> Observed {
    let pods = of.iter().enumerate().map(|(i, (child, status))| {
        let revision = applied_revision(child).unwrap();
        let pod = json!({ "metadata": { "name": format!("m-{i}"), "creationTimestamp": "2026-01-01T00:00:00Z",
            "labels": { REVISION_LABEL: revision } }, "status": status });
        Arc::new(serde_json::from_value(pod).unwrap())
    });
    Observed {
        pods: pods.collect(),
        children: ObservedChildren::default(),
        ..Observed::default()
    }
}

fn ready() -> Value {
    json!({ "phase": "Running", "conditions": [{ "type": "Ready", "status": "True" }] })
}

fn crashed(restarts: u32) -> Value {
    json!({ "phase": "Running", "containerStatuses": [{ "name": "server", "ready": false, "image": "i", "imageID": "",
        "restartCount": restarts, "state": { "waiting": { "reason": "CrashLoopBackOff" } },
        "lastState": { "terminated": { "exitCode": 2, "message": "no such flag" } } }] })
}

fn homeless() -> Value {
    json!({ "phase": "Pending", "conditions": [{ "type": "PodScheduled", "status": "False",
        "reason": "Unschedulable", "message": "1 Insufficient nvidia.com/gpu" }] })
}

#[test]
fn a_revision_that_cannot_become_ready_goes_back_until_the_spec_changes() {
    let (first, _) = roll(
        &deployment(spec("good", json!({}))),
        &Observed::default(),
        None,
    );
    assert_eq!(
        first.annotations().get(GOOD_REVISION),
        None,
        "not proved yet"
    );
    let good = whole(first);
    let bad = deployment(spec("bad", json!({})));
    let (begun, rollout) = roll(&bad, &pods(&[(&good, ready())]), Some(&good));
    assert_eq!((image(&begun).as_str(), rollout.news), ("bad", None));
    assert_eq!(
        begun.annotations().get(GOOD_REVISION),
        applied_revision(&good).as_ref()
    );
    assert!(begun.annotations()[GOOD_TEMPLATE].contains("\"good\""));

    let begun = under_way(begun);
    for (why, new, goes_back) in [
        ("it may pass", crashed(1), false),
        ("it ends again and again", crashed(2), true),
        ("it serves", ready(), false),
        ("it may find a place yet", homeless(), false),
        (
            "its image is nowhere",
            json!({ "containerStatuses": [{ "name": "server", "ready": false, "image": "bad", "imageID": "",
                "restartCount": 0, "state": { "waiting": { "reason": "ImagePullBackOff", "message": "not found" } } }] }),
            true,
        ),
    ] {
        let observed = pods(&[(&good, ready()), (&good, ready()), (&begun, new)]);
        let (next, rollout) = roll(&bad, &observed, Some(&begun));
        assert_eq!(
            image(&next),
            if goes_back { "good" } else { "bad" },
            "{why}"
        );
        let news = rollout.news.filter(|(reason, _)| *reason == "RolledBack");
        assert_eq!(news.is_some(), goes_back, "{why}");
        assert_eq!(failure(&bad.spec, &next).is_some(), goes_back, "{why}");
    }
    let observed = pods(&[(&good, ready()), (&good, ready()), (&begun, crashed(2))]);
    let (back, rollout) = roll(&bad, &observed, Some(&begun));
    assert!(rollout.news.unwrap().1.ends_with("no such flag"));
    let back = whole(back);
    let (still, rollout) = roll(&bad, &pods(&[(&good, ready())]), Some(&back));
    assert_eq!(
        (image(&still).as_str(), rollout.news),
        ("good", None),
        "told once"
    );
    assert!(
        failure(&bad.spec, &still)
            .unwrap()
            .contains("m-2: the container server ended with exit code 2")
    );
    assert_eq!(good_revision(&still), applied_revision(&good));
    let scaled = children::scaled(&bad, 5, &still).unwrap();
    assert_eq!(image(&scaled), "good", "and is scaled");

    let mended = deployment(spec("mended", json!({})));
    let (next, _) = roll(&mended, &pods(&[(&good, ready())]), Some(&back));
    assert_eq!(image(&next), "mended");
    assert_eq!(next.annotations().get(FAILED_REVISION), None);
    assert!(
        next.annotations()[GOOD_TEMPLATE].contains("\"good\""),
        "the way back stays open"
    );
    let (settled, _) = roll(&mended, &Observed::default(), Some(&whole(next)));
    assert_eq!(
        settled.annotations().get(GOOD_TEMPLATE),
        None,
        "one template once it serves"
    );
}

#[test]
fn the_first_revision_has_nothing_to_go_back_to() {
    let d = deployment(spec("bad", json!({})));
    let (first, _) = roll(&d, &Observed::default(), None);
    let (next, rollout) = roll(&d, &pods(&[(&first, crashed(9))]), Some(&first));
    assert_eq!((image(&next).as_str(), rollout.news), ("bad", None));
}

#[test]
fn a_paused_rollout_holds_the_template_and_goes_on_later() {
    let (first, _) = roll(
        &deployment(spec("a", json!({}))),
        &Observed::default(),
        None,
    );
    let first = whole(first);
    let paused = deployment(spec("b", json!({ "paused": true })));
    let (held, _) = roll(&paused, &Observed::default(), Some(&first));
    assert_eq!(image(&held), "a");
    let (next, _) = roll(
        &deployment(spec("b", json!({}))),
        &Observed::default(),
        Some(&first),
    );
    assert_eq!(image(&next), "b");
    let (fresh, _) = roll(&paused, &Observed::default(), None);
    assert_eq!(image(&fresh), "b", "there is nothing to hold");
}

#[test]
fn replicas_are_replaced_in_place_only_where_there_is_no_room() {
    let (first, _) = roll(
        &deployment(spec("a", json!({}))),
        &Observed::default(),
        None,
    );
    assert_eq!(surge(&first), 1);
    let first = whole(first);
    let new = deployment(spec("b", json!({ "strategy": "Auto" })));
    let (begun, _) = roll(&new, &pods(&[(&first, ready())]), Some(&first));
    let begun = under_way(begun);
    let look = |pods: &Observed, running: &Deployment| {
        let (next, rollout) = roll(&new, pods, Some(running));
        (surge(&next), rollout.news.map(|(reason, _)| reason), next)
    };
    let crowd = pods(&[(&first, ready()), (&begun, homeless())]);
    let (found, news, in_place) = look(&crowd, &begun);
    assert_eq!((found, news), (json!(0), Some("ReplacingInPlace")));
    let placed = pods(&[(&first, ready()), (&begun, crashed(0))]);
    let (found, news, _) = look(&placed, &in_place);
    assert_eq!((found, news), (json!(0), None), "to its end, and told once");
    let (found, _, _) = look(&pods(&[(&begun, ready())]), &in_place);
    assert_eq!(found, 1, "it is over");
    let (found, _, _) = look(&pods(&[(&first, homeless())]), &first);
    assert_eq!(found, 1, "a scale-up without room is no rollout");
    for (strategy, want) in [("Surge", 1), ("Replace", 0)] {
        let asked = deployment(spec("b", json!({ "strategy": strategy })));
        let (next, _) = roll(&asked, &crowd, Some(&begun));
        assert_eq!(surge(&next), want, "{strategy}");
    }
}
