//! The blocks of a replica: held by sequences, kept for what they hold, or free. Prompts are shared in chunks.

use std::collections::{HashMap, VecDeque};

use crate::simulator::hardware::Hardware;

/// Counts of blocks, and what is found again.
#[derive(Debug)]
pub(super) struct Pool {
    blocks: u64,
    chunk_blocks: u64,
    /// Held by sequences, those of shared chunks once.
    active: u64,
    chunks: HashMap<u64, Chunk>,
    /// Chunks that no sequence holds.
    n_cached: u64,
    /// Chunks and their stamps, the first to go first.
    eviction: VecDeque<(u64, u64)>,
    stamp: u64,
}

#[derive(Clone, Copy, Debug, Default)]
struct Chunk {
    holders: u32,
    /// Of its place in the order of eviction, where nobody holds it; an older place is void.
    stamp: Option<u64>,
}

impl Pool {
    pub(super) fn new(hardware: &Hardware) -> Self {
        Self {
            blocks: hardware.blocks.into(),
            chunk_blocks: hardware.blocks_of_a_chunk().into(),
            active: 0,
            chunks: HashMap::new(),
            n_cached: 0,
            eviction: VecDeque::new(),
            stamp: 0,
        }
    }

    /// Blocks that sequences hold.
    pub(super) fn active(&self) -> u64 {
        self.active
    }

    /// Blocks that are kept for what they hold.
    pub(super) fn cached(&self) -> u64 {
        self.n_cached * self.chunk_blocks
    }

    /// Blocks that sequences may take.
    pub(super) fn available(&self) -> u64 {
        self.blocks.saturating_sub(self.active)
    }

    /// A sequence takes blocks of its own.
    pub(super) fn take(&mut self, n: u64) {
        self.active += n;
    }

    /// A sequence gives blocks of its own back.
    pub(super) fn give(&mut self, n: u64) {
        self.active -= n;
    }

    /// The chunk is found.
    pub(super) fn has(&self, id: u64) -> bool {
        self.chunks.contains_key(&id)
    }

    /// The chunk is found, and no sequence holds it.
    pub(super) fn is_cached(&self, id: u64) -> bool {
        (self.chunks.get(&id)).is_some_and(|chunk| chunk.holders == 0)
    }

    /// A sequence holds the chunk, with one block after the other of it found or computed.
    pub(super) fn hold(&mut self, id: u64) {
        let chunk = self.chunks.entry(id).or_default();
        if chunk.holders == 0 {
            self.n_cached -= u64::from(chunk.stamp.take().is_some());
            self.active += self.chunk_blocks;
        }
        chunk.holders += 1;
    }

    /// A sequence lets go of chunks; of them the last is the first to be evicted: a prefix is worth more than what follows.
    pub(super) fn release(&mut self, ids: &[u64]) {
        for id in ids.iter().rev() {
            let Some(chunk) = self.chunks.get_mut(id) else {
                continue;
            };
            chunk.holders -= 1;
            if chunk.holders == 0 {
                self.stamp += 1;
                chunk.stamp = Some(self.stamp);
                self.eviction.push_back((*id, self.stamp));
                self.n_cached += 1;
                self.active -= self.chunk_blocks;
            }
        }
    }

    /// Evicts what the active blocks have no room beside.
    pub(super) fn evict(&mut self) {
        while self.active + self.cached() > self.blocks
            && let Some((id, stamp)) = self.eviction.pop_front()
        {
            let is_its_place = |chunk: &Chunk| chunk.stamp == Some(stamp);
            if self.chunks.get(&id).is_some_and(is_its_place) {
                self.chunks.remove(&id);
                self.n_cached -= 1;
            }
        }
    }
}
