//! The CPU device through its contract: small transformer layers against the f64 oracle at edge shapes, and against
//! itself bit by bit, however its tokens are cut into steps and over threads.

// The helpers of tests unwrap as tests do.
#![allow(clippy::unwrap_used)]

#[path = "layer/model.rs"]
mod layer;
#[path = "cpu/poison.rs"]
mod poison;
#[path = "cpu/stored.rs"]
mod stored_forms;

use kvasir_kernels::cpu::{CpuDevice, Isa};
use kvasir_kernels::device::*;
use kvasir_kernels::reference::ReferenceDevice;
use kvasir_kernels::sampling;
use kvasir_kernels::shape::*;
use kvasir_kernels::step::*;
use proptest::prelude::*;
use std::num::NonZeroUsize;

use layer::{Layers, MAX_SEQUENCES, Part, Routing, Shape, TestModel, VOCABULARY};
use poison::Poison;

const LLAMAS: [Shape; 5] = [
    Shape::llama([1, 1, 2, 1, 1, 16]),
    Shape::llama([3, 3, 14, 21, 35, 16]),
    Shape::llama([10, 2, 32, 100, 130, 5]),
    Shape::llama([8, 1, 64, 64, 257, 32]),
    Shape::llama([28, 1, 6, 40, 24, 1]),
];

const SMALL: Shape = LLAMAS[1];
const GROUPED: Shape = LLAMAS[2];

/// What is not in a Llama, one thing after another and then together.
const OTHERS: [Shape; 12] = [
    Shape {
        window: Some(5),
        ..SMALL
    },
    Shape {
        window: Some(16),
        ..GROUPED
    },
    Shape {
        window: Some(300),
        ..SMALL
    },
    Shape {
        soft_cap: Some(0.5),
        ..GROUPED
    },
    Shape {
        head_norms: true,
        ..GROUPED
    },
    Shape {
        n_frequencies: 4,
        ..SMALL
    },
    Shape {
        n_frequencies: 0,
        ..SMALL
    },
    Shape {
        activation: Activation::GeluTanh,
        ..GROUPED
    },
    // Gemma 3's local layers, Mixtral, Qwen3-MoE; then sizes that no panel of 16 divides.
    Shape {
        window: Some(16),
        head_norms: true,
        soft_cap: Some(2.0),
        activation: Activation::GeluTanh,
        ..Shape::llama([4, 2, 16, 48, 64, 16])
    },
    Shape {
        routing: Some(routing(8, 2, true)),
        ..Shape::llama([4, 2, 16, 48, 64, 16])
    },
    Shape {
        routing: Some(routing(4, 1, false)),
        head_norms: true,
        ..Shape::llama([3, 3, 14, 21, 35, 16])
    },
    Shape {
        routing: Some(routing(5, 3, false)),
        window: Some(7),
        n_frequencies: 3,
        activation: Activation::GeluTanh,
        ..Shape::llama([6, 2, 10, 37, 9, 3])
    },
];

const fn routing(n_experts: usize, top_k: usize, renormalize: bool) -> Routing {
    Routing {
        n_experts,
        top_k,
        renormalize,
    }
}

fn all_shapes() -> impl Iterator<Item = Shape> {
    LLAMAS.into_iter().chain(OTHERS)
}

/// All three in one precision, and a cache in another.
const NUMERICS: [Numerics; 3] = [
    Numerics::uniform(Precision::F32),
    Numerics::uniform(Precision::BF16),
    Numerics {
        kv_cache: Precision::F32,
        ..Numerics::uniform(Precision::BF16)
    },
];

fn options(numerics: Numerics) -> DeviceOptions {
    DeviceOptions {
        numerics,
        memory_limit: None,
    }
}

fn cpu_device(numerics: Numerics, isa: Isa, n_threads: usize) -> Box<dyn Device> {
    let n_threads = NonZeroUsize::new(n_threads).unwrap();
    Box::new(CpuDevice::with_isa(options(numerics), n_threads, isa).unwrap())
}

