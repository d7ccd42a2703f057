//! The operator's metrics, all of them. Names are `kvasir_operator_...`, in base units.

use std::sync::Arc;

use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt;
use kvasir_crds::llmdeployment::{LLMDeploymentStatus, Reason, StartTimes};
use prometheus::{
    GaugeVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry, TextEncoder,
};

use crate::error::Error;
use crate::plan::autoscale::demand::Constraint;
use crate::plan::autoscale::{Decision, LoadSummary};
use crate::pod;
use crate::stored::Stored;

/// States of `kvasir_operator_replicas`.
const STATES: [&str; 3] = ["desired", "current", "ready"];

/// What one look at a deployment found.
#[derive(Clone, Copy, Debug)]
pub struct Figures<'a> {
    /// Replicas that are asked for.
    pub desired: i32,
    /// What the replicas report; `None` where none does.
    pub load: Option<LoadSummary>,
    /// The reason of the condition Accepted, where it is False.
    pub refused: Option<Reason>,
    /// What the autoscaler decided, carried out or not; `None` where there is none.
    pub decision: Option<&'a Decision>,
    /// Its pods.
    pub pods: &'a [Arc<Pod>],
    /// What is told of it.
    pub status: Option<&'a LLMDeploymentStatus>,
}

/// Why replicas don't serve, and how long it takes until they do.
#[derive(Debug)]
struct NotReadyMetrics {
    replicas: IntGaugeVec,
    start: GaugeVec,
}

impl NotReadyMetrics {
    fn new(registry: &Registry) -> prometheus::Result<Self> {
        let replicas = IntGaugeVec::new(
            Opts::new(
                "kvasir_operator_not_ready_replicas",
                "Replicas that don't serve, by the reason; of the first ten of a deployment.",
            ),
            &["namespace", "name", "reason"],
        )?;
        let start = GaugeVec::new(
            Opts::new(
                "kvasir_operator_start_seconds",
                "How long the replicas that serve took to start, by phase; percentiles over the replicas.",
            ),
            &["namespace", "name", "phase", "percentile"],
        )?;
        registry.register(Box::new(replicas.clone()))?;
        registry.register(Box::new(start.clone()))?;
        Ok(Self { replicas, start })
    }

    /// Takes over what a status says, and nothing else stays; `None`: the deployment is gone.
    fn looked(&self, [namespace, name]: [&str; 2], status: Option<&LLMDeploymentStatus>) {
        for reason in Reason::ALL {
            // An error says that the series did not exist.
            let _ = self
                .replicas
                .remove_label_values(&[namespace, name, reason.as_str()]);
        }
        for phase in StartTimes::PHASES {
            for percentile in ["50", "90"] {
                let _ = self
                    .start
                    .remove_label_values(&[namespace, name, phase, percentile]);
            }
        }
        let Some(status) = status else { return };
        for replica in &status.not_ready {
            let labels = [namespace, name, replica.reason.as_str()];
            self.replicas.with_label_values(&labels).inc();
        }
        for times in status.start.iter().flat_map(|start| &start.phases) {
            for (percentile, ms) in [
                ("50", times.p50_milliseconds),
                ("90", times.p90_milliseconds),
            ] {
                let labels = [namespace, name, times.phase.as_str(), percentile];
                self.start.with_label_values(&labels).set(ms as f64 / 1e3);
            }
        }
    }
}

/// What the operator counts.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    replicas: IntGaugeVec,
    target: GaugeVec,
    utilization: GaugeVec,
    waiting: IntGaugeVec,
    refused: IntGaugeVec,
    autoscaling: AutoscalingMetrics,
    not_ready: NotReadyMetrics,
    leading: IntGauge,
    reconciles: IntCounter,
    errors: IntCounterVec,
}

