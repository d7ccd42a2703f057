//! `POST /detokenize`: the text of `tokens`. `GET /tokenizer_info`: what the model's files say of the tokenizer. Both as
//! vLLM has them.

use std::marker::PhantomData;
use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use serde::Serialize;

use super::App;
use super::error::ApiError;
use super::fields::Fields;
use super::generate::json_response;
use super::incoming::Incoming;
use crate::frontend::budget::{BudgetExhausted, Lease, Purpose};
use crate::text::{Detokenizer, Vocabulary};

/// Tokens between two looks at the memory.
const CHUNK_TOKENS: usize = 1024;

#[derive(Serialize)]
struct Text {
    prompt: String,
}

/// Answers one call.
pub(super) async fn detokenize(
    Incoming {
        serving,
        body,
        mut lease,
        ..
    }: Incoming,
) -> Result<Response, ApiError> {
    let mut fields = Fields::parse(&body)?;
    let model: Option<String> = fields.take("model")?;
    serving.check_model(model.as_deref())?;
    // An id and its comma take two bytes of a body at least, and up to eight here while the list grows.
    lease.grow(fields.n_bytes("tokens") * 4)?;
    let tokens = fields.require_with("tokens", PhantomData::<Vec<u32>>)?;
    let tokens = tokens.map_err(|_| ApiError::field("tokens", "expected a list of token ids"))?;
    fields.finish_all()?;
    drop(body);
    let vocab_size = serving.engine.handle().model_info().vocab_size;
    if let Some(id) = tokens.iter().find(|id| **id >= vocab_size) {
        let message = format!("token {id} is not below the vocabulary's size, {vocab_size}");
        return Err(ApiError::field("tokens", message));
    }

    let vocabulary = Arc::clone(serving.tokenizer.vocabulary());
    let answer = serving.engine.budget().lease(Purpose::Answer);
    let text = serving.pool.run(tokens.len() * size_of::<u32>(), move || {
        let text = text_of(&tokens, vocabulary, answer);
        drop(lease);
        text
    });
    let (prompt, answer) = text.await??;
    json_response(&Text { prompt }, answer)
}

/// Special tokens are written as all others are. The text grows within the budget, because a token may be long.
fn text_of(
    tokens: &[u32],
    vocabulary: Arc<Vocabulary>,
    mut lease: Lease,
) -> Result<(String, Lease), BudgetExhausted> {
    let mut detokenizer = Detokenizer::new(vocabulary, false);
    let mut text = String::new();
    for tokens in tokens.chunks(CHUNK_TOKENS) {
        for id in tokens {
            detokenizer.push(*id, &mut text);
        }
        // It is there twice, as a text and as JSON.
        lease.resize(text.capacity() * 2)?;
    }
    detokenizer.finish(&mut text);
    Ok((text, lease))
}

/// The tokenizer's configuration.
pub(super) async fn tokenizer_info(State(app): State<Arc<App>>) -> Result<Response, ApiError> {
    let serving = app.serving()?;
    Ok(Json(serving.tokenizer.info()).into_response())
}
