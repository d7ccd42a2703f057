//! Reads a request's JSON object field by field, so that every mistake names its field.
//!
//! A field that is `null` counts as not given. A field that nobody has taken at the end is refused by name, because
//! it might have changed the answer. It knows JSON, and no field's meaning.

use std::collections::BTreeMap;

use serde::de::DeserializeOwned;
use serde_json::value::RawValue;

use super::error::ApiError;

/// The fields that are not taken yet.
#[derive(Debug)]
pub(super) struct Fields(BTreeMap<String, Box<RawValue>>);

impl Fields {
    /// Splits an object into its fields.
    pub(super) fn parse(body: &[u8]) -> Result<Self, ApiError> {
        serde_json::from_slice(body).map(Self).map_err(|e| {
            ApiError::new(
                axum::http::StatusCode::BAD_REQUEST,
                format!("the body is not a JSON object: {e}"),
            )
        })
    }

    /// Takes a field, if given.
    pub(super) fn take<T: DeserializeOwned>(&mut self, name: &str) -> Result<Option<T>, ApiError> {
        match self.0.remove(name) {
            Some(raw) if raw.get() != "null" => serde_json::from_str(raw.get())
                .map(Some)
                .map_err(|e| ApiError::field(name, without_position(&e.to_string()))),
            _ => Ok(None),
        }
    }

    /// Takes a field that must be given.
    pub(super) fn require<T: DeserializeOwned>(&mut self, name: &str) -> Result<T, ApiError> {
        self.take(name)?
            .ok_or_else(|| ApiError::field(name, "missing; the field is required"))
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

    /// Drops a field whatever it says: it changes no answer.
    pub(super) fn ignore(&mut self, name: &str) {
        self.0.remove(name);
    }

    /// Drops a field that isn't built, where it says what happens anyway; otherwise refuses it by name.
    pub(super) fn neutral(&mut self, name: &str, neutral: &[&str]) -> Result<(), ApiError> {
        let Some(value) = self.take::<serde_json::Value>(name)? else {
            return Ok(());
        };
        let is_neutral = neutral.iter().any(|text| {
            serde_json::from_str::<serde_json::Value>(text).is_ok_and(|n| {
                match (n.as_f64(), value.as_f64()) {
                    (Some(a), Some(b)) => a == b,
                    _ => n == value,
                }
            })
        });
        match (is_neutral, neutral) {
            (true, _) => Ok(()),
            (false, []) => Err(ApiError::field(
                name,
                "not supported by this server; leave it out",
            )),
            (false, _) => {
                let allowed = neutral.join(" or ");
                Err(ApiError::field(
                    name,
                    format!("not supported by this server; leave it out or set it to {allowed}"),
                ))
            }
        }
    }

    /// Refuses what is left.
    pub(super) fn finish(self) -> Result<(), ApiError> {
        match self.0.into_keys().next() {
            None => Ok(()),
            Some(name) => Err(ApiError::field(name, "unknown field; leave it out")),
        }
    }
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
            br#"{"a": "x", "t": 3, "n": 2, "p": 0.0, "b": {}, "g": "re", "null": null, "u": 1}"#,
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
            message(fields.neutral("n", &["1"])),
            "n: not supported by this server; leave it out or set it to 1"
        );
        assert_eq!(
            message(fields.neutral("g", &[])),
            "g: not supported by this server; leave it out"
        );
        fields.neutral("p", &["0"]).unwrap();
        fields.neutral("b", &["{}"]).unwrap();
        assert_eq!(
            message(fields.require::<String>("null")),
            "null: missing; the field is required"
        );
        assert_eq!(message(fields.finish()), "u: unknown field; leave it out");
        assert!(message(Fields::parse(b"[1]")).starts_with("the body is not a JSON object: "));
    }
}
