//! The operator: observe, plan, apply. Only the first and the last touch the API server.

pub mod plan;
