//! What the status says: conditions, counts, figures, and why a replica doesn't serve, in the words of whoever refused.
//!
//! Pure. A condition keeps its transition time while its status stays the same.

use jiff::Timestamp;
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{ContainerStatus, Event, Pod};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::ResourceExt;
use kvasir_crds::llmdeployment::{
    ConditionType, LLMDeployment, LLMDeploymentStatus, LastScaling, NotReadyReplica, Reason,
    SELECTOR_LABEL,
};

use super::autoscale::Decision;
use super::children::{endpoint, revision, revision_of};
use super::pod_template::SERVER;
use crate::observe::is_ready;

/// Replicas that don't serve are listed up to here.
const MAX_NOT_READY: usize = 10;

/// What the status is made from.
#[derive(Clone, Copy, Debug)]
pub struct StatusInput<'a> {
    /// The resource; its old status gives the transition times.
    pub deployment: &'a LLMDeployment,
    /// Whether the children could be planned; the sentence otherwise.
    pub accepted: Result<(), &'a str>,
    /// The sentence for a foreign object of a child's name.
    pub name_conflict: Option<&'a str>,
    /// The child Deployment as observed.
    pub child: Option<&'a Deployment>,
    /// Its pods.
    pub pods: &'a [Pod],
    /// Warnings about them.
    pub warnings: &'a [Event],
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
    let before = input.deployment.status.clone().unwrap_or_default();
    let living: Vec<&Pod> = input
        .pods
        .iter()
        .filter(|pod| pod.metadata.deletion_timestamp.is_none())
        .collect();
    let count = |n: usize| i32::try_from(n).unwrap_or(i32::MAX);
    let ready = count(living.iter().filter(|pod| is_ready(pod)).count());
    let child = input
        .child
        .and_then(|child| child.status.clone())
        .unwrap_or_default();
    let not_ready = not_ready(input.pods, input.warnings);
    LLMDeploymentStatus {
        observed_generation: input.deployment.metadata.generation,
        conditions: conditions(input, &before.conditions, ready, not_ready.first()),
        replicas: count(living.len()),
        ready_replicas: ready,
        updated_replicas: child.updated_replicas.unwrap_or(0),
        selector: Some(format!("{SELECTOR_LABEL}={}", input.deployment.name_any())),
        endpoint: Some(endpoint(input.deployment)),
        utilization_percent: input
            .decision
            .and_then(|d| d.utilization_percent)
            .and_then(|n| i32::try_from(n).ok()),
        queue_depth: input
            .decision
            .and_then(|d| d.queue_depth)
            .map(|n| i32::try_from(n).unwrap_or(i32::MAX)),
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
            observed_generation: input.deployment.metadata.generation,
            last_transition_time: since.map_or(Time(input.now), |c| c.last_transition_time.clone()),
        }
    };
    let (accepted, refused) = match (input.name_conflict, input.accepted) {
        (Some(sentence), _) => (Reason::NameConflict, sentence),
        (None, Err(sentence)) => (Reason::InvalidPodTemplate, sentence),
        (None, Ok(())) => (Reason::SpecAccepted, ""),
    };
    let is_accepted = accepted == Reason::SpecAccepted;
    let wanted = input.child.and_then(|child| child.spec.as_ref()?.replicas);
    let asked = match input.decision {
        Some(decision) => i32::try_from(decision.replicas).ok(),
        None => input.deployment.spec.replicas,
    };
    let revision = revision(input.deployment);
    // The Deployment as observed may still be of the generation before: what is rolled out must be what is asked for.
    let rolled_out = input.child.is_some_and(|child| {
        let status = child.status.clone().unwrap_or_default();
        let template = child.spec.as_ref().map(|spec| &spec.template);
        let wanted = wanted.unwrap_or(1);
        asked == Some(wanted)
            && template.and_then(revision_of) == Some(&revision)
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
    conditions.push(match (input.decision, &input.deployment.spec.autoscaling) {
        (Some(decision), Some(policy)) => {
            let unknown = decision.queue_depth.is_none();
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

/// Replicas that don't serve, and why; the most telling first.
#[must_use]
pub fn not_ready(pods: &[Pod], warnings: &[Event]) -> Vec<NotReadyReplica> {
    let mut found: Vec<(Reason, NotReadyReplica)> = Vec::new();
    let mut add = |pod: Option<String>, reason: Reason, message: String| {
        found.push((
            reason,
            NotReadyReplica {
                pod,
                reason: reason.as_str().to_owned(),
                message,
            },
        ));
    };
    let about = |kind: &str, event: &&Event| event.involved_object.kind.as_deref() == Some(kind);
    if pods.is_empty() {
        let refusals = warnings
            .iter()
            .filter(|e| about("ReplicaSet", e) && e.reason.as_deref() == Some("FailedCreate"));
        if let Some(event) = refusals.max_by_key(|e| e.last_timestamp.as_ref().map(|t| t.0)) {
            add(
                None,
                Reason::PodRefused,
                event.message.clone().unwrap_or_default(),
            );
        }
    }
    for pod in pods
        .iter()
        .filter(|pod| pod.metadata.deletion_timestamp.is_none() && !is_ready(pod))
    {
        let of_pod = warnings
            .iter()
            .filter(|e| about("Pod", e) && e.involved_object.name == pod.metadata.name);
        let last = of_pod.max_by_key(|e| e.last_timestamp.as_ref().map(|t| t.0));
        let (reason, message) = why(pod, last);
        add(Some(pod.name_any()), reason, message);
    }
    // Starting is the least telling; otherwise the order of the pods' names.
    found.sort_by_key(|(reason, _)| *reason == Reason::Starting);
    found
        .into_iter()
        .map(|(_, replica)| replica)
        .take(MAX_NOT_READY)
        .collect()
}

fn why(pod: &Pod, warning: Option<&Event>) -> (Reason, String) {
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
    let containers = status.container_statuses.unwrap_or_default().into_iter();
    let mut all = containers.chain(status.init_container_statuses.unwrap_or_default());
    let server: Vec<ContainerStatus> = all.by_ref().filter(|c| !c.ready).collect();
    // The server's own words come before those of other containers.
    let ordered = server
        .iter()
        .filter(|c| c.name == SERVER)
        .chain(server.iter().filter(|c| c.name != SERVER));
    for container in ordered {
        if let Some(found) = refused(container) {
            return found;
        }
    }
    let warned = warning.and_then(|event| event.message.clone());
    match warning.and_then(|event| event.reason.as_deref()) {
        Some("Unhealthy") if server.iter().any(|c| c.started == Some(true)) => {
            (Reason::ProbeFailing, warned.unwrap_or_default())
        }
        Some("FailedMount" | "FailedAttachVolume" | "FailedCreatePodSandBox") => {
            (Reason::ContainerRefused, warned.unwrap_or_default())
        }
        _ => (Reason::Starting, "the server loads its model".into()),
    }
}

/// Why a container doesn't run: its image, its configuration, or the end of its last run with its last words.
fn refused(container: &ContainerStatus) -> Option<(Reason, String)> {
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
    let ended = state
        .terminated
        .or_else(|| container.last_state.clone().unwrap_or_default().terminated)?;
    let last_line = ended
        .message
        .as_deref()
        .and_then(|m| m.lines().map(str::trim).rfind(|l| !l.is_empty()));
    let how = match (ended.reason.as_deref(), ended.signal) {
        (Some("OOMKilled"), _) => "was killed for want of memory".to_owned(),
        (_, Some(signal)) if signal != 0 => format!("was killed by signal {signal}"),
        _ => format!("ended with exit code {}", ended.exit_code),
    };
    let times = container.restart_count;
    let words = last_line
        .map(|line| format!(": {line}"))
        .unwrap_or_default();
    Some((
        Reason::Crashed,
        format!(
            "the container {} {how}, restarted {times} times{words}",
            container.name
        ),
    ))
}

#[cfg(test)]
mod tests;
