//! Decides, purely, what should change for one `LLMDeployment`: children, replicas, status, events.
//!
//! [`plan`] decides what should be made, and [`report`], once it is known how the API server took it, what is to be told. Both
//! know no API server and no clock: what was observed, the history and the time are arguments. The history to go on with
//! is what [`Report::remember`] gives.

pub mod autoscale;
pub mod children;
pub mod counted;
pub mod pod_template;
pub mod rollout;
mod starting;
pub mod status;
pub mod victims;

use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use kube::{Resource, ResourceExt};
use kvasir_crds::llmdeployment::{
    ConditionType, EndedPods, LLMDeployment, LLMDeploymentSpec, LLMDeploymentStatus, LastScaling,
    Reason,
};

use crate::observed::{Observed, ObservedChildren};
use crate::stored::Stored;
use autoscale::{Decision, LoadSummary, Look, Overdue};
use children::Children;
use rollout::Rollout;
use starting::Starting;
use status::{Refusal, StatusInput};
use victims::{DeletionCost, deletion_costs};

/// Load figures alone are written to the status at most this often, and read this often where replicas are fixed.
const LOAD_STATUS_INTERVAL: Duration = Duration::from_secs(15);
/// How often the replicas of an autoscaled deployment are asked for their load.
const AUTOSCALE_INTERVAL: Duration = Duration::from_secs(2);
/// How soon to look again at a deployment that isn't ready, whose events come without a watch.
const NOT_READY_INTERVAL: Duration = Duration::from_secs(5);
/// Failing requests to write a child become a condition after this long.
pub const FAILING_AFTER: Duration = Duration::from_secs(60);
/// Events that wait to be published, at most.
const MAX_UNSENT: usize = 16;
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
#[derive(Clone, Debug, Default, PartialEq)]
pub struct History {
    autoscale: autoscale::History,
    starting: Starting,
    /// The replicas that an autoscaler which only observes would have, as they were told last.
    observed_wish: Option<u32>,
    /// When a status was written last.
    status_at: Option<Duration>,
    /// A change of the number of replicas that was carried out, and that no status tells yet.
    untold: Option<LastScaling>,
    /// Events that could not be published yet.
    unsent: Vec<EventRecord>,
}

/// What is to be made.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The children as they should be; `None` where they can't be made from the spec, or nothing may be touched.
    pub children: Option<Children>,
    /// What runs, with the pod template that was applied last and the replicas that are asked for now: for when the
    /// Deployment of `children` can't be had.
    pub fallback: Option<Deployment>,
    /// Where there are to be fewer replicas: what each costs, to be told before.
    pub costs: Vec<DeletionCost>,
    /// What the replicas report, for the metrics.
    pub load: Option<LoadSummary>,
    /// Why there are no `children`.
    refusal: Option<Refusal>,
    decision: Option<Decision>,
    /// A change of the number of replicas by the autoscaler, to be told once it was carried out.
    scaling: Option<LastScaling>,
    /// What was decided about the rollout, to be told once it was carried out.
    news: Option<(&'static str, String)>,
    history: History,
}

/// How the API server took the children of a plan.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// The Deployment asks for the replicas that were planned.
    pub is_scaled: bool,
    /// It refuses a child: the same request will be refused again.
    pub refused: Option<Refusal>,
    /// It has failed to write a child for [`FAILING_AFTER`] or longer; in its words.
    pub failing: Option<String>,
}

/// What is to be told.
#[derive(Clone, Debug)]
pub struct Report {
    /// To the user, in order.
    pub events: Vec<EventRecord>,
    /// The status, where it changes.
    pub status: Option<LLMDeploymentStatus>,
    /// The reason of the condition Accepted where it is False, for the metrics.
    pub refused: Option<Reason>,
    /// What the autoscaler decided, carried out or not, for the metrics.
    pub decision: Option<Decision>,
    /// When to look again, if nothing happens before.
    pub recheck_after: Duration,
    at: Duration,
    scaling: Option<LastScaling>,
    history: History,
}

