//! A mixture of experts: each token's experts are chosen, rows are grouped by expert, and each expert's weights are read
//! once for all its rows of the step.
//!
//! A token's result does not depend on the others: its rows of the products do not, and they are summed from the largest
//! share to the smallest.

use super::gemm::{Gemm, RowGroup};
use super::rows::{ActivationBuffer, RowsView};
use super::tile::LANES;
use super::weights::PackedWeight;
use crate::device::{DeviceError, ExpertsShape, Rows};
use crate::sampling::exp;

/// Elements above which summing is worth all threads.
const PARALLEL_ELEMENTS: usize = 1 << 14;

/// The largest step of all experts on the device.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct ExpertsPlan {
    /// Tokens times experts of a token.
    max_rows: usize,
    max_experts: usize,
    /// Columns of a product, those beside the expert's own among them.
    max_cols: usize,
}

impl ExpertsPlan {
    /// The same with one more set of experts.
    pub(crate) fn with(
        self,
        shape: &ExpertsShape,
        max_tokens: usize,
        [hidden, inner]: [usize; 2],
    ) -> Self {
        let cols = |n: usize| (n + LANES - 1).next_multiple_of(LANES);
        Self {
            max_rows: self.max_rows.max(max_tokens * shape.top_k),
            max_experts: self.max_experts.max(shape.n_experts),
            max_cols: self.max_cols.max(cols(2 * inner)).max(cols(hidden)),
        }
    }

    /// Bytes of the workspace, packed activations not among them.
    pub(crate) fn bytes(&self) -> usize {
        let routing = self.max_rows * (size_of::<Choice>() + 2 * size_of::<u32>())
            + (2 * self.max_experts + 2) * size_of::<u32>();
        routing + self.max_rows * self.max_cols * size_of::<f32>()
    }
}

/// The workspace.
#[derive(Debug)]
pub(crate) struct ExpertsWorkspace {
    pub(crate) routing: Routing,
    /// A row for each token and expert of it: gate and up, then what the expert gives.
    pub(crate) products: ActivationBuffer,
}

impl ExpertsWorkspace {
    pub(crate) fn new(plan: &ExpertsPlan) -> Result<Self, DeviceError> {
        Ok(Self {
            routing: Routing {
                choices: Vec::with_capacity(plan.max_rows),
                row_of_choice: Vec::with_capacity(plan.max_rows),
                token_of_row: Vec::with_capacity(plan.max_rows),
                ends: Vec::with_capacity(plan.max_experts + 2),
                active: Vec::with_capacity(plan.max_experts),
            },
            products: ActivationBuffer::new(Rows::Tokens, plan.max_rows, plan.max_cols)?,
        })
    }
}

/// An expert of a token, and the share of its result.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Choice {
    expert: u32,
    share: f32,
}

/// Which experts the tokens of a step take, and the rows of the products, grouped by expert.
#[derive(Debug, Default)]
pub(crate) struct Routing {
    /// `[tokens][top_k]`, the largest share first.
    choices: Vec<Choice>,
    /// The row of each choice.
    row_of_choice: Vec<u32>,
    token_of_row: Vec<u32>,
    /// The rows of expert `e` are `ends[e]..ends[e + 1]`.
    ends: Vec<u32>,
    /// The experts that have rows.
    active: Vec<u32>,
}

impl Routing {
    /// Chooses from a step's router logits.
    pub(crate) fn route(&mut self, router: RowsView, shape: &ExpertsShape) {
        self.choices.clear();
        for t in 0..router.n_rows {
            // SAFETY: nobody writes the router's logits meanwhile.
            choose(unsafe { router.row(t) }, shape, &mut self.choices);
        }
        // A counting sort: counts of expert `e` at `e + 2` become its start at `e + 1`, and, row by row, its end.
        self.ends.clear();
        self.ends.resize(shape.n_experts + 2, 0);
        for choice in &self.choices {
            self.ends[choice.expert as usize + 2] += 1;
        }
        self.active.clear();
        self.active.extend(
            (0..shape.n_experts as u32).filter(|&expert| self.ends[expert as usize + 2] > 0),
        );
        for e in 1..self.ends.len() {
            self.ends[e] += self.ends[e - 1];
        }
        self.row_of_choice.clear();
        self.token_of_row.clear();
        self.token_of_row.resize(self.choices.len(), 0);
        for (i, choice) in self.choices.iter().enumerate() {
            let row = &mut self.ends[choice.expert as usize + 1];
            self.row_of_choice.push(*row);
            self.token_of_row[*row as usize] = (i / shape.top_k) as u32;
            *row += 1;
        }
    }

