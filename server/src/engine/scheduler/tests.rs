//! The scheduler against a device that checks everything: tiny pools, random arrivals, lengths and aborts.
//!
//! The device "computes" a token from all tokens before it, which it reads through the block tables. A stale row, a
//! slot that is not written or written by another, a token at a wrong position: each gives another answer than the
//! oracle, which sees one request alone.

use std::collections::{BTreeMap, VecDeque};
use std::num::NonZeroU32;

use kvasir_kernels::device::{BlockId, LogitsWant, Sampled, StepInput, TokenInput};
use proptest::prelude::*;

use super::*;
use crate::engine::SamplingParams;

const VOCABULARY: u32 = 11;
const STOP: u32 = 7;

/// The token after `tokens`, as output `index` of a request with this seed.
fn next_token(tokens: &[u32], seed: u64, index: u32) -> u32 {
    let hash = tokens
        .iter()
        .fold(seed ^ u64::from(index) << 32, |hash, &token| {
            (hash ^ u64::from(token))
                .wrapping_mul(0x9E37_79B9_7F4A_7C15)
                .rotate_left(23)
        });
    (hash >> 17) as u32 % VOCABULARY
}

/// What a request must give: its outputs and how it ends.
fn oracle(request: &Request, max_model_len: u32) -> (Vec<u32>, FinishReason) {
    let mut tokens = request.prompt.clone();
    let n_outputs = request.max_tokens.min(max_model_len - tokens.len() as u32);
    for index in 0..n_outputs {
        let token = next_token(&tokens, request.sampling.seed, index);
        tokens.push(token);
        if request.stop_token_ids.contains(&token) {
            return (
                tokens.split_off(request.prompt.len()),
                FinishReason::Stop(token),
            );
        }
    }
    (tokens.split_off(request.prompt.len()), FinishReason::Length)
}

/// A device that runs its steps in order, at once, and hands out their results when asked.
struct CheckingDevice {
    block_size: usize,
    limits: Limits,
    /// What each slot holds: position and token.
    slots: Vec<Option<(u32, u32)>>,
    tables: Vec<Vec<BlockId>>,
    /// Tokens in the cache by row of the table.
    lengths: Vec<u32>,
    previous: Vec<u32>,
    results: VecDeque<StepOutput>,
}

impl CheckingDevice {
    fn slot(&self, row: TableRow, position: u32) -> usize {
        let block = self.tables[row.0 as usize][position as usize / self.block_size];
        block.0 as usize * self.block_size + position as usize % self.block_size
    }

    fn submit(&mut self, input: &StepInput) {
        assert!(!input.tokens.is_empty() && input.tokens.len() <= self.limits.max_tokens);
        assert!(input.spans.len() <= self.limits.max_sequences);
        assert!(input.logits.len() <= self.limits.max_logits_rows);
        for update in &input.table_updates {
            let table = &mut self.tables[update.row.0 as usize];
            if update.first == 0 {
                table.clear();
                self.lengths[update.row.0 as usize] = 0;
            }
            assert_eq!(
                table.len(),
                update.first as usize,
                "a table grows without gaps"
            );
            table.extend(&update.blocks);
            assert!(table.len() <= self.limits.max_blocks_per_sequence);
        }
        let mut next = 0;
        let mut place = Vec::new();
        for span in &input.spans {
            assert_eq!(span.first_token, next, "spans cut the tokens without gaps");
            next += span.n_tokens;
            let length = &mut self.lengths[span.row.0 as usize];
            assert_eq!(
                span.first_position, *length,
                "each position is written once, in order"
            );
            *length += span.n_tokens;
            for i in 0..span.n_tokens {
                let token = match input.tokens[(span.first_token + i) as usize] {
                    TokenInput::Id(token) => token,
                    TokenInput::Sampled { logits_row } => self.previous[logits_row as usize],
                };
                let position = span.first_position + i;
                let slot = self.slot(span.row, position);
                self.slots[slot] = Some((position, token));
                place.push((span.row, position));
            }
        }
        assert_eq!(next as usize, input.tokens.len());
        assert!(input.logits.is_sorted_by_key(|row| row.token));
        let sampled: Vec<Sampled> = input
            .logits
            .iter()
            .map(|logits| {
                let (row, last) = place[logits.token as usize];
                let context: Vec<u32> = (0..=last)
                    .map(|position| {
                        let (written, token) =
                            self.slots[self.slot(row, position)].expect("read after written");
                        assert_eq!(written, position, "the slot holds another position's token");
                        token
                    })
                    .collect();
                let token = match logits.want {
                    LogitsWant::Sample(sampling) => {
                        next_token(&context, sampling.seed, sampling.output_index)
                    }
                    LogitsWant::Score { token } => token,
                };
                Sampled {
                    token,
                    ..Sampled::default()
                }
            })
            .collect();
        self.previous = sampled.iter().map(|sampled| sampled.token).collect();
        self.results.push_back(StepOutput { sampled });
    }
}

