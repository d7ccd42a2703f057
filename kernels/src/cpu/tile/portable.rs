//! Tiles in plain Rust: what runs where nothing better does, and what the others are compared with first.

use super::{LANES, Tile};

/// # Safety
/// As [`super::TileFn`] says.
pub(super) unsafe fn tile_f32(tile: &Tile) {
    // SAFETY: the caller's promise, passed on.
    unsafe {
        tile_of(tile, |sum, a, b| {
            sum + f32::from_bits(a) * f32::from_bits(b)
        })
    }
}

/// # Safety
/// As [`super::TileFn`] says.
pub(super) unsafe fn tile_bf16(tile: &Tile) {
    // The first element of a pair is the lower half of the word.
    let low = |pair: u32| f32::from_bits(pair << 16);
    let high = |pair: u32| f32::from_bits(pair & 0xffff_0000);
    // SAFETY: the caller's promise, passed on.
    unsafe {
        tile_of(tile, |sum, a, b| {
            (sum + low(a) * low(b)) + high(a) * high(b)
        })
    }
}

/// # Safety
/// As [`super::TileFn`] says.
#[inline(always)]
unsafe fn tile_of(tile: &Tile, add: impl Fn(f32, u32, u32) -> f32) {
    for v in 0..tile.n_vectors {
        for r in 0..tile.n_rows {
            // SAFETY: `r`, `v` and `s` stay below the tile's bounds, for which the caller vouches; the arrays are read
            // through pointers to `u32` and `f32`, which have their alignment.
            unsafe {
                let c = tile
                    .c
                    .add(r * tile.c_row + v * LANES)
                    .cast::<[f32; LANES]>();
                let mut sums = *c;
                for s in 0..tile.n_steps {
                    let a = *tile.a.add(r * tile.a_row + s);
                    let b = &*tile
                        .b
                        .add(s * tile.b_step + v * tile.b_vector)
                        .cast::<[u32; LANES]>();
                    for (sum, b) in sums.iter_mut().zip(b) {
                        *sum = add(*sum, a, *b);
                    }
                }
                *c = sums;
            }
        }
    }
}
