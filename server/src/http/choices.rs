//! How many choices a prompt gets, and how they come about: each sampled, the best of more that are sampled, or the best
//! hypotheses of a beam search.

use std::num::NonZeroU32;

use serde::Deserialize;

use super::error::ApiError;
use super::fields::Fields;
use crate::engine::{BeamParams, EarlyStopping};

/// More choices than anybody needs. How many run at once is the engine's to say.
const MAX_CHOICES: u32 = 4096;
/// Beyond these a power of a length is no number any more.
const LENGTH_PENALTIES: (f64, f64) = (-5.0, 5.0);

/// Fields that mean nothing to beams, or that aren't built for them, and the values that ask for nothing. With others the
/// answer would not be what was asked for.
const NOT_WITH_BEAMS: &[(&str, &[&str], &str)] = &[
    ("stream", &["false"], "beams are known at the end only"),
    ("temperature", &["0", "1"], NOT_SAMPLED),
    ("top_p", &["1"], NOT_SAMPLED),
    ("top_k", &["-1", "0"], NOT_SAMPLED),
    ("min_p", &["0"], NOT_SAMPLED),
    ("seed", &[], NOT_SAMPLED),
    (
        "stop",
        &["[]"],
        "beams end at tokens, such as stop_token_ids",
    ),
    ("presence_penalty", &["0"], NOT_BUILT),
    ("frequency_penalty", &["0"], NOT_BUILT),
    ("repetition_penalty", &["1"], NOT_BUILT),
    ("logit_bias", &["{}"], NOT_BUILT),
    ("min_tokens", &["0"], NOT_BUILT),
    ("allowed_token_ids", &["[]"], NOT_BUILT),
    ("bad_words", &["[]"], NOT_BUILT),
    ("response_format", &[r#"{"type":"text"}"#], NOT_BUILT),
    ("structured_outputs", &["{}"], NOT_BUILT),
    ("guided_json", &[], NOT_BUILT),
    ("guided_regex", &[], NOT_BUILT),
    ("guided_choice", &["[]"], NOT_BUILT),
    ("guided_grammar", &[], NOT_BUILT),
    ("tools", &["[]"], NOT_BUILT),
];
const NOT_SAMPLED: &str = "beams are searched, not sampled";
const NOT_BUILT: &str = "not supported with beams";

/// The choices of a prompt.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Choices {
    /// How many are returned.
    pub(super) n: NonZeroU32,
    selection: Selection,
}

/// How they come about.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Selection {
    /// Each is sampled and returned.
    All,
    /// So many are sampled, as with `n`, and the most likely returned, best first, as in vLLM: by the sum of their tokens'
    /// log-probabilities.
    BestOf(NonZeroU32),
    /// The best hypotheses, best first.
    Beams(BeamParams),
}

impl Choices {
    /// Takes `n` and `best_of`, and with `use_beam_search` what belongs to it; looks at fields that are taken later.
    pub(super) fn take(fields: &mut Fields<'_>) -> Result<Self, ApiError> {
        let n = take_count(fields, "n")?.unwrap_or(NonZeroU32::MIN);
        let best_of = take_count(fields, "best_of")?;
        if let Some(best_of) = best_of.filter(|best_of| *best_of < n) {
            let message = format!("{best_of} is below n, {n}; leave it out, or ask for more");
            return Err(ApiError::field("best_of", message));
        }
        if fields.take("use_beam_search")?.unwrap_or(false) {
            let width = best_of.unwrap_or(n);
            let selection = Selection::Beams(take_beams(fields, width)?);
            return Ok(Self { n, selection });
        }
        let selection = match best_of.filter(|best_of| *best_of > n) {
            Some(_) if fields.is_other_than("stream", &["false"]) => {
                return Err(ApiError::field(
                    "stream",
                    "the best of more choices than n are known at the end only; leave it out, or set best_of to n",
                ));
            }
            Some(best_of) => Selection::BestOf(best_of),
            None => Selection::All,
        };
        Ok(Self { n, selection })
    }

