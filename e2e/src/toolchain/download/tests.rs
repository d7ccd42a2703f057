//! Downloads from a file server on this machine: whole, wrong, broken off, and none at all.

use super::*;
use std::io::{BufRead as _, BufReader};
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

/// How the server answers one request after the other; the last one stands for all further ones.
#[derive(Clone, Copy, Debug)]
pub(in crate::toolchain) enum Answer {
    /// As RFC 9110 wants it, ranges too.
    Right,
    /// Right, and hangs up after so many bytes of the body.
    BreaksOff(usize),
    /// The whole, whatever was asked for.
    IgnoresRange,
    /// There is no such file.
    NotFound,
}

/// A server of one file, at any path.
pub(in crate::toolchain) struct FileServer {
    pub(in crate::toolchain) url: String,
    /// The header Range of each request; empty where there was none.
    ranges: Arc<Mutex<Vec<String>>>,
}

impl FileServer {
    pub(in crate::toolchain) fn start(content: Vec<u8>, answers: &[Answer]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let url = format!("http://{}", listener.local_addr().expect("an address"));
        let ranges = Arc::new(Mutex::new(Vec::new()));
        let (seen, answers) = (Arc::clone(&ranges), answers.to_vec());
        std::thread::spawn(move || {
            for connection in listener.incoming() {
                let n = seen.lock().expect("not poisoned").len();
                let answer = answers[n.min(answers.len() - 1)];
                let mut connection = connection.expect("a connection");
                let range = range(&connection);
                seen.lock().expect("not poisoned").push(range.clone());
                // A client that has hung up is its own affair.
                let _ = respond(&mut connection, &content, &range, answer);
            }
        });
        Self { url, ranges }
    }

    fn ranges(&self) -> Vec<String> {
        self.ranges.lock().expect("not poisoned").clone()
    }
}

/// Reads a request's head; its header Range.
fn range(connection: &TcpStream) -> String {
    let mut range = String::new();
    for line in BufReader::new(connection).lines() {
        let line = line.expect("a head").to_ascii_lowercase();
        if line.is_empty() {
            break;
        }
        if let Some(value) = line.strip_prefix("range: ") {
            value.clone_into(&mut range);
        }
    }
    range
}

