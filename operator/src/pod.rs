//! A pod of an `LLMDeployment`: the names and ports that the operator gives it, and what it says of itself (whose it is,
//! whether it is ready, how its containers ended). Pure, and a leaf: it knows no plan.

use std::sync::Arc;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{ContainerStateTerminated, ContainerStatus, Pod, PodSpec};
use kvasir_crds::llmdeployment::SELECTOR_LABEL;

/// The container that is the operator's.
pub const SERVER: &str = "server";

/// A port of the container [`SERVER`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ContainerPort {
    /// Its name, by which probes, the Service and the PodMonitor refer to it.
    pub name: &'static str,
    /// Its number.
    pub number: u16,
}

/// The API. The Service has the same number.
pub const HTTP: ContainerPort = ContainerPort {
    name: "http",
    number: 8000,
};

/// `/health`, `/ready`, `/load` and `/metrics`, for who knows the pod's address: the kubelet, the operator, Prometheus.
pub const MANAGEMENT: ContainerPort = ContainerPort {
    name: "management",
    number: 8001,
};

/// A longer line is cut: a status is no place for a whole log.
pub const LINE_LIMIT_CHARS: usize = 1000;

/// The pods that are replicas: those that are not being deleted and have not ended. A pod that was evicted or that a node
/// refused stays listed until it is collected, and another one has taken its place long before.
pub fn replicas(pods: &[Arc<Pod>]) -> impl Iterator<Item = &Pod> {
    let pods = pods.iter().map(Arc::as_ref);
    pods.filter(|pod| pod.metadata.deletion_timestamp.is_none() && !has_ended(pod))
}

/// All its containers have ended, and none is started again: phase Failed or Succeeded.
#[must_use]
pub fn has_ended(pod: &Pod) -> bool {
    let phase = pod.status.as_ref().and_then(|s| s.phase.as_deref());
    matches!(phase, Some("Failed" | "Succeeded"))
}

/// The pod's condition Ready.
#[must_use]
pub fn is_ready(pod: &Pod) -> bool {
    let conditions = pod
        .status
        .as_ref()
        .and_then(|s| s.conditions.as_deref())
        .unwrap_or_default();
    conditions
        .iter()
        .any(|c| c.type_ == "Ready" && c.status == "True")
}

/// The server's startup probe has passed: it has served since its container started.
#[must_use]
pub fn has_started(pod: &Pod) -> bool {
    let containers = pod
        .status
        .as_ref()
        .and_then(|s| s.container_statuses.as_deref())
        .unwrap_or_default();
    containers
        .iter()
        .any(|c| c.name == SERVER && c.started == Some(true))
}

/// The replicas that are asked for their load: those that have served since their container started.
pub fn asked_for_load(pods: &[Arc<Pod>]) -> impl Iterator<Item = &Pod> {
    replicas(pods).filter(|pod| has_started(pod) && address(pod).is_some())
}

/// The replicas that are asked how their start goes: their server runs, and has not served yet.
pub fn asked_for_start(pods: &[Arc<Pod>]) -> impl Iterator<Item = &Pod> {
    let runs = |pod: &&Pod| running_since(pod).is_some() && address(pod).is_some();
    replicas(pods).filter(|pod| !has_started(pod)).filter(runs)
}

/// The pod's address.
#[must_use]
pub fn address(pod: &Pod) -> Option<&str> {
    pod.status.as_ref()?.pod_ip.as_deref()
}

/// Since when its server's container runs, where it does.
#[must_use]
pub fn running_since(pod: &Pod) -> Option<Timestamp> {
    let mut containers = pod.status.as_ref()?.container_statuses.iter().flatten();
    let server = containers.find(|c| c.name == SERVER)?;
    let running = server.state.as_ref()?.running.as_ref()?;
    running.started_at.as_ref().map(|time| time.0)
}

/// The name of the `LLMDeployment` that a pod belongs to.
#[must_use]
pub fn deployment_of(pod: &Pod) -> Option<&str> {
    pod.metadata
        .labels
        .as_ref()?
        .get(SELECTOR_LABEL)
        .map(String::as_str)
}

/// The port of `/load`. A pod that an operator before [`MANAGEMENT`] made has everything on [`HTTP`], and an upgrade of
/// the operator doesn't replace it.
#[must_use]
pub fn load_port(pod: &Pod) -> u16 {
    let containers = pod.spec.iter().flat_map(|spec| &spec.containers);
    let ports = containers.filter_map(|container| container.ports.as_deref());
    let has_management = ports
        .flatten()
        .any(|port| port.name.as_deref() == Some(MANAGEMENT.name));
    match has_management {
        true => MANAGEMENT.number,
        false => HTTP.number,
    }
}

/// Takes out of a pod what nobody reads: all of its spec but the ports and limits of the containers.
pub fn strip(pod: &mut Pod) {
    pod.metadata.managed_fields = None;
    let Some(spec) = pod.spec.take() else { return };
    let mut kept = PodSpec::default();
    for container in spec.containers {
        kept.containers.push(k8s_openapi::api::core::v1::Container {
            name: container.name,
            ports: container.ports,
            resources: container.resources,
            ..Default::default()
        });
    }
    pod.spec = Some(kept);
}

/// How a container's last run ended, unless it serves again since.
#[must_use]
pub fn last_termination(container: &ContainerStatus) -> Option<&ContainerStateTerminated> {
    let state = container.state.as_ref();
    if let Some(now) = state.and_then(|state| state.terminated.as_ref()) {
        return Some(now);
    }
    // A run that ended long ago says nothing about a server that started well after it.
    let serves = container.started == Some(true) && state.is_some_and(|s| s.running.is_some());
    let before = container.last_state.as_ref()?.terminated.as_ref();
    before.filter(|_| !serves)
}

