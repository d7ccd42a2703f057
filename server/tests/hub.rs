//! The server with a model from a hub: a real process, and a hub on this machine that gives trouble.

mod client;
mod hub_server;

use std::path::Path;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use client::Server;
use hub_server::{COMMIT, HubServer, SHARD, TOKEN, Trouble};
use serde_json::{Value, json};

const MODEL: [&str; 2] = ["--model", "hf://kvasir/demo"];

/// Bytes of the demo model's weights.
fn n_weights() -> usize {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("demo-model/model.safetensors");
    std::fs::metadata(file).expect("the weights").len() as usize
}

/// Runs to the end: what it says, and that it took no longer than a few seconds.
fn run(hub: &HubServer, cache: &Path, token: &str, flags: &[&str]) -> Output {
    let begun = Instant::now();
    let output = Command::new(env!("CARGO_BIN_EXE_kvasir-server"))
        .args(flags)
        .env("HF_ENDPOINT", &hub.endpoint)
        .env("HF_HUB_CACHE", cache)
        .env("HF_TOKEN", token)
        .output()
        .expect("it runs");
    assert!(begun.elapsed() < Duration::from_secs(20), "{flags:?}");
    output
}

fn last_line(output: &Output) -> String {
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    said.trim_end()
        .lines()
        .last()
        .unwrap_or_default()
        .to_owned()
}

fn serve(hub: &HubServer, cache: &Path) -> Server {
    let cache = cache.to_str().expect("a path in UTF-8");
    let variables = [
        ("HF_ENDPOINT", hub.endpoint.as_str()),
        ("HF_TOKEN", TOKEN),
        ("HF_HUB_CACHE", "/no/such/folder"),
    ];
    let flags = [MODEL[0], MODEL[1], "--download-dir", cache];
    Server::start_in(&flags, &variables)
}

fn assert_serves(server: &Server) {
    let asked = json!({"model": "kvasir/demo", "max_tokens": 30,
        "messages": [{"role": "user", "content": "What is a block table?"}]});
    let (status, answer) = server.post("/v1/chat/completions", &asked);
    assert_eq!(status, 200, "{answer}");
    let text = answer["choices"][0]["message"]["content"]
        .as_str()
        .expect("an answer");
    assert!(text.contains("block"), "{text}");
}

#[test]
fn a_private_model_comes_through_limits_and_broken_connections_once() {
    let hub = HubServer::start(Trouble {
        is_private: true,
        n_limited: 2,
        n_unavailable: 1,
        breaks: Some((2 << 20, 3)),
        ..Trouble::default()
    });
    let cache = tempfile::tempdir().unwrap();
    let server = serve(&hub, cache.path());
    assert_serves(&server);
    let load: Value = serde_json::from_str(&server.get("/load").1).unwrap();
    assert_eq!(load["model"]["revision"], COMMIT);
    assert!(
        load["model"]["parameters"].as_u64().unwrap() > 1_000_000,
        "{load}"
    );
    assert!(
        load["model"]["weightsBytes"].as_u64().unwrap() > 1_000_000,
        "{load}"
    );
    assert!(load["start"]["fetchMs"].as_u64().unwrap() > 0, "{load}");
    assert_eq!(load["start"]["phase"], Value::Null, "{load}");
    drop(server);

    let asked = hub.large();
    assert!(
        asked.iter().all(|it| !it.had_token),
        "the token stays with the hub: {asked:?}"
    );
    let (header, rest) = asked.split_first().unwrap();
    assert_eq!(
        header.range.as_deref(),
        Some("bytes=0-1048575"),
        "the header first"
    );
    let ranges: Vec<_> = rest.iter().map(|it| it.range.clone()).collect();
    let resumed = |n: usize| Some(format!("bytes={}-", n * (2 << 20)));
    assert_eq!(ranges, [None, resumed(1), resumed(2), resumed(3)]);
    let n_sent: usize = rest.iter().map(|it| it.n_sent).sum();
    assert_eq!(n_sent, n_weights(), "no byte twice");
    let wanted = |path: &String| !path.contains("README") && !path.contains("consolidated");
    assert!(
        hub.paths().iter().all(wanted),
        "only what serving needs: {:?}",
        hub.paths()
    );

    let root = cache.path().join("models--kvasir--demo");
    assert_eq!(
        std::fs::read_to_string(root.join("refs/main")).unwrap(),
        COMMIT
    );
    let snapshot = root.join("snapshots").join(COMMIT);
    let blob = std::fs::read_link(snapshot.join(SHARD)).unwrap();
    assert!(blob.starts_with("../../blobs"), "{}", blob.display());
    let left = std::fs::read_dir(root.join("blobs")).unwrap();
    let names: Vec<String> = left
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    assert!(
        names.iter().all(|name| !name.ends_with(".incomplete")),
        "{names:?}"
    );
    assert!(
        !root
            .join(format!("headers-{}", std::process::id()))
            .exists()
    );

    let n_asked = hub.large().len();
    assert_serves(&serve(&hub, cache.path()));
    assert_eq!(
        hub.large().len(),
        n_asked,
        "what the cache has is not fetched again"
    );
    hub.trouble(Trouble {
        n_limited: usize::MAX,
        ..Trouble::default()
    });
    assert_serves(&serve(&hub, cache.path()));
    assert_eq!(
        hub.large().len(),
        n_asked,
        "and is served where the hub can't be asked"
    );
}

