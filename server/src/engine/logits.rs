//! What a request changes in the logits of its sequences: its fields, and for each sequence what they come to as its
//! tokens become known. Named and defined as in vLLM (`SamplingParams`, `v1/sample/logits_processor`).
//!
//! Pure. It knows token ids, no text and no device; the arithmetic is the device's
//! ([`LogitsEdit`](kvasir_kernels::step::LogitsEdit)).

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use kvasir_kernels::step::{LogitsEdit, Penalties, SeenToken, TokenBias};

use super::constraint::Constraint;

/// What a request asks for; the default asks for nothing. Ids are below the vocabulary's size.
#[derive(Clone, Debug)]
pub struct LogitsOptions {
    /// Only these are sampled; empty: all.
    pub allowed_token_ids: Vec<u32>,
    /// Added to logits; finite.
    pub logit_bias: BTreeMap<u32, f32>,
    /// Token sequences that the output must not hold, none of them empty.
    pub bad_words: Vec<Vec<u32>>,
    /// No stop token is sampled before so many others.
    pub min_tokens: u32,
    /// Of the tokens of prompt and output; above 0, 1 changes nothing.
    pub repetition_penalty: f32,
    /// Of the tokens of the output, once.
    pub presence_penalty: f32,
    /// Of the tokens of the output, each time.
    pub frequency_penalty: f32,
    /// Restricts each token by those before it.
    pub constraint: Option<Box<dyn Constraint>>,
}

impl Default for LogitsOptions {
    fn default() -> Self {
        Self {
            allowed_token_ids: Vec::new(),
            logit_bias: BTreeMap::new(),
            bad_words: Vec::new(),
            min_tokens: 0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            constraint: None,
        }
    }
}

/// When the edits of a step's rows of logits can be made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Edits {
    /// There are none.
    #[default]
    None,
    /// At once.
    Ready,
    /// Once the step before is committed: some depend on a token that it samples.
    AfterCommit,
}

/// The changes of one sequence's logits, as far as its output has come.
#[derive(Clone, Debug)]
pub struct LogitsProcessors {
    vocab_size: u32,
    /// A bit each.
    allowed: Option<Arc<[u32]>>,
    /// `logit_bias`, and bans of the bad words of one token.
    biases: Arc<[TokenBias]>,
    /// The same and bans of the stop tokens, before output `min_tokens`.
    early_biases: Arc<[TokenBias]>,
    min_tokens: u32,
    /// Those of several tokens.
    bad_words: Arc<[Vec<u32>]>,
    stop_token_ids: Arc<[u32]>,
    penalties: Option<PenaltyHistory>,
    constraint: Option<Box<dyn Constraint>>,
    /// Filled by the constraint; kept for its memory.
    mask: Arc<[u32]>,
}

impl LogitsProcessors {
    /// For sequences that continue `prompt` and end at `stop_token_ids`; `None` where nothing is changed.
    pub fn new(
        options: LogitsOptions,
        prompt: &[u32],
        stop_token_ids: &[u32],
        vocab_size: u32,
    ) -> Option<Self> {
        let stop_token_ids: Arc<[u32]> = stop_token_ids
            .iter()
            .copied()
            .filter(|token| *token < vocab_size)
            .collect();
        let penalties = PenaltyHistory::new(&options, prompt);
        let (single, several): (Vec<_>, Vec<_>) = (options.bad_words.into_iter())
            .filter(|word| !word.is_empty())
            .partition(|word| word.len() == 1);
        let mut biases = options.logit_bias;
        ban(&mut biases, single.into_iter().flatten());
        let mut early = biases.clone();
        if options.min_tokens > 0 {
            ban(&mut early, stop_token_ids.iter().copied());
        }
        let allowed = (!options.allowed_token_ids.is_empty())
            .then(|| mask_of(&options.allowed_token_ids, vocab_size));
        let processors = Self {
            vocab_size,
            allowed,
            biases: biases_of(&biases),
            early_biases: biases_of(&early),
            min_tokens: options.min_tokens,
            bad_words: several.into(),
            stop_token_ids,
            penalties,
            constraint: options.constraint,
            mask: Arc::default(),
        };
        let changes = processors.allowed.is_some()
            || !processors.early_biases.is_empty()
            || processors.depends_on_tokens();
        changes.then_some(processors)
    }

