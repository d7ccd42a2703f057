//! Each request gives through the whole engine exactly what it gives alone: in a crowd, cut into chunks, preempted; whatever
//! it changes in its logits.
//!
//! Real models, real steps, pools and budgets so small that everything happens.
#![allow(clippy::unwrap_used)] // A test's helpers, outside of #[test] functions.

#[path = "golden_engine/beams.rs"]
mod beams;
mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::num::NonZeroU32;
use std::path::{Path, PathBuf};
use std::sync::mpsc::Receiver;

use kvasir_kernels::shape::{Limits, Precision};
use kvasir_server::engine::constraint::Constraint;
use kvasir_server::engine::logits::{LogitsOptions, LogitsProcessors};
use kvasir_server::engine::{
    Admission, Counters, Engine, EngineHandle, EngineOutputs, FinishReason, Request, RequestId,
    SamplingParams, SubmitError, TokenLogprobs,
};
use kvasir_server::model::{LoadOptions, ModelFiles, cache_groups, load};

use serde_json::Value;

use support::{DeviceKind, cases, floats, golden, tokens};

/// A size of everything that may matter.
#[derive(Clone, Copy)]
struct Shape {
    block_size: u32,
    n_blocks: u32,
    max_num_seqs: u32,
    max_num_batched_tokens: u32,
    precision: Precision,
}

const ALONE: Shape = Shape {
    block_size: 16,
    n_blocks: 64,
    max_num_seqs: 1,
    max_num_batched_tokens: 512,
    precision: Precision::F32,
};

/// Prompts of at most this length take part.
const LONGEST_PROMPT: usize = 130;

/// The engine over a case. `shape.n_blocks` counts blocks of a model with one cache group; another gets as many more than
/// its longest sequence needs, for each of its groups.
fn start(case: &Path, kind: DeviceKind, shape: Shape) -> (Engine, Receiver<EngineOutputs>) {
    let positive = |n| NonZeroU32::new(n).unwrap();
    let context = support::longest_context(&golden(case), LONGEST_PROMPT);
    let limits = Limits {
        max_tokens: shape.max_num_batched_tokens as usize,
        max_sequences: shape.max_num_seqs as usize,
        max_logits_rows: shape.max_num_batched_tokens as usize,
        max_blocks_per_sequence: context.div_ceil(shape.block_size) as usize,
    };
    let decoder = support::config(case).decoder;
    let groups = cache_groups(&decoder.model_shape(context, shape.block_size, limits));
    let spare = shape.n_blocks - context.div_ceil(shape.block_size);
    let n_blocks = groups.blocks_for(context) + spare * groups.n_groups();
    let options = LoadOptions {
        block_size: positive(shape.block_size),
        max_model_len: Some(positive(context)),
        max_num_seqs: positive(shape.max_num_seqs),
        max_num_batched_tokens: positive(shape.max_num_batched_tokens),
        n_blocks: Some(positive(n_blocks)),
        memory_utilization: 0.9,
        precision: Some(shape.precision),
        memory_limit: None,
    };
    let files = ModelFiles::directory(case).unwrap();
    let loaded = load(&files, &options, |options| kind.make(options), |_| {}).unwrap();
    Engine::start(Box::new(loaded.executor), loaded.info, 1000).unwrap()
}

type Answer = (Vec<TokenLogprobs>, Vec<TokenLogprobs>, FinishReason);

/// Sends all requests at once, waits for all answers, and stops the engine.
fn answers(
    (engine, outputs): (Engine, Receiver<EngineOutputs>),
    requests: &[Request],
) -> (BTreeMap<RequestId, Answer>, Counters) {
    let handle = engine.handle();
    let (answers, admissions) = answers_of(&handle, &outputs, requests);
    handle.stop();
    engine.join().unwrap();
    assert_eq!(
        admissions.len() as u64,
        requests.len() as u64 + handle.counters().preemptions,
        "each request is admitted once, and once more for each preemption"
    );
    let report = handle.load();
    assert_eq!(report.blocks.unwrap().active, 0, "all blocks come back");
    assert_eq!(report.queue.unwrap().running, 0);
    (answers, handle.counters())
}

