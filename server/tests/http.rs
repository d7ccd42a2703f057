//! The server as its clients see it: a real process, a real port, the bundled demo model.

mod client;

use std::io::{Read, Write};

use client::{Answer, Server, refusal, send};
use serde_json::{Value, json};

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";
const REQUEST_MEMORY: &str = "kvasir_request_memory_bytes";

fn question() -> Value {
    json!([{"role": "user", "content": "What is a block table?"}])
}

/// Runs until it is stopped: the whole context, and no end of sequence.
fn endless(stream: bool) -> Value {
    json!({"prompt": "A block", "max_tokens": 2000, "ignore_eos": true, "stream": stream})
}

#[test]
fn a_stream_adds_up_to_the_whole_answer() {
    let server = Server::start(&[]);
    let asked = json!({"messages": question(), "max_tokens": 60, "return_token_ids": true, "logprobs": true, "top_logprobs": 2});
    let (status, whole) = server.post(CHAT, &asked);
    assert_eq!(status, 200, "{whole}");
    let choice = &whole["choices"][0];
    let text = choice["message"]["content"].as_str().unwrap();
    assert!(text.contains("block"), "{text}");
    assert_eq!(choice["finish_reason"], "stop");
    let ids = choice["token_ids"].as_array().unwrap();
    assert_eq!(whole["usage"]["completion_tokens"], ids.len());
    assert_eq!(
        whole["usage"]["prompt_tokens"],
        whole["prompt_token_ids"].as_array().unwrap().len()
    );
    let scored = choice["logprobs"]["content"].as_array().unwrap();
    assert_eq!(scored.len(), ids.len());
    assert!(
        scored
            .iter()
            .all(|t| t["top_logprobs"].as_array().unwrap().len() == 2)
    );

    let mut asked = asked;
    asked["stream"] = json!(true);
    asked["stream_options"] = json!({"include_usage": true});
    let events = server.open("POST", CHAT, &asked.to_string()).events();
    let delta = |e: &Value| {
        e["choices"][0]["delta"]["content"]
            .as_str()
            .unwrap_or_default()
            .to_owned()
    };
    assert_eq!(events.iter().map(delta).collect::<String>(), text);
    let streamed_ids = events.iter().flat_map(|e| {
        e["choices"][0]["token_ids"]
            .as_array()
            .cloned()
            .unwrap_or_default()
    });
    assert_eq!(&streamed_ids.collect::<Vec<_>>(), ids);
    assert_eq!(events[0]["choices"][0]["delta"]["role"], "assistant");
    assert_eq!(events[0]["prompt_token_ids"], whole["prompt_token_ids"]);
    let usage = &events.last().unwrap()["usage"];
    for field in ["prompt_tokens", "completion_tokens", "total_tokens"] {
        assert_eq!(usage[field], whole["usage"][field]);
    }
    let n_prompt = usage["prompt_tokens"].as_u64().unwrap();
    let cached = |usage: &Value| {
        usage["prompt_tokens_details"]["cached_tokens"]
            .as_u64()
            .unwrap()
    };
    assert_eq!(cached(&whole["usage"]), 0, "the first of its kind");
    assert!(cached(usage) >= (n_prompt - 1) / 16 * 16, "{usage}");
    assert_eq!(
        events[events.len() - 2]["choices"][0]["finish_reason"],
        "stop"
    );

    let metrics = server.get("/metrics").1;
    // Two requests: of each span one sample a request, but of the time between tokens.
    for (name, n) in [
        ("vllm:request_queue_time_seconds_count", 2),
        ("vllm:request_prefill_time_seconds_count", 2),
        ("vllm:time_to_first_token_seconds_count", 2),
        ("vllm:request_decode_time_seconds_count", 2),
        ("vllm:e2e_request_latency_seconds_count", 2),
        (
            "vllm:inter_token_latency_seconds_count",
            2 * (ids.len() - 1),
        ),
        ("vllm:prefix_cache_queries_total", 2 * n_prompt as usize),
        ("vllm:prefix_cache_hits_total", cached(usage) as usize),
        ("vllm:request_generation_tokens_sum", 2 * ids.len()),
    ] {
        let line = format!("{name}{{model_name=\"kvasir-demo\"}} {n}\n");
        assert!(metrics.contains(&line), "no {line} in {metrics}");
    }

    let (_, tokens) = server.post("/tokenize", &json!({"messages": question()}));
    assert_eq!(tokens["tokens"], whole["prompt_token_ids"]);
    assert_eq!(tokens["max_model_len"], 2048);
}

