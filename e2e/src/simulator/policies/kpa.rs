//! Knative's pod autoscaler (knative/serving, pkg/autoscaler/scaling/autoscaler.go) on concurrency: a stable window of 60 s,
//! a panic window of 6 s, panic from twice the ready pods on, target utilization 0.7, up at most a thousandfold, down by at
//! most half at a time.

use super::timing::Samples;
use crate::simulator::policy::{Policy, View};

const STABLE_WINDOW_S: f64 = 60.0;
const PANIC_WINDOW_S: f64 = 6.0;
const TARGET_UTILIZATION: f64 = 0.7;

/// Its settings.
#[derive(Clone, Copy, Debug)]
struct Spec {
    target: f64,
    max_scale_up_rate: f64,
    max_scale_down_rate: f64,
    panic_threshold: f64,
}

/// Panics, or not, since when, and with how many pods.
#[derive(Clone, Copy, Debug)]
struct Decider {
    spec: Spec,
    panic_s: Option<f64>,
    max_panic_pods: f64,
}

impl Decider {
    fn scale(&mut self, now_s: f64, ready: f64, stable: f64, panic: f64) -> f64 {
        let ready = ready.max(1.0);
        let spec = self.spec;
        let most = (spec.max_scale_up_rate * ready).ceil();
        let least = (ready / spec.max_scale_down_rate).floor();
        let (by_stable, by_panic) = ((stable / spec.target).ceil(), (panic / spec.target).ceil());
        let (desired_stable, desired_panic) = (
            by_stable.max(least).min(most),
            by_panic.max(least).min(most),
        );
        let is_over = by_panic / ready >= spec.panic_threshold;
        match self.panic_s {
            _ if is_over => self.panic_s = Some(now_s),
            Some(since) if since + STABLE_WINDOW_S < now_s => {
                self.panic_s = None;
                self.max_panic_pods = 0.0;
            }
            Some(_) | None => {}
        }
        if self.panic_s.is_none() {
            return desired_stable;
        }
        self.max_panic_pods = self.max_panic_pods.max(desired_stable).max(desired_panic);
        self.max_panic_pods
    }
}

/// The autoscaler.
#[derive(Clone, Debug)]
pub struct Kpa {
    concurrency: f64,
    decider: Decider,
    samples: Samples,
}

impl Kpa {
    /// With this many requests in a pod as the limit that the target is taken from.
    #[must_use]
    pub fn new(concurrency: f64) -> Self {
        let spec = Spec {
            target: concurrency * TARGET_UTILIZATION,
            max_scale_up_rate: 1_000.0,
            max_scale_down_rate: 2.0,
            panic_threshold: 2.0,
        };
        Self {
            concurrency,
            decider: Decider {
                spec,
                panic_s: None,
                max_panic_pods: 0.0,
            },
            samples: Samples::default(),
        }
    }
}

impl Policy for Kpa {
    fn name(&self) -> String {
        format!("KPA, concurrency {}", self.concurrency)
    }

    fn desired(&mut self, view: &View<'_>) -> u32 {
        let serving = view.serving();
        let concurrency = serving.iter().map(|m| m.running + m.waiting).sum();
        self.samples.push(view.now_s, concurrency, STABLE_WINDOW_S);
        let stable = self.samples.mean(view.now_s, STABLE_WINDOW_S);
        let panic = self.samples.mean(view.now_s, PANIC_WINDOW_S);
        let ready = serving.len() as f64;
        self.decider
            .scale(view.now_s, ready, stable, panic)
            .max(1.0) as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decider(target: f64) -> Decider {
        // newTestAutoscaler: MaxScaleUpRate 10, MaxScaleDownRate 10, PanicThreshold 2.
        Decider {
            spec: Spec {
                target,
                max_scale_up_rate: 10.0,
                max_scale_down_rate: 10.0,
                panic_threshold: 2.0,
            },
            panic_s: None,
            max_panic_pods: 0.0,
        }
    }

    /// knative/serving, pkg/autoscaler/scaling/autoscaler_test.go.
    #[test]
    fn upstreams_cases() {
        let mut increase = decider(10.0);
        assert_eq!(increase.scale(0.0, 1.0, 50.0, 10.0), 5.0);
        assert_eq!(increase.scale(0.0, 1.0, 100.0, 10.0), 10.0);

        let mut decrease = decider(10.0);
        assert_eq!(decrease.scale(0.0, 8.0, 100.0, 100.0), 10.0);
        assert_eq!(decrease.scale(0.0, 8.0, 50.0, 50.0), 5.0);

        let mut idle = decider(10.0);
        assert_eq!(idle.scale(0.0, 1.0, 1.0, 0.0), 1.0);
        assert_eq!(idle.scale(0.0, 1.0, 0.0, 0.0), 0.0);

        // TestAutoscalerUnpanicAfterSlowIncrease.
        let mut slow = decider(1.0);
        assert_eq!(slow.scale(0.0, 10.0, 11.0, 25.0), 25.0);
        assert_eq!(slow.scale(30.0, 40.0, 30.0, 41.0), 41.0);
        assert_eq!(slow.panic_s, Some(0.0), "it has not moved");
        assert_eq!(
            slow.scale(62.0, 55.0, 50.0, 56.0),
            50.0,
            "no longer in panic"
        );

        // TestAutoscalerExtendPanicWindow.
        let mut extended = decider(1.0);
        assert_eq!(extended.scale(0.0, 10.0, 11.0, 25.0), 25.0);
        assert_eq!(extended.scale(30.0, 40.0, 30.0, 80.0), 80.0);
        assert_eq!(extended.panic_s, Some(30.0));
    }
}
