//! `POST /v1/chat/completions`: messages and tools through the model's chat template, and the answer, whole or streamed, taken
//! apart into reasoning, content and tool calls.

use std::sync::Arc;

use axum::response::Response;

use super::Serving;
use super::answer::{AnswerFormat, AnswerParser, CallFormat, Parts};
use super::conversation::Conversation;
use super::error::ApiError;
use super::fields::{Fields, Interface};
use super::generate::{
    Answer, ChunkWriter, Frames, Prepared, collect_all, event_stream, json_response,
};
use super::incoming::Incoming;
use super::logprobs::{ChatLogprobs, PromptLogprobs};
use super::params::{MAX_LOGPROBS, Params, StreamUsage, take_n_logprobs, truncate};
use super::structured::{Structured, refusal};
use super::tools::{ToolChoice, Tools};
use super::wire::{
    Chat, ChatChoice, ChatDelta, Delta, Message, ToolCall, Usage, chunk_usage, reasons,
};
use crate::engine::TokenLogprobs;
use crate::frontend::RequestEvent;
use crate::frontend::budget::Purpose;
use crate::grammar::CompiledGrammar;
use crate::grammar::lark::{Reasoning, after_reasoning};
use crate::text::reasoning::{PromptEnd, THINK, THINK_END};
use crate::text::stop::StopStrings;
use crate::text::tool_calls::ToolCallFormat;
use crate::text::{Detokenizer, StopMatcher};

/// What a body asks for.
struct ChatRequest {
    params: Params,
    conversation: Conversation,
    tools: Tools,
    structured: Option<Structured>,
    /// Reasoning is part of the answer.
    include_reasoning: bool,
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
        let tools = Tools::take(&mut fields)?;
        serving.check_tools(&tools)?;
        let structured = Structured::take(&mut fields)?;
        let conversation = Conversation::take(&mut fields, tools.for_template())?;
        let include_reasoning = fields.take("include_reasoning")?.unwrap_or(true);
        fields.finish(Interface::Chat)?;
        serving.check_choices(&params.choices, 1)?;
        Ok(Self {
            params,
            conversation,
            tools,
            structured,
            include_reasoning,
            max_tokens,
            logprobs: logprobs.then(|| top_logprobs.unwrap_or(0)),
        })
    }
}

impl Serving {
    /// Refuses tools that the model would never see, unless its answer is held to them.
    fn check_tools(&self, tools: &Tools) -> Result<(), ApiError> {
        let style = self.tokenizer.chat_template()?.style();
        match tools.choice == ToolChoice::Auto && !style.shows_tools {
            true => Err(ApiError::field(
                "tools",
                "the chat template of this model shows it no tools; with \"tool_choice\": \"required\" or a named function its answer is a call",
            )),
            false => Ok(()),
        }
    }

    /// The prompt in tokens, and where its text leaves the model.
    async fn encode_chat(
        &self,
        conversation: Conversation,
        params: &Params,
        max_tokens: Option<u32>,
    ) -> Result<(Vec<u32>, PromptEnd), ApiError> {
        let tokenizer = Arc::clone(&self.tokenizer);
        let max_model_len = self.engine.handle().model_info().max_model_len;
        let keep = params.truncation.keeps(max_model_len, max_tokens)?;
        // A prompt that is cut may be as long as it likes.
        let longest = keep.is_none().then_some(max_model_len);
        let n_bytes = conversation.n_bytes;
        let encode = move || conversation.encode(&tokenizer, longest);
        let rendered = self.pool.run(n_bytes, encode).await?;
        let mut rendered = rendered.map_err(|error| ApiError::from(error).about("messages"))?;
        truncate(&mut rendered.tokens, keep);
        Ok((rendered.tokens, rendered.end))
    }

    /// An answer's id, and when it was begun.
    fn answer_name(&self, params: &Params) -> (Arc<str>, u64) {
        match &params.resume {
            Some(resume) => (resume.id.as_str().into(), resume.created),
            None => {
                let id = format!("chatcmpl-{}", self.ids.call());
                (id.into(), super::unix_time())
            }
        }
    }

