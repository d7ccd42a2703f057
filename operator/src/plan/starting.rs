//! Which replicas are starting, and how long those took that have started. Pure.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;

use crate::pod::{has_started, is_ready, replicas};

/// The replicas that were seen, by UID, and whether they have been ready since their pods were created. One that was ready
/// when it was first seen, after a restart of the operator, says nothing of how long it took.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Starting(HashMap<String, bool>);

impl Starting {
    /// Notes these pods; the time that each took which is ready for the first time.
    pub(super) fn note(&mut self, pods: &[Arc<Pod>]) -> Vec<Duration> {
        let before = std::mem::take(&mut self.0);
        let mut took = Vec::new();
        for pod in replicas(pods) {
            let Some(uid) = pod.metadata.uid.clone() else {
                continue;
            };
            let is_ready = is_ready(pod);
            let was_ready = before.get(&uid).copied();
            if is_ready && was_ready == Some(false) {
                took.extend(ready_after(pod));
            }
            self.0.insert(uid, is_ready || was_ready == Some(true));
        }
        took
    }
}

/// How long ago the pods of the replicas were created that have not started yet.
pub(super) fn ages(pods: &[Arc<Pod>], now: Timestamp) -> Vec<Duration> {
    let starting = replicas(pods).filter(|pod| !has_started(pod));
    let created = starting.filter_map(|pod| pod.metadata.creation_timestamp.as_ref());
    created.map(|created| between(created.0, now)).collect()
}

/// From a pod's creation until it was ready.
fn ready_after(pod: &Pod) -> Option<Duration> {
    let created = pod.metadata.creation_timestamp.as_ref()?.0;
    let conditions = pod.status.as_ref()?.conditions.as_deref()?;
    let ready = conditions.iter().find(|c| c.type_ == "Ready")?;
    Some(between(created, ready.last_transition_time.as_ref()?.0))
}

/// Nothing where the clocks disagree.
fn between(from: Timestamp, to: Timestamp) -> Duration {
    Duration::try_from(to.duration_since(from)).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn pod(uid: &str, ready: Option<&str>) -> Arc<Pod> {
        let status = if ready.is_some() { "True" } else { "False" };
        Arc::new(
            serde_json::from_value(json!({
                "metadata": { "uid": uid, "creationTimestamp": "2026-01-01T00:00:00Z" },
                "status": {
                    "conditions": [{ "type": "Ready", "status": status, "lastTransitionTime": ready }],
                    "containerStatuses": [{ "name": "server", "started": ready.is_some(), "image": "i",
                        "imageID": "", "ready": true, "restartCount": 0 }] }
            }))
            .unwrap(),
        )
    }

    #[test]
    fn a_start_counts_once_and_only_where_its_end_was_seen() {
        let mut starting = Starting::default();
        let served = Some("2026-01-01T00:00:07Z");
        let again = Some("2026-01-01T01:00:00Z");
        for (why, pods, want) in [
            (
                "one serves already, one starts",
                [pod("a", served), pod("b", None)],
                vec![],
            ),
            ("it serves", [pod("a", served), pod("b", served)], vec![7]),
            (
                "it doesn't for a moment",
                [pod("a", served), pod("b", None)],
                vec![],
            ),
            ("and does again", [pod("a", again), pod("b", again)], vec![]),
            (
                "others took their place",
                [pod("c", None), pod("d", None)],
                vec![],
            ),
            (
                "and serve",
                [pod("c", served), pod("d", served)],
                vec![7, 7],
            ),
        ] {
            let took: Vec<_> = starting.note(&pods).iter().map(Duration::as_secs).collect();
            assert_eq!(took, want, "{why}");
        }
    }

    #[test]
    fn those_that_have_not_started_have_an_age() {
        let now = "2026-01-01T00:00:30Z".parse().unwrap();
        let pods = [pod("a", None), pod("b", Some("2026-01-01T00:00:07Z"))];
        assert_eq!(ages(&pods, now), [Duration::from_secs(30)]);
        let before = "2025-01-01T00:00:30Z".parse().unwrap();
        assert_eq!(
            ages(&pods[..1], before),
            [Duration::ZERO],
            "a clock that is behind"
        );
    }
}
