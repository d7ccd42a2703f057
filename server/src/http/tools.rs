//! The tools that a model may call: what a request says of them, the grammar that holds the model to them, and the calls of one
//! answer as they go out.

use std::collections::HashMap;
use std::sync::Arc;

use minijinja::Value as TemplateValue;
use serde::Deserialize;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::error::ApiError;
use super::fields::Fields;
use super::structured::refusal;
use crate::grammar::lark::{self, Tag, Trigger};
use crate::grammar::{Grammar, GrammarError};
use crate::text::Vocabulary;
use crate::text::tool_calls::{ParameterTypes, ToolCallFormat};

/// As in OpenAI's interface.
const MAX_TOOLS: usize = 128;

/// Calls at once at most, where the answer has to be calls.
const MAX_CALLS: usize = 32;

/// What a request says of tools; none of it where it has no `tools`.
#[derive(Clone, Debug, Default)]
pub(super) struct Tools {
    functions: Vec<Function>,
    /// As they were sent, and their bytes.
    sent: (TemplateValue, usize),
    pub(super) choice: ToolChoice,
    /// More than one call in an answer.
    pub(super) parallel: bool,
}

#[derive(Clone, Debug)]
struct Function {
    name: String,
    parameters: Value,
    strict: bool,
}

/// Whether the model calls.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum ToolChoice {
    #[default]
    None,
    Auto,
    Required,
    /// The function with this index.
    Named(usize),
}

#[derive(Deserialize)]
struct SentTool {
    r#type: String,
    function: SentFunction,
}

#[derive(Deserialize)]
struct SentFunction {
    name: String,
    #[serde(default)]
    parameters: Option<Value>,
    #[serde(default)]
    strict: Option<bool>,
}

impl Tools {
    /// Takes `tools`, `tool_choice` and `parallel_tool_calls`.
    pub(super) fn take(fields: &mut Fields<'_>) -> Result<Self, ApiError> {
        let n_bytes = fields.n_bytes("tools");
        let sent: Vec<Value> = fields.take("tools")?.unwrap_or_default();
        if sent.len() > MAX_TOOLS {
            let why = format!("{} tools, at most {MAX_TOOLS} are allowed", sent.len());
            return Err(ApiError::field("tools", why));
        }
        let mut functions: Vec<Function> = Vec::with_capacity(sent.len());
        for (i, tool) in sent.iter().enumerate() {
            let function = Function::parse(i, tool)?;
            if functions.iter().any(|other| other.name == function.name) {
                let why = format!("{:?} is the name of another tool", function.name);
                return Err(ApiError::field(format!("tools[{i}].function.name"), why));
            }
            functions.push(function);
        }
        let choice = take_choice(fields, &functions)?;
        let parallel = fields.take("parallel_tool_calls")?.unwrap_or(true);
        let shown = serde_json::from_value(Value::Array(sent))
            .map_err(|error| ApiError::field("tools", error))?;
        Ok(Self {
            sent: (shown, n_bytes),
            functions,
            choice,
            parallel,
        })
    }

    /// What the chat template is given: nothing where the model may call none.
    pub(super) fn for_template(&self) -> (TemplateValue, usize) {
        match self.choice {
            ToolChoice::None => (TemplateValue::UNDEFINED, self.sent.1),
            _ => self.sent.clone(),
        }
    }

    /// The JSON types of all parameters.
    pub(super) fn types(&self) -> Arc<ParameterTypes> {
        let of = |function: &Function| {
            let properties = function.parameters["properties"].as_object();
            let types = properties
                .into_iter()
                .flatten()
                .filter_map(|(name, schema)| {
                    Some((name.clone(), schema["type"].as_str()?.to_owned()))
                });
            types.collect::<HashMap<_, _>>()
        };
        let functions = self.functions.iter();
        Arc::new(
            functions
                .map(|function| (function.name.clone(), of(function)))
                .collect(),
        )
    }

    /// The format that the answer's calls are read in; `None` where it has none.
    ///
    /// `model`: the model's own. Where the answer has to be calls and that can't be held to a grammar, or there is none,
    /// they are a list in JSON.
    pub(super) fn format(&self, model: Option<ToolCallFormat>) -> Option<ToolCallFormat> {
        match self.choice {
            ToolChoice::None => None,
            ToolChoice::Auto => model,
            ToolChoice::Required | ToolChoice::Named(_) => {
                let held = model.filter(|format| can_be_held(*format));
                Some(held.unwrap_or(ToolCallFormat::Json))
            }
        }
    }

