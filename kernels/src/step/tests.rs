//! Every index that a step brings is checked before a device sees it, and the tables hold what they were told.

use super::*;
use crate::shape::{CacheGroup, CacheId, Limits};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

const N_BLOCKS: u32 = 10;

/// Two cache groups, the second with a window of 3; blocks of 4 tokens, 3 of them a sequence, positions below 11.
fn shape() -> ModelShape {
    let cache = |window| CacheShape {
        n_kv_heads: 1,
        head_dim: 2,
        window: NonZeroU32::new(window),
    };
    let group = |window, cache| CacheGroup {
        window: NonZeroU32::new(window),
        caches: vec![CacheId(cache)],
    };
    ModelShape {
        vocab_size: 7,
        max_positions: 11,
        block_size: 4,
        limits: Limits {
            max_tokens: 8,
            max_sequences: 2,
            max_logits_rows: 3,
            max_blocks_per_sequence: 3,
        },
        ropes: Vec::new(),
        caches: vec![cache(0), cache(3)],
        layers: Vec::new(),
        groups: vec![group(0, 0), group(3, 1)],
    }
}

fn step() -> Step {
    let mut step = Step::new(&shape());
    step.set_n_blocks(N_BLOCKS);
    step
}

fn update(group: u32, row: u32, first: u32, blocks: &[u32]) -> TableUpdate {
    TableUpdate {
        group,
        row: TableRow(row),
        first,
        blocks: blocks.iter().copied().map(BlockId).collect(),
    }
}

fn span(row: u32, first_token: u32, n_tokens: u32, first_position: u32) -> Span {
    Span {
        row: TableRow(row),
        first_token,
        n_tokens,
        first_position,
    }
}

fn ids(ids: &[u32]) -> Vec<TokenInput> {
    ids.iter().copied().map(TokenInput::Id).collect()
}

/// Three tokens of row 0 from position 2 on, an inert span, and one of row 1; logits of the last of each.
fn good() -> StepInput {
    StepInput {
        copies: vec![(BlockId(9), BlockId(8))],
        table_updates: vec![
            update(0, 0, 0, &[4, 5]),
            update(1, 0, 0, &[6, 7]),
            update(1, 1, 1, &[3, 2]),
        ],
        tokens: ids(&[6, 0, 1, 2]),
        spans: vec![span(0, 0, 3, 2), span(1, 3, 0, 0), span(1, 3, 1, 10)],
        logits: vec![2, 3, 3],
        ..StepInput::default()
    }
}

#[test]
fn a_step_is_taken_over() {
    let mut step = step();
    step.begin(&good());
    assert_eq!(step.tokens, [6, 0, 1, 2]);
    assert_eq!(step.positions, [2, 3, 4, 10]);
    assert_eq!(step.rows, [0, 0, 0, 1].map(TableRow));
    assert_eq!(step.spans.len(), 2, "an inert span is left out");
    assert_eq!(step.logits, [2, 3, 3]);
    for (why, group, row, position, want) in [
        ("the first block", 0, 0, 2, (4, 2)),
        ("the second block", 0, 0, 4, (5, 0)),
        ("another group", 1, 0, 4, (7, 0)),
        ("an update in the middle", 1, 1, 10, (2, 2)),
        ("never set", 0, 1, 10, (0, 2)),
    ] {
        assert_eq!(step.slot(group, TableRow(row), position), want, "{why}");
    }
    let caches = shape().caches;
    assert_eq!(step.visible(&caches[0], 2), 0..=4);
    assert_eq!(step.visible(&caches[1], 2), 2..=4);
}

#[test]
fn sampled_tokens_are_those_of_the_step_before() {
    let mut step = step();
    step.begin(&good());
    let sampled = [5, 1, 3].map(|token| Sampled {
        token,
        ..Sampled::default()
    });
    step.end(&DeviceOutput {
        sampled: sampled.to_vec(),
    });
    let row = |logits_row| TokenInput::Sampled { logits_row };
    let mut input = StepInput {
        tokens: vec![row(2), TokenInput::Id(4), row(0)],
        spans: vec![span(0, 0, 3, 5)],
        ..StepInput::default()
    };
    step.begin(&input);
    assert_eq!(step.tokens, [3, 4, 5]);
    input.tokens[0] = row(3);
    assert!(catch_unwind(AssertUnwindSafe(|| step.begin(&input))).is_err());
}

