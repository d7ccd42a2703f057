//! How long starts took, phase by phase, over the replicas that serve now. Pure; nothing is remembered but the status
//! before, which stands while no replica serves.

use k8s_openapi::api::core::v1::Pod;
use kvasir_crds::LoadReport;
use kvasir_crds::llmdeployment::{PhaseTimes, StartTimes};

use crate::observed::{Observed, ReplicaLoad};
use crate::pod::{SERVER, running_since};

/// Milliseconds of each of [`StartTimes::PHASES`], where known.
type Sample = [Option<i64>; 6];

pub(super) fn start_times(observed: &Observed, before: Option<StartTimes>) -> Option<StartTimes> {
    let reports = observed
        .loads_by_pod()
        .filter_map(|(pod, load)| match load {
            ReplicaLoad::Reported(report) => sample(pod, report),
            ReplicaLoad::Silent => None,
        });
    let samples: Vec<Sample> = reports.collect();
    if samples.is_empty() {
        return before;
    }
    let phases = StartTimes::PHASES
        .iter()
        .enumerate()
        .filter_map(|(i, phase)| {
            let mut times: Vec<i64> = samples.iter().filter_map(|sample| sample[i]).collect();
            times.sort_unstable();
            Some(PhaseTimes {
                phase: (*phase).to_owned(),
                p50_milliseconds: percentile(&times, 50)?,
                p90_milliseconds: percentile(&times, 90)?,
            })
        });
    Some(StartTimes {
        samples: i32::try_from(samples.len()).unwrap_or(i32::MAX),
        phases: phases.collect(),
    })
}

/// The value that so many percent of the sorted `times` don't exceed (nearest rank).
fn percentile(times: &[i64], percent: usize) -> Option<i64> {
    let rank = (times.len() * percent).div_ceil(100);
    times.get(rank.saturating_sub(1)).copied()
}

/// `None` where the server doesn't say, as elder ones don't.
fn sample(pod: &Pod, report: &LoadReport) -> Option<Sample> {
    let start = report
        .start
        .as_ref()
        .filter(|start| start.load_ms.is_some())?;
    let millis = |ms: Option<u64>| ms.and_then(|ms| i64::try_from(ms).ok());
    let [schedule, pull] = before_its_server(pod);
    let (fetch, load) = (millis(start.fetch_ms), millis(start.load_ms));
    let warm_up = millis(start.warm_up_ms);
    let total = schedule.zip(pull).map(|(schedule, pull)| {
        [fetch, load, warm_up].iter().flatten().sum::<i64>() + schedule + pull
    });
    Some([schedule, pull, fetch, load, warm_up, total])
}

/// How long the pod waited for a node, and then for its container. A server that was started again says nothing of either.
fn before_its_server(pod: &Pod) -> [Option<i64>; 2] {
    let status = pod.status.as_ref();
    let mut containers = status
        .and_then(|s| s.container_statuses.as_ref())
        .into_iter()
        .flatten();
    let is_first_run = containers.any(|c| c.name == SERVER && c.restart_count == 0);
    let created = pod.metadata.creation_timestamp.as_ref().map(|time| time.0);
    let mut conditions = status
        .and_then(|s| s.conditions.as_ref())
        .into_iter()
        .flatten();
    let scheduled = conditions.find(|c| c.type_ == "PodScheduled" && c.status == "True");
    let scheduled = scheduled
        .and_then(|c| c.last_transition_time.as_ref())
        .map(|time| time.0);
    let running = running_since(pod).filter(|_| is_first_run);
    let between = |from: Option<jiff::Timestamp>, to: Option<jiff::Timestamp>| {
        let (from, to) = from.zip(to)?;
        Some((to.as_millisecond() - from.as_millisecond()).max(0))
    };
    [between(created, scheduled), between(scheduled, running)]
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use kvasir_crds::load_report::StartReport;
    use serde_json::json;

    use super::*;

    fn pod(scheduled: u32, running: u32, restarts: u32) -> Arc<Pod> {
        let at = |second: u32| format!("2026-01-01T00:00:{second:02}Z");
        let pod = json!({ "metadata": { "name": "p", "creationTimestamp": at(0) }, "status": { "podIP": "10.0.0.1",
            "conditions": [{ "type": "PodScheduled", "status": "True", "lastTransitionTime": at(scheduled) }],
            "containerStatuses": [{ "name": "server", "ready": true, "started": true, "image": "i", "imageID": "",
                "restartCount": restarts, "state": { "running": { "startedAt": at(running) } } }] } });
        Arc::new(serde_json::from_value(pod).unwrap())
    }

    fn load(fetch_ms: Option<u64>, load_ms: Option<u64>) -> ReplicaLoad {
        ReplicaLoad::Reported(LoadReport {
            start: Some(StartReport {
                fetch_ms,
                load_ms,
                warm_up_ms: load_ms.map(|_| 5),
                ..StartReport::default()
            }),
            ..LoadReport::default()
        })
    }

    #[test]
    fn phases_are_those_of_the_replicas_that_serve() {
        let observed = Observed {
            pods: vec![
                pod(1, 3, 0),
                pod(2, 9, 0),
                pod(0, 50, 1),
                pod(0, 1, 0),
                pod(0, 1, 0),
            ],
            loads: vec![
                load(Some(700), Some(100)),
                load(None, Some(300)),
                load(None, Some(200)),
                load(None, None),
                ReplicaLoad::Silent,
            ],
            ..Observed::default()
        };
        let times = start_times(&observed, None).unwrap();
        assert_eq!(
            times.samples, 3,
            "an elder server and a silent one say nothing"
        );
        let found: Vec<_> = times
            .phases
            .iter()
            .map(|p| (p.phase.as_str(), p.p50_milliseconds, p.p90_milliseconds))
            .collect();
        assert_eq!(
            found,
            [
                ("Schedule", 1000, 2000),
                ("Pull", 2000, 7000),
                ("Fetch", 700, 700),
                ("Load", 200, 300),
                ("WarmUp", 5, 5),
                ("Total", 3805, 9305),
            ],
            "a server that was started again tells nothing of its pull"
        );
        let nothing = Observed::default();
        assert_eq!(start_times(&nothing, Some(times.clone())), Some(times));
        assert_eq!(start_times(&nothing, None), None);
    }

    #[test]
    fn percentiles_are_of_the_nearest_rank() {
        let ten: Vec<i64> = (1..=10).collect();
        assert_eq!(percentile(&ten, 50), Some(5));
        assert_eq!(percentile(&ten, 90), Some(9));
        assert_eq!(percentile(&[7], 50), Some(7));
        assert_eq!(percentile(&[], 50), None);
    }
}
