//! What the API server refuses of an LLMDeployment, in our words, by the rules of the CRD alone.

use crate::cluster;
use crate::scene::Scene;
use kvasir_e2e::command::run;
use kvasir_e2e::toolchain::workspace;

/// The manifest of a deployment of the demo model; `rest` are further lines of its spec.
fn demo(name: &str, rest: &str) -> String {
    format!(
        "apiVersion: kvasir.dev/v1alpha1\nkind: LLMDeployment\nmetadata: {{name: {name}}}\nspec:\n  \
         model: {{source: {{demo: {{}}}}}}\n{rest}\n"
    )
}

#[test]
fn contradictions_and_a_second_owner_of_the_replicas_are_refused() {
    let Some(cluster) = cluster() else { return };
    let scene = Scene::new(cluster, "refusals");
    let crd = workspace().join("crds/llmdeployments.yaml");
    run(cluster
        .kubectl()
        .args(["apply", "--server-side", "-f"])
        .arg(crd))
    .expect("the CRD is accepted");
    scene
        .kubectl(&[
            "wait",
            "--for=condition=Established",
            "crd/llmdeployments.kvasir.dev",
            "--timeout=30s",
        ])
        .expect("the CRD is established");

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
        .apply(&demo("fixed", "  replicas: 1"))
        .expect("a fixed number is accepted");
    scene
        .kubectl(&["scale", "llmdeployment", "fixed", "--replicas=2"])
        .expect("and can be scaled");
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
