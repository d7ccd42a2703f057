//! The whole CUDA device against the f64 oracle: on the shim, or on a GPU (gpu.rs).

use crate::layer::{Layers, MAX_SEQUENCES, Part, Routing, Shape, TestModel, VOCABULARY};
use kvasir_kernels::cuda::CudaDevice;
use kvasir_kernels::cuda::shim::Shim;
use kvasir_kernels::device::*;
use kvasir_kernels::reference::ReferenceDevice;
use kvasir_kernels::shape::*;
use kvasir_kernels::step::*;
use std::num::NonZeroU32;
use std::sync::Arc;

const LLAMA: Shape = Shape::llama([3, 3, 64, 21, 35, 8]);

/// What a Llama needs, in several sizes; then one kind of difference each, and all of them together.
fn shapes() -> Vec<(&'static str, Shape)> {
    let small = Shape::llama([4, 2, 64, 48, 40, 16]);
    let routing = Routing {
        n_experts: 6,
        top_k: 2,
        renormalize: true,
    };
    vec![
        ("odd sizes", LLAMA),
        ("grouped heads", Shape::llama([10, 2, 80, 100, 130, 24])),
        ("long blocks", Shape::llama([8, 1, 128, 64, 257, 128])),
        ("hardly anything", Shape::llama([1, 1, 256, 1, 1, 16])),
        (
            "a window",
            Shape {
                window: Some(20),
                ..small
            },
        ),
        (
            "a window over partitions, and a soft cap",
            Shape {
                window: Some(257),
                soft_cap: Some(0.7),
                ..small
            },
        ),
        (
            "norms of heads, and a partial rotary embedding",
            Shape {
                head_norms: true,
                n_frequencies: 12,
                ..small
            },
        ),
        (
            "no rotary frequencies",
            Shape {
                n_frequencies: 0,
                ..small
            },
        ),
        (
            "GELU",
            Shape {
                activation: Activation::GeluTanh,
                ..small
            },
        ),
        (
            "experts",
            Shape {
                routing: Some(routing),
                ..small
            },
        ),
        (
            "all of it",
            Shape {
                window: Some(40),
                soft_cap: Some(1.5),
                head_norms: true,
                n_frequencies: 16,
                routing: Some(Routing {
                    n_experts: 5,
                    top_k: 3,
                    renormalize: false,
                }),
                activation: Activation::GeluTanh,
                ..small
            },
        ),
    ]
}

const OPTIONS: DeviceOptions = DeviceOptions {
    numerics: Numerics::uniform(Precision::BF16),
    memory_limit: None,
};

pub(crate) fn device() -> Box<dyn Device> {
    #[cfg(feature = "cuda")]
    if crate::gpu::wanted() {
        let gpu = kvasir_kernels::cuda::gpu::Gpu::open().unwrap();
        return Box::new(CudaDevice::new(gpu, OPTIONS).unwrap());
    }
    Box::new(CudaDevice::new(Shim::default(), OPTIONS).unwrap())
}

fn cuda(shape: &Shape) -> TestModel {
    TestModel::new(device(), shape)
}

fn oracle(shape: &Shape) -> TestModel {
    TestModel::new(Box::new(ReferenceDevice::default()), shape)
}

/// The largest difference; NaN where there is one.
fn worst(want: &[f32], got: &[f32]) -> f32 {
    let errors = want.iter().zip(got).map(|(a, b)| (a - b).abs());
    errors.fold(0.0, |worst, e| if e <= worst { worst } else { e })
}

