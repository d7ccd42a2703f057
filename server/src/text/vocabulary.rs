//! What each token id stands for in text: bytes looked up by id, and the rules that join them.
//!
//! A tokenizer's decoder is a chain of steps over a list of token strings. Here the chain is taken apart once, at
//! load: what it does to each token alone goes into a table, and what depends on neighbours (runs of byte tokens,
//! the first token, a stripped start) is left as the few rules of [`Vocabulary`] that the detokenizer follows. It
//! holds no state of any text.

use std::collections::HashMap;

use tokenizers::Decoder as _;
use tokenizers::decoders::DecoderWrapper;

use super::TextError;

/// The text of every token id. Ids that the tokenizer doesn't know stand for nothing.
#[derive(Debug)]
pub struct Vocabulary {
    /// The texts, one after another.
    arena: Vec<u8>,
    /// Index is the id.
    entries: Vec<Entry>,
    /// Steps for the text of a finished run of byte tokens.
    after_fallback: Vec<DecoderWrapper>,
    /// Taken from the start of the whole text: so many of this character at most.
    strip_start: Option<(char, usize)>,
}

/// One token id.
#[derive(Clone, Copy, Debug)]
struct Entry {
    /// As the first token of a text.
    first: Piece,
    /// Anywhere else.
    later: Piece,
    special: bool,
}

/// What one token contributes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Piece {
    Missing,
    /// One byte of a run; the run's text is known at its end.
    Byte(u8),
    /// `arena[start..end]`; UTF-8 unless the vocabulary is byte-level.
    Text {
        start: u32,
        end: u32,
    },
}

/// A token as the detokenizer reads it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum TokenText<'a> {
    Byte(u8),
    Bytes(&'a [u8]),
}

impl Vocabulary {
    /// Reads a tokenizer's vocabulary and takes its decoder apart. Fails where that can't be streamed exactly.
    pub fn new(tokenizer: &tokenizers::Tokenizer) -> Result<Self, TextError> {
        let chain = Chain::new(tokenizer.get_decoder())?;
        let byte_of = chain.byte_level.then(byte_level_alphabet);
        let added = tokenizer.get_added_vocabulary();
        let n_ids = tokenizer
            .get_vocab(true)
            .values()
            .max()
            .map_or(0, |id| *id as usize + 1);
        let mut vocabulary = Self {
            arena: Vec::new(),
            entries: Vec::with_capacity(n_ids),
            after_fallback: chain.after.clone(),
            strip_start: chain.strip_start,
        };
        for id in 0..n_ids as u32 {
            let token = added
                .simple_id_to_token(id)
                .or_else(|| tokenizer.id_to_token(id));
            let Some(token) = token else {
                vocabulary.entries.push(Entry {
                    first: Piece::Missing,
                    later: Piece::Missing,
                    special: false,
                });
                continue;
            };
            let special = added.is_special_token(&token);
            let later = vocabulary.add(chain.decode_one(&token, Place::Later)?, byte_of.as_ref());
            let first = match chain.depends_on_place() {
                true => vocabulary.add(chain.decode_one(&token, Place::First)?, byte_of.as_ref()),
                false => later,
            };
            vocabulary.entries.push(Entry {
                first,
                later,
                special,
            });
        }
        Ok(vocabulary)
    }

    /// One past the highest id.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there is no token at all.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The bytes of one token where it stands inside a text; empty for ids without one. They may be part of a
    /// character only.
    pub fn bytes(&self, id: u32) -> Vec<u8> {
        match self.entries.get(id as usize).map(|e| e.later) {
            None | Some(Piece::Missing) => Vec::new(),
            Some(Piece::Byte(byte)) => vec![byte],
            Some(Piece::Text { start, end }) => self.arena[start as usize..end as usize].to_vec(),
        }
    }

    /// Bytes of the longest token.
    pub fn longest_token_bytes(&self) -> usize {
        let n_bytes = |piece| match piece {
            Piece::Missing => 0,
            Piece::Byte(_) => 1,
            Piece::Text { start, end } => (end - start) as usize,
        };
        let entries = self.entries.iter();
        let longest = entries.map(|e| n_bytes(e.first).max(n_bytes(e.later)));
        longest.max().unwrap_or(0)
    }

    /// Whether `skip_special_tokens` leaves this one out.
    pub fn is_special(&self, id: u32) -> bool {
        self.entries.get(id as usize).is_some_and(|e| e.special)
    }

    /// The special token with this name.
    pub fn special_token(&self, name: &str) -> Option<u32> {
        let ids = 0..u32::try_from(self.len()).unwrap_or(u32::MAX);
        let mut named = ids.filter(|id| self.is_special(*id) && self.bytes(*id) == name.as_bytes());
        named.next()
    }

    pub(super) fn token(&self, id: u32, first: bool) -> Option<TokenText<'_>> {
        let entry = self.entries.get(id as usize)?;
        match if first { entry.first } else { entry.later } {
            Piece::Missing => None,
            Piece::Byte(byte) => Some(TokenText::Byte(byte)),
            Piece::Text { start, end } => {
                Some(TokenText::Bytes(&self.arena[start as usize..end as usize]))
            }
        }
    }

    /// The text of one decoded run of byte tokens.
    pub(super) fn run_text(&self, run: String, first: bool) -> String {
        if self.after_fallback.is_empty() {
            return run;
        }
        let place = if first { Place::First } else { Place::Later };
        // The steps were tried on every token at load; should one fail on a run, the run stands as it is.
        apply(&self.after_fallback, &run, place).unwrap_or(run)
    }

    pub(super) fn strip_start(&self) -> Option<(char, usize)> {
        self.strip_start
    }

    fn add(&mut self, decoded: Decoded, byte_of: Option<&HashMap<char, u8>>) -> Piece {
        let text = match decoded {
            Decoded::Byte(byte) => return Piece::Byte(byte),
            Decoded::Text(text) => text,
        };
        let start = self.arena.len() as u32;
        let bytes = byte_of.and_then(|byte_of| {
            text.chars()
                .map(|c| byte_of.get(&c).copied())
                .collect::<Option<Vec<u8>>>()
        });
        match bytes {
            Some(bytes) => self.arena.extend(bytes),
            // Byte-level decoding takes a token with any other character as it is: added tokens.
            None => self.arena.extend(text.as_bytes()),
        }
        Piece::Text {
            start,
            end: self.arena.len() as u32,
        }
    }
}

