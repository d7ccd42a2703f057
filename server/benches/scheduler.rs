//! Host work of a step at 256 running requests, against the target of 100 us: schedule and commit alone, with room, under
//! pressure (a pool too small for all, clients that leave), with windowed layers and with penalties in every row; then the
//! whole way, engine and output thread, to 256 streams, over a device that costs nothing; and what a block costs, with and
//! without the prefix cache.
//!
//! `cargo bench -p kvasir-server --bench scheduler`; `cargo test` runs a few steps of each, so that it stays runnable.

use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvasir_kernels::null::NullDevice;
use kvasir_kernels::shape::Limits;
use kvasir_kernels::step::{DeviceOutput, Sampled};
use kvasir_server::engine::blocks::{BlockPool, Written};
use kvasir_server::engine::groups::{CacheGroups, GroupKind};
use kvasir_server::engine::logits::{Edits, LogitsOptions, LogitsProcessors};
use kvasir_server::engine::prefix::{
    PrefixCaching, PrefixChain, PrefixHit, PrefixKey, PrefixScope,
};
use kvasir_server::engine::scheduler::Scheduler;
use kvasir_server::engine::{Engine, Request, RequestId, SamplingParams};
use kvasir_server::frontend::budget::ByteBudget;
use kvasir_server::frontend::{Arrival, AsyncEngine, GenerationRequest};
use kvasir_server::metrics::Metrics;
use kvasir_server::model::{LoadOptions, ModelFiles, load};
use kvasir_server::text::stop::StopStrings;
use kvasir_server::text::tokenizer::TextFiles;
use kvasir_server::text::{Detokenizer, Tokenizer};

const N_REQUESTS: usize = 256;
const TARGET: Duration = Duration::from_micros(100);
const LIMITS: Limits = Limits {
    max_tokens: 8_192,
    max_sequences: N_REQUESTS,
    max_logits_rows: N_REQUESTS,
    max_blocks_per_sequence: 256,
};

fn main() {
    let n_steps = match std::env::args().any(|argument| argument == "--bench") {
        true => 2_000,
        false => 20,
    };
    let full = vec![GroupKind::Full];
    let window = GroupKind::Window(positive(1_024));
    let gemma = [full.clone(), vec![window; 5]].concat();
    for (how, caching) in [("prefixes cached", Some(caching())), ("not cached", None)] {
        let measure = |what: &str, kinds: &[GroupKind], n_blocks, leaves, options| {
            let load = Load {
                kinds: kinds.to_vec(),
                n_blocks,
                leaves,
                caching,
                options,
            };
            report(&format!("{what}, {how}"), &scheduling(n_steps, &load));
        };
        measure("with room", &full, 65_536, None, None);
        // The 256 hold 4,000 to 9,000 blocks; every seventh step a client leaves.
        measure("under pressure", &full, 5_000, Some(7), None);
        measure("six cache groups", &gemma, 65_536, None, None);
        measure("penalties", &full, 65_536, None, Some(penalties()));
    }
    report("the whole way, to 256 streams", &whole_way(n_steps, None));
    let penalised = whole_way(n_steps, Some(penalties()));
    report("the whole way with penalties", &penalised);
    bookkeeping(n_steps);
}

fn caching() -> PrefixCaching {
    PrefixCaching {
        root: PrefixKey::of_fields(&[b"benchmark"]),
        equal_bits: true,
    }
}

