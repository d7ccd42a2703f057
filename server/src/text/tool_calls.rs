//! Tool calls in a model's own words: which format a model writes them in, and parsers that take its text piece by piece.
//!
//! What a parser gives is the same however the text was cut. What is no call, or begins as one and isn't, comes as content:
//! no text is lost, but for blanks around calls. It knows text only, and of the tools no more than how their arguments are
//! typed.
//!
//! - [`json_call`]: a call as a JSON object. `json_array`, `json_tags`, `llama_json`: how formats set such calls apart.
//! - [`pythonic`], [`xml`]: calls that are not JSON.

mod json_array;
mod json_call;
mod json_tags;
mod llama_json;
mod pythonic;
mod text;
mod xml;

#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::sync::Arc;

/// A part of an answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ToolEvent {
    /// Text beside calls.
    Content(String),
    /// A call begins.
    Call {
        /// The function's name.
        name: String,
    },
    /// The call that began last has these further characters of its arguments, a JSON object.
    Arguments(String),
}

/// Takes one answer.
pub trait ToolCallParser: Send + std::fmt::Debug {
    /// The next piece of text; what is decided is appended to `out`.
    fn push(&mut self, piece: &str, out: &mut Vec<ToolEvent>);
    /// The text has ended.
    fn finish(&mut self, out: &mut Vec<ToolEvent>);
}

/// For each function, its parameters' JSON types; for formats in which a value doesn't show its own.
pub type ParameterTypes = HashMap<String, HashMap<String, String>>;

/// How a model writes calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ToolCallFormat {
    /// `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`: Hermes, Qwen 2.5 and 3.
    Hermes,
    /// `{"name": ..., "parameters": {...}}`, behind `<|python_tag|>` or not: Llama 3.1 and later.
    Llama3Json,
    /// `[f(a=1), g()]`: Llama 3.2 and 4, and others.
    Pythonic,
    /// `[TOOL_CALLS][{"name": ..., "arguments": {...}}]`, or `[TOOL_CALLS]f[ARGS]{...}`.
    Mistral,
    /// `<|tool_call|>[{"name": ..., "arguments": {...}}]<|/tool_call|>`.
    Phi4Mini,
    /// `<tool_call><function=f><parameter=a>1</parameter></function></tool_call>`.
    Qwen3Coder,
    /// `[{"name": ..., "parameters": {...}}]`: for a model without a format of its own, which is held to this one.
    Json,
}

impl ToolCallFormat {
    /// By what the chat template contains; `None` where it shows no format.
    pub fn of_template(template: &str) -> Option<Self> {
        let has = |part: &str| template.contains(part);
        match () {
            () if has("[TOOL_CALLS]") => Some(Self::Mistral),
            () if has("<function=") && has("<parameter=") => Some(Self::Qwen3Coder),
            () if has("<tool_call>") => Some(Self::Hermes),
            () if has("<|tool_call|>") => Some(Self::Phi4Mini),
            () if has("[func_name1(") || has("<|python_start|>") => Some(Self::Pythonic),
            () if has("<|python_tag|>") || (has("\"parameters\": ") && has("ipython")) => {
                Some(Self::Llama3Json)
            }
            () => None,
        }
    }

    /// What begins a call, where that is a mark that may be a token without text.
    pub fn mark(self) -> Option<&'static str> {
        match self {
            Self::Hermes | Self::Qwen3Coder => Some("<tool_call>"),
            Self::Llama3Json => Some("<|python_tag|>"),
            Self::Mistral => Some("[TOOL_CALLS]"),
            Self::Phi4Mini => Some("<|tool_call|>"),
            Self::Pythonic | Self::Json => None,
        }
    }

    /// What ends a call, where that is a mark too.
    pub fn close(self) -> Option<&'static str> {
        match self {
            Self::Hermes | Self::Qwen3Coder => Some("</tool_call>"),
            Self::Phi4Mini => Some("<|/tool_call|>"),
            Self::Llama3Json | Self::Mistral | Self::Pythonic | Self::Json => None,
        }
    }

    /// A parser for one answer.
    pub fn parser(self, types: &Arc<ParameterTypes>) -> Box<dyn ToolCallParser> {
        match self {
            Self::Hermes => Box::new(json_tags::JsonTags::new()),
            Self::Llama3Json => Box::new(llama_json::LlamaJson::new()),
            Self::Pythonic => Box::new(pythonic::Pythonic::new()),
            Self::Mistral => Box::new(json_array::JsonArray::marked("[TOOL_CALLS]", "")),
            Self::Phi4Mini => Box::new(json_array::JsonArray::marked(
                "<|tool_call|>",
                "<|/tool_call|>",
            )),
            Self::Qwen3Coder => Box::new(xml::Xml::new(Arc::clone(types))),
            Self::Json => Box::new(json_array::JsonArray::unmarked()),
        }
    }
}
