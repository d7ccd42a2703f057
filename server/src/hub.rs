//! Models from a Hugging Face hub or a mirror of one: what a repository holds at a revision, and its files in a cache that
//! many processes and other tools share.
//!
//! Only what serving needs is fetched: config.json, generation_config.json, the tokenizer's files, the chat template, and
//! the safetensors files. First the small ones, then the headers of the weights' files, from which it is known whether
//! the model fits, and then the weights: resumed where they broke off, and used only with the hash that the hub gives.
//!
//! It knows HTTP and files, and nothing of what a model is.
//!
//! - [`client`]: requests, redirects, patience with what may pass; [`refusal`]: what won't, in words.
//! - [`cache`]: the Hugging Face cache's layout (`blobs`, `snapshots`, `refs`), and its locks.
//! - [`download`]: one file, whole and checked.
//! - [`headers`]: a model directory that has the weights' headers only.
//! - [`job`]: work on threads of its own that can be watched and stopped.

mod cache;
mod client;
mod download;
mod headers;
mod job;
mod refusal;

use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::model::files::ModelFiles;
use crate::model::plan::size;
use crate::model::weights::weight_files;
use cache::RepositoryCache;
use client::{Client, RemoteFile};
pub use headers::HeaderFolder;
use job::Job;
pub use job::{Fetched, attend};

/// Where models are where nobody says otherwise.
pub const DEFAULT_ENDPOINT: &str = "https://huggingface.co";

/// The files beside the weights that serving reads.
const SMALL_FILES: [&str; 6] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "model.safetensors.index.json",
];

/// Files that are fetched at once: one connection rarely fills the way.
const AT_ONCE: usize = 4;

/// What `hf://OWNER/NAME@REVISION` names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Repository {
    /// `OWNER/NAME`.
    pub name: String,
    /// A branch, a tag or a commit.
    pub revision: String,
}

/// How `--model` names a repository.
pub const SCHEME: &str = "hf://";

impl FromStr for Repository {
    type Err = String;

    fn from_str(found: &str) -> Result<Self, String> {
        let expected = || format!("{SCHEME}OWNER/NAME or {SCHEME}OWNER/NAME@REVISION");
        let named = found.strip_prefix(SCHEME).ok_or_else(expected)?;
        let (name, revision) = named.split_once('@').unwrap_or((named, "main"));
        let is_word = |word: &str| {
            let is_legal = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
            !word.is_empty() && !word.starts_with('.') && word.chars().all(is_legal)
        };
        let is_name = name.split('/').count() == 2 && name.split('/').all(is_word);
        let is_revision = revision.split('/').all(is_word);
        match is_name && is_revision {
            true => Ok(Self {
                name: name.to_owned(),
                revision: revision.to_owned(),
            }),
            false => Err(expected()),
        }
    }
}

impl std::fmt::Display for Repository {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{SCHEME}{}@{}", self.name, self.revision)
    }
}

/// Why a model can't be had from a hub: one sentence that names what the user can mend.
#[derive(Debug, thiserror::Error)]
pub enum HubError {
    /// The hub refuses, and will refuse again.
    #[error("{repository}: {sentence}")]
    Refused {
        /// What was asked for.
        repository: Repository,
        /// Which of its fields is wrong.
        sentence: String,
    },
    /// The hub or what it points to could not be reached for long.
    #[error(
        "{repository}: {endpoint} gave no answer that can be used, for {waited_s} s: {why}; see whether the endpoint (HF_ENDPOINT) is right and can be reached from here"
    )]
    Unreachable {
        /// What was asked for.
        repository: Repository,
        /// The hub.
        endpoint: String,
        /// How long it was tried.
        waited_s: u64,
        /// The last reason.
        why: String,
    },
    /// What came is not what the hub says it is.
    #[error(
        "{repository}: {file} came twice with another hash than the hub gives ({found}, expected {expected}); it was deleted, and the hub or a proxy before it gives something else"
    )]
    WrongHash {
        /// What was asked for.
        repository: Repository,
        /// The file.
        file: String,
        /// Of what came.
        found: String,
        /// Of what should have come.
        expected: String,
    },
    /// The cache has no room.
    #[error(
        "{repository}: its files take {} more, and {} has {} free; give the cache more room",
        size(*.needed_bytes), cache.display(), size(*.free_bytes)
    )]
    NoRoom {
        /// What was asked for.
        repository: Repository,
        /// Where it was to be kept.
        cache: PathBuf,
        /// What is missing.
        needed_bytes: u64,
        /// What is free.
        free_bytes: u64,
    },
    /// The cache's own files.
    #[error("{}: {source}; the cache of models (--download-dir) must be a folder that can be written", path.display())]
    File {
        /// Which one.
        path: PathBuf,
        /// The system's reason.
        #[source]
        source: std::io::Error,
    },
    /// Settings that are none.
    #[error("{0}")]
    Settings(String),
    /// What serving needs lacks, or is not what it should be.
    #[error("{0}")]
    Model(#[source] Box<crate::model::LoadError>),
    /// The server was told to stop.
    #[error("the download was stopped")]
    Stopped,
}

