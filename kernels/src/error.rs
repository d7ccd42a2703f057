//! What can go wrong with a device.

/// Why a device can't do what is asked.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// Not enough memory.
    #[error("{what} needs {needed_bytes} bytes, {available_bytes} are available")]
    OutOfMemory {
        /// What was to be allocated.
        what: &'static str,
        /// Its size.
        needed_bytes: u64,
        /// What is left.
        available_bytes: u64,
    },
    /// The device has no operation for this shape or dtype.
    #[error("the {device} device does not support {what}")]
    Unsupported {
        /// The device's name.
        device: &'static str,
        /// What was asked.
        what: String,
    },
    /// There is no such device here, or it can't be used.
    #[error("no {device} device can be used: {why}")]
    Unavailable {
        /// The device's name.
        device: &'static str,
        /// What is missing, with the numbers.
        why: String,
    },
    /// The device itself failed; nothing that it holds can be trusted any more.
    #[error("the {device} device failed: {message}")]
    Failed {
        /// The device's name.
        device: &'static str,
        /// Its own words.
        message: String,
    },
}
