//! Why replicas don't serve, in the words of whoever refused: the API server, the scheduler, the kubelet, or the server
//! itself. Pure.

use k8s_openapi::api::apps::v1::DeploymentStatus;
use k8s_openapi::api::core::v1::{
    ContainerStateTerminated, ContainerStatus, Event, Pod, PodStatus,
};
use kube::ResourceExt;
use kvasir_crds::llmdeployment::{EndedPods, NotReadyReplica, Reason};
use kvasir_crds::load_report::{StartPhase, StartReport};

use crate::observed::{LastLine, Observed, StartingReplica};
use crate::plan::counted::counted;
use crate::pod::{
    SERVER, has_ended, is_ready, last_termination, last_words, memory_limit, replicas,
    running_since,
};

/// Replicas that don't serve are listed up to here.
pub const MAX_NOT_READY: usize = 10;

/// Reasons why pods ended are listed up to here.
const MAX_ENDED: usize = 5;

/// Replicas that don't serve, and why; the most telling first. `child` is the status of the child Deployment, which says
/// why a pod could not be made.
pub(super) fn not_ready(child: &DeploymentStatus, observed: &Observed) -> Vec<NotReadyReplica> {
    // What the API server said when a pod was to be made: quota, admission.
    let conditions = child.conditions.iter().flatten();
    let refused = conditions
        .filter(|c| c.type_ == "ReplicaFailure" && c.status == "True")
        .map(|c| {
            let message = c.message.clone().unwrap_or_default();
            (None, Reason::PodRefused, message)
        })
        .take(1);
    let pods = replicas(&observed.pods).filter(|pod| !is_ready(pod));
    let failing = pods.map(|pod| {
        let (reason, message) = why(pod, observed);
        (Some(pod.name_any()), reason, message)
    });
    let mut found: Vec<_> = refused.chain(failing).collect();
    // Starting is the least telling; otherwise the order of the pods' names.
    found.sort_by_key(|(_, reason, _)| *reason == Reason::Starting);
    found
        .into_iter()
        .take(MAX_NOT_READY)
        .map(|(pod, reason, message)| NotReadyReplica {
            pod,
            reason: reason.as_str().to_owned(),
            message,
        })
        .collect()
}

/// Why pods ended, each reason once. What `before` says of a reason stays while a pod of it is listed: a broken GPU ends
/// thousands, and the status is written for the first.
pub(super) fn ended(observed: &Observed, before: &[EndedPods]) -> Vec<EndedPods> {
    let mut found: Vec<EndedPods> = Vec::new();
    for pod in observed.pods.iter().filter(|pod| has_ended(pod)) {
        let status = pod.status.clone().unwrap_or_default();
        let filled = |text: Option<String>| text.filter(|text| !text.is_empty());
        let reason = filled(status.reason).or(status.phase).unwrap_or_default();
        if found.len() == MAX_ENDED || found.iter().any(|known| known.reason == reason) {
            continue;
        }
        let known = before.iter().find(|known| known.reason == reason);
        found.push(known.cloned().unwrap_or_else(|| {
            let message = filled(status.message).unwrap_or_else(|| "the pod ended".into());
            EndedPods {
                reason,
                message: format!("{}: {message}", pod.name_any()),
            }
        }));
    }
    found.sort_by(|a, b| a.reason.cmp(&b.reason));
    found
}

/// Why one pod doesn't serve: the first of these that knows.
pub(in crate::plan) fn why(pod: &Pod, observed: &Observed) -> (Reason, String) {
    let warnings: Vec<&Event> = observed
        .warnings
        .iter()
        .map(AsRef::as_ref)
        .filter(|e: &&Event| e.involved_object.name == pod.metadata.name)
        .collect();
    let status = pod.status.clone().unwrap_or_default();
    unschedulable(&status)
        .or_else(|| lost(&status))
        .or_else(|| not_running(pod, &status, &observed.last_lines, &warnings))
        .or_else(|| unreachable(&status))
        .or_else(|| warned(&status, &warnings))
        .unwrap_or_else(|| (Reason::Starting, starting(pod, &observed.starting)))
}

/// How far a start is that nothing stands in the way of. The percents are whole tens: each change of a word is a write.
fn starting(pod: &Pod, starting: &[StartingReplica]) -> String {
    if running_since(pod).is_none() {
        return "its image is pulled and its container made".into();
    }
    let report = starting
        .iter()
        .find(|it| Some(&it.pod) == pod.metadata.name.as_ref());
    let Some(StartReport {
        phase: Some(phase), ..
    }) = report.map(|it| it.report)
    else {
        return "the server is loading its model".into();
    };
    let how_far = report.and_then(|it| {
        let gib = it.report.total_bytes? as f64 / f64::from(1 << 30);
        Some(format!(
            ", {} % of {gib:.1} GiB",
            it.report.percent()? / 10 * 10
        ))
    });
    let what = match phase {
        StartPhase::Fetch => "the server is fetching its model",
        StartPhase::Load => "the server is loading its model",
        StartPhase::WarmUp | StartPhase::Other => "the server has loaded its model and starts",
    };
    format!("{what}{}", how_far.unwrap_or_default())
}

fn unschedulable(status: &PodStatus) -> Option<(Reason, String)> {
    let conditions = status.conditions.as_deref().unwrap_or_default();
    let refusal = conditions
        .iter()
        .find(|c| c.type_ == "PodScheduled" && c.status == "False")?;
    let message = refusal.message.clone();
    let message = message.unwrap_or_else(|| "no node was found yet".into());
    Some((Reason::Unschedulable, message))
}

