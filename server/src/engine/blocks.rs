//! The block pool: which blocks of the KV cache are free, and which block tables hold the others.
//!
//! Pure bookkeeping: it knows no tokens, no requests and no device. A block is a page of the cache, of one size for every
//! cache group: a set of layers whose keys and values of `block_size` tokens lie in it, or whose recurrent state does. It
//! is in the free list or held by at least one table, never both, never neither; its reference count is the number of
//! tables that hold it. A table is owned: it can be grown, and it is given back by value, so that it cannot be used or
//! freed again.

use std::collections::VecDeque;
use std::num::NonZeroU32;
use std::ops::Range;

use kvasir_crds::load_report::PageDemand;
use kvasir_kernels::step::BlockId;

/// What a cache group keeps of a sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GroupKind {
    /// Keys and values of all tokens.
    Full,
    /// Keys and values of the tokens that the next query sees: so many, its own among them.
    Window(NonZeroU32),
    /// A recurrent state, in so many blocks, however long the sequence is.
    State(NonZeroU32),
}

/// The cache groups of a model, and how many blocks a sequence takes from the pool in each.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CacheGroups {
    block_size: NonZeroU32,
    /// Tokens of the longest prefill chunk.
    max_chunk: u32,
    kinds: Vec<GroupKind>,
}

impl CacheGroups {
    /// Groups whose blocks hold `block_size` tokens, of sequences that run at most `max_chunk` tokens in a step.
    pub fn new(block_size: NonZeroU32, max_chunk: u32, kinds: Vec<GroupKind>) -> Self {
        Self {
            block_size,
            max_chunk,
            kinds,
        }
    }

    /// Token slots in a block.
    pub fn block_size(&self) -> NonZeroU32 {
        self.block_size
    }

    /// How many groups.
    pub fn n_groups(&self) -> u32 {
        self.kinds.len() as u32
    }

    /// Blocks that a sequence of `n_tokens` tokens holds at most at once while it is computed.
    pub fn blocks_for(&self, n_tokens: u32) -> u32 {
        let most = |&kind: &GroupKind| {
            let first_chunk = self.held(kind, 0, n_tokens);
            let last_decode = self.held(kind, n_tokens.saturating_sub(1), n_tokens);
            first_chunk.len().max(last_decode.len()) as u32
        };
        self.kinds.iter().map(most).fold(0, u32::saturating_add)
    }

    /// The same in the two numbers that the load report has for it: an upper bound where there are windows.
    pub fn page_demand(&self) -> PageDemand {
        let states = self.kinds.iter().map(|kind| match kind {
            GroupKind::State(blocks) => u64::from(blocks.get()),
            GroupKind::Full | GroupKind::Window(_) => 0,
        });
        let is_state = |kind: &&GroupKind| matches!(kind, GroupKind::State(_));
        let n_states = self.kinds.iter().filter(is_state).count();
        PageDemand {
            per_sequence: Some(states.sum()),
            per_token_block: Some((self.kinds.len() - n_states) as u64),
        }
    }

    /// The longest sequence that `n_blocks` blocks hold alone.
    pub fn tokens_in(&self, n_blocks: u32) -> u32 {
        let (mut fits, mut too_many) = (0, u32::MAX);
        while too_many - fits > 1 {
            let middle = fits + (too_many - fits) / 2;
            match self.blocks_for(middle) <= n_blocks {
                true => fits = middle,
                false => too_many = middle,
            }
        }
        fits
    }

    /// The blocks, by their place in the sequence, that a group must hold when tokens from `n_computed` on are computed and
    /// `n_tokens` are known: no window reaches behind the first, and a chunk of `max_chunk` tokens has room.
    fn held(&self, kind: GroupKind, n_computed: u32, n_tokens: u32) -> Range<u32> {
        let size = self.block_size.get();
        let end = n_tokens.div_ceil(size);
        match kind {
            GroupKind::Full => 0..end,
            GroupKind::Window(window) => {
                let first = (n_computed + 1).saturating_sub(window.get()) / size;
                // As many blocks as window and chunk touch, wherever in a block they begin.
                let seen = window
                    .get()
                    .saturating_add(self.max_chunk)
                    .saturating_sub(2);
                let most = seen.div_ceil(size) + 1;
                first..end.min(first.saturating_add(most)).max(first)
            }
            GroupKind::State(blocks) => 0..if n_tokens > 0 { blocks.get() } else { 0 },
        }
    }
}

/// The blocks of one group, in the order of the tokens that they hold: block `i` of the sequence is `blocks[i - first]`.
#[derive(Debug, Default)]
struct GroupTable {
    /// Blocks that were given back because no window reaches them any more.
    first: u32,
    blocks: VecDeque<BlockId>,
}

