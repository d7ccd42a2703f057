//! How a change of the pods' template comes about: by one more replica first or one by one in place, not at all while it is
//! paused, and back to the template before where the new one can't become ready. Pure; what must outlast the operator
//! stands in annotations of the child Deployment.

use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt;
use kvasir_crds::llmdeployment::{LLMDeploymentSpec, Reason, RolloutStrategy};
use serde_json::json;

use super::children::{
    APPLIED_TEMPLATE, FAILED_BECAUSE, FAILED_REVISION, GOOD_REVISION, GOOD_TEMPLATE,
    REVISION_LABEL, revision, revision_of,
};
use super::status::not_ready::why;
use crate::observed::Observed;
use crate::pod::{SERVER, is_ready, replicas};

/// A pod of a new revision that can't run is waited for so long: what passes by itself should.
const PATIENCE: Duration = Duration::from_secs(90);
/// A server that has ended so often ends again.
const RESTARTS: i32 = 2;

/// How pods are replaced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pace {
    /// A new replica serves before an old one goes.
    Surge,
    /// An old replica goes, and a new one takes its place.
    Replace,
}

/// What is decided about a rollout.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rollout {
    /// How pods are replaced.
    pub pace: Pace,
    /// What just happened, for an event: its reason and its message.
    pub news: Option<(&'static str, String)>,
    /// The revision that was rolled out whole last.
    good: Option<String>,
    /// The spec's revision, where it can't become ready, and why.
    failed: Option<(String, String)>,
}

impl Rollout {
    /// Decides for the spec and what runs.
    #[must_use]
    pub fn decide(
        spec: &LLMDeploymentSpec,
        observed: &Observed,
        running: Option<&Deployment>,
        now: Timestamp,
    ) -> Self {
        let wanted = revision(spec);
        let Some(running) = running else {
            return Self {
                pace: asked(spec).unwrap_or(Pace::Surge),
                news: None,
                good: None,
                failed: None,
            };
        };
        let applied = applied_revision(running);
        let good = match is_whole(running) {
            true => applied.clone(),
            false => annotation(running, GOOD_REVISION),
        };
        let known = annotation(running, FAILED_REVISION).filter(|failed| *failed == wanted);
        let mut news = None;
        let failed = match known {
            Some(failed) => Some((
                failed,
                annotation(running, FAILED_BECAUSE).unwrap_or_default(),
            )),
            None if good.is_some() && good != applied && applied.as_ref() == Some(&wanted) => {
                let because = cannot_become_ready(observed, &wanted, now);
                because.map(|because| {
                    news = Some(("RolledBack", rolled_back(&because)));
                    (wanted, because)
                })
            }
            None => None,
        };
        let (pace, replaces) = pace(spec, observed, running);
        Self {
            pace,
            news: news.or(replaces.map(|why| ("ReplacingInPlace", why))),
            good,
            failed,
        }
    }

    /// `running` as it has to be known for the template of the children: with a failure that was just found.
    #[must_use]
    pub fn mark(&self, running: &Deployment) -> Deployment {
        let mut marked = running.clone();
        let annotations = marked.annotations_mut();
        if let Some((revision, because)) = &self.failed {
            annotations.insert(FAILED_REVISION.to_owned(), revision.clone());
            annotations.insert(FAILED_BECAUSE.to_owned(), because.clone());
        }
        marked
    }

    /// Writes what is decided into the child that is to be applied in the place of `running`.
    pub fn settle(&self, child: &mut Deployment, running: Option<&Deployment>) {
        let template = child
            .spec
            .as_ref()
            .and_then(|spec| revision_of(&spec.template));
        let next = template.cloned();
        let annotations = child.annotations_mut();
        let mut keep = |name: &str, value: Option<String>| {
            if let Some(value) = value {
                annotations.insert(name.to_owned(), value);
            }
        };
        keep(GOOD_REVISION, self.good.clone());
        if self.good.is_some() && self.good != next {
            let of_running = running.and_then(|running| {
                let name = match applied_revision(running) == self.good {
                    true => APPLIED_TEMPLATE,
                    false => GOOD_TEMPLATE,
                };
                annotation(running, name)
            });
            keep(GOOD_TEMPLATE, of_running);
        }
        if let Some((revision, because)) = &self.failed {
            keep(FAILED_REVISION, Some(revision.clone()));
            keep(FAILED_BECAUSE, Some(because.clone()));
        }
        let (surge, unavailable) = match self.pace {
            Pace::Surge => (1, 0),
            Pace::Replace => (0, 1),
        };
        if let Some(spec) = &mut child.spec {
            let strategy = json!({ "type": "RollingUpdate",
                "rollingUpdate": { "maxSurge": surge, "maxUnavailable": unavailable } });
            spec.strategy = serde_json::from_value(strategy).ok();
        }
    }
}