    /// The rows of the `i`-th expert that has any, with its part of a weight of `n` rows for each expert.
    fn group(&self, i: usize, n: usize) -> RowGroup {
        let expert = self.active[i] as usize;
        RowGroup {
            rows: self.ends[expert] as usize..self.ends[expert + 1] as usize,
            weight_rows: expert * n..(expert + 1) * n,
        }
    }

    /// The column of a row where the results of its expert begin, in a product with a weight of `n` rows an expert.
    fn first_column(&self, row: usize, n: usize) -> usize {
        let expert = self.ends[1..].partition_point(|&end| end as usize <= row);
        expert * n % LANES
    }
}

/// The `top_k` experts with the largest logits (ties to the lowest index), largest first, and their shares in the
/// softmax over all.
fn choose(logits: &[f32], shape: &ExpertsShape, choices: &mut Vec<Choice>) {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f32 = logits.iter().map(|&logit| exp(logit - max)).sum();
    let first = choices.len();
    for (expert, &logit) in logits.iter().enumerate() {
        let better = |choice: &Choice| logits[choice.expert as usize] >= logit;
        let place = first + choices[first..].iter().take_while(|c| better(c)).count();
        if place == first + shape.top_k {
            continue;
        }
        choices.truncate(first + shape.top_k - 1);
        let choice = Choice {
            expert: expert as u32,
            share: exp(logit - max) / sum,
        };
        choices.insert(place, choice);
    }
    if shape.renormalize {
        let chosen: f32 = choices[first..].iter().map(|choice| choice.share).sum();
        for choice in &mut choices[first..] {
            choice.share /= chosen;
        }
    }
}

/// The products of one set of experts.
pub(crate) struct ExpertsGemm<'a> {
    pub(crate) gemm: Gemm<'a>,
    pub(crate) shape: ExpertsShape,
    pub(crate) gate_up: &'a PackedWeight,
    pub(crate) down: &'a PackedWeight,
}

