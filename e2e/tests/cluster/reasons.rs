//! Why a replica does not serve, on real pods: the status says it in the words of whoever refused. The
//! scheduler's are gpu.rs's, a failing probe is scaling.rs's, where a server hangs.

use crate::kvasir;
use crate::test_namespace::{TestNamespace, condition, demo};
use crate::volume::{claim_models, from_claim};
use kvasir_e2e::wait::Seen;
use serde_json::Value;

/// The first replica that does not serve, once its reason is `reason`.
fn await_reason(ns: &TestNamespace, name: &str, reason: &str) -> Value {
    let what = format!("the status of {name} says {reason}");
    let object = ns.await_deployment(&what, name, 90, |object| {
        object["status"]["notReady"][0]["reason"] == reason
            && condition(object, "Ready")["reason"] == reason
    });
    let replica = object["status"]["notReady"][0].clone();
    let (told, message) = (&condition(&object, "Ready")["message"], &replica["message"]);
    assert!(
        told.as_str()
            .expect("text")
            .ends_with(message.as_str().expect("text")),
        "the condition Ready quotes the replica: {told}"
    );
    replica
}

#[test]
fn an_image_that_no_node_has_is_named() {
    let Some(cluster) = kvasir() else { return };
    let ns = TestNamespace::new(cluster, "no-image");
    let image = "kvasir.dev/kvasir:that-nobody-built";
    let rest = format!("  replicas: 1\n  image: {image}\n  imagePullPolicy: IfNotPresent");
    ns.apply(&demo("demo", &rest)).expect("accepted");
    let replica = await_reason(&ns, "demo", "ImagePullFailed");
    assert!(
        replica["message"].as_str().expect("text").contains(image),
        "the kubelet's words name the image: {replica}"
    );
}

#[test]
fn a_crash_is_told_with_the_last_line_of_its_log() {
    let Some(cluster) = kvasir() else { return };
    let ns = TestNamespace::new(cluster, "crash");
    claim_models(&ns, &["model.safetensors"]);
    ns.apply(&from_claim("headless")).expect("accepted");
    let mistyped = "  replicas: 1\n  engine: {extraArgs: [--max-num-sequences=3]}";
    ns.apply(&demo("mistyped", mistyped)).expect("accepted");
    let replica = await_reason(&ns, "headless", "Crashed");
    let pod = replica["pod"].as_str().expect("its pod");
    let last_line = ns.last_line(pod);
    assert!(
        last_line.contains("/models/demo"),
        "the server names the directory that lacks its weights: {last_line}"
    );
    let message = replica["message"].as_str().expect("text");
    assert!(
        message.ends_with(&last_line) && message.contains("exit code 2"),
        "the status quotes the whole line {last_line:?}: {message}"
    );
    let replica = await_reason(&ns, "mistyped", "Crashed");
    let message = replica["message"].as_str().expect("text");
    assert!(
        message.ends_with(": error: unexpected argument '--max-num-sequences' found"),
        "what is wrong, and not the way to the help: {message}"
    );
}

#[test]
fn pods_that_a_node_refuses_are_no_replicas_and_told_once() {
    let Some(cluster) = kvasir() else { return };
    let ns = TestNamespace::new(cluster, "ended");
    // Each refused pod is followed by another at once: at most four of them here.
    let quota =
        "apiVersion: v1\nkind: ResourceQuota\nmetadata: {name: few}\nspec: {hard: {count/pods: 4}}";
    ns.apply(quota).expect("accepted");
    ns.until("the quota counts", 30, || {
        let used = ns.get(&["resourcequota", "few"])?["status"]["used"]["count/pods"].clone();
        Ok(if used.is_null() {
            Seen::NotYet("not yet".into())
        } else {
            Seen::Yes(())
        })
    });
    let elsewhere = "  replicas: 1\n  podTemplate: {spec: {nodeName: node-2, nodeSelector: {kubernetes.io/hostname: elsewhere}}}";
    ns.apply(&demo("demo", elsewhere)).expect("accepted");
    let object = ns.await_deployment("the node's refusal is told", "demo", 60, |object| {
        object["status"]["endedPods"][0].is_object()
    });
    let told = &object["status"]["endedPods"];
    assert_eq!(told.as_array().map(Vec::len), Some(1), "{told}");
    assert!(
        told[0]["reason"]
            .as_str()
            .is_some_and(|r| r.contains("NodeAffinity")),
        "{told}"
    );
    let object = ns.await_deployment("the quota ends it", "demo", 60, |object| {
        object["status"]["notReady"][0]["reason"] == "PodRefused"
    });
    assert_eq!(object["status"]["replicas"], 0, "{}", object["status"]);
    assert_eq!(
        &object["status"]["endedPods"], told,
        "whatever comes after the first"
    );
    let events = ns
        .get(&["events", "--field-selector=reason=PodsEnded"])
        .expect("events");
    let n_events = events["items"].as_array().map(Vec::len);
    assert_eq!(n_events, Some(1), "{events}");
}
