//! The messages of a chat, as its template takes them. Chat and tokenize share them.

use std::collections::BTreeMap;

use minijinja::Value;
use minijinja::value::ValueKind;

use super::error::ApiError;
use super::fields::Fields;
use crate::text::chat_template::RenderArgs;
use crate::text::{TextError, Tokenizer};

/// A conversation, checked.
pub(super) struct Conversation {
    messages: Value,
    args: RenderArgs,
    add_special_tokens: bool,
    /// Bytes of the messages as they were sent.
    pub(super) n_bytes: usize,
}

impl Conversation {
    pub(super) fn take(fields: &mut Fields<'_>) -> Result<Self, ApiError> {
        let n_bytes = fields.n_bytes("messages");
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
            n_bytes,
        })
    }

    /// The prompt in tokens. With `max_tokens`, a text that can't be as short is refused before it is tokenized.
    pub(super) fn encode(
        self,
        tokenizer: &Tokenizer,
        max_tokens: Option<u32>,
    ) -> Result<Vec<u32>, TextError> {
        let text = tokenizer
            .chat_template()?
            .render(self.messages, self.args)?;
        if let Some(max_tokens) = max_tokens {
            tokenizer.check_length(&text, max_tokens)?;
        }
        tokenizer.encode(&text, self.add_special_tokens)
    }
}

/// A message's mistake, at a place inside it.
fn wrong(i: usize, place: &str, why: &str) -> ApiError {
    ApiError::field(format!("messages[{i}]{place}"), why)
}

/// Checks role and content, and makes the content one text: parts are joined, and an assistant that said nothing
/// (`null`) has an empty one, as in vLLM.
fn check_message(i: usize, message: Value) -> Result<Value, ApiError> {
    if message.kind() != ValueKind::Map {
        return Err(wrong(i, "", "not an object with role and content"));
    }
    let role = message.get_attr("role").unwrap_or_default();
    let Some(role) = role.as_str() else {
        return Err(wrong(i, ".role", "missing or not a string"));
    };
    for name in ["tool_calls", "function_call", "audio"] {
        let value = message.get_attr(name).unwrap_or_default();
        if !value.is_undefined() && !value.is_none() && value.len() != Some(0) {
            let why = "not supported by this server; leave it out";
            return Err(wrong(i, &format!(".{name}"), why));
        }
    }
    let content = message.get_attr("content").unwrap_or_default();
    let text = match content.kind() {
        ValueKind::String => return Ok(message),
        ValueKind::Seq => join_parts(i, &content)?,
        ValueKind::None if role == "assistant" => String::new(),
        _ => {
            let why = "missing or neither a string nor a list of text parts";
            return Err(wrong(i, ".content", why));
        }
    };
    with_content(i, &message, Value::from(text))
}

fn join_parts(i: usize, parts: &Value) -> Result<String, ApiError> {
    let parts = parts
        .try_iter()
        .map_err(|e| wrong(i, ".content", &e.to_string()))?;
    let text_of = |(j, part): (usize, Value)| {
        let kind = part.get_attr("type").unwrap_or_default();
        let text = part.get_attr("text").unwrap_or_default();
        match (kind.as_str(), text.as_str()) {
            (Some("text"), Some(text)) => Ok(text.to_owned()),
            _ => Err(wrong(
                i,
                &format!(".content[{j}]"),
                "only parts of type \"text\" are supported",
            )),
        }
    };
    let texts = parts.enumerate().map(text_of);
    Ok(texts.collect::<Result<Vec<_>, _>>()?.join("\n"))
}

fn with_content(i: usize, message: &Value, content: Value) -> Result<Value, ApiError> {
    let keys = message
        .try_iter()
        .map_err(|e| wrong(i, "", &e.to_string()))?;
    let entries = keys.map(|key| {
        let value = match key.as_str() {
            Some("content") => content.clone(),
            _ => message.get_item(&key).unwrap_or_default(),
        };
        (key, value)
    });
    Ok(Value::from_pairs(entries))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn check(message: serde_json::Value) -> Result<String, String> {
        let message =
            check_message(3, serde_json::from_value(message).unwrap()).map_err(|e| e.message)?;
        let content = message.get_attr("content").unwrap();
        Ok(content.as_str().unwrap().to_owned())
    }

    #[test]
    fn a_content_is_one_text() {
        for (message, want) in [
            (json!({"role": "user", "content": "a"}), "a"),
            (json!({"role": "assistant", "content": null}), ""),
            (
                json!({"role": "assistant", "content": null, "tool_calls": []}),
                "",
            ),
            (
                json!({"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}),
                "a\nb",
            ),
        ] {
            assert_eq!(check(message.clone()).as_deref(), Ok(want), "{message}");
        }
        let content = "messages[3].content: missing or neither a string nor a list of text parts";
        for (message, want) in [
            (
                json!("a"),
                "messages[3]: not an object with role and content",
            ),
            (
                json!({"content": "a"}),
                "messages[3].role: missing or not a string",
            ),
            (json!({"role": "user"}), content),
            (json!({"role": "user", "content": null}), content),
            (json!({"role": "user", "content": 3}), content),
            (
                json!({"role": "user", "content": [{"type": "image_url"}]}),
                "messages[3].content[0]: only parts of type \"text\" are supported",
            ),
            (
                json!({"role": "assistant", "content": null, "tool_calls": [{}]}),
                "messages[3].tool_calls: not supported by this server; leave it out",
            ),
        ] {
            assert_eq!(check(message.clone()).unwrap_err(), want, "{message}");
        }
    }
}