impl Metrics {
    /// Registers all of them.
    ///
    /// # Errors
    /// Never, in a fresh registry.
    pub fn new() -> prometheus::Result<Self> {
        let registry = Registry::new();
        let of_deployment = |name: &str, help: &str| -> prometheus::Result<GaugeVec> {
            let gauge = GaugeVec::new(Opts::new(name, help), &["namespace", "name"])?;
            registry.register(Box::new(gauge.clone()))?;
            Ok(gauge)
        };
        let counts = |name: &str, help: &str, labels: &[&str]| -> prometheus::Result<IntGaugeVec> {
            let gauge = IntGaugeVec::new(Opts::new(name, help), labels)?;
            registry.register(Box::new(gauge.clone()))?;
            Ok(gauge)
        };
        let replicas = counts(
            "kvasir_operator_replicas",
            "Replicas of an LLMDeployment by state.",
            &["namespace", "name", "state"],
        )?;
        let target = of_deployment(
            "kvasir_operator_target_utilization_ratio",
            "Block-pool utilization above which the autoscaler adds replicas.",
        )?;
        let utilization = of_deployment(
            "kvasir_operator_block_utilization_ratio",
            "KV blocks held by sequences, of those in the replicas that report.",
        )?;
        let waiting = counts(
            "kvasir_operator_waiting_requests",
            "Requests that wait in the replicas that report.",
            &["namespace", "name"],
        )?;
        let refused = counts(
            "kvasir_operator_refused",
            "1 while an LLMDeployment is refused as a whole or in part, with the reason of its condition Accepted.",
            &["namespace", "name", "reason"],
        )?;
        let autoscaling = AutoscalingMetrics::new(counts)?;
        let not_ready = NotReadyMetrics::new(&registry)?;
        let leading = IntGauge::new(
            "kvasir_operator_leading",
            "1 in the operator that acts, 0 in those that stand by.",
        )?;
        registry.register(Box::new(leading.clone()))?;
        let reconciles = IntCounter::new(
            "kvasir_operator_reconciles_total",
            "Reconciles that ended well.",
        )?;
        registry.register(Box::new(reconciles.clone()))?;
        let errors = IntCounterVec::new(
            Opts::new(
                "kvasir_operator_reconcile_errors_total",
                "Reconciles that failed, by the step that did.",
            ),
            &["step"],
        )?;
        registry.register(Box::new(errors.clone()))?;
        // A series that begins with its first error hides that error from a rate.
        for step in Error::STEPS {
            errors.with_label_values(&[step]);
        }
        Ok(Self {
            registry,
            replicas,
            target,
            utilization,
            waiting,
            refused,
            autoscaling,
            not_ready,
            leading,
            reconciles,
            errors,
        })
    }

    /// Records a reconcile that ended well.
    pub fn reconciled(&self) {
        self.reconciles.inc();
    }

    /// Records whether this operator acts.
    pub fn leads(&self, leads: bool) {
        self.leading.set(leads.into());
        if !leads {
            // Another one's from here on.
            for gauges in [&self.replicas, &self.waiting, &self.refused] {
                gauges.reset();
            }
            for gauges in [&self.target, &self.utilization] {
                gauges.reset();
            }
            self.autoscaling.reset();
            self.not_ready.replicas.reset();
            self.not_ready.start.reset();
        }
    }

    /// Records what a look at a deployment found.
    pub fn looked(&self, deployment: &Stored, figures: &Figures<'_>) {
        let (namespace, name) = (
            deployment.namespace().unwrap_or_default(),
            deployment.name_any(),
        );
        let count = |n: usize| i64::try_from(n).unwrap_or(i64::MAX);
        let pods = || pod::replicas(figures.pods);
        let (current, ready) = (
            pods().count(),
            pods().filter(|pod| pod::is_ready(pod)).count(),
        );
        let counts = [i64::from(figures.desired), count(current), count(ready)];
        for (state, value) in STATES.iter().zip(counts) {
            self.replicas
                .with_label_values(&[&namespace, &name, *state])
                .set(value);
        }
        self.not_ready.looked([&namespace, &name], figures.status);
        self.forget_refusals(&namespace, &name);
        if let Some(reason) = figures.refused {
            let labels = &[namespace.as_str(), name.as_str(), reason.as_str()];
            self.refused.with_label_values(labels).set(1);
        }
        let labels = &[namespace.as_str(), name.as_str()];
        // What isn't known has no series: a 0 would read as a measurement. A removal fails where there was none.
        let policy = deployment.spec().and_then(|spec| spec.autoscaling.as_ref());
        match policy {
            Some(policy) => {
                let target = f64::from(policy.target_block_utilization_percent.get()) / 100.0;
                self.target.with_label_values(labels).set(target);
            }
            None => drop(self.target.remove_label_values(labels)),
        }
        self.autoscaling.forget(labels);
        if let Some(decision) = figures.decision {
            self.autoscaling.decided(labels, decision);
        }
        match figures.load {
            Some(load) => {
                let ratio = load.active_blocks as f64 / load.blocks.max(1) as f64;
                self.utilization.with_label_values(labels).set(ratio);
                let waiting = i64::try_from(load.waiting_requests).unwrap_or(i64::MAX);
                self.waiting.with_label_values(labels).set(waiting);
            }
            None => self.forget_load(labels),
        }
    }

