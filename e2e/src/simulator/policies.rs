//! The policies that are compared: our own function, models of the peers, and two that know what nobody can.

pub mod apa;
pub mod dynamo;
pub mod hpa;
pub mod known;
pub mod kpa;
pub mod kvasir;
mod timing;
pub mod wva;

use super::policy::Policy;

/// The peers at their defaults, and at other settings that their users publish.
#[must_use]
pub fn peers(slots: u32) -> Vec<Box<dyn Policy>> {
    vec![
        Box::new(hpa::Hpa::on_kv_usage(0.8)),
        Box::new(hpa::Hpa::on_kv_usage(0.5)),
        Box::new(hpa::Hpa::keda_on_waiting(5.0)),
        Box::new(hpa::Hpa::keda_on_waiting(1.0)),
        Box::new(kpa::Kpa::new(100.0)),
        Box::new(kpa::Kpa::new(f64::from(slots) / 8.0)),
        Box::new(wva::Saturation::default()),
        Box::new(wva::TokenCapacity::default()),
        Box::new(apa::Apa::new(0.8)),
        Box::new(apa::Apa::new(0.5)),
        Box::new(dynamo::Planner::throughput()),
        Box::new(dynamo::Planner::latency()),
    ]
}
