//! Beam search: which continuations of the live beams go on, which hypotheses have ended, and when the search has.
//!
//! Pure: it is told the most likely next tokens of each live beam and decides as `generate` of Transformers 5.23 does
//! (generation/utils.py, `_beam_search`). It knows no blocks, no rows, no device and no text. A beam has a slot, and a beam
//! that goes on keeps its slot with its best continuation, so that only the others have to be copied.
//!
//! It differs from Transformers in one thing, which a vocabulary with [`BeamParams::n_candidates`] tokens never shows:
//! there, beams that can't be filled are kept with a score of -1e9; here there are fewer of them.

use super::{BeamParams, EarlyStopping, FinishReason, TokenLogprobs};

/// How a beam goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Choice {
    /// The slot of the beam that it continues.
    pub(super) parent: u32,
    /// Its next token.
    pub(super) token: u32,
}

/// What a step of the search came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// The beams that go on, by slot.
    Continue(Vec<Choice>),
    /// The search has ended.
    Ended,
}

/// An ended hypothesis.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct BeamAnswer {
    /// Its tokens, the one that ended it included.
    pub(super) tokens: Vec<TokenLogprobs>,
    /// See [`BeamParams::length_penalty`].
    pub(super) score: f32,
    /// Why it ended.
    pub(super) finished: FinishReason,
}

/// A token of a beam, after those of its parent.
#[derive(Debug)]
struct Node {
    /// Index of the one before; `None` for the first of an answer.
    parent: Option<u32>,
    token: TokenLogprobs,
}

#[derive(Clone, Copy, Debug)]
struct Beam {
    /// The sum of its log-probabilities.
    score: f32,
    /// Its last token; `None` before the first.
    last: Option<u32>,
}

#[derive(Clone, Copy, Debug)]
struct Hypothesis {
    score: f32,
    last: u32,
    is_stopped: bool,
}

/// A continuation of a live beam.
#[derive(Clone, Copy, Debug)]
struct Candidate {
    score: f32,
    parent: u32,
    token: u32,
    logprob: f32,
}

/// The search of one request.
#[derive(Debug)]
pub(super) struct BeamSearch {
    params: BeamParams,
    stop_token_ids: Vec<u32>,
    max_outputs: u32,
    /// Log-probabilities of tokens are reported, and of so many alternatives.
    logprobs: Option<u8>,
    n_outputs: u32,
    /// All tokens that were ever chosen.
    nodes: Vec<Node>,
    /// By slot.
    live: Vec<Beam>,
    /// The best, best first; no more than beams.
    hypotheses: Vec<Hypothesis>,
}

impl BeamSearch {
    /// One beam, of no tokens. A hypothesis ends with any of `stop_token_ids`, or when it has `max_outputs` tokens, which is
    /// above 0.
    pub(super) fn new(
        params: BeamParams,
        stop_token_ids: Vec<u32>,
        max_outputs: u32,
        logprobs: Option<u8>,
    ) -> Self {
        Self {
            params,
            stop_token_ids,
            max_outputs,
            logprobs,
            n_outputs: 0,
            nodes: Vec::new(),
            live: vec![Beam {
                score: 0.0,
                last: None,
            }],
            hypotheses: Vec::new(),
        }
    }

    /// Beams that live.
    pub(super) fn n_live(&self) -> usize {
        self.live.len()
    }

    /// One step. `expansions` has the most likely next tokens of each live beam and their log-probabilities, most likely
    /// first: [`BeamParams::n_candidates`] of them, or the whole vocabulary.
    pub(super) fn advance(&mut self, expansions: &[Vec<(u32, f32)>]) -> Next {
        assert_eq!(
            expansions.len(),
            self.live.len(),
            "each beam has continuations"
        );
        self.n_outputs += 1;
        let candidates = self.candidates(expansions);
        let is_last = self.n_outputs == self.max_outputs;
        let (mut chosen, width) = (Vec::new(), self.width());
        for (rank, candidate) in candidates.into_iter().enumerate() {
            let is_stopped = self.stop_token_ids.contains(&candidate.token);
            if is_stopped || is_last {
                // What ends and isn't among the best is dropped.
                if rank < width {
                    self.end(candidate, is_stopped, expansions);
                }
            } else if chosen.len() < width {
                chosen.push(candidate);
            }
            if chosen.len() == width && rank + 1 >= width {
                break;
            }
        }
        // They are in the order of their scores.
        if !(chosen.first()).is_some_and(|best| self.may_improve(best.score)) {
            return Next::Ended;
        }
        let chosen = by_slot(chosen);
        self.live = chosen
            .iter()
            .map(|candidate| Beam {
                score: candidate.score,
                last: Some(self.node(candidate, expansions)),
            })
            .collect();
        let choices = chosen
            .iter()
            .map(|&Candidate { parent, token, .. }| Choice { parent, token });
        Next::Continue(choices.collect())
    }

