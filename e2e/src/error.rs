//! What can go wrong while a cluster is driven: one sentence each, with the remedy where there is one.

use std::path::{Path, PathBuf};

/// Every failure of this crate.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A program ran and said no.
    #[error("`{command}` failed ({status}): {said}")]
    Failed {
        /// The command line, as one would type it.
        command: String,
        /// How it ended.
        status: String,
        /// The end of what it wrote.
        said: String,
    },
    /// A program could not be started.
    #[error("cannot start `{command}`")]
    NotStarted {
        /// The command line, as one would type it.
        command: String,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// A file could not be read, written or removed.
    #[error("cannot {action} {}", path.display())]
    File {
        /// `read`, `write`, ...
        action: &'static str,
        /// Which one.
        path: PathBuf,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// Something awaited did not come.
    #[error("{what}: not so after {seconds} s; last seen: {last}")]
    TimedOut {
        /// The condition, in words.
        what: String,
        /// How long it was awaited.
        seconds: u64,
        /// What was seen instead.
        last: String,
    },
    /// A certificate could not be made.
    #[error("cannot make the certificate of {subject}")]
    Certificate {
        /// Whose it would be.
        subject: String,
        /// Why not.
        #[source]
        source: rcgen::Error,
    },
    /// Something that this machine or the caller must change; the sentence says what.
    #[error("{0}")]
    Refused(String),
}

impl Error {
    /// Adds the path and the action to an I/O error: `fs::read(p).map_err(Error::file("read", p))`.
    pub fn file(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Self + use<> {
        let path = path.to_owned();
        move |source| Self::File {
            action,
            path,
            source,
        }
    }
}