#[test]
fn choices_are_those_of_requests_with_the_next_seeds() {
    let server = Server::start(&["--max-num-seqs", "8"]);
    let text_of = |choice: &Value| match choice["text"].as_str() {
        Some(text) => text.to_owned(),
        None => choice["message"]["content"].as_str().unwrap().to_owned(),
    };
    let shared = json!({"max_tokens": 12, "temperature": 1.0, "ignore_eos": true, "seed": 11});
    for (path, field, prompt) in [
        (COMPLETIONS, "prompt", json!(["A block table", "The pool"])),
        (CHAT, "messages", question()),
    ] {
        let asked = |prompt: &Value, more: Value| {
            let mut body = shared.as_object().unwrap().clone();
            body.insert(field.to_owned(), prompt.clone());
            body.extend(more.as_object().unwrap().clone());
            Value::Object(body)
        };
        let prompts = match path {
            COMPLETIONS => prompt.as_array().unwrap().clone(),
            _ => vec![prompt.clone()],
        };
        let mut want = Vec::new();
        for prompt in &prompts {
            for seed in 11..14 {
                let (_, one) = server.post(path, &asked(prompt, json!({"seed": seed})));
                want.push(text_of(&one["choices"][0]));
            }
        }
        let (status, whole) = server.post(path, &asked(&prompt, json!({"n": 3, "best_of": 3})));
        assert_eq!(status, 200, "{whole}");
        let choices = whole["choices"].as_array().unwrap();
        assert_eq!(choices.iter().map(text_of).collect::<Vec<_>>(), want);
        let indices: Vec<u64> = choices
            .iter()
            .map(|c| c["index"].as_u64().unwrap())
            .collect();
        assert_eq!(indices, (0..want.len() as u64).collect::<Vec<_>>());
        let (_, once) = server.post(path, &asked(&prompt, json!({})));
        let usage = &whole["usage"];
        assert_eq!(
            usage["prompt_tokens"], once["usage"]["prompt_tokens"],
            "{usage}"
        );
        assert_eq!(usage["completion_tokens"], 12 * want.len(), "{usage}");

        let more = json!({"n": 3, "stream": true, "stream_options": {"include_usage": true}});
        let events = server
            .open("POST", path, &asked(&prompt, more).to_string())
            .events();
        let mut streamed = vec![String::new(); want.len()];
        for choice in events.iter().filter_map(|event| event["choices"].get(0)) {
            let index = choice["index"].as_u64().unwrap() as usize;
            let part = choice["text"]
                .as_str()
                .or(choice["delta"]["content"].as_str());
            streamed[index].push_str(part.unwrap_or_default());
        }
        assert_eq!(streamed, want);
        let last = &events.last().unwrap()["usage"];
        assert_eq!(last["total_tokens"], usage["total_tokens"], "{last}");
    }
    // A choice that comes to a stop string ends alone.
    let asked = json!({"prompt": "A block table", "n": 3, "seed": 11, "temperature": 1.0, "max_tokens": 12,
        "ignore_eos": true, "stop": " the", "echo": true, "logprobs": 0});
    let (_, stopped) = server.post(COMPLETIONS, &asked);
    for choice in stopped["choices"].as_array().unwrap() {
        assert!(
            choice["text"]
                .as_str()
                .unwrap()
                .starts_with("A block table")
        );
        let scores = choice["logprobs"]["token_logprobs"].as_array().unwrap();
        let n_unscored = scores.iter().filter(|score| score.is_null()).count();
        assert_eq!(n_unscored, 1, "the prompt's first token only: {choice}");
    }
    for (body, part) in [
        (
            json!({"prompt": "x", "n": 9}),
            "9 choices; the server runs 8 sequences at once",
        ),
        (
            json!({"prompt": vec!["x"; 50], "n": 3}),
            "at most 128 together",
        ),
        (
            json!({"prompt": "x", "best_of": 9}),
            "best_of: 9 choices; the server runs 8 sequences at once",
        ),
    ] {
        let (status, refused) = server.post(COMPLETIONS, &body);
        let message = refused["error"]["message"].as_str().unwrap();
        assert!(status == 400 && message.contains(part), "{refused}");
    }
    server.wait_for_load("nothing is left", |load| load["blocks"]["active"] == 0);
}

#[test]
fn the_best_of_more_choices_come_first() {
    let server = Server::start(&[]);
    let asked = |n: u64, more: Value| {
        let mut asked = json!({"prompt": ["A block table", "The pool"], "n": n, "seed": 11, "temperature": 1.0,
            "max_tokens": 9, "logprobs": 0});
        let more = more.as_object().unwrap().clone();
        asked.as_object_mut().unwrap().extend(more);
        let (status, answer) = server.post(COMPLETIONS, &asked);
        assert_eq!(status, 200, "{answer}");
        answer
    };
    let sum = |choice: &Value| -> f64 {
        let logprobs = choice["logprobs"]["token_logprobs"].as_array().unwrap();
        logprobs
            .iter()
            .map(|logprob| logprob.as_f64().unwrap())
            .sum()
    };
    let all = asked(5, json!({}));
    let mut want = Vec::new();
    for of_prompt in all["choices"].as_array().unwrap().chunks(5) {
        let mut of_prompt = of_prompt.to_vec();
        of_prompt.sort_by(|a, b| sum(b).total_cmp(&sum(a)));
        want.extend(of_prompt[..2].iter().map(|choice| choice["text"].clone()));
    }
    for more in [
        json!({"best_of": 5}),
        json!({"best_of": 5, "logprobs": null}),
    ] {
        let found = asked(2, more);
        let choices = found["choices"].as_array().unwrap();
        let texts: Vec<Value> = choices
            .iter()
            .map(|choice| choice["text"].clone())
            .collect();
        assert_eq!(texts, want);
        let indices: Vec<u64> = choices
            .iter()
            .map(|c| c["index"].as_u64().unwrap())
            .collect();
        assert_eq!(indices, [0, 1, 2, 3]);
        assert_eq!(
            found["usage"]["prompt_tokens"],
            all["usage"]["prompt_tokens"]
        );
    }
}

