//! Answers that are held to a grammar, and tool calls, as clients see them: a real process with the demo model. At a temperature
//! this high its weights say nothing any more: it is a model of random weights.

#![allow(clippy::unwrap_used)] // A test's helpers, outside of #[test] functions.

mod client;

use client::Server;
use schemas::{judge, schema};
use serde_json::{Value, json};

#[path = "support/schemas.rs"]
mod schemas;

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";
const TEMPERATURE: f64 = 1e6;

fn question() -> Value {
    json!([{"role": "user", "content": "What is a block table?"}])
}

fn with(mut body: Value, more: Value) -> Value {
    let more = more.as_object().unwrap().clone();
    body.as_object_mut().unwrap().extend(more);
    body
}

/// The first choice of an answer, which is a 200.
fn choice(server: &Server, path: &str, body: &Value) -> Value {
    let (status, answer) = server.post(path, body);
    assert_eq!(status, 200, "{body}: {answer}");
    answer["choices"][0].clone()
}

fn refused(server: &Server, path: &str, body: &Value) -> (String, String) {
    let (status, answer) = server.post(path, body);
    assert_eq!(status, 400, "{body}: {answer}");
    let text = |field: &str| {
        answer["error"][field]
            .as_str()
            .unwrap_or_default()
            .to_owned()
    };
    (text("param"), text("message"))
}

/// `KVASIR_SCHEMAS=500 cargo test --release -p kvasir-server --test structured schemas` asks for as many.
#[test]
fn random_schemas_are_fitted_by_random_weights() {
    let n: u64 = std::env::var("KVASIR_SCHEMAS").map_or(40, |n| n.parse().unwrap());
    let server = Server::start(&[]);
    let ask = |seed: u64| {
        let schema = schema(seed);
        let format = json!({"type": "json_schema", "json_schema": {"name": "s", "schema": schema, "strict": true}});
        let body = json!({"messages": question(), "response_format": format, "temperature": TEMPERATURE, "seed": seed});
        let choice = choice(&server, CHAT, &body);
        assert_eq!(choice["finish_reason"], "stop", "{seed}: {choice}");
        let text = choice["message"]["content"].as_str().unwrap();
        let value: Value =
            serde_json::from_str(text).unwrap_or_else(|e| panic!("{seed}: {e}: {text}"));
        judge(&schema, &value).unwrap_or_else(|e| panic!("{seed}: {e}: {text}\n{schema}"));
    };
    // Several at once, as they come in life.
    std::thread::scope(|scope| {
        for first in 0..4 {
            scope.spawn(move || (first..n).step_by(4).for_each(ask));
        }
    });
    server.wait_for_load("nothing is left", |load| load["blocks"]["active"] == 0);
}

