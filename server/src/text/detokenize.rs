//! Tokens to text, piece by piece: the pieces of a stream concatenate exactly to the tokenizer's decoding of all
//! its tokens, each piece is whole characters, and a token costs the same however long the text is.
//!
//! What is not yet decided is held back, and nothing else: the first bytes of a character, and a run of byte
//! tokens (`<0x0A>`), which decodes as a whole or, where it isn't UTF-8, to one U+FFFD for each byte. It knows
//! neither stop strings nor requests.

use std::sync::Arc;

use super::vocabulary::{TokenText, Vocabulary};

/// Decodes one stream of tokens.
#[derive(Clone, Debug)]
pub struct Detokenizer {
    vocabulary: Arc<Vocabulary>,
    skip_special_tokens: bool,
    /// No token has contributed yet.
    at_first: bool,
    run: Run,
    /// The start of a character whose rest has not come: at most 3 bytes between two tokens.
    partial: Vec<u8>,
    /// How many of the vocabulary's stripped character may still be taken from the start.
    strip_left: usize,
}

/// The byte tokens since the last other token.
#[derive(Clone, Debug, Default)]
struct Run {
    bytes: Vec<u8>,
    /// `bytes[..valid]` is UTF-8.
    valid: usize,
    /// It can't become UTF-8 any more, and every byte so far has been written as U+FFFD.
    broken: bool,
    /// It began the text.
    first: bool,
}

impl Detokenizer {
    /// Decodes tokens as a text of their own.
    pub fn new(vocabulary: Arc<Vocabulary>, skip_special_tokens: bool) -> Self {
        let strip_left = vocabulary.strip_start().map_or(0, |(_, n)| n);
        Self {
            vocabulary,
            skip_special_tokens,
            at_first: true,
            run: Run::default(),
            partial: Vec::new(),
            strip_left,
        }
    }

    /// Decodes tokens as the continuation of `prompt`: what comes is what the whole has beyond the prompt's text.
    pub fn after(vocabulary: Arc<Vocabulary>, skip_special_tokens: bool, prompt: &[u32]) -> Self {
        let mut detokenizer = Self::new(vocabulary, skip_special_tokens);
        let mut prompt_text = String::new();
        for id in prompt {
            detokenizer.push(*id, &mut prompt_text);
            prompt_text.clear();
        }
        detokenizer
    }

    /// Takes a token and appends the text that is decided by now.
    pub fn push(&mut self, id: u32, out: &mut String) {
        let vocabulary = Arc::clone(&self.vocabulary);
        if self.skip_special_tokens && vocabulary.is_special(id) {
            return;
        }
        let Some(token) = vocabulary.token(id, self.at_first) else {
            return;
        };
        let first = std::mem::replace(&mut self.at_first, false);
        match token {
            TokenText::Byte(byte) => {
                self.run.first |= first;
                self.push_byte(byte, out);
            }
            TokenText::Bytes(bytes) => {
                self.end_run(out);
                self.write(bytes, out);
            }
        }
    }

    /// Whole characters that are held back because the run of byte tokens that they belong to goes on.
    pub fn n_held_chars(&self) -> usize {
        let whole = std::str::from_utf8(&self.run.bytes[..self.run.valid]);
        whole.map_or(0, |text| text.chars().count())
    }

    /// Ends the stream: appends what was held back.
    pub fn finish(&mut self, out: &mut String) {
        self.end_run(out);
        if !self.partial.is_empty() {
            self.partial.clear();
            self.write_text("\u{FFFD}", out);
        }
    }

    fn push_byte(&mut self, byte: u8, out: &mut String) {
        if self.run.broken {
            return self.write_replacements(1, out);
        }
        let run = &mut self.run;
        run.bytes.push(byte);
        match std::str::from_utf8(&run.bytes[run.valid..]) {
            Ok(_) => run.valid = run.bytes.len(),
            Err(e) if e.error_len().is_none() => {}
            Err(_) => {
                let n = std::mem::take(&mut run.bytes).len();
                run.broken = true;
                self.write_replacements(n, out);
            }
        }
    }

    fn end_run(&mut self, out: &mut String) {
        if self.run.bytes.is_empty() {
            self.run = Run::default();
            return;
        }
        let n = self.run.bytes.len();
        if self.run.valid < n {
            self.write_replacements(n, out);
        } else {
            let run = std::mem::take(&mut self.run);
            let text =
                String::from_utf8(run.bytes).expect("its validity was followed byte by byte");
            let text = self.vocabulary.run_text(text, run.first);
            self.write(text.as_bytes(), out);
        }
        self.run = Run::default();
    }

    fn write_replacements(&mut self, n: usize, out: &mut String) {
        for _ in 0..n {
            let first = std::mem::replace(&mut self.run.first, false);
            let text = self.vocabulary.run_text("\u{FFFD}".to_owned(), first);
            self.write(text.as_bytes(), out);
        }
    }

    /// Appends bytes as characters; what isn't UTF-8 becomes U+FFFD as in `String::from_utf8_lossy`.
    fn write(&mut self, bytes: &[u8], out: &mut String) {
        if self.partial.is_empty()
            && let Ok(text) = std::str::from_utf8(bytes)
        {
            return self.write_text(text, out);
        }
        let mut bytes_left = std::mem::take(&mut self.partial);
        bytes_left.extend_from_slice(bytes);
        let mut chunks = bytes_left.utf8_chunks().peekable();
        while let Some(chunk) = chunks.next() {
            self.write_text(chunk.valid(), out);
            let at_end = chunks.peek().is_none();
            if at_end && may_be_completed(chunk.invalid()) {
                self.partial = chunk.invalid().to_vec();
            } else if !chunk.invalid().is_empty() {
                self.write_text("\u{FFFD}", out);
            }
        }
    }

