//! A call as a JSON object with a name and arguments, read character by character: the arguments are given out as they come,
//! in the model's own characters.

use super::ToolEvent;

/// Members that a call may have beside its name and arguments; any other says that it is no call.
const OTHER_MEMBERS: &[&str] = &["type", "id"];

/// One call.
#[derive(Debug)]
pub(super) struct JsonCall {
    state: State,
    has_begun: bool,
    has_arguments: bool,
    /// Arguments that stand before the name.
    early: String,
    /// What was read since something was given out.
    unsaid: String,
}

/// How far a call is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Progress {
    More,
    /// It is complete.
    Done,
    /// It isn't a call, or no longer. The character is not taken.
    Broken,
}

#[derive(Debug)]
enum State {
    Open,
    KeyOrClose,
    Key(JsonValue),
    Colon(Member),
    Value(Member, Option<JsonValue>),
    CommaOrClose,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Member {
    Name,
    Arguments,
    Other,
}

impl JsonCall {
    pub(super) fn new() -> Self {
        Self {
            state: State::Open,
            has_begun: false,
            has_arguments: false,
            early: String::new(),
            unsaid: String::new(),
        }
    }

    /// Its name was given out.
    pub(super) fn has_begun(&self) -> bool {
        self.has_begun
    }

    /// What was read and not given out: content, should nothing more come of it.
    pub(super) fn unsaid(&self) -> &str {
        &self.unsaid
    }

    /// Takes the next character, unless it is [`Progress::Broken`].
    pub(super) fn push(&mut self, c: char, out: &mut Vec<ToolEvent>) -> Progress {
        let mut given = Vec::new();
        let progress = self.step(c, &mut given);
        if progress != Progress::Broken {
            self.unsaid.push(c);
        }
        if self.has_begun && !given.is_empty() {
            self.unsaid.clear();
        }
        for event in given {
            append(event, out);
        }
        progress
    }

    fn step(&mut self, c: char, out: &mut Vec<ToolEvent>) -> Progress {
        match (&mut self.state, c) {
            (State::Key(key), c) => {
                if key.push(c) == Step::Last {
                    let Some(member) = key.decoded().and_then(|key| member_of(&key)) else {
                        return Progress::Broken;
                    };
                    self.state = State::Colon(member);
                }
            }
            (State::Value(_, Some(value)), c) => {
                let step = value.push(c);
                return self.value(step, c, out);
            }
            (_, c) if c.is_whitespace() => {}
            (State::Open, '{') => self.state = State::KeyOrClose,
            (State::KeyOrClose, '"') => self.state = State::Key(JsonValue::Text(Quoted::default())),
            (State::CommaOrClose, ',') => self.state = State::KeyOrClose,
            (State::KeyOrClose | State::CommaOrClose, '}') if self.has_begun => {
                if !self.has_arguments {
                    out.push(ToolEvent::Arguments("{}".into()));
                }
                return Progress::Done;
            }
            (State::Colon(member), ':') => self.state = State::Value(*member, None),
            (State::Value(member, value @ None), c) => {
                let member = *member;
                *value = JsonValue::begin(c);
                if value.is_none() || (member == Member::Name && c != '"') {
                    return Progress::Broken;
                }
                if member == Member::Arguments && matches!(c, '{' | '[') {
                    self.give(&c.to_string(), out);
                }
            }
            _ => return Progress::Broken,
        }
        Progress::More
    }

    /// `c` is `step` to the value at hand.
    fn value(&mut self, step: Step, c: char, out: &mut Vec<ToolEvent>) -> Progress {
        let State::Value(member, Some(value)) = &self.state else {
            return Progress::Broken;
        };
        let is_nested = matches!(value, JsonValue::Nested { .. });
        if *member == Member::Arguments && is_nested && step != Step::Broken {
            self.give(&c.to_string(), out);
        }
        match step {
            Step::Inside => Progress::More,
            Step::Broken => Progress::Broken,
            Step::Last | Step::Behind if !self.end_value(out) => Progress::Broken,
            Step::Last => Progress::More,
            Step::Behind => self.step(c, out),
        }
    }

