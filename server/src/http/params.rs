//! The fields that completions and chat share: how tokens are sampled, where the text ends, how it is returned.
//!
//! Parsed once, into types that hold valid values only.

use std::num::NonZeroU32;

use serde::Deserialize;

use super::choices::Choices;
use super::defaults::SamplingDefaults;
use super::error::ApiError;
use super::fields::Fields;
use super::logits_fields::LogitsFields;
use super::logprobs::TokenNames;
use super::resume::{Asked, Resume};
use crate::engine::SamplingParams;
use crate::text::stop::StopStrings;

/// More stop strings than anybody needs; each costs a little for every byte of text.
const MAX_STOP_STRINGS: usize = 32;
const MAX_STOP_BYTES: usize = 1024;
const MAX_STOP_TOKENS: usize = 256;

/// As in vLLM's default configuration.
pub(super) const MAX_LOGPROBS: u8 = 20;

/// What completions and chat have in common.
#[derive(Clone, Debug)]
pub(super) struct Params {
    pub(super) model: Option<String>,
    sampling: SamplingParams,
    /// The caller named the seed: it is the same for all prompts.
    has_seed: bool,
    pub(super) logits: LogitsFields,
    pub(super) stop: StopStrings,
    pub(super) stop_token_ids: Vec<u32>,
    pub(super) ignore_eos: bool,
    /// The last tokens of a prompt that are kept.
    pub(super) truncation: Truncation,
    /// Report log-probabilities of the prompt's tokens, and of this many alternatives.
    pub(super) prompt_logprobs: Option<u8>,
    pub(super) skip_special_tokens: bool,
    pub(super) return_token_ids: bool,
    pub(super) token_names: TokenNames,
    /// Choices for each prompt.
    pub(super) choices: Choices,
    /// As in vLLM: only calls with the same one find each other's cached prefixes.
    pub(super) cache_salt: Option<String>,
    /// `None`: the answer comes whole.
    pub(super) stream: Option<StreamOptions>,
    /// It goes on after what its client has.
    pub(super) resume: Option<Resume>,
}

/// How an answer is streamed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct StreamOptions {
    /// What has been used stands in the last chunk, or in all of them.
    pub(super) usage: StreamUsage,
}

/// Which chunks of a stream say how many tokens were used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum StreamUsage {
    #[default]
    None,
    /// `include_usage`.
    Last,
    /// `include_usage` and `continuous_usage_stats`, as in vLLM: each chunk what its choice has used so far.
    Each,
}

/// How much of a prompt is kept, as `truncate_prompt_tokens` says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Truncation {
    /// All of it.
    #[default]
    None,
    /// As many of its last tokens as the context has room for, beside the answer.
    ToContext,
    /// So many of its last tokens.
    To(u32),
}

impl Truncation {
    /// How many of a prompt's last tokens are kept in a context of `longest`, where `max_tokens` are asked for.
    pub(super) fn keeps(
        self,
        longest: u32,
        max_tokens: Option<u32>,
    ) -> Result<Option<usize>, ApiError> {
        match self {
            Self::None => Ok(None),
            Self::ToContext => {
                let room = longest.saturating_sub(max_tokens.unwrap_or(1));
                Ok(Some(room.max(1) as usize))
            }
            Self::To(n) if n > longest => Err(ApiError::field(
                "truncate_prompt_tokens",
                format!("{n} is more than the longest context, {longest}; lower it"),
            )),
            Self::To(n) => Ok(Some(n as usize)),
        }
    }
}

/// Takes all but the last `keep` tokens off. True where there were more.
pub(super) fn truncate(prompt: &mut Vec<u32>, keep: Option<usize>) -> bool {
    let n_cut = keep.map_or(0, |keep| prompt.len().saturating_sub(keep));
    prompt.drain(..n_cut);
    n_cut > 0
}

#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrMore {
    One(String),
    More(Vec<String>),
}

