//! `<tool_call><function=f><parameter=a>1</parameter></function></tool_call>`: Qwen3-Coder. A value shows no type: it is what the
//! tool's schema says.

use std::sync::Arc;

use serde_json::Value;

use super::pythonic::json_of;
use super::text::{Found, Text};
use super::{ParameterTypes, ToolCallParser, ToolEvent};

const OPEN: &str = "<tool_call>";
const CLOSE: &str = "</tool_call>";
const FUNCTION: &str = "<function=";
const FUNCTION_CLOSE: &str = "</function>";
const PARAMETER: &str = "<parameter=";
const PARAMETER_CLOSE: &str = "</parameter>";

#[derive(Debug)]
pub(super) struct Xml {
    text: Text,
    types: Arc<ParameterTypes>,
    state: State,
}

#[derive(Debug)]
enum State {
    Text,
    /// Behind the opening tag; this was read and says nothing yet.
    Open {
        before: String,
    },
    /// In a function, whose parameters so far are given out.
    Function {
        name: String,
        n: usize,
    },
    /// Behind a function.
    Behind,
}

impl Xml {
    pub(super) fn new(types: Arc<ParameterTypes>) -> Self {
        Self {
            text: Text::default(),
            types,
            state: State::Text,
        }
    }

    /// False where more text is needed.
    fn step(&mut self, out: &mut Vec<ToolEvent>) -> bool {
        match &self.state {
            State::Text => {
                let found = self.text.pass_to(OPEN, out);
                if found {
                    let before = OPEN.to_owned();
                    self.state = State::Open { before };
                }
                found
            }
            State::Open { before } => {
                let before = before.clone() + &self.text.take(self.text.peek().n_blank);
                match self.text.begins(FUNCTION) {
                    Found::No => {
                        self.text.content(&before, out);
                        self.state = State::Text;
                        true
                    }
                    Found::Maybe => {
                        self.state = State::Open { before };
                        false
                    }
                    Found::Here => {
                        self.state = State::Open { before };
                        self.begin(out)
                    }
                }
            }
            State::Function { name, n } => {
                let (name, n) = (name.clone(), *n);
                self.function(name, n, out)
            }
            State::Behind => {
                if !self.text.skip_blanks() {
                    return false;
                }
                match (self.text.begins(CLOSE), self.text.begins(FUNCTION)) {
                    (Found::Here, _) => {
                        self.text.take(CLOSE.len());
                        self.state = State::Text;
                    }
                    (_, Found::Here) => {
                        let before = String::new();
                        self.state = State::Open { before };
                    }
                    (Found::Maybe, _) | (_, Found::Maybe) => return false,
                    (Found::No, Found::No) => self.state = State::Text,
                }
                true
            }
        }
    }

    /// At a function's tag.
    fn begin(&mut self, out: &mut Vec<ToolEvent>) -> bool {
        let Some(end) = self.text.rest().find('>') else {
            return false;
        };
        let name = self.text.rest()[FUNCTION.len()..end].trim().to_owned();
        self.text.take(end + 1);
        out.push(ToolEvent::Call { name: name.clone() });
        self.text.see(&out[out.len() - 1..]);
        self.state = State::Function { name, n: 0 };
        true
    }

    /// In function `name`, behind its first `n` parameters.
    fn function(&mut self, name: String, n: usize, out: &mut Vec<ToolEvent>) -> bool {
        if !self.text.skip_blanks() {
            return false;
        }
        match (
            self.text.begins(FUNCTION_CLOSE),
            self.text.begins(PARAMETER),
        ) {
            (Found::Here, _) => {
                self.text.take(FUNCTION_CLOSE.len());
                let close = if n == 0 { "{}" } else { "}" };
                out.push(ToolEvent::Arguments(close.into()));
                self.state = State::Behind;
                true
            }
            (_, Found::Here) => {
                let Some((key, value, n_bytes)) = parameter(self.text.rest()) else {
                    return false;
                };
                let value = self.typed(&name, key, value);
                let open = if n == 0 { "{" } else { ", " };
                let text = format!("{open}{}: {value}", Value::from(key));
                out.push(ToolEvent::Arguments(text));
                self.text.take(n_bytes);
                self.state = State::Function { name, n: n + 1 };
                true
            }
            (Found::Maybe, _) | (_, Found::Maybe) => false,
            (Found::No, Found::No) => {
                self.state = State::Text;
                true
            }
        }
    }

    /// A value in JSON.
    fn typed(&self, function: &str, key: &str, text: &str) -> String {
        let types = self.types.get(function);
        let kind = types.and_then(|types| types.get(key)).map(String::as_str);
        // A line's break on either side belongs to the format.
        let text = text.strip_prefix('\n').unwrap_or(text);
        let text = text.strip_suffix('\n').unwrap_or(text);
        if kind == Some("string") {
            return Value::from(text).to_string();
        }
        let trimmed = text.trim();
        match serde_json::from_str::<Value>(trimmed) {
            Ok(_) => trimmed.to_owned(),
            Err(_) if kind.is_some() => json_of(trimmed).to_string(),
            Err(_) => Value::from(text).to_string(),
        }
    }
}

/// The first parameter of a text: name, value, and bytes of both with their tags. `None` where its end hasn't come.
fn parameter(text: &str) -> Option<(&str, &str, usize)> {
    let name_end = text.find('>')?;
    let value_at = name_end + 1;
    let end = value_at + text[value_at..].find(PARAMETER_CLOSE)?;
    let name = text[PARAMETER.len()..name_end].trim();
    Some((name, &text[value_at..end], end + PARAMETER_CLOSE.len()))
}

impl ToolCallParser for Xml {
    fn push(&mut self, piece: &str, out: &mut Vec<ToolEvent>) {
        self.text.push(piece);
        while self.step(out) {}
    }

    fn finish(&mut self, out: &mut Vec<ToolEvent>) {
        if let State::Open { before } = std::mem::replace(&mut self.state, State::Text) {
            self.text.content(&before, out);
        }
        self.text.finish(out);
    }
}
