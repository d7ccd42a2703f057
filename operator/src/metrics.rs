//! The operator's metrics, all of them. Names are `kvasir_operator_...`, in base units.

use kube::ResourceExt;
use kvasir_crds::LLMDeployment;
use prometheus::{GaugeVec, IntCounter, IntGaugeVec, Opts, Registry, TextEncoder};

use crate::observe::Observed;
use crate::plan::Plan;

/// States of `kvasir_operator_replicas`.
const STATES: [&str; 3] = ["desired", "current", "ready"];

/// What the operator counts.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    replicas: IntGaugeVec,
    target: GaugeVec,
    reconciles: IntCounter,
    errors: IntCounter,
}

impl Metrics {
    /// Registers all of them.
    ///
    /// # Errors
    /// Never, in a fresh registry.
    pub fn new() -> prometheus::Result<Self> {
        let labels = &["namespace", "name"];
        let metrics = Self {
            registry: Registry::new(),
            replicas: IntGaugeVec::new(
                Opts::new(
                    "kvasir_operator_replicas",
                    "Replicas of an LLMDeployment by state.",
                ),
                &["namespace", "name", "state"],
            )?,
            target: GaugeVec::new(
                Opts::new(
                    "kvasir_operator_target_utilization_ratio",
                    "Block-pool utilization above which the autoscaler adds replicas.",
                ),
                labels,
            )?,
            reconciles: IntCounter::new(
                "kvasir_operator_reconciles_total",
                "Reconciles that ended well.",
            )?,
            errors: IntCounter::new(
                "kvasir_operator_reconcile_errors_total",
                "Reconciles that failed.",
            )?,
        };
        metrics
            .registry
            .register(Box::new(metrics.replicas.clone()))?;
        metrics
            .registry
            .register(Box::new(metrics.target.clone()))?;
        metrics
            .registry
            .register(Box::new(metrics.reconciles.clone()))?;
        metrics
            .registry
            .register(Box::new(metrics.errors.clone()))?;
        Ok(metrics)
    }

    /// Records a reconcile that ended well.
    pub fn reconciled(&self, deployment: &LLMDeployment, plan: &Plan, observed: &Observed) {
        self.reconciles.inc();
        let (namespace, name) = (
            deployment.namespace().unwrap_or_default(),
            deployment.name_any(),
        );
        let desired = plan
            .children
            .as_ref()
            .and_then(|c| c.deployment.spec.as_ref()?.replicas)
            .unwrap_or(0);
        let current = i64::try_from(observed.pods.len()).unwrap_or(i64::MAX);
        let ready = observed
            .pods
            .iter()
            .filter(|pod| crate::observe::is_ready(pod))
            .count();
        let ready = i64::try_from(ready).unwrap_or(i64::MAX);
        for (state, value) in STATES.iter().zip([i64::from(desired), current, ready]) {
            self.replicas
                .with_label_values(&[&namespace, &name, *state])
                .set(value);
        }
        if let Some(policy) = &deployment.spec.autoscaling {
            let target = f64::from(policy.target_block_utilization_percent.get()) / 100.0;
            self.target
                .with_label_values(&[&namespace, &name])
                .set(target);
        }
    }

    /// Drops the series of a deployment that is gone.
    pub fn forget(&self, namespace: &str, name: &str) {
        for state in STATES {
            // An error says that the series did not exist.
            let _ = self.replicas.remove_label_values(&[namespace, name, state]);
        }
        let _ = self.target.remove_label_values(&[namespace, name]);
    }

    /// Records a reconcile that failed.
    pub fn failed(&self) {
        self.errors.inc();
    }

    /// The text exposition format.
    ///
    /// # Errors
    /// What the encoder says.
    pub fn text(&self) -> prometheus::Result<String> {
        TextEncoder::new().encode_to_string(&self.registry.gather())
    }
}
