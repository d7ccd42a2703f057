//! The one product that everything is made of, `C += A B` on a tile, and its implementations by instruction set.
//!
//! Operands come in *packed pairs*, words of four bytes along the inner dimension: two bf16, or one f32. `A` is row-major
//! in pairs. `B` is read as vectors of 16 pairs, one for each of 16 columns; steps of the inner dimension lie `b_step`
//! pairs apart, and neighbouring vectors of columns `b_vector`. A packed weight, a block of keys and a block of values
//! all have this form, so they share these kernels.
//!
//! Batch invariance starts here: each element of `C` is one chain of additions over rising steps that begins with
//! what `C` held; rows, vectors and where the chain is cut into calls change nothing.

mod amx;
mod avx2;
mod avx512;
mod portable;

use crate::shape::{Numerics, Precision};

/// Packed pairs in a vector of `B`, and columns in a vector of `C`.
pub(crate) const LANES: usize = 16;

/// The arguments of a product: `C[r][16 v + j] += sum over s of A[r][s] . B[s][v][j]`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tile {
    /// `A`, and the distance of its rows in pairs.
    pub(crate) a: *const u32,
    pub(crate) a_row: usize,
    /// `B`, and the distances of its steps and vectors in pairs.
    pub(crate) b: *const u32,
    pub(crate) b_step: usize,
    pub(crate) b_vector: usize,
    /// `C`, and the distance of its rows in elements.
    pub(crate) c: *mut f32,
    pub(crate) c_row: usize,
    /// Rows of `A` and `C`.
    pub(crate) n_rows: usize,
    /// Vectors of columns.
    pub(crate) n_vectors: usize,
    /// Packed pairs along the inner dimension; a multiple of 16 where the kernel is that of weights.
    pub(crate) n_steps: usize,
}

/// A kernel.
///
/// # Safety
/// The machine has the instruction set, `a`, `b` and `c` cover the tile (`a[r * a_row + s]`,
/// `b[s * b_step + v * b_vector + j]`, `c[r * c_row + 16 v + j]`), and nothing else touches `c` meanwhile.
pub(crate) type TileFn = unsafe fn(&Tile);

/// An instruction set that has kernels here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Isa {
    /// AMX tiles for weights, AVX-512 bf16 for the rest.
    Amx,
    /// AVX-512, with bf16 dot products.
    Avx512,
    /// AVX2 and FMA.
    Avx2,
    /// What every machine has.
    Portable,
}

impl Isa {
    /// The instruction sets of this machine that compute with these numbers, best first. The last is always
    /// [`Isa::Portable`].
    pub fn available(numerics: Numerics) -> Vec<Self> {
        let mut found = Vec::with_capacity(4);
        #[cfg(target_arch = "x86_64")]
        {
            let f32_only = numerics == Numerics::uniform(Precision::F32);
            let avx512 =
                is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw");
            let bf16 = avx512 && is_x86_feature_detected!("avx512bf16");
            if numerics.weights == Precision::BF16 && bf16 && amx::is_available() {
                found.push(Self::Amx);
            }
            if bf16 || (avx512 && f32_only) {
                found.push(Self::Avx512);
            }
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                found.push(Self::Avx2);
            }
        }
        found.push(Self::Portable);
        found
    }

    /// The kernel for products with weights, whose inner dimension is padded to 16 pairs.
    pub(crate) fn weight_tile(self, precision: Precision) -> TileFn {
        match (self, precision) {
            #[cfg(target_arch = "x86_64")]
            (Self::Amx, Precision::BF16) => amx::tile_bf16,
            _ => self.tile(precision),
        }
    }

    /// The kernel for everything else.
    pub(crate) fn tile(self, precision: Precision) -> TileFn {
        match (self, precision) {
            #[cfg(target_arch = "x86_64")]
            (Self::Amx | Self::Avx512, Precision::BF16) => avx512::tile_bf16,
            #[cfg(target_arch = "x86_64")]
            (Self::Amx | Self::Avx512, Precision::F32) => avx512::tile_f32,
            #[cfg(target_arch = "x86_64")]
            (Self::Avx2, Precision::BF16) => avx2::tile_bf16,
            #[cfg(target_arch = "x86_64")]
            (Self::Avx2, Precision::F32) => avx2::tile_f32,
            (_, Precision::BF16) => portable::tile_bf16,
            (_, Precision::F32) => portable::tile_f32,
        }
    }

    /// What products with weights of this precision use, in words.
    pub(crate) fn name(self, precision: Precision) -> &'static str {
        match (self, precision) {
            (Self::Amx, Precision::BF16) => "AMX bf16",
            (Self::Avx512 | Self::Amx, Precision::F32) => "AVX-512",
            (Self::Avx512, Precision::BF16) => "AVX-512 bf16",
            (Self::Avx2, _) => "AVX2",
            (Self::Portable, _) => "portable code",
        }
    }
}

/// Elements in a packed pair.
pub(crate) const fn elements_per_pair(precision: Precision) -> usize {
    match precision {
        Precision::BF16 => 2,
        Precision::F32 => 1,
    }
}

#[cfg(test)]
mod tests;
