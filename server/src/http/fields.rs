//! Reads a request's JSON object field by field, so that every mistake names its field.
//!
//! A field that is `null` counts as not given. A field that nobody has taken at the end is refused by name, because
//! it might have changed the answer, unless [`NO_EFFECT`] says that this value changes nothing. Memory is bounded: a
//! field's text is not copied, and how many values it has is counted before any is made.

use std::collections::BTreeMap;

use serde::de::{DeserializeOwned, DeserializeSeed, Error, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::value::RawValue;

use super::error::ApiError;

/// More fields than any interface has.
const MAX_FIELDS: usize = 256;

/// Values in one field at most, inner ones included; each takes about a hundred bytes.
const MAX_VALUES: usize = 1 << 16;

/// Who may send a field.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Interface {
    /// `/v1/completions`.
    Completions,
    /// `/v1/chat/completions`.
    Chat,
}

/// Which values of a field change nothing.
#[derive(Clone, Copy, Debug)]
enum NoEffect {
    /// All of them.
    Any,
    /// These, in JSON.
    Only(&'static [&'static str]),
}
use Interface::{Chat, Completions};
use NoEffect::{Any, Only};

/// Fields of OpenAI's and vLLM's interfaces that aren't built, and the values with which they change no answer.
/// Others are refused.
const NO_EFFECT: &[(&str, &[Interface], NoEffect)] = &[
    // Notes of the caller's.
    ("user", BOTH, Any),
    ("metadata", BOTH, Any),
    ("store", BOTH, Any),
    ("service_tier", BOTH, Any),
    ("safety_identifier", BOTH, Any),
    ("request_id", BOTH, Any),
    // Hints to the prefix cache.
    ("prompt_cache_key", BOTH, Any),
    ("prompt_cache_retention", BOTH, Any),
    ("include_reasoning", &[Completions], Any),
    // Sampling; of beams, where none are asked for.
    ("length_penalty", BOTH, Any),
    ("early_stopping", BOTH, Any),
    ("typical_p", BOTH, Only(&["1"])),
    ("logits_processors", BOTH, Only(&["[]"])),
    // Prompt and text.
    ("detokenize", BOTH, Only(&["true"])),
    // The decoders of the models that are served put no spaces there (ByteLevel, Metaspace).
    ("spaces_between_special_tokens", BOTH, Any),
    ("priority", BOTH, Only(&["0"])),
    ("guided_decoding_backend", BOTH, Any),
    ("guided_whitespace_pattern", BOTH, Any),
    ("kv_transfer_params", BOTH, Only(&["{}"])),
    ("vllm_xargs", BOTH, Only(&["{}"])),
    ("suffix", &[Completions], Only(&["\"\""])),
    ("functions", &[Chat], Only(&["[]"])),
    ("function_call", &[Chat], Only(&["\"none\"", "\"auto\""])),
    ("modalities", &[Chat], Only(&["[\"text\"]"])),
    ("audio", &[Chat], Only(&[])),
    ("prediction", &[Chat], Only(&[])),
    ("reasoning_effort", &[Chat], Only(&[])),
    ("verbosity", &[Chat], Only(&["\"medium\""])),
    ("web_search_options", &[Chat], Only(&[])),
    ("chat_template", &[Chat], Only(&[])),
    ("documents", &[Chat], Only(&["[]"])),
    ("mm_processor_kwargs", &[Chat], Only(&["{}"])),
    ("media_io_kwargs", &[Chat], Only(&["{}"])),
    ("echo", &[Chat], Only(&["false"])),
];
const BOTH: &[Interface] = &[Completions, Chat];

/// The fields that are not taken yet.
#[derive(Debug)]
pub(super) struct Fields<'a>(BTreeMap<String, &'a RawValue>);

impl<'a> Fields<'a> {
    /// Splits an object into its fields.
    pub(super) fn parse(body: &'a [u8]) -> Result<Self, ApiError> {
        serde_json::from_slice(body).map_err(|e| {
            ApiError::new(
                axum::http::StatusCode::BAD_REQUEST,
                format!("the body is not a JSON object: {e}"),
            )
        })
    }

    /// Takes a field, if given.
    pub(super) fn take<T: DeserializeOwned>(&mut self, name: &str) -> Result<Option<T>, ApiError> {
        let Some(raw) = self.take_raw(name) else {
            return Ok(None);
        };
        if n_values(raw.get()) > MAX_VALUES {
            let message = format!("more than {MAX_VALUES} values");
            return Err(ApiError::field(name, message));
        }
        serde_json::from_str(raw.get())
            .map(Some)
            .map_err(|e| ApiError::field(name, without_position(&e.to_string())))
    }

