//! The server behind a Service, without the operator: streamed answers, and no answer lost while pods go.

use crate::endpoint_drain::EndpointDrain;
use crate::test_namespace::{Clients, TestNamespace};
use crate::with_image;
use kvasir_e2e::wait::Seen;

const SERVER: &str = "
apiVersion: apps/v1
kind: Deployment
metadata: {name: plain}
spec:
  replicas: 2
  selector: {matchLabels: {app: plain}}
  template:
    metadata: {labels: {app: plain}}
    spec:
      terminationGracePeriodSeconds: 70
      securityContext: {runAsNonRoot: true, runAsUser: 65532}
      containers:
      - name: server
        image: kvasir.dev/kvasir:0.1.0
        args: [--model, demo, --host, 0.0.0.0, --management-port, '8001', --device, cpu]
        ports: [{name: http, containerPort: 8000}, {name: management, containerPort: 8001}]
        readinessProbe: {httpGet: {path: /ready, port: management}, periodSeconds: 1}
        resources: {requests: {cpu: 50m, memory: 128Mi}, limits: {memory: 1Gi}}
        securityContext: {readOnlyRootFilesystem: true, allowPrivilegeEscalation: false, capabilities: {drop: [ALL]}}
---
apiVersion: v1
kind: Service
metadata: {name: plain}
spec:
  selector: {app: plain}
  ports: [{name: http, port: 8000, targetPort: http}]
";

#[test]
fn answers_stream_through_the_services_name_and_survive_a_rolling_update() {
    let Some(cluster) = with_image() else { return };
    let ns = TestNamespace::new(cluster, "serving");
    ns.apply(SERVER).expect("accepted");
    ns.kubectl(&["rollout", "status", "deployment/plain", "--timeout=120s"])
        .expect("ready");
    let said = ns.ask("plain", "What is a block table?");
    assert!(
        said["pieces"].as_array().expect("pieces").len() > 3,
        "the answer came in pieces: {said}"
    );
    assert!(
        said["answer"].as_str().expect("text").contains("block"),
        "the answer is about blocks: {said}"
    );

    let mut clients = Vec::new();
    ns.occupy("plain", "app=plain", 500, &mut clients);
    let drain = EndpointDrain::watch(&ns, "app=plain", "plain");
    ns.kubectl(&["rollout", "restart", "deployment/plain"])
        .expect("restarted");
    ns.kubectl(&["rollout", "status", "deployment/plain", "--timeout=180s"])
        .expect("rolled out");
    ns.kubectl(&["scale", "deployment/plain", "--replicas=1"])
        .expect("scaled down");
    ns.until("one pod is left", 90, || {
        let pods = ns.get(&["pods", "-l", "app=plain"])?;
        let n_pods = pods["items"].as_array().map_or(0, Vec::len);
        Ok(if n_pods == 1 {
            Seen::Yes(())
        } else {
            Seen::NotYet(format!("{n_pods} pods"))
        })
    });
    let answers = Clients::finish(clients);
    answers.assert_whole();
    drain.assert_outlasted(3, &answers);
}
