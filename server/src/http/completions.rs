//! `POST /v1/completions`: prompts as text or tokens, several in one call, whole or streamed.

use std::sync::Arc;

use axum::Json;
use axum::response::{IntoResponse, Response};
use serde::Deserialize;

use super::Serving;
use super::error::ApiError;
use super::fields::Fields;
use super::generate::{Answer, ChunkWriter, Frames, Prepared, collect, event_stream};
use super::incoming::Incoming;
use super::logprobs::CompletionLogprobs;
use super::params::{Params, take_n_logprobs};
use super::wire::{Completion, CompletionChoice, Usage, reasons};
use crate::output::{Event, Finish};
use crate::text::{Detokenizer, TextError, Tokenizer};

/// As in OpenAI's interface.
const DEFAULT_MAX_TOKENS: u32 = 16;

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Prompts {
    Text(String),
    Texts(Vec<String>),
    Ids(Vec<u32>),
    IdLists(Vec<Vec<u32>>),
}

#[derive(Clone, Debug)]
enum Prompt {
    Text(String),
    Ids(Vec<u32>),
}

impl Prompts {
    fn into_list(self) -> Vec<Prompt> {
        match self {
            Self::Text(text) => vec![Prompt::Text(text)],
            Self::Texts(texts) => texts.into_iter().map(Prompt::Text).collect(),
            Self::Ids(ids) => vec![Prompt::Ids(ids)],
            Self::IdLists(lists) => lists.into_iter().map(Prompt::Ids).collect(),
        }
    }
}

struct Asked {
    prompts: Vec<Prompt>,
    params: Params,
    max_tokens: u32,
    logprobs: Option<u8>,
    echo: bool,
    add_special_tokens: bool,
}

fn parse(serving: &Serving, body: &[u8]) -> Result<Asked, ApiError> {
    let mut fields = Fields::parse(body)?;
    let params = Params::take(&mut fields, &serving.defaults)?;
    serving.check_model(params.model.as_deref())?;
    let prompts = match fields.take::<Prompts>("prompt") {
        Ok(Some(prompts)) => prompts,
        Ok(None) => return Err(ApiError::field("prompt", "missing; the field is required")),
        Err(_) => {
            let expected = "expected a string, a list of strings, a list of token ids, or a list of such lists";
            return Err(ApiError::field("prompt", expected));
        }
    };
    let asked = Asked {
        prompts: prompts.into_list(),
        max_tokens: fields.take("max_tokens")?.unwrap_or(DEFAULT_MAX_TOKENS),
        logprobs: take_n_logprobs(&mut fields, "logprobs")?,
        echo: fields.take("echo")?.unwrap_or(false),
        add_special_tokens: fields.take("add_special_tokens")?.unwrap_or(true),
        params,
    };
    fields.neutral("best_of", &["1"])?;
    fields.neutral("suffix", &["\"\""])?;
    fields.finish()?;
    let (n, most) = (asked.prompts.len(), serving.max_prompts);
    if n == 0 || n > most {
        return Err(ApiError::field(
            "prompt",
            format!("{n} prompts; 1 to {most} are allowed in one call"),
        ));
    }
    if asked.max_tokens == 0 && !asked.echo {
        return Err(ApiError::field(
            "max_tokens",
            "0 is allowed only with \"echo\": true",
        ));
    }
    Ok(asked)
}

/// Answers one call.
pub(super) async fn completions(
    Incoming {
        serving,
        body,
        arrived,
    }: Incoming,
) -> Result<Response, ApiError> {
    let asked = parse(&serving, &body)?;
    let prompts = asked.prompts.clone();
    let (tokenizer, add_special_tokens) =
        (Arc::clone(&serving.tokenizer), asked.add_special_tokens);
    let skip_special_tokens = asked.params.skip_special_tokens;
    let encoded = serving.pool.run(move || {
        let encode = |prompt| encode(&tokenizer, prompt, add_special_tokens, skip_special_tokens);
        prompts
            .into_iter()
            .map(encode)
            .collect::<Result<Vec<_>, TextError>>()
    });
    let encoded = encoded.await??;

    let (mut prepared, mut heads) = (Vec::new(), Vec::new());
    for Encoded {
        prompt,
        text,
        detokenizer,
    } in encoded
    {
        let max_tokens = serving.check_prompt(&prompt, Some(asked.max_tokens), "prompt")?;
        let prompt_logprobs = if asked.echo { asked.logprobs } else { None };
        heads.push(Head {
            prompt: prompt.clone(),
            text,
        });
        prepared.push(Prepared {
            prompt,
            detokenizer,
            max_tokens,
            logprobs: asked.logprobs,
            prompt_logprobs,
        });
    }
    let call = Call {
        id: format!("cmpl-{}", serving.ids.call()),
        created: super::unix_time(),
        offsets: vec![0; heads.len()],
        n_prompt: heads.iter().map(|h| h.prompt.len()).sum(),
        n_completion: 0,
        started: vec![false; heads.len()],
        heads,
        asked,
        serving: Arc::clone(&serving),
    };
    if call.asked.max_tokens == 0 && call.asked.logprobs.is_none() {
        // An echo alone needs no engine.
        return Ok(call.echo_only());
    }
    let running = serving.submit(prepared, &call.asked.params, arrived)?;
    if call.asked.params.stream.is_some() {
        return Ok(event_stream(running, call));
    }
    let mut answers = Vec::with_capacity(running.len());
    for one in running {
        answers.push(collect(one).await?);
    }
    call.whole(answers)
}