    /// What the answer has to match: where calls are asked for, or a tool is strict. `structured` is what it has to match
    /// where it is no call.
    pub(super) fn grammar(
        &self,
        format: ToolCallFormat,
        vocabulary: &Vocabulary,
        structured: Option<&Grammar>,
    ) -> Result<Option<Grammar>, ApiError> {
        let named = |i: &usize| {
            self.choice == ToolChoice::Auto
                || self.choice == ToolChoice::Required
                || self.choice == ToolChoice::Named(*i)
        };
        let functions = (0..self.functions.len()).filter(named);
        let is_forced = matches!(self.choice, ToolChoice::Required | ToolChoice::Named(_));
        let is_strict = self.functions.iter().any(|function| function.strict);
        if !is_forced && !(can_be_held(format) && (is_strict || structured.is_some())) {
            return Ok(structured.cloned());
        }
        let arguments = functions.map(|i| {
            let function = &self.functions[i];
            let schema = match is_forced || function.strict {
                true => function.parameters.clone(),
                false => json!({"type": "object"}),
            };
            let grammar = Grammar::json_schema(schema);
            let field = format!("tools[{i}].function.parameters");
            let grammar = grammar.map_err(|error| refusal(&field, error))?;
            Ok((function.name.as_str(), grammar.as_part()))
        });
        let calls = Calls {
            arguments: arguments.collect::<Result<Vec<_>, ApiError>>()?,
            mark: format.mark().map(|mark| Mark::of(mark, vocabulary)),
            close: format.close().map(|mark| Mark::of(mark, vocabulary)),
            most: match (self.choice, self.parallel) {
                (ToolChoice::Named(_), _) | (_, false) => 1,
                _ => MAX_CALLS,
            },
        };
        let grammar = match (is_forced, structured) {
            (true, _) => calls.alone(format),
            (false, Some(structured)) => calls.or(format, structured),
            (false, None) => calls.in_text(format),
        };
        grammar.map(Some).map_err(|error| refusal("tools", error))
    }
}

impl Function {
    fn parse(i: usize, tool: &Value) -> Result<Self, ApiError> {
        let wrong = |place: &str, why: &str| ApiError::field(format!("tools[{i}]{place}"), why);
        let sent = SentTool::deserialize(tool).map_err(|error| wrong("", &error.to_string()))?;
        if sent.r#type != "function" {
            return Err(wrong(
                ".type",
                "only tools of type \"function\" are supported",
            ));
        }
        let SentFunction {
            name,
            parameters,
            strict,
        } = sent.function;
        let is_name = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.');
        if name.is_empty() || name.len() > 128 || !name.chars().all(is_name) {
            let why = "a name has 1 to 128 letters, digits, underscores, dashes and dots";
            return Err(wrong(".function.name", why));
        }
        Ok(Self {
            name,
            parameters: match parameters {
                Some(parameters) if parameters.is_object() => parameters,
                None => json!({"type": "object", "properties": {}, "additionalProperties": false}),
                Some(_) => return Err(wrong(".function.parameters", "not a JSON schema")),
            },
            strict: strict.unwrap_or(false),
        })
    }
}

fn take_choice(fields: &mut Fields<'_>, functions: &[Function]) -> Result<ToolChoice, ApiError> {
    const FIELD: &str = "tool_choice";
    let default = match functions {
        [] => ToolChoice::None,
        _ => ToolChoice::Auto,
    };
    let Some(sent) = fields.take::<Value>(FIELD)? else {
        return Ok(default);
    };
    let choice =
        match sent.as_str() {
            Some("none") => return Ok(ToolChoice::None),
            Some("auto") => return Ok(default),
            Some("required") => ToolChoice::Required,
            Some(_) => {
                let why = "expected none, auto, required or a function";
                return Err(ApiError::field(FIELD, why));
            }
            None => {
                let Some(name) = sent["function"]["name"].as_str() else {
                    let why = "expected {\"type\": \"function\", \"function\": {\"name\": ...}}";
                    return Err(ApiError::field(FIELD, why));
                };
                let found = functions.iter().position(|function| function.name == name);
                ToolChoice::Named(found.ok_or_else(|| {
                    ApiError::field(FIELD, format!("{name:?} is none of the tools"))
                })?)
            }
        };
    match functions {
        [] => Err(ApiError::field(FIELD, "there are no tools to choose from")),
        _ => Ok(choice),
    }
}