    /// When the next edit can be made; `is_pending`: the token before is not known yet.
    pub fn edits(&self, is_pending: bool) -> Edits {
        match is_pending && self.depends_on_tokens() {
            true => Edits::AfterCommit,
            false => Edits::Ready,
        }
    }

    fn depends_on_tokens(&self) -> bool {
        self.penalties.is_some() || self.constraint.is_some() || !self.bad_words.is_empty()
    }

    /// The sequence goes on with `token`.
    pub fn advance(&mut self, token: u32) {
        if let Some(history) = &mut self.penalties {
            history.push(token);
        }
        if let Some(constraint) = &mut self.constraint {
            constraint.advance(token);
        }
    }

    /// The changes for output `index` of a sequence; `outputs` are those that are known, all before it where
    /// [`LogitsProcessors::edits`] says that they matter.
    pub fn edit(&mut self, outputs: &[u32], index: u32) -> LogitsEdit {
        LogitsEdit {
            allowed: self.allowed(),
            biases: self.biases(outputs, index),
            penalties: self.penalties.as_ref().map(PenaltyHistory::penalties),
        }
    }

    /// What the constraint allows, of what the request allows.
    fn allowed(&mut self) -> Option<Arc<[u32]>> {
        let Some(constraint) = &mut self.constraint else {
            return self.allowed.clone();
        };
        // The device has let go of the last one, unless a step is under way whose row is not sampled any more.
        if Arc::get_mut(&mut self.mask).is_none() || self.mask.is_empty() {
            self.mask = mask_of(&[], self.vocab_size);
        }
        let mask = Arc::get_mut(&mut self.mask).expect("nobody else has it");
        mask.fill(0);
        constraint.fill_mask(mask);
        // Bits past the vocabulary are no tokens.
        if let Some(last) = mask.last_mut() {
            *last &= u32::MAX >> (self.vocab_size.wrapping_neg() % 32);
        }
        if let Some(allowed) = &self.allowed {
            mask.iter_mut()
                .zip(allowed.iter())
                .for_each(|(m, a)| *m &= a);
        }
        if mask.iter().all(|word| *word == 0) {
            for &token in self.stop_token_ids.iter() {
                set(mask, token);
            }
        }
        match mask.iter().all(|word| *word == 0) {
            // It can neither go on as it must nor end: it goes on as it likes.
            true => None,
            false => Some(Arc::clone(&self.mask)),
        }
    }

    fn biases(&self, outputs: &[u32], index: u32) -> Arc<[TokenBias]> {
        let fixed = match index < self.min_tokens {
            true => &self.early_biases,
            false => &self.biases,
        };
        let banned = self.bad_words.iter().filter_map(|word| {
            let (last, before) = word.split_last()?;
            outputs.ends_with(before).then_some(*last)
        });
        let mut banned = banned.peekable();
        if banned.peek().is_none() {
            return Arc::clone(fixed);
        }
        let mut biases = fixed.iter().map(|b| (b.token, b.bias)).collect();
        ban(&mut biases, banned);
        biases_of(&biases)
    }
}

fn ban(biases: &mut BTreeMap<u32, f32>, tokens: impl Iterator<Item = u32>) {
    biases.extend(tokens.map(|token| (token, f32::NEG_INFINITY)));
}

fn biases_of(biases: &BTreeMap<u32, f32>) -> Arc<[TokenBias]> {
    let biases = biases.iter();
    biases
        .map(|(&token, &bias)| TokenBias { token, bias })
        .collect()
}

fn mask_of(tokens: &[u32], vocab_size: u32) -> Arc<[u32]> {
    let mut mask = vec![0; vocab_size.div_ceil(32) as usize];
    tokens.iter().for_each(|&token| set(&mut mask, token));
    mask.into()
}

fn set(mask: &mut [u32], token: u32) {
    if let Some(word) = mask.get_mut(token as usize / 32) {
        *word |= 1 << (token % 32);
    }
}

/// The tokens that a sequence has, as its penalties need them.
#[derive(Clone, Debug)]
struct PenaltyHistory {
    repetition: f32,
    frequency: f32,
    presence: f32,
    /// Shared with the step that is being sampled, and with sequences that have come as far.
    seen: Arc<Vec<SeenToken>>,
    /// Where each token stands in `seen`.
    places: HashMap<u32, u32>,
}

