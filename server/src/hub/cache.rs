//! A repository's folder in the Hugging Face cache: `blobs` by hash, `snapshots` of commits that link to them, `refs` from
//! revisions to commits, and beside it `.locks`. Other tools read and write it too, by the same rules.

use std::fs::{self, File, TryLockError};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::client::RemoteFile;
use super::job::Job;
use super::{HubError, Repository};
use crate::model::files::ModelFiles;
use crate::model::weights::weight_files;

/// How often a lock is tried that another process holds.
const LOCK_INTERVAL: Duration = Duration::from_millis(200);

/// What a server can't do without, beside the weights.
const REQUIRED: [&str; 2] = ["config.json", "tokenizer.json"];

#[derive(Clone, Debug)]
pub(super) struct RepositoryCache {
    /// `models--OWNER--NAME`
    root: PathBuf,
    locks: PathBuf,
}

/// Others wait until it is dropped.
pub(super) struct Lock {
    _file: File,
}

impl RepositoryCache {
    pub(super) fn new(cache: &Path, name: &str) -> Self {
        let folder = format!("models--{}", name.replace('/', "--"));
        Self {
            locks: cache.join(".locks").join(&folder),
            root: cache.join(folder),
        }
    }

    fn made(path: PathBuf) -> Result<PathBuf, HubError> {
        fs::create_dir_all(&path).map_err(HubError::file(&path))?;
        Ok(path)
    }

    /// A folder in it, made where it isn't there.
    pub(super) fn folder(&self, name: &str) -> Result<PathBuf, HubError> {
        Self::made(self.root.join(name))
    }

    pub(super) fn blob(&self, file: &RemoteFile) -> PathBuf {
        self.root.join("blobs").join(file.hash.hex())
    }

    /// What has come of a blob so far. The name is that of Hugging Face's tools, which go on from it too.
    pub(super) fn part(&self, file: &RemoteFile) -> PathBuf {
        let name = format!("{}.incomplete", file.hash.hex());
        self.root.join("blobs").join(name)
    }

    /// The blob is there: only what is whole has its name.
    pub(super) fn has(&self, file: &RemoteFile) -> bool {
        fs::metadata(self.blob(file)).is_ok_and(|blob| blob.len() == file.size)
    }

    /// The folder of a commit.
    pub(super) fn snapshot(&self, commit: &str) -> Result<PathBuf, HubError> {
        let path = self.root.join("snapshots").join(commit);
        // A cache that is mounted read-only may have all there is.
        if path.is_dir() {
            return Ok(path);
        }
        Self::made(path)
    }

    /// Puts a blob that is there into a commit's folder under its name.
    pub(super) fn link(&self, commit: &str, file: &RemoteFile) -> Result<(), HubError> {
        let blob = Path::new("../../blobs").join(file.hash.hex());
        let link = self.snapshot(commit)?.join(&file.name);
        if fs::read_link(&link).is_ok_and(|found| found == blob) {
            return Ok(());
        }
        // Others look on: it is there at once or not at all.
        let fresh = link.with_file_name(format!(".{}.{}", file.name, std::process::id()));
        let _ = fs::remove_file(&fresh);
        symlink(&blob, &fresh)
            .or_else(|_| fs::copy(self.blob(file), &fresh).map(drop))
            .and_then(|()| fs::rename(&fresh, &link))
            .map_err(HubError::file(&link))
    }

    /// Records which commit a revision was. Without it the hub is asked the next time, as always.
    pub(super) fn remember(&self, revision: &str, commit: &str) {
        let path = self.root.join("refs").join(revision);
        if fs::read_to_string(&path).is_ok_and(|known| known.trim() == commit) {
            return;
        }
        let folder = path.parent().map(fs::create_dir_all);
        if folder.is_some_and(|made| made.is_ok())
            && let Err(error) = fs::write(&path, commit)
        {
            tracing::debug!(%error, path = %path.display(), "revision not recorded");
        }
    }

    /// The commit that the revision is or was, where the cache has all that a server reads of it.
    pub(super) fn servable(&self, repository: &Repository) -> Option<String> {
        let revision = &repository.revision;
        let snapshots = self.root.join("snapshots");
        let known = fs::read_to_string(self.root.join("refs").join(revision)).ok();
        let commit = known.map_or_else(|| revision.clone(), |known| known.trim().to_owned());
        let folder = snapshots.join(&commit);
        let files = ModelFiles::directory(&folder).ok()?;
        let weights = weight_files(&files).ok()?;
        let names = weights.iter().map(String::as_str).chain(REQUIRED);
        let is_there = |name: &str| folder.join(name).is_file();
        names.into_iter().all(is_there).then_some(commit)
    }

