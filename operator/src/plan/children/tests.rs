//! Golden files of the children, and the promises about when pods roll.

use super::*;
use crate::plan::tests::deployment as llm_deployment;

fn demo() -> Value {
    json!({ "model": { "source": { "demo": {} } }, "replicas": 1 })
}

fn full() -> Value {
    json!({
        "model": { "source": { "pvc": { "claimName": "weights", "path": "llama-3.2-1b" } } },
        "image": "registry.example/kvasir:7", "imagePullPolicy": "IfNotPresent",
        "engine": { "maxModelLen": 4096, "kvBlocks": 512, "dtype": "bfloat16", "extraArgs": ["--threads", "4"],
            "env": [{ "name": "RUST_LOG", "value": "debug" }] },
        "resources": { "limits": { "nvidia.com/gpu": 1, "memory": "16Gi" } },
        "autoscaling": { "maxReplicas": 4 }, "drainSeconds": 60,
        "podTemplate": { "spec": { "nodeSelector": { "gpu": "h100" },
            "containers": [{ "name": "server", "volumeMounts": [{ "name": "scratch", "mountPath": "/tmp" }] }],
            "volumes": [{ "name": "scratch", "emptyDir": {} }] } }
    })
}

fn fetched() -> Value {
    json!({
        "model": { "servedName": "qwen", "source": { "huggingFace": { "repository": "Qwen/Qwen3-8B", "revision": "v1",
            "tokenSecret": { "name": "hf", "key": "token" }, "endpoint": "https://mirror.example" } },
            "cache": { "claimName": "models" } },
        "engine": { "env": [{ "name": "HF_ENDPOINT", "value": "https://other.example" }] },
        "replicas": 2
    })
}

#[test]
fn a_model_without_a_cache_is_fetched_into_the_pod() {
    let mut spec = fetched();
    spec["model"].as_object_mut().unwrap().remove("cache");
    spec["model"]["source"] = json!({ "huggingFace": { "repository": "a/b" } });
    let made = children(&llm_deployment(spec), 1, "i", None).unwrap();
    let made = serde_json::to_value(made.deployment).unwrap();
    let pod = &made["spec"]["template"]["spec"];
    assert_eq!(
        pod["volumes"],
        json!([{ "name": "model-cache", "emptyDir": {} }])
    );
    let server = &pod["containers"][0];
    let args: Vec<&str> = server["args"]
        .as_array()
        .unwrap()
        .iter()
        .flat_map(Value::as_str)
        .collect();
    assert!(
        args.windows(2)
            .any(|pair| pair == ["--model", "hf://a/b@main"]),
        "{args:?}"
    );
    assert_eq!(
        server["env"].as_array().unwrap().len(),
        1,
        "no token: {server}"
    );
}

#[test]
fn golden_files_are_current() {
    for (file, spec) in [
        ("demo.json", demo()),
        ("pvc-gpu.json", full()),
        ("hugging-face.json", fetched()),
    ] {
        let made = children(&llm_deployment(spec), 2, "kvasir.dev/kvasir:0.1.0", None).unwrap();
        let Children {
            deployment,
            service,
            budget,
            account,
        } = made;
        let got = serde_json::to_string_pretty(&json!([deployment, service, budget, account]))
            .unwrap()
            + "\n";
        let path = format!("{}/tests/golden/{file}", env!("CARGO_MANIFEST_DIR"));
        if std::env::var_os("KVASIR_BLESS").is_some() {
            std::fs::write(&path, &got).unwrap();
        }
        let want: Value = serde_json::from_str(&std::fs::read_to_string(&path).unwrap_or_default())
            .unwrap_or_default();
        let got: Value = serde_json::from_str(&got).unwrap();
        assert_eq!(
            got, want,
            "{file} is stale: KVASIR_BLESS=1 cargo test -p kvasir-operator"
        );
    }
}