/// With the best instruction set, on one thread.
fn best(numerics: Numerics) -> Box<dyn Device> {
    cpu_device(numerics, Isa::available(numerics)[0], 1)
}

/// The layers on a device whose every block holds NaN.
fn cpu(shape: &Shape, numerics: Numerics, isa: Isa, n_threads: usize) -> TestModel {
    poisoned(cpu_device(numerics, isa, n_threads), shape).0
}

fn poisoned(mut device: Box<dyn Device>, shape: &Shape) -> (TestModel, Poison) {
    let layers = Layers::add(&mut *device, shape, 0);
    let poison = Poison::add(&mut *device, shape);
    device.allocate_kv(layers.n_blocks()).unwrap();
    let all: Vec<BlockId> = (0..layers.n_blocks()).map(BlockId).collect();
    poison.spoil(&mut *device, &all);
    (TestModel { device, layers }, poison)
}

fn bits(rows: &[Vec<f32>]) -> Vec<Vec<u32>> {
    let of_row = |row: &Vec<f32>| row.iter().map(|x| x.to_bits()).collect();
    rows.iter().map(of_row).collect()
}

#[test]
fn every_instruction_set_agrees_with_f64() {
    // A prefill with a partial last block beside an inert span; decodes beside a chunk; an empty step; a chunk longer
    // than the small windows.
    let steps: [&[Part]; 5] = [
        &[(0, 0..19), (2, 0..0), (1, 0..1)],
        &[(0, 19..20), (1, 1..40), (3, 0..3)],
        &[],
        &[(1, 40..41), (0, 20..45)],
        &[(0, 45..46), (1, 41..42), (3, 3..4)],
    ];
    for shape in all_shapes() {
        let mut oracle = TestModel::new(Box::new(ReferenceDevice::default()), &shape);
        let want: Vec<f32> = steps
            .iter()
            .flat_map(|parts| oracle.step(parts).concat())
            .collect();
        for numerics in NUMERICS {
            for isa in Isa::available(numerics) {
                let mut model = cpu(&shape, numerics, isa, 2);
                let got: Vec<f32> = steps
                    .iter()
                    .flat_map(|parts| model.step(parts).concat())
                    .collect();
                assert_eq!(want.len(), got.len());
                // Values are of order 1. f32 products round by 2^-24 in sums of a few hundred terms; bf16 rounds each
                // factor by up to 2^-9, and two dozen roundings follow each other.
                let tolerance = match numerics.weights {
                    Precision::F32 => 3e-5,
                    Precision::BF16 => 0.1,
                };
                let near = want
                    .iter()
                    .zip(&got)
                    .filter(|(want, got)| (*want - *got).abs() < tolerance);
                let n_far = want.len() - near.count();
                // Where two experts are nearly equal, what bf16 rounds may choose the other one: a few tokens differ.
                let may_be_far = match (numerics.weights, shape.routing) {
                    (Precision::BF16, Some(_)) => want.len() / 4,
                    _ => 0,
                };
                assert!(
                    n_far <= may_be_far,
                    "{isa:?} {numerics:?} {shape:?}: {n_far} of {} are far off",
                    want.len()
                );
            }
        }
    }
}

#[test]
fn a_long_context_agrees_with_f64() {
    let windowed = |window| Shape {
        window: Some(window),
        ..SMALL
    };
    for shape in [SMALL, windowed(5), windowed(256), windowed(300)] {
        let steps: [&[Part]; 3] = [&[(0, 0..600)], &[(0, 600..601)], &[(0, 601..602)]];
        let mut oracle = TestModel::new(Box::new(ReferenceDevice::default()), &shape);
        let want = steps.map(|parts| oracle.step(parts)[0].clone());
        let numerics = Numerics::uniform(Precision::F32);
        for isa in Isa::available(numerics) {
            let mut model = cpu(&shape, numerics, isa, 2);
            for (parts, want) in steps.into_iter().zip(&want) {
                let got = model.step(parts);
                let differences = want.iter().zip(&got[0]).map(|(a, b)| (a - b).abs());
                let worst = differences.fold(0.0, f32::max);
                assert!(worst < 1e-4, "{isa:?} {:?}: {worst}", shape.window);
            }
        }
    }
}

