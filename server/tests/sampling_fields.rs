//! The fields that say how tokens are sampled, where a text ends and what is told of its prompt, through a real server with
//! the bundled demo model: each changes the answer as it says, and a wrong one is a 400 that names it.
#![allow(clippy::unwrap_used)] // A test's helpers, outside of #[test] functions.

mod client;

use std::collections::BTreeSet;

use client::Server;
use serde_json::{Value, json};

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";

/// A greedy answer of 24 tokens to a short prompt, with `more` fields: its text, its ids and the whole response.
fn ask(server: &Server, path: &str, more: Value) -> (String, Vec<u64>, Value) {
    let mut body =
        json!({"max_tokens": 24, "temperature": 0, "ignore_eos": true, "return_token_ids": true});
    let body_fields = body.as_object_mut().unwrap();
    match path {
        CHAT => body_fields.insert(
            "messages".to_owned(),
            json!([{"role": "user", "content": "What is a block table?"}]),
        ),
        _ => body_fields.insert("prompt".to_owned(), json!("A block table maps")),
    };
    body_fields.extend(more.as_object().unwrap().clone());
    let (status, answer) = server.post(path, &body);
    assert_eq!(status, 200, "{more}: {answer}");
    let choice = &answer["choices"][0];
    let text = choice["text"]
        .as_str()
        .or(choice["message"]["content"].as_str());
    (text.unwrap().to_owned(), ids(&choice["token_ids"]), answer)
}

fn ids(value: &Value) -> Vec<u64> {
    let ids = value.as_array().unwrap().iter();
    ids.map(|id| id.as_u64().unwrap()).collect()
}

#[test]
fn logits_are_changed_as_the_fields_say() {
    let server = Server::start(&[]);
    for path in [COMPLETIONS, CHAT] {
        let (text, plain, answer) = ask(&server, path, json!({}));
        let distinct = |ids: &[u64]| ids.iter().collect::<BTreeSet<_>>().len();
        let prompt = match path {
            CHAT => ids(&answer["prompt_token_ids"]),
            _ => ids(&answer["choices"][0]["prompt_token_ids"]),
        };

        let allowed = [plain[0], plain[1], 17, 300];
        let (_, found, _) = ask(&server, path, json!({"allowed_token_ids": allowed}));
        assert!(found.iter().all(|id| allowed.contains(id)), "{found:?}");

        let biased = json!({"logit_bias": {"17": 100, plain[0].to_string(): -100}});
        let (_, found, _) = ask(&server, path, biased);
        assert_eq!(found, [17; 24]);

        // A whole word in the middle of the answer.
        let word = text.split(' ').nth(4).unwrap();
        let (other, ..) = ask(&server, path, json!({"bad_words": [word]}));
        assert!(
            !format!(" {other} ").contains(&format!(" {word} ")),
            "{other:?} has {word:?}"
        );
        assert_ne!(other, text);

        let (_, found, _) = ask(&server, path, json!({"repetition_penalty": 1000}));
        assert_eq!(distinct(&found), 24, "none twice: {found:?}");
        assert!(
            found.iter().all(|id| !prompt.contains(id)),
            "nor one of the prompt"
        );
        for penalty in ["presence_penalty", "frequency_penalty"] {
            let (_, less, _) = ask(&server, path, json!({penalty: 2, "max_tokens": 200}));
            let (_, more, _) = ask(&server, path, json!({penalty: -2, "max_tokens": 200}));
            assert!(distinct(&less) > distinct(&more), "{penalty}");
        }

        let random = json!({"temperature": 8, "seed": 4});
        let (_, random, _) = ask(&server, path, random);
        assert_ne!(random, plain);
        let likely = json!({"temperature": 8, "seed": 4, "min_p": 1});
        assert_eq!(
            ask(&server, path, likely).1,
            plain,
            "only the likeliest is left"
        );
        let scored = json!({"logprobs": if path == CHAT { json!(true) } else { json!(3) }, "frequency_penalty": 1});
        let (_, _, answer) = ask(&server, path, scored);
        assert!(answer["choices"][0]["logprobs"].is_object());
    }
}

