//! The sizes that attention works with, and the memory it works in: one part a thread, and slots for the partial
//! results of partitions that run apart.

use std::num::NonZeroU32;

use crate::cpu::kv_cache::CacheLayout;
use crate::cpu::mapping::Mapping;
use crate::cpu::tile::{LANES, elements_per_pair};
use crate::device::DeviceError;
use crate::shape::{AttentionShape, ModelShape, Precision};

/// Rows that a tile of queries aims at: two register tiles of the kernels.
const TILE_ROWS: usize = 24;
/// Positions that a partition aims at.
const PARTITION_POSITIONS: usize = 256;
/// Items (tile and KV head) a thread below which a decode is split over partitions too.
const SPLIT_ITEMS_PER_THREAD: usize = 4;

/// Sizes of one attention layer, fixed when its model is added.
#[derive(Clone, Copy, Debug)]
pub(crate) struct AttentionPlan {
    pub(crate) n_kv_heads: usize,
    /// Query heads of a KV head.
    pub(crate) group: usize,
    pub(crate) head_dim: usize,
    pub(crate) block_size: usize,
    pub(crate) blocks_per_partition: usize,
    pub(crate) tokens_per_tile: usize,
    /// Items up to which a decode is split over partitions.
    pub(crate) max_split_items: usize,
    /// Packed pairs from a row of queries to the next; off multiples of 4 KB by a cache line.
    pub(crate) query_stride: usize,
    /// Columns of scores: the slots of a partition's blocks, padding included.
    pub(crate) score_columns: usize,
    /// Packed pairs from a row of probabilities to the next.
    pub(crate) probability_stride: usize,
    value_dims: usize,
    max_rows: usize,
    /// Partitions that a token sees.
    max_partitions: usize,
    n_threads: usize,
}

impl AttentionPlan {
    pub(crate) fn new(
        model: &ModelShape,
        layer: &AttentionShape,
        layout: &CacheLayout,
        precision: Precision,
        n_threads: usize,
    ) -> Self {
        let cache = model.caches[layer.cache.0 as usize];
        let block_size = model.block_size;
        let group = layer.n_heads / cache.n_kv_heads;
        let tokens_per_tile = (TILE_ROWS / group).max(1);
        let blocks_per_partition = (PARTITION_POSITIONS / block_size).max(1);
        let score_columns = blocks_per_partition * layout.key_slots;
        let all = model
            .limits
            .max_blocks_per_sequence
            .div_ceil(blocks_per_partition);
        // A window that begins in the middle of a partition ends in one more than its length needs.
        let partition = blocks_per_partition * block_size;
        let in_window = |window: NonZeroU32| (window.get() as usize).div_ceil(partition) + 1;
        Self {
            n_kv_heads: cache.n_kv_heads,
            group,
            head_dim: cache.head_dim,
            block_size,
            blocks_per_partition,
            tokens_per_tile,
            max_split_items: SPLIT_ITEMS_PER_THREAD * n_threads,
            query_stride: layout.key_pairs.next_multiple_of(LANES) + LANES,
            score_columns,
            probability_stride: (score_columns / elements_per_pair(precision))
                .next_multiple_of(LANES)
                + LANES,
            value_dims: layout.value_dims,
            max_rows: tokens_per_tile * group,
            max_partitions: cache.window.map_or(all, in_window).min(all),
            n_threads,
        }
    }

    /// Positions of a partition.
    pub(crate) fn partition_positions(&self) -> usize {
        self.blocks_per_partition * self.block_size
    }

    /// Words of one thread: queries, probabilities, scores, running result with maxima and sums, partial result.
    fn thread_words(&self) -> usize {
        let rows = self.max_rows;
        let words = rows * (self.query_stride + self.probability_stride + self.score_columns);
        words + self.result_words() * 2
    }

    /// Words of a result: `[max_rows][value_dims]`, then maxima and sums.
    fn result_words(&self) -> usize {
        (self.max_rows * (self.value_dims + 2)).next_multiple_of(LANES)
    }

    /// Bytes of the scratch memory.
    pub(crate) fn scratch_bytes(&self) -> usize {
        let words = self.thread_words() * self.n_threads + self.slot_start(self.max_split_items, 0);
        words * size_of::<f32>()
    }

    /// First word of a slot behind the threads' parts. Only decodes are split, so a slot has `group` rows; sized like
    /// any other result where a tile is one token, and smaller otherwise.
    fn slot_start(&self, item: usize, partition: usize) -> usize {
        (item * self.max_partitions + partition) * self.slot_words()
    }