#[test]
fn every_way_to_ask_is_enforced_in_both_interfaces() {
    let server = Server::start(&[]);
    let shared = json!({"temperature": TEMPERATURE, "seed": 4, "max_tokens": 200});
    for (asked, fits) in [
        (
            json!({"structured_outputs": {"regex": "[a-c]{3}-[0-9]{2}"}}),
            "a shape",
        ),
        (json!({"guided_regex": "[a-c]{3}-[0-9]{2}"}), "a shape"),
        (
            json!({"structured_outputs": {"choice": ["active", "cached", "free"]}}),
            "a state",
        ),
        (
            json!({"guided_choice": ["active", "cached", "free"]}),
            "a state",
        ),
        (
            json!({"guided_grammar": "start: \"<\" (\"x\" | start){1,2} \">\""}),
            "brackets",
        ),
        (
            json!({"structured_outputs": {"json": {"type": "object", "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 9}}, "required": ["a"], "additionalProperties": false}}}),
            "an object",
        ),
        (
            json!({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "array", "items": {"enum": ["x"]}, "maxItems": 3}}}}),
            "a list",
        ),
    ] {
        let body = with(shared.clone(), asked);
        let whole = choice(
            &server,
            CHAT,
            &with(body.clone(), json!({"messages": question()})),
        );
        let completed = choice(
            &server,
            COMPLETIONS,
            &with(body.clone(), json!({"prompt": "A block"})),
        );
        let events = server
            .open(
                "POST",
                CHAT,
                &with(
                    body.clone(),
                    json!({"messages": question(), "stream": true}),
                )
                .to_string(),
            )
            .events();
        let streamed: String = events
            .iter()
            .filter_map(|e| e["choices"][0]["delta"]["content"].as_str())
            .collect();
        assert_eq!(whole["message"]["content"], streamed, "{body}");
        for (text, reason) in [
            (&whole["message"]["content"], &whole["finish_reason"]),
            (&completed["text"], &completed["finish_reason"]),
        ] {
            let (text, json) = (
                text.as_str().unwrap(),
                serde_json::from_str::<Value>(text.as_str().unwrap()),
            );
            let is_so = match fits {
                "a shape" => {
                    text.len() == 6 && text.as_bytes()[3] == b'-' && text[4..].parse::<u8>().is_ok()
                }
                "a state" => ["active", "cached", "free"].contains(&text),
                "brackets" => {
                    text.starts_with('<') && text.matches('<').count() == text.matches('>').count()
                }
                "an object" => json.unwrap()["a"].as_u64().unwrap() < 10,
                _ => json.unwrap().as_array().unwrap().len() <= 3,
            };
            assert!(
                is_so && reason == "stop",
                "{body}: {text:?} is not {fits}: {reason}"
            );
        }
    }
    // An object may go on for long: it is cut where anything else is.
    let body = with(
        shared,
        json!({"messages": question(), "response_format": {"type": "json_object"}, "max_tokens": 3}),
    );
    let cut = choice(&server, CHAT, &body);
    assert!(
        cut["message"]["content"].as_str().unwrap().starts_with('{')
            && cut["finish_reason"] == "length",
        "{cut}"
    );
}

/// Each sequence has its own place in its grammar, in company, with several choices of one prompt, and preempted.
#[test]
fn an_answer_is_the_same_in_a_crowd() {
    let schema = |i: u64| {
        json!({"type": "object", "properties": {"id": {"const": i}, "name": {"type": "string", "minLength": 20, "maxLength": 30},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 4}, "minItems": 3, "maxItems": 4}}, "required": ["id", "name", "tags"], "additionalProperties": false})
    };
    let body = |i: u64, n: u64| {
        json!({"messages": question(), "temperature": TEMPERATURE, "max_tokens": 110, "seed": 10 * i, "n": n,
        "structured_outputs": {"json": schema(i)}})
    };
    // Blocks for 256 tokens: each sequence has about a hundred.
    let tight = Server::start(&["--block-size", "1", "--max-model-len", "250"]);
    let alone: Vec<Vec<Value>> = (0..6)
        .map(|i| {
            let one = |j: u64| {
                choice(&tight, CHAT, &with(body(i, 1), json!({"seed": 10 * i + j})))["message"]
                        ["content"]
                        .clone()
            };
            (0..2).map(one).collect()
        })
        .collect();
    let crowd: Vec<Vec<Value>> = std::thread::scope(|scope| {
        let ask = |i| {
            scope.spawn({
                let (tight, body) = (&tight, &body);
                move || {
                    let (status, answer) = tight.post(CHAT, &body(i, 2));
                    assert_eq!(status, 200, "{answer}");
                    answer["choices"]
                        .as_array()
                        .unwrap()
                        .iter()
                        .map(|c| c["message"]["content"].clone())
                        .collect::<Vec<_>>()
                }
            })
        };
        let asked: Vec<_> = (0..6).map(ask).collect();
        asked.into_iter().map(|one| one.join().unwrap()).collect()
    });
    assert_eq!(crowd, alone);
    assert!(
        tight.metric("vllm:num_preemptions_total") > 0.0,
        "the blocks were too few for all at once"
    );
}

#[test]
fn what_cannot_be_enforced_is_refused_by_name() {
    let server = Server::start(&[]);
    let format = |schema: Value| json!({"response_format": {"type": "json_schema", "json_schema": {"schema": schema}}});
    let schema_field = "response_format.json_schema.schema";
    for (asked, param, part) in [
        (
            format(json!({"type": "object", "patternProperties": {"a": {"not": {}}}})),
            schema_field,
            "not is not supported",
        ),
        (
            format(json!({"type": "array", "uniqueItems": true})),
            schema_field,
            "uniqueItems is not supported",
        ),
        (
            format(json!({"oneOf": [{"type": "integer"}, {"type": "number"}]})),
            schema_field,
            "oneOf",
        ),
        (
            format((0..70).fold(json!({}), |inner, _| json!({"items": inner}))),
            schema_field,
            "inside each other",
        ),
        (
            format(json!({"enum": (0..30_000).collect::<Vec<_>>()})),
            schema_field,
            "values of the schema: 30002",
        ),
        (
            json!({"guided_regex": "(a"}),
            "guided_regex",
            "unclosed group",
        ),
        (
            json!({"guided_grammar": "start: nothing"}),
            "guided_grammar",
            "nothing",
        ),
        (
            json!({"structured_outputs": {"regex": "a", "json": {}}}),
            "structured_outputs",
            "more than one",
        ),
        (
            json!({"guided_regex": "a", "min_tokens": 2}),
            "min_tokens",
            "held to a grammar",
        ),
        (
            json!({"guided_regex": "a", "bad_words": ["a"]}),
            "bad_words",
            "held to a grammar",
        ),
        (
            json!({"guided_regex": "a", "allowed_token_ids": [5]}),
            "allowed_token_ids",
            "held to a grammar",
        ),
        (
            json!({"guided_regex": "a", "use_beam_search": true, "n": 2}),
            "guided_regex",
            "beams",
        ),
    ] {
        for (path, prompt) in [
            (CHAT, json!({"messages": question()})),
            (COMPLETIONS, json!({"prompt": "x"})),
        ] {
            let (found, message) = refused(&server, path, &with(prompt, asked.clone()));
            assert!(
                found == param && message.contains(part),
                "{asked}: {found}: {message}"
            );
        }
    }
}

