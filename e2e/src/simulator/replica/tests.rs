use super::*;
use crate::simulator::load::{CHUNK_TOKENS, Load};

fn hardware(blocks: u32, slots: u32) -> Hardware {
    Hardware {
        blocks,
        slots,
        ..Hardware::slowed(4.0)
    }
}

/// Runs a load on one replica; at each whole second blocks are counted.
fn run(load: &Load, hardware: Hardware) -> Replica {
    let requests = &load.requests;
    let mut replica = Replica::new(hardware, 1, 0.0);
    let mut second = 0.0;
    for (n, request) in requests.iter().enumerate() {
        while second < request.arrival_s {
            second += 1.0;
            replica.advance(requests, second);
            let blocks = replica.report(requests, second).blocks.unwrap();
            let sum = blocks.active + blocks.cached + blocks.free;
            assert_eq!(sum, blocks.total, "{blocks:?} at {second}");
        }
        replica.advance(requests, request.arrival_s);
        assert!(replica.add(requests, n, request.arrival_s));
    }
    replica.advance(requests, 1e6);
    replica
}

#[test]
fn everything_ends_and_every_block_is_given_back() {
    let load = Load::by_name("bursts", 300.0, 1.0).unwrap();
    let sum =
        |of: fn(&Request) -> u32| -> u64 { load.requests.iter().map(|r| u64::from(of(r))).sum() };
    for (why, hardware, preempts) in [
        ("with room", hardware(50_000, 256), false),
        ("few slots", hardware(50_000, 16), false),
        ("few blocks", hardware(1_200, 256), true),
    ] {
        let replica = run(&load, hardware);
        assert!(replica.is_idle(), "{why}");
        assert_eq!(replica.pool.active(), 0, "{why}");
        assert_eq!(replica.decodes.cached_tokens, 0, "{why}");
        assert_eq!(replica.backlog, 0, "{why}");
        assert!(replica.decodes.takes_block.iter().all(|n| *n == 0), "{why}");
        assert_eq!(replica.first_tokens.len(), load.requests.len(), "{why}");
        let Counts {
            prompt_tokens,
            generated,
            ended,
            preemptions,
        } = replica.counts;
        assert_eq!(ended, load.requests.len() as u64, "{why}");
        assert_eq!(generated, sum(|r| r.outputs), "{why}");
        assert_eq!(preemptions > 0, preempts, "{why}");
        match preempts {
            true => assert!(prompt_tokens > sum(|r| r.prompt), "{why}: again"),
            false => assert_eq!(prompt_tokens, sum(|r| r.prompt), "{why}"),
        }
    }
}

#[test]
fn equal_prefixes_are_computed_once_and_are_the_last_to_go() {
    let requests: Vec<Request> = (0..40)
        .map(|n: u32| Request {
            arrival_s: f64::from(n) * 20.0,
            prompt: 2_100,
            outputs: 4,
            // Four chunks, of which the last is another's each time.
            chunks: vec![1, 2, 3, 100 + u64::from(n)],
        })
        .collect();
    let load = Load {
        name: "alike".into(),
        requests,
        duration_s: 800.0,
        is_generated: false,
    };
    let computed = |blocks| {
        let replica = run(&load, hardware(blocks, 8));
        assert_eq!(replica.pool.active(), 0);
        replica.counts.prompt_tokens
    };
    let first = 2_100;
    let rest = u64::from(2_100 - 3 * CHUNK_TOKENS);
    assert_eq!(computed(50_000), first + 39 * rest);
    // Room for one request and little more: what all share is younger than what each has alone.
    assert_eq!(computed(200), first + 39 * rest);
}
