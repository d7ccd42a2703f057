//! Grammars as text, in llguidance's dialect of Lark: what a client's text may cost, and how parts are written that a
//! larger grammar is made of.

use serde_json::Value;

use super::{Grammar, GrammarError, at_most, schema};

/// Bytes of a client's grammar at most.
const MAX_BYTES: usize = 64 << 10;

/// Lines at most: llguidance follows rules by recursion.
const MAX_LINES: usize = 2_000;

/// Brackets inside each other at most.
const MAX_DEPTH: usize = 64;

/// Any text at all, and as a rule's body the text up to what follows it.
pub const ANY_TEXT: &str = r"/(.|\n)*/";

/// Refuses a grammar that would cost too much.
pub(super) fn check(text: &str) -> Result<(), GrammarError> {
    at_most("bytes of the grammar", text.len(), MAX_BYTES)?;
    at_most("lines of the grammar", text.lines().count(), MAX_LINES)?;
    let mut depth = 0_usize;
    for byte in text.bytes() {
        match byte {
            b'(' | b'[' | b'{' => depth += 1,
            b')' | b']' | b'}' => depth = depth.saturating_sub(1),
            _ => {}
        }
        at_most("brackets inside each other", depth, MAX_DEPTH)?;
    }
    // The schemas in it, as the compiler reads them.
    for (at, keyword) in text.match_indices("%json") {
        let rest = &text[at + keyword.len()..];
        let mut values = serde_json::Deserializer::from_str(rest).into_iter::<Value>();
        if let Some(Ok(schema)) = values.next() {
            schema::check(&schema)?;
        }
    }
    Ok(())
}

/// A text that stands for itself.
pub fn literal(text: &str) -> String {
    // JSON's escapes are the dialect's, but for the characters that it wants escaped beyond.
    Value::from(text).to_string().replace('\u{7f}', "\\u007f")
}

/// A token that has no text of its own, by its id.
pub fn token(id: u32) -> String {
    format!("<[{id}]>")
}

/// A text with tags in it: free until `trigger`, then as the tag says.
#[derive(Clone, Debug)]
pub struct Tag {
    /// What begins it, as a part of a grammar; its text begins with the trigger.
    pub trigger: Trigger,
    /// What follows the trigger: a part of a grammar, as the body of a rule.
    pub rest: String,
}

/// What ends free text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Trigger {
    /// These characters.
    Text(String),
    /// This token.
    Token(u32),
}

/// Free text with tags in it, any number of each.
pub fn tagged(tags: &[Tag]) -> Result<Grammar, GrammarError> {
    let names: Vec<String> = (0..tags.len()).map(|i| format!("tag_{i}")).collect();
    let mut text = format!(
        "start: ({})* free_text\nfree_text: ANY_TEXT\nANY_TEXT: {ANY_TEXT}\n",
        names.join(" | ")
    );
    for (name, Tag { trigger, rest }) in names.iter().zip(tags) {
        text += &match trigger {
            Trigger::Text(trigger) => format!(
                "{name}_head[lazy]: ANY_TEXT {}\n{name}: {name}_head {rest}\n",
                literal(trigger)
            ),
            Trigger::Token(id) => format!("{name}: ANY_TEXT {} {rest}\n", token(*id)),
        };
    }
    Grammar::composed(text)
}

/// What stands before an answer: the model's reasoning, up to the mark that ends it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reasoning {
    /// The prompt ends inside of it.
    Begun,
    /// The model may begin with it.
    Possible,
}

/// `grammar` for what follows the reasoning between these marks.
pub fn after_reasoning(
    grammar: &Grammar,
    reasoning: Reasoning,
    (begin, end): (&str, &str),
) -> Result<Grammar, GrammarError> {
    let (begin, end, answer) = (literal(begin), literal(end), grammar.as_part());
    let start = match reasoning {
        Reasoning::Begun => "start: reasoning BLANK? answer".to_owned(),
        Reasoning::Possible => format!("start: answer | {begin} reasoning BLANK? answer"),
    };
    Grammar::composed(format!(
        "{start}\nreasoning[lazy]: {ANY_TEXT} {end}\nBLANK: /\\s{{1,4}}/\nanswer: {answer}\n"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_grammar_that_would_cost_too_much_is_refused_by_what_is_too_large() {
        let deep_schema = format!("{}{}", "{\"items\": ".repeat(70), "}".repeat(70));
        for (why, text, want) in [
            (
                "size",
                "a".repeat(70_000),
                "bytes of the grammar: 70000, at most 65536",
            ),
            (
                "rules",
                "a: b\n".repeat(3_000),
                "lines of the grammar: 3000, at most 2000",
            ),
            (
                "brackets",
                "(".repeat(100),
                "brackets inside each other: 65, at most 64",
            ),
            (
                "a schema inside",
                format!("start: %json {deep_schema}"),
                "inside each other",
            ),
            (
                "a wide schema inside",
                format!("start: %json {{\"enum\": [{}1]}}", "1,".repeat(25_000)),
                "values of the schema",
            ),
        ] {
            let error = check(&text).unwrap_err().to_string();
            assert!(error.contains(want), "{why}: {error}");
        }
        assert_eq!(check("start: %json {\"type\": \"object\"} \"x\"+"), Ok(()));
    }
}
