//! The rules' messages, evaluated as the API server does, the defaults, and the committed YAML.

use kube::{CustomResourceExt, core::cel::Validator};
use serde_json::{Value, json};

use super::*;

/// What the rules say of `object` on creation, joined; empty where they accept it.
fn refusal(object: &Value) -> String {
    let crd = serde_json::to_value(LLMDeployment::crd()).unwrap();
    let schema = &crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"];
    match Validator::new().validate_with_defaults(schema, object, None) {
        Ok(()) => String::new(),
        Err(errors) => errors
            .into_vec()
            .into_iter()
            .map(|e| e.message)
            .collect::<Vec<_>>()
            .join("; "),
    }
}

fn named(name: &str, spec: Value) -> Value {
    json!({ "apiVersion": "kvasir.dev/v1alpha1", "kind": "LLMDeployment", "metadata": { "name": name }, "spec": spec })
}

#[test]
fn rules_refuse_contradictions_and_say_the_remedy() {
    let demo = json!({ "source": { "demo": {} } });
    let long = "a".repeat(51);
    for (why, name, spec, want) in [
        (
            "the smallest",
            "demo",
            json!({ "model": demo, "replicas": 1 }),
            "",
        ),
        (
            "autoscaled",
            "demo",
            json!({ "model": demo, "autoscaling": { "maxReplicas": 3 } }),
            "",
        ),
        (
            "zero replicas are a number",
            "demo",
            json!({ "model": demo, "replicas": 0 }),
            "",
        ),
        (
            "two owners of the number",
            "demo",
            json!({ "model": demo, "replicas": 1, "autoscaling": { "maxReplicas": 3 } }),
            "spec.replicas must be set exactly where",
        ),
        (
            "no owner of the number",
            "demo",
            json!({ "model": demo }),
            "spec.replicas must be set exactly where",
        ),
        (
            "an observer beside a number",
            "demo",
            json!({ "model": demo, "replicas": 2, "autoscaling": { "mode": "Observe", "maxReplicas": 3 } }),
            "",
        ),
        (
            "an observer of no number",
            "demo",
            json!({ "model": demo, "autoscaling": { "mode": "Observe", "maxReplicas": 3 } }),
            "spec.replicas must be set exactly where",
        ),
        (
            "an owner of the number that says so, beside another",
            "demo",
            json!({ "model": demo, "replicas": 2, "autoscaling": { "mode": "Auto", "maxReplicas": 3 } }),
            "spec.replicas must be set exactly where",
        ),
        (
            "an owner of the number that says so",
            "demo",
            json!({ "model": demo, "autoscaling": { "mode": "Auto", "maxReplicas": 3 } }),
            "",
        ),
        (
            "empty range",
            "demo",
            json!({ "model": demo, "autoscaling": { "minReplicas": 4, "maxReplicas": 3 } }),
            "minReplicas must not exceed",
        ),
        (
            "two sources",
            "demo",
            json!({ "model": { "source": { "demo": {}, "pvc": { "claimName": "c" } } }, "replicas": 1 }),
            "exactly one of model.source.demo, model.source.pvc and model.source.huggingFace",
        ),
        (
            "no source",
            "demo",
            json!({ "model": { "source": {} }, "replicas": 1 }),
            "exactly one of model.source.demo",
        ),
        (
            "a repository with everything",
            "demo",
            json!({ "model": { "source": { "huggingFace": { "repository": "Qwen/Qwen3-8B", "revision": "refs/pr/1",
                "tokenSecret": { "name": "hf", "key": "token" }, "endpoint": "https://mirror:8443/hf" } },
                "cache": { "claimName": "models" } }, "replicas": 1 }),
            "",
        ),
        (
            "a repository and a volume",
            "demo",
            json!({ "model": { "source": { "pvc": { "claimName": "c" }, "huggingFace": { "repository": "a/b" } } }, "replicas": 1 }),
            "exactly one of model.source.demo",
        ),
        (
            "a cache of what is not fetched",
            "demo",
            json!({ "model": { "source": { "pvc": { "claimName": "c" } }, "cache": { "claimName": "d" } }, "replicas": 1 }),
            "model.cache is for models that are fetched",
        ),
        (
            "the server's cache, which is the operator's to choose",
            "demo",
            json!({ "model": demo, "replicas": 1, "engine": { "extraArgs": ["--download-dir=/x"] } }),
            "extraArgs must not hold",
        ),
        (
            "a path that leaves the volume",
            "demo",
            json!({ "model": { "source": { "pvc": { "claimName": "c", "path": "a/../../b" } } }, "replicas": 1 }),
            "relative to the volume's root",
        ),
        (
            "dots inside a name are a name",
            "demo",
            json!({ "model": { "source": { "pvc": { "claimName": "c", "path": "llama-3..1/hf" } } }, "replicas": 1 }),
            "",
        ),
        (
            "an argument that is the operator's",
            "demo",
            json!({ "model": demo, "replicas": 1, "engine": { "extraArgs": ["--seed=3", "--device=cpu"] } }),
            "extraArgs must not hold",
        ),
        (
            "the management port, which probes rely on",
            "demo",
            json!({ "model": demo, "replicas": 1, "engine": { "extraArgs": ["--management-port", "9000"] } }),
            "extraArgs must not hold",
        ),
        (
            "an argument that only begins alike",
            "demo",
            json!({ "model": demo, "replicas": 1, "engine": { "extraArgs": ["--port-range=3"] } }),
            "",
        ),
        (
            "one GPU",
            "demo",
            json!({ "model": demo, "replicas": 1, "resources": { "limits": { "nvidia.com/gpu": 1 } } }),
            "",
        ),
        (
            "one GPU in words",
            "demo",
            json!({ "model": demo, "replicas": 1, "resources": { "limits": { "nvidia.com/gpu": "1" },
                "requests": { "nvidia.com/gpu": "1", "cpu": 2 } } }),
            "",
        ),
        (
            "a GPU that is requested and not limited",
            "demo",
            json!({ "model": demo, "replicas": 1, "resources": { "requests": { "nvidia.com/gpu": 1 } } }),
            "must be in resources.limits too",
        ),
        (
            "the same beside other limits",
            "demo",
            json!({ "model": demo, "replicas": 1, "resources": { "limits": { "cpu": 1 },
                "requests": { "nvidia.com/mig-1g.10gb": 1 } } }),
            "must be in resources.limits too",
        ),
        (
            "a part of a GPU",
            "demo",
            json!({ "model": demo, "replicas": 1, "resources": { "limits": { "nvidia.com/mig-1g.10gb": 1, "nvidia.com/gpu": 0 } } }),
            "",
        ),
        (
            "two shares of a GPU",
            "demo",
            json!({ "model": demo, "replicas": 1, "resources": { "limits": { "nvidia.com/gpu.shared": 2 } } }),
            "nvidia.com/mig-... must be 1",
        ),
        (
            "two slices of a GPU",
            "demo",
            json!({ "model": demo, "replicas": 1, "resources": { "limits": { "nvidia.com/mig-1g.10gb": "2" } } }),
            "nvidia.com/mig-... must be 1",
        ),
        (
            "a whole one and a part",
            "demo",
            json!({ "model": demo, "replicas": 1, "resources": { "limits": { "nvidia.com/gpu": 1, "nvidia.com/gpu.shared": 1 } } }),
            "only one may be set",
        ),
        (
            "GPUs that nobody would use",
            "demo",
            json!({ "model": demo, "replicas": 1, "resources": { "limits": { "nvidia.com/gpu": 2 } } }),
            "nvidia.com/gpu must be 1",
        ),
        (
            "a name too long for its children",
            &long,
            json!({ "model": demo, "replicas": 1 }),
            "at most 50 characters",
        ),
        (
            "a name that no Service may have",
            "3b",
            json!({ "model": demo, "replicas": 1 }),
            "beginning with a letter",
        ),
        (
            "a name with dots",
            "llama.v1",
            json!({ "model": demo, "replicas": 1 }),
            "beginning with a letter",
        ),
    ] {
        let got = refusal(&named(name, spec));
        assert!(
            if want.is_empty() {
                got.is_empty()
            } else {
                got.contains(want)
            },
            "{why}: {got:?}"
        );
    }
}

