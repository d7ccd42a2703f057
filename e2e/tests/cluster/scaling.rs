//! The number of replicas under real load: up in one decision, down when idle, and never at the cost of an
//! answer.

use crate::endpoint_drain::EndpointDrain;
use crate::kvasir;
use crate::test_namespace::{Clients, TestNamespace, demo};
use kvasir_e2e::cluster::Cluster;
use kvasir_e2e::command::run;
use kvasir_e2e::wait::Seen;
use serde_json::Value;
use std::time::{Duration, Instant};

const SMALL: &str = "  engine: {maxNumSeqs: 2}\n  \
    resources: {requests: {cpu: 50m, memory: 128Mi}, limits: {memory: 1Gi}}\n  ";

/// The Events about the deployment itself with this reason, by their messages.
fn events(ns: &TestNamespace, reason: &str) -> Vec<String> {
    let events = ns.get(&["events"]).expect("events");
    let events = events["items"].as_array().cloned().unwrap_or_default();
    events
        .iter()
        .filter(|event| event["involvedObject"]["kind"] == "LLMDeployment")
        .filter(|event| event["reason"] == reason)
        .map(|event| event["message"].as_str().unwrap_or_default().to_owned())
        .collect()
}

#[test]
fn load_takes_one_replica_to_three_in_one_decision_and_idleness_takes_them_back() {
    let Some(cluster) = kvasir() else { return };
    let ns = TestNamespace::new(cluster, "autoscale");
    // Longer than any answer: replicas that are taken away while the last clients finish break no stream.
    let spec = |owner: &str| demo("demo", &format!("{SMALL}drainSeconds: 180\n  {owner}"));
    ns.apply(&spec("replicas: 1")).expect("accepted");
    ns.await_ready("demo");
    // Of 24 clients 2 run and 22 wait, or a few less between two answers: work for 15 replicas of two slots, of which 3 are
    // allowed. Long answers keep the clients waiting for the server and not the other way round, and the autoscaler first
    // looks once all of them are there, so that it is one decision.
    let clients = ns.start_clients("demo", 24, 1_500);
    let pod = ns.pods("demo").expect("pods").remove(0);
    ns.until("every client is there", 60, || {
        let report = ns.load_report(&pod["metadata"]["name"])?;
        let n_waiting = report["queue"]["waiting"].as_u64().unwrap_or_default();
        Ok(match n_waiting {
            21.. => Seen::Yes(()),
            n => Seen::NotYet(format!("{n} waiting")),
        })
    });
    let policy = "maxReplicas: 3, targetQueueDepth: 8, scaleDownStabilizationSeconds: 5";
    ns.apply(&spec(&format!(
        "replicas: 1\n  autoscaling: {{mode: Observe, {policy}}}"
    )))
    .expect("accepted");
    let object = ns.await_deployment("what would be decided is told", "demo", 60, |object| {
        object["status"]["autoscaling"]["desiredReplicas"] == 3
    });
    let told = &object["status"]["autoscaling"];
    assert_eq!(told["bindingConstraint"], "Slots", "{told}");
    assert!(events(&ns, "WouldScale")[0].contains("from 1 to 3"));
    let child = ns.get(&["deployment", "demo"]).expect("the Deployment");
    assert_eq!(child["spec"]["replicas"], 1, "and not done");
    ns.apply(&spec(&format!("autoscaling: {{{policy}}}")))
        .expect("accepted");
    let object = ns.await_deployment("a number is decided", "demo", 60, |object| {
        object["status"]["lastScaling"].is_object()
    });
    let scaling = &object["status"]["lastScaling"];
    assert_eq!(
        (&scaling["from"], &scaling["to"]),
        (&1.into(), &3.into()),
        "{scaling}"
    );
    assert_eq!(
        events(&ns, "ScaledUp"),
        [scaling["reason"].as_str().expect("text")],
        "the decision is one Event, in the status' words"
    );
    ns.await_deployment("three replicas serve", "demo", 90, |object| {
        object["status"]["readyReplicas"] == 3
    });
    assert_eq!(
        events(&ns, "ScaledUp").len(),
        1,
        "more replicas wait for nobody: it stays at three"
    );
    Clients::finish(vec![clients]).assert_whole();
    let object = ns.await_deployment("one replica is left", "demo", 120, |object| {
        object["status"]["lastScaling"]["to"] == 1 && object["status"]["replicas"] == 1
    });
    let reason = object["status"]["lastScaling"]["reason"].as_str();
    let told = events(&ns, "ScaledDown");
    assert!(
        told.iter().any(|message| Some(message.as_str()) == reason),
        "the last decision is an Event too: {reason:?}, {told:?}"
    );
}

