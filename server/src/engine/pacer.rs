//! How many prompt tokens may join a step in which sequences decode, so that no stream stalls while long prompts arrive.
//!
//! Pure: it is told how long steps took and knows no clock. The budget is steered so that a step with prompts takes
//! [`MOST_STRETCH`] times as long as one that only decodes: what a prompt token costs depends on the device, the chunk and
//! the context in no simple way (on a GPU a small chunk costs almost what a larger one does), so no cost is assumed. It never
//! falls below [`LEAST_SHARE`], because small chunks compute prompts so slowly that everybody would wait. Every
//! [`CADENCE`]th step with decodes has no prompt tokens, so that their own time stays known while prompts never end.

use std::time::Duration;

/// A step with prompt tokens may take this many times as long as one that only decodes.
const MOST_STRETCH: f64 = 2.9;
/// One in so many steps only decodes.
const CADENCE: u32 = 16;
/// The share of a new measurement in the running mean of a decode's time.
const NEWEST: f64 = 0.25;
/// The budget changes by at most this factor down and up after one step.
const STEERING: (f64, f64) = (0.6, 1.15);
/// The prompt tokens that a step may always have, as a share of the largest step; the first budget is the same.
const LEAST_SHARE: f64 = 1.0 / 8.0;

/// What a step was made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StepSize {
    /// Tokens of sequences that decode.
    pub n_decodes: u32,
    /// Tokens of prompts.
    pub n_prompt: u32,
}

/// The measured time of a decode, and the budget that follows from what steps took.
#[derive(Clone, Debug)]
pub struct PrefillPacer {
    max_tokens: u32,
    decode_s: Option<f64>,
    budget: f64,
    n_mixed: u32,
}

impl PrefillPacer {
    /// For steps of at most `max_tokens` tokens.
    pub fn new(max_tokens: u32) -> Self {
        Self {
            max_tokens,
            decode_s: None,
            budget: f64::from(max_tokens) * LEAST_SHARE,
            n_mixed: 0,
        }
    }

    /// Prompt tokens that the next step may have beside decodes.
    pub fn budget(&self) -> u32 {
        match self.n_mixed >= CADENCE - 1 {
            true => 0,
            false => (self.budget as u32).clamp(self.least(), self.max_tokens),
        }
    }

    /// A step of this size took so long, from the end of the step before it.
    pub fn observe(&mut self, size: StepSize, took: Duration) {
        let took_s = took.as_secs_f64();
        match size {
            StepSize { n_decodes: 0, .. } => self.n_mixed = 0,
            StepSize { n_prompt: 0, .. } => {
                self.n_mixed = 0;
                let mean = self.decode_s.unwrap_or(took_s);
                self.decode_s = Some(mean + (took_s - mean) * NEWEST);
            }
            StepSize { n_prompt, .. } => {
                self.n_mixed += 1;
                if let Some(decode_s) = self.decode_s {
                    self.steer(
                        f64::from(n_prompt),
                        MOST_STRETCH * decode_s / took_s.max(1e-9),
                    );
                }
            }
        }
    }

    /// `room`: the time that a step of `n_prompt` tokens may take, over what it took.
    fn steer(&mut self, n_prompt: f64, room: f64) {
        let (down, up) = STEERING;
        let is_full = n_prompt >= 0.9 * f64::from(self.budget());
        // A step that had fewer tokens than it might have says nothing of whether more would fit.
        if room < 1.0 || is_full {
            let bounds = (f64::from(self.least()), f64::from(self.max_tokens));
            self.budget = (self.budget * room.clamp(down, up)).clamp(bounds.0, bounds.1);
        }
    }

    fn least(&self) -> u32 {
        ((f64::from(self.max_tokens) * LEAST_SHARE) as u32).max(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const N_DECODES: u32 = 16;

    /// Runs steps with prompts without end on a device whose steps take what `cost_us` says of their prompt tokens; the
    /// prompt tokens and times of those after the first hundred that had some.
    fn run(pacer: &mut PrefillPacer, cost_us: impl Fn(u32) -> u64) -> Vec<(u32, u64)> {
        let mut mixed = Vec::new();
        for step in 0..400 {
            let n_prompt = pacer.budget();
            let size = StepSize {
                n_decodes: N_DECODES,
                n_prompt,
            };
            pacer.observe(size, Duration::from_micros(cost_us(n_prompt)));
            if step > 100 && n_prompt > 0 {
                mixed.push((n_prompt, cost_us(n_prompt)));
            }
        }
        mixed
    }

    #[test]
    fn the_time_that_a_step_may_take_is_used_and_not_exceeded() {
        // What a chunk costs: in proportion, or almost the same whatever its size, as on a GPU.
        let proportional = |n: u32| 5_000 + 5 * u64::from(n) / 2;
        let flat = |n: u32| 5_000 + if n > 0 { 7_000 + u64::from(n) / 2 } else { 0 };
        for (why, cost, least) in [
            ("in proportion", &proportional as &dyn Fn(u32) -> u64, 3_300),
            ("almost flat", &flat, 3_500),
        ] {
            let mixed = run(&mut PrefillPacer::new(8192), cost);
            assert!(mixed.len() > 250, "{why}: prompts run in most steps");
            for (n_prompt, took_us) in mixed {
                assert!(took_us <= 15_800, "{why}: {n_prompt} tokens, {took_us} us");
                assert!(
                    n_prompt >= least,
                    "{why}: {n_prompt} tokens of room are used"
                );
            }
        }
    }

    #[test]
    fn the_budget_follows_what_decodes_cost() {
        let mut pacer = PrefillPacer::new(8192);
        let mut settled = |decode_us: u64| {
            let mixed = run(&mut pacer, |n| decode_us + 5 * u64::from(n));
            mixed.last().map_or(0, |(n_prompt, _)| *n_prompt)
        };
        let (short, long) = (settled(5_000), settled(15_000));
        assert!(long > 2 * short, "{short} tokens, then {long}");
    }

    #[test]
    fn small_steps_say_nothing_and_odd_measurements_leave_a_budget() {
        let mut pacer = PrefillPacer::new(8192);
        let first = pacer.budget();
        let size = |n_decodes, n_prompt| StepSize {
            n_decodes,
            n_prompt,
        };
        pacer.observe(size(1, 0), Duration::from_millis(5));
        pacer.observe(size(1, 8), Duration::from_millis(6));
        assert_eq!(
            pacer.budget(),
            first,
            "a short prompt is no sign of more room"
        );
        for took in [0, 1, 1_000_000_000] {
            let took = Duration::from_nanos(took);
            for (n_decodes, n_prompt) in [(0, 0), (1, 0), (1, 1), (0, 8), (1, 8192)] {
                pacer.observe(size(n_decodes, n_prompt), took);
            }
            assert!((1024..=8192).contains(&pacer.budget()));
        }
        assert_eq!(PrefillPacer::new(4).budget(), 1);
    }
}