#[test]
fn beams_are_searched_and_scored() {
    let server = Server::start(&[]);
    for (path, field, prompt, logprobs) in [
        (
            COMPLETIONS,
            "prompt",
            json!(["A block table", "The pool"]),
            json!(1),
        ),
        (CHAT, "messages", question(), json!(true)),
    ] {
        let asked = |more: Value| {
            let mut asked = json!({field: prompt, "use_beam_search": true, "n": 2, "best_of": 4, "max_tokens": 24,
                "length_penalty": 0.5, "logprobs": logprobs, "return_token_ids": true});
            let more = more.as_object().unwrap().clone();
            asked.as_object_mut().unwrap().extend(more);
            asked
        };
        let (status, whole) = server.post(path, &asked(json!({})));
        assert_eq!(status, 200, "{whole}");
        let choices = whole["choices"].as_array().unwrap();
        assert_eq!(choices.len(), if path == CHAT { 2 } else { 4 });
        for of_prompt in choices.chunks(2) {
            let score = |choice: &Value| choice["beam_score"].as_f64().unwrap();
            assert!(score(&of_prompt[0]) >= score(&of_prompt[1]), "{whole}");
            assert_ne!(of_prompt[0]["token_ids"], of_prompt[1]["token_ids"]);
            for choice in of_prompt {
                let logprobs: Vec<f64> = match choice["logprobs"]["token_logprobs"].as_array() {
                    Some(logprobs) => logprobs.iter().map(|p| p.as_f64().unwrap()).collect(),
                    None => {
                        let tokens = choice["logprobs"]["content"].as_array().unwrap().iter();
                        tokens.map(|t| t["logprob"].as_f64().unwrap()).collect()
                    }
                };
                let n = choice["token_ids"].as_array().unwrap().len();
                assert_eq!(logprobs.len(), n);
                let want = logprobs.iter().sum::<f64>() / (n as f64).sqrt();
                assert!((score(choice) - want).abs() < 1e-4, "{want}: {choice}");
            }
        }
        // Once more, from the cache.
        let (_, again) = server.post(path, &asked(json!({})));
        assert_eq!(again["choices"], whole["choices"]);
        // A token that the best has in its middle ends hypotheses where it is named.
        let middle = &choices[0]["token_ids"][1];
        let (_, stopped) = server.post(path, &asked(json!({"stop_token_ids": [middle]})));
        let ids = |choice: &Value| choice["token_ids"].as_array().unwrap().clone();
        for choice in stopped["choices"].as_array().unwrap() {
            let ids = ids(choice);
            let is_inside = ids[..ids.len() - 1].contains(middle);
            assert!(!is_inside, "{choice}");
            if ids.last() == Some(middle) {
                assert_eq!(choice["stop_reason"], *middle, "{choice}");
            }
        }
        let (status, refused) = server.post(path, &asked(json!({"stream": true})));
        assert_eq!(
            (status, &refused["error"]["param"]),
            (400, &json!("stream"))
        );
        let stops: Vec<u32> = (5..260).collect();
        let (status, refused) = server.post(path, &asked(json!({"stop_token_ids": stops})));
        let message = refused["error"]["message"].as_str().unwrap();
        assert!(
            status == 400 && message.contains("ask for fewer"),
            "{refused}"
        );
    }
    let (status, refused) = server.post(
        COMPLETIONS,
        &json!({"prompt": "x", "use_beam_search": true, "max_tokens": 0, "echo": true}),
    );
    assert_eq!(
        (status, &refused["error"]["param"]),
        (400, &json!("max_tokens"))
    );
    server.wait_for_load("nothing is left", |load| load["blocks"]["active"] == 0);
}

#[test]
fn a_prefix_is_found_by_those_with_the_same_salt() {
    let prompt: Vec<u32> = (300..400).collect();
    let cached = |server: &Server, more: &Value| {
        let mut asked = json!({"prompt": prompt, "max_tokens": 2, "temperature": 0});
        let fields = more.as_object().unwrap().clone();
        asked.as_object_mut().unwrap().extend(fields);
        let (status, answer) = server.post(COMPLETIONS, &asked);
        assert_eq!(status, 200, "{answer}");
        let details = &answer["usage"]["prompt_tokens_details"];
        let n = details["cached_tokens"].as_u64().unwrap();
        (n, answer["choices"][0]["text"].clone())
    };
    let server = Server::start(&[]);
    let (n, cold) = cached(&server, &json!({}));
    assert_eq!(n, 0);
    let (n, warm) = cached(&server, &json!({}));
    assert!(n >= 96, "{n} of 100");
    assert_eq!(warm, cold);
    for (why, more, least) in [
        ("another salt", json!({"cache_salt": "a"}), 0),
        ("the same again", json!({"cache_salt": "a"}), 96),
        ("a third", json!({"cache_salt": "b"}), 0),
    ] {
        let (n, text) = cached(&server, &more);
        assert!(n >= least && (least > 0 || n == 0), "{why}: {n}");
        assert_eq!(text, cold, "{why}");
    }
    // A prompt that is scored is computed whole, and isn't looked up.
    let scored = json!({"echo": true, "logprobs": 1});
    assert_eq!(cached(&server, &scored).0, 0);
    let metrics = server.get("/metrics").1;
    let line = "vllm:prefix_cache_queries_total{model_name=\"kvasir-demo\"} 500\n";
    assert!(metrics.contains(line), "{metrics}");
    server.wait_for_load("the full blocks of three salts stay", |load| {
        let cached = load["blocks"]["cached"].as_u64().unwrap();
        load["blocks"]["active"] == 0 && cached >= 18
    });

    let server = Server::start(&["--no-enable-prefix-caching"]);
    for _ in 0..2 {
        assert_eq!(cached(&server, &json!({})), (0, cold.clone()));
    }
}

