use kvasir_crds::LoadReport;
use kvasir_crds::load_report::{
    BlockCounts, HeldCounts, QueueCounts, SCHEMA, SlotCounts, TotalCounts,
};
use proptest::prelude::*;

use super::*;

fn policy() -> Autoscaling {
    serde_json::from_value(serde_json::json!({
        "minReplicas": 1, "maxReplicas": 10, "targetBlockUtilizationPercent": 80, "targetQueueDepth": 4,
        "scaleDownStabilizationSeconds": 60
    }))
    .unwrap()
}

/// A replica of 100 blocks, which says nothing but blocks and queue.
fn load(active: u64, waiting_need: u64, waiting: u64) -> ReplicaLoad {
    ReplicaLoad::Reported(LoadReport {
        blocks: Some(BlockCounts {
            block_size: 16,
            total: 100,
            active,
            waiting_need,
            free: 100_u64.saturating_sub(active),
            cached: 0,
        }),
        queue: Some(QueueCounts {
            waiting,
            ..QueueCounts::default()
        }),
        ..LoadReport::default()
    })
}

fn with(load: ReplicaLoad, change: impl FnOnce(&mut LoadReport)) -> ReplicaLoad {
    let ReplicaLoad::Reported(mut report) = load else {
        return load;
    };
    change(&mut report);
    ReplicaLoad::Reported(report)
}

/// A replica of four slots.
fn slots(running: u64, waiting: u64) -> ReplicaLoad {
    with(load(running, 0, waiting), |report| {
        report.slots = Some(SlotCounts {
            running: Some(running),
            limit: Some(4),
            generated_tokens: Some(0),
        });
    })
}

/// A replica that has computed so many prompt tokens, and has so many to compute.
fn prefill(boot: &str, computed: u64, backlog: u64) -> ReplicaLoad {
    with(load(10, 0, 0), |report| {
        report.boot_id = Some(boot.into());
        report.prefill_backlog_tokens = Some(backlog);
        report.totals = Some(TotalCounts {
            prompt_tokens: Some(computed),
            generated_tokens: Some(0),
            ended_sequences: Some(0),
        });
        report.slots = Some(SlotCounts {
            running: Some(1),
            limit: Some(64),
            generated_tokens: Some(0),
        });
    })
}

fn decide_at(
    policy: &Autoscaling,
    current: u32,
    loads: &[ReplicaLoad],
    history: &mut History,
    now: Duration,
) -> Decision {
    let look = Look {
        current,
        loads,
        starting: &[],
        now,
    };
    decide(policy, &look, history)
}

/// A history of the same answer over the whole window, up to second 100.
fn settled(wanted: u32) -> History {
    let mut history = History::default();
    for second in 0..=100 {
        let at = Duration::from_secs(second);
        history.window.push(at, wanted, Duration::from_secs(60));
    }
    history
}

