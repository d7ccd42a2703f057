//! The contract between the parts: what a user declares ([`LLMDeployment`], behind the feature `resources`) and
//! what a replica reports ([`LoadReport`]). It knows neither the server's engine nor the operator's decisions.

#[cfg(feature = "resources")]
pub mod llmdeployment;
pub mod load_report;

#[cfg(feature = "resources")]
pub use llmdeployment::LLMDeployment;
pub use load_report::LoadReport;