/// Time a block, of sequences of 512 blocks of 16 tokens in a pool of 65,536, which is full after the first 128 of them: to
/// be taken and given back alone, and to be looked up, made findable, let go and evicted beside that.
fn bookkeeping(n_sequences: usize) {
    const N_BLOCKS: u32 = 512;
    const SIZE: u32 = 16;
    let groups = CacheGroups::new(positive(SIZE), 8_192, vec![GroupKind::Full]);
    let prompts: Vec<Vec<u32>> = (0..n_sequences as u32)
        .map(|i| (0..N_BLOCKS * SIZE).map(|p| i * 7 + p).collect())
        .collect();
    let each = |time: Duration| time / (n_sequences as u32 * N_BLOCKS);

    let mut pool = BlockPool::new(65_536, groups.clone(), None);
    let start = Instant::now();
    for _ in &prompts {
        let allocation = pool.allocate(N_BLOCKS * SIZE, &PrefixHit::default());
        pool.release(allocation.expect("the pool is free").table, None);
    }
    let plain = each(start.elapsed());

    let caching = caching();
    let mut pool = BlockPool::new(65_536, groups.clone(), Some(caching));
    let (mut hashing, mut rest) = (Duration::ZERO, Duration::ZERO);
    for prompt in &prompts {
        let start = Instant::now();
        let mut chain = PrefixChain::new(caching.root, PrefixScope::default(), groups.block_size());
        chain.extend(prompt);
        hashing += start.elapsed();
        let start = Instant::now();
        let hit = pool.find_prefix(&chain, prompt, N_BLOCKS * SIZE - 1);
        let allocation = pool.allocate(N_BLOCKS * SIZE, &hit);
        let mut table = allocation.expect("the rest is cached").table;
        let written = Written {
            chain: &chain,
            tokens: prompt,
        };
        pool.register(&mut table, written);
        pool.release(table, Some(written));
        rest += start.elapsed();
    }
    let (hashing, rest) = (each(hashing), each(rest));

    let start = Instant::now();
    let last = &prompts[n_sequences - 1];
    let mut chain = PrefixChain::new(caching.root, PrefixScope::default(), groups.block_size());
    chain.extend(last);
    for _ in 0..n_sequences {
        let hit = pool.find_prefix(&chain, last, N_BLOCKS * SIZE - 1);
        assert_eq!(hit.n_blocks, N_BLOCKS - 1, "all but the last token");
        let allocation = pool.allocate(N_BLOCKS * SIZE, &hit);
        pool.release(allocation.expect("the rest is cached").table, None);
    }
    let found = each(start.elapsed());
    println!(
        "a block: taken and given back in {plain:?} (target 100 ns); never seen before, hashed in {hashing:?}, and looked up, taken, made findable, let go and evicted in {rest:?} (target 1 µs for both); found and let go in {found:?}"
    );
}

fn positive(n: u32) -> NonZeroU32 {
    NonZeroU32::new(n).unwrap_or(NonZeroU32::MIN)
}

fn report(what: &str, times: &[Duration]) {
    let at = |share: f64| times[((times.len() - 1) as f64 * share) as usize];
    println!(
        "host work a step at {N_REQUESTS} running requests, {what}, {} steps: median {:?}, 99 % {:?}, most {:?}; target {TARGET:?}: {:.0} % of it",
        times.len(),
        at(0.5),
        at(0.99),
        at(1.0),
        at(0.5).as_secs_f64() / TARGET.as_secs_f64() * 100.0,
    );
}

fn sampling(seed: u64) -> SamplingParams {
    SamplingParams {
        temperature: 0.7,
        top_p: 0.9,
        top_k: None,
        min_p: 0.0,
        seed,
    }
}

/// All three, so that the prompt's tokens count too.
fn penalties() -> LogitsOptions {
    LogitsOptions {
        repetition_penalty: 1.1,
        presence_penalty: 0.5,
        frequency_penalty: 0.5,
        ..LogitsOptions::default()
    }
}

/// What a row of every request changes in its logits.
fn logits(options: &Option<LogitsOptions>, prompt: &[u32]) -> Option<Box<LogitsProcessors>> {
    let options = options.clone()?;
    LogitsProcessors::new(options, prompt, &[], 1 << 20).map(Box::new)
}

/// What is scheduled.
struct Load {
    kinds: Vec<GroupKind>,
    /// Of 16 tokens.
    n_blocks: u32,
    /// Steps after each of which a client leaves.
    leaves: Option<usize>,
    caching: Option<PrefixCaching>,
    options: Option<LogitsOptions>,
}