/// Sends all requests at once, and waits for all answers; also who was admitted.
fn answers_of(
    handle: &EngineHandle,
    outputs: &Receiver<EngineOutputs>,
    requests: &[Request],
) -> (BTreeMap<RequestId, Answer>, Vec<Admission>) {
    for request in requests {
        handle.submit(request.clone()).unwrap();
    }
    let mut parts: BTreeMap<RequestId, (Vec<TokenLogprobs>, Vec<TokenLogprobs>)> = BTreeMap::new();
    let mut answers = BTreeMap::new();
    let (mut admitted, mut admissions) = (BTreeSet::new(), Vec::new());
    while answers.len() < requests.len() {
        let EngineOutputs {
            admitted: new,
            outputs,
        } = outputs.recv().unwrap();
        admitted.extend(new.iter().map(|admission| admission.id));
        admissions.extend(new);
        for output in outputs {
            assert!(
                admitted.contains(&output.id),
                "an output before the admission"
            );
            let (scores, tokens) = parts.entry(output.id).or_default();
            scores.extend(output.prompt_logprobs);
            tokens.extend(output.tokens);
            if let Some(reason) = output.finished {
                let (scores, tokens) = parts.remove(&output.id).unwrap();
                answers.insert(output.id, (scores, tokens, reason));
            }
        }
    }
    (answers, admissions)
}

/// What the random requests change in their logits, each another thing.
fn changes(i: usize, prompt: &[u32], vocab_size: u32) -> LogitsOptions {
    let plain = LogitsOptions::default();
    match i % 4 {
        0 => LogitsOptions {
            repetition_penalty: 1.3,
            presence_penalty: 0.2,
            frequency_penalty: 0.4,
            ..plain
        },
        1 => LogitsOptions {
            bad_words: (1..vocab_size.min(40)).map(|a| vec![a - 1, a]).collect(),
            logit_bias: prompt.iter().map(|&token| (token, 1.5)).collect(),
            ..plain
        },
        2 => LogitsOptions {
            allowed_token_ids: (3..vocab_size.min(60)).collect(),
            frequency_penalty: -0.5,
            ..plain
        },
        _ => plain,
    }
}

/// Greedy and random, short and long, scored and not; the random ones with changes of their logits.
fn requests(case: &Path) -> Vec<Request> {
    let vocab_size = support::config(case).decoder.vocab_size as u32;
    let golden = golden(case);
    let prompts = golden["prompts"]
        .as_array()
        .unwrap()
        .iter()
        .map(|prompt| tokens(&prompt["ids"]));
    let mut requests = Vec::new();
    for (i, prompt) in prompts
        .filter(|prompt| prompt.len() <= LONGEST_PROMPT)
        .enumerate()
    {
        for temperature in [0.0, 0.8] {
            let options = match temperature == 0.0 {
                true => LogitsOptions::default(),
                false => changes(i, &prompt, vocab_size),
            };
            let id = RequestId(requests.len() as u64);
            requests.push(Request {
                logits: LogitsProcessors::new(options, &prompt, &[], vocab_size).map(Box::new),
                sampling: SamplingParams {
                    temperature,
                    top_p: 0.95,
                    top_k: NonZeroU32::new(40),
                    min_p: [0.0, 0.02][i % 2],
                    seed: 5 + i as u64,
                },
                logprobs: Some(3),
                prompt_logprobs: (i % 2 == 1).then_some(1),
                ..Request::greedy(id, prompt.clone(), 24)
            });
        }
    }
    requests
}

