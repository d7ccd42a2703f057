//! What a tokenizer can take: how long a text of so many tokens can be at most, and how many blanks may follow each
//! other. Both are known from the tokenizer alone, and checked before its work, which takes time and memory for each
//! byte. It tokenizes nothing.

use serde_json::Value;
use tokenizers::ModelWrapper;

use super::vocabulary::byte_level_alphabet;
use super::{TextError, Vocabulary};

/// Whitespace characters that may follow each other in a text, where the tokenizer splits it by regular expressions.
/// The engine of those keeps a way back for each of them and gives up at a million. The rest of the text would then be
/// one word, tokenized other than Transformers does, without a sign of it.
pub(super) const MAX_BLANKS: usize = 900_000;

/// Unicode's normal forms make a text at most so many times shorter: four bytes of a mathematical letter become one.
const NORMAL_FORM_RATIO: usize = 4;

/// The bounds of one tokenizer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct TextBounds {
    /// Bytes of text that one token stands for at most; `None` where that isn't bounded.
    max_bytes_per_token: Option<usize>,
    /// Whitespace characters in a row at most.
    max_blanks: Option<usize>,
}

impl TextBounds {
    pub(super) fn new(tokenizer: &tokenizers::Tokenizer, vocabulary: &Vocabulary) -> Self {
        let json = |part: Option<Value>| part.unwrap_or_default();
        let normalizer = json(
            tokenizer
                .get_normalizer()
                .and_then(|part| serde_json::to_value(part).ok()),
        );
        let pre_tokenizer = json(
            tokenizer
                .get_pre_tokenizer()
                .and_then(|part| serde_json::to_value(part).ok()),
        );
        let max_bytes_per_token = match (
            shrink_ratio(&normalizer),
            keeps_all_text(&pre_tokenizer) && has_all_bytes(tokenizer) && !strips(tokenizer),
        ) {
            (Some(ratio), true) => Some(ratio * vocabulary.longest_token_bytes()),
            _ => None,
        };
        Self {
            max_bytes_per_token,
            max_blanks: has_pattern(&pre_tokenizer).then_some(MAX_BLANKS),
        }
    }

    pub(super) fn check_length(self, text: &str, max_tokens: u32) -> Result<(), TextError> {
        let limit = self
            .max_bytes_per_token
            .map_or(usize::MAX, |n| n.saturating_mul(max_tokens as usize));
        match text.len() <= limit {
            true => Ok(()),
            false => Err(TextError::TooLong {
                n_bytes: text.len(),
                max_tokens,
                limit,
            }),
        }
    }

    pub(super) fn check_blanks(self, text: &str) -> Result<(), TextError> {
        let Some(limit) = self.max_blanks.filter(|limit| text.len() > *limit) else {
            return Ok(());
        };
        let runs = text.split(|c: char| !c.is_whitespace());
        let found = runs.map(|run| run.chars().count()).max().unwrap_or(0);
        match found <= limit {
            true => Ok(()),
            false => Err(TextError::TooManyBlanks { found, limit }),
        }
    }
}

/// How many times shorter a normalizer makes a text at most; `None` where that isn't known.
fn shrink_ratio(normalizer: &Value) -> Option<usize> {
    match normalizer["type"].as_str() {
        None => Some(1),
        Some("NFC" | "NFD" | "NFKC" | "NFKD") => Some(NORMAL_FORM_RATIO),
        Some("Prepend" | "ByteLevel") => Some(1),
        Some("Replace") => {
            let content = normalizer["content"].as_str()?;
            let pattern = normalizer["pattern"]["String"].as_str()?;
            (content.len() >= pattern.len()).then_some(1)
        }
        Some("Sequence") => normalizer["normalizers"]
            .as_array()?
            .iter()
            .map(shrink_ratio)
            .try_fold(1, |product, ratio| Some(product * ratio?)),
        Some(_) => None,
    }
}

/// Whether all of a text comes to the model.
fn keeps_all_text(pre_tokenizer: &Value) -> bool {
    match pre_tokenizer["type"].as_str() {
        None | Some("ByteLevel" | "Metaspace" | "Digits") => true,
        Some("Split") => pre_tokenizer["behavior"] != "Removed",
        Some("Sequence") => parts(pre_tokenizer).all(keeps_all_text),
        Some(_) => false,
    }
}

/// Whether a text is split by a regular expression.
fn has_pattern(pre_tokenizer: &Value) -> bool {
    match pre_tokenizer["type"].as_str() {
        Some("ByteLevel") => pre_tokenizer["use_regex"] != false,
        Some("Split") => pre_tokenizer["pattern"]["Regex"].is_string(),
        Some("Sequence") => parts(pre_tokenizer).any(has_pattern),
        _ => false,
    }
}

fn parts(pre_tokenizer: &Value) -> impl Iterator<Item = &Value> {
    let parts = pre_tokenizer["pretokenizers"].as_array();
    parts.into_iter().flatten()
}

/// Whether the vocabulary has every byte, so that no run of unknown characters becomes one token.
fn has_all_bytes(tokenizer: &tokenizers::Tokenizer) -> bool {
    let ModelWrapper::BPE(bpe) = tokenizer.get_model() else {
        return false;
    };
    let has = |token: String| tokenizer.token_to_id(&token).is_some();
    match bpe.byte_fallback {
        true => (0..=u8::MAX).all(|byte| has(format!("<0x{byte:02X}>"))),
        false => byte_level_alphabet().keys().all(|c| has(c.to_string())),
    }
}

/// Whether an added token takes the blanks around it with it.
fn strips(tokenizer: &tokenizers::Tokenizer) -> bool {
    let added = tokenizer.get_added_tokens_decoder();
    added.values().any(|token| token.lstrip || token.rstrip)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn what_may_shorten_a_text_without_bound_is_known() {
        for (why, normalizer, want) in [
            ("none", Value::Null, Some(1)),
            ("a normal form", json!({"type": "NFC"}), Some(4)),
            (
                "Llama 2",
                json!({"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"},
                    {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]}),
                Some(1),
            ),
            (
                "a deletion",
                json!({"type": "Replace", "pattern": {"String": " "}, "content": ""}),
                None,
            ),
            (
                "a pattern",
                json!({"type": "Replace", "pattern": {"Regex": " +"}, "content": " "}),
                None,
            ),
            ("another", json!({"type": "Strip"}), None),
        ] {
            assert_eq!(shrink_ratio(&normalizer), want, "{why}");
        }
        let qwen = json!({"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": "\\s+"}, "behavior": "Isolated", "invert": false},
            {"type": "ByteLevel", "use_regex": false}]});
        assert!(keeps_all_text(&qwen) && has_pattern(&qwen));
        assert!(!keeps_all_text(&json!({"type": "Whitespace"})));
        assert!(!has_pattern(&json!({"type": "Metaspace"})));
        assert!(has_pattern(
            &json!({"type": "ByteLevel", "use_regex": true})
        ));
    }
}
