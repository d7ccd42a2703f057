//! Cache groups: which blocks of which kinds a sequence holds at which moment. Pure arithmetic: it knows no pool.

use std::num::NonZeroU32;
use std::ops::Range;

use kvasir_crds::load_report::PageDemand;

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
    pub(super) block_size: NonZeroU32,
    /// Tokens of the longest prefill chunk.
    pub(super) max_chunk: u32,
    pub(super) kinds: Vec<GroupKind>,
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

    /// A group keeps recurrent states.
    pub(super) fn has_states(&self) -> bool {
        let mut kinds = self.kinds.iter();
        kinds.any(|kind| matches!(kind, GroupKind::State(_)))
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

    /// Blocks that a sequence of `n_tokens` tokens has of its own whose first `n_shared` are another's: full groups share
    /// their full blocks.
    pub fn own_blocks_for(&self, n_shared: u32, n_tokens: u32) -> u32 {
        let kinds = self.kinds.iter();
        let own = kinds.map(|&kind| self.own(kind, n_shared, n_tokens).len() as u32);
        own.fold(0, u32::saturating_add)
    }

    /// The places of these.
    pub(super) fn own(&self, kind: GroupKind, n_shared: u32, n_tokens: u32) -> Range<u32> {
        let held = self.held(kind, n_shared, n_tokens);
        match kind {
            GroupKind::Full => n_shared / self.block_size.get()..held.end,
            GroupKind::Window(_) | GroupKind::State(_) => held,
        }
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
    pub(super) fn held(&self, kind: GroupKind, n_computed: u32, n_tokens: u32) -> Range<u32> {
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
