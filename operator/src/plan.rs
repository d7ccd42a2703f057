//! Decides, purely, what should change for one `LLMDeployment`: children, replicas, status, events.
//!
//! It knows no API server and no clock: what was observed, the history and the time are arguments. Nothing is changed by
//! planning: the history to go on with is part of the plan, and counts once the plan was carried out.

pub mod autoscale;
pub mod children;
pub mod counted;
pub mod pod_template;
pub mod status;

use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use kube::{Resource, ResourceExt};
use kvasir_crds::llmdeployment::{
    ConditionType, LLMDeployment, LLMDeploymentSpec, LLMDeploymentStatus, LastScaling, Reason,
};

use crate::observed::{Observed, ObservedChildren};
use crate::stored::Stored;
use autoscale::{Decision, LoadSummary};
use children::Children;
use status::{Refusal, StatusInput};

/// Load figures alone are written to the status at most this often, and read this often where replicas are fixed.
const LOAD_STATUS_INTERVAL: Duration = Duration::from_secs(15);
/// How often the replicas of an autoscaled deployment are asked for their load.
const AUTOSCALE_INTERVAL: Duration = Duration::from_secs(2);
/// How soon to look again at a deployment that isn't ready, whose events come without a watch.
const NOT_READY_INTERVAL: Duration = Duration::from_secs(5);
/// How soon to look again where nothing is expected to happen.
const RESYNC_INTERVAL: Duration = Duration::from_secs(300);

/// The time, by both clocks.
#[derive(Clone, Copy, Debug)]
pub struct Now {
    /// Since the operator's start; for what is measured.
    pub monotonic: Duration,
    /// For what users read.
    pub wall: Timestamp,
}

/// What is remembered of one deployment between reconciles, by UID. Lost in a restart, and then only a little slower.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct History {
    autoscale: autoscale::History,
    /// When a status was written last.
    status_at: Option<Duration>,
}

/// What is to be done.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The children as they should be; `None` where nothing may be touched.
    pub children: Option<Children>,
    /// What to tell the user, in order.
    pub events: Vec<EventRecord>,
    /// The status, where it changes.
    pub status: Option<LLMDeploymentStatus>,
    /// What the replicas report, for the metrics.
    pub load: Option<LoadSummary>,
    /// When to look again, if nothing happens before.
    pub recheck_after: Duration,
    /// What to remember, once all of this was carried out.
    pub history: History,
}

/// How an event is meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Severity {
    /// For information.
    Normal,
    /// The user has to do something.
    Warning,
}

/// An event on the `LLMDeployment`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EventRecord {
    /// How it is meant.
    pub severity: Severity,
    /// CamelCase, from a closed set.
    pub reason: &'static str,
    /// What the operator did.
    pub action: &'static str,
    /// In words, with the numbers.
    pub message: String,
}

/// What was decided about the children, before the status says so.
struct Decided {
    /// As they should be, or why nothing may be touched.
    children: Result<Children, Refusal>,
    /// The autoscaler's answer, where it owns the number of replicas.
    decision: Option<Decision>,
    /// A change of the number of replicas by the autoscaler.
    scaling: Option<LastScaling>,
}

/// Plans one reconcile. Where the spec can't be read, what runs goes on as it is, and the status says why. `default_image`
/// is used where the deployment names no image and no child Deployment of its revision runs yet.
pub fn plan(
    stored: &Stored,
    observed: &Observed,
    history: &History,
    now: Now,
    default_image: &str,
) -> Plan {
    let mut history = history.clone();
    let conflict = name_conflict(stored.meta(), &observed.children);
    let child = observed.children.deployment.as_deref();
    let running = child.filter(|_| conflict.is_none());
    let is_autoscaled = stored.spec().is_some_and(|spec| spec.autoscaling.is_some());
    if !is_autoscaled {
        // Should it be switched on again, what was known before counts no more.
        history.autoscale = autoscale::History::default();
    }
    let decided = match &stored.0 {
        Ok(deployment) => {
            let decision = autoscale(deployment, running, observed, &mut history, now);
            decide(deployment, running, conflict, decision, now, default_image)
        }
        Err(unreadable) => Decided {
            children: Err(Refusal {
                reason: Reason::InvalidSpec,
                sentence: unreadable.sentence.clone(),
            }),
            decision: None,
            scaling: None,
        },
    };
    let load = autoscale::summarize(&observed.loads);
    let status = status::status(&StatusInput {
        stored,
        observed,
        child: running,
        refused: decided.children.as_ref().err(),
        decision: decided.decision.as_ref(),
        scaling: decided.scaling.as_ref(),
        load,
        now: now.wall,
    });
    let recheck_after = recheck_after(stored.spec(), &decided, &status);
    let events = events(stored.status(), &decided);
    let status = changed(stored.status(), status, &history, now);
    if status.is_some() {
        history.status_at = Some(now.monotonic);
    }
    Plan {
        children: decided.children.ok(),
        events,
        status,
        load,
        recheck_after,
        history,
    }
}

/// The autoscaler's answer, where the deployment is autoscaled.
fn autoscale(
    deployment: &LLMDeployment,
    running: Option<&Deployment>,
    observed: &Observed,
    history: &mut History,
    now: Now,
) -> Option<Decision> {
    let policy = deployment.spec.autoscaling.as_ref()?;
    let current = running
        .and_then(replicas_of)
        .map_or(policy.min_replicas.get(), |n| u32::try_from(n).unwrap_or(0));
    Some(autoscale::decide(
        policy,
        current,
        &observed.loads,
        &mut history.autoscale,
        now.monotonic,
    ))
}

