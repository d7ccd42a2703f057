//! The README's main job, on whatever cluster it is given: install the chart, apply the demo, wait until it
//! is Ready saying why it is not yet, and stream the answer to a first question.

use crate::access::Access;
use crate::command::run;
use crate::wait::{Seen, until};
use crate::{Error, chat, progress, toolchain};
use serde_json::Value;
use std::io::{BufRead as _, BufReader};
use std::process::{Child, ChildStdout, Stdio};
use std::time::Duration;

/// The namespace of the operator.
pub const SYSTEM: &str = "kvasir-system";
/// The name of the demo's LLMDeployment, and of its Service.
pub const DEMO: &str = "demo";
/// What it is asked first.
const QUESTION: &str = "What is a block table?";

/// Installs or upgrades the operator from the chart, with `image` as its own and as the servers' default.
///
/// # Errors
/// With what helm says.
pub fn install(access: &Access, image: &str) -> Result<(), Error> {
    let step = progress::begin(format_args!(
        "Installing the operator with helm, image {image}"
    ));
    let (repository, tag) = image.rsplit_once(':').ok_or_else(|| {
        Error::Refused(format!(
            "the image reference {image:?} has no tag; expected one such as {image}:0.1.0"
        ))
    })?;
    run(access
        .helm()
        .args(["upgrade", "--install", "kvasir"])
        .arg(toolchain::workspace().join("charts/kvasir"))
        .args([
            "--namespace",
            SYSTEM,
            "--create-namespace",
            "--wait",
            "--timeout",
            "120s",
        ])
        .args(["--set-string", &format!("image.repository={repository}")])
        .args(["--set-string", &format!("image.tag={tag}")]))?;
    step.done("the operator runs");
    Ok(())
}

/// Applies the demo and waits until it is Ready, with each new reason on the terminal.
///
/// # Errors
/// When it is refused, or not Ready in three minutes; the last reason is quoted.
pub fn apply_demo(access: &Access) -> Result<(), Error> {
    let step = progress::begin("Applying e2e/examples/demo.yaml");
    access.apply(include_str!("../examples/demo.yaml"))?;
    let mut shown = String::new();
    until(
        "the demo is Ready",
        Duration::from_secs(180),
        Duration::from_millis(250),
        || {
            let condition = ready_condition(access, DEMO)?;
            let field = |name: &str| condition[name].as_str().unwrap_or_default().to_owned();
            if field("status") == "True" {
                return Ok(Seen::Yes(()));
            }
            let reason = format!("{}: {}", field("reason"), field("message"));
            if reason != shown {
                progress::say(format_args!("    {reason}"));
                shown.clone_from(&reason);
            }
            Ok(Seen::NotYet(reason))
        },
    )?;
    step.done("Ready");
    Ok(())
}

/// The condition Ready of an LLMDeployment, as JSON; null before there is one.
///
/// # Errors
/// When the API server does not answer.
pub fn ready_condition(access: &Access, name: &str) -> Result<Value, Error> {
    let text = run(access
        .kubectl()
        .args(["get", "llmdeployment", name, "-o", "json"]))?;
    let object: Value = serde_json::from_str(&text).unwrap_or_default();
    let conditions = object["status"]["conditions"]
        .as_array()
        .cloned()
        .unwrap_or_default();
    Ok(conditions
        .into_iter()
        .find(|condition| condition["type"] == "Ready")
        .unwrap_or_default())
}

/// Asks the demo through its Service and streams the answer to standard output.
///
/// # Errors
/// When the Service cannot be reached or the answer breaks off.
pub fn ask_demo(access: &Access) -> Result<(), Error> {
    let forward = Forward::to_service(access, DEMO)?;
    progress::say(format_args!(
        "==> Asking it through its Service: {QUESTION}\n"
    ));
    chat::stream_answer(
        &format!("http://127.0.0.1:{}", forward.port),
        "kvasir-demo",
        QUESTION,
    )
}

/// `kubectl port-forward` to a Service, for as long as this lives.
struct Forward {
    child: Child,
    port: u16,
    // Held open: kubectl says there that it handles a connection, and would die of a closed pipe.
    _said: Option<BufReader<ChildStdout>>,
}

impl Forward {
    fn to_service(access: &Access, service: &str) -> Result<Self, Error> {
        let port = run(access.kubectl().args([
            "get",
            "service",
            service,
            "-o",
            "jsonpath={.spec.ports[0].port}",
        ]))?;
        let mut command = access.kubectl();
        command.args([
            "port-forward",
            &format!("service/{service}"),
            &format!(":{port}"),
        ]);
        let mut child = command
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .map_err(|source| Error::NotStarted {
                command: crate::command::shown(&command),
                source,
            })?;
        let mut line = String::new();
        let mut said = child.stdout.take().map(BufReader::new);
        if let Some(said) = &mut said {
            // An unreadable line holds no port, which the next statement reports.
            let _ = said.read_line(&mut line);
        }
        let Some(port) = forwarded_port(&line) else {
            let _ = child.kill();
            return Err(Error::Refused(format!(
                "kubectl port-forward said no port; it said {line:?}"
            )));
        };
        Ok(Self {
            child,
            port,
            _said: said,
        })
    }
}

impl Drop for Forward {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The local port in `Forwarding from 127.0.0.1:40123 -> 8000`.
fn forwarded_port(line: &str) -> Option<u16> {
    line.strip_prefix("Forwarding from 127.0.0.1:")?
        .split(' ')
        .next()?
        .parse()
        .ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_forwarded_port_is_read() {
        assert_eq!(
            forwarded_port("Forwarding from 127.0.0.1:40123 -> 8000\n"),
            Some(40_123)
        );
        assert_eq!(forwarded_port("error: unable to forward port\n"), None);
    }
}
