//! Text around calls: what may be the beginning of a mark is held back, and so are blanks, which belong to the format where a
//! call stands beside them.

use super::ToolEvent;

/// Text that is not decided yet, and what was said so far.
#[derive(Debug, Default)]
pub(super) struct Text {
    pending: String,
    /// What lies before it in `pending` is taken.
    at: usize,
    /// Blanks behind the content so far.
    blanks: String,
    has_called: bool,
}

/// What comes next.
#[derive(Clone, Copy, Debug)]
pub(super) struct Next {
    /// Bytes of blanks before it.
    pub(super) n_blank: usize,
    /// The first character that is none.
    pub(super) c: Option<char>,
}

/// Whether a mark stands at the beginning.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Found {
    Here,
    /// Whatever comes.
    No,
    /// It depends on what comes.
    Maybe,
}

impl Text {
    /// Appends the next piece.
    pub(super) fn push(&mut self, piece: &str) {
        self.pending.drain(..self.at);
        self.at = 0;
        self.pending.push_str(piece);
    }

    /// What is not taken yet.
    pub(super) fn rest(&self) -> &str {
        &self.pending[self.at..]
    }

    /// What comes next behind blanks.
    pub(super) fn peek(&self) -> Next {
        let behind = self.rest().trim_start();
        Next {
            n_blank: self.rest().len() - behind.len(),
            c: behind.chars().next(),
        }
    }

    /// Takes so many bytes.
    pub(super) fn take(&mut self, n_bytes: usize) -> String {
        let from = self.at;
        self.at += n_bytes;
        self.pending[from..self.at].to_owned()
    }

    /// Gives out the text before `mark` as content. True where the mark was found, which is taken; else it may have begun at
    /// the end.
    pub(super) fn pass_to(&mut self, mark: &str, out: &mut Vec<ToolEvent>) -> bool {
        let rest = self.rest();
        let found = rest.find(mark);
        let n = found.unwrap_or_else(|| rest.len() - n_begun(rest, mark));
        let content = self.take(n);
        self.content(&content, out);
        if found.is_some() {
            self.at += mark.len();
        }
        found.is_some()
    }

    /// Whether `mark` stands at the beginning of what is not taken.
    pub(super) fn begins(&self, mark: &str) -> Found {
        match (self.rest().starts_with(mark), mark.starts_with(self.rest())) {
            (true, _) => Found::Here,
            (false, true) => Found::Maybe,
            (false, false) => Found::No,
        }
    }

    /// Takes the blanks at the beginning. True where something follows.
    pub(super) fn skip_blanks(&mut self) -> bool {
        self.at += self.peek().n_blank;
        !self.rest().is_empty()
    }

    /// Gives out content; blanks at its end wait for what follows.
    pub(super) fn content(&mut self, content: &str, out: &mut Vec<ToolEvent>) {
        let words = content.trim_end();
        if !words.is_empty() {
            let text = std::mem::take(&mut self.blanks) + words;
            out.push(ToolEvent::Content(text));
        }
        self.blanks.push_str(&content[words.len()..]);
    }

    /// A call has begun where `events` say so: the blanks before it belong to the format.
    pub(super) fn see(&mut self, events: &[ToolEvent]) {
        if events
            .iter()
            .any(|event| matches!(event, ToolEvent::Call { .. }))
        {
            self.blanks.clear();
            self.has_called = true;
        }
    }

    /// The text has ended: what is left is content, but for blanks behind a call.
    pub(super) fn finish(&mut self, out: &mut Vec<ToolEvent>) {
        let rest = self.take(self.rest().len());
        self.content(&rest, out);
        let blanks = std::mem::take(&mut self.blanks);
        if !self.has_called && !blanks.is_empty() {
            out.push(ToolEvent::Content(blanks));
        }
    }
}

/// Bytes of `mark` that the text ends with, as its beginning.
fn n_begun(text: &str, mark: &str) -> usize {
    let lengths = (1..mark.len().min(text.len() + 1)).rev();
    let mut begun = lengths.filter(|n| mark.is_char_boundary(*n) && text.ends_with(&mark[..*n]));
    begun.next().unwrap_or(0)
}
