//! A small hub: the demo model as a repository, large files behind a redirect to another address as on the real one, and
//! whatever trouble a test asks for.

#![allow(
    clippy::unwrap_used,
    reason = "the lint's exception for tests does not reach their modules"
)]

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard};

use serde_json::json;
use sha1::Sha1;
use sha2::{Digest, Sha256};

pub(crate) const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
pub(crate) const SHARD: &str = "model-00001-of-00001.safetensors";
pub(crate) const TOKEN: &str = "hf_right";

/// What goes wrong.
#[derive(Clone, Debug, Default)]
pub(crate) struct Trouble {
    /// The hub's first answers are 429, and say when to come again.
    pub(crate) n_limited: usize,
    /// The first answers for a large file are 503.
    pub(crate) n_unavailable: usize,
    /// A connection for a large file ends after so many bytes, the first times.
    pub(crate) breaks: Option<(usize, usize)>,
    /// A connection for a large file brings half of it and then nothing more, without ending.
    pub(crate) stalls: bool,
    /// Large files come with a byte changed.
    pub(crate) is_corrupt: bool,
    /// Ranges are ignored: the whole comes each time.
    pub(crate) no_ranges: bool,
    /// The list gives neither sizes nor hashes.
    pub(crate) no_hashes: bool,
    /// The repository needs a token.
    pub(crate) is_private: bool,
    /// It has no safetensors.
    pub(crate) no_weights: bool,
}

/// A request for a large file, as it came.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Asked {
    pub(crate) range: Option<String>,
    pub(crate) n_sent: usize,
    pub(crate) had_token: bool,
}

#[derive(Debug, Default)]
struct State {
    trouble: Trouble,
    /// The small files and the list.
    hub: Vec<String>,
    /// What the redirects lead to.
    large: Vec<Asked>,
}

#[derive(Clone)]
pub(crate) struct HubServer {
    pub(crate) endpoint: String,
    state: Arc<Mutex<State>>,
}

/// The repository: names and bytes. Only what serving needs may be asked for.
fn files() -> BTreeMap<&'static str, Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("demo-model");
    let mut files = BTreeMap::new();
    for name in [
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ] {
        files.insert(name, std::fs::read(folder.join(name)).unwrap());
    }
    files.insert(
        SHARD,
        std::fs::read(folder.join("model.safetensors")).unwrap(),
    );
    let index = json!({ "weight_map": { "model.norm.weight": SHARD } });
    files.insert("model.safetensors.index.json", index.to_string().into());
    for name in ["README.md", "consolidated.safetensors", "pytorch_model.bin"] {
        files.insert(name, b"not for servers".to_vec());
    }
    files
}