impl Params {
    pub(super) fn take(
        fields: &mut Fields<'_>,
        defaults: &SamplingDefaults,
    ) -> Result<Self, ApiError> {
        // Looks at fields that are taken below.
        let choices = Choices::take(fields)?;
        let seed: Option<i64> = fields.take("seed")?;
        let names_by_id = fields.take("return_tokens_as_token_ids")?.unwrap_or(false);
        let logits = LogitsFields::take(fields, defaults)?;
        let stream = take_stream(fields)?;
        let temperature = take_temperature(fields, defaults)?;
        let asked = Asked {
            is_stream: stream.is_some(),
            choices: &choices,
            has_seed: seed.is_some() || temperature == 0.0,
        };
        let resume = Resume::take(fields, asked)?;
        Ok(Self {
            model: fields.take("model")?,
            sampling: SamplingParams {
                temperature,
                top_p: take_top_p(fields, defaults)?,
                top_k: take_top_k(fields, defaults)?,
                min_p: fields.number("min_p", 0.0, 1.0)?.unwrap_or(defaults.min_p),
                seed: seed.unwrap_or(0).cast_unsigned(),
            },
            has_seed: seed.is_some(),
            stop: take_stop(fields)?.ignored_in_first(logits.min_tokens()),
            logits,
            truncation: take_truncation(fields)?,
            prompt_logprobs: take_prompt_logprobs(fields, stream.is_some())?,
            stop_token_ids: take_stop_token_ids(fields)?,
            ignore_eos: fields.take("ignore_eos")?.unwrap_or(false),
            skip_special_tokens: fields.take("skip_special_tokens")?.unwrap_or(true),
            return_token_ids: fields.take("return_token_ids")?.unwrap_or(false),
            token_names: match names_by_id {
                true => TokenNames::Ids,
                false => TokenNames::Text,
            },
            choices,
            cache_salt: take_cache_salt(fields)?,
            stream,
            resume,
        })
    }

    /// Settles the seed of the whole call, a fresh one where the caller named none.
    pub(super) fn settle_seed(&mut self, fresh_seed: impl FnOnce() -> u64) {
        self.sampling = self.sampling(fresh_seed);
        self.has_seed = true;
    }

    /// The seed, as a call names it, where all prompts have one.
    pub(super) fn seed(&self) -> Option<i64> {
        self.has_seed.then(|| self.sampling.seed.cast_signed())
    }

    /// For one prompt; the seed is a fresh one where the caller named none.
    pub(super) fn sampling(&self, fresh_seed: impl FnOnce() -> u64) -> SamplingParams {
        let seed = match self.has_seed {
            true => self.sampling.seed,
            false => fresh_seed(),
        };
        SamplingParams {
            seed,
            ..self.sampling
        }
    }

    /// Which chunks say what was used.
    pub(super) fn stream_usage(&self) -> StreamUsage {
        self.stream.map_or(StreamUsage::None, |stream| stream.usage)
    }
}

fn take_temperature(fields: &mut Fields<'_>, defaults: &SamplingDefaults) -> Result<f32, ApiError> {
    let temperature = fields.number("temperature", 0.0, f64::INFINITY)?;
    let temperature = temperature.unwrap_or(defaults.temperature);
    match temperature.is_finite() {
        true => Ok(temperature),
        false => Err(ApiError::field("temperature", "not a finite number")),
    }
}

fn take_top_p(fields: &mut Fields<'_>, defaults: &SamplingDefaults) -> Result<f32, ApiError> {
    match fields.number("top_p", 0.0, 1.0)? {
        Some(0.0) => Err(ApiError::field(
            "top_p",
            "0 keeps no token; use a value above 0, at most 1",
        )),
        top_p => Ok(top_p.unwrap_or(defaults.top_p)),
    }
}

fn take_top_k(
    fields: &mut Fields<'_>,
    defaults: &SamplingDefaults,
) -> Result<Option<NonZeroU32>, ApiError> {
    match fields.take::<i64>("top_k")? {
        None => Ok(defaults.top_k),
        Some(-1 | 0) => Ok(None),
        Some(k) => match u32::try_from(k).ok().and_then(NonZeroU32::new) {
            Some(k) => Ok(Some(k)),
            None => Err(ApiError::field(
                "top_k",
                format!("{k} is not -1, 0 (all) or a positive number"),
            )),
        },
    }
}

