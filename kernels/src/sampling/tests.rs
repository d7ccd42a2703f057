//! Sampling against exact probabilities, and its invariants over arbitrary logits.

use super::*;
use crate::step::{LogitsEdit, Penalties, SeenToken, TokenBias};
use proptest::prelude::*;
use std::collections::BTreeMap;
use std::num::NonZeroU32;
use std::sync::Arc;

fn sampling(temperature: f32, top_p: f32, top_k: Option<u32>) -> SamplingParams {
    SamplingParams {
        temperature,
        top_p,
        top_k: top_k.and_then(NonZeroU32::new),
        min_p: 0.0,
        seed: 7,
    }
}

fn min_p(temperature: f32, min_p: f32, top_p: f32) -> SamplingParams {
    SamplingParams {
        min_p,
        ..sampling(temperature, top_p, None)
    }
}

/// Pearson's statistic of `n` samples against probabilities; a sample of what has none fails at once.
fn chi_square(logits: &[f32], params: &SamplingParams, probabilities: &[f64], n: u32) -> f64 {
    let mut counts = vec![0u32; logits.len()];
    let mut scratch = Scratch::new(logits.len());
    for output_index in 0..n {
        counts[sample(logits, params, output_index, &mut scratch) as usize] += 1;
    }
    let mut statistic = 0.0;
    for (count, p) in counts.iter().zip(probabilities) {
        assert!(
            *p > 0.0 || *count == 0,
            "a token outside the kept set was sampled"
        );
        if *p > 0.0 {
            let expected = p * f64::from(n);
            statistic += (f64::from(*count) - expected).powi(2) / expected;
        }
    }
    statistic
}

#[test]
fn samples_follow_the_exact_distribution() {
    let probabilities: [f64; 6] = [0.4, 0.25, 0.15, 0.1, 0.07, 0.03];
    let logits = probabilities.map(|p| p.ln() as f32);
    let renormalised = |kept: usize| {
        let sum: f64 = probabilities[..kept].iter().sum();
        let mut out = [0.0; 6];
        (0..kept).for_each(|i| out[i] = probabilities[i] / sum);
        out
    };
    let squared = probabilities.map(|p| p * p / probabilities.iter().map(|p| p * p).sum::<f64>());
    // The bound is the 99.99 % quantile of chi-square with 5 degrees of freedom (25.7); the seed is fixed.
    for (why, sampling, want) in [
        (
            "temperature 1 samples as the model says",
            sampling(1.0, 1.0, None),
            probabilities,
        ),
        (
            "temperature 1/2 squares the probabilities",
            sampling(0.5, 1.0, None),
            squared,
        ),
        (
            "top-k keeps the first k",
            sampling(1.0, 1.0, Some(3)),
            renormalised(3),
        ),
        (
            "top-p keeps the smallest set that reaches p",
            sampling(1.0, 0.7, None),
            renormalised(3),
        ),
        (
            "top-p counts in what top-k has left: 0.4 + 0.25 of 0.8 reach 0.8",
            sampling(1.0, 0.8, Some(3)),
            renormalised(2),
        ),
        (
            "a top-k beyond the vocabulary keeps all",
            sampling(1.0, 1.0, Some(99)),
            probabilities,
        ),
        (
            "min-p keeps what is at least 0.3 times as likely as the first: 0.12",
            min_p(1.0, 0.3, 1.0),
            renormalised(3),
        ),
        (
            "top-p counts in what min-p has left: 0.4 + 0.25 of 0.8 reach 0.8",
            min_p(1.0, 0.3, 0.8),
            renormalised(2),
        ),
        (
            "a min-p of 0 keeps all",
            min_p(1.0, 0.0, 1.0),
            probabilities,
        ),
    ] {
        let statistic = chi_square(&logits, &sampling, &want, 60_000);
        assert!(statistic < 25.7, "{why}: {statistic}");
    }
}