/// The greedy answer of Transformers, and how many of its tokens come before the first whose margin is not above `bound`.
fn transformers_answer(golden: &Value, request: &Request, bound: f32) -> (Vec<u32>, usize) {
    let prompts = golden["prompts"].as_array().unwrap();
    let prompt = prompts
        .iter()
        .find(|prompt| tokens(&prompt["ids"]) == request.prompt)
        .unwrap();
    let margins = floats(&prompt["float32"]["margins"]);
    let clear = margins.iter().take_while(|&&margin| margin > bound);
    (tokens(&prompt["float32"]["greedy"]), clear.count())
}

/// On a GPU products are a library's, and prefill and decode attend in another order: a crowd gives what each request
/// gives alone wherever the first two logits are further apart than what bfloat16 costs Transformers itself.
#[cfg(feature = "cuda-shim")]
fn cuda_crowd(case: &Path, shape: Shape) -> Counters {
    let golden = golden(case);
    let bound = golden["margin_bound"].as_f64().unwrap() as f32;
    let greedy = requests(case)
        .into_iter()
        .filter(|r| r.sampling.temperature == 0.0);
    // Each three times, so that a small pool is not enough.
    let requests: Vec<Request> = greedy
        .flat_map(|request| std::iter::repeat_n(request, 3))
        .zip(0..)
        .map(|(request, id)| Request {
            id: RequestId(id),
            ..request
        })
        .collect();
    let (answers, counters) = answers(start(case, DeviceKind::Cuda, shape), &requests);
    for request in &requests {
        let (want, clear) = transformers_answer(&golden, request, bound);
        let (scores, sampled, _) = &answers[&request.id];
        let found: Vec<u32> = sampled.iter().map(|token| token.token).collect();
        let why = format!("{}: {} tokens", case.display(), request.prompt.len());
        assert_eq!(found[..clear], want[..clear], "{why}");
        assert_eq!(found.len(), want.len(), "{why}");
        let n_scores = request
            .prompt_logprobs
            .map_or(0, |_| request.prompt.len() - 1);
        assert_eq!(scores.len(), n_scores, "{why}");
    }
    counters
}

#[cfg(feature = "cuda-shim")]
#[test]
fn cuda_crowds_give_the_tokens_of_transformers() {
    let (mut n_small_pools, mut n_preempted) = (0, 0);
    for case in support::one_of_each_family(support::cuda_cases()) {
        for (why, block_size, n_blocks, max_num_seqs, max_num_batched_tokens, preempts) in [
            ("one crowd, one chunk", 16, 256, 64, 512, false),
            ("small chunks", 8, 256, 16, 19, false),
            (
                "a pool for little more than the longest",
                8,
                21,
                16,
                24,
                true,
            ),
        ] {
            let more: &[u32] = if preempts { &[0, 8, 16, 32, 64] } else { &[0] };
            let seen = more.iter().any(|more| {
                let shape = Shape {
                    block_size,
                    n_blocks: n_blocks + more,
                    max_num_seqs,
                    max_num_batched_tokens,
                    precision: Precision::BF16,
                };
                cuda_crowd(&case, shape).preemptions > 0
            });
            n_small_pools += usize::from(preempts);
            n_preempted += usize::from(seen);
            assert!(preempts || !seen, "{}: {why}", case.display());
        }
    }
    assert!(
        n_preempted * 2 > n_small_pools,
        "{n_preempted} preempted in {n_small_pools} small pools"
    );
}

