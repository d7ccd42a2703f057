//! Pure: how the edits of a step's rows of logits lie in what goes up, in trips of a bounded size. It knows no addresses
//! and no driver.

use crate::step::{LogitsEdit, LogitsRequest, LogitsRow};

use super::kernel::{EditRow, NO_MASK, NOT_EDITED};

/// Biases and seen tokens, of all rows together, that go up at once (2 MiB), unless one row alone may have more.
const EDIT_PAIRS: usize = 1 << 18;

/// A row of logits that is edited, and how.
pub(super) type Edited<'a> = (u32, &'a LogitsEdit);

/// What one trip has room for: a mask for each row, and pairs. Edits that need more take several trips, and the host waits
/// for all but the last.
#[derive(Clone, Copy, Debug)]
pub(super) struct EditRoom {
    rows: usize,
    words: usize,
}

impl EditRoom {
    /// For steps of `max_rows` rows of `vocab_size` logits. Every row alone has room.
    pub(super) fn new(max_rows: usize, vocab_size: usize) -> Self {
        let mask = vocab_size.div_ceil(32);
        let pairs = EDIT_PAIRS.max(2 * vocab_size);
        Self {
            rows: max_rows,
            words: max_rows * mask + 2 * pairs,
        }
    }

    /// Bytes of a trip at most.
    pub(super) fn bytes(&self) -> usize {
        self.rows * size_of::<EditRow>() + self.words * 4
    }

    /// How many of `edits` go in the next trip: one at least, where there is one.
    pub(super) fn fits(&self, edits: &[Edited<'_>]) -> usize {
        let mut n_words = 0;
        let fits = |(_, edit): &&Edited<'_>| {
            n_words += words_of(edit);
            n_words <= self.words
        };
        edits.iter().take_while(fits).count()
    }
}

fn words_of(edit: &LogitsEdit) -> usize {
    let mask = edit.allowed.as_ref().map_or(0, |words| words.len());
    let seen = edit.penalties.as_ref().map_or(0, |p| p.seen.len());
    mask + 2 * (edit.biases.len() + seen)
}

/// The edit of a row that has one.
pub(super) fn edit_of(row: &LogitsRow) -> Option<&LogitsEdit> {
    match &row.request {
        LogitsRequest::Sample { edit, .. } if !edit.is_empty() => Some(edit),
        LogitsRequest::Sample { .. } | LogitsRequest::Score { .. } => None,
    }
}

/// The rows that have an edit. The place of one among them is its edited row.
pub(super) fn edits_of(requests: &[LogitsRow]) -> Vec<Edited<'_>> {
    let rows = requests.iter().zip(0..);
    rows.filter_map(|(row, l)| edit_of(row).map(|edit| (l, edit)))
        .collect()
}

/// The edited row of each row of logits, [`NOT_EDITED`] where it has none.
pub(super) fn edited_rows(requests: &[LogitsRow]) -> impl Iterator<Item = u32> {
    let mut n_edited = 0;
    requests.iter().map(move |row| {
        if edit_of(row).is_none() {
            return NOT_EDITED;
        }
        n_edited += 1;
        n_edited - 1
    })
}

/// Writes a trip: its rows, then their words. Gives the number of words.
pub fn write_edits(edits: &[(u32, &LogitsEdit)], to: &mut [u8]) -> usize {
    let size = size_of::<EditRow>();
    let (rows, words) = to.split_at_mut(edits.len() * size);
    let mut words = Words { to: words, n: 0 };
    for ((row, edit), to) in edits.iter().zip(rows.chunks_exact_mut(size)) {
        let penalties = edit.penalties.as_ref();
        let seen = penalties.map_or(&[][..], |penalties| &penalties.seen);
        let row = EditRow {
            row: *row,
            allowed: match &edit.allowed {
                Some(mask) => words.put(mask.iter().copied()),
                None => NO_MASK,
            },
            biases: words.put(edit.biases.iter().flat_map(|b| [b.token, b.bias.to_bits()])),
            n_biases: edit.biases.len() as u32,
            seen: words.put(seen.iter().flat_map(|s| [s.token, s.n_outputs])),
            n_seen: seen.len() as u32,
            repetition: penalties.map_or(1.0, |p| p.repetition),
            frequency: penalties.map_or(0.0, |p| p.frequency),
            presence: penalties.map_or(0.0, |p| p.presence),
        };
        to.copy_from_slice(bytemuck::bytes_of(&row));
    }
    words.n
}