#[test]
fn cases() {
    let draining = with(load(100, 0, 50), |r| r.draining = Some(true));
    let stale = with(load(0, 0, 0), |r| r.heartbeat_age_ms = Some(60_000));
    let unknown = with(load(0, 0, 0), |r| r.blocks = None);
    let new = History::default;
    for (why, current, loads, history, want) in [
        (
            "idle stays at the minimum",
            1,
            vec![load(0, 0, 0)],
            new(),
            1,
        ),
        (
            "at the target exactly nothing is added",
            1,
            vec![load(80, 0, 0)],
            new(),
            1,
        ),
        (
            "one block over the target adds one",
            1,
            vec![load(81, 0, 0)],
            new(),
            2,
        ),
        (
            "waiting need counts as demand, in one jump",
            1,
            vec![load(90, 150, 4)],
            new(),
            3,
        ),
        ("the queue alone scales", 1, vec![load(10, 3, 17)], new(), 5),
        (
            "never past the maximum",
            1,
            vec![load(100, 5_000, 900)],
            new(),
            10,
        ),
        (
            "pending replicas are asked for already: no more of them",
            3,
            vec![load(90, 150, 4)],
            new(),
            3,
        ),
        (
            "up from a new history at once",
            2,
            vec![load(100, 0, 0); 2],
            new(),
            3,
        ),
        (
            "down not right after a restart",
            3,
            vec![load(1, 0, 0); 3],
            new(),
            3,
        ),
        (
            "down when the whole window was low",
            3,
            vec![load(1, 0, 0); 3],
            settled(1),
            1,
        ),
        (
            "a peak in the window holds",
            3,
            vec![load(1, 0, 0); 3],
            settled(3),
            3,
        ),
        (
            "down only as far as the rest can carry",
            3,
            vec![load(40, 0, 0); 3],
            settled(1),
            2,
        ),
        (
            "no lower than the window's largest answer",
            5,
            vec![load(1, 0, 0); 5],
            settled(4),
            4,
        ),
        (
            "a silent replica counts as full on the way down",
            2,
            vec![load(1, 0, 0), ReplicaLoad::Silent],
            settled(1),
            2,
        ),
        (
            "a silent replica counts as empty on the way up",
            2,
            vec![load(80, 0, 0), ReplicaLoad::Silent],
            new(),
            2,
        ),
        (
            "a stale heartbeat is silence",
            2,
            vec![load(1, 0, 0), stale.clone()],
            settled(1),
            2,
        ),
        (
            "unknown capacity is silence",
            2,
            vec![load(1, 0, 0), unknown.clone()],
            settled(1),
            2,
        ),
        (
            "all silent: hold",
            4,
            vec![ReplicaLoad::Silent; 4],
            settled(1),
            4,
        ),
        ("all unknown: hold", 4, vec![unknown; 4], settled(1), 4),
        ("none ready: hold", 2, vec![], settled(1), 2),
        (
            "draining is no demand",
            1,
            vec![load(10, 0, 0), draining.clone()],
            new(),
            1,
        ),
        (
            "only draining ones: hold",
            2,
            vec![draining.clone()],
            settled(1),
            2,
        ),
        ("below the minimum", 0, vec![], new(), 1),
        (
            "below the minimum and loaded: one jump",
            0,
            vec![load(90, 150, 4)],
            new(),
            3,
        ),
        (
            "silent ones add nothing on the way up, however many",
            1,
            [vec![load(81, 0, 0)], vec![ReplicaLoad::Silent; 4]].concat(),
            new(),
            2,
        ),
        (
            "a silent one beside an idle one holds two of three",
            3,
            vec![load(0, 0, 0), ReplicaLoad::Silent],
            settled(1),
            2,
        ),
        (
            "the others carry a silent one that counts as full",
            4,
            vec![
                load(0, 0, 0),
                load(0, 0, 0),
                load(0, 0, 0),
                ReplicaLoad::Silent,
            ],
            settled(1),
            2,
        ),
        (
            "N-1 carry the load, each filled to nine tenths of its target",
            3,
            vec![load(48, 0, 0); 3],
            settled(1),
            2,
        ),
        (
            "N-1 lack one block",
            3,
            vec![load(49, 0, 0), load(48, 0, 0), load(48, 0, 0)],
            settled(1),
            3,
        ),
        (
            "N-1 lack room in the queue",
            3,
            vec![load(0, 0, 3); 3],
            settled(1),
            3,
        ),
        (
            "a draining one is no supply on the way down",
            3,
            vec![load(70, 0, 0), load(70, 0, 0), draining.clone()],
            settled(1),
            2,
        ),
        (
            "a draining one is no silence either",
            2,
            vec![load(10, 0, 0), draining.clone()],
            settled(1),
            1,
        ),
        (
            "a pool of no blocks is unknown capacity",
            2,
            vec![
                load(1, 0, 0),
                with(load(0, 0, 0), |r| r.blocks = Some(BlockCounts::default())),
            ],
            settled(1),
            2,
        ),
        (
            "a report of another schema is silence",
            2,
            vec![
                load(1, 0, 0),
                with(load(0, 0, 0), |r| r.schema = Some(SCHEMA + 1)),
            ],
            settled(1),
            2,
        ),
        (
            "the slots that run and those who wait for one",
            5,
            [vec![slots(4, 1); 4], vec![slots(4, 0)]].concat(),
            settled(1),
            8,
        ),
        ("N-1 lack slots", 5, vec![slots(3, 0); 5], settled(1), 5),
        ("N-1 have slots", 5, vec![slots(2, 0); 5], settled(1), 4),
        (
            "slots that one doesn't tell are unknown for all",
            2,
            vec![slots(4, 3), load(1, 0, 0)],
            new(),
            2,
        ),
        (
            "one that has waited for long asks for one more",
            2,
            vec![
                with(load(10, 1, 1), |r| {
                    r.queue.as_mut().unwrap().oldest_waiting_ms = 3_000;
                }),
                load(10, 0, 0),
            ],
            new(),
            3,
        ),
        (
            "what is held elsewhere is demand, and its holder no replica",
            2,
            vec![
                load(10, 0, 0),
                ReplicaLoad::Reported(LoadReport {
                    held: Some(HeldCounts {
                        requests: Some(9),
                        ..HeldCounts::default()
                    }),
                    ..LoadReport::default()
                }),
            ],
            settled(1),
            3,
        ),
        (
            "a report of nothing is silence",
            2,
            vec![load(1, 0, 0), ReplicaLoad::Reported(LoadReport::default())],
            settled(1),
            2,
        ),
        (
            "nonsense overflows nothing",
            2,
            vec![load(u64::MAX, u64::MAX, u64::MAX); 2],
            new(),
            10,
        ),
        (
            "above the maximum",
            20,
            vec![load(100, 0, 0); 20],
            new(),
            10,
        ),
    ] {
        let mut history = history;
        let decision = decide_at(
            &policy(),
            current,
            &loads,
            &mut history,
            Duration::from_secs(101),
        );
        assert_eq!(decision.replicas, want, "{why}: {}", decision.reason);
    }
}

