//! Requests to a hub: redirects followed by hand, so that the token goes to the hub and nowhere else; what may pass is
//! tried again, and what won't is a sentence that names the field.

use std::time::Duration;

use serde::Deserialize;
use ureq::http::{HeaderMap, Response, StatusCode, header};
use ureq::tls::{Certificate, PemItem, RootCerts, TlsConfig};
use ureq::{Agent, Body};

use super::job::Job;
use super::refusal::Asked;
use super::{HubError, Repository, Settings};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// A hub that says nothing for so long has broken off.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);
const READ_TIMEOUT: Duration = Duration::from_secs(20);

const MAX_REDIRECTS: usize = 10;
/// What a hub says of a repository of thousands of files is a few megabytes.
const MAX_LISTING_BYTES: u64 = 64 << 20;

/// Attempts in a row that bring nothing, before it is given up.
const ATTEMPTS: u32 = 6;
/// After the first of them; doubled with each further one.
const FIRST_PAUSE: Duration = Duration::from_millis(500);
const LEAST_PAUSE: Duration = Duration::from_millis(100);
/// A hub that limits rates asks for minutes; it is waited for so long in all.
const LONGEST_WAIT: Duration = Duration::from_secs(15 * 60);

/// Asks one hub.
pub(super) struct Client {
    agent: Agent,
    endpoint: String,
    token: Option<String>,
}

/// What a repository holds at a commit.
#[derive(Debug)]
pub(super) struct Listing {
    pub(super) commit: String,
    files: Vec<Sibling>,
}

/// A file of a repository, and how to tell that it is that file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct RemoteFile {
    pub(super) name: String,
    pub(super) size: u64,
    pub(super) hash: Hash,
}

/// How a hub names what a file holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Hash {
    /// Of large files (LFS): SHA-256 of the bytes.
    Sha256(String),
    /// Of small ones: git's, SHA-1 of `blob LENGTH\0` and the bytes.
    Git(String),
}

/// Why an attempt brought nothing.
#[derive(Debug)]
pub(super) enum Trouble {
    /// It may pass; the hub may say after how long.
    Passing {
        why: String,
        after: Option<Duration>,
    },
    /// It won't.
    Final(HubError),
}

impl Trouble {
    fn passing(why: impl Into<String>) -> Self {
        Trouble::Passing {
            why: why.into(),
            after: None,
        }
    }
}

/// An answer, and what the hub itself said before it sent us on.
pub(super) struct Answer {
    pub(super) response: Response<Body>,
    /// Of the hub's first answer.
    pub(super) first: HeaderMap,
}

#[derive(Debug, Deserialize)]
struct Info {
    sha: Option<String>,
    #[serde(default)]
    siblings: Vec<Sibling>,
}

/// A file as a hub lists it with `blobs=true`.
#[derive(Clone, Debug, Deserialize)]
pub(super) struct Sibling {
    #[serde(rename = "rfilename")]
    name: String,
    size: Option<u64>,
    #[serde(rename = "blobId")]
    blob_id: Option<String>,
    lfs: Option<Lfs>,
}

#[derive(Clone, Debug, Deserialize)]
struct Lfs {
    #[serde(alias = "oid")]
    sha256: Option<String>,
    size: Option<u64>,
}

impl Hash {
    /// SHA-256 has 64 digits, git's 40; anything else is no hash, and never a file's name.
    pub(super) fn from_hex(hex: &str) -> Option<Self> {
        let is_hex = hex.bytes().all(|c| c.is_ascii_hexdigit());
        match hex.len() {
            64 if is_hex => Some(Hash::Sha256(hex.to_lowercase())),
            40 if is_hex => Some(Hash::Git(hex.to_lowercase())),
            _ => None,
        }
    }

    pub(super) fn hex(&self) -> &str {
        match self {
            Hash::Sha256(hex) | Hash::Git(hex) => hex,
        }
    }
}

impl Listing {
    /// A file at the root of the repository.
    pub(super) fn file(&self, name: &str) -> Option<&Sibling> {
        self.files.iter().find(|file| file.name == name)
    }
}