/// The validator of kube evaluates rules and no patterns; the API server does both, as this does.
#[test]
fn repositories_revisions_and_endpoints_have_the_form_of_the_servers_flag() {
    let crd = serde_json::to_value(LLMDeployment::crd()).unwrap();
    let spec = &crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"];
    let source = &spec["properties"]["model"]["properties"]["source"]["properties"]["huggingFace"];
    for field in ["repository", "revision", "endpoint"] {
        let pattern = source["properties"][field]["pattern"].as_str();
        assert!(
            pattern.is_some_and(|p| p.starts_with('^') && p.ends_with('$')),
            "{field}"
        );
    }
    assert_eq!(source["required"], json!(["repository"]));
}

#[test]
fn absent_fields_take_their_defaults() {
    let spec =
        json!({ "model": { "source": { "demo": {} } }, "autoscaling": { "maxReplicas": 3 } });
    let parsed: LLMDeployment = serde_json::from_value(named("demo", spec)).unwrap();
    let autoscaling = parsed.spec.autoscaling.unwrap();
    assert_eq!(parsed.spec.drain_seconds, 300);
    assert_eq!(autoscaling.mode, AutoscalingMode::Auto);
    assert_eq!(autoscaling.min_replicas.get(), 1);
    assert_eq!(autoscaling.target_block_utilization_percent.get(), 80);
    assert_eq!(autoscaling.target_queue_depth.get(), 4);
    assert_eq!(autoscaling.scale_down_stabilization_seconds, 60);
}

