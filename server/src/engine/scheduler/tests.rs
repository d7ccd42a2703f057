//! The scheduler against a device that checks everything: tiny pools, random arrivals, lengths and aborts.
//!
//! The device "computes" a token from all tokens before it, and reads in every cache group, full, windowed or of recurrent
//! states, what a real one would read, through the block tables. A stale row, a slot that is not written or written for
//! other tokens or another salt, a token at a wrong position: each is found where it is read. The oracle sees one request
//! alone.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::num::NonZeroU32;

use kvasir_kernels::step::{
    BlockId, LogitsEdit, LogitsRequest, Sampled, SamplingParams, TokenInput,
};
use proptest::prelude::*;

use super::*;
use crate::engine::beam::BeamSearch;
use crate::engine::beam::tests::{logprobs, most_likely, run as run_search};
use crate::engine::constraint::Constraint;
use crate::engine::groups::{CacheGroups, GroupKind};
use crate::engine::logits::{LogitsOptions, LogitsProcessors};
use crate::engine::prefix::{PrefixCaching, PrefixKey, PrefixScope};
use crate::engine::{BeamParams, EarlyStopping};

mod beams;
mod memory;

const VOCABULARY: u32 = 11;
const STOP: u32 = 7;

/// The token after `tokens`, as output `index` of a request with this seed: of those that `may` come the first from a place
/// that depends on all that was, and on what stands for the arithmetic of edits.
fn next_token(
    tokens: &[u32],
    (seed, index): (u64, u32),
    digest: u64,
    may: impl Fn(u32) -> bool,
) -> u32 {
    let hash = tokens
        .iter()
        .fold(seed ^ u64::from(index) << 32 ^ digest, |hash, &token| {
            (hash ^ u64::from(token))
                .wrapping_mul(0x9E37_79B9_7F4A_7C15)
                .rotate_left(23)
        });
    let first = (hash >> 17) as u32 % VOCABULARY;
    let mut tokens = (0..VOCABULARY).map(|i| (first + i) % VOCABULARY);
    tokens.find(|&token| may(token)).unwrap()
}

/// Stands for penalties: each token seen and its count.
fn digest(seen: impl Iterator<Item = (u32, u32)>) -> u64 {
    let each = seen.map(|(token, n)| {
        (u64::from(token) << 32 | u64::from(n) << 8 | 1).wrapping_mul(0xD1B5_4A32_D192_ED03)
    });
    each.fold(0, u64::wrapping_add)
}

/// What a request changes in its logits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Changes {
    Nothing,
    Penalties,
    /// And no stop token among the first three.
    BadWords,
    Allowed,
    /// Even and odd tokens by turns.
    Constraint,
}

const BAD_WORDS: [&[u32]; 3] = [&[1], &[2, 3], &[4, 4, 0]];
const ALLOWED: [u32; 5] = [0, 3, 5, 7, 9];

/// Even and odd tokens by turns; counts for itself what it was told.
#[derive(Clone, Debug)]
struct Alternating(u32);

impl Constraint for Alternating {
    fn advance(&mut self, token: u32) {
        assert_eq!(token % 2, self.0 % 2);
        self.0 += 1;
    }

    fn fill_mask(&mut self, mask: &mut [u32]) {
        mask[0] = 0b101_0101_0101 << (self.0 % 2);
    }

    fn fork(&self) -> Box<dyn Constraint> {
        Box::new(self.clone())
    }
}

impl Changes {
    fn options(self) -> LogitsOptions {
        let options = LogitsOptions::default();
        match self {
            Self::Nothing => options,
            Self::Penalties => LogitsOptions {
                repetition_penalty: 1.1,
                ..options
            },
            Self::BadWords => LogitsOptions {
                bad_words: BAD_WORDS.map(<[u32]>::to_vec).to_vec(),
                min_tokens: 3,
                ..options
            },
            Self::Allowed => LogitsOptions {
                allowed_token_ids: ALLOWED.to_vec(),
                ..options
            },
            Self::Constraint => LogitsOptions {
                constraint: Some(Box::new(Alternating(0))),
                ..options
            },
        }
    }

    /// By definition, from all that was.
    fn oracle(self, prompt: &[u32], outputs: &[u32], stops: &[u32], token: u32) -> bool {
        let longer = [outputs, &[token]].concat();
        assert!(!prompt.is_empty());
        match self {
            Self::Nothing | Self::Penalties => true,
            Self::BadWords => {
                !BAD_WORDS.iter().any(|word| longer.ends_with(word))
                    && (outputs.len() >= 3 || !stops.contains(&token))
            }
            Self::Allowed => ALLOWED.contains(&token),
            Self::Constraint => token % 2 == outputs.len() as u32 % 2,
        }
    }

    fn oracle_digest(self, prompt: &[u32], outputs: &[u32]) -> u64 {
        if self != Self::Penalties {
            return 0;
        }
        let count = |of: &[u32], token| of.iter().filter(|t| **t == token).count() as u32;
        let seen = (0..VOCABULARY).filter(|t| prompt.contains(t) || outputs.contains(t));
        digest(seen.map(|token| (token, count(outputs, token))))
    }
}

