//! What was measured of the replicas: how fast they compute prompts, how full their pools may be, how long their answers
//! are, and how fast prompts arrive.
//!
//! Pure. Measured from differences between two reports of the same start of a replica. What is learned is used from the
//! next look on, so that more load never gives fewer replicas at the same look.

use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use kvasir_crds::llmdeployment::LearnedCapacity;

use super::starts::Starts;
use super::usable::{Usable, usable};
use crate::observed::ReplicaLoad;

/// The share of a new measurement in a running mean.
const NEWEST: f64 = 0.2;
/// A pool is never said to be full below this part of it: preemptions there have another cause.
const LEAST_BLOCK_SHARE: f64 = 0.5;
/// What a second without preemptions gives back of the part of a pool that may be filled.
const SHARE_REGAINED: f64 = 1e-4;
/// Arrivals of so long ago are forgotten.
const ARRIVALS_KEPT: Duration = Duration::from_secs(60);
/// Sequences that must have ended before their mean length is believed.
const ENDED_BELIEVED: u64 = 16;

/// What was measured, and the reports that it goes on from.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Learned {
    /// Prompt tokens a second that a replica computes while more wait.
    prefill_rate: Option<f64>,
    /// How much below 1 the part of a pool is that may be filled.
    blocks_lost: f64,
    mean_outputs: Option<f64>,
    /// Times to ready.
    pub(super) starts: Starts,
    /// By the boot of the replica.
    last: HashMap<String, Seen>,
    arrivals: VecDeque<Arrivals>,
}

/// What a replica had counted at a look.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Seen {
    prompt_tokens: u64,
    backlog_tokens: u64,
    preemptions: u64,
    generated_tokens: u64,
    ended_sequences: u64,
    /// Prompts wait for other prompts, and for neither slots nor blocks.
    waits_for_compute: bool,
    block_share: f64,
}

/// Prompt tokens that came between two looks.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Arrivals {
    at: Duration,
    seconds: f64,
    tokens: f64,
}

impl Learned {
    /// Goes on from what a status tells.
    pub(super) fn read_back(told: &LearnedCapacity) -> Self {
        let positive = |n: f64| Some(n).filter(|n| *n > 0.0);
        let rate = told.prefill_tokens_per_second;
        let share = told.block_percent.map_or(1.0, |n| f64::from(n) / 100.0);
        Self {
            prefill_rate: rate.and_then(|n| positive(n as f64)),
            blocks_lost: 1.0 - share.clamp(LEAST_BLOCK_SHARE, 1.0),
            starts: Starts::read_back(told.start_seconds),
            ..Self::default()
        }
    }

    /// For the status; nothing where nothing was measured.
    pub(super) fn tell(&self, growth: Option<f64>) -> Option<LearnedCapacity> {
        let told = LearnedCapacity {
            prefill_tokens_per_second: self.prefill_rate.map(|rate| rate.round() as i64),
            block_percent: (self.blocks_lost > 0.0)
                .then(|| (self.block_share() * 100.0).round() as i32),
            start_seconds: self.starts.p90().map(|p90| p90.as_secs_f64().ceil() as i32),
            growth_percent: growth.map(|growth| ((growth - 1.0) * 100.0).round() as i32),
        };
        (told != LearnedCapacity::default()).then_some(told)
    }

    pub(super) fn prefill_rate(&self) -> Option<f64> {
        self.prefill_rate
    }

    /// The part of a pool that may be filled.
    pub(super) fn block_share(&self) -> f64 {
        1.0 - self.blocks_lost
    }

    pub(super) fn mean_outputs(&self) -> Option<f64> {
        self.mean_outputs
    }

    /// Prompt tokens a second that came in the last `window`.
    pub(super) fn arriving(&self, now: Duration, window: Duration) -> f64 {
        let recent = self.arrivals.iter().rev();
        let recent = recent.take_while(|a| now.saturating_sub(a.at) < window);
        let (mut seconds, mut tokens) = (0.0, 0.0);
        for arrivals in recent {
            seconds += arrivals.seconds;
            tokens += arrivals.tokens;
        }
        if seconds > 0.0 { tokens / seconds } else { 0.0 }
    }

