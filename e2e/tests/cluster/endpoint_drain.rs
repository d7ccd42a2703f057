//! Pods that go away, as the cluster's own watches tell: when each was told to go, and when the EndpointSlice
//! stopped listing it as ready. What lies between is how long clients may still be sent to it.

use crate::test_namespace::{Answers, TestNamespace};
use kvasir_e2e::progress;
use serde_json::{Deserializer, Value};
use std::collections::BTreeMap;
use std::process::{Child, Stdio};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

/// The watches, from the moment that this is made.
pub(crate) struct EndpointDrain {
    kubectls: Vec<Child>,
    at_first: Vec<(Instant, Value)>,
    events: Receiver<(Instant, Value)>,
}

impl EndpointDrain {
    /// Watches the pods with the label `selector` and the EndpointSlices of the Service `service`. Both have told
    /// what there is before this returns.
    pub(crate) fn watch(ns: &TestNamespace, selector: &str, service: &str) -> Self {
        let (sender, events) = channel();
        let of_service = format!("kubernetes.io/service-name={service}");
        let kubectls = [("pods", selector), ("endpointslices", &of_service)]
            .map(|(kind, label)| watch(ns, kind, label, sender.clone()))
            .into();
        let mut watch = Self {
            kubectls,
            at_first: Vec::new(),
            events,
        };
        let told = |watch: &Self, kind| watch.at_first.iter().any(|(_, o)| o["kind"] == kind);
        while !(told(&watch, "Pod") && told(&watch, "EndpointSlice")) {
            let event = watch.events.recv_timeout(Duration::from_secs(20));
            watch
                .at_first
                .push(event.expect("both watches tell what there is"));
        }
        watch
    }

    /// For each pod that went meanwhile, how long it stayed listed after it was told to go.
    fn end(mut self) -> BTreeMap<String, Duration> {
        self.stop();
        let at_first = std::mem::take(&mut self.at_first);
        listed_for(at_first.into_iter().chain(self.events.iter()))
    }

    /// `n_gone` pods went, and each of `answers` streamed for longer than any of them stayed listed: whoever
    /// was sent to one of them in that time had a stream open when it was told to go, or got one after it.
    pub(crate) fn assert_outlasted(self, n_gone: usize, answers: &Answers) {
        let listed_for = self.end();
        assert_eq!(listed_for.len(), n_gone, "pods went: {listed_for:?}");
        let longest = listed_for.values().max().expect("a pod went");
        let shortest = answers.whole.iter().min().expect("an answer");
        progress::say(format_args!(
            "    told to go, pods stayed listed for at most {longest:.2?}; the shortest of {} streams took {shortest:.2?}",
            answers.whole.len()
        ));
        assert!(
            shortest > longest,
            "a stream of {shortest:?} ended before a pod was unlisted, which took {longest:?}"
        );
    }

    fn stop(&mut self) {
        for kubectl in &mut self.kubectls {
            let _ = kubectl.kill();
            let _ = kubectl.wait();
        }
    }
}

impl Drop for EndpointDrain {
    fn drop(&mut self) {
        self.stop();
    }
}

fn watch(ns: &TestNamespace, kind: &str, label: &str, sender: Sender<(Instant, Value)>) -> Child {
    let mut kubectl = ns
        .cluster
        .kubectl()
        .args(["--namespace", ns.name, "get", kind, "-l", label])
        .args(["--watch", "-o", "json"])
        .stdout(Stdio::piped())
        .spawn()
        .expect("kubectl starts");
    let said = kubectl.stdout.take().expect("its output");
    std::thread::spawn(move || {
        // It ends with kubectl, in the middle of nothing or of an object.
        for object in Deserializer::from_reader(said)
            .into_iter()
            .map_while(Result::ok)
        {
            if sender.send((Instant::now(), object)).is_err() {
                break;
            }
        }
    });
    kubectl
}

/// From the events of both watches: for each pod that was told to go and is listed as ready no more, the time
/// between the two. Nothing, where the list was the quicker.
fn listed_for(events: impl Iterator<Item = (Instant, Value)>) -> BTreeMap<String, Duration> {
    let mut told: BTreeMap<String, Instant> = BTreeMap::new();
    let mut listed: Vec<String> = Vec::new();
    let mut unlisted: BTreeMap<String, Instant> = BTreeMap::new();
    for (when, object) in events {
        if object["kind"] == "Pod" {
            let name = object["metadata"]["name"].as_str().unwrap_or_default();
            if !object["metadata"]["deletionTimestamp"].is_null() {
                told.entry(name.to_owned()).or_insert(when);
            }
            continue;
        }
        let now: Vec<String> = object["endpoints"]
            .as_array()
            .into_iter()
            .flatten()
            .filter(|endpoint| endpoint["conditions"]["ready"] == true)
            .filter_map(|endpoint| endpoint["targetRef"]["name"].as_str().map(str::to_owned))
            .collect();
        for name in listed.iter().filter(|name| !now.contains(name)) {
            unlisted.insert(name.clone(), when);
        }
        listed = now;
    }
    told.into_iter()
        .filter_map(|(name, told)| {
            let unlisted = unlisted.get(&name)?;
            Some((name, unlisted.saturating_duration_since(told)))
        })
        .collect()
}

#[test]
fn the_time_between_the_word_and_the_list_is_measured() {
    let pod = |name: &str, going: bool| {
        let told = going.then_some("2025-01-01T00:00:00Z");
        serde_json::json!({"kind": "Pod", "metadata": {"name": name, "deletionTimestamp": told}})
    };
    let slice = |ready: &[(&str, bool)]| {
        let endpoint = |(name, ready): &(&str, bool)| serde_json::json!({"targetRef": {"name": name}, "conditions": {"ready": ready}});
        serde_json::json!({"kind": "EndpointSlice", "endpoints": ready.iter().map(endpoint).collect::<Vec<_>>()})
    };
    let start = Instant::now();
    let events = [
        (0, pod("kept", false)),
        (0, slice(&[("kept", true), ("gone", true), ("quick", true)])),
        (1, pod("gone", true)),
        (2, slice(&[("kept", true), ("gone", true)])),
        (3, pod("quick", true)),
        (4, pod("gone", true)),
        (6, slice(&[("kept", true), ("gone", false)])),
        (7, slice(&[("kept", true)])),
    ];
    let measured = listed_for(
        events
            .into_iter()
            .map(|(s, object)| (start + Duration::from_secs(s), object)),
    );
    let want =
        [("gone", 5), ("quick", 0)].map(|(name, s)| (name.to_owned(), Duration::from_secs(s)));
    assert_eq!(measured, BTreeMap::from(want));
}
