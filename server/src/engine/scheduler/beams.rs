//! The beams of a request: what their rows of logits reported, and how what the search chose becomes rows and blocks.
//!
//! A step with a beam's row of logits is collected before the next is scheduled, because the host chooses the tokens
//! ([`Schedule::has_beams`](super::Schedule)). What is chosen takes effect when the next step is scheduled: the tables of
//! the beams that nobody continues are released, and their rows fork from those of the beams with several continuations.
//! All copies of all beams are in that step's one list. Full blocks are shared, whoever wrote them; of a beam's last block
//! each has its own.

use super::{Batch, Scheduler, ServiceKey};
use crate::engine::beam::{BeamAnswer, BeamSearch, Choice, Next};
use crate::engine::blocks::BlockPool;
use crate::engine::{Request, RequestId, RequestOutput};
use kvasir_kernels::step::TableRow;

/// A search, and what it waits for.
#[derive(Debug)]
pub(super) struct Beams {
    search: BeamSearch,
    /// By answer: somebody wants it still.
    wanted: Vec<bool>,
    /// By slot: the most likely next tokens, once they were collected.
    reported: Vec<Option<Vec<(u32, f32)>>>,
    /// By slot: what was chosen and has no effect yet.
    chosen: Vec<Choice>,
}

/// What a report brought.
enum Progress {
    /// Others are to come.
    Waits,
    /// The search has chosen.
    Chosen,
    /// The search has ended with these.
    Ended(Vec<BeamAnswer>),
}

impl Beams {
    /// `None` where the request has none. `max_outputs` is above 0.
    pub(super) fn new(request: &Request, max_outputs: u32) -> Option<Self> {
        let params = request.beams?;
        let stop_token_ids = request.stop_token_ids.clone();
        Some(Self {
            search: BeamSearch::new(params, stop_token_ids, max_outputs, request.logprobs),
            wanted: vec![true; request.n.get() as usize],
            reported: vec![None; params.width.get() as usize],
            chosen: Vec::new(),
        })
    }

    /// The answers that somebody wants.
    pub(super) fn wanted(&self) -> impl Iterator<Item = u32> {
        (0..)
            .zip(&self.wanted)
            .filter_map(|(answer, wanted)| wanted.then_some(answer))
    }

    /// Nobody wants this answer any more.
    pub(super) fn give_up(&mut self, answer: u32) {
        if let Some(wanted) = self.wanted.get_mut(answer as usize) {
            *wanted = false;
        }
    }

    /// Beams that go on when the next step is scheduled.
    pub(super) fn n_chosen(&self) -> u32 {
        self.chosen.len() as u32
    }

    /// They are computed again.
    pub(super) fn forget_reports(&mut self) {
        self.reported.fill(None);
    }

    fn report(&mut self, slot: u32, top: Vec<(u32, f32)>) -> Progress {
        self.reported[slot as usize] = Some(top);
        let n_live = self.search.n_live();
        let live = &mut self.reported[..n_live];
        if live.iter().any(Option::is_none) {
            return Progress::Waits;
        }
        let expansions: Vec<_> = live.iter_mut().filter_map(Option::take).collect();
        match self.search.advance(&expansions) {
            Next::Continue(mut chosen) => {
                assert_eq!(
                    chosen.len(),
                    self.reported.len(),
                    "the vocabulary fills every beam"
                );
                if n_live < chosen.len() {
                    // After the prompt, which all rows hold, none has to become another.
                    (0..)
                        .zip(&mut chosen)
                        .for_each(|(slot, choice)| choice.parent = slot);
                }
                self.chosen = chosen;
                Progress::Chosen
            }
            Next::Ended => {
                let answers = self.search.answers(self.wanted.len());
                assert_eq!(answers.len(), self.wanted.len(), "each answer is given");
                Progress::Ended(answers)
            }
        }
    }
}

impl Scheduler {
    /// The beams of a request that has not ended.
    pub(super) fn beams_of(&mut self, id: RequestId) -> Option<&mut Beams> {
        let key = self.keys.get(&id)?;
        match self.running.get_mut(key) {
            Some(group) => group.beams.as_mut(),
            None => self.waiting.get_mut(key)?.beams.as_mut(),
        }
    }

    /// What a step gave a beam. Nobody learns of its tokens before the search has ended.
    pub(super) fn commit_beam(
        &mut self,
        blocks: &mut BlockPool,
        mut output: RequestOutput,
    ) -> Vec<RequestOutput> {
        let (id, slot) = (output.id, output.sequence);
        let reported = output.tokens.pop();
        let is_wanted = |beams: &mut Beams| beams.wanted().any(|answer| answer == slot);
        let mut outputs = Vec::new();
        if !output.prompt_logprobs.is_empty() && self.beams_of(id).is_some_and(is_wanted) {
            outputs.push(output);
        }
        if let Some(reported) = reported {
            outputs.extend(self.report(blocks, id, slot, reported.top));
        }
        outputs
    }

    /// A beam's row of logits was collected: its most likely tokens. With those of the last beam the search goes on, or it
    /// has ended with the answers that are returned.
    fn report(
        &mut self,
        blocks: &mut BlockPool,
        id: RequestId,
        slot: u32,
        top: Vec<(u32, f32)>,
    ) -> Vec<RequestOutput> {
        let beams = self.beams_of(id).expect("a beam's search");
        let answers = match beams.report(slot, top) {
            Progress::Waits => return Vec::new(),
            Progress::Chosen => {
                if !self.forking.contains(&id) {
                    self.forking.push(id);
                }
                return Vec::new();
            }
            Progress::Ended(answers) => answers,
        };
        let wanted: Vec<u32> = beams.wanted().collect();
        self.abort(blocks, id);
        let answers = (0..)
            .zip(answers)
            .filter(|(index, _)| wanted.contains(index));
        answers
            .map(|(sequence, answer)| RequestOutput {
                id,
                sequence,
                prompt_logprobs: Vec::new(),
                tokens: answer.tokens,
                finished: Some(answer.finished),
                beam_score: Some(answer.score),
            })
            .collect()
    }

    /// The beams of a group become what the search has chosen.
    pub(super) fn branch(&mut self, blocks: &mut BlockPool, key: ServiceKey, batch: &mut Batch) {
        let group = self.running.get_mut(&key).expect("the group runs");
        let Some(beams) = &mut group.beams else {
            return;
        };
        let chosen = std::mem::take(&mut beams.chosen);
        let rows = group.rows.clone();
        let others = (0..)
            .zip(&chosen)
            .filter(|(slot, choice)| choice.parent != *slot);
        let others: Vec<(TableRow, TableRow)> = others
            .map(|(slot, choice): (u32, _)| (rows[slot as usize], rows[choice.parent as usize]))
            .collect();
        for (row, parent) in others {
            let mut running = self.rows[row.0 as usize].take().expect("a running row");
            blocks.release(running.table, None);
            let from = self.at(parent);
            let n_shared = from.n_scheduled;
            let table = blocks.allocate_fork(n_shared, n_shared);
            running.table = table.expect("what was released held as many blocks of its own");
            let (appended, copies) = blocks.fork(&from.table, &mut running.table, n_shared);
            batch.update_tables(row, appended);
            batch.schedule.input.copies.extend(copies);
            running.sequence.branch_from(&from.sequence);
            running.first_step = self.n_steps;
            self.rows[row.0 as usize] = Some(running);
        }
        for (row, choice) in rows.iter().zip(chosen) {
            let running = self.rows[row.0 as usize].as_mut().expect("a running row");
            running.sequence.choose(choice.token);
        }
    }
}