fn respond(
    connection: &mut TcpStream,
    content: &[u8],
    range: &str,
    answer: Answer,
) -> std::io::Result<()> {
    let from = match answer {
        Answer::IgnoresRange => None,
        _ => range.strip_prefix("bytes=").map(|range| {
            range
                .trim_end_matches('-')
                .parse::<usize>()
                .expect("a number")
        }),
    };
    let (status, body) = match (answer, from) {
        (Answer::NotFound, _) => ("404 Not Found".to_owned(), &b"no such file"[..]),
        (_, Some(from)) if from >= content.len() => {
            ("416 Range Not Satisfiable".to_owned(), &b""[..])
        }
        (_, Some(from)) => {
            let (last, length) = (content.len() - 1, content.len());
            let range =
                format!("206 Partial Content\r\nContent-Range: bytes {from}-{last}/{length}");
            (range, &content[from..])
        }
        (_, None) => ("200 OK".to_owned(), content),
    };
    write!(
        connection,
        "HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    )?;
    let n_sent = match answer {
        Answer::BreaksOff(n) => n.min(body.len()),
        _ => body.len(),
    };
    connection.write_all(&body[..n_sent])
}

/// A folder of one test, removed with it.
pub(in crate::toolchain) struct Scratch(pub(in crate::toolchain) PathBuf);

impl Scratch {
    pub(in crate::toolchain) fn new(name: &str) -> Self {
        let folder = std::env::temp_dir().join(format!("kvasir-{name}-{}", std::process::id()));
        fs::create_dir_all(&folder).expect("a folder");
        Self(folder)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

pub(in crate::toolchain) fn sha512(content: &[u8]) -> String {
    Sha512::digest(content)
        .iter()
        .map(|b| format!("{b:02x}"))
        .collect()
}

/// 300,000 bytes, no two blocks of them alike.
fn content() -> Vec<u8> {
    (0..75_000_u32).flat_map(u32::to_le_bytes).collect()
}

#[test]
fn a_file_is_there_whole_however_often_its_download_broke_off() {
    use Answer::{BreaksOff, IgnoresRange, Right};
    for (why, answers, ranges) in [
        ("at once", &[Right][..], &[""][..]),
        (
            "resumed where it broke off, twice",
            &[BreaksOff(100_000), BreaksOff(150_000), Right],
            &["", "bytes=100000-", "bytes=250000-"],
        ),
        (
            "begun anew where the server knows no ranges",
            &[BreaksOff(100_000), IgnoresRange],
            &["", "bytes=100000-"],
        ),
        (
            "an attempt that brings nothing is no end",
            &[BreaksOff(100_000), BreaksOff(0), BreaksOff(0), Right],
            &["", "bytes=100000-", "bytes=100000-", "bytes=100000-"],
        ),
    ] {
        let scratch = Scratch::new("whole");
        let path = scratch.0.join("file");
        let server = FileServer::start(content(), answers);
        download(&server.url, &sha512(&content()), &path).expect(why);
        assert!(fs::read(&path).expect("the file") == content(), "{why}");
        assert_eq!(server.ranges(), ranges, "{why}");
        assert!(!scratch.0.join("file.part").exists(), "{why}");
    }
}

#[test]
fn what_has_come_is_kept_for_the_next_call() {
    let scratch = Scratch::new("kept");
    let path = scratch.0.join("file");
    let sha512 = sha512(&content());
    let server = FileServer::start(
        content(),
        &[Answer::BreaksOff(100_000), Answer::BreaksOff(0)],
    );
    let error = download(&server.url, &sha512, &path).expect_err("it breaks off each time");
    assert!(
        matches!(error, DownloadError::BrokenOff { at_bytes: 100_000 }),
        "{error:?}"
    );
    assert!(!path.exists(), "half a file is none");
    let server = FileServer::start(content(), &[Answer::Right]);
    download(&server.url, &sha512, &path).expect("resumed");
    assert_eq!(server.ranges(), ["bytes=100000-"]);
    assert!(fs::read(&path).expect("the file") == content());
}

#[test]
fn a_file_with_another_checksum_is_deleted() {
    let scratch = Scratch::new("wrong");
    let path = scratch.0.join("file");
    let mut other = content();
    other[7] ^= 1;
    let server = FileServer::start(other.clone(), &[Answer::Right]);
    let error = download(&server.url, &sha512(&content()), &path).expect_err("another file");
    let told = error.to_string();
    assert!(
        matches!(error, DownloadError::WrongChecksum { .. }),
        "{told}"
    );
    assert!(
        told.contains(&sha512(&other)) && told.contains(&sha512(&content())),
        "{told}"
    );
    assert_eq!(fs::read_dir(&scratch.0).expect("the folder").count(), 0);
    // A part that is of another file is found out as well, and does not spoil the next call.
    fs::write(scratch.0.join("file.part"), &other).expect("written");
    let server = FileServer::start(content(), &[Answer::Right]);
    let error = download(&server.url, &sha512(&content()), &path).expect_err("another part");
    assert!(
        matches!(error, DownloadError::WrongChecksum { .. }),
        "{error:?}"
    );
    download(&server.url, &sha512(&content()), &path).expect("from its beginning");
    assert!(fs::read(&path).expect("the file") == content());
}

#[test]
fn no_server_and_no_file_are_told_at_once() {
    let scratch = Scratch::new("none");
    let path = scratch.0.join("file");
    let server = FileServer::start(content(), &[Answer::NotFound]);
    let error = download(&server.url, &sha512(&content()), &path).expect_err("no file");
    assert!(
        matches!(error, DownloadError::Status(StatusCode::NOT_FOUND)),
        "{error:?}"
    );
    // A port that was free a moment ago: nobody listens there.
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let url = format!("http://{}", listener.local_addr().expect("an address"));
    drop(listener);
    let started = std::time::Instant::now();
    let error = download(&url, &sha512(&content()), &path).expect_err("no server");
    assert!(matches!(error, DownloadError::Unreachable(_)), "{error:?}");
    assert!(
        started.elapsed() < CONNECT_TIMEOUT,
        "it is no matter of patience"
    );
    assert_eq!(fs::read_dir(&scratch.0).expect("the folder").count(), 0);
}
