//! Decides, purely, what should change for one `LLMDeployment`: children, replicas, status, events.
//!
//! It knows no API server and no clock: what was observed, the history and the time are arguments.

pub mod autoscale;
pub mod children;
pub mod pod_template;
pub mod status;

use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use kube::{Resource, ResourceExt};
use kvasir_crds::llmdeployment::{
    ConditionType, LLMDeployment, LLMDeploymentStatus, LastScaling, Reason,
};

use crate::observe::Observed;
use crate::stored::{Unreadable, version};
use autoscale::Load;
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
#[derive(Clone, Debug, Default)]
pub struct History {
    autoscale: autoscale::History,
    load_status_at: Option<Duration>,
    /// The status written last, and the version that the object had then.
    written: Option<(LLMDeploymentStatus, u64)>,
}

impl History {
    /// Takes note of a status that was written, and of the version that the object has with it.
    pub fn wrote(&mut self, status: LLMDeploymentStatus, version: u64) {
        self.written = Some((status, version));
    }

    /// The status that the API server holds: as the watch brought it, or as it was written last where the watch is behind.
    /// Planning from an older one would take the last scaling out of it.
    fn before(
        &self,
        metadata: &ObjectMeta,
        status: Option<&LLMDeploymentStatus>,
    ) -> Option<LLMDeploymentStatus> {
        match &self.written {
            Some((written, then)) if version(metadata).is_none_or(|now| now < *then) => {
                Some(written.clone())
            }
            _ => status.cloned(),
        }
    }
}

/// What is to be done.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The children as they should be; `None` where nothing may be touched.
    pub children: Option<Children>,
    /// What to tell the user, in order.
    pub events: Vec<Note>,
    /// The status, where it changes.
    pub status: Option<LLMDeploymentStatus>,
    /// What the replicas report, for the metrics.
    pub load: Option<Load>,
    /// When to look again, if nothing happens before.
    pub recheck_after: Duration,
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
pub struct Note {
    /// How it is meant.
    pub severity: Severity,
    /// CamelCase, from a closed set.
    pub reason: &'static str,
    /// What the operator did.
    pub action: &'static str,
    /// In words, with the numbers.
    pub message: String,
}

/// Plans one reconcile of a deployment that could be read. `default_image` is used where the deployment names none and none runs yet.
pub fn plan(
    deployment: &LLMDeployment,
    observed: &Observed,
    history: &mut History,
    now: Now,
    default_image: &str,
) -> Plan {
    let conflict = name_conflict(&deployment.metadata, observed);
    let running = observed
        .deployment
        .as_deref()
        .filter(|_| conflict.is_none());
    let current = running.and_then(|child| child.spec.as_ref()?.replicas);

    if deployment.spec.autoscaling.is_none() {
        // Should it be switched on again, what was known before counts no more.
        history.autoscale = autoscale::History::default();
    }
    let decision = deployment.spec.autoscaling.as_ref().map(|policy| {
        let current = current.map_or(policy.min_replicas.get(), |n| u32::try_from(n).unwrap_or(0));
        autoscale::decide(
            policy,
            current,
            &observed.loads,
            &mut history.autoscale,
            now.monotonic,
        )
    });
    let replicas = match (&decision, deployment.spec.replicas) {
        (Some(decision), _) => i32::try_from(decision.replicas).unwrap_or(i32::MAX),
        (None, replicas) => replicas.unwrap_or(1),
    };
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
    let scaling = match (&decision, current) {
        // Where the children can't be planned nothing is carried out, and nothing may be told.
        (Some(decision), Some(from)) if from != replicas && children.is_ok() => Some(LastScaling {
            time: Time(now.wall),
            from,
            to: replicas,
            reason: decision.reason.clone(),
        }),
        _ => None,
    };
    let before = history.before(&deployment.metadata, deployment.status.as_ref());
    let refused = children.as_ref().err();
    let load = autoscale::load(&observed.loads);
    let status = status::status(&StatusInput {
        metadata: &deployment.metadata,
        spec: Some(&deployment.spec),
        before: before.as_ref(),
        refused,
        child: running,
        pods: &observed.pods,
        warnings: &observed.warnings,
        last_lines: &observed.last_lines,
        load,
        decision: decision.as_ref(),
        scaling: scaling.as_ref(),
        now: now.wall,
    });
    let recheck_after = match () {
        () if deployment.spec.autoscaling.is_some() => AUTOSCALE_INTERVAL,
        () if status.ready_replicas < replicas => NOT_READY_INTERVAL,
        () if replicas > 0 => LOAD_STATUS_INTERVAL,
        () => RESYNC_INTERVAL,
    };
    let scaled = scaling.map(|s| Note {
        severity: Severity::Normal,
        reason: match s.to > s.from {
            true => "ScaledUp",
            false => "ScaledDown",
        },
        action: "Scale",
        message: s.reason,
    });
    let told = refused.and_then(|refusal| refusal_note(before.as_ref(), refusal));
    Plan {
        events: scaled.into_iter().chain(told).collect(),
        children: children.ok(),
        status: changed(before.as_ref(), status, history, now),
        load,
        recheck_after,
    }
}

