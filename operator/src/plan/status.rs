//! What the status says: conditions, counts and figures.
//!
//! Pure. A condition keeps its transition time while its status stays the same.

mod not_ready;

use jiff::Timestamp;
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::{Resource, ResourceExt};
use kvasir_crds::llmdeployment::{
    ConditionType, LLMDeploymentStatus, LastScaling, NotReadyReplica, Reason, SELECTOR_LABEL,
};

use super::autoscale::{Decision, LoadSummary};
use super::children::{endpoint, revision, revision_of};
use super::counted::{counted, counted_are};
use crate::observed::Observed;
use crate::pod::{is_ready, not_terminating};
use crate::stored::Stored;
pub use not_ready::MAX_NOT_READY;

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
    /// The resource, with its status before this one, which gives the transition times.
    pub stored: &'a Stored,
    /// What exists for it.
    pub observed: &'a Observed,
    /// The child Deployment, where one is observed that is ours.
    pub child: Option<&'a Deployment>,
    /// Why nothing may be made of the resource.
    pub refused: Option<&'a Refusal>,
    /// The autoscaler's answer.
    pub decision: Option<&'a Decision>,
    /// A change of the number of replicas, decided now.
    pub scaling: Option<&'a LastScaling>,
    /// What the replicas report; `None` where none does.
    pub load: Option<LoadSummary>,
    /// The time.
    pub now: Timestamp,
}

/// The whole status.
#[must_use]
pub fn status(input: &StatusInput<'_>) -> LLMDeploymentStatus {
    let metadata = input.stored.meta();
    let before = input.stored.status().cloned().unwrap_or_default();
    let count = |n: usize| i32::try_from(n).unwrap_or(i32::MAX);
    let pods = || not_terminating(&input.observed.pods);
    let n_ready = count(pods().filter(|pod| is_ready(pod)).count());
    let child = input
        .child
        .and_then(|child| child.status.clone())
        .unwrap_or_default();
    let not_ready = not_ready::not_ready(&child, input.observed);
    LLMDeploymentStatus {
        observed_generation: metadata.generation,
        conditions: conditions(input, &before.conditions, n_ready, not_ready.first()),
        replicas: count(pods().count()),
        ready_replicas: n_ready,
        updated_replicas: child.updated_replicas.unwrap_or(0),
        selector: Some(format!("{SELECTOR_LABEL}={}", input.stored.name_any())),
        endpoint: Some(endpoint(metadata)),
        utilization_percent: input.load.map(|load| load.utilization_percent().into()),
        queue_depth: input
            .load
            .map(|load| i32::try_from(load.waiting_requests).unwrap_or(i32::MAX)),
        last_scaling: input.scaling.cloned().or(before.last_scaling),
        not_ready,
    }
}

/// What a condition says, without its type and its time.
#[derive(Clone, Debug)]
struct Verdict {
    status: &'static str,
    reason: String,
    message: String,
}

impl Verdict {
    fn yes(reason: Reason, message: impl Into<String>) -> Self {
        Self {
            status: "True",
            reason: reason.as_str().to_owned(),
            message: message.into(),
        }
    }

    fn no(reason: Reason, message: impl Into<String>) -> Self {
        Self {
            status: "False",
            ..Self::yes(reason, message)
        }
    }
}

fn conditions(
    input: &StatusInput<'_>,
    before: &[Condition],
    n_ready: i32,
    first_not_ready: Option<&NotReadyReplica>,
) -> Vec<Condition> {
    // The same sentence for every condition that it keeps from holding.
    let obstacle = obstacle(input, n_ready, first_not_ready);
    let serving = counted_are(u64::try_from(n_ready).unwrap_or(0), "replica") + " serving";
    let is_rolled_out = input.refused.is_none() && is_rolled_out(input, n_ready);
    let accepted = match input.refused {
        Some(refusal) => Verdict::no(refusal.reason, &refusal.sentence),
        None => Verdict::yes(Reason::SpecAccepted, ""),
    };
    let available = match n_ready {
        0 => obstacle.clone(),
        _ => Verdict::yes(Reason::ReplicaServing, &serving),
    };
    let progressing = match (is_rolled_out, input.refused) {
        (true, _) => Verdict::no(Reason::RolledOut, ""),
        (false, Some(_)) => obstacle.clone(),
        (false, None) => Verdict {
            status: "True",
            ..obstacle.clone()
        },
    };
    let ready = match is_rolled_out && n_ready > 0 {
        true => Verdict::yes(Reason::AllReplicasServing, &serving),
        false => obstacle,
    };
    let condition = |(type_, verdict): (ConditionType, Verdict)| {
        let since = before
            .iter()
            .find(|c| c.type_ == type_.as_str() && c.status == verdict.status);
        Condition {
            type_: type_.as_str().to_owned(),
            status: verdict.status.to_owned(),
            reason: verdict.reason,
            message: verdict.message,
            observed_generation: input.stored.meta().generation,
            last_transition_time: since.map_or(Time(input.now), |c| c.last_transition_time.clone()),
        }
    };
    [
        (ConditionType::Accepted, accepted),
        (ConditionType::Available, available),
        (ConditionType::Progressing, progressing),
        (ConditionType::Ready, ready),
        (ConditionType::ScalingActive, scaling_active(input)),
    ]
    .into_iter()
    .map(condition)
    .collect()
}

