//! Logits and greedy tokens against golden files of Transformers, on every device.
//!
//! In float32 every logit is within 1e-4 of Transformers, however the prompt is cut into chunks. In bfloat16 the
//! greedy token is the same wherever the margin between the first two exceeds the error that the golden file states.

#![allow(clippy::unwrap_used)] // A test's helpers, outside of #[test] functions.

mod support;

use std::path::{Path, PathBuf};

use kvasir_kernels::device::{Device, DeviceOptions};
use kvasir_kernels::shape::{Limits, Numerics, Precision};
use kvasir_kernels::step::{
    BlockId, LogitsEdit, LogitsRequest, LogitsRow, SamplingParams, Span, StepInput, TableRow,
    TableUpdate, TokenInput,
};
use kvasir_server::model::decoder::Decoder;
use kvasir_server::model::files::ModelFiles;
use kvasir_server::model::weights::WeightFiles;
use serde_json::Value;

use support::{DeviceKind, cases, config, floats, golden, longest_context, tokens};

const MAX_ERROR: f32 = 1e-4;
const BLOCK_SIZE: u32 = 8;

/// A model on a device with one sequence, driven step by step.
struct Bench {
    device: Box<dyn Device>,
    decoder: Decoder,
    vocab_size: usize,
}

impl Bench {
    fn new(case: &Path, kind: DeviceKind, precision: Precision) -> Self {
        let config = config(case);
        let context = longest_context(&golden(case), usize::MAX);
        let blocks_per_sequence = context.div_ceil(BLOCK_SIZE);
        let shape = config.decoder.model_shape(
            context,
            BLOCK_SIZE,
            Limits {
                max_tokens: support::MAX_TOKENS,
                max_sequences: 1,
                max_logits_rows: support::MAX_TOKENS,
                max_blocks_per_sequence: blocks_per_sequence as usize,
            },
        );
        let mut device = kind
            .make(DeviceOptions {
                numerics: Numerics::uniform(precision),
                memory_limit: None,
            })
            .unwrap();
        device.add_model(&shape).unwrap();
        let weight_files = WeightFiles::open(&ModelFiles::directory(case).unwrap()).unwrap();
        let decoder = Decoder::prepare(
            &config.decoder,
            config.quantization,
            precision,
            weight_files.tensors().unwrap(),
            &mut *device,
            &mut |_| {},
        )
        .map_err(|error| format!("{}: {error}", case.display()))
        .unwrap();
        let n_groups = shape.groups.len() as u32;
        let n_blocks = blocks_per_sequence * n_groups;
        device.allocate_kv(n_blocks).unwrap();
        // Blocks in an order of their own, so that a kernel that reads them one after another is found out.
        let step = (0..)
            .map(|i| 2 * i + 7)
            .find(|step| !n_blocks.is_multiple_of(*step))
            .unwrap();
        let block = |group, i| BlockId(((i * n_groups + group) * step + 3) % n_blocks);
        let input = StepInput {
            table_updates: (0..n_groups)
                .map(|group| TableUpdate {
                    group,
                    row: TableRow(0),
                    first: 0,
                    blocks: (0..blocks_per_sequence).map(|i| block(group, i)).collect(),
                })
                .collect(),
            ..StepInput::default()
        };
        let ticket = device.submit(&input, &|ops| decoder.forward(ops)).unwrap();
        device.sample(&ticket, decoder.logits(), &[]).unwrap();
        device.collect(ticket).unwrap();
        Self {
            device,
            decoder,
            vocab_size: shape.vocab_size,
        }
    }

    /// Runs `ids` from `position` on, and returns each one's greedy token and row of logits.
    fn run(&mut self, ids: &[u32], position: usize) -> Vec<(u32, Vec<f32>)> {
        let request = LogitsRequest::Sample {
            params: SamplingParams::GREEDY,
            output_index: 0,
            edit: LogitsEdit::default(),
        };
        let row = LogitsRow {
            request,
            n_logprobs: None,
        };
        let input = StepInput {
            tokens: ids.iter().map(|&id| TokenInput::Id(id)).collect(),
            spans: vec![Span {
                row: TableRow(0),
                first_token: 0,
                n_tokens: ids.len() as u32,
                first_position: position as u32,
            }],
            logits: (0..ids.len() as u32).collect(),
            ..StepInput::default()
        };
        let (device, decoder) = (&mut self.device, &self.decoder);
        let ticket = device.submit(&input, &|ops| decoder.forward(ops)).unwrap();
        let logits = decoder.logits();
        device
            .sample(&ticket, logits, &vec![row; ids.len()])
            .unwrap();
        let output = device.collect(ticket).unwrap();
        let logits = device.read_logits(logits).unwrap();
        let rows = logits.chunks(self.vocab_size).map(<[f32]>::to_vec);
        let tokens = output.sampled.iter().map(|sampled| sampled.token);
        tokens.zip(rows).collect()
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

fn float32_logits(kind: DeviceKind, cases: Vec<PathBuf>) {
    for case in cases {
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
            let mut sampled = bench.prefill(&ids, support::MAX_TOKENS).last().unwrap().0;
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
                        sampled,
                        want,
                        "{}: {} tokens, output {i}, margin {margin}",
                        case.display(),
                        ids.len()
                    );
                }
                sampled = bench.run(&[want], ids.len() + i)[0].0;
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
    float32_logits(DeviceKind::Reference, cases());
}

#[test]
fn reference_tokens_are_those_of_transformers_where_the_margin_decides() {
    bfloat16_tokens(DeviceKind::Reference, cases());
}

#[test]
fn cpu_float32_logits_are_those_of_transformers() {
    float32_logits(DeviceKind::Cpu, cases());
}

#[test]
fn quantized_weights_mean_what_their_tools_say() {
    float32_logits(DeviceKind::Reference, support::quantized_cases());
    float32_logits(DeviceKind::Cpu, support::quantized_cases());
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
