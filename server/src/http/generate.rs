//! From prompts in tokens to running requests, and from their events to whole answers or server-sent events.
//!
//! Shared by completions and chat. It knows events and text, and no wire format but that of an event stream.

use std::convert::Infallible;
use std::sync::Arc;

use axum::body::{Body, Bytes};
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use futures::stream::{SelectAll, StreamExt};
use serde::Serialize;

use super::Serving;
use super::choices::Choices;
use super::error::ApiError;
use super::logits_fields::LogitsFields;
use super::params::Params;
use super::structured::check_logits;
use crate::engine::constraint::Constraint;
use crate::engine::logits::{LogitsOptions, LogitsProcessors};
use crate::engine::{FinishReason, TokenLogprobs};
use crate::frontend::budget::Lease;
use crate::frontend::{Arrival, GenerationRequest, RequestEvent, RequestStream};
use crate::grammar::CompiledGrammar;
use crate::text::Detokenizer;

/// One prompt, ready to run.
#[derive(Debug)]
pub(super) struct Prepared {
    pub(super) prompt: Vec<u32>,
    pub(super) detokenizer: Detokenizer,
    pub(super) max_tokens: u32,
    pub(super) logprobs: Option<u8>,
    pub(super) prompt_logprobs: Option<u8>,
    /// What the text has to match.
    pub(super) grammar: Option<CompiledGrammar>,
}

impl Serving {
    /// Checks a prompt and settles how many tokens it may get: what is asked for, or else what the model's defaults
    /// and the context have room for.
    pub(super) fn check_prompt(
        &self,
        prompt: &[u32],
        asked: Option<u32>,
        field: &str,
    ) -> Result<u32, ApiError> {
        let info = self.engine.handle().model_info();
        if prompt.is_empty() {
            return Err(ApiError::field(
                field,
                "empty; at least one token is needed",
            ));
        }
        if let Some(id) = prompt.iter().find(|id| **id >= info.vocab_size) {
            return Err(ApiError::field(
                field,
                format!(
                    "token {id} is not below the vocabulary's size, {}",
                    info.vocab_size
                ),
            ));
        }
        let longest = info.max_model_len;
        let room = longest.saturating_sub(u32::try_from(prompt.len()).unwrap_or(u32::MAX));
        let default = self.defaults.max_tokens.map_or(room, |n| n.min(room));
        let max_tokens = asked.unwrap_or(default);
        if max_tokens > room || (asked.is_none() && room == 0) {
            return Err(match asked {
                Some(asked) if room > 0 => {
                    ApiError::answer_too_long(field, prompt.len(), asked, longest)
                }
                _ => ApiError::prompt_too_long(field, format!("{} tokens", prompt.len()), longest),
            });
        }
        Ok(max_tokens)
    }

    /// Checks that so many choices for each of so many prompts may be asked for.
    pub(super) fn check_choices(
        &self,
        choices: &Choices,
        n_prompts: usize,
    ) -> Result<(), ApiError> {
        let (field, n) = choices.n_sequences();
        let n = n.get() as usize;
        let most = self.engine.handle().model_info().limits.max_sequences;
        if n > most {
            return Err(ApiError::field(
                field,
                format!("{n} choices; the server runs {most} sequences at once (--max-num-seqs)"),
            ));
        }
        let most = self.max_prompts;
        if n > 1 && n_prompts > 1 && n * n_prompts > most {
            return Err(ApiError::field(
                field,
                format!(
                    "{n} choices for each of {n_prompts} prompts; at most {most} together (--max-prompts)"
                ),
            ));
        }
        Ok(())
    }

    /// What a call changes in its logits: bad words are tokenized where other text is.
    pub(super) async fn logits_options(
        &self,
        fields: LogitsFields,
    ) -> Result<LogitsOptions, ApiError> {
        let vocab_size = self.engine.handle().model_info().vocab_size;
        let tokenizer = Arc::clone(&self.tokenizer);
        match fields.n_bytes() {
            0 => fields.resolve(&tokenizer, vocab_size),
            n => {
                let resolve = move || fields.resolve(&tokenizer, vocab_size);
                self.pool.run(n, resolve).await?
            }
        }
    }

