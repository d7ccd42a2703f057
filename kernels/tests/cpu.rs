//! The CPU device through its contract: a small transformer layer against the f64 oracle at edge shapes, and against
//! itself bit by bit, however its tokens are cut into steps and over threads.

// The helpers of tests unwrap as tests do.
#![allow(clippy::unwrap_used)]

#[path = "layer/model.rs"]
mod layer;

use kvasir_kernels::cpu::{CpuDevice, Isa};
use kvasir_kernels::device::*;
use kvasir_kernels::reference::ReferenceDevice;
use proptest::prelude::*;
use std::num::NonZeroUsize;

use layer::{Model, Part, Shape, config, n_blocks, step_of};

const SHAPES: [Shape; 5] = [
    Shape {
        n_heads: 1,
        n_kv_heads: 1,
        head_dim: 2,
        hidden: 1,
        intermediate: 1,
        block_size: 16,
    },
    Shape {
        n_heads: 3,
        n_kv_heads: 3,
        head_dim: 14,
        hidden: 21,
        intermediate: 35,
        block_size: 16,
    },
    Shape {
        n_heads: 10,
        n_kv_heads: 2,
        head_dim: 32,
        hidden: 100,
        intermediate: 130,
        block_size: 5,
    },
    Shape {
        n_heads: 8,
        n_kv_heads: 1,
        head_dim: 64,
        hidden: 64,
        intermediate: 257,
        block_size: 32,
    },
    Shape {
        n_heads: 28,
        n_kv_heads: 1,
        head_dim: 6,
        hidden: 40,
        intermediate: 24,
        block_size: 1,
    },
];

fn cpu(shape: Shape, precision: Precision, isa: Isa, n_threads: usize) -> Model {
    let n_threads = NonZeroUsize::new(n_threads).unwrap();
    Model::new(
        Box::new(CpuDevice::with_isa(config(shape, precision), n_threads, isa).unwrap()),
        shape,
    )
}