impl GroupTable {
    fn end(&self) -> u32 {
        self.first + self.blocks.len() as u32
    }
}

/// The blocks of one sequence, group by group: token `i` lives in slot `i % block_size` of block `i / block_size`. Dropping
/// one loses its blocks: it goes back by [`BlockPool::release`].
#[derive(Debug)]
#[must_use = "the blocks of a dropped table are lost; release it"]
pub struct BlockTable {
    groups: Vec<GroupTable>,
}

impl BlockTable {
    /// All blocks that it holds.
    pub fn blocks(&self) -> impl Iterator<Item = BlockId> {
        self.groups
            .iter()
            .flat_map(|group| group.blocks.iter().copied())
    }
}

/// Blocks that a table was given: entries of a group's row of the block-table matrix.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Appended {
    /// Which group.
    pub group: u32,
    /// The place of the first in the sequence.
    pub first: u32,
    /// One after another.
    pub blocks: Vec<BlockId>,
}

/// Blocks by state: `total = active + cached + free`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PoolCounts {
    /// All blocks.
    pub total: u32,
    /// Held by at least one table.
    pub active: u32,
    /// Held by none, kept for their content.
    pub cached: u32,
    /// Empty.
    pub free: u32,
}

/// All blocks of the KV cache.
#[derive(Debug)]
pub struct BlockPool {
    groups: CacheGroups,
    /// Last in, first out: the block freed last is the likeliest to be warm.
    free: Vec<BlockId>,
    /// Tables that hold each block.
    references: Vec<u32>,
}

impl BlockPool {
    /// A pool of the blocks `0..n_blocks`, all free.
    pub fn new(n_blocks: u32, groups: CacheGroups) -> Self {
        Self {
            groups,
            free: (0..n_blocks).rev().map(BlockId).collect(),
            references: vec![0; n_blocks as usize],
        }
    }

    /// Blocks that a sequence of `n_tokens` tokens holds at most at once.
    pub fn blocks_for(&self, n_tokens: u32) -> u32 {
        self.groups.blocks_for(n_tokens)
    }

    /// Cache groups: a sequence's next block may have to be one of each.
    pub fn n_groups(&self) -> u32 {
        self.groups.n_groups()
    }

    /// Blocks that can be had at once.
    pub fn n_free(&self) -> u32 {
        self.free.len() as u32
    }

    /// Blocks by state.
    pub fn counts(&self) -> PoolCounts {
        let total = self.references.len() as u32;
        let free = self.n_free();
        PoolCounts {
            total,
            active: total - free,
            cached: 0,
            free,
        }
    }

    /// A table for a sequence of which nothing is computed and `n_tokens` tokens are known, and its blocks. `None`: nothing
    /// changed.
    pub fn allocate(&mut self, n_tokens: u32) -> Option<(BlockTable, Vec<Appended>)> {
        let groups = self.groups.kinds.iter().map(|_| GroupTable::default());
        let mut table = BlockTable {
            groups: groups.collect(),
        };
        let appended = self.extend(&mut table, 0, n_tokens)?;
        Some((table, appended))
    }

    /// Makes room in `table` for `n_tokens` tokens, where those before `n_computed` are computed; returns what was appended,
    /// mostly nothing. Blocks that no window reaches any more are used again in their own group, and otherwise freed.
    ///
    /// `None`: nothing changed; the caller preempts and tries again. It can't be while `n_tokens` stays what the table was
    /// allocated for: the chunks of a prompt need no more blocks than the first of them.
    pub fn extend(
        &mut self,
        table: &mut BlockTable,
        n_computed: u32,
        n_tokens: u32,
    ) -> Option<Vec<Appended>> {
        let mut n_needed = 0;
        let mut changes = false;
        for (group, &kind) in table.groups.iter().zip(&self.groups.kinds) {
            let held = self.groups.held(kind, n_computed, n_tokens);
            let n_new = held.end.saturating_sub(group.end());
            let n_unreached = held.start.min(group.end()).saturating_sub(group.first);
            n_needed += n_new.saturating_sub(n_unreached) as usize;
            changes |= n_new + n_unreached > 0;
        }
        if !changes {
            return Some(Vec::new());
        }
        self.free.len().checked_sub(n_needed)?;
        let mut appended = Vec::new();
        for (index, group) in (0..).zip(&mut table.groups) {
            let kind = self.groups.kinds[index as usize];
            let held = self.groups.held(kind, n_computed, n_tokens);
            let first = group.end();
            let mut blocks = Vec::new();
            while group.end() < held.end {
                let unreached = group.first < held.start;
                let block = match unreached.then(|| group.blocks.pop_front()).flatten() {
                    Some(block) => {
                        group.first += 1;
                        block
                    }
                    None => {
                        let block = self.free.pop().expect("as many are free as are needed");
                        self.references[block.0 as usize] = 1;
                        block
                    }
                };
                group.blocks.push_back(block);
                blocks.push(block);
            }
            while group.first < held.start
                && let Some(block) = group.blocks.pop_front()
            {
                group.first += 1;
                self.give_back(block);
            }
            if !blocks.is_empty() {
                appended.push(Appended {
                    group: index,
                    first,
                    blocks,
                });
            }
        }
        Some(appended)
    }

