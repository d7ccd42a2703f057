//! What a request that says nothing gets: the model's defaults, from its `generation_config.json`.

use std::num::NonZeroU32;

use serde::Deserialize;

/// Defaults of the model.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SamplingDefaults {
    /// Finite, >= 0.
    pub temperature: f32,
    /// In (0, 1].
    pub top_p: f32,
    /// `None` keeps all.
    pub top_k: Option<NonZeroU32>,
    /// In [0, 1]; 0 keeps all.
    pub min_p: f32,
    /// Above 0; 1 penalises nothing.
    pub repetition_penalty: f32,
    /// Tokens to generate, where a request sets no number; `None`: as many as the context has room for.
    pub max_tokens: Option<u32>,
}

impl Default for SamplingDefaults {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_p: 1.0,
            top_k: None,
            min_p: 0.0,
            repetition_penalty: 1.0,
            max_tokens: None,
        }
    }
}

#[derive(Deserialize)]
struct GenerationConfig {
    do_sample: Option<bool>,
    temperature: Option<f32>,
    top_p: Option<f32>,
    top_k: Option<u32>,
    max_new_tokens: Option<u32>,
    repetition_penalty: Option<f32>,
    min_p: Option<f32>,
    typical_p: Option<f32>,
    no_repeat_ngram_size: Option<u32>,
}

impl SamplingDefaults {
    /// Reads `generation_config.json`: temperature, top_p, top_k, min_p, repetition_penalty and max_new_tokens, as vLLM
    /// does, and greedy where `do_sample` is false in so many words. Also returns the names of settings that would change answers and that
    /// aren't built.
    pub fn from_generation_config(bytes: &[u8]) -> Result<(Self, Vec<String>), String> {
        let config: GenerationConfig =
            serde_json::from_slice(bytes).map_err(|e| format!("generation_config.json: {e}"))?;
        let mut defaults = Self {
            top_k: config.top_k.and_then(NonZeroU32::new),
            max_tokens: config.max_new_tokens,
            ..Self::default()
        };
        let wrong = |field: &str, found: f32, want: &str| {
            format!("generation_config.json: {field} is {found}, expected {want}")
        };
        if let Some(t) = config.temperature {
            if !(t.is_finite() && t >= 0.0) {
                return Err(wrong("temperature", t, "0 or more"));
            }
            defaults.temperature = t;
        }
        if config.do_sample == Some(false) {
            defaults.temperature = 0.0;
        }
        if let Some(p) = config.top_p {
            if !(p > 0.0 && p <= 1.0) {
                return Err(wrong("top_p", p, "above 0 and at most 1"));
            }
            defaults.top_p = p;
        }
        if let Some(p) = config.min_p {
            if !(0.0..=1.0).contains(&p) {
                return Err(wrong("min_p", p, "0 to 1"));
            }
            defaults.min_p = p;
        }
        if let Some(p) = config.repetition_penalty {
            if !(p > 0.0 && p.is_finite()) {
                return Err(wrong("repetition_penalty", p, "above 0"));
            }
            defaults.repetition_penalty = p;
        }
        if config.max_new_tokens == Some(0) {
            return Err(wrong("max_new_tokens", 0.0, "1 or more"));
        }
        let ignored = [
            ("typical_p", config.typical_p.is_some_and(|p| p != 1.0)),
            (
                "no_repeat_ngram_size",
                config.no_repeat_ngram_size.is_some_and(|n| n != 0),
            ),
        ];
        let ignored = ignored.into_iter().filter(|(_, set)| *set);
        Ok((defaults, ignored.map(|(name, _)| name.to_owned()).collect()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_models_defaults_are_read() {
        let (defaults, ignored) = SamplingDefaults::from_generation_config(
            br#"{"temperature": 0.6, "top_p": 0.9, "top_k": 0, "max_new_tokens": 2048, "repetition_penalty": 1.1,
                "min_p": 0.05, "typical_p": 0.9, "no_repeat_ngram_size": 0, "bos_token_id": 1}"#,
        )
        .unwrap();
        let want = SamplingDefaults {
            temperature: 0.6,
            top_p: 0.9,
            top_k: None,
            min_p: 0.05,
            repetition_penalty: 1.1,
            max_tokens: Some(2048),
        };
        assert_eq!(defaults, want);
        assert_eq!(ignored, ["typical_p"]);
        for (config, want) in [
            (
                r#"{"min_p": 1.5}"#,
                "generation_config.json: min_p is 1.5, expected 0 to 1",
            ),
            (
                r#"{"repetition_penalty": 0}"#,
                "generation_config.json: repetition_penalty is 0, expected above 0",
            ),
            (
                r#"{"top_p": 7}"#,
                "generation_config.json: top_p is 7, expected above 0 and at most 1",
            ),
            (
                r#"{"max_new_tokens": 0}"#,
                "generation_config.json: max_new_tokens is 0, expected 1 or more",
            ),
        ] {
            let wrong = SamplingDefaults::from_generation_config(config.as_bytes()).unwrap_err();
            assert_eq!(wrong, want);
        }
    }
}