#[test]
fn of_two_processes_one_fetches() {
    let hub = HubServer::start(Trouble::default());
    let cache = tempfile::tempdir().unwrap();
    let both = std::thread::scope(|scope| {
        let servers = [0; 2].map(|_| scope.spawn(|| serve(&hub, cache.path())));
        servers.map(|server| server.join().unwrap())
    });
    both.iter().for_each(assert_serves);
    let whole = hub.large().into_iter().filter(|it| it.range.is_none());
    assert_eq!(whole.count(), 1, "{:?}", hub.large());
}

#[test]
fn a_mirror_without_hashes_in_its_list_and_without_ranges_will_do() {
    let hub = HubServer::start(Trouble {
        no_hashes: true,
        no_ranges: true,
        breaks: Some((5 << 20, 1)),
        ..Trouble::default()
    });
    let cache = tempfile::tempdir().unwrap();
    assert_serves(&serve(&hub, cache.path()));
}

#[test]
fn a_server_that_fetches_tells_how_far_it_is_and_ends_when_it_is_told_to() {
    let hub = HubServer::start(Trouble {
        stalls: true,
        ..Trouble::default()
    });
    let cache = tempfile::tempdir().unwrap();
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = free.local_addr().unwrap();
    drop(free);
    let mut child = Command::new(env!("CARGO_BIN_EXE_kvasir-server"))
        .args(MODEL)
        .args(["--port", &address.port().to_string()])
        .env("HF_ENDPOINT", &hub.endpoint)
        .env("HF_HUB_CACHE", cache.path())
        .spawn()
        .unwrap();
    let begun = Instant::now();
    while std::net::TcpStream::connect(address).is_err() {
        assert!(begun.elapsed() < Duration::from_secs(20));
        std::thread::sleep(Duration::from_millis(20));
    }
    let client = client::Client {
        address: address.to_string(),
    };
    client.wait_for_load("half has come", |load| {
        load["start"]["doneBytes"].as_u64() == Some(n_weights() as u64 / 2)
    });
    let load: Value = serde_json::from_str(&client.get("/load").1).unwrap();
    assert_eq!(load["start"]["phase"], "fetch", "{load}");
    assert_eq!(load["start"]["totalBytes"], n_weights());
    assert_eq!(load["blocks"], Value::Null, "unknown, not zero");
    assert_eq!(client.get("/ready").0, 503);
    assert_eq!(client.get("/health").0, 200);
    let told = Instant::now();
    let kill = Command::new("kill").arg(child.id().to_string()).status();
    assert!(kill.unwrap().success());
    assert_eq!(child.wait().unwrap().code(), Some(0));
    assert!(
        told.elapsed() < Duration::from_secs(5),
        "{:?}",
        told.elapsed()
    );
}