    /// Takes the table by value: it cannot be used or freed again. Blocks that no other table holds are free.
    pub fn release(&mut self, table: BlockTable) {
        // Backwards, so that the blocks come out of the free list in the order in which they went in.
        for group in table.groups.into_iter().rev() {
            for block in group.blocks.into_iter().rev() {
                self.give_back(block);
            }
        }
    }

    fn give_back(&mut self, block: BlockId) {
        let references = &mut self.references[block.0 as usize];
        *references = references
            .checked_sub(1)
            .expect("a block in a table is counted");
        if *references == 0 {
            self.free.push(block);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::*;

    /// What happens to a pool; the indices choose among the live tables.
    #[derive(Clone, Debug)]
    enum Action {
        Allocate(u32),
        /// Compute a chunk of at most so many tokens, or decode one where all are computed.
        Advance(usize, u32),
        Release(usize),
    }

    fn action() -> impl Strategy<Value = Action> {
        prop_oneof![
            (1..40u32).prop_map(Action::Allocate),
            (any::<usize>(), 1..9u32).prop_map(|(i, n)| Action::Advance(i, n)),
            (any::<usize>(), 1..9u32).prop_map(|(i, n)| Action::Advance(i, n)),
            any::<usize>().prop_map(Action::Release),
        ]
    }

    fn kind() -> impl Strategy<Value = GroupKind> {
        let positive = |n| NonZeroU32::new(n).unwrap();
        prop_oneof![
            Just(GroupKind::Full),
            (1..14u32).prop_map(move |n| GroupKind::Window(positive(n))),
            (1..3u32).prop_map(move |n| GroupKind::State(positive(n))),
        ]
    }

    /// A table with what the brute-force model knows of it.
    struct Live {
        table: BlockTable,
        n_known: u32,
        n_computed: u32,
        /// `[group][place in the sequence]`: the block, until no query sees it.
        blocks: Vec<Vec<BlockId>>,
    }

    impl Live {
        fn take(&mut self, appended: &[Appended]) {
            for Appended {
                group,
                first,
                blocks,
            } in appended
            {
                let held = &mut self.blocks[*group as usize];
                assert_eq!(held.len(), *first as usize, "places follow each other");
                held.extend(blocks);
            }
        }

        fn held(&self) -> HashSet<BlockId> {
            self.table.blocks().collect()
        }

        /// What a step over `n_computed..end` reads or writes is held, at its place.
        fn assert_readable(&self, groups: &CacheGroups, end: u32) {
            let size = groups.block_size.get();
            for ((kind, table), blocks) in groups
                .kinds
                .iter()
                .zip(&self.table.groups)
                .zip(&self.blocks)
            {
                let places = match kind {
                    GroupKind::Full => 0..end.div_ceil(size),
                    GroupKind::Window(window) => {
                        let first = (self.n_computed + 1).saturating_sub(window.get());
                        first / size..end.div_ceil(size)
                    }
                    GroupKind::State(n) => 0..n.get(),
                };
                for place in places {
                    let held = place
                        .checked_sub(table.first)
                        .and_then(|index| table.blocks.get(index as usize));
                    assert_eq!(
                        held,
                        Some(&blocks[place as usize]),
                        "{kind:?}, place {place}"
                    );
                }
            }
        }
    }

    proptest! {
        /// A block is free or in exactly one table, of any kind of group, and what a step touches is held. The brute-force
        /// model: a table is a list of blocks for each group, and a block is free when no table holds it.
        #[test]
        fn a_block_is_free_or_in_exactly_one_table(
            n_blocks in 0..60u32,
            block_size in 1..6u32,
            max_chunk in 1..9u32,
            kinds in prop::collection::vec(kind(), 1..4),
            actions in prop::collection::vec(action(), 0..80),
        ) {
            let groups = CacheGroups::new(NonZeroU32::new(block_size).unwrap(), max_chunk, kinds);
            let mut pool = BlockPool::new(n_blocks, groups.clone());
            let mut tables: Vec<Live> = Vec::new();
            for action in actions {
                let free_before = pool.n_free();
                match action {
                    Action::Allocate(n_tokens) => match pool.allocate(n_tokens) {
                        Some((table, appended)) => {
                            let blocks = vec![Vec::new(); groups.kinds.len()];
                            let mut live = Live { table, n_known: n_tokens, n_computed: 0, blocks };
                            live.take(&appended);
                            prop_assert!(live.held().len() as u32 <= groups.blocks_for(n_tokens));
                            tables.push(live);
                        }
                        None => prop_assert!(groups.blocks_for(n_tokens) > free_before, "refused though it fits"),
                    },
                    Action::Advance(i, n) if !tables.is_empty() => {
                        let i = i % tables.len();
                        let live = &mut tables[i];
                        let is_chunk = live.n_computed < live.n_known;
                        let end = match is_chunk {
                            true => (live.n_computed + n.min(max_chunk)).min(live.n_known),
                            false => live.n_computed + 1,
                        };
                        let known = end.max(live.n_known);
                        let before = live.held();
                        match pool.extend(&mut live.table, live.n_computed, known) {
                            Some(appended) => {
                                live.take(&appended);
                                live.assert_readable(&groups, end);
                                let most = groups.blocks_for(known) as usize;
                                prop_assert!(live.held().len() <= most, "{} of {most}", live.held().len());
                                (live.n_computed, live.n_known) = (end, known);
                            }
                            None => {
                                prop_assert!(!is_chunk, "a chunk has its blocks since its sequence was admitted");
                                prop_assert!(free_before < groups.kinds.len() as u32, "refused though it fits");
                                prop_assert_eq!(before, live.held(), "nothing changed");
                            }
                        }
                    }
                    Action::Release(i) if !tables.is_empty() => {
                        let i = i % tables.len();
                        pool.release(tables.swap_remove(i).table);
                    }
                    Action::Advance(..) | Action::Release(..) => {}
                }
                let held: Vec<BlockId> = tables.iter().flat_map(|live| live.table.blocks()).collect();
                let free: HashSet<BlockId> = pool.free.iter().copied().collect();
                prop_assert_eq!(free.len(), pool.free.len(), "no block is free twice");
                prop_assert_eq!(held.iter().collect::<HashSet<_>>().len(), held.len(), "no block is held twice");
                prop_assert!(held.iter().all(|b| !free.contains(b) && pool.references[b.0 as usize] == 1));
                prop_assert_eq!(held.len() + free.len(), n_blocks as usize, "none is lost");
                let counts = pool.counts();
                prop_assert_eq!(counts.active as usize, held.len());
                prop_assert_eq!(counts.total, counts.active + counts.cached + counts.free);
            }
        }
    }

    /// Gemma 3 12B: one group of 8 global layers, five of 8 local ones whose window is 1,024.
    fn gemma_3_12b(max_chunk: u32) -> CacheGroups {
        let window = GroupKind::Window(NonZeroU32::new(1024).unwrap());
        let kinds = [vec![GroupKind::Full], vec![window; 5]].concat();
        CacheGroups::new(NonZeroU32::new(16).unwrap(), max_chunk, kinds)
    }

    #[test]
    fn a_long_prompt_holds_its_windows_only() {
        let groups = gemma_3_12b(2048);
        let mut pool = BlockPool::new(20_000, groups.clone());
        let n_tokens = 32_768;
        let (mut table, _) = pool.allocate(n_tokens).unwrap();
        for start in (0..n_tokens).step_by(2048) {
            pool.extend(&mut table, start, n_tokens).unwrap();
            for group in &table.groups[1..] {
                let slots = group.blocks.len() as u32 * 16;
                assert!(slots <= 1024 + 2048 + 2 * 16, "{slots} slots at {start}");
            }
        }
        // The first decode gives back what the last chunk needed.
        pool.extend(&mut table, n_tokens, n_tokens + 1).unwrap();
        let held = table.blocks().count() as f64;
        // By hand, in slots of eight layers: all tokens once, and five windows.
        let by_hand = f64::from(n_tokens + 5 * 1024) / 16.0;
        assert!(held <= 1.1 * by_hand, "{held} blocks, {by_hand} by hand");
        let one_table_for_all = f64::from(n_tokens) / 16.0 * 6.0;
        assert!(one_table_for_all > 5.1 * by_hand);
        pool.release(table);
        assert_eq!(pool.n_free(), 20_000);
    }

    #[test]
    fn the_longest_sequence_is_where_one_more_token_needs_too_much() {
        for groups in [gemma_3_12b(512), gemma_3_12b(1)] {
            for n_blocks in [6, 100, 1000, 5000] {
                let n_tokens = groups.tokens_in(n_blocks);
                assert!(groups.blocks_for(n_tokens) <= n_blocks);
                assert!(groups.blocks_for(n_tokens + 1) > n_blocks, "{n_blocks}");
            }
        }
    }
}
