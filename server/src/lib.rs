//! The model server: an engine over a paged KV cache, behind an OpenAI-compatible API.
//!
//! The engine knows token ids, never text; HTTP knows text and events, never blocks.

pub mod access;
pub mod args;
pub mod engine;
pub mod frontend;
pub mod grammar;
pub mod http;
pub mod hub;
pub mod lifecycle;
pub mod metrics;
pub mod model;

pub mod startup;
pub mod text;