/// Whether answers can be held to calls of this format.
fn can_be_held(format: ToolCallFormat) -> bool {
    match format {
        ToolCallFormat::Pythonic | ToolCallFormat::Qwen3Coder => false,
        ToolCallFormat::Hermes
        | ToolCallFormat::Llama3Json
        | ToolCallFormat::Mistral
        | ToolCallFormat::Phi4Mini
        | ToolCallFormat::Json => true,
    }
}

/// What begins a call: a token without text where the vocabulary has one, or its characters.
enum Mark {
    Token(u32),
    Text(&'static str),
}

impl Mark {
    fn of(mark: &'static str, vocabulary: &Vocabulary) -> Self {
        match vocabulary.special_token(mark) {
            Some(id) => Self::Token(id),
            None => Self::Text(mark),
        }
    }

    fn part(&self) -> String {
        match self {
            Self::Token(id) => lark::token(*id),
            Self::Text(text) => lark::literal(text),
        }
    }

    fn trigger(&self) -> Trigger {
        match self {
            Self::Token(id) => Trigger::Token(*id),
            Self::Text(text) => Trigger::Text((*text).to_owned()),
        }
    }
}

/// Calls as a grammar.
struct Calls<'a> {
    /// Name and arguments of each function.
    arguments: Vec<(&'a str, String)>,
    mark: Option<Mark>,
    close: Option<Mark>,
    most: usize,
}

impl Calls<'_> {
    /// An answer that is calls.
    fn alone(&self, format: ToolCallFormat) -> Result<Grammar, GrammarError> {
        Grammar::composed(format!(
            "start: {}\n{}",
            self.start(format),
            self.rules(format)
        ))
    }

    /// An answer that is calls, or `other`.
    fn or(&self, format: ToolCallFormat, other: &Grammar) -> Result<Grammar, GrammarError> {
        let (start, rules) = (self.start(format), self.rules(format));
        Grammar::composed(format!(
            "start: ({start}) | other\n{rules}other: {}\n",
            other.as_part()
        ))
    }

    /// An answer with calls in it.
    fn in_text(&self, format: ToolCallFormat) -> Result<Grammar, GrammarError> {
        match (format, &self.mark) {
            // A call is the whole answer.
            (ToolCallFormat::Llama3Json | ToolCallFormat::Json, _) | (_, None) => {
                let (start, rules) = (self.start(format), self.rules(format));
                Grammar::composed(format!(
                    "start: ({start}) | OTHER?\n{rules}OTHER: /[^{{](.|\\n)*/\n"
                ))
            }
            (_, Some(mark)) => {
                let rest = format!(
                    "%lark {{\nstart: {}\n{}}}",
                    self.behind_mark(format),
                    self.rules(format)
                );
                lark::tagged(&[Tag {
                    trigger: mark.trigger(),
                    rest,
                }])
            }
        }
    }

    /// The body of the rule for all calls.
    fn start(&self, format: ToolCallFormat) -> String {
        let mark = self.mark.as_ref().map(Mark::part).unwrap_or_default();
        match format {
            ToolCallFormat::Hermes | ToolCallFormat::Qwen3Coder => {
                let one = format!("{mark} {}", self.behind_mark(format));
                self.several(&one, "\n")
            }
            // The mark may be left out, and most templates do.
            ToolCallFormat::Llama3Json => self.several("call", "; "),
            _ => format!("{mark} {}", self.behind_mark(format)),
        }
    }

    /// What follows a mark.
    fn behind_mark(&self, format: ToolCallFormat) -> String {
        let close = self.close.as_ref().map(Mark::part).unwrap_or_default();
        match format {
            ToolCallFormat::Hermes | ToolCallFormat::Qwen3Coder => {
                format!("\"\\n\" call \"\\n\" {close}")
            }
            _ => format!("\"[\" {} \"]\" {close}", self.several("call", ", ")),
        }
    }

    /// One or more of `one`, as many as there may be.
    fn several(&self, one: &str, between: &str) -> String {
        match self.most - 1 {
            0 => one.to_owned(),
            more => format!("{one} ({} {one}){{0,{more}}}", lark::literal(between)),
        }
    }

    /// The rule for one call.
    fn rules(&self, format: ToolCallFormat) -> String {
        let arguments = match format {
            ToolCallFormat::Llama3Json | ToolCallFormat::Json => "parameters",
            _ => "arguments",
        };
        let calls = self.arguments.iter().map(|(name, grammar)| {
            let head = format!("{{\"name\": {}, \"{arguments}\": ", Value::from(*name));
            format!("{} {grammar} \"}}\"", lark::literal(&head))
        });
        format!("call: {}\n", calls.collect::<Vec<_>>().join("\n    | "))
    }
}

