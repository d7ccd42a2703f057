//! The fields that change the logits before a token is sampled, named and bounded as in vLLM: penalties, `logit_bias`,
//! `min_tokens`, `allowed_token_ids`, `bad_words`.

use std::collections::BTreeMap;

use super::defaults::SamplingDefaults;
use super::error::ApiError;
use super::fields::Fields;
use crate::engine::logits::LogitsOptions;
use crate::text::{TextError, Tokenizer};

/// More words than anybody needs; each is compared with the output for every token.
const MAX_BAD_WORDS: usize = 256;
const MAX_BAD_WORD_BYTES: usize = 256;

/// As in OpenAI's and vLLM's interfaces.
const MOST_BIAS: f32 = 100.0;

/// What the fields say, before the model's tokens are asked.
#[derive(Clone, Debug)]
pub(super) struct LogitsFields {
    repetition_penalty: f32,
    presence_penalty: f32,
    frequency_penalty: f32,
    logit_bias: BTreeMap<u32, f32>,
    min_tokens: u32,
    allowed_token_ids: Vec<u32>,
    bad_words: Vec<String>,
}

impl LogitsFields {
    pub(super) fn take(
        fields: &mut Fields<'_>,
        defaults: &SamplingDefaults,
    ) -> Result<Self, ApiError> {
        let repetition = fields.number("repetition_penalty", 0.0, f64::INFINITY)?;
        if repetition.is_some_and(|p| p == 0.0 || !p.is_finite()) {
            let message = "not a number above 0; 1 penalises nothing";
            return Err(ApiError::field("repetition_penalty", message));
        }
        let presence = fields.number("presence_penalty", -2.0, 2.0)?;
        let frequency = fields.number("frequency_penalty", -2.0, 2.0)?;
        Ok(Self {
            repetition_penalty: repetition.unwrap_or(defaults.repetition_penalty),
            presence_penalty: presence.unwrap_or(0.0),
            frequency_penalty: frequency.unwrap_or(0.0),
            logit_bias: take_logit_bias(fields)?,
            min_tokens: fields.take("min_tokens")?.unwrap_or(0),
            allowed_token_ids: take_allowed(fields)?,
            bad_words: take_bad_words(fields)?,
        })
    }

    /// Tokens before which no stop token and no stop string ends the text.
    pub(super) fn min_tokens(&self) -> u32 {
        self.min_tokens
    }

    /// Bytes of text to tokenize.
    pub(super) fn n_bytes(&self) -> usize {
        self.bad_words.iter().map(|word| 2 * word.len()).sum()
    }

    /// Checks that `most`, the longest answer, is no shorter than `min_tokens`.
    pub(super) fn check_max_tokens(&self, most: u32) -> Result<(), ApiError> {
        let min_tokens = self.min_tokens;
        match min_tokens > most {
            true => Err(ApiError::field(
                "min_tokens",
                format!("{min_tokens} is more than the answer may have, {most}; lower it"),
            )),
            false => Ok(()),
        }
    }

    /// What the engine is asked for: ids checked against the vocabulary, words in tokens.
    pub(super) fn resolve(
        self,
        tokenizer: &Tokenizer,
        vocab_size: u32,
    ) -> Result<LogitsOptions, ApiError> {
        let check = |field: &str, mut ids: Box<dyn Iterator<Item = u32> + '_>| match ids
            .find(|id| *id >= vocab_size)
        {
            Some(id) => Err(ApiError::field(
                field,
                format!("token {id} is not below the vocabulary's size, {vocab_size}"),
            )),
            None => Ok(()),
        };
        let allowed = self.allowed_token_ids.iter().copied();
        check("allowed_token_ids", Box::new(allowed))?;
        check("logit_bias", Box::new(self.logit_bias.keys().copied()))?;
        let mut bad_words = Vec::new();
        for word in &self.bad_words {
            let spelled = spellings(tokenizer, word);
            let spelled = spelled.map_err(|error| ApiError::from(error).about("bad_words"))?;
            let ids = spelled.iter().flatten().copied();
            check("bad_words", Box::new(ids))?;
            bad_words.extend(spelled);
        }
        Ok(LogitsOptions {
            repetition_penalty: self.repetition_penalty,
            presence_penalty: self.presence_penalty,
            frequency_penalty: self.frequency_penalty,
            logit_bias: self.logit_bias,
            min_tokens: self.min_tokens,
            allowed_token_ids: self.allowed_token_ids,
            bad_words,
            constraint: None,
        })
    }
}

/// A word in tokens: at the beginning of a text, and after a blank where that is as many tokens and begins with another,
/// as vLLM has it.
fn spellings(tokenizer: &Tokenizer, word: &str) -> Result<Vec<Vec<u32>>, TextError> {
    let word = word.trim_start();
    let first = tokenizer.encode(word, false)?;
    let later = tokenizer.encode(&format!(" {word}"), false)?;
    let is_other = later.first() != first.first() && later.len() == first.len();
    let mut spelled = vec![first];
    if is_other {
        spelled.push(later);
    }
    Ok(spelled)
}

fn take_logit_bias(fields: &mut Fields<'_>) -> Result<BTreeMap<u32, f32>, ApiError> {
    let given: BTreeMap<String, f32> = fields.take("logit_bias")?.unwrap_or_default();
    let one = |(id, bias): (String, f32)| match id.parse::<u32>() {
        Ok(id) => Ok((id, bias.clamp(-MOST_BIAS, MOST_BIAS))),
        Err(_) => Err(ApiError::field(
            "logit_bias",
            format!("{id:?} is not a token id"),
        )),
    };
    given.into_iter().map(one).collect()
}

