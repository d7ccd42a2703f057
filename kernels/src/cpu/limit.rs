//! How much memory this process may use: the smallest limit of the cgroups around it (v1 and v2), the machine's
//! memory, and what is taken already. It reads /proc and /sys and decides nothing else.

use std::fs;

/// Bytes that this process may use: the smallest cgroup limit on the way to the root, and never more than what the
/// machine has available beside what the process uses already.
pub(crate) fn memory_limit() -> u64 {
    let read = |path: &str| fs::read_to_string(path).ok();
    let machine = read("/proc/meminfo").map_or(u64::MAX, |text| {
        kilobytes(&text, "MemAvailable:")
            .or_else(|| kilobytes(&text, "MemTotal:"))
            .unwrap_or(u64::MAX)
    });
    let machine = machine.saturating_add(anonymous_bytes());
    read("/proc/self/cgroup").map_or(machine, |groups| machine.min(cgroup_limit(&groups, read)))
}

/// Anonymous memory of this process that is resident: its heap, stacks and mappings.
pub(crate) fn anonymous_bytes() -> u64 {
    fs::read_to_string("/proc/self/status")
        .ok()
        .and_then(|text| kilobytes(&text, "RssAnon:"))
        .unwrap_or(0)
}

/// A line such as `MemTotal:  24689764 kB` in bytes.
fn kilobytes(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    line.split_whitespace()
        .next()?
        .parse::<u64>()
        .ok()
        .map(|kilobytes| kilobytes << 10)
}

/// The smallest limit in the groups that `/proc/self/cgroup` names (`id:controllers:path` a line) and their parents.
/// In a container the path may be the host's and not exist here; the root, which does, is then the container's own.
fn cgroup_limit(groups: &str, read: impl Fn(&str) -> Option<String>) -> u64 {
    let mut limit = u64::MAX;
    for line in groups.lines() {
        let mut fields = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(mut path)) = (fields.next(), fields.next()) else {
            continue;
        };
        let (mounts, file): (&[&str], _) = match controllers {
            "" => (&["/sys/fs/cgroup", "/sys/fs/cgroup/unified"], "memory.max"),
            _ if controllers.split(',').any(|c| c == "memory") => {
                (&["/sys/fs/cgroup/memory"], "memory.limit_in_bytes")
            }
            _ => continue,
        };
        loop {
            let here = path.trim_end_matches('/');
            for mount in mounts {
                // "max" is no number and no limit.
                let found = read(&format!("{mount}{here}/{file}"))
                    .and_then(|text| text.trim().parse().ok());
                limit = limit.min(found.unwrap_or(u64::MAX));
            }
            let Some(end) = here.rfind('/') else { break };
            path = &here[..end];
        }
    }
    limit
}

#[cfg(test)]
mod tests {
    use super::{cgroup_limit, memory_limit};

    #[test]
    fn the_smallest_limit_on_the_way_up_counts() {
        for (why, groups, files, want) in [
            (
                "v2, own group",
                "0::/pod/app\n",
                vec![("/sys/fs/cgroup/pod/app/memory.max", "1000\n")],
                1000,
            ),
            (
                "v2, the parent is smaller",
                "0::/pod/app\n",
                vec![
                    ("/sys/fs/cgroup/pod/app/memory.max", "max\n"),
                    ("/sys/fs/cgroup/pod/memory.max", "700\n"),
                ],
                700,
            ),
            (
                "v2 in a container: its root is the limit",
                "0::/\n",
                vec![("/sys/fs/cgroup/memory.max", "5\n")],
                5,
            ),
            (
                "v1, beside other controllers",
                "4:cpu,cpuacct:/a\n3:memory:/a/b\n0::/\n",
                vec![
                    (
                        "/sys/fs/cgroup/memory/a/b/memory.limit_in_bytes",
                        "9223372036854771712\n",
                    ),
                    ("/sys/fs/cgroup/memory/a/memory.limit_in_bytes", "300\n"),
                    ("/sys/fs/cgroup/cpu,cpuacct/a/memory.limit_in_bytes", "1\n"),
                ],
                300,
            ),
            (
                "v1 without a namespace: the host's path is missing, the root is ours",
                "3:memory:/docker/0123\n",
                vec![("/sys/fs/cgroup/memory/memory.limit_in_bytes", "42\n")],
                42,
            ),
            (
                "no limit",
                "0::/a\n",
                vec![("/sys/fs/cgroup/a/memory.max", "max\n")],
                u64::MAX,
            ),
            ("nonsense", "memory\n::\n", vec![], u64::MAX),
        ] {
            let read = |path: &str| {
                files
                    .iter()
                    .find(|(name, _)| *name == path)
                    .map(|(_, text)| text.to_string())
            };
            assert_eq!(cgroup_limit(groups, read), want, "{why}");
        }
    }

    #[test]
    fn this_machine_has_a_limit() {
        let limit = memory_limit();
        assert!(limit > 1 << 20 && limit < 1 << 50, "{limit}");
    }
}