#[test]
fn an_answer_ends_where_the_fields_say() {
    let server = Server::start(&[]);
    for path in [COMPLETIONS, CHAT] {
        let (text, plain, _) = ask(&server, path, json!({}));

        // The same token ends the answer, or may not yet.
        let at = plain.iter().rposition(|id| *id != plain[0]).unwrap();
        let stop = plain[at];
        let first = plain.iter().position(|id| *id == stop).unwrap();
        let stops = json!({"stop_token_ids": [stop]});
        let (cut, found, answer) = ask(&server, path, stops.clone());
        assert_eq!(found, plain[..=first]);
        assert_eq!(answer["choices"][0]["stop_reason"], stop);
        let with = |more: Value| {
            let mut all = stops.clone();
            all.as_object_mut()
                .unwrap()
                .extend(more.as_object().unwrap().clone());
            all
        };
        let (whole, ..) = ask(
            &server,
            path,
            with(json!({"include_stop_str_in_output": true})),
        );
        assert!(
            whole.starts_with(&cut) && whole.len() > cut.len(),
            "{whole:?} after {cut:?}"
        );
        assert!(text.starts_with(&whole));
        let n = first + 4;
        let (_, found, _) = ask(&server, path, with(json!({"min_tokens": n})));
        assert!(
            found.len() > n || found.len() == 24,
            "{} of {n}",
            found.len()
        );
        assert!(!found[..n.min(24)].contains(&stop));

        let word = text.split(' ').nth(3).unwrap();
        let stops = json!({"stop": [word]});
        let (cut, early, answer) = ask(&server, path, stops.clone());
        assert_eq!(answer["choices"][0]["stop_reason"], word);
        let included = json!({"stop": [word], "include_stop_str_in_output": true});
        assert_eq!(
            ask(&server, path, included.clone()).0,
            format!("{cut}{word}")
        );
        let mut streamed = included;
        streamed["stream"] = json!(true);
        streamed["max_tokens"] = json!(24);
        streamed["temperature"] = json!(0);
        match path {
            CHAT => {
                streamed["messages"] =
                    json!([{"role": "user", "content": "What is a block table?"}])
            }
            _ => streamed["prompt"] = json!("A block table maps"),
        }
        let piece = |e: &Value| {
            let choice = &e["choices"][0];
            let text = choice["text"]
                .as_str()
                .or(choice["delta"]["content"].as_str());
            text.unwrap_or_default().to_owned()
        };
        let events = server.open("POST", path, &streamed.to_string()).events();
        let streamed: String = events.iter().map(piece).collect();
        assert_eq!(streamed, format!("{cut}{word}"));
        let late = json!({"stop": [word], "min_tokens": early.len() + 2});
        let (_, found, _) = ask(&server, path, late);
        assert!(found.len() > early.len() + 1, "the first is too early");
    }
    let server_ends = json!({"messages": [{"role": "user", "content": "What is a block table?"}], "temperature": 0,
        "return_token_ids": true});
    let (_, ends) = server.post(CHAT, &server_ends);
    let n = ids(&ends["choices"][0]["token_ids"]).len();
    assert_eq!(ends["choices"][0]["finish_reason"], "stop");
    let mut longer = server_ends;
    longer["min_tokens"] = json!(n + 8);
    let (_, longer) = server.post(CHAT, &longer);
    assert!(ids(&longer["choices"][0]["token_ids"]).len() > n + 8);
}

