//! Logits and greedy tokens against golden files of Transformers, on every device.
//!
//! In float32 every logit is within 1e-4 of Transformers, however the prompt is cut into chunks. In bfloat16 the
//! greedy token is the same wherever the margin between the first two exceeds the error that the golden file states.

#![allow(clippy::unwrap_used)] // A test's helpers, outside of #[test] functions.

mod support;

use std::path::{Path, PathBuf};

use kvasir_kernels::device::{
    BlockId, Device, LogitsRow, LogitsWant, Precision, Sampling, Span, StepInput, TableRow,
    TableUpdate, TokenInput,
};
use kvasir_server::model::config::LlamaConfig;
use kvasir_server::model::files::ModelFiles;
use kvasir_server::model::llama::{Llama, LlamaWeights};
use kvasir_server::model::weights::WeightFiles;
use serde_json::Value;

use support::{DeviceKind, cases, device_config, floats, golden, tokens};

const MAX_ERROR: f32 = 1e-4;
const BLOCK_SIZE: usize = 8;

/// A model on a device with one sequence, driven step by step.
struct Bench {
    device: Box<dyn Device>,
    model: Llama,
    vocab_size: usize,
}

impl Bench {
    fn new(case: &Path, kind: DeviceKind, precision: Precision) -> Self {
        let files = ModelFiles::directory(case).unwrap();
        let config = LlamaConfig::parse(&files.require("config.json").unwrap(), None).unwrap();
        let weight_files = WeightFiles::open(&files).unwrap();
        let weights = LlamaWeights::take(&config, weight_files.tensors().unwrap()).unwrap();
        let mut device = kind
            .make(device_config(&config, BLOCK_SIZE, precision))
            .unwrap();
        let model = Llama::prepare(&config, &weights, &mut *device, &mut |_| {}).unwrap();
        let n_blocks = config.max_position_embeddings as usize / BLOCK_SIZE;
        device.allocate_kv(n_blocks as u32).unwrap();
        // Blocks in an order of their own, so that a kernel that reads them one after another is found out.
        let blocks = (0..n_blocks)
            .map(|i| BlockId(((i * 7 + 3) % n_blocks) as u32))
            .collect();
        let update = TableUpdate {
            row: TableRow(0),
            first: 0,
            blocks,
        };
        let input = StepInput {
            table_updates: vec![update],
            ..StepInput::default()
        };
        let ticket = device
            .submit(&input, &mut |ops| model.forward(ops))
            .unwrap();
        device.collect(ticket).unwrap();
        Self {
            device,
            model,
            vocab_size: config.vocab_size,
        }
    }

    /// Runs `ids` from `position` on, and returns each one's greedy token and row of logits.
    fn run(&mut self, ids: &[u32], position: usize) -> Vec<(u32, Vec<f32>)> {
        let sampling = Sampling {
            temperature: 0.0,
            top_p: 1.0,
            top_k: None,
            seed: 0,
            output_index: 0,
        };
        let want = LogitsWant::Sample(sampling);
        let input = StepInput {
            tokens: ids.iter().map(|&id| TokenInput::Id(id)).collect(),
            spans: vec![Span {
                row: TableRow(0),
                first_token: 0,
                n_tokens: ids.len() as u32,
                first_position: position as u32,
            }],
            logits: (0..ids.len() as u32)
                .map(|token| LogitsRow {
                    token,
                    want,
                    n_logprobs: None,
                })
                .collect(),
            ..StepInput::default()
        };
        let model = &self.model;
        let ticket = self
            .device
            .submit(&input, &mut |ops| model.forward(ops))
            .unwrap();
        let drawn = self.device.collect(ticket).unwrap();
        let logits = self.device.read(self.model.logits()).unwrap();
        let rows = logits.chunks(self.vocab_size).map(<[f32]>::to_vec);
        drawn
            .sampled
            .iter()
            .map(|sampled| sampled.token)
            .zip(rows)
            .collect()
    }

    /// Runs `ids` from the start, `chunk` at a time.
    fn prefill(&mut self, ids: &[u32], chunk: usize) -> Vec<(u32, Vec<f32>)> {
        let chunks = ids.chunks(chunk).enumerate();
        chunks
            .flat_map(|(i, part)| self.run(part, i * chunk))
            .collect()
    }
}

