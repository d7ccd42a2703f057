//! How many replicas an autoscaled deployment should have, and why, in words.
//!
//! Pure: the reports, the history and the time are arguments. It knows no Kubernetes, no HTTP and no clock.
//!
//! Each thing that can bind says how many replicas the load is work for: KV blocks, sequence slots, the rate at which
//! prompts are computed, the queue and its age; the largest answer wins, in one jump. Up at once, and ahead of time by what
//! the load was seen to grow while a replica starts. Down only when every answer of the window was lower, and only if the
//! replicas that stay carry all of it with room to spare. A replica that is silent counts as empty when scaling up and as
//! full when scaling down, as the horizontal pod autoscaler treats missing metrics. What replicas can carry is measured.
//!
//! - [`demand`]: what is reported, and how many replicas it is work for; `usable`: which reports can be judged.
//! - `learned`: what was measured of the replicas. `starts`: how long they take to start.
//! - `forecast`: how much the load grows meanwhile.
//! - `window`: the largest answer of the past.

pub mod demand;
mod forecast;
mod learned;
mod starts;
mod usable;
mod window;

use std::time::Duration;

use kvasir_crds::llmdeployment::{Autoscaling, LearnedCapacity};

use super::counted::{counted, counted_are};
use crate::observed::ReplicaLoad;
use demand::{Constraint, Totals, binding, whole};
use forecast::{Forecast, Sample};
use learned::Learned;
use window::Window;

/// Arrivals are a rate over so long at least, a third of a start, and no longer than they are kept.
const RATE_WINDOW: Duration = Duration::from_secs(10);
const LONGEST_RATE_WINDOW: Duration = Duration::from_secs(60);
/// Replicas go only after so many times what one needs to start: to want it back costs as much.
const STARTS_IN_WINDOW: u32 = 2;

/// While it isn't known how fast a replica computes prompts, one of so many goes at a time.
const UNPROVEN_SHARE: u32 = 3;

/// What is remembered between looks.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct History {
    window: Window,
    learned: Learned,
    forecast: Forecast,
    /// Whether what a status tells was read back.
    is_read_back: bool,
}

impl History {
    /// Goes on from what the status tells, the first time.
    pub fn read_back(&mut self, told: Option<&LearnedCapacity>) {
        if !self.is_read_back {
            self.is_read_back = true;
            if let Some(told) = told {
                self.learned = Learned::read_back(told);
                self.forecast = Forecast::read_back(told.growth_percent);
            }
        }
    }

    /// A replica became ready so long after its pod was created.
    pub fn note_start(&mut self, took: Duration) {
        self.learned.starts.note(took);
    }

    /// What was learned, for the status; nothing where nothing was.
    #[must_use]
    pub fn learned(&self) -> Option<LearnedCapacity> {
        self.learned.tell(self.forecast.growth())
    }
}

/// What is seen at one look.
#[derive(Clone, Copy, Debug)]
pub struct Look<'a> {
    /// Replicas that are asked for now.
    pub current: u32,
    /// One entry for each replica that has started, and for whoever else reports demand.
    pub loads: &'a [ReplicaLoad],
    /// How long ago the pods were created that have not started.
    pub starting: &'a [Duration],
    /// By the operator's monotonic clock.
    pub now: Duration,
}

/// The answer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Decision {
    /// Replicas the deployment should have.
    pub replicas: u32,
    /// Replicas that the load known now is work for, whatever the policy allows; 0 where none is known.
    pub demand: u32,
    /// What asks for the most of them.
    pub constraint: Option<Constraint>,
    /// Those of the demand that neither report nor start in time.
    pub unmet: u32,
    /// Replicas that have started and don't report.
    pub silent: u32,
    /// Replicas that start and take longer than they should.
    pub overdue: Option<Overdue>,
    /// The next change that the load allows, if it stays as it is.
    pub next: Option<Next>,
    /// Why, with the numbers: for the status and the event.
    pub reason: String,
}

/// Replicas that should have started by now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Overdue {
    /// How many.
    pub n: u32,
    /// How long a start may take.
    pub deadline: Duration,
}

/// A change that waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Next {
    /// Replicas after it.
    pub replicas: u32,
    /// From now on, at the earliest.
    pub after: Duration,
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
    let totals = Totals::of(loads, &Learned::default());
    (totals.reporting > 0).then_some(LoadSummary {
        blocks: totals.blocks,
        active_blocks: totals.active,
        waiting_requests: totals.waiting,
    })
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

/// Decides, and adds what is seen to the history.
pub fn decide(policy: &Autoscaling, look: &Look<'_>, history: &mut History) -> Decision {
    let Look { loads, now, .. } = *look;
    let window = window_of(policy, history);
    let seconds = history.window.follows(now).then(|| history.since_last(now));
    if seconds.is_none() {
        history.forecast.interrupt();
    }
    history.learned.note_arrivals(loads, now, seconds);
    let totals = Totals::of(loads, &history.learned);
    let decision = match totals.reporting {
        0 => hold(policy, look, &totals, history, window),
        _ => weigh(policy, look, &totals, history, window),
    };
    history.learned.learn(loads, seconds);
    decision
}