impl Client {
    pub(super) fn new(settings: &Settings) -> Result<Self, HubError> {
        let endpoint = settings.endpoint.clone();
        if origin(&endpoint).is_none() {
            return Err(HubError::Settings(format!(
                "HF_ENDPOINT is {endpoint:?}, expected an address such as {}",
                super::DEFAULT_ENDPOINT
            )));
        }
        let token = settings.token.clone();
        if token
            .as_ref()
            .is_some_and(|t| !t.bytes().all(|c| c.is_ascii_graphic()))
        {
            return Err(HubError::Settings(
                "HF_TOKEN (model.source.huggingFace.tokenSecret) holds characters that no token has"
                    .to_owned(),
            ));
        }
        let tls = match &settings.authorities {
            Some(path) => TlsConfig::builder().root_certs(authorities(path)?).build(),
            None => TlsConfig::default(),
        };
        let agent = Agent::config_builder()
            .user_agent(concat!("kvasir/", env!("CARGO_PKG_VERSION")))
            .tls_config(tls)
            .timeout_resolve(Some(CONNECT_TIMEOUT))
            .timeout_connect(Some(CONNECT_TIMEOUT))
            .timeout_recv_response(Some(ANSWER_TIMEOUT))
            .timeout_per_read(Some(READ_TIMEOUT))
            .http_status_as_error(false)
            .max_redirects(0)
            .build()
            .into();
        Ok(Self {
            agent,
            endpoint,
            token,
        })
    }

    /// What the repository holds at its revision. Where `in_a_hurry` one attempt must do.
    pub(super) fn list(
        &self,
        repository: &Repository,
        in_a_hurry: bool,
        job: &Job,
    ) -> Result<Listing, HubError> {
        let Repository { name, revision } = repository;
        let url = format!(
            "{}/api/models/{name}/revision/{}?blobs=true",
            self.endpoint,
            encoded(revision)
        );
        let mut patience = Patience::new(self, repository, if in_a_hurry { 1 } else { ATTEMPTS });
        loop {
            match self.listed(&url, repository) {
                Ok(listing) => return Ok(listing),
                Err(trouble) => patience.again(trouble, job)?,
            }
        }
    }

    fn listed(&self, url: &str, repository: &Repository) -> Result<Listing, Trouble> {
        let mut answer = self.get(url, None, repository)?;
        let body = answer.response.body_mut().with_config();
        let text = body
            .limit(MAX_LISTING_BYTES)
            .read_to_string()
            .map_err(|error| Trouble::passing(format!("its list of files broke off: {error}")))?;
        let info: Info = serde_json::from_str(&text)
            .map_err(|error| Trouble::passing(format!("it gives no list of files: {error}")))?;
        let commit = info.sha.filter(|sha| {
            let is_word = |c: char| c.is_ascii_alphanumeric();
            !sha.is_empty() && sha.chars().all(is_word)
        });
        Ok(Listing {
            commit: commit
                .ok_or_else(|| Trouble::passing("it doesn't say which commit the revision is"))?,
            files: info.siblings,
        })
    }

    /// Size and hash of a file: from the list, or else from the hub's answer for the file itself.
    pub(super) fn described(
        &self,
        repository: &Repository,
        commit: &str,
        file: &Sibling,
        job: &Job,
    ) -> Result<RemoteFile, HubError> {
        let lfs = file.lfs.as_ref();
        let size = lfs.and_then(|lfs| lfs.size).or(file.size);
        let hash = match lfs {
            Some(lfs) => lfs.sha256.as_deref(),
            None => file.blob_id.as_deref(),
        };
        let name = file.name.clone();
        if let Some((size, hash)) = size.zip(hash.and_then(Hash::from_hex)) {
            return Ok(RemoteFile { name, size, hash });
        }
        let url = self.url_of(repository, commit, &name);
        let mut patience = Patience::new(self, repository, ATTEMPTS);
        let answer = loop {
            // One byte, whose answer says how many there are.
            match self.get(&url, Some((0, Some(0))), repository) {
                Ok(answer) => break answer,
                Err(trouble) => patience.again(trouble, job)?,
            }
        };
        let linked = |name: &str| text(&answer.first, name);
        let etag = linked("x-linked-etag").or_else(|| linked("etag"));
        let hash = etag.and_then(|etag| {
            let etag = etag.trim_start_matches("W/").trim_matches('"');
            Hash::from_hex(etag)
        });
        let size = linked("x-linked-size").and_then(|size| size.parse().ok());
        let size = size.or_else(|| total_of(answer.response.headers()));
        match size.zip(hash) {
            Some((size, hash)) => Ok(RemoteFile { name, size, hash }),
            None => Err(HubError::Refused {
                repository: repository.clone(),
                sentence: format!(
                    "{} gives no size and hash of {name}, so that it can't be checked; use another endpoint",
                    self.endpoint
                ),
            }),
        }
    }