#[derive(Clone, Debug)]
struct Arrival {
    step: u32,
    n_prompt: u32,
    max_tokens: u32,
    stops: bool,
    scored: bool,
    /// Steps after its arrival at which the client leaves.
    leaves_after: Option<u32>,
}

#[derive(Clone, Debug)]
struct Setting {
    depth: usize,
    block_size: u32,
    n_blocks: u32,
    limits: Limits,
    arrivals: Vec<Arrival>,
}

fn settings() -> impl Strategy<Value = Setting> {
    let arrival = (
        0..30u32,
        1..20u32,
        0..16u32,
        any::<bool>(),
        any::<bool>(),
        prop::option::weighted(0.2, 0..20u32),
    )
        .prop_map(
            |(step, n_prompt, max_tokens, stops, scored, leaves_after)| Arrival {
                step,
                n_prompt,
                max_tokens,
                stops,
                scored,
                leaves_after,
            },
        );
    let sizes = (
        1..=2usize,
        1..5u32,
        0..30u32,
        1..6usize,
        0..12usize,
        0..6usize,
    );
    (sizes, prop::collection::vec(arrival, 1..16)).prop_map(|(sizes, arrivals)| {
        let (depth, block_size, spare_blocks, max_sequences, more_tokens, more_rows) = sizes;
        let longest = arrivals
            .iter()
            .map(|a| a.n_prompt + a.max_tokens)
            .max()
            .unwrap();
        let needed = longest.div_ceil(block_size);
        Setting {
            depth,
            block_size,
            n_blocks: needed + spare_blocks,
            limits: Limits {
                max_tokens: max_sequences + more_tokens,
                max_sequences,
                max_logits_rows: max_sequences + more_rows,
                max_blocks_per_sequence: needed as usize,
            },
            arrivals,
        }
    })
}

fn request(i: usize, arrival: &Arrival) -> Request {
    Request {
        id: RequestId(i as u64),
        prompt: (0..arrival.n_prompt)
            .map(|p| (i as u32 * 5 + p * 3) % VOCABULARY)
            .collect(),
        max_tokens: arrival.max_tokens,
        stop_token_ids: if arrival.stops {
            vec![STOP]
        } else {
            Vec::new()
        },
        sampling: SamplingParams {
            temperature: 1.0,
            top_p: 1.0,
            top_k: None,
            seed: i as u64,
        },
        logprobs: None,
        prompt_logprobs: arrival.scored.then_some(0),
    }
}

#[derive(Default)]
struct Received {
    scores: Vec<u32>,
    tokens: Vec<u32>,
    finished: Option<FinishReason>,
}

