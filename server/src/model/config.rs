//! config.json and generation_config.json, parsed once: past this file a configuration holds only valid values.
//!
//! Strict where a field changes the answer: what this server does not build is one sentence, never ignored. It knows no
//! tensors and no device.

use kvasir_kernels::stored::Dtype;

use super::LoadError;
use super::families;
use super::fields::Fields;
use super::quantization::Quantization;
use super::spec::DecoderSpec;

/// A model's configuration.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// Its layers.
    pub decoder: DecoderSpec,
    /// How its weights are stored.
    pub quantization: Quantization,
    /// The dtype that the author names, where one is named.
    pub dtype: Option<Dtype>,
    /// Tokens that end an answer; may be empty.
    pub eos_token_ids: Vec<u32>,
}

impl ModelConfig {
    /// Parses config.json and, where there is one, generation_config.json, whose end tokens count first.
    pub fn parse(config: &[u8], generation_config: Option<&[u8]>) -> Result<Self, LoadError> {
        let fields = Fields::parse("config.json", config)?;
        let decoder = families::decoder(&fields)?;
        let generation = generation_config
            .map(|bytes| Fields::parse("generation_config.json", bytes))
            .transpose()?;
        let end_tokens = |fields: &Fields| fields.tokens("eos_token_id", decoder.vocab_size);
        let eos_token_ids = match generation.as_ref().map(end_tokens).transpose()? {
            Some(Some(tokens)) => tokens,
            _ => end_tokens(&fields)?.unwrap_or_default(),
        };
        Ok(Self {
            quantization: Quantization::parse(&fields)?,
            dtype: match fields.dtype()? {
                None => match fields.object("text_config")? {
                    Some(nested) => nested.dtype()?,
                    None => None,
                },
                dtype => dtype,
            },
            eos_token_ids,
            decoder,
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Map, Value};

    use super::*;

    const SMALL: &str = r#"{"architectures":["LlamaForCausalLM"],"hidden_size":12,"num_attention_heads":2,
        "num_key_value_heads":1,"vocab_size":9,"intermediate_size":5,"num_hidden_layers":1,"eos_token_id":[1,2],
        "rope_theta":100.0,"rms_norm_eps":1e-5,"hidden_act":"silu"}"#;

    fn with(change: &str) -> Result<ModelConfig, LoadError> {
        let mut value: Value = serde_json::from_str(SMALL).unwrap();
        let change: Map<String, Value> = serde_json::from_str(change).unwrap();
        value.as_object_mut().unwrap().extend(change);
        ModelConfig::parse(value.to_string().as_bytes(), None)
    }

    fn frequencies(change: &str) -> Vec<f32> {
        let decoder = with(change).unwrap().decoder;
        decoder.ropes[0].serving(64).inverse_frequencies.clone()
    }

    #[test]
    fn what_is_not_built_or_makes_no_sense_is_one_sentence() {
        for (change, want) in [
            (
                r#"{"hidden_size":null}"#,
                "config.json: hidden_size is missing",
            ),
            (
                r#"{"hidden_size":0}"#,
                "config.json: hidden_size is 0, expected a whole number from 1 to 16777216",
            ),
            (
                r#"{"hidden_size":13}"#,
                "config.json: head_dim is missing, and hidden_size, 13, is no multiple of num_attention_heads, 2",
            ),
            (
                r#"{"head_dim":7}"#,
                "config.json: head_dim is 7, expected an even number up to 65536",
            ),
            (
                r#"{"num_attention_heads":3,"num_key_value_heads":2}"#,
                "config.json: num_attention_heads is 3, expected a multiple of num_key_value_heads, 2",
            ),
            (
                r#"{"hidden_act":"gelu"}"#,
                "config.json: hidden_act is \"gelu\", expected \"silu\"",
            ),
            (
                r#"{"architectures":["GptOssForCausalLM"]}"#,
                "config.json: architectures is [\"GptOssForCausalLM\"], expected one of Gemma3ForCausalLM, \
                 Gemma3ForConditionalGeneration, LlamaForCausalLM, Mistral3ForConditionalGeneration, \
                 MistralForCausalLM, MixtralForCausalLM, Phi3ForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM, \
                 Qwen3MoeForCausalLM",
            ),
            (
                r#"{"quantization_config":{"quant_method":"bitsandbytes"}}"#,
                "config.json: quantization_config.quant_method is \"bitsandbytes\", expected \"fp8\", \"gptq\", \
                 \"awq\" or \"compressed-tensors\"",
            ),
            (
                r#"{"rope_scaling":{"rope_type":"dynamic","factor":2}}"#,
                "config.json: rope_scaling.rope_type is \"dynamic\", expected \"default\", \"linear\", \"llama3\", \
                 \"yarn\" or \"longrope\"",
            ),
            (
                r#"{"rope_parameters":{"rope_type":"llama3","rope_theta":1e4}}"#,
                "config.json: rope_parameters.factor is missing",
            ),
            (
                r#"{"partial_rotary_factor":0.2}"#,
                "config.json: partial_rotary_factor is 0.2, expected a share of head_dim, 6, that is an even number \
                 of elements",
            ),
            (
                r#"{"eos_token_id":9}"#,
                "config.json: eos_token_id holds 9, expected token ids below vocab_size, 9",
            ),
            (
                r#"{"torch_dtype":"float64"}"#,
                "config.json: torch_dtype is \"float64\", expected bfloat16, float16 or float32",
            ),
            (
                r#"{"sliding_window":4096}"#,
                "config.json: sliding_window is 4096, expected none",
            ),
            (
                r#"{"architectures":["MixtralForCausalLM"],"num_local_experts":4,"num_experts_per_tok":5}"#,
                "config.json: num_experts_per_tok is 5, expected at most 4, the number of experts",
            ),
        ] {
            assert_eq!(with(change).unwrap_err().to_string(), want, "{change}");
        }
    }

    #[test]
    fn both_spellings_of_rope_mean_the_same() {
        let scaling = r#""factor":8.0,"low_freq_factor":1.0,"high_freq_factor":4.0,"original_max_position_embeddings":64"#;
        let old = frequencies(&format!(
            r#"{{"rope_theta":500.0,"rope_scaling":{{"rope_type":"llama3",{scaling}}}}}"#
        ));
        let new = frequencies(&format!(
            r#"{{"rope_theta":null,"rope_parameters":{{"rope_type":"llama3","rope_theta":500.0,{scaling}}}}}"#
        ));
        assert_eq!(old, new);
        assert_ne!(old, frequencies("{}"));
    }

    #[test]
    fn linear_scaling_divides_positions() {
        let plain = frequencies("{}");
        let scaled = frequencies(r#"{"rope_scaling":{"type":"linear","factor":4.0}}"#);
        let quarters: Vec<f32> = plain.iter().map(|f| f / 4.0).collect();
        assert_eq!(scaled, quarters);
    }

    #[test]
    fn the_end_tokens_of_generation_config_count_first() {
        let parse =
            |generation: &str| ModelConfig::parse(SMALL.as_bytes(), Some(generation.as_bytes()));
        assert_eq!(parse(r#"{"eos_token_id":7}"#).unwrap().eos_token_ids, [7]);
        assert_eq!(parse("{}").unwrap().eos_token_ids, [1, 2]);
    }

    proptest! {
        #[test]
        fn mutated_bytes_never_panic(changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6)) {
            let mut bytes = SMALL.as_bytes().to_vec();
            for (at, byte) in changes {
                let at = at.index(bytes.len());
                bytes[at] = byte;
            }
            let _ = ModelConfig::parse(&bytes, Some(&bytes));
        }
    }
}
