//! `[f(a=1, b="x"), g()]` as the whole answer: Llama 3.2 and 4. Arguments are Python's literals, given out one by one as JSON.

use serde_json::Value;

use super::text::Text;
use super::{ToolCallParser, ToolEvent};

/// Lists and dicts inside each other at most; deeper ones stay as they are written.
const MAX_DEPTH: usize = 64;

#[derive(Debug)]
pub(super) struct Pythonic {
    text: Text,
    state: State,
}

#[derive(Clone, Copy, Debug)]
enum State {
    /// Before the list.
    Start,
    /// In a call, whose arguments so far are given out.
    Arguments { n: usize },
    /// In the list, behind a call.
    Behind,
    /// All that follows is content.
    Content,
}

/// What a look at the text tells.
enum Look<T> {
    /// This, in so many bytes.
    Is(T, usize),
    No,
    /// It depends on what comes.
    More,
}

enum Argument<'a> {
    /// `name=value`.
    Named(&'a str, &'a str),
    /// `)`.
    Close,
}

impl Pythonic {
    pub(super) fn new() -> Self {
        Self {
            text: Text::default(),
            state: State::Start,
        }
    }

    /// False where more text is needed.
    fn step(&mut self, out: &mut Vec<ToolEvent>) -> bool {
        let first = out.len();
        let rest = self.text.rest();
        let (state, n_taken) = match self.state {
            State::Start => match head(rest, '[') {
                Look::Is(name, n) => {
                    let name = name.to_owned();
                    out.push(ToolEvent::Call { name });
                    (State::Arguments { n: 0 }, n)
                }
                Look::No => (State::Content, 0),
                Look::More => return false,
            },
            State::Arguments { n } => match argument(rest) {
                Look::Is(Argument::Named(name, value), n_bytes) => {
                    let open = if n == 0 { "{" } else { ", " };
                    let text = format!("{open}{}: {}", Value::from(name), json_of(value));
                    out.push(ToolEvent::Arguments(text));
                    (State::Arguments { n: n + 1 }, n_bytes)
                }
                Look::Is(Argument::Close, n_bytes) => {
                    let text = if n == 0 { "{}" } else { "}" };
                    out.push(ToolEvent::Arguments(text.into()));
                    (State::Behind, n_bytes)
                }
                Look::No => (State::Content, 0),
                Look::More => return false,
            },
            State::Behind => match head(rest, ',') {
                Look::Is(name, n) => {
                    let name = name.to_owned();
                    out.push(ToolEvent::Call { name });
                    (State::Arguments { n: 0 }, n)
                }
                Look::More => return false,
                Look::No if self.text.peek().c == Some(']') => {
                    (State::Content, self.text.peek().n_blank + 1)
                }
                Look::No => (State::Content, 0),
            },
            State::Content => {
                let n = rest.len();
                let content = self.text.take(n);
                self.text.content(&content, out);
                return false;
            }
        };
        self.state = state;
        self.text.take(n_taken);
        self.text.see(&out[first..]);
        true
    }
}

/// `open`, a function's name, and `(`.
fn head(text: &str, open: char) -> Look<&str> {
    let from = text.trim_start();
    let behind = match from.strip_prefix(open) {
        Some(behind) => behind.trim_start(),
        None if from.is_empty() => return Look::More,
        None => return Look::No,
    };
    let n_name = behind.find(|c| !is_name(c)).unwrap_or(behind.len());
    let (name, rest) = behind.split_at(n_name);
    let rest = rest.trim_start();
    match rest.chars().next() {
        Some('(') if !name.is_empty() => Look::Is(name, text.len() - rest.len() + 1),
        Some(_) => Look::No,
        None => Look::More,
    }
}