#[test]
fn completions_take_text_and_tokens_one_or_many() {
    let server = Server::start(&[]);
    let (_, tokens) = server.post("/tokenize", &json!({"prompt": "A block table"}));
    let ids = &tokens["tokens"];
    let text_of = |prompt: Value| {
        let (status, answer) = server.post(
            COMPLETIONS,
            &json!({"prompt": prompt, "max_tokens": 8, "echo": true}),
        );
        assert_eq!(status, 200, "{answer}");
        let choices = answer["choices"].as_array().unwrap().iter();
        choices
            .map(|c| c["text"].as_str().unwrap().to_owned())
            .collect::<Vec<_>>()
    };
    let one = text_of(json!("A block table"));
    assert!(
        one[0].starts_with("A block table") && one[0].len() > 13,
        "{one:?}"
    );
    assert_eq!(text_of(ids.clone()), one);
    assert_eq!(text_of(json!([ids, ids])), [one[0].clone(), one[0].clone()]);
    assert_eq!(
        text_of(json!(["A block table", "The pool"]))[0],
        one[0],
        "the same in company"
    );

    // A greedy token is the first of the most likely ones, with the very same number.
    let asked = json!({"prompt": ids, "max_tokens": 4, "temperature": 0, "logprobs": 2});
    let logprobs = server.post(COMPLETIONS, &asked).1["choices"][0]["logprobs"].clone();
    for i in 0..4 {
        let token = logprobs["tokens"][i].as_str().unwrap();
        let top = logprobs["top_logprobs"][i].as_object().unwrap();
        assert_eq!(top.len(), 2, "{logprobs}");
        assert_eq!(top[token], logprobs["token_logprobs"][i], "{logprobs}");
    }

    // An echo with log-probabilities and no new token scores the prompt.
    let asked = json!({"prompt": ids, "max_tokens": 0, "echo": true, "logprobs": 0});
    let scores =
        server.post(COMPLETIONS, &asked).1["choices"][0]["logprobs"]["token_logprobs"].clone();
    let scores = scores.as_array().unwrap();
    assert_eq!(scores.len(), ids.as_array().unwrap().len());
    assert!(scores[0].is_null() && scores[1..].iter().all(|p| p.as_f64().unwrap() <= 0.0));
}

#[test]
fn no_part_of_a_stop_string_leaks() {
    let server = Server::start(&[]);
    let asked = json!({"messages": question(), "stream": true});
    let content = |e: &Value| {
        e["choices"][0]["delta"]["content"]
            .as_str()
            .unwrap_or_default()
            .to_owned()
    };
    let whole: String = server
        .open("POST", CHAT, &asked.to_string())
        .events()
        .iter()
        .map(content)
        .collect();
    // It begins inside one word and ends inside another.
    let at = whole.find(' ').unwrap();
    let stop = &whole[at - 1..at + 4];
    let mut asked = asked;
    asked["stop"] = json!([stop, "never comes"]);
    let events = server.open("POST", CHAT, &asked.to_string()).events();
    assert_eq!(
        events.iter().map(content).collect::<String>(),
        whole[..at - 1]
    );
    let last = &events.last().unwrap()["choices"][0];
    assert_eq!(
        (&last["finish_reason"], &last["stop_reason"]),
        (&json!("stop"), &json!(stop))
    );
    server.wait_for_load("the rest is not computed", |load| {
        load["blocks"]["active"] == 0
    });
}

