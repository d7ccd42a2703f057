//! Tiles for AVX-512: up to 24 accumulators in registers, one dot product of 16 bf16 pairs (or 16 f32) an
//! instruction.
//!
//! One row (a decode of batch 1) is bound by memory: eight vectors of columns are eight sequential streams, each
//! prefetched ahead. Twelve rows by two vectors are bound by the arithmetic: two loads of `B` serve 24 products.
#![cfg(target_arch = "x86_64")]

use super::{LANES, Tile};
use std::arch::x86_64::*;

/// How far ahead of its use `B` is fetched, in steps: 64 bytes each.
const PREFETCH_STEPS: usize = 24;

/// Defines a kernel: rows are cut evenly into tiles of at most 12, columns into the widest tile that the rows leave
/// registers for.
macro_rules! kernel {
    ($name:ident, $features:literal, $micro:ident, $product:expr) => {
        /// # Safety
        /// As [`super::TileFn`] says.
        #[target_feature(enable = $features)]
        pub(super) unsafe fn $name(tile: &Tile) {
            let n_tiles = tile.n_rows.div_ceil(12).max(1);
            let mut vector = 0;
            while vector < tile.n_vectors {
                let n_vectors = widest(tile.n_rows.div_ceil(n_tiles), tile.n_vectors - vector);
                for i in 0..n_tiles {
                    let (first, end) = (i * tile.n_rows / n_tiles, (i + 1) * tile.n_rows / n_tiles);
                    // SAFETY: rows below `n_rows` and vectors below `n_vectors`, as the caller vouches.
                    unsafe {
                        match (end - first, n_vectors) {
                            (0, _) => {}
                            (1, 8) => $micro::<1, 8>(tile, first, vector),
                            (2, 8) => $micro::<2, 8>(tile, first, vector),
                            (3, 8) => $micro::<3, 8>(tile, first, vector),
                            (1, 4) => $micro::<1, 4>(tile, first, vector),
                            (2, 4) => $micro::<2, 4>(tile, first, vector),
                            (3, 4) => $micro::<3, 4>(tile, first, vector),
                            (4, 4) => $micro::<4, 4>(tile, first, vector),
                            (5, 4) => $micro::<5, 4>(tile, first, vector),
                            (6, 4) => $micro::<6, 4>(tile, first, vector),
                            (1, 2) => $micro::<1, 2>(tile, first, vector),
                            (2, 2) => $micro::<2, 2>(tile, first, vector),
                            (3, 2) => $micro::<3, 2>(tile, first, vector),
                            (4, 2) => $micro::<4, 2>(tile, first, vector),
                            (5, 2) => $micro::<5, 2>(tile, first, vector),
                            (6, 2) => $micro::<6, 2>(tile, first, vector),
                            (7, 2) => $micro::<7, 2>(tile, first, vector),
                            (8, 2) => $micro::<8, 2>(tile, first, vector),
                            (9, 2) => $micro::<9, 2>(tile, first, vector),
                            (10, 2) => $micro::<10, 2>(tile, first, vector),
                            (11, 2) => $micro::<11, 2>(tile, first, vector),
                            (12, 2) => $micro::<12, 2>(tile, first, vector),
                            (1, _) => $micro::<1, 1>(tile, first, vector),
                            (2, _) => $micro::<2, 1>(tile, first, vector),
                            (3, _) => $micro::<3, 1>(tile, first, vector),
                            (4, _) => $micro::<4, 1>(tile, first, vector),
                            (5, _) => $micro::<5, 1>(tile, first, vector),
                            (6, _) => $micro::<6, 1>(tile, first, vector),
                            (7, _) => $micro::<7, 1>(tile, first, vector),
                            (8, _) => $micro::<8, 1>(tile, first, vector),
                            (9, _) => $micro::<9, 1>(tile, first, vector),
                            (10, _) => $micro::<10, 1>(tile, first, vector),
                            (11, _) => $micro::<11, 1>(tile, first, vector),
                            _ => $micro::<12, 1>(tile, first, vector),
                        }
                    }
                }
                vector += n_vectors;
            }
        }

        /// `R` rows by `V` vectors, from row `first` and vector `vector` of the tile.
        ///
        /// # Safety
        /// As [`super::TileFn`] says; the part lies inside the tile.
        #[target_feature(enable = $features)]
        unsafe fn $micro<const R: usize, const V: usize>(tile: &Tile, first: usize, vector: usize) {
            // SAFETY: every offset is one that `TileFn` lists, with `r < R`, `v < V` inside the tile and
            // `s < n_steps`. A prefetch reads nothing and may point anywhere (hence `wrapping_add`).
            unsafe {
                let a = tile.a.add(first * tile.a_row);
                let b = tile.b.add(vector * tile.b_vector);
                let c = tile.c.add(first * tile.c_row + vector * LANES);
                let mut sums = [[_mm512_setzero_ps(); V]; R];
                for (r, row) in sums.iter_mut().enumerate() {
                    for (v, sum) in row.iter_mut().enumerate() {
                        *sum = _mm512_loadu_ps(c.add(r * tile.c_row + v * LANES));
                    }
                }
                for s in 0..tile.n_steps {
                    let mut columns = [_mm512_setzero_si512(); V];
                    for (v, column) in columns.iter_mut().enumerate() {
                        let at = b.add(s * tile.b_step + v * tile.b_vector);
                        *column = _mm512_loadu_si512(at.cast());
                        _mm_prefetch::<_MM_HINT_T0>(
                            at.wrapping_add(PREFETCH_STEPS * tile.b_step).cast(),
                        );
                    }
                    for (r, row) in sums.iter_mut().enumerate() {
                        let factor = _mm512_set1_epi32(*a.add(r * tile.a_row + s) as i32);
                        for (sum, column) in row.iter_mut().zip(columns) {
                            *sum = $product(*sum, factor, column);
                        }
                    }
                }
                for (r, row) in sums.iter().enumerate() {
                    for (v, sum) in row.iter().enumerate() {
                        _mm512_storeu_ps(c.add(r * tile.c_row + v * LANES), *sum);
                    }
                }
            }
        }
    };
}

kernel!(
    tile_bf16,
    "avx512f,avx512bw,avx512bf16",
    micro_bf16,
    |sum, a: __m512i, b: __m512i| {
        // SAFETY: plain reinterpretation of 64 bytes.
        let (a, b) = (
            std::mem::transmute::<__m512i, __m512bh>(a),
            std::mem::transmute::<__m512i, __m512bh>(b),
        );
        _mm512_dpbf16_ps(sum, a, b)
    }
);
kernel!(tile_f32, "avx512f,avx512bw", micro_f32, |sum, a, b| {
    _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), sum)
});

/// The widest of 8, 4, 2, 1 that fits the vectors left and 24 accumulators.
fn widest(n_rows: usize, n_vectors: usize) -> usize {
    let limit = n_vectors.min(24 / n_rows.max(1));
    [8, 4, 2].into_iter().find(|&n| n <= limit).unwrap_or(1)
}