#[test]
fn mixed_steps_agree_with_f64() {
    for (why, shape) in shapes() {
        let (mut model, mut oracle) = (cuda(&shape), oracle(&shape));
        // A prefill with a partial last block beside an inert span; decodes beside a chunk; an empty step; decodes of
        // one shape often enough to be captured and replayed; several tokens to verify.
        // More than one partition where that makes a difference: the oracle is slow.
        let n = match shape.window {
            Some(_) => 258,
            None if why == "odd sizes" => 258,
            None => 30,
        };
        let steps: [&[Part]; 8] = [
            &[(0, 0..19), (2, 0..0), (1, 0..1)],
            &[(0, 19..20), (1, 1..40), (3, 0..n)],
            &[],
            &[(1, 40..41), (3, n..n + 1)],
            &[(1, 41..42), (3, n + 1..n + 2)],
            &[(3, n + 2..n + 3), (0, 20..21)],
            &[(0, 21..22), (1, 42..43), (3, n + 3..n + 4)],
            &[(0, 22..27), (3, n + 4..n + 12), (1, 43..44)],
        ];
        let mut errors = Vec::new();
        for parts in steps {
            let (want, got) = (oracle.step(parts), model.step(parts));
            assert_eq!(want.len(), got.len());
            errors.extend(want.iter().zip(&got).map(|(want, got)| worst(want, got)));
        }
        errors.sort_by(f32::total_cmp);
        // Logits of experts that nearly tie are rounded to the other order now and then, which changes a row for good.
        let n_doubtful = if shape.routing.is_some() { 2 } else { 0 };
        let sure = errors.len() - n_doubtful;
        // Activations of order 1 are rounded to bfloat16 between operations, by 2^-9 each, some thirty times.
        assert!(errors[sure - 1] < 0.12, "{why}: {errors:?}");
        assert!(errors.iter().all(|error| *error < 2.0), "{why}: {errors:?}");
    }
}

#[test]
fn tokens_to_verify_equal_single_decodes() {
    for (why, shape) in shapes() {
        // On a GPU, products of another number of rows are rounded otherwise, and may choose other experts.
        let exact = !crate::gpu::wanted();
        if why == "odd sizes" || shape.window.is_some() || (exact && shape.routing.is_some()) {
            let (mut together, mut one_by_one) = (cuda(&shape), cuda(&shape));
            for model in [&mut together, &mut one_by_one] {
                model.step(&[(0, 0..253), (5, 0..30)]);
            }
            let mut singles: Vec<Vec<f32>> = Vec::new();
            for p in 253..253 + MAX_DECODE_TOKENS {
                singles.extend(one_by_one.step(&[(0, p..p + 1)]));
            }
            // Three steps of one shape: run, captured, replayed.
            for row in 0..3 {
                let part = [(0, 253..253 + MAX_DECODE_TOKENS)];
                let mut input = together.layers.input(&part);
                // The last token is named twice, as where a prompt is answered more than once.
                input.logits = (0..MAX_DECODE_TOKENS).collect();
                input.logits[0] = 1;
                let got = together.layers.step(&mut *together.device, &input);
                assert_eq!(got[0], got[1], "{why}: two rows of one token");
                for (i, (got, want)) in got.iter().zip(&singles).enumerate().skip(1) {
                    let same = !exact || got == want;
                    let near = worst(want, got);
                    assert!(
                        same && near < 0.05,
                        "{why}: token {i} in step {row}: {near}"
                    );
                }
            }
        }
    }
}

#[test]
fn two_models_in_turn_equal_each_alone() {
    let all = shapes();
    let find = |name| all.iter().find(|(why, _)| *why == name).unwrap().1;
    for (first, second) in [
        // Shares of a page of two sizes, then of one size in groups of two sizes.
        (find("all of it"), find("grouped heads")),
        (find("a window"), find("experts")),
    ] {
        let mut device = device();
        let both = [
            Layers::add(&mut *device, &first, 0),
            Layers::add(&mut *device, &second, 1),
        ];
        // The second model's sequences take the blocks behind the first one's.
        let offset = both[0].n_blocks();
        device.allocate_kv(offset + both[1].n_blocks()).unwrap();
        let mut alone = [cuda(&first), cuda_with_seed(&second, 1)];
        let steps: [&[Part]; 5] = [
            &[(0, 0..40), (1, 0..5)],
            &[(0, 40..41), (1, 5..6)],
            &[(0, 41..42), (1, 6..7)],
            &[(0, 42..43), (1, 7..8)],
            &[(0, 43..47), (1, 8..20)],
        ];
        for parts in steps {
            for (i, layers) in both.iter().enumerate() {
                let mut input = layers.input(parts);
                let blocks = input.table_updates.iter_mut().flat_map(|u| &mut u.blocks);
                blocks.for_each(|block| block.0 += offset * i as u32);
                let got = layers.step(&mut *device, &input);
                assert_eq!(got, alone[i].step(parts), "model {i}, {parts:?}");
            }
        }
    }
}

