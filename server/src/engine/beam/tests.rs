//! The search against two oracles: all sequences there are, where the width holds them all, and Transformers' own steps over
//! whole rows of the vocabulary, written down as it has them.

use std::num::NonZeroU32;

use proptest::prelude::*;

use super::*;

/// Log-probabilities of the token after `tokens`, by token.
pub(in crate::engine) fn logprobs(seed: u64, tokens: &[u32], vocabulary: u32) -> Vec<f32> {
    let weight = |token: u32| {
        let all = tokens.iter().chain([&token]);
        let hash = all.fold(seed, |hash, &token| {
            (hash ^ u64::from(token + 1))
                .wrapping_mul(0x9E37_79B9_7F4A_7C15)
                .rotate_left(27)
        });
        0.02 + (hash >> 40) as f32 / (1u64 << 24) as f32
    };
    let weights: Vec<f32> = (0..vocabulary).map(weight).collect();
    let sum: f32 = weights.iter().sum();
    weights.iter().map(|weight| (weight / sum).ln()).collect()
}

/// The `n` most likely, most likely first, ties by lowest id.
pub(in crate::engine) fn most_likely(logprobs: &[f32], n: usize) -> Vec<(u32, f32)> {
    let mut all: Vec<(u32, f32)> = (0..).zip(logprobs.iter().copied()).collect();
    all.sort_by(|a, b| b.1.total_cmp(&a.1));
    all.truncate(n);
    all
}

/// Runs a search to its end, and returns its `n` best answers; `expand` gives the most likely tokens after some.
pub(in crate::engine) fn run(
    mut search: BeamSearch,
    n: usize,
    expand: impl Fn(&[u32]) -> Vec<(u32, f32)>,
) -> Vec<BeamAnswer> {
    let mut beams: Vec<Vec<u32>> = vec![Vec::new()];
    loop {
        let expansions: Vec<_> = beams.iter().map(|tokens| expand(tokens)).collect();
        let Next::Continue(choices) = search.advance(&expansions) else {
            return search.answers(n);
        };
        assert_eq!(choices.len(), search.n_live());
        for (slot, choice) in (0..).zip(&choices) {
            let is_continued = choices.iter().any(|other| other.parent == slot);
            assert!(!is_continued || choice.parent == slot, "{choices:?}");
        }
        let continued = |choice: &Choice| {
            let mut tokens = beams[choice.parent as usize].clone();
            tokens.push(choice.token);
            tokens
        };
        beams = choices.iter().map(continued).collect();
    }
}

type Answers = Vec<(Vec<u32>, f32)>;

fn search(
    params: BeamParams,
    stops: &[u32],
    max_outputs: u32,
    seed: u64,
    vocabulary: u32,
) -> Answers {
    let search = BeamSearch::new(params, stops.to_vec(), max_outputs, None);
    let n = params.n_candidates(stops.len());
    let expand = |tokens: &[u32]| most_likely(&logprobs(seed, tokens, vocabulary), n);
    let answers = run(search, params.width.get() as usize, expand).into_iter();
    let ids = |answer: BeamAnswer| {
        let ids = answer.tokens.iter().map(|token| token.token).collect();
        (ids, answer.score)
    };
    answers.map(ids).collect()
}

/// All sequences that end, best first.
fn all_sequences(
    params: BeamParams,
    stops: &[u32],
    max_outputs: u32,
    seed: u64,
    vocabulary: u32,
) -> Answers {
    let mut ended: Answers = Vec::new();
    let mut open: Answers = vec![(Vec::new(), 0.0)];
    while let Some((tokens, sum)) = open.pop() {
        for (token, logprob) in (0..).zip(logprobs(seed, &tokens, vocabulary)) {
            let mut tokens = tokens.clone();
            tokens.push(token);
            let sum = sum + logprob;
            if stops.contains(&token) || tokens.len() as u32 == max_outputs {
                let length = tokens.len() as f64;
                ended.push((tokens, sum / length.powf(params.length_penalty) as f32));
            } else {
                open.push((tokens, sum));
            }
        }
    }
    ended.sort_by(|a, b| b.1.total_cmp(&a.1));
    ended
}

