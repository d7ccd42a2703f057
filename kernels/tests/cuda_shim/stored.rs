//! Weights in their stored forms: what the device multiplies with is what `StoredMatrix::read_row` gives, rounded.

use crate::device::device;
use crate::layer::Shape;
use kvasir_kernels::device::*;
use kvasir_kernels::step::*;
use kvasir_kernels::stored::*;

/// The rows of a matrix, by way of an embedding.
fn rows(matrix: StoredMatrix<'_>, n: usize) -> Vec<f32> {
    let [n_rows, cols] = matrix.shape();
    let mut shape = Shape::llama([1, 1, 64, 8, 8, 8]).model_shape();
    shape.vocab_size = n_rows;
    let mut device = device();
    device.add_model(&shape).unwrap();
    let weight = device.prepare_weight(&[matrix]).unwrap();
    let out = device.plan_buffer(Rows::Tokens, cols).unwrap();
    let last = device.plan_buffer(Rows::Logits, cols).unwrap();
    let logits = device.plan_logits().unwrap();
    device.allocate_kv(8).unwrap();
    let input = StepInput {
        tokens: (0..n as u32).map(TokenInput::Id).collect(),
        spans: vec![Span {
            row: TableRow(0),
            first_token: 0,
            n_tokens: n as u32,
            first_position: 0,
        }],
        logits: vec![0],
        ..StepInput::default()
    };
    let forward = |ops: &mut dyn Ops| {
        ops.embed(out, weight, 1.0);
        ops.gather_logits_rows(last, out);
        ops.logits(logits, last, weight);
    };
    let ticket = device.submit(&input, &forward).unwrap();
    let request = LogitsRow {
        request: LogitsRequest::Score { token: 0 },
        n_logprobs: None,
    };
    device.sample(&ticket, logits, &[request]).unwrap();
    device.collect(ticket).unwrap();
    device.read(out).unwrap()
}

#[test]
fn stored_forms_are_read() {
    let bytes = |n: usize| (0..n).map(|i| (i * 37 % 113) as u8).collect::<Vec<u8>>();
    let floats = |n: usize| -> Vec<u8> {
        let values = (0..n).map(|i| 0.25 + (i % 7) as f32 / 3.0);
        values.flat_map(f32::to_le_bytes).collect()
    };
    let halves = |n: usize| -> Vec<u8> {
        let values = (0..n).map(|i| half::f16::from_f32(0.1 * i as f32 - 3.0));
        values.flat_map(half::f16::to_le_bytes).collect()
    };
    let (f32s, f16s, values, scales) = (
        floats(16 * 24),
        halves(16 * 24),
        bytes(16 * 24),
        floats(2 * 16 * 3),
    );
    let view = |bytes, dtype, shape| TensorView {
        dtype,
        shape,
        bytes,
    };
    let int4 = |order, scales_shape: [usize; 2]| {
        StoredMatrix::Int4(Int4 {
            shape: [16, 24],
            order,
            values: &values[..16 * 24 / 2],
            scales: view(
                &scales[..scales_shape[0] * scales_shape[1] * 4],
                Dtype::F32,
                scales_shape,
            ),
            zeros: None,
            group_size: 8,
            group_index: None,
        })
    };
    for (why, matrix) in [
        ("f32", view(&f32s, Dtype::F32, [16, 24]).into()),
        ("f16", view(&f16s, Dtype::F16, [16, 24]).into()),
        (
            "fp8 by blocks",
            StoredMatrix::Fp8(Fp8 {
                shape: [16, 24],
                values: &values,
                scales: view(&scales[..2 * 3 * 4], Dtype::F32, [2, 3]),
                block: [8, 8],
            }),
        ),
        ("GPTQ", int4(Int4Order::Gptq, [3, 16])),
        ("AWQ", int4(Int4Order::Awq, [3, 16])),
        ("pack-quantized", int4(Int4Order::PackQuantized, [16, 3])),
    ] {
        let mut want = vec![0.0; 16 * 24];
        for (r, row) in want.chunks_mut(24).enumerate() {
            matrix.read_row(r, row);
        }
        assert!(want.iter().any(|&x| x != 0.0), "{why}");
        let rounded: Vec<f32> = want
            .iter()
            .map(|&x| half::bf16::from_f32(x).to_f32())
            .collect();
        assert_eq!(rows(matrix, 16), rounded, "{why}");
    }
}
