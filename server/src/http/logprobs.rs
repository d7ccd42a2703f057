//! Log-probabilities in the forms of the two interfaces. The text of a token is the vocabulary's, so that tokens
//! that are a part of a character only are told apart, or its id, where the caller wants that.

use std::sync::Arc;

use serde::Serialize;

use crate::engine::TokenLogprobs;
use crate::text::{Detokenizer, Vocabulary};

/// JSON has no infinities; this stands for "impossible", as in vLLM.
const LEAST: f32 = -9999.0;

/// How a token is named.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum TokenNames {
    /// By its text.
    Text,
    /// `token_id:123` (`return_tokens_as_token_ids`).
    Ids,
}

impl TokenNames {
    /// The name, or `None` where it is the token's text.
    fn id(self, id: u32) -> Option<String> {
        (self == Self::Ids).then(|| format!("token_id:{id}"))
    }
}

/// Where each token's text begins in the whole, in characters. Several tokens of one character begin where it does.
#[derive(Clone, Debug)]
pub(super) struct TextOffsets {
    detokenizer: Detokenizer,
    n_chars: usize,
}

impl TextOffsets {
    /// `detokenizer` has seen the tokens of a text of `n_chars` characters.
    pub(super) fn new(detokenizer: Detokenizer, n_chars: usize) -> Self {
        Self {
            detokenizer,
            n_chars,
        }
    }

    /// Where the text of the next token, `id`, begins.
    fn next(&mut self, id: u32) -> usize {
        let offset = self.n_chars + self.detokenizer.n_held_chars();
        let mut text = String::new();
        self.detokenizer.push(id, &mut text);
        self.n_chars += text.chars().count();
        offset
    }
}

/// `choices[].logprobs` of completions.
#[derive(Clone, Debug, Default, Serialize)]
pub(super) struct CompletionLogprobs {
    text_offset: Vec<usize>,
    token_logprobs: Vec<Option<f32>>,
    tokens: Vec<String>,
    top_logprobs: Vec<Option<TopLogprobs>>,
}

/// An object from token to log-probability, most likely first. Its numbers are written as `token_logprobs` are, so
/// that a client finds a token's own among them.
#[derive(Clone, Debug)]
struct TopLogprobs(Vec<(String, f32)>);

impl Serialize for TopLogprobs {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(text, logprob)| (text, logprob)))
    }
}

/// Writes the log-probabilities of one completion.
#[derive(Debug)]
pub(super) struct CompletionScorer {
    vocabulary: Arc<Vocabulary>,
    names: TokenNames,
    offsets: TextOffsets,
}

impl CompletionScorer {
    pub(super) fn new(
        vocabulary: &Arc<Vocabulary>,
        names: TokenNames,
        offsets: TextOffsets,
    ) -> Self {
        Self {
            vocabulary: Arc::clone(vocabulary),
            names,
            offsets,
        }
    }

    /// `unscored` is a token without a log-probability, the first of a prompt. Of each token at most `n_top` alternatives.
    pub(super) fn score<'a>(
        &mut self,
        unscored: Option<u32>,
        tokens: impl Iterator<Item = &'a TokenLogprobs>,
        n_top: usize,
    ) -> CompletionLogprobs {
        let mut scores = CompletionLogprobs::default();
        if let Some(id) = unscored {
            self.push(id, None, None, &mut scores);
        }
        for token in tokens {
            let logprob = token.logprob.map(|p| p.max(LEAST));
            let own = logprob.map(|p| (token.token, p));
            let mut top = TopLogprobs(Vec::with_capacity(token.top.len() + 1));
            for (id, logprob) in token.top.iter().take(n_top).copied().chain(own) {
                // The token itself may be among the most likely ones, and two ids may have one text.
                let name = self.name(id);
                if top.0.iter().all(|(other, _)| *other != name) {
                    top.0.push((name, logprob.max(LEAST)));
                }
            }
            self.push(token.token, logprob, Some(top), &mut scores);
        }
        scores
    }

    /// Takes tokens whose log-probabilities are not wanted.
    pub(super) fn skip<'a>(&mut self, tokens: impl Iterator<Item = &'a u32>) {
        tokens.for_each(|&id| {
            self.offsets.next(id);
        });
    }

    fn push(
        &mut self,
        id: u32,
        logprob: Option<f32>,
        top: Option<TopLogprobs>,
        scores: &mut CompletionLogprobs,
    ) {
        scores.text_offset.push(self.offsets.next(id));
        scores.tokens.push(self.name(id));
        scores.token_logprobs.push(logprob);
        scores.top_logprobs.push(top);
    }

    /// A token that isn't whole characters is written `bytes:\xe2\x82`, as OpenAI does.
    fn name(&self, id: u32) -> String {
        self.names.id(id).unwrap_or_else(|| {
            String::from_utf8(self.vocabulary.bytes(id)).unwrap_or_else(|e| {
                let digits: String = e.as_bytes().iter().map(|b| format!("\\x{b:02x}")).collect();
                format!("bytes:{digits}")
            })
        })
    }
}