#[test]
fn a_lull_is_waited_out_to_the_second() {
    let mut history = History::default();
    let busy = vec![load(80, 40, 0); 2];
    assert_eq!(
        decide_at(&policy(), 2, &busy, &mut history, Duration::ZERO).replicas,
        3
    );
    for second in 1..=60 {
        let idle = vec![load(0, 0, 0); 3];
        assert_eq!(
            decide_at(
                &policy(),
                3,
                &idle,
                &mut history,
                Duration::from_secs(second)
            )
            .replicas,
            3,
            "{second}"
        );
    }
    assert_eq!(
        decide_at(
            &policy(),
            3,
            &vec![load(0, 0, 0); 3],
            &mut history,
            Duration::from_secs(61)
        )
        .replicas,
        1
    );
}

/// Seconds of load, silence or nothing at all, and how many replicas the last second leaves of three.
#[test]
fn a_window_counts_only_what_is_known() {
    enum Second {
        Idle(u64),
        Silent(u64),
        Nothing(u64),
    }
    use Second::{Idle, Nothing, Silent};
    for (why, seconds, want) in [
        ("a whole window of idleness", vec![Idle(62)], 1),
        ("less than a window", vec![Idle(60)], 3),
        (
            "silence is no idleness: the window begins after it",
            vec![Idle(50), Silent(20), Idle(50)],
            3,
        ),
        ("and ends", vec![Idle(50), Silent(20), Idle(62)], 1),
        (
            "time that nobody looked at is no idleness",
            vec![Idle(50), Nothing(3600), Idle(2)],
            3,
        ),
        (
            "nor is a gap that is shorter than the window",
            vec![Idle(40), Nothing(30), Idle(10)],
            3,
        ),
    ] {
        let (mut history, mut now, mut replicas) = (History::default(), 0, 3);
        for second in seconds {
            let (n, loads) = match second {
                Idle(n) => (n, vec![load(0, 0, 0); 3]),
                Silent(n) => (n, vec![ReplicaLoad::Silent; 3]),
                Nothing(n) => {
                    now += n;
                    continue;
                }
            };
            for _ in 0..n {
                let at = Duration::from_secs(now);
                replicas = decide_at(&policy(), 3, &loads, &mut history, at).replicas;
                now += 1;
            }
        }
        assert_eq!(replicas, want, "{why}");
    }
}

