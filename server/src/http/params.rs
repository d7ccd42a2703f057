//! The fields that completions and chat share: how tokens are drawn, where the text ends, how it is returned.
//!
//! Parsed once, into types that hold valid values only. Fields that would change the answer and aren't built are
//! refused by name unless they say what happens anyway; a few that change no answer are accepted and ignored.

use std::num::NonZeroU32;

use serde::Deserialize;

use super::error::ApiError;
use super::fields::Fields;
use crate::text::stop::StopStrings;

/// More stop strings than anybody needs; each costs a little for every byte of text.
const MAX_STOP_STRINGS: usize = 32;
const MAX_STOP_BYTES: usize = 1024;
const MAX_STOP_TOKENS: usize = 256;

/// As in vLLM's default configuration.
pub(super) const MAX_LOGPROBS: u8 = 20;

/// Defaults of the model, from its `generation_config.json`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SamplingDefaults {
    /// Finite, >= 0.
    pub temperature: f32,
    /// In (0, 1].
    pub top_p: f32,
    /// `None` keeps all.
    pub top_k: Option<NonZeroU32>,
}

impl Default for SamplingDefaults {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_p: 1.0,
            top_k: None,
        }
    }
}

impl SamplingDefaults {
    /// Reads `generation_config.json`: temperature, top_p and top_k, as vLLM does, and greedy where `do_sample` is
    /// false in so many words. Also returns the names of settings that would change answers and that aren't built.
    pub fn from_generation_config(bytes: &[u8]) -> Result<(Self, Vec<String>), String> {
        #[derive(Deserialize)]
        struct Config {
            do_sample: Option<bool>,
            temperature: Option<f32>,
            top_p: Option<f32>,
            top_k: Option<u32>,
            repetition_penalty: Option<f32>,
            min_p: Option<f32>,
        }
        let config: Config =
            serde_json::from_slice(bytes).map_err(|e| format!("generation_config.json: {e}"))?;
        let mut defaults = Self::default();
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
        defaults.top_k = config.top_k.and_then(NonZeroU32::new);
        let ignored = [
            (
                "repetition_penalty",
                config.repetition_penalty.is_some_and(|p| p != 1.0),
            ),
            ("min_p", config.min_p.is_some_and(|p| p != 0.0)),
        ];
        Ok((
            defaults,
            ignored
                .into_iter()
                .filter(|(_, set)| *set)
                .map(|(name, _)| name.to_owned())
                .collect(),
        ))
    }
}

/// What completions and chat have in common.
#[derive(Clone, Debug)]
pub(super) struct Params {
    pub(super) model: Option<String>,
    pub(super) temperature: f32,
    pub(super) top_p: f32,
    pub(super) top_k: Option<NonZeroU32>,
    pub(super) seed: Option<u64>,
    pub(super) stop: StopStrings,
    pub(super) stop_token_ids: Vec<u32>,
    pub(super) ignore_eos: bool,
    pub(super) skip_special_tokens: bool,
    pub(super) return_token_ids: bool,
    /// `None`: the answer comes whole.
    pub(super) stream: Option<StreamOptions>,
}

/// How an answer is streamed.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct StreamOptions {
    pub(super) include_usage: bool,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrMore {
    One(String),
    More(Vec<String>),
}

