//! What the status says: conditions, counts and figures.
//!
//! Pure. A condition keeps its transition time while its status stays the same.

pub(super) mod not_ready;
mod start;

use jiff::Timestamp;
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::{Resource, ResourceExt};
use kvasir_crds::llmdeployment::{
    Autoscaling, AutoscalingStatus, ConditionType, EndedPods, LLMDeploymentSpec,
    LLMDeploymentStatus, LastScaling, LearnedCapacity, ModelDownload, ModelSource, ModelStatus,
    NextScaling, NotReadyReplica, Reason, SELECTOR_LABEL,
};

use super::autoscale::{Decision, LoadSummary};
use super::children::{PROGRESS_DEADLINE_SECONDS, endpoint, revision, revision_of};
use super::counted::{counted, counted_are};
use super::overdue_sentence;
use super::rollout::{failure, good_revision};
use crate::observed::{Observed, ReplicaLoad};
use crate::pod::{is_ready, replicas};
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
    /// Why nothing, or not all, may be made of the resource.
    pub refused: Option<&'a Refusal>,
    /// What the API server has failed with for long when a child was written.
    pub failing: Option<&'a str>,
    /// The autoscaler's answer.
    pub decision: Option<&'a Decision>,
    /// What it has measured.
    pub learned: Option<LearnedCapacity>,
    /// A change of the number of replicas that was carried out and isn't told yet.
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
    let pods = || replicas(&input.observed.pods);
    let n_ready = count(pods().filter(|pod| is_ready(pod)).count());
    let child = input
        .child
        .and_then(|child| child.status.clone())
        .unwrap_or_default();
    let not_ready = not_ready::not_ready(&child, input.observed);
    let ended_pods = not_ready::ended(input.observed, &before.ended_pods);
    let seen = Seen {
        n_ready,
        not_ready: &not_ready,
        ended: &ended_pods,
    };
    LLMDeploymentStatus {
        observed_generation: metadata.generation,
        conditions: conditions(input, &before.conditions, seen),
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
        autoscaling: autoscaling(input, before.autoscaling),
        not_ready,
        ended_pods,
        current_revision: input
            .child
            .and_then(good_revision)
            .or(before.current_revision),
        update_revision: input.stored.spec().map(revision),
        model: model(input, before.model),
        start: start::start_times(input.observed, before.start),
    }
}

/// What the autoscaler sees and decides. While the spec can't be read, or nothing may be touched, what was learned is kept.
fn autoscaling(
    input: &StatusInput<'_>,
    before: Option<AutoscalingStatus>,
) -> Option<AutoscalingStatus> {
    let is_wanted = |spec: &LLMDeploymentSpec| spec.autoscaling.is_some();
    let Some(decision) = input.decision else {
        return before.filter(|_| input.stored.spec().is_none_or(is_wanted));
    };
    let count = |n: u32| i32::try_from(n).unwrap_or(i32::MAX);
    let next = decision.next.map(|next| {
        let at = input.now.checked_add(next.after).unwrap_or(input.now);
        NextScaling {
            replicas: count(next.replicas),
            // Whole seconds: the same moment at every look.
            not_before: Time(Timestamp::from_second(at.as_second()).unwrap_or(at)),
        }
    });
    Some(AutoscalingStatus {
        desired_replicas: count(decision.replicas),
        demand_replicas: (decision.demand > 0).then(|| count(decision.demand)),
        binding_constraint: decision.constraint.map(|c| c.as_str().to_owned()),
        unmet_replicas: count(decision.unmet),
        silent_replicas: count(decision.silent),
        next_scaling: next,
        learned: input.learned,
    })
}

