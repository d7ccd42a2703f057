//! Pure: what of a step goes up to the device, and where it lies there.
//!
//! A step has a [`StepShape`], padded so that few different ones occur: a shape fixes where every array lies, so a graph
//! captured for it holds good for every step of that shape. Padding rows are inert. Each attention layer uses one list of
//! split-KV tiles, that of its window, and one of prefill tiles. It knows no addresses and no driver.
//!
//! - [`prefill`]: how prefill chunks are cut.

mod prefill;

use std::num::NonZeroU32;
use std::ops::Range;

use crate::sampling::ln_min_p;
use crate::shape::{Limits, ModelShape};
use crate::step::{LogitsRequest, LogitsRow, MAX_DECODE_TOKENS, Step};

use super::kernel::{
    COMBINE_TOGETHER, HeadDim, INERT, NO_SCORE, NO_WINDOW, NOT_EDITED, PARTITION, PrefillTile,
    SampleRow, SplitKvSequence, SplitKvTile,
};
use prefill::{PrefillList, Tiling};

/// Partial results that have room at once, unless one sequence alone has more: 2M tokens of context.
const WORKSPACE_TILES: usize = 8192;

/// How many of each there are, padding included.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct StepShape {
    /// Input tokens.
    pub(super) tokens: usize,
    /// Rows of logits.
    pub(super) logits: usize,
    /// Tokens that are decoded.
    pub(super) decodes: usize,
    /// By window.
    pub(super) splits: Vec<SplitShape>,
    /// By tiling; exact, for steps with prefill chunks are not captured.
    pub(super) prefills: Vec<PrefillShape>,
}

/// How many there are of a window's split-KV tiles.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct SplitShape {
    /// All of them.
    pub(super) tiles: usize,
    /// Those of one token, at most: 1, [`COMBINE_TOGETHER`], or as many as the longest sequence has. With 1 there is
    /// nothing to combine.
    pub(super) most: usize,
}

/// How much there is of prefill chunks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct PrefillShape {
    /// Tiles, of all parts of the keys.
    pub(super) tiles: usize,
    /// Tokens whose keys are cut into parts.
    pub(super) sequences: usize,
    /// Parts of one of them, at most.
    pub(super) most: usize,
}

impl StepShape {
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
            splits: self
                .splits
                .iter()
                .map(|split| AttentionLayout {
                    tiles: take(split.tiles, size_of::<SplitKvTile>()),
                    sequences: take(self.decodes, size_of::<SplitKvSequence>()),
                })
                .collect(),
            prefills: self
                .prefills
                .iter()
                .map(|prefill| AttentionLayout {
                    tiles: take(prefill.tiles, size_of::<PrefillTile>()),
                    sequences: take(prefill.sequences, size_of::<SplitKvSequence>()),
                })
                .collect(),
            end,
        }
    }
}

/// Bytes from the start of the step's input to each array, multiples of 16.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Layout {
    pub(super) tokens: usize,
    pub(super) positions: usize,
    pub(super) rows: usize,
    pub(super) index: usize,
    /// By window.
    pub(super) splits: Vec<AttentionLayout>,
    /// By tiling.
    pub(super) prefills: Vec<AttentionLayout>,
    pub(super) end: usize,
}

/// The same of the arrays of a window's decodes, or of a tiling's prefill chunks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct AttentionLayout {
    pub(super) tiles: usize,
    pub(super) sequences: usize,
}

/// Which lists an attention layer uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct LayerLists {
    /// Index into [`StepShape::splits`].
    pub(super) split: usize,
    /// Index into [`StepShape::prefills`].
    pub(super) prefill: usize,
}

/// The lists that a model's layers need.
#[derive(Clone, Debug, Default)]
struct Lists {
    windows: Vec<u32>,
    tilings: Vec<Tiling>,
    layers: Vec<LayerLists>,
}

