//! Edits of logits and sampling, token for token and bit for bit what `kvasir_kernels::sampling` gives.

use crate::shim::{Noise, address, launch};
use kvasir_kernels::cuda::kernel::{self, EditLogitsArgs, NOT_EDITED, SampleArgs, SampleRow};
use kvasir_kernels::cuda::write_edits;
use kvasir_kernels::sampling::{Scratch, sample_row};
use kvasir_kernels::step::{
    LogitsEdit, LogitsRequest, LogitsRow, Penalties, SamplingParams, SeenToken, TokenBias,
};
use std::num::NonZeroU32;
use std::sync::Arc;

const MAX_TOP: usize = kernel::MAX_TOP as usize;

fn check(why: &str, logits: &[f32], rows: &[LogitsRow], seed: u64) {
    let vocabulary = logits.len() / rows.len();
    let edited = edit(logits, rows, seed);
    let mut next = 0;
    let encode = |row: &LogitsRow| {
        let has_edit = edit_of(row).is_some();
        next += u32::from(has_edit);
        let edited = if has_edit { next - 1 } else { NOT_EDITED };
        kvasir_kernels::cuda::sample_row(row, edited)
    };
    let encoded: Vec<SampleRow> = rows.iter().map(encode).collect();
    let n = rows.len();
    let (mut tokens, mut logprobs) = (vec![u32::MAX; n], vec![0.0_f32; n]);
    let (mut top_ids, mut top_logprobs) = (vec![u32::MAX; n * MAX_TOP], vec![0.0_f32; n * MAX_TOP]);
    let args = SampleArgs {
        logits: address(logits.as_ptr()),
        edited: address(edited.as_ptr()),
        rows: address(encoded.as_ptr()),
        tokens: address(tokens.as_mut_ptr()),
        logprobs: address(logprobs.as_mut_ptr()),
        top_ids: address(top_ids.as_mut_ptr()),
        top_logprobs: address(top_logprobs.as_mut_ptr()),
        vocabulary: vocabulary as u32,
        stride: vocabulary as u32,
    };
    // SAFETY: every vector holds what the fields above say.
    unsafe { launch(kernel::sample(n), seed, &args) };
    let mut scratch = Scratch::default();
    for (l, row) in rows.iter().enumerate() {
        let want = sample_row(&logits[l * vocabulary..][..vocabulary], row, &mut scratch);
        assert_eq!(
            tokens[l], want.token,
            "{why}: row {l} of {vocabulary}, {row:?}"
        );
        let Some(logprob) = want.logprob else {
            continue;
        };
        let same = |a: f32, b: f32| a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan());
        assert!(
            same(logprobs[l], logprob),
            "{why}: {} for {logprob}",
            logprobs[l]
        );
        for (i, (id, logprob)) in want.top.into_iter().enumerate() {
            assert_eq!(top_ids[l * MAX_TOP + i], id, "{why}: place {i} of row {l}");
            assert!(
                same(top_logprobs[l * MAX_TOP + i], logprob),
                "{why}: place {i} of row {l}"
            );
        }
    }
}

fn edit_of(row: &LogitsRow) -> Option<&LogitsEdit> {
    match &row.request {
        LogitsRequest::Sample { edit, .. } if !edit.is_empty() => Some(edit),
        _ => None,
    }
}

/// The rows that have an edit, edited.
fn edit(logits: &[f32], rows: &[LogitsRow], seed: u64) -> Vec<f32> {
    let vocabulary = logits.len() / rows.len();
    let edits = rows.iter().zip(0..);
    let edits: Vec<(u32, &LogitsEdit)> = edits
        .filter_map(|(row, l)| edit_of(row).map(|edit| (l, edit)))
        .collect();
    let mut sent = vec![0_u8; 1 << 20];
    let n_words = write_edits(&edits, &mut sent);
    let words_at = edits.len() * size_of::<kernel::EditRow>();
    // Aligned, and no longer than it need be.
    let words: Vec<u32> = sent[..words_at + n_words * 4]
        .chunks_exact(4)
        .map(|word| u32::from_ne_bytes([word[0], word[1], word[2], word[3]]))
        .collect();
    let mut edited = vec![f32::NAN; (edits.len() * vocabulary).max(1)];
    let args = EditLogitsArgs {
        edited: address(edited.as_mut_ptr()),
        logits: address(logits.as_ptr()),
        rows: address(words.as_ptr().cast::<kernel::EditRow>()),
        words: address(words[words_at / 4..].as_ptr()),
        first: 0,
        vocabulary: vocabulary as u32,
        stride: vocabulary as u32,
        n_words: n_words as u32,
    };
    // SAFETY: every vector holds what the fields above say, and every token is below the vocabulary's size.
    unsafe { launch(kernel::edit_logits(edits.len()), seed, &args) };
    edited
}

