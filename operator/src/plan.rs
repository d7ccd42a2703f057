//! Decides, purely, what should change for one `LLMDeployment`: children, replicas, status, events.
//!
//! It knows no API server and no clock: what was observed, the history and the time are arguments.

pub mod autoscale;
