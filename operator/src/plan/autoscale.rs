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

/// What is known of one ready replica.
#[derive(Clone, Debug, PartialEq)]
pub enum ReplicaLoad {
    /// It answered.
    Reported(LoadReport),
    /// It did not answer in time.
    Silent,
}

/// The answers of the past window, by the operator's monotonic clock.
#[derive(Clone, Debug, Default)]
pub struct History {
    /// Answers are known from here on without a gap as long as the window.
    since: Duration,
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
        // What is forgotten counts no more, should the window grow; after a gap knowledge begins anew.
        self.since = match self.wanted.is_empty() {
            true => now,
            false => self.since.max(now.saturating_sub(window)),
        };
        self.wanted.push_back((now, wanted));
    }

    /// The history reaches back over the whole window; after a restart it doesn't, and nothing is scaled down.
    fn covers(&self, now: Duration, window: Duration) -> bool {
        !self.wanted.is_empty() && now.saturating_sub(self.since) >= window
    }

    fn max(&self) -> u32 {
        self.wanted
            .iter()
            .map(|(_, wanted)| *wanted)
            .max()
            .unwrap_or(0)
    }
}

/// The answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decision {
    /// Replicas the deployment should have.
    pub replicas: u32,
    /// Why, with the numbers: for the status and the event.
    pub reason: String,
}

/// What the replicas that report carry together, for people to read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Load {
    /// Blocks of all pools; never 0.
    pub blocks: u64,
    /// Those of them that sequences hold.
    pub active_blocks: u64,
    /// Requests that wait.
    pub waiting_requests: u64,
}

impl Load {
    /// Active blocks in whole percent of all, at most 100.
    #[must_use]
    pub fn utilization_percent(&self) -> u8 {
        let percent = u128::from(self.active_blocks) * 100 / u128::from(self.blocks.max(1));
        u8::try_from(percent.min(100)).unwrap_or(100)
    }
}

/// Adds up what is reported; `None` where no replica reports.
#[must_use]
pub fn load(loads: &[ReplicaLoad]) -> Option<Load> {
    let (totals, _) = total(loads);
    (totals.reporting > 0).then_some(Load {
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

/// Decides. `current` is the number of replicas asked for now, `loads` one entry for each ready replica, `history` the
/// answers before this one, to which this one is added.
pub fn decide(
    policy: &Autoscaling,
    current: u32,
    loads: &[ReplicaLoad],
    history: &mut History,
    now: Duration,
) -> Decision {
    let (low, high) = (policy.min_replicas.get(), policy.max_replicas.get());
    let bounded = current.clamp(low, high.max(low));
    let (totals, silent) = total(loads);
    let outside = || format!("{current} is outside of minReplicas {low} and maxReplicas {high}");
    let window = Duration::from_secs(u64::from(policy.scale_down_stabilization_seconds));
    if totals.reporting == 0 {
        // What isn't known may be a full load: a lull is counted from its end.
        history.push(now, bounded, window);
        return Decision {
            replicas: bounded,
            reason: match bounded == current {
                true => "no replica reports its load: holding".into(),
                false => format!("scaled from {current} to {bounded}: {}", outside()),
            },
        };
    }

    let up = wanted(policy, &totals).clamp(low, high.max(low));
    // Going down, a silent replica counts as full: an average pool of active blocks, and as much as its share.
    let average = totals.blocks.div_ceil(totals.reporting);
    let theirs = silent.saturating_mul(average);
    let pessimistic = Totals {
        reporting: totals.reporting + silent,
        blocks: totals.blocks.saturating_add(theirs),
        active: totals.active.saturating_add(theirs),
        ..totals
    };
    let down = wanted(policy, &pessimistic).clamp(low, high.max(low));
    history.push(now, down, window);

    let numbers = totals.describe(policy);
    let (replicas, reason) = if bounded != current {
        // Both at once: a minimum that rose under load takes one jump.
        let to = bounded.max(up);
        let why = outside();
        (
            to,
            format!("scaled from {current} to {to}: {why}; {numbers}"),
        )
    } else if up > current {
        (up, format!("scaled up from {current} to {up}: {numbers}"))
    } else if down >= current {
        (
            current,
            format!("{current} replicas carry the load: {numbers}"),
        )
    } else if !history.covers(now, window) {
        (
            current,
            format!(
                "{down} would do, but less than scaleDownStabilizationSeconds is known: {numbers}"
            ),
        )
    } else {
        match history.max().clamp(low, high.max(low)) {
            settled if settled < current => (
                settled,
                format!("scaled down from {current} to {settled}: {numbers}"),
            ),
            _ => (
                current,
                format!("{down} would do, waiting out scaleDownStabilizationSeconds: {numbers}"),
            ),
        }
    };
    Decision { replicas, reason }
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
    fn describe(&self, policy: &Autoscaling) -> String {
        format!(
            "{} blocks active and {} needed by waiting requests, of {} in {} reporting replicas (target {} %); \
             {} requests waiting (target {} per replica)",
            self.active,
            self.waiting_need,
            self.blocks,
            self.reporting,
            policy.target_block_utilization_percent,
            self.waiting,
            policy.target_queue_depth
        )
    }
}

#[cfg(test)]
mod tests;
