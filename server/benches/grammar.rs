//! What grammars cost, against the targets of 10 ms for a median schema and 1 ms for a median mask: the vocabulary's trie,
//! schemas compiled, and the masks of texts by chance. The vocabulary is the demo model's; `KVASIR_TOKENIZER` names another
//! tokenizer.json.
//!
//! `cargo bench -p kvasir-server --bench grammar`; `cargo test` tries a few schemas, so that it stays runnable.

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvasir_server::grammar::{Grammar, GrammarCompiler};
use kvasir_server::model::ModelFiles;
use kvasir_server::text::Tokenizer;
use kvasir_server::text::tokenizer::TextFiles;
use schemas::{Chance, schema};

#[path = "../tests/support/schemas.rs"]
mod schemas;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let n_schemas = match std::env::args().any(|argument| argument == "--bench") {
        true => 1_000,
        false => 5,
    };
    let file = match std::env::var_os("KVASIR_TOKENIZER") {
        Some(path) => std::fs::read(path)?,
        None => ModelFiles::demo().require("tokenizer.json")?.to_vec(),
    };
    let tokenizer = Tokenizer::load(TextFiles {
        tokenizer: &file,
        tokenizer_config: None,
        chat_template: None,
    })?;
    let vocabulary = tokenizer.vocabulary();
    let n_tokens = u32::try_from(vocabulary.len())?;
    let end = (0..n_tokens).find(|id| vocabulary.is_special(*id));
    let end = end.ok_or("the tokenizer has no special token")?;
    let started = Instant::now();
    let compiler =
        GrammarCompiler::start(Arc::clone(vocabulary), n_tokens, &[end], NonZeroUsize::MIN)?;
    let first = futures::executor::block_on(compiler.compile(Grammar::json_object()))?;
    println!(
        "trie of {n_tokens} tokens and a first grammar: {:?}",
        started.elapsed()
    );
    drop(first);

    let (mut compiling, mut masks) = (Vec::new(), Vec::new());
    let mut allowed = vec![0; n_tokens.div_ceil(32) as usize];
    for seed in 0..n_schemas {
        let grammar = Grammar::json_schema(schema(seed))?;
        let started = Instant::now();
        let compiled = futures::executor::block_on(compiler.compile(grammar))?;
        compiling.push(started.elapsed());
        let (mut matcher, mut chance) = (compiled.matcher(&[]), Chance::new(seed));
        for _ in 0..200 {
            let started = Instant::now();
            matcher.fill(&mut allowed)?;
            masks.push(started.elapsed());
            let ids = (0..n_tokens).filter(|id| allowed[*id as usize / 32] >> (id % 32) & 1 == 1);
            let ids: Vec<u32> = ids.collect();
            let id = ids[chance.below(ids.len())];
            if id == end {
                break;
            }
            matcher.advance(id)?;
        }
    }
    report("schemas compiled", compiling, Duration::from_millis(10));
    report("masks", masks, Duration::from_millis(1));
    Ok(())
}

fn report(what: &str, mut took: Vec<Duration>, target: Duration) {
    took.sort_unstable();
    let at = |part: usize| took[(took.len() - 1) * part / 100];
    println!(
        "{} {what}: median {:?} of {target:?}, 99 % {:?}, longest {:?}",
        took.len(),
        at(50),
        at(99),
        at(100)
    );
}