    /// A field that is to be taken later is given, and is none of these short values in JSON.
    pub(super) fn is_other_than(&self, name: &str, values: &[&str]) -> bool {
        const LONGEST: usize = 64;
        let Some(raw) = self.0.get(name).map(|raw| raw.get()) else {
            return false;
        };
        let parsed = |raw| serde_json::from_str::<serde_json::Value>(raw).unwrap_or_default();
        raw != "null"
            && (raw.len() > LONGEST || !values.iter().any(|value| equals(&parsed(raw), value)))
    }

    /// Takes a field that must be given.
    pub(super) fn require<T: DeserializeOwned>(&mut self, name: &str) -> Result<T, ApiError> {
        self.take(name)?.ok_or_else(|| missing(name))
    }

    /// Takes a field that must be given and whose reader bounds its size itself.
    pub(super) fn require_with<S: DeserializeSeed<'a>>(
        &mut self,
        name: &str,
        seed: S,
    ) -> Result<Result<S::Value, serde_json::Error>, ApiError> {
        let raw = self.take_raw(name).ok_or_else(|| missing(name))?;
        Ok(seed.deserialize(&mut serde_json::Deserializer::from_str(raw.get())))
    }

    /// Takes a field that is `null` in so many words.
    pub(super) fn take_null(&mut self, name: &str) -> bool {
        let is_null = self.0.get(name).is_some_and(|raw| raw.get() == "null");
        if is_null {
            self.0.remove(name);
        }
        is_null
    }

    /// Bytes of a field as it was sent.
    pub(super) fn n_bytes(&self, name: &str) -> usize {
        self.0.get(name).map_or(0, |raw| raw.get().len())
    }

    /// Takes a number and checks its range.
    pub(super) fn number(
        &mut self,
        name: &str,
        low: f64,
        high: f64,
    ) -> Result<Option<f32>, ApiError> {
        match self.take::<f64>(name)? {
            None => Ok(None),
            Some(n) if (low..=high).contains(&n) => Ok(Some(n as f32)),
            Some(n) if high.is_infinite() => {
                Err(ApiError::field(name, format!("{n} is below {low}")))
            }
            Some(n) => Err(ApiError::field(
                name,
                format!("{n} is not between {low} and {high}"),
            )),
        }
    }

    /// Refuses what is left, unless it is known to change nothing.
    pub(super) fn finish(mut self, interface: Interface) -> Result<(), ApiError> {
        for (name, interfaces, no_effect) in NO_EFFECT {
            if !interfaces.contains(&interface) {
                continue;
            }
            match no_effect {
                Any => drop(self.take_raw(name)),
                Only(values) => self.take_without_effect(name, values)?,
            }
        }
        self.finish_all()
    }

    /// Refuses what is left.
    pub(super) fn finish_all(self) -> Result<(), ApiError> {
        match self.0.into_keys().next() {
            None => Ok(()),
            Some(name) => Err(ApiError::field(name, "unknown field; leave it out")),
        }
    }

    fn take_raw(&mut self, name: &str) -> Option<&'a RawValue> {
        self.0.remove(name).filter(|raw| raw.get() != "null")
    }

    fn take_without_effect(&mut self, name: &str, values: &[&str]) -> Result<(), ApiError> {
        let Some(value) = self.take::<serde_json::Value>(name)? else {
            return Ok(());
        };
        match values {
            _ if values.iter().any(|text| equals(&value, text)) => Ok(()),
            [] => Err(ApiError::field(
                name,
                "not supported by this server; leave it out",
            )),
            _ => {
                let allowed = values.join(" or ");
                Err(ApiError::field(
                    name,
                    format!("not supported by this server; leave it out or set it to {allowed}"),
                ))
            }
        }
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for Fields<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Object;

        impl<'de> Visitor<'de> for Object {
            type Value = BTreeMap<String, &'de RawValue>;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a map")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut fields = BTreeMap::new();
                while let Some((name, value)) = map.next_entry()? {
                    fields.insert(name, value);
                    if fields.len() > MAX_FIELDS {
                        return Err(A::Error::custom(format!("more than {MAX_FIELDS} fields")));
                    }
                }
                Ok(fields)
            }
        }

        deserializer.deserialize_map(Object).map(Self)
    }
}

fn missing(name: &str) -> ApiError {
    ApiError::field(name, "missing; the field is required")
}

