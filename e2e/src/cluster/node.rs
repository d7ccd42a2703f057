//! One node: a process that holds the mount, network, PID, host name and IPC namespaces in which the
//! node's programs run. Killing the holder ends everything in it. The holder is found by a mark on its
//! command line, so no file can be out of date about what runs.

use super::{Name, cgroup};
use crate::Error;
use crate::command::{run, run_logged};
use crate::wait::{Seen, until};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// What a node's file system has of its own, run by bash inside of it; `$1` is the cluster's folder, `$2`
/// the node's, `$3` its host name. Its last lines keep the kubelet from three machine-wide settings: the
/// files that it would write already say what it wants.
const SET_UP: &str = r#"
set -euo pipefail
mount -t tmpfs -o mode=755 tmpfs /run
mkdir /run/cluster && mount --bind "$1" /run/cluster
mount -t tmpfs -o mode=755 tmpfs /var/lib
mount -t tmpfs -o mode=755 tmpfs /var/log
mkdir -p "$1" && mount --bind /run/cluster "$1"
umount /run/cluster
cover() {
    target=$(readlink -f "$2")
    mkdir -p "$(dirname "$target")"
    [ -e "$target" ] || touch "$target"
    mount --bind "$1" "$target"
}
mkdir -p "$2/etc"
printf 'nameserver 10.96.0.10\nsearch default.svc.cluster.local svc.cluster.local cluster.local\noptions ndots:5\n' > "$2/etc/resolv.conf"
printf '127.0.0.1 localhost\n%s %s\n' "$4" "$3" > "$2/etc/hosts"
: > "$2/etc/upstream-resolv.conf"
cover "$2/etc/resolv.conf" /etc/resolv.conf
cover "$2/etc/hosts" /etc/hosts
echo "$3" > /proc/sys/kernel/hostname
for setting in vm/overcommit_memory=1 kernel/panic=10 kernel/panic_on_oops=1; do
    file="$2/etc/$(basename "${setting%=*}")"
    echo "${setting#*=}" > "$file"
    mount --bind "$file" "/proc/sys/${setting%=*}"
done
ip link set lo up
echo 1 > /proc/sys/net/ipv4/ip_forward
"#;

/// A node that runs.
#[derive(Debug)]
pub struct Node {
    /// Its number, from 1.
    pub index: u8,
    /// The holder, by its number in this machine's PID namespace.
    pub holder: u32,
    /// The node's own folder.
    pub folder: PathBuf,
    /// The path of its cgroup below each hierarchy's root.
    pub cgroup: String,
}

impl Node {
    /// Makes the namespaces and mounts what is the node's own; nothing runs in them yet.
    pub(super) fn start(cluster: &Name, index: u8) -> Result<Self, Error> {
        let folder = cluster.folder().join(format!("node-{index}"));
        let logs = folder.join("logs");
        fs::create_dir_all(&logs).map_err(Error::file("create", &logs))?;
        let cgroup = cgroup_name(cluster, index);
        cgroup::create(&cgroup)?;
        // bash reaps what is orphaned in the node, which a bare `sleep` would not.
        let mut holder = Command::new("setsid");
        holder
            .args([
                "--fork",
                "unshare",
                "--mount",
                "--net",
                "--pid",
                "--uts",
                "--ipc",
                "--fork",
                "--kill-child",
            ])
            .args(["--mount-proc", "--propagation", "private", "bash", "-c"])
            .arg("sleep infinity & wait $!")
            .arg(mark(cluster, index));
        run_logged(&mut holder, &logs.join("holder.log"))?;
        let node = until(
            "the node's namespaces exist",
            Duration::from_secs(10),
            Duration::from_millis(20),
            || {
                let found = Self::running(cluster)
                    .into_iter()
                    .find(|node| node.index == index);
                Ok(found.map_or_else(|| Seen::NotYet("no holder".into()), Seen::Yes))
            },
        )?;
        run(node
            .command("bash")
            .args(["-c", SET_UP, "set-up"])
            .args([&cluster.folder(), &node.folder])
            .args([node.name(), node.address()]))?;
        Ok(node)
    }

