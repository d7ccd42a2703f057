//! What the status says: conditions, counts, figures, and why a replica doesn't serve, in the words of whoever refused.
//!
//! Pure. A condition keeps its transition time while its status stays the same.

use std::sync::Arc;

use jiff::Timestamp;
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{ContainerStateTerminated, ContainerStatus, Event, Pod};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, ObjectMeta, Time};
use kube::ResourceExt;
use kvasir_crds::llmdeployment::{
    ConditionType, LLMDeploymentSpec, LLMDeploymentStatus, LastScaling, NotReadyReplica, Reason,
    SELECTOR_LABEL,
};

use super::autoscale::{Decision, Load};
use super::children::{endpoint, revision, revision_of};
use super::pod_template::SERVER;
use crate::pod::{LastLine, ended, is_ready, last_line, living};

/// Replicas that don't serve are listed up to here.
pub const MAX_NOT_READY: usize = 10;

/// Why nothing may be made of a deployment: the reason of the condition Accepted, and its sentence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// Why, from the closed set.
    pub reason: Reason,
    /// In words, with the field or the object and what to do.
    pub sentence: String,
}

/// What the status is made from.
#[derive(Clone, Copy, Debug)]
pub struct StatusInput<'a> {
    /// The resource's metadata.
    pub metadata: &'a ObjectMeta,
    /// Its spec, where that could be read.
    pub spec: Option<&'a LLMDeploymentSpec>,
    /// Its status before this one, which gives the transition times.
    pub before: Option<&'a LLMDeploymentStatus>,
    /// Why nothing may be made of it.
    pub refused: Option<&'a Refusal>,
    /// The child Deployment as observed.
    pub child: Option<&'a Deployment>,
    /// Its pods.
    pub pods: &'a [Arc<Pod>],
    /// Warnings about them.
    pub warnings: &'a [Event],
    /// The last lines of containers that ended without a message.
    pub last_lines: &'a [LastLine],
    /// What the replicas report; `None` where none does.
    pub load: Option<Load>,
    /// The autoscaler's answer.
    pub decision: Option<&'a Decision>,
    /// A change of the number of replicas, decided now.
    pub scaling: Option<&'a LastScaling>,
    /// The time.
    pub now: Timestamp,
}

/// The whole status.
#[must_use]
pub fn status(input: &StatusInput<'_>) -> LLMDeploymentStatus {
    let before = input.before.cloned().unwrap_or_default();
    let name = input.metadata.name.clone().unwrap_or_default();
    let count = |n: usize| i32::try_from(n).unwrap_or(i32::MAX);
    let ready = count(living(input.pods).filter(|pod| is_ready(pod)).count());
    let child = input
        .child
        .and_then(|child| child.status.clone())
        .unwrap_or_default();
    let refusal = child.conditions.iter().flatten().find(|c| {
        // What the API server said when a pod was to be made: quota, admission.
        c.type_ == "ReplicaFailure" && c.status == "True"
    });
    let refusal = refusal.map(|c| c.message.clone().unwrap_or_default());
    let not_ready = not_ready(refusal, input.pods, input.warnings, input.last_lines);
    LLMDeploymentStatus {
        observed_generation: input.metadata.generation,
        conditions: conditions(input, &before.conditions, ready, not_ready.first()),
        replicas: count(living(input.pods).count()),
        ready_replicas: ready,
        updated_replicas: child.updated_replicas.unwrap_or(0),
        selector: Some(format!("{SELECTOR_LABEL}={name}")),
        endpoint: Some(endpoint(input.metadata)),
        utilization_percent: input.load.map(|load| load.utilization_percent().into()),
        queue_depth: input
            .load
            .map(|load| i32::try_from(load.waiting_requests).unwrap_or(i32::MAX)),
        last_scaling: input.scaling.cloned().or(before.last_scaling),
        not_ready,
    }
}