#[test]
fn pods_roll_only_with_the_users_fields() {
    let first = children(&llm_deployment(demo()), 1, "kvasir:1", None)
        .unwrap()
        .deployment;
    // As the API server holds it: with defaults beside what it was given.
    let mut held = serde_json::to_value(&first).unwrap();
    held["spec"]["template"]["spec"]["restartPolicy"] = "Always".into();
    held["spec"]["template"]["spec"]["containers"][0]["terminationMessagePath"] =
        "/dev/termination-log".into();
    let held: Deployment = serde_json::from_value(held).unwrap();
    let template = |spec: Value, image: &str, held: &Deployment| {
        children(&llm_deployment(spec), 1, image, Some(held))
            .unwrap()
            .deployment
            .spec
            .unwrap()
            .template
    };
    let original = &first.spec.as_ref().unwrap().template;

    assert_eq!(
        &template(demo(), "kvasir:2", &held),
        original,
        "a new default image rolls nothing"
    );
    let mut more = demo();
    more["replicas"] = 5.into();
    assert_eq!(
        &template(more, "kvasir:2", &held),
        original,
        "scaling rolls nothing"
    );

    let mut elder = first.clone();
    let rendered = &mut elder.spec.as_mut().unwrap().template;
    rendered.spec.as_mut().unwrap().containers[0].readiness_probe = None;
    let applied = serde_json::to_string(rendered).unwrap();
    let annotations = elder.metadata.annotations.as_mut().unwrap();
    annotations.insert(APPLIED_TEMPLATE.into(), applied);
    assert_eq!(
        template(demo(), "kvasir:1", &elder),
        elder.spec.as_ref().unwrap().template,
        "what an elder operator rendered is kept whole"
    );

    let mut changed = demo();
    changed["engine"] = json!({ "maxNumSeqs": 3 });
    let rolled = template(changed, "kvasir:2", &held);
    assert_ne!(revision_of(&rolled), revision_of(original));
    assert_eq!(
        rolled.spec.unwrap().containers[0].image.as_deref(),
        Some("kvasir:2"),
        "a change takes the new default"
    );
}

#[test]
fn hand_edits_of_the_template_are_taken_back() {
    let applied = children(&llm_deployment(demo()), 1, "kvasir:1", None)
        .unwrap()
        .deployment;
    let edited = |edit: fn(&mut PodTemplateSpec)| {
        let mut held = applied.clone();
        edit(&mut held.spec.as_mut().unwrap().template);
        held
    };
    fn server(template: &mut PodTemplateSpec) -> &mut k8s_openapi::api::core::v1::Container {
        &mut template.spec.as_mut().unwrap().containers[0]
    }
    let unmarked = |mut held: Deployment| {
        held.metadata.annotations = None;
        held
    };
    for (why, held) in [
        (
            "another image",
            edited(|t| server(t).image = Some("x:2".into())),
        ),
        (
            "a probe taken out",
            edited(|t| server(t).liveness_probe = None),
        ),
        (
            "a field added",
            edited(|t| t.spec.as_mut().unwrap().host_network = Some(true)),
        ),
        ("the revision taken out", edited(|t| t.metadata = None)),
        ("the annotation taken out", unmarked(applied.clone())),
    ] {
        // A new operator with a new default image sees it first.
        let wanted = children(&llm_deployment(demo()), 1, "kvasir:9", Some(&held));
        let wanted = wanted.unwrap().deployment;
        assert_eq!(wanted.spec, applied.spec, "{why}");
        assert_eq!(
            wanted.metadata.annotations, applied.metadata.annotations,
            "{why}"
        );
    }
    let mut changed = demo();
    changed["drainSeconds"] = 9.into();
    let held = edited(|t| server(t).image = Some("x:2".into()));
    let wanted = children(&llm_deployment(changed), 1, "kvasir:9", Some(&held)).unwrap();
    let mut template = wanted.deployment.spec.unwrap().template;
    assert_eq!(
        server(&mut template).image.as_deref(),
        Some("kvasir:9"),
        "a change renders anew"
    );
}