fn is_large(name: &str) -> bool {
    name.ends_with(".safetensors")
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

fn hash_of(name: &str, bytes: &[u8]) -> String {
    match is_large(name) {
        true => hex(&Sha256::digest(bytes)),
        false => {
            let mut hasher = Sha1::new_with_prefix(format!("blob {}\0", bytes.len()));
            hasher.update(bytes);
            hex(&hasher.finalize())
        }
    }
}

struct Request {
    path: String,
    headers: BTreeMap<String, String>,
}

impl Request {
    fn read(stream: &TcpStream) -> Option<Self> {
        let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
        let first = lines.next()?.ok()?;
        let path = first.split(' ').nth(1)?.to_owned();
        let mut headers = BTreeMap::new();
        for line in lines {
            let line = line.ok()?;
            let Some((name, value)) = line.split_once(": ") else {
                break;
            };
            headers.insert(name.to_lowercase(), value.to_owned());
        }
        Some(Self { path, headers })
    }
}

fn answer(mut stream: TcpStream, status: &str, headers: &[(&str, String)], body: &[u8]) {
    let mut head = format!(
        "HTTP/1.1 {status}\r\nconnection: close\r\ncontent-length: {}\r\n",
        body.len()
    );
    for (name, value) in headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    head.push_str("\r\n");
    // A client that has enough goes away.
    let _ = stream.write_all(head.as_bytes());
    let _ = stream.write_all(body);
}

impl HubServer {
    pub(crate) fn start(trouble: Trouble) -> Self {
        let [hub, large] = [0; 2].map(|_| TcpListener::bind("127.0.0.1:0").unwrap());
        let state = Arc::new(Mutex::new(State {
            trouble,
            ..State::default()
        }));
        let server = Self {
            endpoint: format!("http://{}", hub.local_addr().unwrap()),
            state,
        };
        let away = format!("http://{}", large.local_addr().unwrap());
        let each = |listener: TcpListener, serve: Arc<dyn Fn(TcpStream) + Send + Sync>| {
            std::thread::spawn(move || {
                for stream in listener.incoming() {
                    let serve = Arc::clone(&serve);
                    std::thread::spawn(move || serve(stream.unwrap()));
                }
            });
        };
        let of_hub = server.clone();
        each(hub, Arc::new(move |stream| of_hub.serve_hub(stream, &away)));
        let of_large = server.clone();
        each(large, Arc::new(move |stream| of_large.serve_large(stream)));
        server
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// The requests for large files so far.
    pub(crate) fn large(&self) -> Vec<Asked> {
        self.state().large.clone()
    }

    /// The paths that the hub itself was asked for so far.
    pub(crate) fn paths(&self) -> Vec<String> {
        self.state().hub.clone()
    }

    /// From now on this goes wrong.
    pub(crate) fn trouble(&self, trouble: Trouble) {
        self.state().trouble = trouble;
    }

    fn serve_hub(&self, stream: TcpStream, away: &str) {
        let Some(Request { path, headers }) = Request::read(&stream) else {
            return;
        };
        let mut state = self.state();
        state.hub.push(path.clone());
        if state.trouble.n_limited > 0 {
            state.trouble.n_limited -= 1;
            let after = [("retry-after", "0".to_owned())];
            return answer(stream, "429 Too Many Requests", &after, b"");
        }
        let trouble = state.trouble.clone();
        drop(state);
        let code = |code: &str| [("x-error-code", code.to_owned())];
        match headers.get("authorization").map(String::as_str) {
            Some("Bearer hf_right") => {}
            Some(_) => return answer(stream, "401 Unauthorized", &[], b"{}"),
            None if trouble.is_private => {
                return answer(stream, "401 Unauthorized", &code("RepoNotFound"), b"{}");
            }
            None => {}
        }
        let path = path.split('?').next().unwrap_or_default();
        if let Some(rest) = path.strip_prefix("/api/models/") {
            return match rest.split_once("/revision/") {
                Some(("kvasir/demo", "main" | COMMIT)) => {
                    answer(stream, "200 OK", &[], list(&trouble).as_bytes())
                }
                Some(("kvasir/demo", _)) => {
                    answer(stream, "404 Not Found", &code("RevisionNotFound"), b"{}")
                }
                Some(("kvasir/gated", _)) => {
                    answer(stream, "403 Forbidden", &code("GatedRepo"), b"{}")
                }
                _ => answer(stream, "404 Not Found", &code("RepoNotFound"), b"{}"),
            };
        }
        let files = files();
        let prefix = format!("/kvasir/demo/resolve/{COMMIT}/");
        let name = path.strip_prefix(&prefix).unwrap_or_default();
        let Some(bytes) = files.get(name) else {
            return answer(stream, "404 Not Found", &code("EntryNotFound"), b"");
        };
        let hash = hash_of(name, bytes);
        if is_large(name) {
            let headers = [
                ("location", format!("{away}/{name}?signature=x")),
                ("x-linked-etag", format!("\"{hash}\"")),
                ("x-linked-size", bytes.len().to_string()),
                ("x-repo-commit", COMMIT.to_owned()),
            ];
            return answer(stream, "302 Found", &headers, b"");
        }
        answer(stream, "200 OK", &[("etag", format!("\"{hash}\""))], bytes);
    }

    fn serve_large(&self, stream: TcpStream) {
        let Some(Request { path, headers }) = Request::read(&stream) else {
            return;
        };
        let name = path
            .trim_start_matches('/')
            .split('?')
            .next()
            .unwrap_or_default();
        let mut bytes = files().remove(name).unwrap();
        let mut state = self.state();
        let trouble = &mut state.trouble;
        if trouble.n_unavailable > 0 {
            trouble.n_unavailable -= 1;
            return answer(stream, "503 Service Unavailable", &[], b"");
        }
        if trouble.is_corrupt {
            let last = bytes.len() - 1;
            bytes[last] ^= 1;
        }
        let range = headers.get("range").cloned();
        let total = bytes.len();
        let bounds = range.as_ref().filter(|_| !trouble.no_ranges).map(|range| {
            let (from, to) = range
                .strip_prefix("bytes=")
                .unwrap()
                .split_once('-')
                .unwrap();
            let to: usize = to.parse().unwrap_or(total - 1);
            (from.parse::<usize>().unwrap(), to.min(total - 1))
        });
        let (from, to) = bounds.unwrap_or((0, total - 1));
        let is_whole_rest = to == total - 1;
        let mut n_sent = to + 1 - from;
        // Not of the header, which is asked for by itself.
        if let Some((after, times)) = &mut trouble.breaks
            && *times > 0
            && is_whole_rest
        {
            *times -= 1;
            n_sent = n_sent.min(*after);
        }
        let stalls = trouble.stalls && is_whole_rest;
        if stalls {
            n_sent /= 2;
        }
        state.large.push(Asked {
            range,
            n_sent,
            had_token: headers.contains_key("authorization"),
        });
        drop(state);
        let status = match bounds {
            Some(_) => "206 Partial Content",
            None => "200 OK",
        };
        let mut head = format!(
            "HTTP/1.1 {status}\r\nconnection: close\r\ncontent-length: {}\r\n",
            to + 1 - from
        );
        if bounds.is_some() {
            head.push_str(&format!("content-range: bytes {from}-{to}/{total}\r\n"));
        }
        head.push_str("\r\n");
        let mut stream = stream;
        let _ = stream.write_all(head.as_bytes());
        let _ = stream.write_all(&bytes[from..from + n_sent]);
        if stalls {
            // Until the client goes away.
            let _ = std::io::copy(&mut stream, &mut std::io::sink());
        }
    }
}

fn list(trouble: &Trouble) -> String {
    let files = files();
    let listed = files
        .iter()
        .filter(|(name, _)| !trouble.no_weights || !is_large(name));
    let siblings = listed.map(|(name, bytes)| {
        let hash = hash_of(name, bytes);
        match (trouble.no_hashes, is_large(name)) {
            (true, _) => json!({ "rfilename": name }),
            (false, true) => {
                json!({ "rfilename": name, "size": bytes.len(), "blobId": "f".repeat(40),
                "lfs": { "sha256": hash, "size": bytes.len(), "pointerSize": 134 } })
            }
            (false, false) => json!({ "rfilename": name, "size": bytes.len(), "blobId": hash }),
        }
    });
    json!({ "id": "kvasir/demo", "sha": COMMIT, "siblings": siblings.collect::<Vec<_>>() })
        .to_string()
}
