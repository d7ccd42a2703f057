//! Paged attention: queries in tiles over keys and values in fixed partitions, read through the block table.
//!
//! Positions are cut into partitions of about 256, always at the same absolute positions. Within one, a tile of
//! queries (a few tokens times the query heads of a KV head) gets its scores, their maximum, exponentials and sum, and
//! a weighted sum of values; partitions are merged in rising order by log-sum-exp (Flash-Decoding; Milakov and
//! Gimelshein, arXiv 1805.02867). The arithmetic of a query depends on its position and nothing else: not on the
//! other rows of its tile, nor on the chunk, nor on whether partitions ran on one thread or several.

mod scratch;

pub(crate) use scratch::{AttentionPlan, Scratch, ThreadScratch};

use super::kv_cache::{CacheLayout, KvCache};
use super::pool::Pool;
use super::rows::RowsView;
use super::simd::SimdOps;
use super::tile::{LANES, Tile, TileFn, elements_per_pair};
use crate::sampling::exp;
use crate::shape::{AttentionShape, CacheShape, Precision};
use crate::step::Step;
use std::ops::Range;

/// An attention layer with everything that follows from its shape.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LayerPlan {
    pub(crate) shape: AttentionShape,
    pub(crate) cache: CacheShape,
    /// Index of the cache's group.
    pub(crate) group: usize,
    pub(crate) layout: CacheLayout,
    pub(crate) attention: AttentionPlan,
}

impl LayerPlan {
    /// Columns of the layer's queries, keys and values.
    pub(crate) fn qkv_cols(&self) -> usize {
        (self.shape.n_heads + 2 * self.cache.n_kv_heads) * self.cache.head_dim
    }
}

/// Consecutive tokens of one span whose queries pass the cache together.
#[derive(Clone, Copy, Debug)]
pub(crate) struct QueryTile {
    /// First token of the step.
    pub(crate) token: usize,
    pub(crate) n_tokens: usize,
}

/// Cuts the step's spans into tiles.
pub(crate) fn cut_tiles(step: &Step, tokens_per_tile: usize, tiles: &mut Vec<QueryTile>) {
    tiles.clear();
    for span in &step.spans {
        let end = (span.first_token + span.n_tokens) as usize;
        let firsts = (span.first_token as usize..end).step_by(tokens_per_tile);
        tiles.extend(firsts.map(|token| QueryTile {
            token,
            n_tokens: tokens_per_tile.min(end - token),
        }));
    }
}

/// Everything that the attention of one layer reads.
pub(crate) struct Attention<'a> {
    pub(crate) layer: &'a LayerPlan,
    pub(crate) cache: &'a KvCache,
    pub(crate) step: &'a Step,
    pub(crate) tiles: &'a [QueryTile],
    pub(crate) scratch: &'a Scratch,
    pub(crate) simd: &'static SimdOps,
    pub(crate) tile: TileFn,
    pub(crate) precision: Precision,
    pub(crate) queries: RowsView,
    pub(crate) out: RowsView,
}