/// Plans for a deployment whose spec can't be read: what runs goes on as it is, and the status says why.
pub fn plan_unreadable(
    unreadable: &Unreadable,
    observed: &Observed,
    history: &mut History,
    now: Now,
) -> Plan {
    let refusal = Refusal {
        reason: Reason::InvalidSpec,
        sentence: unreadable.sentence.clone(),
    };
    history.autoscale = autoscale::History::default();
    let before = history.before(&unreadable.metadata, unreadable.status.as_ref());
    let load = autoscale::load(&observed.loads);
    let conflict = name_conflict(&unreadable.metadata, observed);
    let status = status::status(&StatusInput {
        metadata: &unreadable.metadata,
        spec: None,
        before: before.as_ref(),
        refused: Some(&refusal),
        child: observed
            .deployment
            .as_deref()
            .filter(|_| conflict.is_none()),
        pods: &observed.pods,
        warnings: &observed.warnings,
        last_lines: &observed.last_lines,
        load,
        decision: None,
        scaling: None,
        now: now.wall,
    });
    Plan {
        children: None,
        events: refusal_note(before.as_ref(), &refusal)
            .into_iter()
            .collect(),
        status: changed(before.as_ref(), status, history, now),
        load,
        recheck_after: LOAD_STATUS_INTERVAL,
    }
}

/// The event of a refusal that the status doesn't tell yet.
fn refusal_note(before: Option<&LLMDeploymentStatus>, refusal: &Refusal) -> Option<Note> {
    let conditions = before.map(|status| status.conditions.as_slice());
    let known = conditions.unwrap_or_default().iter().any(|c| {
        c.type_ == ConditionType::Accepted.as_str()
            && c.reason == refusal.reason.as_str()
            && c.message == refusal.sentence
    });
    (!known).then(|| Note {
        severity: Severity::Warning,
        reason: refusal.reason.as_str(),
        action: "Accept",
        message: refusal.sentence.clone(),
    })
}

/// The status where it differs from the one there is; figures of load alone wait for their interval.
fn changed(
    before: Option<&LLMDeploymentStatus>,
    status: LLMDeploymentStatus,
    history: &mut History,
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
        .load_status_at
        .is_some_and(|at| now.monotonic.saturating_sub(at) < LOAD_STATUS_INTERVAL);
    if only_load && recent {
        return None;
    }
    history.load_status_at = Some(now.monotonic);
    Some(status)
}

/// The refusal for an object of a child's name that the deployment doesn't control; such an object is never touched.
fn name_conflict(metadata: &ObjectMeta, observed: &Observed) -> Option<Refusal> {
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
    foreign(metadata, observed.deployment.as_deref())
        .or_else(|| foreign(metadata, observed.service.as_deref()))
        .or_else(|| foreign(metadata, observed.budget.as_deref()))
        .or_else(|| foreign(metadata, observed.account.as_deref()))
}

#[cfg(test)]
mod tests;
