//! Pure: what of a step goes up to the device, and where it lies there.
//!
//! A step has a [`Shape`], padded so that few different ones occur: a shape fixes where every array lies, so a graph
//! captured for it holds good for every step of that shape. Padding rows are inert. It knows no addresses and no driver.

use crate::device::{LogitsRow, LogitsWant};
use crate::step::Step;
use std::num::NonZeroU32;
use std::ops::Range;

use super::kernel::{
    DRAW, DecodeItem, DecodeSequence, HeadDim, INERT, PARTITION, PrefillTile, SampleRow,
};

/// How many of each there are, padding included.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Shape {
    /// Input tokens.
    pub(super) tokens: usize,
    /// Rows of logits.
    pub(super) logits: usize,
    /// Partitions of sequences that decode.
    pub(super) items: usize,
    /// Sequences that decode.
    pub(super) sequences: usize,
    /// Tiles of prefill chunks; exact, for steps with some are not captured.
    pub(super) tiles: usize,
    /// Partitions of the longest sequence that decodes, up to a power of two; with 1 there is nothing to merge.
    pub(super) partitions: usize,
}

impl Shape {
    /// Only decodes: such a step is captured and replayed.
    pub(super) fn only_decodes(&self) -> bool {
        self.tiles == 0 && self.items > 0
    }

    /// Where the arrays lie.
    pub(super) fn layout(&self) -> Layout {
        let mut end = 0;
        let mut take = |n: usize, bytes: usize| {
            let start = end;
            end += (n * bytes).next_multiple_of(16);
            start
        };
        Layout {
            tokens: take(self.tokens, 4),
            positions: take(self.tokens, 4),
            rows: take(self.tokens, 4),
            index: take(self.logits, 4),
            samples: take(self.logits, size_of::<SampleRow>()),
            items: take(self.items, size_of::<DecodeItem>()),
            sequences: take(self.sequences, size_of::<DecodeSequence>()),
            tiles: take(self.tiles, size_of::<PrefillTile>()),
            end,
        }
    }
}

/// Bytes from the start of the step's input to each array, multiples of 16.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Layout {
    pub(super) tokens: usize,
    pub(super) positions: usize,
    pub(super) rows: usize,
    pub(super) index: usize,
    pub(super) samples: usize,
    pub(super) items: usize,
    pub(super) sequences: usize,
    pub(super) tiles: usize,
    pub(super) end: usize,
}

/// Items and sequences whose partial results have room together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Wave {
    pub(super) items: Range<usize>,
    pub(super) sequences: Range<usize>,
}

/// `n` or a little more: a power of two to 8, then steps of an eighth of an octave, from 8 to at most `largest_step`.
pub(super) fn bucket(n: usize, largest_step: usize) -> usize {
    match n {
        0 => 0,
        1..=8 => n.next_power_of_two(),
        _ => n.next_multiple_of((n.next_power_of_two() / 16).clamp(8, largest_step)),
    }
}

/// Padding of rows costs a product time: it is kept below 64.
pub(super) fn bucket_rows(n: usize) -> usize {
    bucket(n, 64)
}

/// Padding of items costs a block that returns at once.
pub(super) fn bucket_items(n: usize) -> usize {
    bucket(n, usize::MAX)
}

/// The plan of a step; its vectors keep their capacity.
#[derive(Debug, Default)]
pub(super) struct Plan {
    pub(super) shape: Shape,
    pub(super) waves: Vec<Wave>,
    items: Vec<DecodeItem>,
    sequences: Vec<DecodeSequence>,
    tiles: Vec<PrefillTile>,
}

