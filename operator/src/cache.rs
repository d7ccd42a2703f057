//! What the watches have brought: children by name, pods by deployment. It makes a reconcile of one deployment among
//! thousands cost no read of the API server.
//!
//! It may be behind the API server, so two things are never concluded from it: that an object does not exist (it holds
//! only what carries our label, and `observe` asks the API server instead), and that a child Deployment is as it was
//! before we wrote it (the answer to our own write counts until the watch has caught up, or one scaling would be decided
//! and told twice).

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{Pod, Service, ServiceAccount};
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use kube::runtime::reflector::store::Writer;
use kube::runtime::reflector::{self, ObjectRef, Store};
use kube::runtime::watcher::Event;
use kube::{Resource, ResourceExt};
use tokio::sync::{OnceCell, watch};

use crate::pod::serves;
use crate::stored::version;

/// Namespace and name.
pub type Key = (String, String);

/// The reading side.
#[derive(Debug)]
pub struct Cache {
    deployments: Store<Deployment>,
    /// Our last write of each child Deployment.
    written: Mutex<HashMap<Key, Written>>,
    services: Store<Service>,
    budgets: Store<PodDisruptionBudget>,
    accounts: Store<ServiceAccount>,
    pods: Arc<Pods>,
    ready: OnceCell<()>,
}

/// A write of a child Deployment.
#[derive(Debug)]
struct Written {
    wanted: Deployment,
    answer: Arc<Deployment>,
}

/// The writing side, to be fed by the watches.
#[derive(Debug)]
pub struct Writers {
    /// Of the child Deployments.
    pub deployments: Writer<Deployment>,
    /// Of the Services.
    pub services: Writer<Service>,
    /// Of the PodDisruptionBudgets.
    pub budgets: Writer<PodDisruptionBudget>,
    /// Of the ServiceAccounts.
    pub accounts: Writer<ServiceAccount>,
    /// Of the pods.
    pub pods: Arc<Pods>,
}

impl Cache {
    /// Both sides.
    #[must_use]
    pub fn new() -> (Self, Writers) {
        let (deployments, to_deployments) = reflector::store();
        let (services, to_services) = reflector::store();
        let (budgets, to_budgets) = reflector::store();
        let (accounts, to_accounts) = reflector::store();
        let pods = Arc::new(Pods::default());
        let writers = Writers {
            deployments: to_deployments,
            services: to_services,
            budgets: to_budgets,
            accounts: to_accounts,
            pods: Arc::clone(&pods),
        };
        let cache = Self {
            deployments,
            written: Mutex::default(),
            services,
            budgets,
            accounts,
            pods,
            ready: OnceCell::new(),
        };
        (cache, writers)
    }

    /// Waits until each watch has brought everything that there was at its start.
    pub async fn ready(&self) {
        let all = || async {
            // An error says that the watches have ended, and with them the controller that waits here.
            let _ = tokio::join!(
                self.deployments.wait_until_ready(),
                self.services.wait_until_ready(),
                self.budgets.wait_until_ready(),
                self.accounts.wait_until_ready(),
                self.pods.ready(),
            );
        };
        // A store wakes but one of those who wait for it, and reconciles are tasks of their own.
        self.ready.get_or_init(all).await;
    }

    /// The child Deployment, no older than our last write of it.
    pub fn deployment(&self, key: &Key) -> Option<Arc<Deployment>> {
        let seen = get(&self.deployments, key)?;
        let written = self.written.lock().unwrap_or_else(PoisonError::into_inner);
        let ours = written.get(key).map(|written| &written.answer);
        Some(match ours {
            Some(ours) if is_newer(ours, &seen) => Arc::clone(ours),
            _ => seen,
        })
    }

    /// Takes note of the API server's answer to our write of `wanted`.
    pub fn wrote(&self, wanted: &Deployment, answer: Deployment) {
        let mut written = self.written.lock().unwrap_or_else(PoisonError::into_inner);
        let (wanted, answer) = (wanted.clone(), Arc::new(answer));
        written.insert(key_of(&wanted), Written { wanted, answer });
    }

    /// The spec of `existing` is the API server's answer to a write of `wanted`, which is not always equal to it: a
    /// quantity of 1000m comes back as 1, an empty variable without a value.
    pub fn answers(&self, existing: &Deployment, wanted: &Deployment) -> bool {
        let written = self.written.lock().unwrap_or_else(PoisonError::into_inner);
        let state = |d: &Deployment| (d.metadata.uid.clone(), d.metadata.generation);
        written.get(&key_of(wanted)).is_some_and(|written| {
            written.wanted == *wanted && state(&written.answer) == state(existing)
        })
    }

