//! The operator: observe, plan, apply, and report what came of it. Planning and reporting are pure.
//!
//! Imports point one way: `observed`, `pod`, `stored` and `error` are leaves; `plan` reads them and nothing else;
//! `observe` and `apply` are the edges; `controller` calls all three.

pub mod api_server;
pub mod apply;
pub mod asked;
pub mod cache;
pub mod controller;
pub mod error;
#[cfg(test)]
mod fake_api;
pub mod health;
pub mod key;
pub mod last_writes;
pub mod lease;
pub mod metrics;
pub mod observe;
pub mod observed;
pub mod plan;
pub mod pod;
pub mod stored;