impl Report {
    /// What to remember, once it is known what of this could be told.
    #[must_use]
    pub fn remember(self, status_written: bool, unsent: Vec<EventRecord>) -> History {
        let told = match &self.status {
            Some(_) => status_written,
            None => self.scaling.is_none(),
        };
        let is_new = self.status.is_some() && status_written;
        History {
            status_at: is_new.then_some(self.at).or(self.history.status_at),
            untold: self.scaling.filter(|_| !told),
            unsent: unsent.into_iter().take(MAX_UNSENT).collect(),
            ..self.history
        }
    }
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
    /// What the operator did or would do.
    pub action: &'static str,
    /// In words, with the numbers.
    pub message: String,
}

/// Plans what one deployment should have. Where the spec can't be read, what runs goes on as it is. `default_image` is used
/// where the deployment names no image and no child Deployment of its revision runs yet.
pub fn plan(
    stored: &Stored,
    observed: &Observed,
    history: &History,
    now: Now,
    default_image: &str,
) -> Plan {
    let mut history = history.clone();
    let conflict = name_conflict(stored.meta(), &observed.children);
    let running = running(stored, observed);
    let is_autoscaled = stored.spec().is_some_and(|spec| spec.autoscaling.is_some());
    match is_autoscaled {
        true => {
            let told = stored
                .status()
                .and_then(|status| status.autoscaling.as_ref());
            let learned = told.and_then(|told| told.learned.as_ref());
            history.autoscale.read_back(learned);
        }
        // Should it be switched on again, what was known before counts no more.
        false => history.autoscale = autoscale::History::default(),
    }
    for took in history.starting.note(&observed.pods) {
        history.autoscale.note_start(took);
    }
    let load = autoscale::summarize(&observed.loads);
    let refused = |refusal| Plan {
        children: None,
        fallback: None,
        costs: Vec::new(),
        load,
        refusal: Some(refusal),
        decision: None,
        scaling: None,
        news: None,
        history: history.clone(),
    };
    let deployment = match (&stored.0, conflict) {
        (Err(unreadable), _) => {
            return refused(Refusal {
                reason: Reason::InvalidSpec,
                sentence: unreadable.sentence.clone(),
            });
        }
        (Ok(_), Some(conflict)) => return refused(conflict),
        (Ok(deployment), None) => deployment,
    };
    let decision = autoscale(deployment, running, observed, &mut history, now);
    let replicas = asked_replicas(&deployment.spec, decision.as_ref());
    let rollout = Rollout::decide(&deployment.spec, observed, running, now.wall);
    let (children, fallback) = made(deployment, replicas, default_image, running, &rollout);
    let (children, refusal) = match children {
        Ok(children) => (Some(children), None),
        Err(sentence) => (
            None,
            Some(Refusal {
                reason: Reason::InvalidPodTemplate,
                sentence,
            }),
        ),
    };
    let is_fewer = running
        .and_then(replicas_of)
        .is_some_and(|from| replicas < from);
    let costs = is_fewer.then(|| deletion_costs(observed));
    let carried_out = decision
        .as_ref()
        .filter(|_| deployment.spec.autoscaled().is_some());
    let scaling = match (carried_out, running.and_then(replicas_of)) {
        (Some(decision), Some(from)) if from != replicas => Some(LastScaling {
            time: Time(now.wall),
            from,
            to: replicas,
            reason: decision.reason.clone(),
        }),
        _ => None,
    };
    Plan {
        children,
        fallback,
        costs: costs.unwrap_or_default(),
        load,
        refusal,
        decision,
        scaling,
        news: rollout.news,
        history,
    }
}

/// The children, and what runs for when their Deployment can't be had, both as the rollout wants them.
fn made(
    deployment: &LLMDeployment,
    replicas: i32,
    default_image: &str,
    running: Option<&Deployment>,
    rollout: &Rollout,
) -> (Result<Children, String>, Option<Deployment>) {
    let mut fallback = running.and_then(|running| children::scaled(deployment, replicas, running));
    if let Some(fallback) = &mut fallback {
        rollout.settle(fallback, running);
    }
    let marked = running.map(|running| rollout.mark(running));
    let mut children = children::children(deployment, replicas, default_image, marked.as_ref());
    if let Ok(children) = &mut children {
        rollout.settle(&mut children.deployment, running);
    }
    (children, fallback)
}