#[test]
fn prompts_are_cut_and_scored() {
    let server = Server::start(&[]);
    let (_, all) = server.post(
        "/tokenize",
        &json!({"prompt": "A block table maps logical blocks to blocks"}),
    );
    let all = ids(&all["tokens"]);
    let cut = json!({"prompt": "A block table maps logical blocks to blocks", "truncate_prompt_tokens": 4, "echo": true});
    let (text, found, answer) = ask(&server, COMPLETIONS, cut);
    let kept = &all[all.len() - 4..];
    assert_eq!(ids(&answer["choices"][0]["prompt_token_ids"]), kept);
    let (as_ids, same, _) = ask(&server, COMPLETIONS, json!({"prompt": kept, "echo": true}));
    assert_eq!((text, found), (as_ids, same));
    let (_, _, by_ids) = ask(
        &server,
        COMPLETIONS,
        json!({"prompt": all, "truncate_prompt_tokens": 4}),
    );
    assert_eq!(ids(&by_ids["choices"][0]["prompt_token_ids"]), kept);
    let (_, _, chat) = ask(&server, CHAT, json!({"truncate_prompt_tokens": 5}));
    assert_eq!(ids(&chat["prompt_token_ids"]).len(), 5);
    let long = "a block ".repeat(3_000);
    let (_, _, fitted) = ask(
        &server,
        COMPLETIONS,
        json!({"prompt": long, "truncate_prompt_tokens": -1}),
    );
    assert_eq!(
        ids(&fitted["choices"][0]["prompt_token_ids"]).len(),
        2048 - 24
    );

    // Beside the prefix cache, which holds the prompt by now: the same scores, and as the echo tells them.
    let scored = json!({"prompt_logprobs": 2, "prompt": all});
    let (_, _, first) = ask(&server, COMPLETIONS, scored.clone());
    let (_, _, again) = ask(&server, COMPLETIONS, scored);
    let scores = &first["choices"][0]["prompt_logprobs"];
    assert_eq!(scores, &again["choices"][0]["prompt_logprobs"]);
    let scores = scores.as_array().unwrap();
    assert_eq!(scores.len(), all.len());
    assert!(scores[0].is_null());
    let echoed = json!({"prompt": all, "logprobs": 1, "prompt_logprobs": 2, "echo": true});
    let (_, _, echo) = ask(&server, COMPLETIONS, echoed);
    let choice = &echo["choices"][0];
    for (i, id) in all.iter().enumerate().skip(1) {
        let own = &scores[i][id.to_string()];
        assert_eq!(own["logprob"], choice["logprobs"]["token_logprobs"][i]);
        assert!((2..=3).contains(&scores[i].as_object().unwrap().len()));
        let top = choice["logprobs"]["top_logprobs"][i].as_object().unwrap();
        assert!(top.len() <= 2, "one alternative, and the token itself");
    }
    assert_eq!(
        choice["prompt_logprobs"],
        first["choices"][0]["prompt_logprobs"]
    );
    let (_, _, chat) = ask(&server, CHAT, json!({"prompt_logprobs": 0}));
    let n_prompt = ids(&chat["prompt_token_ids"]).len();
    assert_eq!(chat["prompt_logprobs"].as_array().unwrap().len(), n_prompt);
    assert_eq!(chat["prompt_logprobs"][1].as_object().unwrap().len(), 1);
}

#[test]
fn wrong_fields_are_named() {
    let server = Server::start(&[]);
    for (field, value, part) in [
        ("min_p", json!(-0.1), "not between 0 and 1"),
        ("repetition_penalty", json!(0), "above 0"),
        ("presence_penalty", json!(3), "not between -2 and 2"),
        ("frequency_penalty", json!("a"), "expected f64"),
        ("logit_bias", json!({"999999": 1}), "vocabulary"),
        ("allowed_token_ids", json!([1, 999_999]), "vocabulary"),
        ("bad_words", json!([""]), "each word must have"),
        ("min_tokens", json!(25), "more than the answer may have, 24"),
        ("truncate_prompt_tokens", json!(-2), "not -1"),
        ("truncate_prompt_tokens", json!(5_000), "longest context"),
        ("prompt_logprobs", json!(21), "not between 0 and 20"),
        (
            "include_stop_str_in_output",
            json!("yes"),
            "expected a boolean",
        ),
    ] {
        for path in [COMPLETIONS, CHAT] {
            let mut body = json!({"max_tokens": 24, field: value});
            match path {
                CHAT => body["messages"] = json!([{"role": "user", "content": "Hi"}]),
                _ => body["prompt"] = json!("Hi"),
            }
            let (status, answer) = server.post(path, &body);
            let error = &answer["error"];
            assert_eq!(
                (status, &error["param"]),
                (400, &json!(field)),
                "{path}: {answer}"
            );
            let message = error["message"].as_str().unwrap();
            assert!(message.contains(part), "{path}: {message}");
        }
    }
    // Not even a token past the vocabulary that nobody samples ends the server.
    let (status, _) = server.post(
        COMPLETIONS,
        &json!({"prompt": "Hi", "max_tokens": 3, "stop_token_ids": [999_999], "min_tokens": 2}),
    );
    assert_eq!(status, 200);
}