/// The memory limit of a container.
#[must_use]
pub fn memory_limit<'a>(pod: &'a Pod, container: &str) -> Option<&'a str> {
    let mut containers = pod.spec.iter().flat_map(|spec| &spec.containers);
    let resources = containers.find(|c| c.name == container)?.resources.as_ref();
    let memory = resources?.limits.as_ref()?.get("memory")?;
    Some(memory.0.as_str())
}

/// The sentence at a log's end that says why the program ended: its last line, unless that only points elsewhere. A program
/// whose flags are wrong ends with the way to its help (clap), and one that panicked with the way to a backtrace.
#[must_use]
pub fn last_words(log: &str) -> Option<String> {
    let lines: Vec<&str> = log.lines().map(str::trim).collect();
    let filled = || {
        lines
            .iter()
            .enumerate()
            .filter(|(_, line)| !line.is_empty())
    };
    let (_, last) = filled().next_back()?;
    let is_signpost = |line: &str| {
        line.starts_with("For more information, try ")
            || line.starts_with("note: run with `RUST_BACKTRACE")
    };
    if !is_signpost(last) {
        return Some((*last).to_owned());
    }
    let error = filled().rfind(|(_, line)| line.starts_with("error: "));
    let Some((at, line)) = error else {
        let before = filled().rfind(|(_, line)| !is_signpost(line));
        return Some(before.map_or(*last, |(_, line)| *line).to_owned());
    };
    // Its list, up to the next empty line: the values that are possible, the arguments that lack.
    let list = lines[at + 1..].iter().take_while(|line| !line.is_empty());
    Some(
        [line]
            .into_iter()
            .chain(list)
            .copied()
            .collect::<Vec<_>>()
            .join(" "),
    )
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    #[test]
    fn load_is_read_where_the_pod_answers_it() {
        let http = json!({ "name": "http", "containerPort": 8000 });
        let management = json!({ "name": "management", "containerPort": 8001 });
        for (why, ports, want) in [
            ("a pod of today", vec![http.clone(), management], 8001),
            ("a pod of an operator with one port", vec![http], 8000),
            ("no ports at all", vec![], 8000),
        ] {
            let mut pod: Pod = serde_json::from_value(json!({
                "metadata": { "name": "p", "managedFields": [{ "manager": "kubelet" }] },
                "spec": { "nodeName": "n", "containers": [
                    { "name": "proxy", "ports": [{ "containerPort": 9000 }] },
                    { "name": "server", "image": "i", "args": ["--a"], "ports": ports }] }
            }))
            .unwrap();
            assert_eq!(load_port(&pod), want, "{why}");
            strip(&mut pod);
            assert_eq!(load_port(&pod), want, "{why}, in the cache");
            let kept = serde_json::to_value(&pod).unwrap();
            assert_eq!(kept["spec"]["nodeName"], Value::Null);
            assert_eq!(kept["spec"]["containers"][1]["args"], Value::Null);
            assert_eq!(kept["metadata"]["managedFields"], Value::Null);
        }
    }

    #[test]
    fn the_last_words_say_what_is_wrong() {
        for (why, log, want) in [
            ("the last line with words", "a\nb\n\n  \n", Some("b")),
            ("no words", "\n \n", None),
            ("nothing", "", None),
            (
                "a mistyped flag",
                "error: unexpected argument '--max-seqs' found\n\n  tip: a similar argument exists: '--max-num-seqs'\n\n\
                 Usage: kvasir-server [OPTIONS]\n\nFor more information, try '--help'.\n",
                Some("error: unexpected argument '--max-seqs' found"),
            ),
            (
                "a value that is none",
                "error: invalid value 'x' for '--dtype <DTYPE>'\n  [possible values: auto, float32]\n\n\
                 For more information, try '--help'.\n",
                Some(
                    "error: invalid value 'x' for '--dtype <DTYPE>' [possible values: auto, float32]",
                ),
            ),
            (
                "an argument that lacks",
                "error: the following required arguments were not provided:\n  --model <MODEL>\n\nUsage: x\n\n\
                 For more information, try '--help'.",
                Some("error: the following required arguments were not provided: --model <MODEL>"),
            ),
            (
                "a panic",
                "loading\n\nthread 'main' panicked at src/main.rs:3:5:\nindex out of bounds\n\
                 note: run with `RUST_BACKTRACE=1` environment variable to display a backtrace\n",
                Some("index out of bounds"),
            ),
            (
                "an error long ago is not the last word",
                "error: no device, trying the next\nkvasir-server: weights end too early\n",
                Some("kvasir-server: weights end too early"),
            ),
            (
                "the kubelet kept only the end",
                "\nFor more information, try '--help'.",
                Some("For more information, try '--help'."),
            ),
        ] {
            assert_eq!(last_words(log).as_deref(), want, "{why}");
        }
    }

    #[test]
    fn a_pod_that_ended_or_goes_is_no_replica() {
        for (phase, deleted, want) in [
            ("Pending", None, true),
            ("Running", None, true),
            ("Unknown", None, true),
            ("Failed", None, false),
            ("Succeeded", None, false),
            ("Running", Some("2026-01-01T00:00:00Z"), false),
        ] {
            let pod: Pod = serde_json::from_value(json!({
                "metadata": { "deletionTimestamp": deleted }, "status": { "phase": phase } }))
            .unwrap();
            assert_eq!(
                replicas(&[Arc::new(pod)]).count() == 1,
                want,
                "{phase} {deleted:?}"
            );
        }
    }
}