    /// Forgets what was written for a deployment that is gone.
    pub fn forget(&self, key: &Key) {
        let mut written = self.written.lock().unwrap_or_else(PoisonError::into_inner);
        written.remove(key);
    }

    /// The Service.
    pub fn service(&self, key: &Key) -> Option<Arc<Service>> {
        get(&self.services, key)
    }

    /// The PodDisruptionBudget.
    pub fn budget(&self, key: &Key) -> Option<Arc<PodDisruptionBudget>> {
        get(&self.budgets, key)
    }

    /// The ServiceAccount.
    pub fn account(&self, key: &Key) -> Option<Arc<ServiceAccount>> {
        get(&self.accounts, key)
    }

    /// The pods with the deployment's label, by name.
    pub fn pods(&self, key: &Key) -> Vec<Arc<Pod>> {
        self.pods.of(key)
    }
}

/// Pods by the deployment that they serve.
#[derive(Debug)]
pub struct Pods {
    held: RwLock<Held>,
    ready: watch::Sender<bool>,
}

impl Default for Pods {
    fn default() -> Self {
        Self {
            held: RwLock::default(),
            ready: watch::Sender::new(false),
        }
    }
}

#[derive(Debug, Default)]
struct Held {
    current: Index,
    /// What a list that began anew has brought so far.
    incoming: Index,
}

#[derive(Debug, Default)]
struct Index {
    of_deployment: HashMap<Key, BTreeMap<String, Arc<Pod>>>,
    /// The deployment of each pod: its label may be changed.
    deployment_of: HashMap<Key, Key>,
}

impl Pods {
    /// Takes an event of the watch in.
    pub fn see(&self, event: &Event<Pod>) {
        let mut held = self.held.write().unwrap_or_else(PoisonError::into_inner);
        match event {
            Event::Init => held.incoming = Index::default(),
            Event::InitApply(pod) => held.incoming.put(pod),
            Event::InitDone => {
                held.current = std::mem::take(&mut held.incoming);
                self.ready.send_replace(true);
            }
            Event::Apply(pod) => held.current.put(pod),
            Event::Delete(pod) => held.current.take(&key_of(pod)),
        }
    }

    async fn ready(&self) -> Result<(), watch::error::RecvError> {
        let mut ready = self.ready.subscribe();
        ready.wait_for(|ready| *ready).await.map(drop)
    }

    fn of(&self, deployment: &Key) -> Vec<Arc<Pod>> {
        let held = self.held.read().unwrap_or_else(PoisonError::into_inner);
        let pods = held.current.of_deployment.get(deployment);
        pods.into_iter()
            .flat_map(BTreeMap::values)
            .cloned()
            .collect()
    }
}

impl Index {
    fn put(&mut self, pod: &Pod) {
        let key = key_of(pod);
        self.take(&key);
        if let Some(deployment) = serves(pod) {
            let deployment = (key.0.clone(), deployment.to_owned());
            let pods = self.of_deployment.entry(deployment.clone()).or_default();
            pods.insert(key.1.clone(), Arc::new(pod.clone()));
            self.deployment_of.insert(key, deployment);
        }
    }

    fn take(&mut self, pod: &Key) {
        let Some(deployment) = self.deployment_of.remove(pod) else {
            return;
        };
        if let Some(pods) = self.of_deployment.get_mut(&deployment) {
            pods.remove(&pod.1);
            if pods.is_empty() {
                self.of_deployment.remove(&deployment);
            }
        }
    }
}

/// Namespace and name of an object.
pub fn key_of<K: Resource>(object: &K) -> Key {
    (object.namespace().unwrap_or_default(), object.name_any())
}

fn get<K>(store: &Store<K>, (namespace, name): &Key) -> Option<Arc<K>>
where
    K: Resource<DynamicType = ()> + Clone + 'static,
{
    store.get(&ObjectRef::new(name).within(namespace))
}