/// Says what came of `plan`: the status, and what happened that the status before doesn't tell.
pub fn report(
    stored: &Stored,
    observed: &Observed,
    plan: Plan,
    outcome: &Outcome,
    now: Now,
) -> Report {
    let mut history = plan.history;
    let refused = plan.refusal.as_ref().or(outcome.refused.as_ref());
    let carried_out = plan.scaling.filter(|_| outcome.is_scaled);
    let scaling = carried_out.clone().or(history.untold.clone());
    let status = status::status(&StatusInput {
        stored,
        observed,
        child: running(stored, observed),
        refused,
        failing: outcome.failing.as_deref(),
        decision: plan.decision.as_ref(),
        learned: history.autoscale.learned(),
        scaling: scaling.as_ref(),
        load: plan.load,
        now: now.wall,
    });
    let recheck_after = recheck_after(stored.spec(), refused, plan.decision.as_ref(), &status);
    let before = stored.status();
    let mut events = history.unsent.clone();
    events.extend(carried_out.as_ref().map(scaled));
    events.extend(would_scale(stored, plan.decision.as_ref(), &mut history));
    events.extend(newly_overdue(before, plan.decision.as_ref()));
    events.extend(plan.news.filter(|_| outcome.is_scaled).map(rolled));
    events.extend(refused.filter(|r| !is_told(before, r)).map(refusal));
    events.extend(newly_ended(before, &status).map(ended));
    events.extend(newly_not_ready(before, &status));
    Report {
        events,
        status: changed(before, status, &history, now),
        refused: refused.map(|refusal| refusal.reason),
        decision: plan.decision,
        recheck_after,
        at: now.monotonic,
        scaling,
        history,
    }
}

/// The child Deployment, where one is observed and nothing of the children's names is another's.
fn running<'a>(stored: &Stored, observed: &'a Observed) -> Option<&'a Deployment> {
    let child = observed.children.deployment.as_deref();
    child.filter(|_| name_conflict(stored.meta(), &observed.children).is_none())
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
    let look = Look {
        current,
        loads: &observed.loads,
        starting: &starting::ages(&observed.pods, now.wall),
        now: now.monotonic,
    };
    Some(autoscale::decide(policy, &look, &mut history.autoscale))
}