fn crowd(kind: DeviceKind, precision: Precision, cases: Vec<PathBuf>) {
    // Who is preempted depends on a case's lengths and groups, and on how long its steps take: most of them are.
    let (mut n_small_pools, mut n_preempted) = (0, 0);
    for case in cases {
        let requests = requests(&case);
        for (why, block_size, n_blocks, max_num_seqs, max_num_batched_tokens, preempts) in [
            ("one crowd, one chunk", 16, 256, 64, 512, false),
            ("small chunks", 8, 256, 16, 19, false),
            (
                "a pool for little more than the longest",
                4,
                42,
                16,
                24,
                true,
            ),
            ("blocks of one token", 1, 180, 16, 16, true),
        ] {
            let more: &[u32] = if preempts { &[0, 8, 16, 32, 64] } else { &[0] };
            let tries = more.iter().map(|more| {
                let shape = Shape {
                    block_size,
                    n_blocks: n_blocks + more,
                    max_num_seqs,
                    max_num_batched_tokens,
                    precision,
                };
                answers(start(&case, kind, shape), &requests)
            });
            let (mut crowd, mut counters) = (BTreeMap::new(), Counters::default());
            for tried in tries {
                (crowd, counters) = tried;
                if counters.preemptions > 0 {
                    break;
                }
            }
            n_small_pools += usize::from(preempts);
            n_preempted += usize::from(counters.preemptions > 0);
            assert!(
                preempts || counters.preemptions == 0,
                "{}: {why}",
                case.display()
            );
            // With blocks of the same size: it is part of the order in which a device may sum attention.
            let alone: BTreeMap<RequestId, Answer> = requests
                .iter()
                .flat_map(|request| {
                    let n_blocks = 512 / block_size;
                    let shape = Shape {
                        block_size,
                        n_blocks,
                        precision,
                        ..ALONE
                    };
                    answers(start(&case, kind, shape), std::slice::from_ref(request)).0
                })
                .collect();
            for (id, answer) in &crowd {
                assert_eq!(answer, &alone[id], "{}: {why}: {id:?}", case.display());
            }
        }
    }
    assert!(
        n_preempted * 2 > n_small_pools,
        "{n_preempted} preempted in {n_small_pools} small pools"
    );
}

/// The same requests once more, when their prompts and answers are in the cache, and with a salt that nobody had before:
/// the same bits. That the first time is right is for the crowds to say.
#[test]
fn cpu_prefix_hits_change_nothing() {
    for case in support::one_of_each_family(cases()) {
        for (block_size, precision) in [(16, Precision::BF16), (4, Precision::F32)] {
            let shape = Shape {
                block_size,
                n_blocks: 512,
                max_num_seqs: 16,
                max_num_batched_tokens: 64,
                precision,
            };
            let (engine, outputs) = start(&case, DeviceKind::Cpu, shape);
            let handle = engine.handle();
            let requests = requests(&case);
            let round = |n: u64, salt: Option<&str>| {
                let of_round = |request: &Request| Request {
                    id: RequestId(request.id.0 + n * 1000),
                    cache_salt: salt.map(str::to_owned),
                    ..request.clone()
                };
                let requests: Vec<Request> = requests.iter().map(of_round).collect();
                let (answers, admissions) = answers_of(&handle, &outputs, &requests);
                let cached = admissions.iter().filter_map(|new| new.cached_tokens);
                let answers: Vec<Answer> = answers.into_values().collect();
                (answers, cached.collect::<Vec<u32>>())
            };
            let (first, _) = round(0, None);
            let (again, cached) = round(1, None);
            let (salted, missed) = round(2, Some("salt"));
            let why = format!("{}: blocks of {block_size}", case.display());
            assert!(again == first, "{why}: after a hit");
            assert!(salted == first, "{why}: without one");
            let prompts = requests
                .iter()
                .filter(|request| request.prompt_logprobs.is_none());
            for (request, n) in prompts.zip(&cached) {
                let full = (request.prompt.len() as u32 - 1) / block_size * block_size;
                assert!(*n >= full, "{why}: {n} of {}", request.prompt.len());
            }
            assert!(cached.iter().sum::<u32>() > missed.iter().sum(), "{why}");
            handle.stop();
            engine.join().unwrap();
        }
    }
}

