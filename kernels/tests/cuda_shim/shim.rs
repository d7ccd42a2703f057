//! Launches of single kernels, and the noise that they are fed.

use kvasir_kernels::cuda::kernel::{Arguments, Launch};
pub(crate) use kvasir_kernels::cuda::shim::sanitized;

/// Runs a kernel to its end, its threads in an order that `seed` chooses.
///
/// # Safety
/// The addresses in `args` are valid for what the kernel does with them.
pub(crate) unsafe fn launch<A: Arguments>(launch: Launch<A>, seed: u64, args: &A) {
    // SAFETY: the caller's promise.
    unsafe {
        match crate::gpu::wanted() {
            true => crate::gpu::launch(launch, args),
            false => kvasir_kernels::cuda::shim::launch(launch, args, seed),
        }
    }
}

/// The address of what a kernel reads or writes.
pub(crate) fn address<T, P: From<u64>>(of: *const T) -> P {
    P::from(of.expose_provenance() as u64)
}

/// Repeatable noise: SplitMix64 (Steele, Lea, Flood, OOPSLA 2014).
pub(crate) struct Noise(pub(crate) u64);

impl Noise {
    pub(crate) fn word(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// Uniform in [-1, 1).
    pub(crate) fn unit(&mut self) -> f32 {
        (self.word() >> 40) as f32 / 8_388_608.0 - 1.0
    }

    /// Bits of `n` bfloat16 in [-1, 1].
    pub(crate) fn bf16s(&mut self, n: usize) -> Vec<u16> {
        (0..n).map(|_| bf16(self.unit())).collect()
    }

    /// A permutation of `0..n`.
    pub(crate) fn permutation(&mut self, n: usize) -> Vec<u32> {
        let mut out: Vec<u32> = (0..n as u32).collect();
        for i in (1..n).rev() {
            out.swap(i, (self.word() % (i as u64 + 1)) as usize);
        }
        out
    }
}

/// The nearest bfloat16's bits.
pub(crate) fn bf16(x: f32) -> u16 {
    half::bf16::from_f32(x).to_bits()
}

/// A bfloat16's value.
pub(crate) fn value(bits: u16) -> f64 {
    half::bf16::from_bits(bits).to_f64()
}

/// Asserts that each result is as near as `tolerance(i, want)` says; NaN never is.
pub(crate) fn assert_near(why: &str, got: &[u16], want: &[f64], tolerance: impl Fn(f64) -> f64) {
    assert_eq!(got.len(), want.len(), "{why}");
    for (i, (&got, &want)) in got.iter().zip(want).enumerate() {
        let error = (value(got) - want).abs();
        assert!(
            error <= tolerance(want),
            "{why}: element {i} is {}, want {want}",
            value(got)
        );
    }
}