    fn slot_words(&self) -> usize {
        (self.group * (self.value_dims + 2)).next_multiple_of(LANES)
    }
}

/// The memory.
#[derive(Debug)]
pub(crate) struct Scratch {
    memory: Mapping,
}

/// One thread's part, taken apart.
pub(crate) struct ThreadScratch<'a> {
    pub(crate) queries: &'a mut [u32],
    pub(crate) probabilities: &'a mut [u32],
    pub(crate) scores: &'a mut [f32],
    pub(crate) running: &'a mut [f32],
    pub(crate) max: &'a mut [f32],
    pub(crate) sum: &'a mut [f32],
    pub(crate) part: &'a mut [f32],
    pub(crate) part_max: &'a mut [f32],
    pub(crate) part_sum: &'a mut [f32],
}

impl ThreadScratch<'_> {
    /// Nothing seen yet.
    pub(crate) fn clear_running(&mut self) {
        self.running.fill(0.0);
        self.sum.fill(0.0);
        self.max.fill(f32::NEG_INFINITY);
    }
}

impl Scratch {
    /// Room for any of the plans, of which `bytes` is the largest [`AttentionPlan::scratch_bytes`].
    pub(crate) fn new(bytes: usize) -> Result<Self, DeviceError> {
        Ok(Self {
            memory: Mapping::new("attention's scratch memory", bytes)?,
        })
    }

    /// A thread's part, partial result included.
    ///
    /// # Safety
    /// No two results for the same thread are used at the same time.
    pub(crate) unsafe fn thread<'a>(
        &'a self,
        plan: &AttentionPlan,
        thread: usize,
    ) -> ThreadScratch<'a> {
        assert!(
            thread < plan.n_threads && plan.scratch_bytes() <= self.memory.bytes(),
            "scratch smaller than planned"
        );
        let rows = plan.max_rows;
        // SAFETY: `scratch_bytes` counts `thread_words` for each thread; the slices below follow each other inside
        // them, and the caller keeps others away. All-zero words are valid as u32 and f32.
        unsafe {
            let mut at = self
                .memory
                .as_ptr::<u32>()
                .add(thread * plan.thread_words());
            let mut take = |words: usize| {
                let start = at;
                at = at.add(words);
                (start, words)
            };
            let pairs = |(start, words)| std::slice::from_raw_parts_mut::<'a, u32>(start, words);
            let floats = |(start, words): (*mut u32, usize)| {
                std::slice::from_raw_parts_mut::<'a, f32>(start.cast(), words)
            };
            let queries = pairs(take(rows * plan.query_stride));
            let probabilities = pairs(take(rows * plan.probability_stride));
            let scores = floats(take(rows * plan.score_columns));
            let (running, statistics) =
                floats(take(plan.result_words())).split_at_mut(rows * plan.value_dims);
            let (max, sum) = statistics[..2 * rows].split_at_mut(rows);
            let (part, statistics) =
                floats(take(plan.result_words())).split_at_mut(rows * plan.value_dims);
            let (part_max, part_sum) = statistics[..2 * rows].split_at_mut(rows);
            ThreadScratch {
                queries,
                probabilities,
                scores,
                running,
                max,
                sum,
                part,
                part_max,
                part_sum,
            }
        }
    }

    /// A thread's part, with the slot of an item's partition for its partial result.
    ///
    /// # Safety
    /// As for [`Scratch::thread`], and no two results for the same slot are used at the same time.
    pub(crate) unsafe fn thread_with_slot<'a>(
        &'a self,
        plan: &AttentionPlan,
        thread: usize,
        item: usize,
        partition: usize,
    ) -> ThreadScratch<'a> {
        assert!(
            item < plan.max_split_items && partition < plan.max_partitions,
            "a slot outside the scratch memory"
        );
        let start = plan.n_threads * plan.thread_words() + plan.slot_start(item, partition);
        // SAFETY: `scratch_bytes` counts `max_split_items * max_partitions` slots behind the threads' parts; the rest
        // is the caller's promise.
        let slot = unsafe {
            std::slice::from_raw_parts_mut(
                self.memory.as_ptr::<f32>().add(start),
                plan.slot_words(),
            )
        };
        let (part, statistics) = slot.split_at_mut(plan.group * plan.value_dims);
        let (part_max, part_sum) = statistics[..2 * plan.group].split_at_mut(plan.group);
        // SAFETY: the caller's promise.
        ThreadScratch {
            part,
            part_max,
            part_sum,
            ..unsafe { self.thread(plan, thread) }
        }
    }
}
