//! config.json and generation_config.json, parsed once: past this file a configuration holds only valid values.
//!
//! Strict where a field changes the answer: what this server does not build is one sentence, never ignored. Field
//! names are those of Transformers; versions 4 (`rope_theta`, `rope_scaling`, `torch_dtype`) and 5 (`rope_parameters`,
//! `dtype`) are both read. It knows no tensors and no device.

use kvasir_kernels::device::{Dtype, Rope};
use serde_json::{Map, Value};

use super::LoadError;

/// The largest size that a field may have: sizes below it multiply without overflow.
const MAX_SIZE: u64 = 1 << 24;

/// A decoder of the Llama family.
#[derive(Clone, Debug, PartialEq)]
pub struct LlamaConfig {
    /// Rows of the embedding.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the gated MLP.
    pub intermediate_size: usize,
    /// Transformer layers.
    pub n_layers: usize,
    /// Query heads, a multiple of `n_kv_heads`.
    pub n_heads: usize,
    /// Key and value heads.
    pub n_kv_heads: usize,
    /// Elements of a head; even.
    pub head_dim: usize,
    /// Epsilon of RMSNorm.
    pub rms_norm_epsilon: f32,
    /// The embedding is also the output matrix.
    pub tie_word_embeddings: bool,
    /// Biases on q, k, v and o.
    pub attention_bias: bool,
    /// Biases on gate, up and down.
    pub mlp_bias: bool,
    /// Longest context that the model was made for.
    pub max_position_embeddings: u32,
    /// The dtype that the author names, where one is named.
    pub dtype: Option<Dtype>,
    /// Tokens that end an answer; may be empty.
    pub eos_token_ids: Vec<u32>,
    /// `[head_dim / 2]`, scaling applied.
    pub inverse_frequencies: Vec<f32>,
}

impl LlamaConfig {
    /// Parses config.json and, where there is one, generation_config.json, whose end tokens count first.
    pub fn parse(config: &[u8], generation_config: Option<&[u8]>) -> Result<Self, LoadError> {
        let fields = Fields::parse("config.json", config)?;
        fields.check_supported()?;

        let hidden_size = fields.size("hidden_size", None)?;
        let n_heads = fields.size("num_attention_heads", None)?;
        let n_kv_heads = fields.size("num_key_value_heads", Some(n_heads))?;
        if n_heads % n_kv_heads != 0 {
            return Err(fields.wrong(format!(
                "num_attention_heads is {n_heads}, expected a multiple of num_key_value_heads, {n_kv_heads}"
            )));
        }
        let head_dim = match fields.get("head_dim") {
            None if hidden_size % n_heads != 0 => {
                return Err(fields.wrong(format!(
                    "head_dim is missing, and hidden_size, {hidden_size}, is no multiple of num_attention_heads, {n_heads}"
                )));
            }
            None => hidden_size / n_heads,
            Some(_) => fields.size("head_dim", None)?,
        };
        if head_dim % 2 != 0 || head_dim > 1 << 16 {
            return Err(fields.wrong(format!(
                "head_dim is {head_dim}, expected an even number up to 65536"
            )));
        }
        let rms_norm_eps = fields.number("rms_norm_eps", Some(1e-6))?;
        if !(0.0..1.0).contains(&rms_norm_eps) {
            return Err(fields.wrong(format!(
                "rms_norm_eps is {rms_norm_eps}, expected 0 or more and below 1"
            )));
        }
        let vocab_size = fields.size("vocab_size", None)?;
        let generation = generation_config
            .map(|bytes| Fields::parse("generation_config.json", bytes))
            .transpose()?;
        let eos_token_ids = match generation
            .map(|generation| generation.tokens("eos_token_id", vocab_size))
            .transpose()?
        {
            Some(Some(tokens)) => tokens,
            _ => fields
                .tokens("eos_token_id", vocab_size)?
                .unwrap_or_default(),
        };
        Ok(Self {
            vocab_size,
            hidden_size,
            intermediate_size: fields.size("intermediate_size", None)?,
            n_layers: fields.size("num_hidden_layers", None)?,
            n_heads,
            n_kv_heads,
            head_dim,
            rms_norm_epsilon: rms_norm_eps as f32,
            tie_word_embeddings: fields.flag("tie_word_embeddings")?,
            attention_bias: fields.flag("attention_bias")?,
            mlp_bias: fields.flag("mlp_bias")?,
            max_position_embeddings: fields.size("max_position_embeddings", Some(2048))? as u32,
            dtype: fields.dtype()?,
            eos_token_ids,
            inverse_frequencies: inverse_frequencies(&fields, head_dim)?,
        })
    }

