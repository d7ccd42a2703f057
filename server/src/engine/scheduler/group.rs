//! The sequences of one request while they wait, and what they need to run. It looks at the pool and changes nothing there.

use super::beams::Beams;
use super::sequence::Sequence;
use crate::engine::RequestId;
use crate::engine::blocks::BlockPool;
use crate::engine::prefix::PrefixHit;

/// The sequences of a request, which share a prompt. Those that ended are gone from it.
#[derive(Debug)]
pub(super) struct SequenceGroup {
    pub(super) id: RequestId,
    pub(super) sequences: Vec<Sequence>,
    /// Where its sequences are beams.
    pub(super) beams: Option<Beams>,
    /// Its first tokens, which one of the sequences computes for all.
    pub(super) n_shared: u32,
    /// It has run before: what the cache held for it is counted.
    pub(super) is_counted: bool,
    /// What it needs to run, as last looked up.
    pub(super) need: Need,
}

/// What a group needs to run, net of what the prefix cache holds for it.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Need {
    /// Blocks that become active.
    pub(super) n_blocks: u64,
    /// Tokens to compute before all sequences decode.
    pub(super) n_tokens: u64,
    /// Those among them that are prompts'.
    pub(super) n_prompt: u64,
}

impl SequenceGroup {
    /// Some token is under way whose value the host doesn't know.
    pub(super) fn is_pending(&self) -> bool {
        self.sequences.iter().any(Sequence::is_pending)
    }

    /// The tokens that all of its sequences begin with. Of sequences that are sampled only the prompt is taken as such.
    pub(super) fn count_shared(&mut self) {
        let (leader, siblings) = self.split();
        let (known, n_prompt) = (leader.tokens(), leader.n_prompt());
        let n_equal = |sibling: &Sequence| {
            let pairs = known.iter().zip(sibling.tokens());
            pairs.take_while(|(a, b)| a == b).count() as u32
        };
        self.n_shared = match &self.beams {
            Some(_) => siblings.iter().map(n_equal).min().unwrap_or(n_prompt),
            None => n_prompt,
        };
    }

    /// Which answers are left to give.
    pub(super) fn answers(&self) -> Vec<u32> {
        match &self.beams {
            Some(beams) => beams.wanted().collect(),
            None => self.sequences.iter().map(Sequence::index).collect(),
        }
    }

    /// The one that computes what they share, and the others, which fork from it.
    pub(super) fn split(&self) -> (&Sequence, &[Sequence]) {
        self.sequences.split_first().expect("a group has sequences")
    }

    /// Looks up what it needs to run now.
    pub(super) fn look_up(&mut self, blocks: &BlockPool) {
        let (leader, siblings) = self.split();
        let hit = self.find_prefix(blocks);
        let n_cached = hit.n_tokens(blocks.block_size());
        let n_outputs = siblings
            .iter()
            .map(|s| u64::from(s.n_known() - self.n_shared));
        self.need = Need {
            n_blocks: u64::from(blocks.cost(leader.n_known(), &hit).n_blocks)
                + self.n_sibling_blocks(blocks),
            n_tokens: u64::from(leader.n_known() - n_cached) + n_outputs.sum::<u64>(),
            n_prompt: u64::from(leader.n_prompt_after(n_cached)),
        };
    }

    /// Blocks that only one of the siblings will hold.
    pub(super) fn n_sibling_blocks(&self, blocks: &BlockPool) -> u64 {
        let siblings = self.split().1.iter();
        let own = siblings.map(|s| blocks.own_blocks_for(self.n_shared, s.n_known()));
        own.map(u64::from).sum()
    }

    /// What the cache holds for its leader. Where others fork from it, it computes the last token that they share at least.
    pub(super) fn find_prefix(&self, blocks: &BlockPool) -> PrefixHit {
        let (leader, siblings) = self.split();
        let Some(chain) = leader.chain() else {
            return PrefixHit::default();
        };
        let most = match siblings {
            [] => leader.n_cacheable(),
            _ => leader.n_cacheable().min(self.n_shared - 1),
        };
        blocks.find_prefix(chain, leader.tokens(), most)
    }
}
