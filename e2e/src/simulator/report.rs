//! What a comparison found: as a table for people, and as JSON.

use std::fmt::Write as _;

use serde_json::{Value, json};

use super::{Cell, Row};

/// A table of every cell, and below it which goals are reached.
#[must_use]
pub fn table(cells: &[Cell]) -> String {
    let mut text = String::new();
    for cell in cells {
        let (slowed, copies) = cell.scale;
        // Writing to a string never fails.
        let _ = writeln!(
            text,
            "{}, starts of {} s, about {} replicas (an H200 slowed {slowed:.1} times, each request {copies:.1} times)",
            cell.load, cell.start_s, cell.replicas
        );
        let _ = writeln!(
            text,
            "  {:<24} {:>9} {:>8} {:>6} {:>8} {:>6} {:>8} {:>9}",
            "", "in time %", "hours", "times", "changes", "flaps", "refused", "p99 s"
        );
        let least = cell.clairvoyant.outcome.replica_hours;
        for row in rows(cell) {
            let Row { policy, outcome } = row;
            let _ = writeln!(
                text,
                "  {policy:<24} {:>9.2} {:>8.2} {:>6.2} {:>8} {:>6} {:>8} {:>9.2}",
                outcome.attainment * 100.0,
                outcome.replica_hours,
                outcome.replica_hours / least,
                outcome.changes,
                outcome.flaps,
                outcome.refusals,
                outcome.ttft_p99_s
            );
        }
        for missed in missed(cell) {
            let _ = writeln!(text, "  missed: {missed}");
        }
        let _ = writeln!(text);
    }
    let reached = cells.iter().filter(|cell| missed(cell).is_empty()).count();
    let _ = writeln!(
        text,
        "All goals are reached in {reached} of {}.",
        cells.len()
    );
    text
}

/// One line for each cell, in Markdown.
#[must_use]
pub fn summary(cells: &[Cell]) -> String {
    let mut text = String::from(
        "| load | starts | replicas | in time | hours, of the clairvoyant's | of the best headroom's | peers with more in time for less |\n|---|---|---|---|---|---|---|\n",
    );
    for cell in cells {
        let ours = &cell.kvasir.outcome;
        let _ = writeln!(
            text,
            "| {} | {} s | {} | {:.2} % | {:.2} | {:.2} | {} |",
            cell.load,
            cell.start_s,
            cell.replicas,
            ours.attainment * 100.0,
            ours.replica_hours / cell.clairvoyant.outcome.replica_hours,
            ours.replica_hours / cell.headroom.outcome.replica_hours,
            match better_peers(cell)[..] {
                [] => "none".to_owned(),
                ref peers => peers.join(", "),
            }
        );
    }
    text
}

/// Ours first, then what it is measured by, then the peers.
#[must_use]
pub fn rows(cell: &Cell) -> Vec<&Row> {
    [&cell.kvasir, &cell.clairvoyant, &cell.headroom]
        .into_iter()
        .chain(&cell.peers)
        .collect()
}

/// Peers that serve more in time, and cost less.
#[must_use]
pub fn better_peers(cell: &Cell) -> Vec<String> {
    let ours = &cell.kvasir.outcome;
    let better = cell.peers.iter().filter(|peer| {
        peer.outcome.attainment > ours.attainment && peer.outcome.replica_hours < ours.replica_hours
    });
    better.map(|peer| peer.policy.clone()).collect()
}

/// The goals that ours misses.
#[must_use]
pub fn missed(cell: &Cell) -> Vec<String> {
    let ours = &cell.kvasir.outcome;
    let mut missed = Vec::new();
    let clairvoyant = ours.replica_hours / cell.clairvoyant.outcome.replica_hours;
    let headroom = ours.replica_hours / cell.headroom.outcome.replica_hours;
    if cell.start_s < 10.0 {
        if ours.attainment < 0.99 {
            missed.push(format!(
                "{:.2} % in time, 99 wanted",
                ours.attainment * 100.0
            ));
        }
        if clairvoyant > 1.2 {
            missed.push(format!(
                "{clairvoyant:.2} times the clairvoyant's hours, 1.20 wanted"
            ));
        }
    } else if headroom > 1.05 {
        let of = cell.headroom.outcome.attainment * 100.0;
        missed.push(format!(
            "{headroom:.2} times the hours of the best headroom ({of:.2} % in time), 1.05 wanted"
        ));
    }
    if ours.flaps > 0 {
        missed.push(format!("{} flaps", ours.flaps));
    }
    let better = better_peers(cell);
    missed.extend(
        better
            .iter()
            .map(|peer| format!("{peer} serves more in time, for less")),
    );
    missed
}

/// Everything but the series.
#[must_use]
pub fn json(cells: &[Cell]) -> Value {
    let cells: Vec<Value> = cells
        .iter()
        .map(|cell| {
            let rows: Vec<Value> = rows(cell)
                .into_iter()
                .map(|Row { policy, outcome }| {
                    json!({
                        "policy": policy,
                        "attainment": outcome.attainment,
                        "replicaHours": outcome.replica_hours,
                        "changes": outcome.changes,
                        "flaps": outcome.flaps,
                        "refusals": outcome.refusals,
                        "ttftSeconds": { "p50": outcome.ttft_p50_s, "p99": outcome.ttft_p99_s },
                    })
                })
                .collect();
            json!({
                "load": cell.load,
                "startSeconds": cell.start_s,
                "replicas": cell.replicas,
                "slowed": cell.scale.0,
                "copies": cell.scale.1,
                "policies": rows,
                "missed": missed(cell),
                "reasons": cell.reasons,
            })
        })
        .collect();
    json!({ "cells": cells })
}