    /// False where the value can't stand there.
    fn end_value(&mut self, out: &mut Vec<ToolEvent>) -> bool {
        let State::Value(member, Some(value)) =
            std::mem::replace(&mut self.state, State::CommaOrClose)
        else {
            return false;
        };
        match member {
            Member::Other => true,
            Member::Name => match value.decoded() {
                Some(name) if !self.has_begun => {
                    self.has_begun = true;
                    out.push(ToolEvent::Call { name });
                    let early = std::mem::take(&mut self.early);
                    if !early.is_empty() {
                        out.push(ToolEvent::Arguments(early));
                    }
                    true
                }
                _ => false,
            },
            Member::Arguments => {
                match value {
                    JsonValue::Nested { .. } => {}
                    JsonValue::Word(word) if word == "null" => self.give("{}", out),
                    JsonValue::Word(word) => self.give(&word, out),
                    // Some models write the object inside a string.
                    text @ JsonValue::Text(_) => match text.decoded() {
                        Some(text) => self.give(&text, out),
                        None => return false,
                    },
                }
                self.has_arguments = true;
                true
            }
        }
    }

    fn give(&mut self, text: &str, out: &mut Vec<ToolEvent>) {
        match self.has_begun {
            true => append(ToolEvent::Arguments(text.to_owned()), out),
            false => self.early.push_str(text),
        }
    }
}

/// Adds an event, to the one before where both are of one kind.
pub(super) fn append(event: ToolEvent, out: &mut Vec<ToolEvent>) {
    match (out.last_mut(), event) {
        (Some(ToolEvent::Arguments(before)), ToolEvent::Arguments(more)) => before.push_str(&more),
        (Some(ToolEvent::Content(before)), ToolEvent::Content(more)) => before.push_str(&more),
        (_, event) => out.push(event),
    }
}

fn member_of(key: &str) -> Option<Member> {
    match key {
        "name" => Some(Member::Name),
        "arguments" | "parameters" => Some(Member::Arguments),
        other if OTHER_MEMBERS.contains(&other) => Some(Member::Other),
        _ => None,
    }
}

/// A JSON value that is being read. Brackets and quotes are followed, not what stands between them.
#[derive(Debug)]
pub(super) enum JsonValue {
    Text(Quoted),
    /// A list or an object: the brackets that are open, and the string inside, if any.
    Nested {
        open: Vec<char>,
        string: Option<Quoted>,
    },
    /// A number or a word.
    Word(String),
}

/// A string without its quotes, as it is written.
#[derive(Debug, Default)]
pub(super) struct Quoted {
    text: String,
    escaped: bool,
}

/// What a character is to a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    Inside,
    /// Its last.
    Last,
    /// The first behind it.
    Behind,
    /// It can't stand there.
    Broken,
}

impl Quoted {
    fn push(&mut self, c: char) -> Step {
        if c == '"' && !self.escaped {
            return Step::Last;
        }
        self.escaped = c == '\\' && !self.escaped;
        self.text.push(c);
        Step::Inside
    }
}

impl JsonValue {
    /// By its first character.
    pub(super) fn begin(c: char) -> Option<Self> {
        match c {
            '"' => Some(Self::Text(Quoted::default())),
            '{' | '[' => Some(Self::Nested {
                open: vec![c],
                string: None,
            }),
            c if c.is_ascii_alphanumeric() || c == '-' => Some(Self::Word(c.into())),
            _ => None,
        }
    }

    pub(super) fn push(&mut self, c: char) -> Step {
        match self {
            Self::Text(quoted) => quoted.push(c),
            Self::Nested {
                string: string @ Some(_),
                ..
            } => {
                if string
                    .as_mut()
                    .is_some_and(|quoted| quoted.push(c) == Step::Last)
                {
                    *string = None;
                }
                Step::Inside
            }
            Self::Nested { open, string } => {
                match c {
                    '"' => *string = Some(Quoted::default()),
                    '{' | '[' => open.push(c),
                    '}' if open.last() != Some(&'{') => return Step::Broken,
                    ']' if open.last() != Some(&'[') => return Step::Broken,
                    '}' | ']' => drop(open.pop()),
                    _ => {}
                }
                match open.is_empty() {
                    true => Step::Last,
                    false => Step::Inside,
                }
            }
            Self::Word(_) if matches!(c, ',' | '}' | ']') || c.is_whitespace() => Step::Behind,
            Self::Word(word) => {
                word.push(c);
                Step::Inside
            }
        }
    }

    /// The text of a string.
    fn decoded(&self) -> Option<String> {
        match self {
            Self::Text(Quoted { text, .. }) => serde_json::from_str(&format!("\"{text}\"")).ok(),
            _ => None,
        }
    }
}