/// Four sequences of one prompt give what four requests give with the seeds that follow each other; preempted too.
#[test]
fn cpu_choices_are_requests_with_the_next_seeds() {
    const N: u32 = 4;
    let (mut n_small_pools, mut n_preempted) = (0, 0);
    for case in support::one_of_each_family(cases()) {
        let sampled = requests(&case)
            .into_iter()
            .filter(|request| request.sampling.temperature > 0.0);
        let groups: Vec<Request> = sampled
            .map(|request| Request {
                n: NonZeroU32::MIN.saturating_add(N - 1),
                prompt_logprobs: None,
                ..request
            })
            .collect();
        let single = |group: &Request, index: u32| Request {
            id: RequestId(group.id.0 * 100 + u64::from(index)),
            sampling: SamplingParams {
                seed: group.sampling.seed + u64::from(index),
                ..group.sampling
            },
            n: NonZeroU32::MIN,
            ..group.clone()
        };
        let shape = |n_blocks| Shape {
            block_size: 4,
            n_blocks,
            max_num_seqs: 16,
            max_num_batched_tokens: 24,
            precision: Precision::BF16,
        };
        let singles: Vec<Request> = groups
            .iter()
            .flat_map(|group| (0..N).map(|i| single(group, i)))
            .collect();
        let (want, _) = answers(start(&case, DeviceKind::Cpu, shape(512)), &singles);
        for n_blocks in [512, 80] {
            let (engine, outputs) = start(&case, DeviceKind::Cpu, shape(n_blocks));
            let handle = engine.handle();
            for group in &groups {
                handle.submit(group.clone()).unwrap();
            }
            let mut found: BTreeMap<RequestId, Vec<TokenLogprobs>> = BTreeMap::new();
            let mut n_ended = 0;
            while n_ended < singles.len() {
                for output in outputs.recv().unwrap().outputs {
                    let id = RequestId(output.id.0 * 100 + u64::from(output.sequence));
                    found.entry(id).or_default().extend(output.tokens);
                    n_ended += usize::from(output.finished.is_some());
                }
            }
            for (id, (_, tokens, _)) in &want {
                assert!(
                    tokens == &found[id],
                    "{}: {id:?} of {n_blocks} blocks",
                    case.display()
                );
            }
            n_small_pools += usize::from(n_blocks == 80);
            n_preempted += usize::from(n_blocks == 80 && handle.counters().preemptions > 0);
            handle.stop();
            engine.join().unwrap();
        }
    }
    assert!(
        n_preempted * 2 > n_small_pools,
        "{n_preempted} preempted in {n_small_pools} small pools"
    );
}

/// Greedy answers are Transformers' own, up to the first close call.
fn greedy(kind: DeviceKind) {
    for case in cases() {
        let golden = golden(&case);
        let noise = 1e-3;
        let requests: Vec<Request> = requests(&case)
            .into_iter()
            .filter(|r| r.sampling.temperature == 0.0)
            .collect();
        let (answers, _) = answers(start(&case, kind, ALONE), &requests);
        for request in &requests {
            let (want, clear) = transformers_answer(&golden, request, noise);
            let found: Vec<u32> = answers[&request.id]
                .1
                .iter()
                .map(|sampled| sampled.token)
                .collect();
            assert_eq!(
                found[..clear],
                want[..clear],
                "{}: {} tokens",
                case.display(),
                request.prompt.len()
            );
        }
    }
}

/// Allows one sequence of tokens only.
#[derive(Clone, Debug)]
struct Fixed(Vec<u32>);

impl Constraint for Fixed {
    fn advance(&mut self, token: u32) {
        assert_eq!(self.0.remove(0), token, "told in order, and once");
    }

    fn fill_mask(&mut self, mask: &mut [u32]) {
        let token = self.0[0] as usize;
        mask[token / 32] |= 1 << (token % 32);
    }

    fn fork(&self) -> Box<dyn Constraint> {
        Box::new(self.clone())
    }
}