/// The name of a call that no two share: of the answer, its choice, and its place there.
pub(super) fn call_id(answer: &str, choice: usize, index: usize, format: ToolCallFormat) -> String {
    const LETTERS: &[u8; 62] = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";
    let digest = Sha256::digest(format!("{answer}/{choice}/{index}"));
    let letters = digest
        .iter()
        .map(|byte| char::from(LETTERS[usize::from(*byte) % 62]));
    match format {
        // Mistral's templates take no other.
        ToolCallFormat::Mistral => letters.take(9).collect(),
        _ => format!("call_{}", letters.take(24).collect::<String>()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn take(body: &Value) -> Result<Tools, String> {
        let body = body.to_string();
        Tools::take(&mut Fields::parse(body.as_bytes()).unwrap()).map_err(|error| error.message)
    }

    fn tool(name: &str) -> Value {
        json!({"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": {"b": {"type": "integer"}, "a": {}}}}})
    }

    #[test]
    fn what_is_chosen_is_taken() {
        let tools = json!([tool("f"), tool("g")]);
        for (choice, want) in [
            (json!(null), ToolChoice::Auto),
            (json!("auto"), ToolChoice::Auto),
            (json!("none"), ToolChoice::None),
            (json!("required"), ToolChoice::Required),
            (
                json!({"type": "function", "function": {"name": "g"}}),
                ToolChoice::Named(1),
            ),
        ] {
            let taken = take(&json!({"tools": tools, "tool_choice": choice})).unwrap();
            assert_eq!(taken.choice, want, "{choice}");
            let shown = taken.for_template().0;
            assert_eq!(shown.is_undefined(), want == ToolChoice::None);
            if want != ToolChoice::None {
                assert_eq!(
                    serde_json::to_string(&shown).unwrap(),
                    tools.to_string(),
                    "in their order"
                );
            }
        }
        assert_eq!(
            take(&json!({"tool_choice": "auto"})).unwrap().choice,
            ToolChoice::None
        );
        assert_eq!(
            take(&json!({"tools": tools})).unwrap().types()["g"]["b"],
            "integer"
        );
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (body, want) in [
            (json!({"tools": [{}]}), "tools[0]: missing field `type`"),
            (
                json!({"tools": [{"type": "retrieval", "function": {"name": "f"}}]}),
                "tools[0].type: only tools of type",
            ),
            (
                json!({"tools": [tool("f"), tool("f")]}),
                "tools[1].function.name: \"f\" is the name of another",
            ),
            (
                json!({"tools": [tool("f g")]}),
                "tools[0].function.name: a name has",
            ),
            (
                json!({"tools": [{"type": "function", "function": {"name": "f", "parameters": 3}}]}),
                "tools[0].function.parameters: not a JSON schema",
            ),
            (
                json!({"tools": vec![tool("f"); 129]}),
                "tools: 129 tools, at most 128",
            ),
            (
                json!({"tool_choice": "required"}),
                "tool_choice: there are no tools",
            ),
            (
                json!({"tools": [tool("f")], "tool_choice": "maybe"}),
                "tool_choice: expected none",
            ),
            (
                json!({"tools": [tool("f")], "tool_choice": {"type": "function"}}),
                "tool_choice: expected {",
            ),
            (
                json!({"tools": [tool("f")], "tool_choice": {"type": "function", "function": {"name": "g"}}}),
                "tool_choice: \"g\" is none of the tools",
            ),
        ] {
            let error = take(&body).unwrap_err();
            assert!(error.starts_with(want), "{body}: {error}");
        }
    }

    #[test]
    fn a_call_has_a_name_of_its_own() {
        let ids: Vec<String> = (0..4)
            .map(|i| call_id("x", i / 2, i % 2, ToolCallFormat::Hermes))
            .collect();
        let unique: std::collections::BTreeSet<&String> = ids.iter().collect();
        assert!(
            unique.len() == 4 && ids.iter().all(|id| id.len() == 29),
            "{ids:?}"
        );
        let mistral = call_id("x", 0, 0, ToolCallFormat::Mistral);
        assert!(mistral.len() == 9 && mistral.chars().all(|c| c.is_ascii_alphanumeric()));
    }
}
