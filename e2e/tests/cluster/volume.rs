//! Models from a PersistentVolumeClaim: a directory as Hugging Face writes them, on a volume that every node has.

use crate::kvasir;
use crate::test_namespace::TestNamespace;
use kvasir_e2e::cluster::Cluster;
use kvasir_e2e::toolchain::workspace;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;

/// The files of the demo model's directory that a server reads.
const FILES: [&str; 5] = [
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
];

/// The claim `models` in a test's namespace, bound to a volume with the demo model's files but `without` in
/// its folder `demo`. The volume lies in the cluster's folder, which every node sees and which goes with it.
pub(crate) fn claim_models(ns: &TestNamespace, without: &[&str]) {
    let volume = fill(ns.cluster, ns.name, without);
    let namespace = ns.name;
    ns.apply(&format!(
        "
apiVersion: v1
kind: PersistentVolume
metadata: {{name: models-of-{namespace}}}
spec:
  capacity: {{storage: 1Gi}}
  accessModes: [ReadOnlyMany]
  storageClassName: ''
  claimRef: {{namespace: {namespace}, name: models}}
  hostPath: {{path: '{volume}', type: Directory}}
---
apiVersion: v1
kind: PersistentVolumeClaim
metadata: {{name: models}}
spec:
  accessModes: [ReadOnlyMany]
  storageClassName: ''
  resources: {{requests: {{storage: 1Gi}}}}
",
        volume = volume.display()
    ))
    .expect("accepted");
}

/// The server runs as nobody in particular: whatever this checkout's permissions are, it may read the copies.
fn fill(cluster: &Cluster, name: &str, without: &[&str]) -> PathBuf {
    let volume = cluster.folder().join(format!("models-{name}"));
    let model = volume.join("demo");
    fs::create_dir_all(&model).expect("a folder");
    for folder in [&volume, &model] {
        fs::set_permissions(folder, fs::Permissions::from_mode(0o755)).expect("permissions");
    }
    for file in FILES.iter().filter(|file| !without.contains(file)) {
        let copy = model.join(file);
        fs::copy(workspace().join("server/demo-model").join(file), &copy).expect("a copy");
        fs::set_permissions(&copy, fs::Permissions::from_mode(0o644)).expect("permissions");
    }
    volume
}

/// A deployment of the model in the folder `demo` of the claim `models`.
pub(crate) fn from_claim(name: &str) -> String {
    format!(
        "
apiVersion: kvasir.dev/v1alpha1
kind: LLMDeployment
metadata: {{name: {name}}}
spec:
  model: {{source: {{pvc: {{claimName: models, path: demo}}}}}}
  replicas: 1
  drainSeconds: 5
  resources: {{requests: {{cpu: 50m, memory: 128Mi}}, limits: {{memory: 1Gi}}}}
"
    )
}

#[test]
fn a_model_directory_on_a_claim_is_served_under_the_deployments_name() {
    let Some(cluster) = kvasir() else { return };
    let ns = TestNamespace::new(cluster, "volume");
    claim_models(&ns, &[]);
    ns.apply(&from_claim("stored")).expect("accepted");
    ns.await_ready("stored");
    let pod = ns.pods("stored").expect("pods").remove(0);
    let mount = &pod["spec"]["containers"][0]["volumeMounts"][0];
    assert_eq!(
        (&mount["mountPath"], &mount["readOnly"]),
        (&"/models".into(), &true.into()),
        "the claim is mounted read-only: {mount}"
    );
    let said = ns.ask_model("stored", "stored", "What is a block table?");
    assert!(
        said["answer"].as_str().expect("text").contains("block"),
        "the model on the volume answers: {said}"
    );
}
