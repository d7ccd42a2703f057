//! `POST /v1/chat/completions`: messages through the model's chat template, whole or streamed.

use std::sync::Arc;

use axum::response::Response;

use super::Serving;
use super::conversation::Conversation;
use super::error::ApiError;
use super::fields::{Fields, Interface};
use super::generate::{
    Answer, ChunkWriter, Frames, Prepared, collect_all, event_stream, json_response,
};
use super::incoming::Incoming;
use super::logprobs::{ChatLogprobs, PromptLogprobs};
use super::params::{MAX_LOGPROBS, Params, StreamUsage, take_n_logprobs, truncate};
use super::wire::{Chat, ChatChoice, ChatDelta, Delta, Message, Usage, chunk_usage, reasons};
use crate::engine::TokenLogprobs;
use crate::frontend::RequestEvent;
use crate::frontend::budget::Purpose;
use crate::text::Detokenizer;

/// What a body asks for.
struct ChatRequest {
    params: Params,
    conversation: Conversation,
    /// `None`: as many as the model's defaults and the context have room for.
    max_tokens: Option<u32>,
    logprobs: Option<u8>,
}

impl ChatRequest {
    fn parse(serving: &Serving, body: &[u8]) -> Result<Self, ApiError> {
        let mut fields = Fields::parse(body)?;
        let params = Params::take(&mut fields, &serving.defaults)?;
        serving.check_model(params.model.as_deref())?;
        let max_tokens: Option<u32> = fields.take("max_tokens")?;
        let max_completion_tokens: Option<u32> = fields.take("max_completion_tokens")?;
        let max_tokens = max_completion_tokens.or(max_tokens);
        if max_tokens == Some(0) {
            return Err(ApiError::field(
                "max_tokens",
                "0; at least 1 token must be allowed",
            ));
        }
        let logprobs = fields.take("logprobs")?.unwrap_or(false);
        let top_logprobs = take_n_logprobs(&mut fields, "top_logprobs")?;
        if !logprobs && top_logprobs.is_some_and(|n| n > 0) {
            let message = format!("allowed only with \"logprobs\": true (0 to {MAX_LOGPROBS})");
            return Err(ApiError::field("top_logprobs", message));
        }
        let conversation = Conversation::take(&mut fields)?;
        fields.finish(Interface::Chat)?;
        serving.check_choices(&params.choices, 1)?;
        Ok(Self {
            params,
            conversation,
            max_tokens,
            logprobs: logprobs.then(|| top_logprobs.unwrap_or(0)),
        })
    }
}

/// Answers one call.
pub(super) async fn chat(
    Incoming {
        serving,
        body,
        lease,
        arrived,
    }: Incoming,
) -> Result<Response, ApiError> {
    let ChatRequest {
        mut params,
        conversation,
        max_tokens,
        logprobs,
    } = ChatRequest::parse(&serving, &body)?;
    drop(body);
    params.settle_seed(|| serving.ids.seed());
    let logits = serving.logits_options(params.logits.clone()).await?;
    let tokenizer = Arc::clone(&serving.tokenizer);
    let max_model_len = serving.engine.handle().model_info().max_model_len;
    let keep = params.truncation.keeps(max_model_len, max_tokens)?;
    // A prompt that is cut may be as long as it likes.
    let longest = keep.is_none().then_some(max_model_len);
    let mut prompt = serving
        .pool
        .run(conversation.n_bytes, move || {
            conversation.encode(&tokenizer, longest)
        })
        .await?
        .map_err(|error| ApiError::from(error).about("messages"))?;
    truncate(&mut prompt, keep);
    let max_tokens = serving.check_prompt(&prompt, max_tokens, "messages")?;
    let n = params.choices.n.get() as usize;
    let (id, created, choices) = match &params.resume {
        Some(resume) => {
            let choices = resume.choices.iter().map(|tokens| Choice {
                started: true,
                was_over: false,
                n_completion: tokens.len(),
            });
            (resume.id.clone(), resume.created, choices.collect())
        }
        None => {
            let id = format!("chatcmpl-{}", serving.ids.call());
            (id, super::unix_time(), vec![Choice::default(); n])
        }
    };
    let tells_prompt = params.return_token_ids && params.resume.is_none();
    let mut call = Call {
        id,
        created,
        n_prompt: prompt.len(),
        n_cached: 0,
        choices,
        prompt: tells_prompt.then(|| prompt.clone()),
        with_logprobs: logprobs.is_some(),
        params,
        serving: Arc::clone(&serving),
    };
    // An answer is a text of its own, unlike a completion.
    let vocabulary = Arc::clone(serving.tokenizer.vocabulary());
    let detokenizer = Detokenizer::new(vocabulary, call.params.skip_special_tokens);
    let prepared = Prepared {
        prompt,
        detokenizer,
        max_tokens,
        logprobs,
        prompt_logprobs: call.params.prompt_logprobs,
    };
    let streams = serving.submit(vec![prepared], &call.params, &logits, arrived)?;
    drop(lease);
    for (choice, stream) in call.choices.iter_mut().zip(&streams) {
        choice.was_over = stream.was_over();
    }
    if call.params.stream.is_some() {
        return Ok(event_stream(streams, call));
    }
    let answers = collect_all(streams, &call.params.choices).await?;
    call.whole(answers)
}

/// One choice, as far as it has come.
#[derive(Clone, Copy, Debug, Default)]
struct Choice {
    /// Its role is sent.
    started: bool,
    /// Its client has seen the end of it before.
    was_over: bool,
    n_completion: usize,
}

