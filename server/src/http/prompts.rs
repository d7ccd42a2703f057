//! The `prompt` of a completion: a text, several, token ids, or several lists of those. Read in one pass that stops at
//! the first prompt or token too many, so that a body costs no more memory than its own bytes again.

use serde::de::{DeserializeSeed, Deserializer, Error, SeqAccess, Visitor};

use super::error::ApiError;
use super::fields::Fields;

/// One prompt.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Prompt {
    Text(String),
    Ids(Vec<u32>),
}

/// What a call may ask for.
#[derive(Clone, Copy, Debug)]
pub(super) struct PromptLimits {
    /// Prompts in one call.
    pub(super) max_prompts: usize,
    /// Tokens of one prompt.
    pub(super) max_tokens: u32,
}

/// Takes the field `prompt`: at least one, at most as many as allowed.
pub(super) fn take_prompts(
    fields: &mut Fields<'_>,
    limits: PromptLimits,
) -> Result<Vec<Prompt>, ApiError> {
    let mut too_many = None;
    let reader = Reader {
        limits,
        too_many: &mut too_many,
    };
    let prompts = fields.require_with("prompt", reader)?;
    let PromptLimits {
        max_prompts,
        max_tokens,
    } = limits;
    match (prompts, too_many) {
        (Ok(prompts), _) if prompts.is_empty() => Err(ApiError::field(
            "prompt",
            format!("0 prompts; 1 to {max_prompts} are allowed in one call"),
        )),
        (Ok(prompts), _) => Ok(prompts),
        (Err(_), Some(TooMany::Prompts)) => Err(ApiError::field(
            "prompt",
            format!("more than {max_prompts} prompts; 1 to {max_prompts} are allowed in one call"),
        )),
        (Err(_), Some(TooMany::Tokens)) => Err(ApiError::prompt_too_long(
            "prompt",
            format!("more than {max_tokens} tokens"),
            max_tokens,
        )),
        (Err(_), None) => Err(ApiError::field(
            "prompt",
            "expected a string, a list of strings, a list of token ids, or a list of such lists",
        )),
    }
}

/// Why reading stopped.
#[derive(Clone, Copy, Debug)]
enum TooMany {
    Prompts,
    Tokens,
}

struct Reader<'a> {
    limits: PromptLimits,
    too_many: &'a mut Option<TooMany>,
}

impl Reader<'_> {
    fn stop<E: Error>(&mut self, why: TooMany) -> E {
        *self.too_many = Some(why);
        E::custom("too many")
    }
}

impl<'de> DeserializeSeed<'de> for Reader<'_> {
    type Value = Vec<Prompt>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Vec<Prompt>, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Reader<'_> {
    type Value = Vec<Prompt>;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a prompt or a list of prompts")
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Vec<Prompt>, E> {
        Ok(vec![Prompt::Text(text.to_owned())])
    }

    fn visit_seq<A: SeqAccess<'de>>(mut self, mut list: A) -> Result<Vec<Prompt>, A::Error> {
        let (mut prompts, mut ids) = (Vec::new(), Vec::new());
        loop {
            let element = Element {
                reader: Reader {
                    limits: self.limits,
                    too_many: self.too_many,
                },
            };
            match list.next_element_seed(element)? {
                None => break,
                Some(Item::Id(id)) if prompts.is_empty() => {
                    if ids.len() == self.limits.max_tokens as usize {
                        return Err(self.stop(TooMany::Tokens));
                    }
                    ids.push(id);
                }
                Some(Item::Prompt(prompt)) if ids.is_empty() => {
                    if prompts.len() == self.limits.max_prompts {
                        return Err(self.stop(TooMany::Prompts));
                    }
                    prompts.push(prompt);
                }
                Some(_) => return Err(A::Error::custom("ids and prompts are mixed")),
            }
            // A list has one kind of prompts.
            if let [Prompt::Text(_), .., Prompt::Ids(_)] | [Prompt::Ids(_), .., Prompt::Text(_)] =
                prompts.as_slice()
            {
                return Err(A::Error::custom("texts and ids are mixed"));
            }
        }
        if !ids.is_empty() {
            prompts.push(Prompt::Ids(ids));
        }
        Ok(prompts)
    }
}

