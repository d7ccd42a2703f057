//! A pod of an `LLMDeployment`: the names and ports that the operator gives it, and what it says of itself (whose it is,
//! whether it is ready, how its containers ended). Pure, and a leaf: it knows no plan.

use std::sync::Arc;

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

/// The pods that are not being deleted.
pub fn not_terminating(pods: &[Arc<Pod>]) -> impl Iterator<Item = &Pod> {
    let pods = pods.iter().map(Arc::as_ref);
    pods.filter(|pod| pod.metadata.deletion_timestamp.is_none())
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

/// Takes out of a pod what nobody reads: all of its spec but the ports of the containers.
pub fn strip(pod: &mut Pod) {
    pod.metadata.managed_fields = None;
    let Some(spec) = pod.spec.take() else { return };
    let mut kept = PodSpec::default();
    for container in spec.containers {
        kept.containers.push(k8s_openapi::api::core::v1::Container {
            name: container.name,
            ports: container.ports,
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

/// The last line that isn't empty.
#[must_use]
pub fn last_line(text: &str) -> Option<&str> {
    text.lines().map(str::trim).rfind(|line| !line.is_empty())
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
    fn the_last_line_is_the_last_with_words() {
        for (text, want) in [("a\nb\n\n  \n", Some("b")), ("\n \n", None), ("", None)] {
            assert_eq!(last_line(text), want, "{text:?}");
        }
    }
}
