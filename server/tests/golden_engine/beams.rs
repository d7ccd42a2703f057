//! Beams through the whole engine: those of Transformers, and the same in crowds, in chunks, after a prefix hit and after
//! a preemption.

use kvasir_server::engine::{BeamParams, EarlyStopping};

use super::*;

/// What a search gave, best first: tokens and score.
type Found = Vec<(Vec<TokenLogprobs>, f32, FinishReason)>;

/// Sends all requests at once, and waits for all answers of all of them.
fn searches(
    handle: &EngineHandle,
    outputs: &Receiver<EngineOutputs>,
    requests: &[Request],
) -> BTreeMap<RequestId, Found> {
    for request in requests {
        handle.submit(request.clone()).unwrap();
    }
    let mut found: BTreeMap<RequestId, Found> = BTreeMap::new();
    let n_answers: usize = requests.iter().map(|r| r.n.get() as usize).sum();
    while found.values().map(Vec::len).sum::<usize>() < n_answers {
        for output in outputs.recv().unwrap().outputs {
            let Some(finished) = output.finished else {
                assert!(output.tokens.is_empty(), "a beam is told at its end");
                continue;
            };
            let found = found.entry(output.id).or_default();
            assert_eq!(output.sequence as usize, found.len(), "best first");
            found.push((output.tokens, output.beam_score.unwrap(), finished));
        }
    }
    found
}

fn request(id: u64, prompt: Vec<u32>, beams: BeamParams) -> Request {
    Request {
        n: beams.width,
        beams: Some(beams),
        ..Request::greedy(RequestId(id), prompt, 14)
    }
}

fn ids(tokens: &[TokenLogprobs]) -> Vec<u32> {
    tokens.iter().map(|token| token.token).collect()
}

/// The searches of a golden file.
fn golden_searches(case: &Path) -> Vec<(Request, Value)> {
    let file = std::fs::read(case.join("beams.json")).unwrap();
    let file: Value = serde_json::from_slice(&file).unwrap();
    let prompts = golden(case)["prompts"].clone();
    let searches = file["searches"].as_array().unwrap().iter().zip(0..);
    let search = |(search, id): (&Value, u64)| {
        let beams = BeamParams {
            width: NonZeroU32::new(search["width"].as_u64().unwrap() as u32).unwrap(),
            length_penalty: search["length_penalty"].as_f64().unwrap(),
            early_stopping: match &search["early_stopping"] {
                Value::Bool(true) => EarlyStopping::WhenFull,
                Value::Bool(false) => EarlyStopping::WhenUnlikely,
                _ => EarlyStopping::WhenImpossible,
            },
        };
        let prompt = &prompts[search["prompt"].as_u64().unwrap() as usize];
        let request = Request {
            max_tokens: search["max_tokens"].as_u64().unwrap() as u32,
            stop_token_ids: tokens(&search["stop_token_ids"]),
            ..request(id, tokens(&prompt["ids"]), beams)
        };
        (request, search["answers"].clone())
    };
    searches.map(search).collect()
}

#[test]
fn cpu_beams_are_those_of_transformers() {
    let cases: Vec<PathBuf> = cases()
        .into_iter()
        .filter(|case| case.join("beams.json").is_file())
        .collect();
    assert!(cases.len() >= 2, "the golden files are there");
    for case in cases {
        let shape = Shape {
            block_size: 4,
            n_blocks: 512,
            max_num_seqs: 32,
            max_num_batched_tokens: 64,
            precision: Precision::F32,
        };
        let (engine, outputs) = start(&case, DeviceKind::Cpu, shape);
        let golden = golden_searches(&case);
        let requests: Vec<Request> = golden.iter().map(|(request, _)| request.clone()).collect();
        let found = searches(&engine.handle(), &outputs, &requests);
        for (request, answers) in golden {
            let why = format!("{}: {request:?}", case.display());
            let found = &found[&request.id];
            for ((found, score, finished), want) in found.iter().zip(answers.as_array().unwrap()) {
                assert_eq!(ids(found), tokens(&want["ids"]), "{why}");
                let want = want["score"].as_f64().unwrap() as f32;
                assert!((score - want).abs() < 1e-4, "{score}, not {want}: {why}");
                let last = found.last().unwrap().token;
                let is_stopped = request.stop_token_ids.contains(&last);
                let reason = match is_stopped {
                    true => FinishReason::Stop(last),
                    false => FinishReason::Length,
                };
                assert_eq!(*finished, reason, "{why}");
            }
            assert_eq!(found.len(), answers.as_array().unwrap().len(), "{why}");
        }
        engine.handle().stop();
        engine.join().unwrap();
    }
}

