//! Two policies that know what nobody can: the one what will come, the other which headroom would have been best.
//!
//! Both go by the work of the requests in seconds of a replica, an estimate that a search scales: so it doesn't have to be
//! right.

use std::collections::VecDeque;

use crate::simulator::fleet::TICK_S;
use crate::simulator::hardware::Hardware;
use crate::simulator::load::Load;
use crate::simulator::policy::{Policy, View};

/// The work that arrives in each tick, in replicas that it keeps busy.
#[derive(Clone, Debug)]
pub struct Work(Vec<f64>);

impl Work {
    /// Of a load, on this hardware.
    #[must_use]
    pub fn of(load: &Load, hardware: &Hardware) -> Self {
        let n = (load.duration_s / TICK_S).ceil() as usize + 1;
        let mut ticks = vec![0.0; n];
        for request in &load.requests {
            let at = (request.arrival_s / TICK_S) as usize;
            ticks[at.min(n - 1)] += hardware.work_s(request) / TICK_S;
        }
        Self(ticks)
    }

    /// Its mean over the whole time.
    #[must_use]
    pub fn mean(&self) -> f64 {
        self.0.iter().sum::<f64>() / self.0.len() as f64
    }

    /// Its means over the ticks from `first` on, cut at both ends.
    fn over(&self, first: i64, n: i64) -> f64 {
        let cut = |at: i64| usize::try_from(at).unwrap_or(0).min(self.0.len());
        let ticks = &self.0[cut(first)..cut(first + n)];
        ticks.iter().sum::<f64>() / ticks.len().max(1) as f64
    }
}

fn ticks(seconds: f64) -> i64 {
    ((seconds / TICK_S).round() as i64).max(1)
}

/// Asks for what will be needed, early enough.
#[derive(Clone, Debug)]
pub struct Clairvoyant {
    asked: Vec<u32>,
}

impl Clairvoyant {
    /// At each tick as many as the work of `window_s` around it needs, times `scale`; a replica is asked for as much earlier
    /// as it takes to start.
    #[must_use]
    pub fn new(work: &Work, scale: f64, window_s: f64, start_s: f64) -> Self {
        let n = ticks(window_s);
        let needed: Vec<u32> = (0..work.0.len() as i64)
            .map(|at| {
                let need = work.over(at - n / 2, n) * scale;
                need.ceil().max(1.0) as u32
            })
            .collect();
        let ahead = (start_s / TICK_S).ceil() as usize;
        let asked = (0..needed.len()).map(|at| {
            let until = (at + ahead + 1).min(needed.len());
            needed[at..until].iter().copied().max().unwrap_or(1)
        });
        Self {
            asked: asked.collect(),
        }
    }

    /// Those that serve at the beginning.
    #[must_use]
    pub fn initial(&self) -> u32 {
        self.asked.first().copied().unwrap_or(1)
    }
}

impl Policy for Clairvoyant {
    fn name(&self) -> String {
        "clairvoyant".into()
    }

    fn desired(&mut self, view: &View<'_>) -> u32 {
        let at = (view.now_s / TICK_S).round() as usize;
        self.asked.get(at).copied().unwrap_or(view.asked)
    }
}

/// A constant headroom over the work of late: up at once, down by the largest wish of a window.
#[derive(Clone, Debug)]
pub struct Headroom<'a> {
    work: &'a Work,
    scale: f64,
    window_s: f64,
    down_s: f64,
    wishes: VecDeque<(f64, u32)>,
}

impl<'a> Headroom<'a> {
    /// As many as the work of the last `window_s` needs, times `scale`; down after `down_s`.
    #[must_use]
    pub fn new(work: &'a Work, scale: f64, window_s: f64, down_s: f64) -> Self {
        Self {
            work,
            scale,
            window_s,
            down_s,
            wishes: VecDeque::new(),
        }
    }
}

impl Policy for Headroom<'_> {
    fn name(&self) -> String {
        "best headroom".into()
    }

    fn desired(&mut self, view: &View<'_>) -> u32 {
        let at = (view.now_s / TICK_S).round() as i64;
        let n = ticks(self.window_s).min(at.max(1));
        let wish = (self.work.over(at - n, n) * self.scale).ceil().max(1.0) as u32;
        self.wishes.push_back((view.now_s, wish));
        self.wishes.retain(|(at, _)| view.now_s - at <= self.down_s);
        let most = self.wishes.iter().map(|(_, n)| *n).max().unwrap_or(wish);
        match wish > view.asked {
            true => wish,
            // What it knows of the time before the beginning is nothing.
            false if view.now_s < self.down_s => view.asked,
            false => most.min(view.asked),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_clairvoyant_asks_as_early_as_a_start_takes() {
        let mut ticks = vec![1.0; 100];
        ticks[50..60].fill(4.0);
        let work = Work(ticks);
        let asked = |start_s| Clairvoyant::new(&work, 1.0, 2.0, start_s).asked;
        let at_once = asked(0.0);
        assert_eq!((at_once[49], at_once[50], at_once[60]), (1, 4, 1));
        let early = asked(30.0);
        assert_eq!((early[34], early[35], early[59], early[60]), (1, 4, 4, 1));
    }

    #[test]
    fn the_headroom_follows_what_came() {
        let mut ticks = vec![1.0; 100];
        ticks[50..60].fill(4.0);
        let work = Work(ticks);
        let mut policy = Headroom::new(&work, 1.5, 4.0, 20.0);
        let mut asked = 2;
        let mut series = Vec::new();
        for at in 0..100 {
            asked = policy.desired(&View {
                now_s: f64::from(at) * TICK_S,
                asked,
                reports: &[],
                starting_s: &[],
                started_s: &[],
            });
            series.push(asked);
        }
        assert_eq!((series[50], series[51], series[52]), (2, 4, 6));
        assert_eq!((series[70], series[72], series[99]), (6, 2, 2));
    }
}
