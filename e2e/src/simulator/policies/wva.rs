//! llm-d's workload variant autoscaler, for one variant.
//!
//! The first (its saturation analyzer): a replica is saturated at a KV usage of 0.80 or five that wait; one more where the
//! others have on average less than 0.10 of KV or three places in the queue to spare, one less where they would keep both
//! with one of them gone; nothing while replicas start.
//!
//! The second (its saturation_v2 analyzer): capacity is the lesser of 0.80 of the KV tokens and the tokens in use where the
//! queue was saturated; required is demand over 0.85 less the supply, starting replicas among it; to spare is the supply
//! less demand over 0.70.

use super::timing::Interval;
use crate::simulator::policy::{Metrics, Policy, View};

const INTERVAL_S: f64 = 30.0;
const KV_THRESHOLD: f64 = 0.80;
const QUEUE_THRESHOLD: f64 = 5.0;
const KV_SPARE: f64 = 0.10;
const QUEUE_SPARE: f64 = 3.0;
const UP: f64 = 0.85;
const DOWN: f64 = 0.70;

/// The first.
#[derive(Clone, Copy, Debug)]
pub struct Saturation {
    interval: Interval,
}

impl Default for Saturation {
    fn default() -> Self {
        Self {
            interval: Interval::every(INTERVAL_S),
        }
    }
}

/// What the first decides: one more, one less, or neither.
fn saturation(usages: &[(f64, f64)]) -> i32 {
    let open: Vec<_> = usages
        .iter()
        .filter(|(kv, queue)| *kv < KV_THRESHOLD && *queue < QUEUE_THRESHOLD)
        .collect();
    if open.is_empty() {
        return i32::from(!usages.is_empty());
    }
    let n = open.len() as f64;
    let (kv, queue) = open
        .iter()
        .fold((0.0, 0.0), |(kv, queue), (k, q)| (kv + k, queue + q));
    let (kv_spare, queue_spare) = (KV_THRESHOLD - kv / n, QUEUE_THRESHOLD - queue / n);
    if kv_spare < KV_SPARE || queue_spare < QUEUE_SPARE {
        return 1;
    }
    if open.len() < 2 {
        return 0;
    }
    let left = n - 1.0;
    let keeps =
        KV_THRESHOLD - kv / left >= KV_SPARE && QUEUE_THRESHOLD - queue / left >= QUEUE_SPARE;
    -i32::from(keeps)
}

impl Policy for Saturation {
    fn name(&self) -> String {
        "llm-d WVA v1".into()
    }

    fn desired(&mut self, view: &View<'_>) -> u32 {
        if !self.interval.is_due(view.now_s) || !view.starting_s.is_empty() {
            return view.asked;
        }
        let serving = view.serving();
        let usages: Vec<_> = serving.iter().map(|m| (m.kv_usage, m.waiting)).collect();
        view.asked.saturating_add_signed(saturation(&usages)).max(1)
    }
}

/// The second.
#[derive(Clone, Copy, Debug)]
pub struct TokenCapacity {
    interval: Interval,
    /// Blocks in use where the queue was saturated.
    learned: Option<f64>,
}

impl Default for TokenCapacity {
    fn default() -> Self {
        Self {
            interval: Interval::every(INTERVAL_S),
            learned: None,
        }
    }
}

/// What the second decides of these.
fn token_capacity(demand: f64, capacity: f64, ready: u32, starting: u32) -> u32 {
    let all = ready + starting;
    let supply = f64::from(all) * capacity;
    let required = demand / UP - supply;
    if required > 0.0 {
        return all + (required / capacity).ceil() as u32;
    }
    let spare = supply - demand / DOWN;
    let fewer = (spare / capacity).floor().max(0.0) as u32;
    if starting > 0 {
        all
    } else {
        all.saturating_sub(fewer).max(1)
    }
}

impl Policy for TokenCapacity {
    fn name(&self) -> String {
        "llm-d WVA v2".into()
    }

    fn desired(&mut self, view: &View<'_>) -> u32 {
        if !self.interval.is_due(view.now_s) {
            return view.asked;
        }
        let serving = view.serving();
        let Some(blocks) = serving.first().map(|m: &Metrics| m.blocks) else {
            return view.asked;
        };
        for m in serving.iter().filter(|m| m.waiting >= QUEUE_THRESHOLD) {
            let known = self.learned.unwrap_or(m.active);
            self.learned = Some(known.min(m.active));
        }
        let most = blocks * KV_THRESHOLD;
        let capacity = self
            .learned
            .map_or(most, |learned| learned.min(most))
            .max(1.0);
        let demand = serving.iter().map(|m| m.active + m.waiting_need).sum();
        let starting = view.starting_s.len() as u32;
        token_capacity(demand, capacity, serving.len() as u32, starting)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The thresholds that both analyzers document, at and beside them.
    #[test]
    fn the_documented_thresholds() {
        for (why, usages, want) in [
            ("all saturated", &[(0.85, 0.0), (0.1, 5.0)][..], 1),
            ("KV to spare below a tenth", &[(0.71, 0.0), (0.75, 0.0)], 1),
            ("queue to spare below three", &[(0.1, 3.0), (0.1, 2.0)], 1),
            ("room for two, not for one", &[(0.5, 0.0), (0.5, 0.0)], 0),
            ("one carries both", &[(0.3, 0.0), (0.3, 1.0)], -1),
            ("the last stays", &[(0.0, 0.0)], 0),
            ("no replica", &[], 0),
        ] {
            assert_eq!(saturation(usages), want, "{why}");
        }
        for (why, demand, ready, starting, want) in [
            ("at 85 of 100", 85.0, 1, 0, 1),
            ("above", 86.0, 1, 0, 2),
            ("several at once", 400.0, 1, 0, 5),
            ("those that start are supply", 160.0, 1, 1, 2),
            ("at 70 of 100 for one less", 140.0, 3, 0, 2),
            ("not quite", 141.0, 3, 0, 3),
            ("no way down while one starts", 10.0, 2, 1, 3),
            ("idle", 0.0, 3, 0, 1),
        ] {
            assert_eq!(
                token_capacity(demand, 100.0, ready, starting),
                want,
                "{why}"
            );
        }
    }
}
