//! The operator of `LLMDeployment`s.

fn main() {}