#[test]
fn what_is_wrong_is_named() {
    let server = Server::start(&["--max-body-bytes", "20000"]);
    for (why, path, body, status, param, part) in [
        (
            "not JSON",
            CHAT,
            "{\"messages\": ".to_owned(),
            400,
            json!(null),
            "not a JSON object",
        ),
        (
            "no messages",
            CHAT,
            "{}".into(),
            400,
            json!("messages"),
            "missing",
        ),
        (
            "no prompt",
            COMPLETIONS,
            "{}".into(),
            400,
            json!("prompt"),
            "missing",
        ),
        (
            "wrong prompt",
            COMPLETIONS,
            json!({"prompt": {"a": 1}}).to_string(),
            400,
            json!("prompt"),
            "expected a string",
        ),
        (
            "empty prompt",
            COMPLETIONS,
            json!({"prompt": []}).to_string(),
            400,
            json!("prompt"),
            "0 prompts",
        ),
        (
            "bad token",
            COMPLETIONS,
            json!({"prompt": [999_999]}).to_string(),
            400,
            json!("prompt"),
            "vocabulary",
        ),
        (
            "unbuilt",
            CHAT,
            json!({"messages": question(), "typical_p": 0.1}).to_string(),
            400,
            json!("typical_p"),
            "not supported",
        ),
        (
            "no tool",
            CHAT,
            json!({"messages": question(), "tools": [{}]}).to_string(),
            400,
            json!("tools[0]"),
            "missing field `type`",
        ),
        (
            "unknown",
            CHAT,
            json!({"messages": question(), "tempratur": 1}).to_string(),
            400,
            json!("tempratur"),
            "unknown",
        ),
        (
            "image",
            CHAT,
            json!({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}).to_string(),
            400,
            json!("messages[0].content[0]"),
            "text",
        ),
        (
            "model",
            CHAT,
            json!({"model": "gpt-9", "messages": question()}).to_string(),
            404,
            json!("model"),
            "kvasir-demo",
        ),
        (
            "too long",
            COMPLETIONS,
            json!({"prompt": vec![5; 2048], "max_tokens": 1}).to_string(),
            400,
            json!("prompt"),
            "2048",
        ),
        (
            "too large",
            COMPLETIONS,
            "x".repeat(20001),
            413,
            json!(null),
            "20000 bytes",
        ),
        (
            "no such path",
            "/v1/embeddings",
            "{}".into(),
            404,
            json!(null),
            "/v1/embeddings",
        ),
        (
            "wrong method",
            "/v1/models",
            "{}".into(),
            405,
            json!(null),
            "POST",
        ),
    ] {
        let answer = server.open("POST", path, &body);
        assert_eq!(answer.status, status, "{why}");
        let error: Value = serde_json::from_str(&answer.text()).unwrap();
        let error = &error["error"];
        assert_eq!(error["param"], param, "{why}: {error}");
        assert!(
            error["message"].as_str().unwrap().contains(part),
            "{why}: {error}"
        );
        assert!(error["type"].is_string(), "{why}: {error}");
    }
    let (status, answer) = server.post(CHAT, &json!({"model": "kvasir-demo", "messages": [{"role": "user",
        "content": [{"type": "text", "text": "What is a"}, {"type": "text", "text": "block table?"}]}],
        "max_completion_tokens": 3, "n": 1, "user": "me", "temperature": 0.5, "seed": 7}));
    assert_eq!(
        (status, &answer["choices"][0]["finish_reason"]),
        (200, &json!("length"))
    );
}

#[test]
fn a_client_that_leaves_frees_its_blocks() {
    let server = Server::start(&[]);
    let mut answer = server.open("POST", COMPLETIONS, &endless(true).to_string());
    assert!(answer.chunk().unwrap().starts_with("data: "));
    // One that waits for a whole answer.
    let mut waiting = server.connect();
    send(
        &mut waiting,
        "POST",
        COMPLETIONS,
        &endless(false).to_string(),
    );
    server.wait_for_load("both run", |load| load["queue"]["running"] == 2);
    drop(answer);
    drop(waiting);
    server.wait_for_load("both are gone", |load| {
        load["queue"]["running"] == 0 && load["blocks"]["active"] == 0
    });
    let metrics = server.get("/metrics").1;
    let line = "vllm:request_success_total{finished_reason=\"abort\",model_name=\"kvasir-demo\"} 2";
    assert!(metrics.contains(line), "{metrics}");
}

#[test]
fn a_slow_reader_holds_nobody_up() {
    let server = Server::start(&["--management-port", "0"]);
    let management = server.management.as_ref().unwrap();
    // It never reads, and its answer is far more than the sockets hold: twenty alternatives for each token.
    let mut slow = server.connect();
    let body = json!({"messages": question(), "max_tokens": 1500, "ignore_eos": true, "stream": true,
        "logprobs": true, "top_logprobs": 20});
    send(&mut slow, "POST", CHAT, &body.to_string());
    management.wait_for_load("it runs", |load| load["queue"]["running"] == 1);
    let (status, answer) = server.post(CHAT, &json!({"messages": question(), "max_tokens": 5}));
    assert_eq!(status, 200, "{answer}");
    management.wait_for_load("it ends, read or not", |load| load["queue"]["running"] == 0);
    let memory = || management.metric(REQUEST_MEMORY);
    assert!(memory() > 0.0, "what is not read is counted");
    let (status, answer) = server.post(CHAT, &json!({"messages": question(), "max_tokens": 5}));
    assert_eq!(status, 200, "{answer}");
    let events = Answer::read(slow).events();
    assert!(events.len() > 100, "nothing is lost");
    assert_eq!(
        events.last().unwrap()["choices"][0]["finish_reason"],
        "length"
    );
    assert_eq!(memory(), 0.0, "and given back");
}

#[test]
fn an_answer_that_waits_for_its_client_has_a_share_of_the_memory() {
    let flags = [
        "--management-port",
        "0",
        "--request-memory-bytes",
        "4000000",
    ];
    let server = Server::start(&flags);
    let management = server.management.as_ref().unwrap();
    let mut slow = server.connect();
    let body = json!({"messages": question(), "max_tokens": 1900, "ignore_eos": true, "stream": true,
        "logprobs": true, "top_logprobs": 20});
    send(&mut slow, "POST", CHAT, &body.to_string());
    let ended =
        "vllm:request_success_total{finished_reason=\"error\",model_name=\"kvasir-demo\"} 1\n";
    management.wait_for("it is given up", "/metrics", |_, text| text.contains(ended));
    let (status, answer) = server.post(CHAT, &json!({"messages": question(), "max_tokens": 5}));
    assert_eq!(status, 200, "the others have theirs: {answer}");
    let last = Answer::read(slow).events().pop().unwrap();
    let message = last["error"]["message"].as_str().unwrap();
    assert!(
        message.contains("500000 bytes of it wait for its client"),
        "{last}"
    );
}

