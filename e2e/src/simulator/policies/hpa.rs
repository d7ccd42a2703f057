//! Kubernetes' horizontal pod autoscaler (autoscaling/v2, pkg/controller/podautoscaler): a tolerance of a tenth, every 15
//! seconds, down by the largest wish of 5 minutes, up by at most four pods or as many again in 15 seconds. KEDA gives it an
//! external metric, per replica.

use std::collections::VecDeque;

use super::timing::Interval;
use crate::simulator::policy::{Policy, View};

const INTERVAL_S: f64 = 15.0;
const TOLERANCE: f64 = 0.1;
const DOWN_STABILIZATION_S: f64 = 300.0;
const UP_PERIOD_S: f64 = 15.0;

/// What it scales on.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Metric {
    /// The mean over the pods of a metric of each (type Pods).
    KvUsage,
    /// A sum, with a target for each replica (type External, AverageValue), as KEDA's scalers give it.
    Waiting,
}

/// An autoscaler with one metric.
#[derive(Clone, Debug)]
pub struct Hpa {
    metric: Metric,
    target: f64,
    interval: Interval,
    wishes: VecDeque<(f64, u32)>,
    /// Replicas added, and when.
    added: VecDeque<(f64, u32)>,
}

impl Hpa {
    /// On the mean part of the KV cache that is used.
    #[must_use]
    pub fn on_kv_usage(target: f64) -> Self {
        Self::new(Metric::KvUsage, target)
    }

    /// KEDA, on requests that wait: one replica for each `target` of them.
    #[must_use]
    pub fn keda_on_waiting(target: f64) -> Self {
        Self::new(Metric::Waiting, target)
    }

    fn new(metric: Metric, target: f64) -> Self {
        Self {
            metric,
            target,
            interval: Interval::every(INTERVAL_S),
            wishes: VecDeque::new(),
            added: VecDeque::new(),
        }
    }

    /// Down no further than any wish of late, up no faster than is allowed.
    fn normalize(&mut self, now_s: f64, current: u32, wish: u32) -> u32 {
        self.wishes.push_back((now_s, wish));
        self.wishes
            .retain(|(at, _)| now_s - at <= DOWN_STABILIZATION_S);
        self.added.retain(|(at, _)| now_s - at < UP_PERIOD_S);
        let largest = self.wishes.iter().map(|(_, n)| *n).max().unwrap_or(wish);
        let stabilized = if wish < current {
            largest.min(current)
        } else {
            wish
        };
        let before = current.saturating_sub(self.added.iter().map(|(_, n)| *n).sum());
        let most = (before + 4).max(before * 2).max(current);
        let desired = stabilized.min(most);
        if desired > current {
            self.added.push_back((now_s, desired - current));
        }
        desired
    }
}

/// Replicas by a metric of each pod: those that are ready count, the mean against the target.
fn by_pods(current: u32, levels: &[f64], target: f64) -> u32 {
    if levels.is_empty() {
        return current;
    }
    let ready = levels.len() as f64;
    let ratio = levels.iter().sum::<f64>() / ready / target;
    match (ratio - 1.0).abs() <= TOLERANCE {
        true => current,
        false => ceil(ratio * ready),
    }
}

/// Replicas by a sum with a target for each replica.
fn by_sum(current: u32, sum: f64, target: f64) -> u32 {
    let ratio = sum / (target * f64::from(current.max(1)));
    match (ratio - 1.0).abs() <= TOLERANCE {
        true => current,
        false => ceil(sum / target),
    }
}

fn ceil(n: f64) -> u32 {
    (n - 1e-9).ceil().max(0.0) as u32
}

impl Policy for Hpa {
    fn name(&self) -> String {
        match self.metric {
            Metric::KvUsage => format!("HPA, KV {:.0} %", self.target * 100.0),
            Metric::Waiting => format!("KEDA, {} waiting", self.target),
        }
    }

    fn desired(&mut self, view: &View<'_>) -> u32 {
        if !self.interval.is_due(view.now_s) {
            return view.asked;
        }
        let serving = view.serving();
        let wish = match self.metric {
            Metric::KvUsage => {
                let levels: Vec<f64> = serving.iter().map(|m| m.kv_usage).collect();
                by_pods(view.asked, &levels, self.target)
            }
            Metric::Waiting => {
                let sum = serving.iter().map(|m| m.waiting).sum();
                by_sum(view.asked, sum, self.target)
            }
        };
        self.normalize(view.now_s, view.asked, wish.max(1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// kubernetes/kubernetes, pkg/controller/podautoscaler/replica_calculator_test.go.
    #[test]
    fn upstreams_cases() {
        for (why, current, levels, target, want) in [
            (
                "TestReplicaCalcScaleUpCM",
                3,
                &[20_000.0, 10_000.0, 30_000.0][..],
                15_000.0,
                4,
            ),
            ("TestReplicaCalcScaleDownCM", 5, &[12_000.0; 5], 20_000.0, 3),
            (
                "TestReplicaCalcToleranceCM",
                3,
                &[20_000.0, 21_000.0, 21_000.0],
                20_000.0,
                3,
            ),
            (
                "TestReplicaCalcScaleUpCMUnreadyHotCpuNoLessScale",
                3,
                &[50_000.0, 10_000.0, 30_000.0],
                15_000.0,
                6,
            ),
        ] {
            assert_eq!(by_pods(current, levels, target), want, "{why}");
        }
        for (why, current, sum, target, want) in [
            (
                "TestReplicaCalcScaleUpPerPodCMExternal",
                3,
                8_600.0,
                2_150.0,
                4,
            ),
            (
                "TestReplicaCalcScaleDownPerPodCMExternal",
                5,
                8_600.0,
                2_867.0,
                3,
            ),
        ] {
            assert_eq!(by_sum(current, sum, target), want, "{why}");
        }
    }

    /// The same directory, horizontal_test.go: calculateScaleUpLimit with the default policies, and stabilization.
    #[test]
    fn up_by_four_or_as_many_again_and_down_by_the_largest_of_five_minutes() {
        for (current, want) in [(1, 5), (3, 7), (5, 10), (10, 20)] {
            let mut hpa = Hpa::on_kv_usage(0.8);
            assert_eq!(hpa.normalize(0.0, current, 1_000), want);
        }
        let mut hpa = Hpa::on_kv_usage(0.8);
        for (now_s, wish, want) in [(0.0, 10, 10), (15.0, 4, 10), (299.0, 4, 10), (301.0, 4, 4)] {
            assert_eq!(hpa.normalize(now_s, 10, wish), want, "{now_s}");
        }
    }
}