impl Attention<'_> {
    /// Runs the layer.
    pub(crate) fn run(&self, pool: &Pool) {
        let n_items = self.tiles.len() * self.layer.attention.n_kv_heads;
        let is_decode = self.tiles.iter().all(|tile| tile.n_tokens == 1);
        if is_decode && n_items <= self.layer.attention.max_split_items {
            self.run_split(pool, n_items);
        } else {
            // The last tiles of a span have the most to read: start with them, so that no thread ends late.
            pool.run(n_items, &|task, thread| {
                let (tile, head) = self.item(n_items - 1 - task);
                // SAFETY: a thread runs one task at a time, and its scratch is nobody else's.
                let mut own = unsafe { self.scratch.thread(&self.layer.attention, thread) };
                own.clear_running();
                for partition in self.partitions(tile) {
                    self.attend(tile, head, partition, &mut own);
                    self.merge_own(tile, &mut own);
                }
                self.finish(tile, head, &own);
            });
        }
    }

    /// Each partition is a task of its own; then each tile merges its partitions.
    fn run_split(&self, pool: &Pool, n_items: usize) {
        let max_partitions = self
            .tiles
            .iter()
            .map(|&tile| self.partitions(tile).len())
            .max()
            .unwrap_or(0);
        pool.run(n_items * max_partitions, &|task, thread| {
            let (item, slot) = (task / max_partitions, task % max_partitions);
            let (tile, head) = self.item(item);
            if let Some(partition) = self.partitions(tile).nth(slot) {
                // SAFETY: a thread runs one task at a time, and its scratch is nobody else's; a slot of partial
                // results is one task's.
                let mut own = unsafe {
                    self.scratch
                        .thread_with_slot(&self.layer.attention, thread, item, slot)
                };
                self.attend(tile, head, partition, &mut own);
            }
        });
        pool.run(n_items, &|item, thread| {
            let (tile, head) = self.item(item);
            // SAFETY: as above; the slots were written in the loop before and belong to this item.
            unsafe { self.scratch.thread(&self.layer.attention, thread) }.clear_running();
            for slot in 0..self.partitions(tile).len() {
                // SAFETY: as above; the running result stays in the thread's part from one to the next.
                let mut own = unsafe {
                    self.scratch
                        .thread_with_slot(&self.layer.attention, thread, item, slot)
                };
                self.merge_own(tile, &mut own);
            }
            // SAFETY: as above.
            self.finish(tile, head, &unsafe {
                self.scratch.thread(&self.layer.attention, thread)
            });
        });
    }

    fn item(&self, item: usize) -> (QueryTile, usize) {
        (
            self.tiles[item / self.layer.attention.n_kv_heads],
            item % self.layer.attention.n_kv_heads,
        )
    }

    /// The positions that some token of a tile sees.
    fn visible(&self, tile: QueryTile) -> Range<usize> {
        let first = *self.step.visible(&self.layer.cache, tile.token).start();
        let last = self.step.positions[tile.token + tile.n_tokens - 1];
        first as usize..last as usize + 1
    }

    /// The partitions that hold them.
    fn partitions(&self, tile: QueryTile) -> Range<usize> {
        let (visible, positions) = (
            self.visible(tile),
            self.layer.attention.partition_positions(),
        );
        visible.start / positions..visible.end.div_ceil(positions)
    }

    /// Attention of a tile over one partition, into `own.part`. What is before the window is not read: its blocks may
    /// be another sequence's by now.
    fn attend(&self, tile: QueryTile, head: usize, partition: usize, own: &mut ThreadScratch<'_>) {
        let plan = &self.layer.attention;
        let n_rows = tile.n_tokens * plan.group;
        self.take_queries(tile, head, own);
        let (visible, positions) = (self.visible(tile), plan.partition_positions());
        let first = visible.start.max(partition * positions) / plan.block_size;
        let end = visible.end.min((partition + 1) * positions);
        let table = self
            .step
            .table(self.layer.group, self.step.rows[tile.token]);
        let blocks = &table[first..end.div_ceil(plan.block_size)];
        let first_position = first * plan.block_size;
        let n_columns = blocks.len() * self.layer.layout.key_slots;
        let c_row = plan.score_columns;
        for row in own.scores.chunks_mut(c_row).take(n_rows) {
            row[..n_columns].fill(0.0);
        }
        for (i, &block) in blocks.iter().enumerate() {
            // SAFETY: `queries` has `n_rows` rows of `key_pairs` pairs; a block's keys are `key_pairs` steps of
            // `key_slots` pairs; columns `i * key_slots..` of the scores lie below `score_columns`, as a partition has
            // no more blocks. The scratch is this thread's, and no key is written while attention runs.
            unsafe {
                (self.tile)(&Tile {
                    a: own.queries.as_ptr(),
                    a_row: plan.query_stride,
                    b: self.cache.keys(&self.layer.layout, block as usize, head),
                    b_step: self.layer.layout.key_slots,
                    b_vector: LANES,
                    c: own.scores.as_mut_ptr().add(i * self.layer.layout.key_slots),
                    c_row,
                    n_rows,
                    n_vectors: self.layer.layout.key_slots / LANES,
                    n_steps: self.layer.layout.key_pairs,
                });
            }
        }
        let per_pair = elements_per_pair(self.precision);
        for r in 0..n_rows {
            let scores = &mut own.scores[r * c_row..][..n_columns];
            let seen = self
                .step
                .visible(&self.layer.cache, tile.token + r / plan.group);
            let seen = (*seen.start() as usize).saturating_sub(first_position)
                ..(*seen.end() as usize + 1).saturating_sub(first_position);
            let scale = match self.layer.shape.soft_cap {
                Some(cap) => {
                    self.simd.soft_cap(scores, self.layer.shape.scale, cap);
                    1.0
                }
                None => self.layer.shape.scale,
            };
            mask(scores, seen, plan.block_size, self.layer.layout.key_slots);
            (own.part_max[r], own.part_sum[r]) = self.simd.exponentiate(scores, scale);
            let pairs =
                &mut own.probabilities[r * plan.probability_stride..][..n_columns / per_pair];
            self.simd.pack_pairs(self.precision, scores, pairs);
        }
        own.part[..n_rows * self.layer.layout.value_dims].fill(0.0);
        for (i, &block) in blocks.iter().enumerate() {
            let n_slots = (end - (first + i) * plan.block_size).min(plan.block_size);
            // SAFETY: a row of probabilities holds `score_columns` elements, `key_slots` for each block; a block's
            // values are `slot_pairs` steps of `value_dims` pairs, of which `n_slots` were written (and the other half
            // of the last pair cleared); `part` has `n_rows` rows of `value_dims`.
            unsafe {
                (self.tile)(&Tile {
                    a: own
                        .probabilities
                        .as_ptr()
                        .add(i * self.layer.layout.key_slots / per_pair),
                    a_row: plan.probability_stride,
                    b: self.cache.values(&self.layer.layout, block as usize, head),
                    b_step: self.layer.layout.value_dims,
                    b_vector: LANES,
                    c: own.part.as_mut_ptr(),
                    c_row: self.layer.layout.value_dims,
                    n_rows,
                    n_vectors: self.layer.layout.value_dims / LANES,
                    n_steps: n_slots.div_ceil(per_pair),
                });
            }
        }
    }

    /// The tile's queries, rounded: a row for each token and query head of the group.
    fn take_queries(&self, tile: QueryTile, head: usize, own: &mut ThreadScratch<'_>) {
        let AttentionPlan {
            group,
            head_dim,
            query_stride,
            ..
        } = self.layer.attention;
        for r in 0..tile.n_tokens * group {
            // SAFETY: nobody writes `qkv` while attention runs.
            let token = unsafe { self.queries.row(tile.token + r / group) };
            let query = &token[(head * group + r % group) * head_dim..][..head_dim];
            let pairs = &mut own.queries[r * query_stride..][..self.layer.layout.key_pairs];
            self.simd.pack_pairs(self.precision, query, pairs);
        }
    }

    /// Merges `own.part` into the running result.
    fn merge_own(&self, tile: QueryTile, own: &mut ThreadScratch<'_>) {
        let dims = self.layer.layout.value_dims;
        for r in 0..tile.n_tokens * self.layer.attention.group {
            // The first tokens of a tile may not see a partition that its last ones see.
            if own.part_max[r] == f32::NEG_INFINITY {
                continue;
            }
            let max = own.max[r].max(own.part_max[r]);
            let (alpha, beta) = (exp(own.max[r] - max), exp(own.part_max[r] - max));
            own.max[r] = max;
            own.sum[r] = own.sum[r] * alpha + own.part_sum[r] * beta;
            self.simd.blend(
                &mut own.running[r * dims..][..dims],
                alpha,
                &own.part[r * dims..][..dims],
                beta,
            );
        }
    }

    /// Divides by the sums and writes the tile's heads.
    fn finish(&self, tile: QueryTile, head: usize, own: &ThreadScratch<'_>) {
        let AttentionPlan {
            group, head_dim, ..
        } = self.layer.attention;
        for r in 0..tile.n_tokens * group {
            let first = (head * group + r % group) * head_dim;
            assert!(
                first + head_dim <= self.out.cols,
                "the output of attention has another width"
            );
            // SAFETY: these columns of this row are this task's alone, inside the row by the assertion.
            let out = unsafe {
                std::slice::from_raw_parts_mut(
                    self.out.row_ptr(tile.token + r / group).add(first),
                    head_dim,
                )
            };
            let running = &own.running[r * self.layer.layout.value_dims..];
            out.iter_mut()
                .zip(running)
                .for_each(|(out, sum)| *out = sum / own.sum[r]);
        }
    }
}

/// Hides the columns of positions that a row does not see, and the padding of each block. `seen` counts from the first
/// block's first position.
fn mask(scores: &mut [f32], seen: Range<usize>, block_size: usize, key_slots: usize) {
    for (i, block) in scores.chunks_mut(key_slots).enumerate() {
        let in_block = |position: usize| position.saturating_sub(i * block_size).min(block_size);
        block[..in_block(seen.start)].fill(f32::NEG_INFINITY);
        block[in_block(seen.end)..].fill(f32::NEG_INFINITY);
    }
}
