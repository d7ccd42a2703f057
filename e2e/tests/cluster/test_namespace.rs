//! What a test works in: a namespace of its own, kubectl in it, and Python clients that run inside a node
//! and so know the names and addresses of the cluster. Removed when the test ends.

use kvasir_e2e::cluster::Cluster;
use kvasir_e2e::command::{run, run_with_input};
use kvasir_e2e::wait::{Seen, until};
use kvasir_e2e::{Error, toolchain};
use serde_json::Value;
use std::io::Read as _;
use std::process::{Child, Stdio};
use std::time::Duration;

/// The namespace of one test.
pub(crate) struct TestNamespace {
    pub(crate) cluster: &'static Cluster,
    pub(crate) name: &'static str,
}

impl TestNamespace {
    pub(crate) fn new(cluster: &'static Cluster, name: &'static str) -> Self {
        run(cluster.kubectl().args(["create", "namespace", name])).expect("a namespace");
        Self { cluster, name }
    }

    pub(crate) fn kubectl(&self, args: &[&str]) -> Result<String, Error> {
        run(self
            .cluster
            .kubectl()
            .args(["--namespace", self.name])
            .args(args))
    }

    pub(crate) fn apply(&self, yaml: &str) -> Result<String, Error> {
        let mut command = self.cluster.kubectl();
        run_with_input(
            command.args([
                "--namespace",
                self.name,
                "apply",
                "--server-side",
                "-f",
                "-",
            ]),
            yaml,
        )
    }

    /// An object or a list, as JSON.
    pub(crate) fn get(&self, args: &[&str]) -> Result<Value, Error> {
        let text = self.kubectl(&[&["get", "-o", "json"], args].concat())?;
        Ok(serde_json::from_str(&text).expect("kubectl prints JSON"))
    }

    /// The deployment `name`, once `seen` says so; on a time-out the error quotes its whole status.
    pub(crate) fn await_deployment(
        &self,
        what: &str,
        name: &str,
        limit_s: u64,
        seen: impl Fn(&Value) -> bool,
    ) -> Value {
        self.until(what, limit_s, || {
            let object = self.get(&["llmdeployment", name])?;
            Ok(if seen(&object) {
                Seen::Yes(object)
            } else {
                Seen::NotYet(object["status"].to_string())
            })
        })
    }

    pub(crate) fn await_ready(&self, name: &str) -> Value {
        self.await_deployment("the deployment is Ready", name, 120, |object| {
            condition(object, "Ready")["status"] == "True"
                && object["status"]["observedGeneration"] == object["metadata"]["generation"]
        })
    }

    /// The pods of the deployment `name` that are not going away.
    pub(crate) fn pods(&self, name: &str) -> Result<Vec<Value>, Error> {
        let label = format!("kvasir.dev/llmdeployment={name}");
        let list = self.get(&["pods", "-l", &label])?;
        let pods = list["items"].as_array().cloned().unwrap_or_default();
        Ok(pods
            .into_iter()
            .filter(|pod| pod["metadata"]["deletionTimestamp"].is_null())
            .collect())
    }

    /// The last line of the server's run before this one, in a pod where it ends and is started again.
    pub(crate) fn last_line(&self, pod: &str) -> String {
        let ended = "jsonpath={.status.containerStatuses[0].lastState.terminated.exitCode}";
        self.until("the server ended and was started again", 60, || {
            if self.kubectl(&["get", "pod", pod, "-o", ended])?.is_empty() {
                return Ok(Seen::NotYet("it has not ended".into()));
            }
            let log = self.kubectl(&["logs", pod, "--previous"])?;
            // The kubelet's own words, where the run before was cleared away by one more.
            if log.starts_with("unable to retrieve container logs") {
                return Ok(Seen::NotYet(log));
            }
            let line = log.lines().map(str::trim).rfind(|line| !line.is_empty());
            Ok(line.map_or_else(
                || Seen::NotYet("its log is empty".into()),
                |line| Seen::Yes(line.to_owned()),
            ))
        })
    }

    pub(crate) fn until<T>(
        &self,
        what: &str,
        limit_s: u64,
        look: impl FnMut() -> Result<Seen<T>, Error>,
    ) -> T {
        until(
            what,
            Duration::from_secs(limit_s),
            Duration::from_millis(300),
            look,
        )
        .expect("it comes about")
    }

    /// The base URL of a server's API, by its Service's name.
    pub(crate) fn url(&self, name: &str) -> String {
        let service = self.get(&["service", name]).expect("the Service");
        let port = &service["spec"]["ports"][0]["port"];
        format!("http://{name}.{}.svc.cluster.local:{port}/v1", self.name)
    }

    /// Asks through the Service's name with the `openai` package, from inside a node.
    pub(crate) fn ask(&self, name: &str, question: &str) -> Value {
        self.ask_model(name, "kvasir-demo", question)
    }

    /// The same, of a model that goes by the name `model`.
    pub(crate) fn ask_model(&self, name: &str, model: &str, question: &str) -> Value {
        let url = self.url(name);
        let said = self.until("an answer through the Service", 20, || {
            run(self.python("ask.py").args([&url, model, question])).map(Seen::Yes)
        });
        serde_json::from_str(&said).expect("the script prints JSON")
    }

    /// Begins `n_workers` clients that stream answers of `n_tokens` one after the other.
    pub(crate) fn start_clients(&self, name: &str, n_workers: u32, n_tokens: u32) -> Clients {
        self.start_clients_at(&self.url(name), n_workers, n_tokens)
    }