impl Params {
    pub(super) fn take(fields: &mut Fields, defaults: &SamplingDefaults) -> Result<Self, ApiError> {
        let params = Self {
            model: fields.take("model")?,
            temperature: fields
                .number("temperature", 0.0, f64::INFINITY)?
                .unwrap_or(defaults.temperature),
            top_p: match fields.number("top_p", 0.0, 1.0)? {
                Some(0.0) => {
                    return Err(ApiError::field(
                        "top_p",
                        "0 keeps no token; use a value above 0, at most 1",
                    ));
                }
                top_p => top_p.unwrap_or(defaults.top_p),
            },
            top_k: match fields.take::<i64>("top_k")? {
                None => defaults.top_k,
                Some(-1 | 0) => None,
                Some(k) => Some(u32::try_from(k).ok().and_then(NonZeroU32::new).ok_or_else(
                    || {
                        ApiError::field(
                            "top_k",
                            format!("{k} is not -1, 0 (all) or a positive number"),
                        )
                    },
                )?),
            },
            seed: fields.take::<i64>("seed")?.map(i64::cast_unsigned),
            stop: take_stop(fields)?,
            stop_token_ids: take_stop_token_ids(fields)?,
            ignore_eos: fields.take("ignore_eos")?.unwrap_or(false),
            skip_special_tokens: fields.take("skip_special_tokens")?.unwrap_or(true),
            return_token_ids: fields.take("return_token_ids")?.unwrap_or(false),
            stream: take_stream(fields)?,
        };
        if !params.temperature.is_finite() {
            return Err(ApiError::field("temperature", "not a finite number"));
        }
        refuse_unbuilt(fields)?;
        Ok(params)
    }
}

/// Takes `name` as a number of alternatives.
pub(super) fn take_n_logprobs(fields: &mut Fields, name: &str) -> Result<Option<u8>, ApiError> {
    match fields.take::<i64>(name)? {
        None => Ok(None),
        Some(n) => match u8::try_from(n) {
            Ok(n) if n <= MAX_LOGPROBS => Ok(Some(n)),
            _ => Err(ApiError::field(
                name,
                format!("{n} is not between 0 and {MAX_LOGPROBS}"),
            )),
        },
    }
}

fn take_stop(fields: &mut Fields) -> Result<StopStrings, ApiError> {
    let strings = match fields.take("stop") {
        Ok(None) => Vec::new(),
        Ok(Some(OneOrMore::One(one))) => vec![one],
        Ok(Some(OneOrMore::More(more))) => more,
        Err(_) => {
            return Err(ApiError::field(
                "stop",
                "expected a string or a list of strings",
            ));
        }
    };
    if strings.len() > MAX_STOP_STRINGS {
        return Err(ApiError::field(
            "stop",
            format!(
                "{} strings, at most {MAX_STOP_STRINGS} are allowed",
                strings.len()
            ),
        ));
    }
    if strings
        .iter()
        .any(|s| s.is_empty() || s.len() > MAX_STOP_BYTES)
    {
        return Err(ApiError::field(
            "stop",
            format!("each string must have 1 to {MAX_STOP_BYTES} bytes"),
        ));
    }
    Ok(StopStrings::new(strings))
}

fn take_stop_token_ids(fields: &mut Fields) -> Result<Vec<u32>, ApiError> {
    let ids: Vec<u32> = fields.take("stop_token_ids")?.unwrap_or_default();
    if ids.len() > MAX_STOP_TOKENS {
        let message = format!("{} ids, at most {MAX_STOP_TOKENS} are allowed", ids.len());
        return Err(ApiError::field("stop_token_ids", message));
    }
    Ok(ids)
}

fn take_stream(fields: &mut Fields) -> Result<Option<StreamOptions>, ApiError> {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Options {
        #[serde(default)]
        include_usage: Option<bool>,
        /// OpenAI pads events against traffic analysis where this is true; no answer changes.
        #[serde(default)]
        #[allow(dead_code, reason = "accepted, and of no effect")]
        include_obfuscation: Option<bool>,
    }
    let stream = fields.take("stream")?.unwrap_or(false);
    let options = fields.take::<Options>("stream_options")?;
    match (stream, options) {
        (false, Some(_)) => Err(ApiError::field(
            "stream_options",
            "allowed only with \"stream\": true",
        )),
        (false, None) => Ok(None),
        (true, options) => {
            let include_usage = options.and_then(|o| o.include_usage).unwrap_or(false);
            Ok(Some(StreamOptions { include_usage }))
        }
    }
}

