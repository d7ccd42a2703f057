//! "Read what I wrote": the API server's answers to the operator's last writes, each of which counts until the watch has
//! brought the same object or a later one; and its refusals, each of which stands for a while. The only place that compares
//! versions of objects.

use std::borrow::Cow;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::Resource;
use kube::core::Status;
use serde_json::Value;

use crate::key::{Key, key_of};

/// A request that was refused is made again after this long: a quota may have been raised, a right granted.
const REFUSAL_STANDS: Duration = Duration::from_secs(20);

/// The last write of each object of the kind `K`, with the `W` that it was made from.
#[derive(Debug)]
pub struct LastWrites<K, W = ()>(Mutex<HashMap<Key, Write<K, W>>>);

#[derive(Debug)]
struct Write<K, W> {
    wanted: W,
    answer: Arc<K>,
}

impl<K, W> Default for LastWrites<K, W> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<K: Resource, W> LastWrites<K, W> {
    /// Records the API server's answer to a write of `wanted`.
    pub fn insert(&self, wanted: W, answer: K) {
        let (key, answer) = (key_of(&answer), Arc::new(answer));
        self.lock().insert(key, Write { wanted, answer });
    }

    /// The later of what the watch has brought and of our last write.
    pub fn latest(&self, seen: Arc<K>) -> Arc<K> {
        match self.lock().get(&key_of(seen.as_ref())) {
            Some(ours) if is_later(ours.answer.meta(), seen.meta()) => Arc::clone(&ours.answer),
            _ => seen,
        }
    }

    /// `existing` has the spec that the API server answered to a write of `wanted`. That spec is not always equal to it: a
    /// quantity of 1000m comes back as 1, an empty variable without a value.
    pub fn is_answer(&self, existing: &K, wanted: &W) -> bool
    where
        W: PartialEq,
    {
        let state = |k: &K| (k.meta().uid.clone(), k.meta().generation);
        self.lock()
            .get(&key_of(existing))
            .is_some_and(|write| write.wanted == *wanted && state(&write.answer) == state(existing))
    }

