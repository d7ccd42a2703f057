//! The block pool: which blocks of the KV cache are free, which block tables hold the others, and which are kept for what
//! they hold.
//!
//! Pure bookkeeping: it knows no requests and no device. A block is a page of the cache, of one size for every cache group:
//! a set of layers whose keys and values of `block_size` tokens lie in it, or whose recurrent state does. It is in one of
//! three states: *active*, held by at least one table, its reference count the number of tables that hold it; *cached*,
//! held by none and found by the [`prefix`](super::prefix) index; or *free*. A table is owned: it can be grown, and it is
//! given back by value, so that it cannot be used or freed again.
//!
//! Tables share the full blocks of full groups. A block of a windowed group is copied instead while another table holds
//! it: a sequence uses the blocks behind its window again, and those that it counts on must be its own.
//!
//! When no block is free, tails are evicted before full blocks, and those that were let go first before others. A table
//! lets its last block go first, so that the beginning of a sequence, which more others share, stays longest.

use std::collections::VecDeque;
use std::ops::{AddAssign, Range};
use std::sync::Arc;

use kvasir_kernels::step::BlockId;

use super::eviction::EvictionList;
use super::groups::{CacheGroups, GroupKind};
use super::prefix::{Findable, PrefixCaching, PrefixChain, PrefixHit, PrefixIndex};

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

    fn at(&self, place: u32) -> Option<BlockId> {
        let index = place.checked_sub(self.first)?;
        self.blocks.get(index as usize).copied()
    }
}

/// The blocks of one sequence, group by group: token `i` lives in slot `i % block_size` of block `i / block_size`. Dropping
/// one loses its blocks: it goes back by [`BlockPool::release`].
#[derive(Debug)]
#[must_use = "the blocks of a dropped table are lost; release it"]
pub struct BlockTable {
    groups: Vec<GroupTable>,
    /// Its full blocks before this place were offered to the prefix index.
    n_registered: u32,
}

impl BlockTable {
    /// Its full blocks before this place were offered to the prefix cache.
    pub(super) fn n_registered(&self) -> u32 {
        self.n_registered
    }

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

/// A new table, and what its sequence's first step brings.
#[derive(Debug)]
pub struct Allocation {
    /// The table.
    pub table: BlockTable,
    /// All its blocks.
    pub appended: Vec<Appended>,
    /// Source and destination of the blocks that are copied before the step. The sources stay what they are until
    /// [`BlockPool::release_sources`].
    pub copies: Vec<(BlockId, BlockId)>,
}

/// What a table's sequence has in the cache for certain, because the steps that wrote it were collected.
#[derive(Clone, Copy, Debug)]
pub struct Written<'a> {
    /// The keys of its full blocks.
    pub chain: &'a PrefixChain,
    /// All of its tokens that are written.
    pub tokens: &'a [u32],
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
    /// Entries of all tables: what would be active if each sequence had blocks of its own only.
    pub unshared: u32,
}

/// Token slots at one moment, or summed over steps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SlotUse {
    /// Slots of active blocks.
    pub active: u64,
    /// Those among them that hold no token: waste.
    pub unwritten: u64,
    /// Slots of the blocks that would be active if none were shared.
    pub unshared: u64,
}

impl AddAssign for SlotUse {
    fn add_assign(&mut self, other: Self) {
        self.active += other.active;
        self.unwritten += other.unwritten;
        self.unshared += other.unshared;
    }
}

/// What an allocation takes of the blocks that can be had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cost {
    /// Blocks that become active.
    pub n_blocks: u32,
    /// Blocks that can't be had until the step is put together, because they are copied from.
    pub n_sources: u32,
}

/// The blocks that are kept for what they hold.
#[derive(Debug)]
struct PrefixCache {
    index: PrefixIndex,
    /// Full blocks that no table holds.
    full: EvictionList,
    /// Tails that no copy holds, each by its block of the first group.
    tails: EvictionList,
    equal_bits: bool,
}

/// All blocks of the KV cache.
#[derive(Debug)]
pub struct BlockPool {
    groups: CacheGroups,
    /// Last in, first out: the block freed last is the likeliest to be warm.
    free: Vec<BlockId>,
    /// Tables, and copies of the step being put together, that hold each block.
    references: Vec<u32>,
    /// Their sum.
    n_references: u32,
    prefix: Option<PrefixCache>,
    /// Held for the copies of the step being put together.
    sources: Vec<BlockId>,
    /// How many of them a table held too when they were taken: its sequence may count on having them again.
    n_held_sources: u32,
}