    /// Submits every prompt, or none: the first refusal takes the others back. The streams are those of the first prompt's
    /// choices, then the second's.
    pub(super) fn submit(
        &self,
        prepared: Vec<Prepared>,
        params: &Params,
        logits: &LogitsOptions,
        arrived: Arrival,
    ) -> Result<Vec<RequestStream>, ApiError> {
        let info = self.engine.handle().model_info();
        let mut stop_token_ids = params.stop_token_ids.clone();
        if !params.ignore_eos {
            stop_token_ids.extend(&info.eos_token_ids);
        }
        let mut resumed = Vec::new();
        for one in &prepared {
            params.logits.check_max_tokens(one.max_tokens)?;
            if one.grammar.is_some() {
                check_logits(logits)?;
            }
            if let Some(resume) = &params.resume {
                resume.check(prepared.len(), one.max_tokens, info.vocab_size)?;
                resumed.clone_from(&resume.choices);
            }
        }
        let submit = |one: Prepared| {
            let logits = match params.choices.beams() {
                // A default of the model's may be left: beams know no changes of logits.
                Some(_) => None,
                None => {
                    let (mut options, n_ids) = (logits.clone(), info.vocab_size);
                    options.constraint = one.grammar.as_ref().map(|grammar| {
                        let constraint = grammar.constraint(&stop_token_ids);
                        Box::new(constraint) as Box<dyn Constraint>
                    });
                    LogitsProcessors::new(options, &one.prompt, &stop_token_ids, n_ids)
                }
            };
            self.engine.generate(GenerationRequest {
                prompt: one.prompt,
                max_tokens: one.max_tokens,
                sampling: params.sampling(|| self.ids.seed()),
                logits: logits.map(Box::new),
                n: params.choices.n_answers(),
                beams: params.choices.beams(),
                stop_token_ids: stop_token_ids.clone(),
                stop: params.stop.clone(),
                logprobs: params.choices.logprobs(one.logprobs),
                prompt_logprobs: one.prompt_logprobs,
                cache_salt: params.cache_salt.clone(),
                resumed: resumed.clone(),
                detokenizer: one.detokenizer,
                arrived: arrived.clone(),
            })
        };
        let streams: Result<Vec<Vec<RequestStream>>, _> =
            prepared.into_iter().map(submit).collect();
        Ok(streams?.into_iter().flatten().collect())
    }
}

/// A whole answer.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) text: String,
    pub(super) tokens: Vec<TokenLogprobs>,
    pub(super) prompt_logprobs: Vec<TokenLogprobs>,
    /// Of the prompt, from the prefix cache.
    pub(super) cached_tokens: u32,
    pub(super) reason: FinishReason,
    /// With beams.
    pub(super) beam_score: Option<f32>,
    /// Its bytes in the budget.
    pub(super) leases: Vec<Lease>,
}

/// Waits for the answers of all prompts' requests, and keeps the choices that are returned.
pub(super) async fn collect_all(
    streams: Vec<RequestStream>,
    choices: &Choices,
) -> Result<Vec<Answer>, ApiError> {
    let mut answers = Vec::with_capacity(streams.len());
    for stream in streams {
        answers.push(collect(stream).await?);
    }
    match choices.best_of() {
        Some(best_of) => pick_best(answers, best_of.get() as usize, choices.n.get() as usize),
        None => Ok(answers),
    }
}

/// The `n` most likely of each `best_of` answers.
fn pick_best(answers: Vec<Answer>, best_of: usize, n: usize) -> Result<Vec<Answer>, ApiError> {
    let mut picked = Vec::with_capacity(answers.len() / best_of * n);
    let mut answers = answers.into_iter().peekable();
    while answers.peek().is_some() {
        let mut of_prompt: Vec<Answer> = answers.by_ref().take(best_of).collect();
        let failed = of_prompt.iter().find_map(|answer| match &answer.reason {
            FinishReason::Error(why) => Some(why.clone()),
            _ => None,
        });
        if let Some(why) = failed {
            return Err(ApiError::internal(why));
        }
        // One of them tells what the cache held of their prompt.
        let mut cached_tokens = of_prompt.iter().map(|answer| answer.cached_tokens).sum();
        of_prompt.sort_by(|a, b| sum_of_logprobs(b).total_cmp(&sum_of_logprobs(a)));
        of_prompt.truncate(n);
        for answer in &mut of_prompt {
            answer.cached_tokens = std::mem::take(&mut cached_tokens);
        }
        picked.extend(of_prompt);
    }
    Ok(picked)
}

fn sum_of_logprobs(answer: &Answer) -> f64 {
    let logprobs = answer.tokens.iter().filter_map(|token| token.logprob);
    logprobs.map(f64::from).sum()
}

/// Waits for the end of one request.
async fn collect(mut stream: RequestStream) -> Result<Answer, ApiError> {
    let (mut text, mut tokens, mut prompt_logprobs) = (String::new(), Vec::new(), Vec::new());
    let (mut leases, mut cached_tokens) = (Vec::new(), 0);
    while let Some(event) = stream.next().await {
        text.push_str(&event.text);
        tokens.extend(event.tokens);
        prompt_logprobs.extend(event.prompt_logprobs);
        leases.extend(event.lease);
        cached_tokens += event.cached_tokens.unwrap_or(0);
        if let Some(reason) = event.finished {
            return Ok(Answer {
                text,
                tokens,
                prompt_logprobs,
                cached_tokens,
                reason,
                beam_score: event.beam_score,
                leases,
            });
        }
    }
    Err(engine_gone())
}