/// Sends a signal to the program in a pod, and waits until the kernel shows its main thread in this state (proc(5)).
pub(crate) fn signal(cluster: &Cluster, pod: &Value, signal: &str, state: &str) {
    let id = pod["status"]["containerStatuses"][0]["containerID"]
        .as_str()
        .expect("an id")
        .trim_start_matches("containerd://");
    let node = cluster
        .nodes()
        .iter()
        .find(|node| pod["spec"]["nodeName"] == node.name().as_str())
        .expect("its node");
    let script = "pid=$(ctr -n k8s.io task ls | awk -v id=$1 '$1 == id {print $2}'); kill -$2 $pid; \
        timeout 5 bash -c \"until grep -q '^State:.[$3]' /proc/$pid/status; do :; done\"";
    let args = ["-c", script, "signal", id, signal, state];
    run(node.command("bash").args(args)).expect("signalled");
}

#[test]
fn a_server_that_hangs_counts_as_full_and_keeps_its_replica() {
    let Some(cluster) = kvasir() else { return };
    let ns = TestNamespace::new(cluster, "hang");
    let spec = |low: u32| {
        demo(
            "demo",
            &format!(
                "{SMALL}autoscaling: {{minReplicas: {low}, maxReplicas: 3, scaleDownStabilizationSeconds: 3}}"
            ),
        )
    };
    ns.apply(&spec(2)).expect("accepted");
    ns.await_deployment("two replicas serve", "demo", 90, |object| {
        object["status"]["readyReplicas"] == 2
    });
    let pod = ns.pods("demo").expect("pods").remove(0);
    signal(cluster, &pod, "STOP", "T");
    // Both are idle, and one is enough from here on, if only the other one said so.
    ns.apply(&spec(1)).expect("accepted");
    // Several of the autoscaler's rounds and windows, and less than a failing liveness probe takes to restart the server.
    let end = Instant::now() + Duration::from_secs(15);
    while Instant::now() < end {
        let child = ns.get(&["deployment", "demo"]).expect("the Deployment");
        assert_eq!(
            child["spec"]["replicas"], 2,
            "a silent replica is no reason to scale"
        );
        std::thread::sleep(Duration::from_millis(250));
    }
    // Its readiness probe goes unanswered, which the status says meanwhile.
    let object = ns.await_deployment("the status tells the probe", "demo", 30, |object| {
        object["status"]["notReady"][0]["reason"] == "ProbeFailing"
    });
    assert!(
        object["status"]["lastScaling"].is_null(),
        "no decision was made: {}",
        object["status"]
    );
    let told = object["status"]["notReady"][0]["message"].to_string();
    assert!(
        told.contains("probe failed"),
        "the kubelet is quoted: {told}"
    );
    // It was the silence that held the number: once the server answers again, one replica goes.
    signal(cluster, &pod, "CONT", "RS");
    // The window is at least twice what a replica needs to start.
    ns.await_deployment("one replica is wanted", "demo", 120, |object| {
        object["status"]["lastScaling"]["to"] == 1
    });
}

#[test]
fn fewer_replicas_and_a_rolling_update_break_no_stream() {
    let Some(cluster) = kvasir() else { return };
    let ns = TestNamespace::new(cluster, "rollout");
    let spec = |replicas: u32, variable: &str| {
        let env = format!("{{env: [{{name: KVASIR_E2E, value: {variable}}}]}}");
        demo(
            "demo",
            &format!(
                "  drainSeconds: 60\n  replicas: {replicas}\n  engine: {env}\n  \
             resources: {{requests: {{cpu: 50m, memory: 128Mi}}, limits: {{memory: 1Gi}}}}"
            ),
        )
    };
    ns.apply(&spec(3, "before")).expect("accepted");
    ns.await_deployment("three replicas serve", "demo", 120, |object| {
        object["status"]["readyReplicas"] == 3
    });
    let label = "kvasir.dev/llmdeployment=demo";
    let mut clients = Vec::new();
    ns.occupy("demo", label, 1_500, &mut clients);
    let drain = EndpointDrain::watch(&ns, label, "demo");
    ns.apply(&spec(2, "before")).expect("accepted");
    ns.until("two pods are left", 120, || {
        let pods = ns.get(&["pods", "-l", label])?;
        let n_pods = pods["items"].as_array().map_or(0, Vec::len);
        Ok(if n_pods == 2 {
            Seen::Yes(())
        } else {
            Seen::NotYet(format!("{n_pods} pods"))
        })
    });
    let old: Vec<String> = ns
        .pods("demo")
        .expect("pods")
        .iter()
        .map(|pod| pod["metadata"]["uid"].to_string())
        .collect();
    ns.occupy("demo", label, 1_500, &mut clients);
    ns.apply(&spec(2, "after")).expect("accepted");
    ns.until("every pod is a new one", 180, || {
        let pods = ns.get(&["pods", "-l", label])?;
        let pods = pods["items"].as_array().cloned().unwrap_or_default();
        let n_old = pods
            .iter()
            .filter(|pod| old.contains(&pod["metadata"]["uid"].to_string()))
            .count();
        Ok(if n_old == 0 {
            Seen::Yes(())
        } else {
            Seen::NotYet(format!("{n_old} old pods"))
        })
    });
    let answers = Clients::finish(clients);
    answers.assert_whole();
    drain.assert_outlasted(3, &answers);
}
