//! `POST /v1/completions`: prompts as text or tokens, several in one call, whole or streamed.

use std::sync::Arc;

use axum::response::Response;

use super::Serving;
use super::error::ApiError;
use super::fields::{Fields, Interface};
use super::generate::{
    Answer, ChunkWriter, Frames, Prepared, collect_all, event_stream, finished_stream,
    json_response,
};
use super::incoming::Incoming;
use super::logprobs::{CompletionScorer, PromptLogprobs, TextOffsets};
use super::params::{Params, StreamUsage, take_n_logprobs, truncate};
use super::prompts::{Prompt, PromptLimits, take_prompts};
use super::structured::Structured;
use super::wire::{Completion, CompletionChoice, Usage, chunk_usage, reasons};
use crate::engine::FinishReason;
use crate::frontend::RequestEvent;
use crate::frontend::budget::{Lease, Purpose};
use crate::text::{Detokenizer, TextError, Tokenizer};

/// As in OpenAI's interface.
const DEFAULT_MAX_TOKENS: u32 = 16;

/// What a body asks for.
struct CompletionRequest {
    prompts: Vec<Prompt>,
    structured: Option<Structured>,
    options: Options,
}

struct Options {
    params: Params,
    /// `None`: as many as the model's defaults and the context have room for.
    max_tokens: Option<u32>,
    logprobs: Option<u8>,
    echo: bool,
    add_special_tokens: bool,
    /// The last tokens of a prompt that are kept; `None`: all.
    keep: Option<usize>,
}

impl CompletionRequest {
    fn parse(serving: &Serving, body: &[u8]) -> Result<Self, ApiError> {
        let mut fields = Fields::parse(body)?;
        let params = Params::take(&mut fields, &serving.defaults)?;
        serving.check_model(params.model.as_deref())?;
        let max_model_len = serving.engine.handle().model_info().max_model_len;
        let limits = PromptLimits {
            max_prompts: serving.max_prompts,
            max_tokens: max_model_len,
        };
        let mut prompts = take_prompts(&mut fields, limits)?;
        let structured = Structured::take(&mut fields)?;
        // Left out, it is OpenAI's default; null is no limit, as in vLLM.
        let max_tokens = match fields.take_null("max_tokens") {
            true => None,
            false => Some(fields.take("max_tokens")?.unwrap_or(DEFAULT_MAX_TOKENS)),
        };
        let options = Options {
            keep: params.truncation.keeps(max_model_len, max_tokens)?,
            params,
            max_tokens,
            logprobs: take_n_logprobs(&mut fields, "logprobs")?,
            echo: fields.take("echo")?.unwrap_or(false),
            add_special_tokens: fields.take("add_special_tokens")?.unwrap_or(true),
        };
        fields.finish(Interface::Completions)?;
        serving.check_choices(&options.params.choices, prompts.len())?;
        if options.max_tokens == Some(0) && options.params.choices.beams().is_some() {
            return Err(ApiError::field(
                "max_tokens",
                "0; beams need 1 token at least, or leave use_beam_search out",
            ));
        }
        if options.max_tokens == Some(0) && !options.echo {
            return Err(ApiError::field(
                "max_tokens",
                "0 is allowed only with \"echo\": true",
            ));
        }
        // What is wrong for certain is known before any work.
        for prompt in &mut prompts {
            match prompt {
                Prompt::Text(_) if options.keep.is_some() => {}
                Prompt::Text(text) => serving
                    .tokenizer
                    .check_length(text, max_model_len)
                    .map_err(|error| ApiError::from(error).about("prompt"))?,
                Prompt::Ids(ids) => {
                    truncate(ids, options.keep);
                    serving.check_prompt(ids, options.max_tokens, "prompt")?;
                }
            }
        }
        Ok(Self {
            prompts,
            structured,
            options,
        })
    }
}

impl Options {
    /// Log-probabilities of the prompt's tokens, and of so many alternatives: for themselves, or with the echo.
    fn scores_of_prompt(&self) -> Option<u8> {
        // Whoever resumes an answer has them.
        let echoed = self
            .logprobs
            .filter(|_| self.echo && self.params.resume.is_none());
        self.params.prompt_logprobs.max(echoed)
    }
}