/// The number of replicas that the child Deployment asks for.
fn wanted(input: &StatusInput<'_>) -> Option<i32> {
    input.child.and_then(|child| child.spec.as_ref()?.replicas)
}

/// What stands in the way of a deployment that doesn't serve as it should.
fn obstacle(
    input: &StatusInput<'_>,
    n_ready: i32,
    first_not_ready: Option<&NotReadyReplica>,
) -> Verdict {
    if let Some(refusal) = input.refused {
        return Verdict::no(refusal.reason, &refusal.sentence);
    }
    if let Some(replica) = first_not_ready {
        let pod = replica.pod.iter().map(|pod| format!("{pod}: "));
        return Verdict {
            status: "False",
            reason: replica.reason.clone(),
            message: pod.chain([replica.message.clone()]).collect(),
        };
    }
    let wanted = wanted(input);
    if wanted == Some(0) {
        return Verdict::no(Reason::ScaledToZero, "spec.replicas is 0");
    }
    if input.observed.pods.is_empty() {
        return Verdict::no(Reason::Creating, "no pod exists yet");
    }
    let of = counted(u64::try_from(wanted.unwrap_or(1)).unwrap_or(0), "replica");
    let verb = if n_ready == 1 { "is" } else { "are" };
    Verdict::no(
        Reason::RollingOut,
        format!("{n_ready} of {of} {verb} serving"),
    )
}

/// As many replicas of the current generation serve as are asked for. The Deployment as observed may still be of the
/// generation before: what is rolled out must be what is asked for.
fn is_rolled_out(input: &StatusInput<'_>, n_ready: i32) -> bool {
    let Some(child) = input.child else {
        return false;
    };
    let asked = match input.decision {
        Some(decision) => i32::try_from(decision.replicas).ok(),
        None => input.stored.spec().and_then(|spec| spec.replicas),
    };
    let revision = input.stored.spec().map(revision);
    let status = child.status.clone().unwrap_or_default();
    let template = child.spec.as_ref().map(|spec| &spec.template);
    let wanted = wanted(input).unwrap_or(1);
    asked == Some(wanted)
        && template.and_then(revision_of) == revision.as_ref()
        && status.observed_generation == child.metadata.generation
        && status.updated_replicas.unwrap_or(0) == wanted
        && status.replicas.unwrap_or(0) == wanted
        && n_ready >= wanted
}

/// Whether the operator decides the number of replicas. The numbers change at every look: they stand in `lastScaling` and
/// the figures, not here.
fn scaling_active(input: &StatusInput<'_>) -> Verdict {
    if let Some(refusal) = input.refused {
        // Nothing is carried out, whatever the load.
        return Verdict::no(refusal.reason, &refusal.sentence);
    }
    let policy = input
        .stored
        .spec()
        .and_then(|spec| spec.autoscaling.as_ref());
    let Some((decision, policy)) = input.decision.zip(policy) else {
        return Verdict::no(Reason::FixedReplicas, "");
    };
    if input.load.is_none() {
        return Verdict::no(Reason::LoadUnknown, &decision.reason);
    }
    let reason = match decision.replicas >= policy.max_replicas.get() {
        true => Reason::AtMaxReplicas,
        false => Reason::Autoscaled,
    };
    let most = counted(policy.max_replicas.get(), "replica");
    Verdict::yes(reason, format!("{} of at most {most}", decision.replicas))
}

#[cfg(test)]
mod tests;