/// `choices[].logprobs` of chat.
#[derive(Clone, Debug, Serialize)]
pub(super) struct ChatLogprobs {
    content: Vec<ChatToken>,
}

#[derive(Clone, Debug, Serialize)]
struct ChatToken {
    #[serde(flatten)]
    token: ScoredToken,
    top_logprobs: Vec<ScoredToken>,
}

#[derive(Clone, Debug, Serialize)]
struct ScoredToken {
    token: String,
    logprob: f32,
    bytes: Vec<u8>,
}

impl ChatLogprobs {
    pub(super) fn new(
        vocabulary: &Vocabulary,
        names: TokenNames,
        tokens: &[TokenLogprobs],
    ) -> Self {
        let scored = |id: u32, logprob: f32| {
            let bytes = vocabulary.bytes(id);
            let text = || String::from_utf8_lossy(&bytes).into_owned();
            ScoredToken {
                token: names.id(id).unwrap_or_else(text),
                logprob: logprob.max(LEAST),
                bytes,
            }
        };
        let content = tokens.iter().map(|token| ChatToken {
            token: scored(token.token, token.logprob.unwrap_or(LEAST)),
            top_logprobs: token.top.iter().map(|(id, p)| scored(*id, *p)).collect(),
        });
        Self {
            content: content.collect(),
        }
    }
}

/// `prompt_logprobs`, as vLLM writes it: for each token of the prompt an object from ids to scores, the token itself first,
/// then the most likely ones; null for the first token, which has no score.
#[derive(Clone, Debug, Serialize)]
pub(super) struct PromptLogprobs(Vec<Option<PromptScores>>);

#[derive(Clone, Debug)]
struct PromptScores(Vec<(u32, PromptScore)>);

#[derive(Clone, Debug, Serialize)]
struct PromptScore {
    logprob: f32,
    /// 1 is the most likely token; null where the token is not among those that were asked for.
    rank: Option<usize>,
    decoded_token: String,
}

impl Serialize for PromptScores {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(id, score)| (id, score)))
    }
}

