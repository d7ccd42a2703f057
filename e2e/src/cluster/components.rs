//! Each program of Kubernetes with its flags and files. What differs from a cluster of big machines, and
//! why, is said where it differs.

use super::certificates::{Authority, Signed, Subject, TokenKeys, token_keys, write_kubeconfig};
use super::network::{PODS, SERVICES, cni};
use super::{Cluster, Node};
use crate::Error;
use std::fs;
use std::path::{Path, PathBuf};

/// Where the API server is, for everything that runs in a node or a pod.
const API: &str = "https://10.87.0.1:6443";

/// The cluster's keys, certificates and kubeconfigs.
pub(super) struct Pki {
    folder: PathBuf,
    authority: Authority,
    front: Authority,
    service_accounts: TokenKeys,
    apiserver: Signed,
    aggregator: Signed,
    admin: Signed,
}

impl Pki {
    /// Everything but the nodes' own.
    pub(super) fn create(cluster: &Cluster) -> Result<Self, Error> {
        let folder = cluster.folder().join("pki");
        fs::create_dir_all(&folder).map_err(Error::file("create", &folder))?;
        let authority = Authority::create(&folder, "kvasir-e2e")?;
        let front = Authority::create(&folder, "kvasir-e2e-front")?;
        let names = [
            "kubernetes",
            "kubernetes.default",
            "kubernetes.default.svc",
            "kubernetes.default.svc.cluster.local",
            "localhost",
            "127.0.0.1",
            "10.87.0.1",
            "10.96.0.1",
        ];
        let apiserver = authority.sign("apiserver", user("kube-apiserver"), &names)?;
        let aggregator = front.sign("aggregator", user("aggregator"), &[])?;
        let admin = Subject {
            common_name: "kvasir-admin",
            organization: Some("system:masters"),
        };
        let admin = authority.sign("admin", admin, &[])?;
        let service_accounts = token_keys(&folder)?;
        Ok(Self {
            folder,
            authority,
            front,
            service_accounts,
            apiserver,
            aggregator,
            admin,
        })
    }

    /// The kubeconfig for this machine's loopback.
    pub(super) fn write_admin_kubeconfig(&self, path: &Path, port: u16) -> Result<(), Error> {
        let server = format!("https://127.0.0.1:{port}");
        write_kubeconfig(path, &server, &self.authority.certificate(), &self.admin)
    }

    /// The kubeconfig of a component that is `subject`.
    fn kubeconfig(&self, name: &str, subject: Subject<'_>) -> Result<String, Error> {
        let client = self.authority.sign(name, subject, &[])?;
        let path = self.folder.join(format!("{name}.kubeconfig"));
        write_kubeconfig(&path, API, &self.authority.certificate(), &client)?;
        Ok(path.display().to_string())
    }
}

/// etcd and the API server.
pub(super) fn start_control_plane(cluster: &Cluster, pki: &Pki) -> Result<(), Error> {
    let first = &cluster.nodes()[0];
    let etcd = flags(&[
        ("name", "kvasir"),
        ("data-dir", "/var/lib/etcd"),
        ("listen-client-urls", "http://127.0.0.1:2379"),
        ("advertise-client-urls", "http://127.0.0.1:2379"),
        ("listen-peer-urls", "http://127.0.0.1:2380"),
        ("initial-advertise-peer-urls", "http://127.0.0.1:2380"),
        ("initial-cluster", "kvasir=http://127.0.0.1:2380"),
    ]);
    first.spawn("etcd", "etcd", &etcd)?;
    let serving = flags(&[
        ("etcd-servers", "http://127.0.0.1:2379"),
        // All addresses of the node's own network namespace: nothing outside of the cluster is in it.
        ("bind-address", "0.0.0.0"),
        ("secure-port", "6443"),
        ("advertise-address", &first.address()),
        ("allow-privileged", "true"),
        ("authorization-mode", "Node,RBAC"),
        ("enable-admission-plugins", "NodeRestriction"),
        ("cert-dir", "/var/lib/kube-apiserver"),
        // By name, logs and exec would look the node up in a DNS that does not know it.
        ("kubelet-preferred-address-types", "InternalIP"),
        ("service-cluster-ip-range", SERVICES),
        ("profiling", "false"),
    ]);
    first.spawn(
        "kube-apiserver",
        cluster.tools().kubernetes.join("kube-apiserver"),
        &[serving, apiserver_identities(pki)].concat(),
    )
}

