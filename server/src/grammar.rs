//! Grammars: what a generated text has to match, token by token.
//!
//! A [`Grammar`] is what a request asks for, checked and bounded; the [`GrammarCompiler`] makes a [`CompiledGrammar`] of it
//! on threads of its own, and each sequence follows that with a [`Matcher`], which says which tokens may come next. The
//! work inside is llguidance's. This module knows the tokens of one vocabulary, and no requests; of the engine, what it asks of
//! a constraint.
//!
//! - [`schema`]: pure: which JSON schemas are let through, by what they cost.
//! - [`lark`]: pure: grammars written as text, llguidance's dialect of Lark.
//! - [`compiler`]: the vocabulary's trie, the threads, and what was compiled before.
//! - [`matcher`]: one sequence's place in its grammar. [`constraint`]: the same for the engine, computed beside it.

mod compiler;
mod constraint;
pub mod lark;
mod matcher;
mod schema;

#[cfg(test)]
mod tests;

use llguidance::api::{GrammarWithLexer, TopLevelGrammar};
use serde_json::{Map, Value, json};

pub use compiler::{CompiledGrammar, GrammarCompiler};
pub use constraint::GrammarConstraint;
pub use matcher::{MatchError, Matcher};

/// Blanks that an answer in JSON may have between its parts: one or two, or a line's break and its indentation. Without
/// a bound, a model could go on with blanks for as long as it may.
const WHITESPACE: &str = r"[ \t]{1,2}|\r?\n[ \t]{0,64}";

/// Bytes of a grammar at most, written out.
const MAX_BYTES: usize = 256 << 10;

/// Choices at most, and their bytes together.
const MAX_CHOICES: usize = 4096;

/// Bytes of a regular expression at most.
const MAX_REGEX_BYTES: usize = 8 << 10;

/// A grammar within bounds; whether it can be compiled is the compiler's to say.
#[derive(Clone, Debug, PartialEq)]
pub struct Grammar(Source);

#[derive(Clone, Debug, PartialEq)]
enum Source {
    Json(Value),
    Lark(String),
}

/// Why a text can't be held to a grammar.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GrammarError {
    /// It would cost too much time or memory.
    #[error("{what}: {found}, at most {limit} are allowed")]
    TooLarge {
        /// What of it.
        what: &'static str,
        /// How much of it was found, or how much at least.
        found: usize,
        /// How much may be.
        limit: usize,
    },
    /// It is not a grammar, or uses what isn't built; in words.
    #[error("{0}")]
    Invalid(String),
    /// Many are being compiled.
    #[error("{limit} grammars wait to be compiled already")]
    Busy {
        /// Grammars that may wait.
        limit: usize,
    },
    /// The threads are gone.
    #[error("the grammar compiler has stopped")]
    Stopped,
}

impl Grammar {
    /// Texts that are JSON of this schema.
    pub fn json_schema(schema: Value) -> Result<Self, GrammarError> {
        let schema = match schema {
            Value::Bool(true) => Map::new(),
            Value::Object(members) => members,
            _ => return Err(GrammarError::Invalid("a schema has to be an object".into())),
        };
        if schema.contains_key("x-guidance") {
            let why = "the keyword \"x-guidance\" is not supported by this server; leave it out";
            return Err(GrammarError::Invalid(why.into()));
        }
        let schema = Value::Object(schema);
        at_most("bytes of the schema", schema.to_string().len(), MAX_BYTES)?;
        schema::check(&schema)?;
        let schema = schema::with_options_in_place(schema);
        schema::check(&schema)?;
        Ok(Self(Source::Json(schema)))
    }

    /// Texts that are a JSON object.
    pub fn json_object() -> Self {
        Self(Source::Json(json!({"type": "object"})))
    }

    /// Texts that a regular expression matches as a whole.
    pub fn regex(regex: &str) -> Result<Self, GrammarError> {
        at_most("bytes of the expression", regex.len(), MAX_REGEX_BYTES)?;
        let regex = llguidance::regex_to_lark(regex, "");
        Ok(Self(Source::Lark(match regex.as_str() {
            "" => "start: \"\"".into(),
            regex => format!("start: /{regex}/"),
        })))
    }

    /// One of these texts.
    pub fn choice(choices: &[String]) -> Result<Self, GrammarError> {
        if choices.is_empty() {
            return Err(GrammarError::Invalid(
                "no choices; at least one is needed".into(),
            ));
        }
        at_most("choices", choices.len(), MAX_CHOICES)?;
        let n_bytes = choices.iter().map(String::len).sum();
        at_most("bytes of the choices", n_bytes, MAX_BYTES)?;
        let choices: Vec<String> = choices.iter().map(|choice| lark::literal(choice)).collect();
        Ok(Self(Source::Lark(format!(
            "start: {}",
            choices.join(" | ")
        ))))
    }

    /// Texts of a grammar in llguidance's dialect of Lark.
    pub fn lark(text: String) -> Result<Self, GrammarError> {
        lark::check(&text)?;
        Ok(Self(Source::Lark(text)))
    }

    /// Texts made of parts that were checked one by one.
    pub(crate) fn composed(text: String) -> Result<Self, GrammarError> {
        at_most("bytes of the grammar", text.len(), 2 * MAX_BYTES)?;
        Ok(Self(Source::Lark(text)))
    }

    /// The grammar as a part of a larger one, where the name of a rule may stand.
    pub fn as_part(&self) -> String {
        match &self.0 {
            Source::Json(schema) => format!("%json {}", with_whitespace(schema)),
            Source::Lark(text) => format!("%lark {{\n{text}\n}}"),
        }
    }

    /// As llguidance takes it.
    fn to_llguidance(&self) -> TopLevelGrammar {
        TopLevelGrammar::from_grammar(match &self.0 {
            Source::Json(schema) => GrammarWithLexer::from_json_schema(with_whitespace(schema)),
            Source::Lark(text) => GrammarWithLexer::from_lark(text.clone()),
        })
    }

    /// Two grammars with the same one are the same.
    fn key(&self) -> String {
        match &self.0 {
            Source::Json(schema) => format!("j{schema}"),
            Source::Lark(text) => format!("l{text}"),
        }
    }
}

/// The schema with the blanks that are allowed, as llguidance is told them.
fn with_whitespace(schema: &Value) -> Value {
    let mut schema = schema.clone();
    schema["x-guidance"] = json!({"whitespace_pattern": WHITESPACE});
    schema
}

fn at_most(what: &'static str, found: usize, limit: usize) -> Result<(), GrammarError> {
    match found <= limit {
        true => Ok(()),
        false => Err(GrammarError::TooLarge { what, found, limit }),
    }
}
