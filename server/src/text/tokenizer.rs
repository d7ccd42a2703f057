//! The tokenizer of a model and what stands beside it: vocabulary and chat template, read from the files of a
//! Hugging Face directory. It knows the files' content, not where they come from.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde_json::Value;

use super::bounds::TextBounds;
use super::pieces::{PIECE_BYTES, pieces};
use super::{ChatTemplate, TextError, Vocabulary};

/// The text files of a model directory.
#[derive(Clone, Copy, Debug)]
pub struct TextFiles<'a> {
    /// `tokenizer.json`.
    pub tokenizer: &'a [u8],
    /// `tokenizer_config.json`.
    pub tokenizer_config: Option<&'a [u8]>,
    /// `chat_template.jinja`; it goes before the template in `tokenizer_config.json`.
    pub chat_template: Option<&'a [u8]>,
}

/// A tokenizer ready for use. Its methods take time in proportion to the text: call them off the async threads.
#[derive(Debug)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    bounds: TextBounds,
    vocabulary: Arc<Vocabulary>,
    chat_template: Option<ChatTemplate>,
    info: Value,
}

impl Tokenizer {
    /// Reads the files.
    pub fn load(files: TextFiles<'_>) -> Result<Self, TextError> {
        let inner = parse_tokenizer(files.tokenizer)?;
        let vocabulary = Arc::new(Vocabulary::new(&inner)?);
        let config: Value = match files.tokenizer_config {
            Some(bytes) => serde_json::from_slice(bytes).map_err(|e| TextError::File {
                file: "tokenizer_config.json",
                reason: format!("not JSON: {e}"),
            })?,
            None => Value::Null,
        };
        let chat_template = match files.chat_template {
            Some(bytes) => Some((
                "chat_template.jinja",
                String::from_utf8_lossy(bytes).into_owned(),
            )),
            None => template_of(&config).map(|source| ("tokenizer_config.json", source)),
        };
        let info = info_of(
            config.clone(),
            chat_template.as_ref().map(|(_, source)| source),
        );
        let chat_template = chat_template
            .map(|(file, source)| ChatTemplate::new(file, &source, special_tokens_of(&config)))
            .transpose()?;
        Ok(Self {
            bounds: TextBounds::new(&inner, &vocabulary),
            inner,
            vocabulary,
            chat_template,
            info,
        })
    }

    /// Text to token ids; `add_special_tokens` adds what the model expects around a text (a BOS token).
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, TextError> {
        match self.bounds.can_cut {
            true => self.encode_pieces(text, add_special_tokens, PIECE_BYTES),
            false => self.encode_whole(text, add_special_tokens),
        }
    }

    /// Text to token ids, a piece at a time.
    fn encode_pieces(
        &self,
        text: &str,
        add_special_tokens: bool,
        piece_bytes: usize,
    ) -> Result<Vec<u32>, TextError> {
        let mut ids = Vec::new();
        for piece in pieces(text, piece_bytes) {
            ids.extend(self.encode_whole(piece, false)?);
        }
        if !add_special_tokens {
            return Ok(ids);
        }
        // What is added to a text stands around one that is short as well.
        let (plain, marked) = (
            self.encode_whole("a", false)?,
            self.encode_whole("a", true)?,
        );
        match marked.windows(plain.len()).position(|ids| ids == plain) {
            Some(at) => Ok([&marked[..at], &ids, &marked[at + plain.len()..]].concat()),
            None => self.encode_whole(text, true),
        }
    }