#[test]
fn a_window_shorter_than_the_time_between_two_looks_is_waited_out_too() {
    for (why, window, looks, want) in [
        ("one look knows of no window", 1, &[5][..], 3),
        ("the second one does", 1, &[5, 8], 1),
        ("three seconds, with replicas that time out", 3, &[5, 9], 1),
        ("no window at all", 0, &[5], 1),
        (
            "a pause longer than looks ever take is a gap",
            1,
            &[5, 16],
            3,
        ),
    ] {
        let mut policy = policy();
        policy.scale_down_stabilization_seconds = window;
        let (mut history, mut replicas) = (History::default(), 0);
        for second in looks {
            let at = Duration::from_secs(*second);
            replicas = decide_at(&policy, 3, &vec![load(0, 0, 0); 3], &mut history, at).replicas;
        }
        assert_eq!(replicas, want, "{why}");
    }
}

#[test]
fn a_window_that_grows_is_waited_out_anew() {
    let mut history = settled(1);
    let mut longer = policy();
    longer.scale_down_stabilization_seconds = 300;
    for second in 101..=340 {
        let at = Duration::from_secs(second);
        let decision = decide_at(&longer, 3, &vec![load(0, 0, 0); 3], &mut history, at);
        let want = if second < 340 { 3 } else { 1 };
        assert_eq!(decision.replicas, want, "{second}: {}", decision.reason);
    }
}

#[test]
fn the_reason_has_the_numbers_and_what_binds() {
    let mut history = History::default();
    let loads = [with(slots(3, 4), |r| {
        let blocks = r.blocks.as_mut().unwrap();
        (blocks.active, blocks.waiting_need) = (90, 150);
    })];
    let decision = decide_at(&policy(), 1, &loads, &mut history, Duration::ZERO);
    assert_eq!(
        decision.reason,
        "scaled up from 1 to 3: Blocks asks for 3 replicas: 90 blocks active and 150 needed by waiting requests, of 100 \
         in 1 reporting replica (target 80 %); 3 sequences in 4 slots (target 80 %); 4 requests waiting (target 4 per replica)"
    );
    assert_eq!(decision.constraint, Some(Constraint::Blocks));
}

/// Seen: four slots a replica, 24 clients, the queue above its target, and it went from 5 to 4.
#[test]
fn replicas_whose_slots_are_all_taken_stay() {
    let mut policy = policy();
    policy.max_replicas = 5.try_into().unwrap();
    let mut history = settled(1);
    let loads = [vec![slots(4, 1); 4], vec![slots(4, 0)]].concat();
    let decision = decide_at(&policy, 5, &loads, &mut history, Duration::from_secs(101));
    assert_eq!((decision.replicas, decision.demand), (5, 8));
    assert_eq!(decision.constraint, Some(Constraint::Slots));
    assert_eq!(decision.unmet, 3);
}

#[test]
fn the_demand_is_what_the_load_is_work_for_whatever_is_allowed() {
    for (why, loads, want) in [
        ("within what is allowed", vec![load(90, 150, 4)], (3, 3)),
        ("more than is allowed", vec![load(100, 900, 100)], (10, 25)),
        ("idle", vec![load(0, 0, 0)], (1, 1)),
        ("unknown", vec![ReplicaLoad::Silent], (1, 0)),
    ] {
        let mut history = History::default();
        let decision = decide_at(&policy(), 1, &loads, &mut history, Duration::ZERO);
        assert_eq!((decision.replicas, decision.demand), want, "{why}");
    }
}

