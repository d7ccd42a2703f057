//! What a pod says of itself: whose it is, whether it serves, how its containers ended. Pure.

use std::sync::Arc;

use k8s_openapi::api::core::v1::{ContainerStateTerminated, ContainerStatus, Pod};
use kvasir_crds::llmdeployment::SELECTOR_LABEL;

use crate::plan::pod_template::SERVER;

/// A longer line is cut: a status is no place for a whole log.
pub const LINE_LIMIT_CHARS: usize = 1000;

/// What a container said last in its log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LastLine {
    /// The pod's name.
    pub pod: String,
    /// The container's.
    pub container: String,
    /// The line, of at most [`LINE_LIMIT_CHARS`].
    pub line: String,
}

/// The pods that are not being deleted.
pub fn living(pods: &[Arc<Pod>]) -> impl Iterator<Item = &Pod> {
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

/// The name of the `LLMDeployment` that a pod serves.
#[must_use]
pub fn serves(pod: &Pod) -> Option<&str> {
    pod.metadata
        .labels
        .as_ref()?
        .get(SELECTOR_LABEL)
        .map(String::as_str)
}

/// How a container's last run ended, unless it serves again since.
#[must_use]
pub fn ended(container: &ContainerStatus) -> Option<&ContainerStateTerminated> {
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