#[test]
fn quantities_may_be_numbers() {
    let spec = json!({ "model": { "source": { "demo": {} } }, "replicas": 1,
        "resources": { "limits": { "nvidia.com/gpu": 1, "cpu": 2, "memory": "4Gi" } } });
    let parsed: LLMDeployment = serde_json::from_value(named("demo", spec)).unwrap();
    assert_eq!(
        parsed.spec.resources.unwrap().limits.unwrap()["nvidia.com/gpu"].0,
        "1"
    );
}

#[test]
fn kubectl_explains_every_field_of_the_spec_and_lists_it_among_all() {
    fn undescribed(path: &str, schema: &Value, found: &mut Vec<String>) {
        for (name, field) in schema["properties"].as_object().into_iter().flatten() {
            let path = format!("{path}.{name}");
            if field["description"].as_str().unwrap_or_default().is_empty() {
                found.push(path.clone());
            }
            undescribed(&path, field, found);
        }
    }
    let crd = serde_json::to_value(LLMDeployment::crd()).unwrap();
    let schema = &crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"];
    let mut found = Vec::new();
    undescribed("spec", schema, &mut found);
    assert_eq!(found, Vec::<String>::new());
    assert_eq!(crd["spec"]["names"]["categories"], json!(["all", "kvasir"]));
}

#[test]
fn reasons_are_valid_condition_reasons() {
    for reason in Reason::ALL {
        assert!(
            reason.as_str().chars().all(|c| c.is_ascii_alphanumeric()),
            "{reason}"
        );
    }
}

#[test]
fn the_committed_yaml_is_current() {
    let want = crate::llmdeployment::yaml().unwrap();
    let root = concat!(env!("CARGO_MANIFEST_DIR"), "/..");
    for path in [
        "crds/llmdeployments.yaml",
        "charts/kvasir/templates/llmdeployments.yaml",
    ] {
        let committed = std::fs::read_to_string(format!("{root}/{path}")).unwrap_or_default();
        assert!(
            committed == want,
            "{path} is stale: cargo run -p kvasir-crds --features crdgen --bin crdgen > {path}"
        );
    }
    assert!(
        !want.contains("{{"),
        "the chart takes the file as a template"
    );
    assert!(
        want.len() < 40_000,
        "client-side apply keeps a copy in an annotation: {} bytes",
        want.len()
    );
}
