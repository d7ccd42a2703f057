//! One file of a repository: resumed where it broke off, by this process or one before, and there only once it is whole and
//! has its hash.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::PathBuf;

use sha1::Sha1;
use sha2::{Digest, Sha256};
use ureq::Body;
use ureq::http::{Response, StatusCode};

use super::cache::RepositoryCache;
use super::client::{Client, Hash, RemoteFile};
use super::job::{Counted, Job};
use super::{HubError, Repository};

const BUFFER_BYTES: usize = 1 << 20;

/// Sees to it that the cache has the file.
pub(super) fn blob(
    client: &Client,
    (repository, commit): (&Repository, &str),
    cache: &RepositoryCache,
    file: &RemoteFile,
    job: &Job,
) -> Result<(), HubError> {
    let mut counted = Counted::new(job);
    let part = cache.part(file);
    let is_there = |counted: &mut Counted<'_>| {
        let has = cache.has(file);
        if has {
            counted.set(file.size);
        }
        has
    };
    if is_there(&mut counted) {
        return Ok(());
    }
    cache.folder("blobs")?;
    let _lock = cache.lock(file, job, || {
        let come = fs::metadata(&part).map_or(0, |part| part.len());
        counted.set(come.min(file.size));
    })?;
    if is_there(&mut counted) {
        return Ok(());
    }
    let url = client.url_of(repository, commit, &file.name);
    let mut found = String::new();
    for _ in 0..2 {
        let mut sink = Sink::open(part.clone(), file, &mut counted)?;
        fill(client, repository, &url, &mut sink, job)?;
        found = sink.finish()?;
        if found == file.hash.hex() {
            let blob = cache.blob(file);
            return fs::rename(&part, &blob).map_err(HubError::file(&blob));
        }
        tracing::warn!(
            file = file.name,
            found,
            expected = file.hash.hex(),
            "a wrong hash"
        );
        counted.set(0);
        fs::remove_file(&part).map_err(HubError::file(&part))?;
    }
    Err(HubError::WrongHash {
        repository: repository.clone(),
        file: file.name.clone(),
        found,
        expected: file.hash.hex().to_owned(),
    })
}

/// Asks for what lacks until all of it has come.
fn fill(
    client: &Client,
    repository: &Repository,
    url: &str,
    sink: &mut Sink<'_, '_>,
    job: &Job,
) -> Result<(), HubError> {
    let mut patience = client.patience(repository);
    while sink.bytes < sink.expected {
        let before = sink.bytes;
        let range = (before > 0).then_some((before, None));
        match client.get(url, range, repository) {
            Ok(answer) => sink.take(answer.response, job)?,
            Err(trouble) => {
                patience.again(trouble, job)?;
                continue;
            }
        }
        if sink.bytes > before {
            patience.renew();
        }
        if sink.bytes < sink.expected {
            patience.broke_off(job)?;
        }
    }
    Ok(())
}

/// The file as far as it has come, and the hash of that.
struct Sink<'c, 'j> {
    path: PathBuf,
    file: File,
    hasher: Hasher,
    bytes: u64,
    expected: u64,
    counted: &'c mut Counted<'j>,
}

impl<'c, 'j> Sink<'c, 'j> {
    /// Goes on from what there is.
    fn open(
        path: PathBuf,
        wanted: &RemoteFile,
        counted: &'c mut Counted<'j>,
    ) -> Result<Self, HubError> {
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .read(true)
            .write(true)
            .open(&path)
            .map_err(HubError::file(&path))?;
        let mut sink = Self {
            hasher: Hasher::new(&wanted.hash, wanted.size),
            path,
            file,
            bytes: 0,
            expected: wanted.size,
            counted,
        };
        let mut buffer = vec![0; BUFFER_BYTES];
        loop {
            let n = sink
                .file
                .read(&mut buffer)
                .map_err(HubError::file(&sink.path))?;
            if n == 0 {
                break;
            }
            sink.hasher.update(&buffer[..n]);
            sink.bytes += n as u64;
        }
        // More than all of it is something else.
        if sink.bytes > sink.expected {
            sink.restart()?;
        }
        sink.counted.set(sink.bytes);
        Ok(sink)
    }