/// Beams beside sampled requests, in chunks, in a pool too small for all, and again when their prefixes are cached: the same
/// bits as each alone.
#[test]
fn cpu_beams_are_the_same_in_crowds() {
    let (mut n_cases, mut n_preempted) = (0, 0);
    for case in support::one_of_each_family(cases()) {
        let others = super::requests(&case);
        let params = |width, length_penalty, early_stopping| BeamParams {
            width: NonZeroU32::new(width).unwrap(),
            length_penalty,
            early_stopping,
        };
        let prompts: BTreeSet<Vec<u32>> = others.iter().map(|r| r.prompt.clone()).collect();
        let mut beams: Vec<Request> = Vec::new();
        for prompt in prompts {
            let stop = prompt[0];
            for params in [
                params(2, 1.0, EarlyStopping::WhenUnlikely),
                params(4, 2.0, EarlyStopping::WhenFull),
            ] {
                beams.push(Request {
                    stop_token_ids: vec![stop],
                    logprobs: Some(2),
                    cache_salt: Some(format!("{}", beams.len())),
                    ..request(1000 + beams.len() as u64, prompt.clone(), params)
                });
            }
        }
        let shape = |n_blocks| Shape {
            block_size: 4,
            n_blocks,
            max_num_seqs: 32,
            max_num_batched_tokens: 32,
            precision: Precision::BF16,
        };
        let (engine, outputs) = start(&case, DeviceKind::Cpu, shape(512));
        let mut alone: BTreeMap<RequestId, Found> = BTreeMap::new();
        for request in &beams {
            alone.extend(searches(
                &engine.handle(),
                &outputs,
                std::slice::from_ref(request),
            ));
        }
        engine.handle().stop();
        engine.join().unwrap();
        let mut is_preempted = false;
        for n_blocks in [512, 80, 88, 96] {
            let (engine, outputs) = start(&case, DeviceKind::Cpu, shape(n_blocks));
            let handle = engine.handle();
            for round in ["first", "after a hit"] {
                let found = crowd_of(&handle, &outputs, &beams, &others);
                for (id, found) in found {
                    assert!(
                        found == alone[&id],
                        "{}: {round}: {id:?} of {n_blocks} blocks",
                        case.display()
                    );
                }
            }
            is_preempted |= n_blocks < 512 && handle.counters().preemptions > 0;
            handle.stop();
            engine.join().unwrap();
            let active = handle.load().blocks.unwrap().active;
            assert_eq!(active, 0, "all blocks come back");
        }
        n_cases += 1;
        n_preempted += usize::from(is_preempted);
    }
    // Who is preempted depends on how long steps take, too.
    assert!(
        n_preempted > 1,
        "{n_preempted} preempted in the small pools of {n_cases} cases"
    );
}

/// The searches' answers, while the others run beside them.
fn crowd_of(
    handle: &EngineHandle,
    outputs: &Receiver<EngineOutputs>,
    beams: &[Request],
    others: &[Request],
) -> BTreeMap<RequestId, Found> {
    for (beam, other) in beams.iter().zip(others.iter().cycle()) {
        // Several of the others are alike: each has an id of its own.
        let other = Request {
            id: RequestId(beam.id.0 + 1000),
            cache_salt: Some("other".to_owned()),
            ..other.clone()
        };
        handle.submit(other).unwrap();
        handle.submit(beam.clone()).unwrap();
    }
    let mut found: BTreeMap<RequestId, Found> = BTreeMap::new();
    let mut n_left: usize = beams.iter().map(|r| r.n.get() as usize + 1).sum();
    while n_left > 0 {
        for output in outputs.recv().unwrap().outputs {
            let Some(finished) = output.finished else {
                continue;
            };
            n_left -= 1;
            if let Some(score) = output.beam_score {
                let found = found.entry(output.id).or_default();
                found.push((output.tokens, score, finished));
            }
        }
    }
    found
}