/// What a sequence of a request must give: its outputs and how it ends.
fn oracle(request: &Request, changes: Changes, sequence: u32, max_model_len: u32) -> Received {
    let mut tokens = request.prompt.clone();
    let n_prompt = tokens.len();
    let n_outputs = request.max_tokens.min(max_model_len - n_prompt as u32);
    if let Some(beams) = request.beams.filter(|_| n_outputs > 0) {
        return beam_oracle(request, beams, n_outputs).swap_remove(sequence as usize);
    }
    let mut finished = FinishReason::Length;
    for index in 0..n_outputs {
        let seed = request.sampling.seed + u64::from(sequence);
        let (prompt, outputs) = tokens.split_at(n_prompt);
        let digest = changes.oracle_digest(prompt, outputs);
        let may = |token| changes.oracle(prompt, outputs, &request.stop_token_ids, token);
        let token = next_token(&tokens, (seed, index), digest, may);
        tokens.push(token);
        if request.stop_token_ids.contains(&token) {
            finished = FinishReason::Stop(token);
            break;
        }
    }
    Received {
        tokens: tokens.split_off(n_prompt),
        finished: Some(finished),
        ..Received::default()
    }
}

/// What a search over whole rows of logits gives, without a scheduler.
fn beam_oracle(request: &Request, beams: BeamParams, n_outputs: u32) -> Vec<Received> {
    let stops = request.stop_token_ids.clone();
    let search = BeamSearch::new(beams, stops, n_outputs, request.logprobs);
    let expand = |outputs: &[u32]| {
        let context = [&request.prompt, outputs].concat();
        most_likely(&logprobs(0, &context, VOCABULARY), VOCABULARY as usize)
    };
    let answers = run_search(search, request.n.get() as usize, expand).into_iter();
    let received = answers.map(|answer| Received {
        scores: Vec::new(),
        tokens: answer.tokens.iter().map(|token| token.token).collect(),
        finished: Some(answer.finished),
        beam_score: Some(answer.score),
    });
    received.collect()
}

/// What a device makes of an edit.
fn sample_edited(context: &[u32], of: (u64, u32), edit: &LogitsEdit) -> u32 {
    let may = |token: u32| {
        let allowed = edit.allowed.as_ref().is_none_or(|m| m[0] >> token & 1 == 1);
        allowed && edit.biases.iter().all(|bias| bias.token != token)
    };
    let seen = edit.penalties.iter().flat_map(|p| p.seen.iter());
    let digest = digest(seen.map(|seen| (seen.token, seen.n_outputs)));
    next_token(context, of, digest, may)
}

/// What a slot or a state of the cache holds: what was written, after what, and when. No two writes are at one time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Write {
    /// All tokens before and the salt.
    prefix: u64,
    token: u32,
    serial: u64,
}

impl Write {
    /// The same tokens after the same ones: their keys and values are equal.
    fn is_like(&self, other: &Self) -> bool {
        (self.prefix, self.token) == (other.prefix, other.token)
    }
}

/// The prefix of what follows `before`, in a sequence with this salt.
fn prefix(salt: Option<&str>, before: Option<&Write>) -> u64 {
    let salt = salt.map_or(1, |salt| 2 + salt.len() as u64);
    before.map_or(salt, |before| {
        let mixed = (before.prefix ^ u64::from(before.token)).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        mixed.rotate_left(29) + 1
    })
}

/// A block as its group uses it.
#[derive(Clone, Debug)]
enum Page {
    /// By slot.
    Tokens(Vec<Option<Write>>),
    /// A recurrent state: all tokens that it has seen.
    State(Vec<Write>),
}

/// Stands in a table where a row has no block.
const NONE: BlockId = BlockId(u32::MAX);

/// A device that runs its steps in order, at once, and hands out their results when asked. Whatever a real one would read
/// is compared with what the row's own tokens would have left there.
struct CheckingDevice {
    block_size: usize,
    limits: Limits,
    kinds: Vec<GroupKind>,
    /// `None`: never written.
    pages: Vec<Option<Page>>,
    /// `[group][row]`
    tables: Vec<Vec<Vec<BlockId>>>,
    /// Salt and tokens of each row's sequence, those included that it found in the cache.
    contexts: Vec<(Option<String>, Vec<Write>)>,
    /// A block may be replaced by another of the same content.
    equal_bits: bool,
    /// When what each row read in a group at a position was written, where only the very same may stand.
    seen: HashMap<(usize, usize, usize), u64>,
    n_written: u64,
    previous: Vec<u32>,
    /// Row and position of each row of logits of the step that was submitted and not sampled.
    unsampled: Option<Vec<(usize, usize)>>,
    results: VecDeque<DeviceOutput>,
}

impl CheckingDevice {
    fn new(setting: &Setting) -> Self {
        let rows = setting.limits.max_sequences;
        Self {
            block_size: setting.block_size as usize,
            limits: setting.limits,
            kinds: setting.kinds.clone(),
            pages: vec![None; setting.n_blocks as usize],
            tables: vec![vec![Vec::new(); rows]; setting.kinds.len()],
            contexts: vec![(None, Vec::new()); rows],
            equal_bits: setting.caching.is_none_or(|caching| caching.equal_bits),
            seen: HashMap::new(),
            n_written: 0,
            previous: Vec::new(),
            unsampled: None,
            results: VecDeque::new(),
        }
    }

    /// A row begins with a sequence of which the cache holds `found`.
    fn admit(&mut self, row: TableRow, salt: Option<String>, found: &[u32]) {
        let row = row.0 as usize;
        let mut context: Vec<Write> = Vec::new();
        for &token in found {
            context.push(Write {
                prefix: prefix(salt.as_deref(), context.last()),
                token,
                serial: 0,
            });
        }
        self.contexts[row] = (salt, context);
        self.tables
            .iter_mut()
            .for_each(|tables| tables[row].clear());
        self.seen.retain(|(of, ..), _| *of != row);
    }

