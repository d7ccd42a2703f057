//! Host work of a step at 256 running requests: schedule and commit, with a device that costs nothing.
//!
//! Against the target of 100 us a step. `cargo bench -p kvasir-server --bench scheduler`.

use std::num::NonZeroU32;
use std::time::{Duration, Instant};

use kvasir_kernels::shape::Limits;
use kvasir_kernels::step::{DeviceOutput, Sampled};
use kvasir_server::engine::blocks::{BlockPool, CacheGroups, GroupKind};
use kvasir_server::engine::scheduler::Scheduler;
use kvasir_server::engine::{Request, RequestId, SamplingParams};

const N_REQUESTS: usize = 256;
const N_STEPS: usize = 2_000;
const TARGET: Duration = Duration::from_micros(100);

fn main() {
    let limits = Limits {
        max_tokens: 8_192,
        max_sequences: N_REQUESTS,
        max_logits_rows: N_REQUESTS,
        max_blocks_per_sequence: 256,
    };
    let block_size = NonZeroU32::MIN.saturating_add(15);
    let groups = CacheGroups::new(block_size, 8_192, vec![GroupKind::Full]);
    let mut blocks = BlockPool::new(65_536, groups);
    let mut scheduler = Scheduler::new(limits, 4_096);
    let mut next_id = 0;
    let mut arrive = |scheduler: &mut Scheduler| {
        scheduler.add(Request {
            id: RequestId(next_id),
            prompt: vec![1; 161],
            // Lengths differ, so that requests end and arrive throughout.
            max_tokens: 200 + (next_id * 37 % 277) as u32,
            stop_token_ids: vec![2],
            sampling: SamplingParams {
                temperature: 0.7,
                top_p: 0.9,
                top_k: None,
                seed: next_id,
            },
            logprobs: None,
            prompt_logprobs: None,
        });
        next_id += 1;
    };
    for _ in 0..N_REQUESTS + 64 {
        arrive(&mut scheduler);
    }
    let mut times = Vec::with_capacity(N_STEPS);
    for _ in 0..N_STEPS {
        let start = Instant::now();
        let schedule = scheduler.schedule(&mut blocks, limits.max_tokens as u32);
        let scheduled = start.elapsed();
        let sampled = schedule
            .requests
            .iter()
            .map(|_| Sampled {
                token: 3,
                logprob: None,
                top: Vec::new(),
            })
            .collect();
        let start = Instant::now();
        let outputs = scheduler.commit(&mut blocks, DeviceOutput { sampled });
        std::hint::black_box(scheduler.load(&blocks));
        times.push(scheduled + start.elapsed());
        for _ in outputs.iter().filter(|output| output.finished.is_some()) {
            arrive(&mut scheduler);
        }
    }
    times.sort();
    let at = |share: f64| times[((times.len() - 1) as f64 * share) as usize];
    println!(
        "host work a step at {N_REQUESTS} running requests, {} steps: median {:?}, 99 % {:?}, most {:?}; target {TARGET:?}: {:.0} % of it",
        times.len(),
        at(0.5),
        at(0.99),
        at(1.0),
        at(0.5).as_secs_f64() / TARGET.as_secs_f64() * 100.0,
    );
}
