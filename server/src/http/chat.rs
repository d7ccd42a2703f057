//! `POST /v1/chat/completions`: messages through the model's chat template, whole or streamed. And `POST /tokenize`,
//! which shares its reading of messages.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::Json;
use axum::response::{IntoResponse, Response};
use minijinja::Value;
use serde::{Deserialize, Serialize};

use super::Serving;
use super::error::ApiError;
use super::fields::Fields;
use super::generate::{ChunkWriter, Frames, Prepared, collect, event_stream};
use super::incoming::Incoming;
use super::logprobs::ChatLogprobs;
use super::params::{MAX_LOGPROBS, Params, take_n_logprobs};
use super::wire::{Chat, ChatChoice, ChatDelta, Delta, Message, Usage, reasons};
use crate::output::Event;
use crate::text::chat_template::RenderArgs;
use crate::text::{Detokenizer, TextError, Tokenizer};

/// A conversation as a template takes it.
struct Conversation {
    messages: Value,
    args: RenderArgs,
    add_special_tokens: bool,
}

impl Conversation {
    fn take(fields: &mut Fields) -> Result<Self, ApiError> {
        let messages: Vec<Value> = fields.require("messages")?;
        if messages.is_empty() {
            return Err(ApiError::field(
                "messages",
                "empty; at least one message is needed",
            ));
        }
        let messages = messages
            .into_iter()
            .enumerate()
            .map(|(i, message)| check_message(i, message));
        let messages = Value::from(messages.collect::<Result<Vec<_>, _>>()?);
        let continue_final_message = fields.take("continue_final_message")?.unwrap_or(false);
        let add_generation_prompt: Option<bool> = fields.take("add_generation_prompt")?;
        if continue_final_message && add_generation_prompt == Some(true) {
            return Err(ApiError::field(
                "continue_final_message",
                "contradicts add_generation_prompt; set one of them only",
            ));
        }
        let kwargs: BTreeMap<String, Value> =
            fields.take("chat_template_kwargs")?.unwrap_or_default();
        Ok(Self {
            messages,
            args: RenderArgs {
                add_generation_prompt: add_generation_prompt.unwrap_or(!continue_final_message),
                continue_final_message,
                kwargs,
                now: jiff::Zoned::now().datetime(),
            },
            add_special_tokens: fields.take("add_special_tokens")?.unwrap_or(false),
        })
    }

    fn encode(self, tokenizer: &Tokenizer) -> Result<Vec<u32>, TextError> {
        let text = tokenizer
            .chat_template()?
            .render(self.messages, self.args)?;
        tokenizer.encode(&text, self.add_special_tokens)
    }
}

/// Checks role and content, and joins the text parts of a content that comes in parts.
fn check_message(i: usize, message: Value) -> Result<Value, ApiError> {
    let wrong = |part: &str, why: &str| ApiError::field(format!("messages[{i}]{part}"), why);
    if message.kind() != minijinja::value::ValueKind::Map {
        return Err(wrong("", "not an object with role and content"));
    }
    if message
        .get_attr("role")
        .ok()
        .as_ref()
        .and_then(Value::as_str)
        .is_none()
    {
        return Err(wrong(".role", "missing or not a string"));
    }
    for name in ["tool_calls", "function_call", "audio"] {
        let value = message.get_attr(name).unwrap_or_default();
        if !value.is_undefined() && !value.is_none() && value.len() != Some(0) {
            return Err(wrong(
                &format!(".{name}"),
                "not supported by this server; leave it out",
            ));
        }
    }
    let content = message.get_attr("content").unwrap_or_default();
    if content.as_str().is_some() {
        return Ok(message);
    }
    if content.kind() != minijinja::value::ValueKind::Seq {
        return Err(wrong(
            ".content",
            "missing or neither a string nor a list of text parts",
        ));
    }
    let mut texts = Vec::new();
    for (j, part) in content
        .try_iter()
        .map_err(|e| wrong(".content", &e.to_string()))?
        .enumerate()
    {
        let is_text = part.get_attr("type").ok().as_ref().and_then(Value::as_str) == Some("text");
        let text = part.get_attr("text").unwrap_or_default();
        match text.as_str() {
            Some(text) if is_text => texts.push(text.to_owned()),
            _ => {
                return Err(wrong(
                    &format!(".content[{j}]"),
                    "only parts of type \"text\" are supported",
                ));
            }
        }
    }
    let joined = Value::from(texts.join("\n"));
    let keys = message.try_iter().map_err(|e| wrong("", &e.to_string()))?;
    let entries = keys.map(|key| {
        let value = if key.as_str() == Some("content") {
            joined.clone()
        } else {
            message.get_item(&key).unwrap_or_default()
        };
        (key, value)
    });
    Ok(Value::from_pairs(entries))
}

struct Asked {
    params: Params,
    conversation: Conversation,
    max_tokens: Option<u32>,
    logprobs: Option<u8>,
}

