//! Who may call the server, how much, and what is told of it: keys, limits, request ids, the access log, CORS, TLS.

#![allow(
    clippy::unwrap_used,
    reason = "the lint's exception for tests does not reach their helpers"
)]

mod client;

use std::io::Read;
use std::net::TcpStream;
use std::process::Command;
use std::sync::Arc;

use client::{Client, Server, refusal, send, send_with};
use serde_json::{Value, json};
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::{CertificateDer, ServerName};
use tokio_rustls::rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};

const COMPLETIONS: &str = "/v1/completions";
const RED: &[(&str, &str)] = &[("authorization", "Bearer red-hush")];
const BLUE: &[(&str, &str)] = &[("x-api-key", "blue-hush")];

fn bearer(key: &str) -> String {
    format!("Bearer {key}")
}

fn call(server: &Client, headers: &[(&str, &str)], body: &Value) -> (u16, Value) {
    let answer = server.open_with("POST", COMPLETIONS, headers, &body.to_string());
    (answer.status, serde_json::from_str(&answer.text()).unwrap())
}

/// As the kubelet mounts a Secret: files behind a symlink that is replaced at once.
struct Secret(tempfile::TempDir);

impl Secret {
    fn new(files: &[(&str, &str)]) -> Self {
        let secret = Self(tempfile::tempdir().unwrap());
        secret.replace("1", files);
        for (name, _) in files {
            std::os::unix::fs::symlink(format!("..data/{name}"), secret.0.path().join(name))
                .unwrap();
        }
        secret
    }

    fn path(&self, name: &str) -> String {
        self.0.path().join(name).to_str().unwrap().to_owned()
    }

    fn replace(&self, version: &str, files: &[(&str, &str)]) {
        let mount = self.0.path();
        std::fs::create_dir(mount.join(version)).unwrap();
        for (name, content) in files {
            std::fs::write(mount.join(version).join(name), content).unwrap();
        }
        std::os::unix::fs::symlink(version, mount.join("..tmp")).unwrap();
        std::fs::rename(mount.join("..tmp"), mount.join("..data")).unwrap();
    }
}

#[test]
fn every_route_needs_a_key_but_the_probes() {
    let keys = ["--api-key", "red:red-hush", "blue:blue-hush"];
    let server = Server::start(&keys);
    let body = json!({"prompt": "A block", "max_tokens": 1}).to_string();
    let routes = [
        ("GET", "/v1/models", 200),
        ("GET", "/v1/models/kvasir-demo", 200),
        ("GET", "/load", 200),
        ("GET", "/metrics", 200),
        ("GET", "/version", 200),
        ("POST", COMPLETIONS, 200),
        ("POST", "/v1/chat/completions", 400),
        ("POST", "/tokenize", 400),
        ("POST", "/detokenize", 400),
        ("GET", COMPLETIONS, 405),
        ("GET", "/no/such", 404),
        ("OPTIONS", "/v1/models", 405),
    ];
    for (method, path, with_key) in routes {
        let none = server.open(method, path, &body);
        assert_eq!(none.status, 401, "{method} {path}");
        assert_eq!(none.header("www-authenticate"), Some("Bearer"));
        let id = none.header("x-request-id").unwrap();
        assert_eq!(id.len(), 32, "{id}");
        let error: Value = serde_json::from_str(&none.text()).unwrap();
        assert_eq!(error["error"]["code"], "invalid_api_key", "{error}");
        assert_eq!(error["error"]["type"], "invalid_request_error", "{error}");
        for headers in [RED, BLUE] {
            let answer = server.open_with(method, path, headers, &body);
            assert_eq!(answer.status, with_key, "{method} {path}");
        }
    }
    for path in ["/health", "/ready"] {
        assert_eq!(server.get(path).0, 200, "{path}");
    }
    let long = bearer(&"x".repeat(5_000));
    for (headers, why) in [
        ([("authorization", "Bearer red-hus")], "not the whole"),
        ([("authorization", "Bearer red-hush2")], "more than it"),
        ([("authorization", "Bearer red:red-hush")], "its name too"),
        ([("authorization", "Bearer ")], "nothing"),
        ([("authorization", "Basic red-hush")], "another scheme"),
        ([("authorization", "red-hush")], "no scheme"),
        ([("authorization", "Bearer \u{ff}")], "not ASCII"),
        ([("authorization", long.as_str())], "long"),
        ([("x-api-key", "")], "empty"),
        ([("cookie", "red-hush")], "elsewhere"),
    ] {
        let answer = server.open_with("GET", "/v1/models", &headers, "");
        assert_eq!(answer.status, 401, "{why}");
        assert!(!answer.text().contains("hush"), "{why}");
    }
    let scheme = [("authorization", "bEARER  red-hush")];
    let answer = server.open_with("GET", "/v1/models", &scheme, "");
    assert_eq!(
        answer.status, 200,
        "the scheme's case and blanks don't count"
    );

    let server = Server::start(&[&keys[..], &["--management-port", "0"]].concat());
    let management = server.management.as_ref().unwrap();
    for path in ["/health", "/ready", "/load", "/metrics"] {
        assert_eq!(management.get(path).0, 200, "{path}");
    }
    assert_eq!(server.get("/health").0, 200);
    assert_eq!(server.get("/load").0, 401, "not even that it isn't there");
}