/// Its node doesn't answer.
fn lost(status: &PodStatus) -> Option<(Reason, String)> {
    if status.phase.as_deref() != Some("Unknown") {
        return None;
    }
    let message = status.message.clone().or_else(|| status.reason.clone());
    let message = message.unwrap_or_else(|| "the pod is lost".into());
    Some((Reason::PodLost, message))
}

/// A container that doesn't run. The server's own words come before those of other containers.
fn not_running(
    pod: &Pod,
    status: &PodStatus,
    last_lines: &[LastLine],
    warnings: &[&Event],
) -> Option<(Reason, String)> {
    let mut idle: Vec<_> = containers(status).filter(|c| !c.ready).collect();
    idle.sort_by_key(|c| c.name != SERVER);
    idle.into_iter().find_map(|container| {
        let last_line = last_lines
            .iter()
            .find(|l| Some(&l.pod) == pod.metadata.name.as_ref() && l.container == container.name)
            .map(|l| l.line.as_str());
        refused(pod, container, last_line, warnings)
    })
}

/// All containers serve, and the kubelet no longer says so: its node does not answer, or a readiness gate holds.
fn unreachable(status: &PodStatus) -> Option<(Reason, String)> {
    let containers = status.container_statuses.as_deref().unwrap_or_default();
    if containers.is_empty() || !containers.iter().all(|c| c.ready) {
        return None;
    }
    let conditions = status.conditions.as_deref().unwrap_or_default();
    let condition = conditions.iter().find(|c| c.type_ == "Ready");
    let words = condition.and_then(|c| c.message.clone().or_else(|| c.reason.clone()));
    let words = words.unwrap_or_else(|| "its node does not answer".into());
    Some((
        Reason::PodLost,
        format!("its containers are ready, and the pod is not: {words}"),
    ))
}

/// What the kubelet warned of last, of a pod whose containers run or wait without a complaint of their own.
fn warned(status: &PodStatus, warnings: &[&Event]) -> Option<(Reason, String)> {
    let last = warnings
        .iter()
        .max_by_key(|e| e.last_timestamp.as_ref().map(|t| t.0));
    let message = last.and_then(|event| event.message.clone());
    let has_started = || containers(status).any(|c| !c.ready && c.started == Some(true));
    match last.and_then(|event| event.reason.as_deref()) {
        Some("Unhealthy") if has_started() => {
            Some((Reason::ProbeFailing, message.unwrap_or_default()))
        }
        Some("FailedMount" | "FailedAttachVolume" | "FailedCreatePodSandBox") => {
            Some((Reason::ContainerRefused, message.unwrap_or_default()))
        }
        _ => None,
    }
}

/// The pod's containers, and after them its init containers.
fn containers(status: &PodStatus) -> impl Iterator<Item = &ContainerStatus> {
    let both = [&status.container_statuses, &status.init_container_statuses];
    both.into_iter().flatten().flatten()
}

/// Why a container doesn't run: its image, its configuration, or the end of its last run with its last words.
fn refused(
    pod: &Pod,
    container: &ContainerStatus,
    logged: Option<&str>,
    warnings: &[&Event],
) -> Option<(Reason, String)> {
    let state = container.state.clone().unwrap_or_default();
    let waiting = state.waiting.unwrap_or_default();
    let words = |fallback: &str| {
        waiting
            .message
            .clone()
            .unwrap_or_else(|| fallback.to_owned())
    };
    match waiting.reason.as_deref() {
        Some(
            "ErrImagePull" | "ImagePullBackOff" | "ErrImageNeverPull" | "InvalidImageName"
            | "ImageInspectError",
        ) => {
            let image = &container.image;
            return Some((
                Reason::ImagePullFailed,
                words(&format!("the image {image} can't be pulled")),
            ));
        }
        Some(
            reason @ ("CreateContainerConfigError" | "CreateContainerError" | "RunContainerError"),
        ) => {
            return Some((Reason::ContainerRefused, words(reason)));
        }
        _ => {}
    }
    let end = last_termination(container)?;
    let how = match (end.reason.as_deref(), end.signal) {
        (Some("OOMKilled"), _) => match memory_limit(pod, &container.name) {
            Some(limit) => {
                format!("was killed because it ran out of memory (its limit is {limit}: raise it)")
            }
            None => "was killed because it ran out of memory".to_owned(),
        },
        (_, Some(signal)) if signal != 0 => format!("was killed by signal {signal}"),
        _ => format!("ended with exit code {}", end.exit_code),
    };
    let message = end.message.as_deref().and_then(last_words);
    let line = message.as_deref().or(logged);
    let line = line.map(|line| format!(": {line}")).unwrap_or_default();
    let n_restarts = u64::try_from(container.restart_count).unwrap_or(0);
    let sentence = format!(
        "the container {} {how}, restarted {}{line}",
        container.name,
        counted(n_restarts, "time")
    );
    Some(match killed_by_probe(end, warnings) {
        Some(probe) => (
            Reason::ProbeFailing,
            format!("{}; {sentence}", probe.trim_end()),
        ),
        None => (Reason::Crashed, sentence),
    })
}

/// The kubelet's words on the liveness probe that ended this run. A startup probe fails until a model is loaded, and so
/// explains nothing.
fn killed_by_probe<'a>(
    ended: &ContainerStateTerminated,
    warnings: &[&'a Event],
) -> Option<&'a str> {
    let started = ended.started_at.as_ref()?.0;
    let finished = ended.finished_at.as_ref()?.0;
    warnings
        .iter()
        .filter(|event| {
            let at = event.last_timestamp.as_ref().map(|t| t.0);
            event.reason.as_deref() == Some("Unhealthy")
                && at.is_some_and(|at| started <= at && at <= finished)
        })
        .filter_map(|event| event.message.as_deref())
        .find(|message| message.starts_with("Liveness probe failed"))
}

#[cfg(test)]
pub(super) mod tests;
