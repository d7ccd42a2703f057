//! A mixture of experts kernel by kernel: routing, the sort by expert, grouped products, the combination.

use crate::shim::{Noise, address, assert_near, bf16, launch, value};
use kvasir_kernels::cuda::kernel::{
    self, CombineExpertsArgs, ExpertTile, GROUPED_ROWS, GroupByExpertArgs, GroupedGemmArgs, INERT,
    RouteExpertsArgs,
};

#[test]
fn tokens_take_the_most_likely_experts() {
    let mut noise = Noise(30);
    for (n_experts, top_k, renormalize) in
        [(1, 1, false), (8, 2, true), (8, 8, false), (70, 6, true)]
    {
        let (n_tokens, stride) = (7, (n_experts as usize).next_multiple_of(8));
        // Few different values: there are ties.
        let router: Vec<u16> = (0..n_tokens * stride)
            .map(|_| bf16((noise.unit() * 6.0).round()))
            .collect();
        let mut positions = vec![3_u32; n_tokens];
        positions[5] = INERT;
        let n_pairs = n_tokens * top_k as usize;
        let (mut chosen, mut shares) = (vec![77_u32; n_pairs], vec![f32::NAN; n_pairs]);
        let args = RouteExpertsArgs {
            router: address(router.as_ptr()),
            positions: address(positions.as_ptr()),
            chosen: address(chosen.as_mut_ptr()),
            shares: address(shares.as_mut_ptr()),
            n_tokens: n_tokens as u32,
            n_experts,
            top_k,
            stride: stride as u32,
            renormalize: u32::from(renormalize),
            unused: 0,
        };
        // SAFETY: every vector holds what the fields above say.
        unsafe { launch(kernel::route_experts(n_tokens), 1, &args) };
        for t in 0..n_tokens {
            let chosen = &chosen[t * top_k as usize..][..top_k as usize];
            if positions[t] == INERT {
                assert!(chosen.iter().all(|&e| e == INERT), "an inert row");
                continue;
            }
            let row = router[t * stride..][..n_experts as usize].iter();
            let logits: Vec<f64> = row.map(|&x| value(x)).collect();
            let mut order: Vec<usize> = (0..logits.len()).collect();
            order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
            order.truncate(top_k as usize);
            let sum: f64 = match renormalize {
                true => order.iter().map(|&e| logits[e].exp()).sum(),
                false => logits.iter().map(|x| x.exp()).sum(),
            };
            for (k, &e) in order.iter().enumerate() {
                assert_eq!(chosen[k] as usize, e, "token {t}, place {k}");
                let share = f64::from(shares[t * top_k as usize + k]);
                assert!(
                    (share - logits[e].exp() / sum).abs() < 1e-6,
                    "token {t}, place {k}"
                );
            }
        }
    }
}

/// Pairs by expert, tiles.
fn group(chosen: &[u32], n_experts: usize, seed: u64) -> (Vec<u32>, Vec<ExpertTile>) {
    let n_tiles = kernel::max_expert_tiles(chosen.len(), n_experts);
    let unset = ExpertTile {
        expert: INERT,
        first_row: INERT,
        n_rows: INERT,
        unused: INERT,
    };
    let mut pairs = vec![INERT; chosen.len()];
    let (mut tiles, mut n) = (vec![unset; n_tiles], vec![INERT]);
    let args = GroupByExpertArgs {
        chosen: address(chosen.as_ptr()),
        pairs: address(pairs.as_mut_ptr()),
        tiles: address(tiles.as_mut_ptr()),
        n_tiles: address(n.as_mut_ptr()),
        n_pairs: chosen.len() as u32,
        n_experts: n_experts as u32,
    };
    // SAFETY: every vector holds what the fields above say.
    unsafe { launch(kernel::group_by_expert(n_experts), seed, &args) };
    tiles.truncate(n[0] as usize);
    (pairs, tiles)
}

#[test]
fn pairs_are_sorted_by_expert_and_cut_into_tiles() {
    let mut noise = Noise(31);
    for (n_experts, n_pairs) in [(1, 1), (3, 200), (9, 700), (70, 40)] {
        // The second expert has none, every tenth pair no expert.
        let mut expert = |p: u32| match noise.word() as u32 % n_experts {
            _ if p % 10 == 9 => INERT,
            1 => 0,
            e => e,
        };
        let chosen: Vec<u32> = (0..n_pairs).map(&mut expert).collect();
        let (pairs, tiles) = group(&chosen, n_experts as usize, 1);
        let mut want: Vec<u32> = (0..n_pairs)
            .filter(|&p| chosen[p as usize] != INERT)
            .collect();
        want.sort_by_key(|&p| chosen[p as usize]);
        assert_eq!(pairs[..want.len()], want);
        let mut next = 0;
        for tile in &tiles {
            assert!(tile.first_row == next && (1..=GROUPED_ROWS).contains(&tile.n_rows));
            for r in tile.first_row..tile.first_row + tile.n_rows {
                assert_eq!(chosen[want[r as usize] as usize], tile.expert);
            }
            next += tile.n_rows;
        }
        assert_eq!(next as usize, want.len(), "all pairs are in tiles");
    }
}

