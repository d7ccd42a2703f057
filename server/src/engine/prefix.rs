//! The prefix index: which blocks hold the keys and values of which tokens, after which others.
//!
//! Pure: it knows no sequences, no reference counts and no order of eviction. A full block is found by its key, a SHA-256
//! over its tokens and the key of what comes before, so that equal keys mean equal tokens from the first on, of the same
//! model and salt. What is left of a sequence beyond its last full block is its tail: found by its tokens, in all cache
//! groups at once, and copied by whoever uses it.

use std::collections::{BTreeMap, HashMap};
use std::num::NonZeroU32;
use std::ops::Bound;
use std::sync::Arc;

use kvasir_kernels::step::BlockId;
use sha2::{Digest, Sha256};

use super::groups::GroupKind;

/// Names some tokens and all before them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PrefixKey([u8; 32]);

impl PrefixKey {
    /// SHA-256 over the fields, each after its length in bytes (u64, little endian), so that no two lists of fields are one.
    pub fn of_fields(fields: &[&[u8]]) -> Self {
        let mut hash = Sha256::new();
        for field in fields {
            hash.update((field.len() as u64).to_le_bytes());
            hash.update(field);
        }
        Self(hash.finalize().into())
    }

    /// The key of a full block whose tokens follow those of `self`: its fields are the parent and the tokens, u32 in little
    /// endian.
    fn followed_by(&self, tokens: &[u32]) -> Self {
        let mut hash = Sha256::new();
        hash.update((self.0.len() as u64).to_le_bytes());
        hash.update(self.0);
        hash.update((size_of_val(tokens) as u64).to_le_bytes());
        for tokens in tokens.chunks(16) {
            let mut bytes = [0; 64];
            for (bytes, token) in bytes.chunks_exact_mut(4).zip(tokens) {
                bytes.copy_from_slice(&token.to_le_bytes());
            }
            hash.update(&bytes[..size_of_val(tokens)]);
        }
        Self(hash.finalize().into())
    }
}

/// Prefixes are cached: what their keys begin with, and what may be done with duplicates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PrefixCaching {
    /// Names the model, its weights and the numbers that they give.
    pub root: PrefixKey,
    /// Equal keys mean equal bits: a block that was filled may be replaced by another with its key.
    pub equal_bits: bool,
}

/// Whose prefixes a request finds: those of requests with the same of both.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PrefixScope<'a> {
    /// The name of the API key; not empty.
    pub tenant: Option<&'a str>,
    /// What the client sent; not empty.
    pub cache_salt: Option<&'a str>,
}

/// The keys of one sequence's full blocks. Each is hashed once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PrefixChain {
    block_size: usize,
    /// First the key of no tokens, then that of each full block.
    keys: Vec<PrefixKey>,
}

impl PrefixChain {
    /// Of no tokens yet. Sequences of different scopes share nothing.
    pub fn new(root: PrefixKey, scope: PrefixScope<'_>, block_size: NonZeroU32) -> Self {
        let tenant = scope.tenant.unwrap_or_default().as_bytes();
        let salt = scope.cache_salt.unwrap_or_default().as_bytes();
        // An adapter's digest has its field already, so that keys stay what they are when it comes.
        let adapter: &[u8] = &[];
        Self {
            block_size: block_size.get() as usize,
            keys: vec![PrefixKey::of_fields(&[&root.0, adapter, tenant, salt])],
        }
    }

    /// Hashes the full blocks of `tokens`, all of the sequence's, that are not hashed yet.
    pub fn extend(&mut self, tokens: &[u32]) {
        let hashed = (self.keys.len() - 1) * self.block_size;
        let new = tokens.get(hashed..).unwrap_or_default();
        for block in new.chunks_exact(self.block_size) {
            self.keys.push(self.last().followed_by(block));
        }
    }

    /// Full blocks that are hashed.
    pub fn n_blocks(&self) -> u32 {
        self.keys.len() as u32 - 1
    }

    /// The key of what comes before the block at `place`.
    fn before(&self, place: u32) -> PrefixKey {
        self.keys[place as usize]
    }

    /// The key of the full block at `place`.
    pub(super) fn block(&self, place: u32) -> PrefixKey {
        self.keys[place as usize + 1]
    }

    fn last(&self) -> PrefixKey {
        *self.keys.last().expect("the key of no tokens is there")
    }
}

/// The longest beginning of a sequence that the cache holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PrefixHit {
    /// Full blocks before which everything that a query sees is held.
    pub n_blocks: u32,
    /// `[group][place]`: where they are; `None` only behind a window.
    pub(super) blocks: Vec<Vec<Option<BlockId>>>,
    /// What continues them for less than a block, to be copied.
    pub tail: Option<TailHit>,
}

