//! `up` on a cluster that exists: only where the flag says so, never because of a KUBECONFIG that is exported.

use crate::{kvasir, release};
use kvasir_e2e::command::run;
use kvasir_e2e::image::recipes;
use kvasir_e2e::quickstart;
use std::ffi::OsStr;
use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// kvasir-e2e up, with a kubeconfig as a user exports it.
fn up(kubeconfig: &Path, path: &OsStr, args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_kvasir-e2e"))
        .arg("up")
        .args(args)
        .env("KUBECONFIG", kubeconfig)
        .env("PATH", path)
        .output()
        .expect("it runs")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// An API server of no cluster: it counts who calls, and hangs up.
struct Decoy {
    kubeconfig: PathBuf,
    n_calls: Arc<AtomicUsize>,
}

impl Decoy {
    fn new(folder: &Path) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = listener.local_addr().expect("its address").port();
        let kubeconfig = folder.join("decoy-kubeconfig");
        let config = format!(
            "{{apiVersion: v1, kind: Config, current-context: decoy, users: [], \
             clusters: [{{name: decoy, cluster: {{server: 'http://127.0.0.1:{port}'}}}}], \
             contexts: [{{name: decoy, context: {{cluster: decoy, user: ''}}}}]}}"
        );
        fs::write(&kubeconfig, config).expect("written");
        let n_calls = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&n_calls);
        std::thread::spawn(move || {
            for call in listener.incoming() {
                counted.fetch_add(1, Ordering::SeqCst);
                drop(call);
            }
        });
        Self {
            kubeconfig,
            n_calls,
        }
    }

    fn n_calls(&self) -> usize {
        self.n_calls.load(Ordering::SeqCst)
    }
}

#[test]
fn half_a_flag_is_refused_with_what_is_missing() {
    for (why, args, wanted) in [
        (
            "which cluster, and which image?",
            &["--existing-cluster"][..],
            &["--context", "--image"][..],
        ),
        (
            "a context alone is not the flag",
            &["--context", "mine"],
            &["--existing-cluster"],
        ),
    ] {
        let output = up(Path::new("/nonexistent"), OsStr::new("/nonexistent"), args);
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{why}: {said}");
        for flag in wanted {
            assert!(said.contains(flag), "{why} {flag}: {said}");
        }
    }
}

#[test]
fn a_cluster_that_exists_is_used_where_the_flag_says_so_and_only_there() {
    let Some(cluster) = kvasir() else { return };
    let tools = cluster.tools();
    let mut folders = vec![tools.kubernetes.clone(), tools.helm.clone()];
    folders.extend(std::env::split_paths(
        &std::env::var_os("PATH").unwrap_or_default(),
    ));
    let path = std::env::join_paths(folders).expect("a PATH");
    let image = recipes::kvasir_reference();
    let decoy = Decoy::new(&cluster.folder());
    let _alone = release();

    let flags = |context| {
        [
            "--existing-cluster",
            "--context",
            context,
            "--image",
            &image,
        ]
    };
    let output = up(&cluster.kubeconfig(), &path, &flags("kvasir"));
    let (answer, told) = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success(), "{told}");
    assert!(
        told.contains("\"kvasir\"") && told.contains(&image),
        "context and image are said: {told}"
    );
    assert!(answer.contains("block"), "the answer is streamed: {answer}");

    let name = cluster.name().to_string();
    let output = up(&decoy.kubeconfig, &path, &["--name", &name]);
    let (answer, told) = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success(), "{told}");
    assert!(answer.contains("block"), "the answer is streamed: {answer}");
    assert_eq!(
        decoy.n_calls(),
        0,
        "an exported KUBECONFIG alone is not looked at: {told}"
    );

    // The same decoy is found by the flag: so it was there to be found.
    let output = up(&decoy.kubeconfig, &path, &flags("decoy"));
    assert!(!output.status.success());
    assert!(decoy.n_calls() > 0, "{}", text(&output.stderr));
    run(cluster
        .kubectl()
        .args(["delete", "llmdeployment", quickstart::DEMO]))
    .expect("the demo is deleted");
}
