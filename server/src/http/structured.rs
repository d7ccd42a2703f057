//! Which field holds the answer to a grammar: `response_format` as in OpenAI's interface, `structured_outputs` as in vLLM's,
//! and the `guided_...` that it had before. One of them at most.

use serde::Deserialize;
use serde_json::Value;

use super::Serving;
use super::error::ApiError;
use super::fields::Fields;
use crate::engine::logits::LogitsOptions;
use crate::grammar::lark::{self, Tag, Trigger};
use crate::grammar::{CompiledGrammar, Grammar, GrammarError};

/// More tags than anybody needs.
const MAX_TAGS: usize = 128;

/// A grammar, and the field that asked for it.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Structured {
    pub(super) grammar: Grammar,
    pub(super) field: String,
}

impl Structured {
    /// Takes the fields that ask for one.
    pub(super) fn take(fields: &mut Fields<'_>) -> Result<Option<Self>, ApiError> {
        let asked = [
            take_response_format(fields)?,
            take_structured_outputs(fields)?,
            take_guided_json(fields)?,
            fields
                .take::<String>("guided_regex")?
                .map(|regex| of("guided_regex", Grammar::regex(&regex)))
                .transpose()?,
            fields
                .take::<Vec<String>>("guided_choice")?
                .filter(|choices| !choices.is_empty())
                .map(|choices| of("guided_choice", Grammar::choice(&choices)))
                .transpose()?,
            fields
                .take::<String>("guided_grammar")?
                .map(|grammar| of("guided_grammar", Grammar::lark(grammar)))
                .transpose()?,
        ];
        let mut asked = asked.into_iter().flatten();
        let (first, second) = (asked.next(), asked.next());
        match (first, second) {
            (Some(first), Some(second)) => {
                let why = format!("given beside {}; set one of them only", first.field);
                Err(ApiError::field(second.field, why))
            }
            (first, _) => Ok(first),
        }
    }

    /// Compiled, on other threads.
    pub(super) async fn compile(self, serving: &Serving) -> Result<CompiledGrammar, ApiError> {
        let compiled = serving.grammars.compile(self.grammar).await;
        compiled.map_err(|error| refusal(&self.field, error))
    }
}

/// Refuses what could take away all that a grammar allows.
pub(super) fn check_logits(options: &LogitsOptions) -> Result<(), ApiError> {
    for (field, is_set) in [
        ("min_tokens", options.min_tokens > 0),
        ("bad_words", !options.bad_words.is_empty()),
        ("allowed_token_ids", !options.allowed_token_ids.is_empty()),
    ] {
        if is_set {
            let why = "not supported for an answer that is held to a grammar or to tool calls; leave it out";
            return Err(ApiError::field(field, why));
        }
    }
    Ok(())
}

/// What a grammar's mistake looks like to a client.
pub(super) fn refusal(field: &str, error: GrammarError) -> ApiError {
    match error {
        GrammarError::TooLarge { .. } | GrammarError::Invalid(_) => ApiError::field(field, error),
        GrammarError::Busy { .. } => ApiError::busy("grammar_busy", error),
        GrammarError::Stopped => ApiError::unavailable(error.to_string()),
    }
}

fn of(field: &str, grammar: Result<Grammar, GrammarError>) -> Result<Structured, ApiError> {
    match grammar {
        Ok(grammar) => Ok(Structured {
            grammar,
            field: field.to_owned(),
        }),
        Err(error) => Err(refusal(field, error)),
    }
}

#[derive(Deserialize)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
enum ResponseFormat {
    Text,
    JsonObject,
    JsonSchema { json_schema: NamedSchema },
    StructuralTag(StructuralTag),
}

/// The name and the description are for the model, and no template shows them.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(dead_code, reason = "accepted, and of no effect")]
struct NamedSchema {
    #[serde(default)]
    name: Option<String>,
    #[serde(default)]
    description: Option<String>,
    #[serde(default)]
    schema: Option<Value>,
    /// A schema is enforced in either case.
    #[serde(default)]
    strict: Option<bool>,
}

fn take_response_format(fields: &mut Fields<'_>) -> Result<Option<Structured>, ApiError> {
    const FIELD: &str = "response_format";
    match fields.take(FIELD)? {
        None | Some(ResponseFormat::Text) => Ok(None),
        Some(ResponseFormat::JsonObject) => of(FIELD, Ok(Grammar::json_object())).map(Some),
        Some(ResponseFormat::JsonSchema { json_schema }) => {
            let field = "response_format.json_schema.schema";
            match json_schema.schema {
                Some(schema) => of(field, Grammar::json_schema(schema)).map(Some),
                None => Err(ApiError::field(field, "missing; the field is required")),
            }
        }
        Some(ResponseFormat::StructuralTag(tag)) => of(FIELD, tag.grammar()).map(Some),
    }
}

