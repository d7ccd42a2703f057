//! What the watches have brought: children by name, pods by deployment, warnings by pod. It makes a reconcile of one deployment among
//! thousands cost no read of the API server.
//!
//! It may be behind the API server, so two things are never concluded from it: that an object does not exist (it holds
//! only what carries our label, and `observe` asks the API server instead), and that an object is as it was before we
//! wrote it. For child Deployments and statuses the answer to our own write counts until the watch has caught up
//! ([`LastWrites`]); otherwise one scaling would be decided and reported twice, or the last one taken out of the status.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, PoisonError, RwLock};

use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{
    Event as CoreEvent, ObjectReference, Pod, Service, ServiceAccount,
};
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::runtime::reflector::store::Writer;
use kube::runtime::reflector::{self, ObjectRef, Store};
use kube::runtime::watcher::Event;
use kube::{Resource, ResourceExt};
use tokio::sync::{OnceCell, watch};

use crate::key::{Key, key_of};
use crate::last_writes::{LastRefusals, LastWrites};
use crate::pod::deployment_of;
use crate::stored::Stored;

/// The reading side.
#[derive(Debug)]
pub struct Cache {
    /// Our last status of each `LLMDeployment`.
    statuses: LastWrites<Stored>,
    deployments: Store<Deployment>,
    /// Our last write of each child Deployment.
    written_deployments: LastWrites<Deployment, Deployment>,
    /// What the API server refused to write.
    pub refusals: LastRefusals,
    services: Store<Service>,
    budgets: Store<PodDisruptionBudget>,
    accounts: Store<ServiceAccount>,
    pods: Arc<Pods>,
    warnings: Arc<Warnings>,
    ready: OnceCell<()>,
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
    /// Of the warnings about pods.
    pub warnings: Arc<Warnings>,
}

impl Cache {
    /// Both sides.
    #[must_use]
    pub fn new() -> (Self, Writers) {
        let (deployments, to_deployments) = reflector::store();
        let (services, to_services) = reflector::store();
        let (budgets, to_budgets) = reflector::store();
        let (accounts, to_accounts) = reflector::store();
        let pods = Arc::new(Pods::by(|pod| {
            Some((pod.namespace()?, deployment_of(pod)?.to_owned()))
        }));
        let warnings = Arc::new(Warnings::by(|event| {
            let about = &event.involved_object;
            Some((about.namespace.clone()?, about.name.clone()?))
        }));
        let writers = Writers {
            deployments: to_deployments,
            services: to_services,
            budgets: to_budgets,
            accounts: to_accounts,
            pods: Arc::clone(&pods),
            warnings: Arc::clone(&warnings),
        };
        let cache = Self {
            statuses: LastWrites::default(),
            deployments,
            written_deployments: LastWrites::default(),
            refusals: LastRefusals::default(),
            services,
            budgets,
            accounts,
            pods,
            warnings,
            ready: OnceCell::new(),
        };
        (cache, writers)
    }

    /// Waits until each watch has brought everything that there was at its start; without warnings everything but a reason
    /// can be told.
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

    /// The `LLMDeployment` that the watch has brought, with a status no older than our last one.
    pub fn resource(&self, seen: Arc<Stored>) -> Arc<Stored> {
        self.statuses.latest(seen)
    }

    /// Records the API server's answer to our write of a status.
    pub fn wrote_status(&self, mut answer: Stored) {
        answer.meta_mut().managed_fields = None;
        self.statuses.insert((), answer);
    }

    /// The child Deployment, no older than our last write of it.
    pub fn deployment(&self, key: &Key) -> Option<Arc<Deployment>> {
        let seen = get(&self.deployments, key)?;
        Some(self.written_deployments.latest(seen))
    }

    /// Records the API server's answer to our write of `wanted`.
    pub fn wrote_deployment(&self, wanted: &Deployment, answer: Deployment) {
        self.written_deployments.insert(wanted.clone(), answer);
    }

    /// The spec of `existing` is the API server's answer to a write of `wanted`.
    pub fn is_answer(&self, existing: &Deployment, wanted: &Deployment) -> bool {
        self.written_deployments.is_answer(existing, wanted)
    }