    /// The cluster's nodes that run now, in order.
    pub(super) fn running(cluster: &Name) -> Vec<Self> {
        let mut nodes: Vec<Self> = (1..=9)
            .filter_map(|index| {
                let holder = marked_processes(&mark(cluster, index))
                    .into_iter()
                    .find(|&pid| is_holder(pid))?;
                let folder = cluster.folder().join(format!("node-{index}"));
                Some(Self {
                    index,
                    holder,
                    folder,
                    cgroup: cgroup_name(cluster, index),
                })
            })
            .collect();
        nodes.sort_by_key(|node| node.index);
        nodes
    }

    /// Its name in Kubernetes.
    #[must_use]
    pub fn name(&self) -> String {
        format!("node-{}", self.index)
    }

    /// Its address among the nodes.
    #[must_use]
    pub fn address(&self) -> String {
        format!("10.87.0.{}", self.index)
    }

    /// A command that runs inside the node, as a program on a real node would: its network, its names.
    #[must_use]
    pub fn command(&self, program: impl AsRef<Path>) -> Command {
        let mut command = self.enter(&["--mount", "--net", "--pid", "--uts", "--ipc"]);
        command.arg(program.as_ref());
        command
    }

    /// A command that sees this machine's files and the node's network.
    #[must_use]
    pub fn command_in_network(&self, program: impl AsRef<Path>) -> Command {
        let mut command = self.enter(&["--net"]);
        command.arg(program.as_ref());
        command
    }

    /// Starts a program that runs until the node ends.
    pub(super) fn spawn(
        &self,
        name: &str,
        program: impl AsRef<Path>,
        args: &[String],
    ) -> Result<(), Error> {
        self.spawn_by(&mut self.command("setsid"), name, program.as_ref(), args)
    }

    /// The same, in this machine's network and file system: it only dies with the node.
    pub(super) fn spawn_in_host_network(
        &self,
        name: &str,
        program: &str,
        args: &[String],
    ) -> Result<(), Error> {
        self.spawn_by(
            self.enter(&["--pid"]).arg("setsid"),
            name,
            program.as_ref(),
            args,
        )
    }

    /// Where a program writes what it has to say.
    #[must_use]
    pub fn log(&self, name: &str) -> PathBuf {
        self.folder.join("logs").join(format!("{name}.log"))
    }

    fn spawn_by(
        &self,
        setsid: &mut Command,
        name: &str,
        program: &Path,
        args: &[String],
    ) -> Result<(), Error> {
        run(setsid
            .args([
                "--fork",
                "bash",
                "-c",
                r#"log=$1; shift; exec "$@" >>"$log" 2>&1 </dev/null"#,
                name,
            ])
            .arg(self.log(name))
            .arg(program)
            .args(args))
        .map(drop)
    }

    fn enter(&self, namespaces: &[&str]) -> Command {
        let mut command = Command::new("nsenter");
        command
            .args(["--target", &self.holder.to_string()])
            .args(namespaces)
            .arg("--");
        command
    }
}

/// The cgroup of a node, the same in every hierarchy.
pub(super) fn cgroup_name(cluster: &Name, index: u8) -> String {
    format!("kvasir-{cluster}-{index}")
}

/// What stands on the command line of a node's holder, and of nothing else.
pub(super) fn mark(cluster: &Name, index: u8) -> String {
    format!("kvasir-node/{cluster}/{index}")
}

/// The processes of this machine with `mark` as a word of their command line.
pub(super) fn marked_processes(mark: &str) -> Vec<u32> {
    let Ok(entries) = fs::read_dir("/proc") else {
        return Vec::new();
    };
    let pids = entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter(|pid| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        line.split(|&byte| byte == 0)
            .any(|word| word == mark.as_bytes())
    })
    .collect()
}

/// A holder is the first process of its PID namespace, and has become bash: all its namespaces are made.
fn is_holder(pid: u32) -> bool {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let field = |name: &str| {
        status
            .lines()
            .find_map(|line| line.strip_prefix(name))
            .unwrap_or_default()
            .trim()
    };
    let numbers: Vec<&str> = field("NSpid:").split_whitespace().collect();
    field("Name:") == "bash" && numbers.len() > 1 && numbers.last() == Some(&"1")
}