/// vLLM's; exactly one of the first six.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct StructuredOutputs {
    json: Option<Value>,
    regex: Option<String>,
    choice: Option<Vec<String>>,
    grammar: Option<String>,
    json_object: Option<bool>,
    structural_tag: Option<Value>,
    /// There is one way to compile a grammar, and none to fall back on.
    #[serde(default)]
    #[allow(dead_code, reason = "accepted, and of no effect")]
    disable_fallback: Option<bool>,
    #[serde(default)]
    disable_any_whitespace: Option<bool>,
    #[serde(default)]
    disable_additional_properties: Option<bool>,
    #[serde(default)]
    whitespace_pattern: Option<String>,
}

fn take_structured_outputs(fields: &mut Fields<'_>) -> Result<Option<Structured>, ApiError> {
    const FIELD: &str = "structured_outputs";
    let Some(asked) = fields.take::<StructuredOutputs>(FIELD)? else {
        return Ok(None);
    };
    for (name, is_set) in [
        (
            "disable_any_whitespace",
            asked.disable_any_whitespace == Some(true),
        ),
        (
            "disable_additional_properties",
            asked.disable_additional_properties == Some(true),
        ),
        ("whitespace_pattern", asked.whitespace_pattern.is_some()),
    ] {
        if is_set {
            let why = "not supported by this server; leave it out";
            return Err(ApiError::field(format!("{FIELD}.{name}"), why));
        }
    }
    let part = |name: &str, grammar| of(&format!("{FIELD}.{name}"), grammar);
    let given = [
        asked.json.map(|schema| part("json", json(schema))),
        asked
            .regex
            .map(|regex| part("regex", Grammar::regex(&regex))),
        asked
            .choice
            .map(|choice| part("choice", Grammar::choice(&choice))),
        asked
            .grammar
            .map(|grammar| part("grammar", Grammar::lark(grammar))),
        (asked.json_object == Some(true)).then(|| part("json_object", Ok(Grammar::json_object()))),
        asked
            .structural_tag
            .map(|tag| part("structural_tag", structural_tag(tag))),
    ];
    let mut given = given.into_iter().flatten();
    match (given.next(), given.next()) {
        (Some(_), Some(_)) => {
            let why =
                "more than one of json, regex, choice, grammar, json_object and structural_tag";
            Err(ApiError::field(FIELD, why))
        }
        (first, _) => first.transpose(),
    }
}

fn take_guided_json(fields: &mut Fields<'_>) -> Result<Option<Structured>, ApiError> {
    const FIELD: &str = "guided_json";
    let schema = fields.take::<Value>(FIELD)?;
    schema.map(|schema| of(FIELD, json(schema))).transpose()
}

/// A schema as an object, or written in a string.
fn json(schema: Value) -> Result<Grammar, GrammarError> {
    Grammar::json_schema(match schema {
        Value::String(text) => serde_json::from_str(&text)
            .map_err(|error| GrammarError::Invalid(format!("not JSON: {error}")))?,
        schema => schema,
    })
}

/// Free text in which a trigger begins a tag, whose inside is JSON of a schema.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct StructuralTag {
    structures: Vec<Structure>,
    triggers: Vec<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Structure {
    begin: String,
    schema: Value,
    end: String,
}

fn structural_tag(tag: Value) -> Result<Grammar, GrammarError> {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Typed {
        #[serde(rename = "type")]
        kind: Option<String>,
        structures: Vec<Structure>,
        triggers: Vec<String>,
    }
    let invalid = |error: serde_json::Error| GrammarError::Invalid(error.to_string());
    let typed: Typed = match tag {
        Value::String(text) => serde_json::from_str(&text).map_err(invalid)?,
        tag => serde_json::from_value(tag).map_err(invalid)?,
    };
    let Typed {
        kind,
        structures,
        triggers,
    } = typed;
    if kind.is_some_and(|kind| kind != "structural_tag") {
        return Err(GrammarError::Invalid(
            "its type is not \"structural_tag\"".into(),
        ));
    }
    StructuralTag {
        structures,
        triggers,
    }
    .grammar()
}