    /// Forgets what was written for a deployment that is gone.
    pub fn forget(&self, key: &Key) {
        self.statuses.remove(key);
        self.written_deployments.remove(key);
        self.refusals.remove(key);
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

    /// The warnings about a pod that are known by now, and not about one of the same name before it.
    pub fn warnings(&self, pod: &Pod) -> Vec<Arc<CoreEvent>> {
        let mut found = self.warnings.of(&key_of(pod));
        found.retain(|event| event.involved_object.uid == pod.metadata.uid);
        found
    }
}

/// Pods by the deployment that they serve.
pub type Pods = Groups<Pod>;

/// Warnings by the pod that they are about.
pub type Warnings = Groups<CoreEvent>;

/// Objects by what they belong to.
#[derive(Debug)]
pub struct Groups<K> {
    group_of: fn(&K) -> Option<Key>,
    held: RwLock<Held<K>>,
    ready: watch::Sender<bool>,
}

#[derive(Debug)]
struct Held<K> {
    current: Index<K>,
    /// What a list that began anew has brought so far.
    incoming: Index<K>,
}

#[derive(Debug)]
struct Index<K> {
    of_group: HashMap<Key, BTreeMap<String, Arc<K>>>,
    /// The group of each object: it may change.
    group_of: HashMap<Key, Key>,
}

impl<K> Default for Index<K> {
    fn default() -> Self {
        Self {
            of_group: HashMap::new(),
            group_of: HashMap::new(),
        }
    }
}

impl<K: Resource + Clone> Groups<K> {
    /// Grouped by what this says; an object of no group is not held.
    fn by(group_of: fn(&K) -> Option<Key>) -> Self {
        Self {
            group_of,
            held: RwLock::new(Held {
                current: Index::default(),
                incoming: Index::default(),
            }),
            ready: watch::Sender::new(false),
        }
    }

    /// Takes an event of the watch in.
    pub fn see(&self, event: &Event<K>) {
        let mut held = self.held.write().unwrap_or_else(PoisonError::into_inner);
        match event {
            Event::Init => held.incoming = Index::default(),
            Event::InitApply(object) => held.incoming.put(object, (self.group_of)(object)),
            Event::InitDone => {
                held.current = std::mem::take(&mut held.incoming);
                self.ready.send_replace(true);
            }
            Event::Apply(object) => held.current.put(object, (self.group_of)(object)),
            Event::Delete(object) => held.current.take(&key_of(object)),
        }
    }

    async fn ready(&self) -> Result<(), watch::error::RecvError> {
        let mut ready = self.ready.subscribe();
        ready.wait_for(|ready| *ready).await.map(drop)
    }

    /// The objects of a group, by name.
    fn of(&self, group: &Key) -> Vec<Arc<K>> {
        let held = self.held.read().unwrap_or_else(PoisonError::into_inner);
        let objects = held.current.of_group.get(group);
        objects
            .into_iter()
            .flat_map(BTreeMap::values)
            .cloned()
            .collect()
    }
}

impl<K: Resource + Clone> Index<K> {
    fn put(&mut self, object: &K, group: Option<Key>) {
        let key = key_of(object);
        self.take(&key);
        if let Some(group) = group {
            let objects = self.of_group.entry(group.clone()).or_default();
            objects.insert(key.1.clone(), Arc::new(object.clone()));
            self.group_of.insert(key, group);
        }
    }

