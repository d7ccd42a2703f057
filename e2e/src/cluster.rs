//! A Kubernetes cluster on this machine: one control plane and one to nine nodes, each a set of
//! namespaces of its own, all gone without a trace when removed. The first node carries the control plane.
//!
//! It owns the order in which a cluster comes up. It knows nothing of what will run on it.

use crate::access::Access;
use crate::command::run;
use crate::image::{Image, recipes};
use crate::toolchain::Toolchain;
use crate::wait::{Seen, until};
use crate::{Error, progress};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

mod certificates;
mod cgroup;
pub mod cleanup;
mod components;
mod network;
mod node;

pub use node::Node;

/// Where clusters keep their files while they live: one folder each.
const STATE: &str = "/var/lib/kvasir-e2e";
/// What stands before a command that is to run as root and still find cargo, the toolchain and the cache of the
/// user; sudo alone hides all three.
pub const AS_ROOT: &str = r#"sudo env PATH="$PATH" HOME="$HOME""#;
/// How long any one part of the start may take before it counts as failed.
const START_TIMEOUT: Duration = Duration::from_secs(90);
/// How often a condition is looked at meanwhile.
const POLL_INTERVAL: Duration = Duration::from_millis(150);

/// A cluster that runs.
pub struct Cluster {
    name: Name,
    nodes: Vec<Node>,
    tools: Toolchain,
}

impl Cluster {
    /// Brings a cluster up and waits until its nodes and its DNS are ready.
    ///
    /// # Errors
    /// Without root, when a program is missing, or when a part does not come up; what was started stays
    /// for inspection until [`cleanup::remove`].
    pub fn start(name: &Name, n_nodes: u8, tools: Toolchain) -> Result<Self, Error> {
        require_root()?;
        cleanup::remove(name)?;
        let step = progress::begin(format_args!(
            "Starting Kubernetes {} with {n_nodes} {}; its files are in {}",
            crate::toolchain::KUBERNETES,
            if n_nodes == 1 { "node" } else { "nodes" },
            name.folder().display()
        ));
        let folder = name.folder();
        fs::create_dir_all(&folder).map_err(Error::file("create", &folder))?;
        let nodes = (1..=n_nodes)
            .map(|index| Node::start(name, index))
            .collect::<Result<Vec<_>, _>>()?;
        network::join(&nodes)?;
        let cluster = Self {
            name: name.clone(),
            nodes,
            tools,
        };
        let pki = components::Pki::create(&cluster)?;
        components::start_control_plane(&cluster, &pki)?;
        cluster.relay_to_host(&pki)?;
        for node in &cluster.nodes {
            components::start_containerd(node)?;
        }
        cluster.import(&recipes::pause(&folder)?)?;
        cluster.import(&recipes::coredns(&cluster.tools.coredns))?;
        cluster.await_api()?;
        components::start_controllers(&cluster, &pki)?;
        for node in &cluster.nodes {
            components::start_kubelet(&cluster, &pki, node)?;
            components::start_proxy(&cluster, &pki, node)?;
        }
        cluster.await_nodes()?;
        cluster
            .access()
            .apply(include_str!("../cluster/manifests/coredns.yaml"))?;
        cluster.await_dns()?;
        step.done("the nodes and the cluster's DNS are ready");
        Ok(cluster)
    }

    /// The cluster of that name if it runs and answers.
    #[must_use]
    pub fn attach(name: &Name, tools: Toolchain) -> Option<Self> {
        let nodes = Node::running(name);
        let cluster = Self {
            name: name.clone(),
            nodes,
            tools,
        };
        let answers = !cluster.nodes.is_empty()
            && run(cluster
                .kubectl()
                .args(["get", "--raw=/readyz", "--request-timeout=3s"]))
            .is_ok();
        answers.then_some(cluster)
    }

    /// Has the cluster `name` removed when this process ends, in whichever way it ends. `program` is
    /// kvasir-e2e.
    ///
    /// # Errors
    /// When the watcher cannot be started.
    pub fn remove_with_this_process(name: &Name, program: &Path) -> Result<(), Error> {
        let mut command = Command::new("setsid");
        command
            .arg(program)
            .args(["down", "--when-stdin-closes", "--name"])
            .arg(&name.0);
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let watcher = command.spawn().map_err(|source| Error::NotStarted {
            command: crate::command::shown(&command),
            source,
        })?;
        // The pipe's other end stays open for as long as this process lives, and closes with it.
        std::mem::forget(watcher);
        Ok(())
    }

    /// The kubeconfig of its administrator, which works anywhere on this machine.
    #[must_use]
    pub fn kubeconfig(&self) -> PathBuf {
        self.name.folder().join("kubeconfig")
    }

    /// The administrator's way to it.
    #[must_use]
    pub fn access(&self) -> Access {
        Access {
            kubectl: self.tools.kubernetes.join("kubectl"),
            helm: self.tools.helm.join("helm"),
            kubeconfig: Some(self.kubeconfig()),
            context: None,
            cache: Some(self.name.folder().join("cache")),
        }
    }

    /// kubectl, as the administrator.
    #[must_use]
    pub fn kubectl(&self) -> Command {
        self.access().kubectl()
    }

    /// The programs it was made of.
    #[must_use]
    pub fn tools(&self) -> &Toolchain {
        &self.tools
    }

    /// What it goes by.
    #[must_use]
    pub fn name(&self) -> &Name {
        &self.name
    }

    /// The folder of its files.
    #[must_use]
    pub fn folder(&self) -> PathBuf {
        self.name.folder()
    }