#[test]
fn a_template_too_large_to_be_recorded_is_refused() {
    let mut spec = demo();
    spec["podTemplate"] = json!({ "metadata": { "annotations": { "a": "x".repeat(120_000) } } });
    let refusal = children(&llm_deployment(spec), 1, "i", None).unwrap_err();
    assert!(refusal.contains("bytes, of at most 120000"), "{refusal}");
}

#[test]
fn a_revision_is_the_same_in_every_release() {
    assert_eq!(
        revision(&llm_deployment(demo()).spec),
        "9aa977875e308282",
        "a change here rolls every pod of every user"
    );
    let with = |template: Value| {
        let mut spec = demo();
        spec["podTemplate"] = template;
        revision(&llm_deployment(spec).spec)
    };
    let context =
        |user: Value| json!({ "spec": { "securityContext": { "fsGroup": 1, "runAsUser": user } } });
    let kept = with(json!({ "spec": { "securityContext": { "fsGroup": 1 } } }));
    assert_ne!(
        with(context(Value::Null)),
        kept,
        "the operator's user is taken away"
    );
    assert_eq!(
        with(json!({ "spec": { "nodeSelector": null, "securityContext": { "fsGroup": 1 } } })),
        kept,
        "other nulls say nothing"
    );
}

#[test]
fn a_gpu_is_asked_for_by_a_quantity_that_is_not_0() {
    for (name, quantity, want) in [
        ("nvidia.com/gpu", json!(1), true),
        ("nvidia.com/gpu", json!("1"), true),
        ("nvidia.com/gpu", json!(0), false),
        ("nvidia.com/gpu", json!("0"), false),
        ("nvidia.com/gpu.shared", json!(1), true),
        ("nvidia.com/mig-3g.71gb", json!(1), true),
        ("nvidia.com/hostdev", json!(1), false),
    ] {
        let mut spec = demo();
        spec["resources"] = json!({ "limits": { name: quantity } });
        assert_eq!(
            args(&llm_deployment(spec)).contains(&"cuda".to_owned()),
            want
        );
    }
}

#[test]
fn what_runs_is_scaled_with_the_template_that_was_applied_last() {
    let first = children(&llm_deployment(demo()), 1, "kvasir:1", None).unwrap();
    let mut changed = demo();
    changed["podTemplate"] = json!({ "spec": { "nodeSelektor": {} } });
    let changed = llm_deployment(changed);
    let scaled = scaled(&changed, 3, &first.deployment).unwrap();
    let spec = scaled.spec.as_ref().unwrap();
    assert_eq!(spec.replicas, Some(3));
    assert_eq!(
        spec.template,
        first.deployment.spec.as_ref().unwrap().template
    );
    assert_eq!(scaled.metadata, first.deployment.metadata);
    let mut unmarked = first.deployment.clone();
    unmarked.metadata.annotations = None;
    assert_eq!(super::scaled(&changed, 3, &unmarked), None);
}

#[test]
fn the_service_reaches_the_api_and_the_probes_the_management_port() {
    let made = children(&llm_deployment(demo()), 1, "i", None).unwrap();
    let ports = made.service.spec.unwrap().ports.unwrap();
    assert_eq!(
        ports.len(),
        1,
        "management is for who knows a pod's address"
    );
    assert_eq!(
        (ports[0].name.as_deref(), ports[0].port),
        (Some("http"), 8000)
    );
    let pod = made.deployment.spec.unwrap().template.spec.unwrap();
    let server = &pod.containers[0];
    for (why, probe) in [
        ("startup", &server.startup_probe),
        ("readiness", &server.readiness_probe),
        ("liveness", &server.liveness_probe),
    ] {
        let get = probe.as_ref().unwrap().http_get.clone().unwrap();
        let want = serde_json::from_value(json!("management")).unwrap();
        assert_eq!(get.port, want, "{why}");
    }
    let args = server.args.as_deref().unwrap().join(" ");
    assert!(
        args.contains("--port 8000 --management-port 8001"),
        "{args}"
    );
    let numbers = server
        .ports
        .iter()
        .flatten()
        .map(|port| port.container_port);
    assert_eq!(numbers.collect::<Vec<_>>(), [8000, 8001]);
}
