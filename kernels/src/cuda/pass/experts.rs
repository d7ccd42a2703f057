//! A mixture of experts: route, group by expert, two grouped products around the activation, combine.

use crate::device::Rows;

use super::super::buffers::{ActivationBuffer, ExpertsBuffers, ExpertsSizes, Matrix};
use super::super::driver::Driver;
use super::super::kernel::{self, In, Out};
use super::Pass;

/// What the rows of a grouped product's `x` are.
enum GroupedRows {
    /// Tokens; the result's are pairs by expert.
    Tokens,
    /// Pairs by expert; the result's are pairs by token.
    Pairs,
}

impl<D: Driver> Pass<'_, D> {
    /// All of it, on the device: nothing here depends on where a token goes.
    pub(super) fn mix(
        &mut self,
        out: ActivationBuffer,
        x: ActivationBuffer,
        router: ActivationBuffer,
        experts: &ExpertsBuffers,
    ) {
        let ExpertsSizes {
            n_experts,
            top_k,
            hidden,
            intermediate,
        } = experts.shape;
        assert!(
            x.cols == hidden
                && out.cols == hidden
                && router.cols == n_experts
                && [out, x, router].iter().all(|b| b.rows == Rows::Tokens),
            "experts of another width"
        );
        let work = experts.workspace;
        let n_tokens = self.n_rows(Rows::Tokens);
        let n_pairs = n_tokens * top_k;
        let route = kernel::RouteExpertsArgs {
            router: router.address.into(),
            positions: self.positions(),
            chosen: work.chosen.into(),
            shares: work.shares.into(),
            n_tokens: n_tokens as u32,
            n_experts: n_experts as u32,
            top_k: top_k as u32,
            stride: router.stride as u32,
            renormalize: u32::from(experts.renormalize),
            unused: 0,
        };
        self.launch(kernel::route_experts(n_tokens), &route);
        let group = kernel::GroupByExpertArgs {
            chosen: work.chosen.into(),
            pairs: work.pairs.into(),
            tiles: work.tiles.into(),
            n_tiles: work.n_tiles.into(),
            n_pairs: n_pairs as u32,
            n_experts: n_experts as u32,
        };
        self.launch(kernel::group_by_expert(n_experts), &group);
        let gates = (work.gate_up, (2 * intermediate).next_multiple_of(8));
        let activated = (work.activated, intermediate.next_multiple_of(8));
        let results = (work.results, hidden.next_multiple_of(8));
        let tokens = (x.address, x.stride);
        self.grouped_gemm(experts, experts.gate_up, GroupedRows::Tokens, tokens, gates);
        self.gate(n_pairs, activated, gates, intermediate, experts.activation);
        self.grouped_gemm(
            experts,
            experts.down,
            GroupedRows::Pairs,
            activated,
            results,
        );
        let combine = kernel::CombineExpertsArgs {
            out: out.address.into(),
            results: work.results.into(),
            chosen: work.chosen.into(),
            shares: work.shares.into(),
            chunks: (out.stride / 8) as u32,
            out_stride: out.stride as u32,
            results_stride: results.1 as u32,
            top_k: top_k as u32,
        };
        self.launch(kernel::combine_experts(n_tokens), &combine);
    }

    /// Products with the experts' weights; matrices as address and stride.
    fn grouped_gemm(
        &mut self,
        experts: &ExpertsBuffers,
        weight: Matrix,
        rows: GroupedRows,
        x: (u64, usize),
        out: (u64, usize),
    ) {
        let ExpertsSizes {
            n_experts, top_k, ..
        } = experts.shape;
        let work = experts.workspace;
        let cols = weight.rows / n_experts;
        let args = kernel::GroupedGemmArgs {
            out: Out::from(out.0),
            x: In::from(x.0),
            weight: weight.address.into(),
            pairs: work.pairs.into(),
            tiles: work.tiles.into(),
            n_tiles: work.n_tiles.into(),
            out_stride: out.1 as u32,
            x_stride: x.1 as u32,
            weight_stride: weight.stride as u32,
            inner: weight.stride as u32,
            cols: cols as u32,
            pairs_per_token: match rows {
                GroupedRows::Tokens => top_k as u32,
                GroupedRows::Pairs => 0,
            },
        };
        let n_pairs = self.n_rows(Rows::Tokens) * top_k;
        let max_tiles = kernel::max_expert_tiles(n_pairs, n_experts);
        self.launch(kernel::grouped_gemm(max_tiles, cols), &args);
    }
}