/// Runs a setting to its end and returns the number of preemptions.
fn run(setting: &Setting) -> usize {
    let Setting {
        depth,
        block_size,
        n_blocks,
        limits,
        arrivals,
    } = setting;
    let max_model_len = (limits.max_blocks_per_sequence as u32) * block_size;
    let mut blocks = BlockPool::new(*n_blocks, NonZeroU32::new(*block_size).unwrap());
    let mut scheduler = Scheduler::new(*limits, max_model_len);
    let mut device = CheckingDevice {
        block_size: *block_size as usize,
        limits: *limits,
        slots: vec![None; (n_blocks * block_size) as usize],
        tables: vec![Vec::new(); limits.max_sequences],
        lengths: vec![0; limits.max_sequences],
        previous: Vec::new(),
        results: VecDeque::new(),
    };
    let mut received: BTreeMap<RequestId, Received> = BTreeMap::new();
    let mut left: Vec<RequestId> = Vec::new();
    let (mut n_arrived, mut n_preempted) = (0, 0);
    for step in 0.. {
        assert!(step < 20_000, "someone starves");
        for (i, arrival) in arrivals.iter().enumerate() {
            if arrival.step == step {
                scheduler.add(request(i, arrival));
                n_arrived += 1;
            }
            if arrival
                .leaves_after
                .is_some_and(|after| arrival.step + after == step)
            {
                let active = blocks.counts().active;
                scheduler.abort(&mut blocks, RequestId(i as u64));
                assert!(blocks.counts().active <= active);
                left.push(RequestId(i as u64));
            }
        }
        let batch = scheduler.schedule(&mut blocks);
        if let Some(input) = &batch {
            device.submit(input);
        }
        n_preempted += scheduler.take_changes().preempted.len();
        if batch.is_none() || device.results.len() == *depth {
            if let Some(output) = device.results.pop_front() {
                for output in scheduler.commit(&mut blocks, output) {
                    assert!(!left.contains(&output.id), "no output after an abort");
                    let received = received.entry(output.id).or_default();
                    assert_eq!(received.finished, None, "no output after the last");
                    received
                        .scores
                        .extend(output.prompt_logprobs.iter().map(|s| s.token));
                    received
                        .tokens
                        .extend(output.tokens.iter().map(|s| s.token));
                    received.finished = output.finished;
                }
            } else if n_arrived < arrivals.len() {
                continue;
            } else {
                assert!(
                    scheduler.is_idle(),
                    "nothing runs and nothing is under way, but requests are left"
                );
                break;
            }
        }
        let held: usize = scheduler
            .order
            .iter()
            .map(|&row| scheduler.running(row).table.blocks().len())
            .sum();
        assert_eq!(
            blocks.counts().active as usize,
            held,
            "every active block is in a table"
        );
        let ids: Vec<_> = scheduler
            .order
            .iter()
            .map(|&row| scheduler.running(row).sequence.id)
            .collect();
        assert_eq!(scheduler.free_rows.len() + ids.len(), limits.max_sequences);
    }
    assert_eq!(blocks.counts().active, 0, "all blocks come back");
    for (i, arrival) in arrivals.iter().enumerate() {
        let request = request(i, arrival);
        let (tokens, reason) = oracle(&request, max_model_len);
        let received = received.remove(&request.id).unwrap_or_default();
        if left.contains(&request.id) && received.finished.is_none() {
            assert!(
                tokens.starts_with(&received.tokens),
                "what came before the abort was right"
            );
            continue;
        }
        assert_eq!(
            (received.tokens, received.finished),
            (tokens, Some(reason)),
            "request {i}"
        );
        let scores = if arrival.scored {
            &request.prompt[1..]
        } else {
            &[]
        };
        assert_eq!(received.scores, scores, "scores of request {i}");
    }
    n_preempted
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 600, ..ProptestConfig::default() })]
    #[test]
    fn a_request_gives_in_any_crowd_what_it_gives_alone(setting in settings()) {
        run(&setting);
    }
}

#[test]
fn the_newest_is_preempted_and_its_outputs_are_kept() {
    let arrival = Arrival {
        step: 0,
        n_prompt: 5,
        max_tokens: 14,
        stops: false,
        scored: true,
        leaves_after: None,
    };
    for depth in [1, 2] {
        let setting = Setting {
            depth,
            block_size: 2,
            n_blocks: 14,
            limits: Limits {
                max_tokens: 6,
                max_sequences: 3,
                max_logits_rows: 4,
                max_blocks_per_sequence: 10,
            },
            arrivals: vec![arrival.clone(); 4],
        };
        assert!(run(&setting) > 0, "the pool is too small for all at once");
    }
}

#[test]
fn decodes_run_in_every_step_while_a_long_prompt_is_cut_into_chunks() {
    let limits = Limits {
        max_tokens: 8,
        max_sequences: 4,
        max_logits_rows: 4,
        max_blocks_per_sequence: 64,
    };
    let mut blocks = BlockPool::new(64, NonZeroU32::new(4).unwrap());
    let mut scheduler = Scheduler::new(limits, 256);
    let arrival = |n_prompt| Arrival {
        step: 0,
        n_prompt,
        max_tokens: 9,
        stops: false,
        scored: false,
        leaves_after: None,
    };
    scheduler.add(request(0, &arrival(3)));
    scheduler.add(request(1, &arrival(40)));
    let mut sizes = Vec::new();
    for _ in 0..4 {
        let input = scheduler.schedule(&mut blocks).unwrap();
        sizes.push(
            input
                .spans
                .iter()
                .map(|span| span.n_tokens)
                .collect::<Vec<_>>(),
        );
        let sampled = input
            .logits
            .iter()
            .map(|_| Sampled {
                token: 1,
                ..Sampled::default()
            })
            .collect();
        scheduler.commit(&mut blocks, StepOutput { sampled });
    }
    assert_eq!(
        sizes,
        [[3, 5], [1, 7], [1, 7], [1, 7]],
        "the budget is always spent, and the decode never waits"
    );
    let load = scheduler.load(&blocks);
    assert_eq!(
        (load.n_running, load.prefill_backlog_tokens),
        (2, 40 - 5 - 7 * 3)
    );
}
