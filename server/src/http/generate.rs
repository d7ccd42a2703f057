//! From prompts in tokens to running requests, and from their events to whole answers or server-sent events.
//!
//! Shared by completions and chat. It knows events and text, and no wire format but that of an event stream.

use std::convert::Infallible;
use std::time::Instant;

use axum::body::{Body, Bytes};
use axum::http::{HeaderValue, header};
use axum::response::Response;
use futures::stream::{SelectAll, StreamExt};
use kvasir_kernels::step::Sampled;
use serde::Serialize;

use super::Serving;
use super::error::ApiError;
use super::params::Params;
use crate::engine::{Request, RequestId, SamplingParams};
use crate::output::{Event, Finish, Generation, Running};
use crate::text::Detokenizer;

/// One prompt, ready to run.
#[derive(Debug)]
pub(super) struct Prepared {
    pub(super) prompt: Vec<u32>,
    pub(super) detokenizer: Detokenizer,
    pub(super) max_tokens: u32,
    pub(super) logprobs: Option<u8>,
    pub(super) prompt_logprobs: Option<u8>,
}

impl Serving {
    /// Checks a prompt and settles how many tokens it may get: what is asked for, or what the context has room for.
    pub(super) fn check_prompt(
        &self,
        prompt: &[u32],
        asked: Option<u32>,
        field: &str,
    ) -> Result<u32, ApiError> {
        let facts = self.outputs.engine().facts();
        if prompt.is_empty() {
            return Err(ApiError::field(
                field,
                "empty; at least one token is needed",
            ));
        }
        if let Some(id) = prompt.iter().find(|id| **id >= facts.vocab_size) {
            return Err(ApiError::field(
                field,
                format!(
                    "token {id} is not below the vocabulary's size, {}",
                    facts.vocab_size
                ),
            ));
        }
        let longest = facts.max_model_len as usize;
        let room = longest.saturating_sub(prompt.len());
        let max_tokens = asked.map_or(room, |n| n as usize);
        if max_tokens > room || (asked.is_none() && room == 0) {
            let asked = asked.map_or(String::new(), |n| format!(" and max_tokens is {n}"));
            return Err(ApiError {
                code: Some("context_length_exceeded"),
                ..ApiError::field(
                    field,
                    format!(
                        "the prompt has {} tokens{asked}, the longest context is {longest}; shorten the prompt or ask for fewer tokens",
                        prompt.len()
                    ),
                )
            });
        }
        Ok(max_tokens as u32)
    }

    /// Submits every prompt, or none: the first refusal takes the others back.
    pub(super) fn submit(
        &self,
        prepared: Vec<Prepared>,
        params: &Params,
        arrived: Instant,
    ) -> Result<Vec<Running>, ApiError> {
        let facts = self.outputs.engine().facts();
        let mut stop_token_ids = params.stop_token_ids.clone();
        if !params.ignore_eos {
            stop_token_ids.extend(&facts.eos_token_ids);
        }
        let submit = |one: Prepared| {
            let request = Request {
                id: RequestId(self.ids.next()),
                prompt: one.prompt,
                max_tokens: one.max_tokens,
                stop_token_ids: stop_token_ids.clone(),
                sampling: SamplingParams {
                    temperature: params.temperature,
                    top_p: params.top_p,
                    top_k: params.top_k,
                    seed: params.seed.unwrap_or_else(|| self.ids.seed()),
                },
                logprobs: one.logprobs,
                prompt_logprobs: one.prompt_logprobs,
            };
            let stop = params.stop.clone();
            self.outputs.submit(Generation {
                request,
                detokenizer: one.detokenizer,
                stop,
                arrived,
            })
        };
        prepared
            .into_iter()
            .map(submit)
            .collect::<Result<_, _>>()
            .map_err(ApiError::from)
    }
}

