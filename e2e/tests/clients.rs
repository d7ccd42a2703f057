//! The clients that people use, unmodified, in whole conversations with the real server and its demo model on this machine:
//! the `openai` package, LangChain and litellm, and the `tokenizers` package as the judge of our tokens. What each asks and
//! asserts stands in e2e/python/drive_*.py. Needs neither root nor a cluster.

use kvasir_e2e::command::run;
use kvasir_e2e::image::recipes;
use kvasir_e2e::toolchain;
use serde_json::Value;
use std::io::{BufRead as _, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;

/// The server's process, killed when dropped.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A server, and the URL of its API.
fn serve() -> (Server, String) {
    let folder = recipes::release_binaries(recipes::Devices::Cpu).expect("the server is built");
    let child = Command::new(folder.join("kvasir-server"))
        .args(["--port", "0", "--device", "cpu"])
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .expect("the server starts");
    let mut server = Server(child);
    let said = server.0.stdout.take().expect("standard output is a pipe");
    let mut lines = BufReader::new(said).lines().map_while(Result::ok);
    let address = lines.find_map(|line| {
        let (_, after) = line.split_once("http://")?;
        after.split(' ').next().map(str::to_owned)
    });
    let url = format!("http://{}/v1", address.expect("it says where it serves"));
    (server, url)
}

/// Runs a script's checks, which all have to hold.
fn drive(client: &str) {
    static PYTHON: OnceLock<std::path::PathBuf> = OnceLock::new();
    let python = PYTHON.get_or_init(|| toolchain::python().expect("the Python packages"));
    let script = toolchain::workspace().join(format!("e2e/python/drive_{client}.py"));
    let source = std::fs::read_to_string(&script).expect("the script is there");
    let n_checks =
        source.matches("\ndef check_").count() + source.matches("\nasync def check_").count();
    let (_server, url) = serve();
    // A proxy that the machine goes to the world by has no way to this server.
    let said = run(Command::new(python.join("bin/python"))
        .arg(&script)
        .arg(&url)
        .env("NO_PROXY", "127.0.0.1"))
    .expect("the script ends well");
    let at = said.rfind("\n{\n").map_or(0, |at| at + 1);
    let said: Value = serde_json::from_str(&said[at..]).expect("it ends with JSON");
    let failed = said["failed"].as_object().expect("failed checks by name");
    for (name, traceback) in failed {
        eprintln!(
            "{client}: {name}\n{}",
            traceback.as_str().unwrap_or_default()
        );
    }
    assert!(failed.is_empty(), "{client}: see the tracebacks above");
    let n_held = said["held"].as_array().map_or(0, Vec::len);
    assert_eq!(n_held, n_checks, "{client}: every check ran");
}

#[test]
fn openai() {
    drive("openai");
}

#[test]
fn langchain() {
    drive("langchain");
}

#[test]
fn litellm() {
    drive("litellm");
}

#[test]
fn tokenizers() {
    drive("tokenizers");
}