/// Why the spec's revision isn't rolled out, where what runs is the one before it again.
#[must_use]
pub fn failure(spec: &LLMDeploymentSpec, running: &Deployment) -> Option<String> {
    annotation(running, FAILED_REVISION).filter(|failed| *failed == revision(spec))?;
    Some(rolled_back(
        &annotation(running, FAILED_BECAUSE).unwrap_or_default(),
    ))
}

/// The revision that was rolled out whole last.
#[must_use]
pub fn good_revision(running: &Deployment) -> Option<String> {
    match is_whole(running) {
        true => applied_revision(running),
        false => annotation(running, GOOD_REVISION),
    }
}

fn rolled_back(because: &str) -> String {
    format!(
        "the spec's revision can't become ready, and the one before it runs on; change the spec to try again: {because}"
    )
}

fn annotation(running: &Deployment, name: &str) -> Option<String> {
    running.annotations().get(name).cloned()
}

fn applied_revision(running: &Deployment) -> Option<String> {
    revision_of(&running.spec.as_ref()?.template).cloned()
}

/// Every replica is of the template, and serves; at least one does.
fn is_whole(running: &Deployment) -> bool {
    let status = running.status.clone().unwrap_or_default();
    let count = |n: Option<i32>| n.unwrap_or(0);
    let wanted = running.spec.as_ref().and_then(|spec| spec.replicas);
    status.observed_generation == running.metadata.generation
        && count(status.ready_replicas) > 0
        && count(status.updated_replicas) == count(status.replicas)
        && wanted.is_none_or(|wanted| count(status.available_replicas) >= wanted)
}

/// What the user asks for; `None`: it is ours to decide.
fn asked(spec: &LLMDeploymentSpec) -> Option<Pace> {
    match spec.rollout.as_ref().and_then(|rollout| rollout.strategy) {
        Some(RolloutStrategy::Surge) => Some(Pace::Surge),
        Some(RolloutStrategy::Replace) => Some(Pace::Replace),
        Some(RolloutStrategy::Auto) | None => None,
    }
}

/// One more replica where there is a place for it; the reason, where that was just found out.
fn pace(
    spec: &LLMDeploymentSpec,
    observed: &Observed,
    running: &Deployment,
) -> (Pace, Option<String>) {
    if let Some(asked) = asked(spec) {
        return (asked, None);
    }
    let Some(applied) = applied_revision(running) else {
        return (Pace::Surge, None);
    };
    let is_old = |pod: &&Pod| pod.labels().get(REVISION_LABEL) != Some(&applied);
    if replicas(&observed.pods).find(is_old).is_none() {
        return (Pace::Surge, None);
    }
    let strategy = running
        .spec
        .as_ref()
        .and_then(|spec| spec.strategy.as_ref());
    let surge = strategy.and_then(|s| s.rolling_update.as_ref()?.max_surge.clone());
    if surge == Some(k8s_openapi::apimachinery::pkg::util::intstr::IntOrString::Int(0)) {
        // As it began: the place that was made is taken, and the next one has to be made too.
        return (Pace::Replace, None);
    }
    let homeless = replicas(&observed.pods)
        .filter(|pod| !is_old(pod))
        .find_map(|pod| {
            let (reason, message) = why(pod, observed);
            let has_no_place = !is_ready(pod) && reason == Reason::Unschedulable;
            has_no_place.then(|| format!("{}: {message}", pod.name_any()))
        });
    match homeless {
        Some(words) => {
            let news = format!(
                "there is no place for one replica more, and each is drained and replaced, one by one: {words}"
            );
            (Pace::Replace, Some(news))
        }
        None => (Pace::Surge, None),
    }
}

/// Why no pod of this revision will serve. A pod that finds no place may find one yet.
fn cannot_become_ready(observed: &Observed, revision: &str, now: Timestamp) -> Option<String> {
    let of_revision =
        |pod: &&Pod| pod.labels().get(REVISION_LABEL).map(String::as_str) == Some(revision);
    let mut pods = replicas(&observed.pods).filter(of_revision).peekable();
    if replicas(&observed.pods).filter(of_revision).any(is_ready) {
        return None;
    }
    pods.peek()?;
    pods.find_map(|pod| {
        let created = pod.metadata.creation_timestamp.as_ref()?.0;
        let age = now.as_second().saturating_sub(created.as_second());
        let is_old = u64::try_from(age).is_ok_and(|age| age >= PATIENCE.as_secs());
        let (reason, message) = why(pod, observed);
        let is_hopeless = match reason {
            Reason::Crashed => restarts(pod) >= RESTARTS && is_old,
            Reason::ImagePullFailed | Reason::ContainerRefused => is_old,
            _ => false,
        };
        is_hopeless.then(|| format!("{}: {message}", pod.name_any()))
    })
}

fn restarts(pod: &Pod) -> i32 {
    let statuses = pod
        .status
        .iter()
        .flat_map(|s| s.container_statuses.iter().flatten());
    let servers = statuses.filter(|c| c.name == SERVER);
    servers.map(|c| c.restart_count).max().unwrap_or(0)
}

#[cfg(test)]
mod tests;
