//! Running other programs: what they print on success, and one readable error otherwise.
//! It knows no program by name.

use crate::Error;
use std::fs::File;
use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Output, Stdio};

/// How many bytes of a failed program's last words an error quotes.
const QUOTED_BYTES: usize = 2_000;

/// Runs to the end; what it wrote to standard output.
///
/// # Errors
/// When it cannot be started, or ends with anything but success.
pub fn run(command: &mut Command) -> Result<String, Error> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .map_err(not_started(command))?;
    judge(command, &output)
}

/// As [`run`], with `input` on its standard input.
///
/// # Errors
/// As [`run`].
pub fn run_with_input(command: &mut Command, input: &str) -> Result<String, Error> {
    command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = command.spawn().map_err(not_started(command))?;
    if let Some(mut stdin) = child.stdin.take() {
        // A program that stops reading early says why on its own; its exit status decides.
        let _ = stdin.write_all(input.as_bytes());
    }
    let output = child.wait_with_output().map_err(not_started(command))?;
    judge(command, &output)
}

/// Runs to the end with everything it prints in the file `log`.
///
/// # Errors
/// As [`run`]; the end of the log is quoted.
pub fn run_logged(command: &mut Command, log: &Path) -> Result<(), Error> {
    let file = File::create(log).map_err(Error::file("write", log))?;
    let copy = file.try_clone().map_err(Error::file("write", log))?;
    let status = command
        .stdin(Stdio::null())
        .stdout(file)
        .stderr(copy)
        .status()
        .map_err(not_started(command))?;
    if status.success() {
        return Ok(());
    }
    Err(Error::Failed {
        command: shown(command),
        status: status.to_string(),
        said: format!("{}\n(all of it in {})", last_words(log), log.display()),
    })
}

/// The end of a log, for an error message; empty when there is none.
#[must_use]
pub fn last_words(log: &Path) -> String {
    std::fs::read(log)
        .map(|bytes| tail(&bytes))
        .unwrap_or_default()
}

/// The command line as one would type it.
#[must_use]
pub fn shown(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    let line = words
        .map(|w| w.to_string_lossy().into_owned())
        .collect::<Vec<_>>()
        .join(" ");
    line.chars().take(300).collect()
}

fn judge(command: &Command, output: &Output) -> Result<String, Error> {
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let said = if output.stderr.is_empty() {
        &output.stdout
    } else {
        &output.stderr
    };
    Err(Error::Failed {
        command: shown(command),
        status: output.status.to_string(),
        said: tail(said),
    })
}

fn not_started(command: &Command) -> impl FnOnce(std::io::Error) -> Error + use<> {
    let command = shown(command);
    move |source| Error::NotStarted { command, source }
}

fn tail(bytes: &[u8]) -> String {
    let start = bytes.len().saturating_sub(QUOTED_BYTES);
    String::from_utf8_lossy(&bytes[start..]).trim().to_owned()
}