fn cuda_with_seed(shape: &Shape, seed: u32) -> TestModel {
    let mut device = device();
    let layers = Layers::add(&mut *device, shape, seed);
    device.allocate_kv(layers.n_blocks()).unwrap();
    TestModel { device, layers }
}

/// Three sequences of which tokens are sampled, greedy and random.
struct Decoding {
    model: TestModel,
}

/// Two of three rows penalise what they have sampled; one of them may not sample token 3.
fn penalties(sampled: &[Vec<Sampled>]) -> [LogitsEdit; 3] {
    let penalised = |l: usize| {
        let mut counts = std::collections::BTreeMap::new();
        for step in sampled {
            *counts.entry(step[l].token).or_default() += 1;
        }
        let seen = counts.into_iter();
        let seen = seen.map(|(token, n_outputs)| SeenToken { token, n_outputs });
        LogitsEdit {
            penalties: Some(Penalties {
                repetition: 1.5,
                frequency: 0.5,
                presence: 0.25,
                seen: Arc::new(seen.collect()),
            }),
            ..LogitsEdit::default()
        }
    };
    let ban = TokenBias {
        token: 3,
        bias: f32::NEG_INFINITY,
    };
    let banned = LogitsEdit {
        biases: [ban].into(),
        ..penalised(2)
    };
    [penalised(0), LogitsEdit::default(), banned]
}

impl Decoding {
    fn submit(&mut self, i: u32, known: Option<&[Sampled]>) -> Ticket {
        let ticket = self.start(i, known);
        self.sample(&ticket, i, Default::default());
        ticket
    }

    fn start(&mut self, i: u32, known: Option<&[Sampled]>) -> Ticket {
        let lengths = [5, 3, 30];
        let parts: Vec<Part> = match i {
            0 => (0..).zip(lengths).map(|(s, n)| (s, 0..n)).collect(),
            _ => (0..)
                .zip(lengths)
                .map(|(s, p)| (s, p + i - 1..p + i))
                .collect(),
        };
        let mut input = self.model.layers.input(&parts);
        if i > 0 {
            for (token, l) in input.tokens.iter_mut().zip(0..) {
                *token = match known {
                    Some(sampled) => TokenInput::Id(sampled[l as usize].token),
                    None => TokenInput::Sampled { logits_row: l },
                };
            }
        }
        let TestModel { device, layers } = &mut self.model;
        device.submit(&input, &|ops| layers.forward(ops)).unwrap()
    }

    fn sample(&mut self, ticket: &Ticket, i: u32, edits: [LogitsEdit; 3]) {
        let request = |(l, edit): (usize, LogitsEdit)| LogitsRow {
            request: LogitsRequest::Sample {
                params: SamplingParams {
                    temperature: [0.0, 0.7, 1.3][l],
                    top_p: [1.0, 0.9, 1.0][l],
                    top_k: NonZeroU32::new([0, 0, 9][l]),
                    min_p: [0.0, 0.01, 0.0][l],
                    seed: 7 + l as u64,
                },
                output_index: i,
                edit,
            },
            n_logprobs: Some(2),
        };
        let requests: Vec<LogitsRow> = edits.into_iter().enumerate().map(request).collect();
        let TestModel { device, layers } = &mut self.model;
        device.sample(ticket, layers.logits, &requests).unwrap();
    }

    fn collect(&mut self, ticket: Ticket) -> Vec<Sampled> {
        self.model.device.collect(ticket).unwrap().sampled
    }
}