/// The block that [`Layers::input`] gives a sequence's `i`-th block of a group.
fn block(model: &TestModel, sequence: u32, i: u32, group: u32) -> BlockId {
    BlockId((i * MAX_SEQUENCES as u32 + sequence) * model.layers.n_groups as u32 + group)
}

#[test]
fn copied_blocks_hold_what_their_sources_do() {
    for shape in [SMALL, OTHERS[1]] {
        for numerics in NUMERICS {
            let mut model = TestModel::new(best(numerics), &shape);
            model.step(&[(0, 0..20)]);
            let mut input = model.layers.input(&[(0, 20..21)]);
            let want = model.layers.step(&mut *model.device, &input);
            for update in &mut input.table_updates {
                for (i, entry) in (0..).zip(&mut update.blocks) {
                    let copy = block(&model, 7, i, update.group);
                    input.copies.push((*entry, copy));
                    *entry = copy;
                }
            }
            assert_eq!(model.layers.step(&mut *model.device, &input), want);
            // The copies stay when another sequence takes the sources.
            let mut other = model.layers.input(&[(3, 0..21)]);
            other.table_updates = model.layers.input(&[(0, 0..21)]).table_updates;
            other.spans[0].row = TableRow(0);
            model.layers.step(&mut *model.device, &other);
            input.copies.clear();
            assert_eq!(model.layers.step(&mut *model.device, &input), want);
        }
    }
}

#[test]
fn what_an_earlier_sequence_left_in_a_block_is_never_seen() {
    // An odd number of tokens shares the last pair of values with a slot that held NaN before.
    for shape in [SMALL, GROUPED] {
        for numerics in NUMERICS {
            let mut fresh = TestModel::new(best(numerics), &shape);
            let (mut used, _) = poisoned(best(numerics), &shape);
            for parts in [&[(0, 0..7)], &[(0, 7..8)], &[(0, 8..9)], &[(0, 9..20)]] {
                let got = used.step(parts);
                assert!(got[0].iter().all(|x| x.is_finite()));
                assert_eq!(bits(&fresh.step(parts)), bits(&got), "{numerics:?}");
            }
        }
    }
}

#[test]
fn what_is_behind_a_window_is_never_read() {
    for (shape, n) in [(OTHERS[0], 40), (OTHERS[1], 40), (OTHERS[2], 420)] {
        for numerics in NUMERICS {
            let mut want = TestModel::new(best(numerics), &shape);
            let (mut model, poison) = poisoned(best(numerics), &shape);
            want.step(&[(0, 0..n)]);
            model.step(&[(0, 0..n)]);
            // The blocks wholly behind the window of the next token have gone to another sequence.
            let behind = (n + 1 - shape.window.unwrap()) / shape.block_size as u32;
            assert!(behind > 0 && model.layers.n_groups == 2);
            let blocks: Vec<BlockId> = (0..behind).map(|i| block(&model, 0, i, 1)).collect();
            poison.spoil(&mut *model.device, &blocks);
            for parts in [&[(0, n..n + 1)], &[(0, n + 1..n + 9)]] {
                let got = model.step(parts);
                assert!(got[0].iter().all(|x| x.is_finite()));
                assert_eq!(bits(&want.step(parts)), bits(&got), "{shape:?}");
            }
        }
    }
}

