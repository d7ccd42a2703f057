//! What is refused of an LLMDeployment, in our words: by the rules of the CRD alone, and by an operator that can't read
//! what was stored under other rules; in the API server's own, where it refuses what is made from it.

use crate::test_namespace::{TestNamespace, condition, demo};
use crate::{kvasir, release};
use kvasir_e2e::command::run;
use kvasir_e2e::wait::Seen;

const SMALL: &str =
    "drainSeconds: 5\n  resources: {requests: {cpu: 50m, memory: 128Mi}, limits: {memory: 1Gi}}";

#[test]
fn contradictions_and_a_second_owner_of_the_replicas_are_refused() {
    let Some(cluster) = kvasir() else { return };
    let ns = TestNamespace::new(cluster, "refusals");
    let both = "  replicas: 1\n  autoscaling: {maxReplicas: 3}";
    for (why, rest) in [
        ("both set the number of replicas", both),
        ("nothing does", ""),
    ] {
        let error = ns.apply(&demo("demo", rest)).expect_err(why).to_string();
        assert!(
            error.contains("spec.replicas must be set exactly where"),
            "{why}: {error}"
        );
    }
    let gpus = "  replicas: 1\n  resources: {limits: {nvidia.com/gpu: 2}}";
    let error = ns.apply(&demo("demo", gpus)).expect_err("two GPUs");
    assert!(
        error.to_string().contains("nvidia.com/gpu must be 1"),
        "{error}"
    );
    let unlimited = "  replicas: 1\n  resources: {requests: {nvidia.com/gpu: 1}}";
    let error = ns.apply(&demo("demo", unlimited)).expect_err("no limit");
    assert!(
        error
            .to_string()
            .contains("must be in resources.limits too"),
        "{error}"
    );
    ns.apply(&demo("owned", "  autoscaling: {maxReplicas: 3}"))
        .expect("autoscaling is accepted");
    let error = ns
        .kubectl(&["scale", "llmdeployment", "owned", "--replicas=2"])
        .expect_err("refused");
    assert!(
        error
            .to_string()
            .contains("the operator owns the number of replicas"),
        "{error}"
    );
}

#[test]
fn an_object_that_the_operator_cannot_read_says_why_and_stops_no_other() {
    let Some(cluster) = kvasir() else { return };
    let ns = TestNamespace::new(cluster, "unreadable");
    let scaled = |low: u32| {
        let spec = format!("  autoscaling: {{minReplicas: {low}, maxReplicas: 2}}\n  {SMALL}");
        demo("newer", &spec)
    };
    // The rules of a version that scales to zero, until the object is stored.
    let minimum = |n: u32| {
        let path = "/spec/versions/0/schema/openAPIV3Schema/properties/spec/properties/autoscaling/properties/minReplicas/minimum";
        let patch = format!(r#"[{{"op": "replace", "path": "{path}", "value": {n}}}]"#);
        let crd = [
            "patch",
            "crd",
            "llmdeployments.kvasir.dev",
            "--type=json",
            "-p",
            &patch,
        ];
        run(cluster.kubectl().args(crd)).expect("the rules are changed");
    };
    {
        let _alone = release();
        minimum(0);
        ns.until("the API server stores it", 30, || {
            Ok(match ns.apply(&scaled(0)) {
                Ok(_) => Seen::Yes(()),
                Err(refused) => Seen::NotYet(refused.to_string()),
            })
        });
        minimum(1);
    }
    let object = ns.await_deployment(
        "the status says what can't be read",
        "newer",
        30,
        |object| condition(object, "Accepted")["reason"] == "InvalidSpec",
    );
    let told = condition(&object, "Accepted")["message"].to_string();
    assert!(told.contains("spec.autoscaling.minReplicas"), "{told}");

    ns.apply(&demo("other", &format!("  replicas: 1\n  {SMALL}")))
        .expect("accepted");
    ns.await_ready("other");
    ns.apply(&scaled(1)).expect("mended");
    ns.await_ready("newer");
}

#[test]
fn what_the_api_server_refuses_is_told_and_what_runs_is_scaled() {
    let Some(cluster) = kvasir() else { return };
    let ns = TestNamespace::new(cluster, "refused");
    // A generator's template, and a cluster that chooses the group itself.
    let spec = |low: u32, request: &str| {
        demo(
            "demo",
            &format!(
                "  autoscaling: {{minReplicas: {low}, maxReplicas: 3}}\n  drainSeconds: 5\n  \
                 resources: {{requests: {{cpu: 50m, memory: {request}}}, limits: {{memory: 1Gi}}}}\n  \
                 podTemplate: {{metadata: {{creationTimestamp: null}}, spec: {{securityContext: {{fsGroup: null}}}}}}"
            ),
        )
    };
    ns.apply(&spec(1, "128Mi")).expect("accepted");
    ns.await_ready("demo");
    let pod = ns.pods("demo").expect("pods").remove(0);
    let context = &pod["spec"]["securityContext"];
    assert_eq!(context["runAsUser"], 65_532, "{context}");
    assert!(context["fsGroup"].is_null(), "{context}");

    // The rules know nothing of it, the API server does.
    ns.apply(&spec(2, "2Gi")).expect("accepted by the rules");
    let object = ns.await_deployment("the refusal is told", "demo", 30, |object| {
        condition(object, "Accepted")["reason"] == "ChildRefused"
    });
    let sentence = condition(&object, "Accepted")["message"].clone();
    let words = "must be less than or equal to memory limit";
    assert!(
        sentence.as_str().expect("text").contains(words),
        "{sentence}"
    );
    for (kind, status) in [
        ("Stalled", "True"),
        ("Ready", "False"),
        ("Available", "True"),
    ] {
        assert_eq!(condition(&object, kind)["status"], status, "{kind}");
    }
    ns.await_deployment("what runs is scaled", "demo", 60, |object| {
        object["status"]["readyReplicas"] == 2
    });
    let uids: Vec<_> = ns.pods("demo").expect("pods");
    assert!(
        uids.iter()
            .any(|other| other["metadata"]["uid"] == pod["metadata"]["uid"]),
        "and not replaced"
    );
    let events = ns
        .get(&["events", "--field-selector=reason=ChildRefused"])
        .expect("events");
    let events = events["items"].as_array().cloned().unwrap_or_default();
    assert_eq!(events.len(), 1, "told once: {events:?}");
    assert_eq!(events[0]["message"], sentence);
    ns.apply(&spec(1, "64Mi")).expect("mended");
    let object = ns.await_ready("demo");
    assert_eq!(condition(&object, "Accepted")["status"], "True");
}