/// `_beam_search` of Transformers for a batch of one, with its tensors as vectors and its -1e9 for what is not there.
fn transformers(
    params: BeamParams,
    stops: &[u32],
    max_outputs: u32,
    seed: u64,
    vocabulary: u32,
) -> Answers {
    const NOT_THERE: f32 = -1e9;
    let width = params.width.get() as usize;
    let to_keep = (1 + stops.len()).max(2) * width;
    let power = |length: u32| f64::from(length).powf(params.length_penalty) as f32;
    let mut running: Answers = vec![(Vec::new(), NOT_THERE); width];
    running[0].1 = 0.0;
    let mut finished: Vec<(Vec<u32>, f32, bool)> = vec![(Vec::new(), NOT_THERE, false); width];
    let mut length = 0;
    loop {
        let mut top: Answers = Vec::new();
        for (tokens, score) in &running {
            for (token, logprob) in (0..).zip(logprobs(seed, tokens, vocabulary)) {
                let tokens = tokens.iter().copied().chain([token]).collect();
                top.push((tokens, logprob + score));
            }
        }
        top.sort_by(|a, b| b.1.total_cmp(&a.1));
        top.truncate(to_keep);
        length += 1;
        let hits =
            |tokens: &[u32]| stops.contains(&tokens[tokens.len() - 1]) || length == max_outputs;
        let hit: Vec<bool> = top.iter().map(|(tokens, _)| hits(tokens)).collect();
        let mut next: Answers = top.clone();
        for ((_, score), hit) in next.iter_mut().zip(&hit) {
            *score += if *hit { NOT_THERE } else { 0.0 };
        }
        next.sort_by(|a, b| b.1.total_cmp(&a.1));
        next.truncate(width);
        running = next;
        for (rank, ((tokens, score), hit)) in top.into_iter().zip(&hit).enumerate() {
            let just_finished = *hit && rank < width;
            let out = if just_finished { 0.0 } else { NOT_THERE };
            finished.push((tokens, score / power(length) + out, just_finished));
        }
        finished.sort_by(|a, b| b.1.total_cmp(&a.1));
        finished.truncate(width);
        let all_finished = finished.iter().all(|hypothesis| hypothesis.2);
        let best_length = match params.early_stopping {
            EarlyStopping::WhenImpossible if params.length_penalty > 0.0 => max_outputs,
            _ => length,
        };
        let best = running[0].1 / power(best_length);
        let worst = finished[width - 1].1;
        let improves = finished
            .iter()
            .any(|hypothesis| best > if hypothesis.2 { worst } else { NOT_THERE });
        let open = !(all_finished && params.early_stopping == EarlyStopping::WhenFull);
        if !(improves && open && !hit.iter().all(|hit| *hit)) {
            let ended = finished.into_iter().filter(|hypothesis| hypothesis.2);
            return ended.map(|(tokens, score, _)| (tokens, score)).collect();
        }
    }
}

fn early_stopping() -> impl Strategy<Value = EarlyStopping> {
    prop_oneof![
        Just(EarlyStopping::WhenFull),
        Just(EarlyStopping::WhenUnlikely),
        Just(EarlyStopping::WhenImpossible),
    ]
}