/// Logits of a sequence's last token, its tokens cut at the given places, beside others or alone.
fn run(model: &mut TestModel, n: u32, cuts: &[u32], crowd: &[u32]) -> Vec<u32> {
    let mut bounds: Vec<u32> = cuts.iter().map(|cut| cut % n).chain([0, n]).collect();
    bounds.sort_unstable();
    bounds.dedup();
    let mut last = Vec::new();
    for (i, bound) in bounds.windows(2).enumerate() {
        let mut parts: Vec<Part> = crowd
            .iter()
            .zip(1..)
            .map(|(&n, sequence)| (sequence, i as u32 * n..(i as u32 + 1) * n))
            .collect();
        let own = parts.len() / 2;
        parts.insert(own, (0, bound[0]..bound[1]));
        let before = parts[..own]
            .iter()
            .filter(|(_, positions)| !positions.is_empty())
            .count();
        last = model.step(&parts)[before]
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
        shape in 0..LLAMAS.len() + OTHERS.len(), n in 1u32..400, cuts in prop::collection::vec(any::<u32>(), 0..5),
        crowd in prop::collection::vec(0u32..12, 0..4), n_threads in 2usize..4,
    ) {
        let shape = all_shapes().nth(shape).unwrap();
        for numerics in NUMERICS {
            for isa in Isa::available(numerics) {
                let alone = run(&mut cpu(&shape, numerics, isa, 1), n, &[], &[]);
                let crowded = run(&mut cpu(&shape, numerics, isa, n_threads), n, &cuts, &crowd);
                prop_assert_eq!(alone, crowded, "{:?} {:?} {:?}", isa, numerics, shape);
            }
        }
    }
}

#[test]
fn a_span_of_several_tokens_equals_single_decodes() {
    for shape in all_shapes() {
        for numerics in NUMERICS {
            for isa in Isa::available(numerics) {
                let mut at_once = cpu(&shape, numerics, isa, 2);
                let mut singly = cpu(&shape, numerics, isa, 2);
                // Up to the last positions of a partition, and over into the next.
                for model in [&mut at_once, &mut singly] {
                    model.step(&[(0, 0..253), (1, 0..9)]);
                }
                let mut input = at_once.layers.input(&[(0, 253..259), (1, 9..10)]);
                input.logits = (0..7).collect();
                let at_once = at_once.layers.step(&mut *at_once.device, &input);
                let single: Vec<Vec<f32>> = (253..259)
                    .map(|p| singly.step(&[(0, p..p + 1)])[0].clone())
                    .collect();
                assert_eq!(bits(&at_once[..6]), bits(&single), "{isa:?} {shape:?}");
            }
        }
    }
}

#[test]
fn two_models_in_turn_equal_each_alone() {
    let steps: [&[Part]; 3] = [&[(0, 0..30), (2, 0..7)], &[(2, 7..8)], &[(0, 30..47)]];
    let seeds = [3, 4];
    for shapes in [[SMALL, OTHERS[8]], [OTHERS[11], GROUPED]] {
        for numerics in NUMERICS {
            let mut together = best(numerics);
            let models = [0, 1].map(|i| Layers::add(&mut *together, &shapes[i], seeds[i]));
            let first_of_second = models[0].n_blocks();
            together
                .allocate_kv(first_of_second + models[1].n_blocks())
                .unwrap();
            let mut alone = [0, 1].map(|i| {
                let mut device = best(numerics);
                let layers = Layers::add(&mut *device, &shapes[i], seeds[i]);
                device.allocate_kv(layers.n_blocks()).unwrap();
                (device, layers)
            });
            for parts in steps {
                for (i, (device, layers)) in alone.iter_mut().enumerate() {
                    let mut input = layers.input(parts);
                    let want = layers.step(&mut **device, &input);
                    let blocks = input.table_updates.iter_mut().flat_map(|u| &mut u.blocks);
                    for block in blocks {
                        block.0 += i as u32 * first_of_second;
                    }
                    let got = models[i].step(&mut *together, &input);
                    assert_eq!(bits(&want), bits(&got), "{numerics:?}, model {i}");
                }
            }
        }
    }
}

#[test]
#[should_panic(expected = "a handle of another model")]
fn a_model_may_not_use_the_handles_of_another() {
    let mut device = best(NUMERICS[1]);
    let first = Layers::add(&mut *device, &SMALL, 0);
    let second = Layers::add(&mut *device, &SMALL, 1);
    device.allocate_kv(first.n_blocks()).unwrap();
    let input = StepInput {
        model: second.model,
        ..first.input(&[(0, 0..3)])
    };
    // The pass is the first model's.
    let _ = device.submit(&input, &|ops| first.forward(ops));
}

