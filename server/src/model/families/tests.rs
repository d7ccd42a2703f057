//! Configurations of published checkpoints: each loads onto the null device, with as many parameters as its authors say,
//! and a forward pass whose widths agree, or is refused in one sentence.
//!
//! tests/checkpoints.json holds, by name, the fields of config.json that this server reads, written down from public
//! sources; factors of LongRoPE are ones there, as many as there are.

use kvasir_kernels::device::Device;
use kvasir_kernels::null::NullDevice;
use kvasir_kernels::shape::{Limits, Precision};
use kvasir_kernels::step::{Span, StepInput, TableRow, TokenInput};
use serde_json::{Map, Value};

use crate::model::config::ModelConfig;
use crate::model::decoder::Decoder;
use crate::model::weights::Tensors;

enum Expected {
    /// Billions of parameters, of the decoder alone, a tied embedding counted once.
    Loads(f64),
    Refused(&'static str),
}
use Expected::{Loads, Refused};

const EXPECTED: &[(&str, Expected)] = &[
    ("Qwen/Qwen2-0.5B-Instruct", Loads(0.494)),
    ("Qwen/Qwen2.5-14B", Loads(14.77)),
    ("Qwen/Qwen2.5-32B-Instruct", Loads(32.76)),
    ("Qwen/Qwen2.5-3B", Loads(3.086)),
    ("Qwen/Qwen2.5-7B-Instruct", Loads(7.616)),
    ("Qwen/Qwen3-0.6B", Loads(0.596)),
    ("Qwen/Qwen3-1.7B", Loads(1.721)),
    ("Qwen/Qwen3-14B", Loads(14.77)),
    ("Qwen/Qwen3-235B-A22B-FP8", Loads(235.1)),
    ("Qwen/Qwen3-30B-A3B", Loads(30.53)),
    ("Qwen/Qwen3-30B-A3B-FP8", Loads(30.53)),
    ("Qwen/Qwen3-32B", Loads(32.76)),
    ("Qwen/Qwen3-32B-FP8", Loads(32.76)),
    ("Qwen/Qwen3-4B", Loads(4.022)),
    ("Qwen/Qwen3-4B-Thinking-2507", Loads(4.022)),
    ("Qwen/Qwen3-8B", Loads(8.191)),
    (
        "Qwen/Qwen3.5-27B",
        Refused("architectures is [\"Qwen3_5ForConditionalGeneration\"]"),
    ),
    (
        "Qwen/Qwen3.5-35B-A3B",
        Refused("architectures is [\"Qwen3_5MoeForConditionalGeneration\"]"),
    ),
    (
        "deepseek-ai/DeepSeek-R1",
        Refused("architectures is [\"DeepseekV3ForCausalLM\"]"),
    ),
    ("deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", Loads(1.777)),
    (
        "deepseek-ai/DeepSeek-V3",
        Refused("architectures is [\"DeepseekV3ForCausalLM\"]"),
    ),
    (
        "deepseek-ai/DeepSeek-V3.2",
        Refused("architectures is [\"DeepseekV32ForCausalLM\"]"),
    ),
    ("google/gemma-3-12b-it", Loads(11.77)),
    ("google/gemma-3-1b-it", Loads(0.9999)),
    ("google/gemma-3-27b-it", Loads(27.01)),
    ("google/gemma-3-4b-it", Loads(3.880)),
    (
        "google/gemma-4-26B-A4B",
        Refused("architectures is [\"Gemma4ForConditionalGeneration\"]"),
    ),
    ("meta-llama/Llama-3.1-70B-Instruct", Loads(70.55)),
    ("meta-llama/Llama-3.1-8B", Loads(8.030)),
    ("meta-llama/Llama-3.1-8B-Instruct", Loads(8.030)),
    ("meta-llama/Llama-3.2-1B-Instruct", Loads(1.236)),
    ("meta-llama/Llama-3.2-3B-Instruct", Loads(3.213)),
    ("meta-llama/Llama-3.3-70B-Instruct", Loads(70.55)),
    ("microsoft/Phi-3.5-mini-instruct", Loads(3.821)),
    ("microsoft/Phi-4-mini-instruct", Loads(3.836)),
    ("microsoft/phi-4", Loads(14.66)),
    ("mistralai/Devstral-Small-2-24B-Instruct-2512", Loads(23.57)),
    ("mistralai/Mistral-7B-Instruct-v0.3", Loads(7.248)),
    ("mistralai/Mistral-Nemo-Instruct-2407", Loads(12.25)),
    ("mistralai/Mixtral-8x7B-v0.1", Loads(46.70)),
    (
        "openai/gpt-oss-120b",
        Refused("architectures is [\"GptOssForCausalLM\"]"),
    ),
    (
        "openai/gpt-oss-20b",
        Refused("architectures is [\"GptOssForCausalLM\"]"),
    ),
    (
        "zai-org/GLM-5",
        Refused("architectures is [\"GlmMoeDsaForCausalLM\"]"),
    ),
];

fn checkpoints() -> Map<String, Value> {
    serde_json::from_str(include_str!("../../../tests/checkpoints.json")).unwrap()
}

/// Billions of parameters, after a step of two tokens.
fn load_onto_null_device(config: &ModelConfig) -> f64 {
    let (max_model_len, block_size) = (config.decoder.max_position_embeddings, 16);
    let limits = Limits {
        max_tokens: 8,
        max_sequences: 1,
        max_logits_rows: 1,
        max_blocks_per_sequence: max_model_len.div_ceil(block_size) as usize,
    };
    let shape = config
        .decoder
        .model_shape(max_model_len, block_size, limits);
    let mut device = NullDevice::default();
    device.add_model(&shape).unwrap();
    let decoder = Decoder::prepare(
        &config.decoder,
        config.quantization,
        Precision::BF16,
        Tensors::imagined(),
        &mut device,
        &mut |_| {},
    )
    .unwrap();
    device.allocate_kv(1).unwrap();
    let input = StepInput {
        tokens: vec![TokenInput::Id(1); 2],
        spans: vec![Span {
            row: TableRow(0),
            first_token: 0,
            n_tokens: 2,
            first_position: 0,
        }],
        logits: vec![1],
        ..StepInput::default()
    };
    device.submit(&input, &|ops| decoder.forward(ops)).unwrap();
    device.memory().weights as f64 / 2e9
}

#[test]
fn published_checkpoints_load_or_are_refused_in_one_sentence() {
    let checkpoints = checkpoints();
    for (name, expected) in EXPECTED {
        let bytes = checkpoints[*name].to_string();
        let found = ModelConfig::parse(bytes.as_bytes(), None);
        match (expected, found) {
            (Loads(billions), Ok(config)) => {
                let found = load_onto_null_device(&config);
                assert!(
                    (found / billions - 1.0).abs() < 1.5e-3,
                    "{name}: {found} billion parameters, expected {billions}"
                );
            }
            (Refused(why), Err(error)) => {
                let error = error.to_string();
                assert!(
                    error.starts_with(&format!("config.json: {why}")),
                    "{name}: {error}"
                );
                assert!(!error.contains('\n'), "{name}: {error}");
            }
            (Loads(_), Err(error)) => panic!("{name}: {error}"),
            (Refused(_), Ok(_)) => panic!("{name} is not refused"),
        }
    }
    assert_eq!(
        EXPECTED.len(),
        checkpoints.len(),
        "each checkpoint is expected to do something"
    );
}

#[test]
fn gemma_3_12b_has_six_groups_of_eight_layers() {
    let bytes = checkpoints()["google/gemma-3-12b-it"].to_string();
    let config = ModelConfig::parse(bytes.as_bytes(), None).unwrap();
    let limits = Limits {
        max_tokens: 8,
        max_sequences: 1,
        max_logits_rows: 1,
        max_blocks_per_sequence: 2048,
    };
    let shape = config.decoder.model_shape(32_768, 16, limits);
    let sizes: Vec<usize> = shape
        .groups
        .iter()
        .map(|group| group.caches.len())
        .collect();
    assert_eq!(sizes, [8; 6]);
    let windows = shape.groups.iter().filter(|group| group.window.is_some());
    assert_eq!(windows.count(), 5);
}