    fn copy(&mut self, copies: &[(BlockId, BlockId)]) {
        let sources: HashSet<BlockId> = copies.iter().map(|copy| copy.0).collect();
        let destinations: HashSet<BlockId> = copies.iter().map(|copy| copy.1).collect();
        assert_eq!(destinations.len(), copies.len(), "no destination twice");
        assert!(sources.is_disjoint(&destinations), "none is a source too");
        for &(from, to) in copies {
            self.pages[to.0 as usize] = self.pages[from.0 as usize].clone();
        }
    }

    fn update_tables(&mut self, input: &StepInput) {
        for update in &input.table_updates {
            let row = update.row.0 as usize;
            let table = &mut self.tables[update.group as usize][row];
            let first = update.first as usize;
            let end = first + update.blocks.len();
            table.resize(table.len().max(end), NONE);
            table[first..end].copy_from_slice(&update.blocks);
        }
    }

    /// Asserts that a query at `position` sees in every group what its row wrote.
    fn read(&mut self, row: usize, position: usize) {
        let context = &self.contexts[row].1;
        for (group, (kind, tables)) in self.kinds.iter().zip(&self.tables).enumerate() {
            let first = match kind {
                GroupKind::Full => 0,
                GroupKind::Window(window) => (position + 1).saturating_sub(window.get() as usize),
                GroupKind::State(_) => continue,
            };
            for (seen, written) in context.iter().enumerate().take(position + 1).skip(first) {
                let block = tables[row][seen / self.block_size];
                let Some(Page::Tokens(slots)) = &self.pages[block.0 as usize] else {
                    panic!("{kind:?}: a block that holds no tokens is read");
                };
                let found =
                    slots[seen % self.block_size].expect("a slot that is not written is read");
                assert!(
                    found.is_like(written),
                    "{kind:?}: position {seen} at {position}: {found:?}, not {written:?}"
                );
                let first_seen = self.seen.entry((row, group, seen)).or_insert(found.serial);
                assert!(
                    self.equal_bits || *first_seen == found.serial,
                    "{kind:?}: position {seen} was replaced"
                );
            }
        }
    }

    /// Writes a token in every group; a state is read before it is written.
    fn write(&mut self, row: usize, token: u32) {
        let (salt, context) = &self.contexts[row];
        let position = context.len();
        self.n_written += 1;
        let written = Write {
            prefix: prefix(salt.as_deref(), context.last()),
            token,
            serial: self.n_written,
        };
        for (kind, tables) in self.kinds.iter().zip(&self.tables) {
            if let GroupKind::State(n) = kind {
                let blocks = &tables[row];
                assert_eq!(blocks.len(), n.get() as usize, "all of a state has blocks");
                for block in blocks {
                    let page = &mut self.pages[block.0 as usize];
                    let mut state = match page.take() {
                        Some(Page::State(state)) if position > 0 => state,
                        _ => Vec::new(),
                    };
                    let is_own = state.len() == context.len()
                        && state.iter().zip(context).all(|(a, b)| a.is_like(b));
                    assert!(is_own, "the state of another sequence, or none");
                    state.push(written);
                    *page = Some(Page::State(state));
                }
                continue;
            }
            let page = &mut self.pages[tables[row][position / self.block_size].0 as usize];
            if !matches!(page, Some(Page::Tokens(_))) {
                *page = Some(Page::Tokens(vec![None; self.block_size]));
            }
            if let Some(Page::Tokens(slots)) = page {
                slots[position % self.block_size] = Some(written);
            }
        }
        self.contexts[row].1.push(written);
    }

    fn submit(&mut self, schedule: &Schedule) {
        let Schedule {
            input, requests, ..
        } = schedule;
        assert!(
            self.unsampled.is_none(),
            "the step before was sampled first"
        );
        assert!(!input.tokens.is_empty() && input.tokens.len() <= self.limits.max_tokens);
        assert!(input.spans.len() <= self.limits.max_sequences);
        assert!(input.logits.len() <= self.limits.max_logits_rows);
        assert!(input.logits.is_sorted() && input.logits.len() == requests.len());
        self.copy(&input.copies);
        self.update_tables(input);
        let mut next = 0;
        let mut place = Vec::new();
        for span in &input.spans {
            assert_eq!(span.first_token, next, "spans cut the tokens without gaps");
            next += span.n_tokens;
            let row = span.row.0 as usize;
            assert_eq!(
                span.first_position as usize,
                self.contexts[row].1.len(),
                "each position is written once, in order"
            );
            for i in 0..span.n_tokens {
                let token = match input.tokens[(span.first_token + i) as usize] {
                    TokenInput::Id(token) => token,
                    TokenInput::Sampled { logits_row } => self.previous[logits_row as usize],
                };
                self.write(row, token);
                place.push((row, (span.first_position + i) as usize));
            }
        }
        assert_eq!(next as usize, input.tokens.len());
        // A pass reads what every token sees after it has written all of them.
        for &(row, position) in &place {
            self.read(row, position);
        }
        let rows = input.logits.iter().map(|&token| place[token as usize]);
        self.unsampled = Some(rows.collect());
    }