    fn forget_load(&self, labels: &[&str; 2]) {
        let _ = self.utilization.remove_label_values(labels);
        let _ = self.waiting.remove_label_values(labels);
    }

    fn forget_refusals(&self, namespace: &str, name: &str) {
        for reason in Reason::REFUSALS {
            let labels = &[namespace, name, reason.as_str()];
            let _ = self.refused.remove_label_values(labels);
        }
    }

    /// Drops the series of a deployment that is gone.
    pub fn forget(&self, namespace: &str, name: &str) {
        for state in STATES {
            // An error says that the series did not exist.
            let _ = self.replicas.remove_label_values(&[namespace, name, state]);
        }
        let _ = self.target.remove_label_values(&[namespace, name]);
        self.forget_refusals(namespace, name);
        self.forget_load(&[namespace, name]);
        self.autoscaling.forget(&[namespace, name]);
        self.not_ready.looked([namespace, name], None);
    }

    /// Records a reconcile that failed.
    pub fn failed(&self, error: &Error) {
        self.errors.with_label_values(&[error.step()]).inc();
    }

    /// The text exposition format.
    ///
    /// # Errors
    /// What the encoder says.
    pub fn text(&self) -> prometheus::Result<String> {
        TextEncoder::new().encode_to_string(&self.registry.gather())
    }
}

/// What the autoscaler sees and decides.
#[derive(Debug)]
struct AutoscalingMetrics {
    desired: IntGaugeVec,
    demand: IntGaugeVec,
    unmet: IntGaugeVec,
    silent: IntGaugeVec,
    binding: IntGaugeVec,
}

impl AutoscalingMetrics {
    fn new(
        counts: impl Fn(&str, &str, &[&str]) -> prometheus::Result<IntGaugeVec>,
    ) -> prometheus::Result<Self> {
        let of_deployment = &["namespace", "name"];
        Ok(Self {
            desired: counts(
                "kvasir_operator_autoscaler_replicas",
                "Replicas that the autoscaler sets, or in mode Observe would set.",
                of_deployment,
            )?,
            demand: counts(
                "kvasir_operator_demand_replicas",
                "Replicas that the load is work for, whatever minReplicas and maxReplicas allow.",
                of_deployment,
            )?,
            unmet: counts(
                "kvasir_operator_unmet_replicas",
                "Replicas that the load needs and that neither serve nor start in time.",
                of_deployment,
            )?,
            silent: counts(
                "kvasir_operator_silent_replicas",
                "Replicas that have started and don't report their load.",
                of_deployment,
            )?,
            binding: counts(
                "kvasir_operator_binding_constraint",
                "1 for what asks for the most replicas.",
                &["namespace", "name", "constraint"],
            )?,
        })
    }

    fn plain(&self) -> [&IntGaugeVec; 4] {
        let Self {
            desired,
            demand,
            unmet,
            silent,
            binding: _,
        } = self;
        [desired, demand, unmet, silent]
    }

    fn decided(&self, labels: &[&str; 2], decision: &Decision) {
        let set = |gauge: &IntGaugeVec, n: u32| gauge.with_label_values(labels).set(n.into());
        set(&self.desired, decision.replicas);
        set(&self.silent, decision.silent);
        // Where no replica reports, the demand isn't known.
        if decision.demand > 0 {
            set(&self.demand, decision.demand);
            set(&self.unmet, decision.unmet);
        }
        if let Some(constraint) = decision.constraint {
            let labels = &[labels[0], labels[1], constraint.as_str()];
            self.binding.with_label_values(labels).set(1);
        }
    }

    /// An error says that the series did not exist.
    fn forget(&self, labels: &[&str; 2]) {
        for gauge in self.plain() {
            let _ = gauge.remove_label_values(labels);
        }
        for constraint in Constraint::ALL {
            let labels = &[labels[0], labels[1], constraint.as_str()];
            let _ = self.binding.remove_label_values(labels);
        }
    }

