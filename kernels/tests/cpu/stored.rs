//! Weights as checkpoints store them, packed here from numbers that are known: a product with them gives the same bits
//! as one with the dense numbers.

use kvasir_kernels::device::*;
use kvasir_kernels::stored::*;

use crate::layer::{Layers, VOCABULARY, tensor};
use crate::{NUMERICS, SMALL, best};

/// More than a panel of rows, groups that end within the columns, and nothing that 16 divides.
const ROWS: usize = 40;
const COLS: usize = 56;

/// Some number for each row and column.
fn some(r: usize, c: usize, below: usize) -> usize {
    (r * 31 + c * 17 + r * c * 7 + 3) % below
}

/// Scales are powers of two and three halves of them: exact in bf16.
fn scale(r: usize, c: usize) -> f32 {
    [0.25, 0.5, 0.375, 1.0][some(r, c, 4)]
}

fn f32_bytes(values: impl IntoIterator<Item = f32>) -> Vec<u8> {
    values.into_iter().flat_map(f32::to_le_bytes).collect()
}

fn bf16_bytes(values: impl IntoIterator<Item = f32>) -> Vec<u8> {
    let bits = values.into_iter().map(half::bf16::from_f32);
    bits.flat_map(half::bf16::to_le_bytes).collect()
}

fn grid(rows: usize, cols: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..rows).flat_map(move |r| (0..cols).map(move |c| (r, c)))
}

fn view(dtype: Dtype, shape: [usize; 2], bytes: &[u8]) -> TensorView<'_> {
    TensorView {
        dtype,
        shape,
        bytes,
    }
}

/// Asserts that products with `stored` and with the numbers that it stands for have the same bits.
fn assert_same(why: &str, stored: StoredMatrix<'_>, dense: &[f32]) {
    for numerics in NUMERICS {
        let mut device = best(numerics);
        let layers = Layers::add(&mut *device, &SMALL, 0);
        let embedding = tensor(9, VOCABULARY * COLS, 1);
        let embedding = view(Dtype::BF16, [VOCABULARY, COLS], &embedding);
        let table = device.prepare_weight(&[embedding.into()]).unwrap();
        let dense = f32_bytes(dense.iter().copied());
        let dense = view(Dtype::F32, [ROWS, COLS], &dense);
        let weights = [stored, dense.into()].map(|part| {
            // Stacked behind a part that is dense and no multiple of a panel.
            let first = view(Dtype::F32, [3, COLS], &dense.bytes[..3 * COLS * 4]);
            device.prepare_weight(&[first.into(), part]).unwrap()
        });
        let x = device.plan_buffer(Rows::Tokens, COLS).unwrap();
        let out = weights.map(|_| device.plan_buffer(Rows::Tokens, ROWS + 3).unwrap());
        device.allocate_kv(layers.n_blocks()).unwrap();
        let mut input = layers.input(&[(0, 0..5)]);
        input.logits.clear();
        let forward = |ops: &mut dyn Ops| {
            ops.embed(x, table, 1.0);
            ops.matmul(out[0], x, weights[0], None);
            ops.matmul(out[1], x, weights[1], None);
        };
        let ticket = device.submit(&input, &forward).unwrap();
        device.collect(ticket).unwrap();
        let [got, want] = out.map(|out| device.read(out).unwrap());
        assert!(want.iter().any(|x| x.abs() > 0.5), "something to compare");
        assert_eq!(got, want, "{why}, {numerics:?}");
    }
}

#[test]
fn fp8_by_tensor_channel_and_block() {
    // Bytes and what the specification says that they are.
    const E4M3: [(u8, f32); 8] = [
        (0x00, 0.0),
        (0x38, 1.0),
        (0xb8, -1.0),
        (0x3c, 1.5),
        (0x40, 2.0),
        (0x30, 0.5),
        (0xc7, -3.75),
        (0x28, 0.25),
    ];
    let values: Vec<u8> = grid(ROWS, COLS)
        .map(|(r, c)| E4M3[some(r, c, 8)].0)
        .collect();
    for (why, block) in [
        ("one scale", [ROWS, COLS]),
        ("a scale a channel", [1, COLS]),
        ("blocks that end within", [16, 32]),
    ] {
        let blocks = [ROWS.div_ceil(block[0]), COLS.div_ceil(block[1])];
        let scales = bf16_bytes(grid(blocks[0], blocks[1]).map(|(r, c)| scale(r, c)));
        let dense: Vec<f32> = grid(ROWS, COLS)
            .map(|(r, c)| E4M3[some(r, c, 8)].1 * scale(r / block[0], c / block[1]))
            .collect();
        let stored = StoredMatrix::Fp8(Fp8 {
            shape: [ROWS, COLS],
            values: &values,
            scales: view(Dtype::BF16, blocks, &scales),
            block,
        });
        assert_same(why, stored, &dense);
    }
}

