//! The operator: observe, plan, apply. Only the first and the last touch the API server.
//!
//! Imports point one way: `observed`, `pod`, `stored` and `error` are leaves; `plan` reads them and nothing else;
//! `observe` and `apply` are the edges; `controller` calls all three.

pub mod apply;
pub mod cache;
pub mod controller;
pub mod error;
pub mod last_writes;
pub mod metrics;
pub mod observe;
pub mod observed;
pub mod plan;
pub mod pod;
pub mod stored;
