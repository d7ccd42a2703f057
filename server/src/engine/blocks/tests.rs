//! The pool against brute force: what every slot really holds is kept beside it, page by page, and each read, each hit and
//! each eviction is compared with that.

use std::collections::{BTreeSet, HashMap};
use std::num::NonZeroU32;

use proptest::prelude::*;

use super::*;
use crate::engine::prefix::{PrefixKey, PrefixScope};

/// What happens to a pool; the indices choose among the live tables.
#[derive(Clone, Debug)]
enum Action {
    /// A sequence that begins with so many tokens of a beginning that others share, and goes on alone.
    Allocate {
        n_shared: u32,
        n_own: u32,
    },
    /// Compute a chunk of at most so many tokens, or decode one where all are computed.
    Advance(usize, u32),
    Release(usize),
}

fn action() -> impl Strategy<Value = Action> {
    prop_oneof![
        2 => (0..30u32, 1..12u32).prop_map(|(n_shared, n_own)| Action::Allocate { n_shared, n_own }),
        5 => (any::<usize>(), 1..9u32).prop_map(|(i, n)| Action::Advance(i, n)),
        2 => any::<usize>().prop_map(Action::Release),
    ]
}

fn kind() -> impl Strategy<Value = GroupKind> {
    let positive = |n| NonZeroU32::new(n).unwrap();
    prop_oneof![
        4 => Just(GroupKind::Full),
        4 => (1..14u32).prop_map(move |n| GroupKind::Window(positive(n))),
        1 => (1..3u32).prop_map(move |n| GroupKind::State(positive(n))),
    ]
}

fn caching() -> impl Strategy<Value = Option<PrefixCaching>> {
    let root = PrefixKey::of_fields(&[b"test"]);
    let on = any::<bool>().prop_map(move |equal_bits| PrefixCaching { root, equal_bits });
    prop::option::weighted(0.8, on)
}

/// What a slot holds: a group's part of the last of these tokens, after the others.
type Slot = Option<(usize, Vec<u32>)>;

struct Live {
    table: BlockTable,
    chain: PrefixChain,
    tokens: Vec<u32>,
    /// The prompt, and what was decoded.
    n_known: u32,
    n_computed: u32,
    /// Computed by steps that were collected.
    n_written: u32,
}

struct Model {
    pool: BlockPool,
    pages: Vec<Vec<Slot>>,
    tables: Vec<Live>,
    root: Option<PrefixKey>,
    n_started: u32,
    /// Cached full blocks, the one that was let go first at the front.
    order: Vec<BlockId>,
    /// Blocks of the tail that the newest sequence copied.
    copied_tail: BTreeSet<BlockId>,
}

impl Model {
    fn size(&self) -> u32 {
        self.pool.block_size()
    }

    fn kinds(&self) -> Vec<GroupKind> {
        self.pool.groups.kinds.clone()
    }

    fn findable(&self, block: BlockId) -> Findable {
        let prefix = self.pool.prefix.as_ref();
        prefix.map_or(Findable::No, |prefix| prefix.index.findable(block))
    }

    fn all_blocks(&self) -> impl Iterator<Item = BlockId> + use<> {
        (0..self.pages.len() as u32).map(BlockId)
    }

    /// Findable full blocks that hold the tokens of `place` in the sequence of `tokens`.
    fn has_full(&self, group: usize, tokens: &[u32], place: u32) -> bool {
        let size = self.size();
        self.all_blocks().any(|block| {
            self.findable(block) == Findable::Full
                && (place * size..(place + 1) * size).all(|p| {
                    let want = Some((group, tokens[..=p as usize].to_vec()));
                    self.pages[block.0 as usize][(p % size) as usize] == want
                })
        })
    }