/// The next argument with the comma behind it, or the end of the call.
fn argument(text: &str) -> Look<Argument<'_>> {
    let from = text.trim_start();
    if from.starts_with(')') {
        return Look::Is(Argument::Close, text.len() - from.len() + 1);
    }
    let n_name = from.find(|c| !is_name(c)).unwrap_or(from.len());
    let (name, rest) = from.split_at(n_name);
    let rest = rest.trim_start();
    let value = match rest.strip_prefix('=') {
        Some(value) if !name.is_empty() => value,
        None if rest.is_empty() => return Look::More,
        _ => return Look::No,
    };
    let (mut quote, mut escaped, mut open) = (None, false, Vec::new());
    for (at, c) in value.char_indices() {
        match (quote, c) {
            (Some(_), _) if escaped => escaped = false,
            (Some(_), '\\') => escaped = true,
            (Some(q), c) if c == q => quote = None,
            (Some(_), _) => {}
            (None, '"' | '\'') => quote = Some(c),
            (None, '(' | '[' | '{') => open.push(c),
            (None, ',' | ')') if open.is_empty() => {
                let n_comma = usize::from(c == ',');
                let n_bytes = text.len() - value.len() + at + n_comma;
                return Look::Is(Argument::Named(name, value[..at].trim()), n_bytes);
            }
            (None, ')' | ']' | '}') if open.pop().is_none() => return Look::No,
            _ => {}
        }
    }
    Look::More
}

fn is_name(c: char) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-')
}

/// A literal in JSON; what is none is a string of its characters.
pub(super) fn json_of(literal: &str) -> Value {
    let mut rest = literal;
    match value(&mut rest, 0) {
        Some(value) if rest.trim().is_empty() => value,
        _ => Value::from(literal),
    }
}

/// The literal that `rest` begins with, which is taken.
fn value(rest: &mut &str, depth: usize) -> Option<Value> {
    *rest = rest.trim_start();
    let first = rest.chars().next()?;
    match first {
        _ if depth > MAX_DEPTH => None,
        '"' | '\'' => string(rest, first),
        '[' => items(rest, ']', depth).map(Value::Array),
        '(' => items(rest, ')', depth).map(Value::Array),
        '{' => members(rest, depth),
        _ => {
            let n = rest.find([',', ']', ')', '}', ':']).unwrap_or(rest.len());
            let (word, behind) = rest.split_at(n);
            *rest = behind;
            match word.trim() {
                "None" | "null" => Some(Value::Null),
                "True" | "true" => Some(Value::Bool(true)),
                "False" | "false" => Some(Value::Bool(false)),
                number => serde_json::from_str(number).ok().filter(Value::is_number),
            }
        }
    }
}

fn string(rest: &mut &str, quote: char) -> Option<Value> {
    let mut text = String::new();
    let mut chars = rest.char_indices().skip(1);
    while let Some((at, c)) = chars.next() {
        match c {
            '\\' => match chars.next()?.1 {
                'n' => text.push('\n'),
                't' => text.push('\t'),
                'r' => text.push('\r'),
                'u' => {
                    let digits: String = chars.by_ref().take(4).map(|(_, c)| c).collect();
                    text.push(char::from_u32(u32::from_str_radix(&digits, 16).ok()?)?);
                }
                c @ ('\\' | '\'' | '"') => text.push(c),
                c => text.extend(['\\', c]),
            },
            c if c == quote => {
                *rest = &rest[at + 1..];
                return Some(Value::String(text));
            }
            c => text.push(c),
        }
    }
    None
}

fn items(rest: &mut &str, close: char, depth: usize) -> Option<Vec<Value>> {
    let mut items = Vec::new();
    *rest = &rest[1..];
    loop {
        *rest = rest.trim_start();
        if let Some(behind) = rest.strip_prefix(close) {
            *rest = behind;
            return Some(items);
        }
        items.push(value(rest, depth + 1)?);
        *rest = rest.trim_start();
        match rest.strip_prefix(',') {
            Some(behind) => *rest = behind,
            None if rest.starts_with(close) => {}
            None => return None,
        }
    }
}

fn members(rest: &mut &str, depth: usize) -> Option<Value> {
    let mut members = serde_json::Map::new();
    *rest = &rest[1..];
    loop {
        *rest = rest.trim_start();
        if let Some(behind) = rest.strip_prefix('}') {
            *rest = behind;
            return Some(Value::Object(members));
        }
        let Value::String(key) = value(rest, depth + 1)? else {
            return None;
        };
        *rest = rest.trim_start().strip_prefix(':')?;
        members.insert(key, value(rest, depth + 1)?);
        *rest = rest.trim_start();
        match rest.strip_prefix(',') {
            Some(behind) => *rest = behind,
            None if rest.starts_with('}') => {}
            None => return None,
        }
    }
}

impl ToolCallParser for Pythonic {
    fn push(&mut self, piece: &str, out: &mut Vec<ToolEvent>) {
        self.text.push(piece);
        while self.step(out) {}
    }

    fn finish(&mut self, out: &mut Vec<ToolEvent>) {
        self.text.finish(out);
    }
}