    fn sample(&mut self, requests: &[LogitsRow]) {
        let rows = self.unsampled.take().expect("a step was submitted");
        let sampled = rows.iter().zip(requests).map(|(&(row, last), request)| {
            let context: Vec<u32> = self.contexts[row].1[..=last]
                .iter()
                .map(|w| w.token)
                .collect();
            let token = match &request.request {
                LogitsRequest::Sample {
                    params,
                    output_index,
                    edit,
                } => sample_edited(&context, (params.seed, *output_index), edit),
                LogitsRequest::Score { token } => *token,
            };
            let top = match request.n_logprobs {
                Some(n) if n > 0 => most_likely(&logprobs(0, &context, VOCABULARY), n.into()),
                _ => Vec::new(),
            };
            Sampled {
                token,
                top,
                ..Sampled::default()
            }
        });
        let sampled: Vec<Sampled> = sampled.collect();
        self.previous = sampled.iter().map(|sampled| sampled.token).collect();
        self.results.push_back(DeviceOutput { sampled });
    }
}

#[derive(Clone, Debug)]
struct Arrival {
    step: u32,
    n_prompt: u32,
    max_tokens: u32,
    stops: bool,
    scored: bool,
    /// Which beginning it shares with others, how much of it, and their salt.
    family: u32,
    n_shared: u32,
    salted: bool,
    /// Answers: sequences, or the best hypotheses of beams.
    n: u32,
    beams: Option<BeamParams>,
    changes: Changes,
    /// It goes on after so many outputs that its sequences have from elsewhere.
    resumes: Option<u32>,
    /// Steps after its arrival at which the client wants no more of one of them.
    drops: Option<(u32, u32)>,
    /// Steps after its arrival at which the client leaves.
    leaves_after: Option<u32>,
}

/// One that comes first, asks for nothing particular, and stays.
const PLAIN: Arrival = Arrival {
    step: 0,
    n_prompt: 1,
    max_tokens: 1,
    stops: false,
    scored: false,
    family: 0,
    n_shared: 0,
    salted: false,
    n: 1,
    beams: None,
    changes: Changes::Nothing,
    resumes: None,
    drops: None,
    leaves_after: None,
};

/// What a device gives that samples token 1 from each row of logits.
fn ones(n_rows: usize) -> DeviceOutput {
    let one = Sampled {
        token: 1,
        ..Sampled::default()
    };
    DeviceOutput {
        sampled: vec![one; n_rows],
    }
}

#[derive(Clone, Debug)]
struct Setting {
    depth: usize,
    block_size: u32,
    n_blocks: u32,
    limits: Limits,
    kinds: Vec<GroupKind>,
    caching: Option<PrefixCaching>,
    arrivals: Vec<Arrival>,
}

impl Setting {
    fn groups(&self) -> CacheGroups {
        let block_size = NonZeroU32::new(self.block_size).unwrap();
        CacheGroups::new(
            block_size,
            self.limits.max_tokens as u32,
            self.kinds.clone(),
        )
    }
}

fn kind() -> impl Strategy<Value = GroupKind> {
    let positive = |n| NonZeroU32::new(n).unwrap();
    prop_oneof![
        4 => Just(GroupKind::Full),
        3 => (1..9u32).prop_map(move |n| GroupKind::Window(positive(n))),
        1 => (1..3u32).prop_map(move |n| GroupKind::State(positive(n))),
    ]
}

fn beams() -> impl Strategy<Value = BeamParams> {
    let early_stopping = prop_oneof![
        Just(EarlyStopping::WhenFull),
        Just(EarlyStopping::WhenUnlikely),
        Just(EarlyStopping::WhenImpossible),
    ];
    (1..6u32, -1.0..2.0, early_stopping).prop_map(|(width, length_penalty, early_stopping)| {
        BeamParams {
            width: NonZeroU32::new(width).unwrap(),
            length_penalty,
            early_stopping,
        }
    })
}

fn settings() -> impl Strategy<Value = Setting> {
    let arrival = (
        0..30u32,
        1..20u32,
        0..16u32,
        any::<bool>(),
        prop::bool::weighted(0.3),
        (
            0..2u32,
            0..20u32,
            prop::bool::weighted(0.2),
            prop_oneof![Just(1u32), 1..5u32],
            prop_oneof![
                3 => Just(Changes::Nothing),
                1 => Just(Changes::Penalties),
                1 => Just(Changes::BadWords),
                1 => Just(Changes::Allowed),
                1 => Just(Changes::Constraint),
            ],
            prop::option::weighted(0.2, (0..20u32, 0..4u32)),
            prop::option::weighted(0.3, beams()),
            prop::option::weighted(0.2, 0..8u32),
        ),
        prop::option::weighted(0.2, 0..20u32),
    )
        .prop_map(
            |(step, n_prompt, max_tokens, stops, scored, shares, leaves_after)| Arrival {
                step,
                n_prompt,
                max_tokens,
                stops,
                scored,
                family: shares.0,
                n_shared: shares.1,
                salted: shares.2,
                n: shares.3,
                changes: shares.4,
                drops: shares.5,
                beams: shares.6,
                resumes: shares.7,
                leaves_after,
            },
        );
    let sizes = (
        1..=2usize,
        1..5u32,
        0..30u32,
        1..6usize,
        0..12usize,
        0..6usize,
    );
    let kinds = prop::collection::vec(kind(), 1..4);
    let root = PrefixKey::of_fields(&[b"test"]);
    let caching = any::<bool>().prop_map(move |equal_bits| PrefixCaching { root, equal_bits });
    let caching = prop::option::weighted(0.8, caching);
    let arrivals = prop::collection::vec(arrival, 1..16);
    (sizes, kinds, caching, arrivals).prop_map(|(sizes, kinds, caching, mut arrivals)| {
        let (depth, block_size, spare_blocks, max_sequences, more_tokens, more_rows) = sizes;
        for arrival in &mut arrivals {
            arrival.n = arrival.n.min(max_sequences as u32);
            if let Some(beams) = &mut arrival.beams {
                beams.width = NonZeroU32::new(max_sequences as u32)
                    .unwrap()
                    .min(beams.width);
                arrival.n = arrival.n.min(beams.width.get());
                // They are searched in the logits as they are.
                arrival.changes = Changes::Nothing;
            }
        }
        let longest = arrivals
            .iter()
            .map(|a| a.n_prompt + a.max_tokens)
            .max()
            .unwrap();
        let mut setting = Setting {
            depth,
            block_size,
            n_blocks: 0,
            limits: Limits {
                max_tokens: max_sequences + more_tokens,
                max_sequences,
                max_logits_rows: max_sequences + more_rows,
                max_blocks_per_sequence: longest.div_ceil(block_size) as usize,
            },
            kinds,
            caching,
            arrivals,
        };
        let max_model_len = longest.div_ceil(block_size) * block_size;
        let groups = setting.groups();
        let alone = setting.arrivals.iter().map(|a| {
            let own = groups.own_blocks_for(a.n_prompt, max_model_len);
            let n = request(0, a).n_sequences().get();
            groups.blocks_for(max_model_len) + (n - 1) * own
        });
        setting.n_blocks = alone.max().unwrap() + spare_blocks;
        setting
    })
}

