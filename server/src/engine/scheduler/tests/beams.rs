//! Groups whose sequences are beams: what is shared, copied and given back, and what that saves.

use super::*;

pub(super) fn width(width: u32) -> Option<BeamParams> {
    Some(BeamParams {
        width: NonZeroU32::new(width).unwrap(),
        length_penalty: 1.0,
        early_stopping: EarlyStopping::WhenImpossible,
    })
}

pub(super) fn setting(
    block_size: u32,
    n_blocks: u32,
    max_sequences: usize,
    arrivals: Vec<Arrival>,
) -> Setting {
    Setting {
        depth: 2,
        block_size,
        n_blocks,
        limits: Limits {
            max_tokens: 64,
            max_sequences,
            max_logits_rows: 64,
            max_blocks_per_sequence: 512 / block_size as usize,
        },
        kinds: vec![GroupKind::Full],
        caching: None,
        arrivals,
    }
}

/// Each row of logits reports these.
fn tops(tops: &[&[(u32, f32)]]) -> DeviceOutput {
    let row = |top: &&[(u32, f32)]| Sampled {
        top: top.to_vec(),
        ..Sampled::default()
    };
    DeviceOutput {
        sampled: tops.iter().map(row).collect(),
    }
}

#[test]
fn beams_share_full_blocks_and_copy_the_last_in_one_list() {
    let arrival = Arrival {
        n_prompt: 6,
        max_tokens: 9,
        stops: true,
        n: 2,
        beams: width(2),
        ..PLAIN
    };
    let setting = setting(4, 64, 8, vec![arrival.clone()]);
    let mut blocks = BlockPool::new(64, setting.groups(), None);
    let mut scheduler = Scheduler::new(setting.limits, 256);
    scheduler.add(&blocks, request(0, &arrival), None);
    let mut step = |want_rows: usize, output: DeviceOutput| {
        assert_eq!(
            scheduler.next_step().n_decodes as usize,
            want_rows - want_rows % 2
        );
        let schedule = scheduler.schedule(&mut blocks, u32::MAX);
        assert!(schedule.has_beams);
        let wanted: Vec<_> = schedule.requests.iter().map(|row| row.n_logprobs).collect();
        assert_eq!(
            wanted,
            vec![Some(3); want_rows],
            "two beams and a token that ends"
        );
        let counts = blocks.counts();
        let outputs = scheduler.commit(&mut blocks, output);
        (schedule.input, counts, outputs)
    };
    let tokens = |input: &StepInput| input.tokens[input.tokens.len() - 2..].to_vec();
    let ids = |ids: [u32; 2]| ids.map(TokenInput::Id).to_vec();

    let (prompt, counts, _) = step(1, tops(&[&[(1, -0.1), (2, -0.2), (3, -4.0)]]));
    assert_eq!(
        (prompt.tokens.len(), prompt.logits),
        (6, vec![5]),
        "the prompt once"
    );
    assert_eq!(
        (counts.active, counts.unshared),
        (3, 3),
        "the second's last block waits"
    );

    let others: &[(u32, f32)] = &[(8, -7.0), (9, -8.0), (10, -9.0)];
    let (first, counts, _) = step(2, tops(&[&[(5, -0.1), (6, -0.2), (4, -4.0)], others]));
    assert_eq!(tokens(&first), ids([1, 2]));
    assert_eq!(first.copies.len(), 1, "the last block of the prompt");
    assert_eq!((counts.active, counts.unshared), (3, 4));

    // Both continue the first: the second's block goes, and it has a copy of the first's.
    let (second, counts, _) = step(
        2,
        tops(&[
            &[(1, -0.1), (2, -3.0), (4, -4.0)],
            &[(3, -0.1), (8, -3.0), (9, -4.0)],
        ]),
    );
    assert_eq!(tokens(&second), ids([5, 6]));
    assert_eq!(second.copies.len(), 1, "the last block of a beam");
    let table = second
        .table_updates
        .iter()
        .find(|update| update.row == second.spans[1].row);
    assert_eq!(table.unwrap().blocks[1], second.copies[0].1);
    assert_eq!((counts.active, counts.unshared), (3, 4));

    // Each goes on by itself, at the beginning of a block; the first ends.
    let (third, counts, _) = step(2, tops(&[&[(7, -0.1), (2, -0.2), (4, -0.3)], others]));
    assert_eq!((tokens(&third), third.copies.len()), (ids([1, 3]), 0));
    assert_eq!((counts.active, counts.unshared), (5, 6));

    // Both continue the first again, whose last block has one token.
    let (fourth, counts, outputs) = step(2, tops(&[&[(7, -0.1), (1, -0.2), (2, -0.3)], others]));
    assert_eq!((tokens(&fourth), fourth.copies.len()), (ids([2, 4]), 1));
    assert_eq!(
        (counts.active, counts.unshared),
        (4, 6),
        "two full blocks have two holders"
    );
    assert!(outputs.is_empty(), "nobody learns of a beam before the end");
    assert_eq!(blocks.counts().active, 4, "and it goes on for a better one");
    scheduler.abort_sequence(&mut blocks, RequestId(0), 1);
    assert_eq!(blocks.counts().active, 4, "the other answer is wanted");
    scheduler.abort_sequence(&mut blocks, RequestId(0), 0);
    assert_eq!((blocks.counts().active, blocks.counts().unshared), (0, 0));
    assert!(scheduler.is_idle());
}

#[test]
fn beams_are_preempted_whole_and_come_back_as_they_were() {
    let arrival = |step, stops| Arrival {
        step,
        n_prompt: 9,
        max_tokens: 30,
        stops,
        scored: true,
        n: 2,
        beams: width(3),
        ..PLAIN
    };
    let arrivals = vec![
        arrival(0, false),
        arrival(1, true),
        Arrival {
            beams: None,
            ..arrival(2, false)
        },
        arrival(3, false),
    ];
    let root = PrefixKey::of_fields(&[b"test"]);
    for caching in [
        None,
        Some(PrefixCaching {
            root,
            equal_bits: true,
        }),
    ] {
        let setting = Setting {
            caching,
            ..setting(2, 52, 9, arrivals.clone())
        };
        assert!(
            run(&setting).n_preempted > 0,
            "the pool is too small for all at once"
        );
    }
}

#[test]
fn beams_find_a_prefix_and_leave_theirs() {
    let arrival = |step| Arrival {
        step,
        n_prompt: 40,
        n_shared: 40,
        max_tokens: 12,
        n: 3,
        beams: width(3),
        ..PLAIN
    };
    let root = PrefixKey::of_fields(&[b"test"]);
    let setting = Setting {
        caching: Some(PrefixCaching {
            root,
            equal_bits: true,
        }),
        ..setting(4, 128, 8, vec![arrival(0), arrival(40)])
    };
    let cached = run(&setting).cached;
    assert_eq!(cached[&RequestId(0)], 0);
    assert_eq!(
        cached[&RequestId(1)],
        36,
        "the full blocks before the token whose logits are needed"
    );
}
