//! Large files from the network: resumed where they broke off, and never used unless they have the SHA-512 that is
//! expected. It knows no file by name and no place to fall back to.

use crate::Error;
use indicatif::{ProgressBar, ProgressStyle};
use sha2::{Digest as _, Sha512};
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write as _};
use std::path::Path;
use std::time::Duration;
use ureq::http::{Response, StatusCode, header};
use ureq::{Agent, Body};

/// A host that can't be reached must be noticed at once: there is another way to have the file.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// A connection that brings nothing for so long has broken off.
const READ_TIMEOUT: Duration = Duration::from_secs(20);
/// Attempts in a row that bring nothing, before the download is given up.
const MAX_BARREN_ATTEMPTS: u32 = 3;

/// Why a file is not there.
#[derive(Debug, thiserror::Error)]
pub(super) enum DownloadError {
    /// No connection, or no answer.
    #[error("the host can't be reached")]
    Unreachable(#[source] Box<ureq::Error>),
    /// The server answered something else.
    #[error("the server answers {0}")]
    Status(StatusCode),
    /// It broke off each time it was tried; what has come is kept for the next call.
    #[error("the download broke off at {at_bytes} bytes, and is resumed the next time")]
    BrokenOff {
        /// What has come so far.
        at_bytes: u64,
    },
    /// What came is not what was expected, and is gone.
    #[error("the file has the SHA-512 {found} and not the expected {expected}; it was deleted")]
    WrongChecksum {
        /// Of what came.
        found: String,
        /// Of what should have come.
        expected: String,
    },
    /// Of this machine's own files.
    #[error(transparent)]
    File(#[from] Error),
}

/// Brings the file at `url` to `path`, which is only there once it is whole and has the checksum `sha512`, in lower-case
/// hexadecimal. Until then it lies beside, with `.part` after its name, and the next call goes on from there.
///
/// # Errors
/// [`DownloadError`].
pub(super) fn download(url: &str, sha512: &str, path: &Path) -> Result<(), DownloadError> {
    let part = super::beside(path, "part");
    let agent: Agent = Agent::config_builder()
        .timeout_resolve(Some(CONNECT_TIMEOUT))
        .timeout_connect(Some(CONNECT_TIMEOUT))
        .timeout_recv_response(Some(READ_TIMEOUT))
        .timeout_per_read(Some(READ_TIMEOUT))
        .http_status_as_error(false)
        .build()
        .into();
    let mut n_barren = 0;
    while !fetch_rest(&agent, url, &part, &mut n_barren)? {
        if n_barren >= MAX_BARREN_ATTEMPTS {
            return Err(DownloadError::BrokenOff {
                at_bytes: length(&part),
            });
        }
    }
    let found = digest(&part)?;
    if found != sha512 {
        fs::remove_file(&part).map_err(Error::file("remove", &part))?;
        return Err(DownloadError::WrongChecksum {
            found,
            expected: sha512.to_owned(),
        });
    }
    fs::rename(&part, path).map_err(Error::file("write", path))?;
    Ok(())
}

/// Asks for what `part` lacks, and appends it. True: nothing is lacking any more. `n_barren` counts the attempts in a row
/// that brought nothing.
fn fetch_rest(
    agent: &Agent,
    url: &str,
    part: &Path,
    n_barren: &mut u32,
) -> Result<bool, DownloadError> {
    let have = length(part);
    let mut request = agent.get(url);
    if have > 0 {
        // RFC 9110, section 14: a server may answer with the range, or with the whole.
        request = request.header(header::RANGE, format!("bytes={have}-"));
    }
    let response = match request.call() {
        Ok(response) => response,
        Err(error) if have == 0 => return Err(DownloadError::Unreachable(Box::new(error))),
        Err(_) => {
            *n_barren += 1;
            return Ok(false);
        }
    };
    let from = match response.status() {
        StatusCode::OK => 0,
        StatusCode::PARTIAL_CONTENT if range_start(&response) == Some(have) => have,
        // There is nothing from here on: all of it has come, and the checksum tells whether it is right.
        StatusCode::RANGE_NOT_SATISFIABLE if have > 0 => return Ok(true),
        status => return Err(DownloadError::Status(status)),
    };
    let rest = response.body().content_length();
    let came = append(response.into_body(), part, from, rest)?;
    *n_barren = if came == 0 { *n_barren + 1 } else { 0 };
    // Without a length the connection's end is the file's, and the checksum tells.
    Ok(rest.is_none_or(|rest| came == rest))
}

/// Writes what comes behind the first `from` bytes of the file, until it ends or breaks off; how many bytes came.
fn append(body: Body, part: &Path, from: u64, rest: Option<u64>) -> Result<u64, DownloadError> {
    let mut file = OpenOptions::new()
        .create(true)
        .append(true)
        .open(part)
        .map_err(Error::file("write", part))?;
    file.set_len(from).map_err(Error::file("write", part))?;
    let bar = progress_bar(from, rest);
    let mut reader = body.into_reader();
    let mut buffer = vec![0; 128 * 1024];
    let mut came = 0;
    // An error of the connection is the end of what it brings; the caller asks again.
    while let Ok(n) = reader.read(&mut buffer)
        && n > 0
    {
        file.write_all(&buffer[..n])
            .map_err(Error::file("write", part))?;
        came += n as u64;
        bar.inc(n as u64);
    }
    bar.finish_and_clear();
    Ok(came)
}

/// On a terminal; elsewhere nothing is drawn.
fn progress_bar(from: u64, rest: Option<u64>) -> ProgressBar {
    let bar = match rest {
        Some(rest) => ProgressBar::new(from + rest),
        None => ProgressBar::no_length(),
    };
    let template = "    {bar:40} {bytes} of {total_bytes}, {bytes_per_sec}, {eta} left";
    // The template is fixed; should it be wrong, the default one does.
    let bar = bar.with_style(
        ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar()),
    );
    bar.set_position(from);
    bar.reset_eta();
    bar
}

/// The first byte of a partial answer, from `Content-Range: bytes 5-9/10`.
fn range_start(response: &Response<Body>) -> Option<u64> {
    let range = response
        .headers()
        .get(header::CONTENT_RANGE)?
        .to_str()
        .ok()?;
    range
        .strip_prefix("bytes ")?
        .split('-')
        .next()?
        .parse()
        .ok()
}

fn length(path: &Path) -> u64 {
    fs::metadata(path).map_or(0, |metadata| metadata.len())
}

fn digest(path: &Path) -> Result<String, Error> {
    let mut file = File::open(path).map_err(Error::file("read", path))?;
    let mut hash = Sha512::new();
    let mut buffer = vec![0; 1024 * 1024];
    loop {
        match file.read(&mut buffer).map_err(Error::file("read", path))? {
            0 => break,
            n => hash.update(&buffer[..n]),
        }
    }
    Ok(hash.finalize().iter().map(|b| format!("{b:02x}")).collect())
}

#[cfg(test)]
pub(super) mod tests;