#[test]
fn a_full_queue_is_429() {
    let server = Server::start(&["--max-num-seqs", "1", "--max-waiting", "1"]);
    // The head of a stream comes when its request is accepted.
    let open = || server.open("POST", COMPLETIONS, &endless(true).to_string());
    let runs = open();
    server.wait_for_load("one runs", |load| load["queue"]["running"] == 1);
    let waits = open();
    assert_eq!((runs.status, waits.status), (200, 200));
    let refused = open();
    assert_eq!(
        (refused.status, refused.header("retry-after")),
        (429, Some("1"))
    );
    let error: Value = serde_json::from_str(&refused.text()).unwrap();
    assert_eq!(error["error"]["code"], "queue_full");
    drop(waits);
    server.wait_for_load("there is room", |load| load["queue"]["waiting"] == 0);
    // Of several prompts none is left behind.
    let (status, _) = server.post(COMPLETIONS, &json!({"prompt": ["a", "b"]}));
    assert_eq!(status, 429);
    server.wait_for_load("nor waits", |load| load["queue"]["waiting"] == 0);
    drop(runs);
    server.wait_for_load("all are gone", |load| load["queue"]["running"] == 0);
}

#[test]
fn bodies_full_of_prompts_cost_little_more_than_their_bytes() {
    let server = Server::start(&[]);
    // 8 MB with two million prompts of one token.
    let body = format!("{{\"prompt\": [[5]{}]}}", ",[5]".repeat(2_000_000 - 1));
    let before = server.memory_bytes("VmRSS");
    server.reset_peak_memory();
    std::thread::scope(|scope| {
        let ask = || {
            let answer = server.open("POST", COMPLETIONS, &body);
            assert_eq!(answer.status, 400);
            let error: Value = serde_json::from_str(&answer.text()).unwrap();
            let message = error["error"]["message"].as_str().unwrap();
            assert!(message.contains("more than 128 prompts"), "{error}");
        };
        let asked: Vec<_> = (0..8).map(|_| scope.spawn(ask)).collect();
        asked.into_iter().for_each(|one| one.join().unwrap());
    });
    let cost = server.memory_bytes("VmHWM") - before;
    assert!(cost < 100_000_000, "{cost} bytes");
    assert_eq!(server.metric(REQUEST_MEMORY), 0.0);
}

#[test]
fn a_long_text_is_tokenized_a_piece_at_a_time() {
    let server = Server::start(&[]);
    let body = json!({"prompt": "a block of words ".repeat(120_000)});
    let before = server.memory_bytes("VmRSS");
    server.reset_peak_memory();
    let (status, tokens) = server.post("/tokenize", &body);
    assert_eq!(status, 200);
    let count = tokens["count"].as_u64().unwrap();
    assert!(count > 400_000, "{count}");
    let cost = server.memory_bytes("VmHWM") - before;
    assert!(cost < 60_000_000, "{cost} bytes for a text of 2 MB");
}

#[test]
fn what_does_not_fit_the_memory_for_requests_is_429() {
    let server = Server::start(&["--request-memory-bytes", "1000000"]);
    let prompt = |n_bytes| json!({"prompt": "a".repeat(n_bytes), "max_tokens": 1});
    let (status, refused) = server.post(COMPLETIONS, &prompt(600_000));
    assert_eq!(
        (status, &refused["error"]["code"]),
        (429, &json!("memory_full")),
        "{refused}"
    );
    assert_eq!(server.post(COMPLETIONS, &prompt(10)).0, 200);
    assert_eq!(server.metric(REQUEST_MEMORY), 0.0);
}

#[test]
fn long_texts_hold_up_no_chat_and_are_refused_when_many_wait() {
    let server = Server::start(&[]);
    let body = json!({"prompt": "a block of words ".repeat(480_000)}).to_string();
    assert!(body.len() > 8_000_000 && body.len() <= 8_388_608);
    let open = |body: &str| {
        let mut stream = server.connect();
        send(&mut stream, "POST", "/tokenize", body);
        stream
    };
    let long = open(&body);
    // Its body has come, and its work begins.
    server.wait_for("it is read", "/metrics", |_, _| {
        server.metric(REQUEST_MEMORY) >= body.len() as f64
    });
    let (status, answer) = server.post(CHAT, &json!({"messages": question(), "max_tokens": 2}));
    assert_eq!(status, 200, "{answer}");
    long.set_nonblocking(true).unwrap();
    let unread = (&long).read(&mut [0]).map_err(|e| e.kind());
    assert_eq!(
        unread,
        Err(std::io::ErrorKind::WouldBlock),
        "the chat is answered while the long text is tokenized"
    );
    // Eight may wait for it; more are refused before any work.
    let others: Vec<_> = (0..12).map(|_| open(&body)).collect();
    server.wait_for("one is refused", "/metrics", |_, text| {
        text.contains("kvasir_http_requests_total{code=\"429\",model_name=\"kvasir-demo\",route=\"/tokenize\"}")
    });
    drop((long, others));
}