/// What a replica says of the model; what one said before stands while none does.
fn model(input: &StatusInput<'_>, before: Option<ModelStatus>) -> Option<ModelStatus> {
    let reported = input.observed.loads.iter().find_map(|load| match load {
        ReplicaLoad::Reported(report) => report.model.as_ref(),
        ReplicaLoad::Silent => None,
    });
    let number = |n: Option<u64>| n.and_then(|n| i64::try_from(n).ok());
    let told = reported.map(|model| ModelStatus {
        revision: model.revision.clone(),
        parameters: number(model.parameters),
        weights_bytes: number(model.weights_bytes),
        kv_cache_bytes: number(model.kv_cache_bytes),
        kv_bytes_per_token: number(model.kv_bytes_per_token),
        blocks: number(model.blocks),
        max_model_len: number(model.max_model_len),
        requests_at_context: number(model.requests_at_context),
        download: None,
    });
    let download = input.stored.spec().and_then(|spec| {
        let is_fetched = matches!(spec.model.source, ModelSource::HuggingFace(_));
        is_fetched.then_some(match spec.model.cache {
            Some(_) => ModelDownload::SharedCache,
            None => ModelDownload::EachReplica,
        })
    });
    let model = ModelStatus {
        download,
        ..told.or(before).unwrap_or_default()
    };
    (model != ModelStatus::default()).then_some(model)
}

/// What the pods say, summed up.
#[derive(Clone, Copy, Debug)]
struct Seen<'a> {
    n_ready: i32,
    /// The most telling first.
    not_ready: &'a [NotReadyReplica],
    ended: &'a [EndedPods],
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

    /// The same words for a condition of another status.
    fn but(self, status: &'static str) -> Self {
        Self { status, ..self }
    }

    fn no(reason: Reason, message: impl Into<String>) -> Self {
        Self {
            status: "False",
            ..Self::yes(reason, message)
        }
    }
}

fn conditions(input: &StatusInput<'_>, before: &[Condition], seen: Seen<'_>) -> Vec<Condition> {
    // The same sentence for every condition that it keeps from holding.
    let obstacle = obstacle(input, seen);
    let rollout = Rollout::of(input, seen.n_ready);
    let ready = ready(input, seen, &rollout, &obstacle);
    let stalled = stalled(input, &rollout, &obstacle);
    let found = [
        (ConditionType::Accepted, Some(accepted(input))),
        (ConditionType::Available, Some(available(seen, &obstacle))),
        (
            ConditionType::Progressing,
            Some(progressing(input, &rollout, stalled.as_ref(), &obstacle)),
        ),
        (ConditionType::Ready, Some(ready.clone())),
        (ConditionType::ScalingActive, Some(scaling_active(input))),
        (
            ConditionType::CapacityUnavailable,
            capacity_unavailable(input, seen),
        ),
        (ConditionType::ScalingLimited, scaling_limited(input)),
        (
            ConditionType::Reconciling,
            reconciling(input, &ready, &obstacle).filter(|_| stalled.is_none()),
        ),
        (ConditionType::Stalled, stalled),
    ];
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
    found
        .into_iter()
        .filter_map(|(type_, verdict)| Some(condition((type_, verdict?))))
        .collect()
}

fn accepted(input: &StatusInput<'_>) -> Verdict {
    match input.refused {
        Some(refusal) => Verdict::no(refusal.reason, &refusal.sentence),
        None => Verdict::yes(Reason::SpecAccepted, ""),
    }
}

fn available(seen: Seen<'_>, obstacle: &Verdict) -> Verdict {
    match seen.n_ready {
        0 => obstacle.clone(),
        n => Verdict::yes(Reason::ReplicaServing, serving(n)),
    }
}

/// Available, and the current generation rolled out: fewer replicas than are asked for don't count against it.
fn ready(
    input: &StatusInput<'_>,
    seen: Seen<'_>,
    rollout: &Rollout,
    obstacle: &Verdict,
) -> Verdict {
    match () {
        () if input.refused.is_some() || !rollout.of_generation => obstacle.clone(),
        () if rollout.wanted == 0 => Verdict::yes(Reason::ScaledToZero, &obstacle.message),
        () if seen.n_ready == 0 => obstacle.clone(),
        () if rollout.is_complete => {
            Verdict::yes(Reason::AllReplicasServing, serving(seen.n_ready))
        }
        () => Verdict::yes(
            Reason::RolledOut,
            fewer_serving(seen.n_ready, rollout.wanted),
        ),
    }
}

/// Nothing goes on without the user. Once the generation is rolled out, more replicas that don't come are no stall.
fn stalled(input: &StatusInput<'_>, rollout: &Rollout, obstacle: &Verdict) -> Option<Verdict> {
    if let Some(refusal) = input.refused {
        return Some(Verdict::yes(refusal.reason, &refusal.sentence));
    }
    if let Some(sentence) = rolled_back(input) {
        return Some(Verdict::yes(Reason::RolledBack, sentence));
    }
    let is_late = rollout.is_past_deadline && !rollout.of_generation;
    is_late.then(|| {
        let deadline = PROGRESS_DEADLINE_SECONDS;
        let message = format!("no progress in {deadline} s: {}", obstacle.message);
        Verdict::yes(Reason::ProgressDeadlineExceeded, message)
    })
}

