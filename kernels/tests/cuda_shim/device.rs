//! The whole CUDA device against the f64 oracle: on the shim, or on a GPU (gpu.rs).

use crate::layer::{MAX_BLOCKS, Model, Part, Shape, VOCABULARY, config, n_blocks, step_of};
use kvasir_kernels::cuda::CudaDevice;
use kvasir_kernels::cuda::shim::Shim;
use kvasir_kernels::device::*;
use kvasir_kernels::reference::ReferenceDevice;
use std::num::NonZeroU32;

const SHAPES: [Shape; 4] = [
    Shape {
        n_heads: 3,
        n_kv_heads: 3,
        head_dim: 64,
        hidden: 21,
        intermediate: 35,
        block_size: 8,
    },
    Shape {
        n_heads: 10,
        n_kv_heads: 2,
        head_dim: 80,
        hidden: 100,
        intermediate: 130,
        block_size: 24,
    },
    Shape {
        n_heads: 8,
        n_kv_heads: 1,
        head_dim: 128,
        hidden: 64,
        intermediate: 257,
        block_size: 128,
    },
    Shape {
        n_heads: 1,
        n_kv_heads: 1,
        head_dim: 256,
        hidden: 1,
        intermediate: 1,
        block_size: 16,
    },
];

fn device(config: DeviceConfig) -> Box<dyn Device> {
    #[cfg(feature = "cuda")]
    if crate::gpu::wanted() {
        let gpu = kvasir_kernels::cuda::gpu::Gpu::open().unwrap();
        return Box::new(CudaDevice::new(gpu, config).unwrap());
    }
    Box::new(CudaDevice::new(Shim::default(), config).unwrap())
}

fn cuda(shape: Shape) -> Model {
    Model::new(device(config(shape, Precision::BF16)), shape)
}

