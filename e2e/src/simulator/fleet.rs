//! Replicas that come and go as a policy has it, and the requests that they get.
//!
//! A request goes to the ready replica with the fewest prompt tokens to compute, of these to the one with the fewest
//! sequences. A replica that is taken away gets no more requests, finishes those that it has, and costs until then; one
//! that starts costs from the beginning.

use kvasir_crds::LoadReport;

use super::hardware::{Hardware, objective_s};
use super::load::Load;
use super::policy::{Policy, View};
use super::replica::Replica;

/// How often a policy is asked: the operator's interval.
pub const TICK_S: f64 = 2.0;
/// How long requests are waited for after the load has ended; those that have no first token then never got one.
const EPILOGUE_S: f64 = 900.0;

/// What is the same for all policies.
#[derive(Clone, Copy, Debug)]
pub struct Terms {
    /// Each replica.
    pub hardware: Hardware,
    /// From the creation of a replica until it serves.
    pub start_s: f64,
    /// Replicas that serve at the beginning.
    pub initial: u32,
    /// The most replicas.
    pub most: u32,
}

/// How a run went.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Outcome {
    /// Requests whose first token came in the time of its objective, of all.
    pub attainment: f64,
    /// Replicas times hours, until the load ends.
    pub replica_hours: f64,
    /// Changes of the number of replicas.
    pub changes: u32,
    /// Changes back within a minute, or within two starts.
    pub flaps: u32,
    /// Requests that no replica took.
    pub refusals: u32,
    /// Times to the first token in seconds: the half and 99 of 100 of those that got one.
    pub ttft_p50_s: f64,
    /// See above.
    pub ttft_p99_s: f64,
    /// Replicas asked for and ready, at each tick.
    pub series: Vec<(f64, u32, u32)>,
}

struct Member {
    replica: Replica,
    created_s: f64,
    drains: bool,
}

/// Runs a load through replicas that a policy scales.
pub fn run(load: &Load, terms: &Terms, policy: &mut dyn Policy) -> Outcome {
    let mut fleet = Fleet::new(load, terms);
    let (mut next, mut tick) = (0, 0.0);
    while tick <= load.duration_s {
        while next < load.requests.len() && load.requests[next].arrival_s < tick {
            fleet.arrive(next);
            next += 1;
        }
        fleet.advance(tick);
        fleet.ask(policy, tick);
        tick += TICK_S;
    }
    for request in next..load.requests.len() {
        fleet.arrive(request);
    }
    fleet.advance(load.duration_s);
    fleet.settle_costs(load.duration_s);
    // The rest is served, and costs nothing any more: it is the same for all.
    fleet.advance(load.duration_s + EPILOGUE_S);
    fleet.outcome()
}

struct Fleet<'a> {
    load: &'a Load,
    terms: Terms,
    members: Vec<Member>,
    /// When each that starts was created.
    starting: Vec<f64>,
    n_booted: u64,
    /// Times that replicas which became ready since the last tick had taken.
    started: Vec<f64>,
    asked: u32,
    last_change: Option<(f64, bool)>,
    replica_seconds: f64,
    first_tokens: Vec<Option<f64>>,
    outcome: Outcome,
}

impl<'a> Fleet<'a> {
    fn new(load: &'a Load, terms: &Terms) -> Self {
        let mut fleet = Self {
            load,
            terms: *terms,
            members: Vec::new(),
            starting: Vec::new(),
            n_booted: 0,
            // Those that serve at the beginning were seen to start.
            started: vec![terms.start_s; terms.initial as usize],
            asked: terms.initial,
            last_change: None,
            replica_seconds: 0.0,
            first_tokens: vec![None; load.requests.len()],
            outcome: Outcome::default(),
        };
        for _ in 0..terms.initial {
            fleet.boot(0.0, 0.0);
        }
        fleet
    }

    fn boot(&mut self, created_s: f64, now_s: f64) {
        self.n_booted += 1;
        self.members.push(Member {
            replica: Replica::new(self.terms.hardware, self.n_booted, now_s),
            created_s,
            drains: false,
        });
    }

    /// Those that have started by `now_s` serve.
    fn promote(&mut self, now_s: f64) {
        let start_s = self.terms.start_s;
        let ready = |created: &f64| created + start_s <= now_s;
        let created: Vec<f64> = self.starting.iter().copied().filter(ready).collect();
        self.starting.retain(|created| !ready(created));
        for created in created {
            self.boot(created, created + start_s);
            self.started.push(start_s);
        }
    }

    fn arrive(&mut self, request: usize) {
        let requests = &self.load.requests;
        let now_s = requests[request].arrival_s;
        self.promote(now_s);
        for member in &mut self.members {
            member.replica.advance(requests, now_s);
        }
        let serving = self.members.iter_mut().filter(|member| !member.drains);
        let least = serving.min_by_key(|member| {
            let replica = &member.replica;
            // Tokens that a step or two compute make no difference.
            let load = replica.n_running() + replica.n_waiting();
            (replica.backlog_tokens() / 512, load)
        });
        let is_taken = least.is_some_and(|member| member.replica.add(requests, request, now_s));
        self.outcome.refusals += u32::from(!is_taken);
    }

    fn advance(&mut self, now_s: f64) {
        self.promote(now_s);
        for member in &mut self.members {
            member.replica.advance(&self.load.requests, now_s);
        }
        let (first_tokens, seconds) = (&mut self.first_tokens, &mut self.replica_seconds);
        self.members.retain_mut(|member| {
            for (request, at) in member.replica.first_tokens.drain(..) {
                first_tokens[request] = Some(at);
            }
            let is_gone = member.drains && member.replica.is_idle();
            if is_gone {
                *seconds += (member.replica.idle_since_s - member.created_s).max(0.0);
            }
            !is_gone
        });
    }

