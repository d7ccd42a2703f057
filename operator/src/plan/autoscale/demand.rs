//! What the replicas report, added up, and how many replicas it is work for: one answer for each thing that can bind.
//!
//! Pure. A figure that a replica doesn't report is unknown: where it is needed to judge a constraint, that constraint asks
//! for nothing, and the others decide.

use kvasir_crds::LoadReport;
use kvasir_crds::llmdeployment::Autoscaling;
use kvasir_crds::load_report::{BlockCounts, HeldCounts, PageDemand};

use super::learned::Learned;
use super::usable::{Usable, usable};
use crate::observed::ReplicaLoad;

/// Prompt tokens that arrive may take this part of what replicas can compute: the rest takes the bursts between two looks.
const PREFILL_TARGET: f64 = 0.8;
/// What waits is to be worked off in this time, beside what arrives; or in the time of a start, where that is longer:
/// before that nothing that is asked for now helps, and after it what waited is gone.
const BACKLOG_SECONDS: f64 = 10.0;
/// A request that has waited longer waits for a replica that is not there.
const QUEUE_AGE_MS: u64 = 2_000;
/// One replica goes only where the others would use this part of what they are allowed to.
const DOWN_TARGET: f64 = 0.9;

/// What can bind: the closed set of `status.autoscaling.bindingConstraint`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Constraint {
    /// KV blocks.
    Blocks,
    /// Sequence slots.
    Slots,
    /// Prompt tokens a second.
    PrefillRate,
    /// Requests that wait, against `targetQueueDepth`.
    QueueDepth,
    /// Requests that have waited for long.
    QueueAge,
}

impl Constraint {
    /// All of them.
    pub const ALL: [Self; 5] = [
        Self::Blocks,
        Self::Slots,
        Self::PrefillRate,
        Self::QueueDepth,
        Self::QueueAge,
    ];

    /// Its name in status and metrics.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Blocks => "Blocks",
            Self::Slots => "Slots",
            Self::PrefillRate => "PrefillRate",
            Self::QueueDepth => "QueueDepth",
            Self::QueueAge => "QueueAge",
        }
    }
}

/// Sums over the replicas that reported and serve, and over what is held for them. A report comes from outside: nonsense
/// may give a wrong answer, and never an overflow.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Totals {
    /// Replicas that report what they must and serve.
    pub(super) reporting: u64,
    /// Replicas that started and don't.
    pub(super) silent: u64,
    pub(super) blocks: u64,
    pub(super) active: u64,
    pub(super) waiting_need: u64,
    /// Blocks that running sequences are expected to take yet, beyond what those give back that end.
    pub(super) growth: u64,
    pub(super) waiting: u64,
    /// Sequences that run, and slots; 0 slots where a replica doesn't say.
    pub(super) running: u64,
    pub(super) slots: u64,
    says_slots: u64,
    pub(super) backlog_tokens: u64,
    /// Replicas whose oldest request has waited for too long.
    pub(super) overdue_queues: u64,
    held: Held,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Held {
    requests: u64,
    prompt_tokens: u64,
}

impl Totals {
    /// Adds up. A draining replica is neither supply nor demand.
    pub(super) fn of(loads: &[ReplicaLoad], learned: &Learned) -> Self {
        let mut totals = Self::default();
        for load in loads {
            match load {
                ReplicaLoad::Reported(report) if report.draining == Some(true) => {}
                ReplicaLoad::Reported(LoadReport {
                    held: Some(held),
                    blocks: None,
                    queue: None,
                    ..
                }) => totals.hold(held),
                ReplicaLoad::Reported(report) => match usable(report) {
                    Some(usable) => totals.add(&usable, learned),
                    None => totals.silent += 1,
                },
                ReplicaLoad::Silent => totals.silent += 1,
            }
        }
        totals
    }

    fn hold(&mut self, held: &HeldCounts) {
        let Held {
            requests,
            prompt_tokens,
        } = &mut self.held;
        *requests = requests.saturating_add(held.requests.unwrap_or(0));
        *prompt_tokens = prompt_tokens.saturating_add(held.prompt_tokens.unwrap_or(0));
    }

    fn add(&mut self, usable: &Usable<'_>, learned: &Learned) {
        let Usable {
            report,
            blocks,
            queue,
        } = usable;
        let sum = |total: &mut u64, n: u64| *total = total.saturating_add(n);
        self.reporting += 1;
        sum(&mut self.blocks, blocks.total);
        sum(&mut self.active, blocks.active.min(blocks.total));
        sum(&mut self.waiting_need, blocks.waiting_need);
        sum(&mut self.waiting, queue.waiting);
        sum(&mut self.growth, growth(report, blocks, learned));
        let backlog = report.prefill_backlog_tokens.unwrap_or(0);
        sum(&mut self.backlog_tokens, backlog);
        if let Some(held) = &report.held {
            self.hold(held);
        }
        let is_overdue = queue.waiting > 0 && queue.oldest_waiting_ms > QUEUE_AGE_MS;
        self.overdue_queues += u64::from(is_overdue);
        let slots = report.slots.unwrap_or_default();
        if let (Some(running), Some(limit)) = (slots.running, slots.limit.filter(|n| *n > 0)) {
            self.says_slots += 1;
            sum(&mut self.running, running);
            sum(&mut self.slots, limit);
        }
    }

