//! Every parser on whole answers, cut in every way.

use proptest::prelude::*;
use serde_json::{Value, json};

use super::json_call::append;
use super::*;

/// Content, and name and arguments of each call.
type Outcome = (String, Vec<(String, String)>);

fn types() -> Arc<ParameterTypes> {
    let of = |names: &[(&str, &str)]| {
        let pairs = names
            .iter()
            .map(|(name, kind)| (name.to_string(), kind.to_string()));
        pairs.collect::<HashMap<_, _>>()
    };
    let search = of(&[
        ("q", "string"),
        ("n", "integer"),
        ("deep", "boolean"),
        ("at", "object"),
    ]);
    Arc::new(HashMap::from([("search".to_owned(), search)]))
}

fn parse<'a>(format: ToolCallFormat, pieces: impl IntoIterator<Item = &'a str>) -> Vec<ToolEvent> {
    let mut parser = format.parser(&types());
    let (mut events, mut merged) = (Vec::new(), Vec::new());
    for piece in pieces {
        parser.push(piece, &mut events);
    }
    parser.finish(&mut events);
    for event in events {
        append(event, &mut merged);
    }
    merged
}

fn outcome(events: Vec<ToolEvent>) -> Outcome {
    let (mut content, mut calls) = (String::new(), Vec::<(String, String)>::new());
    for event in events {
        match event {
            ToolEvent::Content(text) => content += &text,
            ToolEvent::Call { name } => calls.push((name, String::new())),
            ToolEvent::Arguments(text) => calls.last_mut().unwrap().1 += &text,
        }
    }
    (content, calls)
}

struct Case {
    why: &'static str,
    format: ToolCallFormat,
    text: &'static str,
    content: &'static str,
    calls: &'static [(&'static str, &'static str)],
}

use ToolCallFormat::{Hermes, Json, Llama3Json, Mistral, Phi4Mini, Pythonic, Qwen3Coder};

const fn case(
    why: &'static str,
    format: ToolCallFormat,
    text: &'static str,
    content: &'static str,
    calls: &'static [(&'static str, &'static str)],
) -> Case {
    Case {
        why,
        format,
        text,
        content,
        calls,
    }
}