fn tools() -> Value {
    json!([
        {"type": "function", "function": {"name": "scale", "description": "Sets the replicas.", "parameters": {"type": "object",
            "properties": {"n": {"type": "integer", "minimum": 1, "maximum": 9}, "why": {"type": "string", "maxLength": 8}}, "required": ["n"], "additionalProperties": false}}},
        {"type": "function", "function": {"name": "drain"}},
    ])
}

/// The calls of a stream, put together as clients do it: name, arguments.
fn streamed_calls(events: &[Value]) -> Vec<(String, String)> {
    let mut calls = Vec::<(String, String)>::new();
    for delta in events
        .iter()
        .filter_map(|e| e["choices"][0]["delta"]["tool_calls"].as_array())
        .flatten()
    {
        let index = delta["index"].as_u64().unwrap() as usize;
        if index == calls.len() {
            assert!(
                delta["id"].is_string() && delta["type"] == "function",
                "{delta}"
            );
            calls.push((
                delta["function"]["name"].as_str().unwrap().to_owned(),
                String::new(),
            ));
        }
        calls[index]
            .1
            .push_str(delta["function"]["arguments"].as_str().unwrap());
    }
    calls
}

#[test]
fn calls_that_are_asked_for_come_and_fit_their_schemas() {
    // By the model's own format, and by the one for models without any.
    for flags in [
        &[] as &[&str],
        &["--tool-call-parser", "none"],
        &["--tool-call-parser", "llama3_json"],
        &["--tool-call-parser", "mistral"],
    ] {
        let server = Server::start(flags);
        for seed in 0..4 {
            let base = json!({"messages": question(), "tools": tools(), "temperature": TEMPERATURE, "seed": seed});
            for (choice_of_tools, parallel) in [
                (json!("required"), false),
                (
                    json!({"type": "function", "function": {"name": "scale"}}),
                    true,
                ),
            ] {
                let body = with(
                    base.clone(),
                    json!({"tool_choice": choice_of_tools, "parallel_tool_calls": parallel}),
                );
                let whole = choice(&server, CHAT, &body);
                let message = &whole["message"];
                let calls = message["tool_calls"]
                    .as_array()
                    .unwrap_or_else(|| panic!("{flags:?}: {whole}"));
                let reason = if parallel { "stop" } else { "tool_calls" };
                assert!(
                    message["content"].is_null() && whole["finish_reason"] == reason,
                    "{flags:?}: {whole}"
                );
                assert_eq!(calls.len(), 1, "{whole}");
                let function = &calls[0]["function"];
                let arguments: Value =
                    serde_json::from_str(function["arguments"].as_str().unwrap()).unwrap();
                match function["name"].as_str().unwrap() {
                    "scale" => judge(&tools()[0]["function"]["parameters"], &arguments).unwrap(),
                    name => assert!(
                        name == "drain" && !parallel && arguments == json!({}),
                        "{whole}"
                    ),
                }
                let events = server
                    .open(
                        "POST",
                        CHAT,
                        &with(body, json!({"stream": true})).to_string(),
                    )
                    .events();
                let want = (
                    function["name"].as_str().unwrap().to_owned(),
                    function["arguments"].as_str().unwrap().to_owned(),
                );
                assert_eq!(streamed_calls(&events), [want], "{flags:?}");
                let content: String = events
                    .iter()
                    .filter_map(|e| e["choices"][0]["delta"]["content"].as_str())
                    .collect();
                assert_eq!(content, "");
                let last = events
                    .iter()
                    .filter_map(|e| e["choices"][0]["finish_reason"].as_str())
                    .next_back();
                assert_eq!(last, Some(reason));
            }
        }
        let several = json!({"messages": question(), "tools": tools(), "temperature": TEMPERATURE, "tool_choice": "required", "n": 4, "seed": 1, "max_tokens": 400});
        let (_, answer) = server.post(CHAT, &several);
        let ids: std::collections::BTreeSet<&str> = answer["choices"]
            .as_array()
            .unwrap()
            .iter()
            .flat_map(|c| c["message"]["tool_calls"].as_array().unwrap())
            .map(|call| call["id"].as_str().unwrap())
            .collect();
        let n: usize = answer["choices"]
            .as_array()
            .unwrap()
            .iter()
            .map(|c| c["message"]["tool_calls"].as_array().unwrap().len())
            .sum();
        assert!(n >= 4 && ids.len() == n, "{answer}");
    }
}

