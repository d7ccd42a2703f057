//! Errors in OpenAI's form: `{"error": {"message", "type", "param", "code"}}`, with the HTTP status.
//!
//! One place decides what each refusal looks like to a client. It knows no routes.

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;

use crate::engine::SubmitError;
use crate::frontend::budget::BudgetExhausted;
use crate::text::TextError;

/// A refusal: one sentence, and the field that it is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ApiError {
    /// HTTP status.
    pub status: StatusCode,
    /// One sentence: what was found, what was expected, and the remedy.
    pub message: String,
    /// The request's field.
    pub param: Option<String>,
    /// A fixed word for programs.
    pub code: Option<&'static str>,
    /// Seconds until another try makes sense.
    pub retry_after_s: Option<u32>,
}

impl ApiError {
    /// A 400 that names a field.
    pub fn field(name: impl Into<String>, message: impl std::fmt::Display) -> Self {
        let name = name.into();
        let message = format!("{name}: {message}");
        Self {
            param: Some(name),
            ..Self::new(StatusCode::BAD_REQUEST, message)
        }
    }

    /// Names the field that a 400 is about, where it doesn't say so itself.
    pub fn about(self, field: &str) -> Self {
        match (self.status, &self.param) {
            (StatusCode::BAD_REQUEST, None) => Self {
                message: format!("{field}: {}", self.message),
                param: Some(field.to_owned()),
                ..self
            },
            _ => self,
        }
    }

    /// Any status.
    pub fn new(status: StatusCode, message: impl Into<String>) -> Self {
        Self {
            status,
            message: message.into(),
            param: None,
            code: None,
            retry_after_s: None,
        }
    }

    /// 404 for a model that isn't served.
    pub fn model_not_found(asked: &str, served: &str) -> Self {
        Self {
            code: Some("model_not_found"),
            param: Some("model".into()),
            ..Self::new(
                StatusCode::NOT_FOUND,
                format!("model: {asked:?} is not served here; the model is {served:?}"),
            )
        }
    }

    /// 400: the prompt is longer than the longest context. Clients know it by its code or by these words: LangChain by
    /// the first four, litellm by "this model's maximum context length is".
    pub fn prompt_too_long(field: &str, found: impl std::fmt::Display, max_model_len: u32) -> Self {
        Self {
            code: Some("context_length_exceeded"),
            ..Self::field(
                field,
                format!(
                    "the prompt is too long: it has {found}, this model's maximum context length is {max_model_len} tokens, the answer's included; shorten it"
                ),
            )
        }
    }

    /// 400: the prompt alone has room, its answer beside it has none. Known as [`Self::prompt_too_long`] is.
    pub fn answer_too_long(
        field: &str,
        prompt_tokens: usize,
        max_tokens: u32,
        max_model_len: u32,
    ) -> Self {
        Self {
            code: Some("context_length_exceeded"),
            ..Self::field(
                field,
                format!(
                    "the prompt has {prompt_tokens} tokens and max_tokens is {max_tokens}, this model's maximum context length is {max_model_len} tokens; shorten the prompt or ask for fewer tokens"
                ),
            )
        }
    }

    /// 401: no key, or none that is known.
    pub fn unauthorized(message: impl Into<String>) -> Self {
        Self {
            code: Some("invalid_api_key"),
            ..Self::new(StatusCode::UNAUTHORIZED, message)
        }
    }

    /// 503: try again soon, here or elsewhere.
    pub fn unavailable(message: impl Into<String>) -> Self {
        Self {
            retry_after_s: Some(1),
            ..Self::new(StatusCode::SERVICE_UNAVAILABLE, message)
        }
    }

    /// 429: there is more to do than fits.
    pub fn busy(code: &'static str, message: impl std::fmt::Display) -> Self {
        Self {
            code: Some(code),
            retry_after_s: Some(1),
            ..Self::new(
                StatusCode::TOO_MANY_REQUESTS,
                format!("{message}; try again later"),
            )
        }
    }

    /// 500.
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, message)
    }

    /// The body, which is also what a stream that has begun ends with.
    pub fn body(&self) -> ErrorBody<'_> {
        ErrorBody {
            error: ErrorObject {
                message: &self.message,
                r#type: match self.status {
                    StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
                    StatusCode::NOT_FOUND => "not_found_error",
                    status if status.is_server_error() => "server_error",
                    _ => "invalid_request_error",
                },
                param: self.param.as_deref(),
                code: self.code,
            },
        }
    }
}

/// `{"error": ...}`.
#[derive(Debug, Serialize)]
pub struct ErrorBody<'a> {
    error: ErrorObject<'a>,
}

#[derive(Debug, Serialize)]
struct ErrorObject<'a> {
    message: &'a str,
    r#type: &'static str,
    param: Option<&'a str>,
    code: Option<&'static str>,
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.body())).into_response();
        if let Some(seconds) = self.retry_after_s {
            response
                .headers_mut()
                .insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        response
    }
}

impl From<SubmitError> for ApiError {
    fn from(error: SubmitError) -> Self {
        let message = error.to_string();
        match error {
            SubmitError::QueueFull { .. } => Self::busy("queue_full", message),
            SubmitError::PromptTooLong {
                prompt_tokens,
                max_model_len,
            } => Self::prompt_too_long("prompt", format!("{prompt_tokens} tokens"), max_model_len),
            SubmitError::NeverFits { .. } => Self {
                code: Some("context_length_exceeded"),
                ..Self::new(
                    StatusCode::BAD_REQUEST,
                    format!("{message}; shorten the prompt or lower max_tokens"),
                )
            },
            SubmitError::TooManySequences { .. } => Self::field("n", message),
            SubmitError::TooWide { .. } => Self::field(
                "use_beam_search",
                format!("{message}; ask for fewer beams (best_of, else n) or fewer stop_token_ids"),
            ),
            SubmitError::Stopped => Self::unavailable(message),
        }
    }
}

impl From<BudgetExhausted> for ApiError {
    fn from(exhausted: BudgetExhausted) -> Self {
        Self::busy("memory_full", exhausted.to_string())
    }
}

impl From<TextError> for ApiError {
    fn from(error: TextError) -> Self {
        let message = error.to_string();
        match error {
            TextError::Template(_) | TextError::NoTemplate => Self {
                param: Some("messages".into()),
                ..Self::new(StatusCode::BAD_REQUEST, message)
            },
            TextError::NoCut { .. } => Self::new(StatusCode::BAD_REQUEST, message),
            TextError::TooLong { .. } => Self {
                code: Some("context_length_exceeded"),
                ..Self::new(StatusCode::BAD_REQUEST, format!("{message}; shorten it"))
            },
            TextError::Busy { .. } => Self::busy("tokenizer_busy", message),
            TextError::Stopped => Self::unavailable(message),
            TextError::Panicked
            | TextError::Encode(_)
            | TextError::File { .. }
            | TextError::Decoder { .. } => Self::internal(message),
        }
    }
}
