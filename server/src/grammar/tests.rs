//! The compiler and the matcher together, on vocabularies of the tokenizer's tests.

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::lark::{self, Reasoning, Tag, Trigger};
use super::*;
use crate::text::Tokenizer;
use crate::text::tokenizer::TextFiles;
use schemas::{Chance, judge, schema};

#[path = "../../tests/support/schemas.rs"]
mod schemas;

struct Bench {
    tokenizer: Tokenizer,
    compiler: GrammarCompiler,
    end: u32,
}

fn bench(name: &str) -> Bench {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/tokenizers");
    let file = std::fs::read(format!("{folder}/{name}/tokenizer.json")).unwrap();
    let tokenizer = Tokenizer::load(TextFiles {
        tokenizer: &file,
        tokenizer_config: None,
        chat_template: None,
    })
    .unwrap();
    let vocabulary = tokenizer.vocabulary();
    let n = vocabulary.len() as u32;
    let end = (0..n).find(|id| vocabulary.is_special(*id)).unwrap();
    // Ids beyond the tokenizer's: models have more logits than tokens.
    let compiler =
        GrammarCompiler::start(Arc::clone(vocabulary), n + 70, &[end], NonZeroUsize::MIN).unwrap();
    Bench {
        tokenizer,
        compiler,
        end,
    }
}

impl Bench {
    fn matcher(&self, grammar: &Grammar) -> Matcher {
        self.compiler.compile_here(grammar).unwrap().matcher(&[])
    }

    fn mask(&self, matcher: &mut Matcher) -> Vec<u32> {
        let mut allowed = vec![u32::MAX; (self.tokenizer.vocabulary().len() + 70).div_ceil(32)];
        matcher.fill(&mut allowed).unwrap();
        let ids = 0..allowed.len() as u32 * 32;
        ids.filter(|id| allowed[*id as usize / 32] >> (id % 32) & 1 == 1)
            .collect()
    }

    /// Whether the grammar takes the text, by masks alone, as the tokenizer cuts it.
    fn takes(&self, grammar: &Grammar, text: &str) -> bool {
        let mut matcher = self.matcher(grammar);
        for id in self.tokenizer.encode(text, false).unwrap() {
            if !self.mask(&mut matcher).contains(&id) {
                return false;
            }
            matcher.advance(id).unwrap();
        }
        let may_end = matcher.may_end().unwrap();
        assert_eq!(self.mask(&mut matcher).contains(&self.end), may_end);
        may_end
    }

    /// A text by chance, in the bytes of its tokens.
    fn walk(&self, grammar: &Grammar, seed: u64) -> Vec<u8> {
        let (mut matcher, mut chance) = (self.matcher(grammar), Chance::new(seed));
        let mut text = Vec::new();
        for _ in 0..5_000 {
            let allowed = self.mask(&mut matcher);
            assert!(!allowed.is_empty(), "{:?}", String::from_utf8_lossy(&text));
            let id = allowed[chance.below(allowed.len())];
            matcher.advance(id).unwrap();
            if id == self.end {
                return text;
            }
            text.extend(self.tokenizer.vocabulary().bytes(id));
        }
        panic!("no end: {:?}", String::from_utf8_lossy(&text));
    }
}