    fn ask(&mut self, policy: &mut dyn Policy, now_s: f64) {
        let reports: Vec<LoadReport> = (self.members.iter())
            .map(|member| LoadReport {
                draining: Some(member.drains),
                ..member.replica.report(&self.load.requests, now_s)
            })
            .collect();
        let starting: Vec<f64> = self.starting.iter().map(|at| now_s - at).collect();
        let started = std::mem::take(&mut self.started);
        let desired = policy.desired(&View {
            now_s,
            asked: self.asked,
            reports: &reports,
            starting_s: &starting,
            started_s: &started,
        });
        let desired = desired.clamp(1, self.terms.most);
        if desired != self.asked {
            self.change(desired, now_s);
        }
        let ready = self.members.iter().filter(|member| !member.drains).count() as u32;
        self.outcome.series.push((now_s, self.asked, ready));
    }

    fn change(&mut self, desired: u32, now_s: f64) {
        let is_up = desired > self.asked;
        self.outcome.changes += 1;
        let soon = (2.0 * self.terms.start_s).max(60.0);
        let is_flap =
            (self.last_change).is_some_and(|(at, was_up)| was_up != is_up && now_s - at < soon);
        self.outcome.flaps += u32::from(is_flap);
        self.last_change = Some((now_s, is_up));
        for _ in self.asked..desired {
            self.starting.push(now_s);
        }
        for _ in desired..self.asked {
            self.take_one(now_s);
        }
        self.asked = desired;
    }

    /// The newest that starts, or else the one with the fewest sequences.
    fn take_one(&mut self, now_s: f64) {
        if let Some(created) = self.starting.pop() {
            self.replica_seconds += now_s - created;
            return;
        }
        let serving = self.members.iter_mut().filter(|member| !member.drains);
        let least = serving.min_by_key(|m| m.replica.n_running() + m.replica.n_waiting());
        if let Some(member) = least {
            member.drains = true;
            if member.replica.is_idle() {
                member.replica.idle_since_s = now_s;
            }
        }
    }

    fn settle_costs(&mut self, now_s: f64) {
        let alive = self.members.iter().map(|member| member.created_s);
        let seconds = alive
            .chain(self.starting.iter().copied())
            .map(|at| now_s - at);
        let seconds = self.replica_seconds + seconds.sum::<f64>();
        self.outcome.replica_hours = seconds / 3_600.0;
    }

    fn outcome(mut self) -> Outcome {
        let requests = &self.load.requests;
        let mut times: Vec<f64> = Vec::with_capacity(requests.len());
        let mut n_attained = 0usize;
        for (request, first) in requests.iter().zip(&self.first_tokens) {
            if let Some(first) = first {
                let took = first - request.arrival_s;
                n_attained += usize::from(took <= objective_s(request));
                times.push(took);
            }
        }
        times.sort_by(f64::total_cmp);
        let at = |share: f64| {
            let at = (times.len() as f64 * share) as usize;
            times.get(at.min(times.len().saturating_sub(1))).copied()
        };
        self.outcome.attainment = n_attained as f64 / requests.len().max(1) as f64;
        self.outcome.ttft_p50_s = at(0.5).unwrap_or(0.0);
        self.outcome.ttft_p99_s = at(0.99).unwrap_or(0.0);
        self.outcome
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simulator::load::Request;
    use crate::simulator::policy::Fixed;

    fn terms(start_s: f64) -> Terms {
        Terms {
            hardware: Hardware::slowed(1.0),
            start_s,
            initial: 1,
            most: 8,
        }
    }

    /// Asks for these numbers, one after the other, at each tick.
    struct Script(Vec<u32>);

    impl Policy for Script {
        fn name(&self) -> String {
            "script".into()
        }

        fn desired(&mut self, view: &View<'_>) -> u32 {
            if self.0.is_empty() {
                view.asked
            } else {
                self.0.remove(0)
            }
        }
    }

    fn request(arrival_s: f64) -> Request {
        Request {
            arrival_s,
            prompt: 100,
            outputs: 10,
            chunks: Vec::new(),
        }
    }

    #[test]
    fn replicas_cost_from_their_creation_until_they_are_done() {
        let load = Load {
            name: "none".into(),
            requests: Vec::new(),
            duration_s: 3_600.0,
            is_generated: false,
        };
        let outcome = run(&load, &terms(30.0), &mut Fixed(3));
        let hours = 1.0 + 2.0;
        assert!((outcome.replica_hours - hours).abs() < 1e-9, "{outcome:?}");
        assert_eq!((outcome.changes, outcome.flaps), (1, 0));
        assert_eq!(outcome.series[14], (28.0, 3, 1));
        assert_eq!(
            outcome.series[15],
            (30.0, 3, 3),
            "after 30 seconds they serve"
        );
    }

    #[test]
    fn a_change_back_is_a_flap_and_what_drains_finishes() {
        let load = Load {
            name: "one".into(),
            requests: (0..100).map(|n| request(f64::from(n) * 0.1)).collect(),
            duration_s: 120.0,
            is_generated: false,
        };
        let outcome = run(&load, &terms(2.0), &mut Script(vec![1, 2, 1, 2, 2, 1]));
        assert_eq!((outcome.changes, outcome.flaps), (4, 3));
        assert_eq!((outcome.attainment, outcome.refusals), (1.0, 0));
    }
}