/// Who the API server is and whom it believes: clients, kubelets, service accounts, aggregated API servers.
fn apiserver_identities(pki: &Pki) -> Vec<String> {
    let path = |path: &Path| path.display().to_string();
    flags(&[
        ("client-ca-file", &path(&pki.authority.certificate())),
        ("tls-cert-file", &path(&pki.apiserver.certificate)),
        ("tls-private-key-file", &path(&pki.apiserver.key)),
        (
            "kubelet-certificate-authority",
            &path(&pki.authority.certificate()),
        ),
        ("kubelet-client-certificate", &path(&pki.admin.certificate)),
        ("kubelet-client-key", &path(&pki.admin.key)),
        (
            "service-account-issuer",
            "https://kubernetes.default.svc.cluster.local",
        ),
        (
            "service-account-key-file",
            &path(&pki.service_accounts.public),
        ),
        (
            "service-account-signing-key-file",
            &path(&pki.service_accounts.private),
        ),
        (
            "requestheader-client-ca-file",
            &path(&pki.front.certificate()),
        ),
        ("requestheader-allowed-names", "aggregator"),
        ("requestheader-extra-headers-prefix", "X-Remote-Extra-"),
        ("requestheader-group-headers", "X-Remote-Group"),
        ("requestheader-username-headers", "X-Remote-User"),
        ("proxy-client-cert-file", &path(&pki.aggregator.certificate)),
        ("proxy-client-key-file", &path(&pki.aggregator.key)),
    ])
}

/// The controller-manager and the scheduler; the API server must be ready, or they wait seconds in backoff.
pub(super) fn start_controllers(cluster: &Cluster, pki: &Pki) -> Result<(), Error> {
    let first = &cluster.nodes()[0];
    let kubeconfig =
        pki.kubeconfig("controller-manager", user("system:kube-controller-manager"))?;
    let manager = flags(&[
        ("kubeconfig", &kubeconfig),
        ("authentication-kubeconfig", &kubeconfig),
        ("authorization-kubeconfig", &kubeconfig),
        (
            "service-account-private-key-file",
            &pki.service_accounts.private.display().to_string(),
        ),
        (
            "root-ca-file",
            &pki.authority.certificate().display().to_string(),
        ),
        ("use-service-account-credentials", "true"),
        ("leader-elect", "false"),
        ("bind-address", "127.0.0.1"),
        ("flex-volume-plugin-dir", "/var/lib/kubelet/volume-plugins"),
        ("enable-hostpath-provisioner", "true"),
        // A lost node is noticed in seconds: tests wait for it.
        ("node-monitor-grace-period", "10s"),
        ("node-monitor-period", "1s"),
    ]);
    let programs = &cluster.tools().kubernetes;
    first.spawn(
        "kube-controller-manager",
        programs.join("kube-controller-manager"),
        &manager,
    )?;
    let kubeconfig = pki.kubeconfig("scheduler", user("system:kube-scheduler"))?;
    let scheduler = flags(&[
        ("kubeconfig", &kubeconfig),
        ("authentication-kubeconfig", &kubeconfig),
        ("authorization-kubeconfig", &kubeconfig),
        ("leader-elect", "false"),
        ("bind-address", "127.0.0.1"),
    ]);
    first.spawn(
        "kube-scheduler",
        programs.join("kube-scheduler"),
        &scheduler,
    )
}

/// The container runtime of one node.
pub(super) fn start_containerd(node: &Node) -> Result<(), Error> {
    let cni_folder = node.folder.join("cni");
    fs::create_dir_all(&cni_folder).map_err(Error::file("create", &cni_folder))?;
    write(&cni_folder.join("10-kvasir.conflist"), &cni(node))?;
    // An unprivileged root may not lower a score, and AppArmor belongs to the machine.
    let config = format!(
        r#"version = 2
root = "/var/lib/containerd"
state = "/run/containerd"
[grpc]
  address = "/run/containerd/containerd.sock"
[plugins."io.containerd.internal.v1.opt"]
  path = "/var/lib/containerd/opt"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{pause}"
  disable_apparmor = true
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "{cni}"
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
      SystemdCgroup = false
"#,
        pause = crate::image::recipes::PAUSE,
        cni = cni_folder.display(),
    );
    let path = node.folder.join("containerd.toml");
    write(&path, &config)?;
    node.spawn(
        "containerd",
        "containerd",
        &["--config".into(), path.display().to_string()],
    )
}

