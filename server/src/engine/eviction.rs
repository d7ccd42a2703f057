//! The order of eviction: blocks in the order in which they were let go, the oldest first out. It knows nothing of them but
//! their ids.

use kvasir_kernels::step::BlockId;

/// A doubly linked list over the ids of all blocks: each operation takes constant time and allocates nothing.
#[derive(Debug)]
pub(super) struct EvictionList {
    /// By block, and last the list's own: before the oldest and after the newest.
    links: Vec<Link>,
    len: u32,
}

#[derive(Clone, Copy, Debug)]
struct Link {
    older: u32,
    newer: u32,
}

impl EvictionList {
    /// An empty list for the blocks `0..n_blocks`.
    pub(super) fn new(n_blocks: u32) -> Self {
        let alone = (0..=n_blocks).map(|i| Link { older: i, newer: i });
        Self {
            links: alone.collect(),
            len: 0,
        }
    }

    /// Blocks in it.
    pub(super) fn len(&self) -> u32 {
        self.len
    }

    /// Adds a block that is not in it.
    pub(super) fn push_newest(&mut self, block: BlockId) {
        let end = self.end();
        let newest = self.links[end].older;
        self.links[block.0 as usize] = Link {
            older: newest,
            newer: end as u32,
        };
        self.links[newest as usize].newer = block.0;
        self.links[end].older = block.0;
        self.len += 1;
    }

    /// Removes a block that is in it.
    pub(super) fn remove(&mut self, block: BlockId) {
        let Link { older, newer } = self.links[block.0 as usize];
        self.links[older as usize].newer = newer;
        self.links[newer as usize].older = older;
        self.len -= 1;
    }

    /// Removes the block that has been in it for longest.
    pub(super) fn pop_oldest(&mut self) -> Option<BlockId> {
        let end = self.end();
        let oldest = self.links[end].newer;
        if oldest as usize == end {
            return None;
        }
        self.remove(BlockId(oldest));
        Some(BlockId(oldest))
    }

    fn end(&self) -> usize {
        self.links.len() - 1
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// The brute-force model is a vector.
        #[test]
        fn the_oldest_goes_first(n_blocks in 1..9u32, actions in prop::collection::vec((0..9u32, any::<bool>()), 0..60)) {
            let mut list = EvictionList::new(n_blocks);
            let mut model: Vec<BlockId> = Vec::new();
            for (id, pops) in actions {
                let block = BlockId(id % n_blocks);
                if pops {
                    let oldest = (!model.is_empty()).then(|| model.remove(0));
                    prop_assert_eq!(list.pop_oldest(), oldest);
                } else if let Some(at) = model.iter().position(|other| *other == block) {
                    model.remove(at);
                    list.remove(block);
                } else {
                    model.push(block);
                    list.push_newest(block);
                }
                prop_assert_eq!(list.len() as usize, model.len());
            }
        }
    }
}
