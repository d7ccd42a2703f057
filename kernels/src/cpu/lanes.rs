//! Element-wise arithmetic over rows: written once as loops over 16 lanes, compiled once for each instruction set.
//!
//! No fused multiply-add and a fixed order of sums: the three versions give the same bits, and a row gives the same
//! bits in every batch. It knows slices, not buffers.

use super::tile::{Isa, LANES};
use crate::device::Precision;
use crate::sampling::exp;

/// Defines the functions of [`Lanes`] from their bodies, once for each instruction set.
macro_rules! compiled {
    ($($(#[doc = $doc:literal])+ fn $name:ident($($argument:ident: $type:ty),*) $(-> $output:ty)? $body:block)+) => {
        /// The functions, compiled for one instruction set.
        pub(crate) struct Lanes {
            $($name: unsafe fn($($type),*) $(-> $output)?,)+
        }

        impl Lanes {
            /// The functions for an instruction set that this machine has.
            pub(crate) fn of(isa: Isa) -> &'static Self {
                match isa {
                    #[cfg(target_arch = "x86_64")]
                    Isa::Amx | Isa::Avx512 => &avx512::LANES,
                    #[cfg(target_arch = "x86_64")]
                    Isa::Avx2 => &avx2::LANES,
                    _ => &portable::LANES,
                }
            }

            $($(#[doc = $doc])+
            pub(crate) fn $name(&self, $($argument: $type),*) $(-> $output)? {
                // SAFETY: the functions are safe but for the instruction set, which `of` was given as one of this
                // machine's ([`Isa::available`]).
                unsafe { (self.$name)($($argument),*) }
            })+
        }

        mod bodies {
            use super::*;
            $(#[inline(always)]
            pub(super) fn $name($($argument: $type),*) $(-> $output)? $body)+
        }

        compiled!(@set portable [] $($name($($argument: $type),*) $(-> $output)?;)+);
        #[cfg(target_arch = "x86_64")]
        compiled!(@set avx2 [#[target_feature(enable = "avx2")]] $($name($($argument: $type),*) $(-> $output)?;)+);
        #[cfg(target_arch = "x86_64")]
        compiled!(@set avx512 [#[target_feature(enable = "avx512f,avx512bw")]] $($name($($argument: $type),*) $(-> $output)?;)+);
    };
    (@set $set:ident $feature:tt $($name:ident($($argument:ident: $type:ty),*) $(-> $output:ty)?;)+) => {
        mod $set {
            use super::*;
            pub(super) static LANES: Lanes = Lanes { $($name,)+ };
            $(compiled!(@function $feature $name($($argument: $type),*) $(-> $output)?);)+
        }
    };
    (@function [$($feature:tt)*] $name:ident($($argument:ident: $type:ty),*) $(-> $output:ty)?) => {
        $($feature)*
        fn $name($($argument: $type),*) $(-> $output)? {
            bodies::$name($($argument),*)
        }
    };
}

compiled! {
    /// `out = x / sqrt(mean(x^2) + epsilon) * weight`.
    fn rms_norm(out: &mut [f32], x: &[f32], weight: &[f32], epsilon: f32) {
        let mean_square = sum(x, |x| x * x) / x.len() as f32;
        let inverse = 1.0 / (mean_square + epsilon).sqrt();
        for ((out, x), weight) in out.iter_mut().zip(x).zip(weight) {
            *out = x * inverse * weight;
        }
    }

    /// `sum += x`.
    fn add(sum: &mut [f32], x: &[f32]) {
        for (sum, x) in sum.iter_mut().zip(x) {
            *sum += x;
        }
    }

    /// `out = silu(gate) * up`.
    fn swiglu(out: &mut [f32], gate: &[f32], up: &[f32]) {
        for ((out, gate), up) in out.iter_mut().zip(gate).zip(up) {
            *out = gate / (1.0 + exp(-gate)) * up;
        }
    }

    /// Rotates the pairs `(low[i], high[i])` by the angles with these cosines and sines.
    fn rotate(low: &mut [f32], high: &mut [f32], cos: &[f32], sin: &[f32]) {
        for (((low, high), cos), sin) in low.iter_mut().zip(high).zip(cos).zip(sin) {
            (*low, *high) = (*low * cos - *high * sin, *high * cos + *low * sin);
        }
    }

    /// Replaces scores `s` by `exp(s * scale - max)`, where `max` is the largest `s * scale`. Gives `(max, sum)`;
    /// where all scores are -infinity, `(-infinity, 0)` and zeros.
    fn exponentiate(scores: &mut [f32], scale: f32) -> (f32, f32) {
        let mut lanes = [f32::NEG_INFINITY; LANES];
        let (chunks, rest) = scores.as_chunks_mut::<LANES>();
        for chunk in chunks.iter_mut() {
            for (lane, score) in lanes.iter_mut().zip(chunk) {
                *score *= scale;
                *lane = if *score > *lane { *score } else { *lane };
            }
        }
        for (lane, score) in lanes.iter_mut().zip(&mut *rest) {
            *score *= scale;
            *lane = if *score > *lane { *score } else { *lane };
        }
        let max = lanes.into_iter().fold(f32::NEG_INFINITY, |a, b| if b > a { b } else { a });
        let shift = if max > f32::NEG_INFINITY { max } else { 0.0 };
        for score in scores.iter_mut() {
            *score = exp(*score - shift);
        }
        (max, sum(scores, |p| p))
    }

    /// `sum = sum * alpha + part * beta`.
    fn blend(sum: &mut [f32], alpha: f32, part: &[f32], beta: f32) {
        for (sum, part) in sum.iter_mut().zip(part) {
            *sum = *sum * alpha + part * beta;
        }
    }

    /// Elements as units: each its own bits, or two rounded to bf16 (an odd last one is paired with zero).
    fn to_units(precision: Precision, elements: &[f32], units: &mut [u32]) {
        match precision {
            Precision::F32 => {
                for (unit, element) in units.iter_mut().zip(elements) {
                    *unit = element.to_bits();
                }
            }
            Precision::BF16 => {
                let (pairs, rest) = elements.as_chunks::<2>();
                for (unit, [low, high]) in units.iter_mut().zip(pairs) {
                    *unit = bf16_bits(*low) | (bf16_bits(*high) << 16);
                }
                if let ([last], Some(unit)) = (rest, units.get_mut(pairs.len())) {
                    *unit = bf16_bits(*last);
                }
            }
        }
    }
}

/// The sum of `f(x)` in 16 lanes, which are then added pairwise.
#[inline(always)]
fn sum(x: &[f32], f: impl Fn(f32) -> f32) -> f32 {
    let mut lanes = [0.0; LANES];
    let (chunks, rest) = x.as_chunks::<LANES>();
    for chunk in chunks {
        for (lane, x) in lanes.iter_mut().zip(chunk) {
            *lane += f(*x);
        }
    }
    for (lane, x) in lanes.iter_mut().zip(rest) {
        *lane += f(*x);
    }
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] += lanes[i + width];
        }
        width /= 2;
    }
    lanes[0]
}

/// A number's bits as bf16, rounded to nearest, ties to even; NaN stays NaN.
#[inline(always)]
pub(crate) fn bf16_bits(x: f32) -> u32 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
    if x.is_nan() {
        (bits >> 16) | 0x40
    } else {
        rounded
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(n: usize, seed: u32) -> Vec<f32> {
        (0..n as u32)
            .map(|i| ((i * 7919 + seed * 104_729) % 1000) as f32 / 125.0 - 4.0)
            .collect()
    }

    #[test]
    fn bf16_rounds_as_the_type_does() {
        for bits in (0..u32::MAX).step_by(65_521 / 13) {
            let x = f32::from_bits(bits);
            assert_eq!(
                bf16_bits(x),
                u32::from(half::bf16::from_f32(x).to_bits()),
                "{x}"
            );
        }
    }

    #[test]
    fn all_instruction_sets_give_the_same_bits() {
        let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        for n in [1, 2, 15, 16, 17, 31, 64, 100] {
            let (x, y, w) = (row(n, 1), row(n, 2), row(n, 3));
            let results = Isa::available(Precision::BF16).into_iter().map(|isa| {
                let lanes = Lanes::of(isa);
                let mut out = [
                    vec![0.0; n],
                    x.clone(),
                    vec![0.0; n],
                    x.clone(),
                    x.clone(),
                    y.clone(),
                ];
                lanes.rms_norm(&mut out[0], &x, &w, 1e-5);
                lanes.add(&mut out[1], &y);
                lanes.swiglu(&mut out[2], &x, &y);
                let (max, sum) = lanes.exponentiate(&mut out[3], 0.125);
                lanes.blend(&mut out[4], 0.3, &y, 0.7);
                let half = n / 2;
                let (low, high) = out[5].split_at_mut(half);
                lanes.rotate(low, high, &x[..half], &y[..half]);
                let mut units = vec![0; n.div_ceil(2)];
                lanes.to_units(Precision::BF16, &x, &mut units);
                (
                    out.iter().map(|x| bits(x)).collect::<Vec<_>>(),
                    max.to_bits(),
                    sum.to_bits(),
                    units,
                )
            });
            let results: Vec<_> = results.collect();
            assert!(
                results.windows(2).all(|pair| pair[0] == pair[1]),
                "{n} elements"
            );
        }
    }

    #[test]
    fn a_masked_row_is_all_zeros() {
        let mut scores = [f32::NEG_INFINITY; 20];
        assert_eq!(
            Lanes::of(Isa::Portable).exponentiate(&mut scores, 2.0),
            (f32::NEG_INFINITY, 0.0)
        );
        assert_eq!(scores, [0.0; 20]);
    }
}