    /// Replicas that this is work for, by each constraint that is known, each filled to its target. `arriving` are the
    /// prompt tokens a second that come.
    pub(super) fn needs(
        &self,
        policy: &Autoscaling,
        learned: &Learned,
        arriving: f64,
    ) -> Vec<(Constraint, f64)> {
        let target = f64::from(policy.target_block_utilization_percent.get()) / 100.0;
        let reporting = self.reporting as f64;
        let lead = learned.starts.p90().unwrap_or_default().as_secs_f64();
        let share_now = BACKLOG_SECONDS / lead.max(BACKLOG_SECONDS);
        let waiting = (self.waiting as f64 + self.held.requests as f64) * share_now;
        let mut needs = Vec::new();
        if self.blocks > 0 {
            let each = self.blocks as f64 / reporting;
            let waiting_need = self.waiting_need as f64 * share_now;
            let demand = self.active as f64 + waiting_need + self.growth as f64;
            let share = target.min(learned.block_share());
            needs.push((Constraint::Blocks, demand / (each * share)));
        }
        // Where one doesn't say how many slots it has, all of them together are unknown.
        if self.slots > 0 && self.says_slots == self.reporting {
            let each = self.slots as f64 / reporting;
            let demand = self.running as f64 + waiting;
            needs.push((Constraint::Slots, demand / (each * target)));
        }
        if let Some(rate) = learned.prefill_rate() {
            let backlog = self.backlog_tokens as f64 + self.held.prompt_tokens as f64;
            let demand = arriving + backlog * share_now / BACKLOG_SECONDS;
            needs.push((Constraint::PrefillRate, demand / (rate * PREFILL_TARGET)));
        }
        // Where slots and the rate are known, they say how many replicas a queue is work for: it was there before those came
        // that were asked for, and is left to who has it. Then it asks for one more, should they be wrong.
        let is_explained =
            self.slots > 0 && self.says_slots == self.reporting && learned.prefill_rate().is_some();
        let most = match is_explained {
            true => reporting + 1.0,
            false => f64::INFINITY,
        };
        let depth = f64::from(policy.target_queue_depth.get());
        needs.push((Constraint::QueueDepth, (waiting / depth).min(most)));
        if self.overdue_queues > 0 {
            // Who waits there already is not helped by another replica; who comes is.
            let more = self.overdue_queues as f64 / 2.0;
            needs.push((Constraint::QueueAge, (reporting + more).min(most)));
        }
        needs
    }

    /// Replicas that are needed so that one could go: the rest is filled less, and silent ones count as full.
    pub(super) fn needed_to_go_down(&self, policy: &Autoscaling, need: f64) -> f64 {
        let target = f64::from(policy.target_block_utilization_percent.get()) / 100.0;
        (need + self.silent as f64 / target) / DOWN_TARGET
    }
}

/// Blocks that the running sequences of a replica are expected to take beyond those that end give back: what they would
/// have at the mean length, less what they have. In a steady state that is nothing.
fn growth(report: &LoadReport, blocks: &BlockCounts, learned: &Learned) -> u64 {
    let slots = report.slots.unwrap_or_default();
    let (Some(running), Some(generated)) = (slots.running, slots.generated_tokens) else {
        return 0;
    };
    let Some(mean) = learned.mean_outputs() else {
        return 0;
    };
    let pages = report.page_demand.unwrap_or(PageDemand {
        per_sequence: None,
        per_token_block: Some(1),
    });
    let more_tokens = (running as f64 * mean - generated as f64).max(0.0);
    let per_block = f64::from(blocks.block_size.max(1));
    let pages = more_tokens / per_block * pages.per_token_block.unwrap_or(1) as f64;
    // No more than the pool has: a mean of long answers says little of the ones that run.
    (pages as u64).min(blocks.total)
}

/// The largest of `needs`, and what it is for; `None` where none asks for anything.
pub(super) fn binding(needs: &[(Constraint, f64)]) -> (f64, Option<Constraint>) {
    let mut most = (0.0, None);
    for &(constraint, need) in needs {
        if need > most.0 {
            most = (need, Some(constraint));
        }
    }
    most
}

/// Whole replicas; a need that is a whole number but for rounding is that number.
pub(super) fn whole(need: f64) -> u32 {
    // The cast saturates, and takes what isn't a number as 0.
    ((need - 1e-9).ceil() as u32).max(1)
}