    /// The longest beginning of `tokens` that is in the cache, at most `most`, by looking at every block: full blocks, and
    /// tokens of a tail behind them.
    fn longest_hit(&self, tokens: &[u32], most: u32) -> (u32, u32) {
        let (size, kinds) = (self.size(), self.kinds());
        if self.pool.prefix.is_none() {
            return (0, 0);
        }
        let is_held = |&boundary: &u32| {
            kinds.iter().enumerate().all(|(group, kind)| {
                let mut places = match kind {
                    GroupKind::Full => 0..boundary,
                    GroupKind::Window(window) => {
                        let seen = (boundary * size + 1).saturating_sub(window.get());
                        (seen / size).min(boundary)..boundary
                    }
                    GroupKind::State(_) => return boundary == 0,
                };
                places.all(|place| self.has_full(group, tokens, place))
            })
        };
        let n_blocks = (0..=most / size).rev().find(is_held).unwrap();
        let tail = self.all_blocks().map(|block| {
            let is_tail =
                matches!(self.findable(block), Findable::Tail(blocks) if blocks[0] == block);
            let n_left = if is_tail { most - n_blocks * size } else { 0 };
            let agrees = |slot: &u32| {
                let p = n_blocks * size + slot;
                let want = Some((0, tokens[..=p as usize].to_vec()));
                self.pages[block.0 as usize][*slot as usize] == want
            };
            (0..n_left.min(size)).take_while(agrees).count() as u32
        });
        (n_blocks, tail.max().unwrap_or(0))
    }

    fn allocate(&mut self, n_shared: u32, n_own: u32) -> Result<(), TestCaseError> {
        self.n_started += 1;
        let own = (0..n_own).map(|p| (self.n_started * 7 + p * 3) % 5);
        let tokens: Vec<u32> = (0..n_shared).map(|p| p % 4).chain(own).collect();
        let n_tokens = tokens.len() as u32;
        let root = self.root.unwrap_or(PrefixKey::of_fields(&[]));
        let mut chain = PrefixChain::new(root, PrefixScope::default(), self.pool.groups.block_size);
        chain.extend(&tokens);
        let hit = self.pool.find_prefix(&chain, &tokens, n_tokens - 1);
        let tail = hit.tail.as_ref().map_or(0, |tail| tail.n_tokens);
        prop_assert_eq!(
            (hit.n_blocks, tail),
            self.longest_hit(&tokens, n_tokens - 1)
        );
        let copied = hit.tail.iter().flat_map(|tail| tail.blocks.iter().copied());
        self.copied_tail = copied.collect();
        let cost = self.pool.cost(n_tokens, &hit);
        let (available, before) = (self.pool.n_available(), self.pool.counts());
        if cost.n_sources == 0 {
            prop_assert!(cost.n_blocks <= self.pool.blocks_for(n_tokens));
        }
        let Some(allocation) = self.pool.allocate(n_tokens, &hit) else {
            prop_assert!(
                cost.n_blocks + cost.n_sources > available,
                "refused though it fits"
            );
            prop_assert_eq!(before, self.pool.counts(), "nothing changed");
            return Ok(());
        };
        prop_assert!(cost.n_blocks + cost.n_sources <= available);
        let (sources, copies): (BTreeSet<_>, BTreeSet<_>) =
            allocation.copies.iter().copied().unzip();
        prop_assert_eq!(
            copies.len(),
            allocation.copies.len(),
            "no destination twice"
        );
        prop_assert!(copies.is_disjoint(&sources), "no destination is a source");
        for &(from, to) in &allocation.copies {
            self.pages[to.0 as usize] = self.pages[from.0 as usize].clone();
        }
        self.pool.release_sources();
        prop_assert_eq!(self.pool.counts().active, before.active + cost.n_blocks);
        let n_cached = hit.n_tokens(self.size());
        self.tables.push(Live {
            table: allocation.table,
            chain,
            n_known: n_tokens,
            n_computed: n_cached,
            n_written: n_cached,
            tokens,
        });
        Ok(())
    }

