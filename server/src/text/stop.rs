//! Stop strings across the pieces of a stream: no part of one is ever passed on, and no more is held back than the
//! longest end of the text that begins one.
//!
//! The first stop string to be *complete* ends the text; of several that end at the same byte, the longest. So the
//! outcome depends on the text alone, never on how it was cut into pieces. It knows no tokens.

use std::sync::Arc;

/// The stop strings of a request, prepared, and how they end a text. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct StopStrings {
    patterns: Arc<[Pattern]>,
    are_included: bool,
    n_ignored: u32,
}

/// A stop string with its failure function (Knuth, Morris and Pratt 1977).
#[derive(Debug)]
struct Pattern {
    text: String,
    /// `borders[n]`: length of the longest proper prefix of `text[..n]` that is also its end.
    borders: Vec<usize>,
}

impl StopStrings {
    /// Empty strings are left out: they would end every text.
    pub fn new(strings: impl IntoIterator<Item = String>) -> Self {
        let strings = strings.into_iter().filter(|s| !s.is_empty());
        Self {
            patterns: strings.map(Pattern::new).collect(),
            ..Self::default()
        }
    }

    /// The one that ends the text is a part of it.
    pub fn included(self) -> Self {
        Self {
            are_included: true,
            ..self
        }
    }

    /// What ends the text is a part of it.
    pub fn are_included(&self) -> bool {
        self.are_included
    }

    /// Those that are complete within the first `n` pieces don't end the text.
    pub fn ignored_in_first(self, n: u32) -> Self {
        Self {
            n_ignored: n,
            ..self
        }
    }
}

impl Pattern {
    fn new(text: String) -> Self {
        let bytes = text.as_bytes();
        let mut borders = vec![0; bytes.len() + 1];
        let mut length = 0;
        for n in 1..bytes.len() {
            while length > 0 && bytes[n] != bytes[length] {
                length = borders[length];
            }
            length += usize::from(bytes[n] == bytes[length]);
            borders[n + 1] = length;
        }
        Self { text, borders }
    }

    /// How much of the pattern the text ends with, after one more byte. `matched` is below the pattern's length.
    fn advance(&self, mut matched: usize, byte: u8) -> usize {
        let bytes = self.text.as_bytes();
        while matched > 0 && bytes[matched] != byte {
            matched = self.borders[matched];
        }
        matched + usize::from(bytes[matched] == byte)
    }
}

/// Watches one text.
#[derive(Debug)]
pub struct StopMatcher {
    strings: StopStrings,
    n_pieces: u32,
    /// For each string, how much of it the text ends with.
    matched: Vec<usize>,
    /// The end of the text that may begin a stop string.
    held: String,
}

impl StopMatcher {
    /// Starts with an empty text.
    pub fn new(strings: StopStrings) -> Self {
        let matched = vec![0; strings.patterns.len()];
        Self {
            strings,
            n_pieces: 0,
            matched,
            held: String::new(),
        }
    }

    /// Takes the next piece and appends to `out` what can't belong to a stop string. Returns the stop string that
    /// the text came to, if any: then `out` has the text before it, or with it, and the stream has ended.
    pub fn push(&mut self, piece: &str, out: &mut String) -> Option<&str> {
        let may_stop = self.n_pieces >= self.strings.n_ignored;
        self.n_pieces = self.n_pieces.saturating_add(1);
        if self.matched.is_empty() {
            out.push_str(piece);
            return None;
        }
        let n_held = self.held.len();
        self.held.push_str(piece);
        for end in n_held..self.held.len() {
            let byte = self.held.as_bytes()[end];
            let mut longest: Option<usize> = None;
            let patterns = &self.strings.patterns;
            for (i, (pattern, matched)) in patterns.iter().zip(&mut self.matched).enumerate() {
                *matched = pattern.advance(*matched, byte);
                let n = pattern.text.len();
                if *matched == n && !may_stop {
                    *matched = pattern.borders[n];
                } else if *matched == n
                    && longest.is_none_or(|other| patterns[other].text.len() < n)
                {
                    longest = Some(i);
                }
            }
            if let Some(i) = longest {
                let stop = &patterns[i].text;
                let n_cut = match self.strings.are_included {
                    true => 0,
                    false => stop.len(),
                };
                out.push_str(&self.held[..end + 1 - n_cut]);
                self.held.clear();
                return Some(stop);
            }
        }
        // A stop string begins with a character's first byte, so the cut is between characters.
        let n_keep = match self.strings.are_included {
            true => 0,
            false => self.matched.iter().copied().max().unwrap_or(0),
        };
        out.extend(self.held.drain(..self.held.len() - n_keep));
        None
    }