    fn encode_whole(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, TextError> {
        self.bounds.check_whole(text)?;
        let encoding = self
            .inner
            .encode_fast(text, add_special_tokens)
            .map_err(|e| TextError::Encode(e.to_string()))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Refuses a text that has more than `max_tokens` tokens for certain, by its length alone.
    pub fn check_length(&self, text: &str, max_tokens: u32) -> Result<(), TextError> {
        self.bounds.check_length(text, max_tokens)
    }

    /// What each id stands for.
    pub fn vocabulary(&self) -> &Arc<Vocabulary> {
        &self.vocabulary
    }

    /// `tokenizer_config.json` with the class and the chat template that are used, as vLLM tells it: without names of files.
    pub fn info(&self) -> &Value {
        &self.info
    }

    /// The chat template, or why there can't be a chat.
    pub fn chat_template(&self) -> Result<&ChatTemplate, TextError> {
        self.chat_template.as_ref().ok_or(TextError::NoTemplate)
    }
}

fn parse_tokenizer(bytes: &[u8]) -> Result<tokenizers::Tokenizer, TextError> {
    let failed = |reason| TextError::File {
        file: "tokenizer.json",
        reason,
    };
    // The parser below panics on some broken files. JSON that isn't JSON is found first; the rest is caught.
    serde_json::from_slice::<Value>(bytes).map_err(|e| failed(format!("not JSON: {e}")))?;
    let parsed = std::panic::catch_unwind(|| tokenizers::Tokenizer::from_bytes(bytes))
        .map_err(|_| failed("not a tokenizer as the tokenizers library writes it".into()))?;
    let mut tokenizer = parsed.map_err(|e| failed(e.to_string()))?;
    // A file may ask for truncation or padding: a prompt is neither.
    tokenizer
        .with_truncation(None)
        .map_err(|e| failed(e.to_string()))?;
    tokenizer.with_padding(None);
    Ok(tokenizer)
}

/// One template, or the one named `default` of several.
fn template_of(config: &Value) -> Option<String> {
    match &config["chat_template"] {
        Value::String(source) => Some(source.clone()),
        Value::Array(named) => {
            let default = named
                .iter()
                .find(|t| t["name"] == "default")
                .or(named.first())?;
            default["template"].as_str().map(String::from)
        }
        _ => None,
    }
}

/// See [`Tokenizer::info`].
fn info_of(config: Value, chat_template: Option<&String>) -> Value {
    let mut info = match config {
        Value::Object(info) => info,
        _ => serde_json::Map::new(),
    };
    for file in ["vocab_file", "merges_file", "tokenizer_file"] {
        info.remove(file);
    }
    let class = info
        .entry("tokenizer_class")
        .or_insert_with(|| "PreTrainedTokenizerFast".into());
    if !class.is_string() {
        *class = "PreTrainedTokenizerFast".into();
    }
    if let Some(source) = chat_template {
        info.insert("chat_template".to_owned(), source.as_str().into());
    }
    Value::Object(info)
}

/// `bos_token` and the like, written as a string or as an added token with its `content`.
fn special_tokens_of(config: &Value) -> BTreeMap<String, String> {
    let entries = config.as_object().into_iter().flatten();
    entries
        .filter(|(name, _)| name.ends_with("_token"))
        .filter_map(|(name, token)| {
            Some((
                name.clone(),
                token.as_str().or(token["content"].as_str())?.to_owned(),
            ))
        })
        .collect()
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::sync::LazyLock;
    use tokenizers::decoders::DecoderWrapper;

    fn golden(name: &str, file: &str) -> Vec<u8> {
        std::fs::read(format!(
            "{}/tests/golden/tokenizers/{name}/{file}",
            env!("CARGO_MANIFEST_DIR")
        ))
        .unwrap()
    }

    /// Byte-level BPE of 440 tokens.
    pub(in crate::text) fn byte_level_tokenizer() -> &'static tokenizers::Tokenizer {
        static TOKENIZER: LazyLock<tokenizers::Tokenizer> =
            LazyLock::new(|| parse_tokenizer(&golden("byte_level", "tokenizer.json")).unwrap());
        &TOKENIZER
    }

    /// BPE with byte fallback; with or without the decoder's last step, which strips one space at the start.
    pub(in crate::text) fn byte_fallback_tokenizer(strip: bool) -> &'static tokenizers::Tokenizer {
        static TOKENIZERS: LazyLock<[tokenizers::Tokenizer; 2]> = LazyLock::new(|| {
            let stripping = parse_tokenizer(&golden("byte_fallback", "tokenizer.json")).unwrap();
            let mut keeping = stripping.clone();
            let Some(DecoderWrapper::Sequence(sequence)) = stripping.get_decoder() else {
                panic!("a sequence")
            };
            let steps = sequence.get_decoders();
            assert!(matches!(steps.last(), Some(DecoderWrapper::Strip(_))));
            let steps =
                tokenizers::decoders::sequence::Sequence::new(steps[..steps.len() - 1].to_vec());
            keeping.with_decoder(Some(DecoderWrapper::Sequence(steps)));
            [keeping, stripping]
        });
        &TOKENIZERS[usize::from(strip)]
    }

    #[derive(serde::Deserialize)]
    struct Golden {
        encodings: Vec<Encoding>,
        decodings: Vec<Decoding>,
    }

    #[derive(serde::Deserialize)]
    struct Encoding {
        text: String,
        ids: Vec<u32>,
        ids_with_special: Vec<u32>,
        decoded: String,
    }