    /// A step over some tokens of one sequence: what it touches is held, it writes to blocks that nobody else holds, and
    /// reads what its own tokens left, whoever wrote it. The step before it is collected then, or this one too.
    fn advance(&mut self, i: usize, n: u32, is_collected: bool) -> Result<(), TestCaseError> {
        let (size, kinds) = (self.size(), self.kinds());
        let available = self.pool.counts().free + self.pool.counts().cached;
        let live = &mut self.tables[i];
        let is_chunk = live.n_computed < live.n_known;
        let start = live.n_computed;
        let end = match is_chunk {
            true => (start + n.min(self.pool.groups.max_chunk)).min(live.n_known),
            false => start + 1,
        };
        let known = end.max(live.n_known);
        let before: Vec<BlockId> = live.table.blocks().collect();
        if self.pool.extend(&mut live.table, start, known).is_none() {
            prop_assert!(
                !is_chunk,
                "a chunk has its blocks since its sequence was admitted"
            );
            prop_assert!(available < kinds.len() as u32, "refused though it fits");
            prop_assert_eq!(
                before,
                live.table.blocks().collect::<Vec<_>>(),
                "nothing changed"
            );
            return Ok(());
        }
        if !is_chunk {
            live.tokens.push((start + self.n_started) % 3);
            live.n_known = known;
        }
        for (group, kind) in kinds.iter().enumerate() {
            let held = &live.table.groups[group];
            if let GroupKind::State(n) = kind {
                prop_assert_eq!((held.first, held.end()), (0, n.get()));
                continue;
            }
            for p in start..end {
                let block = held.at(p / size).unwrap();
                prop_assert_eq!(
                    self.pool.references[block.0 as usize],
                    1,
                    "a shared block is written"
                );
                let prefix = live.tokens[..=p as usize].to_vec();
                self.pages[block.0 as usize][(p % size) as usize] = Some((group, prefix));
            }
            for q in start..end {
                let first = match kind {
                    GroupKind::Window(window) => (q + 1).saturating_sub(window.get()),
                    _ => 0,
                };
                for p in first..=q {
                    let block = held.at(p / size).unwrap();
                    let found = &self.pages[block.0 as usize][(p % size) as usize];
                    let want = Some((group, live.tokens[..=p as usize].to_vec()));
                    prop_assert_eq!(found, &want, "{:?}: position {} at {}", kind, p, q);
                }
            }
        }
        live.n_written = if is_collected { end } else { start };
        live.n_computed = end;
        live.chain.extend(&live.tokens);
        let changed = self.pool.register(
            &mut live.table,
            Written {
                chain: &live.chain,
                tokens: &live.tokens[..live.n_written as usize],
            },
        );
        for Appended {
            group,
            first,
            blocks,
        } in changed
        {
            prop_assert_eq!(live.table.groups[group as usize].at(first), Some(blocks[0]));
        }
        Ok(())
    }

    /// Nobody may rely on what stands behind the last slot that was written for certain.
    fn forget_unwritten(&mut self, live: &Live) {
        let size = self.size();
        let (place, n_slots) = (live.n_written / size, live.n_written % size);
        for block in live.table.groups.iter().filter_map(|group| group.at(place)) {
            self.pages[block.0 as usize][n_slots as usize..].fill(None);
        }
    }

    /// No block is lost or in two states, and cached is what can be found.
    fn check(&self) -> Result<(), TestCaseError> {
        let mut references: HashMap<BlockId, u32> = HashMap::new();
        let held = self.tables.iter().flat_map(|live| live.table.blocks());
        held.for_each(|block| *references.entry(block).or_default() += 1);
        let free: BTreeSet<BlockId> = self.pool.free.iter().copied().collect();
        prop_assert_eq!(free.len(), self.pool.free.len(), "no block is free twice");
        let mut n_cached = 0;
        for block in self.all_blocks() {
            let n = references.get(&block).copied().unwrap_or(0);
            prop_assert_eq!(self.pool.references[block.0 as usize], n, "{:?}", block);
            let (is_free, is_findable) =
                (free.contains(&block), self.findable(block) != Findable::No);
            prop_assert!(
                !(is_free && (is_findable || n > 0)),
                "{:?} is free and more",
                block
            );
            prop_assert!(is_free || is_findable || n > 0, "{:?} is lost", block);
            n_cached += u32::from(!is_free && n == 0);
        }
        let counts = self.pool.counts();
        prop_assert_eq!(counts.cached, n_cached);
        prop_assert_eq!(counts.active as usize, references.len());
        prop_assert_eq!(counts.unshared, references.values().sum::<u32>());
        prop_assert_eq!(counts.total, counts.active + counts.cached + counts.free);
        prop_assert!(self.pool.sources.is_empty());
        Ok(())
    }

