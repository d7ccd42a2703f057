//! The contract between the parts: what a user declares (`LLMDeployment`) and what a replica reports
//! ([`LoadReport`]). It knows neither the server's engine nor the operator's decisions.

pub mod load_report;

pub use load_report::LoadReport;