impl PromptLogprobs {
    /// `tokens` are those of the prompt from the second on, each with at most `n_top` alternatives.
    pub(super) fn new(vocabulary: &Vocabulary, tokens: &[TokenLogprobs], n_top: usize) -> Self {
        let score = |id: u32, logprob: f32, rank: Option<usize>| {
            let decoded_token = String::from_utf8_lossy(&vocabulary.bytes(id)).into_owned();
            let score = PromptScore {
                logprob: logprob.max(LEAST),
                rank,
                decoded_token,
            };
            (id, score)
        };
        let one = |token: &TokenLogprobs| {
            let top = || token.top.iter().zip(1..).take(n_top);
            let own = top().find(|((id, _), _)| *id == token.token);
            let own = score(
                token.token,
                token.logprob.unwrap_or(LEAST),
                own.map(|(_, rank)| rank),
            );
            let others = top().filter(|((id, _), _)| *id != token.token);
            let others = others.map(|((id, logprob), rank)| score(*id, *logprob, Some(rank)));
            Some(PromptScores(std::iter::once(own).chain(others).collect()))
        };
        Self(
            std::iter::once(None)
                .chain(tokens.iter().map(one))
                .collect(),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::tokenizer::{TextFiles, Tokenizer};

    fn tokenizer(name: &str) -> Tokenizer {
        let path = format!(
            "{}/tests/golden/tokenizers/{name}/tokenizer.json",
            env!("CARGO_MANIFEST_DIR")
        );
        let files = TextFiles {
            tokenizer: &std::fs::read(path).unwrap(),
            tokenizer_config: None,
            chat_template: None,
        };
        Tokenizer::load(files).unwrap()
    }

    /// `text_offset` of these tokens, from the start of a text.
    fn offsets(tokenizer: &Tokenizer, ids: &[u32]) -> Vec<usize> {
        let detokenizer = Detokenizer::new(Arc::clone(tokenizer.vocabulary()), true);
        let mut offsets = TextOffsets::new(detokenizer, 0);
        ids.iter().map(|id| offsets.next(*id)).collect()
    }

    #[test]
    fn offsets_do_not_drift_after_a_character_of_several_tokens() {
        let byte_level = tokenizer("byte_level");
        let encode = |text| byte_level.encode(text, false).unwrap();
        assert_eq!((encode("𐍈").len(), encode("x").len()), (4, 1));
        assert_eq!(
            offsets(&byte_level, &encode("x𐍈x𐍈x")),
            [0, 1, 1, 1, 1, 2, 3, 3, 3, 3, 4]
        );

        // Bytes are held back as long as a run of them goes on, and specials have no text.
        let byte_fallback = tokenizer("byte_fallback");
        let ids = byte_fallback.encode("𐍈𐍈a", true).unwrap();
        assert_eq!(
            ids.len(),
            11,
            "BOS, a blank that is stripped, two times four bytes, a"
        );
        assert_eq!(
            offsets(&byte_fallback, &ids),
            [0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 2]
        );
    }

    #[test]
    fn tokens_are_named_by_their_ids_where_asked() {
        let tokenizer = tokenizer("byte_level");
        let vocabulary = tokenizer.vocabulary();
        let tokens = [TokenLogprobs {
            token: 7,
            logprob: Some(-0.5),
            top: vec![(9, -0.25), (7, -0.5)],
        }];
        let detokenizer = Detokenizer::new(Arc::clone(vocabulary), true);
        let offsets = TextOffsets::new(detokenizer, 0);
        let mut scorer = CompletionScorer::new(vocabulary, TokenNames::Ids, offsets);
        let json = serde_json::to_value(scorer.score(Some(3), tokens.iter(), 2)).unwrap();
        assert_eq!(
            json["tokens"],
            serde_json::json!(["token_id:3", "token_id:7"])
        );
        assert_eq!(
            json["top_logprobs"][1],
            serde_json::json!({"token_id:9": -0.25, "token_id:7": -0.5})
        );
        let chat = ChatLogprobs::new(vocabulary, TokenNames::Ids, &tokens);
        let json = serde_json::to_value(chat).unwrap();
        assert_eq!(json["content"][0]["token"], "token_id:7");
        assert_eq!(json["content"][0]["top_logprobs"][0]["token"], "token_id:9");
    }

    #[test]
    fn a_prompts_scores_are_by_id_and_its_own_first() {
        let tokenizer = tokenizer("byte_level");
        let scored = |token, logprob| TokenLogprobs {
            token,
            logprob: Some(logprob),
            top: vec![(9, -0.25), (7, -0.5), (8, -2.0)],
        };
        let tokens = [scored(7, -0.5), scored(5, f32::NEG_INFINITY)];
        let text =
            |id: u32| String::from_utf8_lossy(&tokenizer.vocabulary().bytes(id)).into_owned();
        let scores = PromptLogprobs::new(tokenizer.vocabulary(), &tokens, 2);
        let score = |id: u32, logprob: f32, rank: Option<u32>| serde_json::json!({"logprob": logprob, "rank": rank, "decoded_token": text(id)});
        let want = serde_json::json!([
            null,
            {"7": score(7, -0.5, Some(2)), "9": score(9, -0.25, Some(1))},
            {"5": score(5, -9999.0, None), "9": score(9, -0.25, Some(1)), "7": score(7, -0.5, Some(2))},
        ]);
        assert_eq!(serde_json::to_value(&scores).unwrap(), want);
        let written = serde_json::to_string(&scores).unwrap();
        assert!(written.starts_with(r#"[null,{"7":{"#), "{written}");
    }
}