    /// Forgets an object that is gone.
    pub fn remove(&self, key: &Key) {
        self.lock().remove(key);
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Key, Write<K, W>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What the API server refused of late: the same request is not made again at each look.
#[derive(Debug, Default)]
pub struct LastRefusals(Mutex<HashMap<Key, Refusals>>);

/// By kind.
type Refusals = HashMap<Cow<'static, str>, LastRefusal>;

#[derive(Debug)]
struct LastRefusal {
    wanted: Value,
    at: Instant,
    said: Box<Status>,
}

impl LastRefusals {
    /// What the API server said to the same request less than [`REFUSAL_STANDS`] before `now`.
    pub fn latest(
        &self,
        kind: &str,
        key: &Key,
        wanted: &Value,
        now: Instant,
    ) -> Option<Box<Status>> {
        let held = self.lock();
        let refusal = held.get(key)?.get(kind)?;
        let stands = refusal.wanted == *wanted && now.duration_since(refusal.at) < REFUSAL_STANDS;
        stands.then(|| refusal.said.clone())
    }

    /// Records a refusal of `wanted`.
    pub fn insert(
        &self,
        kind: Cow<'static, str>,
        key: Key,
        wanted: Value,
        now: Instant,
        said: Box<Status>,
    ) {
        let refusal = LastRefusal {
            wanted,
            at: now,
            said,
        };
        let mut held = self.lock();
        held.entry(key).or_default().insert(kind, refusal);
    }

    /// Forgets a deployment that is gone.
    pub fn remove(&self, key: &Key) {
        self.lock().remove(key);
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Key, Refusals>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Both are states of one object, and `ours` is the later one. Where a version is no number, the watch is right.
fn is_later(ours: &ObjectMeta, seen: &ObjectMeta) -> bool {
    let versions = version(ours).zip(version(seen));
    ours.uid == seen.uid && versions.is_some_and(|(ours, seen)| ours > seen)
}

/// An object's version: a decimal number that grows (Kubernetes API Concepts, "Resource versions").
fn version(metadata: &ObjectMeta) -> Option<u64> {
    metadata.resource_version.as_ref()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::apps::v1::Deployment;
    use serde_json::json;

    use super::*;

    fn at(uid: &str, version: &str) -> Deployment {
        serde_json::from_value(
            json!({ "metadata": { "name": "d", "namespace": "n", "uid": uid,
            "resourceVersion": version } }),
        )
        .unwrap()
    }

    #[test]
    fn our_write_counts_until_the_watch_has_caught_up() {
        for (why, written, seen, want) in [
            (
                "the watch is behind: 10 is more than 9",
                "10",
                at("u", "9"),
                "10",
            ),
            ("the watch has it", "10", at("u", "10"), "10"),
            ("the watch is ahead", "10", at("u", "12"), "12"),
            ("another object of the same name", "10", at("v", "7"), "7"),
            (
                "a version that can't be compared",
                "opaque",
                at("u", "7"),
                "7",
            ),
        ] {
            let writes = LastWrites::default();
            writes.insert((), at("u", written));
            let latest = writes.latest(Arc::new(seen));
            assert_eq!(
                latest.metadata.resource_version.as_deref(),
                Some(want),
                "{why}"
            );
        }
        let writes = LastWrites::<Deployment>::default();
        writes.insert((), at("u", "10"));
        writes.remove(&("n".into(), "d".into()));
        let latest = writes.latest(Arc::new(at("u", "9")));
        assert_eq!(latest.metadata.resource_version.as_deref(), Some("9"));
    }

    #[test]
    fn a_refusal_stands_for_the_same_request_for_a_while() {
        let refusals = LastRefusals::default();
        let (kind, key, begun) = (
            Cow::from("Service"),
            ("n".into(), "d".into()),
            Instant::now(),
        );
        let said: Box<Status> = Box::new(serde_json::from_value(json!({ "code": 422 })).unwrap());
        refusals.insert(kind.clone(), key.clone(), json!({ "a": 1 }), begun, said);
        for (why, kind, wanted, second, want) in [
            ("the same", "Service", json!({ "a": 1 }), 19, true),
            ("after a while", "Service", json!({ "a": 1 }), 20, false),
            ("another request", "Service", json!({ "a": 2 }), 0, false),
            ("another child", "Deployment", json!({ "a": 1 }), 0, false),
        ] {
            let now = begun + Duration::from_secs(second);
            let found = refusals.latest(kind, &key, &wanted, now);
            assert_eq!(found.is_some_and(|said| said.code == 422), want, "{why}");
        }
        refusals.remove(&key);
        assert!(
            refusals
                .latest(&kind, &key, &json!({ "a": 1 }), begun)
                .is_none()
        );
    }

    #[test]
    fn an_answer_stands_for_what_was_wanted_until_either_changes() {
        let wanted = |cpu: &str| -> Deployment {
            serde_json::from_value(json!({ "metadata": { "name": "d", "namespace": "n" },
                "spec": { "selector": {}, "template": { "spec": { "containers": [
                    { "name": "server", "resources": { "requests": { "cpu": cpu } } }] } } } }))
            .unwrap()
        };
        let held = |uid: &str, generation: i64| {
            let mut held = wanted("1");
            held.metadata.uid = Some(uid.into());
            held.metadata.generation = Some(generation);
            held
        };
        let writes = LastWrites::default();
        assert!(
            !writes.is_answer(&held("u", 4), &wanted("1000m")),
            "never written"
        );
        writes.insert(wanted("1000m"), held("u", 4));
        for (why, existing, wanted, stands) in [
            ("in its own words", held("u", 4), wanted("1000m"), true),
            ("edited since", held("u", 5), wanted("1000m"), false),
            ("something else is wanted", held("u", 4), wanted("2"), false),
            (
                "another of the same name",
                held("v", 4),
                wanted("1000m"),
                false,
            ),
        ] {
            assert_eq!(writes.is_answer(&existing, &wanted), stands, "{why}");
        }
    }
}
