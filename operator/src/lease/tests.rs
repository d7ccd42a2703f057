//! Candidates against one API server in a function, in paused time.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use axum::http::Method;
use serde_json::{Value, json};

use super::*;

/// The lease as the API server holds it; a write that names another version than its own is a conflict.
#[derive(Default)]
struct Server(Mutex<Option<Value>>);

impl Server {
    fn answer(&self, method: &Method, sent: Value) -> (u16, Value) {
        let mut held = self.0.lock().unwrap();
        let version = |lease: &Value| lease["metadata"]["resourceVersion"].clone();
        let failure = |code: u16, reason: &str| {
            (
                code,
                json!({ "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
                "reason": reason, "message": reason, "code": code }),
            )
        };
        match (method, held.as_ref()) {
            (&Method::GET, None) => failure(404, "NotFound"),
            (&Method::GET, Some(lease)) => (200, lease.clone()),
            (&Method::POST, Some(_)) => failure(409, "AlreadyExists"),
            (&Method::PUT, Some(lease)) if version(lease) != version(&sent) => {
                failure(409, "Conflict")
            }
            (&Method::PUT, None) => failure(404, "NotFound"),
            (_, before) => {
                let before =
                    before.map_or(0, |l| version(l).as_str().unwrap().parse::<u64>().unwrap());
                let mut lease = sent;
                lease["metadata"]["resourceVersion"] = (before + 1).to_string().into();
                *held = Some(lease.clone());
                (200, lease)
            }
        }
    }

    fn holder(&self) -> String {
        let held = self.0.lock().unwrap();
        let holder = held
            .as_ref()
            .map(|lease| lease["spec"]["holderIdentity"].clone());
        holder
            .unwrap_or_default()
            .as_str()
            .unwrap_or_default()
            .to_owned()
    }
}

/// A client of that server, whose packets are lost while `cut` is set.
fn client(server: &Arc<Server>, cut: &Arc<AtomicBool>) -> Client {
    let (server, cut) = (Arc::clone(server), Arc::clone(cut));
    crate::fake_api::client(move |head, body| {
        let (server, cut) = (Arc::clone(&server), Arc::clone(&cut));
        async move {
            if cut.load(Ordering::SeqCst) {
                std::future::pending::<()>().await;
            }
            let sent = serde_json::from_slice(&body).unwrap_or_default();
            server.answer(&head.method, sent)
        }
    })
}

/// A candidate at work: whether it acts, whether it is cut off, and how to end it.
struct Operator {
    acts: Arc<AtomicBool>,
    cut: Arc<AtomicBool>,
    stop: tokio::sync::watch::Sender<bool>,
    task: tokio::task::JoinHandle<()>,
}

/// False once it is dropped.
struct Acting(Arc<AtomicBool>, Arc<AtomicUsize>);

impl Acting {
    fn new(acts: &Arc<AtomicBool>, n_acting: &Arc<AtomicUsize>) -> Self {
        acts.store(true, Ordering::SeqCst);
        assert_eq!(
            n_acting.fetch_add(1, Ordering::SeqCst),
            0,
            "one acts at a time"
        );
        Self(Arc::clone(acts), Arc::clone(n_acting))
    }
}

impl Drop for Acting {
    fn drop(&mut self) {
        self.0.store(false, Ordering::SeqCst);
        self.1.fetch_sub(1, Ordering::SeqCst);
    }
}

fn operator(server: &Arc<Server>, identity: &str, n_acting: &Arc<AtomicUsize>) -> Operator {
    let (acts, cut) = (
        Arc::new(AtomicBool::new(false)),
        Arc::new(AtomicBool::new(false)),
    );
    let (stop, stopped) = tokio::sync::watch::channel(false);
    let candidate = Candidate {
        lease: "l".into(),
        namespace: "n".into(),
        identity: identity.into(),
    };
    let client = client(server, &cut);
    let wait = |mut stopped: tokio::sync::watch::Receiver<bool>| async move {
        let _ = stopped.wait_for(|stopped| *stopped).await;
    };
    let (told, n_acting) = (Arc::clone(&acts), Arc::clone(n_acting));
    let task = tokio::spawn(async move {
        let until = stopped.clone();
        hold(client, &candidate, wait(stopped), || {
            let acting = Acting::new(&told, &n_acting);
            let stopped = wait(until.clone());
            async move {
                let _acting = acting;
                stopped.await;
            }
        })
        .await;
    });
    Operator {
        acts,
        cut,
        stop,
        task,
    }
}