impl StructuralTag {
    fn grammar(self) -> Result<Grammar, GrammarError> {
        let n = self.structures.len();
        if n == 0 || n > MAX_TAGS {
            let why = format!("{n} structures; 1 to {MAX_TAGS} are allowed");
            return Err(GrammarError::Invalid(why));
        }
        let tags = self.structures.into_iter().map(|structure| {
            let begun =
                |trigger: &&String| !trigger.is_empty() && structure.begin.starts_with(*trigger);
            let Some(trigger) = self.triggers.iter().find(begun) else {
                let why = format!("no trigger begins {:?}", structure.begin);
                return Err(GrammarError::Invalid(why));
            };
            let body = Grammar::json_schema(structure.schema)?;
            let rest = lark::literal(&structure.begin[trigger.len()..]);
            Ok(Tag {
                trigger: Trigger::Text(trigger.clone()),
                rest: format!(
                    "{rest} {} {}",
                    body.as_part(),
                    lark::literal(&structure.end)
                ),
            })
        });
        lark::tagged(&tags.collect::<Result<Vec<_>, _>>()?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn take(body: &Value) -> Result<Option<Structured>, String> {
        let body = body.to_string();
        let mut fields = Fields::parse(body.as_bytes()).unwrap();
        Structured::take(&mut fields).map_err(|error| error.message)
    }

    #[test]
    fn each_way_to_ask_comes_to_the_same_grammar() {
        let schema = json!({"type": "object", "properties": {"b": {"type": "integer"}, "a": {}}});
        let grammar = Grammar::json_schema(schema.clone()).unwrap();
        for (field, body) in [
            (
                "response_format.json_schema.schema",
                json!({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "strict": true, "schema": schema}}}),
            ),
            (
                "structured_outputs.json",
                json!({"structured_outputs": {"json": schema}}),
            ),
            (
                "structured_outputs.json",
                json!({"structured_outputs": {"json": schema.to_string(), "regex": null}}),
            ),
            ("guided_json", json!({"guided_json": schema})),
        ] {
            let found = take(&body).unwrap().unwrap();
            assert_eq!(
                (found.field.as_str(), &found.grammar),
                (field, &grammar),
                "{body}"
            );
        }
        for body in [
            json!({}),
            json!({"response_format": {"type": "text"}}),
            json!({"structured_outputs": {}, "guided_choice": [], "guided_regex": null}),
            json!({"structured_outputs": {"json_object": false, "disable_fallback": true}}),
        ] {
            assert_eq!(take(&body), Ok(None), "{body}");
        }
    }

    #[test]
    fn what_is_wrong_is_named() {
        let schema = json!({"type": "object"});
        for (body, want) in [
            (
                json!({"response_format": {"type": "xml"}}),
                "response_format: unknown variant `xml`",
            ),
            (
                json!({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}),
                "response_format.json_schema.schema: missing; the field is required",
            ),
            (
                json!({"response_format": {"type": "json_schema", "json_schema": {"schema": [1]}}}),
                "response_format.json_schema.schema: a schema has to be an object",
            ),
            (
                json!({"response_format": {"type": "json_object"}, "guided_regex": "a"}),
                "guided_regex: given beside response_format; set one of them only",
            ),
            (
                json!({"structured_outputs": {"json": schema, "regex": "a"}}),
                "structured_outputs: more than one of json, regex",
            ),
            (
                json!({"structured_outputs": {"json": schema, "whitespace_pattern": " "}}),
                "structured_outputs.whitespace_pattern: not supported",
            ),
            (
                json!({"structured_outputs": {"xml": 1}}),
                "structured_outputs: unknown field `xml`",
            ),
            (
                json!({"structured_outputs": {"json": "{"}}),
                "structured_outputs.json: not JSON",
            ),
            (
                json!({"structured_outputs": {"choice": []}}),
                "structured_outputs.choice: no choices",
            ),
            (
                json!({"structured_outputs": {"structural_tag": {"structures": [{"begin": "<f>", "schema": {}, "end": "</f>"}],
                    "triggers": ["<g"]}}}),
                "structured_outputs.structural_tag: no trigger begins \"<f>\"",
            ),
            (
                json!({"guided_regex": "a".repeat(9_000)}),
                "guided_regex: bytes of the expression: 9000, at most 8192 are allowed",
            ),
            (
                json!({"guided_json": {"x-guidance": {"lenient": true}}}),
                "guided_json: the keyword \"x-guidance\" is not supported",
            ),
        ] {
            let error = take(&body).unwrap_err();
            assert!(error.starts_with(want), "{body}: {error}");
        }
    }
}
