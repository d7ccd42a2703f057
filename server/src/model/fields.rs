//! A JSON object of a model directory, read field by field: each mistake is one sentence that names file and field.
//!
//! It knows no architecture.

use std::num::NonZeroU32;

use kvasir_kernels::stored::Dtype;
use serde_json::{Map, Value};

use super::LoadError;

/// The largest size that a field may have: sizes below it multiply without overflow.
const MAX_SIZE: u64 = 1 << 24;

/// An object, and where it stands: a file, or a field of one.
#[derive(Clone, Debug)]
pub struct Fields {
    file: &'static str,
    /// `rope_scaling.` and the like, before the names of fields in messages.
    path: String,
    map: Map<String, Value>,
}

impl Fields {
    /// Parses a file.
    pub fn parse(file: &'static str, bytes: &[u8]) -> Result<Self, LoadError> {
        match serde_json::from_slice(bytes) {
            Ok(Value::Object(map)) => Ok(Self {
                file,
                path: String::new(),
                map,
            }),
            Ok(other) => Err(wrong(
                file,
                format!("found {}, expected a JSON object", kind(&other)),
            )),
            Err(error) => Err(wrong(file, format!("not valid JSON: {error}"))),
        }
    }

    /// A mistake in this object.
    pub fn wrong(&self, message: impl AsRef<str>) -> LoadError {
        wrong(self.file, format!("{}{}", self.path, message.as_ref()))
    }

    /// A field that has another value than those that are built.
    pub fn unexpected(&self, name: &str, expected: &str) -> LoadError {
        let found = self.get(name).map_or("missing".to_owned(), brief);
        self.wrong(format!("{name} is {found}, expected {expected}"))
    }

    /// The field, where it is present and not null.
    pub fn get(&self, name: &str) -> Option<&Value> {
        self.map.get(name).filter(|value| !value.is_null())
    }

    /// The field is present, if only as null.
    pub fn has(&self, name: &str) -> bool {
        self.map.contains_key(name)
    }

    /// The names of all fields.
    pub fn names(&self) -> Vec<&str> {
        self.map.keys().map(String::as_str).collect()
    }

    /// An object in this one.
    pub fn object(&self, name: &str) -> Result<Option<Self>, LoadError> {
        match self.get(name) {
            None => Ok(None),
            Some(Value::Object(map)) => Ok(Some(Self {
                file: self.file,
                path: format!("{}{name}.", self.path),
                map: map.clone(),
            })),
            Some(_) => Err(self.unexpected(name, "an object")),
        }
    }

    /// The object `name` with the fields of this one that it lacks: how a larger model keeps its decoder's fields.
    pub fn nested(&self, name: &str) -> Result<Self, LoadError> {
        let mut nested = self
            .object(name)?
            .ok_or_else(|| self.unexpected(name, "an object"))?;
        for (key, value) in &self.map {
            if nested.get(key).is_none() {
                nested.map.insert(key.clone(), value.clone());
            }
        }
        Ok(nested)
    }

    /// A size of at least 1.
    pub fn size(&self, name: &str, default: Option<usize>) -> Result<usize, LoadError> {
        match (self.get(name), default) {
            (None, Some(default)) => Ok(default),
            (None, None) => Err(self.wrong(format!("{name} is missing"))),
            (Some(value), _) => match value.as_u64() {
                Some(n) if (1..=MAX_SIZE).contains(&n) => Ok(n as usize),
                _ => Err(self.unexpected(name, &format!("a whole number from 1 to {MAX_SIZE}"))),
            },
        }
    }

    /// A size that may be absent.
    pub fn optional_size(&self, name: &str) -> Result<Option<NonZeroU32>, LoadError> {
        match self.get(name) {
            None => Ok(None),
            Some(_) => Ok(NonZeroU32::new(self.size(name, None)? as u32)),
        }
    }

