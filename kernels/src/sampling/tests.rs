//! Sampling against exact probabilities, and its invariants over arbitrary logits.

use super::*;
use proptest::prelude::*;
use std::num::NonZeroU32;

fn sampling(temperature: f32, top_p: f32, top_k: Option<u32>) -> SamplingParams {
    SamplingParams {
        temperature,
        top_p,
        top_k: top_k.and_then(NonZeroU32::new),
        seed: 7,
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
        temperature in 0.05f32..4.0, top_p in 0.01f32..1.0, top_k in 1u32..900, seed: u64, output_index: u32,
    ) {
        let s = SamplingParams { temperature, top_p, top_k: NonZeroU32::new(top_k), seed };
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
}
