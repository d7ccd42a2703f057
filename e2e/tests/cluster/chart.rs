//! The chart, before anything of it runs: helm finds no fault, its schema refuses mistakes, and the API server
//! takes every object.

use crate::cluster;
use kvasir_e2e::command::{run, run_with_input};
use kvasir_e2e::toolchain::workspace;

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