#[test]
fn every_index_is_checked() {
    type Spoil = fn(&mut StepInput);
    let cases: [(&str, Spoil); 18] = [
        ("a copy from outside", |i| i.copies[0].0.0 = N_BLOCKS),
        ("a copy to outside", |i| i.copies[0].1.0 = N_BLOCKS),
        ("a block outside", |i| {
            i.table_updates[0].blocks[1].0 = N_BLOCKS;
        }),
        ("a group that is not", |i| i.table_updates[0].group = 2),
        ("a row that is not", |i| i.table_updates[0].row.0 = 2),
        ("an entry past the table", |i| i.table_updates[0].first = 2),
        ("an update that begins past the table", |i| {
            i.table_updates[0] = update(0, 0, 4, &[]);
        }),
        ("a token outside the vocabulary", |i| {
            i.tokens[3] = TokenInput::Id(7);
        }),
        ("a sampled token of no row", |i| {
            i.tokens[3] = TokenInput::Sampled { logits_row: 0 };
        }),
        ("too many tokens", |i| {
            i.tokens = ids(&[0; 9]);
            i.spans = vec![span(0, 0, 9, 0)];
        }),
        ("a token of no span", |i| i.tokens.push(TokenInput::Id(0))),
        ("a span past the tokens", |i| i.spans[2].n_tokens = 2),
        ("a gap between spans", |i| i.spans[2].first_token = 4),
        ("a span of no row", |i| i.spans[2].row.0 = 2),
        ("a position past the last", |i| {
            i.spans[2].first_position = 11
        }),
        ("logits of no token", |i| i.logits[2] = 4),
        ("falling logits", |i| i.logits = vec![3, 2]),
        ("too many rows of logits", |i| i.logits = vec![3; 4]),
    ];
    for (why, spoil) in cases {
        let mut input = good();
        spoil(&mut input);
        let mut step = step();
        let taken = catch_unwind(AssertUnwindSafe(|| step.begin(&input)));
        assert!(taken.is_err(), "{why}");
    }
}

fn sample_request(temperature: f32, top_p: f32, min_p: f32, edit: LogitsEdit) -> LogitsRequest {
    LogitsRequest::Sample {
        params: SamplingParams {
            temperature,
            top_p,
            top_k: None,
            min_p,
            seed: 0,
        },
        output_index: 0,
        edit,
    }
}

fn is_taken(request: LogitsRequest, n: usize) -> bool {
    let mut step = step();
    step.begin(&good());
    let row = LogitsRow {
        request,
        n_logprobs: None,
    };
    let rows = vec![row; n];
    catch_unwind(AssertUnwindSafe(|| step.check_requests(&rows))).is_ok()
}

#[test]
fn requests_are_checked() {
    let sample = |temperature, top_p, min_p| {
        sample_request(temperature, top_p, min_p, LogitsEdit::default())
    };
    for (why, request, is_good) in [
        ("greedy", sample(0.0, 1.0, 0.0), true),
        ("a score", LogitsRequest::Score { token: 6 }, true),
        ("a score outside", LogitsRequest::Score { token: 7 }, false),
        ("below zero", sample(-0.1, 1.0, 0.0), false),
        ("without end", sample(f32::INFINITY, 1.0, 0.0), false),
        ("not a number", sample(f32::NAN, 1.0, 0.0), false),
        ("no mass", sample(1.0, 0.0, 0.0), false),
        ("more than all", sample(1.0, 1.1, 0.0), false),
        ("min-p 1", sample(1.0, 1.0, 1.0), true),
        ("min-p above 1", sample(1.0, 1.0, 1.1), false),
        ("min-p not a number", sample(1.0, 1.0, f32::NAN), false),
    ] {
        assert_eq!(is_taken(request.clone(), 3), is_good, "{why}");
        assert!(!is_taken(request, 2), "a row without a request");
    }
}

#[test]
fn edits_are_checked() {
    let allowed = |words: &[u32]| LogitsEdit {
        allowed: Some(words.into()),
        ..LogitsEdit::default()
    };
    let biased = |biases: &[(u32, f32)]| LogitsEdit {
        biases: biases
            .iter()
            .map(|&(token, bias)| TokenBias { token, bias })
            .collect(),
        ..LogitsEdit::default()
    };
    let penalized = |repetition, frequency, seen: &[u32]| LogitsEdit {
        penalties: Some(Penalties {
            repetition,
            frequency,
            presence: 0.0,
            seen: Arc::new(
                seen.iter()
                    .map(|&token| SeenToken {
                        token,
                        n_outputs: 1,
                    })
                    .collect(),
            ),
        }),
        ..LogitsEdit::default()
    };
    // The vocabulary has 7 tokens.
    for (why, edit, is_good) in [
        ("one allowed", allowed(&[1 << 6]), true),
        ("none allowed", allowed(&[0]), false),
        ("none of the vocabulary allowed", allowed(&[1 << 7]), false),
        ("bits past the vocabulary", allowed(&[1 << 7 | 1]), true),
        ("a mask of a larger vocabulary", allowed(&[1, 0]), false),
        ("a mask of none", allowed(&[]), false),
        (
            "biases and a ban",
            biased(&[(0, 2.0), (6, f32::NEG_INFINITY)]),
            true,
        ),
        ("a bias outside", biased(&[(7, 1.0)]), false),
        ("a bias twice", biased(&[(3, 1.0), (3, 1.0)]), false),
        ("falling biases", biased(&[(3, 1.0), (2, 1.0)]), false),
        ("a bias that is no number", biased(&[(3, f32::NAN)]), false),
        ("penalties", penalized(1.2, -2.0, &[6, 0]), true),
        ("penalties of nothing", penalized(1.2, 0.0, &[]), true),
        (
            "a seen token outside",
            penalized(1.2, 0.0, &[0, 7, 1]),
            false,
        ),
        ("more than all seen", penalized(1.2, 0.0, &[0; 8]), false),
        ("repetition 0", penalized(0.0, 0.0, &[1]), false),
        (
            "repetition without end",
            penalized(f32::INFINITY, 0.0, &[1]),
            false,
        ),
        ("frequency no number", penalized(1.0, f32::NAN, &[1]), false),
    ] {
        let request = sample_request(1.0, 1.0, 0.0, edit);
        assert_eq!(is_taken(request, 3), is_good, "{why}");
    }
}