fn conditions(
    input: &StatusInput<'_>,
    before: &[Condition],
    ready: i32,
    obstacle: Option<&NotReadyReplica>,
) -> Vec<Condition> {
    let condition = |type_: ConditionType, holds: bool, reason: &str, message: String| {
        let status = if holds { "True" } else { "False" };
        let since = before
            .iter()
            .find(|c| c.type_ == type_.as_str() && c.status == status);
        Condition {
            type_: type_.as_str().to_owned(),
            status: status.to_owned(),
            reason: reason.to_owned(),
            message,
            observed_generation: input.metadata.generation,
            last_transition_time: since.map_or(Time(input.now), |c| c.last_transition_time.clone()),
        }
    };
    let (accepted, refused) = match input.refused {
        Some(refusal) => (refusal.reason, refusal.sentence.as_str()),
        None => (Reason::SpecAccepted, ""),
    };
    let is_accepted = input.refused.is_none();
    let wanted = input.child.and_then(|child| child.spec.as_ref()?.replicas);
    let asked = match input.decision {
        Some(decision) => i32::try_from(decision.replicas).ok(),
        None => input.spec.and_then(|spec| spec.replicas),
    };
    let revision = input.spec.map(revision);
    // The Deployment as observed may still be of the generation before: what is rolled out must be what is asked for.
    let rolled_out = input.child.is_some_and(|child| {
        let status = child.status.clone().unwrap_or_default();
        let template = child.spec.as_ref().map(|spec| &spec.template);
        let wanted = wanted.unwrap_or(1);
        asked == Some(wanted)
            && template.and_then(revision_of) == revision.as_ref()
            && status.observed_generation == child.metadata.generation
            && status.updated_replicas.unwrap_or(0) == wanted
            && status.replicas.unwrap_or(0) == wanted
            && ready >= wanted
    }) && is_accepted;
    // What stands in the way, in words; the same sentence for every condition that it keeps from holding.
    let (why, sentence) = match obstacle {
        _ if !is_accepted => (accepted.as_str().to_owned(), refused.to_owned()),
        Some(replica) => {
            let pod = replica
                .pod
                .as_deref()
                .map(|pod| format!("{pod}: "))
                .unwrap_or_default();
            (replica.reason.clone(), format!("{pod}{}", replica.message))
        }
        None if wanted == Some(0) => (
            Reason::ScaledToZero.as_str().into(),
            "spec.replicas is 0".into(),
        ),
        None if input.pods.is_empty() => {
            (Reason::Creating.as_str().into(), "no pod exists yet".into())
        }
        None => (
            Reason::RollingOut.as_str().into(),
            format!("{ready} of {} replicas serve", wanted.unwrap_or(1)),
        ),
    };
    let serving = format!("{ready} replicas serve");
    let mut conditions = vec![
        condition(
            ConditionType::Accepted,
            is_accepted,
            accepted.as_str(),
            refused.to_owned(),
        ),
        match ready {
            0 => condition(ConditionType::Available, false, &why, sentence.clone()),
            _ => condition(
                ConditionType::Available,
                true,
                Reason::ReplicaServing.as_str(),
                serving.clone(),
            ),
        },
        match rolled_out {
            true => condition(
                ConditionType::Progressing,
                false,
                Reason::RolledOut.as_str(),
                String::new(),
            ),
            false => condition(
                ConditionType::Progressing,
                is_accepted,
                &why,
                sentence.clone(),
            ),
        },
        match rolled_out && ready > 0 {
            true => condition(
                ConditionType::Ready,
                true,
                Reason::AllReplicasServing.as_str(),
                serving,
            ),
            false => condition(ConditionType::Ready, false, &why, sentence),
        },
    ];
    let autoscaling = input.spec.and_then(|spec| spec.autoscaling.as_ref());
    conditions.push(match (input.decision, autoscaling) {
        // Nothing is carried out, whatever the load.
        _ if !is_accepted => condition(
            ConditionType::ScalingActive,
            false,
            accepted.as_str(),
            refused.to_owned(),
        ),
        (Some(decision), Some(policy)) => {
            let unknown = input.load.is_none();
            let at_max = decision.replicas >= policy.max_replicas.get();
            let reason = match () {
                () if unknown => Reason::LoadUnknown,
                () if at_max => Reason::AtMaxReplicas,
                () => Reason::Autoscaled,
            };
            // The numbers change at every look; they stand in lastScaling and the figures, not here.
            let message = if unknown {
                decision.reason.clone()
            } else {
                format!(
                    "{} of at most {} replicas",
                    decision.replicas, policy.max_replicas
                )
            };
            condition(
                ConditionType::ScalingActive,
                !unknown,
                reason.as_str(),
                message,
            )
        }
        _ => condition(
            ConditionType::ScalingActive,
            false,
            Reason::FixedReplicas.as_str(),
            String::new(),
        ),
    });
    conditions
}

