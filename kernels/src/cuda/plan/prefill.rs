//! How prefill chunks are cut: their rows into tiles, and the keys of a chunk of few rows into parts too, as those of a
//! decoded token are, so that no multiprocessor waits.
//!
//! A chunk is cut by its own rows and positions, not by what else is in the step, unless the workspace is full.

use crate::shape::Limits;
use crate::step::{MAX_DECODE_TOKENS, Span};

use super::super::kernel::{HeadDim, PrefillTile, SplitKvSequence};
use super::PrefillShape;

/// How prefill chunks are cut for a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Tiling {
    /// Query heads a KV head.
    pub(super) group: u32,
    pub(super) n_kv_heads: u32,
    pub(super) head_dim: HeadDim,
    /// Its kernel leaves out what is before a window, and caps scores: it takes all keys at once.
    pub(super) is_local: bool,
}

/// The tiles of a step's prefill chunks, for layers of one tiling.
#[derive(Debug, Default)]
pub(super) struct PrefillList {
    pub(super) tiles: Vec<PrefillTile>,
    /// The tokens whose keys are cut into parts.
    pub(super) sequences: Vec<SplitKvSequence>,
    /// Most parts of one of them.
    pub(super) most: usize,
    n_partials: usize,
}

/// Parts that keys are cut into, at most.
pub(super) const MOST_PARTS: u32 = 16;

/// What a part costs beside its keys, its start, its end and the merging, in keys.
const PART_COST: u32 = 192;

impl Tiling {
    /// Tiles of `n_tokens` tokens.
    fn tiles(self, n_tokens: u32) -> u32 {
        (n_tokens * self.group).div_ceil(self.head_dim.prefill_rows())
    }

    /// The most tiles that a step has, where `room` partial results have room together: a part of a span of n tokens takes
    /// n places of it.
    pub(super) fn most_tiles(self, limits: &Limits, room: usize) -> usize {
        let of = |n: usize| n * self.group as usize / self.head_dim.prefill_rows() as usize;
        let parts = of(room) + room / MAX_DECODE_TOKENS as usize;
        of(limits.max_tokens) + limits.max_sequences + parts
    }

    /// Into how many parts the keys of a chunk are cut, and the keys of each but the last, which has the rest and the chunk
    /// itself: so that the blocks of all parts keep the multiprocessors busy for the shortest time. At most `most` parts.
    fn parts(self, span: &Span, n_multiprocessors: u32, most: u32) -> (u32, u32) {
        let n_keys = span.first_position + span.n_tokens;
        let n_blocks = self.tiles(span.n_tokens) * self.n_kv_heads;
        let tile = self.head_dim.prefill_keys();
        let length = |n_parts: u32| n_keys / n_parts / tile * tile;
        let cost = |&n_parts: &u32| {
            let longest = n_keys - (n_parts - 1) * length(n_parts);
            let overhead = if n_parts > 1 { PART_COST } else { 0 };
            let blocks = (n_blocks * n_parts).div_ceil(n_multiprocessors);
            // Two blocks share a multiprocessor; one alone takes three quarters of the time of two.
            let quarters = 2 * blocks + blocks % 2;
            u64::from(quarters) * u64::from(longest + overhead)
        };
        // Every token of the chunk sees all of the first parts.
        let is_possible = |&n_parts: &u32| {
            let first = (n_parts - 1) * length(n_parts);
            n_parts == 1 || (length(n_parts) > 0 && first <= span.first_position)
        };
        let most = if self.is_local {
            1
        } else {
            most.min(MOST_PARTS)
        };
        let n_parts = (1..=most).filter(is_possible).min_by_key(cost).unwrap_or(1);
        (n_parts, length(n_parts))
    }
}

impl PrefillList {
    pub(super) fn clear(&mut self) {
        self.tiles.clear();
        self.sequences.clear();
        self.most = 1;
        self.n_partials = 0;
    }

    /// Cuts a chunk; `room` partial results have room together.
    pub(super) fn push(
        &mut self,
        span: &Span,
        tiling: Tiling,
        n_multiprocessors: u32,
        room: usize,
    ) {
        let n_tokens = span.n_tokens as usize;
        let most = (room.saturating_sub(self.n_partials) / n_tokens) as u32;
        let (n_parts, length) = tiling.parts(span, n_multiprocessors, most);
        let first_partial = self.n_partials as u32;
        // The last tiles see the most keys: they start first, so that the short ones fill the end.
        let rows = tiling.head_dim.prefill_rows();
        for first_row in (0..tiling.tiles(span.n_tokens))
            .rev()
            .map(|tile| tile * rows)
        {
            self.tiles.extend((0..n_parts).map(|index| PrefillTile {
                row: span.row.0,
                first_token: span.first_token,
                n_tokens: span.n_tokens,
                first_position: span.first_position,
                first_row,
                first_key: index * length,
                end_key: match index + 1 {
                    next if next < n_parts => next * length,
                    _ => span.first_position + span.n_tokens,
                },
                n_parts,
                first_partial: first_partial + index,
            }));
        }
        if n_parts > 1 {
            self.most = self.most.max(n_parts as usize);
            self.n_partials += n_tokens * n_parts as usize;
            self.sequences
                .extend((0..span.n_tokens).map(|i| SplitKvSequence {
                    token: span.first_token + i,
                    first_tile: first_partial + i * n_parts,
                    n_tiles: n_parts,
                    unused: 0,
                }));
        }
    }

    /// How much there is.
    pub(super) fn shape(&self) -> PrefillShape {
        PrefillShape {
            tiles: self.tiles.len(),
            sequences: self.sequences.len(),
            most: self.most,
        }
    }
}
