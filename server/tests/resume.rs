//! A stream that broke off goes on elsewhere: with the seed that the answer stated and the tokens that the client has, the
//! rest is the rest of the answer, to the byte. Two servers, the bundled demo model.
#![allow(clippy::unwrap_used)] // A test's helpers, outside of #[test] functions.

mod client;

use client::Server;
use serde_json::{Value, json};

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";

/// What a stream has told of one choice.
#[derive(Clone, Debug, Default, PartialEq)]
struct Told {
    text: String,
    ids: Vec<u64>,
    logprobs: Vec<Value>,
    offsets: Vec<Value>,
    finish: Option<Value>,
}

impl Told {
    fn add(&mut self, choice: &Value) {
        let text = choice["text"]
            .as_str()
            .or(choice["delta"]["content"].as_str());
        self.text += text.unwrap_or_default();
        let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
        self.ids.extend(
            list(&choice["token_ids"])
                .iter()
                .map(|id| id.as_u64().unwrap()),
        );
        self.logprobs.extend(list(&choice["logprobs"]["content"]));
        self.logprobs
            .extend(list(&choice["logprobs"]["token_logprobs"]));
        self.offsets
            .extend(list(&choice["logprobs"]["text_offset"]));
        if !choice["finish_reason"].is_null() {
            assert_eq!(self.finish, None, "told once");
            self.finish = Some(json!([choice["finish_reason"], choice["stop_reason"]]));
        }
    }
}

fn events(server: &Server, path: &str, body: &Value) -> Vec<Value> {
    server.open("POST", path, &body.to_string()).events()
}

/// By choice, what the first `n_events` events told.
fn told(events: &[Value], n_choices: usize) -> Vec<Told> {
    let mut told = vec![Told::default(); n_choices];
    for choice in events.iter().flat_map(|e| e["choices"].as_array().unwrap()) {
        told[choice["index"].as_u64().unwrap() as usize].add(choice);
    }
    told
}

/// Breaks a stream off at every few events, and lets another server go on.
fn breaks_off_and_goes_on(servers: &[Server; 2], path: &str, asked: &Value, n_choices: usize) {
    let whole = events(&servers[0], path, asked);
    let want = told(&whole, n_choices);
    let mut resumed = asked.clone();
    resumed["seed"] = whole[0]["seed"].clone();
    for n_events in (1..whole.len()).step_by(5) {
        let before = told(&whole[..n_events], n_choices);
        let ids: Vec<&Vec<u64>> = before.iter().map(|told| &told.ids).collect();
        resumed["kvasir_resume"] =
            json!({"id": whole[0]["id"], "created": whole[0]["created"], "choices": ids});
        let rest = events(&servers[1], path, &resumed);
        let mut all = before.clone();
        for choice in rest.iter().flat_map(|e| e["choices"].as_array().unwrap()) {
            assert!(choice["delta"]["role"].is_null() && choice["prompt_token_ids"].is_null());
            all[choice["index"].as_u64().unwrap() as usize].add(choice);
        }
        assert_eq!(all, want, "{path}: after {n_events} of {asked}");
        for event in &rest {
            for name in ["id", "created", "seed", "model"] {
                assert_eq!(event[name], whole[0][name], "{name}");
            }
        }
        let usage = |events: &[Value]| events.last().unwrap()["usage"].clone();
        for name in ["prompt_tokens", "completion_tokens", "total_tokens"] {
            assert_eq!(usage(&rest)[name], usage(&whole)[name], "{name}");
        }
    }
}

#[test]
fn the_rest_of_a_broken_stream_is_the_same_elsewhere() {
    let servers = [Server::start(&[]), Server::start(&[])];
    let common = json!({"stream": true, "stream_options": {"include_usage": true}, "return_token_ids": true});
    for (path, n_choices, more) in [
        (
            COMPLETIONS,
            1,
            json!({"temperature": 2, "max_tokens": 40, "logprobs": 1, "echo": true}),
        ),
        (
            COMPLETIONS,
            1,
            json!({"temperature": 2, "max_tokens": 60, "stop": ["the b", "zz"], "seed": 3,
            "frequency_penalty": 1, "repetition_penalty": 1.2, "bad_words": ["block table"], "min_tokens": 9}),
        ),
        (
            COMPLETIONS,
            3,
            json!({"temperature": 3, "max_tokens": 30, "n": 3, "stop_token_ids": (0..60).collect::<Vec<u32>>(),
            "seed": 5}),
        ),
        (
            CHAT,
            1,
            json!({"temperature": 1.5, "max_tokens": 40, "logprobs": true, "top_logprobs": 2}),
        ),
        (
            CHAT,
            2,
            json!({"temperature": 2, "max_tokens": 24, "n": 2, "min_p": 0.001}),
        ),
    ] {
        let mut asked = common.clone();
        let fields = asked.as_object_mut().unwrap();
        fields.extend(more.as_object().unwrap().clone());
        match path {
            CHAT => {
                asked["messages"] = json!([{"role": "user", "content": "What is a block table?"}])
            }
            _ => asked["prompt"] = json!("A block table maps logical blocks"),
        }
        breaks_off_and_goes_on(&servers, path, &asked, n_choices);
    }
}

#[test]
fn what_cannot_be_resumed_is_a_400() {
    let server = Server::start(&[]);
    let resume = |choices: Value| json!({"id": "cmpl-1", "created": 1, "choices": choices});
    for (why, more, choices, part) in [
        (
            "no stream",
            json!({"stream": false}),
            json!([[1]]),
            "\"stream\": true",
        ),
        (
            "no seed",
            json!({"seed": null}),
            json!([[1]]),
            "needs the seed",
        ),
        (
            "beams",
            json!({"use_beam_search": true, "n": 2, "stream": false, "seed": null}),
            json!([[1]]),
            "",
        ),
        (
            "other choices",
            json!({"n": 2}),
            json!([[1]]),
            "1 choices, n is 2",
        ),
        ("no such token", json!({}), json!([[999_999]]), "vocabulary"),
        (
            "too many",
            json!({}),
            json!([[1, 2, 3, 4, 5, 6]]),
            "the answer may have 5",
        ),
        (
            "prompts",
            json!({"prompt": ["a", "b"]}),
            json!([[1]]),
            "one answer is resumed",
        ),
    ] {
        let mut body =
            json!({"prompt": "A", "max_tokens": 5, "stream": true, "seed": 1, "temperature": 1});
        body.as_object_mut()
            .unwrap()
            .extend(more.as_object().unwrap().clone());
        body["kvasir_resume"] = resume(choices);
        let (status, answer) = server.post(COMPLETIONS, &body);
        assert_eq!(status, 400, "{why}: {answer}");
        assert_eq!(answer["error"]["param"], "kvasir_resume", "{why}: {answer}");
        let message = answer["error"]["message"].as_str().unwrap();
        assert!(message.contains(part), "{why}: {message}");
    }
    // An answer that was over has nothing to go on with, but its end.
    let body = json!({"prompt": "A", "max_tokens": 2, "stream": true, "seed": 1, "stream_options": {"include_usage": true},
        "kvasir_resume": resume(json!([[40, 41]]))});
    let left = events(&server, COMPLETIONS, &body);
    assert_eq!(left.len(), 1, "{left:?}");
    assert_eq!(left[0]["usage"]["completion_tokens"], 2);
}