fn request(i: usize, arrival: &Arrival) -> Request {
    let prompt: Vec<u32> = (0..arrival.n_prompt)
        .map(|p| match p < arrival.n_shared {
            true => (arrival.family * 5 + p * 3) % VOCABULARY,
            false => (i as u32 * 5 + p * 3) % VOCABULARY,
        })
        .collect();
    let stop_token_ids = if arrival.stops {
        vec![STOP]
    } else {
        Vec::new()
    };
    let options = arrival.changes.options();
    let mut request = Request {
        logits: LogitsProcessors::new(options, &prompt, &stop_token_ids, VOCABULARY).map(Box::new),
        stop_token_ids,
        sampling: SamplingParams {
            temperature: 1.0,
            seed: i as u64,
            ..SamplingParams::GREEDY
        },
        n: NonZeroU32::new(arrival.n).unwrap(),
        beams: arrival.beams,
        prompt_logprobs: arrival.scored.then_some(0),
        cache_salt: arrival.salted.then(|| "salt".to_owned()),
        ..Request::greedy(RequestId(i as u64), prompt, arrival.max_tokens)
    };
    if let Some(n) = arrival.resumes.filter(|_| arrival.beams.is_none()) {
        let known = |sequence| {
            let mut tokens = oracle(&request, arrival.changes, sequence, u32::MAX).tokens;
            let has_ended = tokens.len() <= n as usize;
            tokens.truncate(n as usize);
            (!has_ended).then_some(tokens)
        };
        let resumed: Vec<Option<Vec<u32>>> = (0..arrival.n).map(known).collect();
        if resumed.iter().any(Option::is_some) {
            request.resumed = resumed;
            request.prompt_logprobs = None;
        }
    }
    request
}

fn add(scheduler: &mut Scheduler, blocks: &BlockPool, setting: &Setting, request: Request) {
    let chain = setting.caching.map(|caching| {
        let size = NonZeroU32::new(setting.block_size).unwrap();
        let mut chain = PrefixChain::new(caching.root, request.prefix_scope(), size);
        chain.extend(&request.prompt);
        chain
    });
    scheduler.add(blocks, request, chain);
}

/// What a run came to.
#[derive(Default)]
struct Totals {
    n_preempted: usize,
    /// Blocks that were active, and that would have been without sharing: when these were most, and summed over the steps.
    most: (u64, u64),
    sum: (u64, u64),
    /// Steps that were sampled after the commit of the one before.
    n_waited: usize,
    /// Prompt tokens that the cache held, by request that asked it.
    cached: BTreeMap<RequestId, u32>,
}

#[derive(Debug, Default, PartialEq)]
struct Received {
    scores: Vec<u32>,
    tokens: Vec<u32>,
    finished: Option<FinishReason>,
    beam_score: Option<f32>,
}