#[test]
fn what_the_user_can_mend_is_told_in_seconds() {
    let private = Trouble {
        is_private: true,
        ..Trouble::default()
    };
    let corrupt = Trouble {
        is_corrupt: true,
        ..Trouble::default()
    };
    let no_weights = Trouble {
        no_weights: true,
        ..Trouble::default()
    };
    let fine = Trouble::default();
    for (why, trouble, token, flags, want) in [
        (
            "a name",
            &fine,
            TOKEN,
            vec!["--model", "hf://kvasir/demos"],
            "has no repository \"kvasir/demos\" that the token may read: correct model.source.huggingFace.repository",
        ),
        (
            "a revision",
            &fine,
            "",
            vec!["--model", "hf://kvasir/demo@v7"],
            "the repository has no revision \"v7\": correct model.source.huggingFace.revision",
        ),
        (
            "a wrong token",
            &private,
            "hf_wrong",
            MODEL.to_vec(),
            "refuses the token in HF_TOKEN (model.source.huggingFace.tokenSecret): it is wrong",
        ),
        (
            "no token",
            &private,
            "",
            MODEL.to_vec(),
            "or it is private: correct model.source.huggingFace.repository, or give a token in HF_TOKEN",
        ),
        (
            "a gated repository",
            &fine,
            TOKEN,
            vec!["--model", "hf://kvasir/gated"],
            "the repository is gated: ask for access at",
        ),
        (
            "a wrong hash",
            &corrupt,
            "",
            MODEL.to_vec(),
            "came twice with another hash than the hub gives",
        ),
        (
            "a repository of another format",
            &no_weights,
            "",
            MODEL.to_vec(),
            "Kvasir serves models in safetensors files",
        ),
        (
            "a cache that can't be written",
            &fine,
            "",
            vec![MODEL[0], MODEL[1], "--download-dir", "/proc/none"],
            "the cache of models (--download-dir) must be a folder that can be written",
        ),
    ] {
        let hub = HubServer::start(trouble.clone());
        let cache = tempfile::tempdir().unwrap();
        let flags = [&["--port", "0"], &flags[..]].concat();
        let output = run(&hub, cache.path(), token, &flags);
        let said = last_line(&output);
        assert_eq!(output.status.code(), Some(2), "{why}: {said}");
        assert!(said.contains(want), "{why}: {said}");
        assert!(!said.contains("hf_"), "{why}: a token is told: {said}");
        let blobs = cache.path().join("models--kvasir--demo/blobs");
        let weights = std::fs::read_dir(blobs).into_iter().flatten();
        let longest = weights.map(|blob| blob.unwrap().metadata().unwrap().len());
        assert!(
            longest.max().unwrap_or(0) < 1 << 20,
            "{why}: nothing wrong is left"
        );
    }
}

#[test]
fn a_model_that_does_not_fit_is_refused_by_its_headers() {
    let hub = HubServer::start(Trouble::default());
    let cache = tempfile::tempdir().unwrap();
    let flags = [
        &MODEL[..],
        &["--port", "0", "--gpu-memory-utilization", "0.00001"],
    ]
    .concat();
    let output = run(&hub, cache.path(), "", &flags);
    let said = last_line(&output);
    assert_eq!(output.status.code(), Some(2), "{said}");
    assert!(said.contains("kvasir-server: the model needs "), "{said}");
    assert!(
        said.contains("give the replica ") && said.contains(" GiB"),
        "{said}"
    );
    let n_sent: usize = hub.large().iter().map(|it| it.n_sent).sum();
    assert!(n_sent <= 1 << 20, "no byte of a weight: {:?}", hub.large());

    let plan = |flags: &[&str]| {
        let flags = [&["plan", "hf://kvasir/demo"], flags].concat();
        run(&hub, cache.path(), "", &flags)
    };
    let told = plan(&["--memory-gib", "4", "--json", "--max-num-seqs", "8"]);
    assert_eq!(told.status.code(), Some(0), "{}", last_line(&told));
    let told: Value = serde_json::from_slice(&told.stdout).unwrap();
    assert_eq!(told["memoryBytes"], 4_u64 << 30);
    assert_eq!(told["fits"], true);
    assert_eq!(told["requestsAtContext"], 8, "as many as may run");
    assert_eq!(told["maxModelLen"], 2048);
    assert!(told["kvBytesPerToken"].as_u64().unwrap() > 0, "{told}");
    let told = plan(&["--memory-gib", "0.01"]);
    assert_eq!(told.status.code(), Some(2));
    let text = String::from_utf8(told.stdout).unwrap();
    assert!(
        text.contains("give the replica ") && text.contains("KV cache"),
        "{text}"
    );
    let n_sent: usize = hub.large().iter().map(|it| it.n_sent).sum();
    assert!(n_sent <= 3 << 20, "headers alone: {:?}", hub.large());
}