/// Content, and the names of the calls.
fn said(choice: &Value) -> (Option<String>, Vec<String>) {
    let message = &choice["message"];
    let calls = message["tool_calls"].as_array().into_iter().flatten();
    let name = |call: &Value| call["function"]["name"].as_str().unwrap().to_owned();
    (
        message["content"].as_str().map(str::to_owned),
        calls.map(name).collect(),
    )
}

fn streamed(events: &[Value], field: &str) -> String {
    let deltas = events
        .iter()
        .filter_map(|e| e["choices"][0]["delta"][field].as_str());
    deltas.collect()
}

#[test]
fn what_a_model_writes_by_itself_is_taken_apart() {
    // Answers can't be held to this format: the text is what it is held to, whatever the model would say.
    let server = Server::start(&["--tool-call-parser", "qwen3_coder"]);
    let call =
        "<tool_call>\n<function=scale>\n<parameter=n>\n3\n</parameter>\n</function>\n</tool_call>";
    let some = |text: &str| Some(text.to_owned());
    for (why, text, more, content, calls) in [
        (
            "a call alone",
            call.to_owned(),
            json!({"tools": tools()}),
            None,
            vec!["scale"],
        ),
        (
            "a call beside text",
            format!("I scale. {call} So."),
            json!({"tools": tools()}),
            some("I scale. So."),
            vec!["scale"],
        ),
        (
            "two calls",
            format!("{call}\n{call}"),
            json!({"tools": tools()}),
            None,
            vec!["scale", "scale"],
        ),
        (
            "one at most",
            format!("{call}\n{call}"),
            json!({"tools": tools(), "parallel_tool_calls": false}),
            None,
            vec!["scale"],
        ),
        (
            "no tools are given",
            call.to_owned(),
            json!({}),
            some(call),
            vec![],
        ),
        (
            "none is to be called",
            call.to_owned(),
            json!({"tools": tools(), "tool_choice": "none"}),
            some(call),
            vec![],
        ),
        (
            "a call that is broken",
            "<tool_call>scale(3)".to_owned(),
            json!({"tools": tools()}),
            some("<tool_call>scale(3)"),
            vec![],
        ),
    ] {
        let body = with(
            json!({"messages": question(), "structured_outputs": {"choice": [text]}}),
            more,
        );
        let whole = choice(&server, CHAT, &body);
        let names: Vec<String> = calls.iter().map(|name| (*name).to_owned()).collect();
        assert_eq!(
            said(&whole),
            (content.clone(), names.clone()),
            "{why}: {whole}"
        );
        let reason = if calls.is_empty() {
            "stop"
        } else {
            "tool_calls"
        };
        assert_eq!(whole["finish_reason"], reason, "{why}");
        let events = server
            .open(
                "POST",
                CHAT,
                &with(body, json!({"stream": true})).to_string(),
            )
            .events();
        assert_eq!(
            streamed(&events, "content"),
            content.unwrap_or_default(),
            "{why}"
        );
        let streamed = streamed_calls(&events);
        assert!(
            streamed
                .iter()
                .all(|(_, arguments)| arguments == "{\"n\": 3}"),
            "{why}: {streamed:?}"
        );
        assert_eq!(
            streamed
                .into_iter()
                .map(|(name, _)| name)
                .collect::<Vec<_>>(),
            names,
            "{why}"
        );
    }
}