/// Runs a setting to its end.
fn run(setting: &Setting) -> Totals {
    let Setting {
        depth,
        block_size,
        n_blocks,
        limits,
        arrivals,
        ..
    } = setting;
    let max_model_len = (limits.max_blocks_per_sequence as u32) * block_size;
    let mut blocks = BlockPool::new(*n_blocks, setting.groups(), setting.caching);
    let mut scheduler = Scheduler::new(*limits, max_model_len);
    let mut device = CheckingDevice::new(setting);
    let mut received: BTreeMap<(RequestId, u32), Received> = BTreeMap::new();
    let mut left: HashSet<(RequestId, u32)> = HashSet::new();
    // Who runs in each row, and since which step, once the row is complete.
    let mut occupants: Vec<Option<(RequestId, u32, u64)>> = vec![None; limits.max_sequences];
    let (mut n_arrived, mut totals) = (0, Totals::default());
    for step in 0.. {
        assert!(step < 20_000, "someone starves");
        for (i, arrival) in arrivals.iter().enumerate() {
            if arrival.step == step {
                add(&mut scheduler, &blocks, setting, request(i, arrival));
                n_arrived += 1;
            }
            if arrival
                .leaves_after
                .is_some_and(|after| arrival.step + after == step)
            {
                let active = blocks.counts().active;
                scheduler.abort(&mut blocks, RequestId(i as u64));
                assert!(blocks.counts().active <= active);
                left.extend((0..arrival.n).map(|index| (RequestId(i as u64), index)));
            }
            if let Some((after, index)) = arrival.drops
                && arrival.step + after == step
            {
                let (id, index) = (RequestId(i as u64), index % arrival.n);
                scheduler.abort_sequence(&mut blocks, id, index);
                left.insert((id, index));
            }
        }
        // Some steps have no room for prompts beside decodes, some a little, some all.
        let prompt_tokens = [0, 1, 3, u32::MAX][step as usize % 4];
        let mut schedule = scheduler.schedule(&mut blocks, prompt_tokens);
        let is_idle = schedule.input.tokens.is_empty();
        for row in scheduler.rows_in_order() {
            let running = scheduler.at(row);
            let occupant = (running.group, running.sequence.index(), running.first_step);
            let known = &mut occupants[row.0 as usize];
            if running.fork == Fork::Waits || *known == Some(occupant) {
                continue;
            }
            *known = Some(occupant);
            let mut spans = schedule.input.spans.iter();
            let span = spans.find(|span| span.row == row);
            let found = span.map_or(running.n_scheduled, |span| span.first_position) as usize;
            let salted = arrivals[running.group.0 as usize].salted;
            let salt = salted.then(|| "salt".to_owned());
            device.admit(row, salt, &running.sequence.tokens()[..found]);
        }
        for admitted in &schedule.admitted {
            if let Some(n) = admitted.cached_tokens {
                let counted = totals.cached.insert(admitted.id, n);
                assert_eq!(counted, None, "counted once, preempted or not");
            }
        }
        totals.n_preempted += schedule.preempted.len();
        totals.n_waited += usize::from(schedule.edits == Edits::AfterCommit);
        let counts = blocks.counts();
        let counts = (u64::from(counts.active), u64::from(counts.unshared));
        if counts.1 > totals.most.1 {
            totals.most = counts;
        }
        totals.sum = (totals.sum.0 + counts.0, totals.sum.1 + counts.1);
        let mut collect = |scheduler: &mut Scheduler, results: &mut VecDeque<DeviceOutput>| {
            let Some(output) = results.pop_front() else {
                return false;
            };
            for output in scheduler.commit(&mut blocks, output) {
                let sequence = (output.id, output.sequence);
                assert!(!left.contains(&sequence), "no output after an abort");
                let received = received.entry(sequence).or_default();
                assert_eq!(received.finished, None, "no output after the last");
                received
                    .scores
                    .extend(output.prompt_logprobs.iter().map(|s| s.token));
                received
                    .tokens
                    .extend(output.tokens.iter().map(|s| s.token));
                received.finished = output.finished;
                received.beam_score = output.beam_score;
            }
            true
        };
        if is_idle {
            if !collect(&mut scheduler, &mut device.results) {
                if n_arrived < arrivals.len() {
                    continue;
                }
                assert!(
                    scheduler.is_idle(),
                    "nothing runs and nothing is under way, but requests are left"
                );
                break;
            }
        } else {
            device.submit(&schedule);
            if schedule.edits == Edits::AfterCommit {
                let is_collected = collect(&mut scheduler, &mut device.results);
                assert!(is_collected, "the step before is under way");
            }
            if schedule.edits != Edits::None {
                scheduler.edit_logits(&mut schedule.requests);
            }
            device.sample(&schedule.requests);
            let n_left = if schedule.has_beams { 0 } else { depth - 1 };
            while device.results.len() > n_left {
                collect(&mut scheduler, &mut device.results);
            }
        }
        let rows: Vec<TableRow> = scheduler.rows_in_order().collect();
        let held = rows
            .iter()
            .flat_map(|&row| scheduler.at(row).table.blocks());
        let held: Vec<BlockId> = held.collect();
        assert_eq!(
            blocks.counts().unshared as usize,
            held.len(),
            "every reference is a table's"
        );
        assert_eq!(
            blocks.counts().active as usize,
            held.into_iter().collect::<HashSet<_>>().len(),
            "every active block is in a table"
        );
        assert_eq!(scheduler.free_rows.len() + rows.len(), limits.max_sequences);
        let n_groups = scheduler.running.len() + scheduler.waiting.len();
        assert_eq!(n_groups, scheduler.keys.len(), "a request runs or waits");
    }
    assert_eq!(blocks.counts().active, 0, "all blocks come back");
    for (i, arrival) in arrivals.iter().enumerate() {
        let request = request(i, arrival);
        for sequence in 0..arrival.n {
            let mut want = oracle(&request, arrival.changes, sequence, max_model_len);
            match request.resumed.get(sequence as usize) {
                None => {}
                Some(Some(known)) => drop(want.tokens.drain(..known.len())),
                Some(None) => want = Received::default(),
            }
            let sequence = (request.id, sequence);
            let received = received.remove(&sequence).unwrap_or_default();
            if left.contains(&sequence) && received.finished.is_none() {
                assert!(
                    want.tokens.starts_with(&received.tokens),
                    "what came before the abort was right"
                );
                continue;
            }
            // The first reports the prompt for all.
            if request.prompt_logprobs.is_some() && sequence.1 == 0 {
                want.scores = request.prompt[1..].to_vec();
            }
            assert_eq!(received, want, "{sequence:?}");
        }
    }
    totals
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 600, ..ProptestConfig::default() })]
    #[test]
    fn a_request_gives_in_any_crowd_what_it_gives_alone(setting in settings()) {
        run(&setting);
    }
}

