//! How many prompt tokens may join a step in which sequences decode, so that no stream stalls while long prompts arrive.
//!
//! Pure: it is told how long steps took and knows no clock. A step with prompts may take [`DECODE_STRETCH`] times as long as
//! one that only decodes, or what the server was told. What prompt tokens add to a step is measured, as a cost of each token and one of each (query, key)
//! pair, for a chunk deep in its prompt attends to more: so chunks grow smaller as a prompt is computed, and the time of a
//! step stays level. Every [`CADENCE`]th step with decodes has no prompt tokens, and one when their number has changed by
//! [`REGROUPED`], so that their own time stays known while prompts never end.

use std::time::Duration;

/// A step with prompt tokens may take this many times as long as one that only decodes, unless the server is told otherwise.
pub const DECODE_STRETCH: f64 = 2.9;
/// One in so many steps only decodes.
const CADENCE: u32 = 32;
/// The time of decodes is measured anew when there are so many times more, or fewer, than when it was.
const REGROUPED: f64 = 1.25;
/// Large steps are cut to whole tiles of rows; from so many tiles on that costs little of the budget.
const WHOLE_TILES: u32 = 3;
/// The share of a new measurement in the running mean of a decode's time.
const NEWEST: f64 = 0.25;
/// What is left of a measured cost's weight after the next: some twenty steps count.
const REMEMBERED: f64 = 0.95;
/// A step has at most so many times the prompt tokens of the largest of late, or a tile more: costs are known about there
/// only.
const GROWTH: f64 = 1.5;
/// The prompt tokens that a step may always have, as a share of the largest step; the first budget is the same.
const LEAST_SHARE: f64 = 1.0 / 32.0;
/// Pairs are counted in so many, which brings them into the order of tokens.
const PAIRS: f64 = 4096.0;

/// What a step was made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StepSize {
    /// Tokens of sequences that decode.
    pub n_decodes: u32,
    /// Tokens of prompts.
    pub n_prompt: u32,
    /// Pairs of a prompt's token and one that it attends to.
    pub n_pairs: u64,
}

/// What the next step is about to be made of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NextStep {
    /// Sequences that decode.
    pub n_decodes: u32,
    /// Where the prompt goes on that is to have most of the prompt tokens; 0 for one that waits.
    pub position: u32,
}

/// What prompt tokens add to the time of a step, in seconds: fitted to the steps of late by least squares.
#[derive(Clone, Debug, Default)]
struct PromptCost {
    /// Weighted sums of products: tokens * tokens, tokens * pairs, pairs * pairs.
    squares: [f64; 3],
    /// Tokens * time, pairs * time.
    products: [f64; 2],
}

impl PromptCost {
    fn observe(&mut self, n_tokens: f64, n_pairs: f64, added_s: f64) {
        let pairs = n_pairs / PAIRS;
        let squares = [n_tokens * n_tokens, n_tokens * pairs, pairs * pairs];
        let products = [n_tokens * added_s, pairs * added_s];
        let keep = |sum: &mut f64, x: f64| *sum = *sum * REMEMBERED + x;
        self.squares
            .iter_mut()
            .zip(squares)
            .for_each(|(sum, x)| keep(sum, x));
        self.products
            .iter_mut()
            .zip(products)
            .for_each(|(sum, x)| keep(sum, x));
    }

    /// Of a token, and of [`PAIRS`] pairs; neither is below zero.
    fn fitted(&self) -> (f64, f64) {
        let [tt, tp, pp] = self.squares;
        let [t, p] = self.products;
        // Steps of one position say nothing of which of the two costs: then the tokens do.
        let determinant = tt * pp - tp * tp;
        if determinant > 1e-6 * tt * pp {
            let (token, pair) = (
                (t * pp - p * tp) / determinant,
                (p * tt - t * tp) / determinant,
            );
            match (token >= 0.0, pair >= 0.0) {
                (true, true) => return (token, pair),
                (false, _) => return (0.0, p / pp),
                (true, false) => {}
            }
        }
        (if tt > 0.0 { t / tt } else { 0.0 }, 0.0)
    }

    /// Tokens of a prompt from `position` on that add `room_s`; 0 where neither is known.
    fn tokens_in(&self, room_s: f64, position: u32) -> f64 {
        let (token, pair) = self.fitted();
        // n * token + n * (position + n / 2) * pair = room
        let (square, linear) = (
            pair / PAIRS / 2.0,
            token + pair * f64::from(position) / PAIRS,
        );
        let tokens = 2.0 * room_s / (linear + (linear * linear + 4.0 * square * room_s).sqrt());
        tokens.max(0.0)
    }
}

/// The measured costs, and the budget that follows from them.
#[derive(Clone, Debug)]
pub struct PrefillPacer {
    max_tokens: u32,
    row_tile: u32,
    max_stretch: Option<f64>,
    /// Of a step that only decodes, and the sequences of the last one.
    decode_s: Option<f64>,
    n_decodes: u32,
    cost: PromptCost,
    /// Prompt tokens of the largest steps of late.
    largest: f64,
    n_mixed: u32,
}