#[test]
fn tenants_do_not_find_each_others_prefixes() {
    let prompt: Vec<u32> = (300..400).collect();
    let cached = |server: &Client, headers: &[(&str, &str)], salt: Option<&str>| {
        let mut body = json!({"prompt": prompt, "max_tokens": 1, "temperature": 0});
        if let Some(salt) = salt {
            body["cache_salt"] = json!(salt);
        }
        let (status, answer) = call(server, headers, &body);
        assert_eq!(status, 200, "{answer}");
        let n = answer["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64();
        (n.unwrap(), answer["choices"][0]["text"].clone())
    };
    let server = Server::start(&["--api-key", "red:red-hush", "blue:blue-hush", "red:next"]);
    let (n, text) = cached(&server, RED, None);
    assert_eq!(n, 0);
    for (why, headers, salt, is_found) in [
        ("the same tenant", RED, None, true),
        ("another", BLUE, None, false),
        ("its own by now", BLUE, None, true),
        ("its key's name as a salt", BLUE, Some("red"), false),
        (
            "another key of the same name",
            &[("x-api-key", "next")],
            None,
            true,
        ),
    ] {
        let (n, again) = cached(&server, headers, salt);
        assert_eq!(n >= 96, is_found, "{why}: {n}");
        assert!(is_found || n == 0, "{why}: {n}");
        assert_eq!(again, text, "{why}");
    }
}

#[test]
fn a_file_of_keys_is_read_again_and_a_broken_one_is_not_taken() {
    let secret = Secret::new(&[("keys", "# ours\nred:red-hush\n")]);
    let log = tempfile::NamedTempFile::new().unwrap();
    let flags = [
        "--api-key-file",
        &secret.path("keys"),
        "--api-key",
        "always",
    ];
    let server = Server::start_logging(&flags, &[], log.reopen().unwrap().into());
    let status = |key: &str| {
        let bearer = bearer(key);
        let headers = [("authorization", bearer.as_str())];
        server.open_with("GET", "/v1/models", &headers, "").status
    };
    let wait_for = |why: &str, key: &str, want| {
        server.wait_for(why, "/health", |_, _| status(key) == want);
    };
    assert_eq!((status("red-hush"), status("new-hush")), (200, 401));
    secret.replace("2", &[("keys", "red:new-hush")]);
    wait_for("the new one", "new-hush", 200);
    assert_eq!((status("red-hush"), status("always")), (401, 200));
    let logged = |part: &str| {
        let log = std::fs::read_to_string(log.path()).unwrap();
        log.lines().filter(|line| line.contains(part)).count()
    };
    for (version, content) in [("3", "broken hush"), ("4", "")] {
        secret.replace(version, &[("keys", content)]);
    }
    server.wait_for("it is told", "/health", |_, _| logged("what was valid") > 0);
    assert_eq!((status("new-hush"), status("always")), (200, 200));
    secret.replace("5", &[("keys", "blue:last-hush")]);
    wait_for("mended", "last-hush", 200);
    assert_eq!(status("new-hush"), 401);
    assert!(logged("what was valid") <= 2, "once for each");
    assert_eq!(logged("hush"), 0, "no key in the log");
}

#[test]
fn mistakes_are_exit_code_2_and_a_sentence_without_the_key() {
    let secret = Secret::new(&[
        ("empty", "# none\n\n"),
        ("bad", "ok\nhush hush\n"),
        ("both", "a:hush\nb:hush"),
    ]);
    let (empty, bad, both) = (
        secret.path("empty"),
        secret.path("bad"),
        secret.path("both"),
    );
    let keys = ["--api-key", "hush"];
    for (flags, part) in [
        (
            vec!["--api-key-file", "/no/such"],
            "--api-key-file: /no/such can't be read",
        ),
        (vec!["--api-key-file", &empty], "holds no key"),
        (vec!["--api-key-file", &bad], "line 2 is not a key"),
        (
            vec!["--api-key-file", &both],
            r#"the keys of "a" and "b" are the same"#,
        ),
        (
            vec!["--api-key", "hush hush"],
            "--api-key: what was given is not a key",
        ),
        (
            vec!["--max-concurrent-requests", "1"],
            "it is a limit for each API key",
        ),
        (vec!["--ssl-certfile", &empty], "TLS needs both"),
        (
            vec!["--ssl-certfile", &empty, "--ssl-keyfile", &bad],
            "has no certificate in PEM",
        ),
        (
            vec!["--allowed-origins", "*"],
            "is not a JSON list of origins",
        ),
        (
            vec!["--requests-per-minute=-1", keys[0], keys[1]],
            "--requests-per-minute",
        ),
    ] {
        let said = refusal(&[&["--port", "0"], &flags[..]].concat());
        assert!(said.contains(part), "{flags:?}: {said}");
        assert!(!said.contains("hush"), "{flags:?}: {said}");
    }
    let help = Command::new(env!("CARGO_BIN_EXE_kvasir-server"))
        .arg("--help")
        .env("KVASIR_API_KEY", "hush")
        .output()
        .unwrap();
    let help = String::from_utf8(help.stdout).unwrap();
    assert!(
        help.contains("KVASIR_API_KEY") && !help.contains("hush"),
        "{help}"
    );
}

#[test]
fn each_key_has_its_requests() {
    let keys = ["--api-key", "red:red-hush", "blue:blue-hush"];
    let server = Server::start(&[&keys[..], &["--requests-per-minute", "2"]].concat());
    let body = json!({"prompt": "A block", "max_tokens": 1}).to_string();
    let ask = |headers| server.open_with("POST", COMPLETIONS, headers, &body);
    for left in ["1", "0"] {
        let answer = ask(RED);
        assert_eq!(answer.status, 200);
        assert_eq!(answer.header("x-ratelimit-limit-requests"), Some("2"));
        assert_eq!(answer.header("x-ratelimit-remaining-requests"), Some(left));
        assert_eq!(answer.header("x-ratelimit-limit-tokens"), None);
        let reset = answer.header("x-ratelimit-reset-requests").unwrap();
        assert!(reset.ends_with('s'), "{reset}");
    }
    let refused = ask(RED);
    assert_eq!(refused.status, 429);
    let wait: u32 = refused.header("retry-after").unwrap().parse().unwrap();
    assert!((1..=30).contains(&wait), "{wait}");
    assert_eq!(refused.header("x-ratelimit-remaining-requests"), Some("0"));
    let error: Value = serde_json::from_str(&refused.text()).unwrap();
    assert_eq!(error["error"]["code"], "rate_limit_exceeded");
    assert_eq!(error["error"]["type"], "rate_limit_error");
    let message = error["error"]["message"].as_str().unwrap();
    assert!(
        message.contains("2 requests a minute on this replica"),
        "{message}"
    );
    assert_eq!(ask(BLUE).status, 200, "another key");
    let models = server.open_with("GET", "/v1/models", RED, "");
    assert_eq!(models.status, 200, "costs nothing");
    assert_eq!(ask(&[]).status, 401, "and no limit is told");
}

#[test]
fn each_key_has_its_tokens_and_its_requests_at_once() {
    let keys = ["--api-key", "red:red-hush", "blue:blue-hush"];
    let server = Server::start(&[&keys[..], &["--tokens-per-minute", "50"]].concat());
    let prompt: Vec<u32> = (300..340).collect();
    let body = json!({"prompt": prompt, "max_tokens": 30, "ignore_eos": true}).to_string();
    let ask = |headers| server.open_with("POST", COMPLETIONS, headers, &body);
    let first = ask(RED);
    assert_eq!(first.status, 200);
    assert_eq!(first.header("x-ratelimit-limit-tokens"), Some("50"));
    first.text();
    let refused = ask(RED);
    assert_eq!(refused.status, 429, "70 of 50 are used");
    assert_eq!(refused.header("x-ratelimit-remaining-tokens"), Some("0"));
    let wait: u32 = refused.header("retry-after").unwrap().parse().unwrap();
    assert!(
        (20..=26).contains(&wait),
        "21 tokens come back in 25.2 s: {wait}"
    );
    assert_eq!(ask(BLUE).status, 200);

    let server = Server::start(&[&keys[..], &["--max-concurrent-requests", "1"]].concat());
    let endless = json!({"prompt": "A", "max_tokens": 2000, "ignore_eos": true, "stream": true});
    let endless = endless.to_string();
    let ask = |headers| server.open_with("POST", COMPLETIONS, headers, &endless);
    let mut stream = ask(RED);
    stream.chunk().unwrap();
    let refused = ask(RED);
    assert_eq!(
        (refused.status, refused.header("retry-after")),
        (429, Some("1"))
    );
    assert!(
        refused
            .text()
            .contains("1 requests at once on this replica")
    );
    assert_eq!(ask(BLUE).status, 200);
    drop(stream);
    let ends = |_: u16, _: &str| ask(RED).status == 200;
    server.wait_for("a client that leaves makes room", "/health", ends);
}

#[test]
fn requests_have_names_and_lines_in_the_log() {
    let log = tempfile::NamedTempFile::new().unwrap();
    let flags = [
        "--access-log",
        "--log-format",
        "json",
        "--api-key",
        "red:red-hush",
    ];
    let server = Server::start_logging(&flags, &[], log.reopen().unwrap().into());
    let with_id = |id: &str, path: &str, stream| {
        let body = json!({"prompt": "secret words", "max_tokens": 3, "ignore_eos": true, "stream": stream});
        let headers = [RED[0], ("x-request-id", id)];
        let answer = server.open_with("POST", path, &headers, &body.to_string());
        let id = answer.header("x-request-id").unwrap().to_owned();
        answer.text();
        id
    };
    assert_eq!(
        with_id("from-client:1", COMPLETIONS, false),
        "from-client:1"
    );
    assert_eq!(with_id("from-client:2", COMPLETIONS, true), "from-client:2");
    let long = "x".repeat(129);
    for id in [long.as_str(), "two words", "", "t\u{e4}g"] {
        let made = with_id(id, "/no/secret/path", false);
        assert!(made.len() == 32 && made != id, "{id:?}: {made}");
    }
    assert_eq!(with_id(&long[1..], COMPLETIONS, false), long[1..]);

    let lines = || -> Vec<Value> {
        let log = std::fs::read_to_string(log.path()).unwrap();
        let lines = log
            .lines()
            .map(|line| serde_json::from_str::<Value>(line).unwrap());
        let lines = lines.filter(|line| line["target"] == "kvasir_server::access_log");
        lines.map(|line| line["fields"].clone()).collect()
    };
    let all_there = |_: u16, _: &str| lines().iter().any(|line| line["request_id"] == long[1..]);
    server.wait_for("the last is logged", "/health", all_there);
    for id in ["from-client:1", "from-client:2"] {
        let lines = lines();
        let mut lines = lines.iter().filter(|line| line["request_id"] == id);
        let line = lines.next().unwrap();
        assert!(lines.next().is_none(), "once");
        for (field, want) in [
            ("method", json!("POST")),
            ("route", json!(COMPLETIONS)),
            ("status", json!(200)),
            ("key", json!("red")),
            ("completion_tokens", json!(3)),
        ] {
            assert_eq!(line[field], want, "{line}");
        }
        assert!(line["prompt_tokens"].as_u64().unwrap() > 0, "{line}");
        let seconds = |field: &str| line[field].as_f64().unwrap();
        assert!(
            0.0 < seconds("head_s") && seconds("head_s") <= seconds("duration_s"),
            "{line}"
        );
    }
    assert!(
        lines()
            .iter()
            .any(|line| line["route"] == "other" && line["status"] == 404)
    );
    let log = std::fs::read_to_string(log.path()).unwrap();
    for secret in ["secret", "hush"] {
        assert!(!log.contains(secret), "{log}");
    }
}

#[test]
fn pages_of_allowed_origins_may_ask() {
    let flags = ["--api-key", "red:red-hush", "--allowed-origins"];
    let page = "https://page.example";
    let server = Server::start(&[&flags[..], &[r#"["https://page.example"]"#]].concat());
    let question = |server: &Client, origin: &str| {
        let headers = [
            ("origin", origin),
            ("access-control-request-method", "POST"),
            (
                "access-control-request-headers",
                "authorization,x-stainless-os",
            ),
        ];
        server.open_with("OPTIONS", COMPLETIONS, &headers, "")
    };
    let allowed = "access-control-allow-origin";
    let may = question(&server, page);
    assert_eq!(may.status, 204, "a browser's question has no key");
    assert_eq!(may.header(allowed), Some(page));
    let headers = may.header("access-control-allow-headers");
    assert_eq!(headers, Some("authorization,x-stainless-os"));
    assert!(
        may.header("access-control-allow-methods")
            .unwrap()
            .contains("POST")
    );
    assert_eq!(may.header("vary"), Some("origin"));
    for other in ["https://evil.example", "https://page.example.evil", "null"] {
        let may_not = question(&server, other);
        assert_eq!(
            (may_not.status, may_not.header(allowed)),
            (401, None),
            "{other}"
        );
    }
    let refused = server.open_with("GET", "/v1/models", &[("origin", page)], "");
    assert_eq!(refused.status, 401);
    assert_eq!(refused.header(allowed), Some(page), "a page can read why");
    let exposed = refused.header("access-control-expose-headers").unwrap();
    assert!(exposed.contains("x-request-id"), "{exposed}");
    let answer = server.open_with("GET", "/v1/models", &[("origin", page), RED[0]], "");
    assert_eq!((answer.status, answer.header(allowed)), (200, Some(page)));

    let server = Server::start(&["--allowed-origins", r#"["*"]"#]);
    let may = question(&server, "null");
    assert_eq!((may.status, may.header(allowed)), (204, Some("*")));
    let server = Server::start(&[]);
    let may_not = question(&server, page);
    assert_eq!((may_not.status, may_not.header(allowed)), (405, None));
}

#[test]
fn tokens_are_told_as_text() {
    let server = Server::start(&["--enable-tokenizer-info-endpoint"]);
    for text in ["What is a block table?", " \u{e4}\u{1f600}\n\n x", ""] {
        let (_, tokens) = server.post(
            "/tokenize",
            &json!({"prompt": text, "add_special_tokens": false}),
        );
        let asked = json!({"tokens": tokens["tokens"], "model": "kvasir-demo"});
        assert_eq!(
            server.post("/detokenize", &asked),
            (200, json!({"prompt": text}))
        );
    }
    let messages = json!([{"role": "user", "content": "Hello"}]);
    let (_, chat) = server.post("/tokenize", &json!({"messages": messages}));
    let (_, text) = server.post("/detokenize", &json!({"tokens": chat["tokens"]}));
    let rendered = text["prompt"].as_str().unwrap();
    assert!(
        rendered.starts_with("<|begin|><|user|>\nHello<|end|>"),
        "{rendered}"
    );
    // Half of a character.
    let (_, tokens) = server.post(
        "/tokenize",
        &json!({"prompt": "\u{1f600}", "add_special_tokens": false}),
    );
    let ids = tokens["tokens"].as_array().unwrap();
    if ids.len() > 1 {
        let (_, half) = server.post("/detokenize", &json!({"tokens": ids[..1]}));
        assert_eq!(half["prompt"], "\u{fffd}");
    }

    let many = format!("{{\"tokens\": [{}70]}}", "70,".repeat(200_000));
    let answer = server.open("POST", "/detokenize", &many);
    assert_eq!(answer.status, 200);
    let text: Value = serde_json::from_str(&answer.text()).unwrap();
    assert!(text["prompt"].as_str().unwrap().len() >= 200_001);
    for (body, status, part) in [
        ("{}", 400, "tokens"),
        (
            r#"{"tokens": "a"}"#,
            400,
            "tokens: expected a list of token ids",
        ),
        (r#"{"tokens": [-1]}"#, 400, "tokens: expected a list"),
        (r#"{"tokens": [1.5]}"#, 400, "tokens: expected a list"),
        (r#"{"tokens": [[1]]}"#, 400, "tokens: expected a list"),
        (r#"{"tokens": null}"#, 400, "tokens"),
        (
            r#"{"tokens": [99999]}"#,
            400,
            "token 99999 is not below the vocabulary's size",
        ),
        (
            r#"{"tokens": [4294967296]}"#,
            400,
            "tokens: expected a list",
        ),
        (r#"{"tokens": [1], "prompt": "x"}"#, 400, "prompt"),
        (r#"{"tokens": [1], "model": "other"}"#, 404, "other"),
        ("[1]", 400, ""),
        ("", 400, ""),
    ] {
        let answer = server.open("POST", "/detokenize", body);
        assert_eq!(answer.status, status, "{body}");
        let error: Value = serde_json::from_str(&answer.text()).unwrap();
        let message = error["error"]["message"].as_str().unwrap();
        assert!(message.contains(part), "{body}: {message}");
    }

    let info: Value = serde_json::from_str(&server.get("/tokenizer_info").1).unwrap();
    assert_eq!(info["tokenizer_class"], "PreTrainedTokenizerFast");
    assert!(
        info["chat_template"]
            .as_str()
            .unwrap()
            .contains("bos_token")
    );
    assert_eq!(info["eos_token"], "<|end|>");
    let version: Value = serde_json::from_str(&server.get("/version").1).unwrap();
    assert_eq!(version, json!({"version": env!("CARGO_PKG_VERSION")}));
    for (method, path) in [
        ("POST", "/tokenizer_info"),
        ("POST", "/version"),
        ("GET", "/detokenize"),
    ] {
        assert_eq!(
            server.open(method, path, "{}").status,
            405,
            "{method} {path}"
        );
    }
    let server = Server::start(&[]);
    assert_eq!(
        server.get("/tokenizer_info").0,
        404,
        "only where it is asked for"
    );
}

#[test]
fn an_answer_longer_than_the_memory_is_429() {
    let server = Server::start(&["--request-memory-bytes", "600000"]);
    let larger = format!("{{\"tokens\": [{}300]}}", "300,".repeat(30_000));
    let answer = server.open("POST", "/detokenize", &larger);
    assert_eq!(answer.status, 429);
    server.wait_for("it is given back", "/metrics", |_, metrics| {
        metrics.contains("kvasir_request_memory_bytes{model_name=\"kvasir-demo\"} 0\n")
    });
}

/// The answer's status over TLS, and the certificate that the server showed.
fn over_tls(
    address: &str,
    roots: &[CertificateDer<'static>],
    path: &str,
) -> Result<(u16, Vec<u8>), String> {
    let mut store = RootCertStore::empty();
    for root in roots {
        store.add(root.clone()).unwrap();
    }
    let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(store)
        .with_no_client_auth();
    let name = ServerName::try_from("localhost").unwrap();
    let connection = ClientConnection::new(Arc::new(config), name).unwrap();
    let stream = TcpStream::connect(address).unwrap();
    stream
        .set_read_timeout(Some(std::time::Duration::from_secs(60)))
        .unwrap();
    let mut stream = StreamOwned::new(connection, stream);
    let headers = [RED[0], ("connection", "close")];
    let body = json!({"prompt": "A block", "max_tokens": 20, "stream": true}).to_string();
    // The handshake comes first, and tells what is wrong.
    while stream.conn.is_handshaking() {
        let (connection, socket) = (&mut stream.conn, &mut stream.sock);
        connection
            .complete_io(socket)
            .map_err(|error| error.to_string())?;
    }
    send_with(&mut stream, "POST", path, &headers, &body);
    let shown = stream.conn.peer_certificates().unwrap()[0].to_vec();
    let mut answer = String::new();
    stream
        .read_to_string(&mut answer)
        .map_err(|error| error.to_string())?;
    assert!(
        answer.ends_with("0\r\n\r\n") || !answer.contains("200 OK"),
        "the whole answer"
    );
    Ok((answer[9..12].parse().unwrap(), shown))
}

#[test]
fn tls_serves_the_certificate_of_now() {
    let make = || {
        let made = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
        (
            made.cert.der().clone(),
            made.cert.pem(),
            made.signing_key.serialize_pem(),
        )
    };
    let ((one, pem, key), (other, other_pem, other_key)) = (make(), make());
    let secret = Secret::new(&[("tls.crt", &pem), ("tls.key", &key)]);
    let (certificate, key_file) = (secret.path("tls.crt"), secret.path("tls.key"));
    let tls = ["--ssl-certfile", &certificate, "--ssl-keyfile", &key_file];
    let more = [
        "--api-key",
        "red:red-hush",
        "--management-port",
        "0",
        "--read-timeout-seconds",
        "5",
    ];
    let server = Server::start(&[&tls[..], &more].concat());
    let roots = [one.clone(), other.clone()];
    let ask = |roots: &[CertificateDer<'static>]| over_tls(&server.address, roots, COMPLETIONS);
    assert_eq!(ask(&roots), Ok((200, one.to_vec())));
    assert!(ask(&roots[1..]).is_err(), "not the one that is trusted");

    // Plain text gets no answer of HTTP, whatever it says; the management port speaks it.
    let mut plain = server.connect();
    send(&mut plain, "GET", "/health", "");
    let mut answer = Vec::new();
    let _ = plain.read_to_end(&mut answer);
    assert!(!answer.starts_with(b"HTTP"), "{answer:?}");
    let management = server.management.as_ref().unwrap();
    assert_eq!(management.get("/health").0, 200);
    // A client that says nothing is left alone in time.
    let mut silent = server.connect();

    // What doesn't belong together changes nothing, what does is shown to who comes next.
    secret.replace("2", &[("tls.crt", &other_pem), ("tls.key", &key)]);
    assert_eq!(ask(&roots).unwrap().1, one.to_vec());
    secret.replace("3", &[("tls.crt", &other_pem), ("tls.key", &other_key)]);
    management.wait_for("the new certificate", "/health", |_, _| {
        ask(&roots).unwrap() == (200, other.to_vec())
    });
    assert_eq!(silent.read(&mut [0]).unwrap(), 0, "closed");
}