const CASES: &[Case] = &[
    case(
        "text alone",
        Hermes,
        "a < b <tool> \n",
        "a < b <tool> \n",
        &[],
    ),
    case(
        "one call",
        Hermes,
        "<tool_call>\n{\"name\": \"f\", \"arguments\": {\"a\": \"}\\\"é\", \"b\": [1, {}]}}\n</tool_call>",
        "",
        &[("f", "{\"a\": \"}\\\"é\", \"b\": [1, {}]}")],
    ),
    case(
        "text around calls",
        Hermes,
        "So:\n\n<tool_call>{\"name\": \"f\", \"arguments\": {}}</tool_call>\n<tool_call>{\"name\":\"g\"}</tool_call> Then.",
        "So: Then.",
        &[("f", "{}"), ("g", "{}")],
    ),
    case(
        "arguments first",
        Hermes,
        "<tool_call>{\"arguments\": {\"a\": 1}, \"name\": \"f\"}</tool_call>",
        "",
        &[("f", "{\"a\": 1}")],
    ),
    case(
        "arguments in a string",
        Hermes,
        "<tool_call>{\"name\": \"f\", \"arguments\": \"{\\\"a\\\": 1}\"}</tool_call>",
        "",
        &[("f", "{\"a\": 1}")],
    ),
    case(
        "arguments null",
        Hermes,
        "<tool_call>{\"type\": \"function\", \"name\": \"f\", \"arguments\": null}</tool_call>",
        "",
        &[("f", "{}")],
    ),
    case(
        "no closing tag",
        Hermes,
        "<tool_call>{\"name\": \"f\", \"arguments\": {}}<tool_call>{\"name\": \"g\", \"arguments\": {}}",
        "",
        &[("f", "{}"), ("g", "{}")],
    ),
    case(
        "not a call",
        Hermes,
        "<tool_call>none</tool_call> x",
        "<tool_call>none</tool_call> x",
        &[],
    ),
    case(
        "another object",
        Hermes,
        "<tool_call>{\"city\": 1}</tool_call>",
        "<tool_call>{\"city\": 1}</tool_call>",
        &[],
    ),
    case(
        "cut before its name",
        Hermes,
        "a <tool_call>{\"name\": \"fu",
        "a <tool_call>{\"name\": \"fu",
        &[],
    ),
    case(
        "cut in its arguments",
        Hermes,
        "<tool_call>{\"name\": \"f\", \"arguments\": {\"a\": \"x",
        "",
        &[("f", "{\"a\": \"x")],
    ),
    case(
        "wrong brackets",
        Hermes,
        "<tool_call>{\"name\": \"f\", \"arguments\": {\"a\": 1]}",
        "]}",
        &[("f", "{\"a\": 1")],
    ),
    case(
        "a call behind a broken one",
        Hermes,
        "<tool_call>{name}<tool_call>{\"name\": \"f\"}",
        "<tool_call>{name}",
        &[("f", "{}")],
    ),
    case(
        "a mark cut off",
        Hermes,
        "yes <tool_ca",
        "yes <tool_ca",
        &[],
    ),
    case(
        "a name with escapes",
        Hermes,
        "<tool_call>{\"name\": \"f\\u0041\"}</tool_call>",
        "",
        &[("fA", "{}")],
    ),
    case(
        "one call",
        Llama3Json,
        "{\"name\": \"f\", \"parameters\": {\"a\": 1}}",
        "",
        &[("f", "{\"a\": 1}")],
    ),
    case(
        "behind the mark, several",
        Llama3Json,
        "<|python_tag|>{\"name\": \"f\", \"parameters\": {}}; {\"name\": \"g\", \"parameters\": {\"x\": \";\"}}",
        "",
        &[("f", "{}"), ("g", "{\"x\": \";\"}")],
    ),
    case(
        "text",
        Llama3Json,
        " Hello {\"name\": \"f\"}",
        " Hello {\"name\": \"f\"}",
        &[],
    ),
    case(
        "code behind the mark",
        Llama3Json,
        "<|python_tag|>print(1)",
        "<|python_tag|>print(1)",
        &[],
    ),
    case(
        "JSON that is no call",
        Llama3Json,
        "{\"city\": {\"name\": \"x\"}}",
        "{\"city\": {\"name\": \"x\"}}",
        &[],
    ),
    case(
        "text behind a call",
        Llama3Json,
        "{\"name\": \"f\", \"parameters\": {}}\nDone; yes.",
        "Done; yes.",
        &[("f", "{}")],
    ),
    case(
        "a semicolon without a call",
        Llama3Json,
        "{\"name\": \"f\"}; so",
        "; so",
        &[("f", "{}")],
    ),
    case(
        "a list",
        Mistral,
        "[TOOL_CALLS] [{\"name\": \"f\", \"arguments\": {\"a\": 1}}, {\"name\": \"g\", \"arguments\": {}}]",
        "",
        &[("f", "{\"a\": 1}"), ("g", "{}")],
    ),
    case(
        "text before",
        Mistral,
        "I look. [TOOL_CALLS][{\"name\": \"f\", \"arguments\": {}}]",
        "I look.",
        &[("f", "{}")],
    ),
    case(
        "the newer form",
        Mistral,
        "[TOOL_CALLS]f[ARGS]{\"a\": \"]}\"}[TOOL_CALLS]g_2[CALL_ID]abc123def[ARGS]{}",
        "",
        &[("f", "{\"a\": \"]}\"}"), ("g_2", "{}")],
    ),
    case(
        "a name and an object",
        Mistral,
        "[TOOL_CALLS]f{\"a\": {\"b\": 2}} ",
        "",
        &[("f", "{\"a\": {\"b\": 2}}")],
    ),
    case(
        "nothing behind the mark",
        Mistral,
        "[TOOL_CALLS] ",
        "[TOOL_CALLS] ",
        &[],
    ),
    case(
        "no name",
        Mistral,
        "x [TOOL_CALLS]f and g",
        "x [TOOL_CALLS]f and g",
        &[],
    ),
    case(
        "the list goes on as text",
        Mistral,
        "[TOOL_CALLS][{\"name\": \"f\", \"arguments\": {}}, no]",
        ", no]",
        &[("f", "{}")],
    ),
    case(
        "an empty list",
        Mistral,
        "[TOOL_CALLS][]",
        "[TOOL_CALLS][]",
        &[],
    ),
    case(
        "cut in the list",
        Mistral,
        "[TOOL_CALLS][{\"name\": \"f\", \"arguments\": {}}, {\"na",
        ", {\"na",
        &[("f", "{}")],
    ),
    case(
        "between marks",
        Phi4Mini,
        "Ok.<|tool_call|>[{\"name\": \"f\", \"arguments\": {}}]<|/tool_call|>",
        "Ok.",
        &[("f", "{}")],
    ),
    case(
        "the whole answer",
        Json,
        " [{\"name\": \"f\", \"parameters\": {\"a\": [1]}},\n{\"name\": \"g\", \"parameters\": {}}]",
        "",
        &[("f", "{\"a\": [1]}"), ("g", "{}")],
    ),
    case("a list of something else", Json, "[1, 2]", "[1, 2]", &[]),
    case(
        "text",
        Json,
        "no [{\"name\": \"f\"}]",
        "no [{\"name\": \"f\"}]",
        &[],
    ),
    case(
        "several",
        Pythonic,
        "[f(a=1, b='x, y)', c=[1, {'k': None}], d=True), g()]",
        "",
        &[
            (
                "f",
                "{\"a\": 1, \"b\": \"x, y)\", \"c\": [1,{\"k\":null}], \"d\": true}",
            ),
            ("g", "{}"),
        ],
    ),
    case(
        "escapes",
        Pythonic,
        "[a.b(t=\"q\\\"\\n\\u00e9\", u=-2.5e3)]",
        "",
        &[("a.b", "{\"t\": \"q\\\"\\né\", \"u\": -2500.0}")],
    ),
    case(
        "what is no literal is a string",
        Pythonic,
        "[f(a=x+1)]",
        "",
        &[("f", "{\"a\": \"x+1\"}")],
    ),
    case(
        "a list of something else",
        Pythonic,
        "[1, 2] and [f(a=1)]",
        "[1, 2] and [f(a=1)]",
        &[],
    ),
    case("text", Pythonic, "Hello [f()]", "Hello [f()]", &[]),
    case(
        "cut in an argument",
        Pythonic,
        "[f(a=1, b=\"x",
        " b=\"x",
        &[("f", "{\"a\": 1")],
    ),
    case(
        "text behind",
        Pythonic,
        "[f()] Done.",
        " Done.",
        &[("f", "{}")],
    ),
    case(
        "typed by the schema",
        Qwen3Coder,
        "<tool_call>\n<function=search>\n<parameter=q>\n12 < 13\n\n</parameter>\n<parameter=n>\n3\n</parameter>\n<parameter=deep>\nTrue\n</parameter>\n<parameter=at>\n{\"x\": [1]}\n</parameter>\n</function>\n</tool_call>",
        "",
        &[(
            "search",
            "{\"q\": \"12 < 13\\n\", \"n\": 3, \"deep\": true, \"at\": {\"x\": [1]}}",
        )],
    ),
    case(
        "of an unknown function",
        Qwen3Coder,
        "Hm.\n<tool_call><function=g><parameter=a>1</parameter><parameter=b>x y</parameter></function></tool_call>",
        "Hm.",
        &[("g", "{\"a\": 1, \"b\": \"x y\"}")],
    ),
    case(
        "several",
        Qwen3Coder,
        "<tool_call><function=g></function></tool_call>\n<tool_call><function=h></function></tool_call>",
        "",
        &[("g", "{}"), ("h", "{}")],
    ),
    case(
        "not a call",
        Qwen3Coder,
        "<tool_call> {\"name\": 1} ",
        "<tool_call> {\"name\": 1} ",
        &[],
    ),
    case(
        "cut in a parameter",
        Qwen3Coder,
        "<tool_call><function=g><parameter=a>1</parameter><parameter=b>x",
        "<parameter=b>x",
        &[("g", "{\"a\": 1")],
    ),
    case(
        "text in a function",
        Qwen3Coder,
        "<tool_call><function=g>so</function>",
        "so</function>",
        &[("g", "")],
    ),
];

