//! The chart's monitoring in real software: the Prometheus operator reads the PodMonitors, a Prometheus runs with
//! the configuration that follows, and every query of the dashboard finds series in it. Debian's Prometheus is
//! built without the discovery of pods, so this says in its place which pods there are. Grafana itself is not
//! here: of its side of the dashboard only the shape is checked.

use crate::test_namespace::{TestNamespace, demo};
use crate::{kvasir, release};
use kvasir_e2e::cluster::Cluster;
use kvasir_e2e::command::{run, run_with_input};
use kvasir_e2e::toolchain::{Monitoring, workspace};
use kvasir_e2e::wait::Seen;
use kvasir_e2e::{Error, quickstart};
use serde_json::Value;
use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};

/// The kinds that the Prometheus operator insists on when it configures a Prometheus.
const KINDS: [&str; 6] = [
    "podmonitors",
    "probes",
    "prometheuses",
    "prometheusrules",
    "scrapeconfigs",
    "servicemonitors",
];
/// The API server, by a name that its certificate has and every node resolves.
const API: &str = "https://kubernetes.default.svc";
/// The Prometheus, in the first node's network.
const PROMETHEUS: &str = "http://127.0.0.1:9090";
/// The namespace of the test, and the deployment in it.
const NAMESPACE: &str = "monitoring";
const NAME: &str = "watched";

/// A program that runs in the first node until this is dropped.
struct NodeProgram(Child);

impl NodeProgram {
    fn start(cluster: &Cluster, program: &Path, args: &[String]) -> Self {
        let name = program.file_name().expect("a name").to_string_lossy();
        let log = cluster.folder().join(format!("{name}.log"));
        let log = fs::File::create(log).expect("a log");
        let child = cluster.nodes()[0]
            .command(program)
            .args(args)
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a log"))
            .stderr(log)
            .spawn();
        Self(child.expect("it starts"))
    }
}