/// A call under way.
struct Call {
    id: String,
    created: u64,
    params: Params,
    with_logprobs: bool,
    n_prompt: usize,
    n_cached: usize,
    choices: Vec<Choice>,
    /// Where asked for, until it is sent.
    prompt: Option<Vec<u32>>,
    serving: Arc<Serving>,
}

impl Call {
    fn object<C>(
        &self,
        object: &'static str,
        choices: Vec<C>,
        usage: Option<Option<Usage>>,
        prompt_token_ids: Option<Vec<u32>>,
    ) -> Chat<'_, C> {
        let Self {
            id,
            created,
            serving,
            ..
        } = self;
        Chat {
            id,
            object,
            created: *created,
            model: &serving.model_name,
            seed: self.params.seed(),
            choices,
            usage,
            prompt_token_ids,
            prompt_logprobs: None,
        }
    }

    fn whole(mut self, answers: Vec<Answer>) -> Result<Response, ApiError> {
        let (mut choices, mut leases) = (Vec::with_capacity(answers.len()), Vec::new());
        let vocabulary = self.serving.tokenizer.vocabulary();
        let scored = answers.first().map(|answer| &answer.prompt_logprobs[..]);
        let prompt_logprobs = self
            .params
            .prompt_logprobs
            .map(|n_top| PromptLogprobs::new(vocabulary, scored.unwrap_or_default(), n_top.into()));
        for (index, answer) in answers.into_iter().enumerate() {
            let (finish_reason, stop_reason) = reasons(answer.reason, &self.params.stop_token_ids)?;
            choices.push(ChatChoice {
                index,
                message: Message {
                    role: "assistant",
                    content: answer.text,
                },
                logprobs: self.logprobs(&answer.tokens),
                finish_reason,
                stop_reason,
                token_ids: self.ids_of(&answer.tokens),
                beam_score: answer.beam_score,
            });
            self.n_cached += answer.cached_tokens as usize;
            self.choices[index].n_completion = answer.tokens.len();
            leases.extend(answer.leases);
        }
        let (usage, prompt_token_ids) = (self.usage(), self.prompt.take());
        let mut whole = self.object(
            "chat.completion",
            choices,
            Some(Some(usage)),
            prompt_token_ids,
        );
        whole.prompt_logprobs = prompt_logprobs;
        json_response(&whole, self.serving.engine.budget().lease(Purpose::Answer))
    }

    fn chunk(&mut self, choice: ChatDelta, out: &mut Frames) {
        let prompt_token_ids = self.prompt.take();
        let n_completion = self.choices[choice.index].n_completion;
        let so_far = Usage::new(self.n_prompt, self.n_cached, n_completion);
        out.json(&self.object(
            "chat.completion.chunk",
            vec![choice],
            chunk_usage(self.params.stream_usage(), || so_far),
            prompt_token_ids,
        ));
    }

    fn usage(&self) -> Usage {
        let n_completion = self.choices.iter().map(|choice| choice.n_completion);
        Usage::new(self.n_prompt, self.n_cached, n_completion.sum())
    }

    fn logprobs(&self, tokens: &[TokenLogprobs]) -> Option<ChatLogprobs> {
        self.with_logprobs.then(|| {
            ChatLogprobs::new(
                self.serving.tokenizer.vocabulary(),
                self.params.token_names,
                tokens,
            )
        })
    }

    fn ids_of(&self, tokens: &[TokenLogprobs]) -> Option<Vec<u32>> {
        self.params
            .return_token_ids
            .then(|| tokens.iter().map(|t| t.token).collect())
    }
}

impl ChunkWriter for Call {
    fn event(
        &mut self,
        index: usize,
        event: RequestEvent,
        out: &mut Frames,
    ) -> Result<(), ApiError> {
        if self.choices[index].was_over {
            return Ok(());
        }
        self.n_cached += event.cached_tokens.unwrap_or(0) as usize;
        if !std::mem::replace(&mut self.choices[index].started, true) {
            let delta = Delta {
                role: Some("assistant"),
                content: Some(String::new()),
            };
            let role = ChatDelta {
                index,
                delta,
                logprobs: None,
                finish_reason: None,
                stop_reason: None,
                token_ids: None,
            };
            self.chunk(role, out);
        }
        self.choices[index].n_completion += event.tokens.len();
        let wanted =
            (self.params.return_token_ids || self.with_logprobs) && !event.tokens.is_empty();
        if event.text.is_empty() && event.finished.is_none() && !wanted {
            return Ok(());
        }
        let (finish_reason, stop_reason) = match event.finished {
            None => (None, None),
            Some(reason) => {
                let (finish, stop) = reasons(reason, &self.params.stop_token_ids)?;
                (Some(finish), stop)
            }
        };
        let content = (!event.text.is_empty() || finish_reason.is_none()).then_some(event.text);
        let choice = ChatDelta {
            index,
            delta: Delta {
                role: None,
                content,
            },
            logprobs: if event.tokens.is_empty() {
                None
            } else {
                self.logprobs(&event.tokens)
            },
            finish_reason,
            stop_reason,
            token_ids: self.ids_of(&event.tokens),
        };
        self.chunk(choice, out);
        Ok(())
    }

    fn end(&mut self, out: &mut Frames) {
        if self.params.stream_usage() != StreamUsage::None {
            let usage = self.usage();
            let choices = Vec::<ChatDelta>::new();
            out.json(&self.object("chat.completion.chunk", choices, Some(Some(usage)), None));
        }
    }
}