#[test]
fn edits_that_depend_on_the_step_before_wait_for_it_and_others_do_not() {
    for (changes, depth, waits) in [
        (Changes::Nothing, 2, false),
        (Changes::Allowed, 2, false),
        (Changes::Penalties, 1, false),
        (Changes::Penalties, 2, true),
        (Changes::BadWords, 2, true),
        (Changes::Constraint, 1, false),
        (Changes::Constraint, 2, true),
    ] {
        let arrival = Arrival {
            n_prompt: 9,
            max_tokens: 8,
            n: 3,
            changes,
            ..PLAIN
        };
        let setting = Setting {
            depth,
            block_size: 4,
            n_blocks: 64,
            limits: Limits {
                max_tokens: 8,
                max_sequences: 4,
                max_logits_rows: 8,
                max_blocks_per_sequence: 8,
            },
            kinds: vec![GroupKind::Full],
            caching: None,
            arrivals: vec![
                arrival,
                Arrival {
                    n_prompt: 3,
                    max_tokens: 20,
                    ..PLAIN
                },
            ],
        };
        let n_waited = run(&setting).n_waited;
        let why = format!("{changes:?} at depth {depth}: {n_waited}");
        assert_eq!(n_waited > 0, waits, "{why}");
        assert!(n_waited < 9, "only its own steps: {why}");
    }
}

#[test]
fn the_newest_is_preempted_and_its_outputs_are_kept() {
    let arrival = Arrival {
        n_prompt: 5,
        max_tokens: 14,
        scored: true,
        ..PLAIN
    };
    for depth in [1, 2] {
        let setting = Setting {
            depth,
            block_size: 2,
            n_blocks: 14,
            limits: Limits {
                max_tokens: 6,
                max_sequences: 3,
                max_logits_rows: 4,
                max_blocks_per_sequence: 10,
            },
            kinds: vec![GroupKind::Full],
            caching: None,
            arrivals: vec![arrival.clone(); 4],
        };
        assert!(
            run(&setting).n_preempted > 0,
            "the pool is too small for all at once"
        );
    }
}

#[test]
fn nothing_is_found_before_the_step_that_wrote_it_is_collected() {
    let limits = Limits {
        max_tokens: 32,
        max_sequences: 8,
        max_logits_rows: 8,
        max_blocks_per_sequence: 64,
    };
    let groups = CacheGroups::new(NonZeroU32::new(4).unwrap(), 32, vec![GroupKind::Full]);
    let caching = PrefixCaching {
        root: PrefixKey::of_fields(&[b"test"]),
        equal_bits: true,
    };
    let mut blocks = BlockPool::new(64, groups, Some(caching));
    let mut scheduler = Scheduler::new(limits, 256);
    let arrive = |scheduler: &mut Scheduler, blocks: &mut BlockPool, id| {
        let request = Request::greedy(RequestId(id), (0..20).collect(), 4);
        let mut chain = PrefixChain::new(
            caching.root,
            PrefixScope::default(),
            NonZeroU32::new(4).unwrap(),
        );
        chain.extend(&request.prompt);
        scheduler.add(blocks, request, Some(chain));
        let schedule = scheduler.schedule(blocks, u32::MAX);
        let cached = schedule.admitted[0].cached_tokens.unwrap();
        (cached, schedule.requests.len())
    };
    let collect = |scheduler: &mut Scheduler, blocks: &mut BlockPool, n_rows: usize| {
        scheduler.commit(blocks, ones(n_rows));
    };
    // The second comes while the step of the first is under way, the third when it was collected.
    let (first, n_first) = arrive(&mut scheduler, &mut blocks, 0);
    let (second, n_second) = arrive(&mut scheduler, &mut blocks, 1);
    collect(&mut scheduler, &mut blocks, n_first);
    let (third, _) = arrive(&mut scheduler, &mut blocks, 2);
    assert_eq!((first, second, third), (0, 0, 16));
    let active = blocks.counts().active;
    collect(&mut scheduler, &mut blocks, n_second);
    assert_eq!(
        active - blocks.counts().active,
        5,
        "the second's five blocks are merged"
    );
}

#[test]
fn a_group_computes_its_prompt_once_and_shares_its_full_blocks() {
    let limits = Limits {
        max_tokens: 64,
        max_sequences: 8,
        max_logits_rows: 8,
        max_blocks_per_sequence: 64,
    };
    let groups = CacheGroups::new(NonZeroU32::new(4).unwrap(), 64, vec![GroupKind::Full]);
    let mut blocks = BlockPool::new(64, groups, None);
    let mut scheduler = Scheduler::new(limits, 256);
    let arrival = Arrival {
        n_prompt: 18,
        max_tokens: 5,
        n: 4,
        ..PLAIN
    };
    scheduler.add(&blocks, request(0, &arrival), None);
    let mut step = || {
        let schedule = scheduler.schedule(&mut blocks, u32::MAX);
        scheduler.commit(&mut blocks, ones(schedule.requests.len()));
        (schedule.input, blocks.counts().active)
    };
    let (prompt, active) = step();
    assert_eq!(prompt.tokens.len(), 18, "the prompt once");
    assert_eq!(prompt.logits, [17; 4], "four samples after its last token");
    assert_eq!(active, 5 + 3, "its blocks, and those that each will write");
    let (decode, active) = step();
    assert_eq!(decode.copies.len(), 3, "the last shared block, in one call");
    assert!(
        decode
            .copies
            .iter()
            .all(|copy| copy.0 == decode.copies[0].0)
    );
    assert_eq!(decode.spans.len(), 4);
    assert_eq!(active, 4 + 4, "four full blocks have four holders each");
    let (decode, active) = step();
    assert_eq!((decode.copies.len(), active), (0, 8));
}

