//! Questions to replicas and about them, each asked in the background with a deadline of its own. Whoever wants the answers
//! waits a moment at most, and goes on with those that are known: a replica that swallows packets costs the others nothing.
//!
//! It knows neither what is asked nor what an answer means.

use std::collections::HashMap;
use std::future::Future;
use std::hash::Hash;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::future::join_all;
use tokio::sync::watch;

use crate::key::Key;

/// How long the answers of one deployment are waited for.
const PATIENCE: Duration = Duration::from_millis(250);

/// The last answer to each question about the pods of each deployment.
#[derive(Debug)]
pub struct Asked<Q, A>(Arc<Mutex<HashMap<Key, Answers<Q, A>>>>);

type Answers<Q, A> = HashMap<Q, Entry<A>>;

#[derive(Debug)]
struct Entry<A> {
    /// `None` before the first answer.
    answer: Option<A>,
    /// Becomes true with the answer to the question under way; `None` where none is.
    under_way: Option<watch::Receiver<bool>>,
}

/// What an answer is worth.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Worth {
    /// It stands; the question is not asked again.
    Final,
    /// It is asked again at each look, and the answer waited for.
    Renewed,
    /// It is asked again at each look, and no answer expected.
    Hopeless,
}

impl<Q, A> Default for Asked<Q, A> {
    fn default() -> Self {
        Self(Arc::default())
    }
}

