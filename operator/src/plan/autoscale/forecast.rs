//! How much the demand grows while a replica starts, learned from how much it did.
//!
//! Pure. What arrived in the last hour is kept in bins. From each past moment it is known how far that rose above its mean
//! within the time that a replica takes to start: four times of five it was no more than the growth that is returned. The
//! demand itself would not do: it also rises where replicas lack, and when their capacity is learned. Replicas that start
//! at once need no forecast: then what is asked for now is what counts.

use std::collections::VecDeque;
use std::time::Duration;

const BIN: Duration = Duration::from_secs(10);
/// An hour.
const BINS_KEPT: usize = 360;
/// Bins of the mean that growth is counted from.
const MEAN_BINS: usize = 6;
/// Moments that must be known before the growth is believed.
const MOMENTS_BELIEVED: usize = 12;
/// Of all moments, this part grew less.
const QUANTILE: f64 = 0.8;
/// Where too few moments are known.
const UNKNOWN_GROWTH: f64 = 1.25;
/// A demand that doubled in a start is prepared for, and no more: what comes from nothing grows without end.
const MOST_GROWTH: f64 = 2.0;

/// What is forecast from.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Sample {
    /// In replicas.
    pub(super) demand: f64,
    /// What arrives, in any unit.
    pub(super) arriving: f64,
}

/// The last hour.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Forecast {
    /// Means of the past bins, newest last.
    bins: VecDeque<Sample>,
    /// The bin under way: when it began, the sum and the number of its samples.
    current: Option<(Duration, Sample, u32)>,
    /// Of the last full bin; `None` where replicas start at once.
    growth: Option<f64>,
}

impl Forecast {
    /// Goes on from what a status tells.
    pub(super) fn read_back(growth_percent: Option<i32>) -> Self {
        let growth = growth_percent.map(|n| 1.0 + f64::from(n) / 100.0);
        Self {
            growth: growth.map(|growth| growth.clamp(1.0, MOST_GROWTH)),
            ..Self::default()
        }
    }

    /// Notes a look, where replicas take `lead` to start.
    pub(super) fn push(&mut self, now: Duration, sample: Sample, lead: Duration) {
        let (began, sum, n) = self.current.unwrap_or((now, Sample::default(), 0));
        if now.saturating_sub(began) < BIN {
            let sum = Sample {
                demand: sum.demand + sample.demand,
                arriving: sum.arriving + sample.arriving,
            };
            self.current = Some((began, sum, n + 1));
            return;
        }
        if self.bins.len() == BINS_KEPT {
            self.bins.pop_front();
        }
        let n = f64::from(n.max(1));
        self.bins.push_back(Sample {
            demand: sum.demand / n,
            arriving: sum.arriving / n,
        });
        self.current = Some((now, sample, 1));
        self.growth = (lead > BIN).then(|| self.measure(lead));
    }

    /// Forgets the bins, after a gap.
    pub(super) fn interrupt(&mut self) {
        self.bins.clear();
        self.current = None;
    }

    /// By how much the demand is multiplied to last until a replica started now serves.
    pub(super) fn growth(&self) -> Option<f64> {
        self.growth
    }

    /// The demand that replicas started now are for: the mean of late, grown; `None` where they start at once.
    pub(super) fn demand(&self) -> Option<f64> {
        let bins = self.bins.iter().rev().take(MEAN_BINS);
        let mean = mean(bins.map(|bin| bin.demand))?;
        Some(mean * self.growth?)
    }

    fn measure(&self, lead: Duration) -> f64 {
        let n_lead = (lead.as_secs_f64() / BIN.as_secs_f64()).ceil() as usize;
        let bins: Vec<f64> = self.bins.iter().map(|bin| bin.arriving).collect();
        let n_moments = bins.len().saturating_sub(MEAN_BINS + n_lead);
        if n_moments < MOMENTS_BELIEVED {
            return self.growth.unwrap_or(UNKNOWN_GROWTH);
        }
        let mut growths: Vec<f64> = (0..n_moments)
            .filter_map(|first| {
                let then = mean(bins[first..first + MEAN_BINS].iter().copied())?;
                let after = &bins[first + MEAN_BINS..first + MEAN_BINS + n_lead];
                let means = after.windows(MEAN_BINS.min(n_lead));
                let means = means.filter_map(|bins| mean(bins.iter().copied()));
                let most = means.fold(0.0, f64::max);
                (then > 0.0).then(|| most / then)
            })
            .collect();
        growths.sort_by(f64::total_cmp);
        let at = (growths.len() as f64 * QUANTILE) as usize;
        let growth = growths.get(at.min(growths.len().saturating_sub(1)));
        growth.map_or(UNKNOWN_GROWTH, |growth| growth.clamp(1.0, MOST_GROWTH))
    }
}

fn mean(values: impl Iterator<Item = f64>) -> Option<f64> {
    let (sum, n) = values.fold((0.0, 0u32), |(sum, n), value| (sum + value, n + 1));
    (n > 0).then(|| sum / f64::from(n))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(demand: f64) -> Sample {
        let arriving = demand * 1_000.0;
        Sample { demand, arriving }
    }

    fn told(demand: impl Fn(u64) -> f64, lead: u64) -> Forecast {
        let mut forecast = Forecast::default();
        for second in (0..1_800).step_by(2) {
            let at = Duration::from_secs(second);
            forecast.push(at, sample(demand(second)), Duration::from_secs(lead));
        }
        forecast
    }

    #[test]
    fn growth_is_what_came_in_the_time_of_a_start() {
        let steady = told(|_| 4.0, 300);
        assert_eq!(steady.growth(), Some(1.0));
        assert!((steady.demand().unwrap() - 4.0).abs() < 1e-9);
        // A quarter in five minutes.
        let ramp = told(|second| 10.0 + second as f64 / 120.0, 300);
        let growth = ramp.growth().unwrap();
        assert!((1.15..1.3).contains(&growth), "{growth}");
        // Four minutes of each five at 2, one at 6: within five minutes it triples, and is prepared for as far as it may be.
        let bursts = told(|second| if second % 300 < 60 { 6.0 } else { 2.0 }, 300);
        assert_eq!(bursts.growth(), Some(MOST_GROWTH));
        assert_eq!(told(|_| 4.0, 2).growth(), None, "they start at once");
    }

    #[test]
    fn too_few_moments_are_not_believed() {
        let mut forecast = Forecast::read_back(Some(50));
        let lead = Duration::from_secs(300);
        for second in (0..200).step_by(2) {
            forecast.push(Duration::from_secs(second), sample(1.0), lead);
        }
        assert_eq!(forecast.growth(), Some(1.5), "what was told goes on");
        let mut new = Forecast::default();
        for second in (0..30).step_by(2) {
            new.push(Duration::from_secs(second), sample(1.0), lead);
        }
        assert_eq!(new.growth(), Some(UNKNOWN_GROWTH));
        new.push(Duration::from_secs(40), sample(f64::NAN), lead);
        assert!(new.growth().unwrap() >= 1.0);
    }
}
