//! Paged attention: queries in tiles over keys and values in fixed partitions, read through the block table.
//!
//! Positions are cut into partitions of about 256, always at the same absolute positions. Within one, a tile of
//! queries (a few tokens times the query heads of a KV head) gets its scores, their maximum, exponentials and sum, and
//! a weighted sum of values; partitions are merged in rising order by log-sum-exp (Flash-Decoding; Milakov and
//! Gimelshein, arXiv 1805.02867). The arithmetic of a query depends on its position and nothing else: not on the
//! other rows of its tile, nor on the chunk, nor on whether partitions ran on one thread or several.

mod scratch;

pub(crate) use scratch::{AttentionPlan, Scratch, ThreadScratch};

use super::kv_cache::{KvCache, KvLayout};
use super::lanes::Lanes;
use super::pool::Pool;
use super::rows::RowsView;
use super::tile::{LANES, Tile, TileFn, elements_per_unit};
use crate::device::Precision;
use crate::sampling::exp;
use crate::step::Step;

/// Consecutive tokens of one span whose queries pass the cache together.
#[derive(Clone, Copy, Debug)]
pub(crate) struct QueryTile {
    /// First token of the step.
    pub(crate) token: usize,
    pub(crate) n_tokens: usize,
}

/// Cuts the step's spans into tiles.
pub(crate) fn cut_tiles(step: &Step, plan: &AttentionPlan, tiles: &mut Vec<QueryTile>) {
    tiles.clear();
    for span in &step.spans {
        let end = (span.first_token + span.n_tokens) as usize;
        let firsts = (span.first_token as usize..end).step_by(plan.tokens_per_tile);
        tiles.extend(firsts.map(|token| QueryTile {
            token,
            n_tokens: plan.tokens_per_tile.min(end - token),
        }));
    }
}

/// Everything that the attention of one layer reads.
pub(crate) struct Attention<'a> {
    pub(crate) plan: &'a AttentionPlan,
    pub(crate) layout: KvLayout,
    pub(crate) cache: &'a KvCache,
    pub(crate) step: &'a Step,
    pub(crate) tiles: &'a [QueryTile],
    pub(crate) scratch: &'a Scratch,
    pub(crate) lanes: &'static Lanes,
    pub(crate) tile: TileFn,
    pub(crate) precision: Precision,
    pub(crate) layer: usize,
    pub(crate) scale: f32,
    pub(crate) queries: RowsView,
    pub(crate) out: RowsView,
}