impl ExpertsGemm<'_> {
    /// Runs the experts over the rows that `routing` gave them. `products` has `n_rows(x) * top_k` rows or more.
    pub(crate) fn run(&self, out: RowsView, x: RowsView, routing: &Routing, products: RowsView) {
        let (hidden, inner) = (self.gate_up.cols, self.down.cols);
        let (n_rows, n_active) = (routing.token_of_row.len(), routing.active.len());
        assert!(n_rows <= products.n_rows, "more rows than planned");
        let (gemm, top_k) = (&self.gemm, self.shape.top_k);
        let packed = gemm.pack(n_rows, hidden, self.gate_up, |row| {
            // SAFETY: nobody writes `x` while experts run.
            unsafe { x.row(routing.token_of_row[row] as usize) }
        });
        gemm.grouped(products, packed, self.gate_up, n_active, |i| {
            routing.group(i, 2 * inner)
        });
        let packed = gemm.pack(n_rows, inner, self.down, |row| {
            let first = routing.first_column(row, 2 * inner);
            // SAFETY: packing runs one task a row, and nobody else touches the products meanwhile.
            let row = unsafe { &mut products.row_mut(row)[first..][..2 * inner] };
            let (gate, up) = row.split_at_mut(inner);
            gemm.simd.gated_in_place(self.shape.activation, gate, up);
            gate
        });
        gemm.grouped(products, packed, self.down, n_active, |i| {
            routing.group(i, hidden)
        });
        let sum = |t: usize| {
            // SAFETY: row `t` of `out` is this task's alone; nobody writes the products meanwhile.
            let out = unsafe { out.row_mut(t) };
            out.fill(0.0);
            for i in t * top_k..(t + 1) * top_k {
                let row = routing.row_of_choice[i] as usize;
                let first = routing.choices[i].expert as usize * hidden % LANES;
                // SAFETY: as above.
                let result = unsafe { &products.row(row)[first..][..hidden] };
                gemm.simd.add_scaled(out, routing.choices[i].share, result);
            }
        };
        if n_rows * hidden < PARALLEL_ELEMENTS {
            (0..x.n_rows).for_each(sum);
        } else {
            gemm.pool.run(x.n_rows, &|t, _| sum(t));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::{Activation, Weight};

    fn shape(top_k: usize, renormalize: bool) -> ExpertsShape {
        ExpertsShape {
            gate_up: Weight(0),
            down: Weight(1),
            n_experts: 4,
            top_k,
            renormalize,
            activation: Activation::Silu,
        }
    }

    #[test]
    fn the_largest_are_chosen_and_ties_go_to_the_lowest_index() {
        for (why, logits, top_k, want) in [
            ("the largest", [1.0, 4.0, 2.0, 3.0], 1, vec![1]),
            ("in falling order", [1.0, 4.0, 2.0, 3.0], 3, vec![1, 3, 2]),
            (
                "a tie for the last place",
                [1.0, 2.0, 2.0, 2.0],
                2,
                vec![1, 2],
            ),
            ("all alike", [0.0; 4], 3, vec![0, 1, 2]),
            ("all of them", [3.0, 1.0, 2.0, 4.0], 4, vec![3, 0, 2, 1]),
            (
                "the first overtaken",
                [2.0, 2.0, 5.0, 5.0],
                3,
                vec![2, 3, 0],
            ),
        ] {
            let mut choices = Vec::new();
            choose(&logits, &shape(top_k, false), &mut choices);
            let experts: Vec<u32> = choices.iter().map(|choice| choice.expert).collect();
            assert_eq!(experts, want, "{why}");
            let sum: f32 = logits.iter().map(|logit| logit.exp()).sum();
            for choice in choices {
                let share = logits[choice.expert as usize].exp() / sum;
                assert!((choice.share - share).abs() < 1e-6, "{why}");
            }
        }
        let mut choices = Vec::new();
        choose(&[1.0, 2.0, 2.0, 2.0], &shape(2, true), &mut choices);
        assert_eq!([choices[0].share, choices[1].share], [0.5; 2]);
    }

    #[test]
    fn rows_are_grouped_by_expert() {
        let buffer = ActivationBuffer::new(Rows::Tokens, 3, 4).unwrap();
        let view = buffer.view(3);
        for (t, logits) in [
            [0.0, 1.0, 3.0, 2.0],
            [5.0, 1.0, 0.0, 2.0],
            [0.0, 1.0, 3.0, 2.0],
        ]
        .into_iter()
        .enumerate()
        {
            // SAFETY: one thread.
            unsafe { view.row_mut(t) }.copy_from_slice(&logits);
        }
        let mut routing = Routing::default();
        routing.route(view, &shape(2, false));
        assert_eq!(routing.active, [0, 2, 3]);
        assert_eq!(routing.token_of_row, [1, 0, 2, 0, 1, 2]);
        assert_eq!(routing.row_of_choice, [1, 3, 0, 4, 2, 5]);
        let rows: Vec<_> = (0..3).map(|i| routing.group(i, 6).rows).collect();
        assert_eq!(rows, [0..1, 1..3, 3..6]);
        assert_eq!(routing.group(2, 6).weight_rows, 18..24);
        let columns: Vec<_> = (0..6).map(|row| routing.first_column(row, 6)).collect();
        assert_eq!(columns, [0, 12, 12, 2, 2, 2]);
    }
}
