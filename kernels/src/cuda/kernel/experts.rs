//! Launches of the kernels of a mixture of experts.

use super::super::bounds::Bounds;
use super::*;

/// A warp each token.
pub fn route_experts(tokens: usize) -> Launch<RouteExpertsArgs> {
    let blocks = tokens.div_ceil(ROUTE_WARPS as usize);
    Launch::new(&ROUTE_EXPERTS, [blocks, 1], 0)
}

impl Arguments for RouteExpertsArgs {
    fn check(&self, launch: &Launch<Self>, bounds: &Bounds<'_>) {
        let tokens = u64::from(self.n_tokens);
        assert!(
            tokens <= launch.x() * u64::from(ROUTE_WARPS) && self.top_k <= self.n_experts,
            "a token takes at most all experts"
        );
        bounds.reads(self.router, matrix(tokens, self.stride, self.n_experts));
        bounds.reads(self.positions, tokens);
        bounds.writes(self.chosen, tokens * u64::from(self.top_k));
        bounds.writes(self.shares, tokens * u64::from(self.top_k));
    }
}

/// Tiles at most of so many pairs: an expert's last one may be partial.
pub fn max_expert_tiles(n_pairs: usize, n_experts: usize) -> usize {
    n_pairs / GROUPED_ROWS as usize + n_experts.min(n_pairs)
}

/// A block each expert.
pub fn group_by_expert(n_experts: usize) -> Launch<GroupByExpertArgs> {
    let words = n_experts as u32 + GROUP_THREADS / 32;
    Launch::new(&GROUP_BY_EXPERT, [n_experts, 1], words * 4)
}

impl Arguments for GroupByExpertArgs {
    fn check(&self, launch: &Launch<Self>, bounds: &Bounds<'_>) {
        let n_pairs = u64::from(self.n_pairs);
        assert_eq!(
            launch.x(),
            u64::from(self.n_experts),
            "a block for each expert"
        );
        let tiles = max_expert_tiles(self.n_pairs as usize, self.n_experts as usize);
        bounds.reads(self.chosen, n_pairs);
        bounds.writes(self.pairs, n_pairs);
        bounds.writes(self.tiles, tiles as u64);
        bounds.writes(self.n_tiles, 1);
    }
}

/// A block each tile and each [`GROUPED_COLS`] columns.
pub fn grouped_gemm(max_tiles: usize, cols: usize) -> Launch<GroupedGemmArgs> {
    let grid = [max_tiles, cols.div_ceil(GROUPED_COLS as usize)];
    Launch::new(&GROUPED_GEMM, grid, GROUPED_SHARED_BYTES)
}

impl Arguments for GroupedGemmArgs {
    fn check(&self, launch: &Launch<Self>, bounds: &Bounds<'_>) {
        bounds.writes(self.out, u64::from(self.cols));
        bounds.reads(self.x, u64::from(self.inner));
        let one_expert = matrix(u64::from(self.cols), self.weight_stride, self.inner);
        bounds.reads(self.weight, one_expert);
        bounds.reads(self.tiles, launch.x());
        bounds.reads(self.n_tiles, 1);
    }
}

/// A block each token.
pub fn combine_experts(tokens: usize) -> Launch<CombineExpertsArgs> {
    Launch::new(&COMBINE_EXPERTS, [tokens, 1], 0)
}

impl Arguments for CombineExpertsArgs {
    fn check(&self, launch: &Launch<Self>, bounds: &Bounds<'_>) {
        let (pairs, cols) = (launch.x() * u64::from(self.top_k), 8 * self.chunks);
        bounds.writes(self.out, matrix(launch.x(), self.out_stride, cols));
        bounds.reads(self.results, matrix(pairs, self.results_stride, cols));
        bounds.reads(self.chosen, pairs);
        bounds.reads(self.shares, pairs);
    }
}
