//! Bodies as load generators and evaluation tools send them, written down from their sources, replayed over real HTTP.
//! Each must get an answer that the tool can use.

mod client;

use client::Server;
use serde_json::{Value, json};

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";

fn events(server: &Server, path: &str, body: &Value) -> Vec<Value> {
    let answer = server.open("POST", path, &body.to_string());
    assert_eq!(answer.status, 200, "{body}");
    answer.events()
}

fn answer(server: &Server, path: &str, body: &Value) -> Value {
    let (status, answer) = server.post(path, body);
    assert_eq!(status, 200, "{body}: {answer}");
    answer
}

/// guidellm: src/guidellm/backends/openai/request_handlers.py, `TextCompletionsRequestHandler.format` and
/// `ChatCompletionsRequestHandler.format`. It reads `usage` of whatever chunk came last.
#[test]
fn guidellm() {
    let server = Server::start(&[]);
    assert_eq!(server.get("/health").0, 200, "it asks before it begins");
    let stream_options = json!({"include_usage": true, "continuous_usage_stats": true});
    let text = json!({
        "model": "kvasir-demo", "stream": true, "stream_options": stream_options,
        "max_tokens": 12, "stop": null, "ignore_eos": true,
        "prompt": "A block table maps logical blocks",
    });
    let chat = json!({
        "model": "kvasir-demo", "stream": true, "stream_options": stream_options,
        "max_completion_tokens": 12, "stop": null, "ignore_eos": true,
        "messages": [
            {"role": "system", "content": "Answer in short."},
            {"role": "user", "content": [{"type": "text", "text": "What is a block table?"}]},
        ],
    });
    for (path, body) in [(COMPLETIONS, text), (CHAT, chat)] {
        let events = events(&server, path, &body);
        let n_prompt = events[0]["usage"]["prompt_tokens"].as_u64().unwrap();
        assert!(n_prompt > 0, "{events:?}");
        let mut before = 0;
        for event in &events {
            let usage = &event["usage"];
            let n = usage["completion_tokens"]
                .as_u64()
                .expect("each chunk has its usage");
            assert!(n >= before, "{event}");
            assert_eq!(usage["prompt_tokens"], n_prompt, "{event}");
            assert_eq!(usage["total_tokens"], n_prompt + n, "{event}");
            before = n;
        }
        assert_eq!(before, 12, "{path}: the last one has them all");
        let (status, whole) = server.post(path, &without_stream(&body));
        assert_eq!(
            (status, &whole["usage"]["completion_tokens"]),
            (200, &json!(12))
        );
    }
}

/// `stream: false` in guidellm leaves both fields out.
fn without_stream(body: &Value) -> Value {
    let mut body = body.clone();
    let fields = body.as_object_mut().expect("bodies are objects");
    fields.remove("stream");
    fields.remove("stream_options");
    body
}

/// vLLM: vllm/benchmarks/lib/endpoint_request_func.py, `async_request_openai_completions` and
/// `async_request_openai_chat_completions`, with the temperature that `vllm bench serve` adds by default and with
/// `--ignore-eos`. It counts chunks with choices, and takes `usage` from one without.
#[test]
fn vllm_bench_serve() {
    let server = Server::start(&[]);
    let text = json!({
        "model": "kvasir-demo", "prompt": "A block table maps logical blocks", "repetition_penalty": 1.0,
        "max_tokens": 12, "logprobs": null, "stream": true, "stream_options": {"include_usage": true},
        "ignore_eos": true, "temperature": 0.0,
    });
    let chat = json!({
        "model": "kvasir-demo",
        "messages": [{"role": "user", "content": [{"type": "text", "text": "What is a block table?"}]}],
        "max_completion_tokens": 12, "stream": true, "stream_options": {"include_usage": true},
        "ignore_eos": true, "temperature": 0.0,
    });
    for (path, body) in [(COMPLETIONS, text), (CHAT, chat)] {
        let mut events = events(&server, path, &body);
        let last = events.pop().unwrap();
        assert_eq!(last["choices"], json!([]), "{last}");
        assert_eq!(last["usage"]["completion_tokens"], 12, "{last}");
        assert!(events.len() > 1, "chunks come one by one: {events:?}");
        for event in events {
            assert_eq!(event["choices"].as_array().unwrap().len(), 1, "{event}");
            assert!(event["usage"].is_null(), "{event}");
        }
    }
}

