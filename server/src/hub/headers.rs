//! A model directory whose weights' files have their headers and nothing else: as long as the real ones, and without their
//! bytes. It tells what a model needs before gigabytes are fetched.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use super::client::{Client, RemoteFile};
use super::job::Job;
use super::{Found, HubError};

/// Most headers are shorter; what is missing is asked for again.
const FIRST_BYTES: u64 = 1 << 20;
/// safetensors refuses longer ones.
const MAX_HEADER_BYTES: u64 = 100_000_000;

/// The directory. It is gone when this is dropped.
#[derive(Debug)]
pub struct HeaderFolder(PathBuf);

impl HeaderFolder {
    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.0
    }

    pub(super) fn fetch(client: &Client, found: &Found, job: &Job) -> Result<Self, HubError> {
        let name = format!("headers-{}", std::process::id());
        let folder = Self(found.cache.folder(&name)?);
        let snapshot = found.cache.snapshot(&found.commit)?;
        let snapshot = fs::canonicalize(&snapshot).map_err(HubError::file(&snapshot))?;
        for name in super::SMALL_FILES {
            let (from, to) = (snapshot.join(name), folder.0.join(name));
            if from.is_file() {
                place(&to, || symlink(&from, &to))?;
            }
        }
        for file in &found.weights {
            let to = folder.0.join(&file.name);
            if found.cache.has(file) {
                let blob = found.cache.blob(file);
                let blob = fs::canonicalize(&blob).map_err(HubError::file(&blob))?;
                place(&to, || symlink(&blob, &to))?;
            } else {
                let header = header(client, found, file, job)?;
                place(&to, || write_sparse(&to, &header, file.size))?;
            }
        }
        Ok(folder)
    }
}

impl Drop for HeaderFolder {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.0) {
            tracing::debug!(%error, path = %self.0.display(), "not removed");
        }
    }
}

/// Makes a file anew: a process of the same number may have left one.
fn place(to: &Path, make: impl FnOnce() -> std::io::Result<()>) -> Result<(), HubError> {
    let _ = fs::remove_file(to);
    make().map_err(HubError::file(to))
}

/// The rest of the file is a hole: it has a length and takes no room.
fn write_sparse(to: &Path, header: &[u8], size: u64) -> std::io::Result<()> {
    let mut file = File::create(to)?;
    file.set_len(size)?;
    file.seek(SeekFrom::Start(0))?;
    file.write_all(header)
}

/// The length and the header of a file (huggingface.co/docs/safetensors).
fn header(
    client: &Client,
    found: &Found,
    file: &RemoteFile,
    job: &Job,
) -> Result<Vec<u8>, HubError> {
    let url = client.url_of(&found.repository, &found.commit, &file.name);
    let mut patience = client.patience(&found.repository);
    let mut bytes: Vec<u8> = Vec::new();
    let mut wanted = FIRST_BYTES.min(file.size);
    loop {
        let range = Some((0, Some(wanted.saturating_sub(1))));
        match client.get(&url, range, &found.repository) {
            Ok(answer) => {
                // A server that knows no ranges gives the whole, of which the beginning is read.
                let body = answer.response.into_body().into_reader();
                bytes.clear();
                let _ = body.take(wanted).read_to_end(&mut bytes);
            }
            Err(trouble) => {
                patience.again(trouble, job)?;
                continue;
            }
        }
        let length = bytes.first_chunk().map(|n| u64::from_le_bytes(*n));
        let end = length.map_or(wanted, |n| n.saturating_add(8));
        if end > file.size || end > MAX_HEADER_BYTES {
            // What is wrong with it is told by who reads it.
            return Ok(bytes);
        }
        if bytes.len() as u64 >= end {
            bytes.truncate(end as usize);
            return Ok(bytes);
        }
        if end > wanted {
            wanted = end;
        } else {
            patience.broke_off(job)?;
        }
    }
}