impl PrefillPacer {
    /// For steps of at most `max_tokens` tokens on a device that computes large ones `row_tile` rows at a time. Without
    /// a `max_stretch` prompts get all the tokens of a step.
    pub fn new(max_tokens: u32, row_tile: u32, max_stretch: Option<f64>) -> Self {
        Self {
            max_tokens,
            row_tile,
            max_stretch,
            decode_s: None,
            n_decodes: 0,
            cost: PromptCost::default(),
            largest: 0.0,
            n_mixed: 0,
        }
    }

    /// Prompt tokens that the next step may have beside decodes.
    pub fn budget(&self, next: NextStep) -> u32 {
        let Some(max_stretch) = self.max_stretch else {
            return self.max_tokens;
        };
        let is_due = self.n_mixed >= CADENCE - 1;
        if is_due || (self.n_mixed > 0 && !self.is_like_measured(next.n_decodes)) {
            return 0;
        }
        let least = ((f64::from(self.max_tokens) * LEAST_SHARE) as u32).max(1);
        let room_s = self.decode_s.unwrap_or(0.0) * (max_stretch - 1.0);
        let fits = self.cost.tokens_in(room_s, next.position);
        let grown = (GROWTH * self.largest).max(self.largest + f64::from(self.row_tile));
        let n = fits.min(grown) as u32;
        let n = n.clamp(least, self.max_tokens);
        // A part of a tile of rows costs as much as all of it.
        let rows = next.n_decodes + n;
        match rows / self.row_tile {
            tiles if tiles >= WHOLE_TILES => n - (rows - tiles * self.row_tile).min(n - 1),
            _ => n,
        }
    }

    /// About as many sequences decode as when the time of that was measured last.
    fn is_like_measured(&self, n_decodes: u32) -> bool {
        let (now, then) = (f64::from(n_decodes), f64::from(self.n_decodes));
        now <= then * REGROUPED && then <= now * REGROUPED
    }

