//! The simulator's replica held against the real scheduler, block pool and pacer, and a comparison that must come out as
//! operator/README.md says.
#![allow(clippy::unwrap_used)] // A test's helpers, outside of #[test] functions.

use std::num::NonZeroU32;
use std::time::Duration;

use kvasir_e2e::simulator::hardware::{Hardware, StepSize};
use kvasir_e2e::simulator::load::{CHUNK_TOKENS, Load, Request as LoadRequest};
use kvasir_e2e::simulator::replica::Replica;
use kvasir_e2e::simulator::{Settings, compare, report};
use kvasir_kernels::shape::Limits;
use kvasir_kernels::step::{DeviceOutput, Sampled};
use kvasir_server::engine::blocks::BlockPool;
use kvasir_server::engine::groups::{CacheGroups, GroupKind};
use kvasir_server::engine::pacer::{DECODE_STRETCH, PrefillPacer};
use kvasir_server::engine::prefix::{PrefixCaching, PrefixChain, PrefixKey, PrefixScope};
use kvasir_server::engine::scheduler::{Schedule, Scheduler};
use kvasir_server::engine::{Request, RequestId};

fn positive(n: u32) -> NonZeroU32 {
    NonZeroU32::new(n).expect("not 0")
}

/// Times to the first token, preempted sequences and prompt tokens computed.
#[derive(Debug)]
struct Run {
    first_tokens: Vec<f64>,
    preemptions: u64,
    prompt_tokens: u64,
}

impl Run {
    fn new(
        load: &Load,
        mut firsts: Vec<(usize, f64)>,
        preemptions: u64,
        prompt_tokens: u64,
    ) -> Self {
        firsts.sort_by_key(|(request, _)| *request);
        assert_eq!(firsts.len(), load.requests.len(), "each has a first token");
        let took = firsts
            .iter()
            .map(|(n, at)| at - load.requests[*n].arrival_s);
        Self {
            first_tokens: took.collect(),
            preemptions,
            prompt_tokens,
        }
    }

    fn quantile(&self, share: f64) -> f64 {
        let mut sorted = self.first_tokens.clone();
        sorted.sort_by(f64::total_cmp);
        sorted[((sorted.len() - 1) as f64 * share) as usize]
    }
}

fn modelled(load: &Load, hardware: Hardware) -> Run {
    let requests = &load.requests;
    let mut replica = Replica::new(hardware, 1, 0.0);
    for (n, request) in requests.iter().enumerate() {
        replica.advance(requests, request.arrival_s);
        assert!(replica.add(requests, n, request.arrival_s));
    }
    replica.advance(requests, 1e6);
    let report = replica.report(requests, 1e6);
    let computed = report.totals.and_then(|totals| totals.prompt_tokens);
    let firsts = std::mem::take(&mut replica.first_tokens);
    let preemptions = report.preemptions.expect("it is told");
    Run::new(load, firsts, preemptions, computed.expect("it is told"))
}

/// A prompt whose chunks hold what their ids say, and whose rest is its own.
fn tokens(n: usize, request: &LoadRequest) -> Vec<u32> {
    (0..request.prompt)
        .map(|at| {
            let chunk = request.chunks.get((at / CHUNK_TOKENS) as usize);
            let own = 1_000_000 + n as u64;
            let content = chunk.copied().unwrap_or(own) * u64::from(CHUNK_TOKENS);
            (content as u32).wrapping_add(at % CHUNK_TOKENS)
        })
        .collect()
}

/// Tokens in the cache that the decodes of a step attend to.
fn cached(schedule: &Schedule) -> u64 {
    let spans = schedule.input.spans.iter();
    let decodes = spans.filter(|span| span.first_token < schedule.n_decodes);
    decodes.map(|span| u64::from(span.first_position)).sum()
}