/// The engine has failed in the middle of an answer; another replica may have more luck.
pub(super) fn engine_gone() -> ApiError {
    ApiError::internal("the engine has stopped")
}

/// An answer in JSON, which `lease` holds until the client has taken it.
pub(super) fn json_response(
    answer: &impl Serialize,
    mut lease: Lease,
) -> Result<Response, ApiError> {
    let json = serde_json::to_vec(answer).map_err(|e| ApiError::internal(e.to_string()))?;
    lease.resize(json.len())?;
    let body = Body::from(Bytes::from_owner(Leased { bytes: json, lease }));
    let content_type = HeaderValue::from_static("application/json");
    Ok(([(header::CONTENT_TYPE, content_type)], body).into_response())
}

/// Bytes that are counted as long as they are there.
struct Leased<L> {
    bytes: Vec<u8>,
    #[expect(dead_code, reason = "kept for its drop")]
    lease: L,
}

impl<L> AsRef<[u8]> for Leased<L> {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

/// Writes the chunks of one call.
pub(super) trait ChunkWriter: Send + 'static {
    /// An event of the request with this index. `Err` ends the stream with that error.
    fn event(
        &mut self,
        index: usize,
        event: RequestEvent,
        out: &mut Frames,
    ) -> Result<(), ApiError>;
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

    fn into_bytes(self, lease: Option<Lease>) -> Bytes {
        Bytes::from_owner(Leased {
            bytes: self.0,
            lease,
        })
    }
}

/// An event stream of all requests of a call. Its drop, when the client leaves, ends them.
pub(super) fn event_stream(streams: Vec<RequestStream>, writer: impl ChunkWriter) -> Response {
    let n_left = streams.len();
    let events: SelectAll<_> = streams
        .into_iter()
        .enumerate()
        .map(|(i, stream)| stream.map(move |event| (i, event)))
        .collect();
    let state = Some((events, writer, n_left));
    let frames = futures::stream::unfold(state, |state| async move {
        let (mut events, mut writer, mut n_left) = state?;
        loop {
            let mut out = Frames::default();
            if n_left == 0 {
                writer.end(&mut out);
                out.done();
                return Some((Ok::<_, Infallible>(out.into_bytes(None)), None));
            }
            let mut lease = None;
            let result = match events.next().await {
                Some((index, mut event)) => {
                    n_left -= usize::from(event.finished.is_some());
                    lease = event.lease.take();
                    writer.event(index, event, &mut out)
                }
                None => Err(engine_gone()),
            };
            if let Err(error) = result {
                out.json(&error.body());
                out.done();
                return Some((Ok(out.into_bytes(lease)), None));
            }
            if !out.0.is_empty() {
                let frame = out.into_bytes(lease);
                return Some((Ok(frame), Some((events, writer, n_left))));
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
pub(super) fn finished_stream(first: Frames, writer: impl ChunkWriter) -> Response {
    let mut rest = event_stream(Vec::new(), writer);
    let end = std::mem::take(rest.body_mut()).into_data_stream();
    let head = first.into_bytes(None);
    *rest.body_mut() = Body::from_stream(futures::stream::once(async { Ok(head) }).chain(end));
    rest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_are_those_of_the_greatest_sum_and_count_what_was_cached() {
        let answer = |text: &str, logprobs: &[f32], cached_tokens| Answer {
            text: text.to_owned(),
            tokens: logprobs
                .iter()
                .map(|&logprob| TokenLogprobs {
                    logprob: Some(logprob),
                    ..TokenLogprobs::default()
                })
                .collect(),
            prompt_logprobs: Vec::new(),
            cached_tokens,
            reason: FinishReason::Length,
            beam_score: None,
            leases: Vec::new(),
        };
        let answers = || {
            vec![
                answer("last of the first prompt", &[-1.0, -1.0], 16),
                answer("second", &[-1.5], 0),
                answer("first", &[-0.1, -0.1, -0.1], 0),
                answer("equal ones stay in order", &[-2.0], 0),
                answer("as here", &[-2.0], 0),
                answer("worst", &[-2.5], 0),
            ]
        };
        let picked = pick_best(answers(), 3, 2).unwrap();
        let found: Vec<(&str, u32)> = picked
            .iter()
            .map(|answer| (answer.text.as_str(), answer.cached_tokens))
            .collect();
        let want = [
            ("first", 16),
            ("second", 0),
            ("equal ones stay in order", 0),
            ("as here", 0),
        ];
        assert_eq!(found, want);
        let mut failed = answers();
        failed[0].reason = FinishReason::Error("the engine has stopped".to_owned());
        assert!(
            pick_best(failed, 3, 2).is_err(),
            "though it is not among the best"
        );
    }
}
