//! A real server process on a port of its own, and a small HTTP client that shows what really comes over the wire.

#![allow(
    clippy::unwrap_used,
    reason = "the lint's exception for tests does not reach their modules"
)]
#![allow(dead_code, reason = "each test that includes it uses a part")]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::ops::Deref;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

/// Nothing that is waited for takes this long on any machine.
const LONG: Duration = Duration::from_secs(60);

/// Killed when dropped.
pub(crate) struct Server {
    pub(crate) child: Child,
    client: Client,
    /// Where it has a management port.
    pub(crate) management: Option<Client>,
}

impl Deref for Server {
    type Target = Client;

    fn deref(&self) -> &Client {
        &self.client
    }
}

impl Server {
    /// Serves the demo model with these flags, and waits until it says so.
    pub(crate) fn start(flags: &[&str]) -> Self {
        Self::start_in(flags, &[])
    }

    /// The same with these variables in its environment.
    pub(crate) fn start_in(flags: &[&str], variables: &[(&str, &str)]) -> Self {
        Self::start_logging(flags, variables, Stdio::null())
    }

    /// The same, with its log going there.
    pub(crate) fn start_logging(flags: &[&str], variables: &[(&str, &str)], log: Stdio) -> Self {
        let has_management = flags.contains(&"--management-port");
        let mut child = Command::new(env!("CARGO_BIN_EXE_kvasir-server"))
            .args(["--port", "0", "--num-gpu-blocks-override", "256"])
            .args(flags)
            .envs(variables.iter().copied())
            .stdout(Stdio::piped())
            .stderr(log)
            .spawn()
            .unwrap();
        let mut addresses = BufReader::new(child.stdout.take().unwrap())
            .lines()
            .filter_map(|line| {
                let line = line.unwrap();
                line.split_once("://")
                    .map(|(_, rest)| rest.split(' ').next().unwrap().to_owned())
            });
        let mut client = || Client {
            address: addresses.next().expect("the server says where it serves"),
        };
        Self {
            child,
            client: client(),
            management: has_management.then(client),
        }
    }

    /// A line of `/proc/PID/status`, in bytes: `VmRSS` is the memory now, `VmHWM` the most of it.
    pub(crate) fn memory_bytes(&self, field: &str) -> i64 {
        let path = format!("/proc/{}/status", self.child.id());
        let status = std::fs::read_to_string(path).unwrap();
        let mut values = status.lines().filter_map(|l| l.strip_prefix(field));
        let value = values.next().expect("the field is there");
        let kib = value.trim_matches([':', '\t', ' ', 'k', 'B']);
        kib.parse::<i64>().unwrap() * 1024
    }

    /// The most is counted from now on (man 5 proc, clear_refs).
    pub(crate) fn reset_peak_memory(&self) {
        let path = format!("/proc/{}/clear_refs", self.child.id());
        std::fs::write(path, "5").unwrap();
    }

    /// Waits until it ends; its exit code.
    pub(crate) fn exit_code(&mut self) -> Option<i32> {
        let start = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status.code();
            }
            assert!(start.elapsed() < LONG, "it does not end");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    pub(crate) fn signal(&self, name: &str) {
        let status = Command::new("kill")
            .args(["-s", name, &self.child.id().to_string()])
            .status()
            .unwrap();
        assert!(status.success());
    }
}

/// What a server says that refuses these flags, which is exit code 2.
pub(crate) fn refusal(flags: &[&str]) -> String {
    let output = Command::new(env!("CARGO_BIN_EXE_kvasir-server"))
        .args(flags)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(2), "{flags:?}: {said}");
    said
}

/// Asks the server at an address; each call has a connection of its own.
pub(crate) struct Client {
    pub(crate) address: String,
}