impl PenaltyHistory {
    /// `None` where nothing is penalised. Only repetition looks at the prompt.
    fn new(options: &LogitsOptions, prompt: &[u32]) -> Option<Self> {
        let LogitsOptions {
            repetition_penalty: repetition,
            frequency_penalty: frequency,
            presence_penalty: presence,
            ..
        } = *options;
        if repetition == 1.0 && frequency == 0.0 && presence == 0.0 {
            return None;
        }
        let mut history = Self {
            repetition,
            frequency,
            presence,
            seen: Arc::default(),
            places: HashMap::new(),
        };
        if repetition != 1.0 {
            prompt.iter().for_each(|&token| history.add(token, 0));
        }
        Some(history)
    }

    fn push(&mut self, token: u32) {
        self.add(token, 1);
    }

    fn add(&mut self, token: u32, n_outputs: u32) {
        let seen = Arc::make_mut(&mut self.seen);
        let place = *self.places.entry(token).or_insert(seen.len() as u32);
        match seen.get_mut(place as usize) {
            Some(seen) => seen.n_outputs += n_outputs,
            None => seen.push(SeenToken { token, n_outputs }),
        }
    }

    fn penalties(&self) -> Penalties {
        Penalties {
            repetition: self.repetition,
            frequency: self.frequency,
            presence: self.presence,
            seen: Arc::clone(&self.seen),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const VOCABULARY: u32 = 40;

    fn new(options: LogitsOptions, prompt: &[u32], stops: &[u32]) -> LogitsProcessors {
        LogitsProcessors::new(options, prompt, stops, VOCABULARY).unwrap()
    }

    fn banned(edit: &LogitsEdit) -> Vec<u32> {
        let banned = edit.biases.iter().filter(|b| b.bias == f32::NEG_INFINITY);
        banned.map(|b| b.token).collect()
    }

    #[test]
    fn what_changes_nothing_costs_nothing() {
        let none = LogitsProcessors::new(LogitsOptions::default(), &[1, 2], &[3], VOCABULARY);
        assert!(none.is_none());
        let no_stop = LogitsOptions {
            min_tokens: 3,
            ..LogitsOptions::default()
        };
        assert!(LogitsProcessors::new(no_stop, &[1], &[], VOCABULARY).is_none());
    }

    #[test]
    fn only_what_depends_on_tokens_waits_for_them() {
        let plain = LogitsOptions::default;
        for (why, options, waits) in [
            (
                "allowed tokens",
                LogitsOptions {
                    allowed_token_ids: vec![3],
                    ..plain()
                },
                false,
            ),
            (
                "a bias and min_tokens",
                LogitsOptions {
                    logit_bias: [(3, 1.0)].into(),
                    min_tokens: 2,
                    ..plain()
                },
                false,
            ),
            (
                "a bad word of one token",
                LogitsOptions {
                    bad_words: vec![vec![3]],
                    ..plain()
                },
                false,
            ),
            (
                "a bad word of two",
                LogitsOptions {
                    bad_words: vec![vec![3, 4]],
                    ..plain()
                },
                true,
            ),
            (
                "a penalty",
                LogitsOptions {
                    presence_penalty: 0.1,
                    ..plain()
                },
                true,
            ),
        ] {
            let processors = new(options, &[1], &[2]);
            assert_eq!(processors.edits(false), Edits::Ready, "{why}");
            let want = if waits {
                Edits::AfterCommit
            } else {
                Edits::Ready
            };
            assert_eq!(processors.edits(true), want, "{why}");
        }
    }

    #[test]
    fn biases_bans_and_masks_stand_together() {
        let options = LogitsOptions {
            allowed_token_ids: vec![0, 33],
            logit_bias: [(7, 2.0), (9, -1.0)].into(),
            bad_words: vec![vec![5], vec![6, 9], vec![6, 6, 1]],
            min_tokens: 2,
            ..LogitsOptions::default()
        };
        let mut processors = new(options, &[6, 6], &[2, 7]);
        let edit = processors.edit(&[], 0);
        assert_eq!(edit.allowed.as_deref(), Some(&[1, 2][..]));
        assert_eq!(banned(&edit), [2, 5, 7], "stop tokens, and a bad word");
        assert_eq!(edit.biases.len(), 4);
        let edit = processors.edit(&[6], 1);
        assert_eq!(banned(&edit), [2, 5, 7, 9], "and the end of another");
        let edit = processors.edit(&[6, 6], 2);
        assert_eq!(banned(&edit), [1, 5, 9], "of two others, and it may stop");
        assert_eq!(edit.biases.iter().find(|b| b.token == 7).unwrap().bias, 2.0);
    }

    #[test]
    fn history_counts_outputs_and_shares_what_has_not_changed() {
        let options = LogitsOptions {
            repetition_penalty: 1.5,
            ..LogitsOptions::default()
        };
        let mut one = new(options.clone(), &[3, 4, 3], &[]);
        let mut other = one.clone();
        let before = one.edit(&[], 0).penalties.unwrap();
        for token in [4, 9, 4] {
            one.advance(token);
        }
        let seen = |p: &Penalties| -> Vec<(u32, u32)> {
            p.seen.iter().map(|s| (s.token, s.n_outputs)).collect()
        };
        assert_eq!(seen(&before), [(3, 0), (4, 0)], "as it was then");
        let after = one.edit(&[4, 9, 4], 3).penalties.unwrap();
        assert_eq!(seen(&after), [(3, 0), (4, 2), (9, 1)]);
        assert_eq!(seen(&other.edit(&[], 0).penalties.unwrap()), seen(&before));
        let only_output = LogitsOptions {
            repetition_penalty: 1.0,
            frequency_penalty: 0.5,
            ..options
        };
        let mut outputs_only = new(only_output, &[3, 4, 3], &[]);
        outputs_only.advance(3);
        let found = outputs_only.edit(&[3], 1).penalties.unwrap();
        assert_eq!(seen(&found), [(3, 1)], "no prompt");
    }

    /// Allows one fixed sequence, then nothing.
    #[derive(Clone, Debug)]
    struct Fixed(Vec<u32>);

    impl Constraint for Fixed {
        fn advance(&mut self, token: u32) {
            assert_eq!(self.0.remove(0), token);
        }

        fn fill_mask(&mut self, mask: &mut [u32]) {
            self.0.first().into_iter().for_each(|&t| set(mask, t));
        }

        fn fork(&self) -> Box<dyn Constraint> {
            Box::new(self.clone())
        }
    }

    #[test]
    fn a_constraint_fills_the_mask_and_its_end_is_a_stop_token() {
        let options = LogitsOptions {
            constraint: Some(Box::new(Fixed(vec![35]))),
            ..LogitsOptions::default()
        };
        let mut processors = new(options.clone(), &[1], &[2]);
        let mut fork = processors.clone();
        let kept = processors.edit(&[], 0);
        assert_eq!(kept.allowed.as_deref(), Some(&[0, 8][..]));
        processors.advance(35);
        assert_eq!(
            processors.edit(&[35], 1).allowed.as_deref(),
            Some(&[4, 0][..])
        );
        assert_eq!(kept.allowed.as_deref(), Some(&[0, 8][..]), "not written to");
        assert_eq!(fork.edit(&[], 0).allowed, kept.allowed);
        let mut endless = new(options, &[1], &[]);
        endless.advance(35);
        assert_eq!(endless.edit(&[35], 1).allowed, None);
    }

    proptest! {
        /// No bad word is ever in an output that avoids what is banned, and nothing is banned that completes none.
        #[test]
        fn bad_words_are_banned_where_they_would_end(
            words in prop::collection::vec(prop::collection::vec(0u32..4, 1..4), 1..4),
            draws in prop::collection::vec(0u32..4, 0..40),
        ) {
            let options = LogitsOptions { bad_words: words.clone(), ..LogitsOptions::default() };
            let mut processors = new(options, &[0, 1, 2, 3], &[]);
            let mut outputs: Vec<u32> = Vec::new();
            for draw in draws {
                let banned = banned(&processors.edit(&outputs, outputs.len() as u32));
                for token in 0..4 {
                    let longer = [&outputs[..], &[token]].concat();
                    let completes = words.iter().any(|word| longer.ends_with(word));
                    prop_assert_eq!(banned.contains(&token), completes, "{} after {:?}", token, &outputs);
                }
                let Some(token) = (0..4).map(|i| (draw + i) % 4).find(|t| !banned.contains(t)) else {
                    break;
                };
                processors.advance(token);
                outputs.push(token);
            }
        }
    }
}