#[test]
fn the_load_is_that_of_the_replicas_that_report() {
    let draining = with(load(100, 0, 50), |r| r.draining = Some(true));
    let both = [
        load(91, 150, 4),
        ReplicaLoad::Silent,
        draining,
        load(0, 0, 1),
    ];
    let found = summarize(&both).unwrap();
    assert_eq!((found.active_blocks, found.blocks), (91, 200));
    assert_eq!(
        found.utilization_percent(),
        45,
        "whole percents, rounded down"
    );
    assert_eq!(found.waiting_requests, 5);
    assert_eq!(
        summarize(&[ReplicaLoad::Silent]),
        None,
        "silence is no load of 0"
    );
    assert_eq!(summarize(&[]), None);
    let nonsense = summarize(&[load(u64::MAX, 0, 0)]).unwrap();
    assert_eq!(nonsense.utilization_percent(), 100);
}

/// Every two seconds 20,000 prompt tokens arrive at a replica that computes 16,000 of them.
fn overload(history: &mut History, looks: u64) -> Decision {
    let mut last = None;
    for look in 0..looks {
        let loads = [prefill("a", look * 16_000, 40_000 + look * 4_000)];
        let at = Duration::from_secs(look * 2);
        last = Some(decide_at(&policy(), 1, &loads, history, at));
    }
    last.unwrap()
}

#[test]
fn the_rate_of_prefill_is_learned_where_prompts_wait_and_binds_from_then_on() {
    let mut history = History::default();
    let first = overload(&mut history, 2);
    assert_eq!(
        first.constraint,
        Some(Constraint::Blocks),
        "nothing is known"
    );
    let decision = overload(&mut history, 4);
    assert_eq!(decision.constraint, Some(Constraint::PrefillRate));
    // 10,000 a second arrive and 52,000 wait for ten seconds, of 8,000 a second: 15,200 / 6,400.
    assert_eq!(decision.replicas, 3, "{}", decision.reason);
    let learned = history.learned().unwrap();
    assert_eq!(learned.prefill_tokens_per_second, Some(8_000));

    // After a restart the status tells it.
    let mut anew = History::default();
    anew.read_back(Some(&learned));
    let waiting = [prefill("b", 0, 200_000)];
    let decision = decide_at(&policy(), 1, &waiting, &mut anew, Duration::ZERO);
    assert_eq!(decision.constraint, Some(Constraint::PrefillRate));
    anew.read_back(None);
    assert_eq!(anew.learned(), Some(learned), "and only once");
}