    fn is_cached(&self, block: BlockId) -> bool {
        self.pool.references[block.0 as usize] == 0 && self.findable(block) == Findable::Full
    }

    /// Since `tails` were cached, those were evicted that were let go first, and no full block while a tail was left.
    fn check_evictions(
        &mut self,
        tails: &BTreeSet<BlockId>,
        released: &[BlockId],
    ) -> Result<(), TestCaseError> {
        let is_evicted = |block: &BlockId| self.findable(*block) != Findable::Full;
        let newest_evicted = self.order.iter().rposition(is_evicted);
        if let Some(newest) = newest_evicted {
            let stayed = self.order[..newest]
                .iter()
                .find(|block| self.is_cached(**block));
            prop_assert_eq!(stayed, None, "let go before one that was evicted");
            let is_left = |block: &&BlockId| {
                matches!(self.findable(**block), Findable::Tail(_))
                    && self.pool.references[block.0 as usize] == 0
            };
            let left = tails.difference(&self.copied_tail).find(is_left);
            prop_assert_eq!(left, None, "a tail outlived a full block");
        }
        let mut order: Vec<BlockId> = self
            .order
            .iter()
            .copied()
            .filter(|&b| self.is_cached(b))
            .collect();
        let known: BTreeSet<BlockId> = order.iter().copied().collect();
        let new = released
            .iter()
            .copied()
            .filter(|&b| self.is_cached(b) && !known.contains(&b));
        order.extend(new);
        self.order = order;
        let n_full = self
            .all_blocks()
            .filter(|&block| self.is_cached(block))
            .count();
        prop_assert_eq!(n_full, self.order.len(), "what is let go is known");
        Ok(())
    }

    /// A table's blocks in the order in which it lets them go.
    fn last_first(table: &BlockTable) -> Vec<BlockId> {
        let end = table.groups.iter().map(GroupTable::end).max().unwrap_or(0);
        let places = (0..end).rev();
        places
            .flat_map(|place| table.groups.iter().filter_map(move |group| group.at(place)))
            .collect()
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]
    /// A block is free, active or cached, of any kind of group; what a step touches is held, what it reads is its own; hits
    /// are the longest there are; and evictions come in order.
    #[test]
    fn every_read_finds_its_own_and_every_hit_is_the_longest(
        n_blocks in 0..60u32,
        block_size in 1..6u32,
        max_chunk in 1..9u32,
        kinds in prop::collection::vec(kind(), 1..4),
        caching in caching(),
        late in any::<bool>(),
        actions in prop::collection::vec(action(), 0..80),
    ) {
        let groups = CacheGroups::new(NonZeroU32::new(block_size).unwrap(), max_chunk, kinds);
        let mut model = Model {
            pool: BlockPool::new(n_blocks, groups, caching),
            pages: vec![vec![None; block_size as usize]; n_blocks as usize],
            tables: Vec::new(),
            root: caching.map(|caching| caching.root),
            n_started: 0,
            order: Vec::new(),
            copied_tail: BTreeSet::new(),
        };
        for action in actions {
            let is_idle_tail = |block: &BlockId| {
                matches!(model.findable(*block), Findable::Tail(_)) && model.pool.references[block.0 as usize] == 0
            };
            let tails: BTreeSet<BlockId> = model.all_blocks().filter(is_idle_tail).collect();
            let n = model.tables.len();
            let mut released = Vec::new();
            model.copied_tail.clear();
            match action {
                Action::Allocate { n_shared, n_own } => model.allocate(n_shared, n_own)?,
                Action::Advance(i, n_tokens) if n > 0 => {
                    released = model.tables[i % n].table.groups.iter().flat_map(|group| group.blocks.iter().copied()).collect();
                    model.advance(i % n, n_tokens, !late)?;
                }
                Action::Release(i) if n > 0 => {
                    let live = model.tables.swap_remove(i % n);
                    model.forget_unwritten(&live);
                    released = Model::last_first(&live.table);
                    let Live { table, chain, tokens, n_written, .. } = live;
                    let tokens = &tokens[..n_written as usize];
                    model.pool.release(table, Some(Written { chain: &chain, tokens }));
                }
                Action::Advance(..) | Action::Release(..) => {}
            }
            model.check()?;
            model.check_evictions(&tails, &released)?;
        }
    }
}