/// Decodes `n` tokens of each, `ahead` steps before the tokens are known.
fn decode(ahead: bool, n: u32) -> Vec<Vec<Sampled>> {
    let mut decoding = Decoding {
        model: cuda(&LLAMA),
    };
    let mut sampled: Vec<Vec<Sampled>> = Vec::new();
    let mut under_way = Vec::new();
    for i in 0..n {
        let known = if ahead { None } else { sampled.last().cloned() };
        under_way.push(decoding.submit(i, known.as_deref()));
        if !ahead || under_way.len() == decoding.model.device.depth() {
            let oldest = under_way.remove(0);
            sampled.push(decoding.collect(oldest));
        }
    }
    for ticket in under_way {
        sampled.push(decoding.collect(ticket));
    }
    sampled
}

#[test]
fn a_step_ahead_gives_the_same_tokens() {
    let known = decode(false, 9);
    assert_eq!(known.len(), 9);
    let mut all = known.iter().flatten();
    assert!(all.all(|s| s.logprob.is_some() && s.top.len() == 2));
    assert_eq!(decode(true, 9), known);
}

/// Decodes with edits that depend on every token before: a step ahead the pass starts first, then the step before is
/// collected, and then the rows are edited and sampled.
fn decode_edited(mut decoding: Decoding, ahead: bool, n: u32) -> Vec<Vec<Sampled>> {
    let mut sampled: Vec<Vec<Sampled>> = Vec::new();
    let mut before = None;
    for i in 0..n {
        let known = if ahead { None } else { sampled.last().cloned() };
        let ticket = decoding.start(i, known.as_deref());
        if let Some(before) = before.take() {
            sampled.push(decoding.collect(before));
        }
        decoding.sample(&ticket, i, penalties(&sampled));
        match ahead {
            true => before = Some(ticket),
            false => sampled.push(decoding.collect(ticket)),
        }
    }
    sampled.extend(before.map(|ticket| decoding.collect(ticket)));
    sampled
}

#[test]
fn edits_may_need_the_step_before_and_are_those_of_the_host() {
    let model = || Decoding {
        model: cuda(&LLAMA),
    };
    let known = decode_edited(model(), false, 9);
    assert_eq!(decode_edited(model(), true, 9), known);
    let plain = decode(false, 9);
    let tokens = |sampled: &[Vec<Sampled>], l: usize| -> Vec<u32> {
        sampled.iter().map(|step| step[l].token).collect()
    };
    assert_eq!(tokens(&known, 1), tokens(&plain, 1), "a row without edits");
    assert_ne!(tokens(&known, 0), tokens(&plain, 0), "greedy, penalised");
    assert!(!tokens(&known, 2).contains(&3), "banned");
    // The same logits, edited and sampled on the host: of the greedy row, which needs no parameters.
    let mut decoding = model();
    let mut sampled: Vec<Vec<Sampled>> = Vec::new();
    for output_index in 0..4 {
        let ticket = decoding.start(output_index, sampled.last().map(Vec::as_slice));
        let edits = penalties(&sampled);
        decoding.sample(&ticket, output_index, edits.clone());
        let found = decoding.collect(ticket);
        let TestModel { device, layers } = &mut decoding.model;
        let logits = device.read_logits(layers.logits).unwrap();
        let [edit, ..] = edits;
        let params = SamplingParams::GREEDY;
        let row = LogitsRow {
            request: LogitsRequest::Sample {
                params,
                output_index,
                edit,
            },
            n_logprobs: Some(2),
        };
        let mut scratch = kvasir_kernels::sampling::Scratch::default();
        let logits = &logits[..VOCABULARY];
        let want = kvasir_kernels::sampling::sample_row(logits, &row, &mut scratch);
        assert_eq!(found[0], want);
        sampled.push(found);
    }
}

#[test]
fn a_device_with_graphs_and_steps_under_way_ends_in_order() {
    // The shim's driver refuses to end before its graphs.
    let mut decoding = Decoding {
        model: cuda(&LLAMA),
    };
    for i in 0..6 {
        let ticket = decoding.submit(i, None);
        decoding.collect(ticket);
    }
    let under_way = [decoding.submit(6, None), decoding.submit(7, None)];
    assert_ne!(under_way[0], under_way[1]);
    drop(decoding);
}