impl Lists {
    fn new(shape: &ModelShape) -> Self {
        let mut lists = Self::default();
        for layer in &shape.layers {
            let cache = shape.caches[layer.cache.0 as usize];
            let window = cache.window.map_or(NO_WINDOW, NonZeroU32::get);
            let head_dim = HeadDim::new(cache.head_dim).expect("check() allowed this head size");
            let tiling = Tiling {
                group: (layer.n_heads / cache.n_kv_heads) as u32,
                n_kv_heads: cache.n_kv_heads as u32,
                head_dim,
                is_local: cache.window.is_some() || layer.soft_cap.is_some(),
            };
            lists.layers.push(LayerLists {
                split: place(&mut lists.windows, window),
                prefill: place(&mut lists.tilings, tiling),
            });
        }
        lists
    }
}

/// Where `x` is in `among`, at its end where it was not there.
fn place<T: PartialEq>(among: &mut Vec<T>, x: T) -> usize {
    among.iter().position(|y| *y == x).unwrap_or_else(|| {
        among.push(x);
        among.len() - 1
    })
}

/// Split-KV tiles, and the tokens that they are of, whose partial results have room together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct WorkspaceChunk {
    pub(super) tiles: Range<usize>,
    pub(super) sequences: Range<usize>,
}

/// The decoded tokens as one window sees them.
#[derive(Debug, Default)]
struct SplitList {
    chunks: Vec<WorkspaceChunk>,
    tiles: Vec<SplitKvTile>,
    sequences: Vec<SplitKvSequence>,
    most: usize,
}

impl SplitList {
    fn clear(&mut self) {
        self.chunks.clear();
        self.tiles.clear();
        self.sequences.clear();
        self.most = 1;
    }

    fn push(&mut self, row: u32, token: u32, position: u32, window: u32, room: usize) {
        let first = (position + 1).saturating_sub(window) / PARTITION;
        let partitions = first..position / PARTITION + 1;
        let fits = |chunk: &&mut WorkspaceChunk| chunk.tiles.len() + partitions.len() <= room;
        let (end_of_tiles, end_of_sequences) = (self.tiles.len(), self.sequences.len());
        let chunk = match self.chunks.last_mut().filter(fits) {
            Some(chunk) => chunk,
            None => self.chunks.push_mut(WorkspaceChunk {
                tiles: end_of_tiles..end_of_tiles,
                sequences: end_of_sequences..end_of_sequences,
            }),
        };
        self.sequences.push(SplitKvSequence {
            token,
            first_tile: chunk.tiles.len() as u32,
            n_tiles: partitions.len() as u32,
            unused: 0,
        });
        self.most = self.most.max(partitions.len());
        self.tiles.extend(partitions.map(|p| SplitKvTile {
            row,
            token,
            length: position + 1,
            start: p * PARTITION,
        }));
        chunk.tiles.end = self.tiles.len();
        chunk.sequences.end = self.sequences.len();
    }
}

