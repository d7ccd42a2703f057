//! Models from a hub: one that runs in the first node, and gives the demo model to who has the token.

use crate::kvasir;
use crate::test_namespace::{TestNamespace, condition};
use kvasir_e2e::cluster::Cluster;
use kvasir_e2e::toolchain::{python, workspace};
use std::io::{BufRead as _, BufReader};
use std::process::{Child, Stdio};
use std::sync::{Arc, Mutex};

const PORT: u16 = 8899;

/// Ends when dropped.
struct Hub {
    child: Child,
    /// What it has said so far.
    lines: Arc<Mutex<Vec<String>>>,
}

impl Hub {
    fn start(cluster: &Cluster, token: &str) -> Self {
        let node = &cluster.nodes()[0];
        let root = workspace();
        let mut command =
            node.command_in_network(python().expect("Python packages").join("bin/python"));
        command.arg(root.join("e2e/python/hub.py"));
        command.arg(root.join("server/demo-model"));
        command.args(["kvasir/demo", token, &node.address(), &PORT.to_string()]);
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the hub starts");
        let mut said = BufReader::new(child.stdout.take().expect("its output")).lines();
        let first = said.next().expect("a line").expect("text");
        assert_eq!(first, "listening");
        let lines = Arc::new(Mutex::new(Vec::new()));
        let kept = Arc::clone(&lines);
        std::thread::spawn(move || {
            for line in said.map_while(Result::ok) {
                kept.lock().expect("lines").push(line);
            }
        });
        Self { child, lines }
    }

    /// How often the weights were given out whole.
    fn n_fetched(&self) -> usize {
        let lines = self.lines.lock().expect("lines");
        lines
            .iter()
            .filter(|line| *line == "whole model.safetensors")
            .count()
    }
}

impl Drop for Hub {
    fn drop(&mut self) {
        drop(self.child.stdin.take());
        let _ = self.child.wait();
    }
}

/// Two replicas that share the claim `cache`, and the Secret with their token.
fn deployment(cluster: &Cluster, token: &str, replicas: u32) -> String {
    let endpoint = format!("http://{}:{PORT}", cluster.nodes()[0].address());
    format!(
        "
apiVersion: v1
kind: Secret
metadata: {{name: hf}}
stringData: {{token: {token}}}
---
apiVersion: kvasir.dev/v1alpha1
kind: LLMDeployment
metadata: {{name: fetched}}
spec:
  model:
    servedName: kvasir-demo
    source:
      huggingFace:
        repository: kvasir/demo
        tokenSecret: {{name: hf, key: token}}
        endpoint: {endpoint}
    cache: {{claimName: cache}}
  replicas: {replicas}
  drainSeconds: 5
  resources: {{requests: {{cpu: 50m, memory: 128Mi}}, limits: {{memory: 1Gi}}}}
"
    )
}

/// A claim that every node can write: its volume lies in the cluster's folder.
fn claim_cache(ns: &TestNamespace) {
    let volume = ns.cluster.folder().join(format!("cache-{}", ns.name));
    std::fs::create_dir_all(&volume).expect("a folder");
    let open = std::os::unix::fs::PermissionsExt::from_mode(0o777);
    std::fs::set_permissions(&volume, open).expect("permissions");
    let (namespace, volume) = (ns.name, volume.display());
    ns.apply(&format!(
        "
apiVersion: v1
kind: PersistentVolume
metadata: {{name: cache-of-{namespace}}}
spec:
  capacity: {{storage: 1Gi}}
  accessModes: [ReadWriteMany]
  storageClassName: ''
  claimRef: {{namespace: {namespace}, name: cache}}
  hostPath: {{path: '{volume}', type: Directory}}
---
apiVersion: v1
kind: PersistentVolumeClaim
metadata: {{name: cache}}
spec:
  accessModes: [ReadWriteMany]
  storageClassName: ''
  resources: {{requests: {{storage: 1Gi}}}}
"
    ))
    .expect("accepted");
}

#[test]
fn a_model_from_a_hub_is_fetched_once_for_all_replicas_and_a_wrong_token_is_told() {
    let Some(cluster) = kvasir() else { return };
    let ns = TestNamespace::new(cluster, "hub");
    let hub = Hub::start(cluster, "hf_right");
    claim_cache(&ns);
    ns.apply(&deployment(cluster, "hf_wrong", 1))
        .expect("accepted");
    let object = ns.await_deployment("the token is refused", "fetched", 60, |object| {
        let told = condition(object, "Ready")["message"].to_string();
        condition(object, "Ready")["reason"] == "Crashed" && told.contains("tokenSecret")
    });
    let told = condition(&object, "Ready")["message"].to_string();
    assert!(
        told.contains("refuses the token in HF_TOKEN") && !told.contains("hf_wrong"),
        "{told}"
    );
    assert_eq!(hub.n_fetched(), 0);

    ns.apply(&deployment(cluster, "hf_right", 2))
        .expect("accepted");
    let object = ns.await_deployment("two replicas serve", "fetched", 120, |object| {
        object["status"]["readyReplicas"] == 2 && object["status"]["start"]["samples"] == 2
    });
    assert_eq!(hub.n_fetched(), 1, "one fetches for both");
    let model = &object["status"]["model"];
    assert_eq!(model["download"], "SharedCache", "{model}");
    assert_eq!(
        model["revision"], "0123456789abcdef0123456789abcdef01234567",
        "{model}"
    );
    for figure in ["parameters", "weightsBytes", "kvBytesPerToken", "blocks"] {
        assert!(
            model[figure].as_i64().is_some_and(|n| n > 0),
            "{figure}: {model}"
        );
    }
    let phases = object["status"]["start"]["phases"]
        .as_array()
        .expect("phases");
    let names: Vec<_> = phases
        .iter()
        .filter_map(|it| it["phase"].as_str())
        .collect();
    assert!(
        names.contains(&"Fetch") && names.contains(&"Load"),
        "{names:?}"
    );
    let said = ns.ask("fetched", "What is a block table?");
    assert!(
        said["answer"].as_str().expect("text").contains("block"),
        "{said}"
    );
}
