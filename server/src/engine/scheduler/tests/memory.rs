//! What sharing saves, and what partly filled blocks waste, by the pool's own counts (arXiv 2309.06180, figure 2 and
//! section 6.3).

use super::beams::{setting, width};
use super::*;

/// ShareGPT's means.
const N_PROMPT: u32 = 161;
const N_OUTPUTS: u32 = 338;

/// Parallel samples at the end, when they hold most, and beams over all steps.
#[test]
fn sharing_saves_what_the_paper_says() {
    let saved = |n: u32, beams: Option<BeamParams>| {
        let arrival = Arrival {
            n_prompt: N_PROMPT,
            max_tokens: N_OUTPUTS,
            n,
            beams,
            ..PLAIN
        };
        let Totals { most, sum, .. } = run(&setting(16, 256, 8, vec![arrival]));
        let saved = |counts: (u64, u64)| 1.0 - counts.0 as f64 / counts.1 as f64;
        (saved(most), saved(sum))
    };
    for n in [2, 4, 6] {
        let (at_end, _) = saved(n, None);
        let own = f64::from(N_PROMPT + n * N_OUTPUTS);
        let bound = 1.0 - own / f64::from(n * (N_PROMPT + N_OUTPUTS));
        assert!(
            (at_end - bound).abs() < 0.02,
            "{n} samples: {at_end}, of {bound}"
        );
    }
    for n in [2, 4, 6] {
        let (_, sum) = saved(n, width(n));
        // The paper has 44.3 to 66.3 %; two beams can't save more than half.
        let least = if n == 2 { 0.44 } else { 0.6 };
        assert!(
            sum > least && sum < 1.0 - 1.0 / f64::from(n),
            "{n} beams: {sum}"
        );
    }
}

#[test]
fn under_four_percent_of_active_slots_hold_nothing() {
    let limits = Limits {
        max_tokens: 512,
        max_sequences: 64,
        max_logits_rows: 64,
        max_blocks_per_sequence: 64,
    };
    let block_size = NonZeroU32::new(16).unwrap();
    let groups = CacheGroups::new(block_size, 512, vec![GroupKind::Full]);
    let mut blocks = BlockPool::new(2048, groups, None);
    let mut scheduler = Scheduler::new(limits, 1024);
    for i in 0..100 {
        let arrival = Arrival {
            n_prompt: 1 + i * 97 % (2 * N_PROMPT),
            max_tokens: 1 + i * 211 % (2 * N_OUTPUTS),
            ..PLAIN
        };
        scheduler.add(&blocks, request(i as usize, &arrival), None);
    }
    let mut sum = SlotUse::default();
    while !scheduler.is_idle() {
        let schedule = scheduler.schedule(&mut blocks, 256);
        sum += schedule.slots;
        scheduler.commit(&mut blocks, ones(schedule.requests.len()));
    }
    let waste = sum.unwritten as f64 / sum.active as f64;
    assert!((0.01..0.04).contains(&waste), "{waste}");
    assert_eq!(sum.unshared, sum.active, "nobody shares");
}
