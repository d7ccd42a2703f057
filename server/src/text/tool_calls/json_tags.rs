//! `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, any number of them in a text: Hermes, Qwen 2.5 and 3.

use super::json_call::{JsonCall, Progress};
use super::text::{Found, Text};
use super::{ToolCallParser, ToolEvent};

const OPEN: &str = "<tool_call>";
const CLOSE: &str = "</tool_call>";

#[derive(Debug)]
pub(super) struct JsonTags {
    text: Text,
    state: State,
}

#[derive(Debug)]
enum State {
    Text,
    Call(JsonCall),
    /// The call is complete; its tag may be closed.
    Behind,
}

impl JsonTags {
    pub(super) fn new() -> Self {
        Self {
            text: Text::default(),
            state: State::Text,
        }
    }

    /// False where more text is needed.
    fn step(&mut self, out: &mut Vec<ToolEvent>) -> bool {
        match &mut self.state {
            State::Text => {
                let found = self.text.pass_to(OPEN, out);
                if found {
                    self.state = State::Call(JsonCall::new());
                }
                found
            }
            State::Call(call) => match read_call(call, &mut self.text, out) {
                Progress::More => false,
                Progress::Done => {
                    self.state = State::Behind;
                    true
                }
                Progress::Broken => {
                    self.give_up(out);
                    true
                }
            },
            State::Behind => {
                if !self.text.skip_blanks() {
                    return false;
                }
                match self.text.begins(CLOSE) {
                    Found::Maybe => return false,
                    Found::Here => drop(self.text.take(CLOSE.len())),
                    Found::No => {}
                }
                self.state = State::Text;
                true
            }
        }
    }

    /// What looked like a call is content.
    fn give_up(&mut self, out: &mut Vec<ToolEvent>) {
        if let State::Call(call) = std::mem::replace(&mut self.state, State::Text) {
            give_up(&call, OPEN, &mut self.text, out);
        }
    }
}

/// Reads on in a call, as far as there is text.
pub(super) fn read_call(
    call: &mut JsonCall,
    text: &mut Text,
    out: &mut Vec<ToolEvent>,
) -> Progress {
    let n_events = out.len();
    let mut n_read = 0;
    let mut progress = Progress::More;
    for c in text.rest().chars() {
        progress = call.push(c, out);
        match progress {
            Progress::Broken => break,
            Progress::More | Progress::Done => n_read += c.len_utf8(),
        }
        if progress == Progress::Done {
            break;
        }
    }
    text.take(n_read);
    text.see(&out[n_events..]);
    progress
}

/// Nothing more comes of a call: what it has not given out is content, and what began it, where it never did.
pub(super) fn give_up(call: &JsonCall, mark: &str, text: &mut Text, out: &mut Vec<ToolEvent>) {
    let mark = if call.has_begun() { "" } else { mark };
    text.content(&format!("{mark}{}", call.unsaid()), out);
}

impl ToolCallParser for JsonTags {
    fn push(&mut self, piece: &str, out: &mut Vec<ToolEvent>) {
        self.text.push(piece);
        while self.step(out) {}
    }

    fn finish(&mut self, out: &mut Vec<ToolEvent>) {
        self.give_up(out);
        self.text.finish(out);
    }
}