    /// The rotary embedding for positions below `max_positions`.
    pub fn rope(&self, max_positions: u32) -> Rope {
        Rope {
            inverse_frequencies: self.inverse_frequencies.clone(),
            scale: 1.0,
            max_positions: max_positions as usize,
        }
    }
}

/// A JSON object of a file, read field by field.
struct Fields {
    file: &'static str,
    map: Map<String, Value>,
}

impl Fields {
    fn parse(file: &'static str, bytes: &[u8]) -> Result<Self, LoadError> {
        match serde_json::from_slice(bytes) {
            Ok(Value::Object(map)) => Ok(Self { file, map }),
            Ok(other) => Err(wrong(
                file,
                format!("found {}, expected a JSON object", kind(&other)),
            )),
            Err(error) => Err(wrong(file, format!("not valid JSON: {error}"))),
        }
    }

    fn wrong(&self, message: String) -> LoadError {
        wrong(self.file, message)
    }

    /// The field, where it is present and not null.
    fn get(&self, name: &str) -> Option<&Value> {
        self.map.get(name).filter(|value| !value.is_null())
    }

    fn size(&self, name: &str, default: Option<usize>) -> Result<usize, LoadError> {
        match (self.get(name), default) {
            (None, Some(default)) => Ok(default),
            (None, None) => Err(self.wrong(format!("{name} is missing"))),
            (Some(value), _) => match value.as_u64() {
                Some(n) if (1..=MAX_SIZE).contains(&n) => Ok(n as usize),
                _ => Err(self.wrong(format!(
                    "{name} is {}, expected a whole number from 1 to {MAX_SIZE}",
                    brief(value)
                ))),
            },
        }
    }

    fn number(&self, name: &str, default: Option<f64>) -> Result<f64, LoadError> {
        match (self.get(name), default) {
            (None, Some(default)) => Ok(default),
            (None, None) => Err(self.wrong(format!("{name} is missing"))),
            (Some(value), _) => value.as_f64().ok_or_else(|| {
                self.wrong(format!("{name} is {}, expected a number", brief(value)))
            }),
        }
    }

    fn flag(&self, name: &str) -> Result<bool, LoadError> {
        match self.get(name) {
            None => Ok(false),
            Some(Value::Bool(flag)) => Ok(*flag),
            Some(value) => Err(self.wrong(format!(
                "{name} is {}, expected true or false",
                brief(value)
            ))),
        }
    }

    /// A token id or a list of them. `None` where the field is absent.
    fn tokens(&self, name: &str, vocab_size: usize) -> Result<Option<Vec<u32>>, LoadError> {
        let id = |value: &Value| match value.as_u64() {
            Some(id) if id < vocab_size as u64 => Ok(id as u32),
            _ => Err(self.wrong(format!(
                "{name} holds {}, expected token ids below vocab_size, {vocab_size}",
                brief(value)
            ))),
        };
        match self.get(name) {
            None => Ok(None),
            Some(Value::Array(list)) => list.iter().map(id).collect::<Result<_, _>>().map(Some),
            Some(value) => Ok(Some(vec![id(value)?])),
        }
    }