    /// The same of the API at a base URL.
    pub(crate) fn start_clients_at(&self, url: &str, n_workers: u32, n_tokens: u32) -> Clients {
        let mut command = self.python("load.py");
        command.args([
            url.to_owned(),
            "kvasir-demo".into(),
            n_workers.to_string(),
            n_tokens.to_string(),
        ]);
        let child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the clients start");
        Clients { child, n_workers }
    }

    /// Begins clients, each with one connection that it keeps, until a stream is open on every ready pod with the
    /// label `selector`; it is chance which pod a connection goes to.
    pub(crate) fn occupy(
        &self,
        name: &str,
        selector: &str,
        n_tokens: u32,
        clients: &mut Vec<Clients>,
    ) {
        self.until("a stream is open on every pod", 60, || {
            let open = self.open_streams(selector)?;
            if !open.is_empty() && open.iter().all(|n| *n > 0) {
                return Ok(Seen::Yes(()));
            }
            // Between two answers a client has no stream for a moment: one less is all of them.
            let n_clients: u64 = clients.iter().map(|some| u64::from(some.n_workers)).sum();
            if open.iter().sum::<u64>() + 1 >= n_clients {
                let n_workers = u32::try_from(3 * open.len()).unwrap_or(3);
                clients.push(self.start_clients(name, n_workers, n_tokens));
            }
            Ok(Seen::NotYet(format!("{open:?} open, {n_clients} clients")))
        });
    }

    /// The streams open on each pod with a label that is not going away, by its own report.
    fn open_streams(&self, selector: &str) -> Result<Vec<u64>, Error> {
        let pods = self.get(&["pods", "-l", selector])?;
        let stays = |pod: &&Value| pod["metadata"]["deletionTimestamp"].is_null();
        let pods = pods["items"].as_array().into_iter().flatten().filter(stays);
        pods.map(|pod| {
            let report = self.load_report(&pod["metadata"]["name"])?;
            let count = |what: &str| report["queue"][what].as_u64().unwrap_or_default();
            Ok(count("running") + count("waiting"))
        })
        .collect()
    }

    /// What the server in a pod reports of its load, through the API server.
    pub(crate) fn load_report(&self, pod: &Value) -> Result<Value, Error> {
        let pod = pod.as_str().unwrap_or_default();
        let path = format!(
            "/api/v1/namespaces/{}/pods/{pod}:8001/proxy/load",
            self.name
        );
        let report = self.kubectl(&["get", "--raw", &path])?;
        Ok(serde_json::from_str(&report).unwrap_or_default())
    }

    fn python(&self, script: &str) -> std::process::Command {
        let python = toolchain::python().expect("the Python packages");
        let mut command = self.cluster.nodes()[0].command(python.join("bin/python"));
        command.arg(toolchain::workspace().join("e2e/python").join(script));
        command
    }
}

impl Drop for TestNamespace {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let told = self.kubectl(&["get", "llmdeployments,pods,events", "-o", "wide"]);
            kvasir_e2e::progress::say(told.unwrap_or_else(|error| error.to_string()));
        }
        let _ =
            run(self
                .cluster
                .kubectl()
                .args(["delete", "namespace", self.name, "--wait=false"]));
    }
}

/// Clients at work.
pub(crate) struct Clients {
    child: Child,
    n_workers: u32,
}

impl Clients {
    /// Lets every client of all of them finish its answer.
    pub(crate) fn finish(mut all: Vec<Self>) -> Answers {
        for clients in &mut all {
            drop(clients.child.stdin.take());
        }
        let mut answers = Answers::default();
        for clients in all {
            let Answers { whole, failures } = clients.answers();
            answers.whole.extend(whole);
            answers.failures.extend(failures);
        }
        answers
    }

    /// What they say at their end, once they were told to end.
    fn answers(mut self) -> Answers {
        let mut said = String::new();
        self.child
            .stdout
            .take()
            .expect("its output")
            .read_to_string(&mut said)
            .expect("text");
        self.child.wait().expect("it ends");
        let said: Value = serde_json::from_str(&said).expect("the script prints JSON");
        let list = |name: &str| said[name].as_array().cloned().unwrap_or_default();
        Answers {
            whole: list("whole_s")
                .iter()
                .filter_map(Value::as_f64)
                .map(Duration::from_secs_f64)
                .collect(),
            failures: list("failures").iter().map(ToString::to_string).collect(),
        }
    }
}

impl Drop for Clients {
    fn drop(&mut self) {
        drop(self.child.stdin.take());
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// How the clients' requests ended.
#[derive(Default)]
pub(crate) struct Answers {
    /// How long each answer streamed that came whole.
    pub(crate) whole: Vec<Duration>,
    /// What was said of each that did not.
    pub(crate) failures: Vec<String>,
}

impl Answers {
    /// At least one answer, and none that broke off or was refused.
    pub(crate) fn assert_whole(&self) {
        assert!(
            !self.whole.is_empty() && self.failures.is_empty(),
            "{} whole answers; failures: {:?}",
            self.whole.len(),
            self.failures
        );
    }
}

/// A condition of an object, null when it has none of that type.
pub(crate) fn condition(object: &Value, kind: &str) -> Value {
    let conditions = object["status"]["conditions"]
        .as_array()
        .cloned()
        .unwrap_or_default();
    conditions
        .into_iter()
        .find(|condition| condition["type"] == kind)
        .unwrap_or_default()
}

/// The manifest of a deployment of the demo model; `rest` are further lines of its spec.
pub(crate) fn demo(name: &str, rest: &str) -> String {
    format!(
        "apiVersion: kvasir.dev/v1alpha1\nkind: LLMDeployment\nmetadata: {{name: {name}}}\nspec:\n  \
         model: {{servedName: kvasir-demo, source: {{demo: {{}}}}}}\n{rest}\n"
    )
}