impl Client {
    pub(crate) fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(&self.address).unwrap();
        stream.set_read_timeout(Some(LONG)).unwrap();
        stream
    }

    /// Sends a request and reads the answer's head.
    pub(crate) fn open(&self, method: &str, path: &str, body: &str) -> Answer {
        self.open_with(method, path, &[], body)
    }

    /// The same, with these headers.
    pub(crate) fn open_with(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: &str,
    ) -> Answer {
        let mut stream = self.connect();
        send_with(&mut stream, method, path, headers, body);
        Answer::read(stream)
    }

    pub(crate) fn post(&self, path: &str, body: &Value) -> (u16, Value) {
        let answer = self.open("POST", path, &body.to_string());
        let status = answer.status;
        (status, serde_json::from_str(&answer.text()).unwrap())
    }

    pub(crate) fn get(&self, path: &str) -> (u16, String) {
        let answer = self.open("GET", path, "");
        (answer.status, answer.text())
    }

    /// The value of a metric without labels of its own.
    pub(crate) fn metric(&self, name: &str) -> f64 {
        let text = self.get("/metrics").1;
        let line = format!("{name}{{model_name=\"kvasir-demo\"}} ");
        let mut values = text.lines().filter_map(|l| l.strip_prefix(&line));
        let value = values.next().expect("the metric is there");
        value.parse().unwrap()
    }

    /// Asks `/load` until it is as wanted.
    pub(crate) fn wait_for_load(&self, why: &str, wanted: impl Fn(&Value) -> bool) {
        self.wait_for(why, "/load", |_, load| {
            wanted(&serde_json::from_str(load).unwrap())
        });
    }

    /// Asks until status and body are as wanted.
    pub(crate) fn wait_for(&self, why: &str, path: &str, wanted: impl Fn(u16, &str) -> bool) {
        let start = Instant::now();
        loop {
            let (status, body) = self.get(path);
            if wanted(status, &body) {
                return;
            }
            assert!(start.elapsed() < LONG, "{why}: {status} {body}");
            std::thread::yield_now();
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub(crate) fn send(stream: &mut TcpStream, method: &str, path: &str, body: &str) {
    send_with(stream, method, path, &[], body);
}

pub(crate) fn send_with(
    stream: &mut impl Write,
    method: &str,
    path: &str,
    headers: &[(&str, &str)],
    body: &str,
) {
    let n = body.len();
    let headers = headers
        .iter()
        .map(|(name, value)| format!("{name}: {value}\r\n"));
    let headers: String = headers.collect();
    // At once: a server that refuses the head may be gone before the body.
    let request = format!(
        "{method} {path} HTTP/1.1\r\nhost: x\r\n{headers}content-length: {n}\r\n\r\n{body}"
    );
    stream.write_all(request.as_bytes()).unwrap();
}

/// An answer whose body is read as it comes.
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: Vec<(String, String)>,
    reader: BufReader<TcpStream>,
}

impl Answer {
    pub(crate) fn read(stream: TcpStream) -> Self {
        let mut reader = BufReader::new(stream);
        let mut line = String::new();
        reader.read_line(&mut line).unwrap();
        let status = line.split(' ').nth(1).unwrap().parse().unwrap();
        let mut headers = Vec::new();
        loop {
            line.clear();
            reader.read_line(&mut line).unwrap();
            match line.trim_end().split_once(": ") {
                Some((name, value)) => headers.push((name.to_lowercase(), value.to_owned())),
                None => {
                    return Self {
                        status,
                        headers,
                        reader,
                    };
                }
            }
        }
    }

    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers
            .iter()
            .find(|(n, _)| n == name)
            .map(|(_, value)| value.as_str())
    }

    /// The next chunk of a body without a length; `None` at its end.
    pub(crate) fn chunk(&mut self) -> Option<String> {
        let mut line = String::new();
        self.reader.read_line(&mut line).unwrap();
        let n = usize::from_str_radix(line.trim_end(), 16).expect("the length of a chunk");
        let mut chunk = vec![0; n + 2];
        self.reader.read_exact(&mut chunk).unwrap();
        chunk.truncate(n);
        (n > 0).then(|| String::from_utf8(chunk).expect("chunks end between characters"))
    }

    pub(crate) fn text(mut self) -> String {
        match self.header("content-length").map(|n| n.parse().unwrap()) {
            Some(n) => {
                let mut body = vec![0; n];
                self.reader.read_exact(&mut body).unwrap();
                String::from_utf8(body).unwrap()
            }
            None => std::iter::from_fn(|| self.chunk()).collect(),
        }
    }

    /// The objects of an event stream, which must end with `[DONE]`.
    pub(crate) fn events(self) -> Vec<Value> {
        let text = self.text();
        let mut events: Vec<&str> = text.split("\n\n").filter(|e| !e.is_empty()).collect();
        assert_eq!(events.pop(), Some("data: [DONE]"));
        events
            .into_iter()
            .map(|e| serde_json::from_str(e.strip_prefix("data: ").unwrap()).unwrap())
            .collect()
    }
}