    /// A number.
    pub fn number(&self, name: &str, default: Option<f64>) -> Result<f64, LoadError> {
        match (self.get(name), default) {
            (None, Some(default)) => Ok(default),
            (None, None) => Err(self.wrong(format!("{name} is missing"))),
            (Some(value), _) => value
                .as_f64()
                .ok_or_else(|| self.unexpected(name, "a number")),
        }
    }

    /// A number above 0.
    pub fn positive(&self, name: &str, default: Option<f64>) -> Result<f64, LoadError> {
        match self.number(name, default)? {
            n if n.is_finite() && n > 0.0 => Ok(n),
            _ => Err(self.unexpected(name, "more than 0")),
        }
    }

    /// Numbers above 0.
    pub fn positive_list(&self, name: &str, n: usize) -> Result<Vec<f64>, LoadError> {
        let list = self.get(name).and_then(Value::as_array);
        let numbers: Option<Vec<f64>> = list.and_then(|list| {
            let numbers = list.iter().map(Value::as_f64);
            numbers
                .map(|x| x.filter(|x| x.is_finite() && *x > 0.0))
                .collect()
        });
        match numbers {
            Some(numbers) if numbers.len() == n => Ok(numbers),
            _ => Err(self.unexpected(name, &format!("{n} numbers above 0"))),
        }
    }

    /// A flag; absent is `default`.
    pub fn flag(&self, name: &str, default: bool) -> Result<bool, LoadError> {
        match self.get(name) {
            None => Ok(default),
            Some(Value::Bool(flag)) => Ok(*flag),
            Some(_) => Err(self.unexpected(name, "true or false")),
        }
    }

    /// A string, where there is one.
    pub fn text(&self, name: &str) -> Result<Option<&str>, LoadError> {
        match self.get(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(_) => Err(self.unexpected(name, "a string")),
        }
    }

    /// The strings of a list, where there is one.
    pub fn texts(&self, name: &str) -> Result<Option<Vec<&str>>, LoadError> {
        let Some(value) = self.get(name) else {
            return Ok(None);
        };
        let texts = value
            .as_array()
            .and_then(|list| list.iter().map(Value::as_str).collect());
        match texts {
            Some(texts) => Ok(Some(texts)),
            None => Err(self.unexpected(name, "a list of strings")),
        }
    }

    /// A token id or a list of them. `None` where the field is absent.
    pub fn tokens(&self, name: &str, vocab_size: usize) -> Result<Option<Vec<u32>>, LoadError> {
        let id = |value: &Value| match value.as_u64() {
            Some(id) if id < vocab_size as u64 => Ok(id as u32),
            _ => Err(self.wrong(format!(
                "{name} holds {}, expected token ids below vocab_size, {vocab_size}",
                brief(value)
            ))),
        };
        match self.get(name) {
            None => Ok(None),
            Some(Value::Array(list)) => list.iter().map(id).collect::<Result<_, _>>().map(Some),
            Some(value) => Ok(Some(vec![id(value)?])),
        }
    }

    /// The dtype that the author names, where one is named.
    pub fn dtype(&self) -> Result<Option<Dtype>, LoadError> {
        let name = if self.get("dtype").is_some() {
            "dtype"
        } else {
            "torch_dtype"
        };
        match self.get(name).map(|value| value.as_str()) {
            None => Ok(None),
            Some(Some("bfloat16")) => Ok(Some(Dtype::BF16)),
            Some(Some("float16")) => Ok(Some(Dtype::F16)),
            Some(Some("float32")) => Ok(Some(Dtype::F32)),
            Some(_) => Err(self.unexpected(name, "bfloat16, float16 or float32")),
        }
    }

    /// Refuses a field that would change the answer and is not built, unless it is absent or as good as absent.
    pub fn refuse(&self, name: &str, harmless: &[Value]) -> Result<(), LoadError> {
        match self.get(name) {
            Some(value) if !harmless.contains(value) => Err(self.unexpected(name, "none")),
            _ => Ok(()),
        }
    }
}

fn wrong(file: &str, message: String) -> LoadError {
    LoadError::Config {
        file: file.to_owned(),
        message,
    }
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

/// A value as it stands in the file, cut where it is long.
fn brief(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(80) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}
