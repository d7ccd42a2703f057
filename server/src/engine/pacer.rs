//! How many prompt tokens may join a step in which sequences decode, so that no stream stalls while long prompts arrive.
//!
//! Pure: it is told how long steps took and knows no clock. A step's time is taken as `decode + prompt tokens * cost`; both
//! are running means of what was measured. Every [`CADENCE`]th step with decodes has no prompt tokens, so that the first
//! stays known while prompts never end.

use std::time::Duration;

/// A step with prompt tokens may take this many times as long as one that only decodes.
const MOST_STRETCH: f64 = 2.5;
/// One in so many steps only decodes.
const CADENCE: u32 = 8;
/// The share of a new measurement in a running mean.
const NEWEST: f64 = 0.25;
/// Prompt tokens that a step may always have: below this, a step's time is the weights' to read.
const LEAST_TOKENS: u32 = 16;

/// What a step was made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StepSize {
    /// Tokens of sequences that decode.
    pub n_decodes: u32,
    /// Tokens of prompts.
    pub n_prompt: u32,
}

/// The measured costs, and what follows from them.
#[derive(Clone, Debug, Default)]
pub struct PrefillPacer {
    decode_s: Option<f64>,
    prompt_token_s: Option<f64>,
    n_mixed: u32,
}

impl PrefillPacer {
    /// Prompt tokens that the next step may have beside decodes, of at most `max_tokens`.
    pub fn budget(&self, max_tokens: u32) -> u32 {
        if self.n_mixed >= CADENCE - 1 {
            return 0;
        }
        let (Some(decode_s), Some(token_s)) = (self.decode_s, self.prompt_token_s) else {
            return LEAST_TOKENS.max(max_tokens / 16).min(max_tokens);
        };
        let tokens = (MOST_STRETCH - 1.0) * decode_s / token_s.max(1e-9);
        (tokens.min(f64::from(u32::MAX)) as u32).clamp(LEAST_TOKENS.min(max_tokens), max_tokens)
    }

    /// A step of this size took so long, from the end of the step before it.
    pub fn observe(&mut self, size: StepSize, took: Duration) {
        let took_s = took.as_secs_f64();
        match size {
            StepSize {
                n_decodes: 0,
                n_prompt: 0,
            } => {}
            StepSize { n_prompt: 0, .. } => {
                self.n_mixed = 0;
                average(&mut self.decode_s, took_s);
            }
            StepSize {
                n_decodes,
                n_prompt,
            } => {
                self.n_mixed = if n_decodes > 0 { self.n_mixed + 1 } else { 0 };
                // Time beyond what the decodes take; a step of prompts alone has none.
                let decode_s = self.decode_s.filter(|_| n_decodes > 0).unwrap_or(0.0);
                let token_s = (took_s - decode_s).max(0.0) / f64::from(n_prompt);
                average(&mut self.prompt_token_s, token_s);
            }
        }
    }
}

fn average(mean: &mut Option<f64>, newest: f64) {
    *mean = Some(match *mean {
        None => newest,
        Some(mean) => mean + (newest - mean) * NEWEST,
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A device whose decodes take 5 ms and whose prompt tokens 25 us each, and prompts without end.
    #[test]
    fn a_step_with_prompts_is_stretched_no_more_than_said() {
        let mut pacer = PrefillPacer::default();
        let mut mixed = Vec::new();
        for step in 0..200 {
            let n_prompt = pacer.budget(8192);
            let took = Duration::from_micros(5_000 + 25 * u64::from(n_prompt));
            let size = StepSize {
                n_decodes: 16,
                n_prompt,
            };
            pacer.observe(size, took);
            if step > 20 && n_prompt > 0 {
                mixed.push((n_prompt, took));
            }
        }
        assert!(
            mixed.len() > 150,
            "prompts run in most steps: {}",
            mixed.len()
        );
        for (n_prompt, took) in mixed {
            assert!(
                took <= Duration::from_micros(12_600),
                "{n_prompt} tokens: {took:?}"
            );
            assert!(n_prompt >= 290, "the time is used: {n_prompt} tokens");
        }
    }

    #[test]
    fn the_budget_follows_what_decodes_cost() {
        let mut pacer = PrefillPacer::default();
        let mut settled = |decode_us: u64| {
            for _ in 0..100 {
                let n_prompt = pacer.budget(8192);
                let took = Duration::from_micros(decode_us + 25 * u64::from(n_prompt));
                let n_decodes = 64;
                pacer.observe(
                    StepSize {
                        n_decodes,
                        n_prompt,
                    },
                    took,
                );
            }
            (0..8).map(|_| pacer.budget(8192)).max().unwrap_or(0)
        };
        let (short, long) = (settled(5_000), settled(15_000));
        assert!(long > 2 * short, "{short} tokens, then {long}");
    }

    #[test]
    fn odd_measurements_leave_a_budget() {
        let mut pacer = PrefillPacer::default();
        for took in [0, 1, 1_000_000_000] {
            let took = Duration::from_nanos(took);
            for (n_decodes, n_prompt) in [(0, 0), (1, 0), (1, 1), (0, 8)] {
                pacer.observe(
                    StepSize {
                        n_decodes,
                        n_prompt,
                    },
                    took,
                );
            }
            assert!((16..=8192).contains(&pacer.budget(8192)));
            assert_eq!(pacer.budget(4), 4);
        }
    }
}