/// Times of schedule, edits and commit, sorted.
fn scheduling(n_steps: usize, load: &Load) -> Vec<Duration> {
    let Load {
        kinds,
        n_blocks,
        leaves,
        caching,
        options,
    } = load;
    let groups = CacheGroups::new(positive(16), LIMITS.max_tokens as u32, kinds.clone());
    let mut blocks = BlockPool::new(*n_blocks, groups, *caching);
    let mut scheduler = Scheduler::new(LIMITS, 4_096);
    let mut next_id = 0;
    let mut arrive = |scheduler: &mut Scheduler, blocks: &BlockPool| {
        // No two prompts are alike.
        let prompt: Vec<u32> = (0..161).map(|p| next_id as u32 * 161 + p).collect();
        let chain = caching.map(|caching| {
            let mut chain = PrefixChain::new(caching.root, PrefixScope::default(), positive(16));
            chain.extend(&prompt);
            chain
        });
        // Lengths differ, so that requests end and arrive throughout.
        let max_tokens = 200 + (next_id * 37 % 277) as u32;
        let request = Request {
            logits: logits(options, &prompt),
            stop_token_ids: vec![2],
            sampling: sampling(next_id),
            ..Request::greedy(RequestId(next_id), prompt, max_tokens)
        };
        scheduler.add(blocks, request, chain);
        next_id += 1;
        next_id
    };
    for _ in 0..N_REQUESTS + 64 {
        arrive(&mut scheduler, &blocks);
    }
    let mut times = Vec::with_capacity(n_steps);
    for step in 0..n_steps {
        let start = Instant::now();
        let mut schedule = scheduler.schedule(&mut blocks, LIMITS.max_tokens as u32);
        if schedule.edits != Edits::None {
            scheduler.edit_logits(&mut schedule.requests);
        }
        let scheduled = start.elapsed();
        let sampled = schedule.requests.iter().zip(0..).map(|(_, row)| Sampled {
            token: 3 + (step * 7 + row) as u32 % 50_000,
            ..Sampled::default()
        });
        let sampled = sampled.collect();
        // A device lets go of what it was asked for.
        schedule.requests.clear();
        let start = Instant::now();
        let outputs = scheduler.commit(&mut blocks, DeviceOutput { sampled });
        std::hint::black_box(scheduler.load());
        times.push(scheduled + start.elapsed());
        for _ in outputs.iter().filter(|output| output.finished.is_some()) {
            arrive(&mut scheduler, &blocks);
        }
        if leaves.is_some_and(|leaves| step % leaves == 0) {
            let newest = arrive(&mut scheduler, &blocks);
            scheduler.abort(&mut blocks, RequestId(newest - N_REQUESTS as u64 / 2));
        }
    }
    times.sort();
    times
}

/// Times of a step, sorted, from the engine's loop to the streams of 256 clients, each of which takes its events.
fn whole_way(n_steps: usize, changes: Option<LogitsOptions>) -> Vec<Duration> {
    let options = LoadOptions {
        block_size: positive(16),
        max_model_len: None,
        max_num_seqs: positive(N_REQUESTS as u32),
        max_num_batched_tokens: positive(8_192),
        n_blocks: Some(positive(65_536)),
        memory_utilization: 0.9,
        precision: None,
        memory_limit: None,
    };
    let files = ModelFiles::demo();
    let make = |_| Ok(Box::new(NullDevice::default()) as Box<_>);
    let loaded = load(&files, &options, make, |_| {}).expect("the demo model loads");
    let max_tokens = (n_steps as u32).min(loaded.info.max_model_len - 16);
    let engine = Engine::start(Box::new(loaded.executor), loaded.info, 1_000);
    let (engine, outputs) = engine.expect("a thread starts");
    let metrics = Arc::new(Metrics::new("demo").expect("a name for metrics"));
    let budget = ByteBudget::new(1 << 30);
    let async_engine =
        AsyncEngine::start(engine.handle(), outputs, metrics, budget).expect("a thread starts");
    let tokenizer = Tokenizer::load(TextFiles {
        tokenizer: &files.require("tokenizer.json").expect("the demo has one"),
        tokenizer_config: None,
        chat_template: None,
    });
    let tokenizer = tokenizer.expect("the demo's tokenizer loads");
    let streams: Vec<_> = (0..N_REQUESTS as u64)
        .flat_map(|i| {
            let request = GenerationRequest {
                prompt: vec![1; 16],
                max_tokens,
                sampling: sampling(i),
                logits: logits(&changes, &[1; 16]),
                n: NonZeroU32::MIN,
                beams: None,
                stop_token_ids: Vec::new(),
                stop: StopStrings::new([]),
                logprobs: None,
                prompt_logprobs: None,
                cache_salt: None,
                resumed: Vec::new(),
                detokenizer: Detokenizer::new(Arc::clone(tokenizer.vocabulary()), true),
                arrived: Arrival {
                    at: Instant::now(),
                    call: Arc::default(),
                },
            };
            async_engine.generate(request).expect("the queue has room")
        })
        .collect();
    let runtime = tokio::runtime::Builder::new_current_thread().build();
    let runtime = runtime.expect("a runtime without drivers");
    // The last stream gets its event when those of all the others are out.
    let mut times = runtime.block_on(async {
        use futures::StreamExt as _;
        let mut all = futures::future::join_all(streams.into_iter().map(|mut stream| async move {
            let (mut times, mut last) = (Vec::new(), Instant::now());
            while stream.next().await.is_some() {
                times.push(last.elapsed());
                last = Instant::now();
            }
            times
        }))
        .await;
        all.pop().unwrap_or_default()
    });
    engine.handle().stop();
    engine.join().expect("the engine ends as told");
    async_engine.join();
    times.sort();
    times
}