/// The number of replicas that is asked for now: the autoscaler's, or the user's.
fn asked_replicas(spec: &LLMDeploymentSpec, decision: Option<&Decision>) -> i32 {
    match decision.filter(|_| spec.autoscaled().is_some()) {
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
    refused: Option<&Refusal>,
    decision: Option<&Decision>,
    status: &LLMDeploymentStatus,
) -> Duration {
    let Some(spec) = spec else {
        return LOAD_STATUS_INTERVAL;
    };
    let replicas = asked_replicas(spec, decision);
    match () {
        () if spec.autoscaling.is_some() => AUTOSCALE_INTERVAL,
        () if refused.is_some() => LOAD_STATUS_INTERVAL,
        () if status.ready_replicas < replicas => NOT_READY_INTERVAL,
        () if replicas > 0 => LOAD_STATUS_INTERVAL,
        () => RESYNC_INTERVAL,
    }
}

fn scaled(scaling: &LastScaling) -> EventRecord {
    EventRecord {
        severity: Severity::Normal,
        reason: match scaling.to > scaling.from {
            true => "ScaledUp",
            false => "ScaledDown",
        },
        action: "Scale",
        message: scaling.reason.clone(),
    }
}

/// What an autoscaler that only observes would do, each time that this changes.
fn would_scale(
    stored: &Stored,
    decision: Option<&Decision>,
    history: &mut History,
) -> Option<EventRecord> {
    let spec = stored.spec()?;
    let observing = decision.filter(|_| spec.autoscaled().is_none());
    let wish = observing.map(|decision| decision.replicas);
    let before = std::mem::replace(&mut history.observed_wish, wish);
    let replicas = u32::try_from(spec.replicas.unwrap_or(1)).unwrap_or(0);
    let is_new = wish != before && wish.is_some_and(|n| n != before.unwrap_or(replicas));
    observing.filter(|_| is_new).map(|decision| EventRecord {
        severity: Severity::Normal,
        reason: "WouldScale",
        action: "Scale",
        message: match decision.replicas == replicas {
            true => format!(
                "spec.replicas {replicas} would be kept: {}",
                decision.reason
            ),
            false => format!("not carried out, in mode Observe: {}", decision.reason),
        },
    })
}

/// Replicas that should have started by now, once.
fn newly_overdue(
    before: Option<&LLMDeploymentStatus>,
    decision: Option<&Decision>,
) -> Option<EventRecord> {
    let overdue = decision?.overdue?;
    let conditions = before.map(|status| status.conditions.as_slice());
    let is_told = conditions
        .unwrap_or_default()
        .iter()
        .any(|c| c.type_ == ConditionType::CapacityUnavailable.as_str() && c.status == "True");
    (!is_told).then(|| EventRecord {
        severity: Severity::Warning,
        reason: Reason::StartOverdue.as_str(),
        action: "Scale",
        message: overdue_sentence(overdue),
    })
}

/// Replicas that are late, in words.
fn overdue_sentence(Overdue { n, deadline }: Overdue) -> String {
    let replicas = counted::counted(n, "replica");
    let seconds = deadline.as_secs();
    format!(
        "{replicas} started for longer than {seconds} s, three times what one was measured to need, and not counted as supply any more"
    )
}

fn rolled((reason, message): (&'static str, String)) -> EventRecord {
    EventRecord {
        severity: Severity::Warning,
        reason,
        action: "RollOut",
        message,
    }
}

fn refusal(refusal: &Refusal) -> EventRecord {
    EventRecord {
        severity: Severity::Warning,
        reason: refusal.reason.as_str(),
        action: "Accept",
        message: refusal.sentence.clone(),
    }
}

fn ended(ended: &EndedPods) -> EventRecord {
    EventRecord {
        severity: Severity::Warning,
        reason: "PodsEnded",
        action: "Replace",
        message: format!("{}: {}", ended.reason, ended.message),
    }
}

/// Reasons why pods ended that the status before doesn't give.
fn newly_ended<'a>(
    before: Option<&LLMDeploymentStatus>,
    status: &'a LLMDeploymentStatus,
) -> impl Iterator<Item = &'a EndedPods> {
    let known: Vec<_> = before
        .iter()
        .flat_map(|before| &before.ended_pods)
        .cloned()
        .collect();
    let ended = status.ended_pods.iter();
    ended.filter(move |ended| known.iter().all(|known| known.reason != ended.reason))
}

/// One event for each reason why a replica doesn't serve that the status before doesn't give. A start takes its time.
fn newly_not_ready(
    before: Option<&LLMDeploymentStatus>,
    status: &LLMDeploymentStatus,
) -> Vec<EventRecord> {
    let known = before.map(|before| before.not_ready.as_slice());
    let mut events: Vec<EventRecord> = Vec::new();
    for replica in &status.not_ready {
        let reason = Reason::ALL.iter().find(|it| it.as_str() == replica.reason);
        let is_known = known
            .unwrap_or_default()
            .iter()
            .any(|it| it.reason == replica.reason);
        match reason {
            None | Some(Reason::Starting) => {}
            Some(reason) if is_known || events.iter().any(|it| it.reason == reason.as_str()) => {}
            Some(reason) => events.push(EventRecord {
                severity: Severity::Warning,
                reason: reason.as_str(),
                action: "Serve",
                message: match &replica.pod {
                    Some(pod) => format!("{pod}: {}", replica.message),
                    None => replica.message.clone(),
                },
            }),
        }
    }
    events
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
            autoscaling: before.autoscaling.clone(),
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