fn real(load: &Load, hardware: Hardware) -> Run {
    let limits = Limits {
        max_tokens: hardware.max_tokens as usize,
        max_sequences: hardware.slots as usize,
        max_logits_rows: hardware.slots as usize,
        max_blocks_per_sequence: 4_096,
    };
    let caches = load
        .requests
        .iter()
        .any(|request| !request.chunks.is_empty());
    let caching = caches.then(|| PrefixCaching {
        root: PrefixKey::of_fields(&[b"simulator"]),
        equal_bits: true,
    });
    let size = positive(hardware.block_size);
    let groups = CacheGroups::new(size, hardware.max_tokens, vec![GroupKind::Full]);
    let mut blocks = BlockPool::new(hardware.blocks, groups, caching);
    let mut scheduler = Scheduler::new(limits, 60_000);
    let mut pacer = PrefillPacer::new(hardware.max_tokens, 1, Some(DECODE_STRETCH));
    let (mut now, mut next) = (0.0, 0);
    let (mut firsts, mut preemptions, mut computed) = (Vec::new(), 0, 0);
    let mut has_first = vec![false; load.requests.len()];
    while next < load.requests.len() || !scheduler.is_idle() {
        if scheduler.is_idle() {
            now = load.requests[next].arrival_s.max(now);
        }
        while let Some(request) = load.requests.get(next).filter(|r| r.arrival_s <= now) {
            let prompt = tokens(next, request);
            let chain = caching.map(|caching| {
                let mut chain = PrefixChain::new(caching.root, PrefixScope::default(), size);
                chain.extend(&prompt);
                chain
            });
            let request = Request::greedy(RequestId(next as u64), prompt, request.outputs);
            scheduler.add(&blocks, request, chain);
            next += 1;
        }
        let budget = pacer.budget(scheduler.next_step());
        let schedule = scheduler.schedule(&mut blocks, budget);
        preemptions += schedule.preempted.len() as u64;
        let size = schedule.size();
        computed += u64::from(size.n_prompt);
        let took = hardware.cost.of(StepSize {
            n_decodes: size.n_decodes.into(),
            n_cached: cached(&schedule),
            n_prompt: size.n_prompt.into(),
            n_pairs: size.n_pairs,
        });
        now += took;
        pacer.observe(size, Duration::from_secs_f64(took));
        let sampled = schedule.requests.iter().map(|_| Sampled {
            token: 3,
            ..Sampled::default()
        });
        let sampled = sampled.collect();
        for output in scheduler.commit(&mut blocks, DeviceOutput { sampled }) {
            let request = output.id.0 as usize;
            if !output.tokens.is_empty() && !std::mem::replace(&mut has_first[request], true) {
                firsts.push((request, now));
            }
        }
    }
    Run::new(load, firsts, preemptions, computed)
}

/// Prompts of conversations: each begins as one before it does.
fn conversations() -> Load {
    let mut load = Load::by_name("bursts", 200.0, 1.0).expect("it has a name");
    for (n, request) in load.requests.iter_mut().enumerate() {
        let talk = (n % 7) as u64;
        request.prompt += 1_024;
        let full = u64::from(request.prompt / CHUNK_TOKENS);
        request.chunks = (0..full)
            .map(|at| {
                if at < 2 {
                    talk * 10 + at
                } else {
                    1_000 + n as u64 * 100 + at
                }
            })
            .collect();
    }
    load
}

#[test]
fn the_model_of_a_replica_steps_as_the_real_scheduler_does() {
    let bursts = || Load::by_name("bursts", 200.0, 1.0).unwrap();
    let hardware = |blocks, slots| Hardware {
        blocks,
        slots,
        ..Hardware::slowed(4.0)
    };
    for (why, load, hardware) in [
        ("with room", bursts(), hardware(50_000, 256)),
        ("few slots", bursts(), hardware(50_000, 24)),
        ("few blocks", bursts(), hardware(1_500, 256)),
        (
            "long prompts",
            Load::by_name("prompts", 300.0, 1.0).unwrap(),
            hardware(20_000, 64),
        ),
        ("prefixes", conversations(), hardware(50_000, 256)),
    ] {
        let (model, real) = (modelled(&load, hardware), real(&load, hardware));
        for share in [0.5, 0.9, 0.99] {
            let (m, r) = (model.quantile(share), real.quantile(share));
            let allowed = 0.1 * r + 0.02;
            assert!(
                (m - r).abs() < allowed,
                "{why}, {share}: {m} s, really {r} s"
            );
        }
        let (m, r) = (model.prompt_tokens as f64, real.prompt_tokens as f64);
        assert!((m / r - 1.0).abs() < 0.03, "{why}: {m} tokens, really {r}");
        let (m, r) = (model.preemptions as f64, real.preemptions as f64);
        assert!(
            (m - r).abs() <= 0.2 * r + 1.0,
            "{why}: {m} preemptions, really {r}"
        );
    }
}

#[test]
fn a_short_comparison_comes_out_the_same_and_ours_is_beaten_by_no_peer() {
    let settings = Settings {
        trace: Vec::new(),
        load: vec!["bursts".into()],
        start_seconds: vec![2.0],
        replicas: vec![3.0],
        minutes: 15.0,
        output: None,
    };
    let cells = compare(&settings).unwrap();
    let [cell] = &cells[..] else {
        unreachable!("one cell: {}", cells.len())
    };
    let table = report::table(&cells);
    assert_eq!(report::better_peers(cell), Vec::<String>::new(), "{table}");
    assert!(cell.kvasir.outcome.attainment > 0.95, "{table}");
    assert_eq!(cell.kvasir.outcome.refusals, 0, "{table}");
    assert!(cell.clairvoyant.outcome.attainment >= 0.99, "{table}");
    let again = compare(&settings).unwrap();
    assert_eq!(
        report::json(&again),
        report::json(&cells),
        "the same each time"
    );
}
