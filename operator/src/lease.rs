//! One of several operators acts: the holder of a Lease (`coordination.k8s.io/v1`), which it renews every second.
//!
//! The rules are client-go's leader election: a lease counts as free once it has stood unchanged for its duration by the
//! candidate's own monotonic clock, so that no two nodes' clocks are ever compared; every write names the version that it
//! replaces, so that of two writers one is refused; and a holder that can't renew stops before another one may begin.
//!
//! It knows nothing of what the holder does.

use std::future::Future;
use std::time::Duration;

use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use k8s_openapi::jiff::Timestamp;
use kube::api::PostParams;
use kube::{Api, Client};
use tokio::time::{Instant, sleep, timeout};

/// A lease that stood unchanged for this long is free. From a crash to the next one's first look it takes at most this,
/// two [`LOOK_EVERY`], and the watches' start.
const DURATION: Duration = Duration::from_secs(3);
/// A holder that has not renewed for this long stops.
const RENEW_WITHIN: Duration = Duration::from_secs(2);
const RENEW_EVERY: Duration = Duration::from_secs(1);
/// How often a candidate looks, and a holder tries again.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// How long the API server may take to answer.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(1);

/// Who wants which lease.
#[derive(Clone, Debug)]
pub struct Candidate {
    /// Its name.
    pub lease: String,
    /// Its namespace.
    pub namespace: String,
    /// The candidate's own name, which no other one has.
    pub identity: String,
}

/// Runs what `act` gives whenever the lease is held, and drops it when the lease is lost, until it ends by itself; then
/// gives the lease back. `stopped` ends the waiting of a candidate that doesn't hold it.
pub async fn hold<A, F>(
    client: Client,
    candidate: &Candidate,
    stopped: impl Future<Output = ()>,
    mut act: A,
) where
    A: FnMut() -> F,
    F: Future<Output = ()>,
{
    let mut seat = Seat {
        api: Api::namespaced(client, &candidate.namespace),
        candidate,
    };
    tokio::pin!(stopped);
    loop {
        let held = tokio::select! {
            () = &mut stopped => return,
            held = seat.acquire() => held,
        };
        tracing::info!(identity = candidate.identity, "acting: the lease is held");
        tokio::select! {
            () = act() => return seat.release().await,
            () = seat.keep(held) => {
                tracing::warn!(identity = candidate.identity, "standing by: the lease was lost");
            }
        }
    }
}

/// A lease as it was written, and when the request for it was made.
struct Held {
    lease: Lease,
    renewed: Instant,
}

struct Seat<'a> {
    api: Api<Lease>,
    candidate: &'a Candidate,
}

impl Seat<'_> {
    /// Waits until the lease is held.
    async fn acquire(&mut self) -> Held {
        let mut seen = None;
        loop {
            let looked = Instant::now();
            match self.look(&mut seen, looked).await {
                Ok(Some(lease)) => {
                    return Held {
                        lease,
                        renewed: looked,
                    };
                }
                Ok(None) => {}
                Err(error) => tracing::debug!(%error, "the lease can't be had"),
            }
            sleep(LOOK_EVERY).await;
        }
    }

    /// One look of a candidate; the lease where it was taken.
    async fn look(
        &self,
        seen: &mut Option<(Option<String>, Instant)>,
        now: Instant,
    ) -> kube::Result<Option<Lease>> {
        let name = &self.candidate.lease;
        let Some(lease) = request(self.api.get_opt(name)).await? else {
            let new = Lease {
                metadata: ObjectMeta {
                    name: Some(name.clone()),
                    ..ObjectMeta::default()
                },
                spec: None,
            };
            let taken = self.taken(&new);
            return request(self.api.create(&PostParams::default(), &taken))
                .await
                .map(Some);
        };
        let version = lease.metadata.resource_version.clone();
        let since = match seen {
            Some((known, since)) if *known == version => *since,
            _ => seen.insert((version, now)).1,
        };
        if !is_free(&lease, &self.candidate.identity, now - since) {
            return Ok(None);
        }
        self.replace(&self.taken(&lease)).await.map(Some)
    }

    /// Renews the lease until it is lost.
    async fn keep(&self, mut held: Held) {
        let mut next = RENEW_EVERY;
        while held.renewed.elapsed() < RENEW_WITHIN {
            sleep(next).await;
            let asked = Instant::now();
            match self.replace(&renewed(&held.lease)).await {
                Ok(lease) => {
                    held = Held {
                        lease,
                        renewed: asked,
                    };
                    next = RENEW_EVERY;
                }
                // Another one has written it.
                Err(kube::Error::Api(status)) if status.is_conflict() || status.is_not_found() => {
                    return;
                }
                Err(error) => {
                    tracing::warn!(%error, "the lease could not be renewed");
                    next = LOOK_EVERY;
                }
            }
        }
    }

    /// Gives the lease back, so that the next one need not wait.
    async fn release(&self) {
        let released = async {
            let Some(mut lease) = request(self.api.get_opt(&self.candidate.lease)).await? else {
                return Ok(());
            };
            let spec = lease.spec.get_or_insert_default();
            if spec.holder_identity.as_deref() == Some(&self.candidate.identity) {
                spec.holder_identity = None;
                self.replace(&lease).await?;
            }
            Ok::<_, kube::Error>(())
        };
        if let Err(error) = released.await {
            tracing::info!(%error, "the lease was not given back");
        }
    }

    async fn replace(&self, lease: &Lease) -> kube::Result<Lease> {
        let params = PostParams::default();
        request(self.api.replace(&self.candidate.lease, &params, lease)).await
    }

    fn taken(&self, lease: &Lease) -> Lease {
        let now = Some(MicroTime(Timestamp::now()));
        let before = lease.spec.clone().unwrap_or_default();
        Lease {
            metadata: lease.metadata.clone(),
            spec: Some(LeaseSpec {
                holder_identity: Some(self.candidate.identity.clone()),
                lease_duration_seconds: i32::try_from(DURATION.as_secs()).ok(),
                acquire_time: now.clone(),
                renew_time: now,
                lease_transitions: Some(before.lease_transitions.unwrap_or(0).saturating_add(1)),
                ..before
            }),
        }
    }
}

fn renewed(lease: &Lease) -> Lease {
    let mut lease = lease.clone();
    lease.spec.get_or_insert_default().renew_time = Some(MicroTime(Timestamp::now()));
    lease
}

/// Whether a candidate may take a lease that it has seen unchanged for this long: nobody's, its own from before a restart,
/// or one whose holder does not renew it any more.
fn is_free(lease: &Lease, identity: &str, unchanged_for: Duration) -> bool {
    let spec = lease.spec.as_ref();
    let holder = spec.and_then(|spec| spec.holder_identity.as_deref());
    let duration = spec.and_then(|spec| spec.lease_duration_seconds);
    let duration = duration.and_then(|seconds| u64::try_from(seconds).ok());
    match holder {
        None | Some("") => true,
        Some(holder) if holder == identity => true,
        Some(_) => unchanged_for >= duration.map_or(DURATION, Duration::from_secs),
    }
}

async fn request<T>(request: impl Future<Output = kube::Result<T>>) -> kube::Result<T> {
    match timeout(REQUEST_TIMEOUT, request).await {
        Ok(answer) => answer,
        Err(elapsed) => Err(kube::Error::Service(Box::new(elapsed))),
    }
}

#[cfg(test)]
mod tests;