#[test]
fn grouped_products_are_close_and_the_same_in_a_crowd() {
    let mut noise = Noise(32);
    for (n_experts, top_k, n_tokens, inner, cols) in
        [(3, 2, 90, 136, 70), (4, 1, 3, 8, 1), (2, 2, 5, 24, 129)]
    {
        let n_pairs = n_tokens * top_k;
        let mut chosen: Vec<u32> = (0..n_pairs)
            .map(|_| noise.word() as u32 % n_experts)
            .collect();
        chosen[n_pairs - 1] = INERT;
        let (pairs, tiles) = group(&chosen, n_experts as usize, 2);
        let weight = noise.bf16s(n_experts as usize * cols * inner);
        let n_tiles = vec![tiles.len() as u32];
        let out_stride = cols.next_multiple_of(8);
        let max_tiles = kernel::max_expert_tiles(n_pairs, n_experts as usize);
        for by_token in [true, false] {
            let x = noise.bf16s(if by_token { n_tokens } else { n_pairs } * inner);
            let run = |tiles: &Vec<ExpertTile>, seed| {
                let mut out = vec![0xffff_u16; n_pairs * out_stride];
                let args = GroupedGemmArgs {
                    out: address(out.as_mut_ptr()),
                    x: address(x.as_ptr()),
                    weight: address(weight.as_ptr()),
                    pairs: address(pairs.as_ptr()),
                    tiles: address(tiles.as_ptr()),
                    n_tiles: address(n_tiles.as_ptr()),
                    out_stride: out_stride as u32,
                    x_stride: inner as u32,
                    weight_stride: inner as u32,
                    inner: inner as u32,
                    cols: cols as u32,
                    pairs_per_token: if by_token { top_k as u32 } else { 0 },
                };
                // SAFETY: every vector holds what the fields above say, and pairs and tiles are those of group.
                unsafe { launch(kernel::grouped_gemm(max_tiles, cols), seed, &args) };
                out
            };
            let out = run(&tiles, 3);
            let mut written = 0;
            for (r, &pair) in pairs.iter().enumerate() {
                if pair == INERT {
                    continue;
                }
                let (from, to) = match by_token {
                    true => (pair as usize / top_k, r),
                    false => (r, pair as usize),
                };
                let expert = chosen[pair as usize] as usize;
                let dot = |c: usize| {
                    let row = &weight[(expert * cols + c) * inner..][..inner];
                    let x = &x[from * inner..][..inner];
                    x.iter().zip(row).map(|(&a, &b)| value(a) * value(b)).sum()
                };
                let want: Vec<f64> = (0..cols).map(dot).collect();
                // One rounding to bfloat16; cancellation leaves noise of f32.
                assert_near(
                    "a grouped product",
                    &out[to * out_stride..][..cols],
                    &want,
                    |want| want.abs() / 256.0 + 1e-4,
                );
                written += cols;
            }
            let kept = out.iter().filter(|&&x| x != 0xffff).count();
            assert_eq!(kept, written, "nothing else is written");
            // The same rows at other places of a tile.
            let mut single = tiles.clone();
            single[0].n_rows = 1;
            let alone = run(&single, 4);
            let row = if by_token { 0 } else { pairs[0] as usize };
            let same = |out: &[u16]| out[row * out_stride..][..cols].to_vec();
            assert_eq!(same(&alone), same(&out), "alone");
        }
    }
}

#[test]
fn results_are_summed_by_their_shares() {
    let mut noise = Noise(33);
    let (n_tokens, top_k, cols) = (4_usize, 3_usize, 1040_usize);
    let results = noise.bf16s(n_tokens * top_k * cols);
    let shares: Vec<f32> = (0..n_tokens * top_k).map(|_| noise.unit().abs()).collect();
    let mut chosen = vec![0_u32; n_tokens * top_k];
    chosen[top_k..2 * top_k].fill(INERT);
    let mut out = vec![0xffff_u16; n_tokens * cols];
    let args = CombineExpertsArgs {
        out: address(out.as_mut_ptr()),
        results: address(results.as_ptr()),
        chosen: address(chosen.as_ptr()),
        shares: address(shares.as_ptr()),
        chunks: cols as u32 / 8,
        out_stride: cols as u32,
        results_stride: cols as u32,
        top_k: top_k as u32,
    };
    // SAFETY: every vector holds what the fields above say.
    unsafe { launch(kernel::combine_experts(n_tokens), 1, &args) };
    let sum = |t: usize, c: usize| {
        let pairs = (t * top_k..(t + 1) * top_k).filter(|&p| chosen[p] != INERT);
        pairs
            .map(|p| f64::from(shares[p]) * value(results[p * cols + c]))
            .sum()
    };
    let want: Vec<f64> = (0..n_tokens * cols)
        .map(|i| sum(i / cols, i % cols))
        .collect();
    assert_near("combined", &out, &want, |want| want.abs() / 256.0 + 1e-5);
}
