//! From grammars to what sequences follow: the vocabulary's trie, made once; the threads that compile, whose stacks are
//! large because llguidance recurses; and the grammars that were compiled last.
//!
//! Time and memory are bounded by the checks of [`Grammar`] and by llguidance's own limits, set here.

use std::collections::VecDeque;
use std::num::NonZeroUsize;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use llguidance::earley::SlicedBiasComputer;
use llguidance::toktrie::{ApproximateTokEnv, InferenceCapabilities, TokRxInfo, TokTrie};
use llguidance::{ParserFactory, TokenParser};

use super::{Grammar, GrammarConstraint, GrammarError, Matcher};
use crate::text::pool::Lane;
use crate::text::{TextError, Vocabulary};

/// Grammars that may wait: each is some milliseconds of work, and far less than a second at most.
const MAX_WAITING: usize = 256;

/// For each thread; only what is used of it is memory.
const STACK_BYTES: usize = 256 << 20;

/// The same for threads that compute masks.
const MASK_STACK_BYTES: usize = 64 << 20;

/// What is kept of grammars compiled before: so many, of so many bytes together as they were written.
const MAX_KEPT: usize = 64;
const MAX_KEPT_BYTES: usize = 1 << 20;

/// Symbols of a grammar at most; a schema of a megabyte has about 100,000.
const MAX_SYMBOLS: usize = 200_000;

/// Items of one row of the parser at most; an object has some for each of its optional properties.
const MAX_ROW_ITEMS: usize = 20_000;

/// States of a lexer at most, each some kilobytes; a large schema comes to some thousands.
const MAX_LEXER_STATES: usize = 30_000;

/// Compiles grammars for one vocabulary. Cheap to clone.
#[derive(Clone, Debug)]
pub struct GrammarCompiler {
    shared: Arc<Shared>,
    lane: Lane,
}

struct Shared {
    vocabulary: Arc<Vocabulary>,
    masks: Lane,
    /// Token ids of the model are below it.
    vocab_size: u32,
    eos_token_ids: Vec<u32>,
    factory: OnceLock<Result<ParserFactory, String>>,
    /// The one used last comes last.
    kept: Mutex<VecDeque<(String, CompiledGrammar)>>,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "grammars over {} tokens", self.vocab_size)
    }
}

/// A grammar that sequences can follow. Cheap to clone.
#[derive(Clone)]
pub struct CompiledGrammar(Arc<Compiled>);

struct Compiled {
    parser: TokenParser,
    /// Threads for masks, and the words of one.
    masks: Lane,
    n_words: usize,
}

impl std::fmt::Debug for CompiledGrammar {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("CompiledGrammar")
    }
}

impl PartialEq for CompiledGrammar {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl CompiledGrammar {
    /// At the grammar's beginning. The text may end where it is complete, with an end-of-sequence token or one of
    /// `stop_token_ids`.
    pub fn matcher(&self, stop_token_ids: &[u32]) -> Matcher {
        Matcher::new(self.0.parser.deep_clone(), stop_token_ids)
    }

    /// A sequence held to the grammar from its beginning.
    pub fn constraint(&self, stop_token_ids: &[u32]) -> GrammarConstraint {
        let (grammar, stop_token_ids) = (self.clone(), stop_token_ids.to_vec());
        let begin = move || grammar.matcher(&stop_token_ids);
        GrammarConstraint::new(self.0.masks.clone(), self.0.n_words, begin)
    }
}

impl GrammarCompiler {
    /// Starts `n_threads` that compile, and as many that compute masks. The first makes the trie at once, so that no request
    /// waits for it.
    ///
    /// `vocab_size`: token ids of the model are below it.
    pub fn start(
        vocabulary: Arc<Vocabulary>,
        vocab_size: u32,
        eos_token_ids: &[u32],
        n_threads: NonZeroUsize,
    ) -> std::io::Result<Self> {
        let shared = Arc::new(Shared {
            vocab_size,
            masks: Lane::new("mask", n_threads, usize::MAX, MASK_STACK_BYTES)?,
            vocabulary,
            eos_token_ids: eos_token_ids.to_vec(),
            factory: OnceLock::new(),
            kept: Mutex::default(),
        });
        let lane = Lane::new("grammar", n_threads, MAX_WAITING, STACK_BYTES)?;
        let early = Arc::clone(&shared);
        lane.spawn(move || {
            let _ = early.factory();
        });
        Ok(Self { shared, lane })
    }

    /// Compiles on one of the threads, or finds it compiled.
    pub async fn compile(&self, grammar: Grammar) -> Result<CompiledGrammar, GrammarError> {
        let key = grammar.key();
        if let Some(compiled) = self.shared.find(&key) {
            return Ok(compiled);
        }
        let shared = Arc::clone(&self.shared);
        // The smallest first: they take the least time.
        let compiled = self.lane.run(key.len(), move || {
            let compiled = shared.compile(&grammar)?;
            shared.keep(key, &compiled);
            Ok(compiled)
        });
        compiled.await.map_err(|error| match error {
            TextError::Busy { limit } => GrammarError::Busy { limit },
            TextError::Panicked => GrammarError::Invalid("the grammar can't be compiled".into()),
            _ => GrammarError::Stopped,
        })?
    }