    /// How the beams are searched, where they are.
    pub(super) fn beams(&self) -> Option<BeamParams> {
        match self.selection {
            Selection::Beams(beams) => Some(beams),
            Selection::All | Selection::BestOf(_) => None,
        }
    }

    /// Answers of the engine for each prompt.
    pub(super) fn n_answers(&self) -> NonZeroU32 {
        match self.selection {
            Selection::BestOf(best_of) => best_of,
            Selection::All | Selection::Beams(_) => self.n,
        }
    }

    /// Sequences that run at once for each prompt, and the field that asks for them.
    pub(super) fn n_sequences(&self) -> (&'static str, NonZeroU32) {
        match self.selection {
            Selection::Beams(beams) if beams.width > self.n => ("best_of", beams.width),
            Selection::BestOf(best_of) => ("best_of", best_of),
            Selection::All | Selection::Beams(_) => ("n", self.n),
        }
    }

    /// The log-probabilities that are asked of the engine where a caller asks for `asked`.
    pub(super) fn logprobs(&self, asked: Option<u8>) -> Option<u8> {
        match self.selection {
            Selection::BestOf(_) => asked.or(Some(0)),
            Selection::All | Selection::Beams(_) => asked,
        }
    }

    /// Of so many answers to each prompt only the best are returned.
    pub(super) fn best_of(&self) -> Option<NonZeroU32> {
        match self.selection {
            Selection::BestOf(best_of) => Some(best_of),
            Selection::All | Selection::Beams(_) => None,
        }
    }
}

fn take_count(fields: &mut Fields<'_>, name: &str) -> Result<Option<NonZeroU32>, ApiError> {
    let Some(asked) = fields.take::<i64>(name)? else {
        return Ok(None);
    };
    let count = u32::try_from(asked).ok().filter(|n| *n <= MAX_CHOICES);
    match count.and_then(NonZeroU32::new) {
        Some(count) => Ok(Some(count)),
        None => {
            let message = format!("{asked} is not between 1 and {MAX_CHOICES}");
            Err(ApiError::field(name, message))
        }
    }
}

fn take_beams(fields: &mut Fields<'_>, width: NonZeroU32) -> Result<BeamParams, ApiError> {
    for (name, neutral, why) in NOT_WITH_BEAMS {
        if fields.is_other_than(name, neutral) {
            let remedy = match neutral {
                [] => "leave it out".to_owned(),
                values => format!("leave it out or set it to {}", values.join(" or ")),
            };
            return Err(ApiError::field(*name, format!("{why}; {remedy}")));
        }
    }
    let length_penalty: f64 = fields.take("length_penalty")?.unwrap_or(1.0);
    let (low, high) = LENGTH_PENALTIES;
    if !(low..=high).contains(&length_penalty) {
        return Err(ApiError::field(
            "length_penalty",
            format!("{length_penalty} is not between {low} and {high}"),
        ));
    }
    Ok(BeamParams {
        width,
        length_penalty,
        early_stopping: take_early_stopping(fields)?,
    })
}