fn reconciling(input: &StatusInput<'_>, ready: &Verdict, obstacle: &Verdict) -> Option<Verdict> {
    if let Some(sentence) = input.failing {
        return Some(Verdict::yes(Reason::ApplyRetried, sentence));
    }
    (ready.status != "True").then(|| obstacle.clone().but("True"))
}

/// A rollout or a scaling is under way.
fn progressing(
    input: &StatusInput<'_>,
    rollout: &Rollout,
    stalled: Option<&Verdict>,
    obstacle: &Verdict,
) -> Verdict {
    match (stalled, input.failing) {
        (Some(stalled), _) => stalled.clone().but("False"),
        (None, Some(sentence)) => Verdict::yes(Reason::ApplyRetried, sentence),
        (None, None) if rollout.is_complete => Verdict::no(Reason::RolledOut, ""),
        (None, None) if is_paused(input) => obstacle.clone(),
        (None, None) => obstacle.clone().but("True"),
    }
}

/// A replica has no place in the cluster, or doesn't start there.
fn capacity_unavailable(input: &StatusInput<'_>, seen: Seen<'_>) -> Option<Verdict> {
    let refusals = [Reason::Unschedulable, Reason::PodRefused];
    let mut not_ready = seen.not_ready.iter();
    let homeless = not_ready.find(|replica| refusals.iter().any(|r| replica.reason == r.as_str()));
    let overdue = || {
        let overdue = input.decision?.overdue?;
        Some(Verdict::yes(
            Reason::StartOverdue,
            overdue_sentence(overdue),
        ))
    };
    homeless
        .map(|replica| why_not_ready(replica).but("True"))
        .or_else(overdue)
}

/// The load is work for more replicas than are allowed.
fn scaling_limited(input: &StatusInput<'_>) -> Option<Verdict> {
    let policy = autoscaled(input)?;
    let (decision, most) = (input.decision?, policy.max_replicas.get());
    (decision.demand > most).then(|| {
        let work = counted(decision.demand, "replica");
        let message = format!("the load is work for {work}, of at most {most}: raise maxReplicas");
        Verdict::yes(Reason::AtMaxReplicas, message)
    })
}

/// The policy by which the operator sets the number of replicas.
fn autoscaled<'a>(input: &StatusInput<'a>) -> Option<&'a Autoscaling> {
    input.stored.spec()?.autoscaled()
}

fn serving(n_ready: i32) -> String {
    counted_are(u64::try_from(n_ready).unwrap_or(0), "replica") + " serving"
}

fn fewer_serving(n_ready: i32, wanted: i32) -> String {
    let of = counted(u64::try_from(wanted).unwrap_or(0), "replica");
    let verb = if n_ready == 1 { "is" } else { "are" };
    format!("{n_ready} of {of} {verb} serving")
}

fn why_not_ready(replica: &NotReadyReplica) -> Verdict {
    let pod = replica.pod.iter().map(|pod| format!("{pod}: "));
    Verdict {
        status: "False",
        reason: replica.reason.clone(),
        message: pod.chain([replica.message.clone()]).collect(),
    }
}

/// The number of replicas that the child Deployment asks for.
fn wanted(input: &StatusInput<'_>) -> Option<i32> {
    input.child.and_then(|child| child.spec.as_ref()?.replicas)
}

