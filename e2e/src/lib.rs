//! A real Kubernetes cluster on one bare machine, and what is done with it: the quickstart that the
//! README opens with, and the end-to-end tests.
//!
//! It drives the project from outside, through the programs that users have (kubectl, helm, an
//! OpenAI client), and knows nothing of the inside of the server or the operator; only the [`simulator`]
//! calls the operator's autoscaler, as the operator does.

pub mod access;
pub mod chat;
pub mod cluster;
pub mod command;
pub mod error;
pub mod image;
pub mod progress;
pub mod quickstart;
pub mod simulator;
pub mod toolchain;
pub mod wait;

pub use error::Error;
