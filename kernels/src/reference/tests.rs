//! The oracle against numbers worked out by hand: what it says must be plain to see.

use super::*;
use crate::shape::{AttentionShape, CacheShape, Limits, RopeId, cache_groups};
use crate::step::{LogitsRequest, Span, TableRow, TableUpdate, TokenInput};
use crate::stored::Dtype;
use std::num::NonZeroU32;

/// One layer of one head of two elements, turned by a quarter for each position.
fn shape(window: Option<u32>) -> ModelShape {
    let caches = vec![CacheShape {
        n_kv_heads: 1,
        head_dim: 2,
        window: window.and_then(NonZeroU32::new),
    }];
    ModelShape {
        vocab_size: 3,
        max_positions: 4,
        block_size: 2,
        limits: Limits {
            max_tokens: 4,
            max_sequences: 2,
            max_logits_rows: 2,
            max_blocks_per_sequence: 2,
        },
        ropes: vec![Rope {
            inverse_frequencies: vec![std::f32::consts::FRAC_PI_2],
            scale: 1.0,
        }],
        groups: cache_groups(&caches),
        caches,
        layers: vec![AttentionShape {
            cache: CacheId(0),
            n_heads: 1,
            rope: Some(RopeId(0)),
            scale: 1.0,
            soft_cap: None,
        }],
    }
}

fn view<'a>(bytes: &'a [u8], rows: usize, cols: usize) -> TensorView<'a> {
    TensorView {
        dtype: Dtype::F32,
        shape: [rows, cols],
        bytes,
    }
}

fn bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

/// Three tokens of one sequence through one layer of attention; gives what it mixed, the logits and the output.
fn three_tokens(window: Option<u32>) -> (Vec<f32>, Vec<f32>, DeviceOutput) {
    let mut device = ReferenceDevice::default();
    device.add_model(&shape(window)).unwrap();
    // Token 0 has a query and key of zero and the value (1, 2); token 1 the value (3, 6).
    let mut table = bytes(&[0.0, 0.0, 0.0, 0.0, 1.0, 2.0, 0.0, 0.0, 0.0, 0.0, 3.0, 6.0]);
    table.extend(bytes(&[0.0; 6]));
    let table = device.prepare_weight(&[view(&table, 3, 6).into()]).unwrap();
    let head = bytes(&[1.0, 0.0, 0.0, 1.0, 1.0, 1.0]);
    let head = device.prepare_weight(&[view(&head, 3, 2).into()]).unwrap();
    let qkv = device.plan_buffer(Rows::Tokens, 6).unwrap();
    let mixed = device.plan_buffer(Rows::Tokens, 2).unwrap();
    let last = device.plan_buffer(Rows::Logits, 2).unwrap();
    let logits = device.plan_logits().unwrap();
    device.allocate_kv(3).unwrap();
    let input = StepInput {
        table_updates: vec![TableUpdate {
            group: 0,
            row: TableRow(1),
            first: 0,
            blocks: vec![BlockId(2), BlockId(0)],
        }],
        tokens: vec![TokenInput::Id(0), TokenInput::Id(1), TokenInput::Id(1)],
        spans: vec![Span {
            row: TableRow(1),
            first_token: 0,
            n_tokens: 3,
            first_position: 0,
        }],
        logits: vec![2],
        ..StepInput::default()
    };
    let forward = |ops: &mut dyn Ops| {
        ops.embed(qkv, table, 1.0);
        ops.rope_append(qkv, LayerId(0), None);
        ops.attention(mixed, qkv, LayerId(0));
        ops.gather_logits_rows(last, mixed);
        ops.logits(logits, last, head);
    };
    let ticket = device.submit(&input, &forward).unwrap();
    let request = LogitsRow {
        request: LogitsRequest::Score { token: 0 },
        n_logprobs: Some(1),
    };
    device.sample(&ticket, logits, &[request]).unwrap();
    let output = device.collect(ticket).unwrap();
    let mixed = device.read(mixed).unwrap();
    (mixed, device.read_logits(logits).unwrap(), output)
}

#[test]
fn a_step_by_hand() {
    let (mixed, logits, output) = three_tokens(None);
    // Equal scores: the means of (1, 2); of (1, 2), (3, 6); of (1, 2), (3, 6), (3, 6).
    let mean = 7.0 / 3.0;
    assert_eq!(mixed, [1.0, 2.0, 2.0, 4.0, mean, 2.0 * mean]);
    assert_eq!(logits, [mean, 2.0 * mean, 3.0 * mean]);
    let all = (-2.0 * mean).exp() + (-mean).exp() + 1.0;
    assert!((output.sampled[0].logprob.unwrap() - (-2.0 * mean - all.ln())).abs() < 1e-6);
    assert_eq!(output.sampled[0].top[0].0, 2);
}

#[test]
fn a_window_leaves_the_first_token_out() {
    let (mixed, ..) = three_tokens(Some(2));
    assert_eq!(mixed, [1.0, 2.0, 2.0, 4.0, 3.0, 6.0]);
}

#[test]
fn ties_between_experts_go_to_the_lowest_index() {
    let shape = |renormalize| ExpertsShape {
        gate_up: Weight(0),
        down: Weight(1),
        n_experts: 4,
        top_k: 2,
        renormalize,
        activation: Activation::Silu,
    };
    let router = [1.0, 2.0, 2.0, 2.0];
    let sum = (-1.0f64).exp() + 3.0;
    for (renormalize, share) in [(false, 1.0 / sum), (true, 0.5)] {
        let chosen = chosen_experts(&router, &shape(renormalize));
        assert_eq!([chosen[0].0, chosen[1].0], [1, 2]);
        assert!((chosen[0].1 - share).abs() < 1e-12 && chosen[1].1 == chosen[0].1);
    }
}

#[test]
fn rope_turns_each_pair_by_its_angle() {
    // The last element is beyond the pairs: a partial embedding leaves it alone.
    let mut head = [1.0, 0.0, 0.0, 1.0, 5.0];
    let rope = Rope {
        inverse_frequencies: vec![std::f32::consts::FRAC_PI_2, 0.0],
        scale: 1.0,
    };
    rotate(&mut head, 1, &rope);
    let want = [0.0, 0.0, 1.0, 1.0, 5.0];
    assert!(
        head.iter().zip(want).all(|(a, b)| (a - b).abs() < 1e-7),
        "{head:?}"
    );
}