#[test]
fn calls_and_content_are_told_apart_however_the_text_is_cut() {
    for Case {
        why,
        format,
        text,
        content,
        calls,
    } in CASES
    {
        let whole = parse(*format, [*text]);
        let want: Outcome = (
            content.to_string(),
            calls
                .iter()
                .map(|(name, arguments)| (name.to_string(), arguments.to_string()))
                .collect(),
        );
        assert_eq!(outcome(whole.clone()), want, "{format:?}: {why}");
        for (at, _) in text.char_indices() {
            assert_eq!(
                parse(*format, [&text[..at], &text[at..]]),
                whole,
                "{format:?}: {why}: cut at {at}"
            );
        }
        let mut buffer = [0; 4];
        let characters: Vec<String> = text
            .chars()
            .map(|c| c.encode_utf8(&mut buffer).to_owned())
            .collect();
        assert_eq!(
            parse(*format, characters.iter().map(String::as_str)),
            whole,
            "{format:?}: {why}: by characters"
        );
    }
}

#[test]
fn arguments_come_as_they_are_written() {
    for (format, text) in [
        (
            Hermes,
            "<tool_call>{\"name\": \"f\", \"arguments\": {\"text\": \"one two three\"}}</tool_call>",
        ),
        (
            Llama3Json,
            "{\"name\": \"f\", \"parameters\": {\"text\": \"one two three\"}}",
        ),
        (Mistral, "[TOOL_CALLS]f[ARGS]{\"text\": \"one two three\"}"),
    ] {
        let mut parser = format.parser(&types());
        let mut events = Vec::new();
        parser.push(&text[..text.find(" three").unwrap()], &mut events);
        assert_eq!(
            outcome(events),
            (
                String::new(),
                vec![("f".into(), "{\"text\": \"one two".into())]
            ),
            "{format:?}"
        );
    }
}