/// Runs a step and samples: the logits and the tokens.
fn sample(
    model: &mut TestModel,
    input: &StepInput,
    requests: &[LogitsRow],
) -> (Vec<Vec<f32>>, Vec<u32>) {
    let (layers, device) = (model.layers, &mut *model.device);
    let ticket = device.submit(input, &|ops| layers.forward(ops)).unwrap();
    device.sample(&ticket, layers.logits, requests).unwrap();
    let output = device.collect(ticket).unwrap();
    let logits = device.read_logits(layers.logits).unwrap();
    (
        logits.chunks(VOCABULARY).map(<[f32]>::to_vec).collect(),
        output.sampled.iter().map(|sampled| sampled.token).collect(),
    )
}

#[test]
fn several_rows_of_logits_may_name_one_token() {
    let request = |seed| LogitsRow {
        request: LogitsRequest::Sample {
            params: SamplingParams {
                temperature: 2.0,
                top_p: 1.0,
                top_k: None,
                min_p: 0.0,
                seed,
            },
            output_index: 0,
            edit: LogitsEdit::default(),
        },
        n_logprobs: None,
    };
    let requests: Vec<LogitsRow> = (0..4).map(request).collect();
    let parts = [(0, 0..20), (1, 0..5)];
    let mut models = [(); 2].map(|()| TestModel::new(best(NUMERICS[1]), &SMALL));
    let single = models[0].step(&parts);
    let mut input = models[0].layers.input(&parts);
    input.logits = vec![19, 19, 19, 24];
    let [(rows, tokens), again] = models.each_mut().map(|m| sample(m, &input, &requests));
    assert_eq!((&rows, &tokens), (&again.0, &again.1));
    let want = [&single[0], &single[0], &single[0], &single[1]].map(Vec::clone);
    assert_eq!(bits(&rows), bits(&want));
    let mut scratch = sampling::Scratch::default();
    for ((row, request), token) in rows.iter().zip(&requests).zip(&tokens) {
        let sampled = sampling::sample_row(row, request, &mut scratch);
        assert_eq!(sampled.token, *token);
    }
    assert!(
        tokens[..3].iter().any(|token| *token != tokens[0]),
        "three seeds, three tokens"
    );

    // The next step takes what was sampled, by row of logits.
    let mut next = models[0].layers.input(&[(0, 20..21), (1, 5..6)]);
    let inputs = [2, 3].map(|logits_row| TokenInput::Sampled { logits_row });
    next.tokens = inputs.to_vec();
    let by_row = sample(&mut models[0], &next, &requests[..2]);
    next.tokens = tokens[2..].iter().map(|&id| TokenInput::Id(id)).collect();
    assert_eq!(by_row, sample(&mut models[1], &next, &requests[..2]));
}

#[test]
fn what_cannot_be_is_said_in_words() {
    let numerics = Numerics {
        activations: Precision::F32,
        ..NUMERICS[1]
    };
    let error = CpuDevice::new(options(numerics), NonZeroUsize::MIN).err();
    assert_eq!(
        error.unwrap().to_string(),
        "the cpu device does not support activations in float32 with weights in bfloat16; both in one type are"
    );
    let mut device = best(NUMERICS[1]);
    let mut bad = SMALL.model_shape();
    bad.caches[0].head_dim = 3;
    assert_eq!(
        device.add_model(&bad).unwrap_err().to_string(),
        "the cpu device does not support 3 KV heads of 3 elements; an even number of elements is"
    );
    let mut device = best(NUMERICS[1]);
    Layers::add(&mut *device, &SMALL, 0);
    let error = device.allocate_kv(u32::MAX).unwrap_err().to_string();
    assert!(error.starts_with("the KV cache needs"), "{error}");
}