fn worst(want: &[Vec<f32>], got: &[Vec<f32>]) -> f32 {
    assert_eq!(want.len(), got.len());
    let pairs = want.iter().flatten().zip(got.iter().flatten());
    pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

#[test]
fn mixed_steps_agree_with_f64() {
    for shape in SHAPES {
        let mut model = cuda(shape);
        let mut oracle = Model::new(
            Box::new(ReferenceDevice::new(config(shape, Precision::BF16))),
            shape,
        );
        // A prefill with a partial last block beside an inert span; decodes beside a chunk; an empty step; decodes of
        // one shape often enough to be captured and replayed, over more than one partition.
        let steps: [&[Part]; 7] = [
            &[(0, 0..19), (2, 0..0), (1, 0..1)],
            &[(0, 19..20), (1, 1..40), (3, 0..258)],
            &[],
            &[(1, 40..41), (3, 258..259)],
            &[(1, 41..42), (3, 259..260)],
            &[(3, 260..261), (0, 20..21)],
            &[(0, 21..22), (1, 42..43), (3, 261..262)],
        ];
        for parts in steps {
            let input = step_of(parts, shape.block_size, n_blocks(&model));
            // Activations of order 1 are rounded to bfloat16 between operations, by 2^-9 each, some thirty times.
            let error = worst(&oracle.step(&input), &model.step(&input));
            assert!(error < 0.12, "{shape:?}, {parts:?}: {error}");
        }
    }
}

/// Decodes `n` tokens of three sequences, greedy and random, `ahead` steps before the tokens are known.
fn decode(ahead: bool, n: u32) -> Vec<Vec<Sampled>> {
    let shape = SHAPES[0];
    let mut model = cuda(shape);
    let n_blocks = n_blocks(&model);
    let sampling = |l: u32, output_index| Sampling {
        temperature: [0.0, 0.7, 1.3][l as usize],
        top_p: [1.0, 0.9, 1.0][l as usize],
        top_k: NonZeroU32::new([0, 0, 9][l as usize]),
        seed: 7 + u64::from(l),
        output_index,
    };
    let step = |i: u32, known: Option<&[Sampled]>| {
        let parts: Vec<Part> = match i {
            0 => vec![(0, 0..5), (1, 0..3), (2, 0..30)],
            _ => [5, 3, 30]
                .iter()
                .zip(0..)
                .map(|(&p, s)| (s, p + i - 1..p + i))
                .collect(),
        };
        let mut input = step_of(&parts, shape.block_size, n_blocks);
        for (row, l) in input.logits.iter_mut().zip(0..) {
            row.want = LogitsWant::Sample(sampling(l, i));
        }
        if i > 0 {
            for (token, l) in input.tokens.iter_mut().zip(0..) {
                *token = match known {
                    Some(drawn) => TokenInput::Id(drawn[l as usize].token),
                    None => TokenInput::Sampled { logits_row: l },
                };
            }
        }
        input
    };
    let mut drawn: Vec<Vec<Sampled>> = Vec::new();
    let mut under_way = Vec::new();
    for i in 0..n {
        let known = if ahead {
            None
        } else {
            drawn.last().map(Vec::as_slice)
        };
        under_way.push(model.submit(&step(i, known)));
        if !ahead || under_way.len() == model.device.depth() {
            drawn.push(model.device.collect(under_way.remove(0)).unwrap().sampled);
        }
    }
    for ticket in under_way {
        drawn.push(model.device.collect(ticket).unwrap().sampled);
    }
    drawn
}

#[test]
fn a_step_ahead_gives_the_same_tokens() {
    let known = decode(false, 9);
    assert_eq!(known.len(), 9);
    assert!(
        known
            .iter()
            .flatten()
            .all(|s| s.logprob.is_some() && s.top.len() == 2)
    );
    assert_eq!(decode(true, 9), known);
}

#[test]
fn copied_blocks_hold_what_their_sources_do() {
    let shape = SHAPES[0];
    let mut model = cuda(shape);
    let n_blocks = n_blocks(&model);
    model.step(&step_of(&[(0, 0..20)], shape.block_size, n_blocks));
    let want = model.step(&step_of(&[(0, 20..21)], shape.block_size, n_blocks));
    let mut input = step_of(&[(0, 20..21)], shape.block_size, n_blocks);
    let blocks = input.table_updates[0].blocks.clone();
    input.copies = blocks
        .iter()
        .zip(100..)
        .map(|(&from, to)| (from, BlockId(to)))
        .collect();
    input.table_updates[0].blocks = (100..).map(BlockId).take(blocks.len()).collect();
    assert_eq!(model.step(&input), want);
}

#[test]
fn a_table_longer_than_one_trip_arrives() {
    let shape = SHAPES[0];
    let mut long = config(shape, Precision::BF16);
    long.limits.max_blocks_per_sequence = 20_000;
    let mut model = Model::new(device(long), shape);
    let n_blocks = n_blocks(&model);
    let want = model.step(&step_of(&[(1, 0..20)], shape.block_size, n_blocks));
    // The entries that count come last, behind more others than go in one trip.
    let mut input = step_of(&[(1, 0..20)], shape.block_size, n_blocks);
    let others = TableUpdate {
        row: TableRow(0),
        first: 0,
        blocks: (0..18_000)
            .map(|i| BlockId(i % MAX_BLOCKS as u32))
            .collect(),
    };
    for entry in &mut input.table_updates[0].blocks {
        entry.0 = (entry.0 + 60) % n_blocks;
    }
    input.table_updates.insert(0, others);
    assert_eq!(model.step(&input), want);
}

#[test]
fn memory_is_accounted_for() {
    let shape = SHAPES[0];
    let model = cuda(shape);
    let memory = model.device.memory();
    assert!(memory.weights >= (VOCABULARY * shape.hidden * 2) as u64);
    assert!(memory.workspace > 0 && memory.other > 0);
    assert!(memory.weights + memory.workspace + memory.other < memory.limit);
}

#[test]
fn what_is_not_supported_is_said_in_words() {
    let refused = |change: fn(&mut DeviceConfig)| {
        let mut config = config(SHAPES[0], Precision::BF16);
        change(&mut config);
        let device = CudaDevice::new(Shim::default(), config);
        device.err().unwrap().to_string()
    };
    for (change, want) in [
        (
            (|config| {
                config.attention.head_dim = 48;
                config.rope.inverse_frequencies.truncate(24);
            }) as fn(&mut DeviceConfig),
            "the cuda device does not support head_dim 48; [64, 80, 96, 128, 192, 256] are",
        ),
        (
            |config| config.attention.block_size = 4,
            "the cuda device does not support --block-size 4; 8 to 128 tokens are",
        ),
        (
            |config| config.precision = Precision::F32,
            "the cuda device does not support float32; use --dtype bfloat16, or --device cpu",
        ),
    ] {
        assert_eq!(refused(change), want);
    }
}