    /// Compiles on this thread.
    #[cfg(test)]
    pub(super) fn compile_here(&self, grammar: &Grammar) -> Result<CompiledGrammar, GrammarError> {
        self.shared.compile(grammar)
    }
}

impl Shared {
    fn compile(&self, grammar: &Grammar) -> Result<CompiledGrammar, GrammarError> {
        let factory = self.factory().map_err(GrammarError::Invalid)?;
        let mut parser = factory
            .create_parser(grammar.to_llguidance())
            .map_err(|error| refusal(&error))?;
        parser.start_without_prompt();
        Ok(CompiledGrammar(Arc::new(Compiled {
            parser,
            masks: self.masks.clone(),
            n_words: self.vocab_size.div_ceil(32) as usize,
        })))
    }

    fn factory(&self) -> Result<&ParserFactory, String> {
        let factory = self.factory.get_or_init(|| {
            let started = std::time::Instant::now();
            let factory = self.make_factory().map_err(|error| error.to_string());
            tracing::debug!(took = ?started.elapsed(), "made the trie of the vocabulary");
            factory
        });
        factory.as_ref().map_err(Clone::clone)
    }

    fn make_factory(&self) -> Result<ParserFactory, anyhow::Error> {
        // A tokenizer may have more tokens than its model, and models have more logits than tokens.
        let n_known = u32::try_from(self.vocabulary.len()).unwrap_or(u32::MAX);
        let n_tokens = self.vocab_size.max(n_known);
        let words: Vec<Vec<u8>> = (0..n_tokens).map(|id| self.word(id)).collect();
        let known = |id: &u32| *id < n_tokens;
        let eos: Vec<u32> = self.eos_token_ids.iter().copied().filter(known).collect();
        let first = eos.first().copied();
        let info = TokRxInfo::new(
            n_tokens,
            first.unwrap_or(llguidance::toktrie::INVALID_TOKEN),
        );
        let trie = TokTrie::from(&info, &words);
        let trie = match eos.is_empty() {
            true => trie,
            false => trie.with_eos_tokens(&eos),
        };
        let environment: llguidance::toktrie::TokEnv = Arc::new(ApproximateTokEnv::new(trie));
        let slices = SlicedBiasComputer::general_slices();
        let mut factory =
            ParserFactory::new(&environment, InferenceCapabilities::default(), &slices)?;
        factory.quiet();
        let limits = factory.limits_mut();
        limits.max_grammar_size = MAX_SYMBOLS;
        limits.max_items_in_row = MAX_ROW_ITEMS;
        limits.max_lexer_states = MAX_LEXER_STATES;
        limits.verbose_errors = false;
        Ok(factory)
    }

    /// What a token stands for. Special tokens, and those that end a sequence, match no text: only their names do, where a
    /// grammar asks for them.
    fn word(&self, id: u32) -> Vec<u8> {
        let bytes = self.vocabulary.bytes(id);
        match self.vocabulary.is_special(id) || self.eos_token_ids.contains(&id) {
            true if !bytes.is_empty() => [vec![TokTrie::SPECIAL_TOKEN_MARKER], bytes].concat(),
            _ => bytes,
        }
    }

    fn find(&self, key: &str) -> Option<CompiledGrammar> {
        let mut kept = self.kept();
        let at = kept.iter().position(|(other, _)| other == key)?;
        let found = kept.remove(at)?;
        let compiled = found.1.clone();
        kept.push_back(found);
        Some(compiled)
    }

    fn keep(&self, key: String, compiled: &CompiledGrammar) {
        if key.len() > MAX_KEPT_BYTES / 4 {
            return;
        }
        let mut kept = self.kept();
        kept.push_back((key, compiled.clone()));
        let n_bytes =
            |kept: &VecDeque<(String, _)>| kept.iter().map(|(key, _)| key.len()).sum::<usize>();
        while kept.len() > MAX_KEPT || n_bytes(&kept) > MAX_KEPT_BYTES {
            kept.pop_front();
        }
    }

    fn kept(&self) -> std::sync::MutexGuard<'_, VecDeque<(String, CompiledGrammar)>> {
        // Each change is whole.
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// llguidance's words, without what it prints around them.
fn refusal(error: &anyhow::Error) -> GrammarError {
    let text = error.to_string();
    let mut lines = text.lines();
    let line = lines.next().unwrap_or_default();
    // A mistake in an expression is shown under the expression.
    if let Some(why) = lines.find_map(|line| line.strip_prefix("error: "))
        && line.ends_with(':')
    {
        return GrammarError::Invalid(format!("{line} {why}"));
    }
    if let Some(keywords) = line.find("Unimplemented keys: ").map(|at| &line[at + 20..]) {
        let names: Vec<&str> = keywords.split('"').skip(1).step_by(2).collect();
        return GrammarError::Invalid(format!(
            "the keyword {} is not supported by this server",
            names.join(", ")
        ));
    }
    if line.contains("oneOf constraints are not supported") {
        let why = "the keyword oneOf is supported only where no value can fit two of its schemas; use anyOf";
        return GrammarError::Invalid(why.into());
    }
    let line = line
        .strip_prefix("panic: ")
        .map_or(line, |_| "it can't be compiled");
    GrammarError::Invalid(line.chars().take(500).collect())
}