    /// A step of this size took so long, from the end of the step before it.
    pub fn observe(&mut self, size: StepSize, took: Duration) {
        let took_s = took.as_secs_f64();
        match size {
            StepSize { n_decodes: 0, .. } => self.n_mixed = 0,
            StepSize { n_prompt: 0, .. } => {
                self.n_mixed = 0;
                let known = self
                    .decode_s
                    .filter(|_| self.is_like_measured(size.n_decodes));
                let mean = known.unwrap_or(took_s);
                self.decode_s = Some(mean + (took_s - mean) * NEWEST);
                self.n_decodes = size.n_decodes;
            }
            StepSize {
                n_prompt, n_pairs, ..
            } => {
                self.n_mixed += 1;
                if let Some(decode_s) = self.decode_s {
                    let added_s = (took_s - decode_s).max(0.0);
                    let n_prompt = f64::from(n_prompt);
                    self.cost.observe(n_prompt, n_pairs as f64, added_s);
                    self.largest = n_prompt.max(self.largest * REMEMBERED);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const N_DECODES: u32 = 16;
    const PROMPT: u32 = 8000;

    /// Runs steps on a device whose steps take what `cost_us` says of their prompt tokens and where these begin, while
    /// prompts of 8,000 tokens never end; the prompt tokens and times of those after the first hundred that had some.
    fn run(pacer: &mut PrefillPacer, cost_us: impl Fn(u32, u32) -> u64) -> Vec<(u32, u64)> {
        let (mut mixed, mut position) = (Vec::new(), 0);
        for step in 0..600 {
            let next = NextStep {
                n_decodes: N_DECODES,
                position,
            };
            let n_prompt = pacer.budget(next).min(PROMPT - position);
            let size = StepSize {
                n_decodes: N_DECODES,
                n_prompt,
                n_pairs: u64::from(n_prompt) * u64::from(position + n_prompt / 2),
            };
            let took_us = cost_us(n_prompt, position);
            pacer.observe(size, Duration::from_micros(took_us));
            position = (position + n_prompt) % PROMPT;
            // The end of a prompt has no more tokens to use the room for.
            if step > 100 && n_prompt > 0 && position > 0 {
                mixed.push((n_prompt, took_us));
            }
        }
        mixed
    }

    #[test]
    fn the_time_that_a_step_may_take_is_used_and_not_exceeded() {
        let pairs = |n: u32, position: u32| u64::from(n) * u64::from(position + n / 2);
        // What a chunk costs: in proportion; more where its prompt is long, as attention does; almost the same whatever
        // its size.
        let proportional = |n: u32, _| 5_000 + 5 * u64::from(n) / 2;
        let deep = |n: u32, at: u32| 5_000 + 12 * u64::from(n) + pairs(n, at) / 500;
        let flat = |n: u32, _| 5_000 + if n > 0 { 7_000 + u64::from(n) / 2 } else { 0 };
        for (why, cost) in [
            ("in proportion", &proportional as &dyn Fn(u32, u32) -> u64),
            ("deep in a prompt", &deep),
            ("almost flat", &flat),
        ] {
            for row_tile in [1, 128] {
                let mixed = run(
                    &mut PrefillPacer::new(8192, row_tile, Some(DECODE_STRETCH)),
                    cost,
                );
                let (n, sum_us) = (
                    mixed.len() as u64,
                    mixed.iter().map(|step| step.1).sum::<u64>(),
                );
                let most_us = mixed.iter().map(|step| step.1).max().unwrap_or(0);
                assert!(
                    most_us <= 15_200,
                    "{why}, tiles of {row_tile}: {most_us} us"
                );
                let least_us = if why == "almost flat" { 10_000 } else { 12_500 };
                assert!(
                    sum_us / n >= least_us,
                    "{why}, tiles of {row_tile}: {} us",
                    sum_us / n
                );
                for (n_prompt, _) in mixed {
                    let rows = n_prompt + N_DECODES;
                    let is_small = rows < WHOLE_TILES * row_tile;
                    let is_whole = rows.is_multiple_of(row_tile);
                    assert!(is_small || is_whole, "{why}: {n_prompt} tokens");
                }
            }
        }
    }

    #[test]
    fn decodes_are_measured_again_when_many_more_run() {
        let mut pacer = PrefillPacer::new(8192, 1, Some(DECODE_STRETCH));
        run(&mut pacer, |n, _| 5_000 + 5 * u64::from(n));
        let next = |n_decodes| NextStep {
            n_decodes,
            position: 0,
        };
        let mixed = StepSize {
            n_decodes: N_DECODES,
            n_prompt: 100,
            n_pairs: 5_000,
        };
        pacer.observe(mixed, Duration::from_micros(5_500));
        assert!(pacer.budget(next(N_DECODES + 2)) > 0, "about as many");
        assert_eq!(pacer.budget(next(4 * N_DECODES)), 0);
        let alone = StepSize {
            n_decodes: 4 * N_DECODES,
            n_prompt: 0,
            n_pairs: 0,
        };
        let before = pacer.budget(next(N_DECODES));
        pacer.observe(alone, Duration::from_micros(15_000));
        assert!(
            pacer.budget(next(4 * N_DECODES)) > before,
            "and they may take longer"
        );
    }

    #[test]
    fn the_budget_follows_what_decodes_cost() {
        let mut pacer = PrefillPacer::new(8192, 1, Some(DECODE_STRETCH));
        let mut settled = |decode_us: u64| {
            let mixed = run(&mut pacer, |n, _| decode_us + 5 * u64::from(n));
            mixed.last().map_or(0, |(n_prompt, _)| *n_prompt)
        };
        let (short, long) = (settled(5_000), settled(15_000));
        assert!(long > 2 * short, "{short} tokens, then {long}");
    }

    #[test]
    fn the_bound_is_the_one_given() {
        let cost = |n: u32, _| 5_000 + 5 * u64::from(n);
        let most_us = |max_stretch| {
            let mixed = run(&mut PrefillPacer::new(8192, 1, max_stretch), cost);
            mixed.iter().map(|step| step.1).max().unwrap_or(0)
        };
        assert!((9_000..=10_500).contains(&most_us(Some(2.0))));
        assert!((27_000..=31_500).contains(&most_us(Some(6.0))));
        let unbounded = PrefillPacer::new(8192, 1, None);
        let next = NextStep {
            n_decodes: N_DECODES,
            position: 0,
        };
        assert_eq!(unbounded.budget(next), 8192);
    }

    #[test]
    fn odd_measurements_leave_a_budget() {
        let mut pacer = PrefillPacer::new(8192, 128, Some(DECODE_STRETCH));
        let next = |n_decodes, position| NextStep {
            n_decodes,
            position,
        };
        assert_eq!(pacer.budget(next(1, 0)), 256, "nothing is known");
        for took in [0, 1, 1_000_000_000] {
            let took = Duration::from_micros(took);
            for (n_decodes, n_prompt) in [(0, 0), (1, 0), (1, 1), (0, 8), (1, 8192)] {
                let n_pairs = u64::from(n_prompt) * 4;
                let size = StepSize {
                    n_decodes,
                    n_prompt,
                    n_pairs,
                };
                pacer.observe(size, took);
                for position in [0, 1, u32::MAX] {
                    let n = pacer.budget(next(n_decodes, position));
                    assert!(n <= 8192 && (n > 0 || n_decodes > 0), "{n} tokens");
                }
            }
        }
        assert_eq!(
            PrefillPacer::new(4, 128, Some(DECODE_STRETCH)).budget(next(1, 9)),
            1
        );
    }
}