#[test]
fn copied_blocks_hold_what_their_sources_do() {
    for (why, shape) in shapes() {
        let mut model = cuda(&shape);
        model.step(&[(0, 0..45)]);
        let want = model.step(&[(0, 45..46)]);
        let mut input = model.layers.input(&[(0, 45..46)]);
        // To where the last sequence's would be.
        let last = MAX_SEQUENCES as u32 - 1;
        let n_groups = model.layers.n_groups as u32;
        let blocks = input.table_updates.iter_mut().flat_map(|u| &mut u.blocks);
        for block in blocks {
            let to = BlockId(block.0 + last * n_groups);
            input.copies.push((*block, to));
            *block = to;
        }
        let got = model.layers.step(&mut *model.device, &input);
        assert_eq!(got, want, "{why}");
    }
}

#[test]
fn more_table_changes_than_one_trip_takes_arrive() {
    let want = cuda(&LLAMA).step(&[(1, 0..20)]);
    let mut model = cuda(&LLAMA);
    // The entries that count come last, behind more others than go in one trip.
    let mut input = model.layers.input(&[(1, 0..20)]);
    let others = TableUpdate {
        group: 0,
        row: TableRow(0),
        first: 0,
        blocks: (0..80).map(BlockId).collect(),
    };
    for _ in 0..500 {
        input.table_updates.insert(0, others.clone());
    }
    let got = model.layers.step(&mut *model.device, &input);
    assert_eq!(got, want);
}

#[test]
fn memory_is_accounted_for() {
    let model = cuda(&LLAMA);
    let memory = model.device.memory();
    assert!(memory.weights >= (VOCABULARY * LLAMA.hidden * 2) as u64);
    assert!(memory.workspace > 0 && memory.other > 0);
    assert!(memory.weights + memory.workspace + memory.other < memory.limit);
}

#[test]
fn what_is_not_supported_is_said_in_words() {
    let f32_weights = DeviceOptions {
        numerics: Numerics {
            weights: Precision::F32,
            ..OPTIONS.numerics
        },
        ..OPTIONS
    };
    let refused = CudaDevice::new(Shim::default(), f32_weights);
    assert_eq!(
        refused.err().unwrap().to_string(),
        "the cuda device does not support weights in float32; use --dtype bfloat16, or --device cpu"
    );
    let shape = |change: fn(&mut ModelShape)| {
        let mut shape = LLAMA.model_shape();
        change(&mut shape);
        shape
    };
    for (shape, want) in [
        (
            Shape::llama([3, 3, 48, 21, 35, 8]).model_shape(),
            "the cuda device does not support head_dim 48; [64, 80, 96, 128, 192, 256] are",
        ),
        (
            shape(|shape| shape.block_size = 4),
            "the cuda device does not support --block-size 4; 8 to 128 tokens are",
        ),
        (
            shape(|shape| shape.max_positions = 1 << 26),
            "the cuda device does not support 67108864 positions; 33554432 are",
        ),
    ] {
        assert_eq!(device().add_model(&shape).err().unwrap().to_string(), want);
    }
    let mut large = device();
    let shape = shape(|shape| shape.vocab_size = 1 << 19);
    large.add_model(&shape).unwrap();
    assert_eq!(
        large.plan_logits().err().unwrap().to_string(),
        "the cuda device does not support a vocabulary of 524288 tokens; 262144 are"
    );
}

#[test]
#[should_panic(expected = "a buffer of another model")]
fn a_buffer_of_another_model_is_refused() {
    let mut device = device();
    let first = Layers::add(&mut *device, &LLAMA, 0);
    let second = Layers::add(&mut *device, &LLAMA, 1);
    device.allocate_kv(first.n_blocks()).unwrap();
    let input = StepInput {
        model: second.model,
        ..second.input(&[(0, 0..1)])
    };
    let _ = device.submit(&input, &|ops| first.forward(ops));
}