#[test]
fn a_format_is_known_by_its_template() {
    for (template, want) in [
        ("{{ '<tool_call>' }}", Some(Hermes)),
        ("<tool_call>\n<function=a><parameter=b>", Some(Qwen3Coder)),
        ("{{ '[TOOL_CALLS]' }}", Some(Mistral)),
        ("<|python_tag|>", Some(Llama3Json)),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", None),
    ] {
        assert_eq!(ToolCallFormat::of_template(template), want, "{template}");
    }
}

#[test]
fn literals_become_json() {
    for (literal, want) in [
        ("(1, 2,)", json!([1, 2])),
        (
            "{'a': {'b': [True, None]}}",
            json!({"a": {"b": [true, null]}}),
        ),
        ("'it''s'", json!("'it''s'")),
        ("{1: 2}", json!("{1: 2}")),
        ("1_000", json!("1_000")),
        ("", json!("")),
    ] {
        assert_eq!(pythonic::json_of(literal), want, "{literal}");
    }
    let deep = "[".repeat(100_000);
    assert_eq!(pythonic::json_of(&deep), Value::from(deep.as_str()));
}

fn fragments() -> impl Strategy<Value = Vec<&'static str>> {
    proptest::collection::vec(
        prop::sample::select(vec![
            "<tool_call>",
            "</tool_call>",
            "{\"name\": \"f\"",
            "\"arguments\": ",
            "{\"a\": 1}",
            "}",
            ", ",
            "{",
            "]",
            "[",
            " ",
            "\n",
            "x",
            "<|python_tag|>",
            ";",
            "[TOOL_CALLS]",
            "[ARGS]",
            "f(",
            "a=",
            "'y'",
            ")",
            "<function=g>",
            "</function>",
            "<parameter=p>",
            "</parameter>",
            "<|tool_call|>",
            "<|/tool_call|>",
            "\"",
            "\\",
            "é",
            "null",
            "<tool",
            "_call>",
        ]),
        0..24,
    )
}

proptest! {
    /// Whatever a model writes: the same however it is cut, and nothing of it is lost.
    #[test]
    fn any_text_gives_the_same_in_any_pieces(fragments in fragments(), cuts in proptest::collection::vec(any::<prop::sample::Index>(), 0..6)) {
        let text = fragments.concat();
        let ends: Vec<usize> = text.char_indices().map(|(at, _)| at).chain([text.len()]).collect();
        let mut at: Vec<usize> = cuts.iter().map(|cut| ends[cut.index(ends.len())]).collect();
        at.extend([0, text.len()]);
        at.sort_unstable();
        for format in [Hermes, Llama3Json, Pythonic, Mistral, Phi4Mini, Qwen3Coder, Json] {
            let whole = parse(format, [text.as_str()]);
            prop_assert_eq!(&parse(format, at.windows(2).map(|at| &text[at[0]..at[1]])), &whole, "{:?}", format);
            let (content, calls) = outcome(whole);
            if calls.is_empty() {
                prop_assert_eq!(&content, &text, "{:?}", format);
            }
        }
    }
}