#[test]
fn a_prefix_is_found_once_it_is_written_and_only_by_its_salt() {
    let arrival = |step, n_shared, salted| Arrival {
        step,
        n_prompt: 15,
        max_tokens: 6,
        n_shared,
        salted,
        ..PLAIN
    };
    let arrivals = vec![
        arrival(0, 15, false),
        arrival(0, 15, false),
        arrival(20, 15, false),
        arrival(20, 15, true),
        arrival(20, 8, false),
        Arrival {
            scored: true,
            ..arrival(20, 15, false)
        },
    ];
    let root = PrefixKey::of_fields(&[b"test"]);
    for (depth, equal_bits) in [(1, true), (1, false), (2, true), (2, false)] {
        let setting = Setting {
            depth,
            block_size: 4,
            n_blocks: 64,
            limits: Limits {
                max_tokens: 64,
                max_sequences: 8,
                max_logits_rows: 64,
                max_blocks_per_sequence: 6,
            },
            kinds: vec![
                GroupKind::Full,
                GroupKind::Window(NonZeroU32::new(5).unwrap()),
            ],
            caching: Some(PrefixCaching { root, equal_bits }),
            arrivals: arrivals.clone(),
        };
        let cached = run(&setting).cached;
        // The first two began before either had written anything; a scored prompt asks for nothing. The window behind the
        // second block of the shared beginning is gone by the time that the others come, unless it was kept.
        let found: Vec<u32> = (0..5).map(|i| cached[&RequestId(i)]).collect();
        assert_eq!(found[..2], [0, 0]);
        assert_eq!(found[2], 12, "all full blocks below the prompt's length");
        assert_eq!(found[3], 0, "another salt");
        assert_eq!(found[4], 8, "two blocks");
        assert!(!cached.contains_key(&RequestId(5)));
    }
}

#[test]
fn decodes_run_in_every_step_while_a_long_prompt_is_cut_into_chunks() {
    let limits = Limits {
        max_tokens: 8,
        max_sequences: 4,
        max_logits_rows: 4,
        max_blocks_per_sequence: 64,
    };
    let groups = CacheGroups::new(NonZeroU32::new(4).unwrap(), 8, vec![GroupKind::Full]);
    let mut blocks = BlockPool::new(64, groups, None);
    let mut scheduler = Scheduler::new(limits, 256);
    let arrival = |n_prompt| Arrival {
        n_prompt,
        max_tokens: 9,
        ..PLAIN
    };
    scheduler.add(&blocks, request(0, &arrival(3)), None);
    scheduler.add(&blocks, request(1, &arrival(40)), None);
    let mut sizes = Vec::new();
    for _ in 0..4 {
        let input = scheduler.schedule(&mut blocks, u32::MAX).input;
        sizes.push(
            input
                .spans
                .iter()
                .map(|span| span.n_tokens)
                .collect::<Vec<_>>(),
        );
        scheduler.commit(&mut blocks, ones(input.logits.len()));
    }
    assert_eq!(
        sizes,
        [[3, 5], [1, 7], [1, 7], [1, 7]],
        "the budget is always spent, and the decode never waits"
    );
    let load = scheduler.load();
    assert_eq!(
        (load.n_running, load.prefill_backlog_tokens),
        (2, 40 - 5 - 7 * 3)
    );
    assert_eq!(
        load.generated_tokens, 4,
        "of the first; the other has its prompt yet"
    );
}

#[test]
fn prompts_are_paced_beside_decodes_and_short_ones_overtake() {
    let limits = Limits {
        max_tokens: 64,
        max_sequences: 8,
        max_logits_rows: 8,
        max_blocks_per_sequence: 64,
    };
    let groups = CacheGroups::new(NonZeroU32::new(4).unwrap(), 64, vec![GroupKind::Full]);
    let mut blocks = BlockPool::new(1024, groups, None);
    let mut scheduler = Scheduler::new(limits, 256);
    let arrival = |n_prompt| Arrival {
        n_prompt,
        max_tokens: 30,
        ..PLAIN
    };
    let step = |scheduler: &mut Scheduler, blocks: &mut BlockPool, prompt_tokens| {
        let schedule = scheduler.schedule(blocks, prompt_tokens);
        scheduler.commit(blocks, ones(schedule.requests.len()));
        schedule
    };
    scheduler.add(&blocks, request(0, &arrival(3)), None);
    step(&mut scheduler, &mut blocks, 8);
    for i in 1..4 {
        scheduler.add(&blocks, request(i, &arrival(200)), None);
    }
    let sizes = |schedule: &Schedule| -> Vec<u32> {
        schedule
            .input
            .spans
            .iter()
            .map(|span| span.n_tokens)
            .collect()
    };
    assert_eq!(
        sizes(&step(&mut scheduler, &mut blocks, 8)),
        [1, 8],
        "a decode and eight tokens of the first prompt"
    );
    assert_eq!(
        sizes(&step(&mut scheduler, &mut blocks, 0)),
        [1],
        "the decode alone"
    );
    scheduler.add(&blocks, request(4, &arrival(2)), None);
    let schedule = step(&mut scheduler, &mut blocks, 8);
    let admitted: Vec<RequestId> = schedule.admitted.iter().map(|new| new.id).collect();
    assert_eq!(admitted, [RequestId(4)], "before the second long one");
    assert_eq!(
        sizes(&schedule),
        [1, 2, 6],
        "the short prompt, and the rest for the long one"
    );
    assert_eq!(schedule.n_decodes, 1);
}