/// How long it takes until an operator acts.
async fn until_acts(operator: &Operator) -> Duration {
    let begun = Instant::now();
    while !operator.acts.load(Ordering::SeqCst) {
        assert!(begun.elapsed() < Duration::from_secs(60), "it never acts");
        sleep(Duration::from_millis(10)).await;
    }
    begun.elapsed()
}

#[tokio::test(start_paused = true)]
async fn one_acts_and_another_takes_over_within_five_seconds() {
    let server = Arc::new(Server::default());
    let n_acting = Arc::new(AtomicUsize::new(0));
    let first = operator(&server, "first", &n_acting);
    assert!(
        until_acts(&first).await < Duration::from_millis(100),
        "there is no lease yet"
    );
    let second = operator(&server, "second", &n_acting);
    sleep(Duration::from_secs(60)).await;
    assert!(!second.acts.load(Ordering::SeqCst), "it is renewed");

    // It is gone from one moment to the next.
    first.task.abort();
    let took = until_acts(&second).await;
    assert!(took < Duration::from_secs(4), "{took:?}");
    assert_eq!(server.holder(), "second");

    let third = operator(&server, "third", &n_acting);
    sleep(Duration::from_secs(10)).await;
    // Its packets are lost: it must have stopped before another one begins, which `Acting` asserts.
    second.cut.store(true, Ordering::SeqCst);
    let took = until_acts(&third).await;
    assert!(took < Duration::from_secs(5), "{took:?}");
    assert!(!second.acts.load(Ordering::SeqCst));
    second.cut.store(false, Ordering::SeqCst);
    sleep(Duration::from_secs(30)).await;
    assert!(!second.acts.load(Ordering::SeqCst), "it stands by");
    assert!(third.acts.load(Ordering::SeqCst));

    third.stop.send_replace(true);
    let took = until_acts(&second).await;
    assert!(took < Duration::from_secs(1), "it was given back: {took:?}");
    third.task.await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_lease_that_another_wrote_over_is_lost() {
    let server = Arc::new(Server::default());
    let n_acting = Arc::new(AtomicUsize::new(0));
    let first = operator(&server, "first", &n_acting);
    until_acts(&first).await;
    {
        let mut held = server.0.lock().unwrap();
        let lease = held.as_mut().unwrap();
        lease["spec"]["holderIdentity"] = "somebody".into();
        lease["metadata"]["resourceVersion"] = "70".into();
    }
    sleep(Duration::from_millis(1500)).await;
    assert!(!first.acts.load(Ordering::SeqCst));
    first.stop.send_replace(true);
    first.task.await.unwrap();
    assert_eq!(
        server.holder(),
        "somebody",
        "what is another's is not given back"
    );
}

#[test]
fn a_lease_is_free_by_the_candidates_own_clock() {
    let lease = |holder: Value| -> Lease {
        // Renewed long ago by the holder's clock, which says nothing.
        serde_json::from_value(json!({ "metadata": {}, "spec": { "holderIdentity": holder,
            "leaseDurationSeconds": 7, "renewTime": "2001-01-01T00:00:00.000000Z" } }))
        .unwrap()
    };
    for (why, holder, unchanged_s, want) in [
        ("nobody's", Value::Null, 0, true),
        ("given back", json!(""), 0, true),
        ("its own, from before a restart", json!("me"), 0, true),
        ("another's, just seen", json!("you"), 0, false),
        ("another's, for less than it lasts", json!("you"), 6, false),
        ("another's, and not renewed", json!("you"), 7, true),
    ] {
        let unchanged_for = Duration::from_secs(unchanged_s);
        assert_eq!(is_free(&lease(holder), "me", unchanged_for), want, "{why}");
    }
}
