//! The block pool: which blocks of the KV cache are free, and which block tables hold the others.
//!
//! Pure bookkeeping: it knows no tokens, no requests and no device. A block is in the free list or held by at least
//! one table, never both, never neither; its reference count is the number of tables that hold it. A table is owned:
//! it can be grown, and it is given back by value, so that it cannot be used or freed again.

use std::num::NonZeroU32;

use kvasir_kernels::device::BlockId;

/// The blocks of one sequence, in the order of its tokens: token `i` lives in slot `i % block_size` of block
/// `i / block_size`. Dropping one loses its blocks: it goes back by [`BlockPool::release`].
#[derive(Debug)]
#[must_use = "the blocks of a dropped table are lost; release it"]
pub struct BlockTable {
    blocks: Vec<BlockId>,
}

impl BlockTable {
    /// The blocks, first token first.
    pub fn blocks(&self) -> &[BlockId] {
        &self.blocks
    }
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
    block_size: NonZeroU32,
    /// Last in, first out: the block freed last is the likeliest to be warm.
    free: Vec<BlockId>,
    /// Tables that hold each block.
    references: Vec<u32>,
}

impl BlockPool {
    /// A pool of the blocks `0..n_blocks`, all free.
    pub fn new(n_blocks: u32, block_size: NonZeroU32) -> Self {
        Self {
            block_size,
            free: (0..n_blocks).rev().map(BlockId).collect(),
            references: vec![0; n_blocks as usize],
        }
    }

    /// Blocks that hold `n_tokens` tokens.
    pub fn blocks_for(&self, n_tokens: u32) -> u32 {
        n_tokens.div_ceil(self.block_size.get())
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

    /// A table with room for `n_tokens` tokens. `None`: nothing changed.
    pub fn allocate(&mut self, n_tokens: u32) -> Option<BlockTable> {
        let mut table = BlockTable { blocks: Vec::new() };
        self.extend(&mut table, n_tokens)?;
        Some(table)
    }

    /// Room in `table` for `n_tokens` tokens in all; returns the blocks that were appended, mostly none.
    /// `None`: nothing changed; the caller preempts and tries again.
    pub fn extend<'t>(
        &mut self,
        table: &'t mut BlockTable,
        n_tokens: u32,
    ) -> Option<&'t [BlockId]> {
        let n_held = table.blocks.len();
        let n_more = (self.blocks_for(n_tokens) as usize).saturating_sub(n_held);
        let rest = self.free.len().checked_sub(n_more)?;
        for block in self.free.drain(rest..).rev() {
            self.references[block.0 as usize] = 1;
            table.blocks.push(block);
        }
        Some(&table.blocks[n_held..])
    }

    /// Takes the table by value: it cannot be used or freed again. Blocks that no other table holds are free.
    pub fn release(&mut self, table: BlockTable) {
        // Backwards, so that the blocks come out of the free list in the order in which they went in.
        for block in table.blocks.into_iter().rev() {
            let references = &mut self.references[block.0 as usize];
            *references = references
                .checked_sub(1)
                .expect("a block in a table is counted");
            if *references == 0 {
                self.free.push(block);
            }
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
        Extend(usize, u32),
        Release(usize),
    }

    fn action() -> impl Strategy<Value = Action> {
        prop_oneof![
            (0..40u32).prop_map(Action::Allocate),
            (any::<usize>(), 0..60u32).prop_map(|(i, n)| Action::Extend(i, n)),
            any::<usize>().prop_map(Action::Release),
        ]
    }

    proptest! {
        /// The brute-force model: a table is a list of blocks, and a block is free when no list has it.
        #[test]
        fn a_block_is_free_or_in_exactly_one_table(
            n_blocks in 0..24u32,
            block_size in 1..9u32,
            actions in prop::collection::vec(action(), 0..80),
        ) {
            let mut pool = BlockPool::new(n_blocks, NonZeroU32::new(block_size).unwrap());
            let mut tables: Vec<BlockTable> = Vec::new();
            for action in actions {
                let before: Vec<Vec<BlockId>> = tables.iter().map(|t| t.blocks.clone()).collect();
                let free_before = n_blocks as usize - before.iter().map(Vec::len).sum::<usize>();
                match action {
                    Action::Allocate(n_tokens) => {
                        let need = n_tokens.div_ceil(block_size) as usize;
                        match pool.allocate(n_tokens) {
                            Some(table) => {
                                prop_assert_eq!(table.blocks.len(), need);
                                tables.push(table);
                            }
                            None => prop_assert!(need > free_before, "refused though it fits"),
                        }
                    }
                    Action::Extend(i, n_tokens) if !tables.is_empty() => {
                        let i = i % tables.len();
                        let need = (n_tokens.div_ceil(block_size) as usize).saturating_sub(before[i].len());
                        match pool.extend(&mut tables[i], n_tokens) {
                            Some(added) => prop_assert_eq!(added.len(), need),
                            None => prop_assert!(need > free_before, "refused though it fits"),
                        }
                        prop_assert_eq!(&tables[i].blocks[..before[i].len()], &before[i][..], "a table only grows");
                    }
                    Action::Release(i) if !tables.is_empty() => pool.release(tables.swap_remove(i % tables.len())),
                    Action::Extend(..) | Action::Release(..) => {}
                }
                let held: Vec<BlockId> = tables.iter().flat_map(|t| t.blocks.iter().copied()).collect();
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
}