/// Answers one call.
pub(super) async fn completions(
    Incoming {
        serving,
        body,
        lease,
        arrived,
    }: Incoming,
) -> Result<Response, ApiError> {
    let CompletionRequest {
        prompts,
        structured,
        mut options,
    } = CompletionRequest::parse(&serving, &body)?;
    drop(body);
    if prompts.len() == 1 {
        options.params.settle_seed(|| serving.ids.seed());
    }
    let grammar = match structured {
        Some(structured) => Some(structured.compile(&serving).await?),
        None => None,
    };
    let logits = serving
        .logits_options(options.params.logits.clone())
        .await?;
    let encoded = encode_all(&serving, prompts, &options).await?;

    let (mut prepared, mut choices) = (Vec::new(), Vec::new());
    for Encoded {
        prompt,
        text,
        detokenizer,
    } in encoded
    {
        let max_tokens = serving.check_prompt(&prompt, options.max_tokens, "prompt")?;
        for index in 0..options.params.choices.n.get() {
            let mut choice = Choice::new(&serving, &options, &prompt, &text, &detokenizer);
            if let Some(resume) = &options.params.resume {
                choice.resume(&prompt, resume.choices.get(index as usize));
            }
            choices.push(choice);
        }
        prepared.push(Prepared {
            prompt,
            detokenizer,
            max_tokens,
            logprobs: options.logprobs,
            prompt_logprobs: options.scores_of_prompt(),
            grammar: grammar.clone(),
        });
    }
    let prompt_is_unscored = options.scores_of_prompt().is_none();
    let (id, created) = match &options.params.resume {
        Some(resume) => (resume.id.clone(), resume.created),
        None => (format!("cmpl-{}", serving.ids.call()), super::unix_time()),
    };
    let mut call = Call {
        id,
        created,
        choices,
        options,
        serving: Arc::clone(&serving),
    };
    if call.options.max_tokens == Some(0) && prompt_is_unscored {
        // An echo alone needs no engine.
        return call.echo_only(lease);
    }
    let streams = serving.submit(prepared, &call.options.params, &logits, arrived)?;
    drop(lease);
    for (choice, stream) in call.choices.iter_mut().zip(&streams) {
        choice.was_over = stream.was_over();
    }
    if call.options.params.stream.is_some() {
        return Ok(event_stream(streams, call));
    }
    let answers = collect_all(streams, &call.options.params.choices).await?;
    call.whole(answers)
}

struct Encoded {
    prompt: Vec<u32>,
    text: String,
    detokenizer: Detokenizer,
}

async fn encode_all(
    serving: &Serving,
    prompts: Vec<Prompt>,
    options: &Options,
) -> Result<Vec<Encoded>, ApiError> {
    let tokenizer = Arc::clone(&serving.tokenizer);
    let (add_special_tokens, keep) = (options.add_special_tokens, options.keep);
    let skip_special_tokens = options.params.skip_special_tokens;
    let n_bytes = prompts.iter().map(|prompt| match prompt {
        Prompt::Text(text) => text.len(),
        // Tokens are turned into text only, which is far less work.
        Prompt::Ids(ids) => ids.len() / 8,
    });
    let encoded = serving.pool.run(n_bytes.sum(), move || {
        let encode = |prompt| {
            let (prompt, text) = match prompt {
                Prompt::Ids(ids) => (ids, None),
                Prompt::Text(text) => {
                    let mut ids = tokenizer.encode(&text, add_special_tokens)?;
                    let is_cut = truncate(&mut ids, keep);
                    (ids, (!is_cut).then_some(text))
                }
            };
            Ok(encoded(&tokenizer, prompt, text, skip_special_tokens))
        };
        prompts
            .into_iter()
            .map(encode)
            .collect::<Result<Vec<_>, TextError>>()
    });
    encoded
        .await?
        .map_err(|error| ApiError::from(error).about("prompt"))
}