    /// Ends the text: what was held back did not become a stop string.
    pub fn finish(&mut self, out: &mut String) {
        out.push_str(&std::mem::take(&mut self.held));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The definition, by brute force over the whole text: what is passed on, and the stop string.
    fn whole(text: &str, stops: &[String]) -> (String, Option<String>) {
        for end in (0..=text.len()).filter(|end| text.is_char_boundary(*end)) {
            let ended = stops
                .iter()
                .filter(|s| !s.is_empty() && text[..end].ends_with(s.as_str()));
            if let Some(stop) = ended.max_by_key(|s| s.len()) {
                return (text[..end - stop.len()].to_owned(), Some(stop.clone()));
            }
        }
        (text.to_owned(), None)
    }

    /// The most that may be out after `text`: all but the longest end of it that begins a stop string.
    fn safe_len(text: &str, stops: &[String]) -> usize {
        let held = (0..text.len()).find(|at| {
            text.is_char_boundary(*at)
                && stops
                    .iter()
                    .any(|s| s.len() > text.len() - at && s.starts_with(&text[*at..]))
        });
        held.unwrap_or(text.len())
    }

    #[test]
    fn examples() {
        for (why, stops, pieces, want, stop) in [
            (
                "across pieces",
                vec!["END"],
                vec!["abE", "N", "Dxyz"],
                "ab",
                Some("END"),
            ),
            (
                "a false start is passed on",
                vec!["END"],
                vec!["E", "NE", "x"],
                "ENEx",
                None,
            ),
            (
                "held at the end, then given",
                vec!["END"],
                vec!["abEN"],
                "abEN",
                None,
            ),
            (
                "the first to be complete wins",
                vec!["abcd", "bc"],
                vec!["abcd"],
                "a",
                Some("bc"),
            ),
            (
                "of two that end together the longer",
                vec!["c", "bc"],
                vec!["abc"],
                "a",
                Some("bc"),
            ),
            (
                "overlapping start",
                vec!["aab"],
                vec!["aa", "ab"],
                "a",
                Some("aab"),
            ),
            (
                "empty strings never match",
                vec![""],
                vec!["abc"],
                "abc",
                None,
            ),
        ] {
            let mut matcher =
                StopMatcher::new(StopStrings::new(stops.into_iter().map(String::from)));
            let mut out = String::new();
            let found = pieces
                .iter()
                .find_map(|piece| matcher.push(piece, &mut out).map(String::from));
            matcher.finish(&mut out);
            assert_eq!((out.as_str(), found.as_deref()), (want, stop), "{why}");
        }
    }

    proptest! {
        #[test]
        fn as_by_brute_force(
            pieces in proptest::collection::vec("[abé👍]{0,4}", 0..12),
            stops in proptest::collection::vec("[abé👍]{0,5}", 0..4),
        ) {
            let text = pieces.concat();
            let (want, want_stop) = whole(&text, &stops);
            let mut matcher = StopMatcher::new(StopStrings::new(stops.clone()));
            let (mut out, mut seen, mut stop) = (String::new(), String::new(), None);
            for piece in &pieces {
                seen.push_str(piece);
                stop = matcher.push(piece, &mut out).map(String::from);
                if stop.is_some() {
                    break;
                }
                prop_assert_eq!(out.len(), safe_len(&seen, &stops), "held back no less and no more than needed");
            }
            matcher.finish(&mut out);
            prop_assert_eq!((out, stop), (want, want_stop));
        }
    }

    #[test]
    fn a_stop_string_may_be_a_part_of_the_text_and_come_too_early() {
        let strings = || StopStrings::new(["aa".to_owned(), "b".to_owned()]);
        for (why, strings, pieces, want, want_stop) in [
            (
                "included",
                strings().included(),
                &["xa", "ay"] as &[&str],
                "xaa",
                Some("aa"),
            ),
            (
                "included, and none is complete",
                strings().included(),
                &["xa", "y"],
                "xay",
                None,
            ),
            (
                "too early",
                strings().ignored_in_first(1),
                &["baax", "y"],
                "baaxy",
                None,
            ),
            (
                "begun early, complete in time",
                strings().ignored_in_first(1),
                &["ba", "ab"],
                "b",
                Some("aa"),
            ),
            (
                "complete early, and once more with its own end",
                strings().ignored_in_first(1),
                &["aa", "a"],
                "a",
                Some("aa"),
            ),
            (
                "early, then included",
                strings().ignored_in_first(2).included(),
                &["b", "b", "b", "b"],
                "bbb",
                Some("b"),
            ),
        ] {
            let mut matcher = StopMatcher::new(strings);
            let (mut out, mut stop) = (String::new(), None);
            for piece in pieces {
                stop = matcher.push(piece, &mut out).map(str::to_owned);
                if stop.is_some() {
                    break;
                }
            }
            matcher.finish(&mut out);
            assert_eq!((out.as_str(), stop.as_deref()), (want, want_stop), "{why}");
        }
    }
}
