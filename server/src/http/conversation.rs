//! The messages of a chat, as its template takes them. Chat and tokenize share them.
//!
//! They go to the template as they came, with what OpenAI's interface and templates write differently put as templates
//! have it: one text for a content, arguments of calls as objects, and no members that are null.

use std::collections::BTreeMap;

use minijinja::Value;
use minijinja::value::ValueKind;

use super::error::ApiError;
use super::fields::Fields;
use crate::text::chat_template::RenderArgs;
use crate::text::reasoning::PromptEnd;
use crate::text::{TextError, Tokenizer};

/// A conversation, checked.
pub(super) struct Conversation {
    messages: Value,
    args: RenderArgs,
    add_special_tokens: bool,
    /// Bytes of the messages and tools as they were sent.
    pub(super) n_bytes: usize,
}

/// A prompt.
#[derive(Debug)]
pub(super) struct Rendered {
    pub(super) tokens: Vec<u32>,
    pub(super) end: PromptEnd,
}

impl Conversation {
    /// `tools`: those that the model may call, and their bytes as they were sent.
    pub(super) fn take(
        fields: &mut Fields<'_>,
        (tools, tools_bytes): (Value, usize),
    ) -> Result<Self, ApiError> {
        let n_bytes = fields.n_bytes("messages") + tools_bytes;
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
                tools,
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
    ) -> Result<Rendered, TextError> {
        let text = tokenizer
            .chat_template()?
            .render(self.messages, self.args)?;
        if let Some(max_tokens) = max_tokens {
            tokenizer.check_length(&text, max_tokens)?;
        }
        Ok(Rendered {
            tokens: tokenizer.encode(&text, self.add_special_tokens)?,
            end: PromptEnd::of(&text),
        })
    }
}

/// A message's mistake, at a place inside it.
fn wrong(i: usize, place: &str, why: &str) -> ApiError {
    ApiError::field(format!("messages[{i}]{place}"), why)
}

/// Checks a message and puts it as templates have it. An assistant that said nothing (`null`) has an empty content, as in
/// vLLM, unless it called tools.
fn check_message(i: usize, message: Value) -> Result<Value, ApiError> {
    if message.kind() != ValueKind::Map {
        return Err(wrong(i, "", "not an object with role and content"));
    }
    let role = message.get_attr("role").unwrap_or_default();
    let Some(role) = role.as_str() else {
        return Err(wrong(i, ".role", "missing or not a string"));
    };
    for name in ["function_call", "audio"] {
        let value = message.get_attr(name).unwrap_or_default();
        if !value.is_undefined() && !value.is_none() {
            let why = "not supported by this server; leave it out";
            return Err(wrong(i, &format!(".{name}"), why));
        }
    }
    let calls = check_tool_calls(i, &message.get_attr("tool_calls").unwrap_or_default())?;
    let content = message.get_attr("content").unwrap_or_default();
    let content = match content.kind() {
        ValueKind::String => content,
        ValueKind::Seq => Value::from(join_parts(i, &content)?),
        ValueKind::None | ValueKind::Undefined if calls.is_some() => Value::from(()),
        ValueKind::None if role == "assistant" => Value::from(""),
        _ => {
            let why = "missing or neither a string nor a list of text parts";
            return Err(wrong(i, ".content", why));
        }
    };
    as_templates_have_it(i, &message, content, calls)
}

/// The calls of an assistant's message, their arguments as objects; `None` where there are none.
fn check_tool_calls(i: usize, calls: &Value) -> Result<Option<Value>, ApiError> {
    match calls.kind() {
        ValueKind::Undefined | ValueKind::None => return Ok(None),
        ValueKind::Seq if calls.len() == Some(0) => return Ok(None),
        ValueKind::Seq => {}
        _ => return Err(wrong(i, ".tool_calls", "not a list")),
    }
    let calls = calls
        .try_iter()
        .map_err(|e| wrong(i, ".tool_calls", &e.to_string()))?;
    let calls = calls.enumerate().map(|(j, call)| {
        let function = call.get_attr("function").unwrap_or_default();
        let name = function.get_attr("name").unwrap_or_default();
        if name.as_str().is_none() {
            let place = format!(".tool_calls[{j}].function.name");
            return Err(wrong(i, &place, "missing or not a string"));
        }
        let arguments = function.get_attr("arguments").unwrap_or_default();
        let arguments = match arguments.as_str() {
            Some(text) if text.trim().is_empty() => empty_object(),
            // What a model has written may be no JSON: templates take it as it is.
            Some(text) => serde_json::from_str(text).unwrap_or(arguments),
            None if arguments.is_undefined() || arguments.is_none() => empty_object(),
            None => arguments,
        };
        let function = with(&function, [("arguments", arguments)]);
        Ok(with(&call, [("function", function)]))
    });
    Ok(Some(Value::from(calls.collect::<Result<Vec<_>, _>>()?)))
}