    #[derive(serde::Deserialize)]
    struct Decoding {
        ids: Vec<u32>,
        skipping: String,
        keeping: String,
    }

    #[test]
    fn encodes_and_decodes_as_the_library_in_python() {
        for name in ["byte_level", "byte_fallback"] {
            let files = TextFiles {
                tokenizer: &golden(name, "tokenizer.json"),
                tokenizer_config: None,
                chat_template: None,
            };
            let tokenizer = Tokenizer::load(files).unwrap();
            let decode = |ids: &[u32], skip| {
                let mut detokenizer =
                    crate::text::Detokenizer::new(Arc::clone(tokenizer.vocabulary()), skip);
                let mut text = String::new();
                ids.iter().for_each(|id| detokenizer.push(*id, &mut text));
                detokenizer.finish(&mut text);
                text
            };
            let golden: Golden = serde_json::from_slice(&golden(name, "golden.json")).unwrap();
            assert!(golden.encodings.len() > 20 && golden.decodings.len() > 10);
            for case in golden.encodings {
                assert_eq!(
                    tokenizer.encode(&case.text, false).unwrap(),
                    case.ids,
                    "{name}: {:?}",
                    case.text
                );
                assert_eq!(
                    tokenizer.encode(&case.text, true).unwrap(),
                    case.ids_with_special,
                    "{name}: {:?}",
                    case.text
                );
                assert_eq!(
                    decode(&case.ids, true),
                    case.decoded,
                    "{name}: {:?}",
                    case.text
                );
            }
            for case in golden.decodings {
                assert_eq!(
                    decode(&case.ids, true),
                    case.skipping,
                    "{name}: {:?}",
                    case.ids
                );
                assert_eq!(
                    decode(&case.ids, false),
                    case.keeping,
                    "{name}: {:?}",
                    case.ids
                );
            }
        }
    }

