//! The server beside a user's own container, without the operator.

use crate::test_namespace::TestNamespace;
use crate::with_image;
use kvasir_e2e::image::recipes;
use std::path::Path;

#[test]
fn a_job_asks_the_server_beside_it_and_completes() {
    let Some(cluster) = with_image() else { return };
    let ns = TestNamespace::new(cluster, "sidecar");
    let program = Path::new(env!("CARGO_BIN_EXE_kvasir-e2e"));
    cluster
        .import(&recipes::ask(program).expect("the client's image"))
        .expect("imported");
    ns.apply(include_str!("../../examples/sidecar-job.yaml"))
        .expect("accepted");
    ns.kubectl(&[
        "wait",
        "--for=condition=Complete",
        "job/ask-beside",
        "--timeout=90s",
    ])
    .expect("completed");
    let answer = ns
        .kubectl(&["logs", "job/ask-beside", "--container=asker"])
        .expect("its log");
    assert!(
        answer.contains("block"),
        "the answer is about blocks: {answer}"
    );
}