    fn take(&mut self, object: &Key) {
        let Some(group) = self.group_of.remove(object) else {
            return;
        };
        if let Some(objects) = self.of_group.get_mut(&group) {
            objects.remove(&object.1);
            if objects.is_empty() {
                self.of_group.remove(&group);
            }
        }
    }
}

/// Takes out of a warning what nobody reads.
pub fn strip_warning(event: &mut CoreEvent) {
    let about = std::mem::take(&mut event.involved_object);
    let metadata = std::mem::take(&mut event.metadata);
    *event = CoreEvent {
        metadata: ObjectMeta {
            name: metadata.name,
            namespace: metadata.namespace,
            resource_version: metadata.resource_version,
            ..ObjectMeta::default()
        },
        involved_object: ObjectReference {
            name: about.name,
            namespace: about.namespace,
            uid: about.uid,
            ..ObjectReference::default()
        },
        reason: event.reason.take(),
        message: event.message.take(),
        last_timestamp: event.last_timestamp.take(),
        ..CoreEvent::default()
    };
}

fn get<K>(store: &Store<K>, (namespace, name): &Key) -> Option<Arc<K>>
where
    K: Resource<DynamicType = ()> + Clone + 'static,
{
    store.get(&ObjectRef::new(name).within(namespace))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use serde_json::json;
    use tokio::task::JoinHandle;

    use super::*;

    fn pod(name: &str, deployment: &str) -> Pod {
        serde_json::from_value(json!({ "metadata": { "name": name, "namespace": "n",
            "labels": { "kvasir.dev/llmdeployment": deployment } } }))
        .unwrap()
    }

    fn key(name: &str) -> Key {
        ("n".into(), name.into())
    }

    #[test]
    fn pods_are_those_of_the_watchs_last_word() {
        let (_, Writers { pods, .. }) = Cache::new();
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

    #[test]
    fn warnings_are_those_about_the_pod_of_today() {
        let (cache, writers) = Cache::new();
        let warning = |name: &str, pod: &str, uid: &str| {
            let mut event: CoreEvent = serde_json::from_value(json!({
                "metadata": { "name": name, "namespace": "n", "managedFields": [{ "manager": "kubelet" }] },
                "involvedObject": { "kind": "Pod", "namespace": "n", "name": pod, "uid": uid },
                "reason": "Unhealthy", "message": name, "count": 7 }))
            .unwrap();
            strip_warning(&mut event);
            event
        };
        writers.warnings.see(&Event::Init);
        writers
            .warnings
            .see(&Event::InitApply(warning("old", "p", "u1")));
        writers.warnings.see(&Event::InitDone);
        writers
            .warnings
            .see(&Event::Apply(warning("new", "p", "u2")));
        writers
            .warnings
            .see(&Event::Apply(warning("another's", "q", "u3")));
        let mut today = pod("p", "d");
        today.metadata.uid = Some("u2".into());
        let told = cache.warnings(&today);
        assert_eq!(told.len(), 1);
        assert_eq!(told[0].message.as_deref(), Some("new"));
        assert_eq!(
            (told[0].count, told[0].metadata.managed_fields.as_ref()),
            (None, None)
        );
        writers
            .warnings
            .see(&Event::Delete(warning("new", "p", "u2")));
        assert_eq!(cache.warnings(&today), []);
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
    fn a_written_deployment_is_read_back_where_the_watch_has_one() {
        let (cache, mut writers) = Cache::new();
        let version = || {
            let found = cache.deployment(&key("d"))?;
            found.metadata.resource_version.clone()
        };
        cache.wrote_deployment(&deployment("", ""), deployment("u", "9"));
        assert_eq!(
            version(),
            None,
            "what the watch lacks is asked of the API server"
        );
        let seen = Event::Apply(deployment("u", "9"));
        writers.deployments.apply_watcher_event(&seen);
        cache.wrote_deployment(&deployment("", ""), deployment("u", "10"));
        assert_eq!(version().as_deref(), Some("10"), "the watch is behind");
        cache.forget(&key("d"));
        assert_eq!(version().as_deref(), Some("9"));
    }

    #[test]
    fn a_written_status_is_read_back_until_another_wrote_over_it() {
        let stored = |version: &str, replicas: i32| -> Arc<Stored> {
            Arc::new(
                serde_json::from_value(json!({
                    "metadata": { "name": "d", "namespace": "n", "uid": "u", "resourceVersion": version },
                    "spec": { "model": { "source": { "demo": {} } }, "replicas": 1 },
                    "status": { "replicas": replicas }
                }))
                .unwrap(),
            )
        };
        let (cache, _writers) = Cache::new();
        cache.wrote_status((*stored("9", 3)).clone());
        for (why, seen, want) in [
            ("the watch is behind", stored("8", 1), 3),
            ("it has brought ours", stored("9", 3), 3),
            ("another's", stored("10", 7), 7),
        ] {
            let status = cache.resource(seen).status().cloned().unwrap();
            assert_eq!(status.replicas, want, "{why}");
        }
    }
}