/// A prompt in tokens, and its text: as it was sent, or what the tokens say.
fn encoded(
    tokenizer: &Tokenizer,
    prompt: Vec<u32>,
    text: Option<String>,
    skip_special: bool,
) -> Encoded {
    let vocabulary = Arc::clone(tokenizer.vocabulary());
    let text = text.unwrap_or_else(|| {
        let mut text = String::new();
        let mut detokenizer = Detokenizer::new(Arc::clone(&vocabulary), skip_special);
        prompt
            .iter()
            .for_each(|id| detokenizer.push(*id, &mut text));
        text
    });
    // A completion continues its prompt: a space at its start is kept.
    let detokenizer = Detokenizer::after(vocabulary, skip_special, &prompt);
    Encoded {
        prompt,
        text,
        detokenizer,
    }
}

/// The answer to one prompt, as far as it has come.
struct Choice {
    /// What comes before the first generated text; taken when that is sent.
    echo: String,
    /// Where log-probabilities are asked for: the first token of an echoed prompt, which has none.
    unscored: Option<u32>,
    scorer: Option<CompletionScorer>,
    /// Where asked for, until it is sent.
    prompt_token_ids: Option<Vec<u32>>,
    started: bool,
    /// Its client has seen the end of it before.
    was_over: bool,
    n_prompt: usize,
    n_cached: usize,
    n_completion: usize,
}

impl Choice {
    /// `detokenizer` has seen the prompt.
    fn new(
        serving: &Serving,
        options: &Options,
        prompt: &[u32],
        text: &str,
        detokenizer: &Detokenizer,
    ) -> Self {
        let vocabulary = serving.tokenizer.vocabulary();
        let params = &options.params;
        let offsets = || match options.echo {
            true => {
                let vocabulary = Arc::clone(vocabulary);
                TextOffsets::new(Detokenizer::new(vocabulary, params.skip_special_tokens), 0)
            }
            false => TextOffsets::new(detokenizer.clone(), text.chars().count()),
        };
        let scorer = options
            .logprobs
            .map(|_| CompletionScorer::new(vocabulary, params.token_names, offsets()));
        Self {
            scorer,
            unscored: prompt.first().copied().filter(|_| options.echo),
            echo: if options.echo { text } else { "" }.to_owned(),
            prompt_token_ids: params.return_token_ids.then(|| prompt.to_vec()),
            started: false,
            was_over: false,
            n_prompt: prompt.len(),
            n_cached: 0,
            n_completion: 0,
        }
    }

    /// Goes on after these tokens: what comes before them is sent.
    fn resume(&mut self, prompt: &[u32], tokens: Option<&Vec<u32>>) {
        let tokens = tokens.map_or(&[][..], Vec::as_slice);
        let echoed = if self.unscored.is_some() { prompt } else { &[] };
        if let Some(scorer) = &mut self.scorer {
            scorer.skip(echoed.iter().chain(tokens));
        }
        self.unscored = None;
        self.echo.clear();
        self.prompt_token_ids = None;
        self.started = true;
        self.n_completion = tokens.len();
    }

    /// Counts what an event brings.
    fn count(&mut self, event: &RequestEvent) {
        self.n_cached += event.cached_tokens.unwrap_or(0) as usize;
        self.n_completion += event.tokens.len();
    }

    fn usage(&self) -> Usage {
        Usage::new(self.n_prompt, self.n_cached, self.n_completion)
    }
}

/// A call under way.
struct Call {
    id: String,
    created: u64,
    options: Options,
    /// Those of the first prompt, then the second's.
    choices: Vec<Choice>,
    serving: Arc<Serving>,
}