/// Where a token stands; some steps treat the first one differently.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    First,
    Later,
}

enum Decoded {
    Byte(u8),
    Text(String),
}

/// A decoder taken apart.
#[derive(Default)]
struct Chain {
    /// No decoder at all: tokens are joined by a space.
    spaced: bool,
    /// Steps on each token, before byte fallback.
    before: Vec<DecoderWrapper>,
    byte_fallback: bool,
    /// Steps on each token and each run of bytes, after byte fallback.
    after: Vec<DecoderWrapper>,
    byte_level: bool,
    strip_start: Option<(char, usize)>,
}

impl Chain {
    fn new(decoder: Option<&DecoderWrapper>) -> Result<Self, TextError> {
        let steps = match decoder {
            None => {
                return Ok(Self {
                    spaced: true,
                    ..Self::default()
                });
            }
            Some(DecoderWrapper::Sequence(sequence)) => sequence.get_decoders(),
            Some(one) => std::slice::from_ref(one),
        };
        let mut chain = Self::default();
        let mut joined = false;
        for step in steps {
            let unsupported = || TextError::Decoder {
                found: name_of(decoder),
            };
            match step {
                DecoderWrapper::Fuse(_) => joined = true,
                DecoderWrapper::ByteLevel(_) if !joined => {
                    (chain.byte_level, joined) = (true, true)
                }
                DecoderWrapper::ByteFallback(_) if !joined && !chain.byte_fallback => {
                    chain.byte_fallback = true
                }
                // Stripping an empty token's end is undefined in the format's own implementation.
                DecoderWrapper::Strip(strip) if strip.stop > 0 => return Err(unsupported()),
                DecoderWrapper::Strip(strip) if joined && chain.strip_start.is_none() => {
                    chain.strip_start = Some((strip.content, strip.start));
                }
                DecoderWrapper::Replace(_)
                | DecoderWrapper::Metaspace(_)
                | DecoderWrapper::WordPiece(_)
                | DecoderWrapper::Strip(_)
                    if !joined =>
                {
                    if chain.byte_fallback {
                        &mut chain.after
                    } else {
                        &mut chain.before
                    }
                    .push(step.clone());
                }
                _ => return Err(unsupported()),
            }
        }
        Ok(chain)
    }

    fn depends_on_place(&self) -> bool {
        self.spaced
            || (self.before.iter().chain(&self.after)).any(|step| {
                matches!(
                    step,
                    DecoderWrapper::Metaspace(_) | DecoderWrapper::WordPiece(_)
                )
            })
    }

    fn decode_one(&self, token: &str, place: Place) -> Result<Decoded, TextError> {
        if self.spaced && place == Place::Later {
            return Ok(Decoded::Text(format!(" {token}")));
        }
        let failed = |e: tokenizers::Error| TextError::File {
            file: "tokenizer.json",
            reason: format!("the decoder fails on the token {token:?}: {e}"),
        };
        let token = apply(&self.before, token, place).map_err(failed)?;
        if self.byte_fallback
            && let Some(byte) = fallback_byte(&token)
        {
            return Ok(Decoded::Byte(byte));
        }
        Ok(Decoded::Text(
            apply(&self.after, &token, place).map_err(failed)?,
        ))
    }
}

/// Runs steps that treat each token alone, apart from whether it is the first.
fn apply(steps: &[DecoderWrapper], token: &str, place: Place) -> Result<String, tokenizers::Error> {
    let mut tokens = match place {
        Place::First => vec![token.to_owned()],
        Place::Later => vec!["a".to_owned(), token.to_owned()],
    };
    for step in steps {
        tokens = step.decode_chain(tokens)?;
    }
    Ok(tokens.pop().unwrap_or_default())
}

/// `<0x0A>` is the byte 10.
fn fallback_byte(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    (digits.len() == 2)
        .then(|| u8::from_str_radix(digits, 16).ok())
        .flatten()
}

/// The characters that byte-level vocabularies write bytes with (GPT-2): printable Latin-1 stands for itself, the
/// other bytes, in order, for the characters from U+0100 on.
pub(super) fn byte_level_alphabet() -> HashMap<char, u8> {
    let mut next = 0x100;
    (0..=u8::MAX)
        .map(|byte| match byte {
            b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF => (char::from(byte), byte),
            _ => {
                next += 1;
                (
                    char::from_u32(next - 1).unwrap_or(char::REPLACEMENT_CHARACTER),
                    byte,
                )
            }
        })
        .collect()
}

fn name_of(decoder: Option<&DecoderWrapper>) -> String {
    let value = serde_json::to_value(decoder).unwrap_or_default();
    let type_of = |v: &serde_json::Value| v["type"].as_str().unwrap_or("?").to_owned();
    match value["decoders"].as_array() {
        Some(steps) => format!(
            "Sequence[{}]",
            steps.iter().map(type_of).collect::<Vec<_>>().join(", ")
        ),
        None => type_of(&value),
    }
}
