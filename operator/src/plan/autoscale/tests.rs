use kvasir_crds::load_report::{BlockCounts, QueueCounts};
use proptest::prelude::*;

use super::*;

fn policy() -> Autoscaling {
    serde_json::from_value(serde_json::json!({
        "minReplicas": 1, "maxReplicas": 10, "targetBlockUtilizationPercent": 80, "targetQueueDepth": 4,
        "scaleDownStabilizationSeconds": 60
    }))
    .unwrap()
}

/// A replica of 100 blocks.
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

/// A history of the same answer over the whole window, up to second 100.
fn settled(wanted: u32) -> History {
    let mut history = History::default();
    for second in 0..=100 {
        history.push(Duration::from_secs(second), wanted, Duration::from_secs(60));
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
            vec![load(50, 0, 0); 3],
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
            "N-1 carry the load exactly",
            3,
            vec![load(54, 0, 0), load(53, 0, 0), load(53, 0, 0)],
            settled(1),
            2,
        ),
        (
            "N-1 lack one block",
            3,
            vec![load(54, 0, 0), load(54, 0, 0), load(53, 0, 0)],
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
            vec![load(80, 0, 0), load(80, 0, 0), draining.clone()],
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
        let decision = decide(
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
        decide(&policy(), 2, &busy, &mut history, Duration::ZERO).replicas,
        3
    );
    for second in 1..=60 {
        let idle = vec![load(0, 0, 0); 3];
        assert_eq!(
            decide(
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
        decide(
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
                replicas = decide(&policy(), 3, &loads, &mut history, at).replicas;
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
            replicas = decide(&policy, 3, &vec![load(0, 0, 0); 3], &mut history, at).replicas;
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
        let decision = decide(&longer, 3, &vec![load(0, 0, 0); 3], &mut history, at);
        let want = if second < 340 { 3 } else { 1 };
        assert_eq!(decision.replicas, want, "{second}: {}", decision.reason);
    }
}

#[test]
fn the_reason_has_the_numbers() {
    let decision = decide(
        &policy(),
        1,
        &[load(90, 150, 4)],
        &mut History::default(),
        Duration::ZERO,
    );
    assert_eq!(
        decision.reason,
        "scaled up from 1 to 3: 90 blocks active and 150 needed by waiting requests, of 100 in 1 reporting replica \
         (target 80 %); 4 requests waiting (target 4 per replica)"
    );
}

#[test]
fn the_demand_is_what_the_load_is_work_for_whatever_is_allowed() {
    for (why, loads, want) in [
        ("within what is allowed", vec![load(90, 150, 4)], (3, 3)),
        ("more than is allowed", vec![load(100, 900, 100)], (10, 25)),
        ("idle", vec![load(0, 0, 0)], (1, 1)),
        ("unknown", vec![ReplicaLoad::Silent], (1, 0)),
    ] {
        let decision = decide(
            &policy(),
            1,
            &loads,
            &mut History::default(),
            Duration::ZERO,
        );
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

proptest! {
    /// A history holds less than it was told, and knows the largest answer of the window all the same.
    #[test]
    fn a_history_knows_the_largest_answer_of_the_window(
        told in prop::collection::vec((0u64..40, 1u32..10), 1..80),
        window in 1u64..60,
    ) {
        let (mut history, mut now, mut all) = (History::default(), 0, Vec::new());
        for (pause, wanted) in told {
            now += pause;
            history.push(Duration::from_secs(now), wanted, Duration::from_secs(window));
            all.push((now, wanted));
            let within = all.iter().filter(|(at, _)| now - at <= window);
            prop_assert_eq!(Some(history.max()), within.map(|(_, wanted)| *wanted).max());
            prop_assert!(history.wanted.len() <= 9, "one entry for each number at most");
        }
    }

    /// Never out of bounds; what is taken away is not missed.
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
        let decision = decide(&policy(), current, &loads, &mut settled(past), now);
        prop_assert!((1..=10).contains(&decision.replicas));
        if decision.replicas < current && current <= 10 {
            let demand: u64 = actives.iter().map(|(a, n, _)| a + n).sum();
            prop_assert!(u64::from(decision.replicas) * 80 >= demand.min(800), "{decision:?}");
        }
    }

    /// More demand never gives fewer replicas, whichever replica it stands at, in blocks, in need or in the queue.
    #[test]
    fn monotonic_in_demand(
        current in 1u32..12,
        replicas in prop::collection::vec(((0u64..=100, 0u64..300, 0u64..40), (0u64..=100, 0u64..300, 0u64..40)), 0..6),
        silent in 0usize..3,
        past in 1u32..10,
    ) {
        let silent = vec![ReplicaLoad::Silent; silent];
        let light = replicas.iter().map(|((a, n, w), _)| load(*a, *n, *w));
        let heavy = replicas.iter().map(|((a, n, w), (more_a, more_n, more_w))| {
            load((a + more_a).min(100), n + more_n, w + more_w)
        });
        let decided = |loads: Vec<ReplicaLoad>| {
            let loads = [loads, silent.clone()].concat();
            decide(&policy(), current, &loads, &mut settled(past), Duration::from_secs(101))
        };
        let (less, more) = (decided(light.collect()), decided(heavy.collect()));
        prop_assert!(more.replicas >= less.replicas, "{less:?} {more:?}");
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
        let heard = decide(&policy(), current, &loads, &mut settled(past), now).replicas;
        let unheard = decide(&policy(), current, &silenced, &mut settled(past), now).replicas;
        prop_assert!(unheard <= heard.max(current), "added: {heard} {unheard}");
        prop_assert!(unheard >= heard.min(current), "taken: {heard} {unheard}");
    }
}
