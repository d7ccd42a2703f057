//! Log-probabilities in the forms of the two interfaces. The text of a token is the vocabulary's, so that tokens
//! that are a part of a character only are told apart.

use kvasir_kernels::step::Sampled;
use serde::Serialize;

use crate::text::Vocabulary;

/// JSON has no infinities; this stands for "impossible", as in vLLM.
const LEAST: f32 = -9999.0;

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

impl CompletionLogprobs {
    /// A token without a log-probability: the first of a prompt.
    pub(super) fn push_unscored(&mut self, vocabulary: &Vocabulary, id: u32, offset: &mut usize) {
        self.push_token(vocabulary, id, offset);
        self.token_logprobs.push(None);
        self.top_logprobs.push(None);
    }

    /// A token; `offset` is where its text begins, in characters, and is moved on.
    pub(super) fn push(&mut self, vocabulary: &Vocabulary, sampled: &Sampled, offset: &mut usize) {
        self.push_token(vocabulary, sampled.token, offset);
        let logprob = sampled.logprob.map(|p| p.max(LEAST));
        self.token_logprobs.push(logprob);
        let own = logprob.map(|p| (sampled.token, p));
        let mut top = TopLogprobs(Vec::with_capacity(sampled.top.len() + 1));
        for (id, logprob) in sampled.top.iter().copied().chain(own) {
            // The token itself may be among the most likely ones, and two ids may have one text.
            let text = legacy_text(vocabulary, id);
            if top.0.iter().all(|(other, _)| *other != text) {
                top.0.push((text, logprob.max(LEAST)));
            }
        }
        self.top_logprobs.push(Some(top));
    }

    fn push_token(&mut self, vocabulary: &Vocabulary, id: u32, offset: &mut usize) {
        let text = legacy_text(vocabulary, id);
        self.text_offset.push(*offset);
        *offset += String::from_utf8_lossy(&vocabulary.bytes(id))
            .chars()
            .count();
        self.tokens.push(text);
    }
}

/// A token that isn't whole characters is written `bytes:\xe2\x82`, as OpenAI does.
fn legacy_text(vocabulary: &Vocabulary, id: u32) -> String {
    String::from_utf8(vocabulary.bytes(id)).unwrap_or_else(|e| {
        let digits: String = e.as_bytes().iter().map(|b| format!("\\x{b:02x}")).collect();
        format!("bytes:{digits}")
    })
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
    pub(super) fn new(vocabulary: &Vocabulary, tokens: &[Sampled]) -> Self {
        let scored = |id: u32, logprob: f32| {
            let bytes = vocabulary.bytes(id);
            ScoredToken {
                token: String::from_utf8_lossy(&bytes).into_owned(),
                logprob: logprob.max(LEAST),
                bytes,
            }
        };
        let content = tokens.iter().map(|sampled| ChatToken {
            token: scored(sampled.token, sampled.logprob.unwrap_or(LEAST)),
            top_logprobs: sampled.top.iter().map(|(id, p)| scored(*id, *p)).collect(),
        });
        Self {
            content: content.collect(),
        }
    }
}
