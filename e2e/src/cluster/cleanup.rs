//! Taking a cluster away, whatever state it is in: running, half started, crashed, or gone already. It
//! goes by what it finds (marked processes, cgroups and folders by name), not by what somebody remembers.

use super::{Name, cgroup, node};
use crate::Error;
use crate::wait::{Seen, until};
use rustix::process::{Pid, Signal, kill_process};
use std::fs;
use std::path::Path;
use std::time::Duration;

/// Removes the cluster `name`; nothing to remove is success.
///
/// # Errors
/// When something of it cannot be removed.
pub fn remove(name: &Name) -> Result<(), Error> {
    until(
        "the nodes' processes end",
        Duration::from_secs(20),
        Duration::from_millis(50),
        || {
            let alive: Vec<u32> = (1..=9)
                .flat_map(|index| node::marked_processes(&node::mark(name, index)))
                .collect();
            for pid in &alive {
                let pid = i32::try_from(*pid).ok().and_then(Pid::from_raw);
                // One that ended meanwhile is what is wanted; the next look tells.
                let _ = pid.map(|pid| kill_process(pid, Signal::KILL));
            }
            Ok(if alive.is_empty() {
                Seen::Yes(())
            } else {
                Seen::NotYet(format!("processes {alive:?}"))
            })
        },
    )?;
    for index in 1..=9 {
        cgroup::remove(&node::cgroup_name(name, index))?;
    }
    let folder = name.folder();
    if folder.exists() {
        fs::remove_dir_all(&folder).map_err(Error::file("remove", &folder))?;
    }
    // The parent is shared with other clusters; it goes with the last.
    let _ = fs::remove_dir(Path::new(super::STATE));
    Ok(())
}