struct Encoded {
    prompt: Vec<u32>,
    text: String,
    detokenizer: Detokenizer,
}

fn encode(
    tokenizer: &Tokenizer,
    prompt: Prompt,
    special: bool,
    skip_special: bool,
) -> Result<Encoded, TextError> {
    let vocabulary = Arc::clone(tokenizer.vocabulary());
    let (prompt, text) = match prompt {
        Prompt::Text(text) => (tokenizer.encode(&text, special)?, text),
        Prompt::Ids(ids) => {
            let mut text = String::new();
            let mut detokenizer = Detokenizer::new(Arc::clone(&vocabulary), skip_special);
            ids.iter().for_each(|id| detokenizer.push(*id, &mut text));
            (ids, text)
        }
    };
    // A completion continues its prompt: a space at its start is kept.
    let detokenizer = Detokenizer::after(vocabulary, skip_special, &prompt);
    Ok(Encoded {
        prompt,
        text,
        detokenizer,
    })
}

/// What an echo repeats.
struct Head {
    prompt: Vec<u32>,
    text: String,
}

/// A call under way.
struct Call {
    id: String,
    created: u64,
    asked: Asked,
    heads: Vec<Head>,
    /// Where the next token's text begins, by prompt (for `text_offset`).
    offsets: Vec<usize>,
    /// Whether anything was sent for a prompt.
    started: Vec<bool>,
    n_prompt: usize,
    n_completion: usize,
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
            choices,
            usage,
        }
    }

    fn usage(&self) -> Usage {
        Usage::new(self.n_prompt, self.n_completion)
    }

    /// The part of one prompt's answer that `event` brings.
    fn choice(&mut self, index: usize, event: Event) -> Result<CompletionChoice, ApiError> {
        let first = !std::mem::replace(&mut self.started[index], true);
        let head = &self.heads[index];
        let vocabulary = self.serving.tokenizer.vocabulary();
        let offset = &mut self.offsets[index];
        self.n_completion += event.tokens.len();
        let logprobs = self.asked.logprobs.map(|_| {
            let mut logprobs = CompletionLogprobs::default();
            if first {
                match self.asked.echo {
                    true => head
                        .prompt
                        .iter()
                        .take(1)
                        .for_each(|id| logprobs.push_unscored(vocabulary, *id, offset)),
                    false => *offset = head.text.chars().count(),
                }
            }
            for token in event.prompt_logprobs.iter().chain(&event.tokens) {
                logprobs.push(vocabulary, token, offset);
            }
            logprobs
        });
        let text = match first && self.asked.echo {
            true => format!("{}{}", head.text, event.text),
            false => event.text,
        };
        let (finish_reason, stop_reason) = match event.finished {
            None => (None, None),
            Some(finish) => {
                let (finish, stop) = reasons(finish, &self.asked.params.stop_token_ids)
                    .map_err(ApiError::internal)?;
                (Some(finish), stop)
            }
        };
        let with_ids = self.asked.params.return_token_ids;
        Ok(CompletionChoice {
            index,
            text,
            logprobs,
            finish_reason,
            stop_reason,
            prompt_token_ids: (with_ids && first).then(|| head.prompt.clone()),
            token_ids: with_ids.then(|| event.tokens.iter().map(|t| t.token).collect()),
        })
    }

    fn whole(mut self, answers: Vec<Answer>) -> Result<Response, ApiError> {
        let mut choices = Vec::with_capacity(answers.len());
        for (index, answer) in answers.into_iter().enumerate() {
            let Answer {
                text,
                tokens,
                prompt_logprobs,
                finish,
            } = answer;
            choices.push(self.choice(
                index,
                Event {
                    text,
                    tokens,
                    prompt_logprobs,
                    finished: Some(finish),
                },
            )?);
        }
        let usage = self.usage();
        Ok(Json(self.object(choices, Some(Some(usage)))).into_response())
    }

    fn echo_only(mut self) -> Response {
        let finished = || Event {
            finished: Some(Finish::Length),
            ..Event::default()
        };
        let choices: Vec<_> = (0..self.heads.len())
            .filter_map(|i| self.choice(i, finished()).ok())
            .collect();
        let usage = self.usage();
        if self.asked.params.stream.is_none() {
            return Json(self.object(choices, Some(Some(usage)))).into_response();
        }
        let mut echoed = Frames::default();
        echoed.json(&self.object(choices, self.null_usage()));
        super::generate::finished_stream(echoed, self)
    }

    fn null_usage(&self) -> Option<Option<Usage>> {
        self.asked
            .params
            .stream
            .is_some_and(|s| s.include_usage)
            .then_some(None)
    }
}

impl ChunkWriter for Call {
    fn event(&mut self, index: usize, event: Event, out: &mut Frames) -> Result<(), ApiError> {
        let first = !self.started[index];
        // Text that is held back is sent with what follows; tokens only where somebody asked for them.
        let wanted = self.asked.params.return_token_ids
            || self.asked.logprobs.is_some()
            || (first && self.asked.echo);
        if event.text.is_empty() && event.finished.is_none() && !wanted {
            self.n_completion += event.tokens.len();
            return Ok(());
        }
        let choice = self.choice(index, event)?;
        out.json(&self.object(vec![choice], self.null_usage()));
        Ok(())
    }

    fn end(&mut self, out: &mut Frames) {
        if self.null_usage().is_some() {
            out.json(&self.object(Vec::new(), Some(Some(self.usage()))));
        }
    }
}