    fn dtype(&self) -> Result<Option<Dtype>, LoadError> {
        let Some(value) = self.get("dtype").or_else(|| self.get("torch_dtype")) else {
            return Ok(None);
        };
        match value.as_str() {
            Some("bfloat16") => Ok(Some(Dtype::BF16)),
            Some("float16") => Ok(Some(Dtype::F16)),
            Some("float32") => Ok(Some(Dtype::F32)),
            _ => Err(self.wrong(format!(
                "dtype is {}, expected bfloat16, float16 or float32",
                brief(value)
            ))),
        }
    }

    /// Refuses what would change the answer and is not built.
    fn check_supported(&self) -> Result<(), LoadError> {
        let named = self.get("architectures").and_then(Value::as_array);
        if !named.is_some_and(|names| names.iter().any(|name| name == "LlamaForCausalLM")) {
            let found = self
                .get("architectures")
                .map_or("missing".to_owned(), brief);
            return Err(self.wrong(format!(
                "architectures is {found}, expected [\"LlamaForCausalLM\"]"
            )));
        }
        if let Some(act) = self.get("hidden_act").filter(|act| *act != "silu") {
            return Err(self.wrong(format!("hidden_act is {}, expected \"silu\"", brief(act))));
        }
        if self.get("quantization_config").is_some() {
            return Err(
                self.wrong("quantization_config is set, expected unquantized weights".to_owned())
            );
        }
        if let Some(window) = self.get("sliding_window") {
            return Err(self.wrong(format!(
                "sliding_window is {}, expected none",
                brief(window)
            )));
        }
        Ok(())
    }
}

/// The angles' frequencies: `theta^(-2i / head_dim)`, scaled as the rope type says, in f32 as Transformers computes
/// them (`_compute_llama3_parameters` in modeling_rope_utils.py).
fn inverse_frequencies(fields: &Fields, head_dim: usize) -> Result<Vec<f32>, LoadError> {
    let (name, scaling) = match (fields.get("rope_parameters"), fields.get("rope_scaling")) {
        (Some(value), _) => ("rope_parameters", Some(value)),
        (None, value) => ("rope_scaling", value),
    };
    let rope = match scaling {
        None => Fields {
            file: fields.file,
            map: Map::new(),
        },
        Some(Value::Object(map)) => Fields {
            file: fields.file,
            map: map.clone(),
        },
        Some(other) => {
            return Err(fields.wrong(format!("{name} is {}, expected an object", brief(other))));
        }
    };
    let theta = rope.number(
        "rope_theta",
        Some(fields.number("rope_theta", Some(10_000.0))?),
    )?;
    if !(theta.is_finite() && theta > 1.0) {
        return Err(fields.wrong(format!("rope_theta is {theta}, expected more than 1")));
    }
    for holder in [fields, &rope] {
        let factor = holder.number("partial_rotary_factor", Some(1.0))?;
        if factor != 1.0 {
            return Err(fields.wrong(format!("partial_rotary_factor is {factor}, expected 1")));
        }
    }
    let frequencies = (0..head_dim / 2).map(|i| {
        let exponent = (2 * i) as f32 / head_dim as f32;
        1.0 / theta.powf(f64::from(exponent)) as f32
    });
    match rope
        .get("rope_type")
        .or_else(|| rope.get("type"))
        .map_or(Some("default"), Value::as_str)
    {
        Some("default") => Ok(frequencies.collect()),
        Some("llama3") => {
            let positive = |field: &str| match rope.number(field, None)? {
                n if n.is_finite() && n > 0.0 => Ok(n as f32),
                n => Err(fields.wrong(format!("{name}.{field} is {n}, expected more than 0"))),
            };
            let factor = positive("factor")?;
            let (low, high) = (positive("low_freq_factor")?, positive("high_freq_factor")?);
            let context = positive("original_max_position_embeddings")?;
            if low >= high {
                return Err(fields.wrong(format!(
                    "{name}.low_freq_factor is {low}, expected less than high_freq_factor, {high}"
                )));
            }
            Ok(frequencies
                .map(|frequency| {
                    let wavelength = 2.0 * std::f32::consts::PI / frequency;
                    if wavelength < context / high {
                        frequency
                    } else if wavelength > context / low {
                        frequency / factor
                    } else {
                        let smooth = (context / wavelength - low) / (high - low);
                        (1.0 - smooth) * (frequency / factor) + smooth * frequency
                    }
                })
                .collect())
        }
        _ => {
            let found = rope
                .get("rope_type")
                .or_else(|| rope.get("type"))
                .map_or(String::new(), brief);
            Err(fields.wrong(format!(
                "{name}.rope_type is {found}, expected \"default\" or \"llama3\""
            )))
        }
    }
}

