//! API keys: names and digests, never the keys themselves, so that no log, error or dump of memory tells one.

use std::fmt;
use std::sync::Arc;

use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

/// The longest name, and the longest key, in bytes.
const MAX_NAME_BYTES: usize = 64;
const MAX_KEY_BYTES: usize = 1024;

/// What a key looks like, for whoever gave something else.
pub const KEY_FORM: &str = "a key: visible ASCII without blanks, at most 1024 characters, or NAME:KEY with a name of letters, digits, '.', '_' and '-'";

/// A key that is accepted, and whose it is.
#[derive(Clone, PartialEq, Eq)]
pub struct ApiKey {
    name: Arc<str>,
    digest: [u8; 32],
}

/// Why there are no keys, in words that hold no part of one.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KeysError {
    /// Nothing but blank lines and comments.
    #[error("holds no key; write one a line, KEY or NAME:KEY")]
    Empty,
    /// Counted from 1.
    #[error("line {0} is not {KEY_FORM}")]
    Line(usize),
    /// Both would be right, and their caches and limits are not one.
    #[error("the keys of {0:?} and {1:?} are the same; give each its own")]
    Shared(Arc<str>, Arc<str>),
}

impl ApiKey {
    /// `NAME:KEY`, or `KEY`, whose name is then made of its digest: the same everywhere, and of no use to guess it sooner.
    /// `None`: not of [`KEY_FORM`].
    pub fn parse(text: &str) -> Option<Self> {
        let (name, key) = match text.split_once(':') {
            Some((name, key)) => (Some(name), key),
            None => (None, text),
        };
        let is_key = (1..=MAX_KEY_BYTES).contains(&key.len())
            && key.bytes().all(|byte| byte.is_ascii_graphic());
        let in_name = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
        let is_name =
            |name: &str| (1..=MAX_NAME_BYTES).contains(&name.len()) && name.bytes().all(in_name);
        if !is_key || !name.is_none_or(is_name) {
            return None;
        }
        let name = name.map_or_else(|| unnamed(key), str::to_owned);
        Some(Self {
            name: name.into(),
            digest: Sha256::digest(key).into(),
        })
    }

    /// Whose key it is.
    pub fn name(&self) -> &Arc<str> {
        &self.name
    }
}

/// Hashed apart from what keys are compared by.
fn unnamed(key: &str) -> String {
    let mut hash = Sha256::new();
    hash.update(b"the name of an API key\0");
    hash.update(key);
    let digest: [u8; 32] = hash.finalize().into();
    let hex: String = digest[..6].iter().map(|b| format!("{b:02x}")).collect();
    format!("key-{hex}")
}

impl fmt::Debug for ApiKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ApiKey").field("name", &self.name).finish()
    }
}

/// Reads one key a line; blank lines and those that begin with `#` say nothing.
pub fn parse_file(content: &[u8]) -> Result<Vec<ApiKey>, KeysError> {
    let mut keys = Vec::new();
    for (i, line) in content.split(|byte| *byte == b'\n').enumerate() {
        let line = line.trim_ascii();
        if line.is_empty() || line.starts_with(b"#") {
            continue;
        }
        let key = std::str::from_utf8(line).ok().and_then(ApiKey::parse);
        keys.push(key.ok_or(KeysError::Line(i + 1))?);
    }
    match keys.is_empty() {
        true => Err(KeysError::Empty),
        false => Ok(keys),
    }
}

/// All keys that are accepted. Several may have one name: a key is replaced by adding the new one first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Keyring(Vec<ApiKey>);

impl Keyring {
    /// At least one key, and none under two names.
    pub fn new(keys: Vec<ApiKey>) -> Result<Self, KeysError> {
        if keys.is_empty() {
            return Err(KeysError::Empty);
        }
        for (i, key) in keys.iter().enumerate() {
            let same = keys[..i].iter().find(|other| other.digest == key.digest);
            if let Some(other) = same.filter(|other| other.name != key.name) {
                let (a, b) = (Arc::clone(&other.name), Arc::clone(&key.name));
                return Err(KeysError::Shared(a, b));
            }
        }
        Ok(Self(keys))
    }

    /// Whose key was presented. Digests are compared, each of them and in constant time: how long it takes tells neither
    /// how much of a key was right nor how long it is.
    pub fn find(&self, presented: &[u8]) -> Option<&Arc<str>> {
        let digest: [u8; 32] = Sha256::digest(presented).into();
        self.0.iter().fold(None, |found, key| {
            match bool::from(key.digest.ct_eq(&digest)) {
                true => Some(&key.name),
                false => found,
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_have_names_and_are_found_by_their_whole() {
        let file = b"# of two teams\n\nred:s3cret\r\n  blue:other:with-colon\nred:new\nalone\n";
        let keys = Keyring::new(parse_file(file).unwrap()).unwrap();
        let find = |presented: &str| keys.find(presented.as_bytes()).map(|name| &**name);
        for (presented, name) in [
            ("s3cret", Some("red")),
            ("new", Some("red")),
            ("other:with-colon", Some("blue")),
            ("s3cre", None),
            ("s3crett", None),
            ("red:s3cret", None),
            ("red", None),
            ("", None),
            ("# of two teams", None),
        ] {
            assert_eq!(find(presented), name, "{presented:?}");
        }
        let unnamed = find("alone").unwrap();
        assert!(
            unnamed.starts_with("key-") && unnamed.len() == 16,
            "{unnamed}"
        );
        assert_eq!(ApiKey::parse("alone").unwrap().name().as_ref(), unnamed);
        assert_ne!(ApiKey::parse("Alone").unwrap().name().as_ref(), unnamed);
    }

    #[test]
    fn what_is_no_key_is_told_without_showing_it() {
        let long = format!("team:{}", "x".repeat(MAX_KEY_BYTES + 1));
        for wrong in [
            "a b",
            "",
            "team:",
            ":key",
            "te am:key",
            "schlüssel",
            "k\u{7f}",
            &long,
        ] {
            assert_eq!(ApiKey::parse(wrong), None, "{wrong:?}");
        }
        for (content, want) in [
            (b"".as_slice(), KeysError::Empty),
            (b"# only a comment\n\n", KeysError::Empty),
            (b"good\nhush hush\n", KeysError::Line(2)),
            (b"\xff\n", KeysError::Line(1)),
        ] {
            let error = parse_file(content).unwrap_err();
            assert_eq!(error, want);
            assert!(!error.to_string().contains("hush"));
        }
        let shared = parse_file(b"red:hush\nblue:hush\n").unwrap();
        let error = Keyring::new(shared).unwrap_err().to_string();
        assert!(error.contains("red") && !error.contains("hush"), "{error}");
        let twice = parse_file(b"red:hush\nred:hush\n").unwrap();
        let keys = Keyring::new(twice).unwrap();
        assert!(!format!("{keys:?}").contains("hush"));
    }
}