impl Plan {
    /// Plans `step` for `group` query heads a KV head and `room` items at once, at least as many as a sequence has.
    pub(super) fn make(&mut self, step: &Step, head_dim: HeadDim, group: u32, room: usize) {
        self.items.clear();
        self.sequences.clear();
        self.tiles.clear();
        self.waves.clear();
        let mut wave = Wave {
            items: 0..0,
            sequences: 0..0,
        };
        let mut longest = 1;
        for span in &step.spans {
            if span.n_tokens > 1 {
                // The last tiles see the most keys: they start first, so that the short ones fill the end.
                let starts = (0..span.n_tokens * group).step_by(head_dim.prefill_rows() as usize);
                self.tiles.extend(starts.rev().map(|first_row| PrefillTile {
                    row: span.row.0,
                    first_token: span.first_token,
                    n_tokens: span.n_tokens,
                    first_position: span.first_position,
                    first_row,
                    unused: 0,
                }));
                continue;
            }
            let length = span.first_position + 1;
            let n_items = length.div_ceil(PARTITION);
            longest = longest.max(n_items);
            if wave.items.len() + n_items as usize > room {
                let (items, sequences) = (wave.items.end, wave.sequences.end);
                self.waves.push(std::mem::replace(
                    &mut wave,
                    Wave {
                        items: items..items,
                        sequences: sequences..sequences,
                    },
                ));
            }
            self.sequences.push(DecodeSequence {
                token: span.first_token,
                first_item: wave.items.len() as u32,
                n_items,
                unused: 0,
            });
            self.items.extend((0..n_items).map(|i| DecodeItem {
                row: span.row.0,
                token: span.first_token,
                length,
                start: i * PARTITION,
            }));
            wave.items.end = self.items.len();
            wave.sequences.end = self.sequences.len();
        }
        self.shape = Shape {
            tokens: bucket_rows(step.tokens.len()),
            logits: bucket_rows(step.logits.len()),
            items: bucket_items(self.items.len()),
            sequences: bucket_rows(self.sequences.len()),
            tiles: self.tiles.len(),
            partitions: (longest as usize).next_power_of_two(),
        };
        wave.items.end = self.shape.items;
        wave.sequences.end = self.shape.sequences;
        if !wave.items.is_empty() {
            self.waves.push(wave);
        }
    }

    /// Writes the step's arrays where [`Shape::layout`] says; padding is inert.
    pub(super) fn write(&self, step: &Step, to: &mut [u8]) {
        let (shape, layout) = (&self.shape, self.shape.layout());
        put(
            to,
            layout.tokens,
            shape.tokens,
            step.tokens.iter().copied(),
            0,
        );
        put(
            to,
            layout.positions,
            shape.tokens,
            step.positions.iter().copied(),
            INERT,
        );
        put(
            to,
            layout.rows,
            shape.tokens,
            step.rows.iter().map(|row| row.0),
            0,
        );
        put(
            to,
            layout.index,
            shape.logits,
            step.logits.iter().map(|row| row.token),
            0,
        );
        put(
            to,
            layout.samples,
            shape.logits,
            step.logits.iter().map(sample_row),
            GREEDY,
        );
        let no_item = DecodeItem {
            row: 0,
            token: 0,
            length: 0,
            start: 0,
        };
        put(
            to,
            layout.items,
            shape.items,
            self.items.iter().copied(),
            no_item,
        );
        let no_sequence = DecodeSequence {
            token: 0,
            first_item: 0,
            n_items: 0,
            unused: 0,
        };
        put(
            to,
            layout.sequences,
            shape.sequences,
            self.sequences.iter().copied(),
            no_sequence,
        );
        let tiles: &[u8] = bytemuck::cast_slice(&self.tiles);
        to[layout.tiles..][..tiles.len()].copy_from_slice(tiles);
    }
}

/// `n` elements from byte `at` on: those that there are, then `padding`.
fn put<T: bytemuck::Pod>(
    to: &mut [u8],
    at: usize,
    n: usize,
    elements: impl Iterator<Item = T>,
    padding: T,
) {
    let places = to[at..][..n * size_of::<T>()].chunks_exact_mut(size_of::<T>());
    for (place, element) in places.zip(elements.chain(std::iter::repeat(padding))) {
        place.copy_from_slice(bytemuck::bytes_of(&element));
    }
}

const GREEDY: SampleRow = SampleRow {
    temperature: 0.0,
    top_p: 1.0,
    top_k: 0,
    output_index: 0,
    seed: [0; 2],
    score: DRAW,
    n_logprobs: -1,
};