    /// Where a file of a commit is.
    pub(super) fn url_of(
        &self,
        Repository { name, .. }: &Repository,
        commit: &str,
        file: &str,
    ) -> String {
        format!(
            "{}/{name}/resolve/{commit}/{}",
            self.endpoint,
            encoded(file)
        )
    }

    pub(super) fn patience<'a>(&'a self, repository: &'a Repository) -> Patience<'a> {
        Patience::new(self, repository, ATTEMPTS)
    }

    /// One attempt: the answer where there is something to read. A range is from a byte to the end, or to another byte.
    pub(super) fn get(
        &self,
        url: &str,
        range: Option<(u64, Option<u64>)>,
        repository: &Repository,
    ) -> Result<Answer, Trouble> {
        let mut url = url.to_owned();
        let mut first: Option<HeaderMap> = None;
        for _ in 0..=MAX_REDIRECTS {
            let mut request = self.agent.get(&url);
            if let Some((from, to)) = range {
                let to = to.map(|to| to.to_string()).unwrap_or_default();
                request = request.header(header::RANGE, format!("bytes={from}-{to}"));
            }
            if let Some(token) = &self.token
                && origin(&url) == origin(&self.endpoint)
            {
                request = request.header(header::AUTHORIZATION, format!("Bearer {token}"));
            }
            let response = request
                .call()
                .map_err(|error| Trouble::passing(error.to_string()))?;
            let first = first.get_or_insert_with(|| response.headers().clone());
            if !response.status().is_redirection() {
                return match response.status() {
                    StatusCode::OK
                    | StatusCode::PARTIAL_CONTENT
                    | StatusCode::RANGE_NOT_SATISFIABLE => Ok(Answer {
                        first: first.clone(),
                        response,
                    }),
                    status => Err(self.trouble(status, response.headers(), repository)),
                };
            }
            let to = text(response.headers(), "location");
            url = to
                .and_then(|to| absolute(&url, to))
                .ok_or_else(|| Trouble::passing("it sends us on to nowhere"))?;
        }
        Err(Trouble::passing(format!(
            "it sent us on {MAX_REDIRECTS} times"
        )))
    }

    fn trouble(&self, status: StatusCode, headers: &HeaderMap, repository: &Repository) -> Trouble {
        let passes = [StatusCode::TOO_MANY_REQUESTS, StatusCode::REQUEST_TIMEOUT];
        if passes.contains(&status) || status.is_server_error() {
            let after = text(headers, "retry-after").and_then(|after| after.trim().parse().ok());
            return Trouble::Passing {
                why: format!("it answers {status}"),
                after: after.map(Duration::from_secs),
            };
        }
        let asked = Asked {
            endpoint: &self.endpoint,
            repository,
            has_token: self.token.is_some(),
        };
        Trouble::Final(HubError::Refused {
            repository: repository.clone(),
            sentence: asked.refusal(status.as_u16(), text(headers, "x-error-code")),
        })
    }
}

/// How long what may pass is tried again.
pub(super) struct Patience<'a> {
    client: &'a Client,
    repository: &'a Repository,
    attempts: u32,
    n_failed: u32,
    waited: Duration,
}

impl<'a> Patience<'a> {
    fn new(client: &'a Client, repository: &'a Repository, attempts: u32) -> Self {
        Self {
            client,
            repository,
            attempts,
            n_failed: 0,
            waited: Duration::ZERO,
        }
    }

    /// Something came.
    pub(super) fn renew(&mut self) {
        self.n_failed = 0;
        self.waited = Duration::ZERO;
    }

    /// Waits before the next attempt; `Err` where there is to be none.
    pub(super) fn again(&mut self, trouble: Trouble, job: &Job) -> Result<(), HubError> {
        let (why, after) = match trouble {
            Trouble::Final(error) => return Err(error),
            Trouble::Passing { why, after } => (why, after),
        };
        // A hub that says when to come again is well, and isn't given up for it.
        self.n_failed += u32::from(after.is_none() || self.attempts == 1);
        let pause = match after {
            Some(after) => after.max(LEAST_PAUSE),
            None => FIRST_PAUSE.saturating_mul(1 << self.n_failed.saturating_sub(1).min(6)),
        };
        if self.n_failed >= self.attempts || self.waited + pause > LONGEST_WAIT {
            return Err(HubError::Unreachable {
                repository: self.repository.clone(),
                endpoint: self.client.endpoint.clone(),
                waited_s: self.waited.as_secs(),
                why,
            });
        }
        tracing::warn!(
            why,
            again_in_s = pause.as_secs_f64(),
            "the hub is asked again"
        );
        self.waited += pause;
        job.pause(pause)
    }