#[test]
fn texts_are_taken_or_not_by_each_kind_of_grammar() {
    let tag = Tag {
        trigger: Trigger::Text("<f=".into()),
        rest: format!(
            "\"x>\" {} \"</f>\"",
            Grammar::json_schema(json!({"type": "integer"}))
                .unwrap()
                .as_part()
        ),
    };
    let object = Grammar::json_schema(
        json!({"type": "object", "properties": {"b": {"type": "integer"}, "a": {"type": "string"}},
        "required": ["b"], "additionalProperties": false}),
    )
    .unwrap();
    let reasoned = |how| lark::after_reasoning(&object, how, ("<think>", "</think>")).unwrap();
    let mut cases: Vec<(&str, Grammar, Vec<&str>, Vec<&str>)> = vec![
        (
            "an object, properties in the schema's order",
            object.clone(),
            vec![
                r#"{"b": 1}"#,
                r#"{"b":-20,"a":"é\n"}"#,
                "{\n  \"b\": 1,\n  \"a\": \"\"\n}",
            ],
            vec![
                r#"{"a": "x", "b": 1}"#,
                r#"{"b": 1, "c": 2}"#,
                r#"{"b": 1.5}"#,
                r#"{"b": 01}"#,
                r#"{"b": 1"#,
                r#" {"b": 1}"#,
                "{\"b\":   1}",
            ],
        ),
        (
            "any object",
            Grammar::json_object(),
            vec!["{}", r#"{"x": [1, {"y": null}], "z": "é\t"}"#],
            vec!["[]", "{x: 1}", "{\"a\": \"\n\"}"],
        ),
        (
            "a schema that is true",
            Grammar::json_schema(json!(true)).unwrap(),
            vec!["null", "[1.5e3]", "\"a\""],
            vec!["nul", "True"],
        ),
        (
            "an expression as a whole",
            Grammar::regex(r"^(ab|c/d)+\d{2}$").unwrap(),
            vec!["ab12", "c/dab00"],
            vec!["ab1", "ab123", "12"],
        ),
        (
            "an empty expression",
            Grammar::regex("").unwrap(),
            vec![""],
            vec!["a"],
        ),
        (
            "choices, one the beginning of another",
            Grammar::choice(&["yes".into(), "yes \"sir\"".into(), "no\n".into()]).unwrap(),
            vec!["yes", "yes \"sir\"", "no\n"],
            vec!["yes ", "no", "", "yesno"],
        ),
        (
            "rules",
            Grammar::lark("start: \"(\" start \")\" | /[ab]+/".into()).unwrap(),
            vec!["a", "((ab))"],
            vec!["(a", "()"],
        ),
        (
            "tags in free text",
            lark::tagged(&[tag]).unwrap(),
            vec!["", "a < b", "x<f=x>12</f> y <f=x>3</f>"],
            vec!["<f=y>", "<f=x>a</f>", "<f=x>1"],
        ),
        (
            "behind reasoning that has begun",
            reasoned(Reasoning::Begun),
            vec!["hm {} </think>{\"b\": 1}", "</think>\n\n{\"b\": 1}"],
            vec!["{\"b\": 1}", "hm</think>x"],
        ),
        (
            "behind reasoning that may come",
            reasoned(Reasoning::Possible),
            vec!["{\"b\": 1}", "<think>hm</think>\n{\"b\": 1}"],
            vec!["hm</think>{\"b\": 1}", "<think>{\"b\": 1}"],
        ),
    ];
    let animal = |kind: &str| json!({"type": "object", "properties": {"kind": {"const": kind, "type": "string"}}, "required": ["kind"], "additionalProperties": false});
    let union = json!({"oneOf": [{"$ref": "#/$defs/cat"}, {"$ref": "#/$defs/dog"}], "discriminator": {"propertyName": "kind"},
        "$defs": {"cat": animal("cat"), "dog": animal("dog")}});
    cases.push((
        "a union that a member tells apart",
        Grammar::json_schema(union).unwrap(),
        vec![r#"{"kind": "cat"}"#, r#"{"kind": "dog"}"#],
        vec![r#"{"kind": "cow"}"#],
    ));
    let bench = bench("byte_level");
    for (why, grammar, taken, refused) in &cases {
        for text in taken {
            assert!(bench.takes(grammar, text), "{why}: {text:?}");
        }
        for text in refused {
            assert!(!bench.takes(grammar, text), "{why}: {text:?}");
        }
    }
}

#[test]
fn a_mask_is_the_set_of_tokens_that_lead_on() {
    let bench = bench("byte_level");
    for seed in 0..6 {
        let grammar = Grammar::json_schema(schema(seed)).unwrap();
        let compiled = bench.compiler.compile_here(&grammar).unwrap();
        let (mut path, mut chance) = (Vec::new(), Chance::new(seed));
        for _ in 0..12 {
            let at = |path: &[u32]| {
                let mut matcher = compiled.matcher(&[]);
                path.iter()
                    .try_for_each(|id| matcher.advance(*id))
                    .map(|()| matcher)
            };
            let mut matcher = at(&path).unwrap();
            let allowed = bench.mask(&mut matcher);
            if matcher.is_complete() {
                assert_eq!(allowed, [bench.end]);
                break;
            }
            for id in (0..bench.tokenizer.vocabulary().len() as u32).step_by(3) {
                let leads_on = at(&[path.as_slice(), &[id]].concat()).is_ok();
                assert_eq!(leads_on, allowed.contains(&id), "{path:?} then {id}");
            }
            let id = allowed[chance.below(allowed.len())];
            if id == bench.end {
                break;
            }
            path.push(id);
        }
    }
}

#[test]
fn every_walk_gives_what_a_validator_of_its_own_accepts() {
    for (name, seeds) in [("byte_level", 0..60), ("byte_fallback", 60..80)] {
        let bench = bench(name);
        for seed in seeds {
            let schema = schema(seed);
            let grammar = Grammar::json_schema(schema.clone()).unwrap();
            let text = String::from_utf8(bench.walk(&grammar, seed)).unwrap();
            let value: Value =
                serde_json::from_str(&text).unwrap_or_else(|e| panic!("{seed}: {e}: {text}"));
            judge(&schema, &value).unwrap_or_else(|e| panic!("{seed}: {e}: {text}\n{schema}"));
        }
    }
}

#[test]
fn a_text_ends_where_it_is_complete() {
    let bench = bench("byte_level");
    let grammar = Grammar::regex("a+").unwrap();
    let id = |text: &str| bench.tokenizer.encode(text, false).unwrap()[0];
    let stop = id("b");
    let mut matcher = bench
        .compiler
        .compile_here(&grammar)
        .unwrap()
        .matcher(&[stop]);
    let ends = |bench: &Bench, matcher: &mut Matcher| {
        let allowed = bench.mask(matcher);
        (allowed.contains(&bench.end), allowed.contains(&stop))
    };
    assert_eq!(
        ends(&bench, &mut matcher),
        (false, false),
        "not before the first"
    );
    matcher.advance(id("a")).unwrap();
    assert_eq!(ends(&bench, &mut matcher), (true, true), "by either token");
    assert!(matcher.advance(id("c")).is_err(), "it was not allowed");

    let mut matcher = bench.matcher(&Grammar::choice(&["a".into()]).unwrap());
    matcher.advance(id("a")).unwrap();
    assert!(matcher.is_complete());
    assert_eq!(bench.mask(&mut matcher), [bench.end], "nothing else");
    matcher.advance(bench.end).unwrap();
    matcher.advance(id("c")).unwrap();
    assert_eq!(
        bench.mask(&mut matcher),
        [bench.end],
        "what comes behind changes nothing"
    );
}

#[test]
fn what_is_not_supported_is_named() {
    let bench = bench("byte_level");
    for (schema, want) in [
        (json!({"type": "object", "not": {}}), "not is not supported"),
        (
            json!({"type": "array", "uniqueItems": true, "contains": {}}),
            "contains, uniqueItems is not supported",
        ),
        (
            json!({"properties": {"a": {"if": {}, "then": {}}}}),
            "if, then is not supported",
        ),
        (
            json!({"oneOf": [{"type": "integer"}, {"type": "number"}]}),
            "oneOf is supported only where",
        ),
        (
            json!({"type": "string", "format": "novel"}),
            "Unknown format: novel",
        ),
        (
            json!({"type": "string", "pattern": "(?=a)b"}),
            "look-around",
        ),
        (json!({"type": "string", "pattern": "(a"}), "unclosed group"),
        (
            json!({"$ref": "http://example.com/x"}),
            "http://example.com/x",
        ),
        (
            json!({"type": "integer", "minimum": 3, "maximum": 2}),
            "nsatisfiable",
        ),
        (json!({"type": "what"}), "what"),
    ] {
        let grammar = Grammar::json_schema(schema.clone()).unwrap();
        let error = bench
            .compiler
            .compile_here(&grammar)
            .unwrap_err()
            .to_string();
        assert!(error.contains(want), "{schema}: {error}");
        assert!(!error.contains('\n') && error.len() < 600, "{error}");
    }
    let lark = Grammar::lark("start: nothing".into()).unwrap();
    let error = bench.compiler.compile_here(&lark).unwrap_err().to_string();
    assert!(error.contains("nothing"), "{error}");
}

/// Whatever is let through by the checks is compiled or refused, and followed, in little time.
#[test]
fn a_bomb_costs_little() {
    let bench = bench("byte_level");
    let property = |i: usize| (format!("p{i}"), json!({"type": "string"}));
    let chain: Value = (1..250).map(|i| (format!("d{i}"), json!({"type": "object", "properties": {"a": {"$ref": format!("#/$defs/d{}", i - 1)}}})))
        .chain([("d0".to_owned(), json!({"type": "null"}))]).collect::<Map<_, _>>().into();
    let deep = (0..20).fold(
        json!({"type": "integer"}),
        |inner, _| json!({"type": "object", "properties": {"a": inner}, "required": ["a"]}),
    );
    let rules: String = (0..1_900)
        .map(|i| format!("r{i}: r{} \"x\"\n", i + 1))
        .collect();
    let terminals: String = (0..1_900)
        .map(|i| format!("T{i}: T{} \"x\" | \"y\"\n", i + 1))
        .collect();
    let bombs: Vec<(&str, Result<Grammar, GrammarError>)> = vec![
        (
            "a long string",
            Grammar::json_schema(
                json!({"type": "string", "minLength": 100_000, "maxLength": 2_000_000_000}),
            ),
        ),
        (
            "a length beyond all numbers",
            Grammar::json_schema(json!({"type": "string", "maxLength": 1e18 as u64})),
        ),
        (
            "a long list of lists",
            Grammar::json_schema(
                json!({"type": "array", "minItems": 1_000_000, "items": {"type": "array", "minItems": 1_000_000}}),
            ),
        ),
        (
            "many properties",
            Grammar::json_schema(
                json!({"type": "object", "properties": (0..1_000).map(property).collect::<Map<_, _>>()}),
            ),
        ),
        (
            "many choices",
            Grammar::json_schema(
                json!({"enum": (0..15_000).map(|i| format!("choice {i}")).collect::<Vec<_>>()}),
            ),
        ),
        (
            "a chain of references",
            Grammar::json_schema(json!({"$ref": "#/$defs/d249", "$defs": chain})),
        ),
        ("deep objects", Grammar::json_schema(deep)),
        (
            "repetitions of repetitions",
            Grammar::regex("((a{1000}){1000}){1000}"),
        ),
        (
            "choices of repetitions",
            Grammar::regex("(a{1,1000}b{1,1000}|(ab?){1,1000}){1,1000}c"),
        ),
        (
            "a pattern with a far look back",
            Grammar::json_schema(
                json!({"type": "string", "pattern": "^(.*a.{200})$", "maxLength": 100_000}),
            ),
        ),
        (
            "brackets",
            Grammar::regex(&format!("{}a{}", "(".repeat(240), ")".repeat(240))),
        ),
        (
            "rules that lead to rules",
            Grammar::lark(format!("start: r0\n{rules}r1900: \"y\"\n")),
        ),
        (
            "terminals that lead to terminals",
            Grammar::lark(format!("start: T0\n{terminals}T1900: \"z\"\n")),
        ),
        (
            "ambiguity",
            Grammar::lark("start: start start | \"a\" | \"\"".into()),
        ),
        (
            "numbers with many bounds",
            Grammar::json_schema(
                json!({"type": "number", "minimum": 1e-300, "maximum": 1e300, "multipleOf": 0.000_001}),
            ),
        ),
    ];
    for (why, grammar) in bombs {
        let started = Instant::now();
        let grammar = grammar.unwrap_or_else(|e| panic!("{why} is let through: {e}"));
        let compiled = bench.run(move |compiler| compiler.compile_here(&grammar));
        let took = started.elapsed();
        let said = match compiled {
            Ok(compiled) => {
                let (mut matcher, mut chance) = (compiled.matcher(&[]), Chance::new(1));
                let mut n = 0;
                let mut allowed = vec![0; 32];
                let followed = (0..40).try_for_each(|_| {
                    matcher.fill(&mut allowed)?;
                    let ids =
                        (0..1024_u32).filter(|id| allowed[*id as usize / 32] >> (id % 32) & 1 == 1);
                    let ids: Vec<u32> = ids.collect();
                    n += 1;
                    matcher.advance(ids[chance.below(ids.len())])
                });
                format!("{n} steps, {followed:?}")
            }
            Err(error) => error.to_string(),
        };
        println!(
            "{why}: compiled in {took:?}, all in {:?}: {said}",
            started.elapsed()
        );
        assert!(
            started.elapsed() < Duration::from_secs(20),
            "{why}: {:?}",
            started.elapsed()
        );
    }
}

impl Bench {
    /// On a thread as the compiler's own are, whose stack is large.
    fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce(GrammarCompiler) -> T + Send + 'static,
    ) -> T {
        let compiler = self.compiler.clone();
        let thread = std::thread::Builder::new().stack_size(256 << 20);
        thread
            .spawn(move || work(compiler))
            .unwrap()
            .join()
            .unwrap()
    }
}

#[tokio::test]
async fn a_grammar_is_compiled_once() {
    let bench = bench("byte_level");
    let grammar = |i: usize| Grammar::choice(&[i.to_string()]).unwrap();
    let first = bench.compiler.compile(grammar(0)).await.unwrap();
    assert!(
        bench.compiler.compile(grammar(0)).await.unwrap() == first,
        "found"
    );
    for i in 1..100 {
        bench.compiler.compile(grammar(i)).await.unwrap();
    }
    assert!(
        bench.compiler.compile(grammar(0)).await.unwrap() != first,
        "forgotten"
    );
    let error = bench
        .compiler
        .compile(Grammar::lark("start: x".into()).unwrap())
        .await;
    assert!(matches!(error, Err(GrammarError::Invalid(_))), "{error:?}");
}