#[test]
fn ties_and_odd_rows() {
    let mut scratch = Scratch::default();
    for (why, logits, sampling, want) in [
        (
            "greedy takes the lowest id among equals",
            vec![1.0, 5.0, 5.0],
            sampling(0.0, 1.0, None),
            1,
        ),
        (
            "-0 and +0 are equal",
            vec![-0.0, 0.0],
            sampling(1.0, 1.0, Some(1)),
            0,
        ),
        (
            "top-k 1 is greedy",
            vec![1.0, 5.0, 5.0],
            sampling(1.0, 1.0, Some(1)),
            1,
        ),
        (
            "a small top-p is greedy",
            vec![0.0, 0.1, 0.1],
            sampling(1.0, 1e-6, None),
            1,
        ),
        (
            "NaN is never sampled",
            vec![f32::NAN, 0.0],
            sampling(1.0, 1.0, None),
            1,
        ),
        (
            "all NaN gives the first token",
            vec![f32::NAN; 2],
            sampling(1.0, 1.0, None),
            0,
        ),
        (
            "a min-p of 1 is greedy, but for ties",
            vec![1.0, 5.0, 4.999_999],
            min_p(1.0, 1.0, 1.0),
            1,
        ),
        (
            "min-p counts after the temperature",
            vec![0.0, 10.0],
            min_p(0.01, 0.001, 1.0),
            1,
        ),
        (
            "infinity wins",
            vec![0.0, f32::INFINITY],
            sampling(1.0, 1.0, None),
            1,
        ),
        (
            "-infinity is never sampled",
            vec![f32::NEG_INFINITY, 0.0],
            sampling(100.0, 1.0, None),
            1,
        ),
    ] {
        assert_eq!(sample(&logits, &sampling, 0, &mut scratch), want, "{why}");
    }
}

#[test]
fn logprobs_are_log_softmax_of_the_raw_logits() {
    let logits: Vec<f32> = (0..1000)
        .map(|i| ((i * 7919) % 1000) as f32 * 0.01)
        .collect();
    let row = LogitsRow {
        request: LogitsRequest::Sample {
            params: sampling(0.3, 0.5, Some(5)),
            output_index: 0,
            edit: LogitsEdit::default(),
        },
        n_logprobs: Some(4),
    };
    let sampled = sample_row(&logits, &row, &mut Scratch::default());
    let sum: f64 = logits.iter().map(|&x| f64::from(x).exp()).sum();
    let exact = |id: u32| f64::from(logits[id as usize]) - sum.ln();
    assert!((f64::from(sampled.logprob.unwrap()) - exact(sampled.token)).abs() < 2e-6);
    assert_eq!(sampled.top.len(), 4);
    for pair in sampled.top.windows(2) {
        assert!(pair[0].1 >= pair[1].1);
    }
    for (id, logprob) in sampled.top {
        assert!((f64::from(logprob) - exact(id)).abs() < 2e-6);
    }
}

/// The kept set, done the slow way: sort everything, cut at k, then at the mass.
fn kept_slowly(logits: &[f32], s: &SamplingParams) -> Vec<u32> {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let noise = Noise {
        max,
        temperature: s.temperature,
        seed: s.seed,
        index: 0,
    };
    let mut ids: Vec<u32> = (0..logits.len() as u32).collect();
    ids.sort_by(|&a, &b| {
        logits[b as usize]
            .total_cmp(&logits[a as usize])
            .then(a.cmp(&b))
    });
    ids.truncate(s.top_k.map_or(ids.len(), |k| k.get() as usize));
    // The largest one is kept whatever its share.
    let is_likely =
        |id: &u32| noise.scaled(logits[*id as usize]) >= ln(s.min_p.max(f32::MIN_POSITIVE));
    ids.retain(|id| s.min_p == 0.0 || is_likely(id));
    let masses: Vec<u64> = ids
        .iter()
        .map(|&id| noise.mass(logits[id as usize]))
        .collect();
    let total: u64 = masses.iter().sum();
    let mut sum = 0;
    let reached = masses.iter().position(|mass| {
        sum += mass;
        sum as f64 >= total as f64 * f64::from(s.top_p)
    });
    ids.truncate(reached.map_or(ids.len(), |at| at + 1));
    ids
}