/// An element of the outer list.
enum Item {
    Id(u32),
    Prompt(Prompt),
}

struct Element<'a> {
    reader: Reader<'a>,
}

impl<'de> DeserializeSeed<'de> for Element<'_> {
    type Value = Item;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Item, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Element<'_> {
    type Value = Item;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a token id, a text or a list of token ids")
    }

    fn visit_u64<E: Error>(self, id: u64) -> Result<Item, E> {
        u32::try_from(id).map(Item::Id).map_err(E::custom)
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Item, E> {
        Ok(Item::Prompt(Prompt::Text(text.to_owned())))
    }

    fn visit_seq<A: SeqAccess<'de>>(mut self, mut list: A) -> Result<Item, A::Error> {
        let mut ids = Vec::new();
        while let Some(id) = list.next_element()? {
            if ids.len() == self.reader.limits.max_tokens as usize {
                return Err(self.reader.stop(TooMany::Tokens));
            }
            ids.push(id);
        }
        Ok(Item::Prompt(Prompt::Ids(ids)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn take(prompt: &serde_json::Value) -> Result<Vec<Prompt>, String> {
        let body = json!({ "prompt": prompt }).to_string();
        let limits = PromptLimits {
            max_prompts: 3,
            max_tokens: 4,
        };
        let mut fields = Fields::parse(body.as_bytes()).unwrap();
        take_prompts(&mut fields, limits).map_err(|e| e.message)
    }

    #[test]
    fn every_form_of_a_prompt_is_read() {
        let text = |text: &str| Prompt::Text(text.to_owned());
        let ids = |ids: &[u32]| Prompt::Ids(ids.to_vec());
        for (prompt, want) in [
            (json!("a"), vec![text("a")]),
            (json!(""), vec![text("")]),
            (json!(["a", "b\n"]), vec![text("a"), text("b\n")]),
            (json!([1, 2, 3, 4]), vec![ids(&[1, 2, 3, 4])]),
            (
                json!([[1], [2, 3], []]),
                vec![ids(&[1]), ids(&[2, 3]), ids(&[])],
            ),
        ] {
            assert_eq!(take(&prompt), Ok(want), "{prompt}");
        }
    }

    #[test]
    fn too_much_and_too_strange_are_told_apart() {
        let form = "prompt: expected a string, a list of strings, a list of token ids, or a list of such lists";
        for (prompt, want) in [
            (
                json!([]),
                "prompt: 0 prompts; 1 to 3 are allowed in one call",
            ),
            (
                json!(["a", "b", "c", "d"]),
                "prompt: more than 3 prompts; 1 to 3 are allowed in one call",
            ),
            (
                json!([[1], [1], [1], [1]]),
                "prompt: more than 3 prompts; 1 to 3 are allowed in one call",
            ),
            (
                json!([1, 2, 3, 4, 5]),
                "prompt: the prompt is too long: it has more than 4 tokens, this model's maximum context length is 4 tokens, the answer's included; shorten it",
            ),
            (
                json!([[1], [1, 2, 3, 4, 5]]),
                "prompt: the prompt is too long: it has more than 4 tokens, this model's maximum context length is 4 tokens, the answer's included; shorten it",
            ),
            (json!({"a": 1}), form),
            (json!(3), form),
            (json!([1, "a"]), form),
            (json!(["a", [1]]), form),
            (json!([[1], 2]), form),
            (json!([-1]), form),
            (json!([1.5]), form),
            (json!([4_294_967_296_u64]), form),
            (json!([[["a"]]]), form),
            (json!(null), "prompt: missing; the field is required"),
        ] {
            assert_eq!(take(&prompt).unwrap_err(), want, "{prompt}");
        }
    }
}