/// Both are states of one object, and `ours` the later one; where a version is no number, the watch is right.
fn is_newer(ours: &Deployment, seen: &Deployment) -> bool {
    let versions = version(&ours.metadata).zip(version(&seen.metadata));
    ours.metadata.uid == seen.metadata.uid && versions.is_some_and(|(ours, seen)| ours > seen)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use serde_json::json;
    use tokio::task::JoinHandle;

    use super::*;

    fn pod(name: &str, serves: &str) -> Pod {
        serde_json::from_value(json!({ "metadata": { "name": name, "namespace": "n",
            "labels": { "kvasir.dev/llmdeployment": serves } } }))
        .unwrap()
    }

    fn key(name: &str) -> Key {
        ("n".into(), name.into())
    }

    #[test]
    fn pods_are_those_of_the_watchs_last_word() {
        let pods = Pods::default();
        let names = |of: &str| -> Vec<String> {
            let found = pods.of(&key(of));
            found.iter().map(|pod| pod.name_any()).collect()
        };
        for (why, event, a, b) in [
            ("nothing yet", Event::Init, vec![], vec![]),
            (
                "not before all are there",
                Event::InitApply(pod("x", "a")),
                vec![],
                vec![],
            ),
            ("all are there", Event::InitDone, vec!["x"], vec![]),
            (
                "in the order of names",
                Event::Apply(pod("w", "a")),
                vec!["w", "x"],
                vec![],
            ),
            (
                "once each",
                Event::Apply(pod("w", "a")),
                vec!["w", "x"],
                vec![],
            ),
            (
                "its label was changed",
                Event::Apply(pod("x", "b")),
                vec!["w"],
                vec!["x"],
            ),
            (
                "gone, whatever its label was",
                Event::Delete(pod("x", "a")),
                vec!["w"],
                vec![],
            ),
            (
                "a list that begins anew hides nothing",
                Event::Init,
                vec!["w"],
                vec![],
            ),
            (
                "nor does it show half",
                Event::InitApply(pod("z", "b")),
                vec!["w"],
                vec![],
            ),
            ("what it lacks is gone", Event::InitDone, vec![], vec!["z"]),
        ] {
            pods.see(&event);
            assert_eq!(
                (names("a"), names("b")),
                (
                    a.iter().map(ToString::to_string).collect(),
                    b.iter().map(ToString::to_string).collect()
                ),
                "{why}"
            );
        }
    }

    #[tokio::test]
    async fn all_who_wait_for_the_watches_go_on() {
        let (cache, mut writers) = Cache::new();
        let cache = Arc::new(cache);
        let waiting: Vec<_> = (0..4)
            .map(|_| {
                let cache = Arc::clone(&cache);
                tokio::spawn(async move { cache.ready().await })
            })
            .collect();
        tokio::task::yield_now().await;
        writers.pods.see(&Event::InitDone);
        writers.deployments.apply_watcher_event(&Event::InitDone);
        writers.services.apply_watcher_event(&Event::InitDone);
        writers.budgets.apply_watcher_event(&Event::InitDone);
        tokio::task::yield_now().await;
        assert!(
            !waiting.iter().any(JoinHandle::is_finished),
            "accounts lack"
        );
        writers.accounts.apply_watcher_event(&Event::InitDone);
        for task in waiting {
            let gone_on = tokio::time::timeout(Duration::from_secs(5), task).await;
            gone_on.expect("nobody is forgotten").unwrap();
        }
    }

    fn deployment(uid: &str, version: &str) -> Deployment {
        serde_json::from_value(
            json!({ "metadata": { "name": "d", "namespace": "n", "uid": uid,
            "resourceVersion": version } }),
        )
        .unwrap()
    }

    #[test]
    fn an_answer_stands_for_what_was_wanted_until_either_changes() {
        let (cache, _writers) = Cache::new();
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
        assert!(
            !cache.answers(&held("u", 4), &wanted("1000m")),
            "never written"
        );
        cache.wrote(&wanted("1000m"), held("u", 4));
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
            assert_eq!(cache.answers(&existing, &wanted), stands, "{why}");
        }
    }

    #[test]
    fn our_write_counts_until_the_watch_has_caught_up() {
        let (cache, mut writers) = Cache::new();
        let version = || {
            let found = cache.deployment(&key("d"))?;
            found.metadata.resource_version.clone()
        };
        cache.wrote(&deployment("", ""), deployment("u", "9"));
        assert_eq!(
            version(),
            None,
            "what the watch lacks is asked of the API server"
        );
        let mut see = |uid: &str, version: &str| {
            let event = Event::Apply(deployment(uid, version));
            writers.deployments.apply_watcher_event(&event);
        };
        see("u", "9");
        cache.wrote(&deployment("", ""), deployment("u", "10"));
        assert_eq!(
            version().as_deref(),
            Some("10"),
            "the watch is behind: 10 is more than 9"
        );
        see("u", "10");
        assert_eq!(version().as_deref(), Some("10"));
        see("u", "12");
        assert_eq!(version().as_deref(), Some("12"), "the watch is ahead");
        cache.wrote(&deployment("", ""), deployment("u", "13"));
        see("v", "7");
        assert_eq!(
            version().as_deref(),
            Some("7"),
            "another object of the same name"
        );
        cache.wrote(&deployment("", ""), deployment("v", "opaque"));
        assert_eq!(
            version().as_deref(),
            Some("7"),
            "a version that can't be compared"
        );
    }
}