/// Everything that OpenAI's and vLLM's interfaces have beyond what is built here.
fn refuse_unbuilt(fields: &mut Fields) -> Result<(), ApiError> {
    for name in [
        "user",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "request_id",
    ] {
        fields.ignore(name);
    }
    for (name, neutral) in [
        ("n", &["1"] as &[&str]),
        ("presence_penalty", &["0"]),
        ("frequency_penalty", &["0"]),
        ("repetition_penalty", &["1"]),
        ("min_p", &["0"]),
        ("min_tokens", &["0"]),
        ("length_penalty", &["1"]),
        ("use_beam_search", &["false"]),
        ("logit_bias", &["{}"]),
        ("bad_words", &["[]"]),
        ("allowed_token_ids", &[]),
        ("include_stop_str_in_output", &["false"]),
        ("spaces_between_special_tokens", &["true"]),
        ("truncate_prompt_tokens", &[]),
        ("prompt_logprobs", &[]),
        ("priority", &["0"]),
        ("response_format", &[r#"{"type":"text"}"#]),
        ("structured_outputs", &[]),
        ("guided_json", &[]),
        ("guided_regex", &[]),
        ("guided_choice", &[]),
        ("guided_grammar", &[]),
    ] {
        fields.neutral(name, neutral)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(body: &str) -> Result<Params, ApiError> {
        let mut fields = Fields::parse(body.as_bytes())?;
        let params = Params::take(&mut fields, &SamplingDefaults::default())?;
        fields.finish()?;
        Ok(params)
    }

    #[test]
    fn mistakes_and_unbuilt_fields_are_named() {
        for (body, want) in [
            (r#"{"temperature": -1}"#, "temperature: -1 is below 0"),
            (
                r#"{"temperature": "hot"}"#,
                "temperature: invalid type: string \"hot\", expected f64",
            ),
            (
                r#"{"top_p": 0}"#,
                "top_p: 0 keeps no token; use a value above 0, at most 1",
            ),
            (r#"{"top_p": 1.5}"#, "top_p: 1.5 is not between 0 and 1"),
            (
                r#"{"top_k": -2}"#,
                "top_k: -2 is not -1, 0 (all) or a positive number",
            ),
            (
                r#"{"stop": [""]}"#,
                "stop: each string must have 1 to 1024 bytes",
            ),
            (
                r#"{"stop": 3}"#,
                "stop: expected a string or a list of strings",
            ),
            (
                r#"{"n": 2}"#,
                "n: not supported by this server; leave it out or set it to 1",
            ),
            (
                r#"{"guided_regex": "a"}"#,
                "guided_regex: not supported by this server; leave it out",
            ),
            (
                r#"{"stream_options": {}}"#,
                "stream_options: allowed only with \"stream\": true",
            ),
            (
                r#"{"tempratur": 1}"#,
                "tempratur: unknown field; leave it out",
            ),
        ] {
            assert_eq!(parse(body).unwrap_err().message, want, "{body}");
        }
    }

    #[test]
    fn neutral_values_and_harmless_fields_are_accepted() {
        let body = r#"{"n": 1, "presence_penalty": 0.0, "logit_bias": {}, "response_format": {"type": "text"},
            "user": "u", "metadata": {"a": 1}, "min_p": null, "stop": "x", "top_k": -1, "seed": -3}"#;
        let params = parse(body).unwrap();
        assert_eq!(params.seed, Some(u64::MAX - 2));
        assert_eq!(params.top_k, None);
    }

    #[test]
    fn the_models_defaults_are_read() {
        let (defaults, ignored) = SamplingDefaults::from_generation_config(
            br#"{"temperature": 0.6, "top_p": 0.9, "top_k": 0, "repetition_penalty": 1.1, "bos_token_id": 1}"#,
        )
        .unwrap();
        assert_eq!(
            defaults,
            SamplingDefaults {
                temperature: 0.6,
                top_p: 0.9,
                top_k: None
            }
        );
        assert_eq!(ignored, ["repetition_penalty"]);
        let wrong = SamplingDefaults::from_generation_config(br#"{"top_p": 7}"#).unwrap_err();
        assert_eq!(
            wrong,
            "generation_config.json: top_p is 7, expected above 0 and at most 1"
        );
    }
}