struct Words<'a> {
    to: &'a mut [u8],
    n: usize,
}

impl Words<'_> {
    /// Appends words, and gives the place of the first.
    fn put(&mut self, words: impl Iterator<Item = u32>) -> u32 {
        let first = self.n;
        let places = self.to[first * 4..].chunks_exact_mut(4);
        for (place, word) in places.zip(words) {
            place.copy_from_slice(&word.to_ne_bytes());
            self.n += 1;
        }
        first as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::step::{Penalties, SeenToken, TokenBias};
    use std::sync::Arc;

    const VOCABULARY: usize = 70;

    fn edit(n_biases: u32, n_seen: u32) -> LogitsEdit {
        let bias = |token| TokenBias { token, bias: 0.5 };
        let seen = |token| SeenToken {
            token,
            n_outputs: 1,
        };
        LogitsEdit {
            allowed: Some(vec![u32::MAX; VOCABULARY.div_ceil(32)].into()),
            biases: (0..n_biases).map(bias).collect(),
            penalties: Some(Penalties {
                repetition: 1.5,
                frequency: 0.25,
                presence: -0.5,
                seen: Arc::new((0..n_seen).map(seen).collect()),
            }),
        }
    }

    #[test]
    fn trips_take_what_fits_and_always_one() {
        // Much more than a real row has: every row of a step has room for its mask, and some for their pairs.
        let room = EditRoom {
            rows: 4,
            words: 4 * 3 + 2 * 10,
        };
        let (small, large) = (edit(2, 1), edit(6, 4));
        for (why, edits, want) in [
            ("none", vec![], 0),
            ("a row that needs all pairs", vec![(0, &large)], 1),
            (
                "another does not fit beside it",
                vec![(0, &large), (2, &large)],
                1,
            ),
            ("small ones together", vec![(0, &small); 3], 3),
        ] {
            assert_eq!(room.fits(&edits), want, "{why}");
        }
        let all = edit(VOCABULARY as u32, VOCABULARY as u32);
        assert_eq!(EditRoom::new(1, VOCABULARY).fits(&[(0, &all)]), 1);
    }

    #[test]
    fn a_trip_holds_rows_and_words() {
        let (first, second) = (
            edit(1, 2),
            LogitsEdit {
                allowed: None,
                ..edit(2, 0)
            },
        );
        let mut bytes = vec![0xff; EditRoom::new(2, VOCABULARY).bytes()];
        let n_words = write_edits(&[(3, &first), (5, &second)], &mut bytes);
        assert_eq!(n_words, 3 + 2 + 4 + 4);
        let size = size_of::<EditRow>();
        let row = |i: usize| bytemuck::pod_read_unaligned::<EditRow>(&bytes[i * size..][..size]);
        let (a, b) = (row(0), row(1));
        assert_eq!((a.row, a.allowed, a.biases, a.n_biases), (3, 0, 3, 1));
        assert_eq!((a.seen, a.n_seen, a.repetition), (5, 2, 1.5));
        assert_eq!((b.row, b.allowed, b.biases, b.n_biases), (5, NO_MASK, 9, 2));
        assert_eq!((b.n_seen, b.frequency, b.presence), (0, 0.25, -0.5));
        let word = |i: usize| {
            let bytes = &bytes[2 * size + i * 4..][..4];
            bytemuck::pod_read_unaligned::<u32>(bytes)
        };
        assert_eq!([word(3), word(4)], [0, 0.5_f32.to_bits()]);
        assert_eq!([word(5), word(6), word(7), word(8)], [0, 1, 1, 1]);
    }
}
