//! What goes out: OpenAI's response objects, with vLLM's additions (`stop_reason`, `token_ids`, `prompt_logprobs`) and ours
//! (`beam_score`). Plain data.

use serde::Serialize;

use super::error::ApiError;
use super::logprobs::{ChatLogprobs, CompletionLogprobs, PromptLogprobs};
use super::params::StreamUsage;
use crate::engine::FinishReason;

/// Tokens of a whole call.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub(super) struct Usage {
    pub(super) prompt_tokens: usize,
    pub(super) completion_tokens: usize,
    pub(super) total_tokens: usize,
    pub(super) prompt_tokens_details: PromptTokensDetails,
}

/// Where the prompt's tokens came from.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub(super) struct PromptTokensDetails {
    /// Those that the prefix cache held.
    pub(super) cached_tokens: usize,
}

impl Usage {
    pub(super) fn new(
        prompt_tokens: usize,
        cached_tokens: usize,
        completion_tokens: usize,
    ) -> Self {
        Self {
            prompt_tokens,
            completion_tokens,
            total_tokens: prompt_tokens + completion_tokens,
            prompt_tokens_details: PromptTokensDetails { cached_tokens },
        }
    }
}

/// The `usage` of a chunk that is not the last: left out unless asked for, null where it comes at the end, or what the
/// chunk's choice has used so far.
pub(super) fn chunk_usage(
    wanted: StreamUsage,
    so_far: impl FnOnce() -> Usage,
) -> Option<Option<Usage>> {
    match wanted {
        StreamUsage::None => None,
        StreamUsage::Last => Some(None),
        StreamUsage::Each => Some(Some(so_far())),
    }
}

/// `/v1/completions`, whole and as a chunk.
#[derive(Debug, Serialize)]
pub(super) struct Completion<'a> {
    pub(super) id: &'a str,
    pub(super) object: &'static str,
    pub(super) created: u64,
    pub(super) model: &'a str,
    /// What its tokens are drawn with, as a call names it; left out where prompts have seeds of their own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) seed: Option<i64>,
    pub(super) choices: Vec<CompletionChoice>,
    /// In a stream: see [`chunk_usage`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) usage: Option<Option<Usage>>,
}

#[derive(Debug, Serialize)]
pub(super) struct CompletionChoice {
    pub(super) index: usize,
    pub(super) text: String,
    pub(super) logprobs: Option<CompletionLogprobs>,
    pub(super) finish_reason: Option<&'static str>,
    pub(super) stop_reason: Option<StopReason>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) prompt_token_ids: Option<Vec<u32>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) prompt_logprobs: Option<PromptLogprobs>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) token_ids: Option<Vec<u32>>,
    /// With `use_beam_search`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) beam_score: Option<f32>,
}

/// `/v1/chat/completions`: `C` is [`ChatChoice`] or, in a stream, [`ChatDelta`].
#[derive(Debug, Serialize)]
pub(super) struct Chat<'a, C> {
    pub(super) id: &'a str,
    pub(super) object: &'static str,
    pub(super) created: u64,
    pub(super) model: &'a str,
    /// What its tokens are drawn with, as a call names it; left out where prompts have seeds of their own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) seed: Option<i64>,
    pub(super) choices: Vec<C>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) usage: Option<Option<Usage>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) prompt_token_ids: Option<Vec<u32>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) prompt_logprobs: Option<PromptLogprobs>,
}

#[derive(Debug, Serialize)]
pub(super) struct ChatChoice {
    pub(super) index: usize,
    pub(super) message: Message,
    pub(super) logprobs: Option<ChatLogprobs>,
    pub(super) finish_reason: &'static str,
    pub(super) stop_reason: Option<StopReason>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) token_ids: Option<Vec<u32>>,
    /// With `use_beam_search`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) beam_score: Option<f32>,
}

#[derive(Debug, Serialize)]
pub(super) struct Message {
    pub(super) role: &'static str,
    /// None where the answer is calls alone.
    pub(super) content: Option<String>,
    /// Under vLLM's name and under the one it had before, which most clients read.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) reasoning: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) reasoning_content: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) tool_calls: Vec<ToolCall>,
}

#[derive(Debug, Serialize)]
pub(super) struct ToolCall {
    pub(super) id: String,
    pub(super) r#type: &'static str,
    pub(super) function: FunctionCall,
}

#[derive(Debug, Serialize)]
pub(super) struct FunctionCall {
    pub(super) name: String,
    /// A JSON object, as the model wrote it.
    pub(super) arguments: String,
}

/// A part of a call. Its first has id, type and name.
#[derive(Debug, Serialize)]
pub(super) struct ToolCallDelta {
    pub(super) index: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) r#type: Option<&'static str>,
    pub(super) function: FunctionDelta,
}

#[derive(Debug, Serialize)]
pub(super) struct FunctionDelta {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) name: Option<String>,
    pub(super) arguments: String,
}

impl From<ToolCallDelta> for ToolCall {
    /// All parts of a call, put together.
    fn from(delta: ToolCallDelta) -> Self {
        Self {
            id: delta.id.unwrap_or_default(),
            r#type: "function",
            function: FunctionCall {
                name: delta.function.name.unwrap_or_default(),
                arguments: delta.function.arguments,
            },
        }
    }
}

#[derive(Debug, Serialize)]
pub(super) struct ChatDelta {
    pub(super) index: usize,
    pub(super) delta: Delta,
    pub(super) logprobs: Option<ChatLogprobs>,
    pub(super) finish_reason: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) stop_reason: Option<StopReason>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) token_ids: Option<Vec<u32>>,
}

#[derive(Debug, Default, Serialize)]
pub(super) struct Delta {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) content: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) reasoning: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) reasoning_content: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) tool_calls: Vec<ToolCallDelta>,
}

/// What the text ended with: a stop string, or the id of a stop token that the caller named.
#[derive(Debug, Serialize)]
#[serde(untagged)]
pub(super) enum StopReason {
    Token(u32),
    Text(String),
}

/// `finish_reason` and `stop_reason`. The end of sequence is no stop token of the caller's.
pub(super) fn reasons(
    reason: FinishReason,
    stop_token_ids: &[u32],
) -> Result<(&'static str, Option<StopReason>), ApiError> {
    match reason {
        FinishReason::Length => Ok(("length", None)),
        FinishReason::StopString(text) => Ok(("stop", Some(StopReason::Text(text)))),
        FinishReason::Stop(id) if stop_token_ids.contains(&id) => {
            Ok(("stop", Some(StopReason::Token(id))))
        }
        FinishReason::Stop(_) => Ok(("stop", None)),
        FinishReason::Abort => Ok(("abort", None)),
        FinishReason::Error(why) => Err(ApiError::internal(why)),
    }
}
