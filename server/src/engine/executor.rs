//! What the engine needs of a model on a device: start a step, sample from it, and wait for the oldest one under way.
//!
//! It knows no requests and no scheduling. The type is asynchronous so that a device may run one step ahead of the
//! host: with depth 2 the engine submits a step before it has seen the tokens of the one before, and a row of the
//! new step takes as input "what row r sampled" ([`TokenInput::Sampled`](kvasir_kernels::step::TokenInput)).

use kvasir_kernels::device::{DeviceError, Ticket};
use kvasir_kernels::step::{DeviceOutput, LogitsRow, StepInput};

/// A model that runs on a device. Steps run in the order in which they were submitted.
pub trait Executor: Send {
    /// Steps that may be under way at once: 1 or 2.
    fn depth(&self) -> usize;
    /// Rows that large products are computed in at once, as [`Device`](kvasir_kernels::device::Device) says it.
    fn row_tile(&self) -> usize;
    /// Starts a step, whose model is the executor's to fill in.
    fn submit(&mut self, input: StepInput) -> Result<Ticket, DeviceError>;
    /// Says what is wanted of each row of logits of the step that was submitted last: once for each step, before the next
    /// is submitted. The step before may be collected in between.
    fn sample(&mut self, ticket: &Ticket, requests: &[LogitsRow]) -> Result<(), DeviceError>;
    /// Waits for the oldest step under way.
    fn collect(&mut self, ticket: Ticket) -> Result<DeviceOutput, DeviceError>;
}