/// A tail whose first tokens are those of a sequence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TailHit {
    /// How many; at least one.
    pub n_tokens: u32,
    /// By group.
    pub(super) blocks: Arc<[BlockId]>,
}

impl PrefixHit {
    /// Its tokens, in blocks of `block_size`.
    pub fn n_tokens(&self, block_size: u32) -> u32 {
        self.n_blocks * block_size + self.tail.as_ref().map_or(0, |tail| tail.n_tokens)
    }
}

/// The tokens of a tail, by which it is found.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct TailKey {
    parent: PrefixKey,
    tokens: Vec<u32>,
}

/// What a block is known to hold.
#[derive(Clone, Debug)]
enum Content {
    /// A full block of this group.
    Full(PrefixKey, u32),
    /// The part of one group in a tail.
    Tail(Arc<TailKey>),
}

/// What a block is to the index.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Findable {
    /// Not at all.
    No,
    /// By its key.
    Full,
    /// With the blocks of the other groups, the first of which speaks for all.
    Tail(Arc<[BlockId]>),
}

/// Blocks by what they hold.
#[derive(Debug)]
pub(super) struct PrefixIndex {
    block_size: u32,
    full: HashMap<(PrefixKey, u32), BlockId>,
    tails: BTreeMap<Arc<TailKey>, Arc<[BlockId]>>,
    /// By block.
    contents: Vec<Option<Content>>,
}

impl PrefixIndex {
    /// Nothing is known of `n_blocks` blocks.
    pub(super) fn new(n_blocks: u32, block_size: NonZeroU32) -> Self {
        Self {
            block_size: block_size.get(),
            // Growing it would hold up a step for milliseconds.
            full: HashMap::with_capacity(n_blocks as usize),
            tails: BTreeMap::new(),
            contents: vec![None; n_blocks as usize],
        }
    }

    /// A block of `group` that holds what `key` names.
    pub(super) fn get(&self, key: PrefixKey, group: u32) -> Option<BlockId> {
        self.full.get(&(key, group)).copied()
    }

    /// Makes a full block findable. One of its key that is so already stays instead, and is returned.
    pub(super) fn insert(
        &mut self,
        key: PrefixKey,
        group: u32,
        block: BlockId,
    ) -> Result<(), BlockId> {
        let known = *self.full.entry((key, group)).or_insert(block);
        if known != block {
            return Err(known);
        }
        self.contents[block.0 as usize] = Some(Content::Full(key, group));
        Ok(())
    }

    /// Makes a tail findable: the last `tokens` of the sequence of `chain`, in `blocks`, one a group. One of the same tokens
    /// that is so already stays instead, and is returned.
    pub(super) fn insert_tail(
        &mut self,
        chain: &PrefixChain,
        place: u32,
        tokens: &[u32],
        blocks: Arc<[BlockId]>,
    ) -> Result<(), Arc<[BlockId]>> {
        let key = Arc::new(TailKey {
            parent: chain.before(place),
            tokens: tokens.to_vec(),
        });
        if let Some(known) = self.tails.get(&key) {
            return Err(Arc::clone(known));
        }
        for block in blocks.iter() {
            self.contents[block.0 as usize] = Some(Content::Tail(Arc::clone(&key)));
        }
        self.tails.insert(key, blocks);
        Ok(())
    }

    /// How a block is found.
    pub(super) fn findable(&self, block: BlockId) -> Findable {
        match &self.contents[block.0 as usize] {
            None => Findable::No,
            Some(Content::Full(..)) => Findable::Full,
            Some(Content::Tail(key)) => Findable::Tail(Arc::clone(&self.tails[key])),
        }
    }

    /// Forgets what a block holds; a tail in all its groups.
    pub(super) fn forget(&mut self, block: BlockId) {
        match self.contents[block.0 as usize].take() {
            None => {}
            Some(Content::Full(key, group)) => drop(self.full.remove(&(key, group))),
            Some(Content::Tail(key)) => {
                let blocks = self.tails.remove(&key).expect("a tail is known once");
                for block in blocks.iter() {
                    self.contents[block.0 as usize] = None;
                }
            }
        }
    }