proptest! {
    #[test]
    fn a_sample_is_the_best_score_of_the_kept(
        logits in prop::collection::vec((-400i16..400).prop_map(|x| f32::from(x) / 32.0), 1..700),
        temperature in 0.05f32..4.0, top_p in 0.01f32..1.0, top_k in 1u32..900,
        min_p in prop_oneof![Just(0.0f32), 0.0f32..1.0], seed: u64, output_index: u32,
    ) {
        let s = SamplingParams { temperature, top_p, top_k: NonZeroU32::new(top_k), min_p, seed };
        let sampled = sample(&logits, &s, output_index, &mut Scratch::default());
        let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let score = |id: u32| {
            let word = philox4x32_10([id / 4, output_index, 0, 0], [seed as u32, (seed >> 32) as u32])[(id % 4) as usize];
            (logits[id as usize] - max) / temperature + gumbel(word)
        };
        let mut kept = kept_slowly(&logits, &s);
        kept.sort_by(|&a, &b| score(b).total_cmp(&score(a)).then(a.cmp(&b)));
        prop_assert_eq!(sampled, kept[0]);
    }

    /// Every edit against plain f64: the sampled tokens of the edited row, greedy, and the row's own log-probabilities.
    #[test]
    fn edits_are_those_of_plain_arithmetic(
        logits in prop::collection::vec((-400i16..400).prop_map(|x| f32::from(x) / 32.0), 1..200),
        edit in edits(),
    ) {
        let edit = edit.for_vocabulary(logits.len());
        let want = edited_slowly(&logits, &edit);
        let mut found = Vec::new();
        edit::edit_logits(&logits, &edit, &mut found);
        prop_assert_eq!(found.len(), want.len());
        for (id, (&found, &want)) in found.iter().zip(&want).enumerate() {
            let tolerance = 1e-5 * (1.0 + want.abs());
            let is_near = (f64::from(found) - want).abs() <= tolerance;
            prop_assert!(f64::from(found) == want || is_near, "token {}: {} for {}", id, found, want);
        }
        let row = |edit: LogitsEdit| LogitsRow {
            request: LogitsRequest::Sample { params: sampling(0.0, 1.0, None), output_index: 0, edit },
            n_logprobs: Some(3),
        };
        let mut scratch = Scratch::default();
        let plain = sample_row(&logits, &row(LogitsEdit::default()), &mut scratch);
        let sampled = sample_row(&logits, &row(edit.clone()), &mut scratch);
        prop_assert_eq!(&sampled.top, &plain.top, "log-probabilities are those of the raw row");
        prop_assert_eq!(sampled.token, sample_or(&found, &sampling(0.0, 1.0, None), 0, edit.first_allowed().unwrap(), &mut scratch));
        if let Some(words) = &edit.allowed {
            prop_assert!(words[sampled.token as usize / 32] >> (sampled.token % 32) & 1 == 1, "only allowed ones");
        }
    }

    /// A token that is not allowed, or banned, is never sampled, whatever the parameters, while another is there.
    #[test]
    fn banned_tokens_are_never_sampled(
        logits in prop::collection::vec((-400i16..400).prop_map(|x| f32::from(x) / 32.0), 2..200),
        banned in prop::collection::btree_set(0u32..200, 1..100), as_mask: bool,
        temperature in prop_oneof![Just(0.0f32), 0.05f32..4.0], top_p in 0.01f32..=1.0, seed: u64,
    ) {
        let n = logits.len() as u32;
        let is_banned = |id: u32| banned.contains(&id) && id != seed as u32 % n;
        let ids = (0..n).filter(|&id| is_banned(id));
        let mut edit = LogitsEdit::default();
        if as_mask {
            let mut words = vec![u32::MAX; logits.len().div_ceil(32)];
            ids.for_each(|id| words[id as usize / 32] &= !(1 << (id % 32)));
            edit.allowed = Some(words.into());
        } else {
            edit.biases = ids.map(|token| TokenBias { token, bias: f32::NEG_INFINITY }).collect();
        }
        let params = SamplingParams { seed, ..sampling(temperature, top_p, None) };
        let mut scratch = Scratch::default();
        for output_index in 0..20 {
            let request = LogitsRequest::Sample { params, output_index, edit: edit.clone() };
            let token = sample_row(&logits, &LogitsRow { request, n_logprobs: None }, &mut scratch).token;
            prop_assert!(token < n && !is_banned(token), "token {}", token);
        }
    }
}