/// A row of logits as `sample` reads it.
pub fn sample_row(row: &LogitsRow) -> SampleRow {
    let plain = SampleRow {
        n_logprobs: row.n_logprobs.map_or(-1, i32::from),
        ..GREEDY
    };
    match row.want {
        LogitsWant::Score { token } => SampleRow {
            score: token,
            ..plain
        },
        LogitsWant::Sample(sampling) => SampleRow {
            temperature: sampling.temperature,
            top_p: sampling.top_p,
            top_k: sampling.top_k.map_or(0, NonZeroU32::get),
            output_index: sampling.output_index,
            seed: [sampling.seed as u32, (sampling.seed >> 32) as u32],
            ..plain
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::{
        AttentionShape, DeviceConfig, Limits, Precision, Rope, Span, StepInput, TableRow,
        TokenInput,
    };

    #[test]
    fn buckets_are_few_and_close() {
        for (n, rows, items) in [
            (0, 0, 0),
            (1, 1, 1),
            (3, 4, 4),
            (8, 8, 8),
            (9, 16, 16),
            (64, 64, 64),
            (65, 72, 72),
            (129, 144, 144),
            (257, 288, 288),
            (1000, 1024, 1024),
            (5000, 5056, 5120),
        ] {
            assert_eq!((bucket_rows(n), bucket_items(n)), (rows, items), "{n}");
        }
        for n in 1..20_000 {
            let padded = bucket_rows(n);
            assert!(padded >= n && padded - n < 64 && bucket_rows(padded) == padded);
            assert!(bucket_items(n) - n <= (n / 8).max(8), "{n}");
        }
    }

    fn size() -> HeadDim {
        HeadDim::new(64).unwrap()
    }

    fn step(spans: &[(u32, u32)]) -> Step {
        let mut step = Step::new(&DeviceConfig {
            attention: AttentionShape {
                n_layers: 1,
                n_heads: 8,
                n_kv_heads: 2,
                head_dim: 64,
                block_size: 16,
            },
            limits: Limits {
                max_tokens: 1024,
                max_sequences: 16,
                max_logits_rows: 16,
                max_blocks_per_sequence: 256,
            },
            rope: Rope {
                inverse_frequencies: vec![1.0; 32],
                scale: 1.0,
                max_positions: 4096,
            },
            precision: Precision::BF16,
            memory_limit: None,
        });
        let mut input = StepInput::default();
        for (row, &(first_position, n_tokens)) in spans.iter().enumerate() {
            input.spans.push(Span {
                row: TableRow(row as u32),
                first_token: input.tokens.len() as u32,
                n_tokens,
                first_position,
            });
            input
                .tokens
                .extend((0..n_tokens).map(|_| TokenInput::Id(7)));
        }
        step.begin(&input);
        step
    }

    #[test]
    fn decodes_are_cut_into_partitions_and_chunks_into_tiles() {
        let mut plan = Plan::default();
        plan.make(
            &step(&[(0, 1), (255, 1), (256, 1), (10, 40)]),
            size(),
            4,
            100,
        );
        let items: Vec<_> = plan
            .items
            .iter()
            .map(|i| (i.row, i.length, i.start))
            .collect();
        assert_eq!(items, [(0, 1, 0), (1, 256, 0), (2, 257, 0), (2, 257, 256)]);
        let merged: Vec<_> = plan
            .sequences
            .iter()
            .map(|s| (s.first_item, s.n_items))
            .collect();
        assert_eq!(merged, [(0, 1), (1, 1), (2, 2)]);
        let tiles: Vec<_> = plan
            .tiles
            .iter()
            .map(|t| (t.first_token, t.first_row))
            .collect();
        assert_eq!(tiles, [(3, 128), (3, 0)], "160 rows, the later ones first");
        assert!(plan.shape.partitions == 2 && !plan.shape.only_decodes());
    }

    #[test]
    fn what_has_no_room_together_goes_in_waves() {
        let mut plan = Plan::default();
        plan.make(
            &step(&[(511, 1), (1023, 1), (0, 1), (700, 1)]),
            size(),
            4,
            5,
        );
        let waves: Vec<_> = plan
            .waves
            .iter()
            .map(|wave| (wave.items.clone(), wave.sequences.clone()))
            .collect();
        assert_eq!(waves, [(0..2, 0..1), (2..7, 1..3), (7..16, 3..4)]);
        let first: Vec<u32> = plan.sequences.iter().map(|s| s.first_item).collect();
        assert_eq!(first, [0, 0, 4, 0], "counted from the wave's first");
    }

    #[test]
    fn padding_is_inert() {
        let mut plan = Plan::default();
        let step = step(&[(5, 1), (6, 1), (7, 1)]);
        plan.make(&step, size(), 4, 100);
        let layout = plan.shape.layout();
        let mut bytes = vec![0xaa; layout.end];
        plan.write(&step, &mut bytes);
        let positions: &[u32] = bytemuck::cast_slice(&bytes[layout.positions..layout.rows]);
        assert_eq!(positions, [5, 6, 7, INERT]);
        let items: &[DecodeItem] = bytemuck::cast_slice(&bytes[layout.items..layout.sequences]);
        assert_eq!(items[3].length, 0);
    }
}
