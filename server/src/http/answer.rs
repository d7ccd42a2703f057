//! The text of one answer, taken apart: reasoning, content, and tool calls.

use std::sync::Arc;

use super::tools::call_id;
use super::wire::{FunctionDelta, ToolCallDelta};
use crate::text::reasoning::ThinkSplitter;
use crate::text::tool_calls::{ParameterTypes, ToolCallFormat, ToolCallParser, ToolEvent};

/// How the answers of a call are taken apart.
#[derive(Clone, Debug)]
pub(super) struct AnswerFormat {
    /// Reasoning may come first; true where the prompt has begun it.
    pub(super) thinking: Option<bool>,
    /// Calls may come, in this format.
    pub(super) calls: Option<CallFormat>,
}

/// How calls are read.
#[derive(Clone, Debug)]
pub(super) struct CallFormat {
    pub(super) format: ToolCallFormat,
    pub(super) types: Arc<ParameterTypes>,
    /// Calls in one answer at most; further ones are left out.
    pub(super) most: usize,
}

/// Follows one choice.
#[derive(Debug)]
pub(super) struct AnswerParser {
    thinking: Option<ThinkSplitter>,
    calls: Option<CallParser>,
    /// A call has come.
    pub(super) has_called: bool,
}

#[derive(Debug)]
struct CallParser {
    parser: Box<dyn ToolCallParser>,
    format: ToolCallFormat,
    /// The answer's id, and the choice's place in it.
    of: (Arc<str>, usize),
    n_calls: usize,
    most: usize,
}

/// What a piece of text brought.
#[derive(Debug, Default)]
pub(super) struct Parts {
    pub(super) reasoning: String,
    pub(super) content: String,
    pub(super) tool_calls: Vec<ToolCallDelta>,
}

impl Parts {
    pub(super) fn is_empty(&self) -> bool {
        self.reasoning.is_empty() && self.content.is_empty() && self.tool_calls.is_empty()
    }

    /// Adds what came behind it.
    fn extend(&mut self, more: Self) {
        self.reasoning += &more.reasoning;
        self.content += &more.content;
        for call in more.tool_calls {
            match self.tool_calls.last_mut() {
                Some(last) if last.index == call.index => {
                    last.function.arguments += &call.function.arguments;
                }
                _ => self.tool_calls.push(call),
            }
        }
    }
}

impl AnswerFormat {
    /// A parser for the choice with this index of the answer `id`.
    pub(super) fn parser(&self, id: &Arc<str>, choice: usize) -> AnswerParser {
        AnswerParser {
            thinking: self.thinking.map(ThinkSplitter::new),
            calls: self.calls.as_ref().map(|calls| CallParser {
                parser: calls.format.parser(&calls.types),
                format: calls.format,
                of: (Arc::clone(id), choice),
                n_calls: 0,
                most: calls.most,
            }),
            has_called: false,
        }
    }
}

impl AnswerParser {
    /// The next piece; `ended`: it is the last.
    pub(super) fn push(&mut self, piece: String, ended: bool) -> Parts {
        let mut parts = Parts::default();
        let mut answer = piece;
        if let Some(thinking) = &mut self.thinking {
            let split = thinking.push(&answer);
            (parts.reasoning, answer) = (split.reasoning, split.answer);
            if ended {
                let rest = thinking.finish();
                parts.reasoning += &rest.reasoning;
                answer += &rest.answer;
            }
        }
        match &mut self.calls {
            None => parts.content = answer,
            Some(calls) => {
                let mut events = Vec::new();
                calls.parser.push(&answer, &mut events);
                if ended {
                    calls.parser.finish(&mut events);
                }
                for event in events {
                    parts.extend(calls.part(event));
                }
                self.has_called = calls.n_calls > 0;
            }
        }
        parts
    }
}

impl CallParser {
    fn part(&mut self, event: ToolEvent) -> Parts {
        let mut parts = Parts::default();
        let (id, name, arguments) = match event {
            ToolEvent::Content(text) => {
                parts.content = text;
                return parts;
            }
            ToolEvent::Call { name } => {
                let id = call_id(&self.of.0, self.of.1, self.n_calls, self.format);
                self.n_calls += 1;
                (Some(id), Some(name), String::new())
            }
            ToolEvent::Arguments(text) => (None, None, text),
        };
        if (1..=self.most).contains(&self.n_calls) {
            parts.tool_calls.push(ToolCallDelta {
                index: self.n_calls - 1,
                r#type: id.as_ref().map(|_| "function"),
                id,
                function: FunctionDelta { name, arguments },
            });
        }
        parts
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str, most: usize) -> (Parts, bool) {
        let calls = CallFormat {
            format: ToolCallFormat::Hermes,
            types: Arc::default(),
            most,
        };
        let format = AnswerFormat {
            thinking: Some(false),
            calls: Some(calls),
        };
        let mut parser = format.parser(&"x".into(), 0);
        let mut whole = Parts::default();
        let n = text.chars().count();
        for (i, c) in text.chars().enumerate() {
            whole.extend(parser.push(c.into(), i + 1 == n));
        }
        (whole, parser.has_called)
    }

    #[test]
    fn reasoning_content_and_calls_are_told_apart() {
        let text = "<think>Two <tool_call>s.</think>I look. <tool_call>{\"name\": \"f\", \"arguments\": {\"a\": 1}}</tool_call>\n<tool_call>{\"name\": \"g\"}</tool_call>";
        let (parts, called) = parse(text, 2);
        assert_eq!(
            (parts.reasoning.as_str(), parts.content.as_str(), called),
            ("Two <tool_call>s.", "I look.", true)
        );
        let calls: Vec<_> = parts
            .tool_calls
            .iter()
            .map(|call| {
                (
                    call.function.name.as_deref().unwrap(),
                    call.function.arguments.as_str(),
                )
            })
            .collect();
        assert_eq!(calls, [("f", "{\"a\": 1}"), ("g", "{}")]);
        assert_ne!(parts.tool_calls[0].id, parts.tool_calls[1].id);
        assert_eq!(parse(text, 1).0.tool_calls.len(), 1, "no second one");
        assert_eq!(parse("Hello.", 2).0.content, "Hello.");
    }
}