/// A whole answer.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) text: String,
    pub(super) tokens: Vec<Sampled>,
    pub(super) prompt_logprobs: Vec<Sampled>,
    pub(super) finish: Finish,
}

/// Waits for the end of one request.
pub(super) async fn collect(mut running: Running) -> Result<Answer, ApiError> {
    let (mut text, mut tokens, mut prompt_logprobs) = (String::new(), Vec::new(), Vec::new());
    while let Some(event) = running.next().await {
        text.push_str(&event.text);
        tokens.extend(event.tokens);
        prompt_logprobs.extend(event.prompt_logprobs);
        if let Some(finish) = event.finished {
            return Ok(Answer {
                text,
                tokens,
                prompt_logprobs,
                finish,
            });
        }
    }
    Err(engine_gone())
}

/// The engine has failed in the middle of an answer; another replica may have more luck.
pub(super) fn engine_gone() -> ApiError {
    ApiError::internal("the engine has stopped")
}

/// Writes the chunks of one call.
pub(super) trait ChunkWriter: Send + 'static {
    /// An event of the request with this index. `Err` ends the stream with that error.
    fn event(&mut self, index: usize, event: Event, out: &mut Frames) -> Result<(), ApiError>;
    /// All requests have ended.
    fn end(&mut self, out: &mut Frames);
}

/// Server-sent events, ready to be sent.
#[derive(Debug, Default)]
pub(super) struct Frames(Vec<u8>);

impl Frames {
    /// `data: {...}` and an empty line.
    pub(super) fn json(&mut self, value: &impl Serialize) {
        let start = self.0.len();
        self.0.extend_from_slice(b"data: ");
        match serde_json::to_writer(&mut self.0, value) {
            Ok(()) => self.0.extend_from_slice(b"\n\n"),
            // Not with the types of `wire`: their maps have string keys only.
            Err(_) => self.0.truncate(start),
        }
    }

    fn done(&mut self) {
        self.0.extend_from_slice(b"data: [DONE]\n\n");
    }
}

/// An event stream of all requests of a call. Its drop, when the client leaves, ends them.
pub(super) fn event_stream(running: Vec<Running>, writer: impl ChunkWriter) -> Response {
    let n_left = running.len();
    let events: SelectAll<_> = running
        .into_iter()
        .enumerate()
        .map(|(i, running)| running.map(move |event| (i, event)))
        .collect();
    let state = Some((events, writer, n_left));
    let frames = futures::stream::unfold(state, |state| async move {
        let (mut events, mut writer, mut n_left) = state?;
        loop {
            let mut out = Frames::default();
            if n_left == 0 {
                writer.end(&mut out);
                out.done();
                return Some((Ok::<_, Infallible>(Bytes::from(out.0)), None));
            }
            let result = match events.next().await {
                Some((index, event)) => {
                    n_left -= usize::from(event.finished.is_some());
                    writer.event(index, event, &mut out)
                }
                None => Err(engine_gone()),
            };
            if let Err(error) = result {
                out.json(&error.body());
                out.done();
                return Some((Ok(Bytes::from(out.0)), None));
            }
            if !out.0.is_empty() {
                return Some((Ok(Bytes::from(out.0)), Some((events, writer, n_left))));
            }
        }
    });
    let mut response = Response::new(Body::from_stream(frames));
    let headers = response.headers_mut();
    headers.insert(
        header::CONTENT_TYPE,
        HeaderValue::from_static("text/event-stream; charset=utf-8"),
    );
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    response
}

/// An event stream that needs no engine: `first`, and the writer's end.
pub(super) fn finished_stream(mut first: Frames, writer: impl ChunkWriter) -> Response {
    let mut rest = event_stream(Vec::new(), writer);
    let end = std::mem::take(rest.body_mut()).into_data_stream();
    let head = Bytes::from(std::mem::take(&mut first.0));
    *rest.body_mut() = Body::from_stream(futures::stream::once(async { Ok(head) }).chain(end));
    rest
}