/// Sequences that may only go one way go it, in a crowd of others, though a device runs a step ahead of what they may.
fn constrained(kind: DeviceKind, precision: Precision, case: &Path) {
    let vocab_size = support::config(case).decoder.vocab_size as u32;
    let way = |id: u32| -> Vec<u32> { (0..24).map(|i| (id * 31 + i * 17) % vocab_size).collect() };
    let free: Vec<Request> = requests(case);
    let forced = free.iter().map(|request| {
        let options = LogitsOptions {
            constraint: Some(Box::new(Fixed(way(request.id.0 as u32)))),
            ..LogitsOptions::default()
        };
        let processors = LogitsProcessors::new(options, &request.prompt, &[], vocab_size);
        Request {
            id: RequestId(request.id.0 + 100),
            logits: processors.map(Box::new),
            ..request.clone()
        }
    });
    let all: Vec<Request> = free.iter().cloned().chain(forced).collect();
    let shape = Shape {
        n_blocks: 512,
        max_num_seqs: 16,
        max_num_batched_tokens: 48,
        precision,
        ..ALONE
    };
    let (found, _) = answers(start(case, kind, shape), &all);
    for request in &free {
        let (_, sampled, _) = &found[&RequestId(request.id.0 + 100)];
        let tokens: Vec<u32> = sampled.iter().map(|token| token.token).collect();
        assert_eq!(tokens, way(request.id.0 as u32), "{}", case.display());
        assert!(sampled.iter().all(|token| token.top.len() == 3));
    }
}

#[test]
fn cpu_constraints_hold() {
    let case = &cases()[0];
    constrained(DeviceKind::Cpu, Precision::F32, case);
    constrained(DeviceKind::Reference, Precision::F32, case);
}

#[cfg(feature = "cuda-shim")]
#[test]
fn cuda_constraints_hold_a_step_ahead() {
    constrained(DeviceKind::Cuda, Precision::BF16, &support::cuda_cases()[0]);
}

#[test]
fn reference_crowds_change_nothing() {
    crowd(
        DeviceKind::Reference,
        Precision::F32,
        support::one_of_each_family(cases()),
    );
}

#[test]
fn reference_greedy_answers_are_those_of_transformers() {
    greedy(DeviceKind::Reference);
}

#[test]
fn cpu_crowds_change_nothing_in_float32() {
    crowd(DeviceKind::Cpu, Precision::F32, cases());
}

#[test]
fn cpu_crowds_change_nothing_in_bfloat16() {
    crowd(DeviceKind::Cpu, Precision::BF16, cases());
}

#[test]
fn cpu_greedy_answers_are_those_of_transformers() {
    greedy(DeviceKind::Cpu);
}

#[test]
fn an_abort_frees_blocks_and_a_stop_ends_what_is_left() {
    let case = cases().into_iter().next().unwrap();
    let (engine, outputs) = start(
        &case,
        DeviceKind::Reference,
        Shape {
            n_blocks: 12,
            ..ALONE
        },
    );
    let handle = engine.handle();
    let request = |id, max_tokens| Request {
        id: RequestId(id),
        max_tokens,
        ..requests(&case)[0].clone()
    };
    // The longest context is what the pool holds: more tokens than that end the answer, and never refuse it.
    handle.submit(request(0, 500)).unwrap();
    handle.submit(request(1, 150)).unwrap();
    // A step's load is published after its message, and before the next one's.
    outputs.recv().unwrap();
    outputs.recv().unwrap();
    assert!(handle.load().blocks.unwrap().active > 0);
    handle.abort(RequestId(0));
    let mut ended = None;
    while ended.is_none() {
        let step = outputs.recv().unwrap();
        ended = step
            .outputs
            .into_iter()
            .find(|output| output.id == RequestId(1))
            .and_then(|output| output.finished);
        if ended.is_none() {
            handle.stop();
        }
    }
    assert_eq!(
        ended,
        Some(FinishReason::Error("the server is stopping".to_owned()))
    );
    engine.join().unwrap();
    assert_eq!(handle.load().blocks.unwrap().active, 0);
    assert_eq!(handle.submit(request(2, 1)), Err(SubmitError::Stopped));
}
