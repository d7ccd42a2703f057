//! Deployments that ask for GPUs, on nodes that have none: the status says what stands in the way, in the
//! words of whoever knows. A node offers GPUs when its status says so; no device is needed to be scheduled.

use crate::kvasir;
use crate::test_namespace::{TestNamespace, condition, demo};
use kvasir_e2e::command::run;
use kvasir_e2e::wait::Seen;

const GPU: &str = "  replicas: 1\n  drainSeconds: 5\n  resources: {requests: {cpu: 50m}, limits: {nvidia.com/gpu: 1}}";

#[test]
fn the_example_is_accepted_and_the_claim_that_it_lacks_is_named() {
    let Some(cluster) = kvasir() else { return };
    let ns = TestNamespace::new(cluster, "gpu-example");
    ns.apply(include_str!("../../examples/gpu.yaml"))
        .expect("accepted");
    let object = ns.await_deployment("the status names the claim", "llama", 60, |object| {
        let message = &object["status"]["notReady"][0]["message"];
        let named = "persistentvolumeclaim \"models\" not found";
        message.as_str().is_some_and(|m| m.contains(named))
    });
    assert_eq!(condition(&object, "Accepted")["status"], "True");
}

#[test]
fn the_scheduler_is_quoted_until_capacity_appears_and_then_the_server() {
    let Some(cluster) = kvasir() else { return };
    let ns = TestNamespace::new(cluster, "gpu");
    ns.apply(&demo("large", GPU)).expect("accepted");
    ns.await_deployment("the status quotes the scheduler", "large", 60, |object| {
        object["status"]
            .to_string()
            .contains("Insufficient nvidia.com/gpu")
    });

    let offer = r#"[{"op": "add", "path": "/status/capacity/nvidia.com~1gpu", "value": "8"}]"#;
    run(cluster.kubectl().args([
        "patch",
        "node",
        "node-2",
        "--subresource=status",
        "--type=json",
        "-p",
        offer,
    ]))
    .expect("the node offers GPUs");
    let pod = ns.until("the pod is scheduled", 60, || {
        let pod = ns
            .pods("large")?
            .into_iter()
            .find(|pod| pod["spec"]["nodeName"] == "node-2");
        Ok(pod.map_or_else(|| Seen::NotYet("no pod on node-2".into()), Seen::Yes))
    });
    let container = &pod["spec"]["containers"][0];
    assert_eq!(container["resources"]["requests"]["nvidia.com/gpu"], "1");
    let args = container["args"].to_string();
    assert!(
        args.contains("cuda"),
        "the server is told to use the GPU: {args}"
    );
    // It never falls back to the CPU: it says why it cannot run, and the status repeats the whole sentence.
    let pod = pod["metadata"]["name"].as_str().expect("a name");
    let sentence = ns.last_line(pod);
    assert!(
        sentence.to_lowercase().contains("cuda"),
        "the server says what it lacks: {sentence}"
    );
    let object = ns.await_deployment("the status quotes the server", "large", 90, |object| {
        let message = &object["status"]["notReady"][0]["message"];
        message.as_str().is_some_and(|m| m.ends_with(&sentence))
    });
    let told = condition(&object, "Ready")["message"].to_string();
    assert!(
        told.contains(&sentence) && !told.contains("Insufficient"),
        "the scheduler's words are gone: {told}"
    );
    assert_eq!(object["status"]["readyReplicas"], 0);
}
