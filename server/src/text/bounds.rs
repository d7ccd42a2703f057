//! What a tokenizer can take: how long a text of so many tokens can be at most, and how many bytes may come without a place
//! to cut them. The first is known from the tokenizer alone; both are checked before its work, which takes time and memory
//! for each byte. It tokenizes nothing.

use serde_json::Value;
use tokenizers::ModelWrapper;

use super::vocabulary::byte_level_alphabet;
use super::{TextError, Vocabulary};

/// Bytes that are given to a tokenizer at once, where it can't be cut. Two things need the bound: some 110 bytes of memory
/// for each of these (measured on 2026-11-26: 98 MB for this many), and the engine of regular expressions, which keeps a way
/// back for each blank of a run, gives up at a million, and would leave the rest of the text one word, tokenized other
/// than Transformers does, without a sign of it.
pub(super) const MAX_WHOLE_BYTES: usize = 900_000;

/// Unicode's normal forms make a text at most so many times shorter: four bytes of a mathematical letter become one.
const NORMAL_FORM_RATIO: usize = 4;

/// The bounds of one tokenizer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct TextBounds {
    /// Bytes of text that one token stands for at most; `None` where that isn't bounded.
    max_bytes_per_token: Option<usize>,
    /// Whether the tokens of a text are those of its [`pieces`](super::pieces).
    pub(super) can_cut: bool,
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
            can_cut: matches!(normalizer["type"].as_str(), None | Some("NFC"))
                && is_byte_level(&pre_tokenizer)
                && !strips(tokenizer)
                && !has_blanks_inside(tokenizer)
                && cuts_probes(tokenizer),
        }
    }

    /// Bytes that have to be tokenized at once.
    pub(super) fn check_whole(self, piece: &str) -> Result<(), TextError> {
        match piece.len() <= MAX_WHOLE_BYTES {
            true => Ok(()),
            false => Err(TextError::NoCut {
                n_bytes: piece.len(),
                limit: MAX_WHOLE_BYTES,
            }),
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

/// Whether words are split by one pattern and then written in bytes, as GPT-2 does and all that follow it.
fn is_byte_level(pre_tokenizer: &Value) -> bool {
    let is_plain = |part: &Value| part["type"] == "ByteLevel" && part["add_prefix_space"] == false;
    let splits = |part: &Value| {
        part["type"] == "Digits"
            || (part["type"] == "Split"
                // Matches are words in both.
                && ((part["behavior"] == "Isolated" && part["invert"] == false)
                    || (part["behavior"] == "Removed" && part["invert"] == true)))
    };
    match pre_tokenizer["type"].as_str() {
        Some("ByteLevel") => is_plain(pre_tokenizer) && has_pattern(pre_tokenizer),
        Some("Sequence") => {
            has_pattern(pre_tokenizer)
                && parts(pre_tokenizer).all(|part| is_plain(part) || splits(part))
                && parts(pre_tokenizer).any(is_plain)
        }
        _ => false,
    }
}

/// Whether an added token has a blank in it, which a cut would tear apart.
fn has_blanks_inside(tokenizer: &tokenizers::Tokenizer) -> bool {
    let added = tokenizer.get_added_tokens_decoder();
    let mut contents = added.values().map(|token| &token.content);
    contents.any(|content| content.contains(char::is_whitespace))
}

/// Whether the pattern begins a new word at cuts, tried out.
fn cuts_probes(tokenizer: &tokenizers::Tokenizer) -> bool {
    let ids = |text: &str| {
        let encoding = tokenizer.encode_fast(text, false).ok()?;
        Some(encoding.get_ids().to_vec())
    };
    let words = ["a", "the", "T", "BLOCK", "isn't", "块", "x1y"];
    let pairs = words.iter().flat_map(|a| words.map(|b| (*a, b)));
    let mut probes = pairs.flat_map(|(a, b)| [(a, format!(" {b}")), (a, format!("\n{b}"))]);
    probes.all(|(before, after)| {
        let whole = ids(&format!("{before}{after}"));
        let pieces = ids(before).zip(ids(&after));
        whole == pieces.map(|(before, after)| [before, after].concat())
    })
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