/// `words[i / 8]` takes number `i` of a line of `n` in nibble `order[i % 8]`; line after line.
fn pack(
    n_lines: usize,
    n: usize,
    order: [usize; 8],
    number: impl Fn(usize, usize) -> usize,
) -> Vec<u32> {
    let mut words = vec![0; n_lines * n.div_ceil(8)];
    for (line, i) in grid(n_lines, n) {
        let word = &mut words[line * n.div_ceil(8) + i / 8];
        *word |= (number(line, i) as u32) << (4 * order[i % 8]);
    }
    words
}

/// The same words with lines and words of a line exchanged.
fn transposed(words: &[u32], per_line: usize) -> Vec<u32> {
    let n_lines = words.len() / per_line;
    grid(per_line, n_lines)
        .map(|(word, line)| words[line * per_line + word])
        .collect()
}

fn word_bytes(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

#[test]
fn int4_in_each_order() {
    const GROUP: usize = 16;
    const N_GROUPS: usize = COLS.div_ceil(GROUP);
    const PLAIN: [usize; 8] = [0, 1, 2, 3, 4, 5, 6, 7];
    // The nibbles, from the lowest, hold outputs 0, 2, 4, 6, 1, 3, 5, 7.
    const AWQ: [usize; 8] = [0, 4, 1, 5, 2, 6, 3, 7];
    let quantized = |r: usize, c: usize| some(r, c, 16);
    let zero = |r: usize, g: usize| 1 + some(r, g, 15);
    // Inputs out of order, as GPTQ's `desc_act` leaves them.
    let shuffled = |c: usize| (c * 5 + 1) % N_GROUPS;
    let plain = |c: usize| c / GROUP;

    let by_input = pack(ROWS, COLS, PLAIN, quantized);
    let gptq = word_bytes(&transposed(&by_input, COLS / 8));
    let awq = word_bytes(&pack(COLS, ROWS, AWQ, |c, r| quantized(r, c)));
    let pack_quantized = word_bytes(&by_input);

    let zeros_gptq = word_bytes(&pack(N_GROUPS, ROWS, PLAIN, |g, r| zero(r, g) - 1));
    let zeros_awq = word_bytes(&pack(N_GROUPS, ROWS, AWQ, |g, r| zero(r, g)));
    let by_output = pack(N_GROUPS, ROWS, PLAIN, |g, r| zero(r, g));
    let zeros_pack_quantized = word_bytes(&transposed(&by_output, ROWS / 8));

    let scales_by_group = bf16_bytes(grid(N_GROUPS, ROWS).map(|(g, r)| scale(r, g)));
    let scales_by_row = bf16_bytes(grid(ROWS, N_GROUPS).map(|(r, g)| scale(r, g)));
    let by_group = view(Dtype::BF16, [N_GROUPS, ROWS], &scales_by_group);
    let by_row = view(Dtype::BF16, [ROWS, N_GROUPS], &scales_by_row);
    let index: Vec<u32> = (0..COLS).map(|c| shuffled(c) as u32).collect();
    let index = word_bytes(&index);

    use Int4Order::{Awq, Gptq, PackQuantized};
    for (why, order, values, scales, zeros) in [
        ("GPTQ", Gptq, &gptq, by_group, &zeros_gptq),
        ("AWQ", Awq, &awq, by_group, &zeros_awq),
        (
            "pack-quantized",
            PackQuantized,
            &pack_quantized,
            by_row,
            &zeros_pack_quantized,
        ),
    ] {
        for (with_zeros, with_index) in [(true, false), (false, false), (true, true)] {
            if with_index && order != Gptq {
                continue;
            }
            let group = |c| if with_index { shuffled(c) } else { plain(c) };
            let zero = |r, g| if with_zeros { zero(r, g) } else { 8 };
            let dense: Vec<f32> = grid(ROWS, COLS)
                .map(|(r, c)| {
                    let g = group(c);
                    (quantized(r, c) as f32 - zero(r, g) as f32) * scale(r, g)
                })
                .collect();
            let stored = StoredMatrix::Int4(Int4 {
                shape: [ROWS, COLS],
                order,
                values,
                scales,
                zeros: with_zeros.then_some(&zeros[..]),
                group_size: GROUP,
                group_index: with_index.then_some(&index[..]),
            });
            let why = format!("{why}, zeros {with_zeros}, index {with_index}");
            assert_same(&why, stored, &dense);
        }
    }
}