/// Replicas that don't serve, and why; the most telling first. `refusal` says why a pod could not be made.
fn not_ready(
    refusal: Option<String>,
    pods: &[Arc<Pod>],
    warnings: &[Event],
    last_lines: &[LastLine],
) -> Vec<NotReadyReplica> {
    let refused = refusal.map(|message| (None, Reason::PodRefused, message));
    let failing = living(pods).filter(|pod| !is_ready(pod)).map(|pod| {
        let (reason, message) = why(pod, warnings, last_lines);
        (Some(pod.name_any()), reason, message)
    });
    let mut found: Vec<_> = refused.into_iter().chain(failing).collect();
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

fn why(pod: &Pod, warnings: &[Event], last_lines: &[LastLine]) -> (Reason, String) {
    let status = pod.status.clone().unwrap_or_default();
    let conditions = status.conditions.unwrap_or_default();
    if let Some(refusal) = conditions
        .iter()
        .find(|c| c.type_ == "PodScheduled" && c.status == "False")
    {
        return (
            Reason::Unschedulable,
            refusal
                .message
                .clone()
                .unwrap_or_else(|| "no node was found yet".into()),
        );
    }
    if matches!(status.phase.as_deref(), Some("Failed" | "Unknown")) {
        let words = status
            .message
            .or(status.reason)
            .unwrap_or_else(|| "the pod is lost".into());
        return (Reason::PodLost, words);
    }
    let containers = status.container_statuses.unwrap_or_default();
    let served = !containers.is_empty() && containers.iter().all(|c| c.ready);
    let init = status.init_container_statuses.unwrap_or_default();
    let mut idle: Vec<_> = containers
        .into_iter()
        .chain(init)
        .filter(|c| !c.ready)
        .collect();
    // The server's own words come before those of other containers.
    idle.sort_by_key(|c| c.name != SERVER);
    let of_pod: Vec<&Event> = warnings
        .iter()
        .filter(|e| e.involved_object.name == pod.metadata.name)
        .collect();
    for container in &idle {
        let last_line = last_lines
            .iter()
            .find(|l| Some(&l.pod) == pod.metadata.name.as_ref() && l.container == container.name)
            .map(|l| l.line.as_str());
        if let Some(found) = refused(container, last_line, &of_pod) {
            return found;
        }
    }
    if served {
        // The kubelet no longer says so: its node does not answer, or a readiness gate holds.
        let condition = conditions.iter().find(|c| c.type_ == "Ready");
        let words = condition.and_then(|c| c.message.clone().or_else(|| c.reason.clone()));
        let words = words.unwrap_or_else(|| "its node does not answer".into());
        return (
            Reason::PodLost,
            format!("its containers served, and the pod is not ready: {words}"),
        );
    }
    let last = of_pod
        .into_iter()
        .max_by_key(|e| e.last_timestamp.as_ref().map(|t| t.0));
    let warned = last.and_then(|event| event.message.clone());
    match last.and_then(|event| event.reason.as_deref()) {
        Some("Unhealthy") if idle.iter().any(|c| c.started == Some(true)) => {
            (Reason::ProbeFailing, warned.unwrap_or_default())
        }
        Some("FailedMount" | "FailedAttachVolume" | "FailedCreatePodSandBox") => {
            (Reason::ContainerRefused, warned.unwrap_or_default())
        }
        _ => (Reason::Starting, "the server loads its model".into()),
    }
}

/// Why a container doesn't run: its image, its configuration, or the end of its last run with its last words.
fn refused(
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
    let ended = ended(container)?;
    let how = match (ended.reason.as_deref(), ended.signal) {
        (Some("OOMKilled"), _) => "was killed for want of memory".to_owned(),
        (_, Some(signal)) if signal != 0 => format!("was killed by signal {signal}"),
        _ => format!("ended with exit code {}", ended.exit_code),
    };
    let words = ended.message.as_deref().and_then(last_line).or(logged);
    let words = words.map(|line| format!(": {line}")).unwrap_or_default();
    let end = format!(
        "the container {} {how}, restarted {} times{words}",
        container.name, container.restart_count
    );
    Some(match killed_by_probe(ended, warnings) {
        Some(probe) => (Reason::ProbeFailing, format!("{}; {end}", probe.trim_end())),
        None => (Reason::Crashed, end),
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
mod tests;
