//! AIBrix' application pod autoscaler (vllm-project/aibrix, pkg/controller/podautoscaler/algorithm/apa.go) on KV usage: a
//! tenth of tolerance both ways, up to twice and down to half as many, over a stable window of 180 s and a panic window of
//! 60 s, and no way down for 300 s after a change.

use super::timing::{Interval, Samples};
use crate::simulator::policy::{Policy, View};

const UP_WINDOW_S: f64 = 60.0;
const DOWN_WINDOW_S: f64 = 180.0;
const DOWN_COOLDOWN_S: f64 = 300.0;
const INTERVAL_S: f64 = 10.0;

#[derive(Clone, Copy, Debug)]
struct Rates {
    tolerance: f64,
    up: f64,
    down: f64,
}

/// computeTargetReplicas.
fn target_replicas(current: f64, used: f64, target: f64, rates: Rates) -> u32 {
    let ratio = used / target;
    if ratio > 1.0 + rates.tolerance {
        (current * ratio).ceil().min((rates.up * current).ceil()) as u32
    } else if ratio < 1.0 - rates.tolerance {
        (current * ratio).ceil().max((current / rates.down).floor()) as u32
    } else {
        current as u32
    }
}

/// The autoscaler.
#[derive(Clone, Debug)]
pub struct Apa {
    target: f64,
    samples: Samples,
    interval: Interval,
    changed_s: f64,
}

impl Apa {
    /// With this part of the KV cache as the target.
    #[must_use]
    pub fn new(target: f64) -> Self {
        Self {
            target,
            samples: Samples::default(),
            interval: Interval::every(INTERVAL_S),
            changed_s: f64::NEG_INFINITY,
        }
    }
}

impl Policy for Apa {
    fn name(&self) -> String {
        format!("AIBrix APA, KV {:.0} %", self.target * 100.0)
    }

    fn desired(&mut self, view: &View<'_>) -> u32 {
        let serving = view.serving();
        let n = serving.len().max(1) as f64;
        let used = serving.iter().map(|m| m.kv_usage).sum::<f64>() / n;
        self.samples.push(view.now_s, used, DOWN_WINDOW_S);
        if !self.interval.is_due(view.now_s) {
            return view.asked;
        }
        let rates = Rates {
            tolerance: 0.1,
            up: 2.0,
            down: 2.0,
        };
        let wish = |window_s| {
            let used = self.samples.mean(view.now_s, window_s);
            target_replicas(f64::from(view.asked), used, self.target, rates)
        };
        let (up, down) = (wish(UP_WINDOW_S), wish(DOWN_WINDOW_S));
        let may_go_down = view.now_s - self.changed_s >= DOWN_COOLDOWN_S;
        let desired = match () {
            () if up > view.asked => up,
            () if down < view.asked && up < view.asked && may_go_down => down.max(up).max(1),
            () => view.asked,
        };
        if desired != view.asked {
            self.changed_s = view.now_s;
        }
        desired
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// vllm-project/aibrix, pkg/controller/podautoscaler/algorithm/apa_test.go.
    #[test]
    fn upstreams_cases() {
        for (why, current, used, up, down, want) in [
            ("basic_scale_up", 2.0, 45.0, 2.0, 2.0, 3),
            ("scale_up_upto_ceiling", 2.0, 35.0, 2.0, 2.0, 3),
            ("scale_up_upto_max_scale_up", 2.0, 90.0, 2.0, 2.0, 4),
            ("scale_up_upto_max_scale_up_ceiling", 2.0, 90.0, 2.5, 2.0, 5),
            ("basic_scale_down", 6.0, 20.0, 2.0, 2.0, 4),
            ("scale_down_upto_ceiling", 6.0, 18.0, 2.0, 2.0, 4),
            ("scale_down_upto_max_scale_down", 6.0, 10.0, 2.0, 2.0, 3),
            (
                "scale_down_upto_max_scale_down_floor",
                6.0,
                5.0,
                2.0,
                2.5,
                2,
            ),
            ("no_scaling_as_within_up_tolerance", 2.0, 33.0, 2.0, 2.0, 2),
            (
                "no_scaling_as_within_down_tolerance",
                2.0,
                27.0,
                2.0,
                2.0,
                2,
            ),
        ] {
            let rates = Rates {
                tolerance: 0.1,
                up,
                down,
            };
            assert_eq!(target_replicas(current, used, 30.0, rates), want, "{why}");
        }
    }
}
