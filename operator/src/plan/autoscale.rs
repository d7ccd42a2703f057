//! How many replicas an autoscaled deployment should have, and why, in words.
//!
//! Pure: the reports, the history and the time are arguments. It knows no Kubernetes, no HTTP and no clock.
//!
//! Demand is counted in KV blocks (held by running sequences and needed by waiting ones; blocks that only cache are
//! free for it) and in waiting requests; the larger answer wins, in one jump. Up at once. Down only when every answer
//! of the stabilization window was lower, and only if the replicas that stay can carry what the ones there carry now.
//! A replica that is silent counts as empty when scaling up and as full when scaling down, as the horizontal pod
//! autoscaler treats missing metrics.

use std::collections::VecDeque;
use std::time::Duration;

use kvasir_crds::LoadReport;
use kvasir_crds::llmdeployment::Autoscaling;
use kvasir_crds::load_report::SCHEMA;

use super::counted::{counted, counted_are};
use crate::observed::ReplicaLoad;

/// Two looks at the replicas are no further apart than this: the interval between them, the time that silent replicas take,
/// and retries after an error.
const LONGEST_PAUSE: Duration = Duration::from_secs(10);

/// The answers of the past window, by the operator's monotonic clock. An answer that a later one reaches or exceeds can
/// never be the window's largest again and is dropped, so that a history is a few entries long and cheap to copy.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct History {
    /// Answers are known from here on without a gap.
    since: Duration,
    /// When the last answer was given.
    last: Option<Duration>,
    /// Ascending in time, strictly descending in number.
    wanted: VecDeque<(Duration, u32)>,
}

impl History {
    /// Adds an answer and forgets those older than `window`.
    fn push(&mut self, now: Duration, wanted: u32, window: Duration) {
        while self
            .wanted
            .front()
            .is_some_and(|(at, _)| now.saturating_sub(*at) > window)
        {
            self.wanted.pop_front();
        }
        // What the load was in a gap isn't known, however long the window is.
        let is_gap = |last| now.saturating_sub(last) > LONGEST_PAUSE;
        // What is forgotten counts no more, should the window grow; after a gap knowledge begins anew.
        self.since = match self.last.is_none_or(is_gap) {
            true => now,
            false => self.since.max(now.saturating_sub(window)),
        };
        self.last = Some(now);
        while self.wanted.back().is_some_and(|(_, n)| *n <= wanted) {
            self.wanted.pop_back();
        }
        self.wanted.push_back((now, wanted));
    }

    /// The history reaches back over the whole window; after a restart it doesn't, and nothing is scaled down.
    fn covers(&self, now: Duration, window: Duration) -> bool {
        self.last.is_some() && now.saturating_sub(self.since) >= window
    }

    /// The largest answer of the window; 0 where there is none.
    fn max(&self) -> u32 {
        self.wanted.front().map_or(0, |(_, wanted)| *wanted)
    }
}

/// The answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decision {
    /// Replicas the deployment should have.
    pub replicas: u32,
    /// Replicas that the load known now is work for, whatever the policy allows; 0 where none is known.
    pub demand: u32,
    /// Why, with the numbers: for the status and the event.
    pub reason: String,
}

/// What the replicas that report carry together, for people to read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoadSummary {
    /// Blocks of all pools; never 0.
    pub blocks: u64,
    /// Those of them that sequences hold.
    pub active_blocks: u64,
    /// Requests that wait.
    pub waiting_requests: u64,
}

impl LoadSummary {
    /// Active blocks in whole percent of all, at most 100.
    #[must_use]
    pub fn utilization_percent(&self) -> u8 {
        let percent = u128::from(self.active_blocks) * 100 / u128::from(self.blocks.max(1));
        u8::try_from(percent.min(100)).unwrap_or(100)
    }
}

/// Adds up what is reported; `None` where no replica reports.
#[must_use]
pub fn summarize(loads: &[ReplicaLoad]) -> Option<LoadSummary> {
    let (totals, _) = total(loads);
    (totals.reporting > 0).then_some(LoadSummary {
        blocks: totals.blocks,
        active_blocks: totals.active,
        waiting_requests: totals.waiting,
    })
}

/// Sums over the replicas that reported and serve.
#[derive(Default)]
struct Totals {
    reporting: u64,
    blocks: u64,
    active: u64,
    waiting_need: u64,
    waiting: u64,
}

/// The numbers of replicas that are allowed.
#[derive(Clone, Copy)]
struct Bounds {
    low: u32,
    high: u32,
}

impl Bounds {
    fn of(policy: &Autoscaling) -> Self {
        let low = policy.min_replicas.get();
        Self {
            low,
            high: policy.max_replicas.get().max(low),
        }
    }

    fn clamp(self, n: u32) -> u32 {
        n.clamp(self.low, self.high)
    }

    /// Why a number that is not allowed changes.
    fn exceeded_by(self, current: u32) -> String {
        let Self { low, high } = self;
        format!("{current} is outside of minReplicas {low} and maxReplicas {high}")
    }
}

