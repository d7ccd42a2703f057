//! The cluster itself: what every other test takes for granted.

use crate::cluster;
use kvasir_e2e::command::run;
use kvasir_e2e::wait::{Seen, until};
use std::time::Duration;

const SERVICE: &str = "
apiVersion: v1
kind: Service
metadata: {name: dns-health, namespace: kube-system}
spec:
  selector: {k8s-app: kube-dns}
  ports: [{port: 80, targetPort: 8080}]
";

#[test]
fn a_service_answers_by_its_name_from_every_node() {
    let Some(cluster) = cluster() else { return };
    cluster
        .access()
        .apply(SERVICE)
        .expect("the Service is accepted");
    for node in cluster.nodes() {
        let ask = "import urllib.request as r; \
                   print(r.urlopen('http://dns-health.kube-system.svc.cluster.local/health', timeout=3).read())";
        let answer = until(
            "the Service answers",
            Duration::from_secs(20),
            Duration::from_millis(200),
            || run(node.command("python3").args(["-c", ask])).map(Seen::Yes),
        )
        .expect("an answer");
        assert!(answer.contains("OK"), "{} got {answer}", node.name());
    }
}

#[test]
fn logs_and_exec_reach_a_container() {
    let Some(cluster) = cluster() else { return };
    let kubectl = |args: &[&str]| run(cluster.kubectl().args(["-n", "kube-system"]).args(args));
    let logs = kubectl(&["logs", "deployment/coredns"]).expect("logs");
    assert!(
        logs.contains("CoreDNS-1.13.1"),
        "the log has CoreDNS's banner: {logs}"
    );
    let said =
        kubectl(&["exec", "deployment/coredns", "--", "/coredns", "-version"]).expect("exec");
    assert!(
        said.contains("1.13.1"),
        "the program in the container answers: {said}"
    );
}
