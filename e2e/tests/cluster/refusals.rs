//! What the API server refuses of an LLMDeployment, in our words, by the rules of the CRD alone.

use crate::kvasir;
use crate::scene::{Scene, demo};

#[test]
fn contradictions_and_a_second_owner_of_the_replicas_are_refused() {
    let Some(cluster) = kvasir() else { return };
    let scene = Scene::new(cluster, "refusals");
    let both = "  replicas: 1\n  autoscaling: {maxReplicas: 3}";
    for (why, rest) in [
        ("both set the number of replicas", both),
        ("nothing does", ""),
    ] {
        let error = scene.apply(&demo("demo", rest)).expect_err(why).to_string();
        assert!(
            error.contains("exactly one of spec.replicas and spec.autoscaling must be set"),
            "{why}: {error}"
        );
    }
    scene
        .apply(&demo("owned", "  autoscaling: {maxReplicas: 3}"))
        .expect("autoscaling is accepted");
    let error = scene
        .kubectl(&["scale", "llmdeployment", "owned", "--replicas=2"])
        .expect_err("refused");
    assert!(
        error
            .to_string()
            .contains("the operator owns the number of replicas"),
        "{error}"
    );
}
