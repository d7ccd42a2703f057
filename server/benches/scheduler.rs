//! Host work of a step at 256 running requests, against the target of 100 us: schedule and commit alone, with room, under
//! pressure (a pool too small for all, clients that leave) and with windowed layers; then the whole way, engine and
//! output thread, to 256 streams, over a device that costs nothing.
//!
//! `cargo bench -p kvasir-server --bench scheduler`; `cargo test` runs a few steps of each, so that it stays runnable.

use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvasir_kernels::null::NullDevice;
use kvasir_kernels::shape::Limits;
use kvasir_kernels::step::{DeviceOutput, Sampled};
use kvasir_server::engine::blocks::{BlockPool, CacheGroups, GroupKind};
use kvasir_server::engine::scheduler::Scheduler;
use kvasir_server::engine::{Engine, Request, RequestId, SamplingParams};
use kvasir_server::frontend::budget::ByteBudget;
use kvasir_server::frontend::{AsyncEngine, GenerationRequest};
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
    report(
        "with room",
        &scheduling(n_steps, full.clone(), 65_536, None),
    );
    // The 256 hold 4,000 to 9,000 blocks; every seventh step a client leaves.
    report("under pressure", &scheduling(n_steps, full, 5_000, Some(7)));
    report(
        "six cache groups",
        &scheduling(n_steps, gemma, 65_536, None),
    );
    report("the whole way, to 256 streams", &whole_way(n_steps));
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
        seed,
    }
}

/// Times of schedule and commit, sorted, over a pool of `n_blocks` blocks of 16; a client leaves every `leaves` steps.
fn scheduling(
    n_steps: usize,
    kinds: Vec<GroupKind>,
    n_blocks: u32,
    leaves: Option<usize>,
) -> Vec<Duration> {
    let groups = CacheGroups::new(positive(16), LIMITS.max_tokens as u32, kinds);
    let mut blocks = BlockPool::new(n_blocks, groups);
    let mut scheduler = Scheduler::new(LIMITS, 4_096);
    let mut next_id = 0;
    let mut arrive = |scheduler: &mut Scheduler| {
        scheduler.add(Request {
            id: RequestId(next_id),
            prompt: vec![1; 161],
            // Lengths differ, so that requests end and arrive throughout.
            max_tokens: 200 + (next_id * 37 % 277) as u32,
            stop_token_ids: vec![2],
            sampling: sampling(next_id),
            logprobs: None,
            prompt_logprobs: None,
        });
        next_id += 1;
        next_id
    };
    for _ in 0..N_REQUESTS + 64 {
        arrive(&mut scheduler);
    }
    let mut times = Vec::with_capacity(n_steps);
    for step in 0..n_steps {
        let start = Instant::now();
        let schedule = scheduler.schedule(&mut blocks, LIMITS.max_tokens as u32);
        let scheduled = start.elapsed();
        let sampled = schedule.requests.iter().map(|_| Sampled {
            token: 3,
            ..Sampled::default()
        });
        let sampled = sampled.collect();
        let start = Instant::now();
        let outputs = scheduler.commit(&mut blocks, DeviceOutput { sampled });
        std::hint::black_box(scheduler.load(&blocks));
        times.push(scheduled + start.elapsed());
        for _ in outputs.iter().filter(|output| output.finished.is_some()) {
            arrive(&mut scheduler);
        }
        if leaves.is_some_and(|leaves| step % leaves == 0) {
            let newest = arrive(&mut scheduler);
            scheduler.abort(&mut blocks, RequestId(newest - N_REQUESTS as u64 / 2));
        }
    }
    times.sort();
    times
}

/// Times of a step, sorted, from the engine's loop to the streams of 256 clients, each of which takes its events.
fn whole_way(n_steps: usize) -> Vec<Duration> {
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
        .map(|i| {
            let request = GenerationRequest {
                prompt: vec![1; 16],
                max_tokens,
                sampling: sampling(i),
                stop_token_ids: Vec::new(),
                stop: StopStrings::new([]),
                logprobs: None,
                prompt_logprobs: None,
                detokenizer: Detokenizer::new(Arc::clone(tokenizer.vocabulary()), true),
                arrived: Instant::now(),
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
