//! A model's reasoning, told apart from its answer: what stands between `<think>` and `</think>` at the beginning (DeepSeek-R1,
//! Qwen 3 and others). What it gives is the same however the text was cut. It knows text only.

/// What begins it.
pub const THINK: &str = "<think>";

/// What ends it.
pub const THINK_END: &str = "</think>";

/// Follows one answer.
#[derive(Debug)]
pub struct ThinkSplitter {
    state: State,
    /// Not decided yet.
    pending: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Nothing but blanks so far.
    Start,
    /// In the reasoning, at its very beginning or inside.
    Begun,
    Reasoning,
    /// Behind the reasoning; blanks are left out.
    Ended,
    Answer,
}

/// A part of an answer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Split {
    /// Reasoning.
    pub reasoning: String,
    /// What comes behind it, or without any.
    pub answer: String,
}

/// Where a prompt leaves its model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PromptEnd {
    /// Inside of reasoning.
    InReasoning,
    /// Behind it: there will be none.
    BehindReasoning,
    /// The model may begin with it.
    Elsewhere,
}

impl PromptEnd {
    /// Of this prompt.
    pub fn of(prompt: &str) -> Self {
        match prompt.trim_end() {
            end if end.ends_with(THINK) => Self::InReasoning,
            end if end.ends_with(THINK_END) => Self::BehindReasoning,
            _ => Self::Elsewhere,
        }
    }
}

impl ThinkSplitter {
    /// `begun`: the prompt ends with what begins the reasoning.
    pub fn new(begun: bool) -> Self {
        Self {
            state: if begun { State::Begun } else { State::Start },
            pending: String::new(),
        }
    }

    /// The next piece.
    pub fn push(&mut self, piece: &str) -> Split {
        self.pending.push_str(piece);
        let mut split = Split::default();
        while self.step(&mut split) {}
        split
    }

    /// The text has ended.
    pub fn finish(&mut self) -> Split {
        let rest = std::mem::take(&mut self.pending);
        match self.state {
            State::Begun | State::Reasoning => Split {
                reasoning: rest,
                answer: String::new(),
            },
            State::Start | State::Ended | State::Answer => Split {
                reasoning: String::new(),
                answer: rest,
            },
        }
    }

    /// False where more text is needed.
    fn step(&mut self, split: &mut Split) -> bool {
        let rest = self.pending.trim_start();
        let n_blank = self.pending.len() - rest.len();
        match self.state {
            State::Start => {
                if rest.starts_with(THINK) {
                    self.pending.drain(..n_blank + THINK.len());
                    self.state = State::Begun;
                } else if THINK.starts_with(rest) {
                    return false;
                } else {
                    self.state = State::Answer;
                }
                true
            }
            State::Begun | State::Ended => {
                let decided = !rest.is_empty();
                self.pending.drain(..n_blank);
                if decided {
                    self.state = match self.state {
                        State::Begun => State::Reasoning,
                        _ => State::Answer,
                    };
                }
                decided
            }
            State::Reasoning => {
                if let Some(at) = self.pending.find(THINK_END) {
                    split.reasoning += self.pending[..at].trim_end();
                    self.pending.drain(..at + THINK_END.len());
                    self.state = State::Ended;
                    return true;
                }
                // The mark may have begun at the end, and blanks before it belong to it.
                let n_begun = (1..THINK_END.len())
                    .rev()
                    .find(|n| self.pending.ends_with(&THINK_END[..*n]));
                let sure = &self.pending[..self.pending.len() - n_begun.unwrap_or(0)];
                let n = sure.trim_end().len();
                split.reasoning.extend(self.pending.drain(..n));
                false
            }
            State::Answer => {
                split.answer += &std::mem::take(&mut self.pending);
                false
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn split<'a>(begun: bool, pieces: impl IntoIterator<Item = &'a str>) -> (String, String) {
        let mut splitter = ThinkSplitter::new(begun);
        let mut whole = Split::default();
        let mut add = |split: Split| {
            whole.reasoning += &split.reasoning;
            whole.answer += &split.answer;
        };
        for piece in pieces {
            add(splitter.push(piece));
        }
        add(splitter.finish());
        (whole.reasoning, whole.answer)
    }

    #[test]
    fn reasoning_is_told_apart_however_the_text_is_cut() {
        for (why, begun, text, reasoning, answer) in [
            (
                "none",
                false,
                " Hello </think> x ",
                "",
                " Hello </think> x ",
            ),
            (
                "both",
                false,
                "\n<think>\nSo a < b.\n\n</think>\n\nYes. ",
                "So a < b.",
                "Yes. ",
            ),
            (
                "begun by the prompt",
                true,
                "\nhm </thin </think>\nYes",
                "hm </thin",
                "Yes",
            ),
            ("cut inside", true, "hm </thi", "hm </thi", ""),
            ("empty", false, "<think>\n\n</think>\n\nYes", "", "Yes"),
            ("a mark cut off", false, "<thin", "", "<thin"),
            ("nothing", true, "", "", ""),
        ] {
            let want = (reasoning.to_owned(), answer.to_owned());
            assert_eq!(split(begun, [text]), want, "{why}");
            for (at, _) in text.char_indices() {
                assert_eq!(
                    split(begun, [&text[..at], &text[at..]]),
                    want,
                    "{why}: cut at {at}"
                );
            }
        }
        for (prompt, want) in [
            ("<|assistant|>\n<think>\n", PromptEnd::InReasoning),
            ("<think>\n\n</think>\n\n", PromptEnd::BehindReasoning),
            ("<|assistant|>\n", PromptEnd::Elsewhere),
        ] {
            assert_eq!(PromptEnd::of(prompt), want, "{prompt:?}");
        }
    }
}