    /// Notes the prompt tokens that came since the last look, `seconds` ago; nothing is known where there was none.
    pub(super) fn note_arrivals(
        &mut self,
        loads: &[ReplicaLoad],
        now: Duration,
        seconds: Option<f64>,
    ) {
        let Some(seconds) = seconds.filter(|s| *s > 0.0) else {
            self.arrivals.clear();
            return;
        };
        let tokens = reports(loads).filter_map(|usable| {
            let (boot, now) = seen(&usable)?;
            // A replica that was not there at the last look has begun since: it counts from 0.
            let (computed, backlog) = self
                .last
                .get(boot)
                .map_or((0, 0), |seen| (seen.prompt_tokens, seen.backlog_tokens));
            let computed = now.prompt_tokens.checked_sub(computed)?;
            Some((computed as f64 + now.backlog_tokens as f64 - backlog as f64).max(0.0))
        });
        let tokens = tokens.sum();
        self.arrivals.push_back(Arrivals {
            at: now,
            seconds,
            tokens,
        });
        while (self.arrivals.front()).is_some_and(|a| now.saturating_sub(a.at) > ARRIVALS_KEPT) {
            self.arrivals.pop_front();
        }
    }

    /// Learns from these reports what they add to those of the look `seconds` ago, and keeps them for the next look.
    pub(super) fn learn(&mut self, loads: &[ReplicaLoad], seconds: Option<f64>) {
        let mut last = HashMap::new();
        for usable in reports(loads) {
            let Some((boot, now)) = seen(&usable) else {
                continue;
            };
            let before = self.last.get(boot).copied();
            if let (Some(before), Some(seconds)) = (before, seconds.filter(|s| *s > 0.0)) {
                self.compare(&before, &now, seconds);
            }
            last.insert(boot.to_owned(), now);
        }
        self.last = last;
    }

    fn compare(&mut self, before: &Seen, now: &Seen, seconds: f64) {
        let rise = |of: fn(&Seen) -> u64| of(now).checked_sub(of(before));
        if let Some(computed) = rise(|seen| seen.prompt_tokens) {
            let rate = computed as f64 / seconds;
            // It had half of that to do at both ends, and so had work all the time.
            let is_saturated = before.waits_for_compute
                && now.waits_for_compute
                && before.backlog_tokens.min(now.backlog_tokens) >= computed / 2
                && computed > 0;
            match self.prefill_rate {
                None if is_saturated => self.prefill_rate = Some(rate),
                // It was seen to compute faster.
                Some(known) if is_saturated || rate > known => {
                    self.prefill_rate = Some(known + (rate - known) * NEWEST);
                }
                None | Some(_) => {}
            }
        }
        match rise(|seen| seen.preemptions) {
            Some(0) => self.blocks_lost = (self.blocks_lost - SHARE_REGAINED * seconds).max(0.0),
            Some(_) => {
                let share = before.block_share.max(LEAST_BLOCK_SHARE);
                self.blocks_lost = self.blocks_lost.max(1.0 - share.min(1.0));
            }
            None => {}
        }
        // A mean of all that ever ended moves with the workload too slowly, one of a look's is noise.
        if let (Some(outputs), Some(ended)) = (
            rise(|seen| seen.generated_tokens),
            rise(|seen| seen.ended_sequences),
        ) && ended > 0
            && now.ended_sequences >= ENDED_BELIEVED
        {
            let all = now.generated_tokens as f64 / now.ended_sequences as f64;
            let new = outputs as f64 / ended as f64;
            let weight = (ended as f64 / 256.0).min(1.0);
            let known = self.mean_outputs.unwrap_or(all);
            self.mean_outputs = Some(known + (new - known) * weight);
        }
    }
}

/// The reports of the replicas that serve.
fn reports(loads: &[ReplicaLoad]) -> impl Iterator<Item = Usable<'_>> {
    loads.iter().filter_map(|load| match load {
        ReplicaLoad::Reported(report) if report.draining != Some(true) => usable(report),
        ReplicaLoad::Reported(_) | ReplicaLoad::Silent => None,
    })
}

/// What can be compared of a report, where it says which start of the replica it is of.
fn seen<'a>(
    Usable {
        report,
        blocks,
        queue,
    }: &Usable<'a>,
) -> Option<(&'a str, Seen)> {
    let totals = report.totals?;
    let slots = report.slots.unwrap_or_default();
    let has_slots = match (slots.running, slots.limit) {
        (Some(running), Some(limit)) => running < limit,
        _ => false,
    };
    // What each waiting request needs, and the blocks that the scheduler keeps for those that run.
    let each = blocks.waiting_need / queue.waiting.max(1);
    let room = blocks.cached.saturating_add(blocks.free);
    let has_blocks = room > each.saturating_add(queue.running);
    Some((
        report.boot_id.as_deref()?,
        Seen {
            prompt_tokens: totals.prompt_tokens?,
            backlog_tokens: report.prefill_backlog_tokens?,
            preemptions: report.preemptions.unwrap_or(0),
            generated_tokens: totals.generated_tokens.unwrap_or(0),
            ended_sequences: totals.ended_sequences.unwrap_or(0),
            waits_for_compute: has_slots && has_blocks,
            block_share: blocks.active as f64 / blocks.total as f64,
        },
    ))
}