fn parse(serving: &Serving, body: &[u8]) -> Result<Asked, ApiError> {
    let mut fields = Fields::parse(body)?;
    let params = Params::take(&mut fields, &serving.defaults)?;
    serving.check_model(params.model.as_deref())?;
    let max_tokens: Option<u32> = fields.take("max_tokens")?;
    let max_completion_tokens: Option<u32> = fields.take("max_completion_tokens")?;
    let max_tokens = max_completion_tokens.or(max_tokens);
    if max_tokens == Some(0) {
        return Err(ApiError::field(
            "max_tokens",
            "0; at least 1 token must be allowed",
        ));
    }
    let logprobs = fields.take("logprobs")?.unwrap_or(false);
    let top_logprobs = take_n_logprobs(&mut fields, "top_logprobs")?;
    if !logprobs && top_logprobs.is_some_and(|n| n > 0) {
        let message = format!("allowed only with \"logprobs\": true (0 to {MAX_LOGPROBS})");
        return Err(ApiError::field("top_logprobs", message));
    }
    let conversation = Conversation::take(&mut fields)?;
    for (name, neutral) in [
        ("tools", &["[]"] as &[&str]),
        ("tool_choice", &["\"none\"", "\"auto\""]),
        ("parallel_tool_calls", &["true", "false"]),
        ("functions", &["[]"]),
        ("function_call", &["\"none\"", "\"auto\""]),
        ("modalities", &["[\"text\"]"]),
        ("audio", &[]),
        ("prediction", &[]),
        ("reasoning_effort", &[]),
        ("verbosity", &[]),
        ("web_search_options", &[]),
        ("chat_template", &[]),
        ("documents", &["[]"]),
        ("echo", &["false"]),
        ("best_of", &["1"]),
    ] {
        fields.neutral(name, neutral)?;
    }
    fields.finish()?;
    Ok(Asked {
        params,
        conversation,
        max_tokens,
        logprobs: logprobs.then(|| top_logprobs.unwrap_or(0)),
    })
}

/// Answers one call.
pub(super) async fn chat(
    Incoming {
        serving,
        body,
        arrived,
    }: Incoming,
) -> Result<Response, ApiError> {
    let Asked {
        params,
        conversation,
        max_tokens,
        logprobs,
    } = parse(&serving, &body)?;
    let tokenizer = Arc::clone(&serving.tokenizer);
    let prompt = serving
        .pool
        .run(move || conversation.encode(&tokenizer))
        .await??;
    let max_tokens = serving.check_prompt(&prompt, max_tokens, "messages")?;
    let mut call = Call {
        id: format!("chatcmpl-{}", serving.ids.call()),
        created: super::unix_time(),
        n_prompt: prompt.len(),
        n_completion: 0,
        prompt: params.return_token_ids.then(|| prompt.clone()),
        started: false,
        with_logprobs: logprobs.is_some(),
        params,
        serving: Arc::clone(&serving),
    };
    // An answer is a text of its own, unlike a completion.
    let vocabulary = Arc::clone(serving.tokenizer.vocabulary());
    let detokenizer = Detokenizer::new(vocabulary, call.params.skip_special_tokens);
    let prepared = Prepared {
        prompt,
        detokenizer,
        max_tokens,
        logprobs,
        prompt_logprobs: None,
    };
    let mut running = serving.submit(vec![prepared], &call.params, arrived)?;
    if call.params.stream.is_some() {
        return Ok(event_stream(running, call));
    }
    let running = running.pop().ok_or_else(super::generate::engine_gone)?;
    let answer = collect(running).await?;
    let (finish_reason, stop_reason) =
        reasons(answer.finish, &call.params.stop_token_ids).map_err(ApiError::internal)?;
    let choice = ChatChoice {
        index: 0,
        message: Message {
            role: "assistant",
            content: answer.text,
        },
        logprobs: call.logprobs(&answer.tokens),
        finish_reason,
        stop_reason,
        token_ids: call.ids_of(&answer.tokens),
    };
    let usage = Usage::new(call.n_prompt, answer.tokens.len());
    let prompt_token_ids = call.prompt.take();
    Ok(Json(call.object(
        "chat.completion",
        vec![choice],
        Some(Some(usage)),
        prompt_token_ids,
    ))
    .into_response())
}

/// A call under way.
struct Call {
    id: String,
    created: u64,
    params: Params,
    with_logprobs: bool,
    n_prompt: usize,
    n_completion: usize,
    /// Where asked for, until it is sent.
    prompt: Option<Vec<u32>>,
    started: bool,
    serving: Arc<Serving>,
}

