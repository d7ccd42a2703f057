//! Cuts a long text where its tokens are cut anyway, so that a tokenizer, which needs some hundred bytes of memory for
//! each byte that it is given at once, gets a little at a time.
//!
//! A cut is before a single space or newline between two letters. The patterns of byte-level tokenizers (GPT-2, Llama 3,
//! Qwen, gpt-oss, DeepSeek) begin a new word there whatever stands around it: no alternative of theirs matches a letter
//! and then a blank, and what they look ahead for is only whether a run of blanks goes on. It knows text, no tokens.

use std::ops::RangeInclusive;

/// Pieces have at least so many bytes, where there is a place to cut.
pub(super) const PIECE_BYTES: usize = 64 << 10;

/// Letters that are letters in every version of Unicode, and that no normal form joins with what follows.
const LETTERS: [RangeInclusive<char>; 5] = [
    'a'..='z',
    'A'..='Z',
    // Chinese characters, the kana but for their marks, Korean syllables.
    '\u{4E00}'..='\u{9FA5}',
    '\u{3041}'..='\u{3096}',
    '\u{AC00}'..='\u{D7A3}',
];

/// The pieces of a text, which add up to it, each but the last of at least `n_bytes`.
pub(super) fn pieces(text: &str, n_bytes: usize) -> impl Iterator<Item = &str> {
    let mut rest = text;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let (piece, after) = rest.split_at(find_cut(rest, n_bytes));
        rest = after;
        Some(piece)
    })
}

/// The first cut at `from` or behind it; the text's end where there is none.
fn find_cut(text: &str, from: usize) -> usize {
    let from = text.ceil_char_boundary(from.max(1).min(text.len()));
    let mut before = text[..from].chars().next_back();
    let mut chars = text[from..].char_indices().peekable();
    while let Some((i, c)) = chars.next() {
        let after = chars.peek().map(|(_, after)| *after);
        if matches!(c, ' ' | '\n') && before.is_some_and(is_letter) && after.is_some_and(is_letter)
        {
            return from + i;
        }
        before = Some(c);
    }
    text.len()
}

fn is_letter(c: char) -> bool {
    LETTERS.iter().any(|letters| letters.contains(&c))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_cut_is_before_a_single_blank_between_letters() {
        for (why, text, want) in [
            ("a space", "ab cd", vec!["ab", " cd"]),
            ("a newline", "ab\ncd", vec!["ab", "\ncd"]),
            ("two spaces", "ab  cd", vec!["ab  cd"]),
            ("a digit", "a1 cd", vec!["a1 cd"]),
            ("a mark", "ab, cd e", vec!["ab, cd", " e"]),
            ("at the end", "ab ", vec!["ab "]),
            ("Chinese", "块\n表 a", vec!["块", "\n表", " a"]),
            ("nothing", "", vec![]),
        ] {
            assert_eq!(pieces(text, 1).collect::<Vec<_>>(), want, "{why}");
        }
        assert_eq!(pieces("a b c d", 4).collect::<Vec<_>>(), ["a b c", " d"]);
    }

    proptest! {
        #[test]
        fn pieces_add_up(text in "[ab \n1,é块]{0,40}", n_bytes in 0..10usize) {
            let all: Vec<&str> = pieces(&text, n_bytes).collect();
            prop_assert_eq!(all.concat(), text.as_str());
            if let Some((_, before)) = all.split_last() {
                prop_assert!(before.iter().all(|piece| piece.len() >= n_bytes.max(1)));
            }
        }
    }
}