/// Takes `name` as a number of alternatives.
pub(super) fn take_n_logprobs(fields: &mut Fields<'_>, name: &str) -> Result<Option<u8>, ApiError> {
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

fn take_stop(fields: &mut Fields<'_>) -> Result<StopStrings, ApiError> {
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
    let strings = StopStrings::new(strings);
    match fields.take("include_stop_str_in_output")? {
        Some(true) => Ok(strings.included()),
        Some(false) | None => Ok(strings),
    }
}

fn take_truncation(fields: &mut Fields<'_>) -> Result<Truncation, ApiError> {
    match fields.take::<i64>("truncate_prompt_tokens")? {
        None => Ok(Truncation::None),
        Some(-1) => Ok(Truncation::ToContext),
        Some(n) => match u32::try_from(n) {
            Ok(n) if n > 0 => Ok(Truncation::To(n)),
            _ => Err(ApiError::field(
                "truncate_prompt_tokens",
                format!("{n} is not -1 (as many as fit) or a positive number"),
            )),
        },
    }
}

fn take_prompt_logprobs(fields: &mut Fields<'_>, is_stream: bool) -> Result<Option<u8>, ApiError> {
    let n = take_n_logprobs(fields, "prompt_logprobs")?;
    match n {
        Some(_) if is_stream => Err(ApiError::field(
            "prompt_logprobs",
            "not available with \"stream\": true; leave one of the two out",
        )),
        n => Ok(n),
    }
}

fn take_stop_token_ids(fields: &mut Fields<'_>) -> Result<Vec<u32>, ApiError> {
    let ids: Vec<u32> = fields.take("stop_token_ids")?.unwrap_or_default();
    if ids.len() > MAX_STOP_TOKENS {
        let message = format!("{} ids, at most {MAX_STOP_TOKENS} are allowed", ids.len());
        return Err(ApiError::field("stop_token_ids", message));
    }
    Ok(ids)
}

fn take_cache_salt(fields: &mut Fields<'_>) -> Result<Option<String>, ApiError> {
    match fields.take::<String>("cache_salt")? {
        Some(salt) if salt.is_empty() => Err(ApiError::field(
            "cache_salt",
            "empty; leave it out or send a non-empty string",
        )),
        salt => Ok(salt),
    }
}

fn take_stream(fields: &mut Fields<'_>) -> Result<Option<StreamOptions>, ApiError> {
    #[derive(Default, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Options {
        #[serde(default)]
        include_usage: Option<bool>,
        #[serde(default)]
        continuous_usage_stats: Option<bool>,
        /// OpenAI pads events against traffic analysis where this is true; no answer changes.
        #[serde(default)]
        #[allow(dead_code, reason = "accepted, and of no effect")]
        include_obfuscation: Option<bool>,
    }
    let stream = fields.take("stream")?.unwrap_or(false);
    let options = fields.take::<Options>("stream_options")?;
    if !stream {
        return match options {
            Some(_) => Err(ApiError::field(
                "stream_options",
                "allowed only with \"stream\": true",
            )),
            None => Ok(None),
        };
    }
    let options = options.unwrap_or_default();
    let is_set = |option: Option<bool>| option.unwrap_or(false);
    let usage = match (
        is_set(options.include_usage),
        is_set(options.continuous_usage_stats),
    ) {
        (false, _) => StreamUsage::None,
        (true, false) => StreamUsage::Last,
        (true, true) => StreamUsage::Each,
    };
    Ok(Some(StreamOptions { usage }))
}

#[cfg(test)]
mod tests {
    use super::super::fields::Interface;
    use super::*;

    fn parse(body: &str) -> Result<Params, ApiError> {
        let mut fields = Fields::parse(body.as_bytes())?;
        let params = Params::take(&mut fields, &SamplingDefaults::default())?;
        fields.finish(Interface::Completions)?;
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
                r#"{"cache_salt": ""}"#,
                "cache_salt: empty; leave it out or send a non-empty string",
            ),
            (
                r#"{"cache_salt": 3}"#,
                "cache_salt: invalid type: integer `3`, expected a string",
            ),
            (r#"{"min_p": 1.5}"#, "min_p: 1.5 is not between 0 and 1"),
            (
                r#"{"truncate_prompt_tokens": 0}"#,
                "truncate_prompt_tokens: 0 is not -1 (as many as fit) or a positive number",
            ),
            (
                r#"{"prompt_logprobs": 21}"#,
                "prompt_logprobs: 21 is not between 0 and 20",
            ),
            (
                r#"{"prompt_logprobs": 1, "stream": true}"#,
                "prompt_logprobs: not available with \"stream\": true; leave one of the two out",
            ),
            (
                r#"{"logits_processors": ["x"]}"#,
                "logits_processors: not supported by this server; leave it out or set it to []",
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
    fn what_is_given_is_taken() {
        let params =
            parse(r#"{"min_p": null, "stop": "x", "top_k": -1, "top_p": 0.5, "seed": -3}"#)
                .unwrap();
        let sampling = params.sampling(|| 7);
        assert_eq!(sampling.seed, u64::MAX - 2);
        assert_eq!((sampling.top_k, sampling.top_p), (None, 0.5));
        assert_eq!(parse("{}").unwrap().sampling(|| 7).seed, 7);
        for (options, want) in [
            ("null", StreamUsage::None),
            ("{}", StreamUsage::None),
            (r#"{"include_usage": true}"#, StreamUsage::Last),
            (
                r#"{"include_usage": true, "continuous_usage_stats": false}"#,
                StreamUsage::Last,
            ),
            (
                r#"{"include_usage": true, "continuous_usage_stats": true}"#,
                StreamUsage::Each,
            ),
            (r#"{"continuous_usage_stats": true}"#, StreamUsage::None),
        ] {
            let body = format!(r#"{{"stream": true, "stream_options": {options}}}"#);
            assert_eq!(parse(&body).unwrap().stream_usage(), want, "{options}");
        }
    }
}
