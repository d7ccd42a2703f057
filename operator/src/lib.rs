//! The operator: observe, plan, apply. Only the first and the last touch the API server.

pub mod apply;
pub mod cache;
pub mod controller;
pub mod metrics;
pub mod observe;
pub mod plan;
pub mod pod;
pub mod stored;
