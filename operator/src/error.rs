//! How a reconcile fails: one variant for each of its steps, with what the API server said as the source. A replica that
//! doesn't answer and a spec that can't be carried out are no errors.

use std::borrow::Cow;

/// The step that failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Reading an object of a child's name.
    #[error("cannot read the {kind}")]
    ReadChild {
        /// The child's kind.
        kind: Cow<'static, str>,
        /// What the API server said.
        source: kube::Error,
    },
    /// Listing the warnings about pods that are not ready.
    #[error("cannot list the warnings about the pods")]
    ListWarnings(#[source] kube::Error),
    /// Applying a child.
    #[error("cannot apply the {kind}")]
    ApplyChild {
        /// The child's kind.
        kind: Cow<'static, str>,
        /// What the API server said.
        source: kube::Error,
    },
    /// Publishing an event about a decision.
    #[error("cannot publish the event {reason}")]
    PublishEvent {
        /// The event's reason.
        reason: &'static str,
        /// What the API server said.
        source: kube::Error,
    },
    /// Writing the status.
    #[error("cannot write the status")]
    WriteStatus(#[source] kube::Error),
}

impl Error {
    /// The steps by the names that the metrics give them.
    pub const STEPS: [&str; 5] = [
        "read_child",
        "list_warnings",
        "apply_child",
        "publish_event",
        "write_status",
    ];

    /// The step's name, one of [`Error::STEPS`].
    #[must_use]
    pub fn step(&self) -> &'static str {
        match self {
            Error::ReadChild { .. } => "read_child",
            Error::ListWarnings(_) => "list_warnings",
            Error::ApplyChild { .. } => "apply_child",
            Error::PublishEvent { .. } => "publish_event",
            Error::WriteStatus(_) => "write_status",
        }
    }

    /// The API server makes nothing new in a namespace that is being deleted.
    #[must_use]
    pub fn namespace_is_terminating(&self) -> bool {
        let kube::Error::Api(status) = self.api_error() else {
            return false;
        };
        let mut causes = status.details.iter().flat_map(|details| &details.causes);
        causes.any(|cause| cause.reason == "NamespaceTerminating")
    }

    fn api_error(&self) -> &kube::Error {
        match self {
            Error::ReadChild { source, .. }
            | Error::ListWarnings(source)
            | Error::ApplyChild { source, .. }
            | Error::PublishEvent { source, .. }
            | Error::WriteStatus(source) => source,
        }
    }
}