    /// Its nodes; the first carries the control plane.
    #[must_use]
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// Puts an image on every node, as no registry can.
    ///
    /// # Errors
    /// When it cannot be written or imported.
    pub fn import(&self, image: &Image) -> Result<(), Error> {
        // Named for who imports what: `up` may import into a cluster that a test imports into.
        let file = format!("{}-{}.tar", image.reference, std::process::id());
        let archive = self.name.folder().join(file.replace(['/', ':'], "-"));
        image.write(&archive)?;
        for node in &self.nodes {
            until(
                "containerd takes images",
                START_TIMEOUT,
                POLL_INTERVAL,
                || {
                    run(node
                        .command("ctr")
                        .args(["-n", "k8s.io", "images", "import"])
                        .arg(&archive))
                    .map(Seen::Yes)
                },
            )?;
        }
        fs::remove_file(&archive).map_err(Error::file("remove", &archive))
    }

    /// The API server lives in the first node's network; a relay of two halves, joined by a socket in the
    /// file system, brings it to this machine's loopback. Both halves die with the node.
    fn relay_to_host(&self, pki: &components::Pki) -> Result<(), Error> {
        let first = &self.nodes[0];
        let socket = self.name.folder().join("apiserver.sock");
        let port = free_port()?;
        first.spawn(
            "relay-inside",
            "socat",
            &[
                format!("UNIX-LISTEN:{},fork,mode=600", socket.display()),
                "TCP:127.0.0.1:6443".into(),
            ],
        )?;
        first.spawn_in_host_network(
            "relay-outside",
            "socat",
            &[
                format!("TCP-LISTEN:{port},bind=127.0.0.1,reuseaddr,fork"),
                format!("UNIX-CONNECT:{}", socket.display()),
            ],
        )?;
        pki.write_admin_kubeconfig(&self.kubeconfig(), port)
    }

    fn await_api(&self) -> Result<(), Error> {
        until(
            "the API server is ready",
            START_TIMEOUT,
            POLL_INTERVAL,
            || {
                let said =
                    run(self
                        .kubectl()
                        .args(["get", "--raw=/readyz", "--request-timeout=3s"]))?;
                Ok(if said == "ok" {
                    Seen::Yes(())
                } else {
                    Seen::NotYet(said)
                })
            },
        )
        .map_err(|error| self.with_log(error, "kube-apiserver"))
    }

    fn await_nodes(&self) -> Result<(), Error> {
        let ready =
            "jsonpath={range .items[*]}{.status.conditions[?(@.type==\"Ready\")].status} {end}";
        until("every node is Ready", START_TIMEOUT, POLL_INTERVAL, || {
            let said = run(self.kubectl().args(["get", "nodes", "-o", ready]))?;
            let n_ready = said
                .split_whitespace()
                .filter(|&status| status == "True")
                .count();
            let all = n_ready == self.nodes.len();
            Ok(if all {
                Seen::Yes(())
            } else {
                Seen::NotYet(format!("{n_ready} of {} Ready", self.nodes.len()))
            })
        })
        .map_err(|error| self.with_log(error, "kubelet"))?;
        until(
            "the default service account exists",
            START_TIMEOUT,
            POLL_INTERVAL,
            || run(self.kubectl().args(["get", "serviceaccount", "default"])).map(Seen::Yes),
        )
        .map(drop)
    }

    fn await_dns(&self) -> Result<(), Error> {
        run(self.kubectl().args([
            "-n",
            "kube-system",
            "rollout",
            "status",
            "deployment/coredns",
            "--timeout=90s",
        ]))?;
        let look = "import socket; socket.getaddrinfo('kubernetes.default.svc.cluster.local', 443)";
        until(
            "the cluster's DNS answers",
            START_TIMEOUT,
            POLL_INTERVAL,
            || run(self.nodes[0].command("python3").args(["-c", look])).map(Seen::Yes),
        )
        .map(drop)
    }

    fn with_log(&self, error: Error, component: &str) -> Error {
        let log = self.nodes[0].log(component);
        Error::Refused(format!(
            "{error}\nthe end of {}:\n{}",
            log.display(),
            crate::command::last_words(&log)
        ))
    }
}

/// A cluster's name: what keeps two clusters on one machine apart.
#[derive(Debug, Clone)]
pub struct Name(String);

impl std::str::FromStr for Name {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let fine = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
        if text.is_empty() || text.len() > 30 || !text.chars().all(fine) {
            return Err(Error::Refused(format!(
                "the cluster name {text:?} must have 1 to 30 lower-case letters, digits or hyphens"
            )));
        }
        Ok(Self(text.to_owned()))
    }
}

impl std::fmt::Display for Name {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl Name {
    /// The folder of the cluster's files.
    #[must_use]
    pub fn folder(&self) -> PathBuf {
        Path::new(STATE).join(&self.0)
    }
}

/// True when this process may make namespaces, mounts and cgroups.
#[must_use]
pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

fn require_root() -> Result<(), Error> {
    if is_root() {
        return Ok(());
    }
    Err(Error::Refused(format!(
        "a cluster needs root: its kubelets make namespaces, mounts and cgroups; run this with {AS_ROOT} before it"
    )))
}

fn free_port() -> Result<u16, Error> {
    std::net::TcpListener::bind("127.0.0.1:0")
        .and_then(|listener| listener.local_addr())
        .map(|address| address.port())
        .map_err(|source| Error::NotStarted {
            command: "a listener on 127.0.0.1".into(),
            source,
        })
}