fn logsumexp(row: &[f32]) -> f32 {
    let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    max + row
        .iter()
        .map(|x| f64::from(x - max).exp())
        .sum::<f64>()
        .ln() as f32
}

/// Largest difference from the golden rows of one prompt.
fn error_of(prompt: &Value, rows: &[(u32, Vec<f32>)]) -> f32 {
    let mut error = 0.0_f32;
    let golden = &prompt["float32"];
    for want in golden["rows"].as_array().unwrap() {
        let row = &rows[want["position"].as_u64().unwrap() as usize].1;
        error = error.max((logsumexp(row) - want["logsumexp"].as_f64().unwrap() as f32).abs());
        for top in want["top"].as_array().unwrap() {
            let (id, logit) = (
                top[0].as_u64().unwrap() as usize,
                top[1].as_f64().unwrap() as f32,
            );
            error = error.max((row[id] - logit).abs());
        }
    }
    let last = &rows.last().unwrap().1;
    for (found, want) in last.iter().zip(floats(&golden["last_row"])) {
        error = error.max((found - want).abs());
    }
    error
}

fn float32_logits(kind: DeviceKind) {
    for case in cases() {
        let mut bench = Bench::new(&case, kind, Precision::F32);
        for prompt in golden(&case)["prompts"].as_array().unwrap() {
            let ids = tokens(&prompt["ids"]);
            let whole = bench.prefill(&ids, support::MAX_TOKENS);
            let error = error_of(prompt, &whole);
            assert!(
                error <= MAX_ERROR,
                "{}: {} tokens: error {error}",
                case.display(),
                ids.len()
            );
            for chunk in [1, 5, 16] {
                let chunked = bench.prefill(&ids, chunk);
                assert_eq!(
                    chunked,
                    whole,
                    "{}: {} tokens by {chunk}",
                    case.display(),
                    ids.len()
                );
            }
        }
    }
}

fn bfloat16_tokens(kind: DeviceKind, cases: Vec<PathBuf>) {
    for case in cases {
        let golden = golden(&case);
        let bound = golden["margin_bound"].as_f64().unwrap() as f32;
        let mut bench = Bench::new(&case, kind, Precision::BF16);
        let (mut n_compared, mut n_all) = (0, 0);
        for prompt in golden["prompts"].as_array().unwrap() {
            let ids = tokens(&prompt["ids"]);
            let mut drawn = bench.prefill(&ids, support::MAX_TOKENS).last().unwrap().0;
            let float32 = &prompt["float32"];
            // Each step is fed the golden token, so that one close call does not end the comparison.
            for (i, (want, margin)) in tokens(&float32["greedy"])
                .into_iter()
                .zip(floats(&float32["margins"]))
                .enumerate()
            {
                n_all += 1;
                if margin > bound {
                    n_compared += 1;
                    assert_eq!(
                        drawn,
                        want,
                        "{}: {} tokens, output {i}, margin {margin}",
                        case.display(),
                        ids.len()
                    );
                }
                drawn = bench.run(&[want], ids.len() + i)[0].0;
            }
        }
        assert!(
            n_compared * 4 >= n_all,
            "{}: only {n_compared} of {n_all} margins exceed {bound}",
            case.display()
        );
    }
}

#[test]
fn reference_float32_logits_are_those_of_transformers() {
    float32_logits(DeviceKind::Reference);
}

#[test]
fn reference_tokens_are_those_of_transformers_where_the_margin_decides() {
    bfloat16_tokens(DeviceKind::Reference, cases());
}

#[test]
fn cpu_float32_logits_are_those_of_transformers() {
    float32_logits(DeviceKind::Cpu);
}

#[test]
fn cpu_bfloat16_tokens_are_those_of_transformers_where_the_margin_decides() {
    bfloat16_tokens(DeviceKind::Cpu, cases());
}

#[cfg(feature = "cuda-shim")]
#[test]
fn cuda_bfloat16_tokens_are_those_of_transformers_where_the_margin_decides() {
    bfloat16_tokens(DeviceKind::Cuda, support::cuda_cases());
}
