//! `kvasir_resume`: a stream that broke off elsewhere goes on here. The call is sent again with the seed that the answer
//! stated and with what its client has of it; the answer goes on under its name, and only what comes after is sent.

use serde::Deserialize;

use super::choices::Choices;
use super::error::ApiError;
use super::fields::Fields;

const NAME: &str = "kvasir_resume";
/// As long as any name that this server gives, and then some.
const MAX_ID_BYTES: usize = 256;

/// What a client has of an answer.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub(super) struct Resume {
    /// The answer's name.
    pub(super) id: String,
    /// When it was begun, in seconds since 1970.
    pub(super) created: u64,
    /// The tokens of each choice, those included whose text is still held back.
    pub(super) choices: Vec<Vec<u32>>,
}

/// What the rest of a call says that matters here.
#[derive(Clone, Copy, Debug)]
pub(super) struct Asked<'a> {
    pub(super) is_stream: bool,
    pub(super) choices: &'a Choices,
    /// The caller named the seed, or needs none.
    pub(super) has_seed: bool,
}

impl Resume {
    pub(super) fn take(
        fields: &mut Fields<'_>,
        asked: Asked<'_>,
    ) -> Result<Option<Self>, ApiError> {
        let Some(resume) = fields.take::<Self>(NAME)? else {
            return Ok(None);
        };
        let (n, found) = (asked.choices.n.get() as usize, resume.choices.len());
        let wrong = if !asked.is_stream {
            "allowed only with \"stream\": true".to_owned()
        } else if asked.choices.beams().is_some() || asked.choices.best_of().is_some() {
            "not supported with beams, or the best of more choices than n".to_owned()
        } else if !asked.has_seed {
            "needs the seed that the answer stated; send it as \"seed\"".to_owned()
        } else if found != n {
            format!("{found} choices, n is {n}; name the tokens of each, none where there are none")
        } else if !(1..=MAX_ID_BYTES).contains(&resume.id.len()) {
            format!("id must have 1 to {MAX_ID_BYTES} bytes")
        } else {
            return Ok(Some(resume));
        };
        Err(ApiError::field(NAME, wrong))
    }

    /// Checks it against the prompts, the longest answer and the vocabulary.
    pub(super) fn check(
        &self,
        n_prompts: usize,
        max_tokens: u32,
        vocab_size: u32,
    ) -> Result<(), ApiError> {
        let longest = self.choices.iter().map(Vec::len).max().unwrap_or(0);
        let wrong = if n_prompts != 1 {
            format!("{n_prompts} prompts; one answer is resumed in a call")
        } else if longest > max_tokens as usize {
            format!("a choice of {longest} tokens; the answer may have {max_tokens}")
        } else if let Some(id) = self.choices.iter().flatten().find(|id| **id >= vocab_size) {
            format!("token {id} is not below the vocabulary's size, {vocab_size}")
        } else {
            return Ok(());
        };
        Err(ApiError::field(NAME, wrong))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn take(body: &str, is_stream: bool, has_seed: bool) -> Result<Option<Resume>, String> {
        let mut fields = Fields::parse(body.as_bytes()).unwrap();
        let choices = Choices::take(&mut fields).unwrap();
        let asked = Asked {
            is_stream,
            choices: &choices,
            has_seed,
        };
        Resume::take(&mut fields, asked).map_err(|error| error.message)
    }

    #[test]
    fn what_cannot_be_resumed_is_refused() {
        let resume = r#""kvasir_resume": {"id": "a", "created": 5, "choices": [[1, 2], []]}"#;
        let good = format!(r#"{{"n": 2, {resume}}}"#);
        let resumed = take(&good, true, true).unwrap().unwrap();
        assert_eq!((resumed.id.as_str(), resumed.created), ("a", 5));
        assert_eq!(resumed.choices, [vec![1, 2], vec![]]);
        assert_eq!(take("{}", false, false), Ok(None));
        let beams = format!(r#"{{"n": 2, "use_beam_search": true, {resume}}}"#);
        let best = format!(r#"{{"n": 2, "best_of": 3, {resume}}}"#);
        let one = format!("{{{resume}}}");
        let unnamed = good.replace(r#""a""#, r#""""#);
        for (body, is_stream, has_seed, part) in [
            (&good, false, true, "allowed only with \"stream\": true"),
            (&good, true, false, "needs the seed"),
            (&beams, true, true, "not supported with beams"),
            (&best, true, true, "the best of more choices"),
            (&one, true, true, "2 choices, n is 1"),
            (&unnamed, true, true, "id must have"),
        ] {
            let message = take(body, is_stream, has_seed).unwrap_err();
            assert!(message.starts_with("kvasir_resume: "), "{message}");
            assert!(message.contains(part), "{message}");
        }
        assert_eq!(resumed.check(1, 2, 3), Ok(()));
        for (n_prompts, max_tokens, vocab_size) in [(2, 2, 3), (1, 1, 3), (1, 2, 2)] {
            assert!(resumed.check(n_prompts, max_tokens, vocab_size).is_err());
        }
    }
}