/// The kubelet of one node.
pub(super) fn start_kubelet(cluster: &Cluster, pki: &Pki, node: &Node) -> Result<(), Error> {
    let (name, address) = (node.name(), node.address());
    let subject = format!("system:node:{name}");
    let subject = Subject {
        common_name: &subject,
        organization: Some("system:nodes"),
    };
    let serving = pki
        .authority
        .sign(&format!("kubelet-{name}"), subject, &[&name, &address])?;
    let path = node.folder.join("kubelet.yaml");
    write(&path, &kubelet_config(pki, node, &serving))?;
    let kubelet = flags(&[
        ("config", &path.display().to_string()),
        (
            "kubeconfig",
            &pki.kubeconfig(&format!("kubelet-client-{name}"), subject)?,
        ),
        ("root-dir", "/var/lib/kubelet"),
        ("cert-dir", "/var/lib/kubelet/pki"),
        ("node-ip", &address),
        ("hostname-override", &name),
    ]);
    let program = cluster.tools().kubernetes.join("kubelet");
    node.spawn("kubelet", program, &kubelet)
}

fn kubelet_config(pki: &Pki, node: &Node, serving: &Signed) -> String {
    format!(
        r"apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
authentication:
  anonymous: {{enabled: false}}
  webhook: {{enabled: true}}
  x509: {{clientCAFile: '{authority}'}}
authorization: {{mode: Webhook}}
tlsCertFile: '{certificate}'
tlsPrivateKeyFile: '{key}'
clusterDNS: [10.96.0.10]
clusterDomain: cluster.local
resolvConf: '{resolv_conf}'
containerRuntimeEndpoint: unix:///run/containerd/containerd.sock
cgroupDriver: cgroupfs
cgroupRoot: /{cgroup}
failSwapOn: false
podLogsDir: /var/log/pods
volumePluginDir: /var/lib/kubelet/volume-plugins
nodeLeaseDurationSeconds: 8
syncFrequency: 5s
serializeImagePulls: false
evictionHard: {{memory.available: 50Mi, nodefs.available: 1%, imagefs.available: 1%, nodefs.inodesFree: 1%}}
imageGCHighThresholdPercent: 100
imageGCLowThresholdPercent: 99
",
        authority = pki.authority.certificate().display(),
        certificate = serving.certificate.display(),
        key = serving.key.display(),
        resolv_conf = node.folder.join("etc/upstream-resolv.conf").display(),
        cgroup = node.cgroup,
    )
}

/// kube-proxy of one node.
pub(super) fn start_proxy(cluster: &Cluster, pki: &Pki, node: &Node) -> Result<(), Error> {
    let name = node.name();
    // Its limits of connection tracking are machine-wide: zero leaves them alone.
    let proxy = flags(&[
        (
            "kubeconfig",
            &pki.kubeconfig(&format!("proxy-{name}"), user("system:kube-proxy"))?,
        ),
        ("proxy-mode", "nftables"),
        ("cluster-cidr", PODS),
        ("hostname-override", &name),
        ("conntrack-max-per-core", "0"),
        ("conntrack-tcp-timeout-established", "0"),
        ("conntrack-tcp-timeout-close-wait", "0"),
    ]);
    let program = cluster.tools().kubernetes.join("kube-proxy");
    node.spawn("kube-proxy", program, &proxy)
}

fn user(common_name: &str) -> Subject<'_> {
    Subject {
        common_name,
        organization: None,
    }
}

fn flags(pairs: &[(&str, &str)]) -> Vec<String> {
    pairs
        .iter()
        .map(|(name, value)| format!("--{name}={value}"))
        .collect()
}

fn write(path: &Path, text: &str) -> Result<(), Error> {
    fs::write(path, text).map_err(Error::file("write", path))
}