/// Edits of all kinds: every third row has none.
fn some_edit(noise: &mut Noise, vocabulary: usize, i: usize) -> LogitsEdit {
    let mut edit = LogitsEdit::default();
    if i.is_multiple_of(3) {
        return edit;
    }
    let tokens = |noise: &mut Noise| -> Vec<u32> {
        let all = 0..vocabulary as u32;
        let share = noise.word() % 5;
        all.filter(|_| noise.word() % 5 < share).collect()
    };
    if i % 2 == 1 {
        let words = (0..vocabulary.div_ceil(32)).map(|_| noise.word() as u32);
        let mut words: Vec<u32> = words.collect();
        let kept = noise.word() as usize % vocabulary;
        words[kept / 32] |= 1 << (kept % 32);
        edit.allowed = Some(words.into());
    }
    if i % 4 < 3 {
        let bias = |noise: &mut Noise| match noise.word() % 4 {
            0 => f32::NEG_INFINITY,
            _ => noise.unit() * 20.0,
        };
        let tokens = tokens(noise).into_iter();
        let biases = tokens.map(|token| TokenBias {
            token,
            bias: bias(noise),
        });
        edit.biases = biases.collect();
    }
    if !i.is_multiple_of(5) {
        let mut seen = tokens(noise);
        seen.reverse();
        let seen: Vec<SeenToken> = seen
            .into_iter()
            .map(|token| SeenToken {
                token,
                n_outputs: noise.word() as u32 % 4,
            })
            .collect();
        edit.penalties = Some(Penalties {
            repetition: 1.3 + noise.unit() * 0.7,
            frequency: noise.unit() * 2.0,
            presence: noise.unit() * 2.0,
            seen: Arc::new(seen),
        });
    }
    edit
}

fn rows(noise: &mut Noise, vocabulary: usize) -> Vec<LogitsRow> {
    let mut out = Vec::new();
    for temperature in [0.0, 0.3, 1.0, 7.0] {
        for top_p in [1.0, 0.9, 0.5, 1e-12] {
            for top_k in [
                None,
                NonZeroU32::new(1),
                NonZeroU32::new(40),
                NonZeroU32::new(1_000_000),
            ] {
                let params = SamplingParams {
                    temperature,
                    top_p,
                    top_k,
                    min_p: [0.0, 0.0, 0.05, 0.0, 0.7, 0.0, 1.0][out.len() % 7],
                    seed: noise.word(),
                };
                let output_index = noise.word() as u32;
                let n_logprobs = [None, Some(0), Some(20), Some(255)][out.len() % 4];
                out.push(LogitsRow {
                    request: LogitsRequest::Sample {
                        params,
                        output_index,
                        edit: some_edit(noise, vocabulary, out.len()),
                    },
                    n_logprobs,
                });
            }
        }
    }
    let token = (noise.word() % vocabulary as u64) as u32;
    out.push(LogitsRow {
        request: LogitsRequest::Score { token },
        n_logprobs: Some(5),
    });
    out
}

#[test]
fn samples_are_those_of_the_host() {
    let mut noise = Noise(20);
    for (why, vocabulary, seed) in [
        ("one token", 1, 1),
        ("odd", 3, 2),
        ("small", 700, 3),
        ("several a thread", 2501, 4),
    ] {
        let rows = rows(&mut noise, vocabulary);
        let spread: Vec<f32> = (0..rows.len() * vocabulary)
            .map(|_| noise.unit() * 9.0)
            .collect();
        check(why, &spread, &rows, seed);
        let ties: Vec<f32> = spread.iter().map(|x| x.round()).collect();
        check(&format!("{why}, with ties"), &ties, &rows, seed);
        // More tokens in one bin than are compared with each other: near the largest logit, and far below it.
        let near: Vec<f32> = spread.iter().map(|x| x * 1e-3).collect();
        check(&format!("{why}, all near"), &near, &rows, seed);
        let far: Vec<f32> = spread.iter().map(|x| x * 1e3).collect();
        check(&format!("{why}, all far"), &far, &rows, seed);
    }
}

#[test]
fn odd_logits_are_those_of_the_host() {
    let mut noise = Noise(21);
    let odd = [
        f32::NAN,
        f32::NEG_INFINITY,
        f32::INFINITY,
        -0.0,
        0.0,
        1e30,
        -1e30,
        1e-40,
    ];
    for (why, choice) in [
        ("all kinds", &odd[..]),
        ("no infinity", &odd[3..]),
        ("masked", &odd[..2]),
        ("some masked", &[f32::NAN, f32::NEG_INFINITY, 0.5, 0.25][..]),
    ] {
        let rows = rows(&mut noise, 9);
        let logits: Vec<f32> = (0..rows.len() * 9)
            .map(|_| choice[noise.word() as usize % choice.len()])
            .collect();
        check(why, &logits, &rows, 5);
    }
}