/// The value is the one that `text` writes in JSON; numbers are equal whatever their form.
fn equals(value: &serde_json::Value, text: &str) -> bool {
    serde_json::from_str::<serde_json::Value>(text).is_ok_and(|other| {
        match (other.as_f64(), value.as_f64()) {
            (Some(a), Some(b)) => a == b,
            _ => other == *value,
        }
    })
}

/// How many values a JSON text has, at most.
fn n_values(json: &str) -> usize {
    let (mut n, mut in_string, mut escaped) = (1, false, false);
    for byte in json.bytes() {
        match byte {
            _ if escaped => escaped = false,
            b'\\' => escaped = in_string,
            b'"' => in_string = !in_string,
            b',' | b'[' | b'{' if !in_string => n += 1,
            _ => {}
        }
    }
    n
}

/// The place inside a field's text means nothing to the client.
fn without_position(message: &str) -> &str {
    message
        .rfind(" at line ")
        .map_or(message, |at| &message[..at])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message<T: std::fmt::Debug>(result: Result<T, ApiError>) -> String {
        result.unwrap_err().message
    }

    #[test]
    fn every_mistake_names_its_field() {
        let mut fields = Fields::parse(
            br#"{"a": "x", "t": 3, "null": null, "other": null, "many": [0], "u": 1}"#,
        )
        .unwrap();
        assert_eq!(
            message(fields.take::<f32>("a")),
            "a: invalid type: string \"x\", expected f32"
        );
        assert_eq!(
            message(fields.number("t", 0.0, 2.0)),
            "t: 3 is not between 0 and 2"
        );
        assert_eq!(
            message(fields.require::<String>("null")),
            "null: missing; the field is required"
        );
        assert!(fields.take_null("other") && !fields.take_null("u") && !fields.take_null("none"));
        fields.take::<Vec<u32>>("many").unwrap();
        assert_eq!(
            message(fields.finish(Chat)),
            "u: unknown field; leave it out"
        );
        assert!(message(Fields::parse(b"[1]")).starts_with("the body is not a JSON object: "));
    }

    #[test]
    fn what_a_body_may_hold_is_bounded() {
        let body = format!("{{\"a\": [{}0]}}", "0,".repeat(MAX_VALUES));
        let mut fields = Fields::parse(body.as_bytes()).unwrap();
        assert_eq!(
            message(fields.take::<Vec<u8>>("a")),
            "a: more than 65536 values"
        );
        let fields: Vec<String> = (0..=MAX_FIELDS).map(|i| format!("\"{i}\": 0")).collect();
        let body = format!("{{{}}}", fields.join(","));
        assert!(message(Fields::parse(body.as_bytes())).contains("more than 256 fields"));
        for (json, n) in [
            ("3", 1),
            (r#""a,b[\",{""#, 1),
            ("[1, 2]", 3),
            (r#"{"a": ["\\", {}]}"#, 5),
        ] {
            assert_eq!(n_values(json), n, "{json}");
        }
    }

    #[test]
    fn a_value_that_changes_nothing_is_accepted_and_no_other() {
        for (field, values, refused) in [
            (
                "prompt_cache_retention",
                &["\"24h\"", "null"] as &[&str],
                &[] as &[&str],
            ),
            ("user", &["\"me\""], &[]),
            ("metadata", &[r#"{"a": "b"}"#], &[]),
            ("store", &["false", "true"], &[]),
            ("service_tier", &["\"auto\""], &[]),
            ("length_penalty", &["2"], &[]),
            ("typical_p", &["1", "1.0"], &["0.9"]),
            ("spaces_between_special_tokens", &["true", "false"], &[]),
            ("modalities", &[r#"["text"]"#], &[r#"["text", "audio"]"#]),
            ("verbosity", &["\"medium\""], &["\"low\""]),
            ("echo", &["false"], &["true"]),
        ] {
            let finish = |value: &str| {
                let body = format!("{{\"{field}\": {value}}}");
                Fields::parse(body.as_bytes()).unwrap().finish(Chat)
            };
            for value in values {
                assert_eq!(finish(value), Ok(()), "{field}: {value}");
            }
            for value in refused {
                let error = finish(value).unwrap_err();
                assert_eq!(error.param.as_deref(), Some(field), "{value}");
                assert!(
                    error.message.contains("not supported by this server"),
                    "{field}: {value}: {}",
                    error.message
                );
            }
        }
        let fields = Fields::parse(br#"{"documents": []}"#).unwrap();
        assert_eq!(
            message(fields.finish(Completions)),
            "documents: unknown field; leave it out"
        );
    }
}