impl HubError {
    fn file(path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_owned();
        move |source| HubError::File { path, source }
    }
}

/// How a hub is reached, and where its files are kept. The names of the variables are those of Hugging Face's own tools.
#[derive(Clone, PartialEq, Eq)]
pub struct Settings {
    /// `HF_ENDPOINT`: the hub or a mirror.
    pub endpoint: String,
    /// `HF_TOKEN`.
    pub token: Option<String>,
    /// `--download-dir`, `HF_HUB_CACHE`, or `hub` in `HF_HOME`.
    pub cache: PathBuf,
    /// `SSL_CERT_FILE`: the authorities of a mirror inside a company, in place of the public ones.
    pub authorities: Option<PathBuf>,
}

impl std::fmt::Debug for Settings {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // The token is nobody's to read.
        f.debug_struct("Settings")
            .field("endpoint", &self.endpoint)
            .field("has_token", &self.token.is_some())
            .field("cache", &self.cache)
            .finish_non_exhaustive()
    }
}

impl Settings {
    /// What the environment says, read through `variable`, and `download_dir` where that is given.
    pub fn new(download_dir: Option<&Path>, variable: impl Fn(&str) -> Option<String>) -> Self {
        let variable = |name| variable(name).filter(|value| !value.trim().is_empty());
        let home = || {
            let user = variable("HOME").unwrap_or_else(|| "/tmp".to_owned());
            let of_user = Path::new(&user).join(".cache/huggingface");
            variable("HF_HOME").map_or(of_user, PathBuf::from)
        };
        let cache = || variable("HF_HUB_CACHE").map_or_else(|| home().join("hub"), PathBuf::from);
        let endpoint = variable("HF_ENDPOINT").unwrap_or_else(|| DEFAULT_ENDPOINT.to_owned());
        Self {
            endpoint: endpoint.trim().trim_end_matches('/').to_owned(),
            token: variable("HF_TOKEN").map(|token| token.trim().to_owned()),
            cache: download_dir.map_or_else(cache, Path::to_owned),
            authorities: variable("SSL_CERT_FILE").map(PathBuf::from),
        }
    }
}

/// A hub and the cache of its files.
pub struct Hub {
    client: Client,
    cache: PathBuf,
}

/// A repository at a commit, its small files in the cache.
#[derive(Debug)]
pub struct Found {
    repository: Repository,
    commit: String,
    cache: RepositoryCache,
    /// The weights' files; empty where the cache has all of them and the hub was not asked.
    weights: Vec<RemoteFile>,
}

impl Found {
    /// The commit that the revision was when the hub was asked.
    pub fn commit(&self) -> &str {
        &self.commit
    }
}

impl Hub {
    /// Nothing is asked yet.
    pub fn new(settings: &Settings) -> Result<Self, HubError> {
        Ok(Self {
            client: Client::new(settings)?,
            cache: settings.cache.clone(),
        })
    }

    /// Asks what the repository is at its revision, and fetches the small files. Where the hub can't be reached and the
    /// cache has all of a commit that the revision once was, that is taken.
    pub fn find(&self, repository: &Repository, job: &Job) -> Result<Found, HubError> {
        let cache = RepositoryCache::new(&self.cache, &repository.name);
        let cached = cache.servable(repository);
        let listing = match (self.client.list(repository, cached.is_some(), job), cached) {
            (Ok(listing), _) => listing,
            (Err(error @ HubError::Unreachable { .. }), Some(commit)) => {
                tracing::warn!(%error, commit, "the hub can't be asked: serving what the cache has");
                return Ok(Found {
                    repository: repository.clone(),
                    commit,
                    cache,
                    weights: Vec::new(),
                });
            }
            (Err(error), _) => return Err(error),
        };
        let commit = listing.commit.clone();
        for name in SMALL_FILES {
            if let Some(file) = listing.file(name) {
                let file = self.client.described(repository, &commit, file, job)?;
                download::blob(&self.client, (repository, &commit), &cache, &file, job)?;
                cache.link(&commit, &file)?;
            }
        }
        let snapshot = ModelFiles::directory(cache.snapshot(&commit)?).map_err(model)?;
        let weights = weight_files(&snapshot).map_err(model)?;
        let weights = weights.iter().map(|name| {
            let file = listing.file(name).ok_or_else(|| HubError::Refused {
                repository: repository.clone(),
                sentence: format!(
                    "it has no {name} at the commit {commit}: Kvasir serves models in safetensors files, as Hugging Face writes them; choose another repository or revision"
                ),
            })?;
            self.client.described(repository, &commit, file, job)
        });
        let weights = weights.collect::<Result<_, _>>()?;
        cache.remember(&repository.revision, &commit);
        Ok(Found {
            repository: repository.clone(),
            commit,
            cache,
            weights,
        })
    }