#[test]
fn what_was_let_go_is_found_and_what_is_found_is_shared() {
    let groups = CacheGroups::new(NonZeroU32::new(4).unwrap(), 64, vec![GroupKind::Full]);
    let root = PrefixKey::of_fields(&[b"test"]);
    let caching = PrefixCaching {
        root,
        equal_bits: true,
    };
    let mut pool = BlockPool::new(12, groups.clone(), Some(caching));
    let tokens: Vec<u32> = (0..10).collect();
    let mut chain = PrefixChain::new(root, PrefixScope::default(), groups.block_size());
    chain.extend(&tokens);
    let written = Written {
        chain: &chain,
        tokens: &tokens,
    };
    let start = |pool: &mut BlockPool| {
        let hit = pool.find_prefix(&chain, &tokens, 9);
        let n_tokens = hit.n_tokens(4);
        let allocation = pool.allocate(10, &hit).unwrap();
        pool.release_sources();
        (allocation, n_tokens)
    };
    let counts = |pool: &BlockPool| {
        (
            pool.counts().active,
            pool.counts().cached,
            pool.counts().free,
        )
    };
    // Two that begin at once compute everything; when the blocks of the second fill, it takes those of the first.
    let ((mut first, cold), (mut second, as_cold)) = (start(&mut pool), start(&mut pool));
    assert_eq!((cold, as_cold, counts(&pool)), (0, 0, (6, 0, 6)));
    assert!(pool.register(&mut first.table, written).is_empty());
    assert_eq!(pool.register(&mut second.table, written).len(), 2);
    assert_eq!(counts(&pool), (4, 0, 8), "two blocks have two holders");
    let (third, warm) = start(&mut pool);
    assert_eq!((warm, third.copies.len(), counts(&pool)), (8, 0, (5, 0, 7)));
    for table in [first.table, second.table, third.table] {
        pool.release(table, Some(written));
    }
    assert_eq!(counts(&pool), (0, 3, 9), "two full blocks and one tail");
    let (fourth, warm) = start(&mut pool);
    assert_eq!((warm, fourth.copies.len()), (9, 1), "a tail is copied");
    assert_eq!(counts(&pool), (3, 1, 8));
    pool.release(fourth.table, None);
    // Ten blocks leave room for two cached ones: the tail goes, and the full blocks stay.
    let other = pool.allocate(40, &PrefixHit::default()).unwrap();
    assert_eq!(pool.find_prefix(&chain, &tokens, 9).n_tokens(4), 8);
    pool.release(other.table, None);
    let other = pool.allocate(44, &PrefixHit::default()).unwrap();
    assert_eq!(
        pool.find_prefix(&chain, &tokens, 9).n_tokens(4),
        4,
        "the last goes first"
    );
    pool.release(other.table, None);
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
    let mut pool = BlockPool::new(20_000, groups.clone(), None);
    let n_tokens = 32_768;
    let mut table = pool
        .allocate(n_tokens, &PrefixHit::default())
        .unwrap()
        .table;
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
    pool.release(table, None);
    assert_eq!(pool.counts().free, 20_000);
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