fn take_early_stopping(fields: &mut Fields<'_>) -> Result<EarlyStopping, ApiError> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Given {
        Flag(bool),
        Word(String),
    }
    match fields.take("early_stopping") {
        Ok(None) => Ok(EarlyStopping::default()),
        Ok(Some(Given::Flag(true))) => Ok(EarlyStopping::WhenFull),
        Ok(Some(Given::Flag(false))) => Ok(EarlyStopping::WhenUnlikely),
        Ok(Some(Given::Word(word))) if word == "never" => Ok(EarlyStopping::WhenImpossible),
        Ok(Some(Given::Word(_))) | Err(_) => Err(ApiError::field(
            "early_stopping",
            "expected true, false or \"never\"",
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(body: &str) -> Result<Choices, ApiError> {
        Choices::take(&mut Fields::parse(body.as_bytes())?)
    }

    fn positive(n: u32) -> NonZeroU32 {
        NonZeroU32::new(n).unwrap()
    }

    #[test]
    fn beams_are_as_many_as_best_of_and_else_n() {
        for (body, n, width, length_penalty, early_stopping) in [
            ("", 1, 1, 1.0, EarlyStopping::WhenUnlikely),
            (r#", "n": 3"#, 3, 3, 1.0, EarlyStopping::WhenUnlikely),
            (
                r#", "n": 2, "best_of": 4, "length_penalty": -0.5, "early_stopping": true"#,
                2,
                4,
                -0.5,
                EarlyStopping::WhenFull,
            ),
            (
                r#", "best_of": 2, "early_stopping": "never", "temperature": 0.0, "top_p": 1, "top_k": -1, "stop": []"#,
                1,
                2,
                1.0,
                EarlyStopping::WhenImpossible,
            ),
        ] {
            let choices = parse(&format!("{{\"use_beam_search\": true{body}}}")).unwrap();
            let beams = BeamParams {
                width: positive(width),
                length_penalty,
                early_stopping,
            };
            assert_eq!(choices.beams(), Some(beams), "{body}");
            assert_eq!(choices.n_answers(), positive(n), "{body}");
            assert_eq!(choices.n_sequences().1, positive(width), "{body}");
            assert_eq!(choices.logprobs(None), None, "{body}");
        }
    }

    #[test]
    fn what_means_nothing_to_beams_is_refused_by_name() {
        for (field, want) in [
            (
                r#""stream": true"#,
                "stream: beams are known at the end only; leave it out or set it to false",
            ),
            (
                r#""temperature": 0.7"#,
                "temperature: beams are searched, not sampled; leave it out or set it to 0 or 1",
            ),
            (
                r#""top_p": 0.9"#,
                "top_p: beams are searched, not sampled; leave it out or set it to 1",
            ),
            (
                r#""top_k": 5"#,
                "top_k: beams are searched, not sampled; leave it out or set it to -1 or 0",
            ),
            (
                r#""seed": 0"#,
                "seed: beams are searched, not sampled; leave it out",
            ),
            (
                r#""stop": "x""#,
                "stop: beams end at tokens, such as stop_token_ids; leave it out or set it to []",
            ),
            (
                r#""repetition_penalty": 1.1"#,
                "repetition_penalty: not supported with beams; leave it out or set it to 1",
            ),
            (
                r#""length_penalty": 6"#,
                "length_penalty: 6 is not between -5 and 5",
            ),
            (
                r#""early_stopping": "soon""#,
                "early_stopping: expected true, false or \"never\"",
            ),
            (
                r#""early_stopping": 1"#,
                "early_stopping: expected true, false or \"never\"",
            ),
        ] {
            let error = parse(&format!("{{\"use_beam_search\": true, {field}}}")).unwrap_err();
            assert_eq!(error.message, want);
            assert!(
                parse(&format!("{{{field}}}")).is_ok(),
                "{field} without beams"
            );
        }
    }

    #[test]
    fn counts_are_checked() {
        for (body, want) in [
            (r#"{"n": 0}"#, "n: 0 is not between 1 and 4096"),
            (
                r#"{"n": 5000000000}"#,
                "n: 5000000000 is not between 1 and 4096",
            ),
            (
                r#"{"n": 3, "best_of": 2}"#,
                "best_of: 2 is below n, 3; leave it out, or ask for more",
            ),
            (
                r#"{"n": 2, "best_of": 3, "stream": true}"#,
                "stream: the best of more choices than n are known at the end only; leave it out, or set best_of to n",
            ),
        ] {
            assert_eq!(parse(body).unwrap_err().message, want, "{body}");
        }
        let same = parse(r#"{"n": 2, "best_of": 2, "stream": true}"#).unwrap();
        assert_eq!((same.n_answers(), same.logprobs(None)), (positive(2), None));
        let more = parse(r#"{"n": 2, "best_of": 3}"#).unwrap();
        assert_eq!(more.n_sequences(), ("best_of", positive(3)));
        assert_eq!(
            (more.logprobs(None), more.logprobs(Some(4))),
            (Some(0), Some(4))
        );
    }
}
