//! `{"name": ..., "parameters": {...}}` as the whole answer, several set apart by semicolons, behind `<|python_tag|>` or not:
//! Llama 3.1 and later.

use super::json_call::{JsonCall, Progress};
use super::json_tags::{give_up, read_call};
use super::text::Text;
use super::{ToolCallParser, ToolEvent};

const MARK: &str = "<|python_tag|>";

#[derive(Debug)]
pub(super) struct LlamaJson {
    text: Text,
    state: State,
}

#[derive(Debug)]
enum State {
    Start,
    /// Where a call may stand, behind this.
    Between {
        before: String,
    },
    Call {
        call: JsonCall,
        before: String,
    },
    /// A call is complete.
    Behind,
    /// All that follows is content.
    Content,
}

impl LlamaJson {
    pub(super) fn new() -> Self {
        Self {
            text: Text::default(),
            state: State::Start,
        }
    }

    /// False where more text is needed.
    fn step(&mut self, out: &mut Vec<ToolEvent>) -> bool {
        match &mut self.state {
            State::Start => {
                let n_blank = self.text.peek().n_blank;
                let rest = &self.text.rest()[n_blank..];
                if rest.is_empty() {
                    return false;
                }
                let n_mark = match (rest.starts_with(MARK), MARK.starts_with(rest)) {
                    (true, _) => MARK.len(),
                    (false, true) => return false,
                    (false, false) => 0,
                };
                let before = self.text.take(n_blank + n_mark);
                self.state = State::Between { before };
                true
            }
            State::Between { before } => {
                let next = self.text.peek();
                let (n_blank, Some(next)) = (next.n_blank, next.c) else {
                    return false;
                };
                let before = std::mem::take(before) + &self.text.take(n_blank);
                self.state = match next {
                    '{' => State::Call {
                        call: JsonCall::new(),
                        before,
                    },
                    _ => {
                        self.text.content(&before, out);
                        State::Content
                    }
                };
                true
            }
            State::Call { call, before } => match read_call(call, &mut self.text, out) {
                Progress::More => false,
                Progress::Broken => {
                    give_up(call, before, &mut self.text, out);
                    self.state = State::Content;
                    true
                }
                Progress::Done => {
                    self.state = State::Behind;
                    true
                }
            },
            State::Behind => {
                if !self.text.skip_blanks() {
                    return false;
                }
                self.state = match self.text.rest().chars().next() {
                    Some(';') => State::Between {
                        before: self.text.take(1),
                    },
                    Some('{') => State::Between {
                        before: String::new(),
                    },
                    _ => State::Content,
                };
                true
            }
            State::Content => {
                let n = self.text.rest().len();
                let content = self.text.take(n);
                self.text.content(&content, out);
                false
            }
        }
    }
}

impl ToolCallParser for LlamaJson {
    fn push(&mut self, piece: &str, out: &mut Vec<ToolEvent>) {
        self.text.push(piece);
        while self.step(out) {}
    }

    fn finish(&mut self, out: &mut Vec<ToolEvent>) {
        match std::mem::replace(&mut self.state, State::Content) {
            State::Call { call, before } => give_up(&call, &before, &mut self.text, out),
            State::Between { before } => self.text.content(&before, out),
            State::Start | State::Behind | State::Content => {}
        }
        self.text.finish(out);
    }
}
