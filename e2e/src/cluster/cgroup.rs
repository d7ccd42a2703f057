//! One cgroup for each node, made before its kubelet starts and removed after its processes are gone; in
//! every hierarchy of cgroup v1, or in the one of v2. Seen to run on v1 (the hybrid layout); written for v2.

use crate::Error;
use crate::wait::{Seen, until};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

const ROOT: &str = "/sys/fs/cgroup";
/// The controllers that the kubelet insists on, in v2.
const NEEDED: [&str; 4] = ["cpu", "cpuset", "memory", "pids"];

/// Makes the cgroup `name` below the root of each hierarchy.
pub(super) fn create(name: &str) -> Result<(), Error> {
    if is_v2() {
        delegate()?;
    }
    for hierarchy in hierarchies() {
        let folder = hierarchy.join(name);
        fs::create_dir_all(&folder).map_err(Error::file("create", &folder))?;
        // In v1 a new cpuset is empty, and no process can enter it.
        for file in ["cpuset.cpus", "cpuset.mems"] {
            let parent = hierarchy.join(file);
            if !is_v2() && parent.exists() {
                let value = fs::read(&parent).map_err(Error::file("read", &parent))?;
                let own = folder.join(file);
                fs::write(&own, value).map_err(Error::file("write", &own))?;
            }
        }
    }
    Ok(())
}

/// Removes the cgroup `name` and all below it, once the last of its processes is gone.
pub(super) fn remove(name: &str) -> Result<(), Error> {
    for hierarchy in hierarchies() {
        let folder = hierarchy.join(name);
        until(
            "the node's cgroups are empty",
            Duration::from_secs(10),
            Duration::from_millis(50),
            || remove_tree(&folder).map(Seen::Yes),
        )?;
    }
    Ok(())
}

fn is_v2() -> bool {
    Path::new(ROOT).join("cgroup.controllers").exists()
}

/// The mount points of all hierarchies, named ones too: runc follows them all.
fn hierarchies() -> Vec<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    mounts.lines().filter_map(hierarchy).collect()
}

/// The mount point in a line of mountinfo (proc_pid_mountinfo(5)), if a cgroup hierarchy is mounted there.
fn hierarchy(line: &str) -> Option<PathBuf> {
    let (mount, filesystem) = line.split_once(" - ")?;
    let is_cgroup = matches!(filesystem.split(' ').next(), Some("cgroup" | "cgroup2"));
    is_cgroup
        .then(|| mount.split(' ').nth(4).map(PathBuf::from))
        .flatten()
}

/// v2: children of the root get a controller only when the root passes it on. systemd passes most on
/// already; passing on one more changes nothing for who does not use it, and is what the next kubelet wants.
fn delegate() -> Result<(), Error> {
    let path = Path::new(ROOT).join("cgroup.subtree_control");
    let passed = fs::read_to_string(&path).map_err(Error::file("read", &path))?;
    for controller in NEEDED {
        if !passed.split_whitespace().any(|name| name == controller) {
            fs::write(&path, format!("+{controller}")).map_err(Error::file("write", &path))?;
        }
    }
    Ok(())
}

/// The files of a cgroup go with it; only folders are removed, the deepest first.
fn remove_tree(folder: &Path) -> Result<(), Error> {
    let Ok(entries) = fs::read_dir(folder) else {
        return Ok(());
    };
    for entry in entries.flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_tree(&entry.path())?;
        }
    }
    fs::remove_dir(folder).map_err(Error::file("remove", folder))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hierarchies_are_read_from_mountinfo() {
        for (why, line, want) in [
            (
                "v1",
                "31 25 0:27 / /sys/fs/cgroup/cpu rw,relatime shared:9 - cgroup cgroup rw,cpu",
                Some("/sys/fs/cgroup/cpu"),
            ),
            (
                "v2, no optional fields",
                "30 23 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw",
                Some("/sys/fs/cgroup"),
            ),
            (
                "another file system",
                "22 1 254:0 / / rw - ext4 /dev/vda rw",
                None,
            ),
        ] {
            assert_eq!(hierarchy(line), want.map(PathBuf::from), "{why}");
        }
    }
}