impl BlockPool {
    /// A pool of the blocks `0..n_blocks`, all free. Without `caching`, and where a group keeps recurrent states, of which
    /// none are kept at block boundaries, no prefix is ever found.
    pub fn new(n_blocks: u32, groups: CacheGroups, caching: Option<PrefixCaching>) -> Self {
        let caching = caching.filter(|_| !groups.has_states());
        let prefix = caching.map(|PrefixCaching { equal_bits, .. }| PrefixCache {
            index: PrefixIndex::new(n_blocks, groups.block_size),
            full: EvictionList::new(n_blocks),
            tails: EvictionList::new(n_blocks),
            equal_bits,
        });
        Self {
            groups,
            free: (0..n_blocks).rev().map(BlockId).collect(),
            references: vec![0; n_blocks as usize],
            n_references: 0,
            prefix,
            sources: Vec::new(),
            n_held_sources: 0,
        }
    }

    /// Blocks that a sequence of `n_tokens` tokens holds at most at once.
    pub fn blocks_for(&self, n_tokens: u32) -> u32 {
        self.groups.blocks_for(n_tokens)
    }

    /// Blocks that a sequence of `n_tokens` tokens has of its own whose first `n_shared` are another's.
    pub fn own_blocks_for(&self, n_shared: u32, n_tokens: u32) -> u32 {
        self.groups.own_blocks_for(n_shared, n_tokens)
    }

    /// Cache groups: a sequence's next block may have to be one of each.
    pub fn n_groups(&self) -> u32 {
        self.groups.n_groups()
    }

    /// Prefixes are found.
    pub fn caches_prefixes(&self) -> bool {
        self.prefix.is_some()
    }

    /// Token slots in a block.
    pub fn block_size(&self) -> u32 {
        self.groups.block_size.get()
    }

    /// Blocks that a new sequence can have at once: free ones and cached ones.
    pub fn n_available(&self) -> u32 {
        let all = self.free.len() as u32 + self.n_cached();
        all.saturating_sub(self.n_held_sources)
    }

    /// Blocks by state.
    pub fn counts(&self) -> PoolCounts {
        let total = self.references.len() as u32;
        let (free, cached) = (self.free.len() as u32, self.n_cached());
        PoolCounts {
            total,
            active: total - free - cached,
            cached,
            free,
            unshared: self.n_references - self.sources.len() as u32,
        }
    }