impl Attention<'_> {
    /// Runs the layer.
    pub(crate) fn run(&self, pool: &Pool) {
        let n_items = self.tiles.len() * self.plan.n_kv_heads;
        let is_decode = self.tiles.iter().all(|tile| tile.n_tokens == 1);
        if is_decode && n_items <= self.plan.max_split_items {
            self.run_split(pool, n_items);
        } else {
            // The last tiles of a span have the most to read: start with them, so that no thread ends late.
            pool.run(n_items, &|task, thread| {
                let (tile, head) = self.item(n_items - 1 - task);
                // SAFETY: a thread runs one task at a time, and its scratch is nobody else's.
                let mut own = unsafe { self.scratch.thread(self.plan, thread) };
                own.clear_running();
                for partition in 0..self.n_partitions(tile) {
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
            .map(|&tile| self.n_partitions(tile))
            .max()
            .unwrap_or(0);
        pool.run(n_items * max_partitions, &|task, thread| {
            let (item, partition) = (task / max_partitions, task % max_partitions);
            let (tile, head) = self.item(item);
            if partition < self.n_partitions(tile) {
                // SAFETY: a thread runs one task at a time, and its scratch is nobody else's; a slot of partial
                // results is one task's.
                let mut own = unsafe {
                    self.scratch
                        .thread_with_slot(self.plan, thread, item, partition)
                };
                self.attend(tile, head, partition, &mut own);
            }
        });
        pool.run(n_items, &|item, thread| {
            let (tile, head) = self.item(item);
            // SAFETY: as above; the slots were written in the loop before and belong to this item.
            unsafe { self.scratch.thread(self.plan, thread) }.clear_running();
            for partition in 0..self.n_partitions(tile) {
                // SAFETY: as above; the running result stays in the thread's part from one to the next.
                let mut own = unsafe {
                    self.scratch
                        .thread_with_slot(self.plan, thread, item, partition)
                };
                self.merge_own(tile, &mut own);
            }
            // SAFETY: as above.
            self.finish(tile, head, &unsafe {
                self.scratch.thread(self.plan, thread)
            });
        });
    }

    fn item(&self, item: usize) -> (QueryTile, usize) {
        (
            self.tiles[item / self.plan.n_kv_heads],
            item % self.plan.n_kv_heads,
        )
    }

    /// One more than the position of a tile's last token.
    fn end(&self, tile: QueryTile) -> usize {
        self.step.positions[tile.token + tile.n_tokens - 1] as usize + 1
    }

    fn n_partitions(&self, tile: QueryTile) -> usize {
        self.end(tile).div_ceil(self.plan.partition_positions())
    }

    /// Attention of a tile over one partition, into `own.part`.
    fn attend(&self, tile: QueryTile, head: usize, partition: usize, own: &mut ThreadScratch<'_>) {
        let plan = self.plan;
        let n_rows = tile.n_tokens * plan.group;
        self.take_queries(tile, head, own);
        let first = partition * plan.partition_positions();
        let n_positions = (self.end(tile) - first).min(plan.partition_positions());
        let table =
            &self.step.table(self.step.rows[tile.token])[partition * plan.blocks_per_partition..];
        let blocks = &table[..n_positions.div_ceil(plan.block_size)];
        let n_columns = blocks.len() * self.layout.key_slots;
        let c_row = plan.score_columns;
        for row in own.scores.chunks_mut(c_row).take(n_rows) {
            row[..n_columns].fill(0.0);
        }
        for (i, &block) in blocks.iter().enumerate() {
            // SAFETY: `queries` has `n_rows` rows of `key_units` units; a block's keys are `key_units` steps of
            // `key_slots` units; columns `i * key_slots..` of the scores lie below `score_columns`. The scratch is
            // this thread's, and no key is written while attention runs.
            unsafe {
                (self.tile)(&Tile {
                    a: own.queries.as_ptr(),
                    a_row: plan.query_stride,
                    b: self.cache.keys(self.layer, block as usize, head),
                    b_step: self.layout.key_slots,
                    b_vector: LANES,
                    c: own.scores.as_mut_ptr().add(i * self.layout.key_slots),
                    c_row,
                    n_rows,
                    n_vectors: self.layout.key_slots / LANES,
                    n_steps: self.layout.key_units,
                });
            }
        }
        let per_unit = elements_per_unit(self.precision);
        for r in 0..n_rows {
            let scores = &mut own.scores[r * c_row..][..n_columns];
            let n_seen = (self.step.positions[tile.token + r / plan.group] as usize + 1)
                .saturating_sub(first);
            mask(scores, n_seen, plan.block_size, self.layout.key_slots);
            (own.part_max[r], own.part_sum[r]) = self.lanes.exponentiate(scores, self.scale);
            let units =
                &mut own.probabilities[r * plan.probability_stride..][..n_columns / per_unit];
            self.lanes.to_units(self.precision, scores, units);
        }
        own.part[..n_rows * self.layout.value_dims].fill(0.0);
        for (i, &block) in blocks.iter().enumerate() {
            let n_slots = (n_positions - i * plan.block_size).min(plan.block_size);
            // SAFETY: a row of probabilities holds `score_columns` elements, `key_slots` for each block; a block's
            // values are `slot_units` steps of `value_dims` units, of which `n_slots` were written (and the other half
            // of the last unit cleared); `part` has `n_rows` rows of `value_dims`.
            unsafe {
                (self.tile)(&Tile {
                    a: own
                        .probabilities
                        .as_ptr()
                        .add(i * self.layout.key_slots / per_unit),
                    a_row: plan.probability_stride,
                    b: self.cache.values(self.layer, block as usize, head),
                    b_step: self.layout.value_dims,
                    b_vector: LANES,
                    c: own.part.as_mut_ptr(),
                    c_row: self.layout.value_dims,
                    n_rows,
                    n_vectors: self.layout.value_dims / LANES,
                    n_steps: n_slots.div_ceil(per_unit),
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
        } = *self.plan;
        for r in 0..tile.n_tokens * group {
            // SAFETY: nobody writes `qkv` while attention runs.
            let token = unsafe { self.queries.row(tile.token + r / group) };
            let query = &token[(head * group + r % group) * head_dim..][..head_dim];
            let units = &mut own.queries[r * query_stride..][..self.layout.key_units];
            self.lanes.to_units(self.precision, query, units);
        }
    }

    /// Merges `own.part` into the running result.
    fn merge_own(&self, tile: QueryTile, own: &mut ThreadScratch<'_>) {
        let dims = self.layout.value_dims;
        for r in 0..tile.n_tokens * self.plan.group {
            // The first tokens of a tile may not see a partition that its last ones see.
            if own.part_max[r] == f32::NEG_INFINITY {
                continue;
            }
            let max = own.max[r].max(own.part_max[r]);
            let (alpha, beta) = (exp(own.max[r] - max), exp(own.part_max[r] - max));
            own.max[r] = max;
            own.sum[r] = own.sum[r] * alpha + own.part_sum[r] * beta;
            self.lanes.blend(
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
        } = *self.plan;
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
            let running = &own.running[r * self.layout.value_dims..];
            out.iter_mut()
                .zip(running)
                .for_each(|(out, sum)| *out = sum / own.sum[r]);
        }
    }
}

/// Hides the columns of a partition beyond the first `n_seen` positions, and the padding of each block.
fn mask(scores: &mut [f32], n_seen: usize, block_size: usize, key_slots: usize) {
    for (i, block) in scores.chunks_mut(key_slots).enumerate() {
        let seen = n_seen.saturating_sub(i * block_size).min(block_size);
        block[seen..].fill(f32::NEG_INFINITY);
    }
}
