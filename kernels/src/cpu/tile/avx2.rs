//! Tiles for AVX2 and FMA: a vector of 16 columns is two registers, up to four rows at a time. A bf16 becomes an f32 by
//! a shift (the first of a pair) or a mask (the second).
#![cfg(target_arch = "x86_64")]

use super::{LANES, Tile};
use std::arch::x86_64::*;

/// Defines a kernel from `to_f32`, which splits eight pairs into `N` vectors of f32.
macro_rules! kernel {
    ($name:ident, $micro:ident, $n:literal, $to_f32:expr) => {
        /// # Safety
        /// As [`super::TileFn`] says.
        #[target_feature(enable = "avx2,fma")]
        pub(super) unsafe fn $name(tile: &Tile) {
            for vector in 0..tile.n_vectors {
                let mut row = 0;
                while row < tile.n_rows {
                    let n_rows = (tile.n_rows - row).min(4);
                    // SAFETY: the part lies inside the tile, for which the caller vouches.
                    unsafe {
                        match n_rows {
                            1 => $micro::<1>(tile, row, vector),
                            2 => $micro::<2>(tile, row, vector),
                            3 => $micro::<3>(tile, row, vector),
                            _ => $micro::<4>(tile, row, vector),
                        }
                    }
                    row += n_rows;
                }
            }
        }

        /// `R` rows by one vector.
        ///
        /// # Safety
        /// As [`super::TileFn`] says; the part lies inside the tile.
        #[target_feature(enable = "avx2,fma")]
        unsafe fn $micro<const R: usize>(tile: &Tile, first: usize, vector: usize) {
            // SAFETY: every offset is one that `TileFn` lists; a prefetch reads nothing and may point anywhere.
            unsafe {
                let a = tile.a.add(first * tile.a_row);
                let b = tile.b.add(vector * tile.b_vector);
                let c = tile.c.add(first * tile.c_row + vector * LANES);
                let mut sums = [[_mm256_setzero_ps(); 2]; R];
                for (r, row) in sums.iter_mut().enumerate() {
                    for (half, sum) in row.iter_mut().enumerate() {
                        *sum = _mm256_loadu_ps(c.add(r * tile.c_row + 8 * half));
                    }
                }
                for s in 0..tile.n_steps {
                    let at = b.add(s * tile.b_step);
                    _mm_prefetch::<_MM_HINT_T0>(at.wrapping_add(24 * tile.b_step).cast());
                    let columns: [[__m256; $n]; 2] = [
                        $to_f32(_mm256_loadu_si256(at.cast())),
                        $to_f32(_mm256_loadu_si256(at.add(8).cast())),
                    ];
                    for (r, row) in sums.iter_mut().enumerate() {
                        let factors: [__m256; $n] =
                            $to_f32(_mm256_set1_epi32(*a.add(r * tile.a_row + s) as i32));
                        for (sum, column) in row.iter_mut().zip(columns) {
                            for (factor, element) in factors.into_iter().zip(column) {
                                *sum = _mm256_fmadd_ps(factor, element, *sum);
                            }
                        }
                    }
                }
                for (r, row) in sums.iter().enumerate() {
                    for (half, sum) in row.iter().enumerate() {
                        _mm256_storeu_ps(c.add(r * tile.c_row + 8 * half), *sum);
                    }
                }
            }
        }
    };
}

kernel!(tile_bf16, micro_bf16, 2, |pairs: __m256i| [
    _mm256_castsi256_ps(_mm256_slli_epi32::<16>(pairs)),
    _mm256_castsi256_ps(_mm256_and_si256(
        pairs,
        _mm256_set1_epi32(0xffff_0000_u32 as i32)
    )),
]);
kernel!(tile_f32, micro_f32, 1, |pairs: __m256i| [
    _mm256_castsi256_ps(pairs)
]);