    /// How the answer to a prompt that ends so is taken apart.
    fn answer_format(&self, tools: &Tools, end: PromptEnd) -> AnswerFormat {
        AnswerFormat {
            thinking: match end {
                PromptEnd::BehindReasoning => None,
                end => self
                    .splits_reasoning
                    .then_some(end == PromptEnd::InReasoning),
            },
            calls: tools.format(self.tool_calls).map(|format| CallFormat {
                format,
                types: tools.types(),
                most: if tools.parallel { usize::MAX } else { 1 },
            }),
        }
    }

    /// What the answer has to match, compiled.
    async fn answer_grammar(
        &self,
        tools: &Tools,
        structured: Option<Structured>,
        format: &AnswerFormat,
    ) -> Result<Option<CompiledGrammar>, ApiError> {
        let (grammar, field) = match &format.calls {
            Some(calls) => {
                let vocabulary = self.tokenizer.vocabulary();
                let structured = structured.as_ref().map(|structured| &structured.grammar);
                let grammar = tools.grammar(calls.format, vocabulary, structured)?;
                (grammar, "tools".to_owned())
            }
            None => match structured {
                Some(Structured { grammar, field }) => (Some(grammar), field),
                None => (None, String::new()),
            },
        };
        let Some(grammar) = grammar else {
            return Ok(None);
        };
        let grammar = match format.thinking {
            None => Ok(grammar),
            Some(true) => after_reasoning(&grammar, Reasoning::Begun, (THINK, THINK_END)),
            Some(false) => after_reasoning(&grammar, Reasoning::Possible, (THINK, THINK_END)),
        };
        let grammar = grammar.map_err(|error| refusal(&field, error))?;
        let structured = Structured { grammar, field };
        structured.compile(self).await.map(Some)
    }

    /// Whether special tokens are part of an answer's text: where one of them begins a call.
    fn skips_special_tokens(&self, asked: bool, calls: Option<ToolCallFormat>) -> bool {
        let mark = calls.and_then(ToolCallFormat::mark);
        let is_special = |mark| self.tokenizer.vocabulary().special_token(mark).is_some();
        asked && !mark.is_some_and(is_special)
    }
}