    /// The best `n` hypotheses, best first.
    pub(super) fn answers(&self, n: usize) -> Vec<BeamAnswer> {
        let best = self.hypotheses.iter().take(n);
        best.map(|hypothesis| BeamAnswer {
            tokens: self.tokens(hypothesis.last),
            score: hypothesis.score,
            finished: match hypothesis.is_stopped {
                true => FinishReason::Stop(self.nodes[hypothesis.last as usize].token.token),
                false => FinishReason::Length,
            },
        })
        .collect()
    }

    fn width(&self) -> usize {
        self.params.width.get() as usize
    }

    /// All continuations, the best first; equal ones by slot, then by their tokens' order.
    fn candidates(&self, expansions: &[Vec<(u32, f32)>]) -> Vec<Candidate> {
        let beams = (0..).zip(self.live.iter().zip(expansions));
        let mut candidates: Vec<Candidate> = beams
            .flat_map(|(parent, (beam, expansion))| {
                expansion.iter().map(move |&(token, logprob)| Candidate {
                    score: beam.score + logprob,
                    parent,
                    token,
                    logprob,
                })
            })
            .collect();
        candidates.sort_by(|a, b| b.score.total_cmp(&a.score));
        candidates
    }

    /// A candidate has ended: it is kept if it is among the best hypotheses.
    fn end(&mut self, candidate: Candidate, is_stopped: bool, expansions: &[Vec<(u32, f32)>]) {
        let score = self.normalised(candidate.score, self.n_outputs);
        let place = (self.hypotheses).partition_point(|other| other.score >= score);
        if place == self.width() {
            return;
        }
        let last = self.node(&candidate, expansions);
        let ended = Hypothesis {
            score,
            last,
            is_stopped,
        };
        self.hypotheses.insert(place, ended);
        self.hypotheses.truncate(self.width());
    }

    /// Whether the search goes on with a best live beam of this score.
    fn may_improve(&self, best: f32) -> bool {
        if self.hypotheses.len() < self.width() {
            return true;
        }
        let BeamParams {
            length_penalty,
            early_stopping,
            ..
        } = self.params;
        // A beam's sum only falls. Where long ones gain, the longest may still become the best.
        let n_outputs = match early_stopping {
            EarlyStopping::WhenFull => return false,
            EarlyStopping::WhenImpossible if length_penalty > 0.0 => self.max_outputs,
            EarlyStopping::WhenImpossible | EarlyStopping::WhenUnlikely => self.n_outputs,
        };
        let worst = self.hypotheses.last().map(|hypothesis| hypothesis.score);
        worst.is_none_or(|worst| self.normalised(best, n_outputs) > worst)
    }

    fn normalised(&self, score: f32, n_outputs: u32) -> f32 {
        score / f64::from(n_outputs).powf(self.params.length_penalty) as f32
    }

    /// Keeps the token of a candidate.
    fn node(&mut self, candidate: &Candidate, expansions: &[Vec<(u32, f32)>]) -> u32 {
        let top = match self.logprobs {
            Some(n) => {
                let expansion = &expansions[candidate.parent as usize];
                expansion[..expansion.len().min(n.into())].to_vec()
            }
            None => Vec::new(),
        };
        self.nodes.push(Node {
            parent: self.live[candidate.parent as usize].last,
            token: TokenLogprobs {
                token: candidate.token,
                logprob: self.logprobs.map(|_| candidate.logprob),
                top,
            },
        });
        self.nodes.len() as u32 - 1
    }

    /// The tokens to this one.
    fn tokens(&self, last: u32) -> Vec<TokenLogprobs> {
        let nodes = std::iter::successors(Some(last), |&node| self.nodes[node as usize].parent);
        let mut tokens: Vec<TokenLogprobs> = nodes
            .map(|node| self.nodes[node as usize].token.clone())
            .collect();
        tokens.reverse();
        tokens
    }
}

/// Gives each a slot: the best continuation of a beam keeps that beam's, the others take what is left.
fn by_slot(chosen: Vec<Candidate>) -> Vec<Candidate> {
    let mut slots: Vec<Option<Candidate>> = vec![None; chosen.len()];
    let mut others = Vec::new();
    for candidate in chosen {
        match slots.get_mut(candidate.parent as usize) {
            Some(slot @ None) => *slot = Some(candidate),
            _ => others.push(candidate),
        }
    }
    let mut others = others.into_iter();
    let fill = |slot: Option<Candidate>| slot.or_else(|| others.next());
    slots.into_iter().filter_map(fill).collect()
}

#[cfg(test)]
pub(super) mod tests;
