//! Element-wise arithmetic over rows: written once as loops over 16 lanes, compiled once for each instruction set.
//!
//! No fused multiply-add and a fixed order of sums: the three versions give the same bits, and a row gives the same
//! bits in every batch. It knows slices, not buffers.

use super::tile::{Isa, LANES};
use crate::device::Activation;
use crate::sampling::exp;
use crate::shape::Precision;

/// Defines the functions of [`SimdOps`] from their bodies, once for each instruction set.
macro_rules! compiled {
    ($($(#[doc = $doc:literal])+ fn $name:ident($($argument:ident: $type:ty),*) $(-> $output:ty)? $body:block)+) => {
        /// The functions, compiled for one instruction set.
        pub(crate) struct SimdOps {
            $($name: unsafe fn($($type),*) $(-> $output)?,)+
        }

        impl SimdOps {
            /// The functions for an instruction set that this machine has.
            pub(crate) fn of(isa: Isa) -> &'static Self {
                match isa {
                    #[cfg(target_arch = "x86_64")]
                    Isa::Amx | Isa::Avx512 => &avx512::OPS,
                    #[cfg(target_arch = "x86_64")]
                    Isa::Avx2 => &avx2::OPS,
                    _ => &portable::OPS,
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
            pub(super) static OPS: SimdOps = SimdOps { $($name,)+ };
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
        let inverse = inverse_rms(x, epsilon);
        for ((out, x), weight) in out.iter_mut().zip(x).zip(weight) {
            *out = x * inverse * weight;
        }
    }

    /// The same in place.
    fn rms_norm_in_place(x: &mut [f32], weight: &[f32], epsilon: f32) {
        let inverse = inverse_rms(x, epsilon);
        for (x, weight) in x.iter_mut().zip(weight) {
            *x = *x * inverse * weight;
        }
    }

    /// `x *= factor`.
    fn scale(x: &mut [f32], factor: f32) {
        for x in x.iter_mut() {
            *x *= factor;
        }
    }

    /// `sum += x`.
    fn add(sum: &mut [f32], x: &[f32]) {
        for (sum, x) in sum.iter_mut().zip(x) {
            *sum += x;
        }
    }

    /// `sum += factor * x`.
    fn add_scaled(sum: &mut [f32], factor: f32, x: &[f32]) {
        for (sum, x) in sum.iter_mut().zip(x) {
            *sum += factor * x;
        }
    }

    /// `out = activation(gate) * up`.
    fn gated(activation: Activation, out: &mut [f32], gate: &[f32], up: &[f32]) {
        match activation {
            Activation::Silu => {
                for ((out, gate), up) in out.iter_mut().zip(gate).zip(up) {
                    *out = silu(*gate) * up;
                }
            }
            Activation::GeluTanh => {
                for ((out, gate), up) in out.iter_mut().zip(gate).zip(up) {
                    *out = gelu_tanh(*gate) * up;
                }
            }
        }
    }

    /// `gate = activation(gate) * up`.
    fn gated_in_place(activation: Activation, gate: &mut [f32], up: &[f32]) {
        match activation {
            Activation::Silu => {
                for (gate, up) in gate.iter_mut().zip(up) {
                    *gate = silu(*gate) * up;
                }
            }
            Activation::GeluTanh => {
                for (gate, up) in gate.iter_mut().zip(up) {
                    *gate = gelu_tanh(*gate) * up;
                }
            }
        }
    }

    /// Rotates the pairs `(low[i], high[i])` by the angles with these cosines and sines.
    fn rotate(low: &mut [f32], high: &mut [f32], cos: &[f32], sin: &[f32]) {
        for (((low, high), cos), sin) in low.iter_mut().zip(high).zip(cos).zip(sin) {
            (*low, *high) = (*low * cos - *high * sin, *high * cos + *low * sin);
        }
    }

    /// Replaces scores `s` by `cap * tanh(s * scale / cap)`.
    fn soft_cap(scores: &mut [f32], scale: f32, cap: f32) {
        for score in scores.iter_mut() {
            // tanh(y) = 1 - 2 / (1 + e^2y)
            *score = cap * (1.0 - 2.0 / (1.0 + exp(2.0 * (*score * scale / cap))));
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

    /// Elements as packed pairs: each its own bits, or two rounded to bf16 (an odd last one is paired with zero).
    fn pack_pairs(precision: Precision, elements: &[f32], pairs: &mut [u32]) {
        match precision {
            Precision::F32 => {
                for (pair, element) in pairs.iter_mut().zip(elements) {
                    *pair = element.to_bits();
                }
            }
            Precision::BF16 => {
                let (couples, rest) = elements.as_chunks::<2>();
                for (pair, [low, high]) in pairs.iter_mut().zip(couples) {
                    *pair = bf16_bits(*low) | (bf16_bits(*high) << 16);
                }
                if let ([last], Some(pair)) = (rest, pairs.get_mut(couples.len())) {
                    *pair = bf16_bits(*last);
                }
            }
        }
    }
}

#[inline(always)]
fn inverse_rms(x: &[f32], epsilon: f32) -> f32 {
    let mean_square = sum(x, |x| x * x) / x.len() as f32;
    1.0 / (mean_square + epsilon).sqrt()
}

#[inline(always)]
fn silu(x: f32) -> f32 {
    x / (1.0 + exp(-x))
}

/// As `(1 + tanh(y)) / 2 = 1 / (1 + e^-2y)`, without the cancellation of the left side.
#[inline(always)]
fn gelu_tanh(x: f32) -> f32 {
    const SQRT_2_BY_PI: f32 = 0.797_884_6;
    let y = SQRT_2_BY_PI * (x + 0.044_715 * (x * x * x));
    x / (1.0 + exp(-2.0 * y))
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
    use crate::shape::Numerics;

    fn all_isas() -> Vec<Isa> {
        Isa::available(Numerics::uniform(Precision::BF16))
    }

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
            let results = all_isas().into_iter().map(|isa| {
                let simd = SimdOps::of(isa);
                let mut out: [Vec<f32>; 11] = std::array::from_fn(|_| x.clone());
                simd.rms_norm(&mut out[0], &x, &w, 1e-5);
                simd.add(&mut out[1], &y);
                simd.gated(Activation::Silu, &mut out[2], &x, &y);
                let (max, sum) = simd.exponentiate(&mut out[3], 0.125);
                simd.blend(&mut out[4], 0.3, &y, 0.7);
                let half = n / 2;
                let (low, high) = out[5].split_at_mut(half);
                simd.rotate(low, high, &x[..half], &y[..half]);
                simd.gated(Activation::GeluTanh, &mut out[6], &x, &y);
                simd.soft_cap(&mut out[7], 0.125, 2.0);
                simd.rms_norm_in_place(&mut out[8], &w, 1e-5);
                simd.add_scaled(&mut out[9], 0.3, &y);
                simd.scale(&mut out[10], 0.3);
                let mut pairs = vec![0; n.div_ceil(2)];
                simd.pack_pairs(Precision::BF16, &x, &mut pairs);
                assert_eq!(out[0], out[8], "a norm in place");
                for (activation, i) in [(Activation::Silu, 2), (Activation::GeluTanh, 6)] {
                    let mut gate = x.clone();
                    simd.gated_in_place(activation, &mut gate, &y);
                    assert_eq!(gate, out[i], "{activation:?} in place");
                }
                (
                    out.iter().map(|x| bits(x)).collect::<Vec<_>>(),
                    max.to_bits(),
                    sum.to_bits(),
                    pairs,
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
    fn activations_and_caps_are_close_to_the_real_ones() {
        let simd = SimdOps::of(Isa::Portable);
        let x: Vec<f32> = (-3000..=3000).map(|i| i as f32 / 100.0).collect();
        let one = vec![1.0; x.len()];
        let (mut silu, mut gelu, mut capped) = (x.clone(), x.clone(), x.clone());
        simd.gated(Activation::Silu, &mut silu, &x, &one);
        simd.gated(Activation::GeluTanh, &mut gelu, &x, &one);
        simd.soft_cap(&mut capped, 0.5, 5.0);
        for (i, x) in x.iter().map(|&x| f64::from(x)).enumerate() {
            let inner = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3));
            for (name, got, want) in [
                ("silu", silu[i], x / (1.0 + (-x).exp())),
                ("gelu", gelu[i], x / 2.0 * (1.0 + inner.tanh())),
                ("soft cap", capped[i], 5.0 * (0.5 * x / 5.0).tanh()),
            ] {
                // A dozen roundings, and exp has 2e-7; below -87 exp is 0.
                let tolerance = 2e-6 * want.abs().max(1.0);
                assert!(
                    (f64::from(got) - want).abs() < tolerance,
                    "{name}({x}) = {got}, want {want}"
                );
            }
        }
    }

    #[test]
    fn a_masked_row_is_all_zeros() {
        let mut scores = [f32::NEG_INFINITY; 20];
        assert_eq!(
            SimdOps::of(Isa::Portable).exponentiate(&mut scores, 2.0),
            (f32::NEG_INFINITY, 0.0)
        );
        assert_eq!(scores, [0.0; 20]);
    }
}
