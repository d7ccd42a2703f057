//! What a cluster leaves behind: nothing, also after a crash.

use kvasir_e2e::cluster::{Cluster, Name, cleanup, is_root};
use kvasir_e2e::command::run;
use kvasir_e2e::toolchain::Toolchain;
use std::fs;
use std::path::Path;
use std::process::Command;

/// What of the machine a cluster could change. The shared test cluster runs beside, so cgroups are looked at
/// by name.
fn machine() -> Vec<(&'static str, String)> {
    let program = |line: &[&str]| run(Command::new(line[0]).args(&line[1..])).unwrap_or_default();
    let file = |path: &str| fs::read_to_string(path).unwrap_or_default();
    vec![
        ("links", program(&["ip", "-brief", "link"])),
        ("routes", program(&["ip", "route", "show", "table", "all"])),
        ("packet filter", program(&["nft", "list", "ruleset"])),
        ("mounts", file("/proc/self/mountinfo")),
        ("overcommit", file("/proc/sys/vm/overcommit_memory")),
        ("panic", file("/proc/sys/kernel/panic")),
        ("panic on oops", file("/proc/sys/kernel/panic_on_oops")),
        ("forwarding", file("/proc/sys/net/ipv4/ip_forward")),
        (
            "kubelet's folder",
            Path::new("/var/lib/kubelet").exists().to_string(),
        ),
        (
            "containerd's folder",
            Path::new("/opt/containerd").exists().to_string(),
        ),
    ]
}

#[test]
fn a_crashed_cluster_is_removed_without_a_trace_and_twice() {
    if !is_root() {
        return;
    }
    let text = format!("removed-{}", std::process::id());
    let name: Name = text.parse().expect("a name");
    let tools = Toolchain::ensure().expect("the programs");
    Cluster::remove_with_this_process(&name, Path::new(env!("CARGO_BIN_EXE_kvasir-e2e")))
        .expect("a watcher");
    let before = machine();
    let cluster = Cluster::start(&name, 1, tools.clone()).expect("it starts");
    assert!(
        Cluster::attach(&name, tools).is_some(),
        "it is found by its name"
    );
    assert_eq!(
        machine(),
        before,
        "a running cluster changes nothing outside of its namespaces"
    );
    let node = &cluster.nodes()[0];
    run(node.command("pkill").args(["-KILL", "etcd"])).expect("etcd crashes");
    for _ in 0..2 {
        cleanup::remove(&name).expect("removed");
        assert_eq!(machine(), before);
        assert!(!name.folder().exists());
        assert!(
            !Path::new("/sys/fs/cgroup/memory")
                .join(&node.cgroup)
                .exists()
        );
        assert!(!Path::new("/sys/fs/cgroup").join(&node.cgroup).exists());
    }
}