    /// A directory like the model's with nothing of the weights but their headers, for who wants to know whether the
    /// model fits. `None`: the cache has the weights themselves.
    pub fn headers(&self, found: &Found, job: &Job) -> Result<Option<HeaderFolder>, HubError> {
        let is_cached = |file: &RemoteFile| found.cache.has(file);
        if found.weights.iter().all(is_cached) {
            return Ok(None);
        }
        HeaderFolder::fetch(&self.client, found, job).map(Some)
    }

    /// Fetches the weights, and gives the model's directory.
    pub fn fetch(&self, found: &Found, job: &Job) -> Result<PathBuf, HubError> {
        let Found {
            repository,
            commit,
            cache,
            weights,
        } = found;
        job.expect(weights.iter().map(|file| file.size).sum());
        cache.check_room(repository, weights)?;
        // The largest first, so that none of them is left alone at the end.
        let mut order: Vec<&RemoteFile> = weights.iter().collect();
        order.sort_by_key(|file| std::cmp::Reverse(file.size));
        let next = AtomicUsize::new(0);
        let work = || {
            while let Some(file) = order.get(next.fetch_add(1, Ordering::Relaxed)) {
                download::blob(&self.client, (repository, commit), cache, file, job)?;
            }
            Ok(())
        };
        let n_threads = AT_ONCE.min(order.len());
        std::thread::scope(|scope| {
            let workers: Vec<_> = (0..n_threads)
                .map(|_| {
                    // Who fails stops the others.
                    scope.spawn(|| work().inspect_err(|_| job.stop()))
                })
                .collect();
            let results = workers.into_iter().map(|worker| match worker.join() {
                Ok(result) => result,
                Err(panic) => std::panic::resume_unwind(panic),
            });
            let mut results: Vec<Result<(), HubError>> = results.collect();
            // What stopped the others says more than that they were stopped.
            results.sort_by_key(|result| matches!(result, Err(HubError::Stopped)));
            results.into_iter().collect::<Result<(), _>>()
        })?;
        for file in weights {
            cache.link(commit, file)?;
        }
        cache.snapshot(commit)
    }
}

fn model(error: crate::model::LoadError) -> HubError {
    HubError::Model(Box::new(error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_repository_is_named_as_on_the_hub() {
        for (found, want) in [
            ("hf://Qwen/Qwen3-8B", Some(("Qwen/Qwen3-8B", "main"))),
            ("hf://a/b@v1.0", Some(("a/b", "v1.0"))),
            ("hf://a/b@refs/pr/3", Some(("a/b", "refs/pr/3"))),
            ("hf://b", None),
            ("hf://a/b/c", None),
            ("hf://a/..", None),
            ("hf://a/b@", None),
            ("hf://a/b@../x", None),
            ("hf://a/b c", None),
            ("a/b", None),
        ] {
            let parsed = found.parse::<Repository>().ok();
            let parsed = parsed.map(|it| (it.name, it.revision));
            let want = want.map(|(name, revision)| (name.to_owned(), revision.to_owned()));
            assert_eq!(parsed, want, "{found}");
        }
    }

    #[test]
    fn settings_are_those_of_hugging_faces_tools() {
        let of = |dir: Option<&str>, variables: &[(&str, &str)]| {
            let found = |name: &str| variables.iter().find(|(other, _)| *other == name);
            Settings::new(dir.map(Path::new), |name| {
                found(name).map(|(_, value)| (*value).to_owned())
            })
        };
        let plain = of(None, &[("HOME", "/h")]);
        assert_eq!(plain.endpoint, DEFAULT_ENDPOINT);
        assert_eq!(plain.token, None);
        assert_eq!(plain.cache, Path::new("/h/.cache/huggingface/hub"));
        let home = of(None, &[("HF_HOME", "/hf"), ("HF_TOKEN", " secret\n")]);
        assert_eq!(home.cache, Path::new("/hf/hub"));
        assert_eq!(home.token.as_deref(), Some("secret"));
        assert!(!format!("{home:?}").contains("secret"), "{home:?}");
        let cache = [("HF_HOME", "/hf"), ("HF_HUB_CACHE", "/c")];
        assert_eq!(of(None, &cache).cache, Path::new("/c"));
        assert_eq!(of(Some("/flag"), &cache).cache, Path::new("/flag"));
        let mirror = of(
            None,
            &[("HF_ENDPOINT", "http://mirror:80/"), ("HF_TOKEN", "")],
        );
        assert_eq!(mirror.endpoint, "http://mirror:80");
        assert_eq!(mirror.token, None);
    }
}