#[test]
fn reasoning_comes_apart_and_the_answer_behind_it_is_held() {
    let server = Server::start(&["--reasoning-parser", "think"]);
    let body = json!({"messages": [question()[0], {"role": "assistant", "content": "<think>"}], "continue_final_message": true,
        "structured_outputs": {"choice": ["Yes."]}, "temperature": TEMPERATURE, "max_tokens": 40, "seed": 1});
    let whole = choice(&server, CHAT, &body);
    let message = &whole["message"];
    let reasoning = message["reasoning"].as_str().unwrap_or_default();
    assert!(
        !reasoning.is_empty() && message["reasoning_content"] == message["reasoning"],
        "{whole}"
    );
    // By chance it may come to its end.
    assert!(
        ["", "Yes."].contains(&message["content"].as_str().unwrap()),
        "{whole}"
    );
    let events = server
        .open(
            "POST",
            CHAT,
            &with(body.clone(), json!({"stream": true})).to_string(),
        )
        .events();
    assert_eq!(streamed(&events, "reasoning"), reasoning);
    assert_eq!(streamed(&events, "reasoning_content"), reasoning);
    let hidden = choice(
        &server,
        CHAT,
        &with(body.clone(), json!({"include_reasoning": false})),
    );
    assert!(
        hidden["message"]["reasoning"].is_null()
            && hidden["message"]["content"] == message["content"],
        "{hidden}"
    );
    // Behind the end of reasoning there is none.
    let behind = with(
        body,
        json!({"messages": [question()[0], {"role": "assistant", "content": "<think>\n\n</think>"}]}),
    );
    let answer = choice(&server, CHAT, &behind);
    assert_eq!(
        (&answer["message"]["content"], &answer["finish_reason"]),
        (&json!("Yes."), &json!("stop"))
    );
}

/// The first part of a stream, its tokens, and what another server sends behind it.
#[test]
fn a_call_that_broke_off_goes_on_where_it_was() {
    let server = Server::start(&[]);
    let body = json!({"messages": question(), "tools": tools(), "tool_choice": "required", "parallel_tool_calls": false,
        "temperature": TEMPERATURE, "seed": 6, "stream": true, "return_token_ids": true});
    let events = server.open("POST", CHAT, &body.to_string()).events();
    let ids_of = |event: &Value| {
        let ids = event["choices"][0]["token_ids"].as_array().cloned();
        ids.unwrap_or_default()
    };
    let whole = streamed_calls(&events);
    let id = &whole[0].0;
    assert!(!id.is_empty() && events.len() > 8, "{events:?}");
    for n_events in [2, events.len() / 2, events.len() - 3] {
        let ids: Vec<Value> = events[..n_events].iter().flat_map(ids_of).collect();
        let resume =
            json!({"id": events[0]["id"], "created": events[0]["created"], "choices": [ids]});
        let resumed = with(body.clone(), json!({"kvasir_resume": resume}));
        let rest = server.open("POST", CHAT, &resumed.to_string()).events();
        assert!(rest.len() < events.len() && rest[0]["id"] == events[0]["id"]);
        let joined: Vec<Value> = events[..n_events].iter().chain(&rest).cloned().collect();
        assert_eq!(streamed_calls(&joined), whole, "from event {n_events} on");
    }
}

#[test]
fn a_conversation_with_calls_goes_back_to_the_model() {
    let server = Server::start(&[]);
    let call = json!({"id": "call_1", "type": "function", "function": {"name": "scale", "arguments": "{\"n\": 3, \"why\": \"é\"}"}});
    let messages = json!([
        {"role": "user", "content": "Scale it."},
        {"role": "assistant", "content": null, "refusal": null, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "done"}]},
    ]);
    let text = |body: Value| {
        let (status, answer) =
            server.post("/tokenize", &with(body, json!({"return_token_strs": true})));
        assert_eq!(status, 200, "{answer}");
        let pieces = answer["token_strs"].as_array().unwrap().iter();
        pieces
            .map(|piece| piece.as_str().unwrap())
            .collect::<String>()
    };
    let shown = text(json!({"messages": messages, "tools": tools()}));
    for part in [
        "{\"type\": \"function\", \"function\": {\"name\": \"drain\"}}",
        "<tool_call>\n{\"name\": \"scale\", \"arguments\": {\"n\": 3, \"why\": \"",
        "<tool_response>\ndone\n</tool_response>",
    ] {
        assert!(shown.contains(part), "no {part} in {shown}");
    }
    assert!(!text(json!({"messages": messages})).contains("drain"));
    let (param, message) = refused(
        &server,
        CHAT,
        &json!({"messages": question(), "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "not": {}}}}], "tool_choice": "required"}),
    );
    assert!(
        param == "tools" && message.contains("not is not supported"),
        "{param}: {message}"
    );
}