    /// Slots of the blocks of `tables`, all that there are, each with the number of its sequence's first tokens that are written
    /// or under way. A recurrent state fills its blocks. Slots that aren't written are in no block of two tables.
    pub fn slot_use<'a>(&self, tables: impl Iterator<Item = (&'a BlockTable, u32)>) -> SlotUse {
        let size = u64::from(self.block_size());
        let unwritten = |(table, n_tokens): (&BlockTable, u32)| -> u64 {
            let groups = table.groups.iter().zip(&self.groups.kinds);
            let with_tokens = groups.filter(|(_, kind)| !matches!(kind, GroupKind::State(_)));
            let unwritten = with_tokens.map(|(group, _)| {
                let first = u64::from(n_tokens).max(u64::from(group.first) * size);
                (u64::from(group.end()) * size).saturating_sub(first)
            });
            unwritten.sum()
        };
        let counts = self.counts();
        SlotUse {
            active: u64::from(counts.active) * size,
            unwritten: tables.map(unwritten).sum(),
            unshared: u64::from(counts.unshared) * size,
        }
    }

    fn n_cached(&self) -> u32 {
        let prefix = self.prefix.as_ref();
        prefix.map_or(0, |prefix| {
            prefix.full.len() + prefix.tails.len() * self.groups.n_groups()
        })
    }

    /// The longest beginning of `tokens`, of which `most` may be taken from the cache.
    pub fn find_prefix(&self, chain: &PrefixChain, tokens: &[u32], most: u32) -> PrefixHit {
        let Some(prefix) = &self.prefix else {
            return PrefixHit::default();
        };
        prefix.index.find(&self.groups.kinds, chain, tokens, most)
    }

    /// What [`BlockPool::allocate`] takes.
    pub fn cost(&self, n_tokens: u32, hit: &PrefixHit) -> Cost {
        let tail_groups = hit.tail.as_ref().map_or(0, |tail| tail.blocks.len());
        let mut cost = Cost {
            n_blocks: 0,
            n_sources: tail_groups as u32,
        };
        for (group, &kind) in self.groups.kinds.iter().enumerate() {
            let held = self.held_with(kind, n_tokens, hit);
            cost.n_blocks += held.len() as u32;
            for block in self.hit_blocks(hit, group, &held) {
                let is_active = self.references[block.0 as usize] > 0;
                match kind {
                    GroupKind::Full if is_active => cost.n_blocks -= 1,
                    GroupKind::Window(_) if is_active => cost.n_sources += 1,
                    _ => {}
                }
            }
        }
        cost
    }

    /// A table for a sequence of which `hit` is in the cache and `n_tokens` tokens are known. `None`: nothing changed.
    pub fn allocate(&mut self, n_tokens: u32, hit: &PrefixHit) -> Option<Allocation> {
        let cost = self.cost(n_tokens, hit);
        self.n_available()
            .checked_sub(cost.n_blocks.saturating_add(cost.n_sources))?;
        // What is found is held before anything is evicted for the rest.
        let tail = hit.tail.iter().flat_map(|tail| tail.blocks.iter().copied());
        for block in tail.clone() {
            self.hold(block);
            self.sources.push(block);
        }
        let mut found: Vec<Vec<(BlockId, bool)>> = Vec::with_capacity(self.groups.kinds.len());
        for group in 0..self.groups.kinds.len() {
            let kind = self.groups.kinds[group];
            let held = self.held_with(kind, n_tokens, hit);
            let blocks: Vec<BlockId> = self.hit_blocks(hit, group, &held).collect();
            let hold = |block: BlockId| {
                let is_active = self.references[block.0 as usize] > 0;
                let is_copied = is_active && matches!(kind, GroupKind::Window(_));
                self.hold(block);
                if is_copied {
                    self.sources.push(block);
                    self.n_held_sources += 1;
                }
                (block, is_copied)
            };
            found.push(blocks.into_iter().map(hold).collect());
        }
        let mut allocation = Allocation {
            table: BlockTable {
                groups: Vec::with_capacity(found.len()),
                n_registered: hit.n_blocks,
            },
            appended: Vec::with_capacity(found.len()),
            copies: Vec::new(),
        };
        let mut tail = tail;
        for (group, found) in found.into_iter().enumerate() {
            let held = self.held_with(self.groups.kinds[group], n_tokens, hit);
            let mut blocks = VecDeque::with_capacity(held.len());
            for (block, is_copied) in found {
                let own = match is_copied {
                    true => {
                        let copy = self.take();
                        allocation.copies.push((block, copy));
                        copy
                    }
                    false => block,
                };
                blocks.push_back(own);
            }
            if let Some(source) = tail.next() {
                let copy = self.take();
                allocation.copies.push((source, copy));
                blocks.push_back(copy);
            }
            while blocks.len() < held.len() {
                blocks.push_back(self.take());
            }
            if !blocks.is_empty() {
                allocation.appended.push(Appended {
                    group: group as u32,
                    first: held.start,
                    blocks: blocks.iter().copied().collect(),
                });
            }
            allocation.table.groups.push(GroupTable {
                first: held.start,
                blocks,
            });
        }
        Some(allocation)
    }

    /// A table for a sequence of `n_tokens` tokens whose first `n_shared` another sequence computes: it has the blocks that
    /// will be its own, and is no good before [`BlockPool::fork`]. `None`: nothing changed.
    pub fn allocate_fork(&mut self, n_shared: u32, n_tokens: u32) -> Option<BlockTable> {
        let needed = self.groups.own_blocks_for(n_shared, n_tokens);
        self.n_available().checked_sub(needed)?;
        let mut groups = Vec::with_capacity(self.groups.kinds.len());
        for index in 0..self.groups.kinds.len() {
            let own = (self.groups).own(self.groups.kinds[index], n_shared, n_tokens);
            groups.push(GroupTable {
                first: own.start,
                blocks: own.map(|_| self.take()).collect(),
            });
        }
        Some(BlockTable {
            groups,
            n_registered: n_shared / self.block_size(),
        })
    }

    /// Completes the table `to` of [`BlockPool::allocate_fork`] with the first `n_shared` tokens of `from`, all of which are
    /// computed or under way: full groups share the full blocks, and what one of the two will write to is copied, the last
    /// shared block, windows and states. Returns all blocks of `to` and the copies, as [`Allocation`] does.
    pub fn fork(
        &mut self,
        from: &BlockTable,
        to: &mut BlockTable,
        n_shared: u32,
    ) -> (Vec<Appended>, Vec<(BlockId, BlockId)>) {
        let size = self.block_size();
        let (mut appended, mut copies) = (Vec::new(), Vec::new());
        for (index, (from, to)) in from.groups.iter().zip(&mut to.groups).enumerate() {
            let kind = self.groups.kinds[index];
            let end = match kind {
                GroupKind::State(_) => to.end(),
                GroupKind::Full | GroupKind::Window(_) => n_shared.div_ceil(size).min(to.end()),
            };
            for place in to.first..end {
                let source = from.at(place).expect("what is shared is held");
                let copy = to.at(place).expect("a place that is its own");
                self.hold(source);
                self.sources.push(source);
                copies.push((source, copy));
            }
            if kind == GroupKind::Full {
                for place in (0..to.first).rev() {
                    let block = from.at(place).expect("what is shared is held");
                    self.hold(block);
                    to.blocks.push_front(block);
                }
                to.first = 0;
            }
            if !to.blocks.is_empty() {
                appended.push(Appended {
                    group: index as u32,
                    first: to.first,
                    blocks: to.blocks.iter().copied().collect(),
                });
            }
        }
        (appended, copies)
    }

    /// The step is put together: its copies' sources may be evicted, and what a later step writes there is written later.
    pub fn release_sources(&mut self) {
        while let Some(block) = self.sources.pop() {
            self.give_back(block);
        }
        self.n_held_sources = 0;
    }

    /// Makes room in `table` for `n_tokens` tokens, where those before `n_computed` are computed; returns what was appended,
    /// mostly nothing. Blocks that no window reaches any more are given back.
    ///
    /// `None`: nothing changed; the caller preempts and tries again. It can't be while `n_tokens` stays what the table was
    /// allocated for: the chunks of a prompt need no more blocks than the first of them, and its windows' are its own.
    pub fn extend(
        &mut self,
        table: &mut BlockTable,
        n_computed: u32,
        n_tokens: u32,
    ) -> Option<Vec<Appended>> {
        let (mut n_new, mut n_unreached, mut n_returned) = (0, 0, 0);
        for (group, &kind) in table.groups.iter().zip(&self.groups.kinds) {
            let held = self.groups.held(kind, n_computed, n_tokens);
            n_new += held.end.saturating_sub(group.end());
            for place in group.first..held.start.min(group.end()) {
                let block = group.at(place).expect("a place that is held");
                n_unreached += 1;
                n_returned += u32::from(self.references[block.0 as usize] == 1);
            }
        }
        if n_new + n_unreached == 0 {
            return Some(Vec::new());
        }
        let n_available = self.free.len() as u32 + self.n_cached();
        (n_available + n_returned).checked_sub(n_new)?;
        for (index, group) in table.groups.iter_mut().enumerate() {
            let held = (self.groups).held(self.groups.kinds[index], n_computed, n_tokens);
            while group.first < held.start
                && let Some(block) = group.blocks.pop_front()
            {
                group.first += 1;
                self.give_back(block);
            }
        }
        let mut appended = Vec::new();
        for (index, group) in (0..).zip(&mut table.groups) {
            let kind = self.groups.kinds[index as usize];
            let end = self.groups.held(kind, n_computed, n_tokens).end;
            let first = group.end();
            let blocks: Vec<BlockId> = (first..end).map(|_| self.take()).collect();
            if !blocks.is_empty() {
                group.blocks.extend(&blocks);
                appended.push(Appended {
                    group: index,
                    first,
                    blocks,
                });
            }
        }
        Some(appended)
    }

    /// Makes the full blocks of `table` findable whose tokens are written. Where another block holds the same, and equal
    /// keys mean equal bits, a full group takes that one and gives its own back; the changes of the table are returned.
    pub fn register(&mut self, table: &mut BlockTable, written: Written<'_>) -> Vec<Appended> {
        let n_full = written.tokens.len() as u32 / self.block_size();
        let mut changed = Vec::new();
        if self.prefix.is_none() {
            return changed;
        }
        for place in table.n_registered..n_full {
            let key = written.chain.block(place);
            for (index, group) in (0..).zip(&mut table.groups) {
                // It may have left its window before the step that filled it was collected.
                let (Some(own), Some(prefix)) = (group.at(place), &mut self.prefix) else {
                    continue;
                };
                let Err(known) = prefix.index.insert(key, index, own) else {
                    continue;
                };
                let kind = self.groups.kinds[index as usize];
                if prefix.equal_bits && kind == GroupKind::Full {
                    self.hold(known);
                    self.give_back(own);
                    group.blocks[(place - group.first) as usize] = known;
                    changed.push(Appended {
                        group: index,
                        first: place,
                        blocks: vec![known],
                    });
                }
            }
        }
        table.n_registered = table.n_registered.max(n_full);
        changed
    }

    /// Takes the table by value: it cannot be used or freed again. Blocks that no other table holds are cached where they
    /// are findable, as the tail of what is `written` becomes now, and otherwise free. A step that is still under way may
    /// write slots behind what is written: nobody finds these, and whoever is given the block writes later.
    pub fn release(&mut self, table: BlockTable, written: Option<Written<'_>>) {
        if let Some(written) = written {
            self.register_tail(&table, written);
        }
        let mut groups = table.groups;
        // The last block first, in all groups alike.
        let end = groups.iter().map(GroupTable::end).max().unwrap_or(0);
        for place in (0..end).rev() {
            for group in &mut groups {
                if group.end() == place + 1
                    && let Some(block) = group.blocks.pop_back()
                {
                    self.give_back(block);
                }
            }
        }
    }

    fn register_tail(&mut self, table: &BlockTable, written: Written<'_>) {
        let n_written = written.tokens.len() as u32;
        let place = n_written / self.block_size();
        let tokens = &written.tokens[(place * self.block_size()) as usize..];
        let Some(prefix) = self.prefix.as_mut().filter(|_| !tokens.is_empty()) else {
            return;
        };
        let blocks: Option<Arc<[BlockId]>> =
            table.groups.iter().map(|group| group.at(place)).collect();
        let is_own = |block: &BlockId| self.references[block.0 as usize] == 1;
        let Some(blocks) = blocks.filter(|blocks| blocks.iter().all(is_own)) else {
            return;
        };
        let inserted = prefix
            .index
            .insert_tail(written.chain, place, tokens, blocks);
        if let Err(known) = inserted
            && self.references[known[0].0 as usize] == 0
        {
            // It was used again.
            prefix.tails.remove(known[0]);
            prefix.tails.push_newest(known[0]);
        }
    }

    /// The places that a new table holds in a group.
    fn held_with(&self, kind: GroupKind, n_tokens: u32, hit: &PrefixHit) -> Range<u32> {
        let n_computed = hit.n_tokens(self.block_size());
        self.groups.held(kind, n_computed, n_tokens)
    }

    /// The blocks of a hit that a new table holds in a group.
    fn hit_blocks(
        &self,
        hit: &PrefixHit,
        group: usize,
        held: &Range<u32>,
    ) -> impl Iterator<Item = BlockId> + use<> {
        let blocks = hit.blocks.get(group).map(Vec::as_slice).unwrap_or_default();
        let seen = blocks.get(held.start as usize..).unwrap_or_default();
        let seen: Vec<BlockId> = seen.iter().flatten().copied().collect();
        seen.into_iter()
    }

    /// Adds a reference to a block that a table holds or that is cached.
    fn hold(&mut self, block: BlockId) {
        let references = &mut self.references[block.0 as usize];
        *references += 1;
        self.n_references += 1;
        if *references > 1 {
            return;
        }
        let prefix = self.prefix.as_mut().expect("a cached block");
        match prefix.index.findable(block) {
            Findable::Full => prefix.full.remove(block),
            Findable::Tail(blocks) if blocks[0] == block => prefix.tails.remove(block),
            Findable::Tail(_) => {}
            Findable::No => unreachable!("a block that is held by none and can't be found is free"),
        }
    }

    /// A block for a new content, evicted from the cache where none is free. The caller has counted.
    fn take(&mut self) -> BlockId {
        if self.free.is_empty() {
            self.evict();
        }
        let block = self.free.pop().expect("as many can be had as are needed");
        self.references[block.0 as usize] = 1;
        self.n_references += 1;
        block
    }

    fn evict(&mut self) {
        let Some(prefix) = &mut self.prefix else {
            return;
        };
        if let Some(first) = prefix.tails.pop_oldest() {
            if let Findable::Tail(blocks) = prefix.index.findable(first) {
                self.free.extend(blocks.iter());
            }
            prefix.index.forget(first);
        } else if let Some(block) = prefix.full.pop_oldest() {
            prefix.index.forget(block);
            self.free.push(block);
        }
    }

    fn give_back(&mut self, block: BlockId) {
        let references = &mut self.references[block.0 as usize];
        *references = references
            .checked_sub(1)
            .expect("a block in a table is counted");
        self.n_references -= 1;
        if *references > 0 {
            return;
        }
        let Some(prefix) = &mut self.prefix else {
            self.free.push(block);
            return;
        };
        match prefix.index.findable(block) {
            Findable::No => self.free.push(block),
            Findable::Full => prefix.full.push_newest(block),
            Findable::Tail(blocks) if blocks[0] == block => prefix.tails.push_newest(block),
            Findable::Tail(_) => {}
        }
    }
}

#[cfg(test)]
mod tests;