impl Call {
    fn object(
        &self,
        choices: Vec<CompletionChoice>,
        usage: Option<Option<Usage>>,
    ) -> Completion<'_> {
        let Self {
            id,
            created,
            serving,
            ..
        } = self;
        Completion {
            id,
            object: "text_completion",
            created: *created,
            model: &serving.model_name,
            seed: self.options.params.seed(),
            choices,
            usage,
        }
    }

    /// Of all prompts, each counted once.
    fn usage(&self) -> Usage {
        let sum = |n: fn(&Choice) -> usize| self.choices.iter().map(n).sum();
        let prompts = self
            .choices
            .iter()
            .step_by(self.options.params.choices.n.get() as usize);
        Usage::new(
            prompts.map(|choice| choice.n_prompt).sum(),
            sum(|c| c.n_cached),
            sum(|c| c.n_completion),
        )
    }

    /// The part of one prompt's answer that `event` brings.
    fn choice(&mut self, index: usize, event: RequestEvent) -> Result<CompletionChoice, ApiError> {
        let params = &self.options.params;
        let choice = &mut self.choices[index];
        choice.started = true;
        choice.count(&event);
        let unscored = choice.unscored.take();
        let n_top = self.options.logprobs.map_or(0, usize::from);
        let logprobs = choice.scorer.as_mut().map(|scorer| {
            let echoed = match self.options.echo {
                true => &event.prompt_logprobs[..],
                false => &[],
            };
            scorer.score(unscored, echoed.iter().chain(&event.tokens), n_top)
        });
        let vocabulary = self.serving.tokenizer.vocabulary();
        let prompt_logprobs = params
            .prompt_logprobs
            .map(|n_top| PromptLogprobs::new(vocabulary, &event.prompt_logprobs, n_top.into()));
        let (finish_reason, stop_reason) = match event.finished {
            None => (None, None),
            Some(reason) => {
                let (finish, stop) = reasons(reason, &params.stop_token_ids)?;
                (Some(finish), stop)
            }
        };
        Ok(CompletionChoice {
            index,
            text: std::mem::take(&mut choice.echo) + &event.text,
            logprobs,
            finish_reason,
            stop_reason,
            prompt_token_ids: choice.prompt_token_ids.take(),
            prompt_logprobs,
            token_ids: params
                .return_token_ids
                .then(|| event.tokens.iter().map(|t| t.token).collect()),
            beam_score: event.beam_score,
        })
    }

    fn whole(mut self, answers: Vec<Answer>) -> Result<Response, ApiError> {
        let lease = self.serving.engine.budget().lease(Purpose::Answer);
        let (mut choices, mut leases) = (Vec::with_capacity(answers.len()), Vec::new());
        for (index, answer) in answers.into_iter().enumerate() {
            leases.extend(answer.leases);
            let event = RequestEvent {
                text: answer.text,
                tokens: answer.tokens,
                prompt_logprobs: answer.prompt_logprobs,
                cached_tokens: Some(answer.cached_tokens),
                finished: Some(answer.reason),
                beam_score: answer.beam_score,
                lease: None,
            };
            choices.push(self.choice(index, event)?);
        }
        let usage = self.usage();
        json_response(&self.object(choices, Some(Some(usage))), lease)
    }

    fn echo_only(mut self, lease: Lease) -> Result<Response, ApiError> {
        let finished = || RequestEvent {
            finished: Some(FinishReason::Length),
            ..RequestEvent::default()
        };
        let choices = (0..self.choices.len()).map(|i| self.choice(i, finished()));
        let choices = choices.collect::<Result<Vec<_>, _>>()?;
        let usage = self.usage();
        if self.options.params.stream.is_none() {
            return json_response(&self.object(choices, Some(Some(usage))), lease);
        }
        let mut echoed = Frames::default();
        let chunk_usage = chunk_usage(self.options.params.stream_usage(), || usage);
        echoed.json(&self.object(choices, chunk_usage));
        Ok(finished_stream(echoed, self))
    }
}

impl ChunkWriter for Call {
    fn event(
        &mut self,
        index: usize,
        event: RequestEvent,
        out: &mut Frames,
    ) -> Result<(), ApiError> {
        let Options {
            params,
            logprobs,
            echo,
            ..
        } = &self.options;
        let choice = &mut self.choices[index];
        if choice.was_over {
            return Ok(());
        }
        // Text that is held back is sent with what follows; tokens only where somebody asked for them.
        let wanted = params.return_token_ids || logprobs.is_some() || (!choice.started && *echo);
        if event.text.is_empty() && event.finished.is_none() && !wanted {
            choice.count(&event);
            return Ok(());
        }
        let part = self.choice(index, event)?;
        let usage = chunk_usage(self.options.params.stream_usage(), || {
            self.choices[index].usage()
        });
        out.json(&self.object(vec![part], usage));
        Ok(())
    }

    fn end(&mut self, out: &mut Frames) {
        if self.options.params.stream_usage() != StreamUsage::None {
            out.json(&self.object(Vec::new(), Some(Some(self.usage()))));
        }
    }
}