    fn write_text(&mut self, text: &str, out: &mut String) {
        let mut text = text;
        while self.strip_left > 0 && !text.is_empty() {
            let stripped = self
                .vocabulary
                .strip_start()
                .and_then(|(c, _)| text.strip_prefix(c));
            match stripped {
                Some(rest) => (text, self.strip_left) = (rest, self.strip_left - 1),
                None => self.strip_left = 0,
            }
        }
        out.push_str(text);
    }
}

/// Whether more bytes could make these a character.
fn may_be_completed(bytes: &[u8]) -> bool {
    matches!(std::str::from_utf8(bytes), Err(e) if e.error_len().is_none())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::tokenizer::tests::{byte_fallback_tokenizer, byte_level_tokenizer};
    use proptest::prelude::*;

    /// Pieces of `ids`, checked to be whole characters by being `String`s.
    fn stream(tokenizer: &tokenizers::Tokenizer, ids: &[u32], skip: bool) -> String {
        let vocabulary = Arc::new(Vocabulary::new(tokenizer).unwrap());
        let mut detokenizer = Detokenizer::new(vocabulary, skip);
        let mut whole = String::new();
        for id in ids {
            let mut piece = String::new();
            detokenizer.push(*id, &mut piece);
            whole.push_str(&piece);
        }
        detokenizer.finish(&mut whole);
        whole
    }

    #[test]
    fn byte_fallback_runs_decode_as_a_whole() {
        let tokenizer = byte_fallback_tokenizer(true);
        let byte = |b: u8| tokenizer.token_to_id(&format!("<0x{b:02X}>")).unwrap();
        let a = tokenizer.token_to_id("▁a").unwrap();
        for (why, ids) in [
            (
                "a character in three bytes",
                vec![a, byte(0xE5), byte(0x8F), byte(0xAB), a],
            ),
            ("cut short by a token", vec![a, byte(0xE5), byte(0x8F), a]),
            ("cut short by the end", vec![byte(0xE5), byte(0x8F)]),
            (
                "good bytes before a bad one are lost with it",
                vec![byte(b'a'), byte(0xFF), byte(b'b'), a, byte(b'c')],
            ),
            (
                "a space that is stripped comes as a byte",
                vec![byte(b' '), byte(b' '), a],
            ),
            ("an unknown id is nothing", vec![a, 1_000_000, a]),
        ] {
            assert_eq!(
                stream(tokenizer, &ids, true),
                tokenizer.decode(&ids, true).unwrap(),
                "{why}"
            );
        }
    }

    #[test]
    fn a_continuation_is_what_the_whole_has_beyond_the_prompt() {
        let tokenizer = byte_fallback_tokenizer(true);
        let vocabulary = Arc::new(Vocabulary::new(tokenizer).unwrap());
        let a = tokenizer.token_to_id("▁a").unwrap();
        let mut text = String::new();
        Detokenizer::after(Arc::clone(&vocabulary), true, &[a]).push(a, &mut text);
        assert_eq!(text, " a", "not stripped: it isn't the start");
        text.clear();
        Detokenizer::new(vocabulary, true).push(a, &mut text);
        assert_eq!(text, "a");
    }

    #[test]
    fn a_character_comes_whole_and_at_once() {
        let tokenizer = byte_level_tokenizer();
        let ids = tokenizer.encode("𐍈", false).unwrap().get_ids().to_vec();
        assert_eq!(ids.len(), 4, "the test's vocabulary has no merge for it");
        let mut detokenizer = Detokenizer::new(Arc::new(Vocabulary::new(tokenizer).unwrap()), true);
        let mut text = String::new();
        for id in &ids[..3] {
            detokenizer.push(*id, &mut text);
            assert_eq!(text, "");
        }
        detokenizer.push(ids[3], &mut text);
        assert_eq!(text, "𐍈");
    }

    fn text() -> impl Strategy<Value = String> {
        prop_oneof![
            ".*",
            "[ a-c▁é叫👩🏽‍🚀🇩🇪\u{FFFD}]{0,20}",
            proptest::collection::vec(any::<u8>(), 0..40)
                .prop_map(|b| String::from_utf8_lossy(&b).into_owned()),
        ]
    }

    proptest! {
        #[test]
        fn any_ids_stream_to_their_decoding(
            ids in proptest::collection::vec(0u32..400, 0..60), skip in any::<bool>(), strip in any::<bool>(),
        ) {
            for tokenizer in [byte_level_tokenizer(), byte_fallback_tokenizer(strip)] {
                prop_assert_eq!(stream(tokenizer, &ids, skip), tokenizer.decode(&ids, skip).unwrap());
            }
        }

        #[test]
        fn any_text_streams_to_its_decoding(text in text()) {
            for tokenizer in [byte_level_tokenizer(), byte_fallback_tokenizer(true), byte_fallback_tokenizer(false)] {
                let ids = tokenizer.encode(text.as_str(), true).unwrap().get_ids().to_vec();
                prop_assert_eq!(stream(tokenizer, &ids, true), tokenizer.decode(&ids, true).unwrap());
            }
        }

        #[test]
        fn byte_level_text_survives(text in text()) {
            let tokenizer = byte_level_tokenizer();
            let ids = tokenizer.encode(text.as_str(), false).unwrap().get_ids().to_vec();
            prop_assert_eq!(stream(tokenizer, &ids, true), text);
        }
    }
}
