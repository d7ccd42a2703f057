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
            free: 100 - active,
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
        ("only draining ones: hold", 2, vec![draining], settled(1), 2),
        ("below the minimum", 0, vec![], new(), 1),
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
        "scaled up from 1 to 3: 90 blocks active and 150 needed by waiting requests, of 100 in 1 reporting replicas \
         (target 80 %); 4 requests waiting (target 4 per replica)"
    );
    assert_eq!(
        (decision.utilization_percent, decision.queue_depth),
        (Some(90), Some(4))
    );
}

proptest! {
    /// Never out of bounds; more demand never gives fewer replicas; what is taken away is not missed.
    #[test]
    fn bounded_monotonic_and_sufficient(
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
        let heavier: Vec<_> = actives.iter().map(|(a, n, w)| load(*a, n + 50, w + 1))
            .chain(std::iter::repeat_n(ReplicaLoad::Silent, silent)).collect();
        let more = decide(&policy(), current, &heavier, &mut settled(past), now);
        prop_assert!(more.replicas >= decision.replicas, "{decision:?} {more:?}");
    }
}
