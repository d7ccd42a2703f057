//! The chart, before anything of it runs: helm finds no fault, its schema refuses mistakes, the API server takes every
//! object, and Argo CD's health check reads an LLMDeployment's conditions.

use crate::cluster;
use kvasir_e2e::command::{run, run_with_input};
use kvasir_e2e::toolchain::{self, workspace};
use serde_json::{Value, json};
use std::process::Command;

#[test]
fn the_chart_lints_and_its_objects_are_accepted() {
    let Some(cluster) = cluster() else { return };
    let helm = |args: &[&str]| run(cluster.access().helm().args(args).current_dir(workspace()));
    helm(&["lint", "--strict", "charts/kvasir"]).expect("no fault");
    let error = helm(&[
        "lint",
        "charts/kvasir",
        "--set",
        "podMonitor.enabled=perhaps",
    ])
    .expect_err("the schema refuses");
    assert!(
        error.to_string().contains("enabled"),
        "the mistake is named: {error}"
    );
    let objects = helm(&[
        "template",
        "kvasir",
        "charts/kvasir",
        "--namespace",
        "default",
    ])
    .expect("rendered");
    run_with_input(
        cluster.kubectl().args([
            "apply",
            "--server-side",
            "--dry-run=server",
            "--force-conflicts",
            "-f",
            "-",
        ]),
        &objects,
    )
    .expect("accepted");
}

/// A JSON value as Lua writes it.
fn lua(value: &Value) -> String {
    match value {
        Value::Null => "nil".into(),
        Value::Array(items) => {
            let items: Vec<_> = items.iter().map(lua).collect();
            format!("{{ {} }}", items.join(", "))
        }
        Value::Object(members) => {
            let member = |(key, value): (&String, &Value)| format!("[{key:?}] = {}", lua(value));
            let members: Vec<_> = members.iter().map(member).collect();
            format!("{{ {} }}", members.join(", "))
        }
        scalar => scalar.to_string(),
    }
}

#[test]
fn argo_cd_reads_the_conditions() {
    if cluster().is_none() {
        return;
    }
    let lua_program = toolchain::lua().expect("the interpreter");
    let condition = |kind: &str, status: &str, reason: &str, message: &str| json!({ "type": kind, "status": status, "reason": reason, "message": message });
    let ready = |status, reason, message| condition("Ready", status, reason, message);
    let seen =
        |conditions: Vec<Value>| json!({ "observedGeneration": 3, "conditions": conditions });
    for (why, status, want) in [
        (
            "just made",
            Value::Null,
            "Progressing: the operator has not looked at it yet",
        ),
        (
            "changed since",
            json!({ "observedGeneration": 2, "conditions": [ready("True", "RolledOut", "")] }),
            "Progressing: the operator has not looked at this generation yet",
        ),
        (
            "it serves, with fewer than asked for",
            seen(vec![
                ready("True", "RolledOut", "1 of 3 replicas is serving"),
                condition("CapacityUnavailable", "True", "Unschedulable", "no GPU"),
            ]),
            "Healthy: RolledOut: 1 of 3 replicas is serving",
        ),
        (
            "nothing runs, as asked for",
            seen(vec![ready("True", "ScaledToZero", "")]),
            "Healthy: ScaledToZero",
        ),
        (
            "a rollout",
            seen(vec![
                ready("False", "Starting", "the server is loading its model"),
                condition(
                    "Reconciling",
                    "True",
                    "Starting",
                    "the server is loading its model",
                ),
            ]),
            "Progressing: Starting: the server is loading its model",
        ),
        (
            "a refusal",
            seen(vec![
                ready("False", "ChildRefused", "limits: Required value"),
                condition(
                    "Stalled",
                    "True",
                    "ChildRefused",
                    "limits: \"Required\" value",
                ),
            ]),
            "Degraded: ChildRefused: limits: \"Required\" value",
        ),
    ] {
        let object = json!({ "metadata": { "generation": 3 }, "status": status });
        let script = format!(
            "obj = {}\nlocal hs = dofile('charts/kvasir/argocd/health.lua')\nprint(hs.status .. ': ' .. hs.message)",
            lua(&object)
        );
        let said = run(Command::new(lua_program)
            .args(["-e", &script])
            .current_dir(workspace()));
        assert_eq!(said.expect("it runs").trim(), want, "{why}");
    }
}