impl Call {
    fn object<C>(
        &self,
        object: &'static str,
        choices: Vec<C>,
        usage: Option<Option<Usage>>,
        prompt_token_ids: Option<Vec<u32>>,
    ) -> Chat<'_, C> {
        let Self {
            id,
            created,
            serving,
            ..
        } = self;
        Chat {
            id,
            object,
            created: *created,
            model: &serving.model_name,
            choices,
            usage,
            prompt_token_ids,
        }
    }

    fn chunk(&mut self, choice: ChatDelta, out: &mut Frames) {
        let prompt_token_ids = self.prompt.take();
        out.json(&self.object(
            "chat.completion.chunk",
            vec![choice],
            self.null_usage(),
            prompt_token_ids,
        ));
    }

    fn null_usage(&self) -> Option<Option<Usage>> {
        self.params
            .stream
            .is_some_and(|s| s.include_usage)
            .then_some(None)
    }

    fn logprobs(&self, tokens: &[kvasir_kernels::step::Sampled]) -> Option<ChatLogprobs> {
        self.with_logprobs
            .then(|| ChatLogprobs::new(self.serving.tokenizer.vocabulary(), tokens))
    }

    fn ids_of(&self, tokens: &[kvasir_kernels::step::Sampled]) -> Option<Vec<u32>> {
        self.params
            .return_token_ids
            .then(|| tokens.iter().map(|t| t.token).collect())
    }
}

impl ChunkWriter for Call {
    fn event(&mut self, index: usize, event: Event, out: &mut Frames) -> Result<(), ApiError> {
        if !std::mem::replace(&mut self.started, true) {
            let delta = Delta {
                role: Some("assistant"),
                content: Some(String::new()),
            };
            let role = ChatDelta {
                index,
                delta,
                logprobs: None,
                finish_reason: None,
                stop_reason: None,
                token_ids: None,
            };
            self.chunk(role, out);
        }
        self.n_completion += event.tokens.len();
        let wanted =
            (self.params.return_token_ids || self.with_logprobs) && !event.tokens.is_empty();
        if event.text.is_empty() && event.finished.is_none() && !wanted {
            return Ok(());
        }
        let (finish_reason, stop_reason) = match event.finished {
            None => (None, None),
            Some(finish) => {
                let (finish, stop) =
                    reasons(finish, &self.params.stop_token_ids).map_err(ApiError::internal)?;
                (Some(finish), stop)
            }
        };
        let content = (!event.text.is_empty() || finish_reason.is_none()).then_some(event.text);
        let choice = ChatDelta {
            index,
            delta: Delta {
                role: None,
                content,
            },
            logprobs: if event.tokens.is_empty() {
                None
            } else {
                self.logprobs(&event.tokens)
            },
            finish_reason,
            stop_reason,
            token_ids: self.ids_of(&event.tokens),
        };
        self.chunk(choice, out);
        Ok(())
    }

    fn end(&mut self, out: &mut Frames) {
        if self.null_usage().is_some() {
            let usage = Usage::new(self.n_prompt, self.n_completion);
            let choices = Vec::<ChatDelta>::new();
            out.json(&self.object("chat.completion.chunk", choices, Some(Some(usage)), None));
        }
    }
}

#[derive(Serialize)]
struct Tokens {
    count: usize,
    max_model_len: u32,
    tokens: Vec<u32>,
    token_strs: Option<Vec<String>>,
}

/// Answers `POST /tokenize`: a `prompt`, or `messages` through the chat template.
pub(super) async fn tokenize(
    Incoming { serving, body, .. }: Incoming,
) -> Result<Response, ApiError> {
    #[derive(Deserialize)]
    #[serde(transparent)]
    struct Text(String);

    let mut fields = Fields::parse(&body)?;
    let model: Option<String> = fields.take("model")?;
    serving.check_model(model.as_deref())?;
    let with_strings = fields.take("return_token_strs")?.unwrap_or(false);
    let tokenizer = Arc::clone(&serving.tokenizer);
    let tokens = match fields.take::<Text>("prompt")? {
        Some(Text(text)) => {
            let special = fields.take("add_special_tokens")?.unwrap_or(true);
            fields.finish()?;
            serving
                .pool
                .run(move || tokenizer.encode(&text, special))
                .await??
        }
        None => {
            let conversation = Conversation::take(&mut fields).map_err(|e| {
                match e.message.starts_with("messages: missing") {
                    true => ApiError::field("prompt", "missing; give a prompt or messages"),
                    false => e,
                }
            })?;
            fields.finish()?;
            serving
                .pool
                .run(move || conversation.encode(&tokenizer))
                .await??
        }
    };
    let vocabulary = serving.tokenizer.vocabulary();
    let text_of = |id: &u32| String::from_utf8_lossy(&vocabulary.bytes(*id)).into_owned();
    let token_strs = with_strings.then(|| tokens.iter().map(text_of).collect());
    let max_model_len = serving.outputs.engine().facts().max_model_len;
    Ok(Json(Tokens {
        count: tokens.len(),
        max_model_len,
        tokens,
        token_strs,
    })
    .into_response())
}