    /// The connection ended before what was asked for had come.
    pub(super) fn broke_off(&mut self, job: &Job) -> Result<(), HubError> {
        self.again(Trouble::passing("the connection broke off"), job)
    }
}

fn text<'h>(headers: &'h HeaderMap, name: &str) -> Option<&'h str> {
    headers.get(name)?.to_str().ok()
}

/// All bytes of the file that a partial answer is a part of: `Content-Range: bytes 0-7/TOTAL`, or else its length.
fn total_of(headers: &HeaderMap) -> Option<u64> {
    match text(headers, "content-range") {
        Some(range) => range.rsplit('/').next()?.parse().ok(),
        None => text(headers, "content-length")?.parse().ok(),
    }
}

/// `https://host:port` of an address.
fn origin(url: &str) -> Option<&str> {
    let (scheme, rest) = url.split_once("://")?;
    let authority = rest.split(['/', '?', '#']).next()?;
    let is_known = scheme == "https" || scheme == "http";
    (is_known && !authority.is_empty()).then(|| &url[..scheme.len() + 3 + authority.len()])
}

/// Where a redirect from `url` leads.
fn absolute(url: &str, to: &str) -> Option<String> {
    match to.starts_with('/') && !to.starts_with("//") {
        true => Some(format!("{}{to}", origin(url)?)),
        false => origin(to).map(|_| to.to_owned()),
    }
}

/// A name as one part of a path.
fn encoded(name: &str) -> String {
    let mut encoded = String::new();
    for byte in name.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' => {
                encoded.push(byte.into());
            }
            _ => encoded.push_str(&format!("%{byte:02X}")),
        }
    }
    encoded
}

/// The certificates in a PEM file.
fn authorities(path: &std::path::Path) -> Result<RootCerts, HubError> {
    let wrong = |why: String| {
        HubError::Settings(format!(
            "SSL_CERT_FILE: {} can't be used: {why}",
            path.display()
        ))
    };
    let pem = std::fs::read(path).map_err(|error| wrong(error.to_string()))?;
    let mut found: Vec<Certificate<'static>> = Vec::new();
    for item in ureq::tls::parse_pem(&pem) {
        if let PemItem::Certificate(certificate) = item.map_err(|error| wrong(error.to_string()))? {
            found.push(certificate);
        }
    }
    match found.is_empty() {
        true => Err(wrong("it holds no certificate in PEM form".to_owned())),
        false => Ok(found.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_redirect_may_be_within_the_hub_or_away() {
        let url = "https://hub.example:444/a/b/resolve/main/x?y=/";
        assert_eq!(origin(url), Some("https://hub.example:444"));
        for (to, want) in [
            ("/other", Some("https://hub.example:444/other")),
            ("https://cdn/x", Some("https://cdn/x")),
            ("//cdn/x", None),
            ("ftp://cdn/x", None),
            ("x", None),
        ] {
            assert_eq!(absolute(url, to).as_deref(), want, "{to}");
        }
        for wrong in ["huggingface.co", "ftp://hub", "https://", ""] {
            assert_eq!(origin(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn names_are_parts_of_a_path() {
        assert_eq!(encoded("refs/pr/1"), "refs%2Fpr%2F1");
        assert_eq!(
            encoded("model-00001.safetensors"),
            "model-00001.safetensors"
        );
        assert_eq!(encoded("a b?"), "a%20b%3F");
    }

    #[test]
    fn only_a_hash_is_a_hash() {
        let (git, sha256) = ("aB".repeat(20), "0".repeat(64));
        assert_eq!(Hash::from_hex(&git), Some(Hash::Git("ab".repeat(20))));
        assert_eq!(Hash::from_hex(&sha256), Some(Hash::Sha256(sha256.clone())));
        for wrong in ["", "../../etc", &"g".repeat(40), &"0".repeat(41)] {
            assert_eq!(Hash::from_hex(wrong), None, "{wrong}");
        }
    }
}