#[test]
fn every_instruction_set_agrees_with_f64() {
    for shape in SHAPES {
        // A prefill with a partial last block beside an inert span; decodes beside a chunk; an empty step.
        let steps: [&[Part]; 4] = [
            &[(0, 0..19), (2, 0..0), (1, 0..1)],
            &[(0, 19..20), (1, 1..40), (3, 0..3)],
            &[],
            &[(1, 40..41)],
        ];
        let oracle = |precision| {
            Model::new(
                Box::new(ReferenceDevice::new(config(shape, precision))),
                shape,
            )
        };
        for precision in [Precision::F32, Precision::BF16] {
            for isa in Isa::available(precision) {
                let (mut oracle, mut model) = (oracle(precision), cpu(shape, precision, isa, 2));
                for parts in steps {
                    let input = step_of(parts, shape.block_size, n_blocks(&model));
                    let (want, got) = (oracle.step(&input), model.step(&input));
                    for (want, got) in want.iter().flatten().zip(got.iter().flatten()) {
                        // Values are of order 1. f32 products round by 2^-24 in sums of a few hundred terms; bf16
                        // rounds each factor by up to 2^-9, and a dozen roundings follow each other.
                        let tolerance = match precision {
                            Precision::F32 => 2e-5,
                            Precision::BF16 => 0.06,
                        };
                        assert!(
                            (want - got).abs() < tolerance,
                            "{isa:?} {precision:?} {shape:?}: {got}, want {want}"
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn a_long_context_agrees_with_f64() {
    let shape = SHAPES[1];
    let mut oracle = Model::new(
        Box::new(ReferenceDevice::new(config(shape, Precision::F32))),
        shape,
    );
    for isa in Isa::available(Precision::F32) {
        let mut model = cpu(shape, Precision::F32, isa, 2);
        for parts in [&[(0, 0..600)], &[(0, 600..601)], &[(0, 601..602)]] {
            let input = step_of(parts, shape.block_size, n_blocks(&model));
            let (want, got) = (oracle.step(&input), model.step(&input));
            let worst = want[0]
                .iter()
                .zip(&got[0])
                .map(|(a, b)| (a - b).abs())
                .fold(0.0, f32::max);
            assert!(worst < 1e-4, "{isa:?}: {worst}");
        }
    }
}

#[test]
fn copied_blocks_hold_what_their_sources_do() {
    let shape = SHAPES[1];
    for precision in [Precision::BF16, Precision::F32] {
        let mut model = cpu(shape, precision, Isa::available(precision)[0], 1);
        let n_blocks = n_blocks(&model);
        model.step(&step_of(&[(0, 0..20)], shape.block_size, n_blocks));
        let want = model.step(&step_of(&[(0, 20..21)], shape.block_size, n_blocks));
        let mut input = step_of(&[(0, 20..21)], shape.block_size, n_blocks);
        input.copies = vec![(BlockId(0), BlockId(101)), (BlockId(5), BlockId(102))];
        input.table_updates[0].blocks = vec![BlockId(101), BlockId(102)];
        assert_eq!(model.step(&input), want);
    }
}

#[test]
fn what_an_earlier_sequence_left_in_a_block_is_never_seen() {
    // An odd number of tokens shares the last unit of values with a slot that another sequence used before.
    let shape = SHAPES[1];
    let mut fresh = cpu(
        shape,
        Precision::BF16,
        Isa::available(Precision::BF16)[0],
        1,
    );
    let mut used = cpu(
        shape,
        Precision::BF16,
        Isa::available(Precision::BF16)[0],
        1,
    );
    let n_blocks = n_blocks(&fresh);
    let mut other = step_of(&[(3, 0..16)], shape.block_size, n_blocks);
    other.table_updates[0].blocks = vec![BlockId(0)];
    used.step(&other);
    let input = step_of(&[(0, 0..7)], shape.block_size, n_blocks);
    assert_eq!(fresh.step(&input), used.step(&input));
}

/// Logits of a sequence's last token, its tokens cut at the given places, beside others or alone.
fn run(model: &mut Model, n: u32, cuts: &[u32], crowd: &[u32]) -> Vec<u32> {
    let mut bounds: Vec<u32> = cuts.iter().map(|cut| cut % n).chain([0, n]).collect();
    bounds.sort_unstable();
    bounds.dedup();
    let (block_size, n_blocks) = (model.block_size, n_blocks(model));
    let mut last = Vec::new();
    for (i, bound) in bounds.windows(2).enumerate() {
        let mut parts: Vec<Part> = crowd
            .iter()
            .zip(1..)
            .map(|(&n, sequence)| (sequence, i as u32 * n..(i as u32 + 1) * n))
            .collect();
        let own = parts.len() / 2;
        parts.insert(own, (0, bound[0]..bound[1]));
        let input = step_of(&parts, block_size, n_blocks);
        let before = parts[..own]
            .iter()
            .filter(|(_, positions)| !positions.is_empty())
            .count();
        last = model.step(&input)[before]
            .iter()
            .map(|x| x.to_bits())
            .collect();
    }
    last
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn a_sequence_gives_the_same_bits_alone_and_in_a_crowd(
        shape in 0usize..4, n in 1u32..330, cuts in prop::collection::vec(any::<u32>(), 0..5),
        crowd in prop::collection::vec(0u32..12, 0..4), n_threads in 2usize..4,
    ) {
        for precision in [Precision::BF16, Precision::F32] {
            for isa in Isa::available(precision) {
                let alone = run(&mut cpu(SHAPES[shape], precision, isa, 1), n, &[], &[]);
                let crowded = run(&mut cpu(SHAPES[shape], precision, isa, n_threads), n, &cuts, &crowd);
                prop_assert_eq!(alone, crowded, "{:?} {:?}", isa, precision);
            }
        }
    }
}

#[test]
fn what_cannot_be_is_said_in_words() {
    let mut bad = config(SHAPES[0], Precision::BF16);
    bad.attention.head_dim = 3;
    let error = CpuDevice::new(bad, NonZeroUsize::MIN)
        .err()
        .unwrap()
        .to_string();
    assert_eq!(
        error,
        "the cpu device does not support a head of 3 elements, which are not pairs"
    );
    let mut device = CpuDevice::new(config(SHAPES[0], Precision::BF16), NonZeroUsize::MIN).unwrap();
    let error = device.allocate_kv(u32::MAX).unwrap_err().to_string();
    assert!(error.starts_with("the KV cache needs"), "{error}");
}