/// `n` or a little more: a power of two to 8, then steps of an eighth of an octave, from 8 to at most `largest_step`.
fn bucket(n: usize, largest_step: usize) -> usize {
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

/// Padding of split-KV tiles costs a block that returns at once; each other number costs a graph.
pub(super) fn bucket_tiles(n: usize) -> usize {
    match n {
        0 => 0,
        1..=64 => n.next_power_of_two(),
        _ => bucket(n, usize::MAX),
    }
}

/// Partitions that `n` consecutive positions are in, at most.
fn partitions_of(n: usize) -> usize {
    n.div_ceil(PARTITION as usize) + 1
}

/// Planning for one model; its vectors keep their capacity.
#[derive(Debug)]
pub(super) struct Plan {
    lists: Lists,
    /// Partitions of the longest sequence.
    max_partitions: usize,
    /// Split-KV tiles whose partial results have room at once, at least as many as a sequence has.
    room: usize,
    shape: StepShape,
    layout: Layout,
    splits: Vec<SplitList>,
    prefills: Vec<PrefillList>,
    n_multiprocessors: u32,
}

impl Plan {
    /// No step yet, for a device of so many multiprocessors.
    pub(super) fn new(shape: &ModelShape, n_multiprocessors: u32) -> Self {
        let longest = shape.limits.max_blocks_per_sequence * shape.block_size;
        let max_partitions = longest.div_ceil(PARTITION as usize).max(1);
        let lists = Lists::new(shape);
        let all = max_decodes(&shape.limits) * max_partitions;
        Self {
            max_partitions,
            room: all.min(WORKSPACE_TILES.max(max_partitions)),
            shape: StepShape::default(),
            layout: Layout::default(),
            splits: lists.windows.iter().map(|_| SplitList::default()).collect(),
            prefills: lists
                .tilings
                .iter()
                .map(|_| PrefillList::default())
                .collect(),
            n_multiprocessors,
            lists,
        }
    }

    /// The largest step that there can be.
    pub(super) fn largest(&self, limits: &Limits) -> StepShape {
        let decodes = max_decodes(limits);
        let split = |&window: &u32| {
            let seen = match window {
                NO_WINDOW => self.max_partitions,
                _ => self.max_partitions.min(partitions_of(window as usize)),
            };
            SplitShape {
                tiles: bucket_tiles(decodes * seen),
                most: self.max_partitions,
            }
        };
        let prefill = |tiling: &Tiling| PrefillShape {
            tiles: tiling.most_tiles(limits, self.room),
            sequences: limits.max_tokens,
            most: prefill::MOST_PARTS as usize,
        };
        StepShape {
            tokens: bucket_rows(limits.max_tokens),
            logits: bucket_rows(limits.max_logits_rows),
            decodes: bucket_rows(decodes),
            splits: self.lists.windows.iter().map(split).collect(),
            prefills: self.lists.tilings.iter().map(prefill).collect(),
        }
    }

    /// Split-KV tiles that the workspace for partial results must hold.
    pub(super) fn workspace_tiles(&self) -> usize {
        bucket_tiles(self.room)
    }

    /// Plans a step.
    pub(super) fn make(&mut self, step: &Step) {
        self.splits.iter_mut().for_each(SplitList::clear);
        self.prefills.iter_mut().for_each(PrefillList::clear);
        let mut n_decodes = 0;
        for span in &step.spans {
            if span.n_tokens > MAX_DECODE_TOKENS {
                for (list, &tiling) in self.prefills.iter_mut().zip(&self.lists.tilings) {
                    list.push(span, tiling, self.n_multiprocessors, self.room);
                }
                continue;
            }
            n_decodes += span.n_tokens as usize;
            for (list, &window) in self.splits.iter_mut().zip(&self.lists.windows) {
                for i in 0..span.n_tokens {
                    let (token, position) = (span.first_token + i, span.first_position + i);
                    list.push(span.row.0, token, position, window, self.room);
                }
            }
        }
        self.shape = StepShape {
            tokens: bucket_rows(step.tokens.len()),
            logits: bucket_rows(step.logits.len()),
            decodes: bucket_rows(n_decodes),
            splits: Vec::new(),
            prefills: self.prefills.iter().map(PrefillList::shape).collect(),
        };
        for list in &mut self.splits {
            let split = SplitShape {
                // What goes in several chunks is not captured: it needs no padding.
                tiles: match list.chunks.len() {
                    0 | 1 => bucket_tiles(list.tiles.len()),
                    _ => list.tiles.len(),
                },
                most: match list.most {
                    1 => 1,
                    n if n <= COMBINE_TOGETHER as usize => COMBINE_TOGETHER as usize,
                    _ => self.max_partitions,
                },
            };
            if let Some(last) = list.chunks.last_mut() {
                last.tiles.end = split.tiles;
                last.sequences.end = self.shape.decodes;
            }
            self.shape.splits.push(split);
        }
        self.layout = self.shape.layout();
    }

    /// How large the step is.
    pub(super) fn shape(&self) -> &StepShape {
        &self.shape
    }

    /// Where its arrays lie.
    pub(super) fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Whether the step's pass may be a graph: it only decodes, and all at once.
    pub(super) fn can_be_captured(&self) -> bool {
        self.shape.decodes > 0
            && self.shape.prefills.iter().all(|prefill| prefill.tiles == 0)
            && self.splits.iter().all(|list| list.chunks.len() == 1)
    }

    /// The lists of a layer.
    pub(super) fn lists_of(&self, layer: usize) -> LayerLists {
        self.lists.layers[layer]
    }

    /// A window's chunks, one after another in the same workspace.
    pub(super) fn chunks(&self, split: usize) -> &[WorkspaceChunk] {
        &self.splits[split].chunks
    }

    /// Writes the step's arrays where [`Plan::layout`] says; padding is inert.
    pub(super) fn write(&self, step: &Step, to: &mut [u8]) {
        let (shape, layout) = (&self.shape, &self.layout);
        let words = step.tokens.iter().copied();
        put(to, layout.tokens, shape.tokens, words, 0);
        let words = step.positions.iter().copied();
        put(to, layout.positions, shape.tokens, words, INERT);
        let words = step.rows.iter().map(|row| row.0);
        put(to, layout.rows, shape.tokens, words, 0);
        let words = step.logits.iter().copied();
        put(to, layout.index, shape.logits, words, 0);
        let no_tile: SplitKvTile = bytemuck::Zeroable::zeroed();
        let no_sequence: SplitKvSequence = bytemuck::Zeroable::zeroed();
        for ((list, split), at) in self.splits.iter().zip(&shape.splits).zip(&layout.splits) {
            let tiles = list.tiles.iter().copied();
            put(to, at.tiles, split.tiles, tiles, no_tile);
            let sequences = list.sequences.iter().copied();
            put(to, at.sequences, shape.decodes, sequences, no_sequence);
        }
        for (list, at) in self.prefills.iter().zip(&layout.prefills) {
            let tiles = list.tiles.iter().copied();
            put(
                to,
                at.tiles,
                list.tiles.len(),
                tiles,
                bytemuck::Zeroable::zeroed(),
            );
            let sequences = list.sequences.iter().copied();
            put(
                to,
                at.sequences,
                list.sequences.len(),
                sequences,
                no_sequence,
            );
        }
    }
}

/// Tokens that a step decodes at most.
fn max_decodes(limits: &Limits) -> usize {
    let of_all = limits.max_sequences * MAX_DECODE_TOKENS as usize;
    of_all.min(limits.max_tokens)
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

/// What is wanted of a row of logits, as `sample` reads it. `edited` is the row's edited one, or [`NOT_EDITED`].
pub fn sample_row(row: &LogitsRow, edited: u32) -> SampleRow {
    let greedy = SampleRow {
        temperature: 0.0,
        top_p: 1.0,
        ln_min_p: f32::NEG_INFINITY,
        top_k: 0,
        seed: 0,
        output_index: 0,
        score: NO_SCORE,
        n_logprobs: row.n_logprobs.map_or(-1, i32::from),
        edited: NOT_EDITED,
        fallback: 0,
        unused: 0,
    };
    match &row.request {
        LogitsRequest::Score { token } => SampleRow {
            score: *token,
            ..greedy
        },
        LogitsRequest::Sample {
            params,
            output_index,
            edit,
        } => SampleRow {
            temperature: params.temperature,
            top_p: params.top_p,
            ln_min_p: ln_min_p(params.min_p),
            top_k: params.top_k.map_or(0, NonZeroU32::get),
            seed: params.seed,
            output_index: *output_index,
            edited,
            fallback: edit.first_allowed().unwrap_or(0),
            ..greedy
        },
    }
}

#[cfg(test)]
mod tests;
