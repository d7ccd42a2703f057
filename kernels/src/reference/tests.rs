//! The oracle against numbers worked out by hand: what it says must be plain to see.

use super::*;
use crate::device::{
    Dtype, Limits, LogitsRow, LogitsWant, Precision, Rope, Span, TableRow, TableUpdate, TokenInput,
};

fn config() -> DeviceConfig {
    DeviceConfig {
        attention: AttentionShape {
            n_layers: 1,
            n_heads: 1,
            n_kv_heads: 1,
            head_dim: 2,
            block_size: 2,
        },
        limits: Limits {
            max_tokens: 4,
            max_sequences: 2,
            max_logits_rows: 2,
            max_blocks_per_sequence: 2,
        },
        rope: Rope {
            inverse_frequencies: vec![std::f32::consts::FRAC_PI_2],
            scale: 1.0,
            max_positions: 4,
        },
        precision: Precision::F32,
        memory_limit: None,
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

#[test]
fn a_step_by_hand() {
    let mut device = ReferenceDevice::new(config());
    // Token 0 has a query and key of zero and the value (1, 2); token 1 the value (3, 6).
    let table = bytes(&[0.0, 0.0, 0.0, 0.0, 1.0, 2.0, 0.0, 0.0, 0.0, 0.0, 3.0, 6.0]);
    let table = device.prepare_weight(&[view(&table, 2, 6)]).unwrap();
    let head = bytes(&[1.0, 0.0, 0.0, 1.0, 1.0, 1.0]);
    let head = device.prepare_weight(&[view(&head, 3, 2)]).unwrap();
    let qkv = device.plan_buffer(Rows::Tokens, 6).unwrap();
    let mixed = device.plan_buffer(Rows::Tokens, 2).unwrap();
    let last = device.plan_buffer(Rows::Logits, 2).unwrap();
    let logits = device.plan_buffer(Rows::Logits, 3).unwrap();
    device.allocate_kv(3).unwrap();
    let input = StepInput {
        table_updates: vec![TableUpdate {
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
        logits: vec![LogitsRow {
            token: 2,
            want: LogitsWant::Score { token: 0 },
            n_logprobs: Some(1),
        }],
        ..StepInput::default()
    };
    let mut forward = |ops: &mut dyn Ops| {
        ops.embed(qkv, table);
        ops.rope_append(qkv, 0);
        ops.attention(mixed, qkv, 0, 1.0);
        ops.gather_logits_rows(last, mixed);
        ops.matmul(logits, last, head, None);
        ops.sample(logits);
    };
    let ticket = device.submit(&input, &mut forward).unwrap();
    let output = device.collect(ticket).unwrap();
    // Equal scores: the means of (1, 2); of (1, 2), (3, 6); of (1, 2), (3, 6), (3, 6).
    let mean = 7.0 / 3.0;
    assert_eq!(
        device.read(mixed).unwrap(),
        [1.0, 2.0, 2.0, 4.0, mean, 2.0 * mean]
    );
    assert_eq!(device.read(logits).unwrap(), [mean, 2.0 * mean, 3.0 * mean]);
    let all = (-2.0 * mean).exp() + (-mean).exp() + 1.0;
    assert!((output.sampled[0].logprob.unwrap() - (-2.0 * mean - all.ln())).abs() < 1e-6);
    assert_eq!(output.sampled[0].top[0].0, 2);
}

#[test]
fn rope_turns_each_pair_by_its_angle() {
    let mut head = [1.0, 0.0, 0.0, 1.0];
    rotate(&mut head, 1, &[std::f32::consts::FRAC_PI_2, 0.0], 1.0);
    let want = [0.0, 0.0, 1.0, 1.0];
    assert!(
        head.iter().zip(want).all(|(a, b)| (a - b).abs() < 1e-7),
        "{head:?}"
    );
}
