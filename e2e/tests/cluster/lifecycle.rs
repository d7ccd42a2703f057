//! A deployment from apply to delete, and what an upgrade of the operator leaves alone.

use crate::scene::{Scene, demo};
use crate::{kvasir, next_reference, release};
use kvasir_e2e::command::run;
use kvasir_e2e::quickstart::{self, SYSTEM};
use kvasir_e2e::wait::Seen;
use std::collections::BTreeSet;

const ONE: &str = "  replicas: 1\n  drainSeconds: 5\n  resources: {requests: {cpu: 50m, memory: 128Mi}, limits: {memory: 1Gi}}";

#[test]
fn a_deployment_answers_and_its_deletion_leaves_nothing() {
    let Some(cluster) = kvasir() else { return };
    let scene = Scene::new(cluster, "answers");
    scene.apply(&demo("demo", ONE)).expect("accepted");
    let object = scene.await_ready("demo");
    assert_eq!(object["status"]["readyReplicas"], 1);
    let said = scene.ask("demo", "What is a block table?");
    assert!(
        said["pieces"].as_array().expect("pieces").len() > 3,
        "the answer came in pieces: {said}"
    );
    assert!(
        said["answer"].as_str().expect("text").contains("block"),
        "the answer is about blocks: {said}"
    );

    scene
        .kubectl(&["delete", "llmdeployment", "demo"])
        .expect("deleted");
    scene.until("nothing is left", 60, || {
        let kinds = "deployments,replicasets,pods,services,endpointslices,poddisruptionbudgets,serviceaccounts";
        let left = scene.get(&[kinds])?;
        let names: Vec<String> = left["items"]
            .as_array()
            .into_iter()
            .flatten()
            .filter(|item| item["metadata"]["name"] != "default")
            .map(|item| format!("{}/{}", item["kind"], item["metadata"]["name"]))
            .collect();
        Ok(if names.is_empty() { Seen::Yes(()) } else { Seen::NotYet(names.join(", ")) })
    });
}

#[test]
fn a_namespace_goes_with_all_that_is_in_it_and_no_error_is_told() {
    let Some(cluster) = kvasir() else { return };
    let scene = Scene::new(cluster, "going");
    scene.apply(&demo("demo", ONE)).expect("accepted");
    scene.await_ready("demo");
    // An upgrade would replace the operator, and its log.
    let _alone = release();
    scene
        .kubectl(&["delete", "namespace", "going", "--timeout=90s"])
        .expect("deleted");
    let operator = ["logs", "deployment/kvasir-operator", "--namespace", SYSTEM];
    let log = run(cluster.kubectl().args(operator)).expect("its log");
    let told: Vec<_> = log
        .lines()
        .filter(|line| line.contains("WARN") && line.contains("going"))
        .collect();
    assert!(told.is_empty(), "{told:?}");
}

#[test]
fn kubectl_scale_reaches_the_pods() {
    let Some(cluster) = kvasir() else { return };
    let scene = Scene::new(cluster, "scale");
    scene.apply(&demo("fixed", ONE)).expect("accepted");
    scene
        .kubectl(&["scale", "llmdeployment", "fixed", "--replicas=2"])
        .expect("scaled");
    scene.await_deployment("two replicas serve", "fixed", 90, |object| {
        object["status"]["readyReplicas"] == 2
    });
}

#[test]
fn a_killed_pod_is_replaced() {
    let Some(cluster) = kvasir() else { return };
    let scene = Scene::new(cluster, "replaced");
    scene.apply(&demo("demo", ONE)).expect("accepted");
    scene.await_ready("demo");
    let pods = scene.pods("demo").expect("pods");
    let killed = pods[0]["metadata"]["name"]
        .as_str()
        .expect("a name")
        .to_owned();
    scene
        .kubectl(&["delete", "pod", &killed, "--grace-period=0", "--force"])
        .expect("killed");
    scene.until("another pod serves", 90, || {
        let ready = scene.get(&["llmdeployment", "demo"])?["status"]["readyReplicas"] == 1;
        let other = scene
            .pods("demo")?
            .iter()
            .all(|pod| pod["metadata"]["name"] != killed.as_str());
        Ok(if ready && other {
            Seen::Yes(())
        } else {
            Seen::NotYet("not yet".into())
        })
    });
    scene.ask("demo", "What is a block table?");
}

#[test]
fn an_upgrade_of_the_operator_rolls_no_pod() {
    let Some(cluster) = kvasir() else { return };
    let scene = Scene::new(cluster, "upgrade");
    scene.apply(&demo("demo", ONE)).expect("accepted");
    scene.await_ready("demo");
    let uids = || -> BTreeSet<String> {
        let pods = scene.pods("demo").expect("pods");
        pods.iter()
            .map(|pod| pod["metadata"]["uid"].to_string())
            .collect()
    };
    let before = uids();
    let _alone = release();
    quickstart::install(&cluster.access(), &next_reference()).expect("upgraded");
    // A change that only the new operator can have made shows that it has looked at the deployment.
    scene
        .kubectl(&["scale", "llmdeployment", "demo", "--replicas=2"])
        .expect("scaled");
    scene.await_deployment("two replicas serve", "demo", 120, |object| {
        object["status"]["readyReplicas"] == 2
    });
    assert!(
        uids().is_superset(&before),
        "the pod from before the upgrade still runs"
    );
}

#[test]
fn an_edit_of_what_is_ours_is_taken_back_and_a_restart_by_hand_stays() {
    let Some(cluster) = kvasir() else { return };
    let scene = Scene::new(cluster, "edited");
    scene.apply(&demo("demo", ONE)).expect("accepted");
    scene.await_ready("demo");
    let uid = || scene.pods("demo").expect("pods")[0]["metadata"]["uid"].clone();
    let before = uid();
    let edit = r#"{"spec": {"template": {"spec": {"containers": [{"name": "server", "readinessProbe": {"periodSeconds": 7}}]}}}}"#;
    scene
        .kubectl(&["patch", "deployment", "demo", "-p", edit])
        .expect("edited");
    let template = || {
        scene
            .get(&["deployment", "demo"])
            .map(|d| d["spec"]["template"].clone())
    };
    scene.until("the probe is as it was", 30, || {
        let period =
            template()?["spec"]["containers"][0]["readinessProbe"]["periodSeconds"].clone();
        Ok(if period == 2 {
            Seen::Yes(())
        } else {
            Seen::NotYet(period.to_string())
        })
    });
    scene.await_ready("demo");
    assert_eq!(uid(), before, "the pod from before the edit serves on");

    scene
        .kubectl(&["rollout", "restart", "deployment", "demo"])
        .expect("restarted");
    scene.until("another pod serves", 90, || {
        let pods = scene.pods("demo")?;
        let others = pods.iter().all(|pod| pod["metadata"]["uid"] != before);
        Ok(if others {
            Seen::Yes(())
        } else {
            Seen::NotYet("the old one".into())
        })
    });
    scene.await_ready("demo");
    let annotations = template().expect("the template")["metadata"]["annotations"].clone();
    assert!(
        !annotations["kubectl.kubernetes.io/restartedAt"].is_null(),
        "what kubectl added stays: {annotations}"
    );
}