/// The choices of a call, as far as its client has them.
fn choices(
    format: &AnswerFormat,
    id: &Arc<str>,
    params: &Params,
    detokenizer: &Detokenizer,
) -> Vec<Choice> {
    let resume = params.resume.as_ref();
    let choice = |index: usize| {
        let resumed = resume.and_then(|resume| resume.choices.get(index));
        let said = resumed.map(|tokens| (tokens.as_slice(), detokenizer.clone(), &params.stop));
        Choice::new(format.parser(id, index), said)
    };
    (0..params.choices.n.get() as usize).map(choice).collect()
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
        tools,
        structured,
        include_reasoning,
        max_tokens,
        logprobs,
    } = ChatRequest::parse(&serving, &body)?;
    drop(body);
    params.settle_seed(|| serving.ids.seed());
    let logits = serving.logits_options(params.logits.clone()).await?;
    let (prompt, end) = serving
        .encode_chat(conversation, &params, max_tokens)
        .await?;
    let max_tokens = serving.check_prompt(&prompt, max_tokens, "messages")?;
    let format = serving.answer_format(&tools, end);
    let grammar = serving.answer_grammar(&tools, structured, &format).await?;
    // An answer is a text of its own, unlike a completion.
    let vocabulary = Arc::clone(serving.tokenizer.vocabulary());
    let calls = format.calls.as_ref().map(|calls| calls.format);
    let skip_special = serving.skips_special_tokens(params.skip_special_tokens, calls);
    let detokenizer = Detokenizer::new(vocabulary, skip_special);
    let (id, created) = serving.answer_name(&params);
    let choices = choices(&format, &id, &params, &detokenizer);
    let tells_prompt = params.return_token_ids && params.resume.is_none();
    let mut call = Call {
        created,
        n_prompt: prompt.len(),
        n_cached: 0,
        choices,
        prompt: tells_prompt.then(|| prompt.clone()),
        options: Options {
            with_logprobs: logprobs.is_some(),
            include_reasoning,
            is_named: matches!(tools.choice, ToolChoice::Named(_)),
        },
        id,
        params,
        serving: Arc::clone(&serving),
    };
    let prepared = Prepared {
        prompt,
        detokenizer,
        max_tokens,
        logprobs,
        prompt_logprobs: call.params.prompt_logprobs,
        grammar,
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
#[derive(Debug)]
struct Choice {
    parser: AnswerParser,
    /// Its role is sent.
    started: bool,
    /// Its client has seen the end of it before.
    was_over: bool,
    n_completion: usize,
}

impl Choice {
    /// `said`: the tokens that its client has already, what makes text of them, and what ends it.
    fn new(mut parser: AnswerParser, said: Option<(&[u32], Detokenizer, &StopStrings)>) -> Self {
        let n_completion = said.as_ref().map_or(0, |(tokens, ..)| tokens.len());
        let started = said.is_some();
        if let Some((tokens, mut detokenizer, stop)) = said {
            let (mut text, mut decided) = (String::new(), String::new());
            tokens
                .iter()
                .for_each(|&id| detokenizer.push(id, &mut text));
            StopMatcher::new(stop.clone()).push(&text, &mut decided);
            parser.push(decided, false);
        }
        Self {
            parser,
            started,
            was_over: false,
            n_completion,
        }
    }
}

/// What a call wants of its answer.
#[derive(Clone, Copy, Debug)]
struct Options {
    with_logprobs: bool,
    include_reasoning: bool,
    /// A function is named that the answer calls.
    is_named: bool,
}

/// A call under way.
struct Call {
    id: Arc<str>,
    created: u64,
    params: Params,
    options: Options,
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
            let parts = self.parts(index, answer.text, true);
            let finish_reason = self.finish_reason(index, finish_reason);
            let reasoning = (!parts.reasoning.is_empty()).then_some(parts.reasoning);
            let is_call_alone = parts.content.is_empty() && !parts.tool_calls.is_empty();
            choices.push(ChatChoice {
                index,
                message: Message {
                    role: "assistant",
                    content: (!is_call_alone).then_some(parts.content),
                    reasoning_content: reasoning.clone(),
                    reasoning,
                    tool_calls: parts.tool_calls.into_iter().map(ToolCall::from).collect(),
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

    /// What a piece of a choice's text brings.
    fn parts(&mut self, index: usize, text: String, ended: bool) -> Parts {
        let mut parts = self.choices[index].parser.push(text, ended);
        if !self.options.include_reasoning {
            parts.reasoning.clear();
        }
        parts
    }

    /// As in OpenAI's interface: an answer that came to calls ends with these, unless they were asked for by name.
    fn finish_reason(&self, index: usize, reason: &'static str) -> &'static str {
        let has_called = self.choices[index].parser.has_called;
        match reason == "stop" && has_called && !self.options.is_named {
            true => "tool_calls",
            false => reason,
        }
    }

    fn usage(&self) -> Usage {
        let n_completion = self.choices.iter().map(|choice| choice.n_completion);
        Usage::new(self.n_prompt, self.n_cached, n_completion.sum())
    }

    fn logprobs(&self, tokens: &[TokenLogprobs]) -> Option<ChatLogprobs> {
        self.options.with_logprobs.then(|| {
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
                ..Delta::default()
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
        let wanted = (self.params.return_token_ids || self.options.with_logprobs)
            && !event.tokens.is_empty();
        let parts = self.parts(index, event.text, event.finished.is_some());
        if parts.is_empty() && event.finished.is_none() && !wanted {
            return Ok(());
        }
        let (finish_reason, stop_reason) = match event.finished {
            None => (None, None),
            Some(reason) => {
                let (finish, stop) = reasons(reason, &self.params.stop_token_ids)?;
                (Some(self.finish_reason(index, finish)), stop)
            }
        };
        let says_nothing = parts.is_empty() && finish_reason.is_none();
        let reasoning = (!parts.reasoning.is_empty()).then_some(parts.reasoning);
        let choice = ChatDelta {
            index,
            delta: Delta {
                role: None,
                content: (!parts.content.is_empty() || says_nothing).then_some(parts.content),
                reasoning_content: reasoning.clone(),
                reasoning,
                tool_calls: parts.tool_calls,
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