impl History {
    fn since_last(&self, now: Duration) -> f64 {
        self.window
            .last()
            .map_or(0.0, |last| now.saturating_sub(last).as_secs_f64())
    }
}

fn window_of(policy: &Autoscaling, history: &History) -> Duration {
    let least = Duration::from_secs(u64::from(policy.scale_down_stabilization_seconds));
    let start = history.learned.starts.p90().unwrap_or_default();
    least.max(start * STARTS_IN_WINDOW)
}

/// Nobody reports: the number is held. What isn't known may be a full load: a lull is counted from its end.
fn hold(
    policy: &Autoscaling,
    look: &Look<'_>,
    totals: &Totals,
    history: &mut History,
    window: Duration,
) -> Decision {
    let (bounds, current) = (Bounds::of(policy), look.current);
    let replicas = bounds.clamp(current);
    history.window.push(look.now, replicas, window);
    Decision {
        replicas,
        demand: 0,
        constraint: None,
        unmet: 0,
        silent: saturated(totals.silent),
        overdue: overdue(look, history),
        next: None,
        reason: match replicas == current {
            true => "no replica reports its load, and the number of replicas is held".into(),
            false => {
                let why = bounds.exceeded_by(current);
                format!("scaled from {current} to {replicas}: {why}")
            }
        },
    }
}

fn weigh(
    policy: &Autoscaling,
    look: &Look<'_>,
    totals: &Totals,
    history: &mut History,
    window: Duration,
) -> Decision {
    let (bounds, now) = (Bounds::of(policy), look.now);
    let lead = history.learned.starts.p90().unwrap_or_default();
    // What comes and goes faster than a replica starts is no reason to start one.
    let rate_window = (lead / 3).clamp(RATE_WINDOW, LONGEST_RATE_WINDOW);
    let arriving = history.learned.arriving(now, rate_window);
    let needs = totals.needs(policy, &history.learned, arriving);
    let (need_now, constraint) = binding(&needs);
    let need = need_now.max(history.forecast.demand().unwrap_or(0.0));
    let sample = Sample {
        demand: need_now,
        arriving,
    };
    history.forecast.push(now, sample, lead);
    let demand = whole(need);
    let mut down = bounds.clamp(whole(totals.needed_to_go_down(policy, need)));
    if arriving > 0.0 && history.learned.prefill_rate().is_none() {
        // What those that stay can compute isn't known: it is found out in steps.
        down = down.max(bounds.clamp(look.current - look.current / UNPROVEN_SHARE));
    }
    history.window.push(now, down, window);
    // The fewest replicas that were enough all the time, once that is known of the whole window.
    let settled = history.window.settled(now, window);
    let words = describe(totals, policy, &needs, arriving);
    let (replicas, reason) = choose(
        bounds,
        look.current,
        bounds.clamp(demand),
        settled.map(|n| bounds.clamp(n)),
        &words,
    );
    let overdue = overdue(look, history);
    let n_starting = u32::try_from(look.starting.len()).unwrap_or(u32::MAX);
    let in_time = n_starting - overdue.map_or(0, |overdue| overdue.n);
    let supply = saturated(totals.reporting).saturating_add(in_time);
    let next = (down < replicas).then(|| Next {
        replicas: down,
        after: (history.window.settles_at(down, window)).saturating_sub(now),
    });
    Decision {
        replicas,
        demand,
        constraint,
        unmet: demand.saturating_sub(supply),
        silent: saturated(totals.silent),
        overdue,
        next,
        reason,
    }
}

fn saturated(n: u64) -> u32 {
    u32::try_from(n).unwrap_or(u32::MAX)
}

/// Replicas that start and are no supply any more.
fn overdue(look: &Look<'_>, history: &History) -> Option<Overdue> {
    let deadline = history.learned.starts.deadline();
    let n = look.starting.iter().filter(|age| **age > deadline).count();
    (n > 0).then(|| Overdue {
        n: u32::try_from(n).unwrap_or(u32::MAX),
        deadline,
    })
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

fn describe(
    totals: &Totals,
    policy: &Autoscaling,
    needs: &[(Constraint, f64)],
    arriving: f64,
) -> String {
    let (need, constraint) = binding(needs);
    let binds = constraint.map(|constraint| {
        let asks = counted(whole(need), "replica");
        format!("{} asks for {asks}: ", constraint.as_str())
    });
    let target = policy.target_block_utilization_percent;
    let slots = (totals.slots > 0).then(|| {
        let running = counted(totals.running, "sequence");
        format!("; {running} in {} slots (target {target} %)", totals.slots)
    });
    let prefill = (arriving > 0.0).then(|| {
        let backlog = totals.backlog_tokens;
        format!("; {arriving:.0} prompt tokens/s arrive, {backlog} are to be computed")
    });
    format!(
        "{}{} active and {} needed by waiting requests, of {} in {} (target {target} %){}; \
         {} waiting (target {} per replica){}",
        binds.unwrap_or_default(),
        counted(totals.active, "block"),
        totals.waiting_need,
        totals.blocks,
        counted(totals.reporting, "reporting replica"),
        slots.unwrap_or_default(),
        counted(totals.waiting, "request"),
        policy.target_queue_depth,
        prefill.unwrap_or_default(),
    )
}

#[cfg(test)]
mod tests;