fn params(width: u32, length_penalty: f64, early_stopping: EarlyStopping) -> BeamParams {
    BeamParams {
        width: NonZeroU32::new(width).unwrap(),
        length_penalty,
        early_stopping,
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn a_width_that_holds_every_sequence_finds_the_best_of_all(
        seed in any::<u64>(), length_penalty in -1.0..3.0, early_stopping in early_stopping(),
        vocabulary in 2..4u32, n_stops in 0..2u32, max_outputs in 1..5u32,
    ) {
        let params = params(100, length_penalty, early_stopping);
        let stops: Vec<u32> = (0..n_stops).collect();
        let found = search(params, &stops, max_outputs, seed, vocabulary);
        let mut all = all_sequences(params, &stops, max_outputs, seed, vocabulary);
        all.truncate(100);
        let scores = |answers: &Answers| answers.iter().map(|answer| answer.1).collect::<Vec<_>>();
        prop_assert_eq!(scores(&found), scores(&all));
        let tokens = |answers: Answers| {
            answers.into_iter().map(|answer| answer.0).collect::<std::collections::BTreeSet<_>>()
        };
        prop_assert_eq!(tokens(found), tokens(all));
    }

    #[test]
    fn a_narrow_search_is_that_of_transformers(
        seed in any::<u64>(), length_penalty in prop_oneof![Just(0.0), Just(1.0), -1.0..3.0],
        early_stopping in early_stopping(), width in 1..6u32, n_stops in 0..4u32,
        more in 0..20u32, max_outputs in 1..14u32,
    ) {
        let vocabulary = width + n_stops + more;
        let params = params(width, length_penalty, early_stopping);
        let stops: Vec<u32> = (0..n_stops).collect();
        let found = search(params, &stops, max_outputs, seed, vocabulary);
        let want = transformers(params, &stops, max_outputs, seed, vocabulary);
        prop_assert_eq!(found, want);
    }
}

#[test]
fn when_a_search_stops_is_what_was_asked_for() {
    use EarlyStopping::{WhenFull, WhenImpossible, WhenUnlikely};
    // Token 0 ends. One hypothesis ends in the first step, with -0.5, and one in the second.
    let first = vec![(0, -0.5), (1, -1.0), (2, -1.5), (3, -9.0)];
    let (far, close) = (
        first.clone(),
        vec![(1, -0.1), (0, -0.4), (2, -4.0), (3, -5.0)],
    );
    let plain = vec![(1, -0.2), (2, -3.0), (3, -4.0), (0, -5.0)];
    for (why, early_stopping, length_penalty, second, n_steps) in [
        ("two have ended", WhenFull, 1.0, &close, 2),
        ("-2.0 / 2 is below -1.5 / 2", WhenUnlikely, 1.0, &far, 2),
        ("-2.0 / 9 is above -1.5 / 2", WhenImpossible, 1.0, &far, 9),
        ("-2.0 is below -1.5", WhenImpossible, 0.0, &far, 2),
        ("-1.1 / 2 is above -1.4 / 2", WhenUnlikely, 1.0, &close, 9),
        (
            "-1.3 is above -1.4, -1.5 is not",
            WhenUnlikely,
            0.0,
            &close,
            4,
        ),
    ] {
        let params = params(2, length_penalty, early_stopping);
        let mut search = BeamSearch::new(params, vec![0], 9, Some(1));
        let (mut n, mut next) = (1, search.advance(std::slice::from_ref(&first)));
        while next != Next::Ended {
            n += 1;
            let expansion = if n == 2 { second } else { &plain };
            next = search.advance(&[expansion.clone(), expansion.clone()]);
        }
        assert_eq!(n, n_steps, "{why}");
        let answers = search.answers(2);
        assert!(answers[0].score >= answers[1].score, "{why}");
        if n_steps < 9 {
            let token = TokenLogprobs {
                token: 0,
                logprob: Some(-0.5),
                top: vec![(0, -0.5)],
            };
            let best = BeamAnswer {
                tokens: vec![token],
                score: -0.5,
                finished: FinishReason::Stop(0),
            };
            assert_eq!(answers[0], best, "{why}");
        } else {
            assert_eq!(answers[0].finished, FinishReason::Length, "{why}");
            assert_eq!(answers[0].tokens.len(), 9, "{why}");
        }
    }
}