/// What stands in the way of a deployment that doesn't serve as it should.
fn obstacle(input: &StatusInput<'_>, seen: Seen<'_>) -> Verdict {
    if let Some(refusal) = input.refused {
        return Verdict::no(refusal.reason, &refusal.sentence);
    }
    if let Some(sentence) = rolled_back(input) {
        return Verdict::no(Reason::RolledBack, sentence);
    }
    let wanted = wanted(input);
    if is_paused(input) {
        let message = "spec.rollout.paused holds the spec's revision back: set it to false";
        return Verdict::no(Reason::RolloutPaused, message);
    }
    if wanted == Some(0) {
        return Verdict::no(Reason::ScaledToZero, "spec.replicas is 0");
    }
    if let Some(replica) = seen.not_ready.first() {
        return why_not_ready(replica);
    }
    if replicas(&input.observed.pods).next().is_none() {
        return match seen.ended.first() {
            Some(ended) => Verdict::no(
                Reason::PodLost,
                format!("{}: {}", ended.reason, ended.message),
            ),
            None => Verdict::no(Reason::Creating, "no pod exists yet"),
        };
    }
    Verdict::no(
        Reason::RollingOut,
        fewer_serving(seen.n_ready, wanted.unwrap_or(1)),
    )
}

/// Why the revision before the spec's runs.
fn rolled_back(input: &StatusInput<'_>) -> Option<String> {
    failure(input.stored.spec()?, input.child?)
}

/// The spec has another revision than the pods' template, and is to wait.
fn is_paused(input: &StatusInput<'_>) -> bool {
    let Some((spec, child)) = input.stored.spec().zip(input.child) else {
        return false;
    };
    let template = child.spec.as_ref().map(|child| &child.template);
    let is_other = template.and_then(revision_of) != Some(&revision(spec));
    is_other && spec.rollout.as_ref().is_some_and(|rollout| rollout.paused)
}

/// How far the pods are what the spec asks for.
#[derive(Clone, Copy, Debug)]
struct Rollout {
    /// Replicas that the child Deployment asks for.
    wanted: i32,
    /// Every pod is of the current generation.
    of_generation: bool,
    /// So are as many as are asked for, and all of them serve.
    is_complete: bool,
    /// The child Deployment has made no progress for too long.
    is_past_deadline: bool,
}

impl Rollout {
    /// The Deployment as observed may still be of the generation before: what is rolled out must be what is asked for.
    fn of(input: &StatusInput<'_>, n_ready: i32) -> Self {
        let spec = input.child.and_then(|child| child.spec.as_ref());
        let wanted = spec.and_then(|spec| spec.replicas).unwrap_or(1);
        let Some((child, revision)) = input.child.zip(input.stored.spec().map(revision)) else {
            return Self {
                wanted,
                of_generation: false,
                is_complete: false,
                is_past_deadline: false,
            };
        };
        let status = child.status.clone().unwrap_or_default();
        let n_pods = status.replicas.unwrap_or(0);
        let is_current = spec.and_then(|spec| revision_of(&spec.template)) == Some(&revision)
            && status.observed_generation == child.metadata.generation;
        let of_generation = is_current && status.updated_replicas.unwrap_or(0) == n_pods;
        let asked = match input.decision.filter(|_| autoscaled(input).is_some()) {
            Some(decision) => i32::try_from(decision.replicas).ok(),
            None => input.stored.spec().and_then(|spec| spec.replicas),
        };
        let mut conditions = status.conditions.iter().flatten();
        Self {
            wanted,
            of_generation,
            is_complete: of_generation
                && asked == Some(wanted)
                && n_pods == wanted
                && n_ready >= wanted,
            is_past_deadline: is_current
                && conditions.any(|c| {
                    c.type_ == "Progressing"
                        && c.reason.as_deref() == Some("ProgressDeadlineExceeded")
                }),
        }
    }
}

/// Whether the operator decides the number of replicas. The numbers change at every look: they stand in `lastScaling` and
/// the figures, not here.
fn scaling_active(input: &StatusInput<'_>) -> Verdict {
    let Some((decision, policy)) = input.decision.zip(autoscaled(input)) else {
        return match (input.refused, input.decision) {
            // Nothing is decided, whatever the load.
            (Some(refusal), None) => Verdict::no(refusal.reason, &refusal.sentence),
            (_, Some(_)) => Verdict::no(
                Reason::Observing,
                "status.autoscaling tells what would be decided",
            ),
            (None, None) => Verdict::no(Reason::FixedReplicas, ""),
        };
    };
    if input.load.is_none() {
        return Verdict::no(Reason::LoadUnknown, &decision.reason);
    }
    let most = counted(policy.max_replicas.get(), "replica");
    Verdict::yes(
        Reason::Autoscaled,
        format!("{} of at most {most}", decision.replicas),
    )
}

#[cfg(test)]
mod tests;
