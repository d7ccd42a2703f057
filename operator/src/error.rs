//! How a reconcile fails: one variant for each of its steps, with what the API server said as the source. A replica that
//! doesn't answer and a spec that can't be carried out are no errors.

use std::borrow::Cow;
use std::future::Future;
use std::time::Duration;

/// How long the API server may take to answer one request.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);

/// The answer to a request, or an error once it took too long.
///
/// # Errors
/// What the API server says, or that it says nothing.
pub async fn in_time<T>(request: impl Future<Output = kube::Result<T>>) -> kube::Result<T> {
    match tokio::time::timeout(REQUEST_TIMEOUT, request).await {
        Ok(answer) => answer,
        Err(elapsed) => Err(kube::Error::Service(Box::new(elapsed))),
    }
}

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
    pub const STEPS: [&str; 4] = ["read_child", "apply_child", "publish_event", "write_status"];

    /// The step's name, one of [`Error::STEPS`].
    #[must_use]
    pub fn step(&self) -> &'static str {
        match self {
            Error::ReadChild { .. } => "read_child",
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

    /// What the API server says where it refuses this very request, and will refuse it again: it is invalid, forbidden, too
    /// large, or has no place to go to. Anything else may pass: conflicts, overload, a token that is being renewed.
    #[must_use]
    pub fn refusal(&self) -> Option<&str> {
        let kube::Error::Api(status) = self.api_error() else {
            return None;
        };
        let is_refused = matches!(status.code, 400 | 403 | 404 | 413 | 422);
        (is_refused && !self.namespace_is_terminating()).then_some(&status.message)
    }

    /// The step and what the API server said, in one sentence.
    #[must_use]
    pub fn sentence(&self) -> String {
        match self.api_error() {
            kube::Error::Api(status) => format!("{self}: {}", status.message),
            other => format!("{self}: {other}"),
        }
    }

    /// What the API server said.
    #[must_use]
    pub fn api_error(&self) -> &kube::Error {
        match self {
            Error::ReadChild { source, .. }
            | Error::ApplyChild { source, .. }
            | Error::PublishEvent { source, .. }
            | Error::WriteStatus(source) => source,
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_would_be_refused_again_is_told_from_what_may_pass() {
        for (code, cause, is_refusal) in [
            (400, "", true),
            (401, "", false),
            (403, "", true),
            (403, "NamespaceTerminating", false),
            (404, "", true),
            (408, "", false),
            (409, "", false),
            (413, "", true),
            (422, "FieldValueRequired", true),
            (429, "", false),
            (500, "", false),
            (503, "", false),
        ] {
            let status = serde_json::from_value(
                json!({ "status": "Failure", "code": code, "reason": "",
                "message": "limits: Required value", "details": { "causes": [{ "reason": cause }] } }),
            );
            let error = Error::ApplyChild {
                kind: "Deployment".into(),
                source: kube::Error::Api(Box::new(status.unwrap())),
            };
            let want = is_refusal.then_some("limits: Required value");
            assert_eq!(error.refusal(), want, "{code} {cause}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_request_that_is_never_answered_is_an_error() {
        let begun = tokio::time::Instant::now();
        let answer = in_time(std::future::pending::<kube::Result<()>>()).await;
        let error = Error::WriteStatus(answer.unwrap_err());
        assert_eq!(begun.elapsed(), REQUEST_TIMEOUT);
        assert_eq!(error.refusal(), None);
        assert!(
            error.sentence().contains("deadline"),
            "{}",
            error.sentence()
        );
    }
}
