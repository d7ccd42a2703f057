//! A deployment from apply to delete, and what an upgrade of the operator leaves alone.

use crate::test_namespace::{TestNamespace, condition, demo};
use crate::{kvasir, next_reference, release};
use kvasir_e2e::command::run;
use kvasir_e2e::quickstart::{self, SYSTEM};
use kvasir_e2e::wait::Seen;
use std::collections::BTreeSet;

const ONE: &str = "  replicas: 1\n  drainSeconds: 5\n  resources: {requests: {cpu: 50m, memory: 128Mi}, limits: {memory: 1Gi}}";

#[test]
fn a_deployment_answers_and_its_deletion_leaves_nothing() {
    let Some(cluster) = kvasir() else { return };
    let ns = TestNamespace::new(cluster, "answers");
    ns.apply(&demo("demo", ONE)).expect("accepted");
    let object = ns.await_ready("demo");
    assert_eq!(object["status"]["readyReplicas"], 1);
    let said = ns.ask("demo", "What is a block table?");
    assert!(
        said["pieces"].as_array().expect("pieces").len() > 3,
        "the answer came in pieces: {said}"
    );
    assert!(
        said["answer"].as_str().expect("text").contains("block"),
        "the answer is about blocks: {said}"
    );

    ns.kubectl(&["delete", "llmdeployment", "demo"])
        .expect("deleted");
    ns.until("nothing is left", 60, || {
        let kinds = "deployments,replicasets,pods,services,endpointslices,poddisruptionbudgets,serviceaccounts";
        let left = ns.get(&[kinds])?;
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
    let ns = TestNamespace::new(cluster, "going");
    ns.apply(&demo("demo", ONE)).expect("accepted");
    ns.await_ready("demo");
    // An upgrade would replace the operator, and its log.
    let _alone = release();
    ns.kubectl(&["delete", "namespace", "going", "--timeout=90s"])
        .expect("deleted");
    let operators = [
        "logs",
        "-l",
        "app.kubernetes.io/name=kvasir-operator",
        "--tail=-1",
    ];
    let operators = [&operators[..], &["--namespace", SYSTEM]].concat();
    let log = run(cluster.kubectl().args(operators)).expect("their logs");
    let told: Vec<_> = log
        .lines()
        .filter(|line| line.contains("WARN") && line.contains("going"))
        .collect();
    assert!(told.is_empty(), "{told:?}");
}

#[test]
fn kubectl_scale_reaches_the_pods() {
    let Some(cluster) = kvasir() else { return };
    let ns = TestNamespace::new(cluster, "scale");
    ns.apply(&demo("fixed", ONE)).expect("accepted");
    ns.kubectl(&["scale", "llmdeployment", "fixed", "--replicas=2"])
        .expect("scaled");
    ns.await_deployment("two replicas serve", "fixed", 90, |object| {
        object["status"]["readyReplicas"] == 2
    });
    // One more has no place: what serves is still what was asked for, only less of it.
    let quota =
        "apiVersion: v1\nkind: ResourceQuota\nmetadata: {name: two}\nspec: {hard: {pods: 2}}";
    ns.apply(quota).expect("accepted");
    ns.until("the quota counts", 30, || {
        let used = ns.get(&["resourcequota", "two"])?["status"]["used"]["pods"].clone();
        Ok(if used == "2" {
            Seen::Yes(())
        } else {
            Seen::NotYet(used.to_string())
        })
    });
    ns.kubectl(&["scale", "llmdeployment", "fixed", "--replicas=3"])
        .expect("scaled");
    let object = ns.await_deployment("the quota is told", "fixed", 60, |object| {
        condition(object, "CapacityUnavailable")["reason"] == "PodRefused"
    });
    let told = condition(&object, "CapacityUnavailable")["message"].to_string();
    assert!(told.contains("exceeded quota"), "{told}");
    assert_eq!(condition(&object, "Ready")["status"], "True", "{object}");
    assert!(condition(&object, "Stalled").is_null(), "{object}");
    ns.kubectl(&["scale", "llmdeployment", "fixed", "--replicas=0"])
        .expect("scaled");
    // Until the Deployment has seen its new number, Ready is False for the same reason.
    let object = ns.await_deployment("nothing runs, as asked", "fixed", 60, |object| {
        let ready = condition(object, "Ready");
        ready["reason"] == "ScaledToZero" && ready["status"] == "True"
    });
    assert_eq!(condition(&object, "Available")["reason"], "ScaledToZero");
    assert_eq!(condition(&object, "Available")["status"], "False");
    assert!(condition(&object, "Reconciling").is_null(), "{object}");
}

#[test]
fn a_killed_pod_is_replaced() {
    let Some(cluster) = kvasir() else { return };
    let ns = TestNamespace::new(cluster, "replaced");
    ns.apply(&demo("demo", ONE)).expect("accepted");
    ns.await_ready("demo");
    let pods = ns.pods("demo").expect("pods");
    let killed = pods[0]["metadata"]["name"]
        .as_str()
        .expect("a name")
        .to_owned();
    ns.kubectl(&["delete", "pod", &killed, "--grace-period=0", "--force"])
        .expect("killed");
    ns.until("another pod serves", 90, || {
        let ready = ns.get(&["llmdeployment", "demo"])?["status"]["readyReplicas"] == 1;
        let other = ns
            .pods("demo")?
            .iter()
            .all(|pod| pod["metadata"]["name"] != killed.as_str());
        Ok(if ready && other {
            Seen::Yes(())
        } else {
            Seen::NotYet("not yet".into())
        })
    });
    ns.ask("demo", "What is a block table?");
}

#[test]
fn an_upgrade_of_the_operator_rolls_no_pod() {
    let Some(cluster) = kvasir() else { return };
    let ns = TestNamespace::new(cluster, "upgrade");
    ns.apply(&demo("demo", ONE)).expect("accepted");
    ns.await_ready("demo");
    let uids = || -> BTreeSet<String> {
        let pods = ns.pods("demo").expect("pods");
        pods.iter()
            .map(|pod| pod["metadata"]["uid"].to_string())
            .collect()
    };
    let before = uids();
    let _alone = release();
    quickstart::install(&cluster.access(), &next_reference()).expect("upgraded");
    // A change that only the new operator can have made shows that it has looked at the deployment.
    ns.kubectl(&["scale", "llmdeployment", "demo", "--replicas=2"])
        .expect("scaled");
    ns.await_deployment("two replicas serve", "demo", 120, |object| {
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
    let ns = TestNamespace::new(cluster, "edited");
    ns.apply(&demo("demo", ONE)).expect("accepted");
    ns.await_ready("demo");
    let uid = || ns.pods("demo").expect("pods")[0]["metadata"]["uid"].clone();
    let before = uid();
    let edit = r#"{"spec": {"template": {"spec": {"containers": [{"name": "server", "readinessProbe": {"periodSeconds": 7}}]}}}}"#;
    ns.kubectl(&["patch", "deployment", "demo", "-p", edit])
        .expect("edited");
    let template = || {
        ns.get(&["deployment", "demo"])
            .map(|d| d["spec"]["template"].clone())
    };
    ns.until("the probe is as it was", 30, || {
        let period =
            template()?["spec"]["containers"][0]["readinessProbe"]["periodSeconds"].clone();
        Ok(if period == 2 {
            Seen::Yes(())
        } else {
            Seen::NotYet(period.to_string())
        })
    });
    ns.await_ready("demo");
    assert_eq!(uid(), before, "the pod from before the edit serves on");

    ns.kubectl(&["rollout", "restart", "deployment", "demo"])
        .expect("restarted");
    ns.until("another pod serves", 90, || {
        let pods = ns.pods("demo")?;
        let others = pods.iter().all(|pod| pod["metadata"]["uid"] != before);
        Ok(if others {
            Seen::Yes(())
        } else {
            Seen::NotYet("the old one".into())
        })
    });
    ns.await_ready("demo");
    let annotations = template().expect("the template")["metadata"]["annotations"].clone();
    assert!(
        !annotations["kubectl.kubernetes.io/restartedAt"].is_null(),
        "what kubectl added stays: {annotations}"
    );
}