/// On a GPU, which may run a step ahead: a single beam is greedy decoding, and of several each has the score that its tokens
/// get as a prompt, within what bfloat16 costs, so that what was shared, copied and released was its own.
#[cfg(feature = "cuda-shim")]
#[test]
fn cuda_beams_are_scored_as_their_tokens_are() {
    // The device is slow where its kernels run on the CPU: one model with windows and one without, and little of each.
    let has_window = |case: &PathBuf| {
        let layers = support::config(case).decoder.layers;
        layers.iter().any(|layer| layer.attention.window.is_some())
    };
    let (windowed, plain): (Vec<PathBuf>, Vec<PathBuf>) =
        support::cuda_cases().into_iter().partition(has_window);
    for case in [&windowed[0], &plain[0]] {
        let bound = golden(case)["margin_bound"].as_f64().unwrap() as f32;
        let shape = Shape {
            block_size: 8,
            n_blocks: 256,
            max_num_seqs: 16,
            max_num_batched_tokens: 24,
            precision: Precision::BF16,
        };
        let beams = |width| BeamParams {
            width: NonZeroU32::new(width).unwrap(),
            length_penalty: 0.0,
            early_stopping: EarlyStopping::WhenImpossible,
        };
        let greedy: Vec<Request> = super::requests(case)
            .into_iter()
            .filter(|request| request.sampling.temperature == 0.0 && request.prompt.len() < 30)
            .map(|request| Request {
                max_tokens: 9,
                prompt_logprobs: None,
                ..request
            })
            .collect();
        let (engine, outputs) = start(case, DeviceKind::Cuda, shape);
        let handle = engine.handle();
        for (one, id) in greedy.iter().zip(100..) {
            let alone = answers_of(&handle, &outputs, std::slice::from_ref(one)).0;
            // With a salt of its own it finds no prefix: its products have the same shapes.
            let single = Request {
                max_tokens: one.max_tokens,
                cache_salt: Some("single".to_owned()),
                ..request(id, one.prompt.clone(), beams(1))
            };
            let found = searches(&handle, &outputs, &[single]);
            let (tokens, ..) = &found[&RequestId(id)][0];
            assert_eq!(ids(tokens), ids(&alone[&one.id].1), "{}", case.display());
        }
        let several = greedy.iter().zip(200..);
        let several: Vec<Request> = several
            .map(|(one, id)| Request {
                max_tokens: one.max_tokens,
                ..request(id, one.prompt.clone(), beams(3))
            })
            .collect();
        let found = searches(&handle, &outputs, &several);
        for (one, next_id) in several.iter().zip((1000..).step_by(10)) {
            for ((tokens, score, _), id) in found[&one.id].iter().zip(next_id..) {
                let whole = Request {
                    id: RequestId(id),
                    prompt: [one.prompt.clone(), ids(tokens)].concat(),
                    max_tokens: 1,
                    beams: None,
                    n: NonZeroU32::MIN,
                    prompt_logprobs: Some(0),
                    ..one.clone()
                };
                let scored = answers_of(&handle, &outputs, &[whole]).0;
                let (scores, ..) = &scored[&RequestId(id)];
                let of_answer = &scores[one.prompt.len() - 1..];
                let sum: f32 = of_answer.iter().filter_map(|score| score.logprob).sum();
                let most = bound * tokens.len() as f32;
                assert!(
                    (sum - score).abs() <= most,
                    "{}: {score}, not {sum}",
                    case.display()
                );
            }
        }
        handle.stop();
        engine.join().unwrap();
    }
}