    #[test]
    fn templates_and_special_tokens_are_found_in_either_form() {
        let config = serde_json::json!({
            "bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": false}, "pad_token": null,
            "chat_template": [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}],
        });
        assert_eq!(template_of(&config).as_deref(), Some("D"));
        assert_eq!(
            template_of(&serde_json::json!({"chat_template": "X"})).as_deref(),
            Some("X")
        );
        assert_eq!(template_of(&Value::Null), None);
        let special: Vec<(String, String)> = special_tokens_of(&config).into_iter().collect();
        assert_eq!(
            special,
            [
                ("bos_token".into(), "<s>".into()),
                ("eos_token".into(), "</s>".into())
            ]
        );
    }

    fn load(name: &str) -> Tokenizer {
        let files = TextFiles {
            tokenizer: &golden(name, "tokenizer.json"),
            tokenizer_config: None,
            chat_template: None,
        };
        Tokenizer::load(files).unwrap()
    }

    #[test]
    fn blanks_in_a_row_are_tokenized_as_a_whole_or_refused() {
        use crate::text::bounds::MAX_WHOLE_BYTES;
        let tokenizer = load("byte_level");
        let encode = |text: &str| tokenizer.encode(text, false);
        // The pattern leaves the last blank to the word behind it.
        let most = format!("{}x", " ".repeat(MAX_WHOLE_BYTES - 1));
        let mut want = encode(&" ".repeat(MAX_WHOLE_BYTES - 2)).unwrap();
        want.extend(encode(" x").unwrap());
        assert!(encode(&most).unwrap() == want, "as far as it is allowed");
        let refused = encode(&format!(
            "a{} {}b",
            "\n".repeat(500_000),
            " ".repeat(500_000)
        ));
        assert_eq!(
            refused.unwrap_err().to_string(),
            "1000003 bytes of the text have to be tokenized at once, at most 900000 can be"
        );
    }

    /// The patterns of GPT-2 and of Llama 3 (Qwen and others differ from it in how many digits make a word) on runs as
    /// long as they are let through. The lengths are those that the Python library finds with its other engine.
    #[test]
    fn long_runs_are_split_as_the_library_in_python_does() {
        use crate::text::bounds::MAX_WHOLE_BYTES;
        use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
        use tokenizers::{
            OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer, SplitDelimiterBehavior,
        };
        let gpt2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
        let llama3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
        let n = MAX_WHOLE_BYTES - 2;
        let lengths = |pattern: &str, run: &str, n_bytes: usize| {
            let behavior = SplitDelimiterBehavior::Isolated;
            let split = Split::new(SplitPattern::Regex(pattern.into()), behavior, false).unwrap();
            let text = format!("x{}x", run.repeat(n_bytes / run.len()));
            let mut text = PreTokenizedString::from(text);
            split.pre_tokenize(&mut text).unwrap();
            let words = text.get_splits(OffsetReferential::Original, OffsetType::Byte);
            words
                .iter()
                .map(|(word, _, _)| word.len())
                .collect::<Vec<_>>()
        };
        for (pattern, run, want) in [
            (gpt2, " ", vec![1, n - 1, 2]),
            (gpt2, "\n", vec![1, n - 1, 1, 1]),
            (gpt2, " \n", vec![1, n - 1, 1, 1]),
            (gpt2, "a", vec![n + 2]),
            (gpt2, ".", vec![1, n, 1]),
            (llama3, " ", vec![1, n - 1, 2]),
            (llama3, "\n", vec![1, n, 1]),
            (llama3, " \n", vec![1, n, 1]),
            (llama3, "a", vec![n + 2]),
            (llama3, ".", vec![1, n, 1]),
        ] {
            assert_eq!(lengths(pattern, run, n), want, "{run:?} in {pattern}");
        }
        // What the bound is for. Where this no longer holds it may be raised as far as the memory allows.
        assert_eq!(lengths(gpt2, " ", 1_000_001), [1, 1_000_002], "it gives up");
    }

    proptest! {
        #[test]
        fn pieces_have_the_tokens_of_the_whole(
            text in "([ab' \n1,é块.]|the|BLOCK|isn't| of|<s>|\\\\n){0,30}", n_bytes in 0..9usize, special in any::<bool>(),
        ) {
            static TOKENIZER: LazyLock<Tokenizer> = LazyLock::new(|| load("byte_level"));
            assert!(TOKENIZER.bounds.can_cut);
            prop_assert_eq!(
                TOKENIZER.encode_pieces(&text, special, n_bytes).unwrap(),
                TOKENIZER.encode_whole(&text, special).unwrap()
            );
        }
    }

    #[test]
    fn what_cannot_be_cut_is_bounded() {
        let words = "words ".repeat(300_000);
        assert!(load("byte_level").encode(&words, true).is_ok());
        for (name, text) in [
            ("byte_level", "a".repeat(1_800_000)),
            ("byte_fallback", words),
        ] {
            assert_eq!(
                load(name).encode(&text, true).unwrap_err().to_string(),
                "1800000 bytes of the text have to be tokenized at once, at most 900000 can be"
            );
        }
    }

    #[test]
    fn a_text_that_is_too_long_for_certain_is_known_by_its_bytes() {
        for name in ["byte_level", "byte_fallback"] {
            let tokenizer = load(name);
            let longest = tokenizer.vocabulary().longest_token_bytes();
            assert!((4..100).contains(&longest), "{name}: {longest}");
            let golden: Golden = serde_json::from_slice(&golden(name, "golden.json")).unwrap();
            for case in golden.encodings {
                let n_tokens = case.ids.len() as u32;
                assert!(
                    tokenizer.check_length(&case.text, n_tokens).is_ok(),
                    "{name}: {:?}",
                    case.text
                );
            }
            let text = "a".repeat(4 * longest * 10 + 1);
            let error = tokenizer.check_length(&text, 10).unwrap_err().to_string();
            assert!(
                error.contains("this model's maximum context length is 10 tokens"),
                "{name}: {error}"
            );
        }
    }

    #[test]
    fn broken_files_are_one_sentence() {
        let whole = golden("byte_level", "tokenizer.json");
        let text = String::from_utf8(whole.clone()).unwrap();
        for (why, bytes) in [
            ("empty", Vec::new()),
            ("cut", whole[..whole.len() / 2].to_vec()),
            ("another kind of JSON", b"[1, 2]".to_vec()),
            (
                "an unknown decoder",
                text.replace(
                    "\"decoder\":{\"type\":\"ByteLevel\"",
                    "\"decoder\":{\"type\":\"Novel\"",
                )
                .into_bytes(),
            ),
            (
                "a number as decoder",
                br#"{"version":"1.0","decoder":1e999}"#.to_vec(),
            ),
        ] {
            let files = TextFiles {
                tokenizer: &bytes,
                tokenizer_config: None,
                chat_template: None,
            };
            match Tokenizer::load(files) {
                Err(e) => assert!(e.to_string().starts_with("tokenizer.json: "), "{why}: {e}"),
                // The replacement may not apply to the file as it is written; then nothing was tried.
                Ok(_) => assert_eq!(bytes, whole, "{why}"),
            }
        }
    }
}