/// Decides. `current` is the number of replicas asked for now, `loads` one entry for each replica that has started,
/// `history` the answers before this one, to which this one is added.
pub fn decide(
    policy: &Autoscaling,
    current: u32,
    loads: &[ReplicaLoad],
    history: &mut History,
    now: Duration,
) -> Decision {
    let bounds = Bounds::of(policy);
    let window = Duration::from_secs(u64::from(policy.scale_down_stabilization_seconds));
    let (totals, n_silent) = total(loads);
    if totals.reporting == 0 {
        // What isn't known may be a full load: a lull is counted from its end.
        let replicas = bounds.clamp(current);
        history.push(now, replicas, window);
        return Decision {
            replicas,
            demand: 0,
            reason: match replicas == current {
                true => "no replica reports its load, and the number of replicas is held".into(),
                false => {
                    let why = bounds.exceeded_by(current);
                    format!("scaled from {current} to {replicas}: {why}")
                }
            },
        };
    }
    let demand = wanted(policy, &totals);
    let down = bounds.clamp(wanted(policy, &totals.with_full(n_silent)));
    history.push(now, down, window);
    // The fewest replicas that were enough all the time, once that is known of the whole window.
    let settled = history.covers(now, window).then(|| history.max());
    let (replicas, reason) = choose(
        bounds,
        current,
        bounds.clamp(demand),
        settled.map(|n| bounds.clamp(n)),
        &totals.describe(policy),
    );
    Decision {
        replicas,
        demand,
        reason,
    }
}

/// Goes up to `up` at once, and down to `settled` where that is known; `numbers` say why.
fn choose(
    bounds: Bounds,
    current: u32,
    up: u32,
    settled: Option<u32>,
    numbers: &str,
) -> (u32, String) {
    if bounds.clamp(current) != current {
        // Both at once: a minimum that rose under load takes one jump.
        let replicas = bounds.clamp(current).max(up);
        let why = bounds.exceeded_by(current);
        let reason = format!("scaled from {current} to {replicas}: {why}; {numbers}");
        return (replicas, reason);
    }
    match settled {
        _ if up > current => (up, format!("scaled up from {current} to {up}: {numbers}")),
        Some(settled) if settled < current => (
            settled,
            format!("scaled down from {current} to {settled}: {numbers}"),
        ),
        _ => (
            current,
            format!("{} kept: {numbers}", counted_are(current, "replica")),
        ),
    }
}

/// Adds up the reports of the replicas that serve, and counts the silent ones. A report without blocks or queue is as
/// good as none, and so is one of another schema, or one whose engine doesn't beat any more; a draining replica is
/// neither supply nor demand.
fn total(loads: &[ReplicaLoad]) -> (Totals, u64) {
    const STALE_MS: u64 = 10_000;
    let (mut totals, mut silent) = (Totals::default(), 0);
    for load in loads {
        match load {
            ReplicaLoad::Reported(report) if report.draining == Some(true) => {}
            ReplicaLoad::Reported(LoadReport {
                schema,
                blocks: Some(blocks),
                queue: Some(queue),
                heartbeat_age_ms,
                ..
            }) if schema.is_none_or(|schema| schema == SCHEMA)
                && heartbeat_age_ms.is_none_or(|age| age < STALE_MS)
                && blocks.total > 0 =>
            {
                totals.reporting += 1;
                // A report comes from outside: nonsense may give a wrong answer, and never an overflow.
                totals.blocks = totals.blocks.saturating_add(blocks.total);
                totals.active = totals.active.saturating_add(blocks.active);
                totals.waiting_need = totals.waiting_need.saturating_add(blocks.waiting_need);
                totals.waiting = totals.waiting.saturating_add(queue.waiting);
            }
            ReplicaLoad::Reported(_) | ReplicaLoad::Silent => silent += 1,
        }
    }
    (totals, silent)
}

/// Replicas that carry these totals, before the bounds: never less than 1.
fn wanted(policy: &Autoscaling, totals: &Totals) -> u32 {
    // ceil(demand / (blocks of one replica * target / 100)), in whole numbers that don't overflow.
    let demand = u128::from(totals.active) + u128::from(totals.waiting_need);
    let target = u128::from(policy.target_block_utilization_percent.get());
    let capacity = u128::from(totals.blocks) * target;
    let by_blocks = (demand * 100)
        .saturating_mul(u128::from(totals.reporting))
        .div_ceil(capacity.max(1));
    let by_queue = totals
        .waiting
        .div_ceil(u64::from(policy.target_queue_depth.get()));
    u32::try_from(by_blocks.max(u128::from(by_queue)).max(1)).unwrap_or(u32::MAX)
}

impl Totals {
    /// The same with `n_silent` more replicas of average size, all of whose blocks are active.
    fn with_full(&self, n_silent: u64) -> Self {
        let average = self.blocks.div_ceil(self.reporting.max(1));
        let theirs = n_silent.saturating_mul(average);
        Self {
            reporting: self.reporting + n_silent,
            blocks: self.blocks.saturating_add(theirs),
            active: self.active.saturating_add(theirs),
            ..*self
        }
    }

    fn describe(&self, policy: &Autoscaling) -> String {
        format!(
            "{} active and {} needed by waiting requests, of {} in {} (target {} %); \
             {} waiting (target {} per replica)",
            counted(self.active, "block"),
            self.waiting_need,
            self.blocks,
            counted(self.reporting, "reporting replica"),
            policy.target_block_utilization_percent,
            counted(self.waiting, "request"),
            policy.target_queue_depth
        )
    }
}

#[cfg(test)]
mod tests;
