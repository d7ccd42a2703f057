//! The wires between nodes: a bridge in the first node with a veth pair to each other one, and routes to
//! each node's pods. Nothing of it is in the machine's own network.

use super::Node;
use crate::Error;
use crate::command::run;
use std::path::Path;

/// The addresses that the pods of all nodes have.
pub(super) const PODS: &str = "10.88.0.0/16";
/// The addresses of Services.
pub(super) const SERVICES: &str = "10.96.0.0/16";

/// Joins the nodes. Without a default route a ClusterIP has no way out of the node for kube-proxy to turn.
pub(super) fn join(nodes: &[Node]) -> Result<(), Error> {
    let Some((first, others)) = nodes.split_first() else {
        return Ok(());
    };
    ip(first, "link add nodes type bridge")?;
    ip(first, &format!("addr add {}/24 dev nodes", first.address()))?;
    ip(first, "link set nodes up")?;
    ip(first, "route add default via 10.87.0.254 dev nodes")?;
    for node in others {
        let (port, holder) = (format!("port{}", node.index), node.holder);
        ip(
            first,
            &format!("link add {port} type veth peer name eth0 netns {holder}"),
        )?;
        ip(first, &format!("link set {port} master nodes up"))?;
        ip(node, &format!("addr add {}/24 dev eth0", node.address()))?;
        ip(node, "link set eth0 up")?;
        ip(node, &format!("route add default via {}", first.address()))?;
    }
    for node in nodes {
        for other in nodes.iter().filter(|other| other.index != node.index) {
            ip(
                node,
                &format!("route add {} via {}", pod_range(other), other.address()),
            )?;
        }
    }
    Ok(())
}

/// The addresses of one node's pods.
pub(super) fn pod_range(node: &Node) -> String {
    format!("10.88.{}.0/24", node.index)
}

/// The CNI configuration of one node. Each pod is routed, not bridged: traffic between two pods of a node
/// passes the node's address translation, so Services work without the kernel's bridge filter.
pub(super) fn cni(node: &Node) -> String {
    format!(
        r#"{{"cniVersion": "0.4.0", "name": "kvasir", "plugins": [
  {{"type": "ptp", "ipMasq": false,
    "ipam": {{"type": "host-local", "ranges": [[{{"subnet": "{}"}}]], "routes": [{{"dst": "0.0.0.0/0"}}], "dataDir": "/run/cni-ipam"}}}},
  {{"type": "portmap", "capabilities": {{"portMappings": true}}}}
]}}"#,
        pod_range(node)
    )
}

fn ip(node: &Node, words: &str) -> Result<(), Error> {
    run(node
        .command_in_network(Path::new("ip"))
        .args(words.split_whitespace()))
    .map(drop)
}