/// lm-evaluation-harness: lm_eval/models/openai_completions.py, `LocalCompletionsAPI._create_payload`, tokenized and
/// as text, to score and to generate. It indexes the log-probabilities by the prompt's tokens.
#[test]
fn lm_eval_local_completions() {
    let server = Server::start(&[]);
    let (_, tokens) = server.post("/tokenize", &json!({"prompt": "A block table maps"}));
    let ids = tokens["tokens"].clone();
    let n_ids = ids.as_array().unwrap().len();
    let score = json!({
        "model": "kvasir-demo", "prompt": [ids, ids], "temperature": 0, "max_tokens": 1, "logprobs": 1,
        "seed": 1234, "echo": true,
    });
    let scored = answer(&server, COMPLETIONS, &score);
    for (i, choice) in scored["choices"].as_array().unwrap().iter().enumerate() {
        assert_eq!(choice["index"], i);
        let logprobs = &choice["logprobs"];
        let list = |name: &str| logprobs[name].as_array().unwrap().clone();
        assert_eq!(
            list("token_logprobs").len(),
            n_ids + 1,
            "the prompt and one more"
        );
        for (own, top) in list("token_logprobs")
            .iter()
            .zip(list("top_logprobs"))
            .skip(1)
        {
            assert!(own.as_f64().unwrap() <= 0.0);
            // `max(top.values())` says whether the token is the greedy one.
            assert!(!top.as_object().unwrap().is_empty());
        }
    }
    for prompt in [
        json!([ids]),
        json!("A block table maps"),
        json!(["A block", "The pool"]),
    ] {
        let generate = json!({
            "prompt": prompt, "model": "kvasir-demo", "max_tokens": 16, "temperature": 0,
            "stop": ["\n\n", "Question:"], "seed": 1234,
        });
        let generated = answer(&server, COMPLETIONS, &generate);
        for choice in generated["choices"].as_array().unwrap() {
            assert!(choice["index"].is_u64() && choice["text"].is_string());
        }
    }
}

/// lm-evaluation-harness: `LocalChatCompletion._create_payload`, with the messages of
/// lm_eval/models/api_models.py, `apply_chat_template`, which gives each a `type`.
#[test]
fn lm_eval_local_chat_completions() {
    let server = Server::start(&[]);
    for stop in [json!([]), json!(["\n\n", "</s>"])] {
        let body = json!({
            "messages": [
                {"role": "system", "content": "Answer in short.", "type": "text"},
                {"role": "user", "content": "What is a block table?", "type": "text"},
                {"role": "assistant", "content": "A table.", "type": "text"},
                {"role": "user", "content": "Of what?", "type": "text"},
            ],
            "model": "kvasir-demo", "max_tokens": 16, "temperature": 0, "stop": stop, "seed": 1234,
        });
        let generated = answer(&server, CHAT, &body);
        let message = &generated["choices"][0]["message"];
        assert!(message["content"].is_string(), "{generated}");
    }
}

/// By their words, because neither sees the code: LangChain (langchain_openai/chat_models/base.py,
/// `_handle_openai_bad_request`) and litellm (litellm_core_utils/exception_mapping_utils.py,
/// `is_error_str_context_window_exceeded`), which then cut the conversation or go to a model with a longer context.
#[test]
fn agents_know_a_prompt_that_is_too_long() {
    let server = Server::start(&[]);
    let litellm = "this model's maximum context length is";
    let langchain = "prompt is too long";
    let chat = |text: String, max_tokens: u32| json!({"messages": [{"role": "user", "content": text}], "max_tokens": max_tokens});
    for (why, path, body, words) in [
        (
            "by its bytes",
            CHAT,
            chat("block ".repeat(90_000), 1),
            vec![langchain, litellm],
        ),
        (
            "by its tokens",
            CHAT,
            chat("block ".repeat(5_000), 1),
            vec![langchain, litellm],
        ),
        (
            "by its answer",
            CHAT,
            chat("block ".repeat(1_000), 2_000),
            vec![litellm],
        ),
        (
            "in bytes",
            COMPLETIONS,
            json!({"prompt": "block ".repeat(90_000)}),
            vec![langchain, litellm],
        ),
        (
            "in ids",
            COMPLETIONS,
            json!({"prompt": vec![5; 3_000]}),
            vec![langchain, litellm],
        ),
        (
            "no room left",
            COMPLETIONS,
            json!({"prompt": vec![5; 2_048]}),
            vec![langchain, litellm],
        ),
    ] {
        let (status, refused) = server.post(path, &body);
        let error = &refused["error"];
        assert_eq!(
            (status, &error["code"]),
            (400, &json!("context_length_exceeded")),
            "{why}: {refused}"
        );
        for words in words {
            let message = error["message"].as_str().unwrap().to_lowercase();
            assert!(message.contains(words), "{why}: {message}");
        }
    }
}
