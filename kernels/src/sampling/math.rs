//! Exponential and logarithm in f32 as fixed sequences of correctly rounded operations: no libm, no fused
//! multiply-add, so that every device and compiler gives the same bits. Written without branches, so that loops over
//! them vectorise.

/// Halves of ln 2: the first has 9 trailing zero bits, so that its product with a small integer is exact.
const LN_2_HIGH: f32 = 0.693_359_4;
const LN_2_LOW: f32 = -2.121_944_4e-4;
/// Adding and subtracting it rounds to the nearest integer, ties to even.
const ROUNDER: f32 = 12_582_912.0;
/// Below it the result would be subnormal: taken as 0.
const EXP_MIN: f32 = -87.0;
const EXP_MAX: f32 = 88.0;

/// `e^x` with a relative error below 2e-7; 0 below -87 (also for -infinity and NaN), `e^88` above 88.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    let inside = if x > EXP_MIN { x } else { EXP_MIN };
    let inside = if inside < EXP_MAX { inside } else { EXP_MAX };
    let n = (inside * std::f32::consts::LOG2_E + ROUNDER) - ROUNDER;
    let r = (inside - n * LN_2_HIGH) - n * LN_2_LOW;
    // Taylor's series: |r| <= ln 2 / 2, so the first term left out is below 6e-9.
    let p = 1.0 / 5040.0;
    let p = p * r + 1.0 / 720.0;
    let p = p * r + 1.0 / 120.0;
    let p = p * r + 1.0 / 24.0;
    let p = p * r + 1.0 / 6.0;
    let p = p * r + 0.5;
    let p = (p * (r * r) + r) + 1.0;
    // n is an integer in [-126, 127], so the shifted exponent stays normal.
    let exponent = ((n + ROUNDER).to_bits() as i32).wrapping_sub(ROUNDER.to_bits() as i32) + 127;
    let power = f32::from_bits((exponent as u32) << 23);
    if x > EXP_MIN { p * power } else { 0.0 }
}

/// `ln x` of a positive normal number with an error below 2e-7 relative (or 1e-7 absolute near 1).
#[inline(always)]
pub fn ln(x: f32) -> f32 {
    // x = m * 2^e with m in [sqrt(1/2), sqrt(2)): subtract the bits of sqrt(1/2), take the exponent, put them back.
    const SQRT_HALF_BITS: u32 = 0x3f35_04f3;
    let shifted = x.to_bits().wrapping_sub(SQRT_HALF_BITS);
    let e = ((shifted as i32) >> 23) as f32;
    let m = f32::from_bits((shifted & 0x007f_ffff) + SQRT_HALF_BITS);
    // ln m = 2 atanh(s), s = (m - 1) / (m + 1), |s| <= 0.1716.
    let f = m - 1.0;
    let s = f / (2.0 + f);
    let z = s * s;
    let p = 2.0 / 9.0;
    let p = p * z + 2.0 / 7.0;
    let p = p * z + 2.0 / 5.0;
    let p = p * z + 2.0 / 3.0;
    let p = p * (z * s) + (s + s);
    e * LN_2_HIGH + (e * LN_2_LOW + p)
}

#[cfg(test)]
mod tests {
    use super::{exp, ln};

    #[test]
    fn exp_is_close_to_the_real_one() {
        for i in 1..2_000_000 {
            let x = -87.0 + i as f32 * (175.0 / 2_000_000.0);
            let want = f64::from(x).exp();
            assert!(
                (f64::from(exp(x)) - want).abs() <= want * 2.5e-7,
                "exp({x}) = {}, want {want}",
                exp(x)
            );
        }
        assert_eq!(
            (exp(0.0), exp(f32::NEG_INFINITY), exp(-1e30), exp(f32::NAN)),
            (1.0, 0.0, 0.0, 0.0)
        );
    }

    #[test]
    fn ln_is_close_to_the_real_one() {
        for bits in (f32::MIN_POSITIVE.to_bits()..f32::MAX.to_bits()).step_by(977) {
            let x = f32::from_bits(bits);
            let want = f64::from(x).ln();
            let error = (f64::from(ln(x)) - want).abs();
            assert!(
                error <= want.abs() * 2e-7,
                "ln({x}) = {}, want {want}",
                ln(x)
            );
        }
        assert_eq!(ln(1.0), 0.0);
    }
}