    /// The longest beginning of `tokens`, of which `most` may be taken from the cache: the greatest block boundary before
    /// which full groups hold everything and windowed groups what a query there sees; beyond it, the tail that agrees
    /// furthest. A group of recurrent states has none, because no state is kept at a boundary.
    pub(super) fn find(
        &self,
        kinds: &[GroupKind],
        chain: &PrefixChain,
        tokens: &[u32],
        most: u32,
    ) -> PrefixHit {
        let mut hit = PrefixHit {
            n_blocks: 0,
            blocks: vec![Vec::new(); kinds.len()],
            tail: None,
        };
        // Of each group, how many blocks before the boundary are held without a gap.
        let mut run = vec![0; kinds.len()];
        'boundary: for place in 0..chain.n_blocks().min(most / self.block_size) {
            let key = chain.block(place);
            let boundary = place + 1;
            let mut is_held = true;
            for ((group, kind), run) in (0..).zip(kinds).zip(&mut run) {
                let block = self.get(key, group);
                hit.blocks[group as usize].push(block);
                *run = if block.is_some() { *run + 1 } else { 0 };
                match kind {
                    GroupKind::Window(window) => {
                        let seen = (boundary * self.block_size + 1).saturating_sub(window.get());
                        is_held &= *run >= boundary - (seen / self.block_size).min(boundary);
                    }
                    GroupKind::Full | GroupKind::State(_) if block.is_none() => break 'boundary,
                    GroupKind::Full | GroupKind::State(_) => {}
                }
            }
            if is_held {
                hit.n_blocks = boundary;
            }
        }
        for blocks in &mut hit.blocks {
            blocks.truncate(hit.n_blocks as usize);
        }
        let start = hit.n_blocks * self.block_size;
        let rest = &tokens[start as usize..most.max(start).min(start + self.block_size) as usize];
        hit.tail = self.find_tail(chain.before(hit.n_blocks), rest);
        hit
    }

    /// Of all tails after `parent`, those next to `tokens` in order have the longest beginning in common with it.
    fn find_tail(&self, parent: PrefixKey, tokens: &[u32]) -> Option<TailHit> {
        let wanted = TailKey {
            parent,
            tokens: tokens.to_vec(),
        };
        let at_most = (Bound::Unbounded, Bound::Included(&wanted));
        let before = self.tails.range::<TailKey, _>(at_most).next_back();
        let above = (Bound::Excluded(&wanted), Bound::Unbounded);
        let after = self.tails.range::<TailKey, _>(above).next();
        let common = |(key, blocks): (&Arc<TailKey>, &Arc<[BlockId]>)| {
            let pairs = key.tokens.iter().zip(tokens);
            let n_equal = pairs.take_while(|(a, b)| a == b).count() as u32;
            (key.parent == parent && n_equal > 0).then(|| TailHit {
                n_tokens: n_equal,
                blocks: Arc::clone(blocks),
            })
        };
        let tails = before.into_iter().chain(after).filter_map(common);
        tails.max_by_key(|tail| tail.n_tokens)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chain(cache_salt: Option<&str>, tokens: &[u32]) -> PrefixChain {
        let scope = PrefixScope {
            tenant: None,
            cache_salt,
        };
        scoped(scope, tokens)
    }

    fn scoped(scope: PrefixScope<'_>, tokens: &[u32]) -> PrefixChain {
        let root = PrefixKey::of_fields(&[b"a model"]);
        let mut chain = PrefixChain::new(root, scope, NonZeroU32::new(4).unwrap());
        chain.extend(tokens);
        chain
    }

    #[test]
    fn keys_say_everything_before_and_nothing_after() {
        let tokens: Vec<u32> = (0..11).collect();
        let whole = chain(None, &tokens);
        assert_eq!(whole.n_blocks(), 2);
        let mut grown = chain(None, &tokens[..3]);
        (4..=11).for_each(|n| grown.extend(&tokens[..n]));
        assert_eq!(whole, grown, "token by token as at once");
        let mut other = tokens.clone();
        other[8] = 99;
        assert_eq!(chain(None, &other), whole, "the last block is not full");
        other[0] = 99;
        assert_ne!(chain(None, &other).block(1), whole.block(1));
        assert_ne!(chain(Some("salt"), &tokens).block(0), whole.block(0));
        assert_ne!(
            PrefixKey::of_fields(&[b"ab", b"c"]),
            PrefixKey::of_fields(&[b"a", b"bc"])
        );
    }

    #[test]
    fn a_key_is_the_hash_of_its_fields() {
        let whole = chain(Some("s"), &[1, 2, 3, 0x0102_0304]);
        let root = PrefixKey::of_fields(&[b"a model"]);
        let first = PrefixKey::of_fields(&[&root.0, b"", b"", b"s"]);
        assert_eq!(whole.before(0), first);
        let of_tenant = scoped(
            PrefixScope {
                tenant: Some("team"),
                cache_salt: Some("s"),
            },
            &[],
        );
        assert_eq!(
            of_tenant.before(0),
            PrefixKey::of_fields(&[&root.0, b"", b"team", b"s"])
        );
        let tokens = [1, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0, 4, 3, 2, 1];
        assert_eq!(
            whole.block(0),
            PrefixKey::of_fields(&[&first.0, tokens.as_slice()])
        );
        let long: Vec<u32> = (0..70).collect();
        let bytes: Vec<u8> = long.iter().flat_map(|token| token.to_le_bytes()).collect();
        assert_eq!(
            first.followed_by(&long),
            PrefixKey::of_fields(&[&first.0, &bytes])
        );
    }
}