#[test]
fn a_text_that_no_context_holds_is_refused_before_it_is_tokenized() {
    let server = Server::start(&[]);
    for (path, param, body) in [
        (
            COMPLETIONS,
            "prompt",
            json!({"prompt": "words ".repeat(1_000_000)}),
        ),
        (
            CHAT,
            "messages",
            json!({"messages": [{"role": "user", "content": "words ".repeat(1_000_000)}]}),
        ),
    ] {
        let (status, refused) = server.post(path, &body);
        let error = &refused["error"];
        assert_eq!(status, 400, "{refused}");
        assert_eq!(error["code"], "context_length_exceeded", "{refused}");
        assert_eq!(error["param"], param, "{refused}");
        let message = error["message"].as_str().unwrap();
        assert!(
            message.contains("bytes, this model's maximum context length is 2048 tokens"),
            "{message}"
        );
    }
}

#[test]
fn a_completion_without_a_limit_takes_what_the_context_has() {
    let server = Server::start(&["--max-model-len", "64"]);
    let n_tokens = |max_tokens: Option<Value>| {
        let mut body = json!({"prompt": [5, 6, 7, 8], "ignore_eos": true});
        if let Some(max_tokens) = max_tokens {
            body["max_tokens"] = max_tokens;
        }
        let (status, answer) = server.post(COMPLETIONS, &body);
        assert_eq!(status, 200, "{answer}");
        answer["usage"]["completion_tokens"].as_u64().unwrap()
    };
    assert_eq!(n_tokens(None), 16, "OpenAI's default");
    assert_eq!(n_tokens(Some(json!(3))), 3);
    assert_eq!(
        n_tokens(Some(Value::Null)),
        60,
        "null is no limit, as in vLLM"
    );
}

#[test]
fn generation_config_limits_what_a_request_sets_no_number_for() {
    let model = tempfile::tempdir().unwrap();
    let demo = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("demo-model");
    for entry in std::fs::read_dir(demo).unwrap() {
        let path = entry.unwrap().path();
        if path.is_file() {
            std::fs::copy(&path, model.path().join(path.file_name().unwrap())).unwrap();
        }
    }
    let config = json!({"eos_token_id": 1, "do_sample": false, "max_new_tokens": 7}).to_string();
    std::fs::write(model.path().join("generation_config.json"), config).unwrap();
    let server = Server::start(&["--model", model.path().to_str().unwrap()]);
    let n_tokens = |extra: Value| {
        let mut body = json!({"messages": question(), "ignore_eos": true});
        if let Value::Object(extra) = extra {
            body.as_object_mut().unwrap().extend(extra);
        }
        let (status, answer) = server.post(CHAT, &body);
        assert_eq!(status, 200, "{answer}");
        answer["usage"]["completion_tokens"].as_u64().unwrap()
    };
    assert_eq!(n_tokens(json!({})), 7);
    assert_eq!(n_tokens(json!({"max_tokens": 9})), 9, "a request says more");
}

#[test]
fn tokens_are_named_by_their_ids_where_asked() {
    let server = Server::start(&[]);
    let body = json!({"prompt": [5, 6], "max_tokens": 2, "logprobs": 1, "return_token_ids": true,
        "return_tokens_as_token_ids": true});
    let (status, answer) = server.post(COMPLETIONS, &body);
    assert_eq!(status, 200, "{answer}");
    let choice = &answer["choices"][0];
    for i in 0..2 {
        let name = format!("token_id:{}", choice["token_ids"][i]);
        assert_eq!(choice["logprobs"]["tokens"][i], name, "{answer}");
        assert!(
            choice["logprobs"]["top_logprobs"][i][&name].is_number(),
            "{answer}"
        );
    }
}

#[test]
fn a_drain_loses_no_answer() {
    let mut server = Server::start(&["--drain-accept-seconds", "5"]);
    let mut stream = server.open("POST", COMPLETIONS, &endless(true).to_string());
    let mut text = stream.chunk().unwrap();
    // A client that keeps its connection and asks again later.
    let mut kept = server.connect();
    send(&mut kept, "GET", "/ready", "");
    let first = Answer::read(kept.try_clone().unwrap());
    assert_eq!((first.status, first.header("connection")), (200, None));
    assert_eq!(first.text(), "ready\n");

    server.signal("TERM");
    server.wait_for_load("it drains", |load| load["draining"] == true);
    assert_eq!(server.get("/ready").0, 503);
    assert_eq!(server.get("/health").0, 200);
    send(
        &mut kept,
        "POST",
        CHAT,
        &json!({"messages": question()}).to_string(),
    );
    let late = Answer::read(kept);
    assert_eq!(
        (late.status, late.header("connection")),
        (200, Some("close")),
        "still accepted, and told to leave"
    );
    late.text();

    while let Some(chunk) = stream.chunk() {
        text.push_str(&chunk);
    }
    assert!(
        text.ends_with("data: [DONE]\n\n") && text.contains("\"finish_reason\":\"length\""),
        "the stream ends whole"
    );
    assert_eq!(server.exit_code(), Some(0));
}

#[test]
fn the_second_signal_ends_at_once() {
    let mut server = Server::start(&[]);
    let mut stream = server.open("POST", COMPLETIONS, &endless(true).to_string());
    stream.chunk().unwrap();
    server.signal("TERM");
    server.wait_for_load("it drains", |load| load["draining"] == true);
    server.signal("INT");
    assert_eq!(server.exit_code(), Some(130));
}