/// The children that a readable deployment should have.
fn decide(
    deployment: &LLMDeployment,
    running: Option<&Deployment>,
    conflict: Option<Refusal>,
    decision: Option<Decision>,
    now: Now,
    default_image: &str,
) -> Decided {
    let replicas = asked_replicas(&deployment.spec, decision.as_ref());
    let children =
        match conflict {
            Some(conflict) => Err(conflict),
            None => children::children(deployment, replicas, default_image, running).map_err(
                |sentence| Refusal {
                    reason: Reason::InvalidPodTemplate,
                    sentence,
                },
            ),
        };
    let scaling = match (&decision, running.and_then(replicas_of)) {
        // Where the children can't be planned nothing is carried out, and nothing may be told.
        (Some(decision), Some(from)) if from != replicas && children.is_ok() => Some(LastScaling {
            time: Time(now.wall),
            from,
            to: replicas,
            reason: decision.reason.clone(),
        }),
        _ => None,
    };
    Decided {
        children,
        decision,
        scaling,
    }
}

/// The number of replicas that is asked for now: the autoscaler's, or the user's.
fn asked_replicas(spec: &LLMDeploymentSpec, decision: Option<&Decision>) -> i32 {
    match decision {
        Some(decision) => i32::try_from(decision.replicas).unwrap_or(i32::MAX),
        None => spec.replicas.unwrap_or(1),
    }
}

/// The number of replicas that the child Deployment asks for.
fn replicas_of(child: &Deployment) -> Option<i32> {
    child.spec.as_ref()?.replicas
}

fn recheck_after(
    spec: Option<&LLMDeploymentSpec>,
    decided: &Decided,
    status: &LLMDeploymentStatus,
) -> Duration {
    let Some(spec) = spec else {
        return LOAD_STATUS_INTERVAL;
    };
    let replicas = asked_replicas(spec, decided.decision.as_ref());
    match () {
        () if spec.autoscaling.is_some() => AUTOSCALE_INTERVAL,
        () if status.ready_replicas < replicas => NOT_READY_INTERVAL,
        () if replicas > 0 => LOAD_STATUS_INTERVAL,
        () => RESYNC_INTERVAL,
    }
}

/// What happened that the status `before` doesn't tell yet.
fn events(before: Option<&LLMDeploymentStatus>, decided: &Decided) -> Vec<EventRecord> {
    let scaled = decided.scaling.as_ref().map(|scaling| EventRecord {
        severity: Severity::Normal,
        reason: match scaling.to > scaling.from {
            true => "ScaledUp",
            false => "ScaledDown",
        },
        action: "Scale",
        message: scaling.reason.clone(),
    });
    let refusal = decided.children.as_ref().err();
    let refused = refusal.filter(|refusal| !is_told(before, refusal));
    let refused = refused.map(|refusal| EventRecord {
        severity: Severity::Warning,
        reason: refusal.reason.as_str(),
        action: "Accept",
        message: refusal.sentence.clone(),
    });
    scaled.into_iter().chain(refused).collect()
}

/// The condition Accepted gives this refusal already.
fn is_told(before: Option<&LLMDeploymentStatus>, refusal: &Refusal) -> bool {
    let conditions = before.map(|status| status.conditions.as_slice());
    conditions.unwrap_or_default().iter().any(|c| {
        c.type_ == ConditionType::Accepted.as_str()
            && c.reason == refusal.reason.as_str()
            && c.message == refusal.sentence
    })
}

/// The status where it differs from the one there is; figures of load alone wait for their interval.
fn changed(
    before: Option<&LLMDeploymentStatus>,
    status: LLMDeploymentStatus,
    history: &History,
    now: Now,
) -> Option<LLMDeploymentStatus> {
    if before == Some(&status) {
        return None;
    }
    let only_load = before.is_some_and(|before| {
        let elder = LLMDeploymentStatus {
            utilization_percent: before.utilization_percent,
            queue_depth: before.queue_depth,
            ..status.clone()
        };
        elder == *before
    });
    let recent = history
        .status_at
        .is_some_and(|at| now.monotonic.saturating_sub(at) < LOAD_STATUS_INTERVAL);
    (!(only_load && recent)).then_some(status)
}

/// The refusal for an object of a child's name that the deployment doesn't control; such an object is never touched.
fn name_conflict(metadata: &ObjectMeta, children: &ObservedChildren) -> Option<Refusal> {
    fn foreign<K: Resource<DynamicType = ()>>(
        metadata: &ObjectMeta,
        object: Option<&K>,
    ) -> Option<Refusal> {
        let object = object?;
        let controlled = object.owner_references().iter().any(|owner| {
            owner.controller == Some(true) && Some(&owner.uid) == metadata.uid.as_ref()
        });
        (!controlled).then(|| Refusal {
            reason: Reason::NameConflict,
            sentence: format!(
                "the {} {} exists and is not controlled by this LLMDeployment: delete it, or give the LLMDeployment another name",
                K::kind(&()),
                object.name_any()
            ),
        })
    }
    let ObservedChildren {
        deployment,
        service,
        budget,
        account,
    } = children;
    foreign(metadata, deployment.as_deref())
        .or_else(|| foreign(metadata, service.as_deref()))
        .or_else(|| foreign(metadata, budget.as_deref()))
        .or_else(|| foreign(metadata, account.as_deref()))
}

#[cfg(test)]
mod tests;
