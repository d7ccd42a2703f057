//! `POST /tokenize`: the tokens of a `prompt`, or of `messages` through the chat template.

use std::sync::Arc;

use axum::response::Response;
use serde::Serialize;

use super::conversation::Conversation;
use super::error::ApiError;
use super::fields::Fields;
use super::generate::json_response;
use super::incoming::Incoming;
use super::tools::Tools;
use crate::frontend::budget::Purpose;
use crate::text::{TextError, Tokenizer, Vocabulary};

#[derive(Serialize)]
struct Tokens<'a> {
    count: usize,
    max_model_len: u32,
    tokens: &'a [u32],
    token_strs: Option<TokenTexts<'a>>,
}

/// Written one by one: all of them at once would be many times the text.
struct TokenTexts<'a> {
    tokens: &'a [u32],
    vocabulary: &'a Vocabulary,
}

impl Serialize for TokenTexts<'_> {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let text_of = |id: &u32| String::from_utf8_lossy(&self.vocabulary.bytes(*id)).into_owned();
        serializer.collect_seq(self.tokens.iter().map(text_of))
    }
}

/// What to tokenize.
enum Text {
    Prompt { text: String, special: bool },
    Chat(Conversation),
}

impl Text {
    fn take(fields: &mut Fields<'_>) -> Result<Self, ApiError> {
        if let Some(text) = fields.take("prompt")? {
            let special = fields.take("add_special_tokens")?.unwrap_or(true);
            return Ok(Self::Prompt { text, special });
        }
        if fields.n_bytes("messages") == 0 {
            let message = "missing; give a prompt or messages";
            return Err(ApiError::field("prompt", message));
        }
        let tools = Tools::take(fields)?;
        Conversation::take(fields, tools.for_template()).map(Self::Chat)
    }

    fn n_bytes(&self) -> usize {
        match self {
            Self::Prompt { text, .. } => text.len(),
            Self::Chat(conversation) => conversation.n_bytes,
        }
    }

    fn encode(self, tokenizer: &Tokenizer) -> Result<Vec<u32>, TextError> {
        match self {
            Self::Prompt { text, special } => tokenizer.encode(&text, special),
            Self::Chat(conversation) => Ok(conversation.encode(tokenizer, None)?.tokens),
        }
    }
}

/// Answers one call.
pub(super) async fn tokenize(
    Incoming {
        serving,
        body,
        lease,
        ..
    }: Incoming,
) -> Result<Response, ApiError> {
    let mut fields = Fields::parse(&body)?;
    let model: Option<String> = fields.take("model")?;
    serving.check_model(model.as_deref())?;
    let with_strings = fields.take("return_token_strs")?.unwrap_or(false);
    let text = Text::take(&mut fields)?;
    fields.finish_all()?;
    drop(body);

    let tokenizer = Arc::clone(&serving.tokenizer);
    let field = match text {
        Text::Prompt { .. } => "prompt",
        Text::Chat(_) => "messages",
    };
    let tokens = serving
        .pool
        .run(text.n_bytes(), move || text.encode(&tokenizer));
    let tokens = tokens
        .await?
        .map_err(|error| ApiError::from(error).about(field))?;
    drop(lease);
    // About what the answer will have: a number and a comma for each token, and its text twice with quotes.
    let mut lease = serving.engine.budget().lease(Purpose::Answer);
    let n_bytes = if with_strings { 24 } else { 8 };
    lease.grow(tokens.len() * n_bytes)?;
    let vocabulary = serving.tokenizer.vocabulary();
    let answer = Tokens {
        count: tokens.len(),
        max_model_len: serving.engine.handle().model_info().max_model_len,
        tokens: &tokens,
        token_strs: with_strings.then_some(TokenTexts {
            tokens: &tokens,
            vocabulary,
        }),
    };
    json_response(&answer, lease)
}
