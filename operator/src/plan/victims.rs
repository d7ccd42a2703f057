//! Which replicas go first when there are to be fewer: those that hold the fewest tokens. Kubernetes chooses the pods, and
//! among those that serve it takes the one that costs least (`controller.kubernetes.io/pod-deletion-cost`). Pure.

use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt;
use kvasir_crds::LoadReport;

use crate::observed::{Observed, ReplicaLoad};

/// The annotation by which a pod tells what its deletion costs.
pub const DELETION_COST: &str = "controller.kubernetes.io/pod-deletion-cost";

/// What a pod is to be told to cost.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeletionCost {
    /// The pod's name.
    pub pod: String,
    /// Tokens that its sequences hold and wait for.
    pub tokens: i32,
}

/// The costs that the pods don't carry yet. One that is silent may be as busy as can be.
#[must_use]
pub fn deletion_costs(observed: &Observed) -> Vec<DeletionCost> {
    let costs = observed.loads_by_pod().filter_map(|(pod, load)| {
        let tokens = match load {
            ReplicaLoad::Reported(report) => tokens(report),
            ReplicaLoad::Silent => i32::MAX,
        };
        (cost_of(pod) != Some(tokens)).then(|| DeletionCost {
            pod: pod.name_any(),
            tokens,
        })
    });
    costs.collect()
}

fn cost_of(pod: &Pod) -> Option<i32> {
    pod.annotations().get(DELETION_COST)?.parse().ok()
}

fn tokens(report: &LoadReport) -> i32 {
    let Some(blocks) = report.blocks else {
        return i32::MAX;
    };
    let held = blocks.active.saturating_add(blocks.waiting_need);
    let tokens = held.saturating_mul(u64::from(blocks.block_size.max(1)));
    i32::try_from(tokens).unwrap_or(i32::MAX)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use kvasir_crds::load_report::BlockCounts;
    use serde_json::json;

    use super::*;

    #[test]
    fn a_replica_costs_the_tokens_that_it_holds() {
        let pod = |name: &str, cost: Option<&str>| {
            let annotations = cost.map(|cost| json!({ DELETION_COST: cost }));
            let pod = json!({ "metadata": { "name": name, "annotations": annotations },
                "status": { "podIP": "10.0.0.1", "containerStatuses": [{ "name": "server", "ready": true,
                    "started": true, "image": "i", "imageID": "", "restartCount": 0 }] } });
            Arc::new(serde_json::from_value::<Pod>(pod).unwrap())
        };
        let load = |active, waiting_need| {
            ReplicaLoad::Reported(LoadReport {
                blocks: Some(BlockCounts {
                    block_size: 16,
                    active,
                    waiting_need,
                    ..BlockCounts::default()
                }),
                ..LoadReport::default()
            })
        };
        let observed = Observed {
            pods: vec![
                pod("busy", None),
                pod("idle", Some("3")),
                pod("hung", None),
                pod("known", Some("32")),
                pod("elder", None),
                pod("nonsense", Some("x")),
            ],
            loads: vec![
                load(5, 2),
                load(0, 0),
                ReplicaLoad::Silent,
                load(2, 0),
                ReplicaLoad::Reported(LoadReport::default()),
                load(u64::MAX, 1),
            ],
            ..Observed::default()
        };
        let found = deletion_costs(&observed);
        let found: Vec<_> = found
            .iter()
            .map(|it| (it.pod.as_str(), it.tokens))
            .collect();
        assert_eq!(
            found,
            [
                ("busy", 112),
                ("idle", 0),
                ("hung", i32::MAX),
                ("elder", i32::MAX),
                ("nonsense", i32::MAX),
            ],
            "what is known is not written again"
        );
    }
}
