//! Dynamo's planner (ai-dynamo/dynamo, components/src/dynamo/planner/core/load_scaling.py), its load loop for aggregated
//! workers without a performance model: every 5 seconds, one more where any worker's KV with its queue is above a
//! threshold, one less where all are below another, nothing while a change is under way.

use super::timing::Interval;
use crate::simulator::policy::{Policy, View};

const INTERVAL_S: f64 = 5.0;

/// The planner.
#[derive(Clone, Copy, Debug)]
pub struct Planner {
    name: &'static str,
    up: f64,
    down: f64,
    interval: Interval,
}

impl Planner {
    /// `optimization_target: throughput`.
    #[must_use]
    pub fn throughput() -> Self {
        Self {
            name: "Dynamo, throughput",
            up: 1.0,
            down: 0.6,
            interval: Interval::every(INTERVAL_S),
        }
    }

    /// `optimization_target: latency`.
    #[must_use]
    pub fn latency() -> Self {
        Self {
            name: "Dynamo, latency",
            up: 0.4,
            down: 0.1,
            interval: Interval::every(INTERVAL_S),
        }
    }

    /// `_agg_easy_decision`.
    fn decision(&self, used: &[f64], workers: u32) -> u32 {
        match () {
            () if used.is_empty() => workers,
            () if used.iter().any(|used| *used > self.up) => workers + 1,
            () if workers > 1 && used.iter().all(|used| *used < self.down) => workers - 1,
            () => workers,
        }
    }
}

impl Policy for Planner {
    fn name(&self) -> String {
        self.name.into()
    }

    fn desired(&mut self, view: &View<'_>) -> u32 {
        if !self.interval.is_due(view.now_s) {
            return view.asked;
        }
        let serving = view.serving();
        // A change is under way, or the workers that report are not those that are asked for.
        if serving.len() as u32 != view.asked {
            return view.asked;
        }
        let used = serving
            .iter()
            .map(|m| (m.active + m.waiting_need) / m.blocks);
        self.decision(&used.collect::<Vec<f64>>(), view.asked)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The thresholds of load_scaling.py, above, between and below.
    #[test]
    fn one_up_where_any_is_above_and_one_down_where_all_are_below() {
        let (throughput, latency) = (Planner::throughput(), Planner::latency());
        for (why, planner, used, workers, want) in [
            ("one is above", throughput, &[0.2, 1.1][..], 2, 3),
            ("at the threshold", throughput, &[1.0, 1.0], 2, 2),
            ("all below", throughput, &[0.59, 0.1], 2, 1),
            ("one is not below", throughput, &[0.6, 0.1], 2, 2),
            ("the last stays", throughput, &[0.0], 1, 1),
            ("no data", throughput, &[], 3, 3),
            ("latency: above", latency, &[0.41], 1, 2),
            ("latency: between", latency, &[0.3, 0.05], 2, 2),
            ("latency: below", latency, &[0.09, 0.05], 2, 1),
        ] {
            assert_eq!(planner.decision(used, workers), want, "{why}");
        }
    }
}