    fn reset(&self) {
        for gauge in self.plain() {
            gauge.reset();
        }
        self.binding.reset();
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn unknown_load_has_no_series_and_a_deployment_that_is_gone_none_at_all() {
        let metrics = Metrics::new().unwrap();
        let deployment: Stored = serde_json::from_value(json!({
            "metadata": { "name": "m", "namespace": "n" },
            "spec": { "model": { "source": { "demo": {} } }, "replicas": 1 }
        }))
        .unwrap();
        let found = |load| Figures {
            desired: 1,
            load,
            refused: None,
            decision: None,
            pods: &[],
            status: None,
        };
        let known = found(Some(LoadSummary {
            blocks: 200,
            active_blocks: 50,
            waiting_requests: 3,
        }));
        let holds = |words: &str| metrics.text().unwrap().contains(words);
        metrics.looked(&deployment, &known);
        let ratio = "kvasir_operator_block_utilization_ratio{name=\"m\",namespace=\"n\"} 0.25";
        let waiting = "kvasir_operator_waiting_requests{name=\"m\",namespace=\"n\"} 3";
        assert!(
            holds(ratio) && holds(waiting),
            "{}",
            metrics.text().unwrap()
        );
        metrics.looked(&deployment, &found(None));
        assert!(!holds("utilization_ratio{") && !holds("waiting_requests{"));
        let refused = |reason| Figures {
            refused: Some(reason),
            ..known
        };
        let series = |reason: &str| {
            format!("kvasir_operator_refused{{name=\"m\",namespace=\"n\",reason=\"{reason}\"}} 1")
        };
        for reason in Reason::REFUSALS {
            metrics.looked(&deployment, &refused(reason));
            assert!(holds(&series(reason.as_str())));
        }
        assert_eq!(
            metrics
                .text()
                .unwrap()
                .matches("kvasir_operator_refused{")
                .count(),
            1,
            "one reason at a time"
        );
        let decision = Decision {
            replicas: 3,
            demand: 5,
            constraint: Some(Constraint::Slots),
            unmet: 2,
            silent: 1,
            ..Decision::default()
        };
        let decided = Figures {
            decision: Some(&decision),
            ..known
        };
        metrics.looked(&deployment, &decided);
        for series in [
            "autoscaler_replicas{name=\"m\",namespace=\"n\"} 3",
            "demand_replicas{name=\"m\",namespace=\"n\"} 5",
            "unmet_replicas{name=\"m\",namespace=\"n\"} 2",
            "silent_replicas{name=\"m\",namespace=\"n\"} 1",
            "binding_constraint{constraint=\"Slots\",name=\"m\",namespace=\"n\"} 1",
        ] {
            assert!(holds(&format!("kvasir_operator_{series}")), "{series}");
        }
        let unknown = Figures {
            decision: Some(&Decision::default()),
            ..known
        };
        metrics.looked(&deployment, &unknown);
        assert!(!holds("demand_replicas{") && !holds("binding_constraint{"));
        let status: LLMDeploymentStatus = serde_json::from_value(json!({
            "notReady": [{ "reason": "Crashed", "message": "x" }, { "reason": "Crashed", "message": "y" }],
            "start": { "samples": 1, "phases": [
                { "phase": "Load", "p50Milliseconds": 1500, "p90Milliseconds": 2500 }] } }))
        .unwrap();
        metrics.looked(
            &deployment,
            &Figures {
                status: Some(&status),
                ..known
            },
        );
        let crashed =
            "kvasir_operator_not_ready_replicas{name=\"m\",namespace=\"n\",reason=\"Crashed\"} 2";
        let start = "kvasir_operator_start_seconds{name=\"m\",namespace=\"n\",percentile=\"90\",phase=\"Load\"} 2.5";
        assert!(
            holds(crashed) && holds(start),
            "{}",
            metrics.text().unwrap()
        );
        metrics.looked(&deployment, &known);
        assert!(!holds("not_ready_replicas{") && !holds("start_seconds{"));
        metrics.forget("n", "m");
        assert!(!holds("name=\"m\""));
        metrics.looked(&deployment, &refused(Reason::ChildRefused));
        metrics.leads(false);
        assert!(
            !holds("name=\"m\""),
            "they are told by the operator that acts"
        );
        assert!(holds("kvasir_operator_leading 0"));
    }
}
