//! How the sequences of a running group come from one: the first computes what they share, the prompt, or what beams that
//! were preempted have in common, and the others fork from it.
//!
//! Each has its row, and the blocks that only it will write, from the beginning, so that a fork needs nothing that could be
//! lacking. It happens in the step after the one that completes the prompt: its copies run before it, and see what that
//! one has left.

use kvasir_kernels::step::TableRow;

use super::{Batch, Scheduler, ServiceKey};
use crate::engine::blocks::BlockPool;

/// Where a sequence stands to the others of its group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fork {
    /// It runs alone: it has forked, or nobody forks from it any more.
    Done,
    /// It computes the prompt; the others fork from it.
    Leads,
    /// It has ended, and is kept for those that fork from it.
    LedAndEnded,
    /// It waits for the prompt.
    Waits,
}

impl Scheduler {
    /// Forks the sequences of the groups whose prompt was complete with the step before, and the beams that go on in several
    /// ways.
    pub(super) fn fork(&mut self, blocks: &mut BlockPool, batch: &mut Batch) {
        for id in std::mem::take(&mut self.forking) {
            if let Some(&key) = self.keys.get(&id)
                && self.running.contains_key(&key)
            {
                self.fork_siblings(blocks, key, batch);
                self.branch(blocks, key, batch);
            }
        }
    }

    fn fork_siblings(&mut self, blocks: &mut BlockPool, key: ServiceKey, batch: &mut Batch) {
        let rows = self.running[&key].rows.clone();
        let waits = |row: &TableRow| self.at(*row).fork == Fork::Waits;
        let (siblings, others): (Vec<TableRow>, Vec<TableRow>) = rows.into_iter().partition(waits);
        let leads = |row: &&TableRow| self.at(**row).fork != Fork::Done;
        let Some(&leader_row) = others.iter().find(leads) else {
            return;
        };
        let mut leader = self.rows[leader_row.0 as usize].take();
        let from = leader.as_mut().expect("a running row");
        let n_shared = from.n_shared;
        for row in siblings {
            let running = self.rows[row.0 as usize].as_mut().expect("a running row");
            let (appended, copies) = blocks.fork(&from.table, &mut running.table, n_shared);
            batch.update_tables(row, appended);
            batch.schedule.input.copies.extend(copies);
            running.n_written = from.n_written.min(n_shared);
            running.fork = Fork::Done;
        }
        let has_ended = from.fork == Fork::LedAndEnded;
        from.fork = Fork::Done;
        // Blocks that a window leaves can't be used again in the step that copies them: where it has a chunk to compute,
        // which counts on them, it waits for a step.
        if from.n_ready() > 1 {
            from.last_step = Some(self.n_steps);
        }
        self.rows[leader_row.0 as usize] = leader;
        if has_ended {
            let group = self.running.get_mut(&key).expect("the group runs");
            group.rows.retain(|row| *row != leader_row);
            self.free_row(blocks, leader_row);
        }
    }

    /// The rows of the sequences that fork from the one in `row`.
    pub(super) fn siblings_of(&self, row: TableRow) -> Vec<TableRow> {
        let running = self.at(row);
        if !matches!(running.fork, Fork::Leads | Fork::LedAndEnded) {
            return Vec::new();
        }
        let group = &self.running[&self.keys[&running.group]];
        let waits = |row: &TableRow| self.at(*row).fork == Fork::Waits;
        group.rows.iter().copied().filter(waits).collect()
    }
}
