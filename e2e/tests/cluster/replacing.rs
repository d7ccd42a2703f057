//! Which replica goes when there are to be fewer, and what runs when a new revision can't.

use crate::kvasir;
use crate::test_namespace::{Clients, TestNamespace, condition, demo};
use kvasir_e2e::wait::Seen;

#[test]
fn the_replica_that_is_least_busy_goes() {
    let Some(cluster) = kvasir() else { return };
    let ns = TestNamespace::new(cluster, "victim");
    let rest = "  replicas: 3\n  drainSeconds: 60\n  engine: {maxNumSeqs: 8}\n  \
        resources: {requests: {cpu: 50m, memory: 128Mi}, limits: {memory: 1Gi}}";
    ns.apply(&demo("demo", rest)).expect("accepted");
    ns.await_deployment("three replicas serve", "demo", 90, |object| {
        object["status"]["readyReplicas"] == 3
    });
    // Kubernetes by itself would take the youngest, and of those of one age by chance.
    let busy = ns.pods("demo").expect("pods").remove(1);
    let name = busy["metadata"]["name"].clone();
    let address = busy["status"]["podIP"].as_str().expect("an address");
    let clients = ns.start_clients_at(&format!("http://{address}:8000/v1"), 4, 1_500);
    ns.until("it is busy", 60, || {
        let running = ns.load_report(&name)?["queue"]["running"]
            .as_u64()
            .unwrap_or(0);
        Ok(match running {
            4 => Seen::Yes(()),
            n => Seen::NotYet(format!("{n} running")),
        })
    });
    ns.kubectl(&["scale", "llmdeployment", "demo", "--replicas=1"])
        .expect("scaled");
    let left = ns.until("one is left", 60, || {
        let pods = ns.pods("demo")?;
        Ok(match pods.as_slice() {
            [pod] => Seen::Yes(pod["metadata"].clone()),
            pods => Seen::NotYet(format!("{} pods", pods.len())),
        })
    });
    assert_eq!(left["name"], name, "the busy one stays");
    let cost = left["annotations"]["controller.kubernetes.io/pod-deletion-cost"].as_str();
    let tokens: i32 = cost.and_then(|cost| cost.parse().ok()).expect("its cost");
    assert!(tokens > 0, "not by chance: {left}");
    Clients::finish(vec![clients]).assert_whole();
}

#[test]
fn a_revision_that_cannot_run_goes_back_to_the_last_that_could() {
    let Some(cluster) = kvasir() else { return };
    let ns = TestNamespace::new(cluster, "back");
    let spec = |engine: &str| {
        let resources = "resources: {requests: {cpu: 50m, memory: 128Mi}, limits: {memory: 1Gi}}";
        demo(
            "demo",
            &format!("  replicas: 1\n  drainSeconds: 5\n  {resources}\n  engine: {engine}"),
        )
    };
    ns.apply(&spec("{maxNumSeqs: 4}")).expect("accepted");
    let object = ns.await_deployment("the first revision is whole", "demo", 120, |object| {
        let status = &object["status"];
        condition(object, "Ready")["status"] == "True"
            && status["currentRevision"] == status["updateRevision"]
    });
    let first = object["status"]["currentRevision"].clone();
    ns.apply(&spec("{extraArgs: [--no-such-flag]}"))
        .expect("accepted");
    let object = ns.await_deployment("it went back", "demo", 240, |object| {
        condition(object, "Stalled")["reason"] == "RolledBack"
    });
    let told = condition(&object, "Stalled")["message"].to_string();
    assert!(told.contains("--no-such-flag"), "{told}");
    assert_eq!(
        condition(&object, "Available")["status"],
        "True",
        "{object}"
    );
    assert_eq!(object["status"]["currentRevision"], first, "{object}");
    assert_ne!(object["status"]["updateRevision"], first, "{object}");
    assert_eq!(
        object["spec"]["engine"]["extraArgs"][0], "--no-such-flag",
        "the spec is the user's"
    );
    ns.until("the pods are the first revision's", 60, || {
        let pods = ns.pods("demo")?;
        let is_first =
            |pod: &serde_json::Value| pod["metadata"]["labels"]["kvasir.dev/revision"] == first;
        Ok(match pods.iter().all(is_first) {
            true => Seen::Yes(()),
            false => Seen::NotYet(format!("{} pods", pods.len())),
        })
    });
    let said = ns.ask("demo", "What is a block table?");
    assert!(
        said["answer"].as_str().expect("text").contains("block"),
        "{said}"
    );
    ns.apply(&spec("{maxNumSeqs: 8}")).expect("accepted");
    let object = ns.await_ready("demo");
    assert!(condition(&object, "Stalled").is_null(), "{object}");
}