impl Drop for NodeProgram {
    fn drop(&mut self) {
        // nsenter has forked: the program is a child of what was started, and ends with the node at the latest.
        let _ = run(Command::new("pkill").args(["-P", &self.0.id().to_string()]));
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What the chart renders of its monitoring, with scrapes every second.
fn rendered(cluster: &Cluster) -> String {
    run(cluster
        .access()
        .helm()
        .arg("template")
        .args(["kvasir", "charts/kvasir", "--namespace", quickstart::SYSTEM])
        .args(["--show-only", "templates/monitoring.yaml"])
        .args(["--set", "podMonitor.enabled=true,podMonitor.interval=1s"])
        .current_dir(workspace()))
    .expect("rendered")
}

/// The files with which the administrator's kubeconfig proves who it is: authority, certificate, key.
fn credentials(cluster: &Cluster) -> [String; 3] {
    let said = run(cluster
        .kubectl()
        .args(["config", "view", "--raw", "-o", "json"]));
    let config: Value = serde_json::from_str(&said.expect("the kubeconfig")).expect("JSON");
    let user = &config["users"][0]["user"];
    [
        &config["clusters"][0]["cluster"]["certificate-authority"],
        &user["client-certificate"],
        &user["client-key"],
    ]
    .map(|path| path.as_str().expect("a path").to_owned())
}

/// Has the operator turn the cluster's PodMonitors into a configuration; the configuration.
fn configuration(ns: &TestNamespace, operator: &Path) -> String {
    let cluster = ns.cluster;
    let [authority, certificate, key] = credentials(cluster);
    let _operator = NodeProgram::start(
        cluster,
        operator,
        &[
            format!("--apiserver={API}"),
            format!("--ca-file={authority}"),
            format!("--cert-file={certificate}"),
            format!("--key-file={key}"),
        ],
    );
    // No replica: the operator writes the configuration, and this test runs the Prometheus.
    ns.apply(
        "
apiVersion: monitoring.coreos.com/v1
kind: Prometheus
metadata: {name: test}
spec:
  replicas: 0
  version: v2.42.0
  podMonitorSelector: {}
  podMonitorNamespaceSelector: {}
",
    )
    .expect("accepted");
    let config = ns.until("the operator writes the configuration", 60, || {
        let secret = ns.get(&["secret", "prometheus-test"])?;
        let packed = secret["data"]["prometheus.yaml.gz"]
            .as_str()
            .unwrap_or_default();
        let config = run_with_input(
            Command::new("bash").args(["-c", "set -o pipefail; base64 -d | gunzip"]),
            packed,
        )?;
        let jobs = ["kvasir-operator/0", "kvasir-operator-servers/0"];
        let whole = jobs
            .iter()
            .all(|job| config.contains(&format!("podMonitor/{}/{job}", quickstart::SYSTEM)));
        Ok(if whole {
            Seen::Yes(config)
        } else {
            Seen::NotYet(config)
        })
    });
    // What the operator's sidecar puts in for the first of one replica.
    config
        .replace("$(SHARD)", "0")
        .replace("$(POD_NAME)", "prometheus-test-0")
}

/// The configuration with a file of targets in place of each discovery of pods, in the namespaces that it names.
fn with_targets(ns: &TestNamespace, config: &str) -> String {
    let pods = run(ns
        .cluster
        .kubectl()
        .args(["get", "pods", "-A", "-o", "json"]));
    let pods: Value = serde_json::from_str(&pods.expect("the pods")).expect("JSON");
    let mut lines = Vec::new();
    let mut namespaces: Option<Vec<&str>> = None;
    for line in config.lines() {
        if let Some(names) = &mut namespaces {
            if line.starts_with("   ") || line.starts_with("  - ") {
                names.extend(line.strip_prefix("      - "));
                continue;
            }
            let file = format!("targets-{}.json", lines.len());
            let file = ns.cluster.folder().join(file);
            let targets = targets(&pods, names);
            fs::write(&file, Value::from(targets).to_string()).expect("written");
            lines.push(format!(
                "  file_sd_configs:\n  - files: ['{}']",
                file.display()
            ));
            namespaces = None;
        }
        match line {
            "  kubernetes_sd_configs:" => namespaces = Some(Vec::new()),
            _ => lines.push(line.to_owned()),
        }
    }
    lines.join("\n")
}

/// The containers' ports in some namespaces, or in all where none is named, with the labels that the discovery of
/// pods gives them (Prometheus' documentation, `kubernetes_sd_config`, role `pod`).
fn targets(pods: &Value, namespaces: &[&str]) -> Vec<Value> {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
    let mut found = Vec::new();
    for pod in list(&pods["items"]) {
        let namespace = text(&pod["metadata"]["namespace"]);
        let elsewhere = !namespaces.is_empty() && !namespaces.contains(&namespace.as_str());
        if elsewhere || pod["status"]["podIP"].is_null() {
            continue;
        }
        let mut of_pod = serde_json::Map::new();
        let mut say = |name: &str, value: String| {
            let name = name.replace(|c: char| !c.is_ascii_alphanumeric(), "_");
            of_pod.insert(format!("__meta_kubernetes_{name}"), value.into());
        };
        say("pod_name", text(&pod["metadata"]["name"]));
        say("pod_phase", text(&pod["status"]["phase"]));
        for (name, value) in pod["metadata"]["labels"].as_object().into_iter().flatten() {
            say(&format!("pod_label_{name}"), text(value));
            say(&format!("pod_labelpresent_{name}"), "true".into());
        }
        say("namespace", namespace);
        for container in list(&pod["spec"]["containers"]) {
            for port in list(&container["ports"]) {
                let number = port["containerPort"].to_string();
                let mut labels = of_pod.clone();
                for (name, value) in [
                    ("container_name", text(&container["name"])),
                    ("container_port_name", text(&port["name"])),
                    ("container_port_number", number.clone()),
                ] {
                    labels.insert(format!("__meta_kubernetes_pod_{name}"), value.into());
                }
                let address = format!("{}:{number}", text(&pod["status"]["podIP"]));
                found.push(serde_json::json!({"targets": [address], "labels": labels}));
            }
        }
    }
    found
}

fn promtool(cluster: &Cluster, monitoring: &Monitoring) -> Command {
    cluster.nodes()[0].command(monitoring.prometheus.join("promtool"))
}

/// The series that a query finds now.
fn series(cluster: &Cluster, monitoring: &Monitoring, query: &str) -> Result<Vec<Value>, Error> {
    let said = run(promtool(cluster, monitoring)
        .args(["query", "-o", "json", "instant", PROMETHEUS])
        .arg(query))?;
    Ok(serde_json::from_str(&said).unwrap_or_default())
}

#[test]
fn prometheus_finds_every_series_that_the_dashboard_shows() {
    let Some(cluster) = kvasir() else { return };
    let monitoring = Monitoring::ensure().expect("the programs");
    let ns = TestNamespace::new(cluster, NAMESPACE);
    let crds = KINDS.map(|kind| {
        monitoring
            .crds
            .join(format!("monitoring.coreos.com_{kind}.yaml"))
    });
    let crds = crds
        .map(|path| fs::read_to_string(path).expect("a CRD"))
        .join("\n---\n");
    cluster
        .access()
        .apply(&crds)
        .expect("the CRDs are accepted");
    let rest = "  autoscaling: {maxReplicas: 1}\n  drainSeconds: 5\n  resources: {requests: {cpu: 50m, memory: 128Mi}, limits: {memory: 1Gi}}";
    ns.apply(&demo(NAME, rest)).expect("accepted");
    ns.until("the PodMonitors are accepted", 30, || {
        cluster.access().apply(&rendered(cluster)).map(Seen::Yes)
    });

    let config = configuration(&ns, &monitoring.operator);
    ns.await_ready(NAME);
    // The operator's pod must stay the one that is a target.
    let _alone = release();
    let config = with_targets(&ns, &config);
    let file = cluster.folder().join("prometheus.yaml");
    fs::write(&file, config).expect("written");
    run(promtool(cluster, &monitoring)
        .args(["check", "config"])
        .arg(&file))
    .expect("Prometheus takes the configuration");
    let _prometheus = NodeProgram::start(
        cluster,
        &monitoring.prometheus.join("prometheus"),
        &[
            format!("--config.file={}", file.display()),
            format!(
                "--storage.tsdb.path={}",
                cluster.folder().join("prometheus").display()
            ),
            "--web.listen-address=127.0.0.1:9090".into(),
        ],
    );
    ns.ask(NAME, "What is a block table?");

    for query in queries(&dashboard()) {
        let found = ns.until(&format!("{query} finds series"), 60, || {
            let found = series(cluster, &monitoring, &query)?;
            Ok(if found.is_empty() {
                Seen::NotYet("no series".into())
            } else {
                Seen::Yes(found)
            })
        });
        assert!(
            found.iter().all(|s| s["metric"].as_object().is_some()),
            "{query}: {found:?}"
        );
    }
    // Pods of other tests are targets too, and come and go.
    let down = format!(
        "up{{namespace=~\"{NAMESPACE}|{}\"}} == 0",
        quickstart::SYSTEM
    );
    let down = series(cluster, &monitoring, &down).expect("an answer");
    assert!(down.is_empty(), "every target is scraped: {down:?}");

    let pod = ns.pods(NAME).expect("pods").remove(0);
    let server = pod["metadata"]["name"].as_str().expect("a name").to_owned();
    let operators = ["-n", quickstart::SYSTEM, "get", "pods", "-o", "name"];
    let operators = run(cluster.kubectl().args(operators)).expect("the operators' pods");
    let operators = operators.lines().map(|line| {
        let operator = line.trim_start_matches("pod/");
        (quickstart::SYSTEM, format!("{operator}:8080"))
    });
    for (namespace, pod) in operators.chain([(NAMESPACE, format!("{server}:8001"))]) {
        let path = format!("/api/v1/namespaces/{namespace}/pods/{pod}/proxy/metrics");
        let metrics = run(cluster.kubectl().args(["get", "--raw", &path])).expect("metrics");
        assert!(metrics.contains("kvasir_"), "{pod}: {metrics}");
        // Complaints go to standard error and make it fail; vLLM's names are not ours to choose.
        let said = run_with_input(
            Command::new("bash")
                .args(["-c", "\"$0\" check metrics 2>&1 || [ $? = 3 ]"])
                .arg(monitoring.prometheus.join("promtool")),
            &metrics,
        )
        .expect("promtool reads them");
        let ours: Vec<&str> = said
            .lines()
            .filter(|line| !line.starts_with("vllm:"))
            .collect();
        assert!(ours.is_empty(), "{pod}: {ours:?}");
    }
}

fn dashboard() -> Value {
    let path = workspace().join("charts/kvasir/dashboards/kvasir.json");
    serde_json::from_slice(&fs::read(path).expect("the dashboard")).expect("JSON")
}

/// Every query of the dashboard as Grafana would send it for the one deployment: its panels', and for each
/// variable one that finds the values that it offers.
fn queries(dashboard: &Value) -> Vec<String> {
    let filled = |query: &str| {
        query
            .replace("$__rate_interval", "1m")
            .replace("$namespace", NAMESPACE)
            .replace("$llmdeployment", NAME)
    };
    let panels = dashboard["panels"].as_array().expect("panels").iter();
    let shown = panels
        .flat_map(|panel| panel["targets"].as_array().expect("targets"))
        .map(|target| filled(target["expr"].as_str().expect("a query")));
    let variables = dashboard["templating"]["list"]
        .as_array()
        .expect("variables");
    let offered = variables.iter().filter(|variable| variable["type"] == "query").map(|variable| {
        let query = variable["query"]["query"].as_str().expect("a query");
        let (metric, label) = query
            .strip_prefix("label_values(")
            .and_then(|rest| rest.strip_suffix(')')?.rsplit_once(", "))
            .expect("label_values(metric, label)");
        let name = variable["name"].as_str().expect("a name");
        let value = filled(&format!("${name}"));
        filled(&format!("count by ({label}) ({metric}) and on ({label}) label_replace(vector(1), \"{label}\", \"{value}\", \"\", \"\")"))
    });
    shown.chain(offered).collect()
}

#[test]
fn the_dashboards_panels_are_whole_and_do_not_overlap() {
    let dashboard = dashboard();
    assert!(dashboard["title"].is_string() && dashboard["uid"].is_string());
    let mut taken = Vec::new();
    let mut ids = Vec::new();
    for panel in dashboard["panels"].as_array().expect("panels") {
        let title = panel["title"].as_str().expect("a title");
        assert_eq!(panel["datasource"]["uid"], "${datasource}", "{title}");
        assert!(panel["description"].is_string(), "{title}");
        assert!(!ids.contains(&&panel["id"]), "{title}: its id is its own");
        ids.push(&panel["id"]);
        let at = |side: &str| panel["gridPos"][side].as_u64().expect("a place");
        for x in at("x")..at("x") + at("w") {
            assert!(x < 24, "{title}: Grafana's grid has 24 columns");
            for y in at("y")..at("y") + at("h") {
                assert!(!taken.contains(&(x, y)), "{title} overlaps at {x}, {y}");
                taken.push((x, y));
            }
        }
        let targets = panel["targets"].as_array().expect("targets");
        assert!(!targets.is_empty(), "{title} shows something");
        let mut references: Vec<_> = targets
            .iter()
            .map(|t| t["refId"].as_str().expect("refId"))
            .collect();
        references.sort_unstable();
        references.dedup();
        assert_eq!(references.len(), targets.len(), "{title}: refIds differ");
    }
}
