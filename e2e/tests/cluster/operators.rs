//! Two operators, of which one acts: when it hangs, the other takes over, and the first stands by once it is back.

use crate::test_namespace::{TestNamespace, demo};
use crate::{kvasir, release, scaling};
use kvasir_e2e::cluster::Cluster;
use kvasir_e2e::command::run;
use kvasir_e2e::progress;
use kvasir_e2e::quickstart::SYSTEM;
use kvasir_e2e::wait::Seen;
use serde_json::Value;
use std::time::Instant;

fn get(cluster: &Cluster, args: &[&str]) -> Value {
    let args = [&["--namespace", SYSTEM, "get", "-o", "json"], args].concat();
    let text = run(cluster.kubectl().args(args)).expect("it is there");
    serde_json::from_str(&text).expect("kubectl prints JSON")
}

/// The name of the pod that holds the lease.
fn holder(cluster: &Cluster) -> String {
    let lease = get(cluster, &["lease", "kvasir-operator"]);
    let holder = lease["spec"]["holderIdentity"].as_str();
    holder.unwrap_or_default().to_owned()
}

#[test]
fn another_operator_takes_over_from_one_that_hangs() {
    let Some(cluster) = kvasir() else { return };
    let ns = TestNamespace::new(cluster, "operators");
    // Nothing runs: what an operator does is seen at the child Deployment.
    ns.apply(&demo("demo", "  replicas: 0\n  drainSeconds: 5"))
        .expect("accepted");
    ns.await_ready("demo");
    let wanted = |replicas: u32| {
        let spec = format!(r#"{{"spec": {{"drainSeconds": {}}}}}"#, 5 + replicas);
        ns.kubectl(&[
            "patch",
            "llmdeployment",
            "demo",
            "--type=merge",
            "-p",
            &spec,
        ])
        .expect("patched");
        // The grace period follows the field, and no pod is made.
        ns.until("an operator acts on it", 60, || {
            let path = "jsonpath={.spec.template.spec.terminationGracePeriodSeconds}";
            let said = ns.kubectl(&["get", "deployment", "demo", "-o", path])?;
            Ok(if said == (15 + replicas).to_string() {
                Seen::Yes(())
            } else {
                Seen::NotYet(said)
            })
        });
    };
    // An upgrade would replace both.
    let _alone = release();
    let pod = ns.until("two of them run, and one leads", 60, || {
        let pods = get(
            cluster,
            &["pods", "-l", "app.kubernetes.io/name=kvasir-operator"],
        );
        let stays = |pod: &&Value| pod["metadata"]["deletionTimestamp"].is_null();
        let pods = pods["items"].as_array().into_iter().flatten();
        let pods: Vec<Value> = pods.filter(stays).cloned().collect();
        let holder = holder(cluster);
        let leads = |pod: &&Value| pod["metadata"]["name"] == holder.as_str();
        Ok(match (pods.len(), pods.iter().find(leads)) {
            (2, Some(leader)) => Seen::Yes(leader.clone()),
            (n, _) => Seen::NotYet(format!("{n} run, {holder} leads")),
        })
    });
    let first = holder(cluster);
    assert_eq!(pod["metadata"]["name"], first.as_str(), "it is renewed");
    wanted(1);
    assert_eq!(holder(cluster), first, "it is renewed");

    let hung = Instant::now();
    scaling::signal(cluster, &pod, "STOP", "T");
    wanted(2);
    let took = hung.elapsed();
    progress::say(format_args!(
        "    a change was acted on {took:.2?} after the operator that led hung"
    ));
    let second = holder(cluster);
    assert_ne!(second, first);
    scaling::signal(cluster, &pod, "CONT", "RS");
    let lease = |operator: &str| {
        run(cluster
            .kubectl()
            .args(["--namespace", SYSTEM, "logs", operator]))
    };
    ns.until("the first one stands by", 30, || {
        let log = lease(&first)?;
        Ok(if log.contains("standing by: the lease was lost") {
            Seen::Yes(())
        } else {
            Seen::NotYet("it has not said so".into())
        })
    });
    wanted(3);
    assert_eq!(holder(cluster), second, "it does not take the lease back");
}