impl<Q, A> Clone for Asked<Q, A> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<Q, A> Asked<Q, A>
where
    Q: Clone + Eq + Hash + Send + 'static,
    A: Clone + Send + 'static,
{
    /// The last answer to each of `questions`, in their order, after a moment's wait for those that are expected; `None`
    /// where there never was one. `ask` must end by itself. What was asked about `deployment` before and isn't now is
    /// forgotten.
    pub async fn answers<F>(
        &self,
        deployment: &Key,
        questions: &[Q],
        worth: impl Fn(&A) -> Worth,
        ask: impl Fn(Q) -> F,
    ) -> Vec<Option<A>>
    where
        F: Future<Output = A> + Send + 'static,
    {
        let mut expected = Vec::new();
        {
            let mut held = self.lock();
            let answers = held.entry(deployment.clone()).or_default();
            answers.retain(|question, _| questions.contains(question));
            for question in questions {
                let entry = answers.entry(question.clone()).or_insert(Entry {
                    answer: None,
                    under_way: None,
                });
                let worth = entry.answer.as_ref().map(&worth);
                if worth == Some(Worth::Final) {
                    continue;
                }
                let under_way = entry
                    .under_way
                    .get_or_insert_with(|| self.begin(deployment, question, ask(question.clone())));
                if worth != Some(Worth::Hopeless) {
                    expected.push(under_way.clone());
                }
            }
            if questions.is_empty() {
                held.remove(deployment);
            }
        }
        // An error says that the task ended without an answer; then the one before counts.
        let all = expected
            .into_iter()
            .map(async |mut answered: watch::Receiver<bool>| {
                answered.wait_for(|is| *is).await.map(drop)
            });
        let _ = tokio::time::timeout(PATIENCE, join_all(all)).await;
        let held = self.lock();
        let answers = held.get(deployment);
        let answer = |question| answers?.get(question)?.answer.clone();
        questions.iter().map(answer).collect()
    }

    /// Forgets a deployment that is gone.
    pub fn forget(&self, deployment: &Key) {
        self.lock().remove(deployment);
    }

    fn begin(
        &self,
        deployment: &Key,
        question: &Q,
        asking: impl Future<Output = A> + Send + 'static,
    ) -> watch::Receiver<bool> {
        let (answered, under_way) = watch::channel(false);
        let (held, deployment, question) = (self.clone(), deployment.clone(), question.clone());
        tokio::spawn(async move {
            let answer = asking.await;
            let mut held = held.lock();
            let answers = held.get_mut(&deployment);
            if let Some(entry) = answers.and_then(|answers| answers.get_mut(&question)) {
                entry.answer = Some(answer);
                entry.under_way = None;
            }
            drop(held);
            answered.send_replace(true);
        });
        under_way
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Key, Answers<Q, A>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::Instant;

    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpListener;

    use super::*;
    use crate::observe::{LoadReader, Replica};
    use crate::observed::ReplicaLoad;

    fn key(name: impl ToString) -> Key {
        ("n".into(), name.to_string())
    }

    #[tokio::test(start_paused = true)]
    async fn a_question_is_asked_once_at_a_time_and_its_last_answer_counts() {
        let asked = Asked::<u8, u32>::default();
        let n_asked = Arc::new(AtomicUsize::new(0));
        // The first question is answered at once, the second after a second, the third never in time.
        let look = |worth: Worth| {
            let (asked, n_asked) = (asked.clone(), Arc::clone(&n_asked));
            async move {
                let ask = move |question: u8| {
                    let n = n_asked.fetch_add(1, Ordering::SeqCst);
                    async move {
                        tokio::time::sleep(Duration::from_secs(u64::from(question))).await;
                        u32::try_from(n).unwrap()
                    }
                };
                asked.answers(&key("d"), &[0, 1, 60], |_| worth, ask).await
            }
        };
        assert_eq!(look(Worth::Renewed).await, [Some(0), None, None]);
        assert_eq!(
            look(Worth::Renewed).await,
            [Some(3), None, None],
            "only what was answered"
        );
        tokio::time::sleep(Duration::from_secs(2)).await;
        assert_eq!(look(Worth::Final).await, [Some(3), Some(1), None]);
        assert_eq!(
            n_asked.load(Ordering::SeqCst),
            4,
            "a final answer is not asked for again"
        );
        let begun = tokio::time::Instant::now();
        let d = key("d");
        let hopeless = asked.answers(&d, &[1], |_| Worth::Hopeless, |_| async { 9 });
        assert_eq!(hopeless.await, [Some(1)], "the answer before");
        assert_eq!(begun.elapsed(), Duration::ZERO, "is not waited for");
        tokio::task::yield_now().await;
        let again = asked.answers(&d, &[1], |_| Worth::Final, |_| async { 0 });
        assert_eq!(again.await, [Some(9)], "and renewed all the same");
    }

    /// A replica that answers `/load`, and counts how often.
    async fn replica(n_read: Arc<AtomicUsize>) -> u16 {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let n_read = Arc::clone(&n_read);
                tokio::spawn(async move {
                    let mut request = [0; 4096];
                    while stream.read(&mut request).await.is_ok_and(|n| n > 0) {
                        n_read.fetch_add(1, Ordering::SeqCst);
                        let body = r#"{"schema": 1}"#;
                        let head =
                            format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n", body.len());
                        stream.write_all(head.as_bytes()).await.unwrap();
                        stream.write_all(body.as_bytes()).await.unwrap();
                    }
                });
            }
        });
        port
    }

    #[tokio::test]
    async fn with_a_hundred_black_holes_every_other_replica_is_read_in_each_round() {
        const DEPLOYMENTS: usize = 100;
        // As many at once as the controller reconciles.
        const AT_ONCE: usize = 32;
        let n_read = Arc::new(AtomicUsize::new(0));
        let good = replica(Arc::clone(&n_read)).await;
        // It takes connections and never answers.
        let hole = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let hole_port = hole.local_addr().unwrap().port();
        let reader = LoadReader::default();
        let read = |n: usize| {
            let reader = reader.clone();
            let at = |uid: String, port| Replica {
                uid,
                ip: "127.0.0.1".into(),
                port,
            };
            async move {
                let replicas = [
                    at(format!("hole-{n}"), hole_port),
                    at(format!("good-{n}"), good),
                ];
                reader.read(&key(n), &replicas).await
            }
        };
        for round in 0..4 {
            let begun = Instant::now();
            let before = n_read.load(Ordering::SeqCst);
            let rounds = futures::stream::iter((0..DEPLOYMENTS).map(read));
            let loads: Vec<_> =
                futures::StreamExt::collect(futures::StreamExt::buffer_unordered(rounds, AT_ONCE))
                    .await;
            let took = begun.elapsed();
            assert_eq!(loads.len(), DEPLOYMENTS);
            for loads in loads {
                assert_eq!(loads[0], ReplicaLoad::Silent, "round {round}");
                assert!(
                    matches!(loads[1], ReplicaLoad::Reported(_)),
                    "round {round}: {loads:?}"
                );
            }
            assert!(
                n_read.load(Ordering::SeqCst) >= before + DEPLOYMENTS,
                "round {round}"
            );
            assert!(took < Duration::from_secs(2), "round {round} took {took:?}");
            // The time that the autoscaler leaves between two looks, in which the black holes become known.
            tokio::time::sleep(Duration::from_millis(1200)).await;
        }
    }
}