#[test]
fn prompts_that_wait_for_slots_or_blocks_say_nothing_of_the_rate() {
    let full = |load| {
        with(load, |r: &mut LoadReport| {
            r.slots.as_mut().unwrap().running = Some(64);
        })
    };
    let none_free = |load| {
        with(load, |r: &mut LoadReport| {
            let blocks = r.blocks.as_mut().unwrap();
            (blocks.active, blocks.free, blocks.waiting_need) = (98, 2, 30);
        })
    };
    let another = |load| load;
    type Change<'a> = &'a dyn Fn(ReplicaLoad) -> ReplicaLoad;
    let changes: [(&str, Change<'_>, &str); 3] = [
        ("no slot", &full, "a"),
        ("no block", &none_free, "a"),
        ("another start of the replica", &another, "b"),
    ];
    for (why, change, boot) in changes {
        let mut history = History::default();
        for (second, load) in [
            (0, change(prefill("a", 50, 40_000))),
            (2, change(prefill(boot, 100, 40_000))),
        ] {
            let at = Duration::from_secs(second);
            decide_at(&policy(), 1, &[load], &mut history, at);
        }
        assert_eq!(history.learned(), None, "{why}");
    }
}

#[test]
fn preemptions_teach_how_full_a_pool_may_be() {
    let with_preemptions = |active, n| {
        with(prefill("a", 0, 0), |r| {
            r.blocks.as_mut().unwrap().active = active;
            r.preemptions = Some(n);
        })
    };
    let mut history = History::default();
    for (second, active, n) in [(0, 70, 0), (2, 95, 3)] {
        let at = Duration::from_secs(second);
        decide_at(
            &policy(),
            1,
            &[with_preemptions(active, n)],
            &mut history,
            at,
        );
    }
    assert_eq!(history.learned().unwrap().block_percent, Some(70));
    let at = Duration::from_secs(4);
    let decision = decide_at(&policy(), 1, &[with_preemptions(71, 3)], &mut history, at);
    assert_eq!(
        (decision.replicas, decision.constraint),
        (2, Some(Constraint::Blocks))
    );
}

#[test]
fn running_sequences_are_expected_to_grow_to_the_mean() {
    let report = |ended, generated_total, running, generated| {
        with(prefill("a", 0, 0), |r| {
            r.totals = Some(TotalCounts {
                prompt_tokens: Some(0),
                generated_tokens: Some(generated_total),
                ended_sequences: Some(ended),
            });
            r.slots = Some(SlotCounts {
                running: Some(running),
                limit: Some(64),
                generated_tokens: Some(generated),
            });
        })
    };
    let mut history = History::default();
    let mut at = |second, load: ReplicaLoad| {
        let at = Duration::from_secs(second);
        decide_at(&policy(), 1, &[load], &mut history, at)
    };
    at(0, report(0, 0, 1, 0));
    // 160 tokens each.
    at(2, report(20, 3_200, 1, 0));
    let young = at(4, report(20, 3_200, 12, 0));
    assert_eq!(
        young.replicas, 2,
        "12 will have 10 blocks each, beside the 10 active: {young:?}"
    );
    let old = at(6, report(20, 3_200, 12, 12 * 160));
    assert_eq!(old.demand, 1, "they have them");
}

#[test]
fn those_that_start_are_supply_until_they_are_late() {
    let seconds = Duration::from_secs;
    let mut history = History::default();
    for _ in 0..3 {
        history.note_start(seconds(40));
    }
    // What waits is worked off in the 40 seconds of a start: a quarter of it counts.
    let loads = [load(100, 400, 0)];
    for (why, ages, unmet, overdue) in [
        ("none starts", vec![], 2, None),
        ("in time", vec![seconds(100), seconds(1)], 0, None),
        ("one is late", vec![seconds(121), seconds(1)], 1, Some(1)),
    ] {
        let look = Look {
            current: 3,
            loads: &loads,
            starting: &ages,
            now: seconds(0),
        };
        let decision = decide(&policy(), &look, &mut history.clone());
        assert_eq!(decision.replicas, 3, "{why}");
        assert_eq!(decision.unmet, unmet, "{why}");
        assert_eq!(
            decision.overdue.map(|o| (o.n, o.deadline)),
            overdue.map(|n| (n, seconds(120))),
            "{why}"
        );
    }
    assert_eq!(history.learned().unwrap().start_seconds, Some(40));
}

#[test]
fn the_window_is_twice_a_start_where_that_is_longer() {
    let mut history = History::default();
    history.note_start(Duration::from_secs(100));
    let mut replicas = 3;
    for second in (0..=200).step_by(2) {
        let at = Duration::from_secs(second);
        let loads = vec![load(0, 0, 0); 3];
        let decision = decide_at(&policy(), replicas, &loads, &mut history, at);
        if second < 200 {
            let next = decision.next.unwrap();
            assert_eq!(next.replicas, 1);
            assert_eq!(next.after, Duration::from_secs(200 - second), "{second}");
        }
        replicas = decision.replicas;
        assert_eq!(replicas, if second < 200 { 3 } else { 1 }, "{second}");
    }
}

#[test]
fn noise_around_a_level_makes_no_flaps() {
    let mut history = History::default();
    let (mut replicas, mut changes) = (1, 0);
    let mut noise = 1_u64;
    for second in (0..3_600).step_by(2) {
        noise = noise
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        // 3 replicas at 64 of 80 blocks, a tenth more or less.
        let total = 192 + (noise >> 33) % 39 - 19;
        let each = total / u64::from(replicas);
        let loads = vec![load(each, 0, 0); replicas as usize];
        let at = Duration::from_secs(second);
        let decision = decide_at(&policy(), replicas, &loads, &mut history, at);
        changes += u32::from(decision.replicas != replicas);
        replicas = decision.replicas;
    }
    assert!(changes <= 4, "{changes} changes");
    assert_eq!(replicas, 3);
}

/// Any report at all.
fn anything() -> impl Strategy<Value = ReplicaLoad> {
    let figure = || prop_oneof![Just(None), Just(Some(u64::MAX)), (0..200u64).prop_map(Some)];
    let figures = prop::collection::vec(figure(), 16);
    (figures, any::<bool>(), 0..3u32).prop_map(|(f, draining, boot)| {
        if boot == 0 && draining {
            return ReplicaLoad::Silent;
        }
        let n = |at: usize| f[at].unwrap_or(0);
        ReplicaLoad::Reported(LoadReport {
            boot_id: Some(format!("{boot}")),
            draining: Some(draining),
            blocks: f[0].map(|total| BlockCounts {
                block_size: n(1) as u32,
                total,
                active: n(2),
                cached: n(3),
                free: n(4),
                waiting_need: n(5),
            }),
            queue: f[6].map(|waiting| QueueCounts {
                running: n(7),
                waiting,
                waiting_limit: 0,
                oldest_waiting_ms: n(8),
            }),
            slots: Some(SlotCounts {
                running: f[9],
                limit: f[10],
                generated_tokens: f[11],
            }),
            prefill_backlog_tokens: f[12],
            preemptions: f[13],
            totals: Some(TotalCounts {
                prompt_tokens: f[14],
                generated_tokens: f[15],
                ended_sequences: f[1],
            }),
            held: f[8].map(|n| HeldCounts {
                requests: Some(n),
                prompt_tokens: f[3],
                oldest_ms: None,
            }),
            ..LoadReport::default()
        })
    })
}

proptest! {
    /// A window holds less than it was told, and knows the largest answer all the same, and when a smaller one will be it.
    #[test]
    fn a_window_knows_its_largest_answer(
        told in prop::collection::vec((0u64..40, 1u32..10), 1..80),
        length in 1u64..60,
    ) {
        let (mut window, mut now, mut all) = (Window::default(), 0, Vec::new());
        let length_s = Duration::from_secs(length);
        for (pause, answer) in told {
            now += pause;
            window.push(Duration::from_secs(now), answer, length_s);
            all.push((now, answer));
            let within = all.iter().filter(|(at, _)| now - at <= length);
            prop_assert_eq!(Some(window.max()), within.map(|(_, answer)| *answer).max());
            prop_assert!(window.len() <= 9, "one entry for each number at most");
            let at = window.settles_at(answer, length_s);
            prop_assert!(at <= Duration::from_secs(now + length));
        }
    }

    /// Whatever is reported, over several looks: never out of bounds, and never fewer at once than is said to be settled.
    #[test]
    fn nonsense_never_leaves_the_bounds(
        looks in prop::collection::vec(prop::collection::vec(anything(), 0..4), 1..8),
        current in 0u32..20,
    ) {
        let (mut history, mut replicas) = (settled(3), current);
        for (n, loads) in looks.iter().enumerate() {
            let at = Duration::from_secs(101 + 2 * n as u64);
            replicas = decide_at(&policy(), replicas, loads, &mut history, at).replicas;
            prop_assert!((1..=10).contains(&replicas));
            let inside = (1..=10).contains(&current);
            prop_assert!(replicas >= 3.min(current) || !inside, "the window knows of 3: {replicas}");
        }
    }

    /// Nonsense of one look hurts no later one: with the window over, an idle deployment is at its minimum again.
    #[test]
    fn nonsense_is_forgotten(loads in prop::collection::vec(anything(), 0..4)) {
        let (mut history, mut replicas) = (History::default(), 4);
        replicas = decide_at(&policy(), replicas, &loads, &mut history, Duration::ZERO).replicas;
        for second in (2..200).step_by(2) {
            let idle: Vec<_> = (0..replicas).map(|n| prefill(&format!("idle-{n}"), 0, 0)).collect();
            let idle = idle.into_iter().map(|load| with(load, |r| {
                r.blocks.as_mut().unwrap().active = 0;
                r.slots.as_mut().unwrap().running = Some(0);
            }));
            let idle: Vec<_> = idle.collect();
            let at = Duration::from_secs(second);
            replicas = decide_at(&policy(), replicas, &idle, &mut history, at).replicas;
        }
        prop_assert_eq!(replicas, 1);
    }

    /// What is taken away is not missed.
    #[test]
    fn bounded_and_sufficient(
        current in 1u32..12,
        actives in prop::collection::vec((0u64..=100, 0u64..300, 0u64..40), 0..6),
        silent in 0usize..3,
        past in 1u32..10,
    ) {
        let mut loads: Vec<_> = actives.iter().map(|(a, n, w)| load(*a, *n, *w)).collect();
        loads.extend(std::iter::repeat_n(ReplicaLoad::Silent, silent));
        let now = Duration::from_secs(101);
        let decision = decide_at(&policy(), current, &loads, &mut settled(past), now);
        prop_assert!((1..=10).contains(&decision.replicas));
        if decision.replicas < current && current <= 10 {
            let demand: u64 = actives.iter().map(|(a, n, _)| a + n).sum();
            prop_assert!(u64::from(decision.replicas) * 80 >= demand.min(800), "{decision:?}");
        }
    }

    /// More demand never gives fewer replicas, whichever replica it stands at, and in whatever.
    #[test]
    fn monotonic_in_demand(
        current in 1u32..12,
        replicas in prop::collection::vec((prop::array::uniform6(0u64..100), prop::array::uniform6(0u64..100)), 0..6),
        silent in 0usize..3,
        past in 1u32..10,
    ) {
        let silent = vec![ReplicaLoad::Silent; silent];
        let report = |(n, [active, need, waiting, running, backlog, age]): (usize, [u64; 6])| {
            with(prefill(&format!("{n}"), 10_000, backlog * 1_000), |r| {
                let (blocks, queue) = (r.blocks.as_mut().unwrap(), r.queue.as_mut().unwrap());
                (blocks.active, blocks.waiting_need) = (active.min(100), need);
                (queue.waiting, queue.oldest_waiting_ms) = (waiting, age * 50);
                r.slots.as_mut().unwrap().running = Some(running.min(64));
            })
        };
        let light = replicas.iter().map(|(less, _)| *less).enumerate().map(report);
        let heavy = replicas.iter().map(|(less, more)| {
            std::array::from_fn(|at| less[at] + more[at])
        }).enumerate().map(report);
        let decided = |loads: Vec<ReplicaLoad>| {
            let mut history = settled(past);
            // What was learned before, and a look before this one.
            overload(&mut history, 3);
            let before: Vec<_> = (0..replicas.len()).map(|n| prefill(&format!("{n}"), 0, 0)).collect();
            decide_at(&policy(), current, &before, &mut history, Duration::from_secs(99));
            let loads = [loads, silent.clone()].concat();
            decide_at(&policy(), current, &loads, &mut history, Duration::from_secs(101))
        };
        let (less, more) = (decided(light.collect()), decided(heavy.collect()));
        prop_assert!(more.replicas >= less.replicas, "{less:?} {more:?}");
        prop_assert!(more.demand >= less.demand, "{less:?} {more:?}");
    }

    /// A replica that falls silent, with no queue, is never a reason to add and never a reason to take away.
    #[test]
    fn silence_changes_nothing_for_the_worse(
        current in 1u32..=10,
        actives in prop::collection::vec(0u64..=100, 2..6),
        past in 1u32..10,
    ) {
        let loads: Vec<_> = actives.iter().map(|a| load(*a, 0, 0)).collect();
        let mut silenced = loads.clone();
        silenced[0] = ReplicaLoad::Silent;
        let now = Duration::from_secs(101);
        let heard = decide_at(&policy(), current, &loads, &mut settled(past), now).replicas;
        let unheard = decide_at(&policy(), current, &silenced, &mut settled(past), now).replicas;
        prop_assert!(unheard <= heard.max(current), "added: {heard} {unheard}");
        prop_assert!(unheard >= heard.min(current), "taken: {heard} {unheard}");
    }
}
