//! The number of replicas under real load: up in one decision, down when idle, and never at the cost of an
//! answer.

use crate::departures::Departures;
use crate::kvasir;
use crate::scene::{Load, Scene, condition, demo};
use kvasir_e2e::command::run;
use kvasir_e2e::wait::Seen;
use std::time::{Duration, Instant};

#[test]
fn load_takes_one_replica_to_three_in_one_decision_and_idleness_takes_them_back() {
    let Some(cluster) = kvasir() else { return };
    let scene = Scene::new(cluster, "autoscale");
    let spec = "  drainSeconds: 5\n  engine: {maxNumSeqs: 2}\n  \
        autoscaling: {minReplicas: 1, maxReplicas: 3, targetQueueDepth: 2, scaleDownStabilizationSeconds: 5}\n  \
        resources: {requests: {cpu: 50m, memory: 128Mi}, limits: {memory: 1Gi}}";
    scene.apply(&demo("demo", spec)).expect("accepted");
    scene.await_ready("demo");
    let load = scene.load("demo", 24, 400);
    let object = scene.await_deployment("three replicas are wanted", "demo", 60, |object| {
        object["status"]["lastScaling"]["to"] == 3
    });
    assert_eq!(
        object["status"]["lastScaling"]["from"], 1,
        "in one decision: {}",
        object["status"]
    );
    scene.await_deployment("three replicas serve", "demo", 90, |object| {
        object["status"]["readyReplicas"] == 3
    });
    Load::end(vec![load]).assert_whole();
    scene.await_deployment("one replica is left", "demo", 120, |object| {
        object["status"]["lastScaling"]["to"] == 1 && object["status"]["replicas"] == 1
    });
    let events = scene.get(&["events"]).expect("events").to_string();
    assert!(
        events.contains("LLMDeployment"),
        "each decision is an Event of the deployment"
    );
}

#[test]
fn a_server_that_hangs_changes_no_number() {
    let Some(cluster) = kvasir() else { return };
    let scene = Scene::new(cluster, "hang");
    let spec = "  drainSeconds: 5\n  \
        autoscaling: {minReplicas: 1, maxReplicas: 3, scaleDownStabilizationSeconds: 1}\n  \
        resources: {requests: {cpu: 50m, memory: 128Mi}, limits: {memory: 1Gi}}";
    scene.apply(&demo("demo", spec)).expect("accepted");
    scene.await_ready("demo");
    let pod = scene.pods("demo").expect("pods").remove(0);
    let id = pod["status"]["containerStatuses"][0]["containerID"]
        .as_str()
        .expect("an id")
        .to_owned();
    let id = id.trim_start_matches("containerd://");
    let node = cluster
        .nodes()
        .iter()
        .find(|node| pod["spec"]["nodeName"] == node.name().as_str())
        .expect("its node");
    let stop = "pid=$(ctr -n k8s.io task ls | awk -v id=$1 '$1 == id {print $2}'); kill -STOP $pid; timeout 5 bash -c \"until grep -q '^State:.T' /proc/$pid/status; do :; done\"";
    run(node.command("bash").args(["-c", stop, "stop", id])).expect("stopped");
    // Several of the autoscaler's rounds, and less than a failing liveness probe takes to restart the server.
    let end = Instant::now() + Duration::from_secs(8);
    while Instant::now() < end {
        let wanted =
            scene.get(&["deployment", "demo"]).expect("the Deployment")["spec"]["replicas"].clone();
        assert_eq!(wanted, 1, "a silent replica is no reason to scale");
    }
    let object = scene
        .get(&["llmdeployment", "demo"])
        .expect("the deployment");
    assert!(
        object["status"]["lastScaling"].is_null(),
        "no decision was made: {}",
        object["status"]
    );
    // Its readiness probe goes unanswered, which is what the status says until the kubelet starts it again.
    let object = scene.await_deployment("the status tells the probe", "demo", 40, |object| {
        object["status"]["notReady"][0]["reason"] == "ProbeFailing"
    });
    let told = condition(&object, "Ready")["message"].to_string();
    assert!(
        told.contains("probe failed"),
        "the kubelet is quoted: {told}"
    );
}

#[test]
fn fewer_replicas_and_a_rolling_update_break_no_stream() {
    let Some(cluster) = kvasir() else { return };
    let scene = Scene::new(cluster, "rollout");
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
    scene.apply(&spec(3, "before")).expect("accepted");
    scene.await_deployment("three replicas serve", "demo", 120, |object| {
        object["status"]["readyReplicas"] == 3
    });
    let label = "kvasir.dev/llmdeployment=demo";
    let mut loads = Vec::new();
    scene.occupy("demo", label, 1_500, &mut loads);
    let departures = Departures::watch(&scene, label, "demo");
    scene.apply(&spec(2, "before")).expect("accepted");
    scene.until("two pods are left", 120, || {
        let pods = scene.get(&["pods", "-l", label])?;
        let n_pods = pods["items"].as_array().map_or(0, Vec::len);
        Ok(if n_pods == 2 {
            Seen::Yes(())
        } else {
            Seen::NotYet(format!("{n_pods} pods"))
        })
    });
    let old: Vec<String> = scene
        .pods("demo")
        .expect("pods")
        .iter()
        .map(|pod| pod["metadata"]["uid"].to_string())
        .collect();
    scene.occupy("demo", label, 1_500, &mut loads);
    scene.apply(&spec(2, "after")).expect("accepted");
    scene.until("every pod is a new one", 180, || {
        let pods = scene.get(&["pods", "-l", label])?;
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
    let answers = Load::end(loads);
    answers.assert_whole();
    departures.assert_outlasted(3, &answers);
}