    fn restart(&mut self) -> Result<(), HubError> {
        self.hasher = self.hasher.anew(self.expected);
        self.bytes = 0;
        self.counted.set(0);
        let emptied = self.file.set_len(0);
        let emptied = emptied.and_then(|()| self.file.seek(SeekFrom::Start(0)));
        emptied.map(drop).map_err(HubError::file(&self.path))
    }

    /// Takes in what an answer brings, until it ends or breaks off.
    fn take(&mut self, response: Response<Body>, job: &Job) -> Result<(), HubError> {
        match response.status() {
            StatusCode::PARTIAL_CONTENT if range_start(&response) == Some(self.bytes) => {}
            // The whole, though a part was asked for.
            StatusCode::OK if self.bytes > 0 => self.restart()?,
            StatusCode::OK => {}
            // Another part, or nothing from here on: what there is can't be gone on from.
            _ => return self.restart(),
        }
        let mut reader = response.into_body().into_reader();
        let mut buffer = vec![0; BUFFER_BYTES];
        // An error of the connection is the end of what it brings; the caller asks again.
        while let Ok(n) = reader.read(&mut buffer)
            && n > 0
        {
            job.check()?;
            let left = usize::try_from(self.expected - self.bytes).unwrap_or(usize::MAX);
            let come = &buffer[..n.min(left)];
            self.file
                .write_all(come)
                .map_err(HubError::file(&self.path))?;
            self.hasher.update(come);
            self.bytes += come.len() as u64;
            self.counted.set(self.bytes);
            if n > left {
                // Longer than the hub says: its hash is another one too.
                self.hasher.update(&buffer[left..n]);
                break;
            }
        }
        Ok(())
    }

    /// The hash of all of it, which is on the disk now.
    fn finish(self) -> Result<String, HubError> {
        self.file.sync_all().map_err(HubError::file(&self.path))?;
        Ok(self.hasher.finish())
    }
}

enum Hasher {
    Sha256(Sha256),
    Git(Sha1),
}

impl Hasher {
    fn new(hash: &Hash, size: u64) -> Self {
        match hash {
            Hash::Sha256(_) => Hasher::Sha256(Sha256::new()),
            Hash::Git(_) => Hasher::git(size),
        }
    }

    fn git(size: u64) -> Self {
        Hasher::Git(Sha1::new_with_prefix(format!("blob {size}\0")))
    }

    fn anew(&self, size: u64) -> Self {
        match self {
            Hasher::Sha256(_) => Hasher::Sha256(Sha256::new()),
            Hasher::Git(_) => Hasher::git(size),
        }
    }

    fn update(&mut self, bytes: &[u8]) {
        match self {
            Hasher::Sha256(hasher) => hasher.update(bytes),
            Hasher::Git(hasher) => hasher.update(bytes),
        }
    }

    fn finish(self) -> String {
        let hex = |bytes: &[u8]| bytes.iter().map(|b| format!("{b:02x}")).collect();
        match self {
            Hasher::Sha256(hasher) => hex(&hasher.finalize()),
            Hasher::Git(hasher) => hex(&hasher.finalize()),
        }
    }
}

/// The first byte of a partial answer, from `Content-Range: bytes 5-9/10`.
fn range_start(response: &Response<Body>) -> Option<u64> {
    let range = response.headers().get("content-range")?.to_str().ok()?;
    range
        .strip_prefix("bytes ")?
        .split('-')
        .next()?
        .parse()
        .ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hashes_are_those_of_git_and_sha256sum() {
        // `printf hello | git hash-object --stdin`, `printf hello | sha256sum`
        for hex in [
            "b6fc4c620b67d95f953a5c1c1230aaab5db5a1b0",
            "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824",
        ] {
            let mut hasher = Hasher::new(&Hash::from_hex(hex).unwrap(), 5);
            for part in ["he", "llo"] {
                hasher.update(part.as_bytes());
            }
            assert_eq!(hasher.anew(5).finish().len(), hex.len());
            assert_eq!(hasher.finish(), hex);
        }
    }
}