fn take_allowed(fields: &mut Fields<'_>) -> Result<Vec<u32>, ApiError> {
    match fields.take::<Vec<u32>>("allowed_token_ids")? {
        Some(ids) if ids.is_empty() => Err(ApiError::field(
            "allowed_token_ids",
            "empty; leave it out or name one token at least",
        )),
        ids => Ok(ids.unwrap_or_default()),
    }
}

fn take_bad_words(fields: &mut Fields<'_>) -> Result<Vec<String>, ApiError> {
    let words: Vec<String> = fields.take("bad_words")?.unwrap_or_default();
    let n = words.len();
    if n > MAX_BAD_WORDS {
        let message = format!("{n} words, at most {MAX_BAD_WORDS} are allowed");
        return Err(ApiError::field("bad_words", message));
    }
    let is_wrong = |word: &String| word.trim_start().is_empty() || word.len() > MAX_BAD_WORD_BYTES;
    match words.iter().any(is_wrong) {
        true => Err(ApiError::field(
            "bad_words",
            format!("each word must have 1 to {MAX_BAD_WORD_BYTES} bytes, and not blanks alone"),
        )),
        false => Ok(words),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::tokenizer::TextFiles;

    fn tokenizer() -> Tokenizer {
        let folder = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/tests/golden/tokenizers/byte_level"
        );
        Tokenizer::load(TextFiles {
            tokenizer: &std::fs::read(format!("{folder}/tokenizer.json")).unwrap(),
            tokenizer_config: None,
            chat_template: None,
        })
        .unwrap()
    }

    fn take(body: &str) -> Result<LogitsFields, ApiError> {
        let mut fields = Fields::parse(body.as_bytes())?;
        let taken = LogitsFields::take(&mut fields, &SamplingDefaults::default())?;
        fields.finish_all()?;
        Ok(taken)
    }

    #[test]
    fn fields_are_read_and_bounded() {
        let taken = take(
            r#"{"repetition_penalty": 1.5, "presence_penalty": -2, "frequency_penalty": 0.5, "min_tokens": 3,
                "logit_bias": {"7": 300, "5": -1.5}, "allowed_token_ids": [4, 2], "bad_words": ["a b"]}"#,
        )
        .unwrap();
        let options = &taken;
        assert_eq!(options.repetition_penalty, 1.5);
        let penalties = (options.presence_penalty, options.frequency_penalty);
        assert_eq!(penalties, (-2.0, 0.5));
        assert_eq!(options.logit_bias, [(5, -1.5), (7, 100.0)].into());
        assert_eq!(options.allowed_token_ids, [4, 2]);
        assert_eq!((taken.min_tokens(), taken.n_bytes()), (3, 6));
        assert_eq!(taken.check_max_tokens(3), Ok(()));
        let wrong = taken.check_max_tokens(2).unwrap_err();
        assert_eq!(
            wrong.message,
            "min_tokens: 3 is more than the answer may have, 2; lower it"
        );
        let plain = take("{}").unwrap();
        assert_eq!((plain.repetition_penalty, plain.min_tokens), (1.0, 0));
    }

    #[test]
    fn mistakes_name_their_field() {
        let many = format!(r#"{{"bad_words": [{}"a"]}}"#, r#""a","#.repeat(256));
        for (body, want) in [
            (
                r#"{"repetition_penalty": 0}"#,
                "repetition_penalty: not a number above 0; 1 penalises nothing",
            ),
            (
                r#"{"repetition_penalty": -1}"#,
                "repetition_penalty: -1 is below 0",
            ),
            (
                r#"{"presence_penalty": 2.1}"#,
                "presence_penalty: 2.1 is not between -2 and 2",
            ),
            (
                r#"{"frequency_penalty": -3}"#,
                "frequency_penalty: -3 is not between -2 and 2",
            ),
            (
                r#"{"logit_bias": {"a": 1}}"#,
                "logit_bias: \"a\" is not a token id",
            ),
            (
                r#"{"allowed_token_ids": []}"#,
                "allowed_token_ids: empty; leave it out or name one token at least",
            ),
            (
                r#"{"min_tokens": -1}"#,
                "min_tokens: invalid value: integer `-1`, expected u32",
            ),
            (
                r#"{"bad_words": ["  "]}"#,
                "bad_words: each word must have 1 to 256 bytes, and not blanks alone",
            ),
            (&many, "bad_words: 257 words, at most 256 are allowed"),
        ] {
            assert_eq!(take(body).unwrap_err().message, want, "{body}");
        }
    }

    #[test]
    fn ids_are_checked_and_words_spelled_in_tokens() {
        let tokenizer = tokenizer();
        let vocab_size = tokenizer.vocabulary().len() as u32;
        let resolve = |body: &str| take(body).unwrap().resolve(&tokenizer, vocab_size);
        for field in ["allowed_token_ids", "logit_bias"] {
            let value = match field {
                "logit_bias" => format!("{{\"{vocab_size}\": 1}}"),
                _ => format!("[0, {vocab_size}]"),
            };
            let wrong = resolve(&format!("{{\"{field}\": {value}}}")).unwrap_err();
            assert_eq!(wrong.param.as_deref(), Some(field));
            assert!(
                wrong.message.contains("not below the vocabulary's size"),
                "{}",
                wrong.message
            );
        }
        let words = resolve(r#"{"bad_words": [" a"]}"#).unwrap().bad_words;
        let encode = |text: &str| tokenizer.encode(text, false).unwrap();
        let (first, later) = (encode("a"), encode(" a"));
        let mut want = vec![first.clone()];
        if later.len() == first.len() && later[0] != first[0] {
            want.push(later);
        }
        assert_eq!(words, want);
    }
}