/// An edit before the vocabulary is known.
#[derive(Clone, Debug)]
struct AnyEdit {
    allowed: Option<Vec<u32>>,
    biases: BTreeMap<u32, f32>,
    penalties: Option<(f32, f32, f32, BTreeMap<u32, u32>)>,
}

impl AnyEdit {
    fn for_vocabulary(mut self, n: usize) -> LogitsEdit {
        let n = n as u32;
        if let Some(words) = &mut self.allowed {
            words.truncate(n.div_ceil(32) as usize);
            words[0] |= 1;
        }
        let penalties = self
            .penalties
            .map(|(repetition, frequency, presence, seen)| {
                let seen = seen.into_iter().filter(|(token, _)| *token < n);
                let seen = seen.map(|(token, n_outputs)| SeenToken { token, n_outputs });
                Penalties {
                    repetition,
                    frequency,
                    presence,
                    seen: Arc::new(seen.collect()),
                }
            });
        let biases = self.biases.into_iter().filter(|(token, _)| *token < n);
        LogitsEdit {
            allowed: self.allowed.map(Into::into),
            biases: biases
                .map(|(token, bias)| TokenBias { token, bias })
                .collect(),
            penalties,
        }
    }
}

fn edits() -> impl Strategy<Value = AnyEdit> {
    let bias = prop_oneof![4 => -100f32..100.0, 1 => Just(f32::NEG_INFINITY)];
    let penalties = (
        prop_oneof![Just(1.0f32), 0.1f32..3.0],
        -2f32..2.0,
        -2f32..2.0,
        prop::collection::btree_map(0u32..200, 0u32..5, 0..80),
    );
    (
        prop::option::of(prop::collection::vec(any::<u32>(), 7)),
        prop::collection::btree_map(0u32..200, bias, 0..40),
        prop::option::of(penalties),
    )
        .prop_map(|(allowed, biases, penalties)| AnyEdit {
            allowed,
            biases,
            penalties,
        })
}

/// vLLM's order, one token after another.
fn edited_slowly(logits: &[f32], edit: &LogitsEdit) -> Vec<f64> {
    let one = |(id, &logit): (usize, &f32)| {
        let mut x = f64::from(logit);
        if let Some(words) = &edit.allowed
            && words[id / 32] >> (id % 32) & 1 == 0
        {
            x = f64::NEG_INFINITY;
        }
        if let Some(bias) = edit.biases.iter().find(|bias| bias.token as usize == id) {
            x += f64::from(bias.bias);
        }
        let Some(penalties) = &edit.penalties else {
            return x;
        };
        if let Some(seen) = penalties.seen.iter().find(|seen| seen.token as usize == id) {
            let repetition = f64::from(penalties.repetition);
            x = if x > 0.0 {
                x / repetition
            } else {
                x * repetition
            };
            x -= f64::from(penalties.frequency) * f64::from(seen.n_outputs);
            x -= f64::from(penalties.presence) * f64::from(u8::from(seen.n_outputs > 0));
        }
        x
    };
    logits.iter().enumerate().map(one).collect()
}