#[test]
fn an_idle_server_leaves_at_once_on_ctrl_c() {
    let mut server = Server::start(&["--drain-accept-seconds", "600"]);
    server.signal("INT");
    assert_eq!(server.exit_code(), Some(0));
}

#[test]
fn a_crowd_of_connections_does_not_hide_the_probes() {
    let server = Server::start(&["--max-connections", "1"]);
    let mut held = server.connect();
    // Half a request: it holds its connection.
    held.write_all(b"GET /v1/models HTTP/1.1\r\n").unwrap();
    assert_eq!(server.get("/health").0, 200);
    let refused = server.open("GET", "/v1/models", "");
    assert_eq!(
        (refused.status, refused.header("connection")),
        (503, Some("close"))
    );
    held.write_all(b"host: x\r\n\r\n").unwrap();
    assert_eq!(Answer::read(held).status, 200);
}

#[test]
fn with_every_connection_taken_probes_are_answered_on_the_management_port() {
    let server = Server::start(&["--max-connections", "1", "--management-port", "0"]);
    let management = server.management.as_ref().unwrap();
    // One that may be served, and all that are answered beyond the limit: each sends half a request.
    let mut held: Vec<_> = (0..1 + 64).map(|_| server.connect()).collect();
    for stream in &mut held {
        stream.write_all(b"GET /health HTTP/1.1\r\n").unwrap();
    }
    // One more is closed without a word, on the API's port.
    let mut refused = server.connect();
    let _ = refused.write_all(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n");
    let mut answer = Vec::new();
    let _ = refused.read_to_end(&mut answer);
    assert!(answer.is_empty(), "every connection is taken");
    for path in ["/health", "/ready", "/load", "/metrics"] {
        assert_eq!(management.get(path).0, 200, "{path}");
    }
    drop(held);

    // Each port has its own.
    assert_eq!(management.get("/v1/models").0, 404);
    // The API answers again as soon as it has seen that they left.
    loop {
        let mut stream = server.connect();
        let _ =
            stream.write_all(b"GET /v1/models HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        if answer.starts_with(b"HTTP/1.1 200") {
            break;
        }
        std::thread::yield_now();
    }
    assert_eq!(server.get("/health").0, 200);
    for path in ["/ready", "/load", "/metrics"] {
        // 503 as long as the connection before still counts.
        server.wait_for("it isn't there", path, |status, _| status == 404);
    }
}

#[test]
fn the_management_port_answers_through_the_whole_drain() {
    let mut server = Server::start(&["--management-port", "0", "--drain-accept-seconds", "0"]);
    let mut stream = server.open("POST", COMPLETIONS, &endless(true).to_string());
    stream.chunk().unwrap();
    server.signal("TERM");
    let management = server.management.as_ref().unwrap();
    management.wait_for("it drains", "/ready", |status, _| status == 503);
    // The API's port is closed by now or soon; these stay.
    assert_eq!(management.get("/health").0, 200);
    let load: Value = serde_json::from_str(&management.get("/load").1).unwrap();
    assert_eq!(load["draining"], true);
    assert_eq!(load["queue"]["running"], 1, "{load}");
    assert!(stream.text().ends_with("data: [DONE]\n\n"));
    assert_eq!(server.exit_code(), Some(0));
}

#[test]
fn heads_and_bodies_must_come_in_time() {
    let server = Server::start(&["--read-timeout-seconds", "0.3"]);
    let mut head = server.connect();
    head.write_all(b"GET /health HTTP/1.1\r\n").unwrap();
    let mut body = server.connect();
    body.write_all(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\n{")
        .unwrap();
    assert_eq!(Answer::read(body).status, 408);
    let mut rest = Vec::new();
    head.read_to_end(&mut rest).unwrap();
    assert!(
        rest.is_empty() || rest.starts_with(b"HTTP/1.1 408"),
        "closed by the server"
    );
}

#[test]
fn a_server_whose_log_nobody_reads_still_drains() {
    let (reader, log) = std::io::pipe().unwrap();
    // Every line that it logs is a broken pipe.
    drop(reader);
    let flags = ["--drain-accept-seconds", "0", "--drain-seconds", "5"];
    let mut server = Server::start_logging(&flags, &[], log.into());
    server.wait_for("it is ready", "/ready", |status, _| status == 200);
    server.signal("TERM");
    assert_eq!(server.exit_code(), Some(0));
}

#[test]
fn mistakes_of_the_user_are_exit_code_2_and_a_sentence() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let empty = tempfile::tempdir().unwrap();
    for (flags, part) in [
        (
            vec!["--port", "0", "--device", "cuda"],
            "--device: no cuda device can be used: this",
        ),
        (vec!["--port", port.as_str()], "can't be listened on"),
        (
            vec!["--port", "0", "--model", empty.path().to_str().unwrap()],
            "tokenizer.json is missing",
        ),
        (
            vec!["--port", "0", "--max-model-len", "4096"],
            "--max-model-len is 4096",
        ),
        (vec!["--no-such-flag"], "--no-such-flag"),
    ] {
        let said = refusal(&flags);
        assert!(said.contains(part), "{flags:?}: {said}");
        assert!(!said.contains("panicked"), "{flags:?}: {said}");
    }
}