fn wrong(file: &str, message: String) -> LoadError {
    LoadError::Config {
        file: file.to_owned(),
        message,
    }
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

/// A value as it stands in the file, cut where it is long.
fn brief(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(80) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SMALL: &str = r#"{"architectures":["LlamaForCausalLM"],"hidden_size":12,"num_attention_heads":2,
        "num_key_value_heads":1,"vocab_size":9,"intermediate_size":5,"num_hidden_layers":1,"eos_token_id":[1,2],
        "rope_theta":100.0,"rms_norm_eps":1e-5,"hidden_act":"silu"}"#;

    fn with(change: &str) -> Result<LlamaConfig, LoadError> {
        let mut value: Value = serde_json::from_str(SMALL).unwrap();
        let change: Map<String, Value> = serde_json::from_str(change).unwrap();
        value.as_object_mut().unwrap().extend(change);
        LlamaConfig::parse(value.to_string().as_bytes(), None)
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
                r#"{"architectures":["MistralForCausalLM"]}"#,
                "config.json: architectures is [\"MistralForCausalLM\"], expected [\"LlamaForCausalLM\"]",
            ),
            (
                r#"{"quantization_config":{"bits":4}}"#,
                "config.json: quantization_config is set, expected unquantized weights",
            ),
            (
                r#"{"rope_scaling":{"rope_type":"yarn","factor":2}}"#,
                "config.json: rope_scaling.rope_type is \"yarn\", expected \"default\" or \"llama3\"",
            ),
            (
                r#"{"rope_parameters":{"rope_type":"llama3","rope_theta":1e4}}"#,
                "config.json: factor is missing",
            ),
            (
                r#"{"eos_token_id":9}"#,
                "config.json: eos_token_id holds 9, expected token ids below vocab_size, 9",
            ),
            (
                r#"{"torch_dtype":"float64"}"#,
                "config.json: dtype is \"float64\", expected bfloat16, float16 or float32",
            ),
        ] {
            assert_eq!(with(change).unwrap_err().to_string(), want, "{change}");
        }
    }

    #[test]
    fn both_spellings_of_rope_mean_the_same() {
        let scaling = r#""factor":8.0,"low_freq_factor":1.0,"high_freq_factor":4.0,"original_max_position_embeddings":64"#;
        let old = with(&format!(
            r#"{{"rope_theta":500.0,"rope_scaling":{{"rope_type":"llama3",{scaling}}}}}"#
        ))
        .unwrap();
        let new = with(&format!(
            r#"{{"rope_theta":null,"rope_parameters":{{"rope_type":"llama3","rope_theta":500.0,{scaling}}}}}"#
        ));
        assert_eq!(old, new.unwrap());
        assert_ne!(
            old.inverse_frequencies,
            with("{}").unwrap().inverse_frequencies
        );
    }

    #[test]
    fn the_end_tokens_of_generation_config_count_first() {
        let parse =
            |generation: &str| LlamaConfig::parse(SMALL.as_bytes(), Some(generation.as_bytes()));
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
            let _ = LlamaConfig::parse(&bytes, Some(&bytes));
        }
    }
}