fn empty_object() -> Value {
    Value::from_pairs(std::iter::empty::<(Value, Value)>())
}

/// A message without what is null, for templates that ask only whether a member is there.
fn as_templates_have_it(
    i: usize,
    message: &Value,
    content: Value,
    calls: Option<Value>,
) -> Result<Value, ApiError> {
    let keys = message
        .try_iter()
        .map_err(|e| wrong(i, "", &e.to_string()))?;
    let members = keys.filter_map(|key| {
        let value = match key.as_str() {
            Some("content") => content.clone(),
            Some("tool_calls") => calls.clone()?,
            _ => message
                .get_item(&key)
                .ok()
                .filter(|value| !value.is_none())?,
        };
        Some((key, value))
    });
    let mut members: Vec<(Value, Value)> = members.collect();
    let has = |members: &[(Value, Value)], name: &str| {
        members.iter().any(|(key, _)| key.as_str() == Some(name))
    };
    // Two names of one thing: answers have both, templates read the longer.
    if let Ok(reasoning) = message.get_attr("reasoning")
        && reasoning.as_str().is_some()
        && !has(&members, "reasoning_content")
    {
        members.push((Value::from("reasoning_content"), reasoning));
    }
    if !has(&members, "content") {
        members.push((Value::from("content"), content));
    }
    Ok(Value::from_pairs(members))
}

/// A map with these members in place of its own.
fn with<const N: usize>(map: &Value, members: [(&'static str, Value); N]) -> Value {
    let keys = map.try_iter().into_iter().flatten();
    let kept = keys.filter(|key| !members.iter().any(|(name, _)| key.as_str() == Some(name)));
    let kept: Vec<(Value, Value)> = kept
        .map(|key| {
            let value = map.get_item(&key).unwrap_or_default();
            (key, value)
        })
        .collect();
    let members = members
        .iter()
        .map(|(name, value)| (Value::from(*name), value.clone()));
    Value::from_pairs(kept.into_iter().chain(members))
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
                "messages[3].tool_calls[0].function.name: missing or not a string",
            ),
            (
                json!({"role": "assistant", "content": null, "tool_calls": {}}),
                "messages[3].tool_calls: not a list",
            ),
            (
                json!({"role": "assistant", "content": "a", "function_call": {"name": "f"}}),
                "messages[3].function_call: not supported by this server; leave it out",
            ),
        ] {
            assert_eq!(check(message.clone()).unwrap_err(), want, "{message}");
        }
    }

    #[test]
    fn calls_are_put_as_templates_have_them() {
        let call = |arguments: serde_json::Value| {
            json!({"role": "assistant", "content": null, "refusal": null, "reasoning": "hm",
            "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": arguments}}]})
        };
        for (arguments, want) in [
            (
                json!("{\"b\": 1, \"a\": [null]}"),
                json!({"b": 1, "a": [null]}),
            ),
            (json!({"a": 1}), json!({"a": 1})),
            (json!(""), json!({})),
            (json!(null), json!({})),
            (json!("{\"a\": "), json!("{\"a\": ")),
        ] {
            let message = serde_json::from_value(call(arguments)).unwrap();
            let message = serde_json::to_value(check_message(0, message).unwrap()).unwrap();
            let calls = json!([{"id": "c1", "type": "function", "function": {"name": "f", "arguments": want}}]);
            let want = json!({"role": "assistant", "reasoning": "hm", "reasoning_content": "hm", "content": null, "tool_calls": calls});
            assert_eq!(message, want);
        }
        let result = json!({"role": "tool", "tool_call_id": "c1", "name": "f", "content": [{"type": "text", "text": "42"}]});
        let message = check_message(0, serde_json::from_value(result).unwrap()).unwrap();
        let want = json!({"role": "tool", "tool_call_id": "c1", "name": "f", "content": "42"});
        assert_eq!(serde_json::to_value(message).unwrap(), want);
    }
}
