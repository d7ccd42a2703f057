//! Calls in a JSON list, behind a mark or as the whole answer: Mistral, Phi-4-mini, and models that are held to a format. And
//! Mistral's newer form, a name and an object behind the mark.

use super::json_call::{JsonCall, JsonValue, Progress, Step, append};
use super::json_tags::{give_up, read_call};
use super::text::{Found, Text};
use super::{ToolCallParser, ToolEvent};

/// What stands between a name and its arguments in Mistral's newer form.
const ARGUMENTS: &str = "[ARGS]";
const CALL_ID: &str = "[CALL_ID]";

#[derive(Debug)]
pub(super) struct JsonArray {
    text: Text,
    open: &'static str,
    close: &'static str,
    state: State,
}

#[derive(Debug)]
enum State {
    Text,
    /// Behind the mark. `before` was read and says nothing yet.
    Marked {
        before: String,
    },
    /// In the list, before a call.
    Element {
        before: String,
    },
    Call {
        call: JsonCall,
        before: String,
    },
    /// In the list, behind a call.
    Behind,
    /// Behind the list, whose closing mark may come.
    Closing,
    /// The name in the newer form.
    Name {
        before: String,
    },
    /// Its arguments.
    Arguments(Option<JsonValue>),
    /// All that follows is content.
    Content,
}

impl JsonArray {
    /// Lists between these marks, the second of which may be missing.
    pub(super) fn marked(open: &'static str, close: &'static str) -> Self {
        Self {
            text: Text::default(),
            open,
            close,
            state: State::Text,
        }
    }

    /// A list that is the whole answer.
    pub(super) fn unmarked() -> Self {
        let before = String::new();
        Self {
            state: State::Marked { before },
            ..Self::marked("", "")
        }
    }

    /// Where text goes on that is no list.
    fn outside(&self) -> State {
        match self.open {
            "" => State::Content,
            _ => State::Text,
        }
    }

    /// False where more text is needed.
    fn step(&mut self, out: &mut Vec<ToolEvent>) -> bool {
        match &mut self.state {
            State::Text => {
                let found = self.text.pass_to(self.open, out);
                if found {
                    let before = self.open.to_owned();
                    self.state = State::Marked { before };
                }
                found
            }
            State::Marked { before } => {
                let (mut before, next) = (std::mem::take(before), self.text.peek());
                before += &self.text.take(next.n_blank);
                self.state = match next.c {
                    None => State::Marked { before },
                    Some('[') => {
                        before += &self.text.take(1);
                        State::Element { before }
                    }
                    Some(c) if is_name(c) && !self.open.is_empty() => State::Name { before },
                    Some(_) => return self.give_up(&before, out),
                };
                next.c.is_some()
            }
            State::Element { before } => {
                let (mut before, next) = (std::mem::take(before), self.text.peek());
                before += &self.text.take(next.n_blank);
                self.state = match next.c {
                    None => State::Element { before },
                    Some('{') => {
                        let call = JsonCall::new();
                        State::Call { call, before }
                    }
                    Some(_) => return self.give_up(&before, out),
                };
                next.c.is_some()
            }
            State::Call { call, before } => match read_call(call, &mut self.text, out) {
                Progress::More => false,
                Progress::Done => {
                    self.state = State::Behind;
                    true
                }
                Progress::Broken => {
                    give_up(call, before, &mut self.text, out);
                    self.give_up("", out)
                }
            },
            State::Behind => {
                self.text.skip_blanks();
                self.state = match self.text.peek().c {
                    None => return false,
                    Some(',') => State::Element {
                        before: self.text.take(1),
                    },
                    Some(']') => {
                        self.text.take(1);
                        State::Closing
                    }
                    Some(_) => self.outside(),
                };
                true
            }
            State::Closing => {
                if !self.text.skip_blanks() {
                    return false;
                }
                match self.text.begins(self.close) {
                    Found::Maybe => return false,
                    Found::Here => drop(self.text.take(self.close.len())),
                    Found::No => {}
                }
                self.state = self.outside();
                true
            }
            State::Name { .. } => self.name(out),
            State::Arguments(value) => {
                let (n_read, ended) = read_value(value, self.text.rest());
                let arguments = self.text.take(n_read);
                if !arguments.is_empty() {
                    append(ToolEvent::Arguments(arguments), out);
                }
                if ended {
                    self.state = State::Closing;
                }
                ended
            }
            State::Content => {
                let n = self.text.rest().len();
                let content = self.text.take(n);
                self.text.content(&content, out);
                false
            }
        }
    }

    /// `f{...}`, `f[ARGS]{...}` or `f[CALL_ID]x[ARGS]{...}`.
    fn name(&mut self, out: &mut Vec<ToolEvent>) -> bool {
        let State::Name { before } = &self.state else {
            return false;
        };
        let before = before.clone();
        let rest = self.text.rest();
        let n_name = rest.find(|c| !is_name(c)).unwrap_or(rest.len());
        let mut at = n_name;
        if let Some(id) = rest[at..].strip_prefix(CALL_ID) {
            at += CALL_ID.len() + id.find(|c| !is_name(c)).unwrap_or(id.len());
        }
        if rest[at..].starts_with(ARGUMENTS) {
            at += ARGUMENTS.len();
        }
        let behind = &rest[at..];
        if behind.starts_with('{') {
            let name = rest[..n_name].to_owned();
            self.text.take(at);
            out.push(ToolEvent::Call { name });
            self.text.see(&out[out.len() - 1..]);
            self.state = State::Arguments(None);
            return true;
        }
        let may_go_on = behind.is_empty()
            || ARGUMENTS.starts_with(behind)
            || (at == n_name && CALL_ID.starts_with(behind));
        if may_go_on {
            return false;
        }
        self.give_up(&before, out)
    }

    /// No call, or none any longer: what was read is content.
    fn give_up(&mut self, before: &str, out: &mut Vec<ToolEvent>) -> bool {
        self.text.content(before, out);
        self.state = self.outside();
        true
    }
}

/// How much of `text` belongs to the value, and whether it ends there.
fn read_value(value: &mut Option<JsonValue>, text: &str) -> (usize, bool) {
    for (at, c) in text.char_indices() {
        let Some(value) = value else {
            *value = JsonValue::begin(c);
            continue;
        };
        match value.push(c) {
            Step::Inside => {}
            Step::Last => return (at + c.len_utf8(), true),
            Step::Behind | Step::Broken => return (at, true),
        }
    }
    (text.len(), false)
}

fn is_name(c: char) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.')
}

impl ToolCallParser for JsonArray {
    fn push(&mut self, piece: &str, out: &mut Vec<ToolEvent>) {
        self.text.push(piece);
        while self.step(out) {}
    }

    fn finish(&mut self, out: &mut Vec<ToolEvent>) {
        let outside = self.outside();
        match std::mem::replace(&mut self.state, outside) {
            State::Call { call, before } => give_up(&call, &before, &mut self.text, out),
            State::Marked { before } | State::Element { before } | State::Name { before } => {
                self.text.content(&before, out);
            }
            _ => {}
        }
        self.text.finish(out);
    }
}