    /// The right to write a blob. While another process has it, `meanwhile` is called now and then.
    pub(super) fn lock(
        &self,
        file: &RemoteFile,
        job: &Job,
        mut meanwhile: impl FnMut(),
    ) -> Result<Lock, HubError> {
        let path = Self::made(self.locks.clone())?.join(format!("{}.lock", file.hash.hex()));
        let lock = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .map_err(HubError::file(&path))?;
        let mut told = false;
        loop {
            match lock.try_lock() {
                Ok(()) => return Ok(Lock { _file: lock }),
                Err(TryLockError::WouldBlock) => {}
                Err(TryLockError::Error(error)) => return Err(HubError::file(&path)(error)),
            }
            if !told {
                tracing::info!(file = file.name, "another process fetches it");
                told = true;
            }
            meanwhile();
            job.pause(LOCK_INTERVAL)?;
        }
    }

    /// Refuses what there is no room for before a byte has come.
    pub(super) fn check_room(
        &self,
        repository: &Repository,
        files: &[RemoteFile],
    ) -> Result<(), HubError> {
        let missing = files.iter().filter(|file| !self.has(file));
        let needed = missing.map(|file| {
            let have = fs::metadata(self.part(file)).map_or(0, |part| part.len());
            file.size.saturating_sub(have)
        });
        let needed_bytes = needed.sum();
        if needed_bytes == 0 {
            return Ok(());
        }
        let blobs = self.folder("blobs")?;
        // Where the system can't tell, writing will.
        let Ok(found) = rustix::fs::statvfs(&blobs) else {
            return Ok(());
        };
        let free_bytes = found.f_bavail.saturating_mul(found.f_frsize);
        match needed_bytes > free_bytes {
            true => Err(HubError::NoRoom {
                repository: repository.clone(),
                cache: blobs,
                needed_bytes,
                free_bytes,
            }),
            false => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::client::Hash;
    use super::*;

    fn file(name: &str, hex: &str, size: u64) -> RemoteFile {
        RemoteFile {
            name: name.to_owned(),
            size,
            hash: Hash::from_hex(&hex.repeat(40)).unwrap(),
        }
    }

    fn repository(revision: &str) -> Repository {
        Repository {
            name: "a/b".to_owned(),
            revision: revision.to_owned(),
        }
    }

    #[test]
    fn the_layout_is_hugging_faces() {
        let folder = tempfile::tempdir().unwrap();
        let cache = RepositoryCache::new(folder.path(), "a/b");
        let commit = "c".repeat(40);
        let weights = file("model.safetensors", "3", 5);
        let files = [
            file("config.json", "1", 5),
            file("tokenizer.json", "2", 5),
            weights.clone(),
        ];
        cache.folder("blobs").unwrap();
        for file in &files {
            assert!(!cache.has(file));
            fs::write(cache.blob(file), "12345").unwrap();
            assert!(cache.has(file));
            assert_eq!(cache.servable(&repository("main")), None, "{}", file.name);
            cache.link(&commit, file).unwrap();
            cache.link(&commit, file).unwrap();
        }
        let root = folder.path().join("models--a--b");
        let link = root.join(format!("snapshots/{commit}/model.safetensors"));
        let hash = "3".repeat(40);
        assert_eq!(
            fs::read_link(&link).unwrap(),
            PathBuf::from(format!("../../blobs/{hash}"))
        );
        assert_eq!(fs::read_to_string(&link).unwrap(), "12345");
        assert_eq!(cache.servable(&repository("main")), None, "which commit?");
        cache.remember("main", &commit);
        let known = fs::read_to_string(root.join("refs/main")).unwrap();
        assert_eq!(known, commit);
        for revision in ["main", &commit] {
            let found = cache.servable(&repository(revision));
            assert_eq!(found.as_ref(), Some(&commit), "{revision}");
        }
        fs::remove_file(cache.blob(&weights)).unwrap();
        assert_eq!(cache.servable(&repository("main")), None, "a broken link");
    }

    #[test]
    fn one_process_writes_a_blob_and_others_wait() {
        let folder = tempfile::tempdir().unwrap();
        let cache = RepositoryCache::new(folder.path(), "a/b");
        let (job, weights) = (Job::default(), file("model.safetensors", "3", 5));
        let held = cache.lock(&weights, &job, || {}).unwrap();
        let mut held = Some(held);
        let mut n_waits = 0;
        let got = cache.lock(&weights, &job, || {
            n_waits += 1;
            held = None;
        });
        assert!(got.is_ok());
        assert_eq!(n_waits, 1, "it waited until the first was dropped");
        let lock = folder.path().join(".locks/models--a--b");
        assert!(lock.join(format!("{}.lock", "3".repeat(40))).exists());
    }

    #[test]
    fn what_there_is_no_room_for_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let cache = RepositoryCache::new(folder.path(), "a/b");
        let huge = file("model.safetensors", "3", 1 << 60);
        let refused = cache.check_room(&repository("main"), std::slice::from_ref(&huge));
        let sentence = refused.unwrap_err().to_string();
        assert!(
            sentence.starts_with("hf://a/b@main: its files take 1073741824.0 GiB more, and "),
            "{sentence}"
        );
        let small = file("model.safetensors", "3", 1);
        cache.check_room(&repository("main"), &[small]).unwrap();
    }
}
