//! The operator's own function, as it runs in the operator.

use std::time::Duration;

use kvasir_crds::llmdeployment::Autoscaling;
use kvasir_operator::observed::ReplicaLoad;
use kvasir_operator::plan::autoscale::{History, Look, decide};

use crate::simulator::policy::{Policy, View};

/// The operator with a policy.
#[derive(Debug)]
pub struct Kvasir {
    policy: Autoscaling,
    history: History,
    /// Each change, and why.
    pub reasons: Vec<(f64, String)>,
}

impl Kvasir {
    /// With the defaults that ship.
    ///
    /// # Errors
    /// Never: the defaults are complete.
    pub fn shipped(most: u32) -> Result<Self, serde_json::Error> {
        let policy = serde_json::from_value(serde_json::json!({ "maxReplicas": most }))?;
        Ok(Self::new(policy))
    }

    /// With this policy.
    #[must_use]
    pub fn new(policy: Autoscaling) -> Self {
        Self {
            policy,
            history: History::default(),
            reasons: Vec::new(),
        }
    }
}

impl Policy for Kvasir {
    fn name(&self) -> String {
        "Kvasir".into()
    }

    fn desired(&mut self, view: &View<'_>) -> u32 {
        for took in view.started_s {
            self.history.note_start(Duration::from_secs_f64(*took));
        }
        let reports = view.reports.iter().cloned();
        let loads: Vec<ReplicaLoad> = reports.map(ReplicaLoad::Reported).collect();
        let ages = view
            .starting_s
            .iter()
            .map(|age| Duration::from_secs_f64(*age));
        let starting: Vec<Duration> = ages.collect();
        let look = Look {
            current: view.asked,
            loads: &loads,
            starting: &starting,
            now: Duration::from_secs_f64(view.now_s),
        };
        let decision = decide(&self.policy, &look, &mut self.history);
        if decision.replicas != view.asked {
            self.reasons.push((view.now_s, decision.reason));
        }
        decision.replicas
    }
}
